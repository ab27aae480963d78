//! A vCPU: runs on its thread until there is something for the VMM to decide.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cpu::paging::{Access, Kind, PagingContext, probe};
use cpu::{Bus, CpuState, Exit, Kick, Vcpu};
use kvm_bindings as b;
use kvm_ioctls::VcpuFd;
use memory::GuestRam;
use vmm_sys_util::ioctl::ioctl;

use crate::Parking;
use crate::debug::{Breakpoints, Mode};
use crate::dirty::Log;
use crate::ioctls::KVM_RUN;
use crate::kick::{ALL, Cell, Handle, LOOK, STOP, WAKE};
use crate::msr;
use crate::probe::Doubt;
use crate::registers::{self, Features};
use crate::watch::Watch;

/// How often a stopping vCPU is let go on until no event is half delivered.
const SETTLING_TRIES: u32 = 64;

/// How long a parked vCPU sleeps at most before it looks again.
const LONGEST_REST: Duration = Duration::from_millis(5);

/// Counters of one vCPU, by exit reason.
#[derive(Default)]
struct Counters {
    io: u64,
    mmio: u64,
    msr: u64,
    kicks: u64,
    debug: u64,
    dirty: u64,
    other: u64,
}

/// What a return from the guest comes to.
enum Next {
    /// Go on.
    Run,
    /// Nothing happened but a kick.
    Kicked,
    Exit(Exit),
}

/// What a vCPU is made of.
pub struct VcpuParts {
    pub cell: Arc<Cell>,
    /// Its number and APIC id.
    pub index: u32,
    pub bus: Arc<dyn Bus>,
    pub ram: GuestRam,
    pub features: Features,
    pub watch: Arc<Watch>,
    /// This CPU loses registers at a triple fault (AMD-V does).
    pub keep_last: bool,
    pub parking: Option<Parking>,
    /// Noting what is written, if somebody wants to know.
    pub dirty: Option<Arc<Log>>,
    /// To be raised when KVM does not run the guest.
    pub doubt: Option<Arc<Doubt>>,
}

pub struct KvmVcpu {
    cell: Arc<Cell>,
    index: u32,
    parking: Option<Parking>,
    dirty: Option<Arc<Log>>,
    doubt: Option<Arc<Doubt>>,
    bus: Arc<dyn Bus>,
    ram: GuestRam,
    features: Features,
    watch: Arc<Watch>,
    /// Our number with `watch`.
    number: usize,
    breakpoints: Breakpoints,
    counters: Counters,
    /// Why the last [`Vcpu::set_state`] failed: the vCPU must not run.
    broken: Option<String>,
    /// On CPUs that lose a vCPU's registers at a triple fault: those of the last exit.
    last: Option<Box<CpuState>>,
    /// What [`Vcpu::state`] shows after a triple fault there.
    at_crash: Option<Box<CpuState>>,
}

impl KvmVcpu {
    pub fn new(parts: VcpuParts) -> Self {
        let VcpuParts { cell, index, bus, ram, features, watch, keep_last, parking, dirty, doubt } = parts;
        let number = watch.add(cell.clone());
        if keep_last {
            cell.fd().get_kvm_run().kvm_valid_regs = u64::from(b::KVM_SYNC_X86_REGS | b::KVM_SYNC_X86_SREGS);
        }
        Self {
            cell,
            index,
            parking,
            dirty,
            doubt,
            bus,
            ram,
            features,
            watch,
            number,
            breakpoints: Breakpoints::default(),
            counters: Counters::default(),
            broken: None,
            last: keep_last.then(Box::default),
            at_crash: None,
        }
    }

    /// Enters the guest once and deals with the return.
    fn enter(&mut self, fd: &mut VcpuFd) -> Next {
        // SAFETY: a vCPU's descriptor; what the kernel writes goes to the page it shares.
        let result = unsafe { ioctl(fd, KVM_RUN()) };
        let error = (result < 0).then(kvm_ioctls::Error::last);
        self.cell.exits.fetch_add(1, Ordering::Relaxed);
        self.cell.stuck.store(false, Ordering::Relaxed);
        let run = fd.get_kvm_run();
        if let Some(error) = error {
            return match error.errno() {
                libc::EINTR | libc::EAGAIN => {
                    self.counters.kicks += 1;
                    Next::Kicked
                }
                _ => Next::Exit(Exit::Internal(format!("KVM_RUN failed: {}", std::io::Error::from(error)))),
            };
        }
        let next = self.exit(run);
        if let Some(last) = &mut self.last {
            if matches!(next, Next::Exit(Exit::TripleFault)) {
                self.at_crash = Some(last.clone());
            } else {
                // SAFETY: the kernel fills in this member of the union; its bit patterns are all valid.
                let registers = unsafe { &run.s.regs };
                registers::regs_from_kvm(&registers.regs, last);
                registers::sregs_from_kvm(&registers.sregs, last);
            }
        }
        next
    }

