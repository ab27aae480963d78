//! The gdb stub: `--gdb`. A thread accepts one debugger at a time and hands what it sends to the supervisor, which owns the protocol
//! ([`gdbstub`]) and the vCPUs ([`target`]).

mod arch;
pub(crate) mod target;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};

use crate::config::GdbAddress;
use crate::error::Error;
use crate::events::{DebuggerEvent, Event, Events};

/// A connection to a debugger.
#[derive(Debug)]
pub(crate) enum Stream {
    /// By TCP.
    Tcp(TcpStream),
    /// By a Unix socket.
    Unix(UnixStream),
}

impl Stream {
    /// A second handle on the same connection.
    pub(crate) fn try_clone(&self) -> std::io::Result<Self> {
        Ok(match self {
            Self::Tcp(stream) => Self::Tcp(stream.try_clone()?),
            Self::Unix(stream) => Self::Unix(stream.try_clone()?),
        })
    }

    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }

    /// Ends the connection in both directions.
    pub(crate) fn shut_down(&self) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(std::net::Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(std::net::Shutdown::Both),
        };
    }
}

impl gdbstub::conn::Connection for Stream {
    type Error = std::io::Error;

    fn write(&mut self, byte: u8) -> std::io::Result<()> {
        self.write_all(&[byte])
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => Write::write_all(stream, bytes),
            Self::Unix(stream) => Write::write_all(stream, bytes),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A socket that waits for a debugger.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// Opens the socket and says where it is.
    pub(crate) fn open(address: &GdbAddress) -> Result<(Self, String), Error> {
        match address {
            GdbAddress::Tcp(address) => {
                let listener = TcpListener::bind(address).map_err(|error| {
                    Error::Host(format!("cannot wait for gdb on {address}: {error}; choose another port"))
                })?;
                let place = listener.local_addr().unwrap_or(*address);
                let mut text = format!("waiting for gdb: target remote {place}");
                if !place.ip().is_loopback() {
                    text.push_str("\ntightrope: warning: whoever reaches this address controls the guest");
                }
                Ok((Self::Tcp(listener), text))
            }
            GdbAddress::Unix(path) => {
                let listener = crate::serial::bind_unix(path, "gdb")?;
                Ok((Self::Unix(listener), format!("waiting for gdb: target remote {}", path.display())))
            }
        }
    }

    fn accept(&self) -> std::io::Result<Stream> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                Ok(Stream::Tcp(stream))
            }
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept()?.0)),
        }
    }

    /// Starts the thread that serves debuggers, one after the other.
    pub(crate) fn start(self, events: Events) -> std::io::Result<()> {
        std::thread::Builder::new().name("gdb".into()).spawn(move || {
            let report = |event| events.send(Event::Debugger(event)).is_ok();
            loop {
                let Ok(mut stream) = self.accept() else {
                    std::thread::sleep(std::time::Duration::from_millis(100));
                    continue;
                };
                let Ok(copy) = stream.try_clone() else { continue };
                if !report(DebuggerEvent::Connected(copy)) {
                    return;
                }
                let mut buffer = [0; 4096];
                loop {
                    match stream.read(&mut buffer) {
                        Ok(0) => break,
                        Ok(len) => {
                            if !report(DebuggerEvent::Bytes(buffer.get(..len).unwrap_or_default().to_vec())) {
                                return;
                            }
                        }
                        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                        Err(_) => break,
                    }
                }
                if !report(DebuggerEvent::Gone) {
                    return;
                }
            }
        })?;
        Ok(())
    }
}
