//! Several vCPUs of the translator at once, on real threads: what they do to each other must come out as on real CPUs.
//!
//! Each vCPU runs a program of its own in one address space. Programs count what they see wrong in [`WRONG`]; a test that hangs is
//! stopped, and shows where each vCPU stands.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bt::{BtEngine, Options};
use cpu::cpuid::CpuidModel;
use cpu::{Bus, CpuState, Engine, Exit, InterruptStatus, Kick, LocalApic, MsrError, Vcpu, VcpuSetup, gpr};
use iced_x86::code_asm::*;
use interp::InterpEngine;
use memory::GuestRam;

use crate::guest::{Built, CODE, DATA, GLOBAL, Guest, Kind, PRESENT, STACK, STOP, TABLES, WRITE};

/// OUT of a vector to this port plus n makes an interrupt pending on vCPU n.
const IPI: i32 = 0x20;
/// A word that programs add to when they see something wrong.
const WRONG: u64 = DATA;
/// What the programs count together.
const COUNT: u64 = DATA + 0x40;
const LOCK: u64 = DATA + 0x80;
const FLAG: u64 = DATA + 0xc0;
const ANSWER: u64 = DATA + 0x100;
/// A page of its own.
const PAGE: u64 = DATA + 0x1_0000;
const FRAME_A: u64 = DATA + 0x2_0000;
const FRAME_B: u64 = DATA + 0x3_0000;
const VECTOR: u8 = 0x40;

/// One vCPU's side of the machine.
#[derive(Default)]
struct Side {
    pending: Mutex<VecDeque<u8>>,
    waiting: AtomicUsize,
    nmi: AtomicBool,
    kick: OnceLock<Arc<dyn Kick>>,
    stop: OnceLock<Arc<dyn Kick>>,
}

impl Side {
    fn raise(&self, vector: u8) {
        self.pending.lock().unwrap().push_back(vector);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.kick.get().unwrap().kick();
    }
}

struct Board {
    sides: Arc<Vec<Side>>,
    index: usize,
}

impl Board {
    fn own(&self) -> &Side {
        &self.sides[self.index]
    }
}

impl Bus for Board {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match i32::from(port) {
            STOP => self.own().stop.get().unwrap().kick(),
            port => {
                if let Some(side) = self.sides.get((port - IPI) as usize) {
                    side.raise(data[0]);
                }
            }
        }
    }

    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

impl LocalApic for Board {
    fn read_msr(&self, _msr: u32) -> Result<u64, MsrError> {
        Err(MsrError)
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> Result<(), MsrError> {
        Err(MsrError)
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _value: u8) {}
    fn status(&self) -> InterruptStatus {
        let side = self.own();
        InterruptStatus {
            interrupt: side.waiting.load(Ordering::SeqCst) != 0,
            nmi: side.nmi.load(Ordering::SeqCst),
            ..Default::default()
        }
    }
    fn acknowledge(&self) -> Option<u8> {
        let vector = self.own().pending.lock().unwrap().pop_front()?;
        self.own().waiting.fetch_sub(1, Ordering::SeqCst);
        Some(vector)
    }
    fn acknowledge_nmi(&self) {
        self.own().nmi.store(false, Ordering::SeqCst);
    }
    fn acknowledge_init(&self) {}
    fn eoi(&self) {}
}

/// A machine of several vCPUs. Its memory is made by a [`Guest`], whose own vCPU never runs.
struct Machine {
    guest: Guest,
    sides: Arc<Vec<Side>>,
    vcpus: Vec<Box<dyn Vcpu>>,
}

impl Machine {
    fn new(cpus: usize) -> Self {
        let ram = GuestRam::new(64 << 20).unwrap();
        let mut model = CpuidModel::new(cpus as u32, 1_000_000);
        model.pv_unhalt = true;
        let mut options = Options::new(Arc::new(model));
        options.code_cache = 16 << 20;
        let engine = BtEngine::new(ram.clone(), options).unwrap();
        let sides: Arc<Vec<Side>> = Arc::new((0..cpus).map(|_| Side::default()).collect());
        let mut vcpus = Vec::new();
        for index in 0..cpus {
            let board = Arc::new(Board { sides: sides.clone(), index });
            let vcpu = engine.create_vcpu(VcpuSetup { index: index as u32, lapic: board.clone(), bus: board }).unwrap();
            assert!(sides[index].kick.set(vcpu.kick_handle()).is_ok());
            assert!(sides[index].stop.set(vcpu.stop_handle()).is_ok());
            vcpus.push(vcpu);
        }
        // A vCPU of the translator that never runs would be one that may yet wake the others.
        let guest = Guest::with_engine(Kind::Interp, ram.clone(), &InterpEngine::new(ram, 1));
        let mut this = Self { guest, sides, vcpus };
        for index in 0..cpus {
            this.set(index, |_| {});
        }
        this
    }

