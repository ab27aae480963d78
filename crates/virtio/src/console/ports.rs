//! A device with several ports, each with a name (VIRTIO_CONSOLE_F_MULTIPORT, virtio 1.3, 5.3.2 and 5.3.6.2).
//!
//! Port 0 is left out: drivers that know nothing of several ports take it for a console. Named ports have the numbers from 1 on; port n
//! has the queues 2n + 2 and 2n + 3. Which message a driver is to get next follows from what it was told before and what is so now:
//! nothing is kept that could grow.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::control::{FromDevice, FromDriver};
use super::port::{Port, PortHandle, PortState, Sink};
use super::{QUEUE_SIZE, config};
use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::{QueueError, Virtqueue};
use crate::runner::{Doorbell, Inline, Job, StopFlag};

/// Most named ports of a device.
pub const MAX_PORTS: usize = 16;
/// VIRTIO_CONSOLE_F_MULTIPORT (5.3.3).
const F_MULTIPORT: u64 = 1 << 1;
/// The control queues: messages to the driver, and from it.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// What one driver knows of a port and says about it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    /// It was told that there is this port.
    added: bool,
    /// It is ready for it.
    ready: bool,
    /// It was told the name.
    named: bool,
    /// It was told whether somebody on the host has it open.
    told_open: bool,
    /// Somebody in the guest has it open.
    guest_open: bool,
}

/// Saved state of one named port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NamedPortState {
    name: String,
    known: Known,
    port: PortState,
}

/// Saved state of [`Ports`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortsState {
    ready: bool,
    ports: Vec<NamedPortState>,
}

struct Named {
    name: String,
    known: Known,
    /// Somebody on the host has it open.
    host_open: bool,
}

#[derive(Default)]
struct Control {
    /// The driver wants to hear of ports.
    ready: bool,
    ports: Vec<Named>,
}

impl Control {
    fn port(&mut self, number: u32) -> Option<&mut Named> {
        self.ports.get_mut(usize::try_from(number.checked_sub(1)?).ok()?)
    }

    /// Takes in what the driver says. Returns the index of a port whose input is to be held back or let through.
    fn hear(&mut self, message: FromDriver) -> Option<usize> {
        match message {
            FromDriver::DeviceReady(ready) => {
                self.ready = ready;
                self.ports.iter_mut().for_each(|port| port.known = Known::default());
                None
            }
            FromDriver::PortReady(number, ready) => {
                let known = &mut self.port(number)?.known;
                *known = Known { added: known.added, ready, ..Known::default() };
                None
            }
            FromDriver::PortOpen(number, open) => {
                self.port(number)?.known.guest_open = open;
                Some(number as usize - 1)
            }
        }
    }

    /// The message that the driver is to get next, with the port's number.
    fn next(&mut self) -> Option<(u32, FromDevice)> {
        if !self.ready {
            return None;
        }
        for (number, port) in (1..).zip(&mut self.ports) {
            let known = &mut port.known;
            if !known.added {
                known.added = true;
                return Some((number, FromDevice::Add));
            }
            if known.ready && !known.named {
                known.named = true;
                return Some((number, FromDevice::Name(port.name.clone())));
            }
            if known.ready && known.told_open != port.host_open {
                known.told_open = port.host_open;
                return Some((number, FromDevice::Open(port.host_open)));
            }
        }
        None
    }
}

fn lock(control: &Mutex<Control>) -> MutexGuard<'_, Control> {
    control.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tells the driver what there is to tell.
struct TellJob {
    queue: Virtqueue,
    control: Arc<Mutex<Control>>,
}

impl TellJob {
    fn tell(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        let memory = self.queue.memory();
        loop {
            self.queue.disable_notification()?;
            while !stop.is_set() && !self.queue.is_empty() {
                let Some((number, message)) = lock(&self.control).next() else { return Ok(()) };
                let Some(mut chain) = self.queue.pop(&memory)? else { break };
                // A driver whose buffers are too small for a message gets what fits.
                let written = chain.writable.write(&message.bytes(number)) as u32;
                self.queue.push(chain.head, written)?;
                self.queue.signal()?;
            }
            if !self.queue.enable_notification()? || stop.is_set() {
                return Ok(());
            }
        }
    }
}

impl Job for TellJob {
    fn run(&mut self, stop: &StopFlag) {
        if !self.queue.is_broken()
            && let Err(why) = self.tell(stop)
        {
            self.queue.fail(&why);
        }
    }

    fn failed(&mut self) {
        self.queue.fail(&"the ports' control failed");
    }
}

/// Hears what the driver says.
struct HearJob {
    queue: Virtqueue,
    control: Arc<Mutex<Control>>,
    ports: Arc<Vec<Port>>,
    tell: Arc<dyn Doorbell>,
}

impl Job for HearJob {
    fn run(&mut self, stop: &StopFlag) {
        let (control, ports, tell) = (&self.control, &self.ports, &self.tell);
        self.queue.serve(stop, |chain| {
            if let Some(message) = FromDriver::parse(&mut chain.readable) {
                let changed = lock(control).hear(message);
                hold(control, ports, changed);
                tell.ring();
            }
            0
        });
    }

    fn failed(&mut self) {
        self.queue.fail(&"the ports' control failed");
    }
}

/// Input goes to the guest as long as somebody there has the port open: of one port, or of all.
fn hold(control: &Mutex<Control>, ports: &[Port], which: Option<usize>) {
    let open: Vec<bool> = lock(control).ports.iter().map(|port| port.known.guest_open).collect();
    for (index, (port, open)) in ports.iter().zip(open).enumerate() {
        if which.is_none_or(|which| which == index) {
            port.hold(!open);
        }
    }
}

