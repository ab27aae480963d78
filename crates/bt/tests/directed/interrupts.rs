//! When interrupts are delivered, and that none is lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cpu::{Exit, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{
    Built, CODE, DATA, Guest, Kind, LOG, RAISE, RAISE_LATER, STACK, STOP, USER_CODE, USER_STACK, each, each_translator,
};

/// Code that makes vector 0x40 pending with interrupts off, then `first` and `second`. Returns the addresses of and behind `second`.
fn pending(
    guest: &Guest,
    first: fn(&mut CodeAssembler) -> Built,
    second: fn(&mut CodeAssembler) -> Built,
) -> (u64, u64) {
    let at = guest.code(CODE, |a| {
        a.cli()?;
        a.mov(eax, 0x40)?;
        a.out(RAISE, al)?;
        a.mov(eax, 0x18)?;
        a.xor(ebx, ebx)?;
        first(a)
    });
    let behind = guest.code(at, second);
    guest.code(behind, |a| {
        a.inc(ebx)?;
        a.nop()?;
        a.out(STOP, al)?;
        a.nop()
    });
    (at, behind)
}

#[test]
fn not_with_interrupts_off() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            let (mut again, mut f) = (a.create_label(), a.create_label());
            a.mov(eax, 0x40)?;
            a.out(RAISE, al)?;
            a.mov(ecx, 1000)?;
            a.set_label(&mut again)?;
            a.call(f)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.out(STOP, al)?;
            a.sti()?;
            a.nop()?;
            a.nop()?;
            a.set_label(&mut f)?;
            a.ret()
        });
        let state = guest.stop();
        assert_eq!(guest.fixture.waiting(), 1);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip), (0x40, state.rip + 2));
        assert_eq!((trap.rflags & rflags::IF, trap.state.rflags & rflags::IF), (rflags::IF, 0));
    });
}

/// The instruction behind STI still runs without interrupts.
#[test]
fn shadow_of_sti() {
    let cases: [(&str, crate::guest::Build); 9] = [
        ("mov", |a| a.mov(bl, 2)),
        ("store", |a| a.mov(qword_ptr(DATA), rax)),
        ("flags", |a| a.add(eax, eax)),
        ("push", |a| a.push(rax)),
        ("cpuid", |a| a.cpuid()),
        ("sti", |a| a.sti()),
        ("hlt", |a| a.hlt()),
        ("rdmsr", |a| a.nop()),
        ("swapgs", |a| a.swapgs()),
    ];
    each(|kind| {
        for (name, second) in cases {
            let mut guest = Guest::new(kind);
            let (_, behind) = pending(&guest, |a| a.sti(), second);
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip), (0x40, behind), "{name} {kind:?}");
            assert_eq!(guest.stop().gpr[3] & 1, 1);
        }
        // Into jumps.
        let jumps: [fn(&mut CodeAssembler) -> Built; 5] = [
            |a| a.jmp(CODE + 0x800),
            |a| a.call(CODE + 0x800),
            |a| a.jmp(qword_ptr(DATA)),
            |a| a.jmp(CODE + 0x1800),
            |a| a.je(CODE + 0x800),
        ];
        for (i, jump) in jumps.into_iter().enumerate() {
            let mut guest = Guest::new(kind);
            guest.put(DATA, &[CODE + 0x800]);
            pending(&guest, |a| a.sti(), jump);
            let target = if i == 3 { CODE + 0x1800 } else { CODE + 0x800 };
            guest.code(target, |a| a.out(STOP, al));
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip), (0x40, target), "jump {i} {kind:?}");
        }
    });
}

#[test]
fn shadow_of_sti_hides_cli() {
    let cases: [fn(&mut CodeAssembler) -> Built; 2] = [|a| a.cli(), |a| a.popfq()];
    each(|kind| {
        for case in cases {
            let mut guest = Guest::new(kind);
            guest.put(STACK, &[2]);
            pending(&guest, |a| a.sti(), case);
            guest.stop();
            assert_eq!(guest.fixture.waiting(), 1, "{kind:?}");
        }
    });
}

#[test]
fn shadow_of_stack_segment() {
    let cases: [fn(&mut CodeAssembler) -> Built; 1] = [|a| a.mov(ss, eax)];
    each(|kind| {
        for case in cases {
            let mut guest = Guest::new(kind);
            // STI covers the load, the load covers what follows.
            let (_, behind) = pending(&guest, |a| a.sti(), case);
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip), (0x40, behind + 2), "{kind:?}");
            assert_eq!(trap.state.gpr[3], 1);
        }
    });
}

