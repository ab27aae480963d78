//! The kernel's PIT, and the phase of its counts: the kernel tells the phase of channels 1 and 2 only, and starts all counts anew when it is
//! given a state.
//!
//! * Channel 0's phase is found out by waiting for its next interrupt, while the vCPUs stand still: 55 ms at most.
//! * A count that is to end once is given what is left of it; if it has ended, or is not loaded yet, [`NEVER`].
//! * A count that goes round and round is loaded when a round begins, which is waited for: channel 0's, or else channel 2's. Of two such
//!   counts channel 2's begins anew.

use std::time::Duration;

use cpu::chips::{PitChannel, PitRegisters};
use kvm_bindings as b;
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::ioctls::KVM_REINJECT_CONTROL;
use crate::refusal::{refused, told};

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
/// An interrupt comes so much later than it is due at most, in ns.
const LATE: u64 = 5_000_000;

/// What lies around the PIT in its VM.
pub trait Around {
    /// The VM.
    fn vm(&self) -> &VmFd;
    /// Has an interrupt of channel 0 reached the PIC, which nobody has taken?
    fn has_ticked(&self) -> Result<bool, String>;
    /// Sets that.
    fn set_ticked(&self, ticked: bool) -> Result<(), String>;
    /// An interrupt of channel 0.
    fn tick(&self);
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

/// The chip of a stopped VM.
pub struct Stopped {
    state: b::kvm_pit_state2,
    /// When channel 0's count was or might have been loaded; `None`: nothing counts there.
    loaded: Option<u64>,
}

impl Stopped {
    /// Looks at it; takes as long as the guest's PIT takes to interrupt, 60 ms at most.
    pub fn look(around: &impl Around) -> Result<Self, String> {
        let state = around.vm().get_pit2().map_err(told("to tell the timer chip"))?;
        let [first, ..] = &state.channels;
        let length = length(first.count);
        let loaded = if first.count > 0x1_0000 {
            (first.count_load_time == ENDED).then(|| monotonic().saturating_sub(self::length(0)))
        } else if periodic(first.mode) {
            Some(next_tick(around, length + LATE)?.unwrap_or_else(monotonic))
        } else if once(first.mode) {
            // It ends now, or has ended before.
            let tick = next_tick(around, length + LATE)?;
            Some(tick.unwrap_or_else(monotonic).saturating_sub(length))
        } else {
            None
        };
        Ok(Self { state, loaded })
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

/// When channel 0 interrupts next, if it does within `limit` ns.
fn next_tick(around: &impl Around, limit: u64) -> Result<Option<u64>, String> {
    let before = around.has_ticked()?;
    if before {
        around.set_ticked(false)?;
    }
    let began = monotonic();
    loop {
        let now = monotonic();
        if around.has_ticked()? {
            return Ok(Some(now));
        }
        if now.saturating_sub(began) > limit {
            if before {
                around.set_ticked(true)?;
            }
            return Ok(None);
        }
        std::thread::sleep(LOOK);
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
    let end = end_of_round(registers, began, monotonic());
    if let Some(end) = end {
        std::thread::sleep(Duration::from_nanos(end.saturating_sub(monotonic())));
    }
    let (state, ended) = to_kvm(registers, monotonic().saturating_sub(began));
    around.vm().set_pit2(&state).map_err(told("this state of the timer chip"))?;
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
        let left = c.age.filter(|_| !periodic(c.mode)).map(|age| {
            let gone = u128::from(age.saturating_add(passed)) * u128::from(HZ) / u128::from(NS);
            let count = if c.reload == 0 { 0x1_0000 } else { u32::from(c.reload) };
            count.saturating_sub(u32::try_from(gone).unwrap_or(u32::MAX))
        });
        b::kvm_pit_channel_state {
            // Of a count that has ended the output is high from the first tick on.
            count: left.map_or(u32::from(c.reload), |left| left.max(1)),
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
    use super::*;

    const MS: u64 = 1_000_000;

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
