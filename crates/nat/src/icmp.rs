//! ICMP: echo requests, which go out through the host's own ping sockets, and the errors that the guest is told of.

use std::collections::HashMap;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};
use smoltcp::wire::IpProtocol;

use crate::addresses::{GATEWAY, GATEWAY6};
use crate::checksum::checksum;
use crate::link::{Link, Transport};
use crate::policy::Target;
use crate::poll::{Flags, Poll, Token};
use crate::slab::{Id, Slab};

/// Addresses that are asked at a time.
const MAX_FLOWS: usize = 64;
/// For so long an answer is waited for.
const IDLE: Duration = Duration::from_secs(30);
/// Type numbers of requests and replies.
const ECHO: [u8; 2] = [8, 128];
const REPLY: [u8; 2] = [0, 129];
/// Bytes of an echo message before its data.
const HEADER: usize = 8;

/// A packet of the guest's that caused an error.
#[derive(Clone, Copy, Debug)]
pub struct Offender {
    /// From, with its port.
    pub src: SocketAddr,
    /// To, with its port.
    pub dst: SocketAddr,
    /// The protocol.
    pub protocol: IpProtocol,
    /// What follows the ports: four bytes, the sequence number of TCP.
    pub next: [u8; 4],
}

/// Why a packet does not arrive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Nobody listens there.
    Port,
    /// There is no way there.
    Host,
    /// It is not allowed.
    Prohibited,
}

/// Tells the guest that its packet did not arrive (RFC 792; RFC 4443, 3.1).
pub fn send_error(link: &mut Link, offender: &Offender, why: Why) {
    let (dst, to) = (offender.dst.ip(), offender.src.ip());
    let (kind, code, protocol) = match (dst, why) {
        (IpAddr::V4(_), Why::Port) => (3, 3, IpProtocol::Icmp),
        (IpAddr::V4(_), Why::Host) => (3, 1, IpProtocol::Icmp),
        (IpAddr::V4(_), Why::Prohibited) => (3, 13, IpProtocol::Icmp),
        (IpAddr::V6(_), Why::Port) => (1, 4, IpProtocol::Icmpv6),
        (IpAddr::V6(_), Why::Host) => (1, 3, IpProtocol::Icmpv6),
        (IpAddr::V6(_), Why::Prohibited) => (1, 1, IpProtocol::Icmpv6),
    };
    let mut quote = Vec::with_capacity(48);
    match (to, dst) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            quote.extend([0x45, 0, 0, 28, 0, 0, 0x40, 0, 64, offender.protocol.into(), 0, 0]);
            quote.extend(from.octets());
            quote.extend(to.octets());
            let sum = checksum(&quote);
            if let Some(field) = quote.get_mut(10..12) {
                field.copy_from_slice(&sum.to_be_bytes());
            }
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            quote.extend([0x60, 0, 0, 0, 0, 8, offender.protocol.into(), 64]);
            quote.extend(from.octets());
            quote.extend(to.octets());
        }
        _ => return,
    }
    quote.extend(offender.src.port().to_be_bytes());
    quote.extend(offender.dst.port().to_be_bytes());
    quote.extend(offender.next);
    // A closed port is its owner's word, all else the gateway's.
    let src = match (why, dst) {
        (Why::Port, dst) => dst,
        (_, IpAddr::V4(_)) => GATEWAY.into(),
        (_, IpAddr::V6(_)) => GATEWAY6.into(),
    };
    send_message(link, src, to, protocol, &[kind, code, 0, 0, 0, 0, 0, 0], &quote);
}

/// Sends a message of ICMP; its checksum field is 0.
pub fn send_message(link: &mut Link, src: IpAddr, dst: IpAddr, protocol: IpProtocol, header: &[u8], data: &[u8]) {
    let data = [IoSlice::new(data), IoSlice::new(&[])];
    // Neighbour discovery insists on 255 (RFC 4861, 7.1).
    let hop_limit = if protocol == IpProtocol::Icmpv6 { 255 } else { 64 };
    link.send_transport(&Transport { src, dst, protocol, header, checksum_at: 2, data, segment_size: None, hop_limit });
}

/// An echo request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Echo<'a> {
    /// From.
    pub src: IpAddr,
    /// To.
    pub dst: IpAddr,
    /// Names the asking program.
    pub id: u16,
    /// The whole message.
    pub message: &'a [u8],
}

impl<'a> Echo<'a> {
    /// Reads a message with a good checksum; `None` if it is no echo request.
    pub fn parse(src: IpAddr, dst: IpAddr, message: &'a [u8]) -> Option<Self> {
        let [kind, 0, _, _, i0, i1, ..] = *message else { return None };
        let request = kind == if src.is_ipv4() { ECHO[0] } else { ECHO[1] };
        (request && message.len() >= HEADER).then_some(Self { src, dst, id: u16::from_be_bytes([i0, i1]), message })
    }

    /// Answers it in the name of `dst`.
    pub fn answer(&self, link: &mut Link) {
        send_reply(link, self.dst, self.src, self.id, self.message);
    }

