//! One vCPU under binary translation: the dispatcher.

mod access;
mod contract;
mod direct;
mod events;
mod find;
mod flush;
mod jumps;
mod lockstep;
mod shared;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cpu::paging;
use cpu::{CpuState, Exit, Kick, PageFault, Segment, VcpuSetup, cr4, efer, rflags};
use interp::{Hooks, Interp, Outcome, TlbFlush};

use crate::analyze::Mode;
use crate::block::{BOUNCE, VcpuBlock, WRONG_PREDICTIONS, reason};
use crate::cache::{Place, STEP_ONLY};
use crate::direct::Direct;
use crate::emit::LinkKind;
use crate::kick::KickHandle;
use crate::sampler::Sampler;
use crate::signals::{self, ThreadInfo};
use crate::tlb::Tlbs;
use crate::walks::Walks;
use crate::world::Cause;

pub use self::access::slow_access;
pub use self::shared::Shared;

struct StopHandle(Arc<KickHandle>);

impl Kick for StopHandle {
    fn kick(&self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.raise();
    }
}

/// Counters of one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    pub exits: [u64; 16],
    pub steps: u64,
    pub tlb_misses: u64,
    pub flush_all: u64,
    pub flush_local: u64,
    /// CR3 writes with PCIDs.
    pub switches: u64,
    /// Those whose translations were still there.
    pub switches_kept: u64,
    pub flush_page: u64,
    pub halts: u64,
    /// From entry to exit of [`Vcpu::run`].
    pub run_time: Duration,
    /// In the translator.
    pub translator_time: Duration,
    /// Halted.
    pub halted_time: Duration,
}

/// A vCPU of engine `bt`.
pub struct BtVcpu {
    handle: Arc<KickHandle>,
    shared: Arc<Shared>,
    setup: VcpuSetup,
    interp: Interp,
    tlbs: Tlbs,
    mode: Mode,
    generation: u64,
    breakpoints: Vec<u64>,
    /// The guest may halt with interrupts off and be called by KVM_HC_KICK_CPU.
    pub pv_unhalt: bool,
    /// SYSCALL, SYSRET and IRET inside the code cache.
    pub fast_transitions: bool,
    pub counters: Counters,
    /// Instructions the interpreter ran, by mnemonic, when asked for.
    pub step_histogram: Option<std::collections::HashMap<iced_x86::Code, u64>>,
    /// For fills and flushes of the TLB.
    pub trace: Option<crate::trace::Trace>,
    /// Every block in the interpreter, too.
    pub lockstep: Option<Box<lockstep::Lockstep>>,
    /// See [`crate::Options::tamper`].
    pub tamper: Option<fn(u64, &mut [u8])>,
    page: Box<[u8; 4096 + 15]>,
    /// The guest-physical page that `page` holds, and the epoch of the copy.
    page_copied: Option<(u64, u64)>,
    /// TSC at which wrong predictions were forgiven.
    sites_forgiven: u64,
    /// The page fault that the slow path of the access met.
    page_fault: Option<PageFault>,
    /// Check sites that shall stop predicting: number, position in the cache.
    unpredictable: Vec<(u16, u32)>,
    sampler: Box<Sampler>,
    /// Page tables that were found.
    pub walks: Walks,
    /// The processes that programs run in directly, if there are any.
    direct: Option<Box<Direct>>,
    /// How many there are, or shall be.
    pub processes: usize,
    /// See [`crate::Options::direct`].
    pub direct_wanted: bool,
    /// See [`crate::Options::direct_at_once`].
    pub direct_at_once: bool,
    /// Low half of the code cache's address.
    code_start: u32,
    /// What [`Self::called_from`] found last: position, access, generation of the cache.
    callers: Box<[(u32, u32, u64); CALLERS]>,
}

/// Entries of [`BtVcpu::callers`].
const CALLERS: usize = 1024;

/// What the interpreter asked for during a step.
#[derive(Default)]
struct Flushes {
    all: bool,
    local: bool,
    pages: Vec<u64>,
    /// See [`TlbFlush::Switch`].
    switch: Option<(u16, u16, bool)>,
    pv_unhalt: bool,
    /// APIC id of the vCPU that is called out of its HLT.
    unhalt: Option<u32>,
}

