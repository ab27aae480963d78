//! A host directory as a FUSE file system: [`FileSystem::serve`] takes a request and writes the answer. Any number of threads may.
//!
//! * `names`: what makes, finds and removes names.
//! * `attributes`: owner, permissions, size, times, extended attributes.
//! * `files`: open files and directories.

mod attributes;
mod files;
mod names;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{FileType, OFlags, Statx};
use rustix::io::Errno;

use crate::abi::{
    self, Attr, AttrOut, BatchForgetIn, EntryOut, ForgetIn, ForgetOne, InitIn, InitOut, ROOT_ID, init, op,
};
use crate::host::{self, Link};
use crate::inode::{Inode, Inodes};
use crate::owner::{self, Identity, Owner};
use crate::reply::Reply;
use crate::request::{Request, Result};
use files::Handle;

/// Most bytes of one READ or WRITE.
pub const MAX_DATA: usize = 1 << 20;
/// How long the guest may use what it knows of names and attributes without asking, in nanoseconds: what is changed on the host shows in
/// the guest after this time at the latest.
const VALID_NS: u32 = 100_000_000;
/// The same where nobody but the guest changes anything, in seconds.
const EXCLUSIVE_VALID_S: u64 = 3600;
/// Requests the guest may have on the way by itself (reading ahead, writing mapped files back).
const MAX_BACKGROUND: u16 = 32;
/// What of INIT's flags is used if the guest has it.
const INIT_FLAGS: u32 = init::ASYNC_READ
    | init::ATOMIC_O_TRUNC
    | init::BIG_WRITES
    | init::AUTO_INVAL_DATA
    | init::DO_READDIRPLUS
    | init::READDIRPLUS_AUTO
    | init::ASYNC_DIO
    | init::PARALLEL_DIROPS
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::HANDLE_KILLPRIV_V2;
/// As [`INIT_FLAGS`], for an exclusive directory: nothing is opened here by the guest's leave, so truncation comes by itself, and nothing
/// becomes void by itself. The two others only say what the guest's kernel can do.
const EXCLUSIVE_FLAGS: u32 =
    INIT_FLAGS & !(init::ATOMIC_O_TRUNC | init::AUTO_INVAL_DATA) | init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;

/// May the guest change anything?
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Access {
    /// No.
    ReadOnly,
    /// Yes.
    ReadWrite,
}

/// A shared directory.
pub struct FileSystem {
    access: Access,
    /// Nobody else changes the directory while it is shared.
    exclusive: bool,
    /// The guest's kernel can do without opening files, and directories.
    no_open: AtomicBool,
    no_opendir: AtomicBool,
    identity: Identity,
    /// The root, opened for reading: for SYNCFS.
    root: OwnedFd,
    /// Its device; inode numbers of other devices are told apart from its own.
    device: (u32, u32),
    inodes: Inodes,
    handles: RwLock<HashMap<u64, Arc<Handle>>>,
    last_handle: std::sync::atomic::AtomicU64,
    max_handles: usize,
    /// Held while permissions are lifted for a moment, and while they are set.
    permissions: Mutex<()>,
    gone: AtomicBool,
}

/// A file and what is known of it.
struct Found {
    fd: Arc<OwnedFd>,
    stat: Statx,
    inode: Arc<Inode>,
}

impl FileSystem {
    /// Serves the directory `root` (opened for reading, not by O_PATH). `max_files`: descriptors that may be used. Files of the process's
    /// user and group appear as root's.
    ///
    /// # Errors
    /// The directory cannot be held.
    pub fn new(root: OwnedFd, access: Access, max_files: usize) -> std::io::Result<Self> {
        let stat = host::stat(&root)?;
        let held = rustix::fs::openat(&root, c".", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, 0.into())?;
        let identity = Identity { uid: rustix::process::geteuid().as_raw(), gid: rustix::process::getegid().as_raw() };
        Ok(Self {
            access,
            exclusive: false,
            no_open: AtomicBool::new(false),
            no_opendir: AtomicBool::new(false),
            identity,
            root,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inodes: Inodes::new(held, max_files / 2)?,
            handles: RwLock::default(),
            last_handle: 0.into(),
            max_handles: max_files / 4,
            permissions: Mutex::default(),
            gone: AtomicBool::new(false),
        })
    }

