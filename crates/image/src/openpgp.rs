//! OpenPGP: is this `InRelease` signed by a key we trust?
//!
//! The crate `pgp` does the mathematics; what makes a signature count is decided here (RFC 9580):
//!
//! - a certificate counts if it is not revoked, not expired, has a valid self-signature, and its key is
//!   RSA of at least 2048 bits, EdDSA or ECDSA;
//! - a signing subkey counts if its newest binding is valid, says "may sign", carries the subkey's own
//!   back signature, and it is neither revoked nor expired;
//! - signatures count if they use SHA-2 or SHA-3 of at least 256 bits, were not made in the future, are
//!   not expired, and hold no critical subpacket that we do not know;
//! - of a cleartext-signed file only the text inside the frame is ever used, and the frame is parsed
//!   strictly: nothing before, nothing after, no header but `Hash`.
//!
//! Not done: designated revokers, web of trust. The keyring files are the trust.

use std::fs;
use std::path::Path;

use pgp::armor::{BlockType, Dearmor};
use pgp::composed::{Deserializable, SignedPublicKey, SignedPublicSubKey};
use pgp::crypto::hash::HashAlgorithm;
use pgp::packet::{Packet, PacketParser, PublicKey, PublicSubkey, Signature, SignatureType, SubpacketData};
use pgp::types::{KeyDetails, PublicParams, Tag};

/// How far a signature may lie in the future, in seconds: hosts' clocks are not exact.
pub const CLOCK_SKEW: u64 = 24 * 3600;

/// The largest signature block accepted, in bytes.
const MAX_SIGNATURE: usize = 128 << 10;

/// A key that may sign, with everything that was checked about it.
#[derive(Debug)]
enum SigningKey {
    Primary(PublicKey),
    Subkey(PublicSubkey),
}

impl SigningKey {
    fn details(&self) -> &dyn KeyDetails {
        match self {
            Self::Primary(k) => k,
            Self::Subkey(k) => k,
        }
    }
}

/// The keys that may sign.
#[derive(Debug, Default)]
pub struct Keyring {
    keys: Vec<SigningKey>,
}

impl Keyring {
    /// Adds the certificates of a keyring file, binary or ASCII-armoured, that count at time `now`
    /// (seconds since 1970). Certificates that do not count are left out.
    ///
    /// # Errors
    /// A file that cannot be read; what cannot be parsed in it is left out.
    pub fn add_file(&mut self, path: &Path, now: u64) -> std::io::Result<()> {
        self.add(&fs::read(path)?, now);
        Ok(())
    }

    /// Adds certificates from memory, as [`Keyring::add_file`] does. Returns how many keys were added.
    pub fn add(&mut self, data: &[u8], now: u64) -> usize {
        let before = self.keys.len();
        if let Ok((certs, _)) = SignedPublicKey::from_reader_many(data) {
            // A parse error in one certificate may repeat for ever; there are never many.
            for cert in certs.take(1000).flatten() {
                self.add_cert(cert, now);
            }
        }
        self.keys.len() - before
    }

    /// Whether no key at all counts.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    fn add_cert(&mut self, cert: SignedPublicKey, now: u64) {
        let primary = &cert.primary_key;
        let revoked = cert.details.revocation_signatures.iter().any(|s| s.verify_key(primary).is_ok());
        if revoked || !strong_key(primary) {
            return;
        }
        let direct = cert.details.direct_signatures.iter().filter(|s| counts(s, now) && s.verify_key(primary).is_ok());
        let of_users = cert.details.users.iter().flat_map(|user| {
            let valid = |s: &&Signature| s.verify_certification(primary, Tag::UserId, &user.id).is_ok();
            let revoked =
                user.signatures.iter().filter(|s| s.typ() == Some(SignatureType::CertRevocation)).any(|s| valid(&s));
            user.signatures
                .iter()
                .filter(move |_| !revoked)
                .filter(|s| s.is_certification() && counts(s, now))
                .filter(valid)
        });
        let Some(newest) = direct.chain(of_users).max_by_key(|s| created(s)) else {
            return;
        };
        if expired(primary, newest, now) {
            return;
        }
        let flags = newest.key_flags();
        // A certificate without key flags comes from a time before them: its primary key signs.
        let none = !flags.certify() && !flags.sign() && !flags.encrypt_comms();
        for sub in &cert.public_subkeys {
            if subkey_may_sign(primary, sub, now) {
                self.keys.push(SigningKey::Subkey(sub.key.clone()));
            }
        }
        if flags.sign() || none {
            self.keys.push(SigningKey::Primary(cert.primary_key));
        }
    }

    /// Checks a cleartext-signed file (RFC 9580, section 7) and returns the signed text, lines ended by
    /// `\n`, without trailing blanks.
    ///
    /// # Errors
    /// Why it does not count, as a phrase for [`crate::Error::BadSignature`].
    pub fn verify_cleartext(&self, data: &[u8], now: u64) -> Result<String, String> {
        let (text, armor) = split_frame(data)?;
        let signatures = parse_signatures(&armor)?;
        let mut reason = "it has no signature".to_owned();
        for signature in &signatures {
            match self.check(signature, &text, now) {
                Ok(()) => return Ok(text),
                Err(r) => reason = r,
            }
        }
        Err(reason)
    }

    fn check(&self, signature: &Signature, text: &str, now: u64) -> Result<(), String> {
        if signature.typ() != Some(SignatureType::Text) {
            return Err("the signature is not one of text".into());
        }
        if !counts(signature, now) {
            return Err("the signature is expired, lies in the future or uses a weak hash".into());
        }
        let mut known = false;
        for key in &self.keys {
            let details = key.details();
            let id = details.legacy_key_id();
            let fingerprint = details.fingerprint();
            if !signature.issuer_key_id().contains(&&id) && !signature.issuer_fingerprint().contains(&&fingerprint) {
                continue;
            }
            known = true;
            if created(signature) < u64::from(details.created_at().as_secs()) {
                continue;
            }
            let good = match key {
                SigningKey::Primary(k) => signature.verify(k, text.as_bytes()),
                SigningKey::Subkey(k) => signature.verify(k, text.as_bytes()),
            };
            if good.is_ok() {
                return Ok(());
            }
        }
        match known {
            true => Err("the signature does not match the content".into()),
            false => {
                let id = signature
                    .issuer_fingerprint()
                    .first()
                    .map(ToString::to_string)
                    .or_else(|| signature.issuer_key_id().first().map(ToString::to_string))
                    .unwrap_or_else(|| "unknown".into());
                Err(format!("key {id} is not in the keyring, or is revoked or expired"))
            }
        }
    }
}

