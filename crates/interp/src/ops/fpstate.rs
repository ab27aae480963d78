//! FXSAVE, FXRSTOR, XSAVE, XSAVEOPT, XRSTOR and XCR0, on [`cpu::FpState`] (SDM volume 1, chapters 10.5 and 13).
//!
//! [`FpState`] is in the 64-bit format (full instruction and data pointers). All components always count as in use (XINUSE), which the
//! architecture allows.

use cpu::gpr::{RAX, RCX, RDX};
use cpu::paging::Kind;
use cpu::{CpuState, Exception, FpState, cr0, cr4, vector};

use super::{Cx, at_stack};
use crate::decode::Insn;

/// Bits of MXCSR that exist.
pub(crate) const MXCSR_MASK: u32 = FpState::MXCSR_MASK;
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;
/// Size of legacy area and header.
const HEADER_END: usize = 576;

fn no_device() -> Exception {
    Exception::plain(vector::NM)
}

/// `#GP(0)`, or with alignment checks what this kind of CPU makes of it: `#AC(0)` for what is not even aligned to 4 bytes.
fn aligned_area(cx: &Cx<'_>, address: u64, to: u64) -> Result<(), Exception> {
    if address.is_multiple_of(to) {
        return Ok(());
    }
    if cx.user {
        cx.it.mmu.checks.aligned(address, 4)?;
    }
    Err(Exception::gp(0))
}

fn check_fx(cx: &Cx<'_>, address: u64) -> Result<(), Exception> {
    if cx.st.cr0 & (cr0::EM | cr0::TS) != 0 {
        return Err(no_device());
    }
    aligned_area(cx, address, 16)
}

/// The first 32 bytes of the legacy area, with pointers as the 64-bit (`wide`) or 32-bit form stores them.
fn control_area(fp: &FpState, wide: bool) -> [u8; 32] {
    let mut area = [0; 32];
    area.copy_from_slice(&fp.bytes[..32]);
    if !wide {
        // Bytes 4 to 7 of either pointer hold the selector, which this CPU model no longer keeps.
        area[12..16].fill(0);
        area[20..24].fill(0);
    }
    area
}

/// Takes FCW to FDP over from a saved area.
fn load_control(fp: &mut FpState, area: &[u8], wide: bool) {
    let Some(area) = area.get(..24) else { return };
    fp.bytes[..24].copy_from_slice(area);
    fp.bytes[5] = 0;
    if !wide {
        fp.bytes[12..16].fill(0);
        fp.bytes[20..24].fill(0);
    }
}

pub(super) fn fxsave(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let address = cx.address(&insn.mem);
    check_fx(cx, address)?;
    let wide = insn.raw.mnemonic() == iced_x86::Mnemonic::Fxsave64;
    let mut area = [0; 416];
    area.copy_from_slice(&cx.st.fp.bytes[..416]);
    area[..32].copy_from_slice(&control_area(&cx.st.fp, wide));
    let stack = insn.mem.stack;
    cx.it.mmu.check(cx.st, address, 512, Kind::Write, cx.user).map_err(|e| at_stack(e, stack))?;
    cx.it.mmu.write_bytes(cx.st, address, &area, cx.user)
}

fn mxcsr_in(area: &[u8]) -> Result<[u8; 4], Exception> {
    let bytes: [u8; 4] = area.get(24..28).and_then(|b| b.try_into().ok()).unwrap_or_default();
    if u32::from_le_bytes(bytes) & !MXCSR_MASK != 0 { Err(Exception::gp(0)) } else { Ok(bytes) }
}

pub(super) fn fxrstor(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let address = cx.address(&insn.mem);
    check_fx(cx, address)?;
    let wide = insn.raw.mnemonic() == iced_x86::Mnemonic::Fxrstor64;
    let mut area = [0; 512];
    cx.it.mmu.read_bytes(cx.st, address, &mut area, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
    let mxcsr = mxcsr_in(&area)?;
    let fp = &mut cx.st.fp;
    load_control(fp, &area, wide);
    fp.bytes[24..28].copy_from_slice(&mxcsr);
    load_registers(fp, &area);
    fp.bytes[160..416].copy_from_slice(&area[160..416]);
    Ok(())
}

/// ST0 to ST7: 10 bytes each; the rest of each 16 stays zero.
fn load_registers(fp: &mut FpState, area: &[u8]) {
    for i in 0..8 {
        let at = FpState::ST + i * 16;
        if let (Some(to), Some(from)) = (fp.bytes.get_mut(at..at + 10), area.get(at..at + 10)) {
            to.copy_from_slice(from);
        }
    }
}

fn check_x(cx: &Cx<'_>, address: u64) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    if cx.st.cr0 & cr0::TS != 0 {
        return Err(no_device());
    }
    aligned_area(cx, address, 64)
}

