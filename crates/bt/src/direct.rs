//! Direct execution: a program that computes for long runs as it is on the CPU, in a host process whose memory is what the program can reach
//! ([`runner`]). What is chatty stays in the translator: each system call, page fault or interrupt costs two switches between processes here,
//! and nothing there.
//!
//! * [`scans`]: what was found on pages of code.
//! * [`tables`]: the guest's page tables, as they stand.
//! * [`space`]: what the process has mapped.
//!
//! The process is one more TLB of the vCPU: it holds pages of one address space, and every flush of the software TLB tells it, too.

mod scans;
pub mod space;
mod tables;

use std::time::Duration;

use cpu::paging::PagingContext;
use cpu::{CpuState, cr0, cr4, rflags};
use memory::GuestRam;
use runner::{Runner, STUB};

use self::space::{Space, View};
use crate::sampler::STEADY_TIME;

/// Flushed pages that are kept in mind one by one.
const MAX_STALE: usize = 64;
/// Stops until the first judgement, and between judgements.
const GRACE: u32 = 96;
const JUDGED: u32 = 48;
/// Direct execution is given up if the process runs, on the average, for less than so many quarters of what a switch to it and back costs, that, and the
/// signal that stops it, included. Where it is not far from what the translator needs, going to and fro costs more than staying.
const MIN_RUN: u32 = 9;
/// The same where nearly all stops are system calls: faults pass, but a program that does nothing but call the kernel goes on like that.
const MIN_RUN_OF_CALLS: u32 = 14;
/// Direct execution is not begun if the program's entries into the kernel, at so many switches each, would have taken the time in which it made them.
const STOP_COST: u32 = 8;
/// A space that has been chosen stays so as long as it runs once in this time.
const KEPT: Duration = Duration::from_millis(20);
/// Shortest and longest time in the translator after direct execution has not paid.
const MIN_PAUSE: Duration = Duration::from_millis(8);
const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Spaces that are known not to pay.
const MAX_GIVEN_UP: usize = 32;

/// Counters of one vCPU's direct execution.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Times that it was chosen.
    pub chosen: u64,
    /// Times that it was given up, as it did not pay.
    pub given_up: u64,
    /// Address spaces that it was done for.
    pub spaces: u64,
    /// Stops by kind: calls for attention, faults that were met by mapping a page, system calls, other instructions, pages that must not be executed.
    pub called: u64,
    pub mapped: u64,
    pub system_calls: u64,
    pub instructions: u64,
    pub tells: u64,
    /// Changes of the process's memory: mapped and unmapped pages, those that belong together as one.
    pub changes: u64,
    /// Flushes after which everything was looked at again.
    pub looked_again: u64,
    /// In the process, switches included.
    pub time: Duration,
}

/// One vCPU's direct execution.
pub struct Direct {
    pub runner: Runner,
    pub space: Space,
    pub counters: Counters,
    /// The programs of one address space run directly, for now: CR3 without the bit that keeps translations.
    chosen: Option<u64>,
    /// When they last did.
    used: std::time::Instant,
    /// But first some code that must not: until the translator does not know where it leads.
    pub interlude: bool,
    /// The same, until the program jumps to where only a register or its stack says, however often it is interrupted.
    pub until_return: bool,
    /// They always do, for tests.
    pub at_once: bool,
    /// The address space that the process has pages of: CR3 without the bit that keeps translations.
    owner: Option<u64>,
    /// The guest flushed everything of it, or these pages.
    stale: bool,
    stale_pages: Vec<u64>,
    /// A page that the program is about to reach for: its page fault was the last thing that it did.
    pub awaited: Option<u64>,
    /// What switching to the process and back costs, at least.
    switch: Duration,
    /// Since the last judgement: stops, those of them that were system calls, and time in the process.
    stops: u32,
    calls: u32,
    until_judged: u32,
    spent: Duration,
    /// Changes that are made before the process runs next.
    changing: u32,
    /// Address spaces that it did not pay for: not before then, and how long that was.
    given_up: Vec<(u64, std::time::Instant, Duration)>,
    pins: Pins,
}

/// The address space that the state is in.
fn space_of(state: &CpuState) -> u64 {
    state.cr3 & !(1 << 63)
}

impl Direct {
    /// Starts the process. `None`: the host does not let it, or RAM is not shared.
    pub fn start(ram: &GuestRam) -> Option<Box<Self>> {
        Self::new(Runner::start(ram.file()?).ok()?)
    }

    /// With a process that another vCPU has used. `None`: it is of no use any more.
    pub fn inherit(mut runner: Runner) -> Option<Box<Self>> {
        runner.watch(&[]).ok()?.then_some(())?;
        runner.clear().ok()?;
        Self::new(runner)
    }

