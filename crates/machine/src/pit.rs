//! The 8254 interval timer, and the parts of port 0x61 that belong to it: gate and output of channel 2 (the speaker).
//!
//! Counters are computed from the clock when they are looked at. Channel 0 is wired to IRQ 0.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};

use cpu::chips::{PitChannel, PitRegisters};
use serde::{Deserialize, Serialize};

use crate::bus::PioDevice;
use crate::clock::{Timer, TimerQueue, TimerTarget, scale};
use crate::irq::IrqLine;
use crate::state::{StateError, lock};

/// Input frequency in Hz.
pub const HZ: u64 = 1_193_182;
const NS: u64 = 1_000_000_000;
/// A periodic channel 0 wakes the host at most this often, in ns.
const MIN_PERIOD_NS: u64 = 20_000;

/// Saved state of one channel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelState {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    /// 1 low byte, 2 high byte, 3 low then high.
    access: u8,
    /// The count as written; 0 stands for 65536 (or 10000).
    reload: u16,
    /// When the count was loaded, in clock ns; `None`: no count since the control word.
    start: Option<u64>,
    gate: bool,
    write_high_next: bool,
    low_written: u8,
    read_high_next: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
}

/// Saved state of [`Pit`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PitState {
    channels: [ChannelState; 3],
    /// Bit 1 of port 0x61: the speaker hears the timer.
    speaker: bool,
    /// When channel 0 interrupts next, in clock ns. If that time has come, the interrupt has not.
    next: Option<u64>,
}

impl ChannelState {
    /// The period, or the initial count, in input ticks.
    fn ticks(&self) -> u64 {
        let full = if self.bcd { 10_000 } else { 0x1_0000 };
        let count = if self.bcd { from_bcd(self.reload) } else { self.reload.into() };
        if count == 0 { full } else { count }
    }

