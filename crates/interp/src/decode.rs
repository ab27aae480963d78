//! Decoded instructions, and the cache that keeps them by guest-physical address and checks their bytes each time.

use std::cell::Cell;

use cpu::Exception;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, OpKind, Register};

use crate::native::Plan;
use crate::ops::{self, Handler};

/// Number of "no register" in [`Mem::base`] and [`Mem::index`].
pub(crate) const NONE: u8 = 16;
/// [`Mem::base`]: the address of the next instruction.
pub(crate) const RIP: u8 = 17;
/// Longest instruction in bytes.
pub(crate) const MAX_LENGTH: usize = 15;

/// Where an operand is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Op {
    None,
    /// A general register, its low part.
    Reg(u8),
    /// AH, CH, DH, BH: bits 8 to 15 of that register.
    High(u8),
    Mem,
    Imm,
}

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mem {
    pub(crate) base: u8,
    pub(crate) index: u8,
    /// Shift of the index, 0 to 3.
    pub(crate) scale: u8,
    /// 4 for FS, 5 for GS, otherwise no base is added.
    pub(crate) segment: u8,
    /// Address size 32: the sum is cut to 32 bits.
    pub(crate) addr32: bool,
    /// A stack-segment access: non-canonical means `#SS`.
    pub(crate) stack: bool,
    pub(crate) disp: u64,
}

/// Repeat prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rep {
    No,
    /// F3: REP, REPE.
    Equal,
    /// F2: REPNE.
    NotEqual,
}

/// A decoded instruction. Addresses relative to RIP are kept relative: the same physical code may run at several addresses.
pub(crate) struct Insn {
    pub(crate) run: Handler,
    pub(crate) len: u8,
    /// Size of the first operand in bytes.
    pub(crate) size: u8,
    /// Size of the second operand in bytes.
    pub(crate) size2: u8,
    pub(crate) lock: bool,
    pub(crate) rep: Rep,
    pub(crate) dst: Op,
    pub(crate) src: Op,
    /// Immediate, sign-extended; for branches, the distance from the next instruction.
    pub(crate) imm: u64,
    pub(crate) mem: Mem,
    pub(crate) raw: Instruction,
    /// How the native assist runs it.
    pub(crate) plan: Cell<Option<Plan>>,
}

/// Number of a 64-, 32-, 16- or low-8-bit general register.
pub(crate) fn gpr_number(register: Register) -> Option<u8> {
    if register.is_gpr() { Some(register.full_register().number() as u8) } else { None }
}

fn is_high(register: Register) -> bool {
    matches!(register, Register::AH | Register::CH | Register::DH | Register::BH)
}

