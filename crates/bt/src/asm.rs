//! A small assembler for the instructions the translator itself needs.
//!
//! Only the forms used by [`crate::emit`] and [`crate::stubs`] exist. Registers are encoding numbers (0 = RAX … 15 = R15).
//! Guest instructions that must be changed go through iced-x86's encoder instead.

#![allow(missing_docs)]

/// A host register by its encoding number.
pub type Reg = u8;

pub const RAX: Reg = 0;
pub const RCX: Reg = 1;
pub const RDX: Reg = 2;
pub const RBX: Reg = 3;
pub const RSP: Reg = 4;
pub const RBP: Reg = 5;
pub const RSI: Reg = 6;
pub const RDI: Reg = 7;
pub const R8: Reg = 8;
pub const R9: Reg = 9;
pub const R10: Reg = 10;
pub const R11: Reg = 11;
pub const R12: Reg = 12;
pub const R13: Reg = 13;
pub const R14: Reg = 14;
pub const R15: Reg = 15;

/// Condition codes of Jcc/SETcc.
pub mod cc {
    pub const B: u8 = 2;
    pub const E: u8 = 4;
    pub const NE: u8 = 5;
    pub const BE: u8 = 6;
    pub const A: u8 = 7;
}

/// A memory operand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Mem {
    pub base: Option<Reg>,
    /// Index register and scale (1, 2, 4, 8).
    pub index: Option<(Reg, u8)>,
    pub disp: i32,
    /// GS segment: the vCPU block.
    pub gs: bool,
    /// 32-bit address size.
    pub addr32: bool,
}

impl Mem {
    /// `gs:[offset]`.
    pub const fn gs(offset: i32) -> Self {
        Self { base: None, index: None, disp: offset, gs: true, addr32: false }
    }

    /// `gs:[base + offset]`.
    pub const fn gs_base(base: Reg, offset: i32) -> Self {
        Self { base: Some(base), index: None, disp: offset, gs: true, addr32: false }
    }

    /// `[base + disp]`.
    pub const fn base(base: Reg, disp: i32) -> Self {
        Self { base: Some(base), index: None, disp, gs: false, addr32: false }
    }

    /// `[base + index + disp]`.
    pub const fn sum(base: Reg, index: Reg, disp: i32) -> Self {
        Self { base: Some(base), index: Some((index, 1)), disp, gs: false, addr32: false }
    }
}

/// Bytes of code being assembled.
#[derive(Default)]
pub struct Asm {
    pub bytes: Vec<u8>,
    /// Registers named as an operand since [`Asm::untouch`], as a bit mask.
    touched: u16,
}

impl Asm {
    /// Starts anew in the memory of `bytes`.
    pub fn reuse(mut bytes: Vec<u8>) -> Self {
        bytes.clear();
        Self { bytes, touched: 0 }
    }

    /// Notes that `reg` may have been written.
    pub fn touch(&mut self, reg: Reg) {
        self.touched |= 1 << reg;
    }

    /// Has `reg` been an operand, other than for addressing, since [`Asm::untouch`]?
    pub fn touched(&self, reg: Reg) -> bool {
        self.touched & (1 << reg) != 0
    }

