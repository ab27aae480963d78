//! The engine by itself, with pieces of machine code. Where KVM does not run they say so; `TIGHTROPE_TEST_ENGINE=kvm` makes that a failure.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cpu::cpuid::CpuidModel;
use cpu::{Bus, CpuState, Engine, Exit, FpState, Nothing, TableRegister, Vcpu, VcpuSetup, gpr};
use kvm::{DirtyLog, Host, KvmEngine, Options};
use memory::GuestRam;

const PML4: u64 = 0x1000;
const CODE: u64 = 0x1_0000;

type Hook = Box<dyn Fn() + Send>;

/// Keeps what is written; reads give the address's low bytes. At a write to a port the hook is called.
#[derive(Default)]
struct Log(Mutex<Vec<(u64, Vec<u8>)>>, Mutex<Option<Hook>>);

impl Bus for Log {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.0.lock().unwrap().push((port.into(), data.to_vec()));
        if let Some(hook) = &*self.1.lock().unwrap() {
            hook();
        }
    }
    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        assert!(gpa % 8 + data.len() as u64 <= 8, "{gpa:#x}, {}", data.len());
        for (at, byte) in data.iter_mut().enumerate() {
            *byte = gpa as u8 + at as u8;
        }
    }
    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        assert!(gpa % 8 + data.len() as u64 <= 8, "{gpa:#x}, {}", data.len());
        self.0.lock().unwrap().push((gpa, data.to_vec()));
    }
}

struct Rig {
    engine: KvmEngine,
    vcpu: Box<dyn Vcpu>,
    ram: GuestRam,
    log: Arc<Log>,
}

/// A vCPU in 64-bit mode at `code`, with 4 GiB mapped onto themselves; `None` without a KVM that works.
fn rig(code: &[u8], dirty_log: DirtyLog) -> Option<Rig> {
    let host = match kvm::probe::usable() {
        Ok(host) => host,
        Err(why) => {
            assert!(std::env::var("TIGHTROPE_TEST_ENGINE").as_deref() != Ok("kvm"), "{why}");
            eprintln!("NOT TESTED: {why}");
            return None;
        }
    };
    let ram = GuestRam::new(64 << 20).unwrap();
    let mut options = Options::new(CpuidModel::new(1, 1_000_000));
    options.dirty_log = dirty_log;
    let engine = KvmEngine::new(&host, ram.clone(), options).unwrap();
    let log = Arc::new(Log::default());
    let mut vcpu = engine.create_vcpu(VcpuSetup { index: 0, lapic: Arc::new(Nothing), bus: log.clone() }).unwrap();
    let put = |address: u64, value: u64| assert!(ram.write(address, &value.to_le_bytes()));
    put(PML4, 0x2003);
    for gib in 0..4 {
        put(0x2000 + gib * 8, (0x3000 + gib * 0x1000) | 3);
        for page in 0..512 {
            put(0x3000 + gib * 0x1000 + page * 8, gib << 30 | page << 21 | 0x83);
        }
    }
    put(0x8008, 0x00af_9b00_0000_ffff);
    put(0x8010, 0x00cf_9300_0000_ffff);
    assert!(ram.write(CODE, code));
    vcpu.set_state(&start());
    Some(Rig { engine, vcpu, ram, log })
}

fn start() -> CpuState {
    let mut state = CpuState::default();
    state.enter_long_mode(PML4, 8, 16);
    state.gdtr = TableRegister { base: 0x8000, limit: 23 };
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = 0x2_0000;
    state.rip = CODE;
    state
}

/// Runs for a while, then stops it.
fn run_for(vcpu: &mut dyn Vcpu, time: Duration) -> Exit {
    let stop = vcpu.stop_handle();
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        if ended.recv_timeout(time).is_err_and(|why| why == std::sync::mpsc::RecvTimeoutError::Timeout) {
            stop.kick();
        }
    });
    let exit = vcpu.run();
    drop(end);
    thread.join().unwrap();
    exit
}

