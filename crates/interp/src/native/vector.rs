//! Vector instructions whose memory operand is several elements, each checked for itself: AVX2 gathers, masked loads and stores.

use cpu::paging::Kind;
use cpu::{Exception, FpState};
use iced_x86::{Mnemonic, OpKind, Register};

use super::{State, pending_x87, shown, usable};
use crate::decode::Insn;
use crate::ops::{Cx, at_stack, sign_extend};

/// The 32 bytes of YMM register `n`.
fn vector(fp: &FpState, n: usize) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes[..16].copy_from_slice(&fp.get_u128(FpState::XMM + n * 16).to_le_bytes());
    bytes[16..].copy_from_slice(&fp.get_u128(FpState::YMM_HIGH + n * 16).to_le_bytes());
    bytes
}

fn set_vector(fp: &mut FpState, n: usize, value: &[u8; 32]) {
    for (at, half) in [(FpState::XMM, &value[..16]), (FpState::YMM_HIGH, &value[16..])] {
        if let Some(to) = fp.bytes.get_mut(at + n * 16..at + n * 16 + 16) {
            to.copy_from_slice(half);
        }
    }
}

fn element(bytes: &[u8], index: usize, size: usize) -> u64 {
    bytes
        .get(index * size..index * size + size)
        .map_or(0, |b| b.iter().rev().fold(0, |sum, b| sum << 8 | u64::from(*b)))
}

fn set_element(bytes: &mut [u8], index: usize, size: usize, value: u64) {
    if let Some(to) = bytes.get_mut(index * size..index * size + size) {
        to.iter_mut().zip(value.to_le_bytes()).for_each(|(to, from)| *to = from);
    }
}

fn prepare(cx: &Cx<'_>, insn: &Insn, state: State) -> Result<(), Exception> {
    if !shown(cx, &insn.raw) {
        return Err(Exception::ud());
    }
    usable(cx, state)
}

