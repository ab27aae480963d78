//! Decoding of a guest block, classification of its instructions, liveness of flags.

use iced_x86::{
    Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, InstructionInfoFactory,
    InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register, RflagsBits,
};
use interp::host_flags::{more_mxcsr_bits, overwritten};

/// All six arithmetic flags, in iced's numbering.
pub const ALL_FLAGS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What translated code depends on besides its address. Blocks are translated for one mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub struct Mode {
    /// Privilege level 3 (else 0).
    pub user: bool,
    /// CR0.TS or CR0.EM is set or CR4.OSFXSR clear: no x87, MMX, SSE without the interpreter.
    pub no_fpu: bool,
    /// XCR0 or CR4.OSXSAVE do not allow AVX.
    pub no_avx: bool,
    /// Each access has a check of its own: for code whose groups of accesses cross a page.
    pub plain: bool,
    /// RFLAGS.DF is set.
    pub df: bool,
    /// RDTSC must go through the interpreter (CR4.TSD at level 3, or a TSC offset).
    pub no_tsc: bool,
}

impl Mode {
    /// As a small number, for hashing and arrays.
    pub const fn bits(self) -> u8 {
        self.user as u8
            | (self.no_fpu as u8) << 1
            | (self.no_avx as u8) << 2
            | (self.no_tsc as u8) << 3
            | (self.df as u8) << 4
            | (self.plain as u8) << 5
    }
}

impl std::fmt::Display for Mode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.user { "user" } else { "kernel" })?;
        let flags = [(self.no_fpu, ",no-fpu"), (self.no_avx, ",no-avx"), (self.df, ",df"), (self.no_tsc, ",no-tsc")];
        flags.iter().filter(|flag| flag.0).try_for_each(|flag| f.write_str(flag.1))
    }
}

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Nothing to do.
    Skip,
    /// No memory operand: copied, registers renamed where needed.
    Plain,
    /// One explicit memory operand of `size` bytes.
    Memory {
        write: bool,
        size: u16,
    },
    /// BT, BTS, BTR, BTC with a memory operand and a register bit offset.
    BitTest {
        write: bool,
    },
    Lea,
    Push,
    PushMemory,
    Pop,
    Pushf,
    Leave,
    Jmp,
    Jcc,
    /// JRCXZ, LOOP and friends.
    CountJump,
    Call,
    JmpIndirect,
    CallIndirect,
    Ret,
    Cli,
    Sti,
    Swapgs,
    Rdtsc,
    Syscall,
    Sysret,
    Iret,
    /// A segment selector to a general register.
    MovFromSegment,
    /// CR0, CR2, CR3 or CR4 to a general register.
    MovFromControl,
    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE.
    SegmentBase,
    /// XSAVE, XSAVEOPT or XRSTOR.
    ExtendedState {
        restore: bool,
    },
    Popf,
    /// PAUSE where several vCPUs may share a core.
    Pause,
    /// MOVS or STOS of `size` bytes, with or without REP, upwards.
    String {
        movs: bool,
        rep: bool,
        size: u8,
    },
    /// The interpreter runs it.
    Step,
}

impl Class {
    /// Does the block end here?
    pub fn ends_block(self) -> bool {
        matches!(
            self,
            Self::Jmp | Self::JmpIndirect | Self::Ret | Self::Step | Self::Syscall | Self::Sysret | Self::Iret
        )
    }
}

/// One guest instruction of a block.
#[derive(Clone)]
pub struct Insn {
    pub ins: Instruction,
    /// Offset of its first byte in the page.
    pub offset: u16,
    pub class: Class,
    /// Arithmetic flags it reads.
    pub reads: u32,
    /// Arithmetic flags it certainly overwrites.
    pub kills: u32,
    /// Flags somebody may read at or after this instruction.
    pub live_before: u32,
    /// Flags somebody may read after this instruction.
    pub live_after: u32,
    /// Registers used, by number, as a bit mask (general registers only).
    pub used: u16,
    /// Operands that the instruction may write, as a bit mask.
    pub writes: u8,
    /// Operands whose old value matters, as a bit mask.
    pub keeps: u8,
    /// General registers that the instruction may write, by number, as a bit mask.
    pub written: u16,
    /// Its part in a group of accesses.
    pub group: Option<crate::groups::Group>,
}

impl Insn {
    /// Offset in the page of the byte after it.
    pub fn end(&self) -> usize {
        usize::from(self.offset) + self.ins.len()
    }
}

