//! Self-modifying and cross-modifying code: what is written is what runs, whoever wrote it and however.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iced_x86::code_asm::*;

use crate::guest::{CODE, DATA, Guest, PRESENT, RAISE, STOP, USER, USER_CODE, USER_DATA, USER_STACK, WRITE, each};

/// A page of code apart from the main one.
const FUNCTION: u64 = CODE + 0x4000;

/// `mov eax, value; ret` with the immediate at offset 4 (so that aligned stores reach it).
fn function(guest: &Guest, at: u64, value: u32) {
    guest.code(at, |a| {
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.mov(eax, value)?;
        a.ret()
    });
}

#[test]
fn the_next_instruction() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let next = guest.code(CODE, |a| {
            a.mov(ebx, CODE as u32)?;
            a.mov(byte_ptr(rbx + 10), 0x22)
        });
        assert_eq!(next, CODE + 9);
        guest.code(next, |a| {
            a.mov(al, 0x11)?;
            a.out(STOP, al)
        });
        assert_eq!(guest.stop().gpr[0] & 0xff, 0x22, "{kind:?}");
    });
}

/// A loop that counts in its own immediate.
#[test]
fn the_same_block() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let top = CODE + 0x40;
        guest.code(CODE, |a| {
            a.xor(ecx, ecx)?;
            a.xor(esi, esi)?;
            a.mov(ebx, top as u32)?;
            a.jmp(top)
        });
        guest.code(top, |a| {
            a.mov(eax, 0)?;
            a.add(rsi, rax)?;
            a.inc(dword_ptr(rbx + 1))?;
            a.inc(ecx)?;
            a.cmp(ecx, 500)?;
            a.jne(top)?;
            a.out(STOP, al)
        });
        assert_eq!(guest.stop().gpr[6], 499 * 500 / 2, "{kind:?}");
    });
}

/// Every kind of store reaches code: RBX points to the function, R8 holds what its immediate shall be.
#[test]
fn all_kinds_of_stores() {
    let stores: [(&str, crate::guest::Build); 16] = [
        ("mov", |a| a.mov(dword_ptr(rbx + 4), r8d)),
        ("mov of a byte", |a| a.mov(byte_ptr(rbx + 4), r8b)),
        ("add", |a| a.add(dword_ptr(rbx + 4), 1)),
        ("lock inc", |a| a.lock().inc(dword_ptr(rbx + 4))),
        ("xchg", |a| {
            a.mov(ecx, r8d)?;
            a.xchg(dword_ptr(rbx + 4), ecx)
        }),
        ("cmpxchg", |a| {
            a.mov(eax, dword_ptr(rbx + 4))?;
            a.lock().cmpxchg(dword_ptr(rbx + 4), r8d)
        }),
        ("xadd", |a| {
            a.mov(ecx, 1)?;
            a.lock().xadd(dword_ptr(rbx + 4), ecx)
        }),
        ("push", |a| {
            a.mov(rbp, rsp)?;
            a.lea(rsp, ptr(rbx + 16))?;
            a.mov(rcx, qword_ptr(rbx + 8))?;
            a.push(rcx)?;
            a.mov(rcx, qword_ptr(rbx))?;
            a.mov(edx, ecx)?;
            a.shl(r8, 32)?;
            a.or(rdx, r8)?;
            a.push(rdx)?;
            a.shr(r8, 32)?;
            a.mov(rsp, rbp)
        }),
        ("movd", |a| {
            a.movd(xmm0, r8d)?;
            a.movd(dword_ptr(rbx + 4), xmm0)
        }),
        ("movups", |a| {
            a.movups(xmm0, xmmword_ptr(rbx))?;
            a.pinsrd(xmm0, r8d, 1)?;
            a.movups(xmmword_ptr(rbx), xmm0)
        }),
        ("movnti", |a| a.movnti(dword_ptr(rbx + 4), r8d)),
        ("fistp", |a| {
            a.push(r8)?;
            a.fild(dword_ptr(rsp))?;
            a.fistp(dword_ptr(rbx + 4))?;
            a.pop(r8)
        }),
        ("stosd", |a| {
            a.mov(eax, r8d)?;
            a.lea(rdi, ptr(rbx + 4))?;
            a.stosd()
        }),
        ("rep movsb", |a| {
            a.push(r8)?;
            a.mov(rsi, rsp)?;
            a.lea(rdi, ptr(rbx + 4))?;
            a.mov(ecx, 4)?;
            a.rep().movsb()?;
            a.pop(r8)
        }),
        ("bts and btr", |a| {
            a.btr(dword_ptr(rbx + 4), 0)?;
            a.mov(ecx, 1)?;
            a.btc(dword_ptr(rbx + 4), ecx)?;
            a.mov(dword_ptr(rbx + 4), r8d)
        }),
        ("setcc", |a| {
            a.cmp(r8d, r8d)?;
            a.sete(byte_ptr(rbx + 5))?;
            a.mov(byte_ptr(rbx + 5), 0)?;
            a.mov(byte_ptr(rbx + 4), r8b)
        }),
    ];
    each(|kind| {
        for (name, store) in stores {
            let mut guest = Guest::new(kind);
            function(&guest, FUNCTION, 0);
            guest.code(CODE, |a| {
                let (mut again, mut wrong) = (a.create_label(), a.create_label());
                a.mov(ebx, FUNCTION as u32)?;
                a.xor(r8d, r8d)?;
                a.set_label(&mut again)?;
                a.call(rbx)?;
                a.cmp(eax, r8d)?;
                a.jne(wrong)?;
                a.inc(r8d)?;
                store(a)?;
                a.cmp(r8d, 100)?;
                a.jne(again)?;
                a.set_label(&mut wrong)?;
                a.out(STOP, al)
            });
            assert_eq!(guest.stop().gpr[8], 100, "{name} {kind:?}");
        }
    });
}

