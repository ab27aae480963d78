//! The registers gdb sees: those it knows of x86-64 by itself, then the segment bases and control registers a kernel's debugger wants.

use std::fmt::Write as _;
use std::sync::OnceLock;

use cpu::{CpuState, FpState, SegmentIndex, gpr};
use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub_arch::x86::reg::X86_64CoreRegs;

/// gdb's order of the general registers, as indices into [`CpuState::gpr`].
const GPR_ORDER: [usize; 16] = [
    gpr::RAX,
    gpr::RBX,
    gpr::RCX,
    gpr::RDX,
    gpr::RSI,
    gpr::RDI,
    gpr::RBP,
    gpr::RSP,
    gpr::R8,
    gpr::R9,
    gpr::R10,
    gpr::R11,
    gpr::R12,
    gpr::R13,
    gpr::R14,
    gpr::R15,
];

/// Names of the registers beyond the usual, 64 bits each, in the order of [`GuestRegisters::system`].
const SYSTEM: [&str; 8] = ["fs_base", "gs_base", "k_gs_base", "cr0", "cr2", "cr3", "cr4", "efer"];

/// x86-64 with [`GuestRegisters`].
pub(crate) enum GuestArch {}

/// One vCPU's registers in gdb's order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct GuestRegisters {
    core: X86_64CoreRegs,
    system: [u64; SYSTEM.len()],
}

/// Registers are only read and written all at once.
#[derive(Debug)]
pub(crate) enum NoRegId {}

impl RegId for NoRegId {
    fn from_raw_id(_: usize) -> Option<(Self, Option<std::num::NonZeroUsize>)> {
        None
    }
}

impl Arch for GuestArch {
    type Usize = u64;
    type Registers = GuestRegisters;
    type BreakpointKind = usize;
    type RegId = NoRegId;

    fn target_description_xml() -> Option<&'static str> {
        static XML: OnceLock<String> = OnceLock::new();
        Some(XML.get_or_init(description))
    }
}

