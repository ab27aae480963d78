//! The watchdog timer of Intel's 6300ESB I/O controller hub, a PCI function (datasheet 300641, chapter "Watchdog Timer (D29:F4)"), for which
//! guests have drivers (Linux: `i6300esb`).
//!
//! Two stages count down one after the other: the first may interrupt, the second pulls the output, which is where this machine's owner
//! is told that the guest has hung. The driver starts both again before they end (RELOAD). Writes that change a count or reload must follow
//! 0x80, 0x86 written to the reload register.
//!
//! Where the whole process was stopped (SIGSTOP, the host's sleep), the guest could not reload: the stage that was running starts again.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use serde::{Deserialize, Serialize};

use crate::bus::value;
use crate::clock::{Timer, TimerQueue, TimerTarget};
use crate::pci::{BarKind, ConfigError, PciConfig, PciDevice, PciIdentity};
use crate::state::{StateError, lock};

/// Name on PCI and in saved states.
pub const NAME: &str = "watchdog";
/// Size of BAR 0; the registers are its first 16 bytes.
const BAR_SIZE: u64 = 0x1000;
/// Configuration register: bits 0 and 1 interrupt type (0 IRQ, 2 SMI, 3 none), bit 2 the fine clock, bit 5 output off.
const CONFIG: u16 = 0x60;
const CONFIG_FINE: u8 = 1 << 2;
const CONFIG_NO_OUTPUT: u8 = 1 << 5;
/// Lock register: bit 0 locks it until the next reset, bit 1 enables the timer, bit 2 free-running mode.
const LOCK: u16 = 0x68;
const LOCK_LOCKED: u8 = 1;
const LOCK_ENABLE: u8 = 2;
const LOCK_FREE_RUNNING: u8 = 4;
/// Registers in memory: what the stages count from, the interrupt's status, reloading.
const PRELOAD: [u64; 2] = [0x0, 0x4];
const INTERRUPT: u64 = 0x8;
const RELOAD: u64 = 0xc;
/// Bits of [`RELOAD`], read and written.
const DO_RELOAD: u32 = 1 << 8;
const TIMED_OUT: u32 = 1 << 9;
const UNLOCK: [u32; 2] = [0x80, 0x86];
const PRELOAD_MASK: u32 = 0xf_ffff;
/// The PCI clock that all is counted in.
const CLOCK_HZ: u64 = 33_000_000;
/// No stage is shorter, in ns: the host's timers are not for a guest to wear out.
const SHORTEST: u64 = 1_000_000;
/// A stage whose end is noticed so late, in ns, ended while the process was stopped.
const STOPPED: u64 = 1_000_000_000;

/// Called on the timer thread when the guest did not reload in time.
pub type WatchdogCallback = Arc<dyn Fn() + Send + Sync>;

/// Saved state of [`Watchdog`], beyond its configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WatchdogState {
    preload: [u32; 2],
    /// How much of the unlocking sequence was written.
    unlocked: u8,
    /// The second stage ended: since then nobody has cleared it. Survives resets.
    timed_out: bool,
    /// The first stage ended: interrupt status.
    interrupt: bool,
    /// The stage that runs (0 or 1) and when it ends, in the machine's time.
    running: Option<(u8, u64)>,
}

impl WatchdogState {
    /// As after power-on, but for what survives resets.
    fn new(timed_out: bool) -> Self {
        Self { preload: [PRELOAD_MASK; 2], unlocked: 0, timed_out, interrupt: false, running: None }
    }
}

/// The watchdog.
pub struct Watchdog {
    config: PciConfig,
    state: Mutex<WatchdogState>,
    timer: Timer,
    expired: WatchdogCallback,
}

impl fmt::Debug for Watchdog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watchdog").field("state", &lock(&self.state)).finish_non_exhaustive()
    }
}

impl Watchdog {
    /// A watchdog that is off.
    ///
    /// # Errors
    /// None; an error in the source.
    pub fn new(queue: &Arc<TimerQueue>, expired: WatchdogCallback) -> Result<Arc<Self>, ConfigError> {
        let mut config = PciConfig::new(PciIdentity {
            vendor: 0x8086,
            device: 0x25ab,
            revision: 2,
            class: 0x08, // base system peripheral, other
            subclass: 0x80,
            ..PciIdentity::default()
        });
        config.add_bar(0, BarKind::Memory32, BAR_SIZE)?;
        config.add_registers(CONFIG, &[0, 0], &[0x27, 0])?;
        config.add_registers(LOCK, &[0], &[LOCK_LOCKED | LOCK_ENABLE | LOCK_FREE_RUNNING])?;
        config.use_intx();
        Ok(Arc::new_cyclic(|this: &Weak<Self>| Self {
            config,
            state: Mutex::new(WatchdogState::new(false)),
            timer: queue.timer(this.clone()),
            expired,
        }))
    }

