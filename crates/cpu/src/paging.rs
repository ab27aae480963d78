//! The page-table walk of IA-32e mode with four levels (SDM volume 3, 4.5), over [`GuestRam`].
//!
//! [`walk`] does what the CPU's page walker does for one access: it checks rights, reports the page fault with its exact error
//! code, and sets accessed and dirty bits in guest memory by locked compare-and-exchange, so that other vCPUs and the guest's own
//! locked instructions on page-table entries stay correct. [`probe`] is the same look without any side effect.
//!
//! Not here: translation caching (each engine has its own TLB), five-level and legacy 32-bit/PAE paging (with paging on, but long
//! mode not active, every walk reports a reserved-bit fault), canonical checks (the caller's `#GP`/`#SS`: see [`is_canonical`]).

use std::sync::atomic::Ordering;

use memory::GuestRam;

use crate::{CpuState, PageFault, cr0, cr4, efer};

/// Width of guest-physical addresses in bits, as the CPUID model tells the guest (MAXPHYADDR).
pub const PHYSICAL_BITS: u32 = 46;

/// Bits of a page-table entry (SDM volume 3, tables 4-15 to 4-20).
#[allow(missing_docs)]
pub mod pte {
    pub const P: u64 = 1 << 0;
    pub const W: u64 = 1 << 1;
    pub const U: u64 = 1 << 2;
    pub const PWT: u64 = 1 << 3;
    pub const PCD: u64 = 1 << 4;
    pub const A: u64 = 1 << 5;
    pub const D: u64 = 1 << 6;
    pub const PS: u64 = 1 << 7;
    pub const G: u64 = 1 << 8;
    pub const NX: u64 = 1 << 63;
}

/// Bits of a page fault's error code (SDM volume 3, 4.7).
#[allow(missing_docs)]
pub mod fault_code {
    pub const P: u32 = 1 << 0;
    pub const W: u32 = 1 << 1;
    pub const U: u32 = 1 << 2;
    pub const RSVD: u32 = 1 << 3;
    pub const I: u32 = 1 << 4;
}

/// Bits 51 to 12 of an entry: the address field.
pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// The address bits above [`PHYSICAL_BITS`]: reserved in every entry.
pub const ABOVE_PHYSICAL: u64 = ADDRESS & !((1 << PHYSICAL_BITS) - 1);

/// Is `address` canonical for 48-bit linear addresses: bits 63 to 47 all equal?
#[inline]
pub const fn is_canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// The registers that decide how an address is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagingContext {
    /// CR0: PG, WP.
    pub cr0: u64,
    /// CR3: where the tables start.
    pub cr3: u64,
    /// CR4: SMEP, SMAP.
    pub cr4: u64,
    /// IA32_EFER: LMA, NXE.
    pub efer: u64,
}

impl PagingContext {
    /// The context of a vCPU as it stands.
    pub const fn new(state: &CpuState) -> Self {
        Self { cr0: state.cr0, cr3: state.cr3, cr4: state.cr4, efer: state.efer }
    }
}

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Load data.
    Read,
    /// Store data (also the check of a read-modify-write).
    Write,
    /// Fetch an instruction.
    Fetch,
}

/// One access, as paging sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    /// Read, write or fetch.
    pub kind: Kind,
    /// Is it a user-mode access (CPL 3, and not an implicit supervisor access to a descriptor table or TSS)?
    pub user: bool,
    /// May a supervisor data access touch user pages although CR4.SMAP is set: RFLAGS.AC is 1 and the access is explicit?
    pub ac: bool,
}

impl Access {
    /// A user or supervisor access; with SMAP on, a supervisor access to a user page is refused.
    pub const fn new(kind: Kind, user: bool) -> Self {
        Self { kind, user, ac: false }
    }
}

