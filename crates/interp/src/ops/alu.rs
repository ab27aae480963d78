//! Integer arithmetic and logic, and the flags they set (SDM volume 1, 3.4.3.1).

use std::arch::asm;

use cpu::gpr::{RAX, RDX};
use cpu::{CpuState, Exception, rflags, vector};

use super::{Cx, mask, sign, sign_extend};
use crate::decode::{Insn, Op};

use rflags::{AF, ARITH, CF, FIXED, OF, PF, SF, ZF};

/// SF, ZF and PF of a result.
#[inline(always)]
pub(super) fn result_flags(result: u64, size: u8) -> u64 {
    let mut flags = 0;
    if result & mask(size) == 0 {
        flags |= ZF;
    }
    if result & sign(size) != 0 {
        flags |= SF;
    }
    if (result as u8).count_ones().is_multiple_of(2) {
        flags |= PF;
    }
    flags
}

#[inline(always)]
fn put(state: &mut CpuState, flags: u64) {
    state.rflags = (state.rflags & !ARITH) | flags;
}

/// Adds with carry-in, sets the flags, gives the sum.
#[inline(always)]
pub(super) fn flags_add(state: &mut CpuState, a: u64, b: u64, carry: u64, size: u8) -> u64 {
    let sum = a.wrapping_add(b).wrapping_add(carry) & mask(size);
    let mut flags = result_flags(sum, size) | ((a ^ b ^ sum) & AF);
    if sum < a || (carry != 0 && sum == a) {
        flags |= CF;
    }
    if (a ^ sum) & (b ^ sum) & sign(size) != 0 {
        flags |= OF;
    }
    put(state, flags);
    sum
}

/// Subtracts with borrow-in, sets the flags, gives the difference.
#[inline(always)]
pub(super) fn flags_sub(state: &mut CpuState, a: u64, b: u64, borrow: u64, size: u8) -> u64 {
    let difference = a.wrapping_sub(b).wrapping_sub(borrow) & mask(size);
    let mut flags = result_flags(difference, size) | ((a ^ b ^ difference) & AF);
    if a < b || (borrow != 0 && a == b) {
        flags |= CF;
    }
    if (a ^ b) & (a ^ difference) & sign(size) != 0 {
        flags |= OF;
    }
    put(state, flags);
    difference
}

/// Sets the flags of AND, OR, XOR, TEST. (AF is undefined; CPUs clear it.)
#[inline(always)]
fn flags_logic(state: &mut CpuState, result: u64, size: u8) {
    put(state, result_flags(result, size));
}

pub(super) fn add(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let b = cx.get(insn, insn.src, insn.size)?;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_add(b))?;
    flags_add(cx.st, a, b, 0, insn.size);
    Ok(())
}

pub(super) fn adc(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let carry = cx.st.rflags & CF;
    let b = cx.get(insn, insn.src, insn.size)?;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_add(b).wrapping_add(carry))?;
    flags_add(cx.st, a, b, carry, insn.size);
    Ok(())
}

pub(super) fn sub(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let b = cx.get(insn, insn.src, insn.size)?;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_sub(b))?;
    flags_sub(cx.st, a, b, 0, insn.size);
    Ok(())
}

pub(super) fn sbb(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let borrow = cx.st.rflags & CF;
    let b = cx.get(insn, insn.src, insn.size)?;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_sub(b).wrapping_sub(borrow))?;
    flags_sub(cx.st, a, b, borrow, insn.size);
    Ok(())
}

pub(super) fn cmp(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let a = cx.get(insn, insn.dst, insn.size)?;
    let b = cx.get(insn, insn.src, insn.size)?;
    flags_sub(cx.st, a, b, 0, insn.size);
    Ok(())
}

#[inline(always)]
fn logic(cx: &mut Cx<'_>, insn: &Insn, f: impl Fn(u64, u64) -> u64) -> Result<(), Exception> {
    let b = cx.get(insn, insn.src, insn.size)?;
    let a = cx.modify(insn, insn.lock, |a| f(a, b))?;
    flags_logic(cx.st, f(a, b), insn.size);
    Ok(())
}

pub(super) fn and(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    logic(cx, insn, |a, b| a & b)
}

pub(super) fn or(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    logic(cx, insn, |a, b| a | b)
}

pub(super) fn xor(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    logic(cx, insn, |a, b| a ^ b)
}

pub(super) fn test(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let a = cx.get(insn, insn.dst, insn.size)?;
    let b = cx.get(insn, insn.src, insn.size)?;
    flags_logic(cx.st, a & b, insn.size);
    Ok(())
}

pub(super) fn inc(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let carry = cx.st.rflags & CF;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_add(1))?;
    flags_add(cx.st, a, 1, 0, insn.size);
    cx.st.rflags = (cx.st.rflags & !CF) | carry;
    Ok(())
}

pub(super) fn dec(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let carry = cx.st.rflags & CF;
    let a = cx.modify(insn, insn.lock, |a| a.wrapping_sub(1))?;
    flags_sub(cx.st, a, 1, 0, insn.size);
    cx.st.rflags = (cx.st.rflags & !CF) | carry;
    Ok(())
}

pub(super) fn neg(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let a = cx.modify(insn, insn.lock, |a| 0u64.wrapping_sub(a))?;
    flags_sub(cx.st, 0, a, 0, insn.size);
    Ok(())
}

pub(super) fn not(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.modify(insn, insn.lock, |a| !a)?;
    Ok(())
}

/// RAX, RDX and arithmetic flags, on their way through an instruction of the host.
#[derive(Clone, Copy)]
struct Wide {
    rax: u64,
    rdx: u64,
    flags: u64,
}

