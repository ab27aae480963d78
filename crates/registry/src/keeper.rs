//! The keeper: a small process beside each monitor, which does for it what the monitor's own confinement forbids. It connects to the sockets
//! `vsock_PORT` when the guest asks for a port of the host, and puts away the VM's entry when the monitor has gone, however it went.
//!
//! Its standard input is a socket that keeps messages apart. The first message is the VM's directory; every other is a port, of 32
//! bits, and is answered by a byte, with the connected socket if it is 1. It sees nothing of what a guest sends.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};

use crate::Entry;

/// How long the monitor waits for an answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// The monitor's end.
#[derive(Debug)]
pub struct Keeper(OwnedFd);

impl Keeper {
    /// Starts `program` with `argument`, which is to call [`run`], for the VM in `dir`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(program: &Path, argument: &str, dir: &Path, confined: bool) -> io::Result<Self> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Command::new(program)
            .arg(argument)
            .stdin(theirs)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .env_clear()
            .current_dir("/")
            // Keys at the terminal are not for it.
            .process_group(0)
            .spawn()?;
        let mut message = vec![u8::from(confined)];
        message.extend_from_slice(dir.as_os_str().as_bytes());
        rustix::net::send(&ours, &message, SendFlags::NOSIGNAL)?;
        Ok(Self(ours))
    }

    /// A connection to whoever serves `port` of the host for this VM.
    pub fn dial(&self, port: u32) -> Option<UnixStream> {
        rustix::net::send(&self.0, &port.to_le_bytes(), SendFlags::NOSIGNAL | SendFlags::DONTWAIT).ok()?;
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut fds, Some(&patience)).ok()? == 0 {
            return None;
        }
        let mut answer = [0; 8];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        let received = rustix::net::recvmsg(&self.0, &mut [IoSliceMut::new(&mut answer)], &mut control, flags).ok()?;
        let (head, _) = answer.split_first_chunk::<5>()?;
        // An answer to an earlier question that came too late is not for this one.
        let [found, number @ ..] = *head;
        let descriptor = control.drain().find_map(|part| match part {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        (received.bytes == 5 && found == 1 && u32::from_le_bytes(number) == port).then_some(descriptor?.into())
    }
}

/// Is the keeper: until the other end of standard input is closed, and a little longer.
///
/// # Errors
/// What keeps it from being one.
pub fn run() -> io::Result<()> {
    let line = io::stdin().as_fd().try_clone_to_owned()?;
    let not_by_hand = || io::Error::other("this is not for use by hand: the VMM starts it");
    let mut message = vec![0; 4097];
    let len = receive(&line, &mut message).map_err(|_| not_by_hand())?;
    let (confined, dir) = message.get(..len).and_then(<[u8]>::split_first).ok_or_else(not_by_hand)?;
    let dir = PathBuf::from(std::ffi::OsString::from_vec(dir.to_vec()));
    let entry = Entry::read(&dir).ok_or_else(not_by_hand)?;
    if *confined == 1 {
        confine(&entry)?;
    }
    let mut message = [0; 8];
    loop {
        let len = match receive(&line, &mut message) {
            Ok(0) | Err(_) => break,
            Ok(len) => len,
        };
        let port = match message.split_first_chunk::<4>() {
            Some((port, _)) if len == 4 => u32::from_le_bytes(*port),
            _ => break,
        };
        let stream = connect(&dir.join(format!("vsock_{port}")));
        let mut answer = vec![u8::from(stream.is_ok())];
        answer.extend(port.to_le_bytes());
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = stream.as_ref().map(|stream| [stream.as_fd()]);
        if let Ok(descriptors) = &descriptors {
            control.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        if rustix::net::sendmsg(&line, &[IoSlice::new(&answer)], &mut control, SendFlags::NOSIGNAL).is_err() {
            break;
        }
    }
    put_away(&entry);
    Ok(())
}

fn receive(line: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(line, &mut *buffer) {
            Err(rustix::io::Errno::INTR) => {}
            other => return other.map_err(Into::into),
        }
    }
}