/// The host's end of a named port. Clones are the same end.
#[derive(Clone)]
pub struct NamedPortHandle {
    port: PortHandle,
    index: usize,
    control: Arc<Mutex<Control>>,
    tell: Arc<dyn Doorbell>,
}

impl fmt::Debug for NamedPortHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NamedPortHandle").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Deref for NamedPortHandle {
    type Target = PortHandle;

    fn deref(&self) -> &PortHandle {
        &self.port
    }
}

impl NamedPortHandle {
    /// Somebody on the host is there, or has gone: the guest is told.
    pub fn set_open(&self, open: bool) {
        if let Some(port) = lock(&self.control).ports.get_mut(self.index) {
            port.host_open = open;
        }
        self.tell.ring();
    }
}

/// A virtio console device with named ports only.
pub struct Ports {
    ports: Arc<Vec<Port>>,
    control: Arc<Mutex<Control>>,
    tell: Inline<TellJob>,
    hear: Inline<HearJob>,
    /// Queues of port 0, which does nothing.
    idle: BTreeMap<u16, Virtqueue>,
}

impl Ports {
    /// A device with a port for each name and where its output goes, and their host ends in the same order; the first [`MAX_PORTS`] count.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(ports: Vec<(String, Box<dyn Sink>)>) -> io::Result<(Self, Vec<NamedPortHandle>)> {
        let tell = Inline::<TellJob>::default();
        let control = Arc::<Mutex<Control>>::default();
        let (mut ends, mut handles) = (Vec::new(), Vec::new());
        for (index, (name, sink)) in ports.into_iter().take(MAX_PORTS).enumerate() {
            let (port, handle) = Port::new(&format!("port-{}", index + 1), sink)?;
            port.hold(true);
            ends.push(port);
            let (control, tell) = (control.clone(), tell.doorbell());
            lock(&control).ports.push(Named { name, known: Known::default(), host_open: false });
            handles.push(NamedPortHandle { port: handle, index, control, tell });
        }
        let (ports, hear) = (Arc::new(ends), Inline::default());
        Ok((Self { ports, control, tell, hear, idle: BTreeMap::new() }, handles))
    }

    /// The port of a queue, if it is one of a named port.
    fn port(&self, queue: u16) -> Option<&Port> {
        self.ports.get(usize::from(queue.checked_sub(4)? / 2))
    }
}

impl VirtioDevice for Ports {
    fn device_type(&self) -> u16 {
        3
    }

    fn features(&self) -> u64 {
        F_MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4 + 2 * self.ports.len()]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&config((0, 0), self.ports.len() as u32 + 1), offset, data);
    }

    fn activate(&mut self, _features: u64, _interrupt: Arc<dyn Interrupt>) {}

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let index = queue.index();
        match (index, self.port(index)) {
            (CONTROL_RECEIVE, _) => {
                self.tell.start(TellJob { queue, control: self.control.clone() });
                self.tell.doorbell()
            }
            (CONTROL_TRANSMIT, _) => {
                let (control, ports, tell) = (self.control.clone(), self.ports.clone(), self.tell.doorbell());
                self.hear.start(HearJob { queue, control, ports, tell });
                self.hear.doorbell()
            }
            (index, Some(port)) if index % 2 == 0 => port.start_receive(queue),
            (_, Some(port)) => port.start_transmit(queue),
            (index, None) => {
                self.idle.insert(index, queue);
                crate::runner::silent()
            }
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        match (index, self.port(index)) {
            (CONTROL_RECEIVE, _) => self.tell.stop().map(|job| job.queue),
            (CONTROL_TRANSMIT, _) => self.hear.stop().map(|job| job.queue),
            (index, Some(port)) if index % 2 == 0 => port.stop_receive(),
            (_, Some(port)) => port.stop_transmit(),
            (index, None) => self.idle.remove(&index),
        }
    }

    fn reset(&mut self) {
        let mut control = lock(&self.control);
        control.ready = false;
        control.ports.iter_mut().for_each(|port| port.known = Known::default());
        drop(control);
        self.ports.iter().for_each(Port::reset);
        hold(&self.control, &self.ports, None);
    }

    fn save(&self) -> DeviceState {
        let control = lock(&self.control);
        let ports = control.ports.iter().zip(self.ports.iter()).map(|(named, port)| {
            let Named { name, known, .. } = named;
            NamedPortState { name: name.clone(), known: *known, port: port.save() }
        });
        DeviceState::Ports(PortsState { ready: control.ready, ports: ports.collect() })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Ports(state) = state else { return Err("it is not of named ports".into()) };
        let mut control = lock(&self.control);
        let same = state.ports.len() == control.ports.len()
            && state.ports.iter().zip(&control.ports).all(|(saved, here)| saved.name == here.name);
        if !same {
            let names: Vec<_> = state.ports.iter().map(|port| port.name.as_str()).collect();
            return Err(format!("the ports were {names:?}: give the same --port"));
        }
        state.ports.iter().try_for_each(|port| port.port.check())?;
        control.ready = state.ready;
        for (saved, (named, port)) in state.ports.iter().zip(control.ports.iter_mut().zip(self.ports.iter())) {
            named.known = saved.known;
            port.restore(&saved.port);
        }
        drop(control);
        hold(&self.control, &self.ports, None);
        Ok(())
    }
}
