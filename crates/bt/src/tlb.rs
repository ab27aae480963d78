//! The vCPU's own caches of translations: software TLB, jump slots, indirect targets, fetch TLB.

mod spaces;

use std::sync::atomic::Ordering;

use crate::cache::FastSet;

use self::spaces::Spaces;
use crate::block::{IBTC_ENTRIES, IbtcEntry, TLB_ENTRIES, TlbEntry, VcpuBlock, ibtc_index, tlb_index};

/// A tag that no address compares equal to in entry `index`.
const fn never(index: usize) -> u64 {
    (1 << 63) | (((index as u64 + 1) & (TLB_ENTRIES as u64 - 1)) << 12)
}

/// An indirect target that is never looked up in entry `index`, nor in its neighbour's place.
const fn never_target(index: usize) -> u64 {
    (1 << 63) | ((index as u64 + 2) & (IBTC_ENTRIES as u64 - 1))
}

/// The entry that takes what another one had to give up.
const fn neighbour(index: usize) -> usize {
    index ^ 1
}

/// One cached fetch translation.
#[derive(Clone, Copy)]
struct Fetch {
    page: u64,
    gpa: u64,
    user: bool,
    global: bool,
    /// Of a page that is not global: when it was entered.
    epoch: u64,
}

/// The epoch of a page that is mapped globally: until all jumps are forgotten.
const GLOBALLY: u64 = u64::MAX;
const FETCH_ENTRIES: usize = 512;
/// Bits of [`Tlbs::wrote`].
pub const WROTE_BITS: usize = 1 << 15;

/// Word and bit of a page in [`Tlbs::wrote`].
pub fn wrote_bit(host_page: u64) -> (usize, u64) {
    let number = (host_page >> 12) as usize % WROTE_BITS;
    (number / 64, 1 << (number % 64))
}

/// A slot that has been resolved.
#[derive(Clone, Copy)]
struct Resolved {
    slot: u32,
    /// Where it leads.
    host: u64,
    /// Where it leads unresolved.
    thunk: u64,
}

/// Bookkeeping of what the vCPU block's tables hold, so that flushes touch only what was filled.
pub struct Tlbs {
    fetch: Vec<Option<Fetch>>,
    /// Software-TLB entries filled from non-global pages: table * TLB_ENTRIES + index.
    local_tlb: Vec<u32>,
    /// A bit for each entry that is in it.
    in_local_tlb: Box<[u64; 4 * TLB_ENTRIES / 64]>,
    /// A bit for each entry of the software TLBs that was filled from a global page.
    global_tlb: Box<[u64; 4 * TLB_ENTRIES / 64]>,
    /// Slots resolved, by whether their target's page is global.
    local_slots: Vec<Resolved>,
    global_slots: Vec<u32>,
    /// Indirect targets filled from non-global pages: user * IBTC_ENTRIES + index, target.
    local_ibtc: Vec<(u32, u64)>,
    /// Pages that jumps may lead to.
    jump_pages: FastSet<u64>,
    /// 2 MiB regions touched through large pages (address >> 21), and 1 GiB ones (address >> 30).
    large: FastSet<u64>,
    huge: FastSet<u64>,
    local_overflow: bool,
    /// When each page of movable code was placed: the epoch, or [`GLOBALLY`].
    placed: Vec<u64>,
    /// Pages placed [`GLOBALLY`].
    placed_globally: Vec<u32>,
    /// The others that were placed in this epoch.
    placed_here: Vec<u32>,
    /// What is kept of other address spaces.
    spaces: Spaces,
    /// Bumped by everything that forgets jumps of programs.
    epoch: u64,
    /// A bit for each hash of a host page that a write entry was made for since the last flush of everything.
    wrote: Box<[u64; WROTE_BITS / 64]>,
}

