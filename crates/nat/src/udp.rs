//! UDP: one connected socket for each pair of addresses, so that only the peer's answers come back, and errors with them.

use std::collections::HashMap;
use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrAny, SocketFlags, SocketType};
use smoltcp::wire::IpProtocol;

use crate::addresses::{GATEWAY, GUEST};
use crate::icmp::Why;
use crate::link::{Link, Transport};
use crate::policy::Target;
use crate::poll::{Flags, Poll, Token};
use crate::slab::{Id, Slab};

/// Flows at a time; the one longest silent makes room for a new one.
const MAX_FLOWS: usize = 1024;
/// Clients of a forwarded port at a time.
const MAX_PEERS: usize = 1024;
/// A flow without an answer is forgotten after so long (RFC 4787, 4.3, allows no less than 2 minutes for one with).
const UNANSWERED: Duration = Duration::from_secs(30);
const ANSWERED: Duration = Duration::from_secs(180);
/// A name server answers once.
const DNS_IDLE: Duration = Duration::from_secs(10);
/// Datagrams taken from one socket before others have their turn.
const TURN: usize = 64;

/// A datagram from the guest.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<'a> {
    /// From.
    pub src: SocketAddr,
    /// To, as the guest knows it.
    pub dst: SocketAddr,
    /// The data.
    pub data: &'a [u8],
}

/// Sends a datagram to the guest.
pub fn send_to_guest(link: &mut Link, src: SocketAddr, dst: SocketAddr, data: &[u8]) {
    let Ok(len) = u16::try_from(data.len() + 8) else { return };
    let mut header = [0; 8];
    let fields = [src.port(), dst.port(), len, 0];
    header.iter_mut().zip(fields.into_iter().flat_map(u16::to_be_bytes)).for_each(|(place, byte)| *place = byte);
    link.send_transport(&Transport {
        src: src.ip(),
        dst: dst.ip(),
        protocol: IpProtocol::Udp,
        header: &header,
        checksum_at: 6,
        data: [IoSlice::new(data), IoSlice::new(&[])],
        segment_size: None,
        hop_limit: 64,
    });
}

#[derive(Debug)]
struct Flow {
    socket: OwnedFd,
    guest: SocketAddr,
    /// As the guest knows it.
    remote: SocketAddr,
    last: Instant,
    answered: bool,
    /// The number of the name server it goes to.
    resolver: Option<usize>,
}

impl Flow {
    fn patience(&self) -> Duration {
        match (self.resolver, self.answered) {
            (Some(_), _) => DNS_IDLE,
            (None, true) => ANSWERED,
            (None, false) => UNANSWERED,
        }
    }
}

/// What came of reading a flow's socket.
#[derive(Debug, PartialEq, Eq)]
pub enum Received {
    /// Perhaps datagrams.
    Fine,
    /// The peer's host says that nobody listens there.
    Refused {
        /// Who sent.
        guest: SocketAddr,
        /// Where to.
        remote: SocketAddr,
    },
}

/// All flows.
#[derive(Debug)]
pub struct Flows {
    flows: Slab<Flow>,
    index: HashMap<(SocketAddr, SocketAddr), Id>,
    /// Name servers that did not answer, since the caller asked.
    failed_resolver: Option<usize>,
}

impl Default for Flows {
    fn default() -> Self {
        Self { flows: Slab::new(MAX_FLOWS), index: HashMap::new(), failed_resolver: None }
    }
}

impl Flows {
    /// The name server of the flow to which this datagram belongs, if there is one.
    pub fn resolver_of(&self, datagram: &Datagram<'_>) -> Option<usize> {
        let id = self.index.get(&(datagram.src, datagram.dst))?;
        self.flows.get(*id)?.resolver
    }

    /// Sends a datagram on to `target`. `resolver`: it is the name server of that number.
    ///
    /// # Errors
    /// Why it cannot be sent.
    pub fn send(
        &mut self,
        datagram: &Datagram<'_>,
        target: Target,
        resolver: Option<usize>,
        poll: &Poll,
        now: Instant,
    ) -> Result<(), Why> {
        let key = (datagram.src, datagram.dst);
        let id = match self.index.get(&key) {
            Some(id) => *id,
            None => {
                if self.flows.is_full() {
                    let oldest = self.flows.iter().min_by_key(|(_, flow)| flow.last).map(|(id, _)| id);
                    oldest.into_iter().for_each(|id| self.remove(id));
                }
                let made = self.flows.insert_with(|id| {
                    let socket = connect(target)?;
                    poll.add(&socket, Token::Udp(id), Flags::IN).map_err(|_| Why::Host)?;
                    let (guest, remote) = key;
                    Ok(Flow { socket, guest, remote, last: now, answered: false, resolver })
                });
                let id = made.unwrap_or(Err(Why::Host))?;
                self.index.insert(key, id);
                id
            }
        };
        let flow = self.flows.get_mut(id).ok_or(Why::Host)?;
        flow.last = now;
        match rustix::net::send(&flow.socket, datagram.data, SendFlags::DONTWAIT) {
            Err(Errno::CONNREFUSED) => {
                // Said of an earlier datagram; this one has its own chance.
                let _ = rustix::net::send(&flow.socket, datagram.data, SendFlags::DONTWAIT);
                Err(Why::Port)
            }
            Err(Errno::HOSTUNREACH | Errno::NETUNREACH) => Err(Why::Host),
            Err(Errno::PERM | Errno::ACCESS) => Err(Why::Prohibited),
            _ => Ok(()),
        }
    }