    /// Sets the start state of a vCPU: its code is at [`code`], its stack is its own, interrupts are on.
    fn set(&mut self, index: usize, change: impl FnOnce(&mut CpuState)) {
        let mut state = self.guest.start_state();
        state.rip = code(index);
        state.gpr[gpr::RSP] = STACK + 0x1000 * index as u64;
        state.rflags |= cpu::rflags::IF;
        change(&mut state);
        self.vcpus[index].set_state(&state);
    }

    /// Gives a vCPU its program, which ends with an OUT to [`STOP`].
    fn program(&self, index: usize, build: impl FnOnce(&mut CodeAssembler) -> Built) {
        self.guest.code(code(index), |a| {
            build(a)?;
            a.out(STOP, al)
        });
    }

    /// Lets [`VECTOR`] go to a handler at `address`.
    fn handler(&self, address: u64, build: impl FnOnce(&mut CodeAssembler) -> Built) {
        self.guest.code(address, |a| {
            build(a)?;
            a.iretq()
        });
        self.guest.gate(VECTOR, address, 0x8e);
    }

    /// Runs all vCPUs to the ends of their programs.
    fn run(&mut self) {
        let sides = &self.sides;
        let left = AtomicUsize::new(self.vcpus.len());
        let hung = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for (index, vcpu) in self.vcpus.iter_mut().enumerate() {
                let (left, hung) = (&left, &hung);
                scope.spawn(move || {
                    let exit = vcpu.run();
                    left.fetch_sub(1, Ordering::SeqCst);
                    let state = vcpu.state();
                    let ended = (code(index)..code(index) + 0x1000).contains(&state.rip);
                    if exit != Exit::Stopped || !ended || hung.load(Ordering::SeqCst) {
                        hung.store(true, Ordering::SeqCst);
                        println!("vCPU {index}: {exit:?} at {:#x} {:x?}", state.rip, state.gpr);
                    }
                });
            }
            let start = Instant::now();
            while left.load(Ordering::SeqCst) > 0 {
                std::thread::sleep(Duration::from_millis(1));
                if start.elapsed() > Duration::from_secs(240) || hung.load(Ordering::SeqCst) {
                    hung.store(true, Ordering::SeqCst);
                    sides.iter().for_each(|side| side.stop.get().unwrap().kick());
                }
            }
        });
        assert!(!hung.load(Ordering::SeqCst), "a vCPU hangs, or ended where it should not");
        assert_eq!(self.guest.word(WRONG), 0, "wrong results");
    }

    fn counter(&self, name: &str) -> u64 {
        let counters = self.vcpus[0].counters();
        counters.iter().find(|(kind, _)| kind == name).map_or(0, |(_, value)| *value)
    }
}

/// Where the program of a vCPU lies.
fn code(index: usize) -> u64 {
    CODE + 0x1000 * index as u64
}

/// A loop of `turns`, counted in RBP.
fn turns(a: &mut CodeAssembler, turns: u32, body: impl FnOnce(&mut CodeAssembler) -> Built) -> Built {
    let mut again = a.create_label();
    a.mov(ebp, turns as i32)?;
    a.set_label(&mut again)?;
    body(a)?;
    a.dec(ebp)?;
    a.jne(again)
}

