//! Any bytes as a Debian package: the archive, its compression and its tar are read to the end or refused.

#![no_main]

use std::io::{Read, Write};

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = image::ar::members(&mut std::io::Cursor::new(data));
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(data).unwrap();
    let Ok(mut archive) = image::deb::data(file.path()) else { return };
    let Ok(entries) = archive.entries() else { return };
    for entry in entries.take(1000) {
        let Ok(entry) = entry else { return };
        let _ = (entry.path().is_ok(), entry.link_name().is_ok());
        let _ = entry.take(1 << 20).read_to_end(&mut Vec::new());
    }
});
