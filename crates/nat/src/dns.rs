//! The name server's own names; all other questions go to the host's name servers as they are.

use std::net::IpAddr;

use crate::addresses::{DOMAIN, GATEWAY, GATEWAY6, HOST_NAME};
use crate::config::NatConfig;

const HEADER: usize = 12;
const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const TYPE_ANY: u16 = 255;
const CLASS_IN: u16 = 1;
/// Seconds for which an answer holds.
const TTL: u32 = 60;
/// Response codes (RFC 1035, 4.1.1).
const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NAME_ERROR: u8 = 3;
const REFUSED: u8 = 5;

/// The one question of a query.
#[derive(Debug, PartialEq, Eq)]
struct Question {
    /// In lower case, without the last dot.
    name: String,
    kind: u16,
    class: u16,
    /// Where the question ends in the message.
    end: usize,
}

impl Question {
    /// Reads a query (RFC 1035, 4.1) with one question, in which no name is compressed.
    fn parse(message: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u16::from_be_bytes([*message.get(at)?, *message.get(at + 1)?]));
        let flags = word(2)?;
        // A query, of the standard kind, with one question.
        if flags & 0xf800 != 0 || word(4)? != 1 {
            return None;
        }
        let mut name = String::new();
        let mut at = HEADER;
        loop {
            let len = usize::from(*message.get(at)?);
            at += 1;
            if len == 0 {
                break;
            }
            let label = message.get(at..at + len).filter(|_| len < 64)?;
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
            at += len;
            if name.len() > 255 {
                return None;
            }
        }
        Some(Self { name, kind: word(at)?, class: word(at + 2)?, end: at + 4 })
    }
}

/// What becomes of a query.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// This is the answer.
    Answer(Vec<u8>),
    /// The host's name servers know, or not.
    Forward,
}

/// Looks at a query.
pub fn look(config: &NatConfig, message: &[u8]) -> Outcome {
    let Some(question) = Question::parse(message) else {
        return if config.isolated { Outcome::Answer(refusal(message, REFUSED)) } else { Outcome::Forward };
    };
    let under = question.name.strip_suffix(DOMAIN).and_then(|rest| rest.strip_suffix('.'));
    let addresses: Vec<IpAddr> = if under == Some(HOST_NAME) {
        vec![GATEWAY.into(), GATEWAY6.into()]
    } else if under.is_some() || question.name == DOMAIN {
        return Outcome::Answer(reply(message, &question, NAME_ERROR, &[]));
    } else {
        config.names.iter().filter(|(name, _)| *name == question.name).map(|(_, address)| *address).collect()
    };
    if addresses.is_empty() {
        return if config.isolated { Outcome::Answer(refusal(message, REFUSED)) } else { Outcome::Forward };
    }
    let wanted: Vec<_> = addresses
        .into_iter()
        .filter(|address| {
            question.class == CLASS_IN
                && (question.kind == TYPE_ANY || question.kind == if address.is_ipv4() { TYPE_A } else { TYPE_AAAA })
        })
        .take(16)
        .collect();
    Outcome::Answer(reply(message, &question, NO_ERROR, &wanted))
}

/// The answer when no name server of the host can be reached.
pub fn failure(message: &[u8]) -> Vec<u8> {
    refusal(message, SERVER_FAILURE)
}

/// A header and the question, if it can be read.
fn refusal(message: &[u8], code: u8) -> Vec<u8> {
    match Question::parse(message) {
        Some(question) => reply(message, &question, code, &[]),
        None => {
            let mut bytes = message.get(..HEADER).unwrap_or(&[0; HEADER]).to_vec();
            set_header(&mut bytes, code, 0, 0);
            bytes
        }
    }
}

