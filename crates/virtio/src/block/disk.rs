//! The host's side of a disk: a raw image file or a block device, locked against other VMs.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::buffers::Buffers;
use crate::device::Reporter;

/// Bytes of a sector: the unit of every address in virtio-blk, whatever the logical block size.
pub const SECTOR: u64 = 512;

/// Pieces of memory that one `preadv` or `pwritev` takes.
const MAX_PIECES: usize = 1024;
/// Zeroes to write where the file system cannot make them itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why a disk cannot be used. Each is one line that names the file and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// It cannot be opened.
    #[error("cannot open disk {path}: {source}{hint}")]
    Open {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
        /// What to do about it, or nothing.
        hint: &'static str,
    },
    /// It is no disk.
    #[error("{path} is {what}, not a disk image: give a raw image file or a block device")]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It holds not even one sector.
    #[error(
        "disk {path} is smaller than one sector (512 bytes): create it with the size you want, for example: truncate -s 1G {path}"
    )]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Another process holds the lock.
    #[error("disk {path} is in use by another VM: stop that VM{or_share}")]
    InUse {
        /// The file.
        path: PathBuf,
        /// The other remedy.
        or_share: &'static str,
    },
    /// The file system cannot lock.
    #[error("cannot lock disk {path} ({source}): copy it to a file system that has locks")]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// An open, locked disk. The lock goes with it.
