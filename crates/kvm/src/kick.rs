//! What other threads see of a vCPU: how to make it leave the guest at once.
//!
//! A request is a bit in a word, then `immediate_exit` in the page shared with the kernel, then a signal: a thread on its way into the guest
//! sees the byte, one in the guest gets the signal. Neither is lost (the KVM API, `KVM_RUN`).

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use cpu::Kick;
use kvm_bindings as b;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ptr};

use crate::ioctls::{KVM_RUN, KVM_SET_SIGNAL_MASK};
use crate::refusal::told;

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

    /// Makes the kernel deliver to the local APIC what its timer has pending, without running the guest. `fd` is this vCPU's, which is
    /// stopped. Half delivered afterwards may be an NMI, nothing else.
    ///
    /// A halted vCPU that cannot be interrupted is not entered: the kernel waits with it, looks at its timers, and returns for the signal
    /// that is pending from the start.
    pub fn pass_timers(&self, fd: &mut VcpuFd) -> Result<(), String> {
        let mut state = fd.get_mp_state().map_err(told("to tell the run state"))?;
        if !matches!(state.mp_state, b::KVM_MP_STATE_RUNNABLE | b::KVM_MP_STATE_HALTED) {
            return Ok(());
        }
        // What has just run out may be on its way from the host's timer.
        std::thread::sleep(Duration::from_micros(100));
        let registers = fd.get_regs().map_err(told("to tell registers"))?;
        let uninterruptible = b::kvm_regs { rflags: registers.rflags & !cpu::rflags::IF, ..registers };
        fd.set_regs(&uninterruptible).map_err(told("these registers"))?;
        let mut done = Ok(());
        // Where it was woken by something before the kernel looked, it is halted once more.
        for _ in 0..3 {
            let halted = b::kvm_mp_state { mp_state: b::KVM_MP_STATE_HALTED };
            done = fd.set_mp_state(halted).map_err(told("this run state"));
            done = done.and_then(|()| self.run_with_signal_pending(fd));
            if done.is_err() || fd.get_mp_state().is_ok_and(|now| now == halted) {
                break;
            }
            state.mp_state = b::KVM_MP_STATE_RUNNABLE;
        }
        done = done.and(fd.set_mp_state(state).map_err(told("this run state")));
        done.and(fd.set_regs(&registers).map_err(told("these registers")))
    }

    /// KVM_RUN with a signal that the thread has blocked and the vCPU has not.
    fn run_with_signal_pending(&self, fd: &mut VcpuFd) -> Result<(), String> {
        /// The kernel's form of a set of signals, with its size in front.
        #[repr(C)]
        struct Mask {
            len: u32,
            set: [u8; 8],
        }
        let everything_else = !(1_u64 << (number() - 1));
        let mask = Mask { len: 8, set: everything_else.to_ne_bytes() };
        // SAFETY: the kernel reads `len` and as many bytes.
        if unsafe { ioctl_with_ptr(fd, KVM_SET_SIGNAL_MASK(), &raw const mask) } != 0 {
            return Err(told("a signal mask")(kvm_ioctls::Error::last()));
        }
        self.set_immediate(0);
        // SAFETY: the sets are locals; the signal goes to this very thread, which has it blocked, and has a handler that does nothing.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            let mut old: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&mut set, number());
            libc::pthread_sigmask(libc::SIG_BLOCK, &set, &mut old);
            libc::syscall(libc::SYS_tgkill, libc::getpid(), libc::gettid(), number());
            // It ends at once, for the signal; should it end for another reason, that is met again when the vCPU goes on.
            let _ = ioctl(fd, KVM_RUN());
            libc::pthread_sigmask(libc::SIG_SETMASK, &old, std::ptr::null_mut());
        }
        // SAFETY: without an argument: the thread's own mask counts again.
        if unsafe { ioctl_with_ptr(fd, KVM_SET_SIGNAL_MASK(), std::ptr::null::<Mask>()) } != 0 {
            return Err(told("a signal mask")(kvm_ioctls::Error::last()));
        }
        Ok(())
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