    /// Nobody but the guest changes the directory: it may keep for long what it knows. (It writes at once all the same: writing later brings
    /// nothing, as Linux lets such a file system have next to no unwritten pages.)
    #[must_use]
    pub fn exclusive(mut self) -> Self {
        self.exclusive = true;
        self
    }

    /// How long the guest may use what it is told, in seconds and nanoseconds.
    fn valid(&self) -> (u64, u32) {
        if self.exclusive { (EXCLUSIVE_VALID_S, 0) } else { (0, VALID_NS) }
    }

    /// Has the directory been removed on the host?
    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Relaxed)
    }

    /// Serves the request `bytes` and writes the answer to `room`; returns its length, 0 if there is none.
    pub fn serve(&self, bytes: &[u8], room: &mut [u8]) -> usize {
        let Some(request) = Request::parse(bytes) else { return 0 };
        let unique = request.header.unique;
        if let Some(()) = self.without_answer(&request) {
            return 0;
        }
        let Some(mut reply) = Reply::new(room) else { return 0 };
        let result = self.answer(request, &mut reply);
        reply.finish(unique, result)
    }

    /// Requests that are not answered; `None`: it is another.
    fn without_answer(&self, request: &Request<'_>) -> Option<()> {
        let mut request = *request;
        match request.header.opcode {
            op::FORGET => {
                if let Ok(ForgetIn { nlookup }) = request.take() {
                    self.inodes.forget(request.header.nodeid, nlookup);
                }
            }
            op::BATCH_FORGET => {
                if let Ok(BatchForgetIn { count, .. }) = request.take() {
                    for _ in 0..count {
                        let Ok(ForgetOne { nodeid, nlookup }) = request.take() else { break };
                        self.inodes.forget(nodeid, nlookup);
                    }
                }
            }
            // Nothing here takes long enough to be worth breaking off.
            op::INTERRUPT => {}
            _ => return None,
        }
        Some(())
    }

    fn answer(&self, mut request: Request<'_>, reply: &mut Reply<'_>) -> Result<()> {
        let id = request.header.nodeid;
        match request.header.opcode {
            op::INIT => self.init(request.take()?, reply),
            op::DESTROY => {
                self.forget_all();
                Ok(())
            }
            op::STATFS => self.statfs(reply),
            op::SYNCFS => rustix::fs::syncfs(&self.root),

            op::LOOKUP => self.lookup(&self.inodes.get(id)?, request.name()?, reply),
            op::READLINK => self.readlink(&*self.inodes.get(id)?, reply),
            op::MKNOD => self.mknod(id, &mut request, reply),
            op::MKDIR => self.mkdir(id, &mut request, reply),
            op::SYMLINK => self.symlink(id, &mut request, reply),
            op::LINK => self.link(id, &mut request, reply),
            op::UNLINK => self.remove(id, request.name()?, rustix::fs::AtFlags::empty()),
            op::RMDIR => self.remove(id, request.name()?, rustix::fs::AtFlags::REMOVEDIR),
            op::RENAME => {
                let abi::RenameIn { newdir } = request.take()?;
                self.rename(id, newdir, 0, &mut request)
            }
            op::RENAME2 => {
                let abi::Rename2In { newdir, flags, .. } = request.take()?;
                self.rename(id, newdir, flags, &mut request)
            }
            op::CREATE => self.create(id, &mut request, reply),
            op::TMPFILE => self.tmpfile(id, &mut request, reply),

            op::GETATTR => self.getattr(id, request.take()?, reply),
            op::SETATTR => self.setattr(id, request.take()?, reply),
            op::SETXATTR => self.setxattr(id, &mut request),
            op::GETXATTR => self.getxattr(id, &mut request, reply),
            op::LISTXATTR => self.listxattr(id, request.take()?, reply),
            op::REMOVEXATTR => self.removexattr(id, request.text()?),

            op::OPEN => self.open(id, request.take()?, reply),
            op::OPENDIR => self.opendir(id, reply),
            op::RELEASE | op::RELEASEDIR => {
                self.release(request.take()?);
                Ok(())
            }
            op::READ => self.read(id, request.take()?, reply),
            op::WRITE => {
                let write: abi::WriteIn = request.take()?;
                self.write(id, write, request.data(write.size)?, reply)
            }
            op::READDIR => self.readdir(id, request.take()?, false, reply),
            op::READDIRPLUS => self.readdir(id, request.take()?, true, reply),
            op::FSYNC | op::FSYNCDIR => self.fsync(id, request.take()?),
            op::FALLOCATE => self.fallocate(id, request.take()?),
            op::LSEEK => self.lseek(id, request.take()?, reply),
            op::COPY_FILE_RANGE => self.copy_file_range(id, request.take()?, reply),
            _ => Err(Errno::NOSYS),
        }
    }

    /// A new mount: what an earlier one held is void.
    fn init(&self, asked: InitIn, reply: &mut Reply<'_>) -> Result<()> {
        self.forget_all();
        if asked.major < abi::MAJOR {
            return Err(Errno::PROTO);
        }
        let mut out = InitOut { major: abi::MAJOR, minor: abi::MINOR, ..InitOut::default() };
        if asked.major == abi::MAJOR {
            if asked.minor < abi::OLDEST_MINOR {
                return Err(Errno::PROTO);
            }
            out.minor = abi::MINOR.min(asked.minor);
            out.max_readahead = asked.max_readahead;
            out.flags = if self.exclusive { EXCLUSIVE_FLAGS } else { INIT_FLAGS } & asked.flags;
            self.no_open.store(out.flags & init::NO_OPEN_SUPPORT != 0, Ordering::Relaxed);
            self.no_opendir.store(out.flags & init::NO_OPENDIR_SUPPORT != 0, Ordering::Relaxed);
            out.max_background = MAX_BACKGROUND;
            out.congestion_threshold = MAX_BACKGROUND / 4 * 3;
            out.max_write = MAX_DATA as u32;
            out.max_pages = (MAX_DATA / 4096) as u16;
            out.time_gran = 1;
        }
        // (A guest with a newer major version asks again with ours.)
        reply.put(&out)
    }

    fn forget_all(&self) {
        self.handles.write().unwrap_or_else(PoisonError::into_inner).clear();
        self.inodes.clear();
    }

    /// The guest wants to change something.
    fn changing(&self) -> Result<()> {
        match self.access {
            Access::ReadOnly => Err(Errno::ROFS),
            Access::ReadWrite => Ok(()),
        }
    }

    fn found(&self, inode: Arc<Inode>) -> Result<Found> {
        let fd = inode.fd(&self.inodes)?;
        let stat = host::stat(&*fd)?;
        Ok(Found { fd, stat, inode })
    }

    /// Looks `name` up in `dir` and counts that.
    fn find(&self, dir: &Arc<Inode>, name: &CStr) -> Result<Found> {
        let dir_fd = dir.fd(&self.inodes)?;
        let result = self.lifted(&dir_fd, 0o500, || host::hold_below(&dir_fd, name));
        let fd = Arc::new(result.inspect_err(|errno| self.note_gone(*errno, dir.id))?);
        let stat = host::stat(&*fd)?;
        let inode = self.inodes.insert(fd.clone(), &stat, Some((dir, name)))?;
        Ok(Found { fd, stat, inode })
    }

    /// Something is not there: is it because the root is not?
    fn note_gone(&self, errno: Errno, dir: u64) {
        if errno == Errno::NOENT && dir == ROOT_ID && host::stat(&self.root).is_ok_and(|stat| stat.stx_nlink == 0) {
            self.gone.store(true, Ordering::Relaxed);
        }
    }

    /// Does `act`, which the host may refuse because the permissions of `fd` keep out even the owner, who is root in the guest and kept out
    /// by nothing there. They are lifted (`mode` is added to them) for the moment then.
    fn lifted<T>(&self, fd: impl AsFd, mode: u32, act: impl Fn() -> Result<T>) -> Result<T> {
        let result = act();
        if !matches!(result, Err(Errno::ACCESS)) || self.access == Access::ReadOnly {
            return result;
        }
        let _one = self.permissions.lock().unwrap_or_else(PoisonError::into_inner);
        self.lift(fd, mode, act)
    }

    /// As [`Self::lifted`], with the lock on permissions held.
    fn lift<T>(&self, fd: impl AsFd, mode: u32, act: impl Fn() -> Result<T>) -> Result<T> {
        let stat = host::stat(&fd)?;
        let before = u32::from(stat.stx_mode) & 0o7777;
        if stat.stx_uid != self.identity.uid || before & mode == mode || before & owner::SPECIAL != 0 {
            return act();
        }
        let link = Link::of(fd.as_fd());
        link.chmod(before | mode)?;
        let result = act();
        link.chmod(before)?;
        result
    }

    fn owner(&self, found: &Found) -> Owner {
        self.owner_of(&found.inode, found.fd.as_fd(), &found.stat)
    }

    fn owner_of(&self, inode: &Inode, fd: BorrowedFd<'_>, stat: &Statx) -> Owner {
        inode.owner(stat, self.identity, || self.lifted(fd, 0o400, || Owner::read(fd)).ok().flatten())
    }

    /// A file's attributes as the guest sees them.
    fn attributes(&self, inode: &Inode, fd: BorrowedFd<'_>, stat: &Statx) -> Attr {
        let owner = self.owner_of(inode, fd, stat);
        let special = if inode.has_attributes() { owner::SPECIAL } else { 0 };
        let time = |time: rustix::fs::StatxTimestamp| (time.tv_sec as u64, time.tv_nsec);
        let (atime, atimensec) = time(stat.stx_atime);
        let (mtime, mtimensec) = time(stat.stx_mtime);
        let (ctime, ctimensec) = time(stat.stx_ctime);
        let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
        Attr {
            ino: self.number(stat.stx_ino, (stat.stx_dev_major, stat.stx_dev_minor)),
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            atime,
            mtime,
            ctime,
            atimensec,
            mtimensec,
            ctimensec,
            mode: u32::from(stat.stx_mode) & !special | owner.special & special,
            nlink: stat.stx_nlink,
            uid: owner.uid,
            gid: owner.gid,
            // As the kernel's new_encode_dev has it.
            rdev: minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12,
            blksize: stat.stx_blksize,
            flags: 0,
        }
    }

    /// The inode number in the guest, where the whole share is one device.
    fn number(&self, inode: u64, device: (u32, u32)) -> u64 {
        if device == self.device {
            return inode;
        }
        let salt = (u64::from(device.0) << 32 | u64::from(device.1)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (inode ^ (salt & !0xffff_ffff)) | 1 << 63
    }

    fn attr_out(&self, found: &Found) -> AttrOut {
        let attr = self.attributes(&found.inode, found.fd.as_fd(), &found.stat);
        self.valid_attr(attr)
    }

    fn valid_attr(&self, attr: Attr) -> AttrOut {
        let (attr_valid, attr_valid_nsec) = self.valid();
        AttrOut { attr_valid, attr_valid_nsec, dummy: 0, attr }
    }

    fn entry(&self, found: &Found) -> EntryOut {
        let (valid, valid_nsec) = self.valid();
        let attr = self.attributes(&found.inode, found.fd.as_fd(), &found.stat);
        EntryOut {
            nodeid: found.inode.id,
            generation: 0,
            entry_valid: valid,
            attr_valid: valid,
            entry_valid_nsec: valid_nsec,
            attr_valid_nsec: valid_nsec,
            attr,
        }
    }

    /// Answers with an entry whose lookup has been counted.
    fn put_entry(&self, found: &Found, reply: &mut Reply<'_>) -> Result<()> {
        // If it cannot be told, it is not counted by the guest.
        reply.put(&self.entry(found)).inspect_err(|_| self.inodes.forget(found.inode.id, 1))
    }

    /// Opens a regular file or directory anew.
    fn reopen(&self, fd: &OwnedFd, kind: FileType, flags: OFlags) -> Result<OwnedFd> {
        let (flags, mode) = match kind {
            FileType::RegularFile => (flags, 0o600),
            FileType::Directory => (flags | OFlags::DIRECTORY, 0o700),
            _ => return Err(Errno::NXIO),
        };
        self.lifted(fd, mode, || Link::of(fd.as_fd()).open(flags))
    }
}
