//! Any file as a kernel: the loader refuses or loads it, within the guest's memory.

#![no_main]

use libfuzzer_sys::fuzz_target;
use machine::boot::{BootSource, load};
use memory::GuestRam;

fuzz_target!(|data: &[u8]| {
    let Some((split, data)) = data.split_first() else { return };
    let (kernel, initrd) = data.split_at(data.len() * usize::from(*split) / 255);
    let ram = GuestRam::new(64 << 20).unwrap();
    let source = BootSource {
        kernel,
        unpacked: (split % 3 == 0).then_some(kernel),
        initrd: (!initrd.is_empty()).then_some(initrd),
        command_line: "console=ttyS0",
        own_decompressor: split % 2 == 0,
    };
    let _ = load(&ram, &source);
});
