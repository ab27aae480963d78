//! One program for the host: started, fed, listened to, and waited for.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};

use agent_protocol::{Exec, Exit, FromGuest, FromHost, STDIN_WINDOW, archive::reason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::session::Connection;
use crate::{system, users};

/// Bytes for the host that may wait before no more is read from the program.
const OUT_LIMIT: usize = 256 << 10;
/// Bytes read from the program at once.
const PIECE: usize = 32 << 10;
/// What a pipe can still hold when its program has ended.
const LAST_WORDS: usize = 2 << 20;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A program that runs.
pub struct Program {
    child: Child,
    /// Not known on kernels before 5.3.
    pidfd: Option<OwnedFd>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    errors: Option<OwnedFd>,
    /// The terminal's master; then `output` is another handle of it.
    terminal: Option<OwnedFd>,
}

/// Starts a program.
///
/// # Errors
/// An exit code, as shells have them, and a line.
pub fn start(request: Exec) -> Result<Program, (u8, String)> {
    let mut argv = request.argv.into_iter().map(std::ffi::OsString::from_vec);
    let program = argv.next().filter(|name| !name.is_empty()).ok_or((127, "no command is given".to_owned()))?;
    let user = users::find(&String::from_utf8_lossy(&request.user)).map_err(|why| (1, why))?;
    let mut command = Command::new(&program);
    command.args(argv).env_clear().env("PATH", PATH).env("HOME", &user.home).env("SHELL", &user.shell);
    command.env("USER", &user.name).env("LOGNAME", &user.name);
    for pair in &request.env {
        if let Some(at) = pair.iter().position(|byte| *byte == b'=')
            && let (Some(name), Some(value)) = (pair.get(..at), pair.get(at + 1..))
            && at > 0
        {
            command.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
    }
    let cwd = if request.cwd.is_empty() {
        if user.home.is_dir() { user.home.clone() } else { PathBuf::from("/") }
    } else {
        let cwd = PathBuf::from(OsStr::from_bytes(&request.cwd));
        if !cwd.is_dir() {
            return Err((126, format!("{}: no such directory in the guest", cwd.display())));
        }
        cwd
    };
    command.current_dir(cwd);
    let other = |what: &str, error: io::Error| (1, format!("{what}: {}", reason(&error)));
    let mut terminal = None;
    let mut handles = None;
    if let Some((columns, rows)) = request.tty {
        let (master, slave) = open_terminal(user.uid).map_err(|error| other("no terminal", error))?;
        let _ = tcsetwinsize(&master, window(columns, rows));
        let end = || slave.try_clone().map(Stdio::from).map_err(|error| other("no terminal", error));
        command.stdin(end()?).stdout(end()?).stderr(end()?);
        let copy = || master.try_clone().map_err(|error| other("no terminal", error));
        handles = Some((copy()?, copy()?));
        terminal = Some(master);
    } else {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    }
    let (tty, groups, gid, uid) = (terminal.is_some(), user.groups, user.gid, user.uid);
    // SAFETY: only system calls are made.
    unsafe { command.pre_exec(move || system::before_exec(tty, &groups, gid, uid)) };
    let spawned = command.spawn();
    // The program's ends must not stay open here, or the end of its output is never seen.
    drop(command);
    let mut child = spawned.map_err(|error| {
        let shown = program.to_string_lossy().into_owned();
        match error.kind() {
            io::ErrorKind::NotFound => (127, format!("{shown}: command not found in the guest")),
            _ => (126, format!("{shown}: {}", reason(&error))),
        }
    })?;
    let (input, output, errors) = match handles {
        Some((input, output)) => (Some(input), Some(output), None),
        None => (
            child.stdin.take().map(OwnedFd::from),
            child.stdout.take().map(OwnedFd::from),
            child.stderr.take().map(OwnedFd::from),
        ),
    };
    for fd in [&input, &output, &errors].into_iter().flatten() {
        let _ = rustix::io::ioctl_fionbio(fd, true);
    }
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    Ok(Program { child, pidfd, input, output, errors, terminal })
}

fn window(columns: u16, rows: u16) -> Winsize {
    Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 }
}

fn open_terminal(owner: u32) -> io::Result<(OwnedFd, OwnedFd)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    let _ = rustix::fs::fchown(&slave, Some(rustix::fs::Uid::from_raw(owner)), None);
    Ok((master, slave))
}

fn how(status: ExitStatus) -> Exit {
    match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Code(code as u8),
        (None, Some(signal)) => Exit::Signal(signal as u8),
        (None, None) => Exit::Code(255),
    }
}

