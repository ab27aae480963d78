//! Signals as events. Those that concern the VM as a whole are blocked in every thread and taken by one of our own; fatal ones get
//! a handler that puts the terminal back first.

use std::mem::MaybeUninit;
use std::sync::OnceLock;

use crate::events::{Event, Events};
use crate::terminal;

const HANDLED: [i32; 9] = [
    libc::SIGINT,
    libc::SIGTERM,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGTSTP,
    libc::SIGCONT,
    libc::SIGWINCH,
];
const FATAL: [i32; 5] = [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE];

static OLD_ACTIONS: OnceLock<Vec<(i32, libc::sigaction)>> = OnceLock::new();

/// Blocks the signals in this thread and those it will start. To be called before any other thread exists.
pub(crate) fn block() {
    let set = handled();
    // SAFETY: `set` is an initialized signal set; a null old-set pointer is allowed.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
}

fn handled() -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set; sigaddset works on an initialized set and valid signal numbers.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in HANDLED {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Starts the thread that turns signals into events.
pub(crate) fn start(events: Events) -> std::io::Result<()> {
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        let set = handled();
        loop {
            // SAFETY: `set` is initialized; a null info pointer is allowed.
            let signal = unsafe { libc::sigwaitinfo(&set, std::ptr::null_mut()) };
            let sent = match signal {
                libc::SIGTSTP => {
                    terminal::suspend();
                    // SAFETY: sends a signal to this process.
                    unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
                    Ok(())
                }
                libc::SIGCONT => {
                    terminal::resume();
                    Ok(())
                }
                libc::SIGWINCH => events.send(Event::Window),
                libc::SIGUSR1 => events.send(Event::Stats),
                libc::SIGUSR2 => events.send(Event::Save),
                signal if signal > 0 => events.send(Event::Quit(128 + signal)),
                _ => Ok(()), // interrupted by another signal's handler
            };
            if sent.is_err() {
                return;
            }
        }
    })?;
    Ok(())
}

/// Makes fatal signals put the terminal back before they take their course. To be called before an engine installs handlers
/// of its own, which take precedence and hand on to these what is not theirs.
pub(crate) fn restore_terminal_when_fatal() {
    if OLD_ACTIONS.get().is_some() {
        return;
    }
    let mut old_actions = Vec::with_capacity(FATAL.len());
    for signal in FATAL {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: only reads the present action into `old`.
        if unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) } == 0 {
            // SAFETY: filled by the call above (and valid when zeroed).
            old_actions.push((signal, unsafe { old.assume_init() }));
        }
    }
    if OLD_ACTIONS.set(old_actions).is_err() {
        return;
    }
    for signal in FATAL {
        // SAFETY: a zeroed sigaction is valid; `fatal` is async-signal-safe (tcsetattr, sigaction and reads of statics).
        unsafe {
            let mut action = MaybeUninit::<libc::sigaction>::zeroed().assume_init();
            action.sa_sigaction = fatal as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_NODEFER;
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn fatal(signal: i32) {
    terminal::restore();
    if let Some((_, old)) = OLD_ACTIONS.get().and_then(|actions| actions.iter().find(|(s, _)| *s == signal)) {
        // SAFETY: `old` was filled by sigaction(2).
        unsafe { libc::sigaction(signal, old, std::ptr::null_mut()) };
    }
    if signal == libc::SIGABRT {
        // abort() has its own second try; a signal sent by somebody else does not come again by itself.
        // SAFETY: sends a signal to this thread.
        unsafe { libc::raise(signal) };
    }
    // The other signals come again when the faulting instruction does.
}
