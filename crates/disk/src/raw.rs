//! Raw disks: byte n of the disk is byte n of the file or block device.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Backend, Slice};
use crate::file::DiskFile;
use crate::options::Format;
use crate::space;

/// Pieces of memory that one `preadv` or `pwritev` takes.
const MAX_PIECES: usize = libc::UIO_MAXIOV as usize;

/// A raw file or block device.
#[derive(Debug)]
pub struct Raw {
    file: File,
    /// Keeps the lock. A file that io_uring was given is let go some time after the process has ended: the lock must not wait for that.
    _lock: Option<File>,
    len: AtomicU64,
}

impl Raw {
    /// From an open file.
    pub fn new(file: DiskFile) -> Self {
        let len = AtomicU64::new(file.len);
        // SAFETY: only asks how it was opened.
        let mode = unsafe { libc::fcntl(file.file.as_raw_fd(), libc::F_GETFL) } & libc::O_ACCMODE;
        let again = format!("/proc/self/fd/{}", file.file.as_raw_fd());
        match OpenOptions::new().read(true).write(mode == libc::O_RDWR).open(again) {
            Ok(again) => Self { file: again, _lock: Some(file.file), len },
            // Without /proc.
            Err(_) => Self { file: file.file, _lock: None, len },
        }
    }

    fn transfer(&self, offset: u64, buffers: &[Slice<'_>], read: bool) -> (u64, io::Result<()>) {
        let mut done = 0u64;
        let mut iovecs: Vec<libc::iovec> = iovecs(buffers);
        let mut rest = iovecs.as_mut_slice();
        while !rest.is_empty() {
            let count = rest.len().min(MAX_PIECES) as libc::c_int;
            let at = offset.saturating_add(done) as libc::off_t;
            // SAFETY: the iovecs point to the memory of `buffers`, which stays mapped; the kernel copies at most their lengths. The
            // memory may be a guest's, which changes it at any time; nobody holds references into it.
            let n = unsafe {
                if read {
                    libc::preadv(self.file.as_raw_fd(), rest.as_ptr(), count, at)
                } else {
                    libc::pwritev(self.file.as_raw_fd(), rest.as_ptr(), count, at)
                }
            };
            match n {
                1.. => {
                    done = done.saturating_add(n as u64);
                    rest = advance(rest, n as usize);
                }
                // The file was truncated under us, or the device ended.
                0 => return (done, Err(io::ErrorKind::UnexpectedEof.into())),
                _ => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error => return (done, Err(error)),
                },
            }
        }
        (done, Ok(()))
    }
}

/// The host addresses of `buffers`, for as long as their memory is mapped.
pub fn iovecs(buffers: &[Slice<'_>]) -> Vec<libc::iovec> {
    buffers
        .iter()
        .filter(|piece| !piece.is_empty())
        .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() })
        .collect()
}

/// Leaves away the first `n` bytes.
pub fn advance(mut iovecs: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    while let Some(first) = iovecs.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.wrapping_byte_add(n);
            first.iov_len -= n;
            return iovecs;
        }
        n -= first.iov_len;
        iovecs = iovecs.split_at_mut(1).1;
    }
    iovecs
}

impl Backend for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn size(&self) -> u64 {
        self.len.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, buffers: &[Slice<'_>]) -> (u64, io::Result<()>) {
        self.transfer(offset, buffers, true)
    }

    fn write(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        self.transfer(offset, buffers, false).1
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        space::discard(&self.file, offset, bytes)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        space::zero(&self.file, offset, bytes, unmap)
    }

    fn look_again(&self) -> io::Result<u64> {
        let len = (&self.file).seek(SeekFrom::End(0))?;
        self.len.store(len, Ordering::SeqCst);
        Ok(len)
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)?;
        self.len.store(bytes, Ordering::SeqCst);
        Ok(())
    }

    fn plain_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
