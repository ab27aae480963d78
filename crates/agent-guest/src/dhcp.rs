//! What a DHCP client says and hears (RFC 2131, RFC 2132), without the sockets.

use std::net::Ipv4Addr;

/// The server's port, and the client's.
pub const SERVER: u16 = 67;
/// The client's port.
pub const CLIENT: u16 = 68;

/// Bytes before the options: a BOOTP message and the cookie.
const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The least size that some servers take (RFC 1542, 2.1).
const LEAST: usize = 300;

mod option {
    pub const MASK: u8 = 1;
    pub const ROUTER: u8 = 3;
    pub const DNS: u8 = 6;
    pub const NAME: u8 = 12;
    pub const DOMAIN: u8 = 15;
    pub const MTU: u8 = 26;
    pub const ADDRESS: u8 = 50;
    pub const LEASE: u8 = 51;
    pub const KIND: u8 = 53;
    pub const SERVER: u8 = 54;
    pub const WANTED: u8 = 55;
    pub const END: u8 = 255;
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Is there a server, and what has it to offer?
    Discover,
    /// This address of this server, please.
    Request(Ipv4Addr, Ipv4Addr),
    /// This address, which we have, for another while; of any server.
    Again(Ipv4Addr),
}

/// What came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// A server's offer: the address, and the server's own.
    Offer(Ipv4Addr, Ipv4Addr),
    /// It is given.
    Lease(Lease),
    /// It is not given (any more).
    Refused,
}

/// An address, and what goes with it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lease {
    /// The address.
    pub address: [u8; 4],
    /// How many bits of it name the network.
    pub prefix: u8,
    /// The way out.
    pub router: Option<[u8; 4]>,
    /// Name servers.
    pub dns: Vec<Ipv4Addr>,
    /// The domain in which names are looked for.
    pub domain: Option<String>,
    /// Largest packet, in bytes.
    pub mtu: Option<u16>,
    /// For how many seconds it is given.
    pub seconds: u32,
}

/// A message to all servers: from the card with the hardware address `mac`, which calls itself `name`.
pub fn message(ask: Ask, id: u32, mac: [u8; 6], name: &str) -> Vec<u8> {
    let mut out = vec![0; FIXED];
    let own = if let Ask::Again(address) = ask { address.octets() } else { [0; 4] };
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(place) = out.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    };
    put(0, &[1, 1, 6, 0]); // a request, by Ethernet
    put(4, &id.to_be_bytes());
    // Answers to everybody: the card has no address yet by which it could be reached.
    put(10, &[0x80, 0]);
    put(12, &own);
    put(28, &mac);
    put(FIXED - COOKIE.len(), &COOKIE);
    let mut add = |kind: u8, value: &[u8]| {
        let value = value.get(..255).unwrap_or(value);
        out.extend([kind, value.len() as u8]);
        out.extend_from_slice(value);
    };
    add(option::KIND, &[if ask == Ask::Discover { 1 } else { 3 }]);
    if let Ask::Request(address, server) = ask {
        add(option::ADDRESS, &address.octets());
        add(option::SERVER, &server.octets());
    }
    if !name.is_empty() {
        add(option::NAME, name.as_bytes());
    }
    add(option::WANTED, &[option::MASK, option::ROUTER, option::DNS, option::DOMAIN, option::MTU]);
    out.push(option::END);
    out.resize(out.len().max(LEAST), 0);
    out
}

/// Reads an answer to the message with this id from the card with this hardware address; `None` if it is none.
pub fn answer(bytes: &[u8], id: u32, mac: [u8; 6]) -> Option<Answer> {
    let field = |at: usize, len: usize| bytes.get(at..at + len);
    let is_ours = field(0, 3)? == [2, 1, 6]
        && field(4, 4)? == id.to_be_bytes()
        && field(28, 6)? == mac
        && field(FIXED - COOKIE.len(), COOKIE.len())? == COOKIE;
    if !is_ours {
        return None;
    }
    let address: [u8; 4] = field(16, 4)?.try_into().ok()?;
    let four = |value: &[u8]| value.first_chunk::<4>().copied();
    let (mut kind, mut server) = (None, None);
    let mut lease = Lease { address, prefix: 32, seconds: 3600, ..Lease::default() };
    for (option, value) in options(bytes.get(FIXED..)?) {
        match option {
            option::KIND => kind = value.first().copied(),
            option::SERVER => server = four(value),
            option::MASK => {
                let mask = u32::from_be_bytes(four(value)?);
                lease.prefix = mask.leading_ones() as u8;
            }
            option::ROUTER => lease.router = four(value),
            option::DNS => lease.dns = value.chunks_exact(4).filter_map(four).map(Ipv4Addr::from).collect(),
            option::DOMAIN => lease.domain = domain(value),
            option::MTU => {
                lease.mtu = value.first_chunk::<2>().map(|mtu| u16::from_be_bytes(*mtu)).filter(|mtu| *mtu >= 576);
            }
            option::LEASE => lease.seconds = four(value).map_or(lease.seconds, u32::from_be_bytes),
            _ => {}
        }
    }
    match kind? {
        2 => Some(Answer::Offer(address.into(), server?.into())),
        5 => Some(Answer::Lease(lease)),
        6 => Some(Answer::Refused),
        _ => None,
    }
}

