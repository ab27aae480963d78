//! A small guest of our own under the engine `interp`: page tables, GDT, TSS, IDT, and code that runs into every kind of trap. Each
//! handler writes its vector to a debug port; the sequence must be the expected one.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use cpu::{Bus, CpuState, Engine, Exit, InterruptStatus, Kick, LocalApic, MsrError, Segment, Vcpu, VcpuSetup};
use iced_x86::code_asm::*;
use interp::InterpEngine;
use memory::GuestRam;

const GDT: u64 = 0x5000;
const IDT: u64 = 0x6000;
const TSS: u64 = 0x7000;
const RESULTS: u64 = 0x8000;
const STUBS: u64 = 0x1_0000;
const SYSCALL: u64 = 0x1_8000;
const MAIN: u64 = 0x2_0000;
const KERNEL_STACK: u64 = 0x8_0000;
const INTERRUPT_STACK: u64 = 0x9_0000;
const USER_CODE: u64 = 0x20_0000;
const USER_STACK: u64 = 0x28_0000;
const UNMAPPED: u64 = 0x60_0000;

const LOG_PORT: i32 = 0xe9;
const STOP_PORT: i32 = 0xf4;
const RAISE_NOW: i32 = 0x10;
const RAISE_LATER: i32 = 0x11;

/// Bus and local APIC in one: a log port, and ports that make interrupts pending.
#[derive(Default)]
struct Fixture {
    log: Mutex<Vec<u8>>,
    pending: AtomicU32,
    kick: OnceLock<Arc<dyn Kick>>,
    stop: OnceLock<Arc<dyn Kick>>,
}

struct Board(Arc<Fixture>);

impl Bus for Board {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match i32::from(port) {
            LOG_PORT => self.0.log.lock().unwrap().push(data[0]),
            STOP_PORT => self.0.stop.get().unwrap().kick(),
            RAISE_NOW => {
                self.0.pending.store(0x40, Ordering::SeqCst);
                self.0.kick.get().unwrap().kick();
            }
            RAISE_LATER => {
                let fixture = self.0.clone();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(20));
                    fixture.pending.store(0x41, Ordering::SeqCst);
                    fixture.kick.get().unwrap().kick();
                });
            }
            _ => {}
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (gpa as u8).wrapping_add(i as u8));
    }

    fn mmio_write(&self, _gpa: u64, data: &[u8]) {
        self.0.log.lock().unwrap().extend(data);
    }
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
        InterruptStatus { interrupt: self.0.pending.load(Ordering::SeqCst) != 0, ..Default::default() }
    }
    fn acknowledge(&self) -> Option<u8> {
        match self.0.pending.swap(0, Ordering::SeqCst) {
            0 => None,
            vector => Some(vector as u8),
        }
    }
    fn acknowledge_nmi(&self) {}
    fn acknowledge_init(&self) {}
    fn eoi(&self) {}
}

struct Guest {
    ram: GuestRam,
    fixture: Arc<Fixture>,
    vcpu: Box<dyn Vcpu>,
}

fn put(ram: &GuestRam, gpa: u64, words: &[u64]) {
    for (i, word) in words.iter().enumerate() {
        assert!(ram.write(gpa + i as u64 * 8, &word.to_le_bytes()));
    }
}

fn put_code(ram: &GuestRam, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
    let mut a = CodeAssembler::new(64).unwrap();
    build(&mut a).unwrap();
    assert!(ram.write(at, &a.assemble(at).unwrap()));
}

