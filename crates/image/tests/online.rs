//! Against the mirror that this host's APT configuration names. The cache is shared between runs, so
//! that only the first fetches much.

use std::fs;
use std::path::PathBuf;

use image::{Flavour, GuestImage, Host, Options, Progress, default_image};

fn options() -> Options {
    // The user's own cache, as the command uses it; else one in the build directory.
    let cache =
        Host::current().cache_dir().unwrap_or_else(|_| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    Options { cache_dir: Some(cache), progress: Progress::Quiet, ..Options::default() }
}

fn check(image: &GuestImage, version: &str) {
    assert!(image.kernel_version.starts_with(version), "{image:?}");
    let kernel = fs::read(&image.kernel).unwrap();
    // The boot protocol's magic, and a payload to go with it.
    assert_eq!(kernel.get(0x202..0x206), Some(&b"HdrS"[..]));
    let initrd = fs::read(&image.initrd).unwrap();
    assert!(initrd.starts_with(b"070701"));
    for name in ["init\0", "bin/busybox\0", "virtio_blk.ko\0", "modules.dep\0"] {
        let name = name.as_bytes();
        assert!(initrd.windows(name.len()).any(|w| w == name), "{}", String::from_utf8_lossy(name));
    }
    assert!(initrd.len() < 8 << 20, "{} bytes", initrd.len());
}

#[test]
fn every_default_image() {
    for (suite, flavour, version) in [
        ("trixie", Flavour::Cloud, "6.12."),
        ("trixie", Flavour::Generic, "6.12."),
        ("bookworm", Flavour::Cloud, "6.1."),
    ] {
        let first = default_image(suite, flavour, &options()).unwrap_or_else(|e| panic!("{e}"));
        check(&first, version);
        // Again, on a host that knows no mirror and may not use the network: from the cache alone.
        let nowhere = Options { offline: true, host: Host::at("/nonexistent", &[]), ..options() };
        assert_eq!(default_image(suite, flavour, &nowhere).unwrap(), first);
        println!("{suite} {flavour}: {} {}", first.kernel.display(), first.initrd.display());
    }
}