#[test]
fn popf_and_iret_have_no_shadow() {
    each_translator(|kind| {
        let mut guest = Guest::new(kind);
        let (_, behind) = pending(&guest, |a| a.push(0x293), |a| a.popfq());
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.rflags), (0x40, behind, 0x293), "{kind:?}");

        for (user, target) in [(false, CODE + 0x800), (true, USER_CODE), (true, USER_CODE + 0x1000)] {
            let mut guest = Guest::new(kind);
            guest.code(target, |a| a.mov(eax, 77));
            let frame: [u64; 5] = if user {
                [target, 0x33, 0x202, USER_STACK, 0x2b]
            } else {
                [target, 0x10, 0x8d7 | 0x200, STACK - 0x100, 0x18]
            };
            guest.put(STACK - 40, &frame);
            guest.set(|state| state.gpr[4] = STACK - 40);
            pending(&guest, |_| Ok(()), |a| a.iretq());
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip, trap.rflags, trap.cs), (0x40, target, frame[2], frame[1]), "{kind:?}");
            assert_eq!((trap.rsp, trap.ss), (frame[3], frame[4]));
            assert_eq!(trap.state.gpr[0], 0x18, "the target has not run");
        }

        let mut guest = Guest::new(kind);
        guest.code(USER_CODE, |a| a.mov(eax, 77));
        guest.set(|state| (state.gpr[1], state.gpr[11]) = (USER_CODE, 0x247));
        pending(&guest, |_| Ok(()), |a| a.sysretq());
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.rflags, trap.cs), (0x40, USER_CODE, 0x247, 0x33), "{kind:?}");
    });
}

#[test]
fn halt() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let behind = guest.code(CODE, |a| {
            a.mov(eax, 0x41)?;
            a.out(RAISE_LATER, al)?;
            a.sti()?;
            a.hlt()
        });
        guest.code(behind, |a| {
            a.cli()?;
            a.hlt()?;
            a.out(STOP, al)
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip), (0x41, behind));
        assert_eq!(guest.run(), Exit::Stuck);
        let state = guest.vcpu.state();
        assert_eq!((state.rip, state.halted), (behind + 2, true));
        // An NMI wakes it all the same.
        guest.fixture.raise_nmi();
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip), (vector::NMI, behind + 2));
        guest.stop();
    });
}

#[test]
fn nmi_blocks_nmi() {
    each_translator(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(eax, 1)?;
            a.out(STOP, al)?;
            a.nop()?;
            a.out(STOP, al)?;
            a.nop()
        });
        guest.stop();
        guest.fixture.raise_nmi();
        let first = guest.trap();
        assert_eq!(first.vector, vector::NMI);
        guest.fixture.raise_nmi();
        // Only behind the handler's IRET.
        let second = guest.trap();
        assert_eq!((second.vector, second.rip, second.rsp), (vector::NMI, first.rip, STACK));
        guest.stop();
    });
}

/// Every kind of endless loop can be interrupted.
#[test]
fn endless_loops() {
    let loops: [(&str, crate::guest::Build); 7] = [
        ("jump to itself", |a| a.jmp(CODE + 0x400)),
        ("jump to another page", |a| a.jmp(CODE + 0x1000)),
        ("indirect jump", |a| a.jmp(rbp)),
        ("loop", |a| {
            a.mov(ecx, 5)?;
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.inc(rcx)?;
            a.loop_(again)
        }),
        ("calls", |a| {
            a.lea(rsp, ptr(rsp + 8))?;
            a.call(rbp)
        }),
        ("return to itself", |a| {
            a.push(rbp)?;
            a.ret()
        }),
        ("long stores", |a| {
            a.mov(edi, DATA as u32)?;
            a.mov(ecx, 0x1000)?;
            a.rep().stosb()?;
            a.jmp(CODE + 0x400)
        }),
    ];
    each(|kind| {
        for (name, body) in loops {
            println!("{name}");
            let mut guest = Guest::new(kind);
            guest.code(CODE, |a| {
                a.mov(eax, 0x42)?;
                a.mov(ebp, CODE as u32 + 0x400)?;
                a.out(RAISE_LATER, al)?;
                a.sti()?;
                a.jmp(CODE + 0x400)
            });
            guest.code(CODE + 0x400, body);
            guest.code(CODE + 0x1000, |a| a.jmp(CODE + 0x400));
            let trap = guest.trap();
            assert_eq!(trap.vector, 0x42);
        }
    });
}

