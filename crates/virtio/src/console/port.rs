//! One port: what the host gives to the guest and the other way round, a queue and a thread for each direction.
//!
//! The host's end is a [`PortHandle`]; the guest's output goes to a [`Sink`]. A sink that takes no more for now makes the guest wait and
//! nobody else: its queue can be stopped at any time, and goes on at the byte where it was.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, ErrorKind, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::queue::{Chain, QueueError, Virtqueue};
use crate::runner::{Doorbell, Job, StopFlag, Worker};

/// Input that the guest has not taken yet, in bytes; more is not accepted.
pub const INPUT_LIMIT: usize = 64 << 10;
/// How long a full sink is waited for before it is looked whether the queue is to stop.
const PATIENCE: Duration = Duration::from_millis(20);

/// Where a port's output goes.
pub trait Sink: Send {
    /// Takes some of `data`, and says how much; [`ErrorKind::WouldBlock`] when it takes nothing for now. After any other error the data
    /// are lost, as on a line with nobody at its end.
    ///
    /// # Errors
    /// Also the host's.
    fn write(&mut self, data: &[u8]) -> io::Result<usize>;
    /// Waits until it may take more, `at_most` so long.
    fn wait(&mut self, at_most: Duration) {
        std::thread::sleep(at_most);
    }
    /// All of a buffer was given to it.
    fn flush(&mut self) {}
}

/// A writer that takes all, and may block.
pub struct Blocking(pub Box<dyn Write + Send>);

impl Sink for Blocking {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.0.write_all(data).map(|()| data.len())
    }
    fn flush(&mut self) {
        let _ = self.0.flush();
    }
}

/// Saved state of a port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// Input that the guest has not taken yet; at most [`INPUT_LIMIT`] bytes.
    pub input: Vec<u8>,
    /// Bytes of the first buffer in the transmit queue that have been sent.
    pub sent: u32,
}

impl PortState {
    /// Can it be taken over?
    ///
    /// # Errors
    /// A line that says why not.
    pub fn check(&self) -> Result<(), String> {
        if self.input.len() > INPUT_LIMIT {
            return Err(format!("{} bytes of input wait, at most {INPUT_LIMIT} can", self.input.len()));
        }
        Ok(())
    }
}

#[derive(Default)]
struct Host {
    input: VecDeque<u8>,
    /// Input is held back: nobody in the guest would take it.
    held: bool,
    sent: u32,
    closed: bool,
}

struct Shared {
    host: Mutex<Host>,
    /// The guest took input, or the port is gone.
    room: Condvar,
    /// Wakes the thread that fills the receive queue.
    input_bell: Arc<dyn Doorbell>,
    sink: Mutex<Box<dyn Sink>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's end of a port. Clones are the same end.
#[derive(Clone)]
pub struct PortHandle(Arc<Shared>);

impl fmt::Debug for PortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PortHandle").field("input", &lock(&self.0.host).input.len()).finish_non_exhaustive()
    }
}

impl PortHandle {
    /// Gives input to the guest; returns how many bytes were accepted: fewer than all when [`INPUT_LIMIT`] bytes wait. Never blocks.
    pub fn send(&self, data: &[u8]) -> usize {
        let mut host = lock(&self.0.host);
        let n = data.len().min(INPUT_LIMIT.saturating_sub(host.input.len()));
        host.input.extend(data.iter().take(n));
        drop(host);
        if n > 0 {
            self.0.input_bell.ring();
        }
        n
    }

    /// Gives all of `data` to the guest, waiting for it to take earlier input; `false` when the port is gone.
    pub fn send_all(&self, mut data: &[u8]) -> bool {
        while !data.is_empty() {
            let n = self.send(data);
            data = data.get(n..).unwrap_or_default();
            let mut host = lock(&self.0.host);
            while !data.is_empty() && host.input.len() >= INPUT_LIMIT && !host.closed {
                host = self.0.room.wait(host).unwrap_or_else(PoisonError::into_inner);
            }
            if host.closed {
                return false;
            }
        }
        true
    }
}

/// Fills the receive queue from the host's input.
struct ReceiveJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
}

impl ReceiveJob {
    fn receive(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        let memory = self.queue.memory();
        let idle = |host: &Host| host.held || host.input.is_empty();
        loop {
            self.queue.disable_notification()?;
            loop {
                // Without input the driver's notifications of new buffers are not wanted: they stay off.
                if stop.is_set() || idle(&lock(&self.shared.host)) {
                    return Ok(());
                }
                let Some(mut chain) = self.queue.pop(&memory)? else { break };
                let mut host = lock(&self.shared.host);
                let n = host.input.len().min(chain.writable.len() as usize);
                let data: Vec<u8> = host.input.drain(..n).collect();
                drop(host);
                self.shared.room.notify_all();
                chain.writable.write(&data);
                self.queue.push(chain.head, n as u32)?;
                self.queue.signal()?;
            }
            if !self.queue.enable_notification()? {
                return Ok(());
            }
        }
    }
}

