//! Debug registers and alignment checks: what traps, when, and what DR6 says. As the CPU does it: the alignment table was made on one.

use cpu::{cr0, cr4, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{Build, CODE, DATA, Guest, INTERRUPT_STACK, STOP, USER_CODE, USER_DATA, USER_STACK, each};

const EXECUTE: u64 = 0;
const WRITES: u64 = 1;
const PORTS: u64 = 2;
const ALL: u64 = 3;
const BYTE: u64 = 0;
const WORD: u64 = 1;
const QWORD: u64 = 2;
const DWORD: u64 = 3;

/// DR7 with breakpoint `i` on.
fn control(i: u64, kind: u64, length: u64) -> u64 {
    0x400 | 2 << (i * 2) | (kind | length << 2) << (16 + i * 4)
}

/// Every form of access: traps behind the instruction, which has been done.
#[test]
fn data_breakpoints() {
    // Whether it reads, whether it writes, at DATA + 0x100 up to 8 bytes.
    let cases: [(&str, Build, bool, bool); 25] = [
        ("load", |a| a.mov(eax, dword_ptr(rbx + 0x100)), true, false),
        ("store", |a| a.mov(dword_ptr(rbx + 0x100), eax), false, true),
        ("store of a byte inside", |a| a.mov(byte_ptr(rbx + 0x103), al), false, true),
        ("misaligned, over the start", |a| a.mov(qword_ptr(rbx + 0xfc), rax), false, true),
        ("add to memory", |a| a.add(dword_ptr(rbx + 0x100), 1), true, true),
        ("compare", |a| a.cmp(dword_ptr(rbx + 0x100), 1), true, false),
        ("lock xadd", |a| a.lock().xadd(dword_ptr(rbx + 0x100), eax), true, true),
        ("cmpxchg that fails", |a| a.cmpxchg(dword_ptr(rbx + 0x100), ecx), true, true),
        ("cmpxchg16b", |a| a.cmpxchg16b(xmmword_ptr(rbx + 0x100)), true, true),
        ("bts far", |a| a.bts(dword_ptr(rbx), esi), true, true),
        ("xchg", |a| a.xchg(byte_ptr(rbx + 0x100), al), true, true),
        ("push", |a| a.push(rax), false, true),
        ("pop", |a| a.pop(r9), true, false),
        ("call", |a| a.call(CODE + 0x400), false, true),
        ("ret", |a| a.ret(), true, false),
        ("movsd", |a| a.movsd(), true, false),
        ("stosb", |a| a.stosb(), false, true),
        ("sse load", |a| a.movups(xmm0, xmmword_ptr(rbx + 0xf8)), true, false),
        ("avx store", |a| a.vmovdqu(ymmword_ptr(rbx + 0xe8), ymm0), false, true),
        ("x87 load", |a| a.fld(qword_ptr(rbx + 0x100)), true, false),
        ("sgdt", |a| a.sgdt(ptr(rbx + 0xfa)), false, true),
        ("lea", |a| a.lea(rax, ptr(rbx + 0x100)), false, false),
        ("prefetch", |a| a.prefetcht0(byte_ptr(rbx + 0x100)), false, false),
        ("just before", |a| a.mov(dword_ptr(rbx + 0xfc), eax), false, false),
        ("just behind", |a| a.mov(dword_ptr(rbx + 0x108), eax), false, false),
    ];
    each(|kind| {
        let mut guest = Guest::new(kind);
        for (name, build, reads, writes) in cases {
            for watched in [WRITES, ALL] {
                for number in [0, 3] {
                    guest.reset();
                    assert!(guest.ram.write(CODE, &[0x90; 0x500]));
                    let at = guest.code(CODE, |a| {
                        a.mov(dr7, r8)?;
                        a.nop()
                    });
                    let behind = guest.code(at, build);
                    guest.put(DATA + 0x100, &[CODE + 0x400]);
                    for place in [behind, CODE + 0x400] {
                        guest.code(place, |a| {
                            a.nop()?;
                            a.out(STOP, al)
                        });
                    }
                    guest.set(|state| {
                        state.dr[number as usize] = DATA + 0x105; // low bits do not count
                        state.dr[6] = 0xffff_0ff0;
                        state.gpr[3] = DATA;
                        state.gpr[4] = DATA + if matches!(name, "push" | "call") { 0x108 } else { 0x100 };
                        (state.gpr[6], state.gpr[7]) =
                            (DATA + 0x100, DATA + if name == "movsd" { 0x200 } else { 0x100 });
                        if name == "bts far" {
                            state.gpr[6] = 0x107 * 8;
                        }
                        state.gpr[8] = control(number, watched, QWORD);
                    });
                    let trap = guest.trap_or_stop();
                    let context = format!("{name} {watched} {number} {kind:?}");
                    let hit = writes || (reads && watched == ALL);
                    assert_eq!(trap.is_some(), hit, "{context}");
                    let Some(trap) = trap else { continue };
                    assert_eq!((trap.vector, trap.error), (vector::DB, None), "{context}");
                    let next = if matches!(name, "call" | "ret") { CODE + 0x400 } else { behind };
                    assert_eq!(trap.rip, next, "{context}");
                    assert_eq!(trap.state.dr[6], 0xffff_0ff0 | 1 << number, "{context}");
                    assert_eq!(trap.rflags & rflags::RF, 0, "{context}");
                }
            }
        }
    });
}

#[test]
fn port_breakpoints() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        for (extensions, watched, hit) in [(0, PORTS, false), (cr4::DE, PORTS, true), (cr4::DE, ALL, false)] {
            for build in [(|a| a.in_(eax, 0x70)) as Build, |a| a.out(0x70, al), |a| a.insb(), |a| a.outsd()] {
                guest.reset();
                let behind = guest.code(CODE, build);
                guest.code(behind, |a| {
                    a.nop()?;
                    a.out(STOP, al)
                });
                guest.set(|state| {
                    state.cr4 |= extensions;
                    state.dr[1] = 0x71;
                    state.dr[7] = control(1, watched, WORD);
                    (state.gpr[2], state.gpr[6], state.gpr[7]) = (0x70, DATA, DATA);
                });
                let trap = guest.trap_or_stop().map(|trap| (trap.vector, trap.rip, trap.state.dr[6] & 15));
                assert_eq!(trap, hit.then_some((vector::DB, behind, 2)), "{kind:?}");
            }
        }
    });
}

