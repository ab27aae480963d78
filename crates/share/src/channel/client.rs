//! The monitor's end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;

use vm_memory::VolatileSlice;

use super::{AREA, Memory, event, signal};

/// The monitor's end of a channel.
pub struct Client {
    memory: Memory,
    file: OwnedFd,
    posted: OwnedFd,
    done: OwnedFd,
}

impl Client {
    /// A new channel.
    ///
    /// # Errors
    /// The host gives no memory or descriptors.
    pub fn new() -> io::Result<Self> {
        let file = Memory::create()?;
        Ok(Self { memory: Memory::map(&file)?, file, posted: event(true)?, done: event(false)? })
    }

    /// What the server needs, in this order: see [`super::Worker::new`].
    pub fn descriptors(&self) -> [BorrowedFd<'_>; 3] {
        [self.file.as_fd(), self.posted.as_fd(), self.done.as_fd()]
    }

    /// Where the request of `slot` goes, the first `len` bytes of its area; `None` if it has not so much, or there is no such slot.
    pub fn request(&self, slot: usize, len: usize) -> Option<VolatileSlice<'_, ()>> {
        self.area(slot, 0, len)
    }

    /// The answer in `slot`, its first `len` bytes.
    pub fn answer(&self, slot: usize, len: usize) -> Option<VolatileSlice<'_, ()>> {
        self.area(slot, AREA, len)
    }

    fn area(&self, slot: usize, offset: usize, len: usize) -> Option<VolatileSlice<'_, ()>> {
        let base = self.memory.slot(slot).filter(|_| len <= AREA)?;
        // SAFETY: an area of AREA bytes lies there, mapped as long as `self` lives, and is used by volatile copies only.
        Some(unsafe { VolatileSlice::new(base.wrapping_add(offset), len) })
    }

    /// Hands over the request in `slot`, `len` bytes, whose answer may have `room` bytes.
    pub fn post(&self, slot: usize, len: u32, room: u32) {
        let Some(lengths) = self.memory.lengths(slot) else { return };
        lengths.request.store(len, Ordering::Relaxed);
        lengths.room.store(room, Ordering::Relaxed);
        lengths.answer.store(0, Ordering::Relaxed);
        let control = self.memory.control();
        control.posted.0.fetch_or(1 << slot, Ordering::SeqCst);
        if control.server_looks.0.load(Ordering::SeqCst) == 0 && control.sleeping.0.load(Ordering::SeqCst) != 0 {
            signal(&self.posted);
        }
    }

    /// Is there an answer?
    pub fn any_done(&self) -> bool {
        self.memory.control().done.0.load(Ordering::Acquire) != 0
    }

    /// Takes the answers that are there: a bit for each slot. What is in them is the server's, which may lie.
    pub fn take_done(&self) -> u64 {
        self.memory.control().done.0.swap(0, Ordering::SeqCst)
    }

    /// How long the answer in `slot` claims to be.
    pub fn answer_len(&self, slot: usize) -> u32 {
        self.memory.lengths(slot).map_or(0, |lengths| lengths.answer.load(Ordering::Relaxed))
    }

    /// While `look` looks at [`Self::any_done`], the server does not wake anybody. Look once more afterwards.
    pub fn looking<T>(&self, look: impl FnOnce() -> T) -> T {
        let looks = &self.memory.control().client_looks.0;
        looks.fetch_add(1, Ordering::SeqCst);
        let result = look();
        looks.fetch_sub(1, Ordering::SeqCst);
        result
    }

    /// Becomes readable when there are answers and nobody looks.
    pub fn done_event(&self) -> BorrowedFd<'_> {
        self.done.as_fd()
    }

    /// Takes the signal from [`Self::done_event`].
    pub fn quiet(&self) {
        let _ = rustix::io::read(&self.done, &mut [0u8; 8]);
    }
}
