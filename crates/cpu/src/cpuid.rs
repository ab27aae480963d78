//! What the guest's CPUID instruction answers.
//!
//! A [`CpuidModel`] is a baseline of ours, cut to what the host CPU can execute. It shows an Intel server part (family 6, model 143)
//! on which Linux needs no mitigations that a translated kernel would pay for ([`ARCH_CAPABILITIES`]), with everything in it that
//! kernels calibrate clocks by (KVM clock leaves, TSC frequency, invariant TSC), and hides what costs an engine work: SMEP, SMAP,
//! UMIP, INVPCID, protection keys, CET, LA57, AVX-512, AMX, MPX, performance counters, MONITOR, TSX, compacted XSAVE, RDPID, and
//! RDTSCP: programs that run directly on the CPU would get the number of the host's CPU from it. Kernels read the time stamps of
//! their clocks by LFENCE and RDTSC without it, at the same cost.
//!
//! There is a second form of it, of an AMD part ([`amd`]), for guests whose code runs on such a CPU. Which one a guest sees is chosen when
//! its VM is made, and is part of the VM's saved state.
//!
//! Sources: SDM volume 2, CPUID; the KVM leaves as documented with the Linux kernel (`Documentation/virt/kvm/x86/cpuid.rst`).

pub mod amd;
mod features;

use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use features::*;

use crate::{CpuState, cr4};

/// Input clock of the local APIC's timer, in Hz, as leaves 0x15 and 0x4000_0010 tell it: what KVM gives its guests too.
pub const LAPIC_HZ: u32 = 1_000_000_000;

/// IA32_ARCH_CAPABILITIES: not affected by Meltdown (0), enhanced IBRS (1), no L1D flush needed (3), not affected by speculative
/// store bypass (4), MDS (5), page-size-change machine checks (6), TAA (8), the MMIO stale data family (13 to 15), branch history
/// injection (20), PBRSB (24), GDS (26), RFDS (27), ITS (62). So Linux neither isolates page tables, nor uses retpolines or return
/// thunks, nor clears buffers or history on entry.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Whose CPU a guest sees: what differs besides the name is in [`amd`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Vendor {
    /// GenuineIntel.
    #[default]
    Intel,
    /// AuthenticAMD.
    Amd,
}

impl Vendor {
    /// The form that guests see under engine `kvm`: that of the CPU on which their code runs.
    pub fn of_host() -> Self {
        if &host_text() == b"AuthenticAMD" { Self::Amd } else { Self::Intel }
    }

    /// Can a guest that sees this vendor make hypercalls on this host under engine `kvm`? Intel's call is VMCALL, AMD's VMMCALL. On the
    /// other's CPUs each is an invalid opcode, for which KVM writes the right one into the guest's code, and a kernel's code cannot be
    /// written to: the guest would crash. So that a guest can go from one engine to another, none of them offers hypercalls there.
    pub fn calls_work(self) -> bool {
        match &host_text() {
            b"AuthenticAMD" => self == Self::Amd,
            b"HygonGenuine" => false,
            _ => self == Self::Intel,
        }
    }
}

impl FromStr for Vendor {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "intel" => Ok(Self::Intel),
            "amd" => Ok(Self::Amd),
            _ => Err(format!("there are no CPUs of '{text}': choose intel or amd")),
        }
    }
}

fn host_text() -> [u8; 12] {
    let leaf = std::arch::x86_64::__cpuid(0);
    let mut text = [0; 12];
    for (to, from) in text.chunks_exact_mut(4).zip([leaf.ebx, leaf.edx, leaf.ecx]) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    text
}

/// The CPUID model of one VM: the same for all its vCPUs but for the APIC id.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidModel {
    /// Whose CPU it is.
    pub vendor: Vendor,
    /// Family, model and stepping: EAX of leaf 1.
    pub signature: u32,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Frequency of the guest's time-stamp counter, in kHz.
    pub tsc_khz: u32,
    /// What is shown.
    pub features: Features,
    /// Offer KVM_FEATURE_PV_UNHALT: a guest whose spinlock is held elsewhere halts, and is woken by the hypercall KVM_HC_KICK_CPU. Worth
    /// its cost where vCPUs must share cores.
    pub pv_unhalt: bool,
    /// Offer what goes by hypercalls, see [`Vendor::calls_work`].
    pub hypercalls: bool,
}

