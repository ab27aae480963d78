//! The guest disk and its twin on the host: a Debian 13 user land made from packages, once as a directory (for runs in a
//! chroot on the host) and once as a raw ext4 image with the same files (for guests).
//!
//! Everything is cached under `tightrope/bench` in the user's cache directory. The archive of packages is named after the
//! list of packages, directory and image after that and the bench's own files, so a change makes new ones. No loop device
//! and no root is needed: `mmdebstrap` works in a user namespace, and `mkfs.ext4 -d` fills an image from a directory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{chroot, files, rows};

/// Debian's code name of the guest user land.
const SUITE: &str = "trixie";
/// What is installed besides the essential packages and apt.
const PACKAGES: &[&str] = &[
    "bc",
    "busybox",
    "bzip2",
    "ca-certificates",
    "dash",
    "dbus",
    "e2fsprogs",
    "file",
    "gawk",
    "gcc",
    "git",
    "gzip",
    "iproute2",
    "kmod",
    "libc6-dev",
    "libssl-dev",
    "login",
    "make",
    "mawk",
    "openssl",
    "passwd",
    "perl",
    "procps",
    "python3",
    "sqlite3",
    "systemd",
    "systemd-sysv",
    "udev",
    "util-linux",
    "xz-utils",
    "zstd",
];
/// What the large user land has besides: for the rows of kind `b`.
const LARGE_PACKAGES: &[&str] = &[
    "aom-tools",
    "apache2-utils",
    "dav1d",
    "libpython3.13-testsuite",
    "luajit",
    "nginx-light",
    "nodejs",
    "openjdk-21-jdk-headless",
    "redis-server",
    "redis-tools",
    "vpx-tools",
];
/// The source package that the large user land compiles.
const SOURCE: &str = "gawk";
/// Packages that a guest installs, with all they need: the local repository of the row `apt`.
const INSTALLED: &[&str] = &["jq", "less", "lua5.4", "rsync", "tcl8.6", "tmux", "tree", "vim-tiny", "xmlstarlet"];
/// What compiles the Go program; only the program gets into the user land.
const GO_PACKAGES: &[&str] = &["golang-go"];
/// What the `qemu` user land has: Debian's newest QEMU, for hosts whose own is older.
const QEMU_PACKAGES: &[&str] = &["qemu-system-x86"];

/// Which user land.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Land {
    /// For most rows and the correctness suite.
    Usual,
    /// The same and more, for the rows of kind `b`: built only when one is asked for.
    Large,
}

impl Land {
    fn packages(self) -> Vec<&'static str> {
        match self {
            Self::Usual => PACKAGES.to_vec(),
            Self::Large => [PACKAGES, LARGE_PACKAGES].concat(),
        }
    }

    /// The rows that can run in it: a soak runs them all.
    fn rows(self) -> Result<Vec<rows::Row>> {
        Ok(rows::all()?.into_iter().filter(|row| self == Self::Large || !row.large).collect())
    }

    /// Names the archive of packages.
    fn name(self) -> &'static str {
        match self {
            Self::Usual => "trixie",
            Self::Large => "large",
        }
    }

    /// Size of the image's file system; the file is sparse.
    fn image_size(self) -> &'static str {
        match self {
            Self::Usual => "2G",
            Self::Large => "6G",
        }
    }

    /// What is fetched besides, by a program that runs after the packages are installed: `$1` is the root directory.
    fn fetch(self) -> Option<String> {
        let installed = INSTALLED.join(" ");
        (self == Self::Large).then(|| {
            format!(
                r#"set -e
export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG"
mkdir -p "$1/opt/bench/source" "$1/opt/bench/repository"
cd "$1/opt/bench/source"
apt-get -q source --download-only {SOURCE}
cd "$1/opt/bench/repository"
needed=$(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces --no-enhances {installed} |
    grep '^[a-z0-9]' | grep -v ':' | sort -u)
apt-get -q download $needed"#
            )
        })
    }
}

/// A built user land.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The directory, for `chroot`.
    pub root: PathBuf,
    /// The raw ext4 image. Never written: guests get it read-only or a copy.
    pub image: PathBuf,
    /// Names the contents.
    pub key: String,
}

