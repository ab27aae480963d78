//! What every engine shares: the architectural state of a vCPU, exceptions, the CPUID model, and the contract between
//! an engine and the machine around it.
//!
//! * [`CpuState`]: all architectural state of one vCPU, readable and settable under every engine in one format.
//! * [`Exception`]: an exception with its error code.
//! * [`engine`]: the traits [`Engine`], [`Vcpu`], [`Bus`], [`LocalApic`], and [`Exit`].
//! * [`Nothing`]: a bus and a local APIC without anything behind them.
//! * [`chips`]: interrupt chips that an engine brings along, and their registers in a neutral form.
//! * [`paging`]: the page-table walk.
//! * [`msr`]: numbers of model-specific registers.
//! * [`cpuid`]: what the guest's CPUID instruction answers.
//!
//! Nothing here knows how an engine works, nor any device.

#![forbid(unsafe_code)]

pub mod chips;
pub mod cpuid;
pub mod engine;
mod exception;
pub mod msr;
mod nothing;
pub mod paging;
mod state;

pub use chips::Chips;
pub use engine::{Bus, Engine, Exit, InterruptStatus, Kick, LocalApic, MsrError, Vcpu, VcpuSetup};
pub use exception::{Exception, PageFault, vector};
pub use nothing::Nothing;
pub use state::{CpuState, FpState, Segment, SegmentIndex, TableRegister, cr0, cr4, efer, gpr, rflags};