/// As Linux patches itself: through another mapping of the page; the code runs through the first.
#[test]
fn through_an_alias() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        function(&guest, FUNCTION, 0);
        let alias = DATA + 0x8000;
        guest.map(alias, FUNCTION | PRESENT | WRITE);
        guest.code(CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.xor(ecx, ecx)?;
            a.mov(ebx, alias as u32)?;
            // The write entry is in the TLB before there is code.
            a.mov(dword_ptr(rbx + 4), ecx)?;
            a.set_label(&mut again)?;
            a.call(FUNCTION)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.inc(ecx)?;
            a.mov(dword_ptr(rbx + 4), ecx)?;
            // Through the alias it runs, too.
            a.call(rbx)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.cmp(ecx, 200)?;
            a.jne(again)?;
            a.set_label(&mut wrong)?;
            a.out(STOP, al)
        });
        assert_eq!(guest.stop().gpr[1], 200, "{kind:?}");
    });
}

/// A device writes code by DMA while the guest calls it.
#[test]
fn by_dma() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        function(&guest, FUNCTION, 0);
        guest.code(CODE, |a| {
            let mut again = a.create_label();
            a.xor(esi, esi)?;
            a.set_label(&mut again)?;
            a.call(FUNCTION)?;
            // Values only grow.
            a.cmp(eax, esi)?;
            let mut wrong = a.create_label();
            a.jb(wrong)?;
            a.mov(esi, eax)?;
            a.mov(dword_ptr(DATA), eax)?;
            a.cmp(eax, 50)?;
            a.jne(again)?;
            a.set_label(&mut wrong)?;
            a.out(STOP, al)
        });
        let end = Arc::new(AtomicBool::new(false));
        let (ram, stop) = (guest.ram.clone(), end.clone());
        let device = std::thread::spawn(move || {
            for value in 1..=50_u32 {
                assert!(ram.write(FUNCTION + 4, &value.to_le_bytes()));
                // The guest sees it without being told.
                let mut seen = [0; 4];
                while u32::from_le_bytes(seen) != value && !stop.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                    assert!(ram.read(DATA, &mut seen));
                }
            }
        });
        let state = guest.stop();
        end.store(true, Ordering::SeqCst);
        device.join().unwrap();
        assert_eq!(state.gpr[0] as u32, 50, "{kind:?}");
    });
}

/// Data on the page of code, written often; then the code changes after all.
#[test]
fn data_beside_code() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        function(&guest, FUNCTION, 5);
        guest.code(CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.mov(ebx, FUNCTION as u32)?;
            a.xor(ecx, ecx)?;
            a.set_label(&mut again)?;
            a.call(FUNCTION)?;
            a.cmp(eax, 5)?;
            a.jne(wrong)?;
            a.inc(ecx)?;
            a.mov(dword_ptr(rbx + 0x800), ecx)?;
            a.add(dword_ptr(rbx + 0x10), ecx)?;
            a.cmp(ecx, 300)?;
            a.jne(again)?;
            a.mov(dword_ptr(rbx + 4), 6)?;
            a.call(FUNCTION)?;
            a.set_label(&mut wrong)?;
            a.out(STOP, al)
        });
        let state = guest.stop();
        assert_eq!((state.gpr[0] as u32, state.gpr[1]), (6, 300), "{kind:?}");
    });
}

