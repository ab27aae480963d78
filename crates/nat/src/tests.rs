//! The whole network against a guest with a TCP/IP of other hands (`smoltcp`), in one thread; the host's side is real sockets of the
//! loopback interface.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant as Clock};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Checksum, Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::{dhcpv4, icmp, tcp, udp};
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, HardwareAddress, Icmpv4Packet, Icmpv4Repr, IpCidr, IpEndpoint, Ipv4Packet, Ipv6Packet, TcpPacket,
};

use crate::addresses::{DNS, GATEWAY, GATEWAY6, GUEST, PREFIX};
use crate::frame::{Frame, MAX_FRAME, Payload, VIRTIO_HEADER};
use crate::{Nat, NatConfig, PortForward, dns};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 15];
const LIMIT: Duration = Duration::from_secs(120);

fn config() -> NatConfig {
    NatConfig {
        guest_mac: MAC,
        mtu: 1500,
        isolated: false,
        host: true,
        rate: None,
        resolvers: vec![],
        names: vec![],
        ipv6: true,
    }
}

/// What happens to frames on their way.
#[derive(Clone, Copy, Default)]
struct Line {
    /// One of so many is lost.
    loss: Option<u64>,
    /// The guest takes large segments without checksums.
    offloads: bool,
}

/// The guest's end of the cable.
struct Cable {
    socket: OwnedFd,
    line: Line,
    seed: u64,
    /// The longest frame that came.
    longest: Rc<RefCell<usize>>,
}

impl Cable {
    fn lost(&mut self) -> bool {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.line.loss.is_some_and(|one_of| (self.seed >> 20).is_multiple_of(one_of))
    }
}

/// Does what a guest's network card and kernel do with a frame without checksum; the header must fit the frame.
fn complete(frame: &mut [u8]) {
    let header: [u8; VIRTIO_HEADER] = frame[..VIRTIO_HEADER].try_into().unwrap();
    if header[0] & 1 == 0 {
        assert_eq!(header[1], 0, "large segments have no checksum");
        return;
    }
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (header_len, size, start, offset) = (word(2), word(4), word(6), word(8));
    let packet = &mut frame[VIRTIO_HEADER..];
    match header[1] {
        0 => assert_eq!((header_len, size), (0, 0)),
        kind => {
            assert!(kind == 1 && start == 34 || kind == 4 && start == 54);
            assert!(size <= 1460 && packet.len() > 1514 && header_len >= start + 20);
        }
    }
    let mut sum = crate::checksum::Sum::default();
    sum.add(&packet[start..]);
    let sum = sum.finish();
    packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    let good = if start == 34 {
        let ip = Ipv4Packet::new_checked(&packet[14..]).unwrap();
        TcpPacket::new_checked(ip.payload()).unwrap().verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into())
    } else {
        let ip = Ipv6Packet::new_checked(&packet[14..]).unwrap();
        TcpPacket::new_checked(ip.payload()).unwrap().verify_checksum(&ip.src_addr().into(), &ip.dst_addr().into())
    };
    assert!(good, "the checksum that was left to the guest comes out right");
}

struct Received(Vec<u8>);
struct Sending<'a>(&'a mut Cable);

impl RxToken for Received {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl TxToken for Sending<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; VIRTIO_HEADER + len];
        let result = f(&mut frame[VIRTIO_HEADER..]);
        if !self.0.lost() {
            let _ = rustix::net::send(&self.0.socket, &frame, SendFlags::DONTWAIT);
        }
        result
    }
}

impl Device for Cable {
    type RxToken<'a> = Received;
    type TxToken<'a> = Sending<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Received, Sending<'_>)> {
        let mut frame = vec![0; MAX_FRAME];
        loop {
            let (_, len) = rustix::net::recv(&self.socket, &mut frame[..], RecvFlags::DONTWAIT).ok()?;
            if len == 0 {
                return None;
            }
            assert!(self.line.offloads || len <= VIRTIO_HEADER + 14 + 1500, "too long: {len}");
            let mut longest = self.longest.borrow_mut();
            *longest = len.max(*longest);
            drop(longest);
            if !self.lost() {
                frame.truncate(len);
                complete(&mut frame);
                return Some((Received(frame[VIRTIO_HEADER..].to_vec()), Sending(self)));
            }
        }
    }

    fn transmit(&mut self, _: Instant) -> Option<Sending<'_>> {
        // A card whose queue is full takes no packet.
        let mut room = [PollFd::new(&self.socket, PollFlags::OUT)];
        (poll(&mut room, Some(&Default::default())) == Ok(1)).then_some(Sending(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities.checksum.ipv4 = Checksum::Both;
        capabilities
    }
}

