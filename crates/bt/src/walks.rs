//! Where page tables were found last: a paging-structure cache (Intel SDM volume 3, 5.10.3). With it a miss of the software TLB reads
//! one entry instead of four. As on the CPU, what tables above say is forgotten when the guest flushes anything.

use std::sync::atomic::{AtomicU64, Ordering};

use cpu::paging::{ABOVE_PHYSICAL, ADDRESS, Mapping, PagingContext, pte};
use cpu::{cr4, efer};
use memory::GuestRam;

const ENTRIES: usize = 256;
/// Bits of an address within what a table maps.
const REGION_BITS: u32 = 21;

#[derive(Clone, Copy)]
struct Walk {
    region: u64,
    /// Good if it is [`Walks::version`].
    version: u64,
    /// Host address of the table.
    table: usize,
    /// Tables above allow writing, and programs' accesses.
    writable: bool,
    user: bool,
}

/// What a miss of the software TLB needs to know of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Guest-physical address of the 4 KiB with the byte asked for.
    pub gpa: u64,
    /// Size of the page that it is in, in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub size: u64,
    /// It is in all address spaces.
    pub global: bool,
}

impl From<&Mapping> for Found {
    fn from(mapping: &Mapping) -> Self {
        Self { gpa: mapping.gpa & !0xfff, size: mapping.page_size, global: mapping.global }
    }
}

/// One vCPU's cache.
pub struct Walks {
    entries: Box<[Walk; ENTRIES]>,
    version: u64,
    /// Is anything remembered? See [`crate::Options::remember_tables`].
    pub on: bool,
}

impl Default for Walks {
    fn default() -> Self {
        let none = Walk { region: 0, version: 0, table: 0, writable: false, user: false };
        Self { entries: Box::new([none; ENTRIES]), version: 1, on: true }
    }
}

impl Walks {
    /// The guest has flushed something.
    pub fn forget(&mut self) {
        self.version += 1;
    }

    /// Remembers the table that `mapping` of `address` was found in.
    pub fn learn(&mut self, ram: &GuestRam, address: u64, mapping: &Mapping) {
        let Some(leaf) = mapping.leaf.filter(|_| self.on && mapping.page_size == 4096) else { return };
        let Some(host) = ram.host_page(leaf) else { return };
        let region = address >> REGION_BITS;
        self.entries[region as usize % ENTRIES] = Walk {
            region,
            version: self.version,
            table: host as usize,
            // What the page allows, the tables above do, too.
            writable: mapping.writable,
            user: mapping.user,
        };
    }

    /// The page of `address`, if its table is known and nothing has to be set in it for the access. `None`: it must be walked to.
    #[inline]
    pub fn find(&self, context: &PagingContext, address: u64, user: bool, write: bool) -> Option<Found> {
        let region = address >> REGION_BITS;
        let walk = &self.entries[region as usize % ENTRIES];
        let allowed = (!user || walk.user) && (!write || walk.writable);
        if walk.region != region || walk.version != self.version || !allowed {
            return None;
        }
        let index = (address >> 12) as usize & 511;
        // SAFETY: the table is a page of RAM, which is mapped as long as the VM lives, and all access to which is atomic or volatile.
        let entry = unsafe { &*(walk.table as *const AtomicU64).add(index) }.load(Ordering::Acquire);
        let needed = pte::P | pte::A | if write { pte::W | pte::D } else { 0 } | if user { pte::U } else { 0 };
        let reserved = ABOVE_PHYSICAL | if context.efer & efer::NXE == 0 { pte::NX } else { 0 };
        let global = entry & pte::G != 0 && context.cr4 & cr4::PGE != 0;
        (entry & needed == needed && entry & reserved == 0).then_some(Found {
            gpa: entry & ADDRESS,
            size: 4096,
            global,
        })
    }
}
