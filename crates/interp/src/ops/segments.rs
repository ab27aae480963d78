//! Segment registers and descriptors, far transfers, IRET (SDM volume 2; volume 3, chapters 3 and 5).
//!
//! Only 64-bit code segments can be entered: a far transfer or IRET to another one is `#GP(selector)`. Call gates and task gates are
//! not followed either.

use cpu::gpr::RSP;
use cpu::paging::is_canonical;
use cpu::{Exception, Segment, SegmentIndex, rflags, vector};

use super::{Cx, at_stack, flow, mask, system_registers::umip};
use crate::decode::{Insn, Op};
use crate::events::{Descriptor, null_stack};

const CS: usize = SegmentIndex::Cs as usize;
const SS: usize = SegmentIndex::Ss as usize;

fn gp(selector: u16) -> Exception {
    Exception::gp(u32::from(selector & 0xfffc))
}

fn not_present(vector: u8, selector: u16) -> Exception {
    Exception::with_code(vector, u32::from(selector & 0xfffc))
}

fn is_code(segment: &Segment) -> bool {
    segment.attributes & 0x18 == 0x18
}

fn is_conforming(segment: &Segment) -> bool {
    segment.attributes & 0x1c == 0x1c
}

fn is_writable_data(segment: &Segment) -> bool {
    segment.attributes & 0x1a == 0x12
}

/// Checks `selector` for SS at privilege `cpl` and gives what to load.
fn stack_segment(cx: &mut Cx<'_>, selector: u16, cpl: u8) -> Result<(Segment, Option<Descriptor>), Exception> {
    if selector & 0xfffc == 0 {
        if cpl == 3 || (selector & 3) as u8 != cpl {
            return Err(Exception::gp(0));
        }
        return Ok((Segment { selector, ..null_stack(cpl) }, None));
    }
    let descriptor = cx.it.read_descriptor(cx.st, selector)?;
    let segment = descriptor.segment;
    if (selector & 3) as u8 != cpl || !is_writable_data(&segment) || segment.dpl() != cpl {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(not_present(vector::SS, selector));
    }
    Ok((segment, Some(descriptor)))
}

/// Loads ES, SS, DS, FS or GS.
pub(super) fn load_segment(cx: &mut Cx<'_>, index: usize, selector: u16) -> Result<(), Exception> {
    let cpl = cx.st.cpl();
    let segment = if index == SS {
        let (segment, descriptor) = stack_segment(cx, selector, cpl)?;
        if let Some(descriptor) = descriptor {
            cx.it.mark_accessed(cx.st, &descriptor)?;
        }
        cx.shadow = true;
        cx.no_trap = true;
        segment
    } else if selector & 0xfffc == 0 {
        Segment { base: 0, limit: 0, attributes: 0, selector }
    } else {
        let descriptor = cx.it.read_descriptor(cx.st, selector)?;
        let segment = descriptor.segment;
        let system = segment.attributes & 0x10 == 0;
        let execute_only = is_code(&segment) && segment.attributes & 2 == 0;
        if system || execute_only || (!is_conforming(&segment) && segment.dpl() < cpl.max((selector & 3) as u8)) {
            return Err(gp(selector));
        }
        if !segment.present() {
            return Err(not_present(vector::NP, selector));
        }
        cx.it.mark_accessed(cx.st, &descriptor)?;
        segment
    };
    if let Some(register) = cx.st.segments.get_mut(index) {
        *register = segment;
        if segment.selector & 0xfffc != 0 {
            register.attributes |= 1;
        }
    }
    Ok(())
}

pub(super) fn mov_to_segment(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let index = insn.raw.op0_register().number();
    if index == CS {
        return Err(Exception::ud());
    }
    let selector = cx.get(insn, insn.src, 2)? as u16;
    load_segment(cx, index, selector)
}

pub(super) fn mov_from_segment(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let selector = cx.st.segments.get(insn.raw.op1_register().number()).map_or(0, |s| s.selector);
    store_selector(cx, insn, selector)
}

fn store_selector(cx: &mut Cx<'_>, insn: &Insn, selector: u16) -> Result<(), Exception> {
    let size = if insn.dst == Op::Mem { 2 } else { insn.size };
    cx.set(insn, insn.dst, size, u64::from(selector))
}