impl Tlbs {
    pub fn new() -> Self {
        Self {
            fetch: vec![None; FETCH_ENTRIES],
            local_tlb: Vec::new(),
            in_local_tlb: Box::new([0; 4 * TLB_ENTRIES / 64]),
            global_tlb: Box::new([0; 4 * TLB_ENTRIES / 64]),
            local_slots: Vec::new(),
            global_slots: Vec::new(),
            local_ibtc: Vec::new(),
            jump_pages: FastSet::default(),
            large: FastSet::default(),
            huge: FastSet::default(),
            local_overflow: false,
            placed: Vec::new(),
            placed_globally: Vec::new(),
            placed_here: Vec::new(),
            spaces: Spaces::default(),
            epoch: 1,
            wrote: Box::new([0; WROTE_BITS / 64]),
        }
    }

    /// Empties every table of the block; `thunk` gives each slot's unresolved address.
    pub fn flush_all(&mut self, block: &mut VcpuBlock, thunk: impl Fn(u32) -> u64) {
        for table in &mut block.tlb {
            for (index, entry) in table.iter_mut().enumerate() {
                *entry = TlbEntry { tag: never(index), delta: 0 };
            }
        }
        self.local_tlb.clear();
        self.in_local_tlb.fill(0);
        self.local_overflow = false;
        self.spaces.clear();
        self.wrote.fill(0);
        self.large.clear();
        self.huge.clear();
        self.flush_jumps(block, thunk);
    }

    /// Forgets which slots have been resolved, when the slots themselves are no more.
    pub fn forget_slots(&mut self) {
        self.local_slots.clear();
        self.global_slots.clear();
    }

    /// Forgets all jump targets: slots, indirect targets, fetch translations.
    pub fn flush_jumps(&mut self, block: &mut VcpuBlock, thunk: impl Fn(u32) -> u64) {
        self.spaces.forget_jumps();
        for Resolved { slot, thunk, .. } in self.local_slots.drain(..) {
            block.slots[slot as usize].store(thunk, Ordering::Relaxed);
        }
        for slot in self.global_slots.drain(..) {
            block.slots[slot as usize].store(thunk(slot), Ordering::Relaxed);
        }
        for table in &mut block.ibtc {
            for (index, entry) in table.iter_mut().enumerate() {
                entry.target = never_target(index);
            }
        }
        self.local_ibtc.clear();
        self.epoch += 1;
        self.placed_here.clear();
        for base in self.placed_globally.drain(..) {
            self.placed[base as usize] = 0;
        }
        self.fetch.fill(None);
        self.jump_pages.clear();
    }

    /// Forgets what comes from non-global pages.
    pub fn flush_local(&mut self, block: &mut VcpuBlock, thunk: impl Fn(u32) -> u64) {
        if self.local_overflow {
            self.flush_all(block, thunk);
            return;
        }
        for number in self.local_tlb.drain(..) {
            let (table, index) = (number as usize / TLB_ENTRIES, number as usize % TLB_ENTRIES);
            block.tlb[table][index].tag = never(index);
        }
        self.in_local_tlb.fill(0);
        for Resolved { slot, thunk, .. } in self.local_slots.drain(..) {
            block.slots[slot as usize].store(thunk, Ordering::Relaxed);
        }
        self.epoch += 1;
        self.placed_here.clear();
        for (number, _) in self.local_ibtc.drain(..) {
            let (table, index) = (number as usize / IBTC_ENTRIES, number as usize % IBTC_ENTRIES);
            block.ibtc[table][index].target = never_target(index);
        }
    }

    /// From one process-context identifier to another. What is known of the first is kept for when it comes back. `keep`: what was kept of
    /// the other is good. Returns whether there was something.
    pub fn switch(
        &mut self,
        block: &mut VcpuBlock,
        from: u16,
        to: u16,
        keep: bool,
        thunk: impl Fn(u32) -> u64,
    ) -> bool {
        if self.local_overflow {
            self.flush_all(block, thunk);
            return false;
        }
        if from == to && keep {
            return true;
        }
        let known = self.spaces.take(to).filter(|_| keep);
        if from == to {
            self.flush_local(block, thunk);
            return false;
        }
        let space = self.put_away(block, from);
        self.spaces.keep(space);
        match known {
            Some(space) => {
                self.bring_back(block, space);
                true
            }
            None => false,
        }
    }

