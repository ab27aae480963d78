//! Open files and directories.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, FileType, OFlags, RawDir, SeekFrom, Statx};
use rustix::io::{Errno, ReadWriteFlags};
use zerocopy::IntoBytes;

use super::{FileSystem, MAX_DATA};
use crate::abi::{
    self, CopyFileRangeIn, Dirent, EntryOut, FallocateIn, FsyncIn, LseekIn, LseekOut, OpenIn, OpenOut, ReadIn,
    ReleaseIn, StatfsOut, WriteIn, WriteOut,
};
use crate::host::{self, Link};
use crate::inode::Inode;
use crate::owner::SPECIAL;
use crate::reply::Reply;
use crate::request::Result;

/// Bytes of directory entries read from the host at a time.
const DIR_BUFFER: usize = 32 << 10;

/// Something open.
pub(super) enum Handle {
    File {
        fd: OwnedFd,
        inode: Arc<Inode>,
        append: bool,
    },
    /// The lock is for the position, which all requests share.
    Dir {
        fd: Mutex<OwnedFd>,
        inode: Arc<Inode>,
    },
}

/// What of the guest's flags of open(2) is the host's to do, and whether to append: that is done for each write, because the handle may
/// also be used to write mapped pages back to where they belong.
pub(super) fn open_flags(flags: u32) -> (OFlags, bool) {
    let flags = OFlags::from_bits_retain(flags);
    let kept = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
    (flags & kept, flags.contains(OFlags::APPEND))
}

/// Offsets and lengths are signed on the host.
fn offset(value: u64) -> Result<u64> {
    i64::try_from(value).map(|_| value).map_err(|_| Errno::INVAL)
}

