//! Integer arithmetic and logic, and the flags they set (SDM volume 1, 3.4.3.1).

use cpu::gpr::{RAX, RDX};
use cpu::{CpuState, Exception, rflags, vector};

use super::{Cx, mask, sign, sign_extend};
use crate::decode::{Insn, Op};

use rflags::{AF, ARITH, CF, OF, PF, SF, ZF};

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

/// Stores a double-width product and sets CF and OF. (The other flags are undefined; set from the low half, as CPUs do.)
fn put_product(cx: &mut Cx<'_>, low: u64, high: u64, size: u8, overflow: bool) {
    if size == 1 {
        cx.set_reg(RAX as u8, 2, (high & 0xff) << 8 | (low & 0xff));
    } else {
        cx.set_reg(RAX as u8, size, low);
        cx.set_reg(RDX as u8, size, high);
    }
    product_flags(cx, low, size, overflow);
}

fn product_flags(cx: &mut Cx<'_>, low: u64, size: u8, overflow: bool) {
    // ZF is undefined; CPUs clear it.
    put(cx.st, result_flags(low, size) & !ZF | if overflow { CF | OF } else { 0 });
}

pub(super) fn mul(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let b = cx.get(insn, insn.dst, size)?;
    let product = u128::from(cx.st.gpr[RAX] & mask(size)) * u128::from(b);
    let high = (product >> (u32::from(size) * 8)) as u64;
    put_product(cx, product as u64 & mask(size), high, size, high != 0);
    Ok(())
}

pub(super) fn imul(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let signed = |value: u64| i128::from(sign_extend(value, size) as i64);
    if insn.src == Op::None {
        let b = cx.get(insn, insn.dst, size)?;
        let product = signed(cx.st.gpr[RAX]) * signed(b);
        let low = product as u64 & mask(size);
        let high = (product >> (u32::from(size) * 8)) as u64 & mask(size);
        put_product(cx, low, high, size, product != signed(low));
        return Ok(());
    }
    // Two operands: dst * src; three: src * immediate.
    let b = cx.get(insn, insn.src, size)?;
    let a = if insn.raw.op_count() == 3 { insn.imm } else { cx.get(insn, insn.dst, size)? };
    let product = signed(a) * signed(b);
    let low = product as u64 & mask(size);
    product_flags(cx, low, size, product != signed(low));
    cx.set(insn, insn.dst, size, low)
}

fn dividend(cx: &Cx<'_>, size: u8) -> u128 {
    let (rax, rdx) = (cx.st.gpr[RAX], cx.st.gpr[RDX]);
    match size {
        1 => u128::from(rax & 0xffff),
        _ => u128::from(rdx & mask(size)) << (u32::from(size) * 8) | u128::from(rax & mask(size)),
    }
}

fn put_quotient(cx: &mut Cx<'_>, size: u8, quotient: u64, remainder: u64) {
    if size == 1 {
        cx.set_reg(RAX as u8, 2, (remainder & 0xff) << 8 | (quotient & 0xff));
    } else {
        cx.set_reg(RAX as u8, size, quotient);
        cx.set_reg(RDX as u8, size, remainder);
    }
}

pub(super) fn div(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let error = Exception::plain(vector::DE);
    let b = u128::from(cx.get(insn, insn.dst, size)?);
    let a = dividend(cx, size);
    let quotient = a.checked_div(b).ok_or(error)?;
    if quotient > u128::from(mask(size)) {
        return Err(error);
    }
    put_quotient(cx, size, quotient as u64, (a % b) as u64);
    Ok(())
}

pub(super) fn idiv(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let error = Exception::plain(vector::DE);
    let b = i128::from(sign_extend(cx.get(insn, insn.dst, size)?, size) as i64);
    let shift = 128 - u32::from(size) * 16;
    let a = (dividend(cx, size) << shift) as i128 >> shift;
    let quotient = a.checked_div(b).ok_or(error)?;
    let remainder = a.checked_rem(b).ok_or(error)?;
    if i128::from(sign_extend(quotient as u64, size) as i64) != quotient {
        return Err(error);
    }
    put_quotient(cx, size, quotient as u64 & mask(size), remainder as u64 & mask(size));
    Ok(())
}