/// The requested-feature bitmap.
fn requested(state: &CpuState) -> u64 {
    state.xcr0 & ((state.gpr[RAX] & 0xffff_ffff) | state.gpr[RDX] << 32)
}

fn is_wide(insn: &Insn) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(insn.raw.mnemonic(), M::Xsave64 | M::Xsaveopt64 | M::Xrstor64)
}

pub(super) fn xsave(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let address = cx.address(&insn.mem);
    check_x(cx, address)?;
    let rfbm = requested(cx.st);
    let stack = insn.mem.stack;
    let total = if rfbm & AVX != 0 { cx.st.fp.bytes.len() } else { HEADER_END };
    cx.it.mmu.check(cx.st, address, total, Kind::Write, cx.user).map_err(|e| at_stack(e, stack))?;
    let mut bv = [0; 8];
    cx.it.mmu.read_bytes(cx.st, address.wrapping_add(512), &mut bv, cx.user)?;
    let bv = (u64::from_le_bytes(bv) & !rfbm) | rfbm;
    let control = control_area(&cx.st.fp, is_wide(insn));
    let fp = cx.st.fp.clone();
    let mut put =
        |from: usize, data: &[u8]| cx.it.mmu.write_bytes(cx.st, address.wrapping_add(from as u64), data, cx.user);
    if rfbm & X87 != 0 {
        put(0, &control[..24])?;
        put(32, &fp.bytes[32..160])?;
    }
    if rfbm & (SSE | AVX) != 0 {
        put(24, &control[24..32])?;
    }
    if rfbm & SSE != 0 {
        put(160, &fp.bytes[160..416])?;
    }
    if rfbm & AVX != 0 {
        put(HEADER_END, &fp.bytes[HEADER_END..])?;
    }
    put(512, &bv.to_le_bytes())
}

pub(super) fn xrstor(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let address = cx.address(&insn.mem);
    check_x(cx, address)?;
    let rfbm = requested(cx.st);
    let mut area = [0; 832];
    let total = if rfbm & AVX != 0 { area.len() } else { HEADER_END };
    if let Some(part) = area.get_mut(..total) {
        cx.it.mmu.read_bytes(cx.st, address, part, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
    }
    let word = |at: usize| area.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes);
    let bv = word(512);
    if bv & !cx.st.xcr0 != 0 || word(520) != 0 || word(528) != 0 {
        return Err(Exception::gp(0));
    }
    let mxcsr = if rfbm & (SSE | AVX) != 0 { Some(mxcsr_in(&area)?) } else { None };
    let initial = FpState::default();
    let fp = &mut cx.st.fp;
    if rfbm & X87 != 0 {
        let from = if bv & X87 != 0 { &area } else { &initial.bytes };
        load_control(fp, from, is_wide(insn) || bv & X87 == 0);
        load_registers(fp, from);
    }
    if let Some(mxcsr) = mxcsr {
        fp.bytes[24..28].copy_from_slice(&mxcsr);
    }
    if rfbm & SSE != 0 {
        let from = if bv & SSE != 0 { &area } else { &initial.bytes };
        fp.bytes[160..416].copy_from_slice(&from[160..416]);
    }
    if rfbm & AVX != 0 {
        let from = if bv & AVX != 0 { &area } else { &initial.bytes };
        fp.bytes[HEADER_END..].copy_from_slice(&from[HEADER_END..]);
    }
    Ok(())
}

pub(super) fn xgetbv(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    match cx.st.gpr[RCX] as u32 {
        0 => {}
        1 if cx.it.model.has_xgetbv1() => {}
        _ => return Err(Exception::gp(0)),
    }
    // All enabled components count as in use, so both registers read the same.
    cx.st.gpr[RAX] = cx.st.xcr0 & 0xffff_ffff;
    cx.st.gpr[RDX] = cx.st.xcr0 >> 32;
    Ok(())
}

pub(super) fn xsetbv(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    cx.privileged()?;
    let value = (cx.st.gpr[RAX] & 0xffff_ffff) | cx.st.gpr[RDX] << 32;
    let bad = cx.st.gpr[RCX] as u32 != 0
        || value & X87 == 0
        || value & !cx.it.model.xcr0_mask() != 0
        || (value & AVX != 0 && value & SSE == 0);
    if bad {
        return Err(Exception::gp(0));
    }
    cx.st.xcr0 = value;
    Ok(())
}
