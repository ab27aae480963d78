//! The user's terminal: raw while the guest runs, as it was on every way out.

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Code, Kernel, LIMIT};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};

/// A command on a terminal of its own.
struct OnTerminal {
    child: Child,
    master: File,
    slave: File,
    before: Termios,
    seen: String,
}

impl OnTerminal {
    fn start(mut command: Command) -> Self {
        let master: File = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap().into();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = File::options().read(true).write(true).open(name).unwrap();
        let before = tcgetattr(&slave).unwrap();
        let end = || Stdio::from(slave.try_clone().unwrap());
        command.stdin(end()).stdout(end()).stderr(end());
        // SAFETY: between fork and exec only two system calls are made: a new session, and its controlling terminal.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        Self { child, master, slave, before, seen: String::new() }
    }

    fn raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO)
    }

    fn restored(&self) -> bool {
        let now = tcgetattr(&self.slave).unwrap();
        now.local_modes == self.before.local_modes
            && now.input_modes == self.before.input_modes
            && now.output_modes == self.before.output_modes
            && now.control_modes == self.before.control_modes
    }

    fn wait_until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let deadline = Instant::now() + LIMIT;
        while !condition(self) {
            assert!(Instant::now() < deadline, "{what} did not come about; seen: {}", self.seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn expect(&mut self, text: &str) {
        let deadline = Instant::now() + LIMIT;
        let mut buffer = [0; 4096];
        while !self.seen.contains(text) {
            assert!(Instant::now() < deadline, "{text} did not come; seen: {}", self.seen);
            let len = self.master.read(&mut buffer).unwrap();
            self.seen.push_str(&String::from_utf8_lossy(&buffer[..len]));
        }
        self.seen.clear();
    }

    fn send(&mut self, keys: &[u8]) {
        self.master.write_all(keys).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id() as i32).unwrap()
    }

    fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// The exit code; the terminal must be as it was.
    fn end(mut self) -> Option<i32> {
        let deadline = Instant::now() + LIMIT;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "no end");
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(self.restored(), "the terminal was not restored");
        status.code()
    }
}

/// A guest that says it is up and sends back what is typed, on a terminal.
fn echo() -> (Kernel, OnTerminal) {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let mut terminal = OnTerminal::start(kernel.run(&[]));
    terminal.expect("up");
    assert!(terminal.raw());
    (kernel, terminal)
}

#[test]
fn power_off() {
    let (_kernel, mut terminal) = echo();
    terminal.send(b"abc");
    terminal.expect("abc");
    terminal.send(b"q");
    assert_eq!(terminal.end(), Some(0));
}

#[test]
fn keys() {
    let (_kernel, mut terminal) = echo();
    terminal.send(b"\x03\x1a\x01a1");
    terminal.expect("\x03\x1a\x011"); // Ctrl-C and Ctrl-Z are the guest's
    terminal.send(b"\x01h");
    terminal.expect("Ctrl-A X");
    terminal.send(b"\x01c");
    terminal.expect("counters: engine");
    terminal.send(b"\x01x");
    assert_eq!(terminal.end(), Some(0));
}

#[test]
fn signals() {
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129), (Signal::QUIT, 131)] {
        let (_kernel, terminal) = echo();
        terminal.signal(signal);
        assert_eq!(terminal.end(), Some(code));
    }
}

#[test]
fn an_abort() {
    let (_kernel, terminal) = echo();
    terminal.signal(Signal::ABORT);
    assert_eq!(terminal.end(), None);
}

#[test]
fn a_crash() {
    let kernel = Kernel::new(Code::new().print("up").triple_fault());
    let mut terminal = OnTerminal::start(kernel.run(&[]));
    terminal.expect("triple fault");
    assert_eq!(terminal.end(), Some(3));
}

#[test]
fn an_error_before_the_start() {
    let terminal = OnTerminal::start(common::run(&["--kernel", "/nonexistent"]));
    assert_eq!(terminal.end(), Some(1));
}

#[test]
fn stopping_and_going_on() {
    let (_kernel, mut terminal) = echo();
    for _ in 0..3 {
        terminal.signal(Signal::TSTP);
        terminal.wait_until("the stop", |t| {
            waitpid(Some(t.pid()), WaitOptions::UNTRACED | WaitOptions::NOHANG)
                .unwrap()
                .is_some_and(|(_, status)| status.stopped())
        });
        assert!(terminal.restored());
        terminal.signal(Signal::CONT);
        terminal.wait_until("raw mode", OnTerminal::raw);
        terminal.send(b"on");
        terminal.expect("on");
    }
    terminal.send(b"q");
    assert_eq!(terminal.end(), Some(0));
}

/// The guest's terminal has the size of the user's, also when that changes: the serial console by the agent, a virtio console by itself.
#[test]
fn the_window_has_its_size_in_the_guest() {
    let name = format!("window-{}", std::process::id());
    let resize = |terminal: &OnTerminal, columns, rows| {
        let size = rustix::termios::Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(&terminal.master, size).unwrap();
    };
    let size = |device: &str| {
        let done = common::finish(common::tightrope(&["exec", "-T", &name, "stty", "-F", device, "size"]), b"");
        done.out.trim().to_string()
    };
    for (options, device) in [
        (&[][..], "/dev/ttyS0"),
        (&["--virtio-console", "stdio", "--serial", "none", "--append", "console=hvc0"], "/dev/hvc0"),
    ] {
        let mut terminal = OnTerminal::start(common::run(&[&["--net", "none", "--name", &name], options].concat()));
        resize(&terminal, 101, 37);
        common::wait("the first size", || size(device) == "37 101");
        // A program at the terminal is told of the change, and one on a terminal of its own too.
        // (Not the shell itself: it is not in the foreground while it waits for another program.)
        terminal.send(
            b"sh -c 'trap \"echo now \\$(stty size)\" WINCH; echo waiting-$((1+1)); while :; do usleep 50000; done'\n",
        );
        terminal.expect("waiting-2");
        let script = "trap 'echo now $(stty size)' WINCH; echo waiting; while :; do usleep 50000; done";
        let mut other = OnTerminal::start(common::tightrope(&["exec", "-it", &name, "sh", "-c", script]));
        other.expect("waiting");
        resize(&terminal, 132, 50);
        terminal.expect("now 50 132");
        common::wait("the other size", || size(device) == "50 132");
        resize(&other, 99, 33);
        other.expect("now 33 99");
        terminal.send(b"\x01x");
        assert_eq!(terminal.end(), Some(0));
        assert_eq!(other.end(), Some(1));
    }
}

/// A console that goes to a file: what is piped in is its input all the same.
#[test]
fn a_script_for_a_console_that_goes_to_a_file() {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let file = kernel.dir.path().join("console");
    let place = format!("file:{}", file.display());
    let console = || std::fs::read_to_string(&file).unwrap();
    let done = common::finish(kernel.run(&["--serial", &place]), b"one, q");
    assert_eq!((done.code(), done.out.as_str(), console().as_str()), (Some(0), "", "upone, q"), "{done:?}");
    let linux = common::run(&["--net=none", "--serial", &place]);
    let done = common::finish(linux, b"echo it-is-$((6*7)); poweroff -f\n");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), ""), "{done:?}");
    assert!(console().contains("it-is-42"), "{}", console());
    let linux = common::run(&["--net=none", "--serial=none", "--virtio-console", &place, "--append=console=hvc0"]);
    let done = common::finish(linux, b"echo it-is-$((7*7)); poweroff -f\n");
    assert_eq!(done.code(), Some(0), "{done:?}");
    assert!(console().contains("it-is-49"), "{}", console());
}
