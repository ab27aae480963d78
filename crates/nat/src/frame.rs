//! Packets from the guest, taken apart and checked.

use std::net::IpAddr;

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpProtocol, Ipv4Packet, Ipv6FragmentHeader, Ipv6Packet,
};

/// Bytes of the header (virtio 1.3, 5.1.6) before each frame.
pub const VIRTIO_HEADER: usize = 12;
/// `flags`: the checksum is still to be filled in.
const NEEDS_CSUM: u8 = 1;
/// The longest frame with its header.
pub const MAX_FRAME: usize = VIRTIO_HEADER + 18 + 65536;

/// A frame from the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// From whom.
    pub source: EthernetAddress,
    /// The checksum of the transport layer is not there yet, or has been checked.
    pub trusted: bool,
    /// What it carries.
    pub payload: Payload<'a>,
}

/// What a frame carries.
#[derive(Debug, PartialEq, Eq)]
pub enum Payload<'a> {
    /// An ARP packet.
    Arp(&'a [u8]),
    /// An IP packet.
    Ip(Ip<'a>),
}

/// An IP packet or a fragment of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip<'a> {
    /// From.
    pub src: IpAddr,
    /// To.
    pub dst: IpAddr,
    /// Time to live.
    pub hop_limit: u8,
    /// The protocol of `payload`, or of the whole of which it is a fragment.
    pub protocol: IpProtocol,
    /// Set if this is a fragment.
    pub fragment: Option<Fragment>,
    /// What is in it.
    pub payload: &'a [u8],
}

/// Which fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Identifies the whole.
    pub id: u32,
    /// In bytes.
    pub offset: u16,
    /// It is not the last.
    pub more: bool,
}

/// What the checksums of a packet must be.
pub fn checksums(trusted: bool) -> ChecksumCapabilities {
    if trusted { ChecksumCapabilities::ignored() } else { ChecksumCapabilities::default() }
}

impl<'a> Frame<'a> {
    /// Takes `bytes`, header and frame, apart. `None` for what is damaged, or of a kind that nobody here wants.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (header, frame) = bytes.split_at_checked(VIRTIO_HEADER)?;
        let trusted = header.first()? & NEEDS_CSUM != 0;
        let ethernet = EthernetFrame::new_checked(frame).ok()?;
        let source = ethernet.src_addr();
        let payload = match ethernet.ethertype() {
            EthernetProtocol::Arp => Payload::Arp(ethernet.payload()),
            EthernetProtocol::Ipv4 => Payload::Ip(ipv4(ethernet.payload())?),
            EthernetProtocol::Ipv6 => Payload::Ip(ipv6(ethernet.payload())?),
            EthernetProtocol::Unknown(_) => return None,
        };
        source.is_unicast().then_some(Self { source, trusted, payload })
    }
}

fn ipv4(bytes: &[u8]) -> Option<Ip<'_>> {
    let packet = Ipv4Packet::new_checked(bytes).ok()?;
    if packet.version() != 4 || !packet.verify_checksum() {
        return None;
    }
    let (offset, more) = (packet.frag_offset(), packet.more_frags());
    let fragment = (offset != 0 || more).then(|| Fragment { id: packet.ident().into(), offset, more });
    Some(Ip {
        src: packet.src_addr().into(),
        dst: packet.dst_addr().into(),
        hop_limit: packet.hop_limit(),
        protocol: packet.next_header(),
        fragment,
        payload: packet.payload(),
    })
}

/// Extension headers that may stand before the payload (RFC 8200, 4.1).
const MAX_EXTENSIONS: usize = 8;

fn ipv6(bytes: &[u8]) -> Option<Ip<'_>> {
    let packet = Ipv6Packet::new_checked(bytes).ok()?;
    if packet.version() != 6 {
        return None;
    }
    let (src, dst, hop_limit) = (packet.src_addr().into(), packet.dst_addr().into(), packet.hop_limit());
    let (mut protocol, mut payload) = (packet.next_header(), packet.payload());
    for _ in 0..MAX_EXTENSIONS {
        match protocol {
            IpProtocol::HopByHop | IpProtocol::Ipv6Opts | IpProtocol::Ipv6Route => {
                let (next, units) = (*payload.first()?, *payload.get(1)?);
                payload = payload.get(usize::from(units) * 8 + 8..)?;
                protocol = next.into();
            }
            IpProtocol::Ipv6Frag => {
                let header = Ipv6FragmentHeader::new_checked(payload.get(2..)?).ok()?;
                let next = (*payload.first()?).into();
                let fragment = Fragment {
                    id: header.ident(),
                    offset: header.frag_offset().checked_mul(8)?,
                    more: header.more_frags(),
                };
                let payload = payload.get(8..)?;
                // A whole in one piece is no fragment (RFC 6946).
                let fragment = (fragment.offset != 0 || fragment.more).then_some(fragment);
                return Some(Ip { src, dst, hop_limit, protocol: next, fragment, payload });
            }
            _ => return Some(Ip { src, dst, hop_limit, protocol, fragment: None, payload }),
        }
    }
    None
}
