//! A suite's packages: the signed index fetched and checked, looked up, resolved.
//!
//! The chain of trust: keyring → `InRelease` (signature) → `Packages.xz` (SHA-256) → `.deb` (SHA-256
//! and size).

use std::collections::HashMap;
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
use crate::names::{did_you_mean, nearest};
use crate::openpgp::{CLOCK_SKEW, Keyring};
use crate::relation::{Relation, groups};
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
    /// What it unpacks to, in KiB, as it says itself.
    pub installed_kib: u64,
    url: String,
    depends: String,
    recommends: String,
    conflicts: String,
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
    "Recommends",
    "Conflicts",
    "Breaks",
    "Provides",
    "Installed-Size",
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
        let join = |fields: [&str; 2]| {
            let all: Vec<&str> = fields.iter().filter_map(|f| p.get(f)).filter(|d| !d.is_empty()).collect();
            all.join(",")
        };
        Some(Self {
            name: name.to_owned(),
            version: p.get("Version")?.to_owned(),
            size: parse_size(p.get("Size")?)?,
            sha256: parse_hash(p.get("SHA256")?)?,
            essential: p.get("Essential") == Some("yes"),
            priority: p.get("Priority").unwrap_or("").to_owned(),
            url: format!("{base}/{path}"),
            installed_kib: p.get("Installed-Size").and_then(|v| v.parse().ok()).unwrap_or(0),
            depends: join(["Pre-Depends", "Depends"]),
            recommends: p.get("Recommends").unwrap_or("").to_owned(),
            conflicts: join(["Conflicts", "Breaks"]),
            provides: p.get("Provides").unwrap_or("").to_owned(),
        })
    }

    /// The file name of the `.deb`.
    fn file_name(&self) -> &str {
        self.url.rsplit('/').next().unwrap_or(&self.name)
    }

    /// The dependency groups, those of `Pre-Depends` first: of each, one alternative is needed.
    pub fn depends(&self) -> impl Iterator<Item = Vec<Relation<'_>>> {
        groups(&self.depends)
    }

    /// The groups of `Recommends`.
    pub fn recommends(&self) -> impl Iterator<Item = Vec<Relation<'_>>> {
        groups(&self.recommends)
    }

    /// What may not be installed together with it: `Conflicts` and `Breaks`.
    pub fn conflicts(&self) -> impl Iterator<Item = Relation<'_>> {
        groups(&self.conflicts).flatten()
    }

    /// What it provides, with the version if it gives one.
    pub fn provides(&self) -> impl Iterator<Item = Relation<'_>> {
        groups(&self.provides).flatten()
    }

    /// Whether this package is what `relation` means, by its name or by what it provides (deb-policy 7.5: a
    /// relation with a version is met by a provided name with a version only).
    pub fn satisfies(&self, relation: &Relation<'_>) -> bool {
        if self.name == relation.name && relation.admits(&self.version) {
            return true;
        }
        self.provides().any(|p| {
            p.name == relation.name
                && match (relation.version, p.version) {
                    (None, _) => true,
                    (Some(_), None) => false,
                    (Some(_), Some((_, version))) => relation.admits(version),
                }
        })
    }
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
        let mut repository = Self::empty(suite);
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
        repository.index_providers();
        Ok(repository)
    }

    fn empty(suite: &str) -> Self {
        Self { suite: suite.to_owned(), packages: HashMap::new(), providers: HashMap::new() }
    }

    /// Notes who provides what; once all is read.
    fn index_providers(&mut self) {
        for package in self.packages.values() {
            for provided in package.provides() {
                self.providers.entry(provided.name.to_owned()).or_default().push(package.name.clone());
            }
        }
        let packages = &self.packages;
        for list in self.providers.values_mut() {
            list.sort_by_key(|n| (packages.get(n).map_or(usize::MAX, |p| rank(&p.priority)), n.clone()));
            list.dedup();
        }
    }

    /// The suite's name, as it was asked for.
    pub fn suite(&self) -> &str {
        &self.suite
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
        let near = nearest(name, self.packages.keys().map(String::as_str));
        Error::NoPackage { name: name.to_owned(), suite: self.suite.clone(), hint: did_you_mean(&near) }
    }

    /// The packages that match, sorted by name.
    pub fn matching(&self, predicate: impl Fn(&Package) -> bool) -> Vec<&Package> {
        let mut list: Vec<_> = self.packages.values().filter(|p| predicate(p)).collect();
        list.sort_by(|a, b| a.name.cmp(&b.name));
        list
    }

    /// The packages that can stand for `relation`, the one of that very name first, then those that provide it,
    /// the most important first.
    pub(crate) fn candidates(&self, relation: &Relation<'_>) -> Vec<&Package> {
        let real = self.packages.get(relation.name);
        let providers = self.providers.get(relation.name).into_iter().flatten().filter_map(|n| self.packages.get(n));
        let providers = providers.filter(|p| p.name != relation.name);
        real.into_iter().chain(providers).filter(|p| p.satisfies(relation)).collect()
    }
}

