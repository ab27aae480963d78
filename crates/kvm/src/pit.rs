//! The kernel's PIT, and the phase of its counts: the kernel tells the phase of channels 1 and 2 only, and starts all counts anew when it is
//! given a state.
//!
//! * Channel 0's phase is found out by waiting for its next interrupt, while the vCPUs stand still: 55 ms at most, and some more for one that
//!   does not come any more.
//! * The kernel raises that interrupt in a thread of its own, which may get the CPU late, and step by step. So that no interrupt is lost that is
//!   on its way, the chip is given a state at last: the kernel waits for its thread before it takes one.
//! * A count that is to end once is given what is left of it; if it has ended, or is not loaded yet, [`NEVER`].
//! * A count that goes round and round is loaded when a round begins, which is waited for: channel 0's, or else channel 2's. Of two such
//!   counts channel 2's begins anew.

use std::time::Duration;

use cpu::chips::{PitChannel, PitRegisters};
use kvm_bindings as b;
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::ioctls::KVM_REINJECT_CONTROL;
use crate::refusal::refused;

/// Input frequency in Hz.
const HZ: u64 = 1_193_182;
const NS: u64 = 1_000_000_000;
/// The mode of a channel that the kernel has after its power-on, when nothing counts.
const NOTHING_COUNTS: u8 = 0xff;
/// A count that takes an hour, and that no guest can load: longer than 16 bits. Channel 0 cannot be kept from counting in a mode that
/// interrupts; guests that program the count alone need the mode.
const NEVER: u32 = u32::MAX;
/// Where the kernel would keep the date of channel 0's load, were it to: its count has ended.
const ENDED: i64 = -1;
/// Flag of the PIT's state: port 0x61, bit 1.
const SPEAKER_ON: u32 = 2;
/// How often is looked for an interrupt.
const LOOK: Duration = Duration::from_micros(50);
/// The host's timer of an interrupt runs out so much later than it is due at most, in ns.
const LATE: u64 = 10_000_000;
/// So often is looked again after that. Where the whole machine has stood still meanwhile, as virtual ones may, the time is over before its
/// timers have run out: they do when it sleeps next.
const LAST_LOOKS: u32 = 20;

