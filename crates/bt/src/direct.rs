//! Direct execution: a program that computes for long runs as it is on the CPU, in a host process whose memory is what the program can reach
//! ([`runner`]). What is chatty stays in the translator: each system call, page fault or interrupt costs two switches between processes here,
//! and nothing there.
//!
//! * [`scans`]: what was found on pages of code.
//! * [`tables`]: the guest's page tables, as they stand.
//! * [`space`]: what the process has mapped.
//!
//! A process is one more TLB of the vCPU: it holds pages of one address space, and every flush of the software TLB tells it, too. There are several, for programs that
//! take turns.

mod scans;
pub mod space;
mod tables;

use std::sync::Arc;
use std::time::{Duration, Instant};

use cpu::paging::PagingContext;
use cpu::{CpuState, cr0, cr4, rflags};
use memory::GuestRam;
use runner::{Runner, STUB, Signaller};

use self::space::{Space, View};
use crate::sampler::STEADY_TIME;

/// Processes of a VM, for programs that take turns on a vCPU; one for each vCPU at least.
const PROCESSES: usize = 8;
/// Processes of a vCPU, at most.
const MOST_PROCESSES: usize = 4;
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
/// One that has not run for so long need not be chosen any more.
const FORGOTTEN: Duration = Duration::from_secs(1);
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
    /// Those with something in registers that guests are not shown: the program has found out what the host's CPU has.
    pub unshown: u64,
    /// Changes of the process's memory: mapped and unmapped pages, those that belong together as one.
    pub changes: u64,
    /// Flushes after which everything was looked at again.
    pub looked_again: u64,
    /// In the process, switches included.
    pub time: Duration,
}

/// What runs the programs of one address space: a process, and what is known of it.
pub struct Program {
    pub runner: Runner,
    pub space: Space,
    signaller: Arc<Signaller>,
    /// The address space that it is for: CR3 without the bit that keeps translations.
    owner: Option<u64>,
    /// The programs of that space run directly, for now.
    chosen: bool,
    /// When they last did.
    used: Instant,
    /// It has pages of another space.
    foreign: bool,
    /// The guest flushed everything of it, or these pages.
    stale: bool,
    stale_pages: Vec<u64>,
    /// A page that the program is about to reach for: its page fault was the last thing that it did.
    pub awaited: Option<u64>,
    /// Since the last judgement: stops, those of them that were system calls, and time in the process.
    stops: u32,
    calls: u32,
    until_judged: u32,
    spent: Duration,
    /// Changes that are made before the process runs next.
    changing: u32,
    /// The core of the host that it is bound to.
    core: Option<usize>,
}

impl Program {
    fn new(runner: Runner) -> Self {
        Self {
            signaller: runner.signaller(),
            runner,
            space: Space::default(),
            owner: None,
            chosen: false,
            used: Instant::now(),
            foreign: false,
            stale: false,
            stale_pages: Vec::new(),
            awaited: None,
            stops: 0,
            calls: 0,
            until_judged: GRACE,
            spent: Duration::ZERO,
            changing: 0,
            core: None,
        }
    }

    /// Is it for a space with this process-context identifier?
    fn is_of(&self, identifier: u16) -> bool {
        self.owner.is_some_and(|owner| owner as u16 & 0xfff == identifier)
    }

    /// The next judgement is of so many stops, from now on.
    fn judge_after(&mut self, stops: u32) {
        (self.stops, self.calls, self.spent, self.until_judged) = (0, 0, Duration::ZERO, stops);
    }

    fn flush_page(&mut self, address: u64) {
        if self.stale_pages.len() == MAX_STALE {
            self.stale = true;
        } else {
            self.stale_pages.push(address);
        }
    }

    /// The program is about to run, or has stopped.
    pub fn set_inside(&self, inside: bool) {
        self.signaller.set_inside(inside);
    }

    /// Puts the space's changes before what the program does next. Returns how many there are; `None`: the host refuses.
    fn make_changes(&mut self) -> Result<Option<usize>, String> {
        let changes = self.space.take_changes();
        if let Some(addresses) = self.space.take_watched()
            && !self.runner.watch(&addresses)?
        {
            self.clear()?;
            return Ok(None);
        }
        self.changing += changes.len() as u32;
        self.runner.change(&changes)?;
        Ok(Some(changes.len()))
    }

