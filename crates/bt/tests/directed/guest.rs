//! The guest: page tables of 4 KiB pages, GDT, TSS, an IDT whose handlers stop the engine at once, so that the test sees all registers
//! as they were and the frame on the stack.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, mpsc};
use std::time::Duration;

use bt::{BtEngine, Options};
use cpu::cpuid::CpuidModel;
use cpu::{
    Bus, CpuState, Engine, Exit, InterruptStatus, Kick, LocalApic, MsrError, Segment, SegmentIndex, Vcpu, VcpuSetup,
    cr4, rflags,
};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use interp::InterpEngine;
use memory::GuestRam;

pub const CR3: u64 = 0x1000;
/// The page tables of the first, second and third 2 MiB; linear address = guest-physical address.
pub const TABLES: u64 = 0x4000;
const GDT: u64 = 0x7000;
pub const IDT: u64 = 0x8000;
pub const TSS: u64 = 0x9000;
/// A second address space: the same, but for the last 2 MiB, whose table is at [`TABLES_B`].
pub const CR3_B: u64 = 0xa000;
pub const TABLES_B: u64 = 0xd000;
const STUBS: u64 = 0x1_0000;
/// Kernel code.
pub const CODE: u64 = 0x2_0000;
pub const STACK: u64 = 0x8_0000;
pub const INTERRUPT_STACK: u64 = 0x9_0000;
/// The stack of interrupts with IST 1: those that [`Guest::ist`] gave it.
pub const IST_STACK: u64 = 0xa_0000;
pub const USER_CODE: u64 = 0x20_0000;
pub const USER_DATA: u64 = 0x28_0000;
pub const USER_STACK: u64 = 0x30_0000;
/// Kernel data.
pub const DATA: u64 = 0x40_0000;
/// Memory-mapped I/O: every byte reads as the low byte of its address.
pub const MMIO: u64 = 0x4000_0000;

pub const PRESENT: u64 = 1;
pub const WRITE: u64 = 2;
pub const USER: u64 = 4;
pub const GLOBAL: u64 = 1 << 8;
/// A reserved bit.
pub const RESERVED: u64 = 1 << 51;
pub const NX: u64 = 1 << 63;

/// OUT to this port stops the engine.
pub const STOP: i32 = 0xf4;
/// OUT of a vector to this port makes an interrupt pending.
pub const RAISE: i32 = 0x10;
/// The same, 5 ms later, from another thread.
pub const RAISE_LATER: i32 = 0x11;
/// OUT of a byte is logged.
pub const LOG: i32 = 0xe9;

/// The engines that every test runs under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The interpreter: slow and precise.
    Interp,
    /// The translator as users run it: short code, which tests that last become fast.
    Bt,
    /// The translator with fast code at once.
    Fast,
    /// The translator with exact flags at faults.
    Precise,
    /// The same, and SYSCALL, SYSRET and IRET go to the interpreter.
    Slow,
    /// The translator with each block compared with the interpreter.
    Lockstep,
    /// The translator for the kernel only: programs run directly.
    Direct,
}

pub const KINDS: [Kind; 7] =
    [Kind::Interp, Kind::Bt, Kind::Fast, Kind::Precise, Kind::Slow, Kind::Lockstep, Kind::Direct];

/// Runs a test under every engine; what is printed shows which one failed.
pub fn each(test: impl Fn(Kind)) {
    for kind in KINDS {
        println!("engine: {kind:?}");
        test(kind);
    }
}

/// Runs a test under the translator only: the interpreter may look for interrupts some instructions later.
pub fn each_translator(test: impl Fn(Kind)) {
    for kind in KINDS.into_iter().filter(|&kind| kind != Kind::Interp) {
        println!("engine: {kind:?}");
        test(kind);
    }
}

/// Devices and local APIC.
#[derive(Default)]
pub struct Fixture {
    pub log: Mutex<Vec<u8>>,
    pub pending: Mutex<VecDeque<u8>>,
    waiting: AtomicUsize,
    pub nmi: AtomicBool,
    pub mmio: Mutex<Vec<(u64, Vec<u8>)>>,
    pub mmio_reads: AtomicU64,
    pub tpr: AtomicU64,
    kick: OnceLock<Arc<dyn Kick>>,
    stop: OnceLock<Arc<dyn Kick>>,
}

impl Fixture {
    /// Makes an interrupt pending.
    pub fn raise(&self, vector: u8) {
        self.pending.lock().unwrap().push_back(vector);
        self.waiting.fetch_add(1, Ordering::SeqCst);
        self.kick.get().unwrap().kick();
    }

