//! Page tables that change under cached code and data: INVLPG, CR3, rights, large pages.

use cpu::{cr0, cr4, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{
    Built, CODE, CR3, CR3_B, DATA, GLOBAL, Guest, NX, PRESENT, STACK, STOP, TABLES, TABLES_B, USER, USER_CODE,
    USER_STACK, WRITE, each,
};

/// A page whose mapping changes, and the two pages of RAM it may lead to.
const PAGE: u64 = DATA + 0x1_0000;
const ONE: u64 = DATA + 0x2_0000;
const TWO: u64 = DATA + 0x3_0000;

/// What has it may be found by a table that is remembered.
const ACCESSED: u64 = 1 << 5;

fn entry(page: u64) -> i32 {
    (TABLES + (page >> 12) * 8) as i32
}

/// A guest whose two pages hold functions that return 1 and 2, at offset 0x80 of [`PAGE`].
fn guest(kind: crate::guest::Kind) -> Guest {
    let guest = Guest::new(kind);
    for (page, value) in [(ONE, 1_u32), (TWO, 2)] {
        guest.code(page + 0x80, |a| {
            a.mov(eax, value)?;
            a.ret()
        });
    }
    guest.map(PAGE, ONE | PRESENT | WRITE);
    guest
}

/// A table takes the place of another: INVLPG of any page, and CR3, are for what is remembered of tables, too.
#[test]
fn tables() {
    let flushes: [fn(&mut CodeAssembler) -> Built; 3] = [
        |a| a.invlpg(ptr(DATA)),
        |a| {
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)
        },
        |a| {
            a.mov(rax, cr4)?;
            a.xor(rax, cr4::PGE as i32)?;
            a.mov(cr4, rax)
        },
    ];
    each(|kind| {
        for (i, flush) in flushes.into_iter().enumerate() {
            let guest = &mut Guest::new(kind);
            // Pages of the region lead to one of two: by the first table to ONE, by the second to TWO.
            guest.put(ONE, &[1]);
            guest.put(TWO, &[2]);
            for page in 0..64 {
                guest.map(PAGE + 0x4_0000 + page * 4096, ONE | ACCESSED | PRESENT | WRITE);
                guest.map_b(PAGE + 0x4_0000 + page * 4096, TWO | ACCESSED | PRESENT | WRITE);
            }
            let at = (CR3 + 0x2000 + (PAGE >> 21) * 8) as i32;
            guest.code(CODE, |a| {
                let mut again = a.create_label();
                a.mov(edi, PAGE as u32 + 0x4_0000)?;
                a.mov(ecx, 32)?;
                a.set_label(&mut again)?;
                // Two neighbours, of which the second is not in the TLB.
                a.add(r8, qword_ptr(rdi))?;
                a.xor(qword_ptr(at), (TABLES as i32 + 0x2000) ^ TABLES_B as i32)?;
                flush(a)?;
                a.shl(r9, 1)?;
                a.add(r9, qword_ptr(rdi + 4096))?;
                a.add(rdi, 8192)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.out(STOP, al)
            });
            let state = guest.stop();
            // Each turn goes from one table to the other: 1 and 2, then 2 and 1.
            let seconds = (0..32).fold(0_u64, |sum, turn| (sum << 1) + if turn % 2 == 0 { 2 } else { 1 });
            assert_eq!((state.gpr[8], state.gpr[9]), (48, seconds), "flush {i} {kind:?}");
        }
    });
}

/// INVLPG of a page whose code is cached, called in every way.
#[test]
fn code_by_invlpg() {
    let calls: [fn(&mut CodeAssembler) -> Built; 4] = [
        |a| a.call(PAGE + 0x80),
        |a| a.call(rbp),
        |a| a.call(qword_ptr(DATA)),
        |a| {
            a.lea(rdx, ptr(rsp - 8))?;
            a.mov(rsi, qword_ptr(DATA + 8))?;
            a.push(rsi)?;
            a.jmp(PAGE + 0x80)
        },
    ];
    each(|kind| {
        for (i, call) in calls.into_iter().enumerate() {
            let mut guest = guest(kind);
            guest.put(DATA, &[PAGE + 0x80, CODE + 0x800]);
            guest.code(CODE, |a| {
                a.xor(r12d, r12d)?;
                a.mov(ebp, PAGE as u32 + 0x80)?;
                a.mov(ebx, entry(PAGE))?;
                a.jmp(CODE + 0x400)
            });
            let behind = guest.code(CODE + 0x400, call);
            guest.code(behind, |a| a.jmp(CODE + 0x800));
            guest.code(CODE + 0x800, |a| {
                let mut wrong = a.create_label();
                // 1 and 2 in turns.
                a.mov(ecx, r12d)?;
                a.and(ecx, 1)?;
                a.inc(ecx)?;
                a.cmp(eax, ecx)?;
                a.jne(wrong)?;
                a.inc(r12)?;
                a.xor(qword_ptr(rbx), (ONE ^ TWO) as i32)?;
                a.invlpg(ptr(rbp))?;
                a.cmp(r12d, 100)?;
                a.jb(CODE + 0x400)?;
                a.set_label(&mut wrong)?;
                a.out(STOP, al)
            });
            assert_eq!(guest.stop().gpr[12], 100, "call {i} {kind:?}");
        }
    });
}

