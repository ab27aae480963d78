//! What frames mean.

use crate::VERSION;
use crate::archive::{Entry, Item};
use crate::frame::{self, FrameError, MAX_BODY, Reader};

/// In both directions: an entry of a tree, and a piece of a file.
const ENTRY: u8 = 32;
const DATA: u8 = 33;

fn put_item(out: &mut Vec<u8>, item: &Item) {
    match item {
        Item::Entry(entry) => frame::put(out, ENTRY, &entry.to_body()),
        Item::Data(bytes) => frame::put(out, DATA, bytes),
    }
}

/// A program to run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// The program and its arguments; the program is looked for along PATH.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value` each, added to what a login would set.
    pub env: Vec<Vec<u8>>,
    /// Where it starts; empty for the user's home.
    pub cwd: Vec<u8>,
    /// `USER`, `UID`, `USER:GROUP` or `UID:GID`; empty for root.
    pub user: Vec<u8>,
    /// On a terminal of its own with so many columns and rows, instead of three pipes.
    pub tty: Option<(u16, u16)>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
}

impl Exit {
    /// The code a shell would show: 128 + n for signal n.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code.into(),
            Self::Signal(signal) => 128 + i32::from(signal & 0x7f),
        }
    }
}

/// What the host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromHost {
    /// Run a program. Its input, signals and window follow.
    Exec(Exec),
    /// Input for the program; at most [`crate::STDIN_WINDOW`] bytes ahead of [`FromGuest::Taken`].
    Stdin(Vec<u8>),
    /// Its input ends here.
    StdinEnd,
    /// A signal for the program's process group.
    Signal(u8),
    /// Its terminal has so many columns and rows now.
    Window(u16, u16),
    /// Unpack the tree that follows: as this path, or under the name `.1` in it if it is a directory.
    Put(Vec<u8>, Vec<u8>),
    /// Send the tree at this path.
    Get(Vec<u8>),
    /// A piece of a tree.
    Item(Item),
    /// Its end.
    ItemsEnd,
    /// Write all data to the disks.
    Sync,
    /// Switch the machine off, or start it again.
    PowerOff {
        /// Start it again.
        reboot: bool,
    },
    /// It is this many seconds and nanoseconds after the start of 1970 in UTC.
    Clock(u64, u32),
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromGuest {
    /// The first message of every connection: the agent's version of the protocol.
    Hello(u16),
    /// The program runs.
    Started(u32),
    /// What it wrote on its standard output (or terminal).
    Stdout(Vec<u8>),
    /// What it wrote on its standard error.
    Stderr(Vec<u8>),
    /// So many bytes of its input were taken.
    Taken(u32),
    /// It ended. Nothing follows.
    Exited(Exit),
    /// What was asked for failed: an exit code for it (127: no such program, 126: it cannot be run, 1: anything else) and why.
    Failed(u8, String),
    /// A piece of a tree.
    Item(Item),
    /// What was asked for is done; after a tree, its end. So many things were left out of it.
    Done(u64),
    /// The agent is process 1 and was started with a command, which has ended so; the machine switches itself off.
    MainExited(Exit),
}