impl Guest {
    fn new(main: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) -> Self {
        let ram = GuestRam::new(64 << 20).unwrap();
        // Identity: 0 to 2 MiB supervisor, 2 to 4 MiB user, 4 to 6 MiB supervisor, the rest not present; at 1 GiB: MMIO.
        put(&ram, 0x1000, &[0x2000 | 7]);
        put(&ram, 0x2000, &[0x3000 | 7, 3 << 30 | 0x83]);
        put(&ram, 0x3000, &[0x83, 0x20_0000 | 0x87, 0x40_0000 | 0x83, 0]);
        let tss_low = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
        put(
            &ram,
            GDT,
            &[
                0,
                0,
                0x00af_9b00_0000_ffff,
                0x00cf_9300_0000_ffff,
                0,
                0x00cf_f300_0000_ffff,
                0x00af_fb00_0000_ffff,
                tss_low,
                0,
            ],
        );
        assert!(ram.write(TSS + 4, &INTERRUPT_STACK.to_le_bytes()));
        assert!(ram.write(TSS + 0x66, &0xffffu16.to_le_bytes()));
        for vector in 0..0x60u64 {
            let stub = STUBS + vector * 64;
            // DPL 3 for #BP.
            let kind = if vector == 3 { 0xee } else { 0x8e };
            put(&ram, IDT + vector * 16, &[(stub & 0xffff) | 0x10 << 16 | kind << 40 | (stub >> 16) << 48, stub >> 32]);
            put_code(&ram, stub, |a| {
                a.push(rax)?;
                a.mov(eax, vector as u32)?;
                if vector == 0x40 {
                    a.mov(al, bl)?;
                }
                a.out(LOG_PORT, al)?;
                a.pop(rax)?;
                if matches!(vector, 8 | 10..=14 | 17) {
                    a.pop(r14)?;
                }
                if vector == 1 {
                    a.and(qword_ptr(rsp + 16), -0x101)?;
                } else if vector < 0x20 && vector != 3 {
                    // Faults: go on behind the instruction, whose length is in R15.
                    a.add(qword_ptr(rsp), r15)?;
                }
                a.iretq()
            });
        }
        put_code(&ram, SYSCALL, |a| {
            let mut leave = a.create_label();
            a.cmp(eax, 99)?;
            a.je(leave)?;
            a.push(rax)?;
            a.mov(eax, 0x50)?;
            a.out(LOG_PORT, al)?;
            a.pop(rax)?;
            a.sysretq()?;
            a.set_label(&mut leave)?;
            a.out(STOP_PORT, al)?;
            a.cli()?;
            a.hlt()
        });
        put_code(&ram, MAIN, main);

        let fixture = Arc::new(Fixture::default());
        let engine = InterpEngine::new(ram.clone(), 1);
        let board = Arc::new(Board(fixture.clone()));
        let mut vcpu = engine.create_vcpu(VcpuSetup { index: 0, lapic: board.clone(), bus: board }).unwrap();
        assert!(fixture.kick.set(vcpu.kick_handle()).is_ok());
        assert!(fixture.stop.set(vcpu.stop_handle()).is_ok());
        let mut state = CpuState::default();
        state.enter_long_mode(0x1000, 0x10, 0x18);
        state.gdtr.base = GDT;
        state.gdtr.limit = 9 * 8 - 1;
        state.idtr.base = IDT;
        state.idtr.limit = 0x60 * 16 - 1;
        state.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: 0x38 };
        state.rip = MAIN;
        state.gpr[cpu::gpr::RSP] = KERNEL_STACK;
        vcpu.set_state(&state);
        Self { ram, fixture, vcpu }
    }

    fn run(&mut self) -> (Exit, Vec<u8>) {
        let exit = self.vcpu.run();
        (exit, std::mem::take(&mut *self.fixture.log.lock().unwrap()))
    }

    fn result(&self, index: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.ram.read(RESULTS + index * 8, &mut bytes));
        u64::from_le_bytes(bytes)
    }
}

fn finish(a: &mut CodeAssembler) -> Result<(), iced_x86::IcedError> {
    a.out(STOP_PORT, al)?;
    a.nop()?;
    a.cli()?;
    a.hlt()
}

fn save(a: &mut CodeAssembler, index: u64, register: AsmRegister64) -> Result<(), iced_x86::IcedError> {
    a.mov(qword_ptr(RESULTS + index * 8), register)
}