/// Two address spaces with different code and data at the same address.
#[test]
fn code_by_cr3() {
    each(|kind| {
        for global in [0, GLOBAL] {
            let mut guest = guest(kind);
            guest.map_b(PAGE, TWO | PRESENT | WRITE);
            // A page that both have may be global.
            guest.map(DATA, DATA | PRESENT | WRITE | global);
            guest.map_b(DATA, DATA | PRESENT | WRITE | global);
            guest.put(ONE, &[11]);
            guest.put(TWO, &[22]);
            guest.code(CODE, |a| {
                let (mut again, mut wrong) = (a.create_label(), a.create_label());
                a.xor(r12d, r12d)?;
                a.mov(ebp, PAGE as u32)?;
                a.set_label(&mut again)?;
                for (cr3_value, value) in [(CR3, 1), (CR3_B, 2)] {
                    a.mov(ecx, cr3_value as u32)?;
                    a.mov(cr3, rcx)?;
                    a.call(PAGE + 0x80)?;
                    a.cmp(eax, value)?;
                    a.jne(wrong)?;
                    a.lea(rdx, ptr(rbp + 0x80))?;
                    a.call(rdx)?;
                    a.cmp(eax, value)?;
                    a.jne(wrong)?;
                    a.cmp(qword_ptr(rbp), value * 11)?;
                    a.jne(wrong)?;
                    a.inc(qword_ptr(DATA))?;
                    a.inc(r12)?;
                }
                a.cmp(r12d, 100)?;
                a.jb(again)?;
                a.set_label(&mut wrong)?;
                a.out(STOP, al)
            });
            assert_eq!(guest.stop().gpr[12], 100, "{kind:?}");
            assert_eq!(guest.word(DATA), 100);
        }
    });
}

/// A function that switches the address space returns to what the new one has at the return address.
#[test]
fn returns_across_address_spaces() {
    each(|kind| {
        for depth in [1, 4] {
            let mut guest = guest(kind);
            guest.map_b(PAGE, TWO | PRESENT | WRITE);
            // At the same address: a call of the function, then what tells the spaces apart.
            for (page, value) in [(ONE, 1_u32), (TWO, 2)] {
                guest.code(page + 0x100, |a| {
                    for _ in 0..depth {
                        a.call(rbp)?;
                        a.shl(r13, 4)?;
                        a.add(r13, value as i32)?;
                    }
                    a.ret()
                });
            }
            // The function: to the other space.
            guest.code(CODE + 0x800, |a| {
                a.mov(rcx, cr3)?;
                a.xor(rcx, (CR3 ^ CR3_B) as i32)?;
                a.mov(cr3, rcx)?;
                a.ret()
            });
            guest.code(CODE, |a| {
                let mut again = a.create_label();
                a.mov(ebp, CODE as u32 + 0x800)?;
                a.mov(r12d, 20)?;
                a.set_label(&mut again)?;
                a.xor(r13d, r13d)?;
                a.call(PAGE + 0x100)?;
                a.mov(ecx, CR3 as u32)?;
                a.mov(cr3, rcx)?;
                a.dec(r12d)?;
                a.jne(again)?;
                a.out(STOP, al)
            });
            let expected = if depth == 1 { 2 } else { 0x2121 };
            assert_eq!(guest.stop().gpr[13], expected, "{kind:?}");
        }
    });
}