/// Spins until the word at `address` is at least RCX.
fn wait_for(a: &mut CodeAssembler, address: u64) -> Built {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.cmp(qword_ptr(address), rcx)?;
    a.jae(done)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Counts something wrong.
fn wrong(a: &mut CodeAssembler) -> Built {
    a.lock().inc(qword_ptr(WRONG))
}

const CPUS: usize = 4;

#[test]
fn locked_instructions_count_exactly() {
    const TURNS: u32 = 20_000;
    let mut machine = Machine::new(CPUS);
    for index in 0..CPUS {
        machine.program(index, |a| {
            turns(a, TURNS, |a| {
                a.lock().inc(qword_ptr(COUNT))?;
                a.mov(eax, 3)?;
                a.lock().xadd(qword_ptr(COUNT + 8), rax)?;
                // By compare and exchange.
                let mut again = a.create_label();
                a.mov(rax, qword_ptr(COUNT + 16))?;
                a.set_label(&mut again)?;
                a.lea(rcx, qword_ptr(rax + 5))?;
                a.lock().cmpxchg(qword_ptr(COUNT + 16), rcx)?;
                a.jne(again)?;
                // Both halves at once.
                let mut again = a.create_label();
                a.mov(rax, qword_ptr(COUNT + 32))?;
                a.mov(rdx, qword_ptr(COUNT + 40))?;
                a.set_label(&mut again)?;
                a.lea(rbx, qword_ptr(rax + 1))?;
                a.lea(rcx, qword_ptr(rdx + 2))?;
                a.lock().cmpxchg16b(xmmword_ptr(COUNT + 32))?;
                a.jne(again)
            })
        });
    }
    machine.run();
    let total = CPUS as u64 * u64::from(TURNS);
    let counts = [0, 8, 16, 32, 40].map(|at| machine.guest.word(COUNT + at));
    assert_eq!(counts, [total, 3 * total, 5 * total, total, 2 * total]);
}

#[test]
fn locks_keep_others_out() {
    const TURNS: u32 = 5_000;
    let mut machine = Machine::new(CPUS);
    for index in 0..CPUS {
        machine.program(index, |a| {
            turns(a, TURNS, |a| {
                // A ticket lock.
                a.mov(ecx, 1)?;
                a.lock().xadd(qword_ptr(LOCK), rcx)?;
                wait_for(a, LOCK + 8)?;
                a.mov(rax, qword_ptr(COUNT))?;
                a.inc(rax)?;
                a.mov(qword_ptr(COUNT), rax)?;
                a.inc(qword_ptr(LOCK + 8))?;
                // A spin lock by XCHG, which locks without a prefix.
                let (mut again, mut got) = (a.create_label(), a.create_label());
                a.set_label(&mut again)?;
                a.mov(eax, 1)?;
                a.xchg(dword_ptr(LOCK + 16), eax)?;
                a.test(eax, eax)?;
                a.je(got)?;
                a.pause()?;
                a.jmp(again)?;
                a.set_label(&mut got)?;
                a.inc(qword_ptr(COUNT + 8))?;
                a.mov(dword_ptr(LOCK + 16), 0)
            })
        });
    }
    machine.run();
    let total = CPUS as u64 * u64::from(TURNS);
    assert_eq!([machine.guest.word(COUNT), machine.guest.word(COUNT + 8)], [total, total]);
}

/// Across a page, and in a page with code: the interpreter's, against the host's own.
#[test]
fn locked_accesses_that_the_host_cannot_do_as_one() {
    const TURNS: u32 = 3_000;
    let mut machine = Machine::new(CPUS);
    let crossing = PAGE + 0x1000 - 4;
    for index in 0..CPUS {
        let in_code = code(0) + 0x800;
        machine.program(index, |a| {
            turns(a, TURNS, |a| {
                if index % 2 == 0 {
                    a.lock().add(qword_ptr(crossing), 1)?;
                    a.mov(eax, 1)?;
                    a.lock().xadd(qword_ptr(crossing), rax)?;
                    let mut again = a.create_label();
                    a.mov(rax, qword_ptr(crossing))?;
                    a.set_label(&mut again)?;
                    a.lea(rcx, qword_ptr(rax + 1))?;
                    a.lock().cmpxchg(qword_ptr(crossing), rcx)?;
                    a.jne(again)?;
                } else {
                    // The low half alone, in one page.
                    a.lock().add(dword_ptr(crossing), 3)?;
                }
                a.lock().inc(qword_ptr(in_code))
            })
        });
    }
    machine.run();
    let total = CPUS as u64 * u64::from(TURNS);
    assert_eq!([machine.guest.word(crossing), machine.guest.word(code(0) + 0x800)], [3 * total, total]);
    assert!(machine.counter("stops.locked") >= 3 * 2 * u64::from(TURNS));
}

/// One vCPU writes functions, the others call them as soon as they are told: into pages that were data until then, and over
/// code that they have called before.
#[test]
fn code_written_for_others() {
    const ROUNDS: u32 = 6_000;
    let mut machine = Machine::new(3);
    // Function n of 256, each in a page of its own, returns the round.
    let address = |a: &mut CodeAssembler| -> Built {
        a.mov(ebx, ebp)?;
        a.and(ebx, 255)?;
        a.shl(ebx, 12)?;
        a.add(ebx, (DATA + 0x8_0000) as i32)
    };
    machine.program(0, |a| {
        a.xor(ebp, ebp)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(ebp)?;
        address(a)?;
        a.mov(byte_ptr(rbx), 0xb8)?; // mov eax, imm32
        a.mov(dword_ptr(rbx + 1), ebp)?;
        a.mov(byte_ptr(rbx + 5), 0xc3)?; // ret
        a.mov(qword_ptr(FLAG), rbp)?;
        a.mov(ecx, ebp)?;
        wait_for(a, ANSWER)?;
        wait_for(a, ANSWER + 8)?;
        a.cmp(ebp, ROUNDS as i32)?;
        a.jne(again)
    });
    for index in 1..3 {
        machine.program(index, |a| {
            a.xor(ebp, ebp)?;
            let (mut again, mut good) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.inc(ebp)?;
            a.mov(ecx, ebp)?;
            wait_for(a, FLAG)?;
            address(a)?;
            // Serializes.
            a.push(rbx)?;
            a.xor(eax, eax)?;
            a.cpuid()?;
            a.pop(rbx)?;
            a.call(rbx)?;
            a.cmp(eax, ebp)?;
            a.je(good)?;
            wrong(a)?;
            a.set_label(&mut good)?;
            a.mov(qword_ptr(ANSWER + 8 * (index as u64 - 1)), rbp)?;
            a.cmp(ebp, ROUNDS as i32)?;
            a.jne(again)
        });
    }
    machine.run();
    assert!(machine.counter("stops.protect") >= 256 && machine.counter("stops.drop") > 1_000);
}

/// So much code is written anew that the cache must be thrown away while the others are in it.
#[test]
fn the_cache_is_flushed_under_the_others() {
    const ROUNDS: u32 = 60;
    let mut machine = Machine::new(3);
    let functions = DATA + 0x8_0000;
    machine.program(0, |a| {
        a.xor(r12d, r12d)?;
        let (mut round, mut function) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.inc(r12d)?;
        a.mov(ebx, functions as i32)?;
        a.set_label(&mut function)?;
        // Three NOPs and mov eax, 0, many times over; mov eax, the round; ret
        a.mov(rdi, rbx)?;
        a.mov(rax, 0xb890_9090_u64)?;
        a.mov(ecx, 256)?;
        a.rep().stosq()?;
        a.mov(byte_ptr(rdi), 0xb8)?;
        a.mov(dword_ptr(rdi + 1), r12d)?;
        a.mov(byte_ptr(rdi + 5), 0xc3)?;
        a.call(rbx)?;
        let mut good = a.create_label();
        a.cmp(eax, r12d)?;
        a.je(good)?;
        wrong(a)?;
        a.set_label(&mut good)?;
        a.add(ebx, 0x1000)?;
        a.cmp(ebx, (functions + 0x6_0000) as i32)?;
        a.jne(function)?;
        a.cmp(r12d, ROUNDS as i32)?;
        a.jne(round)?;
        a.mov(qword_ptr(FLAG), 1)
    });
    for index in 1..3_usize {
        // Calls, returns and jumps to other pages all the while.
        let helper = DATA + 0x7_0000 + 0x1000 * index as u64;
        machine.guest.code(helper, |a| {
            a.lea(rax, qword_ptr(rax + 1))?;
            a.ret()
        });
        machine.program(index, |a| {
            let (mut again, mut good) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.xor(eax, eax)?;
            for _ in 0..10 {
                a.call(helper)?;
            }
            a.mov(rbx, helper)?;
            a.call(rbx)?;
            a.cmp(eax, 11)?;
            a.je(good)?;
            wrong(a)?;
            a.set_label(&mut good)?;
            a.cmp(qword_ptr(FLAG), 0)?;
            a.je(again)
        });
    }
    machine.run();
    assert!(machine.counter("code-cache.flushes") > 0, "the test is too small");
}

/// A page is mapped elsewhere; after the shoot-down's answer nobody may see the old frame.
#[test]
fn shoot_downs() {
    const ROUNDS: u32 = 3_000;
    const OLD: u64 = u64::MAX;
    let readers = 2_u64;
    let mut machine = Machine::new(1 + readers as usize);
    let entry = TABLES + 0x1000 + ((PAGE - 0x20_0000) >> 12) * 8;
    machine.guest.map(PAGE, FRAME_A | PRESENT | WRITE);
    machine.program(0, |a| {
        a.mov(ebx, FRAME_B as i32)?;
        a.mov(edx, FRAME_A as i32)?;
        turns(a, ROUNDS, |a| {
            a.mov(eax, ebp)?;
            a.mov(qword_ptr(rbx), rax)?;
            a.lea(rax, qword_ptr(rbx + (PRESENT | WRITE) as i32))?;
            a.mov(qword_ptr(entry), rax)?;
            a.mov(qword_ptr(ANSWER), 0)?;
            a.mov(eax, i32::from(VECTOR))?;
            for reader in 1..=readers as i32 {
                a.out(IPI + reader, al)?;
            }
            a.mov(ecx, readers as i32)?;
            wait_for(a, ANSWER)?;
            a.mov(qword_ptr(rdx), OLD as i32)?;
            a.xchg(rbx, rdx)
        })?;
        a.mov(qword_ptr(FLAG), 1)
    });
    machine.handler(code(8), |a| {
        a.invlpg(byte_ptr(PAGE))?;
        a.lock().inc(qword_ptr(ANSWER))
    });
    for index in 1..=readers as usize {
        machine.program(index, |a| {
            let (mut again, mut good) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.cmp(qword_ptr(PAGE), OLD as i32)?;
            a.jne(good)?;
            wrong(a)?;
            a.set_label(&mut good)?;
            // A write must not reach the old frame either.
            a.mov(qword_ptr(PAGE + 8 * index as u64), 1)?;
            a.cmp(qword_ptr(FLAG), 0)?;
            a.je(again)
        });
    }
    machine.run();
}

/// Accessed and dirty bits are set in entries that others change by locked instructions: no change gets lost.
#[test]
fn accessed_and_dirty_bits_do_not_undo_changes() {
    const TURNS: u32 = 20_000;
    let mut machine = Machine::new(3);
    let entry = TABLES + 0x1000 + ((PAGE - 0x20_0000) >> 12) * 8;
    machine.guest.map(PAGE, FRAME_A | PRESENT | WRITE | GLOBAL);
    // The first counts in the bits that the CPU ignores, and takes the others' bits away.
    machine.program(0, |a| {
        a.mov(rdx, 1_u64 << 52)?;
        turns(a, TURNS, |a| {
            a.mov(rax, rdx)?;
            a.lock().xadd(qword_ptr(entry), rax)?;
            a.lock().btr(dword_ptr(entry), 5)?;
            a.lock().btr(dword_ptr(entry), 6)?;
            a.lock().sub(qword_ptr(entry), rdx)?;
            a.lock().inc(qword_ptr(COUNT))
        })?;
        a.lock().add(qword_ptr(entry), rdx)?;
        a.mov(qword_ptr(FLAG), 1)
    });
    for index in 1..3 {
        machine.program(index, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again)?;
            a.invlpg(byte_ptr(PAGE))?;
            if index == 1 {
                a.mov(rax, qword_ptr(PAGE))?;
            } else {
                a.mov(qword_ptr(PAGE), rax)?;
            }
            a.cmp(qword_ptr(FLAG), 0)?;
            a.je(again)
        });
    }
    machine.run();
    let bits = machine.guest.word(entry);
    assert_eq!((bits >> 52, bits & 0xf_ffff_ffff_f000), (1, FRAME_A), "{bits:#x}");
}

