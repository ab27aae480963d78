//! The pair of 8259A interrupt controllers with the ELCR (edge/level control, ports 0x4d0 and 0x4d1).

use std::fmt;
use std::sync::{Arc, Mutex};

use cpu::chips::PicRegisters;
use serde::{Deserialize, Serialize};

use crate::bus::PioDevice;
use crate::lapic::{InterruptAcknowledge, Lapics};
use crate::state::{StateError, lock};

/// The input of the first chip that the second is wired to.
const CASCADE: u8 = 2;

/// Saved state of one 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChipState {
    /// Levels of the wires.
    lines: u8,
    /// Requests.
    irr: u8,
    /// In service.
    isr: u8,
    /// Mask (OCW1).
    imr: u8,
    /// Vector of input 0 (ICW2).
    base: u8,
    /// Next word of the initialisation sequence, 2 to 4; 0 when done.
    expects: u8,
    needs_icw4: bool,
    auto_eoi: bool,
    special_fully_nested: bool,
    special_mask: bool,
    rotate_on_auto_eoi: bool,
    poll: bool,
    read_isr: bool,
    /// The input with the highest priority.
    first: u8,
    /// Level-triggered inputs (ELCR).
    level: u8,
}

/// Saved state of [`Pic`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PicState {
    chips: [ChipState; 2],
}

impl ChipState {
    fn set_line(&mut self, input: u8, high: bool) {
        let bit = 1 << input;
        if high {
            if self.level & bit != 0 || self.lines & bit == 0 {
                self.irr |= bit;
            }
            self.lines |= bit;
        } else {
            self.lines &= !bit;
            // An edge is remembered: on the real chip it goes away with its wire, but timers here are pulses.
            if self.level & bit != 0 {
                self.irr &= !bit;
            }
        }
    }

    /// The highest-priority set bit of `bits` as a distance from `first`.
    fn rank(&self, bits: u8) -> Option<u8> {
        (0..8).find(|rank| bits & 1 << ((self.first + rank) & 7) != 0)
    }

    /// The input that may interrupt now.
    fn candidate(&self, is_master: bool) -> Option<u8> {
        let request = self.rank(self.irr & !self.imr)?;
        let mut service = self.isr;
        if self.special_mask {
            service &= !self.imr;
        }
        if is_master && self.special_fully_nested {
            service &= !(1 << CASCADE);
        }
        let blocked = self.rank(service).is_some_and(|rank| rank <= request);
        (!blocked).then_some((self.first + request) & 7)
    }

    fn acknowledge(&mut self, input: u8) {
        let bit = 1 << input;
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (input + 1) & 7;
        }
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            // ICW1: start of initialisation. Wires and ELCR stay.
            *self = Self { lines: self.lines, level: self.level, expects: 2, ..Self::default() };
            self.irr = self.lines & self.level;
            self.needs_icw4 = value & 1 != 0;
        } else if value & 0x08 != 0 {
            // OCW3.
            if value & 4 != 0 {
                self.poll = true;
            } else if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            // OCW2: bit 7 rotate, bit 6 specific, bit 5 EOI.
            let specific = value & 7;
            match value >> 5 {
                0 => self.rotate_on_auto_eoi = false,
                4 => self.rotate_on_auto_eoi = true,
                1 | 5 => {
                    if let Some(rank) = self.rank(self.isr) {
                        let input = (self.first + rank) & 7;
                        self.isr &= !(1 << input);
                        if value >> 5 == 5 {
                            self.first = (input + 1) & 7;
                        }
                    }
                }
                3 => self.isr &= !(1 << specific),
                6 => self.first = (specific + 1) & 7,
                7 => {
                    self.isr &= !(1 << specific);
                    self.first = (specific + 1) & 7;
                }
                _ => {}
            }
        }
    }

    fn data(&mut self, value: u8) {
        match self.expects {
            2 => {
                self.base = value & 0xf8;
                self.expects = 3;
            }
            // ICW3 says how the chips are wired, which is fixed.
            3 => self.expects = if self.needs_icw4 { 4 } else { 0 },
            4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_fully_nested = value & 0x10 != 0;
                self.expects = 0;
            }
            _ => self.imr = value,
        }
    }
}