/// A fault wins over what the instruction hit before it; once it can complete, it traps.
#[test]
fn faults_before_traps() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let behind = guest.code(CODE, |a| a.push(qword_ptr(rbx)));
        guest.map(DATA + 0x1000, 0);
        guest.set(|state| {
            state.dr[0] = DATA;
            state.dr[6] = 0;
            state.dr[7] = control(0, ALL, QWORD);
            (state.gpr[3], state.gpr[4]) = (DATA, DATA + 0x1008);
        });
        guest.ist(vector::PF);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.state.dr[6]), (vector::PF, CODE, 0), "{kind:?}");
        guest.map(DATA + 0x1000, (DATA + 0x1000) | 3);
        guest.set(|state| (state.rip, state.gpr[4]) = (CODE, DATA + 0x1008));
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.state.dr[6]), (vector::DB, behind, 1), "{kind:?}");
    });
}

/// A repeated instruction traps behind each turn that hits, and goes on.
#[test]
fn repeated_instructions() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let behind = guest.code(CODE, |a| a.rep().movsd());
        guest.code(behind, |a| {
            a.nop()?;
            a.out(STOP, al)
        });
        guest.set(|state| {
            state.dr[2] = DATA + 0x208;
            state.dr[7] = control(2, WRITES, QWORD);
            (state.gpr[1], state.gpr[6], state.gpr[7]) = (5, DATA, DATA + 0x200);
        });
        for left in [2, 1] {
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip, trap.state.gpr[1]), (vector::DB, CODE, left), "{kind:?}");
            assert_ne!(trap.rflags & rflags::RF, 0, "in the middle of an instruction");
        }
        assert_eq!(guest.stop().gpr[1], 0);
    });
}

