//! Making an image: a whole Debian system on a disk, without root and without a single tool of the host's.
//!
//! 1. What is in it: [`resolve`](crate::resolve) over the suite's verified index; packages fetched into the cache.
//! 2. On the host, the base packages are laid out as one archive ([`crate::rootfs`]): copying, nothing else.
//! 3. In a guest with two disks, an empty one and that archive: `init.sh` makes the file system, unpacks, and runs
//!    `configure.sh` in it: dpkg configures the base, APT installs what was asked for besides, from packages in the archive.
//!    The packages' scripts run there and nowhere else.
//! 4. The disk, now never written again, goes into the [store](crate::store).
//!
//! Who runs the guest is the caller's to say ([`Machine`]): this crate knows no VMM.

mod settings;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use crate::cache::write_atomically;
use crate::cpio;
use crate::deb;
use crate::error::{Error, Result};
use crate::guest::{Flavour, Options, Store, default_image};
use crate::initramfs::{self, Kernel};
use crate::mirror::Mirror;
use crate::proxy::Proxies;
use crate::reference::{Reference, suite_hint};
use crate::release::hex;
use crate::repository::{Package, Repository};
use crate::resolve::resolve;
use crate::rootfs::{Extra, What, Writer};
use crate::store::{Image, ImageStore, Installed, Manifest};

/// Process 1 of the guest that makes the disk.
const INIT: &str = include_str!("init.sh");

/// What runs in the new system.
const CONFIGURE: &str = include_str!("configure.sh");

/// What every image has, besides packages that are essential or required by Debian itself.
const BASE: &[&str] = &[
    "apt",
    "busybox-static",
    "ca-certificates",
    "dbus",
    "debian-archive-keyring",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "login",
    "mawk",
    "nano",
    "netbase",
    "passwd",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "tzdata",
    "udev",
    "util-linux",
];

/// The same, in suites that have them.
const BASE_IF_THERE: &[&str] = &["usr-is-merged"];

/// Size of the disk as the guest sees it, in bytes. On the host it takes what is written.
const DISK_SIZE: u64 = 16 << 30;

/// Memory of the guest that makes the disk, in bytes.
const MEMORY: u64 = 1 << 30;

/// A guest to be run until it switches itself off.
#[derive(Debug)]
pub struct BuildGuest {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
    /// What to add to the kernel's command line beside the console.
    pub cmdline: &'static str,
    /// The disk to be made, to be written.
    pub disk: PathBuf,
    /// The archive, to be read only.
    pub archive: PathBuf,
    /// Memory in bytes.
    pub memory: u64,
}

/// What runs guests.
pub trait Machine {
    /// Runs a guest to its end, and calls `line` with each line that it writes on its console.
    ///
    /// # Errors
    /// Why it could not be run, in one line.
    fn run(&self, guest: &BuildGuest, line: &mut dyn FnMut(&str)) -> Result<(), String>;
}

/// What [`pull`] did.
#[derive(Debug)]
pub struct Pulled {
    /// The image, now in the store.
    pub image: Image,
    /// Whether it was made now; otherwise it was there, and is up to date.
    pub made: bool,
}

/// What an image is made of.
struct Plan {
    base: Vec<PathBuf>,
    /// What APT installs on top, each with its entry in an index.
    more: Vec<(PathBuf, String)>,
    installed: Vec<Installed>,
    digest: String,
    unpacked: u64,
}

