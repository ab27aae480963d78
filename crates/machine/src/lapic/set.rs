//! All local APICs, and how messages find them.

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use super::{Delivery, EoiListener, InterruptAcknowledge, Lapic, LapicState, Shared};
use crate::clock::TimerQueue;
use crate::irq::MsiSink;
use crate::layout;
use crate::state::StateError;

/// The ICR's destination shorthand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field counts.
    None,
    /// The sender.
    Itself,
    /// All.
    All,
    /// All but the sender.
    Others,
}

impl Shorthand {
    pub(super) const fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::Itself,
            2 => Self::All,
            _ => Self::Others,
        }
    }
}

/// An interrupt message on its way to local APICs: from an ICR, an IOAPIC entry or an MSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IcrMessage {
    /// Vector, or the page number of a start-up IPI.
    pub vector: u8,
    /// What it is.
    pub delivery: Delivery,
    /// Is the destination a logical one?
    pub logical: bool,
    /// Level-triggered: its EOI is broadcast.
    pub level: bool,
    /// Who, if not `destination`.
    pub shorthand: Shorthand,
    /// An APIC id, or a logical destination; all ones for everybody.
    pub destination: u32,
}

/// Finds the destinations of `message` and delivers it.
pub(super) fn send(shared: &Shared, message: IcrMessage, sender: Option<u32>) {
    let lapics = shared.lapics.read().unwrap_or_else(PoisonError::into_inner);
    if message.shorthand == Shorthand::None && !message.logical && message.destination != u32::MAX {
        // One only, whose number is its id: the others need not be asked.
        if let Some(lapic) = lapics.get(message.destination as usize).filter(|l| l.matches(message.destination, false))
        {
            lapic.deliver(message.delivery, message.vector, message.level);
        }
        return;
    }
    let is_destination = |lapic: &&Arc<Lapic>| match message.shorthand {
        Shorthand::None => lapic.matches(message.destination, message.logical),
        Shorthand::Itself => Some(lapic.id) == sender,
        Shorthand::All => true,
        Shorthand::Others => Some(lapic.id) != sender,
    };
    let destinations = lapics.iter().filter(is_destination);
    if message.delivery == Delivery::LowestPriority {
        if let Some(lapic) = destinations.min_by_key(|lapic| lapic.arbitration_priority()) {
            lapic.deliver(message.delivery, message.vector, message.level);
        }
        return;
    }
    for lapic in destinations {
        lapic.deliver(message.delivery, message.vector, message.level);
    }
}

/// Delivers to the local APIC whose id is the destination; `false` if there is none.
pub(super) fn send_to_one(shared: &Shared, message: IcrMessage) -> bool {
    let lapics = shared.lapics.read().unwrap_or_else(PoisonError::into_inner);
    let lapic = lapics.get(message.destination as usize);
    if let Some(lapic) = lapic {
        lapic.deliver(message.delivery, message.vector, message.level);
    }
    lapic.is_some()
}

/// The local APICs of all vCPUs.
pub struct Lapics {
    shared: Arc<Shared>,
}

impl fmt::Debug for Lapics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all()).finish()
    }
}

impl Drop for Lapics {
    /// They know each other, so they have to be told to let go.
    fn drop(&mut self) {
        self.shared.lapics.write().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Lapics {
    /// One for each of `count` vCPUs; ids from 0. At most 255.
    pub fn new(count: u8, queue: &Arc<TimerQueue>) -> Self {
        let shared = Arc::new(Shared { lapics: RwLock::default(), pic: OnceLock::new(), eoi: OnceLock::new() });
        let lapics = (0..u32::from(count)).map(|id| Lapic::new(id, queue, shared.clone())).collect();
        *shared.lapics.write().unwrap_or_else(PoisonError::into_inner) = lapics;
        Self { shared }
    }

    /// Connects the PIC (INTA cycles) and the IOAPIC (EOIs). Weak, because these hold us.
    pub fn connect(&self, pic: Weak<dyn InterruptAcknowledge>, eoi: Weak<dyn EoiListener>) {
        let _ = self.shared.pic.set(pic);
        let _ = self.shared.eoi.set(eoi);
    }

    /// All of them, by id.
    pub fn all(&self) -> Vec<Arc<Lapic>> {
        self.shared.lapics.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The one of vCPU `index`.
    pub fn get(&self, index: u32) -> Option<Arc<Lapic>> {
        self.shared.lapics.read().unwrap_or_else(PoisonError::into_inner).get(index as usize).cloned()
    }

    /// Sends a message from outside a local APIC.
    pub fn send_message(&self, message: IcrMessage) {
        send(&self.shared, message, None);
    }

    /// The PIC's output: wired to the bootstrap processor's LINT0.
    pub fn set_pic_output(&self, high: bool) {
        if let Some(lapic) = self.get(0) {
            lapic.set_pic_output(high);
        }
    }

    /// All back to power-on.
    pub fn reset(&self) {
        for lapic in self.all() {
            lapic.reset();
        }
    }

    /// The states, by id.
    pub fn save(&self) -> Vec<LapicState> {
        self.all().iter().map(|lapic| lapic.save()).collect()
    }

    /// Takes over states of as many local APICs.
    ///
    /// # Errors
    /// Their number differs, or one refuses.
    pub fn restore(&self, states: &[LapicState]) -> Result<(), StateError> {
        let lapics = self.all();
        if lapics.len() != states.len() {
            return Err(StateError::new("local APICs", format!("{} of them, here {}", states.len(), lapics.len())));
        }
        lapics.iter().zip(states).try_for_each(|(lapic, state)| lapic.restore(state))
    }
}

impl MsiSink for Lapics {
    /// SDM volume 3, 11.11: destination in address bits 19..=12, redirection hint 3, logical 2; data as an ICR.
    fn send(&self, address: u64, data: u32) {
        if address & !0xf_ffff != layout::LAPIC_BASE {
            return;
        }
        let destination = match (address >> 12 & 0xff) as u32 {
            0xff => u32::MAX,
            id => id,
        };
        self.send_message(IcrMessage {
            vector: data as u8,
            delivery: Delivery::from_bits(data >> 8),
            logical: address & 4 != 0,
            level: data & 1 << 15 != 0,
            shorthand: Shorthand::None,
            destination,
        });
    }
}

/// The bus as one vCPU sees it: the machine's, with its own local APIC's register page in front.
pub struct VcpuBus {
    bus: Arc<dyn cpu::Bus>,
    lapic: Arc<Lapic>,
}

impl fmt::Debug for VcpuBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuBus").field("vcpu", &self.lapic.id).finish_non_exhaustive()
    }
}

impl VcpuBus {
    /// `bus` for the vCPU that has `lapic`.
    pub fn new(bus: Arc<dyn cpu::Bus>, lapic: Arc<Lapic>) -> Self {
        Self { bus, lapic }
    }

    /// The offset into the register page, if `gpa` is there and the page is on.
    fn offset(&self, gpa: u64) -> Option<u64> {
        let offset = gpa.wrapping_sub(layout::LAPIC_BASE);
        (offset < layout::APIC_PAGE && self.lapic.mmio_enabled()).then_some(offset)
    }
}

impl cpu::Bus for VcpuBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.bus.pio_read(port, data);
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        self.bus.pio_write(port, data);
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        match self.offset(gpa) {
            Some(offset) => self.lapic.mmio_read(offset, data),
            None => self.bus.mmio_read(gpa, data),
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        match self.offset(gpa) {
            Some(offset) => self.lapic.mmio_write(offset, data),
            None => self.bus.mmio_write(gpa, data),
        }
    }
}
