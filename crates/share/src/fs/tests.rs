use super::*;
use crate::abi::*;
use crate::testing::{Answer, ENOENT, Guest, raw};
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use zerocopy::IntoBytes;

/// A directory with an outside: `root` is shared, `secret` beside it is not.
struct Rig {
    dir: tempfile::TempDir,
    system: Arc<FileSystem>,
    guest: Guest,
}

fn rig_with(access: Access, max_files: usize) -> Rig {
    rig_of(access, max_files, false)
}

fn rig_of(access: Access, max_files: usize, exclusive: bool) -> Rig {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("root")).unwrap();
    fs::write(dir.path().join("secret"), b"the host's").unwrap();
    let root = fs::File::open(dir.path().join("root")).unwrap();
    let system = FileSystem::new(root.into(), access, max_files).unwrap();
    let system = Arc::new(if exclusive { system.exclusive() } else { system });
    let server = system.clone();
    let guest = Guest::new(move |request, room| {
        let mut answer = vec![0; room];
        let len = server.serve(request, &mut answer);
        answer.truncate(len);
        answer
    });
    Rig { dir, system, guest }
}

fn rig() -> Rig {
    rig_with(Access::ReadWrite, 1000)
}

impl Rig {
    fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    fn outside_is_whole(&self) {
        assert_eq!(fs::read(self.dir.path().join("secret")).unwrap(), b"the host's");
        let names: Vec<_> = fs::read_dir(self.dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }
}

/// Where nobody else changes anything, the guest may keep what it knows, and files are not opened by requests. However few descriptors there
/// are, what has lost its name or got another stays the same file.
#[test]
fn an_exclusive_directory() {
    let rig = rig_of(Access::ReadWrite, 40, true);
    let (guest, root) = (&rig.guest, rig.root());
    let entry = guest.lookup(ROOT_ID, "none");
    assert_eq!(entry.err(), Some(ENOENT));
    let names = ["gone", "moved", "replaced", "with"];
    for name in names {
        fs::write(root.join(name), name).unwrap();
    }
    let nodes = names.map(|name| {
        let entry = guest.lookup(ROOT_ID, name).unwrap();
        assert_eq!((entry.entry_valid, entry.attr_valid), (3600, 3600));
        entry.nodeid
    });
    assert_eq!(guest.open(nodes[0], libc::O_RDWR).err(), Some(libc::ENOSYS));
    guest.unlink(ROOT_ID, "gone").unwrap();
    guest.rename(ROOT_ID, "moved", ROOT_ID, "elsewhere", 0).unwrap();
    guest.rename(ROOT_ID, "with", ROOT_ID, "replaced", 0).unwrap();
    for number in 0..100 {
        fs::write(root.join(format!("f{number}")), [number]).unwrap();
        let node = guest.walk(&format!("f{number}")).unwrap();
        assert_eq!(guest.read_of(node, 0, 9), Ok(vec![number]));
        assert_eq!(guest.write_of(node, 1, b"x"), Ok(1));
    }
    assert!(rig.system.inodes.open() <= 40, "{}", rig.system.inodes.open());
    for (node, name) in nodes.into_iter().zip(names) {
        assert_eq!(guest.read_of(node, 0, 20), Ok(name.as_bytes().to_vec()));
        assert_eq!(guest.write_of(node, 0, b"X"), Ok(1));
        assert_eq!(
            guest
                .setattr(node, SetattrIn { valid: fattr::SIZE | fattr::FH, size: 2, ..SetattrIn::default() })
                .unwrap()
                .size,
            2
        );
    }
    assert_eq!(fs::read(root.join("replaced")).unwrap(), b"Xi");
    assert_eq!(fs::read(root.join("elsewhere")).unwrap(), b"Xo");
    assert_eq!(fs::read(root.join("f7")).unwrap(), [7, b'x']);
    // What is made is opened as ever.
    let (_, made) = guest.create(ROOT_ID, "made", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(made.open_flags & FOPEN_KEEP_CACHE, FOPEN_KEEP_CACHE);
    guest.write(made.fh, 0, b"ab").unwrap();
    assert_eq!(guest.read(made.fh, 0, 9), Ok(b"ab".to_vec()));
    assert_eq!(guest.list(ROOT_ID, true, 4096).unwrap().len(), 105);
    assert_eq!(guest.read_of(ROOT_ID, 0, 9).err(), Some(libc::EISDIR));
    assert_eq!(guest.read_of(1 << 40, 0, 9).err(), Some(libc::ESTALE));
    // Otherwise there is no such thing as handle 0.
    assert_eq!(crate::fs::tests::rig().guest.read_of(ROOT_ID, 0, 9).err(), Some(libc::EBADF));
    rig.outside_is_whole();
}

#[test]
fn nothing_leads_out() {
    let rig = rig();
    let (guest, root) = (&rig.guest, rig.root());
    fs::create_dir(root.join("sub")).unwrap();
    symlink("../secret", root.join("up")).unwrap();
    symlink(rig.dir.path(), root.join("all")).unwrap();
    symlink("/proc/self/root", root.join("magic")).unwrap();
    let sub = guest.walk("sub").unwrap();
    for name in ["..", ".", "", "../secret", "/etc/passwd", "sub/..", "sub/../../secret"] {
        for dir in [ROOT_ID, sub] {
            assert_eq!(guest.lookup(dir, name).err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.create(dir, name, libc::O_RDWR, 0o600).err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.mkdir(dir, name, 0o700).err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.unlink(dir, name).err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.rmdir(dir, name).err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.symlink(dir, name, "x").err(), Some(libc::EINVAL), "{name}");
            assert_eq!(guest.rename(ROOT_ID, "sub", dir, name, 0).err(), Some(libc::EINVAL), "{name}");
        }
    }
    for name in ["up", "all", "magic"] {
        // The link itself can be had, and no way goes through it.
        let link = guest.lookup(ROOT_ID, name).unwrap();
        assert_eq!(link.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_eq!(guest.lookup(link.nodeid, "secret").err(), Some(libc::ENOTDIR));
        assert_eq!(guest.open(link.nodeid, libc::O_RDWR).err(), Some(libc::ENXIO));
        assert_eq!(guest.create(link.nodeid, "x", libc::O_RDWR, 0o600).err(), Some(libc::ENOTDIR));
        assert_eq!(guest.create(ROOT_ID, name, libc::O_RDWR, 0o600).err(), Some(libc::ENXIO));
        assert_eq!(guest.list(link.nodeid, false, 4096).err(), Some(libc::ENOTDIR));
        let change = SetattrIn { valid: fattr::SIZE, ..SetattrIn::default() };
        assert_eq!(guest.setattr(link.nodeid, change).err(), Some(libc::EINVAL));
        let change = SetattrIn { valid: fattr::MODE | fattr::UID, mode: 0o777, uid: 3, ..SetattrIn::default() };
        guest.setattr(link.nodeid, change).unwrap();
        guest.link(sub, name, link.nodeid).unwrap();
        assert!(fs::symlink_metadata(root.join("sub").join(name)).unwrap().is_symlink());
    }
    // The numbers of what is beyond the root do not show.
    let names = guest.list(ROOT_ID, false, 4096).unwrap();
    assert_eq!(names.iter().find(|entry| entry.0 == "..").unwrap().1.ino, ROOT_ID);
    rig.outside_is_whole();
}

/// Names change between directory and link while they are walked: whatever is found is inside.
#[test]
fn races_of_links_and_directories() {
    let rig = rig();
    let (root, stop) = (rig.root(), Arc::new(AtomicBool::new(false)));
    fs::create_dir(root.join("real")).unwrap();
    fs::write(root.join("real/secret"), b"inside").unwrap();
    symlink("..", root.join("link")).unwrap();
    fs::rename(root.join("real"), root.join("name")).unwrap();
    let swapper = {
        let (root, stop) = (root.clone(), stop.clone());
        std::thread::spawn(move || {
            let exchange = rustix::fs::RenameFlags::EXCHANGE;
            let dir = fs::File::open(&root).unwrap();
            let mut swaps = 0;
            while !stop.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(&dir, c"name", &dir, c"link", exchange).unwrap();
                swaps += 1;
            }
            swaps
        })
    };
    let (mut inside, mut refused) = (0, 0);
    let end = std::time::Instant::now() + std::time::Duration::from_secs(2);
    while std::time::Instant::now() < end {
        let guest = &rig.guest;
        let Ok(dir) = guest.lookup(ROOT_ID, "name") else { continue };
        match guest.lookup(dir.nodeid, "secret").and_then(|file| guest.open(file.nodeid, libc::O_RDWR)) {
            Ok(open) => {
                assert_eq!(guest.read(open.fh, 0, 100), Ok(b"inside".to_vec()));
                guest.release(open.fh);
                inside += 1;
            }
            Err(_) => refused += 1,
        }
        if let Ok((_, open)) = guest.create(dir.nodeid, "new", libc::O_RDWR, 0o600) {
            guest.release(open.fh);
            guest.unlink(dir.nodeid, "new").unwrap();
        }
    }
    stop.store(true, Ordering::Relaxed);
    let swaps = swapper.join().unwrap();
    assert!(inside > 0 && refused > 0 && swaps > 0, "{inside} {refused} {swaps}");
    rig.outside_is_whole();
}

#[test]
fn files_are_roots_in_the_guest_and_nobody_becomes_root_on_the_host() {
    let mut rig = rig();
    let root = rig.root();
    let own = fs::metadata(&root).unwrap();
    let (entry, _) = rig.guest.create(ROOT_ID, "program", libc::O_RDWR, 0o6755).unwrap();
    assert_eq!((entry.attr.uid, entry.attr.gid, entry.attr.mode), (0, 0, libc::S_IFREG | 0o6755));
    let host = |name: &str| fs::metadata(root.join(name)).unwrap();
    assert_eq!((host("program").uid(), host("program").mode()), (own.uid(), libc::S_IFREG | 0o755));
    // A user of the guest.
    (rig.guest.uid, rig.guest.gid) = (1000, 100);
    let (mine, open) = rig.guest.create(ROOT_ID, "mine", libc::O_RDWR, 0o640).unwrap();
    assert_eq!((mine.attr.uid, mine.attr.gid), (1000, 100));
    assert_eq!(host("mine").uid(), own.uid());
    let guest = &rig.guest;
    let change = SetattrIn { valid: fattr::MODE, mode: 0o4711, ..SetattrIn::default() };
    assert_eq!(guest.setattr(mine.nodeid, change).unwrap().mode & 0o7777, 0o4711);
    assert_eq!(host("mine").mode() & 0o7777, 0o711);
    // A write takes it away, as does another owner.
    guest.write_with(open.fh, 0, b"x", WRITE_KILL_SUIDGID).unwrap();
    assert_eq!(guest.getattr(mine.nodeid).unwrap().mode & 0o7777, 0o711);
    guest.setattr(mine.nodeid, change).unwrap();
    let chown = SetattrIn { valid: fattr::UID | fattr::GID, uid: 0, gid: 0, ..SetattrIn::default() };
    let attr = guest.setattr(mine.nodeid, chown).unwrap();
    assert_eq!((attr.uid, attr.gid, attr.mode & 0o7777), (0, 0, 0o711));
    // What is the default needs no attribute; the attribute cannot be seen or set.
    let list = |name: &str| rustix::fs::listxattr(root.join(name), &mut [0u8; 100][..]).unwrap();
    assert_eq!((list("mine"), list("program")), (0, owner::ATTRIBUTE.to_bytes_with_nul().len()));
    assert_eq!(guest.listxattr(entry.nodeid), Ok(vec![]));
    for name in ["user.tightrope.owner", "security.capability", "trusted.x", "system.posix_acl_access", "x"] {
        assert_eq!(guest.setxattr(entry.nodeid, name, b"0:0:4000"), Err(libc::EOPNOTSUPP), "{name}");
        assert_eq!(guest.getxattr(entry.nodeid, name, 99), Err(libc::EOPNOTSUPP), "{name}");
    }
    // No device nodes.
    for kind in [libc::S_IFBLK, libc::S_IFCHR] {
        assert_eq!(guest.mknod(ROOT_ID, "device", kind | 0o666).err(), Some(libc::EPERM));
    }
    // A directory whose group is handed on.
    let dir = guest.mkdir(ROOT_ID, "dir", 0o2755).unwrap();
    let chown = SetattrIn { valid: fattr::GID, gid: 55, ..SetattrIn::default() };
    assert_eq!(guest.setattr(dir.nodeid, chown).unwrap().mode & 0o7777, 0o2755);
    assert_eq!(host("dir").mode() & 0o7777, 0o755);
    let below = guest.mkdir(dir.nodeid, "below", 0o700).unwrap();
    assert_eq!((below.attr.gid, below.attr.mode & 0o7777), (55, 0o2700));
    assert_eq!(guest.create(below.nodeid, "file", libc::O_RDWR, 0o600).unwrap().0.attr.gid, 55);
}

#[test]
fn a_read_only_directory_stays_as_it_is() {
    let rig = rig_with(Access::ReadOnly, 1000);
    let (guest, root) = (&rig.guest, rig.root());
    fs::write(root.join("file"), b"content").unwrap();
    fs::create_dir(root.join("dir")).unwrap();
    let (file, dir) = (guest.walk("file").unwrap(), guest.walk("dir").unwrap());
    let open = guest.open(file, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(open.fh, 0, 100), Ok(b"content".to_vec()));
    guest.list(dir, true, 4096).unwrap();
    let refused = |what: &str, answer: Answer<()>| assert_eq!(answer, Err(libc::EROFS), "{what}");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        refused("open", guest.open(file, flags).map(drop));
    }
    refused("create", guest.create(ROOT_ID, "new", libc::O_RDWR, 0o600).map(drop));
    refused("create of what is there", guest.create(ROOT_ID, "file", libc::O_RDONLY, 0o600).map(drop));
    refused("tmpfile", guest.ask(op::TMPFILE, ROOT_ID, &[0; 24]).map(drop));
    refused("mknod", guest.mknod(ROOT_ID, "new", libc::S_IFREG | 0o600).map(drop));
    refused("mkdir", guest.mkdir(ROOT_ID, "new", 0o700).map(drop));
    refused("symlink", guest.symlink(ROOT_ID, "new", "x").map(drop));
    refused("link", guest.link(dir, "new", file).map(drop));
    refused("unlink", guest.unlink(ROOT_ID, "file"));
    refused("rmdir", guest.rmdir(ROOT_ID, "dir"));
    refused("rename", guest.rename(ROOT_ID, "file", dir, "new", 0));
    let head = RenameIn { newdir: dir };
    refused("old rename", guest.ask(op::RENAME, ROOT_ID, &[head.as_bytes(), b"file\0new\0"].concat()).map(drop));
    for valid in [fattr::MODE, fattr::UID, fattr::GID, fattr::SIZE, fattr::ATIME, fattr::MTIME] {
        refused("setattr", guest.setattr(file, SetattrIn { valid, ..SetattrIn::default() }).map(drop));
    }
    refused("write", guest.write(open.fh, 0, b"x").map(drop));
    let body = FallocateIn { fh: open.fh, length: 1, ..FallocateIn::default() };
    refused("fallocate", guest.ask(op::FALLOCATE, file, body.as_bytes()).map(drop));
    let body = CopyFileRangeIn { fh_in: open.fh, fh_out: open.fh, len: 1, ..CopyFileRangeIn::default() };
    refused("copy_file_range", guest.ask(op::COPY_FILE_RANGE, file, body.as_bytes()).map(drop));
    refused("setxattr", guest.setxattr(file, "user.x", b"y"));
    refused("removexattr", guest.ask(op::REMOVEXATTR, file, b"user.x\0").map(drop));
    assert_eq!(fs::read(root.join("file")).unwrap(), b"content");
    assert_eq!(fs::read_dir(&root).unwrap().count(), 2);
}

#[test]
fn files_and_their_ends() {
    let rig = rig();
    let (guest, root) = (&rig.guest, rig.root());
    let (entry, open) = guest.create(ROOT_ID, "a", libc::O_RDWR | libc::O_EXCL, 0o600).unwrap();
    assert_eq!(guest.create(ROOT_ID, "a", libc::O_RDWR | libc::O_EXCL, 0o600).err(), Some(libc::EEXIST));
    let (again, second) = guest.create(ROOT_ID, "a", libc::O_RDWR | libc::O_APPEND, 0o600).unwrap();
    assert_eq!(again.nodeid, entry.nodeid);
    guest.write(open.fh, 0, b"0123").unwrap();
    // Appended at the end, wherever the guest thinks that is; but mapped pages go where they belong.
    guest.write(second.fh, 0, b"45").unwrap();
    guest.write_with(second.fh, 0, b"AB", WRITE_CACHE).unwrap();
    assert_eq!(fs::read(root.join("a")).unwrap(), b"AB2345");
    assert_eq!(guest.read(open.fh, 4, 100), Ok(b"45".to_vec()));
    assert_eq!(guest.read(open.fh, 100, 100), Ok(vec![]));
    // A hard link is the same file.
    guest.link(ROOT_ID, "b", entry.nodeid).unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "b").unwrap().nodeid, entry.nodeid);
    // Without a name it is still open, and can be had by its handle.
    guest.unlink(ROOT_ID, "a").unwrap();
    guest.unlink(ROOT_ID, "b").unwrap();
    assert_eq!(guest.lookup(ROOT_ID, "a").err(), Some(ENOENT));
    assert_eq!(guest.read(open.fh, 0, 2), Ok(b"AB".to_vec()));
    assert_eq!(guest.getattr(entry.nodeid).unwrap().nlink, 0);
    guest.setattr(entry.nodeid, SetattrIn { valid: fattr::SIZE, size: 1, ..SetattrIn::default() }).unwrap();
    assert_eq!(guest.read(open.fh, 0, 100), Ok(b"A".to_vec()));
    // And another file of this name is another file.
    let other = guest.create(ROOT_ID, "a", libc::O_RDWR, 0o600).unwrap().0;
    assert_ne!(other.nodeid, entry.nodeid);
    guest.release(open.fh);
    assert_eq!(guest.read(open.fh, 0, 1), Err(libc::EBADF));
    assert_eq!(guest.read(u64::MAX, 0, 1), Err(libc::EBADF));
    for (offset, size) in [(u64::MAX, 1), (1 << 63, 1)] {
        assert_eq!(guest.read(second.fh, offset, size), Err(libc::EINVAL));
        assert_eq!(guest.write(second.fh, offset, b"x"), Err(libc::EINVAL));
    }
    // Lookups are counted: it is forgotten with the last.
    let count = rig.system.inodes.len();
    guest.forget(other.nodeid, 0);
    assert_eq!(rig.system.inodes.len(), count);
    guest.forget(other.nodeid, 1);
    assert_eq!(guest.getattr(other.nodeid).err(), Some(libc::ESTALE));
    guest.forget(ROOT_ID, u64::MAX);
    guest.getattr(ROOT_ID).unwrap();
    // A pipe or socket is never opened: that could block.
    guest.mknod(ROOT_ID, "pipe", libc::S_IFIFO | 0o600).unwrap();
    assert_eq!(guest.open(guest.walk("pipe").unwrap(), libc::O_RDONLY).err(), Some(libc::ENXIO));
    assert_eq!(guest.create(ROOT_ID, "pipe", libc::O_WRONLY, 0o600).err(), Some(libc::ENXIO));
}

