//! Random programs.
//!
//! * [`forms`]: the instructions to choose from, by kind.
//! * [`operands`]: registers, addresses and immediates for them.
//! * [`flow`]: jumps, loops, calls, self-modification.
//!
//! Every instruction form that iced-x86 knows for 64-bit mode and that the engine translates is a template; operands are random, with a
//! preference for what is special in the translator (R9, R10, R11, RSP, high bytes) and for addresses that hit.

mod flow;
mod forms;
mod operands;

use std::collections::HashMap;

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpCodeOperandKind as K, Register};

use crate::layout::{LAYOUTS, Layout, PAGE};
use crate::program::{Item, Program};
use crate::rng::Rng;
use crate::state::{Role, data_pointer};

pub use operands::gpr;
use operands::{build, random_prefixes, rip_relative};

/// What kinds of instructions to draw from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Integer,
    Vector,
    X87,
    Text,
    Stack,
    /// Ends in an exception at level 3.
    Sensitive,
}

struct Template {
    code: Code,
    operands: Vec<K>,
    lock: bool,
}

/// All templates.
pub struct Generator {
    /// By kind, then by mnemonic.
    groups: HashMap<Kind, Vec<Vec<Template>>>,
    /// Mnemonics that make up most of real code: index into the integer groups.
    common: Vec<usize>,
    factory: InstructionInfoFactory,
}

/// What is known of the registers while a program is written.
struct Draft<'a> {
    layout: Layout,
    user: bool,
    pointer: u16,
    /// Those of them that are multiples of 32.
    aligned: u16,
    small: u16,
    stack_good: bool,
    /// Pointers may lead to the page that is mapped twice.
    alias: bool,
    /// Must not be written.
    reserved: u16,
    rng: &'a mut Rng,
}

impl Generator {
    /// A program of 1 to about 30 instructions.
    pub fn program(&mut self, rng: &mut Rng, layout: Layout, user: bool) -> (Program, [Role; 16], bool) {
        let mut roles = [Role::Any; 16];
        for role in &mut roles {
            *role = match rng.below(10) {
                0 | 1 => Role::Pointer,
                2 | 3 => Role::Aligned,
                4 | 5 => Role::Small,
                _ => Role::Any,
            };
        }
        // RDI and RSI serve string instructions.
        if rng.chance(70) {
            roles[6] = Role::Pointer;
            roles[7] = Role::Pointer;
        }
        if rng.chance(40) {
            roles[1] = Role::Small;
        }
        roles[4] = if rng.chance(95) { Role::Stack } else { Role::Pointer };
        let alias = rng.chance(20);
        let mask = |wanted: Role| (0..16).fold(0_u16, |m, i| m | u16::from(roles[i] == wanted) << i);
        let mut draft = Draft {
            layout,
            user,
            pointer: mask(Role::Pointer) | mask(Role::Aligned),
            aligned: mask(Role::Aligned),
            small: mask(Role::Small),
            stack_good: true,
            alias,
            reserved: 0,
            rng,
        };
        let mut program = Program { straight: true, ..Program::default() };
        let wanted = match draft.rng.below(10) {
            0 | 1 => 1 + draft.rng.below(3),
            2..=6 => 3 + draft.rng.below(10),
            _ => 10 + draft.rng.below(20),
        } as usize;
        let branchy = draft.rng.chance(45);
        while program.items.len() < wanted {
            if layout == LAYOUTS[0] && draft.rng.chance(1) {
                program.straight = false;
                self.modify(&mut draft, &mut program.items);
            } else if branchy && draft.rng.chance(22) {
                program.straight = false;
                self.branch(&mut draft, &mut program.items);
            } else {
                self.plain(&mut draft, &mut program.items);
            }
        }
        (program, roles, alias)
    }

