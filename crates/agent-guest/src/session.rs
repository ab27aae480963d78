//! One connection of the host: one request.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::net::UnixStream;

use agent_protocol::{Decoder, FromGuest, FromHost, VERSION};

use crate::network::Coming;
use crate::{exec, files, power};

/// A connection, read and written message by message.
pub struct Connection {
    // A stream socket of whatever kind: only reading, writing and shutting down are used.
    pub stream: UnixStream,
    decoder: Decoder,
}

impl Connection {
    pub fn new(fd: OwnedFd) -> Self {
        Self { stream: fd.into(), decoder: Decoder::default() }
    }

    pub fn send(&mut self, message: &FromGuest) -> io::Result<()> {
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.stream.write_all(&bytes)
    }

    /// A message that has come already.
    pub fn waiting(&mut self) -> io::Result<Option<FromHost>> {
        match self.decoder.pop()? {
            Some((kind, body)) => Ok(Some(FromHost::parse(kind, body)?)),
            None => Ok(None),
        }
    }

    /// Reads what there is, once; `false` at the end.
    pub fn read_some(&mut self) -> io::Result<bool> {
        let mut buffer = [0; 16 << 10];
        let len = self.stream.read(&mut buffer)?;
        self.decoder.push(buffer.get(..len).unwrap_or_default());
        Ok(len > 0)
    }

    /// The next message, waited for; `None` at the end.
    pub fn receive(&mut self) -> io::Result<Option<FromHost>> {
        loop {
            if let Some(message) = self.waiting()? {
                return Ok(Some(message));
            }
            match self.read_some() {
                Ok(true) => {}
                Ok(false) if self.decoder.pending() > 0 => return Err(agent_protocol::FrameError::CutOff.into()),
                Ok(false) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// Serves one connection to its end. Programs are started when the network is there.
pub fn serve(fd: OwnedFd, network: &Coming) -> io::Result<()> {
    let mut connection = Connection::new(fd);
    connection.send(&FromGuest::Hello(VERSION))?;
    let Some(request) = connection.receive()? else { return Ok(()) };
    let failed = |connection: &mut Connection, code, why: String| connection.send(&FromGuest::Failed(code, why));
    match request {
        FromHost::Exec(request) => {
            network.wait();
            match exec::start(request) {
                Ok(program) => program.attend(&mut connection),
                Err((code, why)) => failed(&mut connection, code, why),
            }
        }
        FromHost::Put(path, name) => {
            let done = files::put(&mut connection, &os(path), &os(name));
            match done {
                Ok(()) => connection.send(&FromGuest::Done(0)),
                Err(error) => {
                    failed(&mut connection, 1, error.to_string())?;
                    // The host may still be sending; it is to read why before the connection goes.
                    while connection.receive()?.is_some() {}
                    Ok(())
                }
            }
        }
        FromHost::Get(path) => match files::get(&mut connection, &os(path)) {
            Ok(left_out) => connection.send(&FromGuest::Done(left_out)),
            Err(error) => failed(&mut connection, 1, error.to_string()),
        },
        FromHost::Sync => {
            rustix::fs::sync();
            connection.send(&FromGuest::Done(0))
        }
        FromHost::PowerOff { reboot } => {
            connection.send(&FromGuest::Done(0))?;
            drop(connection);
            power::ask(reboot)
        }
        _ => failed(&mut connection, 1, "this is no request".into()),
    }
}

fn os(bytes: Vec<u8>) -> std::ffi::OsString {
    std::ffi::OsString::from_vec(bytes)
}