    fn state(&self) -> MutexGuard<'_, WatchdogState> {
        lock(&self.state)
    }

    fn register(&self, at: u16) -> u8 {
        let mut byte = [0];
        self.config.read(at, &mut byte);
        byte[0]
    }

    fn enabled(&self) -> bool {
        self.register(LOCK) & LOCK_ENABLE != 0
    }

    fn free_running(&self) -> bool {
        self.register(LOCK) & LOCK_FREE_RUNNING != 0
    }

    /// ns that a stage takes.
    fn duration(&self, state: &WatchdogState, stage: u8) -> u64 {
        let shift = if self.register(CONFIG) & CONFIG_FINE != 0 { 5 } else { 15 };
        let [first, second] = state.preload;
        let ticks = u64::from(if stage == 0 { first } else { second }) << shift;
        (ticks * (1_000_000_000 / 1_000_000) / (CLOCK_HZ / 1_000_000)).max(SHORTEST)
    }

    fn run(&self, state: &mut WatchdogState, stage: u8) {
        let end = self.timer.clock().now().saturating_add(self.duration(state, stage));
        state.running = Some((stage, end));
        self.timer.set(Some(end));
    }

    /// Starts, starts again or stops, as the registers say.
    fn restart(&self, state: &mut WatchdogState) {
        if self.enabled() {
            self.run(state, u8::from(self.free_running()));
        } else {
            state.running = None;
            self.timer.set(None);
        }
    }

    /// What is due. Returns whether the guest has hung.
    fn look(&self) -> bool {
        let mut state = self.state();
        let Some((stage, end)) = state.running else { return false };
        let now = self.timer.clock().now();
        if now < end {
            self.timer.set(Some(end));
            return false;
        }
        if now - end >= STOPPED {
            self.run(&mut state, stage);
            return false;
        }
        let config = self.register(CONFIG);
        if stage == 0 {
            self.run(&mut state, 1);
            if config & 3 == 0 {
                state.interrupt = true;
                self.config.set_intx(true);
            }
            return false;
        }
        state.timed_out = true;
        if self.free_running() {
            self.run(&mut state, 1);
        } else {
            // The output is pulled once.
            state.running = None;
        }
        config & CONFIG_NO_OUTPUT == 0
    }

    /// A write of a whole register.
    fn write(&self, register: u64, value: u32) {
        let mut state = self.state();
        // One write after the two that unlock.
        let unlocked = std::mem::take(&mut state.unlocked);
        match register {
            RELOAD if value == UNLOCK[0] => state.unlocked = 1,
            RELOAD if value == UNLOCK[1] && unlocked == 1 => state.unlocked = 2,
            RELOAD if unlocked == 2 => {
                if value & TIMED_OUT != 0 {
                    state.timed_out = false;
                }
                if value & DO_RELOAD != 0 {
                    self.restart(&mut state);
                }
            }
            INTERRUPT if value & 1 != 0 => {
                state.interrupt = false;
                self.config.set_intx(false);
            }
            at if unlocked == 2 => {
                if let Some(index) = PRELOAD.iter().position(|register| *register == at)
                    && let Some(preload) = state.preload.get_mut(index)
                {
                    *preload = value & PRELOAD_MASK;
                }
            }
            _ => {}
        }
    }
}

impl PciDevice for Watchdog {
    fn name(&self) -> &str {
        NAME
    }

    fn config(&self) -> &PciConfig {
        &self.config
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        let mut state = self.state();
        let before = self.register(LOCK);
        self.config.write(offset, data);
        if before & LOCK_LOCKED != 0 {
            self.config.write(LOCK, &[before]);
        }
        if self.register(LOCK) != before {
            self.restart(&mut state);
        }
    }

    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = self.state();
        let register = match offset & !3 {
            _ if bar != 0 => 0,
            INTERRUPT => state.interrupt.into(),
            RELOAD if state.timed_out => TIMED_OUT,
            // What it counts from cannot be read back.
            _ => 0,
        };
        for (to, from) in data.iter_mut().zip(register.to_le_bytes().into_iter().skip((offset & 3) as usize)) {
            *to = from;
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == 0 && matches!(data.len(), 1 | 2 | 4) {
            self.write(offset, value(data) as u32);
        }
    }

