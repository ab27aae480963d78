//! Why a disk cannot be used, made or changed.

use std::io;
use std::path::{Path, PathBuf};

/// Each is one line that names the file and the remedy.
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
    #[error("{path} is {what}, not a disk image: give an image file or a block device")]
    Kind {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// It holds not even one sector.
    #[error(
        "disk {path} is smaller than one sector (512 bytes): create it with the size you want, for example: tightrope disk create {path} 1G"
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
    /// Its contents are not what is needed; the text goes on after the file's name.
    #[error("disk {path} {problem}")]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },
    /// Something could not be done to it.
    #[error("cannot {action} disk {path}: {source}")]
    Io {
        /// What was to be done.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl DiskError {
    pub(crate) fn image(path: &Path, problem: impl Into<String>) -> Self {
        Self::Image { path: path.to_path_buf(), problem: problem.into() }
    }

    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| {
            let full = matches!(source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT));
            let source = if full { io::Error::other("no space is left on its file system: make room") } else { source };
            Self::Io { action, path, source }
        }
    }
}
