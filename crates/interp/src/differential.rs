//! Random integer instructions by hand-written code and by the host CPU (through the native assist) must agree.

use std::sync::Arc;

use cpu::Nothing;
use cpu::cpuid::CpuidModel;
use cpu::{CpuState, Exception, rflags};
use iced_x86::{Mnemonic, OpKind};
use memory::GuestRam;

use crate::decode::{Decoded, Insn, decode};
use crate::interp::{Interp, NoHooks, Outcome};
use crate::native;
use crate::ops::{Cx, Handler};

/// A vCPU in 64-bit mode with the first GiB mapped one to one.
pub(crate) fn machine() -> (Interp, CpuState) {
    let ram = GuestRam::new(32 << 20).unwrap();
    assert!(ram.write(0x1000, &0x2003u64.to_le_bytes()));
    assert!(ram.write(0x2000, &0x83u64.to_le_bytes()));
    let interp = Interp::new(Nothing::setup(), ram, Arc::new(CpuidModel::new(1, 2_000_000)));
    let mut state = CpuState::default();
    state.enter_long_mode(0x1000, 0x10, 0x18);
    (interp, state)
}

/// Xorshift: the same sequence every time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A value of the kinds that find mistakes.
    fn value(&mut self) -> u64 {
        let r = self.next();
        match r % 8 {
            0 => 0,
            1 => u64::MAX,
            2 => 1 << (r >> 8 & 63),
            3 => (1u64 << (r >> 8 & 63)).wrapping_sub(1),
            4 => self.next() & 0xff,
            5 => u64::from(self.next() as u32),
            _ => self.next(),
        }
    }
}

/// Instructions both sides can do: no implied memory, nothing sensitive.
fn comparable(insn: &Insn) -> bool {
    use Mnemonic as M;
    let raw = &insn.raw;
    let memory = raw.op0_kind() == OpKind::Memory;
    let hand_written = match raw.mnemonic() {
        M::Mov => {
            let general = |i: u32| raw.op_kind(i) != OpKind::Register || raw.op_register(i).is_gpr();
            general(0) && general(1)
        }
        M::Bt | M::Bts | M::Btr | M::Btc => !memory || insn.src == crate::decode::Op::Imm,
        M::Bswap => insn.size > 2,
        M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Lahf
        | M::Sahf
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Add
        | M::Or
        | M::Adc
        | M::Sbb
        | M::And
        | M::Sub
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Mul
        | M::Imul
        | M::Div
        | M::Idiv
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Clc
        | M::Stc
        | M::Cmc => true,
        _ => {
            raw.condition_code() != iced_x86::ConditionCode::None
                && insn.dst != crate::decode::Op::Imm
                && matches!(raw.op_count(), 1 | 2)
                && raw.op0_kind() != OpKind::NearBranch64
        }
    };
    hand_written && !insn.lock
}

fn execute(
    interp: &mut Interp,
    state: &mut CpuState,
    insn: &Insn,
    handler: Handler,
) -> (Result<(), Exception>, Option<Outcome>) {
    let mut hooks = NoHooks;
    let mut cx = Cx {
        next: state.rip.wrapping_add(u64::from(insn.len)),
        user: false,
        shadow: false,
        no_trap: false,
        debug_trap: false,
        keep_rf: false,
        outcome: None,
        it: interp,
        st: state,
        hooks: &mut hooks,
    };
    let result = handler(&mut cx, insn);
    (result, cx.outcome)
}

const DATA: u64 = 0x40_0000;

