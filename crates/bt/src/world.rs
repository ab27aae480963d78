//! Stopping the other vCPUs.
//!
//! A vCPU is *running* while it is inside translated code, the interpreter, a device or the translator, and *parked* otherwise:
//! halted, stopped by the VMM, or waiting here. An *exclusive section* is run by one vCPU while all others are parked. It
//! may do what nobody inside the code cache could bear: overwrite code, reuse its memory, make a page code.
//!
//! * A running vCPU parks only at a *safe point*: between two instructions, in the dispatcher, with no lock held. It comes there soon, because
//!   whoever wants a section sets its kick word, which translated code looks at in every loop.
//! * A parked vCPU goes on only when no section is wanted. What sections found out that concerns its own caches lies
//!   in its [`Mail`], which it opens before it goes on.
//! * Asking for a section is itself a safe point: others may have theirs first.
//!
//! With one vCPU a section is a plain call.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::cache::Forgotten;
use crate::kick::KickHandle;

/// Looks at a changing word before a thread goes to sleep over it, where there is a core for each vCPU.
const SPINS: u32 = 200;
/// More mail than this is replaced by "forget everything".
const MAX_MAIL: usize = 64;

/// What a parked vCPU must do to its own caches before it goes on.
#[derive(Default)]
pub struct Mail {
    /// Guest-physical pages that hold translated code now: no write entries for them.
    pub protect: Vec<u64>,
    /// Translations that have gone.
    pub forgotten: Vec<Arc<Forgotten>>,
    /// Too much to list: everything is to be flushed.
    pub everything: bool,
}

impl Mail {
    fn limit(&mut self) {
        if self.protect.len() > MAX_MAIL || self.forgotten.len() > MAX_MAIL {
            *self = Self { everything: true, ..Self::default() };
        }
    }

    /// The page at this guest-physical address holds code now.
    pub fn protect(&mut self, gpa: u64) {
        if !self.everything {
            self.protect.push(gpa);
            self.limit();
        }
    }

    /// These translations have gone.
    pub fn forget(&mut self, forgotten: &Arc<Forgotten>) {
        if !self.everything {
            self.forgotten.push(forgotten.clone());
            self.limit();
        }
    }
}

/// Why the others were stopped, for the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// A page becomes code.
    Protect,
    /// Code was written.
    Drop,
    /// The cache is full, or breakpoints change.
    Flush,
    /// A jump across two cache lines is linked.
    Link,
    /// A locked access that the host cannot do as one.
    Locked,
    /// A check site predicts no more.
    Predict,
    /// Hot blocks are translated again.
    Promote,
}

/// Names of the causes, in their order.
pub const CAUSES: [&str; 7] = ["protect", "drop", "flush", "link", "locked", "predict", "promote"];

