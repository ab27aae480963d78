//! What a device is to its transport, and what a transport is to its device.
//!
//! ```text
//!            features, config space, start/stop queues
//!   transport ────────────────────────────────────────▶ VirtioDevice
//!      ▲  │                                                │ makes
//!      │  └── Doorbell::ring (vCPU thread, never blocks) ─▶ job of one queue (own thread, or inline)
//!      └───── Interrupt::{queue, config, broken} ◀───────────┘
//! ```
//!
//! A queue is handed to the device when the driver enables it, and taken back on reset, on a reset of that queue alone, and to
//! save state. So a device has no pausing code: the transport stops the queues, reads their positions and starts them again.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::balloon::BalloonState;
use crate::block::BlockState;
use crate::console::{ConsoleState, PortsState};
use crate::entropy::EntropyState;
use crate::fs::FsState;
use crate::net::NetState;
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use crate::vsock::VsockState;

pub use disk::Reporter;

/// How a device reaches its driver. Called from any thread; never blocks.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` were used.
    fn queue(&self, index: u16);
    /// The configuration space has changed.
    fn config(&self);
    /// The device cannot go on until it is reset: sets DEVICE_NEEDS_RESET (virtio 1.3, 2.1.2) and tells the driver.
    fn broken(&self, why: &dyn fmt::Display);
}

/// A virtio device without its transport. The transport serialises all calls.
pub trait VirtioDevice: Send {
    /// The device type (virtio 1.3, chapter 5): 1 network, 2 block, 3 console, 4 entropy, 5 balloon, 19 socket.
    fn device_type(&self) -> u16;
    /// The device's own feature bits; bits of transport and ring are the transport's.
    fn features(&self) -> u64;
    /// Largest size of each queue, in descriptors: powers of two, at most 32768. Its length is the number of queues.
    fn queue_sizes(&self) -> Vec<u16>;
    /// Reads the device configuration space at `offset` bytes; bytes beyond its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// Writes the device configuration space; what cannot be written is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }
    /// Changes whenever the configuration space changes by the device's doing, at the same moment.
    fn config_generation(&self) -> u32 {
        0
    }
    /// The driver is ready (DRIVER_OK): `features` are the negotiated bits. Queues follow by [`Self::start_queue`].
    fn activate(&mut self, features: u64, interrupt: Arc<dyn Interrupt>);
    /// Takes an enabled queue and starts to serve it. Returns what the driver's notifications of this queue ring.
    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell>;
    /// Stops serving queue `index` and gives it back. On return no request of it is being worked on: each that was taken is
    /// in the used ring.
    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue>;
    /// Back to the state before [`Self::activate`]. All queues have been stopped.
    fn reset(&mut self);
    /// The device's own state (queues and transport are saved by the transport). All queues have been stopped.
    fn save(&self) -> DeviceState;
    /// Takes over a saved state, before [`Self::activate`].
    ///
    /// # Errors
    /// A line that says why the state does not fit this device.
    fn restore(&mut self, state: &DeviceState) -> Result<(), String>;
}

/// The saved state of any device of this crate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// A disk.
    Block(BlockState),
    /// A console.
    Console(ConsoleState),
    /// A source of randomness.
    Entropy(EntropyState),
    /// A network interface.
    Net(NetState),
    /// A shared directory.
    Fs(FsState),
    /// Sockets to the host.
    Vsock(VsockState),
    /// A balloon.
    Balloon(BalloonState),
    /// Named ports.
    Ports(PortsState),
}

/// Copies the part of `config` that starts at `offset` to `data`; zeroes where there is none.
pub(crate) fn read_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    if let Some(rest) = usize::try_from(offset).ok().and_then(|offset| config.get(offset..)) {
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }
}
