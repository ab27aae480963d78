//! Translation of one analysed block into host code.
//!
//! The output is relocatable: two byte strings, `hot` (the path expected to run) and `cold` (slow paths), with fix-ups between
//! them and to the stubs, and lists of the places that need entries in the cache's tables. [`crate::cache`] puts them into memory.

mod access;
mod control;
mod copy;
mod output;
mod system;

use iced_x86::{Code, Encoder, Instruction, OpKind, Register};
use interp::GPR64;

use self::access::Address;
pub use self::access::{LOAD, searching};
pub use self::output::*;

use crate::analyze::{ALL_FLAGS, Class, Insn, Mode, changes_flags};
use crate::asm::{Asm, Mem, R9, R10, R11, RBP, RCX, Reg, cc};
use crate::block::{off, reason};
use crate::cache::FastSet;
use crate::stubs::lookup_indirect;

/// Positions the emitter needs.
#[derive(Clone, Copy)]
pub struct Context<'a> {
    pub stubs: &'a crate::stubs::Stubs,
    pub mode: Mode,
    /// Guest-virtual address of the page, relative to the base.
    pub page: u64,
    /// Number of the base, see [`crate::cache::Place`].
    pub base: u32,
    /// Contents of the page.
    pub bytes: &'a [u8],
    /// Numbers of the block's first check sites: reads, writes.
    pub first_sites: [u32; 2],
    /// Short code rather than fast.
    pub compact: bool,
    /// Guest-physical address of the page.
    pub gpa: u64,
    /// Accesses that are not worth predicting, see [`searching`].
    pub searching: &'a FastSet<u64>,
}

/// Where the guest's arithmetic flags are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flags {
    Host,
    Block,
    /// Nowhere: nobody will read them.
    Dead,
}

/// Emits one block.
pub struct Emitter<'a> {
    context: Context<'a>,
    hot: Asm,
    cold: Asm,
    out: Output,
    flags: Flags,
    /// Check sites so far: reads, writes.
    sites: [u32; 2],
    /// The group whose delta was put into R10 last.
    delta_at_hand: Option<u8>,
    encoder: Encoder,
}

/// How much has been emitted.
struct Mark {
    lengths: [usize; 11],
    flags: Flags,
}

/// What an instruction cannot do here: the interpreter takes it.
pub struct Unsupported;

type Done = Result<(), Unsupported>;

/// Does a block whose flags are live at its start move them to the vCPU block before anything reads or changes them?
fn saves_first(insns: &[Insn]) -> bool {
    for insn in insns {
        match insn.class {
            Class::Ret
            | Class::JmpIndirect
            | Class::Call
            | Class::CallIndirect
            | Class::Memory { .. }
            | Class::Push
            | Class::PushMemory
            | Class::Pop
            | Class::Leave => return true,
            Class::Skip | Class::Lea => {}
            Class::Plain if insn.reads == 0 && !changes_flags(&insn.ins) => {}
            _ => return false,
        }
    }
    false
}

/// Is this guest register kept in the block?
const fn spilled(reg: u8) -> bool {
    reg >= 9 && reg <= 11
}

/// The host register of a guest register that has one.
const fn host(reg: u8) -> Reg {
    if reg == 4 { R9 } else { reg }
}

fn number(register: Register) -> u8 {
    register.full_register().number() as u8
}