/// Each vCPU sends the next one interrupts, halting in between; each one arrives once.
#[test]
fn interrupts_from_each_to_the_next() {
    const TURNS: u64 = 2_000;
    let mut machine = Machine::new(CPUS);
    machine.handler(code(8), |a| a.lock().inc(qword_ptr(r15)));
    for index in 0..CPUS {
        let next = ((index + 1) % CPUS) as i32;
        machine.set(index, |state| state.gpr[gpr::R15] = COUNT + 8 * index as u64);
        machine.program(index, |a| {
            turns(a, TURNS as u32, |a| {
                a.mov(eax, i32::from(VECTOR))?;
                a.out(IPI + next, al)
            })?;
            // Until all have come.
            let (mut again, mut done) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.cli()?;
            a.cmp(qword_ptr(r15), TURNS as i32)?;
            a.je(done)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(again)?;
            a.set_label(&mut done)?;
            a.sti()
        });
    }
    machine.run();
    for index in 0..CPUS as u64 {
        assert_eq!(machine.guest.word(COUNT + 8 * index), TURNS);
    }
}

/// KVM_HC_KICK_CPU ends the HLT of a vCPU with interrupts off, also when it comes first.
#[test]
fn called_out_of_a_halt() {
    const TURNS: u32 = 2_000;
    let mut machine = Machine::new(2);
    for index in 0..2_u64 {
        machine.program(index as usize, |a| {
            a.cli()?;
            turns(a, TURNS, |a| {
                let other = 1 - index;
                if index == 0 {
                    a.inc(qword_ptr(COUNT))?;
                }
                a.mov(eax, 5)?;
                a.xor(ebx, ebx)?;
                a.mov(ecx, other as i32)?;
                a.vmcall()?;
                a.hlt()?;
                let mut good = a.create_label();
                a.test(eax, eax)?;
                a.je(good)?;
                wrong(a)?;
                a.set_label(&mut good)?;
                a.nop()
            })?;
            // The other one may wait for its last call.
            a.mov(eax, 5)?;
            a.xor(ebx, ebx)?;
            a.mov(ecx, 1 - index as i32)?;
            a.vmcall()
        });
    }
    machine.run();
    assert_eq!(machine.guest.word(COUNT), u64::from(TURNS));
}

/// Halted for good with interrupts off: only when all are.
#[test]
fn stuck_is_who_nobody_can_wake() {
    let mut machine = Machine::new(2);
    machine.program(0, |a| {
        turns(a, 1_000_000, |a| a.nop())?;
        a.cli()?;
        a.hlt()
    });
    machine.program(1, |a| {
        a.cli()?;
        a.hlt()
    });
    let sides = machine.sides.clone();
    let exits: Vec<Exit> = std::thread::scope(|scope| {
        let (exits, wait) = std::sync::mpsc::channel();
        for vcpu in &mut machine.vcpus {
            let exits = exits.clone();
            scope.spawn(move || exits.send(vcpu.run()));
        }
        let exits = (0..2).filter_map(|_| wait.recv_timeout(Duration::from_secs(20)).ok()).collect();
        sides.iter().for_each(|side| side.stop.get().unwrap().kick());
        exits
    });
    assert_eq!(exits, [Exit::Stuck, Exit::Stuck]);
}