/// Limits of a block.
const MAX_INSNS: usize = 48;
const MAX_BRANCHES: usize = 8;

/// Decodes blocks.
pub struct Analyzer {
    factory: InstructionInfoFactory,
    allowed: Vec<bool>,
    /// Treat all flags as live everywhere, so that even flags nobody reads are exact at faults.
    pub precise_flags: bool,
    /// Guest-virtual addresses that a block may begin at, but not contain: a debugger's breakpoints. Of a movable page, see
    /// [`crate::cache::Place`], at whatever address.
    pub breakpoints: Vec<u64>,
    /// Count PAUSEs: there are several vCPUs.
    pub count_pauses: bool,
    /// XSAVE and XRSTOR by the host's CPU, which knows better than the interpreter which components are in use.
    pub host_xsave: bool,
    /// Room for the instructions of the next block.
    pub spare: Vec<Insn>,
    /// 64-byte pieces of the page that the last block's flags depend on besides its own bytes, as a bit mask.
    pub ahead: u64,
}

impl Analyzer {
    pub fn new(precise_flags: bool) -> Self {
        use CpuidFeature as F;
        let mut allowed = vec![false; F::values().map(|f| f as usize).max().unwrap_or(0) + 1];
        for feature in [
            F::INTEL8086,
            F::INTEL8086_ONLY,
            F::INTEL186,
            F::INTEL286,
            F::INTEL386,
            F::INTEL486,
            F::X64,
            F::ADX,
            F::AES,
            F::AVX,
            F::AVX2,
            F::BMI1,
            F::BMI2,
            F::CMOV,
            F::CMPXCHG16B,
            F::CX8,
            F::F16C,
            F::FMA,
            F::FPU,
            F::FPU287,
            F::FPU387,
            F::FXSR,
            F::GFNI,
            F::LZCNT,
            F::MMX,
            F::MOVBE,
            F::MULTIBYTENOP,
            F::PAUSE,
            F::PCLMULQDQ,
            F::POPCNT,
            F::PREFETCHW,
            F::RDRAND,
            F::RDSEED,
            F::SHA,
            F::SSE,
            F::SSE2,
            F::SSE3,
            F::SSE4_1,
            F::SSE4_2,
            F::SSSE3,
            F::TSC,
            F::VAES,
            F::VPCLMULQDQ,
            F::CET_IBT,
        ] {
            allowed[feature as usize] = true;
        }
        Self {
            factory: InstructionInfoFactory::new(),
            allowed,
            precise_flags,
            breakpoints: Vec::new(),
            count_pauses: false,
            host_xsave: false,
            spare: Vec::new(),
            ahead: 0,
        }
    }

    /// Decodes the block that starts at `offset` of the page with contents `page`, mapped at guest-virtual `page_address`.
    /// At most `limit` instructions. Empty when the first instruction goes beyond `page`.
    pub fn block(&mut self, page: &[u8], page_address: u64, offset: usize, mode: Mode, limit: usize) -> Vec<Insn> {
        let mut insns = std::mem::take(&mut self.spare);
        insns.clear();
        let mut decoder = Decoder::with_ip(64, page, page_address, DecoderOptions::NONE);
        if decoder.set_position(offset).is_err() {
            return insns;
        }
        decoder.set_ip(page_address + offset as u64);
        let mut branches = 0;
        while insns.len() < MAX_INSNS.min(limit) && decoder.can_decode() {
            let position = decoder.position();
            let here = page_address.wrapping_add(position as u64);
            let movable = mode.user && page_address == 0;
            if !insns.is_empty() && self.breakpoints.iter().any(|&b| b == here || movable && b & 0xfff == here) {
                break;
            }
            let ins = decoder.decode();
            if ins.is_invalid() && position + 15 > page.len() {
                break; // crosses into the next page
            }
            let insn = self.classify(ins, position as u16, mode);
            let class = insn.class;
            insns.push(insn);
            if class.ends_block() {
                break;
            }
            if matches!(class, Class::Jcc | Class::CountJump | Class::Call | Class::CallIndirect) {
                branches += 1;
                if branches > MAX_BRANCHES {
                    break;
                }
            }
        }
        self.ahead = 0;
        self.liveness(&mut insns, page, page_address);
        if !mode.plain {
            crate::groups::assign(&mut insns);
        }
        insns
    }