impl PicState {
    /// Passes the second chip's output on to the first; is the pair's output high?
    fn update(&mut self) -> bool {
        let cascade = self.chips[1].candidate(false).is_some();
        self.chips[0].set_line(CASCADE, cascade);
        if !cascade {
            self.chips[0].irr &= !(1 << CASCADE);
        }
        self.chips[0].candidate(true).is_some()
    }

    /// The INTA cycle.
    fn acknowledge(&mut self) -> u8 {
        let Some(input) = self.chips[0].candidate(true) else {
            // The request has gone: spurious.
            return self.chips[0].base + 7;
        };
        self.chips[0].acknowledge(input);
        if input != CASCADE {
            return self.chips[0].base + input;
        }
        match self.chips[1].candidate(false) {
            Some(input) => {
                self.chips[1].acknowledge(input);
                self.chips[1].base + input
            }
            None => self.chips[1].base + 7,
        }
    }

    fn read(&mut self, chip: usize, data_port: bool) -> u8 {
        let is_master = chip == 0;
        let chip = &mut self.chips[chip];
        if std::mem::take(&mut chip.poll) {
            // Poll: the read is the acknowledge.
            return match chip.candidate(is_master) {
                Some(input) => {
                    chip.acknowledge(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data_port, chip.read_isr) {
            (true, _) => chip.imr,
            (false, true) => chip.isr,
            (false, false) => chip.irr,
        }
    }
}

impl From<&PicState> for [PicRegisters; 2] {
    fn from(state: &PicState) -> Self {
        state.chips.map(|chip| PicRegisters {
            lines: chip.lines,
            irr: chip.irr,
            isr: chip.isr,
            imr: chip.imr,
            base: chip.base,
            expects: chip.expects,
            needs_icw4: chip.needs_icw4,
            auto_eoi: chip.auto_eoi,
            rotate_on_auto_eoi: chip.rotate_on_auto_eoi,
            special_fully_nested: chip.special_fully_nested,
            special_mask: chip.special_mask,
            poll: chip.poll,
            read_isr: chip.read_isr,
            first: chip.first,
            level: chip.level,
        })
    }
}

impl From<&[PicRegisters; 2]> for PicState {
    fn from(chips: &[PicRegisters; 2]) -> Self {
        Self {
            chips: chips.map(|chip| ChipState {
                lines: chip.lines,
                irr: chip.irr,
                isr: chip.isr,
                imr: chip.imr,
                base: chip.base & 0xf8,
                expects: chip.expects,
                needs_icw4: chip.needs_icw4,
                auto_eoi: chip.auto_eoi,
                rotate_on_auto_eoi: chip.rotate_on_auto_eoi,
                special_fully_nested: chip.special_fully_nested,
                special_mask: chip.special_mask,
                poll: chip.poll,
                read_isr: chip.read_isr,
                first: chip.first & 7,
                level: chip.level,
            }),
        }
    }
}

impl PicState {
    /// Is the pair's output high?
    pub(crate) fn output(mut self) -> bool {
        self.update()
    }

    /// Is it a state that chips can be in?
    pub(crate) fn check(&self) -> Result<(), StateError> {
        if self.chips.iter().any(|chip| chip.first > 7 || chip.base & 7 != 0 || chip.expects > 4) {
            return Err(StateError::new("PIC", format!("{self:?}")));
        }
        Ok(())
    }
}

/// The pair. Its output is wired to the bootstrap processor's LINT0.
pub struct Pic {
    state: Mutex<PicState>,
    lapics: Arc<Lapics>,
}

impl fmt::Debug for Pic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pic").field("state", &*lock(&self.state)).finish_non_exhaustive()
    }
}

impl Pic {
    /// As firmware leaves it: vectors 8 and 0x70, all masked but the cascade.
    pub fn new(lapics: Arc<Lapics>) -> Self {
        Self { state: Mutex::new(Self::firmware()), lapics }
    }

    fn firmware() -> PicState {
        let mut state = PicState::default();
        (state.chips[0].base, state.chips[0].imr) = (0x08, 0xfb);
        (state.chips[1].base, state.chips[1].imr) = (0x70, 0xff);
        state
    }

    /// Does something and tells the CPU of the output while the lock is held, so that the last change is told last.
    fn change<T>(&self, change: impl FnOnce(&mut PicState) -> T) -> T {
        let mut state = lock(&self.state);
        let result = change(&mut state);
        let output = state.update();
        self.lapics.set_pic_output(output);
        result
    }

