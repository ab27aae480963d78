//! The cache directory: what lies where, and the lock that lets one process at a time fill it.
//!
//! ```text
//! ~/.cache/tightrope/
//!   lock                       flock(2)ed while the cache is written
//!   indexes/<mirror>/<suite>/  the last verified Packages.xz of a suite, and what is known about it
//!   packages/<hash>-<name>     verified .deb files
//!   partial/<hash>             downloads not finished yet
//!   images/<hash>/             built guests: vmlinuz, initrd.cpio; vmlinux, if somebody keeps the unpacked kernel here
//!   images/<name>.json         the last built guest of that name
//! ```
//!
//! Files appear by rename only, so one that is there is whole.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::http::Progress;

/// A cache directory. Nothing is created before the first write.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

/// Holds the cache's lock until dropped.
#[derive(Debug)]
pub struct Lock(#[allow(dead_code, reason = "closing the file releases the lock")] File);

impl Cache {
    /// The cache at `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A directory below the root, made if it is not there (mode 0700).
    ///
    /// # Errors
    /// [`Error::CacheUnwritable`], [`Error::CacheFull`].
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.root.join(name);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(|e| match e.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                Error::CacheFull { path: path.clone() }
            }
            // A file where a directory should be is as unusable as a forbidden one.
            _ => Error::CacheUnwritable { path: path.clone(), reason: e.to_string() },
        })?;
        Ok(path)
    }

    /// Waits until no other process fills this cache.
    ///
    /// # Errors
    /// [`Error::CacheUnwritable`], [`Error::CacheFull`], [`Error::Io`].
    pub fn lock(&self, progress: Progress) -> Result<Lock> {
        self.lock_saying(progress, "waiting for another tightrope that is filling the cache")
    }

    /// As [`Cache::lock`]; `waiting` is what the user is told meanwhile.
    pub(crate) fn lock_saying(&self, progress: Progress, waiting: &str) -> Result<Lock> {
        let path = self.dir("")?.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io("open", &path, e))?;
        let failed = |e: Errno| Error::io("lock", &path, e.into());
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                progress.note(waiting);
                loop {
                    match flock(&file, FlockOperation::LockExclusive) {
                        Err(Errno::INTR) => {}
                        other => break other.map_err(failed)?,
                    }
                }
            }
            Err(e) => return Err(failed(e)),
        }
        Ok(Lock(file))
    }
}

/// Writes a whole file: into a temporary one beside it, synced, then renamed.
///
/// # Errors
/// [`Error::CacheUnwritable`], [`Error::CacheFull`], [`Error::Io`].
pub fn write_atomically(path: &Path, data: &[u8]) -> Result<()> {
    let temporary = path.with_extension(format!("new{}", std::process::id()));
    let write = || {
        let mut file = File::create(&temporary)?;
        file.write_all(data)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("write", path, e)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::at(dir.path().join("c"));
        let held = cache.lock(Progress::Quiet).unwrap();
        let (tx, rx) = mpsc::channel();
        let other = cache.clone();
        let waiter = std::thread::spawn(move || {
            let _lock = other.lock(Progress::Quiet).unwrap();
            tx.send(()).unwrap();
        });
        assert!(rx.recv_timeout(Duration::from_millis(100)).is_err());
        drop(held);
        rx.recv_timeout(Duration::from_secs(5)).unwrap();
        waiter.join().unwrap();
    }

    #[test]
    fn unwritable_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let e = Cache::at(&file).lock(Progress::Quiet).unwrap_err();
        assert!(matches!(e, Error::CacheUnwritable { .. }), "{e}");
        // A device that is always full stands in for a full disk.
        let e = write_atomically(Path::new("/dev/full/x"), b"").unwrap_err();
        assert!(e.to_string().contains("/dev/full/x"));
    }

    #[test]
    fn a_full_disk_is_named() {
        let e = File::options().write(true).open("/dev/full").and_then(|mut f| f.write_all(b"x")).unwrap_err();
        assert!(matches!(Error::io("write", Path::new("/c"), e), Error::CacheFull { .. }));
    }
}