fn subkey_may_sign(primary: &PublicKey, sub: &SignedPublicSubKey, now: u64) -> bool {
    let valid = |s: &&Signature| s.verify_subkey_binding(primary, &sub.key).is_ok();
    let of_type = |t| move |s: &&Signature| s.typ() == Some(t);
    let revoked = sub.signatures.iter().filter(of_type(SignatureType::SubkeyRevocation)).any(|s| valid(&s));
    let newest = sub
        .signatures
        .iter()
        .filter(of_type(SignatureType::SubkeyBinding))
        .filter(|s| counts(s, now))
        .filter(valid)
        .max_by_key(|s| created(s));
    let Some(binding) = newest else { return false };
    let back = binding
        .embedded_signature()
        .is_some_and(|b| counts(b, now) && b.verify_primary_key_binding(&sub.key, primary).is_ok());
    !revoked && back && binding.key_flags().sign() && strong_key(&sub.key) && !expired(&sub.key, binding, now)
}

/// Creation time in seconds; 0 if the signature does not say.
fn created(s: &Signature) -> u64 {
    s.created().map_or(0, |t| u64::from(t.as_secs()))
}

/// What holds for every signature, whatever it is about.
fn counts(s: &Signature, now: u64) -> bool {
    let hash = matches!(
        s.hash_alg(),
        Some(
            HashAlgorithm::Sha256
                | HashAlgorithm::Sha384
                | HashAlgorithm::Sha512
                | HashAlgorithm::Sha3_256
                | HashAlgorithm::Sha3_512
        )
    );
    let Some(config) = s.config() else { return false };
    let understood = config.hashed_subpackets.iter().all(|p| {
        !p.is_critical
            || !matches!(
                p.data,
                SubpacketData::Other(..) | SubpacketData::Experimental(..) | SubpacketData::Notation(_)
            )
    });
    let made = created(s);
    let ends = s.signature_expiration_time().map_or(0, |d| std::time::Duration::from(d).as_secs());
    hash && understood
        && made != 0
        && made <= now.saturating_add(CLOCK_SKEW)
        && (ends == 0 || made.saturating_add(ends) > now)
}

fn expired(key: &dyn KeyDetails, self_signature: &Signature, now: u64) -> bool {
    let lifetime = self_signature.key_expiration_time().map_or(0, |d| std::time::Duration::from(d).as_secs());
    let born = u64::from(key.created_at().as_secs());
    born > now.saturating_add(CLOCK_SKEW) || (lifetime != 0 && born.saturating_add(lifetime) <= now)
}

fn strong_key(key: &dyn KeyDetails) -> bool {
    match key.public_params() {
        PublicParams::RSA(_) => {
            use pgp::ser::Serialize;
            // The modulus comes first, as an MPI: its length in bits, then the number.
            let bytes = key.public_params().to_bytes().unwrap_or_default();
            matches!(bytes[..], [high, low, ..] if u16::from_be_bytes([high, low]) >= 2048)
        }
        PublicParams::EdDSALegacy(_) | PublicParams::Ed25519(_) | PublicParams::Ed448(_) | PublicParams::ECDSA(_) => {
            true
        }
        _ => false,
    }
}

