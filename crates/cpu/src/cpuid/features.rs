//! Feature words, by leaf; and which of them this host has.

use serde::{Deserialize, Serialize};

use super::{Vendor, amd};

/// Feature bits of leaf 1, ECX.
#[allow(missing_docs)]
pub mod leaf1_ecx {
    pub const SSE3: u32 = 1 << 0;
    pub const PCLMULQDQ: u32 = 1 << 1;
    pub const SSSE3: u32 = 1 << 9;
    pub const FMA: u32 = 1 << 12;
    pub const CX16: u32 = 1 << 13;
    pub const PCID: u32 = 1 << 17;
    pub const SSE4_1: u32 = 1 << 19;
    pub const SSE4_2: u32 = 1 << 20;
    pub const X2APIC: u32 = 1 << 21;
    pub const MOVBE: u32 = 1 << 22;
    pub const POPCNT: u32 = 1 << 23;
    pub const TSC_DEADLINE: u32 = 1 << 24;
    pub const AES: u32 = 1 << 25;
    pub const XSAVE: u32 = 1 << 26;
    pub const OSXSAVE: u32 = 1 << 27;
    pub const AVX: u32 = 1 << 28;
    pub const F16C: u32 = 1 << 29;
    pub const RDRAND: u32 = 1 << 30;
    pub const HYPERVISOR: u32 = 1 << 31;
}

/// Feature bits of leaf 7, subleaf 0, EBX.
#[allow(missing_docs)]
pub mod leaf7_ebx {
    pub const FSGSBASE: u32 = 1 << 0;
    pub const TSC_ADJUST: u32 = 1 << 1;
    pub const BMI1: u32 = 1 << 3;
    pub const AVX2: u32 = 1 << 5;
    pub const FDP_EXCPTN_ONLY: u32 = 1 << 6;
    pub const SMEP: u32 = 1 << 7;
    pub const BMI2: u32 = 1 << 8;
    pub const ERMS: u32 = 1 << 9;
    pub const ZERO_FCS_FDS: u32 = 1 << 13;
    pub const RDSEED: u32 = 1 << 18;
    pub const ADX: u32 = 1 << 19;
    pub const SMAP: u32 = 1 << 20;
    pub const CLFLUSHOPT: u32 = 1 << 23;
    pub const CLWB: u32 = 1 << 24;
    pub const SHA: u32 = 1 << 29;
}

/// Feature bits of leaf 7, subleaf 0, ECX.
#[allow(missing_docs)]
pub mod leaf7_ecx {
    pub const UMIP: u32 = 1 << 2;
    pub const GFNI: u32 = 1 << 8;
    pub const VAES: u32 = 1 << 9;
    pub const VPCLMULQDQ: u32 = 1 << 10;
    pub const RDPID: u32 = 1 << 22;
}

/// Feature bits of leaf 7, subleaf 0, EDX.
#[allow(missing_docs)]
pub mod leaf7_edx {
    pub const FSRM: u32 = 1 << 4;
    pub const SPEC_CTRL: u32 = 1 << 26;
    pub const ARCH_CAPABILITIES: u32 = 1 << 29;
}

/// Feature bits of leaf 0x8000_0001, ECX.
#[allow(missing_docs)]
pub mod extended_ecx {
    pub const LAHF: u32 = 1 << 0;
    pub const LZCNT: u32 = 1 << 5;
    pub const PREFETCHW: u32 = 1 << 8;
}

/// Feature bits of leaf 0x8000_0001, EDX.
#[allow(missing_docs)]
pub mod extended_edx {
    pub const SYSCALL: u32 = 1 << 11;
    pub const NX: u32 = 1 << 20;
    pub const PAGE_1G: u32 = 1 << 26;
    pub const RDTSCP: u32 = 1 << 27;
    pub const LONG_MODE: u32 = 1 << 29;
}

/// Feature bits of leaf 0xd, subleaf 1, EAX.
#[allow(missing_docs)]
pub mod leaf_d_eax {
    pub const XSAVEOPT: u32 = 1 << 0;
    pub const XGETBV1: u32 = 1 << 2;
}

/// Feature bits of leaf 0x4000_0001, EAX (`Documentation/virt/kvm/x86/cpuid.rst`).
#[allow(missing_docs)]
pub mod kvm_eax {
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const STEAL_TIME: u32 = 1 << 5;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_TLB_FLUSH: u32 = 1 << 9;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
}