    fn liveness(&mut self, insns: &mut [Insn], page: &[u8], page_address: u64) {
        let Some(last) = insns.last() else { return };
        let mut live = match last.class {
            Class::Jmp => self.live_at(page, page_address, last.ins.near_branch64()),
            class if class.ends_block() => ALL_FLAGS,
            _ => self.live_at(page, page_address, last.ins.next_ip()),
        };
        for insn in insns.iter_mut().rev() {
            if matches!(insn.class, Class::Jcc | Class::CountJump) {
                insn.reads = arithmetic_reads(&insn.ins) | self.live_at(page, page_address, insn.ins.near_branch64());
            }
            insn.live_after = live;
            live = (live & !insn.kills) | insn.reads;
            if self.precise_flags {
                live = ALL_FLAGS;
            }
            insn.live_before = live;
        }
    }

    /// Which flags may be read at `target` before they are overwritten, looking a few instructions ahead in the same page.
    fn live_at(&mut self, page: &[u8], page_address: u64, target: u64) -> u32 {
        if self.precise_flags {
            return ALL_FLAGS;
        }
        let mut offset = target.wrapping_sub(page_address);
        let mut live = ALL_FLAGS;
        let mut read = 0;
        let mut decoder = Decoder::with_ip(64, page, page_address, DecoderOptions::NONE);
        for _ in 0..10 {
            if offset >= page.len() as u64 || decoder.set_position(offset as usize).is_err() {
                break;
            }
            decoder.set_ip(page_address + offset);
            let ins = decoder.decode();
            if ins.is_invalid() {
                break;
            }
            self.ahead |= 1 << (offset / 64).min(63) | 1 << ((offset + ins.len() as u64 - 1) / 64).min(63);
            read |= live & arithmetic_reads(&ins);
            live &= !(certain_kills(&ins) | read);
            if live == 0 {
                return read;
            }
            match ins.flow_control() {
                FlowControl::Next => offset += ins.len() as u64,
                FlowControl::UnconditionalBranch if ins.is_jmp_short_or_near() => {
                    offset = ins.near_branch64().wrapping_sub(page_address);
                }
                _ => break,
            }
            if must_step(&ins) {
                break;
            }
        }
        read | live
    }

    fn classify(&mut self, ins: Instruction, offset: u16, mode: Mode) -> Insn {
        let mut class = self.class(&ins, mode);
        if matches!(class, Class::Jmp | Class::Jcc | Class::CountJump | Class::Call)
            && !cpu::paging::is_canonical(ins.near_branch64())
        {
            class = Class::Step; // #GP at the jump
        }
        let (reads, kills) = match class {
            Class::Step
            | Class::JmpIndirect
            | Class::Ret
            | Class::Pushf
            | Class::Syscall
            | Class::Sysret
            | Class::Iret => (ALL_FLAGS, 0),
            Class::Call | Class::CallIndirect => (ALL_FLAGS, ALL_FLAGS),
            Class::Jcc | Class::CountJump => (ALL_FLAGS, 0),
            Class::Popf | Class::Pause => (ALL_FLAGS, 0),
            Class::MovFromSegment | Class::MovFromControl | Class::SegmentBase | Class::ExtendedState { .. } => (0, 0),
            Class::Jmp | Class::Skip => (0, 0),
            _ => (arithmetic_reads(&ins), certain_kills(&ins)),
        };
        let mut used = 0;
        let mut writes = 0;
        let mut keeps = 0;
        let mut written = 0;
        if matches!(class, Class::Plain | Class::Memory { .. } | Class::BitTest { .. }) {
            let info = self.factory.info_options(&ins, InstructionInfoOptions::NO_MEMORY_USAGE);
            for register in info.used_registers() {
                let full = register.register().full_register();
                if full.is_gpr() {
                    used |= 1 << full.number();
                    if !matches!(register.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess) {
                        written |= 1 << full.number();
                    }
                }
            }
            for i in 0..ins.op_count().min(5) {
                if !matches!(
                    info.op_access(i),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                ) {
                    writes |= 1 << i;
                }
                let whole = ins.op_kind(i) == OpKind::Register && ins.op_register(i).size() >= 4;
                if info.op_access(i) != OpAccess::Write || !whole {
                    keeps |= 1 << i;
                }
            }
            // NO_MEMORY_USAGE leaves address registers out.
            for register in [ins.memory_base(), ins.memory_index()] {
                if register.is_gpr() {
                    used |= 1 << register.full_register().number();
                }
            }
        }
        Insn {
            ins,
            offset,
            class,
            reads,
            kills,
            live_before: ALL_FLAGS,
            live_after: ALL_FLAGS,
            used,
            writes,
            keeps,
            written,
            group: None,
        }
    }

