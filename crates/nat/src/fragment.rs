//! Fragments of the guest's packets, put together again (RFC 791, 3.2; RFC 8200, 4.5).
//!
//! Bounded in number, size and time. Fragments that overlap are an attack or damage, and take their whole with them (RFC 5722).

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use smoltcp::wire::IpProtocol;

use crate::frame::{Fragment, Ip};

/// Packets in the making.
const MAX_PACKETS: usize = 16;
/// How long the last fragment may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// The largest payload of a packet, in bytes.
const MAX_LEN: usize = 65535;
/// Most pieces of a packet.
const MAX_PIECES: usize = 256;

type Key = (IpAddr, IpAddr, u32, u8);

#[derive(Debug)]
struct Partial {
    bytes: Vec<u8>,
    /// Start and end of what is there.
    pieces: Vec<(usize, usize)>,
    /// Known when the last fragment is there.
    len: Option<usize>,
    since: Instant,
}

/// Packets of which some fragments are there.
#[derive(Debug, Default)]
pub struct Reassembly {
    partial: HashMap<Key, Partial>,
}

impl Reassembly {
    /// Takes in a fragment; returns the payload of the whole if this was its last missing piece.
    pub fn add(&mut self, ip: &Ip<'_>, fragment: Fragment, now: Instant) -> Option<Vec<u8>> {
        self.partial.retain(|_, partial| now.saturating_duration_since(partial.since) < PATIENCE);
        let key = (ip.src, ip.dst, fragment.id, u8::from(ip.protocol));
        let start = usize::from(fragment.offset);
        let end = start + ip.payload.len();
        // All but the last are whole units of 8 bytes.
        let odd = fragment.more && !ip.payload.len().is_multiple_of(8);
        if end > MAX_LEN || odd || ip.payload.is_empty() {
            self.partial.remove(&key);
            return None;
        }
        if !self.partial.contains_key(&key) && self.partial.len() >= MAX_PACKETS {
            let oldest = self.partial.iter().min_by_key(|(_, partial)| partial.since).map(|(key, _)| *key)?;
            self.partial.remove(&oldest);
        }
        let partial = self.partial.entry(key).or_insert_with(|| Partial {
            bytes: Vec::new(),
            pieces: Vec::new(),
            len: None,
            since: now,
        });
        if partial.pieces.contains(&(start, end)) {
            return None; // the same again
        }
        let overlaps = partial.pieces.iter().any(|(from, to)| start < *to && *from < end);
        let beyond = partial.len.is_some_and(|len| end > len || !fragment.more);
        let short = !fragment.more && partial.pieces.iter().any(|(_, to)| *to > end);
        if overlaps || beyond || short || partial.pieces.len() >= MAX_PIECES {
            self.partial.remove(&key);
            return None;
        }
        if partial.bytes.len() < end {
            partial.bytes.resize(end, 0);
        }
        partial.bytes.get_mut(start..end)?.copy_from_slice(ip.payload);
        partial.pieces.push((start, end));
        if !fragment.more {
            partial.len = Some(end);
        }
        let there: usize = partial.pieces.iter().map(|(from, to)| to - from).sum();
        if partial.len == Some(there) {
            return self.partial.remove(&key).map(|partial| partial.bytes);
        }
        None
    }
}

/// For those protocols whose packets come in fragments; TCP's never do.
pub fn is_wanted(protocol: IpProtocol) -> bool {
    matches!(protocol, IpProtocol::Udp | IpProtocol::Icmp | IpProtocol::Icmpv6)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn packet(payload: &[u8]) -> Ip<'_> {
        let address = IpAddr::from([10, 0, 2, 15]);
        Ip { src: address, dst: address, hop_limit: 64, protocol: IpProtocol::Udp, fragment: None, payload }
    }

    fn pieces(len: usize, step: usize) -> Vec<(Fragment, Vec<u8>)> {
        let whole: Vec<u8> = (0..len).map(|at| at as u8).collect();
        whole
            .chunks(step)
            .enumerate()
            .map(|(n, piece)| {
                let offset = (n * step) as u16;
                (Fragment { id: 7, offset, more: usize::from(offset) + piece.len() < len }, piece.to_vec())
            })
            .collect()
    }

    #[test]
    fn overlaps_and_floods() {
        let now = Instant::now();
        let mut reassembly = Reassembly::default();
        let add = |r: &mut Reassembly, id, offset, more, len: usize| {
            r.add(&packet(&vec![1; len]), Fragment { id, offset, more }, now)
        };
        assert_eq!(add(&mut reassembly, 1, 0, true, 16), None);
        assert_eq!(add(&mut reassembly, 1, 8, true, 16), None); // overlaps: all is thrown away
        assert_eq!(add(&mut reassembly, 1, 16, false, 3), None);
        assert_eq!(add(&mut reassembly, 2, 65528, false, 100), None); // beyond the end
        for id in 0..1000 {
            assert_eq!(add(&mut reassembly, id, 0, true, 8), None);
        }
        assert!(reassembly.partial.len() <= MAX_PACKETS);
        let later = now + PATIENCE;
        assert_eq!(reassembly.add(&packet(&[1]), Fragment { id: 999, offset: 8, more: false }, later), None);
        assert_eq!(reassembly.partial.len(), 1, "too late");
    }

    proptest! {
        #[test]
        fn any_order_and_repetition(len in 1usize..5000, step in 1usize..20, order in any::<prop::sample::Index>(), seed in any::<u64>()) {
            let mut pieces = pieces(len, step * 8);
            let mut seed = seed | 1;
            for n in (1..pieces.len()).rev() {
                seed ^= seed << 13; seed ^= seed >> 7; seed ^= seed << 17;
                pieces.swap(n, seed as usize % (n + 1));
            }
            let again = pieces[order.index(pieces.len())].clone();
            let last = pieces.len() - 1;
            if last > 0 && again != pieces[last] {
                let at = pieces.iter().position(|p| *p == again).unwrap();
                pieces.insert(at, again);
            }
            let mut reassembly = Reassembly::default();
            let now = Instant::now();
            let results: Vec<_> = pieces.iter().map(|(f, data)| reassembly.add(&packet(data), *f, now)).collect();
            let fragments = pieces.len();
            if fragments <= MAX_PIECES {
                prop_assert!(results[..fragments - 1].iter().all(Option::is_none));
                let whole: Vec<u8> = (0..len).map(|at| at as u8).collect();
                prop_assert_eq!(results[fragments - 1].as_ref(), Some(&whole));
            }
            prop_assert!(reassembly.partial.len() <= 1);
        }
    }
}
