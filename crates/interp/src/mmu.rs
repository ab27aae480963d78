//! Guest-virtual memory as the interpreter reaches it: a small TLB, precise checks, MMIO by way of the bus.
//!
//! Every access is checked whole before any byte of it is written: an access that crosses a page faults with nothing done. Accesses
//! to RAM inside a page are one host instruction ([`crate::host_memory`]), so they are as atomic as the guest expects.

use std::sync::Arc;

use cpu::paging::{self, Access, Kind, PagingContext, is_canonical};
use cpu::{Bus, CpuState, Exception, cr4, rflags};
use memory::{GuestRam, PAGE_SIZE};

use crate::checks::Checks;
use crate::host_memory;

/// Entries of each TLB array; a power of two.
const ENTRIES: usize = 1024;
const OFFSET: u64 = PAGE_SIZE - 1;

#[derive(Clone, Copy)]
struct Entry {
    /// Page address, with bit 0 set for a user-mode entry.
    tag: u64,
    generation: u64,
    /// Host address of the page.
    host: *mut u8,
    /// Guest-physical address of the page.
    gpa: u64,
}

const EMPTY: Entry = Entry { tag: 0, generation: 0, host: std::ptr::null_mut(), gpa: 0 };

/// Where one page-internal piece of an access goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Target {
    /// RAM: the host address of the first byte, and its guest-physical address.
    Ram(*mut u8, u64),
    /// Not RAM: the guest-physical address.
    Mmio(u64),
}

/// The memory side of one vCPU.
pub(crate) struct Mmu {
    pub(crate) ram: GuestRam,
    bus: Arc<dyn Bus>,
    /// Arrays for [`Kind::Read`], [`Kind::Write`], [`Kind::Fetch`].
    tlb: Box<[[Entry; ENTRIES]; 3]>,
    generation: u64,
    /// A bit for each hash of a 2 MiB region in which a large page was cached since the last flush.
    large: u64,
    /// TLB misses, for the counters.
    pub(crate) misses: u64,
    /// Breakpoints and alignment checks.
    pub(crate) checks: Checks,
    /// No other vCPU runs now, so that several accesses together are as good as one.
    pub(crate) alone: bool,
    /// A locked access was not made because others run.
    pub(crate) not_alone: bool,
}

// SAFETY: the raw pointers in the TLB point into `ram`, which is shared memory made for access from any thread, and are only
// used while `ram` lives in the same struct.
unsafe impl Send for Mmu {}

fn slot(address: u64) -> usize {
    (address / PAGE_SIZE) as usize % ENTRIES
}

fn large_bit(address: u64) -> u64 {
    1 << ((address >> 21).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 58)
}

/// Is the current access a user-mode one?
#[inline]
pub(crate) fn is_user(state: &CpuState) -> bool {
    state.cpl() == 3
}

impl Mmu {
    pub(crate) fn new(ram: GuestRam, bus: Arc<dyn Bus>) -> Self {
        let tlb =
            vec![[EMPTY; ENTRIES]; 3].into_boxed_slice().try_into().unwrap_or_else(|_| unreachable!("three arrays"));
        Self {
            ram,
            bus,
            tlb,
            generation: 1,
            large: 0,
            misses: 0,
            checks: Checks::default(),
            alone: true,
            not_alone: false,
        }
    }

    /// Forgets all translations.
    pub(crate) fn flush(&mut self) {
        self.generation += 1;
        self.large = 0;
    }

    /// Forgets the translation of the page that holds `address`.
    pub(crate) fn flush_page(&mut self, address: u64) {
        if self.large & large_bit(address) != 0 {
            self.flush();
            return;
        }
        for array in self.tlb.iter_mut() {
            if let Some(entry) = array.get_mut(slot(address)) {
                *entry = EMPTY;
            }
        }
    }

    /// Looks up one page; fills the TLB from the page tables.
    #[inline(always)]
    pub(crate) fn translate(
        &mut self,
        state: &CpuState,
        address: u64,
        kind: Kind,
        user: bool,
    ) -> Result<Target, Exception> {
        let entry = &self.tlb[kind as usize][slot(address)];
        if entry.tag == (address & !OFFSET) | u64::from(user) && entry.generation == self.generation {
            let offset = address & OFFSET;
            return Ok(Target::Ram(entry.host.wrapping_add(offset as usize), entry.gpa | offset));
        }
        self.translate_slow(state, address, kind, user, false)
    }

