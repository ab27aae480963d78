//! The contract between an engine and the machine around it.
//!
//! An [`Engine`] makes one [`Vcpu`] per virtual CPU over a VM's RAM. Each runs on a thread of its own:
//! [`Vcpu::run`] returns only when the VMM has something to decide ([`Exit`]). Port I/O and MMIO do not return: the engine calls the
//! machine's [`Bus`] on the vCPU's thread. Interrupts come from the vCPU's [`LocalApic`]; whoever makes one pending calls the
//! vCPU's [`Kick`].

use std::sync::Arc;

use memory::GuestRam;

use crate::cpuid::CpuidModel;
use crate::{Chips, CpuState};

/// Everything a vCPU reaches that is not RAM. Called from vCPU threads, several at once.
pub trait Bus: Send + Sync {
    /// IN: fills `data` (1, 2 or 4 bytes, little-endian). Ports nobody owns read as all ones.
    fn pio_read(&self, port: u16, data: &mut [u8]);
    /// OUT: 1, 2 or 4 bytes.
    fn pio_write(&self, port: u16, data: &[u8]);
    /// A read of guest-physical addresses that are not RAM: 1 to 8 bytes, within one 8-byte aligned unit. Nobody's
    /// addresses read as all ones.
    fn mmio_read(&self, gpa: u64, data: &mut [u8]);
    /// A write to guest-physical addresses that are not RAM: as for reads.
    fn mmio_write(&self, gpa: u64, data: &[u8]);
}

/// An access to an MSR that does not exist or a value it does not take: `#GP(0)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrError;

/// What a local APIC wants of its vCPU now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InterruptStatus {
    /// An NMI is pending.
    pub nmi: bool,
    /// A maskable interrupt is pending that the task priority lets through.
    pub interrupt: bool,
    /// An INIT, or a SIPI with this start page number, waits.
    pub init: bool,
    /// A start-up IPI waits: the start page number.
    pub sipi: Option<u8>,
}

/// The local APIC of one vCPU, as its engine sees it (user-space interrupt chips).
pub trait LocalApic: Send + Sync {
    /// RDMSR of IA32_APIC_BASE (0x1b), the x2APIC range (0x800 to 0x8ff) or IA32_TSC_DEADLINE (0x6e0).
    fn read_msr(&self, msr: u32) -> Result<u64, MsrError>;
    /// WRMSR of the same.
    fn write_msr(&self, msr: u32, value: u64) -> Result<(), MsrError>;
    /// CR8: bits 7..=4 of the task priority, 0 to 15.
    fn cr8(&self) -> u8;
    /// Sets CR8.
    fn set_cr8(&self, value: u8);
    /// What is pending. Must be cheap: engines ask often.
    fn status(&self) -> InterruptStatus;
    /// Takes the highest-priority maskable interrupt (moving it to in-service; from the PIC: the INTA cycle) and returns its vector;
    /// `None` if it has gone meanwhile. Only called when the vCPU can take it.
    fn acknowledge(&self) -> Option<u8>;
    /// Takes the pending NMI.
    fn acknowledge_nmi(&self);
    /// Takes the pending INIT or SIPI.
    fn acknowledge_init(&self);
    /// EOI by paravirtual means, or by MSR write: here for hypercalls.
    fn eoi(&self);
    /// Sends an interprocessor interrupt to the vCPU with this APIC id, by the hypercall for that: `vector`, or an NMI. `false`: there is
    /// no such vCPU.
    fn send_ipi(&self, apic_id: u32, vector: u8, nmi: bool) -> bool {
        let _ = (apic_id, vector, nmi);
        false
    }
}

/// Makes a vCPU look at its local APIC and its requests soon: wakes it when halted, stops it at the next block when it runs.
/// May be called from any thread; never blocks.
pub trait Kick: Send + Sync {
    /// Kicks.
    fn kick(&self);
}

/// Why [`Vcpu::run`] returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The VMM asked for it by [`Vcpu::stop_handle`]. The vCPU is at an instruction boundary and can go on.
    Stopped,
    /// Triple fault: the guest crashed.
    TripleFault,
    /// HLT with interrupts off and nothing that could wake it. Engine `bt` says so only when no vCPU can be woken, on all of them.
    Stuck,
    /// A debugger's breakpoint or single step.
    Debug,
    /// The engine cannot go on; a bug or an instruction it does not know.
    Internal(String),
}

/// What an engine is given for one vCPU.
#[derive(Clone)]
pub struct VcpuSetup {
    /// Number of the vCPU, from 0; its APIC id.
    pub index: u32,
    /// Its local APIC.
    pub lapic: Arc<dyn LocalApic>,
    /// The devices.
    pub bus: Arc<dyn Bus>,
}

/// One virtual CPU.
pub trait Vcpu: Send {
    /// To be called once, on the thread that will run the vCPU, while the process may still start others. Returns the numbers of the
    /// processes that it has started.
    fn attach_thread(&mut self) -> Vec<u32> {
        Vec::new()
    }
    /// Runs until there is something for the VMM to decide. Blocks in here while the guest is halted.
    fn run(&mut self) -> Exit;
    /// The state, at an instruction boundary.
    fn state(&mut self) -> CpuState;
    /// What readers of [`Vcpu::state`] should know about it after the last exit, if anything.
    fn remark(&self) -> Option<&'static str> {
        None
    }
    /// Replaces the state.
    fn set_state(&mut self, state: &CpuState);
    /// To kick this vCPU from any thread.
    fn kick_handle(&self) -> Arc<dyn Kick>;
    /// Makes [`Vcpu::run`] return [`Exit::Stopped`] soon, from any thread; also when not yet running.
    fn stop_handle(&self) -> Arc<dyn Kick>;
    /// Runs exactly one instruction (with any interrupt or exception it takes), for the debugger.
    fn step(&mut self) -> Exit;
    /// Breakpoints at linear addresses, for the debugger: `run` returns [`Exit::Debug`] before the instruction there.
    fn set_breakpoints(&mut self, addresses: &[u64]);
    /// Reads guest-virtual memory with supervisor rights, without side effects; `false` where unmapped.
    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool;
    /// Writes guest-virtual memory with supervisor rights, for the debugger; `false` where unmapped.
    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool;
    /// Counters as `(kind, value)`, for `--stats`.
    fn counters(&self) -> Vec<(String, u64)>;
}

/// Makes vCPUs over one VM's RAM.
pub trait Engine: Send + Sync {
    /// Short name: `bt`, `kvm`, `interp`.
    fn name(&self) -> &'static str;
    /// Makes a vCPU in the reset state.
    ///
    /// # Errors
    /// One clear line why not.
    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String>;
    /// The RAM this engine runs on.
    fn ram(&self) -> &GuestRam;
    /// The CPUID model that guests see.
    fn model(&self) -> &CpuidModel;
    /// The interrupt chips and timers that this engine has in itself, if it does: the machine then leaves its own unused, and vCPUs
    /// never ask [`VcpuSetup::lapic`].
    fn chips(&self) -> Option<Arc<dyn Chips>> {
        None
    }
    /// kvmclock's system time now, in nanoseconds.
    fn clock(&self) -> u64;
    /// Makes kvmclock's system time go on from `nanoseconds`. Before the states of the vCPUs are set, and while none runs.
    fn set_clock(&self, nanoseconds: u64);
}
