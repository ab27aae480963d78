//! Accesses that go beyond one page, without the interpreter: strings over many pages, reads across two; and the addresses of page faults.

use cpu::vector;
use iced_x86::code_asm::*;

use crate::guest::{Build, CODE, DATA, Guest, Kind, MMIO, PRESENT, STOP, USER, USER_CODE, USER_DATA, WRITE, each};

fn bytes(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert!(guest.ram.read(at, &mut bytes));
    bytes
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i ^ i >> 8).wrapping_mul(7) as u8).collect()
}

fn interpreted(guest: &Guest) -> u64 {
    guest.vcpu.counters().into_iter().find(|(name, _)| name == "instructions.interpreted").map_or(0, |(_, n)| n)
}

const STRINGS: [(&str, Build, bool, u64); 8] = [
    ("movsb", |a| a.rep().movsb(), true, 1),
    ("movsw", |a| a.rep().movsw(), true, 2),
    ("movsd", |a| a.rep().movsd(), true, 4),
    ("movsq", |a| a.rep().movsq(), true, 8),
    ("stosb", |a| a.rep().stosb(), false, 1),
    ("stosw", |a| a.rep().stosw(), false, 2),
    ("stosd", |a| a.rep().stosd(), false, 4),
    ("stosq", |a| a.rep().stosq(), false, 8),
];

#[test]
fn strings_over_pages() {
    let (value, len) = (0x8877_6655_4433_2211_u64, 5 * 4096_u64 + 8);
    each(|kind| {
        for (name, build, movs, size) in STRINGS {
            for (user, from, to) in [(false, 0x100, 0x1_0234), (true, 0x5, 0x8003), (false, 0, 0x1_0000)] {
                let (code, data) = if user { (USER_CODE, USER_DATA) } else { (CODE, DATA) };
                let mut guest = Guest::new(kind);
                assert!(guest.ram.write(data + from, &pattern(len as usize)));
                let end = guest.code(code, |a| {
                    a.mov(rsi, data + from)?;
                    a.mov(rdi, data + to)?;
                    a.mov(rcx, len / size)?;
                    a.mov(rax, value)?;
                    a.cmp(rcx, 3)?;
                    build(a)?;
                    a.seta(dl)
                });
                guest.code(end, |a| a.ud2());
                if user {
                    guest.enter_user(code);
                }
                let trap = guest.trap();
                assert_eq!((trap.vector, trap.rip), (vector::UD, end), "{name} {kind:?}");
                let g = trap.state.gpr;
                let done = len / size * size;
                let source = if movs { data + from + done } else { data + from };
                assert_eq!((g[1], g[6], g[7], g[2] & 1), (0, source, data + to + done, 1), "{name} {kind:?}");
                let expected: Vec<u8> = if movs {
                    pattern(done as usize)
                } else {
                    value.to_le_bytes()[..size as usize].iter().copied().cycle().take(done as usize).collect()
                };
                assert!(bytes(&guest, data + to, done as usize) == expected, "{name} {kind:?} {to:#x}");
                assert_eq!(bytes(&guest, data + to + done, 8), [0; 8]);
                assert_eq!(bytes(&guest, data + to - 8, 8), [0; 8]);
            }
        }
    });
}

/// A page fault in the middle: everything before it is done, the registers stand there.
#[test]
fn strings_into_a_hole() {
    each(|kind| {
        for (name, build, movs, size) in STRINGS {
            for hole_in_source in [false, true] {
                let mut guest = Guest::new(kind);
                let (from, to) = (DATA + 0x18, DATA + 0x2_0018);
                assert!(guest.ram.write(from, &pattern(0x8000)));
                let hole = if hole_in_source { DATA + 0x3000 } else { DATA + 0x2_2000 };
                guest.map(hole, 0);
                let at = guest.code(CODE, |a| {
                    a.mov(rsi, from)?;
                    a.mov(rdi, to)?;
                    a.mov(rcx, 0x4000 / size)?;
                    a.mov(rax, 0x0101_0101_0101_0101_u64)
                });
                guest.code(at, build);
                let end = guest.code(at, build);
                guest.code(end, |a| a.out(STOP, al));
                let Some(trap) = guest.trap_or_stop() else {
                    assert!(hole_in_source && !movs, "{name}");
                    continue;
                };
                let done = if hole_in_source { hole - from } else { hole - to };
                let code = if hole_in_source { 0 } else { 2 };
                assert_eq!((trap.vector, trap.error, trap.rip), (vector::PF, Some(code), at), "{name} {kind:?}");
                let g = trap.state.gpr;
                assert_eq!((g[7], g[1]), (to + done, (0x4000 - done) / size), "{name} {kind:?}");
                assert_eq!(trap.state.cr2, hole, "{name} {kind:?}");
                if movs {
                    assert_eq!(g[6], from + done);
                    assert!(bytes(&guest, to, done as usize) == pattern(0x8000)[..done as usize]);
                }
            }
        }
    });
}

