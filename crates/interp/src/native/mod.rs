//! The native assist: instructions that are not sensitive run on the host CPU itself.
//!
//! The instruction is encoded anew with its memory operand replaced by one through a register that points to a bounce buffer, and with
//! RSP, should it be an operand, replaced by another register. The buffer lies at the same place within 64 bytes as the guest's
//! operand, so alignment faults happen as for the guest. The order is: checks of the operand, fill, run, write back. A fault in the run
//! leaves guest registers and memory as they were.
//!
//! Instructions with more than one memory element (gathers, masked moves) are not run but done in [`vector`].

mod arena;
mod signals;
mod vector;

use std::collections::HashMap;

use cpu::paging::Kind;
use cpu::{Exception, FpState, cr0, cr4, rflags, vector as number};
use iced_x86::{CpuidFeature, EncodingKind, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use crate::decode::{Insn, gpr_number};
use crate::host_flags::is_amd;
use crate::interp::Outcome;
use crate::ops::{Cx, Handler, MXCSR_MASK, at_stack};
use arena::Arena;

/// Largest memory operand the bounce buffer takes, in bytes.
const LARGEST: usize = 512;

/// How an instruction is run; kept with the decoded instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    generation: u32,
    thunk: u64,
    state: State,
    /// Register that points to the bounce buffer.
    pointer: Option<u8>,
    /// Register that stands for RSP.
    stack: Option<u8>,
    /// Size of the memory operand in bytes.
    size: usize,
    /// What the address must be a multiple of.
    align: usize,
    read: bool,
    write: bool,
}

/// Which state beyond the general registers an instruction uses, and so which checks it needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    General,
    X87,
    Wait,
    Mmx,
    Sse,
    Avx,
}

/// The assist of one vCPU.
pub(crate) struct Assist {
    arena: Option<Arena>,
    thunks: HashMap<Instruction, u64>,
    info: InstructionInfoFactory,
}

impl Default for Assist {
    fn default() -> Self {
        Self { arena: None, thunks: HashMap::new(), info: InstructionInfoFactory::new() }
    }
}

/// The handler for an instruction that no other handler takes.
pub(crate) fn select(raw: &Instruction) -> Handler {
    use Mnemonic as M;
    match raw.mnemonic() {
        M::Vpgatherdd
        | M::Vpgatherdq
        | M::Vpgatherqd
        | M::Vpgatherqq
        | M::Vgatherdps
        | M::Vgatherdpd
        | M::Vgatherqps
        | M::Vgatherqpd => vector::gather,
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => vector::masked_move,
        M::Maskmovdqu | M::Vmaskmovdqu | M::Maskmovq => vector::masked_store_bytes,
        _ => run,
    }
}

fn features(raw: &Instruction) -> &'static [CpuidFeature] {
    raw.cpuid_features()
}

/// Does the CPUID model show what the instruction needs? Everything not named here is hidden.
fn shown(cx: &Cx<'_>, raw: &Instruction) -> bool {
    use CpuidFeature as F;
    use cpu::cpuid::{extended_ecx as x, leaf1_ecx as a, leaf7_ebx as b, leaf7_ecx as c};
    let f = &cx.it.model.features;
    features(raw).iter().all(|feature| match feature {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::MMX
        | F::FXSR
        | F::SSE
        | F::SSE2
        | F::MULTIBYTENOP
        | F::PAUSE => true,
        F::CMPXCHG16B => f.leaf1_ecx & a::CX16 != 0,
        F::SSE3 => f.leaf1_ecx & a::SSE3 != 0,
        F::SSSE3 => f.leaf1_ecx & a::SSSE3 != 0,
        F::SSE4_1 => f.leaf1_ecx & a::SSE4_1 != 0,
        F::SSE4_2 => f.leaf1_ecx & a::SSE4_2 != 0,
        F::POPCNT => f.leaf1_ecx & a::POPCNT != 0,
        F::PCLMULQDQ => f.leaf1_ecx & a::PCLMULQDQ != 0,
        F::AES => f.leaf1_ecx & a::AES != 0,
        F::MOVBE => f.leaf1_ecx & a::MOVBE != 0,
        F::RDRAND => f.leaf1_ecx & a::RDRAND != 0,
        F::AVX => f.leaf1_ecx & a::AVX != 0,
        F::FMA => f.leaf1_ecx & a::FMA != 0,
        F::F16C => f.leaf1_ecx & a::F16C != 0,
        F::AVX2 => f.leaf7_ebx & b::AVX2 != 0,
        F::BMI1 => f.leaf7_ebx & b::BMI1 != 0,
        F::BMI2 => f.leaf7_ebx & b::BMI2 != 0,
        F::ADX => f.leaf7_ebx & b::ADX != 0,
        F::RDSEED => f.leaf7_ebx & b::RDSEED != 0,
        F::SHA => f.leaf7_ebx & b::SHA != 0,
        F::GFNI => f.leaf7_ecx & c::GFNI != 0,
        F::VAES => f.leaf7_ecx & c::VAES != 0,
        F::VPCLMULQDQ => f.leaf7_ecx & c::VPCLMULQDQ != 0,
        F::LZCNT => f.extended_ecx & x::LZCNT != 0,
        _ => false,
    })
}

