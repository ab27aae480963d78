//! The instructions. [`select`] chooses the handler of each; what it does not name goes to the native assist.

mod alu;
mod bits;
mod data;
mod flow;
mod fpstate;
mod io;
mod segments;
mod shift;
mod string;
mod system;
mod system_registers;

use cpu::{CpuState, Exception, vector};
use iced_x86::{ConditionCode, Instruction, Mnemonic, OpKind, Register};

use crate::decode::{Insn, Mem, NONE, Op, RIP};
use crate::interp::{Hooks, Interp, Outcome};
use crate::native;
pub(crate) use fpstate::MXCSR_MASK;

/// Executes one decoded instruction. On an error nothing has happened.
pub(crate) type Handler = fn(&mut Cx<'_>, &Insn) -> Result<(), Exception>;

/// What a handler works on.
pub(crate) struct Cx<'a> {
    pub(crate) it: &'a mut Interp,
    pub(crate) st: &'a mut CpuState,
    pub(crate) hooks: &'a mut dyn Hooks,
    /// Where execution goes on; set to the next instruction before the handler runs.
    pub(crate) next: u64,
    /// CPL is 3.
    pub(crate) user: bool,
    /// Set by instructions that hold off interrupts until after the next one.
    pub(crate) shadow: bool,
    /// Set by instructions after which no single-step trap is taken.
    pub(crate) no_trap: bool,
    /// Set by ICEBP: a `#DB` follows.
    pub(crate) debug_trap: bool,
    /// Set by IRET: RF stays as loaded.
    pub(crate) keep_rf: bool,
    /// Set when the step ends otherwise than done.
    pub(crate) outcome: Option<Outcome>,
}

/// The bits of a value of `size` bytes.
#[inline(always)]
pub(crate) fn mask(size: u8) -> u64 {
    if size >= 8 { u64::MAX } else { (1 << (size * 8)) - 1 }
}

/// The sign bit of a value of `size` bytes.
#[inline(always)]
pub(crate) fn sign(size: u8) -> u64 {
    1 << (size * 8 - 1).min(63)
}

/// Sign-extends the low `size` bytes.
#[inline(always)]
pub(crate) fn sign_extend(value: u64, size: u8) -> u64 {
    let shift = 64 - u32::from(size.clamp(1, 8)) * 8;
    ((value << shift) as i64 >> shift) as u64
}