    fn elapsed(&self, now: u64) -> u64 {
        self.start.map_or(0, |start| scale(now.saturating_sub(start), HZ, NS))
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    /// The counting element.
    fn count(&self, now: u64) -> u16 {
        let (ticks, elapsed) = (self.ticks(), self.elapsed(now));
        let count = match self.mode {
            2 => ticks - elapsed % ticks,
            // Mode 3 counts by two and twice through.
            3 => (ticks - elapsed * 2 % ticks) & !1,
            _ => ticks.wrapping_sub(elapsed) & 0xffff,
        };
        if self.bcd { to_bcd(count % 10_000) } else { count as u16 }
    }

    /// Is its output the same as that of `other` at all times, whatever has been read of it?
    fn counts_as(&self, other: &Self) -> bool {
        let counting = |c: &Self| (c.mode, c.bcd, c.reload, c.start, c.gate);
        counting(self) == counting(other)
    }

    /// The output pin.
    fn output(&self, now: u64) -> bool {
        let (ticks, elapsed) = (self.ticks(), self.elapsed(now));
        match self.mode {
            0 => self.start.is_some() && elapsed >= ticks,
            1 => self.start.is_none() || elapsed >= ticks,
            2 => self.start.is_none() || elapsed % ticks != ticks - 1,
            3 => self.start.is_none() || elapsed % ticks < ticks.div_ceil(2),
            _ => self.start.is_none() || elapsed != ticks,
        }
    }

    /// When the output rises next after `now`, in clock ns.
    fn next_rise(&self, now: u64) -> Option<u64> {
        let start = self.start?;
        let ticks = self.ticks();
        let at = |tick: u64| {
            // Rounded up: the tick has come when we look at that time.
            start.saturating_add(
                u64::try_from((u128::from(tick) * u128::from(NS)).div_ceil(HZ.into())).unwrap_or(u64::MAX),
            )
        };
        let elapsed = self.elapsed(now);
        if self.periodic() {
            return Some(at((elapsed / ticks + 1) * ticks));
        }
        (elapsed < ticks).then(|| at(ticks))
    }

    fn control(&mut self, word: u8) {
        *self = Self {
            mode: match word >> 1 & 7 {
                mode @ 6..=7 => mode - 4,
                mode => mode,
            },
            bcd: word & 1 != 0,
            access: word >> 4 & 3,
            gate: self.gate,
            ..Self::default()
        };
    }

    fn write(&mut self, byte: u8, now: u64) {
        match (self.access, self.write_high_next) {
            (1, _) => self.reload = byte.into(),
            (2, _) => self.reload = u16::from(byte) << 8,
            (_, false) => {
                self.low_written = byte;
                self.write_high_next = true;
                if self.mode == 0 {
                    self.start = None;
                }
                return;
            }
            (_, true) => {
                self.reload = u16::from(byte) << 8 | u16::from(self.low_written);
                self.write_high_next = false;
            }
        }
        // Modes 1 and 5 wait for the gate's edge; the others count once loaded while the gate is open.
        if !matches!(self.mode, 1 | 5) {
            self.start = self.gate.then_some(now);
        }
    }

    fn read(&mut self, now: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let value = self.latched.unwrap_or_else(|| self.count(now));
        let high = match self.access {
            1 => false,
            2 => true,
            _ => {
                self.read_high_next = !self.read_high_next;
                !self.read_high_next
            }
        };
        if high || self.access == 1 {
            self.latched = None;
        }
        (value >> if high { 8 } else { 0 }) as u8
    }

    fn latch(&mut self, now: u64) {
        self.latched = self.latched.or_else(|| Some(self.count(now)));
    }

    fn latch_status(&mut self, now: u64) {
        let null = u8::from(self.start.is_none()) << 6;
        let status = u8::from(self.output(now)) << 7 | null | self.access << 4 | self.mode << 1 | u8::from(self.bcd);
        self.latched_status = self.latched_status.or(Some(status));
    }

    /// A rising gate starts or restarts; a low gate stops (the count then stands at its start, which nobody reads).
    fn set_gate(&mut self, gate: bool, now: u64) {
        let rising = gate && !self.gate;
        self.gate = gate;
        if rising {
            self.start = Some(now);
        } else if !gate && !matches!(self.mode, 1 | 5) {
            self.start = None;
        }
    }
}

fn from_bcd(value: u16) -> u64 {
    (0..4).rev().fold(0, |sum, digit| sum * 10 + u64::from(value >> (4 * digit) & 0xf))
}

fn to_bcd(value: u64) -> u16 {
    (0..4).fold(0, |sum, digit| sum | ((value / 10_u64.pow(digit) % 10) as u16) << (4 * digit))
}

impl PitState {
    /// The registers at clock time `now`.
    pub(crate) fn to_registers(self, now: u64) -> PitRegisters {
        let channel = |c: ChannelState| PitChannel {
            mode: c.mode,
            bcd: c.bcd,
            access: c.access,
            reload: c.reload,
            age: c.start.map(|start| now.saturating_sub(start)),
            gate: c.gate,
            write_high_next: c.write_high_next,
            low_written: c.low_written,
            read_high_next: c.read_high_next,
            latched: c.latched,
            latched_status: c.latched_status,
        };
        let mut channels = self.channels.map(channel);
        let [first, ..] = &mut channels;
        if !self.channels[0].periodic()
            && let (Some(next), Some(start)) = (self.next, self.channels[0].start)
        {
            // What is due has not come yet: a little is left.
            first.age = first.age.map(|age| age.min(next.saturating_sub(start).saturating_sub(1)));
        }
        PitRegisters { channels, speaker: self.speaker }
    }

    /// The state that has these registers at clock time `now`.
    pub(crate) fn from_registers(registers: &PitRegisters, now: u64) -> Self {
        let channel = |c: PitChannel| ChannelState {
            mode: c.mode,
            bcd: c.bcd,
            // Never programmed: as after power-on.
            access: if c.access == 0 { 3 } else { c.access },
            reload: c.reload,
            start: c.age.map(|age| now.saturating_sub(age)),
            gate: c.gate,
            write_high_next: c.write_high_next,
            low_written: c.low_written,
            read_high_next: c.read_high_next,
            latched: c.latched,
            latched_status: c.latched_status,
        };
        let channels = registers.channels.map(channel);
        Self { channels, speaker: registers.speaker, next: channels[0].next_rise(now) }
    }