fn state_of(raw: &Instruction) -> State {
    let registers = || (0..raw.op_count()).filter(|i| raw.op_kind(*i) == OpKind::Register).map(|i| raw.op_register(i));
    let has = |feature: CpuidFeature| features(raw).contains(&feature);
    if raw.encoding() == EncodingKind::VEX {
        return if has(CpuidFeature::BMI1) || has(CpuidFeature::BMI2) { State::General } else { State::Avx };
    }
    if raw.mnemonic() == Mnemonic::Wait {
        State::Wait
    } else if has(CpuidFeature::FPU) || has(CpuidFeature::FPU287) || has(CpuidFeature::FPU387) {
        State::X87
    } else if registers().any(Register::is_xmm)
        || matches!(
            raw.mnemonic(),
            Mnemonic::Ldmxcsr
                | Mnemonic::Stmxcsr
                | Mnemonic::Cvtss2si
                | Mnemonic::Cvttss2si
                | Mnemonic::Cvtsd2si
                | Mnemonic::Cvttsd2si
        )
    {
        State::Sse
    } else if registers().any(Register::is_mm) || raw.mnemonic() == Mnemonic::Emms {
        State::Mmx
    } else {
        State::General
    }
}

/// `#UD` and `#NM` as CR0, CR4 and XCR0 have it (SDM volume 2, 2.4 and volume 3, 2.5).
fn usable(cx: &Cx<'_>, state: State) -> Result<(), Exception> {
    let (c0, c4) = (cx.st.cr0, cx.st.cr4);
    let no_device = |bits: u64| if c0 & bits != 0 { Err(Exception::plain(number::NM)) } else { Ok(()) };
    match state {
        State::General => Ok(()),
        State::X87 => no_device(cr0::EM | cr0::TS),
        State::Wait if c0 & cr0::MP != 0 => no_device(cr0::TS),
        State::Wait => Ok(()),
        State::Mmx if c0 & cr0::EM != 0 => Err(Exception::ud()),
        State::Sse if c0 & cr0::EM != 0 || c4 & cr4::OSFXSR == 0 => Err(Exception::ud()),
        State::Avx if c4 & cr4::OSXSAVE == 0 || cx.st.xcr0 & 6 != 6 => Err(Exception::ud()),
        State::Mmx | State::Sse | State::Avx => no_device(cr0::TS),
    }
}

/// `#MF` for an unmasked x87 exception that waits, before the instruction looks at its operands (SDM volume 1, 8.7).
fn pending_x87(cx: &Cx<'_>, state: State, raw: &Instruction) -> Result<(), Exception> {
    use Mnemonic as M;
    let waits = match state {
        State::Mmx => true,
        State::X87 => !matches!(raw.mnemonic(), M::Fninit | M::Fnclex | M::Fnstcw | M::Fnstsw | M::Fnstenv | M::Fnsave),
        _ => false,
    };
    let pending = cx.st.fp.bytes[2] & 0x80 != 0;
    if waits && pending && cx.st.cr0 & cr0::NE != 0 { Err(Exception::plain(number::MF)) } else { Ok(()) }
}

/// What the address of the memory operand must be a multiple of, else `#GP(0)`, before any page fault (SDM volume 1, 11.3.3 of
/// legacy SSE; volume 2, 2.7.4 of VEX).
fn alignment(raw: &Instruction, state: State, size: usize) -> usize {
    use Mnemonic as M;
    let aligned = match state {
        // AMD's CPUs do not ask it of the SHA instructions.
        State::Sse if is_amd() && features(raw).contains(&CpuidFeature::SHA) => false,
        State::Sse | State::Mmx => {
            size == 16
                && !matches!(
                    raw.mnemonic(),
                    M::Movups
                        | M::Movupd
                        | M::Movdqu
                        | M::Lddqu
                        | M::Pcmpestri
                        | M::Pcmpestri64
                        | M::Pcmpestrm
                        | M::Pcmpestrm64
                        | M::Pcmpistri
                        | M::Pcmpistrm
                )
        }
        State::Avx => matches!(
            raw.mnemonic(),
            M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovntps | M::Vmovntpd | M::Vmovntdq | M::Vmovntdqa
        ),
        _ => false,
    };
    if aligned { size } else { 1 }
}

