//! Named ports of the guest (`--port`): their host's ends, opened early (before the sandbox), started when the guest's end exists. What goes
//! through them are the user's data: nothing is lost while both ends are open, and a reader who stops makes the guest's writer wait.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio::console::{MAX_PORTS, Sink};
use virtio::{NamedPortHandle, Ports};

use crate::error::Error;
use crate::serial::{bind_unix, open_pty};

/// The longest name of a port.
const MAX_NAME: usize = 64;

/// Where a port leads on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortPlace {
    /// A Unix socket on which one client at a time may connect.
    Unix(PathBuf),
    /// Output is appended to a file, there is no input.
    File(PathBuf),
    /// A pseudo-terminal, whose name is printed.
    Pty,
}

/// `--port NAME=unix:PATH`, `file:PATH` or `pty`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortConfig {
    /// What the guest knows it by: /dev/virtio-ports/NAME.
    pub name: String,
    /// Its other end.
    pub place: PortPlace,
}

impl FromStr for PortConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some((name, place)) = text.split_once('=') else {
            return Err(format!("'{text}' is no port: write NAME=unix:PATH, NAME=file:PATH or NAME=pty"));
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.chars().all(plain) {
            return Err(format!(
                "'{name}' is no name of a port: up to {MAX_NAME} letters, digits, dots, dashes and underscores make one"
            ));
        }
        let place = match place.split_once(':') {
            None if place == "pty" => PortPlace::Pty,
            Some(("unix", path)) if !path.is_empty() => PortPlace::Unix(path.into()),
            Some(("file", path)) if !path.is_empty() => PortPlace::File(path.into()),
            _ => return Err(format!("'{place}' is no place for a port: choose unix:PATH, file:PATH or pty")),
        };
        Ok(Self { name: name.into(), place })
    }
}

enum End {
    Unix(UnixListener),
    File(File),
    /// The master, and the slave, kept open so that there always is somebody at the other end.
    Pty(File, File),
}

/// A port's opened end.
pub(crate) struct Opened {
    name: String,
    end: End,
}

/// Opens the host's ends. The second value are lines for the user.
pub(crate) fn open(configs: &[PortConfig]) -> Result<(Vec<Opened>, Vec<String>), Error> {
    if configs.len() > MAX_PORTS {
        return Err(Error::Input(format!("{} ports are too many: a VM has at most {MAX_PORTS}", configs.len())));
    }
    let (mut opened, mut lines) = (Vec::<Opened>::new(), Vec::new());
    for PortConfig { name, place } in configs {
        if opened.iter().any(|other| other.name == *name) {
            return Err(Error::Input(format!("there are two ports named {name}: name one otherwise")));
        }
        let end = match place {
            PortPlace::Unix(path) => {
                let listener = bind_unix(path, "port")?;
                lines.push(format!("port {name} on unix:{}", path.display()));
                End::Unix(listener)
            }
            PortPlace::File(path) => {
                let mut options = OpenOptions::new();
                // A pipe that nobody reads yet is no reason to wait.
                options.append(true).create(true).custom_flags(libc::O_NONBLOCK);
                let file = options.open(path).map_err(|error| Error::output("port output", path, error))?;
                End::File(file)
            }
            PortPlace::Pty => {
                let (master, slave, path) =
                    open_pty().map_err(|error| Error::Host(format!("the host gives no pseudo-terminal: {error}")))?;
                rustix::io::ioctl_fionbio(&master, true)
                    .map_err(|error| Error::Host(format!("the pseudo-terminal of a port: {error}")))?;
                lines.push(format!("port {name} on {path}"));
                End::Pty(master, slave)
            }
        };
        opened.push(Opened { name: name.clone(), end });
    }
    Ok((opened, lines))
}

/// Do some accept connections later?
pub(crate) fn need_sockets(ports: &[Opened]) -> bool {
    ports.iter().any(|port| matches!(port.end, End::Unix(_)))
}

/// Makes the device and starts the threads that bring input.
pub(crate) fn start(opened: Vec<Opened>) -> io::Result<Ports> {
    let (mut sinks, mut inputs) = (Vec::<(String, Box<dyn Sink>)>::new(), Vec::new());
    for Opened { name, end } in opened {
        let (sink, input): (Box<dyn Sink>, _) = match end {
            End::Unix(listener) => {
                let client = Client::default();
                (Box::new(ToClient(client.clone())), Input::Clients(listener, client))
            }
            End::File(file) => (Box::new(ToFile(file)), Input::None),
            End::Pty(master, slave) => (Box::new(ToFile(master.try_clone()?)), Input::Pty(master, slave)),
        };
        sinks.push((name, sink));
        inputs.push(input);
    }
    let (ports, handles) = Ports::new(sinks)?;
    for (input, handle) in inputs.into_iter().zip(handles) {
        input.start(handle)?;
    }
    Ok(ports)
}

/// A Unix socket's client, if there is one.
#[derive(Clone, Default)]
struct Client(Arc<Mutex<Option<UnixStream>>>);

impl Client {
    fn lock(&self) -> MutexGuard<'_, Option<UnixStream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Without a client what the guest writes is thrown away; it was told that nobody is there.
struct ToClient(Client);

impl Sink for ToClient {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let mut client = self.0.lock();
        let Some(stream) = client.as_mut() else { return Ok(data.len()) };
        let result = stream.write(data);
        if result.as_ref().is_err_and(|error| !passing(error)) {
            // The thread that reads from it sees its end too.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            *client = None;
        }
        result
    }

