//! Start states, and what is compared of final ones.

use cpu::{CpuState, FpState, rflags};
use iced_x86::{Code, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::guest::{KERNEL, KERNEL_PAGES};
use crate::layout::{ALIAS, BACKING, Layout, Memory, PAGE};
use crate::rng::Rng;

/// Registers before a run.
#[derive(Clone)]
pub struct Start {
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs: u64,
    pub gs: u64,
    pub fp: FpState,
}

/// Why a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stop {
    /// At the end of the program.
    End,
    /// An exception; CR2 is 0 unless it is a page fault.
    Fault { vector: u8, error: u64, cr2: u64 },
    /// The engine could not go on, and RIP is where: always a difference.
    Stranded(String),
    /// It did not end; or a wild jump led into a system call.
    Useless(&'static str),
}

/// State after a run.
#[derive(Clone)]
pub struct Final {
    pub stop: Stop,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fp: FpState,
}

/// The role a general register has at the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Points into the data area.
    Pointer,
    /// Points into the data area at a multiple of 32.
    Aligned,
    /// Points into the stack area.
    Stack,
    /// Small, of either sign.
    Small,
    /// Anything.
    Any,
}

/// A pointer into the data area, mostly to writable pages and sometimes close to a page's end.
pub fn data_pointer(rng: &mut Rng, layout: Layout, alias: bool) -> u64 {
    let page = match rng.below(64) {
        0 => 2,
        1..=4 => 4,
        5..=15 if alias => ALIAS,
        _ => rng.pick(&[0, 0, 0, 1, 3, 5]),
    };
    let offset = match rng.below(24) {
        0 => PAGE - 1 - rng.below(72),
        1 => rng.below(72),
        2..=7 => rng.below(PAGE),
        8..=15 => rng.below(PAGE / 8) * 8,
        _ => rng.below(PAGE / 32) * 32,
    };
    layout.data + page * PAGE + offset
}

impl Start {
    /// A random start state.
    pub fn random(rng: &mut Rng, layout: Layout, roles: &[Role; 16], alias: bool, rip: u64, user: bool) -> Self {
        let mut gpr = [0; 16];
        for (value, role) in gpr.iter_mut().zip(roles) {
            *value = match role {
                Role::Pointer => data_pointer(rng, layout, alias),
                Role::Aligned => data_pointer(rng, layout, alias) & !31,
                Role::Stack => {
                    let offset = match rng.below(20) {
                        0 => rng.below(64),
                        1 => 2 * PAGE - rng.below(64),
                        2 => PAGE + rng.below(64) - 32,
                        3 => rng.below(2 * PAGE),
                        _ => 0x400 + rng.below(0x180) * 16,
                    };
                    layout.stack + PAGE + offset
                }
                Role::Small => (rng.below(96) as i64 - 32) as u64,
                Role::Any => rng.interesting(),
            };
        }
        let mut flags = rng.next() & (rflags::ARITH) | rflags::FIXED;
        if rng.chance(25) {
            flags |= rflags::DF;
        }
        if user {
            flags |= rflags::IF;
        }
        Self {
            gpr,
            rip,
            rflags: flags,
            fs: data_pointer(rng, layout, alias) & !7,
            gs: data_pointer(rng, layout, alias) & !7,
            fp: random_fp(rng),
        }
    }
}

