//! Writer for the `newc` cpio format, the one the kernel unpacks as initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! The archive is not compressed: the guest would have to undo that slowly, while copying is cheap.
//! The output depends on nothing but the entries (no times, no owners, inode numbers counted up), so
//! the same packages give the same bytes.

use std::collections::BTreeSet;

const MAGIC: &str = "070701";
const S_IFDIR: u32 = 0o040_000;
const S_IFCHR: u32 = 0o020_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;

/// An archive being written, in memory: initramfs images are a few megabytes.
#[derive(Debug, Default)]
pub struct Writer {
    out: Vec<u8>,
    inodes: u32,
    dirs: BTreeSet<String>,
}

impl Writer {
    /// An empty archive.
    pub fn new() -> Self {
        Self::default()
    }

    /// A directory with mode 0755, with the directories above it. Repeating one does nothing.
    pub fn dir(&mut self, path: &str) {
        self.parents(path);
        if self.dirs.insert(path.to_owned()) {
            self.entry(path, S_IFDIR | 0o755, 2, (0, 0), &[]);
        }
    }

    /// A regular file; `mode` holds the permission bits only.
    pub fn file(&mut self, path: &str, mode: u32, data: &[u8]) {
        self.parents(path);
        self.entry(path, S_IFREG | (mode & 0o7777), 1, (0, 0), data);
    }

    /// A symbolic link.
    pub fn symlink(&mut self, path: &str, target: &str) {
        self.parents(path);
        self.entry(path, S_IFLNK | 0o777, 1, (0, 0), target.as_bytes());
    }

    /// A character device node with mode 0600.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, S_IFCHR | 0o600, 1, (major, minor), &[]);
    }

    /// Ends the archive and returns it, its length a multiple of 512.
    pub fn finish(mut self) -> Vec<u8> {
        self.inodes = 0;
        self.entry("TRAILER!!!", 0, 1, (0, 0), &[]);
        self.out.resize(self.out.len().next_multiple_of(512), 0);
        self.out
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, rdev: (u32, u32), data: &[u8]) {
        self.inodes += 1;
        let size = u32::try_from(data.len()).expect("an entry we make is smaller than 4 GiB");
        let name_size = path.len() as u32 + 1;
        self.out.extend_from_slice(MAGIC.as_bytes());
        // ino, mode, uid, gid, nlink, mtime, size, dev, rdev, name size, checksum
        for v in [self.inodes, mode, 0, 0, links, 0, size, 0, 0, rdev.0, rdev.1, name_size, 0] {
            self.out.extend_from_slice(format!("{v:08x}").as_bytes());
        }
        self.out.extend_from_slice(path.as_bytes());
        self.out.push(0);
        self.pad();
        self.out.extend_from_slice(data);
        self.pad();
    }

    fn pad(&mut self) {
        self.out.resize(self.out.len().next_multiple_of(4), 0);
    }
}

/// Reads an archive back: path, mode, data. Panics on malformed input, so for tests only.
#[cfg(test)]
pub(crate) fn read(mut data: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut all = Vec::new();
    loop {
        assert_eq!(&data[..6], MAGIC.as_bytes());
        let field = |i: usize| {
            let text = std::str::from_utf8(&data[6 + 8 * i..][..8]).unwrap();
            u32::from_str_radix(text, 16).unwrap() as usize
        };
        let (mode, size, name_size) = (field(1), field(6), field(11));
        let name = String::from_utf8(data[110..110 + name_size - 1].to_vec()).unwrap();
        let start = (110 + name_size).next_multiple_of(4);
        if name == "TRAILER!!!" {
            assert!(data[start..].iter().all(|b| *b == 0));
            return all;
        }
        all.push((name, mode as u32, data[start..start + size].to_vec()));
        data = &data[start + size.next_multiple_of(4)..];
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn entries_and_parents() {
        let mut w = Writer::new();
        w.file("a/b/c", 0o755, b"hello");
        w.symlink("a/l", "b/c");
        w.char_device("dev/console", 5, 1);
        w.dir("a");
        let all = read(&w.finish());
        let names: Vec<_> = all.iter().map(|(n, m, _)| (n.as_str(), *m)).collect();
        assert_eq!(
            names,
            [
                ("a", 0o040_755),
                ("a/b", 0o040_755),
                ("a/b/c", 0o100_755),
                ("a/l", 0o120_777),
                ("dev", 0o040_755),
                ("dev/console", 0o020_600),
            ]
        );
        assert_eq!(all[2].2, b"hello");
        assert_eq!(all[3].2, b"b/c");
    }

    proptest! {
        #[test]
        fn any_content_survives(files in proptest::collection::vec(
            ("[a-z]{1,9}", proptest::collection::vec(any::<u8>(), 0..64)), 0..8)) {
            let mut w = Writer::new();
            for (name, data) in &files {
                w.file(name, 0o644, data);
            }
            let out = w.finish();
            prop_assert_eq!(out.len() % 512, 0);
            let back: Vec<_> = read(&out).into_iter().map(|(n, _, d)| (n, d)).collect();
            prop_assert_eq!(back, files);
        }
    }
}
