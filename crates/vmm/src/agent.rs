//! The agent's own connection: by it the monitor knows that there is one, tells it the time, and hears how process 1's command ended. All
//! else is said between the agent and other commands, whose bytes only pass through the vsock device.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_protocol::{Decoder, FromGuest, FromHost, PORT};
use virtio::vsock::Dial;

use crate::events::{Event, Events};
use crate::instance::Instance;

/// The time is told at least so often.
const CLOCK: Duration = Duration::from_secs(60);
/// How often it is looked whether the host's clock was set, or the host slept; then the time is told at once.
const LOOK: Duration = Duration::from_secs(5);
/// A step of the host's clock that is one.
const STEP: Duration = Duration::from_millis(100);
/// Bytes that one connection of the agent may send: it has next to nothing to say.
const LIMIT: usize = 4096;
/// Such connections at once: one, and those whose end has not been seen yet.
const MAX_AGENTS: usize = 4;

/// Whom to tell of a change.
type Listener = Box<dyn Fn() + Send>;

/// The size of the terminal that the guest's console is on, and whom to tell of it.
#[derive(Default)]
struct Window {
    size: Option<(u16, u16)>,
    agents: Vec<Arc<UnixStream>>,
}

impl Window {
    fn tell(&self, mut agent: &UnixStream) {
        if let Some((columns, rows)) = self.size {
            let mut bytes = Vec::new();
            FromHost::Window(columns, rows).put(&mut bytes);
            // An agent that does not read has no terminal that matters.
            let _ = agent.write(&bytes);
        }
    }
}

/// Is an agent there? Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Agent {
    /// Connections that have said hello.
    ready: Arc<AtomicU32>,
    window: Arc<Mutex<Window>>,
    changed: Arc<Mutex<Option<Listener>>>,
}

