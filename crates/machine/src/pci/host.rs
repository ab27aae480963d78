//! The host bridge: bus 0 with its slots, reached through ECAM and through ports 0xcf8/0xcfc, and the devices' BARs on the bus.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use serde::{Deserialize, Serialize};

use super::{PciConfig, PciConfigState, PciDevice, PciIdentity};
use crate::bus::{IoBus, MmioDevice, PioDevice, set_value, value};
use crate::irq::{IrqLine, IrqSink, MsiSink};
use crate::layout;
use crate::state::{StateError, lock};

/// Slots on the bus; slot 0 is the host bridge itself.
pub const SLOTS: u8 = 32;

/// Why a device cannot be plugged in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PciAddError {
    /// All slots are taken.
    #[error("no PCI slot is left for {0}: at most 31 devices fit")]
    Slots(String),
    /// The name is taken.
    #[error("there are two PCI devices named {0}")]
    Name(String),
    /// No address space is left for the BARs.
    #[error("no PCI address space is left for {0}")]
    Space(String),
}

/// Saved state of one device with its configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciDeviceState {
    slot: u8,
    config: PciConfigState,
    device: Vec<u8>,
}

/// Saved state of [`PciHost`] and its devices, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHostState {
    address: u32,
    devices: BTreeMap<String, PciDeviceState>,
}

/// One BAR as the bus sees it.
struct BarWindow {
    device: Arc<dyn PciDevice>,
    bar: u8,
}

impl MmioDevice for BarWindow {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        if !self.device.config().msix_read(self.bar, offset, data) {
            self.device.bar_read(self.bar, offset, data);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        if !self.device.config().msix_write(self.bar, offset, data) {
            self.device.bar_write(self.bar, offset, data);
        }
    }
}

struct Window {
    bar: u8,
    device: Arc<dyn MmioDevice>,
    at: Option<u64>,
}

struct Slot {
    device: Arc<dyn PciDevice>,
    windows: Mutex<Vec<Window>>,
}

impl Slot {
    /// Makes the bus follow the BARs. The lock makes concurrent configuration writes agree on the last state.
    fn place_bars(&self, bus: &Weak<IoBus>) {
        let Some(bus) = bus.upgrade() else { return };
        let mut windows = lock(&self.windows);
        let mappings = self.device.config().mappings();
        let wanted = |bar| mappings.iter().find(|m| m.bar == bar && m.enabled).map(|m| m.base);
        // First take away all that moves, then put: two BARs may swap places.
        for window in windows.iter_mut() {
            if let Some(base) = window.at.take_if(|base| wanted(window.bar) != Some(*base)) {
                bus.remove_mmio(base, &window.device);
                self.device.bar_mapped(window.bar, None);
            }
        }
        for window in windows.iter_mut().filter(|window| window.at.is_none()) {
            if let Some(mapping) = mappings.iter().find(|m| m.bar == window.bar && m.enabled) {
                // A guest that puts a BAR over something else gets a BAR that does not answer.
                let name = self.device.name();
                if bus.add_mmio(name, mapping.base, mapping.size, window.device.clone()).is_ok() {
                    window.at = Some(mapping.base);
                    self.device.bar_mapped(window.bar, Some(mapping.base));
                }
            }
        }
    }
}

/// The host bridge itself, in slot 0.
struct Bridge(PciConfig);

impl PciDevice for Bridge {
    fn name(&self) -> &str {
        "pci-host"
    }
    fn config(&self) -> &PciConfig {
        &self.0
    }
    fn bar_read(&self, _: u8, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn bar_write(&self, _: u8, _: u64, _: &[u8]) {}
    fn reset(&self) {}
}

/// The root of PCI: add devices with [`PciHost::add`], then let the bus reach it with [`PciHost::connect`].
pub struct PciHost {
    /// Not held: the bus holds this.
    bus: Weak<IoBus>,
    irq: Arc<dyn IrqSink>,
    msi: Arc<dyn MsiSink>,
    slots: Mutex<Vec<Arc<Slot>>>,
    next_address: Mutex<u64>,
    /// CONFIG_ADDRESS, port 0xcf8.
    address: Mutex<u32>,
    /// Who answers byte accesses to port 0xcf9.
    reset_control: Arc<dyn PioDevice>,
}

impl fmt::Debug for PciHost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciHost").field("slots", &lock(&self.slots).len()).finish_non_exhaustive()
    }
}

