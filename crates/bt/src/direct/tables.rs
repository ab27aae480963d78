//! What a program may reach by the guest's page tables as they stand: for the pages around a fault, and to see what of a process's memory is still
//! right after a flush of the TLB. Unlike [`cpu::paging::walk`], nothing is set: a page whose accessed bit is clear is not there.

use std::sync::atomic::Ordering;

use cpu::paging::{self, ABOVE_PHYSICAL, PagingContext, pte};
use cpu::{cr0, efer};
use memory::GuestRam;

/// Pages of a region, which one page table maps.
pub const PAGES: usize = 512;
/// Bytes of a region.
pub const REGION: u64 = 2 << 20;

const ADDRESS: u64 = paging::ADDRESS & !ABOVE_PHYSICAL;

/// Is nothing mapped in the region of `address`, nor could be without a change of a table above it?
pub fn is_free(ram: &GuestRam, context: &PagingContext, address: u64) -> bool {
    if context.cr0 & cr0::PG == 0 || context.efer & efer::LMA == 0 {
        return false;
    }
    let mut table = context.cr3 & ADDRESS;
    for level in [4, 3, 2] {
        let shift = 12 + 9 * (level - 1);
        let Some(entry) = ram.atomic_u64(table + ((address >> shift) & 0x1ff) * 8) else { return false };
        let entry = entry.load(Ordering::Acquire);
        if entry & pte::P == 0 {
            return true;
        }
        if entry & pte::PS != 0 {
            return false;
        }
        table = entry & ADDRESS;
    }
    false
}

/// A page that the program may read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// Guest-physical.
    pub gpa: u64,
    /// The program may write it.
    pub writable: bool,
    /// It has been written, says the table.
    pub dirty: bool,
    /// The program may execute it.
    pub executable: bool,
    /// It is in all address spaces, for the TLB.
    pub global: bool,
}

/// Rights that tables above have left.
#[derive(Clone, Copy)]
struct Left {
    writable: bool,
    executable: bool,
}

impl Left {
    /// What `entry` leaves of them; `None`: nothing, for programs, or not without setting an accessed bit.
    fn after(self, entry: u64, nxe: bool) -> Option<Self> {
        const NEEDED: u64 = pte::P | pte::U | pte::A;
        let good = entry & NEEDED == NEEDED && entry & ABOVE_PHYSICAL == 0 && (nxe || entry & pte::NX == 0);
        good.then_some(Self {
            writable: self.writable && entry & pte::W != 0,
            executable: self.executable && entry & pte::NX == 0,
        })
    }
}

/// A region of programs' addresses.
pub struct Region<'a> {
    ram: &'a GuestRam,
    nxe: bool,
    what: What,
}

enum What {
    Nothing,
    /// One page of 2 MiB or more: what of it is here, and its size in bytes.
    Large(Page, u64),
    Table(u64, Left),
}

impl<'a> Region<'a> {
    /// The region of `address`.
    pub fn new(ram: &'a GuestRam, context: &PagingContext, address: u64) -> Self {
        let nxe = context.efer & efer::NXE != 0;
        let what = Self::find(ram, context, address, nxe).unwrap_or(What::Nothing);
        Self { ram, nxe, what }
    }

    fn find(ram: &GuestRam, context: &PagingContext, address: u64, nxe: bool) -> Option<What> {
        if context.cr0 & cr0::PG == 0 || context.efer & efer::LMA == 0 {
            return None;
        }
        let mut table = context.cr3 & ADDRESS;
        let mut left = Left { writable: true, executable: true };
        for level in [4, 3, 2] {
            let shift = 12 + 9 * (level - 1);
            let entry = ram.atomic_u64(table + ((address >> shift) & 0x1ff) * 8)?.load(Ordering::Acquire);
            left = left.after(entry, nxe)?;
            if level < 4 && entry & pte::PS != 0 {
                let size = 1_u64 << shift;
                // Bit 12 of a large page's entry is its memory type; those between it and the address are reserved.
                if entry & (size - 1) & ADDRESS & !0x1fff != 0 {
                    return None;
                }
                let first = (entry & ADDRESS & !(size - 1)) + (address & (size - 1) & !(REGION - 1));
                return Some(What::Large(page(first, entry, left), size));
            }
            table = entry & ADDRESS;
        }
        Some(What::Table(table, left))
    }

