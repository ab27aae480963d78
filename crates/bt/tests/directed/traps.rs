//! Every exception, at both privilege levels, with the state it must leave: nothing of the faulting instruction may have happened.

use cpu::{CpuState, Exit, cr0, cr4, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{
    Built, CODE, DATA, Guest, IDT, Kind, NX, PRESENT, RESERVED, STACK, STOP, TSS, Trap, USER, USER_CODE, USER_DATA,
    USER_STACK, WRITE, each, user_segments,
};

/// Where a case runs.
#[derive(Clone, Copy, Debug)]
struct Place {
    user: bool,
    code: u64,
    data: u64,
    stack: u64,
}

const KERNEL: Place = Place { user: false, code: CODE, data: DATA, stack: STACK };
const PROGRAM: Place = Place { user: true, code: USER_CODE, data: USER_DATA, stack: USER_STACK - 0x1000 };

// Offsets of pages in the data, which RBX points to. The others can be read, written and executed.
const READ_ONLY: i32 = 0x1000;
const HOLE: i32 = 0x2000;
const BAD: i32 = 0x4000;
/// A supervisor page for programs; a user page for the kernel.
const OTHER: i32 = 0x5000;
/// Eight bytes before a hole.
const BEFORE_HOLE: i32 = 0x7000;
const BEFORE_READ_ONLY: i32 = 0x9000;
const NO_EXECUTE: i32 = 0xb000;
/// What the first word of the data holds.
const WORD: u64 = 0x1122_3344_5566_7788;

type Build = fn(&mut CodeAssembler, &Place) -> Built;

/// What RIP the frame must hold.
#[derive(Clone, Copy)]
enum Where {
    Insn,
    After,
    /// An offset in the data.
    Data(i32),
}

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    kernel: bool,
    user: bool,
    setup: fn(&mut CpuState, &Place),
    before: Build,
    insn: Build,
    vector: u8,
    error: Option<u64>,
    cr2: Option<i32>,
    rip: Where,
    /// What the instruction has done to the registers when it faults: `rep` forms.
    registers: fn(&mut CpuState, &Place),
}

fn case(name: &'static str, vector: u8, insn: Build) -> Case {
    let error = matches!(vector, 10..=14 | 17).then_some(0);
    Case {
        name,
        kernel: true,
        user: true,
        setup: |_, _| {},
        before: |_, _| Ok(()),
        insn,
        vector,
        error,
        cr2: None,
        rip: Where::Insn,
        registers: |_, _| {},
    }
}

/// A page fault at an offset in the data, with this error code (without the user bit).
fn page_fault(name: &'static str, error: u64, at: i32, insn: Build) -> Case {
    Case { error: Some(error), cr2: Some(at), ..case(name, vector::PF, insn) }
}

impl Case {
    fn only_kernel(self) -> Self {
        Self { user: false, ..self }
    }
    fn only_user(self) -> Self {
        Self { kernel: false, ..self }
    }
    fn setup(self, setup: fn(&mut CpuState, &Place)) -> Self {
        Self { setup, ..self }
    }
    fn before(self, before: Build) -> Self {
        Self { before, ..self }
    }
    fn code(self, error: u64) -> Self {
        Self { error: Some(error), ..self }
    }
    fn rip(self, rip: Where) -> Self {
        Self { rip, ..self }
    }
    fn registers(self, registers: fn(&mut CpuState, &Place)) -> Self {
        Self { registers, ..self }
    }
}

fn all_flags() -> u64 {
    rflags::ARITH
}

/// Runs one case in one variant; returns what the engine made of it and the memory.
fn run(case: &Case, place: &Place, variant: u32, guest: &mut Guest) -> (Trap, Vec<u8>) {
    let kind = guest.kind;
    println!("{} {variant} {kind:?}", case.name);
    guest.reset();
    assert!(guest.ram.write(place.code, &[0; 0x200]));
    assert!(guest.ram.write(place.data, &vec![0; 0x1_0000]));
    assert!(guest.ram.write(place.stack - 0x100, &[0; 0x200]));
    for vector in [vector::DF, vector::SS, vector::GP, vector::PF] {
        guest.ist(vector);
    }
    let all = PRESENT | WRITE | if place.user { USER } else { 0 };
    let page = |offset: i32| place.data + offset as u64;
    guest.map(page(READ_ONLY), page(READ_ONLY) | (all & !WRITE));
    guest.map(page(HOLE), 0);
    guest.map(page(BAD), page(BAD) | all | RESERVED);
    guest.map(page(OTHER), page(OTHER) | (all ^ USER));
    guest.map(page(BEFORE_HOLE), 0);
    guest.map(page(BEFORE_READ_ONLY), page(BEFORE_READ_ONLY) | (all & !WRITE));
    guest.map(page(NO_EXECUTE), page(NO_EXECUTE) | all | NX);
    guest.put(place.data, &[WORD, 0x1_0000_0000]);
    for i in 0..64 {
        guest.put(page(BEFORE_HOLE) - 512 + i * 8, &[i * 0x0101_0101_0101_0101]);
        guest.put(page(BEFORE_READ_ONLY) - 512 + i * 8, &[i * 0x0101_0101_0101_0101]);
    }
    // A finished mask of what comes before: memory accesses and flags in different places.
    let start = guest.code(place.code, |a| {
        match variant {
            0 => {}
            1 => a.mov(r14, qword_ptr(rbx))?,
            _ => {
                a.mov(r14, qword_ptr(rbx))?;
                a.mov(qword_ptr(rbx + 0x20), r14)?;
                a.lea(r14, ptr(r14))?;
            }
        }
        (case.before)(a, place)
    });
    let end = guest.code(start, |a| (case.insn)(a, place));
    guest.code(end, |a| {
        if variant == 1 {
            a.xor(r14d, r14d)?;
        } else {
            a.adc(r14, r14)?;
        }
        a.out(STOP, al)?;
        a.hlt()
    });
    guest.set(|state| {
        for (i, register) in state.gpr.iter_mut().enumerate() {
            *register = 0x1111_1111_1111_1111 * i as u64;
        }
        state.gpr[cpu::gpr::RBX] = place.data;
        state.gpr[cpu::gpr::RSP] = place.stack;
        state.rip = place.code;
        state.rflags = 2 | if variant == 2 { rflags::CF | rflags::AF } else { all_flags() };
        if place.user {
            user_segments(state);
            state.rflags |= rflags::IF;
        }
        (case.setup)(state, place);
    });
    let before = guest.vcpu.state();
    let trap = guest.trap();

    let context =
        format!("{} as {}, variant {variant}, {kind:?}", case.name, if place.user { "user" } else { "kernel" });
    let user_bit = if case.vector == vector::PF && place.user { 4 } else { 0 };
    assert_eq!(trap.vector, case.vector, "vector: {context}: {trap:x?}");
    assert_eq!(trap.error, case.error.map(|error| error | user_bit), "error code: {context}");
    if let Some(offset) = case.cr2 {
        assert_eq!(trap.state.cr2, page(offset), "CR2: {context}");
    }
    let rip = match case.rip {
        Where::Insn => start,
        Where::After => end,
        Where::Data(offset) => page(offset),
    };
    assert_eq!(trap.rip, rip, "RIP: {context}, code at {start:#x}");
    let mut expected = before.clone();
    if variant > 0 {
        expected.gpr[14] = WORD;
    }
    (case.registers)(&mut expected, place);
    assert_eq!(trap.rsp, expected.gpr[cpu::gpr::RSP], "RSP: {context}");
    let mut registers = trap.state.gpr;
    registers[cpu::gpr::RSP] = trap.rsp;
    assert_eq!(registers, expected.gpr, "registers: {context}");
    let fault = trap.vector < 32 && !matches!(trap.vector, vector::DB | vector::BP);
    let mask = if kind == Kind::Bt { !rflags::ARITH } else { !0 };
    let flags = expected.rflags | if fault { rflags::RF } else { 0 };
    assert_eq!(trap.rflags & mask, flags & mask, "RFLAGS: {context}");

    let mut memory = vec![0; 0x1_0000 + 128];
    assert!(guest.ram.read(place.data, &mut memory[..0x1_0000]));
    assert!(guest.ram.read(place.stack, &mut memory[0x1_0000..]));
    (trap, memory)
}

