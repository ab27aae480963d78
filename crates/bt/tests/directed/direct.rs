//! Programs that run directly on the CPU: what they must not see of it, and what the kernel sees of them.

use std::sync::Arc;
use std::time::Duration;

use bt::{BtEngine, Options};
use cpu::cpuid::CpuidModel;
use iced_x86::code_asm::*;
use memory::GuestRam;

use crate::guest::{Built, CODE, Guest, Kind, NX, PRESENT, STOP, TABLES, USER, USER_CODE, USER_DATA, WRITE, each};

const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;

fn counter(guest: &Guest, name: &str) -> u64 {
    guest.vcpu.counters().iter().find(|(counter, _)| counter == name).map_or(0, |(_, value)| *value)
}

/// A guest whose kernel stops the engine at `int 0x80`, with a program at [`USER_CODE`] that finds [`USER_DATA`] in RBX.
fn start(mut guest: Guest, program: impl FnOnce(&mut CodeAssembler) -> Built) -> Guest {
    let stop = CODE + 0x8000;
    guest.code(stop, |a| {
        a.out(STOP, al)?;
        a.iretq()
    });
    guest.gate(0x80, stop, 0xee);
    guest.code(USER_CODE, program);
    guest.enter_user(USER_CODE);
    guest.set(|state| state.gpr[3] = USER_DATA);
    guest
}

/// Nobody says that it shall run directly: that it computes is found out.
#[test]
fn a_program_that_computes_is_chosen() {
    let ram = GuestRam::shareable(64 << 20).unwrap();
    let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
    options.code_cache = 16 << 20;
    let engine = BtEngine::new(ram.clone(), options).unwrap();
    computes(start(Guest::with_engine(Kind::Direct, ram.clone(), &engine), rounds));
    // A vCPU of after a reset has the process of the one before, on another thread.
    std::thread::scope(|scope| {
        scope.spawn(|| computes(start(Guest::after_reset(Kind::Direct, ram, &engine), rounds)));
    });
}

/// Rounds of three million.
fn rounds(a: &mut CodeAssembler) -> Built {
    let (mut round, mut top) = (a.create_label(), a.create_label());
    a.set_label(&mut round)?;
    a.mov(ecx, 3_000_000)?;
    a.set_label(&mut top)?;
    a.inc(qword_ptr(rbx))?;
    a.vpaddq(ymm3, ymm3, ymmword_ptr(rbx + 32))?;
    a.dec(ecx)?;
    a.jne(top)?;
    a.vmovdqu(ymmword_ptr(rbx + 64), ymm3)?;
    a.int(0x80)?;
    a.jmp(round)
}

fn computes(mut guest: Guest) {
    guest.put(USER_DATA, &[0]);
    guest.put(USER_DATA + 32, &[1, 2, 3, 4]);
    let mut rounds = 0;
    while counter(&guest, "direct.stops.system-call") < 5 {
        guest.stop();
        rounds += 1;
        assert_eq!(guest.word(USER_DATA), rounds * 3_000_000);
        for lane in 0..4 {
            assert_eq!(guest.word(USER_DATA + 64 + lane * 8), rounds * 3_000_000 * (lane + 1), "round {rounds}");
        }
        assert!(rounds < 300, "was never chosen");
    }
    assert!(counter(&guest, "direct.chosen") > 0);
}

