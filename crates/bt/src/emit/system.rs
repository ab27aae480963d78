//! System registers and extended state, without the interpreter: segment selectors and bases, control registers, XSAVE and XRSTOR, STI.

use iced_x86::{Code, Instruction, Register};

use super::{Emitter, Flags, Part, Target, Unsupported};
use super::{host, number, spilled};
use crate::analyze::{Insn, uses_fpu};
use crate::asm::{Mem, R10, R11, RAX, RDX, Reg, cc};
use crate::block::{off, reason};

/// CR4.FSGSBASE.
const FSGSBASE: i32 = cpu::cr4::FSGSBASE as i32;
/// Components of extended state: x87, SSE, AVX. Guests have no others.
const COMPONENTS: i32 = 7;
/// Bytes of the area that holds them.
const AREA: u16 = 832;

impl Emitter<'_> {
    /// Cold code that leaves `insn` to the interpreter, from its start; returns its position. The flags are where they are now.
    pub(super) fn cold_step(&mut self, insn: &Insn) -> Target {
        let start = self.cold.len();
        if self.flags == Flags::Block {
            self.cold.restore_flags(off::FLAGS, R10);
        }
        let exit = self.exit_number(insn.offset, uses_fpu(&insn.ins));
        self.cold_exit(exit, reason::STEP);
        Target::Own(Part::Cold, start)
    }

    /// A conditional jump to [`Self::cold_step`].
    pub(super) fn step_if(&mut self, condition: u8, step: Target) {
        let at = self.hot.jcc(condition);
        self.fix(Part::Hot, at, step);
    }

    /// Writes R11 to a guest register, as wide as `register`.
    fn set_guest(&mut self, register: Register) {
        let to = number(register);
        let place = Mem::gs(off::gpr(to as usize));
        match (register.size(), spilled(to)) {
            (8, true) => self.hot.store(place, R11),
            (8, false) => self.hot.mov(host(to), R11),
            (4, true) => {
                self.hot.mov32(R11, R11);
                self.hot.store(place, R11);
            }
            (4, false) => self.hot.mov32(host(to), R11),
            (_, true) => self.hot.store16(place, R11),
            (_, false) => {
                self.hot.u8(0x66);
                self.hot.rr(false, &[0x89], R11, host(to));
            }
        }
    }

    pub(super) fn mov_from_segment(&mut self, ins: &Instruction) {
        let segment = match ins.op1_register() {
            Register::ES => 0,
            Register::CS => 1,
            Register::SS => 2,
            Register::DS => 3,
            Register::FS => 4,
            _ => 5,
        };
        self.hot.rm(false, &[0x0f, 0xb7], R11, Mem::gs(off::segment_base(segment) + off::SELECTOR)); // movzx
        self.set_guest(ins.op0_register());
    }

    pub(super) fn mov_from_control(&mut self, ins: &Instruction) {
        let from = match ins.op1_register() {
            Register::CR0 => off::CR0,
            Register::CR2 => off::CR2,
            Register::CR3 => off::CR3,
            _ => off::CR4,
        };
        self.hot.load(R11, Mem::gs(from));
        self.set_guest(ins.op0_register());
    }

    /// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE. Flags stay.
    pub(super) fn segment_base(&mut self, insn: &Insn) {
        let ins = &insn.ins;
        self.flags_to_block(insn.live_before);
        let step = self.cold_step(insn);
        self.hot.rm(false, &[0xf7], 0, Mem::gs(off::CR4)); // test dword
        self.hot.i32(FSGSBASE);
        self.step_if(cc::E, step);
        let register = ins.op0_register();
        let (read, segment) = match ins.code() {
            Code::Rdfsbase_r32 | Code::Rdfsbase_r64 => (true, 4),
            Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => (true, 5),
            Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => (false, 4),
            _ => (false, 5),
        };
        let base = Mem::gs(off::segment_base(segment));
        if read {
            self.hot.load(R11, base);
            self.set_guest(register);
            return;
        }
        self.load_guest(R11, number(register));
        if register.size() == 8 {
            // Is it canonical?
            self.hot.mov(R10, R11);
            self.hot.sar(R10, 47);
            self.hot.rr(true, &[0xff], 0, R10); // inc
            self.hot.cmp_imm(R10, 1);
            self.step_if(cc::A, step);
        } else {
            self.hot.mov32(R11, R11);
        }
        self.hot.store(base, R11);
    }

    /// STI. If an interrupt waits, the interpreter does it, whose shadow holds the interrupt off for one more instruction. What comes later
    /// is seen at the next poll.
    pub(super) fn sti(&mut self, insn: &Insn) {
        self.flags_to_block(insn.live_before);
        let step = self.cold_step(insn);
        self.hot.cmp32_mem_imm8(Mem::gs(off::IRQ_WAITING), 0);
        self.step_if(cc::NE, step);
        self.hot.store32_imm(Mem::gs(off::IF_FLAG), 0x200);
    }

    /// XSAVE, XSAVEOPT and XRSTOR by the host's own instructions, on the guest's area: x87, SSE and AVX registers are the guest's. XSAVEOPT
    /// saves everything: what the host's CPU knows of the last XRSTOR is the host's. The instruction faults as the guest's would, for
    /// instance if the area is not aligned; whatever else is unusual is for the interpreter.
    pub(super) fn extended_state(&mut self, insn: &Insn, restore: bool) -> Result<(), Unsupported> {
        let operand = self.check_operand(insn, AREA, !restore)?;
        self.hot.lea(R11, operand);
        let at = |offset: i32| Mem::base(R11, offset);
        if restore {
            let step = self.cold_step(insn);
            // XSTATE_BV names other components, the header is not of the standard format, MXCSR has bits that the model has not.
            self.hot.load(R10, at(512));
            test_imm(&mut self.hot, true, R10, !COMPONENTS);
            self.step_if(cc::NE, step);
            self.hot.load(R10, at(520));
            self.hot.rm(true, &[0x0b], R10, at(528)); // or
            self.step_if(cc::NE, step);
            self.hot.load32(R10, at(24));
            test_imm(&mut self.hot, false, R10, !0xffff);
            self.step_if(cc::NE, step);
        }
        for (i, register) in [RAX, RDX].into_iter().enumerate() {
            self.hot.store(Mem::gs(off::borrowed(i)), register);
        }
        self.meta(insn, [RAX, RDX, 0xff]);
        self.hot.and32_imm(RAX, COMPONENTS);
        self.hot.xor32(RDX, RDX);
        self.hot.raw(&[0x49, 0x0f, 0xae, if restore { 0x2b } else { 0x23 }]); // xrstor64 or xsave64 [r11]
        if !restore {
            // The pointers to the last x87 instruction and its operand are the host's, and so is the mask of MXCSR.
            self.hot.raw(&[0xa8, 1, 0x74, 0]); // test al, 1; je
            let skip = self.hot.len() - 1;
            self.hot.store_imm(at(8), 0);
            self.hot.store_imm(at(16), 0);
            self.hot.patch8(skip);
            self.hot.raw(&[0xa8, 6, 0x74, 0]); // test al, 6; je
            let skip = self.hot.len() - 1;
            self.hot.store32_imm(at(28), 0xffff);
            self.hot.patch8(skip);
        }
        for (i, register) in [RAX, RDX].into_iter().enumerate() {
            self.hot.load(register, Mem::gs(off::borrowed(i)));
        }
        Ok(())
    }
}

/// `test reg, imm32`.
fn test_imm(asm: &mut crate::asm::Asm, wide: bool, reg: Reg, value: i32) {
    asm.rr(wide, &[0xf7], 0, reg);
    asm.i32(value);
}