#[test]
fn state_there_and_back() {
    let Some(mut rig) = rig(&[0xf4], DirtyLog::Off) else { return };
    let first = rig.vcpu.state();
    let mut state = start();
    for (at, register) in state.gpr.iter_mut().enumerate() {
        *register = 0x0101_0101_0101_0101_u64.wrapping_mul(at as u64);
    }
    state.rip = 0x1_2345;
    state.rflags = 0x2 | 0x8d5;
    for (at, byte) in state.fp.bytes[FpState::XMM..FpState::XMM + 256].iter_mut().enumerate() {
        *byte = at as u8;
    }
    state.cr4 = first.cr4 | cpu::cr4::OSFXSR;
    (state.star, state.lstar, state.sfmask) = (0x23_0010_0000_0000, 0xffff_8000_0000_1000, 0x4_7700);
    (state.kernel_gs_base, state.tsc_aux, state.cr2) = (0xffff_8880_0000_0000, 7, 0xdead_b000);
    (state.sysenter, state.tsc_offset, state.tsc_adjust) = ([0x10, 0x2000, 0x3000], 1 << 40, 5);
    (state.dr[0], state.interrupt_shadow, state.nmi_blocked) = (0x1234, true, true);
    state.mtrr[12] = 0x8000_0006;
    state.set_kvm_steal_time(0x30_0001);
    state.set_kvm_pv_eoi(0x30_0041);
    rig.vcpu.set_state(&state);
    assert_eq!(rig.vcpu.state(), state);
    state.halted = true;
    (state.interrupt_shadow, state.nmi_blocked) = (false, false);
    rig.vcpu.set_state(&state);
    assert_eq!(rig.vcpu.state(), state);
    (state.halted, state.wait_for_sipi) = (false, true);
    rig.vcpu.set_state(&state);
    assert_eq!(rig.vcpu.state(), state);
}

#[test]
fn a_state_that_cannot_be_is_told() {
    let Some(mut rig) = rig(&[0xf4], DirtyLog::Off) else { return };
    let mut state = start();
    // Long mode active without paging.
    state.cr0 &= !cpu::cr0::PG;
    rig.vcpu.set_state(&state);
    assert!(matches!(rig.vcpu.run(), Exit::Internal(why) if why.contains("system registers")));
    rig.vcpu.set_state(&start());
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(20)), Exit::Stopped);
}

#[test]
fn stopped_again_and_again() {
    // 1: inc rax; jmp 1b
    let Some(mut rig) = rig(&[0x48, 0xff, 0xc0, 0xeb, 0xfb], DirtyLog::Off) else { return };
    let mut last = 0;
    for _ in 0..50 {
        assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(2)), Exit::Stopped);
        let state = rig.vcpu.state();
        // On a busy host a stop may come before the first instruction.
        assert!(state.gpr[gpr::RAX] >= last && (CODE..CODE + 5).contains(&state.rip), "{state:x?}");
        last = state.gpr[gpr::RAX];
    }
    assert!(last > 0);
    // A stop that was asked for before.
    rig.vcpu.stop_handle().kick();
    assert_eq!(rig.vcpu.run(), Exit::Stopped);
}

#[test]
fn io_of_all_kinds() {
    let code = [
        0x66, 0xba, 0x34, 0x12, // mov dx, 0x1234
        0xec, // in al, dx
        0x88, 0xc3, // mov bl, al
        0xbe, 0, 0, 2, 0, // mov esi, 0x20000
        0xc7, 0x06, 1, 2, 3, 4, // mov dword [rsi], 0x04030201
        0xb9, 2, 0, 0, 0, // mov ecx, 2
        0xf3, 0x66, 0x6f, // rep outsw
        0xbf, 0x06, 0, 0, 0xd0, // mov edi, 0xd0000006
        0x8b, 0x07, // mov eax, [rdi] (crosses a unit)
        0x48, 0x89, 0x07, // mov [rdi], rax
        0xf4, // hlt
    ];
    let Some(mut rig) = rig(&code, DirtyLog::Off) else { return };
    assert_eq!(rig.vcpu.run(), Exit::Stuck, "HLT with interrupts off");
    let state = rig.vcpu.state();
    assert_eq!((state.gpr[gpr::RBX], state.gpr[gpr::RAX]), (0x34, 0x0908_0706));
    assert!(state.halted);
    let log = rig.log.0.lock().unwrap();
    assert_eq!(
        *log,
        [(0x1234, vec![1, 2]), (0x1234, vec![3, 4]), (0xd000_0006, vec![6, 7]), (0xd000_0008, vec![8, 9, 0, 0, 0, 0]),]
    );
}

