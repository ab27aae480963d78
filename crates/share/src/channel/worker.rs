//! The server's end.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{AREA, Memory, Patience, signal};

/// How long a thread looks for the next request: about as long as a guest takes between two.
const LOOK: Duration = Duration::from_micros(100);

/// The server's end of a channel, for all its threads.
pub struct Worker {
    memory: Memory,
    posted: OwnedFd,
    done: OwnedFd,
    /// Who has it looks; the others sleep.
    patience: Mutex<Patience>,
    /// From which slot on the next is sought, so that each has its turn.
    turn: AtomicU32,
}

impl Worker {
    /// Of the descriptors that [`super::Client::descriptors`] gives.
    ///
    /// # Errors
    /// The memory cannot be mapped or is no such memory.
    pub fn new([file, posted, done]: [OwnedFd; 3]) -> io::Result<Self> {
        let memory = Memory::map(&file)?;
        Ok(Self { memory, posted, done, patience: Mutex::new(Patience::new(LOOK)), turn: AtomicU32::new(0) })
    }

    /// Serves requests for ever: `serve` takes a request and the room for its answer, and returns the answer's length.
    pub fn run(&self, mut serve: impl FnMut(&[u8], &mut [u8]) -> usize) -> ! {
        loop {
            match self.take() {
                Some(slot) => self.serve(slot, &mut serve),
                None => self.wait(),
            }
        }
    }

    /// Takes a request that no other thread has taken.
    fn take(&self) -> Option<usize> {
        let control = self.memory.control();
        loop {
            let posted = control.posted.0.load(Ordering::SeqCst);
            if posted == 0 {
                return None;
            }
            let turn = self.turn.load(Ordering::Relaxed) % 64;
            let slot = (posted.rotate_right(turn).trailing_zeros() + turn) % 64;
            let bit = 1 << slot;
            if control.posted.0.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
                self.turn.store(slot + 1, Ordering::Relaxed);
                // Who posted it may have woken nobody, because one looked: there may be more than one can do.
                if posted & !bit != 0 && control.sleeping.0.load(Ordering::SeqCst) != 0 {
                    signal(&self.posted);
                }
                return Some(slot as usize);
            }
        }
    }

    fn serve(&self, slot: usize, serve: &mut impl FnMut(&[u8], &mut [u8]) -> usize) {
        let (Some(base), Some(lengths)) = (self.memory.slot(slot), self.memory.lengths(slot)) else { return };
        let request_len = (lengths.request.load(Ordering::Relaxed) as usize).min(AREA);
        let room = (lengths.room.load(Ordering::Relaxed) as usize).min(AREA);
        // SAFETY: the area lies there as long as `self` lives; from posting to done the monitor does not touch it, and the slot is this
        // thread's alone.
        let request = unsafe { std::slice::from_raw_parts(base, request_len) };
        // SAFETY: as above, and the two areas do not overlap.
        let answer = unsafe { std::slice::from_raw_parts_mut(base.wrapping_add(AREA), room) };
        let len = serve(request, answer).min(room);
        lengths.answer.store(len as u32, Ordering::Relaxed);
        let control = self.memory.control();
        control.done.0.fetch_or(1 << slot, Ordering::SeqCst);
        if control.client_looks.0.load(Ordering::SeqCst) == 0 {
            signal(&self.done);
        }
    }

    fn wait(&self) {
        let control = self.memory.control();
        if let Ok(mut patience) = self.patience.try_lock() {
            control.server_looks.0.fetch_add(1, Ordering::SeqCst);
            let there = patience.look(|| control.posted.0.load(Ordering::Acquire) != 0);
            control.server_looks.0.fetch_sub(1, Ordering::SeqCst);
            if there {
                return;
            }
        }
        control.sleeping.0.fetch_add(1, Ordering::SeqCst);
        if control.posted.0.load(Ordering::SeqCst) == 0 {
            let _ = rustix::io::read(&self.posted, &mut [0u8; 8]);
        }
        control.sleeping.0.fetch_sub(1, Ordering::SeqCst);
    }
}
