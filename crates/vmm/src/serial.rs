//! Where the serial console goes on the host: opened early (before the sandbox), started when the guest's end exists.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::config::SerialMode;
use crate::console::{Escape, HELP, Input, Key, Output, feed};
use crate::control::Hub;
use crate::error::Error;
use crate::events::{Event, Events};
use crate::terminal;

/// The guest's end of the input, which a reset replaces.
#[derive(Default)]
pub(crate) struct InputSlot(Mutex<Option<Arc<dyn Input>>>);

impl InputSlot {
    /// Input goes to `input` from now on.
    pub(crate) fn set(&self, input: Arc<dyn Input>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(input);
    }

    fn get(&self) -> Option<Arc<dyn Input>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Input for InputSlot {
    fn offer(&self, bytes: &[u8]) -> usize {
        self.get().map_or(0, |input| input.offer(bytes))
    }

    fn wait_for_room(&self, at_most: Duration) {
        match self.get() {
            Some(input) => input.wait_for_room(at_most),
            None => std::thread::sleep(at_most),
        }
    }
}

/// Holds piped input back until the guest listens: what arrives earlier would be thrown away when the guest opens its console.
pub(crate) struct Gate {
    /// What the guest's shell says first, on whichever console.
    marker: Option<String>,
    started: Instant,
    open: Mutex<bool>,
    opened: Condvar,
}

impl Gate {
    /// A gate that the guest opens by writing `marker`; without one it is open.
    pub(crate) fn new(marker: Option<String>, started: Instant) -> Arc<Self> {
        let open = Mutex::new(marker.is_none());
        Arc::new(Self { marker, started, open, opened: Condvar::new() })
    }

    /// Watches what the guest writes on a console. When the marker comes, the user is told how long it took.
    pub(crate) fn watch(self: &Arc<Self>, output: &Output) {
        let Some(marker) = &self.marker else { return };
        let (gate, written) = (self.clone(), output.clone());
        let found = move || {
            if std::mem::replace(&mut *gate.open.lock().unwrap_or_else(PoisonError::into_inner), true) {
                return;
            }
            gate.opened.notify_all();
            let elapsed = gate.started.elapsed();
            written.flush(Duration::from_millis(200));
            terminal::message(&format!("tightrope: shell after {:.1} s", elapsed.as_secs_f64()));
        };
        output.watch_for(marker, Box::new(found));
    }