impl FromHost {
    /// Appends the message as a frame.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        let kind = match self {
            Self::Exec(exec) => {
                body.extend(VERSION.to_le_bytes());
                body.push(exec.tty.is_some().into());
                let (columns, rows) = exec.tty.unwrap_or_default();
                body.extend(columns.to_le_bytes());
                body.extend(rows.to_le_bytes());
                frame::put_bytes(&mut body, &exec.user);
                frame::put_bytes(&mut body, &exec.cwd);
                frame::put_list(&mut body, &exec.argv);
                frame::put_list(&mut body, &exec.env);
                1
            }
            Self::Stdin(bytes) => return frame::put(out, 2, bytes),
            Self::StdinEnd => 3,
            Self::Signal(number) => {
                body.push(*number);
                4
            }
            Self::Window(columns, rows) => {
                body.extend(columns.to_le_bytes());
                body.extend(rows.to_le_bytes());
                5
            }
            Self::Put(path, name) => {
                frame::put_bytes(&mut body, path);
                frame::put_bytes(&mut body, name);
                6
            }
            Self::Get(path) => return frame::put(out, 7, path),
            Self::Item(item) => return put_item(out, item),
            Self::ItemsEnd => 9,
            Self::Sync => 10,
            Self::PowerOff { reboot } => {
                body.push((*reboot).into());
                11
            }
            Self::Clock(seconds, nanoseconds) => {
                body.extend(seconds.to_le_bytes());
                body.extend(nanoseconds.to_le_bytes());
                12
            }
        };
        frame::put(out, kind, &body);
    }

    /// Does the message fit into a frame?
    pub fn fits(&self) -> bool {
        match self {
            Self::Exec(exec) => {
                let all = exec.argv.iter().chain(&exec.env).map(|item| item.len().saturating_add(4));
                let sum = all.fold(64, usize::saturating_add);
                sum.saturating_add(exec.user.len()).saturating_add(exec.cwd.len()) <= MAX_BODY
            }
            Self::Put(path, name) => path.len().saturating_add(name.len()) <= MAX_BODY - 8,
            Self::Stdin(bytes) | Self::Get(bytes) => bytes.len() <= MAX_BODY,
            _ => true,
        }
    }

    /// Reads a frame.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(kind: u8, body: Vec<u8>) -> Result<Self, FrameError> {
        let mut reader = Reader(&body);
        let message = match kind {
            2 => return Ok(Self::Stdin(body)),
            7 => return Ok(Self::Get(body)),
            DATA => return Ok(Self::Item(Item::Data(body))),
            _ => Self::parts(kind, &mut reader),
        };
        message.filter(|_| reader.is_empty()).ok_or(FrameError::Malformed(kind))
    }

    fn parts(kind: u8, reader: &mut Reader<'_>) -> Option<Self> {
        Some(match kind {
            1 => {
                if reader.u16()? != VERSION {
                    return None;
                }
                let tty = reader.u8()? != 0;
                let size = (reader.u16()?, reader.u16()?);
                let user = reader.bytes()?;
                let cwd = reader.bytes()?;
                let argv = reader.list()?;
                let env = reader.list()?;
                Self::Exec(Exec { argv, env, cwd, user, tty: tty.then_some(size) })
            }
            3 => Self::StdinEnd,
            4 => Self::Signal(reader.u8()?),
            5 => Self::Window(reader.u16()?, reader.u16()?),
            6 => {
                let path = reader.bytes()?;
                Self::Put(path, reader.bytes()?)
            }
            ENTRY => Self::Item(Item::Entry(Entry::parse(reader)?)),
            9 => Self::ItemsEnd,
            10 => Self::Sync,
            11 => Self::PowerOff { reboot: reader.u8()? != 0 },
            12 => Self::Clock(reader.u64()?, reader.u32()?),
            _ => return None,
        })
    }
}

impl FromGuest {
    /// Appends the message as a frame.
    pub fn put(&self, out: &mut Vec<u8>) {
        let mut body = Vec::new();
        let exit = |body: &mut Vec<u8>, exit: &Exit| match exit {
            Exit::Code(code) => body.extend([0, *code]),
            Exit::Signal(signal) => body.extend([1, *signal]),
        };
        let kind = match self {
            Self::Hello(version) => {
                body.extend(version.to_le_bytes());
                64
            }
            Self::Started(pid) => {
                body.extend(pid.to_le_bytes());
                65
            }
            Self::Stdout(bytes) => return frame::put(out, 66, bytes),
            Self::Stderr(bytes) => return frame::put(out, 67, bytes),
            Self::Taken(count) => {
                body.extend(count.to_le_bytes());
                68
            }
            Self::Exited(how) => {
                exit(&mut body, how);
                69
            }
            Self::Failed(code, why) => {
                body.push(*code);
                let why = why.as_bytes();
                frame::put_bytes(&mut body, why.get(..why.len().min(4096)).unwrap_or_default());
                70
            }
            Self::Item(item) => return put_item(out, item),
            Self::Done(left_out) => {
                body.extend(left_out.to_le_bytes());
                72
            }
            Self::MainExited(how) => {
                exit(&mut body, how);
                73
            }
        };
        frame::put(out, kind, &body);
    }

