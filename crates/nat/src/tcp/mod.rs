//! TCP: each connection of the guest ends here and goes on as a connection of the host's own.
//!
//! * [`connection`]: the end that faces the guest.
//! * [`Table`]: all connections, their sockets, and who has something to do.

pub mod connection;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, Shutdown, SocketFlags, SocketType, sockopt};
use smoltcp::wire::{IpProtocol, TcpControl, TcpRepr};

use crate::addresses::{GATEWAY, GUEST};
use crate::icmp::{Offender, Why, send_error};
use crate::link::{Link, MAX_SEGMENT, Transport};
use crate::policy::Target;
use crate::poll::{Flags, Poll, Token};
use crate::slab::{Id, Slab};
use connection::{Connection, Segment};

/// Connections at a time.
pub const MAX_CONNECTIONS: usize = 4096;
/// While there are no more than so many, each may keep [`LARGE_BUFFER`] bytes in each direction; a later one [`SMALL_BUFFER`].
const LARGE_COUNT: usize = 128;
const LARGE_BUFFER: usize = 1 << 20;
const SMALL_BUFFER: usize = 32 << 10;
/// Segments that one connection sends before others have their turn.
const TURN: usize = 8;
/// Connections taken from a listening socket at a time.
const ACCEPTS: usize = 64;

/// Both ends of a connection as the guest knows them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The guest's.
    pub guest: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
}

#[derive(Debug)]
struct Entry {
    key: Key,
    end: Connection,
    socket: OwnedFd,
    /// The socket is connected.
    connected: bool,
    /// Reading may give something.
    readable: bool,
    /// Writing may be possible.
    writable: bool,
    /// The host's end knows that the guest sends no more.
    shut: bool,
    /// It is in [`Table::ready`].
    queued: bool,
    /// The sequence number of the guest's SYN, for errors about it.
    first: u32,
    /// Where to connect to if nobody is at the first address.
    otherwise: Option<Target>,
}

/// All connections.
#[derive(Debug)]
pub struct Table {
    entries: Slab<Entry>,
    index: HashMap<Key, Id>,
    /// Connections with something to do.
    ready: VecDeque<Id>,
    /// The earliest deadline there may be.
    next_deadline: Option<Instant>,
    /// A secret from which initial sequence numbers are made (RFC 6528).
    secret: std::collections::hash_map::RandomState,
    started: Instant,
}

impl Table {
    /// No connections yet, and never more than `limit`.
    pub fn new(limit: usize, now: Instant) -> Self {
        Self {
            entries: Slab::new(limit.min(MAX_CONNECTIONS)),
            index: HashMap::new(),
            ready: VecDeque::new(),
            next_deadline: None,
            secret: std::collections::hash_map::RandomState::new(),
            started: now,
        }
    }

