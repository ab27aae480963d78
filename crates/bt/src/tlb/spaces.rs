//! What a vCPU keeps of address spaces other than the current one, by their process-context identifiers (PCIDs; SDM volume 3, 4.10.1).
//!
//! The tables of the vCPU block hold one address space, and what is global. At a switch the entries that are not global move out to a list, and
//! those of the other space move in: some nanoseconds each, where finding them again takes some hundred.

use std::sync::atomic::Ordering;

use super::{GLOBALLY, Resolved, Tlbs, never, never_target};
use crate::block::{IBTC_ENTRIES, IbtcEntry, TLB_ENTRIES, TlbEntry, VcpuBlock};

/// How many spaces are kept. Linux uses six.
const SPACES: usize = 8;
/// Entries of the software TLBs that are kept of one space: those filled last.
const KEPT: usize = 4096;

/// One address space that is not the current one.
#[derive(Default)]
pub(super) struct Space {
    pcid: u16,
    /// Index over all software TLBs, and the entry.
    tlb: Vec<(u32, TlbEntry)>,
    slots: Vec<Resolved>,
    /// Index over both caches of indirect targets, and the entry.
    ibtc: Vec<(u32, IbtcEntry)>,
    /// Numbers of the pages of movable code, and where they are.
    placed: Vec<(u32, u64)>,
}

impl Space {
    fn clear(&mut self) {
        self.tlb.clear();
        self.slots.clear();
        self.ibtc.clear();
        self.placed.clear();
    }
}

/// The address spaces, the one used last at the end, and one that is empty, for its memory.
#[derive(Default)]
pub(super) struct Spaces(Vec<Space>, Space);

impl Spaces {
    pub fn clear(&mut self) {
        self.0.clear();
    }

    pub fn forget_jumps(&mut self) {
        for space in &mut self.0 {
            space.slots.clear();
            space.ibtc.clear();
            space.placed.clear();
        }
    }

    /// Removes the write entries that lead to the host page.
    pub fn protect(&mut self, host_page: u64) {
        for space in &mut self.0 {
            space.tlb.retain(|&(number, entry)| {
                let writes = (number as usize / TLB_ENTRIES) % 2 == 1;
                !writes || entry.tag.wrapping_add(entry.delta) != host_page
            });
        }
    }

    pub fn take(&mut self, pcid: u16) -> Option<Space> {
        let at = self.0.iter().position(|space| space.pcid == pcid)?;
        Some(self.0.remove(at))
    }

    pub fn keep(&mut self, space: Space) {
        if self.0.len() == SPACES {
            let oldest = self.0.remove(0);
            self.reuse(oldest);
        }
        self.0.push(space);
    }

    /// Empties a space that is no longer needed and keeps its memory for the next one.
    fn reuse(&mut self, mut space: Space) {
        space.clear();
        self.1 = space;
    }
}

impl Tlbs {
    /// Empties the tables of what is not global, and returns it.
    pub(super) fn put_away(&mut self, block: &mut VcpuBlock, pcid: u16) -> Space {
        let mut space = Space { pcid, ..std::mem::take(&mut self.spaces.1) };
        let journal = std::mem::take(&mut self.local_tlb);
        let older = journal.len().saturating_sub(KEPT);
        let tlb = block.tlb.as_flattened_mut();
        for (i, &number) in journal.iter().enumerate() {
            let index = number as usize % TLB_ENTRIES;
            let entry = tlb[number as usize];
            if entry.tag == never(index) || self.is_global(number) {
                continue;
            }
            tlb[number as usize].tag = never(index);
            if i >= older {
                space.tlb.push((number, entry));
            }
        }
        self.local_tlb = journal;
        self.local_tlb.clear();
        self.in_local_tlb.fill(0);
        for resolved in self.local_slots.drain(..) {
            let place = &block.slots[resolved.slot as usize];
            // It may have been forgotten meanwhile.
            if place.load(Ordering::Relaxed) == resolved.host {
                space.slots.push(resolved);
                place.store(resolved.thunk, Ordering::Relaxed);
            }
        }
        let ibtc = block.ibtc.as_flattened_mut();
        for (number, target) in self.local_ibtc.drain(..) {
            let entry = &mut ibtc[number as usize];
            if entry.target == target {
                space.ibtc.push((number, *entry));
                entry.target = never_target(number as usize % IBTC_ENTRIES);
            }
        }
        for base in self.placed_here.drain(..) {
            if self.placed[base as usize] != GLOBALLY {
                space.placed.push((base, block.bases[base as usize]));
            }
        }
        self.epoch += 1;
        space
    }

    /// Puts back what [`Self::put_away`] returned.
    pub(super) fn bring_back(&mut self, block: &mut VcpuBlock, space: Space) {
        for &(number, entry) in &space.tlb {
            self.enter(block, number as usize, entry, false);
        }
        self.bring_back_jumps(block, &space);
        self.spaces.reuse(space);
    }

    fn bring_back_jumps(&mut self, block: &mut VcpuBlock, space: &Space) {
        // Pages that are global somewhere else may be in the way.
        let free =
            |&(base, page): &(u32, u64)| self.placed[base as usize] != GLOBALLY || block.bases[base as usize] == page;
        if !space.placed.iter().all(free) {
            return;
        }
        for &(base, page) in &space.placed {
            if self.placed[base as usize] != GLOBALLY {
                block.bases[base as usize] = page;
                self.placed[base as usize] = self.epoch;
                self.placed_here.push(base);
            }
        }
        for resolved in &space.slots {
            block.slots[resolved.slot as usize].store(resolved.host, Ordering::Relaxed);
        }
        self.local_slots.extend_from_slice(&space.slots);
        let ibtc = block.ibtc.as_flattened_mut();
        for &(number, entry) in &space.ibtc {
            ibtc[number as usize] = entry;
            self.local_ibtc.push((number, entry.target));
        }
    }
}
