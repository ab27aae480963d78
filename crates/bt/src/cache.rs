//! The code cache: translated blocks, how they are found, linked and forgotten.
//!
//! Blocks are keyed by guest-physical address and mode. A program's code is *movable*: it reaches its own page's guest-virtual address by way
//! of the vCPU block ([`Place`]), so all programs that map the page share its translations, wherever they map it. The kernel's
//! blocks are keyed by guest-virtual address, too. A block lies in one guest page. Jumps inside the page are linked directly: they stay right as long
//! as the page itself is where it was. Jumps to other pages go through per-vCPU slots, which a TLB flush resets.

mod forget;
mod insert;
mod key;
mod known;
mod sites;
mod tiers;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::BuildHasherDefault;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use iced_x86::Encoder;

pub use self::forget::{Forgotten, Hit};
use self::key::KeyHasher;
pub use self::key::{Key, Place};
use self::known::KnownSlots;
pub use self::sites::{AccessSite, CallSite, ExitSite, Sites, Slot};
use crate::analyze::{Analyzer, Mode};
use crate::emit::{LinkKind, Meta, Output};
use crate::kick::KickHandle;
use crate::memory::CodeMemory;
use crate::stubs::{self, Stubs};
use crate::table::Table;

/// Number of a block.
pub type BlockId = u32;

/// Stands for an instruction that crosses into the next page: see [`Key::tail`].
pub const STEP_ONLY: BlockId = u32::MAX;

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
}