#[test]
fn hand_written_and_native_agree() {
    let wanted: u64 = std::env::var("DIFFERENTIAL").ok().and_then(|v| v.parse().ok()).unwrap_or(400_000);
    let mut random = Random(0x1234_5678_9abc_def1);
    let (mut interp, mut state) = machine();
    let ram = interp.mmu.ram.clone();
    let mut done = 0u64;
    let mut kinds = std::collections::BTreeMap::new();
    while done < wanted {
        let mut bytes = [0u8; 15];
        for byte in &mut bytes {
            *byte = random.next() as u8;
        }
        let mut at = 0;
        let r = random.next();
        if r.is_multiple_of(5) {
            bytes[at] = 0x66;
            at += 1;
        }
        if (r / 5).is_multiple_of(2) {
            bytes[at] = 0x40 | (r >> 8) as u8 & 15;
            at += 1;
        }
        if (r / 10).is_multiple_of(3) {
            bytes[at] = 0x0f;
        }
        let Ok(Decoded::Insn(insn)) = decode(&bytes, 0x1000_0000) else { continue };
        if !comparable(&insn) {
            continue;
        }
        // The same instruction a few times, with other values.
        for _ in 0..4 {
            for register in &mut state.gpr {
                *register = random.value();
            }
            state.rip = 0x1000_0000;
            state.rflags = rflags::FIXED | (random.next() & rflags::ARITH);
            let mut address = 0;
            let has_memory = (0..insn.raw.op_count()).any(|i| insn.raw.op_kind(i) == OpKind::Memory);
            if has_memory && insn.raw.mnemonic() != Mnemonic::Lea {
                if insn.mem.base >= 16 || insn.mem.addr32 || insn.mem.segment != 0 || insn.mem.base == insn.mem.index {
                    break;
                }
                // Steer the base so that the operand is in the data area, also across pages.
                let probe = Cx {
                    next: 0,
                    user: false,
                    shadow: false,
                    no_trap: false,
                    debug_trap: false,
                    keep_rf: false,
                    outcome: None,
                    it: &mut interp,
                    st: &mut state,
                    hooks: &mut NoHooks,
                };
                let now = probe.address(&insn.mem);
                address = DATA
                    + if random.next().is_multiple_of(4) { 4096 - random.next() % 16 } else { random.next() % 4096 };
                if insn.raw.mnemonic() == Mnemonic::Cmpxchg16b {
                    address &= !15;
                }
                let base = &mut state.gpr[usize::from(insn.mem.base)];
                *base = base.wrapping_add(address.wrapping_sub(now));
                for i in 0..4 {
                    assert!(ram.write(address + i * 8, &random.value().to_le_bytes()));
                }
            }
            let mut before = [0; 48];
            let mut by_hand = [0; 48];
            let mut by_cpu = [0; 48];
            let window = address.saturating_sub(16);
            assert!(ram.read(window, &mut before));
            // All flags, also those that the manual leaves undefined.
            let (mut a, mut b) = (state.clone(), state.clone());
            let (result_a, _) = execute(&mut interp, &mut a, &insn, insn.run);
            assert!(ram.read(window, &mut by_hand));
            assert!(ram.write(window, &before));
            let (result_b, outcome) = execute(&mut interp, &mut b, &insn, native::run);
            if let Some(outcome) = outcome {
                panic!("{}: {outcome:?}", insn.raw);
            }
            assert!(ram.read(window, &mut by_cpu));
            let context = || {
                format!(
                    "{} {:02x?} with {:x?} flags {:x}",
                    insn.raw,
                    bytes.get(..usize::from(insn.len)),
                    state.gpr,
                    state.rflags
                )
            };
            assert_eq!(result_a, result_b, "{}", context());
            if result_a.is_ok() {
                assert_eq!((a.gpr, a.rflags), (b.gpr, b.rflags), "{}", context());
            }
            assert_eq!(by_hand, by_cpu, "{}", context());
            done += 1;
        }
        *kinds.entry(format!("{:?}", insn.raw.mnemonic())).or_insert(0u64) += 1;
    }
    for kind in [
        "Add", "Sbb", "Imul", "Idiv", "Div", "Mul", "Shl", "Sar", "Rol", "Ror", "Cmpxchg", "Xadd", "Bts", "Movsx",
        "Setb",
    ] {
        assert!(kinds.contains_key(kind), "{kind} never came up: {kinds:?}");
    }
}

/// Guests see the sixteen bits of MXCSR that all CPUs have, whatever the host's.
#[test]
fn mxcsr_mask_is_the_models() {
    let (mut interp, mut state) = machine();
    state.cr4 |= cpu::cr4::OSFXSR;
    let Ok(Decoded::Insn(insn)) = decode(&[0x66, 0x0f, 0xfc, 0xc1, 0x90], 0x1000_0000) else {
        panic!("paddb xmm0, xmm1")
    };
    let (result, _) = execute(&mut interp, &mut state, &insn, native::run);
    assert_eq!(result, Ok(()));
    assert_eq!(state.fp.bytes.get(28..32), Some(&[0xff, 0xff, 0, 0][..]));
}
