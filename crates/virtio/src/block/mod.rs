//! virtio-blk (virtio 1.3, 5.2): a disk.
//!
//! * [`Disk`]: the host's file, locked; made before the process confines itself.
//! * [`request`]: one request, from header to status.
//! * [`Block`]: the device: configuration space, and a thread for each queue.
//!
//! Data goes between file and guest memory with one `preadv` or `pwritev` a request. The cache is write-back when the
//! driver knows flushes (VIRTIO_BLK_F_FLUSH) and leaves it so: a completed flush is a completed `fdatasync`, and a request
//! is in the used ring only when all that it asks for is done. For a driver without flushes every write is made durable at once.

mod disk;
pub mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};

pub use disk::{Disk, DiskError, SECTOR};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::{Doorbell, Job, StopFlag, Worker};
use request::Policy;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Most data buffers of one request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Largest data buffer, in bytes.
const SIZE_MAX: u32 = 4 << 20;
/// Offset of the `writeback` byte in the configuration space.
const WRITEBACK: u64 = 32;

/// Saved state of [`Block`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlockState {
    /// Size in sectors of 512 bytes; the disk must still have it.
    pub sectors: u64,
    /// Is it read-only?
    pub read_only: bool,
    /// What the driver wrote to the `writeback` field.
    pub write_back: bool,
}

/// What the queues of one device share.
#[derive(Debug)]
struct Shared {
    disk: Disk,
    serial: Vec<u8>,
    write_back: AtomicBool,
}

/// The work on one queue.
struct BlockJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
    /// The driver knows flushes.
    flush: bool,
}

impl Job for BlockJob {
    fn run(&mut self, stop: &StopFlag) {
        let (shared, flush) = (&self.shared, self.flush);
        self.queue.serve(stop, |chain| {
            let write_back = flush.then_some(&shared.write_back);
            request::serve(&shared.disk, Policy { serial: &shared.serial, write_back }, chain)
        });
    }

    fn failed(&mut self) {
        self.queue.fail(&"the disk's thread failed");
    }
}

/// A virtio disk.
pub struct Block {
    shared: Arc<Shared>,
    workers: Vec<Worker<BlockJob>>,
    active: Option<(u64, Arc<dyn Interrupt>)>,
}

impl Block {
    /// A device for `disk` with `queues` queues (1 to 64), each with a thread, and the serial number `serial` (cut to 20 bytes)
    /// that the guest sees under /dev/disk/by-id.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(disk: Disk, serial: &str, queues: u16) -> std::io::Result<Self> {
        let serial = serial.bytes().take(VIRTIO_BLK_ID_BYTES as usize).collect();
        let workers = (0..queues.clamp(1, 64)).map(|n| Worker::new(&format!("blk-{n}"))).collect::<Result<_, _>>()?;
        let shared = Shared { disk, serial, write_back: AtomicBool::new(true) };
        Ok(Self { shared: Arc::new(shared), workers, active: None })
    }

    /// `struct virtio_blk_config` (5.2.4), up to the write-zeroes fields.
    fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            if let Some(field) = config.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
            at += bytes.len();
        };
        let (zero_sectors, zero_segments) = (request::MAX_ZERO_SECTORS, request::MAX_ZERO_SEGMENTS);
        put(&self.shared.disk.sectors().to_le_bytes());
        put(&SIZE_MAX.to_le_bytes());
        put(&SEG_MAX.to_le_bytes());
        put(&[0; 4]); // geometry
        put(&(SECTOR as u32).to_le_bytes()); // blk_size
        // Topology: physical blocks of 2^3 logical ones, aligned, 8 blocks as the least I/O for performance, no optimum.
        put(&[3, 0, 8, 0, 0, 0, 0, 0]);
        put(&[self.shared.write_back.load(Ordering::SeqCst).into(), 0]); // writeback
        put(&(self.workers.len() as u16).to_le_bytes());
        put(&zero_sectors.to_le_bytes()); // discard
        put(&zero_segments.to_le_bytes());
        put(&8u32.to_le_bytes()); // discard_sector_alignment
        put(&zero_sectors.to_le_bytes()); // write zeroes
        put(&zero_segments.to_le_bytes());
        put(&[1, 0, 0, 0]); // write_zeroes_may_unmap
        config
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        2
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        if self.shared.disk.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.workers.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if !self.shared.disk.read_only()
            && let (WRITEBACK, [value]) = (offset, data)
        {
            self.shared.write_back.store(*value != 0, Ordering::SeqCst);
            if *value == 0 {
                // From now on completed writes are durable; the earlier ones must become so. A failure is remembered by the
                // disk and fails the writes to come.
                let _ = self.shared.disk.flush();
            }
        }
    }

    fn activate(&mut self, features: u64, interrupt: Arc<dyn Interrupt>) {
        self.active = Some((features, interrupt));
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let flush = self.active.as_ref().is_some_and(|(features, _)| features & 1 << VIRTIO_BLK_F_FLUSH != 0);
        match self.workers.get(usize::from(queue.index())) {
            Some(worker) => {
                worker.start(BlockJob { queue, shared: self.shared.clone(), flush });
                worker.doorbell()
            }
            None => crate::runner::silent(),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        self.workers.get(usize::from(index))?.stop().map(|job| job.queue)
    }

    fn reset(&mut self) {
        self.active = None;
        self.shared.write_back.store(true, Ordering::SeqCst);
    }

    fn save(&self) -> DeviceState {
        let disk = &self.shared.disk;
        let write_back = self.shared.write_back.load(Ordering::SeqCst);
        DeviceState::Block(BlockState { sectors: disk.sectors(), read_only: disk.read_only(), write_back })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Block(state) = state else { return Err("it is not of a disk".into()) };
        let (path, sectors) = (self.shared.disk.path().display(), self.shared.disk.sectors());
        if state.sectors != sectors {
            return Err(format!("the disk had {} sectors, {path} has {sectors}", state.sectors));
        }
        if state.read_only != self.shared.disk.read_only() {
            let was = if state.read_only { "read-only" } else { "writable" };
            return Err(format!("the disk was {was}; attach {path} so again"));
        }
        self.shared.write_back.store(state.write_back, Ordering::SeqCst);
        Ok(())
    }
}

impl Drop for Block {
    /// What the guest wrote and did not flush survives the monitor in the host's cache; workers end before the disk is unlocked.
    fn drop(&mut self) {
        self.workers.clear();
    }
}
