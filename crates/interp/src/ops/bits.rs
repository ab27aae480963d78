//! Bit tests and flag instructions.

use cpu::{Exception, rflags};

use super::{Cx, at_stack, sign_extend};
use crate::decode::{Insn, Op};

use rflags::{CF, DF};

/// BT and its kin. With a register bit number and a memory operand the bit string extends beyond the operand, both ways.
fn bit(cx: &mut Cx<'_>, insn: &Insn, write: bool, f: impl Fn(u64, u64) -> u64) -> Result<(), Exception> {
    let size = insn.size;
    let bits = u64::from(size) * 8;
    let number = cx.get(insn, insn.src, if insn.src == Op::Imm { 1 } else { size })?;
    let one = 1u64 << (number % bits);
    let old = if insn.dst == Op::Mem {
        let mut address = cx.offset(&insn.mem);
        if insn.src != Op::Imm {
            let units = (sign_extend(number, size) as i64) >> bits.trailing_zeros();
            address = address.wrapping_add((units as u64).wrapping_mul(u64::from(size)));
            if insn.mem.addr32 {
                address &= 0xffff_ffff;
            }
        }
        if insn.mem.segment != 0 {
            address = address.wrapping_add(cx.segment_base(insn.mem.segment));
        }
        let bytes = usize::from(size);
        if write {
            cx.it.mmu.modify(cx.st, address, bytes, cx.user, insn.lock, |old| f(old, one))
        } else {
            cx.it.mmu.read(cx.st, address, bytes, cx.user)
        }
        .map_err(|e| at_stack(e, insn.mem.stack))?
    } else if write {
        cx.modify(insn, false, |old| f(old, one))?
    } else {
        cx.get(insn, insn.dst, size)?
    };
    cx.st.rflags = (cx.st.rflags & !CF) | if old & one != 0 { CF } else { 0 };
    Ok(())
}

pub(super) fn bt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    bit(cx, insn, false, |a, _| a)
}

pub(super) fn bts(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    bit(cx, insn, true, |a, one| a | one)
}

pub(super) fn btr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    bit(cx, insn, true, |a, one| a & !one)
}

pub(super) fn btc(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    bit(cx, insn, true, |a, one| a ^ one)
}

pub(super) fn clc(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags &= !CF;
    Ok(())
}

pub(super) fn stc(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags |= CF;
    Ok(())
}

pub(super) fn cmc(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags ^= CF;
    Ok(())
}

pub(super) fn cld(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags &= !DF;
    Ok(())
}

pub(super) fn std(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags |= DF;
    Ok(())
}
