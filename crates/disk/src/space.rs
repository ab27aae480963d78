//! Zeroes and holes in files and block devices.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// Zeroes to write where the file system cannot make them itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Gives the space of a range back to the host. A hint: nothing happens where the file system makes no holes.
pub(crate) fn discard(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    match fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, bytes) {
        Err(error) if unsupported(&error) => Ok(()),
        result => result,
    }
}

/// Zeroes a range inside the file; gives its space back if `unmap` allows and the host can.
pub(crate) fn zero(file: &File, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
    let mut modes = vec![libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE];
    if unmap {
        modes.insert(0, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE);
    }
    for mode in modes {
        match fallocate(file, mode, offset, bytes) {
            Err(error) if unsupported(&error) => {}
            result => return result,
        }
    }
    write_zeroes(file, offset, bytes)
}

pub(crate) fn unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

fn fallocate(file: &File, mode: libc::c_int, offset: u64, bytes: u64) -> io::Result<()> {
    if bytes == 0 {
        return Ok(());
    }
    let (Ok(offset), Ok(bytes)) = (libc::off_t::try_from(offset), libc::off_t::try_from(bytes)) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    loop {
        // SAFETY: no memory is passed.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, bytes) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

pub(crate) fn write_zeroes(file: &File, mut offset: u64, mut bytes: u64) -> io::Result<()> {
    while bytes > 0 {
        let n = bytes.min(ZEROES.len() as u64);
        file.write_all_at(ZEROES.get(..n as usize).unwrap_or_default(), offset)?;
        offset = offset.saturating_add(n);
        bytes -= n;
    }
    Ok(())
}
