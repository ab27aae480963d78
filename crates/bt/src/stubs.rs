//! The fixed pieces of host code: entry, exits, the slow path of memory checks, indirect jumps.
//!
//! Register convention of translated code: guest RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8, R12 to R15 are in the host registers of the
//! same name; guest RSP is in R9; guest R9, R10, R11 are in the vCPU block; R10 and R11 are temporaries that hold nothing at
//! instruction boundaries; RSP is a stack used only for host CALL/RET pairs that mirror the guest's. The arithmetic flags and DF
//! are the guest's.
//!
//! At direct jumps the arithmetic flags are in the host's RFLAGS. At calls, returns and indirect jumps they are in the
//! block (`flags`), and the target loads them if it reads them.

use crate::asm::{Asm, Mem, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, cc};
use crate::block::{IBTC_ENTRIES, off, reason};

/// `(host register, guest register)` of all guest registers that live in host registers.
pub const MAPPED: [(u8, usize); 13] = [
    (RAX, 0),
    (RCX, 1),
    (RDX, 2),
    (RBX, 3),
    (R9, 4),
    (RBP, 5),
    (RSI, 6),
    (RDI, 7),
    (R8, 8),
    (R12, 12),
    (R13, 13),
    (R14, 14),
    (R15, 15),
];

/// Positions of the stubs in the code cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "C" fn(entry: u64)`.
    pub enter: usize,
    /// Exits by reason (index = reason); argument in R10D.
    pub exits: [usize; 9],
    /// Slow path of a memory check: R11 = address, R10D = descriptor; returns R10 = delta.
    pub slow_access: usize,
    /// Indirect jump to R11, flags in the block: kernel, user.
    pub indirect: [usize; 2],
    /// An indirect jump to R11 that missed the target cache.
    pub indirect_miss: usize,
    /// What lies at the bottom of the guest-call stack.
    pub underflow: usize,
    /// Where the signal handler sends a fault.
    pub fault: usize,
    /// Code bytes in all.
    pub end: usize,
}

/// Inline look-up of the indirect target in R11; falls through on a miss. Clobbers R10 and flags.
pub fn lookup_indirect(asm: &mut Asm, user: bool) {
    asm.mov32(R10, R11);
    asm.shr32(R10, 12);
    asm.xor32(R10, R11);
    asm.and32_imm(R10, IBTC_ENTRIES as i32 - 1);
    asm.shl32(R10, 4);
    asm.cmp_mem(R11, Mem::gs_base(R10, off::ibtc(user)));
    let miss = asm.len() + 2;
    asm.raw(&[0x75, 0]); // jne rel8
    asm.jmp_mem(Mem::gs_base(R10, off::ibtc(user) + 8));
    let end = asm.len();
    asm.bytes[miss - 1] = (end - miss) as u8;
}

