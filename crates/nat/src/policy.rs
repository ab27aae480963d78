//! Where the guest's packets may go. The only place that decides, and the only maker of [`Target`]s: no socket is connected to
//! anything else.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::addresses::{DNS, DNS6, GATEWAY, GATEWAY6, is_local};
use crate::config::NatConfig;

/// An address of the host's world that the guest may reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    address: SocketAddr,
    /// It is outside, so it must not turn out to be the host itself if the host is off limits.
    check_host: bool,
    /// It is the host itself by its loopback address: what listens on that of the other family is meant as well.
    either: bool,
}

impl Target {
    /// Where else it may be, if nobody is there: programs of the host that are reached by a name may listen on IPv4 or IPv6 alone.
    pub fn otherwise(self) -> Option<Self> {
        let address: IpAddr =
            if self.address.is_ipv4() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let other = Self { address: SocketAddr::new(address, self.address.port()), either: false, ..self };
        self.either.then_some(other)
    }

    /// The address.
    pub fn address(self) -> SocketAddr {
        self.address
    }

    /// Must the connection be given up if it turns out to end at the host itself?
    pub fn must_not_be_host(self) -> bool {
        self.check_host
    }
}

/// What happens to packets for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// They may pass.
    Pass(Target),
    /// They ask our name server.
    Dns,
    /// They may not pass; the guest is told.
    Refuse,
    /// They have no meaning outside of the guest's link; nothing is said (RFC 1122, 3.2.2).
    Drop,
}

/// Decides on packets for `to`.
pub fn decide(config: &NatConfig, to: SocketAddr) -> Verdict {
    let ip = to.ip();
    if (ip == DNS || ip == DNS6) && to.port() == 53 {
        return Verdict::Dns;
    }
    if ip == GATEWAY || ip == GATEWAY6 {
        let loopback: IpAddr = if ip.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() };
        return if config.host && !config.isolated {
            Verdict::Pass(Target { address: SocketAddr::new(loopback, to.port()), check_host: false, either: true })
        } else {
            Verdict::Refuse
        };
    }
    if is_group(ip) {
        return Verdict::Drop;
    }
    if config.isolated || is_local(ip) || !is_global_enough(ip) {
        return Verdict::Refuse;
    }
    Verdict::Pass(Target { address: to, check_host: !config.host, either: false })
}

/// One of the configured name servers: the user chose it, so it may be anywhere.
pub fn resolver(address: SocketAddr) -> Target {
    Target { address, check_host: false, either: false }
}

fn is_group(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_multicast() || ip.is_broadcast() || ip == crate::addresses::BROADCAST,
        IpAddr::V6(ip) => ip.is_multicast(),
    }
}

/// Not one of the addresses that mean "this host" or "this link" in whatever disguise: those would reach the host's own loopback
/// interface, or what trusts its neighbours, such as the metadata service of a cloud at 169.254.169.254.
fn is_global_enough(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [first, ..] = ip.octets();
            first != 0 && first < 240 && !ip.is_loopback() && !ip.is_link_local()
        }
        IpAddr::V6(ip) => {
            // ::/96 and ::ffff:0:0/96 hold IPv4 addresses (RFC 4291, 2.5.5), ::1 and :: among them.
            let embeds = matches!(ip.segments(), [0, 0, 0, 0, 0, 0 | 0xffff, ..]);
            let site_local = ip.segments().first().is_some_and(|first| first & 0xffc0 == 0xfec0);
            // The cloud's metadata service again, at an address of its own.
            let metadata = ip.segments().first() == Some(&0xfd00) && ip.segments().get(1) == Some(&0x0ec2);
            !embeds && !ip.is_unicast_link_local() && !site_local && !metadata
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> NatConfig {
        NatConfig {
            guest_mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            isolated: false,
            host: true,
            rate: None,
            resolvers: vec![],
            names: vec![],
            ipv6: true,
        }
    }

    fn passes(config: &NatConfig, to: &str) -> Option<SocketAddr> {
        match decide(config, to.parse().unwrap()) {
            Verdict::Pass(target) => Some(target.address()),
            _ => None,
        }
    }

    #[test]
    fn the_outside_and_the_host() {
        let config = config();
        for outside in ["192.0.2.1:80", "10.0.3.1:1", "[2001:db8::1]:443", "[fd00::1]:22"] {
            assert_eq!(passes(&config, outside), Some(outside.parse().unwrap()));
        }
        assert_eq!(passes(&config, "10.0.2.2:80"), Some("127.0.0.1:80".parse().unwrap()));
        assert_eq!(passes(&config, "[fd74:6967:6874::2]:80"), Some("[::1]:80".parse().unwrap()));
        for dns in ["10.0.2.3:53", "[fd74:6967:6874::3]:53"] {
            assert_eq!(decide(&config, dns.parse().unwrap()), Verdict::Dns);
        }
    }

    #[test]
    fn no_disguise_of_the_host_passes() {
        let config = config();
        for inside in [
            "127.0.0.1:80",
            "127.9.9.9:80",
            "0.0.0.0:80",
            "0.1.2.3:80",
            "169.254.169.254:80",
            "255.255.255.255:67",
            "224.0.0.1:1",
            "240.0.0.1:1",
            "10.0.2.7:80",
            "10.0.2.255:80",
            "10.0.2.3:80",
            "[::]:80",
            "[::1]:80",
            "[::ffff:127.0.0.1]:80",
            "[::127.0.0.1]:80",
            "[fe80::1]:80",
            "[ff02::1]:80",
            "[fec0::1]:80",
            "[fd74:6967:6874::99]:80",
            "[fd00:ec2::254]:80",
        ] {
            assert_eq!(passes(&config, inside), None, "{inside}");
        }
    }

    #[test]
    fn switches() {
        let no_host = NatConfig { host: false, ..config() };
        assert_eq!(passes(&no_host, "10.0.2.2:80"), None);
        let Verdict::Pass(target) = decide(&no_host, "192.0.2.1:80".parse().unwrap()) else { panic!() };
        assert!(target.must_not_be_host());
        let isolated = NatConfig { isolated: true, ..config() };
        for to in ["10.0.2.2:80", "192.0.2.1:80", "[2001:db8::1]:80"] {
            assert_eq!(passes(&isolated, to), None);
        }
    }
}
