//! The PC around the vCPUs: everything a guest reaches that is neither RAM nor an instruction.
//!
//! * [`Pc`]: the machine put together. Start reading at [`Pc::new`].
//! * [`boot`]: loads a kernel; [`acpi`]: the tables it reads; [`layout`]: the address map.
//! * [`bus`]: port I/O and MMIO dispatch to devices, with counters; implements [`cpu::Bus`].
//! * [`clock`]: the machine's time and its timer thread.
//! * [`irq`]: interrupt lines and message-signalled interrupts.
//! * [`lapic`]: local APICs, which are also what an engine asks for interrupts; [`ioapic`], [`pic`].
//! * `chips`: the wires into interrupt chips that the engine has in itself; the machine's own are then idle.
//! * [`pit`], [`rtc`], [`serial`], [`power`]: the rest of an old PC. [`watchdog`]: notices that the guest hangs.
//! * [`pci`]: host bridge, configuration space, BARs, MSI-X, and the trait [`pci::PciDevice`] that virtio builds on.
//!
//! Devices know guest memory, an interrupt line and their backend, nothing else. Each has a saved state that is a plain type of
//! its own (`FooState`), apart from the live type, and restored through a check: saved state is untrusted input.
//!
//! Locking: a chip holds its own mutex while it signals "upwards", always in the order device, PCI configuration, IOAPIC or PIC,
//! local APIC, timer queue. Nothing signals the other way with a lock held, and no lock of the bus is held during a device access.

#![deny(unsafe_code)]

pub mod acpi;
pub mod boot;
pub mod bus;
mod chips;
pub mod clock;
pub mod ioapic;
pub mod irq;
pub mod lapic;
pub mod layout;
mod pc;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
pub mod rtc;
pub mod serial;
pub mod state;
pub mod watchdog;

pub use pc::{MAX_VCPUS, Pc, PcConfig, PcError, PcState};