    fn exit(&mut self, run: &mut b::kvm_run) -> Next {
        let union = &mut run.__bindgen_anon_1;
        match run.exit_reason {
            b::KVM_EXIT_IO => {
                self.counters.io += 1;
                // SAFETY: the exit reason says which member the kernel has filled in.
                let io = unsafe { union.io };
                let (size, len) = (usize::from(io.size), usize::from(io.size).saturating_mul(io.count as usize));
                let start = (&raw mut *run).cast::<u8>();
                // SAFETY: the kernel puts `count` elements at this offset of the mapping whose start `run` is; nobody else
                // reads or writes them while the vCPU is outside the guest.
                let data = unsafe { std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), len) };
                for element in data.chunks_exact_mut(size.max(1)) {
                    if u32::from(io.direction) == b::KVM_EXIT_IO_IN {
                        self.bus.pio_read(io.port, element);
                    } else {
                        self.bus.pio_write(io.port, element);
                    }
                }
            }
            b::KVM_EXIT_MMIO => {
                self.counters.mmio += 1;
                // SAFETY: as above.
                let mmio = unsafe { &mut union.mmio };
                let len = (mmio.len as usize).min(8);
                let (data, _) = mmio.data.split_at_mut(len);
                // The bus takes what lies within one aligned unit of 8 bytes.
                let first = len.min(8 - (mmio.phys_addr % 8) as usize);
                let (low, high) = data.split_at_mut(first);
                for (address, part) in [(mmio.phys_addr, low), (mmio.phys_addr.wrapping_add(first as u64), high)] {
                    match (part.is_empty(), mmio.is_write != 0) {
                        (true, _) => {}
                        (false, true) => self.bus.mmio_write(address, part),
                        (false, false) => self.bus.mmio_read(address, part),
                    }
                }
            }
            b::KVM_EXIT_X86_RDMSR => {
                self.counters.msr += 1;
                // SAFETY: as above.
                let access = unsafe { &mut union.msr };
                let answer = msr::read(access.index, self.features.amd);
                (access.data, access.error) = (answer.unwrap_or_default(), answer.is_none().into());
            }
            b::KVM_EXIT_X86_WRMSR => {
                self.counters.msr += 1;
                // SAFETY: as above.
                let access = unsafe { &mut union.msr };
                access.error = (!msr::write(access.index, access.data, self.features.amd)).into();
            }
            b::KVM_EXIT_DEBUG => {
                self.counters.debug += 1;
                return Next::Exit(Exit::Debug);
            }
            b::KVM_EXIT_DIRTY_RING_FULL => {
                self.counters.dirty += 1;
                if let Some(Err(error)) = self.dirty.as_ref().map(|log| log.harvest()) {
                    return Next::Exit(Exit::Internal(format!(
                        "KVM does not empty its ring of written pages: {error}"
                    )));
                }
            }
            b::KVM_EXIT_INTR => return Next::Kicked,
            b::KVM_EXIT_SHUTDOWN => return Next::Exit(Exit::TripleFault),
            b::KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let why = unsafe { union.fail_entry.hardware_entry_failure_reason };
                return Next::Exit(Exit::Internal(format!("the CPU refuses to enter the guest (reason {why:#x})")));
            }
            b::KVM_EXIT_INTERNAL_ERROR => {
                // SAFETY: as above.
                let error = unsafe { union.internal };
                return Next::Exit(Exit::Internal(internal_error(error.suberror, error.ndata, &error.data)));
            }
            reason => {
                self.counters.other += 1;
                return Next::Exit(Exit::Internal(format!("KVM stopped the guest for reason {reason}")));
            }
        }
        Next::Run
    }

    /// Is an event half delivered: taken from its source, but not yet the guest's? The shared state has no place for it.
    fn unsettled(fd: &VcpuFd) -> bool {
        fd.get_vcpu_events().is_ok_and(|events| {
            events.interrupt.injected != 0
                || events.nmi.injected != 0
                || events.exception.injected != 0
                || events.exception.pending != 0
        })
    }

    /// Lets the guest go on for moments until nothing is half delivered.
    fn settle(&mut self, fd: &mut VcpuFd) -> Option<Exit> {
        for attempt in 0..SETTLING_TRIES {
            if !Self::unsettled(fd) {
                return None;
            }
            self.watch.wake_after(self.number, Duration::from_micros(100 << attempt.min(8)));
            for stop in [false, true] {
                // With `stop`, what the last exit began is finished without going on.
                loop {
                    self.cell.prepare(stop);
                    match self.enter(fd) {
                        Next::Run => {}
                        Next::Kicked => break,
                        Next::Exit(exit) => return Some(exit),
                    }
                }
                self.cell.take(ALL);
            }
        }
        None
    }

    /// Halted with interrupts off, and no NMI to come?
    fn halted_for_good(fd: &VcpuFd) -> bool {
        let halted = fd.get_mp_state().is_ok_and(|state| state.mp_state == b::KVM_MP_STATE_HALTED);
        halted
            && fd.get_regs().is_ok_and(|regs| regs.rflags & cpu::rflags::IF == 0)
            && fd.get_vcpu_events().is_ok_and(|events| events.nmi.pending == 0 && events.nmi.injected == 0)
    }

    /// Looks whether the whole VM can make no progress: this vCPU and all others are halted for good.
    fn look(&self, fd: &VcpuFd) -> bool {
        let stuck = Self::halted_for_good(fd);
        self.cell.stuck.store(stuck, Ordering::SeqCst);
        // A halted vCPU can be woken by another that runs, so it is for good only when all are.
        let cells = self.watch.cells();
        let all = stuck && cells.iter().all(|cell| cell.stuck.load(Ordering::SeqCst));
        if all {
            cells.iter().filter(|cell| !Arc::ptr_eq(cell, &self.cell)).for_each(|cell| cell.request(LOOK));
        }
        all
    }

    /// Sleeps while this vCPU is in the parking code and has not been called. `true`: it was asked to stop meanwhile.
    fn parked(&self, fd: &VcpuFd) -> bool {
        let Some(parking) = self.parking else { return false };
        let rip = fd.get_regs().map_or(0, |regs| regs.rip);
        if self.index == 0 || rip.wrapping_sub(parking.code) >= memory::PAGE_SIZE {
            return false;
        }
        let mut rest = Duration::from_micros(200);
        while !self.called(parking.mailbox) {
            if self.cell.take(STOP) {
                return true;
            }
            std::thread::sleep(rest);
            rest = (rest * 2).min(LONGEST_REST);
        }
        false
    }

    /// Is there a command in the mailbox for this vCPU? (ACPI 6.5, 5.2.12.19)
    fn called(&self, mailbox: u64) -> bool {
        let mut head = [0; 8];
        if !self.ram.read(mailbox, &mut head) {
            return false;
        }
        let [c0, c1, _, _, i0, i1, i2, i3] = head;
        u16::from_le_bytes([c0, c1]) != 0 && u32::from_le_bytes([i0, i1, i2, i3]) == self.index
    }

    fn run_loop(&mut self, fd: &mut VcpuFd, mut mode: Mode) -> Exit {
        let wish = mode;
        // A breakpoint at the instruction to go on from must not stop it again.
        let begin = fd.get_regs().map_or(0, |regs| regs.rip);
        if mode == Mode::Breakpoints && self.breakpoints.at(begin) {
            mode = Mode::Step;
        }
        loop {
            if let Err(why) = self.breakpoints.arm(fd, mode) {
                return Exit::Internal(why);
            }
            let stop = self.cell.asked(STOP);
            self.cell.prepare(stop);
            match self.enter(fd) {
                Next::Run => {}
                Next::Kicked if stop => {
                    // What the kernel had begun for the guest is finished: the byte was set before this entry.
                    self.cell.take(ALL);
                    return self.settle(fd).unwrap_or(Exit::Stopped);
                }
                Next::Kicked => {
                    self.cell.take(WAKE);
                    if self.cell.take(LOOK) && self.look(fd) {
                        return Exit::Stuck;
                    }
                }
                Next::Exit(Exit::Debug) if wish != Mode::Free && mode == Mode::Step => {
                    let rip = fd.get_regs().map_or(0, |regs| regs.rip);
                    if self.breakpoints.at(rip) {
                        return Exit::Debug;
                    }
                    mode = wish;
                }
                Next::Exit(exit) => return exit,
            }
        }
    }
}

