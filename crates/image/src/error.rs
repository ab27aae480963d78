//! What can go wrong on the way to a guest, each with its remedy.
//!
//! The command prints the message of one of these as the only line a user sees, so each names
//! the thing (URL, path, package) and says what to do about it. URLs are shown without the
//! credentials they may carry.

use std::io;
use std::path::{Path, PathBuf};

/// Everything this crate fails with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The host names no Debian mirror and neither does the user.
    #[error(
        "no Debian package mirror: {looked}; name one with --mirror URL or TIGHTROPE_MIRROR=URL, \
         for example http://mirror.example/debian"
    )]
    NoMirror {
        /// What was looked at and found wanting.
        looked: String,
    },
    /// A mirror or proxy setting that cannot be used.
    #[error("unusable {what} {value:?}: {reason}; give an http:// or https:// URL")]
    BadUrl {
        /// Which setting.
        what: &'static str,
        /// Its value, credentials removed.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// A configuration file that cannot be read or understood.
    #[error("cannot use {}: {reason}; correct or remove that file", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong in it.
        reason: String,
    },
    /// The mirror could not be reached, or the connection broke again and again.
    #[error(
        "cannot fetch {url}: {reason}; check the network and the proxy settings, or name another \
         mirror with --mirror URL"
    )]
    Network {
        /// What was asked for.
        url: String,
        /// The last failure.
        reason: String,
    },
    /// The network is needed but was forbidden by the caller.
    #[error("{what} is not in the cache and the network may not be used; run once without --offline")]
    Offline {
        /// What would have been fetched.
        what: String,
    },
    /// 404 or 410.
    #[error("{url} does not exist on this mirror; name another with --mirror URL")]
    NotFound {
        /// What was asked for.
        url: String,
    },
    /// Any other refusal by the server or proxy.
    #[error(
        "{url}: the server answered {status}; try again later, check the proxy, or name another mirror with --mirror URL"
    )]
    Http {
        /// What was asked for.
        url: String,
        /// The HTTP status code.
        status: u16,
    },
    /// The server sends more than the signed index (or our bound) allows.
    #[error(
        "{url} is larger than the {limit} bytes expected; the mirror is broken or hostile, name another with --mirror URL"
    )]
    TooLarge {
        /// What was asked for.
        url: String,
        /// The bound, in bytes.
        limit: u64,
    },
    /// Content that does not have the hash the signed index gives.
    #[error(
        "{url}: SHA-256 is not the one the signed index gives; the mirror is out of step or hostile, try again later or name another with --mirror URL"
    )]
    HashMismatch {
        /// What was fetched.
        url: String,
    },
    /// No usable keyring on this host.
    #[error(
        "no keyring to check Debian's signature with ({looked}); install the package \
         debian-archive-keyring, or set TIGHTROPE_KEYRING=FILE"
    )]
    NoKeyring {
        /// The files looked at.
        looked: String,
    },
    /// The release index is not signed by a key we trust.
    #[error(
        "{url}: not signed by a trusted key: {reason}; update the package debian-archive-keyring, set TIGHTROPE_KEYRING=FILE, or name another mirror with --mirror URL"
    )]
    BadSignature {
        /// The index.
        url: String,
        /// What the check found.
        reason: String,
    },
    /// `Valid-Until` of the release index has passed, or its `Date` lies ahead.
    #[error("{url}: {reason}; check this host's clock, or name an up-to-date mirror with --mirror URL")]
    Stale {
        /// The index.
        url: String,
        /// Which date, and what it is.
        reason: String,
    },
    /// An index or archive that does not have the format it should.
    #[error("{what} is malformed: {reason}; try again later or name another mirror with --mirror URL")]
    Malformed {
        /// Which input.
        what: String,
        /// What is wrong.
        reason: String,
    },
    /// A `.deb` or a file in it that cannot be read.
    #[error("{}: not a usable Debian package: {reason}; remove that file and run again", path.display())]
    Deb {
        /// The package file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A package that the suite does not have.
    #[error(
        "suite {suite} has no package {name} for amd64{hint}; choose another suite or another mirror with --mirror URL"
    )]
    NoPackage {
        /// The package.
        name: String,
        /// The suite looked in.
        suite: String,
        /// Names that are nearly the same, as a phrase with a comma in front; often empty.
        hint: String,
    },
    /// A package that cannot be installed.
    #[error("package {package} of suite {suite} cannot be installed: {reason}; leave it out, or choose another suite")]
    Unmet {
        /// The package.
        package: String,
        /// Its suite.
        suite: String,
        /// What it needs or what it conflicts with.
        reason: String,
    },
    /// Not a suite name, or not a package name.
    #[error("{value:?} is not a valid {what}")]
    BadName {
        /// "suite" or "package name".
        what: &'static str,
        /// What was given.
        value: String,
    },
    /// A kernel package without a part that the initramfs cannot do without.
    #[error("{package} carries neither module nor built-in {name}; choose another suite or kernel flavour")]
    NoModule {
        /// The module.
        name: String,
        /// The kernel package.
        package: String,
    },
    /// No place for a cache.
    #[error("no cache directory: neither XDG_CACHE_HOME nor HOME is set to an absolute path; set one of them")]
    NoCacheDir,
    /// No place for images.
    #[error("no directory for images: neither XDG_DATA_HOME nor HOME is set to an absolute path; set one of them")]
    NoDataDir,
    /// No image has this name.
    #[error("there is no image '{name}'{hint}: debian[:SUITE][+PACKAGE…] is a whole Debian, busybox a small one")]
    NoImage {
        /// What was asked for.
        name: String,
        /// Names that are nearly the same, as a phrase; often empty.
        hint: String,
    },
    /// The mirror has no such suite.
    #[error(
        "there is no Debian suite '{suite}' on this mirror{hint}; choose for example trixie or bookworm, or another mirror with --mirror URL"
    )]
    NoSuite {
        /// What was asked for.
        suite: String,
        /// Names that are nearly the same, as a phrase; often empty.
        hint: String,
    },
    /// An image that cannot be removed.
    #[error("image {name} is in use by a running VM; stop that first")]
    ImageInUse {
        /// The image.
        name: String,
    },
    /// Too little space for what is about to be made.
    #[error("an image needs about {needed} MiB at {}, which has {free} MiB free; free some (tightrope prune), or set XDG_DATA_HOME to a directory on another disk", path.display())]
    NoSpace {
        /// Where.
        path: PathBuf,
        /// What is needed, in MiB.
        needed: u64,
        /// What is there, in MiB.
        free: u64,
    },
    /// The guest that makes the disk did not come to its end.
    #[error("the image could not be made: {reason}; what the guest said is in {}", log.display())]
    Build {
        /// What is known.
        reason: String,
        /// The guest's console.
        log: PathBuf,
    },
    /// The file system that holds the cache is full (or over quota).
    #[error("no space left for {}; free some, or set XDG_CACHE_HOME to a directory on another disk", path.display())]
    CacheFull {
        /// The file being written.
        path: PathBuf,
    },
    /// The cache may not be written.
    #[error("cannot write to the cache at {}: {reason}; make it writable, or set XDG_CACHE_HOME to a directory that is", path.display())]
    CacheUnwritable {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        reason: String,
    },
    /// Any other failure of the file system.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An I/O failure on `path`, sorted into full, unwritable, and the rest.
    pub(crate) fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        use io::ErrorKind as K;
        let path = path.to_path_buf();
        match source.kind() {
            K::StorageFull | K::QuotaExceeded => Self::CacheFull { path },
            K::PermissionDenied | K::ReadOnlyFilesystem if op != "read" => {
                Self::CacheUnwritable { path, reason: source.to_string() }
            }
            _ => Self::Io { op, path, source },
        }
    }

    /// A `.deb` that cannot be used.
    pub(crate) fn deb(path: &Path, reason: impl ToString) -> Self {
        Self::Deb { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

/// `url` without a `user:password@` part.
pub(crate) fn redact(url: &str) -> String {
    match url.split_once("://") {
        Some((scheme, rest)) => {
            let (authority, path) = match rest.find('/') {
                Some(i) => rest.split_at(i),
                None => (rest, ""),
            };
            match authority.rsplit_once('@') {
                Some((_, host)) => format!("{scheme}://{host}{path}"),
                None => url.to_owned(),
            }
        }
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_never_reach_a_message() {
        assert_eq!(redact("http://u:p@h:80/d@x"), "http://h:80/d@x");
        assert_eq!(redact("http://h/d"), "http://h/d");
        assert_eq!(redact("nonsense"), "nonsense");
    }

    #[test]
    fn messages_are_one_line() {
        let e = Error::io("write", Path::new("/c"), io::ErrorKind::StorageFull.into());
        assert!(matches!(e, Error::CacheFull { .. }));
        assert!(!e.to_string().contains('\n'), "{e}");
        let e = Error::io("write", Path::new("/c"), io::ErrorKind::PermissionDenied.into());
        assert!(e.to_string().contains("XDG_CACHE_HOME"), "{e}");
    }
}
