//! The FUSE protocol as Linux speaks it over virtio-fs (Linux, include/uapi/linux/fuse.h, version 7.38): numbers are little-endian,
//! structures as the kernel lays them out.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// FUSE_KERNEL_VERSION
pub const MAJOR: u32 = 7;
/// The minor version this server speaks: FUSE_KERNEL_MINOR_VERSION of Linux 6.2.
pub const MINOR: u32 = 38;
/// The oldest minor version accepted: Linux 5.4, the first with virtio-fs.
pub const OLDEST_MINOR: u32 = 31;
/// FUSE_ROOT_ID
pub const ROOT_ID: u64 = 1;

/// Operations, `enum fuse_opcode`.
pub mod op {
    #![allow(missing_docs)] // named as in fuse.h
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const FSYNC: u32 = 20;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const FSYNCDIR: u32 = 30;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const LSEEK: u32 = 46;
    pub const COPY_FILE_RANGE: u32 = 47;
    pub const SYNCFS: u32 = 50;
    pub const TMPFILE: u32 = 51;
}

/// Flags of INIT.
pub mod init {
    #![allow(missing_docs)] // named as in fuse.h
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const ATOMIC_O_TRUNC: u32 = 1 << 3;
    pub const BIG_WRITES: u32 = 1 << 5;
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub const HANDLE_KILLPRIV_V2: u32 = 1 << 28;
}

/// Bits of [`SetattrIn::valid`].
pub mod fattr {
    #![allow(missing_docs)] // named as in fuse.h
    pub const MODE: u32 = 1 << 0;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const FH: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
    pub const KILL_SUIDGID: u32 = 1 << 11;
}

/// FOPEN_KEEP_CACHE: what the guest has in its page cache is still right.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// FOPEN_CACHE_DIR: the guest may keep a directory's entries.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// FUSE_GETATTR_FH: the file handle is valid.
pub const GETATTR_FH: u32 = 1 << 0;
/// FUSE_WRITE_CACHE: from the page cache (of a mapped file), with any handle of the file.
pub const WRITE_CACHE: u32 = 1 << 0;
/// FUSE_WRITE_KILL_SUIDGID
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// FUSE_OPEN_KILL_SUIDGID
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// FUSE_FSYNC_FDATASYNC
pub const FSYNC_FDATASYNC: u32 = 1 << 0;

macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $type:ty),* $(,)? })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
        #[repr(C)]
        #[allow(missing_docs)] // named as in fuse.h
        pub struct $name { $(pub $field: $type),* }
    )*};
}