    /// Takes all memory away from the process.
    pub fn clear(&mut self) -> Result<(), String> {
        self.space.clear();
        self.runner.clear()
    }
}

/// One vCPU's direct execution.
pub struct Direct {
    programs: Vec<Program>,
    /// The one that ran last.
    last: usize,
    pub counters: Counters,
    /// But first some code that must not: until the translator does not know where it leads.
    pub interlude: bool,
    /// The same, until the program jumps to where only a register or its stack says, however often it is interrupted.
    pub until_return: bool,
    /// They always do, for tests.
    pub at_once: bool,
    /// What switching to a process and back costs, at least.
    switch: Duration,
    /// Address spaces that it did not pay for: not before then, and how long that was.
    given_up: Vec<(u64, Instant, Duration)>,
    pins: Pins,
}

/// The address space that the state is in.
fn space_of(state: &CpuState) -> u64 {
    state.cr3 & !(1 << 63)
}

/// How many processes each vCPU of a VM has.
pub fn processes(cpus: u32) -> usize {
    (PROCESSES / cpus.max(1) as usize).clamp(1, MOST_PROCESSES)
}

impl Direct {
    /// Starts `count` processes, or as many as the host lets us. `None`: not one, or RAM is not shared.
    pub fn start(ram: &GuestRam, count: usize) -> Option<Box<Self>> {
        let file = ram.file()?;
        Self::new((0..count).map_while(|_| Runner::start(file).ok()).collect())
    }

    /// With processes that another vCPU has used. `None`: they are of no use any more.
    pub fn inherit(mut runners: Vec<Runner>) -> Option<Box<Self>> {
        for runner in &mut runners {
            runner.watch(&[]).ok()?.then_some(())?;
            runner.clear().ok()?;
        }
        Self::new(runners)
    }

    fn new(mut runners: Vec<Runner>) -> Option<Box<Self>> {
        let mut switch = Duration::MAX;
        let first = runners.first_mut()?;
        for _ in 0..16 {
            let start = Instant::now();
            first.follow().ok()?.then_some(())?;
            switch = switch.min(start.elapsed());
        }
        Some(Box::new(Self {
            programs: runners.into_iter().map(Program::new).collect(),
            last: 0,
            counters: Counters::default(),
            interlude: false,
            until_return: false,
            at_once: false,
            switch,
            given_up: Vec::new(),
            pins: Pins::new(),
        }))
    }

    /// The processes, for a vCPU of after a reset.
    pub fn into_runners(self) -> impl Iterator<Item = Runner> {
        self.programs.into_iter().map(|program| program.runner)
    }