/// Makes the image of a name from what the mirror has now, unless the one in the store is just that. With
/// `options.offline`, of what is in the cache.
///
/// # Errors
/// Any [`Error`]; each is one line with its remedy. An interrupted attempt leaves what it fetched and nothing else.
pub fn pull(reference: &Reference, recommends: bool, options: &Options, machine: &dyn Machine) -> Result<Pulled> {
    let suite = reference.suite();
    let unknown = |e: Error| match e {
        Error::NotFound { url } if url.ends_with(&format!("/dists/{suite}/InRelease")) => {
            Error::NoSuite { suite: suite.to_owned(), hint: suite_hint(suite) }
        }
        e => e,
    };
    let fresh = Options { update: !options.offline, ..options.clone() };
    let guest = default_image(suite, Flavour::default(), &fresh).map_err(unknown)?;
    let (kernel_deb, busybox_deb, plan) = {
        let cached = Options { update: false, ..options.clone() };
        let cache = Store::new(&cached)?;
        let _lock = cache.cache.lock(options.progress)?;
        let parts = cache.parts(suite, Flavour::default());
        let (kernel, busybox) = parts.ok_or_else(|| Error::Offline { what: "the kernel's package".into() })?;
        let plan = cache.with_repository(suite, |source, repository, freshness| {
            let (base, all) = choose(repository, reference, recommends)?;
            let files = source.fetch_all(&all, freshness)?;
            plan(reference, &base, &all, files, &guest.kernel_version)
        })?;
        (kernel, busybox, plan)
    };
    let mirror = Mirror::discover(&options.host, options.mirror.as_deref())?;
    let settings = settings::files(suite, &mirror, &Proxies::read(&options.host))?;
    let digest = with_settings(&plan.digest, &settings);

    let store = match &options.data_dir {
        Some(dir) => ImageStore::at(dir),
        None => ImageStore::open(&options.host)?,
    };
    let _lock = store.lock(options.progress)?;
    let there = |i: &Image| i.manifest.digest == digest && i.manifest.name == reference.to_string();
    if let Some(image) = store.find(reference).filter(there) {
        return Ok(Pulled { image, made: false });
    }
    let workshop = store.workshop(&digest)?;
    // Archive and disk, with some room for what configuring makes.
    enough_space(&workshop, plan.unpacked * 5 / 2 + (200 << 20))?;
    options.progress.note(&format!("making {reference} of {} packages", plan.installed.len()));
    let parts = Parts { kernel_version: &guest.kernel_version, kernel_deb: &kernel_deb };
    copy(&guest.kernel, &workshop.join("vmlinuz"))?;
    copy(&guest.initrd, &workshop.join("initrd.cpio"))?;
    copy(&kernel_deb, &workshop.join("kernel.deb"))?;
    copy(&busybox_deb, &workshop.join("busybox.deb"))?;
    write_archive(&workshop.join("archive.tar"), &plan, &settings, &parts)?;
    build(&store, &workshop, &plan, options, machine)?;
    for file in ["archive.tar", "builder.cpio"] {
        let file = workshop.join(file);
        fs::remove_file(&file).map_err(|e| Error::io("remove", &file, e))?;
    }
    let manifest = Manifest {
        name: reference.to_string(),
        digest,
        created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        kernel: guest.kernel_version,
        disk_size: DISK_SIZE,
        initramfs: recipe_hash(),
        packages: plan.installed,
    };
    Ok(Pulled { image: store.adopt(&workshop, manifest)?, made: true })
}

/// The kernel and initramfs that boot an image; the initramfs is made anew if this version of Tightrope makes another than the one
/// that made the image.
///
/// # Errors
/// Failures of the file system, and [`Error::Deb`] if the image is damaged.
pub fn boot_files(store: &ImageStore, image: &Image, options: &Options) -> Result<(PathBuf, PathBuf)> {
    let recipe = recipe_hash();
    if image.manifest.initramfs == recipe {
        return Ok((image.vmlinuz(), image.initrd()));
    }
    let initrd = image.dir().join(format!("initrd-{}.cpio", recipe.get(..12).unwrap_or(&recipe)));
    if !initrd.exists() {
        let _lock = store.lock(options.progress)?;
        let kernel_deb = image.dir().join("kernel.deb");
        let kernel = Kernel::read(&kernel_deb)?;
        let data = initramfs::build(&kernel, &kernel_deb, &image.dir().join("busybox.deb"), &[])?;
        write_atomically(&initrd, &data)?;
    }
    Ok((image.vmlinuz(), initrd))
}