impl Job for ReceiveJob {
    fn run(&mut self, stop: &StopFlag) {
        if !self.queue.is_broken()
            && let Err(why) = self.receive(stop)
        {
            self.queue.fail(&why);
        }
    }

    fn failed(&mut self) {
        self.queue.fail(&"the console's input thread failed");
    }
}

/// Writes the transmit queue to the sink.
struct TransmitJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
    /// Bytes of the next chain that have been sent.
    sent: u32,
}

impl TransmitJob {
    fn transmit(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        let memory = self.queue.memory();
        loop {
            self.queue.disable_notification()?;
            while !stop.is_set() {
                let Some(mut chain) = self.queue.pop(&memory)? else { break };
                let whole = chain.readable.len();
                // The driver may have made it shorter since.
                drop(chain.readable.take_front(std::mem::take(&mut self.sent).min(whole)));
                if !send(&mut chain, &mut **lock(&self.shared.sink), stop) {
                    self.sent = whole.saturating_sub(chain.readable.len());
                    self.queue.unpop(1);
                    return Ok(());
                }
                self.queue.push(chain.head, 0)?;
                self.queue.signal()?;
            }
            if !self.queue.enable_notification()? || stop.is_set() {
                return Ok(());
            }
        }
    }
}

impl Job for TransmitJob {
    fn run(&mut self, stop: &StopFlag) {
        if !self.queue.is_broken()
            && let Err(why) = self.transmit(stop)
        {
            self.queue.fail(&why);
        }
    }

    fn failed(&mut self) {
        self.queue.fail(&"the console's output thread failed");
    }
}

/// Sends a chain; `false` when it was stopped with something left, which is then what the chain still has.
fn send(chain: &mut Chain<'_>, sink: &mut dyn Sink, stop: &StopFlag) -> bool {
    let mut data = [0; 4096];
    while !chain.readable.is_empty() {
        let n = chain.readable.clone().read(&mut data);
        let Some(piece) = data.get(..n).filter(|piece| !piece.is_empty()) else { break };
        match sink.write(piece) {
            Ok(taken) => drop(chain.readable.take_front(taken.min(n) as u32)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                if stop.is_set() {
                    return false;
                }
                sink.wait(PATIENCE);
            }
            Err(_) => return true,
        }
    }
    sink.flush();
    true
}

/// The guest's end of a port, for a device.
pub(super) struct Port {
    shared: Arc<Shared>,
    receiver: Worker<ReceiveJob>,
    transmitter: Worker<TransmitJob>,
}

impl Port {
    /// A port whose threads are named after `name`. It is not waited for its output to end when it is dropped.
    pub(super) fn new(name: &str, sink: Box<dyn Sink>) -> io::Result<(Self, PortHandle)> {
        let receiver = Worker::new(&format!("{name}-in"))?;
        let mut transmitter = Worker::new(&format!("{name}-out"))?;
        transmitter.detach();
        let shared = Arc::new(Shared {
            host: Mutex::default(),
            room: Condvar::new(),
            input_bell: receiver.doorbell(),
            sink: Mutex::new(sink),
        });
        let handle = PortHandle(shared.clone());
        Ok((Self { shared, receiver, transmitter }, handle))
    }

    pub(super) fn start_receive(&self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.receiver.start(ReceiveJob { queue, shared: self.shared.clone() });
        self.receiver.doorbell()
    }

    pub(super) fn start_transmit(&self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let sent = lock(&self.shared.host).sent;
        self.transmitter.start(TransmitJob { queue, shared: self.shared.clone(), sent });
        self.transmitter.doorbell()
    }

    pub(super) fn stop_receive(&self) -> Option<Virtqueue> {
        self.receiver.stop().map(|job| job.queue)
    }

    pub(super) fn stop_transmit(&self) -> Option<Virtqueue> {
        let job = self.transmitter.stop()?;
        lock(&self.shared.host).sent = job.sent;
        Some(job.queue)
    }

    /// Holds input back, or lets it through.
    pub(super) fn hold(&self, held: bool) {
        lock(&self.shared.host).held = held;
        if !held {
            self.shared.input_bell.ring();
        }
    }

    /// Back to power-on; input that waits stays, as on a line.
    pub(super) fn reset(&self) {
        lock(&self.shared.host).sent = 0;
    }

    pub(super) fn save(&self) -> PortState {
        let host = lock(&self.shared.host);
        PortState { input: host.input.iter().copied().collect(), sent: host.sent }
    }

    /// Takes over a state that has passed [`PortState::check`].
    pub(super) fn restore(&self, state: &PortState) {
        let mut host = lock(&self.shared.host);
        host.input = state.input.iter().copied().collect();
        host.sent = state.sent;
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        lock(&self.shared.host).closed = true;
        self.shared.room.notify_all();
    }
}
