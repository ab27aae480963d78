//! Copies of guest instructions: registers renamed, the memory operand replaced.

use iced_x86::{Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use super::{Done, Emitter, Unsupported};
use super::{is_high_byte, number, resize, set_memory, spilled};
use crate::analyze::Insn;
use crate::asm::{Mem, R9, R10, R11, RAX, RBP, RBX, RCX, RDI, RDX, RSI, Reg};
use crate::block::off;

impl Emitter<'_> {
    /// Copies an instruction, renaming registers and replacing its memory operand by `operand`.
    pub(super) fn copy(&mut self, insn: &Insn, operand: Option<Mem>) -> Done {
        let mut ins = insn.ins;
        // Registers to be renamed.
        let mut kept: [u8; 3] = [0xff; 3];
        let mut kept_count = 0;
        let mut rename = false;
        let mut high_byte = false;
        for i in 0..ins.op_count() {
            if ins.op_kind(i) == OpKind::Register {
                let register = ins.op_register(i);
                if !register.is_gpr() {
                    continue;
                }
                high_byte |= is_high_byte(register);
                let n = number(register);
                rename |= n == 4;
                if spilled(n) {
                    rename = true;
                    if !kept[..kept_count].contains(&n) {
                        kept[kept_count] = n;
                        kept_count += 1;
                    }
                }
            }
        }
        if operand.is_none() && !rename {
            let start = usize::from(insn.offset);
            let bytes = self.context.bytes.get(start..start + ins.len()).ok_or(Unsupported)?;
            self.hot.raw(bytes);
            return Ok(());
        }
        if operand.is_none()
            && kept_count == 1
            && !high_byte
            && let Some(copy) = in_block(insn, kept[0])
        {
            return self.encode(&copy);
        }
        let mut operand = operand;
        let mut free: Vec<Reg> = Vec::new();
        let mut borrowed = [0xff_u8; 3];
        let mut borrow_count = 0;
        let mut used = insn.used | 1 << 4;
        // A high-byte register excludes REX: no extended register may appear.
        let legacy = high_byte;
        match operand {
            Some(mem) if kept_count > 0 || legacy => {
                if !(mem.base == Some(R11) && mem.index.is_none() && mem.disp == 0) {
                    self.hot.lea(R11, mem);
                }
                operand = Some(Mem::base(R11, 0));
                if !legacy {
                    free.push(R10);
                }
            }
            Some(_) => {}
            None if !legacy => free.extend([R10, R11]),
            None => {}
        }
        let mut needed = kept_count + usize::from(legacy && operand.is_some());
        needed = needed.saturating_sub(free.len());
        if legacy && ins.op_count() > 0 {
            // RSP cannot take part either: it would be R9.
            for i in 0..ins.op_count() {
                if ins.op_kind(i) == OpKind::Register
                    && number(ins.op_register(i)) == 4
                    && !is_high_byte(ins.op_register(i))
                {
                    return Err(Unsupported);
                }
            }
        }
        let candidates: &[Reg] =
            if legacy { &[RBX, RDX, RCX, RAX, RSI, RDI, RBP] } else { &[RBX, RBP, RSI, RDI, RDX, RCX, RAX] };
        let mut lent: Vec<Reg> = Vec::new();
        for _ in 0..needed {
            let reg = *candidates
                .iter()
                .find(|&&r| used & (1 << r) == 0 && !(legacy && operand.is_none() && r > 3))
                .ok_or(Unsupported)?;
            used |= 1 << reg;
            self.hot.store(Mem::gs(off::borrowed(borrow_count)), reg);
            borrowed[borrow_count] = reg;
            borrow_count += 1;
            lent.push(reg);
        }
        if legacy && operand.is_some() {
            let reg = lent.remove(0);
            self.hot.mov(reg, R11);
            operand = Some(Mem::base(reg, 0));
        }
        free.extend(lent);
        // Load the kept registers.
        let mut places = [(0xff_u8, 0_u8); 3];
        for (i, &n) in kept[..kept_count].iter().enumerate() {
            let reg = *free.get(i).ok_or(Unsupported)?;
            places[i] = (n, reg);
            self.hot.touch(reg);
            if matters(insn, n) {
                self.hot.load(reg, Mem::gs(off::gpr(n as usize)));
            }
        }
        let mut written = [false; 3];
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register {
                continue;
            }
            let register = ins.op_register(i);
            if !register.is_gpr() {
                continue;
            }
            let n = number(register);
            if n == 4 && !is_high_byte(register) {
                ins.set_op_register(i, resize(R9, register));
            } else if let Some(at) = places.iter().position(|&(guest, _)| guest == n && spilled(n)) {
                if legacy && places[at].1 >= 4 && register.size() == 1 {
                    return Err(Unsupported);
                }
                ins.set_op_register(i, resize(places[at].1, register));
                written[at] |= insn.writes & (1 << i) != 0;
            }
        }
        if let Some(mem) = operand {
            set_memory(&mut ins, mem);
        }
        // The check may have moved the flags since the instruction's first byte.
        if borrow_count > 0 {
            self.meta(insn, borrowed);
        } else {
            self.note_flags(insn);
        }
        self.encode(&ins)?;
        for (i, &(n, reg)) in places.iter().enumerate() {
            if n != 0xff && written[i] {
                self.hot.store(Mem::gs(off::gpr(n as usize)), reg);
            }
        }
        for (i, &reg) in borrowed.iter().enumerate() {
            if reg != 0xff {
                self.hot.load(reg, Mem::gs(off::borrowed(i)));
            }
        }
        Ok(())
    }

    pub(super) fn encode(&mut self, ins: &Instruction) -> Done {
        self.encoder.set_buffer(std::mem::take(&mut self.hot.bytes));
        let result = self.encoder.encode(ins, 0);
        self.hot.bytes = self.encoder.take_buffer();
        result.map(|_| ()).map_err(|_| Unsupported)
    }
}

