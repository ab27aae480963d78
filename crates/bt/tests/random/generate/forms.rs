//! The instruction forms to choose from: what is supported, what is left out and why, by kind.

use iced_x86::{CpuidFeature, EncodingKind, FlowControl};

use super::*;

pub(super) fn supported(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086
        | F::INTEL8086_ONLY
        | F::INTEL186
        | F::INTEL286
        | F::INTEL386
        | F::INTEL486
        | F::X64
        | F::CMOV
        | F::CX8
        | F::FPU
        | F::FPU287
        | F::FPU387
        | F::FXSR
        | F::MMX
        | F::MULTIBYTENOP
        | F::PAUSE
        | F::SSE
        | F::SSE2
        | F::CLFSH => true,
        F::ADX => std::is_x86_feature_detected!("adx"),
        F::AES => std::is_x86_feature_detected!("aes"),
        F::AVX => std::is_x86_feature_detected!("avx"),
        F::AVX2 => std::is_x86_feature_detected!("avx2"),
        F::BMI1 => std::is_x86_feature_detected!("bmi1"),
        F::BMI2 => std::is_x86_feature_detected!("bmi2"),
        F::CMPXCHG16B => std::is_x86_feature_detected!("cmpxchg16b"),
        F::F16C => std::is_x86_feature_detected!("f16c"),
        F::FMA => std::is_x86_feature_detected!("fma"),
        F::GFNI => std::is_x86_feature_detected!("gfni"),
        F::LZCNT => std::is_x86_feature_detected!("lzcnt"),
        F::MOVBE => std::is_x86_feature_detected!("movbe"),
        F::PCLMULQDQ => std::is_x86_feature_detected!("pclmulqdq"),
        F::POPCNT => std::is_x86_feature_detected!("popcnt"),
        F::PREFETCHW => true, // a hint, or a NOP
        F::SHA => std::is_x86_feature_detected!("sha"),
        F::SSE3 => std::is_x86_feature_detected!("sse3"),
        F::SSE4_1 => std::is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => std::is_x86_feature_detected!("sse4.2"),
        F::SSSE3 => std::is_x86_feature_detected!("ssse3"),
        F::VAES => std::is_x86_feature_detected!("vaes"),
        F::VPCLMULQDQ => std::is_x86_feature_detected!("vpclmulqdq"),
        F::FSGSBASE => true, // the native side needs it anyway
        _ => false,
    }
}

/// Not used: answers differ by design (time, identification, system registers, host addresses in x87 environments), or there
/// are extra generators for it (branches, flags).
pub(super) fn excluded(code: Code) -> bool {
    use Mnemonic as M;
    matches!(
        code.mnemonic(),
        M::Int
            | M::Int1
            | M::Int3
            | M::Into
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Syscall
            | M::Sysenter
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Les
            | M::Lds
            | M::Lss
            | M::Lfs
            | M::Lgs
            | M::Ud0
            | M::Ud1
            | M::Ud2
            | M::In
            | M::Out
            | M::Insb
            | M::Insw
            | M::Insd
            | M::Outsb
            | M::Outsw
            | M::Outsd
            | M::Hlt
            | M::Cli
            | M::Sti
            | M::Fstsw
            | M::Fstcw
            | M::Finit
            | M::Fclex
            | M::Fdisi
            | M::Fndisi
            | M::Feni
            | M::Fneni
            | M::Fsetpm
            | M::Fnsetpm
            | M::Frstpm
            | M::Fstdw
            | M::Fnstdw
            | M::Fstsg
            | M::Fnstsg
            | M::Bound
            | M::Arpl
            | M::Loadall
            | M::Montmul
    ) || matches!(
        code,
        Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Mov_Sreg_r64m16
            | Code::Popw_FS
            | Code::Popw_GS
            | Code::Popq_FS
            | Code::Popq_GS
            | Code::Popd_FS
            | Code::Popd_GS
            // Of registers, prefetches of this opcode are no instructions of AMD's CPUs.
            | Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    ) || (matches!(code.mnemonic(), M::Ldmxcsr | M::Vldmxcsr) && interp::host_flags::more_mxcsr_bits())
}

