//! Each sensitive instruction, at level 3 and at level 0.

use cpu::{CpuState, SegmentIndex, cr4, rflags, vector};
use iced_x86::code_asm::*;

use crate::guest::{
    Built, CODE, DATA, Guest, MMIO, STACK, STOP, USER_CODE, USER_DATA, USER_STACK, each, user_segments,
};

type Build = fn(&mut CodeAssembler) -> Built;

/// What a program must not do: `#GP(0)`, or `#UD`.
#[test]
fn refused_to_programs() {
    let refused: [(&str, Build); 52] = [
        ("cli", |a| a.cli()),
        ("sti", |a| a.sti()),
        ("hlt", |a| a.hlt()),
        ("in", |a| a.in_(al, 0x10)),
        ("in dx", |a| a.in_(eax, dx)),
        ("out", |a| a.out(0x10, eax)),
        ("out dx", |a| a.out(dx, al)),
        ("insb", |a| a.insb()),
        ("rep outsd", |a| a.rep().outsd()),
        ("mov from cr0", |a| a.mov(rax, cr0)),
        ("mov from cr2", |a| a.mov(r9, cr2)),
        ("mov from cr3", |a| a.mov(rax, cr3)),
        ("mov from cr4", |a| a.mov(rax, cr4)),
        ("mov from cr8", |a| a.mov(rax, cr8)),
        ("mov to cr0", |a| a.mov(cr0, rax)),
        ("mov to cr2", |a| a.mov(cr2, rax)),
        ("mov to cr3", |a| a.mov(cr3, rax)),
        ("mov to cr4", |a| a.mov(cr4, rax)),
        ("mov to cr8", |a| a.mov(cr8, rax)),
        ("mov from dr", |a| a.mov(rax, dr6)),
        ("mov to dr", |a| a.mov(dr7, rax)),
        ("lgdt", |a| a.lgdt(ptr(rbx))),
        ("lidt", |a| a.lidt(ptr(rbx))),
        ("lldt", |a| a.lldt(ax)),
        ("ltr", |a| a.ltr(ax)),
        ("lmsw", |a| a.lmsw(ax)),
        ("clts", |a| a.clts()),
        ("invd", |a| a.invd()),
        ("wbinvd", |a| a.wbinvd()),
        ("invlpg", |a| a.invlpg(ptr(rbx))),
        ("rdmsr", |a| a.rdmsr()),
        ("wrmsr", |a| a.wrmsr()),
        ("swapgs", |a| a.swapgs()),
        ("xsetbv", |a| a.xsetbv()),
        ("sysret", |a| a.sysretq()),
        ("rdpmc", |a| a.rdpmc()),
        ("rdtsc with TSD", |a| a.rdtsc()),
        ("rdtscp", |a| a.rdtscp()),
        ("iretq to the kernel's segment", |a| {
            a.db(&[0x6a, 0x2b])?; // push SS
            a.push(rbx)?;
            a.push(0x202)?;
            a.push(0x38)?;
            a.push(rbx)?;
            a.iretq()
        }),
        ("far return", |a| {
            a.push(0x38)?;
            a.push(rbx)?;
            a.db(&[0x48, 0xcb])
        }),
        ("clac", |a| a.clac()),
        ("stac", |a| a.stac()),
        ("monitor", |a| a.monitor()),
        ("mwait", |a| a.mwait()),
        ("vmxon", |a| a.vmxon(qword_ptr(rbx))),
        ("vmrun", |a| a.db(&[0x0f, 0x01, 0xd8])),
        ("invpcid", |a| a.invpcid(rax, xmmword_ptr(rbx))),
        ("rsm", |a| a.rsm()),
        ("mov to cr1", |a| a.db(&[0x0f, 0x22, 0xc8])),
        ("getsec", |a| a.db(&[0x0f, 0x37])),
        ("sysexit", |a| a.sysexit()),
        ("mov ss", |a| a.mov(ss, eax)),
    ];
    each(|kind| {
        let mut guest = Guest::new(kind);
        for (name, build) in refused {
            guest.reset();
            guest.code(USER_CODE, build);
            guest.enter_user(USER_CODE);
            guest.set(|state| {
                state.cr4 |= cr4::TSD;
                state.gpr[3] = USER_DATA;
                state.gpr[0] = 0x50;
                state.gpr[2] = 0x77;
            });
            let trap = guest.trap();
            println!("{name}: {}", trap.vector);
            let undefined = matches!(
                name,
                "clac"
                    | "stac"
                    | "monitor"
                    | "mwait"
                    | "vmxon"
                    | "vmrun"
                    | "invpcid"
                    | "rsm"
                    | "mov to cr1"
                    | "getsec"
                    | "rdtscp"
            );
            let expected = if undefined { vector::UD } else { vector::GP };
            assert_eq!(trap.vector, expected, "{name} {kind:?}");
            if !name.contains("iretq") && !name.contains("far") {
                assert_eq!(trap.rip, USER_CODE, "{name} {kind:?}");
                let code = if name == "mov ss" { 0x50 } else { 0 };
                assert_eq!(trap.error, (!undefined).then_some(code), "{name} {kind:?}");
            }
            assert_eq!(trap.state.cr3 & !0xfff, 0x1000);
            assert!(guest.fixture.mmio.lock().unwrap().is_empty());
        }
    });
}