/// Single step and breakpoints are one trap; several breakpoints, too. MOV SS holds it back, and DR6 keeps what it had.
#[test]
fn together() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let at = guest.code(CODE, |a| {
            a.push(0x102)?;
            a.popfq()
        });
        let behind = guest.code(at, |a| a.add(dword_ptr(rbx), 1));
        guest.set(|state| {
            state.gpr[3] = DATA;
            (state.dr[0], state.dr[1], state.dr[3]) = (DATA, DATA + 3, DATA + 4);
            state.dr[6] = 0xffff_0ff0 | 8;
            state.dr[7] = control(0, ALL, BYTE) | control(1, WRITES, BYTE) | control(3, WRITES, DWORD);
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip), (vector::DB, behind), "{kind:?}");
        assert_eq!(trap.state.dr[6], 0xffff_0ff0 | 1 << 14 | 8 | 3, "{kind:?}");

        // MOV SS from watched memory, with an instruction breakpoint behind it.
        guest.reset();
        let next = guest.code(CODE, |a| a.mov(ss, word_ptr(rbx)));
        let behind = guest.code(next, |a| a.inc(eax));
        guest.put(DATA, &[0x18]);
        guest.set(|state| {
            state.gpr[3] = DATA;
            (state.dr[0], state.dr[1]) = (DATA, next);
            state.dr[7] = control(0, ALL, WORD) | control(1, EXECUTE, BYTE);
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.state.gpr[0] & 1), (vector::DB, behind, 1), "{kind:?}");
        assert_eq!(trap.state.dr[6] & 15, 1, "{kind:?}");
    });
}

/// A program's breakpoints; the frame of an exception, and what the CPU reads of tables, hit none.
#[test]
fn programs() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let next = guest.code(USER_CODE, |a| a.mov(byte_ptr(rbx + 7), 1));
        guest.code(next, |a| a.int3());
        guest.enter_user(USER_CODE);
        guest.set(|state| {
            state.gpr[3] = USER_DATA;
            (state.dr[0], state.dr[1]) = (INTERRUPT_STACK - 16, USER_DATA);
            state.dr[7] = control(0, ALL, QWORD) | control(1, WRITES, QWORD);
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.cs), (vector::DB, next, 0x33), "{kind:?}");
        assert_eq!(trap.state.dr[6] & 15, 2, "{kind:?}");
        guest.set(|state| {
            crate::guest::user_segments(state);
            state.rip = next;
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.state.dr[6] & 15), (vector::BP, 2), "{kind:?}");
    });
}

