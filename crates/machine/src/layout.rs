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

/// End of conventional memory as the e820 map tells it; from here to 1 MiB all is reserved.
pub const LOW_MEMORY_END: u64 = 0x9_FC00;
/// Start of extended memory.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Linux's `boot_params` ("zero page"), 4 KiB.
pub const BOOT_PARAMS: u64 = 0x7000;
/// Stack for whoever needs one before it has its own; grows down from here.
pub const BOOT_STACK: u64 = 0x8000;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Room for the command line with its final zero, in bytes.
pub const COMMAND_LINE_MAX: u64 = 0x1_0000;
/// ACPI multiprocessor wake-up mailbox, 4 KiB.
pub const MAILBOX: u64 = 0xD_0000;
/// Code in which further CPUs wait for the mailbox, 4 KiB.
pub const PARKING_CODE: u64 = 0xD_1000;
/// Page tables with which CPUs start: PML4, PDPT, four page directories; 4 KiB each.
pub const PAGE_TABLES: u64 = 0xD_2000;
/// GDT with which CPUs start.
pub const BOOT_GDT: u64 = 0xD_8000;
/// ACPI tables, with the RSDP first; up to 1 MiB.
pub const ACPI_TABLES: u64 = 0xE_0000;
