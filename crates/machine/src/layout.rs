//! The guest-physical address map beyond RAM, and the low-memory pages that the loader fills. RAM itself: [`memory::layout`].

/// Start of the hole for PCI memory BARs; RAM below 4 GiB ends here.
pub const PCI_HOLE_START: u64 = memory::layout::LOW_RAM_END;
/// End of the hole (exclusive).
pub const PCI_HOLE_END: u64 = 0xFEC0_0000;
/// PCI configuration space by memory access (ECAM), inside the hole.
pub const ECAM_START: u64 = 0xE000_0000;
/// Bytes of ECAM: 1 MiB a bus, one bus.
pub const ECAM_SIZE: u64 = 1 << 20;
/// The IOAPIC's registers.
pub const IOAPIC_BASE: u64 = 0xFEC0_0000;
/// The local APIC's page in xAPIC mode.
pub const LAPIC_BASE: u64 = 0xFEE0_0000;
/// Size of the IOAPIC's and the local APIC's page.
pub const APIC_PAGE: u64 = 0x1000;
