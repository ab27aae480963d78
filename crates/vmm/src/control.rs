//! The control socket: what other commands of the user ask of a running VM.
//!
//! A client sends one line and gets one, `ok …` or `error …`:
//!
//! | line | answer |
//! |---|---|
//! | `status` | whether the agent is there: `ok agent` or `ok no-agent` |
//! | `agent` | when the agent is there; an error where none is to come |
//! | `power-button` | the machine's power button was pressed |
//! | `quit` | the VM is being ended at once |
//! | `balloon` | how the balloon stands: words `name=value` ([`balloon_words`]); the guest is asked for new statistics besides |
//! | `balloon BYTES` | as `balloon`, after the guest was told to do without so much of its memory |
//! | `window COLUMNS ROWS` | the terminal at the guest's console has this size: the agent was told, or will be |
//! | `disk-size DEVICE INODE BYTES` | the disk in the file with these numbers has this size now, at least what it had |
//! | `attach` | from here on the bytes of the console in both directions |
//!
//! One thread serves all clients, which are this user's own (or root's); their number and what they send is bounded.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use virtio::balloon::BalloonStatus;
use virtio::{BalloonHandle, SizeWatch};

use crate::agent::Agent;
use crate::console::Input;
use crate::events::{Event, Events};
use crate::serial::InputSlot;

/// Clients at once.
const MAX_CLIENTS: usize = 32;
/// The longest line.
const MAX_LINE: usize = 256;
/// Console output for a client that is slower than the guest; with more, it is let go.
const MAX_PENDING: usize = 1 << 20;
/// Input of a client that the guest has not taken.
const MAX_INPUT: usize = 64 << 10;

/// Where the console's output goes besides the log: to attached clients. Clones are the same.
#[derive(Clone)]
pub(crate) struct Hub(Arc<Shared>);

struct Shared {
    wake: OwnedFd,
    clients: AtomicU32,
    output: Mutex<VecDeque<u8>>,
}

impl Hub {
    pub(crate) fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(Shared { wake, clients: AtomicU32::new(0), output: Mutex::default() })))
    }

    fn wake(&self) {
        let _ = rustix::io::write(&self.0.wake, &1_u64.to_ne_bytes());
    }

    fn take(&self) -> Vec<u8> {
        self.0.output.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}

impl Write for Hub {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.clients.load(Ordering::SeqCst) > 0 {
            let mut output = self.0.output.lock().unwrap_or_else(PoisonError::into_inner);
            if output.len() + bytes.len() <= MAX_PENDING {
                output.extend(bytes);
            }
            drop(output);
            self.wake();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What the server works with.
pub(crate) struct Server {
    pub listener: UnixListener,
    /// The VM ends when its other end is closed.
    pub lifeline: Option<OwnedFd>,
    pub hub: Hub,
    pub agent: Agent,
    /// Is an agent to come at all?
    pub agent_expected: bool,
    /// Is the console to be had here (and not on a terminal or in a file of the user's)?
    pub console: bool,
    pub input: Arc<InputSlot>,
    pub balloon: Option<BalloonHandle>,
    pub disks: Vec<SizeWatch>,
    pub events: Events,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It sends its line.
    Asking,
    /// It waits for the agent.
    Waiting,
    Attached,
    /// It has its answer; once that is sent it is done.
    Answered,
}

struct Client {
    stream: UnixStream,
    phase: Phase,
    line: Vec<u8>,
    out: VecDeque<u8>,
    /// For the guest.
    input: VecDeque<u8>,
    gone: bool,
}

impl Server {
    /// Starts the thread.
    ///
    /// # Errors
    /// The host gives none.
    pub(crate) fn start(self) -> io::Result<()> {
        self.listener.set_nonblocking(true)?;
        let hub = self.hub.clone();
        self.agent.on_change(Box::new(move || hub.wake()));
        std::thread::Builder::new().name("control".into()).spawn(move || self.run())?;
        Ok(())
    }