/// The instruction, the alignment that it needs, and whether less is `#GP` even at some other alignment.
#[test]
fn alignment() {
    let cases: [(&str, Build, u64); 46] = [
        ("byte", |a| a.mov(al, byte_ptr(rbx)), 1),
        ("word", |a| a.mov(ax, word_ptr(rbx)), 2),
        ("movzx of a word", |a| a.movzx(eax, word_ptr(rbx)), 2),
        ("doubleword", |a| a.mov(eax, dword_ptr(rbx)), 4),
        ("store", |a| a.mov(qword_ptr(rbx), rax), 8),
        ("add to memory", |a| a.add(qword_ptr(rbx), 1), 8),
        ("lock xadd", |a| a.lock().xadd(dword_ptr(rbx), eax), 4),
        ("cmpxchg8b", |a| a.cmpxchg8b(qword_ptr(rbx)), 8),
        ("xchg", |a| a.xchg(dword_ptr(rbx), eax), 4),
        ("bt", |a| a.bt(qword_ptr(rbx), rax), 8),
        ("push", |a| a.push(rax), 8),
        ("push of a word", |a| a.push(ax), 2),
        ("pop", |a| a.pop(rax), 8),
        ("pop of a segment", |a| a.db(&[0x0f, 0xa9]), 2),
        ("pushfq", |a| a.pushfq(), 8),
        ("enter", |a| a.enter(0, 0), 8),
        ("call", |a| a.call(USER_CODE + 0x400), 8),
        ("movsq, source", |a| a.movsq(), 8),
        ("rep stosd", |a| a.rep().stosd(), 4),
        ("movss", |a| a.movss(xmm0, dword_ptr(rbx)), 4),
        ("movsd", |a| a.movsd_2(xmm0, qword_ptr(rbx)), 8),
        ("movups", |a| a.movups(xmm0, xmmword_ptr(rbx)), 1),
        ("movdqu, store", |a| a.movdqu(xmmword_ptr(rbx), xmm0), 1),
        ("vaddps", |a| a.vaddps(ymm0, ymm0, ymmword_ptr(rbx)), 1),
        ("vmaskmovps", |a| a.vmaskmovps(xmm0, xmm1, xmmword_ptr(rbx)), 1),
        ("vcvtph2ps", |a| a.vcvtph2ps(xmm0, qword_ptr(rbx)), 1),
        ("pmovzxbd", |a| a.pmovzxbd(xmm0, dword_ptr(rbx)), 4),
        ("maskmovdqu", |a| a.maskmovdqu(xmm0, xmm1), 8),
        ("fld, 32 bits", |a| a.fld(dword_ptr(rbx)), 4),
        ("fld, 80 bits", |a| a.fld(tbyte_ptr(rbx)), 8),
        ("fbstp", |a| a.fbstp(tbyte_ptr(rbx)), 8),
        ("fild, 16 bits", |a| a.fild(word_ptr(rbx)), 2),
        ("fnstcw", |a| a.fnstcw(word_ptr(rbx)), 2),
        ("fnstenv", |a| a.fnstenv(ptr(rbx)), 4),
        ("fnstenv, 16 bits", |a| a.db(&[0x66, 0xd9, 0x33]), 2),
        ("fnsave", |a| a.fnsave(ptr(rbx)), 4),
        ("stmxcsr", |a| a.stmxcsr(dword_ptr(rbx)), 4),
        ("movq, mmx", |a| a.movq(mm0, qword_ptr(rbx)), 8),
        ("lgs, 16 bits", |a| a.db(&[0x66, 0x0f, 0xb5, 0x03]), 2),
        ("lgs", |a| a.db(&[0x0f, 0xb5, 0x03]), 4),
        ("lgs, 64 bits", |a| a.db(&[0x48, 0x0f, 0xb5, 0x03]), 8),
        ("sgdt", |a| a.sgdt(ptr(rbx)), 1),
        ("smsw", |a| a.smsw(word_ptr(rbx)), 1),
        ("str", |a| a.str(word_ptr(rbx)), 1),
        ("mov of a segment to memory", |a| a.mov(word_ptr(rbx), ds), 2),
        ("verr", |a| a.verr(word_ptr(rbx)), 2),
    ];
    each(|kind| {
        let mut guest = Guest::new(kind);
        for (name, build, to) in cases {
            for offset in 0..9 {
                guest.reset();
                assert!(guest.ram.write(USER_CODE, &[0x90; 0x500]));
                assert!(guest.ram.write(USER_DATA, &[0; 0x200]));
                let behind = guest.code(USER_CODE, build);
                for place in [behind, USER_CODE + 0x400] {
                    guest.code(place, |a| a.int3());
                }
                guest.enter_user(USER_CODE);
                guest.set(|state| {
                    state.cr0 |= cr0::AM;
                    state.rflags |= rflags::AC;
                    let at = USER_DATA + 0x100 + offset;
                    (state.gpr[3], state.gpr[4], state.gpr[6], state.gpr[7]) = (at, at, at, USER_DATA);
                    state.gpr[1] = 1;
                    if matches!(name, "rep stosd" | "maskmovdqu") {
                        state.gpr[7] = at;
                    }
                });
                let trap = guest.trap();
                let context = format!("{name}, {offset} {kind:?}");
                if offset % to == 0 {
                    assert_eq!(trap.vector, vector::BP, "{context}: {trap:x?}");
                } else {
                    assert_eq!((trap.vector, trap.error, trap.rip), (vector::AC, Some(0), USER_CODE), "{context}");
                    assert_eq!(trap.rsp, USER_DATA + 0x100 + offset, "{context}");
                }
            }
        }
    });
}

