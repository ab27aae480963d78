//! Where a vCPU spends its time: a timer of its thread notes the place in translated code, a thousand times a second.
//!
//! The timer is set anew by its own signal, and not while the vCPU sleeps: a guest that is idle costs nothing.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Between two samples, in nanoseconds.
const INTERVAL: i64 = 1_000_000;
/// Samples that are kept until the vCPU looks at them.
const ROOM: usize = 64;
/// So many make it look.
const BATCH: u32 = 16;
/// So many samples of a program one after the other show that it computes.
const STEADY: u32 = 4;
/// The time between the first and the last of them.
pub const STEADY_TIME: Duration = Duration::from_nanos((STEADY as u64 - 1) * INTERVAL as u64);

/// Samples of one vCPU. Written by the signal's handler, which runs on the vCPU's own thread.
pub struct Sampler {
    count: AtomicU32,
    places: [AtomicU64; ROOM],
    /// Samples one after the other that found a program, not the kernel.
    programs: AtomicU32,
    /// Number of the programs' entries into the kernel at the first of them.
    entries: AtomicU32,
    /// The vCPU does not run guest code for now.
    asleep: AtomicBool,
    /// The timer is set.
    armed: AtomicBool,
    /// The timer's number; negative: there is none.
    timer: AtomicI32,
    /// Number of the thread that is looked at.
    thread: AtomicI32,
}

impl Sampler {
    pub fn new() -> Self {
        Self {
            count: AtomicU32::new(0),
            places: [const { AtomicU64::new(0) }; ROOM],
            programs: AtomicU32::new(0),
            entries: AtomicU32::new(0),
            asleep: AtomicBool::new(true),
            armed: AtomicBool::new(false),
            timer: AtomicI32::new(-1),
            thread: AtomicI32::new(-1),
        }
    }

    /// Makes the calling thread the one that is looked at. Returns whether that can be done.
    pub fn attach(&self) -> bool {
        // SAFETY: a plain system call.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
        if self.timer.load(Ordering::Relaxed) >= 0 && self.thread.load(Ordering::Relaxed) == thread {
            return true;
        }
        self.detach();
        // SAFETY: plain data, filled in below; the system call reads the event and writes the number of the timer.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = libc::SIGPROF;
            event.sigev_notify_thread_id = thread;
            let mut timer = -1_i32;
            if libc::syscall(libc::SYS_timer_create, libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) != 0 {
                return false;
            }
            self.timer.store(timer, Ordering::Relaxed);
            self.thread.store(thread, Ordering::Relaxed);
        }
        true
    }

    /// Nobody is looked at any more.
    fn detach(&self) {
        let timer = self.timer.swap(-1, Ordering::Relaxed);
        if timer >= 0 {
            // SAFETY: our own timer.
            unsafe { libc::syscall(libc::SYS_timer_delete, timer) };
        }
        self.armed.store(false, Ordering::Relaxed);
    }

    /// The vCPU goes to sleep: at most one more signal comes.
    pub fn sleep(&self) {
        self.asleep.store(true, Ordering::Relaxed);
    }

    /// The vCPU runs again. To be called on the thread that is attached.
    #[inline]
    pub fn wake(&self) {
        self.asleep.store(false, Ordering::Relaxed);
        if !self.armed.load(Ordering::Relaxed) {
            self.arm();
        }
    }

    #[cold]
    fn arm(&self) {
        let timer = self.timer.load(Ordering::Relaxed);
        if timer < 0 {
            return;
        }
        self.armed.store(true, Ordering::Relaxed);
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let once = libc::itimerspec { it_interval: none, it_value: libc::timespec { tv_sec: 0, tv_nsec: INTERVAL } };
        // SAFETY: our own timer; the specification is only read.
        unsafe { libc::syscall(libc::SYS_timer_settime, timer, 0, &raw const once, std::ptr::null_mut::<u8>()) };
    }

    /// The timer's signal; `place`: the thread was in translated code, at this host address; `program`: of a program, with the number of
    /// entries into the kernel up to now. Returns whether the vCPU
    /// should look. Safe to call in a signal's handler.
    pub fn tick(&self, place: Option<u64>, program: Option<u32>) -> bool {
        self.armed.store(false, Ordering::Relaxed);
        if self.asleep.load(Ordering::Relaxed) {
            return false;
        }
        self.arm();
        let programs = match program {
            Some(entries) => {
                let before = self.programs.load(Ordering::Relaxed);
                if before == 0 {
                    self.entries.store(entries, Ordering::Relaxed);
                }
                before + 1
            }
            None => 0,
        };
        self.programs.store(programs, Ordering::Relaxed);
        let count = self.count.load(Ordering::Relaxed);
        if let Some(place) = place
            && let Some(room) = self.places.get(count as usize)
        {
            room.store(place, Ordering::Relaxed);
            self.count.store(count + 1, Ordering::Relaxed);
        }
        count + 1 >= BATCH || programs >= STEADY
    }

    /// Have programs had the CPU for [`STEADY_TIME`]? Tells once each time, and what the number of entries into the kernel was at its start.
    #[inline]
    pub fn steady(&self) -> Option<u32> {
        if self.programs.load(Ordering::Relaxed) < STEADY {
            return None;
        }
        self.programs.store(0, Ordering::Relaxed);
        Some(self.entries.load(Ordering::Relaxed))
    }

    /// Are there enough samples to look at?
    #[inline]
    pub fn ready(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= BATCH
    }

    /// Takes the samples out.
    pub fn take(&self) -> impl Iterator<Item = u64> {
        let count = self.count.load(Ordering::Relaxed) as usize;
        let mut places = [0; ROOM];
        for (to, from) in places.iter_mut().zip(&self.places).take(count) {
            *to = from.load(Ordering::Relaxed);
        }
        self.count.store(0, Ordering::Relaxed);
        places.into_iter().take(count)
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.detach();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_kept_until_they_are_taken() {
        let sampler = Sampler::new();
        assert!(!sampler.tick(Some(1), None), "asleep");
        sampler.wake();
        for n in 1..BATCH {
            assert!(!sampler.tick(Some(u64::from(n)), None));
        }
        assert!(!sampler.ready());
        assert!(sampler.tick(Some(99), None) && sampler.ready());
        for _ in 0..2 * ROOM {
            sampler.tick(Some(7), None);
        }
        assert_eq!(sampler.take().count(), ROOM);
        sampler.tick(None, None);
        assert_eq!(sampler.take().count(), 0);
    }

    #[test]
    fn programs_that_compute_are_told_of() {
        let sampler = Sampler::new();
        sampler.wake();
        for round in 0..5 {
            for _ in 1..STEADY {
                assert!(!sampler.tick(None, Some(round)));
                assert_eq!(sampler.steady(), None);
            }
            assert!(sampler.tick(None, Some(round)));
            assert_eq!((sampler.steady(), sampler.steady()), (Some(round), None));
            sampler.tick(None, Some(round));
            sampler.tick(None, None);
            sampler.take().count();
        }
    }
}