/// What is on its way.
#[derive(Default)]
struct Flow {
    /// For the host.
    out: Vec<u8>,
    /// For the program.
    input: Vec<u8>,
    input_ends: bool,
    /// Bytes of input that the host has not been told of.
    owed: usize,
}

/// Reads once; `true` while there may be more.
fn take(from: &OwnedFd, out: &mut Vec<u8>, message: fn(Vec<u8>) -> FromGuest) -> io::Result<bool> {
    let mut buffer = vec![0; PIECE];
    match rustix::io::read(from, &mut buffer) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(len) => {
            buffer.truncate(len);
            message(buffer).put(out);
            Ok(true)
        }
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(false),
        // A terminal that nobody has open any more gives EIO.
        Err(error) => Err(error.into()),
    }
}

impl Program {
    /// Stays with the program until it or the host has gone.
    pub fn attend(mut self, connection: &mut Connection) -> io::Result<()> {
        let mut flow = Flow::default();
        FromGuest::Started(self.child.id()).put(&mut flow.out);
        rustix::io::ioctl_fionbio(&connection.stream, true)?;
        let ended = self.turns(connection, &mut flow);
        let status = match ended {
            Ok(status) => status,
            Err(_) => {
                // The host has gone: as when a terminal is hung up.
                self.signal(libc::SIGHUP as u8);
                self.signal(libc::SIGCONT as u8);
                return Ok(());
            }
        };
        rustix::io::ioctl_fionbio(&connection.stream, false)?;
        for (from, message) in
            [(&self.output, FromGuest::Stdout as fn(Vec<u8>) -> _), (&self.errors, FromGuest::Stderr)]
        {
            let Some(from) = from else { continue };
            let mut sum = 0;
            while sum < LAST_WORDS && matches!(take(from, &mut flow.out, message), Ok(true)) {
                sum += flow.out.len();
                io::Write::write_all(&mut connection.stream, &flow.out)?;
                flow.out.clear();
            }
        }
        FromGuest::Exited(how(status)).put(&mut flow.out);
        io::Write::write_all(&mut connection.stream, &flow.out)
    }

    fn signal(&self, signal: u8) {
        system::kill_group(self.child.id(), signal);
    }

    /// Moves bytes until the program has ended.
    fn turns(&mut self, connection: &mut Connection, flow: &mut Flow) -> io::Result<ExitStatus> {
        let mut readable = false;
        loop {
            self.turn(connection, flow, readable)?;
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            readable = self.wait(connection, flow)?;
        }
    }

