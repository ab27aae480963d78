//! ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, FACS, MADT, MCFG, DSDT.
//!
//! The machine is a plain PC, not a "hardware-reduced" one: kernels find PM timer, reset register and power button in the FADT. The DSDT
//! describes the PCI root with its windows and interrupt routing (straight to IOAPIC pins), COM1, the RTC, what the chipset
//! occupies, and the S5 sleep state.
//!
//! Further CPUs start through the MADT's multiprocessor wake-up mailbox: see [`crate::boot::park`].

use acpi_tables::aml;
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, rsdp::Rsdp};

use crate::pci::{PciHost, SLOTS};
use crate::{ioapic, layout, power, rtc, serial};

const OEM: [u8; 6] = *b"TIGHTR";
const TABLE: [u8; 8] = *b"TIGHTROP";

/// The tables, laid out to lie at [`layout::ACPI_TABLES`].
#[derive(Clone, Debug)]
pub struct Tables {
    /// The bytes; the RSDP comes first.
    pub bytes: Vec<u8>,
    /// Signature and offset in `bytes` of each table.
    pub offsets: Vec<([u8; 4], usize)>,
}

impl Tables {
    /// Where the RSDP is.
    pub const RSDP: u64 = layout::ACPI_TABLES;

    fn push(&mut self, signature: &[u8; 4], table: &[u8]) -> u64 {
        // The FACS wants 64 bytes of alignment, the others take it gladly.
        self.bytes.resize(self.bytes.len().next_multiple_of(64), 0);
        self.offsets.push((*signature, self.bytes.len()));
        let address = layout::ACPI_TABLES + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

/// Builds the tables for a machine with `cpus` vCPUs (APIC ids from 0).
pub fn tables(cpus: u8) -> Tables {
    let mut rsdp = Vec::new();
    let mut tables = Tables { bytes: vec![0; 64], offsets: vec![(*b"RSD ", 0)] };
    let facs = tables.push(b"FACS", &facs());
    let dsdt = tables.push(b"DSDT", dsdt().as_slice());
    let entries = [
        tables.push(b"FACP", fadt(facs, dsdt).as_slice()),
        tables.push(b"APIC", madt(cpus).as_slice()),
        tables.push(b"MCFG", mcfg().as_slice()),
    ];
    let mut xsdt = Sdt::new(*b"XSDT", 36, 1, OEM, TABLE, 1);
    for entry in entries {
        xsdt.append_slice(&entry.to_le_bytes());
    }
    let xsdt = tables.push(b"XSDT", xsdt.as_slice());
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables
}

/// Section 5.2.10. Nothing of it is used, but only a hardware-reduced machine may be without.
fn facs() -> [u8; 64] {
    let mut table = [0; 64];
    table[..4].copy_from_slice(b"FACS");
    table[4] = 64;
    table[32] = 2;
    table
}

/// A generic address structure for a port (5.2.3.2): space 1, width, no offset, access size.
fn port(table: &mut Sdt, offset: usize, port: u16, bits: u8) {
    table.write_bytes(offset, &[1, bits, 0, if bits >= 32 { 3 } else { bits / 8 }]);
    table.write_u64(offset + 4, port.into());
}

/// Section 5.2.9.
fn fadt(facs: u64, dsdt: u64) -> Sdt {
    const WBINVD: u32 = 1 << 0;
    const PROC_C1: u32 = 1 << 2;
    /// There is no sleep button.
    const NO_SLEEP_BUTTON: u32 = 1 << 5;
    const TIMER_32_BITS: u32 = 1 << 8;
    const RESET_REGISTER: u32 = 1 << 10;
    /// There are legacy devices (COM1); no 8042 keyboard controller, no VGA, no ASPM.
    const BOOT_ARCH: u16 = 1 << 0 | 1 << 2 | 1 << 4;

    let mut table = Sdt::new(*b"FACP", 276, 6, OEM, TABLE, 1);
    table.write_u32(36, facs as u32);
    table.write_u32(40, dsdt as u32);
    table.write_u16(46, power::SCI as u16);
    table.write_u32(56, power::PM1A_EVENT.into());
    table.write_u32(64, power::PM1A_CONTROL.into());
    table.write_u32(76, power::PM_TIMER.into());
    // Lengths of the PM1 event and control blocks and of the timer.
    table.write_u8(88, 4);
    table.write_u8(89, 2);
    table.write_u8(91, 4);
    // C2 and C3 do not exist: latencies above the limit say so.
    table.write_u16(96, 0xfff);
    table.write_u16(98, 0xfff);
    table.write_u8(108, rtc::CENTURY);
    table.write_u16(109, BOOT_ARCH);
    table.write_u32(112, WBINVD | PROC_C1 | NO_SLEEP_BUTTON | TIMER_32_BITS | RESET_REGISTER);
    port(&mut table, 116, power::RESET_PORT, 8);
    table.write_u8(128, power::RESET_VALUE);
    // Minor version: 6.5.
    table.write_u8(131, 5);
    table.write_u64(140, dsdt);
    port(&mut table, 148, power::PM1A_EVENT, 32);
    port(&mut table, 172, power::PM1A_CONTROL, 16);
    port(&mut table, 208, power::PM_TIMER, 32);
    table.update_checksum();
    table
}

/// Section 5.2.12.
fn madt(cpus: u8) -> Sdt {
    let mut table = Sdt::new(*b"APIC", 36, 6, OEM, TABLE, 1);
    table.append_slice(&(layout::LAPIC_BASE as u32).to_le_bytes());
    // A PIC pair is there too.
    table.append_slice(&1_u32.to_le_bytes());
    for cpu in 0..cpus {
        // Local APIC: ACPI id, APIC id, enabled.
        table.append_slice(&[0, 8, cpu, cpu, 1, 0, 0, 0]);
    }
    // IOAPIC at global system interrupt 0.
    table.append_slice(&[1, 12, ioapic::ID, 0]);
    table.append_slice(&(layout::IOAPIC_BASE as u32).to_le_bytes());
    table.append_slice(&0_u32.to_le_bytes());
    // ISA interrupts that do not go to the pin of the same number, or are not edges: (IRQ, pin, flags).
    for (irq, pin, flags) in [(0_u8, 2_u32, 0_u16), (power::SCI as u8, power::SCI, 0xd)] {
        table.append_slice(&[2, 10, 0, irq]);
        table.append_slice(&pin.to_le_bytes());
        table.append_slice(&flags.to_le_bytes());
    }
    // NMI on LINT1 of all CPUs.
    table.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    // Multiprocessor wake-up (type 16): mailbox version 0, reserved, address. Linux clears the address once it has started the others,
    // and later warns that the table's checksum is wrong: so only where there are others.
    if cpus > 1 {
        table.append_slice(&[16, 16, 0, 0, 0, 0, 0, 0]);
        table.append_slice(&layout::MAILBOX.to_le_bytes());
    }
    table.update_checksum();
    table
}

/// PCI Firmware Specification 3.3, section 4.1.2.
fn mcfg() -> Sdt {
    let mut table = Sdt::new(*b"MCFG", 36, 1, OEM, TABLE, 1);
    table.append_slice(&[0; 8]);
    table.append_slice(&layout::ECAM_START.to_le_bytes());
    // Segment 0, from bus 0 to the last.
    table.append_slice(&[0, 0, 0, ((layout::ECAM_SIZE >> 20) - 1) as u8, 0, 0, 0, 0]);
    table.update_checksum();
    table
}

fn dsdt() -> Sdt {
    let mut code = Vec::new();
    pci_root(&mut code);
    legacy_devices(&mut code);
    // SLP_TYP of PM1a and PM1b for power-off.
    let (s5, zero) = (power::S5, 0_u8);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&s5, &s5, &zero, &zero])).to_aml_bytes(&mut code);
    let mut table = Sdt::new(*b"DSDT", 36, 6, OEM, TABLE, 1);
    table.append_slice(&code);
    table.update_checksum();
    table
}

