//! ARP (RFC 826): the gateway answers for itself and the name server.

use smoltcp::wire::{ArpOperation, ArpPacket, ArpRepr, EthernetAddress};

use crate::addresses::{GATEWAY_MAC, is_ours};

/// The answer to an ARP packet, if it wants one.
pub fn answer(packet: &[u8]) -> Option<Vec<u8>> {
    let packet = ArpPacket::new_checked(packet).ok()?;
    let ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Request,
        source_hardware_addr,
        source_protocol_addr,
        target_protocol_addr,
        ..
    } = ArpRepr::parse(&packet).ok()?
    else {
        return None;
    };
    if !is_ours(target_protocol_addr.into()) {
        return None;
    }
    let answer = ArpRepr::EthernetIpv4 {
        operation: ArpOperation::Reply,
        source_hardware_addr: GATEWAY_MAC,
        source_protocol_addr: target_protocol_addr,
        target_hardware_addr: EthernetAddress(source_hardware_addr.0),
        target_protocol_addr: source_protocol_addr,
    };
    let mut bytes = vec![0; answer.buffer_len()];
    answer.emit(&mut ArpPacket::new_unchecked(&mut bytes));
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::{DNS, GATEWAY, GUEST};
    use std::net::Ipv4Addr;

    #[test]
    fn only_for_what_is_ours() {
        let ask = |target: Ipv4Addr| {
            let question = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Request,
                source_hardware_addr: EthernetAddress([2; 6]),
                source_protocol_addr: GUEST,
                target_hardware_addr: EthernetAddress([0; 6]),
                target_protocol_addr: target,
            };
            let mut bytes = vec![0; question.buffer_len()];
            question.emit(&mut ArpPacket::new_unchecked(&mut bytes));
            answer(&bytes).map(|answer| ArpRepr::parse(&ArpPacket::new_checked(&answer).unwrap()).unwrap())
        };
        for ours in [GATEWAY, DNS] {
            let Some(ArpRepr::EthernetIpv4 { source_hardware_addr, source_protocol_addr, .. }) = ask(ours) else {
                panic!()
            };
            assert_eq!((source_hardware_addr, source_protocol_addr), (GATEWAY_MAC, ours));
        }
        assert_eq!(ask(GUEST), None); // or the guest would think that its address is taken
        assert_eq!(ask(Ipv4Addr::new(10, 0, 2, 9)), None);
        assert_eq!(answer(&[0; 20]), None);
    }
}
