//! The server of one shared directory: a process of its own. The monitor starts it with [`start`]; it does [`run`].
//!
//! Its standard input is a socket to the monitor. The first message on it says what to do, and brings the directory and the channel along:
//! the process opens nothing by a path. It ends when the socket's other end is closed, so also when the monitor dies, however it does.
//!
//! The server's first message is one byte, [`READY`], once it has confined itself, or the reason why it cannot serve: then no guest
//! is to run ([`wait_ready`]). Later it writes one byte, [`GONE`], when it finds that the directory has been removed on the host.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::channel::{Client, Worker};
use crate::fs::{Access, FileSystem};
use crate::sandbox::{self, Confinement};

/// The byte that says that the server has confined itself and serves.
const READY: u8 = b'r';
/// How long that may take, on a host however busy.
const PATIENCE: Timespec = Timespec { tv_sec: 60, tv_nsec: 0 };
/// The longest reason, in bytes.
const MAX_REASON: usize = 256;
/// The byte that says that the directory has been removed on the host.
pub const GONE: u8 = b'g';
/// The descriptors that come along with the task.
const DESCRIPTORS: usize = 4;
/// Requests that are worked on at a time.
const THREADS: usize = 6;
/// Descriptors that the server asks for.
const FILES: u64 = 1 << 20;
/// Descriptors that are neither a guest's file nor handle.
const OWN_FILES: u64 = 64;

#[derive(Debug, Serialize, Deserialize)]
struct Task {
    access: Access,
    exclusive: bool,
    confinement: Confinement,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Starts `program` with the argument `argument`, which is to call [`run`] then, for the directory `root` (opened for reading) and the
/// server's end of `channel`. `exclusive`: nobody else changes it meanwhile ([`FileSystem::exclusive`]). Returns the socket to it, and the process, which ends once the socket is closed.
/// `errors` is its standard error.
///
/// # Errors
/// The program cannot be started.
pub fn start(
    program: &Path,
    argument: &str,
    (access, exclusive): (Access, bool),
    confinement: Confinement,
    root: BorrowedFd<'_>,
    channel: &Client,
    errors: Stdio,
) -> io::Result<(OwnedFd, Child)> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // A group of its own: keys at the terminal are not for it.
    let child = Command::new(program)
        .arg(argument)
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(errors)
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .spawn()?;
    let message = postcard::to_stdvec(&Task { access, exclusive, confinement }).map_err(|_| broken("task"))?;
    let [memory, posted, done] = channel.descriptors();
    let descriptors = [root, memory, posted, done];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(broken("descriptors"));
    }
    match rustix::net::sendmsg(&ours, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL) {
        // That it has ended already is seen by whoever waits until it is ready.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok((ours, child)),
        Err(error) => Err(error.into()),
    }
}

/// Waits until a server that was started has confined itself. To be called once, before a guest runs.
///
/// # Errors
/// Why it does not serve.
pub fn wait_ready(socket: &OwnedFd) -> io::Result<()> {
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    while matches!(poll(&mut fds, Some(&PATIENCE)), Err(Errno::INTR)) {}
    let mut said = [0; MAX_REASON];
    match rustix::net::recv(socket, &mut said, RecvFlags::DONTWAIT) {
        Ok((_, 0)) | Err(Errno::CONNRESET) => Err(broken("it has ended")),
        Ok((_, len)) => match said.get(..len).unwrap_or_default() {
            [READY] => Ok(()),
            reason => Err(broken(&String::from_utf8_lossy(reason))),
        },
        Err(Errno::AGAIN) => Err(broken("it does not say that it is ready")),
        Err(error) => Err(error.into()),
    }
}

/// Is the server: takes its task from standard input, confines the process and serves until the socket's other end is closed. What keeps
/// it from serving it tells the monitor.
///
/// # Errors
/// There is no monitor.
pub fn run() -> io::Result<()> {
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let (task, descriptors) = receive_task(&socket)?;
    let mut serves = false;
    match serve(&socket, &task, descriptors, &mut serves) {
        Err(error) if !serves => {
            let reason = error.to_string();
            let reason = reason.as_bytes().get(..reason.len().min(MAX_REASON)).unwrap_or_default();
            say(&socket, reason);
            Ok(())
        }
        other => other,
    }
}

