//! Split virtqueues (virtio 1.3, 2.7) over a hostile driver.
//!
//! Ring positions and notification suppression are the `virtio-queue` crate's; the walk along a descriptor chain is ours, because
//! it must tell "the chain ends here" from "the chain is broken". Every address is checked against RAM, every chain is bounded, and
//! a ring that breaks the rules makes the queue *broken*: the driver is told to reset the device and nothing more is taken from it.

#[cfg(test)]
mod tests;

use std::fmt;
use std::num::Wrapping;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::VmMemory;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::buffers::Buffers;
use crate::device::Interrupt;
use crate::runner::StopFlag;

/// Most descriptors in one chain, whatever the queue's size: what one `preadv` takes.
pub const MAX_CHAIN: u16 = 1024;

/// How a driver broke its queue.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// Size, alignment or place of the rings.
    #[error("the rings are misplaced: {0}")]
    Layout(String),
    /// The ring positions contradict each other, or the rings cannot be accessed.
    #[error("ring: {0}")]
    Ring(virtio_queue::Error),
    /// A descriptor number beyond the table.
    #[error("descriptor {0} does not exist")]
    Index(u16),
    /// A chain of more descriptors than allowed; usually a loop.
    #[error("the chain is too long or a loop")]
    TooLong,
    /// A chain of more than 2^32 - 1 bytes.
    #[error("the chain has more than 4 GiB")]
    TooLarge,
    /// An indirect descriptor with a bad table or in a bad place.
    #[error("malformed indirect descriptor")]
    Indirect,
    /// A device-readable buffer after a device-writable one.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// A buffer or descriptor table that is not in RAM.
    #[error("{len} bytes at {address:#x} are not in RAM")]
    Address {
        /// Guest-physical address.
        address: u64,
        /// Bytes.
        len: u64,
    },
}

/// Place and position of one queue: plain data, as saved. Untrusted until [`Virtqueue::new`] took it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Size in descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub device: u64,
    /// Position in the available ring.
    pub next_avail: u16,
    /// Position in the used ring.
    pub next_used: u16,
    /// The driver broke it; it rests until it is reset.
    pub broken: bool,
}

/// One descriptor chain taken from the available ring. Must be given back by [`Virtqueue::push`].
#[derive(Debug)]
pub struct Chain<'m> {
    /// Number of its first descriptor.
    pub head: u16,
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// What the device writes for the driver.
    pub writable: Buffers<'m>,
}

/// A live queue: the device's end of one virtqueue.
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<VmMemory>,
    interrupt: Arc<dyn Interrupt>,
    index: u16,
    broken: bool,
}

impl fmt::Debug for Virtqueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtqueue").field("index", &self.index).field("state", &self.state()).finish_non_exhaustive()
    }
}

