//! A suite's packages: the signed index fetched and checked, looked up, resolved.
//!
//! The chain of trust: keyring → `InRelease` (signature) → `Packages.xz` (SHA-256) → `.deb` (SHA-256
//! and size).

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fs::{self, File};
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, write_atomically};
use crate::deb;
use crate::deb822::{Paragraph, Reader};
use crate::error::{Error, Result, redact};
use crate::http::{Client, Download, Hash, hash_of};
use crate::mirror::Mirror;
use crate::openpgp::{CLOCK_SKEW, Keyring};
use crate::release::{Release, hex, parse_hash, parse_size};

/// The largest `InRelease`, compressed and plain `Packages`, and package accepted, in bytes.
const MAX_RELEASE: u64 = 8 << 20;
const MAX_INDEX: u64 = 256 << 20;
const MAX_PLAIN_INDEX: u64 = 1 << 30;
const MAX_PACKAGE: u64 = 2 << 30;

/// The index of the one component and architecture that is used.
const INDEX: &str = "main/binary-amd64/Packages.xz";

/// A binary package as the index describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Name.
    pub name: String,
    /// Version, epoch and revision included.
    pub version: String,
    /// Size of the `.deb` in bytes.
    pub size: u64,
    /// Hash of the `.deb`.
    pub sha256: Hash,
    /// Whether every system has it.
    pub essential: bool,
    /// Priority, such as `required`.
    pub priority: String,
    url: String,
    depends: String,
    provides: String,
}

const FIELDS: &[&str] = &[
    "Package",
    "Version",
    "Architecture",
    "Filename",
    "Size",
    "SHA256",
    "Depends",
    "Pre-Depends",
    "Provides",
    "Essential",
    "Priority",
];

impl Package {
    /// Reads a paragraph of an index whose files lie below `base`; `None` if something is missing or odd.
    fn read(p: &Paragraph, base: &str) -> Option<Self> {
        let name = p.get("Package").filter(|n| is_name(n))?;
        let path = p.get("Filename")?;
        let odd = path.starts_with('/')
            || path.split('/').any(|part| part.is_empty() || part == ".." || part == ".")
            || !path.bytes().all(|b| b.is_ascii_graphic() && !b"?#".contains(&b));
        if odd || !["amd64", "all"].contains(&p.get("Architecture")?) {
            return None;
        }
        let both = [p.get("Pre-Depends"), p.get("Depends")];
        let depends: Vec<&str> = both.into_iter().flatten().filter(|d| !d.is_empty()).collect();
        Some(Self {
            name: name.to_owned(),
            version: p.get("Version")?.to_owned(),
            size: parse_size(p.get("Size")?)?,
            sha256: parse_hash(p.get("SHA256")?)?,
            essential: p.get("Essential") == Some("yes"),
            priority: p.get("Priority").unwrap_or("").to_owned(),
            url: format!("{base}/{path}"),
            depends: depends.join(","),
            provides: p.get("Provides").unwrap_or("").to_owned(),
        })
    }

    /// The file name of the `.deb`.
    fn file_name(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or(&self.name)
    }

    /// The dependency groups: of each, one alternative is needed. Versions and architectures are
    /// dropped: within one suite they hold.
    pub fn depends(&self) -> impl Iterator<Item = Vec<&str>> {
        groups(&self.depends)
    }
}

/// `a (>= 1) | b:any, c [amd64]` without everything but names.
fn groups(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.split(',').filter_map(|group| {
        let names: Vec<&str> = group
            .split('|')
            .filter_map(|a| a.trim().split([' ', '\t', '\n', '(', '[', ':', '<']).next())
            .filter(|n| !n.is_empty())
            .collect();
        (!names.is_empty()).then_some(names)
    })
}

/// Whether this can be a package name (deb-policy 5.6.1).
pub(crate) fn is_name(name: &str) -> bool {
    let inner = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+-.".contains(&b);
    name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) && name.bytes().all(inner)
}

/// What is known about a cached index.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    base: String,
    date: u64,
    sha256: String,
    size: u64,
}

/// What a lookup may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// Take what is cached, fetch the rest.
    Cached,
    /// Fetch the index anew.
    Fresh,
    /// Take what is cached, fetch nothing.
    Offline,
}

/// The packages of one suite, the main archive and, if the host uses it, the security archive.
#[derive(Debug)]
pub struct Repository {
    suite: String,
    packages: HashMap<String, Package>,
    providers: HashMap<String, Vec<String>>,
}

