//! One case: a program, some start states, native against guest; and its reduction when they differ.

use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cpu::{FpState, Kick};
use iced_x86::{Decoder, DecoderOptions, Encoder, FlowControl, Formatter, Instruction, IntelFormatter};

use crate::generate::Generator;
use crate::guest::Guest;
use crate::layout::{BACKING, CONTEXT, EXIT, LAYOUTS, Layout, Memory, PAGE, SLOT, SLOTS};
use crate::native::Native;
use crate::program::{Placed, Program};
use crate::rng::{Rng, mix};
use crate::state::{Final, Role, Start, Stop, Strictness, Templates, differences, flag_names, memory_differences};

/// Everything a case needs besides its seed.
pub struct Bench {
    pub generator: Generator,
    pub native: Native,
    pub guests: Vec<Guest>,
    templates: Templates,
    encoder: Encoder,
    watch: Arc<Watch>,
    /// What the slots hold when no program has stored into them.
    shadow: Vec<u8>,
    pub counts: Counts,
}

/// What has been done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub cases: u64,
    pub runs: u64,
    /// Instructions that surely ran, by guest.
    pub executed: [u64; 6],
    pub faults: [u64; 32],
    /// Runs that did not end on the CPU, or strayed into a system call.
    pub useless: u64,
    /// Runs that differ for reasons in the table of tolerances, or strayed into another program's remains.
    pub incomparable: u64,
}

/// A case in all its parts.
#[derive(Clone)]
struct Case {
    program: Program,
    layout: Layout,
    user: bool,
    guest: usize,
    /// Offset in the slots.
    at: usize,
    starts: Vec<Start>,
    memory: Box<Memory>,
}

/// Sees that nothing runs for ever.
struct Watch {
    /// 0: nothing runs; else the number of the run, with the lowest bit telling native (1) or guest (0).
    run: AtomicU64,
    stop: AtomicBool,
}

/// What became of one run.
struct Ran {
    native: Final,
    guest: Final,
    differences: Option<Vec<String>>,
}

