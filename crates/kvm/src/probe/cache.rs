//! What the probe found, kept until the host boots again or gets another `/dev/kvm`.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Unusable;
use crate::host::DEVICE;

/// What an answer is good for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Key {
    /// The boot of the host's kernel.
    boot: String,
    /// The device: inode and time of change. A module that is loaded again makes it anew.
    device: (u64, i64, i64),
    /// The version of this program.
    version: String,
}

#[derive(Serialize, Deserialize)]
struct Entry {
    key: Key,
    verdict: Result<(), Unusable>,
}

impl Key {
    /// For this host now; `None` where it does not tell.
    pub fn now() -> Option<Self> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_string();
        let meta = std::fs::metadata(DEVICE).ok()?;
        let device = (meta.ino(), meta.ctime(), meta.ctime_nsec());
        Some(Self { boot, device, version: env!("CARGO_PKG_VERSION").into() })
    }
}

fn path() -> Option<PathBuf> {
    let absolute = |path: &PathBuf| path.is_absolute();
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(absolute)
        .or_else(|| std::env::home_dir().filter(absolute).map(|home| home.join(".cache")))?;
    Some(base.join("tightrope/kvm-probe.json"))
}

/// The answer kept for `key`.
pub fn load(key: &Key) -> Option<Result<(), Unusable>> {
    read(&std::fs::read(path()?).ok()?, key)
}

fn read(bytes: &[u8], key: &Key) -> Option<Result<(), Unusable>> {
    let entry: Entry = serde_json::from_slice(bytes).ok()?;
    (entry.key == *key).then_some(entry.verdict)
}

/// Keeps an answer; a cache that cannot be written costs milliseconds at the next start, nothing more.
pub fn store(key: &Key, verdict: &Result<(), Unusable>) {
    let _ = try_store(&Entry { key: key.clone(), verdict: verdict.clone() });
}

fn try_store(entry: &Entry) -> Option<()> {
    let path = path()?;
    std::fs::create_dir_all(path.parent()?).ok()?;
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = std::fs::File::create(&temporary).ok()?;
    let written = file.write_all(&serde_json::to_vec(entry).ok()?);
    if written.and_then(|()| std::fs::rename(&temporary, &path)).is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    Some(())
}

/// Forgets the answer.
pub fn forget() {
    if let Some(path) = path() {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kept_for_one_boot_and_device() {
        let key = Key { boot: "b".into(), device: (1, 2, 3), version: "v".into() };
        let verdict = Err(Unusable::CannotRun("why".into()));
        let bytes = serde_json::to_vec(&Entry { key: key.clone(), verdict: verdict.clone() }).unwrap();
        assert_eq!(read(&bytes, &key), Some(verdict));
        for other in [
            Key { boot: "c".into(), ..key.clone() },
            Key { device: (1, 2, 4), ..key.clone() },
            Key { version: "w".into(), ..key.clone() },
        ] {
            assert_eq!(read(&bytes, &other), None);
        }
        assert_eq!(read(b"rubbish", &key), None);
    }
}