impl Cx<'_> {
    #[inline(always)]
    pub(crate) fn reg(&self, number: u8) -> u64 {
        self.st.gpr[usize::from(number & 15)]
    }

    /// Writes a register: 32-bit writes clear the upper half, 8- and 16-bit writes keep the rest.
    #[inline(always)]
    pub(crate) fn set_reg(&mut self, number: u8, size: u8, value: u64) {
        let register = &mut self.st.gpr[usize::from(number & 15)];
        *register = match size {
            8 => value,
            4 => value & 0xffff_ffff,
            _ => (*register & !mask(size)) | (value & mask(size)),
        };
    }

    /// The offset part of a memory operand's address, without the segment base.
    #[inline(always)]
    pub(crate) fn offset(&self, mem: &Mem) -> u64 {
        let mut address = mem.disp;
        if mem.base < NONE {
            address = address.wrapping_add(self.reg(mem.base));
        } else if mem.base == RIP {
            address = address.wrapping_add(self.next);
        }
        if mem.index < NONE {
            address = address.wrapping_add(self.reg(mem.index) << mem.scale);
        }
        if mem.addr32 { address & 0xffff_ffff } else { address }
    }

    /// The linear address of a memory operand.
    #[inline(always)]
    pub(crate) fn address(&self, mem: &Mem) -> u64 {
        let offset = self.offset(mem);
        if mem.segment == 0 { offset } else { offset.wrapping_add(self.segment_base(mem.segment)) }
    }

    pub(crate) fn segment_base(&self, segment: u8) -> u64 {
        if segment < 4 { 0 } else { self.st.segments.get(usize::from(segment)).map_or(0, |s| s.base) }
    }

    #[inline(always)]
    pub(crate) fn load(&mut self, mem: &Mem, size: u8) -> Result<u64, Exception> {
        let address = self.address(mem);
        self.it.mmu.read(self.st, address, usize::from(size), self.user).map_err(|e| at_stack(e, mem.stack))
    }

    #[inline(always)]
    pub(crate) fn store(&mut self, mem: &Mem, size: u8, value: u64) -> Result<(), Exception> {
        let address = self.address(mem);
        self.it.mmu.write(self.st, address, usize::from(size), value, self.user).map_err(|e| at_stack(e, mem.stack))
    }

    /// Reads an operand, zero-extended.
    #[inline(always)]
    pub(crate) fn get(&mut self, insn: &Insn, op: Op, size: u8) -> Result<u64, Exception> {
        Ok(match op {
            Op::Reg(number) => self.reg(number) & mask(size),
            Op::High(number) => self.reg(number) >> 8 & 0xff,
            Op::Imm => insn.imm & mask(size),
            Op::Mem => self.load(&insn.mem, size)?,
            Op::None => 0,
        })
    }

    /// Writes an operand.
    #[inline(always)]
    pub(crate) fn set(&mut self, insn: &Insn, op: Op, size: u8, value: u64) -> Result<(), Exception> {
        match op {
            Op::Reg(number) => self.set_reg(number, size, value),
            Op::High(number) => {
                let register = &mut self.st.gpr[usize::from(number & 15)];
                *register = (*register & !0xff00) | (value & 0xff) << 8;
            }
            Op::Mem => self.store(&insn.mem, size, value)?,
            Op::Imm | Op::None => {}
        }
        Ok(())
    }

    /// Reads the first operand, computes, writes it back; atomically in memory with LOCK.
    #[inline(always)]
    pub(crate) fn modify(&mut self, insn: &Insn, lock: bool, mut f: impl FnMut(u64) -> u64) -> Result<u64, Exception> {
        if insn.dst == Op::Mem {
            let address = self.address(&insn.mem);
            return self
                .it
                .mmu
                .modify(self.st, address, usize::from(insn.size), self.user, lock, f)
                .map_err(|e| at_stack(e, insn.mem.stack));
        }
        let old = self.get(insn, insn.dst, insn.size)?;
        self.set(insn, insn.dst, insn.size, f(old))?;
        Ok(old)
    }

    /// Pushes values of `size` bytes, the first one first, all or nothing.
    #[inline(always)]
    pub(crate) fn push(&mut self, size: u8, value: u64) -> Result<(), Exception> {
        let rsp = self.st.gpr[cpu::gpr::RSP].wrapping_sub(u64::from(size));
        self.it.mmu.write(self.st, rsp, usize::from(size), value, self.user).map_err(|e| at_stack(e, true))?;
        self.st.gpr[cpu::gpr::RSP] = rsp;
        Ok(())
    }

    /// Reads `size` bytes at RSP + `offset`, without popping.
    #[inline(always)]
    pub(crate) fn peek(&mut self, offset: u64, size: u8) -> Result<u64, Exception> {
        let address = self.st.gpr[cpu::gpr::RSP].wrapping_add(offset);
        self.it.mmu.read(self.st, address, usize::from(size), self.user).map_err(|e| at_stack(e, true))
    }

    /// `#GP(0)` unless CPL is 0.
    pub(crate) fn privileged(&self) -> Result<(), Exception> {
        if self.st.cpl() == 0 { Ok(()) } else { Err(Exception::gp(0)) }
    }

    /// Tests a condition on RFLAGS.
    pub(crate) fn condition(&self, code: ConditionCode) -> bool {
        use cpu::rflags::{CF, OF, PF, SF, ZF};
        let flags = self.st.rflags;
        let less = (flags & SF != 0) != (flags & OF != 0);
        match code {
            ConditionCode::None => true,
            ConditionCode::o => flags & OF != 0,
            ConditionCode::no => flags & OF == 0,
            ConditionCode::b => flags & CF != 0,
            ConditionCode::ae => flags & CF == 0,
            ConditionCode::e => flags & ZF != 0,
            ConditionCode::ne => flags & ZF == 0,
            ConditionCode::be => flags & (CF | ZF) != 0,
            ConditionCode::a => flags & (CF | ZF) == 0,
            ConditionCode::s => flags & SF != 0,
            ConditionCode::ns => flags & SF == 0,
            ConditionCode::p => flags & PF != 0,
            ConditionCode::np => flags & PF == 0,
            ConditionCode::l => less,
            ConditionCode::ge => !less,
            ConditionCode::le => less || flags & ZF != 0,
            ConditionCode::g => !less && flags & ZF == 0,
        }
    }
}