impl Virtqueue {
    /// Queue number `index` of a device, at the place and position of `state`. `max_size` bounds its size; `event_idx`:
    /// VIRTIO_F_RING_EVENT_IDX was negotiated.
    ///
    /// # Errors
    /// [`QueueError::Layout`] when the size is no power of two or too large, a ring is misaligned or not in RAM.
    pub fn new(
        index: u16,
        state: &QueueState,
        max_size: u16,
        event_idx: bool,
        memory: Arc<VmMemory>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, QueueError> {
        let layout = |e: virtio_queue::Error| QueueError::Layout(e.to_string());
        let mut queue = Queue::new(max_size).map_err(layout)?;
        queue.try_set_size(state.size).map_err(layout)?;
        queue.try_set_desc_table_address(GuestAddress(state.descriptors)).map_err(layout)?;
        queue.try_set_avail_ring_address(GuestAddress(state.driver)).map_err(layout)?;
        queue.try_set_used_ring_address(GuestAddress(state.device)).map_err(layout)?;
        let size = u64::from(state.size);
        for (address, len) in
            [(state.descriptors, 16 * size), (state.driver, 6 + 2 * size), (state.device, 6 + 8 * size)]
        {
            if address == 0 || address.checked_add(len).is_none() || !in_ram(&memory, address, len) {
                return Err(QueueError::Address { address, len });
            }
        }
        queue.set_event_idx(event_idx);
        queue.set_next_avail(state.next_avail);
        queue.set_next_used(state.next_used);
        queue.set_ready(true);
        Ok(Self { queue, memory, interrupt, index, broken: state.broken })
    }

    /// Its number in the device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Its place and position.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.queue.size(),
            descriptors: self.queue.desc_table(),
            driver: self.queue.avail_ring(),
            device: self.queue.used_ring(),
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            broken: self.broken,
        }
    }

    /// The guest memory it lies in.
    pub fn memory(&self) -> Arc<VmMemory> {
        self.memory.clone()
    }

    /// Has the driver broken it?
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Gives up on this queue and tells the driver so.
    pub fn fail(&mut self, why: &dyn fmt::Display) {
        if !self.broken {
            self.broken = true;
            self.interrupt.broken(&format_args!("queue {}: {why}", self.index));
        }
    }

    /// Takes the next chain, if there is one. `memory` is this queue's own ([`Self::memory`]).
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke the rules; the queue is to [`Self::fail`] then.
    pub fn pop<'m>(&mut self, memory: &'m VmMemory) -> Result<Option<Chain<'m>>, QueueError> {
        let head = match self.queue.iter(memory).map_err(QueueError::Ring)?.next() {
            Some(chain) => chain.head_index(),
            None => return Ok(None),
        };
        walk(memory, self.queue.desc_table(), self.queue.size(), head).map(Some)
    }

    /// Walks the chain `head`, taken and not yet given back, once more. The driver may have changed it meanwhile.
    ///
    /// # Errors
    /// As [`Self::pop`].
    pub fn chain<'m>(&self, memory: &'m VmMemory, head: u16) -> Result<Chain<'m>, QueueError> {
        walk(memory, self.queue.desc_table(), self.queue.size(), head)
    }

    /// Leaves the last `count` chains, taken and not given back, to be taken again.
    pub fn unpop(&mut self, count: u16) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(count));
    }

    /// Gives a chain back, with `written` bytes written to its writable part. All writes to guest memory that belong to it must
    /// be done (and their pages reported) before.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the used ring cannot be written.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.queue.add_used(&*self.memory, head, written).map_err(QueueError::Ring)
    }

    /// Interrupts the driver for what was pushed, if it wants that now.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the available ring cannot be read.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let wanted = if self.queue.event_idx_enabled() {
            self.queue.needs_notification(&*self.memory).map_err(QueueError::Ring)?
        } else {
            // The used index must be visible before the driver's flag is read.
            fence(Ordering::SeqCst);
            let flags: u16 = self
                .memory
                .load(GuestAddress(self.queue.avail_ring()), Ordering::Relaxed)
                .map_err(|e| QueueError::Ring(virtio_queue::Error::GuestMemory(e)))?;
            u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupt.queue(self.index);
        }
        Ok(())
    }

    /// Are there chains to take? Cheap; a broken queue has none.
    pub fn is_empty(&self) -> bool {
        self.broken
            || self
                .queue
                .avail_idx(&*self.memory, Ordering::Acquire)
                .is_ok_and(|idx| idx == Wrapping(self.queue.next_avail()))
    }

    /// Asks the driver for notifications again. `true`: chains came meanwhile, go on taking them.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings cannot be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        self.queue.enable_notification(&*self.memory).map_err(QueueError::Ring)
    }

    /// Tells the driver that it need not notify: somebody is looking at the queue anyway.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings cannot be accessed.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        self.queue.disable_notification(&*self.memory).map_err(QueueError::Ring)
    }

    /// Serves chains until there are none or `stop` is set. `handle` returns the number of bytes it wrote, at most the length
    /// of the chain's writable part. The driver is told after every chain, if it wants.
    pub fn serve(&mut self, stop: &StopFlag, mut handle: impl FnMut(&mut Chain<'_>) -> u32) {
        if self.broken {
            return;
        }
        if let Err(why) = self.try_serve(stop, &mut handle) {
            self.fail(&why);
        }
    }

    fn try_serve(&mut self, stop: &StopFlag, handle: &mut dyn FnMut(&mut Chain<'_>) -> u32) -> Result<(), QueueError> {
        let memory = self.memory();
        loop {
            self.disable_notification()?;
            while !stop.is_set() {
                let Some(mut chain) = self.pop(&memory)? else { break };
                let head = chain.head;
                let written = handle(&mut chain);
                self.push(head, written)?;
                self.signal()?;
            }
            if !self.enable_notification()? || stop.is_set() {
                return Ok(());
            }
        }
    }
}

fn in_ram(memory: &VmMemory, address: u64, len: u64) -> bool {
    usize::try_from(len).is_ok_and(|len| memory.get_slice(GuestAddress(address), len).is_ok())
}

/// Follows the chain that starts at descriptor `head` of the table at `table` with `size` entries.
fn walk(memory: &VmMemory, table: u64, size: u16, head: u16) -> Result<Chain<'_>, QueueError> {
    let (mut table, mut entries, mut index) = (table, u32::from(size), head);
    let mut left = size.max(MAX_CHAIN);
    let mut total = 0u32;
    let mut indirect = false;
    let mut chain = Chain { head, readable: Buffers::default(), writable: Buffers::default() };
    loop {
        if u32::from(index) >= entries {
            return Err(QueueError::Index(index));
        }
        left = left.checked_sub(1).ok_or(QueueError::TooLong)?;
        let no_table = QueueError::Address { address: table, len: u64::from(entries) * 16 };
        let Some(address) = table.checked_add(u64::from(index) * 16) else { return Err(no_table) };
        let Ok(descriptor) = memory.read_obj::<Descriptor>(GuestAddress(address)) else { return Err(no_table) };
        let flags = u32::from(descriptor.flags());
        if flags & VRING_DESC_F_INDIRECT != 0 {
            // 2.7.5.3.1: no tables within tables, no NEXT beside INDIRECT.
            if indirect || flags & VRING_DESC_F_NEXT != 0 || descriptor.len() == 0 || descriptor.len() % 16 != 0 {
                return Err(QueueError::Indirect);
            }
            indirect = true;
            (table, entries, index) = (descriptor.addr().0, descriptor.len() / 16, 0);
            continue;
        }
        let len = descriptor.len();
        total = total.checked_add(len).ok_or(QueueError::TooLarge)?;
        if len != 0 {
            let Ok(slice) = memory.get_slice(descriptor.addr(), len as usize) else {
                return Err(QueueError::Address { address: descriptor.addr().0, len: u64::from(len) });
            };
            if flags & VRING_DESC_F_WRITE != 0 {
                chain.writable.add(slice);
            } else if chain.writable.is_empty() {
                chain.readable.add(slice);
            } else {
                return Err(QueueError::Order);
            }
        }
        if flags & VRING_DESC_F_NEXT == 0 {
            return Ok(chain);
        }
        index = descriptor.next();
    }
}
