//! The vCPU block: what translated code reaches through the GS base.
//!
//! Everything a translated instruction may touch besides guest memory lies here, at fixed offsets, one block per vCPU.

use std::mem::offset_of;
use std::sync::atomic::{AtomicU32, AtomicU64};

use cpu::{CpuState, FpState};

/// Entries of each software TLB.
pub const TLB_ENTRIES: usize = 4096;
/// Entries of each indirect-branch target cache.
pub const IBTC_ENTRIES: usize = 4096;
/// Cross-page jump slots per vCPU.
pub const MAX_SLOTS: usize = 1 << 18;
/// Pages of programs' code that a code cache may hold.
pub const MAX_BASES: usize = 1 << 16;
/// Groups of accesses with a common check, per block. Their deltas lie below the host's stack pointer, behind what stubs put there.
pub const MAX_GROUPS: usize = 12;
/// Bytes of the stack that host CALL and RET use for guest calls.
pub const CALL_STACK: usize = 256 << 10;

/// One entry of the software TLB.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct TlbEntry {
    /// Guest-virtual page address, or an address that cannot hit in this entry.
    pub tag: u64,
    /// Host address minus guest-virtual address.
    pub delta: u64,
}

/// One entry of the indirect-branch target cache.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct IbtcEntry {
    /// Guest-virtual target.
    pub target: u64,
    /// Host address of the block's entry for indirect jumps.
    pub host: u64,
}

/// What a check site has learned.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Site {
    /// Host address of the entry of the site's software TLB that it used last.
    pub entry: u64,
    /// Wrong predictions, counted up from minus [`WRONG_PREDICTIONS`].
    pub wrong: i32,
    _pad: u32,
}

/// Check sites, for each software TLB.
pub const MAX_SITES: usize = 8192;
/// Those with a prediction of their own; further ones share. The rest is for operands of movable code that are relative to RIP: those of a page
/// that lead to the same page share one.
pub const OWN_SITES: usize = 7168;
/// Wrong predictions in a second after which a site predicts no more.
pub const WRONG_PREDICTIONS: i32 = 20_000;

/// Longest read across two pages that is done without the monitor, in bytes.
pub const BOUNCE: usize = 32;

/// Two times [`BOUNCE`] bytes; the middle is aligned as a page's start is, for what instructions ask.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; 2 * BOUNCE]);

/// Why translated code came back to the dispatcher.
pub mod reason {
    /// An unlinked direct jump; argument: link.
    pub const LINK: u32 = 1;
    /// An unresolved cross-page jump; argument: slot.
    pub const SLOT: u32 = 2;
    /// An indirect jump that misses the target cache; the target is in `exit_target`.
    pub const INDIRECT: u32 = 3;
    /// An instruction that the interpreter must run; argument: exit site.
    pub const STEP: u32 = 4;
    /// Something is pending; argument: exit site.
    pub const POLL: u32 = 5;
    /// A memory access that the slow path cannot do; argument: access descriptor.
    pub const ACCESS: u32 = 6;
    /// A host signal in translated code; the place is in `fault_pc`.
    pub const FAULT: u32 = 7;
    /// A block that has been invalidated was entered; argument: block.
    pub const STALE: u32 = 8;
    /// So many PAUSEs that somebody else may need the core more; argument: exit site of the next instruction.
    pub const PAUSE: u32 = 9;
}

