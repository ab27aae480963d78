//! virtio-pci, modern only (virtio 1.3, 4.1): one device as a PCI Express endpoint.
//!
//! BAR 0 holds the four structures, BAR 1 the MSI-X table and pending bits:
//!
//! ```text
//! BAR 0  0x0000  common configuration        common.rs
//!        0x1000  ISR status                  link.rs
//!        0x2000  device configuration        the device
//!        0x3000  notifications, 4 bytes a queue
//! BAR 1  0x0000  MSI-X table   0x1000  pending bits
//! ```
//!
//! A notification takes the shortest way: from the address of the write to the queue's [`Doorbell`](crate::runner::Doorbell), without
//! the transport's lock, and without leaving the guest where the engine can do that (doorbells.rs).
//! All other registers are behind one lock, under which queues are also stopped; a device's threads never take it.
//!
//! Saving: [`VirtioPci::pause`] all devices first, then save the machine, then [`VirtioPci::resume`]. After a restore a device is paused
//! until [`VirtioPci::resume`], so that it raises no interrupt before the interrupt chips are restored.

mod common;
mod doorbells;
mod link;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::Chips;
use machine::pci::{BarKind, ConfigError, Msix, PciConfig, PciDevice, PciIdentity, capability};
use machine::state::StateError;
use memory::VmMemory;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::device::{DeviceState, Reporter, VirtioDevice};
use crate::queue::QueueState;
use common::{Common, QueueRegisters};
use doorbells::Doorbells;
use link::Link;

/// Bits of the device status byte (virtio 1.3, 2.1).
pub mod status {
    /// The guest has found the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest has a driver for it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}

/// No MSI-X vector.
pub const NO_VECTOR: u16 = 0xffff;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const BAR0_SIZE: u64 = 0x4000;
const PBA: u64 = 0x1000;
const BAR1_SIZE: u64 = 0x2000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Most queues of a device, so that the table fits before the pending bits.
const MAX_QUEUES: usize = 128;

/// `cfg_type` of the capabilities (4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;
/// Offset of `pci_cfg_data` in its capability.
const PCI_CFG_DATA: u16 = 16;

/// What the transport and our queues offer for every device.
pub fn transport_features() -> u64 {
    [VIRTIO_F_VERSION_1, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX, VIRTIO_F_RING_RESET]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
}

/// Saved state of one queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciQueueState {
    /// Place and position.
    pub queue: QueueState,
    /// `queue_enable`.
    pub enabled: bool,
    /// MSI-X vector.
    pub vector: u16,
}

/// Saved state of [`VirtioPci`], the device's included.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciState {
    /// The device status byte.
    pub status: u8,
    /// The ISR byte.
    pub isr: u8,
    /// What the driver accepted.
    pub driver_features: u128,
    /// Selector registers: device feature, driver feature, queue.
    pub selects: (u32, u32, u16),
    /// MSI-X vector of configuration changes.
    pub config_vector: u16,
    /// The queues.
    pub queues: Vec<PciQueueState>,
    /// The device.
    pub device: DeviceState,
}

/// A virtio device on PCI.
pub struct VirtioPci {
    name: String,
    config: Arc<PciConfig>,
    link: Arc<Link>,
    common: Mutex<Common>,
    doorbells: Arc<Doorbells>,
    /// Where the configuration access capability is.
    pci_cfg: u16,
}

impl fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioPci").field("name", &self.name).finish_non_exhaustive()
    }
}