fn check(cases: &[Case]) {
    check_under(cases, &[Kind::Bt, Kind::Precise, Kind::Lockstep]);
}

/// Under the interpreter, and with the same results under others.
fn check_under(cases: &[Case], others: &[Kind]) {
    // One guest for all: that code changes under the translator is part of the test.
    let mut interp = Guest::new(Kind::Interp);
    let mut others: Vec<Guest> = others.iter().copied().map(Guest::new).collect();
    for case in cases {
        for place in [KERNEL, PROGRAM] {
            if !(if place.user { case.user } else { case.kernel }) {
                continue;
            }
            for variant in 0..3 {
                let (expected, memory) = run(case, &place, variant, &mut interp);
                for guest in &mut others {
                    let (mut got, got_memory) = run(case, &place, variant, guest);
                    if guest.kind == Kind::Bt {
                        got.rflags = expected.rflags;
                        got.state.rflags = expected.state.rflags;
                    }
                    assert_eq!(got, expected, "{} {place:?} variant {variant}", case.name);
                    assert!(got_memory == memory, "memory: {} {place:?} variant {variant}", case.name);
                }
            }
        }
    }
}

#[test]
fn page_faults_by_code() {
    check(&[
        page_fault("read, not present", 0, HOLE + 8, |a, _| a.mov(rax, qword_ptr(rbx + HOLE + 8))),
        page_fault("write, not present", 2, HOLE, |a, _| a.mov(byte_ptr(rbx + HOLE), al)),
        page_fault("write, read-only", 3, READ_ONLY + 1, |a, _| a.mov(word_ptr(rbx + READ_ONLY + 1), cx)),
        page_fault("read, reserved bit", 9, BAD, |a, _| a.movzx(eax, byte_ptr(rbx + BAD))),
        page_fault("write, reserved bit", 11, BAD, |a, _| a.mov(dword_ptr(rbx + BAD), 5)),
        page_fault("read, supervisor", 1, OTHER, |a, _| a.mov(r9, qword_ptr(rbx + OTHER))).only_user(),
        page_fault("write, supervisor", 3, OTHER, |a, _| a.mov(qword_ptr(rbx + OTHER), r9)).only_user(),
        page_fault("fetch, not present", 0x10, HOLE, |a, p| a.jmp(p.data + HOLE as u64)).rip(Where::Data(HOLE)),
        page_fault("fetch, no execute", 0x11, NO_EXECUTE + 7, |a, _| a.jmp(r15))
            .setup(|s, p| s.gpr[15] = p.data + NO_EXECUTE as u64 + 7)
            .rip(Where::Data(NO_EXECUTE + 7)),
        page_fault("fetch, supervisor", 0x11, OTHER, |a, p| a.jmp(p.data + OTHER as u64))
            .rip(Where::Data(OTHER))
            .only_user(),
        page_fault("fetch, reserved bit", 0x19, BAD, |a, p| a.jmp(p.data + BAD as u64)).rip(Where::Data(BAD)),
        page_fault("return to nowhere", 0x10, HOLE, |a, _| a.ret())
            .before(|a, _| a.push(r15))
            .setup(|s, p| s.gpr[15] = p.data + HOLE as u64)
            .rip(Where::Data(HOLE)),
        page_fault("fetch, second page", 0x10, BEFORE_HOLE, |a, p| a.jmp(p.data + BEFORE_HOLE as u64 - 1))
            .rip(Where::Data(BEFORE_HOLE - 1)),
    ]);
}

