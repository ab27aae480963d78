//! Why a VM could not be made or run.

use std::path::Path;

/// An error with one line for the user: it names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Something given by the user cannot be used.
    #[error("{0}")]
    Input(String),
    /// The host refuses something.
    #[error("{0}")]
    Host(String),
    /// The engine refuses something.
    #[error("{0}")]
    Engine(String),
}

impl Error {
    /// An input error about the file `path`, which plays the role `what`.
    pub(crate) fn file(what: &str, path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::Input(format!("{what} {}: {problem}", path.display()))
    }

    /// What is to be written to, opened without waiting for who reads a pipe, does not open.
    pub(crate) fn output(what: &str, path: &Path, error: std::io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENXIO) => Self::file(what, path, "is a pipe that nobody reads: start its reader first"),
            _ => Self::file(what, path, error),
        }
    }
}
