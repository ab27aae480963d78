//! Ways to switch off and to reset: ACPI's PM1a registers, the chipset's reset register, the keyboard controller, port 0x92. And the
//! ACPI timer, which lives in the same block of ports.

use std::fmt;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::{PioDevice, set_value, value};
use crate::clock::{Clock, scale};
use crate::irq::IrqLine;
use crate::state::{StateError, lock};

/// What the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerEvent {
    /// Power off (ACPI S5).
    Off,
    /// Reset: the machine boots again.
    Reset,
}

/// Who is told. Called on the vCPU's thread, within the access: it must not wait for that vCPU to stop.
pub type PowerCallback = Arc<dyn Fn(PowerEvent) + Send + Sync>;

/// First port of the ACPI block.
pub const ACPI_PORTS: u16 = 0x600;
/// PM1a event block: status, then enable.
pub const PM1A_EVENT: u16 = ACPI_PORTS;
/// PM1a control.
pub const PM1A_CONTROL: u16 = ACPI_PORTS + 4;
/// PM timer, 32 bits.
pub const PM_TIMER: u16 = ACPI_PORTS + 8;
/// Ports in the block.
pub const ACPI_PORTS_LEN: u16 = 12;
/// System control interrupt: ISA IRQ and global system interrupt.
pub const SCI: u32 = 9;
/// Frequency of the PM timer in Hz.
pub const PM_TIMER_HZ: u64 = 3_579_545;
/// SLP_TYP value of S5, as the DSDT says.
pub const S5: u8 = 5;
/// Port of the reset register.
pub const RESET_PORT: u16 = 0xcf9;
/// What to write there.
pub const RESET_VALUE: u8 = 6;

const POWER_BUTTON: u16 = 1 << 8;
/// Status bits that exist: timer, bus master, global, power button, sleep button, RTC, PCIe wake, wake.
const STATUS: u16 = 0xc731;
/// Enable bits that exist: timer, global, power button, sleep button, RTC, PCIe wake.
const ENABLE: u16 = 0x4721;
const SCI_ENABLE: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// Saved state of [`AcpiPm`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AcpiPmState {
    status: u16,
    enable: u16,
    control: u16,
}

/// The PM1a event and control registers and the PM timer (ACPI 6.5, section 4.8.3).
pub struct AcpiPm {
    state: Mutex<AcpiPmState>,
    sci: IrqLine,
    clock: Arc<Clock>,
    power: PowerCallback,
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPm").field("state", &*lock(&self.state)).finish_non_exhaustive()
    }
}

impl AcpiPm {
    /// In ACPI mode from the start: there is no SMI command port.
    pub fn new(clock: Arc<Clock>, sci: IrqLine, power: PowerCallback) -> Self {
        Self { state: Mutex::default(), sci, clock, power }
    }

    /// Somebody presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        let mut state = lock(&self.state);
        state.status |= POWER_BUTTON;
        self.update(&state);
    }

    fn update(&self, state: &AcpiPmState) {
        self.sci.set(state.status & state.enable != 0);
    }

    /// Power-on.
    pub fn reset(&self) {
        let mut state = lock(&self.state);
        *state = AcpiPmState::default();
        self.update(&state);
    }

    /// The state. The timer follows from the clock.
    pub fn save(&self) -> AcpiPmState {
        *lock(&self.state)
    }

    /// Takes over a state.
    ///
    /// # Errors
    /// Bits that do not exist are set.
    pub fn restore(&self, state: &AcpiPmState) -> Result<(), StateError> {
        if state.status & !STATUS != 0 || state.enable & !ENABLE != 0 {
            return Err(StateError::new("ACPI registers", format!("{state:x?}")));
        }
        *lock(&self.state) = *state;
        self.update(state);
        Ok(())
    }

    fn read_byte(&self, offset: u16, timer: u32) -> u8 {
        let state = lock(&self.state);
        let (word, at) = match offset {
            0..=1 => (state.status.into(), 0),
            2..=3 => (state.enable.into(), 2),
            4..=5 => (u32::from(state.control | SCI_ENABLE), 4),
            8..=11 => (timer, 8),
            _ => return 0,
        };
        (word >> (8 * (offset - at))) as u8
    }

    fn write_byte(&self, offset: u16, byte: u8) -> Option<PowerEvent> {
        let mut state = lock(&self.state);
        let shift = 8 * (offset % 2);
        let (bits, keep) = (u16::from(byte) << shift, !(0xff << shift));
        match offset {
            0..=1 => state.status &= !bits,
            2..=3 => state.enable = (state.enable & keep | bits) & ENABLE,
            4..=5 => {
                state.control = (state.control & keep | bits) & !SLEEP_ENABLE;
                if bits & SLEEP_ENABLE != 0 && state.control >> 10 & 7 == u16::from(S5) {
                    return Some(PowerEvent::Off);
                }
            }
            _ => {}
        }
        self.update(&state);
        None
    }
}

/// Registers may be accessed in any width (the timer whole, so that its bytes belong together).
impl PioDevice for AcpiPm {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        let timer = scale(self.clock.now(), PM_TIMER_HZ, 1_000_000_000) as u32;
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.read_byte(offset + index as u16, timer);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            if let Some(event) = self.write_byte(offset + index as u16, *byte) {
                (self.power)(event);
            }
        }
    }
}

/// Saved state of [`ResetPorts`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResetPortsState {
    reset_control: u8,
    port_92: u8,
}

/// The reset register 0xcf9, port 0x92 and the keyboard controller's reset line; the latter controls no keyboard here.
pub struct ResetPorts {
    state: Mutex<ResetPortsState>,
    power: PowerCallback,
}

