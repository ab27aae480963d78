//! Time and timers of the machine.
//!
//! [`Clock`] is the machine's monotonic time in nanoseconds, which goes on in a restored machine where the saved one stopped, and the host's
//! TSC with its rate. [`TimerQueue`] is one thread that wakes the chips when their next event is due: chips compute
//! their counters from the clock whenever they are asked, and only need a wake-up for interrupts. Nothing runs while
//! nothing is armed.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use crate::state::lock;

/// The host's time-stamp counter.
#[allow(unsafe_code)]
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC has no preconditions; every x86-64 CPU has it and Linux lets user mode use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Measures the host's TSC rate in kHz against the monotonic clock; takes about 20 ms, and up to 300 ms where reading the clocks takes
/// long itself, as on emulated machines. Good to about 10 ppm (100 there): timers by TSC deadline stay exact, because they look at the TSC
/// itself when they fire.
pub fn measure_tsc_khz() -> u64 {
    /// What part of the time that passes between two readings they may take.
    const PART: u64 = 10_000;
    const LONGEST: Duration = Duration::from_millis(300);
    // The two clocks are read one after the other; of several readings the one with the least time between is used.
    let pair = || {
        (0..8)
            .map(|_| {
                let before = host_tsc();
                let now = Instant::now();
                let after = host_tsc();
                (after.wrapping_sub(before), before.wrapping_add(after.wrapping_sub(before) / 2), now)
            })
            .min_by_key(|(width, ..)| *width)
            .unwrap_or_else(|| (0, host_tsc(), Instant::now()))
    };
    let (width0, tsc0, now0) = pair();
    loop {
        std::thread::sleep(Duration::from_millis(20));
        let (width1, tsc1, now1) = pair();
        let (ticks, time) = (tsc1.wrapping_sub(tsc0), now1.duration_since(now0));
        if width0.saturating_add(width1) <= ticks / PART || time >= LONGEST {
            return (u128::from(ticks) * 1_000_000 / time.as_nanos().max(1)).max(1) as u64;
        }
    }
}

enum Source {
    Host {
        start: Instant,
        /// Added to the time since `start`.
        offset: AtomicU64,
    },
    Manual {
        now: AtomicU64,
        /// How much it goes on by each look.
        step: u64,
    },
}

/// The machine's time.
pub struct Clock {
    source: Source,
    tsc_khz: u64,
}

impl fmt::Debug for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Clock").field("ns", &self.now()).field("tsc_khz", &self.tsc_khz).finish()
    }
}

impl Clock {
    /// Time from now on, by the host's monotonic clock. `tsc_khz` is the host's TSC rate (see [`measure_tsc_khz`]).
    pub fn new(tsc_khz: u64) -> Self {
        Self { source: Source::Host { start: Instant::now(), offset: AtomicU64::new(0) }, tsc_khz: tsc_khz.max(1) }
    }

    /// A clock that stands still until told otherwise, for tests. Its TSC runs along.
    pub fn manual(tsc_khz: u64) -> Self {
        Self { source: Source::Manual { now: AtomicU64::new(0), step: 0 }, tsc_khz: tsc_khz.max(1) }
    }

    /// A clock on which so many nanoseconds pass between two looks, whatever is done in between.
    #[cfg(test)]
    pub(crate) fn hasty(step: u64) -> Self {
        Self { source: Source::Manual { now: AtomicU64::new(0), step }, tsc_khz: 1_000_000 }
    }

    /// Nanoseconds since power-on.
    pub fn now(&self) -> u64 {
        match &self.source {
            Source::Host { start, offset } => {
                (start.elapsed().as_nanos() as u64).wrapping_add(offset.load(Ordering::Relaxed))
            }
            Source::Manual { now, step } => now.fetch_add(*step, Ordering::SeqCst),
        }
    }

    /// Makes it `now` nanoseconds since power-on: a restored machine goes on where it was.
    pub fn set(&self, now: u64) {
        match &self.source {
            Source::Host { start, offset } => {
                offset.store(now.wrapping_sub(start.elapsed().as_nanos() as u64), Ordering::Relaxed);
            }
            Source::Manual { now: cell, .. } => cell.store(now, Ordering::SeqCst),
        }
    }

    /// The host's TSC.
    pub fn tsc(&self) -> u64 {
        match &self.source {
            Source::Host { .. } => host_tsc(),
            Source::Manual { now, .. } => {
                (u128::from(now.load(Ordering::SeqCst)) * u128::from(self.tsc_khz) / 1_000_000) as u64
            }
        }
    }

    /// TSC rate in kHz.
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// How many nanoseconds `ticks` of the TSC take, rounded up.
    pub fn tsc_to_ns(&self, ticks: u64) -> u64 {
        u64::try_from((u128::from(ticks) * 1_000_000).div_ceil(u128::from(self.tsc_khz))).unwrap_or(u64::MAX)
    }

    fn is_manual(&self) -> bool {
        matches!(self.source, Source::Manual { .. })
    }
}