    fn run(mut self) {
        let mut clients: Vec<Client> = Vec::new();
        loop {
            let ready = self.wait(&clients);
            if ready.lifeline {
                self.lifeline = None;
                let _ = self.events.send(Event::Quit(0));
            }
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.hub.0.wake, &mut count);
            let output = self.hub.take();
            for (client, readable) in clients.iter_mut().zip(ready.clients) {
                if readable {
                    self.hear(client);
                }
                if client.phase == Phase::Attached {
                    client.out.extend(&output);
                    client.feed(&*self.input);
                }
                if client.phase == Phase::Waiting && self.agent.is_ready() {
                    client.answer("ok", Phase::Answered);
                }
                client.send();
            }
            clients.retain(|client| !client.gone);
            while let Ok((stream, _)) = self.listener.accept() {
                let ours = stream.try_clone().is_ok_and(|copy| virtio::vsock::may_connect(&copy.into()));
                if ours && clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                    let (line, out, input) = (Vec::new(), VecDeque::new(), VecDeque::new());
                    clients.push(Client { stream, phase: Phase::Asking, line, out, input, gone: false });
                }
            }
            let attached = clients.iter().filter(|client| client.phase == Phase::Attached).count();
            self.hub.0.clients.store(attached as u32, Ordering::SeqCst);
        }
    }

    fn wait(&self, clients: &[Client]) -> Ready {
        let mut fds = vec![PollFd::new(&self.hub.0.wake, PollFlags::IN), PollFd::new(&self.listener, PollFlags::IN)];
        if let Some(lifeline) = &self.lifeline {
            fds.push(PollFd::new(lifeline, PollFlags::IN));
        }
        let first = fds.len();
        let mut nap = None;
        for client in clients {
            let mut events = PollFlags::empty();
            if client.input.len() < MAX_INPUT {
                events |= PollFlags::IN;
            }
            if !client.out.is_empty() {
                events |= PollFlags::OUT;
            }
            if !client.input.is_empty() {
                // The guest's console takes a few bytes at a time and does not say when.
                nap = Some(rustix::event::Timespec { tv_sec: 0, tv_nsec: 2_000_000 });
            }
            fds.push(PollFd::new(&client.stream, events));
        }
        let _ = poll(&mut fds, nap.as_ref());
        let stirred = |fd: &PollFd<'_>| !(fd.revents() - PollFlags::OUT).is_empty();
        Ready {
            lifeline: self.lifeline.is_some() && fds.get(2).is_some_and(stirred),
            clients: fds.iter().skip(first).map(stirred).collect(),
        }
    }

    /// Reads what a client sent.
    fn hear(&self, client: &mut Client) {
        let mut buffer = [0; 4096];
        let bytes = match client.stream.read(&mut buffer) {
            Ok(0) => {
                client.gone = true;
                return;
            }
            Ok(len) => buffer.get(..len).unwrap_or_default(),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(_) => {
                client.gone = true;
                return;
            }
        };
        for byte in bytes {
            match client.phase {
                Phase::Attached => client.input.push_back(*byte),
                Phase::Asking if *byte == b'\n' => {
                    let line = String::from_utf8_lossy(&client.line).into_owned();
                    self.asked(client, &line);
                }
                Phase::Asking if client.line.len() < MAX_LINE => client.line.push(*byte),
                Phase::Asking => client.answer("error the line is too long", Phase::Answered),
                Phase::Waiting | Phase::Answered => {}
            }
        }
    }