    #[cold]
    #[inline(never)]
    fn translate_slow(
        &mut self,
        state: &CpuState,
        address: u64,
        kind: Kind,
        user: bool,
        implicit: bool,
    ) -> Result<Target, Exception> {
        if !is_canonical(address) {
            return Err(Exception::gp(0));
        }
        self.misses += 1;
        let context = PagingContext::new(state);
        let smap = state.cr4 & cr4::SMAP != 0 && !user;
        let access = Access { kind, user, ac: state.rflags & rflags::AC != 0 && !implicit };
        let mapping = paging::walk(&self.ram, &context, address, access)?;
        let Some(page) = self.ram.host_page(mapping.gpa) else { return Ok(Target::Mmio(mapping.gpa)) };
        // What AC decides must be looked at each time.
        if !(smap && mapping.user) {
            if mapping.page_size > PAGE_SIZE {
                // A 1 GiB page counts in each of its 2 MiB regions as it is touched; INVLPG there may name another one.
                self.large |= if mapping.page_size > 2 << 20 { u64::MAX } else { large_bit(address) };
            }
            self.tlb[kind as usize][slot(address)] = Entry {
                tag: (address & !OFFSET) | u64::from(user),
                generation: self.generation,
                host: page,
                gpa: mapping.gpa & !OFFSET,
            };
        }
        Ok(Target::Ram(page.wrapping_add((mapping.gpa & OFFSET) as usize), mapping.gpa))
    }

    /// What debug breakpoints and alignment checks have to say of an access.
    #[cold]
    fn checked(&mut self, address: u64, size: usize, write: bool, user: bool) -> Result<(), Exception> {
        if user {
            self.checks.aligned(address, size)?;
        }
        self.checks.access(address, size, write);
        Ok(())
    }

