//! The VMs of a user: one directory each below `$XDG_RUNTIME_DIR/tightrope`, made by the VM's monitor, read by the other commands.
//!
//! ```text
//! tightrope/lock              held while a VM is added or a dead one removed
//! tightrope/ID/about.json     what it is: About
//! tightrope/ID/alive          locked by the monitor as long as it lives: nothing else says that a VM runs, so nothing stays locked
//! tightrope/ID/status         how it ended, written by the monitor itself
//! tightrope/ID/control        a Unix socket: questions and orders (vmm::control)
//! tightrope/ID/vsock          a Unix socket: connections to the guest; vsock_PORT: made by others, for connections from it
//! tightrope/ID/console        what the guest wrote on its console: ring
//! ```
//!
//! * [`Registry`]: finding and adding. * [`ring`]: the console's log. * [`keeper`]: the small process that outlives a monitor.

#![deny(missing_docs)]

pub mod keeper;
pub mod ring;

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// VMs that have ended and whose console can still be read; older ones are removed.
const KEPT: usize = 20;
/// The longest `about.json`, in bytes.
const MAX_ABOUT: u64 = 64 << 10;
/// The longest path of a Unix socket, with the zero at its end.
const MAX_SOCKET_PATH: usize = 108;

/// Why a VM is not found or cannot be added: one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No VM has this name, and no id starts so.
    #[error("there is no VM '{0}': tightrope ps -a lists those that there are")]
    NotFound(String),
    /// Several ids start so.
    #[error("'{0}' means several VMs ({1}): give more of the id, or the name")]
    Ambiguous(String, String),
    /// A running VM has this name.
    #[error("the name '{0}' is in use by VM {1}, which runs: choose another, or stop that one")]
    NameTaken(String, String),
    /// The text is no name.
    #[error(
        "'{0}' is no name for a VM: up to 64 letters, digits, '.', '_' and '-' are, the first one a letter or digit, and not only digits a to f"
    )]
    BadName(String),
    /// The directory for VMs cannot be used.
    #[error("the directory for VMs, {0}: {1}: mend that, or set XDG_RUNTIME_DIR to another directory")]
    Directory(PathBuf, String),
}

/// What a VM is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its id: 12 hexadecimal digits.
    pub id: String,
    /// Its name, if the user gave one.
    pub name: Option<String>,
    /// The monitor's process.
    pub pid: u32,
    /// When it was started, in seconds since 1970.
    pub started: u64,
    /// What runs in it: an image or a kernel.
    pub image: String,
    /// The command it runs, if it was started for one.
    pub command: Vec<String>,
    /// Is there to be an agent in the guest?
    pub agent: bool,
    /// Is there a log: of its console (where that does not go to somebody's terminal), or of what is told the user in the background?
    pub log: bool,
    /// Is the entry to stay when the VM has ended?
    pub keep: bool,
    /// Control groups of its own, to be removed at the end.
    #[serde(default)]
    pub cgroups: Vec<PathBuf>,
}

/// A VM that is or was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where its files are.
    pub dir: PathBuf,
    /// What it is.
    pub about: About,
    /// Does its monitor run?
    pub alive: bool,
    /// The monitor's exit code, if it could still say it.
    pub exit: Option<i32>,
}

impl Entry {
    /// Name or id, for messages.
    pub fn shown(&self) -> &str {
        self.about.name.as_deref().unwrap_or(&self.about.id)
    }

    /// The socket for questions and orders.
    pub fn control(&self) -> PathBuf {
        self.dir.join("control")
    }

    /// The socket for connections to the guest.
    pub fn vsock(&self) -> PathBuf {
        self.dir.join("vsock")
    }

    /// The console's log.
    pub fn console(&self) -> PathBuf {
        self.dir.join("console")
    }

    fn read(dir: &Path) -> Option<Self> {
        let mut text = Vec::new();
        File::open(dir.join("about.json")).ok()?.take(MAX_ABOUT).read_to_end(&mut text).ok()?;
        let about: About = serde_json::from_slice(&text).ok()?;
        let status = fs::read_to_string(dir.join("status")).unwrap_or_default();
        let exit = status.trim().strip_prefix("exit ").and_then(|code| code.parse().ok());
        Some(Self { dir: dir.to_owned(), about, alive: is_alive(dir), exit })
    }
}