/// What the address must be a multiple of where alignment is checked, else `#AC(0)`: as CPUs do it, and mostly as SDM volume 3,
/// table 7-7 has it. Vectors of 16 bytes and more are free.
fn natural_alignment(raw: &Instruction, size: usize) -> usize {
    match size {
        2 | 4 | 8 if matches!(raw.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph) => 1,
        2 | 4 | 8 => size,
        // x87: extended and decimal numbers, environments and states of 16- and 32-bit form.
        10 => 8,
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    }
}

impl Assist {
    /// With its executable memory made now: a sandboxed process gets none later. What fails here fails again, and is told, at the first
    /// use.
    pub(crate) fn ready() -> Self {
        let mut this = Self::default();
        let _ = this.arena();
        this
    }

    fn arena(&mut self) -> Result<&mut Arena, String> {
        if self.arena.is_none() {
            signals::install();
            self.arena = Some(Arena::new()?);
        }
        self.arena.as_mut().ok_or_else(|| "no arena".into())
    }

    /// Rewrites an instruction and writes its thunk.
    fn plan(&mut self, raw: &Instruction) -> Result<Plan, String> {
        let state = state_of(raw);
        let info = self.info.info(raw);
        let mut used = [false; 16];
        used[cpu::gpr::RSP] = true;
        for register in info.used_registers() {
            if let Some(used) = gpr_number(register.register()).and_then(|n| used.get_mut(usize::from(n))) {
                *used = true;
            }
        }
        // Low registers first: with AH to BH in use no other can be encoded.
        let mut free =
            [6u8, 7, 5, 3, 2, 1, 0, 8, 9, 10, 11, 12, 13, 14, 15].into_iter().filter(|n| !used[usize::from(*n)]);
        let register64 = |n: u8| Register::RAX + u32::from(n);

        let mut new = *raw;
        new.set_ip(0);
        let mut plan = Plan {
            generation: 0,
            thunk: 0,
            state,
            pointer: None,
            stack: None,
            size: 0,
            align: 1,
            read: false,
            write: false,
        };
        let memory = (0..raw.op_count()).find(|i| raw.op_kind(*i) == OpKind::Memory);
        if let Some(index) = memory {
            let access = info.op_access(index);
            plan.read =
                matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
            plan.write =
                matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite);
            // An x87 store does nothing when an unmasked exception is pending after it.
            plan.read |= plan.write && state == State::X87;
            plan.size = raw.memory_size().size();
            if plan.size == 0 || plan.size > LARGEST {
                return Err(format!("a memory operand of unknown size in {raw}"));
            }
            plan.align = alignment(raw, state, plan.size);
            let pointer = free.next().ok_or("no free register")?;
            plan.pointer = Some(pointer);
            new.set_segment_prefix(Register::None);
            new.set_memory_base(register64(pointer));
            new.set_memory_index(Register::None);
            new.set_memory_index_scale(1);
            new.set_memory_displacement64(0);
            new.set_memory_displ_size(0);
        }
        for index in 0..raw.op_count() {
            if new.op_kind(index) != OpKind::Register {
                continue;
            }
            let register = raw.op_register(index);
            if gpr_number(register) != Some(cpu::gpr::RSP as u8) || matches!(register, Register::AH) {
                continue;
            }
            let stand_in = match plan.stack {
                Some(n) => n,
                None => free.next().ok_or("no free register")?,
            };
            plan.stack = Some(stand_in);
            let first = match register.size() {
                8 => Register::RAX,
                4 => Register::EAX,
                2 => Register::AX,
                // AL to BL, then (after AH to BH) SPL, BPL and so on.
                _ if stand_in < 4 => Register::AL,
                _ => Register::SPL - 4,
            };
            new.set_op_register(index, first + u32::from(stand_in));
        }
        let with_fp = state != State::General;
        let generation = self.arena()?.generation;
        plan.thunk = match self.thunks.get(&new) {
            Some(&thunk) => thunk,
            None => {
                let arena = self.arena()?;
                let thunk = arena.thunk(&new, with_fp)?;
                if arena.generation != generation {
                    self.thunks.clear();
                }
                self.thunks.insert(new, thunk);
                thunk
            }
        };
        plan.generation = self.arena()?.generation;
        Ok(plan)
    }

    fn generation(&self) -> u32 {
        self.arena.as_ref().map_or(0, |arena| arena.generation)
    }
}

