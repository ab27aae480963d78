//! The file under a qcow2 image, as the imago library wants it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;

use crate::file::DiskFile;
use crate::space;

/// An open image file. It can be opened by nobody but us: the library gets open files, never names.
#[derive(Debug)]
pub(crate) struct ImageFile {
    file: File,
    path: PathBuf,
    len: AtomicU64,
    /// Held while the file grows.
    growing: Mutex<()>,
    helper: CommonStorageHelper,
    /// The error that all writes end with; 0 for none.
    pub fail_writes: Arc<AtomicI32>,
}

impl ImageFile {
    pub fn new(file: DiskFile) -> Self {
        Self {
            len: AtomicU64::new(file.len),
            file: file.file,
            path: file.path,
            growing: Mutex::new(()),
            helper: CommonStorageHelper::default(),
            fail_writes: Arc::default(),
        }
    }

    fn may_write(&self) -> io::Result<()> {
        match self.fail_writes.load(Ordering::SeqCst) {
            0 => Ok(()),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Makes the file at least `len` bytes long.
    fn grow(&self, len: u64) -> io::Result<()> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        if len > self.len.load(Ordering::SeqCst) {
            self.file.set_len(len)?;
            self.len.fetch_max(len, Ordering::SeqCst);
        }
        Ok(())
    }
}

impl fmt::Display for ImageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

fn offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

impl Storage for ImageFile {
    fn size(&self) -> io::Result<u64> {
        Ok(self.len.load(Ordering::SeqCst))
    }

    unsafe fn pure_readv(&self, mut buffers: IoVectorMut<'_>, mut at: u64) -> io::Result<()> {
        while !buffers.is_empty() {
            // SAFETY: the vectors are used for one call, while `buffers` is borrowed.
            let read = unsafe {
                let iovecs = buffers.as_iovec();
                let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
                libc::preadv(self.file.as_raw_fd(), iovecs.as_ptr(), count, offset(at)?)
            };
            match read {
                0 => {
                    // Behind the end of the file are zeroes: its last cluster need not be whole.
                    buffers.fill(0);
                    return Ok(());
                }
                1.. => {
                    buffers = buffers.split_tail_at(read as u64);
                    at = at.saturating_add(read as u64);
                }
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, mut buffers: IoVector<'_>, mut at: u64) -> io::Result<()> {
        self.may_write()?;
        while !buffers.is_empty() {
            // SAFETY: the vectors are used for one call, while `buffers` is borrowed.
            let written = unsafe {
                let iovecs = buffers.as_iovec();
                let count = iovecs.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
                libc::pwritev(self.file.as_raw_fd(), iovecs.as_ptr(), count, offset(at)?)
            };
            match written {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                1.. => {
                    buffers = buffers.split_tail_at(written as u64);
                    at = at.saturating_add(written as u64);
                    self.len.fetch_max(at, Ordering::SeqCst);
                }
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return Err(error),
                },
            }
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.may_write()?;
        let end = at.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        let len = self.len.load(Ordering::SeqCst);
        if at < len {
            space::zero(&self.file, at, bytes.min(len - at), true)?;
        }
        self.grow(end)
    }

    unsafe fn pure_write_allocated_zeroes(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.may_write()?;
        let end = at.checked_add(bytes).ok_or(io::ErrorKind::InvalidInput)?;
        self.grow(end)?;
        space::zero(&self.file, at, bytes, false)
    }

    unsafe fn pure_discard(&self, at: u64, bytes: u64) -> io::Result<()> {
        self.may_write()?;
        space::discard(&self.file, at, bytes)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new: u64, preallocate: PreallocateMode) -> io::Result<()> {
        if !matches!(preallocate, PreallocateMode::None | PreallocateMode::Zero) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.may_write()?;
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        self.file.set_len(new)?;
        self.len.store(new, Ordering::SeqCst);
        Ok(())
    }
}
