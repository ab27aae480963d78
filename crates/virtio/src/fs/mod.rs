//! virtio-fs (virtio 1.3, 5.11): a directory of the host, served by a process of its own (the crate `share`).
//!
//! * [`Fs`]: the device: its tag, a queue for what must not wait, and one for requests.
//! * `carrier`: carries requests from the queues to the server and answers back.
//!
//! The device knows nothing of FUSE but the headers' lengths and the request's number: it copies.

mod carrier;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use share::channel::Client;

use crate::device::{DeviceState, Interrupt, Reporter, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use carrier::Carrier;

/// Bytes of a tag at most (5.11.4).
pub const MAX_TAG: usize = 36;
/// Descriptors of each queue: one request with a megabyte of pages needs more than 256.
const QUEUE_SIZE: u16 = 1024;
/// The queue for what must not wait behind others, and the one for the others.
const QUEUES: usize = 2;

/// Saved state of [`Fs`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The tag.
    pub tag: String,
    /// Had the guest a driver for it? What the server knew then is not saved.
    pub in_use: bool,
}

/// A shared directory.
pub struct Fs {
    carrier: Carrier,
    tag: String,
    in_use: bool,
}

impl Fs {
    /// A directory with this tag, of at most [`MAX_TAG`] bytes, whose server is at the other end of `channel` and of `socket`. `name`: what
    /// the user calls it; `reporter` is told when the server ends or the directory is gone.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(
        tag: &str,
        name: &str,
        channel: Client,
        socket: OwnedFd,
        reporter: Option<Reporter>,
    ) -> io::Result<Self> {
        let carrier = Carrier::new(name, channel, socket, reporter)?;
        Ok(Self { carrier, tag: tag.to_owned(), in_use: false })
    }

    /// `struct virtio_fs_config` (5.11.4).
    fn config(&self) -> [u8; MAX_TAG + 4] {
        let mut config = [0; MAX_TAG + 4];
        for (to, from) in config.iter_mut().zip(self.tag.bytes().take(MAX_TAG)) {
            *to = from;
        }
        if let Some(queues) = config.get_mut(MAX_TAG..) {
            queues.copy_from_slice(&1u32.to_le_bytes());
        }
        config
    }
}

impl VirtioDevice for Fs {
    fn device_type(&self) -> u16 {
        26
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; QUEUES]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn activate(&mut self, _features: u64, _interrupt: Arc<dyn Interrupt>) {
        self.in_use = true;
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.carrier.start(queue)
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        self.carrier.stop(index)
    }

    fn reset(&mut self) {
        self.in_use = false;
    }

    fn save(&self) -> DeviceState {
        DeviceState::Fs(FsState { tag: self.tag.clone(), in_use: self.in_use })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Fs(state) = state else { return Err("it is not of a shared directory".into()) };
        if state.tag != self.tag {
            return Err("the shared directory had another tag: give the same --share".into());
        }
        if state.in_use {
            return Err("the guest used a shared directory, and what it had open there is not saved".into());
        }
        Ok(())
    }
}
