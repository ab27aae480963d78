//! Who works on a queue: a thread of its own ([`Worker`]) or the thread that rings ([`Inline`]).
//!
//! The work is a [`Job`], which owns its queue. A device chooses a runner for each queue; requests that may block belong on a worker,
//! cheap and bounded ones may run inline on the vCPU thread, which saves two thread switches. Threads are made with the device, not
//! when the driver enables a queue: by then the process may no longer be allowed to.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use crate::event::Event;

/// What a driver's notification of one queue reaches.
pub trait Doorbell: Send + Sync {
    /// The driver made buffers available.
    fn ring(&self);
    /// An event counter whose counting up does the same as [`Self::ring`], if there is one: for engines that count without leaving
    /// the guest.
    fn event(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// Asks a job to return early. Cheap to read.
#[derive(Debug, Default)]
pub struct StopFlag(AtomicBool);

impl StopFlag {
    /// Is the job to return?
    #[inline]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn set(&self, stop: bool) {
        self.0.store(stop, Ordering::Relaxed);
    }
}

/// Work on one queue.
pub trait Job: Send + 'static {
    /// Does what there is to do; returns soon (between two requests) once `stop` is set.
    fn run(&mut self, stop: &StopFlag);
    /// [`Self::run`] panicked: the driver should be told. The job is not run again.
    fn failed(&mut self);
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `job`; `false` when it panicked.
fn run_caught<J: Job>(job: &mut J, stop: &StopFlag) -> bool {
    let fine = catch_unwind(AssertUnwindSafe(|| job.run(stop))).is_ok();
    if !fine {
        let _ = catch_unwind(AssertUnwindSafe(|| job.failed()));
    }
    fine
}

struct State<J> {
    job: Option<J>,
    rung: bool,
    running: bool,
    stopping: bool,
    dead: bool,
    quit: bool,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    /// To the worker: rung, or quit.
    wake: Event,
    /// From the worker: not running any more.
    idle: Condvar,
    stop: StopFlag,
}

/// A thread for one queue. It outlives many jobs: each reset takes the job away, each enabling brings a new one.
pub struct Worker<J: Job> {
    shared: Arc<Shared<J>>,
    thread: Option<JoinHandle<()>>,
}

impl<J: Job> Worker<J> {
    /// Makes the thread, named `name` (at most 15 bytes are shown by the system).
    ///
    /// # Errors
    /// When the host gives no thread.
    pub fn new(name: &str) -> std::io::Result<Self> {
        let state = State { job: None, rung: false, running: false, stopping: false, dead: false, quit: false };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            wake: Event::new()?,
            idle: Condvar::new(),
            stop: StopFlag::default(),
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || for_thread.work())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Gives the thread a job and makes it look at once: a restored queue may hold buffers already.
    pub fn start(&self, job: J) {
        let mut state = lock(&self.shared.state);
        state.job = Some(job);
        state.dead = false;
        state.rung = true;
        self.shared.wake.notify();
    }

    /// Takes the job away, waiting until it is not running.
    pub fn stop(&self) -> Option<J> {
        let mut state = lock(&self.shared.state);
        state.stopping = true;
        self.shared.stop.set(true);
        while state.running {
            state = self.shared.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.stopping = false;
        self.shared.stop.set(false);
        state.rung = false;
        state.job.take()
    }

    /// What wakes the thread.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.shared.clone()
    }