    /// Numbers of the processes.
    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.programs.iter().map(|program| program.runner.pid())
    }

    /// To call the programs from other threads.
    pub fn signallers(&self) -> Vec<Arc<Signaller>> {
        self.programs.iter().map(|program| program.signaller.clone()).collect()
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
        // Who has ended, or waits for long, need not bind the thread to a core.
        for program in &mut self.programs {
            program.chosen &= program.used.elapsed() < FORGOTTEN;
        }
        self.unpin();
        // Each would have been a stop.
        if STEADY_TIME >= self.switch * entries * STOP_COST {
            self.choose(state);
        }
    }

    fn choose(&mut self, state: &CpuState) {
        let space = space_of(state);
        if self.is_active(state) || !Self::possible(state) {
            return;
        }
        if self.given_up.iter().any(|&(other, until, _)| other == space && Instant::now() < until) {
            return;
        }
        let known = self.programs.iter().position(|program| program.owner == Some(space));
        // Else the one that has not run for longest; but those that take turns would only undo each other's work.
        let free = |program: &&Program| !program.chosen || program.used.elapsed() >= KEPT;
        let oldest = || {
            let indices = self.programs.iter().enumerate().filter(|(_, program)| free(program));
            indices.min_by_key(|(_, program)| (program.owner.is_some(), program.used)).map(|(index, _)| index)
        };
        let Some(index) = known.or_else(oldest) else { return };
        let program = &mut self.programs[index];
        if known.is_none() {
            program.foreign = true;
            program.owner = Some(space);
        }
        program.chosen = true;
        program.used = Instant::now();
        program.judge_after(if known.is_some() { JUDGED } else { GRACE });
        self.counters.chosen += 1;
        self.pins.pin();
    }

    fn of(&self, space: u64) -> Option<usize> {
        self.programs.iter().position(|program| program.chosen && program.owner == Some(space))
    }

    /// All go back to the translator.
    pub fn leave(&mut self) {
        for program in &mut self.programs {
            program.chosen = false;
        }
        self.unpin();
    }

    /// Lets the host choose the core if nobody runs directly.
    fn unpin(&mut self) {
        if !self.programs.iter().any(|program| program.chosen) {
            self.pins.unpin();
        }
    }

    /// Do programs in this state run directly?
    #[inline]
    pub fn is_active(&self, state: &CpuState) -> bool {
        self.of(space_of(state)).is_some()
    }

    /// Must the program not go on by itself at `rip`, as it has passed a stop that guards what comes?
    #[inline]
    pub fn is_guarded_at(&self, rip: u64, state: &CpuState) -> bool {
        let of_space = |program: &&Program| program.owner == Some(space_of(state)) && !program.foreign;
        self.programs.iter().find(of_space).is_some_and(|program| program.space.is_inside(rip))
    }

    /// For tests: they do.
    pub fn choose_at_once(&mut self, state: &CpuState) {
        self.leave();
        self.given_up.clear();
        self.choose(state);
    }

    /// The program that ran last, or is about to.
    pub fn program(&mut self) -> &mut Program {
        &mut self.programs[self.last]
    }

    /// The process has run for `time` and stopped. Gives up where translated code would be faster.
    pub fn account(&mut self, time: Duration, is_call: bool) {
        self.counters.time += time;
        let switch = self.switch;
        let at_once = self.at_once;
        let program = self.program();
        // Making a change costs somewhat less than a switch.
        program.spent += time.saturating_sub(switch * std::mem::take(&mut program.changing) * 3 / 4);
        program.stops += 1;
        program.calls += u32::from(is_call);
        if program.stops < program.until_judged || at_once {
            return;
        }
        let mostly_calls = program.calls * 10 >= program.stops * 9;
        let least = if mostly_calls { MIN_RUN_OF_CALLS } else { MIN_RUN };
        let (spent, stops, owner) = (program.spent, program.stops, program.owner);
        program.judge_after(JUDGED);
        if spent < switch * stops * least / 4 {
            self.counters.given_up += 1;
            self.pause(2);
        } else {
            if spent > switch * stops * MIN_RUN {
                self.given_up.retain(|&(space, ..)| Some(space) != owner);
            }
            self.pins.look();
        }
    }

    /// The guest has flushed all translations, or those of its current address space.
    pub fn flush(&mut self) {
        for program in &mut self.programs {
            program.stale = true;
        }
    }

    /// The guest has gone to another address space; `flushed`: what was known of it is void.
    pub fn switched(&mut self, to: u16, flushed: bool) {
        if flushed {
            for program in self.programs.iter_mut().filter(|program| program.is_of(to)) {
                program.stale = true;
            }
        }
    }

    /// The guest has flushed the page of `address`, of space `current` and where it is global.
    pub fn flush_page(&mut self, address: u64, current: u16) {
        if address < runner::END {
            for program in &mut self.programs {
                if program.is_of(current) || program.space.has_global() {
                    program.flush_page(address);
                }
            }
        }
    }

    /// The page holds translated code now: no program must write it.
    pub fn protect(&mut self, gpa: u64) {
        for program in &mut self.programs {
            program.space.protect(gpa);
        }
    }

    /// Makes the process what the state's program is to find. `Ok(false)`: it cannot run here now.
    pub fn prepare(&mut self, ram: &GuestRam, state: &CpuState) -> Result<bool, String> {
        let Some(index) = self.of(space_of(state)) else { return Ok(false) };
        self.last = index;
        let program = &mut self.programs[index];
        program.used = Instant::now();
        self.pins.bind(program.runner.pid(), &mut program.core);
        let view = View { ram, context: PagingContext::new(state) };
        let (stale, stale_pages) = (std::mem::take(&mut program.stale), std::mem::take(&mut program.stale_pages));
        if std::mem::take(&mut program.foreign) || program.space.is_full() {
            self.counters.spaces += 1;
            program.clear()?;
        } else if stale {
            self.counters.looked_again += 1;
            program.space.look_again(&view);
        } else {
            for address in stale_pages {
                program.space.look_at(&view, address);
            }
        }
        if let Some(address) = program.awaited.take() {
            program.space.fault(&view, address, state.rip, address & !0xfff == state.rip & !0xfff);
        }
        // What the process has of its own must not hide a page of the program's.
        if !tables::is_free(ram, &view.context, STUB) {
            return Ok(false);
        }
        self.make_changes()
    }

    /// Puts the space's changes before what the program does next. `Ok(false)`: the host refuses.
    pub fn make_changes(&mut self) -> Result<bool, String> {
        let made = self.program().make_changes()?;
        self.counters.changes += made.unwrap_or(0) as u64;
        Ok(made.is_some())
    }

    /// The program that ran last leaves, and does not come back soon.
    pub fn refuse(&mut self) {
        self.interlude = true;
        self.pause(u32::MAX);
    }

    /// It leaves for so many times as long as the last time.
    fn pause(&mut self, times: u32) {
        let program = self.program();
        if !std::mem::take(&mut program.chosen) {
            return;
        }
        let Some(space) = program.owner else { return };
        let last = self.given_up.iter().position(|&(other, ..)| other == space).map(|at| self.given_up.remove(at).2);
        let pause = last.unwrap_or(MIN_PAUSE / 2).saturating_mul(times).min(MAX_PAUSE);
        if self.given_up.len() == MAX_GIVEN_UP {
            self.given_up.remove(0);
        }
        self.given_up.push((space, Instant::now() + pause, pause));
        self.unpin();
    }
}

