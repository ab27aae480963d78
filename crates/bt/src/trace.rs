//! `--trace int,blocks,tlb`: what the engine writes down as it runs, one line an event.
//!
//! All of it happens on slow paths: translated code carries nothing for it, so what the cache does by itself (a linked jump, a hit in
//! the software TLB, SYSCALL inside the cache) leaves no line. The lines are described in `docs/debugging-a-guest.md`.

use std::fmt;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};

use cpu::CpuState;
use interp::{Delivery, Observer};

/// What is traced, and where the lines go. Clones write to the same place.
#[derive(Clone)]
pub struct Trace {
    /// Interrupts and exceptions as they are delivered.
    pub interrupts: bool,
    /// Translations, copies and invalidations of blocks.
    pub blocks: bool,
    /// Fills and flushes of the software TLB.
    pub tlb: bool,
    sink: Arc<Mutex<dyn Write + Send>>,
}

impl Trace {
    /// A trace of nothing yet, to `sink`.
    pub fn new(sink: Arc<Mutex<dyn Write + Send>>) -> Self {
        Self { interrupts: false, blocks: false, tlb: false, sink }
    }

    /// Writes one line. What cannot be written is lost: the guest goes on.
    pub(crate) fn line(&self, text: fmt::Arguments<'_>) {
        let mut sink = self.sink.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = sink.write_all(format!("{text}\n").as_bytes());
    }
}

impl fmt::Debug for Trace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { interrupts, blocks, tlb, .. } = self;
        f.debug_struct("Trace").field("interrupts", interrupts).field("blocks", blocks).field("tlb", tlb).finish()
    }
}

/// Sees what the interpreter delivers to the guest.
pub(crate) struct Interrupts {
    pub trace: Trace,
    pub cpu: u32,
}

impl Observer for Interrupts {
    fn delivery(&mut self, state: &CpuState, delivery: &Delivery) {
        let kind = if delivery.external {
            "external"
        } else if delivery.software {
            "software"
        } else {
            cpu::vector::NAMES.get(usize::from(delivery.vector)).copied().unwrap_or_default()
        };
        let code = delivery.error_code.map_or(String::new(), |code| format!(" code {code:#x}"));
        let cr2 = if delivery.vector == 14 && !delivery.external && !delivery.software {
            format!(" cr2 {:#x}", state.cr2)
        } else {
            String::new()
        };
        self.trace.line(format_args!(
            "int cpu{} vector {:#04x} {kind}{code}{cr2} rip {:#x} cpl {} rsp {:#x}",
            self.cpu,
            delivery.vector,
            state.rip,
            state.cpl(),
            state.gpr[cpu::gpr::RSP],
        ));
    }
}