/// Family 6, model 143, stepping 8.
const INTEL_SIGNATURE: u32 = 0x0008_06f8;

impl CpuidModel {
    /// The model for a VM with `cpus` vCPUs whose TSC runs at `tsc_khz`, on this host, in Intel's form.
    pub fn new(cpus: u32, tsc_khz: u32) -> Self {
        Self::of(Vendor::Intel, cpus, tsc_khz)
    }

    /// The same in the form of `vendor`.
    pub fn of(vendor: Vendor, cpus: u32, tsc_khz: u32) -> Self {
        Self {
            vendor,
            signature: if vendor == Vendor::Amd { amd::SIGNATURE } else { INTEL_SIGNATURE },
            cpus: cpus.max(1),
            tsc_khz,
            features: Features::for_host(vendor),
            pv_unhalt: false,
            hypercalls: vendor.calls_work(),
        }
    }

    /// Takes the host's family, model and stepping: where the guest's code runs on that very CPU, it decides by them what to guard against.
    pub fn with_host_signature(mut self) -> Self {
        self.signature = features::host_cpuid(1, 0).eax;
        self
    }

    /// Makes a saved model one that can be shown on this host: with nothing that no model shows.
    ///
    /// # Errors
    /// The names of what the guest may have found and this host does not execute.
    pub fn check(&mut self) -> Result<(), Vec<&'static str>> {
        self.features = self.features.and(&Features::all(self.vendor));
        let beyond = self.features.beyond(&Features::for_host(self.vendor));
        if beyond.is_empty() { Ok(()) } else { Err(beyond) }
    }

    /// What CPUID answers for `leaf` (EAX) and `subleaf` (ECX) on vCPU `index` in `state`: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, index: u32, state: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        if self.vendor == Vendor::Amd
            && let Some(answer) = amd::leaf(self, leaf, subleaf)
        {
            return answer;
        }
        let f = &self.features;
        let leaf = match leaf {
            0..=0x1f | 0x4000_0000..=0x4000_0010 | 0x8000_0000..=0x8000_0008 => leaf,
            // Beyond the highest leaf Intel CPUs answer as for the highest basic one.
            _ => 0x1f,
        };
        match leaf {
            0 => text_leaf(0x1f, b"GenuineIntel"),
            1 => {
                let mut ecx = f.leaf1_ecx;
                if state.cr4 & cr4::OSXSAVE != 0 {
                    ecx |= leaf1_ecx::OSXSAVE;
                }
                let logical = 1u32 << self.core_bits().min(7);
                let htt = if self.cpus > 1 { 1 << 28 } else { 0 };
                [self.signature, (index & 0xff) << 24 | logical << 16 | 8 << 8, ecx, f.leaf1_edx | htt]
            }
            // Use leaf 4; 64-byte prefetch.
            2 => [0x00fe_ff01, 0x0000_00f0, 0, 0],
            4 => self.cache(subleaf),
            // ARAT.
            6 => [1 << 2, 0, 0, 0],
            7 if subleaf == 0 => [2, f.leaf7_ebx, f.leaf7_ecx, f.leaf7_edx],
            // BHI_CTRL, MCDT_NO. With BHI_DIS_S in IA32_SPEC_CTRL kernels need no code against branch history injection; since 2025
            // Linux does not take BHI_NO for an answer.
            7 if subleaf == 2 => [0, 0, 0, 1 << 4 | 1 << 5],
            0xb | 0x1f => self.topology(index, subleaf),
            0xd => self.xsave(state, subleaf),
            0x15 => {
                let (numerator, denominator) = tsc_ratio(self.tsc_khz);
                [denominator, numerator, LAPIC_HZ, 0]
            }
            0x16 => {
                let mhz = (self.tsc_khz + 500) / 1000;
                [mhz, mhz, 100, 0]
            }
            0x4000_0000 => {
                // The characters are in EBX, ECX, EDX here, unlike in leaf 0.
                let [max, first, third, second] = text_leaf(0x4000_0010, b"KVMKVMKVM\0\0\0");
                [max, first, second, third]
            }
            0x4000_0001 => {
                use kvm_eax as k;
                let always = k::CLOCKSOURCE | k::NOP_IO_DELAY | k::CLOCKSOURCE2 | k::STEAL_TIME | k::PV_EOI;
                let unhalt = if self.pv_unhalt { k::PV_UNHALT } else { 0 };
                let calls = if self.hypercalls { k::PV_SEND_IPI | unhalt } else { 0 };
                [always | k::PV_TLB_FLUSH | k::CLOCKSOURCE_STABLE | calls, 0, 0, 0]
            }
            0x4000_0010 => [self.tsc_khz, LAPIC_HZ / 1000, 0, 0],
            0x8000_0000 => [0x8000_0008, 0, 0, 0],
            0x8000_0001 => [0, 0, f.extended_ecx, f.extended_edx],
            0x8000_0002..=0x8000_0004 => brand(leaf - 0x8000_0002),
            // 2 MiB of second-level cache, 64-byte lines.
            0x8000_0006 => [0, 0, 0x0800_8040, 0],
            // Invariant TSC.
            0x8000_0007 => [0, 0, 0, 1 << 8],
            0x8000_0008 => [crate::paging::PHYSICAL_BITS | 48 << 8, 0, 0, 0],
            _ => [0; 4],
        }
    }

    /// Bits of the APIC id that number cores.
    fn core_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// Leaf 4: 48 KiB L1 data, 32 KiB L1 instruction, 2 MiB L2 a core, 32 MiB L3 for all.
    fn cache(&self, subleaf: u32) -> [u32; 4] {
        let shared = (1u32 << self.core_bits().min(6)) - 1;
        let (kind, level, sharing, ways, sets) = match subleaf {
            0 => (1, 1, 0, 12, 64),
            1 => (2, 1, 0, 8, 64),
            2 => (3, 2, 0, 16, 2048),
            3 => (3, 3, shared, 16, 32768),
            _ => return [0; 4],
        };
        [kind | level << 5 | 1 << 8 | sharing << 14 | shared << 26, 63 | (ways - 1) << 22, sets - 1, 0]
    }

    /// Leaves 0xb and 0x1f: one thread a core, all cores in one package.
    fn topology(&self, index: u32, subleaf: u32) -> [u32; 4] {
        match subleaf {
            0 => [0, 1, 1 << 8, index],
            1 => [self.core_bits(), self.cpus & 0xffff, 2 << 8 | 1, index],
            _ => [0, 0, subleaf & 0xff, index],
        }
    }

    fn xsave(&self, state: &CpuState, subleaf: u32) -> [u32; 4] {
        if self.features.leaf1_ecx & leaf1_ecx::XSAVE == 0 {
            return [0; 4];
        }
        let size = |xcr0: u64| if xcr0 & 4 != 0 { 832 } else { 576 };
        match subleaf {
            0 => [self.xcr0_mask() as u32, size(state.xcr0), size(self.xcr0_mask()), 0],
            1 => [self.features.leaf_d_eax, 0, 0, 0],
            2 if self.xcr0_mask() & 4 != 0 => [256, 576, 0, 0],
            _ => [0; 4],
        }
    }

    /// The bits XCR0 may have.
    pub fn xcr0_mask(&self) -> u64 {
        if self.features.leaf1_ecx & leaf1_ecx::AVX != 0 { 7 } else { 3 }
    }

    /// The bits CR4 may have.
    pub fn cr4_mask(&self) -> u64 {
        let f = &self.features;
        let mut mask =
            cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        for (shown, bit) in [
            (f.leaf7_ebx & leaf7_ebx::FSGSBASE != 0, cr4::FSGSBASE),
            (f.leaf1_ecx & leaf1_ecx::XSAVE != 0, cr4::OSXSAVE),
            (f.leaf1_ecx & leaf1_ecx::PCID != 0, cr4::PCIDE),
            (f.leaf7_ebx & leaf7_ebx::SMEP != 0, cr4::SMEP),
            (self.has_smap(), cr4::SMAP),
            (f.leaf7_ecx & leaf7_ecx::UMIP != 0, cr4::UMIP),
        ] {
            if shown {
                mask |= bit;
            }
        }
        mask
    }

    /// Is SMAP shown (and so CLAC and STAC)?
    pub fn has_smap(&self) -> bool {
        self.features.leaf7_ebx & leaf7_ebx::SMAP != 0
    }

    /// Is RDTSCP shown? It was in machines saved by early versions.
    pub fn has_rdtscp(&self) -> bool {
        self.features.extended_edx & extended_edx::RDTSCP != 0
    }

    /// Is RDPID shown?
    pub fn has_rdpid(&self) -> bool {
        self.features.leaf7_ecx & leaf7_ecx::RDPID != 0
    }

    /// Does IA32_TSC_AUX exist, which RDTSCP and RDPID read (SDM volume 4, table 2-2)?
    pub fn has_tsc_aux(&self) -> bool {
        self.has_rdtscp() || self.has_rdpid()
    }

    /// Is XGETBV with ECX = 1 shown?
    pub fn has_xgetbv1(&self) -> bool {
        self.features.leaf_d_eax & leaf_d_eax::XGETBV1 != 0
    }
}