    /// Connections.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    fn sequence_number(&self, key: Key, now: Instant) -> u32 {
        use std::hash::BuildHasher;
        let clock = now.saturating_duration_since(self.started).as_micros() / 4;
        (self.secret.hash_one(key) as u32).wrapping_add(clock as u32)
    }

    fn buffer(&self) -> usize {
        if self.entries.len() < LARGE_COUNT { LARGE_BUFFER } else { SMALL_BUFFER }
    }

    /// A segment for a connection that is known; `false` if it is not.
    pub fn segment(&mut self, key: Key, segment: &TcpRepr<'_>, now: Instant) -> bool {
        let Some(id) = self.index.get(&key).copied() else { return false };
        if let Some(entry) = self.entries.get_mut(id) {
            entry.end.segment(segment, now);
        }
        self.enqueue(id);
        true
    }

    /// The guest connects to `target` by `syn`.
    ///
    /// # Errors
    /// Why that cannot be.
    pub fn connect(
        &mut self,
        key: Key,
        syn: &TcpRepr<'_>,
        target: Target,
        mtu: u16,
        poll: &Poll,
        now: Instant,
    ) -> Result<(), Why> {
        let end = Connection::held(syn, self.sequence_number(key, now), own_mss(key, mtu), self.buffer());
        let first = syn.seq_number.0 as u32;
        let made = self.entries.insert_with(|id| {
            let (socket, otherwise) = match (open(target), target.otherwise()) {
                (Err(Why::Port | Why::Host), Some(other)) => (open(other)?, None),
                (socket, other) => (socket?, other),
            };
            poll.add(&socket, Token::Tcp(id), flags()).map_err(|_| Why::Host)?;
            Ok(Entry {
                key,
                end,
                socket,
                connected: false,
                readable: false,
                writable: false,
                shut: false,
                queued: false,
                first,
                otherwise,
            })
        });
        let id = made.unwrap_or(Err(Why::Port))?;
        self.index.insert(key, id);
        Ok(())
    }

    /// Takes what connects to `listener` on to the guest's `port`; `false` when there is no room for more.
    pub fn accept(&mut self, listener: &OwnedFd, port: u16, mtu: u16, poll: &Poll, now: Instant) -> bool {
        for _ in 0..ACCEPTS {
            if self.entries.is_full() {
                return false;
            }
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let (socket, peer) = match rustix::net::acceptfrom_with(listener, flags) {
                Ok(accepted) => accepted,
                Err(Errno::AGAIN) => return true,
                Err(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => return false,
                Err(_) => continue, // it was gone before it was taken
            };
            let _ = sockopt::set_tcp_nodelay(&socket, true);
            let peer_port = peer.and_then(|peer| SocketAddr::try_from(peer).ok()).map_or(1024, |peer| peer.port());
            let guest = SocketAddr::new(GUEST.into(), port);
            let key = |port| Key { guest, remote: SocketAddr::new(GATEWAY.into(), port) };
            let first = peer_port.max(1024);
            let free = (first..=u16::MAX).chain(1024..first).find(|port| !self.index.contains_key(&key(*port)));
            let Some(key) = free.map(key) else { return false };
            let end = Connection::connect(self.sequence_number(key, now), own_mss(key, mtu), self.buffer());
            let made = self.entries.insert_with(|id| {
                poll.add(&socket, Token::Tcp(id), self::flags())?;
                Ok::<_, std::io::Error>(Entry {
                    key,
                    end,
                    socket,
                    connected: true,
                    readable: true,
                    writable: true,
                    shut: false,
                    queued: false,
                    first: 0,
                    otherwise: None,
                })
            });
            if let Some(Ok(id)) = made {
                self.index.insert(key, id);
                self.enqueue(id);
            }
        }
        true
    }

    /// Something happened to a connection's socket.
    pub fn event(&mut self, id: Id, flags: Flags, link: &mut Link, poll: &Poll) {
        let Some(entry) = self.entries.get_mut(id) else { return };
        entry.readable |= flags.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR);
        entry.writable |= flags.intersects(Flags::OUT | Flags::HUP | Flags::ERR);
        if !entry.connected {
            match sockopt::socket_error(&entry.socket) {
                Ok(Ok(())) if flags.contains(Flags::OUT) => {
                    entry.connected = true;
                    entry.end.host_connected();
                }
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) if entry.goes_on_otherwise(id, poll) => return,
                Ok(Err(Errno::CONNREFUSED | Errno::CONNRESET)) => entry.end.abort(),
                Ok(Err(error)) | Err(error) => {
                    let why = if matches!(error, Errno::ACCESS | Errno::PERM) { Why::Prohibited } else { Why::Host };
                    send_error(link, &offender(entry.key, entry.first), why);
                    return self.remove(id);
                }
            }
        }
        self.enqueue(id);
    }

    fn enqueue(&mut self, id: Id) {
        if let Some(entry) = self.entries.get_mut(id).filter(|entry| !entry.queued) {
            entry.queued = true;
            self.ready.push_back(id);
        }
    }

    /// Is there a connection with something to do?
    pub fn has_work(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Lets each connection that has something to do take one turn, as long as the link has room.
    pub fn work(&mut self, link: &mut Link, now: Instant) {
        for _ in 0..self.ready.len() {
            if !link.has_room() {
                return;
            }
            let Some(id) = self.ready.pop_front() else { return };
            let Some(entry) = self.entries.get_mut(id) else { continue };
            entry.queued = false;
            let more = entry.turn(link, now);
            if let Some(deadline) = entry.end.deadline() {
                self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
            }
            if entry.end.is_over() {
                self.remove(id);
            } else if more {
                self.enqueue(id);
            }
        }
    }

    /// How long until a connection's patience ends.
    pub fn next_timeout(&self, now: Instant) -> Option<Duration> {
        // Not for every single one: a tenth of a second is exact enough.
        self.next_deadline.map(|at| at.saturating_duration_since(now).max(Duration::from_millis(50)))
    }

    /// Looks for connections whose patience has ended.
    pub fn check_deadlines(&mut self, now: Instant) {
        if self.next_deadline.is_none_or(|at| now < at) {
            return;
        }
        self.next_deadline = None;
        for id in self.entries.ids() {
            let Some(entry) = self.entries.get_mut(id) else { continue };
            let Some(deadline) = entry.end.deadline() else { continue };
            if now >= deadline {
                entry.end.timeout(now);
                self.enqueue(id);
            } else {
                self.next_deadline = Some(self.next_deadline.map_or(deadline, |next| next.min(deadline)));
            }
        }
    }

    /// Ends all connections: their guest is gone.
    pub fn clear(&mut self) {
        self.entries.ids().into_iter().for_each(|id| self.remove(id));
        self.ready.clear();
    }

    fn remove(&mut self, id: Id) {
        let Some(entry) = self.entries.remove(id) else { return };
        self.index.remove(&entry.key);
        if !entry.end.ended_in_order() {
            // Closing resets instead of ending in order.
            let _ = sockopt::set_socket_linger(&entry.socket, Some(Duration::ZERO));
        }
    }
}

