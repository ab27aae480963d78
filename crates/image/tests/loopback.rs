//! Fetching, from a mirror in small that misbehaves.

mod mirror;

use std::fs;
use std::net::TcpListener;

use image::{Error, Flavour, Host, Options, default_image, fetch_closure, fetch_packages};
use pgp::composed::{ArmorOptions, CleartextSignedMessage, SignedPublicKey};
use pgp::types::Password;

use mirror::{IN_RELEASE, Manner, World, hex, key, sign};

#[test]
fn fetched_once_then_from_the_cache() {
    let w = World::new();
    let path = w.fetch("big").unwrap();
    assert_eq!(fs::read(&path).unwrap(), w.packages[0].1);
    w.server.log();
    assert_eq!(w.fetch("big").unwrap(), path);
    assert_eq!(w.server.log(), [""; 0], "the second time needs no network");
    let closure = fetch_closure("trixie", &["big"], false, &w.options).unwrap();
    assert_eq!(closure.len(), 2);
    let offline = Options { offline: true, ..w.options.clone() };
    assert_eq!(fetch_packages("trixie", &["big", "small"], &offline).unwrap().len(), 2);
    // A damaged file in the cache is fetched again.
    fs::write(&path, b"damaged").unwrap();
    w.fetch("big").unwrap();
    assert_eq!(fs::read(&path).unwrap(), w.packages[0].1);
    assert_eq!(fs::read_dir(w.dir.path().join("cache/partial")).unwrap().count(), 0);
}

#[test]
fn a_cut_download_is_resumed() {
    let w = World::new();
    w.server.manner("/debian/pool/big.deb", Manner::CutOnce(100_000));
    assert_eq!(fs::read(w.fetch("big").unwrap()).unwrap(), w.packages[0].1);
    let log = w.server.log();
    assert_eq!(log.last().unwrap(), "/debian/pool/big.deb from 100000");
}

#[test]
fn a_download_left_by_an_earlier_run_is_resumed() {
    let w = World::new();
    let data = &w.packages[0].1;
    let part = w.dir.path().join("cache/partial");
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join(hex(data)), &data[..50_000]).unwrap();
    assert_eq!(fs::read(w.fetch("big").unwrap()).unwrap(), *data);
    assert_eq!(w.server.log().last().unwrap(), "/debian/pool/big.deb from 50000");
}

