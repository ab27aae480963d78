//! A whole Debian mirror in small, with a key of our own, served on the loopback interface by a server
//! that can misbehave: wrong content, cut connections, no ranges, errors, silence.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::http::Patience;
use image::{Error, Flavour, Host, Options, Progress, default_image, fetch_closure, fetch_packages};
use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, EncryptionCaps, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
    SignedSecretKey, SubkeyParamsBuilder,
};
use pgp::types::Password;
use sha2::{Digest, Sha256};

/// What the server does with requests for one path.
#[derive(Clone)]
enum Manner {
    /// Status only.
    Status(u16),
    /// Close after this many bytes of the body, every time.
    CutAfter(usize),
    /// Close after this many bytes once, then serve well.
    CutOnce(usize),
    /// Ignore ranges.
    NoRanges,
    /// Answer, send a byte, and then nothing.
    Stall,
    /// Answer 503 that many times, then serve well.
    Busy(u32),
    /// Redirect to another path.
    Redirect(String),
}

#[derive(Default)]
struct Site {
    files: HashMap<String, Vec<u8>>,
    manners: HashMap<String, Manner>,
    /// Request lines with the range asked for.
    log: Vec<String>,
}

struct Server {
    url: String,
    site: Arc<Mutex<Site>>,
}

impl Server {
    fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let site = Arc::new(Mutex::new(Site::default()));
        let shared = site.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let site = shared.clone();
                std::thread::spawn(move || {
                    let _ = serve(stream, &site);
                });
            }
        });
        Self { url, site }
    }

    fn put(&self, path: &str, data: impl Into<Vec<u8>>) {
        self.site.lock().unwrap().files.insert(path.to_owned(), data.into());
    }

    fn manner(&self, path: &str, manner: Manner) {
        self.site.lock().unwrap().manners.insert(path.to_owned(), manner);
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.site.lock().unwrap().log)
    }
}

fn serve(mut stream: TcpStream, site: &Mutex<Site>) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut request = String::new();
    reader.read_line(&mut request)?;
    let mut from = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        let line = line.to_ascii_lowercase();
        if let Some(range) = line.strip_prefix("range: bytes=") {
            from = range.trim().trim_end_matches('-').parse::<usize>().ok();
        }
    }
    let target = request.split(' ').nth(1).unwrap_or("").to_owned();
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest[rest.find('/').unwrap_or(0)..].to_owned(),
        None => target.clone(),
    };
    let (data, manner) = {
        let mut site = site.lock().unwrap();
        site.log.push(match from {
            Some(n) => format!("{target} from {n}"),
            None => target,
        });
        let manner = site.manners.get(&path).cloned();
        match &manner {
            Some(Manner::CutOnce(_)) => drop(site.manners.remove(&path)),
            Some(Manner::Busy(1)) => drop(site.manners.remove(&path)),
            Some(Manner::Busy(n)) => {
                let n = *n;
                site.manners.insert(path.clone(), Manner::Busy(n - 1));
            }
            _ => {}
        }
        (site.files.get(&path).cloned(), manner)
    };
    let head = |status: u16, extra: &str| format!("HTTP/1.1 {status} X\r\nConnection: close\r\n{extra}\r\n");
    match &manner {
        Some(Manner::Status(s)) => return stream.write_all(head(*s, "Content-Length: 0\r\n").as_bytes()),
        Some(Manner::Busy(_)) => return stream.write_all(head(503, "Content-Length: 0\r\n").as_bytes()),
        Some(Manner::Redirect(to)) => {
            let extra = format!("Location: {to}\r\nContent-Length: 0\r\n");
            return stream.write_all(head(302, &extra).as_bytes());
        }
        _ => {}
    }
    let Some(data) = data else {
        return stream.write_all(head(404, "Content-Length: 0\r\n").as_bytes());
    };
    let start = match (&manner, from) {
        (Some(Manner::NoRanges), _) | (_, None) => None,
        (_, Some(n)) if n < data.len() => Some(n),
        _ => return stream.write_all(head(416, "Content-Length: 0\r\n").as_bytes()),
    };
    let body = &data[start.unwrap_or(0)..];
    let length = format!("Content-Length: {}\r\n", body.len());
    let answer = match start {
        None => head(200, &length),
        Some(n) => head(206, &format!("{length}Content-Range: bytes {n}-{}/{}\r\n", data.len() - 1, data.len())),
    };
    stream.write_all(answer.as_bytes())?;
    let send = match manner {
        Some(Manner::CutAfter(n) | Manner::CutOnce(n)) => &body[..n.min(body.len())],
        Some(Manner::Stall) => &body[..1.min(body.len())],
        _ => body,
    };
    stream.write_all(send)?;
    stream.flush()?;
    if matches!(manner, Some(Manner::Stall)) {
        std::thread::sleep(Duration::from_secs(3));
    }
    Ok(())
}

