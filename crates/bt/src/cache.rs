//! The code cache: translated blocks, how they are found, linked and forgotten.
//!
//! Blocks are keyed by guest-physical address and mode. A program's code is *movable*: it reaches its own page's guest-virtual address by way
//! of the vCPU block ([`Place`]), so all programs that map the page share its translations, wherever they map it. The kernel's
//! blocks are keyed by guest-virtual address, too. A block lies in one guest page. Jumps inside the page are linked directly: they stay right as long
//! as the page itself is where it was. Jumps to other pages go through per-vCPU slots, which a TLB flush resets.

mod known;
mod tiers;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::Encoder;

use self::known::KnownSlots;
use crate::analyze::{Analyzer, Insn, Mode};
use crate::emit::{Access, Context, Emitter, LinkKind, Meta, Number, Output, Part, Target};
use crate::kick::KickHandle;
use crate::memory::CodeMemory;
use crate::stubs::{self, Stubs};
use crate::table::Table;

/// Number of a block.
pub type BlockId = u32;

/// Stands for an instruction that crosses into the next page: see [`Key::tail`].
pub const STEP_ONLY: BlockId = u32::MAX;

/// A guest-virtual address as translated code has it.
///
/// Every page of movable code has a number, and every vCPU an address for each number, its *base* ([`crate::block::VcpuBlock::bases`]): where it
/// runs the page. Addresses in such code are relative to the base. A base is set before the page is entered, and changes only when
/// the vCPU has forgotten all jumps (see [`crate::tlb::Tlbs::place`]). All else has base 0, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Relative to the base.
    pub address: u64,
    /// Number of the base.
    pub base: u32,
}

/// Programs' code below this guest-virtual address is movable. Above it, a direct jump may lead to an address that is not canonical, which only
/// the jump's own address can tell.
pub const MOVABLE_END: u64 = (1 << 47) - (1 << 32);

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Guest-physical address of the page.
    pub page: u64,
    /// Guest-virtual address of the first instruction; of movable code, its offset in the page.
    pub address: u64,
    pub mode: Mode,
    /// For a block of one instruction that crosses into the next page: that page's guest-physical address | 1. Else 0.
    pub tail: u64,
}

impl Key {
    /// The key, but for the tail, of the code at a guest-virtual address in the page at guest-physical address `page`.
    pub fn new(page: u64, address: u64, mode: Mode) -> Self {
        let movable = mode.user && address < MOVABLE_END;
        Self { page, address: if movable { address & 0xfff } else { address }, mode, tail: 0 }
    }

    /// Is it movable code?
    pub fn movable(&self) -> bool {
        self.mode.user && self.address < 4096
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.page ^ self.tail.rotate_left(32) ^ u64::from(self.mode.bits()));
        state.write_u64(self.address);
    }
}

/// A multiplicative hasher for keys made of integers.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// A hash set with [`KeyHasher`].
pub type FastSet<K> = std::collections::HashSet<K, BuildHasherDefault<KeyHasher>>;

/// A hash map with [`KeyHasher`].
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<KeyHasher>>;

/// One translated block.
pub struct Block {
    pub key: Key,
    /// Number of its base.
    pub base: u32,
    /// Positions in the code cache.
    pub hot: usize,
    pub hot_len: usize,
    /// Entry behind the poll.
    pub body: usize,
    /// Entry with flags in the vCPU block.
    pub indirect: usize,
    stale: usize,
    /// See [`Output::indirect_stale`].
    indirect_stale: Option<usize>,
    /// Bytes of the page: first and behind the last.
    start: u16,
    end: u16,
    /// Pieces of the page that it depends on besides, see [`Analyzer::ahead`].
    ahead: u64,
    pads: Box<[(usize, u64)]>,
    meta: Arc<[Meta]>,
    incoming: Vec<u32>,
    /// Slots that may lead here.
    slots: Vec<u32>,
    alive: bool,
    /// There is a newer translation; only returns still come here.
    superseded: bool,
    /// Could be made faster by translating it again: it was translated to be short, or predicts in vain.
    improvable: bool,
    /// Samples in [`Self::window`].
    samples: u8,
    window: u32,
}

impl Block {
    /// Bit mask of the 64-byte pieces of its first page that it depends on.
    fn chunks(&self) -> u64 {
        let (first, behind) = (usize::from(self.start), usize::from(self.end).min(4096));
        (first / 64..=(behind.max(first + 1) - 1) / 64).fold(self.ahead, |mask, chunk| mask | 1 << chunk)
    }
}

