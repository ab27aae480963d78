//! New translations: from bytes to a block in its place.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::Encoder;

use super::{AccessSite, Block, BlockId, Cache, CallSite, ExitSite, Full, Key, LinkEntry, Place, STEP_ONLY, Slot};
use crate::analyze::{Insn, Mode};
use crate::emit::{Access, Context, Emitter, LinkKind, Meta, Number, Output, Part, Target};
use crate::memory::CodeMemory;

/// How far [`Cache::shift`] may move the parts of a block.
const HOT_SHIFT: usize = 48;
const COLD_SHIFT: usize = 15;

/// A translated block, not yet placed.
struct Translated {
    end: u16,
    /// Guest instructions.
    insns: u16,
    /// See [`Analyzer::ahead`].
    ahead: u64,
    compact: bool,
    meta: Arc<[Meta]>,
    output: Output,
}

impl Cache {
    /// Translates the instruction at `key`, which crosses into the next page; `bytes` go 15 bytes beyond the page. `at`: its guest-virtual address.
    pub fn translate_crossing(&mut self, key: Key, bytes: &[u8], at: u64) -> Result<BlockId, Full> {
        let page_address = key.address & !0xfff;
        let offset = (key.address & 0xfff) as usize;
        let insns = self.analyzer.block(bytes, page_address, offset, key.mode, 1);
        let Some(insn) = insns.first() else { return Ok(STEP_ONLY) };
        let end = insn.end();
        self.emit(key, bytes, insns, end, at, false)
    }

    /// Translates the block at `key` from the page contents. [`STEP_ONLY`] when its first instruction crosses the page end. `at`: its
    /// guest-virtual address.
    pub fn translate(&mut self, key: Key, page: &[u8], at: u64) -> Result<BlockId, Full> {
        let page_address = key.address & !0xfff;
        let offset = (key.address & 0xfff) as usize;
        let insns: Vec<Insn> = self.analyzer.block(page, page_address, offset, key.mode, usize::MAX);
        if insns.is_empty() {
            let entry = self.pages.entry(key.page).or_default();
            entry.steps.push(key);
            for chunk in offset / 64..64 {
                entry.chunks |= 1 << chunk;
            }
            self.map.insert(key, STEP_ONLY);
            return Ok(STEP_ONLY);
        }
        let end = insns.last().map_or(offset, Insn::end);
        self.emit(key, page, insns, end, at, self.compact)
    }

    pub(super) fn emit(
        &mut self,
        key: Key,
        bytes: &[u8],
        insns: Vec<Insn>,
        end: usize,
        at: u64,
        compact: bool,
    ) -> Result<BlockId, Full> {
        let base = if key.movable() { self.base(key.page)? } else { 0 };
        let encoder = self.encoder.take().unwrap_or_else(|| Encoder::new(64));
        let context = Context {
            stubs: &self.stubs,
            mode: key.mode,
            page: key.address & !0xfff,
            base,
            bytes,
            first_sites: self.next_sites[usize::from(key.mode.user)],
            compact,
            gpa: key.page,
            searching: &self.searching,
        };
        let (output, encoder) = Emitter::block(context, &insns, encoder, std::mem::take(&mut self.spare));
        self.encoder = Some(encoder);
        for (next, used) in self.next_sites[usize::from(key.mode.user)].iter_mut().zip(output.sites) {
            *next = next.wrapping_add(used);
        }
        self.counters.blocks += 1;
        self.counters.instructions += insns.len() as u64;
        let translated = Translated {
            end: end as u16,
            insns: insns.len() as u16,
            ahead: self.analyzer.ahead,
            compact,
            meta: output.meta.as_slice().into(),
            output,
        };
        self.analyzer.spare = insns;
        let result = self.insert(key, base, &translated, at);
        self.spare = translated.output;
        result
    }

    /// Places a block into the cache and enters it into the tables.
    fn insert(&mut self, key: Key, base: u32, translated: &Translated, at: u64) -> Result<BlockId, Full> {
        let output = &translated.output;
        // Room: everything of this block, and a thunk for each slot.
        let mut hot_len = (output.hot.len() + 15) & !15;
        let mut cold_len = output.cold.len() + 16 * output.slots.len() + 16;
        if self.hot + hot_len + HOT_SHIFT > self.memory.size() / 5 * 2
            || self.cold + cold_len + COLD_SHIFT > self.memory.size()
            || self.sites.slots.len() as usize + output.slots.len() > crate::block::MAX_SLOTS
        {
            return Err(Full);
        }
        if self.vcpus.len() > 1 {
            let (hot, cold) = self.shift(output);
            self.hot += hot;
            self.cold += cold;
            hot_len += hot;
            cold_len += cold;
        }
        let id = self.blocks.len() as BlockId;
        let block = self.place(id, key, base, translated);
        let entry = self.pages.entry(key.page).or_default();
        entry.blocks.push(id);
        entry.chunks |= block.chunks();
        if key.tail != 0 {
            let entry = self.pages.entry(key.tail & !1).or_default();
            entry.tails.push(id);
            entry.chunks |= 1;
        }
        self.counters.code_bytes += (hot_len + cold_len) as u64;
        if let Some(trace) = &self.trace {
            trace.line(format_args!(
                "block translate {at:#x} gpa {:#x} {} insns {} bytes {} host {}+{}",
                key.page + (key.address & 0xfff),
                key.mode,
                translated.insns,
                usize::from(translated.end) - (key.address & 0xfff) as usize,
                output.hot.len(),
                output.cold.len(),
            ));
        }
        self.blocks.push(block);
        self.map.insert(key, id);
        Ok(id)
    }