/// One vCPU's block. Lives in its own mapping; translated code addresses it through GS.
#[repr(C, align(4096))]
pub struct VcpuBlock {
    /// Architectural state. While translated code runs, most general registers, flags and x87/SSE state are in the host's registers.
    pub state: CpuState,
    /// Set from other threads when the vCPU shall look around.
    pub kick: AtomicU32,
    _pad: [u32; 15],
    /// PAUSEs until the dispatcher is to be told.
    pub pauses: u32,
    /// An interrupt waits for IF.
    pub irq_waiting: u32,
    /// The guest's IF: 0 or 0x200. (`state.rflags` holds the other system flags while translated code runs.)
    pub if_flag: u32,
    /// Arithmetic flags saved across a check: AH, AL of LAHF and SETO.
    pub flags: u32,
    /// See [`reason`].
    pub exit_reason: u32,
    /// Argument of the reason.
    pub exit_arg: u32,
    /// How often the guest's programs have entered its kernel, by system calls and faults.
    pub entries: u32,
    /// Is the guest at privilege level 3? 0 or 1.
    pub user: u32,
    /// The host's MXCSR while the monitor runs.
    pub host_mxcsr: u32,
    /// RFLAGS of the host at the last exit, or to be loaded at the next entry.
    pub host_flags: u64,
    /// Target of an indirect jump.
    pub exit_target: u64,
    /// A value kept across the checks of one instruction.
    pub scratch: u64,
    /// The slow path was called by a check stub: what names the access is the low half of the address that the stub was called from.
    pub by_call: u32,
    /// RAX and RCX while a stub uses them, and a value of its own.
    pub lent: [u64; 3],
    /// Host RIP of a signal in translated code.
    pub fault_pc: u64,
    /// Signal number.
    pub fault_signal: u64,
    /// The monitor's stack pointer.
    pub host_rsp: u64,
    /// Stack pointer of the guest-call stack of the running privilege.
    pub call_rsp: u64,
    /// Stack pointer of the program's guest-call stack while the kernel runs.
    pub user_rsp: u64,
    /// Stack pointer of the kernel's guest-call stack when it is empty.
    pub kernel_empty: u64,
    /// Where to go on entry.
    pub entry: u64,
    /// May SYSCALL and SYSRET be done in the cache? See `BtVcpu::update_fast`.
    pub fast_syscall: u32,
    /// CS and SS after SYSCALL, CS and SS after SYSRET.
    pub fast_segments: [cpu::Segment; 4],
    /// Host registers lent to an instruction.
    pub borrowed: [u64; 4],
    /// While a repeated string instruction runs over several pages: where to go on when it is done, and when the interpreter is to go on with
    /// it; numbers of its accesses: read, write; elements.
    pub string_ways: [u64; 2],
    pub string_accesses: [u32; 2],
    pub string_count: u64,
    /// What an access across two pages reads: the end of the first page and the start of the second one.
    pub bounce: Bounce,
    /// Host address of the second half of `bounce`.
    pub bounce_middle: u64,
    /// The runtime of this vCPU, for the slow path.
    pub runtime: u64,
    /// Is an upper half of YMM0 to YMM15 in use across the slow path? A byte.
    pub uppers: u32,
    /// YMM0 to YMM15 across the slow path.
    pub ymm: [[u8; 32]; 16],
    /// Software TLBs: kernel read, kernel write, user read, user write.
    pub tlb: [[TlbEntry; TLB_ENTRIES]; 4],
    /// Host addresses of the software TLBs.
    pub tables: [u64; 4],
    /// Predictions of check sites, by software TLB: a site must never be led to the table of other rights.
    pub sites: [[Site; MAX_SITES]; 4],
    /// Indirect-branch target caches: kernel, user.
    pub ibtc: [[IbtcEntry; IBTC_ENTRIES]; 2],
    /// Host addresses of cross-page jump targets.
    pub slots: [AtomicU64; MAX_SLOTS],
    /// Where this vCPU runs pages of movable code: guest-virtual addresses by number of the page, see [`crate::cache::Place`]. The first stays 0.
    pub bases: [u64; MAX_BASES],
}

/// Offsets into [`VcpuBlock`], as displacements.
#[allow(missing_docs)]
pub mod off {
    use super::{CpuState, FpState, VcpuBlock, offset_of};

