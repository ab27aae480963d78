//! A whole Debian mirror in small, with a key of our own, served on the loopback interface by a server
//! that can misbehave: wrong content, cut connections, no ranges, errors, silence.

#![allow(dead_code)] // each test file uses its part

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use image::http::Patience;
use image::{Error, Host, Options, Progress, fetch_packages};
use pgp::composed::{
    ArmorOptions, CleartextSignedMessage, EncryptionCaps, KeyType, SecretKeyParamsBuilder, SignedPublicKey,
    SignedSecretKey, SubkeyParamsBuilder,
};
use pgp::types::Password;
use sha2::{Digest, Sha256};

/// What the server does with requests for one path.
#[derive(Clone)]
pub enum Manner {
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
pub struct Site {
    pub files: HashMap<String, Vec<u8>>,
    pub manners: HashMap<String, Manner>,
    /// Request lines with the range asked for.
    pub log: Vec<String>,
}

pub struct Server {
    pub url: String,
    pub site: Arc<Mutex<Site>>,
}

impl Server {
    pub fn start() -> Self {
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

    pub fn put(&self, path: &str, data: impl Into<Vec<u8>>) {
        self.site.lock().unwrap().files.insert(path.to_owned(), data.into());
    }

    pub fn manner(&self, path: &str, manner: Manner) {
        self.site.lock().unwrap().manners.insert(path.to_owned(), manner);
    }

    pub fn log(&self) -> Vec<String> {
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
pub fn key(primary_signs: bool) -> SignedSecretKey {
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

pub fn sign(key: &SignedSecretKey, text: &str) -> Vec<u8> {
    CleartextSignedMessage::sign(rand::thread_rng(), text, &key.primary_key, &Password::empty())
        .unwrap()
        .to_armored_bytes(ArmorOptions::default())
        .unwrap()
}

pub fn hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

pub fn xz(data: &[u8]) -> Vec<u8> {
    let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
    w.write_all(data).unwrap();
    w.finish().unwrap()
}

/// A mirror in small, and options that use it.
pub struct World {
    pub server: Server,
    pub key: SignedSecretKey,
    pub options: Options,
    pub dir: tempfile::TempDir,
    pub packages: Vec<(String, Vec<u8>)>,
    /// Further lines of packages' entries in the index, and their versions if not 1.
    pub fields: HashMap<String, String>,
    pub versions: HashMap<String, String>,
}

pub const IN_RELEASE: &str = "/debian/dists/trixie/InRelease";

impl World {
    pub fn new() -> Self {
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
                read: Duration::from_secs(1),
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
            fields: HashMap::from([("big".to_owned(), "Depends: small\n".to_owned())]),
            versions: HashMap::new(),
        };
        world.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\n");
        world
    }

    /// Writes index and packages, signed; `dates` are fields of the Release.
    pub fn publish(&self, dates: &str) {
        let mut index = String::new();
        for (name, data) in &self.packages {
            self.server.put(&format!("/debian/pool/{name}.deb"), data.clone());
            index += &format!(
                "Package: {name}\nVersion: {}\nArchitecture: amd64\nFilename: pool/{name}.deb\n\
                 Size: {}\nSHA256: {}\n{}\n",
                self.versions.get(name).map_or("1", String::as_str),
                data.len(),
                hex(data),
                self.fields.get(name).map_or("", String::as_str)
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

    pub fn fetch(&self, name: &str) -> image::Result<PathBuf> {
        fetch_packages("trixie", &[name], &self.options).map(|mut l| l.remove(0))
    }

    /// The error of a fetch, its message checked to be one line.
    pub fn error(&self, name: &str) -> Error {
        let e = self.fetch(name).unwrap_err();
        assert!(!e.to_string().contains('\n'), "{e}");
        e
    }
}
