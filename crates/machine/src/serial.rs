//! A 16550A UART.
//!
//! Output goes to a [`Write`] at once, so the transmitter is always empty. Input waits in a bounded queue behind the 16-byte FIFO: nothing
//! is lost however fast it is typed, the giver is told how much was taken ([`Serial::input`]) and when there is room again.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::bus::PioDevice;
use crate::irq::IrqLine;
use crate::state::{StateError, lock};

/// First port of COM1; there are 8.
pub const COM1: u16 = 0x3f8;
/// Its ISA IRQ.
pub const COM1_IRQ: u32 = 4;
/// Bytes of input that wait at most.
pub const QUEUE: usize = 4096;

const FIFO: usize = 16;
const IER_RECEIVE: u8 = 1;
const IER_TRANSMIT: u8 = 2;
const LCR_DLAB: u8 = 0x80;
const MCR_OUT2: u8 = 8;
const MCR_LOOP: u8 = 0x10;
const FCR_ENABLE: u8 = 1;
const LSR_READY: u8 = 1;
/// Transmitter holding register and shift register empty.
const LSR_EMPTY: u8 = 0x60;

/// Saved state of [`Serial`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    scratch: u8,
    divisor: u16,
    /// The "transmitter empty" interrupt waits.
    transmit_pending: bool,
    /// Input that the guest has not read.
    input: Vec<u8>,
}

struct Inner {
    state: SerialState,
    input: VecDeque<u8>,
    irq: IrqLine,
    output: Box<dyn Write + Send>,
    room: Option<Arc<dyn Fn() + Send + Sync>>,
    full: bool,
}

/// The UART.
pub struct Serial {
    inner: Mutex<Inner>,
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("state", &lock(&self.inner).state).finish_non_exhaustive()
    }
}

fn power_on() -> SerialState {
    SerialState {
        ier: 0,
        fcr: 0,
        lcr: 3,
        mcr: 0,
        scratch: 0,
        // 9600 baud; the rate is the guest's business, nothing here is slower for it.
        divisor: 12,
        transmit_pending: false,
        input: Vec::new(),
    }
}

impl Inner {
    /// Bytes in the FIFO at which the interrupt comes.
    fn trigger(&self) -> usize {
        if self.state.fcr & FCR_ENABLE == 0 { 1 } else { [1, 4, 8, 14][usize::from(self.state.fcr >> 6)] }
    }

    /// The identification register without its FIFO bits: the interrupt with the highest priority.
    fn interrupt(&self) -> u8 {
        if self.state.ier & IER_RECEIVE != 0 && !self.input.is_empty() {
            // Few bytes: "character time-out". Ours comes at once, for time here costs nothing.
            if self.input.len() >= self.trigger() { 4 } else { 12 }
        } else if self.state.ier & IER_TRANSMIT != 0 && self.state.transmit_pending {
            2
        } else {
            1
        }
    }

    fn update(&self) {
        self.irq.set(self.interrupt() != 1 && self.state.mcr & (MCR_OUT2 | MCR_LOOP) == MCR_OUT2);
    }

    fn divisor_access(&self) -> bool {
        self.state.lcr & LCR_DLAB != 0
    }