    /// ISA wire `irq` (0 to 15) goes high or low.
    pub fn set_level(&self, irq: u32, high: bool) {
        if irq < 16 && irq != u32::from(CASCADE) {
            self.change(|state| state.chips[irq as usize / 8].set_line((irq % 8) as u8, high));
        }
    }

    /// Back to what firmware leaves.
    pub fn reset(&self) {
        self.change(|state| {
            let lines = state.chips.map(|chip| chip.lines);
            *state = Self::firmware();
            (state.chips[0].lines, state.chips[1].lines) = (lines[0], lines[1]);
        });
    }

    /// The state.
    pub fn save(&self) -> PicState {
        *lock(&self.state)
    }

    /// Takes over a state.
    ///
    /// # Errors
    /// It is none a chip can be in.
    pub fn restore(&self, state: &PicState) -> Result<(), StateError> {
        state.check()?;
        self.change(|live| {
            *live = *state;
            // The timer interrupts by pulses. Where it was saved within one, the next would be no edge.
            live.chips[0].lines &= !1;
        });
        Ok(())
    }

    /// Tells the CPU of the output again.
    pub fn tell(&self) {
        self.change(|_| ());
    }
}

impl InterruptAcknowledge for Pic {
    fn acknowledge(&self) -> u8 {
        self.change(PicState::acknowledge)
    }
}

/// The ports of one chip, or (number 2) the ELCR pair.
#[derive(Debug)]
pub struct PicPorts {
    pic: Arc<Pic>,
    chip: usize,
}

impl PicPorts {
    /// Ports of the first chip (0x20), the second (0xa0), and the ELCRs (0x4d0), each two ports.
    pub fn all(pic: &Arc<Pic>) -> [Arc<Self>; 3] {
        [0, 1, 2].map(|chip| Arc::new(Self { pic: pic.clone(), chip }))
    }
}

impl PioDevice for PicPorts {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        let at = usize::from(offset & 1);
        data.fill(0xff);
        if let Some(byte) = data.first_mut() {
            *byte = self.pic.change(|state| match self.chip {
                2 => state.chips[at].level,
                chip => state.read(chip, at == 1),
            });
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().take(2).enumerate() {
            let at = (usize::from(offset) + index) & 1;
            self.pic.change(|state| match (self.chip, at) {
                // The timer, the keyboard, the cascade, the clock and the FPU are always edges.
                (2, _) => state.chips[at].level = byte & [0xf8, 0xde][at],
                (chip, 0) => state.chips[chip].command(*byte),
                (chip, _) => state.chips[chip].data(*byte),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::testing::manual;
    use crate::lapic::Lapic;
    use cpu::LocalApic;

    struct Rig {
        pic: Arc<Pic>,
        ports: [Arc<PicPorts>; 3],
        cpu: Arc<Lapic>,
        _lapics: Arc<Lapics>,
    }

    impl Rig {
        /// As Linux's init_8259A: vectors 0x30 and 0x38, all unmasked.
        fn new() -> Self {
            let (_, queue) = manual();
            let lapics = Arc::new(Lapics::new(1, &queue));
            let pic = Arc::new(Pic::new(lapics.clone()));
            let as_ack: Arc<dyn InterruptAcknowledge> = pic.clone();
            let eoi: std::sync::Weak<crate::ioapic::IoApic> = std::sync::Weak::new();
            lapics.connect(Arc::downgrade(&as_ack), eoi);
            let rig = Self { ports: PicPorts::all(&pic), pic, cpu: lapics.get(0).unwrap(), _lapics: lapics };
            for (chip, words) in [(0, [0x11, 0x30, 0x04, 0x01]), (1, [0x11, 0x38, 0x02, 0x01])] {
                rig.out(chip, 0, words[0]);
                for word in &words[1..] {
                    rig.out(chip, 1, *word);
                }
                rig.out(chip, 1, 0);
            }
            rig
        }
        fn out(&self, chip: usize, port: u16, value: u8) {
            self.ports[chip].pio_write(port, &[value]);
        }
        fn input(&self, chip: usize, port: u16) -> u8 {
            let mut data = [0];
            self.ports[chip].pio_read(port, &mut data);
            data[0]
        }
    }

    #[test]
    fn linux_sequence() {
        let rig = Rig::new();
        rig.out(0, 1, 0xfb);
        assert_eq!(rig.input(0, 1), 0xfb, "how Linux probes for a PIC");
        rig.out(0, 1, 0);
        rig.pic.set_level(0, true);
        assert!(rig.cpu.status().interrupt);
        assert_eq!(rig.cpu.acknowledge(), Some(0x30));
        assert!(!rig.cpu.status().interrupt);
        rig.pic.set_level(4, true);
        assert!(!rig.cpu.status().interrupt, "IRQ 0 is in service");
        rig.out(0, 0, 0x60);
        assert_eq!(rig.cpu.acknowledge(), Some(0x34));
        rig.out(0, 0, 0x0b);
        assert_eq!(rig.input(0, 0), 0x10);
        rig.out(0, 0, 0x20);
        assert_eq!(rig.input(0, 0), 0);
        rig.out(0, 0, 0x0a);
        rig.out(0, 1, 0x10);
        rig.pic.set_level(4, false);
        rig.pic.set_level(4, true);
        assert_eq!(rig.input(0, 0), 0x10);
        assert!(!rig.cpu.status().interrupt, "masked");
        rig.out(0, 1, 0);
        assert!(rig.cpu.status().interrupt, "an edge waits in IRR");
    }

    #[test]
    fn cascade_and_spurious() {
        let rig = Rig::new();
        rig.pic.set_level(8, true);
        assert_eq!(rig.cpu.acknowledge(), Some(0x38));
        rig.pic.set_level(9, true);
        assert!(!rig.cpu.status().interrupt);
        rig.out(1, 0, 0x60);
        assert!(!rig.cpu.status().interrupt, "the cascade input is still in service");
        rig.out(0, 0, 0x62);
        assert_eq!(rig.cpu.acknowledge(), Some(0x39));
        rig.out(1, 0, 0x20);
        rig.out(0, 0, 0x20);
        rig.pic.set_level(10, true);
        rig.out(1, 1, 0xff);
        assert!(!rig.cpu.status().interrupt, "masked in the second chip: the cascade goes low");
        assert_eq!(rig.pic.acknowledge(), 0x37);
        rig.out(0, 0, 0x0b);
        assert_eq!(rig.input(0, 0), 0, "spurious sets nothing in service");
    }

    #[test]
    fn level_auto_eoi_rotation_poll() {
        let rig = Rig::new();
        rig.out(2, 1, 0xff);
        assert_eq!(rig.input(2, 1), 0xde);
        rig.out(2, 0, 0x20);
        rig.pic.set_level(5, true);
        assert_eq!(rig.cpu.acknowledge(), Some(0x35));
        rig.out(0, 0, 0x20);
        assert_eq!(rig.cpu.acknowledge(), Some(0x35), "still high");
        rig.pic.set_level(5, false);
        rig.out(0, 0, 0xa0);
        assert!(!rig.cpu.status().interrupt);
        rig.pic.set_level(4, true);
        rig.pic.set_level(6, true);
        assert_eq!(rig.cpu.acknowledge(), Some(0x36), "5 was served last: 6 is first");
        rig.out(0, 0, 0x66);
        rig.out(0, 0, 0x0c);
        assert_eq!(rig.input(0, 0), 0x84, "poll");
        rig.out(0, 0, 0x64);
        for (port, word) in [(0, 0x11), (1, 0x30), (1, 4), (1, 3)] {
            rig.out(0, port, word);
        }
        rig.pic.set_level(3, true);
        assert_eq!(rig.cpu.acknowledge(), Some(0x33));
        rig.pic.set_level(7, true);
        assert_eq!(rig.cpu.acknowledge(), Some(0x37), "automatic EOI");
    }

    #[test]
    fn state() {
        let rig = Rig::new();
        rig.pic.set_level(3, true);
        let state = rig.pic.save();
        let other = Rig::new();
        other.pic.restore(&state).unwrap();
        assert_eq!(other.pic.save(), state);
        assert_eq!(other.cpu.acknowledge(), Some(0x33));
        let mut bad = state;
        bad.chips[1].first = 8;
        assert!(other.pic.restore(&bad).is_err());
    }
}