    /// How `ins` is translated.
    pub fn class(&mut self, ins: &Instruction, mode: Mode) -> Class {
        use Mnemonic as M;
        match ins.code() {
            Code::Syscall if mode.user => return Class::Syscall,
            Code::Sysretq if !mode.user => return Class::Sysret,
            Code::Iretq if !mode.user => return Class::Iret,
            Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg
                if ins.op0_kind() == OpKind::Register =>
            {
                return Class::MovFromSegment;
            }
            Code::Mov_r64_cr
                if !mode.user
                    && matches!(ins.op1_register(), Register::CR0 | Register::CR2 | Register::CR3 | Register::CR4) =>
            {
                return Class::MovFromControl;
            }
            Code::Rdfsbase_r32
            | Code::Rdfsbase_r64
            | Code::Rdgsbase_r32
            | Code::Rdgsbase_r64
            | Code::Wrfsbase_r32
            | Code::Wrfsbase_r64
            | Code::Wrgsbase_r32
            | Code::Wrgsbase_r64 => return Class::SegmentBase,
            Code::Xsave_mem
            | Code::Xsave64_mem
            | Code::Xsaveopt_mem
            | Code::Xsaveopt64_mem
            | Code::Xrstor_mem
            | Code::Xrstor64_mem => {
                let restore = matches!(ins.mnemonic(), M::Xrstor | M::Xrstor64);
                let native = self.host_xsave && !mode.no_fpu && !mode.no_avx;
                return if native { Class::ExtendedState { restore } } else { Class::Step };
            }
            Code::Popfq if !mode.user && !mode.df => return Class::Popf,
            // Of two bytes in memory AMD's CPUs read four.
            Code::Movsxd_r16_rm16 if ins.op1_kind() == OpKind::Memory => return Class::Step,
            // Without shadow stacks these are no-operations.
            Code::Rdsspd_r32 | Code::Rdsspq_r64 => return Class::Skip,
            Code::Cld => return if mode.df { Class::Step } else { Class::Skip },
            Code::Std => return if mode.df { Class::Skip } else { Class::Step },
            Code::Movsb_m8_m8 => return string(ins, mode, true, 1),
            Code::Movsw_m16_m16 => return string(ins, mode, true, 2),
            Code::Movsd_m32_m32 => return string(ins, mode, true, 4),
            Code::Movsq_m64_m64 => return string(ins, mode, true, 8),
            Code::Stosb_m8_AL => return string(ins, mode, false, 1),
            Code::Stosw_m16_AX => return string(ins, mode, false, 2),
            Code::Stosd_m32_EAX => return string(ins, mode, false, 4),
            Code::Stosq_m64_RAX => return string(ins, mode, false, 8),
            _ => {}
        }
        if ins.is_invalid() || must_step(ins) {
            return Class::Step;
        }
        let features = ins.code().cpuid_features();
        if features.iter().any(|&f| !self.allowed[f as usize]) {
            return Class::Step;
        }
        match ins.code().encoding() {
            EncodingKind::Legacy => {}
            EncodingKind::VEX => {
                if mode.no_avx && features.iter().any(|f| !matches!(f, CpuidFeature::BMI1 | CpuidFeature::BMI2)) {
                    return Class::Step;
                }
            }
            _ => return Class::Step,
        }
        // WAIT counts as an instruction of the 8086.
        if mode.no_fpu && (ins.mnemonic() == M::Wait || features.iter().any(|&f| needs_fpu(f))) {
            return Class::Step;
        }
        match ins.mnemonic() {
            // The CPU would take what must fault.
            M::Ldmxcsr | M::Vldmxcsr if more_mxcsr_bits() => return Class::Step,
            M::Nop
            | M::Endbr64
            | M::Endbr32
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchnta
            | M::Prefetchw
            | M::Prefetch
            | M::Reservednop => return Class::Skip,
            M::Pause if self.count_pauses => return Class::Pause,
            M::Cli => return if mode.user { Class::Step } else { Class::Cli },
            M::Sti => return if mode.user { Class::Step } else { Class::Sti },
            M::Swapgs => return if mode.user { Class::Step } else { Class::Swapgs },
            M::Rdtsc => return if mode.no_tsc { Class::Step } else { Class::Rdtsc },
            M::Pushfq => return Class::Pushf,
            M::Leave => return if ins.code() == Code::Leaveq { Class::Leave } else { Class::Step },
            _ => {}
        }
        match ins.code() {
            Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => return Class::Jmp,
            Code::Call_rel32_64 => return Class::Call,
            Code::Jmp_rm64 => return Class::JmpIndirect,
            Code::Call_rm64 => return Class::CallIndirect,
            Code::Retnq | Code::Retnq_imm16 => return Class::Ret,
            Code::Push_r64 | Code::Pushq_imm8 | Code::Pushq_imm32 => return Class::Push,
            Code::Push_rm64 => {
                return if ins.op0_kind() == OpKind::Memory { Class::PushMemory } else { Class::Push };
            }
            Code::Pop_r64 => return Class::Pop,
            Code::Pop_rm64 => return Class::Step,
            _ => {}
        }
        if ins.is_jcc_short_or_near() {
            return Class::Jcc;
        }
        match ins.code() {
            Code::Jrcxz_rel8_64
            | Code::Jecxz_rel8_64
            | Code::Loop_rel8_64_RCX
            | Code::Loop_rel8_64_ECX
            | Code::Loope_rel8_64_RCX
            | Code::Loope_rel8_64_ECX
            | Code::Loopne_rel8_64_RCX
            | Code::Loopne_rel8_64_ECX => return Class::CountJump,
            _ => {}
        }
        if ins.flow_control() != FlowControl::Next {
            return Class::Step;
        }
        if matches!(ins.mnemonic(), M::Push | M::Pop) {
            return Class::Step;
        }
        let mut memory = false;
        for i in 0..ins.op_count() {
            match ins.op_kind(i) {
                OpKind::Memory => memory = true,
                OpKind::Register => {
                    let register = ins.op_register(i);
                    if register.is_segment_register() || register.is_cr() || register.is_dr() || register.is_tr() {
                        return Class::Step;
                    }
                }
                OpKind::Immediate8
                | OpKind::Immediate8_2nd
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate64
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate32to64 => {}
                _ => return Class::Step,
            }
        }
        if ins.mnemonic() == M::Lea {
            return Class::Lea;
        }
        if !memory {
            return if ins.has_lock_prefix() { Class::Step } else { Class::Plain };
        }
        if ins.is_vsib() {
            return Class::Step;
        }
        let size = ins.memory_size().size();
        if size == 0 || size > 64 {
            return Class::Step;
        }
        let info = self.factory.info(ins);
        let [used] = info.used_memory() else { return Class::Step };
        let write = match used.access() {
            OpAccess::Read | OpAccess::CondRead => false,
            OpAccess::Write | OpAccess::ReadWrite | OpAccess::ReadCondWrite => true,
            _ => return Class::Step,
        };
        if matches!(ins.mnemonic(), M::Bt | M::Bts | M::Btr | M::Btc) && ins.op1_kind() == OpKind::Register {
            return if ins.memory_index() == Register::None && size >= 4 {
                Class::BitTest { write }
            } else {
                Class::Step
            };
        }
        Class::Memory { write, size: size as u16 }
    }
}

