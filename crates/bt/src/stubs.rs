//! The fixed pieces of host code: entry, exits, the slow path of memory checks, indirect jumps.
//!
//! Register convention of translated code: guest RAX, RCX, RDX, RBX, RBP, RSI, RDI, R8, R12 to R15 are in the host registers of the
//! same name; guest RSP is in R9; guest R9, R10, R11 are in the vCPU block; R10 and R11 are temporaries that hold nothing at
//! instruction boundaries; RSP is a stack used only for host CALL/RET pairs that mirror the guest's. The arithmetic flags and DF
//! are the guest's.
//!
//! At direct jumps the arithmetic flags are in the host's RFLAGS. At calls, returns and indirect jumps they are in the
//! block (`flags`), and the target loads them if it reads them.

mod strings;

use crate::asm::{Asm, Mem, R8, R9, R10, R11, R12, R13, R14, R15, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, cc};
use crate::block::{BOUNCE, IBTC_ENTRIES, MAX_SITES, off, reason};

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

/// A check site whose prediction has failed, as the stub [`Stubs::failed`] wants it in R10D.
#[derive(Clone, Copy, Debug)]
pub struct Failed {
    /// Number of the site: index of its software TLB times [`MAX_SITES`], plus the number there.
    pub site: u32,
    pub size: u16,
    /// The site stands for a group: a range across a page is told by CF.
    pub group: bool,
}

impl Failed {
    const SITES: i32 = 4 * MAX_SITES as i32 - 1;
    const SIZE: u8 = 15;
    const GROUP: i32 = 1 << 30;

    pub fn pack(self) -> i32 {
        (self.site as i32 & Self::SITES) | i32::from(self.size) << Self::SIZE | if self.group { Self::GROUP } else { 0 }
    }
}

const _: () = assert!(Failed::SITES < 1 << Failed::SIZE);

/// Positions of the stubs in the code cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stubs {
    /// `extern "C" fn(entry: u64)`.
    pub enter: usize,
    /// Exits by reason (index = reason); argument in R10D.
    pub exits: [usize; 10],
    /// Slow path of a memory check: R11 = address, R10D = descriptor; returns R10 = delta.
    pub slow_access: usize,
    /// A wrong prediction: R11 = address, R10D = [`Failed`], the access's number in the NOP behind the call; returns R10 = delta, R11 = address.
    pub failed: usize,
    /// R11 = address; returns R10 = host address of its entry in the software TLB. For each table.
    pub search: [usize; 4],
    /// See [`Stubs::check`]: by table, size, and [`Check`].
    checks: [[[usize; 4]; CHECKED.len()]; 4],
    /// See [`Stubs::check_group`]: by table, span in units of [`SPAN`], and whether flags are saved.
    group_checks: [[[usize; 2]; SPANS]; 4],
    /// Indirect jump to R11, flags in the block: kernel, user. R10D = number of an exit at the jump, needed if R11 is not canonical.
    pub indirect: [usize; 2],
    /// An indirect jump to R11 that missed the target cache's first place: kernel, user. R10D and flags as for [`Self::indirect`].
    pub indirect_miss: [usize; 2],
    /// SYSCALL: R10 = next RIP, `scratch` = exit number; flags in the host.
    pub syscall: usize,
    /// SYSRETQ: `scratch` = exit number; flags in the block.
    pub sysret: usize,
    /// IRETQ: R11 = host address of the frame, `scratch` = exit number; flags in the block.
    pub iret: usize,
    /// A repeated MOVS or STOS over several pages, see [`strings`]: by privilege, MOVS, and the size's logarithm.
    pub strings: [[[usize; 4]; 2]; 2],
    /// What lies at the bottom of the guest-call stack.
    pub underflow: usize,
    /// Where the signal handler sends a fault.
    pub fault: usize,
    /// Code bytes in all.
    pub end: usize,
}

/// Sizes of accesses that have a stub to check them, in bytes.
const CHECKED: [u16; 8] = [1, 2, 4, 8, 10, 16, 32, 64];
/// Groups are checked for a multiple of so many bytes.
const SPAN: u16 = 16;
/// Longest group that has a stub, in units of [`SPAN`].
const SPANS: usize = 24;