    fn wait(&mut self, at_most: Duration) {
        let copy = self.0.lock().as_ref().and_then(|stream| stream.try_clone().ok());
        if let Some(stream) = copy {
            wait_for(&stream, PollFlags::OUT, Some(at_most));
        }
    }
}

/// A file, or the master of a pseudo-terminal.
struct ToFile(File);

impl Sink for ToFile {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write(data)
    }

    fn wait(&mut self, at_most: Duration) {
        wait_for(&self.0, PollFlags::OUT, Some(at_most));
    }
}

fn passing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn wait_for(what: &impl AsFd, flags: PollFlags, at_most: Option<Duration>) {
    let time = at_most.map(|time| Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() });
    let _ = poll(&mut [PollFd::new(what, flags)], time.as_ref());
}

/// Where a port's input comes from.
enum Input {
    Clients(UnixListener, Client),
    Pty(File, File),
    None,
}

impl Input {
    fn start(self, handle: NamedPortHandle) -> io::Result<()> {
        let thread = std::thread::Builder::new().name("port".into());
        match self {
            Self::None => handle.set_open(true),
            Self::Pty(mut master, slave) => {
                handle.set_open(true);
                thread.spawn(move || {
                    let _slave: OwnedFd = slave.into();
                    read_all(&mut master, &handle);
                })?;
            }
            Self::Clients(listener, client) => {
                thread.spawn(move || {
                    loop {
                        let Ok((stream, _)) = listener.accept() else {
                            std::thread::sleep(Duration::from_millis(100));
                            continue;
                        };
                        let _ = stream.set_nonblocking(true);
                        let Ok(mut reader) = stream.try_clone() else { continue };
                        *client.lock() = Some(stream);
                        handle.set_open(true);
                        read_all(&mut reader, &handle);
                        *client.lock() = None;
                        handle.set_open(false);
                    }
                })?;
            }
        }
        Ok(())
    }
}

/// Moves all bytes, waiting for the guest, until the end of the input.
fn read_all(from: &mut (impl Read + AsFd), to: &NamedPortHandle) {
    let mut buffer = [0; 4096];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(len) => {
                if !to.send_all(buffer.get(..len).unwrap_or_default()) {
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => wait_for(from, PollFlags::IN, None),
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let port = |text: &str| text.parse::<PortConfig>();
        let unix = PortConfig { name: "org.a-b_1".into(), place: PortPlace::Unix("/x=y:z".into()) };
        assert_eq!(port("org.a-b_1=unix:/x=y:z"), Ok(unix));
        assert_eq!(port("a=pty").unwrap().place, PortPlace::Pty);
        assert_eq!(port("a=file:f").unwrap().place, PortPlace::File("f".into()));
        for bad in ["a", "=pty", "a/b=pty", ".=pty", "..=pty", "a=", "a=unix:", "a=file:", "a=stdio", "ä=pty"] {
            assert!(!port(bad).unwrap_err().contains('\n'), "{bad}");
        }
        assert!(port(&format!("{}=pty", "x".repeat(65))).is_err());
    }

    #[test]
    fn what_cannot_be_opened_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let unix = |name: &str| PortConfig { name: name.into(), place: PortPlace::Unix(dir.path().join(name)) };
        let message = |configs: &[PortConfig]| open(configs).err().map(|error| error.to_string()).unwrap_or_default();
        assert!(message(&[unix("a"), PortConfig { place: PortPlace::Pty, ..unix("a") }]).contains("two ports named a"));
        let many: Vec<_> = (0..=MAX_PORTS).map(|n| unix(&n.to_string())).collect();
        assert!(message(&many).contains("at most 16"));
        let nowhere = PortConfig { name: "x".into(), place: PortPlace::File(dir.path().join("no/file")) };
        assert!(message(&[nowhere]).contains("no/file"));
    }

    #[test]
    fn clients_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let (opened, _) = open(&[PortConfig { name: "a".into(), place: PortPlace::Unix(path.clone()) }]).unwrap();
        assert!(need_sockets(&opened));
        let Some(Opened { end: End::Unix(listener), .. }) = opened.into_iter().next() else { panic!() };
        let client = Client::default();
        let mut sink = ToClient(client.clone());
        assert_eq!(sink.write(b"nobody").unwrap(), 6);
        let (_ports, handles) = Ports::new(vec![("a".into(), Box::new(ToClient(client.clone())))]).unwrap();
        Input::Clients(listener, client.clone()).start(handles[0].clone()).unwrap();
        for _ in 0..2 {
            let mut stream = UnixStream::connect(&path).unwrap();
            let end = std::time::Instant::now() + Duration::from_secs(20);
            while client.lock().is_none() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert_eq!(sink.write(b"hello").unwrap(), 5);
            let mut text = [0; 5];
            stream.read_exact(&mut text).unwrap();
            assert_eq!(&text, b"hello");
            // Full: the guest waits, this process does not.
            let full = std::iter::repeat_with(|| sink.write(&[0; 65536])).find_map(Result::err).unwrap();
            assert_eq!(full.kind(), ErrorKind::WouldBlock);
            sink.wait(Duration::from_millis(1));
            drop(stream);
            while client.lock().is_some() && std::time::Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(client.lock().is_none());
        }
    }
}
