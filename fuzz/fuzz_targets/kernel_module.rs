//! Any file as a kernel module: what it needs and offers is read, or it is refused.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = image::kmod::Info::read(data);
});
