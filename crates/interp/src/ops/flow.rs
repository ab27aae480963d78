//! Near control flow, the stack, software interrupts.

use cpu::gpr::{RBP, RCX, RSP};
use cpu::paging::is_canonical;
use cpu::{Exception, rflags, vector};

use super::{Cx, at_stack, mask};
use crate::decode::{Insn, Op};
use crate::events::Source;

/// Sets where execution goes on.
fn go(cx: &mut Cx<'_>, target: u64) -> Result<(), Exception> {
    if !is_canonical(target) {
        return Err(Exception::gp(0));
    }
    cx.next = target;
    Ok(())
}

fn target(cx: &mut Cx<'_>, insn: &Insn) -> Result<u64, Exception> {
    match insn.dst {
        Op::Imm => Ok(cx.next.wrapping_add(insn.imm)),
        op => cx.get(insn, op, 8),
    }
}

pub(super) fn jmp(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let target = target(cx, insn)?;
    go(cx, target)
}

pub(super) fn jcc(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    if cx.condition(insn.raw.condition_code()) { go(cx, cx.next.wrapping_add(insn.imm)) } else { Ok(()) }
}

pub(super) fn call(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let target = target(cx, insn)?;
    // The return address is written before the target is looked at.
    let rsp = cx.st.gpr[RSP];
    cx.push(8, cx.next)?;
    go(cx, target).inspect_err(|_| cx.st.gpr[RSP] = rsp)
}

pub(super) fn ret(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let target = cx.peek(0, 8)?;
    go(cx, target)?;
    let release = if insn.dst == Op::Imm { insn.imm & 0xffff } else { 0 };
    cx.st.gpr[RSP] = cx.st.gpr[RSP].wrapping_add(8 + release);
    Ok(())
}

/// The operand size of PUSH and POP: 2 or 8.
fn stack_size(insn: &Insn) -> u8 {
    use iced_x86::Code as C;
    match insn.raw.code() {
        C::Pushw_imm8 | C::Push_imm16 => 2,
        _ if insn.dst == Op::Imm => 8,
        C::Pushw_FS | C::Pushw_GS | C::Popw_FS | C::Popw_GS => 2,
        C::Pushq_FS | C::Pushq_GS | C::Popq_FS | C::Popq_GS => 8,
        _ => insn.size,
    }
}

pub(super) fn push(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = stack_size(insn);
    let register = insn.raw.op0_register();
    let value = if register.is_segment_register() {
        u64::from(cx.st.segments.get(register.number()).map_or(0, |s| s.selector))
    } else {
        cx.get(insn, insn.dst, size)?
    };
    cx.push(size, value)
}

pub(super) fn pop(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = stack_size(insn);
    let rsp = cx.st.gpr[RSP];
    let register = insn.raw.op0_register();
    if register.is_segment_register() && cx.user {
        // Of a selector two bytes count.
        cx.it.mmu.checks.aligned(rsp, 2)?;
        cx.it.mmu.checks.alignment = false;
    }
    let value = cx.peek(0, size)?;
    if register.is_segment_register() {
        super::segments::load_segment(cx, register.number(), value as u16)?;
    }
    // An address with RSP is computed after the increment; a popped RSP wins over it.
    cx.st.gpr[RSP] = rsp.wrapping_add(u64::from(size));
    if let Err(error) = cx.set(insn, insn.dst, size, value) {
        cx.st.gpr[RSP] = rsp;
        return Err(error);
    }
    Ok(())
}

pub(super) fn pushf(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = if insn.raw.code() == iced_x86::Code::Pushfw { 2 } else { 8 };
    cx.push(size, cx.st.rflags & !(rflags::VM | rflags::RF))
}

pub(super) fn popf(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = if insn.raw.code() == iced_x86::Code::Popfw { 2 } else { 8 };
    let value = cx.peek(0, size)?;
    cx.st.gpr[RSP] = cx.st.gpr[RSP].wrapping_add(u64::from(size));
    set_flags(cx, value, size);
    cx.st.rflags &= !rflags::RF;
    Ok(())
}

/// The flags POPF and IRET may change, at this CPL and IOPL, in an operand of `size` bytes.
pub(super) fn writable_flags(cx: &Cx<'_>, size: u8) -> u64 {
    use rflags::*;
    let cpl = u64::from(cx.st.cpl());
    let mut writable = ARITH | TF | DF | NT | AC | ID;
    if cpl <= (cx.st.rflags & IOPL) >> 12 {
        writable |= IF;
    }
    if cpl == 0 {
        writable |= IOPL;
    }
    writable & mask(size)
}

