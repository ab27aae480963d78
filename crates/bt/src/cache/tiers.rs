//! What is hot, and what becomes of it: short code that is translated again to be fast, and accesses that are not worth predicting.

use super::{BlockId, Cache, Forgotten, Full, Place};
use crate::analyze::Insn;
use crate::emit::searching;

/// So many samples are looked at together: a block of which [`HOT`] are is hot.
const WINDOW: u64 = 8192;
const HOT: u8 = 2;
/// Entries of [`Cache::searching`].
const MAX_SEARCHING: usize = 1 << 16;

impl Cache {
    /// Makes the check site of number `site` whose load of the prediction is at `position` search its entry of the software TLB instead. Other
    /// vCPUs must be parked.
    pub fn stop_predicting(&mut self, site: u16, position: usize) {
        self.counters.unpredictable += 1;
        let table = usize::from(site) / crate::block::MAX_SITES;
        if let Some((id, meta)) = self.locate_block(position) {
            if self.searching.len() >= MAX_SEARCHING {
                self.searching.clear();
            }
            let block = &mut self.blocks[id];
            block.improvable = !block.superseded;
            self.searching.insert(searching(block.key.page, meta.offset, table & 1 != 0));
        }
        let mut code = [0xe8, 0, 0, 0, 0, 0x0f, 0x1f, 0x40, 0]; // call; nop [rax + 0]
        let displacement = (self.stubs.search[table] as i64 - position as i64 - 5) as i32;
        code[1..5].copy_from_slice(&displacement.to_le_bytes());
        const { assert!(crate::emit::LOAD == 9) };
        self.memory.write(position, &code);
    }

    /// A sample was taken at this host address. Returns the block if it is hot and not yet fast.
    pub fn sampled(&mut self, address: u64) -> Option<BlockId> {
        let position = self.memory.position(address)?;
        self.samples += 1;
        let window = (self.samples / WINDOW) as u32;
        let id = self.blocks.partition_point(|b| b.hot <= position).checked_sub(1)?;
        let block = self.blocks.get_mut(id).filter(|b| b.improvable && b.alive && position < b.hot + b.hot_len)?;
        if block.window != window {
            block.window = window;
            block.samples = 0;
        }
        block.samples = block.samples.saturating_add(1);
        (block.samples >= HOT && block.key.tail == 0).then_some(id as BlockId)
    }

    /// Translates a hot block again, from the page that it lies in, to be fast. The old translation leads to the new one from now on; only
    /// returns still come back to it. Only when no other vCPU is inside translated code.
    pub fn promote(&mut self, old: BlockId, page: &[u8], forgotten: &mut Forgotten) -> Result<(), Full> {
        let Some(block) = self.block(old).filter(|b| b.alive && b.improvable) else { return Ok(()) };
        let key = block.key;
        let offset = (key.address & 0xfff) as usize;
        let insns = self.analyzer.block(page, key.address & !0xfff, offset, key.mode, usize::MAX);
        let end = insns.last().map_or(offset, Insn::end);
        if insns.is_empty() {
            return Ok(());
        }
        let new = self.emit(key, page, insns, end, key.address, false)?;
        self.counters.promoted += 1;
        let [was, now] = [old, new].map(|id| {
            let block = &self.blocks[id as usize];
            (block.hot, block.body, block.indirect, block.indirect_stale)
        });
        self.memory.write_jump(was.0, now.0);
        self.memory.write_jump(was.1, now.1);
        if was.3.is_some() {
            self.memory.write_jump(was.2, now.2);
        }
        let block = &mut self.blocks[old as usize];
        block.improvable = false;
        block.superseded = true;
        forgotten.targets.push((Place { address: key.address, base: block.base }, key.mode.user));
        forgotten.slots.append(&mut block.slots);
        for link in std::mem::take(&mut block.incoming) {
            let entry = &mut self.links[link as usize];
            if entry.destination == Some(old) && self.blocks[entry.source as usize].alive {
                entry.destination = Some(new);
                let position = Self::entry_position(&self.blocks[new as usize], entry.kind);
                self.memory.link(entry.at, position);
                self.blocks[new as usize].incoming.push(link);
            }
        }
        Ok(())
    }
}