    /// Forgets what was touched.
    pub fn untouch(&mut self) {
        self.touched = 0;
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn u8(&mut self, byte: u8) {
        self.bytes.push(byte);
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub fn i32(&mut self, value: i32) {
        self.raw(&value.to_le_bytes());
    }

    /// `op reg, mem` with opcode bytes `op` (without prefixes), `prefix` a mandatory prefix or 0.
    pub fn rm_prefixed(&mut self, prefix: u8, wide: bool, op: &[u8], reg: Reg, mem: Mem) {
        self.touch(reg);
        if mem.gs {
            self.u8(0x65);
        }
        if mem.addr32 {
            self.u8(0x67);
        }
        if prefix != 0 {
            self.u8(prefix);
        }
        let base = mem.base.unwrap_or(0);
        let index = mem.index.map_or(0, |(r, _)| r);
        let rex = (u8::from(wide) << 3) | ((reg >> 3) << 2) | ((index >> 3) << 1) | (base >> 3);
        if rex != 0 {
            self.u8(0x40 | rex);
        }
        self.raw(op);
        let reg = (reg & 7) << 3;
        let Some(base) = mem.base else {
            self.u8(reg | 4);
            match mem.index {
                None => self.u8(0x25),
                Some((index, scale)) => self.u8(((scale.trailing_zeros() as u8) << 6) | ((index & 7) << 3) | 5),
            }
            self.i32(mem.disp);
            return;
        };
        let (mode, size) = if mem.disp == 0 && base & 7 != 5 {
            (0, 0)
        } else if i8::try_from(mem.disp).is_ok() {
            (0x40, 1)
        } else {
            (0x80, 4)
        };
        match mem.index {
            None if base & 7 != 4 => self.u8(mode | reg | (base & 7)),
            None => {
                self.u8(mode | reg | 4);
                self.u8(0x24);
            }
            Some((index, scale)) => {
                self.u8(mode | reg | 4);
                self.u8(((scale.trailing_zeros() as u8) << 6) | ((index & 7) << 3) | (base & 7));
            }
        }
        match size {
            1 => self.u8(mem.disp as u8),
            4 => self.i32(mem.disp),
            _ => {}
        }
    }

    /// `op reg, mem`.
    pub fn rm(&mut self, wide: bool, op: &[u8], reg: Reg, mem: Mem) {
        self.rm_prefixed(0, wide, op, reg, mem);
    }

    /// `op rm, reg` with both registers.
    pub fn rr(&mut self, wide: bool, op: &[u8], reg: Reg, rm: Reg) {
        self.touch(reg);
        self.touch(rm);
        let rex = (u8::from(wide) << 3) | ((reg >> 3) << 2) | (rm >> 3);
        if rex != 0 {
            self.u8(0x40 | rex);
        }
        self.raw(op);
        self.u8(0xc0 | ((reg & 7) << 3) | (rm & 7));
    }

    pub fn mov(&mut self, to: Reg, from: Reg) {
        self.rr(true, &[0x89], from, to);
    }

    pub fn mov32(&mut self, to: Reg, from: Reg) {
        self.rr(false, &[0x89], from, to);
    }

    pub fn load(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8b], to, mem);
    }

    pub fn load32(&mut self, to: Reg, mem: Mem) {
        self.rm(false, &[0x8b], to, mem);
    }

    pub fn store(&mut self, mem: Mem, from: Reg) {
        self.rm(true, &[0x89], from, mem);
    }

    pub fn store32(&mut self, mem: Mem, from: Reg) {
        self.rm(false, &[0x89], from, mem);
    }

    pub fn store16(&mut self, mem: Mem, from: Reg) {
        self.rm_prefixed(0x66, false, &[0x89], from, mem);
    }

    /// Stores a sign-extended 32-bit immediate to 64 bits of memory.
    pub fn store_imm(&mut self, mem: Mem, value: i32) {
        self.rm(true, &[0xc7], 0, mem);
        self.i32(value);
    }

    pub fn store32_imm(&mut self, mem: Mem, value: u32) {
        self.rm(false, &[0xc7], 0, mem);
        self.i32(value as i32);
    }

