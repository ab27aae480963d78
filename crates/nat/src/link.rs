//! The guest's cable: frames over a socket that keeps them apart, and the making of frames.
//!
//! What the guest takes without a checksum or as one large segment is sent so; for a guest that does not, the rest is done here.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use smoltcp::wire::{EthernetAddress, IpProtocol};

use crate::addresses::GATEWAY_MAC;
use crate::checksum::{Sum, checksum};
use crate::frame::VIRTIO_HEADER;
use crate::rate::Bucket;

/// Frames that wait because the cable is full; more are lost.
const QUEUE: usize = 256;
/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// The most that an IPv4 packet can carry with 40 bytes of headers, less what an Ethernet header needs (as Linux has it).
pub const MAX_SEGMENT: usize = 65535 - 60 - 60;

/// What the guest takes (virtio 1.3, 5.1.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Packets without checksum.
    pub checksum: bool,
    /// Large TCP segments over IPv4.
    pub tcp4: bool,
    /// Large TCP segments over IPv6.
    pub tcp6: bool,
}

impl Offloads {
    /// Reads the message that tells of a driver: the letter `o` and three bytes 0 or 1.
    pub fn parse(message: &[u8]) -> Option<Self> {
        match *message {
            [b'o', checksum, tcp4, tcp6] => Some(Self { checksum: checksum == 1, tcp4: tcp4 == 1, tcp6: tcp6 == 1 }),
            _ => None,
        }
    }
}

/// A packet of a transport protocol to make.
pub struct Transport<'a> {
    /// From.
    pub src: IpAddr,
    /// To.
    pub dst: IpAddr,
    /// Which.
    pub protocol: IpProtocol,
    /// Its header, the checksum field 0.
    pub header: &'a [u8],
    /// Where in the header the checksum is; none over IPv4 for ICMP, which has no pseudo-header.
    pub checksum_at: usize,
    /// What follows.
    pub data: [IoSlice<'a>; 2],
    /// For a TCP segment that the guest is to take as several of so many bytes.
    pub segment_size: Option<u16>,
    /// Time to live.
    pub hop_limit: u8,
}

/// The cable's end.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    /// The guest's address.
    mac: EthernetAddress,
    mtu: u16,
    /// What the guest takes.
    pub offloads: Offloads,
    waiting: VecDeque<Vec<u8>>,
    /// The socket had no room.
    full: bool,
    to_guest: Option<Bucket>,
    from_guest: Option<Bucket>,
    next_id: u32,
    now: Instant,
}

impl Link {
    /// The cable at `socket`, to a guest with the address `mac`. `rate`: bytes a second in each direction.
    pub fn new(socket: OwnedFd, mac: EthernetAddress, mtu: u16, rate: Option<u64>, now: Instant) -> Self {
        let bucket = || rate.map(|rate| Bucket::new(rate, now));
        Self {
            socket,
            mac,
            mtu: mtu.max(1280),
            offloads: Offloads::default(),
            waiting: VecDeque::new(),
            full: false,
            to_guest: bucket(),
            from_guest: bucket(),
            next_id: 0,
            now,
        }
    }

    /// The time has gone on.
    pub fn set_time(&mut self, now: Instant) {
        self.now = now;
    }

    /// The largest packet without its Ethernet header.
    pub fn mtu(&self) -> u16 {
        self.mtu
    }

    /// A guest with another address is on the cable.
    pub fn set_mac(&mut self, mac: EthernetAddress) {
        self.mac = mac;
    }

    /// Does it make sense to send more? (What is sent nevertheless waits for a while.)
    pub fn has_room(&mut self) -> bool {
        let now = self.now;
        !self.full && self.waiting.is_empty() && self.to_guest.as_mut().is_none_or(|bucket| bucket.open(now))
    }

    /// Must the socket's room be waited for?
    pub fn is_full(&self) -> bool {
        self.full
    }

    /// How long until a rate limit lets something pass that waits for nothing else.
    pub fn pause(&self) -> Option<Duration> {
        [&self.to_guest, &self.from_guest].into_iter().flatten().filter_map(Bucket::opens_in).min()
    }