/// What a program may do, though the engine must look at it.
#[test]
fn allowed_to_programs() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(USER_CODE, |a| {
            a.mov(ebx, USER_DATA as u32)?;
            // Flags: IF and IOPL stay, ID and AC can be changed.
            a.push(0x24_3cd7)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(r8)?;
            a.push(2)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(r9)?;
            a.cld()?;
            // Segment bases.
            a.mov(rax, 0x1234_5678_9abc_u64)?;
            a.wrfsbase(rax)?;
            a.rdfsbase(r10)?;
            a.lea(rax, ptr(rbx + 0x100))?;
            a.wrgsbase(rax)?;
            a.rdgsbase(r11)?;
            a.mov(eax, 0x2222)?;
            a.mov(dword_ptr(0x10).gs(), eax)?;
            a.sgdt(ptr(rbx))?;
            a.sidt(ptr(rbx + 0x20))?;
            a.str(ecx)?;
            a.mov(dword_ptr(rbx + 0x40), ecx)?;
            a.mov(ax, cs)?;
            a.mov(dx, ss)?;
            a.shl(edx, 16)?;
            a.mov(dx, ax)?;
            a.mov(dword_ptr(rbx + 0x44), edx)?;
            a.xor(ecx, ecx)?;
            a.xgetbv()?;
            a.mov(dword_ptr(rbx + 0x48), eax)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.mov(r13d, ecx)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.mov(r14, rax)?;
            a.rdtsc()?;
            a.shl(rdx, 32)?;
            a.or(rax, rdx)?;
            a.sub(rax, r14)?;
            a.mov(r14, rax)?;
            // A data segment of the program's, and a null one.
            a.mov(eax, 0x2b)?;
            a.mov(ds, eax)?;
            a.mov(eax, 3)?;
            a.mov(es, eax)?;
            a.mov(r12d, ds)?;
            a.int3()
        });
        guest.enter_user(USER_CODE);
        let trap = guest.trap();
        assert_eq!(trap.vector, vector::BP, "{kind:?}: {trap:x?}");
        let g = trap.state.gpr;
        assert_eq!(g[8] & !rflags::TF, 0x24_0ed7, "IF cannot be cleared, IOPL not set: {kind:?}");
        assert_eq!(g[9], 0x202);
        assert_eq!((g[10], g[11]), (0x1234_5678_9abc, USER_DATA + 0x100));
        assert_eq!(guest.word(USER_DATA + 0x110) as u32, 0x2222);
        assert_eq!(guest.word(USER_DATA) as u16, 11 * 8 - 1);
        assert_eq!(guest.word(USER_DATA + 0x40), 0x2b_0033 << 32 | 0x38);
        assert_eq!(guest.word(USER_DATA + 0x48) as u32, 7);
        assert!(g[14] < 1 << 40, "the TSC goes on");
        assert_eq!(g[12], 0x2b);
    });
}