/// A message to the monitor. If that has gone, the next look at the socket finds it out.
fn say(socket: &OwnedFd, message: &[u8]) {
    let _ = rustix::net::send(socket, message, SendFlags::NOSIGNAL);
}

/// Serves; `serves` becomes true when it has confined itself.
fn serve(
    socket: &OwnedFd,
    task: &Task,
    [root, channel @ ..]: [OwnedFd; DESCRIPTORS],
    serves: &mut bool,
) -> io::Result<()> {
    let channel = Arc::new(Worker::new(channel)?);
    // As much as is to be had: the guest's kernel holds on to many files.
    let limit = getrlimit(Resource::Nofile);
    let files = limit.maximum.map_or(FILES, |maximum| maximum.min(FILES)).max(limit.current.unwrap_or(0));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(files), maximum: limit.maximum });
    // SAFETY: nothing but the disposition of a signal changes: a file that grows beyond a limit is an error then.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // What the guest asks for is what files are made with.
    rustix::process::umask(rustix::fs::Mode::empty());
    sandbox::become_owner(&root).map_err(io::Error::other)?;
    // The first call finds out how it is to be done, by ways that are closed later.
    let _ = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    let copy = root.try_clone()?;
    let system = FileSystem::new(root, task.access, files.saturating_sub(OWN_FILES) as usize)?;
    let system = Arc::new(if task.exclusive { system.exclusive() } else { system });
    if task.confinement == Confinement::On {
        sandbox::before_threads(&copy, task.access).map_err(io::Error::other)?;
    }
    drop(copy);
    let start = Arc::new(Barrier::new(THREADS + 1));
    let told = Arc::new(AtomicBool::new(false));
    for _ in 0..THREADS {
        let (channel, system, start) = (channel.clone(), system.clone(), start.clone());
        let (told, socket) = (told.clone(), socket.try_clone()?);
        std::thread::Builder::new().name("share".into()).spawn(move || {
            // Twice: once it has started, and once the sandbox is closed.
            start.wait();
            start.wait();
            channel.run(|request, answer| {
                let len = system.serve(request, answer);
                if system.is_gone() && !told.swap(true, Ordering::Relaxed) {
                    say(&socket, &[GONE]);
                }
                len
            })
        })?;
    }
    start.wait();
    if task.confinement == Confinement::On {
        sandbox::close().map_err(io::Error::other)?;
    }
    say(socket, &[READY]);
    *serves = true;
    start.wait();
    loop {
        match rustix::io::read(socket, &mut [0u8; 16]) {
            Ok(0) => return Ok(()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn receive_task(socket: &OwnedFd) -> io::Result<(Task, [OwnedFd; DESCRIPTORS])> {
    let by_hand = || broken("this is not for use by hand: the monitor starts it");
    let mut message = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut parts = [IoSliceMut::new(&mut message)];
        match rustix::net::recvmsg(socket, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(Errno::INTR) => {}
            Err(Errno::NOTSOCK) => return Err(by_hand()),
            other => break other?,
        }
    };
    let mut descriptors = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = part {
            descriptors.extend(some);
        }
    }
    let task = postcard::from_bytes(message.get(..received.bytes).unwrap_or_default()).map_err(|_| by_hand())?;
    Ok((task, descriptors.try_into().map_err(|_| by_hand())?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::{CopyFileRangeIn, CreateIn, FallocateIn, FsyncIn, LseekIn, ROOT_ID, SetattrIn, fattr, op};
    use crate::testing::Guest;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    use std::path::PathBuf;
    use zerocopy::IntoBytes;

    /// Not a test by itself: the inside of the processes that the tests below start.
    #[test]
    fn in_the_server() {
        if rustix::net::sockopt::socket_type(io::stdin()).is_ok() {
            if std::env::var_os("NO_FILTERS").is_some() {
                forbid_filters();
            }
            let result = run();
            std::process::exit(if result.is_ok() { 0 } else { 9 });
        }
    }

    /// From here on this process can have no filter of system calls.
    fn forbid_filters() {
        let rules = [(libc::SYS_seccomp, Vec::new())].into_iter().collect();
        let forbidden = seccompiler::SeccompAction::Errno(libc::EPERM as u32);
        let arch = std::env::consts::ARCH.try_into().unwrap();
        let filter =
            seccompiler::SeccompFilter::new(rules, seccompiler::SeccompAction::Allow, forbidden, arch).unwrap();
        let program: seccompiler::BpfProgram = filter.try_into().unwrap();
        seccompiler::apply_filter(&program).unwrap();
    }

    /// A program that is this test, with a variable in its environment.
    fn program_with(dir: &Path, variable: &str) -> PathBuf {
        let path = dir.join("server");
        let this = std::env::current_exe().unwrap();
        let text = format!(
            "#!/bin/sh\n{variable} exec '{}' --exact server::tests::in_the_server --nocapture \n",
            this.display()
        );
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    fn program(dir: &Path) -> PathBuf {
        program_with(dir, "")
    }

    pub(crate) struct Rig {
        pub(crate) guest: Guest,
        pub(crate) child: Child,
        pub(crate) socket: OwnedFd,
    }

    /// A server of `root`, in a process of its own.
    pub(crate) fn serve(dir: &Path, root: &Path, access: Access, exclusive: bool) -> Rig {
        use rustix::fs::{Mode, OFlags};
        use vm_memory::Bytes;
        let client = Client::new().unwrap();
        let root = rustix::fs::open(root, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        let (socket, child) =
            start(&program(dir), "", (access, exclusive), Confinement::On, root.as_fd(), &client, Stdio::inherit())
                .unwrap();
        wait_ready(&socket).unwrap();
        let watched = socket.try_clone().unwrap();
        let client = std::sync::Mutex::new(client);
        let guest = Guest::new(move |request, room| {
            let client = client.lock().unwrap();
            client.request(0, request.len()).unwrap().write_slice(request, 0).unwrap();
            client.post(0, request.len() as u32, room as u32);
            let start = std::time::Instant::now();
            while !client.any_done() {
                let over = start.elapsed().as_secs() > 120;
                let mut fds = [rustix::event::PollFd::new(&watched, rustix::event::PollFlags::IN)];
                let none = rustix::time::Timespec::default();
                let ended = rustix::event::poll(&mut fds, Some(&none)) == Ok(1);
                assert!(!ended && !over, "the server ended: {request:?}");
                std::thread::yield_now();
            }
            assert_eq!(client.take_done(), 1);
            let mut answer = vec![0; client.answer_len(0) as usize];
            client.answer(0, answer.len()).unwrap().read_slice(&mut answer, 0).unwrap();
            answer
        });
        Rig { guest, child, socket }
    }

    /// One that cannot confine itself says so and serves nothing; one that ends is noticed.
    #[test]
    fn a_server_that_cannot_confine_itself_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let open = || std::fs::File::open(dir.path()).unwrap();
        let start = |program: &Path| {
            let (client, access) = (Client::new().unwrap(), (Access::ReadOnly, false));
            start(program, "", access, Confinement::On, open().as_fd(), &client, Stdio::inherit()).unwrap()
        };
        let (socket, mut child) = start(&program_with(dir.path(), "NO_FILTERS=1"));
        let why = wait_ready(&socket).unwrap_err().to_string();
        assert!(why.contains("cannot confine") && why.contains("seccomp"), "{why}");
        assert_eq!(child.wait().unwrap().code(), Some(0));
        drop(socket);
        let (socket, mut child) = start(Path::new("/bin/false"));
        assert_eq!(wait_ready(&socket).unwrap_err().to_string(), "it has ended");
        child.wait().unwrap();
    }

    /// Everything a guest may ask for works inside the sandbox.
    #[test]
    fn all_requests_are_allowed() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let Rig { guest, mut child, socket } = serve(dir.path(), &root, Access::ReadWrite, false);
        let (entry, open) = guest.create(ROOT_ID, "file", libc::O_RDWR, 0o644).unwrap();
        assert_eq!(guest.write(open.fh, 0, b"0123456789"), Ok(10));
        assert_eq!(guest.read(open.fh, 2, 4), Ok(b"2345".to_vec()));
        let fsync = FsyncIn { fh: open.fh, ..FsyncIn::default() };
        guest.ask(op::FSYNC, entry.nodeid, fsync.as_bytes()).unwrap();
        guest.ask(op::FSYNC, entry.nodeid, FsyncIn { fsync_flags: 1, ..fsync }.as_bytes()).unwrap();
        guest.ask(op::SYNCFS, ROOT_ID, &[0; 8]).unwrap();
        guest.ask(op::STATFS, ROOT_ID, b"").unwrap();
        let body = FallocateIn { fh: open.fh, length: 8192, ..FallocateIn::default() };
        guest.ask(op::FALLOCATE, entry.nodeid, body.as_bytes()).unwrap();
        let body = LseekIn { fh: open.fh, whence: libc::SEEK_HOLE as u32, ..LseekIn::default() };
        guest.ask(op::LSEEK, entry.nodeid, body.as_bytes()).unwrap();
        let other = guest.create(ROOT_ID, "copy", libc::O_WRONLY, 0o600).unwrap().1;
        let body = CopyFileRangeIn { fh_in: open.fh, fh_out: other.fh, len: 10, ..CopyFileRangeIn::default() };
        guest.ask(op::COPY_FILE_RANGE, entry.nodeid, body.as_bytes()).unwrap();
        assert_eq!(std::fs::read(root.join("copy")).unwrap(), b"0123456789");
        guest.release(open.fh);
        let body = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
        guest.ask(op::TMPFILE, ROOT_ID, &[body.as_bytes(), b"#1\0"].concat()).unwrap();
        let sub = guest.mkdir(ROOT_ID, "sub", 0o755).unwrap();
        guest.mknod(ROOT_ID, "fifo", libc::S_IFIFO | 0o600).unwrap();
        guest.mknod(ROOT_ID, "socket", libc::S_IFSOCK | 0o600).unwrap();
        guest.mknod(ROOT_ID, "node", libc::S_IFREG | 0o600).unwrap();
        let link = guest.symlink(ROOT_ID, "link", "file").unwrap();
        assert_eq!(guest.readlink(link.nodeid), Ok("file".into()));
        guest.link(sub.nodeid, "hard", entry.nodeid).unwrap();
        guest.link(ROOT_ID, "hard link to a link", link.nodeid).unwrap();
        guest.rename(sub.nodeid, "hard", ROOT_ID, "moved", libc::RENAME_NOREPLACE).unwrap();
        guest.rename(ROOT_ID, "moved", ROOT_ID, "file", libc::RENAME_EXCHANGE).unwrap();
        guest.unlink(ROOT_ID, "moved").unwrap();
        guest.rmdir(ROOT_ID, "sub").unwrap();
        let all = fattr::MODE | fattr::UID | fattr::GID | fattr::SIZE | fattr::ATIME | fattr::MTIME;
        let change =
            SetattrIn { valid: all, mode: 0o6711, uid: 7, gid: 8, size: 4, atime: 5, mtime: 6, ..SetattrIn::default() };
        let attr = guest.setattr(entry.nodeid, change).unwrap();
        assert_eq!((attr.mode & 0o7777, attr.uid, attr.gid, attr.size, attr.mtime), (0o6711, 7, 8, 4, 6));
        let times = SetattrIn { valid: fattr::MTIME | fattr::MTIME_NOW, ..SetattrIn::default() };
        guest.setattr(link.nodeid, times).unwrap();
        guest.setxattr(entry.nodeid, "user.x", b"y").unwrap();
        assert_eq!(guest.getxattr(entry.nodeid, "user.x", 9), Ok(b"y".to_vec()));
        guest.listxattr(entry.nodeid).unwrap();
        guest.ask(op::REMOVEXATTR, entry.nodeid, b"user.x\0").unwrap();
        let names: Vec<_> = guest.list(ROOT_ID, true, 4096).unwrap().into_iter().map(|entry| entry.0).collect();
        assert_eq!(names.len(), 9, "{names:?}");
        // Even without its owner's permission.
        guest.setattr(entry.nodeid, SetattrIn { valid: fattr::MODE, mode: 0, ..SetattrIn::default() }).unwrap();
        guest.open(entry.nodeid, libc::O_RDWR).unwrap();
        let on_host = std::fs::metadata(root.join("file")).unwrap();
        assert_eq!((on_host.mode() & 0o7777, on_host.uid()), (0, std::fs::metadata(&root).unwrap().uid()));
        // It ends when it is not needed any more.
        drop(socket);
        drop(guest);
        assert_eq!(child.wait().unwrap().code(), Some(0));
    }

    /// An exclusive directory, whose files are not opened by requests.
    #[test]
    fn an_exclusive_directory_needs_no_more_calls() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(root.join("file"), b"0123456789").unwrap();
        let Rig { guest, .. } = serve(dir.path(), &root, Access::ReadWrite, true);
        let node = guest.walk("file").unwrap();
        assert_eq!(guest.open(node, libc::O_RDONLY).err(), Some(libc::ENOSYS));
        assert_eq!(guest.read_of(node, 2, 4), Ok(b"2345".to_vec()));
        assert_eq!(guest.write_of(node, 10, b"more"), Ok(4));
        guest.ask(op::FSYNC, node, FsyncIn::default().as_bytes()).unwrap();
        guest.ask(op::FSYNCDIR, ROOT_ID, FsyncIn::default().as_bytes()).unwrap();
        let body = LseekIn { whence: libc::SEEK_HOLE as u32, ..LseekIn::default() };
        guest.ask(op::LSEEK, node, body.as_bytes()).unwrap();
        guest.rename(ROOT_ID, "file", ROOT_ID, "moved", 0).unwrap();
        guest.unlink(ROOT_ID, "moved").unwrap();
        assert_eq!(guest.read_of(node, 8, 10), Ok(b"89more".to_vec()));
        assert_eq!(guest.list(ROOT_ID, true, 4096).unwrap().len(), 2);
    }

    /// What is mounted elsewhere, and what was moved away on the host, is out of reach.
    #[test]
    fn what_left_the_directory_is_out_of_reach() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("sub/file"), b"inside").unwrap();
        let Rig { guest, .. } = serve(dir.path(), &root, Access::ReadWrite, false);
        let sub = guest.walk("sub").unwrap();
        let file = guest.walk("sub/file").unwrap();
        assert!(guest.open(file, libc::O_RDONLY).is_ok());
        std::fs::rename(root.join("sub"), dir.path().join("outside")).unwrap();
        if std::fs::read_to_string("/sys/kernel/security/lsm").is_ok_and(|list| list.contains("landlock")) {
            assert_eq!(guest.open(file, libc::O_RDONLY).err(), Some(libc::EACCES));
            assert_eq!(guest.create(sub, "new", libc::O_RDWR, 0o600).err(), Some(libc::EACCES));
            assert_eq!(guest.list(sub, false, 4096).err(), Some(libc::EACCES));
        }
        assert_eq!(std::fs::read_dir(dir.path().join("outside")).unwrap().count(), 1);
    }

    #[test]
    fn a_removed_directory_is_told_once() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir(&root).unwrap();
        let Rig { guest, socket, .. } = serve(dir.path(), &root, Access::ReadWrite, false);
        std::fs::remove_dir(&root).unwrap();
        let gone = guest.raw(&[0; 40], 16);
        assert!(gone.is_empty());
        // The test's own watch on the socket takes this for its end.
        let told = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.lookup(ROOT_ID, "x")));
        let mut byte = [0; 4];
        assert!(told.is_err() || told.is_ok_and(|answer| answer.is_err()));
        assert_eq!(rustix::io::read(&socket, &mut byte), Ok(1));
        assert_eq!(byte[0], GONE);
    }
}
