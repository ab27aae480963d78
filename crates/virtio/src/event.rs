//! A counter in the host's kernel that a thread sleeps on (eventfd(2)): what a doorbell rings.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// An event counter. Waiting blocks until it is above zero, and sets it to zero.
#[derive(Debug)]
pub(crate) struct Event(OwnedFd);

impl Event {
    /// A counter at zero.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    /// Counts one up.
    pub fn notify(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes of a local. It would block only after 2^64 - 2 calls that nobody waited for.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }

    /// Sleeps until somebody has counted up since the last call. May return early (a signal came).
    pub fn wait(&self) {
        let mut count = [0; 8];
        // SAFETY: reads 8 bytes into a local.
        unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
    }
}

impl Event {
    /// As [`Self::wait`], for `at_most` at most.
    pub fn wait_for(&self, at_most: std::time::Duration) {
        let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let time = i32::try_from(at_most.as_millis().max(1)).unwrap_or(i32::MAX);
        // SAFETY: one initialized entry.
        if unsafe { libc::poll(&raw mut poll, 1, time) } > 0 {
            self.wait();
        }
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