    /// Makes an NMI pending.
    pub fn raise_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.kick.get().unwrap().kick();
    }

    pub fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }
}

struct Board(Arc<Fixture>);

impl Bus for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.iter_mut().for_each(|byte| *byte = port as u8 ^ 0xa5);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        match i32::from(port) {
            STOP => self.0.stop.get().unwrap().kick(),
            LOG => self.0.log.lock().unwrap().extend(data),
            RAISE => self.0.raise(data[0]),
            RAISE_LATER => {
                let (fixture, vector) = (self.0.clone(), data[0]);
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(5));
                    fixture.raise(vector);
                });
            }
            _ => {}
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        self.0.mmio_reads.fetch_add(1, Ordering::SeqCst);
        data.iter_mut().enumerate().for_each(|(i, byte)| *byte = (gpa as u8).wrapping_add(i as u8));
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        self.0.mmio.lock().unwrap().push((gpa, data.to_vec()));
    }
}

impl LocalApic for Board {
    fn read_msr(&self, msr: u32) -> Result<u64, MsrError> {
        if msr == 0x1b { Ok(0xfee0_0900) } else { Err(MsrError) }
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> Result<(), MsrError> {
        Err(MsrError)
    }
    fn cr8(&self) -> u8 {
        self.0.tpr.load(Ordering::SeqCst) as u8
    }
    fn set_cr8(&self, value: u8) {
        self.0.tpr.store(value.into(), Ordering::SeqCst);
    }
    fn status(&self) -> InterruptStatus {
        InterruptStatus {
            interrupt: self.0.waiting() != 0,
            nmi: self.0.nmi.load(Ordering::SeqCst),
            ..Default::default()
        }
    }
    fn acknowledge(&self) -> Option<u8> {
        let vector = self.0.pending.lock().unwrap().pop_front()?;
        self.0.waiting.fetch_sub(1, Ordering::SeqCst);
        Some(vector)
    }
    fn acknowledge_nmi(&self) {
        self.0.nmi.store(false, Ordering::SeqCst);
    }
    fn acknowledge_init(&self) {}
    fn eoi(&self) {}
}

/// The frame of an exception or interrupt, and the state at the handler's first instruction.
#[derive(Clone, Debug, PartialEq)]
pub struct Trap {
    pub vector: u8,
    pub error: Option<u64>,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub state: CpuState,
}

/// Vectors that push an error code.
fn has_error(vector: u8) -> bool {
    matches!(vector, 8 | 10..=14 | 17)
}

/// A guest under one engine.
pub struct Guest {
    pub kind: Kind,
    pub ram: GuestRam,
    pub fixture: Arc<Fixture>,
    pub vcpu: Box<dyn Vcpu>,
}

/// The result of code building.
pub type Built = Result<(), IcedError>;
/// Assembles a program.
pub type Build = fn(&mut CodeAssembler) -> Built;

impl Guest {
    pub fn new(kind: Kind) -> Self {
        let direct = kind == Kind::Direct;
        let ram = if direct { GuestRam::shareable(64 << 20) } else { GuestRam::new(64 << 20) }.unwrap();
        let options = || {
            let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
            options.code_cache = 16 << 20;
            options.precise_flags = !matches!(kind, Kind::Bt | Kind::Fast);
            options.tiers = !matches!(kind, Kind::Fast | Kind::Precise);
            options.fast_transitions = kind != Kind::Slow;
            options.lockstep = kind == Kind::Lockstep;
            options.direct = direct;
            options.direct_at_once = direct;
            options
        };
        let engine: Box<dyn Engine> = match kind {
            Kind::Interp => Box::new(InterpEngine::new(ram.clone(), 1)),
            _ => Box::new(BtEngine::new(ram.clone(), options()).unwrap()),
        };
        Self::with_engine(kind, ram, &*engine)
    }

    pub fn with_engine(kind: Kind, ram: GuestRam, engine: &dyn Engine) -> Self {
        let mut guest = Self::after_reset(kind, ram, engine);
        assert_eq!(!guest.vcpu.attach_thread().is_empty(), kind == Kind::Direct);
        guest
    }

    /// The same at a time when no process can be started.
    pub fn after_reset(kind: Kind, ram: GuestRam, engine: &dyn Engine) -> Self {
        let fixture = Arc::new(Fixture::default());
        let board = Arc::new(Board(fixture.clone()));
        let vcpu = engine.create_vcpu(VcpuSetup { index: 0, lapic: board.clone(), bus: board }).unwrap();
        assert!(fixture.kick.set(vcpu.kick_handle()).is_ok());
        assert!(fixture.stop.set(vcpu.stop_handle()).is_ok());
        let mut guest = Self { kind, ram, fixture, vcpu };
        guest.reset();
        guest
    }

