//! What wakes the supervisor: everything that happens to a VM reaches it as an [`Event`] through one channel.

use std::sync::mpsc::Sender;

use cpu::Exit;

/// Something the supervisor has to decide on.
#[derive(Debug)]
pub(crate) enum Event {
    /// vCPU number `.0` stopped running.
    VcpuExit(u32, Exit),
    /// The guest switched its machine off.
    PowerOff,
    /// The guest asked for a reset.
    Reset,
    /// The guest's watchdog was not reloaded in time.
    Watchdog,
    /// The user's terminal may have another size.
    Window,
    /// Somebody presses the machine's power button.
    PowerButton,
    /// The command that the guest was started for ended with this exit code.
    MainExited(i32),
    /// Somebody at the console or a signal asks the VM to end with this exit code.
    Quit(i32),
    /// Somebody wants to see the counters.
    Stats,
    /// Somebody wants the VM saved and ended.
    Save,
    /// A debugger connected, sent bytes or went away.
    Debugger(DebuggerEvent),
}

/// What a debugger's connection reports.
#[derive(Debug)]
pub(crate) enum DebuggerEvent {
    /// A debugger connected.
    Connected(crate::gdb::Stream),
    /// It sent these bytes.
    Bytes(Vec<u8>),
    /// It is gone.
    Gone,
}

/// The sending end.
pub(crate) type Events = Sender<Event>;