fn pci_root(code: &mut Vec<u8>) {
    let buses = (layout::ECAM_SIZE >> 20) as u16;
    let ecam_end = layout::ECAM_START + layout::ECAM_SIZE;
    let window = |start: u64, end: u64| {
        aml::AddressSpace::new_memory(
            aml::AddressSpaceCacheable::NotCacheable,
            true,
            start as u32,
            (end - 1) as u32,
            None,
        )
    };
    let (low, high) = (window(layout::PCI_HOLE_START, layout::ECAM_START), window(ecam_end, layout::PCI_HOLE_END));
    let bus_numbers = aml::AddressSpace::new_bus_number(0_u16, buses - 1);
    let config_ports = aml::IO::new(0xcf8, 0xcf8, 1, 8);
    let (low_ports, high_ports) =
        (aml::AddressSpace::new_io(0_u16, 0xcf7, None), aml::AddressSpace::new_io(0xd00_u16, 0xffff, None));
    let resources = aml::ResourceTemplate::new(vec![&bus_numbers, &config_ports, &low_ports, &high_ports, &low, &high]);
    // INTA# of each slot, function "any", straight to an IOAPIC pin.
    let mut routes = aml::PackageBuilder::new();
    let (pin, source) = (0_u8, 0_u8);
    for slot in 1..SLOTS {
        let (address, gsi) = (u32::from(slot) << 16 | 0xffff, PciHost::slot_gsi(slot));
        routes.add_element(&aml::Package::new(vec![&address, &pin, &source, &gsi]));
    }
    let zero = 0_u8;
    aml::Device::new(
        "_SB_.PCI0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0A08")),
            &aml::Name::new("_CID".into(), &aml::EISAName::new("PNP0A03")),
            &aml::Name::new("_UID".into(), &zero),
            &aml::Name::new("_SEG".into(), &zero),
            &aml::Name::new("_BBN".into(), &zero),
            &aml::Name::new("_CRS".into(), &resources),
            &aml::Name::new("_PRT".into(), &routes),
        ],
    )
    .to_aml_bytes(code);
}