/// The processes and the vCPU's thread on one core of the host: handing over to a core that sleeps costs ten times as much.
struct Pins {
    /// Where the thread may run.
    all: libc::cpu_set_t,
    /// The core that the thread is bound to, and since when.
    bound: Option<(usize, Instant)>,
}

/// The choice of the core is looked at again after this time.
const PINNED: Duration = Duration::from_millis(50);

impl Pins {
    fn new() -> Self {
        // SAFETY: a set of bits, which the call fills in.
        unsafe {
            let mut all: libc::cpu_set_t = std::mem::zeroed();
            libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut all);
            Self { all, bound: None }
        }
    }

    fn set(pid: i32, set: &libc::cpu_set_t) {
        // SAFETY: reads the set. Where the host refuses, everything is slower, but right.
        unsafe { libc::sched_setaffinity(pid, size_of::<libc::cpu_set_t>(), set) };
    }

    /// Binds a thread to one core.
    fn set_core(pid: i32, core: usize) {
        // SAFETY: a set of bits; the number is in range.
        unsafe {
            let mut set = std::mem::zeroed::<libc::cpu_set_t>();
            libc::CPU_SET(core, &mut set);
            Self::set(pid, &set);
        }
    }

    /// Binds the vCPU's thread to the core that it is on.
    fn pin(&mut self) {
        if self.bound.is_some() {
            return;
        }
        // SAFETY: tells the number of the core.
        let core = unsafe { libc::sched_getcpu().max(0) as usize };
        if core < 8 * size_of::<libc::cpu_set_t>() {
            Self::set_core(0, core);
            self.bound = Some((core, Instant::now()));
        }
    }

    /// Binds a process to the thread's core. `is_on`: where it is bound to.
    fn bind(&self, pid: i32, is_on: &mut Option<usize>) {
        if let Some((core, _)) = self.bound
            && *is_on != Some(core)
        {
            Self::set_core(pid, core);
            *is_on = Some(core);
        }
    }

    /// From time to time, lets the host choose another core.
    fn look(&mut self) {
        if self.bound.is_some_and(|(_, since)| since.elapsed() > PINNED) {
            self.unpin();
            std::thread::yield_now();
            self.pin();
        }
    }

    fn unpin(&mut self) {
        if self.bound.take().is_some() {
            Self::set(0, &self.all);
        }
    }
}
