//! `--lockstep`: every block also by the interpreter, from the same start; the first difference stops the VM.
//!
//! Before a block is entered, the interpreter runs ahead from a copy of the state, as far as the block can lead: to the first jump or call that
//! is taken (returns lead back into the caller's block), or to what the translator leaves to the interpreter anyway. Each of its steps is kept: registers, and what it wrote to memory,
//! which is taken back. Then the translated block runs, unlinked, so that it comes back at its end. It must have arrived at
//! one of those steps, with the same registers, flags, x87 to AVX state and memory.
//!
//! Side effects happen once: sensitive instructions, devices and faults end the run ahead before they do anything. RDTSC goes to the
//! interpreter. A block that has agreed [`ALWAYS`] times is compared only now and then, so that kernels boot in minutes.
//!
//! Not seen: memory that the translated block writes and the interpreter does not. Memory that a device changes at the
//! same moment can show as a difference; such a report names the address.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use cpu::gpr::{RCX, RDI, RSI};
use cpu::paging::{self, Access as PageAccess, Kind, PagingContext};
use cpu::{CpuState, Exit, FpState, Segment, cr4, rflags};
use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, InstructionInfoFactory, IntelFormatter, Mnemonic,
    OpAccess, Register,
};
use interp::{Hooks, Outcome, TlbFlush};

use super::{BtVcpu, Next, corrupt, reason};
use crate::analyze::{Analyzer, Class, Mode};
use crate::cache::{FastMap, STEP_ONLY};
use crate::emit::LinkKind;

/// So many times each block is compared; from then on once in [`SAMPLE`].
const ALWAYS: u32 = 32;
const SAMPLE: u32 = 512;
/// Steps ahead; no block is longer.
const AHEAD: usize = 64;

/// One write of the interpreter's.
struct Write {
    host: *mut u8,
    address: u64,
    /// The step that made it.
    step: usize,
    old: Vec<u8>,
    new: Vec<u8>,
}

/// Where the interpreter came to.
struct Ahead {
    /// The state before the first step, and after each.
    states: Vec<CpuState>,
    writes: Vec<Write>,
    /// Page-table entries whose dirty bit the interpreter set.
    dirtied: Vec<u64>,
    /// The translator may go further than this.
    open: bool,
}

/// What a vCPU in lockstep keeps.
pub struct Lockstep {
    analyzer: Analyzer,
    factory: InstructionInfoFactory,
    seen: FastMap<u64, u32>,
    /// Blocks compared, blocks run without, and blocks that could not be compared.
    pub counters: [u64; 3],
}

impl Default for Lockstep {
    fn default() -> Self {
        Self {
            analyzer: Analyzer::new(true),
            factory: InstructionInfoFactory::new(),
            seen: FastMap::default(),
            counters: [0; 3],
        }
    }
}

impl Lockstep {
    /// Shall the block at `address` be compared this time?
    fn wanted(&mut self, address: u64) -> bool {
        let count = self.seen.entry(address).or_default();
        *count = count.wrapping_add(1);
        *count <= ALWAYS || count.is_multiple_of(SAMPLE)
    }
}

/// The run ahead asks for nothing.
struct Quiet;

impl Hooks for Quiet {
    fn tlb_flush(&mut self, _what: TlbFlush) {}
}

fn register(state: &CpuState, register: Register, next: u64) -> Option<u64> {
    if register.is_segment_register() {
        return Some(match register {
            Register::FS => state.segments[4].base,
            Register::GS => state.segments[5].base,
            _ => 0,
        });
    }
    if register == Register::RIP || register == Register::EIP {
        return Some(next);
    }
    if !register.is_gpr() {
        return None;
    }
    let value = *state.gpr.get(register.full_register().number())?;
    match register.size() {
        8 => Some(value),
        4 => Some(value & 0xffff_ffff),
        2 => Some(value & 0xffff),
        _ => None,
    }
}

/// Why the run ahead ends before an instruction.
enum Stop {
    /// The translator stops there, too.
    Both,
    /// It may go on.
    Open,
}

