//! The Internet checksum (RFC 1071).

use std::net::IpAddr;

/// A running sum of 16-bit words. Pieces may have any length; only the last may be odd.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum {
    /// Of words in network order, not folded.
    total: u64,
    /// The piece before ended in the middle of a word.
    odd: bool,
}

impl Sum {
    /// Starts with the pseudo-header of TCP, UDP and ICMPv6 (RFC 9293, 3.1; RFC 8200, 8.1).
    pub fn pseudo(src: IpAddr, dst: IpAddr, protocol: u8, len: u32) -> Self {
        let mut sum = Self::default();
        for address in [src, dst] {
            match address {
                IpAddr::V4(address) => sum.add(&address.octets()),
                IpAddr::V6(address) => sum.add(&address.octets()),
            }
        }
        sum.total += u64::from(protocol) + u64::from(len >> 16) + u64::from(len & 0xffff);
        sum
    }

    /// Adds a piece.
    pub fn add(&mut self, mut piece: &[u8]) {
        if self.odd
            && let Some((first, rest)) = piece.split_first()
        {
            self.total += u64::from(*first);
            self.odd = false;
            piece = rest;
        }
        // 32 bits at a time are as good: the carries are folded in the end (RFC 1071, 2).
        let mut words = piece.chunks_exact(4);
        for word in &mut words {
            if let Ok(word) = <[u8; 4]>::try_from(word) {
                self.total += u64::from(u32::from_be_bytes(word));
            }
        }
        match *words.remainder() {
            [a] => (self.total, self.odd) = (self.total + (u64::from(a) << 8), true),
            [a, b] => self.total += u64::from(u16::from_be_bytes([a, b])),
            [a, b, c] => {
                self.total += u64::from(u16::from_be_bytes([a, b])) + (u64::from(c) << 8);
                self.odd = true;
            }
            _ => {}
        }
    }

    /// The sum, not complemented: what is put into the checksum field of a packet whose checksum somebody else completes.
    pub fn partial(self) -> u16 {
        let mut total = self.total;
        while total > 0xffff {
            total = (total >> 16) + (total & 0xffff);
        }
        total as u16
    }

    /// The checksum.
    pub fn finish(self) -> u16 {
        !self.partial()
    }
}

/// The checksum of one piece.
pub fn checksum(piece: &[u8]) -> u16 {
    let mut sum = Sum::default();
    sum.add(piece);
    sum.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slow(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..6)) {
            let mut sum = Sum::default();
            for piece in &pieces {
                sum.add(piece);
            }
            // 0 and 0xffff are the same number.
            let (fast, slow) = (sum.finish(), slow(&pieces.concat()));
            prop_assert!(fast == slow || fast ^ slow == 0xffff && (fast == 0 || slow == 0));
        }
    }

    #[test]
    fn an_example() {
        // RFC 1071, 3
        assert_eq!(checksum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2);
    }
}
