//! Interrupt chips and timers that an engine brings along, such as those in the host's kernel.
//!
//! An engine that has them answers [`crate::Engine::chips`]; the machine then sends its interrupt lines and messages there and leaves
//! its own chips unused. Registers are exchanged in the forms here, which are the chips' own as their manuals tell them; the
//! machine turns them into its saved state, so that a VM can be saved with one kind of chips and restored with the other.

use std::any::Any;
use std::os::fd::BorrowedFd;

/// Holds something in place until it is dropped.
pub type Binding = Box<dyn Any + Send + Sync>;

/// The way of one source's messages to the local APICs.
pub trait MessageLine: Send + Sync {
    /// As [`Chips::send_msi`]; fast when the message is the same as the last.
    fn send(&self, address: u64, data: u32);
}

/// Interrupt chips and timers outside the machine: local APICs, IOAPIC, the pair of PICs, PIT.
pub trait Chips: Send + Sync {
    /// Wire `gsi` (global system interrupt; ISA IRQs are 0 to 15) is now high or low.
    fn set_level(&self, gsi: u32, high: bool);
    /// A message-signalled interrupt: `data` written to `address` (SDM volume 3, 11.11).
    fn send_msi(&self, address: u64, data: u32);
    /// A way for the messages of one source, such as a vector of a device. `None`: there is none (any more); use
    /// [`Chips::send_msi`].
    fn message_line(&self) -> Option<Box<dyn MessageLine>> {
        None
    }
    /// Counts the event counter `event` up when the guest writes to the guest-physical `address`, whatever and in whatever size, instead
    /// of calling [`crate::Bus::mmio_write`], until the result is dropped. `None`: this engine does not, or not this one.
    fn doorbell(&self, address: u64, event: BorrowedFd<'_>) -> Option<Binding> {
        let _ = (address, event);
        None
    }
    /// The NMI button: an NMI to every vCPU.
    fn nmi(&self);
    /// The registers of all chips. No vCPU may run.
    ///
    /// # Errors
    /// One line why not.
    fn save(&self) -> Result<ChipRegisters, String>;
    /// Sets the registers of all chips, once all vCPUs are made. None may run. TSC offsets must have been set before.
    ///
    /// # Errors
    /// One line why not; the VM must not run then.
    fn restore(&self, registers: &ChipRegisters) -> Result<(), String>;
}

/// The registers of all chips.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChipRegisters {
    /// Local APICs by vCPU.
    pub lapics: Vec<LapicRegisters>,
    /// IOAPIC.
    pub ioapic: IoApicRegisters,
    /// PICs: master, slave.
    pub pics: [PicRegisters; 2],
    /// PIT.
    pub pit: PitRegisters,
}

/// A local APIC (SDM volume 3, 11.4).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LapicRegisters {
    /// The register page in xAPIC format: element `n` is the register at offset `16 * n`. The current count (offset 0x390) is
    /// what is left of the timer's count.
    pub page: [u32; 64],
    /// IA32_APIC_BASE.
    pub base: u64,
    /// IA32_TSC_DEADLINE in the host's TSC; 0 when not armed.
    pub tsc_deadline: u64,
    /// An NMI is pending.
    pub nmi: bool,
    /// INIT was received; the vCPU waits for a start-up IPI.
    pub wait_for_sipi: bool,
    /// A start-up IPI for this page has come.
    pub sipi: Option<u8>,
}

/// An IOAPIC (82093AA). Wires are not part of it: whoever restores drives them anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IoApicRegisters {
    /// IOAPICID.
    pub id: u32,
    /// IOREGSEL.
    pub select: u8,
    /// The redirection table.
    pub entries: [u64; 24],
    /// Which level-triggered pins are asserted, a bit a pin.
    pub asserted: u32,
}

/// One 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PicRegisters {
    /// Levels of the wires.
    pub lines: u8,
    /// Interrupt requests.
    pub irr: u8,
    /// In service.
    pub isr: u8,
    /// Mask.
    pub imr: u8,
    /// Vector of input 0.
    pub base: u8,
    /// Which initialisation word comes next: 2 to 4; 0 when initialised.
    pub expects: u8,
    /// ICW4 is part of the initialisation.
    pub needs_icw4: bool,
    /// Automatic end of interrupt.
    pub auto_eoi: bool,
    /// Rotation at automatic end of interrupt.
    pub rotate_on_auto_eoi: bool,
    /// Special fully nested mode.
    pub special_fully_nested: bool,
    /// Special mask mode.
    pub special_mask: bool,
    /// The next read is a poll.
    pub poll: bool,
    /// Reads give the in-service register.
    pub read_isr: bool,
    /// The input with the highest priority.
    pub first: u8,
    /// Level-triggered inputs (ELCR).
    pub level: u8,
}

/// The 8254, with port 0x61's part of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitRegisters {
    /// The channels.
    pub channels: [PitChannel; 3],
    /// The speaker hears channel 2 (port 0x61, bit 1).
    pub speaker: bool,
}

/// One channel of the 8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PitChannel {
    /// Mode 0 to 5.
    pub mode: u8,
    /// Counts in decimal.
    pub bcd: bool,
    /// 1 low byte, 2 high byte, 3 low then high.
    pub access: u8,
    /// The count as written; 0 stands for 65536 (or 10000).
    pub reload: u16,
    /// Nanoseconds since the count was loaded; `None`: nothing counts.
    pub age: Option<u64>,
    /// The gate is open.
    pub gate: bool,
    /// With `access` 3, the high byte is written next.
    pub write_high_next: bool,
    /// The low byte written before.
    pub low_written: u8,
    /// With `access` 3, the high byte is read next.
    pub read_high_next: bool,
    /// A latched count.
    pub latched: Option<u16>,
    /// A latched status.
    pub latched_status: Option<u8>,
}