/// The target description (gdb manual, "Target Descriptions"; the names of features and registers are gdb's).
fn description() -> String {
    let mut xml = String::from(
        r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0"><architecture>i386:x86-64</architecture>"#,
    );
    let register = |xml: &mut String, name: &str, bits: u32, kind: &str| {
        let _ = write!(xml, r#"<reg name="{name}" bitsize="{bits}" type="{kind}"/>"#);
    };
    xml.push_str(r#"<feature name="org.gnu.gdb.i386.core">"#);
    xml.push_str(r#"<flags id="i386_eflags" size="4">"#);
    for (name, bit) in [
        ("CF", 0),
        ("PF", 2),
        ("AF", 4),
        ("ZF", 6),
        ("SF", 7),
        ("TF", 8),
        ("IF", 9),
        ("DF", 10),
        ("OF", 11),
        ("NT", 14),
        ("RF", 16),
        ("VM", 17),
        ("AC", 18),
        ("VIF", 19),
        ("VIP", 20),
        ("ID", 21),
    ] {
        let _ = write!(xml, r#"<field name="{name}" start="{bit}" end="{bit}"/>"#);
    }
    xml.push_str("</flags>");
    for name in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi"] {
        register(&mut xml, name, 64, "int64");
    }
    for name in ["rbp", "rsp"] {
        register(&mut xml, name, 64, "data_ptr");
    }
    for number in 8..16 {
        register(&mut xml, &format!("r{number}"), 64, "int64");
    }
    register(&mut xml, "rip", 64, "code_ptr");
    register(&mut xml, "eflags", 32, "i386_eflags");
    for name in ["cs", "ss", "ds", "es", "fs", "gs"] {
        register(&mut xml, name, 32, "int32");
    }
    for number in 0..8 {
        register(&mut xml, &format!("st{number}"), 80, "i387_ext");
    }
    for name in ["fctrl", "fstat", "ftag", "fiseg", "fioff", "foseg", "fooff", "fop"] {
        register(&mut xml, name, 32, "int");
    }
    xml.push_str(r#"</feature><feature name="org.gnu.gdb.i386.sse">"#);
    xml.push_str(
        r#"<vector id="v4f" type="ieee_single" count="4"/><vector id="v2d" type="ieee_double" count="2"/><vector id="v16i8" type="int8" count="16"/><vector id="v8i16" type="int16" count="8"/><vector id="v4i32" type="int32" count="4"/><vector id="v2i64" type="int64" count="2"/><union id="vec128"><field name="v4_float" type="v4f"/><field name="v2_double" type="v2d"/><field name="v16_int8" type="v16i8"/><field name="v8_int16" type="v8i16"/><field name="v4_int32" type="v4i32"/><field name="v2_int64" type="v2i64"/><field name="uint128" type="uint128"/></union>"#,
    );
    for number in 0..16 {
        register(&mut xml, &format!("xmm{number}"), 128, "vec128");
    }
    register(&mut xml, "mxcsr", 32, "int");
    xml.push_str(r#"</feature><feature name="org.gnu.gdb.i386.segments">"#);
    for (index, name) in SYSTEM.iter().enumerate() {
        if index == 2 {
            xml.push_str(r#"</feature><feature name="tightrope.system">"#);
        }
        register(&mut xml, name, 64, "int64");
    }
    xml.push_str("</feature></target>");
    xml
}

impl Registers for GuestRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.core.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.core.gdb_serialize(&mut write_byte);
        for byte in self.system.iter().flat_map(|value| value.to_le_bytes()) {
            write_byte(Some(byte));
        }
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.core.gdb_deserialize(bytes)?;
        let tail = bytes.len().checked_sub(SYSTEM.len() * 8).and_then(|start| bytes.get(start..)).ok_or(())?;
        for (value, bytes) in self.system.iter_mut().zip(tail.chunks_exact(8)) {
            *value = bytes.try_into().map(u64::from_le_bytes).map_err(|_| ())?;
        }
        Ok(())
    }
}

fn field<const N: usize>(fp: &FpState, offset: usize) -> [u8; N] {
    fp.bytes.get(offset..).and_then(|tail| tail.first_chunk()).copied().unwrap_or([0; N])
}

fn set_field(fp: &mut FpState, offset: usize, bytes: &[u8]) {
    if let Some(place) = fp.bytes.get_mut(offset..offset + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// The full x87 tag word from the abridged one (SDM volume 1, 10.5.1.1): 3 for empty, 0 for in use; gdb works out the rest.
fn full_tags(abridged: u8) -> u32 {
    (0..8).fold(0, |tags, i| tags | if abridged & (1 << i) == 0 { 3 << (2 * i) } else { 0 })
}

fn abridged_tags(full: u32) -> u8 {
    (0..8).fold(0, |tags, i| tags | if (full >> (2 * i)) & 3 == 3 { 0 } else { 1 << i })
}

impl GuestRegisters {
    /// The registers in `state`.
    pub(crate) fn from_state(state: &CpuState) -> Self {
        let mut core = X86_64CoreRegs::default();
        for (slot, index) in core.regs.iter_mut().zip(GPR_ORDER) {
            *slot = state.gpr[index];
        }
        core.rip = state.rip;
        core.eflags = state.rflags as u32;
        let selector = |index: SegmentIndex| u32::from(state.segments[index as usize].selector);
        core.segments.cs = selector(SegmentIndex::Cs);
        core.segments.ss = selector(SegmentIndex::Ss);
        core.segments.ds = selector(SegmentIndex::Ds);
        core.segments.es = selector(SegmentIndex::Es);
        core.segments.fs = selector(SegmentIndex::Fs);
        core.segments.gs = selector(SegmentIndex::Gs);
        for (i, st) in core.st.iter_mut().enumerate() {
            *st = field(&state.fp, FpState::ST + 16 * i);
        }
        for (i, xmm) in core.xmm.iter_mut().enumerate() {
            *xmm = u128::from_le_bytes(field(&state.fp, FpState::XMM + 16 * i));
        }
        core.mxcsr = state.fp.mxcsr();
        let word = |offset| u32::from(u16::from_le_bytes(field(&state.fp, offset)));
        let dword = |offset| u32::from_le_bytes(field(&state.fp, offset));
        core.fpu.fctrl = word(0);
        core.fpu.fstat = word(2);
        core.fpu.ftag = full_tags(state.fp.bytes[4]);
        core.fpu.fop = word(6);
        core.fpu.fioff = dword(8);
        core.fpu.fiseg = dword(12);
        core.fpu.fooff = dword(16);
        core.fpu.foseg = dword(20);
        let base = |index: SegmentIndex| state.segments[index as usize].base;
        let system = [
            base(SegmentIndex::Fs),
            base(SegmentIndex::Gs),
            state.kernel_gs_base,
            state.cr0,
            state.cr2,
            state.cr3,
            state.cr4,
            state.efer,
        ];
        Self { core, system }
    }

    /// Writes into `state` what a debugger may change: general registers, RIP, the arithmetic and direction flags and TF, x87, SSE and
    /// the segment bases. Selectors and control registers stay: changing them takes more than a number.
    pub(crate) fn into_state(self, state: &mut CpuState) {
        for (value, index) in self.core.regs.iter().zip(GPR_ORDER) {
            state.gpr[index] = *value;
        }
        state.rip = self.core.rip;
        let changeable = cpu::rflags::ARITH | cpu::rflags::DF | cpu::rflags::IF | cpu::rflags::TF;
        state.rflags = state.rflags & !changeable | u64::from(self.core.eflags) & changeable;
        for (i, st) in self.core.st.iter().enumerate() {
            set_field(&mut state.fp, FpState::ST + 16 * i, st);
        }
        for (i, xmm) in self.core.xmm.iter().enumerate() {
            set_field(&mut state.fp, FpState::XMM + 16 * i, &xmm.to_le_bytes());
        }
        // Bits beyond these would make the host's XRSTOR fault.
        set_field(&mut state.fp, FpState::MXCSR, &(self.core.mxcsr & 0xffff).to_le_bytes());
        set_field(&mut state.fp, FpState::FCW, &(self.core.fpu.fctrl as u16).to_le_bytes());
        set_field(&mut state.fp, 2, &(self.core.fpu.fstat as u16).to_le_bytes());
        set_field(&mut state.fp, 4, &[abridged_tags(self.core.fpu.ftag)]);
        let [fs, gs, kernel_gs, ..] = self.system;
        state.segments[SegmentIndex::Fs as usize].base = fs;
        state.segments[SegmentIndex::Gs as usize].base = gs;
        state.kernel_gs_base = kernel_gs;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let mut state = CpuState::default();
        for (i, value) in state.gpr.iter_mut().enumerate() {
            *value = 0x1111_1111_1111_1111 * i as u64;
        }
        state.rip = 0xffff_ffff_8100_0000;
        state.rflags |= cpu::rflags::IF | cpu::rflags::NT;
        state.fp.bytes[FpState::XMM + 17] = 0xab;
        state.fp.bytes[FpState::ST] = 0xcd;
        state.fp.bytes[4] = 0b1000_0001;
        state.kernel_gs_base = 77;
        let mut bytes = Vec::new();
        GuestRegisters::from_state(&state).gdb_serialize(|byte| bytes.push(byte.unwrap_or(0)));
        let mut registers = GuestRegisters::default();
        registers.gdb_deserialize(&bytes).unwrap();
        let mut copy = CpuState { rflags: state.rflags & !cpu::rflags::IF, ..CpuState::default() };
        registers.into_state(&mut copy);
        assert_eq!(copy.gpr, state.gpr);
        assert_eq!((copy.rip, copy.rflags, copy.kernel_gs_base), (state.rip, state.rflags, 77));
        assert_eq!(copy.fp.bytes[..], state.fp.bytes[..]);
        assert!(registers_too_short());
    }

    fn registers_too_short() -> bool {
        GuestRegisters::default().gdb_deserialize(&[0; 20]).is_err()
    }

    #[test]
    fn description_lists_as_many_bytes_as_are_sent() {
        let xml = GuestArch::target_description_xml().unwrap();
        let bits: usize =
            xml.split("bitsize=\"").skip(1).map(|rest| rest.split('"').next().unwrap().parse::<usize>().unwrap()).sum();
        let mut bytes = 0;
        GuestRegisters::default().gdb_serialize(|_| bytes += 1);
        assert_eq!(bits / 8, bytes);
    }
}
