//! The comparison with the interpreter itself: it must find a wrong translation and say where, and find none in a right one.

use std::sync::Arc;

use bt::{BtEngine, Options};
use cpu::cpuid::CpuidModel;
use cpu::{Exit, rflags, vector};
use iced_x86::code_asm::*;
use memory::GuestRam;

use crate::guest::{Build, CODE, DATA, Guest, Kind, LOG, STOP, USER_CODE, USER_DATA};

/// A guest whose translator sees other bytes than its memory holds.
fn guest(lockstep: bool, tamper: Option<fn(u64, &mut [u8])>) -> Guest {
    let ram = GuestRam::new(64 << 20).unwrap();
    let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
    options.code_cache = 16 << 20;
    options.lockstep = lockstep;
    options.tamper = tamper;
    let engine = BtEngine::new(ram.clone(), options).unwrap();
    Guest::with_engine(Kind::Lockstep, ram, &engine)
}

fn counter(guest: &Guest, name: &str) -> u64 {
    guest.vcpu.counters().iter().find(|(counter, _)| counter == name).unwrap().1
}

/// Replaces `from`, which must be there once, in the page at `at`.
fn replace(page: u64, bytes: &mut [u8], at: u64, from: &[u8], to: &[u8]) {
    assert_eq!(from.len(), to.len());
    if page != at & !0xfff {
        return;
    }
    let found: Vec<usize> = (0..bytes.len() - from.len()).filter(|&i| bytes[i..].starts_with(from)).collect();
    assert_eq!(found.len(), 1, "{from:x?}");
    bytes[found[0]..found[0] + to.len()].copy_from_slice(to);
}

/// A wrong translation: what the program is, what the translator makes of it, and what the report must say.
struct Fault {
    name: &'static str,
    /// In front of the instruction that will be wrong, and the instruction.
    before: Build,
    wrong: Build,
    tamper: fn(u64, &mut [u8]),
    /// How the instruction is printed, and the lines of what differs; `AT` stands for the instruction's address.
    insn: &'static str,
    differs: &'static [&'static str],
}