/// Does somebody hold the lock?
fn is_alive(dir: &Path) -> bool {
    let Ok(file) = File::open(dir.join("alive")) else { return false };
    // A shared lock: several may look at once.
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(rustix::io::Errno::WOULDBLOCK)
}

/// A new VM's entry, held by its monitor.
#[derive(Debug)]
pub struct Own {
    /// What it is.
    pub about: About,
    /// Where its files are.
    pub dir: PathBuf,
    /// Locked: to be kept open as long as the monitor lives.
    pub alive: File,
    /// Takes how it ended: the text of [`ended`].
    pub status: File,
    /// For questions and orders.
    pub control: UnixListener,
    /// For connections to the guest.
    pub vsock: UnixListener,
    /// The console's log.
    pub console: File,
}

/// What a monitor that ends with `code` writes to its status file.
pub fn ended(code: i32) -> String {
    format!("exit {code}\n")
}

/// All VMs of this user.
#[derive(Clone, Debug)]
pub struct Registry {
    dir: PathBuf,
}

impl Registry {
    /// The user's own. Makes its directory if there is none.
    ///
    /// # Errors
    /// [`Error::Directory`]: it cannot be made, or belongs to somebody else.
    pub fn open() -> Result<Self, Error> {
        let uid = rustix::process::getuid().as_raw();
        let base = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
        let dir = match base {
            Some(base) => base.join("tightrope"),
            // As the login manager makes it; else, as others do without one.
            None => match Path::new("/run/user").join(uid.to_string()) {
                base if fs::metadata(&base).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid) => {
                    base.join("tightrope")
                }
                _ => PathBuf::from(format!("/tmp/tightrope-{uid}")),
            },
        };
        Self::at(dir)
    }

    /// One at another place.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub fn at(dir: PathBuf) -> Result<Self, Error> {
        let wrong = |why: &str| Error::Directory(dir.clone(), why.to_owned());
        match DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(wrong(&format!("it cannot be made ({error})"))),
        }
        // Somebody else could have made it, in /tmp: whoever can write to it could play every VM.
        let meta = fs::symlink_metadata(&dir).map_err(|error| wrong(&error.to_string()))?;
        if !meta.is_dir() || meta.uid() != rustix::process::geteuid().as_raw() {
            return Err(wrong("it belongs to somebody else"));
        }
        if meta.permissions().mode() & 0o077 != 0 {
            return Err(wrong("others may use it: chmod 700 it"));
        }
        Ok(Self { dir })
    }

    /// Removes what VMs have left that could not do it themselves: everything of a VM was killed at once.
    pub fn tidy(&self) {
        if let Ok(_lock) = self.lock() {
            self.clean(None);
        }
    }

    /// All VMs, those that were started first before the others. Of those that have ended, only the ones that stay.
    pub fn entries(&self) -> Vec<Entry> {
        let dirs = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let mut all: Vec<Entry> = dirs.filter_map(|dir| Entry::read(&dir.path())).collect();
        all.sort_by(|a, b| (a.about.started, &a.about.id).cmp(&(b.about.started, &b.about.id)));
        all
    }

    /// The VM of this name, or whose id starts so. A running one goes before one that has ended.
    ///
    /// # Errors
    /// [`Error::NotFound`], [`Error::Ambiguous`].
    pub fn find(&self, text: &str) -> Result<Entry, Error> {
        let all = self.entries();
        let named = |alive| all.iter().rfind(|entry| entry.alive == alive && entry.about.name.as_deref() == Some(text));
        if let Some(entry) = named(true).or_else(|| named(false)) {
            return Ok(entry.clone());
        }
        let found: Vec<&Entry> =
            all.iter().filter(|entry| !text.is_empty() && entry.about.id.starts_with(text)).collect();
        match found.as_slice() {
            [] => Err(Error::NotFound(text.to_owned())),
            [entry] => Ok((*entry).clone()),
            several => {
                let ids: Vec<&str> = several.iter().map(|entry| entry.about.id.as_str()).collect();
                Err(Error::Ambiguous(text.to_owned(), ids.join(", ")))
            }
        }
    }

    /// Adds the calling process's VM. Removes entries of VMs that have ended: those that were not to stay, those of the same name, and
    /// more than the last twenty.
    ///
    /// # Errors
    /// [`Error::NameTaken`], [`Error::BadName`], [`Error::Directory`].
    pub fn add(&self, about: About) -> Result<Own, Error> {
        if let Some(name) = about.name.as_deref().filter(|name| !is_name(name)) {
            return Err(Error::BadName(name.to_owned()));
        }
        let wrong = |error: io::Error| Error::Directory(self.dir.clone(), error.to_string());
        let _lock = self.lock().map_err(wrong)?;
        if let Some(name) = &about.name
            && let Some(other) =
                self.entries().iter().find(|entry| entry.alive && entry.about.name.as_ref() == Some(name))
        {
            return Err(Error::NameTaken(name.clone(), other.about.id.clone()));
        }
        self.clean(about.name.as_deref());
        self.make(about).map_err(wrong)
    }

    fn lock(&self) -> io::Result<File> {
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.dir.join("lock"))?;
        flock(&file, FlockOperation::LockExclusive)?;
        Ok(file)
    }

    /// The lock must be held.
    fn clean(&self, name: Option<&str>) {
        let mut kept = Vec::new();
        for dir in fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|dir| dir.path()) {
            if !dir.is_dir() || is_alive(&dir) {
                continue;
            }
            let entry = Entry::read(&dir);
            for group in entry.iter().flat_map(|entry| &entry.about.cgroups) {
                // Nobody can be in it any more; if somebody is, it stays.
                let _ = fs::remove_dir(group);
            }
            match entry {
                Some(entry) if entry.about.keep && (name.is_none() || entry.about.name.as_deref() != name) => {
                    kept.push((entry.about.started, dir));
                }
                _ => drop(fs::remove_dir_all(&dir)),
            }
        }
        kept.sort();
        for (_, dir) in kept.iter().take(kept.len().saturating_sub(KEPT)) {
            let _ = fs::remove_dir_all(dir);
        }
    }

    fn make(&self, mut about: About) -> io::Result<Own> {
        let mut random = [0; 6];
        let dir = loop {
            rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
            about.id = random.iter().map(|byte| format!("{byte:02x}")).collect();
            let dir = self.dir.join(&about.id);
            match DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => break dir,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        };
        about.pid = std::process::id();
        about.started = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let made = Self::fill(&dir, about);
        if made.is_err() {
            let _ = fs::remove_dir_all(&dir);
        }
        made
    }

    fn fill(dir: &Path, about: About) -> io::Result<Own> {
        let file =
            |name: &str| OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(dir.join(name));
        let alive = file("alive")?;
        flock(&alive, FlockOperation::NonBlockingLockExclusive)?;
        let listen = |name: &str| {
            let path = dir.join(name);
            if path.as_os_str().len() >= MAX_SOCKET_PATH {
                return Err(io::Error::other(
                    "its name is too long for sockets in it: set XDG_RUNTIME_DIR to a shorter one",
                ));
            }
            UnixListener::bind(path)
        };
        let (control, vsock) = (listen("control")?, listen("vsock")?);
        let (status, console) = (file("status")?, file("console")?);
        // Last, and at once: without it there is no VM here for the others.
        let text = serde_json::to_vec(&about).unwrap_or_default();
        file("about.new")?.write_all(&text)?;
        fs::rename(dir.join("about.new"), dir.join("about.json"))?;
        Ok(Own { about, dir: dir.to_owned(), alive, status, control, vsock, console })
    }

    /// Removes the entry of a VM that has ended; `false` if it runs.
    pub fn remove(&self, entry: &Entry) -> bool {
        let lock = self.lock();
        if lock.is_err() || is_alive(&entry.dir) {
            return false;
        }
        let _ = fs::remove_dir_all(&entry.dir);
        true
    }
}