impl Bench {
    /// Runs something in each guest before the native side exists, so that all signal handlers of the engine and of the
    /// interpreter's native assist are there to be chained to.
    pub fn new(mut guests: Vec<Guest>) -> Self {
        let mut rng = Rng::new(0);
        let layout = LAYOUTS[1];
        for guest in &mut guests {
            let mut start = Start::random(&mut rng, layout, &[Role::Any; 16], false, layout.code, true);
            start.gpr[7] = layout.data + PAGE - 8;
            // movups xmm0, [rdi], across a page; jmp EXIT
            let mut code = vec![0x0f, 0x10, 0x07, 0xe9];
            code.extend_from_slice(&(EXIT.wrapping_sub(layout.code + 8) as i32).to_le_bytes());
            guest.write_code(0, &code);
            let end = guest.run(&start, true);
            assert_eq!(end.stop, Stop::End, "{}: at {:#x}", guest.name, end.rip);
            guest.write_code(0, &[0; 32]);
        }
        let native = Native::new();
        let watch = Arc::new(Watch { run: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let handles: Vec<Arc<dyn Kick>> = guests.iter().map(Guest::stop_handle).collect();
        let seen = watch.clone();
        // SAFETY: names the calling thread.
        let thread = unsafe { libc::pthread_self() } as u64;
        std::thread::spawn(move || {
            let (mut last, mut seen_before) = (0, 0);
            while !seen.stop.load(Ordering::SeqCst) {
                std::thread::sleep(std::time::Duration::from_millis(500));
                let run = seen.run.load(Ordering::SeqCst);
                seen_before = if run != 0 && run == last { seen_before + 1 } else { 0 };
                last = run;
                // Long enough for a busy host, too.
                if seen_before >= 12 {
                    if run & 1 == 1 {
                        // SAFETY: the thread lives as long as the bench, which ends us first.
                        unsafe { libc::pthread_kill(thread as libc::pthread_t, libc::SIGALRM) };
                    } else {
                        handles.iter().for_each(|h| h.kick());
                    }
                }
            }
        });
        Self {
            generator: Generator::new(),
            native,
            guests,
            templates: Templates::new(),
            encoder: Encoder::new(64),
            watch,
            shadow: vec![0; (SLOTS * SLOT) as usize],
            counts: Counts::default(),
        }
    }

    fn build(&mut self, seed: u64) -> Case {
        let mut rng = Rng::new(seed);
        let layout = rng.pick(&LAYOUTS);
        let user = rng.chance(70);
        // The interpreter, last, now and then.
        let last = self.guests.len() - 1;
        let guest = if rng.chance(10) { last } else { rng.below(last.max(1) as u64) as usize };
        let (program, roles, alias) = self.generator.program(&mut rng, layout, user);
        let slot = if rng.chance(50) { rng.below(4) } else { rng.below(SLOTS) };
        let offset = match rng.below(4) {
            0 => PAGE - 1 - rng.below(120),
            1 => rng.below(64),
            _ => rng.below(PAGE + 2000),
        };
        let at = (slot * SLOT + offset) as usize;
        let runs = 1 + rng.below(12);
        let starts =
            (0..runs).map(|_| Start::random(&mut rng, layout, &roles, alias, layout.code + at as u64, user)).collect();
        let mut memory: Box<Memory> = Box::new([[0; PAGE as usize]; BACKING]);
        self.templates.fill(&mut rng, &mut memory);
        Case { program, layout, user, guest, at, starts, memory }
    }

    /// Runs the case of this seed; describes the differences, if there are any.
    pub fn case(&mut self, seed: u64) -> Result<(), String> {
        let case = self.build(seed);
        self.counts.cases += 1;
        let Some(placed) = case.program.place(case.layout, case.layout.code + case.at as u64, &mut self.encoder) else {
            return Ok(());
        };
        if case.at + placed.bytes.len() > (SLOTS * SLOT) as usize {
            return Ok(());
        }
        if let Some((_, ran)) = self.run(&case, &placed, true) {
            let text = self.explain(seed, case);
            let first: Vec<String> = ran.differences.into_iter().flatten().collect();
            return Err(if text.ends_with("again") { format!("{text}: {}", first.join("; ")) } else { text });
        }
        Ok(())
    }

    /// Runs all start states; the number of the first one with differences, and what happened.
    fn run(&mut self, case: &Case, placed: &Placed, count: bool) -> Option<(usize, Ran)> {
        let result = self.run_starts(case, placed, count);
        // Later cases shall find the same code everywhere, whatever has been stored into it.
        if case.layout == LAYOUTS[0] {
            let slot = case.at / SLOT as usize;
            let near = slot.saturating_sub(1) * SLOT as usize..((slot + 2).min(SLOTS as usize)) * SLOT as usize;
            if self.native.code()[near.clone()] != self.shadow[near.clone()] {
                self.native.write_code(near.start, &self.shadow[near.clone()]);
                for guest in &mut self.guests {
                    guest.write_code(near.start, &self.shadow[near.clone()]);
                }
            }
        }
        result
    }

    /// Writes the code, in all guests: programs read code as data.
    fn write_code(&mut self, case: &Case, placed: &Placed) {
        self.shadow[case.at..case.at + placed.bytes.len()].copy_from_slice(&placed.bytes);
        self.native.write_code(case.at, &placed.bytes);
        for guest in &mut self.guests {
            guest.write_code(case.at, &placed.bytes);
        }
    }

    fn run_starts(&mut self, case: &Case, placed: &Placed, count: bool) -> Option<(usize, Ran)> {
        self.write_code(case, placed);
        *self.native.memory() = *case.memory;
        self.guests[case.guest].write_memory(&case.memory);
        for (i, start) in case.starts.iter().enumerate() {
            let number = (mix(self.counts.runs ^ (i as u64) << 48) | 2) & !1;
            self.counts.runs += u64::from(count);
            self.watch.run.store(number | 1, Ordering::SeqCst);
            let native = self.native.run(start);
            self.watch.run.store(0, Ordering::SeqCst);
            // The page of the test's own that only the CPU's side has.
            let own = matches!(native.stop, Stop::Fault { cr2, .. } if cr2 & !(PAGE - 1) == CONTEXT);
            if own || matches!(native.stop, Stop::Useless(_)) {
                self.counts.useless += u64::from(count);
                return None;
            }
            self.watch.run.store(number, Ordering::SeqCst);
            let guest = self.guests[case.guest].run(start, case.user);
            self.watch.run.store(0, Ordering::SeqCst);
            let strictness = Strictness {
                flags_at_faults: self.guests[case.guest].precise_flags,
                user: case.user,
                last: instruction(placed, native.rip.wrapping_sub(start.rip)),
            };
            let mut found = differences(&native, &guest, strictness);
            if found.as_ref().is_some_and(Vec::is_empty)
                && matches!(strictness.last.flow_control(), FlowControl::Call | FlowControl::IndirectCall)
                && matches!(native.stop, Stop::Fault { vector: 13, .. })
            {
                // Some CPUs have pushed the return address, some have not.
                self.guests[case.guest].write_memory(self.native.memory());
            }
            if let Some(list) = &mut found
                && !self.guests[case.guest].memory_equals(self.native.memory())
            {
                let mut memory: Box<Memory> = Box::new([[0; PAGE as usize]; BACKING]);
                self.guests[case.guest].read_memory(&mut memory);
                list.extend(memory_differences(self.native.memory(), &memory));
            }
            if strayed(case, placed, start, &native, &guest) && found.as_ref().is_some_and(|l| !l.is_empty()) {
                found = None;
            }
            match &found {
                None => {
                    self.counts.incomparable += u64::from(count);
                    return None;
                }
                Some(list) if !list.is_empty() => return Some((i, Ran { native, guest, differences: found })),
                Some(_) => {}
            }
            if count {
                let stopped_at = match native.stop {
                    Stop::Fault { vector, .. } => {
                        self.counts.faults[usize::from(vector & 31)] += 1;
                        Some(native.rip.wrapping_sub(start.rip) as usize)
                    }
                    _ => None,
                };
                let executed = case.program.executed(placed, stopped_at);
                self.counts.executed[case.guest] += executed;
            }
        }
        None
    }

    /// Does this variant of the case still differ?
    fn differs(&mut self, case: &Case) -> Option<(usize, Ran)> {
        let placed = case.program.place(case.layout, case.layout.code + case.at as u64, &mut self.encoder)?;
        self.run(case, &placed, false)
    }

    /// Makes the case as small as it gets, and describes it.
    fn explain(&mut self, seed: u64, mut case: Case) -> String {
        let Some((first, _)) = self.differs(&case) else {
            return format!("case {seed:#x}: differed once, but not again");
        };
        case.starts.truncate(first + 1);
        // One start state is enough, unless what ran before matters.
        let only = Case { starts: vec![case.starts[first].clone()], ..case.clone() };
        if self.differs(&only).is_some() {
            case = only;
        }
        let mut changed = true;
        while changed {
            changed = false;
            for i in (0..case.program.items.len()).rev() {
                if !case.program.items[i].alive {
                    continue;
                }
                case.program.items[i].alive = false;
                if self.differs(&case).is_some() {
                    changed = true;
                } else {
                    case.program.items[i].alive = true;
                }
            }
        }
        // Simpler values.
        let last = case.starts.len() - 1;
        for i in 0..16 {
            for value in [0, 1, case.starts[last].gpr[i] & 0xff] {
                let old = std::mem::replace(&mut case.starts[last].gpr[i], value);
                if value != old && self.differs(&case).is_some() {
                    break;
                }
                case.starts[last].gpr[i] = old;
            }
        }
        let old = std::mem::take(&mut case.starts[last].fp);
        if self.differs(&case).is_none() {
            case.starts[last].fp = old;
        }
        let old = std::mem::replace(&mut case.starts[last].rflags, if case.user { 0x202 } else { 2 });
        if self.differs(&case).is_none() {
            case.starts[last].rflags = old;
        }
        let again = (0..3).filter(|_| self.differs(&case).is_some()).count();
        match self.differs(&case) {
            Some((_, ran)) => self.describe(seed, &case, &ran, again),
            None => format!("case {seed:#x}: the smallest form does not differ any more"),
        }
    }

    fn describe(&mut self, seed: u64, case: &Case, ran: &Ran, again: usize) -> String {
        let mut out = String::new();
        let guest = &self.guests[case.guest];
        let _ = writeln!(
            out,
            "case {seed:#x} under {} at level {}, {} start state(s), differs in {again} of 3 repetitions:",
            guest.name,
            if case.user { 3 } else { 0 },
            case.starts.len()
        );
        let at = case.layout.code + case.at as u64;
        if let Some(placed) = case.program.place(case.layout, at, &mut self.encoder) {
            let mut formatter = IntelFormatter::new();
            let mut decoder = Decoder::with_ip(64, &placed.bytes, at, DecoderOptions::NONE);
            let end = placed.offsets[case.program.items.len()];
            while decoder.can_decode() && decoder.position() <= end {
                let start = decoder.position();
                let ins = decoder.decode();
                let mut text = String::new();
                formatter.format(&ins, &mut text);
                let bytes: String =
                    placed.bytes[start..decoder.position()].iter().map(|b| format!("{b:02x}")).collect();
                let _ = writeln!(out, "  {:#x}  {bytes:<24} {text}", ins.ip());
            }
        }
        let start = &case.starts[case.starts.len() - 1];
        let _ = writeln!(out, "  start: flags {} fs {:#x} gs {:#x}", flag_names(start.rflags), start.fs, start.gs);
        for (i, value) in start.gpr.iter().enumerate() {
            let name = crate::generate::gpr(i, 8);
            let _ = write!(out, "  {name:?}={value:#x}{}", if i % 4 == 3 { "\n" } else { "" });
        }
        if start.fp != FpState::default() {
            let b = &start.fp.bytes;
            let _ = writeln!(out, "  fcw, fsw, ftw: {:02x?}, mxcsr {:#x}", &b[0..5], start.fp.mxcsr());
            for i in 0..8 {
                let _ = writeln!(out, "  st/mm{i} {:#022x}", start.fp.get_u128(32 + 16 * i) & ((1 << 80) - 1));
            }
            for i in 0..16 {
                let _ = writeln!(
                    out,
                    "  ymm{i} {:032x}{:032x}",
                    start.fp.get_u128(576 + 16 * i),
                    start.fp.get_u128(160 + 16 * i)
                );
            }
        }
        let _ = writeln!(
            out,
            "  native: {:x?} at {:#x}; translated: {:x?} at {:#x}",
            ran.native.stop, ran.native.rip, ran.guest.stop, ran.guest.rip
        );
        for line in ran.differences.iter().flatten() {
            let _ = writeln!(out, "  * {line}");
        }
        out
    }
}

/// Has the program left the ground on which it can be compared? By a wild jump, perhaps into what other programs left (that may show
/// the level or other engines' flags), or by a repeated string instruction that overwrites code, perhaps itself (the CPU notices
/// between elements, the engine between pieces).
fn strayed(case: &Case, placed: &Placed, start: &Start, native: &Final, guest: &Final) -> bool {
    let code = case.layout.code..case.layout.code + SLOTS * SLOT;
    let own = start.rip..start.rip + placed.bytes.len() as u64;
    let outside = native.stop != Stop::End && !own.contains(&native.rip);
    // The code of every layout is the same memory.
    let stores = LAYOUTS.iter().any(|l| (l.code - 2 * PAGE..l.code + SLOTS * SLOT + 2 * PAGE).contains(&native.gpr[7]))
        && case.program.items.iter().any(|i| i.alive && i.ins.is_string_instruction());
    // Code that it changed may hold a privileged instruction, which only the CPU refuses at level 0.
    let privileged = !case.user
        && own.contains(&native.rip)
        && matches!(native.stop, Stop::Fault { vector: 13, .. })
        && instruction(placed, native.rip - start.rip).is_privileged();
    // A return may lead anywhere, and back to the end by way of a PUSHF that others left: it shows IF, which only the CPU's side has set.
    let returns = !case.user
        && native.stop == Stop::End
        && case.program.items.iter().any(|i| i.alive && i.ins.mnemonic() == iced_x86::Mnemonic::Ret);
    // What others left may be a near branch with an operand size prefix: AMD's CPUs cut its target to 16 bits, Intel's and the engine do not.
    let short = native.rip < 1 << 16
        && LAYOUTS.iter().any(|l| (l.code..l.code + SLOTS * SLOT).contains(&guest.rip))
        && !own.contains(&guest.rip);
    (outside && (code.contains(&native.rip) || short || !case.user)) || stores || privileged || returns
}

/// The instruction at this offset.
fn instruction(placed: &Placed, offset: u64) -> Instruction {
    let bytes = placed.bytes.get(offset as usize..).unwrap_or_default();
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.watch.stop.store(true, Ordering::SeqCst);
    }
}
