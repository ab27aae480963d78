//! The PC around the vCPUs: everything a guest reaches that is neither RAM nor an instruction.
//!
//! * [`bus`]: port I/O and MMIO dispatch to devices, with counters; implements [`cpu::Bus`].
//! * [`irq`]: interrupt lines and message-signalled interrupts.
//! * [`clock`]: the machine's time and its timer thread.
//! * [`lapic`]: local APICs, which are also what an engine asks for interrupts.
//! * [`pci`]: host bridge, configuration space, BARs, MSI-X, and the trait [`pci::PciDevice`] that virtio builds on.
//!
//! Devices know guest memory, an interrupt line and their backend, nothing else. Each has a saved state that is a plain type of
//! its own (`FooState`), apart from the live type, and restored through a check: saved state is untrusted input.
//!
//! Locking: a chip holds its own mutex while it signals "upwards", always in the order device, PCI configuration, IOAPIC or PIC,
//! local APIC, timer queue. Nothing signals the other way with a lock held, and no lock of the bus is held during a device access.

#![deny(unsafe_code)]

pub mod bus;
pub mod clock;
pub mod ioapic;
pub mod irq;
pub mod lapic;
pub mod layout;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod state;