impl BtVcpu {
    fn lockstep(&mut self) -> &mut Lockstep {
        self.lockstep.get_or_insert_default()
    }

    /// As [`BtVcpu::dispatch`], for one block, compared.
    pub(super) fn dispatch_lockstep(&mut self, enter: extern "C" fn(u64)) -> Next {
        let Some(mut mode) = Self::current_mode(&self.block().state) else { return self.interpret(true) };
        mode.no_tsc = true;
        self.set_mode(mode);
        let start = self.block().state.rip;
        let epoch = self.shared.epoch.load(Ordering::Acquire);
        let Some((mut id, _)) = self.find(start) else { return self.without_block(start) };
        loop {
            if id == STEP_ONLY {
                return self.interpret(true);
            }
            let Some(entry) = self.shared.cache().entry(id, LinkKind::Backward) else {
                return Next::Leave(Exit::Internal("a block without an entry".into()));
            };
            let rip = self.block().state.rip;
            let ahead = self.lockstep().wanted(rip).then(|| self.run_ahead());
            self.enter(entry, enter);
            let block = self.block();
            let (why, argument) = (block.exit_reason, block.exit_arg);
            let user = block.user != 0;
            if user != self.mode.user {
                self.mode.user = user;
                self.mode.df = false;
            }
            self.counters.exits[why as usize & 15] += 1;
            let mut plain = None;
            let mut step = None;
            match why {
                reason::LINK => {
                    let cache = self.shared.cache();
                    let (Some(target), Some(kind)) = (cache.link_target(argument), cache.link_kind(argument)) else {
                        return corrupt("link");
                    };
                    drop(cache);
                    let target = self.address(target);
                    self.leave(kind == LinkKind::Call);
                    block.state.rip = target;
                    plain = (kind == LinkKind::Plain).then_some(target);
                }
                reason::SLOT => {
                    let slot = self.shared.sites.slots.get(argument).map(|s| (s.target, s.kind));
                    let Some((target, kind)) = slot else { return corrupt("slot") };
                    let target = self.address(target);
                    self.leave(kind == LinkKind::Call);
                    block.state.rip = target;
                }
                reason::INDIRECT => {
                    self.leave(true);
                    block.state.rip = block.exit_target;
                    if !cpu::paging::is_canonical(block.exit_target) {
                        if !self.undo_jump(argument) {
                            return corrupt("exit");
                        }
                        step = Some(false);
                    }
                }
                reason::STEP | reason::POLL | reason::STALE => {
                    let site = self.shared.sites.exits.get(argument);
                    let Some((address, fpu)) = site.map(|site| (self.address(site.place), site.fpu)) else {
                        return corrupt("exit");
                    };
                    self.leave(false);
                    block.state.rip = address;
                    step = (why == reason::STEP).then_some(fpu);
                }
                reason::ACCESS => {
                    let site = self.shared.sites.accesses.get(argument);
                    let Some((access, address)) = site.map(|site| (site.access, self.address(site.place))) else {
                        return corrupt("access");
                    };
                    self.leave(access.flags_saved);
                    block.state.rip = address;
                    step = Some(access.fpu);
                }
                reason::FAULT => {
                    let pc = block.fault_pc;
                    let Some((place, meta)) = self.shared.cache().locate(pc) else {
                        return corrupt("place of a host signal");
                    };
                    self.leave(meta.flags_saved);
                    for (i, &register) in meta.borrowed.iter().enumerate() {
                        if register != 0xff {
                            block.state.gpr[usize::from(register)] = block.borrowed[i];
                        }
                    }
                    block.state.rip = self.address(place);
                    step = Some(true);
                }
                _ => return corrupt("reason"),
            }
            if let Some(ahead) = ahead {
                self.save_x87();
                let faulted = why == reason::FAULT;
                let why = if step.is_some() { reason::STEP } else { why };
                if let Err(report) = self.compare(&ahead, why, faulted) {
                    if !self.code_changed(epoch) {
                        return Next::Leave(Exit::Internal(report));
                    }
                    self.lockstep().counters[1] += 1;
                }
            } else {
                self.lockstep().counters[1] += 1;
            }
            if let Some(fpu) = step {
                return self.interpret(fpu);
            }
            match plain {
                Some(target) => {
                    let mode = Mode { plain: true, ..self.mode };
                    match self.find_mode(target, mode) {
                        Some((next, _)) => id = next,
                        None => return self.without_block(target),
                    }
                }
                None if why == reason::POLL => return Next::Events,
                None => return Next::Run,
            }
        }
    }

