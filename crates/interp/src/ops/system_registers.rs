//! Control and debug registers, descriptor-table registers (SDM volume 3, chapter 2; volume 2, MOV CR).

use cpu::paging::{PHYSICAL_BITS, is_canonical};
use cpu::{Exception, TableRegister, cr0, cr4, efer, vector};
use iced_x86::Register;

use super::{Cx, at_stack};
use crate::decode::{Insn, Op};
use crate::interp::TlbFlush;

fn number(register: Register, first: Register) -> u32 {
    (register as u32).wrapping_sub(first as u32)
}

pub(super) fn mov_cr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let to = insn.raw.op0_register();
    if to.is_cr() {
        let value = cx.get(insn, insn.src, 8)?;
        return match number(to, Register::CR0) {
            0 => set_cr0(cx, value),
            2 => {
                cx.st.cr2 = value;
                Ok(())
            }
            3 => set_cr3(cx, value),
            4 => set_cr4(cx, value),
            8 if value > 15 => Err(Exception::gp(0)),
            8 => {
                cx.it.setup.lapic.set_cr8(value as u8);
                Ok(())
            }
            _ => Err(Exception::ud()),
        };
    }
    let value = match number(insn.raw.op1_register(), Register::CR0) {
        0 => cx.st.cr0,
        2 => cx.st.cr2,
        3 => cx.st.cr3,
        4 => cx.st.cr4,
        8 => u64::from(cx.it.setup.lapic.cr8()),
        _ => return Err(Exception::ud()),
    };
    cx.set(insn, insn.dst, 8, value)
}

fn set_cr0(cx: &mut Cx<'_>, value: u64) -> Result<(), Exception> {
    const KNOWN: u64 =
        cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
    if value >> 32 != 0 || (value & cr0::PG != 0 && value & cr0::PE == 0) || value & (cr0::NW | cr0::CD) == cr0::NW {
        return Err(Exception::gp(0));
    }
    if cx.st.cr0 & cr0::PG != 0 && value & cr0::PG == 0 {
        // Leaving paging in 64-bit code is not allowed.
        return Err(Exception::gp(0));
    }
    let new = (value & KNOWN) | cr0::ET;
    let changed = new ^ cx.st.cr0;
    cx.st.cr0 = new;
    if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
        cx.flush(TlbFlush::All);
    }
    Ok(())
}

/// CR3, with CR4.PCIDE: the process-context identifier.
const CR3_PCID: u64 = 0xfff;
/// In a value written to CR3, with CR4.PCIDE: translations of the PCID stay.
const CR3_KEEP: u64 = 1 << 63;

fn set_cr3(cx: &mut Cx<'_>, value: u64) -> Result<(), Exception> {
    // Without PCID bit 63 is reserved as are the bits above the physical width; with it, it is not kept.
    let tagged = cx.st.cr4 & cr4::PCIDE != 0;
    let new = if tagged { value & !CR3_KEEP } else { value };
    if new >> PHYSICAL_BITS != 0 {
        return Err(Exception::gp(0));
    }
    let pcid = |cr3: u64| (cr3 & CR3_PCID) as u16;
    let (from, to) = (pcid(cx.st.cr3), pcid(new));
    cx.st.cr3 = new;
    cx.flush(if tagged { TlbFlush::Switch { from, to, keep: value & CR3_KEEP != 0 } } else { TlbFlush::NonGlobal });
    Ok(())
}

fn set_cr4(cx: &mut Cx<'_>, value: u64) -> Result<(), Exception> {
    if value & !cx.it.model.cr4_mask() != 0 || (cx.st.efer & efer::LMA != 0 && value & cr4::PAE == 0) {
        return Err(Exception::gp(0));
    }
    let changed = value ^ cx.st.cr4;
    // PCIDs begin with 0, in 64-bit mode (SDM volume 3, 4.10.1).
    if changed & value & cr4::PCIDE != 0 && (cx.st.efer & efer::LMA == 0 || cx.st.cr3 & CR3_PCID != 0) {
        return Err(Exception::gp(0));
    }
    cx.st.cr4 = value;
    if changed & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::PCIDE | cr4::SMEP | cr4::SMAP) != 0 {
        cx.flush(TlbFlush::All);
    }
    Ok(())
}

