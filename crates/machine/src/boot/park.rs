//! How CPUs start: page tables and GDT for all of them, and where the further CPUs wait for work.
//!
//! # Further CPUs
//! Linux finds the multiprocessor wake-up mailbox (ACPI 6.5, 5.2.12.19) in the MADT. To start a CPU it writes the APIC id and a
//! physical address into the mailbox, then the command 1, and waits until the command is 0 again; the CPU goes to the address in
//! 64-bit mode with the mailbox and that address identity-mapped. So each further vCPU starts with [`further_cpu`] as its state: it runs the
//! few instructions at [`layout::PARKING_CODE`], which watch the mailbox, with interrupts off. An engine
//! sees nothing special; it may leave the vCPU's thread asleep until [`mailbox_called`] says that its turn has come, to save the spinning.

use cpu::{CpuState, TableRegister, gpr};
use memory::GuestRam;

use super::BootError;
use crate::layout;

/// Linux's __BOOT_CS.
pub const CODE_SELECTOR: u16 = 0x10;
/// Linux's __BOOT_DS.
pub const DATA_SELECTOR: u16 = 0x18;

/// RBX: the mailbox, ECX: the own APIC id.
const PARKING_CODE: [u8; 28] = [
    0xf3, 0x90, // wait: pause
    0x66, 0x83, 0x3b, 0x01, //       cmp word ptr [rbx], 1
    0x75, 0xf8, //       jne wait
    0x39, 0x4b, 0x04, //       cmp [rbx + 4], ecx
    0x75, 0xf3, //       jne wait
    0x48, 0x8b, 0x43, 0x08, //       mov rax, [rbx + 8]
    0x66, 0xc7, 0x03, 0x00, 0x00, //       mov word ptr [rbx], 0
    0xff, 0xe0, //       jmp rax
    0x0f, 0x0b, 0xeb, 0xfe, //       ud2; never reached
];

/// Bits of a page-table entry: present, writable.
const TABLE: u64 = 0x3;
/// The same with accessed, dirty and "large page".
const LARGE_PAGE: u64 = 0xe3;

fn put(ram: &GuestRam, address: u64, bytes: &[u8]) -> Result<(), BootError> {
    if ram.write(address, bytes) { Ok(()) } else { Err(BootError::OutsideRam { what: "boot data", address }) }
}

/// Fills the reserved pages below 1 MiB: identity page tables for the first 4 GiB in 2 MiB pages, the GDT, an empty mailbox, the parking code.
///
/// # Errors
/// RAM does not reach that far (it always does).
pub fn prepare(ram: &GuestRam) -> Result<(), BootError> {
    let directory = |number: u64| layout::PAGE_TABLES + 0x1000 * (2 + number);
    let mut tables = vec![0_u8; 6 * 0x1000];
    let mut entry = |index: usize, value: u64| {
        if let Some(bytes) = tables.get_mut(index * 8..index * 8 + 8) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    };
    entry(0, (layout::PAGE_TABLES + 0x1000) | TABLE);
    for number in 0..4 {
        entry(512 + number as usize, directory(number) | TABLE);
    }
    for page in 0..2048_u64 {
        entry(1024 + page as usize, page << 21 | LARGE_PAGE);
    }
    put(ram, layout::PAGE_TABLES, &tables)?;
    // Null, unused, 64-bit code, flat data, and a TSS-sized hole that stays zero.
    let gdt = [0_u64, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0, 0];
    let gdt: Vec<u8> = gdt.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    put(ram, layout::BOOT_GDT, &gdt)?;
    put(ram, layout::MAILBOX, &[0; 4096])?;
    put(ram, layout::PARKING_CODE, &PARKING_CODE)
}

/// 64-bit mode over the tables of [`prepare`], at `rip`.
fn long_mode(rip: u64) -> CpuState {
    let mut state = CpuState::default();
    state.enter_long_mode(layout::PAGE_TABLES, CODE_SELECTOR, DATA_SELECTOR);
    state.gdtr = TableRegister { base: layout::BOOT_GDT, limit: 6 * 8 - 1 };
    state.idtr = TableRegister { base: 0, limit: 0 };
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = layout::BOOT_STACK;
    state.rip = rip;
    state
}

/// The bootstrap processor's state at a kernel's 64-bit entry point: RSI holds the address of `boot_params`.
pub fn bootstrap_cpu(entry: u64) -> CpuState {
    let mut state = long_mode(entry);
    state.gpr[gpr::RSI] = layout::BOOT_PARAMS;
    state
}

/// The state of a further CPU: it runs the parking code.
pub fn further_cpu(apic_id: u32) -> CpuState {
    let mut state = long_mode(layout::PARKING_CODE);
    state.gpr[gpr::RBX] = layout::MAILBOX;
    state.gpr[gpr::RCX] = apic_id.into();
    state
}

/// Has the guest called CPU `apic_id` through the mailbox (and nobody answered yet)?
pub fn mailbox_called(ram: &GuestRam, apic_id: u32) -> bool {
    let mut head = [0; 8];
    ram.read(layout::MAILBOX, &mut head) && head[..2] == [1, 0] && head[4..] == apic_id.to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_map_four_gib_onto_itself() {
        let ram = GuestRam::new(32 << 20).unwrap();
        prepare(&ram).unwrap();
        let read = |at| {
            let mut data = [0; 8];
            assert!(ram.read(at, &mut data));
            u64::from_le_bytes(data)
        };
        for address in [0_u64, 0x1000, 0x20_0000, 0x1234_5678, 0xc000_0000, 0xffff_ffff] {
            let pml4 = read(layout::PAGE_TABLES);
            let pdpt = read((pml4 & !0xfff) + 8 * (address >> 30));
            let pd = read((pdpt & !0xfff) + 8 * (address >> 21 & 511));
            assert_eq!((pml4 & 1, pdpt & 1, pd & 0x81), (1, 1, 0x81));
            assert_eq!((pd & !0x1f_ffff) + (address & 0x1f_ffff), address);
        }
        assert!(!mailbox_called(&ram, 1));
        assert!(ram.write(layout::MAILBOX, &[1, 0, 0, 0, 1, 0, 0, 0]));
        assert!(mailbox_called(&ram, 1) && !mailbox_called(&ram, 2));
        let state = further_cpu(3);
        assert!(state.is_64bit_code() && state.gpr[gpr::RCX] == 3);
        assert_eq!(bootstrap_cpu(0x100_0000).segments[cpu::SegmentIndex::Ds as usize].selector, DATA_SELECTOR);
    }
}