/// Is this CPU one that QEMU translates?
fn emulated() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    leaf.ebx.to_le_bytes() == *b"TCGT"
}

#[test]
fn steps_and_breakpoints() {
    // Ten NOPs, then back.
    let code = [[0x90; 10].as_slice(), &[0xeb, 0xf4]].concat();
    let Some(mut rig) = rig(&code, DirtyLog::Off) else { return };
    for n in 1..=3 {
        assert_eq!(rig.vcpu.step(), Exit::Debug);
        assert_eq!(rig.vcpu.state().rip, CODE + n);
    }
    for breakpoints in [&[5_u64][..], &[1, 5, 7, 9], &[0, 1, 2, 4, 6, 8]] {
        let addresses: Vec<u64> = breakpoints.iter().map(|at| CODE + at).collect();
        rig.vcpu.set_breakpoints(&addresses);
        let mut met = std::collections::BTreeSet::new();
        for _ in 0..2 * addresses.len() {
            match run_for(&mut *rig.vcpu, Duration::from_secs(2)) {
                Exit::Debug => {}
                // QEMU's translator has no breakpoints in guests of guests.
                Exit::Stopped if addresses.len() <= 4 && emulated() => {
                    eprintln!("NOT TESTED: this CPU's debug registers do nothing");
                    break;
                }
                other => panic!("{other:?}"),
            }
            met.insert(rig.vcpu.state().rip);
        }
        if met.is_empty() {
            continue;
        }
        assert_eq!(met.into_iter().collect::<Vec<_>>(), addresses);
    }
    rig.vcpu.set_breakpoints(&[]);
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(20)), Exit::Stopped);
}

#[test]
fn memory_by_linear_address() {
    let Some(mut rig) = rig(&[0xf4], DirtyLog::Off) else { return };
    assert!(rig.ram.write(0x2f_fffc, b"across a page"));
    let mut bytes = [0; 13];
    assert!(rig.vcpu.read_virtual(0x2f_fffc, &mut bytes));
    assert_eq!(&bytes, b"across a page");
    assert!(rig.vcpu.write_virtual(0x30_0000, b"x"));
    assert!(!rig.vcpu.read_virtual(1 << 40, &mut bytes), "not mapped");
    assert!(!rig.vcpu.read_virtual(0xd000_0000, &mut bytes), "no RAM");
}

/// MSRs outside the model are `#GP`, which without an IDT is a triple fault; a few have an answer.
#[test]
fn msrs_are_filtered() {
    let read = |number: u32| [&[0xb9], &number.to_le_bytes()[..], &[0x0f, 0x32, 0xf4]].concat();
    // FEATURE_CONTROL: the monitor's answer. IA32_PMC0, a Hyper-V register, KVM's asynchronous page faults, the AMD VM_CR: not there.
    let Some(mut rig) = rig(&read(0x3a), DirtyLog::Off) else { return };
    assert_eq!(rig.vcpu.run(), Exit::Stuck);
    assert_eq!(rig.vcpu.state().gpr[gpr::RAX], 1);
    for number in [0xc1, 0x4000_0000, 0x4b56_4d02, 0xc001_0114] {
        assert!(rig.ram.write(CODE, &read(number)));
        rig.vcpu.set_state(&start());
        assert_eq!(rig.vcpu.run(), Exit::TripleFault, "{number:#x}");
    }
}

