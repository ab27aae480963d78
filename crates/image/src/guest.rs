//! Guests ready to boot: kernel and initramfs, built from Debian packages and cached.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, write_atomically};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::http::{Client, Patience, Progress};
use crate::initramfs::{self, Kernel};
use crate::mirror::Mirror;
use crate::proxy::Proxies;
use crate::release::hex;
use crate::repository::{Freshness, Package, Repository, Source, is_name, is_whole};
use crate::resolve::resolve;

/// The suite a guest comes from unless another is asked for: Debian 13.
pub const DEFAULT_SUITE: &str = "trixie";

/// What the prompt of the default guest starts with. Seen on the console, it means that the shell is
/// reached.
pub const PROMPT: &str = "tightrope:";

/// Which of Debian's stock kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Flavour {
    /// `linux-image-cloud-amd64`: drivers for virtual machines only.
    #[default]
    Cloud,
    /// `linux-image-amd64`: drivers for everything.
    Generic,
}

impl Flavour {
    /// The package that depends on the current kernel of this flavour.
    pub fn package(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        })
    }
}

impl FromStr for Flavour {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        match s {
            "cloud" => Ok(Self::Cloud),
            "generic" => Ok(Self::Generic),
            _ => Err(format!("no kernel flavour {s:?}: it is cloud or generic")),
        }
    }
}

/// How images and packages are got. `Options::default()` is right for most.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// A mirror named by the user (`--mirror`); goes before all other settings.
    pub mirror: Option<String>,
    /// Another cache directory than the user's.
    pub cache_dir: Option<PathBuf>,
    /// Look for newer packages even if there is all that is needed.
    pub update: bool,
    /// Never use the network.
    pub offline: bool,
    /// Progress bars.
    pub progress: Progress,
    /// Modules to put into the initramfs besides the usual ones, for example `overlay`,
    /// `virtiofs`; they cost boot time.
    pub extra_modules: Vec<String>,
    /// The host whose settings count.
    pub host: Host,
    /// Another directory for images than the user's.
    pub data_dir: Option<PathBuf>,
    /// Time limits and retries.
    pub patience: Patience,
}

/// A kernel and an initramfs that boot to a shell.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestImage {
    /// The bzImage, as Debian ships it.
    pub kernel: PathBuf,
    /// The initramfs: cpio, not compressed.
    pub initrd: PathBuf,
    /// Release of the kernel, as `uname -r` says it.
    pub kernel_version: String,
    /// Kernel command line the image works with; more may be added. The guest's shell takes `TERM`, its terminal the size
    /// `COLUMNS` and `LINES` from `NAME=value` words; `root=` boots a disk instead.
    pub cmdline: String,
}

/// What is kept about a built image, so that the next run needs neither network nor index.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    key: String,
    kernel_version: String,
    kernel_size: u64,
    initrd_size: u64,
    kernel_deb: Deb,
    busybox_deb: Deb,
}

/// A package file in the cache.
#[derive(Debug, Serialize, Deserialize)]
struct Deb {
    file: String,
    size: u64,
    sha256: String,
}

/// The image store: a cache with a way to fill it.
pub(crate) struct Store<'a> {
    pub(crate) options: &'a Options,
    pub(crate) cache: Cache,
}

/// Gets the default guest of a suite, building and fetching what is not in the cache.
///
/// With everything cached this reads one small file and looks at two; it takes no lock.
///
/// # Errors
/// Any [`Error`]; each is one line with its remedy.
pub fn default_image(suite: &str, flavour: Flavour, options: &Options) -> Result<GuestImage> {
    let store = Store::new(options)?;
    for name in &options.extra_modules {
        if !is_name(&name.replace('_', "-").to_ascii_lowercase()) {
            return Err(Error::BadName { what: "module name", value: name.clone() });
        }
    }
    if !options.update
        && let Some(image) = store.built(suite, flavour)
    {
        return Ok(image);
    }
    let _lock = store.cache.lock(options.progress)?;
    if !options.update {
        // Another process may have built it while we waited; or the recipe is newer than the image, and
        // the packages are still there.
        if let Some(image) = store.built(suite, flavour) {
            return Ok(image);
        }
        if let Some(record) = store.record(suite, flavour)
            && let (Some(kernel), Some(busybox)) = (store.cached(&record.kernel_deb), store.cached(&record.busybox_deb))
        {
            return store.build(suite, flavour, record.kernel_deb, &kernel, record.busybox_deb, &busybox);
        }
    }
    store.with_repository(suite, |source, repository, freshness| {
        let meta = repository.package(flavour.package())?;
        let name =
            meta.depends().flatten().map(|r| r.name).find(|n| n.starts_with("linux-image-")).ok_or_else(|| {
                Error::Malformed {
                    what: format!("package {}", meta.name),
                    reason: "it depends on no kernel".to_owned(),
                }
            })?;
        let kernel = repository.package(name)?;
        let busybox = repository.package("busybox-static")?;
        let kernel_deb = source.fetch(kernel, freshness)?;
        let busybox_deb = source.fetch(busybox, freshness)?;
        store.build(
            suite,
            flavour,
            Deb::of(kernel, &kernel_deb),
            &kernel_deb,
            Deb::of(busybox, &busybox_deb),
            &busybox_deb,
        )
    })
}