/// What a successful walk found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The guest-physical address of the very byte asked for.
    pub gpa: u64,
    /// Size of the page in bytes: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// Writable at every level (a supervisor with CR0.WP clear may write regardless).
    pub writable: bool,
    /// A user page at every level.
    pub user: bool,
    /// Execution is disabled at some level (and EFER.NXE is set).
    pub no_execute: bool,
    /// The leaf's G bit, where CR4.PGE is set.
    pub global: bool,
    /// The leaf's dirty bit as it is now.
    pub dirty: bool,
    /// The guest-physical address of the leaf, if paging is on.
    pub leaf: Option<u64>,
}

impl Mapping {
    /// Do the rights of this mapping allow `access`?
    pub const fn allows(&self, context: &PagingContext, access: Access) -> bool {
        if access.user {
            if !self.user {
                return false;
            }
        } else if self.user {
            let refused = match access.kind {
                Kind::Fetch => context.cr4 & cr4::SMEP != 0,
                _ => context.cr4 & cr4::SMAP != 0 && !access.ac,
            };
            if refused {
                return false;
            }
        }
        match access.kind {
            Kind::Read => true,
            Kind::Write => self.writable || (!access.user && context.cr0 & cr0::WP == 0),
            Kind::Fetch => !self.no_execute,
        }
    }
}

/// Translates `address` for `access` as the CPU would, setting accessed and (for a write) dirty bits.
///
/// # Errors
/// The page fault the guest must see. Nothing has been set then.
pub fn walk(ram: &GuestRam, context: &PagingContext, address: u64, access: Access) -> Result<Mapping, PageFault> {
    loop {
        if let Some(result) = walk_once(ram, context, address, access, true) {
            return result;
        }
    }
}

/// As [`walk`], without setting any bit: for debuggers and for checks before side effects.
///
/// # Errors
/// The page fault the access would cause.
pub fn probe(ram: &GuestRam, context: &PagingContext, address: u64, access: Access) -> Result<Mapping, PageFault> {
    walk_once(ram, context, address, access, false).unwrap_or(Err(PageFault { address, code: 0 }))
}

/// One attempt; `None` when another CPU changed an entry between our look and our setting of its bits.
fn walk_once(
    ram: &GuestRam,
    context: &PagingContext,
    address: u64,
    access: Access,
    set_bits: bool,
) -> Option<Result<Mapping, PageFault>> {
    if context.cr0 & cr0::PG == 0 {
        return Some(Ok(Mapping {
            gpa: address,
            page_size: 4096,
            writable: true,
            user: true,
            no_execute: false,
            global: false,
            dirty: true,
            leaf: None,
        }));
    }
    let nxe = context.efer & efer::NXE != 0;
    let mut code = 0;
    match access.kind {
        Kind::Read => {}
        Kind::Write => code |= fault_code::W,
        Kind::Fetch if nxe || context.cr4 & cr4::SMEP != 0 => code |= fault_code::I,
        Kind::Fetch => {}
    }
    if access.user {
        code |= fault_code::U;
    }
    let fault = |bits: u32| Some(Err(PageFault { address, code: code | bits }));
    if context.efer & efer::LMA == 0 {
        return fault(fault_code::P | fault_code::RSVD);
    }

    let mut table = context.cr3 & ADDRESS & !ABOVE_PHYSICAL;
    let mut rights = pte::W | pte::U;
    let mut no_execute = false;
    // Entries passed on the way, for the accessed bits: address and value seen.
    let mut upper = [(0u64, 0u64); 3];
    let mut level = 4u32;
    loop {
        let shift = 12 + 9 * (level - 1);
        let entry_gpa = table + ((address >> shift) & 0x1ff) * 8;
        // Tables outside RAM read as what an empty bus gives: all ones.
        let entry = ram.atomic_u64(entry_gpa).map_or(u64::MAX, |cell| cell.load(Ordering::Acquire));
        if entry & pte::P == 0 {
            return fault(0);
        }
        let leaf = level == 1 || (level < 4 && entry & pte::PS != 0);
        let mut reserved = ABOVE_PHYSICAL;
        if !nxe {
            reserved |= pte::NX;
        }
        if level == 4 {
            reserved |= pte::PS;
        } else if leaf && level > 1 {
            // Bit 12 is PAT; the other bits below the page's address must be zero.
            reserved |= ((1u64 << shift) - 1) & ADDRESS & !(1 << 12);
        }
        if entry & reserved != 0 {
            return fault(fault_code::P | fault_code::RSVD);
        }
        rights &= entry;
        no_execute |= entry & pte::NX != 0;
        if !leaf {
            if let Some(slot) = upper.get_mut((4 - level) as usize) {
                *slot = (entry_gpa, entry);
            }
            table = entry & ADDRESS;
            level -= 1;
            continue;
        }
        let page_size = 1u64 << shift;
        let mut mapping = Mapping {
            gpa: (entry & ADDRESS & !(page_size - 1)) | (address & (page_size - 1)),
            page_size,
            writable: rights & pte::W != 0,
            user: rights & pte::U != 0,
            no_execute,
            global: entry & pte::G != 0 && context.cr4 & cr4::PGE != 0,
            dirty: entry & pte::D != 0,
            leaf: Some(entry_gpa),
        };
        if !mapping.allows(context, access) {
            return fault(fault_code::P);
        }
        if set_bits {
            for (gpa, seen) in upper.into_iter().take((4 - level) as usize) {
                set(ram, gpa, seen, pte::A)?;
            }
            let wanted = if access.kind == Kind::Write { pte::A | pte::D } else { pte::A };
            set(ram, entry_gpa, entry, wanted)?;
            mapping.dirty |= access.kind == Kind::Write;
        }
        return Some(Ok(mapping));
    }
}