/// CPUID, LSL and XGETBV answer as everywhere; those of a page with more of them than the CPU can watch, too.
#[test]
fn what_would_tell_of_the_host_does_not() {
    for (many, guarded) in [(1, false), (7, false), (7, true)] {
        let first = std::cell::OnceCell::new();
        each(|kind| {
            let mut guest = start(Guest::new(kind), |a| {
                // Where the flow is not known, each is one.
                let mut ahead = a.create_label();
                if !guarded {
                    a.lea(rax, ptr(ahead))?;
                    a.jmp(rax)?;
                }
                a.set_label(&mut ahead)?;
                for n in 0..many {
                    a.mov(r14, rbx)?;
                    a.mov(eax, if n == 0 { 1 } else { 0x8000_0000_u32 + n })?;
                    a.xor(ecx, ecx)?;
                    a.cpuid()?;
                    a.xchg(r14, rbx)?;
                    // The address in bits 24 to 31 of leaf 1 is the same, what stands for the host's state is not compared.
                    a.mov(dword_ptr(rbx + 16 * n), eax)?;
                    a.mov(dword_ptr(rbx + 16 * n + 4), r14d)?;
                    a.mov(dword_ptr(rbx + 16 * n + 8), ecx)?;
                    a.mov(dword_ptr(rbx + 16 * n + 12), edx)?;
                }
                a.xor(ecx, ecx)?;
                a.xgetbv()?;
                a.mov(dword_ptr(rbx + 256), eax)?;
                // As the dynamic loader saves registers: no more than the guest has.
                a.mov(eax, 0xee)?;
                a.xor(edx, edx)?;
                a.mov(qword_ptr(rbx + 0x400 + 832), rsp)?;
                a.mov(qword_ptr(rbx + 0x400 + 0x278), rdx)?;
                a.xsave(ptr(rbx + 0x400))?;
                a.mov(rax, qword_ptr(rbx + 0x400 + 832))?;
                a.mov(qword_ptr(rbx + 280), rax)?;
                a.mov(ecx, 0x38)?;
                a.lsl(eax, ecx)?;
                a.setz(byte_ptr(rbx + 264))?;
                a.mov(ecx, 0x2b)?;
                a.lsl(eax, ecx)?;
                a.mov(dword_ptr(rbx + 272), eax)?;
                a.int(0x80)
            });
            guest.stop();
            let words: Vec<u64> = (0..40).map(|n| guest.word(USER_DATA + n * 8)).collect();
            assert_eq!(
                (words[32], words[35]),
                (7, crate::guest::USER_STACK),
                "XCR0, and what is behind the saved registers"
            );
            assert_eq!(*first.get_or_init(|| words.clone()), words, "{kind:?}, {many} on the page, {guarded}");
            if kind == Kind::Direct {
                let (stops, tells) =
                    (counter(&guest, "direct.stops.instruction"), counter(&guest, "direct.stops.tells"));
                assert!(stops >= 1 || tells >= 1, "{stops} {tells}");
            }
        });
    }
}

/// One stop guards a function with many CPUIDs, also where the program is interrupted in its middle, and its neighbours run directly.
#[test]
fn functions_with_many_that_would_tell() {
    let first = std::cell::OnceCell::new();
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            let (mut again, mut function, mut neighbour) = (a.create_label(), a.create_label(), a.create_label());
            a.mov(rdi, rbx)?;
            a.mov(esi, 400)?;
            a.set_label(&mut again)?;
            a.call(function)?;
            a.call(neighbour)?;
            a.dec(esi)?;
            a.jne(again)?;
            a.int(0x80)?;
            a.set_label(&mut function)?;
            for leaf in [0_u32, 7, 0x4000_0000, 0x4000_0001, 0x8000_0002, 0x8000_0003, 0x8000_0004, 0x4000_0000] {
                a.mov(eax, leaf)?;
                a.xor(ecx, ecx)?;
                a.cpuid()?;
                for register in [rax, rbx, rcx, rdx] {
                    a.rol(r15, 7)?;
                    a.add(r15, register)?;
                }
            }
            a.ret()?;
            a.set_label(&mut neighbour)?;
            a.inc(qword_ptr(rdi))?;
            a.ret()
        });
        let (kick, done) = (guest.vcpu.kick_handle(), std::sync::atomic::AtomicBool::new(false));
        let sum = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::SeqCst) {
                    kick.kick();
                    std::thread::sleep(Duration::from_micros(50));
                }
            });
            let state = guest.stop();
            done.store(true, std::sync::atomic::Ordering::SeqCst);
            state.gpr[15]
        });
        assert_eq!(guest.word(USER_DATA), 400);
        assert_eq!(*first.get_or_init(|| sum), sum, "{kind:?}");
        if kind == Kind::Direct {
            // CPUID may stop the process where the CPU can do that.
            assert_eq!(counter(&guest, "direct.stops.tells"), 0);
            assert!(counter(&guest, "direct.stops.instruction") >= 400);
        }
    });
}