    fn wait(&self) {
        let open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if *open {
            return;
        }
        drop(self.opened.wait_while(open, |open| !*open));
        // The marker is the start of the prompt: let the shell finish setting its terminal up, or it may throw input away.
        std::thread::sleep(Duration::from_millis(150));
    }
}

/// An opened console.
pub(crate) enum Serial {
    Stdio,
    None,
    /// Where output goes, and whether standard input is the input.
    File(File, bool),
    /// The master, and the slave, kept open so that writing never fails for want of a reader.
    Pty(File, File),
    Unix(UnixListener),
    /// The log, and who is attached. Input comes from those.
    Log(File, Hub),
}

/// Opens what is to be written to, and makes it if it is not there. Nobody is waited for who reads a pipe; writing to it waits.
pub(crate) fn open_output(options: &mut OpenOptions, path: &Path) -> std::io::Result<File> {
    let file = options.create(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    rustix::fs::fcntl_setfl(&file, rustix::fs::fcntl_getfl(&file)? - rustix::fs::OFlags::NONBLOCK)?;
    Ok(file)
}

impl Serial {
    /// Opens what `mode` names. The second value is a line for the user, if there is something to say.
    pub(crate) fn open(mode: &SerialMode) -> Result<(Self, Option<String>), Error> {
        match mode {
            SerialMode::Stdio => Ok((Self::Stdio, None)),
            // The log is the instance's: see `Vm::new`.
            SerialMode::None | SerialMode::Log => Ok((Self::None, None)),
            SerialMode::File(path) => {
                let file = open_output(OpenOptions::new().append(true), path)
                    .map_err(|error| Error::output("console output", path, error))?;
                Ok((Self::File(file, false), None))
            }
            SerialMode::Pty => {
                let (master, slave, name) =
                    open_pty().map_err(|error| Error::Host(format!("the host gives no pseudo-terminal: {error}")))?;
                Ok((Self::Pty(master, slave), Some(format!("console on {name}"))))
            }
            SerialMode::Unix(path) => {
                let listener = bind_unix(path, "console")?;
                Ok((Self::Unix(listener), Some(format!("console on unix:{}", path.display()))))
            }
        }
    }

    /// Is it the user's terminal (or what stands in for it)?
    pub(crate) fn is_stdio(&self) -> bool {
        matches!(self, Self::Stdio)
    }

    /// Makes standard input the input of a console that goes to a file; says whether it is one.
    pub(crate) fn take_input(&mut self) -> bool {
        match self {
            Self::File(_, input) => {
                *input = true;
                true
            }
            _ => false,
        }
    }

    /// Does it accept connections later?
    pub(crate) fn needs_sockets(&self) -> bool {
        // A socket may also have been given to us as standard input or output.
        match self {
            Self::Unix(_) => true,
            Self::Stdio => false,
            Self::None | Self::File(..) | Self::Pty(..) | Self::Log(..) => false,
        }
    }

    /// Starts the threads that move bytes. Input goes to `slot`; piped input when `gate` is open.
    pub(crate) fn start(self, events: &Events, slot: Arc<InputSlot>, gate: Arc<Gate>) -> std::io::Result<Output> {
        match self {
            Self::Stdio => {
                terminal::enter_raw()?;
                let to = start_feeder(slot)?;
                let is_terminal = terminal::is_terminal();
                let quit = events.clone();
                if is_terminal {
                    std::thread::Builder::new().name("console-in".into()).spawn(move || read_keys(&to, &quit))?;
                } else {
                    start_piped(to, gate)?;
                }
                let quit = events.clone();
                let broken = move || {
                    terminal::message("tightrope: standard output was closed: the guest is switched off");
                    let _ = quit.send(Event::Quit(1));
                };
                Output::start(Box::new(Stdout), Box::new(broken))
            }
            Self::None => Output::start(Box::new(std::io::sink()), Box::new(|| ())),
            Self::File(file, input) => {
                if input {
                    start_piped(start_feeder(slot)?, gate)?;
                }
                let broken =
                    || terminal::message("tightrope: console output cannot be written any more: is the disk full?");
                Output::start(Box::new(file), Box::new(broken))
            }
            Self::Pty(master, slave) => {
                let to = start_feeder(slot)?;
                let mut reader = master.try_clone()?;
                std::thread::Builder::new().name("console-in".into()).spawn(move || {
                    let _slave = slave;
                    read_all(&mut reader, &to);
                })?;
                Output::start(Box::new(master), Box::new(|| ()))
            }
            Self::Log(file, hub) => {
                Output::start(Box::new(Both(registry::ring::Writer::new(file), hub)), Box::new(|| ()))
            }
            Self::Unix(listener) => {
                let to = start_feeder(slot)?;
                let client = Arc::new(Mutex::new(None));
                let sink = ToClient(client.clone());
                std::thread::Builder::new().name("console-in".into()).spawn(move || {
                    loop {
                        let Ok((mut stream, _)) = listener.accept() else {
                            std::thread::sleep(Duration::from_millis(100));
                            continue;
                        };
                        *client.lock().unwrap_or_else(PoisonError::into_inner) = stream.try_clone().ok();
                        read_all(&mut stream, &to);
                        *client.lock().unwrap_or_else(PoisonError::into_inner) = None;
                    }
                })?;
                Output::start(Box::new(sink), Box::new(|| ()))
            }
        }
    }
}

/// Everything goes to the log, and to who is attached.
struct Both(registry::ring::Writer, Hub);

impl Write for Both {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // What cannot be logged is still for those who look on.
        let logged = self.0.write_all(bytes);
        self.1.write_all(bytes)?;
        logged.map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Standard output without Rust's own line buffer.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match rustix::io::write(rustix::stdio::stdout(), bytes) {
            Ok(len) => Ok(len),
            Err(rustix::io::Errno::AGAIN) => {
                // Somebody who shares it made it non-blocking.
                let mut poll =
                    [rustix::event::PollFd::from_borrowed_fd(rustix::stdio::stdout(), rustix::event::PollFlags::OUT)];
                let _ = rustix::event::poll(&mut poll, None);
                Err(std::io::ErrorKind::Interrupted.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The client of a Unix socket; without one, output is thrown away.
struct ToClient(Arc<Mutex<Option<UnixStream>>>);

impl Write for ToClient {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // Not under the lock: a client that does not read must not keep the next from coming.
        let client = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_ref().and_then(|c| c.try_clone().ok());
        if let Some(mut client) = client
            && client.write_all(bytes).is_err()
        {
            *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Starts the thread that gives bytes to the guest as fast as it takes them.
fn start_feeder(slot: Arc<InputSlot>) -> std::io::Result<SyncSender<Vec<u8>>> {
    let (to, from) = sync_channel::<Vec<u8>>(16);
    std::thread::Builder::new().name("console-feed".into()).spawn(move || {
        for bytes in from {
            feed(&*slot, &bytes, &|| false);
        }
    })?;
    Ok(to)
}

/// Starts the thread that gives all of standard input to the guest, once that listens.
fn start_piped(to: SyncSender<Vec<u8>>, gate: Arc<Gate>) -> std::io::Result<()> {
    std::thread::Builder::new().name("console-in".into()).spawn(move || {
        gate.wait();
        read_all(&mut std::io::stdin(), &to);
    })?;
    Ok(())
}

/// Reads keys typed at the terminal. What the guest does not take in time is lost, as on any terminal; key commands never are.
fn read_keys(to: &SyncSender<Vec<u8>>, events: &Events) {
    let mut escape = Escape::default();
    let mut buffer = [0; 4096];
    while let Some(typed) = read_some(&mut std::io::stdin(), &mut buffer) {
        let mut bytes = Vec::with_capacity(typed.len());
        for &byte in typed {
            let sent = match escape.key(byte) {
                Key::Nothing => Ok(()),
                Key::Byte(byte) => {
                    bytes.push(byte);
                    Ok(())
                }
                Key::Help => {
                    terminal::message(&format!("\n{HELP}"));
                    Ok(())
                }
                Key::Quit => events.send(Event::Quit(0)),
                Key::Stats => events.send(Event::Stats),
            };
            if sent.is_err() {
                return;
            }
        }
        if !bytes.is_empty() && matches!(to.try_send(bytes), Err(std::sync::mpsc::TrySendError::Disconnected(_))) {
            return;
        }
    }
}

/// Moves all bytes, waiting for the guest, until the end of the input. The guest goes on without.
fn read_all(from: &mut dyn Read, to: &SyncSender<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Some(bytes) = read_some(from, &mut buffer) {
        if to.send(bytes.to_vec()).is_err() {
            return;
        }
    }
}

/// One read; `None` at the end of the input.
fn read_some<'a>(from: &mut dyn Read, buffer: &'a mut [u8]) -> Option<&'a [u8]> {
    loop {
        match from.read(buffer) {
            Ok(0) => return None,
            Ok(len) => return buffer.get(..len),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(_) => return None,
        }
    }
}

pub(crate) fn open_pty() -> std::io::Result<(File, File, String)> {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&master)?;
    unlockpt(&master)?;
    let name = ptsname(&master, Vec::new())?.to_string_lossy().into_owned();
    let slave = OpenOptions::new().read(true).write(true).open(&name)?;
    let mut settings = rustix::termios::tcgetattr(&slave)?;
    settings.make_raw();
    rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &settings)?;
    Ok((master.into(), slave, name))
}

/// A listening Unix socket at `path`. A socket that a dead process left behind is replaced; a live one, and anything else, is not.
pub(crate) fn bind_unix(path: &Path, what: &str) -> Result<UnixListener, Error> {
    let left_behind = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused);
    if left_behind {
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            Error::file(&format!("{what} socket"), path, "is in use: choose another path or remove it")
        }
        _ => Error::file(&format!("{what} socket"), path, error),
    })
}