    /// By how much to move a block's two parts so that no jump to be linked lies in two cache lines, or few do: linking those stops the
    /// other vCPUs.
    fn shift(&self, output: &Output) -> (usize, usize) {
        let split = |part: Part, start: usize| {
            output.links.iter().filter(|l| l.part == part && CodeMemory::two_lines(start + l.at)).count()
        };
        let best = |part: Part, start: usize, step: usize, limit: usize| {
            (0..=limit).step_by(step).min_by_key(|&by| split(part, start + by)).unwrap_or(0)
        };
        (best(Part::Hot, self.hot, 16, HOT_SHIFT), best(Part::Cold, self.cold, 5, COLD_SHIFT))
    }

    fn place(&mut self, id: BlockId, key: Key, base: u32, translated: &Translated) -> Block {
        let output = &translated.output;
        let place = |address| Place { address, base };
        let (hot, cold) = (self.hot, self.cold);
        self.memory.write(hot, &output.hot);
        self.memory.write(cold, &output.cold);
        let own = |part, at| match part {
            Part::Hot => hot + at,
            Part::Cold => cold + at,
        };
        let first_link = self.links.len() as u32;
        let first_exit = self.sites.exits.len();
        let first_access = self.sites.accesses.len();
        for &(at, number) in &output.numbers {
            let value = match number {
                Number::Link(i) => first_link + i as u32,
                Number::Exit(i) => first_exit + i as u32,
                Number::Access(i) => first_access + i as u32,
            };
            self.memory.write(cold + at, &value.to_le_bytes());
        }
        for &(at, exit) in &output.hot_numbers {
            self.memory.write(hot + at, &(first_exit + exit as u32).to_le_bytes());
        }
        for fixup in &output.fixups {
            let target = match fixup.target {
                Target::Own(part, at) => own(part, at),
                Target::Fixed(position) => position,
            };
            self.memory.link(own(fixup.part, fixup.at), target);
        }
        self.cold = cold + output.cold.len();
        for slot in &output.slots {
            let number = self.slot_for(place(slot.target), Mode { plain: false, ..key.mode }, slot.kind);
            let displacement = crate::block::off::slot(number);
            self.memory.write(own(slot.part, slot.at), &displacement.to_le_bytes());
        }
        for link in &output.links {
            self.links.push(LinkEntry {
                at: own(link.part, link.at),
                stub: cold + link.stub,
                target: place(link.target),
                kind: link.kind,
                source: id,
                destination: None,
            });
        }
        let page = key.address & !0xfff;
        for &(offset, fpu) in &output.exits {
            self.sites.exits.push(ExitSite { place: place(page + u64::from(offset)), fpu });
        }
        for &access in &output.accesses {
            let site = access.site.map(|(site, at)| (site, hot as u32 + at));
            let access = Access { site, ..access };
            let place = place(page + u64::from(access.offset));
            self.sites.accesses.push(AccessSite { access, place, user: key.mode.user });
        }
        for &(at, access) in &output.calls {
            self.sites.calls.push(CallSite { position: (hot + at) as u32, access: first_access + access as u32 });
        }
        self.hot = (hot + output.hot.len() + 15) & !15;
        Block {
            key,
            base,
            hot,
            hot_len: output.hot.len(),
            body: hot + output.body,
            indirect: if output.indirect.1 { hot + output.indirect.0 } else { cold + output.indirect.0 },
            stale: cold + output.stale,
            indirect_stale: output.indirect_stale.map(|at| cold + at),
            start: (key.address & 0xfff) as u16,
            end: translated.end,
            ahead: translated.ahead,
            pads: output.pads.iter().map(|&(at, address)| (hot + at, address)).collect(),
            meta: translated.meta.clone(),
            incoming: Vec::new(),
            slots: Vec::new(),
            alive: true,
            superseded: false,
            improvable: translated.compact,
            samples: 0,
            window: 0,
        }
    }

    /// The slot for jumps to `target`; a new one gets its thunk at the end of the cold part, and leads there on all vCPUs before any
    /// code uses it.
    pub(super) fn slot_for(&mut self, target: Place, mode: Mode, kind: LinkKind) -> u32 {
        let map_key = (target, mode.bits(), kind as u8);
        if let Some(&number) = self.slot_map.get(&map_key) {
            return number;
        }
        let number = self.sites.slots.len();
        let thunk = self.cold;
        let mut code = [0x41, 0xba, 0, 0, 0, 0, 0xe9, 0, 0, 0, 0]; // mov r10d, n; jmp
        code[2..6].copy_from_slice(&number.to_le_bytes());
        self.memory.write(thunk, &code);
        self.memory.link(thunk + 7, self.stubs.exits[crate::block::reason::SLOT as usize]);
        self.cold += code.len();
        let thunk = self.memory.address(thunk);
        self.sites.slots.push(Slot { target, kind, thunk });
        self.slot_map.insert(map_key, number);
        self.known.add(target, mode.bits());
        for vcpu in &self.vcpus {
            vcpu.memory.slot(number).store(thunk, Ordering::Release);
        }
        number
    }
}