/// Sets `bits` in the entry at `gpa` if it still is `seen`; writes nothing if they are set. `None`: it changed, walk again.
fn set(ram: &GuestRam, gpa: u64, seen: u64, bits: u64) -> Option<()> {
    if seen & bits == bits {
        return Some(());
    }
    let Some(cell) = ram.atomic_u64(gpa) else { return Some(()) };
    cell.compare_exchange(seen, seen | bits, Ordering::AcqRel, Ordering::Relaxed).ok()?;
    ram.code_pages().written(gpa, 8);
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PML4: u64 = 0x1000;
    const PDPT: u64 = 0x2000;
    const PD: u64 = 0x3000;
    const PT: u64 = 0x4000;
    /// Everything allowed.
    const ALL: u64 = pte::P | pte::W | pte::U;

    struct Tables {
        ram: GuestRam,
        context: PagingContext,
    }

    impl Tables {
        /// 0..4 KiB pages through PT at virtual 0; a 2 MiB page at 2 MiB; a 1 GiB page at 1 GiB.
        fn new() -> Self {
            let ram = GuestRam::new(64 << 20).unwrap();
            let context = PagingContext {
                cr0: cr0::PE | cr0::PG | cr0::WP,
                cr3: PML4,
                cr4: cr4::PAE | cr4::PGE,
                efer: efer::LME | efer::LMA | efer::NXE,
            };
            let this = Self { ram, context };
            this.put(PML4, PDPT | ALL);
            this.put(PDPT, PD | ALL);
            this.put(PDPT + 8, (1 << 30) | ALL | pte::PS);
            this.put(PD, PT | ALL);
            this.put(PD + 8, 0x20_0000 | ALL | pte::PS);
            for i in 0..512 {
                this.put(PT + i * 8, (0x10_0000 + i * 4096) | ALL);
            }
            this
        }

        fn put(&self, gpa: u64, value: u64) {
            assert!(self.ram.write(gpa, &value.to_le_bytes()));
        }

        fn get(&self, gpa: u64) -> u64 {
            let mut bytes = [0; 8];
            assert!(self.ram.read(gpa, &mut bytes));
            u64::from_le_bytes(bytes)
        }

        fn walk(&self, va: u64, kind: Kind, user: bool) -> Result<Mapping, PageFault> {
            walk(&self.ram, &self.context, va, Access::new(kind, user))
        }

        fn code(&self, va: u64, kind: Kind, user: bool) -> u32 {
            let fault = self.walk(va, kind, user).expect_err("a fault");
            assert_eq!(fault.address, va);
            assert_eq!(probe(&self.ram, &self.context, va, Access::new(kind, user)), Err(fault));
            fault.code
        }
    }

    #[test]
    fn sizes_and_bits() {
        let t = Tables::new();
        let m = t.walk(0x5123, Kind::Read, true).unwrap();
        assert_eq!((m.gpa, m.page_size, m.dirty), (0x10_5123, 4096, false));
        for entry in [PML4, PDPT, PD, PT + 40] {
            assert_eq!(t.get(entry) & (pte::A | pte::D), pte::A, "{entry:#x}");
        }
        assert!(t.walk(0x5123, Kind::Write, false).unwrap().dirty);
        assert_eq!(t.get(PT + 40) & (pte::A | pte::D), pte::A | pte::D);
        assert_eq!(t.get(PD) & pte::D, 0);
        let m = t.walk(0x20_0000 + 0x12345, Kind::Fetch, true).unwrap();
        assert_eq!((m.gpa, m.page_size), (0x21_2345, 2 << 20));
        let m = t.walk((1 << 30) + 0x123_4567, Kind::Write, true).unwrap();
        assert_eq!((m.gpa, m.page_size), ((1 << 30) + 0x123_4567, 1 << 30));
        assert_eq!(t.get(PDPT + 8) & pte::D, pte::D);
    }

    #[test]
    fn probe_leaves_no_trace() {
        let t = Tables::new();
        let m = probe(&t.ram, &t.context, 0x5123, Access::new(Kind::Write, true)).unwrap();
        assert_eq!((m.gpa, m.dirty), (0x10_5123, false));
        assert_eq!(t.get(PML4) & pte::A, 0);
        assert_eq!(t.get(PT + 40) & (pte::A | pte::D), 0);
    }

    #[test]
    fn not_present() {
        let t = Tables::new();
        t.put(PT + 8, 0);
        assert_eq!(t.code(0x1000, Kind::Read, false), 0);
        assert_eq!(t.code(0x1000, Kind::Write, false), fault_code::W);
        assert_eq!(t.code(0x1000, Kind::Write, true), fault_code::W | fault_code::U);
        assert_eq!(t.code(0x1000, Kind::Fetch, true), fault_code::I | fault_code::U);
        assert_eq!(t.code(1 << 39, Kind::Read, false), 0);
        assert_eq!(t.code(2 << 30, Kind::Read, false), 0);
        assert_eq!(t.code(4 << 20, Kind::Read, false), 0);
    }

    #[test]
    fn user_and_write_rights_need_every_level() {
        for (entry, value) in [(PML4, PDPT), (PDPT, PD), (PD, PT), (PT + 8, 0x10_1000)] {
            let t = Tables::new();
            t.put(entry, value | pte::P | pte::W);
            assert_eq!(t.code(0x1000, Kind::Read, true), fault_code::P | fault_code::U);
            assert!(!t.walk(0x1000, Kind::Write, false).unwrap().user);
            t.put(entry, value | pte::P | pte::U);
            assert_eq!(t.code(0x1000, Kind::Write, true), fault_code::P | fault_code::W | fault_code::U);
            assert_eq!(t.code(0x1000, Kind::Write, false), fault_code::P | fault_code::W);
            assert!(t.walk(0x1000, Kind::Read, true).is_ok());
            t.put(entry, value | ALL | pte::NX);
            assert_eq!(t.code(0x1000, Kind::Fetch, false), fault_code::P | fault_code::I);
            assert!(t.walk(0x1000, Kind::Write, true).unwrap().no_execute);
        }
    }

    #[test]
    fn write_protect_off_lets_the_supervisor_write() {
        let mut t = Tables::new();
        t.context.cr0 &= !cr0::WP;
        t.put(PT + 8, 0x10_1000 | pte::P | pte::U);
        let m = t.walk(0x1000, Kind::Write, false).unwrap();
        assert!(!m.writable && m.dirty);
        assert_eq!(t.code(0x1000, Kind::Write, true), fault_code::P | fault_code::W | fault_code::U);
    }

    #[test]
    fn reserved_bits() {
        let t = Tables::new();
        t.put(PT + 8, 0x10_1000 | ALL | 1 << 46);
        assert_eq!(t.code(0x1000, Kind::Read, false), fault_code::P | fault_code::RSVD);
        t.put(PT + 8, 0x10_1000 | ALL | 1 << 51);
        assert_eq!(t.code(0x1000, Kind::Write, true), fault_code::P | fault_code::RSVD | fault_code::W | fault_code::U);
        t.put(PT + 8, 0x10_1000 | ALL | 1 << 52 | 1 << 62);
        assert!(t.walk(0x1000, Kind::Read, false).is_ok());
        t.put(PD + 8, 0x20_2000 | ALL | pte::PS);
        assert_eq!(t.code(0x20_0000, Kind::Fetch, false), fault_code::P | fault_code::RSVD | fault_code::I);
        t.put(PD + 8, 0x20_1000 | ALL | pte::PS);
        assert_eq!(t.walk(0x20_0000, Kind::Read, false).unwrap().gpa, 0x20_0000, "bit 12 is PAT");
        t.put(PDPT + 8, (1 << 30) | (1 << 21) | ALL | pte::PS);
        assert_eq!(t.code(1 << 30, Kind::Read, false), fault_code::P | fault_code::RSVD);
        t.put(PML4, PDPT | ALL | pte::PS);
        assert_eq!(t.code(0x1000, Kind::Read, false), fault_code::P | fault_code::RSVD);
    }

    #[test]
    fn without_nxe_the_bit_is_reserved_and_fetches_unmarked() {
        let mut t = Tables::new();
        t.context.efer &= !efer::NXE;
        t.put(PT + 8, 0x10_1000 | ALL | pte::NX);
        assert_eq!(t.code(0x1000, Kind::Fetch, false), fault_code::P | fault_code::RSVD);
        t.put(PT + 8, 0);
        assert_eq!(t.code(0x1000, Kind::Fetch, false), 0);
        t.context.cr4 |= cr4::SMEP;
        assert_eq!(t.code(0x1000, Kind::Fetch, false), fault_code::I);
    }

    #[test]
    fn smep_and_smap() {
        let mut t = Tables::new();
        t.context.cr4 |= cr4::SMEP | cr4::SMAP;
        assert_eq!(t.code(0x1000, Kind::Fetch, false), fault_code::P | fault_code::I);
        assert_eq!(t.code(0x1000, Kind::Read, false), fault_code::P);
        assert_eq!(t.code(0x1000, Kind::Write, false), fault_code::P | fault_code::W);
        let explicit = Access { kind: Kind::Write, user: false, ac: true };
        assert!(walk(&t.ram, &t.context, 0x1000, explicit).is_ok());
        assert!(t.walk(0x1000, Kind::Write, true).is_ok());
        assert!(t.walk(0x1000, Kind::Fetch, true).is_ok());
    }

    #[test]
    fn tables_outside_ram_and_paging_off() {
        let mut t = Tables::new();
        t.context.cr3 = 0x3f_ffff_f000;
        assert_eq!(t.code(0x1000, Kind::Read, false), fault_code::P | fault_code::RSVD);
        t.context.cr0 &= !cr0::PG;
        assert_eq!(t.walk(0x1234, Kind::Write, true).unwrap().gpa, 0x1234);
    }

    #[test]
    fn global_needs_pge() {
        let mut t = Tables::new();
        t.put(PT + 8, 0x10_1000 | ALL | pte::G);
        assert!(t.walk(0x1000, Kind::Read, false).unwrap().global);
        t.context.cr4 &= !cr4::PGE;
        assert!(!t.walk(0x1000, Kind::Read, false).unwrap().global);
    }

    #[test]
    fn canonical() {
        for good in [0, 0x7fff_ffff_ffff, 0xffff_8000_0000_0000, u64::MAX] {
            assert!(is_canonical(good));
        }
        for bad in [0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert!(!is_canonical(bad));
        }
    }
}
