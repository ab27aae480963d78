//! One vCPU under binary translation: the dispatcher.

#[path = "lockstep.rs"]
mod lockstep;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cpu::paging::{self, Access as PageAccess, Kind, PagingContext};
use cpu::{CpuState, Exit, InterruptStatus, Kick, Segment, Vcpu, VcpuSetup, cr0, cr4, efer, rflags};
use interp::{Hooks, Interp, Outcome, TlbFlush};
use memory::GuestRam;

use crate::Parking;
use crate::analyze::Mode;
use crate::block::{VcpuBlock, WRONG_PREDICTIONS, reason};
use crate::cache::{BlockId, Cache, Forgotten, Full, Hit, Key, STEP_ONLY, Sites};
use crate::emit::LinkKind;
use crate::kick::KickHandle;
use crate::signals::{self, ThreadInfo};
use crate::tlb::Tlbs;
use crate::world::{CAUSES, Cause, World};

/// What all vCPUs and the device threads share.
pub struct Shared {
    cache: Mutex<Cache>,
    /// [`Cache::sites`], without the lock.
    sites: Arc<Sites>,
    pub ram: GuestRam,
    pub world: World,
    /// Translations that must go because somebody wrote the memory that they were made from.
    hits: Mutex<Vec<Hit>>,
    has_hits: AtomicBool,
    /// [`Cache::epoch`] and [`Cache::generation`], without the lock.
    epoch: AtomicU64,
    generation: AtomicU64,
    parking: Option<Parking>,
}

impl Shared {
    pub fn new(cache: Cache, ram: GuestRam, parking: Option<Parking>) -> Arc<Self> {
        if let Some(parking) = parking {
            // Writes to the mailbox are noticed as those to code are.
            ram.code_pages().set(parking.mailbox >> 12);
        }
        Arc::new(Self {
            parking,
            sites: cache.sites.clone(),
            cache: Mutex::new(cache),
            ram,
            world: World::default(),
            hits: Mutex::new(Vec::new()),
            has_hits: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            generation: AtomicU64::new(0),
        })
    }

    fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unresolved address of a slot.
    fn thunk(&self, slot: u32) -> u64 {
        self.sites.slots.get(slot).map_or(0, |s| s.thunk)
    }
}

impl memory::CodeWriteListener for Shared {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(parking) = self.parking
            && gpa >> 12 == parking.mailbox >> 12
            && let Some(called) = parking.called(&self.ram)
        {
            self.world.each(|vcpu| {
                if vcpu.index == called {
                    vcpu.raise();
                }
            });
        }
        let mut hits = Vec::new();
        {
            let mut cache = self.cache();
            cache.written(gpa, len, &mut hits);
            self.epoch.store(cache.epoch, Ordering::Release);
        }
        if hits.is_empty() {
            return;
        }
        self.hits.lock().unwrap_or_else(PoisonError::into_inner).append(&mut hits);
        self.has_hits.store(true, Ordering::SeqCst);
        // A vCPU that sleeps looks when it wakes.
        self.world.each(|vcpu| vcpu.nudge());
    }
}

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
    sites_forgiven: Instant,
    /// Check sites that shall stop predicting: number, position in the cache.
    unpredictable: Vec<(u16, u32)>,
}

/// PAUSEs until a spinning vCPU lets others have its core: some microseconds.
const PAUSES: u32 = 128;

