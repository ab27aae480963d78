//! The few ways in which this crate names a file of the host. Each begins at a descriptor that lies in the shared directory, and none
//! follows a symbolic link, a mount point or `..`:
//!
//! * one component below a directory ([`open_below`], and the `…at` calls of `namespace`, which never follow their last component);
//! * the file itself that a descriptor holds, by the link that /proc has for it ([`Link`]): the kernel goes to the file, not by a path.

use std::ffi::CStr;
use std::fmt::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::request::Result;

/// How names are resolved: below the directory, through nothing that leads elsewhere.
const RESOLVE: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS)
    .union(ResolveFlags::NO_XDEV);

/// Opens `name`, one component, in `dir`. A symbolic link can only be opened by O_PATH.
pub(crate) fn open_below(dir: impl AsFd, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // The kernel gives up with EAGAIN when it cannot be sure because of a rename elsewhere.
    for _ in 0..64 {
        match rustix::fs::openat2(&dir, name, flags, mode, RESOLVE) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other.map_err(no_more_files),
        }
    }
    Err(Errno::AGAIN)
}

/// Too many files are open here, not in the guest's process.
pub(crate) fn no_more_files(errno: Errno) -> Errno {
    if errno == Errno::MFILE { Errno::NFILE } else { errno }
}

/// Holds `name` in `dir` without opening it.
pub(crate) fn hold_below(dir: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    // NO_SYMLINKS refuses a link even at the end, though nothing would be followed there: it takes a second call then.
    match open_below(&dir, name, OFlags::PATH, Mode::empty()) {
        Err(Errno::LOOP) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
            rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve).map_err(no_more_files)
        }
        other => other,
    }
}

/// What the file is, without following anything.
pub(crate) fn stat(fd: impl AsFd) -> Result<Statx> {
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, mask)
}

/// The name by which /proc knows an open descriptor, as long as it is open.
pub(crate) struct Link<'f> {
    path: String,
    _fd: BorrowedFd<'f>,
}

impl<'f> Link<'f> {
    pub(crate) fn of(fd: BorrowedFd<'f>) -> Self {
        let mut path = String::with_capacity(28);
        let _ = write!(path, "/proc/self/fd/{}", fd.as_raw_fd());
        Self { path, _fd: fd }
    }

    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Opens the file anew. Only for regular files and directories: opening others may block or do things.
    pub(crate) fn open(&self, flags: OFlags) -> Result<OwnedFd> {
        let flags = (flags - OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(CWD, self.path(), flags, Mode::empty()).map_err(no_more_files)
    }

    /// Sets permissions.
    pub(crate) fn chmod(&self, mode: u32) -> Result<()> {
        rustix::fs::chmodat(CWD, self.path(), Mode::from_raw_mode(mode & 0o1777), AtFlags::empty())
    }
}
