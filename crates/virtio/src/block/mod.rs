//! virtio-blk (virtio 1.3, 5.2): a disk.
//!
//! * [`Disk`]: the host's side, open and locked; made before the process confines itself.
//! * [`request`]: one request, from header to status.
//! * [`Block`]: the device: configuration space, and whoever serves its queues: a `pool` of threads, or `uring`.
//!
//! The cache is write-back when the driver knows flushes (VIRTIO_BLK_F_FLUSH) and leaves it so: a completed flush is a completed `fdatasync`, and a request
//! is in the used ring only when all that it asks for is done. For a driver without flushes every write is made durable at once.

mod pool;
pub mod request;
#[cfg(test)]
mod tests;
mod uring;

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
    VIRTIO_BLK_ID_BYTES,
};

use disk::{Cache, Format, Io};
pub use disk::{Disk, DiskConfig, DiskError, SECTOR};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use pool::Pool;
use request::Policy;
use uring::Uring;

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Most data buffers of one request: the queue less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Largest data buffer, in bytes.
const SIZE_MAX: u32 = 4 << 20;
/// Threads that help those of the queues, where a disk is not served by io_uring.
const HELPERS: u16 = 3;
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
struct Shared {
    disk: Disk,
    serial: Vec<u8>,
    write_back: AtomicBool,
    /// Sectors that the driver is told of: at most what the disk has.
    sectors: AtomicU64,
    /// Counts changes of the configuration space.
    generation: AtomicU32,
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Shared {
    /// How to serve a driver that knows flushes or does not.
    fn policy(&self, flush: bool) -> Policy<'_> {
        Policy { serial: &self.serial, write_back: flush.then_some(&self.write_back) }
    }
}

/// Who serves the queues.
enum Server {
    Threads(Pool),
    /// One for each queue.
    Uring(Vec<Uring>),
}

/// Sees to it that the driver hears of a disk that became larger.
#[derive(Clone)]
pub struct SizeWatch(Arc<Shared>);

impl std::fmt::Debug for SizeWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("SizeWatch").field(&self.0.disk).finish()
    }
}

impl SizeWatch {
    /// Looks at the disk's file. Returns the new size in sectors of 512 bytes if it has grown.
    pub fn look(&self) -> Option<u64> {
        let sectors = self.0.disk.look_again()?;
        self.tell(sectors);
        Some(sectors)
    }

    /// Makes the disk `bytes` bytes long, while it is in use. Returns its sectors of 512 bytes.
    ///
    /// # Errors
    /// [`DiskError`] in one line: it would become shorter, cannot be changed, or the host has no room.
    pub fn grow(&self, bytes: u64) -> Result<u64, DiskError> {
        let sectors = self.0.disk.grow(bytes)?;
        self.tell(sectors);
        Ok(sectors)
    }

    /// Device and inode number of the disk's file on the host.
    pub fn identity(&self) -> (u64, u64) {
        self.0.disk.identity()
    }

    fn tell(&self, sectors: u64) {
        self.0.sectors.store(sectors, Ordering::SeqCst);
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        if let Some(interrupt) = &*self.0.interrupt.lock().unwrap_or_else(PoisonError::into_inner) {
            interrupt.config();
        }
    }

    /// The disk's file.
    pub fn path(&self) -> &std::path::Path {
        self.0.disk.path()
    }
}

/// A virtio disk.
pub struct Block {
    shared: Arc<Shared>,
    server: Server,
    queues: u16,
    flush: bool,
}

