//! Control flow: direct and conditional jumps, calls, landing pads.

use iced_x86::{Code, OpKind};

use super::{Done, Emitter, Flags, Link, LinkKind, Number, Part, SlotUse, Target, Unsupported, number};
use crate::analyze::{ALL_FLAGS, Insn};
use crate::asm::{Mem, R9, R10, R11, cc};
use crate::block::{off, reason};
use crate::stubs::lookup_indirect;

impl Emitter<'_> {
    // ---- direct jumps ----

    pub(super) fn in_page(&self, target: u64) -> bool {
        target & !0xfff == self.context.page
    }

    /// A jump at the end of the block to `target`, with flags as a direct jump wants them.
    pub(super) fn jump_to(&mut self, insn: &Insn, target: u64) {
        self.flags_to_host(insn.live_after);
        if self.in_page(target) {
            let at = self.hot.jmp();
            self.link(Part::Hot, at, insn, target);
        } else {
            self.hot.jmp_mem(Mem::gs(0));
            self.out.slots.push(SlotUse { part: Part::Hot, at: self.hot.len() - 4, target, kind: LinkKind::Backward });
        }
    }

    pub(super) fn link(&mut self, part: Part, at: usize, insn: &Insn, target: u64) {
        let kind = if target > insn.ins.ip() { LinkKind::Forward } else { LinkKind::Backward };
        self.link_kind(part, at, target, kind);
    }

    pub(super) fn link_kind(&mut self, part: Part, at: usize, target: u64, kind: LinkKind) {
        let stub = self.cold.len();
        self.cold_number(Number::Link(self.out.links.len()));
        let jump = self.cold.jmp();
        self.fix(Part::Cold, jump, Target::Fixed(self.context.stubs.exits[reason::LINK as usize]));
        self.fix(part, at, Target::Own(Part::Cold, stub));
        self.out.links.push(Link { part, at, stub, target, kind });
    }

    /// A conditional jump to `target` whose rel32 is at `at` in the hot part.
    pub(super) fn conditional(&mut self, at: usize, insn: &Insn, target: u64) {
        if self.in_page(target) {
            self.link(Part::Hot, at, insn, target);
        } else {
            self.fix(Part::Hot, at, Target::Own(Part::Cold, self.cold.len()));
            self.cold.jmp_mem(Mem::gs(0));
            self.out.slots.push(SlotUse {
                part: Part::Cold,
                at: self.cold.len() - 4,
                target,
                kind: LinkKind::Backward,
            });
        }
    }

    pub(super) fn count_jump(&mut self, insn: &Insn) {
        let ins = &insn.ins;
        self.flags_to_host(ALL_FLAGS);
        let opcode = match ins.code() {
            Code::Loopne_rel8_64_RCX | Code::Loopne_rel8_64_ECX => 0xe0,
            Code::Loope_rel8_64_RCX | Code::Loope_rel8_64_ECX => 0xe1,
            Code::Loop_rel8_64_RCX | Code::Loop_rel8_64_ECX => 0xe2,
            _ => 0xe3,
        };
        if matches!(
            ins.code(),
            Code::Loopne_rel8_64_ECX | Code::Loope_rel8_64_ECX | Code::Loop_rel8_64_ECX | Code::Jecxz_rel8_64
        ) {
            self.hot.u8(0x67);
        }
        self.hot.raw(&[opcode, 2, 0xeb, 5]); // taken: over the short jump, to the near jump
        let at = self.hot.jmp();
        self.conditional(at, insn, ins.near_branch64());
    }

    // ---- calls ----

    /// Checks and stores the return address; flags are in the block afterwards.
    pub(super) fn push_return(&mut self, insn: &Insn) -> Result<u64, Unsupported> {
        self.flags_before_check(insn);
        let top = self.check_stack(insn, -8, true)?;
        let address = insn.ins.next_ip();
        match i32::try_from(address as i64) {
            Ok(small) if self.context.base == 0 => self.hot.store_imm(top, small),
            _ => {
                self.move_address(R11, address);
                self.hot.store(top, R11);
            }
        }
        self.hot.lea(R9, Mem::base(R9, -8));
        Ok(address)
    }

    /// What the callee's RET comes back to: R11 holds the guest's return address.
    pub(super) fn landing_pad(&mut self, insn: &Insn, address: u64) {
        self.out.pads.push((self.hot.len(), address));
        let base = self.context.base;
        match i32::try_from(address as i64) {
            Ok(small) => {
                if base != 0 {
                    self.hot.rm(true, &[0x2b], R11, Mem::gs(off::base(base))); // sub
                }
                self.hot.cmp_imm(R11, small);
            }
            Err(_) => {
                // The constant lies in the cold part; R10 names the RET.
                let constant = self.cold.len();
                self.cold.raw(&address.to_le_bytes());
                self.hot.raw(&[0x4c, 0x3b, 0x1d, 0, 0, 0, 0]); // cmp r11, [rip + disp32]
                self.fix(Part::Hot, self.hot.len() - 4, Target::Own(Part::Cold, constant));
            }
        }
        let at = self.hot.jcc(cc::NE);
        let mut elsewhere = Target::Fixed(self.context.stubs.indirect[usize::from(self.context.mode.user)]);
        if base != 0 {
            let again = self.cold.len();
            self.cold.add_mem(R11, Mem::gs(off::base(base)));
            let jump = self.cold.jmp();
            self.fix(Part::Cold, jump, elsewhere);
            elsewhere = Target::Own(Part::Cold, again);
        }
        self.fix(Part::Hot, at, elsewhere);
        self.delta_at_hand = None;
        self.flags = Flags::Block;
        if insn.live_after == 0 {
            self.flags = Flags::Dead;
        }
    }

    pub(super) fn call(&mut self, insn: &Insn) -> Done {
        let address = self.push_return(insn)?;
        let target = insn.ins.near_branch64();
        if self.in_page(target) {
            let at = self.hot.call();
            self.link_kind(Part::Hot, at, target, LinkKind::Call);
        } else {
            self.hot.call_mem(Mem::gs(0));
            self.out.slots.push(SlotUse { part: Part::Hot, at: self.hot.len() - 4, target, kind: LinkKind::Call });
        }
        self.landing_pad(insn, address);
        Ok(())
    }

    pub(super) fn call_indirect(&mut self, insn: &Insn) -> Done {
        let ins = &insn.ins;
        if ins.op0_kind() == OpKind::Memory {
            let source = self.check_operand(insn, 8, false)?;
            self.hot.load(R11, source);
        } else {
            self.load_guest(R11, number(ins.op0_register()));
        }
        self.hot.store(Mem::gs(off::SCRATCH), R11);
        // A target in the other half, or in none, is for the interpreter: it may have to fault before anything is pushed.
        self.flags_to_block(ALL_FLAGS);
        self.hot.sar(R11, 47);
        if !self.context.mode.user {
            self.hot.rr(true, &[0xff], 0, R11); // inc
        }
        let elsewhere = self.hot.jcc(cc::NE);
        self.fix(Part::Hot, elsewhere, Target::Own(Part::Cold, self.cold.len()));
        self.cold.restore_flags(off::FLAGS, R10);
        let exit = self.exit_number(insn.offset, false);
        self.cold_exit(exit, reason::STEP);
        let address = self.push_return(insn)?;
        self.hot.load(R11, Mem::gs(off::SCRATCH));
        let at = self.hot.call();
        self.fix(Part::Hot, at, Target::Own(Part::Cold, self.cold.len()));
        lookup_indirect(&mut self.cold, self.context.mode.user);
        let at = self.cold.jmp();
        self.fix(Part::Cold, at, Target::Fixed(self.context.stubs.indirect_miss[usize::from(self.context.mode.user)]));
        self.landing_pad(insn, address);
        Ok(())
    }
}