/// EAX, then twelve characters in EBX, EDX, ECX as leaf 0 has them.
fn text_leaf(eax: u32, text: &[u8; 12]) -> [u32; 4] {
    let word = |at: usize| text.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    [eax, word(0), word(8), word(4)]
}

/// 16 characters of the brand string.
fn brand(part: u32) -> [u32; 4] {
    let mut text = [0u8; 48];
    for (to, from) in text.iter_mut().zip(b"Tightrope Virtual CPU (x86-64-v3)") {
        *to = *from;
    }
    let at = part as usize * 16;
    std::array::from_fn(|i| {
        text.get(at + i * 4..at + i * 4 + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
    })
}

/// The TSC's frequency as a fraction of [`LAPIC_HZ`]: the nearest one whose numerator stays small enough for guests that multiply it
/// by the crystal's kHz in 32 bits.
fn tsc_ratio(tsc_khz: u32) -> (u32, u32) {
    let crystal = u64::from(LAPIC_HZ / 1000);
    let limit = u64::from(u32::MAX) / crystal;
    let tsc = u64::from(tsc_khz);
    let mut best = (0, 1, u64::MAX);
    for denominator in 1..=limit {
        let numerator = (tsc * denominator + crystal / 2) / crystal;
        if numerator > limit {
            break;
        }
        // The error in units of 1 / (denominator * crystal), made comparable by scaling.
        let error = (numerator * crystal).abs_diff(tsc * denominator) * 1_000_000 / denominator;
        if error < best.2 {
            best = (numerator, denominator, error);
        }
    }
    (best.0 as u32, best.1 as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(cpus: u32) -> (CpuidModel, CpuState) {
        (CpuidModel::new(cpus, 2_299_998), CpuState::default())
    }

    fn text(words: &[u32]) -> String {
        words.iter().flat_map(|word| word.to_le_bytes()).take_while(|b| *b != 0).map(char::from).collect()
    }

    #[test]
    fn vendor_and_brand() {
        let (m, s) = model(1);
        let [max, b, c, d] = m.cpuid(0, &s, 0, 0);
        assert_eq!((max, text(&[b, d, c]).as_str()), (0x1f, "GenuineIntel"));
        let words: Vec<u32> = (0x8000_0002..=0x8000_0004).flat_map(|leaf| m.cpuid(0, &s, leaf, 0)).collect();
        assert!(text(&words).starts_with("Tightrope Virtual CPU"));
        let [max, b, c, d] = m.cpuid(0, &s, 0x4000_0000, 0);
        assert_eq!((max, text(&[b, c, d]).as_str()), (0x4000_0010, "KVMKVMKVM"));
    }

    #[test]
    fn hidden_and_dynamic() {
        let (m, mut s) = model(4);
        let [_, ebx, ecx, _] = m.cpuid(2, &s, 1, 0);
        assert_eq!(ebx >> 24, 2);
        assert_eq!(ecx & (1 << 3 | leaf1_ecx::OSXSAVE), 0, "MONITOR, OSXSAVE");
        assert_eq!(m.cr4_mask() & cr4::PCIDE != 0, ecx & leaf1_ecx::PCID != 0);
        s.cr4 |= cr4::OSXSAVE;
        assert_ne!(m.cpuid(2, &s, 1, 0)[2] & leaf1_ecx::OSXSAVE, 0);
        let [max, ebx, ecx, edx] = m.cpuid(0, &s, 7, 0);
        assert_eq!(max, 2);
        // SMEP, INVPCID, RTM, MPX, AVX-512F, SMAP.
        assert_eq!(ebx & (1 << 7 | 1 << 10 | 1 << 11 | 1 << 14 | 1 << 16 | 1 << 20), 0);
        // UMIP, PKU, LA57, RDPID, CET.
        assert_eq!(ecx & (1 << 2 | 1 << 3 | 1 << 16 | 1 << 22 | 1 << 7), 0);
        assert_eq!(edx & (1 << 20 | 0x3 << 22), 0);
        assert_eq!(m.cr4_mask() & (cr4::SMEP | cr4::SMAP | cr4::LA57 | cr4::PKE), 0);
        assert_eq!(m.cpuid(0, &s, 0xd, 1)[0] & !5, 0);
    }

    #[test]
    fn topology_and_time() {
        let (m, s) = model(3);
        assert_eq!(m.cpuid(1, &s, 0xb, 0), [0, 1, 0x100, 1]);
        assert_eq!(m.cpuid(1, &s, 0x1f, 1), [2, 3, 0x201, 1]);
        assert_eq!(m.cpuid(1, &s, 0x1f, 2), [0, 0, 2, 1]);
        assert_eq!(m.cpuid(0, &s, 0x4000_0010, 0)[0], 2_299_998);
        for khz in [2_299_998, 2_194_843, 3_000_000, 1_000_000, 4_100_123] {
            let (numerator, denominator) = tsc_ratio(khz);
            let hz = f64::from(LAPIC_HZ) * f64::from(numerator) / f64::from(denominator);
            assert!((hz / 1000.0 / f64::from(khz) - 1.0).abs() < 3e-6, "{khz}: {numerator}/{denominator}");
            assert!(1_000_000u32.checked_mul(numerator).is_some());
        }
    }

    #[test]
    fn hypercalls_only_where_they_work() {
        let (mut m, s) = model(2);
        m.pv_unhalt = true;
        for (hypercalls, shown) in [(true, kvm_eax::PV_SEND_IPI | kvm_eax::PV_UNHALT), (false, 0)] {
            m.hypercalls = hypercalls;
            let eax = m.cpuid(0, &s, 0x4000_0001, 0)[0];
            assert_eq!(eax & (kvm_eax::PV_SEND_IPI | kvm_eax::PV_UNHALT), shown);
            assert_ne!(eax & kvm_eax::STEAL_TIME, 0);
        }
    }

    #[test]
    fn what_another_host_lacks_is_named() {
        let (mut m, _) = model(1);
        assert_eq!(m.clone().check(), Ok(()));
        let host = m.features;
        assert_eq!(host.beyond(&host), Vec::<&str>::new());
        let less = Features { leaf7_ebx: host.leaf7_ebx & !leaf7_ebx::BMI2, leaf1_edx: 0, ..host };
        assert_eq!(host.beyond(&less), ["BMI2"]);
        // What a damaged file may say.
        m.features.leaf7_ebx |= leaf7_ebx::SMAP;
        m.features.extended8_ebx = u32::MAX;
        m.check().unwrap();
        assert_eq!(m.features, host);
    }

    #[test]
    fn every_leaf_answers() {
        let (m, s) = model(2);
        for leaf in (0..0x40).chain(0x4000_0000..0x4000_0020).chain(0x8000_0000..0x8000_0020) {
            for subleaf in 0..4 {
                m.cpuid(0, &s, leaf, subleaf);
            }
        }
    }
}
