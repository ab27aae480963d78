//! Waiting for many sockets at once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::time::Timespec;

use crate::slab::Id;

pub use rustix::event::epoll::EventFlags as Flags;

/// Events taken at a time.
const BATCH: usize = 256;
const KIND_SHIFT: u32 = 56;

/// Whose event it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// The guest's cable.
    Link,
    /// The forwarded port of that number.
    Forward(usize),
    /// A TCP connection.
    Tcp(Id),
    /// A UDP flow.
    Udp(Id),
    /// Echo requests to one address.
    Echo(Id),
}

impl Token {
    fn encode(self) -> u64 {
        let (kind, id) = match self {
            Self::Link => (0, 0),
            Self::Forward(number) => (1, number as u64),
            Self::Tcp(id) => (2, id),
            Self::Udp(id) => (3, id),
            Self::Echo(id) => (4, id),
        };
        kind << KIND_SHIFT | id
    }

    fn decode(value: u64) -> Self {
        let id = value & ((1 << KIND_SHIFT) - 1);
        match value >> KIND_SHIFT {
            1 => Self::Forward(id as usize),
            2 => Self::Tcp(id),
            3 => Self::Udp(id),
            4 => Self::Echo(id),
            _ => Self::Link,
        }
    }
}

/// The sockets that are waited for.
pub struct Poll {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl std::fmt::Debug for Poll {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Poll").field("epoll", &self.epoll).finish_non_exhaustive()
    }
}

impl Poll {
    /// None yet.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, events: Vec::with_capacity(BATCH) })
    }

    /// Waits for `socket` from now on until it is closed.
    ///
    /// # Errors
    /// When the host has no memory for it.
    pub fn add(&self, socket: impl AsFd, token: Token, flags: Flags) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(token.encode()), flags)?)
    }

    /// Waits for other events of `socket`.
    ///
    /// # Errors
    /// When it is not waited for at all.
    pub fn change(&self, socket: impl AsFd, token: Token, flags: Flags) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token.encode()), flags)?)
    }

    /// Waits for events, for `timeout` at most.
    ///
    /// # Errors
    /// Only for reasons that do not go away.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<Vec<(Token, Flags)>> {
        self.events.clear();
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().min(1 << 30) as i64,
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match epoll::wait(&self.epoll, spare_capacity(&mut self.events), timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(self.events.iter().map(|event| (Token::decode(event.data.u64()), event.flags)).collect())
    }
}