/// What the interpreter asked for during a step.
#[derive(Default)]
struct Flushes {
    all: bool,
    local: bool,
    pages: Vec<u64>,
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
            sites_forgiven: Instant::now(),
            unpredictable: Vec::new(),
        });
        let pointer = &raw mut *vcpu;
        let block = vcpu.block();
        block.state = CpuState::default();
        block.runtime = pointer as u64;
        block.host_mxcsr = 0x1f80;
        block.pauses = PAUSES;
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

    fn reset_call_stacks(&mut self) {
        let underflow = {
            let cache = self.shared.cache();
            cache.address(cache.stubs.underflow)
        };
        for user in [false, true] {
            let empty = self.handle.memory.empty_stack(user);
            // SAFETY: the address lies in our own stack mapping.
            unsafe { *(empty as *mut u64) = underflow };
        }
        let memory = &self.handle.memory;
        let block = self.block();
        block.kernel_empty = memory.empty_stack(false);
        block.user_rsp = memory.empty_stack(true);
        block.call_rsp = memory.empty_stack(block.user != 0);
    }

    /// After a flush of the code cache, and at the start.
    fn flush_everything(&mut self) {
        self.unpredictable.clear();
        // Slots of the old cache are not to be touched: others may be making new ones of the same numbers.
        self.tlbs.forget_slots();
        self.flush_all();
        let cache = self.shared.cache();
        cache.fill_slots(&self.handle);
        self.generation = cache.generation;
    }

    fn flush_all(&mut self) {
        self.counters.flush_all += 1;
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush all", self.setup.index));
        }
        let block = self.block();
        self.tlbs.flush_all(block, |slot| self.shared.thunk(slot));
        self.reset_call_stacks();
    }

    fn flush_local(&mut self) {
        self.counters.flush_local += 1;
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush non-global", self.setup.index));
        }
        let block = self.block();
        self.tlbs.flush_local(block, |slot| self.shared.thunk(slot));
        self.reset_call_stacks();
    }

    fn flush_page(&mut self, address: u64) {
        self.counters.flush_page += 1;
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush page {address:#x}", self.setup.index));
        }
        let block = self.block();
        if self.tlbs.flush_page(block, address, |slot| self.shared.thunk(slot)) {
            self.reset_call_stacks();
        }
    }

    /// Throws the whole code cache away. A safe point.
    fn flush_cache(&mut self) {
        self.exclusive(Cause::Flush, |vcpu| {
            {
                let mut cache = vcpu.shared.cache();
                for page in cache.flush() {
                    vcpu.shared.ram.code_pages().clear(page >> 12);
                }
                vcpu.shared.epoch.store(cache.epoch, Ordering::Release);
                vcpu.shared.generation.store(cache.generation, Ordering::Release);
            }
            // The others see the new generation before they go on.
            vcpu.flush_everything();
        });
    }

    /// Changes the check sites whose predictions fail often. A safe point if there are any.
    fn stop_predicting(&mut self) {
        if self.unpredictable.is_empty() {
            return;
        }
        self.exclusive(Cause::Predict, |vcpu| {
            // Emptied if the cache has been flushed meanwhile.
            for (site, position) in std::mem::take(&mut vcpu.unpredictable) {
                vcpu.shared.cache().stop_predicting(site, position as usize);
            }
        });
    }

    /// Once a second, wrong predictions are counted anew.
    fn forgive_sites(&mut self) {
        let now = Instant::now();
        if now.duration_since(self.sites_forgiven) >= Duration::from_secs(1) {
            self.sites_forgiven = now;
            for site in self.block().sites.as_flattened_mut() {
                site.wrong = -WRONG_PREDICTIONS;
            }
        }
    }

    /// Runs `work` while all other vCPUs are parked. A safe point: before `work`, others may have dropped blocks or flushed the
    /// cache. What `work` finds holds until the next safe point.
    fn exclusive<T>(&mut self, cause: Cause, work: impl FnOnce(&mut Self) -> T) -> T {
        let (shared, handle) = (self.shared.clone(), self.handle.clone());
        let section = shared.world.begin(&handle, cause);
        if section.is_some() {
            self.open_mail();
        }
        let result = work(self);
        drop(section);
        result
    }

    /// From now on this vCPU is running. Waits while others want it parked.
    fn resume(&mut self) {
        self.shared.world.unpark(&self.handle);
        self.open_mail();
    }

    /// Lets others have their exclusive sections.
    #[inline]
    fn safe_point(&mut self) {
        if self.shared.world.wanted() {
            self.shared.world.park(&self.handle);
            self.resume();
        }
    }

    /// Does what exclusive sections of others ask of this vCPU's own caches.
    fn open_mail(&mut self) {
        if self.handle.has_mail.swap(false, Ordering::AcqRel) {
            let mail = std::mem::take(&mut *self.handle.mail.lock().unwrap_or_else(PoisonError::into_inner));
            if mail.everything {
                self.flush_all();
            }
            for page in mail.protect {
                self.tlbs.protect(self.block(), page);
            }
            for forgotten in mail.forgotten {
                self.forget(&forgotten);
            }
        }
        if self.shared.generation.load(Ordering::Acquire) != self.generation {
            self.flush_everything();
        }
    }

    /// Removes ways to translations that have gone.
    fn forget(&mut self, forgotten: &Forgotten) {
        let block = self.block();
        for &(target, user) in &forgotten.targets {
            self.tlbs.forget_indirect(block, target, user);
        }
        for &slot in &forgotten.slots {
            if let Some(entry) = self.shared.sites.slots.get(slot) {
                block.slots[slot as usize].store(entry.thunk, Ordering::Relaxed);
            }
        }
    }

    /// Drops translations of memory that has been written. A safe point if there are any.
    #[inline]
    fn drop_written(&mut self) {
        if self.shared.has_hits.load(Ordering::SeqCst) {
            self.drop_hits();
        }
    }

    #[cold]
    fn drop_hits(&mut self) {
        self.exclusive(Cause::Drop, |vcpu| {
            // Cleared only in here: who sees it clear knows that what was written before has been dealt with.
            vcpu.shared.has_hits.store(false, Ordering::SeqCst);
            let hits = std::mem::take(&mut *vcpu.shared.hits.lock().unwrap_or_else(PoisonError::into_inner));
            let mut forgotten = Forgotten::default();
            {
                let mut cache = vcpu.shared.cache();
                for hit in hits {
                    cache.drop_hit(hit, &mut forgotten);
                }
                vcpu.shared.epoch.store(cache.epoch, Ordering::Release);
            }
            for page in std::mem::take(&mut forgotten.empty_pages) {
                vcpu.shared.ram.code_pages().clear(page >> 12);
            }
            vcpu.forget(&forgotten);
            let forgotten = Arc::new(forgotten);
            vcpu.shared.world.send(&vcpu.handle, |mail| mail.forget(&forgotten));
        });
    }

    /// The mode that the state asks for; `None` where only the interpreter can go on.
    fn current_mode(state: &CpuState) -> Option<Mode> {
        let cpl = state.cpl();
        if !state.is_64bit_code()
            || (cpl != 0 && cpl != 3)
            || state.rflags & rflags::TF != 0
            || state.interrupt_shadow
            || state.dr[7] & 0xff != 0
            || (cpl == 3 && state.rflags & rflags::AC != 0 && state.cr0 & cr0::AM != 0)
        {
            return None;
        }
        Some(Mode {
            plain: false,
            user: cpl == 3,
            no_fpu: state.cr0 & (cr0::TS | cr0::EM) != 0 || state.cr4 & cr4::OSFXSR == 0,
            no_avx: state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & 6 != 6,
            df: state.rflags & rflags::DF != 0,
            no_tsc: state.tsc_offset != 0 || (cpl == 3 && state.cr4 & cr4::TSD != 0),
        })
    }

    fn set_mode(&mut self, mode: Mode) {
        let block = self.block();
        if mode.user != (block.user != 0) {
            // The kernel starts with an empty stack; the program's is kept for when it goes on.
            if mode.user {
                block.call_rsp = block.user_rsp;
            } else {
                block.user_rsp = block.call_rsp;
                block.call_rsp = block.kernel_empty;
            }
            block.user = u32::from(mode.user);
        }
        let rest = |m: Mode| Mode { user: false, ..m };
        let others = rest(mode) != rest(self.mode);
        self.mode = mode;
        if others {
            // Indirect targets and landing pads are not keyed by these, nor do the fast transitions look at them.
            self.tlbs.flush_jumps(block, |slot| self.shared.thunk(slot));
            self.reset_call_stacks();
            self.update_fast();
        }
    }

    /// The guest-physical address of the executable RAM page at `page`, and whether its mapping is global.
    fn fetch_page(&mut self, page: u64) -> Option<(u64, bool)> {
        let user = self.mode.user;
        if let Some(hit) = self.tlbs.fetch(page, user) {
            return Some(hit);
        }
        if !paging::is_canonical(page) {
            return None;
        }
        let context = PagingContext::new(&self.block().state);
        let mapping = paging::walk(&self.shared.ram, &context, page, PageAccess::new(Kind::Fetch, user)).ok()?;
        self.shared.ram.host_page(mapping.gpa)?;
        self.trace_fill("fetch", user, page, &mapping);
        self.tlbs.fill_fetch(page, user, mapping.gpa, mapping.global, mapping.page_size);
        Some((mapping.gpa, mapping.global))
    }

    /// From now on writes to the page are noticed. A safe point if they were not.
    fn watch_page(&mut self, gpa: u64) -> Option<()> {
        if !self.shared.ram.code_pages().test(gpa >> 12) {
            let host = self.shared.ram.host_page(gpa)? as u64;
            self.exclusive(Cause::Protect, |vcpu| {
                vcpu.shared.ram.code_pages().set(gpa >> 12);
                vcpu.tlbs.protect(vcpu.block(), host);
                vcpu.shared.world.send(&vcpu.handle, |mail| mail.protect(host));
            });
        }
        Some(())
    }

    /// The block at `address`, translated if need be. `None`: no executable RAM there, the interpreter raises the fault.
    /// The flag tells whether its mapping is global. A safe point: what was found before may have gone.
    fn find(&mut self, address: u64) -> Option<(BlockId, bool)> {
        self.find_mode(address, self.mode)
    }

    fn find_mode(&mut self, address: u64, mode: Mode) -> Option<(BlockId, bool)> {
        // Memory that a device has written, and that the guest knows of: none of its old code may be entered any more.
        self.drop_written();
        let page = address & !0xfff;
        let (gpa, global) = self.fetch_page(page)?;
        let mut key = Key { page: gpa, address, mode, tail: 0 };
        let found = self.shared.cache().find(&key);
        let id = match found {
            Some(id) => id,
            None => self.translate(key)?,
        };
        if id != STEP_ONLY {
            return Some((id, global));
        }
        let (tail, tail_global) = self.fetch_page(page.wrapping_add(4096))?;
        key.tail = tail | 1;
        let found = self.shared.cache().find(&key);
        let id = match found {
            Some(id) => id,
            None => self.translate(key)?,
        };
        Some((id, global && tail_global))
    }

    fn translate(&mut self, key: Key) -> Option<BlockId> {
        let start = Instant::now();
        let id = self.translate_now(key);
        self.counters.translator_time += start.elapsed();
        id
    }

    fn translate_now(&mut self, key: Key) -> Option<BlockId> {
        if self.breakpoints.contains(&key.address) {
            return None;
        }
        let mut room = true;
        loop {
            // First the mark, then the translation of what is there.
            self.watch_page(key.page)?;
            if key.tail != 0 {
                self.watch_page(key.tail & !1)?;
                // The second mark was a safe point: is the first still there?
                if !self.shared.ram.code_pages().test(key.page >> 12) {
                    continue;
                }
            }
            // The copy stays good as long as no page with code has been written.
            let epoch = self.shared.epoch.load(Ordering::Acquire);
            if self.page_copied != Some((key.page, epoch)) {
                self.page_copied = None;
                if !self.shared.ram.read(key.page, &mut self.page[..4096]) {
                    return None;
                }
                self.page_copied = Some((key.page, epoch));
                if let Some(tamper) = self.tamper {
                    tamper(key.address & !0xfff, &mut self.page[..4096]);
                }
            }
            if key.tail != 0 && !self.shared.ram.read(key.tail & !1, &mut self.page[4096..]) {
                return None;
            }
            let result = {
                let mut cache = self.shared.cache();
                if cache.epoch != epoch {
                    continue;
                }
                match cache.find(&key) {
                    // Another vCPU was faster.
                    Some(id) => Ok(id),
                    None if key.tail == 0 => cache.translate(key, &self.page[..4096]),
                    None => cache.translate_crossing(key, &self.page[..]),
                }
            };
            match result {
                Ok(id) => return Some(id),
                Err(Full) if room => {
                    room = false;
                    self.flush_cache();
                }
                Err(Full) => return None,
            }
        }
    }

    #[allow(clippy::mut_from_ref)]
    fn block<'a>(&self) -> &'a mut VcpuBlock {
        // SAFETY: the block belongs to this vCPU and lives as long as it; only its own thread uses anything but the atomic
        // kick word, and every caller takes a fresh reference that it does not keep across translated code.
        unsafe { &mut *self.handle.memory.block() }
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
        }
        if let Some(apic_id) = flushes.unhalt {
            self.shared.world.unhalt(apic_id);
        }
        match outcome {
            Outcome::Done | Outcome::Halted | Outcome::NotAlone => Next::Events,
            Outcome::TripleFault => Next::Leave(Exit::TripleFault),
            Outcome::Unsupported(what) => Next::Leave(Exit::Internal(what)),
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

    /// Takes what is pending. Returns an exit when the VMM must decide.
    fn events(&mut self) -> Option<Exit> {
        loop {
            self.handle.memory.kick_word().store(0, Ordering::SeqCst);
            self.safe_point();
            if self.handle.stop.swap(false, Ordering::SeqCst) {
                return Some(Exit::Stopped);
            }
            self.drop_written();
            self.forgive_sites();
            self.stop_predicting();
            let block = self.block();
            let state = &mut block.state;
            let status = self.setup.lapic.status();
            if status.init || state.wait_for_sipi {
                if let Some(exit) = self.start_up(status) {
                    return Some(exit);
                }
                continue;
            }
            let parked = self.is_parked();
            if parked && status.nmi {
                // There is nothing yet that could take it.
                self.setup.lapic.acknowledge_nmi();
                continue;
            }
            if status.nmi && !state.nmi_blocked && !state.interrupt_shadow {
                self.setup.lapic.acknowledge_nmi();
                state.halted = false;
                if self.interp.deliver_nmi(state).is_err() {
                    return Some(Exit::TripleFault);
                }
                continue;
            }
            if status.interrupt && state.rflags & rflags::IF != 0 && !state.interrupt_shadow {
                if let Some(vector) = self.setup.lapic.acknowledge() {
                    state.halted = false;
                    if self.interp.deliver_interrupt(state, vector).is_err() {
                        return Some(Exit::TripleFault);
                    }
                }
                continue;
            }
            block.irq_waiting = u32::from(status.interrupt);
            if state.halted && self.pv_unhalt && self.handle.unhalted.swap(false, Ordering::SeqCst) {
                state.halted = false;
            }
            if !state.halted && !parked {
                return None;
            }
            let hopeless = state.rflags & rflags::IF == 0 && !status.nmi;
            if self.sleep(hopeless) {
                return Some(Exit::Stuck);
            }
        }
    }

    /// Does this vCPU wait in the parking code without having been called?
    fn is_parked(&self) -> bool {
        self.setup.index > 0
            && self.shared.parking.is_some_and(|parking| {
                self.block().state.rip == parking.code && parking.called(&self.shared.ram) != Some(self.setup.index)
            })
    }

    /// Sleeps until kicked. `hopeless`: no maskable interrupt can wake it. Returns whether all vCPUs have come to that.
    fn sleep(&mut self, hopeless: bool) -> bool {
        self.counters.halts += 1;
        let start = Instant::now();
        let (world, handle) = (&self.shared.world, &self.handle);
        world.park(handle);
        if hopeless {
            handle.hopeless.store(true, Ordering::SeqCst);
            world.check_stuck();
        }
        handle.wait();
        handle.hopeless.store(false, Ordering::SeqCst);
        let stuck = world.stuck.load(Ordering::SeqCst);
        self.resume();
        self.counters.halted_time += start.elapsed();
        stuck
    }

    /// INIT and start-up IPIs. Sleeps while this vCPU waits for the latter.
    fn start_up(&mut self, status: InterruptStatus) -> Option<Exit> {
        if status.init {
            self.setup.lapic.acknowledge_init();
            self.block().state = CpuState { wait_for_sipi: true, ..CpuState::default() };
            self.interp.flush();
            self.flush_all();
        } else if let Some(page) = status.sipi {
            self.setup.lapic.acknowledge_init();
            return Some(Exit::Internal(format!(
                "a start-up IPI to page {page:#x}: 16-bit code is not supported, the guest must use the ACPI wake-up mailbox"
            )));
        } else if self.sleep(true) {
            return Some(Exit::Stuck);
        }
        None
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
                    let Some(target) = target else { return corrupt("link") };
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
                    let (target, kind) = (slot.target, slot.kind);
                    self.leave(kind == LinkKind::Call);
                    block.state.rip = target;
                    let generation = self.generation;
                    let Some((next, global)) = self.find(target) else { return self.without_block(target) };
                    if generation == self.generation && next != STEP_ONLY {
                        let mut cache = self.shared.cache.lock().unwrap_or_else(PoisonError::into_inner);
                        if let Some(host) = cache.entry(next, kind) {
                            cache.note_slot(next, argument);
                            self.tlbs.fill_slot(block, argument, host, target, global);
                        }
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
                    let Some((next, global)) = self.find(target) else { return self.without_block(target) };
                    if next != STEP_ONLY {
                        let cache = self.shared.cache.lock().unwrap_or_else(PoisonError::into_inner);
                        if let Some(host) = cache.entry(next, LinkKind::Call) {
                            self.tlbs.fill_indirect(block, target, self.mode.user, host, global);
                        }
                    }
                    id = next;
                }
                reason::STEP | reason::POLL | reason::STALE | reason::PAUSE => {
                    let Some(site) = self.shared.sites.exits.get(argument) else { return corrupt("exit") };
                    self.leave(false);
                    block.state.rip = site.address;
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
                    block.state.rip = site.address;
                    return self.interpret(site.access.fpu);
                }
                reason::FAULT => {
                    let pc = block.fault_pc;
                    let Some((address, meta)) = self.shared.cache().locate(pc) else {
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
                    block.state.rip = address;
                    return self.interpret(true);
                }
                _ => return corrupt("reason"),
            }
        }
    }

    /// The guest spins: lets others have the core, who may hold what it waits for.
    fn spinning(&mut self) -> Next {
        self.block().pauses = PAUSES;
        self.shared.world.park(&self.handle);
        std::thread::yield_now();
        self.resume();
        Next::Events
    }

    /// Links a jump that must not be changed while others may run it.
    #[cold]
    fn link_alone(&mut self, link: u32, block: BlockId) {
        let generation = self.generation;
        self.exclusive(Cause::Link, |vcpu| {
            if vcpu.generation == generation {
                vcpu.shared.cache().link(link, block, true);
            }
        });
    }

    /// Goes back to before an indirect jump or return to an address that is not canonical, of which exit site `argument` tells: it faults
    /// at the instruction, before it moves the stack pointer (Intel SDM Vol. 2, JMP, RET).
    fn undo_jump(&mut self, argument: u32) -> bool {
        let Some(address) = self.shared.sites.exits.get(argument).map(|site| site.address) else { return false };
        let mut bytes = [0; 15];
        let length = (1..=bytes.len()).rev().find(|&n| self.read_virtual(address, &mut bytes[..n])).unwrap_or(0);
        let ins = iced_x86::Decoder::with_ip(64, &bytes[..length], address, iced_x86::DecoderOptions::NONE).decode();
        let state = &mut self.block().state;
        let moved = match ins.code() {
            iced_x86::Code::Retnq => -8_i64,
            iced_x86::Code::Retnq_imm16 => -8 - i64::from(ins.immediate16()),
            _ => 0,
        };
        state.gpr[4] = state.gpr[4].wrapping_add_signed(moved);
        state.rip = address;
        true
    }

    /// On at `address`, which has no block: a breakpoint, which [`Vcpu::run`] sees, or something for the interpreter.
    fn without_block(&mut self, address: u64) -> Next {
        if self.breakpoints.contains(&address) { Next::Run } else { self.interpret(true) }
    }

    /// The slow path of a memory check. Returns the delta, or tells to leave.
    fn slow_access(&mut self, address: u64, descriptor: u32) -> Option<u64> {
        self.counters.tlb_misses += 1;
        let site = self.shared.sites.accesses.get(descriptor)?;
        let (access, user) = (site.access, site.user);
        if let Some((number, position)) = access.site {
            let learned = &mut self.block().sites.as_flattened_mut()[usize::from(number)];
            if learned.wrong >= 0 {
                learned.wrong = -WRONG_PREDICTIONS;
                self.unpredictable.push((number, position));
                self.handle.memory.kick_word().store(1, Ordering::SeqCst);
            }
        }
        if (address & 0xfff) + u64::from(access.size) > 4096 || !paging::is_canonical(address) {
            return None;
        }
        let block = self.block();
        let kind = if access.write { Kind::Write } else { Kind::Read };
        let context = PagingContext::new(&block.state);
        let mapping = paging::walk(&self.shared.ram, &context, address, PageAccess::new(kind, user)).ok()?;
        let host = self.shared.ram.host_page(mapping.gpa)? as u64;
        if access.write && self.shared.ram.code_pages().test(mapping.gpa >> 12) {
            return None;
        }
        self.trace_fill(if access.write { "write" } else { "read" }, user, address & !0xfff, &mapping);
        Some(self.tlbs.fill(block, user, access.write, address, host, mapping.global, mapping.page_size))
    }

    fn trace_fill(&self, kind: &str, user: bool, page: u64, mapping: &paging::Mapping) {
        if let Some(trace) = &self.trace {
            trace.line(format_args!(
                "tlb cpu{} fill {kind} {} {page:#x} gpa {:#x} size {:#x}{}",
                self.setup.index,
                if user { "user" } else { "kernel" },
                mapping.gpa & !0xfff,
                mapping.page_size,
                if mapping.global { " global" } else { "" },
            ));
        }
    }

    /// Counters that are not of one vCPU.
    fn shared_counters(&self) -> Vec<(String, u64)> {
        let k = self.shared.cache().counters;
        let world = &self.shared.world;
        let mut out: Vec<(String, u64)> = [
            ("blocks.translated", k.blocks),
            ("blocks.copied", k.copied),
            ("instructions.translated", k.instructions),
            ("code-cache.bytes", k.code_bytes),
            ("blocks.invalidated", k.invalidated),
            ("code-cache.flushes", k.flushes),
            ("blocks.linked", k.links),
            ("sites.unpredictable", k.unpredictable),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into();
        if !world.alone() {
            let sections = CAUSES.iter().zip(&world.sections);
            out.extend(sections.map(|(name, n)| (format!("stops.{name}"), n.load(Ordering::Relaxed))));
            out.push(("stops.waiting-us".to_string(), world.waited.load(Ordering::Relaxed) / 1000));
        }
        out
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

#[repr(C)]
pub struct SlowResult {
    delta: u64,
    leave: u64,
}

/// Called by the stub of the same name on the monitor's stack.
///
/// # Safety
/// `vcpu` is the runtime pointer of the running vCPU's block.
pub unsafe extern "C" fn slow_access(vcpu: *mut BtVcpu, address: u64, descriptor: u32) -> SlowResult {
    // SAFETY: the vCPU is inside `enter`, on this thread, and holds no reference across it that is used meanwhile.
    let vcpu = unsafe { &mut *vcpu };
    match vcpu.slow_access(address, descriptor) {
        Some(delta) => SlowResult { delta, leave: 0 },
        None => {
            vcpu.block().exit_arg = descriptor;
            SlowResult { delta: 0, leave: 1 }
        }
    }
}

/// While this lives, the vCPU is running. It is parked even when a panic ends the run.
struct Running {
    shared: Arc<Shared>,
    handle: Arc<KickHandle>,
}

impl Running {
    fn new(vcpu: &mut BtVcpu) -> Self {
        vcpu.resume();
        Self { shared: vcpu.shared.clone(), handle: vcpu.handle.clone() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.world.park(&self.handle);
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Exit {
        let start = Instant::now();
        let _running = Running::new(self);
        let exit = self.run_guest();
        self.counters.run_time += start.elapsed();
        exit
    }

    fn state(&mut self) -> CpuState {
        self.block().state.clone()
    }

    fn set_state(&mut self, state: &CpuState) {
        self.shared.world.stuck.store(false, Ordering::SeqCst);
        self.handle.unhalted.store(false, Ordering::SeqCst);
        self.block().state = state.clone();
        self.interp.flush();
        if let Some(mode) = Self::current_mode(state) {
            self.mode = mode;
            self.block().user = u32::from(mode.user);
        }
        self.update_fast();
        self.flush_all();
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.handle.clone()
    }

    fn stop_handle(&self) -> Arc<dyn Kick> {
        Arc::new(StopHandle(self.handle.clone()))
    }

    fn step(&mut self) -> Exit {
        let _running = Running::new(self);
        self.prepare_thread();
        if let Some(exit) = self.events() {
            self.save_x87();
            return exit;
        }
        let next = self.interpret(true);
        self.save_x87();
        match next {
            Next::Leave(exit) => exit,
            _ => Exit::Debug,
        }
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints = addresses.to_vec();
        let changed = self.shared.cache().set_breakpoints(addresses);
        if changed {
            self.flush_cache();
        }
    }

    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.interp.debug_read(&self.block().state, address, data)
    }

    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool {
        self.interp.debug_write(&self.block().state, address, data)
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let c = &self.counters;
        let mut out: Vec<(String, u64)> = Vec::new();
        if self.setup.index == 0 {
            out.extend(self.shared_counters());
        }
        let own = [
            ("dispatches.link", c.exits[1]),
            ("dispatches.slot", c.exits[2]),
            ("dispatches.indirect", c.exits[3]),
            ("dispatches.step", c.exits[4]),
            ("dispatches.poll", c.exits[5]),
            ("dispatches.access", c.exits[6]),
            ("dispatches.fault", c.exits[7]),
            ("dispatches.stale", c.exits[8]),
            ("dispatches.pause", c.exits[9]),
            ("instructions.interpreted", c.steps),
            ("tlb.misses", c.tlb_misses),
            ("tlb.flushes.all", c.flush_all),
            ("tlb.flushes.non-global", c.flush_local),
            ("tlb.flushes.page", c.flush_page),
            ("halts", c.halts),
            ("time.running-us", c.run_time.as_micros() as u64),
            ("time.translator-us", c.translator_time.as_micros() as u64),
            ("time.halted-us", c.halted_time.as_micros() as u64),
        ];
        out.extend(own.map(|(name, value)| (name.to_string(), value)));
        out.extend(self.interp.deliveries());
        if let Some(lockstep) = &self.lockstep {
            let names = ["lockstep.compared", "lockstep.not-compared", "lockstep.impossible"];
            out.extend(names.iter().zip(lockstep.counters).map(|(name, value)| (name.to_string(), value)));
        }
        if let Some(histogram) = &self.step_histogram {
            let mut rows: Vec<_> = histogram.iter().map(|(code, &n)| (format!("interpreted.{code:?}"), n)).collect();
            rows.sort_by_key(|row| std::cmp::Reverse(row.1));
            rows.truncate(60);
            out.extend(rows);
        }
        out
    }
}

// SAFETY: the raw pointers inside lead to this vCPU's own memory; it is used by one thread at a time.
unsafe impl Send for BtVcpu {}