#[test]
fn exceptions() {
    let mut guest = Guest::new(|a| {
        a.int3()?;
        a.mov(r15d, 2)?;
        a.ud2()?;
        a.xor(ecx, ecx)?;
        a.div(ecx)?;
        // Non-canonical data: #GP(0); non-canonical stack: #SS(0).
        a.mov(rax, 0x8000_0000_0000_0000u64)?;
        a.mov(r15d, 3)?;
        a.mov(r14d, 77)?;
        a.mov(rax, qword_ptr(rax))?;
        save(a, 0, r14)?;
        // A page fault for writing, not present.
        a.mov(eax, UNMAPPED as u32 + 0x123)?;
        a.mov(byte_ptr(rax), 1)?;
        save(a, 1, r14)?;
        a.mov(rax, cr2)?;
        save(a, 2, rax)?;
        // Crossing into the unmapped page: nothing may be written.
        a.mov(eax, UNMAPPED as u32 - 4)?;
        a.mov(qword_ptr(rax), rsp)?;
        a.mov(rbx, cr2)?;
        save(a, 3, rbx)?;
        a.mov(ebx, dword_ptr(rax))?;
        save(a, 4, rbx)?;
        // Single step: the trap comes after the instruction behind POPF.
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.mov(ebp, 5)?;
        a.mov(rax, dr6)?;
        save(a, 5, rax)?;
        a.int1()?;
        // A bad segment: #GP(selector).
        a.mov(eax, 0xff8)?;
        a.mov(r15d, 2)?;
        a.mov(ds, eax)?;
        save(a, 6, r14)?;
        // An interrupt through a gate that is not there.
        a.int(0x5f)?;
        a.int(0x70)?;
        save(a, 7, r14)?;
        finish(a)
    });
    let (exit, log) = guest.run();
    assert_eq!(exit, Exit::Stopped, "{log:x?}");
    assert_eq!(log, [3, 6, 0, 13, 14, 14, 1, 1, 13, 0x5f, 13]);
    assert_eq!(guest.result(0), 0);
    assert_eq!(guest.result(1), 2, "write, not present");
    assert_eq!(guest.result(2), UNMAPPED + 0x123);
    assert_eq!(guest.result(3), UNMAPPED, "the second page is named");
    assert_eq!(guest.result(4), 0, "the first page is untouched");
    assert_eq!(guest.result(5) & 0x400f, 0x4000);
    assert_eq!(guest.result(6), 0xff8);
    assert_eq!(guest.result(7), 0x70 * 8 + 2);
}

#[test]
fn user_mode_and_system_calls() {
    let mut guest = Guest::new(|a| {
        a.mov(ecx, 0xc000_0081u32)?;
        a.xor(eax, eax)?;
        a.mov(edx, 0x0023_0010u32)?;
        a.wrmsr()?;
        a.inc(ecx)?;
        a.mov(eax, SYSCALL as u32)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.mov(ecx, 0xc000_0084u32)?;
        a.mov(eax, 0x200)?;
        a.wrmsr()?;
        for value in [0x2b, USER_STACK as i32, 0x202, 0x33, USER_CODE as i32] {
            a.push(value)?;
        }
        a.iretq()
    });
    put_code(&guest.ram, USER_CODE, |a| {
        a.mov(r13, rsp)?;
        a.mov(eax, 7)?;
        a.syscall()?;
        a.mov(r12, rcx)?;
        a.mov(r15d, 1)?;
        a.hlt()?;
        a.cli()?;
        a.mov(r15d, 2)?;
        a.in_(al, 0x99)?;
        // A supervisor page.
        a.mov(ebx, 0x1000)?;
        a.mov(eax, dword_ptr(rbx))?;
        a.int3()?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.mov(ax, ss)?;
        a.mov(ecx, 0x10)?;
        a.mov(ds, ecx)?;
        a.mov(eax, 99)?;
        a.syscall()
    });
    let (exit, log) = guest.run();
    assert_eq!(exit, Exit::Stopped, "{log:x?}");
    assert_eq!(log, [0x50, 13, 13, 13, 14, 3, 13]);
    let state = guest.vcpu.state();
    assert_eq!(state.cpl(), 0);
    assert_eq!(state.gpr[12], USER_CODE + 10, "RCX after SYSCALL");
    assert_eq!(state.gpr[13], USER_STACK);
    assert_eq!(state.gpr[cpu::gpr::RBX] & 0x200, 0x200);
    assert_eq!(state.gpr[14], 0x10, "the error code of the last fault: the selector");
    assert_eq!(state.rflags & 0x200, 0, "FMASK");
}