fn recipe_hash() -> String {
    hex(&Sha256::digest(initramfs::recipe().as_bytes()))
}

/// The base system of a suite, and all of the image.
fn choose<'a>(
    repository: &'a Repository,
    reference: &Reference,
    recommends: bool,
) -> Result<(Vec<&'a Package>, Vec<&'a Package>)> {
    let required = repository.matching(|p| p.essential || p.priority == "required");
    let mut names: Vec<&str> = BASE.to_vec();
    names.extend(BASE_IF_THERE.iter().copied().filter(|n| repository.package(n).is_ok()));
    names.extend(required.iter().map(|p| p.name.as_str()));
    let base = resolve(repository, &names, false)?;
    if reference.packages().is_empty() {
        return Ok((base.clone(), base));
    }
    // All of the base is kept: what is asked for has to stand beside it.
    let mut names: Vec<&str> = base.iter().map(|p| p.name.as_str()).collect();
    names.extend(reference.packages().iter().map(String::as_str));
    let all = resolve(repository, &names, recommends)?;
    Ok((base, all))
}

/// Puts together what is known of the chosen packages, whose files are `files`.
fn plan(
    reference: &Reference,
    base: &[&Package],
    all: &[&Package],
    files: Vec<PathBuf>,
    kernel_version: &str,
) -> Result<Plan> {
    let mut hash = Sha256::new();
    hash.update(format!("1\n{reference}\n{kernel_version}\n{DISK_SIZE}\n{INIT}\n{CONFIGURE}\n"));
    let mut plan =
        Plan { base: Vec::new(), more: Vec::new(), installed: Vec::new(), digest: String::new(), unpacked: 0 };
    for (package, file) in all.iter().zip(files) {
        hash.update(format!("{} {} {}\n", package.name, package.version, hex(&package.sha256)));
        plan.installed.push(Installed { name: package.name.clone(), version: package.version.clone() });
        plan.unpacked = plan.unpacked.saturating_add(package.installed_kib.saturating_mul(1024));
        if base.iter().any(|p| p.name == package.name) {
            plan.base.push(file);
        } else {
            plan.unpacked = plan.unpacked.saturating_add(package.size);
            let control = deb::control(&file)?;
            let control = control.get("control").ok_or_else(|| Error::deb(&file, "it has no control file"))?;
            let control = String::from_utf8_lossy(control);
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let (size, sha256) = (package.size, hex(&package.sha256));
            let entry = format!("{}\nFilename: {name}\nSize: {size}\nSHA256: {sha256}\n\n", control.trim_end());
            plan.more.push((file, entry));
        }
    }
    plan.digest = hex(&hash.finalize());
    Ok(plan)
}

fn with_settings(digest: &str, settings: &[Extra]) -> String {
    let mut hash = Sha256::new();
    hash.update(digest);
    for extra in settings {
        hash.update(format!("{} {:o}\n", extra.path, extra.mode));
        match &extra.what {
            What::File(data) => hash.update(data),
            What::Link(to) => hash.update(to),
        }
    }
    hex(&hash.finalize())
}

/// The kernel that boots the image.
struct Parts<'a> {
    kernel_version: &'a str,
    kernel_deb: &'a Path,
}