struct World {
    nat: Nat,
    cable: Cable,
    interface: Interface,
    sockets: SocketSet<'static>,
    started: Clock,
}

impl World {
    fn new(config: NatConfig, forwards: Vec<PortForward>, line: Line) -> Self {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap();
        let mut nat = Nat::new(config, ours, forwards).unwrap();
        let on = u8::from(line.offloads);
        rustix::net::send(&theirs, &[b'o', on, on, on], SendFlags::empty()).unwrap();
        // Whoever connects before a driver takes over is cut off.
        nat.turn(Some(Duration::ZERO)).unwrap();
        let mut cable = Cable { socket: theirs, line, seed: 88172645463325252, longest: Rc::default() };
        let hardware = HardwareAddress::Ethernet(EthernetAddress(MAC));
        let mut interface = Interface::new(Config::new(hardware), &mut cable, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddr::from(GUEST).into(), 24)).unwrap();
            let mut own = PREFIX.octets();
            own[15] = 0x15;
            addresses.push(IpCidr::new(IpAddr::from(own).into(), 64)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(GATEWAY).unwrap();
        interface.routes_mut().add_default_ipv6_route(GATEWAY6).unwrap();
        Self { nat, cable, interface, sockets: SocketSet::new(vec![]), started: Clock::now() }
    }

    fn open(config: NatConfig) -> Self {
        Self::new(config, vec![], Line::default())
    }

    fn now(&self) -> Instant {
        Instant::from_micros(self.started.elapsed().as_micros() as i64)
    }

    fn step(&mut self) {
        self.nat.turn(Some(Duration::from_micros(200))).unwrap();
        let now = self.now();
        self.interface.poll(now, &mut self.cable, &mut self.sockets);
    }

    /// Goes on until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let end = Clock::now() + LIMIT;
        while !done(self) {
            assert!(Clock::now() < end, "{what}");
            self.step();
        }
    }

    /// Goes on until the host's side is through.
    fn join(&mut self, host: std::thread::JoinHandle<()>) {
        self.until("the host's side", |_| host.is_finished());
        host.join().unwrap();
    }

    fn tcp(&mut self, buffer: usize) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; buffer]);
        self.sockets.add(tcp::Socket::new(buffer(), buffer()))
    }

    fn connect(&mut self, to: impl Into<IpEndpoint>, port: u16, buffer: usize) -> SocketHandle {
        let handle = self.tcp(buffer);
        let socket = self.sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(self.interface.context(), to, port).unwrap();
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Sends `data` and receives until the other end closes; closes too then.
    fn exchange(&mut self, handle: SocketHandle, data: &[u8]) -> Vec<u8> {
        let (mut sent, mut received) = (0, Vec::new());
        self.until("exchange", |world| {
            let socket = world.socket(handle);
            if sent < data.len() && socket.can_send() {
                sent += socket.send_slice(&data[sent..]).unwrap();
            }
            if sent == data.len() {
                socket.close();
            }
            while socket.can_recv() {
                socket.recv(|bytes| (bytes.len(), received.extend_from_slice(bytes))).unwrap();
            }
            !socket.may_recv() && !socket.can_recv() && sent == data.len()
        });
        received
    }

    fn udp(&mut self, port: u16) -> SocketHandle {
        let buffer = || udp::PacketBuffer::new(vec![udp::PacketMetadata::EMPTY; 64], vec![0; 65536]);
        let handle = self.sockets.add(udp::Socket::new(buffer(), buffer()));
        self.sockets.get_mut::<udp::Socket<'_>>(handle).bind(port).unwrap();
        handle
    }

    fn ask(&mut self, handle: SocketHandle, to: impl Into<IpEndpoint>, data: &[u8]) -> Vec<u8> {
        let to = to.into();
        self.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(data, to).unwrap();
        let mut answer = None;
        self.until("an answer", |world| {
            if let Ok((data, from)) = world.sockets.get_mut::<udp::Socket<'_>>(handle).recv() {
                assert_eq!(from.endpoint, to);
                answer = Some(data.to_vec());
            }
            answer.is_some()
        });
        answer.unwrap()
    }

    /// Sends raw IP packets, and gives the payloads of the frames that come back for a while.
    fn raw(&mut self, frames: &[Vec<u8>]) -> Vec<Vec<u8>> {
        for frame in frames {
            rustix::net::send(&self.cable.socket, frame, SendFlags::DONTWAIT).unwrap();
        }
        let mut answers = Vec::new();
        for _ in 0..30 {
            self.nat.turn(Some(Duration::from_millis(1))).unwrap();
            let mut buffer = vec![0; MAX_FRAME];
            while let Ok((_, len)) = rustix::net::recv(&self.cable.socket, &mut buffer[..], RecvFlags::DONTWAIT) {
                answers.push(buffer[..len].to_vec());
            }
        }
        answers
    }
}

