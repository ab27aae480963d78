//! Type 0 configuration space.

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use serde::{Deserialize, Serialize};

use super::msix::{Msix, MsixState};
use crate::bus::{set_value, value};
use crate::irq::{IrqLine, MsiSink};
use crate::state::{StateError, lock};

/// Capability identifiers (PCI Local Bus 3.0, appendix H).
pub mod capability {
    /// Vendor specific: virtio describes its structures with these.
    pub const VENDOR: u8 = 0x09;
    /// MSI-X.
    pub const MSIX: u8 = 0x11;
}

const SIZE: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// Writable bits: I/O, memory, bus master, parity response, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
const STATUS_INTX: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a device says it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciIdentity {
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Base class.
    pub class: u8,
    /// Subclass.
    pub subclass: u8,
    /// Programming interface.
    pub interface: u8,
    /// Subsystem vendor id.
    pub subsystem_vendor: u16,
    /// Subsystem id.
    pub subsystem: u16,
}

/// Kind of a base address register; all are memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// 32-bit, not prefetchable.
    Memory32,
    /// 64-bit (takes two registers), not prefetchable.
    Memory64,
    /// 64-bit (takes two registers), prefetchable.
    Prefetchable64,
}

/// Where a BAR is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarMapping {
    /// Register number, 0 to 5.
    pub bar: u8,
    /// Guest-physical address.
    pub base: u64,
    /// Bytes; a power of two.
    pub size: u64,
    /// Does the device answer there (memory decoding on and an address set)?
    pub enabled: bool,
}

/// A configuration space that cannot be built: an error in a device's source.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Register number, size or overlap of a BAR is wrong.
    #[error("BAR {bar} with {size:#x} bytes is not possible")]
    Bar {
        /// The register.
        bar: u8,
        /// The size asked for.
        size: u64,
    },
    /// Capabilities fill the 192 bytes there are.
    #[error("no room for another capability")]
    Full,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    index: u8,
    kind: BarKind,
    size: u64,
}

struct Registers {
    bytes: [u8; SIZE],
    /// Bits the guest can write.
    writable: [u8; SIZE],
    intx: bool,
}

/// Saved state of [`PciConfig`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciConfigState {
    bytes: Vec<u8>,
    intx: bool,
    msix: Option<MsixState>,
}

struct MsixPlace {
    msix: Arc<Msix>,
    control: usize,
    table: (u8, u64),
    pba: (u8, u64),
}

/// The configuration space of one function: registers with their writable bits, BARs with sizing, the capability list, MSI-X.
pub struct PciConfig {
    registers: Mutex<Registers>,
    initial: [u8; SIZE],
    bars: Vec<Bar>,
    next_capability: usize,
    last_link: usize,
    msix: Option<MsixPlace>,
    intx_line: OnceLock<IrqLine>,
}

impl fmt::Debug for PciConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciConfig").field("bars", &self.bars).finish_non_exhaustive()
    }
}

impl PciConfig {
    /// A function without BARs and capabilities.
    pub fn new(identity: PciIdentity) -> Self {
        let mut bytes = [0; SIZE];
        set_value(&mut bytes[0..2], identity.vendor.into());
        set_value(&mut bytes[2..4], identity.device.into());
        bytes[8] = identity.revision;
        bytes[9] = identity.interface;
        bytes[10] = identity.subclass;
        bytes[11] = identity.class;
        set_value(&mut bytes[0x2c..0x2e], identity.subsystem_vendor.into());
        set_value(&mut bytes[0x2e..0x30], identity.subsystem.into());
        let mut writable = [0; SIZE];
        set_value(&mut writable[COMMAND..COMMAND + 2], COMMAND_WRITABLE.into());
        writable[0x0c] = 0xff;
        writable[INTERRUPT_LINE] = 0xff;
        Self {
            registers: Mutex::new(Registers { bytes, writable, intx: false }),
            initial: bytes,
            bars: Vec::new(),
            next_capability: FIRST_CAPABILITY,
            last_link: CAPABILITIES,
            msix: None,
            intx_line: OnceLock::new(),
        }
    }

