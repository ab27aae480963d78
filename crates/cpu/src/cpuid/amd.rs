//! The AMD form of the model: its leaves that differ from Intel's (APM volume 3, appendix E).
//!
//! A guest that sees it calls its host by VMMCALL, guards itself against what AMD's CPUs are vulnerable to, and knows how SYSRET leaves SS.
//! By itself the model is that of a Zen 4 server part which says that it is not vulnerable; engine `kvm` puts the host's family, model and
//! stepping in its place, and takes away what the host's KVM does not tell of that CPU.
//!
//! Not shown: SVM, SSE4a, XOP, CLZERO, RDPRU, WBNOINVD, monitoring, memory encryption, extended topology (the APIC id is the core's number),
//! performance counters.

use super::{CpuidModel, Features, leaf7_edx, text_leaf};
use crate::msr as n;

/// Family 0x19, model 0x11, stepping 1.
pub const SIGNATURE: u32 = 0x00a1_0f11;
/// The highest basic and extended leaves.
const BASIC: u32 = 0xd;
const EXTENDED: u32 = 0x8000_0021;
/// Bits of leaf 1, EDX, that leaf 0x8000_0001, EDX, has as well.
const ALIASES: u32 = 0x0183_f3ff;
/// Leaf 0x8000_0001, EDX: AMD's extensions of MMX, a part of SSE.
const MMXEXT: u32 = 1 << 22;
/// Leaf 0x8000_0001, ECX: logical processors of a package are cores.
const CMP_LEGACY: u32 = 1 << 1;

/// Bits of NB_CFG, HWCR and DE_CFG.
const ENABLE_CF8_EXT_CFG: u64 = 1 << 46;
const TSC_FREQ_SEL: u64 = 1 << 24;
const LFENCE_SERIALIZE: u64 = 1 << 1;

/// Feature bits of leaf 0x8000_0008, EBX.
#[allow(missing_docs)]
pub mod leaf8_ebx {
    pub const XSAVEERPTR: u32 = 1 << 2;
    pub const IBPB: u32 = 1 << 12;
    pub const IBRS: u32 = 1 << 14;
    pub const STIBP: u32 = 1 << 15;
    pub const IBRS_ALWAYS_ON: u32 = 1 << 16;
    pub const STIBP_ALWAYS_ON: u32 = 1 << 17;
    pub const IBRS_PREFERRED: u32 = 1 << 18;
    pub const IBRS_SAME_MODE: u32 = 1 << 19;
    pub const SSBD: u32 = 1 << 24;
    pub const SSB_NO: u32 = 1 << 26;
    pub const BTC_NO: u32 = 1 << 29;
    pub const IBPB_RET: u32 = 1 << 30;
}

/// Feature bits of leaf 0x8000_0021, EAX.
#[allow(missing_docs)]
pub mod leaf21_eax {
    pub const LFENCE_SERIALIZING: u32 = 1 << 2;
    pub const VERW_CLEAR: u32 = 1 << 5;
    pub const NULL_SELECTOR_CLEARS_BASE: u32 = 1 << 6;
    pub const AUTO_IBRS: u32 = 1 << 8;
    pub const SBPB: u32 = 1 << 27;
    pub const IBPB_BRTYPE: u32 = 1 << 28;
    pub const SRSO_NO: u32 = 1 << 29;
}

/// Feature bits of leaf 0x8000_0021, ECX.
#[allow(missing_docs)]
pub mod leaf21_ecx {
    pub const TSA_SQ_NO: u32 = 1 << 1;
    pub const TSA_L1_NO: u32 = 1 << 2;
}

/// RDMSR of a register that only AMD's CPUs have, the same under every engine; `None` is `#GP(0)`.
pub fn read_msr(msr: u32) -> Option<u64> {
    match msr {
        n::SYSCFG => Some(0),
        // The TSC runs at a constant rate.
        n::HWCR => Some(TSC_FREQ_SEL),
        // There is no northbridge to configure; Linux wants this bit on.
        n::NB_CFG => Some(ENABLE_CF8_EXT_CFG),
        // LFENCE waits for all before it.
        n::DE_CFG => Some(LFENCE_SERIALIZE),
        _ => None,
    }
}

/// WRMSR of such a register; `false` is `#GP(0)`. What they have stays.
pub fn write_msr(msr: u32, value: u64) -> bool {
    match msr {
        n::SYSCFG => value == 0,
        // Bits that have a meaning for performance or machine checks only.
        n::HWCR => value & !(TSC_FREQ_SEL | 1 << 3 | 1 << 6 | 1 << 8 | 1 << 18) == 0,
        n::NB_CFG => value & !ENABLE_CF8_EXT_CFG == 0,
        n::DE_CFG => value == LFENCE_SERIALIZE,
        _ => false,
    }
}

/// The baseline in AMD's form.
pub(super) fn features(baseline: Features) -> Features {
    use leaf8_ebx as e;
    use leaf21_eax as f;
    Features {
        // The others are Intel's.
        leaf7_edx: baseline.leaf7_edx & leaf7_edx::FSRM,
        extended_edx: baseline.extended_edx | baseline.leaf1_edx & ALIASES | MMXEXT,
        extended8_ebx: e::XSAVEERPTR
            | e::IBPB
            | e::IBRS
            | e::STIBP
            | e::IBRS_ALWAYS_ON
            | e::STIBP_ALWAYS_ON
            | e::IBRS_PREFERRED
            | e::IBRS_SAME_MODE
            | e::SSBD
            | e::SSB_NO
            | e::BTC_NO
            | e::IBPB_RET,
        extended21_eax: f::LFENCE_SERIALIZING
            | f::VERW_CLEAR
            | f::NULL_SELECTOR_CLEARS_BASE
            | f::AUTO_IBRS
            | f::SBPB
            | f::IBPB_BRTYPE
            | f::SRSO_NO,
        extended21_ecx: leaf21_ecx::TSA_SQ_NO | leaf21_ecx::TSA_L1_NO,
        ..baseline
    }
}