#[test]
fn interrupts_and_halt() {
    let mut guest = Guest::new(|a| {
        a.xor(ebx, ebx)?;
        a.out(RAISE_NOW, al)?;
        for _ in 0..100 {
            a.nop()?;
        }
        a.mov(bl, 1)?;
        a.sti()?;
        a.mov(bl, 2)?;
        a.mov(bl, 3)?;
        a.out(RAISE_LATER, al)?;
        a.hlt()?;
        a.cli()?;
        a.out(STOP_PORT, al)?;
        a.nop()?;
        a.hlt()
    });
    let (exit, log) = guest.run();
    assert_eq!((exit, log), (Exit::Stopped, vec![2, 0x41]));
    assert_eq!(guest.run().0, Exit::Stuck);
}

#[test]
fn triple_fault() {
    let mut guest = Guest::new(|a| {
        a.mov(qword_ptr(RESULTS), 0)?;
        a.lidt(ptr(RESULTS))?;
        a.ud2()
    });
    assert_eq!(guest.run().0, Exit::TripleFault);
}

#[test]
fn double_fault_and_nesting() {
    // A page fault whose handler's code segment is bad (#GP) becomes a double fault.
    let mut guest = Guest::new(|a| {
        a.mov(word_ptr(IDT + 14 * 16 + 2), 0x18)?;
        a.mov(r15d, 7)?;
        a.mov(r14d, 5)?;
        a.mov(al, byte_ptr(UNMAPPED))?;
        save(a, 0, r14)?;
        finish(a)
    });
    let (exit, log) = guest.run();
    assert_eq!((exit, log), (Exit::Stopped, vec![8]));
    assert_eq!(guest.result(0), 0);
}

