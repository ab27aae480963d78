//! What the guest's CPUID shows: the model that all engines share, cut to what this host's KVM can give.

use std::collections::HashMap;

use cpu::CpuState;
use cpu::cpuid::{CpuidModel, amd, leaf1_ecx, leaf7_edx};
use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::refusal::refused;

/// Leaf and subleaf to EAX, EBX, ECX, EDX.
type Leaves = HashMap<(u32, u32), [u32; 4]>;

/// The leaves that have subleaves, and how many the model has.
fn subleaves(leaf: u32) -> u32 {
    match leaf {
        4 => 5,
        7 | 0xb | 0x1f | 0xd => 3,
        _ => 1,
    }
}

/// The guest's CPUID: made once for a VM.
pub struct GuestCpuid {
    model: CpuidModel,
    supported: Leaves,
    physical_bits: u32,
}

impl GuestCpuid {
    /// `model` cut to what `kvm` can give.
    pub fn new(kvm: &Kvm, model: &CpuidModel) -> Result<Self, String> {
        let list = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(refused("to tell its CPUID"))?;
        let supported: Leaves =
            list.as_slice().iter().map(|e| ((e.function, e.index), [e.eax, e.ebx, e.ecx, e.edx])).collect();
        Ok(Self::cut(model, supported, kvm.check_extension(Cap::TscDeadlineTimer)))
    }

    fn cut(model: &CpuidModel, supported: Leaves, tsc_deadline: bool) -> Self {
        let mut model = model.clone();
        let has = |leaf: u32, subleaf: u32| supported.get(&(leaf, subleaf)).copied().unwrap_or_default();
        let f = &mut model.features;
        let [_, _, ecx1, edx1] = has(1, 0);
        // KVM has these two itself; older kernels do not list them.
        let own = leaf1_ecx::HYPERVISOR | if tsc_deadline { leaf1_ecx::TSC_DEADLINE } else { 0 };
        let ecx1 = ecx1 & !leaf1_ecx::TSC_DEADLINE | own;
        f.leaf1_ecx &= ecx1;
        f.leaf1_edx &= edx1;
        let [_, ebx7, ecx7, edx7] = has(7, 0);
        f.leaf7_ebx &= ebx7;
        f.leaf7_ecx &= ecx7;
        f.leaf7_edx &= edx7;
        let [_, _, ecxx, edxx] = has(0x8000_0001, 0);
        f.extended_ecx &= ecxx;
        f.extended_edx &= edxx;
        f.leaf_d_eax &= has(0xd, 1)[0];
        f.extended8_ebx &= has(0x8000_0008, 0)[1];
        let [eax21, _, ecx21, _] = has(0x8000_0021, 0);
        f.extended21_eax &= eax21;
        f.extended21_ecx &= ecx21;
        let host_bits = has(0x8000_0008, 0)[0] & 0xff;
        let physical_bits = if host_bits == 0 { 36 } else { host_bits.min(cpu::paging::PHYSICAL_BITS) };
        Self { model, supported, physical_bits }
    }

    /// The model as cut.
    pub fn model(&self) -> &CpuidModel {
        &self.model
    }

    /// Guest-physical addresses have this many bits.
    pub fn physical_bits(&self) -> u32 {
        self.physical_bits
    }

    /// Does IA32_SPEC_CTRL exist?
    pub fn has_spec_ctrl(&self) -> bool {
        use amd::leaf8_ebx::{IBRS, SSBD, STIBP};
        let f = &self.model.features;
        f.leaf7_edx & leaf7_edx::SPEC_CTRL != 0 || f.extended8_ebx & (IBRS | STIBP | SSBD) != 0
    }

    /// Does IA32_ARCH_CAPABILITIES exist?
    pub fn has_arch_capabilities(&self) -> bool {
        self.model.features.leaf7_edx & leaf7_edx::ARCH_CAPABILITIES != 0
    }

    /// The paravirtual features shown: EAX of leaf 0x4000_0001.
    pub fn paravirtual(&self) -> u32 {
        self.answer(0, &CpuState::default(), 0x4000_0001, 0)[0]
    }