    fn reset(&self) {
        let mut state = self.state();
        *state = WatchdogState::new(state.timed_out);
        self.timer.set(None);
    }

    fn save(&self) -> Vec<u8> {
        // Plain data always serialises; an empty state would be refused on restore.
        postcard::to_stdvec(&*self.state()).unwrap_or_default()
    }

    fn restore(&self, saved: &[u8]) -> Result<(), StateError> {
        let refuse = |why: String| StateError::new(NAME, why);
        let (saved, rest) = postcard::take_from_bytes::<WatchdogState>(saved)
            .map_err(|error| refuse(format!("it is damaged ({error})")))?;
        let sound = saved.preload.iter().all(|preload| preload & !PRELOAD_MASK == 0)
            && saved.unlocked <= 2
            && saved.running.is_none_or(|(stage, _)| stage <= 1);
        if !rest.is_empty() || !sound {
            return Err(refuse("its registers cannot be so".into()));
        }
        let mut state = self.state();
        *state = saved;
        self.timer.set(saved.running.map(|(_, end)| end));
        Ok(())
    }
}

impl TimerTarget for Watchdog {
    fn timer_due(&self) {
        if self.look() {
            (self.expired)();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use crate::clock::testing::{advance, manual};

    const MS: u64 = 1_000_000;
    const S: u64 = 1000 * MS;

    struct Rig {
        watchdog: Arc<Watchdog>,
        queue: Arc<TimerQueue>,
        expired: Arc<AtomicU32>,
    }

    impl Rig {
        fn new() -> Self {
            let (_, queue) = manual();
            let expired = Arc::new(AtomicU32::new(0));
            let count = expired.clone();
            let callback = move || {
                count.fetch_add(1, Ordering::SeqCst);
            };
            Self { watchdog: Watchdog::new(&queue, Arc::new(callback)).unwrap(), queue, expired }
        }
        fn expired(&self) -> u32 {
            self.expired.load(Ordering::SeqCst)
        }
        fn unlocked(&self, at: u64, data: &[u8]) {
            for unlock in [0x80_u16, 0x86] {
                self.watchdog.bar_write(0, RELOAD, &unlock.to_le_bytes());
            }
            self.watchdog.bar_write(0, at, data);
        }
        fn reload(&self) {
            self.unlocked(RELOAD, &0x100_u16.to_le_bytes());
        }
        /// As Linux's driver starts it, with this many seconds (of 1024 ticks of 2^15 clocks).
        fn start(&self, seconds: u32) {
            self.watchdog.config_write(CONFIG, &[3, 0]);
            for register in PRELOAD {
                self.unlocked(register, &(seconds << 9).to_le_bytes());
            }
            self.reload();
            self.watchdog.config_write(LOCK, &[LOCK_ENABLE]);
        }
        fn status(&self) -> [u8; 2] {
            let mut data = [0; 2];
            self.watchdog.bar_read(0, RELOAD, &mut data);
            data
        }
    }

    #[test]
    fn a_guest_that_reloads_lives() {
        let rig = Rig::new();
        advance(&rig.queue, 3600 * S);
        assert_eq!(rig.expired(), 0, "off at first");
        rig.start(10);
        for _ in 0..10 {
            advance(&rig.queue, 9 * S);
            rig.reload();
        }
        assert_eq!((rig.expired(), rig.status()), (0, [0, 0]));
        advance(&rig.queue, 10 * S);
        assert_eq!(rig.expired(), 0);
        advance(&rig.queue, 200 * MS);
        assert_eq!((rig.expired(), rig.status()), (1, [0, 2]));
        advance(&rig.queue, 100 * S);
        assert_eq!(rig.expired(), 1, "once");
        // After the reset the guest sees why it was, until it clears that.
        rig.watchdog.config().write(LOCK, &[0]);
        rig.watchdog.reset();
        assert_eq!(rig.status(), [0, 2]);
        rig.unlocked(RELOAD, &0x300_u16.to_le_bytes());
        assert_eq!(rig.status(), [0, 0]);
        rig.start(10);
        rig.watchdog.config_write(LOCK, &[0]);
        advance(&rig.queue, 100 * S);
        assert_eq!(rig.expired(), 1, "stopped");
    }

    #[test]
    fn only_the_whole_sequence_unlocks() {
        let rig = Rig::new();
        rig.start(2);
        advance(&rig.queue, S);
        for write in [0x86_u16, 0x100, 0x80, 0x100, 0x80, 0x80, 0x86] {
            rig.watchdog.bar_write(0, RELOAD, &write.to_le_bytes());
        }
        // Something else in between locks again.
        rig.watchdog.bar_write(0, INTERRUPT, &[1]);
        rig.watchdog.bar_write(0, RELOAD, &0x100_u16.to_le_bytes());
        rig.watchdog.bar_write(0, PRELOAD[0], &u32::MAX.to_le_bytes());
        advance(&rig.queue, 1100 * MS);
        assert_eq!(rig.expired(), 1);
        // Locked, it cannot be switched off.
        rig.start(2);
        rig.watchdog.config_write(LOCK, &[LOCK_ENABLE | LOCK_LOCKED]);
        rig.watchdog.config_write(LOCK & !3, &[0; 4]);
        advance(&rig.queue, 3 * S);
        assert_eq!(rig.expired(), 2);
    }

    #[test]
    fn the_first_stage_interrupts_and_the_output_can_be_off() {
        let rig = Rig::new();
        rig.start(4);
        rig.watchdog.config_write(CONFIG, &[CONFIG_NO_OUTPUT, 0]);
        rig.reload();
        let interrupt = || {
            let mut data = [0; 4];
            rig.watchdog.bar_read(0, INTERRUPT, &mut data);
            data[0]
        };
        advance(&rig.queue, 2100 * MS);
        assert_eq!(interrupt(), 1);
        rig.watchdog.bar_write(0, INTERRUPT, &[1, 0, 0, 0]);
        assert_eq!(interrupt(), 0);
        advance(&rig.queue, 10 * S);
        assert_eq!((rig.expired(), rig.status()), (0, [0, 2]));
        // Free running, by the fine clock: about 1 µs a tick, but not below a millisecond.
        rig.watchdog.config_write(CONFIG, &[3 | CONFIG_FINE, 0]);
        rig.unlocked(PRELOAD[1], &[0; 4]);
        rig.watchdog.config_write(LOCK, &[LOCK_ENABLE | LOCK_FREE_RUNNING]);
        advance(&rig.queue, 10 * MS);
        assert_eq!(rig.expired(), 10);
    }

    #[test]
    fn a_stopped_process_is_no_hung_guest() {
        let rig = Rig::new();
        rig.start(2);
        let clock = rig.queue.clock();
        clock.set(clock.now() + 3600 * S);
        rig.queue.run_due();
        advance(&rig.queue, 1900 * MS);
        assert_eq!(rig.expired(), 0);
        advance(&rig.queue, 200 * MS);
        assert_eq!(rig.expired(), 1);
    }

    #[test]
    fn state() {
        let rig = Rig::new();
        rig.start(2);
        advance(&rig.queue, 1500 * MS);
        let state = rig.watchdog.save();
        let other = Rig::new();
        other.queue.clock().set(rig.queue.clock().now());
        other.watchdog.config().write(LOCK, &[LOCK_ENABLE]);
        other.watchdog.restore(&state).unwrap();
        assert_eq!(other.watchdog.save(), state);
        advance(&other.queue, 600 * MS);
        assert_eq!(other.expired(), 1);
        let mut bad = WatchdogState::new(false);
        bad.running = Some((2, 0));
        for bytes in [vec![], vec![1; 3], [state, vec![0]].concat(), postcard::to_stdvec(&bad).unwrap()] {
            assert!(other.watchdog.restore(&bytes).is_err());
        }
    }

    proptest::proptest! {
        /// Any accesses: no panic, and time ends.
        #[test]
        fn any_accesses(accesses: Vec<(u8, u16, u32, u8)>) {
            let rig = Rig::new();
            for (kind, at, value, len) in accesses {
                let bytes = value.to_le_bytes();
                let data = &bytes[..[1, 2, 4][usize::from(len % 3)]];
                match kind % 5 {
                    0 => rig.watchdog.config_write(at & 0xff & !3, data),
                    1 => rig.watchdog.bar_write(0, u64::from(at & 0x1f), data),
                    2 => rig.watchdog.bar_read(0, u64::from(at & 0x1f), &mut [0; 8]),
                    3 => rig.unlocked(u64::from(at & 0xc), data),
                    _ => advance(&rig.queue, u64::from(value % 50_000_000)),
                }
            }
            let state = rig.watchdog.save();
            Rig::new().watchdog.restore(&state).unwrap();
        }
    }
}