#[test]
fn page_faults_of_each_form() {
    check(&[
        page_fault("add to memory", 3, READ_ONLY, |a, _| a.add(qword_ptr(rbx + READ_ONLY), rax)),
        page_fault("add from memory", 0, HOLE, |a, _| a.add(rax, qword_ptr(rbx + HOLE))),
        page_fault("adc to spilled", 0, HOLE, |a, _| a.adc(r10, qword_ptr(rbx + HOLE))),
        page_fault("three spilled", 0, HOLE + 0x19, |a, _| a.imul_2(r9, qword_ptr(r10 + r11 * 1))).setup(|s, p| {
            s.gpr[10] = p.data + HOLE as u64;
            s.gpr[11] = 0x19;
        }),
        page_fault("shift in memory", 3, READ_ONLY, |a, _| a.shl(dword_ptr(rbx + READ_ONLY), cl)),
        page_fault("inc in memory", 3, READ_ONLY, |a, _| a.inc(dword_ptr(rbx + READ_ONLY))),
        page_fault("high byte", 2, HOLE, |a, _| a.mov(byte_ptr(rbx + HOLE), ch)),
        page_fault("xchg", 3, READ_ONLY, |a, _| a.xchg(qword_ptr(rbx + READ_ONLY), rcx)),
        page_fault("xchg, not present", 2, HOLE, |a, _| a.xchg(qword_ptr(rbx + HOLE), r10)),
        page_fault("cmpxchg that would fail", 3, READ_ONLY, |a, _| a.cmpxchg(qword_ptr(rbx + READ_ONLY), rcx)),
        page_fault("lock cmpxchg", 2, HOLE, |a, _| a.lock().cmpxchg(dword_ptr(rbx + HOLE), r11d)),
        page_fault("cmpxchg8b", 3, READ_ONLY, |a, _| a.cmpxchg8b(qword_ptr(rbx + READ_ONLY))),
        page_fault("lock cmpxchg16b", 3, READ_ONLY, |a, _| a.lock().cmpxchg16b(xmmword_ptr(rbx + READ_ONLY))),
        page_fault("lock xadd", 3, READ_ONLY, |a, _| a.lock().xadd(qword_ptr(rbx + READ_ONLY), r9)),
        page_fault("bts far away", 3, READ_ONLY + 8, |a, _| a.bts(qword_ptr(rbx), r12))
            .setup(|s, _| s.gpr[12] = (READ_ONLY as u64 + 8) * 8 + 5),
        page_fault("bt backwards", 0, HOLE + 0xff8, |a, _| a.bt(qword_ptr(rbx + HOLE + 0x1000), r12))
            .setup(|s, _| s.gpr[12] = -5_i64 as u64),
        page_fault("push", 2, HOLE + 0xff8, |a, _| a.push(rax)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64 + 0x1000),
        page_fault("push immediate", 3, READ_ONLY + 0xff8, |a, _| a.push(0x1234))
            .setup(|s, p| s.gpr[4] = p.data + READ_ONLY as u64 + 0x1000),
        page_fault("push of memory to a hole", 2, HOLE, |a, _| a.push(qword_ptr(rbx)))
            .setup(|s, p| s.gpr[4] = p.data + HOLE as u64 + 8),
        page_fault("push of a hole", 0, HOLE, |a, _| a.push(qword_ptr(rbx + HOLE))),
        page_fault("pop", 0, HOLE, |a, _| a.pop(rax)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64),
        page_fault("pop to memory", 3, READ_ONLY, |a, _| a.pop(qword_ptr(rbx + READ_ONLY))),
        page_fault("pop rsp", 0, HOLE, |a, _| a.pop(rsp)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64),
        page_fault("pushfq", 2, HOLE + 0x10, |a, _| a.pushfq()).setup(|s, p| s.gpr[4] = p.data + HOLE as u64 + 0x18),
        page_fault("popfq", 0, HOLE, |a, _| a.popfq()).setup(|s, p| s.gpr[4] = p.data + HOLE as u64),
        page_fault("call", 2, HOLE, |a, p| a.call(p.code + 0x100)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64 + 8),
        page_fault("call register", 2, HOLE, |a, _| a.call(r11)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64 + 8),
        page_fault("call of a hole", 0, HOLE, |a, _| a.call(qword_ptr(rbx + HOLE))),
        page_fault("jump through a hole", 0, HOLE, |a, _| a.jmp(qword_ptr(rbx + HOLE))),
        page_fault("ret", 0, HOLE, |a, _| a.ret()).setup(|s, p| s.gpr[4] = p.data + HOLE as u64),
        page_fault("ret with immediate", 0, HOLE, |a, _| a.ret_1(0x20)).setup(|s, p| s.gpr[4] = p.data + HOLE as u64),
        page_fault("leave", 0, HOLE, |a, _| a.leave()).setup(|s, p| s.gpr[5] = p.data + HOLE as u64),
        page_fault("iretq", 0, HOLE, |a, _| a.iretq()).setup(|s, p| s.gpr[4] = p.data + HOLE as u64).only_kernel(),
        page_fault("movbe", 0, HOLE, |a, _| a.movbe(rax, qword_ptr(rbx + HOLE))),
        page_fault("cmov not taken", 0, HOLE, |a, _| a.cmovo(rax, qword_ptr(rbx + HOLE)))
            .setup(|s, _| s.rflags &= !rflags::OF),
        page_fault("setcc", 3, READ_ONLY, |a, _| a.setc(byte_ptr(rbx + READ_ONLY))),
        page_fault("div by memory", 0, HOLE, |a, _| a.div(qword_ptr(rbx + HOLE))),
        page_fault("sse load", 0, HOLE, |a, _| a.movups(xmm3, xmmword_ptr(rbx + HOLE))),
        page_fault("sse store", 3, READ_ONLY, |a, _| a.movaps(xmmword_ptr(rbx + READ_ONLY), xmm3)),
        page_fault("avx load", 0, HOLE, |a, _| a.vpaddd(ymm1, ymm2, ymmword_ptr(rbx + HOLE))),
        page_fault("fld", 0, HOLE, |a, _| a.fld(qword_ptr(rbx + HOLE))),
        page_fault("fstp", 3, READ_ONLY, |a, _| a.fstp(tbyte_ptr(rbx + READ_ONLY))).before(|a, _| a.fldpi()),
        page_fault("fxsave", 3, READ_ONLY, |a, _| a.fxsave(ptr(rbx + READ_ONLY))),
        page_fault("maskmovdqu", 2, HOLE, |a, _| a.maskmovdqu(xmm0, xmm1)).setup(|s, p| {
            s.gpr[7] = p.data + HOLE as u64;
            s.fp.bytes[cpu::FpState::XMM + 16..cpu::FpState::XMM + 32].fill(0xff);
        }),
    ]);
}

