//! The seam between the supervisor and a machine: what [`crate::Vm`] needs of a machine and no more. The PC implements it
//! (`pc.rs`); tests put a toy in its place.

use std::sync::Arc;

use cpu::{Bus, Chips, CpuState, Kick, LocalApic};
use machine::PcState;
use memory::GuestRam;
use virtio::{BalloonHandle, SizeWatch};

use crate::console::{Input, Output};
use crate::error::Error;
use crate::events::Events;

/// A machine, built and loaded, around vCPUs that are still to be made.
pub(crate) trait Board: Send {
    /// Everything that is not RAM, as vCPU `index` sees it.
    fn bus(&self, index: u32) -> Option<Arc<dyn Bus>>;
    /// The local APIC of vCPU `index`.
    fn lapic(&self, index: u32) -> Option<Arc<dyn LocalApic>>;
    /// How to wake vCPU `index`, once it is made.
    fn attach(&mut self, index: u32, kick: Arc<dyn Kick>);
    /// All vCPUs have been made, or the machine was built anew around them: chips that are the engine's get their state.
    fn start_chips(&self) -> Result<(), Error>;
    /// Stops what devices do for the guest by themselves; each request they have taken is answered on return.
    fn pause_devices(&self);
    /// They go on.
    fn resume_devices(&self);
    /// The devices' state, paused and with no vCPU running.
    fn save(&self) -> Result<PcState, Error>;
    /// Takes it over, after the vCPUs' states were set; devices are paused afterwards.
    fn restore(&self, state: &PcState) -> Result<(), Error>;
    /// The state in which vCPU `index` starts.
    fn start_state(&self, index: u32) -> CpuState;
    /// The guest's end of console input.
    fn console(&self) -> Arc<dyn Input>;
    /// Presses the power button: a guest that listens shuts down.
    fn press_power_button(&self) {}
    /// Sends all vCPUs a non-maskable interrupt.
    fn nmi(&self) {}
    /// The virtio console's window has this many columns and rows now.
    fn resize_console(&self, columns: u16, rows: u16) {
        let _ = (columns, rows);
    }
    /// The disks, for new sizes.
    fn disks(&self) -> Vec<SizeWatch> {
        Vec::new()
    }
    /// How to take memory from the guest, where that is possible.
    fn balloon(&self) -> Option<BalloonHandle> {
        None
    }
    /// Counters as `(kind, value)`.
    fn counters(&self) -> Vec<(String, u64)>;
}

/// Makes boards: one at the start, and one more for each reset, around the same buses and local APICs.
pub(crate) trait BoardMaker: Send {
    /// Builds the devices and loads the kernel. `chips` are the engine's, if it has its own. The guest's wish to switch off or reset comes as an event; what it writes on its
    /// console goes to `output`.
    fn build(
        &mut self,
        ram: &GuestRam,
        chips: Option<Arc<dyn Chips>>,
        events: &Events,
        output: &Output,
    ) -> Result<Box<dyn Board>, Error>;
}
