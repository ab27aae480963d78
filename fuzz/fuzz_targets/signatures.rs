//! Any bytes as a keyring, and any bytes as a signed Release file: refused without a panic, and never taken for signed.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((split, data)) = data.split_first() else { return };
    let (keys, signed) = data.split_at(data.len() * usize::from(*split) / 255);
    let mut keyring = image::openpgp::Keyring::default();
    keyring.add(keys, 1_790_000_000);
    let _ = keyring.verify_cleartext(signed, 1_790_000_000);
    assert!(image::openpgp::Keyring::default().verify_cleartext(signed, 1_790_000_000).is_err());
});
