//! Operands: registers, addresses that hit and miss, immediates, redundant prefixes.

use iced_x86::{EncodingKind, MemoryOperand, OpKind};

use super::forms::kind_of;
use super::*;

/// Redundant prefixes, now and then.
pub(super) fn random_prefixes(draft: &mut Draft<'_>, ins: &Instruction) -> Vec<u8> {
    if !draft.rng.chance(4) || ins.has_lock_prefix() {
        return Vec::new();
    }
    let prefix = draft.rng.pick(&[0x2e, 0x36, 0x3e, 0x26, 0x66, 0x40, 0x48, 0x66]);
    let vex = ins.code().encoding() == EncodingKind::VEX;
    // Before a VEX prefix 66 and REX are #UD; before others 66 may make another instruction of it, and REX counts only directly
    // before the opcode, which a string of legacy prefixes need not be.
    match prefix {
        0x66 | 0x40 | 0x48 if vex => Vec::new(),
        0x66 if ins.code().op_code().mandatory_prefix() != iced_x86::MandatoryPrefix::None || immediate_grows(ins) => {
            Vec::new()
        }
        0x66 if kind_of(ins.code()) != Kind::Integer => Vec::new(),
        0x40 | 0x48 => Vec::new(),
        _ => vec![prefix],
    }
}

/// With 66h the length of the immediate would change and the rest be taken for code.
pub(super) fn immediate_grows(ins: &Instruction) -> bool {
    (0..ins.op_count()).any(|i| {
        matches!(
            ins.op_kind(i),
            OpKind::Immediate16 | OpKind::Immediate32 | OpKind::Immediate32to64 | OpKind::Immediate64
        )
    }) || ins.memory_displ_size() == 8 && ins.memory_base() == Register::None
        || matches!(ins.op0_kind(), OpKind::Memory) && ins.memory_size().size() == 0
}

/// The general register with this number and size; numbers 4 to 7 of size 1 are SPL to DIL.
pub fn gpr(number: usize, size: usize) -> Register {
    let n = number as u32;
    match size {
        8 => Register::RAX + n,
        4 => Register::EAX + n,
        2 => Register::AX + n,
        _ if n < 4 => Register::AL + n,
        _ => Register::SPL + (n - 4),
    }
}

pub(super) fn rip_relative(address: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ_size(Register::RIP, address as i64, 8)
}

