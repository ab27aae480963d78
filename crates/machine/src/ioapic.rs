//! The IOAPIC (Intel 82093AA; version 0x20 with the EOI register), 24 pins.

use std::fmt;
use std::sync::{Arc, Mutex};

use cpu::chips::IoApicRegisters;
use serde::{Deserialize, Serialize};

use crate::bus::{MmioDevice, set_value, value};
use crate::lapic::{Delivery, EoiListener, IcrMessage, Lapics, Shorthand};
use crate::state::{StateError, lock};

/// Input pins.
pub const PINS: usize = 24;
/// Its APIC id, as the MADT says.
pub const ID: u8 = 0;

const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;
const LOGICAL: u64 = 1 << 11;
/// All bits of a redirection entry that a write sets: destination, mask, trigger, polarity, mode, delivery, vector.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Saved state of [`IoApic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    id: u32,
    select: u8,
    entries: Vec<u64>,
    /// Which wires are asserted, a bit a pin.
    levels: u32,
}

/// The chip.
pub struct IoApic {
    state: Mutex<IoApicState>,
    lapics: Arc<Lapics>,
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").field("state", &*lock(&self.state)).finish_non_exhaustive()
    }
}

impl IoApicState {
    /// The registers. A level-triggered pin without remote IRR and with its wire asserted interrupts anew when they are set.
    pub(crate) fn to_registers(&self) -> IoApicRegisters {
        let mut entries = [MASKED; PINS];
        let mut asserted = 0;
        for (pin, (to, from)) in entries.iter_mut().zip(&self.entries).enumerate() {
            *to = *from;
            if from & LEVEL != 0 {
                asserted |= self.levels & 1 << pin;
            }
        }
        IoApicRegisters { id: self.id, select: self.select, entries, asserted }
    }

    /// The state that has these registers, with the wires at `levels`.
    pub(crate) fn from_registers(registers: &IoApicRegisters, levels: u32) -> Self {
        let entry = |entry: &u64| {
            // Remote IRR is of level-triggered entries only.
            let remote_irr = if entry & LEVEL != 0 { REMOTE_IRR } else { 0 };
            entry & (WRITABLE | remote_irr)
        };
        Self {
            id: registers.id & 0x0f00_0000,
            select: registers.select,
            entries: registers.entries.iter().map(entry).collect(),
            levels: levels & ((1 << PINS) - 1),
        }
    }

    /// Is it a state that the chip can be in?
    pub(crate) fn check(&self) -> Result<(), StateError> {
        let entry_ok = |entry: &u64| entry & !(WRITABLE | REMOTE_IRR) == 0;
        if self.entries.len() != PINS || !self.entries.iter().all(entry_ok) || self.levels >> PINS != 0 {
            return Err(StateError::new("IOAPIC", format!("{:x?}", self.entries)));
        }
        Ok(())
    }

    /// The wires that are asserted, a bit a pin.
    #[cfg(test)]
    pub(crate) fn levels(&self) -> u32 {
        self.levels
    }
}

fn power_on() -> IoApicState {
    IoApicState { id: u32::from(ID) << 24, select: 0, entries: vec![MASKED; PINS], levels: 0 }
}

impl IoApic {
    /// All pins masked. Messages go to `lapics`.
    pub fn new(lapics: Arc<Lapics>) -> Self {
        Self { state: Mutex::new(power_on()), lapics }
    }

    /// Wire `pin` is asserted or not. "Asserted" is logical: ISA and PCI wires have different polarities, which their drivers
    /// program, and a machine without wires need not care about.
    pub fn set_level(&self, pin: u32, asserted: bool) {
        if pin as usize >= PINS {
            return;
        }
        let mut state = lock(&self.state);
        let was = state.levels & 1 << pin != 0;
        state.levels = if asserted { state.levels | 1 << pin } else { state.levels & !(1 << pin) };
        if asserted && !was {
            self.raise(&mut state, pin as usize);
        }
    }