#[test]
fn a_wrong_translation_is_found_and_named() {
    let faults = [
        Fault {
            name: "an immediate",
            before: |a| a.mov(ecx, 7),
            wrong: |a| a.add(eax, 0x1234_5678),
            tamper: |page, bytes| {
                replace(page, bytes, CODE, &[5, 0x78, 0x56, 0x34, 0x12], &[5, 0x79, 0x56, 0x34, 0x12])
            },
            insn: "add eax,12345678h",
            differs: &["rax: 0x12345678, 0x12345679; set at AT"],
        },
        Fault {
            name: "only a flag",
            before: |a| a.mov(eax, 0x7fff_ffff),
            wrong: |a| a.cmp(eax, 0x1234_5678),
            tamper: |page, bytes| {
                replace(page, bytes, CODE, &[0x3d, 0x78, 0x56, 0x34, 0x12], &[0x3d, 0x78, 0x56, 0x34, 0x92]);
            },
            insn: "cmp eax,12345678h",
            differs: &["rflags: 0x"],
        },
        Fault {
            name: "a value stored",
            before: |a| a.mov(ebx, DATA as u32),
            wrong: |a| a.mov(dword_ptr(rbx + 0x77), 0x0102_0304),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0x77, 4, 3, 2, 1], &[0x77, 4, 3, 9, 1]),
            insn: "mov dword ptr [rbx+77h],1020304h",
            differs: &["byte at 0x400079: 0x02, 0x09; set at AT"],
        },
        Fault {
            name: "a store that is not made",
            before: |a| a.mov(ebx, DATA as u32),
            wrong: |a| a.mov(dword_ptr(rbx + 0x77), 0x0102_0304),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0xc7, 0x43, 0x77], &[0xf7, 0x43, 0x77]),
            insn: "mov dword ptr [rbx+77h],1020304h",
            differs: &["byte at 0x400077: 0x04, 0x00; set at AT", "byte at 0x40007a: 0x01, 0x00; set at AT"],
        },
        Fault {
            name: "a branch the other way",
            before: |a| a.xor(eax, eax),
            wrong: |a| a.je(CODE + 0x800),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0x0f, 0x84], &[0x0f, 0x85]),
            insn: "je 0000000000020800h",
            differs: &["rip: the block went to 0x2"],
        },
        Fault {
            name: "the address pushed by a call",
            before: |a| a.nop(),
            wrong: |a| a.call(CODE + 0x800),
            tamper: |page, bytes| {
                // One byte longer, to the same target.
                let at = bytes.iter().position(|&byte| byte == 0xe8).unwrap();
                let displacement = bytes[at + 1] - 1;
                if page == CODE {
                    bytes.copy_within(at..at + 0x20, at + 1);
                    bytes[at + 2] = displacement;
                    bytes[at] = 0x40;
                }
            },
            insn: "call 0000000000020800h",
            differs: &["byte at 0x7fff8: 0x06, 0x07; set at AT"],
        },
        Fault {
            name: "a vector register",
            before: |a| a.pcmpeqd(xmm3, xmm3),
            wrong: |a| a.psrlq(xmm3, 13),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0x0f, 0x73, 0xd3, 13], &[0x0f, 0x73, 0xd3, 12]),
            insn: "psrlq xmm3,0Dh",
            differs: &["xmm3: 0x7ffffffffffff0007ffffffffffff, 0xfffffffffffff000fffffffffffff; set at AT"],
        },
        Fault {
            name: "the upper half of a vector register",
            before: |a| a.vpcmpeqd(ymm3, ymm3, ymm3),
            wrong: |a| a.vpsrlq(ymm5, ymm3, 13),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0xd5, 0x73, 0xd3, 13], &[0xd1, 0x73, 0xd3, 13]),
            insn: "vpsrlq ymm5,ymm3,0Dh",
            differs: &["ymm5 high: 0x7ffffffffffff0007ffffffffffff, 0x0; set at AT"],
        },
        Fault {
            name: "an x87 register",
            before: |a| a.fld1(),
            wrong: |a| a.fldpi(),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0xd9, 0xe8, 0xd9, 0xeb], &[0xd9, 0xe8, 0xd9, 0xec]),
            insn: "fldpi",
            differs: &["st0: 0x4000c90fdaa22168c235, 0x3ffd9a209a84fbcff799; set at AT"],
        },
        Fault {
            name: "a register that should not change",
            before: |a| a.mov(ecx, 7),
            wrong: |a| a.test(r12d, 0x1234_5678),
            tamper: |page, bytes| replace(page, bytes, CODE, &[0x41, 0xf7, 0xc4], &[0x41, 0xc7, 0xc4]),
            insn: "test r12d,12345678h",
            differs: &["r12: 0x0, 0x12345678; not to change here"],
        },
    ];
    for Fault { name, before, wrong, tamper, insn, differs } in faults {
        println!("{name}");
        let load = |guest: &Guest| {
            let at = guest.code(CODE, before);
            let behind = guest.code(at, wrong);
            for place in [behind, CODE + 0x800] {
                guest.code(place, |a| {
                    a.out(STOP, al)?;
                    a.nop()
                });
            }
            at
        };
        // The translator alone does not notice.
        let mut alone = guest(false, Some(tamper));
        load(&alone);
        assert_eq!(alone.run(), Exit::Stopped, "{name}");

        let mut compared = guest(true, Some(tamper));
        let at = load(&compared);
        let Exit::Internal(report) = compared.run() else { panic!("{name}: nothing found") };
        println!("{report}");
        let mut lines = report.lines();
        assert_eq!(lines.next(), Some("lockstep: the translator and the interpreter differ"));
        let listed: Vec<&str> = lines.by_ref().take_while(|line| !line.contains("(interpreter, then")).collect();
        assert!(listed[0].starts_with(&format!("  {CODE:#018x}  ")), "the block: {name}");
        assert!(listed.contains(&&*format!("  {at:#018x}  {insn}")), "the instruction: {name}");
        let found: Vec<&str> = lines.by_ref().take_while(|line| !line.starts_with("  before: ")).collect();
        for differs in differs {
            let differs = format!("  {}", differs.replace("AT", &format!("{at:#x}")));
            assert!(found.iter().any(|line| line.starts_with(&differs)), "{differs}: {name}");
        }
        let states: Vec<&str> = lines.collect();
        assert!(states.len() == 2 && states[0].starts_with("  interpreter: rip="), "{name}");
        assert!(states[1].starts_with("  translator: rip="), "{name}");
    }
}