    /// Is it a state that the chip can be in?
    pub(crate) fn check(&self) -> Result<(), StateError> {
        if self.channels.iter().any(|channel| channel.mode > 5 || !(1..=3).contains(&channel.access)) {
            return Err(StateError::new("PIT", format!("{self:?}")));
        }
        Ok(())
    }
}

struct Inner {
    state: PitState,
    irq: IrqLine,
}

impl Inner {
    /// Interrupts if that is due at clock time `now`.
    fn run_due(&mut self, now: u64) {
        if self.state.next.is_some_and(|next| next <= now) {
            self.irq.pulse();
            // A guest that programs a few ticks' period gets fewer interrupts than it asked for.
            let earliest = now.saturating_add(MIN_PERIOD_NS);
            self.state.next = self.state.channels[0].next_rise(now).map(|next| next.max(earliest));
        }
    }
}

/// The chip.
pub struct Pit {
    inner: Mutex<Inner>,
    timer: Timer,
}

impl fmt::Debug for Pit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pit").field("state", &lock(&self.inner).state).finish_non_exhaustive()
    }
}

fn power_on() -> PitState {
    let channel = ChannelState { access: 3, gate: true, ..ChannelState::default() };
    PitState { channels: [channel, channel, ChannelState { gate: false, ..channel }], speaker: false, next: None }
}

impl Pit {
    /// No channel counts. `irq` is IRQ 0.
    pub fn new(queue: &Arc<TimerQueue>, irq: IrqLine) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            inner: Mutex::new(Inner { state: power_on(), irq }),
            timer: queue.timer(this.clone()),
        })
    }

    fn change(&self, change: impl FnOnce(&mut PitState, u64)) {
        let mut inner = lock(&self.inner);
        // One look at the clock: a count that has passed before a second one would be none that is still to come.
        let now = self.timer.clock().now();
        // What was due before the access happens before it.
        inner.run_due(now);
        let before = inner.state.channels[0];
        change(&mut inner.state, now);
        if !inner.state.channels[0].counts_as(&before) {
            inner.state.next = inner.state.channels[0].next_rise(now);
        }
        self.timer.set(inner.state.next);
    }

    /// Power-on.
    pub fn reset(&self) {
        lock(&self.inner).state = power_on();
        self.timer.set(None);
    }

    /// The state; times are the clock's.
    pub fn save(&self) -> PitState {
        lock(&self.inner).state
    }

    /// Takes over a state, after the clock was set to the saved machine's time.
    ///
    /// # Errors
    /// It is none the chip can be in.
    pub fn restore(&self, state: &PitState) -> Result<(), StateError> {
        state.check()?;
        let mut inner = lock(&self.inner);
        inner.state = *state;
        // Not computed anew: what is due by now is still to come.
        self.timer.set(inner.state.next);
        Ok(())
    }
}

impl TimerTarget for Pit {
    fn timer_due(&self) {
        let mut inner = lock(&self.inner);
        inner.run_due(self.timer.clock().now());
        self.timer.set(inner.state.next);
    }
}

/// Ports 0x40 to 0x43.
impl PioDevice for Pit {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        let mut inner = lock(&self.inner);
        let now = self.timer.clock().now();
        if let (Some(channel), Some(byte)) = (inner.state.channels.get_mut(usize::from(offset)), data.first_mut()) {
            *byte = channel.read(now);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        self.change(|state, now| {
            if let Some(channel) = state.channels.get_mut(usize::from(offset)) {
                return channel.write(byte, now);
            }
            match (byte >> 6, byte >> 4 & 3) {
                // Read-back: inverted bits 5 and 4 latch count and status of the channels in bits 3 to 1.
                (3, _) => {
                    for (index, channel) in state.channels.iter_mut().enumerate() {
                        if byte & 2 << index != 0 {
                            if byte & 0x20 == 0 {
                                channel.latch(now);
                            }
                            if byte & 0x10 == 0 {
                                channel.latch_status(now);
                            }
                        }
                    }
                }
                (channel, 0) => state.channels[usize::from(channel)].latch(now),
                (channel, _) => state.channels[usize::from(channel)].control(byte),
            }
        });
    }
}

/// Port 0x61, "system control port B".
#[derive(Debug)]
pub struct Port61(pub Arc<Pit>);