impl Agent {
    /// Is it there?
    pub(crate) fn is_ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst) > 0
    }

    /// Calls `changed` each time it comes.
    pub(crate) fn on_change(&self, changed: Listener) {
        *self.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(changed);
    }

    /// The guest's console is on a terminal of this size now.
    pub(crate) fn window(&self, columns: u16, rows: u16) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.size = Some((columns, rows));
        window.agents.iter().for_each(|agent| window.tell(agent));
    }

    fn came(&self, stream: &Arc<UnixStream>) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.tell(stream);
        window.agents.push(stream.clone());
        drop(window);
        self.ready.fetch_add(1, Ordering::SeqCst);
        if let Some(changed) = &*self.changed.lock().unwrap_or_else(PoisonError::into_inner) {
            changed();
        }
    }

    fn went(&self, stream: &Arc<UnixStream>) {
        let mut window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        window.agents.retain(|agent| !Arc::ptr_eq(agent, stream));
        drop(window);
        self.ready.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Who takes the guest's connections: the agent's port is ours, the others are those of whoever listens for this VM.
pub(crate) fn dial(agent: &Agent, instance: Option<Arc<Instance>>, events: &Events) -> Dial {
    let (agent, events) = (agent.clone(), events.clone());
    let threads = Arc::new(());
    Box::new(move |port, guest| {
        if port != PORT {
            return instance.as_ref()?.dial(port);
        }
        // Only root may take such a port in a Linux guest.
        if guest > PORT || Arc::strong_count(&threads) > MAX_AGENTS {
            return None;
        }
        let (device, ours) = UnixStream::pair().ok()?;
        let (agent, events, here) = (agent.clone(), events.clone(), threads.clone());
        let talk = move || {
            let _here = here;
            serve(ours, &agent, &events);
        };
        std::thread::Builder::new().name("agent".into()).spawn(talk).ok()?;
        Some(device)
    })
}

fn serve(stream: UnixStream, agent: &Agent, events: &Events) {
    let _ = stream.set_nonblocking(true);
    let stream = Arc::new(stream);
    let mut decoder = Decoder::default();
    let (mut greeted, mut taken) = (false, 0);
    let mut told = Told::now();
    'talk: loop {
        let mut fds = [rustix::event::PollFd::new(&*stream, rustix::event::PollFlags::IN)];
        let timeout = rustix::event::Timespec { tv_sec: LOOK.as_secs() as i64, tv_nsec: 0 };
        match rustix::event::poll(&mut fds, Some(&timeout)) {
            Ok(0) => {
                if told.is_stale(Instant::now(), SystemTime::now()) {
                    told = Told::now();
                    // An agent that does not read has no need of the time.
                    let _ = (&*stream).write(&clock());
                }
                continue;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
        let mut buffer = [0; 512];
        match (&*stream).read(&mut buffer) {
            Ok(len) if len > 0 && taken < LIMIT => {
                taken += len;
                decoder.push(buffer.get(..len).unwrap_or_default());
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            _ => break,
        }
        loop {
            match decoder.pop().and_then(|frame| frame.map(|(kind, body)| FromGuest::parse(kind, body)).transpose()) {
                Ok(Some(FromGuest::Hello(_))) if !greeted => {
                    greeted = true;
                    let _ = (&*stream).write(&clock());
                    agent.came(&stream);
                }
                Ok(Some(FromGuest::MainExited(exit))) => {
                    let _ = events.send(Event::MainExited(exit.code()));
                }
                Ok(None) => break,
                _ => break 'talk,
            }
        }
    }
    if greeted {
        agent.went(&stream);
    }
}

/// When the time was told last, by both of the host's clocks.
struct Told(Instant, SystemTime);

impl Told {
    fn now() -> Self {
        Self(Instant::now(), SystemTime::now())
    }

    /// Is it long ago, or has the host's clock not gone along with time since?
    fn is_stale(&self, now: Instant, utc: SystemTime) -> bool {
        let passed = now.saturating_duration_since(self.0);
        let should_be = self.1 + passed;
        let off = utc.duration_since(should_be).or_else(|_| should_be.duration_since(utc)).unwrap_or_default();
        passed >= CLOCK || off > STEP
    }
}

fn clock() -> Vec<u8> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let mut bytes = Vec::new();
    FromHost::Clock(now.as_secs(), now.subsec_nanos()).put(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agents_hear_of_the_window() {
        let agent = Agent::default();
        let heard = |stream: &UnixStream| {
            let mut buffer = [0; 64];
            stream.set_nonblocking(true).unwrap();
            let mut decoder = Decoder::default();
            let len = (&*stream).read(&mut buffer).unwrap_or(0);
            decoder.push(&buffer[..len]);
            decoder.pop().unwrap().map(|(kind, body)| FromHost::parse(kind, body).unwrap())
        };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ours = Arc::new(ours);
        agent.came(&ours);
        assert_eq!(heard(&theirs), None, "there is none");
        agent.window(132, 50);
        assert_eq!(heard(&theirs), Some(FromHost::Window(132, 50)));
        // One that comes later hears it at once, one that has gone no more.
        let (later, there) = UnixStream::pair().unwrap();
        agent.came(&Arc::new(later));
        assert_eq!(heard(&there), Some(FromHost::Window(132, 50)));
        agent.went(&ours);
        agent.window(80, 24);
        assert_eq!((heard(&theirs), heard(&there)), (None, Some(FromHost::Window(80, 24))));
    }

    #[test]
    fn the_time_is_told_when_the_hosts_clock_was_set() {
        let told = Told::now();
        let after = |passed: u64, utc: i64| {
            let now = told.0 + Duration::from_millis(passed);
            let step = Duration::from_millis(utc.unsigned_abs());
            told.is_stale(now, if utc < 0 { told.1 - step } else { told.1 + step })
        };
        assert!(!after(5000, 5000) && !after(5000, 4990) && !after(59_999, 59_999));
        assert!(after(60_000, 60_000), "now and then anyway");
        assert!(after(5000, 3_600_000) && after(5000, -3_600_000) && after(0, 200));
    }
}
