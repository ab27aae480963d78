//! A driver's side of a virtqueue, and an interrupt that counts: for the tests of this crate and for fuzzing. Panics where a test's own
//! use of it is wrong.

use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use memory::GuestRam;

use crate::device::Interrupt;
use crate::queue::{QueueState, Virtqueue};

/// Descriptor flags.
pub const NEXT: u16 = 1;
/// The device writes the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Records what a device tells its driver.
#[derive(Debug, Default)]
pub struct Recorder {
    queues: AtomicU32,
    configs: AtomicU32,
    broken: Mutex<Vec<String>>,
    change: Condvar,
    lock: Mutex<()>,
}

impl Recorder {
    /// A new one.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Interrupts for used buffers so far.
    pub fn interrupts(&self) -> u32 {
        self.queues.load(Ordering::SeqCst)
    }

    /// Configuration interrupts so far.
    pub fn configs(&self) -> u32 {
        self.configs.load(Ordering::SeqCst)
    }

    /// Why the device gave up, if it did.
    pub fn broken(&self) -> Vec<String> {
        self.broken.lock().unwrap().clone()
    }

    /// Waits, for 10 seconds at most and not once the device is broken, until `what` holds.
    pub fn wait(&self, mut what: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while !what() {
            if Instant::now() > end || !self.broken().is_empty() {
                return what();
            }
            let guard = self.lock.lock().unwrap();
            drop(self.change.wait_timeout(guard, Duration::from_millis(1)).unwrap());
        }
        true
    }
}

impl Interrupt for Recorder {
    fn queue(&self, _index: u16) {
        self.queues.fetch_add(1, Ordering::SeqCst);
        self.change.notify_all();
    }
    fn config(&self) {
        self.configs.fetch_add(1, Ordering::SeqCst);
        self.change.notify_all();
    }
    fn broken(&self, why: &dyn fmt::Display) {
        self.broken.lock().unwrap().push(why.to_string());
        self.change.notify_all();
    }
}

/// A buffer of a request: guest-physical address, bytes, does the device write it?
pub type Buffer = (u64, u32, bool);

/// The driver's end of one queue, its rings at a place in RAM.
#[derive(Clone, Debug)]
pub struct DriverQueue {
    ram: GuestRam,
    base: u64,
    size: u16,
    next_descriptor: u16,
    avail: u16,
    seen: u16,
}

impl DriverQueue {
    /// Rings for `size` descriptors from `base` on (a multiple of 16): at most `26 * size + 32` bytes.
    pub fn new(ram: &GuestRam, base: u64, size: u16) -> Self {
        let queue = Self { ram: ram.clone(), base, size, next_descriptor: 0, avail: 0, seen: 0 };
        assert!(ram.write(base, &vec![0; 26 * usize::from(size) + 32]));
        queue
    }

    /// What the driver tells the transport.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.size,
            descriptors: self.base,
            driver: self.avail_ring(),
            device: self.used_ring(),
            ..QueueState::default()
        }
    }

    fn avail_ring(&self) -> u64 {
        self.base + 16 * u64::from(self.size)
    }

    fn used_ring(&self) -> u64 {
        (self.avail_ring() + 6 + 2 * u64::from(self.size)).next_multiple_of(4)
    }

    /// The device's end.
    pub fn device_end(&self, event_idx: bool, interrupt: Arc<dyn Interrupt>) -> Virtqueue {
        self.device_end_of(0, event_idx, interrupt)
    }

    /// As [`Self::device_end`], of the queue with this number.
    pub fn device_end_of(&self, index: u16, event_idx: bool, interrupt: Arc<dyn Interrupt>) -> Virtqueue {
        Virtqueue::new(index, &self.state(), self.size, event_idx, self.ram.shared(), interrupt).unwrap()
    }

    /// Writes descriptor `index` of the table at `table`.
    pub fn descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let value = u128::from(address) | u128::from(len) << 64 | u128::from(flags) << 96 | u128::from(next) << 112;
        assert!(self.ram.write(table + 16 * u64::from(index), &value.to_le_bytes()));
    }

    /// The table's address.
    pub fn table(&self) -> u64 {
        self.base
    }

    /// Makes a chain of `buffers` available; returns its head. Descriptors are taken in turn: keep fewer than the size in flight.
    pub fn add(&mut self, buffers: &[Buffer]) -> u16 {
        let head = self.next_descriptor;
        for (number, (address, len, write)) in buffers.iter().enumerate() {
            let next = (self.next_descriptor + 1) % self.size;
            let last = number + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(self.base, self.next_descriptor, *address, *len, flags, next);
            self.next_descriptor = next;
        }
        self.offer(head);
        head
    }

    /// As [`Self::add`], through an indirect table at `table`.
    pub fn add_indirect(&mut self, table: u64, buffers: &[Buffer]) -> u16 {
        for (number, (address, len, write)) in buffers.iter().enumerate() {
            let last = number + 1 == buffers.len();
            let flags = if *write { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, number as u16, *address, *len, flags, number as u16 + 1);
        }
        let head = self.next_descriptor;
        self.descriptor(self.base, head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        self.next_descriptor = (head + 1) % self.size;
        self.offer(head);
        head
    }

    /// Puts `head` in the available ring.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        assert!(self.ram.write(slot, &head.to_le_bytes()));
        self.avail = self.avail.wrapping_add(1);
        self.set_avail_idx(self.avail);
    }

    /// Writes the available ring's index.
    pub fn set_avail_idx(&self, idx: u16) {
        assert!(self.ram.write(self.avail_ring() + 2, &idx.to_le_bytes()));
    }

    /// Writes the available ring's flags.
    pub fn set_avail_flags(&self, flags: u16) {
        assert!(self.ram.write(self.avail_ring(), &flags.to_le_bytes()));
    }

    /// Writes `used_event`: interrupt when the used index passes it.
    pub fn set_used_event(&self, event: u16) {
        assert!(self.ram.write(self.avail_ring() + 4 + 2 * u64::from(self.size), &event.to_le_bytes()));
    }

    fn read_u16(&self, address: u64) -> u16 {
        let mut data = [0; 2];
        assert!(self.ram.read(address, &mut data));
        u16::from_le_bytes(data)
    }

    /// The used ring's flags.
    pub fn used_flags(&self) -> u16 {
        self.read_u16(self.used_ring())
    }

    /// The device's `avail_event`.
    pub fn avail_event(&self) -> u16 {
        self.read_u16(self.used_ring() + 4 + 8 * u64::from(self.size))
    }

    /// The used ring's index.
    pub fn used_idx(&self) -> u16 {
        self.read_u16(self.used_ring() + 2)
    }

    /// Takes the next used element: head and bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.used_idx() == self.seen {
            return None;
        }
        let mut data = [0; 8];
        assert!(self.ram.read(self.used_ring() + 4 + 8 * u64::from(self.seen % self.size), &mut data));
        self.seen = self.seen.wrapping_add(1);
        let value = u64::from_le_bytes(data);
        Some((value as u16, (value >> 32) as u32))
    }
}
