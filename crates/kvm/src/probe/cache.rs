//! What the probe found, kept until the host boots again or gets another `/dev/kvm`.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::Unusable;
use crate::host::DEVICE;

/// How long it is believed that a guest does not come back: finding out takes seconds, and the host may just have been busy.
const SILENCE_HOLDS: Duration = Duration::from_secs(600);

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

/// Where doubt is noted in an answer that was kept. Nobody reads what is in there, only whether something is.
fn doubt_path(answer: &Path) -> PathBuf {
    answer.with_extension("doubt")
}

/// What notes that a kept answer proved wrong: an open file, because a monitor that has confined itself opens and removes none.
#[derive(Debug)]
pub struct Doubt(Option<File>);

impl Doubt {
    /// To be made while files can still be opened. Where there is no place for it, nothing was kept either.
    pub fn ready() -> Self {
        Self(path().and_then(|path| Self::at(&path)))
    }

    fn at(answer: &Path) -> Option<File> {
        File::options().create(true).append(true).open(doubt_path(answer)).ok()
    }

    /// The answer is not believed any more: who comes next looks anew.
    pub fn raise(&self) {
        if let Some(mut file) = self.0.as_ref() {
            // What cannot be noted leads to the same error again, nothing worse.
            let _ = file.write_all(b"1");
        }
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
    load_from(&path()?, key)
}

fn load_from(path: &Path, key: &Key) -> Option<Result<(), Unusable>> {
    let doubted = std::fs::metadata(doubt_path(path)).is_ok_and(|doubt| doubt.len() > 0);
    // A clock that was set back makes it no older.
    let age = || std::fs::metadata(path).ok()?.modified().ok()?.elapsed().ok();
    let holds = |verdict: &Result<(), Unusable>| {
        *verdict != Err(Unusable::Silent) || age().is_some_and(|age| age < SILENCE_HOLDS)
    };
    read(&std::fs::read(path).ok()?, key).filter(|verdict| !doubted && holds(verdict))
}

fn read(bytes: &[u8], key: &Key) -> Option<Result<(), Unusable>> {
    let entry: Entry = serde_json::from_slice(bytes).ok()?;
    (entry.key == *key).then_some(entry.verdict)
}

/// Keeps an answer; a cache that cannot be written costs milliseconds at the next start, nothing more.
pub fn store(key: &Key, verdict: &Result<(), Unusable>) {
    let _ = path().and_then(|path| try_store(&path, &Entry { key: key.clone(), verdict: verdict.clone() }));
}

fn try_store(path: &Path, entry: &Entry) -> Option<()> {
    std::fs::create_dir_all(path.parent()?).ok()?;
    let temporary = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = File::create(&temporary).ok()?;
    let written = file.write_all(&serde_json::to_vec(entry).ok()?);
    if written.and_then(|()| std::fs::rename(&temporary, path)).is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    // Emptied, not removed: monitors that run hold it open.
    if let Ok(doubt) = File::options().write(true).open(doubt_path(path)) {
        let _ = doubt.set_len(0);
    }
    Some(())
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

    #[test]
    fn an_answer_in_doubt_is_not_believed_until_there_is_a_new_one() {
        let dir = std::env::temp_dir().join(format!("kvm-doubt-{}", std::process::id()));
        let path = dir.join("answer.json");
        let key = Key { boot: "b".into(), device: (1, 2, 3), version: "v".into() };
        let entry = Entry { key: key.clone(), verdict: Ok(()) };
        try_store(&path, &entry).unwrap();
        let doubt = Doubt(Doubt::at(&path));
        assert_eq!(load_from(&path, &key), Some(Ok(())));
        doubt.raise();
        assert_eq!(load_from(&path, &key), None);
        try_store(&path, &entry).unwrap();
        assert_eq!(load_from(&path, &key), Some(Ok(())));
        // The monitor that was open all the time may doubt the new one as well.
        doubt.raise();
        assert_eq!(load_from(&path, &key), None);
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn that_a_guest_does_not_come_back_is_believed_for_a_while() {
        let dir = std::env::temp_dir().join(format!("kvm-silence-{}", std::process::id()));
        let path = dir.join("answer.json");
        let key = Key { boot: "b".into(), device: (1, 2, 3), version: "v".into() };
        for (verdict, holds) in [(Err(Unusable::Silent), false), (Ok(()), true)] {
            try_store(&path, &Entry { key: key.clone(), verdict: verdict.clone() }).unwrap();
            assert_eq!(load_from(&path, &key), Some(verdict));
            let old = std::time::SystemTime::now() - 2 * SILENCE_HOLDS;
            File::options().write(true).open(&path).unwrap().set_modified(old).unwrap();
            assert_eq!(load_from(&path, &key).is_some(), holds);
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