pub(super) fn sldt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    umip(cx)?;
    cx.it.mmu.checks.alignment = false;
    store_selector(cx, insn, cx.st.ldtr.selector)
}

pub(super) fn str(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    umip(cx)?;
    cx.it.mmu.checks.alignment = false;
    store_selector(cx, insn, cx.st.tr.selector)
}

pub(super) fn lldt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let selector = cx.get(insn, insn.dst, 2)? as u16;
    if selector & 0xfffc == 0 {
        cx.st.ldtr = Segment { base: 0, limit: 0, attributes: 0, selector };
        return Ok(());
    }
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let descriptor = cx.it.read_descriptor(cx.st, selector)?;
    if descriptor.segment.attributes & 0x1f != 2 || !descriptor.high_valid {
        return Err(gp(selector));
    }
    if !descriptor.segment.present() {
        return Err(not_present(vector::NP, selector));
    }
    cx.st.ldtr = descriptor.segment;
    Ok(())
}

pub(super) fn ltr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let selector = cx.get(insn, insn.dst, 2)? as u16;
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    if selector & 4 != 0 {
        return Err(gp(selector));
    }
    let descriptor = cx.it.read_descriptor(cx.st, selector)?;
    if descriptor.segment.attributes & 0x1f != 9 || !descriptor.high_valid || !is_canonical(descriptor.segment.base) {
        return Err(gp(selector));
    }
    if !descriptor.segment.present() {
        return Err(not_present(vector::NP, selector));
    }
    cx.it.mmu.set_system_bits(cx.st, descriptor.address.wrapping_add(5), 2)?;
    cx.st.tr = Segment { attributes: descriptor.segment.attributes | 2, ..descriptor.segment };
    Ok(())
}

/// What LAR, LSL, VERR and VERW can see of a selector: `None` where the descriptor must not be looked at.
fn visible(cx: &mut Cx<'_>, selector: u16) -> Result<Option<Segment>, Exception> {
    if selector & 0xfffc == 0 {
        return Ok(None);
    }
    let segment = match cx.it.read_descriptor(cx.st, selector) {
        Ok(descriptor) => descriptor.segment,
        Err(error) if error.vector == vector::GP => return Ok(None),
        Err(error) => return Err(error),
    };
    let allowed = is_conforming(&segment) || segment.dpl() >= cx.st.cpl().max((selector & 3) as u8);
    Ok(allowed.then_some(segment))
}

fn set_zf(cx: &mut Cx<'_>, on: bool) {
    cx.st.rflags = (cx.st.rflags & !rflags::ZF) | if on { rflags::ZF } else { 0 };
}

pub(super) fn lar(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let selector = cx.get(insn, insn.src, 2)? as u16;
    // System types valid in IA-32e mode: LDT, TSS (both), call gate.
    let found =
        visible(cx, selector)?.filter(|s| s.attributes & 0x10 != 0 || matches!(s.attributes & 0xf, 2 | 9 | 0xb | 0xc));
    set_zf(cx, found.is_some());
    match found {
        Some(segment) => {
            let limit = if segment.attributes & 0x8000 != 0 { segment.limit >> 12 } else { segment.limit };
            let rights = u64::from(segment.attributes) << 8 | u64::from(limit & 0xf_0000);
            cx.set(insn, insn.dst, insn.size, rights & 0x00ff_ff00 & mask(insn.size))
        }
        None => Ok(()),
    }
}

pub(super) fn lsl(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let selector = cx.get(insn, insn.src, 2)? as u16;
    let found =
        visible(cx, selector)?.filter(|s| s.attributes & 0x10 != 0 || matches!(s.attributes & 0xf, 2 | 9 | 0xb));
    set_zf(cx, found.is_some());
    match found {
        Some(segment) => cx.set(insn, insn.dst, insn.size, u64::from(segment.limit) & mask(insn.size)),
        None => Ok(()),
    }
}

pub(super) fn verr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let selector = cx.get(insn, insn.dst, 2)? as u16;
    let readable =
        visible(cx, selector)?.is_some_and(|s| s.attributes & 0x10 != 0 && (!is_code(&s) || s.attributes & 2 != 0));
    set_zf(cx, readable);
    Ok(())
}

