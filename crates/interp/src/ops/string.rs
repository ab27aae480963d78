//! String instructions. With a repeat prefix one step does a bounded piece (at most up to the next page boundary) and leaves RIP at
//! the instruction while a count remains, so that interrupts get their turn as on the CPU.

use cpu::gpr::{RAX, RCX, RDI, RSI};
use cpu::paging::Kind;
use cpu::{Exception, rflags};
use memory::PAGE_SIZE;

use super::{Cx, alu, mask};
use crate::decode::{Insn, Rep};
use crate::mmu::Target;
use crate::{host_flags, host_memory};

/// Elements done in one step where there is no fast path.
const CHUNK: u64 = 256;

/// Element size, address size and direction of a string instruction.
pub(super) struct Shape {
    pub(super) size: u8,
    pub(super) addr: u8,
    /// FS, GS base, for the source.
    pub(super) source_base: u64,
    /// What is added to the index registers after each element.
    pub(super) step: u64,
    pub(super) rep: Rep,
    pub(super) single: bool,
}

impl Shape {
    pub(super) fn new(cx: &Cx<'_>, insn: &Insn) -> Self {
        use iced_x86::OpKind as K;
        let addr32 = (0..insn.raw.op_count())
            .any(|i| matches!(insn.raw.op_kind(i), K::MemorySegESI | K::MemorySegEDI | K::MemoryESEDI));
        let size = insn.raw.memory_size().size().clamp(1, 8) as u8;
        let step = u64::from(size);
        Self {
            size,
            addr: if addr32 { 4 } else { 8 },
            source_base: cx.segment_base(insn.mem.segment),
            step: if cx.st.rflags & rflags::DF != 0 { step.wrapping_neg() } else { step },
            rep: insn.rep,
            single: cx.st.rflags & rflags::TF != 0 || cx.it.mmu.checks.armed,
        }
    }

    /// How many elements are still to do; `None` when there are none.
    pub(super) fn count(&self, cx: &Cx<'_>) -> Option<u64> {
        if self.rep == Rep::No {
            return Some(1);
        }
        let count = cx.st.gpr[RCX] & mask(self.addr);
        (count != 0).then_some(count)
    }

    /// With a repeat prefix some CPUs write these registers back even when nothing is done, for lack of a count or by a fault; this
    /// shows with 32-bit addresses only.
    fn truncate(&self, cx: &mut Cx<'_>, registers: &[usize]) {
        if self.rep != Rep::No && self.addr == 4 && host_flags::rep_truncates() {
            for &register in registers {
                cx.st.gpr[register] &= mask(self.addr);
            }
        }
    }

    /// How many elements this step may do one by one.
    pub(super) fn chunk(&self, count: u64) -> u64 {
        if self.single { 1 } else { count.min(CHUNK) }
    }

    pub(super) fn source(&self, cx: &Cx<'_>) -> u64 {
        (cx.st.gpr[RSI] & mask(self.addr)).wrapping_add(self.source_base)
    }

    pub(super) fn target(&self, cx: &Cx<'_>) -> u64 {
        cx.st.gpr[RDI] & mask(self.addr)
    }

    pub(super) fn advance(&self, cx: &mut Cx<'_>, register: usize, elements: u64) {
        let value = cx.st.gpr[register].wrapping_add(self.step.wrapping_mul(elements));
        cx.set_reg(register as u8, self.addr, value & mask(self.addr));
    }

    /// Counts `elements` as done; goes on at this instruction if some remain.
    pub(super) fn done(&self, cx: &mut Cx<'_>, elements: u64) {
        if self.rep != Rep::No {
            let left = (cx.st.gpr[RCX] & mask(self.addr)).wrapping_sub(elements);
            cx.set_reg(RCX as u8, self.addr, left);
            if left != 0 {
                cx.next = cx.st.rip;
            }
        }
    }

    /// Elements from `address` upwards that lie inside its page.
    fn in_page(&self, address: u64) -> u64 {
        (PAGE_SIZE - address % PAGE_SIZE) / u64::from(self.size)
    }

    fn upwards(&self) -> bool {
        self.step == u64::from(self.size)
    }
}

/// After some elements were done, a fault is taken at the instruction with these counted; before the first, it is just a fault.
pub(super) fn partial(
    cx: &mut Cx<'_>,
    shape: &Shape,
    done: u64,
    result: Result<(), Exception>,
) -> Result<(), Exception> {
    match result {
        Err(error) if done == 0 => Err(error),
        Err(_) => {
            // The registers stand behind the last good element; the next step meets the fault again.
            shape.done(cx, done);
            cx.next = cx.st.rip;
            Ok(())
        }
        Ok(()) => {
            shape.done(cx, done);
            Ok(())
        }
    }
}