impl Draft<'_> {
    pub(super) fn any_register(&mut self) -> usize {
        match self.rng.below(10) {
            0..=3 => self.rng.pick(&[9, 10, 11]),
            4 if self.rng.chance(60) => 4,
            _ => self.rng.below(16) as usize,
        }
    }

    /// A register that may be overwritten.
    pub(super) fn free_register(&mut self) -> Option<usize> {
        let register = self.any_register();
        // RSI and RDI would lead string instructions into the code: the CPU notices between elements, the engine between pieces.
        let free = !matches!(register, 4 | 6 | 7) && self.reserved & (1 << register) == 0;
        if free {
            self.pointer &= !(1 << register);
            self.small &= !(1 << register);
        }
        free.then_some(register)
    }

    pub(super) fn member(&mut self, mask: u16) -> Option<usize> {
        if mask == 0 {
            return None;
        }
        let nth = self.rng.below(u64::from(mask.count_ones())) as usize;
        (0..16).filter(|i| mask & (1 << i) != 0).nth(nth)
    }

    pub(super) fn register(&mut self, size: usize) -> Register {
        if size == 1 && self.rng.chance(25) {
            return self.rng.pick(&[Register::AH, Register::CH, Register::DH, Register::BH]);
        }
        let n = self.any_register();
        gpr(n, size)
    }

    pub(super) fn displacement(&mut self) -> i64 {
        match self.rng.below(8) {
            0..=2 => 0,
            3 | 4 => self.rng.range(-32, 96),
            5 => self.rng.range(-128, 127),
            6 => self.rng.range(-300, 700),
            _ => self.rng.range(-64, 64) * 8,
        }
    }

    /// A memory operand for an access of about `size` bytes.
    pub(super) fn memory(&mut self, size: usize) -> MemoryOperand {
        let low = self.layout.data < 1 << 32;
        if size >= 16 && self.rng.chance(80) {
            // Most of these want alignment.
            let disp = self.rng.range(-4, 6) * 32;
            if let Some(base) = self.member(self.aligned & self.pointer & !(1 << 4)) {
                let size = if disp == 0 { 0 } else { 8 };
                return MemoryOperand::new(gpr(base, 8), Register::None, 1, disp, size, false, Register::None);
            }
            let address = data_pointer(self.rng, self.layout, self.alias) as i64 & !31;
            return MemoryOperand::new(Register::RIP, Register::None, 1, address, 8, false, Register::None);
        }
        let mut disp = self.displacement();
        let segment = match self.rng.below(60) {
            0 => Register::DS,
            1 => Register::CS,
            2 => Register::SS,
            3 => Register::ES,
            _ => Register::None,
        };
        let fit = |disp: i64, rng: &mut Rng| -> u32 {
            if disp == 0 && rng.chance(70) {
                0
            } else if (-128..128).contains(&disp) && rng.chance(85) {
                1
            } else {
                8
            }
        };
        let narrow = low && self.rng.chance(12);
        let width = if narrow { 4 } else { 8 };
        match self.rng.below(100) {
            0..=13 => {
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                let base = if narrow { Register::EIP } else { Register::RIP };
                MemoryOperand::new(base, Register::None, 1, address, 8, false, segment)
            }
            14..=16 if low => {
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                MemoryOperand::new(
                    Register::None,
                    Register::None,
                    1,
                    address,
                    if narrow { 4 } else { 8 },
                    false,
                    segment,
                )
            }
            17..=26 => {
                let d = self.rng.range(-16, 16) * 8;
                let index = if self.rng.chance(20) { self.member(self.small & !(1 << 4)) } else { None };
                let index = index.map_or(Register::None, |i| gpr(i, width));
                let scale = if index == Register::None { 1 } else { self.rng.pick(&[1, 2, 4, 8]) };
                MemoryOperand::new(gpr(4, width), index, scale, d, fit(d, self.rng), false, segment)
            }
            27..=31 => {
                let segment = self.rng.pick(&[Register::FS, Register::GS]);
                let d = self.rng.range(-64, 128);
                match self.member(self.small & !(1 << 4)) {
                    Some(base) if self.rng.chance(60) => {
                        MemoryOperand::new(gpr(base, 8), Register::None, 1, d, fit(d, self.rng), false, segment)
                    }
                    Some(index) if self.rng.chance(50) => {
                        let scale = self.rng.pick(&[1, 2, 4, 8]);
                        MemoryOperand::new(Register::None, gpr(index, 8), scale, d, 8, false, segment)
                    }
                    _ => MemoryOperand::new(Register::None, Register::None, 1, d, 8, false, segment),
                }
            }
            32 => {
                let base = self.any_register();
                let index = self.rng.below(16) as usize;
                let index = if index == 4 { Register::None } else { gpr(index, width) };
                let scale = if index == Register::None { 1 } else { self.rng.pick(&[1, 2, 4, 8]) };
                MemoryOperand::new(gpr(base, width), index, scale, disp, fit(disp, self.rng), false, segment)
            }
            33..=35 if low => {
                // Index without base.
                let Some(index) = self.member(self.small & !(1 << 4)) else { return self.memory(size) };
                let scale = self.rng.pick(&[1, 2, 4, 8]);
                let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                MemoryOperand::new(Register::None, gpr(index, width), scale, address, 8, false, segment)
            }
            _ => {
                let Some(base) = self.member(self.pointer & !(1 << 4)) else {
                    let address = data_pointer(self.rng, self.layout, self.alias) as i64;
                    return MemoryOperand::new(Register::RIP, Register::None, 1, address, 8, false, segment);
                };
                let index = if self.rng.chance(30) { self.member(self.small & !(1 << 4)) } else { None };
                let (index, scale) = match index {
                    Some(index) => (gpr(index, width), self.rng.pick(&[1, 2, 4, 8])),
                    None => (Register::None, 1),
                };
                if size >= 16 && self.rng.chance(50) {
                    disp &= !31; // some want alignment
                }
                MemoryOperand::new(gpr(base, width), index, scale, disp, fit(disp, self.rng), false, segment)
            }
        }
    }

    pub(super) fn immediate8(&mut self) -> u32 {
        match self.rng.below(4) {
            0 => self.rng.below(8) as u32,
            1 => self.rng.below(66) as u32,
            _ => self.rng.next() as u32 & 0xff,
        }
    }
}

pub(super) fn set_memory(ins: &mut Instruction, memory: &MemoryOperand) {
    ins.set_memory_base(memory.base);
    ins.set_memory_index(memory.index);
    ins.set_memory_index_scale(memory.scale);
    ins.set_memory_displacement64(memory.displacement as u64);
    ins.set_memory_displ_size(memory.displ_size);
    ins.set_segment_prefix(memory.segment_prefix);
}

