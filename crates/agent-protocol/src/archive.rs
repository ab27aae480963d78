//! Trees of files as a sequence of [`Item`]s, and their unpacking below one name.
//!
//! Not an archive format of the world: those have fields without bounds and more kinds of entries than are wanted. Whoever unpacks does
//! not trust whoever packed: an entry's path has ordinary names only, no symbolic link is ever followed, everything stays below the name
//! that the unpacking end chose itself, and nothing but directories, files and symbolic links is made.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{self as sys, AtFlags, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use crate::frame::{Reader, put_bytes};

/// The longest path of an entry, in bytes.
const MAX_PATH: usize = 4096;
/// Directories in directories.
const MAX_DEPTH: usize = 200;
/// Directories whose owner may not write to them, in one tree: their modes are set at the end.
const MAX_LOCKED: usize = 100_000;
/// Bytes of a file in one piece.
const PIECE: usize = 64 << 10;

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A directory. What is in it follows.
    Directory,
    /// A file. Its content follows.
    File,
    /// A symbolic link to this.
    Symlink(Vec<u8>),
}

/// One entry of a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Permission bits.
    pub mode: u32,
    /// Seconds since 1970 of its last change.
    pub time: i64,
    /// Where, below the top: names with `/` between them; empty for the top itself.
    pub path: Vec<u8>,
}

/// A piece of a tree as it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// An entry starts.
    Entry(Entry),
    /// More of the file that started last.
    Data(Vec<u8>),
}

impl Entry {
    /// As a body.
    pub fn to_body(&self) -> Vec<u8> {
        let (kind, target) = match &self.kind {
            Kind::Directory => (0, &[][..]),
            Kind::File => (1, &[][..]),
            Kind::Symlink(target) => (2, &target[..]),
        };
        let mut body = vec![kind];
        body.extend(self.mode.to_le_bytes());
        body.extend(self.time.to_le_bytes());
        put_bytes(&mut body, &self.path);
        put_bytes(&mut body, target);
        body
    }

    /// From a body.
    pub fn parse(reader: &mut Reader<'_>) -> Option<Self> {
        let kind = reader.u8()?;
        let mode = reader.u32()?;
        let time = i64::from_le_bytes(reader.array()?);
        let path = reader.bytes()?;
        let target = reader.bytes()?;
        let kind = match kind {
            0 if target.is_empty() => Kind::Directory,
            1 if target.is_empty() => Kind::File,
            2 => Kind::Symlink(target),
            _ => return None,
        };
        Some(Self { kind, mode, time, path })
    }
}

fn about(path: &Path, error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Gives `emit` the tree at `top`, a directory before what is in it. Sockets, pipes and devices are left out; returns how many.
///
/// # Errors
/// Something cannot be read (the error names it), or `emit` fails.
pub fn pack(top: &Path, emit: &mut dyn FnMut(Item) -> io::Result<()>) -> io::Result<u64> {
    let mut left_out = 0;
    // Links in the name given are followed; those found are sent.
    let start = std::fs::symlink_metadata(top).map_err(|error| about(top, reason(&error)))?;
    let mut todo = vec![(top.to_path_buf(), Vec::new(), Some(start))];
    while let Some((path, relative, meta)) = todo.pop() {
        let meta = match meta {
            Some(meta) => meta,
            None => match std::fs::symlink_metadata(&path) {
                Ok(meta) => meta,
                // It has gone since its directory was read.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(about(&path, reason(&error))),
            },
        };
        let entry = |kind| {
            let mode = meta.permissions().mode() & 0o7777;
            Item::Entry(Entry { kind, mode, time: meta.mtime(), path: relative.clone() })
        };
        if meta.is_dir() {
            emit(entry(Kind::Directory))?;
            for child in std::fs::read_dir(&path).map_err(|error| about(&path, reason(&error)))? {
                let name = child.map_err(|error| about(&path, reason(&error)))?.file_name();
                let mut below = relative.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend_from_slice(name.as_bytes());
                todo.push((path.join(&name), below, None));
            }
        } else if meta.is_symlink() {
            let target = std::fs::read_link(&path).map_err(|error| about(&path, reason(&error)))?;
            emit(entry(Kind::Symlink(target.into_os_string().into_vec())))?;
        } else if meta.is_file() {
            let mut file = File::open(&path).map_err(|error| about(&path, reason(&error)))?;
            emit(entry(Kind::File))?;
            loop {
                let mut piece = vec![0; PIECE];
                let len = match file.read(&mut piece) {
                    Ok(0) => break,
                    Ok(len) => len,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(about(&path, reason(&error))),
                };
                piece.truncate(len);
                emit(Item::Data(piece))?;
            }
        } else if relative.is_empty() {
            return Err(about(top, "is neither a file nor a directory"));
        } else {
            left_out += 1;
        }
    }
    Ok(left_out)
}

/// An error of the system in words without its number.
pub fn reason(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "no such file or directory".into(),
        io::ErrorKind::PermissionDenied => "permission denied".into(),
        io::ErrorKind::NotADirectory => "not a directory".into(),
        io::ErrorKind::IsADirectory => "is a directory".into(),
        io::ErrorKind::StorageFull => "no space left".into(),
        io::ErrorKind::ReadOnlyFilesystem => "the file system is read-only".into(),
        _ => crate::without_numbers(&error.to_string()),
    }
}