impl Hooks for Flushes {
    fn tlb_flush(&mut self, what: TlbFlush) {
        match what {
            TlbFlush::All => self.all = true,
            TlbFlush::NonGlobal => self.local = true,
            TlbFlush::Page(address) => self.pages.push(address),
            TlbFlush::Switch { from, to, keep } => self.switch = Some((from, to, keep)),
        }
    }

    fn kick_cpu(&mut self, apic_id: u32) -> bool {
        self.unhalt = self.pv_unhalt.then_some(apic_id);
        self.pv_unhalt
    }
}

/// Where to go next.
enum Next {
    /// Look for pending events, then on at RIP.
    Events,
    /// Straight on at RIP.
    Run,
    Leave(Exit),
}

impl BtVcpu {
    pub fn new(setup: VcpuSetup, shared: Arc<Shared>, interp: Interp) -> Result<Box<Self>, String> {
        let handle = Arc::new(KickHandle::new(setup.index)?);
        shared.world.add(handle.clone());
        shared.cache().add_vcpu(handle.clone());
        let code_start = shared.cache().address(0) as u32;
        let mut vcpu = Box::new(Self {
            handle,
            shared,
            setup,
            interp,
            tlbs: Tlbs::new(),
            mode: Mode::default(),
            generation: u64::MAX,
            breakpoints: Vec::new(),
            pv_unhalt: false,
            fast_transitions: true,
            counters: Counters::default(),
            step_histogram: None,
            trace: None,
            lockstep: None,
            tamper: None,
            page: Box::new([0; 4096 + 15]),
            page_copied: None,
            sites_forgiven: interp::tsc::read(),
            page_fault: None,
            unpredictable: Vec::new(),
            sampler: Box::new(Sampler::new()),
            walks: Walks::default(),
            direct: None,
            processes: 1,
            direct_wanted: false,
            direct_at_once: false,
            code_start,
            callers: Box::new([(0, u32::MAX, u64::MAX); CALLERS]),
        });
        let pointer = &raw mut *vcpu;
        let block = vcpu.block();
        block.state = CpuState::default();
        block.runtime = pointer as u64;
        block.host_mxcsr = 0x1f80;
        block.pauses = jumps::PAUSES;
        block.bounce_middle = block.bounce.0[BOUNCE..].as_ptr() as u64;
        for (table, sites) in block.sites.iter_mut().enumerate() {
            block.tables[table] = block.tlb[table].as_ptr() as u64;
            for site in sites {
                site.entry = block.tables[table];
                site.wrong = -WRONG_PREDICTIONS;
            }
        }
        vcpu.flush_everything();
        Ok(vcpu)
    }

    #[allow(clippy::mut_from_ref)]
    fn block<'a>(&self) -> &'a mut VcpuBlock {
        // SAFETY: the block belongs to this vCPU and lives as long as it; only its own thread uses anything but the atomic
        // kick word, and every caller takes a fresh reference that it does not keep across translated code.
        unsafe { &mut *self.handle.memory.block() }
    }

    /// The guest-virtual address, as long as this vCPU is where translated code left it.
    fn address(&self, place: Place) -> u64 {
        place.address.wrapping_add(self.block().bases[place.base as usize])
    }

    /// Saves the x87 registers, which stay in the CPU while the monitor runs, to the state.
    fn save_x87(&mut self) {
        let area = self.block().state.fp.bytes.as_mut_ptr();
        // SAFETY: the area is 64-byte aligned and large enough for component 0; the instruction writes its legacy
        // region and header only.
        unsafe { std::arch::asm!("xsave64 [{}]", in(reg) area, in("eax") 1, in("edx") 0, options(nostack)) };
        let bytes = &mut self.block().state.fp.bytes;
        bytes[cpu::FpState::XSTATE_BV] = 7;
        // The instruction and data pointers are the host's: the guest must not learn them.
        bytes[8..24].fill(0);
    }

    /// The reverse of [`Self::save_x87`].
    fn load_x87(&mut self) {
        let area = self.block().state.fp.bytes.as_ptr();
        // SAFETY: the area is aligned, in standard format, with a valid header.
        unsafe { std::arch::asm!("xrstor64 [{}]", in(reg) area, in("eax") 1, in("edx") 0, options(nostack)) };
    }

