//! Chips that are the engine's instead of the machine's: the wires into them, and their registers as the machine's saved state.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use cpu::Chips;
use cpu::chips::{ChipRegisters, MessageLine};

use crate::clock::Clock;
use crate::ioapic::IoApicState;
use crate::irq::{IrqSink, MsiSink};
use crate::lapic::LapicState;
use crate::pic::PicState;
use crate::pit::PitState;
use crate::state::StateError;

/// The engine's chips, with the levels of the wires into them.
pub(crate) struct EngineChips {
    chips: Arc<dyn Chips>,
    /// A bit a global system interrupt.
    levels: AtomicU32,
}

/// The states of all chips.
pub(crate) struct ChipStates {
    pub lapics: Vec<LapicState>,
    pub ioapic: IoApicState,
    pub pic: PicState,
    pub pit: PitState,
}

/// ISA interrupt 0, the timer, is wired to this pin of the IOAPIC.
const TIMER_PIN: u32 = 2;

impl EngineChips {
    pub fn new(chips: Arc<dyn Chips>) -> Arc<Self> {
        Arc::new(Self { chips, levels: AtomicU32::new(0) })
    }

    pub fn nmi(&self) {
        self.chips.nmi();
    }

    /// The levels of the wires as the IOAPIC's pins see them.
    fn pins(&self) -> u32 {
        let levels = self.levels.load(Ordering::SeqCst);
        levels & !(1 | 1 << TIMER_PIN) | (levels & 1) << TIMER_PIN
    }

    /// The states, and the clock's time at which they are so: the engine may take its time. No vCPU may run.
    pub fn save(&self, clock: &Clock) -> Result<(ChipStates, u64), StateError> {
        let registers = self.chips.save().map_err(|why| StateError::new("interrupt chips", why))?;
        let now = clock.now();
        let pic = PicState::from(&registers.pics);
        let output = pic.output();
        let lapics = (0..).zip(&registers.lapics);
        let states = ChipStates {
            lapics: lapics.map(|(id, lapic)| LapicState::from_registers(id, lapic, now, id == 0 && output)).collect(),
            ioapic: IoApicState::from_registers(&registers.ioapic, self.pins()),
            pic,
            pit: PitState::from_registers(&registers.pit, now),
        };
        Ok((states, now))
    }

    /// Takes over states at clock time `now`. No vCPU may run.
    pub fn restore(&self, states: &ChipStates, now: u64) -> Result<(), StateError> {
        (0..).zip(&states.lapics).try_for_each(|(id, lapic)| lapic.check(id))?;
        states.ioapic.check()?;
        states.pic.check()?;
        states.pit.check()?;
        let mut ioapic = states.ioapic.to_registers();
        // The devices have driven their wires by now; what they say counts.
        ioapic.asserted &= self.pins();
        let registers = ChipRegisters {
            lapics: states.lapics.iter().map(|lapic| lapic.to_registers(now)).collect(),
            ioapic,
            pics: (&states.pic).into(),
            pit: states.pit.to_registers(now),
        };
        self.chips.restore(&registers).map_err(|why| StateError::new("interrupt chips", why))
    }
}

impl IrqSink for EngineChips {
    fn set_level(&self, gsi: u32, high: bool) {
        let bit = 1_u32.checked_shl(gsi).unwrap_or(0);
        if high {
            self.levels.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.levels.fetch_and(!bit, Ordering::SeqCst);
        }
        self.chips.set_level(gsi, high);
    }
}

impl MsiSink for EngineChips {
    fn send(&self, address: u64, data: u32) {
        self.chips.send_msi(address, data);
    }