/// A listening socket whose one client is served by `serve`.
fn server(address: &str, serve: impl FnOnce(TcpStream) + Send + 'static) -> (u16, std::thread::JoinHandle<()>) {
    let listener = TcpListener::bind(address).unwrap();
    let port = listener.local_addr().unwrap().port();
    (port, std::thread::spawn(move || serve(listener.accept().unwrap().0)))
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 1021) as u8).collect()
}

/// Sends the pattern, reads all that the guest sends, and checks it.
fn both_ways(down: usize, up: usize) -> impl FnOnce(TcpStream) + Send + 'static {
    move |mut stream| {
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&pattern(down)).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        assert!(data == pattern(up));
        sender.join().unwrap();
    }
}

#[test]
fn dhcp() {
    let mut world = World::open(config());
    let handle = world.sockets.add(dhcpv4::Socket::new());
    let mut lease = None;
    world.until("a lease", |world| {
        if let Some(dhcpv4::Event::Configured(config)) = world.sockets.get_mut::<dhcpv4::Socket<'_>>(handle).poll() {
            lease = Some((config.address.address(), config.router, config.dns_servers.first().copied()));
        }
        lease.is_some()
    });
    assert_eq!(lease, Some((GUEST, Some(GATEWAY), Some(DNS))));
}

#[test]
fn tcp_both_ways_over_all_kinds_of_lines() {
    for (gateway, listen) in [(IpAddr::from(GATEWAY), "127.0.0.1:0"), (GATEWAY6.into(), "[::1]:0")] {
        for (loss, offloads) in [(None, false), (None, true), (Some(50), false), (Some(30), true)] {
            let (down, up) = if loss.is_some() { (150_000, 100_000) } else { (3_000_000, 1_500_000) };
            let mut world = World::new(config(), vec![], Line { loss, offloads });
            let (port, server) = server(listen, both_ways(down, up));
            let handle = world.connect((gateway, port), 1234, 200_000);
            let received = world.exchange(handle, &pattern(up));
            assert!(received == pattern(down), "{gateway} {loss:?} {offloads}");
            world.join(server);
            world.until("the end", |world| world.nat.connections() == 0);
            assert_eq!(*world.cable.longest.borrow() > 20_000, offloads, "large segments");
        }
    }
}

/// The host has one name and two addresses; a server may listen on one of them only.
#[test]
fn the_hosts_servers_are_reached_by_either_address() {
    for (gateway, listen) in [(IpAddr::from(GATEWAY6), "127.0.0.1:0"), (GATEWAY.into(), "[::1]:0")] {
        let mut world = World::open(config());
        let (port, server) = server(listen, both_ways(1000, 1000));
        let handle = world.connect((gateway, port), 1234, 2000);
        assert!(world.exchange(handle, &pattern(1000)) == pattern(1000), "{gateway}");
        world.join(server);
    }
}

#[test]
fn a_closed_port_refuses() {
    let mut world = World::open(config());
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1000, 2000);
    world.until("a refusal", |world| world.socket(handle).state() == tcp::State::Closed);
    assert_eq!(world.nat.connections(), 0);
}