#[test]
fn floating_point_and_vectors() {
    let mut guest = Guest::new(|a| {
        a.mov(r15d, 4)?;
        a.paddd(xmm0, xmm0)?; // #UD: OSFXSR is clear.
        a.mov(rax, cr4)?;
        a.or(eax, 0x4_0600)?;
        a.mov(cr4, rax)?;
        a.mov(eax, 21)?;
        a.movd(xmm0, eax)?;
        a.paddd(xmm0, xmm0)?;
        a.movd(ebx, xmm0)?;
        save(a, 0, rbx)?;
        // x87, with a store across a page border.
        a.fninit()?;
        a.fld1()?;
        a.fldpi()?;
        a.fmulp(st1, st0)?;
        a.fstp(qword_ptr(0x40_0ffc))?;
        a.mov(rax, qword_ptr(0x40_0ffc))?;
        save(a, 1, rax)?;
        // AVX once XCR0 has it.
        a.mov(r15d, 4)?;
        a.vpaddd(ymm1, ymm0, ymm0)?;
        a.xor(ecx, ecx)?;
        a.xor(edx, edx)?;
        a.mov(eax, 7)?;
        a.xsetbv()?;
        a.vpbroadcastd(ymm1, xmm0)?;
        a.vpaddd(ymm2, ymm1, ymm1)?;
        a.vmovdqu(ymmword_ptr(0x40_1ff0), ymm2)?;
        a.mov(rax, qword_ptr(0x40_2008))?;
        save(a, 2, rax)?;
        // Gather with one element on an unmapped page, then without it.
        a.mov(dword_ptr(0x40_3000), 0x1111)?;
        a.vpcmpeqd(ymm3, ymm3, ymm3)?;
        a.vpxor(ymm4, ymm4, ymm4)?;
        a.mov(eax, 0x40_3000)?;
        a.db(&[0xc4, 0xe2, 0x65, 0x90, 0x2c, 0xa0])?; // vpgatherdd ymm5, [rax + ymm4 * 4], ymm3
        a.vmovd(ebx, xmm5)?;
        save(a, 3, rbx)?;
        // Misaligned MOVAPS: #GP. Division by zero, unmasked: #XM.
        a.mov(r15d, 3)?;
        a.mov(ebx, 0x40_0001)?;
        a.movaps(xmm1, xmmword_ptr(rbx))?;
        a.mov(dword_ptr(0x40_3000), 0x1d80)?;
        a.ldmxcsr(dword_ptr(0x40_3000))?;
        a.xorps(xmm1, xmm1)?;
        a.mov(r15d, 4)?;
        a.divss(xmm0, xmm1)?;
        a.stmxcsr(dword_ptr(0x40_3004))?;
        a.mov(ebx, dword_ptr(0x40_3004))?;
        save(a, 4, rbx)?;
        // x87: the exception of a masked-off control word comes with the next waiting instruction.
        a.mov(word_ptr(0x40_3000), 0x037b)?;
        a.fldcw(word_ptr(0x40_3000))?;
        a.fld1()?;
        a.fldz()?;
        a.fdivp(st1, st0)?;
        a.mov(r15d, 1)?;
        a.wait()?;
        a.fninit()?;
        // XSAVE and XRSTOR.
        a.mov(eax, 7)?;
        a.xor(edx, edx)?;
        a.xsave(ptr(0x40_4000))?;
        a.vzeroall()?;
        a.xrstor(ptr(0x40_4000))?;
        a.vmovdqu(ymmword_ptr(0x40_5000), ymm2)?;
        a.mov(rax, qword_ptr(0x40_5018))?;
        save(a, 5, rax)?;
        // TS: #NM.
        a.mov(rax, cr0)?;
        a.or(eax, 8)?;
        a.mov(cr0, rax)?;
        a.mov(r15d, 4)?;
        a.paddd(xmm0, xmm0)?;
        a.clts()?;
        a.popcnt(rax, rax)?;
        a.mov(ecx, 0xff00)?;
        a.tzcnt(rcx, rcx)?;
        save(a, 6, rcx)?;
        // RSP as an operand of an assisted instruction.
        a.mov(rbx, rsp)?;
        a.mov(esp, 0x1234)?;
        a.popcnt(rsp, rsp)?;
        save(a, 7, rsp)?;
        a.mov(rsp, rbx)?;
        finish(a)
    });
    let (exit, log) = guest.run();
    assert_eq!(exit, Exit::Stopped, "{log:x?}");
    assert_eq!(log, [6, 6, 13, 19, 16, 7]);
    assert_eq!(guest.result(0), 42);
    assert_eq!(f64::from_bits(guest.result(1)), std::f64::consts::PI);
    assert_eq!(guest.result(2), 84 << 32 | 84);
    assert_eq!(guest.result(3), 0x1111);
    assert_eq!(guest.result(4) & 0x3f, 4, "the zero-divide flag");
    assert_eq!(guest.result(5), 84 << 32 | 84);
    assert_eq!(guest.result(6), 8);
    assert_eq!(guest.result(7), 5);
}

