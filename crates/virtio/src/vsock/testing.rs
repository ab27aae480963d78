//! The connections of a guest without queues and threads: for fuzzing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

use super::muxer::Muxer;
use super::packet::{HEADER, Header};
use super::{GUEST_CID, MAX_CONNECTIONS};

/// A guest's connections, packets in and out, and the host's ends of them.
pub struct Packets {
    muxer: Muxer,
    hosts: Arc<Mutex<Vec<UnixStream>>>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Packets {
    /// Without a connection; `takes` says at which ports of the host somebody listens.
    pub fn new(takes: impl Fn(u32) -> bool + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let hosts = Arc::new(Mutex::new(Vec::new()));
        let keep = hosts.clone();
        let dial = move |port, _| {
            let (ours, theirs) = takes(port).then(UnixStream::pair)?.ok()?;
            theirs.set_nonblocking(true).ok()?;
            keep.lock().unwrap_or_else(PoisonError::into_inner).push(theirs);
            Some(ours)
        };
        let muxer = Muxer::new(GUEST_CID, Some(listener.into()), Box::new(dial)).unwrap();
        Self { muxer, hosts, path, _dir: dir }
    }

    /// A packet of the guest, if it is to be taken now.
    pub fn packet(&mut self, header: &[u8; HEADER], payload: &[u8]) {
        if self.muxer.takes() {
            self.muxer.packet(&Header::parse(header), payload);
        }
    }

    /// Gives the guest a packet, if there is one, into a buffer of `room` bytes.
    pub fn take(&mut self, room: usize) {
        if let Some((header, payload)) = self.muxer.next_packet(room) {
            assert!(payload.len() + HEADER <= room);
            assert_eq!(header.len as usize, payload.len());
        }
    }

    fn host(&self, which: usize, act: impl FnOnce(&mut UnixStream)) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = hosts.len().max(1);
        if let Some(stream) = hosts.get_mut(which % count) {
            act(stream);
        }
    }

    /// One of the host's ends writes.
    pub fn host_writes(&self, which: usize, len: usize) {
        self.host(which, |stream| drop(stream.write(&vec![3; len])));
    }

    /// One of the host's ends reads.
    pub fn host_reads(&self, which: usize, len: usize) {
        self.host(which, |stream| drop(stream.read(&mut vec![0; len])));
    }

    /// One of the host's ends goes.
    pub fn host_closes(&self, which: usize) {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if !hosts.is_empty() {
            let at = which % hosts.len();
            hosts.swap_remove(at);
        }
    }

    /// A program of the host connects and says this.
    pub fn host_calls(&self, line: &[u8]) {
        let Ok(mut stream) = UnixStream::connect(&self.path) else { return };
        let _ = stream.set_nonblocking(true);
        let _ = stream.write(line);
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner).push(stream);
    }

    /// All connections end, as when the guest resets the device.
    pub fn clear(&mut self) {
        self.muxer.clear();
    }

    /// Deals with what has happened to descriptors. Nothing has grown beyond its bound then.
    pub fn turn(&mut self) {
        for event in self.muxer.epoll.wait(0) {
            self.muxer.ready(event);
        }
        assert!(self.muxer.len() <= MAX_CONNECTIONS);
    }
}
