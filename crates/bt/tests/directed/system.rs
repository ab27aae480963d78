//! Instructions of kernels that stay in the code cache: segment bases and selectors, control registers, extended state, STI, returns from faults.

use cpu::{FpState, cr4, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{Build, CODE, DATA, Guest, Kind, STACK, STOP, USER_CODE, USER_DATA, each};

/// Three components with a pattern, in the standard format, at `at`.
fn area(guest: &Guest, at: u64) {
    let mut area = FpState::default();
    for (i, byte) in area.bytes[160..416].iter_mut().enumerate() {
        *byte = i as u8 ^ 0x5a;
    }
    for (i, byte) in area.bytes[576..].iter_mut().enumerate() {
        *byte = i as u8 ^ 0xc3;
    }
    area.bytes[24..28].copy_from_slice(&0x1fa0_u32.to_le_bytes());
    for i in 0..8 {
        area.bytes[32 + 16 * i..42 + 16 * i].copy_from_slice(&[i as u8 + 1, 2, 3, 4, 5, 6, 7, 0x88, 9, 0x40]);
    }
    area.bytes[4] = 0xff;
    assert!(guest.ram.write(at, &area.bytes));
}

fn bytes(guest: &Guest, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    assert!(guest.ram.read(at, &mut bytes));
    bytes
}

#[test]
fn extended_state_goes_out_and_in() {
    each(|kind| {
        for user in [false, true] {
            let (code, data) = if user { (USER_CODE, USER_DATA) } else { (CODE, DATA) };
            // In one page, and across two.
            for to in [0x1000_u64, 0x2e00] {
                let mut guest = Guest::new(kind);
                area(&guest, data);
                assert!(guest.ram.write(data + to, &[0xee; 832]));
                assert!(guest.ram.write(data + to + 512, &[0; 64]));
                let end = guest.code(code, |a| {
                    a.mov(eax, -1)?;
                    a.mov(edx, 0x1234)?;
                    a.mov(rbx, data)?;
                    a.mov(r10, data + to)?;
                    a.cmp(eax, 1)?;
                    a.xrstor64(ptr(rbx))?;
                    a.vpaddb(ymm3, ymm2, ymm1)?;
                    a.xsave64(ptr(r10))?;
                    a.seta(cl)?;
                    a.vpxor(ymm2, ymm2, ymm2)?;
                    a.xrstor(ptr(r10))?;
                    a.xsaveopt64(ptr(r10))
                });
                guest.code(end, |a| a.ud2());
                if user {
                    guest.enter_user(code);
                }
                let trap = guest.trap();
                assert_eq!((trap.vector, trap.rip), (vector::UD, end), "{kind:?}");
                let g = trap.state.gpr;
                assert_eq!((g[0], g[2], g[1] & 0xff), (0xffff_ffff, 0x1234, 1), "{kind:?}");
                let (from, saved) = (bytes(&guest, data, 832), bytes(&guest, data + to, 832));
                assert_eq!(saved[..8], from[..8], "control words, {kind:?} {to:#x}");
                assert_eq!(saved[8..24], [0; 16], "pointers");
                assert_eq!(saved[24..32], from[24..32], "MXCSR and its mask");
                assert_eq!(saved[32..160], from[32..160], "x87");
                let sum =
                    |at: usize| -> Vec<u8> { (at..at + 16).map(|i| from[i + 16].wrapping_add(from[i + 32])).collect() };
                assert_eq!(saved[160 + 48..160 + 64], sum(160), "{kind:?}");
                assert_eq!(saved[576 + 48..576 + 64], sum(576), "{kind:?}");
                assert_eq!(saved[160..160 + 48], from[160..160 + 48]);
                assert_eq!(saved[576 + 64..], from[576 + 64..]);
                assert_eq!(saved[416..512], [0xee; 96], "not ours");
                assert_eq!((saved[512], &saved[513..576]), (7, &[0; 63][..]));
            }
        }
    });
}

/// What is not asked for stays, in registers and in memory.
#[test]
fn parts_of_extended_state() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        area(&guest, DATA);
        assert!(guest.ram.write(DATA + 0x1000, &[0xee; 832]));
        assert!(guest.ram.write(DATA + 0x1000 + 512, &[0; 64]));
        assert!(guest.ram.write(DATA + 0x1000 + 512, &[1]));
        let end = guest.code(CODE, |a| {
            a.xor(edx, edx)?;
            a.mov(rbx, DATA)?;
            a.pcmpeqd(xmm1, xmm1)?;
            // AVX only: the lower halves stay.
            a.mov(eax, 4)?;
            a.xrstor64(ptr(rbx))?;
            a.mov(eax, 6)?;
            a.xsave(ptr(rbx + 0x1000))
        });
        guest.code(end, |a| a.ud2());
        assert_eq!(guest.trap().rip, end);
        let (from, saved) = (bytes(&guest, DATA, 832), bytes(&guest, DATA + 0x1000, 832));
        assert_eq!(saved[..24], [0xee; 24], "no x87, {kind:?}");
        assert_eq!(saved[32..160], [0xee; 128]);
        assert_eq!(saved[24..28], from[24..28], "AVX brings MXCSR");
        assert_eq!(saved[160 + 16..160 + 32], [0xff; 16]);
        assert_eq!(saved[576..], from[576..], "{kind:?}");
        assert_eq!(saved[512] & 5, 5);
    });
}