/// The bench's cache directory, made if it is not there.
///
/// # Errors
/// Neither `XDG_CACHE_HOME` nor `HOME` is set, or the directory cannot be made.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|d| Path::new(d).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            PathBuf::from(std::env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache")
        }
    };
    let dir = base.join("tightrope/bench");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make the cache directory {}", dir.display()))?;
    Ok(dir)
}

/// The Debian mirror that the host's own APT configuration names.
///
/// # Errors
/// APT is missing or has no source with Debian's `main`.
pub fn host_mirror() -> Result<String> {
    let remedy = "name one by --mirror, for example --mirror http://mirror.example/debian";
    let listing = Command::new("apt-get")
        .args(["indextargets", "--format", "$(REPO_URI) $(COMPONENT) $(CREATED_BY) $(ORIGIN)"])
        .output()
        .with_context(|| format!("cannot ask apt-get for the host's Debian mirror; {remedy}"))?;
    mirror_from(&String::from_utf8_lossy(&listing.stdout))
        .with_context(|| format!("the host's APT sources name no Debian mirror; {remedy}"))
}

fn mirror_from(listing: &str) -> Option<String> {
    listing.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        let (uri, component, kind) = (words.next()?, words.next()?, words.next()?);
        let uri = uri.trim_end_matches('/');
        // Archives of Debian proper end in /debian; /debian-security and other vendors' do not.
        (component == "main" && kind == "Packages" && uri.ends_with("/debian")).then(|| uri.to_owned())
    })
}

/// Finds a built user land, or builds it.
///
/// # Errors
/// A tool is missing, the mirror does not answer, the disk is full; the message names the remedy.
pub fn build(mirror: Option<&str>, land: Land) -> Result<Disk> {
    let cache = cache_dir()?;
    let _lock = lock(&cache)?;
    let keys = [Land::Usual, Land::Large].map(|land| key(&land.packages(), Some(land)));
    let key = key(&land.packages(), Some(land))?;
    let disk = Disk {
        root: cache.join(format!("root-{key}")),
        image: cache.join(format!("disk-{key}.raw")),
        key: key.clone(),
    };
    if !disk.root.is_dir() {
        let go = if land == Land::Large { Some(go_program(&cache, mirror)?) } else { None };
        let archive = archive(&cache, land.name(), &land.packages(), land.fetch().as_deref(), mirror)?;
        say("unpacking the user land and building the workloads in it");
        let fresh = cache.join(format!("root-{key}.new"));
        unpack(&archive, &fresh)?;
        furnish(&fresh, land)?;
        if let Some(program) = go {
            fs::copy(&program, fresh.join("opt/bench/bin/goroutines"))
                .with_context(|| format!("cannot copy {}", program.display()))?;
            let status =
                chroot::command(&fresh, &["sh", "/opt/bench/large/build.sh"]).stdout(std::io::stderr()).status()?;
            ensure!(status.success(), "the large workloads could not be built in {}", fresh.display());
        }
        fs::rename(&fresh, &disk.root)?;
    }
    if !disk.image.is_file() {
        say("making the disk image");
        let fresh = cache.join(format!("disk-{key}.new"));
        make_image(&disk.root, &fresh, land.image_size())?;
        fs::rename(&fresh, &disk.image)?;
    }
    remove_old(&cache, &keys.into_iter().collect::<Result<Vec<_>>>()?);
    Ok(disk)
}