/// A program that returns to a kernel address which the kernel has just called from.
#[test]
fn returns_to_the_kernel() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(ecx, USER_CODE as u32)?;
            a.mov(r11d, 0x202)?;
            a.call(CODE + 0x100)?;
            a.out(STOP, al)
        });
        // On the guest's stack and on the mirror stack is CODE + ...; the program gets the same stack.
        guest.code(CODE + 0x100, |a| {
            a.mov(rdx, qword_ptr(rsp))?;
            a.mov(rsp, USER_STACK)?;
            a.mov(rax, cr4)?;
            a.sysretq()
        });
        guest.code(USER_CODE, |a| {
            a.push(rdx)?;
            a.ret()
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error), (vector::PF, Some(0x15)), "{kind:?}");
        assert_eq!((trap.rip, trap.state.cr2, trap.rsp), (trap.state.gpr[2], trap.state.gpr[2], USER_STACK));
        assert_eq!(trap.cs, 0x33);
        // And by calls and jumps.
        for jump in [|a: &mut CodeAssembler| a.jmp(rdx), |a: &mut CodeAssembler| a.call(rdx)] {
            let rip = trap.rip;
            guest.reset();
            guest.code(USER_CODE, jump);
            guest.enter_user(USER_CODE);
            guest.set(|state| state.gpr[2] = rip);
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.error, trap.rip), (vector::PF, Some(0x15), rip), "{kind:?}");
        }
        // The kernel may execute a program's page as long as there is no SMEP.
        guest.reset();
        guest.code(CODE, |a| a.jmp(USER_CODE));
        guest.code(USER_CODE, |a| a.out(STOP, al));
        guest.stop();
        guest.set(|state| {
            state.rip = CODE;
            state.cr4 |= cr4::SMEP;
        });
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error), (vector::PF, Some(0x11)), "{kind:?}");
    });
}

/// Rights taken away while the page is in the TLB.
#[test]
fn rights() {
    /// Bits to flip in the entry; what to do; the error code.
    type Case = (u64, fn(&mut CodeAssembler) -> Built, u64);
    let cases: [Case; 6] = [
        (PRESENT, |a| a.mov(rax, qword_ptr(rbp)), 0),
        (PRESENT, |a| a.mov(qword_ptr(rbp), rax), 2),
        (WRITE, |a| a.mov(qword_ptr(rbp), rax), 3),
        (WRITE, |a| a.push(rax), 3),
        (NX, |a| a.call(PAGE + 0x80), 0x11),
        (NX, |a| a.jmp(rdi), 0x11),
    ];
    each(|kind| {
        for by_cr3 in [false, true] {
            for (i, (bits, act, error)) in cases.into_iter().enumerate() {
                let mut guest = guest(kind);
                guest.put(DATA, &[bits]);
                let at = guest.code(CODE, |a| {
                    a.mov(ebp, PAGE as u32)?;
                    a.mov(edi, PAGE as u32 + 0x80)?;
                    a.mov(ebx, entry(PAGE))?;
                    // Everything is in the TLBs and caches.
                    a.call(rdi)?;
                    a.call(PAGE + 0x80)?;
                    a.mov(rsp, PAGE + 0x40)?;
                    a.push(rax)?;
                    a.pop(rax)?;
                    a.mov(qword_ptr(rbp), rax)?;
                    a.mov(rax, qword_ptr(DATA))?;
                    a.xor(qword_ptr(rbx), rax)?;
                    if by_cr3 {
                        a.mov(rax, cr3)?;
                        a.mov(cr3, rax)?;
                    } else {
                        a.invlpg(ptr(rbp))?;
                    }
                    if i >= 4 {
                        a.mov(rsp, STACK)?;
                    }
                    Ok(())
                });
                guest.code(at, act);
                guest.ist(vector::PF);
                let trap = guest.trap();
                assert_eq!((trap.vector, trap.error), (vector::PF, Some(error)), "{i} {kind:?}");
                let expected = if error & 0x10 != 0 { PAGE + 0x80 } else { at };
                assert_eq!(trap.rip, expected);
            }
        }
    });
}

/// CR0.WP and CR4.SMAP decide anew about cached pages.
#[test]
fn control_registers() {
    each(|kind| {
        let mut guest = guest(kind);
        guest.map(PAGE, ONE | PRESENT);
        let at = guest.code(CODE, |a| {
            a.mov(ebp, PAGE as u32)?;
            a.mov(rax, cr0)?;
            a.mov(rcx, rax)?;
            a.and(ecx, !(cr0::WP as u32) as i32)?;
            a.mov(cr0, rcx)?;
            a.mov(qword_ptr(rbp), rcx)?;
            a.mov(cr0, rax)
        });
        guest.code(at, |a| a.mov(qword_ptr(rbp), rcx));
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (vector::PF, Some(3), at), "{kind:?}");
        assert_eq!(guest.word(ONE) & cr0::PG, cr0::PG);
    });
}