/// Where a copy named `name` goes when the user says `destination`: into it if it is a directory, else as it.
///
/// # Errors
/// There is no such place.
pub fn place(destination: &Path, name: &OsStr) -> io::Result<(PathBuf, std::ffi::OsString)> {
    if destination.is_dir() {
        return Ok((destination.to_path_buf(), name.to_owned()));
    }
    if destination.as_os_str().as_bytes().ends_with(b"/") {
        return Err(about(destination, "no such directory"));
    }
    let name = destination.file_name().ok_or_else(|| about(destination, "is no name for a file"))?;
    let parent = destination.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_path_buf(), name.to_owned()))
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Writes a tree below a directory under one name.
#[derive(Debug)]
pub struct Unpacker {
    parent: OwnedFd,
    shown: PathBuf,
    name: Vec<u8>,
    /// Permission bits that are taken over.
    bits: u32,
    file: Option<(File, i64, PathBuf)>,
    /// Directories whose mode is set at the end: names and mode.
    locked: Vec<(Vec<Vec<u8>>, u32)>,
    entries: u64,
}

impl Unpacker {
    /// Will make `name` in the directory `parent`; permission bits outside `bits` are dropped.
    ///
    /// # Errors
    /// There is no such directory, or the name is none.
    pub fn new(parent: &Path, name: &OsStr, bits: u32) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = sys::open(parent, flags, Mode::empty()).map_err(|error| about(parent, reason(&error.into())))?;
        let name = name.as_bytes().to_vec();
        if !is_name(&name) {
            return Err(invalid("this is no name for a file"));
        }
        let shown = parent.join(OsStr::from_bytes(&name));
        Ok(Self { parent: fd, shown, name, bits, file: None, locked: Vec::new(), entries: 0 })
    }

    /// Takes the next item.
    ///
    /// # Errors
    /// The item breaks the rules, or it cannot be written; nothing more should be given then.
    pub fn item(&mut self, item: Item) -> io::Result<()> {
        match item {
            Item::Data(bytes) => {
                let Some((file, _, path)) = &mut self.file else {
                    return Err(invalid("content without a file in the archive"));
                };
                file.write_all(&bytes).map_err(|error| about(path, reason(&error)))
            }
            Item::Entry(entry) => {
                self.close_file()?;
                self.entry(entry)
            }
        }
    }

    /// Ends the tree.
    ///
    /// # Errors
    /// It was empty, or modes cannot be set.
    pub fn finish(mut self) -> io::Result<()> {
        self.close_file()?;
        if self.entries == 0 {
            return Err(invalid("the archive is empty"));
        }
        for (names, mode) in std::mem::take(&mut self.locked).into_iter().rev() {
            let dir = self.walk(&names)?;
            sys::fchmod(&dir, Mode::from_raw_mode(mode)).map_err(|error| about(&self.shown, reason(&error.into())))?;
        }
        Ok(())
    }

    fn close_file(&mut self) -> io::Result<()> {
        if let Some((file, time, path)) = self.file.take() {
            let time = Timespec { tv_sec: time.clamp(0, 1 << 40), tv_nsec: 0 };
            sys::futimens(&file, &Timestamps { last_access: time, last_modification: time })
                .map_err(|error| about(&path, reason(&error.into())))?;
        }
        Ok(())
    }

    /// Opens the directory of these names without following a link.
    fn walk(&self, names: &[Vec<u8>]) -> io::Result<OwnedFd> {
        let mut dir = self.parent.as_fd().try_clone_to_owned()?;
        for name in names {
            dir = sys::openat(&dir, OsStr::from_bytes(name), DIRECTORY, Mode::empty()).map_err(|error| {
                let why = match error {
                    Errno::LOOP | Errno::NOTDIR => "is in the way: it is not a directory".to_owned(),
                    error => reason(&error.into()),
                };
                about(&self.shown, format!("{}: {why}", String::from_utf8_lossy(name)))
            })?;
        }
        Ok(dir)
    }

    fn entry(&mut self, entry: Entry) -> io::Result<()> {
        let mut names = vec![self.name.clone()];
        if !entry.path.is_empty() {
            names.extend(entry.path.split(|byte| *byte == b'/').map(<[u8]>::to_vec));
        }
        if entry.path.len() > MAX_PATH || names.len() > MAX_DEPTH || !names.iter().all(|name| is_name(name)) {
            return Err(invalid("an unsafe path in the archive"));
        }
        if entry.path.is_empty() != (self.entries == 0) {
            return Err(invalid("the archive's order is wrong"));
        }
        self.entries += 1;
        let shown =
            if entry.path.is_empty() { self.shown.clone() } else { self.shown.join(OsStr::from_bytes(&entry.path)) };
        let failed = |error: Errno| about(&shown, reason(&error.into()));
        let Some((last, above)) = names.split_last() else { return Ok(()) };
        let dir = self.walk(above)?;
        let name = OsStr::from_bytes(last);
        let mode = entry.mode & self.bits;
        match entry.kind {
            Kind::Directory => {
                match sys::mkdirat(&dir, name, Mode::RWXU) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(failed(error)),
                }
                let made = sys::openat(&dir, name, DIRECTORY, Mode::empty()).map_err(|error| match error {
                    Errno::NOTDIR | Errno::LOOP => about(&shown, "is in the way: it is not a directory"),
                    error => failed(error),
                })?;
                if mode & 0o300 == 0o300 {
                    sys::fchmod(&made, Mode::from_raw_mode(mode)).map_err(failed)?;
                } else {
                    if self.locked.len() >= MAX_LOCKED {
                        return Err(invalid("too many read-only directories in the archive"));
                    }
                    self.locked.push((names, mode));
                }
            }
            Kind::File => {
                clear(&dir, name).map_err(failed)?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let file = sys::openat(&dir, name, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
                sys::fchmod(&file, Mode::from_raw_mode(mode)).map_err(failed)?;
                self.file = Some((file.into(), entry.time, shown));
            }
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_PATH || target.contains(&0) {
                    return Err(invalid("an unsafe link in the archive"));
                }
                clear(&dir, name).map_err(failed)?;
                sys::symlinkat(OsStr::from_bytes(&target), &dir, name).map_err(failed)?;
            }
        }
        Ok(())
    }
}

fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && name.len() < 256 && !name.iter().any(|b| [b'/', 0].contains(b))
}

/// Removes what is at a name, unless it is a directory.
fn clear(dir: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match sys::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    fn copy(from: &Path, parent: &Path, name: &str) -> io::Result<u64> {
        let mut unpacker = Unpacker::new(parent, OsStr::new(name), 0o777)?;
        let left_out = pack(from, &mut |item| unpacker.item(item))?;
        unpacker.finish()?;
        Ok(left_out)
    }

    fn entry(kind: Kind, path: &str) -> Item {
        Item::Entry(Entry { kind, mode: 0o755, time: 1, path: path.into() })
    }

    #[test]
    fn a_tree_arrives_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        std::fs::create_dir_all(from.join("a/b/c")).unwrap();
        std::fs::write(from.join("a/big"), vec![7; 300_000]).unwrap();
        std::fs::write(from.join("a/b/run"), b"#!/bin/sh\n").unwrap();
        std::fs::set_permissions(from.join("a/b/run"), PermissionsExt::from_mode(0o4751)).unwrap();
        symlink("../nowhere", from.join("a/link")).unwrap();
        std::fs::write(from.join("empty"), b"").unwrap();
        std::fs::set_permissions(from.join("a/b"), PermissionsExt::from_mode(0o555)).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
        assert_eq!(copy(&from, dir.path(), "to").unwrap(), 1);
        let to = dir.path().join("to");
        assert_eq!(std::fs::read(to.join("a/big")).unwrap(), vec![7; 300_000]);
        assert_eq!(std::fs::metadata(to.join("a/b/run")).unwrap().permissions().mode() & 0o7777, 0o751);
        assert_eq!(std::fs::metadata(to.join("a/b")).unwrap().permissions().mode() & 0o7777, 0o555);
        assert_eq!(std::fs::read_link(to.join("a/link")).unwrap(), Path::new("../nowhere"));
        assert_eq!(std::fs::metadata(to.join("empty")).unwrap().len(), 0);
        let time = |path: &Path| std::fs::metadata(path).unwrap().mtime();
        assert_eq!(time(&to.join("a/big")), time(&from.join("a/big")));
        assert!(to.join("a/b/c").is_dir() && !to.join("socket").exists());
        // Once more over what is there, and a single file.
        std::fs::set_permissions(to.join("a/b"), PermissionsExt::from_mode(0o755)).unwrap();
        copy(&from, dir.path(), "to").unwrap();
        copy(&from.join("a/big"), dir.path(), "one").unwrap();
        assert_eq!(std::fs::metadata(dir.path().join("one")).unwrap().len(), 300_000);
        for tree in [&from, &to] {
            std::fs::set_permissions(tree.join("a/b"), PermissionsExt::from_mode(0o755)).unwrap();
        }
        assert!(copy(&dir.path().join("none"), dir.path(), "x").unwrap_err().to_string().contains("no such file"));
    }

    #[test]
    fn nothing_leads_outside() {
        let dir = tempfile::tempdir().unwrap();
        let secret = dir.path().join("secret");
        std::fs::write(&secret, b"untouched").unwrap();
        let tries: [&[Item]; 9] = [
            &[entry(Kind::Directory, ""), entry(Kind::File, "../secret")],
            &[entry(Kind::Directory, ""), entry(Kind::File, "/secret")],
            &[entry(Kind::Directory, ""), entry(Kind::File, "a//b")],
            &[entry(Kind::Directory, ""), entry(Kind::File, "./x")],
            &[entry(Kind::Directory, ""), entry(Kind::Symlink(b"..".to_vec()), "l"), entry(Kind::File, "l/secret")],
            &[entry(Kind::Symlink(b"..".to_vec()), ""), entry(Kind::File, "secret")],
            &[entry(Kind::Symlink(b"secret".to_vec()), ""), entry(Kind::File, ""), Item::Data(b"x".to_vec())],
            &[Item::Data(b"x".to_vec())],
            &[entry(Kind::File, "x")],
        ];
        for (number, items) in tries.iter().enumerate() {
            let mut unpacker = Unpacker::new(dir.path(), OsStr::new(&format!("to{number}")), 0o777).unwrap();
            assert!(items.iter().any(|item| unpacker.item(item.clone()).is_err()), "{items:?}");
            assert_eq!(std::fs::read(&secret).unwrap(), b"untouched");
        }
        for name in ["", ".", "..", "a/b"] {
            assert!(Unpacker::new(dir.path(), OsStr::new(name), 0o777).is_err());
        }
        // A link that was there before is replaced, not followed.
        symlink("secret", dir.path().join("file")).unwrap();
        let mut unpacker = Unpacker::new(dir.path(), OsStr::new("file"), 0o777).unwrap();
        unpacker.item(entry(Kind::File, "")).unwrap();
        unpacker.item(Item::Data(b"new".to_vec())).unwrap();
        unpacker.finish().unwrap();
        assert_eq!(std::fs::read(&secret).unwrap(), b"untouched");
        assert!(Unpacker::new(dir.path(), OsStr::new("y"), 0o777).unwrap().finish().is_err());
    }

    proptest! {
        /// Whatever the entries are, nothing beside the name is made or changed.
        #[test]
        fn any_entries_stay_below_their_name(
            items in prop::collection::vec((0..4u8, "[a/.]{0,6}", "[a/.]{0,6}"), 0..12)
        ) {
            let dir = tempfile::tempdir().unwrap();
            let inner = dir.path().join("inner");
            std::fs::create_dir(&inner).unwrap();
            std::fs::write(dir.path().join("a"), b"untouched").unwrap();
            let mut unpacker = Unpacker::new(&inner, OsStr::new("to"), 0o777).unwrap();
            let _ = unpacker.item(entry(Kind::Directory, ""));
            for (kind, path, target) in items {
                let _ = unpacker.item(match kind {
                    0 => entry(Kind::Directory, &path),
                    1 => entry(Kind::File, &path),
                    2 => entry(Kind::Symlink(target.into_bytes()), &path),
                    _ => Item::Data(b"new".to_vec()),
                });
            }
            let _ = unpacker.finish();
            let names = |path: &Path| std::fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect::<Vec<_>>();
            prop_assert_eq!(names(&inner), ["to"]);
            prop_assert_eq!(names(dir.path()).len(), 2);
            prop_assert_eq!(std::fs::read(dir.path().join("a")).unwrap(), b"untouched");
        }
    }

    #[test]
    fn places() {
        let dir = tempfile::tempdir().unwrap();
        let name = OsStr::new("n");
        assert_eq!(place(dir.path(), name).unwrap(), (dir.path().to_path_buf(), "n".into()));
        assert_eq!(place(&dir.path().join("x"), name).unwrap(), (dir.path().to_path_buf(), "x".into()));
        assert_eq!(place(Path::new("no-such"), name).unwrap(), (".".into(), "no-such".into()));
        assert!(place(&dir.path().join("x/"), name).is_err());
        assert!(place(Path::new("/no/.."), name).is_err());
    }
}