/// By rings where this KVM has them, and by bitmaps; the same pages either way.
#[test]
fn written_pages_are_noted() {
    // mov [0x300000], eax; mov [0x3fff000], eax; hlt
    let code = [0x89, 0x04, 0x25, 0, 0, 0x30, 0, 0x89, 0x04, 0x25, 0, 0xf0, 0xff, 0x03, 0xf4];
    for how in [DirtyLog::Best, DirtyLog::Bitmap] {
        let Some(mut rig) = rig(&code, how) else { return };
        let rings = Host::open().is_ok_and(|host| host.capabilities().dirty_ring > 0);
        assert_eq!(rig.engine.has_dirty_rings(), rings && how == DirtyLog::Best);
        rig.engine.take_dirty().unwrap();
        for _ in 0..2 {
            rig.vcpu.set_state(&start());
            assert_eq!(rig.vcpu.run(), Exit::Stuck);
            let pages = pages(&rig.engine);
            for page in [0x30_0000, 0x3ff_f000] {
                assert!(pages.contains(&page), "{how:?}: {pages:x?}");
            }
            assert!(!pages.contains(&0x31_0000));
            assert!(self::pages(&rig.engine).is_empty(), "{how:?}");
        }
    }
    let Some(rig) = rig(&code, DirtyLog::Off) else { return };
    assert!(rig.engine.take_dirty().is_err());
}

fn pages(engine: &KvmEngine) -> Vec<u64> {
    engine.take_dirty().unwrap().iter().flat_map(|dirty| dirty.pages().collect::<Vec<_>>()).collect()
}

/// More pages than a ring has room for: the vCPU leaves the guest, nothing is lost, and others take from the ring meanwhile.
#[test]
fn a_full_ring_loses_nothing() {
    // mov edi, 0x400000; mov ecx, 12288; 1: mov [rdi], ecx; add rdi, 4096; loop 1b; hlt
    let code =
        [0xbf, 0, 0, 0x40, 0, 0xb9, 0, 0x30, 0, 0, 0x89, 0x0f, 0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf5, 0xf4];
    let Some(Rig { engine, mut vcpu, .. }) = rig(&code, DirtyLog::Best) else { return };
    engine.take_dirty().unwrap();
    let wanted: std::collections::BTreeSet<u64> = (0..12288).map(|n| 0x40_0000 + n * 4096).collect();
    for concurrent in [false, true] {
        vcpu.set_state(&start());
        let done = AtomicU64::new(0);
        let mut seen = std::collections::BTreeSet::new();
        std::thread::scope(|scope| {
            let taker = scope.spawn(|| {
                let mut seen = Vec::new();
                while concurrent && done.load(Ordering::SeqCst) == 0 {
                    seen.extend(pages(&engine));
                    std::thread::sleep(Duration::from_millis(1));
                }
                seen
            });
            assert_eq!(vcpu.run(), Exit::Stuck);
            done.store(1, Ordering::SeqCst);
            seen.extend(taker.join().unwrap());
        });
        seen.extend(pages(&engine));
        assert!(seen.is_superset(&wanted), "{} of {}", seen.intersection(&wanted).count(), wanted.len());
        let counters = vcpu.counters();
        let full = counters.iter().find(|(name, _)| name == "kvm.exits.dirty-ring").map_or(0, |(_, count)| *count);
        assert!(concurrent || !engine.has_dirty_rings() || full > 0, "the ring was never full");
    }
}

#[test]
fn clock_goes_on_from_where_it_is_set() {
    let Some(rig) = rig(&[0xf4], DirtyLog::Off) else { return };
    rig.engine.set_clock(3_600_000_000_000);
    let now = rig.engine.clock();
    assert!(now.wrapping_sub(3_600_000_000_000) < 1_000_000_000, "{now}");
}

/// Kicks from many threads while the guest runs, halts and does I/O: none is lost, nothing hangs.
#[test]
fn a_storm_of_kicks() {
    // 1: out 0x80, al; inc rbx; jmp 1b
    let Some(mut rig) = rig(&[0xe6, 0x80, 0x48, 0xff, 0xc3, 0xeb, 0xf9], DirtyLog::Off) else { return };
    let done = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (kick, done) = (rig.vcpu.kick_handle(), done.clone());
            std::thread::spawn(move || {
                while done.load(Ordering::SeqCst) == 0 {
                    kick.kick();
                    std::thread::sleep(Duration::from_micros(300));
                }
            })
        })
        .collect();
    for _ in 0..20 {
        assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(5)), Exit::Stopped);
    }
    done.store(1, Ordering::SeqCst);
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    // Every OUT that the guest counted has come out, and none twice.
    let state = rig.vcpu.state();
    let outs = rig.log.0.lock().unwrap().len() as u64;
    let finished = state.gpr[gpr::RBX] + u64::from(state.rip == CODE + 2);
    assert_eq!(outs, finished);
    drop(Host::open());
}