/// What is waited for, told once for each change.
fn flags() -> Flags {
    Flags::IN | Flags::OUT | Flags::RDHUP | Flags::ET
}

/// The largest segment that the guest may send.
fn own_mss(key: Key, mtu: u16) -> u16 {
    mtu.saturating_sub(if key.guest.is_ipv4() { 40 } else { 60 }).max(536)
}

/// For an error about a SYN.
pub fn offender(key: Key, seq: u32) -> Offender {
    Offender { src: key.guest, dst: key.remote, protocol: IpProtocol::Tcp, next: seq.to_be_bytes() }
}

/// A socket that is connecting to `target`.
fn open(target: Target) -> Result<OwnedFd, Why> {
    if target.must_not_be_host() && crate::udp::is_host(target) {
        return Err(Why::Prohibited);
    }
    let to = target.address();
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(|_| Why::Host)?;
    // The guest has thought about it already (RFC 896).
    let _ = sockopt::set_tcp_nodelay(&socket, true);
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => Ok(socket),
        Err(Errno::CONNREFUSED) => Err(Why::Port),
        Err(Errno::ACCESS | Errno::PERM) => Err(Why::Prohibited),
        Err(_) => Err(Why::Host),
    }
}

impl Entry {
    /// Nobody is where it was to be connected to: connects to the other address, if there is one.
    fn goes_on_otherwise(&mut self, id: Id, poll: &Poll) -> bool {
        let Some(Ok(socket)) = self.otherwise.take().map(open) else { return false };
        if poll.add(&socket, Token::Tcp(id), flags()).is_err() {
            return false;
        }
        (self.socket, self.readable, self.writable) = (socket, false, false);
        true
    }

    /// Moves data in both directions; `true` when there is more to do for which nothing must be waited for.
    fn turn(&mut self, link: &mut Link, now: Instant) -> bool {
        if self.connected && !self.end.is_half_open() {
            self.feed_host();
            self.read_host();
        }
        let size = match (self.key.guest, link.offloads) {
            (SocketAddr::V4(_), offloads) if offloads.tcp4 => MAX_SEGMENT,
            (SocketAddr::V6(_), offloads) if offloads.tcp6 => MAX_SEGMENT,
            _ => 0,
        };
        let most = size.max(usize::from(self.end.mss().min(own_mss(self.key, link.mtu()))));
        for _ in 0..TURN {
            if !link.has_room() {
                return true;
            }
            let Some(segment) = self.end.next(most, now) else {
                return self.readable && self.end.room_for_guest() > 0;
            };
            self.send(&segment, link);
            if segment.rst {
                return false;
            }
        }
        true
    }