#[test]
fn bad_areas_of_extended_state() {
    let bad: [(&str, u64, u64); 5] = [
        ("component that is not there", 512, 1 << 9),
        ("compacted", 520, 1 << 63),
        ("reserved part of the header", 528, 1),
        ("MXCSR", 24, 1 << 16),
        ("alignment", 0, 0),
    ];
    each(|kind| {
        for (name, at, value) in bad {
            let mut guest = Guest::new(kind);
            let off = if name == "alignment" { 16 } else { 0 };
            area(&guest, DATA + off);
            if at != 0 {
                guest.put(DATA + off + at, &[guest.word(DATA + off + at) | value]);
            }
            let bad = guest.code(CODE, |a| {
                a.mov(rbx, DATA + off)?;
                a.mov(rax, 0x1111_0000_0007_u64)?;
                a.mov(rdx, 0x2222_0000_0000_u64)?;
                a.pcmpeqd(xmm5, xmm5)
            });
            guest.code(bad, |a| a.xrstor64(ptr(rbx)));
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), bad), "{name} {kind:?}");
            assert_eq!((trap.state.gpr[0], trap.state.gpr[2]), (0x1111_0000_0007, 0x2222_0000_0000), "{name} {kind:?}");
            assert_eq!(trap.state.fp.get_u128(FpState::XMM + 80), u128::MAX, "{name} {kind:?}");
        }
    });
}

#[test]
fn segment_bases() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let last = guest.code(CODE, |a| {
            a.mov(r9, 0xffff_8000_1234_5678_u64)?;
            a.cmp(r9, 0)?;
            a.wrgsbase(r9)?;
            a.setl(cl)?;
            a.rdgsbase(r10)?;
            a.rdgsbase(eax)?;
            a.mov(rsp, STACK)?;
            a.wrfsbase(rsp)?;
            a.rdfsbase(rdx)?;
            a.mov(r11, -1_i64)?;
            a.mov(r11w, cs)?;
            a.mov(rsi, -1_i64)?;
            a.mov(si, ss)?;
            a.mov(r8, cr3)?;
            a.mov(r12, 1_u64 << 47)
        });
        let end = guest.code(last, |a| a.wrfsbase(r12));
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), last), "{kind:?}");
        let g = trap.state.gpr;
        assert_eq!((g[10], g[0], g[1] & 0xff), (0xffff_8000_1234_5678, 0x1234_5678, 1), "{kind:?}");
        assert_eq!((g[2], g[8]), (STACK, crate::guest::CR3));
        assert_eq!((g[11], g[6]), (0xffff_ffff_ffff_0010, 0xffff_ffff_ffff_0018), "{kind:?}");
        assert!(end > last);
        // Switched off while its translation is there.
        guest.set(|state| {
            state.rip = CODE;
            state.cr4 &= !cr4::FSGSBASE;
        });
        assert_eq!(guest.trap().vector, vector::UD, "{kind:?}");
    });
}

/// Page faults leave RF in the frame; the return from them and all else here must not need the interpreter.
#[test]
fn in_the_code_cache() {
    let turns = 2000;
    let cases: [(&str, Build); 6] = [
        ("xsave, xrstor", |a| {
            a.mov(eax, 7)?;
            a.xor(edx, edx)?;
            a.xsaveopt64(ptr(rbx))?;
            a.xrstor64(ptr(rbx))
        }),
        ("bases", |a| {
            a.rdfsbase(rax)?;
            a.wrfsbase(rax)?;
            a.rdgsbase(r9)?;
            a.wrgsbase(r9)
        }),
        ("selectors", |a| {
            a.mov(ax, ds)?;
            a.mov(r9w, fs)
        }),
        ("control registers", |a| {
            a.mov(rax, cr0)?;
            a.mov(rax, cr2)?;
            a.mov(r9, cr3)?;
            a.mov(rax, cr4)
        }),
        ("sti and a jump", |a| {
            a.cli()?;
            a.sti()?;
            let mut on = a.create_label();
            a.jmp(on)?;
            a.nop()?;
            a.set_label(&mut on)
        }),
        ("iret with RF", |a| {
            let mut on = a.create_label();
            a.mov(rdx, rsp)?;
            a.push(0x18)?;
            a.push(rdx)?;
            a.push(0x1_0202)?;
            a.push(0x10)?;
            a.lea(rax, ptr(on))?;
            a.push(rax)?;
            a.iretq()?;
            a.set_label(&mut on)
        }),
    ];
    each(|kind| {
        for (name, build) in cases {
            let mut guest = Guest::new(kind);
            area(&guest, DATA);
            guest.code(CODE, |a| {
                a.mov(ebx, DATA as u32)?;
                a.mov(ecx, turns)?;
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                build(a)?;
                a.dec(ecx)?;
                a.jne(again)?;
                a.out(STOP, al)
            });
            let state = guest.stop();
            assert_eq!(state.gpr[1], 0);
            assert_eq!(state.rflags & rflags::RF, 0);
            let interpreted = guest.vcpu.counters().into_iter().find(|(name, _)| name == "instructions.interpreted");
            if matches!(kind, Kind::Bt | Kind::Fast) {
                let (_, interpreted) = interpreted.unwrap();
                assert!(interpreted < 20, "{name}: {interpreted}");
            }
        }
    });
}