/// Is this a name, and not to be taken for an id?
fn is_name(name: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(plain)
        && !(name.len() == 12 && name.chars().all(|c| c.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> (tempfile::TempDir, Registry) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("tightrope")).unwrap();
        (dir, registry)
    }

    fn named(name: &str) -> About {
        About { name: Some(name.to_owned()), keep: true, ..About::default() }
    }

    #[test]
    fn living_dead_and_found() {
        let (_dir, registry) = registry();
        let first = registry.add(named("web")).unwrap();
        let second = registry.add(About::default()).unwrap();
        let id = first.about.id.clone();
        assert_eq!(registry.entries().len(), 2);
        assert!(registry.entries().iter().all(|entry| entry.alive));
        assert_eq!(registry.find("web").unwrap().about, first.about);
        assert_eq!(registry.find(&id[..11]).unwrap().about.name.as_deref(), Some("web"));
        assert!(matches!(registry.find("we"), Err(Error::NotFound(_))));
        assert!(matches!(registry.find(""), Err(Error::NotFound(_))));
        assert!(matches!(registry.add(named("web")), Err(Error::NameTaken(_, other)) if other == id));
        assert!(!registry.remove(&registry.find("web").unwrap()), "it runs");
        // It ends: the entry stays, can be found, and its name is free.
        (&first.status).write_all(ended(7).as_bytes()).unwrap();
        drop(first);
        let dead = registry.find("web").unwrap();
        assert_eq!((dead.alive, dead.exit), (false, Some(7)));
        let again = registry.add(named("web")).unwrap();
        assert_eq!(registry.find("web").unwrap().about.id, again.about.id);
        assert_eq!(registry.entries().len(), 2);
        // One that was not to stay goes with the next that comes.
        drop(second);
        assert_eq!(registry.entries().len(), 2);
        drop(registry.add(named("other")).unwrap());
        assert_eq!(registry.entries().len(), 2);
        assert!(registry.remove(&registry.find("other").unwrap()));
        assert!(registry.find("other").is_err());
    }

    #[test]
    fn what_the_dead_left_is_removed() {
        let (dir, registry) = registry();
        let [stays, goes, lives] = ["stays", "goes", "lives"].map(|name| {
            let group = dir.path().join(name);
            fs::create_dir(&group).unwrap();
            (group.clone(), registry.add(About { cgroups: vec![group], ..named(name) }).unwrap())
        });
        fs::write(stays.0.join("a process"), "").unwrap();
        drop((stays.1, goes.1));
        registry.tidy();
        assert!(stays.0.exists() && !goes.0.exists() && lives.0.exists());
        assert_eq!(registry.entries().len(), 3, "what is to stay can still be read");
    }

    #[test]
    fn several_ids() {
        let (_dir, registry) = registry();
        // 17 VMs: two ids start with the same digit.
        let all: Vec<_> = (0..17).map(|_| registry.add(About::default()).unwrap()).collect();
        let starts: Vec<&str> = all.iter().map(|own| &own.about.id[..1]).collect();
        let twice = starts.iter().find(|start| starts.iter().filter(|other| other == start).count() > 1).unwrap();
        let error = registry.find(twice).unwrap_err();
        assert!(matches!(&error, Error::Ambiguous(..)), "{error}");
    }

    #[test]
    fn those_that_ended_are_bounded() {
        let (_dir, registry) = registry();
        for number in 0..KEPT + 5 {
            registry.add(named(&format!("vm-{number}"))).unwrap();
        }
        assert!(registry.entries().len() <= KEPT + 1);
    }

    #[test]
    fn names() {
        for good in ["a", "web-1", "9", "A.b_c", "deadbeef"] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", ".x", "a b", "a/b", "0123456789ab", &"x".repeat(65), "ä"] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn directories_of_others_are_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, PermissionsExt::from_mode(0o755)).unwrap();
        assert!(Registry::at(open.clone()).unwrap_err().to_string().contains("chmod 700"));
        let link = dir.path().join("link");
        fs::set_permissions(&open, PermissionsExt::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&open, &link).unwrap();
        assert!(Registry::at(link).is_err());
        assert!(Registry::at(dir.path().join("no/such")).unwrap_err().to_string().contains("XDG_RUNTIME_DIR"));
        let deep = dir.path().join("x".repeat(90));
        let error = Registry::at(deep).unwrap().add(About::default()).unwrap_err();
        assert!(error.to_string().contains("too long"), "{error}");
    }
}