/// The kernel's: effects in the state.
#[test]
fn the_kernels() {
    type Case = (&'static str, Build, fn(&mut CpuState));
    let cases: [Case; 27] = [
        ("cli", |a| a.cli(), |s| s.rflags &= !rflags::IF),
        ("clts", |a| a.clts(), |_| ()),
        ("mov to cr0", |a| a.mov(cr0, r8), |s| s.cr0 = s.gpr[8]),
        ("mov to cr2", |a| a.mov(cr2, r9), |s| s.cr2 = s.gpr[9]),
        ("mov to cr4", |a| a.mov(cr4, r10), |s| s.cr4 = s.gpr[10]),
        ("mov from cr4", |a| a.mov(r11, cr4), |s| s.gpr[11] = s.cr4),
        ("mov from cr0", |a| a.mov(rsp, cr0), |s| s.gpr[4] = s.cr0),
        ("mov to dr3", |a| a.mov(dr3, rbx), |s| s.dr[3] = s.gpr[3]),
        ("mov from dr7", |a| a.mov(r12, dr7), |s| s.gpr[12] = 0x400),
        ("smsw", |a| a.smsw(ecx), |s| s.gpr[1] = s.cr0 & 0xffff_ffff),
        (
            "swapgs",
            |a| a.swapgs(),
            |s| {
                (s.segments[SegmentIndex::Gs as usize].base, s.kernel_gs_base) = (0x1111, 0x2222);
            },
        ),
        ("wrfsbase", |a| a.wrfsbase(rbx), |s| s.segments[SegmentIndex::Fs as usize].base = s.gpr[3]),
        ("wrgsbase", |a| a.wrgsbase(ebx), |s| s.segments[SegmentIndex::Gs as usize].base = s.gpr[3] & 0xffff_ffff),
        ("rdgsbase", |a| a.rdgsbase(r9), |s| s.gpr[9] = 0x2222),
        (
            "null ds",
            |a| a.mov(ds, edi),
            |s| {
                s.segments[SegmentIndex::Ds as usize] = s.segments[SegmentIndex::Es as usize];
            },
        ),
        ("pushfq", |a| a.pushfq(), |s| s.gpr[4] -= 8),
        (
            "popfq",
            |a| a.popfq(),
            |s| {
                s.gpr[4] += 8;
                s.rflags = 0x24_0ad7;
            },
        ),
        (
            "popf with NT",
            |a| a.popf(),
            |s| {
                s.gpr[4] += 2;
                s.rflags = s.rflags & !0xffff | 0x0ad7;
            },
        ),
        ("lmsw", |a| a.lmsw(r15w), |s| s.cr0 |= 8),
        ("lldt", |a| a.lldt(di), |s| s.ldtr.selector = 0),
        (
            "lar",
            |a| a.lar(ecx, esi),
            |s| {
                s.gpr[1] = 0xcf_9300;
                s.rflags |= rflags::ZF;
            },
        ),
        ("verw", |a| a.verw(si), |s| s.rflags |= rflags::ZF),
        ("wbinvd", |a| a.wbinvd(), |_| ()),
        ("invlpg", |a| a.invlpg(ptr(rbx)), |_| ()),
        ("in", |a| a.in_(al, 0x31), |s| s.gpr[0] = (s.gpr[0] & !0xff) | (0x31 ^ 0xa5)),
        ("in ax", |a| a.in_(ax, dx), |s| s.gpr[0] = (s.gpr[0] & !0xffff) | 0x9494),
        ("mov to cr8", |a| a.mov(cr8, r14), |_| ()),
    ];
    each(|kind| {
        for (name, build, effect) in cases {
            let mut guest = Guest::new(kind);
            let behind = guest.code(CODE, build);
            // Stops without a register's help.
            guest.code(behind, |a| {
                a.nop()?;
                a.out(STOP, al)
            });
            guest.put(STACK, &[0x24_0ad7]);
            guest.set(|state| {
                for (i, register) in state.gpr.iter_mut().enumerate() {
                    *register = 0x0101_0101_0101 * i as u64;
                }
                state.gpr[0] = 0x1234_5678;
                state.gpr[2] = 0x31;
                state.gpr[3] = DATA;
                state.gpr[4] = STACK;
                state.gpr[6] = 0x18;
                state.gpr[7] = 0;
                state.gpr[8] = state.cr0 | cpu::cr0::TS;
                state.gpr[10] = state.cr4 & !cr4::PGE;
                state.gpr[14] = 5;
                state.gpr[15] = 0xffff;
                state.rflags = 2 | rflags::IF | rflags::CF;
                state.kernel_gs_base = 0x1111;
                state.segments[SegmentIndex::Gs as usize].base = 0x2222;
                state.segments[SegmentIndex::Es as usize] =
                    cpu::Segment { selector: 0, ..state.segments[SegmentIndex::Es as usize] };
            });
            let mut expected = guest.vcpu.state();
            effect(&mut expected);
            let mut state = guest.stop();
            expected.rip = behind + 3;
            // The hidden part of null segments is not looked at.
            for s in [&mut state, &mut expected] {
                for segment in s.segments.iter_mut().filter(|segment| segment.selector & !3 == 0) {
                    (segment.limit, segment.attributes) = (0, 0);
                }
                (s.ldtr.base, s.ldtr.limit, s.ldtr.attributes) = (0, 0, 0);
            }
            if name == "lmsw" {
                expected.cr0 |= 0xe & 0xf;
            }
            assert_eq!(state.gpr, expected.gpr, "{name} {kind:?}");
            assert_eq!(state, expected, "{name} {kind:?}");
            if name == "mov to cr8" {
                assert_eq!(guest.fixture.tpr.load(std::sync::atomic::Ordering::SeqCst), 5);
            }
            if name == "pushfq" {
                assert_eq!(guest.word(STACK - 8), 2 | rflags::IF | rflags::CF);
            }
        }
    });
}

/// MSRs that decide about other instructions.
#[test]
fn model_specific_registers() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        let behind = guest.code(CODE, |a| {
            for (msr, value) in [
                (0xc000_0081_u32, 0x0023_0010_0000_0000_u64),
                (0xc000_0082, CODE + 0x8000),
                (0xc000_0084, 0x4_7700),
                (0xc000_0100, 0x1111_2222_3333),
                (0xc000_0101, 0xffff_8000_0000_1000),
                (0xc000_0102, 0x4444),
            ] {
                a.mov(ecx, msr)?;
                a.mov(eax, value as u32)?;
                a.mov(edx, (value >> 32) as u32)?;
                a.wrmsr()?;
                a.xor(eax, eax)?;
                a.xor(edx, edx)?;
                a.rdmsr()?;
                a.shl(rdx, 32)?;
                a.or(rax, rdx)?;
                a.add(r12, rax)?;
            }
            // IA32_TSC_AUX: for RDTSCP, which is not shown.
            a.mov(ecx, 0xc000_0103_u32)?;
            Ok(())
        });
        let end = guest.code(behind, |a| a.rdmsr());
        assert!(end > behind);
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.error, trap.rip), (vector::GP, Some(0), behind), "{kind:?}");
        let state = trap.state;
        assert_eq!((state.lstar, state.sfmask), (CODE + 0x8000, 0x4_7700));
        assert_eq!(state.segments[SegmentIndex::Fs as usize].base, 0x1111_2222_3333);
        assert_eq!(state.kernel_gs_base, 0x4444);
    });
}

