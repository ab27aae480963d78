//! Steal time: how long a vCPU that had work waited for a CPU of the host (`Documentation/virt/kvm/x86/msr.rst`, MSR_KVM_STEAL_TIME).
//!
//! Between two looks, what passed and was not CPU time of the vCPU's thread was stolen. Looked at when an interrupt is delivered, at
//! most once in a millisecond; time in HLT does not count, nor does time in which the VM stands still.

use cpu::CpuState;
use memory::GuestRam;

use crate::tsc;

/// Enable bit of the MSR; the rest is the page's address.
const ENABLED: u64 = 1;
/// Least time between two looks, in nanoseconds.
const INTERVAL: u64 = 1_000_000;
/// Offsets in `struct kvm_steal_time`.
const VERSION: u64 = 8;
const PREEMPTED: u64 = 16;

/// One vCPU's account.
#[derive(Clone, Debug, Default)]
pub(crate) struct StealClock {
    /// TSC and CPU time at the last look; `None`: not running.
    since: Option<(u64, u64)>,
    /// Clocks of processes that work for the vCPU, too.
    processes: Vec<libc::clockid_t>,
}

/// CPU time by this clock, in nanoseconds.
fn cpu_time(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid place for the result.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    if result == 0 { time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64 } else { 0 }
}

/// Is the MSR's value one that a guest may write? The page has 64 bytes and is aligned to that.
pub(crate) fn valid(value: u64) -> bool {
    value & 0x3e == 0
}

impl StealClock {
    /// CPU time of this process counts as the vCPU's.
    pub fn add_process(&mut self, pid: i32) {
        // CPUCLOCK_SCHED of a process, as clock_getcpuclockid(3) makes it.
        self.processes.push((!pid << 3) | 2);
    }

    /// The vCPU is halted, or stands still: what passes is nobody's.
    pub fn pause(&mut self) {
        self.since = None;
    }

    /// The VM goes on here, perhaps from elsewhere: its vCPU is not asleep for want of a CPU, as other vCPUs may be told.
    pub fn resumed(&mut self, ram: &GuestRam, state: &CpuState) {
        self.pause();
        let value = state.kvm_steal_time();
        if value & ENABLED != 0 {
            // With it may go a wish that translations be forgotten: there are none yet.
            let _ = ram.write((value & !ENABLED).wrapping_add(PREEMPTED), &[0]);
        }
    }

    /// The vCPU runs: accounts for the time since it was last looked at, if that is long enough.
    pub fn look(&mut self, ram: &GuestRam, khz: u32, state: &CpuState) {
        let value = state.kvm_steal_time();
        if value & ENABLED == 0 {
            return;
        }
        let now = tsc::read();
        let passed = self.since.map(|(then, _)| tsc::to_nanos(now.wrapping_sub(then), tsc::scale(khz)));
        if passed.is_some_and(|passed| passed < INTERVAL) {
            return;
        }
        let used =
            cpu_time(libc::CLOCK_THREAD_CPUTIME_ID) + self.processes.iter().map(|&clock| cpu_time(clock)).sum::<u64>();
        let before = self.since.replace((now, used));
        if let (Some(passed), Some((_, used_before))) = (passed, before) {
            let stolen = passed.saturating_sub(used.saturating_sub(used_before));
            add(ram, value & !ENABLED, stolen);
        }
    }
}

/// Adds to the guest's account. An address outside RAM is ignored.
fn add(ram: &GuestRam, page: u64, nanoseconds: u64) {
    let (mut steal, mut version) = ([0; 8], [0; 4]);
    if !ram.read(page, &mut steal) || !ram.read(page.wrapping_add(VERSION), &mut version) {
        return;
    }
    // An odd version tells the guest to wait.
    let version_of = |version: u32| ram.write(page.wrapping_add(VERSION), &version.to_le_bytes());
    let version = u32::from_le_bytes(version) | 1;
    let total = u64::from_le_bytes(steal).wrapping_add(nanoseconds);
    if version_of(version) && ram.write(page, &total.to_le_bytes()) {
        version_of(version.wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(ram: &GuestRam, gpa: u64, len: usize) -> u64 {
        let mut bytes = [0; 8];
        assert!(ram.read(gpa, &mut bytes[..len]));
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn what_others_have_is_stolen() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let khz = tsc::khz();
        let mut clock = StealClock::default();
        let mut state = CpuState::default();
        let sleep_between = |clock: &mut StealClock, state: &CpuState| {
            clock.look(&ram, khz, state);
            std::thread::sleep(std::time::Duration::from_millis(20));
            clock.look(&ram, khz, state);
        };
        sleep_between(&mut clock, &state);
        assert_eq!(number(&ram, 0x3000, 8), 0, "not switched on");
        state.set_kvm_steal_time(0x3001);
        sleep_between(&mut clock, &state);
        let first = number(&ram, 0x3000, 8);
        assert!((15_000_000..5_000_000_000).contains(&first), "{first}");
        assert!(number(&ram, 0x3008, 4).is_multiple_of(2) && number(&ram, 0x3008, 4) > 0);
        // Halted: nobody's time.
        clock.pause();
        std::thread::sleep(std::time::Duration::from_millis(20));
        clock.look(&ram, khz, &state);
        assert_eq!(number(&ram, 0x3000, 8), first);
        assert!(ram.write(0x3010, &[3]));
        clock.resumed(&ram, &state);
        assert_eq!(number(&ram, 0x3010, 1), 0);
    }

    #[test]
    fn pages_outside_ram_are_ignored() {
        let ram = GuestRam::new(32 << 20).unwrap();
        for page in [1 << 50, !0x3f, (32 << 20) - 8] {
            add(&ram, page, 1);
            let mut state = CpuState::default();
            state.set_kvm_steal_time(page | 1);
            StealClock::default().resumed(&ram, &state);
        }
        assert!(valid(0x1001) && valid(0) && !valid(0x1003) && !valid(0x1021));
    }
}
