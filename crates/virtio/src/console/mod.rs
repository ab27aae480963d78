//! virtio-console (virtio 1.3, 5.3): one port, which Linux shows as hvc0.
//!
//! The host's end is a [`ConsoleHandle`]: what the user types goes in by [`ConsoleHandle::send`], the window's size by
//! [`ConsoleHandle::resize`]; output goes to the writer given to [`Console::new`]. Each direction has a thread, so that a reader of
//! the output who stops reading does not stop the input. Terminal modes and escape keys are not this device's business.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::{Chain, QueueError, Virtqueue};
use crate::runner::{Doorbell, Job, StopFlag, Worker};

/// VIRTIO_CONSOLE_F_SIZE (5.3.3): the configuration space has the window's size.
const F_SIZE: u64 = 1 << 0;
/// Input that the guest has not taken yet, in bytes; more is not accepted.
pub const INPUT_LIMIT: usize = 64 << 10;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Saved state of [`Console`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns and rows of the window.
    pub size: (u16, u16),
    /// Input that the guest has not taken yet; at most [`INPUT_LIMIT`] bytes.
    pub input: Vec<u8>,
}

#[derive(Default)]
struct Host {
    input: VecDeque<u8>,
    size: (u16, u16),
    generation: u32,
    closed: bool,
    interrupt: Option<Arc<dyn Interrupt>>,
}

struct Shared {
    host: Mutex<Host>,
    /// The guest took input, or the console is gone.
    room: Condvar,
    /// Wakes the thread that fills the receive queue.
    input_bell: Arc<dyn Doorbell>,
    output: Mutex<Box<dyn Write + Send>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's end of a console. Clones are the same end.
#[derive(Clone)]
pub struct ConsoleHandle(Arc<Shared>);

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleHandle").field("size", &lock(&self.0.host).size).finish_non_exhaustive()
    }
}

impl ConsoleHandle {
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

    /// Gives all of `data` to the guest, waiting for it to take earlier input; `false` when the console is gone.
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

    /// The window has this many columns and rows now.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut host = lock(&self.0.host);
        if host.size != (columns, rows) {
            host.size = (columns, rows);
            host.generation = host.generation.wrapping_add(1);
            let interrupt = host.interrupt.clone();
            drop(host);
            if let Some(interrupt) = interrupt {
                interrupt.config();
            }
        }
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
        loop {
            self.queue.disable_notification()?;
            loop {
                // Without input the driver's notifications of new buffers are not wanted: they stay off.
                if stop.is_set() || lock(&self.shared.host).input.is_empty() {
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

/// Writes the transmit queue to the host's output.
struct TransmitJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
}

impl Job for TransmitJob {
    fn run(&mut self, stop: &StopFlag) {
        let shared = &self.shared;
        self.queue.serve(stop, |chain| {
            transmit(chain, &mut *lock(&shared.output));
            0
        });
    }

    fn failed(&mut self) {
        self.queue.fail(&"the console's output thread failed");
    }
}

/// Output that cannot be written is lost, as on a serial line with nobody at its end.
fn transmit(chain: &mut Chain<'_>, output: &mut dyn Write) {
    let mut data = [0; 4096];
    while !chain.readable.is_empty() {
        let n = chain.readable.read(&mut data);
        if n == 0 || output.write_all(data.get(..n).unwrap_or_default()).is_err() {
            return;
        }
    }
    let _ = output.flush();
}

/// A virtio console.
pub struct Console {
    shared: Arc<Shared>,
    receiver: Worker<ReceiveJob>,
    transmitter: Worker<TransmitJob>,
}

impl Console {
    /// A console that writes the guest's output to `output`, and its host end.
    ///
    /// A reset of the device waits for a write to `output` in progress.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(output: Box<dyn Write + Send>) -> std::io::Result<(Self, ConsoleHandle)> {
        let receiver = Worker::new("console-in")?;
        let mut transmitter = Worker::new("console-out")?;
        transmitter.detach();
        let shared = Arc::new(Shared {
            host: Mutex::default(),
            room: Condvar::new(),
            input_bell: receiver.doorbell(),
            output: Mutex::new(output),
        });
        let handle = ConsoleHandle(shared.clone());
        Ok((Self { shared, receiver, transmitter }, handle))
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        F_SIZE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // struct virtio_console_config (5.3.4): cols, rows, max_nr_ports, emerg_wr.
        let (columns, rows) = lock(&self.shared.host).size;
        let mut config = [0; 12];
        for (to, from) in config.iter_mut().zip(columns.to_le_bytes().into_iter().chain(rows.to_le_bytes()).chain([1]))
        {
            *to = from;
        }
        read_bytes(&config, offset, data);
    }

    fn config_generation(&self) -> u32 {
        lock(&self.shared.host).generation
    }

    fn activate(&mut self, _features: u64, interrupt: Arc<dyn Interrupt>) {
        lock(&self.shared.host).interrupt = Some(interrupt);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let shared = self.shared.clone();
        match queue.index() {
            RECEIVE => {
                self.receiver.start(ReceiveJob { queue, shared });
                self.receiver.doorbell()
            }
            _ => {
                self.transmitter.start(TransmitJob { queue, shared });
                self.transmitter.doorbell()
            }
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        match index {
            RECEIVE => self.receiver.stop().map(|job| job.queue),
            TRANSMIT => self.transmitter.stop().map(|job| job.queue),
            _ => None,
        }
    }

    fn reset(&mut self) {
        lock(&self.shared.host).interrupt = None;
    }

    fn save(&self) -> DeviceState {
        let host = lock(&self.shared.host);
        DeviceState::Console(ConsoleState { size: host.size, input: host.input.iter().copied().collect() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Console(state) = state else { return Err("it is not of a console".into()) };
        if state.input.len() > INPUT_LIMIT {
            return Err(format!("{} bytes of input wait, at most {INPUT_LIMIT} can", state.input.len()));
        }
        let mut host = lock(&self.shared.host);
        host.size = state.size;
        host.generation = host.generation.wrapping_add(1);
        host.input = state.input.iter().copied().collect();
        Ok(())
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        lock(&self.shared.host).closed = true;
        self.shared.room.notify_all();
    }
}
