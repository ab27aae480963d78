//! A guest's side of the protocol, for tests. Panics where an answer is malformed.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::*;

/// Takes requests and gives answers.
type Server = Box<dyn Fn(&[u8], usize) -> Vec<u8> + Send + Sync>;

/// A guest: its kernel, and a process in it.
pub(crate) struct Guest {
    server: Server,
    next: AtomicU64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

pub(crate) type Answer<T> = Result<T, i32>;

pub(crate) const ENOENT: i32 = libc::ENOENT;

impl Guest {
    /// `server` takes a request and the room for the answer.
    pub(crate) fn new(server: impl Fn(&[u8], usize) -> Vec<u8> + Send + Sync + 'static) -> Self {
        let guest = Self { server: Box::new(server), next: 2.into(), uid: 0, gid: 0 };
        let flags = !(1u32 << 30);
        let out: InitOut = guest
            .ask(op::INIT, 0, InitIn { major: 7, minor: 45, max_readahead: 1 << 17, flags }.as_bytes())
            .map(|answer| InitOut::read_from_bytes(&answer).unwrap())
            .unwrap();
        assert_eq!((out.major, out.minor, out.max_pages), (7, 38, 256));
        guest
    }

    pub(crate) fn raw(&self, request: &[u8], room: usize) -> Vec<u8> {
        (self.server)(request, room)
    }

    /// Sends a request and returns the answer's body.
    pub(crate) fn ask_for(&self, opcode: u32, nodeid: u64, body: &[u8], room: usize) -> Answer<Vec<u8>> {
        let unique = self.next.fetch_add(2, Ordering::Relaxed);
        let header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode,
            unique,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            pid: 1,
            ..InHeader::default()
        };
        let answer = self.raw(&[header.as_bytes(), body].concat(), OUT_HEADER + room);
        if matches!(opcode, op::FORGET | op::BATCH_FORGET) {
            assert!(answer.is_empty());
            return Ok(answer);
        }
        let (out, body) = OutHeader::read_from_prefix(&answer).expect("an answer has a header");
        assert_eq!((out.len as usize, out.unique), (answer.len(), unique));
        if out.error != 0 {
            assert!(out.error < 0 && out.error > -4096 && body.is_empty());
            return Err(-out.error);
        }
        Ok(body.to_vec())
    }

    pub(crate) fn ask(&self, opcode: u32, nodeid: u64, body: &[u8]) -> Answer<Vec<u8>> {
        self.ask_for(opcode, nodeid, body, 4096)
    }

    fn named<T: FromBytes>(&self, opcode: u32, dir: u64, head: &[u8], name: &str) -> Answer<T> {
        let body = [head, name.as_bytes(), b"\0"].concat();
        self.ask(opcode, dir, &body).map(|answer| T::read_from_prefix(&answer).unwrap().0)
    }

    /// An entry; what is known not to be there is ENOENT.
    pub(crate) fn lookup(&self, dir: u64, name: &str) -> Answer<EntryOut> {
        let entry: EntryOut = self.named(op::LOOKUP, dir, b"", name)?;
        if entry.nodeid == 0 { Err(ENOENT) } else { Ok(entry) }
    }

    /// The node at the end of a path below the root.
    pub(crate) fn walk(&self, path: &str) -> Answer<u64> {
        path.split('/').try_fold(ROOT_ID, |dir, name| Ok(self.lookup(dir, name)?.nodeid))
    }

    pub(crate) fn mkdir(&self, dir: u64, name: &str, mode: u32) -> Answer<EntryOut> {
        self.named(op::MKDIR, dir, MkdirIn { mode, umask: 0 }.as_bytes(), name)
    }

    pub(crate) fn mknod(&self, dir: u64, name: &str, mode: u32) -> Answer<EntryOut> {
        self.named(op::MKNOD, dir, MknodIn { mode, rdev: 0x103, ..MknodIn::default() }.as_bytes(), name)
    }

    pub(crate) fn symlink(&self, dir: u64, name: &str, target: &str) -> Answer<EntryOut> {
        self.named(op::SYMLINK, dir, b"", &format!("{name}\0{target}"))
    }

    pub(crate) fn readlink(&self, node: u64) -> Answer<String> {
        self.ask(op::READLINK, node, b"").map(|target| String::from_utf8(target).unwrap())
    }

    pub(crate) fn link(&self, dir: u64, name: &str, node: u64) -> Answer<EntryOut> {
        self.named(op::LINK, dir, LinkIn { oldnodeid: node }.as_bytes(), name)
    }

    pub(crate) fn unlink(&self, dir: u64, name: &str) -> Answer<()> {
        self.ask(op::UNLINK, dir, &[name.as_bytes(), b"\0"].concat()).map(drop)
    }

    pub(crate) fn rmdir(&self, dir: u64, name: &str) -> Answer<()> {
        self.ask(op::RMDIR, dir, &[name.as_bytes(), b"\0"].concat()).map(drop)
    }

    pub(crate) fn rename(&self, dir: u64, name: &str, newdir: u64, new: &str, flags: u32) -> Answer<()> {
        let head = Rename2In { newdir, flags, padding: 0 };
        self.ask(op::RENAME2, dir, &[head.as_bytes(), name.as_bytes(), b"\0", new.as_bytes(), b"\0"].concat()).map(drop)
    }