    /// Reads a frame. Text is made harmless for a terminal.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(kind: u8, body: Vec<u8>) -> Result<Self, FrameError> {
        let mut reader = Reader(&body);
        let message = match kind {
            66 => return Ok(Self::Stdout(body)),
            67 => return Ok(Self::Stderr(body)),
            DATA => return Ok(Self::Item(Item::Data(body))),
            _ => Self::parts(kind, &mut reader),
        };
        message.filter(|_| reader.is_empty()).ok_or(FrameError::Malformed(kind))
    }

    fn parts(kind: u8, reader: &mut Reader<'_>) -> Option<Self> {
        let exit = |reader: &mut Reader<'_>| match (reader.u8()?, reader.u8()?) {
            (0, code) => Some(Exit::Code(code)),
            (1, signal @ 1..=64) => Some(Exit::Signal(signal)),
            _ => None,
        };
        Some(match kind {
            64 => Self::Hello(reader.u16()?),
            65 => Self::Started(reader.u32()?),
            68 => Self::Taken(reader.u32()?),
            69 => Self::Exited(exit(reader)?),
            70 => {
                let code = reader.u8()?;
                let text = reader.bytes()?;
                let text: String = String::from_utf8_lossy(&text).chars().take(500).collect();
                Self::Failed(code, text.replace(|c: char| c.is_control(), " "))
            }
            ENTRY => Self::Item(Item::Entry(Entry::parse(reader)?)),
            72 => Self::Done(reader.u64()?),
            73 => Self::MainExited(exit(reader)?),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Decoder;
    use crate::archive::Kind;
    use proptest::prelude::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        prop::collection::vec(any::<u8>(), 0..40)
    }

    fn item() -> impl Strategy<Value = Item> {
        let kind = prop_oneof![Just(Kind::Directory), Just(Kind::File), bytes().prop_map(Kind::Symlink)];
        let entry = (kind, any::<u32>(), any::<i64>(), bytes())
            .prop_map(|(kind, mode, time, path)| Item::Entry(Entry { kind, mode, time, path }));
        prop_oneof![entry, bytes().prop_map(Item::Data)]
    }

    fn host() -> impl Strategy<Value = FromHost> {
        let list = || prop::collection::vec(bytes(), 0..5);
        prop_oneof![
            (list(), list(), bytes(), bytes(), any::<Option<(u16, u16)>>())
                .prop_map(|(argv, env, cwd, user, tty)| FromHost::Exec(Exec { argv, env, cwd, user, tty })),
            bytes().prop_map(FromHost::Stdin),
            Just(FromHost::StdinEnd),
            any::<u8>().prop_map(FromHost::Signal),
            any::<(u16, u16)>().prop_map(|(c, r)| FromHost::Window(c, r)),
            (bytes(), bytes()).prop_map(|(path, name)| FromHost::Put(path, name)),
            bytes().prop_map(FromHost::Get),
            item().prop_map(FromHost::Item),
            Just(FromHost::ItemsEnd),
            Just(FromHost::Sync),
            any::<bool>().prop_map(|reboot| FromHost::PowerOff { reboot }),
            any::<(u64, u32)>().prop_map(|(s, n)| FromHost::Clock(s, n)),
        ]
    }

    fn guest() -> impl Strategy<Value = FromGuest> {
        let exit = || prop_oneof![any::<u8>().prop_map(Exit::Code), (1..=64u8).prop_map(Exit::Signal)];
        prop_oneof![
            any::<u16>().prop_map(FromGuest::Hello),
            any::<u32>().prop_map(FromGuest::Started),
            bytes().prop_map(FromGuest::Stdout),
            bytes().prop_map(FromGuest::Stderr),
            any::<u32>().prop_map(FromGuest::Taken),
            exit().prop_map(FromGuest::Exited),
            (any::<u8>(), "[a-z ]{0,30}").prop_map(|(code, why)| FromGuest::Failed(code, why)),
            item().prop_map(FromGuest::Item),
            any::<u64>().prop_map(FromGuest::Done),
            exit().prop_map(FromGuest::MainExited),
        ]
    }

    proptest! {
        #[test]
        fn messages_come_through_in_pieces(all in prop::collection::vec((host(), guest()), 0..6), piece in 1..50usize) {
            let (mut to_guest, mut to_host) = (Vec::new(), Vec::new());
            for (host, guest) in &all {
                prop_assert!(host.fits());
                host.put(&mut to_guest);
                guest.put(&mut to_host);
            }
            let frames = |bytes: &[u8]| {
                let (mut decoder, mut frames) = (Decoder::default(), Vec::new());
                for piece in bytes.chunks(piece) {
                    decoder.push(piece);
                    while let Some(frame) = decoder.pop().unwrap() {
                        frames.push(frame);
                    }
                }
                assert_eq!(decoder.pending(), 0);
                frames
            };
            let host: Vec<_> = frames(&to_guest).into_iter().map(|(kind, body)| FromHost::parse(kind, body).unwrap()).collect();
            let guest: Vec<_> = frames(&to_host).into_iter().map(|(kind, body)| FromGuest::parse(kind, body).unwrap()).collect();
            prop_assert_eq!(host, all.iter().map(|m| m.0.clone()).collect::<Vec<_>>());
            prop_assert_eq!(guest, all.iter().map(|m| m.1.clone()).collect::<Vec<_>>());
        }

        #[test]
        fn nonsense_is_refused_without_harm(kind in any::<u8>(), body in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = FromHost::parse(kind, body.clone());
            let _ = FromGuest::parse(kind, body.clone());
            let mut decoder = Decoder::default();
            decoder.push(&body);
            while let Ok(Some(_)) = decoder.pop() {}
        }
    }

    #[test]
    fn what_is_too_long_is_refused_before_it_is_there() {
        let mut decoder = Decoder::default();
        decoder.push(&[0xff, 0xff, 0xff, 0x7f, 66]);
        assert_eq!(decoder.pop(), Err(FrameError::TooLong(0x7fff_ffff)));
        assert!(!FromHost::Exec(Exec { argv: vec![vec![0; MAX_BODY]], ..Exec::default() }).fits());
    }

    #[test]
    fn text_of_a_guest_does_no_harm_to_a_terminal() {
        let mut body = vec![1, 6, 0, 0, 0];
        body.extend(b"a\x1b[2J\n");
        assert_eq!(FromGuest::parse(70, body), Ok(FromGuest::Failed(1, "a [2J ".into())));
    }
}