/// A compiler that runs what it has just written, on a page with other code and data, need not stop for each.
#[test]
fn pages_that_are_written_and_executed_by_turns() {
    const ROUNDS: u64 = 3000;
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            let mut again = a.create_label();
            // mov eax, ECX; ret
            a.mov(byte_ptr(rbx + 0x800), 0xb8)?;
            a.mov(byte_ptr(rbx + 0x805), 0xc3)?;
            a.lea(rsi, ptr(rbx + 0x800))?;
            a.mov(ecx, ROUNDS as u32)?;
            a.set_label(&mut again)?;
            a.mov(dword_ptr(rbx + 0x801), ecx)?;
            a.call(rsi)?;
            a.add(qword_ptr(rbx), rax)?;
            a.dec(ecx)?;
            a.jne(again)?;
            a.int(0x80)
        });
        guest.stop();
        assert_eq!(guest.word(USER_DATA), ROUNDS * (ROUNDS + 1) / 2, "{kind:?}");
        if kind == Kind::Direct {
            let stops: u64 = ["mapped", "instruction", "tells"]
                .iter()
                .map(|what| counter(&guest, &format!("direct.stops.{what}")))
                .sum();
            assert!(stops < 100, "{stops}");
        }
    });
}

/// Who uses registers that guests are not shown is counted: it should not know of them.
#[test]
fn registers_that_are_not_shown() {
    let used = std::arch::is_x86_feature_detected!("avx512f");
    for wide in [false, used] {
        let mut guest = start(Guest::new(Kind::Direct), |a| {
            if wide {
                a.vpternlogd(zmm20, zmm20, zmm20, 0xff)?;
            }
            a.vpaddq(ymm1, ymm1, ymm1)?;
            a.int(0x80)
        });
        guest.stop();
        assert_eq!(counter(&guest, "direct.stops.with-unshown-registers"), u64::from(wide));
    }
}

/// The bits of page-table entries tell what the program did, and only that.
#[test]
fn accessed_and_dirty_bits_are_those_of_its_accesses() {
    const NEAR: u64 = USER_DATA + 0x1000;
    let entry = |page: u64| TABLES + (page >> 12) * 8;
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            for _ in 0..2 {
                a.mov(rax, qword_ptr(rbx))?;
                a.int(0x80)?;
                a.mov(rax, qword_ptr(rbx))?;
                a.inc(qword_ptr(rbx))?;
                a.int(0x80)?;
            }
            Ok(())
        });
        for page in [USER_DATA, NEAR] {
            guest.map(page, page | PRESENT | WRITE | USER | NX);
        }
        for _ in 0..2 {
            guest.stop();
            assert_eq!(guest.word(entry(USER_DATA)) & (ACCESSED | DIRTY), ACCESSED, "{kind:?}: it has read");
            guest.stop();
            assert_eq!(guest.word(entry(USER_DATA)) & (ACCESSED | DIRTY), ACCESSED | DIRTY, "{kind:?}: it has written");
            assert_eq!(guest.word(entry(NEAR)) & (ACCESSED | DIRTY), 0, "{kind:?}: nobody was there");
            // The kernel looks for pages that are not used, and flushes.
            guest.map(USER_DATA, USER_DATA | PRESENT | WRITE | USER | NX);
            guest.set(|_| {});
        }
        assert_eq!(guest.word(USER_DATA), 2);
    });
}