/// A key whose primary may sign or not, with a subkey that may.
fn key(primary_signs: bool) -> SignedSecretKey {
    let sub = SubkeyParamsBuilder::default()
        .key_type(KeyType::Ed25519Legacy)
        .can_sign(true)
        .can_encrypt(EncryptionCaps::None)
        .can_authenticate(false)
        .build()
        .unwrap();
    let mut params = SecretKeyParamsBuilder::default();
    params
        .key_type(KeyType::Ed25519Legacy)
        .can_certify(true)
        .can_sign(primary_signs)
        .can_encrypt(EncryptionCaps::None)
        .primary_user_id("Test <test@example.org>".into())
        .subkeys(vec![sub]);
    params.build().unwrap().generate(rand::thread_rng()).unwrap()
}

fn sign(key: &SignedSecretKey, text: &str) -> Vec<u8> {
    CleartextSignedMessage::sign(rand::thread_rng(), text, &key.primary_key, &Password::empty())
        .unwrap()
        .to_armored_bytes(ArmorOptions::default())
        .unwrap()
}

fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

fn xz(data: &[u8]) -> Vec<u8> {
    let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    w.write_all(data).unwrap();
    w.finish().unwrap()
}

/// A mirror in small, and options that use it.
struct World {
    server: Server,
    key: SignedSecretKey,
    options: Options,
    dir: tempfile::TempDir,
    packages: Vec<(String, Vec<u8>)>,
}

const IN_RELEASE: &str = "/debian/dists/trixie/InRelease";

impl World {
    fn new() -> Self {
        let server = Server::start();
        let dir = tempfile::tempdir().unwrap();
        let key = key(true);
        let keyring = dir.path().join("keyring.asc");
        let public = SignedPublicKey::from(key.clone());
        fs::write(&keyring, public.to_armored_bytes(ArmorOptions::default()).unwrap()).unwrap();
        let options = Options {
            mirror: Some(format!("{}/debian", server.url)),
            cache_dir: Some(dir.path().join("cache")),
            progress: Progress::Quiet,
            host: Host::at(dir.path().join("host"), &[("TIGHTROPE_KEYRING", keyring.to_str().unwrap())]),
            patience: Patience {
                connect: Duration::from_secs(5),
                read: Duration::from_millis(300),
                attempts: 3,
                backoff: Duration::from_millis(5),
            },
            ..Options::default()
        };
        let big: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
        let world = Self {
            server,
            key,
            options,
            dir,
            packages: vec![("big".to_owned(), big), ("small".to_owned(), b"small one".to_vec())],
        };
        world.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\n");
        world
    }

    /// Writes index and packages, signed; `dates` are fields of the Release.
    fn publish(&self, dates: &str) {
        let mut index = String::new();
        for (name, data) in &self.packages {
            self.server.put(&format!("/debian/pool/{name}.deb"), data.clone());
            index += &format!(
                "Package: {name}\nVersion: 1\nArchitecture: amd64\nFilename: pool/{name}.deb\n\
                 Size: {}\nSHA256: {}\nDepends: {}\n\n",
                data.len(),
                hex(data),
                if name == "big" { "small" } else { "" }
            );
        }
        let index = xz(index.as_bytes());
        let base = "/debian/dists/trixie/main/binary-amd64";
        self.server.put(&format!("{base}/Packages.xz"), index.clone());
        self.server.put(&format!("{base}/by-hash/SHA256/{}", hex(&index)), index.clone());
        let release = format!(
            "Suite: stable\nCodename: trixie\n{dates}Acquire-By-Hash: yes\nSHA256:\n {} {} main/binary-amd64/Packages.xz\n",
            hex(&index),
            index.len()
        );
        self.server.put(IN_RELEASE, sign(&self.key, &release));
    }

    fn fetch(&self, name: &str) -> image::Result<PathBuf> {
        fetch_packages("trixie", &[name], &self.options).map(|mut l| l.remove(0))
    }

    /// The error of a fetch, its message checked to be one line.
    fn error(&self, name: &str) -> Error {
        let e = self.fetch(name).unwrap_err();
        assert!(!e.to_string().contains('\n'), "{e}");
        e
    }
}

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