#[test]
fn page_faults_across_pages() {
    const AT: i32 = BEFORE_HOLE;
    const RO: i32 = BEFORE_READ_ONLY;
    check(&[
        page_fault("load", 0, AT, |a, _| a.mov(rax, qword_ptr(rbx + AT - 3))),
        page_fault("store", 2, AT, |a, _| a.mov(dword_ptr(rbx + AT - 2), eax)),
        page_fault("store to read-only", 3, RO, |a, _| a.mov(qword_ptr(rbx + RO - 7), rcx)),
        page_fault("add", 3, RO, |a, _| a.add(word_ptr(rbx + RO - 1), cx)),
        page_fault("xchg", 3, RO, |a, _| a.xchg(qword_ptr(rbx + RO - 1), r9)),
        page_fault("cmpxchg", 3, RO, |a, _| a.cmpxchg(qword_ptr(rbx + RO - 4), rcx)),
        page_fault("movups store", 3, RO, |a, _| a.movups(xmmword_ptr(rbx + RO - 15), xmm5)),
        page_fault("vmovdqu store", 2, AT, |a, _| a.vmovdqu(ymmword_ptr(rbx + AT - 31), ymm5)),
        page_fault("fstp", 3, RO, |a, _| a.fstp(tbyte_ptr(rbx + RO - 9))).before(|a, _| a.fld1()),
        page_fault("push", 3, RO, |a, _| a.push(r10)).setup(|s, p| s.gpr[4] = (p.data + RO as u64) + 5),
        page_fault("call", 3, RO, |a, p| a.call(p.code + 0x100)).setup(|s, p| s.gpr[4] = (p.data + RO as u64) + 1),
        page_fault("pop", 0, AT, |a, _| a.pop(r10)).setup(|s, p| s.gpr[4] = (p.data + AT as u64) - 1),
        page_fault("ret", 0, AT, |a, _| a.ret()).setup(|s, p| s.gpr[4] = (p.data + AT as u64) - 4),
        page_fault("iretq", 0, AT, |a, _| a.iretq()).setup(|s, p| s.gpr[4] = (p.data + AT as u64) - 24).only_kernel(),
        page_fault("enter", 3, RO, |a, _| a.enter(0x20, 0)).setup(|s, p| s.gpr[4] = (p.data + RO as u64) + 3),
    ]);
}

/// String instructions stop at the element that faults, with the registers at it.
#[test]
fn page_faults_of_strings() {
    const AT: i32 = BEFORE_HOLE;
    const RO: i32 = BEFORE_READ_ONLY;
    fn to(state: &mut CpuState, from: u64, to: u64, count: u64) {
        state.gpr[cpu::gpr::RSI] = from;
        state.gpr[cpu::gpr::RDI] = to;
        state.gpr[cpu::gpr::RCX] = count;
    }
    fn behind(state: &mut CpuState, bytes: u64, count: u64) {
        state.gpr[cpu::gpr::RSI] = state.gpr[cpu::gpr::RSI].wrapping_add(bytes);
        state.gpr[cpu::gpr::RDI] += bytes;
        state.gpr[cpu::gpr::RCX] -= count;
    }
    check(&[
        page_fault("rep movsq into a hole", 2, AT, |a, _| a.rep().movsq())
            .setup(|s, p| to(s, p.data, p.data + AT as u64 - 40, 100))
            .registers(|s, _| behind(s, 40, 5)),
        page_fault("rep movsb out of a hole", 0, AT, |a, _| a.rep().movsb())
            .setup(|s, p| to(s, p.data + AT as u64 - 13, p.data + 0xc003, 14))
            .registers(|s, _| behind(s, 13, 13)),
        page_fault("rep movsd, element across", 3, RO, |a, _| a.rep().movsd())
            .setup(|s, p| to(s, p.data, p.data + RO as u64 - 10, 9))
            .registers(|s, _| behind(s, 8, 2)),
        page_fault("rep movsq at a hole", 2, HOLE, |a, _| a.rep().movsq())
            .setup(|s, p| to(s, p.data, p.data + HOLE as u64, 3)),
        page_fault("rep stosq over two pages", 3, READ_ONLY, |a, _| a.rep().stosq())
            .setup(|s, p| to(s, 7, p.data + READ_ONLY as u64 - 8, 2))
            .registers(|s, _| {
                behind(s, 8, 1);
                s.gpr[cpu::gpr::RSI] = 7;
            }),
        page_fault("rep stosb", 2, AT, |a, _| a.rep().stosb())
            .setup(|s, p| to(s, 7, p.data + AT as u64 - 0x900, 0x901))
            .registers(|s, _| {
                behind(s, 0x900, 0x900);
                s.gpr[cpu::gpr::RSI] = 7;
            }),
        page_fault("movsq", 3, RO, |a, _| a.movsq()).setup(|s, p| to(s, p.data, p.data + RO as u64 - 1, 9)),
        page_fault("stosd", 3, READ_ONLY, |a, _| a.stosd()).setup(|s, p| to(s, 0, p.data + READ_ONLY as u64, 9)),
        page_fault("rep lodsq", 0, AT, |a, _| a.rep().lodsq())
            .setup(|s, p| to(s, p.data + AT as u64 - 16, 0, 3))
            .registers(|s, _| {
                s.gpr[0] = 63 * 0x0101_0101_0101_0101;
                behind(s, 16, 2);
                s.gpr[cpu::gpr::RDI] = 0;
            }),
        page_fault("rep movsb downwards", 2, HOLE + 0xfff, |a, _| a.rep().movsb())
            .before(|a, _| a.std())
            .setup(|s, p| to(s, p.data + 0x40, p.data + HOLE as u64 + 0x1003, 9))
            .registers(|s, _| {
                s.rflags |= rflags::DF;
                s.gpr[cpu::gpr::RSI] -= 4;
                s.gpr[cpu::gpr::RDI] -= 4;
                s.gpr[cpu::gpr::RCX] -= 4;
            }),
    ]);
}