pub struct Disk {
    file: File,
    path: PathBuf,
    sectors: u64,
    read_only: bool,
    trailing: u64,
    /// A flush failed: what was written before it may be lost although later flushes would succeed (the kernel reports such
    /// an error once). No flush succeeds from then on.
    lost: AtomicBool,
    /// The file system makes no holes; do not ask again.
    no_holes: AtomicBool,
    reporter: OnceLock<Reporter>,
    /// Errors told to the reporter.
    reported: AtomicU32,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk").field("path", &self.path).field("sectors", &self.sectors).finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens and locks a raw image or block device: exclusively, or shared with other readers when `read_only`.
    ///
    /// # Errors
    /// [`DiskError`]: missing, no permission, not a disk, empty, or in use by another VM.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, DiskError> {
        let path = path.to_path_buf();
        // O_NONBLOCK: opening a FIFO must not wait for its other end; it has no effect on files and disks.
        let file = match OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_NONBLOCK).open(&path) {
            Ok(file) => file,
            Err(source) if path.is_dir() && source.raw_os_error() == Some(libc::EISDIR) => {
                return Err(DiskError::Kind { path, what: "a directory" });
            }
            Err(source) => {
                let hint = match source.kind() {
                    io::ErrorKind::NotFound => "; check the path",
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem if !read_only => {
                        "; make it writable, or attach it read-only (,ro)"
                    }
                    _ => "",
                };
                return Err(DiskError::Open { path, source, hint });
            }
        };
        let fail = |source| DiskError::Open { path: path.clone(), source, hint: "" };
        let kind = file.metadata().map_err(fail)?.file_type();
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
        lock(&file, &path, read_only)?;
        let bytes = (&file).seek(SeekFrom::End(0)).map_err(fail)?;
        if bytes < SECTOR {
            return Err(DiskError::Empty { path });
        }
        Ok(Self {
            file,
            path,
            sectors: bytes / SECTOR,
            read_only,
            trailing: bytes % SECTOR,
            lost: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
            reporter: OnceLock::new(),
            reported: AtomicU32::new(0),
        })
    }

    /// A line for the user when the size of the image is no multiple of 512 bytes: the rest cannot be seen by the guest.
    pub fn warning(&self) -> Option<String> {
        (self.trailing != 0).then(|| {
            let (path, trailing) = (self.path.display(), self.trailing);
            format!("disk {path}: its last {trailing} bytes are not a whole sector of 512 bytes; the guest does not see them")
        })
    }

    /// The file it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Can it only be read?
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Sets who is told, in a line each, of the host's errors (the first few: the guest may repeat them at will). Only the first call
    /// has an effect.
    pub fn set_reporter(&self, reporter: Reporter) {
        let _ = self.reporter.set(reporter);
    }

    /// Tells the reporter that the host failed to do `what` for the guest.
    pub(super) fn report(&self, what: &str, error: &io::Error) {
        const MOST: u32 = 8;
        if let Some(reporter) = self.reporter.get()
            && self.reported.load(Ordering::Relaxed) < MOST
        {
            self.reported.fetch_add(1, Ordering::Relaxed);
            reporter(&format!(
                "disk {}: cannot {what}: {error}; the guest was told of an I/O error",
                self.path.display()
            ));
        }
    }

    /// Byte offset of `sector` if `bytes` bytes from there are whole sectors of this disk.
    pub fn range(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    /// Fills `buffers` from byte `offset` on and tells the code tracker. Returns the bytes read even on error.
    pub fn read(&self, offset: u64, buffers: Buffers<'_>) -> (u32, io::Result<()>) {
        self.transfer(offset, buffers, true)
    }

    /// Writes `buffers` at byte `offset`.
    ///
    /// # Errors
    /// The host's; part of the data may have been written.
    pub fn write(&self, offset: u64, buffers: Buffers<'_>) -> io::Result<()> {
        self.transfer(offset, buffers, false).1
    }

    fn transfer(&self, mut offset: u64, mut buffers: Buffers<'_>, read: bool) -> (u32, io::Result<()>) {
        let mut done = 0u32;
        while !buffers.is_empty() {
            let iovecs = buffers.iovecs(MAX_PIECES);
            let (fd, count, at) = (self.file.as_raw_fd(), iovecs.len() as libc::c_int, offset as libc::off_t);
            // SAFETY: the iovecs point to guest RAM, which `buffers` keeps mapped; the kernel copies at most their lengths. The
            // memory is not Rust's: the guest may change it at any time, and nobody holds references into it.
            let n = unsafe {
                if read {
                    libc::preadv(fd, iovecs.as_ptr(), count, at)
                } else {
                    libc::pwritev(fd, iovecs.as_ptr(), count, at)
                }
            };
            match n {
                1.. => {}
                // The file was truncated under us, or the device ended.
                0 => return (done, Err(io::ErrorKind::UnexpectedEof.into())),
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return (done, Err(e)),
                },
            }
            let n = u32::try_from(n).unwrap_or(u32::MAX).min(buffers.len());
            if read {
                buffers.written(n);
            }
            done = done.saturating_add(n);
            offset = offset.saturating_add(n.into());
            let _ = buffers.take_front(n);
        }
        (done, Ok(()))
    }

    /// Makes all completed writes durable (fdatasync). Once it failed it fails for ever.
    ///
    /// # Errors
    /// The host's.
    pub fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier flush failed; data may be lost"));
        }
        if self.read_only {
            return Ok(());
        }
        self.file.sync_data().inspect_err(|_| self.lost.store(true, Ordering::SeqCst))
    }

    /// As if a flush had failed.
    #[cfg(test)]
    pub(super) fn fail_flushes(&self) {
        self.lost.store(true, Ordering::SeqCst);
    }

    /// Gives the space of `bytes` bytes at `offset` back to the host; they read as zeroes or as before. A hint.
    ///
    /// # Errors
    /// The host's; none when its file system makes no holes.
    pub fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        match self.punch(offset, bytes) {
            Some(result) => result,
            None => Ok(()),
        }
    }

    /// Zeroes `bytes` bytes at `offset`; gives their space back if `unmap` allows and the host can.
    ///
    /// # Errors
    /// The host's.
    pub fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        if unmap && let Some(result) = self.punch(offset, bytes) {
            return result;
        }
        match self.fallocate(libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes) {
            Err(e) if unsupported(&e) => self.write_zero_data(offset, bytes),
            result => result,
        }
    }

    /// Makes a hole; `None` when the file system cannot.
    fn punch(&self, offset: u64, bytes: u64) -> Option<io::Result<()>> {
        if self.no_holes.load(Ordering::Relaxed) {
            return None;
        }
        match self.fallocate(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes) {
            Err(e) if unsupported(&e) => {
                self.no_holes.store(true, Ordering::Relaxed);
                None
            }
            result => Some(result),
        }
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
        if bytes == 0 {
            return Ok(());
        }
        let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes)) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        loop {
            // SAFETY: no memory is passed.
            if unsafe { libc::fallocate(self.file.as_raw_fd(), mode, offset, bytes) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    fn write_zero_data(&self, mut offset: u64, mut bytes: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        while bytes > 0 {
            let n = bytes.min(ZEROES.len() as u64);
            self.file.write_all_at(ZEROES.get(..n as usize).unwrap_or_default(), offset)?;
            offset = offset.saturating_add(n);
            bytes -= n;
        }
        Ok(())
    }
}

fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

/// Locks the whole file: an open-file-description lock, which unlike a classic POSIX lock belongs to this opening alone, so two
/// VMs of one process exclude each other too.
fn lock(file: &File, path: &Path, read_only: bool) -> Result<(), DiskError> {
    // SAFETY: `flock` is plain data, for which zeroes are valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = (if read_only { libc::F_RDLCK } else { libc::F_WRLCK }) as libc::c_short;
    range.l_whence = libc::SEEK_SET as libc::c_short;
    loop {
        // SAFETY: `range` is a valid `flock` for the duration of the call.
        let mut failed = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } != 0;
        if failed && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
            // A kernel without open-file-description locks.
            let how = (if read_only { libc::LOCK_SH } else { libc::LOCK_EX }) | libc::LOCK_NB;
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
                let or_share = if read_only { "" } else { ", or attach the disk read-only (,ro) to both" };
                return Err(DiskError::InUse { path, or_share });
            }
            _ => return Err(DiskError::Lock { path, source }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn image(bytes: usize) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&vec![0xaa; bytes]).unwrap();
        file
    }

    #[test]
    fn sizes_and_ranges() {
        let file = image(1025);
        let disk = Disk::open(file.path(), false).unwrap();
        assert_eq!(disk.sectors(), 2);
        assert!(disk.warning().unwrap().contains("1 bytes"));
        assert_eq!(disk.range(1, 512), Some(512));
        assert_eq!(disk.range(2, 0), Some(1024));
        assert_eq!(disk.range(1, 1024), None);
        assert_eq!(disk.range(0, 511), None);
        assert_eq!(disk.range(u64::MAX, 512), None);
        assert_eq!(disk.range(u64::MAX, 0), None);
        assert!(matches!(Disk::open(image(511).path(), true), Err(DiskError::Empty { .. })));
        assert!(Disk::open(image(512).path(), true).unwrap().warning().is_none());
    }

    #[test]
    fn not_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        for read_only in [false, true] {
            let error = Disk::open(dir.path(), read_only).unwrap_err();
            assert!(matches!(error, DiskError::Kind { what: "a directory", .. }), "{error}");
            assert!(matches!(Disk::open(Path::new("/dev/zero"), read_only), Err(DiskError::Kind { .. })));
        }
        let error = Disk::open(&dir.path().join("none"), false).unwrap_err().to_string();
        assert!(error.contains("none") && error.contains("check the path"), "{error}");
    }

    #[test]
    fn one_writer_or_many_readers() {
        let file = image(4096);
        let writer = Disk::open(file.path(), false).unwrap();
        for read_only in [false, true] {
            let error = Disk::open(file.path(), read_only).unwrap_err();
            assert!(matches!(error, DiskError::InUse { .. }));
            assert!(error.to_string().contains("in use by another VM"));
        }
        drop(writer);
        let _first = Disk::open(file.path(), true).unwrap();
        let _second = Disk::open(file.path(), true).unwrap();
        assert!(matches!(Disk::open(file.path(), false), Err(DiskError::InUse { .. })));
    }

    #[test]
    fn zeroes_and_holes() {
        let file = image(1 << 20);
        let disk = Disk::open(file.path(), false).unwrap();
        disk.write_zeroes(512, 512, false).unwrap();
        disk.write_zeroes(4096, 8192, true).unwrap();
        disk.write_zero_data(1 << 16, 200 << 10).unwrap();
        disk.discard(512 << 10, 4096).unwrap();
        disk.flush().unwrap();
        let data = std::fs::read(file.path()).unwrap();
        assert_eq!(data.len(), 1 << 20);
        let zero = |range: std::ops::Range<usize>| data[range].iter().all(|b| *b == 0);
        assert!(zero(512..1024) && zero(4096..12288) && zero(1 << 16..(1 << 16) + (200 << 10)));
        assert!(
            data[511] == 0xaa && data[1024] == 0xaa && data[12288] == 0xaa && data[(1 << 16) + (200 << 10)] == 0xaa
        );
    }
}