    /// The next frame from the guest, header first. `Ok(None)`: none there now, or the rate limit has been reached.
    ///
    /// # Errors
    /// The other end is gone.
    pub fn receive(&mut self, buffer: &mut [u8]) -> io::Result<Option<usize>> {
        let now = self.now;
        if self.from_guest.as_mut().is_some_and(|bucket| !bucket.open(now)) {
            return Ok(None);
        }
        match rustix::net::recv(&self.socket, buffer, RecvFlags::DONTWAIT) {
            Ok((_, 0)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((_, len)) => {
                if let Some(bucket) = &mut self.from_guest {
                    bucket.take(len);
                }
                Ok(Some(len))
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Is the guest's rate limit what keeps frames from being received?
    pub fn is_throttled(&self) -> bool {
        self.from_guest.as_ref().is_some_and(|bucket| bucket.opens_in().is_some())
    }

    /// The socket may have room again: sends what waits.
    pub fn flush(&mut self) {
        self.full = false;
        while let Some(frame) = self.waiting.pop_front() {
            if !self.write(&[IoSlice::new(&frame)]) {
                self.waiting.push_front(frame);
                return;
            }
        }
    }

    /// Puts one frame on the cable; `false` when there is no room.
    fn write(&mut self, parts: &[IoSlice<'_>]) -> bool {
        let len = parts.iter().map(|part| part.len()).sum();
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match rustix::net::sendmsg(&self.socket, parts, &mut SendAncillaryBuffer::default(), flags) {
            Err(Errno::AGAIN | Errno::INTR | Errno::NOBUFS) => {
                self.full = true;
                false
            }
            // That the other end is gone is seen by whoever receives.
            _ => {
                if let Some(bucket) = &mut self.to_guest {
                    bucket.take(len);
                }
                true
            }
        }
    }

    /// Sends a frame made of `parts`, or lets it wait.
    fn send(&mut self, parts: &[IoSlice<'_>]) {
        let wait = self.full || !self.waiting.is_empty();
        if (wait || !self.write(parts)) && self.waiting.len() < QUEUE {
            self.waiting.push_back(parts.iter().flat_map(|part| part.iter().copied()).collect());
        }
    }

    fn ethernet_header(&self, to: EthernetAddress, kind: u16) -> [u8; ETHERNET] {
        let mut header = [0; ETHERNET];
        let bytes = to.0.into_iter().chain(GATEWAY_MAC.0).chain(kind.to_be_bytes());
        header.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
        header
    }

    /// Sends an ARP packet to the guest.
    pub fn send_arp(&mut self, packet: &[u8]) {
        let ethernet = self.ethernet_header(self.mac, 0x0806);
        self.send(&[IoSlice::new(&[0; VIRTIO_HEADER]), IoSlice::new(&ethernet), IoSlice::new(packet)]);
    }

    /// Sends a packet of a transport protocol to the guest, in fragments or segments if it must be.
    pub fn send_transport(&mut self, packet: &Transport<'_>) {
        let ip_header = if packet.dst.is_ipv4() { 20 } else { 40 };
        let data_len: usize = packet.data.iter().map(|part| part.len()).sum();
        let whole = packet.header.len() + data_len;
        if u16::try_from(whole + 20).is_err() {
            return; // no IP packet can carry it; callers bound their data
        }
        let mut header = packet.header.to_vec();
        let large = packet.segment_size.is_some_and(|size| data_len > usize::from(size));
        let pseudo = if packet.protocol == IpProtocol::Icmp {
            Sum::default()
        } else {
            Sum::pseudo(packet.src, packet.dst, packet.protocol.into(), whole as u32)
        };
        let leave = self.offloads.checksum && packet.segment_size.is_some();
        let sum = if leave {
            pseudo.partial()
        } else {
            let mut sum = pseudo;
            sum.add(&header);
            packet.data.iter().for_each(|part| sum.add(part));
            match sum.finish() {
                // RFC 768: 0 means that there is none.
                0 if packet.protocol == IpProtocol::Udp => 0xffff,
                sum => sum,
            }
        };
        if let Some(field) = header.get_mut(packet.checksum_at..packet.checksum_at + 2) {
            field.copy_from_slice(&sum.to_be_bytes());
        }
        if !large && whole + ip_header > usize::from(self.mtu) {
            return self.send_fragments(packet, &header);
        }
        let mut virtio = [0; VIRTIO_HEADER];
        if leave {
            let start = (ETHERNET + ip_header) as u16;
            let size = packet.segment_size.filter(|_| large);
            let kind = match (size, packet.dst) {
                (None, _) => 0,
                (_, IpAddr::V4(_)) => 1,
                (_, IpAddr::V6(_)) => 4,
            };
            virtio = virtio_header(
                kind,
                start + packet.header.len() as u16,
                size.unwrap_or(0),
                start,
                packet.checksum_at as u16,
            );
        }
        let ip = self.ip_header(packet, whole, None);
        let ethernet = self.ethernet_for(packet.dst);
        let [first, second] = &packet.data;
        self.send(&[
            IoSlice::new(&virtio),
            IoSlice::new(&ethernet),
            IoSlice::new(&ip),
            IoSlice::new(&header),
            IoSlice::new(first),
            IoSlice::new(second),
        ]);
    }

    fn ethernet_for(&self, dst: IpAddr) -> [u8; ETHERNET] {
        match dst {
            IpAddr::V4(dst) if dst.is_broadcast() => self.ethernet_header(EthernetAddress::BROADCAST, 0x0800),
            IpAddr::V4(_) => self.ethernet_header(self.mac, 0x0800),
            // RFC 2464, 7
            IpAddr::V6(dst) if dst.is_multicast() => {
                let [.., a, b, c, d] = dst.octets();
                self.ethernet_header(EthernetAddress([0x33, 0x33, a, b, c, d]), 0x86dd)
            }
            IpAddr::V6(_) => self.ethernet_header(self.mac, 0x86dd),
        }
    }

    /// The IP header of a packet with `len` bytes of payload, or of a fragment of it: identification, offset in bytes, more to come.
    fn ip_header(&mut self, packet: &Transport<'_>, len: usize, fragment: Option<(u32, usize, bool)>) -> Vec<u8> {
        let mut header = Vec::with_capacity(48);
        match (packet.src, packet.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (id, flags) = match fragment {
                    Some((id, offset, more)) => (id as u16, (offset / 8) as u16 | u16::from(more) << 13),
                    None => (0, 0x4000), // never to be fragmented further, so it needs no identification (RFC 6864)
                };
                header.extend([0x45, 0]);
                header.extend(((len + 20) as u16).to_be_bytes());
                header.extend(id.to_be_bytes());
                header.extend(flags.to_be_bytes());
                header.extend([packet.hop_limit, packet.protocol.into(), 0, 0]);
                header.extend(src.octets());
                header.extend(dst.octets());
                let sum = checksum(&header);
                if let Some(field) = header.get_mut(10..12) {
                    field.copy_from_slice(&sum.to_be_bytes());
                }
            }
            (src, dst) => {
                let extension = if fragment.is_some() { 8 } else { 0 };
                header.extend([0x60, 0, 0, 0]);
                header.extend(((len + extension) as u16).to_be_bytes());
                let next = fragment.map_or(packet.protocol.into(), |_| u8::from(IpProtocol::Ipv6Frag));
                header.extend([next, packet.hop_limit]);
                for address in [src, dst] {
                    if let IpAddr::V6(address) = address {
                        header.extend(address.octets());
                    }
                }
                if let Some((id, offset, more)) = fragment {
                    header.extend([packet.protocol.into(), 0]);
                    header.extend((offset as u16 & !7 | u16::from(more)).to_be_bytes());
                    header.extend(id.to_be_bytes());
                }
            }
        }
        header
    }

    fn send_fragments(&mut self, packet: &Transport<'_>, header: &[u8]) {
        let mut whole = header.to_vec();
        packet.data.iter().for_each(|part| whole.extend_from_slice(part));
        self.next_id = self.next_id.wrapping_add(1);
        let id = self.next_id;
        let room = usize::from(self.mtu) - if packet.dst.is_ipv4() { 20 } else { 48 };
        let step = room & !7;
        let ethernet = self.ethernet_for(packet.dst);
        for (number, piece) in whole.chunks(step).enumerate() {
            let offset = number * step;
            let more = offset + piece.len() < whole.len();
            let ip = self.ip_header(packet, piece.len(), Some((id, offset, more)));
            self.send(&[
                IoSlice::new(&[0; VIRTIO_HEADER]),
                IoSlice::new(&ethernet),
                IoSlice::new(&ip),
                IoSlice::new(piece),
            ]);
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// `struct virtio_net_hdr` (virtio 1.3, 5.1.6) of a packet whose checksum is to be filled in.
fn virtio_header(kind: u8, header_len: u16, segment: u16, start: u16, offset: u16) -> [u8; VIRTIO_HEADER] {
    let ([h0, h1], [g0, g1]) = (header_len.to_le_bytes(), segment.to_le_bytes());
    let ([s0, s1], [o0, o1]) = (start.to_le_bytes(), offset.to_le_bytes());
    let ([h0, h1], [g0, g1]) = if kind == 0 { ([0; 2], [0; 2]) } else { ([h0, h1], [g0, g1]) };
    [1, kind, h0, h1, g0, g1, s0, s1, o0, o1, 0, 0]
}