#[test]
fn memory_and_strings() {
    let mut guest = Guest::new(|a| {
        a.mov(edi, 0x40_0f00)?;
        a.mov(ecx, 0x2000)?;
        a.mov(al, 0x5a)?;
        a.rep().stosb()?;
        save(a, 0, rdi)?;
        // Overlap: one byte is repeated.
        a.mov(byte_ptr(0x40_0f00), 0x11)?;
        a.mov(esi, 0x40_0f00)?;
        a.mov(edi, 0x40_0f01)?;
        a.mov(ecx, 0x200)?;
        a.rep().movsb()?;
        a.mov(rax, qword_ptr(0x40_10f8))?;
        save(a, 1, rax)?;
        // Into an unmapped page: a fault with the registers at the last good element.
        a.mov(edi, UNMAPPED as u32 - 16)?;
        a.mov(ecx, 5)?;
        a.mov(r15d, 3)?;
        a.rep().stosq()?;
        save(a, 2, rdi)?;
        save(a, 3, rcx)?;
        // Find a byte.
        a.mov(edi, 0x40_0f00)?;
        a.mov(ecx, 0x3000)?;
        a.mov(al, 0x5a)?;
        a.repne().scasb()?;
        save(a, 4, rdi)?;
        // MMIO across an 8-byte border.
        a.mov(ebx, 0x4000_0006)?;
        a.mov(eax, dword_ptr(rbx))?;
        save(a, 5, rax)?;
        a.mov(eax, 0x0403_0201)?;
        a.mov(dword_ptr(rbx), eax)?;
        // Code across a page border, and changed under our feet.
        a.mov(ebx, 0x40_5ffe)?;
        a.mov(dword_ptr(rbx), 0x0011_b890u32 as i32)?;
        a.mov(dword_ptr(rbx + 4), 0x00c3_0000u32 as i32)?;
        a.call(rbx)?;
        save(a, 6, rax)?;
        a.mov(byte_ptr(0x40_6000), 0x22)?;
        a.call(rbx)?;
        save(a, 7, rax)?;
        a.lock().xadd(qword_ptr(RESULTS), rax)?;
        save(a, 8, rax)?;
        a.enter(0x20, 0)?;
        a.leave()?;
        save(a, 9, rsp)?;
        finish(a)
    });
    let (exit, log) = guest.run();
    assert_eq!(exit, Exit::Stopped, "{log:x?}");
    assert_eq!(log, [14, 1, 2, 3, 4]);
    assert_eq!(guest.result(1), 0x1111_1111_1111_1111);
    assert_eq!((guest.result(2), guest.result(3)), (UNMAPPED, 3));
    assert_eq!(guest.result(4), 0x40_1102);
    assert_eq!(guest.result(5), 0x0908_0706);
    assert_eq!((guest.result(6), guest.result(7)), (0x11, 0x22));
    assert_eq!((guest.result(8), guest.result(0)), (0x40_2f00, 0x40_2f22));
    assert_eq!(guest.result(9), KERNEL_STACK);
}

/// A state that no CPU can be in, as a damaged saved one may be: 64-bit mode without paging has addresses up to the last.
#[test]
fn memory_at_the_end_of_all_addresses() {
    let mut guest = Guest::new(|a| {
        a.add(qword_ptr(rbx), rax)?;
        a.mov(rcx, qword_ptr(rbx + 1))
    });
    let mut state = guest.vcpu.state();
    state.cr0 &= !(1 << 31);
    state.gpr[3] = u64::MAX - 3;
    guest.vcpu.set_state(&state);
    for _ in 0..2 {
        let _ = guest.vcpu.step();
    }
}

#[test]
fn debugger() {
    let mut guest = Guest::new(|a| {
        a.mov(eax, 1)?;
        a.mov(eax, 2)?;
        a.mov(eax, 3)?;
        finish(a)
    });
    guest.vcpu.set_breakpoints(&[MAIN + 5]);
    assert_eq!(guest.vcpu.run(), Exit::Debug);
    assert_eq!((guest.vcpu.state().rip, guest.vcpu.state().gpr[0]), (MAIN + 5, 1));
    assert_eq!(guest.vcpu.step(), Exit::Debug);
    assert_eq!(guest.vcpu.state().gpr[0], 2);
    let mut bytes = [0; 1];
    assert!(guest.vcpu.read_virtual(MAIN, &mut bytes));
    assert_eq!(bytes[0], 0xb8);
    assert!(!guest.vcpu.read_virtual(UNMAPPED, &mut bytes));
    assert!(guest.vcpu.write_virtual(MAIN + 11, &[9]));
    assert_eq!(guest.vcpu.run(), Exit::Stopped);
    assert_eq!(guest.vcpu.state().gpr[0] as u8, 9);
}

/// Not a check but a figure: run with `--ignored --nocapture` in release.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let mut guest = Guest::new(|a| {
        let mut again = a.create_label();
        a.mov(ecx, 5_000_000)?;
        a.mov(ebx, 0x40_0000)?;
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(rbx))?;
        a.add(rax, rcx)?;
        a.mov(qword_ptr(rbx), rax)?;
        a.lea(rdx, ptr(rax + rcx * 4))?;
        a.xor(edx, eax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        finish(a)
    });
    let start = std::time::Instant::now();
    assert_eq!(guest.run().0, Exit::Stopped);
    println!("{:.1} M instructions/s", 35.0 / start.elapsed().as_secs_f64());
}