fn set_flags(cx: &mut Cx<'_>, value: u64, size: u8) {
    let writable = writable_flags(cx, size);
    cx.st.rflags = (cx.st.rflags & !writable) | (value & writable) | rflags::FIXED;
}

/// ENTER: builds a stack frame, with up to 31 nested frame pointers.
pub(super) fn enter(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size: u8 = if insn.raw.code() == iced_x86::Code::Enterw_imm16_imm8 { 2 } else { 8 };
    let step = u64::from(size);
    let alloc = u64::from(insn.raw.immediate16());
    let level = u64::from(insn.raw.immediate8_2nd() & 31);
    let frame = cx.st.gpr[RSP].wrapping_sub(step);
    let mut rsp = cx.st.gpr[RSP];
    let mut push = |cx: &mut Cx<'_>, value: u64| {
        rsp = rsp.wrapping_sub(step);
        cx.it.mmu.write(cx.st, rsp, usize::from(size), value, cx.user).map_err(|e| at_stack(e, true))
    };
    // What was pushed before a fault stays below the stack pointer, as on the CPU.
    push(cx, cx.st.gpr[RBP] & mask(size))?;
    for i in 1..level {
        let address = cx.st.gpr[RBP].wrapping_sub(i * step);
        let value = cx.it.mmu.read(cx.st, address, usize::from(size), cx.user).map_err(|e| at_stack(e, true))?;
        push(cx, value)?;
    }
    if level > 0 {
        push(cx, frame & mask(size))?;
    }
    let rsp = rsp.wrapping_sub(alloc);
    // The new top of the stack must be writable, as the CPU checks.
    cx.it.mmu.check(cx.st, rsp, 1, cpu::paging::Kind::Write, cx.user).map_err(|e| at_stack(e, true))?;
    cx.set_reg(RBP as u8, size, frame);
    cx.st.gpr[RSP] = rsp;
    Ok(())
}

pub(super) fn leave(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size: u8 = if insn.raw.code() == iced_x86::Code::Leavew { 2 } else { 8 };
    let frame = cx.st.gpr[RBP];
    let value = cx.it.mmu.read(cx.st, frame, usize::from(size), cx.user).map_err(|e| at_stack(e, true))?;
    cx.st.gpr[RSP] = frame.wrapping_add(u64::from(size));
    cx.set_reg(RBP as u8, size, value);
    Ok(())
}

/// Is the counter of this LOOP or JRCXZ the 32-bit ECX?
fn counter_size(insn: &Insn) -> u8 {
    use iced_x86::Code as C;
    match insn.raw.code() {
        C::Loop_rel8_64_ECX | C::Loope_rel8_64_ECX | C::Loopne_rel8_64_ECX | C::Jecxz_rel8_64 => 4,
        _ => 8,
    }
}

fn loop_if(cx: &mut Cx<'_>, insn: &Insn, condition: bool) -> Result<(), Exception> {
    let size = counter_size(insn);
    let count = cx.st.gpr[RCX].wrapping_sub(1) & mask(size);
    if count != 0 && condition {
        go(cx, cx.next.wrapping_add(insn.imm))?;
    }
    cx.set_reg(RCX as u8, size, count);
    Ok(())
}

pub(super) fn loop_(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    loop_if(cx, insn, true)
}

pub(super) fn loope(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    loop_if(cx, insn, cx.st.rflags & rflags::ZF != 0)
}

pub(super) fn loopne(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    loop_if(cx, insn, cx.st.rflags & rflags::ZF == 0)
}

pub(super) fn jrcxz(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    if cx.st.gpr[RCX] & mask(counter_size(insn)) == 0 { go(cx, cx.next.wrapping_add(insn.imm)) } else { Ok(()) }
}

fn software_interrupt(cx: &mut Cx<'_>, number: u8) -> Result<(), Exception> {
    let next = cx.next;
    let flags = cx.st.rflags & !rflags::RF;
    if number < 32 {
        cx.it.count_exception(number);
    }
    cx.it.inject(cx.st, number, None, Source::Software, next, flags)?;
    cx.next = cx.st.rip;
    cx.no_trap = true;
    Ok(())
}

pub(super) fn int(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    software_interrupt(cx, insn.imm as u8)
}

pub(super) fn int3(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    software_interrupt(cx, vector::BP)
}

pub(super) fn icebp(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.debug_trap = true;
    Ok(())
}

pub(super) fn ud(_cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    Err(Exception::ud())
}
