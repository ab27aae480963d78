//! Any text as a Release file or a package list.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = image::deb822::parse(data);
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = image::release::Release::parse(text);
    }
});
