//! [`Interp`]: what it consists of, and its step.

use std::sync::Arc;

use cpu::cpuid::CpuidModel;
use cpu::paging::Kind;
use cpu::{CpuState, Exception, VcpuSetup, rflags, vector};
use memory::{GuestRam, PAGE_SIZE};

use crate::checks::{Checks, instruction_breakpoints};
use crate::decode::{DecodeCache, Decoded, Insn, MAX_LENGTH, Rep, decode};
use crate::events::{TripleFault, is_fault};
use crate::host_memory;
use crate::mmu::{Mmu, Target};
use crate::msr::MsrEnv;
use crate::native::Assist;
use crate::ops::Cx;
use crate::steal::StealClock;
use crate::tsc;

/// DR6: single step.
const DR6_BS: u64 = 1 << 14;

/// What a caller's own translation caches must forget.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlbFlush {
    /// Everything, global pages too: CR0, CR4, EFER or PAT changed in a way that matters.
    All,
    /// Everything but global pages: CR3 was written.
    NonGlobal,
    /// CR3 was written while CR4.PCIDE is set: from one process-context identifier (PCID) to another, perhaps the same. Unless `keep`,
    /// everything of the other but global pages is to be forgotten. What was known of the first may be kept until it comes back
    /// (SDM volume 3, 4.10.4.1).
    Switch {
        /// The PCID so far.
        from: u16,
        /// The PCID from now on.
        to: u16,
        /// Bit 63 of the value written.
        keep: bool,
    },
    /// The page that holds this linear address, in all sizes: INVLPG.
    Page(u64),
}

/// Told by [`Interp::step`] of what happens beyond [`CpuState`].
pub trait Hooks {
    /// Translations must be forgotten. The interpreter has done so for its own.
    fn tlb_flush(&mut self, what: TlbFlush);
    /// KVM_HC_KICK_CPU: the vCPU with this APIC id is to go on behind its HLT, or behind its next one. `false`: there is no such hypercall.
    fn kick_cpu(&mut self, apic_id: u32) -> bool {
        let _ = apic_id;
        false
    }
}

/// An exception or interrupt on its way through the guest's IDT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Delivery {
    /// The vector.
    pub vector: u8,
    /// The error code that goes onto the handler's stack.
    pub error_code: Option<u32>,
    /// An external interrupt or NMI.
    pub external: bool,
    /// INT n, INT3, INTO.
    pub software: bool,
}

/// Sees every exception and interrupt that an [`Interp`] delivers: for traces.
pub trait Observer: Send {
    /// `delivery` begins; `state` is that of the interrupted code (CR2 already set). If a table is bad, its exception follows.
    fn delivery(&mut self, state: &CpuState, delivery: &Delivery);
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
    /// Not executed: a locked access that takes more than one access of the host, while others run ([`Interp::set_alone`]). Stop them and
    /// step again.
    NotAlone,
    /// Not executed: code or a mode this interpreter does not know. RIP is at the instruction.
    Unsupported(String),
}

/// Events counted by kind.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counters {
    pub(crate) instructions: u64,
    pub(crate) native: u64,
    pub(crate) decoded: u64,
    /// By vector, in rows of 32.
    pub(crate) interrupts: [[u64; 32]; 8],
    pub(crate) halts: u64,
    pub(crate) exceptions: [u64; 32],
}

/// The executor of one vCPU. All architectural state is in the [`CpuState`] it is given; this holds caches only.
pub struct Interp {
    pub(crate) mmu: Mmu,
    pub(crate) setup: VcpuSetup,
    pub(crate) model: Arc<CpuidModel>,
    pub(crate) counters: Counters,
    pub(crate) assist: Assist,
    pub(crate) observer: Option<Box<dyn Observer>>,
    pub(crate) steal: StealClock,
    cache: DecodeCache,
}

impl Interp {
    /// An executor for the vCPU `setup` over `ram`; CPUID answers by `model`.
    pub fn new(setup: VcpuSetup, ram: GuestRam, model: Arc<CpuidModel>) -> Self {
        // The clock of kvmclock starts before any guest can ask for it.
        tsc::origin();
        let mmu = Mmu::new(ram, setup.bus.clone());
        Self {
            mmu,
            setup,
            model,
            counters: Counters::default(),
            assist: Assist::ready(),
            observer: None,
            steal: StealClock::default(),
            cache: DecodeCache::new(),
        }
    }

    /// Forgets cached translations: to be called when somebody else changed CR0, CR3, CR4, EFER, or page tables without the guest
    /// executing an invalidation (a debugger, a restored snapshot).
    pub fn flush(&mut self) {
        self.mmu.checks = Checks::default();
        self.mmu.flush();
    }