pub(super) fn kind_of(code: Code) -> Kind {
    use CpuidFeature as F;
    use Mnemonic as M;
    let mut probe = Instruction::default();
    probe.set_code(code);
    if probe.is_string_instruction() {
        return Kind::Text;
    }
    if matches!(code.mnemonic(), M::Push | M::Pop | M::Leave | M::Enter | M::Pushf | M::Pushfq) {
        return Kind::Stack;
    }
    let features = code.cpuid_features();
    if features.iter().any(|f| matches!(f, F::FPU | F::FPU287 | F::FPU387 | F::MMX)) {
        return Kind::X87;
    }
    let vector = |f: &F| {
        !matches!(
            f,
            F::INTEL8086
                | F::INTEL8086_ONLY
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::CMOV
                | F::CX8
                | F::ADX
                | F::BMI1
                | F::BMI2
                | F::CMPXCHG16B
                | F::LZCNT
                | F::MOVBE
                | F::POPCNT
                | F::MULTIBYTENOP
                | F::PAUSE
                | F::PREFETCHW
                | F::FSGSBASE
                | F::CLFSH
        )
    };
    if features.iter().any(vector) { Kind::Vector } else { Kind::Integer }
}

impl Generator {
    pub fn new() -> Self {
        let mut by_mnemonic: Vec<(Kind, Mnemonic, Vec<Template>)> = Vec::new();
        for code in Code::values() {
            let info = code.op_code();
            let encoding = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX);
            if code == Code::INVALID
                || !info.mode64()
                || !info.is_instruction()
                || !encoding
                || code.flow_control() != FlowControl::Next
                || code.is_privileged()
                || excluded(code)
                || !code.cpuid_features().iter().all(|&f| supported(f))
            {
                continue;
            }
            let operands: Vec<K> = (0..info.op_count()).map(|i| info.op_kind(i)).collect();
            let template = Template { code, operands, lock: info.can_use_lock_prefix() };
            let kind = kind_of(code);
            match by_mnemonic.iter_mut().find(|(k, m, _)| *k == kind && *m == code.mnemonic()) {
                Some((_, _, list)) => list.push(template),
                None => by_mnemonic.push((kind, code.mnemonic(), vec![template])),
            }
        }
        use Mnemonic as M;
        let often = [
            M::Mov,
            M::Add,
            M::Sub,
            M::Cmp,
            M::Test,
            M::And,
            M::Or,
            M::Xor,
            M::Lea,
            M::Movzx,
            M::Movsx,
            M::Movsxd,
            M::Inc,
            M::Dec,
            M::Shl,
            M::Shr,
            M::Sar,
            M::Rol,
            M::Ror,
            M::Rcl,
            M::Rcr,
            M::Adc,
            M::Sbb,
            M::Bt,
            M::Bts,
            M::Btr,
            M::Btc,
            M::Imul,
            M::Mul,
            M::Xchg,
            M::Cmpxchg,
            M::Xadd,
            M::Shld,
            M::Shrd,
            M::Neg,
            M::Not,
            M::Cmove,
            M::Cmovl,
            M::Cmovae,
            M::Sete,
            M::Setg,
            M::Setb,
            M::Bsf,
            M::Bsr,
        ];
        let mut groups: HashMap<Kind, Vec<Vec<Template>>> = HashMap::new();
        let mut common = Vec::new();
        for (kind, mnemonic, list) in by_mnemonic {
            let group = groups.entry(kind).or_default();
            if kind == Kind::Integer && often.contains(&mnemonic) {
                common.push(group.len());
            }
            group.push(list);
        }
        let sensitive = [
            Code::Cli,
            Code::Sti,
            Code::Hlt,
            Code::In_AL_DX,
            Code::In_EAX_imm8,
            Code::Out_DX_AL,
            Code::Out_DX_EAX,
            Code::Insb_m8_DX,
            Code::Outsd_DX_m32,
            Code::Mov_r64_cr,
            Code::Mov_cr_r64,
            Code::Mov_r64_dr,
            Code::Rdmsr,
            Code::Wrmsr,
            Code::Clts,
            Code::Wbinvd,
            Code::Invd,
            Code::Invlpg_m,
            Code::Lgdt_m1664,
            Code::Lidt_m1664,
            Code::Lldt_rm16,
            Code::Ltr_rm16,
            Code::Lmsw_rm16,
            Code::Swapgs,
            Code::Int_imm8,
            Code::Int3,
            Code::Ud2,
        ]
        .map(|code| {
            let info = code.op_code();
            let operands = (0..info.op_count()).map(|i| info.op_kind(i)).collect();
            vec![Template { code, operands, lock: false }]
        });
        groups.insert(Kind::Sensitive, sensitive.into());
        Self { groups, common, factory: InstructionInfoFactory::new() }
    }

    /// How many instruction forms there are.
    pub fn forms(&self) -> usize {
        self.groups.values().flatten().map(Vec::len).sum()
    }
}