    fn asked(&self, client: &mut Client, line: &str) {
        let send = |client: &mut Client, event| {
            let _ = self.events.send(event);
            client.answer("ok", Phase::Answered);
        };
        match line {
            "status" if self.agent.is_ready() => client.answer("ok agent", Phase::Answered),
            "status" => client.answer("ok no-agent", Phase::Answered),
            "agent" if self.agent.is_ready() => client.answer("ok", Phase::Answered),
            "agent" if self.agent_expected => client.phase = Phase::Waiting,
            "agent" => client.answer("error its guest was started without the agent", Phase::Answered),
            "power-button" => send(client, Event::PowerButton),
            "quit" => send(client, Event::Quit(0)),
            "attach" if self.console => client.answer("ok", Phase::Attached),
            "attach" => client.answer("error its console is where it was started", Phase::Answered),
            _ => match line.split_once(' ').unwrap_or((line, "")) {
                ("window", size) => client.answer(self.window(size), Phase::Answered),
                ("disk-size", what) => client.answer(&self.disk_size(what), Phase::Answered),
                ("balloon", bytes) => client.answer(&self.balloon(bytes), Phase::Answered),
                _ => client.answer("error there is no such order", Phase::Answered),
            },
        }
    }

    fn window(&self, size: &str) -> &'static str {
        let number = |text: &str| text.parse::<u16>().ok().filter(|number| *number > 0);
        match size.split_once(' ').map(|(columns, rows)| (number(columns), number(rows))) {
            Some((Some(columns), Some(rows))) => {
                self.agent.window(columns, rows);
                "ok"
            }
            _ => "error that is no size of a window",
        }
    }

    fn disk_size(&self, what: &str) -> String {
        let numbers: Vec<u64> = what.split(' ').map_while(|number| number.parse().ok()).collect();
        let [device, inode, bytes] = *numbers.as_slice() else { return "error that is no disk and its size".into() };
        match self.disks.iter().find(|disk| disk.identity() == (device, inode)) {
            Some(disk) => match disk.grow(bytes) {
                Ok(sectors) => format!("ok {}", sectors.saturating_mul(virtio::block::SECTOR)),
                Err(error) => format!("error {error}").replace('\n', " "),
            },
            None => "error it has no such disk".into(),
        }
    }

    fn balloon(&self, bytes: &str) -> String {
        let Some(balloon) = &self.balloon else { return "error it has no balloon".into() };
        match bytes.parse() {
            Ok(bytes) => balloon.set_target(bytes),
            Err(_) if bytes.is_empty() => {}
            Err(_) => return "error that is no size in bytes".into(),
        }
        let answer = format!("ok {}", balloon_words(&balloon.status()));
        balloon.ask();
        answer
    }
}

/// How a balloon stands, in words: `driver` (0 or 1), `memory`, `target`, `actual`, `inflated`, `reported` (bytes), `heard` (how often the
/// guest has given statistics) and these, as `guest-NAME`.
fn balloon_words(status: &BalloonStatus) -> String {
    let BalloonStatus { driver, memory, target, actual, inflated, reported, heard, stats } = status;
    let driver = u8::from(*driver);
    let mut text = format!(
        "driver={driver} memory={memory} target={target} actual={actual} inflated={inflated} reported={reported} heard={heard}"
    );
    for (name, value) in stats.iter().flat_map(|stats| stats.named()) {
        text.push_str(&format!(" guest-{name}={value}"));
    }
    text
}

struct Ready {
    lifeline: bool,
    clients: Vec<bool>,
}

impl Client {
    fn answer(&mut self, line: &str, phase: Phase) {
        self.phase = phase;
        self.out.extend(line.bytes());
        self.out.push_back(b'\n');
    }

    fn feed(&mut self, input: &dyn Input) {
        while !self.input.is_empty() {
            let taken = input.offer(self.input.as_slices().0);
            if taken == 0 {
                return;
            }
            self.input.drain(..taken);
        }
    }

    fn send(&mut self) {
        while !self.out.is_empty() && !self.gone {
            match self.stream.write(self.out.as_slices().0) {
                Ok(len) => drop(self.out.drain(..len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
        if self.out.len() > MAX_PENDING || (self.out.is_empty() && self.phase == Phase::Answered) {
            self.gone = true;
        }
    }
}