fn string(ins: &Instruction, mode: Mode, movs: bool, size: u8) -> Class {
    let narrow = (0..ins.op_count())
        .any(|i| !matches!(ins.op_kind(i), OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::Register));
    if mode.df || narrow || ins.has_repne_prefix() || matches!(ins.memory_segment(), Register::FS | Register::GS) {
        return Class::Step;
    }
    Class::String { movs, rep: ins.has_rep_prefix(), size }
}

/// Does the instruction read or write x87, MMX, SSE or AVX state?
pub fn uses_fpu(ins: &Instruction) -> bool {
    ins.is_invalid()
        || ins
            .code()
            .cpuid_features()
            .iter()
            .any(|&f| needs_fpu(f) || matches!(f, CpuidFeature::FXSR | CpuidFeature::XSAVE | CpuidFeature::XSAVEOPT))
        || !matches!(ins.code().encoding(), EncodingKind::Legacy)
}

fn needs_fpu(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    matches!(
        feature,
        F::FPU
            | F::FPU287
            | F::FPU387
            | F::MMX
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::AES
            | F::PCLMULQDQ
            | F::SHA
            | F::GFNI
            | F::AVX
            | F::AVX2
            | F::FMA
            | F::F16C
            | F::VAES
            | F::VPCLMULQDQ
    )
}