#[test]
fn directories_of_any_size() {
    let rig = rig();
    let root = rig.root();
    for number in 0..700 {
        fs::write(root.join(format!("file with a long name, number {number}")), b"").unwrap();
    }
    for (plus, size) in [(false, 4096), (true, 4096), (true, 300), (false, 1 << 20)] {
        let mut names: Vec<_> = rig.guest.list(ROOT_ID, plus, size).unwrap().into_iter().map(|entry| entry.0).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 702);
    }
    // What READDIRPLUS tells counts as looked up.
    let entries = rig.guest.list(ROOT_ID, true, 4096).unwrap();
    let entry = entries.iter().find(|entry| entry.0.ends_with(" 5")).unwrap();
    assert_eq!((entry.1.kind, entry.2.attr.ino), (8, entry.1.ino));
    rig.guest.getattr(entry.2.nodeid).unwrap();
    assert_eq!(rig.guest.list(ROOT_ID, false, 30).err(), Some(libc::EINVAL));
}

#[test]
fn root_is_kept_out_by_no_permissions() {
    let rig = rig();
    let (guest, root) = (&rig.guest, rig.root());
    let dir = guest.mkdir(ROOT_ID, "dir", 0o555).unwrap().nodeid;
    let (file, open) = guest.create(dir, "file", libc::O_RDWR, 0o444).unwrap();
    guest.release(open.fh);
    guest.release(guest.open(file.nodeid, libc::O_RDWR).unwrap().fh);
    assert_eq!(fs::metadata(root.join("dir")).unwrap().mode() & 0o7777, 0o555);
    assert_eq!(fs::metadata(root.join("dir/file")).unwrap().mode() & 0o7777, 0o444);
    guest.setattr(dir, SetattrIn { valid: fattr::MODE, mode: 0, ..SetattrIn::default() }).unwrap();
    guest.lookup(dir, "file").unwrap();
    guest.rename(dir, "file", ROOT_ID, "moved", 0).unwrap();
    guest.list(dir, true, 4096).unwrap();
    assert_eq!(fs::metadata(root.join("dir")).unwrap().mode() & 0o7777, 0);
}