/// `value * multiplier / divisor` without overflow on the way; saturates.
pub(crate) fn scale(value: u64, multiplier: u64, divisor: u64) -> u64 {
    let product = u128::from(value) * u128::from(multiplier);
    u64::try_from(product / u128::from(divisor.max(1))).unwrap_or(u64::MAX)
}

/// Something with a timer.
pub trait TimerTarget: Send + Sync {
    /// The time asked for has come, or has been changed a moment ago: the target looks at the clock and at its own state, does what is
    /// due, and arms its timer again if it wants. Called on the timer thread with no lock held.
    fn timer_due(&self);
}

#[derive(Default)]
struct Armed {
    order: BTreeSet<(u64, u64)>,
    deadline: HashMap<u64, u64>,
    targets: HashMap<u64, Weak<dyn TimerTarget>>,
    next_id: u64,
    /// The time until which the thread sleeps; `u64::MAX` without end.
    sleeping_until: u64,
    stop: bool,
}

/// The timer thread and its queue. Dropping the last handle ends the thread.
pub struct TimerQueue {
    clock: Arc<Clock>,
    armed: Arc<(Mutex<Armed>, Condvar)>,
    /// Locked by the thread while it wakes targets.
    turn: Arc<Mutex<()>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl fmt::Debug for TimerQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TimerQueue").field("armed", &lock(&self.armed.0).order.len()).finish_non_exhaustive()
    }
}

impl TimerQueue {
    /// Starts the thread `timer`. With a manual clock there is none; call [`TimerQueue::run_due`].
    ///
    /// # Errors
    /// The host gives no thread.
    pub fn new(clock: Arc<Clock>) -> std::io::Result<Arc<Self>> {
        let armed = Arc::new((Mutex::new(Armed { sleeping_until: u64::MAX, ..Default::default() }), Condvar::new()));
        let manual = clock.is_manual();
        let queue = Self { clock, armed, turn: Arc::default(), thread: Mutex::new(None) };
        if !manual {
            let (clock, armed, turn) = (queue.clock.clone(), queue.armed.clone(), queue.turn.clone());
            let thread = std::thread::Builder::new().name("timer".into()).spawn(move || {
                // The default slack lets the kernel be 50 µs late; without the better setting timers are only that late.
                let _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1));
                run(&clock, &armed, &turn);
            })?;
            *lock(&queue.thread) = Some(thread);
        }
        Ok(Arc::new(queue))
    }

    /// The time the queue goes by.
    pub fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    /// A timer, not armed, that wakes `target`.
    pub fn timer(self: &Arc<Self>, target: Weak<dyn TimerTarget>) -> Timer {
        let mut armed = lock(&self.armed.0);
        let id = armed.next_id;
        armed.next_id += 1;
        armed.targets.insert(id, target);
        Timer { queue: self.clone(), id }
    }

    fn arm(&self, id: u64, deadline: Option<u64>) {
        let mut armed = lock(&self.armed.0);
        if let Some(old) = armed.deadline.remove(&id) {
            armed.order.remove(&(old, id));
        }
        let Some(deadline) = deadline else { return };
        armed.deadline.insert(id, deadline);
        armed.order.insert((deadline, id));
        // A thread that wakes too early looks and sleeps again: only an earlier time needs a call.
        if deadline < armed.sleeping_until {
            armed.sleeping_until = deadline;
            self.armed.1.notify_one();
        }
    }

    /// After the clock was set: the thread looks anew.
    pub fn clock_changed(&self) {
        lock(&self.armed.0).sleeping_until = 0;
        self.armed.1.notify_one();
    }

    /// While the result exists, the thread wakes nobody; a target that it has woken is done. What comes due meanwhile is so afterwards. Not
    /// for targets that are being woken.
    pub fn hold(&self) -> MutexGuard<'_, ()> {
        lock(&self.turn)
    }

    /// With a manual clock: wakes all targets whose time has come, in order. Returns whether there was one.
    pub fn run_due(&self) -> bool {
        let mut any = false;
        loop {
            let due = take_due(&mut lock(&self.armed.0), self.clock.now());
            let Some(target) = due else { return any };
            any = true;
            if let Some(target) = target.upgrade() {
                target.timer_due();
            }
        }
    }
}