    /// Prepares the transitions that stay in the cache: only for an IA32_FMASK that clears everything they do not handle.
    fn update_fast(&mut self) {
        const MASKED: u64 =
            rflags::ARITH | rflags::TF | rflags::IF | rflags::DF | rflags::IOPL | rflags::NT | rflags::AC | rflags::ID;
        let block = self.block();
        let state = &block.state;
        let ok =
            self.fast_transitions && !self.mode.df && state.efer & efer::SCE != 0 && state.sfmask & MASKED == MASKED;
        let kernel = (state.star >> 32) as u16 & 0xfffc;
        let user = (state.star >> 48) as u16;
        let flat = |selector: u16, attributes: u16| Segment { base: 0, limit: u32::MAX, attributes, selector };
        block.fast_segments = [
            flat(kernel, 0xa09b),
            flat(kernel.wrapping_add(8), 0xc093),
            flat(user.wrapping_add(16) | 3, 0xa0fb),
            flat(user.wrapping_add(8) | 3, 0xc0f3),
        ];
        block.fast_syscall = u32::from(ok);
    }

    /// Runs one instruction in the interpreter. `fpu`: it may use x87 or SSE state.
    fn interpret(&mut self, fpu: bool) -> Next {
        self.counters.steps += 1;
        if fpu {
            self.save_x87();
        }
        let mut flushes = Flushes { pv_unhalt: self.pv_unhalt, ..Flushes::default() };
        let block = self.block();
        if self.step_histogram.is_some() {
            self.count_step();
        }
        // Something may wait for the end of this instruction that nobody will kick for any more.
        let held_off = block.state.interrupt_shadow || block.state.nmi_blocked;
        let user = block.state.cpl() == 3;
        let before = (block.state.star, block.state.sfmask, block.state.efer);
        let mut outcome = self.interp.step(&mut block.state, &mut flushes);
        if outcome == Outcome::NotAlone {
            outcome = self.exclusive(Cause::Locked, |vcpu| {
                vcpu.interp.set_alone(true);
                let outcome = vcpu.interp.step(&mut block.state, &mut flushes);
                vcpu.interp.set_alone(false);
                outcome
            });
        }
        block.entries = block.entries.wrapping_add(u32::from(user && block.state.cpl() != 3));
        if before != (block.state.star, block.state.sfmask, block.state.efer) {
            self.update_fast();
        }
        if fpu {
            self.load_x87();
        }
        if flushes.all {
            self.flush_all();
        } else {
            if flushes.local {
                self.flush_local();
            }
            for page in flushes.pages {
                self.flush_page(page);
            }
            if let Some((from, to, keep)) = flushes.switch {
                self.switch_space(from, to, keep);
            }
        }
        if let Some(apic_id) = flushes.unhalt {
            self.shared.world.unhalt(apic_id);
        }
        match outcome {
            Outcome::Done if !held_off && self.is_quiet() => Next::Run,
            Outcome::Done | Outcome::Halted | Outcome::NotAlone => Next::Events,
            Outcome::TripleFault => Next::Leave(Exit::TripleFault),
            Outcome::Unsupported(what) => Next::Leave(Exit::Internal(what)),
        }
    }

    /// Is there nothing to look for before the next instruction?
    fn is_quiet(&self) -> bool {
        let block = self.block();
        self.handle.memory.kick_word().load(Ordering::SeqCst) == 0
            && !(block.irq_waiting != 0 && block.state.rflags & rflags::IF != 0)
    }

    /// Delivers the page fault of an instruction that has done nothing yet.
    fn deliver_page_fault(&mut self, fault: PageFault) -> Next {
        let block = self.block();
        block.entries = block.entries.wrapping_add(u32::from(self.mode.user));
        match self.interp.deliver_exception(&mut self.block().state, fault.into()) {
            Ok(()) if self.is_quiet() => Next::Run,
            Ok(()) => Next::Events,
            Err(_) => Next::Leave(Exit::TripleFault),
        }
    }

    #[cold]
    fn count_step(&mut self) {
        let mut bytes = [0; 15];
        let state = self.block().state.clone();
        let length = (4096 - (state.rip & 0xfff)).min(15) as usize;
        if self.interp.debug_read(&state, state.rip, &mut bytes[..length]) {
            let code = iced_x86::Decoder::new(64, &bytes, 0).decode().code();
            if let Some(histogram) = &mut self.step_histogram {
                *histogram.entry(code).or_default() += 1;
            }
        }
    }