const ODD: u64 = 0x8000_0000_0000_0000;

#[test]
fn general_protection_and_stack() {
    check(&[
        case("load", vector::GP, |a, _| a.mov(rax, qword_ptr(r15))).setup(|s, _| s.gpr[15] = ODD),
        case("store", vector::GP, |a, _| a.mov(qword_ptr(r10), rax)).setup(|s, _| s.gpr[10] = 0x0000_8000_0000_0000),
        case("the last byte is not canonical", vector::GP, |a, _| a.mov(rax, qword_ptr(r15)))
            .setup(|s, _| s.gpr[15] = 0x0000_7fff_ffff_fffc)
            .only_kernel()
            .before(|_, _| Ok(())),
        case("load by RSP", vector::SS, |a, _| a.mov(rax, qword_ptr(rsp))).setup(|s, _| s.gpr[4] = ODD),
        case("load by RBP", vector::SS, |a, _| a.mov(rax, qword_ptr(rbp + 8))).setup(|s, _| s.gpr[5] = ODD),
        case("push", vector::SS, |a, _| a.push(rax)).setup(|s, _| s.gpr[4] = ODD),
        case("pop", vector::SS, |a, _| a.pop(rax)).setup(|s, _| s.gpr[4] = ODD),
        case("call", vector::SS, |a, p| a.call(p.code + 0x100)).setup(|s, _| s.gpr[4] = ODD),
        case("ret, stack", vector::SS, |a, _| a.ret()).setup(|s, _| s.gpr[4] = ODD),
        case("leave", vector::SS, |a, _| a.leave()).setup(|s, _| s.gpr[5] = ODD),
        case("ret, target", vector::GP, |a, _| a.ret())
            .before(|a, _| a.push(r15))
            .setup(|s, _| s.gpr[15] = ODD)
            .registers(|s, _| s.gpr[4] -= 8),
        case("jump", vector::GP, |a, _| a.jmp(r15)).setup(|s, _| s.gpr[15] = ODD),
        case("call, target", vector::GP, |a, _| a.call(r15)).setup(|s, _| s.gpr[15] = ODD),
        case("jump through memory", vector::GP, |a, _| a.jmp(qword_ptr(rbx + 0x30)))
            .before(|a, _| a.mov(qword_ptr(rbx + 0x30), r15))
            .setup(|s, _| s.gpr[15] = ODD),
        case("rep movsb", vector::GP, |a, _| a.rep().movsb())
            .setup(|s, p| (s.gpr[1], s.gpr[6], s.gpr[7]) = (3, ODD, p.data)),
        case("misaligned movaps", vector::GP, |a, _| a.movaps(xmm1, xmmword_ptr(rbx + 8))),
        case("misaligned store", vector::GP, |a, _| a.vmovdqa(ymmword_ptr(rbx + 16), ymm1)),
        case("misaligned cmpxchg16b", vector::GP, |a, _| a.cmpxchg16b(xmmword_ptr(rbx + 8))),
        case("misaligned cmpxchg16b of memory that must not be written", vector::GP, |a, _| {
            a.cmpxchg16b(xmmword_ptr(rbx + READ_ONLY + 8))
        }),
        case("data segment beyond the table", vector::GP, |a, _| a.mov(ds, r15d))
            .setup(|s, _| s.gpr[15] = 0xff8)
            .code(0xff8),
        case("data segment not present", vector::NP, |a, _| a.mov(es, r15d))
            .setup(|s, _| s.gpr[15] = 0x48)
            .code(0x48)
            .only_kernel(),
        case("null stack segment", vector::GP, |a, _| a.mov(ss, r15d)).setup(|s, _| s.gpr[15] = 0).only_user(),
        case("stack segment not present", vector::SS, |a, _| a.mov(ss, r15d))
            .setup(|s, _| s.gpr[15] = 0x48)
            .code(0x48)
            .only_kernel(),
        case("gate beyond the table", vector::GP, |a, _| a.int(0x90))
            .setup(|s, _| s.idtr.limit = 0x90 * 16 - 1)
            .code(0x90 * 8 + 2),
        case("gate of the kernel", vector::GP, |a, _| a.int(0x50)).code(0x50 * 8 + 2).only_user(),
    ]);
}