/// Assembles the stubs for position 0 of the code cache. `slow_access` is the address of the monitor's slow path,
/// `extern "C" fn(runtime, address, descriptor) -> (delta, exit)`.
pub fn assemble(slow_access: u64) -> (Vec<u8>, Stubs) {
    let mut asm = Asm::default();
    let mut stubs = Stubs { enter: asm.len(), ..Stubs::default() };

    // Enter.
    for reg in [RBP, RBX, R12, R13, R14, R15] {
        asm.push(reg);
    }
    asm.lea(RSP, Mem::base(RSP, -8));
    asm.store(Mem::gs(off::HOST_RSP), RSP);
    asm.store(Mem::gs(off::ENTRY), RDI);
    mxcsr(&mut asm, 3, off::HOST_MXCSR);
    for i in 0..16 {
        asm.vmovdqu_xmm(i, Mem::gs(off::xmm(i as usize)), false);
        asm.vinsert_high(i, Mem::gs(off::ymm_high(i as usize)));
    }
    mxcsr(&mut asm, 2, off::MXCSR);
    asm.load(RSP, Mem::gs(off::CALL_RSP));
    asm.rm(false, &[0xff], 6, Mem::gs(off::HOST_FLAGS)); // push
    asm.popfq();
    for (host, guest) in MAPPED {
        asm.load(host, Mem::gs(off::gpr(guest)));
    }
    asm.jmp_mem(Mem::gs(off::ENTRY));

    // The common exit.
    let exit = asm.len();
    asm.store32(Mem::gs(off::EXIT_ARG), R10);
    save_registers(&mut asm);
    let exit_after_registers = asm.len();
    for i in 0..16 {
        asm.vmovdqu_xmm(i, Mem::gs(off::xmm(i as usize)), true);
        asm.vextract_high(Mem::gs(off::ymm_high(i as usize)), i);
    }
    mxcsr(&mut asm, 3, off::MXCSR);
    mxcsr(&mut asm, 2, off::HOST_MXCSR);
    asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
    asm.store(Mem::gs(off::CALL_RSP), RSP);
    asm.load(RSP, Mem::gs(off::HOST_RSP));
    asm.lea(RSP, Mem::base(RSP, 8));
    for reg in [R15, R14, R13, R12, RBX, RBP] {
        asm.pop(reg);
    }
    asm.ret();

    for why in reason::LINK..=reason::STALE {
        stubs.exits[why as usize] = asm.len();
        asm.store32_imm(Mem::gs(off::EXIT_REASON), why);
        let at = asm.jmp();
        link(&mut asm, at, exit);
    }
    stubs.fault = stubs.exits[reason::FAULT as usize];

    // Indirect jumps.
    stubs.indirect_miss = asm.len();
    asm.store(Mem::gs(off::EXIT_TARGET), R11);
    let at = asm.jmp();
    link(&mut asm, at, stubs.exits[reason::INDIRECT as usize]);
    for user in [false, true] {
        stubs.indirect[usize::from(user)] = asm.len();
        lookup_indirect(&mut asm, user);
        let at = asm.jmp();
        link(&mut asm, at, stubs.indirect_miss);
    }

    // The bottom of the guest-call stack: RET has taken the entry, put it back and look the target up.
    stubs.underflow = asm.len();
    asm.lea(RSP, Mem::base(RSP, -8));
    asm.rm(false, &[0x80], 7, Mem::gs(off::USER)); // cmp byte
    asm.u8(0);
    let at = asm.jcc(cc::NE);
    link(&mut asm, at, stubs.indirect[1]);
    let at = asm.jmp();
    link(&mut asm, at, stubs.indirect[0]);

    // The slow path of memory checks.
    stubs.slow_access = asm.len();
    save_registers(&mut asm);
    for i in 0..16 {
        asm.vmovdqu(i, Mem::gs(off::ymm(i as usize)), true);
    }
    asm.raw(&[0xc5, 0xf8, 0x77]); // vzeroupper
    asm.store(Mem::gs(off::EXIT_TARGET), R11);
    asm.load(RDI, Mem::gs(off::RUNTIME));
    asm.mov(RSI, R11);
    asm.mov32(RDX, RBX); // the descriptor, see save_registers
    asm.store(Mem::gs(off::CALL_RSP), RSP);
    asm.load(RSP, Mem::gs(off::HOST_RSP));
    asm.mov_imm(RAX, slow_access);
    asm.raw(&[0xff, 0xd0]); // call rax
    asm.load(RSP, Mem::gs(off::CALL_RSP));
    for i in 0..16 {
        asm.vmovdqu(i, Mem::gs(off::ymm(i as usize)), false);
    }
    asm.raw(&[0x85, 0xd2]); // test edx, edx
    let leave = asm.jcc(cc::NE);
    asm.mov(R10, RAX);
    asm.rm(false, &[0xf7], 0, Mem::gs(off::HOST_FLAGS)); // test dword
    asm.i32(0x400);
    asm.raw(&[0x74, 1, 0xfd]); // je +1; std
    for (host, guest) in MAPPED {
        asm.load(host, Mem::gs(off::gpr(guest)));
    }
    asm.load(R11, Mem::gs(off::EXIT_TARGET));
    asm.ret();
    asm.patch32(leave);
    asm.lea(RSP, Mem::base(RSP, 8));
    asm.store32_imm(Mem::gs(off::EXIT_REASON), reason::ACCESS);
    let at = asm.jmp();
    link(&mut asm, at, exit_after_registers);
    stubs.end = asm.len();
    (asm.bytes, stubs)
}

/// Saves the guest's general registers, DF and arithmetic flags to the block; leaves the host's DF clear, R10's old
/// value in RBX, and clobbers R10.
fn save_registers(asm: &mut Asm) {
    for (host, guest) in MAPPED {
        asm.store(Mem::gs(off::gpr(guest)), host);
    }
    asm.mov32(RBX, R10);
    asm.pushfq();
    asm.pop(R10);
    asm.store(Mem::gs(off::HOST_FLAGS), R10);
    asm.u8(0xfc); // cld
}

/// `ldmxcsr` (digit 2) or `stmxcsr` (digit 3) of `gs:[offset]`.
fn mxcsr(asm: &mut Asm, digit: u8, offset: i32) {
    asm.rm(false, &[0x0f, 0xae], digit, Mem::gs(offset));
}

fn link(asm: &mut Asm, at: usize, target: usize) {
    let displacement = (target as i64 - at as i64 - 4) as i32;
    asm.bytes[at..at + 4].copy_from_slice(&displacement.to_le_bytes());
}
