//! Virtio devices (virtio 1.3) for a hostile guest: disk, network, entropy, console, balloon, shared directory, sockets, over virtio-pci.
//!
//! * [`device`]: the trait [`VirtioDevice`] between a device and its transport. Start reading here.
//! * [`queue`] and [`buffers`]: virtqueues, descriptor chains and the guest memory they point to.
//! * [`runner`]: the threads that serve queues.
//! * [`pci`]: the transport: [`VirtioPci`] is a [`machine::pci::PciDevice`].
//! * [`block`], [`net`], [`entropy`], [`console`], [`balloon`], [`fs`], [`vsock`]: the devices, one folder each.
//!
//! Modern (non-transitional) devices with split rings only. A driver that breaks the rules of a ring gets DEVICE_NEEDS_RESET; nothing it
//! does panics, writes outside the buffers it offered, or blocks another VM. Devices know guest memory, their interrupt and their backend,
//! nothing else.

#![deny(missing_docs)]

pub mod balloon;
pub mod block;
pub mod buffers;
pub mod console;
pub mod device;
pub mod entropy;
mod event;
pub mod fs;
pub mod net;
pub mod pci;
pub mod queue;
pub mod runner;
#[cfg(any(test, feature = "test-utils"))]
pub mod testing;
pub mod vsock;

pub use balloon::{Balloon, BalloonHandle};
pub use block::{Block, Disk, DiskConfig, DiskError, SizeWatch};
pub use console::{Console, ConsoleHandle, NamedPortHandle, Ports};
pub use device::{Interrupt, Reporter, VirtioDevice};
pub use entropy::Entropy;
pub use fs::Fs;
pub use net::{Net, Offloads, Port};
pub use pci::VirtioPci;
pub use vsock::Vsock;