/// An element that ends outside the canonical addresses: that counts before the page fault.
#[test]
fn strings_at_the_end_of_the_addresses() {
    each(|kind| {
        for (name, build, movs, size) in STRINGS {
            let mut guest = Guest::new(kind);
            let at = guest.code(CODE, |a| {
                a.mov(rdi, if movs { DATA } else { 0x7fff_ffff_ffff })?;
                a.mov(rsi, 0x7fff_ffff_ffff_u64)?;
                a.mov(ecx, 3)
            });
            guest.code(at, build);
            let trap = guest.trap();
            let expected = if size == 1 { vector::PF } else { vector::GP };
            assert_eq!((trap.vector, trap.rip, trap.state.gpr[1]), (expected, at, 3), "{name} {kind:?}");
        }
    });
}

/// Devices and code among the pages.
#[test]
fn strings_over_what_is_no_plain_memory() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        // Code in the third page of the target; it is overwritten by code that counts.
        let target = DATA + 0x1_2000;
        guest.code(target, |a| {
            a.mov(ebp, 1)?;
            a.ret()
        });
        let start = guest.code(DATA + 0x2234, |a| {
            a.mov(ebp, 2)?;
            a.ret()
        });
        assert!(start < DATA + 0x3000);
        guest.code(CODE, |a| {
            a.call(target)?;
            a.mov(r8d, ebp)?;
            a.mov(rsi, DATA + 0x234)?;
            a.mov(rdi, DATA + 0x1_0000)?;
            a.mov(ecx, 0x4000)?;
            a.rep().movsb()?;
            a.call(target)?;
            a.mov(rdi, MMIO - 0x10)?;
            a.mov(rsi, MMIO + 0x20)?;
            a.mov(rdi, DATA + 0x2_0ff8)?;
            a.mov(ecx, 0x1010)?;
            a.rep().movsb()?;
            a.out(STOP, al)
        });
        let state = guest.stop();
        assert_eq!((state.gpr[8], state.gpr[5]), (1, 2), "{kind:?}");
        let copied = bytes(&guest, DATA + 0x2_0ff8, 0x1010);
        assert!(copied.iter().enumerate().all(|(i, &byte)| byte == (0x20 + i) as u8), "{kind:?}");
    });
}

