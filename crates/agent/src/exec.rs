//! A program in the guest with this process's input, output, signals and terminal.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use agent_protocol::{Exec, FrameError, FromGuest, FromHost, STDIN_WINDOW};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::stdio::{stderr, stdin, stdout};
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};

use crate::session::{Problem, Session};

/// Signals that go on to the program.
const PASSED_ON: [libc::c_int; 6] =
    [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT, libc::SIGUSR1, libc::SIGUSR2];
/// So many of the same kind in a row end this process, whatever the guest does.
const INSIST: u32 = 3;

/// Is this process's input and output a terminal?
pub fn on_terminal() -> bool {
    isatty(stdin()) && isatty(stdout())
}

/// Columns and rows of this process's terminal.
pub fn terminal_size() -> (u16, u16) {
    tcgetwinsize(stdout()).map_or((80, 24), |size| (size.ws_col.max(1), size.ws_row.max(1)))
}

/// The terminal in raw mode, put back when dropped.
#[derive(Debug)]
pub struct Raw(Option<Termios>);

impl Raw {
    /// Puts standard input, if it is a terminal, into raw mode.
    pub fn enter() -> Self {
        let Ok(before) = tcgetattr(stdin()) else { return Self(None) };
        let mut raw = before.clone();
        raw.make_raw();
        match tcsetattr(stdin(), OptionalActions::Now, &raw) {
            Ok(()) => Self(Some(before)),
            Err(_) => Self(None),
        }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}

/// Signals as they come, in place of what they do.
struct Signals(OwnedFd);

impl Signals {
    fn new() -> io::Result<Self> {
        // SAFETY: the set is a local, made empty first; the descriptor is new.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            for signal in PASSED_ON.into_iter().chain([libc::SIGWINCH]) {
                libc::sigaddset(&raw mut set, signal);
            }
            if libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
            let fd = libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self(OwnedFd::from_raw_fd(fd)))
        }
    }

    fn next(&self) -> Option<libc::c_int> {
        // struct signalfd_siginfo: its first field is the number.
        let mut info = [0; 128];
        // SAFETY: reads into a local of that size.
        let len = unsafe { libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), info.len()) };
        let [a, b, c, d, ..] = info;
        (len == info.len() as isize).then(|| u32::from_ne_bytes([a, b, c, d]) as libc::c_int)
    }
}

/// Runs a program to its end; returns the exit code for this process, 128 + n after signal n. With [`Exec::tty`], this process's terminal
/// is the program's, in raw mode. While it runs, SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 go to the program.
///
/// # Errors
/// Any [`Problem`]; [`Problem::Failed`] with 127 and 126 as shells have them.
pub fn run(mut session: Session, exec: Exec) -> Result<i32, Problem> {
    let tty = exec.tty.is_some();
    session.send(&FromHost::Exec(exec))?;
    let signals = Signals::new().map_err(Problem::Here)?;
    let _raw = tty.then(Raw::enter);
    let mut talk = Talk { session, signals, tty, open: true, ahead: 0, insisted: (0, 0) };
    loop {
        if let Some(code) = talk.turn()? {
            return Ok(code);
        }
    }
}

struct Talk {
    session: Session,
    signals: Signals,
    tty: bool,
    /// Our input has not ended.
    open: bool,
    /// Bytes of input sent that were not taken yet.
    ahead: usize,
    /// The signal that came last, and how often in a row.
    insisted: (libc::c_int, u32),
}

impl Talk {
    fn turn(&mut self) -> Result<Option<i32>, Problem> {
        let input = self.open && self.ahead < STDIN_WINDOW;
        let stdin = stdin();
        let mut fds =
            vec![PollFd::new(&self.session.stream, PollFlags::IN), PollFd::new(&self.signals.0, PollFlags::IN)];
        if input {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Problem::Here(error.into())),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let is_ready = |at: usize| ready.get(at) == Some(&true);
        if is_ready(1)
            && let Some(code) = self.signal()
        {
            return Ok(Some(code));
        }
        if is_ready(2) {
            self.input();
        }
        if is_ready(0) {
            let more = self.session.read_some()?;
            while let Some(message) = self.session.waiting()? {
                if let Some(code) = self.hear(message)? {
                    return Ok(Some(code));
                }
            }
            if !more {
                return Err(Problem::Gone(
                    "the command's end is not known: the connection to the guest's agent was lost, as the agent or the guest has ended"
                        .into(),
                ));
            }
        }
        Ok(None)
    }

    /// Says something to the agent. If it has hung up, then what it said last is why: that is still to be read.
    fn tell(&mut self, message: &FromHost) {
        if self.session.send(message).is_err() {
            self.open = false;
        }
    }

    fn signal(&mut self) -> Option<i32> {
        while let Some(signal) = self.signals.next() {
            if signal == libc::SIGWINCH {
                if self.tty {
                    let (columns, rows) = terminal_size();
                    self.tell(&FromHost::Window(columns, rows));
                }
                continue;
            }
            self.insisted = if self.insisted.0 == signal { (signal, self.insisted.1 + 1) } else { (signal, 1) };
            if self.insisted.1 >= INSIST {
                return Some(128 + signal);
            }
            self.tell(&FromHost::Signal(signal as u8));
        }
        None
    }

    fn input(&mut self) {
        let mut buffer = vec![0; (64 << 10).min(STDIN_WINDOW - self.ahead)];
        match rustix::io::read(stdin(), &mut buffer) {
            Ok(len) if len > 0 => {
                buffer.truncate(len);
                self.ahead += len;
                self.tell(&FromHost::Stdin(buffer));
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Ok(_) | Err(_) => {
                self.open = false;
                self.tell(&FromHost::StdinEnd);
            }
        }
    }

    fn hear(&mut self, message: FromGuest) -> Result<Option<i32>, Problem> {
        let written = match message {
            FromGuest::Started(_) => Ok(()),
            FromGuest::Stdout(bytes) => write_all(false, &bytes),
            FromGuest::Stderr(bytes) => write_all(true, &bytes),
            FromGuest::Taken(count) => {
                self.ahead = self.ahead.checked_sub(count as usize).ok_or(FrameError::Malformed(68))?;
                Ok(())
            }
            FromGuest::Exited(exit) => return Ok(Some(exit.code())),
            FromGuest::Failed(code, why) => return Err(Problem::Failed(code, why)),
            _ => return Err(FrameError::Malformed(66).into()),
        };
        match written {
            Ok(()) => Ok(None),
            // As if the program itself had written there.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Some(128 + libc::SIGPIPE)),
            Err(error) => Err(Problem::Here(io::Error::other(format!("output cannot be written: {error}")))),
        }
    }
}

fn write_all(to_errors: bool, mut bytes: &[u8]) -> io::Result<()> {
    let to = if to_errors { stderr() } else { stdout() };
    while !bytes.is_empty() {
        match rustix::io::write(to, bytes) {
            Ok(len) => bytes = bytes.get(len..).unwrap_or_default(),
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => {
                // Somebody who shares it made it non-blocking.
                let mut fds = [PollFd::new(&to, PollFlags::OUT)];
                let _ = poll(&mut fds, None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    let _ = io::stdout().flush();
    Ok(())
}