    /// Tables, handlers and registers as at the start.
    pub fn reset(&mut self) {
        self.basics();
        let state = self.start_state();
        self.vcpu.set_state(&state);
    }

    /// Tables and handlers: made once, then copied.
    fn basics(&self) {
        static BASICS: OnceLock<Vec<u8>> = OnceLock::new();
        let bytes = BASICS.get_or_init(|| {
            self.tables();
            self.descriptors();
            let mut bytes = vec![0; (STUBS + 0x1000) as usize];
            assert!(self.ram.read(0, &mut bytes));
            bytes
        });
        assert!(self.ram.write(0, bytes));
    }

    fn tables(&self) {
        let all = PRESENT | WRITE | USER;
        for (pml4, last) in [(CR3, TABLES + 0x2000), (CR3_B, TABLES_B)] {
            self.put(pml4, &[(pml4 + 0x1000) | all]);
            self.put(pml4 + 0x1000, &[(pml4 + 0x2000) | all, 3 << 30 | 0x83]);
            self.put(pml4 + 0x2000, &[TABLES | all, (TABLES + 0x1000) | all, last | all]);
        }
        for page in 0..512 {
            let at = |table: u64| table + page * 8;
            let gpa = page << 12;
            self.put(at(TABLES), &[gpa | PRESENT | WRITE]);
            self.put(at(TABLES + 0x1000), &[(gpa + 0x20_0000) | all]);
            self.put(at(TABLES + 0x2000), &[(gpa + 0x40_0000) | PRESENT | WRITE]);
            self.put(at(TABLES_B), &[(gpa + 0x40_0000) | PRESENT | WRITE]);
        }
    }

    fn descriptors(&self) {
        let tss_low = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
        let (data, user_data, user_code) = (0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff);
        // Selector 0x48: a data segment that is not present; 0x50: kernel data, expand-down bit clear, for loads.
        let not_present = 0x00cf_1300_0000_ffff;
        self.put(GDT, &[0, 0, 0x00af_9b00_0000_ffff, data, 0, user_data, user_code, tss_low, 0, not_present, data]);
        assert!(self.ram.write(TSS + 4, &INTERRUPT_STACK.to_le_bytes()));
        assert!(self.ram.write(TSS + 0x24, &IST_STACK.to_le_bytes()));
        assert!(self.ram.write(TSS + 0x66, &0xffff_u16.to_le_bytes()));
        for vector in 0..=255_u8 {
            let stub = STUBS + u64::from(vector) * 16;
            // DPL 3 for #BP and 0x80.
            self.gate(vector, stub, if matches!(vector, 3 | 0x80) { 0xee } else { 0x8e });
            self.code(stub, |a| {
                a.out(STOP, al)?;
                if has_error(vector) {
                    a.lea(rsp, ptr(rsp + 8))?;
                }
                a.iretq()
            });
        }
    }

    /// Lets `vector` go to `handler`; `attributes` is the gate's type byte.
    pub fn gate(&self, vector: u8, handler: u64, attributes: u64) {
        let low = (handler & 0xffff) | 0x10 << 16 | attributes << 40 | (handler >> 16 & 0xffff) << 48;
        self.put(IDT + u64::from(vector) * 16, &[low, handler >> 32]);
    }

    /// Gives `vector` a stack of its own.
    pub fn ist(&self, vector: u8) {
        assert!(self.ram.write(IDT + u64::from(vector) * 16 + 4, &[1]));
    }

    pub fn start_state(&self) -> CpuState {
        let mut state = CpuState::default();
        state.enter_long_mode(CR3, 0x10, 0x18);
        state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE | cr4::FSGSBASE;
        state.xcr0 = 7;
        state.gdtr.base = GDT;
        state.gdtr.limit = 11 * 8 - 1;
        state.idtr.base = IDT;
        state.idtr.limit = 0xfff;
        state.tr = Segment { base: TSS, limit: 0x67, attributes: 0x8b, selector: 0x38 };
        // As Linux sets them up.
        state.star = 0x0023_0010 << 32;
        state.lstar = CODE + 0x8000;
        state.sfmask = rflags::ARITH
            | rflags::TF
            | rflags::IF
            | rflags::DF
            | rflags::IOPL
            | rflags::NT
            | rflags::RF
            | rflags::AC
            | rflags::ID;
        state.rip = CODE;
        state.gpr[cpu::gpr::RSP] = STACK;
        state
    }

    /// Changes the state.
    pub fn set(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut state = self.vcpu.state();
        change(&mut state);
        self.vcpu.set_state(&state);
    }