/// Writes to a bound address are counted in the kernel, in any size; next to it and once unbound they come out.
#[test]
fn doorbells_do_not_leave_the_guest() {
    // mov edi, 0xd0000000; mov ecx, 1000; 1: mov [rdi], cx; mov [rdi], ecx; mov [rdi + 4], cl; loop 1b; hlt
    let code =
        [0xbf, 0, 0, 0, 0xd0, 0xb9, 0xe8, 3, 0, 0, 0x66, 0x89, 0x0f, 0x89, 0x0f, 0x88, 0x4f, 0x04, 0xe2, 0xf6, 0xf4];
    let Some(mut rig) = rig(&code, DirtyLog::Off) else { return };
    let chips = rig.engine.chips().unwrap();
    let event = vmm_sys_util::eventfd::EventFd::new(libc::EFD_NONBLOCK).unwrap();
    // SAFETY: the descriptor is open as long as `event`.
    let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&event)) };
    let binding = chips.doorbell(0xd000_0000, borrowed).expect("a doorbell");
    assert!(chips.doorbell(0xd000_0000, borrowed).is_none(), "taken");
    let exits = |vcpu: &dyn Vcpu| {
        let counters = vcpu.counters();
        counters.iter().find(|(name, _)| name == "kvm.exits.mmio").map_or(0, |(_, count)| *count)
    };
    assert_eq!(rig.vcpu.run(), Exit::Stuck);
    assert_eq!((event.read().unwrap(), exits(&*rig.vcpu)), (2000, 1000));
    assert!(rig.log.0.lock().unwrap().iter().all(|(address, _)| *address == 0xd000_0004));
    drop(binding);
    rig.vcpu.set_state(&start());
    assert_eq!(rig.vcpu.run(), Exit::Stuck);
    assert!(event.read().is_err());
    assert_eq!(exits(&*rig.vcpu), 4000);
}

/// Puts an interrupt handler there, and into the table at 0x9000.
fn handle(ram: &GuestRam, vector: u64, handler: u64, code: &[u8]) {
    assert!(ram.write(handler, code));
    let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    assert!(ram.write(0x9000 + vector * 16, &gate.to_le_bytes()));
    assert!(ram.write(0x9008 + vector * 16, &[0; 8]));
}

/// With the table of interrupts at 0x9000, and RDI at the local APIC's page.
fn start_with_interrupts() -> CpuState {
    let mut state = start();
    state.idtr = TableRegister { base: 0x9000, limit: 0xfff };
    state.gpr[gpr::RDI] = 0xfee0_0000;
    state
}

/// `mov dword [rdi + register], value`
fn store(register: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x87], &register.to_le_bytes()[..], &value.to_le_bytes()].concat()
}