impl VirtioPci {
    /// Puts `device` on PCI under `name` (unique in the VM). `memory` is what its queues and buffers are in; `reporter` is told when the
    /// guest's driver breaks the rules.
    ///
    /// # Errors
    /// The device has more than 128 queues.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        memory: Arc<VmMemory>,
        reporter: Option<Reporter>,
    ) -> Result<Self, ConfigError> {
        let queues = device.queue_sizes().len();
        if queues > MAX_QUEUES {
            return Err(ConfigError::Full);
        }
        let kind = device.device_type();
        let (class, subclass) = match kind {
            1 => (0x02, 0x00), // network, Ethernet
            2 => (0x01, 0x80), // mass storage, other
            3 => (0x07, 0x80), // communication, other
            _ => (0xff, 0x00),
        };
        let mut config = PciConfig::new(PciIdentity {
            vendor: 0x1af4,
            device: 0x1040 + kind,
            revision: 1,
            class,
            subclass,
            interface: 0,
            subsystem_vendor: 0x1af4,
            subsystem: 0x0040 + kind,
        });
        config.add_bar(0, BarKind::Memory32, BAR0_SIZE)?;
        config.add_bar(1, BarKind::Memory32, BAR1_SIZE)?;
        let mut add = |kind: u8, offset: u64, len: usize, more: &[u8], writable: &[u8]| {
            // cap_len counts the two bytes that PciConfig adds: id and link.
            let mut body = vec![16 + more.len() as u8, kind, 0, 0, 0, 0];
            body.extend((offset as u32).to_le_bytes());
            body.extend((len as u32).to_le_bytes());
            body.extend(more);
            config.add_capability(capability::VENDOR, &body, writable)
        };
        add(CAP_COMMON, COMMON, common::COMMON_LEN, &[], &[])?;
        add(CAP_NOTIFY, NOTIFY, queues * NOTIFY_MULTIPLIER as usize, &NOTIFY_MULTIPLIER.to_le_bytes(), &[])?;
        add(CAP_ISR, ISR, 1, &[], &[])?;
        add(CAP_DEVICE, DEVICE, 0x1000, &[], &[])?;
        // Writable: bar, offset, length, data.
        let access = [0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        let pci_cfg = add(CAP_PCI, 0, 0, &[0; 4], &access)?.into();
        let msix = Arc::new(Msix::new(queues as u16 + 1));
        config.add_msix(msix.clone(), (1, 0), (1, PBA))?;
        config.use_intx();
        let config = Arc::new(config);
        let link = Arc::new(Link::new(name.to_owned(), config.clone(), msix, queues, reporter));
        let doorbells = Arc::new(Doorbells::new(queues, config.clone()));
        let common = Mutex::new(Common::new(device, memory, link.clone(), doorbells.clone()));
        Ok(Self { name: name.to_owned(), config, link, common, doorbells, pci_cfg })
    }

    fn common(&self) -> MutexGuard<'_, Common> {
        self.common.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops all work for the guest until [`Self::resume`]. On return each request taken has been answered.
    pub fn pause(&self) {
        let mut common = self.common();
        common.paused = true;
        common.stop_queues();
    }

    /// Goes on after [`Self::pause`] or a restore.
    pub fn resume(&self) {
        let mut common = self.common();
        common.paused = false;
        common.start_queues();
    }

    /// Lets the engine's chips take notifications, where they can: vCPUs then stay in the guest.
    pub fn use_chips(&self, chips: Arc<dyn Chips>) {
        self.doorbells.use_chips(chips);
    }

    /// The part of BAR 0 that the configuration access capability points to now, if it is a valid access (4.1.4.9).
    fn window(&self) -> Option<(u64, usize)> {
        let mut fields = [0; 12];
        self.config.read(self.pci_cfg + 4, &mut fields);
        let [bar, _, _, _, offset @ .., l0, l1, l2, l3] = fields;
        let (offset, len) = (u32::from_le_bytes(offset), u32::from_le_bytes([l0, l1, l2, l3]));
        let end = u64::from(offset) + u64::from(len);
        (bar == 0 && matches!(len, 1 | 2 | 4) && offset % len == 0 && end <= BAR0_SIZE)
            .then_some((offset.into(), len as usize))
    }

    /// Does a configuration access of `len` bytes at `offset` touch `pci_cfg_data`? Returns where in it the access starts.
    fn in_pci_cfg_data(&self, offset: u16, len: usize) -> Option<usize> {
        let start = usize::from(offset.checked_sub(self.pci_cfg + PCI_CFG_DATA)?);
        (start.checked_add(len)? <= 4).then_some(start)
    }
}

