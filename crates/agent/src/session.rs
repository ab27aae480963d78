//! One connection to the agent. Nothing it says is trusted: what breaks the protocol ends the connection with one line.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use agent_protocol::archive::{self, Unpacker};
use agent_protocol::{Decoder, FrameError, FromGuest, FromHost, PORT, VERSION};

/// How long an agent that is there may take for its first word.
const PATIENCE: Duration = Duration::from_secs(20);

/// Why a request failed: one line, and an exit code where the agent gave one.
#[derive(Debug)]
pub enum Problem {
    /// The connection ended or never came about.
    Gone(String),
    /// The agent, or what plays it, does not keep to the protocol.
    Lies(FrameError),
    /// The agent says so: an exit code and why.
    Failed(u8, String),
    /// Something here.
    Here(io::Error),
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Gone(what) => f.write_str(what),
            Self::Lies(why) => write!(f, "the guest's agent does not keep to the protocol ({why}); it cannot be used"),
            Self::Failed(_, why) => f.write_str(why),
            Self::Here(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for Problem {}

impl From<FrameError> for Problem {
    fn from(error: FrameError) -> Self {
        Self::Lies(error)
    }
}

/// One connection.
#[derive(Debug)]
pub struct Session {
    pub(crate) stream: UnixStream,
    decoder: Decoder,
}

fn gone() -> Problem {
    Problem::Gone("the connection to the guest's agent was lost: the agent or the guest has ended".into())
}

impl Session {
    /// Connects to the agent by a VM's socket for connections to its guest.
    ///
    /// # Errors
    /// [`Problem::Gone`]: the VM or the agent is not there. [`Problem::Lies`].
    pub fn connect(vsock: &Path) -> Result<Self, Problem> {
        let no = |what: &str| Problem::Gone(format!("the agent in the guest does not answer ({what})"));
        let mut stream = UnixStream::connect(vsock).map_err(|_| no("the VM has ended"))?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(Problem::Here)?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).map_err(|_| no("the VM has ended"))?;
        // "OK" and a number, by the monitor: not a byte more may be read here.
        for at in 0..32 {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) if byte == [b'\n'] => break,
                Ok(1) if at < 31 => {}
                Ok(_) => return Err(no("it is not running")),
                Err(_) => return Err(no("the guest hangs or has no driver")),
            }
        }
        let mut session = Self { stream, decoder: Decoder::default() };
        match session.receive() {
            Ok(Some(FromGuest::Hello(VERSION))) => {}
            Ok(Some(FromGuest::Hello(other))) => {
                return Err(no(&format!("it speaks version {other} of the protocol, this is {VERSION}")));
            }
            Ok(Some(_)) => return Err(Problem::Lies(FrameError::Malformed(64))),
            Ok(None) => return Err(no("it hung up")),
            Err(Problem::Here(_)) => return Err(no("it says nothing")),
            Err(problem) => return Err(problem),
        }
        session.stream.set_read_timeout(None).map_err(Problem::Here)?;
        Ok(session)
    }

    /// Over a connection that is there, for tests.
    #[cfg(test)]
    pub(crate) fn over(stream: UnixStream) -> Self {
        Self { stream, decoder: Decoder::default() }
    }

    pub(crate) fn send(&mut self, message: &FromHost) -> Result<(), Problem> {
        if !message.fits() {
            return Err(Problem::Failed(
                126,
                "the command line and the environment are too long: 256 KiB are the most".into(),
            ));
        }
        let mut bytes = Vec::new();
        message.put(&mut bytes);
        self.stream.write_all(&bytes).map_err(|_| gone())
    }

    /// A message that has come already.
    pub(crate) fn waiting(&mut self) -> Result<Option<FromGuest>, Problem> {
        match self.decoder.pop()? {
            Some((kind, body)) => Ok(Some(FromGuest::parse(kind, body)?)),
            None => Ok(None),
        }
    }

    /// Reads what there is, once; `false` at the end.
    pub(crate) fn read_some(&mut self) -> Result<bool, Problem> {
        let mut buffer = vec![0; 64 << 10];
        match self.stream.read(&mut buffer) {
            Ok(len) => {
                self.decoder.push(buffer.get(..len).unwrap_or_default());
                Ok(len > 0)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                Err(Problem::Here(error))
            }
            Err(_) => Ok(false),
        }
    }

    fn receive(&mut self) -> Result<Option<FromGuest>, Problem> {
        loop {
            if let Some(message) = self.waiting()? {
                return Ok(Some(message));
            }
            if !self.read_some()? {
                return if self.decoder.pending() > 0 { Err(FrameError::CutOff.into()) } else { Ok(None) };
            }
        }
    }

    /// The answer to a request that has no other.
    fn done(&mut self) -> Result<(), Problem> {
        match self.receive()? {
            Some(FromGuest::Done(_)) => Ok(()),
            Some(FromGuest::Failed(code, why)) => Err(Problem::Failed(code, format!("in the guest: {why}"))),
            Some(_) => Err(FrameError::Malformed(72).into()),
            None => Err(gone()),
        }
    }

    /// Copies a tree of this host into the guest: as `destination`, or into it if it is a directory. Returns how many things that cannot be
    /// copied were left out.
    ///
    /// # Errors
    /// Any [`Problem`].
    pub fn put(mut self, source: &Path, destination: &OsStr) -> Result<u64, Problem> {
        let name = name_of(source)?;
        self.send(&FromHost::Put(destination.as_bytes().to_vec(), name.as_bytes().to_vec()))?;
        let mut lost = None;
        let packed = archive::pack(source, &mut |item| {
            self.send(&FromHost::Item(item)).map_err(|problem| {
                lost = Some(problem);
                io::Error::other("lost")
            })
        });
        match (packed, lost) {
            (Ok(left_out), _) => {
                // If it has hung up, what it said last is why.
                let _ = self.send(&FromHost::ItemsEnd);
                self.done().map(|()| left_out)
            }
            (Err(_), Some(problem)) => Err(match self.done() {
                Err(Problem::Failed(code, why)) => Problem::Failed(code, why),
                _ => problem,
            }),
            (Err(error), None) => Err(Problem::Here(error)),
        }
    }

    /// Copies a tree of the guest to this host: as `destination`, or into it if it is a directory.
    ///
    /// # Errors
    /// Any [`Problem`].
    pub fn get(mut self, source: &OsStr, destination: &Path) -> Result<u64, Problem> {
        let name = name_of(Path::new(source))?;
        let (parent, name) = archive::place(destination, &name).map_err(Problem::Here)?;
        self.send(&FromHost::Get(source.as_bytes().to_vec()))?;
        let mut unpacker = None;
        loop {
            match self.receive()? {
                Some(FromGuest::Item(item)) => {
                    let unpacker = match &mut unpacker {
                        Some(unpacker) => unpacker,
                        None => unpacker.insert(Unpacker::new(&parent, &name, 0o777).map_err(Problem::Here)?),
                    };
                    unpacker.item(item).map_err(Problem::Here)?;
                }
                Some(FromGuest::Done(left_out)) => {
                    unpacker.ok_or(FrameError::Malformed(72))?.finish().map_err(Problem::Here)?;
                    return Ok(left_out);
                }
                Some(FromGuest::Failed(code, why)) => {
                    return Err(Problem::Failed(code, format!("in the guest: {why}")));
                }
                Some(_) => return Err(FrameError::Malformed(33).into()),
                None => return Err(gone()),
            }
        }
    }

    /// Has all data written to the guest's disks.
    ///
    /// # Errors
    /// Any [`Problem`].
    pub fn sync(mut self) -> Result<(), Problem> {
        self.send(&FromHost::Sync)?;
        self.done()
    }

    /// Has the guest switch itself off or start again. It has only begun to when this returns.
    ///
    /// # Errors
    /// Any [`Problem`].
    pub fn power_off(mut self, reboot: bool) -> Result<(), Problem> {
        self.send(&FromHost::PowerOff { reboot })?;
        self.stream.set_read_timeout(Some(PATIENCE)).map_err(Problem::Here)?;
        self.done()
    }
}