#[test]
fn resets_pass_in_both_directions() {
    let mut world = World::open(config());
    // The guest resets.
    let (port, server) = server("127.0.0.1:0", |mut stream| {
        let error = stream.read(&mut [0; 10]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    });
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1000, 2000);
    world.until("a connection", |world| world.socket(handle).may_send());
    world.socket(handle).abort();
    world.until("its end", |world| world.nat.connections() == 0);
    world.join(server);
    // The host resets: it closes with data unread.
    let (port, server) = self::server("127.0.0.1:0", |stream| {
        std::thread::sleep(Duration::from_millis(50));
        drop(stream);
    });
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1001, 2000);
    world.until("a connection", |world| world.socket(handle).may_send());
    world.socket(handle).send_slice(b"nobody reads this").unwrap();
    world.until("a reset", |world| world.socket(handle).state() == tcp::State::Closed);
    world.join(server);
}

#[test]
fn a_driver_that_takes_over_ends_all_connections() {
    let mut world = World::open(config());
    let (port, server) = server("127.0.0.1:0", |mut stream| assert!(stream.read(&mut [0; 10]).is_err()));
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1000, 2000);
    world.until("a connection", |world| world.socket(handle).may_send());
    rustix::net::send(&world.cable.socket, b"o\0\0\0", SendFlags::empty()).unwrap();
    world.until("its end", |world| world.nat.connections() == 0);
    world.join(server);
}

#[test]
fn forwarded_ports() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    // Isolation does not concern them.
    let isolated = NatConfig { isolated: true, ..config() };
    let mut world = World::new(isolated, vec![PortForward::Tcp(listener.into(), 80)], Line::default());
    for _ in 0..3 {
        let handle = world.tcp(50_000);
        world.socket(handle).listen(80).unwrap();
        let client = std::thread::spawn(move || {
            let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            both_ways(300_000, 100_000)(stream);
        });
        world.until("a connection", |world| world.socket(handle).may_send());
        assert_eq!(world.socket(handle).remote_endpoint().unwrap().addr, IpAddr::from(GATEWAY).into());
        assert!(world.exchange(handle, &pattern(100_000)) == pattern(300_000));
        world.join(client);
    }
    // Nobody listens in the guest: the client is told.
    let client = std::thread::spawn(move || TcpStream::connect(("127.0.0.1", port)).unwrap().read(&mut [0; 1]));
    world.until("the end", |_| client.is_finished());
    assert_eq!(client.join().unwrap().unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_thousand_connections_and_a_flood() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        for _ in 0..1000 {
            let mut stream = listener.accept().unwrap().0;
            std::thread::spawn(move || {
                let mut data = [0; 100];
                while let Ok(len @ 1..) = stream.read(&mut data) {
                    stream.write_all(&data[..len]).unwrap();
                }
            });
        }
    });
    let mut world = World::open(config());
    let handles: Vec<_> = (0..1000).map(|n| world.connect((IpAddr::from(GATEWAY), port), 10_000 + n, 200)).collect();
    world.until("connections", |world| handles.iter().all(|handle| world.socket(*handle).may_send()));
    assert_eq!(world.nat.connections(), 1000);
    for (n, handle) in handles.iter().enumerate() {
        world.socket(*handle).send_slice(format!("number {n}").as_bytes()).unwrap();
    }
    world.until("answers", |world| handles.iter().all(|handle| world.socket(*handle).recv_queue() >= 8));
    for (n, handle) in handles.iter().enumerate() {
        let mut data = [0; 20];
        let len = world.socket(*handle).recv_slice(&mut data).unwrap();
        assert_eq!(&data[..len], format!("number {n}").as_bytes());
        world.socket(*handle).close();
    }
    world.until("the end", |world| world.nat.connections() == 0);
    world.join(server);
}

/// A guest that only starts connections, more than there can be: the table stays bounded, and works again when they are gone.
#[test]
fn half_open_connections_are_bounded() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut world = World::open(config());
    world.raw(&[]);
    for batch in 0..60u16 {
        let frames: Vec<_> = (0..100).map(|n| syn(port, batch * 100 + n + 1024)).collect();
        for answer in world.raw(&frames) {
            assert!(Frame::parse(&answer).is_some());
        }
        assert!(world.nat.connections() <= crate::tcp::MAX_CONNECTIONS);
    }
    assert!(world.nat.connections() > 100);
    rustix::net::send(&world.cable.socket, b"o\0\0\0", SendFlags::empty()).unwrap();
    world.until("their end", |world| world.nat.connections() == 0);
    drop(listener);
    let (port, server) = server("127.0.0.1:0", both_ways(10, 10));
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1000, 2000);
    assert!(world.exchange(handle, &pattern(10)) == pattern(10));
    world.join(server);
}