/// Feature words of a CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Features {
    /// Leaf 1, ECX, see [`leaf1_ecx`].
    pub leaf1_ecx: u32,
    /// Leaf 1, EDX.
    pub leaf1_edx: u32,
    /// Leaf 7.0, EBX, see [`leaf7_ebx`].
    pub leaf7_ebx: u32,
    /// Leaf 7.0, ECX, see [`leaf7_ecx`].
    pub leaf7_ecx: u32,
    /// Leaf 7.0, EDX.
    pub leaf7_edx: u32,
    /// Leaf 0x8000_0001, ECX, see [`extended_ecx`].
    pub extended_ecx: u32,
    /// Leaf 0x8000_0001, EDX, see [`extended_edx`].
    pub extended_edx: u32,
    /// Leaf 0xd.1, EAX, see [`leaf_d_eax`].
    pub leaf_d_eax: u32,
    /// Leaf 0x8000_0008, EBX, see [`amd::leaf8_ebx`]; of the AMD form.
    pub extended8_ebx: u32,
    /// Leaf 0x8000_0021, EAX, see [`amd::leaf21_eax`]; of the AMD form.
    pub extended21_eax: u32,
    /// Leaf 0x8000_0021, ECX, see [`amd::leaf21_ecx`]; of the AMD form.
    pub extended21_ecx: u32,
}

impl Features {
    /// All that a model may show, were the host to have it.
    fn baseline() -> Self {
        use extended_ecx as x;
        use extended_edx as d;
        use leaf1_ecx as a;
        use leaf7_ebx as b;
        use leaf7_ecx as c;
        // FPU DE PSE TSC MSR PAE MCE CX8, APIC, SEP MTRR PGE MCA CMOV PAT PSE36, CLFSH, MMX FXSR SSE SSE2 SS.
        let leaf1_edx = 0x1fd | 1 << 9 | 0x7f << 11 | 1 << 19 | 0x1f << 23;
        Self {
            leaf1_ecx: a::SSE3
                | a::PCLMULQDQ
                | a::SSSE3
                | a::FMA
                | a::CX16
                | a::PCID
                | a::SSE4_1
                | a::SSE4_2
                | a::X2APIC
                | a::MOVBE
                | a::POPCNT
                | a::TSC_DEADLINE
                | a::AES
                | a::XSAVE
                | a::AVX
                | a::F16C
                | a::RDRAND
                | a::HYPERVISOR,
            leaf1_edx,
            leaf7_ebx: b::FSGSBASE
                | b::TSC_ADJUST
                | b::BMI1
                | b::AVX2
                | b::FDP_EXCPTN_ONLY
                | b::BMI2
                | b::ERMS
                | b::ZERO_FCS_FDS
                | b::RDSEED
                | b::ADX
                | b::CLFLUSHOPT
                | b::CLWB
                | b::SHA,
            leaf7_ecx: c::GFNI | c::VAES | c::VPCLMULQDQ,
            leaf7_edx: leaf7_edx::FSRM | leaf7_edx::SPEC_CTRL | leaf7_edx::ARCH_CAPABILITIES,
            extended_ecx: x::LAHF | x::LZCNT | x::PREFETCHW,
            extended_edx: d::SYSCALL | d::NX | d::PAGE_1G | d::LONG_MODE,
            leaf_d_eax: leaf_d_eax::XSAVEOPT | leaf_d_eax::XGETBV1,
            ..Self::default()
        }
    }

    /// All that a model of this vendor may show.
    pub(super) fn all(vendor: Vendor) -> Self {
        match vendor {
            Vendor::Intel => Self::baseline(),
            Vendor::Amd => amd::features(Self::baseline()),
        }
    }

    /// What both have.
    pub fn and(&self, other: &Self) -> Self {
        Self {
            leaf1_ecx: self.leaf1_ecx & other.leaf1_ecx,
            leaf1_edx: self.leaf1_edx & other.leaf1_edx,
            leaf7_ebx: self.leaf7_ebx & other.leaf7_ebx,
            leaf7_ecx: self.leaf7_ecx & other.leaf7_ecx,
            leaf7_edx: self.leaf7_edx & other.leaf7_edx,
            extended_ecx: self.extended_ecx & other.extended_ecx,
            extended_edx: self.extended_edx & other.extended_edx,
            leaf_d_eax: self.leaf_d_eax & other.leaf_d_eax,
            extended8_ebx: self.extended8_ebx & other.extended8_ebx,
            extended21_eax: self.extended21_eax & other.extended21_eax,
            extended21_ecx: self.extended21_ecx & other.extended21_ecx,
        }
    }

