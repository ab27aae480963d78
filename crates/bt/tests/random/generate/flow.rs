//! Control flow: branches, loops, functions, strange returns, code that changes itself.

use iced_x86::MemoryOperand;

use super::*;

impl Generator {
    /// Some plain instructions.
    pub(super) fn few(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>, most: u64) {
        for _ in 0..draft.rng.below(most + 1) {
            self.plain(draft, items);
        }
    }

    /// A structure with jumps.
    pub(super) fn branch(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        match draft.rng.below(14) {
            0..=4 => self.skip(draft, items),
            5..=7 => self.repeat(draft, items),
            8 | 9 => self.call(draft, items),
            10 => self.indirect(draft, items),
            11 => self.strange_return(draft, items),
            12 => self.wild(draft, items),
            _ => self.call_indirect(draft, items),
        }
    }

    /// A conditional or unconditional jump forwards.
    pub(super) fn skip(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let code = match draft.rng.below(24) {
            0 => Code::Jmp_rel8_64,
            1 => Code::Jmp_rel32_64,
            2 => Code::Jrcxz_rel8_64,
            3 => Code::Jecxz_rel8_64,
            4 => Code::Loop_rel8_64_RCX,
            5 => Code::Loope_rel8_64_ECX,
            6 => Code::Loopne_rel8_64_RCX,
            _ => jcc(draft.rng),
        };
        if draft.reserved & 2 != 0 && matches!(code.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne) {
            return;
        }
        if matches!(code.mnemonic(), Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne) {
            draft.pointer &= !2;
            draft.small &= !2;
        }
        let (pointer, small, good) = (draft.pointer, draft.small, draft.stack_good);
        let at = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 4);
        for item in &mut items[at + 1..] {
            item.weight = 0;
        }
        items[at] = Item::to(Instruction::with_branch(code, 0).unwrap(), items.len());
        draft.pointer &= pointer;
        draft.small &= small;
        draft.stack_good &= good;
    }

    /// A loop with a counter of its own.
    pub(super) fn repeat(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let looping = draft.rng.chance(25);
        let counter = if looping { 1 } else { draft.rng.pick(&[9, 10, 11, 3, 14, 8, 9, 10]) };
        if draft.reserved & (1 << counter) != 0 {
            return;
        }
        let most = if draft.rng.chance(20) { 150 } else { 12 };
        let times = 1 + draft.rng.below(most) as u32;
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(counter, 4), times).unwrap()));
        draft.reserved |= 1 << counter;
        draft.pointer &= !(1 << counter);
        draft.small |= 1 << counter;
        let top = items.len();
        self.few(draft, items, 5);
        if draft.rng.chance(15) && items.len() < 20 {
            self.skip(draft, items);
        }
        if items.len() == top {
            self.plain(draft, items);
        }
        if looping {
            let code = draft.rng.pick(&[Code::Loop_rel8_64_RCX, Code::Loop_rel8_64_ECX]);
            items.push(Item::to(Instruction::with_branch(code, 0).unwrap(), top));
        } else {
            let down = match draft.rng.below(4) {
                0 => Instruction::with1(Code::Dec_rm64, gpr(counter, 8)).unwrap(),
                1 => Instruction::with1(Code::Dec_rm32, gpr(counter, 4)).unwrap(),
                2 => Instruction::with2(Code::Sub_rm64_imm8, gpr(counter, 8), 1).unwrap(),
                _ => Instruction::with2(Code::Add_rm32_imm8, gpr(counter, 4), -1).unwrap(),
            };
            items.push(Item::new(down));
            let code = draft.rng.pick(&[Code::Jne_rel8_64, Code::Jne_rel32_64]);
            items.push(Item::to(Instruction::with_branch(code, 0).unwrap(), top));
        }
        for item in &mut items[top..] {
            item.weight *= times;
        }
        draft.reserved &= !(1 << counter);
    }

    /// A loop that stores into the immediate operand of an instruction that comes later in it.
    pub(super) fn modify(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let counter = draft.rng.pick(&[9, 10, 11, 14, 8, 15]);
        if draft.reserved & (1 << counter) != 0 {
            return;
        }
        let times = 1 + draft.rng.below(6) as u32;
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(counter, 4), times).unwrap()));
        draft.reserved |= 1 << counter;
        draft.pointer &= !(1 << counter);
        let top = items.len();
        let store = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 3);
        // mov r32, imm32 without REX: the immediate begins at the second byte.
        let to = draft.rng.pick(&[0, 1, 2, 3, 5, 6, 7]);
        let target = items.len();
        items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, gpr(to, 4), 0x1234_5678_u32).unwrap()));
        draft.pointer &= !(1 << to);
        draft.small &= !(1 << to);
        let place = rip_relative(0);
        let ins = match draft.rng.below(4) {
            0 => Instruction::with2(Code::Mov_rm8_imm8, place, draft.rng.next() as u8 as u32).unwrap(),
            1 => Instruction::with2(Code::Mov_rm32_r32, place, gpr(counter, 4)).unwrap(),
            2 => Instruction::with2(Code::Add_rm32_imm8, place, 3).unwrap(),
            _ => Instruction::with2(Code::Xadd_rm8_r8, place, gpr(draft.rng.pick(&[0, 2, 3]), 1)).unwrap(),
        };
        items[store] = Item { addend: 1, ..Item::to(ins, target) };
        items.push(Item::new(Instruction::with1(Code::Dec_rm32, gpr(counter, 4)).unwrap()));
        items.push(Item::to(Instruction::with_branch(Code::Jne_rel32_64, 0).unwrap(), top));
        for item in &mut items[top..] {
            item.weight *= times;
        }
        draft.reserved &= !(1 << counter);
    }

    /// A call of a function that lies behind, and its return.
    pub(super) fn call(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let at = items.len();
        items.push(Item::new(Instruction::default()));
        self.few(draft, items, 2);
        let over = items.len();
        items.push(Item::new(Instruction::default()));
        items[at] = Item::to(Instruction::with_branch(Code::Call_rel32_64, 0).unwrap(), items.len());
        self.function(draft, items);
        items[over] = Item::to(Instruction::with_branch(Code::Jmp_rel32_64, 0).unwrap(), items.len());
    }

    pub(super) fn function(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        draft.reserved |= 1 << 4;
        let frame = draft.rng.chance(30);
        if frame {
            let saved = draft.any_register();
            items.push(Item::new(Instruction::with1(Code::Push_r64, gpr(saved, 8)).unwrap()));
            let body = items.len();
            self.few(draft, items, 3);
            // What touches the stack pointer would unbalance it.
            for i in (body..items.len()).rev() {
                if stack_instruction(&items[i].ins) {
                    items.remove(i);
                }
            }
            let restored = if draft.rng.chance(80) { saved } else { draft.any_register() };
            if restored != 4 {
                items.push(Item::new(Instruction::with1(Code::Pop_r64, gpr(restored, 8)).unwrap()));
                draft.pointer &= !(1 << restored);
                draft.small &= !(1 << restored);
            } else {
                items.push(Item::new(Instruction::with2(Code::Add_rm64_imm8, Register::RSP, 8).unwrap()));
            }
        } else if draft.rng.chance(50) {
            self.plain(draft, items);
            if let Some(item) = items.last()
                && stack_instruction(&item.ins)
            {
                items.pop();
            }
        }
        draft.reserved &= !(1 << 4);
        if draft.rng.chance(20) {
            let bytes = draft.rng.below(4) as u32 * 8;
            items.push(Item::new(Instruction::with1(Code::Retnq_imm16, bytes).unwrap()));
        } else {
            items.push(Item::new(Instruction::with(Code::Retnq)));
        }
    }

    /// `lea r, target; jmp r` and the like.
    pub(super) fn indirect(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        let lea = items.len();
        items.push(Item::new(Instruction::default()));
        if draft.rng.chance(60) {
            items.push(Item::new(Instruction::with1(Code::Jmp_rm64, gpr(register, 8)).unwrap()));
        } else {
            let place = MemoryOperand::with_base_displ_size(Register::RSP, -8 - 8 * draft.rng.below(3) as i64, 1);
            items.push(Item::new(Instruction::with2(Code::Mov_rm64_r64, place, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with1(Code::Jmp_rm64, place).unwrap()));
        }
        let behind = items.len();
        self.few(draft, items, 2);
        for item in &mut items[behind..] {
            item.weight = 0;
        }
        items[lea] =
            Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
    }

    pub(super) fn call_indirect(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        let lea = items.len();
        items.push(Item::new(Instruction::default()));
        if draft.rng.chance(50) {
            items.push(Item::new(Instruction::with1(Code::Call_rm64, gpr(register, 8)).unwrap()));
        } else {
            let place = MemoryOperand::with_base_displ_size(Register::RSP, -16 * (1 + draft.rng.below(3) as i64), 1);
            items.push(Item::new(Instruction::with2(Code::Mov_rm64_r64, place, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with1(Code::Call_rm64, place).unwrap()));
        }
        let over = items.len();
        items.push(Item::new(Instruction::default()));
        items[lea] =
            Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
        self.function(draft, items);
        items[over] = Item::to(Instruction::with_branch(Code::Jmp_rel8_64, 0).unwrap(), items.len());
    }

    /// A call whose return address is thrown away, or a return without a call.
    pub(super) fn strange_return(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let Some(register) = draft.free_register() else { return };
        if draft.rng.chance(50) {
            // call next; pop
            let at = items.len();
            items.push(Item::to(Instruction::with_branch(Code::Call_rel32_64, 0).unwrap(), at + 1));
            if draft.rng.chance(50) {
                items.push(Item::new(Instruction::with1(Code::Pop_r64, gpr(register, 8)).unwrap()));
            } else {
                items.push(Item::new(Instruction::with2(Code::Add_rm64_imm8, Register::RSP, 8).unwrap()));
            }
        } else {
            let lea = items.len();
            items.push(Item::new(Instruction::default()));
            items.push(Item::new(Instruction::with1(Code::Push_r64, gpr(register, 8)).unwrap()));
            items.push(Item::new(Instruction::with(Code::Retnq)));
            let behind = items.len();
            self.few(draft, items, 2);
            for item in &mut items[behind..] {
                item.weight = 0;
            }
            items[lea] =
                Item::to(Instruction::with2(Code::Lea_r64_m, gpr(register, 8), rip_relative(0)).unwrap(), items.len());
        }
        draft.pointer &= !(1 << register);
        draft.small &= !(1 << register);
    }

    /// Jumps that lead nowhere.
    pub(super) fn wild(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        if draft.rng.chance(60) {
            return;
        }
        let register = draft.any_register();
        items.push(Item::new(match draft.rng.below(4) {
            0 => Instruction::with1(Code::Jmp_rm64, gpr(register, 8)).unwrap(),
            1 => Instruction::with1(Code::Call_rm64, gpr(register, 8)).unwrap(),
            2 => Instruction::with(Code::Retnq),
            _ => Instruction::with1(Code::Call_rm64, draft.memory(8)).unwrap(),
        }));
    }
}

pub(super) fn jcc(rng: &mut Rng) -> Code {
    let short = rng.chance(50);
    let codes = if short {
        [
            Code::Jo_rel8_64,
            Code::Jno_rel8_64,
            Code::Jb_rel8_64,
            Code::Jae_rel8_64,
            Code::Je_rel8_64,
            Code::Jne_rel8_64,
            Code::Jbe_rel8_64,
            Code::Ja_rel8_64,
            Code::Js_rel8_64,
            Code::Jns_rel8_64,
            Code::Jp_rel8_64,
            Code::Jnp_rel8_64,
            Code::Jl_rel8_64,
            Code::Jge_rel8_64,
            Code::Jle_rel8_64,
            Code::Jg_rel8_64,
        ]
    } else {
        [
            Code::Jo_rel32_64,
            Code::Jno_rel32_64,
            Code::Jb_rel32_64,
            Code::Jae_rel32_64,
            Code::Je_rel32_64,
            Code::Jne_rel32_64,
            Code::Jbe_rel32_64,
            Code::Ja_rel32_64,
            Code::Js_rel32_64,
            Code::Jns_rel32_64,
            Code::Jp_rel32_64,
            Code::Jnp_rel32_64,
            Code::Jl_rel32_64,
            Code::Jge_rel32_64,
            Code::Jle_rel32_64,
            Code::Jg_rel32_64,
        ]
    };
    rng.pick(&codes)
}