impl PioDevice for Port61 {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
        let inner = lock(&self.0.inner);
        let now = self.0.timer.clock().now();
        let channel = inner.state.channels[2];
        // Bit 4 toggles with each memory refresh, every 15 µs; old delay loops count it.
        let refresh = ((now / 15_085) & 1) as u8;
        if let Some(byte) = data.first_mut() {
            *byte = u8::from(channel.gate)
                | u8::from(inner.state.speaker) << 1
                | refresh << 4
                | u8::from(channel.output(now)) << 5;
        }
    }

    fn pio_write(&self, _: u16, data: &[u8]) {
        let Some(&byte) = data.first() else { return };
        self.0.change(|state, now| {
            state.speaker = byte & 2 != 0;
            state.channels[2].set_gate(byte & 1 != 0, now);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;
    use crate::clock::testing::{advance, manual};
    use crate::irq::testing::Recorder;

    fn rig() -> (Arc<Clock>, Arc<TimerQueue>, Arc<Pit>, Arc<Recorder>) {
        let (clock, queue) = manual();
        let recorder = Arc::new(Recorder::default());
        let pit = Pit::new(&queue, IrqLine::new(recorder.clone(), 0));
        (clock, queue, pit, recorder)
    }

    /// A count is not lost that ends while it is being programmed: the vCPU's thread may not run for a while.
    #[test]
    fn short_counts_are_not_lost() {
        let queue = TimerQueue::new(Arc::new(Clock::hasty(2_000_000))).unwrap();
        let recorder = Arc::new(Recorder::default());
        let pit = Pit::new(&queue, IrqLine::new(recorder.clone(), 0));
        pit.pio_write(3, &[0b0011_0000]); // counter 0, both bytes, mode 0
        // A millisecond.
        pit.pio_write(0, &[0xa9]);
        pit.pio_write(0, &[0x04]);
        queue.run_due();
        assert_eq!(interrupts(&recorder), 1);
    }

    #[test]
    fn what_is_due_comes_before_the_count_is_read() {
        let (clock, queue, pit, recorder) = rig();
        pit.pio_write(3, &[0b0001_0000]); // counter 0, low byte, mode 0
        pit.pio_write(0, &[100]);
        clock.set(1_000_000);
        pit.pio_write(3, &[0]); // latch
        queue.run_due();
        assert_eq!(interrupts(&recorder), 1);
    }

    fn interrupts(recorder: &Recorder) -> usize {
        std::mem::take(&mut *recorder.levels.lock().unwrap()).iter().filter(|(_, high)| *high).count()
    }

    fn read(device: &dyn PioDevice, offset: u16) -> u8 {
        let mut data = [0];
        device.pio_read(offset, &mut data);
        data[0]
    }

    /// Linux's pit_calibrate_tsc and quick_pit_calibrate.
    #[test]
    fn calibration() {
        let (_, queue, pit, _) = rig();
        let port61 = Port61(pit.clone());
        port61.pio_write(0, &[read(&port61, 0) & !2 | 1]);
        pit.pio_write(3, &[0xb0]);
        let latch = (HZ / 20) as u16;
        pit.pio_write(2, &[latch as u8]);
        pit.pio_write(2, &[(latch >> 8) as u8]);
        advance(&queue, 49_000_000);
        assert_eq!(read(&port61, 0) & 0x20, 0);
        advance(&queue, 1_100_000);
        assert_eq!(read(&port61, 0) & 0x20, 0x20);
        pit.pio_write(3, &[0xb0]);
        pit.pio_write(2, &[0xff]);
        pit.pio_write(2, &[0xff]);
        advance(&queue, 300_000);
        read(&*pit, 2);
        assert_eq!(read(&*pit, 2), 0xfe, "the high byte counts down every 214 µs");
    }

    #[test]
    fn periodic_interrupts() {
        let (_, queue, pit, recorder) = rig();
        // HZ=250 in mode 2.
        pit.pio_write(3, &[0x34]);
        let latch = ((HZ + 125) / 250) as u16;
        pit.pio_write(0, &[latch as u8]);
        pit.pio_write(0, &[(latch >> 8) as u8]);
        advance(&queue, 1_000_000_000);
        assert!((249..=250).contains(&interrupts(&recorder)));
        pit.pio_write(3, &[0x30]);
        advance(&queue, 1_000_000_000);
        assert_eq!(interrupts(&recorder), 0, "no count yet");
        pit.pio_write(0, &[0x00]);
        pit.pio_write(0, &[0x10]);
        advance(&queue, 1_000_000_000);
        assert_eq!(interrupts(&recorder), 1, "one shot");
        pit.pio_write(3, &[0x14]);
        pit.pio_write(0, &[1]);
        advance(&queue, 10_000_000);
        assert!(interrupts(&recorder) <= 600, "the host is not flooded");
    }

    #[test]
    fn latch_and_read_back() {
        let (_, queue, pit, _) = rig();
        pit.pio_write(3, &[0x34]);
        pit.pio_write(0, &[0]);
        pit.pio_write(0, &[0]);
        advance(&queue, 1_000_000);
        pit.pio_write(3, &[0x00]);
        advance(&queue, 10_000_000);
        let count = u32::from(read(&*pit, 0)) | u32::from(read(&*pit, 0)) << 8;
        assert_eq!(0x1_0000 - count, 1193);
        pit.pio_write(3, &[0xe2]);
        assert_eq!(read(&*pit, 0), 0xb4);
        pit.pio_write(3, &[0xc2]);
        assert_eq!(read(&*pit, 0), 0xb4, "status first");
        let first = u32::from(read(&*pit, 0)) | u32::from(read(&*pit, 0)) << 8;
        assert_eq!(u64::from(0x1_0000 - first), 11_000_000 * HZ / NS);
    }

    /// A chip that is saved in the middle of its counts goes on there, in the machine's own form and in the engines'.
    #[test]
    fn counts_keep_their_phase() {
        let (clock, queue, pit, _) = rig();
        let port61 = Port61(pit.clone());
        // Channel 0: 10 ms, again and again; channel 2: once, in 20 ms.
        for (port, value) in [(3, 0x34), (0, 0x9c), (0, 0x2e), (3, 0xb0), (2, 0x38), (2, 0x5d)] {
            if port == 2 {
                port61.pio_write(0, &[1]);
            }
            pit.pio_write(port, &[value]);
        }
        advance(&queue, 7_000_000);
        let by_registers = PitState::from_registers(&pit.save().to_registers(clock.now()), 90_000_000);
        for (now, state) in [(clock.now(), pit.save()), (90_000_000, by_registers)] {
            let (clock, queue, other, recorder) = rig();
            let port61 = Port61(other.clone());
            clock.set(now);
            other.restore(&state).unwrap();
            advance(&queue, 2_900_000);
            assert_eq!(interrupts(&recorder), 0);
            advance(&queue, 200_000);
            assert_eq!(interrupts(&recorder), 1, "10 ms after the first");
            advance(&queue, 9_800_000);
            assert_eq!((interrupts(&recorder), read(&port61, 0) & 0x20), (0, 0));
            advance(&queue, 200_000);
            assert_eq!((interrupts(&recorder), read(&port61, 0) & 0x20), (1, 0x20));
        }
    }

    /// A count that ends between the last look at it and its saving, or while the machine stands, interrupts in the one that goes on, once.
    #[test]
    fn a_count_that_ended_in_the_moment_of_saving() {
        let (clock, _, pit, _) = rig();
        for (port, value) in [(3, 0x30), (0, 0x9c), (0, 0x2e)] {
            pit.pio_write(port, &[value]);
        }
        // Nobody looks: the clock goes on, and no timer is run.
        clock.set(15_000_000);
        let registers = pit.save().to_registers(clock.now());
        assert!(registers.channels[0].age < Some(10_001_000), "a little is left");
        for (now, state) in [(15_000_000, pit.save()), (90_000_000, PitState::from_registers(&registers, 90_000_000))] {
            let (clock, queue, other, recorder) = rig();
            clock.set(now);
            other.restore(&state).unwrap();
            advance(&queue, 1_000);
            assert_eq!(interrupts(&recorder), 1);
            advance(&queue, 100_000_000);
            assert_eq!(interrupts(&recorder), 0);
            let (clock, queue, last, recorder) = rig();
            clock.set(now + 200_000_000);
            last.restore(&other.save()).unwrap();
            advance(&queue, 100_000_000);
            assert_eq!(interrupts(&recorder), 0, "not once more");
            let ended = other.save().to_registers(now + 100_001_000);
            assert!(ended.channels[0].age > Some(10_000_000));
        }
    }

    #[test]
    fn bcd_and_state() {
        assert_eq!((from_bcd(0x1234), to_bcd(9876)), (1234, 0x9876));
        let (clock, _, pit, _) = rig();
        pit.pio_write(3, &[0x31]);
        pit.pio_write(0, &[0x00]);
        pit.pio_write(0, &[0x10]);
        let state = pit.save();
        let (other_clock, queue, other, recorder) = rig();
        other_clock.set(clock.now());
        other.restore(&state).unwrap();
        assert_eq!(other.save(), state);
        advance(&queue, 1_000_000);
        assert_eq!(interrupts(&recorder), 1, "1000 ticks");
        let mut bad = state;
        bad.channels[0].mode = 6;
        assert!(other.restore(&bad).is_err());
    }
}
