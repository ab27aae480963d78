//! Neighbour discovery (RFC 4861): the gateway advertises itself as router with a prefix, in which the guest makes its own addresses
//! (RFC 4862), and the name server (RFC 8106); and answers for its addresses.

use std::net::{IpAddr, Ipv6Addr};

use smoltcp::wire::Icmpv6Message;

use crate::addresses::{ALL_NODES, DNS6, GATEWAY_LINK, GATEWAY_MAC, PREFIX, is_ours};
use crate::frame::Ip;

/// Seconds for which an advertisement holds.
const LIFETIME: u16 = 9000;
/// Seconds for which the prefix holds.
const PREFIX_LIFETIME: u32 = 86_400;

/// A message of ICMPv6, the checksum 0.
#[derive(Debug, PartialEq, Eq)]
pub struct Message {
    /// From.
    pub src: Ipv6Addr,
    /// To.
    pub dst: Ipv6Addr,
    /// The message.
    pub bytes: Vec<u8>,
}

/// The router advertisement for everybody. `default_route`: the gateway leads to the Internet.
pub fn advertisement(mtu: u16, default_route: bool) -> Message {
    let lifetime = if default_route { LIFETIME } else { 0 };
    let mut bytes = vec![Icmpv6Message::RouterAdvert.into(), 0, 0, 0, 64, 0];
    bytes.extend(lifetime.to_be_bytes());
    bytes.extend([0; 8]); // reachable and retransmission time: the guest's choice
    bytes.extend([1, 1]); // source link-layer address
    bytes.extend(GATEWAY_MAC.0);
    bytes.extend([5, 1, 0, 0]); // MTU
    bytes.extend(u32::from(mtu).to_be_bytes());
    bytes.extend([3, 4, 64, 0xc0]); // prefix of 64 bits, on link, for addresses
    bytes.extend(PREFIX_LIFETIME.to_be_bytes());
    bytes.extend(PREFIX_LIFETIME.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(PREFIX.octets());
    bytes.extend([25, 3, 0, 0]); // recursive name server
    bytes.extend(PREFIX_LIFETIME.to_be_bytes());
    bytes.extend(DNS6.octets());
    Message { src: GATEWAY_LINK, dst: ALL_NODES, bytes }
}

/// The answer to a neighbour solicitation, if it asks for what is ours. `ip` carries ICMPv6 with a good checksum.
pub fn answer(ip: &Ip<'_>) -> Option<Message> {
    // Type, code, checksum, reserved; then the target (4.3). What came over a router is not from a neighbour (7.1.1).
    let target: [u8; 16] = ip.payload.get(8..24)?.try_into().ok()?;
    let (target, IpAddr::V6(asker)) = (Ipv6Addr::from(target), ip.src) else { return None };
    if ip.hop_limit != 255 || ip.payload.get(1) != Some(&0) || !is_ours(target.into()) {
        return None;
    }
    // Somebody who wants to know whether an address is taken has none of its own yet.
    let probing = asker.is_unspecified();
    let flags = if probing { 0xa0 } else { 0xe0 }; // router, solicited, override
    let mut bytes = vec![Icmpv6Message::NeighborAdvert.into(), 0, 0, 0, flags, 0, 0, 0];
    bytes.extend(target.octets());
    bytes.extend([2, 1]); // target link-layer address
    bytes.extend(GATEWAY_MAC.0);
    Some(Message { src: target, dst: if probing { ALL_NODES } else { asker }, bytes })
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::{Icmpv6Packet, IpProtocol, NdiscRepr};

    fn solicitation(src: Ipv6Addr, target: Ipv6Addr, hop_limit: u8) -> Option<Message> {
        let mut payload = vec![135, 0, 0, 0, 0, 0, 0, 0];
        payload.extend(target.octets());
        answer(&Ip {
            src: src.into(),
            dst: target.into(),
            hop_limit,
            protocol: IpProtocol::Icmpv6,
            fragment: None,
            payload: &payload,
        })
    }

    #[test]
    fn answers_for_its_own() {
        let guest: Ipv6Addr = "fe80::1234".parse().unwrap();
        let answer = solicitation(guest, DNS6, 255).unwrap();
        assert_eq!((answer.src, answer.dst), (DNS6, guest));
        let packet = Icmpv6Packet::new_checked(&answer.bytes).unwrap();
        let NdiscRepr::NeighborAdvert { target_addr, lladdr: Some(mac), .. } = NdiscRepr::parse(&packet).unwrap()
        else {
            panic!()
        };
        assert_eq!((target_addr, mac), (DNS6, GATEWAY_MAC.into()));
        assert_eq!(solicitation(Ipv6Addr::UNSPECIFIED, GATEWAY_LINK, 255).unwrap().dst, ALL_NODES);
        assert_eq!(solicitation(guest, DNS6, 64), None);
        assert_eq!(solicitation(guest, guest, 255), None);
    }

    #[test]
    fn the_advertisement_is_one() {
        let message = advertisement(1500, true);
        let packet = Icmpv6Packet::new_checked(&message.bytes).unwrap();
        let NdiscRepr::RouterAdvert { router_lifetime, mtu, prefix_info: Some(prefix), .. } =
            NdiscRepr::parse(&packet).unwrap()
        else {
            panic!()
        };
        assert_eq!((router_lifetime.secs(), mtu, prefix.prefix, prefix.prefix_len), (9000, Some(1500), PREFIX, 64));
    }
}