/// Instructions that always go through the interpreter.
fn must_step(ins: &Instruction) -> bool {
    use Mnemonic as M;
    if matches!(
        ins.mnemonic(),
        M::Cld | M::Std | M::Cli | M::Sti | M::Swapgs | M::Rdtsc | M::Pushfq | M::Ret | M::Jmp | M::Call
    ) {
        return false;
    }
    ins.is_privileged()
        || ins.is_string_instruction()
        || matches!(
            ins.mnemonic(),
            M::Popf
                | M::Popfq
                | M::Popfd
                | M::Pushf
                | M::Pushfd
                | M::Cpuid
                | M::Syscall
                | M::Sysret
                | M::Sysretq
                | M::Sysenter
                | M::Sysexit
                | M::Sysexitq
                | M::Int
                | M::Int1
                | M::Int3
                | M::Into
                | M::Iret
                | M::Iretd
                | M::Iretq
                | M::Rdpmc
                | M::Rdpid
                | M::Rdtscp
                | M::Xgetbv
                | M::Xsetbv
                | M::Sgdt
                | M::Sidt
                | M::Sldt
                | M::Str
                | M::Smsw
                | M::Lar
                | M::Lsl
                | M::Verr
                | M::Verw
                | M::Clac
                | M::Stac
                | M::Monitor
                | M::Mwait
                | M::Rdfsbase
                | M::Rdgsbase
                | M::Wrfsbase
                | M::Wrgsbase
                | M::Fxsave
                | M::Fxsave64
                | M::Fxrstor
                | M::Fxrstor64
                | M::Xsave
                | M::Xsave64
                | M::Xsaveopt
                | M::Xsaveopt64
                | M::Xrstor
                | M::Xrstor64
                | M::Fnstenv
                | M::Fstenv
                | M::Fldenv
                | M::Fnsave
                | M::Fsave
                | M::Frstor
                | M::Maskmovdqu
                | M::Vmaskmovdqu
                | M::Maskmovq
                | M::Vmaskmovps
                | M::Vmaskmovpd
                | M::Vpmaskmovd
                | M::Vpmaskmovq
                | M::Xlatb
                | M::Enter
                | M::Clflush
                | M::Clflushopt
                | M::Clwb
                | M::In
                | M::Out
                | M::Hlt
                | M::Vmcall
                | M::Vmmcall
                | M::Les
                | M::Lds
                | M::Lss
                | M::Lfs
                | M::Lgs
                | M::Ud0
                | M::Ud1
                | M::Ud2
        )
}

/// RCL and RCR by an immediate that is a multiple of width + 1 change nothing, say manuals and decoder; some CPUs set OF anew by CF.
fn through_carry(ins: &Instruction) -> u32 {
    if matches!(ins.mnemonic(), Mnemonic::Rcl | Mnemonic::Rcr) { RflagsBits::CF } else { 0 }
}

fn arithmetic_reads(ins: &Instruction) -> u32 {
    (ins.rflags_read() | through_carry(ins)) & ALL_FLAGS
}

/// May the instruction change arithmetic flags?
pub fn changes_flags(ins: &Instruction) -> bool {
    (ins.rflags_modified() | through_carry(ins)) & ALL_FLAGS != 0
}

/// Flags the instruction overwrites whatever its operands are, on this CPU.
fn certain_kills(ins: &Instruction) -> u32 {
    use Mnemonic as M;
    match ins.mnemonic() {
        M::Rcl | M::Rcr => 0, // some widths take the count modulo 9 or 17
        M::Shl | M::Shr | M::Sar | M::Sal | M::Rol | M::Ror | M::Shld | M::Shrd => {
            let count = (0..ins.op_count()).rev().find_map(|i| match ins.op_kind(i) {
                OpKind::Immediate8 => Some(ins.immediate8()),
                _ => None,
            });
            match count {
                Some(count) if count & 0x1f != 0 => overwritten(ins),
                _ => 0,
            }
        }
        _ if ins.has_rep_prefix() || ins.has_repne_prefix() => 0,
        _ => overwritten(ins),
    }
}