    /// Other address spaces must be asked for their jumps anew.
    pub fn forget_kept_jumps(&mut self) {
        self.spaces.forget_jumps();
    }

    /// INVLPG. Returns whether jumps were flushed (call stacks must be emptied then).
    pub fn flush_page(&mut self, block: &mut VcpuBlock, address: u64, thunk: impl Fn(u32) -> u64) -> bool {
        if self.large.contains(&(address >> 21)) || self.huge.contains(&(address >> 30)) {
            self.flush_all(block, thunk);
            return true;
        }
        let page = address & !0xfff;
        let index = tlb_index(page);
        for table in &mut block.tlb {
            if table[index].tag == page {
                table[index].tag = never(index);
            }
        }
        let fetch = &mut self.fetch[(page >> 12) as usize % FETCH_ENTRIES];
        if fetch.is_some_and(|f| f.page == page) {
            *fetch = None;
        }
        if self.jump_pages.contains(&page) {
            self.flush_jumps(block, thunk);
            return true;
        }
        false
    }

    /// Enters a translation into the software TLB.
    #[allow(clippy::too_many_arguments)]
    pub fn fill(
        &mut self,
        block: &mut VcpuBlock,
        user: bool,
        write: bool,
        address: u64,
        host_page: u64,
        global: bool,
        page_size: u64,
    ) -> u64 {
        let page = address & !0xfff;
        let index = tlb_index(page);
        let table = usize::from(user) * 2 + usize::from(write);
        let delta = host_page.wrapping_sub(page);
        if write {
            let (word, bit) = wrote_bit(host_page);
            self.wrote[word] |= bit;
        }
        self.enter(block, table * TLB_ENTRIES + index, TlbEntry { tag: page, delta }, global);
        if page_size > 4096 {
            if page_size >= 1 << 30 {
                self.huge.insert(page >> 30);
            } else {
                self.large.insert(page >> 21);
            }
        }
        delta
    }

    /// Sets entry `number` of the software TLBs.
    fn enter(&mut self, block: &mut VcpuBlock, number: usize, entry: TlbEntry, global: bool) {
        block.tlb.as_flattened_mut()[number] = entry;
        let (word, bit) = (number / 64, 1 << (number % 64));
        if global {
            self.global_tlb[word] |= bit;
            return;
        }
        self.global_tlb[word] &= !bit;
        if self.in_local_tlb[word] & bit == 0 {
            self.in_local_tlb[word] |= bit;
            self.local_tlb.push(number as u32);
        }
    }

    /// Was entry `number` of the software TLBs filled from a global page?
    fn is_global(&self, number: u32) -> bool {
        self.global_tlb[number as usize / 64] & 1 << (number % 64) != 0
    }

    /// Removes the write entries that lead to the host page: it now holds translated code.
    pub fn protect(&mut self, block: &mut VcpuBlock, host_page: u64) {
        let (word, bit) = wrote_bit(host_page);
        if self.wrote[word] & bit == 0 {
            return;
        }
        self.spaces.protect(host_page);
        for table in [1, 3] {
            for (index, entry) in block.tlb[table].iter_mut().enumerate() {
                if entry.tag.wrapping_add(entry.delta) == host_page {
                    entry.tag = never(index);
                }
            }
        }
    }

    /// The cached guest-physical page of an executable page, and whether it is global.
    pub fn fetch(&self, page: u64, user: bool) -> Option<(u64, bool)> {
        let entry = self.fetch[(page >> 12) as usize % FETCH_ENTRIES]?;
        let current = entry.global || entry.epoch == self.epoch;
        (current && entry.page == page && entry.user == user).then_some((entry.gpa, entry.global))
    }