/// VGATHER and VPGATHER: elements done before a fault stay done, with their mask cleared.
pub(super) fn gather(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    use Mnemonic as M;
    prepare(cx, insn, State::Avx)?;
    cx.it.mmu.checks.alignment = false;
    let raw = &insn.raw;
    let (index_size, size) = match raw.mnemonic() {
        M::Vpgatherdd | M::Vgatherdps => (4usize, 4usize),
        M::Vpgatherdq | M::Vgatherdpd => (4, 8),
        M::Vpgatherqd | M::Vgatherqps => (8, 4),
        _ => (8, 8),
    };
    let index_register = raw.memory_index();
    let (target, mask) = (raw.op0_register(), raw.op2_register());
    let numbers = [target.number(), index_register.number(), mask.number()];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::ud());
    }
    let count = (target.size() / size).min(index_register.size() / index_size);
    let indices = vector(&cx.st.fp, numbers[1]);
    let mut result = vector(&cx.st.fp, numbers[0]);
    // Before the first access every element of the mask becomes all ones or all zeroes (SDM volume 2, VGATHERDPS), CPUs do it to
    // those behind the last one used, too.
    let given = vector(&cx.st.fp, numbers[2]);
    let mut masks = [0; 32];
    for i in 0..target.size().max(index_register.size()) / size {
        let selected = element(&given, i, size) >> (size * 8 - 1) != 0;
        set_element(&mut masks, i, size, if selected { u64::MAX } else { 0 });
    }
    let scale = raw.memory_index_scale().trailing_zeros();
    // The vector index is no general register, so this is base and displacement only.
    let base = cx.offset(&insn.mem);
    let segment = cx.segment_base(insn.mem.segment);
    let mut loaded = false;
    for i in 0..count {
        if element(&masks, i, size) >> (size * 8 - 1) != 0 {
            let index = sign_extend(element(&indices, i, index_size), index_size as u8) << scale;
            let mut offset = base.wrapping_add(index);
            if insn.mem.addr32 {
                offset &= 0xffff_ffff;
            }
            match cx.it.mmu.read(cx.st, segment.wrapping_add(offset), size, cx.user) {
                Ok(value) => {
                    set_element(&mut result, i, size, value);
                    loaded = true;
                }
                Err(error) => {
                    // Not the manual's, but what CPUs do: the first element loaded clears the rest of the register.
                    let length = target.size().max(index_register.size());
                    if loaded && let Some(rest) = result.get_mut(length..) {
                        rest.fill(0);
                    }
                    set_vector(&mut cx.st.fp, numbers[0], &result);
                    set_vector(&mut cx.st.fp, numbers[2], &masks);
                    return Err(at_stack(error, insn.mem.stack));
                }
            }
        }
        set_element(&mut masks, i, size, 0);
    }
    if let Some(rest) = result.get_mut(count * size..) {
        rest.fill(0);
    }
    set_vector(&mut cx.st.fp, numbers[0], &result);
    set_vector(&mut cx.st.fp, numbers[2], &[0; 32]);
    Ok(())
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD, VPMASKMOVQ, both directions: masked-out elements are not touched and do not fault.
pub(super) fn masked_move(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    use Mnemonic as M;
    prepare(cx, insn, State::Avx)?;
    cx.it.mmu.checks.alignment = false;
    let raw = &insn.raw;
    let size: usize = if matches!(raw.mnemonic(), M::Vmaskmovps | M::Vpmaskmovd) { 4 } else { 8 };
    let masks = vector(&cx.st.fp, raw.op1_register().number());
    let address = cx.address(&insn.mem);
    let selected = |i: &usize| element(&masks, *i, size) >> (size * 8 - 1) != 0;
    let at = |i: usize| address.wrapping_add((i * size) as u64);
    if raw.op0_kind() == OpKind::Memory {
        let source = raw.op2_register();
        let data = vector(&cx.st.fp, source.number());
        let all = 0..source.size() / size;
        for i in all.clone().filter(selected) {
            cx.it.mmu.check(cx.st, at(i), size, Kind::Write, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
        }
        for i in all.filter(selected) {
            cx.it
                .mmu
                .write(cx.st, at(i), size, element(&data, i, size), cx.user)
                .map_err(|e| at_stack(e, insn.mem.stack))?;
        }
    } else {
        let target: Register = raw.op0_register();
        let mut result = [0; 32];
        for i in (0..target.size() / size).filter(selected) {
            let value = cx.it.mmu.read(cx.st, at(i), size, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
            set_element(&mut result, i, size, value);
        }
        set_vector(&mut cx.st.fp, target.number(), &result);
    }
    Ok(())
}

/// MASKMOVQ, MASKMOVDQU: bytes to [RDI] whose mask byte has its top bit set.
pub(super) fn masked_store_bytes(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let raw = &insn.raw;
    let mmx = raw.mnemonic() == Mnemonic::Maskmovq;
    let state = match raw.mnemonic() {
        Mnemonic::Maskmovq => State::Mmx,
        Mnemonic::Maskmovdqu => State::Sse,
        _ => State::Avx,
    };
    prepare(cx, insn, state)?;
    pending_x87(cx, state, raw)?;
    // MM registers are the x87 stack's by their physical number; the area has them by their place in the stack.
    let top = usize::from(cx.st.fp.bytes[3] >> 3 & 7);
    let register = |r: Register| {
        let mut bytes = [0; 16];
        if mmx {
            let at = FpState::ST + (r.number() + 8 - top) % 8 * 16;
            bytes[..8].copy_from_slice(&(cx.st.fp.get_u128(at) as u64).to_le_bytes());
        } else {
            bytes = cx.st.fp.get_u128(FpState::XMM + r.number() * 16).to_le_bytes();
        }
        bytes
    };
    // The first operand is the implied memory.
    let (data, masks) = (register(raw.op1_register()), register(raw.op2_register()));
    let mut base = cx.st.gpr[cpu::gpr::RDI];
    if raw.op0_kind() == OpKind::MemorySegEDI {
        base &= 0xffff_ffff;
    }
    let base = base.wrapping_add(cx.segment_base(insn.mem.segment));
    if cx.user {
        cx.it.mmu.checks.aligned(base, 8)?;
    }
    let selected = |(i, mask): (usize, &u8)| (mask & 0x80 != 0).then_some(i);
    for i in masks.iter().enumerate().filter_map(selected) {
        cx.it.mmu.check(cx.st, base.wrapping_add(i as u64), 1, Kind::Write, cx.user)?;
    }
    for i in masks.iter().enumerate().filter_map(selected) {
        let value = data.get(i).copied().map_or(0, u64::from);
        cx.it.mmu.write(cx.st, base.wrapping_add(i as u64), 1, value, cx.user)?;
    }
    if mmx {
        // As every MMX instruction: tags valid, top of stack 0.
        cx.st.fp.bytes[4] = 0xff;
        cx.st.fp.bytes[3] &= !0x38;
        if let Some(stack) = cx.st.fp.bytes.get_mut(FpState::ST..FpState::ST + 128) {
            stack.rotate_right(top * 16);
        }
    }
    Ok(())
}
