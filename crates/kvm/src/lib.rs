//! The engine `kvm`: the guest runs on the CPU itself, by VT-x or AMD-V with two-level page tables, through the host's `/dev/kvm`.
//!
//! * [`Host`]: `/dev/kvm` opened and looked at; says in one line why it cannot be used. [`probe`]: does it run a 64-bit guest?
//! * [`KvmEngine`]: the engine over one VM's RAM, with the kernel's interrupt chips ([`chips`]).
//! * [`vcpu`]: a vCPU's thread: runs, handles exits, stops at kicks ([`kick`]). [`registers`]: its state to and fro.
//! * [`dirty`]: which pages were written.
//! * [`events`]: doorbells and interrupts by event counters, without leaving the guest and without a request to the kernel for each.
//! * [`cpuid`] and [`msr`]: what the guest may see of the CPU: the model that all engines share, cut to what this host's KVM has.
//! * [`after_start`]: the system calls on KVM that a VM makes once it runs, for the sandbox.
//!
//! No type of KVM is seen outside this crate. What is documented with the Linux kernel as `Documentation/virt/kvm/api.rst` is called
//! "the KVM API" here.

mod chips;
mod cpuid;
mod debug;
mod dirty;
mod engine;
mod events;
mod host;
mod ioctls;
mod kick;
mod msr;
mod pit;
pub mod probe;
mod refusal;
mod registers;
mod vcpu;
mod watch;

pub use dirty::{Dirty, DirtyLog};
pub use engine::{KvmEngine, Options, Parking};
pub use host::{Capabilities, Host, Unusable};
pub use ioctls::after_start;