impl Block {
    /// A device for `disk` with `queues` queues (1 to 64), and the serial number `serial` (cut to 20 bytes, and only if the disk has
    /// none of its own) that the guest sees under /dev/disk/by-id.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(disk: Disk, serial: &str, queues: u16) -> std::io::Result<Self> {
        let queues = queues.clamp(1, 64);
        let serial = disk.config().serial.clone().unwrap_or_else(|| serial.into());
        let serial = serial.bytes().take(VIRTIO_BLK_ID_BYTES as usize).collect();
        let wanted = disk.config().io;
        let shared = Arc::new(Shared {
            sectors: AtomicU64::new(disk.sectors()),
            disk,
            serial,
            write_back: AtomicBool::new(true),
            generation: AtomicU32::new(0),
            interrupt: Mutex::default(),
        });
        // Threads unless somebody says otherwise: as quick where it was measured, and simpler (docs/disks.md).
        let rings = if wanted == Io::Uring {
            (0..queues).map(|number| Uring::new(shared.clone(), number)).collect::<Result<Vec<_>, _>>().ok()
        } else {
            None
        };
        let server = match rings {
            Some(rings) => Server::Uring(rings),
            None => Server::Threads(Pool::new(shared.clone(), queues, HELPERS)?),
        };
        Ok(Self { shared, server, queues, flush: false })
    }

    /// Does the kernel's io_uring carry out the requests?
    pub fn uses_uring(&self) -> bool {
        matches!(self.server, Server::Uring(_))
    }

    /// Was io_uring asked for, and threads stand in?
    pub fn lacks_uring(&self) -> bool {
        self.shared.disk.config().io == Io::Uring && !self.uses_uring()
    }

    /// May others make this disk longer by making its file longer? [`SizeWatch::look`] finds that.
    pub fn grows_by_itself(&self) -> bool {
        self.shared.disk.plain_file().is_some()
    }

    /// What gives this disk another size.
    pub fn size_watch(&self) -> SizeWatch {
        SizeWatch(self.shared.clone())
    }

    /// Is every write made durable before it is answered, whatever the driver knows?
    fn write_through(&self) -> bool {
        self.shared.disk.config().cache == Cache::WriteThrough
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
        put(&self.shared.sectors.load(Ordering::SeqCst).to_le_bytes());
        put(&SIZE_MAX.to_le_bytes());
        put(&SEG_MAX.to_le_bytes());
        put(&[0; 4]); // geometry
        put(&(SECTOR as u32).to_le_bytes()); // blk_size
        // Topology: physical blocks of 2^3 logical ones, aligned, 8 blocks as the least I/O for performance, no optimum.
        put(&[3, 0, 8, 0, 0, 0, 0, 0]);
        put(&[self.shared.write_back.load(Ordering::SeqCst).into(), 0]); // writeback
        put(&self.queues.to_le_bytes());
        put(&zero_sectors.to_le_bytes()); // discard
        put(&zero_segments.to_le_bytes());
        // What is given back to the host at once: a cluster, or a block of its file system.
        let alignment: u32 = if self.shared.disk.format() == Format::Qcow2 { 128 } else { 8 };
        put(&alignment.to_le_bytes()); // discard_sector_alignment
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
            VIRTIO_BLK_F_MQ,
        ];
        if !self.write_through() {
            bits.push(VIRTIO_BLK_F_FLUSH);
        }
        if self.shared.disk.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            if self.shared.disk.config().discard {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
            if !self.write_through() {
                bits.push(VIRTIO_BLK_F_CONFIG_WCE);
            }
        }
        bits.iter().fold(0, |features, bit| features | 1 << bit)
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; self.queues.into()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if !self.shared.disk.read_only()
            && !self.write_through()
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

    fn config_generation(&self) -> u32 {
        self.shared.generation.load(Ordering::SeqCst)
    }

    fn activate(&mut self, features: u64, interrupt: Arc<dyn Interrupt>) {
        self.flush = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        *self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        match &self.server {
            Server::Threads(pool) => pool.start(queue, self.flush),
            Server::Uring(rings) => match rings.get(usize::from(queue.index())) {
                Some(ring) => ring.start(queue, self.flush),
                None => crate::runner::silent(),
            },
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        match &self.server {
            Server::Threads(pool) => pool.stop(index),
            Server::Uring(rings) => rings.get(usize::from(index))?.stop(),
        }
    }

    fn reset(&mut self) {
        *self.shared.interrupt.lock().unwrap_or_else(PoisonError::into_inner) = None;
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