fn connect(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// The monitor has gone: its sockets lead nowhere. The entry goes too, unless it is to stay.
fn put_away(entry: &Entry) {
    for group in &entry.about.cgroups {
        // It is empty once the processes of the VM have been reaped.
        for _ in 0..100 {
            if std::fs::remove_dir(group).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    if entry.about.keep {
        for name in ["control", "vsock"] {
            let _ = std::fs::remove_file(entry.dir.join(name));
        }
    } else {
        for file in std::fs::read_dir(&entry.dir).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(file.path());
        }
        let _ = std::fs::remove_dir(&entry.dir);
    }
}

/// What it can do from here on: connect to Unix sockets, and remove files of the VM.
fn confine(entry: &Entry) -> io::Result<()> {
    let failed = |error: &dyn std::fmt::Display| io::Error::other(format!("cannot confine the keeper: {error}"));
    rustix::thread::set_no_new_privs(true)?;
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)?;
    let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
    rustix::process::setrlimit(rustix::process::Resource::Core, none)?;
    let abi = ABI::V6;
    let ruleset = || -> Result<(), landlock::RulesetError> {
        let remove = AccessFs::RemoveFile | AccessFs::RemoveDir | AccessFs::ReadDir;
        let mut rules = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        for dir in entry.dir.parent().into_iter().chain(entry.about.cgroups.iter().filter_map(|group| group.parent())) {
            if let Ok(fd) = PathFd::new(dir) {
                rules = rules.add_rule(PathBeneath::new(fd, remove))?;
            }
        }
        rules.restrict_self().map(|_| ())
    };
    ruleset().map_err(|error| failed(&error))?;
    let program = filter().map_err(|error| failed(&error))?;
    seccompiler::apply_filter(&program).map_err(|error| failed(&error))
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<Rule>> = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_sendmsg,
        libc::SYS_sendto,
        libc::SYS_recvfrom,
        libc::SYS_connect,
        libc::SYS_close,
        libc::SYS_openat,
        libc::SYS_getdents64,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_unlink,
        libc::SYS_unlinkat,
        libc::SYS_rmdir,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigaction,
        libc::SYS_restart_syscall,
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_getrandom,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]
    .map(|call| (call, vec![]))
    .into();
    let masked = |index: u8, mask: u64, value: u64| -> Result<Rule, _> {
        Rule::new(vec![Condition::new(index, Len::Dword, Op::MaskedEq(mask), value)?])
    };
    rules.insert(libc::SYS_socket, vec![masked(0, u64::MAX, libc::AF_UNIX as u64)?]);
    rules.insert(
        libc::SYS_fcntl,
        vec![masked(1, u64::MAX, libc::F_GETFD as u64)?, masked(1, u64::MAX, libc::F_DUPFD_CLOEXEC as u64)?],
    );
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Reads a whole message from a socket at most `limit` bytes long, up to a line's end: for clients of a monitor.
///
/// # Errors
/// The end of the connection, or a line that is too long.
pub fn read_line(from: &mut impl Read, limit: usize) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let mut byte = [0];
        match from.read(&mut byte)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if byte == [b'\n'] => return Ok(String::from_utf8_lossy(&line).into_owned()),
            _ if line.len() >= limit => return Err(io::Error::other("an answer that is too long")),
            _ => line.extend(byte),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{About, Registry};
    use std::io::Write;
    use std::os::unix::net::UnixListener;
    use std::time::Instant;

    const BE: &str = "TIGHTROPE_TEST_KEEPER";

    /// Not a test by itself: the process that the other test starts.
    #[test]
    fn be_the_keeper() {
        if std::env::args().any(|argument| argument == BE) {
            run().unwrap();
        }
    }

    fn start(keep: bool) -> (tempfile::TempDir, Registry, crate::Own, Keeper) {
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::at(dir.path().join("r")).unwrap();
        let cgroups = ["cpu", "memory"].map(|name| dir.path().join(name).join("own")).to_vec();
        cgroups.iter().for_each(|group| std::fs::create_dir_all(group).unwrap());
        let own = registry.add(About { keep, cgroups, ..About::default() }).unwrap();
        // The test program takes several filters: the last names what the process is to be.
        let script = dir.path().join("keeper");
        let this = std::env::current_exe().unwrap();
        let text =
            format!("#!/bin/sh\nexec {} --exact keeper::tests::be_the_keeper {BE} --nocapture\n", this.display());
        std::fs::write(&script, text).unwrap();
        std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let keeper = Keeper::start(&script, "x", &own.dir, true).unwrap();
        (dir, registry, own, keeper)
    }

    fn wait(what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + Duration::from_secs(20);
        while !condition() {
            assert!(Instant::now() < end, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn it_connects_and_puts_away() {
        let (dir, registry, own, keeper) = start(false);
        let listener = UnixListener::bind(own.dir.join("vsock_5")).unwrap();
        let mut ours = keeper.dial(5).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        ours.write_all(b"x").unwrap();
        theirs.read_exact(&mut [0]).unwrap();
        assert!(keeper.dial(6).is_none());
        assert!(keeper.dial(5).is_some());
        drop(listener);
        assert!(keeper.dial(5).is_none());
        let path = own.dir.clone();
        drop((own, keeper));
        wait("the entry is removed", || !path.exists());
        assert!(registry.entries().is_empty());
        assert!(["cpu", "memory"].iter().all(|name| {
            let dir = dir.path().join(name);
            dir.exists() && !dir.join("own").exists()
        }));
    }

    #[test]
    fn an_entry_that_stays_loses_its_sockets() {
        let (_dir, registry, own, keeper) = start(true);
        let path = own.dir.clone();
        drop((own, keeper));
        wait("the sockets are removed", || !path.join("control").exists() && !path.join("vsock").exists());
        assert_eq!(registry.entries().len(), 1);
    }
}
