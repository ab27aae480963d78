//! One guest's network: takes what comes from the cable and the host's sockets to where it belongs.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use smoltcp::wire::{
    EthernetAddress, Icmpv4Packet, Icmpv6Packet, IpProtocol, TcpControl, TcpPacket, TcpRepr, UdpPacket, UdpRepr,
};

use crate::addresses::{GATEWAY, GATEWAY6, GUEST, is_guest, is_ours};
use crate::checksum::checksum;
use crate::config::NatConfig;
use crate::fragment::{self, Reassembly};
use crate::frame::{Frame, Ip, MAX_FRAME, Payload, checksums};
use crate::icmp::{Echo, Echoes, Offender, Why, send_error, send_message};
use crate::link::{Link, Offloads};
use crate::policy::{self, Target, Verdict};
use crate::poll::{Flags, Poll, Token};
use crate::tcp::{self, Key, Table};
use crate::udp::{Datagram, Flows, Forward, Received, send_to_guest};
use crate::{arp, dhcp, dns, ndp};

/// Frames taken from the cable before the connections have their turn.
const TURN: usize = 32;
/// How often flows are looked at for having been silent too long.
const SWEEP: Duration = Duration::from_secs(2);
/// Descriptors kept free for other things than TCP connections.
const RESERVED_FILES: u64 = 1300;
/// ICMPv6 message types (RFC 4861, 4).
const ROUTER_SOLICITATION: u8 = 133;
const NEIGHBOR_SOLICITATION: u8 = 135;

/// A port of the host that leads to the guest.
#[derive(Debug)]
pub enum PortForward {
    /// A listening socket, and the guest's port.
    Tcp(OwnedFd, u16),
    /// A bound socket, and the guest's port.
    Udp(OwnedFd, u16),
}

#[derive(Debug)]
enum Opened {
    Tcp { listener: OwnedFd, port: u16, paused: bool },
    Udp(Forward),
}

/// The network of one guest.
#[derive(Debug)]
pub struct Nat {
    config: NatConfig,
    link: Link,
    poll: Poll,
    tcp: Table,
    udp: Flows,
    echoes: Echoes,
    forwards: Vec<Opened>,
    reassembly: Reassembly,
    /// Which name server is asked.
    resolver: usize,
    buffer: Vec<u8>,
    frame: Vec<u8>,
    swept: Instant,
    /// There are flows that may have to be forgotten.
    flowing: bool,
    /// The cable may have frames that were left for later.
    pending: bool,
}

