//! The host's end of an interface: a file descriptor that gives and takes one packet a call.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Work on packets that one side leaves to the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offloads {
    /// The checksum of TCP and UDP is not filled in.
    pub checksum: bool,
    /// TCP over IPv4 comes in segments of up to 64 KiB; only with `checksum`.
    pub tcp4: bool,
    /// The same for IPv6.
    pub tcp6: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { checksum: true, tcp4: true, tcp6: true };

    /// The message to a network server that tells what the driver takes: shorter than any packet.
    fn message(self) -> [u8; 4] {
        [b'o', self.checksum.into(), self.tcp4.into(), self.tcp6.into()]
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Server,
    Tap,
}

/// What is at the host's end of an interface. It does not block: the descriptor is in non-blocking mode.
#[derive(Debug)]
pub struct Port {
    fd: OwnedFd,
    kind: Kind,
    offloads: Offloads,
}

impl Port {
    /// A network server at the other end of `socket`, which keeps packets apart (SOCK_SEQPACKET). Each time a driver takes the device
    /// over, the server gets a message of 4 bytes: the letter `o`, then, each as a byte 0 or 1, whether the driver takes packets
    /// without checksum, large TCP segments over IPv4, and over IPv6. What it knew of the guest is void then.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn server(socket: OwnedFd, offloads: Offloads) -> io::Result<Self> {
        Self::new(socket, Kind::Server, offloads)
    }

    /// A TAP device, opened with IFF_VNET_HDR and a header of [`super::HEADER`] bytes.
    ///
    /// # Errors
    /// The device cannot be made non-blocking.
    pub fn tap(device: OwnedFd) -> io::Result<Self> {
        Self::new(device, Kind::Tap, Offloads::ALL)
    }

    fn new(fd: OwnedFd, kind: Kind, offloads: Offloads) -> io::Result<Self> {
        let mut on: libc::c_int = 1;
        // SAFETY: FIONBIO reads an int.
        if unsafe { libc::ioctl(fd.as_raw_fd(), libc::FIONBIO, &raw mut on) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, kind, offloads })
    }

    /// What the other end can do.
    pub fn offloads(&self) -> Offloads {
        self.offloads
    }

    /// A driver has taken the device over and takes packets with `offloads`.
    pub(super) fn driver_is(&self, offloads: Offloads) {
        match self.kind {
            Kind::Server => {
                // It gets lost only when the server does not take packets at all.
                let message = offloads.message();
                let _ =
                    self.send(&[libc::iovec { iov_base: message.as_ptr().cast_mut().cast(), iov_len: message.len() }]);
            }
            Kind::Tap => {
                let bits = [
                    (offloads.checksum, libc::TUN_F_CSUM),
                    (offloads.tcp4, libc::TUN_F_TSO4),
                    (offloads.tcp6, libc::TUN_F_TSO6),
                ];
                let flags = bits.iter().filter(|(on, _)| *on).fold(0, |flags, (_, bit)| flags | bit);
                // SAFETY: TUNSETOFFLOAD takes a number. A device that was taken away refuses; so will the next packet.
                unsafe { libc::ioctl(self.fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) };
            }
        }
    }

    /// Sends one packet, which `pieces` make up; at most 1024. They may be guest memory: the kernel alone reads them, or fails.
    pub(super) fn send(&self, pieces: &[libc::iovec]) -> io::Result<()> {
        // SAFETY: each piece is valid for reads (see above), and the kernel only reads it.
        let result = unsafe { libc::writev(self.fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes one packet; what does not fit in `buffer` is cut off. 0 bytes: the other end is gone.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the buffer is valid for writes of its length.
        let result = unsafe { libc::read(self.fd.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        usize::try_from(result).map_err(|_| io::Error::last_os_error())
    }

    /// Tells a server that it is not needed any more and waits, for `at_most`, until it has closed its end.
    pub(super) fn finish(&self, at_most: Duration) {
        if self.kind != Kind::Server {
            return;
        }
        // SAFETY: takes no pointers.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_WR) };
        let end = Instant::now() + at_most;
        loop {
            let left = end.saturating_duration_since(Instant::now()).as_millis();
            let mut fd = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one element, not used elsewhere meanwhile.
            if unsafe { libc::poll(&raw mut fd, 1, left as libc::c_int) } <= 0 {
                return;
            }
            // What it still sends is for nobody.
            match self.receive(&mut [0; 16]) {
                Ok(1..) => {}
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                _ => return,
            }
        }
    }

    /// Does this error of [`Self::send`] or [`Self::receive`] mean that nothing will ever come again?
    pub(super) fn is_end(&self, error: &io::Error) -> bool {
        match self.kind {
            Kind::Server => !matches!(error.raw_os_error(), Some(libc::ENOBUFS | libc::ENOMEM | libc::EMSGSIZE)),
            // EIO: the interface is down, EINVAL: a header that the kernel does not like; the next packet may do better.
            Kind::Tap => matches!(error.raw_os_error(), Some(libc::EBADFD | libc::ENODEV | libc::ENXIO)),
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