/// Where nobody asks for it, where something else comes first.
#[test]
fn alignment_is_checked_only_on_demand() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let mut run = |user: bool, mask: bool, check: bool, build: Build, at: u64| {
            guest.reset();
            guest.ist(vector::GP);
            let code = if user { USER_CODE } else { CODE };
            let behind = guest.code(code, build);
            guest.code(behind, |a| a.int3());
            if user {
                guest.enter_user(code);
            }
            guest.set(|state| {
                state.cr0 = (state.cr0 & !cr0::AM) | if mask { cr0::AM } else { 0 };
                state.rflags |= if check { rflags::AC } else { 0 };
                state.gpr[3] = at;
            });
            guest.map(USER_DATA + 0x1000, 0);
            guest.trap().vector
        };
        let load: Build = |a| a.mov(rax, qword_ptr(rbx));
        assert_eq!(run(true, true, true, load, USER_DATA + 4), vector::AC);
        assert_eq!(run(true, false, true, load, USER_DATA + 4), vector::BP);
        assert_eq!(run(true, true, false, load, USER_DATA + 4), vector::BP);
        assert_eq!(run(false, true, true, load, DATA + 4), vector::BP, "the kernel's are not checked");
        // Page faults come later, #GP and #SS earlier.
        assert_eq!(run(true, true, true, load, USER_DATA + 0x1001), vector::AC);
        assert_eq!(run(true, true, true, load, 1 << 63 | 1), vector::GP);
        assert_eq!(run(true, true, true, |a| a.movaps(xmm0, xmmword_ptr(rbx)), USER_DATA + 4), vector::GP);
        assert_eq!(run(true, true, true, |a| a.cmpxchg16b(xmmword_ptr(rbx)), USER_DATA + 8), vector::GP);
        assert_eq!(run(true, true, true, |a| a.fxsave(ptr(rbx)), USER_DATA + 8), vector::GP);
        assert_eq!(run(true, true, true, |a| a.fxsave(ptr(rbx)), USER_DATA + 2), vector::AC);
        assert_eq!(run(true, true, true, |a| a.xsave(ptr(rbx)), USER_DATA + 3), vector::AC);
    });
}

/// A program sets AC by itself, and the kernel's entry clears it.
#[test]
fn alignment_flag_of_a_program() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE + 0x8000, |a| {
            a.mov(eax, dword_ptr(DATA as u32 as i32 + 1))?;
            a.sysretq()
        });
        guest.code(USER_CODE, |a| {
            a.mov(ebx, USER_DATA as u32)?;
            a.mov(eax, dword_ptr(rbx + 1))?;
            a.pushfq()?;
            a.or(dword_ptr(rsp), 1 << 18)?;
            a.popfq()?;
            a.syscall()
        });
        let at = guest.code(USER_CODE + 0x100, |a| a.mov(eax, dword_ptr(rbx + 4)));
        guest.code(at, |a| a.mov(eax, dword_ptr(rbx + 1)));
        let mut code = vec![0; 0x100];
        assert!(guest.ram.read(USER_CODE, &mut code));
        let end = code.windows(2).position(|bytes| bytes == [0x0f, 0x05]).unwrap() as u64 + 2;
        guest.code(USER_CODE + end, |a| a.jmp(USER_CODE + 0x100));
        guest.enter_user(USER_CODE);
        guest.set(|state| state.cr0 |= cr0::AM);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.rsp), (vector::AC, at, USER_STACK), "{kind:?}");
        assert_ne!(trap.rflags & rflags::AC, 0);
    });
}