/// Every transfer to an address that is not canonical: `#GP(0)` at the instruction, nothing pushed or popped.
fn transfers_to_nowhere() -> Vec<Case> {
    const CODE_SEGMENT: [u8; 3] = [0x8c, 0x4b, 0x38]; // mov [rbx+38h], cs
    fn far_pointer(a: &mut CodeAssembler, _: &Place) -> Built {
        a.mov(qword_ptr(rbx + 0x30), r15)?;
        a.db(&CODE_SEGMENT)
    }
    fn selectors(place: &Place) -> (u64, u64) {
        if place.user { (0x33, 0x2b) } else { (0x10, 0x18) }
    }
    let at = |name, insn: Build| case(name, vector::GP, insn).setup(|s, _| s.gpr[15] = ODD);
    vec![
        at("jmp", |a, _| a.jmp(r15)),
        at("jmp by a spilled register", |a, _| a.jmp(r10)).setup(|s, _| s.gpr[10] = 0x0000_8000_0000_0000),
        at("jmp by memory", |a, _| a.jmp(qword_ptr(rbx + 0x30))).before(|a, _| a.mov(qword_ptr(rbx + 0x30), r15)),
        at("call", |a, _| a.call(r15)),
        at("call by memory", |a, _| a.call(qword_ptr(rbx + 0x30))).before(|a, _| a.mov(qword_ptr(rbx + 0x30), r15)),
        at("ret", |a, _| a.ret()).before(|a, _| a.push(r15)).registers(|s, _| s.gpr[4] -= 8),
        at("ret with release", |a, _| a.ret_1(0x18)).before(|a, _| a.push(r15)).registers(|s, _| s.gpr[4] -= 8),
        at("ret behind a call", |a, _| a.ret())
            .before(|a, _| {
                let mut next = a.create_label();
                a.call(next)?;
                a.set_label(&mut next)?;
                a.mov(qword_ptr(rsp), r15)
            })
            .registers(|s, _| s.gpr[4] -= 8),
        at("far jmp", |a, _| a.db(&[0x48, 0xff, 0x6b, 0x30])).before(far_pointer),
        at("far call", |a, _| a.db(&[0x48, 0xff, 0x5b, 0x30])).before(far_pointer),
        at("far ret", |a, _| a.db(&[0x48, 0xcb]))
            .before(|a, _| {
                a.mov(eax, cs)?;
                a.push(rax)?;
                a.push(r15)
            })
            .registers(|s, p| {
                s.gpr[0] = selectors(p).0;
                s.gpr[4] -= 16;
            }),
        at("iret", |a, _| a.iretq())
            .before(|a, _| {
                a.mov(rbp, rsp)?;
                a.mov(eax, ss)?;
                a.push(rax)?;
                a.push(rbp)?;
                a.pushfq()?;
                a.mov(eax, cs)?;
                a.push(rax)?;
                a.push(r15)
            })
            .registers(|s, p| {
                s.gpr[0] = selectors(p).0;
                s.gpr[5] = s.gpr[4];
                s.gpr[4] -= 40;
            }),
        at("iret to a program", |a, _| a.iretq())
            .before(|a, _| {
                a.push(0x2b)?;
                a.push(rsp)?;
                a.push(0x202)?;
                a.push(0x33)?;
                a.push(r15)
            })
            .registers(|s, _| s.gpr[4] -= 40)
            .only_kernel(),
        at("sysret", |a, _| a.sysretq()).setup(|s, _| (s.gpr[1], s.gpr[11]) = (ODD, 0x202)).only_kernel(),
    ]
}

#[test]
fn transfers_to_nowhere_by_the_interpreter() {
    check_under(&transfers_to_nowhere(), &[]);
}

#[test]
fn transfers_to_nowhere_by_the_translator() {
    check(&transfers_to_nowhere());
}

/// The last page of the lower half, and code in it.
const TOP: u64 = 0x0000_7fff_ffff_f000;

fn at_the_top(kind: Kind, user: bool, offset: u64, build: fn(&mut CodeAssembler) -> Built) -> (Guest, Trap) {
    let mut guest = Guest::new(kind);
    let all = PRESENT | WRITE | USER;
    let tables = [0x60_0000, 0x60_1000, 0x60_2000, 0x60_3000];
    guest.put(crate::guest::CR3 + 255 * 8, &[tables[0] | all]);
    for (table, next) in tables.into_iter().zip(tables.into_iter().skip(1)) {
        guest.put(table + 511 * 8, &[next | all]);
    }
    guest.put(tables[2] + 511 * 8, &[tables[3] | PRESENT | WRITE | if user { USER } else { 0 }]);
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    assert!(guest.ram.write(tables[3] + offset, &a.assemble(TOP + offset).unwrap()));
    guest.ist(vector::GP);
    if user {
        guest.enter_user(TOP + offset);
    } else {
        guest.set(|state| state.rip = TOP + offset);
    }
    let trap = guest.trap();
    (guest, trap)
}

/// Direct branches over the end of the lower half.
fn branches_over_the_top(kinds: &[Kind]) {
    const BEYOND: u64 = 0x0000_8000_0000_0010;
    let branches: [(&str, u64, crate::guest::Build); 6] = [
        ("jmp", 0, |a| a.jmp(BEYOND)),
        ("call", 0, |a| a.call(BEYOND)),
        ("jcc", 2, |a| {
            a.xor(eax, eax)?;
            a.je(BEYOND)
        }),
        ("short jmp", 0, |a| a.db(&[0xeb, 0x20])),
        ("jrcxz", 2, |a| {
            a.xor(ecx, ecx)?;
            a.db(&[0xe3, 0x20])
        }),
        ("loop", 5, |a| {
            a.mov(ecx, 5)?;
            a.db(&[0xe2, 0x20])
        }),
    ];
    for &kind in kinds {
        for user in [false, true] {
            for (name, insn, build) in branches {
                let at = 0xff0;
                let (_, trap) = at_the_top(kind, user, at, build);
                let context = format!("{name} {user} {kind:?}");
                assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), TOP + at + insn), "{context}");
                assert_eq!(trap.rsp, if user { USER_STACK } else { STACK }, "{context}");
                assert_eq!(trap.state.gpr[1], if name == "loop" { 5 } else { 0 }, "{context}");
            }
        }
    }
}

#[test]
fn branches_over_the_top_by_the_interpreter() {
    branches_over_the_top(&[Kind::Interp]);
}

#[test]
fn branches_over_the_top_by_the_translator() {
    branches_over_the_top(&[Kind::Bt, Kind::Precise, Kind::Slow, Kind::Lockstep]);
}

/// Behind the last instruction of the lower half the fetch faults: RIP is where it should go on.
#[test]
fn over_the_top_step_by_step() {
    each(|kind| {
        for user in [false, true] {
            let (_, trap) = at_the_top(kind, user, 0xffd, |a| {
                a.inc(eax)?;
                a.nop()
            });
            assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), TOP + 0x1000), "{kind:?}");
            assert_eq!(trap.state.gpr[0], 1);
            // An instruction whose last byte would be beyond.
            let (_, trap) = at_the_top(kind, user, 0xffd, |a| a.db(&[0xff, 0xc0, 0xb8]));
            assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), TOP + 0xfff), "{kind:?}");
        }
    });
}