    /// Enters a fetch translation.
    pub fn fill_fetch(&mut self, page: u64, user: bool, gpa: u64, global: bool, page_size: u64) {
        self.fetch[(page >> 12) as usize % FETCH_ENTRIES] = Some(Fetch { page, gpa, user, global, epoch: self.epoch });
        if page_size >= 1 << 30 {
            self.huge.insert(page >> 30);
        } else if page_size > 4096 {
            self.large.insert(page >> 21);
        }
    }

    /// Notes that the page of movable code of number `base` runs at guest-virtual address `page`. Returns whether it may be entered there: not as long
    /// as jumps may lead to it at another address, see [`Self::flush_jumps`].
    pub fn place(&mut self, block: &mut VcpuBlock, base: u32, page: u64, global: bool) -> bool {
        let base = base as usize;
        if base >= self.placed.len() {
            self.placed.resize(base + 1, 0);
        }
        let placed = self.is_placed(base as u32);
        if placed && block.bases[base] != page {
            return false;
        }
        block.bases[base] = page;
        if global && self.placed[base] != GLOBALLY {
            self.placed[base] = GLOBALLY;
            self.placed_globally.push(base as u32);
        } else if !placed {
            self.placed[base] = self.epoch;
            self.placed_here.push(base as u32);
        }
        true
    }

    /// Has the page been placed since jumps were forgotten? Code that is not movable always has.
    fn is_placed(&self, base: u32) -> bool {
        base == 0 || self.placed.get(base as usize).is_some_and(|&at| at == self.epoch || at == GLOBALLY)
    }

    /// Resolves a slot, whose number and unresolved address are `(slot, thunk)`.
    /// `base`: of the jump. If that page may be moved meanwhile, the slot stays unresolved.
    pub fn fill_slot(
        &mut self,
        block: &mut VcpuBlock,
        (slot, thunk): (u32, u64),
        base: u32,
        host: u64,
        target: u64,
        global: bool,
    ) {
        if !self.is_placed(base) {
            return;
        }
        self.note_jump(target);
        block.slots[slot as usize].store(host, Ordering::Relaxed);
        if global && (base == 0 || self.placed[base as usize] == GLOBALLY) {
            self.global_slots.push(slot)
        } else {
            self.local_slots.push(Resolved { slot, host, thunk })
        }
    }

    /// Enters an indirect target.
    pub fn fill_indirect(&mut self, block: &mut VcpuBlock, target: u64, user: bool, host: u64, global: bool) {
        self.note_jump(target);
        let index = ibtc_index(target);
        let table = &mut block.ibtc[usize::from(user)];
        let old = table[index];
        table[index] = IbtcEntry { target, host };
        let moves = old.target != target && cpu::paging::is_canonical(old.target);
        if moves {
            table[neighbour(index)] = old;
        }
        let first = usize::from(user) * IBTC_ENTRIES;
        for (index, target) in [(!global).then_some((index, target)), moves.then_some((neighbour(index), old.target))]
            .into_iter()
            .flatten()
        {
            if self.local_ibtc.len() < 2 * IBTC_ENTRIES {
                self.local_ibtc.push(((first + index) as u32, target));
            } else {
                self.local_overflow = true;
            }
        }
    }

    /// Forgets all indirect targets of programs.
    pub fn forget_targets_of_programs(&mut self, block: &mut VcpuBlock) {
        for (index, entry) in block.ibtc[1].iter_mut().enumerate() {
            entry.target = never_target(index);
        }
        self.local_ibtc.retain(|&(number, _)| (number as usize) < IBTC_ENTRIES);
    }

    fn note_jump(&mut self, target: u64) {
        self.jump_pages.insert(target & !0xfff);
        if target & 0xfff > 4096 - 15 {
            // It may cross into the next page.
            self.jump_pages.insert((target & !0xfff).wrapping_add(4096));
        }
    }

    /// Forgets an indirect target.
    pub fn forget_indirect(&mut self, block: &mut VcpuBlock, target: u64, user: bool) {
        let index = ibtc_index(target);
        for index in [index, neighbour(index)] {
            let entry = &mut block.ibtc[usize::from(user)][index];
            if entry.target == target {
                entry.target = never_target(index);
            }
        }
    }
}