    /// Tells whether other vCPUs may run during the next steps; at first it is assumed that none does. While some do, a locked access that
    /// crosses a page or leads outside RAM is not done: [`Outcome::NotAlone`].
    pub fn set_alone(&mut self, alone: bool) {
        self.mmu.alone = alone;
    }

    /// From now on `observer` sees what is delivered.
    pub fn observe(&mut self, observer: Box<dyn Observer>) {
        self.observer = Some(observer);
    }

    /// Exceptions delivered so far.
    pub fn exceptions(&self) -> u64 {
        self.counters.exceptions.iter().sum()
    }

    /// Events so far, as `(kind, number)`: instructions, decodings, TLB misses, exceptions by vector.
    pub fn counters(&self) -> Vec<(String, u64)> {
        let c = &self.counters;
        let mut all: Vec<(String, u64)> = [
            ("instructions.interpreted", c.instructions),
            ("instructions.native", c.native),
            ("instructions.decoded", c.decoded),
            ("tlb.misses", self.mmu.misses),
            ("halts", c.halts),
        ]
        .map(|(kind, number)| (kind.to_string(), number))
        .into();
        all.extend(self.deliveries());
        all
    }

    /// What was delivered so far, as `(kind, number)`: exceptions by name, NMIs and interrupts by vector.
    pub fn deliveries(&self) -> Vec<(String, u64)> {
        let raised = self.counters.exceptions.iter().enumerate().filter(|(_, number)| **number > 0);
        let exceptions = raised.map(|(vector, number)| match cpu::vector::NAMES.get(vector) {
            Some(name) if !name.is_empty() => (format!("exceptions.{name}"), *number),
            _ => (format!("exceptions.{vector}"), *number),
        });
        let taken = self.counters.interrupts.iter().flatten().enumerate().filter(|(_, number)| **number > 0);
        exceptions.chain(taken.map(|(vector, number)| (format!("interrupts.{vector:#04x}"), *number))).collect()
    }

    /// CPU time of this process of the host is the vCPU's, too.
    pub fn add_process(&mut self, pid: i32) {
        self.steal.add_process(pid);
    }

    /// The vCPU begins to run, or goes on after it was stopped or moved here. To be called before its first step.
    pub fn resumed(&mut self, state: &CpuState) {
        self.steal.resumed(&self.mmu.ram, state);
    }