impl fmt::Debug for ResetPorts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResetPorts").field("state", &*lock(&self.state)).finish_non_exhaustive()
    }
}

impl ResetPorts {
    /// Nothing written yet; A20 is open.
    pub fn new(power: PowerCallback) -> Self {
        Self { state: Mutex::new(ResetPortsState { reset_control: 0, port_92: 2 }), power }
    }

    /// Power-on.
    pub fn reset(&self) {
        *lock(&self.state) = ResetPortsState { reset_control: 0, port_92: 2 };
    }

    /// The state.
    pub fn save(&self) -> ResetPortsState {
        *lock(&self.state)
    }

    /// Takes over a state: any is possible.
    pub fn restore(&self, state: &ResetPortsState) {
        *lock(&self.state) = *state;
    }
}

/// Which port of [`ResetPorts`] this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetPort {
    /// 0xcf9.
    ResetControl,
    /// 0x92, "system control port A".
    Port92,
    /// 0x60, the keyboard controller's data.
    KeyboardData,
    /// 0x64, the keyboard controller's command and status.
    KeyboardCommand,
}

/// One port on the bus.
#[derive(Debug)]
pub struct ResetPortView(pub Arc<ResetPorts>, pub ResetPort);

impl PioDevice for ResetPortView {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        let state = lock(&self.0.state);
        set_value(
            data,
            match self.1 {
                ResetPort::ResetControl => state.reset_control.into(),
                ResetPort::Port92 => state.port_92.into(),
                // No key, nothing in the way of a command.
                ResetPort::KeyboardData | ResetPort::KeyboardCommand => 0,
            },
        );
    }

    fn pio_write(&self, _: u16, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        let mut state = lock(&self.0.state);
        let reset = match self.1 {
            ResetPort::ResetControl => {
                let rises = byte & !state.reset_control & 4 != 0;
                state.reset_control = byte & 0xe;
                rises
            }
            ResetPort::Port92 => {
                let rises = byte & !state.port_92 & 1 != 0;
                state.port_92 = byte & 3;
                rises
            }
            ResetPort::KeyboardData => false,
            // "Pulse output port" with bit 0, the reset line, low.
            ResetPort::KeyboardCommand => byte & 0xf1 == 0xf0,
        };
        drop(state);
        if reset {
            (self.0.power)(PowerEvent::Reset);
        }
    }
}

/// Ports that firmware and kernels write to and that must do nothing: 0x80 (POST codes, and Linux's I/O delay) and the debug consoles
/// of other machines. Reads give 0, so that nobody takes them for a debug console.
#[derive(Debug)]
pub struct DeadPort;

impl PioDevice for DeadPort {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        let _ = value(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::Recorder;

    fn recorder() -> (PowerCallback, Arc<Mutex<Vec<PowerEvent>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let copy = events.clone();
        (Arc::new(move |event| copy.lock().unwrap().push(event)), events)
    }

    #[test]
    fn acpi_registers() {
        let clock = Arc::new(Clock::manual(1_000_000));
        let irqs = Arc::new(Recorder::default());
        let (power, events) = recorder();
        let pm = AcpiPm::new(clock.clone(), IrqLine::new(irqs.clone(), SCI), power);
        let read = |offset, len| {
            let mut data = vec![0; len];
            pm.pio_read(offset, &mut data);
            value(&data)
        };
        assert_eq!(read(4, 2), 1, "ACPI mode");
        clock.set(1_000_000_000);
        assert_eq!(read(8, 4), PM_TIMER_HZ);
        pm.press_power_button();
        assert!(!pm.sci.is_high());
        pm.pio_write(2, &0x0120_u16.to_le_bytes());
        assert!(pm.sci.is_high());
        assert_eq!(read(0, 4), 0x0120_0100);
        let state = pm.save();
        pm.pio_write(0, &0x0100_u16.to_le_bytes());
        assert!(!pm.sci.is_high());
        pm.restore(&state).unwrap();
        assert!(pm.sci.is_high());
        assert!(pm.restore(&AcpiPmState { status: 2, ..state }).is_err());
        pm.pio_write(4, &(u16::from(S5) << 10 | 1).to_le_bytes());
        assert!(events.lock().unwrap().is_empty());
        pm.pio_write(4, &(u16::from(S5) << 10 | 1 | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Off]);
        pm.pio_write(4, &(1 | SLEEP_ENABLE).to_le_bytes());
        assert_eq!(events.lock().unwrap().len(), 1, "S0 is no power-off");
    }

    #[test]
    fn resets() {
        let (power, events) = recorder();
        let ports = Arc::new(ResetPorts::new(power));
        let write = |port, value: u8| {
            ResetPortView(ports.clone(), port).pio_write(0, &[value]);
            std::mem::take(&mut *events.lock().unwrap())
        };
        assert!(write(ResetPort::ResetControl, 2).is_empty());
        assert_eq!(write(ResetPort::ResetControl, RESET_VALUE), [PowerEvent::Reset]);
        assert_eq!(write(ResetPort::KeyboardCommand, 0xfe), [PowerEvent::Reset]);
        assert!(write(ResetPort::KeyboardCommand, 0xaa).is_empty());
        assert!(write(ResetPort::KeyboardCommand, 0xff).is_empty());
        assert!(write(ResetPort::Port92, 2).is_empty());
        assert_eq!(write(ResetPort::Port92, 3), [PowerEvent::Reset]);
        let mut data = [9];
        ResetPortView(ports.clone(), ResetPort::KeyboardCommand).pio_read(0, &mut data);
        assert_eq!(data, [0]);
    }
}