impl PciHost {
    /// A bus with the host bridge in slot 0. `reset_control` is the chipset's reset register, port 0xcf9, in the midst of our ports.
    pub fn new(
        bus: Arc<IoBus>,
        irq: Arc<dyn IrqSink>,
        msi: Arc<dyn MsiSink>,
        reset_control: Arc<dyn PioDevice>,
    ) -> Arc<Self> {
        // The identity of a generic PCI Express host bridge: no kernel has quirks for it.
        let identity = PciIdentity { vendor: 0x1b36, device: 0x0008, class: 0x06, ..Default::default() };
        let bridge = Slot { device: Arc::new(Bridge(PciConfig::new(identity))), windows: Mutex::default() };
        Arc::new(Self {
            bus: Arc::downgrade(&bus),
            irq,
            msi,
            slots: Mutex::new(vec![Arc::new(bridge)]),
            next_address: Mutex::new(layout::PCI_HOLE_START),
            address: Mutex::new(0),
            reset_control,
        })
    }

    /// Registers ECAM and the configuration ports on the bus.
    ///
    /// # Errors
    /// Something else is there.
    pub fn connect(self: &Arc<Self>) -> Result<(), crate::bus::BusError> {
        let Some(bus) = self.bus.upgrade() else { return Ok(()) };
        bus.add_mmio("pci-ecam", layout::ECAM_START, layout::ECAM_SIZE, self.clone())?;
        bus.add_pio("pci-config", 0xcf8, 8, self.clone())
    }

    /// Global system interrupt of a slot's INTA#: slots are dealt out over IOAPIC pins 16 to 23.
    pub const fn slot_gsi(slot: u8) -> u32 {
        16 + (slot % 8) as u32
    }

    /// Plugs `device` into the next slot, gives its BARs addresses and turns them on. Returns the slot.
    ///
    /// # Errors
    /// No slot or address space is left, or the name is taken.
    pub fn add(&self, device: Arc<dyn PciDevice>) -> Result<u8, PciAddError> {
        let mut slots = lock(&self.slots);
        let name = device.name().to_owned();
        if slots.iter().any(|slot| slot.device.name() == name) {
            return Err(PciAddError::Name(name));
        }
        let number = u8::try_from(slots.len()).ok().filter(|number| *number < SLOTS);
        let Some(number) = number else { return Err(PciAddError::Slots(name)) };
        let config = device.config();
        for mapping in config.mappings() {
            let base = self.allocate(mapping.size).ok_or_else(|| PciAddError::Space(name.clone()))?;
            config.assign(mapping.bar, base);
        }
        config.attach(self.msi.clone(), IrqLine::new(self.irq.clone(), Self::slot_gsi(number)));
        let window = |bar| Window { bar, device: Arc::new(BarWindow { device: device.clone(), bar }), at: None };
        let windows = config.mappings().iter().map(|mapping| window(mapping.bar)).collect();
        let slot = Arc::new(Slot { device, windows: Mutex::new(windows) });
        slot.place_bars(&self.bus);
        slots.push(slot);
        Ok(number)
    }

    /// A free, aligned piece of the hole, of at least a page.
    fn allocate(&self, size: u64) -> Option<u64> {
        let size = size.max(0x1000);
        let mut next = lock(&self.next_address);
        let mut base = next.checked_next_multiple_of(size)?;
        let ecam_end = layout::ECAM_START + layout::ECAM_SIZE;
        if base < ecam_end && base.checked_add(size)? > layout::ECAM_START {
            base = ecam_end.checked_next_multiple_of(size)?;
        }
        let end = base.checked_add(size).filter(|end| *end <= layout::PCI_HOLE_END)?;
        *next = end;
        Some(base)
    }

    fn slot(&self, number: u64) -> Option<Arc<Slot>> {
        lock(&self.slots).get(usize::try_from(number).ok()?).cloned()
    }

