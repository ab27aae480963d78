//! Exceptions of an assisted instruction arrive as signals; the handler here sends them to the thunk's way out.
//!
//! It lives together with other handlers of the process: what did not happen in an assist of this thread is passed on to the handler
//! that was there before.

use std::cell::Cell;
use std::ptr;
use std::sync::OnceLock;

use super::arena::{Arena, Exchange};

/// The assist that runs on this thread.
#[derive(Clone, Copy)]
struct Active {
    first: u64,
    last: u64,
    exchange: *mut Exchange,
}

const IDLE: Active = Active { first: 1, last: 0, exchange: ptr::null_mut() };

thread_local! {
    static ACTIVE: Cell<Active> = const { Cell::new(IDLE) };
}

const SIGNALS: [i32; 4] = [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL, libc::SIGBUS];

/// What was installed before us, in the order of [`SIGNALS`].
static PREVIOUS: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

/// Installs the handler, once for the process.
pub(super) fn install() {
    PREVIOUS.get_or_init(|| {
        SIGNALS.map(|signal| {
            // SAFETY: all-zero is a valid `sigaction`; the calls get valid pointers; the handler is async-signal-safe.
            unsafe {
                let mut old: libc::sigaction = std::mem::zeroed();
                let mut new: libc::sigaction = std::mem::zeroed();
                new.sa_sigaction = handler as *const () as usize;
                new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                libc::sigemptyset(&mut new.sa_mask);
                libc::sigaction(signal, &new, &mut old);
                old
            }
        })
    });
}

/// Runs `f` with faults in `arena`'s code caught.
pub(super) fn catch(arena: &mut Arena, f: impl FnOnce(&mut Arena)) {
    let (first, last) = arena.code_range();
    let exchange: *mut Exchange = arena.exchange();
    ACTIVE.with(|active| active.set(Active { first, last, exchange }));
    f(arena);
    ACTIVE.with(|active| active.set(IDLE));
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid `ucontext_t` to a handler with SA_SIGINFO. `exchange` is valid while `ACTIVE` is set, which
    // only this thread does around a run; the thread-local is const-initialised and needs no destructor, so reaching it here is safe.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        let active = ACTIVE.with(Cell::get);
        if (active.first..=active.last).contains(&rip) {
            (*active.exchange).trap = registers[libc::REG_TRAPNO as usize] as u64 + 1;
            registers[libc::REG_RIP as usize] = (*active.exchange).exit as i64;
            return;
        }
        pass_on(signal, info, context);
    }
}

/// Does what would have been done without us.
///
/// # Safety
/// Only from a signal handler, with the handler's own arguments.
unsafe fn pass_on(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS.iter().position(|s| *s == signal).and_then(|i| PREVIOUS.get()?.get(i));
    let action = previous.map_or(libc::SIG_DFL, |p| p.sa_sigaction);
    // SAFETY: a handler that was installed with SA_SIGINFO takes three arguments, another one takes the number; the default action
    // is had by restoring it and letting the instruction fault again.
    unsafe {
        if action == libc::SIG_IGN {
            return;
        }
        if action == libc::SIG_DFL {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            libc::sigaction(signal, &default, ptr::null_mut());
            return;
        }
        if previous.is_some_and(|p| p.sa_flags & libc::SA_SIGINFO != 0) {
            let f: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(action);
            f(signal, info, context);
        } else {
            let f: extern "C" fn(i32) = std::mem::transmute(action);
            f(signal);
        }
    }
}
