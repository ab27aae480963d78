//! virtio-net (virtio 1.3, 5.1): one network interface with one pair of queues.
//!
//! * [`Port`]: the host's end, a file descriptor over which whole packets go: a TAP device or a network server's socket.
//! * `worker`: the thread that carries packets between queues and port.
//! * [`Net`]: the device: features and configuration space.
//!
//! A packet on the port starts with the same `struct virtio_net_hdr` of [`HEADER`] bytes as in the queues, so that checksums and
//! segmentation are left to whoever is better at it: the guest sends segments of up to 64 KiB and gets such. What the guest sends goes
//! from its memory to the port by one system call, unread by this process; whoever is at the port's other end checks it. Nothing is
//! dropped for lack of room in either direction: the guest's queue waits, and so does the port.

mod port;
#[cfg(test)]
mod tests;
mod worker;

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use port::{Offloads, Port};

use crate::device::{DeviceState, Interrupt, Reporter, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use worker::Worker;

/// Bytes of `struct virtio_net_hdr` (5.1.6), which starts every packet in a queue and on a [`Port`].
pub const HEADER: usize = 12;
/// The longest packet, header included: 64 KiB of IP behind an Ethernet header with a VLAN tag.
pub const MAX_PACKET: usize = HEADER + 18 + 65536;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Saved state of [`Net`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetState {
    /// The interface's address.
    pub mac: [u8; 6],
    /// Largest packet without its Ethernet header that was offered, in bytes.
    pub mtu: u16,
    /// What the port could do.
    pub offloads: Offloads,
}

/// A virtio network interface.
pub struct Net {
    worker: Worker,
    mac: [u8; 6],
    mtu: u16,
}

impl Net {
    /// An interface with the address `mac` and packets of up to `mtu` bytes (68 to 65535; without the Ethernet header) on `port`.
    /// `reporter` is told when the port's other end is gone.
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(port: Port, mac: [u8; 6], mtu: u16, reporter: Option<Reporter>) -> std::io::Result<Self> {
        Ok(Self { worker: Worker::new(port, reporter)?, mac, mtu })
    }

    /// `struct virtio_net_config` (5.1.4), up to `mtu`.
    fn config(&self) -> [u8; 12] {
        let mut config = [0; 12];
        let status = if self.worker.link_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        let fields = [status, 1, self.mtu]; // 1: pairs of queues
        let bytes = self.mac.into_iter().chain(fields.into_iter().flat_map(u16::to_le_bytes));
        for (to, from) in config.iter_mut().zip(bytes) {
            *to = from;
        }
        config
    }

    fn state(&self) -> NetState {
        NetState { mac: self.mac, mtu: self.mtu, offloads: self.worker.port().offloads() }
    }
}

/// Of the features `bits`, what the driver takes.
fn driver_offloads(bits: u64) -> Offloads {
    let has = |bit: u32| bits & 1 << bit != 0;
    let checksum = has(VIRTIO_NET_F_GUEST_CSUM);
    Offloads {
        checksum,
        tcp4: checksum && has(VIRTIO_NET_F_GUEST_TSO4),
        tcp6: checksum && has(VIRTIO_NET_F_GUEST_TSO6),
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u16 {
        1
    }

    fn features(&self) -> u64 {
        let mut bits = vec![VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF];
        let offloads = self.worker.port().offloads();
        if offloads.checksum {
            bits.extend([VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM]);
            if offloads.tcp4 {
                bits.extend([VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4]);
            }
            if offloads.tcp6 {
                bits.extend([VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6]);
            }
        }
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.worker.link_up().into()
    }

    fn activate(&mut self, features: u64, interrupt: Arc<dyn Interrupt>) {
        self.worker.activate(driver_offloads(features), features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0, interrupt);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.worker.start(queue)
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        self.worker.stop(index)
    }

    fn reset(&mut self) {
        self.worker.reset();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net(self.state())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Net(state) = state else { return Err("it is not of a network interface".into()) };
        let here = self.state();
        if (state.mtu, state.offloads) != (here.mtu, here.offloads) {
            return Err("the network interface was of another kind: give the same --net".into());
        }
        self.mac = state.mac;
        Ok(())
    }
}
