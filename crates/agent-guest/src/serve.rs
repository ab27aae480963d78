//! The agent's main loop: it listens, tells the host that it is there, and starts a process for each connection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use agent_protocol::{Exit, FromGuest, FromHost, PORT, VERSION};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::time::{ClockId, clock_settime};

use crate::network::Coming;
use crate::session::{self, Connection};
use crate::{init, modules, system};

/// How long until the next try to reach the host.
const AGAIN: Duration = Duration::from_millis(500);
/// A clock that is off by less is right.
const CLOCK_TOLERANCE: Duration = Duration::from_millis(100);

static INIT: AtomicBool = AtomicBool::new(false);

/// Is process 1 this very program?
pub fn we_are_init() -> bool {
    INIT.load(Ordering::Relaxed)
}

/// Runs as a service; returns only with an error.
pub fn daemon() -> io::Result<()> {
    init::terminals();
    // Where vsock is a module, asking for a socket loads it, but not the driver of the device.
    modules::load(&[modules::VSOCK]);
    Agent::new(None).run()
}

/// What process 1 has besides.
pub struct Init {
    /// Gives the signals that it gets.
    pub signals: OwnedFd,
    /// Gives two bytes when the command that it was started with has ended.
    pub main: Option<OwnedFd>,
    /// For which commands wait.
    pub network: Coming,
}

/// The agent.
pub struct Agent {
    listener: Option<OwnedFd>,
    /// To the host: that we are there, and what time it is.
    control: Option<Connection>,
    init: Option<Init>,
}

impl Agent {
    pub fn new(init: Option<Init>) -> Self {
        INIT.store(init.is_some(), Ordering::Relaxed);
        Self { listener: None, control: None, init }
    }

    /// Serves for ever; an error only where that is impossible.
    pub fn run(mut self) -> io::Result<()> {
        system::forget_children(true);
        let mut told = false;
        loop {
            if self.listener.is_none() {
                match system::listen(PORT) {
                    Ok(listener) => self.listener = Some(listener),
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse && self.init.is_none() => {
                        return Err(io::Error::other("another agent runs"));
                    }
                    Err(error) => {
                        if !std::mem::replace(&mut told, true) && self.init.is_none() {
                            crate::complain(&format!("waiting for a vsock device: {error}"));
                        }
                    }
                }
            }
            if self.listener.is_some() && self.control.is_none() {
                crate::ports::link();
                self.control = system::connect(PORT).and_then(hello).ok();
            }
            self.wait()?;
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        let complete = self.listener.is_some() && self.control.is_some();
        let nap = Timespec { tv_sec: 0, tv_nsec: AGAIN.as_nanos() as _ };
        let (mut fds, mut whose) = (Vec::with_capacity(4), Vec::with_capacity(4));
        let mut add = |fd, who| {
            fds.push(fd);
            whose.push(who);
        };
        if let Some(listener) = &self.listener {
            add(PollFd::new(listener, PollFlags::IN), Who::Listener);
        }
        if let Some(control) = &self.control {
            add(PollFd::new(&control.stream, PollFlags::IN), Who::Control);
        }
        if let Some(init) = &self.init {
            add(PollFd::new(&init.signals, PollFlags::IN), Who::Signals);
            if let Some(main) = &init.main {
                add(PollFd::new(main, PollFlags::IN), Who::Main);
            }
        }
        match poll(&mut fds, (!complete).then_some(&nap)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        let woken: Vec<Who> = fds.iter().zip(whose).filter(|(fd, _)| ready(fd)).map(|(_, who)| who).collect();
        drop(fds);
        for who in woken {
            match who {
                Who::Listener => self.accept(),
                Who::Control => self.hear(),
                Who::Signals => self.signal()?,
                Who::Main => self.main_ended()?,
            }
        }
        Ok(())
    }

    /// Starts a process for each connection that waits.
    fn accept(&mut self) {
        while let Some(listener) = &self.listener {
            let connection = match system::accept(listener) {
                Ok(connection) => connection,
                Err(error) => {
                    match error.kind() {
                        io::ErrorKind::WouldBlock => return,
                        io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                        // No memory, no descriptors: for now.
                        _ => std::thread::sleep(Duration::from_millis(10)),
                    }
                    return;
                }
            };
            // Where there can be no more processes, the host sees the connection closed.
            if let Ok(None) = system::fork() {
                self.listener = None;
                self.control = None;
                let network = self.init.take().map_or_else(Coming::none, |init| init.network);
                system::forget_children(false);
                std::process::exit(i32::from(session::serve(connection, &network).is_err()));
            }
        }
    }

    fn hear(&mut self) {
        let Some(control) = &mut self.control else { return };
        let mut alive = matches!(control.read_some(), Ok(true));
        while alive {
            match control.waiting() {
                Ok(Some(FromHost::Clock(seconds, nanoseconds))) => set_clock(seconds, nanoseconds),
                Ok(Some(FromHost::Window(columns, rows))) => set_console_size(columns, rows),
                Ok(None) => return,
                _ => alive = false,
            }
        }
        self.control = None;
        // Not at once again and again, if the host hangs up for a reason.
        std::thread::sleep(Duration::from_millis(20));
    }

    fn signal(&mut self) -> io::Result<()> {
        let Some(init) = &self.init else { return Ok(()) };
        // struct signalfd_siginfo: its first field is the number.
        let mut info = [0; 128];
        let len = rustix::io::read(&init.signals, &mut info).unwrap_or(0);
        if len < info.len() {
            return Ok(());
        }
        let [a, b, c, d, ..] = info;
        let reboot = matches!(u32::from_ne_bytes([a, b, c, d]) as i32, libc::SIGTERM | libc::SIGINT);
        crate::power::as_init(reboot)
    }

    fn main_ended(&mut self) -> io::Result<()> {
        let mut how = [0, 255];
        if let Some(main) = self.init.as_mut().and_then(|init| init.main.take()) {
            let _ = rustix::io::read(&main, &mut how);
        }
        let [kind, value] = how;
        let exit = if kind == 0 { Exit::Code(value) } else { Exit::Signal(value) };
        if self.control.is_none() {
            self.control = system::connect(PORT).and_then(hello).ok();
        }
        if let Some(control) = &mut self.control {
            let _ = control.send(&FromGuest::MainExited(exit));
        }
        crate::power::as_init(false)
    }
}

/// Who is waited for.
enum Who {
    Listener,
    Control,
    Signals,
    Main,
}

fn hello(fd: OwnedFd) -> io::Result<Connection> {
    let mut control = Connection::new(fd);
    control.send(&FromGuest::Hello(VERSION))?;
    Ok(control)
}

/// Whoever uses the console hears of its new size by SIGWINCH.
fn set_console_size(columns: u16, rows: u16) {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    if let Ok(console) = rustix::fs::open("/dev/console", flags, Mode::empty()) {
        let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        let _ = tcsetwinsize(&console, size);
    }
}

fn set_clock(seconds: u64, nanoseconds: u32) {
    let Some(now) = UNIX_EPOCH.checked_add(Duration::new(seconds, nanoseconds.min(999_999_999))) else { return };
    let here = SystemTime::now();
    let off = now.duration_since(here).or_else(|_| here.duration_since(now)).unwrap_or_default();
    if off > CLOCK_TOLERANCE
        && let Ok(tv_sec) = i64::try_from(seconds)
    {
        let _ = clock_settime(ClockId::Realtime, Timespec { tv_sec, tv_nsec: nanoseconds.min(999_999_999).into() });
    }
}