    fn read(&mut self, register: u16) -> u8 {
        match register {
            0 if self.divisor_access() => self.state.divisor as u8,
            1 if self.divisor_access() => (self.state.divisor >> 8) as u8,
            0 => self.input.pop_front().unwrap_or(0),
            1 => self.state.ier,
            2 => {
                let interrupt = self.interrupt();
                if interrupt == 2 {
                    self.state.transmit_pending = false;
                }
                interrupt | if self.state.fcr & FCR_ENABLE != 0 { 0xc0 } else { 0 }
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => LSR_EMPTY | if self.input.is_empty() { 0 } else { LSR_READY },
            // Loopback: the modem outputs DTR, RTS, OUT1, OUT2 come back as DSR, CTS, RI, DCD. Else: carrier, DSR, CTS.
            6 if self.state.mcr & MCR_LOOP != 0 => {
                let mcr = self.state.mcr;
                mcr << 5 & 0x20 | mcr << 3 & 0x10 | mcr << 4 & 0xc0
            }
            6 => 0xb0,
            7 => self.state.scratch,
            _ => 0xff,
        }
    }

    fn write(&mut self, register: u16, value: u8) {
        match register {
            0 if self.divisor_access() => self.state.divisor = self.state.divisor & 0xff00 | u16::from(value),
            1 if self.divisor_access() => {
                self.state.divisor = self.state.divisor & 0xff | u16::from(value) << 8;
            }
            0 => {
                if self.state.mcr & MCR_LOOP != 0 {
                    if self.input.len() < FIFO {
                        self.input.push_back(value);
                    }
                } else {
                    // A console that has gone away does not stop the machine.
                    let _ = self.output.write_all(&[value]).and_then(|()| self.output.flush());
                }
                self.state.transmit_pending = true;
            }
            1 => {
                if value & !self.state.ier & IER_TRANSMIT != 0 {
                    self.state.transmit_pending = true;
                }
                self.state.ier = value & 0xf;
            }
            2 => {
                // Bit 1 empties the receive FIFO; input that has not been "sent" yet stays.
                if value & 2 != 0 {
                    self.input.drain(..self.input.len().min(FIFO));
                }
                self.state.fcr = value & 0xc9;
            }
            3 => self.state.lcr = value,
            4 => self.state.mcr = value & 0x1f,
            7 => self.state.scratch = value,
            _ => {}
        }
    }
}

impl Serial {
    /// Output goes to `output`, which should not block for long.
    pub fn new(irq: IrqLine, output: Box<dyn Write + Send>) -> Self {
        let inner = Inner { state: power_on(), input: VecDeque::new(), irq, output, room: None, full: false };
        Self { inner: Mutex::new(inner) }
    }

    /// Somebody types. Takes what fits and returns how many bytes that was; the rest is to be offered again after the call that
    /// [`Serial::on_room`] set.
    pub fn input(&self, data: &[u8]) -> usize {
        let mut inner = lock(&self.inner);
        let taken = data.len().min(QUEUE - inner.input.len().min(QUEUE));
        inner.input.extend(data.iter().take(taken));
        inner.full |= taken < data.len();
        inner.update();
        taken
    }

    /// Sets who is told, on a vCPU's thread, that there is room again after [`Serial::input`] took less than it was given. Must not
    /// call back into this UART.
    pub fn on_room(&self, room: Arc<dyn Fn() + Send + Sync>) {
        lock(&self.inner).room = Some(room);
    }

    /// Power-on. Input that waits stays.
    pub fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.state = power_on();
        inner.update();
    }

    /// The state.
    pub fn save(&self) -> SerialState {
        let inner = lock(&self.inner);
        SerialState { input: inner.input.iter().copied().collect(), ..inner.state.clone() }
    }

    /// Takes over a state.
    ///
    /// # Errors
    /// More input waits than can.
    pub fn restore(&self, state: &SerialState) -> Result<(), StateError> {
        if state.input.len() > QUEUE {
            return Err(StateError::new("serial port", format!("{} bytes of input", state.input.len())));
        }
        let mut inner = lock(&self.inner);
        inner.input = state.input.iter().copied().collect();
        inner.state = SerialState { input: Vec::new(), ..state.clone() };
        inner.update();
        Ok(())
    }
}

impl PioDevice for Serial {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = lock(&self.inner);
        if let Some(byte) = data.first_mut() {
            *byte = inner.read(offset);
        }
        inner.update();
        let room = if inner.full && inner.input.len() <= QUEUE / 2 {
            inner.full = false;
            inner.room.clone()
        } else {
            None
        };
        drop(inner);
        if let Some(room) = room {
            room();
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        let mut inner = lock(&self.inner);
        for (index, byte) in data.iter().enumerate() {
            inner.write(offset + index as u16, *byte);
        }
        inner.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::Recorder;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);
    impl Write for Sink {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Rig(Arc<Serial>, Sink);
    impl Rig {
        fn new() -> Self {
            let sink = Sink::default();
            let irq = IrqLine::new(Arc::new(Recorder::default()), 4);
            Self(Arc::new(Serial::new(irq, Box::new(sink.clone()))), sink)
        }
        fn out(&self, port: u16, value: u8) {
            self.0.pio_write(port, &[value]);
        }
        fn input(&self, port: u16) -> u8 {
            let mut data = [0];
            self.0.pio_read(port, &mut data);
            data[0]
        }
        fn irq(&self) -> bool {
            lock(&self.0.inner).irq.is_high()
        }
    }