/// The guest's page at the address where the process has one of its own.
#[test]
fn a_page_where_the_process_has_its_own() {
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            a.mov(rdx, bt::OWN_PAGE)?;
            a.mov(rax, qword_ptr(rdx))?;
            a.int(0x80)?;
            a.mov(rax, qword_ptr(rdx))?;
            a.int(0x80)
        });
        // It is not there: a fault. What runs directly sees the process's page instead, as there is no place for it that programs cannot reach.
        if kind != Kind::Direct {
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.state.cr2), (14, bt::OWN_PAGE), "{kind:?}");
        }
        let (mut table, all) = (crate::guest::CR3, PRESENT | WRITE | USER);
        for (shift, next) in [(39, 0xb0_0000), (30, 0xb0_1000), (21, 0xb0_2000), (12, 0xb0_3000)] {
            guest.put(table + ((bt::OWN_PAGE >> shift) & 0x1ff) * 8, &[next | all]);
            table = next;
        }
        guest.put(0xb0_3000, &[0x1234_5678_9abc]);
        guest.enter_user(USER_CODE);
        assert_eq!(guest.stop().gpr[0], 0x1234_5678_9abc, "{kind:?}");
        guest.put(0xb0_3000, &[77]);
        assert_eq!(guest.stop().gpr[0], 77, "{kind:?}");
    });
}

/// A program that never enters the kernel by itself is interrupted, and goes on where it was.
#[test]
fn it_is_called() {
    each(|kind| {
        if kind == Kind::Lockstep {
            // It may not get as far as one instruction in so short a time.
            return;
        }
        let mut guest = start(Guest::new(kind), |a| {
            let mut top = a.create_label();
            a.set_label(&mut top)?;
            a.inc(rsi)?;
            a.mov(qword_ptr(rbx), rsi)?;
            a.jmp(top)
        });
        let mut last = 0;
        for round in 0..20 {
            let (fixture, ram) = (guest.fixture.clone(), guest.ram.clone());
            let raiser = std::thread::spawn(move || {
                // A busy host may let it wait before it gets anywhere.
                let mut word = [0; 8];
                for _ in 0..5_000 {
                    std::thread::sleep(Duration::from_millis(2));
                    assert!(ram.read(USER_DATA, &mut word));
                    if u64::from_le_bytes(word) > last {
                        break;
                    }
                }
                fixture.raise(0x40);
            });
            let trap = guest.trap();
            raiser.join().unwrap();
            assert_eq!((trap.vector, trap.cs), (0x40, 0x33), "{kind:?}, round {round}");
            assert!(trap.state.gpr[6] > last, "{kind:?}: it stands still");
            last = trap.state.gpr[6];
            assert!(last - guest.word(USER_DATA) <= 1, "{kind:?}");
        }
    });
}

/// A far jump to code that is not 64-bit code, of which the host has some: refused, as by the translator.
#[test]
fn far_jumps_do_not_lead_out_of_64_bit_code() {
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            // Offset and selector of a far pointer: the host's 32-bit code segment, which this guest does not have.
            a.mov(dword_ptr(rbx), (USER_CODE + 0x100) as u32)?;
            a.mov(dword_ptr(rbx + 4), 0x23)?;
            a.db(&[0xff, 0x2b])?; // jmp far [rbx]
            a.nops_with_size(0x100 - 15)?;
            // As 32-bit code, this is a system call, too.
            a.int(0x80)
        });
        assert_eq!(guest.trap().vector, 13, "{kind:?}");
    });
}

/// A program that destroys the process it runs in gets an exception for what it did, like any other, and the guest goes on.
#[test]
fn a_program_that_destroys_its_process_harms_itself_only() {
    each(|kind| {
        let mut guest = start(Guest::new(kind), |a| {
            a.int(0x80)?;
            a.mov(rax, bt::OWN_PAGE)?;
            // Whatever is there.
            for place in 0..64 {
                let mut next = a.create_label();
                a.cmp(qword_ptr(rbx), place)?;
                a.jne(next)?;
                a.inc(qword_ptr(rbx))?;
                a.lea(rcx, qword_ptr(rax + place))?;
                a.jmp(rcx)?;
                a.set_label(&mut next)?;
            }
            a.jmp(USER_CODE)
        });
        guest.stop();
        for _ in 0..4 {
            let trap = guest.trap();
            assert_ne!(trap.vector, 0x80, "{kind:?}");
            guest.enter_user(USER_CODE);
            guest.set(|state| state.gpr[3] = USER_DATA);
            guest.stop();
        }
    });
}