    /// Puts words into memory.
    pub fn put(&self, gpa: u64, words: &[u64]) {
        for (i, word) in words.iter().enumerate() {
            assert!(self.ram.write(gpa + i as u64 * 8, &word.to_le_bytes()));
        }
    }

    pub fn word(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.ram.read(gpa, &mut bytes));
        u64::from_le_bytes(bytes)
    }

    /// Puts code at an address; returns the address behind it.
    pub fn code(&self, at: u64, build: impl FnOnce(&mut CodeAssembler) -> Built) -> u64 {
        let mut a = CodeAssembler::new(64).unwrap();
        build(&mut a).unwrap();
        let bytes = a.assemble(at).unwrap();
        assert!(self.ram.write(at, &bytes));
        at + bytes.len() as u64
    }

    /// Sets the page-table entry of a page below 6 MiB.
    pub fn map(&self, page: u64, entry: u64) {
        self.put(TABLES + (page >> 12) * 8, &[entry]);
    }

    /// The same in the second address space, for pages from 4 MiB.
    pub fn map_b(&self, page: u64, entry: u64) {
        self.put(TABLES_B + ((page - DATA) >> 12) * 8, &[entry]);
    }

    /// Runs until the engine has something to say; panics after a while.
    pub fn run(&mut self) -> Exit {
        let (done, wait) = mpsc::channel::<()>();
        let stop = self.vcpu.stop_handle();
        let watch = std::thread::spawn(move || {
            if wait.recv_timeout(Duration::from_secs(20)) == Err(mpsc::RecvTimeoutError::Timeout) {
                stop.kick();
                return true;
            }
            false
        });
        let exit = self.vcpu.run();
        let _ = done.send(());
        if watch.join().unwrap() {
            panic!("the guest hangs under {:?}: {:x?}", self.kind, self.vcpu.state());
        }
        exit
    }

    /// Runs to an OUT to the port [`STOP`] that is not a handler's.
    pub fn stop(&mut self) -> CpuState {
        let exit = self.run();
        let state = self.vcpu.state();
        assert_eq!(exit, Exit::Stopped, "{state:x?}");
        if (STUBS..STUBS + 0x1000).contains(&state.rip) {
            panic!("unexpected under {:?}: {:x?}", self.kind, self.frame(state));
        }
        state
    }

    /// Runs to the next exception or interrupt.
    pub fn trap(&mut self) -> Trap {
        let exit = self.run();
        let state = self.vcpu.state();
        assert_eq!(exit, Exit::Stopped, "{state:x?}");
        self.frame(state)
    }

    /// Runs to the next exception, or to an OUT to the port [`STOP`] that is not a handler's.
    pub fn trap_or_stop(&mut self) -> Option<Trap> {
        let exit = self.run();
        let state = self.vcpu.state();
        assert_eq!(exit, Exit::Stopped, "{state:x?}");
        (STUBS..STUBS + 0x1000).contains(&state.rip).then(|| self.frame(state))
    }

    fn frame(&self, mut state: CpuState) -> Trap {
        assert!((STUBS..STUBS + 0x1000).contains(&state.rip), "no handler: {state:x?}");
        let vector = ((state.rip - STUBS) / 16) as u8;
        let mut at = state.gpr[cpu::gpr::RSP];
        let error = has_error(vector).then(|| self.word(at));
        at += if error.is_some() { 8 } else { 0 };
        let frame = [0, 1, 2, 3, 4].map(|i| self.word(at + i * 8));
        // The pointers of x87 instructions are not the guest's under the native assist.
        state.fp.bytes[6..24].fill(0);
        Trap { vector, error, rip: frame[0], cs: frame[1], rflags: frame[2], rsp: frame[3], ss: frame[4], state }
    }

    /// Goes to level 3 at `rip` by a state change.
    pub fn enter_user(&mut self, rip: u64) {
        self.set(|state| {
            user_segments(state);
            state.rip = rip;
            state.gpr[cpu::gpr::RSP] = USER_STACK;
            state.rflags |= rflags::IF;
        });
    }
}

pub fn user_segments(state: &mut CpuState) {
    let flat = |selector, attributes| Segment { base: 0, limit: u32::MAX, attributes, selector };
    state.segments[SegmentIndex::Cs as usize] = flat(0x33, 0xa0fb);
    state.segments[SegmentIndex::Ss as usize] = flat(0x2b, 0xc0f3);
    // What an IRET to level 3 leaves of the kernel's.
    for segment in [SegmentIndex::Es, SegmentIndex::Ds, SegmentIndex::Fs, SegmentIndex::Gs] {
        state.segments[segment as usize] = flat(0, 0);
    }
}
