//! Writing archive entries below a directory as if it were the root of the file system.
//!
//! Every path is walked one component at a time with `openat(O_NOFOLLOW)`; symbolic links on the way
//! are read and followed by us, with absolute targets starting at the directory again and `..` never
//! going above it. So no link, from the archive or from before, leads outside.

use std::collections::VecDeque;
use std::ffi::{CStr, OsStr};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

use rustix::fs::{self as sys, AtFlags, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Symbolic links followed in one path before it counts as a loop.
const MAX_LINKS: usize = 40;

/// The directory that stands for `/`.
#[derive(Debug)]
pub(crate) struct Root {
    fd: OwnedFd,
    privileged: bool,
}

/// A directory and the name of an entry in it.
struct Place {
    dir: OwnedFd,
    name: Vec<u8>,
}

const DIR: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

impl Root {
    /// Opens an existing directory.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let fd = sys::open(path, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::io("open", path, e.into()))?;
        Ok(Self { fd, privileged: rustix::process::geteuid().is_root() })
    }

    /// Writes one entry of the archive in package `deb` below `dest` (both for messages).
    pub(crate) fn unpack<R: Read>(&self, entry: &mut tar::Entry<'_, R>, deb: &Path, dest: &Path) -> Result<()> {
        let path = entry.path_bytes().into_owned();
        let shown = String::from_utf8_lossy(&path).into_owned();
        let refuse = |why: &str| Error::deb(deb, format!("{why}: {shown:?}"));
        let parts = components(&path).ok_or_else(|| refuse("unsafe path"))?;
        let header = entry.header();
        let kind = header.entry_type();
        let bits = if self.privileged { 0o7777 } else { 0o777 };
        let mode = Mode::from_raw_mode(header.mode().map_err(|e| Error::deb(deb, e))? & bits);
        let time = i64::try_from(header.mtime().unwrap_or(0)).unwrap_or(0);
        let id = |v: io::Result<u64>| v.ok().and_then(|v| u32::try_from(v).ok()).unwrap_or(0);
        let owner = (id(header.uid()), id(header.gid()));
        let link = entry.link_name_bytes().map(|l| l.into_owned());
        let link = || {
            link.as_deref().filter(|l| !l.is_empty() && !l.contains(&0)).ok_or_else(|| refuse("link without target"))
        };
        let target = dest.join(shown.trim_start_matches(['.', '/']));
        let on = |op| {
            let target = target.clone();
            move |e: Errno| Error::io(op, &target, e.into())
        };
        if parts.is_empty() {
            // The root directory itself.
            return Ok(());
        }
        if kind.is_dir() {
            let dir = self.walk(&parts, true).map_err(on("create"))?;
            sys::fchmod(&dir, mode).map_err(on("change the mode of"))?;
            return self.own(&dir, owner).map_err(on("change the owner of"));
        }
        let place = self.place(&parts).map_err(on("create"))?;
        if kind.is_symlink() {
            let to = link()?;
            place.clear().map_err(on("replace"))?;
            sys::symlinkat(OsStr::from_bytes(to), &place.dir, OsStr::from_bytes(&place.name)).map_err(on("create"))?;
            if self.privileged {
                let (uid, gid) = ids(owner);
                sys::chownat(&place.dir, OsStr::from_bytes(&place.name), uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(on("change the owner of"))?;
            }
            return Ok(());
        }
        if kind.is_hard_link() {
            let parts = components(link()?).ok_or_else(|| refuse("unsafe link"))?;
            let from = self.place(&parts).map_err(on("create"))?;
            if from.is_same(&place).map_err(on("create"))? {
                return Ok(());
            }
            place.clear().map_err(on("replace"))?;
            return sys::linkat(
                &from.dir,
                OsStr::from_bytes(&from.name),
                &place.dir,
                OsStr::from_bytes(&place.name),
                AtFlags::empty(),
            )
            .map_err(on("create"));
        }
        if !kind.is_file() && !kind.is_contiguous() && !kind.is_gnu_sparse() {
            return Err(refuse("neither file, directory nor link"));
        }
        place.clear().map_err(on("replace"))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&place.dir, OsStr::from_bytes(&place.name), flags, Mode::RUSR | Mode::WUSR)
            .map_err(on("create"))?;
        let mut file = File::from(fd);
        let declared = entry.size();
        let mut buffer = vec![0u8; 64 << 10];
        let mut written = 0u64;
        loop {
            // Reading fails for a broken package, writing for the disk: two different remedies.
            let n = match entry.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(Error::deb(deb, e)),
            };
            io::Write::write_all(&mut file, buffer.get(..n).unwrap_or_default())
                .map_err(|e| Error::io("write", &target, e))?;
            written = written.saturating_add(n as u64);
        }
        if written != declared {
            return Err(Error::deb(deb, format!("truncated at {shown:?}")));
        }
        self.own(&file, owner).map_err(on("change the owner of"))?;
        // After the owner: changing that clears set-id bits.
        sys::fchmod(&file, mode).map_err(on("change the mode of"))?;
        let stamp = Timespec { tv_sec: time, tv_nsec: 0 };
        let times = Timestamps { last_access: stamp, last_modification: stamp };
        sys::futimens(&file, &times).map_err(on("set the time of"))
    }

    fn own(&self, fd: impl AsFd, owner: (u32, u32)) -> Result<(), Errno> {
        if self.privileged {
            let (uid, gid) = ids(owner);
            sys::fchown(fd, uid, gid)?;
        }
        Ok(())
    }

    /// The directory an entry goes into, made as needed, and the entry's name.
    fn place(&self, parts: &[Vec<u8>]) -> Result<Place, Errno> {
        let (name, parents) = parts.split_last().ok_or(Errno::INVAL)?;
        Ok(Place { dir: self.walk(parents, true)?, name: name.clone() })
    }

    /// Walks to a directory, following links inside the root, making what is missing if `create`.
    fn walk(&self, parts: &[Vec<u8>], create: bool) -> Result<OwnedFd, Errno> {
        let mut stack = vec![self.fd.try_clone().map_err(|_| Errno::MFILE)?];
        let mut todo: VecDeque<Vec<u8>> = parts.iter().cloned().collect();
        let mut links = 0;
        while let Some(part) = todo.pop_front() {
            if part == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let here = stack.last().ok_or(Errno::INVAL)?;
            let name = OsStr::from_bytes(&part);
            let next = match sys::openat(here, name, DIR, Mode::empty()) {
                Err(Errno::NOENT) if create => {
                    match sys::mkdirat(here, name, Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(e) => return Err(e),
                    }
                    sys::openat(here, name, DIR, Mode::empty())
                }
                other => other,
            };
            match next {
                Ok(fd) => stack.push(fd),
                // ENOTDIR or ELOOP: a link, or something that is no directory at all.
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let to = sys::readlinkat(here, name, Vec::new()).map_err(|e| match e {
                        Errno::INVAL => Errno::NOTDIR,
                        e => e,
                    })?;
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(Errno::LOOP);
                    }
                    if to.as_bytes().starts_with(b"/") {
                        stack.truncate(1);
                    }
                    for part in split_link(&to).into_iter().rev() {
                        todo.push_front(part);
                    }
                }
                Err(e) => return Err(e),
            }
        }
        stack.pop().ok_or(Errno::INVAL)
    }
}