#[test]
fn leftovers_that_do_not_fit_are_fetched_from_the_start() {
    let w = World::new();
    let data = &w.packages[0].1;
    let part = w.dir.path().join("cache/partial");
    fs::create_dir_all(&part).unwrap();
    // Other content, and then too much of it.
    for len in [1000, data.len(), data.len() + 1] {
        fs::write(part.join(hex(data)), vec![b'x'; len]).unwrap();
        let path = w.fetch("big").unwrap();
        assert_eq!(fs::read(&path).unwrap(), *data, "{len}");
        fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_server_without_ranges_starts_over() {
    let w = World::new();
    let data = &w.packages[0].1;
    let part = w.dir.path().join("cache/partial");
    fs::create_dir_all(&part).unwrap();
    fs::write(part.join(hex(data)), &data[..50_000]).unwrap();
    w.server.manner("/debian/pool/big.deb", Manner::NoRanges);
    assert_eq!(fs::read(w.fetch("big").unwrap()).unwrap(), *data);
}

#[test]
fn a_body_that_stays_truncated_is_an_error_and_kept() {
    let w = World::new();
    w.server.manner("/debian/pool/small.deb", Manner::CutAfter(0));
    assert!(matches!(w.error("small"), Error::Network { .. }));
    assert_eq!(w.server.log().iter().filter(|l| l.contains("small")).count(), 3);
}

#[test]
fn wrong_content_is_refused_and_removed() {
    let w = World::new();
    let mut wrong = w.packages[0].1.clone();
    wrong[7] ^= 1;
    w.server.put("/debian/pool/big.deb", wrong);
    assert!(matches!(w.error("big"), Error::HashMismatch { .. }));
    w.server.put("/debian/pool/small.deb", "small one and more");
    assert!(matches!(w.error("small"), Error::TooLarge { limit: 9, .. }));
    assert_eq!(fs::read_dir(w.dir.path().join("cache/packages")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(w.dir.path().join("cache/partial")).unwrap().count(), 0);
}

#[test]
fn a_wrong_index_is_refused() {
    let w = World::new();
    let index: Vec<String> = {
        let site = w.server.site.lock().unwrap();
        site.files.keys().filter(|k| k.contains("binary-amd64")).cloned().collect()
    };
    let size = w.server.site.lock().unwrap().files[&index[0]].len();
    for path in index {
        w.server.put(&path, vec![0; size]);
    }
    assert!(matches!(w.error("small"), Error::HashMismatch { .. }));
}

#[test]
fn what_is_not_there() {
    let w = World::new();
    assert!(matches!(w.error("nothing"), Error::NoPackage { .. }));
    w.server.manner("/debian/pool/small.deb", Manner::Status(404));
    assert!(matches!(w.error("small"), Error::NotFound { .. }));
    w.server.manner("/debian/pool/small.deb", Manner::Status(403));
    assert!(matches!(w.error("small"), Error::Http { status: 403, .. }));
    let e = fetch_packages("sarge", &["small"], &w.options).unwrap_err();
    assert!(matches!(e, Error::NotFound { .. }), "{e}");
    let e = default_image("trixie", Flavour::Cloud, &w.options).unwrap_err();
    assert!(e.to_string().contains("linux-image-cloud-amd64"), "{e}");
}

#[test]
fn an_outdated_index_is_refreshed() {
    let mut w = World::new();
    w.fetch("small").unwrap();
    // The archive moves on: what the cached index names is gone.
    w.server.site.lock().unwrap().files.clear();
    w.packages.push(("new".to_owned(), b"new".to_vec()));
    w.packages[0].1.push(0);
    w.publish("Date: Fri, 02 Jan 2026 00:00:00 UTC\n");
    assert_eq!(fs::read(w.fetch("new").unwrap()).unwrap(), b"new");
    // But never back.
    w.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\n");
    let update = Options { update: true, ..w.options.clone() };
    let e = fetch_packages("trixie", &["small"], &update).unwrap_err();
    assert!(matches!(e, Error::Stale { .. }), "{e}");
}

#[test]
fn passing_failures_are_retried() {
    let w = World::new();
    w.server.manner("/debian/pool/small.deb", Manner::Busy(2));
    w.fetch("small").unwrap();
    w.server.manner("/debian/pool/big.deb", Manner::Status(500));
    assert!(matches!(w.error("big"), Error::Http { status: 500, .. }));
    w.server.manner(IN_RELEASE, Manner::Busy(2));
    let update = Options { update: true, ..w.options.clone() };
    fetch_packages("trixie", &["small"], &update).unwrap();
}

#[test]
fn a_silent_server_does_not_hang_us() {
    let w = World::new();
    w.server.manner("/debian/pool/small.deb", Manner::Stall);
    // Each attempt brings one byte, so it goes on until all are there.
    w.fetch("small").unwrap();
    w.server.manner(IN_RELEASE, Manner::Stall);
    let update = Options { update: true, ..w.options.clone() };
    let e = fetch_packages("trixie", &["small"], &update).unwrap_err();
    assert!(matches!(e, Error::Network { .. }), "{e}");
}

#[test]
fn no_server_is_one_clear_line() {
    let mut w = World::new();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    w.options.mirror = Some(format!("http://{free}/debian"));
    let e = w.error("small");
    assert!(matches!(e, Error::Network { .. }), "{e}");
    assert!(e.to_string().contains("--mirror"), "{e}");
    let offline = Options { offline: true, ..w.options.clone() };
    let e = fetch_packages("trixie", &["small"], &offline).unwrap_err();
    assert!(matches!(e, Error::Offline { .. }), "{e}");
}

#[test]
fn redirects_are_followed_within_reason() {
    let w = World::new();
    w.server.put("/else/where", w.packages[1].1.clone());
    w.server.manner("/debian/pool/small.deb", Manner::Redirect("/else/where".into()));
    w.fetch("small").unwrap();
    w.server.manner("/debian/pool/big.deb", Manner::Redirect("/debian/pool/big.deb".into()));
    assert!(matches!(w.error("big"), Error::Network { .. }));
    w.server.manner("/debian/pool/big.deb", Manner::Redirect("file:///etc/passwd".into()));
    assert!(matches!(w.error("big"), Error::BadUrl { .. }));
}

#[test]
fn a_proxy_is_asked_for_the_whole_url() {
    let w = World::new();
    let keyring = w.dir.path().join("keyring.asc");
    let through = Options {
        mirror: Some("http://mirror.invalid/debian".into()),
        host: Host::at(
            w.dir.path().join("host"),
            &[
                ("TIGHTROPE_KEYRING", keyring.to_str().unwrap()),
                ("http_proxy", &w.server.url.replace("http://", "http://user:pass@")),
            ],
        ),
        ..w.options.clone()
    };
    fetch_packages("trixie", &["small"], &through).unwrap();
    let log = w.server.log();
    assert!(log.contains(&"http://mirror.invalid/debian/pool/small.deb".to_owned()), "{log:?}");
}

#[test]
fn signatures_decide() {
    let w = World::new();
    let good = w.server.site.lock().unwrap().files[IN_RELEASE].clone();
    let text = String::from_utf8(good.clone()).unwrap();
    let refused = |why: &str, data: Vec<u8>| {
        w.server.put(IN_RELEASE, data);
        let e = w.error("small");
        assert!(matches!(e, Error::BadSignature { .. }), "{why}: {e}");
    };
    refused("changed text", text.replace("stable", "stabl3").into_bytes());
    refused("text before", format!("x\n{text}").into_bytes());
    refused("text after", format!("{text}x\n").into_bytes());
    refused("a second message", format!("{text}{text}").into_bytes());
    refused("another header", text.replacen("Hash: ", "Comment: ", 1).into_bytes());
    refused("not signed", b"Suite: stable\n".to_vec());
    refused("signature cut", text.as_bytes()[..text.len() - 100].to_vec());
    refused("an unescaped line", text.replacen("Suite", "-x\nSuite", 1).into_bytes());
    refused("a stranger's key", sign(&key(true), "Suite: stable\nCodename: trixie\n"));
    refused("empty", Vec::new());
    // Blanks at line ends are not signed (RFC 9580, 7.1), so they change nothing.
    w.server.put(IN_RELEASE, text.replacen("stable\n", "stable  \r\n", 1));
    w.fetch("small").unwrap();
}

#[test]
fn a_primary_key_that_may_only_certify_does_not_sign() {
    let mut w = World::new();
    w.key = key(false);
    let keyring = w.dir.path().join("keyring.asc");
    let public = SignedPublicKey::from(w.key.clone());
    fs::write(&keyring, public.to_armored_bytes(ArmorOptions::default()).unwrap()).unwrap();
    w.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\n");
    assert!(matches!(w.error("small"), Error::BadSignature { .. }));
    // Its subkey may, and is what archives sign with.
    let release = {
        let site = w.server.site.lock().unwrap();
        let text = String::from_utf8(site.files[IN_RELEASE].clone()).unwrap();
        let body = text.split("\n\n").nth(1).unwrap();
        body.split("-----BEGIN").next().unwrap().trim_end().to_owned()
    };
    let subkey = &w.key.secret_subkeys[0].key;
    let signed = CleartextSignedMessage::sign(rand::thread_rng(), &release, subkey, &Password::empty())
        .unwrap()
        .to_armored_bytes(ArmorOptions::default())
        .unwrap();
    w.server.put(IN_RELEASE, signed);
    w.fetch("small").unwrap();
}

#[test]
fn dates_are_enforced() {
    let w = World::new();
    let stale = |dates: &str| {
        w.publish(dates);
        let e = w.error("small");
        assert!(matches!(e, Error::Stale { .. }), "{e}");
    };
    stale("Date: Thu, 01 Jan 2026 00:00:00 UTC\nValid-Until: Thu, 08 Jan 2026 00:00:00 UTC\n");
    stale("Date: Fri, 01 Jan 2100 00:00:00 UTC\n");
    // Unless the administrator told APT otherwise.
    let conf = w.dir.path().join("host/etc/apt");
    fs::create_dir_all(&conf).unwrap();
    fs::write(conf.join("apt.conf"), "Acquire::Check-Valid-Until \"false\";").unwrap();
    w.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\nValid-Until: Thu, 08 Jan 2026 00:00:00 UTC\n");
    w.fetch("small").unwrap();
}

#[test]
fn no_keyring_names_the_package_to_install() {
    let mut w = World::new();
    w.options.host = Host::at(w.dir.path().join("host"), &[("TIGHTROPE_KEYRING", "/nonexistent/k.gpg")]);
    let e = w.error("small");
    assert!(e.to_string().contains("debian-archive-keyring"), "{e}");
}

#[test]
fn another_suites_index_is_refused() {
    let w = World::new();
    let file = w.server.site.lock().unwrap().files[IN_RELEASE].clone();
    w.server.put("/debian/dists/bookworm/InRelease", file);
    let e = fetch_packages("bookworm", &["small"], &w.options).unwrap_err();
    assert!(matches!(e, Error::Malformed { .. }), "{e}");
    let e = fetch_packages("../x", &["small"], &w.options).unwrap_err();
    assert!(matches!(e, Error::BadName { .. }), "{e}");
}

#[test]
fn an_unwritable_cache_is_named() {
    let mut w = World::new();
    let file = w.dir.path().join("file");
    fs::write(&file, "").unwrap();
    w.options.cache_dir = Some(file);
    assert!(matches!(w.error("small"), Error::CacheUnwritable { .. }));
}

#[test]
fn two_at_once_share_one_cache() {
    let w = World::new();
    std::thread::scope(|s| {
        let all: Vec<_> = (0..4).map(|_| s.spawn(|| w.fetch("big").unwrap())).collect();
        for t in all {
            assert_eq!(fs::read(t.join().unwrap()).unwrap(), w.packages[0].1);
        }
    });
    assert_eq!(w.server.log().iter().filter(|l| l.contains("big.deb")).count(), 1);
}