/// SYSCALL and SYSRET, IRET to the program and back, with all registers and flags looked at.
#[test]
fn system_calls() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE + 0x8000, |a| {
            a.swapgs()?;
            a.pushfq()?;
            a.pop(r14)?;
            a.mov(r15, rsp)?;
            a.mov(rsp, STACK)?;
            a.mov(qword_ptr(DATA), rcx)?;
            a.mov(qword_ptr(DATA + 8), r11)?;
            a.mov(rsp, r15)?;
            a.swapgs()?;
            a.sysretq()
        });
        let after = guest.code(USER_CODE, |a| {
            a.mov(eax, 1)?;
            a.neg(eax)?;
            a.syscall()
        });
        guest.code(after, |a| {
            a.pushfq()?;
            a.pop(rbx)?;
            a.mov(ebp, cs)?;
            a.mov(esi, ss)?;
            a.mov(rdi, rsp)?;
            a.ud2()
        });
        guest.enter_user(USER_CODE);
        // The stack of the kernel's PUSHFQ is the program's.
        for _ in 0..3 {
            guest.set(|state| {
                user_segments(state);
                state.rip = USER_CODE;
                state.rflags = 0x202;
                state.gpr[4] = USER_STACK;
            });
            let trap = guest.trap();
            assert_eq!(trap.vector, vector::UD, "{kind:?}");
            let g = trap.state.gpr;
            let flags = 0x202 | rflags::CF | rflags::SF | rflags::PF | rflags::AF;
            assert_eq!((g[1], g[11]), (after, flags), "RCX and R11");
            assert_eq!((guest.word(DATA), guest.word(DATA + 8)), (after, flags));
            assert_eq!(g[14], 2, "FMASK");
            assert_eq!(g[3], flags, "{kind:?}");
            assert_eq!((g[5], g[6], g[7]), (0x33, 0x2b, USER_STACK));
        }
        // Without SCE there is no SYSCALL.
        guest.set(|state| {
            user_segments(state);
            state.rip = USER_CODE;
            state.efer &= !cpu::efer::SCE;
        });
        assert_eq!(guest.trap().vector, vector::UD, "{kind:?}");
    });
}