fn random_fp(rng: &mut Rng) -> FpState {
    let mut fp = FpState::default();
    let b = &mut fp.bytes;
    // MXCSR: mostly all exceptions masked.
    let mut mxcsr = 0x1f80_u32;
    if rng.chance(40) {
        mxcsr |= (rng.next() as u32) & 0xe07f;
    }
    if rng.chance(8) {
        mxcsr &= !((rng.next() as u32) & 0x1f80);
    }
    b[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    // x87: mostly as after FNINIT, with something in the registers.
    let mut control = 0x37f_u16;
    if rng.chance(30) {
        control = (control & !0xf00) | (rng.pick(&[0, 2, 3]) << 8) | ((rng.below(4) as u16) << 10);
    }
    if rng.chance(5) {
        control &= !(rng.next() as u16 & 0x3f);
    }
    b[0..2].copy_from_slice(&control.to_le_bytes());
    let mut status = (rng.next() as u16) & 0x7f00;
    if rng.chance(50) {
        status = 0;
    }
    if control & 0x3f == 0x3f && rng.chance(30) {
        status |= rng.next() as u16 & 0x7f;
    }
    b[2..4].copy_from_slice(&status.to_le_bytes());
    b[4] = match rng.below(4) {
        0 => 0,
        1 => 0xff,
        _ => rng.next() as u8,
    };
    for i in 0..8 {
        let (mantissa, exponent) = match rng.below(8) {
            0 => (rng.next(), rng.next() as u16),
            1 => (rng.pick(&[0, 1 << 63, 3 << 62, u64::MAX, 1]), rng.pick(&[0, 0x7fff, 0x8000, 0xffff, 0x3fff, 1])),
            2 => (rng.next(), 0xffff), // an MMX value
            _ => (rng.next() | 1 << 63, (0x3fff - 40 + rng.below(80) as u16) | (rng.next() as u16 & 0x8000)),
        };
        let at = FpState::ST + 16 * i;
        b[at..at + 8].copy_from_slice(&mantissa.to_le_bytes());
        b[at + 8..at + 10].copy_from_slice(&exponent.to_le_bytes());
    }
    for i in 0..16 {
        for half in [FpState::XMM, FpState::YMM_HIGH] {
            let at = half + 16 * i;
            b[at..at + 8].copy_from_slice(&rng.lane().to_le_bytes());
            b[at + 8..at + 16].copy_from_slice(&rng.lane().to_le_bytes());
        }
    }
    b[FpState::XSTATE_BV] = 7;
    fp
}

/// Random contents for memory.
pub struct Templates {
    pages: Vec<[u8; PAGE as usize]>,
}

impl Templates {
    pub fn new() -> Self {
        let mut rng = Rng::new(0x7e3a_1ab5);
        let pages = (0..64)
            .map(|_| {
                let mut page = [0; PAGE as usize];
                for chunk in page.chunks_exact_mut(8) {
                    chunk.copy_from_slice(&rng.lane().to_le_bytes());
                }
                page
            })
            .collect();
        Self { pages }
    }

    pub fn fill(&self, rng: &mut Rng, memory: &mut Memory) {
        for page in memory.iter_mut() {
            page.copy_from_slice(&self.pages[rng.below(64) as usize]);
            for _ in 0..16 {
                let at = rng.below(PAGE / 8) as usize * 8;
                page[at..at + 8].copy_from_slice(&rng.interesting().to_le_bytes());
            }
        }
    }
}

/// How strictly to compare.
#[derive(Clone, Copy)]
pub struct Strictness {
    /// Compare arithmetic flags even where the program ended by an exception.
    pub flags_at_faults: bool,
    /// The guest ran at level 3.
    pub user: bool,
    /// The instruction at which the CPU stopped.
    pub last: Instruction,
}

/// Flags that are compared. RF is not: exception frames show it or not by the kind of exception, and no program here reads it.
const FLAGS: u64 = rflags::ARITH | rflags::DF | rflags::NT | rflags::AC | rflags::ID | rflags::TF;

/// Addresses from here on belong to the host's kernel; for faults there Linux always reports the P bit.
const KERNEL_HALF: u64 = 0x7fff_ffff_f000;

/// All differences, one a line; native first. `None` when the two cannot be compared.
pub fn differences(native: &Final, guest: &Final, strictness: Strictness) -> Option<Vec<String>> {
    let mut out = Vec::new();
    if matches!(native.stop, Stop::Useless(_)) {
        return None;
    }
    if let Stop::Useless(why) = &guest.stop {
        return Some(vec![format!("native {:?}, translated: {why}", native.stop)]);
    }
    let mut native = native.clone();
    let mut guest = guest.clone();
    if tolerate(&mut native, &mut guest, strictness) {
        return None;
    }
    let (native, guest) = (&native, &guest);
    let mut expected = native.stop.clone();
    let mut got = guest.stop.clone();
    if let (Stop::Fault { vector: 14, error, cr2 }, Stop::Fault { vector: 14, error: other, .. }) =
        (&mut expected, &mut got)
    {
        if !strictness.user {
            *error &= !4;
        }
        if *cr2 >= KERNEL_HALF {
            *error &= !1;
            *other &= !1;
        }
    }
    if expected != got {
        out.push(format!(
            "stop: native {:x?} at {:#x}, translated {:x?} at {:#x}",
            expected, native.rip, got, guest.rip
        ));
    } else if native.rip != guest.rip {
        out.push(format!("rip: native {:#x}, translated {:#x}", native.rip, guest.rip));
    }
    for i in 0..16 {
        if native.gpr[i] != guest.gpr[i] {
            let name = Register::RAX + i as u32;
            out.push(format!("{name:?}: native {:#018x}, translated {:#018x}", native.gpr[i], guest.gpr[i]));
        }
    }
    let mut mask = FLAGS;
    if !strictness.flags_at_faults && native.stop != Stop::End {
        mask &= !rflags::ARITH;
    }
    if (native.rflags ^ guest.rflags) & mask != 0 {
        out.push(format!(
            "flags: native {}, translated {}",
            flag_names(native.rflags & mask),
            flag_names(guest.rflags & mask)
        ));
    }
    let (a, b) = (&native.fp.bytes, &guest.fp.bytes);
    let mut field = |name: String, range: std::ops::Range<usize>| {
        if a[range.clone()] != b[range.clone()] {
            let hex = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
            out.push(format!("{name}: native {}, translated {}", hex(&a[range.clone()]), hex(&b[range])));
        }
    };
    // Bytes 5 to 23 are not compared: the last x87 opcode, instruction pointer and operand pointer. The engine does not keep them
    // (a copied instruction leaves the host's addresses); nothing but debuggers and #MF handlers of the 1980s reads them.
    field("fcw".into(), 0..2);
    field("fsw".into(), 2..4);
    field("ftw".into(), 4..5);
    field("mxcsr".into(), 24..28);
    for i in 0..8 {
        field(format!("st/mm{i}"), 32 + 16 * i..42 + 16 * i);
    }
    for i in 0..16 {
        field(format!("xmm{i}"), 160 + 16 * i..176 + 16 * i);
        field(format!("ymm{i} high"), 576 + 16 * i..592 + 16 * i);
    }
    Some(out)
}

/// Takes differences away that are legitimate. Returns true where nothing is left to compare.
///
/// | where | what the CPU here does | what the engine does | why that is right |
/// |---|---|---|---|
/// | MASKMOVQ, MASKMOVDQU | faults for bytes that the mask leaves out | only for bytes it writes | up to the implementation (SDM volume 2) |
/// | MMX instruction that faults | may have set TOP to 0 already | leaves x87 alone | invisible once the instruction is repeated |
/// | FBSTP, FSTP of 10 bytes across pages | has stored the first part when the second faults | stores all or nothing | invisible once the instruction is repeated |
/// | x87 store with an unmasked exception | does not access memory | checks the memory first | no program unmasks and relies on it |
/// | FLDENV, FRSTOR, masked moves with a page fault | names any byte of the operand in CR2 | the first of the page | they read in an order of their own |
/// | VCVTPS2PH whose store faults | has set MXCSR's exception flags | has not | sticky, and set anyway once the instruction is repeated |
/// | CMPS, where both operands fault | reports one or the other (AMD) | the target | both come, one after the other |
/// | gather with a fault | has normalised its mask and loaded elements, or not | those before the one that faults | invisible once the instruction is repeated |
/// | near call to a non-canonical address | has pushed (Intel), has not (AMD) | has pushed | below the stack pointer |
/// | near branch to a non-canonical address | #GP at the branch | #GP at the target | the branch has left its block by then; Linux makes SIGSEGV of either |
fn tolerate(native: &mut Final, guest: &mut Final, strictness: Strictness) -> bool {
    let last = &strictness.last;
    let guest_fault = matches!(guest.stop, Stop::Fault { vector: 12..=14, .. });
    if guest_fault && native.fp.bytes[2] & 0x80 != 0 && guest.fp.bytes[2] & 0x80 == 0 {
        return true; // a store that did not happen: its exception is pending
    }
    let Stop::Fault { vector, .. } = native.stop else { return false };
    let same = matches!(guest.stop, Stop::Fault { vector: v, .. } if v == vector) && native.rip == guest.rip;
    if matches!(last.code(), Code::Fbstp_m80bcd | Code::Fstp_m80fp) && vector == 14 {
        return true;
    }
    if (native.stop != guest.stop || native.rip != guest.rip)
        && matches!(last.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu)
    {
        return true;
    }
    let mmx = |i| last.op_kind(i) == OpKind::Register && last.op_register(i).is_mm();
    if (0..last.op_count()).any(mmx) && same && native.fp.bytes[3] & 0x38 == 0 {
        let (n, g) = (&native.fp.bytes, &mut guest.fp.bytes);
        g[2..5].copy_from_slice(&n[2..5]);
        g[32..160].copy_from_slice(&n[32..160]);
    }
    if same
        && matches!(
            last.mnemonic(),
            Mnemonic::Fldenv
                | Mnemonic::Frstor
                | Mnemonic::Vmaskmovps
                | Mnemonic::Vmaskmovpd
                | Mnemonic::Vpmaskmovd
                | Mnemonic::Vpmaskmovq
        )
        && let (Stop::Fault { cr2: a, .. }, Stop::Fault { cr2: b, .. }) = (&native.stop, &mut guest.stop)
        && *a & !0xfff == *b & !0xfff
    {
        *b = *a;
    }
    if same && last.mnemonic() == Mnemonic::Vcvtps2ph {
        guest.fp.bytes[24] |= native.fp.bytes[24] & 0x3f;
    }
    if is_cmps(last) && native.rip == guest.rip && vector >= 13 && guest_fault {
        native.stop = guest.stop.clone();
    }
    // The guest's kernel has pages there.
    if !strictness.user
        && matches!(native.stop, Stop::Fault { cr2, .. } if cr2.wrapping_sub(KERNEL) < KERNEL_PAGES * PAGE)
    {
        return true;
    }
    if same && last.is_vsib() {
        for register in [last.op0_register(), last.op2_register()] {
            for at in [160, 576].map(|half| half + 16 * register.number()) {
                guest.fp.bytes[at..at + 16].copy_from_slice(&native.fp.bytes[at..at + 16]);
            }
        }
    }
    if matches!(last.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return)
        && native.stop == (Stop::Fault { vector: 13, error: 0, cr2: 0 })
        && guest.stop == native.stop
        && !cpu::paging::is_canonical(guest.rip)
    {
        guest.rip = native.rip;
        guest.gpr[4] = native.gpr[4];
    }
    false
}

fn is_cmps(ins: &Instruction) -> bool {
    matches!(ins.code(), Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64)
}

/// Differences in memory.
pub fn memory_differences(native: &Memory, guest: &Memory) -> Vec<String> {
    let mut out = Vec::new();
    for page in 0..BACKING {
        if native[page] == guest[page] {
            continue;
        }
        let different: Vec<usize> = (0..PAGE as usize).filter(|&i| native[page][i] != guest[page][i]).collect();
        let first = different[0] & !7;
        let end = (first + 40).min(PAGE as usize);
        out.push(format!(
            "memory page {page}, {} bytes from {:#x}: native {:02x?}, translated {:02x?}",
            different.len(),
            different[0],
            &native[page][first..end],
            &guest[page][first..end]
        ));
    }
    out
}

pub fn flag_names(flags: u64) -> String {
    let names = [
        (0, "CF"),
        (2, "PF"),
        (4, "AF"),
        (6, "ZF"),
        (7, "SF"),
        (8, "TF"),
        (10, "DF"),
        (11, "OF"),
        (14, "NT"),
        (18, "AC"),
    ];
    let set: Vec<&str> = names.iter().filter(|(bit, _)| flags & (1 << bit) != 0).map(|&(_, name)| name).collect();
    format!("[{}]", set.join(" "))
}

/// Brings a saved area into the form in which components in their initial state are spelled out.
pub fn normalise(fp: &mut FpState) {
    let present = fp.bytes[FpState::XSTATE_BV];
    let initial = FpState::default();
    if present & 1 == 0 {
        fp.bytes[0..24].copy_from_slice(&initial.bytes[0..24]);
        fp.bytes[32..160].fill(0);
    }
    if present & 2 == 0 {
        fp.bytes[160..416].fill(0);
    }
    if present & 4 == 0 {
        fp.bytes[576..832].fill(0);
    }
    fp.bytes[416..576].fill(0);
    fp.bytes[FpState::XSTATE_BV] = 7;
}

impl Final {
    /// From an engine's state.
    pub fn from_state(stop: Stop, state: &CpuState) -> Self {
        let mut fp = state.fp.clone();
        normalise(&mut fp);
        Self { stop, gpr: state.gpr, rip: state.rip, rflags: state.rflags, fp }
    }
}
