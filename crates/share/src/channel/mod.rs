//! How requests get from the monitor to the server and answers back: through memory that both have, in slots.
//!
//! ```text
//!   monitor (Client)                          server (Worker, several threads)
//!   copy request to a free slot
//!   posted |= slot, wake if they sleep   ──▶  posted &= !slot
//!                                             serve: request area ──▶ answer area
//!   done &= !slot                        ◀──  done |= slot, wake if nobody looks
//!   copy answer to the guest
//! ```
//!
//! Guest memory is not shared: the server sees a request and gives bytes for its answer, and the monitor copies both, for it alone must
//! know which of the guest's pages hold translated code. The monitor believes nothing that it finds in this memory; the server trusts the
//! monitor. Both look for a while before they sleep ([`Patience`]), for waking another process costs more than most requests.

mod client;
mod worker;

use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

pub use client::Client;
pub use worker::Worker;

use crate::fs::MAX_DATA;

/// Requests that can be on the way at a time.
pub const SLOTS: usize = 32;
/// Bytes of a request, and of an answer, at most: the data and what goes before them.
pub const AREA: usize = MAX_DATA + 4096;
/// Where the slots begin.
const FIRST_SLOT: usize = 4096;
/// A slot is a request area and an answer area.
const SLOT: usize = 2 * AREA;
const SIZE: usize = FIRST_SLOT + SLOTS * SLOT;

/// Keeps what two processes write at the same time on different cache lines.
#[repr(C, align(64))]
struct Line<T>(T);

/// One slot's lengths.
#[repr(C)]
struct Lengths {
    /// Of the request.
    request: AtomicU32,
    /// Of the room for the answer.
    room: AtomicU32,
    /// Of the answer.
    answer: AtomicU32,
}

/// The first page. All zero at first.
#[repr(C)]
struct Control {
    /// Slots with a request, a bit each.
    posted: Line<AtomicU64>,
    /// Slots with an answer.
    done: Line<AtomicU64>,
    /// Threads of the server that sleep.
    sleeping: Line<AtomicU32>,
    /// Threads of the server that look at `posted`.
    server_looks: Line<AtomicU32>,
    /// Threads of the monitor that look at `done`.
    client_looks: Line<AtomicU32>,
    lengths: Line<[Lengths; SLOTS]>,
}

const _: () = assert!(size_of::<Control>() <= FIRST_SLOT && SLOTS <= 64 && AREA.is_multiple_of(4096));

/// The memory, mapped.
struct Memory {
    base: *mut u8,
}

// SAFETY: `base` is a mapping that lives as long as this value; what it is used for is atomic, volatile, or ruled by the slots' states.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Makes such memory: a file that nobody can make shorter or longer.
    fn create() -> std::io::Result<std::os::fd::OwnedFd> {
        let file = rustix::fs::memfd_create(c"tightrope-share", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, SIZE as u64)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(file)
    }

    fn map(file: &std::os::fd::OwnedFd) -> std::io::Result<Self> {
        if rustix::fs::fstat(file)?.st_size as usize != SIZE {
            return Err(std::io::ErrorKind::InvalidData.into());
        }
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { rustix::mm::mmap(std::ptr::null_mut(), SIZE, protection, MapFlags::SHARED, file, 0)? };
        Ok(Self { base: base.cast() })
    }

    fn control(&self) -> &Control {
        // SAFETY: the mapping is aligned to pages and longer than this; all fields are atomic, so that others may write them.
        unsafe { &*self.base.cast::<Control>() }
    }

    fn lengths(&self, slot: usize) -> Option<&Lengths> {
        self.control().lengths.0.get(slot)
    }

    /// Where slot `slot` begins; `None` if there is no such slot.
    fn slot(&self, slot: usize) -> Option<*mut u8> {
        (slot < SLOTS).then(|| self.base.wrapping_add(FIRST_SLOT + slot * SLOT))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from it any more.
        let _ = unsafe { rustix::mm::munmap(self.base.cast(), SIZE) };
    }
}

/// Whether it pays to look for something for a while before going to sleep: it does where it was found by looking lately.
pub struct Patience {
    /// Above zero: look.
    credit: i32,
    time: Duration,
}

impl Patience {
    /// Looks for `time` at most; never where there is one CPU.
    pub fn new(time: Duration) -> Self {
        let cpus = rustix::thread::sched_getaffinity(None).map_or(1, |set| set.count());
        Self { credit: 4, time: if cpus > 1 { time } else { Duration::ZERO } }
    }

    /// Looks until `there`; `false` when the time is over, or it was not worth trying.
    pub fn look(&mut self, mut there: impl FnMut() -> bool) -> bool {
        if self.time.is_zero() {
            return false;
        }
        if self.credit <= 0 {
            // Now and then it is tried all the same.
            self.credit = if self.credit <= -16 { 1 } else { self.credit - 1 };
            return there();
        }
        let start = Instant::now();
        loop {
            for _ in 0..16 {
                if there() {
                    self.credit = (self.credit + 1).min(8);
                    return true;
                }
                std::hint::spin_loop();
            }
            if start.elapsed() > self.time {
                self.credit -= 1;
                return false;
            }
        }
    }
}

/// An event counter.
fn event(semaphore: bool) -> std::io::Result<std::os::fd::OwnedFd> {
    use rustix::event::{EventfdFlags, eventfd};
    let kind = if semaphore { EventfdFlags::SEMAPHORE } else { EventfdFlags::NONBLOCK };
    Ok(eventfd(0, EventfdFlags::CLOEXEC | kind)?)
}

/// Adds one to an event counter: whoever waits for it wakes.
fn signal(event: &std::os::fd::OwnedFd) {
    // It can fail only when the counter is full, and then nobody sleeps.
    let _ = rustix::io::write(event, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests;