/// `register` resized to the width of `like`.
fn resize(reg: Reg, like: Register) -> Register {
    let wide = GPR64[reg as usize];
    if like.is_gpr64() {
        wide
    } else if like.is_gpr32() {
        wide.full_register32()
    } else if like.is_gpr16() {
        Register::AX + u32::from(reg)
    } else {
        match reg {
            0..=3 => Register::AL + u32::from(reg),
            _ => Register::SPL + u32::from(reg - 4),
        }
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

impl<'a> Emitter<'a> {
    /// Translates the block `insns`; never empty.
    /// `spare` is an output that is no longer needed, for its memory.
    pub fn block(context: Context<'a>, insns: &[Insn], encoder: Encoder, mut spare: Output) -> (Output, Encoder) {
        spare.clear();
        let mut emitter = Emitter {
            context,
            hot: Asm::reuse(std::mem::take(&mut spare.hot)),
            cold: Asm::reuse(std::mem::take(&mut spare.cold)),
            out: spare,
            flags: Flags::Host,
            sites: [0; 2],
            delta_at_hand: None,
            encoder,
        };
        if insns[0].live_before != 0 && saves_first(insns) {
            emitter.entry_saved(&insns[0]);
        } else {
            emitter.entry(&insns[0]);
        }
        let mut open = true;
        for insn in insns {
            emitter.meta(insn, [0xff; 3]);
            let mark = emitter.mark();
            if emitter.instruction(insn).is_err() {
                emitter.rewind(mark);
                emitter.step(insn);
                open = false;
                break;
            }
            open = !insn.class.ends_block();
        }
        if open && let Some(last) = insns.last() {
            emitter.meta(last, [0xff; 3]);
            emitter.jump_to(last, last.ins.next_ip());
        }
        // A block can be overwritten by a five-byte jump at its entries.
        while emitter.hot.len() < emitter.out.body + 5 {
            emitter.hot.u8(0x90);
        }
        let Emitter { hot, cold, mut out, encoder, sites, .. } = emitter;
        out.sites = sites;
        out.hot = hot.bytes;
        out.cold = cold.bytes;
        (out, encoder)
    }

    fn mark(&self) -> Mark {
        let out = &self.out;
        Mark {
            lengths: [
                self.hot.len(),
                self.cold.len(),
                out.fixups.len(),
                out.numbers.len(),
                out.links.len(),
                out.slots.len(),
                out.accesses.len(),
                out.meta.len(),
                out.pads.len(),
                out.hot_numbers.len(),
                out.calls.len(),
            ],
            flags: self.flags,
        }
    }

    /// Takes back what was emitted since `mark`.
    fn rewind(&mut self, mark: Mark) {
        let [hot, cold, fixups, numbers, links, slots, accesses, meta, pads, hot_numbers, calls] = mark.lengths;
        self.hot.bytes.truncate(hot);
        self.cold.bytes.truncate(cold);
        let out = &mut self.out;
        out.fixups.truncate(fixups);
        out.numbers.truncate(numbers);
        out.links.truncate(links);
        out.slots.truncate(slots);
        out.accesses.truncate(accesses);
        out.meta.truncate(meta);
        out.pads.truncate(pads);
        out.hot_numbers.truncate(hot_numbers);
        out.calls.truncate(calls);
        self.flags = mark.flags;
        self.delta_at_hand = None;
    }

    fn entry(&mut self, first: &Insn) {
        let exit = self.exit_number(first.offset, true);
        let dead = first.live_before == 0;
        // Stale: a dispatcher exit that names this place.
        self.out.stale = self.cold.len();
        self.cold_exit(exit, reason::STALE);
        let poll_exit = self.cold.len();
        self.cold_exit(exit, reason::POLL);
        if dead {
            self.out.indirect = (0, true);
            self.hot.cmp32_mem_imm8(Mem::gs(off::KICK), 0);
            let at = self.hot.jcc(cc::NE);
            self.fix(Part::Hot, at, Target::Own(Part::Cold, poll_exit));
        } else {
            // Polling must not touch flags.
            self.out.indirect = (self.cold.len(), false);
            self.cold.restore_flags(off::FLAGS, R10);
            let at = self.cold.jmp();
            self.fix(Part::Cold, at, Target::Own(Part::Hot, 0));
            let pending = self.cold.len();
            self.cold.mov(RCX, R11);
            let at = self.cold.jmp();
            self.fix(Part::Cold, at, Target::Own(Part::Cold, poll_exit));
            self.hot.mov(R11, RCX);
            self.hot.load32(RCX, Mem::gs(off::KICK));
            let go = self.hot.jecxz();
            let at = self.hot.jmp();
            self.fix(Part::Hot, at, Target::Own(Part::Cold, pending));
            self.hot.patch8(go);
            self.hot.mov(RCX, R11);
        }
        self.out.body = self.hot.len();
    }

    /// The entry of a block that would move the flags to the vCPU block anyway: calls and indirect jumps, which leave them there, enter
    /// behind that.
    fn entry_saved(&mut self, first: &Insn) {
        let exit = self.exit_number(first.offset, true);
        self.out.stale = self.cold.len();
        self.cold_exit(exit, reason::STALE);
        self.out.indirect_stale = Some(self.cold.len());
        self.cold.restore_flags(off::FLAGS, R10);
        self.cold_exit(exit, reason::STALE);
        let poll_exit = self.cold.len();
        self.cold.restore_flags(off::FLAGS, R10);
        self.cold_exit(exit, reason::POLL);
        self.hot.save_flags(off::FLAGS, R10);
        self.out.indirect = (self.hot.len(), true);
        self.hot.cmp32_mem_imm8(Mem::gs(off::KICK), 0);
        let at = self.hot.jcc(cc::NE);
        self.fix(Part::Hot, at, Target::Own(Part::Cold, poll_exit));
        self.out.body = 0;
        self.flags = Flags::Block;
    }

    fn meta(&mut self, insn: &Insn, borrowed: [u8; 3]) {
        self.out.meta.push(Meta {
            at: self.hot.len() as u32,
            offset: insn.offset,
            flags_saved: self.flags == Flags::Block,
            borrowed,
        });
    }

    fn fix(&mut self, part: Part, at: usize, target: Target) {
        self.out.fixups.push(Fixup { part, at, target });
    }

    fn exit_number(&mut self, offset: u16, fpu: bool) -> usize {
        if let Some(at) = self.out.exits.iter().position(|&o| o == (offset, fpu)) {
            return at;
        }
        self.out.exits.push((offset, fpu));
        self.out.exits.len() - 1
    }

    /// `mov r10d, number; jmp exit` in the cold part.
    fn cold_exit(&mut self, exit: usize, why: u32) {
        self.cold_number(Number::Exit(exit));
        let at = self.cold.jmp();
        self.fix(Part::Cold, at, Target::Fixed(self.context.stubs.exits[why as usize]));
    }

    fn cold_number(&mut self, number: Number) {
        self.cold.raw(&[0x41, 0xba, 0, 0, 0, 0]); // mov r10d, imm32
        self.out.numbers.push((self.cold.len() - 4, number));
    }

    /// Brings the flags into the host if somebody reads them.
    fn flags_to_host(&mut self, live: u32) {
        if self.flags == Flags::Block && live != 0 {
            self.hot.restore_flags(off::FLAGS, R10);
            self.flags = Flags::Host;
        }
    }

    /// Brings the flags into the block if somebody reads them. Afterwards the host's may be clobbered.
    fn flags_to_block(&mut self, live: u32) {
        match self.flags {
            Flags::Host if live != 0 => {
                self.hot.save_flags(off::FLAGS, R10);
                self.flags = Flags::Block;
            }
            Flags::Host => self.flags = Flags::Dead,
            Flags::Block | Flags::Dead => {}
        }
    }

    /// Brings all flags into the block, if the check that follows does not do it.
    fn flags_before_check(&mut self, insn: &Insn) {
        let follower = insn.group.is_some_and(|group| !group.leader);
        if !self.context.compact || follower {
            self.flags_to_block(ALL_FLAGS);
        }
    }

    fn step(&mut self, insn: &Insn) {
        self.flags_to_host(ALL_FLAGS);
        let exit = self.exit_number(insn.offset, crate::analyze::uses_fpu(&insn.ins));
        let start = self.cold.len();
        self.cold_exit(exit, reason::STEP);
        let at = self.hot.jmp();
        self.fix(Part::Hot, at, Target::Own(Part::Cold, start));
    }

    // ---- instructions ----

    fn instruction(&mut self, insn: &Insn) -> Done {
        let ins = &insn.ins;
        match insn.class {
            Class::Skip => {}
            Class::Plain => return self.plain(insn),
            Class::Memory { write, size } => return self.memory(insn, size, write),
            Class::BitTest { write } => return self.bit_test(insn, write),
            Class::Lea => self.lea(insn),
            Class::Push => return self.push(insn),
            Class::PushMemory => {
                let source = self.check_operand(insn, 8, false)?;
                self.hot.load(R11, source);
                self.hot.store(Mem::gs(off::SCRATCH), R11);
                let top = self.check_stack(insn, -8, true)?;
                self.hot.load(R11, Mem::gs(off::SCRATCH));
                self.hot.store(top, R11);
                self.hot.lea(R9, Mem::base(R9, -8));
            }
            Class::Pop => {
                let top = self.check_stack(insn, 0, false)?;
                let to = number(ins.op0_register());
                if spilled(to) {
                    self.hot.load(R11, top);
                    self.hot.store(Mem::gs(off::gpr(to as usize)), R11);
                } else {
                    self.hot.load(host(to), top);
                }
                // What is popped into RSP wins; every system call of Linux ends so.
                if usize::from(to) != cpu::gpr::RSP {
                    self.hot.lea(R9, Mem::base(R9, 8));
                }
            }
            Class::Pushf => {
                self.flags_to_host(ALL_FLAGS);
                self.hot.pushfq();
                self.hot.pop(R11);
                self.hot.load(R10, Mem::gs(off::RFLAGS));
                self.hot.lea(R11, Mem::sum(R11, R10, -0x202));
                self.hot.rm(false, &[0x8b], R10, Mem::gs(off::IF_FLAG));
                self.hot.lea(R11, Mem::sum(R11, R10, 0));
                self.hot.store(Mem::gs(off::SCRATCH), R11);
                let top = self.check_stack(insn, -8, true)?;
                self.hot.load(R11, Mem::gs(off::SCRATCH));
                self.hot.store(top, R11);
                self.hot.lea(R9, Mem::base(R9, -8));
            }
            Class::Leave => {
                let top = self.check(insn, Address::Simple(RBP, 0), 8, false, &|_| {})?;
                self.hot.load(R11, top);
                self.hot.lea(R9, Mem::base(RBP, 8));
                self.hot.mov(RBP, R11);
            }
            Class::Jmp => self.jump_to(insn, ins.near_branch64()),
            Class::Jcc => {
                self.flags_to_host(ALL_FLAGS);
                let at = self.hot.jcc(condition(ins));
                self.conditional(at, insn, ins.near_branch64());
            }
            Class::CountJump => self.count_jump(insn),
            Class::Call => return self.call(insn),
            Class::CallIndirect => return self.call_indirect(insn),
            Class::JmpIndirect => {
                if ins.op0_kind() == OpKind::Memory {
                    let source = self.check_operand(insn, 8, false)?;
                    self.hot.load(R11, source);
                } else {
                    self.load_guest(R11, number(ins.op0_register()));
                }
                self.flags_to_block(ALL_FLAGS);
                if self.context.compact {
                    self.name_instruction(insn);
                    self.jump_fixed(self.context.stubs.indirect[usize::from(self.context.mode.user)]);
                    return Ok(());
                }
                lookup_indirect(&mut self.hot, self.context.mode.user);
                self.name_instruction(insn);
                let at = self.hot.jmp();
                self.fix(
                    Part::Hot,
                    at,
                    Target::Fixed(self.context.stubs.indirect_miss[usize::from(self.context.mode.user)]),
                );
            }
            Class::Ret => {
                self.flags_before_check(insn);
                let top = self.check_stack(insn, 0, false)?;
                self.hot.load(R11, top);
                let extra = if ins.code() == Code::Retnq_imm16 { i32::from(ins.immediate16()) } else { 0 };
                self.hot.lea(R9, Mem::base(R9, 8 + extra));
                self.name_instruction(insn);
                self.hot.ret();
            }
            Class::Cli => self.hot.store32_imm(Mem::gs(off::IF_FLAG), 0),
            Class::Sti => self.sti(insn),
            Class::Swapgs => {
                self.hot.load(R10, Mem::gs(off::segment_base(5)));
                self.hot.load(R11, Mem::gs(off::KERNEL_GS_BASE));
                self.hot.store(Mem::gs(off::KERNEL_GS_BASE), R10);
                self.hot.store(Mem::gs(off::segment_base(5)), R11);
            }
            Class::Rdtsc => self.hot.raw(&[0x0f, 0x31]),
            Class::Syscall => {
                self.flags_to_host(ALL_FLAGS);
                self.transition_exit(insn);
                self.move_address(R10, ins.next_ip());
                self.jump_fixed(self.context.stubs.syscall);
            }
            Class::Sysret => {
                self.flags_to_block(ALL_FLAGS);
                self.transition_exit(insn);
                self.jump_fixed(self.context.stubs.sysret);
            }
            Class::Iret => {
                let frame = self.check(insn, Address::Simple(R9, 0), 40, false, &|_| {})?;
                self.hot.lea(R11, frame);
                self.transition_exit(insn);
                self.jump_fixed(self.context.stubs.iret);
            }
            Class::MovFromSegment => self.mov_from_segment(ins),
            Class::MovFromControl => self.mov_from_control(ins),
            Class::SegmentBase => self.segment_base(insn),
            Class::ExtendedState { restore } => return self.extended_state(insn, restore),
            Class::Popf => return self.popf(insn),
            Class::Pause => self.pause(insn),
            Class::String { movs, rep, size } => self.string(insn, movs, rep, size),
            Class::Step => self.step(insn),
        }
        Ok(())
    }

    /// PAUSE, and every so often an exit behind it. Flags stay.
    fn pause(&mut self, insn: &Insn) {
        self.hot.raw(&[0xf3, 0x90]);
        self.hot.mov(R11, RCX);
        self.hot.load32(RCX, Mem::gs(off::PAUSES));
        self.hot.lea(RCX, Mem::base(RCX, -1));
        self.hot.store32(Mem::gs(off::PAUSES), RCX);
        self.hot.raw(&[0x67, 0xe3, 2, 0xeb, 5]); // jecxz over the short jump, to the near jump
        let at = self.hot.jmp();
        self.fix(Part::Hot, at, Target::Own(Part::Cold, self.cold.len()));
        self.hot.mov(RCX, R11);
        self.cold.mov(RCX, R11);
        if self.flags == Flags::Block {
            self.cold.restore_flags(off::FLAGS, R10);
        }
        let exit = self.exit_number(insn.end() as u16, true);
        self.cold_exit(exit, reason::PAUSE);
    }

    /// POPFQ in the kernel: plain flags here, anything else by the interpreter.
    fn popf(&mut self, insn: &Insn) -> Done {
        let top = self.check_stack(insn, 0, false)?;
        self.flags_to_block(ALL_FLAGS);
        self.hot.load(R11, top);
        let slow = self.cold.len();
        self.cold.restore_flags(off::FLAGS, R10);
        let exit = self.exit_number(insn.offset, false);
        self.cold_exit(exit, reason::STEP);
        self.hot.rr(true, &[0xf7], 0, R11); // test r11, imm32
        self.hot.i32(!crate::stubs::PLAIN_FLAGS);
        let at = self.hot.jcc(cc::NE);
        self.fix(Part::Hot, at, Target::Own(Part::Cold, slow));
        self.hot.rr(false, &[0xf7], 0, R11); // test r11d, IF
        self.hot.i32(0x200);
        self.hot.raw(&[0x74, 0]); // je
        let disabled = self.hot.len() - 1;
        self.hot.cmp32_mem_imm8(Mem::gs(off::IRQ_WAITING), 0);
        let at = self.hot.jcc(cc::NE);
        self.fix(Part::Hot, at, Target::Own(Part::Cold, slow));
        self.hot.patch8(disabled);
        crate::stubs::commit_flags(&mut self.hot, R11, R10);
        self.hot.lea(R9, Mem::base(R9, 8));
        self.flags = if insn.live_after == 0 { Flags::Dead } else { Flags::Block };
        Ok(())
    }

    fn jump_fixed(&mut self, position: usize) {
        let at = self.hot.jmp();
        self.fix(Part::Hot, at, Target::Fixed(position));
    }

    /// Puts the number of an exit at the instruction into R10: an indirect jump whose target turns out not to be canonical faults there.
    fn name_instruction(&mut self, insn: &Insn) {
        let exit = self.exit_number(insn.offset, false);
        self.hot.raw(&[0x41, 0xba, 0, 0, 0, 0]); // mov r10d, imm32
        self.out.hot_numbers.push((self.hot.len() - 4, exit));
    }

    /// Leaves the number of the exit to the interpreter in the block, for the case that the stub cannot do it.
    fn transition_exit(&mut self, insn: &Insn) {
        let exit = self.exit_number(insn.offset, false);
        self.hot.store32_imm(Mem::gs(off::SCRATCH), 0);
        self.out.hot_numbers.push((self.hot.len() - 4, exit));
    }

    fn load_guest(&mut self, to: Reg, guest: u8) {
        if spilled(guest) {
            self.hot.load(to, Mem::gs(off::gpr(guest as usize)));
        } else {
            self.hot.mov(to, host(guest));
        }
    }

    fn push(&mut self, insn: &Insn) -> Done {
        let ins = &insn.ins;
        let top = self.check_stack(insn, -8, true)?;
        if ins.op0_kind() == OpKind::Register {
            let from = number(ins.op0_register());
            if spilled(from) {
                self.hot.load(R11, Mem::gs(off::gpr(from as usize)));
                self.hot.store(top, R11);
            } else {
                self.hot.store(top, host(from));
            }
        } else {
            self.hot.store_imm(top, ins.immediate(0) as i32);
        }
        self.hot.lea(R9, Mem::base(R9, -8));
        Ok(())
    }

    fn lea(&mut self, insn: &Insn) {
        let ins = &insn.ins;
        let register = ins.op0_register();
        let to = number(register);
        Self::compute(&mut self.hot, ins, true, self.context.base);
        if spilled(to) {
            match register.size() {
                8 => self.hot.store(Mem::gs(off::gpr(to as usize)), R11),
                4 => {
                    self.hot.mov32(R11, R11);
                    self.hot.store(Mem::gs(off::gpr(to as usize)), R11);
                }
                _ => self.hot.store16(Mem::gs(off::gpr(to as usize)), R11),
            }
        } else {
            match register.size() {
                8 => self.hot.mov(host(to), R11),
                4 => self.hot.mov32(host(to), R11),
                _ => {
                    self.hot.u8(0x66);
                    self.hot.rr(false, &[0x89], R11, host(to));
                }
            }
        }
    }

    /// Brings the flags where the copied instruction `insn` wants them. `scratch` may be clobbered.
    fn flags_for(&mut self, insn: &Insn, scratch: Reg) {
        if self.wants_flags(insn) {
            self.hot.restore_flags(off::FLAGS, scratch);
            self.flags = Flags::Host;
        }
    }

    /// Are the flags in the block while the copied instruction reads them, or leaves some of them as they are?
    fn wants_flags(&self, insn: &Insn) -> bool {
        let writes = changes_flags(&insn.ins);
        let needed = insn.reads | if writes { insn.live_after & !insn.kills } else { 0 };
        self.flags == Flags::Block && needed != 0
    }

    fn flags_after(&mut self, insn: &Insn) {
        if changes_flags(&insn.ins) {
            self.flags = Flags::Host;
        }
    }

    fn plain(&mut self, insn: &Insn) -> Done {
        self.flags_for(insn, R10);
        self.copy(insn, None)?;
        self.flags_after(insn);
        Ok(())
    }

    fn memory(&mut self, insn: &Insn, size: u16, write: bool) -> Done {
        let mut operand = self.check_operand(insn, size, write)?;
        if self.wants_flags(insn) && uses_r11(operand) {
            self.hot.lea(R11, operand);
            operand = Mem::base(R11, 0);
        }
        let scratch = if uses_r11(operand) { R10 } else { R11 };
        self.flags_for(insn, scratch);
        self.copy(insn, Some(operand))?;
        self.flags_after(insn);
        Ok(())
    }

    /// BT and friends with a register offset: the offset selects the word, too.
    fn bit_test(&mut self, insn: &Insn, write: bool) -> Done {
        let ins = insn.ins;
        let size = ins.memory_size().size() as u16;
        let register = ins.op1_register();
        let offset = number(register);
        let base = ins.memory_base();
        if (base.is_gpr() && (spilled(number(base)) || !base.is_gpr64()))
            || matches!(ins.memory_segment(), Register::FS | Register::GS)
            || base == Register::EIP
            // Without a base, the size of the displacement is that of the address: 32 bits wrap.
            || (base == Register::None && ins.memory_displ_size() != 8)
            || (base == Register::RIP && self.context.mode.user)
        {
            return Err(Unsupported);
        }
        let compute = move |asm: &mut Asm| {
            if size == 8 {
                if spilled(offset) {
                    asm.load(R10, Mem::gs(off::gpr(offset as usize)));
                } else {
                    asm.mov(R10, host(offset));
                }
                asm.sar(R10, 6);
            } else {
                if spilled(offset) {
                    asm.rm(true, &[0x63], R10, Mem::gs(off::gpr(offset as usize)));
                } else {
                    asm.rr(true, &[0x63], R10, host(offset)); // movsxd
                }
                asm.sar(R10, 5);
            }
            let scale = if size == 8 { 8 } else { 4 };
            if base.is_gpr() {
                let mem = Mem {
                    base: Some(host(number(base))),
                    index: Some((R10, scale)),
                    disp: ins.memory_displacement64() as i32,
                    gs: false,
                    addr32: false,
                };
                asm.lea(R11, mem);
            } else {
                asm.mov_imm(R11, ins.memory_displacement64());
                asm.lea(R11, Mem { base: Some(R11), index: Some((R10, scale)), disp: 0, gs: false, addr32: false });
            }
        };
        let operand = self.check(insn, Address::Computed, size, write, &compute)?;
        self.hot.lea(R11, operand);
        self.flags_to_block(insn.live_before);
        self.load_guest(R10, offset);
        self.hot.and32_imm(R10, i32::from(size) * 8 - 1);
        // The other flags pass through BT unchanged.
        if self.flags == Flags::Block && (insn.live_after & !insn.kills) != 0 {
            self.hot.store(Mem::gs(off::SCRATCH), R10);
            self.hot.restore_flags(off::FLAGS, R10);
            self.hot.load(R10, Mem::gs(off::SCRATCH));
        }
        let mut copy = ins;
        copy.set_op1_register(resize(R10, register));
        set_memory(&mut copy, Mem::base(R11, 0));
        self.encode(&copy)?;
        self.flags = Flags::Host;
        Ok(())
    }
}

fn uses_r11(mem: Mem) -> bool {
    mem.base == Some(R11) || matches!(mem.index, Some((R11, _)))
}

/// Replaces the memory operand.
fn set_memory(ins: &mut Instruction, mem: Mem) {
    ins.set_segment_prefix(Register::None);
    ins.set_memory_base(mem.base.map_or(Register::None, |r| GPR64[r as usize]));
    ins.set_memory_index(mem.index.map_or(Register::None, |(r, _)| GPR64[r as usize]));
    ins.set_memory_index_scale(1);
    ins.set_memory_displacement64(mem.disp as i64 as u64);
    ins.set_memory_displ_size(match mem.disp {
        0 => 0,
        -128..=127 => 1,
        _ => 8,
    });
}

/// The condition code of a Jcc.
fn condition(ins: &Instruction) -> u8 {
    use iced_x86::ConditionCode as C;
    match ins.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        _ => 15,
    }
}