#[test]
fn arithmetic_and_opcodes() {
    fn clear(state: &mut CpuState, registers: &[usize]) {
        registers.iter().for_each(|&r| state.gpr[r] = 0);
    }
    check(&[
        case("div by zero", vector::DE, |a, _| a.div(r15d)).setup(|s, _| clear(s, &[15])),
        case("div by zero in R10", vector::DE, |a, _| a.div(r10)).setup(|s, _| clear(s, &[10])),
        case("div by zero in memory", vector::DE, |a, _| a.div(dword_ptr(rbx + 8))),
        case("div overflow", vector::DE, |a, _| a.div(rsi)).setup(|s, _| s.gpr[2] = s.gpr[6]),
        case("idiv overflow", vector::DE, |a, _| a.idiv(r11))
            .setup(|s, _| (s.gpr[0], s.gpr[2], s.gpr[11]) = (ODD, !0, !0)),
        case("div of a byte", vector::DE, |a, _| a.div(ch)).setup(|s, _| clear(s, &[1])),
        case("int3", vector::BP, |a, _| a.int3()).rip(Where::After),
        case("int1", vector::DB, |a, _| a.int1()).rip(Where::After),
        case("int 0x80", 0x80, |a, _| a.int(0x80)).rip(Where::After).software(),
        case("ud2", vector::UD, |a, _| a.ud2()),
        case("ud1", vector::UD, |a, _| a.ud1(eax, ecx)),
        case("an opcode of 32-bit mode", vector::UD, |a, _| a.db(&[0x06])),
        case("lock on a register", vector::UD, |a, _| a.db(&[0xf0, 0x01, 0xc0])),
        case("lock on mov", vector::UD, |a, _| a.db(&[0xf0, 0x89, 0x03])),
        case("16 bytes", vector::GP, |a, _| a.db(&[0x66; 15]).and_then(|()| a.db(&[0x90]))),
        case("sse without OSFXSR", vector::UD, |a, _| a.paddd(xmm0, xmm1)).setup(|s, _| s.cr4 &= !cr4::OSFXSR),
        case("avx without OSXSAVE", vector::UD, |a, _| a.vpaddd(xmm0, xmm1, xmm2)).setup(|s, _| s.cr4 &= !cr4::OSXSAVE),
        case("avx without its state", vector::UD, |a, _| a.vpaddd(xmm0, xmm1, xmm2)).setup(|s, _| s.xcr0 = 3),
        case("sse with EM", vector::UD, |a, _| a.paddd(xmm0, xmm1)).setup(|s, _| s.cr0 |= cr0::EM),
        case("sse with TS", vector::NM, |a, _| a.paddd(xmm0, xmm1)).setup(|s, _| s.cr0 |= cr0::TS),
        case("avx with TS", vector::NM, |a, _| a.vaddps(ymm0, ymm1, ymmword_ptr(rbx))).setup(|s, _| s.cr0 |= cr0::TS),
        case("x87 with TS", vector::NM, |a, _| a.fld1()).setup(|s, _| s.cr0 |= cr0::TS),
        case("mmx with TS", vector::NM, |a, _| a.paddb(mm0, mm1)).setup(|s, _| s.cr0 |= cr0::TS),
        case("x87 with EM", vector::NM, |a, _| a.fld1()).setup(|s, _| s.cr0 |= cr0::EM),
        case("fwait with TS and MP", vector::NM, |a, _| a.wait()).setup(|s, _| s.cr0 |= cr0::TS | cr0::MP),
        case("a pending x87 exception, by fwait", vector::MF, |a, _| a.wait()).before(zero_divide),
        case("a pending x87 exception, by fld1", vector::MF, |a, _| a.fld1()).before(zero_divide),
        case("a pending x87 exception, by a load", vector::MF, |a, _| a.fld(qword_ptr(rbx))).before(zero_divide),
        case("a pending x87 exception, by mmx", vector::MF, |a, _| a.paddb(mm0, mm1)).before(zero_divide),
        // AMD's CPUs have one more, which guests are not shown.
        case("a bit that MXCSR does not have", vector::GP, |a, _| a.ldmxcsr(dword_ptr(rbx + 0x80)))
            .before(|a, _| a.mov(dword_ptr(rbx + 0x80), 0x2_1f80)),
        case("a bit that MXCSR does not have, by avx", vector::GP, |a, _| a.vldmxcsr(dword_ptr(rbx + 0x80)))
            .before(|a, _| a.mov(dword_ptr(rbx + 0x80), 0x2_1f80)),
        case("sse zero divide", vector::XM, |a, _| a.divss(xmm0, xmm1)).before(unmask),
        case("avx zero divide from memory", vector::XM, |a, _| a.vdivps(ymm0, ymm0, ymmword_ptr(rbx + 0x40)))
            .before(unmask),
        case("sse exceptions without OSXMMEXCPT", vector::UD, |a, _| a.divss(xmm0, xmm1))
            .setup(|s, _| s.cr4 &= !cr4::OSXMMEXCPT)
            .before(unmask),
    ]);
}

impl Case {
    /// INT n: no error code although the vector could be one with.
    fn software(self) -> Self {
        Self { error: None, ..self }
    }
}

/// Leaves an unmasked x87 exception behind.
fn zero_divide(a: &mut CodeAssembler, _: &Place) -> Built {
    a.mov(word_ptr(rbx + 0x80), 0x37b)?;
    a.fldcw(word_ptr(rbx + 0x80))?;
    a.fldz()?;
    a.fld1()?;
    a.fdiv_2(st0, st1)
}