    fn new(mut runner: Runner) -> Option<Box<Self>> {
        let mut switch = Duration::MAX;
        for _ in 0..16 {
            let start = std::time::Instant::now();
            runner.follow().ok()?.then_some(())?;
            switch = switch.min(start.elapsed());
        }
        Some(Box::new(Self {
            runner,
            space: Space::default(),
            counters: Counters::default(),
            chosen: None,
            used: std::time::Instant::now(),
            interlude: false,
            until_return: false,
            at_once: false,
            owner: None,
            stale: false,
            stale_pages: Vec::new(),
            awaited: None,
            switch,
            stops: 0,
            calls: 0,
            until_judged: GRACE,
            spent: Duration::ZERO,
            changing: 0,
            given_up: Vec::new(),
            pins: Pins::new(),
        }))
    }

    /// Can a program in this state run directly at all?
    pub fn possible(state: &CpuState) -> bool {
        state.cpl() == 3
            && state.is_64bit_code()
            && state.rflags & rflags::IF != 0
            && state.cr0 & (cr0::TS | cr0::EM) == 0
            && state.cr4 & (cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE) == cr4::OSFXSR | cr4::OSXSAVE | cr4::FSGSBASE
            && state.cr4 & (cr4::LA57 | cr4::PKE) == 0
            && state.xcr0 == 7
            && state.tsc_offset == 0
            && state.cr4 & cr4::TSD == 0
            && state.dr[7] & 0xff == 0
            && !state.interrupt_shadow
            && Runner::takes(state)
    }

    /// Programs have computed for [`STEADY_TIME`] in the translator, and entered the kernel `entries` times: shall they run directly from now on?
    pub fn consider(&mut self, state: &CpuState, entries: u32) {
        // Each would have been a stop.
        if STEADY_TIME >= self.switch * entries * STOP_COST {
            self.choose(state, if self.owner == Some(space_of(state)) { JUDGED } else { GRACE });
        }
    }

    fn choose(&mut self, state: &CpuState, grace: u32) {
        let space = space_of(state);
        if self.chosen == Some(space) || !Self::possible(state) {
            return;
        }
        // Two that take turns would only undo each other's work.
        if self.chosen.is_some() && self.used.elapsed() < KEPT {
            return;
        }
        if self.given_up.iter().any(|&(other, until, _)| other == space && std::time::Instant::now() < until) {
            return;
        }
        self.chosen = Some(space);
        self.used = std::time::Instant::now();
        self.counters.chosen += 1;
        self.judge_after(grace);
        self.pins.pin(self.runner.pid());
    }

    /// Back to the translator.
    pub fn leave(&mut self) {
        if self.chosen.take().is_some() {
            self.pins.unpin();
        }
    }

    /// Do programs in this state run directly?
    #[inline]
    pub fn is_active(&self, state: &CpuState) -> bool {
        self.chosen == Some(space_of(state))
    }

    /// Must the program not go on by itself at `rip`, as it has passed a stop that guards what comes?
    #[inline]
    pub fn is_guarded_at(&self, rip: u64, state: &CpuState) -> bool {
        self.space.is_inside(rip) && self.owner == Some(space_of(state))
    }

    /// For tests: they do.
    pub fn choose_at_once(&mut self, state: &CpuState) {
        self.chosen = Self::possible(state).then(|| space_of(state));
    }

    /// The process has run for `time` and stopped. Gives up where translated code would be faster.
    pub fn account(&mut self, time: Duration, is_call: bool) {
        self.counters.time += time;
        // Making a change costs somewhat less than a switch.
        self.spent += time.saturating_sub(self.switch * std::mem::take(&mut self.changing) * 3 / 4);
        self.stops += 1;
        self.calls += u32::from(is_call);
        if self.stops < self.until_judged || self.at_once {
            return;
        }
        let mostly_calls = self.calls * 10 >= self.stops * 9;
        let least = if mostly_calls { MIN_RUN_OF_CALLS } else { MIN_RUN };
        if self.spent < self.switch * self.stops * least / 4 {
            self.counters.given_up += 1;
            self.pause(2);
        } else {
            if self.spent > self.switch * self.stops * MIN_RUN {
                let chosen = self.chosen;
                self.given_up.retain(|&(space, ..)| Some(space) != chosen);
            }
            self.pins.look(self.runner.pid());
        }
        self.judge_after(JUDGED);
    }

    /// The next judgement is of so many stops, from now on.
    fn judge_after(&mut self, stops: u32) {
        (self.stops, self.calls, self.spent, self.until_judged) = (0, 0, Duration::ZERO, stops);
    }

    /// The guest has flushed all translations, or those of its current address space.
    pub fn flush(&mut self) {
        self.stale = true;
    }

    /// The guest has gone to another address space; `flushed`: what was known of it is void.
    pub fn switched(&mut self, to: u16, flushed: bool) {
        if flushed && self.owner.is_some_and(|owner| owner as u16 & 0xfff == to) {
            self.stale = true;
        }
    }