    /// Reads 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub(crate) fn read(&mut self, state: &CpuState, address: u64, size: usize, user: bool) -> Result<u64, Exception> {
        if self.checks.armed {
            self.checked(address, size, false, user)?;
        }
        if (address & OFFSET) as usize <= PAGE_SIZE as usize - size
            && let Target::Ram(host, _) = self.translate(state, address, Kind::Read, user)?
        {
            // SAFETY: `host` is inside a mapped page of `self.ram` with `size` bytes left in it.
            return Ok(unsafe { host_memory::load(host, size) });
        }
        let mut bytes = [0; 8];
        if let Some(part) = bytes.get_mut(..size) {
            self.read_bytes(state, address, part, user)?;
        }
        Ok(u64::from_le_bytes(bytes))
    }

    /// Writes 1, 2, 4 or 8 bytes.
    #[inline(always)]
    pub(crate) fn write(
        &mut self,
        state: &CpuState,
        address: u64,
        size: usize,
        value: u64,
        user: bool,
    ) -> Result<(), Exception> {
        if self.checks.armed {
            self.checked(address, size, true, user)?;
        }
        if (address & OFFSET) as usize <= PAGE_SIZE as usize - size
            && let Target::Ram(host, gpa) = self.translate(state, address, Kind::Write, user)?
        {
            // SAFETY: `host` is inside a mapped page of `self.ram` with `size` bytes left in it.
            unsafe { host_memory::store(host, size, value) };
            self.ram.code_pages().written(gpa, size as u64);
            return Ok(());
        }
        match value.to_le_bytes().get(..size) {
            Some(bytes) => self.write_bytes(state, address, bytes, user),
            None => Ok(()),
        }
    }

    /// Reads, computes and writes back 1, 2, 4 or 8 bytes; with `lock` as one atomic step. Where the host cannot do that (across pages,
    /// outside RAM) and others run, nothing happens but that [`Mmu::not_alone`] is set. `f` gets the old value and gives the new one; it
    /// may be called more than once. Returns the old value.
    #[inline(always)]
    pub(crate) fn modify(
        &mut self,
        state: &CpuState,
        address: u64,
        size: usize,
        user: bool,
        lock: bool,
        mut f: impl FnMut(u64) -> u64,
    ) -> Result<u64, Exception> {
        if self.checks.armed {
            self.checked(address, size, true, user)?;
        }
        if (address & OFFSET) as usize <= PAGE_SIZE as usize - size
            && let Target::Ram(host, gpa) = self.translate(state, address, Kind::Write, user)?
        {
            // SAFETY: `host` is inside a mapped page of `self.ram` with `size` bytes left in it.
            let mut old = unsafe { host_memory::load(host, size) };
            if lock {
                loop {
                    // SAFETY: as above.
                    let seen = unsafe { host_memory::compare_exchange(host, size, old, f(old)) };
                    if seen == old {
                        break;
                    }
                    old = seen;
                }
            } else {
                // SAFETY: as above.
                unsafe { host_memory::store(host, size, f(old)) };
            }
            self.ram.code_pages().written(gpa, size as u64);
            return Ok(old);
        }
        let mut bytes = [0; 8];
        self.check(state, address, size, Kind::Write, user)?;
        if lock && !self.alone {
            self.not_alone = true;
            return Err(Exception::gp(0));
        }
        if let Some(part) = bytes.get_mut(..size) {
            self.read_bytes(state, address, part, user)?;
        }
        let old = u64::from_le_bytes(bytes);
        if let Some(part) = f(old).to_le_bytes().get(..size) {
            self.write_bytes(state, address, part, user)?;
        }
        Ok(old)
    }

    /// Does all checks of an access of `len` bytes without making it.
    pub(crate) fn check(
        &mut self,
        state: &CpuState,
        address: u64,
        len: usize,
        kind: Kind,
        user: bool,
    ) -> Result<(), Exception> {
        // An end outside the canonical range counts before any page fault.
        if !is_canonical(address) || !is_canonical(address.wrapping_add(len.saturating_sub(1) as u64)) {
            return Err(Exception::gp(0));
        }
        for (start, _) in pieces(address, len) {
            self.translate(state, start, kind, user)?;
        }
        Ok(())
    }

    /// Reads any number of bytes, however aligned.
    pub(crate) fn read_bytes(
        &mut self,
        state: &CpuState,
        address: u64,
        data: &mut [u8],
        user: bool,
    ) -> Result<(), Exception> {
        if self.checks.armed {
            self.checks.access(address, data.len(), false);
        }
        if data.len() as u64 > PAGE_SIZE - (address & OFFSET) {
            self.check(state, address, data.len(), Kind::Read, user)?;
        }
        let mut rest = data;
        for (start, len) in pieces(address, rest.len()) {
            let (part, tail) = rest.split_at_mut(len);
            rest = tail;
            match self.translate(state, start, Kind::Read, user)? {
                // SAFETY: `len` bytes are left in the mapped page.
                Target::Ram(host, _) => unsafe { host_memory::copy(host, part.as_mut_ptr(), len) },
                Target::Mmio(gpa) => self.mmio_read(gpa, part),
            }
        }
        Ok(())
    }

    /// Writes any number of bytes, however aligned, after checking them all.
    pub(crate) fn write_bytes(
        &mut self,
        state: &CpuState,
        address: u64,
        data: &[u8],
        user: bool,
    ) -> Result<(), Exception> {
        if self.checks.armed {
            self.checks.access(address, data.len(), true);
        }
        if data.len() as u64 > PAGE_SIZE - (address & OFFSET) {
            self.check(state, address, data.len(), Kind::Write, user)?;
        }
        let mut rest = data;
        for (start, len) in pieces(address, rest.len()) {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            match self.translate(state, start, Kind::Write, user)? {
                Target::Ram(host, gpa) => {
                    // SAFETY: `len` bytes are left in the mapped page.
                    unsafe { host_memory::copy(part.as_ptr(), host, len) };
                    self.ram.code_pages().written(gpa, len as u64);
                }
                Target::Mmio(gpa) => self.mmio_write(gpa, part),
            }
        }
        Ok(())
    }

    /// Reads a system structure (descriptor, TSS, IDT gate): an implicit supervisor access, whatever the CPL.
    pub(crate) fn read_system(&mut self, state: &CpuState, address: u64, data: &mut [u8]) -> Result<(), Exception> {
        self.check_implicit(state, address, data.len(), Kind::Read)?;
        self.by_itself(|mmu| mmu.read_bytes(state, address, data, false))
    }

    /// Sets bits in one byte of a system structure, atomically.
    pub(crate) fn set_system_bits(&mut self, state: &CpuState, address: u64, bits: u8) -> Result<(), Exception> {
        self.check_implicit(state, address, 1, Kind::Write)?;
        self.by_itself(|mmu| mmu.modify(state, address, 1, false, true, |old| old | u64::from(bits))).map(|_| ())
    }

    /// Accesses that the CPU makes by itself: no breakpoint looks at them.
    pub(crate) fn by_itself<T>(&mut self, access: impl FnOnce(&mut Self) -> T) -> T {
        let armed = std::mem::replace(&mut self.checks.armed, false);
        let result = access(self);
        self.checks.armed = armed;
        result
    }

    /// With SMAP on, AC does not help implicit accesses.
    fn check_implicit(&mut self, state: &CpuState, address: u64, len: usize, kind: Kind) -> Result<(), Exception> {
        if state.cr4 & cr4::SMAP != 0 {
            for (start, _) in pieces(address, len) {
                self.translate_slow(state, start, kind, false, true)?;
            }
        }
        Ok(())
    }

    /// A bus read, in units of at most 8 aligned bytes.
    pub(crate) fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        let mut rest = data;
        let mut gpa = gpa;
        while !rest.is_empty() {
            let len = rest.len().min((8 - gpa % 8) as usize);
            let (part, tail) = rest.split_at_mut(len);
            self.bus.mmio_read(gpa, part);
            // A state that no CPU can be in, without paging in 64-bit mode, has addresses up to the last.
            gpa = gpa.wrapping_add(len as u64);
            rest = tail;
        }
    }

    /// A bus write, in units of at most 8 aligned bytes.
    pub(crate) fn mmio_write(&self, gpa: u64, data: &[u8]) {
        let mut rest = data;
        let mut gpa = gpa;
        while !rest.is_empty() {
            let len = rest.len().min((8 - gpa % 8) as usize);
            let (part, tail) = rest.split_at(len);
            self.bus.mmio_write(gpa, part);
            // A state that no CPU can be in, without paging in 64-bit mode, has addresses up to the last.
            gpa = gpa.wrapping_add(len as u64);
            rest = tail;
        }
    }

    /// A debugger's read: supervisor rights, no side effect, not even accessed bits; `false` where unmapped or not RAM.
    pub(crate) fn debug_read(&self, state: &CpuState, address: u64, data: &mut [u8]) -> bool {
        let mut rest = data;
        for (start, len) in pieces(address, rest.len()) {
            let (part, tail) = rest.split_at_mut(len);
            rest = tail;
            let Some(gpa) = self.debug_translate(state, start) else { return false };
            if !self.ram.read(gpa, part) {
                return false;
            }
        }
        true
    }

    /// A debugger's write: as [`Self::debug_read`]; ignores write protection.
    pub(crate) fn debug_write(&self, state: &CpuState, address: u64, data: &[u8]) -> bool {
        let mut rest = data;
        for (start, len) in pieces(address, rest.len()) {
            let (part, tail) = rest.split_at(len);
            rest = tail;
            let Some(gpa) = self.debug_translate(state, start) else { return false };
            if !self.ram.write(gpa, part) {
                return false;
            }
        }
        true
    }

    fn debug_translate(&self, state: &CpuState, address: u64) -> Option<u64> {
        let access = Access { kind: Kind::Read, user: false, ac: true };
        is_canonical(address).then_some(())?;
        paging::probe(&self.ram, &PagingContext::new(state), address, access).ok().map(|mapping| mapping.gpa)
    }
}

/// Cuts `len` bytes at `address` where they cross a page: `(start, length)` of each piece.
pub(crate) fn pieces(address: u64, len: usize) -> impl Iterator<Item = (u64, usize)> {
    let mut start = address;
    let mut left = len;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let take = left.min((PAGE_SIZE - (start & OFFSET)) as usize);
        let piece = (start, take);
        start = start.wrapping_add(take as u64);
        left -= take;
        Some(piece)
    })
}