/// Gets the `.deb` files of packages, verified, in the order named. Dependencies are not added: see
/// [`fetch_closure`].
///
/// # Errors
/// Any [`Error`]; [`Error::NoPackage`] names the first that the suite does not have.
pub fn fetch_packages(suite: &str, names: &[&str], options: &Options) -> Result<Vec<PathBuf>> {
    fetch(suite, options, |r| names.iter().map(|n| r.package(n)).collect())
}

/// Gets the `.deb` files of packages and everything they depend on, sorted by name. With `essential`, also
/// the packages that every Debian system has.
///
/// # Errors
/// As [`fetch_packages`].
pub fn fetch_closure(suite: &str, names: &[&str], essential: bool, options: &Options) -> Result<Vec<PathBuf>> {
    fetch(suite, options, |r| {
        let mut all = names.to_vec();
        let required = r.matching(|p| p.essential || p.priority == "required");
        if essential {
            all.extend(required.iter().map(|p| p.name.as_str()));
        }
        resolve(r, &all, false)
    })
}

/// Removes from the cache what can be fetched again: packages that no built small image needs, unfinished downloads, small images
/// of which there are newer ones. Returns the bytes freed.
///
/// # Errors
/// [`Error::NoCacheDir`], and failures of the file system.
pub fn prune_cache(options: &Options) -> Result<u64> {
    let store = Store::new(options)?;
    if !store.cache.root().is_dir() {
        return Ok(0);
    }
    let _lock = store.cache.lock(options.progress)?;
    let entries = |name: &str| fs::read_dir(store.cache.root().join(name)).into_iter().flatten().flatten();
    let records: Vec<Record> = entries("images")
        .filter(|e| e.path().extension().is_some_and(|x| x == "json"))
        .filter_map(|e| serde_json::from_slice(&fs::read(e.path()).ok()?).ok())
        .collect();
    let needed =
        |name: &str| records.iter().any(|r| r.key == name || r.kernel_deb.file == name || r.busybox_deb.file == name);
    let mut freed = 0;
    for entry in entries("packages").chain(entries("partial")) {
        let size = entry.metadata().map_or(0, |m| m.len());
        if !needed(&entry.file_name().to_string_lossy()) && fs::remove_file(entry.path()).is_ok() {
            freed += size;
        }
    }
    for entry in entries("images").filter(|e| e.path().is_dir()) {
        let size: u64 = fs::read_dir(entry.path())
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|f| f.metadata().ok())
            .map(|m| m.len())
            .sum();
        if !needed(&entry.file_name().to_string_lossy()) && fs::remove_dir_all(entry.path()).is_ok() {
            freed += size;
        }
    }
    Ok(freed)
}

fn fetch(
    suite: &str,
    options: &Options,
    choose: impl Fn(&Repository) -> Result<Vec<&Package>>,
) -> Result<Vec<PathBuf>> {
    let store = Store::new(options)?;
    let _lock = store.cache.lock(options.progress)?;
    store.with_repository(suite, |source, repository, freshness| source.fetch_all(&choose(repository)?, freshness))
}

impl Deb {
    fn of(package: &Package, path: &Path) -> Self {
        Self {
            file: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            size: package.size,
            sha256: hex(&package.sha256),
        }
    }
}

impl<'a> Store<'a> {
    pub(crate) fn new(options: &'a Options) -> Result<Self> {
        let root = match &options.cache_dir {
            Some(dir) => dir.clone(),
            None => options.host.cache_dir()?,
        };
        Ok(Self { options, cache: Cache::at(root) })
    }