    pub(crate) fn create(&self, dir: u64, name: &str, flags: i32, mode: u32) -> Answer<(EntryOut, OpenOut)> {
        let head = CreateIn { flags: flags as u32, mode, ..CreateIn::default() };
        self.named::<[u8; 144]>(op::CREATE, dir, head.as_bytes(), name)
            .map(|both| (EntryOut::read_from_prefix(&both).unwrap().0, OpenOut::read_from_suffix(&both).unwrap().1))
    }

    pub(crate) fn open(&self, node: u64, flags: i32) -> Answer<OpenOut> {
        let answer = self.ask(op::OPEN, node, OpenIn { flags: flags as u32, open_flags: 0 }.as_bytes())?;
        Ok(OpenOut::read_from_bytes(&answer).unwrap())
    }

    pub(crate) fn release(&self, fh: u64) {
        self.ask(op::RELEASE, 0, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes()).unwrap();
    }

    pub(crate) fn read(&self, fh: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let body = ReadIn { fh, offset, size, ..ReadIn::default() };
        self.ask_for(op::READ, 0, body.as_bytes(), size as usize)
    }

    /// Of a file that is not opened.
    pub(crate) fn read_of(&self, node: u64, offset: u64, size: u32) -> Answer<Vec<u8>> {
        let body = ReadIn { offset, size, ..ReadIn::default() };
        self.ask_for(op::READ, node, body.as_bytes(), size as usize)
    }

    /// To a file that is not opened.
    pub(crate) fn write_of(&self, node: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        let head = WriteIn { offset, size: data.len() as u32, write_flags: WRITE_CACHE, ..WriteIn::default() };
        let answer = self.ask(op::WRITE, node, &[head.as_bytes(), data].concat())?;
        Ok(WriteOut::read_from_bytes(&answer).unwrap().size)
    }

    pub(crate) fn write_with(&self, fh: u64, offset: u64, data: &[u8], write_flags: u32) -> Answer<u32> {
        let head = WriteIn { fh, offset, size: data.len() as u32, write_flags, ..WriteIn::default() };
        let answer = self.ask(op::WRITE, 0, &[head.as_bytes(), data].concat())?;
        Ok(WriteOut::read_from_bytes(&answer).unwrap().size)
    }

    pub(crate) fn write(&self, fh: u64, offset: u64, data: &[u8]) -> Answer<u32> {
        self.write_with(fh, offset, data, 0)
    }

    pub(crate) fn getattr(&self, node: u64) -> Answer<Attr> {
        let answer = self.ask(op::GETATTR, node, GetattrIn::default().as_bytes())?;
        Ok(AttrOut::read_from_bytes(&answer).unwrap().attr)
    }

    pub(crate) fn setattr(&self, node: u64, change: SetattrIn) -> Answer<Attr> {
        let answer = self.ask(op::SETATTR, node, change.as_bytes())?;
        Ok(AttrOut::read_from_bytes(&answer).unwrap().attr)
    }

    pub(crate) fn forget(&self, node: u64, nlookup: u64) {
        self.ask(op::FORGET, node, ForgetIn { nlookup }.as_bytes()).unwrap();
    }

    pub(crate) fn setxattr(&self, node: u64, name: &str, value: &[u8]) -> Answer<()> {
        let head = SetxattrIn { size: value.len() as u32, flags: 0 };
        self.ask(op::SETXATTR, node, &[head.as_bytes(), name.as_bytes(), b"\0", value].concat()).map(drop)
    }

    pub(crate) fn getxattr(&self, node: u64, name: &str, size: u32) -> Answer<Vec<u8>> {
        let head = GetxattrIn { size, padding: 0 };
        self.ask(op::GETXATTR, node, &[head.as_bytes(), name.as_bytes(), b"\0"].concat())
    }

    pub(crate) fn listxattr(&self, node: u64) -> Answer<Vec<u8>> {
        self.ask(op::LISTXATTR, node, GetxattrIn { size: 4096, padding: 0 }.as_bytes())
    }

    /// All entries, by READDIRPLUS or READDIR, in buffers of `size`: name, number, kind and, for READDIRPLUS, entry.
    pub(crate) fn list(&self, node: u64, plus: bool, size: u32) -> Answer<Vec<(String, Dirent, EntryOut)>> {
        let opened = match self.ask(op::OPENDIR, node, OpenIn::default().as_bytes()) {
            Err(libc::ENOSYS) => OpenOut::default(),
            other => OpenOut::read_from_bytes(&other?).unwrap(),
        };
        let fh = opened.fh;
        let opcode = if plus { op::READDIRPLUS } else { op::READDIR };
        let (mut all, mut offset) = (Vec::new(), 0);
        loop {
            let body = ReadIn { fh, offset, size, ..ReadIn::default() };
            let answer = self.ask_for(opcode, node, body.as_bytes(), size as usize)?;
            if answer.is_empty() && fh == 0 {
                return Ok(all);
            }
            if answer.is_empty() {
                self.ask(op::RELEASEDIR, node, ReleaseIn { fh, ..ReleaseIn::default() }.as_bytes())?;
                return Ok(all);
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let mut entry = EntryOut::default();
                if plus {
                    (entry, rest) = EntryOut::read_from_prefix(rest).unwrap();
                }
                let (dirent, tail) = Dirent::read_from_prefix(rest).unwrap();
                let name = String::from_utf8(tail[..dirent.namelen as usize].to_vec()).unwrap();
                rest = &tail[(dirent.namelen as usize).next_multiple_of(8)..];
                offset = dirent.off;
                all.push((name, dirent, entry));
            }
        }
    }
}

/// The number of an error.
pub(crate) fn raw(errno: Errno) -> i32 {
    errno.raw_os_error()
}