/// SYSRET to an address that is not canonical faults in the kernel, with nothing done.
#[test]
fn sysret_to_nowhere() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| a.sysretq());
        guest.set(|state| (state.gpr[1], state.gpr[11]) = (0x8000_0000_0000, 0x202));
        let trap = guest.trap();
        assert_eq!((trap.vector, trap.rip, trap.cs), (vector::GP, CODE, 0x10), "{kind:?}");
    });
}

/// Devices: memory-mapped, by every kind of instruction, also across units.
#[test]
fn memory_mapped_devices() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.code(CODE, |a| {
            a.mov(ebx, MMIO as u32)?;
            a.mov(rax, qword_ptr(rbx + 8))?;
            a.movzx(ecx, byte_ptr(rbx + 0x35))?;
            a.mov(r9d, dword_ptr(rbx + 0x16))?;
            a.mov(edx, 0x0101_0101)?;
            a.add(edx, dword_ptr(rbx + 0x40))?;
            a.mov(dword_ptr(rbx + 0x20), 7)?;
            a.movups(xmm0, xmmword_ptr(rbx + 0x50))?;
            a.movq(r12, xmm0)?;
            a.or(byte_ptr(rbx + 0x81), 2)?;
            a.push(qword_ptr(rbx + 0x60))?;
            a.pop(r13)?;
            a.out(STOP, al)
        });
        let state = guest.stop();
        let g = state.gpr;
        assert_eq!((g[0], g[1]), (0x0f0e_0d0c_0b0a_0908, 0x35), "{kind:?}");
        assert_eq!((g[9], g[2]), (0x1918_1716, 0x4443_4241));
        assert_eq!((g[12], g[13]), (0x5756_5554_5352_5150, 0x6766_6564_6362_6160));
        let writes = guest.fixture.mmio.lock().unwrap().clone();
        let at = 3 << 30;
        assert_eq!(writes, [(at + 0x20, vec![7, 0, 0, 0]), (at + 0x81, vec![0x83])]);
    });
}

/// POP RSP: what is popped is the stack pointer, also in the middle of accesses through it.
#[test]
fn pop_of_the_stack_pointer() {
    each(|kind| {
        let mut guest = Guest::new(kind);
        guest.put(DATA, &[DATA + 0x100]);
        guest.put(DATA + 0x100, &[11, 22, DATA + 0x208]);
        guest.put(DATA + 0x208, &[33]);
        guest.code(CODE, |a| {
            a.mov(rsp, DATA)?;
            a.stc()?;
            a.pop(rsp)?;
            a.pop(rax)?;
            a.pop(r10)?;
            a.pop(rsp)?;
            a.mov(rcx, qword_ptr(rsp))?;
            a.pop(rdx)?;
            a.push(rdx)?;
            a.setc(bl)?;
            a.out(STOP, al)
        });
        let g = guest.stop().gpr;
        assert_eq!((g[0], g[10], g[1], g[2], g[3] & 0xff), (11, 22, 33, 33, 1), "{kind:?}");
        assert_eq!(g[4], DATA + 0x208, "{kind:?}");
    });
}
