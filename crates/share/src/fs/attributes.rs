//! Owner, permissions, size, times, extended attributes.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;

use rustix::fs::{AtFlags, FileType, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, XattrFlags};
use rustix::io::Errno;

use super::files::kept_special;
use super::{FileSystem, Found};
use crate::abi::{self, GetattrIn, GetxattrIn, GetxattrOut, SetattrIn, SetxattrIn, fattr};
use crate::host::{self, Link};
use crate::inode::Inode;
use crate::owner::{self, Owner, SPECIAL};
use crate::reply::Reply;
use crate::request::{Request, Result};

/// Largest value of an extended attribute, and largest list of names (Linux: XATTR_SIZE_MAX, XATTR_LIST_MAX).
const MAX_XATTR: usize = 64 << 10;

impl FileSystem {
    pub(super) fn getattr(&self, id: u64, asked: GetattrIn, reply: &mut Reply<'_>) -> Result<()> {
        let inode = self.inodes.get(id)?;
        if asked.getattr_flags & abi::GETATTR_FH != 0 && asked.fh != 0 && inode.kind == FileType::RegularFile {
            // What is open can be asked even if its name is gone.
            return self.with_file(asked.fh, id, false, |fd, opened, _| {
                let stat = host::stat(fd)?;
                let attr = self.attributes(opened, fd.as_fd(), &stat);
                reply.put(&self.valid_attr(attr))
            });
        }
        let found = self.found(inode)?;
        if id == abi::ROOT_ID && found.stat.stx_nlink == 0 {
            self.note_gone(Errno::NOENT, id);
        }
        reply.put(&self.attr_out(&found))
    }

    /// Writes the owner of what `fd` holds. Bits that the owner's attribute keeps must not be among its permissions on the host.
    /// The lock on permissions is held.
    pub(super) fn set_owner(&self, fd: &OwnedFd, stat: &Statx, owner: Owner) -> Result<()> {
        let bare = Owner { special: 0, ..Owner::of_host(stat, self.identity) };
        self.lift(fd, 0o600, || owner.write(fd.as_fd(), bare))
    }