    /// Waits for something to do; says whether the host sent something.
    fn wait(&self, connection: &Connection, flow: &Flow) -> io::Result<bool> {
        let mut fds: Vec<PollFd<'_>> = Vec::with_capacity(5);
        let out = if flow.out.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
        fds.push(PollFd::new(&connection.stream, PollFlags::IN | out));
        if let Some(pidfd) = &self.pidfd {
            fds.push(PollFd::new(pidfd, PollFlags::IN));
        }
        if flow.out.len() < OUT_LIMIT {
            for fd in [&self.output, &self.errors].into_iter().flatten() {
                fds.push(PollFd::new(fd, PollFlags::IN));
            }
        }
        if let Some(input) = self.input.as_ref().filter(|_| !flow.input.is_empty()) {
            fds.push(PollFd::new(input, PollFlags::OUT));
        }
        let nap = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        match poll(&mut fds, self.pidfd.is_none().then_some(&nap)) {
            Ok(_) => Ok(fds.first().is_some_and(|fd| !(fd.revents() - PollFlags::OUT).is_empty())),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn turn(&mut self, connection: &mut Connection, flow: &mut Flow, readable: bool) -> io::Result<()> {
        if readable {
            match connection.read_some() {
                Ok(true) => {}
                Ok(false) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        // Also what came together with the request.
        while let Some(message) = connection.waiting()? {
            self.message(message, flow)?;
        }
        if flow.out.len() < OUT_LIMIT {
            for (slot, message) in
                [(&mut self.output, FromGuest::Stdout as fn(Vec<u8>) -> _), (&mut self.errors, FromGuest::Stderr)]
            {
                if slot.as_ref().is_some_and(|from| take(from, &mut flow.out, message).is_err()) {
                    *slot = None;
                }
            }
        }
        self.feed(flow);
        while !flow.out.is_empty() {
            match rustix::io::write(&connection.stream, &flow.out) {
                Ok(len) => drop(flow.out.drain(..len)),
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Gives the program what is there of its input. What it does not want is taken all the same.
    fn feed(&mut self, flow: &mut Flow) {
        let mut taken = 0;
        while !flow.input.is_empty() {
            let Some(to) = &self.input else {
                taken += flow.input.len();
                flow.input.clear();
                break;
            };
            match rustix::io::write(to, &flow.input) {
                Ok(len) => {
                    taken += len;
                    flow.input.drain(..len);
                }
                Err(rustix::io::Errno::AGAIN) => break,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => self.input = None,
            }
        }
        // A Ctrl-D of our own is not the host's.
        let taken = taken.min(flow.owed);
        if taken > 0 {
            flow.owed -= taken;
            FromGuest::Taken(taken as u32).put(&mut flow.out);
        }
        if flow.input.is_empty() && flow.input_ends {
            self.input = None;
        }
    }

    fn message(&mut self, message: FromHost, flow: &mut Flow) -> io::Result<()> {
        match message {
            FromHost::Stdin(bytes) if flow.input.len() + bytes.len() <= STDIN_WINDOW && !flow.input_ends => {
                flow.owed += bytes.len();
                flow.input.extend_from_slice(&bytes);
            }
            FromHost::StdinEnd => {
                if self.terminal.is_some() {
                    flow.input.push(4); // Ctrl-D
                }
                flow.input_ends = true;
            }
            FromHost::Signal(number @ 1..=64) => self.signal(number),
            FromHost::Window(columns, rows) => {
                if let Some(terminal) = &self.terminal {
                    let _ = tcsetwinsize(terminal, window(columns, rows));
                }
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::Decoder;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    /// The host's side of a program on this very machine.
    struct Host {
        stream: UnixStream,
        decoder: Decoder,
        out: Vec<u8>,
        err: Vec<u8>,
        taken: usize,
    }

    impl Host {
        fn exec(request: Exec) -> Self {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            std::thread::spawn(move || crate::session::serve(theirs.into(), &crate::network::Coming::none()));
            let mut host = Self { stream: ours, decoder: Decoder::default(), out: vec![], err: vec![], taken: 0 };
            host.send(&FromHost::Exec(request));
            assert!(matches!(host.next(), Some(FromGuest::Hello(1))));
            host
        }

        fn shell(script: &str) -> Self {
            Self::exec(Exec { argv: vec![b"sh".to_vec(), b"-c".to_vec(), script.into()], ..Exec::default() })
        }

        fn send(&mut self, message: &FromHost) {
            let mut bytes = Vec::new();
            message.put(&mut bytes);
            self.stream.write_all(&bytes).unwrap();
        }

        fn next(&mut self) -> Option<FromGuest> {
            loop {
                if let Some((kind, body)) = self.decoder.pop().unwrap() {
                    return Some(FromGuest::parse(kind, body).unwrap());
                }
                let mut buffer = [0; 4096];
                match self.stream.read(&mut buffer).unwrap() {
                    0 => return None,
                    len => self.decoder.push(&buffer[..len]),
                }
            }
        }

        fn end(&mut self) -> FromGuest {
            loop {
                match self.next().expect("an end") {
                    FromGuest::Started(_) => {}
                    FromGuest::Stdout(bytes) => self.out.extend(bytes),
                    FromGuest::Stderr(bytes) => self.err.extend(bytes),
                    FromGuest::Taken(count) => self.taken += count as usize,
                    end => return end,
                }
            }
        }
    }

    #[test]
    fn codes_signals_and_failures() {
        let mut host = Host::shell("echo out; echo err >&2; exit 7");
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(7)));
        assert_eq!((&host.out[..], &host.err[..]), (&b"out\n"[..], &b"err\n"[..]));
        assert_eq!(Host::shell("kill -9 $$").end(), FromGuest::Exited(Exit::Signal(9)));
        let fails = |request: Exec| match Host::exec(request).end() {
            FromGuest::Failed(code, _) => code,
            other => panic!("{other:?}"),
        };
        assert_eq!(fails(Exec { argv: vec![b"no-such-program".to_vec()], ..Exec::default() }), 127);
        assert_eq!(fails(Exec { argv: vec![b"/etc".to_vec()], ..Exec::default() }), 126);
        assert_eq!(fails(Exec { argv: vec![b"true".to_vec()], cwd: b"/no/such".to_vec(), ..Exec::default() }), 126);
        assert_eq!(fails(Exec::default()), 127);
        let mut host = Host::exec(Exec {
            argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"pwd; echo $X $PATH".to_vec()],
            env: vec![b"X=a=b".to_vec(), b"nonsense".to_vec()],
            cwd: b"/".to_vec(),
            ..Exec::default()
        });
        host.end();
        assert_eq!(String::from_utf8(host.out).unwrap(), format!("/\na=b {PATH}\n"));
    }

    #[test]
    fn input_and_signals() {
        let mut host = Host::shell("cat; echo end");
        let data: Vec<u8> = (0..STDIN_WINDOW).map(|at| at as u8).collect();
        for piece in data.chunks(10_000) {
            host.send(&FromHost::Stdin(piece.to_vec()));
        }
        host.send(&FromHost::StdinEnd);
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(0)));
        assert_eq!((host.out.len(), host.taken), (data.len() + 4, data.len()));
        assert!(host.out.starts_with(&data));
        let mut host = Host::shell("trap 'echo got; exit 3' TERM; echo ready; while :; do sleep 0.05; done");
        while !host.out.ends_with(b"ready\n") {
            if let Some(FromGuest::Stdout(bytes)) = host.next() {
                host.out.extend(bytes);
            }
        }
        host.send(&FromHost::Signal(15));
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(3)));
        assert!(host.out.ends_with(b"got\n"));
        // A program that does not read its input is no reason to wait.
        let mut host = Host::shell("exec <&-; sleep 0.3; echo done");
        host.send(&FromHost::Stdin(vec![0; STDIN_WINDOW]));
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(0)));
    }

    /// Process 1 blocks some signals for itself; the programs that it starts must get them.
    #[test]
    fn signals_that_the_agent_blocks() {
        let signals = [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGUSR2];
        let _blocked = crate::system::signals(&signals).unwrap();
        for signal in signals {
            let mut host = Host::shell(&format!("kill -{signal} $$; echo deaf"));
            assert_eq!(host.end(), FromGuest::Exited(Exit::Signal(signal as u8)));
        }
    }

    #[test]
    fn a_terminal() {
        let mut host = Host::exec(Exec {
            argv: vec![b"sh".to_vec(), b"-c".to_vec(), b"stty size; read x; stty size; echo got $x; tty".to_vec()],
            tty: Some((100, 40)),
            ..Exec::default()
        });
        while !host.out.ends_with(b"40 100\r\n") {
            match host.next() {
                Some(FromGuest::Stdout(bytes)) => host.out.extend(bytes),
                Some(FromGuest::Started(_)) => {}
                other => panic!("{other:?}"),
            }
        }
        host.send(&FromHost::Window(77, 22));
        host.send(&FromHost::Stdin(b"word\n".to_vec()));
        host.send(&FromHost::StdinEnd);
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(0)));
        assert_eq!(host.taken, 5, "not the Ctrl-D");
        let text = String::from_utf8(host.out).unwrap();
        assert!(text.contains("22 77\r\ngot word\r\n/dev/pts/"), "{text}");
    }

    /// Input that comes in one piece with the request is there at once, and its end too.
    #[test]
    fn all_at_once() {
        for tty in [None, Some((80, 24))] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            ours.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut bytes = Vec::new();
            let argv = vec![b"sh".to_vec(), b"-c".to_vec(), b"read x; echo got $x".to_vec()];
            FromHost::Exec(Exec { argv, tty, ..Exec::default() }).put(&mut bytes);
            FromHost::Stdin(b"word\n".to_vec()).put(&mut bytes);
            FromHost::StdinEnd.put(&mut bytes);
            (&ours).write_all(&bytes).unwrap();
            std::thread::spawn(move || crate::session::serve(theirs.into(), &crate::network::Coming::none()));
            let mut host = Host { stream: ours, decoder: Decoder::default(), out: vec![], err: vec![], taken: 0 };
            assert!(matches!(host.next(), Some(FromGuest::Hello(1))));
            assert_eq!(host.end(), FromGuest::Exited(Exit::Code(0)));
            assert!(String::from_utf8_lossy(&host.out).contains("got word"), "{:?}", host.out);
            assert_eq!(host.taken, 5);
        }
    }

    #[test]
    fn a_background_process_does_not_hold_the_end_up() {
        let mut host = Host::shell("sleep 100 & echo $!");
        assert_eq!(host.end(), FromGuest::Exited(Exit::Code(0)));
        let pid: u32 = String::from_utf8(host.out).unwrap().trim().parse().unwrap();
        let _ = std::process::Command::new("kill").arg(pid.to_string()).status();
    }

    #[test]
    fn a_host_that_goes_hangs_the_program_up() {
        let mut host = Host::shell("echo $$; exec sleep 100");
        while host.out.is_empty() {
            if let Some(FromGuest::Stdout(bytes)) = host.next() {
                host.out.extend(bytes);
            }
        }
        let pid = String::from_utf8(host.out.clone()).unwrap();
        drop(host);
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        for _ in 0..1000 {
            if state().is_empty() || state().contains(" Z ") {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("it still runs: {}", state());
    }
}