    /// Lets the thread end by itself when the worker is dropped, without waiting for it: for jobs that may block for ever on something
    /// outside, such as a pipe that nobody reads.
    pub fn detach(&mut self) {
        self.thread = None;
    }
}

impl<J: Job> Drop for Worker<J> {
    fn drop(&mut self) {
        let mut state = lock(&self.shared.state);
        state.quit = true;
        self.shared.stop.set(true);
        self.shared.wake.notify();
        drop(state);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl<J: Job> Shared<J> {
    fn work(&self) {
        let mut state = lock(&self.state);
        loop {
            if state.quit {
                return;
            }
            let ready = state.rung && !state.stopping && !state.dead;
            let Some(mut job) = (if ready { state.job.take() } else { None }) else {
                drop(state);
                self.wake.wait();
                state = lock(&self.state);
                // Whoever counts without [`Doorbell::ring`] says no more than this.
                state.rung = true;
                continue;
            };
            state.rung = false;
            state.running = true;
            drop(state);
            let fine = run_caught(&mut job, &self.stop);
            state = lock(&self.state);
            state.job = Some(job);
            state.dead = !fine;
            state.running = false;
            self.idle.notify_all();
        }
    }
}

impl<J: Job> Doorbell for Shared<J> {
    fn ring(&self) {
        let mut state = lock(&self.state);
        state.rung = true;
        // A running worker looks at `rung` before it sleeps; waking it would be a system call for nothing.
        if !state.running {
            self.wake.notify();
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

struct InlineState<J> {
    job: Mutex<Option<(J, bool)>>,
    stop: StopFlag,
}

/// Runs a job on the thread that rings.
pub struct Inline<J: Job>(Arc<InlineState<J>>);

impl<J: Job> Default for Inline<J> {
    fn default() -> Self {
        Self(Arc::new(InlineState { job: Mutex::new(None), stop: StopFlag::default() }))
    }
}

impl<J: Job> Inline<J> {
    /// Takes a job and runs it once.
    pub fn start(&self, job: J) {
        *lock(&self.0.job) = Some((job, true));
        self.0.ring();
    }

    /// Gives the job back once it is not running.
    pub fn stop(&self) -> Option<J> {
        self.0.stop.set(true);
        let job = lock(&self.0.job).take();
        self.0.stop.set(false);
        job.map(|(job, _)| job)
    }

    /// What runs the job.
    pub fn doorbell(&self) -> Arc<dyn Doorbell> {
        self.0.clone()
    }
}

impl<J: Job> Doorbell for InlineState<J> {
    fn ring(&self) {
        if let Some((job, alive)) = lock(&self.job).as_mut()
            && *alive
        {
            *alive = run_caught(job, &self.stop);
        }
    }
}

/// A doorbell that nobody hears.
pub(crate) fn silent() -> Arc<dyn Doorbell> {
    struct Silent;
    impl Doorbell for Silent {
        fn ring(&self) {}
    }
    Arc::new(Silent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel};
    use std::time::Duration;

    /// Counts its runs; panics when it is told to.
    struct Count(u32, Sender<u32>, Arc<AtomicBool>);

    impl Job for Count {
        fn run(&mut self, _stop: &StopFlag) {
            assert!(!self.2.load(Ordering::SeqCst), "deliberate");
            self.0 += 1;
            self.1.send(self.0).unwrap();
        }
        fn failed(&mut self) {
            self.1.send(99).unwrap();
        }
    }

    #[test]
    fn worker_runs_stops_and_restarts() {
        let (wait, moment) = (Duration::from_secs(20), Duration::from_millis(20));
        let worker = Worker::new("test").unwrap();
        let (sender, receiver) = channel();
        // The last number that comes: a wake-up may be seen twice, and the job run once more than asked for.
        let last = || {
            let mut last = receiver.recv_timeout(wait).unwrap();
            while let Ok(next) = receiver.recv_timeout(moment) {
                last = next;
            }
            last
        };
        let fails = Arc::new(AtomicBool::new(false));
        worker.start(Count(0, sender, fails.clone()));
        let first = last();
        worker.doorbell().ring();
        let second = last();
        assert!(first >= 1 && second > first);
        let job = worker.stop().unwrap();
        let stopped = job.0;
        assert!(worker.stop().is_none());
        worker.doorbell().ring();
        assert!(receiver.try_iter().all(|count| count <= stopped));
        assert!(receiver.recv_timeout(moment).is_err());
        worker.start(job);
        assert!(last() > stopped);
        fails.store(true, Ordering::SeqCst);
        worker.doorbell().ring();
        assert_eq!(last(), 99, "a panic is caught and reported");
        worker.doorbell().ring();
        assert!(receiver.recv_timeout(moment).is_err(), "and the job not run again");
        assert!(worker.stop().is_some());
    }

    #[test]
    fn stop_interrupts_a_job_that_never_ends() {
        struct Forever;
        impl Job for Forever {
            fn run(&mut self, stop: &StopFlag) {
                while !stop.is_set() {
                    std::thread::yield_now();
                }
            }
            fn failed(&mut self) {}
        }
        let worker = Worker::new("test").unwrap();
        worker.start(Forever);
        std::thread::sleep(Duration::from_millis(5));
        assert!(worker.stop().is_some());
        worker.start(Forever);
        drop(worker);
    }

    #[test]
    fn inline_runs_on_the_ringing_thread() {
        let inline = Inline::default();
        let (sender, receiver) = channel();
        inline.start(Count(0, sender, Arc::default()));
        inline.doorbell().ring();
        assert_eq!(receiver.try_iter().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(inline.stop().unwrap().0, 2);
        inline.doorbell().ring();
        assert!(inline.stop().is_none());
    }
}