pub(super) fn verw(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let selector = cx.get(insn, insn.dst, 2)? as u16;
    let writable = visible(cx, selector)?.is_some_and(|s| is_writable_data(&s));
    set_zf(cx, writable);
    Ok(())
}

/// Offset and selector of a far pointer in memory.
fn far_pointer(cx: &mut Cx<'_>, insn: &Insn) -> Result<(u64, u16), Exception> {
    use iced_x86::MemorySize as S;
    let size: usize = match insn.raw.memory_size() {
        S::SegPtr16 => 2,
        S::SegPtr32 => 4,
        _ => 8,
    };
    let mut bytes = [0; 10];
    let address = cx.address(&insn.mem);
    if cx.user {
        cx.it.mmu.checks.aligned(address, size)?;
    }
    if let Some(part) = bytes.get_mut(..size + 2) {
        cx.it.mmu.read_bytes(cx.st, address, part, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
    }
    let value = bytes.iter().rev().fold(0u128, |sum, byte| sum << 8 | u128::from(*byte));
    Ok((value as u64 & mask(size as u8), (value >> (size * 8)) as u16))
}

/// LSS, LFS, LGS.
pub(super) fn load_far_pointer(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let (offset, selector) = far_pointer(cx, insn)?;
    let index = match insn.raw.mnemonic() {
        iced_x86::Mnemonic::Lss => SS,
        iced_x86::Mnemonic::Lfs => SegmentIndex::Fs as usize,
        _ => SegmentIndex::Gs as usize,
    };
    load_segment(cx, index, selector)?;
    // LSS inhibits nothing.
    cx.shadow = false;
    cx.no_trap = false;
    cx.set(insn, insn.dst, insn.size, offset)
}

/// The code segment of a far JMP or CALL, which stays at the same privilege.
fn far_target(cx: &mut Cx<'_>, selector: u16) -> Result<(Segment, Descriptor), Exception> {
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let descriptor = cx.it.read_descriptor(cx.st, selector)?;
    let mut segment = descriptor.segment;
    let cpl = cx.st.cpl();
    let privilege = if is_conforming(&segment) {
        segment.dpl() <= cpl
    } else {
        (selector & 3) as u8 <= cpl && segment.dpl() == cpl
    };
    if !is_code(&segment) || !privilege || !segment.long() || segment.big() {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(not_present(vector::NP, selector));
    }
    segment.selector = (selector & 0xfffc) | u16::from(cpl);
    segment.attributes |= 1;
    Ok((segment, descriptor))
}

pub(super) fn jmp_far(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let (offset, selector) = far_pointer(cx, insn)?;
    let (segment, descriptor) = far_target(cx, selector)?;
    if !is_canonical(offset) {
        return Err(Exception::gp(0));
    }
    cx.it.mark_accessed(cx.st, &descriptor)?;
    cx.st.segments[CS] = segment;
    cx.next = offset;
    Ok(())
}

pub(super) fn call_far(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size: u8 = match insn.raw.memory_size() {
        iced_x86::MemorySize::SegPtr16 => 2,
        iced_x86::MemorySize::SegPtr32 => 4,
        _ => 8,
    };
    let (offset, selector) = far_pointer(cx, insn)?;
    let (segment, descriptor) = far_target(cx, selector)?;
    let step = usize::from(size);
    let rsp = cx.st.gpr[RSP].wrapping_sub(2 * u64::from(size));
    let words = [cx.next, u64::from(cx.st.segments[CS].selector)];
    let frame: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes().into_iter().take(step)).collect();
    if cx.user {
        cx.it.mmu.checks.aligned(rsp, step)?;
    }
    cx.it.mark_accessed(cx.st, &descriptor)?;
    cx.it.mmu.write_bytes(cx.st, rsp, &frame, cx.user).map_err(|e| at_stack(e, true))?;
    // As for the near call: what is written below the stack pointer stays.
    if !is_canonical(offset) {
        return Err(Exception::gp(0));
    }
    cx.st.gpr[RSP] = rsp;
    cx.st.segments[CS] = segment;
    cx.next = offset;
    Ok(())
}

