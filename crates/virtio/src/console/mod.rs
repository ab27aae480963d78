//! virtio-console (virtio 1.3, 5.3): [`Console`] is one port, which Linux shows as hvc0; [`Ports`] are any number of named ones, which Linux
//! shows as /dev/virtio-ports/NAME.
//!
//! The host's end of a console is a [`ConsoleHandle`]: what the user types goes in by [`PortHandle::send`], the window's size by
//! [`ConsoleHandle::resize`]; output goes to the writer given to [`Console::new`]. Each direction has a thread (`port`), so that a reader of
//! the output who stops reading does not stop the input. Terminal modes and escape keys are not this device's business.
//!
//! A console and ports are devices apart: where a device has several ports, the window's size comes in a message whose two fields drivers
//! and standard have in different orders; where it has one, it stands in the configuration space.

pub mod control;
mod port;
mod ports;
#[cfg(test)]
mod tests;

use std::fmt;
use std::io::Write;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::Virtqueue;
use crate::runner::Doorbell;
use port::Port;
pub use port::{Blocking, INPUT_LIMIT, PortHandle, PortState, Sink};
pub use ports::{MAX_PORTS, NamedPortHandle, NamedPortState, Ports, PortsState};

/// VIRTIO_CONSOLE_F_SIZE (5.3.3): the configuration space has the window's size.
const F_SIZE: u64 = 1 << 0;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Saved state of [`Console`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// Columns and rows of the window.
    pub size: (u16, u16),
    /// The port.
    pub port: PortState,
}

#[derive(Default)]
struct Window {
    size: (u16, u16),
    generation: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host's end of a console. Clones are the same end.
#[derive(Clone)]
pub struct ConsoleHandle {
    port: PortHandle,
    window: Arc<Mutex<Window>>,
}

impl fmt::Debug for ConsoleHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleHandle").field("size", &lock(&self.window).size).finish_non_exhaustive()
    }
}

impl Deref for ConsoleHandle {
    type Target = PortHandle;

    fn deref(&self) -> &PortHandle {
        &self.port
    }
}

impl ConsoleHandle {
    /// The window has this many columns and rows now.
    pub fn resize(&self, columns: u16, rows: u16) {
        let mut window = lock(&self.window);
        if window.size != (columns, rows) {
            window.size = (columns, rows);
            window.generation = window.generation.wrapping_add(1);
            let interrupt = window.interrupt.clone();
            drop(window);
            if let Some(interrupt) = interrupt {
                interrupt.config();
            }
        }
    }
}

/// A virtio console.
pub struct Console {
    port: Port,
    window: Arc<Mutex<Window>>,
}

impl Console {
    /// A console that writes the guest's output to `output`, and its host end.
    ///
    /// A reset of the device waits for a write to `output` in progress.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(output: Box<dyn Write + Send>) -> std::io::Result<(Self, ConsoleHandle)> {
        let (port, handle) = Port::new("console", Box::new(Blocking(output)))?;
        let window = Arc::<Mutex<Window>>::default();
        Ok((Self { port, window: window.clone() }, ConsoleHandle { port: handle, window }))
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
        read_bytes(&config(lock(&self.window).size, 1), offset, data);
    }

    fn config_generation(&self) -> u32 {
        lock(&self.window).generation
    }

    fn activate(&mut self, _features: u64, interrupt: Arc<dyn Interrupt>) {
        lock(&self.window).interrupt = Some(interrupt);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        match queue.index() {
            RECEIVE => self.port.start_receive(queue),
            _ => self.port.start_transmit(queue),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        match index {
            RECEIVE => self.port.stop_receive(),
            TRANSMIT => self.port.stop_transmit(),
            _ => None,
        }
    }

    fn reset(&mut self) {
        lock(&self.window).interrupt = None;
        self.port.reset();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState { size: lock(&self.window).size, port: self.port.save() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Console(state) = state else { return Err("it is not of a console".into()) };
        state.port.check()?;
        self.port.restore(&state.port);
        let mut window = lock(&self.window);
        window.size = state.size;
        window.generation = window.generation.wrapping_add(1);
        Ok(())
    }
}

/// `struct virtio_console_config` (5.3.4): cols, rows, max_nr_ports, emerg_wr.
fn config((columns, rows): (u16, u16), ports: u32) -> [u8; 12] {
    let mut config = [0; 12];
    let bytes = columns.to_le_bytes().into_iter().chain(rows.to_le_bytes()).chain(ports.to_le_bytes());
    for (to, from) in config.iter_mut().zip(bytes) {
        *to = from;
    }
    config
}