/// An Ethernet frame with an IPv4 packet of `protocol`.
fn ipv4(protocol: u8, flags_and_offset: u16, id: u16, dst: [u8; 4], payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0; VIRTIO_HEADER];
    frame.extend(crate::addresses::GATEWAY_MAC.0);
    frame.extend(MAC);
    frame.extend([8, 0]);
    let mut ip = vec![0x45, 0];
    ip.extend((20 + payload.len() as u16).to_be_bytes());
    ip.extend(id.to_be_bytes());
    ip.extend(flags_and_offset.to_be_bytes());
    ip.extend([64, protocol, 0, 0]);
    ip.extend(GUEST.octets());
    ip.extend(dst);
    let sum = crate::checksum::checksum(&ip);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(ip);
    frame.extend(payload);
    frame
}

fn syn(port: u16, from: u16) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(from.to_be_bytes());
    tcp.extend(port.to_be_bytes());
    tcp.extend([0; 8]);
    tcp.extend([5 << 4, 2, 255, 255, 0, 0, 0, 0]);
    let mut sum = crate::checksum::Sum::pseudo(GUEST.into(), GATEWAY.into(), 6, 20);
    sum.add(&tcp);
    tcp[16..18].copy_from_slice(&sum.finish().to_be_bytes());
    ipv4(6, 0, 0, GATEWAY.octets(), &tcp)
}

fn udp_datagram(from: u16, to: u16, dst: [u8; 4], data: &[u8]) -> Vec<u8> {
    let mut udp = Vec::new();
    for field in [from, to, 8 + data.len() as u16, 0] {
        udp.extend(field.to_be_bytes());
    }
    udp.extend(data);
    let mut sum = crate::checksum::Sum::pseudo(GUEST.into(), dst.into(), 17, udp.len() as u32);
    sum.add(&udp);
    udp[6..8].copy_from_slice(&sum.finish().to_be_bytes());
    udp
}

fn udp_echo(address: &str) -> u16 {
    let socket = UdpSocket::bind(address).unwrap();
    let port = socket.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut data = vec![0; 65536];
        while let Ok((len, from)) = socket.recv_from(&mut data) {
            let _ = socket.send_to(&data[..len], from);
        }
    });
    port
}

#[test]
fn udp_both_families_and_a_forward() {
    let forward = UdpSocket::bind("127.0.0.1:0").unwrap();
    forward.set_nonblocking(true).unwrap();
    let port = forward.local_addr().unwrap().port();
    let mut world = World::new(config(), vec![PortForward::Udp(forward.into(), 53)], Line::default());
    let handle = world.udp(700);
    for (gateway, listen) in [(IpAddr::from(GATEWAY), "127.0.0.1:0"), (GATEWAY6.into(), "[::1]:0")] {
        let echo = udp_echo(listen);
        for len in [0, 1, 1400] {
            assert_eq!(world.ask(handle, (gateway, echo), &pattern(len)), pattern(len));
        }
    }
    // Two clients of the forwarded port, each gets its own answer.
    let handle = world.udp(53);
    let clients: Vec<_> = (0..2).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
    for (n, client) in clients.iter().enumerate() {
        client.set_read_timeout(Some(LIMIT)).unwrap();
        client.send_to(format!("question {n}").as_bytes(), ("127.0.0.1", port)).unwrap();
    }
    let mut answered = 0;
    world.until("questions", |world| {
        let socket = world.sockets.get_mut::<udp::Socket<'_>>(handle);
        while let Ok((data, from)) = socket.recv() {
            assert_eq!(from.endpoint.addr, IpAddr::from(GATEWAY).into());
            let answer = [b"answer to ", data].concat();
            socket.send_slice(&answer, from.endpoint).unwrap();
            answered += 1;
        }
        answered == 2
    });
    world.step();
    world.step();
    for (n, client) in clients.iter().enumerate() {
        let mut data = [0; 100];
        let len = client.recv(&mut data).unwrap();
        assert_eq!(&data[..len], format!("answer to question {n}").as_bytes());
    }
}