    /// Runs translated code from `entry` until it exits.
    fn enter(&mut self, entry: u64, enter: extern "C" fn(u64)) {
        let block = self.block();
        let flags = block.state.rflags;
        block.if_flag = (flags & rflags::IF) as u32;
        block.host_flags = (flags & (rflags::ARITH | rflags::DF)) | 0x202;
        block.flags = pack_flags(flags);
        block.state.rflags = flags & !(rflags::ARITH | rflags::DF | rflags::IF | rflags::RF);
        enter(entry);
    }

    /// Puts RFLAGS together after an exit.
    fn leave(&mut self, in_block: bool) {
        let block = self.block();
        let arithmetic = if in_block { unpack_flags(block.flags) } else { block.host_flags & rflags::ARITH };
        block.state.rflags |= u64::from(block.if_flag) | (block.host_flags & rflags::DF) | arithmetic;
    }

    fn dispatch(&mut self, enter: extern "C" fn(u64)) -> Next {
        let Some(mode) = Self::current_mode(&self.block().state) else { return self.interpret(true) };
        self.set_mode(mode);
        if mode.user && self.enters_directly() {
            return self.run_directly();
        }
        let address = self.block().state.rip;
        let Some((mut id, _)) = self.find(address) else { return self.interpret(true) };
        // What to fill in once the block at the target is known.
        loop {
            if id == STEP_ONLY {
                return self.interpret(true);
            }
            let Some(entry) = self.shared.cache().entry(id, LinkKind::Backward) else {
                return Next::Leave(Exit::Internal("a block without an entry".into()));
            };
            self.enter(entry, enter);
            let block = self.block();
            let (why, argument) = (block.exit_reason, block.exit_arg);
            let user = block.user != 0;
            if user != self.mode.user {
                // A transition inside the cache.
                self.mode.user = user;
                self.mode.df = false;
                self.mode.no_tsc = block.state.tsc_offset != 0 || (user && block.state.cr4 & cr4::TSD != 0);
            }
            self.counters.exits[why as usize & 15] += 1;
            match why {
                reason::LINK => {
                    let (target, kind) = {
                        let cache = self.shared.cache();
                        (cache.link_target(argument), cache.link_kind(argument))
                    };
                    let Some(target) = target.map(|place| self.address(place)) else { return corrupt("link") };
                    self.leave(kind == Some(LinkKind::Call));
                    block.state.rip = target;
                    let mode = Mode { plain: kind == Some(LinkKind::Plain), ..self.mode };
                    let generation = self.generation;
                    let Some((next, _)) = self.find_mode(target, mode) else { return self.without_block(target) };
                    if generation == self.generation && next != STEP_ONLY {
                        let alone = self.shared.world.alone();
                        let early = self.shared.cache().link(argument, next, alone);
                        if early {
                            self.link_alone(argument, next);
                            return Next::Run;
                        }
                    }
                    id = next;
                }
                reason::SLOT => {
                    let Some(slot) = self.shared.sites.slots.get(argument) else { return corrupt("slot") };
                    let (target, kind) = (self.address(slot.target), slot.kind);
                    self.leave(kind == LinkKind::Call);
                    block.state.rip = target;
                    let generation = self.generation;
                    let Some((next, global)) = self.find_slot(argument, target) else {
                        return self.without_block(target);
                    };
                    if generation == self.generation && next != STEP_ONLY {
                        self.resolve(argument, slot, next, global);
                    }
                    id = next;
                }
                reason::INDIRECT => {
                    self.leave(true);
                    let target = block.exit_target;
                    if !paging::is_canonical(target) {
                        return if self.undo_jump(argument) { self.interpret(false) } else { corrupt("exit") };
                    }
                    block.state.rip = target;
                    if user && self.is_direct() {
                        self.direct_returns();
                        return Next::Run;
                    }
                    let Some((next, global)) = self.find(target) else { return self.without_block(target) };
                    if next != STEP_ONLY {
                        let cache = self.shared.cache();
                        if let Some(host) = cache.entry(next, LinkKind::Call) {
                            self.tlbs.fill_indirect(block, target, self.mode.user, host, global);
                        }
                    }
                    id = next;
                }
                reason::STEP | reason::POLL | reason::STALE | reason::PAUSE => {
                    let Some(site) = self.shared.sites.exits.get(argument) else { return corrupt("exit") };
                    self.leave(false);
                    block.state.rip = self.address(site.place);
                    return match why {
                        reason::STEP => self.interpret(site.fpu),
                        reason::STALE => Next::Run,
                        reason::PAUSE => self.spinning(),
                        _ => Next::Events,
                    };
                }
                reason::ACCESS => {
                    let Some(site) = self.shared.sites.accesses.get(argument) else { return corrupt("access") };
                    self.leave(site.access.flags_saved);
                    block.state.rip = self.address(site.place);
                    return match self.page_fault.take() {
                        Some(fault) => self.deliver_page_fault(fault),
                        None => self.interpret(site.access.fpu),
                    };
                }
                reason::FAULT => {
                    let pc = block.fault_pc;
                    let Some((place, meta)) = self.shared.cache().locate(pc) else {
                        return Next::Leave(Exit::Internal(format!(
                            "host signal {} at {pc:#x} outside translated instructions",
                            block.fault_signal
                        )));
                    };
                    self.leave(meta.flags_saved);
                    for (i, &register) in meta.borrowed.iter().enumerate() {
                        if register != 0xff {
                            block.state.gpr[usize::from(register)] = block.borrowed[i];
                        }
                    }
                    block.state.rip = self.address(place);
                    return self.interpret(true);
                }
                _ => return corrupt("reason"),
            }
        }
    }

