//! What makes, finds and removes names.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::files::open_flags;
use super::{FileSystem, Found};
use crate::abi::{CreateIn, EntryOut, InHeader, LinkIn, MkdirIn, MknodIn};
use crate::host::{self, Link};
use crate::inode::Inode;
use crate::owner::{Owner, SET_GROUP, SPECIAL};
use crate::reply::Reply;
use crate::request::{Request, Result};

/// Permissions that reach the host.
fn host_mode(mode: u32) -> Mode {
    Mode::from_raw_mode(mode & 0o1777)
}

impl FileSystem {
    pub(super) fn lookup(&self, dir: &Arc<Inode>, name: &CStr, reply: &mut Reply<'_>) -> Result<()> {
        match self.find(dir, name) {
            Ok(found) => self.put_entry(&found, reply),
            // That it is not there may be remembered as well.
            Err(Errno::NOENT) if !self.is_gone() => {
                let (entry_valid, entry_valid_nsec) = self.valid();
                reply.put(&EntryOut { entry_valid, entry_valid_nsec, ..EntryOut::default() })
            }
            Err(errno) => Err(errno),
        }
    }

    pub(super) fn readlink(&self, inode: &Inode, reply: &mut Reply<'_>) -> Result<()> {
        if inode.kind != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&*inode.fd(&self.inodes)?, c"", Vec::with_capacity(256))?;
        reply.bytes(target.to_bytes())
    }

    /// Gives a file that was just made its owner and what it has of [`SPECIAL`]. `dir` is the directory it is in.
    fn own(&self, found: &mut Found, dir: &Arc<Inode>, header: &InHeader, mode: u32) -> Result<()> {
        if !found.inode.has_attributes() {
            return Ok(());
        }
        let known = |id: u32| if id == u32::MAX { 0 } else { id };
        let mut owner = Owner { uid: known(header.uid), gid: known(header.gid), special: mode & SPECIAL };
        let parent = self.owner(&self.found(dir.clone())?);
        if parent.special & SET_GROUP != 0 {
            owner.gid = parent.gid;
            if found.inode.kind == FileType::Directory {
                owner.special |= SET_GROUP;
            }
        }
        let host = Owner::of_host(&found.stat, self.identity);
        if owner == host {
            return Ok(());
        }
        let fd = found.fd.clone();
        match self.lifted(&*fd, 0o600, || owner.write(fd.as_fd(), host)) {
            Ok(()) => found.stat = host::stat(&*found.fd)?,
            // It stays root's.
            Err(Errno::PERM) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }

    /// Answers with what `name` in `dir` is, now that it was made.
    fn made(&self, dir: &Arc<Inode>, name: &CStr, header: &InHeader, mode: u32, reply: &mut Reply<'_>) -> Result<()> {
        let mut found = self.find(dir, name)?;
        self.own(&mut found, dir, header, mode).inspect_err(|_| self.inodes.forget(found.inode.id, 1))?;
        self.put_entry(&found, reply)
    }

    /// The directory `id`, about to be changed.
    fn dir(&self, id: u64) -> Result<(Arc<Inode>, Arc<OwnedFd>)> {
        self.changing()?;
        let dir = self.inodes.get(id)?;
        let fd = dir.fd(&self.inodes)?;
        Ok((dir, fd))
    }

    pub(super) fn mknod(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let MknodIn { mode, .. } = request.take()?;
        let name = request.name()?;
        let (dir, fd) = self.dir(id)?;
        let kind = FileType::from_raw_mode(mode);
        self.lifted(&*fd, 0o700, || match kind {
            FileType::RegularFile => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
                host::open_below(&*fd, name, flags, host_mode(mode)).map(drop)
            }
            FileType::Fifo | FileType::Socket => rustix::fs::mknodat(&*fd, name, kind, host_mode(mode), 0),
            // Devices would be the host's.
            _ => Err(Errno::PERM),
        })?;
        self.made(&dir, name, &request.header, mode, reply)
    }

    pub(super) fn mkdir(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let MkdirIn { mode, .. } = request.take()?;
        let name = request.name()?;
        let (dir, fd) = self.dir(id)?;
        self.lifted(&*fd, 0o700, || rustix::fs::mkdirat(&*fd, name, host_mode(mode)))?;
        self.made(&dir, name, &request.header, mode, reply)
    }

    pub(super) fn symlink(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let name = request.name()?;
        let target = request.text()?;
        let (dir, fd) = self.dir(id)?;
        self.lifted(&*fd, 0o700, || rustix::fs::symlinkat(target, &*fd, name))?;
        self.made(&dir, name, &request.header, 0, reply)
    }

    pub(super) fn link(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let LinkIn { oldnodeid } = request.take()?;
        let name = request.name()?;
        let (dir, fd) = self.dir(id)?;
        let old = self.inodes.get(oldnodeid)?;
        let old_fd = old.fd(&self.inodes)?;
        let link = Link::of(old_fd.as_fd());
        self.lifted(&*fd, 0o700, || rustix::fs::linkat(CWD, link.path(), &*fd, name, AtFlags::SYMLINK_FOLLOW))?;
        let found = self.find(&dir, name)?;
        self.put_entry(&found, reply)
    }

    /// The name goes, or becomes another's: the guest may have the file open without our knowing, so it must stay in hand.
    fn keep_hold(&self, dir: &OwnedFd, name: &CStr) {
        if self.exclusive
            && let Ok(fd) = host::hold_below(dir, name)
            && let Ok(stat) = host::stat(&fd)
        {
            self.inodes.keep_hold(&stat, fd);
        }
    }

    pub(super) fn remove(&self, id: u64, name: &CStr, flags: AtFlags) -> Result<()> {
        let (_, fd) = self.dir(id)?;
        self.keep_hold(&fd, name);
        self.lifted(&*fd, 0o700, || rustix::fs::unlinkat(&*fd, name, flags))
    }

    pub(super) fn rename(&self, id: u64, new_id: u64, flags: u32, request: &mut Request<'_>) -> Result<()> {
        let (old, new) = (request.name()?, request.name()?);
        let allowed = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE;
        let flags = RenameFlags::from_bits(flags).filter(|flags| allowed.contains(*flags)).ok_or(Errno::INVAL)?;
        let (_, from) = self.dir(id)?;
        let (_, to) = self.dir(new_id)?;
        self.keep_hold(&from, old);
        self.keep_hold(&to, new);
        let act = || rustix::fs::renameat_with(&*from, old, &*to, new, flags);
        match self.lifted(&*from, 0o700, act) {
            Err(Errno::ACCESS) if id != new_id => self.lifted(&*to, 0o700, act),
            other => other,
        }
    }

    pub(super) fn create(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: CreateIn = request.take()?;
        let name = request.name()?;
        let (dir, dir_fd) = self.dir(id)?;
        let (flags, append) = open_flags(asked.flags);
        // Whatever is there already is looked at before it is opened: a pipe would block, a device do something.
        let flags_new = (flags - OFlags::TRUNC) | OFlags::CREATE | OFlags::EXCL;
        let made = self.lifted(&*dir_fd, 0o700, || host::open_below(&*dir_fd, name, flags_new, host_mode(asked.mode)));
        match made {
            Ok(file) => {
                let found = self.hold(&file, Some((&dir, name)))?;
                self.put_opened(found, file, append, Some((&dir, &request.header, asked.mode)), reply)
            }
            Err(Errno::EXIST) if asked.flags & OFlags::EXCL.bits() == 0 => {
                let mut found = self.find(&dir, name)?;
                let opened = self.reopen(&found.fd, found.inode.kind, flags).and_then(|file| {
                    found.stat = host::stat(&*found.fd)?;
                    Ok(file)
                });
                let file = opened.inspect_err(|_| self.inodes.forget(found.inode.id, 1))?;
                self.put_opened(found, file, append, None, reply)
            }
            Err(errno) => Err(errno),
        }
    }

    /// Counts a lookup of the file that was just made and opened as `file`.
    fn hold(&self, file: &OwnedFd, name: Option<(&Arc<Inode>, &CStr)>) -> Result<Found> {
        let fd = Arc::new(Link::of(file.as_fd()).open(OFlags::PATH)?);
        let stat = host::stat(&*fd)?;
        let inode = self.inodes.insert(fd.clone(), &stat, name)?;
        Ok(Found { fd, stat, inode })
    }

    /// Answers with an entry whose lookup has been counted, and with `file` opened. `new`: it was just made, in this directory, by such a
    /// request, with this mode.
    fn put_opened(
        &self,
        mut found: Found,
        file: OwnedFd,
        append: bool,
        new: Option<(&Arc<Inode>, &InHeader, u32)>,
        reply: &mut Reply<'_>,
    ) -> Result<()> {
        let owned = new.map_or(Ok(()), |(dir, header, mode)| self.own(&mut found, dir, header, mode));
        let put = owned.and_then(|()| {
            let entry = self.entry(&found);
            let opened = self.add_file(file, found.inode.clone(), append, &found.stat)?;
            reply.put(&entry)?;
            reply.put(&opened)
        });
        put.inspect_err(|_| self.inodes.forget(found.inode.id, 1))
    }

    pub(super) fn tmpfile(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let asked: CreateIn = request.take()?;
        let (dir, dir_fd) = self.dir(id)?;
        let (flags, append) = open_flags(asked.flags);
        let flags = (flags - OFlags::TRUNC) | OFlags::TMPFILE;
        let file = self.lifted(&*dir_fd, 0o700, || {
            let link = Link::of(dir_fd.as_fd());
            rustix::fs::openat(CWD, link.path(), flags | OFlags::CLOEXEC, host_mode(asked.mode))
                .map_err(host::no_more_files)
        })?;
        let found = self.hold(&file, None)?;
        self.put_opened(found, file, append, Some((&dir, &request.header, asked.mode)), reply)
    }
}