/// What lies around the PIT in its VM, and time.
pub trait Around {
    /// The kernel's state of the PIT.
    fn pit(&self) -> Result<b::kvm_pit_state2, String>;
    /// Gives it one. All its counts begin anew; what counts before that ended have to say has been said when this returns.
    fn set_pit(&self, state: &b::kvm_pit_state2) -> Result<(), String>;
    /// Has an interrupt of channel 0 reached the PIC, which nobody has taken?
    fn has_ticked(&self) -> Result<bool, String>;
    /// Sets that.
    fn set_ticked(&self, ticked: bool) -> Result<(), String>;
    /// An interrupt of channel 0.
    fn tick(&self);
    /// See [`monotonic`].
    fn now(&self) -> u64 {
        monotonic()
    }
    /// Lets time pass.
    fn sleep(&self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Now, on the clock by which the kernel dates counts, in ns.
pub fn monotonic() -> u64 {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid place for the result.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    (now.tv_sec as u64).wrapping_mul(NS).wrapping_add(now.tv_nsec as u64)
}

/// Makes the chip in `vm`.
pub fn create(vm: &VmFd) -> Result<(), String> {
    // Port 0x61 belongs to the PIT's channel 2 and goes with it.
    let config = b::kvm_pit_config { flags: b::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
    vm.create_pit2(config).map_err(refused("a timer chip"))?;
    // Interrupts that the guest was too slow for are merged, as under the other engines; and channel 0 goes on while vCPUs stand still.
    // Where the kernel cannot do that, the phase is not found out.
    let control = b::kvm_reinject_control { pit_reinject: 0, ..Default::default() };
    // SAFETY: the kernel reads the structure only.
    let _ = unsafe { ioctl_with_ref(vm, KVM_REINJECT_CONTROL(), &control) };
    Ok(())
}

/// Does this mode go round and round?
fn periodic(mode: u8) -> bool {
    matches!(mode, 2 | 3)
}

/// Does channel 0 interrupt once in this mode?
fn once(mode: u8) -> bool {
    matches!(mode, 0 | 1 | 4)
}

/// How long a count takes, in ns; 0 stands for 65536.
fn length(count: u32) -> u64 {
    let ticks = if count == 0 { 0x1_0000 } else { u64::from(count) };
    (ticks * NS).div_ceil(HZ)
}

/// What is left of a count that was loaded `age` ns ago; of one that has ended 1, as its output is high from the first tick on.
fn left(count: u32, age: u64) -> u32 {
    let gone = u128::from(age) * u128::from(HZ) / u128::from(NS);
    let count = if count == 0 { 0x1_0000 } else { count };
    count.saturating_sub(u32::try_from(gone).unwrap_or(u32::MAX)).max(1)
}

/// The chip of a stopped VM.
pub struct Stopped {
    state: b::kvm_pit_state2,
    /// When channel 0's count was or might have been loaded; `None`: nothing counts there.
    loaded: Option<u64>,
}

impl Stopped {
    /// Looks at it; takes as long as the guest's PIT takes to interrupt, or as it would take: 70 ms at most on a host that is not busy.
    /// Afterwards a count that was to end once has ended.
    pub fn look(around: &impl Around) -> Result<Self, String> {
        let state = around.pit()?;
        let [first, ..] = &state.channels;
        let now = || around.now();
        if first.count > 0x1_0000 {
            let loaded = (first.count_load_time == ENDED).then(|| now().saturating_sub(length(0)));
            return Ok(Self { state, loaded });
        }
        if !periodic(first.mode) && !once(first.mode) {
            return Ok(Self { state, loaded: None });
        }
        let before = around.has_ticked()?;
        if before {
            around.set_ticked(false)?;
        }
        let length = length(first.count);
        // What is to end once ends now, or has ended before.
        let tick = next_tick(around, length + LATE)?.unwrap_or_else(now);
        let loaded = if periodic(first.mode) { tick } else { tick.saturating_sub(length) };
        let stopped = Self { state, loaded: Some(loaded) };
        // An interrupt that is on its way arrives, everywhere.
        around.set_pit(&stopped.going_on(now()))?;
        if before && !around.has_ticked()? {
            around.set_ticked(true)?;
        }
        Ok(stopped)
    }

    /// The kernel's state with which the chip goes on, should the VM, after channel 0's count has ended or a round of it: begun anew at the
    /// time `now`.
    fn going_on(&self, now: u64) -> b::kvm_pit_state2 {
        let mut state = self.state;
        let [first, others @ ..] = &mut state.channels;
        if once(first.mode) {
            (first.count, first.count_load_time) = (NEVER, ENDED);
        }
        for channel in others {
            if !periodic(channel.mode) && channel.mode != NOTHING_COUNTS {
                channel.count = left(channel.count, now.saturating_sub(channel.count_load_time as u64));
            }
        }
        state
    }

    /// Its registers at the time `now`.
    pub fn registers(&self, now: u64) -> PitRegisters {
        let channel = |c: &b::kvm_pit_channel_state, age: Option<u64>| PitChannel {
            mode: if c.mode > 5 { 0 } else { c.mode },
            bcd: c.bcd != 0,
            access: c.rw_mode & 3,
            reload: c.count as u16,
            age,
            gate: c.gate != 0,
            write_high_next: c.write_state == 4,
            low_written: c.write_latch,
            read_high_next: c.read_state == 4,
            latched: (c.count_latched != 0).then_some(c.latched_count),
            latched_status: (c.status_latched != 0).then_some(c.status),
        };
        let [first, second, third] = &self.state.channels;
        let age = |c: &b::kvm_pit_channel_state| {
            (c.mode != NOTHING_COUNTS).then(|| now.saturating_sub(c.count_load_time as u64))
        };
        let channels = [
            channel(first, self.loaded.map(|loaded| now.saturating_sub(loaded))),
            channel(second, age(second)),
            channel(third, age(third)),
        ];
        PitRegisters { channels, speaker: self.state.flags & SPEAKER_ON != 0 }
    }
}

/// When channel 0 interrupts, if that is seen within `limit` ns. What has not been seen by then may still be on its way.
fn next_tick(around: &impl Around, limit: u64) -> Result<Option<u64>, String> {
    let began = around.now();
    let mut last_looks = 0;
    loop {
        let now = around.now();
        if around.has_ticked()? {
            return Ok(Some(now));
        }
        if now.saturating_sub(began) > limit {
            if last_looks == LAST_LOOKS {
                return Ok(None);
            }
            last_looks += 1;
        }
        around.sleep(LOOK);
    }
}

/// When at or after `now` a round of a count ends, in a chip that had these registers at the time `began`; `None`: nothing goes round.
fn end_of_round(registers: &PitRegisters, began: u64, now: u64) -> Option<u64> {
    let [first, _, third] = &registers.channels;
    let channel = [first, third].into_iter().find(|channel| periodic(channel.mode) && channel.age.is_some())?;
    let length = length(channel.reload.into());
    let loaded = now.saturating_sub(began).saturating_add(channel.age?) % length;
    Some(now + (length - loaded))
}

/// Gives the chip the registers that it had at the time `began`. Waits until that can be done in the right moment, 55 ms at most.
pub fn restore(around: &impl Around, registers: &PitRegisters, began: u64) -> Result<(), String> {
    let end = end_of_round(registers, began, around.now());
    if let Some(end) = end {
        around.sleep(Duration::from_nanos(end.saturating_sub(around.now())));
    }
    let (state, ended) = to_kvm(registers, around.now().saturating_sub(began));
    around.set_pit(&state)?;
    let [first, ..] = &registers.channels;
    if ended || end.is_some() && periodic(first.mode) && first.age.is_some() {
        around.tick();
    }
    Ok(())
}

/// The kernel's form of `registers` after `passed` ns more, all counts beginning now; and whether a count of channel 0 has ended meanwhile.
fn to_kvm(registers: &PitRegisters, passed: u64) -> (b::kvm_pit_state2, bool) {
    let side = |access: u8, high: bool| match (access, high) {
        (1, _) => 1,
        (2, _) => 2,
        (_, false) => 3,
        (_, true) => 4,
    };
    let channel = |c: &PitChannel| {
        let left = c.age.filter(|_| !periodic(c.mode)).map(|age| left(c.reload.into(), age.saturating_add(passed)));
        b::kvm_pit_channel_state {
            count: left.unwrap_or(u32::from(c.reload)),
            latched_count: c.latched.unwrap_or_default(),
            count_latched: if c.latched.is_some() { c.access } else { 0 },
            status_latched: c.latched_status.is_some().into(),
            status: c.latched_status.unwrap_or_default(),
            read_state: side(c.access, c.read_high_next),
            write_state: side(c.access, c.write_high_next),
            write_latch: c.low_written,
            rw_mode: c.access,
            mode: c.mode,
            bcd: c.bcd.into(),
            gate: c.gate.into(),
            count_load_time: 0,
        }
    };
    let flags = if registers.speaker { SPEAKER_ON } else { 0 };
    let channels = registers.channels.each_ref().map(channel);
    let mut state = b::kvm_pit_state2 { channels, flags, ..Default::default() };
    let ([first, ..], [channel, ..]) = (&registers.channels, &mut state.channels);
    let Some(age) = first.age else {
        // As after power-on, or in the middle of being programmed.
        if first.mode == 0 && !first.write_high_next {
            channel.mode = NOTHING_COUNTS;
        } else {
            channel.count = NEVER;
        }
        return (state, false);
    };
    let length = length(first.reload.into());
    let ends = once(first.mode) && age.saturating_add(passed) >= length;
    if ends {
        (channel.count, channel.count_load_time) = (NEVER, ENDED);
    }
    (state, ends && age < length)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const MS: u64 = 1_000_000;

    /// A kernel with its timer, which runs out where time is let pass, and its thread, which gets the CPU some looks later.
    #[derive(Default)]
    struct Kernel {
        now: Cell<u64>,
        state: Cell<b::kvm_pit_state2>,
        /// When the timer runs out.
        due: Cell<Option<u64>>,
        /// The timer has run out, and the thread is to interrupt.
        queued: Cell<bool>,
        /// How many looks the thread is late.
        late: Cell<u32>,
        /// For how long the machine stands still when the clock is read the fifth time, and its timers run out no sooner than it sleeps.
        stands: Cell<u64>,
        reads: Cell<u32>,
        ticked: Cell<bool>,
    }

    impl Kernel {
        /// Channel 0 in `mode` with a count that takes 10 ms, of which `left` ms are left; `None`: it has ended.
        fn new(mode: u8, left: Option<u64>) -> Self {
            let mut state = b::kvm_pit_state2::default();
            (state.channels[0].mode, state.channels[0].count) = (mode, 11932);
            (state.channels[1].mode, state.channels[1].count) = (NOTHING_COUNTS, 0x1_0000);
            // The last one was loaded 20 ms ago.
            (state.channels[2].count, state.channels[2].count_load_time) = (59659, 80 * MS as i64);
            let kernel = Self { now: Cell::new(100 * MS), state: Cell::new(state), ..Self::default() };
            kernel.due.set(left.map(|left| (100 + left) * MS));
            kernel
        }

        /// All that the VM's saved state tells: the time since the count began, in ms, and whether the PIC has an interrupt.
        fn saved(&self) -> (u64, bool) {
            let registers = Stopped::look(self).unwrap().registers(self.now());
            (registers.channels[0].age.unwrap() / MS, self.ticked.get())
        }
    }

    impl Around for Kernel {
        fn pit(&self) -> Result<b::kvm_pit_state2, String> {
            Ok(self.state.get())
        }
        fn set_pit(&self, state: &b::kvm_pit_state2) -> Result<(), String> {
            let [first, ..] = &state.channels;
            self.state.set(*state);
            self.ticked.set(self.ticked.get() || self.queued.take());
            self.due.set(Some(self.now() + length(first.count)));
            Ok(())
        }
        fn has_ticked(&self) -> Result<bool, String> {
            Ok(self.ticked.get())
        }
        fn set_ticked(&self, ticked: bool) -> Result<(), String> {
            self.ticked.set(ticked);
            Ok(())
        }
        fn tick(&self) {
            self.ticked.set(true);
        }
        fn now(&self) -> u64 {
            self.reads.set(self.reads.get() + 1);
            if self.reads.get() == 5 {
                self.now.set(self.now.get() + self.stands.take());
            }
            self.now.get()
        }
        fn sleep(&self, time: Duration) {
            self.now.set(self.now() + time.as_nanos() as u64);
            if self.queued.get() {
                if self.late.get() == 0 {
                    self.ticked.set(true);
                    self.queued.set(false);
                }
                self.late.set(self.late.get().saturating_sub(1));
            }
            if self.due.get().is_some_and(|due| due <= self.now()) {
                let period = periodic(self.state.get().channels[0].mode).then_some(10 * MS);
                self.due.set(period.map(|period| self.now() + period));
                self.queued.set(true);
            }
        }
    }

    #[test]
    fn no_interrupt_is_lost_that_comes_late() {
        for mode in [0, 1, 4] {
            for (late, stands) in [(0, 0), (30, 0), (1, 300), (5, 300), (1000, 0), (u32::MAX, 300)] {
                let kernel = Kernel::new(mode, Some(2));
                kernel.late.set(late);
                kernel.stands.set(stands * MS);
                let (age, ticked) = kernel.saved();
                assert!(ticked && age >= 10, "mode {mode}, {late} looks late, the machine stands {stands} ms: {age}");
            }
        }
        for (late, stands) in [(1, 0), (1000, 0), (1, 300)] {
            let kernel = Kernel::new(2, Some(2));
            kernel.late.set(late);
            kernel.stands.set(stands * MS);
            assert_eq!(kernel.saved(), (0, true), "goes round; {late}, {stands}");
        }
    }

    #[test]
    fn no_interrupt_comes_of_nothing() {
        for before in [false, true] {
            let kernel = Kernel::new(0, None);
            kernel.ticked.set(before);
            let (age, ticked) = kernel.saved();
            assert!(age >= 10 && ticked == before, "{age}");
        }
    }

    #[test]
    fn the_vm_may_go_on() {
        let kernel = Kernel::new(0, Some(2));
        kernel.stands.set(10 * MS);
        kernel.saved();
        let passed = kernel.now() - 100 * MS;
        let [first, second, third] = kernel.state.get().channels;
        assert_eq!((first.count, first.mode, second.count), (NEVER, 0, 0x1_0000));
        assert_eq!(third.count, left(59659, 20 * MS + passed), "as much as was left");
        let now = kernel.now();
        assert!(kernel.saved().0 >= 10, "it has ended");
        assert_eq!(kernel.now(), now, "and is not waited for again");
        let kernel = Kernel::new(2, Some(2));
        kernel.saved();
        assert_eq!(
            (kernel.state.get().channels[0].count, kernel.due.get()),
            (11932, Some(kernel.now() + length(11932)))
        );
    }

    /// Channel 0 in `mode` with a count of 11932, which takes 10 ms, loaded so long ago.
    fn chip(mode: u8, age: Option<u64>) -> PitRegisters {
        let channel = PitChannel { access: 3, gate: true, ..PitChannel::default() };
        let first = PitChannel { mode, reload: 11932, age, ..channel };
        PitRegisters { channels: [first, channel, PitChannel { gate: false, ..channel }], speaker: false }
    }

    #[test]
    fn rounds_begin_where_they_would() {
        for (age, passed, rest) in [(3 * MS, 0, 7), (13 * MS, 0, 7), (3 * MS, MS, 6), (9 * MS, 2 * MS, 9), (0, 0, 10)] {
            let end = end_of_round(&chip(2, Some(age)), 1000, 1000 + passed).unwrap();
            assert!((end - 1000 - passed).abs_diff(rest * MS) < 10_000, "{age} {passed}: {end}");
        }
        let mut both = chip(2, None);
        assert_eq!(end_of_round(&both, 0, 0), None, "not loaded");
        both.channels[2] = PitChannel { mode: 3, age: Some(0), reload: 0, ..both.channels[2] };
        assert!(end_of_round(&both, 0, 0).unwrap().abs_diff(54_925_493) < 1000);
        assert_eq!(end_of_round(&chip(0, Some(3 * MS)), 0, 0), None);
    }

    #[test]
    fn what_is_left_of_a_count() {
        for mode in [0, 1, 4] {
            let (state, ended) = to_kvm(&chip(mode, Some(2 * MS)), 3 * MS);
            assert_eq!((state.channels[0].count, state.channels[0].mode, ended), (5967, mode, false));
            let (state, ended) = to_kvm(&chip(mode, Some(2 * MS)), 9 * MS);
            assert_eq!(
                (state.channels[0].count, state.channels[0].mode, ended),
                (NEVER, mode, true),
                "ended on the way"
            );
            let (state, ended) = to_kvm(&chip(mode, Some(20 * MS)), 0);
            assert_eq!((state.channels[0].count, ended), (NEVER, false), "ended before, and has interrupted");
        }
        let mut third = chip(0, None);
        third.channels[2] = PitChannel { mode: 0, reload: 59659, age: Some(40 * MS), ..third.channels[2] };
        assert_eq!(to_kvm(&third, 0).0.channels[2].count, 59659 - 47727);
        assert_eq!(to_kvm(&third, 20 * MS).0.channels[2].count, 1);
    }

    #[test]
    fn not_loaded() {
        assert_eq!(to_kvm(&chip(0, None), 0).0.channels[0].mode, NOTHING_COUNTS, "as after power-on");
        let mut half = chip(0, None);
        half.channels[0].write_high_next = true;
        let (state, _) = to_kvm(&half, 0);
        assert_eq!((state.channels[0].mode, state.channels[0].count, state.channels[0].write_state), (0, NEVER, 4));
        assert_eq!(to_kvm(&chip(2, None), 0).0.channels[0].count, NEVER);
    }

    #[test]
    fn there_and_back() {
        // What the kernel does with a state: all counts begin.
        let kernel = |(mut state, _): (b::kvm_pit_state2, bool)| {
            state.channels[1..].iter_mut().for_each(|channel| channel.count_load_time = 5000);
            state
        };
        for (mode, age) in [(0, None), (2, None), (0, Some(length(0)))] {
            let mut chip = chip(mode, age);
            chip.channels[1].age = Some(0);
            chip.channels[2].age = Some(0);
            chip.channels[1].reload = 100;
            chip.channels[2].reload = 200;
            let state = kernel(to_kvm(&chip, 0));
            let loaded = (state.channels[0].count_load_time == ENDED).then(|| 5000_u64.saturating_sub(length(0)));
            let back = Stopped { state, loaded }.registers(5000);
            assert_eq!((back.channels[0].age.is_some(), back.channels[0].mode), (age.is_some(), mode));
            assert_eq!(back.channels[1..], chip.channels[1..]);
        }
    }
}