#[test]
fn what_the_guest_has_read_is_kept_while_it_is_right() {
    let rig = rig();
    let path = rig.root().join("file");
    fs::write(&path, b"1").unwrap();
    let file = rig.guest.walk("file").unwrap();
    let open = || rig.guest.open(file, libc::O_RDONLY).unwrap().open_flags & FOPEN_KEEP_CACHE != 0;
    let settle = || std::thread::sleep(std::time::Duration::from_millis(80));
    settle();
    assert!(!open() && open() && open());
    fs::write(&path, b"2").unwrap();
    assert!(!open());
    settle();
    open();
    assert!(open());
}

#[test]
fn few_descriptors_for_many_files() {
    let rig = rig_with(Access::ReadWrite, 64);
    let (guest, root) = (&rig.guest, rig.root());
    let mut nodes = Vec::new();
    for number in 0..300 {
        fs::write(root.join(format!("f{number}")), format!("{number}")).unwrap();
        nodes.push(guest.walk(&format!("f{number}")).unwrap());
        assert!(rig.system.inodes.open() <= 33, "{}", rig.system.inodes.open());
    }
    for (number, node) in nodes.iter().enumerate() {
        let open = guest.open(*node, libc::O_RDONLY).unwrap();
        assert_eq!(guest.read(open.fh, 0, 9), Ok(number.to_string().into_bytes()));
        guest.release(open.fh);
    }
    // What is another file meanwhile is not taken for the same.
    for number in 0..300 {
        fs::rename(root.join(format!("f{number}")), root.join(format!("g{number}"))).unwrap();
        fs::write(root.join(format!("f{number}")), b"another").unwrap();
    }
    let opened: Vec<_> = nodes.iter().map(|node| guest.open(*node, libc::O_RDONLY)).collect();
    let stale = opened.iter().filter(|open| **open == Err(libc::ESTALE)).count();
    assert!(stale > 200, "{opened:?}");
    opened.iter().flatten().for_each(|open| guest.release(open.fh));
    // Handles have a limit, and are free again.
    let open: Vec<_> = (0..100).map_while(|_| guest.open(guest.walk("g1").unwrap(), libc::O_RDONLY).ok()).collect();
    assert!((2..=16).contains(&open.len()), "{}", open.len());
    assert_eq!(guest.open(guest.walk("g1").unwrap(), libc::O_RDONLY).err(), Some(libc::ENFILE));
    open.iter().for_each(|open| guest.release(open.fh));
    guest.open(guest.walk("g1").unwrap(), libc::O_RDONLY).unwrap();
    // A new mount begins with nothing.
    guest.ask(op::DESTROY, 0, b"").unwrap();
    assert_eq!((rig.system.inodes.len(), guest.getattr(nodes[0]).err()), (1, Some(libc::ESTALE)));
}