    /// Sends the pin's message, unless it is masked or, being level-triggered, still in service.
    fn raise(&self, state: &mut IoApicState, pin: usize) {
        let Some(entry) = state.entries.get_mut(pin) else { return };
        if *entry & MASKED != 0 || *entry & LEVEL != 0 && *entry & REMOTE_IRR != 0 {
            return;
        }
        let delivery = Delivery::from_bits((*entry >> 8) as u32);
        // Only fixed and lowest-priority interrupts can be level-triggered.
        let level = *entry & LEVEL != 0 && matches!(delivery, Delivery::Fixed | Delivery::LowestPriority);
        if level {
            *entry |= REMOTE_IRR;
        }
        let destination = match (*entry >> 56) as u32 {
            0xff => u32::MAX,
            id => id,
        };
        self.lapics.send_message(IcrMessage {
            vector: *entry as u8,
            delivery,
            logical: *entry & LOGICAL != 0,
            level,
            shorthand: Shorthand::None,
            destination,
        });
    }

    fn eoi(&self, vector: u8) {
        let mut state = lock(&self.state);
        for pin in 0..PINS {
            let Some(entry) = state.entries.get_mut(pin) else { return };
            if *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR && *entry as u8 == vector {
                *entry &= !REMOTE_IRR;
                if state.levels & 1 << pin != 0 {
                    self.raise(&mut state, pin);
                }
            }
        }
    }

    fn read_register(&self) -> u32 {
        let state = lock(&self.state);
        match state.select {
            0 | 2 => state.id,
            1 => (PINS as u32 - 1) << 16 | 0x20,
            select => {
                let entry = select.checked_sub(0x10).and_then(|n| state.entries.get(usize::from(n / 2)));
                entry.map_or(0, |entry| (entry >> (32 * u32::from(select & 1))) as u32)
            }
        }
    }

    fn write_register(&self, value: u32) {
        let mut state = lock(&self.state);
        let select = state.select;
        if select == 0 {
            state.id = value & 0x0f00_0000;
        }
        let Some(pin) = select.checked_sub(0x10).map(|n| usize::from(n / 2)).filter(|pin| *pin < PINS) else { return };
        let half = 32 * u32::from(select & 1);
        let entry = &mut state.entries[pin];
        let (old, mask) = (*entry, WRITABLE & 0xffff_ffff << half);
        *entry = old & !mask | u64::from(value) << half & mask;
        if *entry & LEVEL == 0 {
            // Switching to edge and back is how Linux clears a stuck remote IRR.
            *entry &= !REMOTE_IRR;
        }
        // A level-triggered wire is looked at again when its entry changes; an edge that came while masked is lost.
        if *entry & LEVEL != 0 && state.levels & 1 << pin != 0 {
            self.raise(&mut state, pin);
        }
    }

    /// Power-on; wires keep their level.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = IoApicState { levels: state.levels, ..power_on() };
    }

    /// The state.
    pub fn save(&self) -> IoApicState {
        lock(&self.state).clone()
    }

    /// Takes over a state.
    ///
    /// # Errors
    /// It has another number of pins or bits that do not exist.
    pub fn restore(&self, state: &IoApicState) -> Result<(), StateError> {
        state.check()?;
        *lock(&self.state) = state.clone();
        Ok(())
    }
}

impl EoiListener for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        self.eoi(vector);
    }
}