/// An instruction across two pages, of which the second changes its mapping.
#[test]
fn second_page() {
    each(|kind| {
        for by_cr3 in [false, true] {
            let mut guest = Guest::new(kind);
            let at = PAGE - 2;
            // `mov eax, imm32` with three bytes of the immediate on the changing page; RET there.
            for (page, value) in [(ONE, 1_u8), (TWO, 2)] {
                assert!(guest.ram.write(PAGE - 2, &[0xb8, 0]));
                assert!(guest.ram.write(page, &[value, 0, 0, 0xc3]));
            }
            guest.map(PAGE, ONE | PRESENT | WRITE);
            guest.map_b(PAGE, TWO | PRESENT | WRITE);
            guest.code(CODE, |a| {
                let (mut again, mut wrong) = (a.create_label(), a.create_label());
                a.xor(r12d, r12d)?;
                a.mov(ebp, PAGE as u32)?;
                a.mov(ebx, entry(PAGE))?;
                a.lea(rdi, ptr(rbp - 2))?;
                a.set_label(&mut again)?;
                for value in [1, 2] {
                    a.call(at)?;
                    a.cmp(eax, value << 8)?;
                    a.jne(wrong)?;
                    a.call(rdi)?;
                    a.cmp(eax, value << 8)?;
                    a.jne(wrong)?;
                    if by_cr3 {
                        a.mov(rcx, cr3)?;
                        a.xor(rcx, (CR3 ^ CR3_B) as i32)?;
                        a.mov(cr3, rcx)?;
                    } else {
                        a.xor(qword_ptr(rbx), (ONE ^ TWO) as i32)?;
                        a.invlpg(ptr(rbp))?;
                    }
                    a.inc(r12)?;
                }
                a.cmp(r12d, 40)?;
                a.jb(again)?;
                a.set_label(&mut wrong)?;
                a.out(STOP, al)
            });
            assert_eq!(guest.stop().gpr[12], 40, "{kind:?}");
        }
    });
}

/// INVLPG of any address in a large page forgets all of it.
#[test]
fn large_pages() {
    const LARGE: u64 = 0x60_0000;
    each(|kind| {
        let mut guest = Guest::new(kind);
        let directory = CR3 + 0x2000 + (LARGE >> 21) * 8;
        let (one, two) = (0x80_0000, 0xa0_0000);
        guest.put(directory, &[one | PRESENT | WRITE | 0x80]);
        guest.put(one + 0x12_3000, &[1]);
        guest.put(two + 0x12_3000, &[2]);
        guest.code(CODE, |a| {
            a.mov(ebx, directory as u32)?;
            a.mov(ebp, LARGE as u32)?;
            a.mov(r12, qword_ptr(rbp + 0x12_3000))?;
            a.inc(qword_ptr(rbp + 0x12_3000))?;
            a.xor(qword_ptr(rbx), (one ^ two) as i32)?;
            a.invlpg(ptr(rbp + 0x3000))?;
            a.mov(r13, qword_ptr(rbp + 0x12_3000))?;
            a.inc(qword_ptr(rbp + 0x12_3000))?;
            a.out(STOP, al)
        });
        let state = guest.stop();
        assert_eq!((state.gpr[12], state.gpr[13]), (1, 2), "{kind:?}");
        assert_eq!((guest.word(one + 0x12_3000), guest.word(two + 0x12_3000)), (2, 3));
    });
}

/// Accessed and dirty bits are set by the first access after they were cleared and the page was invalidated.
#[test]
fn accessed_and_dirty() {
    each(|kind| {
        let mut guest = guest(kind);
        guest.code(CODE, |a| {
            a.mov(ebp, PAGE as u32)?;
            a.mov(ebx, entry(PAGE))?;
            a.mov(qword_ptr(rbp), rax)?;
            a.mov(r12, qword_ptr(rbx))?;
            a.and(dword_ptr(rbx), !0x60)?;
            a.invlpg(ptr(rbp))?;
            a.mov(rax, qword_ptr(rbp))?;
            a.mov(r13, qword_ptr(rbx))?;
            // The write after a read sets the dirty bit.
            a.mov(qword_ptr(rbp), rax)?;
            a.mov(r14, qword_ptr(rbx))?;
            a.and(dword_ptr(rbx), !0x60)?;
            a.mov(rax, cr3)?;
            a.mov(cr3, rax)?;
            a.call(PAGE + 0x80)?;
            a.mov(r15, qword_ptr(rbx))?;
            a.out(STOP, al)
        });
        let state = guest.stop();
        let bits = [12, 13, 14, 15].map(|register| state.gpr[register] & 0x60);
        assert_eq!(bits, [0x60, 0x20, 0x60, 0x20], "{kind:?}");
    });
}

