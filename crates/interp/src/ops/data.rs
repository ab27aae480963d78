//! Moves and exchanges.

use cpu::gpr::{RAX, RBX, RCX, RDX};
use cpu::{Exception, rflags};
use iced_x86::Code;

use super::{Cx, alu, at_stack, mask, sign_extend};
use crate::decode::{Insn, Op};
use crate::host_flags::is_amd;
use crate::host_memory;
use crate::mmu::Target;
use cpu::paging::Kind;

pub(super) fn nop(_cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    Ok(())
}

pub(super) fn fence(_cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

/// Caches are coherent: only the check of the address remains.
pub(super) fn clflush(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.load(&insn.mem, 1).map(|_| ())
}

pub(super) fn mov(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = cx.get(insn, insn.src, insn.size)?;
    cx.set(insn, insn.dst, insn.size, value)
}

pub(super) fn movzx(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = cx.get(insn, insn.src, insn.size2)?;
    cx.set(insn, insn.dst, insn.size, value)
}

pub(super) fn movsx(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size2.min(insn.size);
    // MOVSXD of two bytes, which no compiler makes, reads four in memory on AMD's CPUs.
    let wide = insn.src == Op::Mem && insn.raw.code() == Code::Movsxd_r16_rm16 && is_amd();
    let value = cx.get(insn, insn.src, if wide { 4 } else { size })?;
    cx.set(insn, insn.dst, insn.size, sign_extend(value, size) & mask(insn.size))
}

pub(super) fn lea(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = cx.offset(&insn.mem);
    cx.set(insn, insn.dst, insn.size, value & mask(insn.size))
}

pub(super) fn setcc(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = u64::from(cx.condition(insn.raw.condition_code()));
    cx.set(insn, insn.dst, 1, value)
}

/// The source is read, and may fault, also when the condition is false; a 32-bit destination is zero-extended either way.
pub(super) fn cmov(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = cx.get(insn, insn.src, insn.size)?;
    let value = if cx.condition(insn.raw.condition_code()) { value } else { cx.get(insn, insn.dst, insn.size)? };
    cx.set(insn, insn.dst, insn.size, value)
}

/// Always atomic with memory. Either operand may be the memory one in the decoder's order.
pub(super) fn xchg(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let other = cx.get(insn, insn.src, insn.size)?;
    let old = cx.modify(insn, true, |_| other)?;
    cx.set(insn, insn.src, insn.size, old)
}

pub(super) fn xadd(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let addend = cx.get(insn, insn.src, size)?;
    if insn.dst == Op::Mem {
        let old = cx.modify(insn, insn.lock, |old| old.wrapping_add(addend))?;
        alu::flags_add(cx.st, old, addend, 0, size);
        return cx.set(insn, insn.src, size, old);
    }
    // Both registers: the sum goes to the first operand, last.
    let old = cx.get(insn, insn.dst, size)?;
    let sum = alu::flags_add(cx.st, old, addend, 0, size);
    cx.set(insn, insn.src, size, old)?;
    cx.set(insn, insn.dst, size, sum)
}

pub(super) fn cmpxchg(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let size = insn.size;
    let expected = cx.st.gpr[RAX] & mask(size);
    let new = cx.get(insn, insn.src, size)?;
    if insn.dst == Op::Mem {
        let old = cx.modify(insn, insn.lock, |old| if old == expected { new } else { old })?;
        alu::flags_sub(cx.st, expected, old, 0, size);
        if old != expected {
            cx.set_reg(RAX as u8, size, old);
        }
        return Ok(());
    }
    let old = cx.get(insn, insn.dst, size)?;
    alu::flags_sub(cx.st, expected, old, 0, size);
    if old == expected {
        cx.set(insn, insn.dst, size, new)
    } else {
        // The destination register is left alone, its upper half too, as CPUs do.
        cx.set_reg(RAX as u8, size, old);
        Ok(())
    }
}

pub(super) fn cmpxchg8b(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let low = |value: u64| value & 0xffff_ffff;
    let expected = low(cx.st.gpr[RDX]) << 32 | low(cx.st.gpr[RAX]);
    let new = low(cx.st.gpr[RCX]) << 32 | low(cx.st.gpr[RBX]);
    let address = cx.address(&insn.mem);
    let old = cx
        .it
        .mmu
        .modify(cx.st, address, 8, cx.user, insn.lock, |old| if old == expected { new } else { old })
        .map_err(|e| at_stack(e, insn.mem.stack))?;
    if old == expected {
        cx.st.rflags |= rflags::ZF;
    } else {
        cx.st.rflags &= !rflags::ZF;
        cx.set_reg(RAX as u8, 4, low(old));
        cx.set_reg(RDX as u8, 4, old >> 32);
    }
    Ok(())
}

pub(super) fn cmpxchg16b(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let pair = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let expected = pair(cx.st.gpr[RDX], cx.st.gpr[RAX]);
    let new = pair(cx.st.gpr[RCX], cx.st.gpr[RBX]);
    let address = cx.address(&insn.mem);
    if !address.is_multiple_of(16) {
        return Err(Exception::gp(0));
    }
    if cx.it.mmu.checks.armed {
        cx.it.mmu.checks.access(address, 16, true);
    }
    let target = cx.it.mmu.translate(cx.st, address, Kind::Write, cx.user).map_err(|e| at_stack(e, insn.mem.stack))?;
    let old = match target {
        Target::Ram(host, gpa) => {
            // SAFETY: 16 aligned bytes of a mapped page of RAM.
            let old = unsafe { host_memory::compare_exchange_16(host, expected, new) };
            cx.it.mmu.ram.code_pages().written(gpa, 16);
            old
        }
        Target::Mmio(gpa) => {
            let mut bytes = [0; 16];
            cx.it.mmu.mmio_read(gpa, &mut bytes);
            let old = u128::from_le_bytes(bytes);
            cx.it.mmu.mmio_write(gpa, &(if old == expected { new } else { old }).to_le_bytes());
            old
        }
    };
    if old == expected {
        cx.st.rflags |= rflags::ZF;
    } else {
        cx.st.rflags &= !rflags::ZF;
        cx.st.gpr[RAX] = old as u64;
        cx.st.gpr[RDX] = (old >> 64) as u64;
    }
    Ok(())
}

pub(super) fn bswap(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let value = cx.get(insn, insn.dst, insn.size)?;
    let value = match insn.size {
        8 => value.swap_bytes(),
        4 => u64::from((value as u32).swap_bytes()),
        // Undefined by the manual; CPUs give zero.
        _ => 0,
    };
    cx.set(insn, insn.dst, insn.size, value)
}

pub(super) fn xlat(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let mut address = cx.st.gpr[RBX].wrapping_add(cx.st.gpr[RAX] & 0xff);
    if insn.raw.memory_base().size() == 4 {
        address &= 0xffff_ffff;
    }
    let address = address.wrapping_add(if insn.mem.segment == 0 { 0 } else { cx.segment_base(insn.mem.segment) });
    let value = cx.it.mmu.read(cx.st, address, 1, cx.user)?;
    cx.set_reg(RAX as u8, 1, value);
    Ok(())
}

const AH_FLAGS: u64 = rflags::SF | rflags::ZF | rflags::AF | rflags::PF | rflags::CF;

pub(super) fn lahf(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    let flags = (cx.st.rflags & AH_FLAGS) | rflags::FIXED;
    cx.st.gpr[RAX] = (cx.st.gpr[RAX] & !0xff00) | flags << 8;
    Ok(())
}

pub(super) fn sahf(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.st.rflags = (cx.st.rflags & !AH_FLAGS) | (cx.st.gpr[RAX] >> 8 & AH_FLAGS);
    Ok(())
}

pub(super) fn cbw(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.set_reg(RAX as u8, 2, sign_extend(cx.st.gpr[RAX], 1));
    Ok(())
}

pub(super) fn cwde(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.set_reg(RAX as u8, 4, sign_extend(cx.st.gpr[RAX], 2));
    Ok(())
}

pub(super) fn cdqe(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.set_reg(RAX as u8, 8, sign_extend(cx.st.gpr[RAX], 4));
    Ok(())
}

fn sign_to_rdx(cx: &mut Cx<'_>, size: u8) -> Result<(), Exception> {
    let negative = sign_extend(cx.st.gpr[RAX], size) >> 63 != 0;
    cx.set_reg(RDX as u8, size, if negative { u64::MAX } else { 0 });
    Ok(())
}

pub(super) fn cwd(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    sign_to_rdx(cx, 2)
}

pub(super) fn cdq(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    sign_to_rdx(cx, 4)
}

pub(super) fn cqo(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    sign_to_rdx(cx, 8)
}