/// Makes an area one that XRSTOR takes whatever was in it.
fn sanitize(fp: &mut FpState) {
    fp.bytes[26] = 0;
    fp.bytes[27] = 0;
    fp.bytes[512..576].fill(0);
    fp.bytes[512] = 7;
}

fn plan(cx: &mut Cx<'_>, insn: &Insn) -> Result<Plan, Exception> {
    if let Some(plan) = insn.plan.get()
        && plan.generation == cx.it.assist.generation()
    {
        return Ok(plan);
    }
    if !shown(cx, &insn.raw) || insn.lock {
        return Err(Exception::ud());
    }
    match cx.it.assist.plan(&insn.raw) {
        Ok(plan) => {
            insn.plan.set(Some(plan));
            Ok(plan)
        }
        Err(why) => {
            cx.outcome = Some(Outcome::Unsupported(format!("{} ({why})", insn.raw)));
            Err(Exception::ud())
        }
    }
}

/// Runs an instruction on the host CPU.
pub(crate) fn run(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let plan = plan(cx, insn)?;
    usable(cx, plan.state)?;
    pending_x87(cx, plan.state, &insn.raw)?;
    cx.it.counters.native += 1;
    let address = if plan.pointer.is_some() { cx.address(&insn.mem) } else { 0 };
    let on_stack = insn.mem.stack;
    if address & (plan.align as u64 - 1) != 0 {
        return Err(Exception::gp(0));
    }
    if cx.user && plan.pointer.is_some() {
        cx.it.mmu.checks.aligned(address, natural_alignment(&insn.raw, plan.size))?;
    }
    cx.it.mmu.checks.alignment = false;
    let mut data = [0u8; LARGEST];
    let Some(data) = data.get_mut(..plan.size) else { return Err(Exception::ud()) };
    // Of this one the conversion comes first on Intel's CPUs, with its own exceptions.
    let late = insn.raw.mnemonic() == Mnemonic::Vcvtps2ph && !is_amd();
    let refused = if plan.write && !late {
        cx.it.mmu.check(cx.st, address, plan.size, Kind::Write, cx.user).map_err(|e| at_stack(e, on_stack)).err()
    } else {
        None
    };
    // A store that raises an unmasked exception does not touch memory: on Intel's CPUs it is tried before memory may refuse it.
    let before = match refused {
        Some(refused) if !stores_x87(&insn.raw) || is_amd() => return Err(refused),
        Some(refused) => Some((refused, cx.st.fp.clone())),
        None => None,
    };
    if plan.read && before.is_none() {
        read_operand(cx, address, data).map_err(|e| at_stack(e, on_stack))?;
    }
    if matches!(insn.raw.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr) && reserved_mxcsr(data) {
        return Err(Exception::gp(0));
    }
    let Some(mut arena) = cx.it.assist.arena.take() else { return Err(Exception::ud()) };
    let bounce = arena.bounce(address, plan.size);
    if plan.pointer.is_some() {
        bounce.copy_from_slice(data);
    }
    let bounce_address = bounce.as_ptr() as u64;
    let exchange = arena.exchange();
    exchange.gpr = cx.st.gpr;
    exchange.flags = (cx.st.rflags & rflags::ARITH) | rflags::FIXED;
    if let Some(pointer) = plan.pointer {
        exchange.gpr[usize::from(pointer)] = bounce_address;
    }
    if let Some(stack) = plan.stack {
        exchange.gpr[usize::from(stack)] = cx.st.gpr[cpu::gpr::RSP];
    }
    let with_fp = plan.state != State::General;
    if with_fp {
        sanitize(&mut cx.st.fp);
    }
    let fp = cx.st.fp.bytes.as_mut_ptr();
    signals::catch(&mut arena, |arena| {
        // SAFETY: the thunk is of this generation (checked in `plan`) and made for this state; its memory operand goes through the
        // pointer register, which points to the bounce buffer with room for it; the state area is aligned and made valid above.
        unsafe { arena.run(plan.thunk, with_fp, fp) };
    });
    let exchange = arena.exchange();
    let (gpr, flags, trap) = (exchange.gpr, exchange.flags, exchange.trap);
    data.copy_from_slice(arena.bounce(address, plan.size));
    if with_fp {
        cx.st.fp.bytes[512] = 7;
        // Where the CPU knows more bits of MXCSR than guests are shown, it says so here.
        cx.st.fp.bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        fix_pointers(cx, &arena, plan, address);
    }
    cx.it.assist.arena = Some(arena);
    if let Some((refused, fp)) = before {
        // All but the precision exception are found before the store.
        let word = |at: usize| u16::from_le_bytes([cx.st.fp.bytes[at], cx.st.fp.bytes[at + 1]]);
        let (control, status) = (word(0), word(2));
        if trap != 0 || status & !control & 0x1f == 0 {
            cx.st.fp = fp;
            return Err(refused);
        }
    } else if trap != 0 {
        return Err(exception(cx, trap - 1));
    } else if plan.write {
        if late {
            cx.it.mmu.check(cx.st, address, plan.size, Kind::Write, cx.user).map_err(|e| at_stack(e, on_stack))?;
        }
        write_operand(cx, address, data)?;
    }
    for (i, value) in gpr.into_iter().enumerate() {
        if i == cpu::gpr::RSP || plan.pointer == Some(i as u8) {
            continue;
        }
        if plan.stack == Some(i as u8) {
            cx.st.gpr[cpu::gpr::RSP] = value;
        } else {
            cx.st.gpr[i] = value;
        }
    }
    cx.st.rflags = (cx.st.rflags & !rflags::ARITH) | (flags & rflags::ARITH);
    Ok(())
}

