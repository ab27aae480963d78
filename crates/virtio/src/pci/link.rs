//! The way from a device to its driver: MSI-X or the interrupt wire, the ISR byte, and the bit DEVICE_NEEDS_RESET.
//!
//! It has locks of its own, never held while waiting: a queue's thread uses it while the transport waits for that thread.

use std::fmt;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use machine::pci::{Msix, PciConfig};

use super::{NO_VECTOR, status};
use crate::device::{Interrupt, Reporter};

/// ISR bit: buffers of some queue were used (virtio 1.3, 4.1.4.5).
const ISR_QUEUE: u8 = 1 << 0;
/// ISR bit: the configuration changed.
const ISR_CONFIG: u8 = 1 << 1;

pub(super) struct Link {
    name: String,
    config: Arc<PciConfig>,
    msix: Arc<Msix>,
    reporter: Option<Reporter>,
    reported: AtomicU32,
    isr: Mutex<u8>,
    status: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
}

impl Link {
    pub(super) fn new(
        name: String,
        config: Arc<PciConfig>,
        msix: Arc<Msix>,
        queues: usize,
        reporter: Option<Reporter>,
    ) -> Self {
        Self {
            name,
            config,
            msix,
            reporter,
            reported: AtomicU32::new(0),
            isr: Mutex::new(0),
            status: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
        }
    }

    /// The device status byte.
    pub(super) fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    pub(super) fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    /// Takes `vector` if it exists, else none: the driver reads back which (4.1.5.1.2).
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(usize::from(queue)).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst))
    }

    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(usize::from(queue)) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    /// The driver reads the ISR byte, which clears it and lowers the wire.
    pub(super) fn take_isr(&self) -> u8 {
        let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
        self.config.set_intx(false);
        std::mem::take(&mut *isr)
    }

    /// The ISR byte, not cleared.
    pub(super) fn isr(&self) -> u8 {
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over saved state; the wire's level is the configuration space's.
    pub(super) fn restore(&self, status: u8, isr: u8, config_vector: u16, queue_vectors: impl Iterator<Item = u16>) {
        self.status.store(status, Ordering::SeqCst);
        *self.isr.lock().unwrap_or_else(PoisonError::into_inner) = isr;
        self.set_config_vector(config_vector);
        for (queue, vector) in queue_vectors.enumerate() {
            self.set_queue_vector(queue as u16, vector);
        }
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        let _ = self.take_isr();
        self.reported.store(0, Ordering::Relaxed);
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        // With MSI-X on there is neither wire nor ISR, even when no vector is assigned.
        if self.msix.enabled() {
            self.msix.trigger(vector);
        } else {
            let mut isr = self.isr.lock().unwrap_or_else(PoisonError::into_inner);
            *isr |= isr_bit;
            self.config.set_intx(true);
        }
    }
}

impl Interrupt for Link {
    fn queue(&self, index: u16) {
        self.raise(self.queue_vector(index), ISR_QUEUE);
    }

    fn config(&self) {
        self.raise(self.config_vector(), ISR_CONFIG);
    }

    fn broken(&self, why: &dyn fmt::Display) {
        self.add_status(status::NEEDS_RESET);
        if self.status() & status::DRIVER_OK != 0 {
            self.config();
        }
        // Once per reset: a guest must not flood the user's terminal.
        if let Some(reporter) = &self.reporter
            && self.reported.fetch_add(1, Ordering::Relaxed) == 0
        {
            reporter(&format!(
                "{}: the guest's driver broke the rules: {why}; the device waits for a reset",
                self.name
            ));
        }
    }
}