/// Checks the code segment a far RET or IRET goes back to.
fn return_segment(cx: &mut Cx<'_>, selector: u16) -> Result<(Segment, Descriptor), Exception> {
    if selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let rpl = (selector & 3) as u8;
    if rpl < cx.st.cpl() {
        return Err(gp(selector));
    }
    let descriptor = cx.it.read_descriptor(cx.st, selector)?;
    let mut segment = descriptor.segment;
    let privilege = if is_conforming(&segment) { segment.dpl() <= rpl } else { segment.dpl() == rpl };
    if !is_code(&segment) || !privilege || !segment.long() || segment.big() {
        return Err(gp(selector));
    }
    if !segment.present() {
        return Err(not_present(vector::NP, selector));
    }
    segment.attributes |= 1;
    Ok((segment, descriptor))
}

/// After a return to less privilege: data segments that privilege may not use become null.
fn drop_segments(cx: &mut Cx<'_>, cpl: u8) {
    for index in [SegmentIndex::Es, SegmentIndex::Ds, SegmentIndex::Fs, SegmentIndex::Gs] {
        let segment = &mut cx.st.segments[index as usize];
        if segment.selector & 0xfffc != 0 && segment.dpl() < cpl && !is_conforming(segment) {
            *segment = Segment::default();
        }
    }
}

pub(super) fn retf(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    use iced_x86::Code as C;
    let size: u8 = match insn.raw.code() {
        C::Retfw | C::Retfw_imm16 => 2,
        C::Retfd | C::Retfd_imm16 => 4,
        _ => 8,
    };
    let step = u64::from(size);
    let release = if insn.dst == Op::Imm { insn.imm & 0xffff } else { 0 };
    let target = cx.peek(0, size)?;
    let selector = cx.peek(step, size)? as u16;
    let (segment, descriptor) = return_segment(cx, selector)?;
    if !is_canonical(target) {
        return Err(Exception::gp(0));
    }
    let rpl = (selector & 3) as u8;
    let mut rsp = cx.st.gpr[RSP].wrapping_add(2 * step + release);
    if rpl > cx.st.cpl() {
        let new_rsp = cx.peek(2 * step + release, size)?;
        let ss = cx.peek(3 * step + release, size)? as u16;
        let (stack, stack_descriptor) = stack_segment(cx, ss, rpl)?;
        if let Some(stack_descriptor) = stack_descriptor {
            cx.it.mark_accessed(cx.st, &stack_descriptor)?;
        }
        cx.it.mark_accessed(cx.st, &descriptor)?;
        cx.st.segments[SS] = stack;
        rsp = new_rsp.wrapping_add(release);
        drop_segments(cx, rpl);
    } else {
        cx.it.mark_accessed(cx.st, &descriptor)?;
    }
    cx.st.gpr[RSP] = rsp;
    cx.st.segments[CS] = segment;
    cx.next = target;
    Ok(())
}

pub(super) fn iret(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size: u8 = match insn.raw.mnemonic() {
        iced_x86::Mnemonic::Iret => 2,
        iced_x86::Mnemonic::Iretd => 4,
        _ => 8,
    };
    if cx.st.rflags & rflags::NT != 0 {
        return Err(Exception::gp(0));
    }
    let mut words = [0u64; 5];
    for (i, word) in words.iter_mut().enumerate() {
        *word = cx.peek(i as u64 * u64::from(size), size)?;
    }
    let [target, cs, flags, rsp, ss] = words;
    let cs = cs as u16;
    let (segment, descriptor) = return_segment(cx, cs)?;
    let rpl = (cs & 3) as u8;
    let (stack, stack_descriptor) = stack_segment(cx, ss as u16, rpl)?;
    if !is_canonical(target) {
        return Err(Exception::gp(0));
    }
    if let Some(stack_descriptor) = stack_descriptor {
        cx.it.mark_accessed(cx.st, &stack_descriptor)?;
    }
    cx.it.mark_accessed(cx.st, &descriptor)?;
    let writable = flow::writable_flags(cx, size) | (rflags::RF & mask(size));
    cx.st.rflags = (cx.st.rflags & !writable) | (flags & writable) | rflags::FIXED;
    if rpl > cx.st.cpl() {
        drop_segments(cx, rpl);
    }
    cx.st.segments[CS] = segment;
    cx.st.segments[SS] = stack;
    cx.st.gpr[RSP] = rsp;
    cx.st.nmi_blocked = false;
    cx.next = target;
    cx.keep_rf = true;
    Ok(())
}