pub(super) fn movs(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    shape.truncate(cx, &[RCX, RSI, RDI]);
    let Some(count) = shape.count(cx) else { return Ok(()) };
    if count > 1 && shape.upwards() && !shape.single {
        let (source, target) = (shape.source(cx), shape.target(cx));
        let n = count.min(shape.in_page(source)).min(shape.in_page(target));
        if n > 0 {
            let from = cx.it.mmu.translate(cx.st, source, Kind::Read, cx.user)?;
            let to = cx.it.mmu.translate(cx.st, target, Kind::Write, cx.user)?;
            if let (Target::Ram(from, _), Target::Ram(to, gpa)) = (from, to) {
                let len = n * u64::from(shape.size);
                // Overlap with the target just above the source repeats elements: leave that to the slow path.
                if (to as u64).wrapping_sub(from as u64) >= len {
                    // SAFETY: `n` elements are left in both mapped pages.
                    unsafe { host_memory::copy(from, to, len as usize) };
                    cx.it.mmu.ram.code_pages().written(gpa, len);
                    shape.advance(cx, RSI, n);
                    shape.advance(cx, RDI, n);
                    shape.done(cx, n);
                    return Ok(());
                }
            }
        }
    }
    let mut done = 0;
    let mut result = Ok(());
    while done < shape.chunk(count) {
        result = (|| {
            let size = usize::from(shape.size);
            let value = cx.it.mmu.read(cx.st, shape.source(cx), size, cx.user)?;
            cx.it.mmu.write(cx.st, shape.target(cx), size, value, cx.user)
        })();
        if result.is_err() {
            break;
        }
        shape.advance(cx, RSI, 1);
        shape.advance(cx, RDI, 1);
        done += 1;
    }
    partial(cx, &shape, done, result)
}

pub(super) fn stos(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    shape.truncate(cx, &[RCX, RDI]);
    let Some(count) = shape.count(cx) else { return Ok(()) };
    let value = cx.st.gpr[RAX];
    if count > 1 && shape.upwards() && !shape.single {
        let target = shape.target(cx);
        let n = count.min(shape.in_page(target));
        if n > 0
            && let Target::Ram(to, gpa) = cx.it.mmu.translate(cx.st, target, Kind::Write, cx.user)?
        {
            // SAFETY: `n` elements are left in the mapped page.
            unsafe { host_memory::fill(to, usize::from(shape.size), n as usize, value) };
            cx.it.mmu.ram.code_pages().written(gpa, n * u64::from(shape.size));
            shape.advance(cx, RDI, n);
            shape.done(cx, n);
            return Ok(());
        }
    }
    let mut done = 0;
    let mut result = Ok(());
    while done < shape.chunk(count) {
        result = cx.it.mmu.write(cx.st, shape.target(cx), usize::from(shape.size), value, cx.user);
        if result.is_err() {
            break;
        }
        shape.advance(cx, RDI, 1);
        done += 1;
    }
    partial(cx, &shape, done, result)
}

pub(super) fn lods(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    shape.truncate(cx, &[RCX]);
    let Some(count) = shape.count(cx) else { return Ok(()) };
    let mut done = 0;
    let mut result = Ok(());
    while done < shape.chunk(count) {
        match cx.it.mmu.read(cx.st, shape.source(cx), usize::from(shape.size), cx.user) {
            Ok(value) => cx.set_reg(RAX as u8, shape.size, value),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
        shape.advance(cx, RSI, 1);
        done += 1;
    }
    partial(cx, &shape, done, result)
}

/// The end condition of SCAS and CMPS.
fn stops(cx: &Cx<'_>, rep: Rep) -> bool {
    let equal = cx.st.rflags & rflags::ZF != 0;
    match rep {
        Rep::No => true,
        Rep::Equal => !equal,
        Rep::NotEqual => equal,
    }
}

/// SCAS and CMPS: `compare` sets the flags of one element and advances.
fn compare(
    cx: &mut Cx<'_>,
    insn: &Insn,
    mut element: impl FnMut(&mut Cx<'_>, &Shape) -> Result<(), Exception>,
) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    shape.truncate(cx, &[RCX]);
    let Some(count) = shape.count(cx) else { return Ok(()) };
    let mut done = 0;
    // Flags show only when the instruction ends: at a fault on the way they are as before it (SDM volume 2, REP). AMD's CPUs show
    // those of the last element.
    let kept = if host_flags::is_amd() { 0 } else { rflags::ARITH };
    let flags = cx.st.rflags;
    let restore = |cx: &mut Cx<'_>| cx.st.rflags = (cx.st.rflags & !kept) | (flags & kept);
    while done < shape.chunk(count) {
        if let Err(error) = element(cx, &shape) {
            restore(cx);
            return partial(cx, &shape, done, Err(error));
        }
        done += 1;
        if stops(cx, shape.rep) {
            let next = cx.next;
            shape.done(cx, done);
            cx.next = next;
            return Ok(());
        }
    }
    if done < count {
        restore(cx);
    }
    partial(cx, &shape, done, Ok(()))
}

pub(super) fn scas(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    compare(cx, insn, |cx, shape| {
        let b = cx.it.mmu.read(cx.st, shape.target(cx), usize::from(shape.size), cx.user)?;
        let a = cx.st.gpr[RAX] & mask(shape.size);
        alu::flags_sub(cx.st, a, b, 0, shape.size);
        shape.advance(cx, RDI, 1);
        Ok(())
    })
}

pub(super) fn cmps(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    compare(cx, insn, |cx, shape| {
        let size = usize::from(shape.size);
        // Where both fault, Intel's CPUs report the target, AMD's either, mostly the target.
        let b = cx.it.mmu.read(cx.st, shape.target(cx), size, cx.user)?;
        let a = cx.it.mmu.read(cx.st, shape.source(cx), size, cx.user)?;
        alu::flags_sub(cx.st, a, b, 0, shape.size);
        shape.advance(cx, RSI, 1);
        shape.advance(cx, RDI, 1);
        Ok(())
    })
}
