//! What is known of slots: where each led last, and which ones lead to the same page.
//!
//! Every new program resolves its slots anew. Most lead to where they led in the program before: if the page is the same, so is the block. And the
//! slots that lead from one page to one other stand or fall together: when one is resolved, all of them are.

use super::{BlockId, FastMap, Place};

/// Slots with targets in one page, seen from one page of code.
type Family = (u32, u64, u8);

/// See the module.
#[derive(Default)]
pub struct KnownSlots {
    /// By number of the slot: the block that it was resolved to last.
    last: Vec<Option<BlockId>>,
    /// By number of the slot: index into [`Self::members`].
    family: Vec<u32>,
    members: Vec<Vec<u32>>,
    index: FastMap<Family, u32>,
}

impl KnownSlots {
    /// Adds the next slot, for code of this mode.
    pub fn add(&mut self, target: Place, mode: u8) {
        let slot = self.last.len() as u32;
        let next = self.members.len() as u32;
        let family = *self.index.entry((target.base, target.address >> 12, mode)).or_insert(next);
        if family == next {
            self.members.push(Vec::new());
        }
        self.members[family as usize].push(slot);
        self.last.push(None);
        self.family.push(family);
    }

    /// The block that the slot was resolved to last. It may have gone.
    pub fn last(&self, slot: u32) -> Option<BlockId> {
        *self.last.get(slot as usize)?
    }

    /// The slot has been resolved.
    pub fn note(&mut self, slot: u32, block: BlockId) {
        if let Some(last) = self.last.get_mut(slot as usize) {
            *last = Some(block);
        }
    }

    /// The slots from the same page to the same page, itself among them.
    pub fn family(&self, slot: u32) -> &[u32] {
        self.family.get(slot as usize).and_then(|&family| self.members.get(family as usize)).map_or(&[], Vec::as_slice)
    }

    /// There are no slots any more.
    pub fn clear(&mut self) {
        self.last.clear();
        self.family.clear();
        self.members.clear();
        self.index.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_by_page_base_and_mode() {
        let mut known = KnownSlots::default();
        for (address, base, mode) in
            [(0x1010, 1, 0), (0x1ff0, 1, 0), (0x1010, 2, 0), (0x1010, 1, 1), (0x2000, 1, 0), (0x1020, 1, 0)]
        {
            known.add(Place { address, base }, mode);
        }
        assert_eq!(known.family(1), [0, 1, 5]);
        assert_eq!(known.family(2), [2]);
        assert_eq!(known.family(6), [0_u32; 0]);
        assert_eq!(known.last(3), None);
        known.note(3, 7);
        assert_eq!((known.last(3), known.last(9)), (Some(7), None));
        known.clear();
        assert_eq!(known.last(3), None);
    }
}