impl Insn {
    fn new(raw: Instruction) -> Self {
        let next = raw.next_ip();
        let mut imm = 0;
        let mut op = |index: u32| {
            if index >= raw.op_count() {
                return (Op::None, 0);
            }
            match raw.op_kind(index) {
                OpKind::Register => {
                    let register = raw.op_register(index);
                    let size = register.size();
                    match gpr_number(register) {
                        Some(_) if is_high(register) => (Op::High((register as u32 - Register::AH as u32) as u8), size),
                        Some(number) => (Op::Reg(number), size),
                        None => (Op::None, size),
                    }
                }
                OpKind::Memory => (Op::Mem, raw.memory_size().size()),
                OpKind::NearBranch64 => {
                    imm = raw.near_branch64().wrapping_sub(next);
                    (Op::Imm, 8)
                }
                OpKind::Immediate8
                | OpKind::Immediate8to16
                | OpKind::Immediate8to32
                | OpKind::Immediate8to64
                | OpKind::Immediate16
                | OpKind::Immediate32
                | OpKind::Immediate32to64
                | OpKind::Immediate64 => {
                    imm = raw.immediate(index);
                    (Op::Imm, 0)
                }
                // The string operands: their handlers know them.
                _ => (Op::None, raw.memory_size().size()),
            }
        };
        let (dst, size) = op(0);
        let (src, size2) = op(1);
        op(2);
        let base = raw.memory_base();
        let index = raw.memory_index();
        let mem = Mem {
            base: if raw.is_ip_rel_memory_operand() { RIP } else { gpr_number(base).unwrap_or(NONE) },
            index: gpr_number(index).unwrap_or(NONE),
            scale: raw.memory_index_scale().trailing_zeros() as u8,
            segment: match raw.segment_prefix() {
                Register::FS => 4,
                Register::GS => 5,
                _ => 0,
            },
            // iced: an address without registers has a displacement of 4 bytes only with 32-bit addresses.
            addr32: base.size() == 4 || index.size() == 4 || (base == Register::None && raw.memory_displ_size() == 4),
            stack: matches!(base, Register::RSP | Register::ESP | Register::RBP | Register::EBP)
                && !matches!(raw.segment_prefix(), Register::FS | Register::GS),
            disp: if raw.is_ip_rel_memory_operand() {
                raw.memory_displacement64().wrapping_sub(next)
            } else {
                raw.memory_displacement64()
            },
        };
        Self {
            run: ops::select(&raw),
            len: raw.len() as u8,
            size: size as u8,
            size2: size2 as u8,
            lock: raw.has_lock_prefix(),
            rep: match (raw.has_repe_prefix(), raw.has_repne_prefix()) {
                (true, _) => Rep::Equal,
                (_, true) => Rep::NotEqual,
                _ => Rep::No,
            },
            dst,
            src,
            imm,
            mem,
            raw,
            plan: Cell::new(None),
        }
    }
}

/// What [`decode`] can say of a piece of code.
pub(crate) enum Decoded {
    Insn(Box<Insn>),
    /// The bytes end before the instruction does.
    NeedMore,
}

/// Decodes the instruction at the start of `bytes`, which lies at linear address `rip`.
///
/// # Errors
/// `#UD` for what is no instruction, `#GP(0)` for one of more than 15 bytes.
pub(crate) fn decode(bytes: &[u8], rip: u64) -> Result<Decoded, Exception> {
    let mut decoder = Decoder::with_ip(64, bytes, rip, DecoderOptions::NONE);
    let raw = decoder.decode();
    match decoder.last_error() {
        DecoderError::None if raw.code() != Code::INVALID => Ok(Decoded::Insn(Box::new(Insn::new(raw)))),
        DecoderError::NoMoreBytes if bytes.len() < MAX_LENGTH => Ok(Decoded::NeedMore),
        // Prefixes without end look invalid to the decoder.
        _ if decoder.position() >= MAX_LENGTH => Err(Exception::gp(0)),
        _ => Err(Exception::ud()),
    }
}

/// Slots of the cache; a power of two.
const SLOTS: usize = 1 << 15;

struct Slot {
    gpa: u64,
    bytes: u128,
    mask: u128,
    insn: Insn,
}

/// Decoded instructions by guest-physical address.
#[derive(Default)]
pub(crate) struct DecodeCache {
    slots: Vec<Option<Box<Slot>>>,
}

impl DecodeCache {
    pub(crate) fn new() -> Self {
        Self { slots: (0..SLOTS).map(|_| None).collect() }
    }

    fn index(gpa: u64) -> usize {
        (gpa ^ gpa >> 15) as usize % SLOTS
    }

    /// The instruction at `gpa`, if it is cached and its bytes still begin `bytes`.
    #[inline(always)]
    pub(crate) fn get(&self, gpa: u64, bytes: u128) -> Option<&Insn> {
        let slot = self.slots.get(Self::index(gpa))?.as_deref()?;
        (slot.gpa == gpa && (slot.bytes ^ bytes) & slot.mask == 0).then_some(&slot.insn)
    }

    /// Puts an instruction in and gives it back.
    pub(crate) fn put(&mut self, gpa: u64, bytes: u128, insn: Insn) -> Option<&Insn> {
        let mask = (1u128 << (u32::from(insn.len) * 8)) - 1;
        let slot = self.slots.get_mut(Self::index(gpa))?;
        Some(&slot.insert(Box::new(Slot { gpa, bytes: bytes & mask, mask, insn })).insn)
    }
}