#[test]
fn large_datagrams_go_in_fragments() {
    let mut world = World::open(config());
    let echo = udp_echo("127.0.0.1:0");
    let data = pattern(20_000);
    let whole = udp_datagram(700, echo, GATEWAY.octets(), &data);
    let mut frames: Vec<_> = whole
        .chunks(1480)
        .enumerate()
        .map(|(n, piece)| {
            let more = u16::from((n + 1) * 1480 < whole.len()) << 13;
            ipv4(17, more | (n * 1480 / 8) as u16, 99, GATEWAY.octets(), piece)
        })
        .collect();
    frames.reverse();
    let answers = world.raw(&frames);
    let mut reassembly = crate::fragment::Reassembly::default();
    let mut got = None;
    for answer in &answers {
        let Some(Frame { payload: Payload::Ip(ip), .. }) = Frame::parse(answer) else { continue };
        assert!(answer.len() <= VIRTIO_HEADER + 1514);
        got = got.or_else(|| reassembly.add(&ip, ip.fragment?, Clock::now()));
    }
    assert!(got.unwrap()[8..] == data);
}

#[test]
fn a_closed_udp_port_is_unreachable() {
    let mut world = World::open(config());
    let port = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let datagram = ipv4(17, 0, 0, GATEWAY.octets(), &udp_datagram(700, port, GATEWAY.octets(), b"x"));
    let unreachable = |answers: Vec<Vec<u8>>| {
        answers.iter().any(|answer| {
            let Some(Frame { payload: Payload::Ip(ip), .. }) = Frame::parse(answer) else { return false };
            ip.payload.starts_with(&[3, 3]) && ip.payload.get(28..32) == Some(&[2, 188, (port >> 8) as u8, port as u8])
        })
    };
    assert!(unreachable(world.raw(&[datagram])));
}

#[test]
fn names_are_asked_of_the_hosts_server() {
    let asked = UdpSocket::bind("127.0.0.1:0").unwrap();
    asked.set_read_timeout(Some(LIMIT)).unwrap();
    // The first of the host's servers is not there.
    let dead = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let resolvers = vec![dead, asked.local_addr().unwrap()];
    let mut world = World::open(NatConfig { resolvers, ..config() });
    let server = std::thread::spawn(move || {
        let mut data = [0; 512];
        let (len, from) = asked.recv_from(&mut data).unwrap();
        data[2] |= 0x80;
        asked.send_to(&data[..len], from).unwrap();
    });
    let query = |id: u8, name: &str| {
        let mut bytes = vec![id, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.extend([0, 0, 1, 0, 1]);
        bytes
    };
    let handle = world.udp(700);
    let answer = world.ask(handle, (IpAddr::from(DNS), 53), &query(1, "host.tightrope.internal"));
    assert!(answer.ends_with(&GATEWAY.octets()));
    assert!(matches!(dns::look(&config(), &query(1, "a.example")), dns::Outcome::Forward));
    // The guest asks again, as resolvers do, each time from another port.
    let mut answer = None;
    let mut port = 701;
    let end = Clock::now() + LIMIT;
    while answer.is_none() && Clock::now() < end {
        let handle = world.udp(port);
        port += 1;
        let question = query(port as u8, "a.example");
        world.sockets.get_mut::<udp::Socket<'_>>(handle).send_slice(&question, (IpAddr::from(DNS), 53)).unwrap();
        for _ in 0..50 {
            world.step();
            if let Ok((data, _)) = world.sockets.get_mut::<udp::Socket<'_>>(handle).recv() {
                answer = Some(data.to_vec());
                break;
            }
        }
    }
    let answer = answer.unwrap();
    assert_eq!(answer[2] & 0x80, 0x80);
    world.join(server);
}