/// What is needed to talk to a mirror.
pub(crate) struct Source<'a> {
    pub(crate) cache: &'a Cache,
    pub(crate) client: &'a Client,
    pub(crate) mirror: &'a Mirror,
    /// Whether `Valid-Until` and whether `Date` are enforced.
    pub(crate) check_valid_until: bool,
    pub(crate) check_date: bool,
}

impl Repository {
    /// Loads a suite. The cache's lock must be held.
    pub(crate) fn load(source: &Source<'_>, suite: &str, freshness: Freshness) -> Result<Self> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
        if suite.is_empty() || !suite.bytes().all(plain) {
            return Err(Error::BadName { what: "suite", value: suite.to_owned() });
        }
        let mut repository = Self { suite: suite.to_owned(), packages: HashMap::new(), providers: HashMap::new() };
        let main = source.index(&source.mirror.base, suite, freshness)?;
        repository.read(&main, &source.mirror.base)?;
        if let Some(base) = &source.mirror.security {
            match source.index(base, &format!("{suite}-security"), freshness) {
                Ok(index) => repository.read(&index, base)?,
                // Suites such as sid have none.
                Err(Error::NotFound { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        for package in repository.packages.values() {
            for group in groups(&package.provides) {
                for name in group {
                    repository.providers.entry(name.to_owned()).or_default().push(package.name.clone());
                }
            }
        }
        repository.providers.values_mut().for_each(|p| p.sort());
        Ok(repository)
    }

    /// Adds a `Packages.xz`; of two packages of one name the newer stays.
    fn read(&mut self, index: &Path, base: &str) -> Result<()> {
        let bad = |e: std::io::Error| Error::Malformed {
            what: format!("the package index {}", index.display()),
            reason: e.to_string(),
        };
        let file = File::open(index).map_err(|e| Error::io("read", index, e))?;
        let plain = deb::unxz(BufReader::with_capacity(128 << 10, file)).take(MAX_PLAIN_INDEX);
        let mut reader = Reader::keeping(BufReader::with_capacity(256 << 10, plain), FIELDS);
        while let Some(p) = reader.next_paragraph().map_err(bad)? {
            let Some(package) = Package::read(&p, base) else { continue };
            match self.packages.get(&package.name) {
                Some(other) if !newer(&package.version, &other.version) => {}
                _ => drop(self.packages.insert(package.name.clone(), package)),
            }
        }
        Ok(())
    }

    /// A package by name.
    ///
    /// # Errors
    /// [`Error::NoPackage`], [`Error::BadName`].
    pub fn package(&self, name: &str) -> Result<&Package> {
        if !is_name(name) {
            return Err(Error::BadName { what: "package name", value: name.to_owned() });
        }
        self.packages.get(name).ok_or_else(|| self.missing(name))
    }

    fn missing(&self, name: &str) -> Error {
        Error::NoPackage { name: name.to_owned(), suite: self.suite.clone() }
    }

    /// The packages that match, sorted by name.
    pub fn matching(&self, predicate: impl Fn(&Package) -> bool) -> Vec<&Package> {
        let mut list: Vec<_> = self.packages.values().filter(|p| predicate(p)).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// The packages and all they depend on, sorted by name. Of alternatives one already chosen is taken,
    /// else the first that exists, else the first provider by name. Versions and conflicts are not looked
    /// at: this is no package manager, and within a stable suite the result holds.
    ///
    /// # Errors
    /// [`Error::NoPackage`] for what cannot be had.
    pub fn closure(&self, names: &[&str]) -> Result<Vec<&Package>> {
        let mut chosen: BTreeSet<&str> = BTreeSet::new();
        let mut todo: VecDeque<&Package> = VecDeque::new();
        for name in names {
            let package = self.package(name)?;
            if chosen.insert(&package.name) {
                todo.push_back(package);
            }
        }
        while let Some(package) = todo.pop_front() {
            for group in package.depends() {
                let provided = |n: &str| self.providers.get(n).into_iter().flatten();
                let satisfied =
                    group.iter().any(|n| chosen.contains(n) || provided(n).any(|p| chosen.contains(p.as_str())));
                if satisfied {
                    continue;
                }
                let found = group
                    .iter()
                    .find_map(|n| self.packages.get(*n))
                    .or_else(|| {
                        let mut all = group.iter().flat_map(|n| provided(n));
                        all.find_map(|p| self.packages.get(p))
                    })
                    .ok_or_else(|| self.missing(&group.join(" | ")))?;
                chosen.insert(&found.name);
                todo.push_back(found);
            }
        }
        Ok(chosen.into_iter().filter_map(|n| self.packages.get(n)).collect())
    }
}

/// Whether `a` is a later version than `b`.
fn newer(a: &str, b: &str) -> bool {
    let parse = |v: &str| v.parse::<debversion::Version>();
    match (parse(a), parse(b)) {
        (Ok(a), Ok(b)) => a > b,
        _ => false,
    }
}

impl Source<'_> {
    /// The verified `Packages.xz` of a suite, from the cache if it may be.
    fn index(&self, base: &str, suite: &str, freshness: Freshness) -> Result<PathBuf> {
        let place = hex(Sha256::digest(base.as_bytes()).get(..8).unwrap_or_default());
        let dir = self.cache.dir(&format!("indexes/{place}/{suite}"))?;
        let state_file = dir.join("state.json");
        let index_file = dir.join("Packages.xz");
        let state: Option<State> = fs::read(&state_file).ok().and_then(|text| serde_json::from_slice(&text).ok());
        let url = format!("{base}/dists/{suite}/InRelease");
        if freshness != Freshness::Fresh
            && let Some(state) = &state
            && state.base == base
            && is_whole(&index_file, state.size, &state.sha256)
        {
            return Ok(index_file);
        }
        if freshness == Freshness::Offline {
            return Err(Error::Offline { what: redact(&url) });
        }

        let release = self.release(&url, suite)?;
        // An older index than one seen before would bring back what has been fixed since.
        if state.is_some_and(|s| s.base == base && s.date > release.date) && self.check_date {
            return Err(Error::Stale {
                url: redact(&url),
                reason: "the mirror went back to an older index than it had before".to_owned(),
            });
        }
        let malformed = |reason: &str| Error::Malformed { what: redact(&url), reason: reason.to_owned() };
        let entry = release.files.get(INDEX).ok_or_else(|| malformed("it lists no package index for amd64"))?;
        if entry.size > MAX_INDEX {
            return Err(malformed("its package index is too large"));
        }
        let sha256 = hex(&entry.sha256);
        let dists = format!("{base}/dists/{suite}");
        let by_name = format!("{dists}/{INDEX}");
        let by_hash = format!("{dists}/main/binary-amd64/by-hash/SHA256/{sha256}");
        let part = self.cache.dir("partial")?.join(&sha256);
        let download = |url: &str| {
            self.client.download(&Download {
                url,
                label: &format!("{suite} package index"),
                size: entry.size,
                sha256: entry.sha256,
                part: &part,
                dest: &index_file,
            })
        };
        match release.by_hash {
            true => match download(&by_hash) {
                Err(Error::NotFound { .. }) => download(&by_name)?,
                other => other?,
            },
            false => download(&by_name)?,
        }
        let state = State { base: base.to_owned(), date: release.date, sha256, size: entry.size };
        let text = serde_json::to_vec(&state).unwrap_or_default();
        write_atomically(&state_file, &text)?;
        Ok(index_file)
    }

    /// Fetches and checks an `InRelease`.
    fn release(&self, url: &str, suite: &str) -> Result<Release> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let shown = redact(url);
        let mut keyring = Keyring::default();
        for path in &self.mirror.keyrings {
            keyring.add_file(path, now).map_err(|e| Error::io("read", path, e))?;
        }
        for key in &self.mirror.inline_keys {
            keyring.add(key.as_bytes(), now);
        }
        if keyring.is_empty() {
            let looked = &self.mirror.keyrings_considered;
            let looked: Vec<_> = looked.iter().map(|p| p.display().to_string()).collect();
            return Err(Error::NoKeyring { looked: format!("looked at {}", looked.join(", ")) });
        }
        let data = self.client.get(url, MAX_RELEASE)?;
        let text = keyring
            .verify_cleartext(&data, now)
            .map_err(|reason| Error::BadSignature { url: shown.clone(), reason })?;
        let release = Release::parse(&text).map_err(|reason| Error::Malformed { what: shown.clone(), reason })?;
        if release.codename != suite && release.suite != suite {
            return Err(Error::Malformed {
                what: shown,
                reason: format!("it is the index of {}, not of {suite}", release.codename),
            });
        }
        let stale = |reason: &str| Error::Stale { url: shown.clone(), reason: reason.to_owned() };
        if self.check_date && release.date > now.saturating_add(CLOCK_SKEW) {
            return Err(stale("the index is dated in the future"));
        }
        let expired = release.valid_until.is_some_and(|until| until < now);
        if self.check_date && self.check_valid_until && expired {
            return Err(stale("the index has expired (Valid-Until)"));
        }
        Ok(release)
    }

    /// The verified `.deb` of a package, from the cache or fetched. The cache's lock must be held.
    pub(crate) fn fetch(&self, package: &Package, freshness: Freshness) -> Result<PathBuf> {
        let sha256 = hex(&package.sha256);
        let short = sha256.get(..16).unwrap_or_default();
        let dir = self.cache.dir("packages")?;
        let dest = dir.join(format!("{short}-{}", package.file_name()));
        if is_whole(&dest, package.size, &sha256) {
            return Ok(dest);
        }
        if freshness == Freshness::Offline {
            return Err(Error::Offline { what: package.file_name().to_owned() });
        }
        if package.size > MAX_PACKAGE {
            return Err(Error::TooLarge { url: redact(&package.url), limit: MAX_PACKAGE });
        }
        let part = self.cache.dir("partial")?.join(&sha256);
        self.client.download(&Download {
            url: &package.url,
            label: &package.name,
            size: package.size,
            sha256: package.sha256,
            part: &part,
            dest: &dest,
        })?;
        Ok(dest)
    }
}

/// Whether a file has this size and SHA-256 (hexadecimal).
pub(crate) fn is_whole(path: &Path, size: u64, sha256: &str) -> bool {
    let check = || -> std::io::Result<bool> {
        let mut file = File::open(path)?;
        Ok(file.metadata()?.len() == size && hex(&hash_of(&mut file)?) == sha256)
    };
    check().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(text: &str) -> Repository {
        let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        std::io::Write::write_all(&mut w, text.as_bytes()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("Packages.xz");
        fs::write(&file, w.finish().unwrap()).unwrap();
        let mut r = Repository { suite: "trixie".into(), packages: HashMap::new(), providers: HashMap::new() };
        r.read(&file, "http://m").unwrap();
        for p in r.packages.values() {
            for name in groups(&p.provides).flatten() {
                r.providers.entry(name.to_owned()).or_default().push(p.name.clone());
            }
        }
        r
    }

    fn entry(name: &str, version: &str, rest: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nFilename: pool/{name}.deb\n\
             Size: 1\nSHA256: {}\n{rest}\n",
            "00".repeat(32)
        )
    }

    #[test]
    fn closure_takes_first_existing_alternative_or_provider() {
        let r = repository(
            &[
                entry("a", "1", "Depends: gone (>= 1) | b:any, v\nPre-Depends: c (= 2)\n"),
                entry("b", "1", "Depends: a\n"),
                entry("c", "1", ""),
                entry("p", "1", "Provides: v (= 3), w\n"),
                entry("unused", "1", ""),
                entry("bad", "1", "Depends: nowhere | neither\n"),
            ]
            .concat(),
        );
        let names = |n: &[&str]| -> Vec<_> { r.closure(n).unwrap().iter().map(|p| p.name.as_str()).collect() };
        assert_eq!(names(&["a"]), ["a", "b", "c", "p"]);
        let e = r.closure(&["bad"]).unwrap_err().to_string();
        assert!(e.contains("nowhere | neither"), "{e}");
        assert!(matches!(r.package("x/../y"), Err(Error::BadName { .. })));
    }

    #[test]
    fn the_newer_version_stays() {
        for text in [
            entry("a", "6.1.176-1", "") + &entry("a", "6.1.192-2", ""),
            entry("a", "6.1.192-2", "") + &entry("a", "6.1.176-1", ""),
        ] {
            assert_eq!(repository(&text).package("a").unwrap().version, "6.1.192-2");
        }
        assert!(newer("1:1.0-1", "2.0-1"));
        assert!(newer("1.0-1", "1.0~rc1-1"));
    }

    #[test]
    fn odd_entries_are_left_out() {
        for path in ["../x.deb", "/x.deb", "pool/../../x", "pool//x", "pool/x?y"] {
            let text = entry("a", "1", "").replace("pool/a.deb", path);
            assert!(repository(&text).package("a").is_err(), "{path}");
        }
        let text = entry("a", "1", "").replace("amd64", "arm64");
        assert!(repository(&text).package("a").is_err());
    }
}