    /// Runs `act` on a suite's packages; once more with a fresh index if the cached one turns out to be
    /// out of date.
    pub(crate) fn with_repository<T>(
        &self,
        suite: &str,
        act: impl Fn(&Source<'_>, &Repository, Freshness) -> Result<T>,
    ) -> Result<T> {
        let options = self.options;
        let proxies = Proxies::read(&options.host);
        let (check_valid_until, check_date) = (!proxies.check_valid_until_off(), !proxies.check_date_off());
        let client = Client::new(proxies, options.progress, options.patience);
        let mirror = Mirror::discover(&options.host, options.mirror.as_deref())?;
        let source = Source { cache: &self.cache, client: &client, mirror: &mirror, check_valid_until, check_date };
        let first = match (options.offline, options.update) {
            (true, _) => Freshness::Offline,
            (_, true) => Freshness::Fresh,
            _ => Freshness::Cached,
        };
        let attempt = |freshness| {
            let repository = Repository::load(&source, suite, freshness)?;
            // What the index lists may be fetched even right after a refresh.
            act(&source, &repository, freshness)
        };
        match attempt(first) {
            Err(Error::NotFound { .. } | Error::NoPackage { .. } | Error::Unmet { .. })
                if first == Freshness::Cached =>
            {
                attempt(Freshness::Fresh)
            }
            other => other,
        }
    }

    fn record_path(&self, suite: &str, flavour: Flavour) -> PathBuf {
        let mut name = format!("{suite}-{flavour}");
        if !self.options.extra_modules.is_empty() {
            let modules = self.options.extra_modules.join(",");
            let hash = hex(&Sha256::digest(modules.as_bytes()));
            name = format!("{name}-{}", hash.get(..8).unwrap_or_default());
        }
        // A suite that is no file name has no image; it is refused later, with its name.
        let name = name.replace('/', "_");
        self.cache.root().join("images").join(format!("{name}.json"))
    }

    /// The kernel's and BusyBox's packages, of which the image built last was made. The cache's lock must be held.
    pub(crate) fn parts(&self, suite: &str, flavour: Flavour) -> Option<(PathBuf, PathBuf)> {
        let record = self.record(suite, flavour)?;
        Some((self.cached(&record.kernel_deb)?, self.cached(&record.busybox_deb)?))
    }

    fn record(&self, suite: &str, flavour: Flavour) -> Option<Record> {
        let text = fs::read(self.record_path(suite, flavour)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// A package file recorded earlier, if it is still whole.
    fn cached(&self, deb: &Deb) -> Option<PathBuf> {
        if deb.file.contains('/') {
            return None;
        }
        let path = self.cache.root().join("packages").join(&deb.file);
        is_whole(&path, deb.size, &deb.sha256).then_some(path)
    }

    fn key(&self, kernel: &Deb, busybox: &Deb) -> String {
        let all = format!(
            "{}\n{}\n{}\n{}",
            initramfs::recipe(),
            self.options.extra_modules.join(","),
            kernel.sha256,
            busybox.sha256
        );
        let hash = hex(&Sha256::digest(all.as_bytes()));
        hash.get(..16).unwrap_or_default().to_owned()
    }

    fn image(&self, record: &Record) -> GuestImage {
        let dir = self.cache.root().join("images").join(&record.key);
        GuestImage {
            kernel: dir.join("vmlinuz"),
            initrd: dir.join("initrd.cpio"),
            kernel_version: record.kernel_version.clone(),
            cmdline: "console=ttyS0".to_owned(),
        }
    }

    /// The image built last, if it is there, whole, and of the present recipe.
    fn built(&self, suite: &str, flavour: Flavour) -> Option<GuestImage> {
        let record = self.record(suite, flavour)?;
        if record.key != self.key(&record.kernel_deb, &record.busybox_deb) {
            return None;
        }
        let image = self.image(&record);
        let has = |path: &Path, size| fs::metadata(path).is_ok_and(|m| m.is_file() && m.len() == size);
        (has(&image.kernel, record.kernel_size) && has(&image.initrd, record.initrd_size)).then_some(image)
    }

    /// Builds an image. The cache's lock must be held.
    fn build(
        &self,
        suite: &str,
        flavour: Flavour,
        kernel_deb: Deb,
        kernel_path: &Path,
        busybox_deb: Deb,
        busybox_path: &Path,
    ) -> Result<GuestImage> {
        self.options.progress.note(&format!("building the {suite} {flavour} image"));
        let kernel = Kernel::read(kernel_path)?;
        let extra = &self.options.extra_modules;
        let initrd = initramfs::build(&kernel, kernel_path, busybox_path, extra)?;
        let record = Record {
            key: self.key(&kernel_deb, &busybox_deb),
            kernel_version: kernel.version,
            kernel_size: kernel.vmlinuz.len() as u64,
            initrd_size: initrd.len() as u64,
            kernel_deb,
            busybox_deb,
        };
        self.cache.dir(&format!("images/{}", record.key))?;
        let image = self.image(&record);
        write_atomically(&image.kernel, &kernel.vmlinuz)?;
        write_atomically(&image.initrd, &initrd)?;
        let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
        write_atomically(&self.record_path(suite, flavour), &text)?;
        Ok(image)
    }
}
