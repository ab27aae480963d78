//! The common configuration structure (virtio 1.3, 4.1.4.3) and what writing it does: feature negotiation, queue set-up, the device
//! status state machine, resets.

use std::sync::Arc;

use memory::VmMemory;

use super::doorbells::Doorbells;
use super::link::Link;
use super::{NO_VECTOR, status, transport_features};
use crate::device::{Interrupt, VirtioDevice};
use crate::queue::{QueueState, Virtqueue};
use virtio_bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// Bytes of the structure.
pub(super) const COMMON_LEN: usize = 0x40;

/// Registers of one queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct QueueRegisters {
    /// Largest size.
    pub max: u16,
    /// As the driver set it up; positions are current only while the queue is not with the device.
    pub state: QueueState,
    /// `queue_enable`.
    pub enabled: bool,
    /// The device has it.
    pub live: bool,
}

impl QueueRegisters {
    fn new(max: u16) -> Self {
        Self { max, state: QueueState { size: max, ..QueueState::default() }, enabled: false, live: false }
    }
}

/// The transport's state behind its lock.
pub(super) struct Common {
    pub device: Box<dyn VirtioDevice>,
    pub memory: Arc<VmMemory>,
    pub link: Arc<Link>,
    pub doorbells: Arc<Doorbells>,
    pub queues: Vec<QueueRegisters>,
    pub driver_features: u128,
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub queue_select: u16,
    /// Queues are held back: see `VirtioPci::pause`.
    pub paused: bool,
}

