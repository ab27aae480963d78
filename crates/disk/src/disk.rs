//! An open, locked disk.

use std::fmt;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::backend::{Backend, Slice};
use crate::error::DiskError;
use crate::file::{Access, DiskFile, SECTOR};
use crate::format;
use crate::limit::Limiter;
use crate::options::{Cache, DiskConfig, Format};
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::tools::check_size;

/// Takes lines for the VM's user.
pub type Reporter = Arc<dyn Fn(&str) + Send + Sync>;

/// An open, locked disk. The lock goes with it.
pub struct Disk {
    backend: Box<dyn Backend>,
    config: DiskConfig,
    limiter: Mutex<Limiter>,
    trailing: u64,
    /// Device and inode number of its file.
    identity: (u64, u64),
    /// That file is a block device.
    device: bool,
    /// Held while it gets another size.
    growing: Mutex<()>,
    /// A flush failed: what was written before it may be lost although later flushes would succeed (the kernel reports such
    /// an error once). No flush succeeds from then on.
    lost: AtomicBool,
    reporter: OnceLock<Reporter>,
    /// What was told to the reporter, each once: what failed, and the error's number.
    reported: Mutex<Vec<(&'static str, Option<i32>)>>,
    errors: AtomicU32,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("path", &self.config.path)
            .field("bytes", &self.backend.size())
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens and locks a disk: exclusively, or shared with other readers when it is read-only, or with other writers who say so too.
    ///
    /// # Errors
    /// [`DiskError`]: missing, no permission, not a disk, damaged, empty, or in use by another VM.
    pub fn open(config: &DiskConfig) -> Result<Self, DiskError> {
        let access = match (config.read_only, config.shared) {
            (true, _) => Access::Read,
            (false, true) => Access::WriteShared,
            (false, false) => Access::Write,
        };
        let file = DiskFile::open(&config.path, access)?;
        let path = file.path.clone();
        let device = file.device;
        let meta = file.file.metadata().map_err(DiskError::io("open", &path))?;
        let decided = format::decide(&path, &file.head(16)?, config.format);
        let backend: Box<dyn Backend> = match decided.map_err(|problem| DiskError::image(&path, problem))? {
            Format::Raw => Box::new(Raw::new(file)),
            Format::Qcow2 if config.shared => {
                let problem = "is a qcow2 image, which several VMs cannot write to at once: only raw disks are shared";
                return Err(DiskError::image(&path, problem));
            }
            Format::Qcow2 => Box::new(Qcow2::open(file, &config.backing, !config.read_only)?),
        };
        if backend.size() < SECTOR {
            return Err(DiskError::Empty { path });
        }
        Ok(Self {
            trailing: backend.size() % SECTOR,
            identity: (meta.dev(), meta.ino()),
            device,
            growing: Mutex::default(),
            backend,
            limiter: Mutex::new(Limiter::new(config.limits)),
            config: config.clone(),
            lost: AtomicBool::new(false),
            reporter: OnceLock::new(),
            reported: Mutex::default(),
            errors: AtomicU32::new(0),
        })
    }

    /// A line for the user when the size of the image is no multiple of 512 bytes: the rest cannot be seen by the guest.
    pub fn warning(&self) -> Option<String> {
        (self.trailing != 0).then(|| {
            let (path, trailing) = (self.path().display(), self.trailing);
            format!("disk {path}: its last {trailing} bytes are not a whole sector of 512 bytes; the guest does not see them")
        })
    }

    /// What it was opened as.
    pub fn config(&self) -> &DiskConfig {
        &self.config
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.config.path
    }

    /// Device and inode number of the file it was opened from.
    pub fn identity(&self) -> (u64, u64) {
        self.identity
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.backend.format()
    }

    /// What it is made of.
    pub fn backend(&self) -> &dyn Backend {
        &*self.backend
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.backend.size() / SECTOR
    }

    /// Can it only be read?
    pub fn read_only(&self) -> bool {
        self.config.read_only
    }

    /// The file, if byte n of the disk is byte n of the file.
    pub fn plain_file(&self) -> Option<&File> {
        self.backend.plain_file()
    }

    /// The limits on its use.
    pub fn limiter(&self) -> &Mutex<Limiter> {
        &self.limiter
    }

    /// Sets who is told, in a line each, of the host's errors (each kind once: the guest may repeat them at will). Only the first call
    /// has an effect.
    pub fn set_reporter(&self, reporter: Reporter) {
        let _ = self.reporter.set(reporter);
    }

    /// Tells the reporter that the host failed to do `what` for the guest.
    pub fn report(&self, what: &'static str, error: &io::Error) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        const MOST: usize = 8;
        let Some(reporter) = self.reporter.get() else { return };
        let full = matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG));
        // A full file system is said once, whatever it was that found no room.
        let key = (if full { "full" } else { what }, error.raw_os_error());
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        if reported.len() >= MOST || reported.contains(&key) {
            return;
        }
        reported.push(key);
        let path = self.path().display();
        if full {
            reporter(&format!(
                "disk {path}: no space is left on its file system: make room; until then the guest is told of I/O errors when it writes"
            ));
        } else {
            reporter(&format!("disk {path}: cannot {what}: {error}; the guest was told of an I/O error"));
        }
    }

    /// Byte offset of `sector` if `bytes` bytes from there are whole sectors of this disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.sectors()).then(|| sector * SECTOR)
    }

    /// Fills `buffers` from byte `offset` on. Returns the bytes read even on error.
    pub fn read(&self, offset: u64, buffers: &[Slice<'_>]) -> (u64, io::Result<()>) {
        self.backend.read(offset, buffers)
    }

    /// Writes `buffers` at byte `offset`.
    ///
    /// # Errors
    /// The host's; part of the data may have been written.
    pub fn write(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.backend.write(offset, buffers)
    }

    /// May a flush be asked for? `Some` has the answer without one: it failed once and fails for ever, or there is nothing to do.
    pub fn flush_unneeded(&self) -> Option<io::Result<()>> {
        if self.lost.load(Ordering::SeqCst) {
            return Some(Err(io::Error::other("an earlier flush failed; data may be lost")));
        }
        (self.read_only() || self.config.cache == Cache::Unsafe).then_some(Ok(()))
    }

    /// A flush that somebody else did ended so.
    pub fn flushed(&self, result: &io::Result<()>) {
        if result.is_err() {
            self.lost.store(true, Ordering::SeqCst);
        }
    }

    /// Makes all completed writes durable. Once it failed it fails for ever.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        if let Some(result) = self.flush_unneeded() {
            return result;
        }
        let result = self.backend.flush();
        self.flushed(&result);
        result
    }

    /// As if a flush had failed.
    #[doc(hidden)]
    pub fn fail_flushes(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// Gives the space of `bytes` bytes at `offset` back to the host; they read as zeroes or as before. A hint.
    ///
    /// # Errors
    /// The host's; none when its file system makes no holes.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        if self.config.discard { self.backend.discard(offset, bytes) } else { Ok(()) }
    }

    /// Zeroes `bytes` bytes at `offset`; gives their space back if `unmap` allows and the host can.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        self.backend.write_zeroes(offset, bytes, unmap && self.config.discard)
    }

    /// Makes it `bytes` bytes long while it is in use; the new size is safe on the host's disk on return. Returns its sectors.
    ///
    /// # Errors
    /// [`DiskError`]: it is read-only or a block device, would become shorter, or the host's.
    pub fn grow(&self, bytes: u64) -> Result<u64, DiskError> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let (path, before) = (self.path(), self.backend.size());
        check_size(path, bytes)?;
        if self.read_only() {
            return Err(DiskError::image(path, "is used read-only: it keeps its size"));
        }
        if bytes > before && self.device {
            let problem =
                "is a block device: make it longer where it comes from (lvextend, say), and the guest will see it";
            return Err(DiskError::image(path, problem));
        }
        if bytes < before {
            let problem = format!("has {before} bytes, and a guest uses them: it can only become larger");
            return Err(DiskError::image(path, problem));
        }
        if bytes > before {
            self.backend.resize(bytes).and_then(|()| self.backend.flush()).map_err(DiskError::io("resize", path))?;
        }
        Ok(self.sectors())
    }

    /// Has somebody made the file or device longer? Returns the new size in sectors if so. It never shrinks while in use.
    pub fn look_again(&self) -> Option<u64> {
        let before = self.sectors();
        // By lseek: the sandbox knows no stat that needs no name. Nobody uses the file's position.
        let mut file = self.backend.plain_file()?;
        if file.seek(SeekFrom::End(0)).ok()? / SECTOR <= before {
            return None;
        }
        self.backend.look_again().ok()?;
        Some(self.sectors())
    }
}
