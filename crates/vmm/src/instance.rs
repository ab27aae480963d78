//! What a VM that others can find holds open: its entry in the registry, its sockets, its log.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::{Mutex, PoisonError};

use registry::Own;
use registry::keeper::Keeper;

/// A VM that other commands find: see [`registry`].
#[derive(Debug)]
pub struct Instance {
    /// Where its files are.
    pub dir: std::path::PathBuf,
    /// Its id.
    pub id: String,
    /// Is there to be an agent in the guest?
    pub agent: bool,
    /// Locked as long as this lives.
    _alive: File,
    status: File,
    keeper: Option<Keeper>,
    parts: Mutex<Parts>,
}

/// What is taken out when the VM is built.
#[derive(Debug, Default)]
pub(crate) struct Parts {
    pub control: Option<UnixListener>,
    pub vsock: Option<UnixListener>,
    pub console: Option<File>,
    /// When its other end is closed, the VM ends.
    pub lifeline: Option<OwnedFd>,
}

impl Instance {
    /// From a new entry. `keeper` connects to sockets for the guest; `lifeline`: a socket or pipe; the VM ends when its other end is
    /// closed.
    pub fn new(own: Own, keeper: Option<Keeper>, lifeline: Option<OwnedFd>) -> Self {
        let Own { about, dir, alive, status, control, vsock, console } = own;
        let parts = Parts { control: Some(control), vsock: Some(vsock), console: Some(console), lifeline };
        Self { dir, id: about.id, agent: about.agent, _alive: alive, status, keeper, parts: Mutex::new(parts) }
    }

    /// Takes what `which` picks, the first time.
    pub(crate) fn take<T>(&self, which: impl FnOnce(&mut Parts) -> Option<T>) -> Option<T> {
        which(&mut self.parts.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A connection to whoever serves this port of the host.
    pub(crate) fn dial(&self, port: u32) -> Option<std::os::unix::net::UnixStream> {
        self.keeper.as_ref()?.dial(port)
    }

    /// Notes how the VM ended.
    pub(crate) fn ended(&self, code: i32) {
        let _ = (&self.status).write_all(registry::ended(code).as_bytes());
    }
}
