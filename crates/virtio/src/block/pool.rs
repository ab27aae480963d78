//! A disk's queues served by threads, which may wait for the host: one thread for each queue, which listens to its doorbell, and a few
//! that help where there is more than one request. So many requests are in flight as there are threads.

use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::Shared;
use super::request;
use crate::event::Event;
use crate::queue::{QueueError, Virtqueue};
use crate::runner::Doorbell;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One queue of the device.
struct Slot {
    /// What its own thread sleeps on.
    bell: Event,
    /// That thread sleeps, or is about to.
    sleeping: AtomicBool,
    state: Mutex<State>,
    /// Nothing of it is being worked on.
    idle: Condvar,
}

#[derive(Default)]
struct State {
    queue: Option<Virtqueue>,
    /// The driver knows flushes.
    flush: bool,
    /// Requests taken and not yet answered.
    busy: u32,
    stopping: bool,
}

/// Those who help.
#[derive(Default)]
struct Helpers {
    sleeping: u32,
    /// Called and not yet awake.
    called: u32,
    quit: bool,
}

struct Inner {
    device: Arc<Shared>,
    slots: Vec<Slot>,
    helpers: Mutex<Helpers>,
    wake: Condvar,
}

/// The threads of one disk.
pub(super) struct Pool {
    inner: Arc<Inner>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Makes threads for `queues` queues, and `helpers` more.
    pub fn new(device: Arc<Shared>, queues: u16, helpers: u16) -> std::io::Result<Self> {
        let slot = |_| {
            let (state, idle) = (Mutex::default(), Condvar::new());
            Ok(Slot { bell: Event::new()?, sleeping: AtomicBool::new(false), state, idle })
        };
        let slots = (0..queues).map(slot).collect::<std::io::Result<_>>()?;
        let inner = Arc::new(Inner { device, slots, helpers: Mutex::default(), wake: Condvar::new() });
        let mut pool = Self { inner, threads: Vec::new() };
        for number in 0..queues + helpers {
            let inner = pool.inner.clone();
            let thread = std::thread::Builder::new().name(format!("blk-{number}"));
            let work = move || if number < queues { inner.listen(usize::from(number)) } else { inner.help() };
            pool.threads.push(thread.spawn(work)?);
        }
        Ok(pool)
    }

    /// Takes an enabled queue. What is in it already is served at once.
    pub fn start(&self, queue: Virtqueue, flush: bool) -> Arc<dyn Doorbell> {
        let index = usize::from(queue.index());
        if let Some(slot) = self.inner.slots.get(index) {
            *lock(&slot.state) = State { queue: Some(queue), flush, busy: 0, stopping: false };
        }
        let bell = Arc::new(Bell(self.inner.clone(), index));
        bell.ring();
        bell
    }