/// A name as it may stand in `/etc/resolv.conf`.
fn domain(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?.trim_end_matches('\0');
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    (!text.is_empty() && text.chars().all(plain)).then(|| text.to_owned())
}

/// The options, as far as they are whole.
fn options(mut rest: &[u8]) -> impl Iterator<Item = (u8, &[u8])> {
    std::iter::from_fn(move || {
        loop {
            match rest {
                [0, more @ ..] => rest = more,
                [option::END, ..] | [] | [_] => return None,
                [kind, len, more @ ..] => {
                    let (value, after) = more.split_at_checked(usize::from(*len))?;
                    let kind = *kind;
                    rest = after;
                    return Some((kind, value));
                }
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];

    fn reply(kind: u8, more: &[u8]) -> Vec<u8> {
        let mut out = message(Ask::Discover, 9, MAC, "");
        out.truncate(FIXED);
        out[0] = 2;
        out[16..20].copy_from_slice(&[10, 0, 2, 15]);
        out.extend([0, option::KIND, 1, kind]);
        out.extend(more);
        out.push(option::END);
        out
    }

    #[test]
    fn messages() {
        let discover = message(Ask::Discover, 0x0102_0304, MAC, "guest");
        assert_eq!((discover.len(), &discover[..8]), (LEAST, &[1, 1, 6, 0, 1, 2, 3, 4][..]));
        assert_eq!(discover[28..34], MAC);
        let all: Vec<_> = options(&discover[FIXED..]).collect();
        assert_eq!(all[0], (option::KIND, &[1][..]));
        assert_eq!(all[1], (option::NAME, &b"guest"[..]));
        let (address, server) = ([10, 0, 2, 15].into(), [10, 0, 2, 2].into());
        let request = message(Ask::Request(address, server), 1, MAC, "");
        let all: Vec<_> = options(&request[FIXED..]).take(3).collect();
        assert_eq!(
            all,
            [(option::KIND, &[3][..]), (option::ADDRESS, &[10, 0, 2, 15][..]), (option::SERVER, &[10, 0, 2, 2][..])]
        );
        let again = message(Ask::Again(address), 1, MAC, "");
        assert_eq!(again[12..16], [10, 0, 2, 15]);
        assert!(options(&again[FIXED..]).all(|(kind, _)| kind != option::SERVER && kind != option::ADDRESS));
    }

    #[test]
    fn answers() {
        let server = [option::SERVER, 4, 10, 0, 2, 2];
        let offer = answer(&reply(2, &server), 9, MAC);
        assert_eq!(offer, Some(Answer::Offer([10, 0, 2, 15].into(), [10, 0, 2, 2].into())));
        let more = [
            &server[..],
            &[option::MASK, 4, 255, 255, 255, 0, option::ROUTER, 8, 10, 0, 2, 2, 10, 0, 2, 9],
            &[option::DNS, 8, 10, 0, 2, 3, 1, 1, 1, 1, option::MTU, 2, 5, 0xdc, option::LEASE, 4, 0, 0, 0, 99],
            &[option::DOMAIN, 3, b'a', b'.', b'b'],
        ]
        .concat();
        let Some(Answer::Lease(lease)) = answer(&reply(5, &more), 9, MAC) else { panic!("no lease") };
        let wanted = Lease {
            address: [10, 0, 2, 15],
            prefix: 24,
            router: Some([10, 0, 2, 2]),
            dns: vec![[10, 0, 2, 3].into(), [1; 4].into()],
            domain: Some("a.b".into()),
            mtu: Some(1500),
            seconds: 99,
        };
        assert_eq!(lease, wanted);
        assert_eq!(answer(&reply(6, &server), 9, MAC), Some(Answer::Refused));
        // For others, of other kinds, cut off anywhere: no answer, or one without what was cut off.
        assert_eq!(answer(&reply(5, &more), 8, MAC), None);
        assert_eq!(answer(&reply(5, &more), 9, [3; 6]), None);
        assert_eq!(answer(&reply(7, &more), 9, MAC), None);
        assert_eq!(answer(&reply(2, &[]), 9, MAC), None, "an offer of nobody");
        let whole = reply(5, &more);
        for len in 0..whole.len() {
            let _ = answer(&whole[..len], 9, MAC);
        }
        assert_eq!(answer(&[&whole[..243], &[option::DOMAIN, 200, 1]].concat(), 9, MAC), None);
        assert_eq!(domain(b"x\nnameserver 6.6.6.6"), None);
    }
}