/// Takes a cleartext-signed file apart: the signed text, and the armoured signature block.
fn split_frame(data: &[u8]) -> Result<(String, String), String> {
    const BEGIN: &str = "-----BEGIN PGP SIGNED MESSAGE-----";
    const SIGNATURE: &str = "-----BEGIN PGP SIGNATURE-----";
    const END: &str = "-----END PGP SIGNATURE-----";
    let all = std::str::from_utf8(data).map_err(|_| "it is not UTF-8 text")?;
    let mut rest = all;
    let mut next_line = || {
        let (line, after) = rest.split_once('\n')?;
        rest = after;
        Some((line.trim_end_matches([' ', '\t', '\r']), after))
    };
    if next_line().map(|l| l.0) != Some(BEGIN) {
        return Err("it is not a cleartext-signed file".into());
    }
    loop {
        match next_line() {
            Some(("", _)) => break,
            Some((line, _)) if line.starts_with("Hash: ") => {}
            _ => return Err("it has a malformed signature header".into()),
        }
    }
    let mut lines: Vec<&str> = Vec::new();
    let after_text = loop {
        let Some((line, after)) = next_line() else {
            return Err("its signature is missing".into());
        };
        let line = match line.strip_prefix('-') {
            None => line,
            Some(escaped) => match escaped.strip_prefix(' ') {
                Some(text) => text,
                None if line == SIGNATURE => break after,
                None => return Err("it has an unescaped line in its text".into()),
            },
        };
        // Control characters could mean one thing to the signature and another to us.
        if line.chars().any(|c| c.is_control() && c != '\t') {
            return Err("its text has control characters".into());
        }
        lines.push(line);
    };
    let (block, tail) = after_text
        .find(END)
        .and_then(|i| Some((after_text.get(..i)?, after_text.get(i + END.len()..)?)))
        .ok_or("its signature is truncated")?;
    if !tail.trim().is_empty() {
        return Err("it has data after the signature".into());
    }
    if block.len() > MAX_SIGNATURE {
        return Err("its signature is too long".into());
    }
    Ok((lines.join("\n"), format!("{SIGNATURE}\n{block}{END}\n")))
}

fn parse_signatures(armor: &str) -> Result<Vec<Signature>, String> {
    let malformed = |e: pgp::errors::Error| format!("its signature is malformed ({e})").replace('\n', " ");
    let mut dearmor = Dearmor::new(armor.as_bytes());
    dearmor.read_header().map_err(malformed)?;
    if dearmor.typ != Some(BlockType::Signature) {
        return Err("its signature is malformed".into());
    }
    let mut list = Vec::new();
    for packet in PacketParser::new(std::io::BufReader::new(dearmor)).take(64) {
        match packet.map_err(malformed)? {
            Packet::Signature(s) => list.push(s),
            _ => return Err("its signature block holds something else".into()),
        }
    }
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pgp::composed::{EncryptionCaps, KeyType, SecretKeyParamsBuilder};
    use pgp::ser::Serialize;
    use pgp::types::Timestamp;
    use proptest::prelude::*;

    fn cert(kind: KeyType) -> Vec<u8> {
        let key = SecretKeyParamsBuilder::default()
            .key_type(kind)
            .can_certify(true)
            .can_sign(true)
            .can_encrypt(EncryptionCaps::None)
            .primary_user_id("t".into())
            .build()
            .unwrap()
            .generate(rand::thread_rng())
            .unwrap();
        SignedPublicKey::from(key).to_bytes().unwrap()
    }

    #[test]
    fn which_certificates_count() {
        let now = u64::from(Timestamp::now().as_secs());
        let good = cert(KeyType::Ed25519Legacy);
        assert_eq!(Keyring::default().add(&good, now), 1);
        assert_eq!(Keyring::default().add(&good, now - 3 * CLOCK_SKEW), 0, "made in the future");
        // A self-signature that does not match makes the certificate worthless.
        let mut forged = good.clone();
        let last = forged.len() - 1;
        forged[last] ^= 1;
        assert_eq!(Keyring::default().add(&forged, now), 0, "forged");
        assert_eq!(Keyring::default().add(b"no keyring", now), 0);
    }

    #[test]
    fn debians_own_keyring_counts() {
        let path = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        if !path.exists() {
            return;
        }
        let mut ring = Keyring::default();
        // November 2026: later, keys of today have expired.
        ring.add_file(path, 1_795_000_000).unwrap();
        assert!(ring.keys.len() >= 4, "{}", ring.keys.len());
        let mut later = Keyring::default();
        later.add_file(path, 4_000_000_000).unwrap();
        assert!(later.keys.len() < ring.keys.len(), "those that expire are gone");
    }

    proptest! {
        #[test]
        fn any_frame_is_survived(head in ".{0,40}", body in "[-a \\n]{0,60}", tail in ".{0,60}") {
            let ring = Keyring::default();
            let text = format!("-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n{head}\n\n{body}\n-----BEGIN PGP SIGNATURE-----\n\n{tail}\n-----END PGP SIGNATURE-----\n");
            prop_assert!(ring.verify_cleartext(text.as_bytes(), 0).is_err());
        }

        #[test]
        fn any_keyring_is_survived(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Keyring::default().add(&data, 1_795_000_000), 0);
        }
    }
}