fn internal_error(suberror: u32, count: u32, data: &[u64]) -> String {
    let mut text = match suberror {
        b::KVM_INTERNAL_ERROR_EMULATION => "KVM cannot emulate an instruction of the guest".to_string(),
        b::KVM_INTERNAL_ERROR_SIMUL_EX => "KVM could not deliver an exception to the guest".to_string(),
        b::KVM_INTERNAL_ERROR_DELIVERY_EV => "KVM could not deliver an event to the guest".to_string(),
        b::KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => {
            "the CPU left the guest for a reason KVM does not know".to_string()
        }
        other => format!("KVM's internal error {other}"),
    };
    let data: Vec<String> = data.iter().take(count as usize).map(|word| format!("{word:#x}")).collect();
    if !data.is_empty() {
        text.push_str(&format!(" (its data: {})", data.join(" ")));
    }
    text
}

impl Vcpu for KvmVcpu {
    fn run(&mut self) -> Exit {
        if let Some(why) = &self.broken {
            return Exit::Internal(why.clone());
        }
        self.at_crash = None;
        let cell = self.cell.clone();
        let mut fd = cell.fd();
        cell.enter();
        let mode = self.breakpoints.mode();
        let exit = if self.parked(&fd) { Exit::Stopped } else { self.run_loop(&mut fd, mode) };
        cell.leave();
        if let (Exit::Internal(_), Some(doubt)) = (&exit, &self.doubt) {
            doubt.raise();
        }
        exit
    }

