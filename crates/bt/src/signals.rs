//! Host signals raised by translated code.
//!
//! A copied instruction can fault on the host as it would on the guest's CPU (#DE, #MF, #XM, misaligned SSE operand, an instruction the
//! host does not have). The handler sends the thread to the exit stub, and the dispatcher lets the interpreter raise
//! the guest's exception. A fault on the guard page of the guest-call stack only empties that stack.

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};

use crate::sampler::Sampler;

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
    /// The stubs at the start of the code cache, in bytes.
    pub stubs: usize,
    /// Who looks where the time goes.
    pub sampler: *const Sampler,
    pub kick: *const AtomicU32,
    /// [`crate::block::VcpuBlock::user`].
    pub user: *const u32,
    /// [`crate::block::VcpuBlock::entries`].
    pub entries: *const u32,
}

thread_local! {
    static INFO: Cell<Option<ThreadInfo>> = const { Cell::new(None) };
}

const SIGNALS: [i32; 6] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGPROF];
static PREVIOUS: [(AtomicUsize, AtomicUsize); SIGNALS.len()] =
    [const { (AtomicUsize::new(0), AtomicUsize::new(0)) }; SIGNALS.len()];
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
                if signal == libc::SIGPROF {
                    action.sa_flags |= libc::SA_RESTART;
                }
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
        if signal == libc::SIGPROF {
            if let Some(thread) = INFO.get() {
                sample(&thread, pc, registers[libc::REG_RSP as usize] as u64);
            }
            return;
        }
        if let Some(thread) = INFO.get()
            && pc.wrapping_sub(thread.code.0) < thread.code.1 as u64
        {
            if signal == libc::SIGSEGV {
                let address = (*info).si_addr() as u64;
                for (guard, empty) in thread.stacks {
                    if address.wrapping_sub(guard) < 4096 {
                        let old = registers[libc::REG_RSP as usize] as u64;
                        registers[libc::REG_RSP as usize] = move_top(guard + 4096, old, empty) as i64;
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

/// Bytes above the stack pointer of a guest-call stack that hold on: a stub may be running that was called from a block.
const ABOVE: u64 = 64;
/// Bytes below it that are in use: deltas of groups, see [`crate::block::MAX_GROUPS`].
const BELOW: u64 = 128;

/// Empties a guest-call stack that is full down to `bottom`, but for what is in use around its stack pointer `old`. Returns the new one.
unsafe fn move_top(bottom: u64, old: u64, empty: u64) -> u64 {
    let new = empty - ABOVE;
    let first = old.saturating_sub(BELOW).max(bottom);
    let end = (old + ABOVE).min(empty);
    for word in (first..end).step_by(8) {
        // SAFETY: both lie in the stack: the old one above its guard page, the new one less than 200 bytes below its empty end.
        unsafe { *(word.wrapping_sub(old).wrapping_add(new) as *mut u64) = *(word as *const u64) };
    }
    new
}

/// The sampler's signal.
unsafe fn sample(thread: &ThreadInfo, pc: u64, stack: u64) {
    let position = |address: u64| address.wrapping_sub(thread.code.0);
    let inside = |address: u64| position(address) < thread.code.1 as u64;
    let mut place = inside(pc).then_some(pc);
    if position(pc) < thread.stubs as u64 {
        // A stub works for the block that called it.
        // SAFETY: in stubs, the stack pointer leads to a stack of ours.
        place = Some(unsafe { *(stack as *const u64) }).filter(|&caller| inside(caller));
    }
    // SAFETY: both live as long as the vCPU that this thread runs.
    unsafe {
        let program = (thread.user.read_volatile() != 0).then(|| thread.entries.read_volatile());
        if (*thread.sampler).tick(place, program) {
            (*thread.kick).store(1, Ordering::SeqCst);
        }
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
