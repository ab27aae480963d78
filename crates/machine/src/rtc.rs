//! The MC146818 real-time clock with its CMOS memory, ports 0x70 and 0x71, IRQ 8. It shows the host's UTC, plus what the guest set
//! it off by: also after the host's clock was set, the host slept or the VM was saved. An alarm that was passed meanwhile goes off then.

use std::fmt;
use std::sync::{Arc, Mutex, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::bus::PioDevice;
use crate::clock::{Timer, TimerQueue, TimerTarget};
use crate::irq::IrqLine;
use crate::state::{StateError, lock};

/// First port; there are 2.
pub const PORT: u16 = 0x70;
/// ISA IRQ.
pub const IRQ: u32 = 8;
/// CMOS byte that holds the century, as the FADT says.
pub const CENTURY: u8 = 0x32;

const NS: u64 = 1_000_000_000;
const A: usize = 10;
const B: usize = 11;
const C: usize = 12;
const D: usize = 13;
const B_SET: u8 = 0x80;
const B_PERIODIC: u8 = 0x40;
const B_ALARM: u8 = 0x20;
const B_UPDATE: u8 = 0x10;
const B_BINARY: u8 = 4;
const B_24H: u8 = 2;
/// "Update in progress" shows this long before the second ends.
const UPDATE_NS: u64 = 244_000;

/// Saved state of [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    index: u8,
    /// All 128 bytes; time and date (bytes 0, 2, 4, 6 to 9 and the century) count only while the guest has stopped updates.
    memory: Vec<u8>,
    /// Seconds the guest's time is ahead of UTC.
    offset: i64,
    /// Clock time up to which the periodic flag in register C is right.
    seen: u64,
    /// The second, as the guest counts, up to which the other flags are.
    seen_second: i64,
}

struct Inner {
    state: RtcState,
    irq: IrqLine,
    utc: Utc,
}

/// The host's UTC in ns since 1970, when the machine's clock says what is given.
type Utc = Box<dyn Fn(u64) -> u64 + Send + Sync>;

/// The chip.
pub struct Rtc {
    inner: Mutex<Inner>,
    timer: Timer,
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("state", &lock(&self.inner).state).finish_non_exhaustive()
    }
}

/// A date and time of day, UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

