//! Numbers of model-specific registers (SDM volume 4, table 2-2; KVM's as documented with the Linux kernel,
//! `Documentation/virt/kvm/x86/msr.rst`).

/// IA32_TIME_STAMP_COUNTER.
pub const TSC: u32 = 0x10;
/// MSR_KVM_WALL_CLOCK, the old number.
pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
/// MSR_KVM_SYSTEM_TIME, the old number.
pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
/// IA32_PLATFORM_ID.
pub const PLATFORM_ID: u32 = 0x17;
/// IA32_APIC_BASE.
pub const APIC_BASE: u32 = 0x1b;
/// IA32_FEATURE_CONTROL.
pub const FEATURE_CONTROL: u32 = 0x3a;
/// IA32_TSC_ADJUST.
pub const TSC_ADJUST: u32 = 0x3b;
/// IA32_SPEC_CTRL.
pub const SPEC_CTRL: u32 = 0x48;
/// IA32_PRED_CMD.
pub const PRED_CMD: u32 = 0x49;
/// IA32_BIOS_UPDT_TRIG.
pub const MICROCODE_UPDATE: u32 = 0x79;
/// IA32_BIOS_SIGN_ID.
pub const MICROCODE_REVISION: u32 = 0x8b;
/// MSR_PLATFORM_INFO.
pub const PLATFORM_INFO: u32 = 0xce;
/// IA32_MTRRCAP.
pub const MTRR_CAP: u32 = 0xfe;
/// IA32_ARCH_CAPABILITIES.
pub const ARCH_CAPABILITIES: u32 = 0x10a;
/// IA32_SYSENTER_CS.
pub const SYSENTER_CS: u32 = 0x174;
/// IA32_SYSENTER_ESP.
pub const SYSENTER_ESP: u32 = 0x175;
/// IA32_SYSENTER_EIP.
pub const SYSENTER_EIP: u32 = 0x176;
/// IA32_MCG_CAP.
pub const MCG_CAP: u32 = 0x179;
/// IA32_MCG_STATUS.
pub const MCG_STATUS: u32 = 0x17a;
/// IA32_PERF_STATUS.
pub const PERF_STATUS: u32 = 0x198;
/// IA32_MISC_ENABLE.
pub const MISC_ENABLE: u32 = 0x1a0;
/// IA32_DEBUGCTL.
pub const DEBUGCTL: u32 = 0x1d9;
/// IA32_MTRR_PHYSBASE0, the first of the variable ranges: base and mask in turn.
pub const MTRR_VARIABLE: u32 = 0x200;
/// IA32_MTRR_PHYSMASK7, the last of them.
pub const MTRR_VARIABLE_LAST: u32 = 0x20f;
/// IA32_MTRR_FIX64K_00000, FIX16K_80000, FIX16K_A0000, FIX4K_C0000 to FIX4K_F8000.
pub const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// IA32_PAT.
pub const PAT: u32 = 0x277;
/// IA32_MTRR_DEF_TYPE.
pub const MTRR_DEFAULT: u32 = 0x2ff;
/// SYSCFG, of AMD's CPUs (APM volume 2, appendix A).
pub const SYSCFG: u32 = 0xc001_0010;
/// HWCR, of AMD's CPUs.
pub const HWCR: u32 = 0xc001_0015;
/// NB_CFG, of AMD's CPUs.
pub const NB_CFG: u32 = 0xc001_001f;
/// DE_CFG, of AMD's CPUs.
pub const DE_CFG: u32 = 0xc001_1029;
/// IA32_TSC_DEADLINE.
pub const TSC_DEADLINE: u32 = 0x6e0;
/// The first register of a local APIC in x2APIC mode.
pub const X2APIC: u32 = 0x800;
/// The last number kept for them.
pub const X2APIC_LAST: u32 = 0x8ff;
/// MSR_KVM_WALL_CLOCK_NEW.
pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
/// MSR_KVM_SYSTEM_TIME_NEW.
pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
/// MSR_KVM_STEAL_TIME.
pub const KVM_STEAL_TIME: u32 = 0x4b56_4d03;
/// MSR_KVM_PV_EOI_EN.
pub const KVM_PV_EOI: u32 = 0x4b56_4d04;
/// IA32_EFER.
pub const EFER: u32 = 0xc000_0080;
/// IA32_STAR.
pub const STAR: u32 = 0xc000_0081;
/// IA32_LSTAR.
pub const LSTAR: u32 = 0xc000_0082;
/// IA32_CSTAR.
pub const CSTAR: u32 = 0xc000_0083;
/// IA32_FMASK.
pub const FMASK: u32 = 0xc000_0084;
/// IA32_FS_BASE.
pub const FS_BASE: u32 = 0xc000_0100;
/// IA32_GS_BASE.
pub const GS_BASE: u32 = 0xc000_0101;
/// IA32_KERNEL_GS_BASE.
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
/// IA32_TSC_AUX.
pub const TSC_AUX: u32 = 0xc000_0103;