    /// One instruction without a jump, and what it needs to make sense.
    fn plain(&mut self, draft: &mut Draft<'_>, items: &mut Vec<Item>) {
        let code_free = draft.pointer & !draft.reserved & !(1 << 4);
        if code_free.count_ones() < 2 && draft.rng.chance(40) {
            let to = draft.any_register();
            if draft.reserved & (1 << to) == 0 && to != 4 {
                let address = data_pointer(draft.rng, draft.layout, draft.alias);
                let ins = if draft.rng.chance(50) {
                    Instruction::with2(Code::Mov_r64_imm64, gpr(to, 8), address).unwrap()
                } else {
                    Instruction::with2(Code::Lea_r64_m, gpr(to, 8), rip_relative(address)).unwrap()
                };
                draft.pointer |= 1 << to;
                draft.small &= !(1 << to);
                items.push(Item::new(ins));
                return;
            }
        }
        if !draft.stack_good && draft.rng.chance(30) && draft.reserved & (1 << 4) == 0 {
            let address = draft.layout.stack + 2 * PAGE - 0x100 + draft.rng.below(64) * 8;
            items.push(Item::new(Instruction::with2(Code::Lea_r64_m, Register::RSP, rip_relative(address)).unwrap()));
            draft.stack_good = true;
            return;
        }
        if draft.rng.chance(1) {
            // Flags from memory, but none that trap.
            let flags = draft.rng.below(0x1000) as i32 & 0xcd5 | 2 | if draft.user { 0x200 } else { 0 };
            items.push(Item::new(Instruction::with1(Code::Pushq_imm32, flags).unwrap()));
            items.push(Item::new(Instruction::with(Code::Popfq)));
            return;
        }
        if draft.rng.chance(4) && draft.reserved & (1 << 1) == 0 {
            // A sensible count for what comes.
            let count = draft.rng.below(40) as u32;
            items.push(Item::new(Instruction::with2(Code::Mov_r32_imm32, Register::ECX, count).unwrap()));
            draft.pointer &= !2;
            draft.small |= 2;
            return;
        }
        loop {
            if let Some(item) = self.attempt(draft) {
                items.push(item);
                return;
            }
        }
    }

    fn attempt(&mut self, draft: &mut Draft<'_>) -> Option<Item> {
        let kind = match draft.rng.below(1000) {
            0..=569 => Kind::Integer,
            570..=819 => Kind::Vector,
            820..=879 => Kind::X87,
            880..=919 => Kind::Text,
            920..=994 => Kind::Stack,
            _ if draft.user => Kind::Sensitive,
            _ => Kind::Integer,
        };
        let group = &self.groups[&kind];
        let list = if kind == Kind::Integer && draft.rng.chance(70) {
            &group[draft.rng.pick(&self.common)]
        } else {
            &group[draft.rng.below(group.len() as u64) as usize]
        };
        let template = &list[draft.rng.below(list.len() as u64) as usize];
        let code = template.code;
        if !draft.user
            && (matches!(code.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq | Mnemonic::Pushfd)
                || template.operands.contains(&K::seg_reg))
        {
            return None; // shows the level
        }
        // The CPU's fast string moves take no notice of overlaps that only physical addresses show; the engine does.
        let movs = matches!(code.mnemonic(), Mnemonic::Movsb | Mnemonic::Movsw | Mnemonic::Movsd | Mnemonic::Movsq);
        if draft.alias && movs && kind == Kind::Text {
            return None;
        }
        if matches!(code.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && draft.rng.chance(60) {
            return None; // mostly ends in #DE
        }
        let ins = build(template, draft)?;
        let prefixes = random_prefixes(draft, &ins);
        // What it writes.
        let mut written = 0_u16;
        for used in self.factory.info(&ins).used_registers() {
            let full = used.register().full_register();
            if full.is_gpr()
                && !matches!(
                    used.access(),
                    OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
                )
            {
                written |= 1 << full.number();
            }
        }
        if kind == Kind::Stack {
            written &= !(1 << 4);
        }
        if written & draft.reserved != 0
            || (written & draft.pointer != 0 && !ins.is_string_instruction() && draft.rng.chance(80))
            || (written & (1 << 4) != 0 && draft.rng.chance(85))
        {
            return None;
        }
        if !prefixes.is_empty() && draft.reserved != 0 {
            return None; // might make another instruction of it
        }
        if !ins.is_string_instruction() {
            draft.pointer &= !written;
        }
        draft.small &= !written;
        if written & (1 << 4) != 0 || matches!(code.mnemonic(), Mnemonic::Leave) {
            draft.stack_good = false;
        }
        let mut item = Item::new(ins);
        item.prefixes = prefixes;
        Some(item)
    }
}

fn stack_instruction(ins: &Instruction) -> bool {
    ins.is_stack_instruction()
}
