//! All connections of one guest, and the packets that go to and come from it. No queues, no threads: `worker` has those.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use super::connection::{Connection, Next, Phase, Ports};
use super::packet::{HEADER, HOST_CID, Header, STREAM, op};
use super::stream::{self, Epoll, Ready};
use super::{Dial, MAX_CONNECTIONS};

/// Packets without payload that wait for the guest's buffers. With more, nothing is taken from the guest.
const MAX_CONTROL: usize = 256;
/// Host programs that have connected and not yet said which port they want.
const MAX_CALLERS: usize = 64;
/// The longest line with which they say it.
const MAX_LINE: usize = 32;
/// The first port given to the host's end of connections that it makes.
const FIRST_PORT: u32 = 1 << 30;
/// Payload of one packet, at most.
const MAX_PAYLOAD: usize = 64 << 10;
/// Tokens of the epoll set that are no connection's.
pub(super) const WAKE: u64 = 0;
const LISTENER: u64 = 1;

/// A host program that has connected and not yet said which port it wants.
struct Caller {
    stream: OwnedFd,
    line: Vec<u8>,
}

pub(super) struct Muxer {
    cid: u64,
    listener: Option<OwnedFd>,
    dial: Dial,
    pub(super) epoll: Epoll,
    connections: BTreeMap<Ports, Connection>,
    /// Which connection a token of the epoll set means.
    tokens: HashMap<u64, Ports>,
    callers: HashMap<u64, Caller>,
    next_token: u64,
    next_port: u32,
    /// Without payload, for the guest.
    control: VecDeque<Header>,
    /// Connections that may have something for the guest.
    list: VecDeque<Ports>,
    scratch: Vec<u8>,
}