    /// What Linux's 8250 driver does to find a working 16550A.
    #[test]
    fn autoconfiguration() {
        let rig = Rig::new();
        rig.out(1, 0);
        assert_eq!(rig.input(1), 0);
        rig.out(1, 0xf);
        assert_eq!(rig.input(1) & 0xf, 0xf);
        rig.out(1, 0);
        rig.out(4, MCR_LOOP | 0xa);
        assert_eq!(rig.input(6) & 0xf0, 0x90);
        rig.out(4, 0);
        rig.out(2, 1);
        assert_eq!(rig.input(2) >> 6, 3, "16550A");
        rig.out(3, 0xbf);
        assert_ne!(rig.input(2), 0, "no 16650");
        rig.out(3, 3);
        rig.out(1, 0x40);
        assert_eq!(rig.input(1) & 0x40, 0, "no XScale");
        rig.out(7, 0x5a);
        assert_eq!(rig.input(7), 0x5a);
        // The THRE test.
        rig.out(4, MCR_OUT2);
        rig.out(1, IER_TRANSMIT);
        assert_eq!(rig.input(2) & 0xf, 2);
        assert_eq!(rig.input(2) & 0xf, 1);
        rig.out(1, 0);
        rig.out(1, IER_TRANSMIT);
        assert!(rig.irq());
        assert_eq!(rig.input(2) & 0xf, 2);
        assert!(!rig.irq());
    }

    #[test]
    fn output() {
        let rig = Rig::new();
        rig.out(3, 0x83);
        rig.out(0, 1);
        rig.out(1, 0);
        rig.out(3, 3);
        rig.out(4, 0xb);
        rig.out(1, IER_TRANSMIT);
        for byte in b"ok\n" {
            assert_eq!(rig.input(5) & 0x20, 0x20);
            rig.out(0, *byte);
            assert!(rig.irq());
            assert_eq!(rig.input(2) & 0xf, 2);
        }
        assert_eq!(*rig.1.0.lock().unwrap(), b"ok\n");
    }

    #[test]
    fn input_with_back_pressure() {
        let rig = Rig::new();
        let calls = Arc::new(AtomicUsize::new(0));
        let copy = calls.clone();
        rig.0.on_room(Arc::new(move || {
            copy.fetch_add(1, Ordering::SeqCst);
        }));
        rig.out(4, 0xb);
        rig.out(2, 0x81);
        assert_eq!(rig.0.input(b"a"), 1);
        assert!(!rig.irq());
        rig.out(1, IER_RECEIVE);
        assert!(rig.irq());
        assert_eq!(rig.input(2), 0xcc, "time-out, FIFO on");
        assert_eq!(rig.0.input(&[b'b'; 9000]), QUEUE - 1);
        assert_eq!(rig.0.input(&[b'b'; 10]), 0);
        assert_eq!(rig.input(2), 0xc4);
        let mut read = 0;
        while rig.input(5) & 1 != 0 {
            rig.input(0);
            read += 1;
        }
        assert_eq!((read, calls.load(Ordering::SeqCst)), (QUEUE, 1));
        assert!(!rig.irq());
    }

    #[test]
    fn state() {
        let rig = Rig::new();
        rig.out(4, 0xb);
        rig.out(1, IER_RECEIVE);
        rig.0.input(b"xyz");
        let state = rig.0.save();
        let other = Rig::new();
        other.0.restore(&state).unwrap();
        assert_eq!(other.0.save(), state);
        assert!(other.irq());
        assert_eq!(other.input(0), b'x');
        assert!(other.0.restore(&SerialState { input: vec![0; QUEUE + 1], ..state }).is_err());
    }
}