impl Stubs {
    /// The stub that checks an access of `size` bytes by the software TLB of number `table`: R11 = address; returns R10 = delta. Clobbers flags. Its
    /// slow path finds the access by the place that it was called from.
    pub fn check(&self, table: usize, size: u16, check: Check) -> Option<usize> {
        let at = CHECKED.iter().position(|&known| known == size)?;
        Some(self.checks[table][at][usize::from(check.save) * 2 + usize::from(check.keep)])
    }

    /// The same for the range of a group, without R11. Sets CF if it crosses the page; else clears it.
    pub fn check_group(&self, table: usize, span: u16, save: bool) -> Option<usize> {
        let at = usize::from(span.div_ceil(SPAN)).checked_sub(1)?;
        Some(self.group_checks[table].get(at)?[usize::from(save)])
    }
}

/// What a check stub does besides.
#[derive(Clone, Copy, Debug, Default)]
pub struct Check {
    /// It saves the flags to the block first.
    pub save: bool,
    /// It leaves the address in R11.
    pub keep: bool,
}

/// Inline look-up of the indirect target in R11; falls through on a miss. Clobbers R10 and flags.
pub fn lookup_indirect(asm: &mut Asm, user: bool) {
    lookup_indirect_at(asm, user, false);
}

/// The same in the first place, or in its neighbour.
fn lookup_indirect_at(asm: &mut Asm, user: bool, neighbour: bool) {
    asm.mov32(R10, R11);
    asm.shr32(R10, 12);
    asm.xor32(R10, R11);
    asm.and32_imm(R10, IBTC_ENTRIES as i32 - 1);
    if neighbour {
        asm.rr(false, &[0x83], 6, R10); // xor r10d, 1
        asm.u8(1);
    }
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
    load_vectors(&mut asm);
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
    asm.vzeroupper();
    asm.store(Mem::gs(off::CALL_RSP), RSP);
    asm.load(RSP, Mem::gs(off::HOST_RSP));
    asm.lea(RSP, Mem::base(RSP, 8));
    for reg in [R15, R14, R13, R12, RBX, RBP] {
        asm.pop(reg);
    }
    asm.ret();

    for why in reason::LINK..=reason::PAUSE {
        stubs.exits[why as usize] = asm.len();
        asm.store32_imm(Mem::gs(off::EXIT_REASON), why);
        let at = asm.jmp();
        link(&mut asm, at, exit);
    }
    stubs.fault = stubs.exits[reason::FAULT as usize];

    // Indirect jumps.
    for user in [false, true] {
        stubs.indirect[usize::from(user)] = asm.len();
        asm.store32(Mem::gs(off::EXIT_ARG), R10);
        lookup_indirect(&mut asm, user);
        asm.load32(R10, Mem::gs(off::EXIT_ARG));
        // The neighbour has what the first place had to give up.
        stubs.indirect_miss[usize::from(user)] = asm.len();
        asm.store32(Mem::gs(off::EXIT_ARG), R10);
        lookup_indirect_at(&mut asm, user, true);
        asm.load32(R10, Mem::gs(off::EXIT_ARG));
        asm.store(Mem::gs(off::EXIT_TARGET), R11);
        let at = asm.jmp();
        link(&mut asm, at, stubs.exits[reason::INDIRECT as usize]);
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

    search(&mut asm, &mut stubs);
    let to_monitor = failed(&mut asm, &mut stubs);

    // The slow path of memory checks.
    asm.patch32(to_monitor);
    stubs.slow_access = asm.len();
    save_registers(&mut asm);
    for i in 0..16 {
        asm.vmovdqu(i, Mem::gs(off::ymm(i as usize)), true);
    }
    for i in 1..16 {
        asm.vpor(0, i);
    }
    asm.vhigh(0);
    asm.vptest_xmm(0);
    asm.rm(false, &[0x0f, 0x95], 0, Mem::gs(off::UPPERS)); // setne
    asm.vzeroupper();
    asm.store(Mem::gs(off::EXIT_TARGET), R11);
    asm.load(RDI, Mem::gs(off::RUNTIME));
    asm.mov(RSI, R11);
    asm.mov32(RDX, RBX); // the descriptor, see save_registers
    asm.store(Mem::gs(off::CALL_RSP), RSP);
    asm.load(RSP, Mem::gs(off::HOST_RSP));
    asm.mov_imm(RAX, slow_access);
    asm.raw(&[0xff, 0xd0]); // call rax
    asm.load(RSP, Mem::gs(off::CALL_RSP));
    asm.vzeroupper();
    asm.rm(false, &[0x80], 7, Mem::gs(off::UPPERS)); // cmp byte
    asm.u8(0);
    let used = asm.jcc(cc::NE);
    for i in 0..16 {
        asm.vmovdqu_xmm(i, Mem::gs(off::ymm(i as usize)), false);
    }
    let restored = asm.jmp();
    asm.patch32(used);
    for i in 0..16 {
        asm.vmovdqu(i, Mem::gs(off::ymm(i as usize)), false);
    }
    asm.patch32(restored);
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
    transitions(&mut asm, &mut stubs);
    checks(&mut asm, &mut stubs);
    strings::assemble(&mut asm, &mut stubs);
    stubs.end = asm.len();
    (asm.bytes, stubs)
}

/// See [`Stubs::check`] and [`Stubs::check_group`].
fn checks(asm: &mut Asm, stubs: &mut Stubs) {
    for table in 0..4 {
        for (i, size) in CHECKED.into_iter().enumerate() {
            for (j, place) in stubs.checks[table][i].iter_mut().enumerate() {
                *place = check(asm, stubs.slow_access, table, size, Check { save: j >= 2, keep: j % 2 != 0 }, false);
            }
        }
        for (i, places) in stubs.group_checks[table].iter_mut().enumerate() {
            for (j, place) in places.iter_mut().enumerate() {
                let span = SPAN * (i as u16 + 1);
                *place = check(asm, stubs.slow_access, table, span, Check { save: j != 0, keep: false }, true);
            }
        }
    }
}

/// One of [`checks`]; returns its position.
fn check(asm: &mut Asm, slow_access: usize, table: usize, size: u16, check: Check, group: bool) -> usize {
    let table = off::tlb(table >= 2, table & 1 != 0);
    // A stub lies in as few cache lines as possible.
    while !asm.len().is_multiple_of(32) {
        asm.u8(0xcc);
    }
    let start = asm.len();
    if check.save {
        asm.save_flags(off::FLAGS, R10);
    }
    let last = 4096 - i32::from(size);
    asm.tlb_offset();
    asm.xor_mem(R11, Mem::gs_base(R10, table));
    asm.cmp_imm(R11, last);
    let miss = asm.jcc(cc::A);
    if check.keep {
        asm.xor_mem(R11, Mem::gs_base(R10, table));
    }
    asm.load(R10, Mem::gs_base(R10, table + 8));
    if group {
        asm.u8(0xf8); // clc
    }
    asm.ret();
    asm.patch32(miss);
    asm.xor_mem(R11, Mem::gs_base(R10, table));
    if group {
        asm.mov32(R10, R11);
        asm.and32_imm(R10, 0xfff);
        asm.cmp_imm(R10, last);
        asm.raw(&[0x76, 2, 0xf9, 0xc3]); // jbe +2; stc; ret
    }
    asm.raw(&[0x44, 0x8b, 0x14, 0x24]); // mov r10d, [rsp]: where it was called
    asm.store32_imm(Mem::gs(off::BY_CALL), 1);
    let at = asm.jmp();
    link(asm, at, slow_access);
    start
}

/// Looks the entry up by the address. Clobbers flags.
fn search(asm: &mut Asm, stubs: &mut Stubs) {
    for (table, place) in stubs.search.iter_mut().enumerate() {
        *place = asm.len();
        asm.tlb_offset();
        asm.add_mem(R10, Mem::gs(off::table(table)));
        asm.ret();
    }
}

/// A wrong prediction. Falls through nowhere; returns the jump to the slow path.
fn failed(asm: &mut Asm, stubs: &mut Stubs) -> usize {
    stubs.failed = asm.len();
    asm.store(Mem::gs(off::lent(0)), RAX);
    asm.store(Mem::gs(off::lent(1)), RCX);
    asm.mov32(RCX, R10);
    asm.and32_imm(RCX, Failed::SITES);
    asm.mov32(RAX, RCX);
    asm.shr32(RAX, MAX_SITES.trailing_zeros() as u8);
    let tables = Mem { base: None, index: Some((RAX, 8)), disp: off::table(0), gs: true, addr32: false };
    asm.load(RAX, tables);
    asm.store(Mem::gs(off::SCRATCH_TABLE), RAX);
    asm.raw(&[0xc4, 0xc3, 0x7b, 0xf0, 0xc3, 8]); // rorx eax, r11d, 8
    asm.and32_imm(RAX, 0xfff0);
    asm.add_mem(RAX, Mem::gs(off::SCRATCH_TABLE));
    asm.shl32(RCX, size_of::<crate::block::Site>().trailing_zeros() as u8);
    let site = |field| Mem::gs_base(RCX, off::site(0) + field);
    asm.cmp_mem(RAX, site(0));
    let same = asm.jcc(cc::E);
    asm.store(site(0), RAX);
    asm.rm(false, &[0xff], 0, site(8)); // inc: too often?
    let often = asm.jcc(cc::E);
    asm.mov(RCX, RAX);
    asm.load(RAX, Mem::base(RCX, 0));
    asm.rr(true, &[0x31], R11, RAX); // xor
    asm.shr32(R10, Failed::SIZE);
    asm.and32_imm(R10, 0x1fff);
    asm.rr(true, &[0xf7], 3, R10); // neg
    asm.lea(R10, Mem::base(R10, 4096));
    asm.cmp(RAX, R10);
    let unknown = asm.jcc(cc::A);
    asm.load(R10, Mem::base(RCX, 8));
    asm.load(RAX, Mem::gs(off::lent(0)));
    asm.load(RCX, Mem::gs(off::lent(1)));
    asm.u8(0xf8); // clc
    asm.ret();

    for at in [same, often, unknown] {
        asm.patch32(at);
    }
    // Does a group cross the page?
    asm.raw(&[0x48, 0x8b, 0x04, 0x24]); // mov rax, [rsp]: behind the call
    asm.load32(RCX, Mem::base(RAX, -9)); // Failed
    asm.load32(R10, Mem::base(RAX, 3)); // the access's number
    asm.rr(false, &[0xf7], 0, RCX); // test
    asm.i32(Failed::GROUP);
    let single = asm.jcc(cc::E);
    asm.shr32(RCX, Failed::SIZE);
    asm.and32_imm(RCX, 0x1fff);
    asm.mov32(RAX, R11);
    asm.and32_imm(RAX, 0xfff);
    asm.lea(RCX, Mem::sum(RCX, RAX, 0));
    asm.cmp_imm(RCX, 4096);
    let inside = asm.jcc(cc::BE);
    asm.load(RAX, Mem::gs(off::lent(0)));
    asm.load(RCX, Mem::gs(off::lent(1)));
    asm.u8(0xf9); // stc
    asm.ret();
    asm.patch32(single);
    for at in across(asm) {
        asm.patch32(at);
    }
    asm.raw(&[0x48, 0x8b, 0x04, 0x24]); // mov rax, [rsp]
    asm.load32(R10, Mem::base(RAX, 3));
    asm.patch32(inside);
    asm.load(RAX, Mem::gs(off::lent(0)));
    asm.load(RCX, Mem::gs(off::lent(1)));
    asm.jmp()
}

/// Reads across two pages that the software TLB has: both ends are copied side by side, and the instruction reads the copy. RCX holds
/// [`Failed`]. Returns jumps for all other cases; R11 is the address then, R10 is lost.
fn across(asm: &mut Asm) -> Vec<usize> {
    let mut others = Vec::new();
    asm.rr(false, &[0xf7], 0, RCX); // test: a table of writes?
    asm.i32(MAX_SITES as i32);
    others.push(asm.jcc(cc::NE));
    asm.mov32(RAX, RCX);
    asm.shr32(RAX, Failed::SIZE);
    asm.and32_imm(RAX, 0x1fff);
    asm.cmp_imm(RAX, BOUNCE as i32);
    others.push(asm.jcc(cc::A));
    asm.mov32(R10, R11);
    asm.and32_imm(R10, 0xfff);
    asm.lea(R10, Mem::sum(R10, RAX, 0));
    asm.cmp_imm(R10, 4096);
    others.push(asm.jcc(cc::BE));
    asm.shr32(RCX, MAX_SITES.trailing_zeros() as u8);
    asm.and32_imm(RCX, 3);
    asm.load(RCX, Mem { base: None, index: Some((RCX, 8)), disp: off::table(0), gs: true, addr32: false });
    asm.store(Mem::gs(off::EXIT_TARGET), R11);
    let half = |asm: &mut Asm, from: i32, to: i32| {
        let entry = |field| Mem { base: Some(RCX), index: Some((RAX, 1)), disp: field, gs: false, addr32: false };
        asm.raw(&[0xc4, 0xc3, 0x7b, 0xf0, 0xc3, 8]); // rorx eax, r11d, 8
        asm.and32_imm(RAX, 0xfff0);
        asm.mov(R10, R11);
        asm.xor_mem(R10, entry(0));
        let missing = asm.jcc(cc::NE);
        asm.load(R10, entry(8));
        asm.lea(R10, Mem::sum(R10, R11, 0));
        for at in (0..BOUNCE as i32).step_by(8) {
            asm.load(RAX, Mem::base(R10, from + at));
            asm.store(Mem::gs(off::BOUNCE + to + at), RAX);
        }
        missing
    };
    asm.rr(true, &[0x81], 4, R11); // and r11, imm32: to the page's start
    asm.i32(!0xfff);
    let first = half(asm, 4096 - BOUNCE as i32, 0);
    asm.lea(R11, Mem::base(R11, 4096));
    let second = half(asm, 0, BOUNCE as i32);
    asm.load(R10, Mem::gs(off::BOUNCE_MIDDLE));
    asm.rr(true, &[0x29], R11, R10); // sub r10, r11
    asm.load(R11, Mem::gs(off::EXIT_TARGET));
    asm.load(RAX, Mem::gs(off::lent(0)));
    asm.load(RCX, Mem::gs(off::lent(1)));
    asm.u8(0xf8); // clc
    asm.ret();
    asm.patch32(first);
    asm.patch32(second);
    asm.load(R11, Mem::gs(off::EXIT_TARGET));
    others.push(asm.jmp());
    others
}

/// Loads YMM0 to YMM15. Upper halves that are all zero are left in the state after VZEROUPPER: otherwise every SSE instruction of the
/// guest would have to merge into them (Intel optimization manual, "mixing AVX code with SSE code").
fn load_vectors(asm: &mut Asm) {
    asm.vzeroupper();
    asm.vmovdqu_xmm(0, Mem::gs(off::ymm_high(0)), false);
    for i in 1..16 {
        asm.vpor_xmm(0, Mem::gs(off::ymm_high(i)));
    }
    asm.vptest_xmm(0);
    let used = asm.jcc(cc::NE);
    for i in 0..16 {
        asm.vmovdqu_xmm(i, Mem::gs(off::xmm(i as usize)), false);
    }
    let done = asm.jmp();
    asm.patch32(used);
    for i in 0..16 {
        asm.vmovdqu_xmm(i, Mem::gs(off::xmm(i as usize)), false);
        asm.vinsert_high(i, Mem::gs(off::ymm_high(i as usize)));
    }
    asm.patch32(done);
}

/// Flags that the fast transitions take: the arithmetic ones, IF and the fixed one.
pub const PLAIN_FLAGS: i32 = 0xad7;
const RF: i32 = 0x1_0000;
const CS: usize = 1;
const SS: usize = 2;

/// SYSCALL, SYSRET and IRET without leaving the cache, where nothing unusual is asked of them; else the interpreter does them.
fn transitions(asm: &mut Asm, stubs: &mut Stubs) {
    let step = stubs.exits[reason::STEP as usize];

    stubs.syscall = asm.len();
    asm.pushfq();
    asm.pop(R11);
    asm.cmp32_mem_imm8(Mem::gs(off::FAST_SYSCALL), 0);
    let slow = asm.jcc(cc::E);
    asm.rm(false, &[0xff], 0, Mem::gs(off::ENTRIES)); // inc
    asm.mov(RCX, R10);
    asm.load(R10, Mem::gs(off::RFLAGS));
    asm.lea(R11, Mem::sum(R11, R10, -0x202));
    asm.load32(R10, Mem::gs(off::IF_FLAG));
    asm.lea(R11, Mem::sum(R11, R10, 0));
    asm.store(Mem::gs(off::gpr(11)), R11);
    asm.u8(0xfc); // cld
    asm.store_imm(Mem::gs(off::RFLAGS), 2);
    asm.store32_imm(Mem::gs(off::IF_FLAG), 0);
    asm.store32_imm(Mem::gs(off::FLAGS), 0x200);
    copy_segments(asm, 0, R10);
    asm.store(Mem::gs(off::USER_RSP), RSP);
    asm.load(RSP, Mem::gs(off::KERNEL_EMPTY));
    asm.store32_imm(Mem::gs(off::USER), 0);
    asm.load(R11, Mem::gs(off::LSTAR));
    let at = asm.jmp();
    link(asm, at, stubs.indirect[0]);
    asm.patch32(slow);
    asm.push(R11);
    asm.popfq();
    asm.load32(R10, Mem::gs(off::SCRATCH));
    let at = asm.jmp();
    link(asm, at, step);

    let slow = asm.len();
    asm.restore_flags(off::FLAGS, R10);
    asm.load32(R10, Mem::gs(off::SCRATCH));
    let at = asm.jmp();
    link(asm, at, step);

    stubs.sysret = asm.len();
    asm.cmp32_mem_imm8(Mem::gs(off::FAST_SYSCALL), 0);
    jcc_to(asm, cc::E, slow);
    asm.load(R11, Mem::gs(off::gpr(11)));
    asm.rr(true, &[0xf7], 0, R11); // test r11, imm32
    asm.i32(!PLAIN_FLAGS);
    jcc_to(asm, cc::NE, slow);
    asm.cmp32_mem_imm8(Mem::gs(off::IRQ_WAITING), 0);
    jcc_to(asm, cc::NE, slow);
    asm.mov(R10, RCX);
    asm.rr(true, &[0xc1], 5, R10); // shr
    asm.u8(47);
    jcc_to(asm, cc::NE, slow);
    commit_flags(asm, R11, R10);
    copy_segments(asm, 2, R10);
    asm.load(RSP, Mem::gs(off::USER_RSP));
    asm.store32_imm(Mem::gs(off::USER), 1);
    asm.mov(R11, RCX);
    let at = asm.jmp();
    link(asm, at, stubs.indirect[1]);

    let slow = asm.len();
    asm.load(RAX, Mem::gs(off::gpr(0)));
    asm.load(RCX, Mem::gs(off::gpr(1)));
    asm.restore_flags(off::FLAGS, R10);
    asm.load32(R10, Mem::gs(off::SCRATCH));
    let at = asm.jmp();
    link(asm, at, step);

    stubs.iret = asm.len();
    asm.store(Mem::gs(off::gpr(0)), RAX);
    asm.store(Mem::gs(off::gpr(1)), RCX);
    asm.cmp32_mem_imm8(Mem::gs(off::FAST_SYSCALL), 0);
    jcc_to(asm, cc::E, slow);
    // RFLAGS and RIP of the frame must be plain. Faults leave RF in the frame, which says nothing without breakpoints.
    asm.load(RAX, Mem::base(R11, 16));
    asm.rr(true, &[0xf7], 0, RAX);
    asm.i32(!(PLAIN_FLAGS | RF));
    jcc_to(asm, cc::NE, slow);
    asm.load(RCX, Mem::base(R11, 0));
    asm.sar(RCX, 47);
    asm.rr(true, &[0xff], 0, RCX); // inc
    asm.cmp_imm(RCX, 1);
    jcc_to(asm, cc::A, slow);
    asm.rm(false, &[0x80], 7, Mem::gs(off::NMI_BLOCKED)); // cmp byte
    asm.u8(0);
    jcc_to(asm, cc::NE, slow);
    asm.rr(false, &[0xf7], 0, RAX); // test eax, IF
    asm.i32(0x200);
    asm.raw(&[0x74, 0]);
    let disabled = asm.len() - 1;
    asm.cmp32_mem_imm8(Mem::gs(off::IRQ_WAITING), 0);
    jcc_to(asm, cc::NE, slow);
    asm.patch8(disabled);
    asm.rm(false, &[0x0f, 0xb7], RCX, Mem::base(R11, 8)); // movzx
    asm.rm(false, &[0x0f, 0xb7], R10, Mem::base(R11, 32));
    cmp16(asm, RCX, off::segment_base(CS) + off::SELECTOR);
    let to_user = asm.jcc(cc::NE);
    cmp16(asm, R10, off::segment_base(SS) + off::SELECTOR);
    jcc_to(asm, cc::NE, slow);
    asm.mov(R10, RAX);
    commit_flags(asm, R10, RCX);
    asm.load(R9, Mem::base(R11, 24));
    asm.load(R11, Mem::base(R11, 0));
    asm.load(RAX, Mem::gs(off::gpr(0)));
    asm.load(RCX, Mem::gs(off::gpr(1)));
    let at = asm.jmp();
    link(asm, at, stubs.indirect[0]);

    asm.patch32(to_user);
    cmp16(asm, RCX, off::fast_segment(2) + off::SELECTOR);
    jcc_to(asm, cc::NE, slow);
    cmp16(asm, R10, off::fast_segment(3) + off::SELECTOR);
    jcc_to(asm, cc::NE, slow);
    // ES, DS, FS, GS must be null: nothing to take away from the program.
    asm.rm(false, &[0x0f, 0xb7], RCX, Mem::gs(off::segment_base(0) + off::SELECTOR));
    for segment in [3, 4, 5] {
        asm.rm_prefixed(0x66, false, &[0x0b], RCX, Mem::gs(off::segment_base(segment) + off::SELECTOR));
    }
    asm.rr(false, &[0x85], RCX, RCX); // test
    jcc_to(asm, cc::NE, slow);
    asm.mov(R10, RAX);
    commit_flags(asm, R10, RCX);
    copy_segments(asm, 2, R10);
    asm.load(R9, Mem::base(R11, 24));
    asm.load(R11, Mem::base(R11, 0));
    asm.load(RAX, Mem::gs(off::gpr(0)));
    asm.load(RCX, Mem::gs(off::gpr(1)));
    asm.load(RSP, Mem::gs(off::USER_RSP));
    asm.store32_imm(Mem::gs(off::USER), 1);
    let at = asm.jmp();
    link(asm, at, stubs.indirect[1]);
}

fn jcc_to(asm: &mut Asm, condition: u8, target: usize) {
    let at = asm.jcc(condition);
    link(asm, at, target);
}

fn cmp16(asm: &mut Asm, reg: u8, offset: i32) {
    asm.rm_prefixed(0x66, false, &[0x3b], reg, Mem::gs(offset));
}

/// Makes plain flags in `from` the guest's: IF, the other system flags, the arithmetic flags in the block, DF. Clobbers both.
pub fn commit_flags(asm: &mut Asm, from: u8, temp: u8) {
    asm.mov32(temp, from);
    asm.and32_imm(temp, 0x200);
    asm.store32(Mem::gs(off::IF_FLAG), temp);
    asm.store_imm(Mem::gs(off::RFLAGS), 2);
    asm.mov32(temp, from);
    asm.and32_imm(temp, 0xd5);
    asm.shl32(temp, 8);
    asm.shr32(from, 11);
    asm.and32_imm(from, 1);
    asm.rr(false, &[0x09], from, temp); // or
    asm.rr(false, &[0x81], 1, temp); // or imm
    asm.i32(0x200);
    asm.store32(Mem::gs(off::FLAGS), temp);
    asm.u8(0xfc); // cld
}

/// Copies CS and SS from the prepared pair that starts at `first`.
fn copy_segments(asm: &mut Asm, first: usize, temp: u8) {
    for (i, segment) in [(first, CS), (first + 1, SS)] {
        for half in [0, 8] {
            asm.load(temp, Mem::gs(off::fast_segment(i) + half));
            asm.store(Mem::gs(off::segment_base(segment) + half), temp);
        }
    }
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
