//! What the emitter hands over: code that is not placed yet, and what has to be filled in.

/// Which of the two byte strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Hot,
    Cold,
}

/// Where a rel32 leads.
#[derive(Clone, Copy, Debug)]
pub enum Target {
    /// An offset in the block's own code.
    Own(Part, usize),
    /// A position in the code cache.
    Fixed(usize),
}

/// A 32-bit displacement to fill in.
#[derive(Clone, Copy, Debug)]
pub struct Fixup {
    pub part: Part,
    pub at: usize,
    pub target: Target,
}

/// A 32-bit immediate in the cold part that takes the number of a table entry.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    /// Index into [`Output::links`].
    Link(usize),
    /// Index into [`Output::exits`].
    Exit(usize),
    /// Index into [`Output::accesses`].
    Access(usize),
}

/// A direct jump within the page that can be linked to its target.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Where the rel32 is.
    pub part: Part,
    pub at: usize,
    /// Cold offset of the code that asks the dispatcher; where the rel32 leads while unlinked.
    pub stub: usize,
    /// Target, relative to the block's base.
    pub target: u64,
    pub kind: LinkKind,
}

/// How a link enters its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LinkKind {
    /// Flags in the host; behind the poll.
    Forward,
    /// Flags in the host; at the poll.
    Backward,
    /// Flags in the block; at the poll.
    Call,
    /// Flags in the host; behind the poll; to the translation without groups.
    Plain,
}

/// A cross-page jump through a slot.
#[derive(Clone, Copy, Debug)]
pub struct SlotUse {
    pub part: Part,
    /// Where the 32-bit displacement of the GS operand is.
    pub at: usize,
    pub target: u64,
    pub kind: LinkKind,
}

/// A memory access with a slow path.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    /// Offset of the instruction in the page.
    pub offset: u16,
    pub size: u16,
    pub write: bool,
    /// Arithmetic flags are in the block, not in the host's RFLAGS.
    pub flags_saved: bool,
    /// The instruction uses x87 or SSE state.
    pub fpu: bool,
    /// It may raise exceptions of its own before a page fault: x87 to AVX, and CMPXCHG16B, whose operand must be aligned.
    pub own_faults: bool,
    /// How far before the instruction's own address the checked range begins.
    pub ahead: u16,
    /// Number of the check site, and where its load of the prediction is: hot offset, once placed the position in the cache.
    pub site: Option<(u16, u32)>,
}

/// What is needed to rebuild the guest's state when a signal hits inside an instruction.
#[derive(Clone, Copy, Debug)]
pub struct Meta {
    /// Hot offset from which this holds.
    pub at: u32,
    pub offset: u16,
    pub flags_saved: bool,
    /// Guest registers lent to the instruction; their values are in the block. 0xff = none.
    pub borrowed: [u8; 3],
}

/// A translated block, not yet placed.
#[derive(Clone, Default)]
pub struct Output {
    pub hot: Vec<u8>,
    pub cold: Vec<u8>,
    pub fixups: Vec<Fixup>,
    pub numbers: Vec<(usize, Number)>,
    /// The same in the hot part, for exits.
    pub hot_numbers: Vec<(usize, usize)>,
    pub links: Vec<Link>,
    pub slots: Vec<SlotUse>,
    /// Offsets in the page of instructions at which the dispatcher is entered, and whether they use x87 or SSE state.
    pub exits: Vec<(u16, bool)>,
    pub accesses: Vec<Access>,
    /// Where check stubs that are called return to: hot offsets, with the index into [`Self::accesses`].
    pub calls: Vec<(usize, usize)>,
    pub meta: Vec<Meta>,
    /// Hot offsets of return landing pads, with the guest-virtual address each stands for.
    pub pads: Vec<(usize, u64)>,
    /// Hot offset behind the poll.
    pub body: usize,
    /// Entry for indirect jumps.
    pub indirect: (usize, bool),
    /// Cold offset of code that reports the block as stale.
    pub stale: usize,
    /// The same for the entry for indirect jumps, if that does not lead to the first one.
    pub indirect_stale: Option<usize>,
    /// Numbers of check sites with a prediction of their own: reads, writes.
    pub sites: [u32; 2],
}

impl Output {
    /// Empties it and keeps the memory.
    pub(super) fn clear(&mut self) {
        let Self {
            hot,
            cold,
            fixups,
            numbers,
            hot_numbers,
            links,
            slots,
            exits,
            accesses,
            calls,
            meta,
            pads,
            body,
            indirect,
            stale,
            indirect_stale,
            sites,
        } = self;
        hot.clear();
        cold.clear();
        fixups.clear();
        numbers.clear();
        hot_numbers.clear();
        links.clear();
        slots.clear();
        exits.clear();
        accesses.clear();
        calls.clear();
        meta.clear();
        pads.clear();
        *body = 0;
        *indirect = (0, false);
        *stale = 0;
        *indirect_stale = None;
        *sites = [0; 2];
    }
}