fn again<T>(mut act: impl FnMut() -> Result<T>) -> Result<T> {
    loop {
        match act() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

impl FileSystem {
    fn add_handle(&self, handle: Handle) -> Result<u64> {
        let mut handles = self.handles.write().unwrap_or_else(PoisonError::into_inner);
        if handles.len() >= self.max_handles {
            return Err(Errno::NFILE);
        }
        let number = self.last_handle.fetch_add(1, Ordering::Relaxed) + 1;
        handles.insert(number, Arc::new(handle));
        Ok(number)
    }

    fn handle(&self, number: u64) -> Result<Arc<Handle>> {
        let handles = self.handles.read().unwrap_or_else(PoisonError::into_inner);
        handles.get(&number).cloned().ok_or(Errno::BADF)
    }

    /// Uses an open file; where files are not opened (handle 0), the file `id`, to `write` to it or not.
    pub(super) fn with_file<T>(
        &self,
        number: u64,
        id: u64,
        write: bool,
        act: impl FnOnce(&OwnedFd, &Inode, bool) -> Result<T>,
    ) -> Result<T> {
        if number == 0 && self.exclusive {
            let inode = self.inodes.get(id)?;
            let flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
            let fd = inode.file(&self.inodes, write, |held| match inode.kind {
                FileType::Directory => Err(Errno::ISDIR),
                kind => self.reopen(held, kind, flags),
            })?;
            return act(&fd, &inode, false);
        }
        match &*self.handle(number)? {
            Handle::File { fd, inode, append } => act(fd, inode, *append),
            Handle::Dir { .. } => Err(Errno::ISDIR),
        }
    }

    pub(super) fn add_file(&self, fd: OwnedFd, inode: Arc<Inode>, append: bool, stat: &Statx) -> Result<OpenOut> {
        let open_flags = if self.exclusive || inode.reopened(stat) { abi::FOPEN_KEEP_CACHE } else { 0 };
        Ok(OpenOut { fh: self.add_handle(Handle::File { fd, inode, append })?, open_flags, padding: 0 })
    }

    pub(super) fn open(&self, id: u64, asked: OpenIn, reply: &mut Reply<'_>) -> Result<()> {
        if self.no_open.load(Ordering::Relaxed) {
            // The guest opens files by itself from now on.
            return Err(Errno::NOSYS);
        }
        let inode = self.inodes.get(id)?;
        let (flags, append) = open_flags(asked.flags);
        if flags.intersects(OFlags::WRONLY | OFlags::RDWR | OFlags::TRUNC) {
            self.changing()?;
        }
        if inode.kind == FileType::Directory {
            return Err(Errno::ISDIR);
        }
        let held = inode.fd(&self.inodes)?;
        let file = self.reopen(&held, inode.kind, flags)?;
        let stat = host::stat(&file)?;
        if asked.open_flags & abi::OPEN_KILL_SUIDGID != 0 && flags.contains(OFlags::TRUNC) {
            self.drop_special(&inode)?;
        }
        reply.put(&self.add_file(file, inode, append, &stat)?)
    }

    pub(super) fn opendir(&self, id: u64, reply: &mut Reply<'_>) -> Result<()> {
        if self.no_opendir.load(Ordering::Relaxed) {
            return Err(Errno::NOSYS);
        }
        let inode = self.inodes.get(id)?;
        if inode.kind != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let fd = self.reopen(&*inode.fd(&self.inodes)?, inode.kind, OFlags::RDONLY)?;
        let fh = self.add_handle(Handle::Dir { fd: Mutex::new(fd), inode })?;
        let open_flags = if self.exclusive { abi::FOPEN_KEEP_CACHE | abi::FOPEN_CACHE_DIR } else { 0 };
        reply.put(&OpenOut { fh, open_flags, padding: 0 })
    }

    pub(super) fn release(&self, asked: ReleaseIn) {
        let gone = self.handles.write().unwrap_or_else(PoisonError::into_inner).remove(&asked.fh);
        drop(gone); // with the lock released: closing may take time
    }

    pub(super) fn read(&self, id: u64, asked: ReadIn, reply: &mut Reply<'_>) -> Result<()> {
        let at = offset(asked.offset)?;
        self.with_file(asked.fh, id, false, |fd, _, _| {
            let want = (asked.size as usize).min(MAX_DATA);
            let mut done = 0;
            // Short only at the end of the file: the guest takes the rest for zeros.
            while let Some(room) = reply.room().get_mut(..want - done).filter(|room| !room.is_empty()) {
                let from = at.saturating_add(done as u64);
                match again(|| rustix::io::preadv(fd, &mut [IoSliceMut::new(room)], from)) {
                    Ok(0) => break,
                    Ok(count) => {
                        done += count;
                        reply.advance(count);
                    }
                    Err(_) if done > 0 => break,
                    Err(errno) => return Err(errno),
                }
            }
            Ok(())
        })
    }

    pub(super) fn write(&self, id: u64, asked: WriteIn, data: &[u8], reply: &mut Reply<'_>) -> Result<()> {
        self.changing()?;
        let at = offset(asked.offset)?;
        self.with_file(asked.fh, id, true, |fd, inode, append| {
            if asked.write_flags & abi::WRITE_KILL_SUIDGID != 0 {
                self.drop_special(inode)?;
            }
            let append = append && asked.write_flags & abi::WRITE_CACHE == 0;
            let flags = if append { ReadWriteFlags::APPEND } else { ReadWriteFlags::empty() };
            let mut done = 0;
            while let Some(rest) = data.get(done..).filter(|rest| !rest.is_empty()) {
                let to = at.saturating_add(done as u64);
                match again(|| rustix::io::pwritev2(fd, &[IoSlice::new(rest)], to, flags)) {
                    Ok(0) => break,
                    Ok(count) => done += count,
                    Err(_) if done > 0 => break,
                    Err(errno) => return Err(errno),
                }
            }
            reply.put(&WriteOut { size: u32::try_from(done).unwrap_or(u32::MAX), padding: 0 })
        })
    }

    pub(super) fn fsync(&self, id: u64, asked: FsyncIn) -> Result<()> {
        let data_only = asked.fsync_flags & abi::FSYNC_FDATASYNC != 0;
        if asked.fh == 0 && self.exclusive {
            let inode = self.inodes.get(id)?;
            if inode.kind == FileType::Directory {
                let fd = self.reopen(&*inode.fd(&self.inodes)?, inode.kind, OFlags::RDONLY)?;
                return rustix::fs::fsync(fd);
            }
            let sync = |fd: &OwnedFd| if data_only { rustix::fs::fdatasync(fd) } else { rustix::fs::fsync(fd) };
            return self.with_file(0, id, false, |fd, _, _| sync(fd));
        }
        match &*self.handle(asked.fh)? {
            Handle::File { fd, .. } if data_only => rustix::fs::fdatasync(fd),
            Handle::File { fd, .. } => rustix::fs::fsync(fd),
            Handle::Dir { fd, .. } => rustix::fs::fsync(&*fd.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    pub(super) fn fallocate(&self, id: u64, asked: FallocateIn) -> Result<()> {
        self.changing()?;
        let mode = FallocateFlags::from_bits(asked.mode).ok_or(Errno::OPNOTSUPP)?;
        let (at, len) = (offset(asked.offset)?, offset(asked.length)?);
        self.with_file(asked.fh, id, true, |fd, _, _| again(|| rustix::fs::fallocate(fd, mode, at, len)))
    }

    pub(super) fn lseek(&self, id: u64, asked: LseekIn, reply: &mut Reply<'_>) -> Result<()> {
        let at = offset(asked.offset)?;
        let whence = match i32::try_from(asked.whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(at),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(at),
            _ => return Err(Errno::INVAL),
        };
        // The file's own position is used by nothing else.
        let offset = self.with_file(asked.fh, id, false, |fd, _, _| rustix::fs::seek(fd, whence))?;
        reply.put(&LseekOut { offset })
    }

    pub(super) fn copy_file_range(&self, id: u64, asked: CopyFileRangeIn, reply: &mut Reply<'_>) -> Result<()> {
        self.changing()?;
        let (mut from, mut to) = (offset(asked.off_in)?, offset(asked.off_out)?);
        // No longer at a time than others should wait for.
        let len = usize::try_from(asked.len).unwrap_or(usize::MAX).min(64 << 20);
        if asked.flags != 0 {
            return Err(Errno::INVAL);
        }
        let count = self.with_file(asked.fh_in, id, false, |source, _, _| {
            self.with_file(asked.fh_out, asked.nodeid_out, true, |target, _, _| {
                again(|| rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), len))
            })
        })?;
        reply.put(&WriteOut { size: u32::try_from(count).unwrap_or(u32::MAX), padding: 0 })
    }

    pub(super) fn statfs(&self, reply: &mut Reply<'_>) -> Result<()> {
        let stat = rustix::fs::fstatvfs(&self.root)?;
        let narrow = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
        reply.put(&StatfsOut {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: narrow(stat.f_bsize),
            namelen: narrow(stat.f_namemax),
            frsize: narrow(stat.f_frsize),
            ..StatfsOut::default()
        })
    }

    /// READDIR, or with `plus` READDIRPLUS, which also looks each name up.
    pub(super) fn readdir(&self, id: u64, asked: ReadIn, plus: bool, reply: &mut Reply<'_>) -> Result<()> {
        let at = offset(asked.offset)?;
        let handle = if asked.fh == 0 && self.exclusive {
            let inode = self.inodes.get(id)?;
            if inode.kind != FileType::Directory {
                return Err(Errno::NOTDIR);
            }
            let fd = Mutex::new(self.reopen(&*inode.fd(&self.inodes)?, inode.kind, OFlags::RDONLY)?);
            Arc::new(Handle::Dir { fd, inode })
        } else {
            self.handle(asked.fh)?
        };
        let Handle::Dir { fd, inode: dir } = &*handle else { return Err(Errno::NOTDIR) };
        let fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
        rustix::fs::seek(&*fd, SeekFrom::Start(at))?;
        let mut room = reply.room().len().min(asked.size as usize);
        let mut buffer = vec![MaybeUninit::uninit(); DIR_BUFFER];
        let mut entries = RawDir::new(&*fd, &mut buffer);
        let mut any = false;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if any => break,
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name();
            let bytes = name.to_bytes();
            let head = size_of::<Dirent>() + if plus { size_of::<EntryOut>() } else { 0 };
            let len = (head + bytes.len()).next_multiple_of(8);
            if len > room {
                // Not even one fits: the guest's buffer is too small.
                return if any { Ok(()) } else { Err(Errno::INVAL) };
            }
            let leads_up = matches!(bytes, b"." | b"..");
            let found = if plus && !leads_up { self.find(dir, name).ok() } else { None };
            // Beyond the root the guest sees nothing, not even a number.
            let ino = match &found {
                Some(found) => self.number(found.stat.stx_ino, (found.stat.stx_dev_major, found.stat.stx_dev_minor)),
                None if bytes == b".." => abi::ROOT_ID,
                None => entry.ino(),
            };
            if plus {
                // Zeros: nothing is known of it.
                let entry = found.as_ref().map_or_else(EntryOut::default, |found| self.entry(found));
                reply.put(&entry)?;
            }
            let kind = (entry.file_type().as_raw_mode() >> 12) & 0xf;
            let dirent = Dirent { ino, off: entry.next_entry_cookie(), namelen: bytes.len() as u32, kind };
            reply.bytes(dirent.as_bytes())?;
            reply.bytes(bytes)?;
            reply.bytes([0; 7].get(..len - head - bytes.len()).unwrap_or_default())?;
            room -= len;
            any = true;
        }
        Ok(())
    }

    /// A write takes the set-user-id and set-group-id bits away.
    pub(super) fn drop_special(&self, inode: &Inode) -> Result<()> {
        let fd = inode.fd(&self.inodes)?;
        let stat = host::stat(&*fd)?;
        let mode = u32::from(stat.stx_mode);
        let mut owner = self.owner_of(inode, fd.as_fd(), &stat);
        // With files of others the host's kernel sees to it.
        if owner.special == 0 || stat.stx_uid != self.identity.uid {
            return Ok(());
        }
        owner.special = kept_special(owner.special, mode);
        let _one = self.permissions.lock().unwrap_or_else(PoisonError::into_inner);
        if mode & SPECIAL != 0 {
            Link::of(fd.as_fd()).chmod(mode)?;
        }
        self.set_owner(&fd, &stat, owner)
    }
}

/// What is left of these bits after a write: a set-group-id bit without the group's right to execute means something else.
pub(super) fn kept_special(special: u32, mode: u32) -> u32 {
    if mode & 0o010 == 0 { special & crate::owner::SET_GROUP } else { 0 }
}
