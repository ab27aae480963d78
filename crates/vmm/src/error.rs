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
}