/// Unmasks the zero-divide exception of SSE.
fn unmask(a: &mut CodeAssembler, _: &Place) -> Built {
    a.mov(dword_ptr(rbx + 0x80), 0x1d80)?;
    a.ldmxcsr(dword_ptr(rbx + 0x80))?;
    a.xorps(xmm1, xmm1)?;
    a.mov(dword_ptr(rbx + 0x84), 0x3f80_0000)?;
    a.movss(xmm0, dword_ptr(rbx + 0x84))
}

/// Single step: a #DB behind every instruction, also of what the translator would run as a block.
#[test]
fn single_step() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let mut places = Vec::new();
        let mut at = guest.code(CODE, |a| {
            a.push(0x102)?;
            a.popfq()
        });
        let steps: [fn(&mut CodeAssembler) -> Built; 5] =
            [|a| a.mov(eax, 5), |a| a.add(qword_ptr(DATA), rax), |a| a.push(rax), |a| a.pop(rcx), |a| a.cpuid()];
        for step in steps {
            at = guest.code(at, step);
            places.push(at);
        }
        // A jump, then the flag goes.
        let jump = guest.code(at, |a| a.jmp(CODE + 0x100));
        assert!(jump < CODE + 0x100);
        places.push(CODE + 0x100);
        guest.code(CODE + 0x100, |a| {
            a.push(2)?;
            a.popfq()?;
            a.nop()?;
            a.out(STOP, al)?;
            a.nop()
        });
        // PUSH and the instruction behind POPF that clears the flag... the trap of POPF itself still comes.
        places.extend([CODE + 0x102, CODE + 0x103]);
        for place in places {
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip), (vector::DB, place), "{kind:?}");
            assert_eq!(trap.state.dr[6] & 0x4000, 0x4000);
            assert_eq!(trap.state.rflags & rflags::TF, 0);
        }
        guest.stop();
        assert_eq!(guest.word(DATA), 5);
    });
}

/// Instruction and data breakpoints are the interpreter's; a guest that sets them leaves the translator.
#[test]
fn instruction_breakpoint() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let second = guest.code(CODE, |a| {
            a.mov(eax, 1)?;
            a.mov(r15, CODE + 0x40)?;
            a.mov(dr0, r15)?;
            a.mov(r15d, 0x402)?;
            a.mov(dr7, r15)?;
            a.jmp(CODE + 0x40)
        });
        assert!(second < CODE + 0x40);
        guest.code(CODE + 0x40, |a| {
            a.inc(eax)?;
            a.out(STOP, al)?;
            a.nop()
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.state.gpr[0]), (vector::DB, CODE + 0x40, 1));
        assert_eq!(trap.state.dr[6] & 15, 1);
        assert_ne!(trap.rflags & rflags::RF, 0, "or it comes again for ever");
        assert_eq!(guest.stop().gpr[0], 2);
    });
}

#[test]
fn double_faults() {
    each(|kind| {
        // The page fault's gate is not present.
        let mut guest = Guest::new(kind);
        guest.ist(vector::DF);
        assert!(guest.ram.write(IDT + 14 * 16 + 5, &[0x0e]));
        guest.map(DATA, 0);
        guest.code(CODE, |a| a.mov(rax, qword_ptr(DATA)));
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (vector::DF, Some(0), CODE));
        assert_eq!((trap.state.cr2, trap.rsp), (DATA, STACK));

        // The stack of the page fault is not there: Linux's way to notice a stack overflow.
        let mut guest = Guest::new(kind);
        guest.ist(vector::DF);
        guest.map(DATA, 0);
        guest.code(CODE, |a| {
            a.mov(rsp, DATA + 0x1000)?;
            a.xor(eax, eax)?;
            a.push(rax)
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error, trap.rsp), (vector::DF, Some(0), DATA + 0x1000));
        assert_eq!(trap.state.cr2 & !0xfff, DATA, "the page of the stack, as Linux looks at it");

        // #UD whose handler's stack selector... #UD then #GP is not double: the second is delivered.
        let mut guest = Guest::new(kind);
        guest.put(IDT + 6 * 16, &[0, 0]);
        guest.code(CODE, |a| a.ud2());
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error), (vector::GP, Some(6 * 8 + 2 + 1)));

        // A program's fault with a bad stack in the TSS: #SS would come, on the same bad stack.
        let mut guest = Guest::new(kind);
        guest.ist(vector::DF);
        guest.put(TSS + 4, &[DATA]);
        guest.map(DATA - 0x1000, 0);
        guest.code(USER_CODE, |a| a.ud2());
        guest.enter_user(USER_CODE);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error), (vector::DF, Some(0)), "{trap:x?}");
    });
}

#[test]
fn triple_fault() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(dword_ptr(DATA), 0)?;
            a.mov(qword_ptr(DATA + 4), 0)?;
            a.lidt(ptr(DATA))?;
            a.mov(eax, 7)?;
            a.div(dword_ptr(DATA))
        });
        assert_eq!(guest.run(), Exit::TripleFault);
        assert_eq!(guest.vcpu.state().gpr[0], 7, "the state of the last instruction");

        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(rsp, DATA)?;
            a.push(rax)
        });
        guest.map(DATA - 0x1000, 0);
        assert_eq!(guest.run(), Exit::TripleFault);
    });
}

/// A bit test whose address has 32 bits and no base register: the bit's distance wraps with it.
#[test]
fn far_bits_of_32_bit_addresses() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let at = DATA + 0x100;
        guest.code(CODE, |a| {
            a.mov(r9, 0xff_ffff_ffff_u64)?;
            a.db(&[0x67, 0x4c, 0x0f, 0xb3, 0x0c, 0x25])?; // btr [address], r9
            a.db(&(at as u32).to_le_bytes())?;
            a.setc(al)?;
            a.out(STOP, al)
        });
        guest.put(at - 8, &[u64::MAX, u64::MAX]);
        assert_eq!(guest.stop().gpr[0] as u8, 1, "{kind:?}");
        assert_eq!((guest.word(at - 8), guest.word(at)), (u64::MAX >> 1, u64::MAX), "{kind:?}");
    });
}