#[test]
fn versions() {
    let rig = rig();
    let init = |major, minor| {
        let body = InitIn { major, minor, ..InitIn::default() };
        rig.guest.ask(op::INIT, 0, body.as_bytes()).map(|answer| u32::from_le_bytes(answer[..4].try_into().unwrap()))
    };
    assert_eq!((init(7, 31), init(8, 0)), (Ok(7), Ok(7)));
    assert_eq!((init(7, 30), init(6, 0), init(0, 0)), (Err(libc::EPROTO), Err(libc::EPROTO), Err(libc::EPROTO)));
    assert_eq!(rig.guest.ask(9999, ROOT_ID, b""), Err(libc::ENOSYS));
    assert_eq!(rig.guest.raw(&[1; 39], 100), b"");
    assert_eq!(raw(Errno::NOENT), ENOENT);
}

fn snapshot(dir: &Path) -> Vec<(PathBuf, u32)> {
    let mut all: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            (entry.path(), entry.metadata().unwrap().permissions().mode())
        })
        .collect();
    all.sort();
    all
}

/// A request of any kind about something that may be there.
fn request() -> impl Strategy<Value = (u32, u64, Vec<u8>, usize)> {
    let names = prop_oneof![Just("a"), Just("b"), Just("dir"), Just("link"), Just(".."), Just("../secret"), Just("")];
    let number = prop_oneof![0u64..6, Just(u64::MAX), Just(1 << 63), any::<u64>()];
    let numbers = prop::collection::vec(number, 0..12);
    let tail = prop_oneof![names.prop_map(|name| name.as_bytes().to_vec()), prop::collection::vec(any::<u8>(), 0..40)];
    let tails = prop::collection::vec(tail, 0..3);
    (0u32..54, 0u64..8, numbers, tails, prop_oneof![0usize..200, Just(5000usize)]).prop_map(
        |(opcode, node, numbers, tails, room)| {
            let mut body: Vec<u8> = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            for tail in tails {
                body.extend(tail);
                body.push(0);
            }
            (opcode, node, body, room)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]
    /// No request panics, is answered with more than there is room for, or reaches the outside.
    #[test]
    fn any_requests(requests in prop::collection::vec(request(), 1..120)) {
        let rig = rig_with(Access::ReadWrite, 40);
        fs::create_dir(rig.root().join("dir")).unwrap();
        fs::write(rig.root().join("a"), b"text").unwrap();
        symlink("../secret", rig.root().join("link")).unwrap();
        let outside = snapshot(rig.dir.path());
        for name in ["a", "dir", "link"] {
            rig.guest.walk(name).unwrap();
        }
        rig.guest.open(2, libc::O_RDWR).unwrap();
        for (opcode, node, body, room) in requests {
            // SYNCFS is right but slow; INIT and DESTROY would end the fun.
            if matches!(opcode, op::SYNCFS | op::INIT | op::DESTROY) {
                continue;
            }
            let len = (IN_HEADER + body.len()) as u32;
            let header = InHeader { len, opcode, nodeid: node, unique: 9, ..InHeader::default() };
            let answer = rig.guest.raw(&[header.as_bytes(), &body].concat(), room);
            prop_assert!(answer.is_empty() || answer.len() >= OUT_HEADER && answer[8] == 9);
        }
        rig.outside_is_whole();
        let after = snapshot(rig.dir.path());
        prop_assert_eq!(outside.iter().map(|entry| &entry.0).collect::<Vec<_>>(), after.iter().map(|entry| &entry.0).collect::<Vec<_>>());
        let _ = fs::set_permissions(rig.root(), fs::Permissions::from_mode(0o755));
    }
}