    /// The names of what a guest's code uses that `self` shows and `other` has not.
    pub fn beyond(&self, other: &Self) -> Vec<&'static str> {
        use extended_ecx as x;
        use extended_edx as d;
        use leaf1_ecx as a;
        use leaf7_ebx as b;
        use leaf7_ecx as c;
        let words = [
            (
                self.leaf1_ecx & !other.leaf1_ecx,
                &[
                    ("SSE3", a::SSE3),
                    ("PCLMULQDQ", a::PCLMULQDQ),
                    ("SSSE3", a::SSSE3),
                    ("FMA", a::FMA),
                    ("CMPXCHG16B", a::CX16),
                    ("PCID", a::PCID),
                    ("SSE4.1", a::SSE4_1),
                    ("SSE4.2", a::SSE4_2),
                    ("X2APIC", a::X2APIC),
                    ("MOVBE", a::MOVBE),
                    ("POPCNT", a::POPCNT),
                    ("TSC-DEADLINE", a::TSC_DEADLINE),
                    ("AES", a::AES),
                    ("XSAVE", a::XSAVE),
                    ("AVX", a::AVX),
                    ("F16C", a::F16C),
                    ("RDRAND", a::RDRAND),
                ][..],
            ),
            (
                self.leaf7_ebx & !other.leaf7_ebx,
                &[
                    ("FSGSBASE", b::FSGSBASE),
                    ("BMI1", b::BMI1),
                    ("AVX2", b::AVX2),
                    ("BMI2", b::BMI2),
                    ("RDSEED", b::RDSEED),
                    ("ADX", b::ADX),
                    ("CLFLUSHOPT", b::CLFLUSHOPT),
                    ("CLWB", b::CLWB),
                    ("SHA", b::SHA),
                ],
            ),
            (self.leaf7_ecx & !other.leaf7_ecx, &[("GFNI", c::GFNI), ("VAES", c::VAES), ("VPCLMULQDQ", c::VPCLMULQDQ)]),
            (self.extended_ecx & !other.extended_ecx, &[("LZCNT", x::LZCNT), ("PREFETCHW", x::PREFETCHW)]),
            (self.extended_edx & !other.extended_edx, &[("1 GiB pages", d::PAGE_1G), ("RDTSCP", d::RDTSCP)]),
            (
                self.leaf_d_eax & !other.leaf_d_eax,
                &[("XSAVEOPT", leaf_d_eax::XSAVEOPT), ("XGETBV1", leaf_d_eax::XGETBV1)],
            ),
        ];
        let named = |(word, names): (u32, &'static [(&'static str, u32)])| {
            names.iter().filter(move |(_, bit)| word & bit != 0).map(|(name, _)| *name)
        };
        words.into_iter().flat_map(named).collect()
    }

    /// The baseline cut to what this host executes. What an engine emulates itself stays in whatever the host has.
    pub(super) fn for_host(vendor: Vendor) -> Self {
        use leaf1_ecx as a;
        use leaf7_ebx as b;
        use leaf7_ecx as c;
        let leaf = |leaf: u32, subleaf: u32| {
            let r = host_cpuid(leaf, subleaf);
            [r.eax, r.ebx, r.ecx, r.edx]
        };
        let [_, _, ecx1, _] = leaf(1, 0);
        let [_, ebx7, ecx7, edx7] = leaf(7, 0);
        let [_, _, ecxx, _] = leaf(0x8000_0001, 0);
        let emulated1 = a::X2APIC | a::TSC_DEADLINE | a::HYPERVISOR;
        let emulated7 = b::TSC_ADJUST | b::ZERO_FCS_FDS | b::ERMS;
        let mut this = Self::all(vendor);
        this.leaf1_ecx &= ecx1 | emulated1;
        this.leaf7_ebx &= ebx7 | emulated7;
        this.leaf7_ecx &= ecx7;
        this.leaf7_edx &= edx7 | leaf7_edx::SPEC_CTRL | leaf7_edx::ARCH_CAPABILITIES;
        this.extended_ecx &= ecxx | extended_ecx::LAHF;
        // The host's own system must have enabled AVX state.
        if !std::is_x86_feature_detected!("avx") {
            this.leaf1_ecx &= !(a::AVX | a::FMA | a::F16C);
            this.leaf7_ebx &= !b::AVX2;
            this.leaf7_ecx &= !(c::VAES | c::VPCLMULQDQ);
        }
        this
    }
}

pub(super) fn host_cpuid(leaf: u32, subleaf: u32) -> std::arch::x86_64::CpuidResult {
    let base = leaf & 0x8000_0000;
    if std::arch::x86_64::__cpuid(base).eax < leaf {
        return std::arch::x86_64::CpuidResult { eax: 0, ebx: 0, ecx: 0, edx: 0 };
    }
    std::arch::x86_64::__cpuid_count(leaf, subleaf)
}