fn reply(message: &[u8], question: &Question, code: u8, addresses: &[IpAddr]) -> Vec<u8> {
    let mut bytes = message.get(..question.end).unwrap_or_default().to_vec();
    set_header(&mut bytes, code, 1, addresses.len() as u16);
    for address in addresses {
        let (kind, octets) = match address {
            IpAddr::V4(address) => (TYPE_A, address.octets().to_vec()),
            IpAddr::V6(address) => (TYPE_AAAA, address.octets().to_vec()),
        };
        bytes.extend([0xc0, HEADER as u8]); // the name is that of the question
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes.extend(TTL.to_be_bytes());
        bytes.extend((octets.len() as u16).to_be_bytes());
        bytes.extend(octets);
    }
    bytes
}

/// Makes a query's header one of a response: recursion available, so many questions and answers.
fn set_header(bytes: &mut [u8], code: u8, questions: u16, answers: u16) {
    let desired = bytes.get(2).copied().unwrap_or(0) & 1;
    let ([q0, q1], [a0, a1]) = (questions.to_be_bytes(), answers.to_be_bytes());
    let new = [0x80 | desired, 0x80 | code, q0, q1, a0, a1, 0, 0, 0, 0];
    if let Some(place) = bytes.get_mut(2..HEADER) {
        place.copy_from_slice(&new);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(isolated: bool) -> NatConfig {
        NatConfig {
            guest_mac: [2; 6],
            mtu: 1500,
            isolated,
            host: true,
            rate: None,
            resolvers: vec![],
            names: vec![("build.example".into(), [192, 0, 2, 7].into())],
            ipv6: true,
        }
    }

    fn query(name: &str, kind: u16) -> Vec<u8> {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in name.split('.') {
            bytes.push(label.len() as u8);
            bytes.extend(label.bytes());
        }
        bytes.push(0);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(CLASS_IN.to_be_bytes());
        bytes
    }

    /// Response code and the data of the answers.
    fn answer(isolated: bool, name: &str, kind: u16) -> Option<(u8, Vec<u8>)> {
        let query = query(name, kind);
        match look(&config(isolated), &query) {
            Outcome::Forward => None,
            Outcome::Answer(answer) => {
                assert_eq!(
                    (&answer[..2], answer[2], &answer[HEADER..query.len()]),
                    (&query[..2], 0x81, &query[HEADER..])
                );
                let count = usize::from(answer[7]);
                let data = answer[query.len()..].to_vec();
                assert_eq!(count == 0, data.is_empty());
                Some((answer[3] & 0xf, data.get(12..).unwrap_or_default().to_vec()))
            }
        }
    }

    #[test]
    fn names() {
        assert_eq!(answer(false, "Host.Tightrope.internal", TYPE_A), Some((0, vec![10, 0, 2, 2])));
        assert_eq!(answer(true, "host.tightrope.internal", TYPE_AAAA), Some((0, GATEWAY6.octets().to_vec())));
        assert_eq!(answer(false, "host.tightrope.internal", 15), Some((0, vec![])));
        assert_eq!(answer(false, "other.tightrope.internal", TYPE_A), Some((NAME_ERROR, vec![])));
        assert_eq!(answer(false, "build.example", TYPE_A), Some((0, vec![192, 0, 2, 7])));
        assert_eq!(answer(false, "build.example", TYPE_AAAA), Some((0, vec![])));
        assert_eq!(answer(false, "www.example", TYPE_A), None);
        assert_eq!(answer(true, "www.example", TYPE_A), Some((REFUSED, vec![])));
        let failed = failure(&query("www.example", TYPE_A));
        assert_eq!(failed[3] & 0xf, SERVER_FAILURE);
    }

    proptest! {
        #[test]
        fn any_message(message in prop::collection::vec(any::<u8>(), 0..80), isolated in any::<bool>()) {
            let _ = look(&config(isolated), &message);
            let _ = failure(&message);
            let mut made = query("a.b", TYPE_A);
            made.splice(HEADER.., message);
            let _ = look(&config(isolated), &made);
        }
    }
}