/// Does the instruction use the old value of guest register `guest`?
fn matters(insn: &Insn, guest: u8) -> bool {
    (0..insn.ins.op_count()).any(|i| {
        insn.ins.op_kind(i) == OpKind::Register
            && insn.ins.op_register(i).is_gpr()
            && number(insn.ins.op_register(i)) == guest
            && insn.keeps & (1 << i) != 0
    })
}

/// An instruction without memory operand whose only operand in the vCPU block, `guest`, can be used where it lies.
fn in_block(insn: &Insn, guest: u8) -> Option<Instruction> {
    let mut ins = insn.ins;
    use Mnemonic as M;
    // Others differ between their forms: XCHG locks, bit tests reach beyond the operand, rotates leave other flags.
    let same = matches!(
        ins.mnemonic(),
        M::Mov
            | M::Movzx
            | M::Movsx
            | M::Movsxd
            | M::Add
            | M::Adc
            | M::Sub
            | M::Sbb
            | M::And
            | M::Or
            | M::Xor
            | M::Cmp
            | M::Test
            | M::Inc
            | M::Dec
            | M::Neg
            | M::Not
    );
    if !same {
        return None;
    }
    let lies = |i: u32| {
        ins.op_kind(i) == OpKind::Register && ins.op_register(i).is_gpr() && number(ins.op_register(i)) == guest
    };
    let at = (0..ins.op_count()).find(|&i| lies(i))?;
    if (at + 1..ins.op_count()).any(lies) {
        return None;
    }
    let register = ins.op_register(at);
    use OpCodeOperandKind as K;
    let fits = match ins.op_code().op_kind(at) {
        K::r8_or_mem => register.size() == 1,
        K::r16_or_mem => register.size() == 2,
        K::r32_or_mem => register.size() == 4,
        K::r64_or_mem => register.size() == 8,
        _ => false,
    };
    // A 32-bit result would leave the upper half as it is.
    if !fits || (register.size() == 4 && insn.writes & (1 << at) != 0) {
        return None;
    }
    for i in 0..ins.op_count() {
        if i != at
            && ins.op_kind(i) == OpKind::Register
            && ins.op_register(i).is_gpr()
            && number(ins.op_register(i)) == 4
        {
            ins.set_op_register(i, resize(R9, ins.op_register(i)));
        }
    }
    ins.set_op_kind(at, OpKind::Memory);
    set_memory(&mut ins, Mem::base(0, off::gpr(guest as usize)));
    ins.set_memory_base(Register::None);
    ins.set_memory_displ_size(8);
    ins.set_segment_prefix(Register::GS);
    Some(ins)
}