    pub fn lea(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x8d], to, mem);
    }

    /// Loads a constant by the shortest form.
    pub fn mov_imm(&mut self, to: Reg, value: u64) {
        self.touch(to);
        if let Ok(small) = u32::try_from(value) {
            if to >= 8 {
                self.u8(0x41);
            }
            self.u8(0xb8 | (to & 7));
            self.i32(small as i32);
        } else if let Ok(small) = i32::try_from(value as i64) {
            self.rr(true, &[0xc7], 0, to);
            self.i32(small);
        } else {
            self.mov_imm64(to, value);
        }
    }

    /// Loads a constant with a 64-bit immediate, which is the last thing emitted.
    pub fn mov_imm64(&mut self, to: Reg, value: u64) {
        self.touch(to);
        self.u8(0x48 | (to >> 3));
        self.u8(0xb8 | (to & 7));
        self.raw(&value.to_le_bytes());
    }

    /// `shr to32, count`.
    pub fn shr32(&mut self, to: Reg, count: u8) {
        self.rr(false, &[0xc1], 5, to);
        self.u8(count);
    }

    /// `shl to32, count`.
    pub fn shl32(&mut self, to: Reg, count: u8) {
        self.rr(false, &[0xc1], 4, to);
        self.u8(count);
    }

    /// `sar to, count` (64 bits).
    pub fn sar(&mut self, to: Reg, count: u8) {
        self.rr(true, &[0xc1], 7, to);
        self.u8(count);
    }

    /// `and to32, imm`.
    pub fn and32_imm(&mut self, to: Reg, value: i32) {
        self.rr(false, &[0x81], 4, to);
        self.i32(value);
    }

    /// The offset in a software TLB of the entry that belongs to the address in R11 goes to R10; see [`crate::block::tlb_index`].
    pub fn tlb_offset(&mut self) {
        self.raw(&[0xc4, 0x43, 0x7b, 0xf0, 0xd3, 8]); // rorx r10d, r11d, 8
        self.and32_imm(R10, 0xfff0);
    }

    /// `xor to32, from32`.
    pub fn xor32(&mut self, to: Reg, from: Reg) {
        self.rr(false, &[0x31], from, to);
    }

    /// `xor to, mem` (64 bits).
    pub fn xor_mem(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x33], to, mem);
    }

    /// `add to, mem` (64 bits).
    pub fn add_mem(&mut self, to: Reg, mem: Mem) {
        self.rm(true, &[0x03], to, mem);
    }

    /// `cmp reg, imm` (64 bits).
    pub fn cmp_imm(&mut self, reg: Reg, value: i32) {
        if let Ok(small) = i8::try_from(value) {
            self.rr(true, &[0x83], 7, reg);
            self.u8(small as u8);
        } else {
            self.rr(true, &[0x81], 7, reg);
            self.i32(value);
        }
    }

    /// `cmp reg, mem` (64 bits).
    pub fn cmp_mem(&mut self, reg: Reg, mem: Mem) {
        self.rm(true, &[0x3b], reg, mem);
    }

    /// `cmp reg, other` (64 bits).
    pub fn cmp(&mut self, reg: Reg, other: Reg) {
        self.rr(true, &[0x39], other, reg);
    }

    /// `cmp dword mem, imm8`.
    pub fn cmp32_mem_imm8(&mut self, mem: Mem, value: u8) {
        self.rm(false, &[0x83], 7, mem);
        self.u8(value);
    }

    /// `jcc rel32` with a zero displacement; returns the offset of the displacement.
    pub fn jcc(&mut self, condition: u8) -> usize {
        self.raw(&[0x0f, 0x80 | condition]);
        self.i32(0);
        self.len() - 4
    }

    /// `jmp rel32` with a zero displacement; returns the offset of the displacement.
    pub fn jmp(&mut self) -> usize {
        self.u8(0xe9);
        self.i32(0);
        self.len() - 4
    }

    /// `call rel32` with a zero displacement; returns the offset of the displacement.
    pub fn call(&mut self) -> usize {
        self.u8(0xe8);
        self.i32(0);
        self.len() - 4
    }

    /// `jecxz rel8`.
    pub fn jecxz(&mut self) -> usize {
        self.raw(&[0x67, 0xe3, 0]);
        self.len() - 1
    }

    /// Makes the rel8 at `at` jump to here.
    pub fn patch8(&mut self, at: usize) {
        self.bytes[at] = (self.len() - at - 1) as u8;
    }

    /// Makes the rel32 at `at` jump to here.
    pub fn patch32(&mut self, at: usize) {
        let rel = (self.len() - at - 4) as i32;
        self.bytes[at..at + 4].copy_from_slice(&rel.to_le_bytes());
    }

    pub fn jmp_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 4, mem);
    }

    pub fn call_mem(&mut self, mem: Mem) {
        self.rm(false, &[0xff], 2, mem);
    }

    pub fn push(&mut self, reg: Reg) {
        if reg >= 8 {
            self.u8(0x41);
        }
        self.u8(0x50 | (reg & 7));
    }

    pub fn pop(&mut self, reg: Reg) {
        self.touch(reg);
        if reg >= 8 {
            self.u8(0x41);
        }
        self.u8(0x58 | (reg & 7));
    }

    pub fn ret(&mut self) {
        self.u8(0xc3);
    }

    pub fn pushfq(&mut self) {
        self.u8(0x9c);
    }

    pub fn popfq(&mut self) {
        self.u8(0x9d);
    }

    /// Saves the six arithmetic flags to `gs:[slot]` (AH = SF ZF AF PF CF, AL = OF), using `temp`; flags stay as they are.
    pub fn save_flags(&mut self, slot: i32, temp: Reg) {
        self.mov(temp, RAX);
        self.u8(0x9f); // lahf
        self.raw(&[0x0f, 0x90, 0xc0]); // seto al
        self.store32(Mem::gs(slot), RAX);
        self.mov(RAX, temp);
    }

    /// The reverse of [`Asm::save_flags`].
    pub fn restore_flags(&mut self, slot: i32, temp: Reg) {
        self.mov(temp, RAX);
        self.load32(RAX, Mem::gs(slot));
        self.raw(&[0x04, 0x7f]); // add al, 0x7f: OF
        self.u8(0x9e); // sahf
        self.mov(RAX, temp);
    }

    /// `vmovdqu ymm, mem` or `vmovdqu mem, ymm`.
    pub fn vmovdqu(&mut self, ymm: u8, mem: Mem, store: bool) {
        self.vex(1, 2, u8::from(true), if store { 0x7f } else { 0x6f }, ymm, mem, None);
    }

    /// `vmovdqu xmm, mem` or `vmovdqu mem, xmm`.
    pub fn vmovdqu_xmm(&mut self, xmm: u8, mem: Mem, store: bool) {
        self.vex(1, 2, 0, if store { 0x7f } else { 0x6f }, xmm, mem, None);
    }

    /// `vextracti128 mem, ymm, 1`.
    pub fn vextract_high(&mut self, mem: Mem, ymm: u8) {
        self.vex(3, 1, 1, 0x39, ymm, mem, None);
        self.u8(1);
    }

    /// `vinserti128 ymm, ymm, mem, 1`.
    pub fn vinsert_high(&mut self, ymm: u8, mem: Mem) {
        self.vex(3, 1, 1, 0x38, ymm, mem, Some(ymm));
        self.u8(1);
    }

    /// `vpor ymm, ymm, other`.
    pub fn vpor(&mut self, ymm: u8, other: u8) {
        self.raw(&[0xc4, ((!(ymm >> 3) & 1) << 7) | 0x40 | ((!(other >> 3) & 1) << 5) | 1]);
        self.raw(&[((!ymm & 15) << 3) | 5, 0xeb, 0xc0 | ((ymm & 7) << 3) | (other & 7)]);
    }

    /// `vpor xmm, xmm, mem`.
    pub fn vpor_xmm(&mut self, xmm: u8, mem: Mem) {
        self.vex(1, 1, 0, 0xeb, xmm, mem, Some(xmm));
    }

    /// `vextracti128 xmm, ymm, 1` with the same register, below 8.
    pub fn vhigh(&mut self, ymm: u8) {
        self.raw(&[0xc4, 0xe3, 0x7d, 0x39, 0xc0 | (ymm << 3) | ymm, 1]);
    }

    /// `vptest xmm, xmm` of a register below 8.
    pub fn vptest_xmm(&mut self, xmm: u8) {
        self.raw(&[0xc4, 0xe2, 0x79, 0x17, 0xc0 | (xmm << 3) | xmm]);
    }

    pub fn vzeroupper(&mut self) {
        self.raw(&[0xc5, 0xf8, 0x77]);
    }

    /// A three-byte VEX instruction with a `gs:[disp32]` or based memory operand without extended base or index.
    #[allow(clippy::too_many_arguments)]
    fn vex(&mut self, map: u8, pp: u8, l: u8, op: u8, reg: u8, mem: Mem, source: Option<u8>) {
        debug_assert!(mem.base.is_none() && mem.index.is_none());
        if mem.gs {
            self.u8(0x65);
        }
        self.u8(0xc4);
        self.u8(((!(reg >> 3) & 1) << 7) | 0x60 | map);
        self.u8(((!source.unwrap_or(0) & 15) << 3) | (l << 2) | pp);
        self.u8(op);
        self.u8(((reg & 7) << 3) | 4);
        self.u8(0x25);
        self.i32(mem.disp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iced_x86::{Decoder, DecoderOptions};

    fn text(build: impl FnOnce(&mut Asm)) -> String {
        let mut asm = Asm::default();
        build(&mut asm);
        let mut decoder = Decoder::with_ip(64, &asm.bytes, 0, DecoderOptions::NONE);
        let mut out = Vec::new();
        while decoder.can_decode() {
            out.push(decoder.decode().to_string());
        }
        out.join("; ")
    }

    #[test]
    fn encodings() {
        assert_eq!(text(|a| a.load(R11, Mem::gs(0x1234))), "mov r11,gs:[1234h]");
        assert_eq!(text(|a| a.store(Mem::gs_base(R10, 8), RAX)), "mov gs:[r10+8],rax");
        assert_eq!(text(|a| a.lea(R11, Mem::sum(R9, R10, -8))), "lea r11,[r9+r10-8]");
        assert_eq!(text(|a| a.load(RBX, Mem::base(R12, 0))), "mov rbx,[r12]");
        assert_eq!(text(|a| a.load(RBX, Mem::base(R13, 0))), "mov rbx,[r13]");
        assert_eq!(
            text(|a| a.lea(R8, Mem { base: None, index: Some((R15, 8)), disp: 4, gs: false, addr32: false })),
            "lea r8,[r15*8+4]"
        );
        assert_eq!(text(|a| a.cmp_imm(R11, 4088)), "cmp r11,0FF8h");
        assert_eq!(text(|a| a.vmovdqu(12, Mem::gs(64), true)), "vmovdqu gs:[40h],ymm12");
        assert_eq!(text(|a| a.vmovdqu_xmm(3, Mem::gs(64), false)), "vmovdqu xmm3,gs:[40h]");
        assert_eq!(text(|a| a.vextract_high(Mem::gs(64), 9)), "vextracti128 gs:[40h],ymm9,1");
        assert_eq!(text(|a| a.vinsert_high(9, Mem::gs(64))), "vinserti128 ymm9,ymm9,gs:[40h],1");
        assert_eq!(text(|a| a.vpor(0, 13)), "vpor ymm0,ymm0,ymm13");
        assert_eq!(text(|a| a.vpor_xmm(2, Mem::gs(64))), "vpor xmm2,xmm2,gs:[40h]");
        assert_eq!(text(|a| a.vhigh(1)), "vextracti128 xmm1,ymm1,1");
        assert_eq!(text(|a| a.vptest_xmm(1)), "vptest xmm1,xmm1");
        assert_eq!(text(|a| a.mov_imm(R11, 0xffff_ffff_8100_0000)), "mov r11,0FFFFFFFF81000000h");
        assert_eq!(text(|a| a.mov_imm(RCX, 0x5555_0000_1000)), "mov rcx,555500001000h");
        assert_eq!(text(|a| a.store16(Mem::base(R11, 2), RDX)), "mov [r11+2],dx");
        assert_eq!(text(|a| a.cmp32_mem_imm8(Mem::gs(16), 0)), "cmp dword ptr gs:[10h],0");
        assert_eq!(text(|a| a.shr32(R10, 8)), "shr r10d,8");
        assert_eq!(text(|a| a.and32_imm(R10, 0xfff0)), "and r10d,0FFF0h");
        assert_eq!(text(|a| a.xor_mem(R11, Mem::gs_base(R10, 0x100))), "xor r11,gs:[r10+100h]");
    }
}