impl Place {
    /// Removes what has the name, unless it is a directory.
    fn clear(&self) -> Result<(), Errno> {
        match sys::unlinkat(&self.dir, OsStr::from_bytes(&self.name), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn is_same(&self, other: &Self) -> Result<bool, Errno> {
        let stat = |p: &Self| {
            sys::statat(&p.dir, OsStr::from_bytes(&p.name), AtFlags::SYMLINK_NOFOLLOW).map(|s| (s.st_dev, s.st_ino))
        };
        match (stat(self), stat(other)) {
            (Ok(a), Ok(b)) => Ok(a == b),
            (Err(e), _) => Err(e),
            (_, Err(_)) => Ok(false),
        }
    }
}

fn ids((uid, gid): (u32, u32)) -> (Option<Uid>, Option<Gid>) {
    // The all-ones id means "unchanged" to the kernel and is no user.
    ((uid != u32::MAX).then(|| Uid::from_raw(uid)), (gid != u32::MAX).then(|| Gid::from_raw(gid)))
}

/// The components of an archive path; `None` if it is absolute, has `..`, or holds a NUL.
fn components(path: &[u8]) -> Option<Vec<Vec<u8>>> {
    if path.contains(&0) {
        return None;
    }
    let mut parts = Vec::new();
    for c in Path::new(OsStr::from_bytes(path)).components() {
        match c {
            Component::Normal(name) => parts.push(name.as_bytes().to_vec()),
            Component::CurDir => {}
            _ => return None,
        }
    }
    Some(parts)
}

/// The components of a link target, `..` included.
fn split_link(target: &CStr) -> Vec<Vec<u8>> {
    target.to_bytes().split(|b| *b == b'/').filter(|p| !p.is_empty() && *p != b".").map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::deb;
    use crate::deb::unpack_deb;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    enum E<'a> {
        File(&'a str, &'a str),
        Link(&'a str, &'a str),
        Hard(&'a str, &'a str),
        Dir(&'a str),
        Node(&'a str),
    }

    /// Builds headers by hand: the `tar` crate refuses to write hostile paths.
    fn tar_of(entries: &[E<'_>]) -> Vec<u8> {
        let mut b = tar::Builder::new(Vec::new());
        for e in entries {
            let (kind, name, link, data) = match e {
                E::File(n, d) => (tar::EntryType::Regular, n, "", d.as_bytes()),
                E::Link(n, l) => (tar::EntryType::Symlink, n, *l, &b""[..]),
                E::Hard(n, l) => (tar::EntryType::Link, n, *l, &b""[..]),
                E::Dir(n) => (tar::EntryType::Directory, n, "", &b""[..]),
                E::Node(n) => (tar::EntryType::Char, n, "", &b""[..]),
            };
            let mut h = tar::Header::new_gnu();
            let raw = h.as_old_mut();
            raw.name[..name.len()].copy_from_slice(name.as_bytes());
            raw.linkname[..link.len()].copy_from_slice(link.as_bytes());
            h.set_entry_type(kind);
            h.set_mode(0o4755);
            h.set_mtime(1_000_000);
            h.set_size(data.len() as u64);
            h.set_cksum();
            b.append(&h, data).unwrap();
        }
        b.into_inner().unwrap()
    }

    /// Unpacks into `<tmp>/root` and says what came of it; `<tmp>/outside` must stay empty.
    fn run(entries: &[E<'_>]) -> (tempfile::TempDir, Result<()>) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("outside")).unwrap();
        let file = dir.path().join("x.deb");
        fs::write(&file, deb("", &tar_of(entries))).unwrap();
        let result = unpack_deb(&file, &dir.path().join("root"));
        assert_eq!(fs::read_dir(dir.path().join("outside")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
        (dir, result)
    }

    #[test]
    fn files_links_directories() {
        let (d, r) = run(&[
            E::Dir("./"),
            E::Dir("./usr/"),
            E::Dir("./usr/bin/"),
            E::Link("./bin", "usr/bin"),
            E::File("./bin/a", "hello"),
            E::Hard("./usr/b", "./usr/bin/a"),
            E::File("./bin/a", "again"),
        ]);
        r.unwrap();
        let root = d.path().join("root");
        assert_eq!(fs::read_to_string(root.join("usr/bin/a")).unwrap(), "again");
        assert_eq!(fs::read_to_string(root.join("usr/b")).unwrap(), "hello");
        let meta = fs::metadata(root.join("usr/bin/a")).unwrap();
        assert_eq!(meta.permissions().mode() & 0o777, 0o755);
        assert_eq!(meta.modified().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs(), 1_000_000);
    }

    #[test]
    fn unsafe_paths_are_refused() {
        for entries in [
            [E::File("../outside/x", "")],
            [E::File("a/../../outside/x", "")],
            [E::File("/x", "")],
            [E::Dir("../outside/x")],
            [E::Node("./dev")],
            [E::Hard("./x", "../x.deb")],
        ] {
            let (_d, r) = run(&entries);
            assert!(matches!(r, Err(Error::Deb { .. })), "{r:?}");
        }
    }

    #[test]
    fn links_lead_nowhere_outside() {
        // Relative and absolute links to outside are followed inside the root instead.
        let (d, r) = run(&[
            E::Link("./up", "../outside"),
            E::File("./up/x", "1"),
            E::Link("./abs", "/var/run"),
            E::File("./abs/y", "2"),
            E::Link("./final", "/etc/passwd"),
            E::File("./final", "3"),
        ]);
        r.unwrap();
        let root = d.path().join("root");
        assert_eq!(fs::read_to_string(root.join("outside/x")).unwrap(), "1");
        assert_eq!(fs::read_to_string(root.join("var/run/y")).unwrap(), "2");
        // A file replaces a link of its name, it is not written through it.
        assert!(fs::symlink_metadata(root.join("final")).unwrap().is_file());
    }

    #[test]
    fn a_hard_link_to_a_link_links_the_link() {
        let (d, r) = run(&[E::Link("./l", "/etc/passwd"), E::Hard("./h", "./l")]);
        r.unwrap();
        let h = d.path().join("root/h");
        assert!(fs::symlink_metadata(h).unwrap().is_symlink());
    }

    #[test]
    fn loops_and_files_in_the_way_are_errors() {
        let (_d, r) = run(&[E::Link("./a", "b"), E::Link("./b", "a"), E::File("./a/x", "")]);
        assert!(r.is_err());
        let (_d, r) = run(&[E::File("./a", ""), E::File("./a/x", "")]);
        assert!(r.is_err());
    }
}