/// What `leaf` answers where that differs from Intel's form.
pub(super) fn leaf(model: &CpuidModel, leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let f = &model.features;
    Some(match leaf {
        0 => text_leaf(BASIC, b"AuthenticAMD"),
        // Reserved: caches are told by 0x8000_0005 and 0x8000_0006.
        2 | 4 => [0; 4],
        7 if subleaf == 0 => [0, f.leaf7_ebx, f.leaf7_ecx, f.leaf7_edx],
        7 => [0; 4],
        0x8000_0000 => text_leaf(EXTENDED, b"AuthenticAMD"),
        0x8000_0001 => {
            let legacy = if model.cpus > 1 { CMP_LEGACY } else { 0 };
            [model.signature, 0, f.extended_ecx | legacy, f.extended_edx]
        }
        // 64 entries of each TLB, fully associative; 32 KiB L1 data and 32 KiB L1 instructions, 8 ways, 64-byte lines.
        0x8000_0005 => [0xff40_ff40, 0xff40_ff40, 0x2008_0140, 0x2008_0140],
        // 1 MiB L2 a core, 8 ways; 32 MiB L3 for all, 16 ways.
        0x8000_0006 => [0, 0, 0x0400_6140, 64 << 18 | 0x8140],
        0x8000_0008 => {
            // The number of cores, less one, and how many bits of the APIC id number them.
            let cores = model.cpus.saturating_sub(1).min(255) | model.core_bits().min(15) << 12;
            [crate::paging::PHYSICAL_BITS | 48 << 8, f.extended8_ebx, cores, 0]
        }
        0x8000_0021 => [f.extended21_eax, 0, f.extended21_ecx, 0],
        // Beyond the highest leaf there is nothing.
        0..=BASIC | 0x4000_0000..=0x4000_0010 | 0x8000_0002..=0x8000_0007 => return None,
        _ => [0; 4],
    })
}

#[cfg(test)]
mod tests {
    use super::super::{Vendor, extended_ecx};
    use super::*;
    use crate::CpuState;

    fn model(cpus: u32) -> (CpuidModel, CpuState) {
        (CpuidModel::of(Vendor::Amd, cpus, 2_000_000), CpuState::default())
    }

    #[test]
    fn vendor_and_signature() {
        let (m, s) = model(1);
        for leaf in [0, 0x8000_0000] {
            let [max, b, c, d] = m.cpuid(0, &s, leaf, 0);
            let text: Vec<u8> = [b, d, c].into_iter().flat_map(u32::to_le_bytes).collect();
            assert_eq!(text, b"AuthenticAMD");
            assert_eq!(max, if leaf == 0 { BASIC } else { EXTENDED });
        }
        assert_eq!((m.cpuid(0, &s, 1, 0)[0], m.cpuid(0, &s, 0x8000_0001, 0)[0]), (SIGNATURE, SIGNATURE));
        assert_eq!(m.cpuid(0, &s, 0x4000_0000, 0), CpuidModel::new(1, 1).cpuid(0, &s, 0x4000_0000, 0));
    }

    #[test]
    fn nothing_of_intel_and_nothing_that_engines_lack() {
        let (m, s) = model(2);
        for leaf in [2, 4, 0xe, 0x15, 0x16, 0x1f, 0x8000_000a, 0x8000_001d, 0x8000_001f, 0x8000_0022] {
            assert_eq!(m.cpuid(0, &s, leaf, 0), [0; 4], "{leaf:#x}");
        }
        assert_eq!(m.cpuid(0, &s, 7, 0)[3] & (leaf7_edx::SPEC_CTRL | leaf7_edx::ARCH_CAPABILITIES), 0);
        let [_, _, ecx, edx] = m.cpuid(0, &s, 0x8000_0001, 0);
        // SVM, SSE4a, XOP, FMA4, topology extensions; 3DNow!, fast FXSAVE.
        assert_eq!(ecx & (1 << 2 | 1 << 6 | 1 << 11 | 1 << 16 | 1 << 22), 0);
        assert_eq!(edx & (3 << 30 | 1 << 25), 0);
        assert_ne!(ecx & (extended_ecx::LAHF | CMP_LEGACY), 0);
        assert_eq!(edx & ALIASES, m.cpuid(0, &s, 1, 0)[3] & ALIASES);
        // CLZERO, RDPRU, WBNOINVD.
        assert_eq!(m.cpuid(0, &s, 0x8000_0008, 0)[1] & (1 | 1 << 4 | 1 << 9), 0);
    }

    #[test]
    fn registers() {
        assert_eq!(read_msr(n::HWCR), Some(1 << 24), "or Linux calls it a bug of the firmware");
        assert!(write_msr(n::HWCR, 1 << 24 | 1 << 18) && !write_msr(n::HWCR, 1));
        assert_eq!(read_msr(0xc001_0114), None, "VM_CR");
        assert!(!write_msr(0xc001_0114, 0));
    }

    #[test]
    fn cores() {
        for (cpus, ecx) in [(1, 0), (2, 0x1001), (3, 0x2002), (64, 0x603f)] {
            assert_eq!(model(cpus).0.cpuid(0, &CpuState::default(), 0x8000_0008, 0)[2], ecx);
        }
    }
}
