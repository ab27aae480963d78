//! The engine `interp`: every instruction through [`Interp::step`].

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use cpu::cpuid::CpuidModel;
use cpu::{CpuState, Engine, Exit, Kick, Vcpu, VcpuSetup, rflags};
use memory::GuestRam;

use crate::events::TripleFault;
use crate::interp::{Interp, NoHooks, Outcome};
use crate::{msr, tsc};

/// Instructions between two looks at the local APIC without a kick.
const LOOK: u32 = 32;

/// The engine `interp` over one VM's RAM.
pub struct InterpEngine {
    ram: GuestRam,
    model: Arc<CpuidModel>,
}

impl InterpEngine {
    /// The engine for a VM with `cpus` vCPUs.
    pub fn new(ram: GuestRam, cpus: u32) -> Self {
        Self::with_model(ram, CpuidModel::new(cpus, tsc::khz()))
    }

    /// The same with a CPUID model of the caller's.
    pub fn with_model(ram: GuestRam, model: CpuidModel) -> Self {
        Self { ram, model: Arc::new(model) }
    }
}

impl Engine for InterpEngine {
    fn name(&self) -> &'static str {
        "interp"
    }

    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String> {
        let interp = Interp::new(setup, self.ram.clone(), self.model.clone());
        Ok(Box::new(InterpVcpu {
            interp,
            state: CpuState::default(),
            control: Arc::new(Control::default()),
            breakpoints: HashSet::new(),
        }))
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn model(&self) -> &CpuidModel {
        &self.model
    }

    fn clock(&self) -> u64 {
        tsc::clock(self.model.tsc_khz)
    }

    fn set_clock(&self, nanoseconds: u64) {
        tsc::set_clock(self.model.tsc_khz, nanoseconds);
    }
}

const KICKED: u32 = 1;
const STOP: u32 = 2;

/// What other threads ask of a vCPU.
#[derive(Default)]
struct Control {
    requests: AtomicU32,
    lock: Mutex<()>,
    wake: Condvar,
}

impl Control {
    fn ask(&self, request: u32) {
        self.requests.fetch_or(request, Ordering::SeqCst);
        // Taking the lock makes sure that a sleeper has either seen the request or hears the notification.
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.wake.notify_all();
    }

    /// Sleeps until there is a request.
    fn sleep(&self) {
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.requests.load(Ordering::SeqCst) == 0 {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn take(&self, request: u32) -> bool {
        self.requests.fetch_and(!request, Ordering::SeqCst) & request != 0
    }
}

struct Handle(Arc<Control>, u32);

impl Kick for Handle {
    fn kick(&self) {
        self.0.ask(self.1);
    }
}

struct InterpVcpu {
    interp: Interp,
    state: CpuState,
    control: Arc<Control>,
    breakpoints: HashSet<u64>,
}

/// What a look at the local APIC found.
enum Event {
    /// Nothing that can be taken now.
    None,
    /// An event was delivered.
    Taken,
    Exit(Exit),
}

impl InterpVcpu {
    /// Takes what the local APIC has, if the guest can take it now.
    fn events(&mut self) -> Event {
        let lapic = self.interp.setup.lapic.clone();
        let status = lapic.status();
        if let Some(page) = status.sipi
            && self.state.wait_for_sipi
        {
            lapic.acknowledge_init();
            return Event::Exit(Exit::Internal(format!(
                "a start-up IPI to page {page:#x}: 16-bit code is not supported, the guest must use the ACPI wake-up mailbox"
            )));
        }
        if status.init {
            lapic.acknowledge_init();
            self.state = CpuState { wait_for_sipi: true, ..CpuState::default() };
            self.interp.flush();
            return Event::Taken;
        }
        if self.state.wait_for_sipi || self.state.interrupt_shadow {
            return Event::None;
        }
        let result = if status.nmi && !self.state.nmi_blocked {
            lapic.acknowledge_nmi();
            self.interp.deliver_nmi(&mut self.state)
        } else if status.interrupt && self.state.rflags & rflags::IF != 0 {
            match lapic.acknowledge() {
                Some(vector) => self.interp.deliver_interrupt(&mut self.state, vector),
                None => return Event::None,
            }
        } else {
            return Event::None;
        };
        match result {
            Ok(()) => Event::Taken,
            Err(TripleFault) => Event::Exit(Exit::TripleFault),
        }
    }

    /// Executes one instruction.
    fn instruction(&mut self) -> Result<(), Exit> {
        match self.interp.step(&mut self.state, &mut NoHooks) {
            Outcome::Done | Outcome::Halted => Ok(()),
            Outcome::TripleFault => Err(Exit::TripleFault),
            Outcome::NotAlone => Err(Exit::Internal("a locked access that nobody asked to be refused".into())),
            Outcome::Unsupported(what) => {
                Err(Exit::Internal(format!("cannot execute {what} at {:#x}", self.state.rip)))
            }
        }
    }

    /// Sleeps while the guest is halted. `Some` when `run` must return.
    fn idle(&mut self) -> Option<Exit> {
        while self.state.halted || self.state.wait_for_sipi {
            if self.control.take(STOP) {
                return Some(Exit::Stopped);
            }
            self.control.take(KICKED);
            match self.events() {
                Event::Taken => continue,
                Event::Exit(exit) => return Some(exit),
                Event::None => {}
            }
            if self.state.halted && !self.state.wait_for_sipi && self.state.rflags & rflags::IF == 0 {
                return Some(Exit::Stuck);
            }
            self.control.sleep();
        }
        None
    }
}

impl Vcpu for InterpVcpu {
    fn run(&mut self) -> Exit {
        self.interp.resumed(&self.state);
        let mut look = 0;
        let mut first = true;
        loop {
            if self.control.requests.load(Ordering::Relaxed) != 0 {
                if self.control.take(STOP) {
                    return Exit::Stopped;
                }
                self.control.take(KICKED);
                look = 0;
            }
            if self.state.halted || self.state.wait_for_sipi {
                if let Some(exit) = self.idle() {
                    return exit;
                }
            } else if look == 0 {
                look = LOOK;
                if let Event::Exit(exit) = self.events() {
                    return exit;
                }
            } else {
                look -= 1;
            }
            if !self.breakpoints.is_empty() && !first && self.breakpoints.contains(&self.state.rip) {
                return Exit::Debug;
            }
            first = false;
            if self.state.halted || self.state.wait_for_sipi {
                continue;
            }
            if self.state.interrupt_shadow {
                // What waits behind an STI is to be taken right after the next instruction.
                look = 0;
            }
            if let Err(exit) = self.instruction() {
                return exit;
            }
        }
    }

    fn state(&mut self) -> CpuState {
        self.state.clone()
    }

    fn set_state(&mut self, state: &CpuState) {
        self.state = state.clone();
        self.interp.flush();
        msr::update_clock(&self.interp.msr_env(), &self.state);
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Handle(self.control.clone(), KICKED))
    }

    fn stop_handle(&self) -> Arc<dyn Kick> {
        Arc::new(Handle(self.control.clone(), STOP))
    }

    fn step(&mut self) -> Exit {
        if let Event::Exit(exit) = self.events() {
            return exit;
        }
        if self.state.halted || self.state.wait_for_sipi {
            return Exit::Debug;
        }
        self.instruction().err().unwrap_or(Exit::Debug)
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints = addresses.iter().copied().collect();
    }

    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.interp.debug_read(&self.state, address, data)
    }

    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool {
        self.interp.debug_write(&self.state, address, data)
    }

    fn counters(&self) -> Vec<(String, u64)> {
        self.interp.counters()
    }
}
