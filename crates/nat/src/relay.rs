//! A cable to a socket of somebody else: another VM, or a network backend such as a switch.
//!
//! Two forms are common. On a stream socket each frame follows its length, 32 bits in network order; on a datagram socket each frame
//! is a datagram. In neither is there a header for offloads, so the guest is offered none.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, SocketFlags};
use serde::{Deserialize, Serialize};

use crate::frame::{MAX_FRAME, VIRTIO_HEADER};

/// The longest frame without the header.
const MAX_LEN: usize = MAX_FRAME - VIRTIO_HEADER;
/// The shortest: an Ethernet header.
const MIN_LEN: usize = 14;

/// What the socket is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Relay {
    /// A connected stream socket. When the peer goes, the cable is pulled.
    Stream,
    /// A listening stream socket; one peer at a time, and when it goes, the next.
    Listener,
    /// A connected datagram socket. Frames are lost while nobody is there.
    Datagram,
}

impl Relay {
    /// Carries frames between `cable` and `socket`, which do not block, until either ends for good.
    pub fn run(self, cable: &OwnedFd, socket: OwnedFd) {
        // Each returns when its work is over; why makes no difference any more.
        match self {
            Self::Datagram => drop(datagrams(cable, &socket)),
            Self::Stream => drop(Stream::new(cable, &socket).run()),
            Self::Listener => drop(listen(cable, &socket)),
        }
    }
}

fn nothing_now(error: Errno) -> bool {
    matches!(error, Errno::AGAIN | Errno::INTR | Errno::NOBUFS)
}

/// The next frame from the cable, without its header; `None` if there is none now.
fn from_cable<'b>(cable: &OwnedFd, buffer: &'b mut [u8]) -> Result<Option<&'b [u8]>, Errno> {
    match rustix::net::recv(cable, &mut *buffer, RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(Errno::PIPE),
        // Too short for a frame: a message about the driver, of no interest here.
        Ok((_, len)) => Ok(Some(buffer.get(VIRTIO_HEADER..len).filter(|frame| frame.len() >= MIN_LEN).unwrap_or(&[]))),
        Err(error) if nothing_now(error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Puts a frame on the cable; `false` when there is no room.
fn to_cable(cable: &OwnedFd, frame: &[u8]) -> Result<bool, Errno> {
    if !(MIN_LEN..=MAX_LEN).contains(&frame.len()) {
        return Ok(true);
    }
    let parts = [IoSlice::new(&[0; VIRTIO_HEADER]), IoSlice::new(frame)];
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    match rustix::net::sendmsg(cable, &parts, &mut SendAncillaryBuffer::default(), flags) {
        Ok(_) => Ok(true),
        Err(error) if nothing_now(error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn wait(first: (&OwnedFd, PollFlags), second: (&OwnedFd, PollFlags)) -> Result<(), Errno> {
    let mut fds = [PollFd::new(first.0, first.1), PollFd::new(second.0, second.1)];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

fn datagrams(cable: &OwnedFd, socket: &OwnedFd) -> Result<(), Errno> {
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        wait((cable, PollFlags::IN), (socket, PollFlags::IN))?;
        for _ in 0..64 {
            let Some(frame) = from_cable(cable, &mut buffer)? else { break };
            // Nobody there, or its queue is full: lost, as on a wire.
            let _ = rustix::net::send(socket, frame, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        }
        for _ in 0..64 {
            let Ok((_, len)) = rustix::net::recv(socket, &mut buffer[..], RecvFlags::DONTWAIT) else { break };
            to_cable(cable, buffer.get(..len).unwrap_or_default())?;
        }
    }
}

fn listen(cable: &OwnedFd, listener: &OwnedFd) -> Result<(), Errno> {
    let mut buffer = vec![0; MAX_FRAME];
    loop {
        wait((cable, PollFlags::IN), (listener, PollFlags::IN))?;
        while from_cable(cable, &mut buffer)?.is_some() {}
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        if let Ok(peer) = rustix::net::accept_with(listener, flags) {
            match Stream::new(cable, &peer).run() {
                Err(Ended::Cable) => return Ok(()),
                Err(Ended::Peer) | Ok(()) => {}
            }
        }
    }
}

/// Who ended it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    Cable,
    Peer,
}

/// Frames over a stream.
struct Stream<'a> {
    cable: &'a OwnedFd,
    peer: &'a OwnedFd,
    /// What the peer has not taken yet: one frame with its length at most.
    leaving: Vec<u8>,
    /// From the peer: what is not a whole frame yet, or has no room on the cable.
    arriving: Vec<u8>,
    /// The cable has no room.
    full: bool,
}

impl<'a> Stream<'a> {
    fn new(cable: &'a OwnedFd, peer: &'a OwnedFd) -> Self {
        Self { cable, peer, leaving: Vec::new(), arriving: Vec::new(), full: false }
    }

    fn run(mut self) -> Result<(), Ended> {
        let mut buffer = vec![0; MAX_FRAME];
        loop {
            let cable = if self.leaving.is_empty() { PollFlags::IN } else { PollFlags::empty() };
            let cable = if self.full { cable | PollFlags::OUT } else { cable };
            let peer = if self.full { PollFlags::empty() } else { PollFlags::IN };
            let peer = if self.leaving.is_empty() { peer } else { peer | PollFlags::OUT };
            wait((self.cable, cable), (self.peer, peer)).map_err(|_| Ended::Cable)?;
            self.feed_peer(&mut buffer)?;
            self.read_peer(&mut buffer)?;
        }
    }

    fn feed_peer(&mut self, buffer: &mut [u8]) -> Result<(), Ended> {
        for _ in 0..64 {
            if self.leaving.is_empty() {
                let Some(frame) = from_cable(self.cable, buffer).map_err(|_| Ended::Cable)? else { return Ok(()) };
                if frame.is_empty() {
                    continue;
                }
                self.leaving.extend((frame.len() as u32).to_be_bytes());
                self.leaving.extend_from_slice(frame);
            }
            match rustix::net::send(self.peer, &self.leaving, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => drop(self.leaving.drain(..count.min(self.leaving.len()))),
                Err(error) if nothing_now(error) => return Ok(()),
                Err(_) => return Err(Ended::Peer),
            }
        }
        Ok(())
    }

    fn read_peer(&mut self, buffer: &mut [u8]) -> Result<(), Ended> {
        self.whole_frames()?;
        if self.full {
            return Ok(());
        }
        match rustix::io::readv(self.peer, &mut [IoSliceMut::new(buffer)]) {
            Ok(0) => return Err(Ended::Peer),
            Ok(count) => self.arriving.extend_from_slice(buffer.get(..count).unwrap_or_default()),
            Err(error) if nothing_now(error) => return Ok(()),
            Err(_) => return Err(Ended::Peer),
        }
        self.whole_frames()
    }

    /// Puts all whole frames on the cable, as long as it has room.
    fn whole_frames(&mut self) -> Result<(), Ended> {
        let mut done = 0;
        self.full = false;
        while let Some(length) = self.arriving.get(done..done + 4).and_then(|bytes| <[u8; 4]>::try_from(bytes).ok()) {
            let length = u32::from_be_bytes(length) as usize;
            if length > MAX_LEN {
                return Err(Ended::Peer); // it speaks something else
            }
            let Some(frame) = self.arriving.get(done + 4..done + 4 + length) else { break };
            if !to_cable(self.cable, frame).map_err(|_| Ended::Cable)? {
                self.full = true;
                break;
            }
            done += 4 + length;
        }
        self.arriving.drain(..done);
        Ok(())
    }
}