/// The last name of a path, by which a copy is called.
fn name_of(path: &Path) -> Result<std::ffi::OsString, Problem> {
    let name = path.file_name().map(OsStr::to_owned);
    let name = name.or_else(|| path.canonicalize().ok()?.file_name().map(OsStr::to_owned));
    name.ok_or_else(|| Problem::Here(io::Error::other(format!("{}: name a file or directory", path.display()))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use agent_protocol::archive::{Entry, Item, Kind};

    /// A session with what plays the agent: it says `bytes`, and hangs up.
    fn liar(bytes: Vec<u8>) -> Session {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let _ = theirs.write_all(&bytes);
            let _ = theirs.shutdown(std::net::Shutdown::Write);
            let _ = std::io::copy(&mut theirs, &mut std::io::sink());
        });
        Session::over(ours)
    }

    fn says(messages: &[FromGuest]) -> Session {
        let mut bytes = Vec::new();
        messages.iter().for_each(|message| message.put(&mut bytes));
        liar(bytes)
    }

    #[test]
    fn agents_that_lie_or_die_get_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let line = |problem: Problem| {
            let line = problem.to_string();
            assert!(!line.contains(['\n', '\u{1b}']) && line.len() < 700, "{line}");
            line
        };
        let get = |session: Session| session.get(OsStr::new("/etc/x"), &dir.path().join("x")).unwrap_err();
        assert!(line(get(liar(vec![]))).contains("was lost"));
        assert!(line(get(liar(vec![0xff; 100]))).contains("protocol"));
        assert!(line(get(liar(vec![9, 0, 0, 0, 33, 1]))).contains("cut off"));
        assert!(line(get(says(&[FromGuest::Stdout(vec![1])]))).contains("protocol"));
        assert!(line(get(says(&[FromGuest::Done(0)]))).contains("protocol"));
        assert!(line(get(says(&[FromGuest::Failed(1, "no\n\u{1b}[31msuch".into())]))).contains("no  [31msuch"));
        let entry = |kind, path: &str| {
            FromGuest::Item(Item::Entry(Entry { kind, mode: 0o777, time: i64::MAX, path: path.into() }))
        };
        let tree = says(&[entry(Kind::Directory, ""), entry(Kind::File, "../../evil")]);
        assert!(line(get(tree)).contains("unsafe path"));
        assert!(!dir.path().join("evil").exists());
        assert!(line(liar(vec![]).sync().unwrap_err()).contains("was lost"));
        assert!(line(says(&[FromGuest::Hello(1)]).power_off(false).unwrap_err()).contains("protocol"));
        // One that hangs up in the middle of a copy that is larger than all buffers.
        std::fs::write(dir.path().join("big"), vec![0; 4 << 20]).unwrap();
        let session = says(&[FromGuest::Failed(1, "no space left".into())]);
        assert!(line(session.put(&dir.path().join("big"), OsStr::new("/x")).unwrap_err()).contains("no space left"));
        assert!(
            line(liar(vec![]).put(&dir.path().join("none"), OsStr::new("/x")).unwrap_err()).contains("no such file")
        );
        let good = says(&[entry(Kind::File, ""), FromGuest::Item(Item::Data(b"text".to_vec())), FromGuest::Done(3)]);
        assert_eq!(good.get(OsStr::new("/etc/y"), dir.path()).unwrap(), 3);
        assert_eq!(std::fs::read(dir.path().join("y")).unwrap(), b"text");
    }
}
