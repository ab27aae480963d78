//! The thread that sees what no exit tells: vCPUs that are halted for good, and those that are to be interrupted a moment later.
//!
//! With the kernel's interrupt chips HLT does not leave the kernel. A vCPU whose thread uses no CPU time is asked now and then to look
//! whether it is halted with interrupts off; the more rarely, the longer it has been found well.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::kick::{Cell, LOOK, WAKE};

/// How soon a vCPU that stands still is looked at.
const FIRST: Duration = Duration::from_millis(400);
/// The longest time between two looks.
const LONGEST: Duration = Duration::from_secs(10);

struct Watched {
    cell: Arc<Cell>,
    /// Exits and CPU time at the last look.
    last: (u64, u64),
    interval: Duration,
    next: Instant,
}

#[derive(Default)]
struct Plans {
    vcpus: Vec<Watched>,
    /// When to wake which.
    alarms: BinaryHeap<Reverse<(Instant, usize)>>,
    stop: bool,
}

/// The thread; dropping it ends it.
pub struct Watch {
    plans: Arc<(Mutex<Plans>, Condvar)>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watch {
    /// Starts the thread.
    pub fn start() -> std::io::Result<Self> {
        let plans = Arc::new((Mutex::<Plans>::default(), Condvar::new()));
        let shared = plans.clone();
        let thread = std::thread::Builder::new().name("kvm-watch".into()).spawn(move || run(&shared.0, &shared.1))?;
        Ok(Self { plans, thread: Some(thread) })
    }

    /// Watches one more vCPU; returns its number here.
    pub fn add(&self, cell: Arc<Cell>) -> usize {
        let mut plans = self.plans.0.lock().unwrap_or_else(PoisonError::into_inner);
        plans.vcpus.push(Watched { cell, last: (0, 0), interval: FIRST, next: Instant::now() + FIRST });
        self.plans.1.notify_one();
        plans.vcpus.len() - 1
    }

    /// All that are watched.
    pub fn cells(&self) -> Vec<Arc<Cell>> {
        let plans = self.plans.0.lock().unwrap_or_else(PoisonError::into_inner);
        plans.vcpus.iter().map(|watched| watched.cell.clone()).collect()
    }

    /// Makes vCPU `number` leave the guest after `time`.
    pub fn wake_after(&self, number: usize, time: Duration) {
        let mut plans = self.plans.0.lock().unwrap_or_else(PoisonError::into_inner);
        plans.alarms.push(Reverse((Instant::now() + time, number)));
        self.plans.1.notify_one();
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.plans.0.lock().unwrap_or_else(PoisonError::into_inner).stop = true;
        self.plans.1.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

/// CPU time of a thread of this process, in nanoseconds.
fn cpu_time(thread: i32) -> Option<u64> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // The kernel's numbering of a thread's CPU clock: CPUCLOCK_SCHED (2) of one thread (4).
    let clock = (!thread << 3) | 6;
    // SAFETY: `time` is a valid place for the result.
    let result = unsafe { libc::clock_gettime(clock, &mut time) };
    (result == 0).then(|| time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

fn run(mutex: &Mutex<Plans>, condition: &Condvar) {
    let mut plans = mutex.lock().unwrap_or_else(PoisonError::into_inner);
    while !plans.stop {
        let now = Instant::now();
        while let Some(&Reverse((due, number))) = plans.alarms.peek()
            && due <= now
        {
            plans.alarms.pop();
            if let Some(watched) = plans.vcpus.get(number) {
                watched.cell.request(WAKE);
            }
        }
        for watched in plans.vcpus.iter_mut().filter(|watched| watched.next <= now) {
            look(watched, now);
        }
        let first = plans.vcpus.iter().map(|watched| watched.next).min();
        let alarm = plans.alarms.peek().map(|Reverse((due, _))| *due);
        let wait = first.into_iter().chain(alarm).min().map(|due| due.saturating_duration_since(now));
        plans = match wait {
            Some(wait) => condition.wait_timeout(plans, wait).unwrap_or_else(PoisonError::into_inner).0,
            None => condition.wait(plans).unwrap_or_else(PoisonError::into_inner),
        };
    }
}

fn look(watched: &mut Watched, now: Instant) {
    let time = watched.cell.thread().and_then(cpu_time);
    let seen = (watched.cell.exits.load(Ordering::Relaxed), time.unwrap_or_default());
    if time.is_some() && seen == watched.last {
        watched.cell.request(LOOK);
        // The look itself is an exit and takes time.
        watched.interval = (watched.interval * 2).min(LONGEST);
        watched.last = (0, 0);
    } else {
        if seen.0.abs_diff(watched.last.0) > 2 && watched.last != (0, 0) {
            watched.interval = FIRST;
        }
        watched.last = seen;
    }
    watched.next = now + watched.interval;
}