/// Finds or builds the Go program, by a compiler in a user land of its own that is thrown away.
fn go_program(cache: &Path, mirror: Option<&str>) -> Result<PathBuf> {
    let source = files::FILES.iter().find(|f| f.path.ends_with("/goroutines.go")).context("no Go program")?;
    let mut hash = Sha256::new();
    hash.update(format!("{SUITE} {GO_PACKAGES:?} {}", source.text));
    let program = cache.join(format!("goroutines-{}", hex(hash)));
    if program.is_file() {
        return Ok(program);
    }
    let archive = archive(cache, "go", GO_PACKAGES, None, mirror)?;
    let root = cache.join("go.new");
    unpack(&archive, &root)?;
    put(&root, "build/goroutines.go", 0o644, source.text)?;
    say("compiling the Go program");
    let script = "cd /build && GO111MODULE=off CGO_ENABLED=0 GOCACHE=/tmp/go go build -trimpath goroutines.go";
    let status = chroot::command(&root, &["sh", "-c", script]).stdout(std::io::stderr()).status()?;
    ensure!(status.success(), "the Go program could not be compiled in {}", root.display());
    fs::copy(root.join("build/goroutines"), &program)?;
    let _ = fs::remove_dir_all(&root);
    let _ = fs::remove_file(&archive);
    Ok(program)
}

/// Finds or builds a directory with Debian's newest QEMU in it.
///
/// # Errors
/// As for [`build`].
pub fn build_qemu(mirror: Option<&str>) -> Result<PathBuf> {
    let cache = cache_dir()?;
    let _lock = lock(&cache)?;
    let root = cache.join(format!("qemu-{}", key(QEMU_PACKAGES, None)?));
    if !root.is_dir() {
        let archive = archive(&cache, "qemu", QEMU_PACKAGES, None, mirror)?;
        let fresh = root.with_extension("new");
        unpack(&archive, &fresh)?;
        fs::rename(&fresh, &root)?;
        // Kept unpacked only: it is large and seldom made anew.
        let _ = fs::remove_file(&archive);
    }
    Ok(root)
}

fn say(what: &str) {
    eprintln!("bench: {what}");
}

/// Keeps a second bench from building at the same time.
fn lock(cache: &Path) -> Result<File> {
    let file = File::create(cache.join("lock")).with_context(|| format!("cannot write to {}", cache.display()))?;
    if file.try_lock().is_err() {
        say("waiting for another bench that is building");
        file.lock()?;
    }
    Ok(file)
}

/// Names a set of packages or, with a user land, its whole contents.
fn key(packages: &[&str], land: Option<Land>) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(format!("{SUITE} {packages:?}"));
    if let Some(land) = land {
        hash.update(land.image_size());
        hash.update(land.fetch().unwrap_or_default());
        for file in files::FILES {
            hash.update(format!("{} {:o} {} ", file.path, file.mode, file.text.len()));
            hash.update(file.text);
        }
        for row in land.rows()? {
            hash.update(format!("{} {}", row.name, row.command));
        }
    }
    Ok(hex(hash))
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().take(6).map(|b| format!("{b:02x}")).collect()
}

/// Removes directories and images of earlier versions of the bench's files; failures only cost space.
fn remove_old(cache: &Path, keys: &[String]) {
    let Ok(entries) = fs::read_dir(cache) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let ours = ["root-", "disk-", "sums-"].iter().any(|p| name.starts_with(p));
        if ours && !keys.iter().any(|key| name.contains(key)) {
            let _ =
                if entry.path().is_dir() { fs::remove_dir_all(entry.path()) } else { fs::remove_file(entry.path()) };
        }
    }
}

/// Runs a program to its end, its output going to standard error.
fn run<S: AsRef<OsStr>>(program: &str, args: &[S], remedy: &str) -> Result<()> {
    let status = match Command::new(program).args(args).stdin(Stdio::null()).stdout(std::io::stderr()).status() {
        Ok(status) => status,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => bail!("{program} is missing: {remedy}"),
        Err(e) => return Err(e).with_context(|| format!("cannot run {program}")),
    };
    ensure!(status.success(), "{program} failed ({status}); its own message stands above");
    Ok(())
}