impl MmioDevice for IoApic {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        set_value(
            data,
            match offset {
                0x00 => lock(&self.state).select.into(),
                0x10 => self.read_register().into(),
                _ => 0,
            },
        );
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        match offset {
            0x00 => lock(&self.state).select = value(data) as u8,
            0x10 if data.len() >= 4 => self.write_register(value(&data[..4]) as u32),
            0x40 => self.eoi(value(data) as u8),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::testing::manual;
    use crate::lapic::Lapic;
    use cpu::LocalApic;

    fn rig() -> (Arc<IoApic>, Arc<Lapic>) {
        let (_, queue) = manual();
        let lapics = Arc::new(Lapics::new(2, &queue));
        let ioapic = Arc::new(IoApic::new(lapics.clone()));
        struct NoPic;
        impl crate::lapic::InterruptAcknowledge for NoPic {
            fn acknowledge(&self) -> u8 {
                0
            }
        }
        let listener: Arc<dyn EoiListener> = ioapic.clone();
        let pic: std::sync::Weak<NoPic> = std::sync::Weak::new();
        lapics.connect(pic, Arc::downgrade(&listener));
        let lapic = lapics.get(0).unwrap();
        (ioapic, lapic)
    }

    fn write(ioapic: &IoApic, register: u8, value: u32) {
        ioapic.mmio_write(0, &[register]);
        ioapic.mmio_write(0x10, &value.to_le_bytes());
    }

    fn read(ioapic: &IoApic, register: u8) -> u32 {
        let mut data = [0; 4];
        ioapic.mmio_write(0, &[register]);
        ioapic.mmio_read(0x10, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn registers() {
        let (ioapic, _) = rig();
        assert_eq!(read(&ioapic, 1), 0x17_0020);
        assert_eq!(read(&ioapic, 0x10), 0x1_0000);
        write(&ioapic, 0x12, u32::MAX);
        assert_eq!(read(&ioapic, 0x12), 0x1_afff, "delivery status and remote IRR are read-only");
        write(&ioapic, 0x13, 0x0500_0000);
        assert_eq!(read(&ioapic, 0x13), 0x0500_0000);
        write(&ioapic, 0xff, 1);
        assert_eq!(read(&ioapic, 0xff), 0);
    }

    #[test]
    fn edges() {
        let (ioapic, lapic) = rig();
        ioapic.set_level(4, true);
        ioapic.set_level(4, false);
        write(&ioapic, 0x18, 0x24);
        assert_eq!(lapic.acknowledge(), None, "lost while masked");
        ioapic.set_level(4, true);
        ioapic.set_level(4, true);
        assert_eq!(lapic.acknowledge(), Some(0x24));
        lapic.eoi();
        assert_eq!(lapic.acknowledge(), None);
        ioapic.set_level(4, false);
        ioapic.set_level(4, true);
        assert_eq!(lapic.acknowledge(), Some(0x24));
        ioapic.set_level(99, true);
    }

    #[test]
    fn levels() {
        let (ioapic, lapic) = rig();
        ioapic.set_level(17, true);
        write(&ioapic, 0x10 + 34, 0xa041);
        assert_eq!(lapic.acknowledge(), Some(0x41), "the level was there already");
        assert_ne!(read(&ioapic, 0x10 + 34) & REMOTE_IRR as u32, 0);
        ioapic.set_level(17, false);
        ioapic.set_level(17, true);
        assert!(!lapic.status().interrupt);
        lapic.eoi();
        assert_eq!(lapic.acknowledge(), Some(0x41), "still high at EOI");
        ioapic.set_level(17, false);
        lapic.eoi();
        assert_eq!(lapic.acknowledge(), None);
        assert_eq!(read(&ioapic, 0x10 + 34) & REMOTE_IRR as u32, 0);
        ioapic.set_level(17, true);
        assert_eq!(lapic.acknowledge(), Some(0x41));
        ioapic.set_level(17, false);
        ioapic.mmio_write(0x40, &[0x41]);
        assert_eq!(read(&ioapic, 0x10 + 34) & REMOTE_IRR as u32, 0, "directed EOI");
    }

    #[test]
    fn state() {
        let (ioapic, _) = rig();
        write(&ioapic, 0x14, 0x30);
        ioapic.set_level(2, true);
        let state = ioapic.save();
        let (other, lapic) = rig();
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        other.set_level(2, true);
        assert_eq!(lapic.acknowledge(), None, "the wire was high before");
        let mut bad = state;
        bad.entries.pop();
        assert!(other.restore(&bad).is_err());
    }
}