/// A non-canonical address in a stack access is `#SS(0)` where others get `#GP(0)`.
#[inline]
pub(crate) fn at_stack(exception: Exception, stack: bool) -> Exception {
    if stack && exception.vector == vector::GP { Exception::with_code(vector::SS, 0) } else { exception }
}

fn is_gpr_or_memory(raw: &Instruction, index: u32) -> bool {
    match raw.op_kind(index) {
        OpKind::Register => raw.op_register(index).is_gpr(),
        OpKind::Memory => true,
        _ => false,
    }
}

/// The handler of an instruction.
pub(crate) fn select(raw: &Instruction) -> Handler {
    use Mnemonic as M;
    let register =
        |index: u32| if raw.op_kind(index) == OpKind::Register { raw.op_register(index) } else { Register::None };
    match raw.mnemonic() {
        M::Mov => {
            let (to, from) = (register(0), register(1));
            if to.is_segment_register() {
                segments::mov_to_segment
            } else if from.is_segment_register() {
                segments::mov_from_segment
            } else if to.is_cr() || from.is_cr() {
                system_registers::mov_cr
            } else if to.is_dr() || from.is_dr() {
                system_registers::mov_dr
            } else {
                data::mov
            }
        }
        M::Movzx => data::movzx,
        M::Movsx | M::Movsxd => data::movsx,
        M::Lea => data::lea,
        M::Xchg => data::xchg,
        M::Xadd => data::xadd,
        M::Cmpxchg => data::cmpxchg,
        M::Cmpxchg8b => data::cmpxchg8b,
        M::Cmpxchg16b => data::cmpxchg16b,
        M::Bswap => data::bswap,
        M::Xlatb => data::xlat,
        M::Lahf => data::lahf,
        M::Sahf => data::sahf,
        M::Cbw => data::cbw,
        M::Cwde => data::cwde,
        M::Cdqe => data::cdqe,
        M::Cwd => data::cwd,
        M::Cdq => data::cdq,
        M::Cqo => data::cqo,
        // Hints, and the space kept free for hints.
        M::Nop
        | M::Cldemote
        | M::Pause
        | M::Endbr64
        | M::Rdsspd
        | M::Rdsspq
        | M::Endbr32
        | M::Prefetchw
        | M::Prefetchwt1
        | M::Prefetchnta
        | M::Prefetcht0
        | M::Prefetcht1
        | M::Prefetcht2
        | M::Prefetch
        | M::Prefetchit0
        | M::Prefetchit1
        | M::Reservednop => data::nop,
        M::Lfence | M::Sfence | M::Mfence => data::fence,
        M::Clflush | M::Clflushopt | M::Clwb => data::clflush,
        M::Add => alu::add,
        M::Or => alu::or,
        M::Adc => alu::adc,
        M::Sbb => alu::sbb,
        M::And => alu::and,
        M::Sub => alu::sub,
        M::Xor => alu::xor,
        M::Cmp => alu::cmp,
        M::Test => alu::test,
        M::Inc => alu::inc,
        M::Dec => alu::dec,
        M::Neg => alu::neg,
        M::Not => alu::not,
        M::Mul => alu::mul,
        M::Imul => alu::imul,
        M::Div => alu::div,
        M::Idiv => alu::idiv,
        M::Shl | M::Sal => shift::shl,
        M::Shr => shift::shr,
        M::Sar => shift::sar,
        M::Rol => shift::rol,
        M::Ror => shift::ror,
        M::Bt => bits::bt,
        M::Bts => bits::bts,
        M::Btr => bits::btr,
        M::Btc => bits::btc,
        M::Clc => bits::clc,
        M::Stc => bits::stc,
        M::Cmc => bits::cmc,
        M::Cld => bits::cld,
        M::Std => bits::std,
        M::Push => flow::push,
        M::Pop => flow::pop,
        M::Pushf | M::Pushfq => flow::pushf,
        M::Popf | M::Popfq => flow::popf,
        M::Call => {
            if matches!(
                raw.memory_size(),
                iced_x86::MemorySize::SegPtr16 | iced_x86::MemorySize::SegPtr32 | iced_x86::MemorySize::SegPtr64
            ) {
                segments::call_far
            } else {
                flow::call
            }
        }
        M::Jmp => {
            if matches!(
                raw.memory_size(),
                iced_x86::MemorySize::SegPtr16 | iced_x86::MemorySize::SegPtr32 | iced_x86::MemorySize::SegPtr64
            ) {
                segments::jmp_far
            } else {
                flow::jmp
            }
        }
        M::Ret => flow::ret,
        M::Retf => segments::retf,
        M::Enter => flow::enter,
        M::Leave => flow::leave,
        M::Loop => flow::loop_,
        M::Loope => flow::loope,
        M::Loopne => flow::loopne,
        M::Jrcxz | M::Jecxz => flow::jrcxz,
        M::Int => flow::int,
        M::Int3 => flow::int3,
        M::Int1 => flow::icebp,
        M::Ud0 | M::Ud1 | M::Ud2 => flow::ud,
        M::Movsb | M::Movsw | M::Movsq => string::movs,
        M::Movsd if raw.is_string_instruction() => string::movs,
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => string::stos,
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => string::lods,
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => string::scas,
        M::Cmpsb | M::Cmpsw | M::Cmpsq => string::cmps,
        M::Cmpsd if raw.is_string_instruction() => string::cmps,
        M::In => io::in_,
        M::Out => io::out,
        M::Insb | M::Insw | M::Insd => io::ins,
        M::Outsb | M::Outsw | M::Outsd => io::outs,
        M::Cli => system::cli,
        M::Sti => system::sti,
        M::Hlt => system::hlt,
        M::Syscall => system::syscall,
        M::Sysret | M::Sysretq => system::sysret,
        M::Sysenter => system::sysenter,
        M::Sysexit | M::Sysexitq => system::sysexit,
        M::Iret | M::Iretd | M::Iretq => segments::iret,
        M::Swapgs => system::swapgs,
        M::Cpuid => system::cpuid,
        M::Rdtsc => system::rdtsc,
        M::Rdtscp => system::rdtscp,
        M::Rdpmc => system::rdpmc,
        M::Rdmsr => system::rdmsr,
        M::Wrmsr => system::wrmsr,
        M::Rdpid => system::rdpid,
        M::Invd | M::Wbinvd | M::Wbnoinvd => system::wbinvd,
        M::Invlpg => system::invlpg,
        M::Vmcall | M::Vmmcall => system::vmcall,
        M::Rdfsbase => system::rdfsbase,
        M::Rdgsbase => system::rdgsbase,
        M::Wrfsbase => system::wrfsbase,
        M::Wrgsbase => system::wrgsbase,
        M::Clac => system::clac,
        M::Stac => system::stac,
        M::Clts => system_registers::clts,
        M::Smsw => system_registers::smsw,
        M::Lmsw => system_registers::lmsw,
        M::Lgdt => system_registers::lgdt,
        M::Lidt => system_registers::lidt,
        M::Sgdt => system_registers::sgdt,
        M::Sidt => system_registers::sidt,
        M::Lldt => segments::lldt,
        M::Ltr => segments::ltr,
        M::Sldt => segments::sldt,
        M::Str => segments::str,
        M::Lar => segments::lar,
        M::Lsl => segments::lsl,
        M::Verr => segments::verr,
        M::Verw => segments::verw,
        M::Lss => segments::load_far_pointer,
        M::Lfs => segments::load_far_pointer,
        M::Lgs => segments::load_far_pointer,
        M::Xgetbv => fpstate::xgetbv,
        M::Xsetbv => fpstate::xsetbv,
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 => fpstate::xsave,
        M::Xrstor | M::Xrstor64 => fpstate::xrstor,
        M::Fxsave | M::Fxsave64 => fpstate::fxsave,
        M::Fxrstor | M::Fxrstor64 => fpstate::fxrstor,
        M::Rsm
        | M::Monitor
        | M::Mwait
        | M::Invpcid
        | M::Xsavec
        | M::Xsavec64
        | M::Xsaves
        | M::Xsaves64
        | M::Xrstors
        | M::Xrstors64 => flow::ud,
        _ => match raw.condition_code() {
            ConditionCode::None => native::select(raw),
            _ if raw.is_jcc_short_or_near() => flow::jcc,
            _ if is_gpr_or_memory(raw, 0) && raw.op_count() == 1 => data::setcc,
            _ if raw.op_count() == 2 && is_gpr_or_memory(raw, 0) && is_gpr_or_memory(raw, 1) => data::cmov,
            _ => native::select(raw),
        },
    }
}