wire! {
    /// Starts every request.
    InHeader { len: u32, opcode: u32, unique: u64, nodeid: u64, uid: u32, gid: u32, pid: u32, total_extlen: u16, padding: u16 }
    /// Starts every answer.
    OutHeader { len: u32, error: i32, unique: u64 }
    /// `struct fuse_attr`
    Attr {
        ino: u64, size: u64, blocks: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32, mtimensec: u32, ctimensec: u32,
        mode: u32, nlink: u32, uid: u32, gid: u32, rdev: u32, blksize: u32, flags: u32,
    }
    /// Answer to LOOKUP and all that makes names.
    EntryOut {
        nodeid: u64, generation: u64, entry_valid: u64, attr_valid: u64, entry_valid_nsec: u32, attr_valid_nsec: u32, attr: Attr,
    }
    /// Answer to GETATTR and SETATTR.
    AttrOut { attr_valid: u64, attr_valid_nsec: u32, dummy: u32, attr: Attr }
    /// FORGET
    ForgetIn { nlookup: u64 }
    /// One of BATCH_FORGET
    ForgetOne { nodeid: u64, nlookup: u64 }
    /// BATCH_FORGET
    BatchForgetIn { count: u32, dummy: u32 }
    /// GETATTR
    GetattrIn { getattr_flags: u32, dummy: u32, fh: u64 }
    /// MKNOD
    MknodIn { mode: u32, rdev: u32, umask: u32, padding: u32 }
    /// MKDIR
    MkdirIn { mode: u32, umask: u32 }
    /// RENAME
    RenameIn { newdir: u64 }
    /// RENAME2
    Rename2In { newdir: u64, flags: u32, padding: u32 }
    /// LINK
    LinkIn { oldnodeid: u64 }
    /// SETATTR
    SetattrIn {
        valid: u32, padding: u32, fh: u64, size: u64, lock_owner: u64, atime: u64, mtime: u64, ctime: u64, atimensec: u32,
        mtimensec: u32, ctimensec: u32, mode: u32, unused4: u32, uid: u32, gid: u32, unused5: u32,
    }
    /// OPEN and OPENDIR
    OpenIn { flags: u32, open_flags: u32 }
    /// CREATE and TMPFILE
    CreateIn { flags: u32, mode: u32, umask: u32, open_flags: u32 }
    /// Answer to OPEN and OPENDIR
    OpenOut { fh: u64, open_flags: u32, padding: u32 }
    /// RELEASE and RELEASEDIR
    ReleaseIn { fh: u64, flags: u32, release_flags: u32, lock_owner: u64 }
    /// READ, READDIR, READDIRPLUS
    ReadIn { fh: u64, offset: u64, size: u32, read_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// WRITE; the data follow.
    WriteIn { fh: u64, offset: u64, size: u32, write_flags: u32, lock_owner: u64, flags: u32, padding: u32 }
    /// Answer to WRITE and COPY_FILE_RANGE
    WriteOut { size: u32, padding: u32 }
    /// Answer to STATFS
    StatfsOut {
        blocks: u64, bfree: u64, bavail: u64, files: u64, ffree: u64, bsize: u32, namelen: u32, frsize: u32, padding: u32,
        spare: [u32; 6],
    }
    /// FSYNC and FSYNCDIR
    FsyncIn { fh: u64, fsync_flags: u32, padding: u32 }
    /// SETXATTR without the extension of 7.33, which is not negotiated; name and value follow.
    SetxattrIn { size: u32, flags: u32 }
    /// GETXATTR (the name follows) and LISTXATTR
    GetxattrIn { size: u32, padding: u32 }
    /// Answer to those with size 0
    GetxattrOut { size: u32, padding: u32 }
    /// INIT, as far as is used
    InitIn { major: u32, minor: u32, max_readahead: u32, flags: u32 }
    /// Answer to INIT
    InitOut {
        major: u32, minor: u32, max_readahead: u32, flags: u32, max_background: u16, congestion_threshold: u16, max_write: u32,
        time_gran: u32, max_pages: u16, map_alignment: u16, flags2: u32, unused: [u32; 7],
    }
    /// FALLOCATE
    FallocateIn { fh: u64, offset: u64, length: u64, mode: u32, padding: u32 }
    /// LSEEK
    LseekIn { fh: u64, offset: u64, whence: u32, padding: u32 }
    /// Answer to LSEEK
    LseekOut { offset: u64 }
    /// COPY_FILE_RANGE
    CopyFileRangeIn { fh_in: u64, off_in: u64, nodeid_out: u64, fh_out: u64, off_out: u64, len: u64, flags: u64 }
    /// Starts an entry of READDIR; the name follows, padded to 8 bytes.
    Dirent { ino: u64, off: u64, namelen: u32, kind: u32 }
}

/// Bytes of [`InHeader`].
pub const IN_HEADER: usize = size_of::<InHeader>();
/// Bytes of [`OutHeader`].
pub const OUT_HEADER: usize = size_of::<OutHeader>();

#[cfg(test)]
mod tests {
    use super::*;

    /// Sizes as the C compiler has them.
    #[test]
    fn sizes() {
        assert_eq!((IN_HEADER, OUT_HEADER, size_of::<Attr>(), size_of::<EntryOut>()), (40, 16, 88, 128));
        assert_eq!((size_of::<AttrOut>(), size_of::<SetattrIn>(), size_of::<InitOut>()), (104, 88, 64));
        assert_eq!((size_of::<StatfsOut>(), size_of::<WriteIn>(), size_of::<CopyFileRangeIn>()), (80, 40, 56));
        assert_eq!((size_of::<Dirent>(), size_of::<OpenOut>(), size_of::<FallocateIn>()), (24, 16, 32));
    }
}