impl Common {
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<VmMemory>,
        link: Arc<Link>,
        doorbells: Arc<Doorbells>,
    ) -> Self {
        let queues = device.queue_sizes().into_iter().map(QueueRegisters::new).collect();
        Self {
            device,
            memory,
            link,
            doorbells,
            queues,
            driver_features: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            queue_select: 0,
            paused: false,
        }
    }

    /// All bits offered.
    pub(super) fn offered(&self) -> u64 {
        self.device.features() | transport_features()
    }

    fn has(&self, bit: u32) -> bool {
        self.driver_features >> bit & 1 != 0
    }

    fn selected(&mut self) -> Option<&mut QueueRegisters> {
        self.queues.get_mut(usize::from(self.queue_select))
    }

    /// Reads at `offset`, any width.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let mut image = [0; COMMON_LEN];
        let mut put = |at: usize, bytes: &[u8]| {
            if let Some(field) = image.get_mut(at..at + bytes.len()) {
                field.copy_from_slice(bytes);
            }
        };
        let window = |features: u128, select: u32| match select {
            0..=3 => (features >> (32 * select)) as u32,
            _ => 0,
        };
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &window(self.offered().into(), self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &window(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &self.link.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        put(0x14, &[self.link.status(), self.device.config_generation() as u8]);
        put(0x16, &self.queue_select.to_le_bytes());
        // A queue that does not exist has size 0 and no vector.
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.state.size.to_le_bytes());
            put(0x1a, &self.link.queue_vector(self.queue_select).to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes()); // queue_notify_off
            put(0x20, &queue.state.descriptors.to_le_bytes());
            put(0x28, &queue.state.driver.to_le_bytes());
            put(0x30, &queue.state.device.to_le_bytes());
            // queue_notify_data (0x38): not offered. queue_reset (0x3a): a reset is complete when its write is.
        } else {
            put(0x1a, &NO_VECTOR.to_le_bytes());
        }
        crate::device::read_bytes(&image, offset, data);
    }

    /// Writes a register. The driver uses each field's width; the 64-bit ones also in halves (4.1.3.1). Other writes do nothing.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) {
        let value = data.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte));
        match (offset, data.len()) {
            (0x00, 4) => self.device_feature_select = value as u32,
            (0x08, 4) => self.driver_feature_select = value as u32,
            (0x0c, 4) => self.write_features(value as u32),
            (0x10, 2) => self.link.set_config_vector(value as u16),
            (0x14, 1) => self.write_status(value as u8),
            (0x16, 2) => self.queue_select = value as u16,
            (0x1a, 2) => self.link.set_queue_vector(self.queue_select, value as u16),
            (0x1c, 2) if value == 1 => self.enable_queue(self.queue_select),
            (0x3a, 2) if value == 1 => self.reset_queue(self.queue_select),
            _ => self.write_queue(offset, data.len(), value),
        }
    }

    /// What can only be changed while the queue is not enabled.
    fn write_queue(&mut self, offset: u64, len: usize, value: u64) {
        let Some(queue) = self.selected().filter(|queue| !queue.enabled) else { return };
        let part = |field: &mut u64, high: bool| {
            *field = match (len, high) {
                (8, false) => value,
                (4, false) => *field & !0xffff_ffff | value,
                (4, true) => *field & 0xffff_ffff | value << 32,
                _ => *field,
            }
        };
        let state = &mut queue.state;
        match offset {
            0x18 if len == 2 => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max {
                    state.size = size;
                }
            }
            0x20 | 0x24 => part(&mut state.descriptors, offset == 0x24),
            0x28 | 0x2c => part(&mut state.driver, offset == 0x2c),
            0x30 | 0x34 => part(&mut state.device, offset == 0x34),
            _ => {}
        }
    }

    fn write_features(&mut self, value: u32) {
        // Settled by FEATURES_OK (2.2, 3.1.1).
        if self.link.status() & status::FEATURES_OK == 0
            && let 0..=3 = self.driver_feature_select
        {
            let shift = 32 * self.driver_feature_select;
            self.driver_features = self.driver_features & !(0xffff_ffff << shift) | u128::from(value) << shift;
        }
    }

    /// The state machine of 2.1 and 3.1.1. A driver cannot clear bits, except all by writing 0.
    fn write_status(&mut self, value: u8) {
        if value == 0 {
            return self.reset();
        }
        self.link.add_status(value & (status::ACKNOWLEDGE | status::DRIVER | status::FAILED));
        let old = self.link.status();
        if value & status::FEATURES_OK != 0 && old & status::FEATURES_OK == 0 && old & status::DRIVER != 0 {
            let unknown = self.driver_features & !u128::from(self.offered());
            // Left clear, the bit tells the driver that the device does not work with these features.
            if unknown == 0 && self.has(VIRTIO_F_VERSION_1) {
                self.link.add_status(status::FEATURES_OK);
            }
        }
        let old = self.link.status();
        if value & status::DRIVER_OK != 0 && old & status::DRIVER_OK == 0 && old & status::FEATURES_OK != 0 {
            self.link.add_status(status::DRIVER_OK);
            self.activate();
        }
    }

    /// DRIVER_OK is set: hands the device its enabled queues.
    pub(super) fn activate(&mut self) {
        self.device.activate(self.driver_features as u64, self.link.clone());
        self.start_queues();
    }

    /// Hands the device all enabled queues that it does not have.
    pub(super) fn start_queues(&mut self) {
        for index in 0..self.queues.len() {
            self.start_queue(index as u16);
        }
    }

    /// Builds the live queue for the registers of queue `index`.
    pub(super) fn build_queue(
        &self,
        index: u16,
        queue: &QueueRegisters,
    ) -> Result<Virtqueue, crate::queue::QueueError> {
        let event_idx = self.has(VIRTIO_RING_F_EVENT_IDX);
        Virtqueue::new(index, &queue.state, queue.max, event_idx, self.memory.clone(), self.link.clone())
    }

    fn start_queue(&mut self, index: u16) {
        let Some(queue) = self.queues.get(usize::from(index)) else { return };
        if !queue.enabled || queue.live || self.paused || self.link.status() & status::DRIVER_OK == 0 {
            return;
        }
        match self.build_queue(index, queue) {
            Ok(live) => {
                let doorbell = self.device.start_queue(live);
                self.doorbells.set(index, Some(doorbell));
                if let Some(queue) = self.queues.get_mut(usize::from(index)) {
                    queue.live = true;
                }
            }
            Err(why) => self.link.broken(&format_args!("queue {index}: {why}")),
        }
    }

    /// Takes queue `index` back from the device, with its position.
    fn stop_queue(&mut self, index: u16) {
        self.doorbells.set(index, None);
        let Some(queue) = self.queues.get_mut(usize::from(index)) else { return };
        if std::mem::take(&mut queue.live) {
            match self.device.stop_queue(index) {
                Some(live) => queue.state = live.state(),
                None => queue.state.broken = true,
            }
        }
    }

    /// Takes all queues back from the device.
    pub(super) fn stop_queues(&mut self) {
        for index in 0..self.queues.len() {
            self.stop_queue(index as u16);
        }
    }

    /// `queue_enable`: before DRIVER_OK, or again after a reset of this queue.
    fn enable_queue(&mut self, index: u16) {
        if self.link.status() & status::FEATURES_OK == 0 {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(index)).filter(|queue| !queue.enabled) {
            queue.enabled = true;
            self.start_queue(index);
        }
    }

    /// `queue_reset` (2.6.1): the queue alone goes back to its initial state.
    fn reset_queue(&mut self, index: u16) {
        if !self.has(VIRTIO_F_RING_RESET) || self.link.status() & status::FEATURES_OK == 0 {
            return;
        }
        self.stop_queue(index);
        if let Some(queue) = self.queues.get_mut(usize::from(index)) {
            *queue = QueueRegisters::new(queue.max);
        }
    }

    /// Device reset: when it returns, the device touches guest memory no more.
    pub(super) fn reset(&mut self) {
        self.stop_queues();
        self.device.reset();
        for queue in &mut self.queues {
            *queue = QueueRegisters::new(queue.max);
        }
        self.driver_features = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.queue_select = 0;
        self.link.reset();
    }
}