/// Reads at every place near a page's end; the two pages are not neighbours.
#[test]
fn reads_across_pages() {
    let reads: [(Build, u64, bool); 7] = [
        (|a| a.mov(ax, word_ptr(rbx)), 2, false),
        (|a| a.mov(eax, dword_ptr(rbx)), 4, false),
        (|a| a.mov(r9, qword_ptr(rbx)), 8, false),
        (|a| a.movdqu(xmm7, xmmword_ptr(rbx)), 16, true),
        (|a| a.vmovdqu(ymm7, ymmword_ptr(rbx)), 32, true),
        (|a| a.vpaddb(ymm7, ymm6, ymmword_ptr(rbx)), 32, true),
        (|a| a.mov(rax, qword_ptr(rbx + r12 * 4 - 0x100)), 8, false),
    ];
    each(|kind| {
        for (n, (build, size, vector)) in reads.into_iter().enumerate() {
            let mut guest = Guest::new(kind);
            assert!(guest.ram.write(DATA + 0x1000, &pattern(0x1000)));
            assert!(guest.ram.write(DATA + 0x9000, &pattern(0x2000)[0x1000..]));
            guest.map(DATA + 0x2000, (DATA + 0x9000) | PRESENT | WRITE | USER);
            let turns = 40_u32;
            guest.code(CODE, |a| {
                let mut again = a.create_label();
                a.mov(ebx, (DATA + 0x2000 - 36) as u32)?;
                a.mov(r12d, 0x40)?;
                a.mov(edi, (DATA + 0x4000) as u32)?;
                a.mov(ecx, turns)?;
                a.xor(eax, eax)?;
                a.xor(r9d, r9d)?;
                a.vpxor(ymm6, ymm6, ymm6)?;
                a.mov(edx, dword_ptr(rbx + 0x40))?;
                a.set_label(&mut again)?;
                a.stc()?;
                build(a)?;
                a.adc(r11, 0)?;
                a.or(rax, r9)?;
                a.mov(qword_ptr(rdi), rax)?;
                if vector {
                    a.vmovdqu(ymmword_ptr(rdi), ymm7)?;
                }
                a.add(edi, 32)?;
                a.inc(ebx)?;
                a.xor(eax, eax)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.out(STOP, al)
            });
            guest.set(|state| state.gpr[11] = 0);
            let state = guest.stop();
            assert_eq!(state.gpr[11], u64::from(turns), "the flag is still there");
            let all = pattern(0x2000);
            for turn in 0..turns as usize {
                let got = bytes(&guest, DATA + 0x4000 + 32 * turn as u64, size as usize);
                let at = 0x1000 - 36 + turn;
                assert_eq!(got, all[at..at + size as usize], "{n} {turn} {kind:?}");
            }
            if matches!(kind, Kind::Bt | Kind::Fast) {
                assert!(interpreted(&guest) < 20, "{n}: {}", interpreted(&guest));
            }
        }
    });
}

#[test]
fn long_strings_stay_in_the_code_cache() {
    each(|kind| {
        if !matches!(kind, Kind::Bt | Kind::Fast) {
            return;
        }
        for (name, build, _, size) in STRINGS {
            let mut guest = Guest::new(kind);
            guest.code(CODE, |a| {
                let mut again = a.create_label();
                a.mov(edx, 300)?;
                a.set_label(&mut again)?;
                a.mov(rsi, DATA + size)?;
                a.mov(rdi, DATA + 0x1_0000)?;
                a.mov(rcx, 0x3000 / size)?;
                build(a)?;
                a.dec(edx)?;
                a.jne(again)?;
                a.out(STOP, al)
            });
            guest.stop();
            // Elements of the source lie in one page each.
            assert!(interpreted(&guest) < 20, "{name}: {}", interpreted(&guest));
        }
    });
}

/// Several accesses share a check: the fault is that of the first one, at its own address.
#[test]
fn page_faults_in_groups() {
    each(|kind| {
        for user in [false, true] {
            let (code, data) = if user { (USER_CODE, USER_DATA) } else { (CODE, DATA) };
            let hole = data + 0x3000;
            let mut guest = Guest::new(kind);
            guest.map(hole, 0);
            let at = guest.code(code, |a| a.mov(rbx, hole));
            let end = guest.code(at, |a| a.mov(qword_ptr(rbx + 0x90), rax));
            guest.code(end, |a| {
                a.mov(rcx, qword_ptr(rbx + 8))?;
                a.mov(qword_ptr(rbx + 0xa0), rax)?;
                a.mov(dword_ptr(rbx + 0x14), 5)
            });
            if user {
                guest.enter_user(code);
            }
            let trap = guest.trap();
            let code = if user { 6 } else { 2 };
            assert_eq!((trap.vector, trap.error, trap.rip), (vector::PF, Some(code), at), "{kind:?}");
            assert_eq!(trap.state.cr2, hole + 0x90, "{kind:?}");
            if matches!(kind, Kind::Bt | Kind::Fast) {
                assert!(interpreted(&guest) < 4, "{}", interpreted(&guest));
            }
        }
    });
}