/// How important a package says it is; the most important first.
fn rank(priority: &str) -> usize {
    let order = ["required", "important", "standard", "optional", "extra"];
    order.iter().position(|p| *p == priority).unwrap_or(order.len())
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
        let mut all = self.fetch_all(&[package], freshness)?;
        all.pop().ok_or_else(|| Error::Malformed { what: package.name.clone(), reason: "nothing was fetched".into() })
    }

    /// The verified `.deb` files of packages, in their order, those that are not in the cache fetched some at a time.
    /// The cache's lock must be held.
    pub(crate) fn fetch_all(&self, packages: &[&Package], freshness: Freshness) -> Result<Vec<PathBuf>> {
        let (dir, partial) = (self.cache.dir("packages")?, self.cache.dir("partial")?);
        let mut missing: Vec<(&Package, PathBuf, PathBuf)> = Vec::new();
        let mut all = Vec::with_capacity(packages.len());
        for package in packages {
            let sha256 = hex(&package.sha256);
            let short = sha256.get(..16).unwrap_or_default();
            let dest = dir.join(format!("{short}-{}", package.file_name()));
            all.push(dest.clone());
            if is_whole(&dest, package.size, &sha256) {
                continue;
            }
            if freshness == Freshness::Offline {
                return Err(Error::Offline { what: package.file_name().to_owned() });
            }
            if package.size > MAX_PACKAGE {
                return Err(Error::TooLarge { url: redact(&package.url), limit: MAX_PACKAGE });
            }
            missing.push((package, partial.join(&sha256), dest));
        }
        let downloads: Vec<Download<'_>> = missing
            .iter()
            .map(|(package, part, dest)| Download {
                url: &package.url,
                label: &package.name,
                size: package.size,
                sha256: package.sha256,
                part,
                dest,
            })
            .collect();
        match &downloads[..] {
            [] => {}
            [one] => self.client.download(one)?,
            many => self.client.download_all(&format!("{} packages", many.len()), many)?,
        }
        Ok(all)
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
pub(crate) mod tests {
    use super::*;

    /// A repository of these index entries.
    pub(crate) fn repository(text: &str) -> Repository {
        let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        std::io::Write::write_all(&mut w, text.as_bytes()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("Packages.xz");
        fs::write(&file, w.finish().unwrap()).unwrap();
        let mut r = Repository::empty("trixie");
        r.read(&file, "http://m").unwrap();
        r.index_providers();
        r
    }

    pub(crate) fn entry(name: &str, version: &str, rest: &str) -> String {
        format!(
            "Package: {name}\nVersion: {version}\nArchitecture: amd64\nFilename: pool/{name}.deb\n\
             Size: 1\nSHA256: {}\n{rest}\n",
            "00".repeat(32)
        )
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