impl Nat {
    /// A network over `cable`, a non-blocking socket that keeps frames apart.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(config: NatConfig, cable: OwnedFd, forwards: Vec<PortForward>) -> io::Result<Self> {
        let now = Instant::now();
        let poll = Poll::new()?;
        poll.add(&cable, Token::Link, Flags::IN)?;
        let mut opened = Vec::new();
        for (number, forward) in forwards.into_iter().enumerate() {
            opened.push(match forward {
                PortForward::Tcp(listener, port) => {
                    poll.add(&listener, Token::Forward(number), Flags::IN)?;
                    Opened::Tcp { listener, port, paused: false }
                }
                PortForward::Udp(socket, port) => {
                    poll.add(&socket, Token::Forward(number), Flags::IN)?;
                    Opened::Udp(Forward::new(socket, port))
                }
            });
        }
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
        let connections = files.saturating_sub(RESERVED_FILES).max(64);
        Ok(Self {
            link: Link::new(cable, EthernetAddress(config.guest_mac), config.mtu, config.rate, now),
            poll,
            tcp: Table::new(usize::try_from(connections).unwrap_or(usize::MAX), now),
            udp: Flows::default(),
            echoes: Echoes::default(),
            forwards: opened,
            reassembly: Reassembly::default(),
            resolver: 0,
            buffer: vec![0; 65536],
            frame: vec![0; MAX_FRAME],
            swept: now,
            flowing: false,
            pending: false,
            config,
        })
    }

    /// Connections of TCP that are there now.
    pub fn connections(&self) -> usize {
        self.tcp.len()
    }

    /// Waits until there is something to do, for `at_most`, and does it.
    ///
    /// # Errors
    /// The cable's other end is gone.
    pub fn turn(&mut self, at_most: Option<Duration>) -> io::Result<()> {
        let timeout = self.timeout(at_most);
        let flags = if self.link.is_full() { Flags::OUT } else { Flags::empty() };
        let wanted = if self.link.is_throttled() { flags } else { flags | Flags::IN };
        self.poll.change(&self.link, Token::Link, wanted)?;
        let events = self.poll.wait(timeout)?;
        let now = Instant::now();
        self.link.set_time(now);
        let mut from_guest = self.pending;
        for (token, flags) in events {
            match token {
                Token::Link => {
                    if flags.contains(Flags::OUT) {
                        self.link.flush();
                    }
                    from_guest |= flags.intersects(Flags::IN | Flags::HUP | Flags::ERR);
                }
                Token::Tcp(id) => self.tcp.event(id, flags, &mut self.link, &self.poll),
                Token::Udp(id) => self.udp_ready(id, now),
                Token::Echo(id) => self.echoes.ready(id, &mut self.link, &mut self.buffer),
                Token::Forward(number) => self.forward_ready(number, now),
            }
        }
        if from_guest {
            self.serve_guest(now)?;
        }
        self.tcp.check_deadlines(now);
        self.tcp.work(&mut self.link, now);
        self.sweep(now);
        Ok(())
    }

    fn timeout(&mut self, at_most: Option<Duration>) -> Option<Duration> {
        let now = Instant::now();
        self.link.set_time(now);
        let room = self.link.has_room();
        if self.pending && !self.link.is_throttled() || self.tcp.has_work() && room {
            return Some(Duration::ZERO);
        }
        let limit = self.link.pause();
        let sweep = (self.flowing || self.tcp.len() > 0).then_some(SWEEP);
        [at_most, self.tcp.next_timeout(now), limit, sweep].into_iter().flatten().min()
    }

    fn serve_guest(&mut self, now: Instant) -> io::Result<()> {
        self.pending = true;
        let mut frame = std::mem::take(&mut self.frame);
        for _ in 0..TURN {
            match self.link.receive(&mut frame) {
                Ok(Some(len)) => self.frame(frame.get(..len).unwrap_or_default(), now),
                Ok(None) => {
                    self.pending = self.link.is_throttled();
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        self.frame = frame;
        Ok(())
    }

    /// Deals with one frame, or message about the driver, from the cable.
    pub fn frame(&mut self, bytes: &[u8], now: Instant) {
        if let Some(offloads) = Offloads::parse(bytes) {
            // A driver took over: what there was belongs to nobody any more.
            self.link.offloads = offloads;
            self.tcp.clear();
            self.udp.clear();
            self.echoes.clear();
            self.reassembly = Reassembly::default();
            return;
        }
        let Some(frame) = Frame::parse(bytes) else { return };
        self.link.set_mac(frame.source);
        match frame.payload {
            Payload::Arp(packet) => {
                if let Some(answer) = arp::answer(packet) {
                    self.link.send_arp(&answer);
                }
            }
            Payload::Ip(ip) => self.ip(&ip, frame.trusted, now),
        }
    }

    fn ip(&mut self, ip: &Ip<'_>, trusted: bool, now: Instant) {
        let unknown = ip.src.is_unspecified();
        if !is_guest(ip.src) && !unknown {
            return;
        }
        if let Some(piece) = ip.fragment {
            if !unknown
                && fragment::is_wanted(ip.protocol)
                && let Some(payload) = self.reassembly.add(ip, piece, now)
            {
                // Its checksum was not left to the device: a packet in fragments has one.
                self.ip(&Ip { fragment: None, payload: &payload, ..*ip }, false, now);
            }
            return;
        }
        match ip.protocol {
            IpProtocol::Udp => self.udp(ip, trusted, now),
            IpProtocol::Tcp if !unknown => self.tcp(ip, trusted, now),
            IpProtocol::Icmp if !unknown && ip.src.is_ipv4() => self.icmp4(ip, now),
            IpProtocol::Icmpv6 if ip.src.is_ipv6() => self.icmp6(ip, now),
            _ => {}
        }
    }

    fn tcp(&mut self, ip: &Ip<'_>, trusted: bool, now: Instant) {
        let Ok(packet) = TcpPacket::new_checked(ip.payload) else { return };
        let (src, dst) = (ip.src.into(), ip.dst.into());
        let Ok(segment) = TcpRepr::parse(&packet, &src, &dst, &checksums(trusted)) else { return };
        let key = tcp::key_of(ip.src, ip.dst, &segment);
        if self.tcp.segment(key, &segment, now) {
            return;
        }
        if segment.control != TcpControl::Syn || segment.ack_number.is_some() {
            return tcp::refuse(&mut self.link, key, &segment);
        }
        if let Err(why) = self.tcp_connect(key, &segment, now) {
            self.tcp_refused(key, &segment, why);
        }
    }

    fn tcp_connect(&mut self, key: Key, syn: &TcpRepr<'_>, now: Instant) -> Result<(), Why> {
        let target = match policy::decide(&self.config, key.remote) {
            Verdict::Pass(target) => target,
            Verdict::Dns => self.resolver().ok_or(Why::Port)?,
            Verdict::Refuse if is_ours(key.remote.ip()) => return Err(Why::Port),
            Verdict::Refuse => return Err(Why::Prohibited),
            Verdict::Drop => return Ok(()),
        };
        self.tcp.connect(key, syn, target, self.link.mtu(), &self.poll, now)
    }

    fn tcp_refused(&mut self, key: Key, syn: &TcpRepr<'_>, why: Why) {
        match why {
            Why::Port => tcp::refuse(&mut self.link, key, syn),
            _ => send_error(&mut self.link, &tcp::offender(key, syn.seq_number.0 as u32), why),
        }
    }

    fn udp(&mut self, ip: &Ip<'_>, trusted: bool, now: Instant) {
        let Ok(packet) = UdpPacket::new_checked(ip.payload) else { return };
        let (src, dst) = (ip.src.into(), ip.dst.into());
        let Ok(ports) = UdpRepr::parse(&packet, &src, &dst, &checksums(trusted)) else { return };
        if ports.dst_port == dhcp::SERVER_PORT && ip.src.is_ipv4() {
            return self.dhcp(packet.payload());
        }
        if ip.src.is_unspecified() || ports.src_port == 0 {
            return;
        }
        let datagram = Datagram {
            src: SocketAddr::new(ip.src, ports.src_port),
            dst: SocketAddr::new(ip.dst, ports.dst_port),
            data: packet.payload(),
        };
        for forward in &mut self.forwards {
            if let Opened::Udp(forward) = forward
                && forward.answer(&datagram, now)
            {
                return;
            }
        }
        if let Err(why) = self.datagram(&datagram, now) {
            let offender = Offender { src: datagram.src, dst: datagram.dst, protocol: IpProtocol::Udp, next: [0; 4] };
            send_error(&mut self.link, &offender, why);
        }
    }

    fn datagram(&mut self, datagram: &Datagram<'_>, now: Instant) -> Result<(), Why> {
        self.flowing = true;
        match policy::decide(&self.config, datagram.dst) {
            Verdict::Pass(target) => self.udp.send(datagram, target, None, &self.poll, now),
            Verdict::Dns => {
                if let dns::Outcome::Answer(answer) = dns::look(&self.config, datagram.data) {
                    send_to_guest(&mut self.link, datagram.dst, datagram.src, &answer);
                    return Ok(());
                }
                let number = self.udp.resolver_of(datagram).unwrap_or(self.resolver);
                let target = self.config.resolvers.get(number).map(|address| policy::resolver(*address));
                let sent = target
                    .ok_or(Why::Host)
                    .and_then(|target| self.udp.send(datagram, target, Some(number), &self.poll, now));
                if sent.is_err() {
                    self.resolver_failed(number);
                    send_to_guest(&mut self.link, datagram.dst, datagram.src, &dns::failure(datagram.data));
                }
                Ok(())
            }
            Verdict::Refuse if is_ours(datagram.dst.ip()) => Err(Why::Port),
            Verdict::Refuse => Err(Why::Prohibited),
            Verdict::Drop => Ok(()),
        }
    }

    fn udp_ready(&mut self, id: u64, now: Instant) {
        let received = self.udp.ready(id, &mut self.link, &mut self.buffer, now);
        if let Some(number) = self.udp.take_failed_resolver() {
            self.resolver_failed(number);
        }
        if let Received::Refused { guest, remote } = received {
            let offender = Offender { src: guest, dst: remote, protocol: IpProtocol::Udp, next: [0; 4] };
            send_error(&mut self.link, &offender, Why::Port);
        }
    }

    fn resolver(&self) -> Option<Target> {
        if self.config.isolated {
            return None;
        }
        self.config.resolvers.get(self.resolver).map(|address| policy::resolver(*address))
    }

    /// The next name server has its turn.
    fn resolver_failed(&mut self, number: usize) {
        if number == self.resolver {
            self.resolver = (self.resolver + 1) % self.config.resolvers.len().max(1);
        }
    }

    fn dhcp(&mut self, message: &[u8]) {
        if let Some(answer) = dhcp::answer(message, self.config.mtu) {
            let to = if answer.broadcast { Ipv4Addr::BROADCAST } else { GUEST };
            let from = SocketAddr::new(GATEWAY.into(), dhcp::SERVER_PORT);
            send_to_guest(&mut self.link, from, SocketAddr::new(to.into(), dhcp::CLIENT_PORT), &answer.message);
        }
    }

    fn icmp4(&mut self, ip: &Ip<'_>, now: Instant) {
        if Icmpv4Packet::new_checked(ip.payload).is_ok() && checksum(ip.payload) == 0 {
            self.echo(ip, now);
        }
    }

    fn icmp6(&mut self, ip: &Ip<'_>, now: Instant) {
        let (IpAddr::V6(src), IpAddr::V6(dst)) = (ip.src, ip.dst) else { return };
        let good = Icmpv6Packet::new_checked(ip.payload).is_ok_and(|packet| packet.verify_checksum(&src, &dst));
        let message = match ip.payload.first() {
            _ if !good => return,
            Some(&ROUTER_SOLICITATION) if ip.hop_limit == 255 => {
                Some(ndp::advertisement(self.config.mtu, self.config.ipv6 && !self.config.isolated))
            }
            Some(&NEIGHBOR_SOLICITATION) => ndp::answer(ip),
            _ if src.is_unspecified() => return,
            _ => return self.echo(ip, now),
        };
        if let Some(message) = message {
            let (header, rest) = message.bytes.split_at(message.bytes.len().min(8));
            let protocol = IpProtocol::Icmpv6;
            send_message(&mut self.link, message.src.into(), message.dst.into(), protocol, header, rest);
        }
    }

    fn echo(&mut self, ip: &Ip<'_>, now: Instant) {
        let Some(echo) = Echo::parse(ip.src, ip.dst, ip.payload) else { return };
        if is_ours(ip.dst) {
            return echo.answer(&mut self.link);
        }
        self.flowing = true;
        let result = match policy::decide(&self.config, SocketAddr::new(ip.dst, 0)) {
            Verdict::Pass(target) if target.must_not_be_host() && crate::udp::is_host(target) => Err(Why::Prohibited),
            Verdict::Pass(target) => self.echoes.send(&echo, target, &self.poll, now),
            Verdict::Refuse => Err(Why::Prohibited),
            Verdict::Drop | Verdict::Dns => Ok(()),
        };
        if let Err(why) = result {
            send_error(&mut self.link, &echo.offender(), why);
        }
    }

    fn forward_ready(&mut self, number: usize, now: Instant) {
        match self.forwards.get_mut(number) {
            Some(Opened::Tcp { listener, port, paused }) => {
                let room = self.tcp.accept(listener, *port, self.link.mtu(), &self.poll, now);
                // Until there is room again, those who connect wait in the host's queue.
                *paused = !room && self.poll.change(&*listener, Token::Forward(number), Flags::empty()).is_ok();
            }
            Some(Opened::Udp(forward)) => {
                self.flowing = true;
                forward.ready(&mut self.link, &mut self.buffer, now);
            }
            None => {}
        }
    }

    /// Forgets what has been silent for too long.
    fn sweep(&mut self, now: Instant) {
        if now.saturating_duration_since(self.swept) < SWEEP {
            return;
        }
        self.swept = now;
        let mut flowing = self.udp.expire(now) | self.echoes.expire(now);
        if let Some(number) = self.udp.take_failed_resolver() {
            self.resolver_failed(number);
        }
        for (number, forward) in self.forwards.iter_mut().enumerate() {
            match forward {
                Opened::Udp(forward) => flowing |= forward.expire(now),
                Opened::Tcp { listener, paused, .. } if *paused => {
                    *paused = self.poll.change(&*listener, Token::Forward(number), Flags::IN).is_err();
                    flowing = true;
                }
                Opened::Tcp { .. } => {}
            }
        }
        self.flowing = flowing;
    }

    /// The gateway's addresses, at which the guest finds the host.
    pub fn gateway() -> [IpAddr; 2] {
        [GATEWAY.into(), GATEWAY6.into()]
    }
}