    fn set_initial(&mut self, at: usize, bytes: &[u8], writable: &[u8]) {
        let registers = self.registers.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (index, byte) in bytes.iter().enumerate() {
            registers.bytes[at + index] = *byte;
            registers.writable[at + index] = writable.get(index).copied().unwrap_or(0);
        }
        self.initial = registers.bytes;
    }

    /// Adds BAR number `bar` (0 to 5; a 64-bit BAR also takes the next) of `size` bytes: a power of two from 16 bytes to 1 GiB. Below 4096
    /// bytes the guest's kernel may put two on one page: use at least a page.
    ///
    /// # Errors
    /// The BAR is impossible or taken.
    pub fn add_bar(&mut self, bar: u8, kind: BarKind, size: u64) -> Result<(), ConfigError> {
        let registers = |kind: BarKind| if kind == BarKind::Memory32 { 1 } else { 2 };
        let end = bar.saturating_add(registers(kind));
        let taken = self.bars.iter().any(|b| b.index < end && bar < b.index + registers(b.kind));
        if end > 6 || taken || !size.is_power_of_two() || !(16..=1 << 30).contains(&size) {
            return Err(ConfigError::Bar { bar, size });
        }
        let flags: u64 = match kind {
            BarKind::Memory32 => 0,
            BarKind::Memory64 => 0x4,
            BarKind::Prefetchable64 => 0xc,
        };
        let len = usize::from(registers(kind)) * 4;
        self.set_initial(BAR0 + usize::from(bar) * 4, &flags.to_le_bytes()[..len], &(!(size - 1)).to_le_bytes()[..len]);
        self.bars.push(Bar { index: bar, kind, size });
        Ok(())
    }