    /// What [`crate::msr`] needs.
    pub(crate) fn msr_env(&self) -> MsrEnv<'_> {
        MsrEnv { ram: &self.mmu.ram, lapic: &*self.setup.lapic, model: &self.model }
    }

    /// Executes one instruction at `state.rip`. An exception it raises is delivered through the guest's IDT in here, as is the
    /// single-step trap. Interrupts are the caller's: between steps it may call [`Self::deliver_interrupt`] when RFLAGS.IF is set
    /// and [`CpuState::interrupt_shadow`] is not.
    pub fn step(&mut self, state: &mut CpuState, hooks: &mut dyn Hooks) -> Outcome {
        if state.halted {
            return Outcome::Halted;
        }
        if !state.is_64bit_code() {
            return Outcome::Unsupported(format!("16/32-bit code at {:#x}", state.rip));
        }
        // The cache is taken out so that the instruction can be borrowed from it while the rest changes.
        let mut cache = std::mem::take(&mut self.cache);
        let outcome = self.step_with(&mut cache, state, hooks);
        self.cache = cache;
        outcome
    }

    #[inline(always)]
    fn step_with(&mut self, cache: &mut DecodeCache, state: &mut CpuState, hooks: &mut dyn Hooks) -> Outcome {
        let single_step = state.rflags & rflags::TF != 0;
        if Checks::wanted(state) {
            self.mmu.checks.arm(state);
            if state.rflags & rflags::RF == 0 && !self.mmu.checks.behind_stack_switch() {
                let hits = instruction_breakpoints(state);
                if hits != 0 {
                    state.dr[6] |= hits;
                    return self.fault(state, Exception::plain(vector::DB), true);
                }
            }
        }
        let user = state.cpl() == 3;
        let insn = match self.fetch(cache, state, user) {
            Ok(insn) => insn,
            Err(exception) => return self.fault(state, exception, true),
        };
        self.counters.instructions += 1;
        let mut cx = Cx {
            next: state.rip.wrapping_add(u64::from(insn.len)),
            user,
            shadow: false,
            no_trap: false,
            debug_trap: false,
            keep_rf: false,
            outcome: None,
            it: self,
            st: state,
            hooks,
        };
        let result = (insn.run)(&mut cx, insn);
        let Cx { next, shadow, no_trap, debug_trap, keep_rf, outcome, .. } = cx;
        if let Some(unsupported @ Outcome::Unsupported(_)) = outcome {
            self.mmu.checks.disarm();
            return unsupported;
        }
        if let Err(exception) = result {
            if std::mem::take(&mut self.mmu.not_alone) {
                self.mmu.checks.disarm();
                return Outcome::NotAlone;
            }
            state.interrupt_shadow = false;
            let fault = exception.vector != vector::DB || state.dr[6] & (1 << 13) != 0;
            return self.fault(state, exception, fault);
        }
        // Between two turns of a repeated instruction, debug exceptions are saved with RF set (SDM volume 3, 18.3.1.1).
        let again = next == state.rip && insn.rep != Rep::No;
        state.rip = next;
        state.interrupt_shadow = shadow;
        if !keep_rf {
            state.rflags &= !rflags::RF;
        }
        let checks = &mut self.mmu.checks;
        let hits = if checks.armed || checks.behind_stack_switch() { checks.finish(shadow && no_trap) } else { 0 };
        if (single_step && !no_trap) || debug_trap || hits != 0 {
            state.dr[6] |= hits;
            if single_step {
                state.dr[6] |= DR6_BS;
            }
            return self.fault(state, Exception::plain(vector::DB), again);
        }
        outcome.unwrap_or(Outcome::Done)
    }

    /// Delivers an exception as part of a step.
    fn fault(&mut self, state: &mut CpuState, exception: Exception, fault: bool) -> Outcome {
        self.mmu.checks.disarm();
        let restart = fault && exception.vector == vector::DB || is_fault(exception.vector);
        match self.deliver_first(state, exception, restart) {
            Ok(()) => Outcome::Done,
            Err(TripleFault) => Outcome::TripleFault,
        }
    }

    /// The instruction at RIP, from the cache or decoded.
    #[inline(always)]
    fn fetch<'a>(&mut self, cache: &'a mut DecodeCache, state: &CpuState, user: bool) -> Result<&'a Insn, Exception> {
        let target = self.mmu.translate(state, state.rip, Kind::Fetch, user)?;
        if let Target::Ram(host, gpa) = target
            && state.rip % PAGE_SIZE <= PAGE_SIZE - 16
        {
            // SAFETY: 16 bytes are left in the mapped page.
            let bytes = unsafe {
                u128::from(host_memory::load(host, 8)) | u128::from(host_memory::load(host.wrapping_add(8), 8)) << 64
            };
            if cache.get(gpa, bytes).is_none() {
                self.counters.decoded += 1;
                match decode(bytes.to_le_bytes().get(..MAX_LENGTH).unwrap_or_default(), state.rip)? {
                    Decoded::Insn(insn) => {
                        cache.put(gpa, bytes, *insn);
                    }
                    Decoded::NeedMore => return Err(Exception::gp(0)),
                }
            }
            return cache.get(gpa, bytes).ok_or(Exception::ud());
        }
        self.fetch_slow(cache, state, user, target)
    }

    /// Near the end of a page, or not in RAM.
    #[cold]
    fn fetch_slow<'a>(
        &mut self,
        cache: &'a mut DecodeCache,
        state: &CpuState,
        user: bool,
        target: Target,
    ) -> Result<&'a Insn, Exception> {
        let mut bytes = [0u8; 16];
        let here = ((PAGE_SIZE - state.rip % PAGE_SIZE) as usize).min(MAX_LENGTH);
        let gpa = match target {
            Target::Ram(_, gpa) | Target::Mmio(gpa) => gpa,
        };
        self.fetch_bytes(target, bytes.get_mut(..here).unwrap_or_default());
        self.counters.decoded += 1;
        let decoded = match decode(bytes.get(..here).unwrap_or_default(), state.rip)? {
            Decoded::NeedMore if here < MAX_LENGTH => {
                let next_page = state.rip.wrapping_add(here as u64);
                let target = self.mmu.translate(state, next_page, Kind::Fetch, user)?;
                self.fetch_bytes(target, bytes.get_mut(here..MAX_LENGTH).unwrap_or_default());
                decode(bytes.get(..MAX_LENGTH).unwrap_or_default(), state.rip)?
            }
            other => other,
        };
        match decoded {
            Decoded::Insn(insn) => cache.put(gpa, u128::from_le_bytes(bytes), *insn).ok_or(Exception::ud()),
            Decoded::NeedMore => Err(Exception::gp(0)),
        }
    }

    fn fetch_bytes(&mut self, target: Target, data: &mut [u8]) {
        match target {
            // SAFETY: the caller asks for bytes up to the end of the page at most.
            Target::Ram(host, _) => unsafe { host_memory::copy(host, data.as_mut_ptr(), data.len()) },
            Target::Mmio(gpa) => self.mmu.mmio_read(gpa, data),
        }
    }

    pub(crate) fn count_exception(&mut self, vector: u8) {
        if let Some(count) = self.counters.exceptions.get_mut(usize::from(vector)) {
            *count += 1;
        }
    }
}