#[test]
fn pings_of_the_gateway() {
    let mut world = World::open(config());
    let buffer = || icmp::PacketBuffer::new(vec![icmp::PacketMetadata::EMPTY; 4], vec![0; 4000]);
    let handle = world.sockets.add(icmp::Socket::new(buffer(), buffer()));
    world.sockets.get_mut::<icmp::Socket<'_>>(handle).bind(icmp::Endpoint::Ident(0x77)).unwrap();
    let repr = Icmpv4Repr::EchoRequest { ident: 0x77, seq_no: 5, data: b"are you there?" };
    let mut message = vec![0; repr.buffer_len()];
    repr.emit(&mut Icmpv4Packet::new_unchecked(&mut message), &Default::default());
    world.sockets.get_mut::<icmp::Socket<'_>>(handle).send_slice(&message, IpAddr::from(GATEWAY).into()).unwrap();
    world.until("a reply", |world| {
        let Ok((data, from)) = world.sockets.get_mut::<icmp::Socket<'_>>(handle).recv() else { return false };
        let reply = Icmpv4Repr::parse(&Icmpv4Packet::new_checked(data).unwrap(), &Default::default()).unwrap();
        assert_eq!(from, IpAddr::from(GATEWAY).into());
        assert_eq!(reply, Icmpv4Repr::EchoReply { ident: 0x77, seq_no: 5, data: b"are you there?" });
        true
    });
}

#[test]
fn what_is_not_allowed_is_said_to_be_so() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.set_nonblocking(true).unwrap();
    let port = listener.local_addr().unwrap().port();
    for config in [NatConfig { isolated: true, ..config() }, NatConfig { host: false, ..config() }] {
        let mut world = World::open(config);
        let handle = world.connect((IpAddr::from(GATEWAY), port), 1000, 2000);
        world.until("a refusal", |world| world.socket(handle).state() == tcp::State::Closed);
    }
    // Neither by an address that means the host itself.
    let mut world = World::open(config());
    for to in [[127, 0, 0, 1], [0, 0, 0, 0], [169, 254, 169, 254]] {
        let answers = world.raw(&[ipv4(17, 0, 0, to, &udp_datagram(700, port, to, b"x"))]);
        let Some(Frame { payload: Payload::Ip(ip), .. }) = answers.first().and_then(|answer| Frame::parse(answer))
        else {
            panic!("{to:?}: {answers:?}")
        };
        assert!(ip.payload.starts_with(&[3, 13]), "{to:?}");
    }
    assert!(listener.accept().is_err(), "nobody came through");
}

#[test]
fn rate_limits_are_kept() {
    let rate = 4_000_000;
    let mut world = World::open(NatConfig { rate: Some(rate), ..config() });
    let (port, server) = server("127.0.0.1:0", both_ways(3_000_000, 3_000_000));
    let handle = world.connect((IpAddr::from(GATEWAY), port), 1234, 200_000);
    let start = Clock::now();
    assert!(world.exchange(handle, &pattern(3_000_000)) == pattern(3_000_000));
    let ideal = (3_000_000 - rate / 10) as f64 / rate as f64;
    let took = start.elapsed().as_secs_f64();
    assert!(took > ideal, "{took} {ideal}");
    world.join(server);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Whatever a guest sends: no panic, and the network goes on.
    #[test]
    fn any_frames(
        frames in prop::collection::vec((0usize..4, prop::collection::vec(any::<u8>(), 0..200), prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6)), 1..40)
    ) {
        let mut world = World::open(NatConfig { isolated: true, ..config() });
        let frames: Vec<_> = frames.into_iter().map(|(kind, bytes, changes)| {
            let mut frame = match kind {
                0 => bytes,
                1 => ipv4(17, 0, 0, GATEWAY.octets(), &udp_datagram(68, 67, GATEWAY.octets(), &bytes)),
                2 => ipv4(17, 0x2000, 1, DNS.octets(), &udp_datagram(700, 53, DNS.octets(), &bytes)),
                _ => syn(80, 1000),
            };
            frame.push(0);
            for (at, value) in changes {
                let at = at.index(frame.len());
                frame[at] = value;
            }
            frame
        }).collect();
        for frame in &frames {
            world.nat.frame(frame, Clock::now());
        }
        world.raw(&[]);
        let handle = world.udp(700);
        let answer = world.ask(handle, (IpAddr::from(DNS), 53), &[0; 12]);
        prop_assert_eq!(answer.len(), 12);
        let _: SocketAddr = SocketAddr::new(GUEST.into(), 1);
    }
}