    /// Datagrams came.
    pub fn ready(&mut self, id: Id, link: &mut Link, buffer: &mut [u8], now: Instant) -> Received {
        let Some(flow) = self.flows.get_mut(id) else { return Received::Fine };
        for _ in 0..TURN {
            match rustix::net::recv(&flow.socket, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, len)) => {
                    flow.last = now;
                    flow.answered = true;
                    send_to_guest(link, flow.remote, flow.guest, buffer.get(..len).unwrap_or_default());
                }
                Err(Errno::CONNREFUSED) => {
                    let (guest, remote) = (flow.guest, flow.remote);
                    if let Some(number) = flow.resolver {
                        self.failed_resolver = Some(number);
                    }
                    return Received::Refused { guest, remote };
                }
                Err(_) => break,
            }
        }
        Received::Fine
    }

    /// The number of a name server that has been found not to answer.
    pub fn take_failed_resolver(&mut self) -> Option<usize> {
        self.failed_resolver.take()
    }

    /// Forgets silent flows; `true` while there are any.
    pub fn expire(&mut self, now: Instant) -> bool {
        for id in self.flows.ids() {
            let Some(flow) = self.flows.get(id) else { continue };
            if now.saturating_duration_since(flow.last) > flow.patience() {
                if let (Some(number), false) = (flow.resolver, flow.answered) {
                    self.failed_resolver = Some(number);
                }
                self.remove(id);
            }
        }
        self.flows.len() > 0
    }

    /// Forgets all flows.
    pub fn clear(&mut self) {
        self.flows.ids().into_iter().for_each(|id| self.remove(id));
    }

    fn remove(&mut self, id: Id) {
        if let Some(flow) = self.flows.remove(id) {
            self.index.remove(&(flow.guest, flow.remote));
        }
    }
}

/// A socket connected to `target`.
fn connect(target: Target) -> Result<OwnedFd, Why> {
    let to = target.address();
    let family = if to.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::DGRAM, flags, None).map_err(|_| Why::Host)?;
    rustix::net::connect(&socket, &to).map_err(|_| Why::Host)?;
    if target.must_not_be_host() && own_address(&socket) == Some(to.ip()) {
        return Err(Why::Prohibited);
    }
    Ok(socket)
}

fn own_address(socket: &OwnedFd) -> Option<IpAddr> {
    let address = rustix::net::getsockname(socket).ok()?;
    Some(SocketAddr::try_from(address).ok()?.ip())
}

/// Does a way to `target` end at this host itself? Asks the routing table and sends nothing: who talks to one of the host's own
/// addresses does so from that same address.
pub fn is_host(target: Target) -> bool {
    matches!(connect(target), Err(Why::Prohibited))
}

/// A forwarded port: what comes to a socket of the host goes to the guest, in the name of the gateway.
#[derive(Debug)]
pub struct Forward {
    socket: OwnedFd,
    guest_port: u16,
    /// The gateway's port that stands for a client.
    peers: HashMap<SocketAddr, (u16, Instant)>,
    ports: HashMap<u16, SocketAddr>,
}

impl Forward {
    /// From `socket`, bound already, to the guest's `guest_port`.
    pub fn new(socket: OwnedFd, guest_port: u16) -> Self {
        Self { socket, guest_port, peers: HashMap::new(), ports: HashMap::new() }
    }

    /// Datagrams came.
    pub fn ready(&mut self, link: &mut Link, buffer: &mut [u8], now: Instant) {
        for _ in 0..TURN {
            let received = rustix::net::recvfrom(&self.socket, &mut *buffer, RecvFlags::DONTWAIT);
            let (len, from) = match received {
                Ok((_, len, from)) => (len, from),
                Err(Errno::AGAIN) => return,
                Err(_) => continue, // an error of an earlier datagram
            };
            let Some(peer) = from.and_then(|from: SocketAddrAny| SocketAddr::try_from(from).ok()) else { continue };
            let Some(port) = self.port_for(peer, now) else { continue };
            let (src, dst) = (SocketAddr::new(GATEWAY.into(), port), SocketAddr::new(GUEST.into(), self.guest_port));
            send_to_guest(link, src, dst, buffer.get(..len).unwrap_or_default());
        }
    }

    fn port_for(&mut self, peer: SocketAddr, now: Instant) -> Option<u16> {
        if let Some((port, last)) = self.peers.get_mut(&peer) {
            *last = now;
            return Some(*port);
        }
        if self.peers.len() >= MAX_PEERS {
            let oldest = self.peers.iter().min_by_key(|(_, (_, last))| *last).map(|(peer, _)| *peer)?;
            let (port, _) = self.peers.remove(&oldest)?;
            self.ports.remove(&port);
        }
        // The client's own port if it is free, else the next; 1024 of them cannot fill 60,000.
        let first = peer.port().max(1024);
        let port = (first..=u16::MAX).chain(1024..first).find(|port| !self.ports.contains_key(port))?;
        self.peers.insert(peer, (port, now));
        self.ports.insert(port, peer);
        Some(port)
    }

    /// Is this datagram an answer to a client of this port? Then it is sent there.
    pub fn answer(&mut self, datagram: &Datagram<'_>, now: Instant) -> bool {
        let to_gateway = datagram.dst.ip() == IpAddr::from(GATEWAY) && datagram.src.port() == self.guest_port;
        let Some(peer) = self.ports.get(&datagram.dst.port()).filter(|_| to_gateway) else { return false };
        if let Some((_, last)) = self.peers.get_mut(peer) {
            *last = now;
        }
        let _ = rustix::net::sendto(&self.socket, datagram.data, SendFlags::DONTWAIT, peer);
        true
    }

    /// Forgets silent clients; `true` while there are any.
    pub fn expire(&mut self, now: Instant) -> bool {
        self.peers.retain(|_, (_, last)| now.saturating_duration_since(*last) < ANSWERED);
        let peers = &self.peers;
        self.ports.retain(|_, peer| peers.contains_key(peer));
        !self.peers.is_empty()
    }
}