/// A one-shot timer of the local APIC that runs out while the vCPU is on its way out, or while it stands: its interrupt is in the saved
/// registers, once, and the vCPU is as it was.
#[test]
fn one_shot_timers_are_saved() {
    // Switches the local APIC on; a timer of RAX ns; OUT; 1: sti; hlt; jmp 1b. The handler: inc r8, end of interrupt, iretq.
    let timer = [store(0xf0, 0x1ff), store(0x320, 0x41), store(0x3e0, 0xb)].concat();
    let rest = [0x89, 0x87, 0x80, 3, 0, 0, 0xe6, 0x80, 0xfb, 0xf4, 0xeb, 0xfc];
    let Some(mut rig) = rig(&[&timer[..], &rest].concat(), DirtyLog::Off) else { return };
    let end = [store(0xb0, 0), vec![0x48, 0xcf]].concat();
    handle(&rig.ram, 0x41, 0x1_1000, &[&[0x49, 0xff, 0xc0], &end[..]].concat());
    let chips = rig.engine.chips().unwrap();
    let requested = |page: &[u32; 64]| page[0x22] & 2 != 0;

    // It runs out while the OUT is dealt with; then the vCPU stops before the kernel has looked at timers.
    let mut state = start_with_interrupts();
    state.gpr[gpr::RAX] = 1_000_000;
    rig.vcpu.set_state(&state);
    let stop = rig.vcpu.stop_handle();
    *rig.log.1.lock().unwrap() = Some(Box::new(move || {
        std::thread::sleep(Duration::from_millis(20));
        stop.kick();
    }));
    assert_eq!(rig.vcpu.run(), Exit::Stopped);
    let before = rig.vcpu.state();
    assert_eq!(before.gpr[gpr::R8], 0);
    let saved = chips.save().unwrap();
    assert!(requested(&saved.lapics[0].page), "lost");
    assert_eq!(saved.lapics[0].page[0x39], 0);
    assert_eq!(rig.vcpu.state(), before);
    *rig.log.1.lock().unwrap() = None;
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(30)), Exit::Stopped);
    assert_eq!(rig.vcpu.state().gpr[gpr::R8], 1);

    // It has interrupted: saved and restored it does not do so again.
    let mut saved = chips.save().unwrap();
    assert!(!requested(&saved.lapics[0].page));
    chips.restore(&saved).unwrap();
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(30)), Exit::Stopped);
    assert_eq!(rig.vcpu.state().gpr[gpr::R8], 1);
    // What is left of a count is counted.
    saved.lapics[0].page[0x38] = 1_000_000;
    saved.lapics[0].page[0x39] = 1;
    chips.restore(&saved).unwrap();
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(30)), Exit::Stopped);
    assert_eq!(rig.vcpu.state().gpr[gpr::R8], 2);

    // A vCPU that waits with interrupts on, and a timer that runs out once it stands.
    state.gpr[gpr::RAX] = 200_000_000;
    rig.vcpu.set_state(&state);
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(30)), Exit::Stopped);
    let before = rig.vcpu.state();
    assert!(before.halted && before.rflags & cpu::rflags::IF != 0);
    std::thread::sleep(Duration::from_millis(250));
    assert!(requested(&chips.save().unwrap().lapics[0].page), "lost");
    // With something to take it is no longer halted, by the kernel's own account.
    assert_eq!(CpuState { halted: true, ..rig.vcpu.state() }, before);
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(30)), Exit::Stopped);
    assert_eq!(rig.vcpu.state().gpr[gpr::R8], 1);
}

/// The timer chip's count goes on from where it was; the saved phase is the restored one's, and time goes by meanwhile.
#[test]
fn the_timer_chip_keeps_its_phase() {
    let Some(rig) = rig(&[0xf4], DirtyLog::Off) else { return };
    let chips = rig.engine.chips().unwrap();
    let mut registers = chips.save().unwrap();
    assert_eq!(registers.pit.channels.map(|channel| channel.age), [None; 3]);
    const MS: u64 = 1_000_000;
    // A round of 50 ms; and a count of as much that ends once.
    for mode in [2, 0] {
        let channel = &mut registers.pit.channels[0];
        (channel.mode, channel.access, channel.reload) = (mode, 3, 59_659);
        let differs = |_| {
            registers.pit.channels[0].age = Some(20 * MS);
            let began = std::time::Instant::now();
            chips.restore(&registers).unwrap();
            let channel = chips.save().unwrap().pit.channels[0];
            let wanted = 20 * MS + began.elapsed().as_nanos() as u64;
            // What is left of a count is loaded as one of its own: its end is what counts.
            let length = u64::from(channel.reload) * 1_000_000_000 / 1_193_182;
            let age = channel.age.unwrap() + 50 * MS - length;
            let differs = (age % (50 * MS)).abs_diff(wanted % (50 * MS));
            differs.min(50 * MS - differs)
        };
        // A busy host may look late.
        let differs: Vec<u64> = (0..10).map(differs).collect();
        println!("mode {mode}: {differs:?} ns");
        assert!(differs.iter().any(|differs| *differs < 3 * MS), "mode {mode}: {differs:?}");
    }
    // It has ended, and that is known.
    let saved = chips.save().unwrap();
    assert!(saved.pit.channels[0].age.unwrap() >= 29 * MS);
    chips.restore(&saved).unwrap();
    let [channel, ..] = chips.save().unwrap().pit.channels;
    assert!(channel.mode == 0 && channel.age.unwrap() >= 50 * MS, "{channel:?}");
}

