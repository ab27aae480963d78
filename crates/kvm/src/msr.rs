//! Which MSRs the guest reaches: those of the shared model and no others of KVM's.
//!
//! KVM answers the allowed ones itself. Accesses to any other come to us: a few have an answer here, the same as under the other
//! engines; the rest are `#GP(0)`.

use cpu::cpuid;
use cpu::msr as n;
use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::host::cap;

/// `(first, last)` of the MSRs that KVM answers itself. Those of the local APIC (0x800 to 0x8ff) cannot be filtered.
const ALLOWED: [(u32, u32); 22] = [
    (n::TSC, n::KVM_SYSTEM_TIME_OLD),
    (n::APIC_BASE, n::APIC_BASE),
    (n::TSC_ADJUST, n::TSC_ADJUST),
    (n::SPEC_CTRL, n::PRED_CMD),
    (n::MICROCODE_REVISION, n::MICROCODE_REVISION),
    (n::MTRR_CAP, n::MTRR_CAP),
    (n::ARCH_CAPABILITIES, n::ARCH_CAPABILITIES),
    (n::SYSENTER_CS, n::SYSENTER_EIP),
    (n::MISC_ENABLE, n::MISC_ENABLE),
    (n::DEBUGCTL, n::DEBUGCTL),
    (n::MTRR_VARIABLE, n::MTRR_VARIABLE_LAST),
    (0x250, 0x250),
    (0x258, 0x259),
    (0x268, 0x26f),
    (n::PAT, n::PAT),
    (n::MTRR_DEFAULT, n::MTRR_DEFAULT),
    (n::TSC_DEADLINE, n::TSC_DEADLINE),
    (n::KVM_WALL_CLOCK, n::KVM_SYSTEM_TIME),
    (n::KVM_STEAL_TIME, n::KVM_PV_EOI),
    (n::EFER, n::FMASK),
    (n::FS_BASE, n::KERNEL_GS_BASE),
    (n::TSC_AUX, n::TSC_AUX),
];

/// Windows of MSR numbers, `(first, count)`, that cover [`ALLOWED`]: KVM takes sixteen at most.
const WINDOWS: [(u32, u32); 4] = [(0, 0x400), (n::TSC_DEADLINE, 1), (n::KVM_WALL_CLOCK, 16), (n::EFER, 0x100)];

fn allowed(msr: u32) -> bool {
    ALLOWED.iter().any(|(first, last)| (*first..=*last).contains(&msr))
}

fn bitmap(first: u32, count: u32) -> Vec<u8> {
    let mut bits = vec![0; count.div_ceil(8) as usize];
    for at in (0..count).filter(|at| allowed(first + at)) {
        if let Some(byte) = bits.get_mut((at / 8) as usize) {
            *byte |= 1 << (at % 8);
        }
    }
    bits
}

/// Sets the filter, and has all other accesses come to us.
pub fn filter(vm: &VmFd) -> Result<(), kvm_ioctls::Error> {
    let mut exits = kvm_enable_cap { cap: cap::X86_USER_SPACE_MSR, ..Default::default() };
    exits.args[0] = u64::from(KVM_MSR_EXIT_REASON_UNKNOWN | KVM_MSR_EXIT_REASON_FILTER);
    vm.enable_cap(&exits)?;
    let bitmaps = WINDOWS.map(|(first, count)| bitmap(first, count));
    let ranges: Vec<MsrFilterRange<'_>> = WINDOWS
        .iter()
        .zip(&bitmaps)
        .map(|(&(base, msr_count), bitmap)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::DENY, &ranges)
}

/// RDMSR of a register that KVM does not answer, on an AMD CPU or on Intel's; `None` is `#GP(0)`.
pub fn read(msr: u32, amd: bool) -> Option<u64> {
    match msr {
        n::PLATFORM_ID | n::MICROCODE_UPDATE | n::PLATFORM_INFO | n::PERF_STATUS | n::DEBUGCTL => Some(0),
        // Locked, nothing enabled.
        n::FEATURE_CONTROL => Some(1),
        // No banks: KVM's own default are 32, of which the filter would let none be reached.
        n::MCG_CAP | n::MCG_STATUS => Some(0),
        _ if amd => cpuid::amd::read_msr(msr),
        _ => None,
    }
}

/// WRMSR of such a register; `false` is `#GP(0)`.
pub fn write(msr: u32, value: u64, amd: bool) -> bool {
    match msr {
        n::MICROCODE_UPDATE | n::MICROCODE_REVISION | n::PERF_STATUS => true,
        n::DEBUGCTL => value & !3 == 0,
        n::MCG_STATUS => value == 0,
        _ if amd => cpuid::amd::write_msr(msr, value),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_cover_what_is_allowed() {
        let covered = |msr: u32| WINDOWS.iter().any(|(first, count)| msr >= *first && msr - first < *count);
        for (first, last) in ALLOWED {
            assert!((first..=last).all(covered), "{first:#x}");
        }
        let bits = bitmap(0, 0x400);
        assert_eq!(bits[0x10 / 8], 0b111, "TSC and kvmclock's old numbers, not PLATFORM_ID");
        assert_eq!(bits[0x3a / 8] & 1 << (0x3a % 8), 0, "FEATURE_CONTROL is ours");
    }

    #[test]
    fn answers() {
        for amd in [false, true] {
            assert_eq!(read(n::FEATURE_CONTROL, amd), Some(1));
            assert_eq!(read(0x1234, amd), None);
            assert!(write(n::MICROCODE_UPDATE, 5, amd));
            assert!(!write(n::DEBUGCTL, 4, amd) && !write(0x1234, 0, amd));
            assert_eq!(read(n::HWCR, amd).is_some(), amd);
            assert_eq!(write(n::HWCR, 0, amd), amd);
        }
    }
}