impl Drop for TimerQueue {
    fn drop(&mut self) {
        lock(&self.armed.0).stop = true;
        self.armed.1.notify_one();
        if let Some(thread) = lock(&self.thread).take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

fn take_due(armed: &mut Armed, now: u64) -> Option<Weak<dyn TimerTarget>> {
    let (deadline, id) = armed.order.first().copied().filter(|(deadline, _)| *deadline <= now)?;
    armed.order.remove(&(deadline, id));
    armed.deadline.remove(&id);
    Some(armed.targets.get(&id).cloned().unwrap_or_else(|| Weak::<Nobody>::new()))
}

struct Nobody;
impl TimerTarget for Nobody {
    fn timer_due(&self) {}
}

fn run(clock: &Clock, (mutex, condition): &(Mutex<Armed>, Condvar), turn: &Mutex<()>) {
    loop {
        let turn = lock(turn);
        loop {
            let mut armed = lock(mutex);
            if armed.stop {
                return;
            }
            let Some(target) = take_due(&mut armed, clock.now()) else { break };
            drop(armed);
            if let Some(target) = target.upgrade() {
                target.timer_due();
            }
        }
        drop(turn);
        let mut armed = lock(mutex);
        if armed.stop {
            return;
        }
        let next = armed.order.first().map(|(deadline, _)| *deadline);
        armed.sleeping_until = next.unwrap_or(u64::MAX);
        match next {
            Some(deadline) => {
                let wait = Duration::from_nanos(deadline.saturating_sub(clock.now()));
                drop(condition.wait_timeout(armed, wait));
            }
            None => drop(condition.wait(armed)),
        }
    }
}

/// One timer of a [`TimerQueue`].
#[derive(Debug)]
pub struct Timer {
    queue: Arc<TimerQueue>,
    id: u64,
}

impl Timer {
    /// Wakes the target at `deadline` (clock nanoseconds) instead of any time set before; never for `None`.
    pub fn set(&self, deadline: Option<u64>) {
        self.queue.arm(self.id, deadline);
    }

    /// The queue's clock.
    pub fn clock(&self) -> &Clock {
        &self.queue.clock
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        self.set(None);
        lock(&self.queue.armed.0).targets.remove(&self.id);
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A manual clock of 1 GHz TSC with its queue.
    pub fn manual() -> (Arc<Clock>, Arc<TimerQueue>) {
        let clock = Arc::new(Clock::manual(1_000_000));
        (clock.clone(), TimerQueue::new(clock).unwrap())
    }

    /// Lets time pass in steps that end at each timer.
    pub fn advance(queue: &TimerQueue, ns: u64) {
        let end = queue.clock.now() + ns;
        loop {
            let next = lock(&queue.armed.0).order.first().map(|(deadline, _)| *deadline);
            match next.filter(|next| *next <= end) {
                Some(next) => {
                    queue.clock.set(next.max(queue.clock.now()));
                    queue.run_due();
                }
                None => return queue.clock.set(end),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Log(Arc<Clock>, Mutex<Vec<u64>>);
    impl TimerTarget for Log {
        fn timer_due(&self) {
            self.1.lock().unwrap().push(self.0.now());
        }
    }

    #[test]
    fn order_and_rearming() {
        let (clock, queue) = testing::manual();
        let log = Arc::new(Log(clock.clone(), Mutex::default()));
        let as_target: Arc<dyn TimerTarget> = log.clone();
        let (a, b) = (queue.timer(Arc::downgrade(&as_target)), queue.timer(Arc::downgrade(&as_target)));
        a.set(Some(300));
        b.set(Some(200));
        a.set(Some(100));
        testing::advance(&queue, 150);
        b.set(None);
        testing::advance(&queue, 1000);
        assert_eq!(*log.1.lock().unwrap(), [100]);
        drop(a);
        assert!(!queue.run_due());
    }

    #[test]
    fn real_thread_fires_in_time_and_ends() {
        let clock = Arc::new(Clock::new(1_000_000));
        let queue = TimerQueue::new(clock.clone()).unwrap();
        let log = Arc::new(Log(clock.clone(), Mutex::default()));
        let as_target: Arc<dyn TimerTarget> = log.clone();
        let timer = queue.timer(Arc::downgrade(&as_target));
        timer.set(Some(clock.now() + 3600 * 1_000_000_000));
        std::thread::sleep(Duration::from_millis(1));
        let due = clock.now() + 2_000_000;
        timer.set(Some(due));
        let start = Instant::now();
        while log.1.lock().unwrap().is_empty() {
            assert!(start.elapsed() < Duration::from_secs(60), "the earlier time is not seen");
            std::thread::sleep(Duration::from_millis(1));
        }
        let fired = log.1.lock().unwrap().clone();
        assert!(fired.len() == 1 && fired[0] >= due, "{fired:?} for {due}");
        drop((timer, queue));
    }

    #[test]
    fn nobody_is_woken_while_the_thread_is_held() {
        let clock = Arc::new(Clock::new(1_000_000));
        let queue = TimerQueue::new(clock.clone()).unwrap();
        let log = Arc::new(Log(clock.clone(), Mutex::default()));
        let as_target: Arc<dyn TimerTarget> = log.clone();
        let timer = queue.timer(Arc::downgrade(&as_target));
        let held = queue.hold();
        timer.set(Some(clock.now() + 1));
        std::thread::sleep(Duration::from_millis(30));
        assert!(log.1.lock().unwrap().is_empty());
        let freed = clock.now();
        drop(held);
        let end = Instant::now() + Duration::from_secs(10);
        while log.1.lock().unwrap().is_empty() {
            assert!(Instant::now() < end, "it comes afterwards");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(log.1.lock().unwrap()[0] >= freed);
    }

    #[test]
    fn tsc_rate_is_plausible() {
        let khz = measure_tsc_khz();
        assert!((100_000..10_000_000).contains(&khz), "{khz}");
        let clock = Clock::new(khz);
        assert_eq!(clock.tsc_to_ns(khz * 1000), 1_000_000_000);
        clock.set(5_000_000_000);
        assert!((5_000_000_000..6_000_000_000).contains(&clock.now()));
    }
}