impl Muxer {
    pub(super) fn new(cid: u64, listener: Option<OwnedFd>, dial: Dial) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        if let Some(listener) = &listener {
            stream::set_nonblocking(listener)?;
            epoll.add(listener.as_raw_fd(), LISTENER)?;
        }
        Ok(Self {
            cid,
            listener,
            dial,
            epoll,
            connections: BTreeMap::new(),
            tokens: HashMap::new(),
            callers: HashMap::new(),
            next_token: LISTENER + 1,
            next_port: FIRST_PORT,
            control: VecDeque::new(),
            list: VecDeque::new(),
            scratch: Vec::new(),
        })
    }

    /// Ends all connections: the guest knows of none any more.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.control.clear();
        self.list.clear();
    }

    /// Can packets of the guest be taken?
    pub(super) fn takes(&self) -> bool {
        self.control.len() < MAX_CONTROL
    }

    /// May there be packets for the guest?
    pub(super) fn has_something(&self) -> bool {
        !self.control.is_empty() || !self.list.is_empty()
    }

    #[cfg(any(test, feature = "test-utils"))]
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    fn token(&mut self) -> u64 {
        self.next_token += 1;
        self.next_token
    }

    /// Something happened to a descriptor.
    pub(super) fn ready(&mut self, ready: Ready) {
        if ready.token == LISTENER {
            self.accept();
        } else if self.callers.contains_key(&ready.token) {
            self.hear(ready.token);
        } else if let Some(ports) = self.tokens.get(&ready.token).copied() {
            let Some(connection) = self.connections.get_mut(&ports) else { return };
            connection.ready(ready);
            if connection.is_abandoned() {
                return self.reset(ports);
            }
            let next = connection.flush();
            self.after(ports, next);
        }
    }

    /// Takes host programs that connect.
    fn accept(&mut self) {
        while let Some(stream) = self.listener.as_ref().and_then(stream::accept) {
            let token = self.token();
            // Those beyond the bound are hung up on.
            if self.callers.len() < MAX_CALLERS && self.epoll.add(stream.as_raw_fd(), token).is_ok() {
                self.callers.insert(token, Caller { stream, line: Vec::new() });
                self.hear(token);
            }
        }
    }

    /// Reads `CONNECT port\n`, and not a byte more: what follows is the guest's.
    fn hear(&mut self, token: u64) {
        let Some(caller) = self.callers.get_mut(&token) else { return };
        let port = loop {
            let mut byte = [0];
            match stream::read(&caller.stream, &mut byte) {
                Ok(Some(1)) if byte == [b'\n'] => break parse(&caller.line),
                Ok(Some(1)) if caller.line.len() < MAX_LINE => caller.line.extend(byte),
                Ok(None) => return,
                _ => break None,
            }
        };
        let Some(caller) = self.callers.remove(&token) else { return };
        if let Some(port) = port {
            self.open(caller.stream, token, port);
        }
    }

    /// Asks the guest for a connection to its `port`.
    fn open(&mut self, stream: OwnedFd, token: u64, port: u32) {
        if !self.has_room() || !self.takes() {
            return;
        }
        let mut ports = Ports { host: self.next_port, guest: port };
        while self.connections.contains_key(&ports) {
            ports.host = ports.host.wrapping_add(1).max(FIRST_PORT);
        }
        self.next_port = ports.host.wrapping_add(1).max(FIRST_PORT);
        let mut connection = Connection::new(stream, token, Phase::Asked);
        let mut header = self.header(ports, op::REQUEST);
        connection.stamp(&mut header);
        self.tokens.insert(token, ports);
        self.connections.insert(ports, connection);
        self.control.push_back(header);
    }

    /// Is there room for one more connection? Those that the guest does not let go of make room.
    fn has_room(&mut self) -> bool {
        if self.connections.len() >= MAX_CONNECTIONS {
            let closing = self.connections.iter().find(|(_, connection)| connection.phase == Phase::Closing);
            if let Some(ports) = closing.map(|(ports, _)| *ports) {
                self.forget(ports);
            }
        }
        self.connections.len() < MAX_CONNECTIONS
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: STREAM,
            op,
            ..Header::default()
        }
    }

    fn forget(&mut self, ports: Ports) {
        if let Some(connection) = self.connections.remove(&ports) {
            self.tokens.remove(&connection.token);
        }
    }

    /// Ends a connection and tells the guest.
    fn reset(&mut self, ports: Ports) {
        self.forget(ports);
        let header = self.header(ports, op::RST);
        self.control.push_back(header);
    }

    fn after(&mut self, ports: Ports, next: Next) {
        if next == Next::Reset {
            return self.reset(ports);
        }
        if let Some(connection) = self.connections.get_mut(&ports)
            && !connection.listed
            && connection.has_something()
        {
            connection.listed = true;
            self.list.push_back(ports);
        }
    }

    /// A packet of the guest: its header and what it brought as payload.
    pub(super) fn packet(&mut self, header: &Header, payload: &[u8]) {
        // Who claims another address, or means another than the host, is not answered.
        if header.src_cid != self.cid || header.dst_cid != HOST_CID {
            return;
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let whole = header.len as usize == payload.len() && payload.len() <= MAX_PAYLOAD;
        if header.kind != STREAM || !whole {
            if header.op != op::RST {
                self.forget(ports);
                let answer = Header { kind: header.kind, ..self.header(ports, op::RST) };
                self.control.push_back(answer);
            }
            return;
        }
        if header.op == op::REQUEST {
            return self.request(ports, header);
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            if header.op != op::RST {
                self.reset(ports);
            }
            return;
        };
        connection.credit(header);
        let next = match (header.op, connection.phase) {
            (op::RST, _) => return self.forget(ports),
            (op::RESPONSE, Phase::Asked) => connection.opened(format!("OK {}\n", ports.host).as_bytes()),
            (_, Phase::Asked) | (op::RESPONSE, _) => Next::Reset,
            (op::SHUTDOWN, Phase::Open) => connection.shutdown(header.flags),
            (op::SHUTDOWN, Phase::Closing) => Next::Reset,
            (op::RW, Phase::Open) => connection.data(payload),
            // On the way when the host's end went.
            (op::RW, Phase::Closing) => Next::Go,
            (op::CREDIT_UPDATE, _) => Next::Go,
            (op::CREDIT_REQUEST, _) => {
                let mut answer = Header { op: op::CREDIT_UPDATE, ..Header::default() };
                connection.stamp(&mut answer);
                let (buf_alloc, fwd_cnt) = (answer.buf_alloc, answer.fwd_cnt);
                let answer = Header { buf_alloc, fwd_cnt, ..self.header(ports, op::CREDIT_UPDATE) };
                self.control.push_back(answer);
                Next::Go
            }
            _ => Next::Reset,
        };
        self.after(ports, next);
    }

    /// The guest wants a connection to the host.
    fn request(&mut self, ports: Ports, header: &Header) {
        self.forget(ports);
        let stream = if self.has_room() { (self.dial)(ports.host, ports.guest) } else { None };
        let token = self.token();
        let stream = stream.map(OwnedFd::from).filter(|stream| {
            stream::set_nonblocking(stream).is_ok() && self.epoll.add(stream.as_raw_fd(), token).is_ok()
        });
        let Some(stream) = stream else { return self.reset(ports) };
        let mut connection = Connection::new(stream, token, Phase::Open);
        connection.credit(header);
        let mut answer = self.header(ports, op::RESPONSE);
        connection.stamp(&mut answer);
        self.control.push_back(answer);
        self.tokens.insert(token, ports);
        self.connections.insert(ports, connection);
        self.after(ports, Next::Go);
    }

    /// The next packet for the guest, of at most `room` bytes. Less than a header is no room.
    pub(super) fn next_packet(&mut self, room: usize) -> Option<(Header, &[u8])> {
        let room = room.checked_sub(HEADER)?.min(MAX_PAYLOAD);
        if let Some(header) = self.control.pop_front() {
            return Some((header, &[]));
        }
        while let Some(ports) = self.list.pop_front() {
            let mut header = self.header(ports, op::RW);
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            connection.listed = false;
            let given = connection.next_packet(room, &mut header, &mut self.scratch);
            if given {
                connection.stamp(&mut header);
            }
            // To the end of the list: all have their turn.
            self.after(ports, Next::Go);
            if given {
                return Some((header, &self.scratch));
            }
        }
        None
    }
}

/// The port of `CONNECT port`.
fn parse(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.trim_end_matches('\r').strip_prefix("CONNECT ")?.parse().ok()
}
