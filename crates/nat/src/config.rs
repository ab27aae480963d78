//! What the network server is to do. It is given everything at its start and can look nothing up later.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Deserialize, Serialize};

/// The network of one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatConfig {
    /// The guest's Ethernet address.
    pub guest_mac: [u8; 6],
    /// The largest packet without its Ethernet header, in bytes; at least 1280.
    pub mtu: u16,
    /// The guest reaches nothing outside; forwarded ports reach the guest.
    pub isolated: bool,
    /// The guest reaches the services on the host, those of its loopback interface by the gateway's address.
    pub host: bool,
    /// Bytes a second in each direction; no limit if `None`.
    pub rate: Option<u64>,
    /// Name servers to ask, in this order.
    pub resolvers: Vec<SocketAddr>,
    /// Names that the host's own file of hosts knows, in lower case.
    pub names: Vec<(String, IpAddr)>,
    /// The host has a way to the Internet by IPv6.
    pub ipv6: bool,
}

impl NatConfig {
    /// Everything open, with the host's own name servers and names. Reads files; to be called before any sandbox.
    pub fn of_host(guest_mac: [u8; 6]) -> Self {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        Self {
            guest_mac,
            mtu: 1500,
            isolated: false,
            host: true,
            rate: None,
            resolvers: parse_resolvers(&read("/etc/resolv.conf")),
            names: parse_names(&read("/etc/hosts")),
            ipv6: has_ipv6(),
        }
    }
}

/// The `nameserver` lines of resolv.conf(5); the host itself when there are none.
fn parse_resolvers(text: &str) -> Vec<SocketAddr> {
    let servers: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            let address = words.next().filter(|word| *word == "nameserver").and(words.next())?;
            // An address with a zone (fe80::1%eth0) cannot be kept as one.
            Some(SocketAddr::new(address.parse().ok()?, 53))
        })
        .take(3)
        .collect();
    if servers.is_empty() { vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 53))] } else { servers }
}

/// The lines of hosts(5). Names of the loopback interface are the guest's own business and left out.
fn parse_names(text: &str) -> Vec<(String, IpAddr)> {
    let mut names = Vec::new();
    for line in text.lines().take(10_000) {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(address) = words.next().and_then(|word| word.parse::<IpAddr>().ok()) else { continue };
        if address.is_loopback() || address.is_multicast() || address.is_unspecified() {
            continue;
        }
        names.extend(words.map(|name| (name.trim_end_matches('.').to_ascii_lowercase(), address)));
    }
    names
}

/// Is there a route to the Internet? Asks the host's routing table by connecting a datagram socket, which sends nothing.
fn has_ipv6() -> bool {
    // 2000::/3 is all of today's Internet (RFC 4291, 2.4).
    const SOMEWHERE: Ipv6Addr = Ipv6Addr::new(0x2600, 0, 0, 0, 0, 0, 0, 1);
    std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).and_then(|socket| socket.connect((SOMEWHERE, 53))).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_host() {
        let servers =
            parse_resolvers("# x\nsearch a.b\nnameserver 192.0.2.1\nnameserver\t::1 # y\nnameserver fe80::1%2\n");
        assert_eq!(servers, ["192.0.2.1:53".parse().unwrap(), "[::1]:53".parse().unwrap()]);
        assert_eq!(parse_resolvers(""), ["127.0.0.1:53".parse().unwrap()]);
        let names =
            parse_names("127.0.0.1 localhost\n192.0.2.7 Build build.example. # old\n::1 x\n2001:db8::1 six\nbad y\n");
        let of = |name: &str| names.iter().filter(|n| n.0 == name).map(|n| n.1.to_string()).collect::<Vec<_>>();
        assert_eq!(
            (of("build"), of("build.example"), of("six")),
            (vec!["192.0.2.7".to_string()], vec!["192.0.2.7".to_string()], vec!["2001:db8::1".to_string()])
        );
        assert_eq!(names.len(), 3);
    }
}