pub(super) fn clts(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    cx.st.cr0 &= !cr0::TS;
    Ok(())
}

/// `#GP(0)` for the UMIP instructions in user mode when CR4.UMIP is set.
pub(super) fn umip(cx: &Cx<'_>) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::UMIP != 0 && cx.user { Err(Exception::gp(0)) } else { Ok(()) }
}

pub(super) fn smsw(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    umip(cx)?;
    cx.it.mmu.checks.alignment = false;
    let size = if insn.dst == Op::Mem { 2 } else { insn.size };
    let value = cx.st.cr0;
    cx.set(insn, insn.dst, size, value)
}

pub(super) fn lmsw(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let value = cx.get(insn, insn.dst, 2)?;
    // PE, MP, EM, TS; PE cannot be cleared this way.
    cx.st.cr0 = (cx.st.cr0 & !0xe) | (value & 0xf);
    Ok(())
}

pub(super) fn mov_dr(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    const DR7_GD: u64 = 1 << 13;
    const DR6_BD: u64 = 1 << 13;
    cx.privileged()?;
    let to = insn.raw.op0_register();
    let register = if to.is_dr() { to } else { insn.raw.op1_register() };
    let mut index = number(register, Register::DR0) as usize;
    if matches!(index, 4 | 5) {
        if cx.st.cr4 & cr4::DE != 0 {
            return Err(Exception::ud());
        }
        index += 2;
    }
    if cx.st.dr[7] & DR7_GD != 0 {
        cx.st.dr[7] &= !DR7_GD;
        cx.st.dr[6] |= DR6_BD;
        return Err(Exception::plain(vector::DB));
    }
    let Some(&old) = cx.st.dr.get(index) else { return Err(Exception::ud()) };
    if !to.is_dr() {
        return cx.set(insn, insn.dst, 8, old);
    }
    let value = cx.get(insn, insn.src, 8)?;
    if index >= 6 && value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    let value = match index {
        6 => (value & 0xe00f) | 0xffff_0ff0,
        7 => (value & 0xffff_2bff) | 0x400,
        _ => value,
    };
    if let Some(slot) = cx.st.dr.get_mut(index) {
        *slot = value;
    }
    Ok(())
}

fn load_table(cx: &mut Cx<'_>, insn: &Insn) -> Result<TableRegister, Exception> {
    cx.privileged()?;
    let address = cx.address(&insn.mem);
    let mut bytes = [0; 10];
    cx.it.mmu.read_bytes(cx.st, address, &mut bytes, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
    let value = bytes.iter().rev().fold(0u128, |sum, byte| sum << 8 | u128::from(*byte));
    let table = TableRegister { base: (value >> 16) as u64, limit: value as u16 };
    if is_canonical(table.base) { Ok(table) } else { Err(Exception::gp(0)) }
}

fn store_table(cx: &mut Cx<'_>, insn: &Insn, table: TableRegister) -> Result<(), Exception> {
    umip(cx)?;
    let address = cx.address(&insn.mem);
    let value = u128::from(table.limit) | u128::from(table.base) << 16;
    let bytes = value.to_le_bytes();
    cx.it
        .mmu
        .write_bytes(cx.st, address, bytes.get(..10).unwrap_or_default(), cx.user)
        .map_err(|e| at_stack(e, insn.mem.stack))
}

pub(super) fn lgdt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.st.gdtr = load_table(cx, insn)?;
    Ok(())
}

pub(super) fn lidt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.st.idtr = load_table(cx, insn)?;
    Ok(())
}

pub(super) fn sgdt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    store_table(cx, insn, cx.st.gdtr)
}

pub(super) fn sidt(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    store_table(cx, insn, cx.st.idtr)
}
