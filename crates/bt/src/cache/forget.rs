//! Translations that go: their code was written, or there is no room.

use super::{BlockId, Cache, Place, chunk_mask};

/// Slow writes to a page with code that miss the code, before all of its code is dropped.
const NEAR_MISSES: u32 = 64;

/// A part of a page that was written and holds code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Guest-physical address of the page.
    page: u64,
    start: u16,
    end: u16,
    /// All code of the page is to go.
    everything: bool,
}

/// What was forgotten, for the vCPUs' own caches.
#[derive(Default)]
pub struct Forgotten {
    /// Entries and landing pads; of a program?
    pub targets: Vec<(Place, bool)>,
    /// Slots to reset.
    pub slots: Vec<u32>,
    /// Guest-physical pages that hold no code any more.
    pub empty_pages: Vec<u64>,
}

impl Cache {
    /// Guest-physical bytes were written: which translations must go? From now on copies taken before make none.
    pub fn written(&mut self, gpa: u64, len: u64, hits: &mut Vec<Hit>) {
        if len == 0 {
            return;
        }
        self.epoch += 1;
        let last = gpa.saturating_add(len - 1);
        for page in (gpa >> 12)..=(last >> 12) {
            let start = if page == gpa >> 12 { (gpa & 0xfff) as u16 } else { 0 };
            let end = if page == last >> 12 { (last & 0xfff) as u16 + 1 } else { 4096 };
            hits.extend(self.judge(page << 12, start, end));
        }
    }

    fn judge(&mut self, gpa: u64, start: u16, end: u16) -> Option<Hit> {
        let page = self.pages.get_mut(&gpa)?;
        let mut everything = false;
        if page.chunks & chunk_mask(start, end) == 0 {
            page.near_misses += 1;
            everything = page.near_misses > NEAR_MISSES;
            if !everything {
                return None;
            }
        }
        Some(Hit { page: gpa, start, end, everything })
    }

    /// Drops the translations that were hit. Only when no other vCPU is inside translated code.
    pub fn drop_hit(&mut self, hit: Hit, forgotten: &mut Forgotten) {
        let Hit { page: gpa, everything, .. } = hit;
        let (start, end) = (usize::from(hit.start), usize::from(hit.end));
        let mask = chunk_mask(hit.start, hit.end);
        let Some(page) = self.pages.get_mut(&gpa) else { return };
        self.epoch += 1;
        let blocks = std::mem::take(&mut page.blocks);
        let steps = std::mem::take(&mut page.steps);
        let tails = std::mem::take(&mut page.tails);
        page.chunks = 0;
        let (mut kept, mut kept_steps) = (Vec::new(), Vec::new());
        let mut chunks = 0_u64;
        for id in blocks {
            let block = &self.blocks[id as usize];
            if !block.alive {
                continue;
            }
            let overlaps = usize::from(block.start) < end && start < usize::from(block.end);
            if everything || overlaps || block.ahead & mask != 0 {
                self.kill(id, forgotten);
            } else {
                chunks |= block.chunks();
                kept.push(id);
            }
        }
        let mut kept_tails = Vec::new();
        for id in tails {
            if !self.blocks[id as usize].alive {
                continue;
            }
            if everything || start < 16 {
                self.kill(id, forgotten);
            } else {
                chunks |= 1;
                kept_tails.push(id);
            }
        }
        for key in steps {
            let first = (key.address & 0xfff) as usize;
            if everything || end > first {
                self.map.remove(&key);
            } else {
                for chunk in first / 64..64 {
                    chunks |= 1 << chunk;
                }
                kept_steps.push(key);
            }
        }
        if kept.is_empty() && kept_steps.is_empty() && kept_tails.is_empty() {
            self.pages.remove(&gpa);
            forgotten.empty_pages.push(gpa);
        } else if let Some(page) = self.pages.get_mut(&gpa) {
            page.blocks = kept;
            page.steps = kept_steps;
            page.tails = kept_tails;
            page.chunks = chunks;
        }
    }

    /// Takes a block out of use, which no other vCPU is inside of. Its memory stays until the next flush: a vCPU's call stack may lead to its landing pads.
    fn kill(&mut self, id: BlockId, forgotten: &mut Forgotten) {
        let Some(block) = self.blocks.get_mut(id as usize) else { return };
        if !block.alive {
            return;
        }
        block.alive = false;
        if let Some(trace) = &self.trace {
            let gpa = block.key.page + (block.key.address & 0xfff);
            trace.line(format_args!("block drop gpa {gpa:#x} {}", block.key.mode));
        }
        self.counters.invalidated += 1;
        if !block.superseded {
            self.map.remove(&block.key);
        }
        let user = block.key.mode.user;
        let base = block.base;
        forgotten.targets.push((Place { address: block.key.address, base }, user));
        forgotten.slots.append(&mut block.slots);
        let incoming = std::mem::take(&mut block.incoming);
        let (hot, body, stale) = (block.hot, block.body, block.stale);
        let (indirect, indirect_stale) = (block.indirect, block.indirect_stale);
        let pads = std::mem::take(&mut block.pads);
        self.memory.write_jump(hot, stale);
        self.memory.write_jump(body, stale);
        // Else the entry for indirect jumps leads to `hot` in the end.
        if let Some(stale) = indirect_stale {
            self.memory.write_jump(indirect, stale);
        }
        for &(at, address) in &pads {
            forgotten.targets.push((Place { address, base }, user));
            self.memory.write_jump(at, self.stubs.indirect[usize::from(user)]);
        }
        for link in incoming {
            let entry = &mut self.links[link as usize];
            // The code of a dead source is not run any more, and its entries hold jumps that must stay.
            if entry.destination == Some(id) && self.blocks[entry.source as usize].alive {
                entry.destination = None;
                self.memory.link(entry.at, entry.stub);
            }
        }
    }

    /// Forgets everything. Only when no vCPU is inside translated code, and all call stacks are reset afterwards.
    /// Returns the pages that hold nothing any more.
    pub fn flush(&mut self) -> Vec<u64> {
        let empty = self.pages.drain().map(|(page, _)| page).collect();
        self.blocks.clear();
        self.map.clear();
        self.links.clear();
        self.sites.exits.clear();
        self.sites.accesses.clear();
        self.sites.calls.clear();
        self.sites.slots.clear();
        self.slot_map.clear();
        self.known.clear();
        self.bases.clear();
        self.searching.clear();
        self.reset();
        self.counters.flushes += 1;
        if let Some(trace) = &self.trace {
            trace.line(format_args!("block flush all"));
        }
        self.generation += 1;
        self.epoch += 1;
        empty
    }
}
