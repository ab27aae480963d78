//! virtio-vsock (virtio 1.3, 5.10): stream connections between programs of the guest and programs of the host, wholly in user space.
//!
//! The host's end of every connection is a Unix stream socket:
//!
//! * A host program that wants to reach port N of the guest connects to the listening socket given to [`Vsock::new`], sends the line
//!   `CONNECT N`, and reads `OK M` (M: the port of its own end) when the guest has taken the connection. From there the bytes are the
//!   connection's. If the guest refuses, the socket is closed. This is Firecracker's form.
//! * When a program of the guest wants to reach port N of the host, a [`Dial`] is asked, which gives the host's end or refuses.
//!
//! `packet` is the wire format, `connection` one connection with its credit, `muxer` all of them, `worker` the thread and the queues.
//! Everything is bounded: [`MAX_CONNECTIONS`], 256 KiB from the guest for each, packets that wait. A guest that sends more than it may,
//! or what does not fit, gets a reset. A saved VM loses its connections; the guest is told (5.10.6.7).

mod connection;
mod muxer;
mod packet;
mod stream;
#[cfg(feature = "test-utils")]
pub mod testing;
#[cfg(test)]
mod tests;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use muxer::Muxer;
pub use stream::may_connect;
use worker::Worker;

/// Connections of one guest.
pub const MAX_CONNECTIONS: usize = 1024;
/// The guest's address, the same for each: nobody but its own monitor sees it.
pub const GUEST_CID: u64 = 3;
const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// Gives the host's end of a connection that the guest wants: to this port of the host, from this port of the guest. `None` refuses.
/// It runs on the device's thread, which waits for it.
pub type Dial = Box<dyn FnMut(u32, u32) -> Option<UnixStream> + Send>;

/// Saved state of [`Vsock`]. Its connections are not part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's address.
    pub cid: u64,
}

/// A virtio socket device.
pub struct Vsock {
    worker: Worker,
    cid: u64,
}

impl Vsock {
    /// A device whose guest has the address `cid` (3 or more, 32 bits). Host programs connect at `listener`, a listening Unix socket, if there is
    /// one; for the guest's own connections `dial` is asked.
    ///
    /// # Errors
    /// When the host gives no descriptor or thread.
    pub fn new(cid: u64, listener: Option<OwnedFd>, dial: Dial) -> io::Result<Self> {
        Ok(Self { worker: Worker::new(Muxer::new(cid, listener, dial)?)?, cid })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u16 {
        19
    }

    fn features(&self) -> u64 {
        // Streams only, as without any feature bit (5.10.3).
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, _features: u64, _interrupt: Arc<dyn Interrupt>) {}

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.worker.start(queue)
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        self.worker.stop(index)
    }

    fn reset(&mut self) {
        self.worker.with(|work| {
            work.muxer.clear();
            work.transport_reset = false;
        });
    }

    fn save(&self) -> DeviceState {
        DeviceState::Vsock(VsockState { cid: self.cid })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Vsock(state) = state else { return Err("it is not of a vsock device".into()) };
        if state.cid != self.cid {
            return Err(format!("the guest's vsock address is {}, not {}", state.cid, self.cid));
        }
        self.worker.with(|work| {
            work.muxer.clear();
            work.transport_reset = true;
        });
        Ok(())
    }
}