    pub(super) fn setattr(&self, id: u64, asked: SetattrIn, reply: &mut Reply<'_>) -> Result<()> {
        self.changing()?;
        let mut found = self.found(self.inodes.get(id)?)?;
        let has = |bit| asked.valid & bit != 0;
        if has(fattr::UID | fattr::GID | fattr::MODE) {
            self.set_permissions(&found, &asked)?;
        }
        if has(fattr::SIZE) {
            self.set_size(&found, &asked)?;
        }
        if has(fattr::ATIME | fattr::MTIME) {
            let time = |given, now, seconds: u64, nanoseconds: u32| match (has(given), has(now)) {
                (false, _) => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
                (true, true) => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
                (true, false) => Timespec { tv_sec: seconds as i64, tv_nsec: nanoseconds.min(999_999_999).into() },
            };
            let times = Timestamps {
                last_access: time(fattr::ATIME, fattr::ATIME_NOW, asked.atime, asked.atimensec),
                last_modification: time(fattr::MTIME, fattr::MTIME_NOW, asked.mtime, asked.mtimensec),
            };
            rustix::fs::utimensat(&*found.fd, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        found.stat = host::stat(&*found.fd)?;
        reply.put(&self.attr_out(&found))
    }

    fn set_permissions(&self, found: &Found, asked: &SetattrIn) -> Result<()> {
        let has = |bit| asked.valid & bit != 0;
        if !found.inode.has_attributes() {
            // Links, pipes and sockets are always root's; their permissions are the host's.
            return if has(fattr::MODE) && found.inode.kind != FileType::Symlink {
                Link::of(found.fd.as_fd()).chmod(asked.mode)
            } else {
                Ok(())
            };
        }
        let before = self.owner(found);
        let _one = self.permissions.lock().unwrap_or_else(PoisonError::into_inner);
        let mut owner = before;
        if has(fattr::UID) {
            owner.uid = asked.uid;
        }
        if has(fattr::GID) {
            owner.gid = asked.gid;
        }
        let host_mode = u32::from(found.stat.stx_mode);
        if has(fattr::MODE) {
            owner.special = asked.mode & SPECIAL;
        } else if found.inode.kind == FileType::RegularFile {
            owner.special = kept_special(owner.special, host_mode);
        }
        let link = Link::of(found.fd.as_fd());
        if has(fattr::MODE) {
            link.chmod(asked.mode)?;
        } else if owner != before && host_mode & SPECIAL != 0 {
            link.chmod(host_mode)?;
        }
        if owner != before || has(fattr::MODE) && host_mode & SPECIAL != 0 {
            self.set_owner(&found.fd, &found.stat, owner)?;
        }
        Ok(())
    }

    fn set_size(&self, found: &Found, asked: &SetattrIn) -> Result<()> {
        if found.inode.kind != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        if i64::try_from(asked.size).is_err() {
            return Err(Errno::FBIG);
        }
        if asked.valid & fattr::FH != 0 && asked.fh != 0 {
            self.with_file(asked.fh, found.inode.id, true, |fd, _, _| rustix::fs::ftruncate(fd, asked.size))?;
        } else {
            let file = self.reopen(&found.fd, found.inode.kind, OFlags::WRONLY)?;
            rustix::fs::ftruncate(&file, asked.size)?;
        }
        if asked.valid & fattr::KILL_SUIDGID != 0 { self.drop_special(&found.inode) } else { Ok(()) }
    }

    /// The file of a request about the extended attribute `name`. Only the user's attributes are shared: those of the system carry
    /// rights on the host (file capabilities) or ids of the host (access lists).
    fn attributed(&self, id: u64, name: &CStr) -> Result<std::sync::Arc<OwnedFd>> {
        let inode = self.inodes.get(id)?;
        if !name.to_bytes().starts_with(b"user.") || name == owner::ATTRIBUTE {
            return Err(Errno::OPNOTSUPP);
        }
        if !inode.has_attributes() {
            return Err(Errno::PERM);
        }
        inode.fd(&self.inodes)
    }

    pub(super) fn setxattr(&self, id: u64, request: &mut Request<'_>) -> Result<()> {
        self.changing()?;
        let SetxattrIn { size, flags } = request.take()?;
        let name = request.text()?;
        let value = request.data(size)?;
        let fd = self.attributed(id, name)?;
        let flags = XattrFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        self.lifted(&*fd, 0o600, || rustix::fs::setxattr(Link::of(fd.as_fd()).path(), name, value, flags))
    }

    pub(super) fn removexattr(&self, id: u64, name: &CStr) -> Result<()> {
        self.changing()?;
        let fd = self.attributed(id, name)?;
        self.lifted(&*fd, 0o600, || rustix::fs::removexattr(Link::of(fd.as_fd()).path(), name))
    }

    pub(super) fn getxattr(&self, id: u64, request: &mut Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let GetxattrIn { size, .. } = request.take()?;
        let name = request.text()?;
        let fd = self.attributed(id, name)?;
        let value = self.lifted(&*fd, 0o400, || {
            let mut value = vec![0u8; MAX_XATTR];
            let len = rustix::fs::getxattr(Link::of(fd.as_fd()).path(), name, &mut value[..])?;
            value.truncate(len);
            Ok(value)
        })?;
        put_value(&value, size, reply)
    }

    pub(super) fn listxattr(&self, id: u64, asked: GetxattrIn, reply: &mut Reply<'_>) -> Result<()> {
        let inode: std::sync::Arc<Inode> = self.inodes.get(id)?;
        if !inode.has_attributes() {
            return put_value(b"", asked.size, reply);
        }
        let fd = inode.fd(&self.inodes)?;
        let mut names = vec![0u8; MAX_XATTR];
        let len = match rustix::fs::listxattr(Link::of(fd.as_fd()).path(), &mut names[..]) {
            Err(Errno::OPNOTSUPP) => 0,
            other => other?,
        };
        let names = names.get(..len).unwrap_or_default().split_inclusive(|byte| *byte == 0);
        let shown = |name: &&[u8]| name.starts_with(b"user.") && *name != owner::ATTRIBUTE.to_bytes_with_nul();
        put_value(&names.filter(shown).collect::<Vec<_>>().concat(), asked.size, reply)
    }
}

/// Answers with `value` if the guest gives room for it, with its length if it asks for that.
fn put_value(value: &[u8], size: u32, reply: &mut Reply<'_>) -> Result<()> {
    if size == 0 {
        return reply.put(&GetxattrOut { size: value.len() as u32, padding: 0 });
    }
    if value.len() > size as usize { Err(Errno::RANGE) } else { reply.bytes(value) }
}
