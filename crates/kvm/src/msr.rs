//! Which MSRs the guest reaches: those of the shared model and no others of KVM's.
//!
//! KVM answers the allowed ones itself. Accesses to any other come to us: a few have an answer here, the same as under the other
//! engines; the rest are `#GP(0)`.

use kvm_bindings::{KVM_MSR_EXIT_REASON_FILTER, KVM_MSR_EXIT_REASON_UNKNOWN, kvm_enable_cap};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};

use crate::host::cap;

/// Numbers (SDM volume 4; KVM's as documented with the Linux kernel).
#[allow(missing_docs)]
pub mod number {
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const APIC_BASE: u32 = 0x1b;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const MICROCODE_UPDATE: u32 = 0x79;
    pub const MICROCODE_REVISION: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const PERF_STATUS: u32 = 0x198;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEFAULT: u32 = 0x2ff;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

use number as n;

/// The fixed-range MTRRs, in the order of [`cpu::CpuState::mtrr`].
pub const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// The variable MTRRs: base and mask, eight times.
pub const MTRR_VARIABLES: u32 = 16;

/// `(first, last)` of the MSRs that KVM answers itself. Those of the local APIC (0x800 to 0x8ff) cannot be filtered.
const ALLOWED: [(u32, u32); 21] = [
    (n::TSC, 0x12), // and kvmclock's old numbers
    (n::APIC_BASE, n::APIC_BASE),
    (n::TSC_ADJUST, n::TSC_ADJUST),
    (n::SPEC_CTRL, n::PRED_CMD),
    (n::MICROCODE_REVISION, n::MICROCODE_REVISION),
    (n::MTRR_CAP, n::MTRR_CAP),
    (n::ARCH_CAPABILITIES, n::ARCH_CAPABILITIES),
    (n::SYSENTER_CS, n::SYSENTER_EIP),
    (n::MISC_ENABLE, n::MISC_ENABLE),
    (n::DEBUGCTL, n::DEBUGCTL),
    (n::MTRR_VARIABLE, n::MTRR_VARIABLE + MTRR_VARIABLES - 1),
    (0x250, 0x250),
    (0x258, 0x259),
    (0x268, 0x26f),
    (n::PAT, n::PAT),
    (n::MTRR_DEFAULT, n::MTRR_DEFAULT),
    (n::TSC_DEADLINE, n::TSC_DEADLINE),
    (n::KVM_WALL_CLOCK, n::KVM_SYSTEM_TIME),
    (0xc000_0080, n::FMASK),
    (0xc000_0100, n::KERNEL_GS_BASE),
    (n::TSC_AUX, n::TSC_AUX),
];

/// Windows of MSR numbers, `(first, count)`, that cover [`ALLOWED`]: KVM takes sixteen at most.
const WINDOWS: [(u32, u32); 4] = [(0, 0x400), (n::TSC_DEADLINE, 1), (n::KVM_WALL_CLOCK, 16), (0xc000_0080, 0x100)];

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

/// RDMSR of a register that KVM does not answer; `None` is `#GP(0)`.
pub fn read(msr: u32) -> Option<u64> {
    match msr {
        n::PLATFORM_ID | n::MICROCODE_UPDATE | n::PLATFORM_INFO | n::PERF_STATUS | n::DEBUGCTL => Some(0),
        // Locked, nothing enabled.
        n::FEATURE_CONTROL => Some(1),
        // No banks: KVM's own default are 32, of which the filter would let none be reached.
        n::MCG_CAP | n::MCG_STATUS => Some(0),
        _ => None,
    }
}

/// WRMSR of such a register; `false` is `#GP(0)`.
pub fn write(msr: u32, value: u64) -> bool {
    match msr {
        n::MICROCODE_UPDATE | n::MICROCODE_REVISION | n::PERF_STATUS => true,
        n::DEBUGCTL => value & !3 == 0,
        n::MCG_STATUS => value == 0,
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
        assert_eq!(read(n::FEATURE_CONTROL), Some(1));
        assert_eq!(read(0x1234), None);
        assert!(write(n::MICROCODE_UPDATE, 5));
        assert!(!write(n::DEBUGCTL, 4) && !write(0x1234, 0));
    }
}
