//! DHCP (RFC 2131): a server with one address to give.

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr};

use crate::addresses::{DNS, DOMAIN, GATEWAY, GUEST, NETMASK};

/// The server's port; the client's is one more.
pub const SERVER_PORT: u16 = 67;
/// The client's port.
pub const CLIENT_PORT: u16 = 68;
/// Seconds for which an address is given. The guest keeps it; nobody else could have it.
const LEASE: u32 = 86_400;
/// Options (RFC 2132; RFC 3397).
const OPTION_DOMAIN: u8 = 15;
const OPTION_MTU: u8 = 26;

/// An answer to the client.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The DHCP message.
    pub message: Vec<u8>,
    /// To everybody, as the client has no address yet.
    pub broadcast: bool,
}

/// Answers a message that came to port 67.
pub fn answer(message: &[u8], mtu: u16) -> Option<Answer> {
    let packet = DhcpPacket::new_checked(message).ok()?;
    let request = DhcpRepr::parse(&packet).ok()?;
    let to_us = request.server_identifier.is_none_or(|server| server == GATEWAY);
    let kind = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request if to_us => {
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == GUEST { DhcpMessageType::Ack } else { DhcpMessageType::Nak }
        }
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        // Another server's, or the client gives the address back: no answer (4.3.3, 4.3.4).
        _ => return None,
    };
    let gives = kind != DhcpMessageType::Nak;
    let informs = request.message_type == DhcpMessageType::Inform;
    let lease = (gives && !informs).then_some(LEASE);
    let mtu = mtu.to_be_bytes();
    let more =
        [DhcpOption { kind: OPTION_DOMAIN, data: DOMAIN.as_bytes() }, DhcpOption { kind: OPTION_MTU, data: &mtu }];
    let answer = DhcpRepr {
        message_type: kind,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if gives { request.client_ip } else { [0; 4].into() },
        your_ip: if lease.is_some() { GUEST } else { [0; 4].into() },
        server_ip: GATEWAY,
        router: gives.then_some(GATEWAY),
        subnet_mask: gives.then_some(NETMASK),
        relay_agent_ip: [0; 4].into(),
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(GATEWAY),
        parameter_request_list: None,
        dns_servers: gives.then(|| [DNS].into_iter().collect()),
        max_size: None,
        lease_duration: lease,
        renew_duration: None,
        rebind_duration: None,
        additional_options: if gives { &more } else { &[] },
    };
    // Some clients want no message below the least size of BOOTP (RFC 1542, 2.1).
    let mut bytes = vec![0; answer.buffer_len().max(300)];
    answer.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).ok()?;
    Some(Answer { message: bytes, broadcast: request.client_ip != GUEST })
}

#[cfg(test)]
mod tests {
    use super::*;
    use smoltcp::wire::EthernetAddress;
    use std::net::Ipv4Addr;

    fn ask(kind: DhcpMessageType, requested: Option<Ipv4Addr>, server: Option<Ipv4Addr>) -> Option<Answer> {
        let request = DhcpRepr {
            message_type: kind,
            transaction_id: 77,
            secs: 0,
            client_hardware_address: EthernetAddress([2; 6]),
            client_ip: [0; 4].into(),
            your_ip: [0; 4].into(),
            server_ip: [0; 4].into(),
            router: None,
            subnet_mask: None,
            relay_agent_ip: [0; 4].into(),
            broadcast: false,
            requested_ip: requested,
            client_identifier: None,
            server_identifier: server,
            parameter_request_list: Some(&[1, 3, 6]),
            dns_servers: None,
            max_size: None,
            lease_duration: None,
            renew_duration: None,
            rebind_duration: None,
            additional_options: &[],
        };
        let mut bytes = vec![0; request.buffer_len()];
        request.emit(&mut DhcpPacket::new_unchecked(&mut bytes[..])).unwrap();
        answer(&bytes, 1500)
    }

    fn kind_of(answer: &Answer) -> DhcpMessageType {
        let packet = DhcpPacket::new_checked(&answer.message[..]).unwrap();
        let repr = DhcpRepr::parse(&packet).unwrap();
        assert_eq!((repr.transaction_id, repr.server_identifier), (77, Some(GATEWAY)));
        if repr.message_type != DhcpMessageType::Nak {
            assert_eq!((repr.router, repr.subnet_mask), (Some(GATEWAY), Some(NETMASK)));
            assert_eq!(repr.dns_servers.unwrap().as_slice(), [DNS]);
        }
        repr.message_type
    }

    #[test]
    fn the_ways_of_a_client() {
        let offer = ask(DhcpMessageType::Discover, None, None).unwrap();
        assert_eq!(kind_of(&offer), DhcpMessageType::Offer);
        assert!(offer.broadcast);
        assert_eq!(kind_of(&ask(DhcpMessageType::Request, Some(GUEST), Some(GATEWAY)).unwrap()), DhcpMessageType::Ack);
        let other = Some([192, 168, 1, 5].into());
        assert_eq!(kind_of(&ask(DhcpMessageType::Request, other, None).unwrap()), DhcpMessageType::Nak);
        assert_eq!(ask(DhcpMessageType::Request, Some(GUEST), other), None, "another server's");
        assert_eq!(kind_of(&ask(DhcpMessageType::Inform, None, None).unwrap()), DhcpMessageType::Ack);
        assert_eq!(ask(DhcpMessageType::Release, None, None), None);
        assert_eq!(answer(&[1; 240], 1500), None);
    }
}
