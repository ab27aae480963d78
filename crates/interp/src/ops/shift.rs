//! Shifts and rotates. RCL, RCR, SHLD and SHRD are rare and left to the native assist.

use std::arch::asm;

use cpu::{Exception, rflags};

use super::{Cx, mask};
use crate::decode::{Insn, Op};
use crate::host_flags::rotate_keeps_of;

use rflags::{ARITH, FIXED, OF};

/// The masked count, from CL or the immediate.
fn count(cx: &mut Cx<'_>, insn: &Insn) -> Result<u32, Exception> {
    let count = cx.get(insn, insn.src, 1)? as u32;
    Ok(count & if insn.size == 8 { 63 } else { 31 })
}

/// Defines a function that shifts `value` of `size` bytes on the host CPU: result and arithmetic flags, given the old ones.
/// So flags that the manual leaves undefined (OF for counts above 1) are the CPU's, too.
macro_rules! on_host {
    ($name:ident, $instruction:literal) => {
        fn $name(value: u64, count: u32, size: u8, flags: u64) -> (u64, u64) {
            let mut flags = flags & ARITH | FIXED;
            let mut wide = value;
            let count = count as u8;
            macro_rules! run {
                ($operand:literal) => {
                    // SAFETY: changes registers and arithmetic flags only; the stack is left as it was.
                    unsafe {
                        asm!(
                            "push {flags}",
                            "popfq",
                            concat!($instruction, " ", $operand, ", cl"),
                            "pushfq",
                            "pop {flags}",
                            flags = inout(reg) flags,
                            value = inout(reg) wide,
                            in("cl") count,
                        )
                    }
                };
            }
            match size {
                1 => {
                    let mut byte = value as u8;
                    // SAFETY: as below.
                    unsafe {
                        asm!(
                            "push {flags}",
                            "popfq",
                            concat!($instruction, " {value}, cl"),
                            "pushfq",
                            "pop {flags}",
                            flags = inout(reg) flags,
                            value = inout(reg_byte) byte,
                            in("cl") count,
                        )
                    }
                    wide = u64::from(byte);
                }
                2 => run!("{value:x}"),
                4 => run!("{value:e}"),
                _ => run!("{value:r}"),
            }
            (wide & mask(size), flags & ARITH)
        }
    };
}

on_host!(host_shl, "shl");
on_host!(host_shr, "shr");
on_host!(host_sar, "sar");
on_host!(host_rol, "rol");
on_host!(host_ror, "ror");

fn shift(cx: &mut Cx<'_>, insn: &Insn, f: fn(u64, u32, u8, u64) -> (u64, u64)) -> Result<(), Exception> {
    let size = insn.size;
    let count = count(cx, insn)?;
    let flags = cx.st.rflags;
    let old = cx.modify(insn, false, |old| f(old, count, size, flags).0)?;
    cx.st.rflags = (flags & !ARITH) | f(old & mask(size), count, size, flags).1;
    Ok(())
}

pub(super) fn shl(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    shift(cx, insn, host_shl)
}

pub(super) fn shr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    shift(cx, insn, host_shr)
}

pub(super) fn sar(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    shift(cx, insn, host_sar)
}

/// On some CPUs rotates of a register by an immediate count other than 1 leave OF alone; those by CL and those of memory set it.
fn rotate(cx: &mut Cx<'_>, insn: &Insn, f: fn(u64, u32, u8, u64) -> (u64, u64)) -> Result<(), Exception> {
    let form = insn.src == Op::Imm && insn.dst != Op::Mem && count(cx, insn)? != 1;
    let kept = if form && rotate_keeps_of() { OF } else { 0 };
    let flags = cx.st.rflags;
    shift(cx, insn, f)?;
    cx.st.rflags = (cx.st.rflags & !kept) | (flags & kept);
    Ok(())
}

pub(super) fn rol(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    rotate(cx, insn, host_rol)
}

pub(super) fn ror(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    rotate(cx, insn, host_ror)
}
