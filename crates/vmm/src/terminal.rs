//! The user's terminal: put into raw mode while the guest's console uses it, and put back on every way out.
//!
//! The settings found at the start are kept in memory that is never freed, so that [`restore`] may run anywhere: at a normal
//! exit, in a panic hook, in a handler of a fatal signal. Only SIGKILL, and a violation of the sandbox, leave no chance.

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::termios::{
    ControlModes, InputModes, LocalModes, OptionalActions, OutputModes, SpecialCodeIndex, Termios, isatty, tcgetattr,
    tcgetpgrp, tcgetwinsize, tcsetattr,
};

struct Settings {
    original: Termios,
    raw: Termios,
}

static SETTINGS: OnceLock<Settings> = OnceLock::new();
/// Is the terminal meant to be raw now?
static RAW: AtomicBool = AtomicBool::new(false);

fn stdin() -> BorrowedFd<'static> {
    rustix::stdio::stdin()
}

/// Is standard input a terminal?
pub fn is_terminal() -> bool {
    isatty(stdin())
}

/// Columns and rows of the terminal on standard input, if it is one and says so.
pub fn window() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Puts the terminal on standard input into raw mode: every key goes to the guest. Does nothing if it is no terminal, and
/// waits for [`resume`] if this process is in the background.
///
/// # Errors
/// What the host says.
pub fn enter_raw() -> std::io::Result<()> {
    if !is_terminal() {
        return Ok(());
    }
    if SETTINGS.get().is_none() {
        let original = tcgetattr(stdin())?;
        let mut raw = original.clone();
        raw.input_modes -= InputModes::IGNBRK
            | InputModes::BRKINT
            | InputModes::PARMRK
            | InputModes::ISTRIP
            | InputModes::INLCR
            | InputModes::IGNCR
            | InputModes::ICRNL
            | InputModes::IXON;
        raw.output_modes -= OutputModes::OPOST;
        raw.local_modes -=
            LocalModes::ECHO | LocalModes::ECHONL | LocalModes::ICANON | LocalModes::ISIG | LocalModes::IEXTEN;
        raw.control_modes -= ControlModes::CSIZE | ControlModes::PARENB;
        raw.control_modes |= ControlModes::CS8;
        raw.special_codes[SpecialCodeIndex::VMIN] = 1;
        raw.special_codes[SpecialCodeIndex::VTIME] = 0;
        let _ = SETTINGS.set(Settings { original, raw });
    }
    RAW.store(true, Ordering::SeqCst);
    resume();
    Ok(())
}

/// Puts the terminal into raw mode again after a stop, if it was raw before and this process is in the foreground.
pub(crate) fn resume() {
    if RAW.load(Ordering::SeqCst)
        && let Some(settings) = SETTINGS.get()
        && in_foreground()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings.raw);
    }
}

/// Puts the terminal back for a while: before the process is stopped.
pub(crate) fn suspend() {
    if RAW.load(Ordering::SeqCst)
        && let Some(settings) = SETTINGS.get()
        && in_foreground()
    {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &settings.original);
    }
}

/// Puts the terminal back as it was found. May be called at any time, more than once and in a signal handler.
pub fn restore() {
    suspend();
    RAW.store(false, Ordering::SeqCst);
}

/// A background process that changes its terminal is stopped by the host: never try.
fn in_foreground() -> bool {
    tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

static ELSEWHERE: Mutex<Option<(Box<dyn Write + Send>, bool)>> = Mutex::new(None);

/// From here on [`message`] writes to `to`; with `both` to standard error too.
pub(crate) fn messages_to(to: Box<dyn Write + Send>, both: bool) {
    *ELSEWHERE.lock().unwrap_or_else(PoisonError::into_inner) = Some((to, both));
}

/// Writes lines for the user on standard error, whatever mode the terminal is in. Each starts at the left margin.
pub fn message(text: &str) {
    let text = agent_protocol::without_numbers(text);
    let raw = RAW.load(Ordering::SeqCst);
    let lines = |end: &str| text.lines().fold(String::with_capacity(text.len() + 8), |all, line| all + line + end);
    // Not waited for: this may run while the log itself panics.
    if let Ok(mut elsewhere) = ELSEWHERE.try_lock()
        && let Some((to, both)) = elsewhere.as_mut()
    {
        let _ = to.write_all(lines("\r\n").as_bytes());
        if !*both {
            return;
        }
    }
    let _ = std::io::stderr().write_all(lines(if raw { "\r\n" } else { "\n" }).as_bytes());
}

/// Restores the terminal when dropped.
#[derive(Debug)]
pub struct Guard;

impl Drop for Guard {
    fn drop(&mut self) {
        restore();
    }
}

/// Makes panics put the terminal back and print one line.
pub fn install_panic_hook() {
    std::panic::set_hook(Box::new(|info| {
        restore();
        let what = info.payload_as_str().unwrap_or("unknown reason");
        let place = info.location().map(|at| format!(" at {}:{}", at.file(), at.line())).unwrap_or_default();
        let thread = std::thread::current().name().unwrap_or("unnamed").to_string();
        message(&format!("tightrope: internal error in thread {thread}{place}: {what}"));
        // A backtrace reads files, which the sandbox forbids.
        if std::env::var_os("RUST_BACKTRACE").is_some() && !crate::sandbox::closed() {
            message(&std::backtrace::Backtrace::force_capture().to_string());
        }
    }));
}
