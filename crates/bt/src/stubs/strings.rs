//! MOVS and STOS with REP over several pages, page by page.
//!
//! Translated code jumps here with the flags dead or in the block and with the fields `string_*` of the vCPU block set. The registers always stand behind the
//! last element done. What the host cannot do in one go (an element across pages, a page that is no RAM, a page fault), and what waits for the
//! vCPU, goes to the interpreter, which goes on from there.

use super::{Stubs, jcc_to, link};
use crate::asm::{Asm, Mem, R10, R11, RCX, RDI, RSI, Reg, cc};
use crate::block::off;

pub fn assemble(asm: &mut Asm, stubs: &mut Stubs) {
    for user in [false, true] {
        for movs in [false, true] {
            for log in 0..4 {
                stubs.strings[usize::from(user)][usize::from(movs)][log] = string(asm, stubs, user, movs, log as u8);
            }
        }
    }
}

fn string(asm: &mut Asm, stubs: &Stubs, user: bool, movs: bool, log: u8) -> usize {
    let done = asm.len();
    asm.jmp_mem(Mem::gs(off::STRING_DONE));
    let leave = asm.len();
    asm.jmp_mem(Mem::gs(off::STRING_STEP));

    let start = asm.len();
    asm.rr(true, &[0x85], RCX, RCX); // test
    jcc_to(asm, cc::E, done);
    asm.cmp32_mem_imm8(Mem::gs(off::KICK), 0);
    jcc_to(asm, cc::NE, leave);
    // Elements to the end of the page, of the nearer one.
    minus_left(asm, R10, RDI);
    if movs {
        minus_left(asm, R11, RSI);
        asm.rr(false, &[0x39], R11, R10); // cmp r10d, r11d
        cmov(asm, 0xc, R10, R11); // less
    }
    asm.rr(false, &[0xf7], 3, R10); // neg
    if log > 0 {
        asm.shr32(R10, log);
        jcc_to(asm, cc::E, leave);
    }
    asm.cmp(RCX, R10);
    cmov(asm, cc::B, R10, RCX);
    asm.store(Mem::gs(off::STRING_COUNT), R10);
    if movs {
        delta(asm, stubs, RSI, user, false);
        asm.store(Mem::gs(off::SCRATCH), R10);
    }
    delta(asm, stubs, RDI, user, true);
    asm.mov(R11, RCX);
    asm.load(RCX, Mem::gs(off::STRING_COUNT));
    asm.rr(true, &[0x29], RCX, R11); // sub r11, rcx
    asm.store(Mem::gs(off::STRING_COUNT), R11);
    if movs {
        asm.add_mem(RSI, Mem::gs(off::SCRATCH));
    }
    asm.rr(true, &[0x01], R10, RDI); // add rdi, r10
    let op = if movs { 0xa4 } else { 0xaa };
    match log {
        0 => asm.raw(&[0xf3, op]),
        1 => asm.raw(&[0x66, 0xf3, op + 1]),
        2 => asm.raw(&[0xf3, op + 1]),
        _ => asm.raw(&[0xf3, 0x48, op + 1]),
    }
    asm.rr(true, &[0x29], R10, RDI); // sub rdi, r10
    if movs {
        asm.rm(true, &[0x2b], RSI, Mem::gs(off::SCRATCH)); // sub rsi, mem
    }
    asm.load(RCX, Mem::gs(off::STRING_COUNT));
    let at = asm.jmp();
    link(asm, at, start);
    start
}

/// Minus the number of bytes from `pointer` to the end of its page into `to`, as 32 bits.
fn minus_left(asm: &mut Asm, to: Reg, pointer: Reg) {
    asm.mov32(to, pointer);
    asm.rr(false, &[0x81], 1, to); // or imm32
    asm.i32(!0xfff);
}

/// `cmovcc to, from`.
fn cmov(asm: &mut Asm, condition: u8, to: Reg, from: Reg) {
    asm.rr(true, &[0x0f, 0x40 | condition], to, from);
}

/// The delta of the page that `pointer` leads to, into R10. Clobbers R11.
fn delta(asm: &mut Asm, stubs: &Stubs, pointer: Reg, user: bool, write: bool) {
    let table = off::tlb(user, write);
    asm.mov(R11, pointer);
    asm.tlb_offset();
    asm.xor_mem(R11, Mem::gs_base(R10, table));
    asm.cmp_imm(R11, 4095);
    let miss = asm.jcc(cc::A);
    asm.load(R10, Mem::gs_base(R10, table + 8));
    let found = asm.jmp();
    asm.patch32(miss);
    asm.mov(R11, pointer);
    asm.load32(R10, Mem::gs(if write { off::STRING_WRITE } else { off::STRING_READ }));
    let at = asm.call();
    link(asm, at, stubs.slow_access);
    asm.patch32(found);
}