/// Defines a function that runs MUL or its like of `size` bytes with operand `b` on the host CPU. So flags that the manual leaves
/// undefined are the CPU's, too.
#[rustfmt::skip] // it indents the inner macro further each time
macro_rules! on_host {
    ($name:ident, $instruction:literal) => {
        fn $name(wide: Wide, b: u64, size: u8) -> Wide {
            let Wide { mut rax, mut rdx, flags } = wide;
            let mut flags = flags & ARITH | FIXED;
            macro_rules! run {
                ($operand:literal, $class:ident, $b:expr) => {
                    // SAFETY: changes RAX, RDX and arithmetic flags only; the stack is left as it was.
                    // The callers of DIV and IDIV have seen to it that the quotient fits.
                    unsafe {
                        asm!(
                            "push {flags}",
                            "popfq",
                            concat!($instruction, " ", $operand),
                            "pushfq",
                            "pop {flags}",
                            flags = inout(reg) flags,
                            b = in($class) $b,
                            inout("rax") rax,
                            inout("rdx") rdx,
                        )
                    }
                };
            }
            match size {
                1 => run!("{b}", reg_byte, b as u8),
                2 => run!("{b:x}", reg, b),
                4 => run!("{b:e}", reg, b),
                _ => run!("{b:r}", reg, b),
            }
            Wide { rax, rdx, flags: flags & ARITH }
        }
    };
}

on_host!(host_mul, "mul");
on_host!(host_imul, "imul");
on_host!(host_div, "div");
on_host!(host_idiv, "idiv");

fn wide(cx: &Cx<'_>) -> Wide {
    Wide { rax: cx.st.gpr[RAX], rdx: cx.st.gpr[RDX], flags: cx.st.rflags }
}

/// Stores what came out: AX for bytes, else RDX and RAX of the size.
fn put_wide(cx: &mut Cx<'_>, wide: Wide, size: u8) {
    if size == 1 {
        cx.set_reg(RAX as u8, 2, wide.rax);
    } else {
        cx.set_reg(RAX as u8, size, wide.rax);
        cx.set_reg(RDX as u8, size, wide.rdx);
    }
    put(cx.st, wide.flags);
}

pub(super) fn mul(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let b = cx.get(insn, insn.dst, insn.size)?;
    let product = host_mul(wide(cx), b, insn.size);
    put_wide(cx, product, insn.size);
    Ok(())
}

/// IMUL of two operands on the host CPU: the low half of the product, and the flags.
fn host_imul2(a: u64, b: u64, size: u8, flags: u64) -> (u64, u64) {
    let (mut product, mut flags) = (a, flags & ARITH | FIXED);
    macro_rules! run {
        ($operands:literal) => {
            // SAFETY: changes the two registers and arithmetic flags only; the stack is left as it was.
            unsafe {
                asm!(
                    "push {flags}",
                    "popfq",
                    concat!("imul ", $operands),
                    "pushfq",
                    "pop {flags}",
                    flags = inout(reg) flags,
                    a = inout(reg) product,
                    b = in(reg) b,
                )
            }
        };
    }
    match size {
        2 => run!("{a:x}, {b:x}"),
        4 => run!("{a:e}, {b:e}"),
        _ => run!("{a:r}, {b:r}"),
    }
    (product & mask(size), flags & ARITH)
}

pub(super) fn imul(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    if insn.src == Op::None {
        let b = cx.get(insn, insn.dst, size)?;
        let product = host_imul(wide(cx), b, size);
        put_wide(cx, product, size);
        return Ok(());
    }
    // Two operands: dst * src; three: src * immediate.
    let b = cx.get(insn, insn.src, size)?;
    let a = if insn.raw.op_count() == 3 { insn.imm } else { cx.get(insn, insn.dst, size)? };
    let (product, flags) = host_imul2(a, b, size, cx.st.rflags);
    put(cx.st, flags);
    cx.set(insn, insn.dst, size, product)
}

pub(super) fn div(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let b = cx.get(insn, insn.dst, size)?;
    let wide = wide(cx);
    // The quotient fits if the divisor is above the dividend's high half.
    let high = if size == 1 { wide.rax >> 8 & 0xff } else { wide.rdx & mask(size) };
    if high >= b {
        return Err(Exception::plain(vector::DE));
    }
    let quotient = host_div(wide, b, size);
    put_wide(cx, quotient, size);
    Ok(())
}

/// Does the quotient of this signed division exist and fit?
fn idiv_fits(wide: Wide, b: u64, size: u8) -> bool {
    let (low, b) = (sign_extend(wide.rax, size) as i64, sign_extend(b, size) as i64);
    let dividend = match size {
        1 => sign_extend(wide.rax, 2) as i64,
        2 | 4 => sign_extend(wide.rdx << (size * 8) | (wide.rax & mask(size)), size * 2) as i64,
        // As after CQO, mostly.
        _ if wide.rdx == (low >> 63) as u64 => low,
        _ => {
            let dividend = (u128::from(wide.rdx) << 64 | u128::from(wide.rax)) as i128;
            return dividend.checked_div(i128::from(b)).is_some_and(|quotient| i64::try_from(quotient).is_ok());
        }
    };
    dividend.checked_div(b).is_some_and(|quotient| sign_extend(quotient as u64, size) as i64 == quotient)
}

pub(super) fn idiv(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let b = cx.get(insn, insn.dst, size)?;
    let wide = wide(cx);
    if !idiv_fits(wide, b, size) {
        return Err(Exception::plain(vector::DE));
    }
    let quotient = host_idiv(wide, b, size);
    put_wide(cx, quotient, size);
    Ok(())
}
