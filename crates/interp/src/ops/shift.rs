//! Shifts and rotates. RCL, RCR, SHLD and SHRD are rare and left to the native assist.

use cpu::{Exception, rflags};

use super::{Cx, alu::result_flags, mask, sign, sign_extend};
use crate::decode::Insn;

use rflags::{AF, ARITH, CF, OF};

/// The masked count, from CL or the immediate.
fn count(cx: &mut Cx<'_>, insn: &Insn) -> Result<u32, Exception> {
    let count = cx.get(insn, insn.src, 1)? as u32;
    Ok(count & if insn.size == 8 { 63 } else { 31 })
}

/// Shifts by a non-zero count. `f` gives result and last bit shifted out; OF is by the formula for count 1, as CPUs compute it
/// for all counts where the manual leaves it undefined.
fn shift(
    cx: &mut Cx<'_>,
    insn: &Insn,
    f: impl Fn(u64, u32) -> (u64, bool),
    overflow: impl Fn(u64, u64, bool) -> bool,
) -> Result<(), Exception> {
    let size = insn.size;
    let count = count(cx, insn)?;
    let old = cx.modify(insn, false, |old| if count == 0 { old } else { f(old, count).0 })?;
    if count == 0 {
        return Ok(());
    }
    let (result, carry) = f(old, count);
    let result = result & mask(size);
    let mut flags = result_flags(result, size);
    if carry {
        flags |= CF;
    }
    if overflow(old, result, carry) {
        flags |= OF;
    }
    // AF is undefined; CPUs clear it.
    cx.st.rflags = (cx.st.rflags & !(ARITH | AF)) | flags;
    Ok(())
}

pub(super) fn shl(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let bits = u32::from(size) * 8;
    shift(
        cx,
        insn,
        |a, n| {
            let wide = u128::from(a) << n;
            (wide as u64, n <= bits && wide >> bits & 1 != 0)
        },
        |_, result, carry| (result & sign(size) != 0) != carry,
    )
}

pub(super) fn shr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    shift(cx, insn, |a, n| (a >> n, a >> (n - 1) & 1 != 0), |old, _, _| old & sign(size) != 0)
}

pub(super) fn sar(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    shift(
        cx,
        insn,
        |a, n| {
            let a = sign_extend(a, size) as i64;
            ((a >> n) as u64, a >> (n - 1) & 1 != 0)
        },
        |_, _, _| false,
    )
}

/// Rotates left by `n` of `bits`.
fn rotate_left(a: u64, n: u32, size: u8) -> u64 {
    let bits = u32::from(size) * 8;
    let n = n % bits;
    if n == 0 { a } else { (a << n | a >> (bits - n)) & mask(size) }
}

pub(super) fn rol(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let count = count(cx, insn)?;
    let old = cx.modify(insn, false, |a| rotate_left(a, count, size))?;
    if count != 0 {
        let result = rotate_left(old, count, size);
        let carry = result & 1;
        let overflow = (result & sign(size) != 0) != (carry != 0);
        cx.st.rflags = (cx.st.rflags & !(CF | OF)) | (carry * CF) | (u64::from(overflow) * OF);
    }
    Ok(())
}

pub(super) fn ror(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let bits = u32::from(size) * 8;
    let count = count(cx, insn)?;
    let left = bits - count % bits;
    let old = cx.modify(insn, false, |a| rotate_left(a, left, size))?;
    if count != 0 {
        let result = rotate_left(old, left, size);
        let carry = result & sign(size) != 0;
        let overflow = carry != (result & sign(size) >> 1 != 0);
        cx.st.rflags = (cx.st.rflags & !(CF | OF)) | (u64::from(carry) * CF) | (u64::from(overflow) * OF);
    }
    Ok(())
}