/// Writes the archive that the guest unpacks.
fn write_archive(path: &Path, plan: &Plan, settings: &[Extra], parts: &Parts<'_>) -> Result<()> {
    let file = File::create(path).map_err(|e| Error::io("write", path, e))?;
    let mut writer = Writer::new(BufWriter::with_capacity(1 << 20, file), path)?;
    for deb in &plan.base {
        writer.package(deb)?;
    }
    // The kernel's modules; the kernel itself stays on the host, and a newer one that APT might install would never be booted.
    let version = parts.kernel_version;
    let (modules, config) = (format!("lib/modules/{version}/"), format!("boot/config-{version}"));
    writer.files(parts.kernel_deb, |path| path.contains(&modules) || path == config)?;
    let file = |path: &str, mode, text: String| Extra { path: path.into(), mode, what: What::File(text.into()) };
    let mut index = String::new();
    for (deb, entry) in &plan.more {
        let name = deb.file_name().unwrap_or_default().to_string_lossy();
        writer.copy(deb, &format!(".tightrope/repository/{name}"))?;
        index += entry;
    }
    let names: String = plan
        .more
        .iter()
        .filter_map(|(_, entry)| entry.lines().find_map(|l| l.strip_prefix("Package: ")))
        .map(|name| format!("{name}\n"))
        .collect();
    for extra in settings {
        writer.extra(extra)?;
    }
    writer.extra(&file(".tightrope/configure", 0o755, CONFIGURE.into()))?;
    writer.extra(&file(".tightrope/kernel", 0o644, format!("{version}\n")))?;
    writer.extra(&file(".tightrope/packages", 0o644, names))?;
    writer.extra(&file(
        ".tightrope/sources.list",
        0o644,
        "deb [trusted=yes] file:/.tightrope/repository ./\n".into(),
    ))?;
    writer.extra(&file(".tightrope/repository/Packages", 0o644, index))?;
    let preinst: String = writer.preinst().iter().map(|name| format!("{name}\n")).collect();
    writer.extra(&file(".tightrope/preinst", 0o644, preinst))?;
    let mut buffered = writer.finish()?;
    buffered.flush().map_err(|e| Error::io("write", path, e))?;
    // A disk has whole blocks.
    let file = buffered.into_inner().map_err(|e| Error::io("write", path, e.into_error()))?;
    let length = file.metadata().map_err(|e| Error::io("read", path, e))?.len();
    file.set_len(length.next_multiple_of(4096)).map_err(|e| Error::io("write", path, e))
}

/// Runs the guest that makes the disk.
fn build(store: &ImageStore, workshop: &Path, plan: &Plan, options: &Options, machine: &dyn Machine) -> Result<()> {
    let on = |op, path: &Path| {
        let path = path.to_path_buf();
        move |e| Error::io(op, &path, e)
    };
    let guest = BuildGuest {
        kernel: workshop.join("vmlinuz"),
        initrd: workshop.join("builder.cpio"),
        cmdline: "quiet panic=-1",
        disk: workshop.join("disk.raw"),
        archive: workshop.join("archive.tar"),
        memory: MEMORY,
    };
    let initrd = workshop.join("initrd.cpio");
    let mut data = fs::read(&initrd).map_err(on("read", &initrd))?;
    data.extend(tools(&plan.base)?);
    write_atomically(&guest.initrd, &data)?;
    let disk = File::create(&guest.disk).map_err(on("write", &guest.disk))?;
    disk.set_len(DISK_SIZE).map_err(on("write", &guest.disk))?;
    drop(disk);

    let log_path = workshop.join("build.log");
    let mut log = BufWriter::new(File::create(&log_path).map_err(on("write", &log_path))?);
    let (mut done, mut failed) = (false, None);
    let ran = machine.run(&guest, &mut |line| {
        let line = line.trim_end();
        // The log is for people; if it cannot be written the disk's fate says why.
        let _ = writeln!(log, "{line}");
        if let Some(step) = line.strip_prefix("@step ") {
            let (time, what) = step.split_once(' ').unwrap_or(("", step));
            options.progress.note(&format!("{time:>7} s  {what}"));
        } else if let Some(reason) = line.strip_prefix("@failed ") {
            failed = Some(reason.to_owned());
        } else if line == "@done" {
            done = true;
        }
    });
    let _ = log.flush();
    let reason = match (ran, failed) {
        (Ok(()), None) if done => {
            let disk = File::open(&guest.disk).map_err(on("read", &guest.disk))?;
            disk.sync_all().map_err(on("write", &guest.disk))?;
            let mut permissions = disk.metadata().map_err(on("read", &guest.disk))?.permissions();
            permissions.set_readonly(true);
            return disk.set_permissions(permissions).map_err(on("change the mode of", &guest.disk));
        }
        (Ok(()), Some(reason)) => reason,
        (Ok(()), None) => "the guest ended too early".to_owned(),
        (Err(reason), failed) => failed.unwrap_or(reason),
    };
    // What the guest could not write is seen by it as a broken disk.
    enough_space(workshop, 16 << 20)?;
    let kept = store.root().join("build.log");
    fs::rename(&log_path, &kept).map_err(on("rename", &kept))?;
    store.clear_workshops();
    Err(Error::Build { reason, log: kept })
}

