//! The network as the guest sees it: fixed addresses, the same for every guest, as each has a network of its own.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use smoltcp::wire::EthernetAddress;

/// The gateway's Ethernet address; everything outside is behind it.
pub const GATEWAY_MAC: EthernetAddress = EthernetAddress([0x52, 0x54, 0x67, 0x00, 0x02, 0x02]);
/// The gateway: towards the host.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// The name server.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// What DHCP gives the guest.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The mask of these.
pub const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 0);
/// The subnet's broadcast address.
pub const BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 255);
/// The prefix (of 64 bits) in which the guest makes its own addresses: a unique local one (RFC 4193).
pub const PREFIX: Ipv6Addr = Ipv6Addr::new(0xfd74, 0x6967, 0x6874, 0, 0, 0, 0, 0);
/// The gateway.
pub const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd74, 0x6967, 0x6874, 0, 0, 0, 0, 2);
/// The name server.
pub const DNS6: Ipv6Addr = Ipv6Addr::new(0xfd74, 0x6967, 0x6874, 0, 0, 0, 0, 3);
/// The gateway on the link, from which routers must speak (RFC 4861, 4.2).
pub const GATEWAY_LINK: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
/// All nodes of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The domain of the names that exist only here.
pub const DOMAIN: &str = "tightrope.internal";
/// The host's name, in [`DOMAIN`].
pub const HOST_NAME: &str = "host";

/// Is `address` in the guest's own networks?
pub fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => (address & NETMASK) == (GATEWAY & NETMASK),
        IpAddr::V6(address) => address.segments().get(..4) == PREFIX.segments().get(..4),
    }
}

/// Is it one of ours?
pub fn is_ours(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => [GATEWAY, DNS].contains(&address),
        IpAddr::V6(address) => [GATEWAY6, DNS6, GATEWAY_LINK].contains(&address),
    }
}

/// May a guest send from it? From its own networks and the link it may, from ours, groups and the rest of the world not.
pub fn is_guest(address: IpAddr) -> bool {
    let near = is_local(address)
        || match address {
            IpAddr::V4(_) => false,
            IpAddr::V6(address) => address.is_unicast_link_local(),
        };
    near && !is_ours(address) && address != IpAddr::V4(BROADCAST)
}