/// Interrupts and system calls between code of both levels, with mirror stacks of many calls.
#[test]
fn calls_deeper_than_the_mirror() {
    each(|kind| {
        for user in [false, true] {
            let mut guest = Guest::new(kind);
            let code = if user { USER_CODE } else { CODE };
            // 24 bytes of stack for a call, 20,000 calls deep: 480 KiB of stack, 160 KiB of mirror.
            for page in 0..0x80 {
                let page = 0x30_0000 + page * 0x1000;
                guest.map(page, page | PRESENT | WRITE | USER);
            }
            guest.code(code, |a| {
                let (mut f, mut end) = (a.create_label(), a.create_label());
                a.mov(r12d, 3)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.mov(ecx, 20_000)?;
                a.xor(eax, eax)?;
                a.call(f)?;
                a.cmp(eax, 20_001)?;
                a.jne(end)?;
                a.dec(r12d)?;
                a.jne(again)?;
                a.set_label(&mut end)?;
                a.ud2()?;
                a.set_label(&mut f)?;
                let mut leaf = a.create_label();
                a.inc(eax)?;
                a.jrcxz(leaf)?;
                a.dec(rcx)?;
                a.push(rcx)?;
                a.push(rax)?;
                a.call(f)?;
                a.lea(rsp, ptr(rsp + 16))?;
                a.set_label(&mut leaf)?;
                a.ret()
            });
            if user {
                guest.enter_user(code);
            }
            guest.set(|state| {
                state.gpr[4] = 0x38_0000;
                state.rflags |= rflags::IF;
            });
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.state.gpr[0] as u32, trap.state.gpr[12]), (6, 20_001, 0), "{kind:?}");
            assert_eq!(trap.rsp, 0x38_0000);
        }
    });
}

/// A guest-call stack that is full is emptied in the middle of a block: what the block keeps there goes on to be right. At each depth the block has many
/// groups of accesses, each with a delta of its own.
#[test]
fn a_full_mirror_between_accesses() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        for page in 0..0x180 {
            let page = 0x30_0000 + page * 0x1000;
            guest.map(page, page | PRESENT | WRITE);
        }
        // Each object lies in a page of its own, whose delta differs.
        let pages: [u64; 6] = [3, 1, 4, 0, 5, 2].map(|n| DATA + 0x10_0000 + n * 0x1000);
        for (i, &page) in pages.iter().enumerate() {
            guest.map(page, (DATA + 0x18_0000 + ((i as u64 * 5) % 7) * 0x1000) | PRESENT | WRITE);
        }
        guest.code(CODE, |a| {
            let (mut f, mut end, mut leaf) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(ecx, 33_500)?;
            a.xor(edx, edx)?;
            a.xor(eax, eax)?;
            a.call(f)?;
            a.set_label(&mut end)?;
            a.out(STOP, al)?;
            a.set_label(&mut f)?;
            // All leaders first, then all followers, which read: a wrong delta would read something else.
            for register in [rbx, rdi, rsi, r12, r13, r14] {
                a.mov(r8, qword_ptr(register))?;
            }
            for register in [rbx, rdi, rsi, r12, r13, r14] {
                a.add(rdx, qword_ptr(register + 8))?;
            }
            a.dec(ecx)?;
            a.je(leaf)?;
            a.call(f)?;
            a.set_label(&mut leaf)?;
            a.inc(eax)?;
            a.ret()
        });
        guest.set(|state| {
            state.gpr[4] = 0x3f_0000;
            for (register, page) in [3, 7, 6, 12, 13, 14].into_iter().zip(pages) {
                state.gpr[register] = page;
            }
        });
        for i in 0..pages.len() as u64 {
            guest.put(DATA + 0x18_0000 + ((i * 5) % 7) * 0x1000, &[0, 1 << i]);
        }
        let state = guest.stop();
        assert_eq!((state.gpr[0] as u32, state.gpr[2]), (33_500, 33_500 * 0x3f), "{kind:?}");
    });
}