    fn feed_host(&mut self) {
        while self.writable {
            let pieces = self.end.for_host();
            if pieces.iter().all(|piece| piece.is_empty()) {
                break;
            }
            match rustix::io::writev(&self.socket, &pieces) {
                Ok(count) => self.end.host_took(count),
                Err(Errno::AGAIN) => self.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return self.end.abort(),
            }
        }
        if self.end.guest_is_done() && !self.shut {
            self.shut = true;
            let _ = rustix::net::shutdown(&self.socket, Shutdown::Write);
        }
    }

    fn read_host(&mut self) {
        while self.readable && self.end.room_for_guest() > 0 {
            let result = rustix::io::readv(&self.socket, &mut self.end.slots(256 << 10));
            match result {
                Ok(0) => {
                    self.end.host_done();
                    self.readable = false;
                }
                Ok(count) => self.end.host_gave(count),
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return self.end.abort(),
            }
        }
    }

    fn send(&self, segment: &Segment, link: &mut Link) {
        let data = self.end.data(segment.data.clone());
        send_segment(link, self.key, segment, data, self.end.mss().min(own_mss(self.key, link.mtu())));
    }
}

/// Sends a segment of a connection to the guest; its data is of any length, the guest's is to take it in segments of `mss`.
fn send_segment(link: &mut Link, key: Key, segment: &Segment, data: [std::io::IoSlice<'_>; 2], mss: u16) {
    let mut options = Vec::with_capacity(8);
    if let Some(mss) = segment.mss {
        options.extend([2, 4]);
        options.extend(mss.to_be_bytes());
    }
    if let Some(shift) = segment.window_scale {
        options.extend([1, 3, 3, shift]);
    }
    let flags = [(segment.fin, 1), (segment.syn, 2), (segment.rst, 4), (segment.psh, 8), (segment.ack.is_some(), 16)];
    let flags = flags.iter().filter(|(on, _)| *on).fold(0u8, |flags, (_, bit)| flags | bit);
    let mut header = Vec::with_capacity(28);
    header.extend(key.remote.port().to_be_bytes());
    header.extend(key.guest.port().to_be_bytes());
    header.extend(segment.seq.to_be_bytes());
    header.extend(segment.ack.unwrap_or(0).to_be_bytes());
    header.extend([(20 + options.len() as u8) << 2, flags]);
    header.extend(segment.window.to_be_bytes());
    header.extend([0; 4]); // checksum, urgent pointer
    header.extend(options);
    link.send_transport(&Transport {
        src: key.remote.ip(),
        dst: key.guest.ip(),
        protocol: IpProtocol::Tcp,
        header: &header,
        checksum_at: 16,
        data,
        segment_size: Some(mss),
        hop_limit: 64,
    });
}

/// Resets what belongs to no connection (RFC 9293, 3.10.7.1).
pub fn refuse(link: &mut Link, key: Key, segment: &TcpRepr<'_>) {
    if segment.control == TcpControl::Rst {
        return;
    }
    let seq = segment.ack_number.map_or(0, |ack| ack.0 as u32);
    let len = segment.payload.len() as u32 + u32::from(matches!(segment.control, TcpControl::Syn | TcpControl::Fin));
    let ack = segment.ack_number.is_none().then(|| (segment.seq_number.0 as u32).wrapping_add(len));
    let reset = Segment {
        seq,
        ack,
        window: 0,
        syn: false,
        fin: false,
        rst: true,
        psh: false,
        mss: None,
        window_scale: None,
        data: 0..0,
    };
    send_segment(link, key, &reset, [std::io::IoSlice::new(&[]), std::io::IoSlice::new(&[])], 536);
}

/// Ends of a segment.
pub fn key_of(src: IpAddr, dst: IpAddr, segment: &TcpRepr<'_>) -> Key {
    Key { guest: SocketAddr::new(src, segment.src_port), remote: SocketAddr::new(dst, segment.dst_port) }
}