/// A guest lives from one interrupt of the timer chip to the next, is stopped again and again, and goes on from what was saved or just goes on.
/// `TIGHTROPE_TEST_MOVES` says how often, for whoever looks for what is rarely lost.
#[test]
fn interrupts_of_the_timer_chip_are_not_lost() {
    let out = |port: u8, value: u8| [0xb0, value, 0xe6, port];
    let count = [out(0x40, 0xa9), out(0x40, 0x04)].concat();
    let pic = [out(0x20, 0x11), out(0x21, 0x48), out(0x21, 4), out(0x21, 1), out(0x21, 0xfe), out(0x43, 0x30)].concat();
    // A count of 1 ms; 1: sti; hlt; jmp 1b. The handler: inc r8, the next count, end of interrupt, iretq.
    let Some(mut rig) = rig(&[&pic[..], &count, &[0xfb, 0xf4, 0xeb, 0xfc]].concat(), DirtyLog::Off) else { return };
    handle(&rig.ram, 0x48, 0x1_1000, &[&[0x49, 0xff, 0xc0], &count[..], &out(0x20, 0x20), &[0x48, 0xcf]].concat());
    rig.vcpu.set_state(&start_with_interrupts());
    let chips = rig.engine.chips().unwrap();
    let mut seen = 0;
    let mut saved = None;
    let moves = std::env::var("TIGHTROPE_TEST_MOVES").ok().map_or(100, |moves| moves.parse().expect("a number"));
    for number in 0..moves {
        let mut tries = 0;
        while rig.vcpu.state().gpr[gpr::R8] == seen {
            assert!(tries < 200, "lost in move {number}, saved as {saved:#?}\nnow {:#?}", chips.save());
            tries += 1;
            assert_eq!(run_for(&mut *rig.vcpu, Duration::from_micros(number * 97 % 3000)), Exit::Stopped);
        }
        seen = rig.vcpu.state().gpr[gpr::R8];
        let state = rig.vcpu.state();
        let registers = chips.save().unwrap();
        if number % 3 != 0 {
            rig.vcpu.set_state(&state);
            chips.restore(&registers).unwrap();
        }
        saved = Some((state.halted, state.rip, registers.pics, registers.pit));
    }
    println!("{seen} interrupts in {moves} moves");
}

/// A message by a line's counter arrives, also after the line has another message to send.
#[test]
fn message_lines_interrupt() {
    // 1: sti; hlt; jmp 1b. The handlers at 0x11000 and 0x11100: inc r8 or r9, end of interrupt, iretq.
    // RDI has the local APIC's page, which is switched on by its spurious vector register.
    let eoi = [0xc7, 0x87, 0xb0, 0, 0, 0, 0, 0, 0, 0, 0x48, 0xcf];
    let switch_on = [0xc7, 0x87, 0xf0, 0, 0, 0, 0xff, 1, 0, 0, 0xfb, 0xf4, 0xeb, 0xfc];
    let Some(mut rig) = rig(&switch_on, DirtyLog::Off) else { return };
    for (vector, handler, count) in [(0x41_u64, 0x1_1000_u64, [0x49, 0xff, 0xc0]), (0x42, 0x1_1100, [0x49, 0xff, 0xc1])]
    {
        handle(&rig.ram, vector, handler, &[&count[..], &eoi].concat());
    }
    rig.vcpu.set_state(&start_with_interrupts());
    let line = rig.engine.chips().unwrap().message_line().expect("a line");
    assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(50)), Exit::Stopped);
    for round in 1..=3 {
        for (vector, register) in [(0x41, gpr::R8), (0x42, gpr::R9)] {
            line.send(0xfee0_0000, vector);
            assert_eq!(run_for(&mut *rig.vcpu, Duration::from_millis(50)), Exit::Stopped);
            assert_eq!(rig.vcpu.state().gpr[register], round, "vector {vector:#x}");
        }
    }
}