    /// The guest has flushed the page of `address`.
    pub fn flush_page(&mut self, address: u64) {
        if self.stale_pages.len() == MAX_STALE {
            self.stale = true;
        } else if address < runner::END {
            self.stale_pages.push(address);
        }
    }

    /// Makes the process what the state's program is to find. `Ok(false)`: it cannot run here now.
    pub fn prepare(&mut self, ram: &GuestRam, state: &CpuState) -> Result<bool, String> {
        self.used = std::time::Instant::now();
        let view = View { ram, context: PagingContext::new(state) };
        let (stale, stale_pages) = (std::mem::take(&mut self.stale), std::mem::take(&mut self.stale_pages));
        if self.owner != Some(space_of(state)) || self.space.is_full() {
            self.owner = Some(space_of(state));
            self.counters.spaces += 1;
            self.clear()?;
        } else if stale {
            self.counters.looked_again += 1;
            self.space.look_again(&view);
        } else {
            for address in stale_pages {
                self.space.look_at(&view, address);
            }
        }
        if let Some(address) = self.awaited.take() {
            self.space.fault(&view, address, state.rip, address & !0xfff == state.rip & !0xfff);
        }
        // What the process has of its own must not hide a page of the program's.
        if !tables::is_free(ram, &view.context, STUB) {
            return Ok(false);
        }
        self.make_changes()
    }

    /// Puts the space's changes before what the program does next. `Ok(false)`: the host refuses.
    pub fn make_changes(&mut self) -> Result<bool, String> {
        let changes = self.space.take_changes();
        if let Some(addresses) = self.space.take_watched()
            && !self.runner.watch(&addresses)?
        {
            self.clear()?;
            return Ok(false);
        }
        self.counters.changes += changes.len() as u64;
        self.changing += changes.len() as u32;
        self.runner.change(&changes)?;
        Ok(true)
    }

    /// Takes all memory away from the process.
    pub fn clear(&mut self) -> Result<(), String> {
        self.space.clear();
        self.runner.clear()
    }

    /// Leaves, and does not come back soon.
    pub fn refuse(&mut self) {
        self.interlude = true;
        self.pause(u32::MAX);
    }

    /// Leaves for so many times as long as the last time.
    fn pause(&mut self, times: u32) {
        let Some(space) = self.chosen else { return };
        let last = self.given_up.iter().position(|&(other, ..)| other == space).map(|at| self.given_up.remove(at).2);
        let pause = last.unwrap_or(MIN_PAUSE / 2).saturating_mul(times).min(MAX_PAUSE);
        if self.given_up.len() == MAX_GIVEN_UP {
            self.given_up.remove(0);
        }
        self.given_up.push((space, std::time::Instant::now() + pause, pause));
        self.leave();
    }
}

/// The process and the vCPU's thread on one core of the host: handing over to a core that sleeps costs ten times as much.
struct Pins {
    /// Where the thread may run.
    all: libc::cpu_set_t,
    /// Since when it is bound to one core.
    bound: Option<std::time::Instant>,
    /// Where the process is bound to.
    process: Option<usize>,
}

/// The choice of the core is looked at again after this time.
const PINNED: Duration = Duration::from_millis(50);

impl Pins {
    fn new() -> Self {
        // SAFETY: a set of bits, which the call fills in.
        unsafe {
            let mut all: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut all);
            Self { all, bound: None, process: None }
        }
    }

    fn set(pid: i32, set: &libc::cpu_set_t) {
        // SAFETY: reads the set. Where the host refuses, everything is slower, but right.
        unsafe { libc::sched_setaffinity(pid, size_of::<libc::cpu_set_t>(), set) };
    }

    /// Binds both to the core that the thread is on.
    fn pin(&mut self, pid: i32) {
        // SAFETY: tells the number of the core; a set of bits.
        let (core, mut set) = unsafe { (libc::sched_getcpu().max(0) as usize, std::mem::zeroed::<libc::cpu_set_t>()) };
        if core >= 8 * size_of::<libc::cpu_set_t>() {
            return;
        }
        // SAFETY: the number is in range.
        unsafe { libc::CPU_SET(core, &mut set) };
        Self::set(0, &set);
        if self.process != Some(core) {
            Self::set(pid, &set);
            self.process = Some(core);
        }
        self.bound = Some(std::time::Instant::now());
    }

    /// From time to time, lets the host choose another core.
    fn look(&mut self, pid: i32) {
        if self.bound.is_some_and(|since| since.elapsed() > PINNED) {
            self.unpin();
            std::thread::yield_now();
            self.pin(pid);
        }
    }

    fn unpin(&mut self) {
        if self.bound.take().is_some() {
            Self::set(0, &self.all);
        }
    }
}