fn archive(cache: &Path, name: &str, packages: &[&str], fetch: Option<&str>, mirror: Option<&str>) -> Result<PathBuf> {
    let mut hash = Sha256::new();
    hash.update(format!("{} {}", key(packages, None)?, fetch.unwrap_or_default()));
    let path = cache.join(format!("{name}-{}.tar", hex(hash)));
    if path.is_file() {
        return Ok(path);
    }
    let mirror = match mirror {
        Some(m) => m.trim_end_matches('/').to_owned(),
        None => host_mirror()?,
    };
    let keyring = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
    ensure!(keyring.is_file(), "{} is missing: apt install debian-archive-keyring", keyring.display());
    say(&format!("making a Debian user land ({SUITE}) from {mirror}; this takes a few minutes, once"));
    // mmdebstrap takes the format from the file's ending.
    let fresh = cache.join(format!("{name}.new.tar"));
    let mut args: Vec<String> = vec!["--variant=minbase".into(), "--architectures=amd64".into(), "--format=tar".into()];
    args.push("--aptopt=Apt::Install-Recommends \"false\"".into());
    // The host's proxy is the mirror's way out.
    args.extend(host_proxies().into_iter().map(|p| format!("--aptopt={p}")));
    for dir in ["doc", "man", "info", "locale"] {
        args.push(format!("--dpkgopt=path-exclude=/usr/share/{dir}/*"));
    }
    // Alternatives of some packages have manual pages that link into this directory.
    args.push("--essential-hook=mkdir -p \"$1/usr/share/man/man1\"".into());
    args.push(format!("--include={}", packages.join(",")));
    if let Some(program) = fetch {
        args.push(format!("--customize-hook={program}"));
    }
    args.push(SUITE.into());
    args.push(fresh.display().to_string());
    args.push(format!("deb [signed-by={}] {mirror} {SUITE} main", keyring.display()));
    if fetch.is_some() {
        args.push(format!("deb-src [signed-by={}] {mirror} {SUITE} main", keyring.display()));
    }
    let made = run("mmdebstrap", &args, "apt install mmdebstrap");
    if !chroot::is_root() {
        made.context(
            "as a user, mmdebstrap needs uidmap (apt install uidmap) and a range of ids in /etc/subuid and /etc/subgid",
        )?;
    } else {
        made?;
    }
    fs::rename(&fresh, &path)?;
    Ok(path)
}

/// `Acquire::…::Proxy` settings of the host, as configuration lines.
fn host_proxies() -> Vec<String> {
    let Ok(dump) = Command::new("apt-config").arg("dump").output() else { return Vec::new() };
    String::from_utf8_lossy(&dump.stdout)
        .lines()
        .filter(|l| l.to_ascii_lowercase().starts_with("acquire::") && l.to_ascii_lowercase().contains("::proxy"))
        .map(|l| l.trim_end_matches(';').to_owned())
        .collect()
}

fn unpack(archive: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        fs::remove_dir_all(to).with_context(|| format!("cannot remove what an earlier run left: {}", to.display()))?;
    }
    fs::create_dir_all(to)?;
    let owner = if chroot::is_root() { "--same-owner" } else { "--no-same-owner" };
    // Device nodes cannot be made by a user, and devtmpfs makes them in the guest.
    let args = [
        OsStr::new("-xpf"),
        archive.as_os_str(),
        OsStr::new("-C"),
        to.as_os_str(),
        OsStr::new("--numeric-owner"),
        OsStr::new(owner),
        OsStr::new("--exclude=./dev/*"),
    ];
    run("tar", &args, "apt install tar")
}

fn put(root: &Path, path: &str, mode: u32, text: &str) -> Result<()> {
    let target = root.join(path);
    if let Some(dir) = target.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut file = File::create(&target).with_context(|| format!("cannot write {}", target.display()))?;
    file.write_all(text.as_bytes())?;
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    Ok(())
}