    fn line(&self) -> Option<Box<dyn MessageLine>> {
        self.chips.message_line()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// Chips that keep what they are given.
    #[derive(Default)]
    struct Kept(Mutex<Option<ChipRegisters>>);

    impl Chips for Kept {
        fn set_level(&self, _: u32, _: bool) {}
        fn send_msi(&self, _: u64, _: u32) {}
        fn nmi(&self) {}
        fn save(&self) -> Result<ChipRegisters, String> {
            self.0.lock().unwrap().clone().ok_or_else(|| "nothing there".into())
        }
        fn restore(&self, registers: &ChipRegisters) -> Result<(), String> {
            *self.0.lock().unwrap() = Some(registers.clone());
            Ok(())
        }
    }

    fn states() -> ChipStates {
        use crate::clock::testing::manual;
        let (_, queue) = manual();
        let lapics = Arc::new(crate::lapic::Lapics::new(2, &queue));
        let ioapic = crate::ioapic::IoApic::new(lapics.clone());
        let pic = crate::pic::Pic::new(lapics.clone());
        struct Nothing;
        impl IrqSink for Nothing {
            fn set_level(&self, _: u32, _: bool) {}
        }
        let pit = crate::pit::Pit::new(&queue, crate::irq::IrqLine::new(Arc::new(Nothing), 0));
        ChipStates { lapics: lapics.save(), ioapic: ioapic.save(), pic: pic.save(), pit: pit.save() }
    }

    #[test]
    fn there_and_back() {
        let chips = EngineChips::new(Arc::new(Kept::default()));
        let clock = Clock::manual(1_000_000);
        clock.set(5_000_000);
        assert!(chips.save(&clock).is_err());
        let mut states = states();
        let lapic = &mut states.lapics[1];
        // One-shot timer, a pending and a served interrupt, an NMI, in x2APIC mode.
        lapic.base |= 1 << 10;
        lapic.lvt[0] = 0xef;
        (lapic.timer_initial, lapic.timer_divide, lapic.timer_end) = (1_000_000, 3, Some(5_000_000 + 16 * 500));
        (lapic.irr[2], lapic.isr[7], lapic.tpr) = (4, 1 << 31, 0x20);
        (lapic.icr, lapic.nmi_pending) = (0x3_0000_00fd, true);
        let lapic = &mut states.lapics[0];
        (lapic.lvt[0], lapic.tsc_deadline) = (0x4_00ef, 77);
        chips.set_level(4, true);
        chips.set_level(0, true);
        chips.restore(&states, 5_000_000).unwrap();
        let (back, now) = chips.save(&clock).unwrap();
        assert_eq!(now, 5_000_000);
        assert_eq!(back.lapics, states.lapics);
        assert_eq!((back.pic, back.pit), (states.pic, states.pit));
        assert_eq!(back.ioapic.levels(), 1 << 4 | 1 << 2, "wires are the machine's own");
    }

    /// One-shot timers that have run out: one that still has to interrupt does it at once, one that has done so does not do it again.
    #[test]
    fn timers_that_have_run_out() {
        let kept = Arc::new(Kept::default());
        let chips = EngineChips::new(kept.clone());
        let clock = Clock::manual(1_000_000);
        clock.set(5_000_000);
        for (end, left) in [(Some(5_000_000), 1), (Some(4_000_000), 1), (Some(5_000_100), 7), (None, 0)] {
            let mut states = states();
            let lapic = &mut states.lapics[1];
            lapic.lvt[0] = 0xef;
            (lapic.timer_initial, lapic.timer_divide, lapic.timer_end) = (1_000_000, 3, end);
            chips.restore(&states, 5_000_000).unwrap();
            assert_eq!(kept.0.lock().unwrap().as_ref().unwrap().lapics[1].page[0x39], left);
            let back = chips.save(&clock).unwrap().0.lapics[1].timer_end;
            assert_eq!(back, end.map(|_| 5_000_000 + 16 * u64::from(left)));
        }
    }

    #[test]
    fn damaged_states_are_refused() {
        let chips = EngineChips::new(Arc::new(Kept::default()));
        let mut bad = states();
        bad.lapics[0].id = 1;
        assert!(chips.restore(&bad, 0).is_err());
        let mut bad = states();
        bad.lapics[1].irr[0] = 1;
        assert!(chips.restore(&bad, 0).is_err());
    }
}