/// Code on the stack, as trampolines are: pushes beside it, then it changes.
#[test]
fn on_the_stack() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(USER_CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.xor(r12d, r12d)?;
            a.set_label(&mut again)?;
            // b8 imm32 c3: mov eax, r12; ret
            a.mov(rax, 0xc300_0000_00b8_u64)?;
            a.mov(rcx, r12)?;
            a.shl(rcx, 8)?;
            a.or(rax, rcx)?;
            a.push(rax)?;
            a.mov(rbx, rsp)?;
            a.call(rbx)?;
            a.pop(rcx)?;
            a.cmp(rax, r12)?;
            a.jne(wrong)?;
            a.inc(r12)?;
            a.cmp(r12d, 300)?;
            a.jne(again)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        guest.enter_user(USER_CODE);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.state.gpr[12], trap.rsp), (6, 300, USER_STACK), "{kind:?}");
    });
}

/// A program's page at two addresses (templates are copied), changed through either.
#[test]
fn a_shared_page() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let (first, second) = (USER_DATA, USER_DATA + 0x5000);
        guest.map(second, first | PRESENT | WRITE | USER);
        // With operands relative to RIP and a jump within the page.
        guest.code(first, |a| {
            let (mut top, mut on, mut data) = (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut top)?;
            a.mov(eax, 0)?;
            a.add(rax, qword_ptr(data))?;
            a.jmp(on)?;
            a.ud2()?;
            a.set_label(&mut on)?;
            a.lea(rdx, ptr(top))?;
            a.ret()?;
            a.set_label(&mut data)?;
            a.dq(&[1000])
        });
        guest.code(USER_CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.xor(r12d, r12d)?;
            a.set_label(&mut again)?;
            for (at, other) in [(first, second), (second, first)] {
                a.mov(ebx, at as u32)?;
                a.call(rbx)?;
                a.lea(rcx, ptr(r12 + 1000))?;
                a.cmp(rax, rcx)?;
                a.jne(wrong)?;
                a.cmp(rdx, at as i32)?;
                a.jne(wrong)?;
                a.inc(r12)?;
                a.mov(dword_ptr(other + 1), r12d)?;
            }
            a.cmp(r12d, 200)?;
            a.jne(again)?;
            a.set_label(&mut wrong)?;
            a.ud2()
        });
        guest.enter_user(USER_CODE);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.state.gpr[12]), (6, 200), "{kind:?}");
    });
}

/// An instruction across two pages, of which the second changes.
#[test]
fn across_pages() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let at = FUNCTION + 0x1000 - 2;
        guest.code(at, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        guest.code(CODE, |a| {
            let (mut again, mut wrong) = (a.create_label(), a.create_label());
            a.xor(ecx, ecx)?;
            a.mov(ebx, at as u32)?;
            a.set_label(&mut again)?;
            a.call(at)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            // Both parts of the immediate.
            a.add(ecx, 0x101)?;
            a.mov(byte_ptr(rbx + 1), cl)?;
            a.mov(byte_ptr(rbx + 2), ch)?;
            a.call(rbx)?;
            a.cmp(eax, ecx)?;
            a.jne(wrong)?;
            a.cmp(ecx, 0x101 * 200)?;
            a.jne(again)?;
            a.set_label(&mut wrong)?;
            a.out(STOP, al)
        });
        assert_eq!(guest.stop().gpr[1], 0x101 * 200, "{kind:?}");
    });
}

/// The handler of an interrupt changes the code that was interrupted.
#[test]
fn by_an_interrupt_handler() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.gate(0x40, CODE + 0xc00, 0x8e);
        guest.code(CODE + 0xc00, |a| {
            a.mov(word_ptr(CODE + 0x40), 0x9090)?;
            a.iretq()
        });
        guest.code(CODE, |a| {
            a.mov(eax, 0x40)?;
            a.sti()?;
            a.out(RAISE, al)?;
            a.jmp(CODE + 0x40)
        });
        guest.code(CODE + 0x40, |a| {
            a.jmp(CODE + 0x40)?;
            a.out(STOP, al)
        });
        guest.stop();
    });
}