/// The vCPUs, and who stops whom.
#[derive(Default)]
pub struct World {
    vcpus: Mutex<Vec<Arc<KickHandle>>>,
    /// One section at a time.
    turn: Mutex<()>,
    /// A section is wanted or going on. Changed under `state`.
    wanted: AtomicBool,
    state: Mutex<()>,
    /// Somebody has parked.
    parked: Condvar,
    /// The section is over.
    over: Condvar,
    count: AtomicUsize,
    /// No vCPU can ever go on.
    pub stuck: AtomicBool,
    /// Spinning makes sense: the host has a core for each vCPU.
    spin: AtomicBool,
    /// Sections with more than one vCPU, by cause.
    pub sections: [AtomicU64; CAUSES.len()],
    /// Time from wanting a section to having it, in nanoseconds.
    pub waited: AtomicU64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes this CPU see code that others wrote (SDM volume 3, 9.1.3: the processor that executes modified code executes a serializing
/// instruction first). IRET to the next instruction is the cheapest one that programs have.
#[inline]
fn serialize() {
    // SAFETY: builds the frame of an IRET that goes on behind it with the same stack, segments and flags; the red zone is left alone.
    unsafe {
        std::arch::asm!(
            "mov {saved}, rsp",
            "sub rsp, 128",
            "mov {selector:e}, ss",
            "push {selector}",
            "push {saved}",
            "pushfq",
            // With NT set, IRET would want to return to another task.
            "test dword ptr [rsp], 0x4000",
            "jz 3f",
            "and dword ptr [rsp], -0x4001",
            "popfq",
            "pushfq",
            "3:",
            "mov {selector:e}, cs",
            "push {selector}",
            "lea {selector}, [rip + 2f]",
            "push {selector}",
            "iretq",
            "2:",
            saved = out(reg) _,
            selector = out(reg) _,
        );
    }
}

impl World {
    /// Adds a vCPU, parked.
    pub fn add(&self, vcpu: Arc<KickHandle>) {
        let mut vcpus = lock(&self.vcpus);
        vcpus.push(vcpu);
        self.count.store(vcpus.len(), Ordering::Relaxed);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        self.spin.store(vcpus.len() <= cores, Ordering::Relaxed);
    }

    /// Is there only one vCPU?
    pub fn alone(&self) -> bool {
        self.count.load(Ordering::Relaxed) <= 1
    }

    /// Calls `f` for each vCPU.
    pub fn each(&self, mut f: impl FnMut(&Arc<KickHandle>)) {
        lock(&self.vcpus).iter().for_each(&mut f);
    }

    /// To be called by a vCPU that is about to sleep and has said so. If all do, and nothing is on its way to any of them, all are woken to
    /// find the guest stuck.
    pub fn check_stuck(&self) {
        let mut all = true;
        self.each(|vcpu| {
            all &= vcpu.hopeless.load(Ordering::SeqCst) && vcpu.memory.kick_word().load(Ordering::SeqCst) == 0;
        });
        if all {
            self.stuck.store(true, Ordering::SeqCst);
            self.each(|vcpu| vcpu.raise());
        }
    }

    /// Calls a vCPU out of its HLT.
    pub fn unhalt(&self, index: u32) {
        self.each(|vcpu| {
            if vcpu.index == index {
                vcpu.unhalted.store(true, Ordering::SeqCst);
                vcpu.raise();
            }
        });
    }

    /// Puts mail into the boxes of all vCPUs but `own`. In a section only.
    pub fn send(&self, own: &KickHandle, mut write: impl FnMut(&mut Mail)) {
        self.each(|vcpu| {
            if !std::ptr::eq(&**vcpu, own) {
                write(&mut lock(&vcpu.mail));
                vcpu.has_mail.store(true, Ordering::Release);
            }
        });
    }

    /// Is a section wanted? A running vCPU then parks at its next safe point.
    #[inline]
    pub fn wanted(&self) -> bool {
        self.wanted.load(Ordering::SeqCst)
    }

    /// The vCPU leaves: it is parked from now on.
    pub fn park(&self, vcpu: &KickHandle) {
        vcpu.running.store(false, Ordering::SeqCst);
        if self.wanted() {
            drop(lock(&self.state));
            self.parked.notify_all();
        }
    }

    /// The vCPU comes back: it waits until no section is wanted, and is running from then on. Its mail is to be opened next.
    pub fn unpark(&self, vcpu: &KickHandle) {
        loop {
            vcpu.running.store(true, Ordering::SeqCst);
            if !self.wanted() {
                break;
            }
            // The section's owner may just have seen us running.
            self.park(vcpu);
            for _ in 0..if self.spin.load(Ordering::Relaxed) { SPINS } else { 0 } {
                if !self.wanted() {
                    break;
                }
                std::hint::spin_loop();
            }
            let mut guard = lock(&self.state);
            while self.wanted() {
                guard = self.over.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
        }
        serialize();
    }

    /// Begins an exclusive section of `vcpu`, which must be at a safe point. [`Section::end`] or dropping it ends it, and leaves the vCPU
    /// running if it was. `None`: there is no other vCPU.
    pub fn begin<'a>(&'a self, vcpu: &'a KickHandle, cause: Cause) -> Option<Section<'a>> {
        if self.alone() {
            return None;
        }
        let start = std::time::Instant::now();
        let was_running = vcpu.running.load(Ordering::SeqCst);
        // While we wait for our turn, others may have theirs.
        self.park(vcpu);
        let turn = lock(&self.turn);
        {
            let _guard = lock(&self.state);
            self.wanted.store(true, Ordering::SeqCst);
        }
        let vcpus: Vec<Arc<KickHandle>> = lock(&self.vcpus).clone();
        let running = || vcpus.iter().any(|other| other.running.load(Ordering::SeqCst));
        vcpus.iter().filter(|other| other.running.load(Ordering::SeqCst)).for_each(|other| other.nudge());
        for _ in 0..if self.spin.load(Ordering::Relaxed) { SPINS * 10 } else { 0 } {
            if !running() {
                break;
            }
            std::hint::spin_loop();
        }
        let mut guard = lock(&self.state);
        while running() {
            guard = self.parked.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        drop(guard);
        self.sections[cause as usize].fetch_add(1, Ordering::Relaxed);
        self.waited.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        Some(Section { world: self, vcpu, was_running, _turn: turn })
    }
}

/// An exclusive section: all other vCPUs are parked.
pub struct Section<'a> {
    world: &'a World,
    vcpu: &'a KickHandle,
    was_running: bool,
    _turn: MutexGuard<'a, ()>,
}

impl Drop for Section<'_> {
    fn drop(&mut self) {
        // Running again before anybody else can begin a section: what was found in this one stays true until the next safe point.
        self.vcpu.running.store(self.was_running, Ordering::SeqCst);
        {
            let _guard = lock(&self.world.state);
            self.world.wanted.store(false, Ordering::SeqCst);
        }
        self.world.over.notify_all();
        serialize();
    }
}

#[cfg(test)]
mod tests {
    /// With RFLAGS.NT set, IRET would fault.
    #[test]
    fn serializing_needs_no_clean_flags() {
        // SAFETY: sets a flag that only IRET looks at.
        unsafe { std::arch::asm!("pushfq", "or qword ptr [rsp], 0x4000", "popfq") };
        super::serialize();
        let flags: u64;
        // SAFETY: reads the flags.
        unsafe { std::arch::asm!("pushfq", "pop {}", out(reg) flags) };
        assert_eq!(flags & 0x4000, 0);
    }
}