    /// Adds a capability: `id`, then the link to the next, then `body`. `writable` has a set bit for each bit of the body that the
    /// guest can write; it may be shorter than the body. Returns the capability's offset in configuration space.
    ///
    /// # Errors
    /// There is no room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u8, ConfigError> {
        let at = self.next_capability;
        let end = at.checked_add(body.len() + 2).filter(|end| *end <= SIZE).ok_or(ConfigError::Full)?;
        self.set_initial(at, &[id, 0], &[]);
        self.set_initial(at + 2, body, writable);
        self.set_initial(self.last_link, &[at as u8], &[]);
        self.set_initial(STATUS, &[STATUS_CAPABILITIES], &[]);
        self.last_link = at + 1;
        self.next_capability = end.next_multiple_of(4);
        Ok(at as u8)
    }

    /// Adds registers of the device's own, from 0x40 on and not beside capabilities: their values after reset, and a set bit for each bit that
    /// the guest can write.
    ///
    /// # Errors
    /// They are not behind the header, or capabilities are in the way.
    pub fn add_registers(&mut self, at: u16, bytes: &[u8], writable: &[u8]) -> Result<(), ConfigError> {
        let at = usize::from(at);
        if at < self.next_capability || at.checked_add(bytes.len()).is_none_or(|end| end > SIZE) {
            return Err(ConfigError::Full);
        }
        self.set_initial(at, bytes, writable);
        Ok(())
    }

    /// Adds the MSI-X capability: the table at byte `table.1` of BAR `table.0`, the pending bits at `pba`. Both offsets are multiples of 8;
    /// the BARs have been added and are big enough: 16 bytes a vector, and 8 bytes for each 64 vectors.
    ///
    /// # Errors
    /// There is no room for the capability, or none in the BAR.
    pub fn add_msix(&mut self, msix: Arc<Msix>, table: (u8, u64), pba: (u8, u64)) -> Result<(), ConfigError> {
        for ((bar, offset), len) in [(table, msix.table_len()), (pba, msix.pba_len())] {
            let size = self.bars.iter().find(|b| b.index == bar).map_or(0, |b| b.size);
            if offset % 8 != 0 || offset.checked_add(len).is_none_or(|end| end > size) {
                return Err(ConfigError::Bar { bar, size: offset.saturating_add(len) });
            }
        }
        let mut body = [0; 10];
        set_value(&mut body[0..2], u64::from(msix.vectors() - 1));
        set_value(&mut body[2..6], table.1 | u64::from(table.0));
        set_value(&mut body[6..10], pba.1 | u64::from(pba.0));
        let at = self.add_capability(capability::MSIX, &body, &[0x00, 0xc0])?;
        self.msix = Some(MsixPlace { msix, control: usize::from(at) + 2, table, pba });
        Ok(())
    }

    /// Says that the device uses the interrupt pin INTA# while MSI-X is off. Call it in the constructor.
    pub fn use_intx(&mut self) {
        self.set_initial(INTERRUPT_PIN, &[1], &[]);
    }

    /// The MSI-X function, if there is one.
    pub fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref().map(|place| &place.msix)
    }

    /// Drives the interrupt wire INTA#. It reaches the interrupt controller unless the guest disabled it or has MSI-X on.
    pub fn set_intx(&self, asserted: bool) {
        let mut registers = lock(&self.registers);
        registers.intx = asserted;
        self.update_intx(&mut registers);
    }

    fn update_intx(&self, registers: &mut Registers) {
        let status = &mut registers.bytes[STATUS];
        *status = if registers.intx { *status | STATUS_INTX } else { *status & !STATUS_INTX };
        let on = registers.intx
            && value(&registers.bytes[COMMAND..COMMAND + 2]) as u16 & COMMAND_INTX_DISABLE == 0
            && self.msix.as_ref().is_none_or(|place| registers.bytes[place.control + 1] & 0x80 == 0);
        if let Some(line) = self.intx_line.get() {
            line.set(on);
        }
    }

    /// The device has been put in a slot: where its interrupts go.
    pub(super) fn attach(&self, sink: Arc<dyn MsiSink>, line: IrqLine) {
        if let Some(place) = &self.msix {
            place.msix.connect(sink);
        }
        let mut registers = lock(&self.registers);
        if registers.bytes[INTERRUPT_PIN] != 0 {
            registers.bytes[INTERRUPT_LINE] = line.gsi() as u8;
        }
        let _ = self.intx_line.set(line);
    }

    /// What firmware does: sets a BAR's address and turns memory decoding on.
    pub(super) fn assign(&self, bar: u8, base: u64) {
        let Some(kind) = self.bars.iter().find(|b| b.index == bar).map(|b| b.kind) else { return };
        let at = (BAR0 + usize::from(bar) * 4) as u16;
        self.write(at, &(base as u32).to_le_bytes());
        if kind != BarKind::Memory32 {
            self.write(at + 4, &((base >> 32) as u32).to_le_bytes());
        }
        let mut command = [0; 2];
        self.read(COMMAND as u16, &mut command);
        self.write(COMMAND as u16, &(value(&command) as u16 | COMMAND_MEMORY).to_le_bytes());
    }

    /// Where the BARs are now.
    pub fn mappings(&self) -> Vec<BarMapping> {
        let registers = lock(&self.registers);
        let decode = value(&registers.bytes[COMMAND..COMMAND + 2]) as u16 & COMMAND_MEMORY != 0;
        let mapping = |bar: &Bar| {
            let at = BAR0 + usize::from(bar.index) * 4;
            let len = if bar.kind == BarKind::Memory32 { 4 } else { 8 };
            let base = value(&registers.bytes[at..at + len]) & !0xf;
            BarMapping { bar: bar.index, base, size: bar.size, enabled: decode && base != 0 }
        };
        self.bars.iter().map(mapping).collect()
    }

    /// A read at `offset`; bytes past 255 read as 0.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let registers = lock(&self.registers);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = registers.bytes.get(usize::from(offset) + index).copied().unwrap_or(0);
        }
    }

    /// A write at `offset`, with all its effects on MSI-X and the interrupt wire. Moving BARs on the bus is the host bridge's.
    pub fn write(&self, offset: u16, data: &[u8]) {
        let mut registers = lock(&self.registers);
        for (index, byte) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if at < SIZE {
                let writable = registers.writable[at];
                registers.bytes[at] = registers.bytes[at] & !writable | byte & writable;
            }
        }
        let command = value(&registers.bytes[COMMAND..COMMAND + 2]) as u16;
        self.update_intx(&mut registers);
        if let Some(place) = &self.msix {
            place.msix.set_bus_master(command & COMMAND_MASTER != 0);
            place.msix.set_control(value(&registers.bytes[place.control..place.control + 2]) as u16);
        }
    }

    /// May the device reach guest memory? Clear after reset; the guest's driver sets it.
    pub fn bus_master(&self) -> bool {
        value(&lock(&self.registers).bytes[COMMAND..COMMAND + 2]) as u16 & COMMAND_MASTER != 0
    }

    /// Answers a BAR access that falls on the MSI-X table or pending bits; `false` if it does not.
    pub(super) fn msix_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        let Some(place) = &self.msix else { return false };
        if bar == place.table.0 && (place.table.1..place.table.1 + place.msix.table_len()).contains(&offset) {
            place.msix.table_read(offset - place.table.1, data);
        } else if bar == place.pba.0 && (place.pba.1..place.pba.1 + place.msix.pba_len()).contains(&offset) {
            place.msix.pba_read(offset - place.pba.1, data);
        } else {
            return false;
        }
        true
    }

    /// As [`PciConfig::msix_read`]; the pending bits ignore writes.
    pub(super) fn msix_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let Some(place) = &self.msix else { return false };
        if bar == place.table.0 && (place.table.1..place.table.1 + place.msix.table_len()).contains(&offset) {
            place.msix.table_write(offset - place.table.1, data);
            return true;
        }
        bar == place.pba.0 && (place.pba.1..place.pba.1 + place.msix.pba_len()).contains(&offset)
    }

    /// Back to the state after power-on; BARs are unassigned.
    pub(super) fn reset(&self) {
        let mut registers = lock(&self.registers);
        let line = registers.bytes[INTERRUPT_LINE];
        registers.bytes = self.initial;
        registers.bytes[INTERRUPT_LINE] = line;
        registers.intx = false;
        self.update_intx(&mut registers);
        if let Some(place) = &self.msix {
            place.msix.reset();
        }
    }

    pub(super) fn save(&self) -> PciConfigState {
        let registers = lock(&self.registers);
        let msix = self.msix.as_ref().map(|place| place.msix.save());
        PciConfigState { bytes: registers.bytes.to_vec(), intx: registers.intx, msix }
    }

    /// Would [`PciConfig::restore`] take this state? All bits that the guest cannot change must be as they are here.
    pub(super) fn check(&self, state: &PciConfigState) -> Result<(), StateError> {
        let error = |why: String| Err(StateError::new("PCI configuration space", why));
        let registers = lock(&self.registers);
        if state.bytes.len() != SIZE {
            return error(format!("{} bytes", state.bytes.len()));
        }
        for (at, byte) in state.bytes.iter().enumerate() {
            let fixed = !registers.writable[at] & if at == STATUS { !STATUS_INTX } else { 0xff };
            if (byte ^ registers.bytes[at]) & fixed != 0 {
                return error(format!("register {at:#x} is {byte:#x}, here {:#x}", registers.bytes[at]));
            }
        }
        match (&self.msix, &state.msix) {
            (Some(place), Some(state)) => place.msix.check(state),
            (None, None) => Ok(()),
            _ => error("MSI-X is there on one side only".into()),
        }
    }

    /// Takes over a state that has passed [`PciConfig::check`].
    pub(super) fn restore(&self, state: &PciConfigState) {
        let mut registers = lock(&self.registers);
        registers.bytes.copy_from_slice(&state.bytes);
        registers.intx = state.intx;
        self.update_intx(&mut registers);
        let master = value(&registers.bytes[COMMAND..COMMAND + 2]) as u16 & COMMAND_MASTER != 0;
        if let (Some(place), Some(state)) = (&self.msix, &state.msix) {
            place.msix.restore(state, master);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::Recorder;

    fn config() -> PciConfig {
        let mut config = PciConfig::new(PciIdentity { vendor: 0x1af4, device: 0x1042, class: 1, ..Default::default() });
        config.add_bar(0, BarKind::Memory64, 0x4000).unwrap();
        config.add_bar(2, BarKind::Memory32, 0x1000).unwrap();
        config.add_capability(capability::VENDOR, &[6, 1, 2, 3], &[]).unwrap();
        config.add_msix(Arc::new(Msix::new(2)), (2, 0), (2, 0x800)).unwrap();
        config.use_intx();
        config
    }

    fn read32(config: &PciConfig, at: u16) -> u32 {
        let mut data = [0; 4];
        config.read(at, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn sizing() {
        let config = config();
        assert_eq!(read32(&config, 0), 0x1042_1af4);
        config.write(0, &[0; 4]);
        assert_eq!(read32(&config, 0), 0x1042_1af4);
        for at in [0x10, 0x14, 0x18, 0x1c, 0x30] {
            config.write(at, &[0xff; 4]);
        }
        assert_eq!(read32(&config, 0x10), 0xffff_c004);
        assert_eq!(read32(&config, 0x14), 0xffff_ffff);
        assert_eq!(read32(&config, 0x18), 0xffff_f000);
        assert_eq!((read32(&config, 0x1c), read32(&config, 0x30)), (0, 0));
        config.assign(0, 0xd000_0000);
        config.assign(2, 0xd001_0000);
        let expected = |bar, base, size| BarMapping { bar, base, size, enabled: true };
        assert_eq!(config.mappings(), [expected(0, 0xd000_0000, 0x4000), expected(2, 0xd001_0000, 0x1000)]);
    }

    #[test]
    fn impossible_bars() {
        let mut config = config();
        for (bar, kind, size) in [
            (1, BarKind::Memory32, 0x1000),
            (5, BarKind::Memory64, 0x1000),
            (3, BarKind::Memory32, 0x1001),
            (3, BarKind::Memory32, 8),
        ] {
            assert!(config.add_bar(bar, kind, size).is_err());
        }
        assert!(config.add_msix(Arc::new(Msix::new(2)), (0, 0x3ff8), (0, 0)).is_err());
        assert_eq!(config.add_capability(9, &[0; 200], &[]), Err(ConfigError::Full));
        for at in [0x3c, 0x40, 0xfe] {
            assert_eq!(config.add_registers(at, &[0; 4], &[]), Err(ConfigError::Full));
        }
    }

    #[test]
    fn capability_list() {
        let config = config();
        let mut at = read32(&config, 0x34) as u8;
        let mut ids = Vec::new();
        while at != 0 {
            let head = read32(&config, at.into());
            ids.push(head as u8);
            at = (head >> 8) as u8;
        }
        assert_eq!(ids, [capability::VENDOR, capability::MSIX]);
        assert_ne!(read32(&config, 4) & 0x10_0000, 0);
    }

    #[test]
    fn interrupt_wire() {
        let recorder = Arc::new(Recorder::default());
        let config = config();
        config.attach(recorder.clone(), IrqLine::new(recorder.clone(), 17));
        assert_eq!(read32(&config, 0x3c) & 0xffff, 0x0111);
        let high = || config.intx_line.get().unwrap().is_high();
        config.set_intx(true);
        assert!(high() && read32(&config, 4) & 0x8_0000 != 0);
        config.write(5, &[4]);
        assert!(!high());
        config.write(5, &[0]);
        assert!(high());
        let msix_control = config.msix.as_ref().unwrap().control as u16;
        config.write(msix_control, &[0, 0x80]);
        assert!(!high() && config.msix().unwrap().enabled());
    }

    #[test]
    fn state() {
        let config = config();
        config.assign(0, 0xd000_0000);
        config.set_intx(true);
        let state = config.save();
        let other = self::config();
        other.check(&state).unwrap();
        other.restore(&state);
        assert_eq!(other.save(), state);
        let mut bad = state.clone();
        bad.bytes[0] ^= 1;
        assert!(other.check(&bad).is_err());
        bad.bytes.truncate(5);
        assert!(other.check(&bad).is_err());
        bad = state;
        bad.msix = None;
        assert!(other.check(&bad).is_err());
    }
}
