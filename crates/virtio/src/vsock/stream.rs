//! Host streams: non-blocking Unix sockets, and the epoll set that says what they are ready for.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

pub(super) fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let mut on: libc::c_int = 1;
    // SAFETY: FIONBIO reads an int.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) }).map(|_| ())
}

/// Reads; `Ok(None)`: nothing now.
pub(super) fn read(fd: &OwnedFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        // SAFETY: the buffer is valid for writes of its length.
        let result = unsafe { libc::read(fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        match usize::try_from(result) {
            Ok(len) => return Ok(Some(len)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error => return Err(error),
            },
        }
    }
}

/// Writes; `Ok(None)`: no room now.
pub(super) fn write(fd: &OwnedFd, data: &[u8]) -> io::Result<Option<usize>> {
    loop {
        // SAFETY: the data is valid for reads of its length.
        let result = unsafe { libc::write(fd.as_raw_fd(), data.as_ptr().cast(), data.len()) };
        match usize::try_from(result) {
            Ok(len) => return Ok(Some(len)),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                error => return Err(error),
            },
        }
    }
}

/// Shuts one direction down.
pub(super) fn shut(fd: &OwnedFd, how: libc::c_int) {
    // SAFETY: takes no pointers.
    unsafe { libc::shutdown(fd.as_raw_fd(), how) };
}

/// Takes a connection of this very user, or of root; others are hung up on. `None`: none waits.
pub(super) fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    loop {
        // SAFETY: no address is asked for.
        let fd = unsafe {
            libc::accept4(
                listener.as_raw_fd(),
                std::ptr::null_mut(),
                std::ptr::null_mut(),
                libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK,
            )
        };
        if fd < 0 {
            match io::Error::last_os_error().kind() {
                io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                _ => return None,
            }
        }
        // SAFETY: just made, nobody else has it.
        let stream = unsafe { OwnedFd::from_raw_fd(fd) };
        if may_connect(&stream) {
            return Some(stream);
        }
    }
}

/// Does the other end belong to this user, or to root?
pub fn may_connect(stream: &OwnedFd) -> bool {
    let mut peer = libc::ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: a ucred of its size.
    let result = unsafe {
        libc::getsockopt(stream.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, (&raw mut peer).cast(), &raw mut len)
    };
    // SAFETY: takes no pointers.
    result == 0 && (peer.uid == 0 || peer.uid == unsafe { libc::geteuid() })
}

/// What happened to a descriptor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ready {
    pub token: u64,
    pub readable: bool,
    pub writable: bool,
    /// Its other end is gone.
    pub hung_up: bool,
}

/// An epoll set. Changes are told once.
#[derive(Clone)]
pub(super) struct Epoll(Arc<OwnedFd>);

impl Epoll {
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers; the descriptor is new.
        Ok(Self(Arc::new(unsafe { OwnedFd::from_raw_fd(check(libc::epoll_create1(libc::EPOLL_CLOEXEC))?) })))
    }

    /// Adds a descriptor, which leaves by being closed.
    pub(super) fn add(&self, fd: RawFd, token: u64) -> io::Result<()> {
        let events = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLRDHUP | libc::EPOLLET) as u32;
        let mut event = libc::epoll_event { events, u64: token };
        // SAFETY: the event is a local.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), libc::EPOLL_CTL_ADD, fd, &raw mut event) }).map(|_| ())
    }

    /// Waits, for ever (-1) or not at all (0).
    pub(super) fn wait(&self, timeout: libc::c_int) -> Vec<Ready> {
        let mut events = [libc::epoll_event { events: 0, u64: 0 }; 64];
        // SAFETY: the array has that many elements.
        let count =
            unsafe { libc::epoll_wait(self.0.as_raw_fd(), events.as_mut_ptr(), events.len() as libc::c_int, timeout) };
        let count = usize::try_from(count).unwrap_or(0);
        let ready = |event: &libc::epoll_event| {
            let has = |bit: libc::c_int| event.events & bit as u32 != 0;
            Ready {
                token: event.u64,
                readable: has(libc::EPOLLIN | libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR),
                writable: has(libc::EPOLLOUT | libc::EPOLLHUP | libc::EPOLLERR),
                hung_up: has(libc::EPOLLHUP | libc::EPOLLERR),
            }
        };
        events.iter().take(count).map(ready).collect()
    }
}