    /// The devices in the order of their slots, the host bridge first.
    pub fn devices(&self) -> Vec<Arc<dyn PciDevice>> {
        lock(&self.slots).iter().map(|slot| slot.device.clone()).collect()
    }

    /// `offset` is an ECAM offset: bus 27..=20, device 19..=15, function 14..=12, register 11..=0.
    fn config_read(&self, offset: u64, data: &mut [u8]) {
        let register = (offset & 0xfff) as u16;
        match self.slot(offset >> 15).filter(|_| offset & 0x7000 == 0) {
            Some(_) if register >= 256 => data.fill(0),
            Some(slot) => slot.device.config_read(register, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, offset: u64, data: &[u8]) {
        let register = (offset & 0xfff) as u16;
        if let Some(slot) = self.slot(offset >> 15).filter(|_| offset & 0x7000 == 0 && register < 256) {
            slot.device.config_write(register, data);
            slot.place_bars(&self.bus);
        }
    }

    /// The ECAM offset that CONFIG_ADDRESS and the byte of CONFIG_DATA name, if the enable bit is set.
    fn legacy_target(&self, byte: u16) -> Option<u64> {
        let address = *lock(&self.address);
        let target = u64::from(address & 0x00ff_ff00) << 4 | u64::from(address & 0xfc) | u64::from(byte);
        (address & 1 << 31 != 0).then_some(target)
    }

    /// Power-on state of all devices, then firmware's work: each BAR back at the address it had first.
    pub fn reset(&self) {
        *lock(&self.address) = 0;
        *lock(&self.next_address) = layout::PCI_HOLE_START;
        let slots = lock(&self.slots).clone();
        for slot in slots {
            slot.device.reset();
            slot.device.config().reset();
            for mapping in slot.device.config().mappings() {
                if let Some(base) = self.allocate(mapping.size) {
                    slot.device.config().assign(mapping.bar, base);
                }
            }
            slot.place_bars(&self.bus);
        }
    }

    /// The state of the bridge and all devices.
    pub fn save(&self) -> PciHostState {
        let slots = lock(&self.slots).clone();
        let state = |(number, slot): (usize, &Arc<Slot>)| {
            let device = &slot.device;
            let state = PciDeviceState { slot: number as u8, config: device.config().save(), device: device.save() };
            (device.name().to_owned(), state)
        };
        PciHostState { address: *lock(&self.address), devices: slots.iter().enumerate().map(state).collect() }
    }

    /// Takes over a state of a machine with the same devices in the same slots.
    ///
    /// # Errors
    /// Another set of devices, or one of them refuses its state; the machine must not run then.
    pub fn restore(&self, state: &PciHostState) -> Result<(), StateError> {
        let slots = lock(&self.slots).clone();
        if state.devices.len() != slots.len() {
            return Err(StateError::new("PCI", format!("{} devices, here {}", state.devices.len(), slots.len())));
        }
        let mut pairs = Vec::new();
        for (number, slot) in slots.iter().enumerate() {
            let name = slot.device.name();
            let saved = state.devices.get(name).ok_or_else(|| StateError::new(name, "it is missing"))?;
            if usize::from(saved.slot) != number {
                return Err(StateError::new(name, format!("it is in slot {}, here in {number}", saved.slot)));
            }
            slot.device.config().check(&saved.config).map_err(|e| StateError::new(name, e.why))?;
            pairs.push((slot, saved));
        }
        for (slot, saved) in pairs {
            slot.device.config().restore(&saved.config);
            slot.device.restore(&saved.device)?;
            slot.place_bars(&self.bus);
        }
        *lock(&self.address) = state.address;
        Ok(())
    }
}

impl MmioDevice for PciHost {
    fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        // A quadword is not defined for configuration space: it is two dwords.
        for (index, part) in data.chunks_mut(4).enumerate() {
            self.config_read(offset + 4 * index as u64, part);
        }
    }

    fn mmio_write(&self, offset: u64, data: &[u8]) {
        for (index, part) in data.chunks(4).enumerate() {
            self.config_write(offset + 4 * index as u64, part);
        }
    }
}

impl PioDevice for PciHost {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => set_value(data, (*lock(&self.address)).into()),
            (1, 1) => self.reset_control.pio_read(0, data),
            (4.., _) => match self.legacy_target(offset - 4) {
                Some(target) => self.config_read(target, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        match (offset, data.len()) {
            (0, 4) => *lock(&self.address) = value(data) as u32 & 0x80ff_fffc,
            (1, 1) => self.reset_control.pio_write(0, data),
            (4.., _) => {
                if let Some(target) = self.legacy_target(offset - 4) {
                    self.config_write(target, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::Recorder;
    use crate::pci::{BarKind, Msix};
    use cpu::Bus;

    struct Nothing;
    impl PioDevice for Nothing {
        fn pio_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0x55);
        }
        fn pio_write(&self, _: u16, _: &[u8]) {}
    }

    struct Scratch {
        name: String,
        config: PciConfig,
        last: Mutex<u64>,
    }

    impl PciDevice for Scratch {
        fn name(&self) -> &str {
            &self.name
        }
        fn config(&self) -> &PciConfig {
            &self.config
        }
        fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
            set_value(data, u64::from(bar) << 16 | offset);
        }
        fn bar_write(&self, _: u8, offset: u64, _: &[u8]) {
            *self.last.lock().unwrap() = offset;
        }
        fn reset(&self) {
            *self.last.lock().unwrap() = 0;
        }
        fn save(&self) -> Vec<u8> {
            vec![*self.last.lock().unwrap() as u8]
        }
        fn restore(&self, state: &[u8]) -> Result<(), StateError> {
            let [last] = state else { return Err(StateError::new(&self.name, "length")) };
            *self.last.lock().unwrap() = (*last).into();
            Ok(())
        }
    }

    fn scratch(name: &str) -> Arc<Scratch> {
        let mut config = PciConfig::new(PciIdentity { vendor: 0x1234, device: 0x5678, ..Default::default() });
        config.add_bar(0, BarKind::Memory64, 0x4000).unwrap();
        config.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
        config.add_msix(Arc::new(Msix::new(2)), (2, 0), (2, 0x800)).unwrap();
        Arc::new(Scratch { name: name.into(), config, last: Mutex::default() })
    }

    fn host() -> (Arc<IoBus>, Arc<PciHost>, Arc<Recorder>) {
        let bus = Arc::new(IoBus::new());
        let recorder = Arc::new(Recorder::default());
        let host = PciHost::new(bus.clone(), recorder.clone(), recorder.clone(), Arc::new(Nothing));
        host.connect().unwrap();
        (bus, host, recorder)
    }

    fn ecam(slot: u64, register: u64) -> u64 {
        layout::ECAM_START + (slot << 15) + register
    }

    fn read32(bus: &IoBus, gpa: u64) -> u32 {
        let mut data = [0; 4];
        bus.mmio_read(gpa, &mut data);
        u32::from_le_bytes(data)
    }

    fn legacy(bus: &IoBus, slot: u32, register: u32) -> u32 {
        bus.pio_write(0xcf8, &(1 << 31 | slot << 11 | register).to_le_bytes());
        let mut data = [0; 4];
        bus.pio_read(0xcfc, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn both_ways_see_the_same() {
        let (bus, host, _) = host();
        assert_eq!(host.add(scratch("a")), Ok(1));
        assert_eq!(host.add(scratch("a")), Err(PciAddError::Name("a".into())));
        for slot in 0..3 {
            for register in (0..256).step_by(4) {
                assert_eq!(read32(&bus, ecam(slot, register)), legacy(&bus, slot as u32, register as u32));
            }
        }
        assert_eq!(read32(&bus, ecam(1, 0)), 0x5678_1234);
        assert_eq!(read32(&bus, ecam(2, 0)), u32::MAX);
        assert_eq!(read32(&bus, ecam(1, 0x1000)), u32::MAX, "function 1");
        assert_eq!(read32(&bus, ecam(1, 0x100)), 0, "no extended capabilities");
        let mut byte = [0; 1];
        bus.pio_read(0xcf9, &mut byte);
        assert_eq!(byte, [0x55]);
        let mut half = [0; 2];
        legacy(&bus, 1, 0);
        bus.pio_read(0xcfe, &mut half);
        assert_eq!(half, [0x78, 0x56]);
        bus.pio_write(0xcf8, &[0; 4]);
        bus.pio_read(0xcfe, &mut half);
        assert_eq!(half, [0xff; 2]);
    }

    #[test]
    fn bars_move() {
        let (bus, host, recorder) = host();
        let device = scratch("a");
        host.add(device.clone()).unwrap();
        let base = u64::from(read32(&bus, ecam(1, 0x10)) & !0xf);
        assert!(base >= layout::PCI_HOLE_START);
        assert_eq!(read32(&bus, base + 0x123), 0x123);
        // As Linux sizes: decoding off, all ones, back.
        bus.mmio_write(ecam(1, 4), &[0, 0]);
        assert_eq!(read32(&bus, base), u32::MAX);
        bus.mmio_write(ecam(1, 0x10), &[0xff; 4]);
        assert_eq!(read32(&bus, ecam(1, 0x10)), 0xffff_c004);
        bus.mmio_write(ecam(1, 0x10), &0xd123_4000_u32.to_le_bytes());
        bus.mmio_write(ecam(1, 0x14), &1_u32.to_le_bytes());
        bus.mmio_write(ecam(1, 4), &[6, 0]);
        assert_eq!(read32(&bus, 0x1_d123_4008), 8);
        // MSI-X in the other BAR goes past the device.
        let table = u64::from(read32(&bus, ecam(1, 0x18)));
        bus.mmio_write(table, &0xfee0_0000_u32.to_le_bytes());
        bus.mmio_write(table + 8, &0x31_u32.to_le_bytes());
        bus.mmio_write(table + 12, &0_u32.to_le_bytes());
        bus.mmio_write(ecam(1, 0x42), &[0, 0x80]);
        device.config.msix().unwrap().trigger(0);
        assert_eq!(*recorder.messages.lock().unwrap(), [(0xfee0_0000, 0x31)]);
        assert_eq!(read32(&bus, table + 0x900), 2 << 16 | 0x900);
        host.reset();
        assert_eq!(u64::from(read32(&bus, ecam(1, 0x10)) & !0xf), base);
        assert_eq!(read32(&bus, base + 4), 4);
    }

    #[test]
    fn bar_over_something_else_does_not_answer() {
        let (bus, host, _) = host();
        host.add(scratch("a")).unwrap();
        bus.mmio_write(ecam(1, 0x18), &(layout::ECAM_START as u32).to_le_bytes());
        assert_eq!(read32(&bus, ecam(0, 0)), 0x0008_1b36);
        bus.mmio_write(ecam(1, 0x18), &0xd200_0000_u32.to_le_bytes());
        assert_eq!(read32(&bus, 0xd200_0900), 2 << 16 | 0x900);
    }

    #[test]
    fn slots_and_space_end() {
        let (_, host, _) = host();
        for number in 1..SLOTS {
            assert_eq!(host.add(scratch(&number.to_string())), Ok(number));
        }
        assert!(matches!(host.add(scratch("x")), Err(PciAddError::Slots(_))));
        let (_, host, _) = self::host();
        let big = |name: &str| {
            let mut config = PciConfig::new(PciIdentity::default());
            config.add_bar(0, BarKind::Memory64, 1 << 29).unwrap();
            Arc::new(Scratch { name: name.into(), config, last: Mutex::default() })
        };
        assert_eq!(host.add(big("a")), Ok(1));
        assert!(matches!(host.add(big("b")), Err(PciAddError::Space(_))), "0xe0000000 is ECAM, the rest too small");
    }

    #[test]
    fn state() {
        let (bus, host, _) = host();
        let device = scratch("a");
        host.add(device.clone()).unwrap();
        bus.mmio_write(ecam(1, 0x18), &0xd200_0000_u32.to_le_bytes());
        bus.mmio_write(0xd200_0c00, &[0]);
        let state = host.save();
        let (other_bus, other, _) = self::host();
        other.add(scratch("a")).unwrap();
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        assert_eq!(read32(&other_bus, 0xd200_0900), 2 << 16 | 0x900);
        other.add(scratch("b")).unwrap();
        assert!(other.restore(&state).is_err());
        let mut bad = state;
        bad.devices.get_mut("a").unwrap().device.clear();
        assert!(host.restore(&bad).is_err());
    }
}