/// Years of 365.2425 days counted from March, as is usual for this.
fn from_unix(seconds: i64) -> Date {
    let (days, rest) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let shifted = days + 719_468;
    let (era, in_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
    let day_of_year = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    Date {
        year: era * 400 + year_of_era + i64::from(month <= 2),
        month: month as u8,
        day: (day_of_year - (153 * month_from_march + 2) / 5 + 1) as u8,
        hour: (rest / 3600) as u8,
        minute: (rest / 60 % 60) as u8,
        second: (rest % 60) as u8,
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
    }
}

fn to_unix(date: &Date) -> i64 {
    let month = i64::from(date.month.clamp(1, 12));
    let year = date.year - i64::from(month <= 2);
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(date.day) - 1;
    let days = era * 146_097 + year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year - 719_468;
    days * 86_400 + i64::from(date.hour) * 3600 + i64::from(date.minute) * 60 + i64::from(date.second)
}

impl RtcState {
    fn byte(&self, index: usize) -> u8 {
        self.memory.get(index).copied().unwrap_or(0)
    }

    fn set(&mut self, index: usize, value: u8) {
        if let Some(byte) = self.memory.get_mut(index) {
            *byte = value;
        }
    }

    fn encode(&self, value: u8) -> u8 {
        if self.byte(B) & B_BINARY != 0 { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.byte(B) & B_BINARY != 0 { value } else { (value >> 4).saturating_mul(10).saturating_add(value & 0xf) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.byte(B) & B_24H != 0 {
            return self.encode(hour);
        }
        self.encode(match hour % 12 {
            0 => 12,
            hour => hour,
        }) | if hour >= 12 { 0x80 } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.byte(B) & B_24H != 0 {
            return self.decode(value);
        }
        self.decode(value & 0x7f) % 12 + if value & 0x80 != 0 { 12 } else { 0 }
    }

    /// The time registers in the guest's format.
    fn store_time(&mut self, seconds: i64) {
        let date = from_unix(seconds);
        let fields = [
            (0, self.encode(date.second)),
            (2, self.encode(date.minute)),
            (4, self.encode_hour(date.hour)),
            (6, self.encode(date.weekday)),
            (7, self.encode(date.day)),
            (8, self.encode(date.month)),
            (9, self.encode(date.year.rem_euclid(100) as u8)),
            (CENTURY.into(), self.encode(date.year.div_euclid(100).clamp(0, 99) as u8)),
        ];
        for (index, value) in fields {
            self.set(index, value);
        }
    }

    fn load_time(&self) -> i64 {
        let field = |index| self.decode(self.byte(index));
        to_unix(&Date {
            year: i64::from(field(CENTURY.into())) * 100 + i64::from(field(9)),
            month: field(8),
            day: field(7),
            hour: self.decode_hour(self.byte(4)),
            minute: field(2),
            second: field(0),
            weekday: 1,
        })
    }

    /// ns between periodic interrupts, if they run.
    fn period(&self) -> Option<u64> {
        let rate = match self.byte(A) & 0xf {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some((NS << (rate - 1)) / 32_768)
    }

    /// Does the alarm go off at this second? Bytes with both high bits set match all.
    fn alarm_matches(&self, seconds: i64) -> bool {
        let date = from_unix(seconds);
        let matches = |index, value| self.byte(index) & 0xc0 == 0xc0 || self.byte(index) == value;
        matches(1, self.encode(date.second))
            && matches(3, self.encode(date.minute))
            && matches(5, self.encode_hour(date.hour))
    }
}

impl Inner {
    fn utc_ns(&self, now: u64) -> u64 {
        (self.utc)(now)
    }

    fn seconds(&self, now: u64) -> i64 {
        ((self.utc_ns(now) / NS) as i64).saturating_add(self.state.offset)
    }

    fn stopped(&self) -> bool {
        self.state.byte(B) & B_SET != 0
    }

    /// Sets the flags of all that has happened since the last look, and the interrupt wire.
    fn catch_up(&mut self, now: u64) {
        let seen = std::mem::replace(&mut self.state.seen, now);
        let mut flags = self.state.byte(C) & 0x70;
        if self.state.period().is_some_and(|period| now / period > seen / period) {
            flags |= B_PERIODIC;
        }
        let after = self.seconds(now);
        // Set back, it goes on from there.
        let before = std::mem::replace(&mut self.state.seen_second, after);
        if !self.stopped() && after > before {
            flags |= B_UPDATE;
            let first = (before + 1).max(after.saturating_sub(86_400));
            if flags & B_ALARM == 0 && (first..=after).any(|second| self.state.alarm_matches(second)) {
                flags |= B_ALARM;
            }
        }
        let interrupt = flags & self.state.byte(B) & 0x70 != 0;
        self.state.set(C, flags | if interrupt { 0x80 } else { 0 });
        self.irq.set(interrupt);
    }

    /// When to look again, for interrupts.
    fn next_event(&self, now: u64) -> Option<u64> {
        let b = self.state.byte(B);
        // While the wire is high nothing new can come.
        if self.state.byte(C) & 0x80 != 0 {
            return None;
        }
        let periodic =
            self.state.period().filter(|_| b & B_PERIODIC != 0).map(|period| (now / period + 1).saturating_mul(period));
        let second =
            (b & (B_UPDATE | B_ALARM) != 0 && b & B_SET == 0).then(|| now.saturating_add(NS - self.utc_ns(now) % NS));
        periodic.into_iter().chain(second).min()
    }

    fn read(&mut self, now: u64) -> u8 {
        let index = usize::from(self.state.index);
        match index {
            0 | 2 | 4 | 6..=9 if !self.stopped() => {
                let seconds = self.seconds(now);
                self.state.store_time(seconds);
                self.state.byte(index)
            }
            A => {
                let updating = !self.stopped() && self.utc_ns(now) % NS >= NS - UPDATE_NS;
                self.state.byte(A) & 0x7f | if updating { 0x80 } else { 0 }
            }
            C => {
                let flags = self.state.byte(C);
                self.state.set(C, 0);
                self.irq.set(false);
                flags
            }
            D => 0x80,
            index => {
                if index == usize::from(CENTURY) && !self.stopped() {
                    let seconds = self.seconds(now);
                    self.state.store_time(seconds);
                }
                self.state.byte(index)
            }
        }
    }

    fn write(&mut self, value: u8, now: u64) {
        let index = usize::from(self.state.index);
        match index {
            0 | 2 | 4 | 6..=9 | 0x32 => {
                if !self.stopped() {
                    let seconds = self.seconds(now);
                    self.state.store_time(seconds);
                }
                self.state.set(index, value);
                if !self.stopped() {
                    self.set_from_registers(now);
                }
            }
            A => self.state.set(A, value & 0x7f),
            B => {
                let was_stopped = self.stopped();
                if !was_stopped && value & B_SET != 0 {
                    let seconds = self.seconds(now);
                    self.state.store_time(seconds);
                }
                // Stopping also switches the update interrupt off.
                self.state.set(B, if value & B_SET != 0 { value & !B_UPDATE } else { value });
                if was_stopped && value & B_SET == 0 {
                    self.set_from_registers(now);
                }
            }
            C | D => {}
            index => self.state.set(index, value),
        }
    }

    fn set_from_registers(&mut self, now: u64) {
        self.state.offset = self.state.load_time().saturating_sub((self.utc_ns(now) / NS) as i64);
        // Seconds that were left out by setting it have not come.
        self.state.seen_second = self.seconds(now);
    }
}

fn power_on() -> RtcState {
    let mut memory = vec![0; 128];
    (memory[A], memory[B], memory[D]) = (0x26, B_24H, 0x80);
    RtcState { index: 0, memory, offset: 0, seen: 0, seen_second: 0 }
}

fn host_utc() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
}

impl Rtc {
    /// Shows the host's UTC.
    pub fn new(queue: &Arc<TimerQueue>, irq: IrqLine) -> Arc<Self> {
        Self::with_utc(queue, irq, Box::new(|_| host_utc()))
    }

    fn with_utc(queue: &Arc<TimerQueue>, irq: IrqLine, utc: Utc) -> Arc<Self> {
        let now = queue.clock().now();
        let state = RtcState { seen: now, seen_second: (utc(now) / NS) as i64, ..power_on() };
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            inner: Mutex::new(Inner { state, irq, utc }),
            timer: queue.timer(this.clone()),
        })
    }

    fn access<T>(&self, access: impl FnOnce(&mut Inner, u64) -> T) -> T {
        let mut inner = lock(&self.inner);
        let now = self.timer.clock().now();
        inner.catch_up(now);
        let result = access(&mut inner, now);
        inner.catch_up(now);
        self.timer.set(inner.next_event(now));
        result
    }

    /// A reset leaves time and memory, and switches interrupts off.
    pub fn reset(&self) {
        self.access(|inner, _| {
            let b = inner.state.byte(B) & !(B_PERIODIC | B_ALARM | B_UPDATE);
            inner.state.set(B, b);
            inner.state.set(C, 0);
        });
    }

    /// The state.
    pub fn save(&self) -> RtcState {
        self.access(|inner, _| inner.state.clone())
    }

    /// Takes over a state, after the clock was set to the saved machine's time. The time shown is the host's of now; an alarm of the time
    /// between goes off.
    ///
    /// # Errors
    /// The memory has not its 128 bytes.
    pub fn restore(&self, state: &RtcState) -> Result<(), StateError> {
        if state.memory.len() != 128
            || state.index > 127
            || [state.offset, state.seen_second].iter().any(|seconds| seconds.unsigned_abs() > 1 << 41)
        {
            return Err(StateError::new("RTC", format!("{} bytes", state.memory.len())));
        }
        let mut inner = lock(&self.inner);
        let now = self.timer.clock().now();
        inner.state = state.clone();
        inner.state.seen = now;
        inner.catch_up(now);
        self.timer.set(inner.next_event(now));
        Ok(())
    }
}

impl TimerTarget for Rtc {
    fn timer_due(&self) {
        self.access(|_, _| ());
    }
}

impl PioDevice for Rtc {
    fn pio_read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(byte)) = (offset, data.first_mut()) {
            *byte = self.access(Inner::read);
        }
    }

    fn pio_write(&self, offset: u16, data: &[u8]) {
        for (index, byte) in data.iter().enumerate() {
            match offset + index as u16 {
                // Bit 7 disables NMIs, of which this machine has none.
                0 => lock(&self.inner).state.index = byte & 0x7f,
                _ => self.access(|inner, now| inner.write(*byte, now)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::testing::{advance, manual};
    use crate::irq::testing::Recorder;
    use std::sync::atomic::{AtomicI64, Ordering};

    struct Rig(Arc<Rtc>, Arc<TimerQueue>);
    impl Rig {
        fn new(utc: u64) -> Self {
            Self::with_step(utc).0
        }
        /// Also what the host's clock is set ahead by when this is stored.
        fn with_step(utc: u64) -> (Self, Arc<AtomicI64>) {
            let (_, queue) = manual();
            let step = Arc::new(AtomicI64::new(0));
            let host = step.clone();
            let utc = move |now: u64| (utc + now).wrapping_add_signed(host.load(Ordering::SeqCst));
            (Self(Rtc::with_utc(&queue, IrqLine::new(Arc::new(Recorder::default()), 8), Box::new(utc)), queue), step)
        }
        fn clock_of_day(&self) -> [u8; 3] {
            [4, 2, 0].map(|index| self.read(index))
        }
        fn read(&self, index: u8) -> u8 {
            let mut data = [0];
            self.0.pio_write(0, &[index]);
            self.0.pio_read(1, &mut data);
            data[0]
        }
        fn write(&self, index: u8, value: u8) {
            self.0.pio_write(0, &[index]);
            self.0.pio_write(1, &[value]);
        }
        fn irq(&self) -> bool {
            lock(&self.0.inner).irq.is_high()
        }
    }

    #[test]
    fn dates() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_795_132_800, 2026, 11, 20, 6),
            (4_107_542_400, 2100, 3, 1, 2),
        ] {
            let date = from_unix(seconds);
            assert_eq!((date.year, date.month, date.day, date.weekday), (year, month, day, weekday));
        }
        for seconds in (0..5_000_000_000_i64).step_by(12_345_678) {
            assert_eq!(to_unix(&from_unix(seconds)), seconds);
        }
    }

    #[test]
    fn shows_utc_and_can_be_set() {
        // 2026-11-20 15:04:05 UTC.
        let rig = Rig::new(1_795_187_045 * NS);
        let time = || [0x32, 9, 8, 7, 4, 2, 0].map(|index| rig.read(index));
        assert_eq!(time(), [0x20, 0x26, 0x11, 0x20, 0x15, 0x04, 0x05]);
        rig.write(B as u8, B_24H | B_BINARY);
        assert_eq!(time(), [20, 26, 11, 20, 15, 4, 5]);
        rig.write(B as u8, 0);
        assert_eq!(rig.read(4), 0x83, "3 p.m.");
        rig.write(B as u8, B_24H);
        assert_eq!(rig.read(D as u8), 0x80);
        // As hwclock does: stop, set, go.
        rig.write(B as u8, B_SET | B_24H);
        rig.write(9, 0x31);
        rig.write(0, 0x59);
        advance(&rig.1, 5 * NS);
        assert_eq!(rig.read(0), 0x59, "stopped");
        rig.write(B as u8, B_24H);
        advance(&rig.1, NS);
        assert_eq!(time(), [0x20, 0x31, 0x11, 0x20, 0x15, 0x05, 0x00]);
        rig.write(0x40, 0x77);
        assert_eq!(rig.read(0x40), 0x77);
    }

    #[test]
    fn update_in_progress() {
        let rig = Rig::new(100 * NS);
        assert_eq!(rig.read(A as u8), 0x26);
        advance(&rig.1, NS - 200_000);
        assert_eq!(rig.read(A as u8), 0xa6);
        advance(&rig.1, 200_000);
        assert_eq!(rig.read(A as u8), 0x26);
        assert_eq!(rig.read(C as u8), B_UPDATE | B_PERIODIC, "the flags without interrupt");
        assert_eq!(rig.read(C as u8), 0);
    }

    #[test]
    fn interrupts() {
        let rig = Rig::new(100 * NS);
        rig.write(B as u8, B_24H | B_PERIODIC);
        advance(&rig.1, 976_563);
        assert!(rig.irq(), "1024 Hz");
        assert_eq!(rig.read(C as u8), 0xc0);
        assert!(!rig.irq());
        rig.write(B as u8, B_24H | B_UPDATE);
        advance(&rig.1, NS);
        assert_eq!(rig.read(C as u8) & 0x90, 0x90);
        // 00:01:40 now and some; the alarm at 45 s of any minute and hour.
        rig.write(1, 0x45);
        rig.write(3, 0xff);
        rig.write(5, 0xff);
        rig.read(C as u8);
        rig.write(B as u8, B_24H | B_ALARM);
        advance(&rig.1, 3 * NS);
        assert!(!rig.irq());
        advance(&rig.1, 2 * NS);
        assert!(rig.irq());
        assert_eq!(rig.read(C as u8) & 0xa0, 0xa0);
        advance(&rig.1, 58 * NS);
        assert!(!rig.irq());
        advance(&rig.1, NS);
        assert!(rig.irq());
        rig.0.reset();
        assert!(!rig.irq());
    }

    /// Alarm at 00:10:00.
    fn arm(rig: &Rig) {
        for (index, value) in [(1, 0), (3, 0x10), (5, 0)] {
            rig.write(index, value);
        }
        rig.read(C as u8);
        rig.write(B as u8, B_24H | B_ALARM);
    }

    #[test]
    fn follows_the_hosts_clock() {
        let (rig, step) = Rig::with_step(100 * NS);
        assert_eq!(rig.clock_of_day(), [0, 0x01, 0x40]);
        // The host's clock is set, or the host slept: seen at once, and an alarm of that time goes off within a second.
        arm(&rig);
        step.store(3600 * NS as i64, Ordering::SeqCst);
        assert!(!rig.irq());
        advance(&rig.1, NS);
        assert!(rig.irq());
        assert_eq!(rig.read(C as u8) & 0xa0, 0xa0);
        assert_eq!(rig.clock_of_day(), [0x01, 0x01, 0x41]);
        // Set back, the alarm comes again at its time.
        step.store(0, Ordering::SeqCst);
        advance(&rig.1, NS);
        assert!(!rig.irq());
        assert_eq!(rig.clock_of_day(), [0, 0x01, 0x42]);
        advance(&rig.1, (600 - 103) * NS);
        assert!(!rig.irq());
        advance(&rig.1, NS);
        assert!(rig.irq());
        // What the guest set it to stays as far from the host's time as it was.
        rig.read(C as u8);
        rig.write(4, 0x05);
        assert!(!rig.irq(), "leaving seconds out is no alarm");
        step.store(-60 * NS as i64, Ordering::SeqCst);
        assert_eq!(rig.clock_of_day(), [0x05, 0x09, 0x00]);
    }

    #[test]
    fn an_alarm_passed_while_saved_goes_off() {
        let rig = Rig::new(100 * NS);
        arm(&rig);
        let state = rig.0.save();
        let (early, late) = (Rig::new(599 * NS), Rig::new(5000 * NS));
        for (rig, goes_off) in [(&early, false), (&late, true)] {
            rig.0.restore(&state).unwrap();
            assert_eq!(rig.irq(), goes_off);
        }
        advance(&early.1, NS);
        assert!(early.irq());
    }

    #[test]
    fn state() {
        let rig = Rig::new(100 * NS);
        rig.write(0x50, 9);
        let state = rig.0.save();
        let other = Rig::new(1_795_187_045 * NS);
        other.0.restore(&state).unwrap();
        assert_eq!(other.read(0x50), 9);
        assert_eq!(other.read(9), 0x26, "the host's time of now");
        assert!(other.0.restore(&RtcState { seen_second: i64::MIN, ..state.clone() }).is_err());
        assert!(other.0.restore(&RtcState { memory: vec![0; 5], ..state }).is_err());
    }
}