    /// All leaves for vCPU `index`.
    pub fn entries(&self, index: u32) -> Result<CpuId, String> {
        let mut entries = Vec::new();
        let state = CpuState::default();
        let [highest, ..] = self.model.cpuid(0, &state, 0, 0);
        let basic = 0..=highest;
        let kvm = [0x4000_0000, 0x4000_0001, 0x4000_0010];
        let [highest, ..] = self.model.cpuid(0, &state, 0x8000_0000, 0);
        let extended = 0x8000_0000..=highest;
        for leaf in basic.chain(kvm).chain(extended) {
            let count = subleaves(leaf);
            for subleaf in 0..count {
                let [eax, ebx, ecx, edx] = self.answer(index, &state, leaf, subleaf);
                let flags = if count > 1 { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
                let index = subleaf;
                entries.push(kvm_cpuid_entry2 { function: leaf, index, flags, eax, ebx, ecx, edx, padding: [0; 3] });
            }
        }
        CpuId::from_entries(&entries).map_err(|_| "the CPUID model has too many leaves for KVM".into())
    }

    fn answer(&self, index: u32, state: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let [eax, ebx, ecx, edx] = self.model.cpuid(index, state, leaf, subleaf);
        let has = self.supported.get(&(leaf, subleaf)).copied().unwrap_or_default();
        match (leaf, subleaf) {
            (7, 2) => [eax, ebx, ecx, edx & has[3]],
            // Paravirtual features: only what this KVM has. CLOCKSOURCE_STABLE is a promise KVM makes in the clock's page.
            (0x4000_0001, _) => [eax & (has[0] | 1 << 24), ebx, ecx, edx],
            (0x8000_0007, _) => [eax, ebx, ecx, edx & has[3]],
            (0x8000_0008, _) => [self.physical_bits | eax & 0xffff_ff00, ebx, ecx, edx],
            _ => [eax, ebx, ecx, edx],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpu::cpuid::Vendor;

    fn guest(supported: &[(u32, u32, [u32; 4])]) -> GuestCpuid {
        let leaves = supported.iter().map(|&(leaf, subleaf, words)| ((leaf, subleaf), words)).collect();
        GuestCpuid::cut(&CpuidModel::new(2, 2_000_000), leaves, true)
    }

    fn find(entries: &CpuId, leaf: u32, subleaf: u32) -> kvm_cpuid_entry2 {
        *entries.as_slice().iter().find(|e| e.function == leaf && e.index == subleaf).unwrap()
    }

    #[test]
    fn what_kvm_lacks_is_not_shown() {
        let all = u32::MAX;
        let guest = guest(&[
            (1, 0, [all, all, all & !leaf1_ecx::AVX, all]),
            (7, 0, [all, 0, all, all]),
            (0x8000_0001, 0, [all; 4]),
            (0x4000_0001, 0, [8, 0, 0, 0]),
            (0x8000_0008, 0, [0x3028, 0, 0, 0]),
        ]);
        let entries = guest.entries(1).unwrap();
        assert_eq!(find(&entries, 1, 0).ecx & leaf1_ecx::AVX, 0);
        assert_ne!(find(&entries, 1, 0).ecx & leaf1_ecx::HYPERVISOR, 0);
        assert_ne!(find(&entries, 1, 0).ecx & leaf1_ecx::TSC_DEADLINE, 0);
        assert_eq!(find(&entries, 1, 0).ebx >> 24, 1, "the APIC id");
        assert_eq!(find(&entries, 7, 0).ebx, 0);
        assert_eq!(find(&entries, 7, 2).edx, 0, "no BHI_CTRL without the host's");
        assert_eq!(find(&entries, 0x4000_0001, 0).eax, 8 | 1 << 24);
        assert_eq!(find(&entries, 0x8000_0008, 0).eax & 0xff, 40, "no more address bits than the host's");
        assert_eq!(find(&entries, 0xb, 1).flags, KVM_CPUID_FLAG_SIGNIFCANT_INDEX);
    }

    /// Of what AMD's CPUs are vulnerable to nothing is told but what KVM tells.
    #[test]
    fn in_the_form_of_amd() {
        let all = u32::MAX;
        let leaves = [(1, [all; 4]), (0x8000_0001, [all; 4]), (0x8000_0008, [40, amd::leaf8_ebx::IBPB, 0, 0])];
        let leaves = leaves.into_iter().map(|(leaf, words)| ((leaf, 0), words)).collect();
        let guest = GuestCpuid::cut(&CpuidModel::of(Vendor::Amd, 2, 2_000_000), leaves, true);
        let entries = guest.entries(0).unwrap();
        assert_eq!(find(&entries, 0x8000_0008, 0).ebx, amd::leaf8_ebx::IBPB);
        assert_eq!(find(&entries, 0x8000_0021, 0).eax, 0, "not even that it is immune");
        assert!(entries.as_slice().iter().all(|e| e.function != 0x1f), "no leaf beyond the highest");
        assert!(!guest.has_spec_ctrl() && !guest.has_arch_capabilities());
    }

    #[test]
    fn nothing_beyond_the_model() {
        let guest = guest(&[(1, 0, [u32::MAX; 4]), (7, 0, [u32::MAX; 4]), (0x8000_0001, 0, [u32::MAX; 4])]);
        let model = CpuidModel::new(2, 2_000_000);
        let f = guest.model().features;
        assert_eq!(f.leaf7_ebx & !model.features.leaf7_ebx, 0);
        assert_eq!(f.leaf1_ecx & !model.features.leaf1_ecx, 0);
        assert_eq!(f.leaf_d_eax, 0);
    }
}