    /// Has a device written code since `epoch`, or are there translations of written code that this vCPU has yet to
    /// drop? It tells after it has written: first the epoch, then what was hit.
    #[cold]
    fn code_changed(&self, epoch: u64) -> bool {
        // Its thread may have lost its core between any two of these.
        (0..50).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            self.shared.has_hits.load(Ordering::SeqCst) || self.shared.epoch.load(Ordering::Acquire) != epoch
        })
    }

    /// Runs the interpreter ahead and takes back what it wrote. The vCPU's state stays as it is.
    fn run_ahead(&mut self) -> Ahead {
        self.save_x87();
        let mut ahead =
            Ahead { states: vec![self.block().state.clone()], writes: Vec::new(), dirtied: Vec::new(), open: true };
        let mode = self.mode;
        while ahead.states.len() <= AHEAD {
            let Some(state) = ahead.states.last() else { break };
            let mut state = state.clone();
            let Some(ins) = self.instruction_at(&state) else {
                ahead.open = false;
                break;
            };
            let at = ahead.writes.len();
            let step = ahead.states.len() - 1;
            if let Err(stop) = self.note_operands(&state, &ins, mode, step, &mut ahead) {
                ahead.writes.truncate(at);
                ahead.open = matches!(stop, Stop::Open);
                break;
            }
            // If it raises an exception, the frame comes onto the kernel's stack, over what is still in use.
            let below = (state.gpr[4] & !15).wrapping_sub(48);
            let mut frame = [0; 48];
            let saved = !mode.user && self.interp.debug_read(&state, below, &mut frame);
            let exceptions = self.interp.exceptions();
            let mut outcome = self.interp.step(&mut state, &mut Quiet);
            // A long string instruction takes several steps.
            while outcome == Outcome::Done && state.rip == ins.ip() && ins.has_rep_prefix() {
                outcome = self.interp.step(&mut state, &mut Quiet);
            }
            for write in ahead.writes.iter_mut().skip(at) {
                // SAFETY: as in `note_operands`.
                unsafe { std::ptr::copy_nonoverlapping(write.host, write.new.as_mut_ptr(), write.new.len()) };
            }
            if outcome != Outcome::Done || self.interp.exceptions() != exceptions {
                // An exception: the translator leaves it to the interpreter.
                if let (true, Some(before)) = (saved, ahead.states.last()) {
                    self.interp.debug_write(before, below, &frame);
                }
                for write in ahead.writes.drain(at..) {
                    restore(&write);
                }
                ahead.open = false;
                break;
            }
            // A return goes on behind its call, in the caller's block.
            let taken = state.rip != ins.next_ip() && ins.flow_control() != FlowControl::Return;
            ahead.states.push(state);
            if taken {
                ahead.open = false;
                break;
            }
        }
        for write in ahead.writes.iter().rev() {
            restore(write);
        }
        if !ahead.dirtied.is_empty() {
            // The guest must not see a dirty page before it is written; accessed bits may be early.
            for &leaf in &ahead.dirtied {
                if let Some(entry) = self.shared.ram.atomic_u64(leaf) {
                    entry.fetch_and(!paging::pte::D, Ordering::AcqRel);
                }
            }
            self.interp.flush();
        }
        // The native assist may have used the x87 registers.
        self.load_x87();
        ahead
    }

    fn instruction_at(&mut self, state: &CpuState) -> Option<Instruction> {
        let mut bytes = [0; 15];
        let here = (4096 - (state.rip & 0xfff)).min(15) as usize;
        if !self.interp.debug_read(state, state.rip, &mut bytes[..here]) {
            return None;
        }
        let length = if self.interp.debug_read(state, state.rip, &mut bytes) { 15 } else { here };
        let ins = Decoder::with_ip(64, &bytes[..length], state.rip, DecoderOptions::NONE).decode();
        (!ins.is_invalid()).then_some(ins)
    }

    /// Notes the memory that the instruction will write. `Err`: it must not run ahead.
    fn note_operands(
        &mut self,
        state: &CpuState,
        ins: &Instruction,
        mode: Mode,
        step: usize,
        ahead: &mut Ahead,
    ) -> Result<(), Stop> {
        let lockstep = self.lockstep.get_or_insert_default();
        let class = lockstep.analyzer.class(ins, mode);
        match class {
            Class::Step => return Err(Stop::Both),
            _ if matches!(ins.mnemonic(), Mnemonic::Rdrand | Mnemonic::Rdseed) => return Err(Stop::Open),
            // No access, whatever the operand.
            Class::Skip | Class::Lea => return Ok(()),
            _ => {}
        }
        let operands: Vec<(u64, u64, bool)> = if let Class::BitTest { write } = class {
            let size = ins.memory_size().size() as u64;
            let offset = register(state, ins.op1_register(), 0).ok_or(Stop::Open)?;
            let offset = if size == 4 { i64::from(offset as i32) } else { offset as i64 };
            let base = ins.virtual_address(0, 0, |r, _, _| register(state, r, ins.next_ip())).ok_or(Stop::Open)?;
            let unit = offset >> if size == 8 { 6 } else { 5 };
            vec![(base.wrapping_add_signed(unit.wrapping_mul(size as i64)), size, write)]
        } else if let Class::String { movs, rep, size } = class {
            let count = if rep { state.gpr[RCX] } else { 1 };
            if count > 4096 {
                return Err(Stop::Open);
            }
            // DF is clear, and there is no segment base.
            let bytes = count * u64::from(size);
            let across = |pointer: usize| (state.gpr[pointer] & 0xfff) + bytes > 4096;
            if rep && (across(RDI) || movs && across(RSI)) {
                // It may come back with some pages done.
                return Err(Stop::Open);
            }
            let mut operands = vec![(state.gpr[RDI], bytes, true)];
            if movs {
                operands.push((state.gpr[RSI], bytes, false));
            }
            operands
        } else {
            let mut operands = Vec::new();
            for memory in lockstep.factory.info(ins).used_memory() {
                let write = match memory.access() {
                    OpAccess::None | OpAccess::NoMemAccess => continue,
                    OpAccess::Read | OpAccess::CondRead => false,
                    _ => true,
                };
                let size = memory.memory_size().size() as u64;
                let address = memory.virtual_address(0, |r, _, _| register(state, r, ins.next_ip()));
                match address {
                    Some(address) if size > 0 => operands.push((address, size, write)),
                    _ => return Err(Stop::Open),
                }
            }
            operands
        };
        let context = PagingContext::new(state);
        debug_assert!(context.cr4 & cr4::PAE != 0);
        for (address, size, write) in operands {
            let (mut address, mut left) = (address, size);
            while left > 0 {
                let here = left.min(4096 - (address & 0xfff));
                let kind = if write { Kind::Write } else { Kind::Read };
                let mapping = paging::is_canonical(address)
                    .then(|| paging::probe(&self.shared.ram, &context, address, PageAccess::new(kind, mode.user)).ok())
                    .flatten()
                    .ok_or(Stop::Both)?;
                let page = self.shared.ram.host_page(mapping.gpa).ok_or(Stop::Both)?;
                if write {
                    if self.shared.ram.code_pages().test(mapping.gpa >> 12) {
                        return Err(Stop::Both);
                    }
                    let host = page.wrapping_add((mapping.gpa & 0xfff) as usize);
                    let mut old = vec![0; here as usize];
                    // SAFETY: `here` bytes are left in the mapped page of RAM, which lives as long as `self.shared`.
                    unsafe { std::ptr::copy_nonoverlapping(host, old.as_mut_ptr(), old.len()) };
                    if let (false, Some(leaf)) = (mapping.dirty, mapping.leaf) {
                        ahead.dirtied.push(leaf);
                    }
                    ahead.writes.push(Write { host, address, step, new: old.clone(), old });
                }
                address = address.wrapping_add(here);
                left -= here;
            }
        }
        Ok(())
    }

    /// Is the state that the block left one of those the interpreter went through? Where it `faulted`, an instruction that raises an
    /// unmasked SIMD exception has set MXCSR's flags already.
    fn compare(&mut self, ahead: &Ahead, why: u32, faulted: bool) -> Result<(), String> {
        let state = &self.block().state;
        // Nothing done yet, or at least one instruction.
        let still = matches!(why, reason::STEP | reason::ACCESS | reason::FAULT | reason::POLL | reason::STALE)
            || why == reason::LINK;
        let mut best: Option<(usize, Vec<Difference>)> = None;
        for (number, expected) in ahead.states.iter().enumerate() {
            if expected.rip != state.rip || (number == 0 && !still) {
                continue;
            }
            let mut found = differences(expected, state);
            if faulted && (expected.fp.mxcsr() ^ state.fp.mxcsr()) & !0x3f == 0 {
                found.retain(|difference| difference.what != "mxcsr");
            }
            memory_differences(ahead, number, &mut found);
            if found.is_empty() {
                self.lockstep().counters[0] += 1;
                return Ok(());
            }
            if best.as_ref().is_none_or(|best| found.len() <= best.1.len()) {
                best = Some((number, found));
            }
        }
        let Some((number, found)) = best.filter(|_| !ahead.open) else {
            if ahead.open {
                self.lockstep().counters[2] += 1;
                return Ok(());
            }
            let to = state.rip;
            let went = Difference { what: "rip".into(), values: format!("the block went to {to:#x}"), step: None };
            return Err(self.report(ahead, ahead.states.len() - 1, &[went]));
        };
        Err(self.report(ahead, number, &found))
    }

    fn report(&mut self, ahead: &Ahead, number: usize, found: &[Difference]) -> String {
        let mut text = "lockstep: the translator and the interpreter differ".to_string();
        let mut formatter = IntelFormatter::new();
        for state in ahead.states.iter().take(number.max(1)) {
            let Some(ins) = self.instruction_at(state) else { continue };
            let mut line = String::new();
            formatter.format(&ins, &mut line);
            let _ = write!(text, "\n  {:#018x}  {line}", state.rip);
        }
        text.push_str("\n  (interpreter, then translator)");
        for Difference { what, values, step } in found {
            let _ = write!(text, "\n  {what}: {values}");
            match step.or_else(|| last_change(ahead, number, what)).and_then(|step| ahead.states.get(step)) {
                Some(state) => {
                    let _ = write!(text, "; set at {:#x}", state.rip);
                }
                None if what != "rip" => text.push_str("; not to change here"),
                None => {}
            }
        }
        for (name, state) in [("before", ahead.states.first()), ("interpreter", ahead.states.get(number))] {
            if let Some(state) = state {
                let _ = write!(text, "\n  {name}: {}", registers(state));
            }
        }
        let _ = write!(text, "\n  translator: {}", registers(&self.block().state));
        text
    }
}

