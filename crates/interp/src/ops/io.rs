//! Port I/O, with the permission check by IOPL and the TSS bitmap (SDM volume 1, 19.5).

use cpu::gpr::{RAX, RDI, RDX, RSI};
use cpu::paging::Kind;
use cpu::{Exception, rflags};

use super::string::{Shape, partial};
use super::{Cx, mask};
use crate::decode::{Insn, Op};

fn permitted(cx: &mut Cx<'_>, port: u16, size: u8) -> Result<(), Exception> {
    let iopl = (cx.st.rflags & rflags::IOPL) >> 12;
    if u64::from(cx.st.cpl()) <= iopl {
        return Ok(());
    }
    let limit = u64::from(cx.st.tr.limit);
    let base = cx.st.tr.base;
    let error = Err(Exception::gp(0));
    if limit < 0x67 {
        return error;
    }
    let mut word = [0; 2];
    cx.it.mmu.read_system(cx.st, base.wrapping_add(0x66), &mut word)?;
    let at = u64::from(u16::from_le_bytes(word)) + u64::from(port / 8);
    if at + 1 > limit {
        return error;
    }
    cx.it.mmu.read_system(cx.st, base.wrapping_add(at), &mut word)?;
    let bits = u16::from_le_bytes(word) >> (port % 8);
    if u64::from(bits) & ((1 << size) - 1) != 0 { error } else { Ok(()) }
}

fn port(cx: &Cx<'_>, insn: &Insn, op: Op) -> u16 {
    if op == Op::Imm { insn.imm as u8 as u16 } else { cx.st.gpr[RDX] as u16 }
}

fn read_port(cx: &mut Cx<'_>, port: u16, size: u8) -> u64 {
    cx.it.mmu.checks.port(port, size);
    let mut data = [0; 8];
    if let Some(part) = data.get_mut(..usize::from(size)) {
        cx.it.setup.bus.pio_read(port, part);
    }
    u64::from_le_bytes(data)
}

fn write_port(cx: &mut Cx<'_>, port: u16, size: u8, value: u64) {
    cx.it.mmu.checks.port(port, size);
    if let Some(part) = value.to_le_bytes().get(..usize::from(size)) {
        cx.it.setup.bus.pio_write(port, part);
    }
}

pub(super) fn in_(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let port = port(cx, insn, insn.src);
    permitted(cx, port, insn.size)?;
    let value = read_port(cx, port, insn.size);
    cx.set_reg(RAX as u8, insn.size, value);
    Ok(())
}

pub(super) fn out(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let port = port(cx, insn, insn.dst);
    // The second operand is AL, AX or EAX.
    let size = insn.size2;
    permitted(cx, port, size)?;
    let value = cx.st.gpr[RAX] & mask(size);
    write_port(cx, port, size, value);
    Ok(())
}

pub(super) fn ins(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    let port = cx.st.gpr[RDX] as u16;
    permitted(cx, port, shape.size)?;
    let Some(count) = shape.count(cx) else { return Ok(()) };
    let mut done = 0;
    let mut result = Ok(());
    while done < shape.chunk(count) {
        // Reading a port has effects: the target is checked first.
        let (target, size) = (shape.target(cx), usize::from(shape.size));
        result = cx.it.mmu.check(cx.st, target, size, Kind::Write, cx.user);
        if result.is_err() {
            break;
        }
        let value = read_port(cx, port, shape.size);
        result = cx.it.mmu.write(cx.st, target, size, value, cx.user);
        if result.is_err() {
            break;
        }
        shape.advance(cx, RDI, 1);
        done += 1;
    }
    partial(cx, &shape, done, result)
}

pub(super) fn outs(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let shape = Shape::new(cx, insn);
    let port = cx.st.gpr[RDX] as u16;
    permitted(cx, port, shape.size)?;
    let Some(count) = shape.count(cx) else { return Ok(()) };
    let mut done = 0;
    let mut result = Ok(());
    while done < shape.chunk(count) {
        match cx.it.mmu.read(cx.st, shape.source(cx), usize::from(shape.size), cx.user) {
            Ok(value) => write_port(cx, port, shape.size, value),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
        shape.advance(cx, RSI, 1);
        done += 1;
    }
    partial(cx, &shape, done, result)
}
