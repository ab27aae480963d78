//! A disk's file: opened without being fooled by what it is, and locked against other VMs.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::DiskError;

/// Bytes of a sector: the unit of every address in virtio-blk, whatever the logical block size.
pub const SECTOR: u64 = 512;

/// How a disk is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only read; others may read it too.
    Read,
    /// Read and written; nobody else may use it.
    Write,
    /// Read and written, by others who say the same as well.
    WriteShared,
}

impl Access {
    /// May it be written?
    pub fn writable(self) -> bool {
        self != Self::Read
    }

    fn exclusive(self) -> bool {
        self == Self::Write
    }
}

/// An open, locked file or block device. The lock goes with it.
#[derive(Debug)]
pub struct DiskFile {
    /// The open file.
    pub file: File,
    /// Its name as the user gave it.
    pub path: PathBuf,
    /// Bytes.
    pub len: u64,
    /// Is it a block device?
    pub device: bool,
    /// Device and inode number, which tell files apart.
    pub identity: (u64, u64),
}

impl DiskFile {
    /// Opens and locks `path`.
    ///
    /// # Errors
    /// [`DiskError`]: missing, no permission, neither a file nor a block device, or in use.
    pub fn open(path: &Path, access: Access) -> Result<Self, DiskError> {
        // O_NONBLOCK: opening a FIFO must not wait for its other end; it has no effect on files and disks.
        let mut options = OpenOptions::new();
        options.read(true).write(access.writable()).custom_flags(libc::O_NONBLOCK);
        let file = options.open(path).map_err(|source| open_error(path, access, source))?;
        Self::new(file, path, access)
    }

    /// Opens `path` for a look at it while somebody else may be writing to it.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn open_unlocked(path: &Path) -> Result<Self, DiskError> {
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        Self::with_lock(file.map_err(|source| open_error(path, Access::Read, source))?, path, None)
    }

    /// Checks and locks a file that is open already.
    ///
    /// # Errors
    /// As for [`Self::open`].
    pub fn new(file: File, path: &Path, access: Access) -> Result<Self, DiskError> {
        Self::with_lock(file, path, Some(access))
    }

    fn with_lock(file: File, path: &Path, access: Option<Access>) -> Result<Self, DiskError> {
        let path = path.to_path_buf();
        let fail = |source| DiskError::Open { path: path.clone(), source, hint: "" };
        let meta = file.metadata().map_err(fail)?;
        let kind = meta.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() {
                "a directory"
            } else if kind.is_fifo() {
                "a pipe"
            } else {
                "a device that is no disk"
            };
            return Err(DiskError::Kind { path, what });
        }
        if let Some(access) = access {
            lock(&file, &path, access)?;
        }
        let len = (&file).seek(SeekFrom::End(0)).map_err(fail)?;
        Ok(Self { device: kind.is_block_device(), identity: (meta.dev(), meta.ino()), file, path, len })
    }

    /// Its first bytes, at most `most`.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn head(&self, most: usize) -> Result<Vec<u8>, DiskError> {
        let mut bytes = vec![0; most];
        let read = read_at(&self.file, &mut bytes, 0).map_err(DiskError::io("read", &self.path))?;
        bytes.truncate(read);
        Ok(bytes)
    }
}

/// Reads until `buffer` is full or the file ends; returns the bytes read.
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

fn open_error(path: &Path, access: Access, source: io::Error) -> DiskError {
    let path = path.to_path_buf();
    if source.raw_os_error() == Some(libc::EISDIR) {
        return DiskError::Kind { path, what: "a directory" };
    }
    if source.raw_os_error() == Some(libc::ENXIO) {
        return DiskError::Kind { path, what: "a socket, or a pipe or device without its other end" };
    }
    let hint = match source.kind() {
        io::ErrorKind::NotFound => "; check the path, or make it: tightrope disk create",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if access.writable() => {
            "; make it writable, or attach it read-only (,ro)"
        }
        _ => "",
    };
    DiskError::Open { path, source, hint }
}

/// Locks the whole file: an open-file-description lock, which unlike a classic POSIX lock belongs to this opening alone, so two
/// VMs of one process exclude each other too.
fn lock(file: &File, path: &Path, access: Access) -> Result<(), DiskError> {
    // SAFETY: `flock` is plain data, for which zeroes are valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = (if access.exclusive() { libc::F_WRLCK } else { libc::F_RDLCK }) as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    loop {
        // SAFETY: `range` is a valid `flock` for the duration of the call.
        let mut failed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } != 0;
        if failed && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // A kernel without open-file-description locks.
            let how = (if access.exclusive() { libc::LOCK_EX } else { libc::LOCK_SH }) | libc::LOCK_NB;
            // SAFETY: no memory is passed.
            failed = unsafe { libc::flock(file.as_raw_fd(), how) } != 0;
        }
        if !failed {
            return Ok(());
        }
        let (path, source) = (path.to_path_buf(), io::Error::last_os_error());
        match source.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN | libc::EACCES) => {
                let or_share = if access.exclusive() { ", or attach the disk read-only (,ro) to both" } else { "" };
                return Err(DiskError::InUse { path, or_share });
            }
            _ => return Err(DiskError::Lock { path, source }),
        }
    }
}