fn restore(write: &Write) {
    // SAFETY: `host` has room for `old`, see `note_operands`; RAM stays mapped.
    unsafe { std::ptr::copy_nonoverlapping(write.old.as_ptr(), write.host, write.old.len()) };
}

const NAMES: [&str; 16] =
    ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"];

fn registers(state: &CpuState) -> String {
    let mut text = format!("rip={:x} rflags={:x} cpl={}", state.rip, state.rflags, state.cpl());
    for (name, value) in NAMES.iter().zip(state.gpr) {
        let _ = write!(text, " {name}={value:x}");
    }
    text
}

/// One thing that differs.
struct Difference {
    what: String,
    /// The interpreter's value, the translator's.
    values: String,
    /// The step that sets it; `None` if that must be looked for.
    step: Option<usize>,
}

/// The last of the first `steps` steps that changed `what`, by the interpreter.
fn last_change(ahead: &Ahead, steps: usize, what: &str) -> Option<usize> {
    (0..steps).rev().find(|&step| match (ahead.states.get(step), ahead.states.get(step + 1)) {
        (Some(before), Some(after)) => differences(before, after).iter().any(|change| change.what == what),
        _ => false,
    })
}

/// The fields that differ.
fn differences(expected: &CpuState, got: &CpuState) -> Vec<Difference> {
    let mut found = Vec::new();
    let mut add = |what: String, values: String| found.push(Difference { what, values, step: None });
    let mut field = |name: &str, a: u64, b: u64| {
        if a != b {
            add(name.to_string(), format!("{a:#x}, {b:#x}"));
        }
    };
    for ((name, a), b) in NAMES.iter().zip(expected.gpr).zip(got.gpr) {
        field(name, a, b);
    }
    // Entering a block clears RF, which says nothing without breakpoints.
    let flags = |state: &CpuState| state.rflags & !rflags::RF;
    field("rflags", flags(expected), flags(got));
    for (i, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
        let (a, b): (Segment, Segment) = (expected.segments[i], got.segments[i]);
        field(name, a.selector.into(), b.selector.into());
        field(&format!("{name} base"), a.base, b.base);
        field(&format!("{name} attributes"), a.attributes.into(), b.attributes.into());
    }
    field("kernel gs base", expected.kernel_gs_base, got.kernel_gs_base);
    field("cr0", expected.cr0, got.cr0);
    field("cr2", expected.cr2, got.cr2);
    field("cr3", expected.cr3, got.cr3);
    field("cr4", expected.cr4, got.cr4);
    field("nmi blocked", expected.nmi_blocked.into(), got.nmi_blocked.into());
    let word = |fp: &FpState, at: usize| fp.get_u128(at);
    field(
        "fcw, fsw, ftw",
        (word(&expected.fp, 0) & 0xffff_ffff_ffff) as u64,
        (word(&got.fp, 0) & 0xffff_ffff_ffff) as u64,
    );
    field("mxcsr", expected.fp.mxcsr().into(), got.fp.mxcsr().into());
    let mut wide = |name: String, at: usize, mask: u128| {
        let (a, b) = (word(&expected.fp, at) & mask, word(&got.fp, at) & mask);
        if a != b {
            add(name, format!("{a:#x}, {b:#x}"));
        }
    };
    for i in 0..8 {
        wide(format!("st{i}"), FpState::ST + 16 * i, (1 << 80) - 1);
    }
    for i in 0..16 {
        wide(format!("xmm{i}"), FpState::XMM + 16 * i, u128::MAX);
        wide(format!("ymm{i} high"), FpState::YMM_HIGH + 16 * i, u128::MAX);
    }
    found
}

/// Compares what is in memory with what the first `steps` steps left there.
fn memory_differences(ahead: &Ahead, steps: usize, found: &mut Vec<Difference>) {
    let mut bytes: BTreeMap<usize, (u64, u8, Option<usize>)> = BTreeMap::new();
    for write in &ahead.writes {
        for (i, (&old, &new)) in write.old.iter().zip(&write.new).enumerate() {
            let (at, address) = (write.host as usize + i, write.address.wrapping_add(i as u64));
            if write.step < steps {
                bytes.insert(at, (address, new, Some(write.step)));
            } else {
                bytes.entry(at).or_insert((address, old, None));
            }
        }
    }
    for (at, (address, expected, step)) in bytes {
        // SAFETY: within a noted write, see `note_operands`.
        let got = unsafe { std::ptr::read_volatile(at as *const u8) };
        if got != expected {
            let values = format!("{expected:#04x}, {got:#04x}");
            found.push(Difference { what: format!("byte at {address:#x}"), values, step });
        }
    }
}
