//! What other threads see of a vCPU: how to make it leave the guest at once.
//!
//! A request is a bit in a word, then `immediate_exit` in the page shared with the kernel, then a signal: a thread on its way into the guest
//! sees the byte, one in the guest gets the signal. Neither is lost (the KVM API, `KVM_RUN`).

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use cpu::Kick;
use kvm_ioctls::VcpuFd;

/// Leave the guest once; nothing else is asked.
pub const WAKE: u32 = 1 << 0;
/// Return [`cpu::Exit::Stopped`].
pub const STOP: u32 = 1 << 1;
/// Look whether the vCPU is halted for good.
pub const LOOK: u32 = 1 << 2;
/// All of them.
pub const ALL: u32 = WAKE | STOP | LOOK;

/// One vCPU as other threads see it.
pub struct Cell {
    fd: Mutex<VcpuFd>,
    /// `immediate_exit` in the page that the kernel shares, which lives as long as `fd`.
    immediate: *const AtomicU8,
    /// The thread that runs it; 0: none.
    thread: AtomicI32,
    requests: AtomicU32,
    /// Returns from the guest.
    pub exits: AtomicU64,
    /// Found halted with interrupts off when it was looked at last.
    pub stuck: AtomicBool,
}

// SAFETY: `immediate` points to a byte in a mapping owned by `fd`, which is only read and written atomically; all else is Send and Sync.
unsafe impl Send for Cell {}
// SAFETY: as above.
unsafe impl Sync for Cell {}

impl Cell {
    pub fn new(mut fd: VcpuFd) -> Arc<Self> {
        install_handler();
        let immediate = (&raw mut fd.get_kvm_run().immediate_exit).cast_const().cast::<AtomicU8>();
        Arc::new(Self {
            fd: Mutex::new(fd),
            immediate,
            thread: AtomicI32::new(0),
            requests: AtomicU32::new(0),
            exits: AtomicU64::new(0),
            stuck: AtomicBool::new(false),
        })
    }

    /// The vCPU for requests to the kernel; waits while it runs.
    pub fn fd(&self) -> MutexGuard<'_, VcpuFd> {
        self.fd.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same, but `None` while it runs.
    pub fn stopped_fd(&self) -> Option<MutexGuard<'_, VcpuFd>> {
        match self.fd.try_lock() {
            Ok(guard) => Some(guard),
            Err(std::sync::TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
            Err(std::sync::TryLockError::WouldBlock) => None,
        }
    }

    fn set_immediate(&self, value: u8) {
        // SAFETY: see the field; the mapping lives as long as `self.fd`.
        unsafe { &*self.immediate }.store(value, Ordering::SeqCst);
    }

    /// This thread begins to run the vCPU.
    pub fn enter(&self) {
        // SAFETY: no preconditions.
        self.thread.store(unsafe { libc::gettid() }, Ordering::SeqCst);
    }

    /// It runs no more.
    pub fn leave(&self) {
        self.thread.store(0, Ordering::SeqCst);
    }

    /// The thread that runs the vCPU now.
    pub fn thread(&self) -> Option<i32> {
        Some(self.thread.load(Ordering::SeqCst)).filter(|thread| *thread != 0)
    }

    /// Before the guest is entered: `stop` makes the kernel finish what it has begun for the guest and return.
    pub fn prepare(&self, stop: bool) {
        self.set_immediate(u8::from(stop));
        // A request that came in between set the byte before we cleared it: its bit is there.
        if self.requests.load(Ordering::SeqCst) != 0 {
            self.set_immediate(1);
        }
    }

    pub fn request(&self, bits: u32) {
        self.requests.fetch_or(bits, Ordering::SeqCst);
        self.set_immediate(1);
        self.signal();
    }

    fn signal(&self) {
        if let Some(thread) = self.thread() {
            // SAFETY: a signal to a thread of this process, whose handler does nothing.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, number()) };
        }
    }

    pub fn asked(&self, bit: u32) -> bool {
        self.requests.load(Ordering::SeqCst) & bit != 0
    }

    pub fn take(&self, bit: u32) -> bool {
        self.requests.fetch_and(!bit, Ordering::SeqCst) & bit != 0
    }
}

/// [`cpu::Kick`] with a request.
pub struct Handle(pub Arc<Cell>, pub u32);

impl Kick for Handle {
    fn kick(&self) {
        self.0.request(self.1);
    }
}

/// The signal: one that nothing else in the process uses.
pub fn number() -> i32 {
    libc::SIGRTMIN() + 6
}

fn install_handler() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: i32) {}
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid; the handler does nothing. Without SA_RESTART, so that a request to the kernel ends.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(number(), &action, std::ptr::null_mut());
        }
    });
}