impl PciDevice for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
        if let Some(start) = self.in_pci_cfg_data(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            let mut value = [0; 4];
            self.bar_read(0, at, value.get_mut(..len).unwrap_or_default());
            crate::device::read_bytes(&value, start as u64, data);
        }
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let was_master = self.config.bus_master();
        self.config.write(offset, data);
        if let Some(0) = self.in_pci_cfg_data(offset, data.len())
            && let Some((at, len)) = self.window()
        {
            self.bar_write(0, at, data.get(..len).unwrap_or(data));
        }
        let is_master = self.config.bus_master();
        if was_master != is_master {
            self.doorbells.rebind();
        }
        if !was_master && is_master {
            // What was notified while the device could not reach memory.
            for queue in 0..self.doorbells.len() {
                self.doorbells.ring(queue);
            }
        }
    }

    fn bar_mapped(&self, bar: u8, base: Option<u64>) {
        if bar == 0 {
            self.doorbells.mapped(base);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            _ if bar != 0 => {}
            ..ISR => self.common().read(offset, data),
            ISR => {
                if let Some(first) = data.first_mut() {
                    *first = self.link.take_isr();
                }
            }
            DEVICE..NOTIFY => self.common().device.read_config(offset - DEVICE, data),
            _ => {}
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        match offset {
            _ if bar != 0 => {}
            // The queue is named by the address; the value repeats it.
            NOTIFY.. => self.doorbells.ring(((offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER)) as usize),
            DEVICE..NOTIFY => self.common().device.write_config(offset - DEVICE, data),
            ..ISR => self.common().write(offset, data),
            _ => {}
        }
    }

    fn reset(&self) {
        let mut common = self.common();
        common.reset();
        common.paused = false;
    }

    fn save(&self) -> Vec<u8> {
        let mut common = self.common();
        common.stop_queues();
        let queues = common.queues.iter().enumerate().map(|(index, queue)| PciQueueState {
            queue: queue.state,
            enabled: queue.enabled,
            vector: self.link.queue_vector(index as u16),
        });
        let state = VirtioPciState {
            status: self.link.status(),
            isr: self.link.isr(),
            driver_features: common.driver_features,
            selects: (common.device_feature_select, common.driver_feature_select, common.queue_select),
            config_vector: self.link.config_vector(),
            queues: queues.collect(),
            device: common.device.save(),
        };
        common.start_queues();
        // Plain data always serialises; an empty state would be refused on restore.
        postcard::to_stdvec(&state).unwrap_or_default()
    }

    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        let refuse = |why: String| StateError::new(&self.name, why);
        let (state, rest) =
            postcard::take_from_bytes::<VirtioPciState>(state).map_err(|e| refuse(format!("it is damaged ({e})")))?;
        if !rest.is_empty() {
            return Err(refuse(format!("{} bytes too many", rest.len())));
        }
        let mut common = self.common();
        let queues = check(&state, &common).map_err(refuse)?;
        common.device.restore(&state.device).map_err(refuse)?;
        // Nothing fails from here on. The device's reset would undo what it just took over, so: queues first, state again after.
        common.reset();
        common.device.restore(&state.device).map_err(refuse)?;
        common.paused = true;
        common.driver_features = state.driver_features;
        (common.device_feature_select, common.driver_feature_select, common.queue_select) = state.selects;
        let vectors = state.queues.iter().map(|queue| queue.vector);
        self.link.restore(state.status, state.isr, state.config_vector, vectors);
        common.queues = queues;
        if state.status & status::DRIVER_OK != 0 {
            common.activate();
        }
        Ok(())
    }
}

/// Checks a saved state against the device it is to go to; returns the queues' registers.
fn check(state: &VirtioPciState, common: &Common) -> Result<Vec<QueueRegisters>, String> {
    if state.queues.len() != common.queues.len() {
        return Err(format!("{} queues, here {}", state.queues.len(), common.queues.len()));
    }
    let unknown = state.driver_features & !u128::from(common.offered());
    let settled = state.status & status::FEATURES_OK != 0;
    if settled && (unknown != 0 || state.driver_features >> VIRTIO_F_VERSION_1 & 1 == 0) {
        return Err(format!("features {:#x} are not offered here", state.driver_features));
    }
    if state.status & status::DRIVER_OK != 0 && !settled {
        return Err(format!("status {:#x}", state.status));
    }
    let mut queues = Vec::new();
    for (index, (saved, here)) in state.queues.iter().zip(&common.queues).enumerate() {
        if !saved.queue.size.is_power_of_two() || saved.queue.size > here.max {
            return Err(format!("queue {index} has size {}, at most {} here", saved.queue.size, here.max));
        }
        let queue = QueueRegisters { max: here.max, state: saved.queue, enabled: saved.enabled, live: false };
        if saved.enabled && state.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK {
            common.build_queue(index as u16, &queue).map_err(|e| format!("queue {index}: {e}"))?;
        }
        queues.push(queue);
    }
    Ok(queues)
}