    /// For an error about it.
    pub fn offender(&self) -> Offender {
        let word = |at| self.message.get(at..at + 2).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
        Offender {
            // The place of the ports holds type, code and checksum, that of the rest the identifier.
            src: SocketAddr::new(self.src, u16::from_be_bytes(word(0))),
            dst: SocketAddr::new(self.dst, u16::from_be_bytes(word(2))),
            protocol: if self.src.is_ipv4() { IpProtocol::Icmp } else { IpProtocol::Icmpv6 },
            next: self.message.get(4..8).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default(),
        }
    }
}

fn send_reply(link: &mut Link, src: IpAddr, dst: IpAddr, id: u16, message: &[u8]) {
    let (protocol, kind) = if dst.is_ipv4() { (IpProtocol::Icmp, REPLY[0]) } else { (IpProtocol::Icmpv6, REPLY[1]) };
    let ([i0, i1], [s0, s1]) = (id.to_be_bytes(), [6, 7].map(|at| message.get(at).copied().unwrap_or(0)));
    let data = message.get(HEADER..).unwrap_or_default();
    send_message(link, src, dst, protocol, &[kind, 0, 0, 0, i0, i1, s0, s1], data);
}

#[derive(Debug)]
struct Flow {
    socket: OwnedFd,
    src: IpAddr,
    /// As the guest knows it.
    dst: IpAddr,
    id: u16,
    last: Instant,
}

/// Echo requests that are on their way.
#[derive(Debug)]
pub struct Echoes {
    flows: Slab<Flow>,
    index: HashMap<(IpAddr, IpAddr, u16), Id>,
}

impl Default for Echoes {
    fn default() -> Self {
        Self { flows: Slab::new(MAX_FLOWS), index: HashMap::new() }
    }
}

impl Echoes {
    /// Sends a request on to `target`.
    ///
    /// # Errors
    /// Why it cannot be sent.
    pub fn send(&mut self, echo: &Echo<'_>, target: Target, poll: &Poll, now: Instant) -> Result<(), Why> {
        let key = (echo.src, echo.dst, echo.id);
        let id = match self.index.get(&key) {
            Some(id) => *id,
            None => {
                if self.flows.is_full() {
                    let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.last).map(|(id, _)| id);
                    oldest.into_iter().for_each(|id| self.remove(id));
                }
                let made = self.flows.insert_with(|id| {
                    let socket = open(target.address().ip())?;
                    poll.add(&socket, Token::Echo(id), Flags::IN).map_err(|_| Why::Host)?;
                    Ok(Flow { socket, src: echo.src, dst: echo.dst, id: echo.id, last: now })
                });
                let id = made.unwrap_or(Err(Why::Host))?;
                self.index.insert(key, id);
                id
            }
        };
        let flow = self.flows.get_mut(id).ok_or(Why::Host)?;
        flow.last = now;
        match rustix::net::send(&flow.socket, echo.message, SendFlags::DONTWAIT) {
            Err(rustix::io::Errno::HOSTUNREACH | rustix::io::Errno::NETUNREACH) => Err(Why::Host),
            Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Err(Why::Prohibited),
            _ => Ok(()),
        }
    }

    /// Replies came.
    pub fn ready(&mut self, id: Id, link: &mut Link, buffer: &mut [u8]) {
        let Some(flow) = self.flows.get_mut(id) else { return };
        for _ in 0..16 {
            let Ok((_, len)) = rustix::net::recv(&flow.socket, &mut *buffer, RecvFlags::DONTWAIT) else { return };
            if let Some(message) = buffer.get(..len).filter(|message| message.len() >= HEADER) {
                send_reply(link, flow.dst, flow.src, flow.id, message);
            }
        }
    }

    /// Forgets old requests; `true` while there are any.
    pub fn expire(&mut self, now: Instant) -> bool {
        for id in self.flows.ids() {
            if self.flows.get(id).is_some_and(|flow| now.saturating_duration_since(flow.last) > IDLE) {
                self.remove(id);
            }
        }
        self.flows.len() > 0
    }

    /// Forgets all requests.
    pub fn clear(&mut self) {
        self.flows.ids().into_iter().for_each(|id| self.remove(id));
    }

    fn remove(&mut self, id: Id) {
        if let Some(flow) = self.flows.remove(id) {
            self.index.remove(&(flow.src, flow.dst, flow.id));
        }
    }
}

/// A ping socket (Linux, icmp(7): `net.ipv4.ping_group_range` says who may have one).
fn open(to: IpAddr) -> Result<OwnedFd, Why> {
    let (family, protocol) =
        if to.is_ipv4() { (AddressFamily::INET, ipproto::ICMP) } else { (AddressFamily::INET6, ipproto::ICMPV6) };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, Some(protocol));
    let socket = socket.map_err(|_| Why::Prohibited)?;
    rustix::net::connect(&socket, &SocketAddr::new(to, 0)).map_err(|_| Why::Host)?;
    Ok(socket)
}