/// What the builder's initramfs has besides the usual: its own process 1, and what makes a file system.
fn tools(debs: &[PathBuf]) -> Result<Vec<u8>> {
    const PACKAGES: &[&str] =
        &["e2fsprogs", "libext2fs2", "libext2fs2t64", "libcom-err2", "libblkid1", "libuuid1", "libc6"];
    const LIBRARIES: &[&str] =
        &["libext2fs.so.2", "libe2p.so.2", "libcom_err.so.2", "libblkid.so.1", "libuuid.so.1", "libc.so.6"];
    const LOADER: &str = "ld-linux-x86-64.so.2";
    let mut w = cpio::Writer::new();
    w.file("init", 0o755, INIT.as_bytes());
    w.symlink("etc/mtab", "/proc/mounts");
    let mut found = Vec::new();
    for deb in debs {
        let name = deb.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // In the cache it is <hash>-<package>_<version>_<architecture>.deb.
        let name = name.split_once('-').map_or("", |(_, name)| name);
        let name = name.split('_').next().unwrap_or_default().trim_end_matches(".deb");
        if !PACKAGES.contains(&name) {
            continue;
        }
        let wanted = |path: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file == "mke2fs" || path == "etc/mke2fs.conf" || file.starts_with("lib") || file == LOADER
        };
        initramfs::for_each_file(deb, wanted, |path, data| {
            let file = path.rsplit('/').next().unwrap_or(path);
            let library = LIBRARIES.iter().find(|l| file == **l || file.starts_with(&format!("{l}.")));
            let (to, mode) = match (file, library) {
                ("mke2fs", _) => ("usr/sbin/mke2fs".to_owned(), 0o755),
                ("mke2fs.conf", _) => ("etc/mke2fs.conf".to_owned(), 0o644),
                (LOADER, _) => (format!("lib64/{LOADER}"), 0o755),
                (_, Some(library)) => (format!("lib/x86_64-linux-gnu/{library}"), 0o755),
                _ => return,
            };
            if !found.contains(&to) {
                w.file(&to, mode, &data);
                found.push(to);
            }
        })?;
    }
    match found.len() == LIBRARIES.len() + 3 {
        true => Ok(w.finish()),
        false => Err(Error::Malformed {
            what: "the suite's e2fsprogs".into(),
            reason: format!("of it and its libraries there is only {}", found.join(", ")),
        }),
    }
}

/// Is there room for this many bytes?
fn enough_space(path: &Path, needed: u64) -> Result<()> {
    let space = rustix::fs::statvfs(path).map_err(|e| Error::io("look at", path, e.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    match free >= needed {
        true => Ok(()),
        false => Err(Error::NoSpace { path: path.to_path_buf(), needed: needed >> 20, free: free >> 20 }),
    }
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).map(drop).map_err(|e| Error::io("write", to, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `/proc` has room for nothing.
    #[test]
    fn too_little_space_is_told_before_anything_is_made() {
        let text = enough_space(Path::new("/proc"), 700 << 20).unwrap_err().to_string();
        assert!(text.contains("about 700 MiB at /proc, which has 0 MiB free"), "{text}");
        assert!(text.contains("tightrope prune") && text.contains("XDG_DATA_HOME") && !text.contains('\n'), "{text}");
        enough_space(Path::new("/proc"), 0).unwrap();
    }
}
