//! Interrupt lines and message-signalled interrupts, as devices see them.
//!
//! A device holds an [`IrqLine`] (a wire into the interrupt chips) or sends messages to an [`MsiSink`]. Neither knows which chip or
//! which vCPU is behind.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cpu::chips::MessageLine;

/// The interrupt chips: something that has numbered input wires.
pub trait IrqSink: Send + Sync {
    /// Wire `gsi` (global system interrupt: ISA IRQs are 0 to 15) is now high (`true`) or low.
    fn set_level(&self, gsi: u32, high: bool);
}

/// Takes message-signalled interrupts: writes to 0xFEEx_xxxx (SDM volume 3, 11.11).
pub trait MsiSink: Send + Sync {
    /// A device wrote `data` to `address`.
    fn send(&self, address: u64, data: u32);
    /// A way for the messages of one source, where there is a shorter one.
    fn line(&self) -> Option<Box<dyn MessageLine>> {
        None
    }
}

/// One wire from a device to the interrupt chips.
pub struct IrqLine {
    sink: Arc<dyn IrqSink>,
    gsi: u32,
    high: AtomicBool,
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqLine").field("gsi", &self.gsi).field("high", &self.is_high()).finish_non_exhaustive()
    }
}

impl IrqLine {
    /// The wire to input `gsi` of the chips; low at first.
    pub fn new(sink: Arc<dyn IrqSink>, gsi: u32) -> Self {
        Self { sink, gsi, high: AtomicBool::new(false) }
    }

    /// Drives the wire. The caller serialises calls (by its own lock), so that the last call decides the level.
    pub fn set(&self, high: bool) {
        if self.high.swap(high, Ordering::SeqCst) != high {
            self.sink.set_level(self.gsi, high);
        }
    }

    /// An edge: low, high, low.
    pub fn pulse(&self) {
        self.set(false);
        self.set(true);
        self.set(false);
    }

    /// Is the wire high?
    pub fn is_high(&self) -> bool {
        self.high.load(Ordering::SeqCst)
    }

    /// Its number.
    pub fn gsi(&self) -> u32 {
        self.gsi
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use std::sync::Mutex;

    /// Records what it is told.
    #[derive(Default)]
    pub struct Recorder {
        pub levels: Mutex<Vec<(u32, bool)>>,
        pub messages: Mutex<Vec<(u64, u32)>>,
    }

    impl IrqSink for Recorder {
        fn set_level(&self, gsi: u32, high: bool) {
            self.levels.lock().unwrap().push((gsi, high));
        }
    }

    impl MsiSink for Recorder {
        fn send(&self, address: u64, data: u32) {
            self.messages.lock().unwrap().push((address, data));
        }
    }

    #[test]
    fn line_tells_changes_only() {
        let recorder = Arc::new(Recorder::default());
        let line = IrqLine::new(recorder.clone(), 4);
        line.set(false);
        line.set(true);
        line.set(true);
        line.pulse();
        assert_eq!(*recorder.levels.lock().unwrap(), [(4, true), (4, false), (4, true), (4, false)]);
    }
}
