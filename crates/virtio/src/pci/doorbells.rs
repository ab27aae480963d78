//! What the notification address of each queue rings.
//!
//! A write to such an address reaches [`Doorbells::ring`] by way of the vCPU's thread, which left the guest for it. Where the engine
//! takes doorbells ([`Chips::doorbell`]) and the queue's has an event counter, the two are bound to each other as long as the BAR is
//! mapped and the device a bus master: then the write wakes the queue's thread and the vCPU stays in the guest.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};

use cpu::Chips;
use cpu::chips::Binding;
use machine::pci::PciConfig;

use super::{NOTIFY, NOTIFY_MULTIPLIER};
use crate::runner::Doorbell;

/// One queue's binding: the address, the counter's descriptor, and what ends it.
type Bound = (u64, i32, Binding);

#[derive(Default)]
struct Wiring {
    /// Where the guest has BAR 0.
    bar: Option<u64>,
    bound: Vec<Option<Bound>>,
}

/// The doorbells of one device.
pub(super) struct Doorbells {
    queues: RwLock<Vec<Option<Arc<dyn Doorbell>>>>,
    config: Arc<PciConfig>,
    chips: OnceLock<Arc<dyn Chips>>,
    wiring: Mutex<Wiring>,
}

impl Doorbells {
    pub(super) fn new(queues: usize, config: Arc<PciConfig>) -> Self {
        let bound = std::iter::repeat_with(|| None).take(queues).collect();
        let wiring = Mutex::new(Wiring { bar: None, bound });
        Self { queues: RwLock::new(vec![None; queues]), config, chips: OnceLock::new(), wiring }
    }

    /// How many queues there are.
    pub(super) fn len(&self) -> usize {
        self.queues.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Who takes doorbells, if somebody does.
    pub(super) fn use_chips(&self, chips: Arc<dyn Chips>) {
        let _ = self.chips.set(chips);
        self.rebind();
    }

    /// The driver wrote to the notification address of `queue`.
    pub(super) fn ring(&self, queue: usize) {
        let doorbell = {
            let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
            queues.get(queue).cloned().flatten()
        };
        // Without bus mastering a device may not reach memory.
        if let Some(doorbell) = doorbell
            && self.config.bus_master()
        {
            doorbell.ring();
        }
    }

    /// What `queue` rings from now on.
    pub(super) fn set(&self, queue: u16, doorbell: Option<Arc<dyn Doorbell>>) {
        {
            let mut queues = self.queues.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(place) = queues.get_mut(usize::from(queue)) {
                *place = doorbell;
            }
        }
        self.rebind();
    }

    /// The guest has moved BAR 0.
    pub(super) fn mapped(&self, bar: Option<u64>) {
        self.wiring.lock().unwrap_or_else(PoisonError::into_inner).bar = bar;
        self.rebind();
    }

    /// Makes the bindings what they should be now.
    pub(super) fn rebind(&self) {
        let Some(chips) = self.chips.get() else { return };
        let mut wiring = self.wiring.lock().unwrap_or_else(PoisonError::into_inner);
        let queues = self.queues.read().unwrap_or_else(PoisonError::into_inner);
        let Wiring { bar, bound } = &mut *wiring;
        let bar = bar.filter(|_| self.config.bus_master());
        for ((place, queue), doorbell) in bound.iter_mut().zip(0..).zip(queues.iter()) {
            let event = doorbell.as_ref().and_then(|doorbell| doorbell.event());
            let wanted =
                bar.zip(event).map(|(bar, event)| (bar + NOTIFY + queue * u64::from(NOTIFY_MULTIPLIER), event));
            let key = wanted.map(|(address, event)| (address, event.as_raw_fd()));
            if place.as_ref().map(|(address, event, _)| (*address, *event)) == key {
                continue;
            }
            // First the old one: two may not have one address.
            *place = None;
            *place = wanted.and_then(|(address, event)| {
                let binding = chips.doorbell(address, event)?;
                Some((address, event.as_raw_fd(), binding))
            });
        }
    }
}