/// Puts the bench's files in and builds its programs with the user land's own compiler.
fn furnish(root: &Path, land: Land) -> Result<()> {
    for file in files::FILES {
        put(root, file.path, file.mode, file.text)?;
    }
    for row in land.rows()? {
        put(root, &format!("opt/bench/rows/{}", row.name), 0o644, &format!("{}\n", row.command))?;
    }
    put(root, "etc/hostname", 0o644, "bench\n")?;
    put(root, "etc/hosts", 0o644, "127.0.0.1 localhost bench\n")?;
    put(root, "etc/fstab", 0o644, "/dev/vda / ext4 defaults 0 1\ntmpfs /tmp tmpfs mode=1777 0 0\n")?;
    put(root, "etc/machine-id", 0o444, "0123456789abcdef0123456789abcdef\n")?;
    // Work that a machine does at its own times would fall into measurements.
    for unit in
        ["apt-daily.timer", "apt-daily-upgrade.timer", "e2scrub_all.timer", "fstrim.timer", "dpkg-db-backup.timer"]
    {
        let link = root.join("etc/systemd/system").join(unit);
        if fs::symlink_metadata(&link).is_err() {
            symlink("/dev/null", link)?;
        }
    }
    // Root's password is empty: `login` on any console works, too.
    let shadow = root.join("etc/shadow");
    let text = fs::read_to_string(&shadow).with_context(|| format!("cannot read {}", shadow.display()))?;
    let open: Vec<String> = text
        .lines()
        .map(|l| match l.strip_prefix("root:").and_then(|r| r.split_once(':')) {
            Some((_, rest)) => format!("root::{rest}"),
            None => l.to_owned(),
        })
        .collect();
    fs::write(&shadow, open.join("\n") + "\n")?;
    fs::create_dir_all(root.join("opt/bench/bin"))?;
    fs::create_dir_all(root.join("opt/bench/data"))?;
    let script = "cd /opt/bench && make -s -C src BIN=../bin && rm -f src/*.o && bin/work generate data";
    let status = chroot::command(root, &["sh", "-c", script]).stdout(std::io::stderr()).status()?;
    ensure!(status.success(), "the workloads could not be built in {}", root.display());
    Ok(())
}

fn make_image(root: &Path, image: &Path, size: &str) -> Result<()> {
    let _ = fs::remove_file(image);
    let mut args: Vec<&OsStr> = Vec::new();
    let mut program = "mkfs.ext4";
    if !chroot::is_root() {
        // Files of the user become files of root.
        program = "unshare";
        args.extend(["--map-root-user", "mkfs.ext4"].map(OsStr::new));
    }
    args.extend(["-q", "-F", "-L", "bench", "-E", "lazy_itable_init=0,lazy_journal_init=0", "-d"].map(OsStr::new));
    args.extend([root.as_os_str(), image.as_os_str(), OsStr::new(size)]);
    run(program, &args, "apt install e2fsprogs util-linux")
}

/// Copies an image, holes kept.
///
/// # Errors
/// No space left.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let args = [OsStr::new("--sparse=always"), OsStr::new("--reflink=auto"), from.as_os_str(), to.as_os_str()];
    run("cp", &args, "apt install coreutils")
}

/// A copy of the image that a guest may write to; removed when dropped.
#[derive(Debug)]
pub struct Scratch {
    /// The copy.
    pub path: PathBuf,
}

impl Scratch {
    /// Copies the image, holes kept.
    ///
    /// # Errors
    /// No space left.
    pub fn new(disk: &Disk) -> Result<Self> {
        let path = cache_dir()?.join(format!("scratch-{}.raw", std::process::id()));
        let scratch = Self { path };
        copy(&disk.image, &scratch.path)?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_debian_s_own_archive() {
        let listing = "https://packages.example.org/apt/ main Packages x\n\
                       http://mirror.example.org/debian-security/ main Packages Debian\n\
                       http://mirror.example.org/debian/ main Translations Debian\n\
                       http://mirror.example.org/debian/ main Packages Debian\n";
        assert_eq!(mirror_from(listing).as_deref(), Some("http://mirror.example.org/debian"));
        assert_eq!(mirror_from(""), None);
    }

    #[test]
    fn keys_follow_the_contents() {
        let of = |packages, land| key(packages, land).unwrap();
        assert_eq!(of(PACKAGES, Some(Land::Usual)), of(PACKAGES, Some(Land::Usual)));
        assert_ne!(of(PACKAGES, Some(Land::Usual)), of(PACKAGES, Some(Land::Large)));
        assert_ne!(of(PACKAGES, Some(Land::Usual)), of(PACKAGES, None));
        assert_ne!(of(PACKAGES, None), of(QEMU_PACKAGES, None));
    }
}