/// Builds an instruction from its template.
pub(super) fn build(template: &Template, draft: &mut Draft<'_>) -> Option<Instruction> {
    let code = template.code;
    let mut ins = Instruction::default();
    ins.set_code(code);
    let mut memory = false;
    let as_memory = draft.rng.chance(60);
    for (i, &kind) in template.operands.iter().enumerate() {
        let i = i as u32;
        let mut register = None;
        let mut wants_memory = false;
        let mut immediate = None;
        let either = |register: Register, wants: &mut bool| {
            *wants = as_memory;
            (!as_memory).then_some(register)
        };
        match kind {
            K::mem | K::mem_mib => wants_memory = true,
            K::mem_offs => {
                if draft.layout.data >= 1 << 32 && draft.rng.chance(30) {
                    return None;
                }
                ins.set_op_kind(i, OpKind::Memory);
                ins.set_memory_displ_size(8);
                ins.set_memory_displacement64(data_pointer(draft.rng, draft.layout, draft.alias));
                if draft.rng.chance(10) {
                    ins.set_segment_prefix(draft.rng.pick(&[Register::FS, Register::GS]));
                    ins.set_memory_displacement64(draft.rng.below(256));
                }
                memory = true;
                continue;
            }
            K::mem_vsib32x | K::mem_vsib64x | K::mem_vsib32y | K::mem_vsib64y => {
                let wide = matches!(kind, K::mem_vsib32y | K::mem_vsib64y);
                let mut operand = draft.memory(8);
                if !operand.base.is_gpr64() {
                    return None;
                }
                let index = draft.rng.below(16) as u32;
                operand.index = if wide { Register::YMM0 + index } else { Register::XMM0 + index };
                operand.scale = draft.rng.pick(&[1, 2, 4, 8]);
                ins.set_op_kind(i, OpKind::Memory);
                set_memory(&mut ins, &operand);
                memory = true;
                continue;
            }
            K::r8_or_mem => register = either(draft.register(1), &mut wants_memory),
            K::r16_or_mem => register = either(draft.register(2), &mut wants_memory),
            K::r32_or_mem => register = either(draft.register(4), &mut wants_memory),
            K::r64_or_mem => register = either(draft.register(8), &mut wants_memory),
            K::mm_or_mem => register = either(Register::MM0 + draft.rng.below(8) as u32, &mut wants_memory),
            K::xmm_or_mem => register = either(Register::XMM0 + draft.rng.below(16) as u32, &mut wants_memory),
            K::ymm_or_mem => register = either(Register::YMM0 + draft.rng.below(16) as u32, &mut wants_memory),
            K::r8_reg | K::r8_opcode => register = Some(draft.register(1)),
            K::r16_reg | K::r16_rm | K::r16_opcode => register = Some(draft.register(2)),
            K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => register = Some(draft.register(4)),
            K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => register = Some(draft.register(8)),
            K::seg_reg => register = Some(Register::ES + draft.rng.below(6) as u32),
            K::mm_reg | K::mm_rm => register = Some(Register::MM0 + draft.rng.below(8) as u32),
            K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 => {
                register = Some(Register::XMM0 + draft.rng.below(16) as u32);
            }
            K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 => {
                register = Some(Register::YMM0 + draft.rng.below(16) as u32);
            }
            K::cr_reg => register = Some(draft.rng.pick(&[Register::CR0, Register::CR2, Register::CR3, Register::CR4])),
            K::dr_reg => register = Some(draft.rng.pick(&[Register::DR0, Register::DR6, Register::DR7])),
            K::fs => register = Some(Register::FS),
            K::gs => register = Some(Register::GS),
            K::al => register = Some(Register::AL),
            K::cl => register = Some(Register::CL),
            K::ax => register = Some(Register::AX),
            K::dx => register = Some(Register::DX),
            K::eax => register = Some(Register::EAX),
            K::rax => register = Some(Register::RAX),
            K::st0 => register = Some(Register::ST0),
            K::sti_opcode => register = Some(Register::ST0 + draft.rng.below(8) as u32),
            K::imm8 => {
                let mut value = draft.immediate8();
                if code == Code::Int_imm8 && value == 0x80 {
                    value = 0x81; // a system call of the host
                }
                if code.mnemonic() == Mnemonic::Enter {
                    value &= 3;
                }
                let kind = if i > 0 && ins.op_kind(i - 1) == OpKind::Immediate16 {
                    OpKind::Immediate8_2nd
                } else {
                    OpKind::Immediate8
                };
                immediate = Some((kind, u64::from(value)));
            }
            K::imm8_const_1 => immediate = Some((OpKind::Immediate8, 1)),
            K::imm8sex16 => immediate = Some((OpKind::Immediate8to16, draft.immediate8() as i8 as u64)),
            K::imm8sex32 => immediate = Some((OpKind::Immediate8to32, draft.immediate8() as i8 as u64)),
            K::imm8sex64 => immediate = Some((OpKind::Immediate8to64, draft.immediate8() as i8 as u64)),
            K::imm16 => {
                let value = draft.rng.interesting() & 0xffff;
                let value = if code.mnemonic() == Mnemonic::Enter { value & 0x78 } else { value };
                immediate = Some((OpKind::Immediate16, value));
            }
            K::imm32 => immediate = Some((OpKind::Immediate32, draft.rng.interesting() & 0xffff_ffff)),
            K::imm32sex64 => immediate = Some((OpKind::Immediate32to64, draft.rng.interesting() as i32 as u64)),
            K::imm64 => immediate = Some((OpKind::Immediate64, draft.rng.interesting())),
            K::seg_rSI | K::es_rDI | K::seg_rDI => {
                let narrow = draft.layout.data < 1 << 32 && draft.rng.chance(15);
                // All operands of one instruction have the same address size.
                let narrow = match (i, ins.op_kind(0)) {
                    (0, _) => narrow,
                    (_, OpKind::MemorySegEDI | OpKind::MemorySegESI | OpKind::MemoryESEDI) => true,
                    (_, OpKind::MemorySegRDI | OpKind::MemorySegRSI | OpKind::MemoryESRDI) => false,
                    _ => narrow,
                };
                let op = match (kind, narrow) {
                    (K::seg_rSI, false) => OpKind::MemorySegRSI,
                    (K::seg_rSI, true) => OpKind::MemorySegESI,
                    (K::es_rDI, false) => OpKind::MemoryESRDI,
                    (K::es_rDI, true) => OpKind::MemoryESEDI,
                    (_, false) => OpKind::MemorySegRDI,
                    (_, true) => OpKind::MemorySegEDI,
                };
                ins.set_op_kind(i, op);
                continue;
            }
            K::seg_rBX_al => {
                ins.set_op_kind(i, OpKind::Memory);
                ins.set_memory_base(Register::RBX);
                ins.set_memory_index(Register::AL);
                continue;
            }
            _ => return None,
        }
        if wants_memory {
            let operand = draft.memory(code.op_code().memory_size().size());
            ins.set_op_kind(i, OpKind::Memory);
            set_memory(&mut ins, &operand);
            memory = true;
        } else if let Some(register) = register {
            ins.set_op_kind(i, OpKind::Register);
            ins.set_op_register(i, register);
        } else if let Some((kind, value)) = immediate {
            ins.set_op_kind(i, kind);
            match kind {
                OpKind::Immediate8_2nd => ins.set_immediate8_2nd(value as u8),
                OpKind::Immediate64 => ins.set_immediate64(value),
                OpKind::Immediate8 => ins.set_immediate8(value as u8),
                OpKind::Immediate16 => ins.set_immediate16(value as u16),
                OpKind::Immediate32 => ins.set_immediate32(value as u32),
                OpKind::Immediate8to16 => ins.set_immediate8to16(value as i16),
                OpKind::Immediate8to32 => ins.set_immediate8to32(value as i32),
                OpKind::Immediate8to64 => ins.set_immediate8to64(value as i64),
                _ => ins.set_immediate32to64(value as i64),
            }
        }
    }
    if ins.is_string_instruction() {
        match draft.rng.below(10) {
            // Repeated ones need a count that ends.
            0..=4 if draft.small & 2 != 0 => ins.set_has_rep_prefix(true),
            5 | 6 if draft.small & 2 != 0 => ins.set_has_repne_prefix(true),
            _ => {}
        }
        if draft.rng.chance(5) && matches!(ins.op_kind(1), OpKind::MemorySegRSI) {
            ins.set_segment_prefix(draft.rng.pick(&[Register::FS, Register::GS]));
        }
    }
    if template.lock && memory && ins.op0_kind() == OpKind::Memory && draft.rng.chance(20) {
        ins.set_has_lock_prefix(true);
    }
    Some(ins)
}