    fn state(&mut self) -> CpuState {
        if let Some(state) = &self.at_crash {
            return (**state).clone();
        }
        let cell = self.cell.clone();
        let result = registers::get(&cell.fd(), &self.features);
        result.unwrap_or_else(|why| {
            self.broken = Some(why);
            CpuState::default()
        })
    }

    fn remark(&self) -> Option<&'static str> {
        let text = "AMD-V keeps no registers at a triple fault: these are of the guest's last exit (--engine bt has the exact ones)";
        self.at_crash.is_some().then_some(text)
    }

    fn set_state(&mut self, state: &CpuState) {
        self.at_crash = None;
        let cell = self.cell.clone();
        self.broken = registers::set(&cell.fd(), &self.features, state).err();
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Handle(self.cell.clone(), WAKE))
    }

    fn stop_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Handle(self.cell.clone(), STOP))
    }

    fn step(&mut self) -> Exit {
        if let Some(why) = &self.broken {
            return Exit::Internal(why.clone());
        }
        let cell = self.cell.clone();
        let mut fd = cell.fd();
        if fd.get_mp_state().is_ok_and(|state| state.mp_state != b::KVM_MP_STATE_RUNNABLE) {
            // It waits for an interrupt: give one the time to come.
            self.watch.wake_after(self.number, Duration::from_millis(2));
        }
        if let Err(why) = self.breakpoints.arm(&fd, Mode::Step) {
            return Exit::Internal(why);
        }
        cell.enter();
        let exit = loop {
            let stop = cell.asked(STOP);
            cell.prepare(stop);
            match self.enter(&mut fd) {
                Next::Run => {}
                Next::Kicked if stop => {
                    cell.take(STOP);
                    break Exit::Stopped;
                }
                Next::Kicked => {
                    cell.take(LOOK);
                    let waits = fd.get_mp_state().is_ok_and(|state| state.mp_state != b::KVM_MP_STATE_RUNNABLE);
                    if cell.take(WAKE) && waits {
                        break Exit::Debug;
                    }
                }
                Next::Exit(exit) => break exit,
            }
        };
        cell.leave();
        exit
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints.set(addresses);
    }

    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.each_page(address, data.len(), |this, gpa, range| {
            data.get_mut(range).is_some_and(|part| this.ram.read(gpa, part))
        })
    }

    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool {
        self.each_page(address, data.len(), |this, gpa, range| {
            data.get(range).is_some_and(|part| this.ram.write(gpa, part))
        })
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let c = &self.counters;
        let all = [
            ("exits.io", c.io),
            ("exits.mmio", c.mmio),
            ("exits.msr", c.msr),
            ("exits.kicks", c.kicks),
            ("exits.debug", c.debug),
            ("exits.dirty-ring", c.dirty),
            ("exits.other", c.other),
        ];
        all.into_iter().map(|(name, count)| (format!("kvm.{name}"), count)).collect()
    }
}

impl KvmVcpu {
    /// Calls `access` with the guest-physical address of each piece of `len` bytes at the linear `address`; `false` where it is unmapped.
    fn each_page(
        &mut self,
        address: u64,
        len: usize,
        mut access: impl FnMut(&Self, u64, std::ops::Range<usize>) -> bool,
    ) -> bool {
        // After a crash that took the registers away the kernel has forgotten this vCPU's page tables.
        let crashed = self.at_crash.as_ref().map(|state| PagingContext::new(state));
        let mut at = 0;
        while at < len {
            let linear = address.wrapping_add(at as u64);
            let piece = (memory::PAGE_SIZE - linear % memory::PAGE_SIZE).min((len - at) as u64);
            let gpa = match &crashed {
                Some(context) => {
                    let access = Access { kind: Kind::Read, user: false, ac: true };
                    probe(&self.ram, context, linear, access).ok().map(|mapping| mapping.gpa)
                }
                None => {
                    let fd = self.cell.fd();
                    fd.translate_gva(linear).ok().filter(|t| t.valid != 0).map(|t| t.physical_address)
                }
            };
            let Some(gpa) = gpa else { return false };
            if !access(self, gpa, at..at + piece as usize) {
                return false;
            }
            at += piece as usize;
        }
        true
    }
}