    fn thread_info(&self) -> ThreadInfo {
        let cache = self.shared.cache();
        let block = self.block();
        let memory = &self.handle.memory;
        ThreadInfo {
            code: cache.range(),
            fault_stub: cache.address(cache.stubs.fault),
            fault_pc: &raw mut block.fault_pc,
            fault_signal: &raw mut block.fault_signal,
            stacks: [false, true].map(|user| (memory.guard(user), memory.empty_stack(user))),
            stubs: cache.stubs.end,
            sampler: &raw const *self.sampler,
            kick: memory.kick_word(),
            user: &raw const block.user,
            entries: &raw const block.entries,
        }
    }

    /// [`Vcpu::run`] without its clock.
    fn run_guest(&mut self) -> Exit {
        let enter = self.prepare_thread();
        if self.breakpoints.contains(&self.block().state.rip) {
            // Leave the breakpoint we stand on.
            if let Next::Leave(exit) = self.interpret(true) {
                self.save_x87();
                return exit;
            }
        }
        let mut events = true;
        let exit = loop {
            if events && let Some(exit) = self.events() {
                break exit;
            }
            if !self.breakpoints.is_empty() && self.breakpoints.contains(&self.block().state.rip) {
                break Exit::Debug;
            }
            let next = if self.lockstep.is_some() { self.dispatch_lockstep(enter) } else { self.dispatch(enter) };
            match next {
                Next::Events => events = true,
                Next::Run => events = false,
                Next::Leave(exit) => break exit,
            }
        };
        self.save_x87();
        exit
    }

    /// Prepares the thread: GS base, signal handlers, x87 registers. Returns the entry stub.
    fn prepare_thread(&mut self) -> extern "C" fn(u64) {
        let block = self.handle.memory.block() as u64;
        self.block().runtime = &raw mut *self as u64;
        // SAFETY: the GS base is not used by anything else in a 64-bit Linux process.
        unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1001, block) };
        signals::install(self.thread_info());
        let mut cache = self.shared.cache();
        if cache.compact && !self.sampler.attach() {
            // Nobody would find what is hot.
            cache.compact = false;
        }
        drop(cache);
        self.sampler.wake();
        let enter = {
            let cache = self.shared.cache();
            cache.address(cache.stubs.enter)
        };
        self.load_x87();
        // SAFETY: the stub has this signature and saves what the ABI wants saved.
        unsafe { std::mem::transmute::<u64, extern "C" fn(u64)>(enter) }
    }
}

fn corrupt(what: &str) -> Next {
    Next::Leave(Exit::Internal(format!("translated code named an unknown {what}")))
}

/// RFLAGS to what LAHF and SETO leave in EAX.
fn pack_flags(flags: u64) -> u32 {
    ((flags as u32 & 0xd5) << 8) | 0x200 | u32::from(flags & rflags::OF != 0)
}

/// The reverse of [`pack_flags`].
fn unpack_flags(packed: u32) -> u64 {
    u64::from((packed >> 8) & 0xd5) | if packed & 1 != 0 { rflags::OF } else { 0 }
}

// SAFETY: the raw pointers inside lead to this vCPU's own memory; it is used by one thread at a time.
unsafe impl Send for BtVcpu {}