    pub const fn gpr(index: usize) -> i32 {
        (offset_of!(VcpuBlock, state) + offset_of!(CpuState, gpr) + 8 * index) as i32
    }
    pub const FP: i32 = (offset_of!(VcpuBlock, state) + offset_of!(CpuState, fp)) as i32;
    pub const fn xmm(index: usize) -> i32 {
        FP + (FpState::XMM + 16 * index) as i32
    }
    pub const fn ymm_high(index: usize) -> i32 {
        FP + (FpState::YMM_HIGH + 16 * index) as i32
    }
    pub const MXCSR: i32 = FP + FpState::MXCSR as i32;
    pub const RFLAGS: i32 = offset_of!(VcpuBlock, state.rflags) as i32;
    pub const KICK: i32 = offset_of!(VcpuBlock, kick) as i32;
    pub const PAUSES: i32 = offset_of!(VcpuBlock, pauses) as i32;
    pub const IRQ_WAITING: i32 = offset_of!(VcpuBlock, irq_waiting) as i32;
    pub const IF_FLAG: i32 = offset_of!(VcpuBlock, if_flag) as i32;
    pub const FLAGS: i32 = offset_of!(VcpuBlock, flags) as i32;
    pub const EXIT_REASON: i32 = offset_of!(VcpuBlock, exit_reason) as i32;
    pub const EXIT_ARG: i32 = offset_of!(VcpuBlock, exit_arg) as i32;
    pub const ENTRIES: i32 = offset_of!(VcpuBlock, entries) as i32;
    pub const USER: i32 = offset_of!(VcpuBlock, user) as i32;
    pub const HOST_MXCSR: i32 = offset_of!(VcpuBlock, host_mxcsr) as i32;
    pub const HOST_FLAGS: i32 = offset_of!(VcpuBlock, host_flags) as i32;
    pub const EXIT_TARGET: i32 = offset_of!(VcpuBlock, exit_target) as i32;
    pub const SCRATCH: i32 = offset_of!(VcpuBlock, scratch) as i32;
    pub const BY_CALL: i32 = offset_of!(VcpuBlock, by_call) as i32;
    pub const fn lent(index: usize) -> i32 {
        (offset_of!(VcpuBlock, lent) + 8 * index) as i32
    }
    pub const SCRATCH_TABLE: i32 = lent(2);
    pub const HOST_RSP: i32 = offset_of!(VcpuBlock, host_rsp) as i32;
    pub const CALL_RSP: i32 = offset_of!(VcpuBlock, call_rsp) as i32;
    pub const USER_RSP: i32 = offset_of!(VcpuBlock, user_rsp) as i32;
    pub const KERNEL_EMPTY: i32 = offset_of!(VcpuBlock, kernel_empty) as i32;
    pub const FAST_SYSCALL: i32 = offset_of!(VcpuBlock, fast_syscall) as i32;
    pub const fn fast_segment(index: usize) -> i32 {
        (offset_of!(VcpuBlock, fast_segments) + index * size_of::<cpu::Segment>()) as i32
    }
    /// Offset of the selector in a segment.
    pub const SELECTOR: i32 = offset_of!(cpu::Segment, selector) as i32;
    pub const NMI_BLOCKED: i32 = offset_of!(VcpuBlock, state.nmi_blocked) as i32;
    pub const CR0: i32 = offset_of!(VcpuBlock, state.cr0) as i32;
    pub const CR2: i32 = offset_of!(VcpuBlock, state.cr2) as i32;
    pub const CR3: i32 = offset_of!(VcpuBlock, state.cr3) as i32;
    pub const CR4: i32 = offset_of!(VcpuBlock, state.cr4) as i32;
    pub const LSTAR: i32 = offset_of!(VcpuBlock, state.lstar) as i32;
    pub const ENTRY: i32 = offset_of!(VcpuBlock, entry) as i32;
    pub const fn borrowed(index: usize) -> i32 {
        (offset_of!(VcpuBlock, borrowed) + 8 * index) as i32
    }
    pub const STRING_DONE: i32 = offset_of!(VcpuBlock, string_ways) as i32;
    pub const STRING_STEP: i32 = STRING_DONE + 8;
    pub const STRING_READ: i32 = offset_of!(VcpuBlock, string_accesses) as i32;
    pub const STRING_WRITE: i32 = STRING_READ + 4;
    pub const STRING_COUNT: i32 = offset_of!(VcpuBlock, string_count) as i32;
    pub const BOUNCE: i32 = offset_of!(VcpuBlock, bounce) as i32;
    pub const BOUNCE_MIDDLE: i32 = offset_of!(VcpuBlock, bounce_middle) as i32;
    pub const RUNTIME: i32 = offset_of!(VcpuBlock, runtime) as i32;
    pub const UPPERS: i32 = offset_of!(VcpuBlock, uppers) as i32;
    pub const fn ymm(index: usize) -> i32 {
        (offset_of!(VcpuBlock, ymm) + 32 * index) as i32
    }
    pub const fn tlb(user: bool, write: bool) -> i32 {
        let table = (user as usize) * 2 + write as usize;
        (offset_of!(VcpuBlock, tlb) + table * super::TLB_ENTRIES * 16) as i32
    }
    pub const fn ibtc(user: bool) -> i32 {
        (offset_of!(VcpuBlock, ibtc) + (user as usize) * super::IBTC_ENTRIES * 16) as i32
    }
    pub const fn site(index: u32) -> i32 {
        (offset_of!(VcpuBlock, sites) + size_of::<super::Site>() * index as usize) as i32
    }
    pub const fn table(index: usize) -> i32 {
        (offset_of!(VcpuBlock, tables) + 8 * index) as i32
    }
    pub const fn slot(index: u32) -> i32 {
        (offset_of!(VcpuBlock, slots) + 8 * index as usize) as i32
    }
    pub const fn base(index: u32) -> i32 {
        (offset_of!(VcpuBlock, bases) + 8 * index as usize) as i32
    }
    pub const fn segment_base(index: usize) -> i32 {
        (offset_of!(VcpuBlock, state.segments) + index * size_of::<cpu::Segment>()) as i32
    }
    pub const KERNEL_GS_BASE: i32 = offset_of!(VcpuBlock, state.kernel_gs_base) as i32;
}

/// Index into the target cache for a guest-virtual address: what translated code computes.
pub const fn ibtc_index(target: u64) -> usize {
    (((target as u32) ^ (target as u32 >> 12)) as usize) & (IBTC_ENTRIES - 1)
}

/// Index into a software TLB for a guest-virtual address.
pub const fn tlb_index(address: u64) -> usize {
    (address >> 12) as usize & (TLB_ENTRIES - 1)
}