    /// Is the region part of one page?
    pub fn is_large(&self) -> bool {
        matches!(self.what, What::Large(..))
    }

    /// The size of its pages, in bytes.
    pub fn page_size(&self) -> u64 {
        if let What::Large(_, size) = self.what { size } else { 4096 }
    }

    /// Page number `index` of the region, 0 to 511, if the program may read it.
    pub fn page(&self, index: usize) -> Option<Page> {
        match self.what {
            What::Nothing => None,
            What::Large(first, _) => Some(Page { gpa: first.gpa + index as u64 * 4096, ..first }),
            What::Table(table, left) => {
                let entry = self.ram.atomic_u64(table + index as u64 * 8)?.load(Ordering::Acquire);
                Some(page(entry & ADDRESS, entry, left.after(entry, self.nxe)?))
            }
        }
    }
}

fn page(gpa: u64, entry: u64, left: Left) -> Page {
    Page {
        gpa,
        writable: left.writable,
        dirty: entry & pte::D != 0,
        executable: left.executable,
        global: entry & pte::G != 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = pte::P | pte::U | pte::W | pte::A;

    #[test]
    fn rights_are_those_of_all_levels() {
        let ram = GuestRam::new(32 << 20).unwrap();
        let put = |gpa: u64, entry: u64| assert!(ram.write(gpa, &entry.to_le_bytes()));
        let context = PagingContext { cr0: cr0::PG, cr3: 0x1000, cr4: 0, efer: efer::LMA | efer::NXE };
        put(0x1000, 0x2000 | ALL);
        put(0x2000, 0x3000 | ALL);
        put(0x3000, 0x4000 | ALL);
        put(0x3008, 0x60_0000 | ALL | pte::PS | pte::D | pte::NX);
        put(0x4000, 0x9000 | ALL | pte::D);
        put(0x4008, 0xa000 | ALL & !pte::A);
        put(0x4010, 0xb000 | ALL & !pte::U);
        put(0x4018, 0xc000 | ALL & !pte::W | pte::NX);
        let all = Page { gpa: 0x9000, writable: true, dirty: true, executable: true, global: false };
        let region = Region::new(&ram, &context, 0x12_3456);
        assert!(!region.is_large());
        assert_eq!(region.page(0), Some(all));
        assert_eq!([region.page(1), region.page(2), region.page(4)], [None; 3]);
        let read = Page { gpa: 0xc000, writable: false, dirty: false, executable: false, global: false };
        assert_eq!(region.page(3), Some(read));
        let large = Region::new(&ram, &context, 0x20_0000);
        assert!(large.is_large());
        assert_eq!(large.page(5), Some(Page { gpa: 0x60_5000, executable: false, ..all }));
        assert_eq!(Region::new(&ram, &context, 0x40_0000).page(0), None);
        for (address, free) in [(0, false), (0x20_0000, false), (0x40_0000, true), (0x4000_0000, true), (1 << 40, true)]
        {
            assert_eq!(is_free(&ram, &context, address), free, "{address:#x}");
        }
        // What a table above takes away is gone for all below it.
        put(0x2000, 0x3000 | ALL & !pte::W | pte::NX);
        assert_eq!(Region::new(&ram, &context, 0).page(0), Some(Page { writable: false, executable: false, ..all }));
        put(0x2000, 0x3000 | ALL & !pte::A);
        assert_eq!(Region::new(&ram, &context, 0).page(0), None);
        // A table outside RAM.
        put(0x2000, 1 << 40 | ALL);
        assert_eq!(Region::new(&ram, &context, 0).page(0), None);
    }
}