struct LinkEntry {
    /// Position of the rel32.
    at: usize,
    /// Position of the unlinked code.
    stub: usize,
    target: Place,
    kind: LinkKind,
    source: BlockId,
    destination: Option<BlockId>,
}

/// An instruction at which the dispatcher is entered.
#[derive(Clone, Copy)]
pub struct ExitSite {
    pub place: Place,
    /// It uses x87 or SSE state.
    pub fpu: bool,
}

/// A memory access with a slow path.
#[derive(Clone, Copy)]
pub struct AccessSite {
    pub access: Access,
    /// Its instruction.
    pub place: Place,
    pub user: bool,
}

/// The place that a check stub was called from.
#[derive(Clone, Copy)]
pub struct CallSite {
    /// Position in the code cache behind the call. Ascending.
    pub position: u32,
    /// Number of its access.
    pub access: u32,
}

/// What translated code names by number. Read without the cache's lock; what is in it stays until the cache is flushed.
pub struct Sites {
    pub exits: Table<ExitSite>,
    pub accesses: Table<AccessSite>,
    pub calls: Table<CallSite>,
    pub slots: Table<Slot>,
}

impl Sites {
    /// The access whose check stub was called with the return address at `position`.
    pub fn called_from(&self, position: u32) -> Option<u32> {
        let (mut low, mut high) = (0, self.calls.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let site = self.calls.get(middle)?;
            match site.position.cmp(&position) {
                std::cmp::Ordering::Equal => return Some(site.access),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }
}

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

/// A cross-page jump target.
#[derive(Clone, Copy)]
pub struct Slot {
    pub target: Place,
    pub kind: LinkKind,
    /// Host address of the code that asks the dispatcher.
    pub thunk: u64,
}

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

#[derive(Default)]
struct Page {
    blocks: Vec<BlockId>,
    steps: Vec<Key>,
    /// Blocks that end on this page and start on another.
    tails: Vec<BlockId>,
    /// A bit for each 64 bytes that hold translated code.
    chunks: u64,
    /// Writes that hit no code.
    near_misses: u32,
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

/// Counters of the cache.
#[derive(Clone, Copy, Debug, Default)]
pub struct CacheCounters {
    pub blocks: u64,
    pub instructions: u64,
    pub code_bytes: u64,
    pub invalidated: u64,
    pub flushes: u64,
    pub links: u64,
    /// Check sites that predict no more.
    pub unpredictable: u64,
    /// Hot blocks translated again.
    pub promoted: u64,
}

/// The cache has no room: everything must be flushed.
#[derive(Debug)]
pub struct Full;

/// The code cache.
pub struct Cache {
    memory: CodeMemory,
    pub stubs: Stubs,
    analyzer: Analyzer,
    encoder: Option<Encoder>,
    blocks: Vec<Block>,
    map: FastMap<Key, BlockId>,
    pages: FastMap<u64, Page>,
    links: Vec<LinkEntry>,
    pub sites: Arc<Sites>,
    /// All vCPUs: each has an array of slots of its own.
    vcpus: Vec<Arc<KickHandle>>,
    slot_map: FastMap<(Place, u8, u8), u32>,
    known: KnownSlots,
    /// Numbers of pages with movable code, by guest-physical address.
    bases: FastMap<u64, u32>,
    hot: usize,
    cold: usize,
    /// Memory for the next block's output.
    spare: Output,
    /// Numbers of the next check sites: of the kernel and of programs, reads and writes.
    next_sites: [[u32; 2]; 2],
    /// New code is translated to be short; what is hot is translated again to be fast.
    pub compact: bool,
    /// Accesses whose predictions have failed often, see [`searching`].
    searching: FastSet<u64>,
    /// Samples that were taken of blocks.
    samples: u64,
    pub counters: CacheCounters,
    /// For the events of blocks.
    pub trace: Option<crate::trace::Trace>,
    /// Bumped by every flush of everything.
    pub generation: u64,
    /// Bumped when a page that holds code has been written. A copy of guest memory taken before is good for no translation.
    pub epoch: u64,
}

/// Bit mask of the 64-byte pieces that bytes `start..end` of a page lie in.
fn chunk_mask(start: u16, end: u16) -> u64 {
    (start / 64..=end.saturating_sub(1) / 64).fold(0, |mask, chunk| mask | 1 << chunk)
}

/// How far [`Cache::shift`] may move the parts of a block.
const HOT_SHIFT: usize = 48;
const COLD_SHIFT: usize = 15;

/// Slow writes to a page with code that miss the code, before all of its code is dropped.
const NEAR_MISSES: u32 = 64;

impl Cache {
    /// A cache of `size` bytes; `slow_access` is the monitor's slow path.
    pub fn new(size: usize, slow_access: u64, precise_flags: bool) -> std::io::Result<Self> {
        let mut memory = CodeMemory::new(size)?;
        let (code, stubs) = stubs::assemble(slow_access);
        memory.write(0, &code);
        let mut cache = Self {
            memory,
            stubs,
            analyzer: Analyzer::new(precise_flags),
            encoder: Some(Encoder::new(64)),
            blocks: Vec::new(),
            map: FastMap::default(),
            pages: FastMap::default(),
            links: Vec::new(),
            sites: Arc::new(Sites {
                exits: Table::new(),
                accesses: Table::new(),
                calls: Table::new(),
                slots: Table::new(),
            }),
            vcpus: Vec::new(),
            slot_map: FastMap::default(),
            known: KnownSlots::default(),
            bases: FastMap::default(),
            hot: 0,
            cold: 0,
            spare: Output::default(),
            next_sites: [[0; 2]; 2],
            compact: false,
            searching: FastSet::default(),
            samples: 0,
            counters: CacheCounters::default(),
            trace: None,
            generation: 0,
            epoch: 0,
        };
        cache.reset();
        Ok(cache)
    }

    fn reset(&mut self) {
        self.hot = (self.stubs.end + 63) & !63;
        self.cold = self.memory.size() / 5 * 2;
    }

    /// From now on translated code counts its PAUSEs.
    pub fn count_pauses(&mut self) {
        self.analyzer.count_pauses = true;
    }

    /// From now on XSAVE and XRSTOR run on the host's CPU.
    pub fn use_host_xsave(&mut self) {
        self.analyzer.host_xsave = true;
    }

    /// Host address of a position.
    pub fn address(&self, position: usize) -> u64 {
        self.memory.address(position)
    }

    /// Start and size of the executable view.
    pub fn range(&self) -> (u64, usize) {
        (self.memory.address(0), self.memory.size())
    }

    pub fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id as usize)
    }

    /// Blocks made from now on end before these guest-virtual addresses. To be followed by a flush.
    /// Returns whether they differ from those before.
    pub fn set_breakpoints(&mut self, addresses: &[u64]) -> bool {
        let changed = self.analyzer.breakpoints != addresses;
        self.analyzer.breakpoints = addresses.to_vec();
        changed
    }

    pub fn find(&self, key: &Key) -> Option<BlockId> {
        self.map.get(key).copied()
    }

    /// The number of a block's base; 0 where there is no block.
    pub fn base_of(&self, id: BlockId) -> u32 {
        self.block(id).map_or(0, |block| block.base)
    }

    /// The number of the base of the page at guest-physical address `page`.
    fn base(&mut self, page: u64) -> Result<u32, Full> {
        let next = self.bases.len() as u32 + 1;
        match self.bases.entry(page) {
            Entry::Occupied(known) => Ok(*known.get()),
            Entry::Vacant(_) if next as usize == crate::block::MAX_BASES => Err(Full),
            Entry::Vacant(new) => Ok(*new.insert(next)),
        }
    }

    /// Target of link `number`.
    pub fn link_target(&self, number: u32) -> Option<Place> {
        self.links.get(number as usize).map(|l| l.target)
    }

    /// How link `number` enters its target.
    pub fn link_kind(&self, number: u32) -> Option<LinkKind> {
        self.links.get(number as usize).map(|l| l.kind)
    }

    /// Adds a vCPU: from now on its slots are set when they come into being.
    pub fn add_vcpu(&mut self, vcpu: Arc<KickHandle>) {
        self.fill_slots(&vcpu);
        self.vcpus.push(vcpu);
    }

    /// Sets all slots of a vCPU to "unresolved".
    pub fn fill_slots(&self, vcpu: &KickHandle) {
        for number in 0..self.sites.slots.len() {
            if let Some(slot) = self.sites.slots.get(number) {
                vcpu.memory.slot(number).store(slot.thunk, Ordering::Relaxed);
            }
        }
    }

    /// Host address at which `block` is entered by `kind`.
    pub fn entry(&self, block: BlockId, kind: LinkKind) -> Option<u64> {
        self.block(block).map(|b| self.address(Self::entry_position(b, kind)))
    }

    fn entry_position(block: &Block, kind: LinkKind) -> usize {
        match kind {
            LinkKind::Forward | LinkKind::Plain => block.body,
            LinkKind::Backward => block.hot,
            LinkKind::Call => block.indirect,
        }
    }

    /// Notes that a vCPU's slot leads to `block`.
    pub fn note_slot(&mut self, block: BlockId, slot: u32) {
        if self.known.last(slot) == Some(block) {
            return;
        }
        self.known.note(slot, block);
        if let Some(block) = self.blocks.get_mut(block as usize)
            && !block.slots.contains(&slot)
        {
            block.slots.push(slot);
        }
    }

    /// The block that the slot led to last, if its target now lies in the guest-physical page `page`.
    pub fn known(&self, slot: u32, page: u64, mode: Mode) -> Option<BlockId> {
        let id = self.known.last(slot)?;
        let block = self.block(id)?;
        (block.alive && !block.superseded && block.key.page == page && block.key.mode == mode && block.key.tail == 0)
            .then_some(id)
    }

    /// Slots whose targets lie in the same page whenever that of `slot` does, itself among them.
    pub fn family(&self, slot: u32) -> &[u32] {
        self.known.family(slot)
    }

    /// Makes link `number` jump straight to `block`, if both are alive and the link is of that target. A block that depends on a second
    /// page is reached through a slot. `alone`: no other vCPU runs. Returns whether it was too early: the jump's displacement lies in two
    /// cache lines, so that a vCPU that runs could see half of it.
    pub fn link(&mut self, number: u32, block: BlockId, alone: bool) -> bool {
        let Some(entry) = self.links.get(number as usize) else { return false };
        let alive = |id: BlockId| self.blocks.get(id as usize).is_some_and(|b| b.alive);
        if entry.destination.is_some() || !alive(entry.source) || !alive(block) {
            return false;
        }
        let (at, target, kind) = (entry.at, entry.target, entry.kind);
        let (source, destination) = (&self.blocks[entry.source as usize], &self.blocks[block as usize]);
        let mode = Mode { plain: kind == LinkKind::Plain, ..source.key.mode };
        if destination.key.address != target.address
            || destination.key.page != source.key.page
            || destination.key.mode != mode
        {
            return false;
        }
        if !alone && CodeMemory::two_lines(at) {
            return true;
        }
        self.counters.links += 1;
        if destination.key.tail != 0 {
            if self.cold + 32 > self.memory.size() || self.sites.slots.len() as usize == crate::block::MAX_SLOTS {
                return false;
            }
            let slot = self.slot_for(target, mode, kind);
            let mut code = [0x65, 0xff, 0x24, 0x25, 0, 0, 0, 0]; // jmp gs:[slot]
            code[4..].copy_from_slice(&crate::block::off::slot(slot).to_le_bytes());
            self.memory.write(self.cold, &code);
            self.memory.link(at, self.cold);
            self.cold += code.len();
            return false;
        }
        let position = Self::entry_position(destination, kind);
        self.memory.link(at, position);
        if let Some(entry) = self.links.get_mut(number as usize) {
            entry.destination = Some(block);
        }
        self.blocks[block as usize].incoming.push(number);
        false
    }

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

    fn emit(
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
    fn slot_for(&mut self, target: Place, mode: Mode, kind: LinkKind) -> u32 {
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

    /// The instruction that the host address in the hot part belongs to, and how to restore state.
    pub fn locate(&self, address: u64) -> Option<(Place, Meta)> {
        let (id, meta) = self.locate_block(self.memory.position(address)?)?;
        let block = &self.blocks[id];
        let address = (block.key.address & !0xfff) + u64::from(meta.offset);
        Some((Place { address, base: block.base }, meta))
    }

    /// The block that the position in the hot part belongs to.
    fn locate_block(&self, position: usize) -> Option<(usize, Meta)> {
        let id = self.blocks.partition_point(|b| b.hot <= position).checked_sub(1)?;
        let block = &self.blocks[id];
        let offset = position.checked_sub(block.hot).filter(|&o| o < block.hot_len)? as u32;
        let after = block.meta.partition_point(|m| m.at <= offset);
        Some((id, *block.meta.get(after.checked_sub(1)?)?))
    }

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