/// A guest that counts interrupts while another thread raises them as fast as it can; what it does meanwhile must stay right.
fn flood(kind: Kind, user: bool, number: u64) {
    let mut guest = Guest::new(kind);
    let count = DATA + 0x100;
    guest.gate(0x40, CODE + 0xc00, 0x8e);
    guest.code(CODE + 0xc00, |a| {
        a.push(rax)?;
        a.mov(rax, qword_ptr(count))?;
        a.inc(rax)?;
        a.mov(qword_ptr(count), rax)?;
        a.xor(eax, eax)?; // All flags change.
        a.pop(rax)?;
        a.iretq()
    });
    let at = if user { USER_CODE } else { CODE };
    let data = if user { crate::guest::USER_DATA } else { DATA };
    // System calls: 1 reads the count, 0 ends.
    guest.code(CODE + 0x8000, |a| {
        let mut end = a.create_label();
        a.test(eax, eax)?;
        a.je(end)?;
        a.mov(rax, qword_ptr(count))?;
        a.sysretq()?;
        a.set_label(&mut end)?;
        a.out(STOP, al)?;
        a.nop()
    });
    guest.code(at, |a| {
        let (mut again, mut wrong, mut f) = (a.create_label(), a.create_label(), a.create_label());
        a.xor(r12d, r12d)?;
        a.mov(ebx, data as u32)?;
        a.set_label(&mut again)?;
        a.inc(r12)?;
        a.add(qword_ptr(rbx), 1)?;
        a.cmp(qword_ptr(rbx), r12)?;
        a.jne(wrong)?;
        a.mov(r9, r12)?;
        a.stc()?;
        a.call(f)?;
        a.cmp(r10, r12)?;
        a.jne(wrong)?;
        // Elements over three pages.
        a.lea(rdi, ptr(rbx + 0x1ff8))?;
        a.mov(ecx, 0x202)?;
        a.mov(rax, r12)?;
        a.rep().stosq()?;
        a.cmp(qword_ptr(rbx + 0x3000), r12)?;
        a.jne(wrong)?;
        if user {
            a.mov(eax, 1)?;
            a.syscall()?;
        } else {
            a.pushfq()?;
            a.cli()?;
            a.mov(rax, qword_ptr(count))?;
            a.popfq()?;
            a.cli()?;
            a.nop()?;
            a.sti()?;
        }
        a.cmp(rax, number as i32)?;
        a.jb(again)?;
        a.set_label(&mut wrong)?;
        if user {
            a.mov(eax, 0)?;
            a.syscall()?;
        }
        a.out(STOP, al)?;
        a.nop()?;
        a.set_label(&mut f)?;
        a.mov(r10d, 0)?;
        a.lea(r10, ptr(r9 - 1))?;
        a.adc(r10, 0)?;
        a.ret()
    });
    guest.set(|state| state.rflags |= rflags::IF);
    if user {
        guest.enter_user(at);
    }
    let end = Arc::new(AtomicBool::new(false));
    let (fixture, stop) = (guest.fixture.clone(), end.clone());
    let raiser = std::thread::spawn(move || {
        for _ in 0..number {
            while fixture.waiting() > 16 {
                std::thread::yield_now();
                if stop.load(Ordering::SeqCst) {
                    return;
                }
            }
            fixture.raise(0x40);
        }
    });
    let state = guest.stop();
    end.store(true, Ordering::SeqCst);
    raiser.join().unwrap();
    assert_eq!(guest.word(count), number, "{kind:?} {state:x?}");
    assert_eq!(guest.word(data), state.gpr[12]);
    assert_eq!(guest.fixture.waiting(), 0);
}

#[test]
fn flood_of_interrupts() {
    each(|kind| {
        for user in [false, true] {
            flood(kind, user, 1_000);
        }
    });
}

/// What is raised while the guest logs is delivered before the next instruction, with the right registers.
#[test]
fn at_once() {
    each_translator(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(eax, 0x43)?;
            a.sti()?;
            a.nop()?;
            a.out(RAISE, al)?;
            a.out(LOG, al)?;
            a.out(STOP, al)
        });
        let trap = guest.trap();
        assert_eq!(trap.vector, 0x43);
        assert!(guest.fixture.log.lock().unwrap().is_empty());
    });
}