/// A program with loops, calls, strings, floating point, faults, system calls and interrupts.
fn whole_guest(guest: &mut Guest) -> Vec<u8> {
    // The kernel: a page fault maps nothing, but skips the instruction; a system call logs a byte.
    guest.code(CODE + 0x4000, |a| {
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 7)?;
        a.iretq()
    });
    guest.gate(vector::PF, CODE + 0x4000, 0x8e);
    guest.code(CODE + 0x5000, |a| {
        a.push(rax)?;
        a.inc(qword_ptr(DATA))?;
        a.pop(rax)?;
        a.iretq()
    });
    guest.gate(0x40, CODE + 0x5000, 0x8e);
    guest.code(CODE + 0x8000, |a| {
        a.out(LOG, al)?;
        a.sysretq()
    });
    guest.code(CODE + 0x6000, |a| {
        a.out(STOP, al)?;
        a.nop()
    });
    guest.gate(0x80, CODE + 0x6000, 0xee);
    guest.map(USER_DATA + 0x5000, 0);
    guest.code(USER_CODE, |a| {
        let (mut outer, mut inner, mut function, mut leaf, mut done) =
            (a.create_label(), a.create_label(), a.create_label(), a.create_label(), a.create_label());
        a.mov(ebx, USER_DATA as u32)?;
        a.mov(r12d, 300)?;
        a.fldz()?;
        a.set_label(&mut outer)?;
        a.mov(ecx, 10)?;
        a.set_label(&mut inner)?;
        a.imul_3(rax, rcx, 0x0123_4567)?;
        a.add(qword_ptr(rbx + rcx * 8), rax)?;
        a.ror(qword_ptr(rbx + 8), 3)?;
        a.dec(ecx)?;
        a.jne(inner)?;
        a.call(function)?;
        a.lea(rsi, ptr(rbx))?;
        a.lea(rdi, ptr(rbx + 0x400))?;
        a.mov(ecx, 0x60)?;
        a.rep().movsb()?;
        a.vmovdqu(ymm1, ymmword_ptr(rbx + 0x400))?;
        a.vpaddq(ymm2, ymm2, ymm1)?;
        a.vmovdqu(ymmword_ptr(rbx + 0x500), ymm2)?;
        a.fld1()?;
        a.faddp(st1, st0)?;
        a.cvtsi2sd(xmm0, r12d)?;
        a.sqrtsd(xmm0, xmm0)?;
        a.addsd(xmm4, xmm0)?;
        // Not present: seven bytes long.
        a.mov(rax, qword_ptr(rbx + 0x5008))?;
        a.mov(r14d, r12d)?;
        a.and(r14d, 31)?;
        a.jne(done)?;
        a.mov(eax, r12d)?;
        a.syscall()?;
        a.set_label(&mut done)?;
        a.dec(r12d)?;
        a.jne(outer)?;
        a.fstp(qword_ptr(rbx + 0x600))?;
        a.movsd_2(qword_ptr(rbx + 0x608), xmm4)?;
        a.int(0x80)?;
        a.set_label(&mut function)?;
        a.push(r12)?;
        a.call(leaf)?;
        a.pop(r12)?;
        a.xor(r13, rax)?;
        a.mov(qword_ptr(rbx + 0x610), r13)?;
        a.ret()?;
        a.set_label(&mut leaf)?;
        a.mov(rax, qword_ptr(rbx + 0x20))?;
        a.bswap(rax)?;
        a.ret()
    });
    guest.enter_user(USER_CODE);
    guest.set(|state| state.rflags |= rflags::IF);
    for _ in 0..3 {
        guest.fixture.raise(0x40);
    }
    let exit = guest.run();
    assert_eq!(exit, Exit::Stopped, "{exit:?}");
    assert!(guest.vcpu.state().rip >= CODE + 0x6000, "{:x?}", guest.vcpu.state());
    assert_eq!(guest.word(DATA), 3, "interrupts");
    assert_eq!(f64::from_bits(guest.word(USER_DATA + 0x600)), 300.0);
    assert_eq!(guest.fixture.log.lock().unwrap().len(), 9, "system calls");
    let mut memory = vec![0; 0x700];
    assert!(guest.ram.read(USER_DATA, &mut memory));
    memory
}

#[test]
fn a_whole_guest_without_a_difference() {
    let expected = whole_guest(&mut Guest::new(Kind::Interp));
    assert!(whole_guest(&mut guest(false, None)) == expected);
    let mut compared = guest(true, None);
    assert!(whole_guest(&mut compared) == expected);
    let [yes, no, impossible] =
        ["lockstep.compared", "lockstep.not-compared", "lockstep.impossible"].map(|name| counter(&compared, name));
    println!("{yes} compared, {no} not, {impossible} impossible");
    assert!(yes > 200, "{yes} compared");
    assert!(no > yes, "known blocks are compared now and then only: {no}");
    assert!(impossible < yes / 20, "{impossible} of {yes} could not be compared");
}

/// A block that has agreed for a while is still looked at now and then.
#[test]
fn a_block_that_goes_wrong_late_is_found() {
    // Wrong only where ECX is below 2000h.
    fn tamper(page: u64, bytes: &mut [u8]) {
        replace(page, bytes, CODE, &[0x81, 0xf9, 0, 0x10, 0, 0], &[0x81, 0xf9, 0, 0x20, 0, 0]);
    }
    let mut compared = guest(true, Some(tamper));
    compared.code(CODE, |a| {
        let mut turn = a.create_label();
        a.mov(ecx, 0x4000)?;
        a.set_label(&mut turn)?;
        a.cmp(ecx, 0x1000)?;
        a.setb(al)?;
        a.add(edx, 1)?;
        a.sub(ecx, 1)?;
        a.jne(turn)?;
        a.out(STOP, al)?;
        a.nop()
    });
    let exit = compared.run();
    let Exit::Internal(report) = exit else { panic!("not found: {exit:?}") };
    assert!(report.contains("rax: 0x0, 0x1; set at 0x2000b"), "{report}");
}