/// Does a new value of MXCSR have bits that do not exist in the guest?
fn reserved_mxcsr(data: &[u8]) -> bool {
    data.try_into().is_ok_and(|bytes| u32::from_le_bytes(bytes) & !MXCSR_MASK != 0)
}

/// Does the instruction store an x87 register as a number? (SDM volume 1, 8.5: most unmasked exceptions keep it from storing.)
fn stores_x87(raw: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(raw.mnemonic(), M::Fst | M::Fstp | M::Fist | M::Fistp | M::Fisttp | M::Fbstp)
}

/// The x87 instruction and data pointers show the guest's addresses, not the thunk's.
fn fix_pointers(cx: &mut Cx<'_>, arena: &Arena, plan: Plan, address: u64) {
    if plan.state != State::X87 {
        return;
    }
    let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
    let fp = &mut cx.st.fp.bytes;
    if arena.is_code(word(&fp[8..16])) {
        fp[8..16].copy_from_slice(&cx.st.rip.to_le_bytes());
    }
    if plan.pointer.is_some() && arena.is_data(word(&fp[16..24])) {
        fp[16..24].copy_from_slice(&address.to_le_bytes());
    }
}

/// The guest's exception for one of the host.
fn exception(cx: &mut Cx<'_>, trap: u64) -> Exception {
    match trap {
        0 => Exception::plain(number::DE),
        6 => Exception::ud(),
        13 => Exception::gp(0),
        16 => Exception::plain(number::MF),
        17 => Exception::with_code(number::AC, 0),
        19 if cx.st.cr4 & cr4::OSXMMEXCPT == 0 => Exception::ud(),
        19 => Exception::plain(number::XM),
        other => {
            cx.outcome = Some(Outcome::Unsupported(format!("host exception {other} in an assisted instruction")));
            Exception::ud()
        }
    }
}

/// Reads an operand in pieces as large as the CPU's own.
fn read_operand(cx: &mut Cx<'_>, address: u64, data: &mut [u8]) -> Result<(), Exception> {
    let size = data.len();
    if matches!(size, 1 | 2 | 4 | 8) {
        let value = cx.it.mmu.read(cx.st, address, size, cx.user)?.to_le_bytes();
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
        return Ok(());
    }
    if !size.is_multiple_of(8) || !address.is_multiple_of(8) {
        return cx.it.mmu.read_bytes(cx.st, address, data, cx.user);
    }
    for (i, part) in data.chunks_exact_mut(8).enumerate() {
        let value = cx.it.mmu.read(cx.st, address.wrapping_add(i as u64 * 8), 8, cx.user)?;
        part.copy_from_slice(&value.to_le_bytes());
    }
    Ok(())
}

/// Writes an operand, already checked, in pieces as large as the CPU's own.
fn write_operand(cx: &mut Cx<'_>, address: u64, data: &[u8]) -> Result<(), Exception> {
    let size = data.len();
    if matches!(size, 1 | 2 | 4 | 8) {
        let mut value = [0; 8];
        value.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        return cx.it.mmu.write(cx.st, address, size, u64::from_le_bytes(value), cx.user);
    }
    if !size.is_multiple_of(8) || !address.is_multiple_of(8) {
        return cx.it.mmu.write_bytes(cx.st, address, data, cx.user);
    }
    for (i, part) in data.chunks_exact(8).enumerate() {
        let value = part.try_into().map_or(0, u64::from_le_bytes);
        cx.it.mmu.write(cx.st, address.wrapping_add(i as u64 * 8), 8, value, cx.user)?;
    }
    Ok(())
}