fn legacy_devices(code: &mut Vec<u8>) {
    let zero = 0_u8;
    // What the chipset occupies: kernels use ECAM only if it is listed here or in the memory map.
    aml::Device::new(
        "_SB_.MBRD".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0C02")),
            &aml::Name::new("_UID".into(), &zero),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::Memory32Fixed::new(true, layout::ECAM_START as u32, layout::ECAM_SIZE as u32),
                    &aml::IO::new(power::ACPI_PORTS, power::ACPI_PORTS, 1, power::ACPI_PORTS_LEN as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &zero),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(serial::COM1, serial::COM1, 8, 8),
                    &aml::Interrupt::new(true, true, false, false, serial::COM1_IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
    aml::Device::new(
        "_SB_.RTC0".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0B00")),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(rtc::PORT, rtc::PORT, 2, 2),
                    &aml::Interrupt::new(true, true, false, false, rtc::IRQ),
                ]),
            ),
        ],
    )
    .to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn u32_at(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn structure() {
        for cpus in [1, 2, 255] {
            let tables = tables(cpus);
            assert!(tables.bytes.len() as u64 <= layout::HIGH_MEMORY_START - layout::ACPI_TABLES);
            assert_eq!(&tables.bytes[..8], b"RSD PTR ");
            assert_eq!((sum(&tables.bytes[..20]), sum(&tables.bytes[..36])), (0, 0));
            for (signature, offset) in &tables.offsets[1..] {
                let table = &tables.bytes[*offset..];
                assert_eq!(&table[..4], signature);
                let table = &table[..u32_at(table, 4)];
                assert!(signature == b"FACS" || sum(table) == 0, "{signature:?}");
            }
            let xsdt = u32_at(&tables.bytes, 24) - layout::ACPI_TABLES as usize;
            assert_eq!(&tables.bytes[xsdt..xsdt + 4], b"XSDT");
            let first = u32_at(&tables.bytes, xsdt + 36) - layout::ACPI_TABLES as usize;
            assert_eq!(&tables.bytes[first..first + 4], b"FACP");
        }
    }

    /// ACPICA's own compiler reads our tables, and compiles what it read.
    #[test]
    fn iasl_agrees() {
        if Command::new("iasl").arg("-v").output().is_err() {
            eprintln!("iasl is not installed (Debian package acpica-tools): tables not checked with it");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let tables = tables(2);
        for (signature, offset) in &tables.offsets[1..] {
            let table = &tables.bytes[*offset..];
            let name = String::from_utf8(signature.to_vec()).unwrap();
            std::fs::write(dir.path().join(format!("{name}.dat")), &table[..u32_at(table, 4)]).unwrap();
            let run = |args: &[&str]| {
                let output = Command::new("iasl").args(args).current_dir(&dir).output().unwrap();
                let text =
                    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
                assert!(output.status.success(), "{name}: {text}");
                text
            };
            let text = run(&["-d", &format!("{name}.dat")]);
            assert!(!text.contains("rror") && !text.contains("nvalid"), "{name}: {text}");
            let source = std::fs::read_to_string(dir.path().join(format!("{name}.dsl"))).unwrap();
            assert!(!source.contains("nvalid") && !source.contains("rror:"), "{source}");
            if signature == b"DSDT" {
                let text = run(&[&format!("{name}.dsl")]);
                assert!(text.contains(" 0 Errors, 0 Warnings"), "{text}\n{source}");
            }
        }
    }
}