    /// Gives a queue back when all that was taken from it is answered.
    pub fn stop(&self, index: u16) -> Option<Virtqueue> {
        let slot = self.inner.slots.get(usize::from(index))?;
        let mut state = lock(&slot.state);
        state.stopping = true;
        while state.busy > 0 {
            state = slot.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.stopping = false;
        state.queue.take()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.inner.helpers).quit = true;
        self.inner.wake.notify_all();
        self.inner.slots.iter().for_each(|slot| slot.bell.notify());
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

struct Bell(Arc<Inner>, usize);

impl Doorbell for Bell {
    fn ring(&self) {
        if let Some(slot) = self.0.slots.get(self.1) {
            if slot.sleeping.swap(false, Ordering::SeqCst) {
                slot.bell.notify();
            } else {
                self.0.call_helper();
            }
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        // Who only counts calls nobody to help; the queue's own thread does so when it sees how much there is.
        self.0.slots.get(self.1).map(|slot| slot.bell.as_fd())
    }
}

/// What a look at a queue found.
enum Found {
    /// A request was served.
    Served,
    /// There was none.
    Nothing,
    /// There may be one, to be served no sooner than this.
    Later(Duration),
}

impl Inner {
    fn call_helper(&self) {
        let mut helpers = lock(&self.helpers);
        if helpers.sleeping > helpers.called {
            helpers.called += 1;
            self.wake.notify_one();
        }
    }

    fn quit(&self) -> bool {
        lock(&self.helpers).quit
    }

    /// The thread of one queue.
    fn listen(&self, index: usize) {
        let Some(slot) = self.slots.get(index) else { return };
        while !self.quit() {
            // Whoever rings from now on wakes this thread; what was rung for before is seen now.
            slot.sleeping.store(true, Ordering::SeqCst);
            let found = self.serve_one(slot, true);
            match found {
                Found::Served => {}
                Found::Nothing => slot.bell.wait(),
                Found::Later(time) => slot.bell.wait_for(time),
            }
            slot.sleeping.store(false, Ordering::SeqCst);
        }
    }

    /// A thread that helps where it is called.
    fn help(&self) {
        loop {
            let mut helpers = lock(&self.helpers);
            helpers.sleeping += 1;
            while helpers.called == 0 && !helpers.quit {
                helpers = self.wake.wait(helpers).unwrap_or_else(PoisonError::into_inner);
            }
            helpers.sleeping -= 1;
            helpers.called = helpers.called.saturating_sub(1);
            if helpers.quit {
                return;
            }
            drop(helpers);
            for slot in &self.slots {
                while matches!(self.serve_one(slot, false), Found::Served) {}
            }
        }
    }

    /// Takes a request and carries it out; `own`: by the queue's own thread.
    fn serve_one(&self, slot: &Slot, own: bool) -> Found {
        let mut state = lock(&slot.state);
        let State { queue: Some(queue), stopping: false, flush, .. } = &mut *state else { return Found::Nothing };
        if queue.is_broken() {
            return Found::Nothing;
        }
        let flush = *flush;
        let memory = queue.memory();
        let mut limiter = lock(self.device.disk.limiter());
        if limiter.limits()
            && !queue.is_empty()
            && let Some(wait) = limiter.wait(Instant::now())
        {
            return Found::Later(wait);
        }
        let taken = queue.pop(&memory).and_then(|chain| {
            // The driver rings again for what comes next: another thread may serve it while this one waits for the host.
            Ok((chain, queue.enable_notification()?))
        });
        let (chain, more) = match taken {
            Ok(taken) => taken,
            Err(why) => {
                queue.fail(&why);
                return Found::Nothing;
            }
        };
        let Some(mut chain) = chain else {
            // What came in this moment is taken by the next look.
            return if more { Found::Served } else { Found::Nothing };
        };
        if own {
            // It does not sleep: rings call others.
            slot.sleeping.store(false, Ordering::SeqCst);
        }
        let policy = self.device.policy(flush);
        let request = request::parse(&self.device.disk, policy, &mut chain);
        if limiter.limits() {
            limiter.take(request.as_ref().map_or(0, request::Request::bytes));
        }
        drop(limiter);
        state.busy += 1;
        drop(state);
        if more {
            self.call_helper();
        }
        let work = || request.map_or(0, |request| request.run(&self.device.disk, policy));
        let written = catch_unwind(AssertUnwindSafe(work));
        let mut state = lock(&slot.state);
        if let Some(queue) = &mut state.queue {
            let done = match written {
                Ok(written) => finish(queue, chain.head, written).map_err(|why| why.to_string()),
                Err(_) => Err("the disk's thread failed".into()),
            };
            if let Err(why) = done {
                queue.fail(&why);
            }
        }
        state.busy -= 1;
        if state.busy == 0 {
            slot.idle.notify_all();
        }
        Found::Served
    }
}

fn finish(queue: &mut Virtqueue, head: u16, written: u32) -> Result<(), QueueError> {
    queue.push(head, written)?;
    queue.signal()
}
