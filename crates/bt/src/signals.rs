//! Host signals raised by translated code.
//!
//! A copied instruction can fault on the host as it would on the guest's CPU (#DE, #MF, #XM, misaligned SSE operand, an instruction the
//! host does not have). The handler sends the thread to the exit stub, and the dispatcher lets the interpreter raise
//! the guest's exception. A fault on the guard page of the guest-call stack only empties that stack.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the handler needs to know of the thread it runs on.
#[derive(Clone, Copy)]
pub struct ThreadInfo {
    /// Executable view of the code cache.
    pub code: (u64, usize),
    /// Where faults go.
    pub fault_stub: u64,
    /// Where the handler leaves the host RIP and the signal number.
    pub fault_pc: *mut u64,
    pub fault_signal: *mut u64,
    /// Guard page and stack pointer of the empty stack, for both guest-call stacks.
    pub stacks: [(u64, u64); 2],
}

thread_local! {
    static INFO: Cell<Option<ThreadInfo>> = const { Cell::new(None) };
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];
static PREVIOUS: [(AtomicUsize, AtomicUsize); 5] = [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; 5];
static INSTALL: Once = Once::new();

/// Installs the process's handlers (once) and this thread's alternate stack.
pub fn install(info: ThreadInfo) {
    INFO.set(Some(info));
    INSTALL.call_once(|| {
        for (i, &signal) in SIGNALS.iter().enumerate() {
            // SAFETY: plain sigaction with a handler of the right signature; the old action is kept for chaining.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                libc::sigemptyset(&mut action.sa_mask);
                let mut old = MaybeUninit::<libc::sigaction>::zeroed();
                if libc::sigaction(signal, &action, old.as_mut_ptr()) == 0 {
                    let old = old.assume_init();
                    PREVIOUS[i].0.store(old.sa_sigaction, Ordering::SeqCst);
                    PREVIOUS[i].1.store(old.sa_flags as usize, Ordering::SeqCst);
                }
            }
        }
    });
    // SAFETY: a fresh mapping becomes this thread's alternate stack; it is never unmapped.
    unsafe {
        let mut current: libc::stack_t = std::mem::zeroed();
        if libc::sigaltstack(std::ptr::null(), &mut current) == 0
            && (current.ss_flags & libc::SS_DISABLE != 0 || current.ss_size < 64 << 10)
        {
            let size = 128 << 10;
            let memory = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            if memory != libc::MAP_FAILED {
                let stack = libc::stack_t { ss_sp: memory, ss_flags: 0, ss_size: size };
                libc::sigaltstack(&stack, std::ptr::null_mut());
            }
        }
    }
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes valid pointers; `ThreadInfo`'s pointers are into this thread's vCPU block.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let pc = registers[libc::REG_RIP as usize] as u64;
        if let Some(thread) = INFO.get()
            && pc.wrapping_sub(thread.code.0) < thread.code.1 as u64
        {
            if signal == libc::SIGSEGV {
                let address = (*info).si_addr() as u64;
                for (guard, empty) in thread.stacks {
                    if address.wrapping_sub(guard) < 4096 {
                        registers[libc::REG_RSP as usize] = empty as i64;
                        return;
                    }
                }
            }
            *thread.fault_pc = pc;
            *thread.fault_signal = signal as u64;
            registers[libc::REG_RIP as usize] = thread.fault_stub as i64;
            return;
        }
        chain(signal, info, context);
    }
}

/// Hands the signal to whoever had it before, or lets it kill the process.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(index) = SIGNALS.iter().position(|&s| s == signal) else { return };
    let action = PREVIOUS[index].0.load(Ordering::SeqCst);
    let flags = PREVIOUS[index].1.load(Ordering::SeqCst) as i32;
    // SAFETY: `action` is what sigaction reported for this signal, called by the convention its flags tell.
    unsafe {
        if action == libc::SIG_DFL || action == libc::SIG_IGN {
            libc::signal(signal, libc::SIG_DFL);
        } else if flags & libc::SA_SIGINFO != 0 {
            let function: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(action);
            function(signal, info, context);
        } else {
            let function: extern "C" fn(i32) = std::mem::transmute(action);
            function(signal);
        }
    }
}
