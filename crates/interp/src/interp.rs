//! [`Interp`]: what it consists of, and its step.

use std::sync::Arc;

use cpu::cpuid::CpuidModel;
use cpu::{CpuState, VcpuSetup};
use memory::GuestRam;

use crate::mmu::Mmu;

/// What a caller's own translation caches must forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush {
    /// Everything, global pages too: CR0, CR4, EFER or PAT changed in a way that matters.
    All,
    /// Everything but global pages: CR3 was written.
    NonGlobal,
    /// The page that holds this linear address, in all sizes: INVLPG.
    Page(u64),
}

/// Told by [`Interp::step`] of what happens beyond [`CpuState`].
pub trait Hooks {
    /// Translations must be forgotten. The interpreter has done so for its own.
    fn tlb_flush(&mut self, what: TlbFlush);
}

/// For callers without caches of their own.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoHooks;

impl Hooks for NoHooks {
    fn tlb_flush(&mut self, _what: TlbFlush) {}
}

/// What became of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// One instruction done, or one exception delivered. (Of a `rep` string instruction, a bounded piece: RIP still at it.)
    Done,
    /// HLT executed, RIP behind it; [`CpuState::halted`] is set.
    Halted,
    /// The guest is dead. The state is that of the last instruction.
    TripleFault,
    /// Not executed: code or a mode this interpreter does not know. RIP is at the instruction.
    Unsupported(String),
}

/// Events counted by kind.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) instructions: u64,
    pub(crate) native: u64,
    pub(crate) decoded: u64,
    pub(crate) interrupts: u64,
    pub(crate) halts: u64,
    pub(crate) exceptions: [u64; 32],
}

/// The executor of one vCPU. All architectural state is in the [`CpuState`] it is given; this holds caches only.
pub struct Interp {
    pub(crate) mmu: Mmu,
    pub(crate) setup: VcpuSetup,
    pub(crate) model: Arc<CpuidModel>,
    pub(crate) counters: Counters,
}

impl Interp {
    /// An executor for the vCPU `setup` over `ram`; CPUID answers by `model`.
    pub fn new(setup: VcpuSetup, ram: GuestRam, model: Arc<CpuidModel>) -> Self {
        let mmu = Mmu::new(ram, setup.bus.clone());
        Self { mmu, setup, model, counters: Counters::default() }
    }

    /// Forgets cached translations: to be called when somebody else changed CR0, CR3, CR4, EFER, or page tables without the guest
    /// executing an invalidation (a debugger, a restored snapshot).
    pub fn flush(&mut self) {
        self.mmu.flush();
    }

    /// Executes one instruction at `state.rip`. An exception it raises is delivered through the guest's IDT in here, as is the
    /// single-step trap. Interrupts are the caller's: between steps it may call [`Self::deliver_interrupt`] when RFLAGS.IF is set
    /// and [`CpuState::interrupt_shadow`] is not.
    pub fn step(&mut self, state: &mut CpuState, hooks: &mut dyn Hooks) -> Outcome {
        let _ = (state, hooks);
        Outcome::Unsupported("not yet written".into())
    }

    pub(crate) fn count_exception(&mut self, vector: u8) {
        if let Some(count) = self.counters.exceptions.get_mut(usize::from(vector)) {
            *count += 1;
        }
    }
}
