//! Model-specific registers (SDM volume 4; KVM's as documented with the Linux kernel).
//!
//! [`read()`] and [`write()`] need no interpreter: an engine that catches RDMSR and WRMSR itself calls them. Registers of the local APIC go to
//! [`LocalApic`]; unknown ones are an error, which is `#GP(0)` for the guest.

use std::time::{SystemTime, UNIX_EPOCH};

use cpu::cpuid::{ARCH_CAPABILITIES, CpuidModel, Vendor, amd};
use cpu::msr as n;
use cpu::paging::{PHYSICAL_BITS, is_canonical};
use cpu::{CpuState, LocalApic, MsrError, SegmentIndex, cr0, efer};
use memory::GuestRam;

use crate::{steal, tsc};

/// What MSRs reach beyond [`CpuState`].
pub struct MsrEnv<'a> {
    /// For kvmclock's pages.
    pub ram: &'a GuestRam,
    /// The vCPU's local APIC.
    pub lapic: &'a dyn LocalApic,
    /// What CPUID shows: registers of hidden features do not exist.
    pub model: &'a CpuidModel,
}

/// 8 variable ranges, fixed ranges, write-combining.
const MTRR_CAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// The first of the variable ranges in [`CpuState::mtrr`].
const MTRR_VARIABLE_AT: usize = 12;

/// The guest's TSC now.
#[inline]
pub fn guest_tsc(state: &CpuState) -> u64 {
    tsc::read().wrapping_add(state.tsc_offset)
}

/// Where an MTRR register is in [`CpuState::mtrr`].
fn mtrr_index(msr: u32) -> Option<usize> {
    Some(match msr {
        n::MTRR_DEFAULT => 0,
        0x250 => 1,
        0x258 | 0x259 => 2 + (msr - 0x258) as usize,
        0x268..=0x26f => 4 + (msr - 0x268) as usize,
        n::MTRR_VARIABLE..=n::MTRR_VARIABLE_LAST => MTRR_VARIABLE_AT + (msr - n::MTRR_VARIABLE) as usize,
        _ => return None,
    })
}

/// RDMSR. Privilege is the caller's to check.
///
/// # Errors
/// [`MsrError`]: there is no such register.
pub fn read(env: &MsrEnv<'_>, state: &CpuState, msr: u32) -> Result<u64, MsrError> {
    if let Some(index) = mtrr_index(msr) {
        return state.mtrr.get(index).copied().ok_or(MsrError);
    }
    let base = |segment: SegmentIndex| state.segments[segment as usize].base;
    Ok(match msr {
        n::TSC => guest_tsc(state),
        n::TSC_ADJUST => state.tsc_adjust,
        n::PLATFORM_ID | n::MICROCODE_UPDATE | n::PLATFORM_INFO | n::PERF_STATUS | n::DEBUGCTL => 0,
        n::APIC_BASE | n::X2APIC..=n::X2APIC_LAST => env.lapic.read_msr(msr)?,
        n::TSC_DEADLINE => match env.lapic.read_msr(msr)? {
            0 => 0,
            deadline => deadline.wrapping_add(state.tsc_offset),
        },
        // Locked, nothing enabled.
        n::FEATURE_CONTROL => 1,
        n::SPEC_CTRL => state.spec_ctrl,
        n::MICROCODE_REVISION => 1 << 32,
        n::MTRR_CAP => MTRR_CAP_VALUE,
        n::ARCH_CAPABILITIES if env.model.vendor == Vendor::Intel => ARCH_CAPABILITIES,
        n::SYSENTER_CS..=n::SYSENTER_EIP => {
            state.sysenter.get((msr - n::SYSENTER_CS) as usize).copied().ok_or(MsrError)?
        }
        // No banks.
        n::MCG_CAP | n::MCG_STATUS => 0,
        n::MISC_ENABLE => state.misc_enable,
        n::PAT => state.pat,
        n::KVM_SYSTEM_TIME | n::KVM_SYSTEM_TIME_OLD => state.kvm_system_time,
        n::KVM_WALL_CLOCK | n::KVM_WALL_CLOCK_OLD => state.kvm_wall_clock,
        n::KVM_STEAL_TIME => state.kvm_steal_time(),
        n::KVM_PV_EOI => state.kvm_pv_eoi(),
        n::EFER => state.efer,
        n::STAR => state.star,
        n::LSTAR => state.lstar,
        n::CSTAR => state.cstar,
        n::FMASK => state.sfmask,
        n::FS_BASE => base(SegmentIndex::Fs),
        n::GS_BASE => base(SegmentIndex::Gs),
        n::KERNEL_GS_BASE => state.kernel_gs_base,
        n::TSC_AUX if env.model.has_tsc_aux() => state.tsc_aux,
        _ if env.model.vendor == Vendor::Amd => return amd::read_msr(msr).ok_or(MsrError),
        _ => return Err(MsrError),
    })
}

fn check(good: bool) -> Result<(), MsrError> {
    if good { Ok(()) } else { Err(MsrError) }
}

/// Is `kind` a memory type (0, 1, 4, 5, 6)?
fn memory_type(kind: u64) -> bool {
    matches!(kind & 0xff, 0 | 1 | 4 | 5 | 6)
}

/// WRMSR. Privilege is the caller's to check. `true`: address translations must be forgotten (EFER.NXE changed).
///
/// # Errors
/// [`MsrError`]: there is no such register, or it does not take this value. Nothing has changed then.
pub fn write(env: &MsrEnv<'_>, state: &mut CpuState, msr: u32, value: u64) -> Result<bool, MsrError> {
    if let Some(index) = mtrr_index(msr) {
        write_mtrr(state, index, value)?;
        return Ok(false);
    }
    match msr {
        n::TSC => {
            let offset = value.wrapping_sub(tsc::read());
            state.tsc_adjust = state.tsc_adjust.wrapping_add(offset.wrapping_sub(state.tsc_offset));
            state.tsc_offset = offset;
            update_clock(env, state);
        }
        n::TSC_ADJUST => {
            state.tsc_offset = state.tsc_offset.wrapping_add(value.wrapping_sub(state.tsc_adjust));
            state.tsc_adjust = value;
            update_clock(env, state);
        }
        n::APIC_BASE | n::X2APIC..=n::X2APIC_LAST => env.lapic.write_msr(msr, value)?,
        n::TSC_DEADLINE => {
            // The local APIC counts in the host's TSC; zero disarms.
            let deadline = if value == 0 { 0 } else { value.wrapping_sub(state.tsc_offset).max(1) };
            env.lapic.write_msr(msr, deadline)?;
        }
        n::SPEC_CTRL => {
            // IBRS, STIBP, SSBD, BHI_DIS_S.
            check(value & !0x407 == 0)?;
            state.spec_ctrl = value;
        }
        // IBPB, and AMD's SBPB.
        n::PRED_CMD => check(value & !(1 | if env.model.vendor == Vendor::Amd { 1 << 7 } else { 0 }) == 0)?,
        n::MICROCODE_UPDATE | n::MICROCODE_REVISION | n::PERF_STATUS => {}
        n::DEBUGCTL => check(value & !3 == 0)?,
        n::SYSENTER_CS..=n::SYSENTER_EIP => {
            check(msr == n::SYSENTER_CS || is_canonical(value))?;
            *state.sysenter.get_mut((msr - n::SYSENTER_CS) as usize).ok_or(MsrError)? = value;
        }
        n::MCG_STATUS => check(value == 0)?,
        n::MISC_ENABLE => state.misc_enable = value,
        n::PAT => {
            check(value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4..=7)))?;
            state.pat = value;
        }
        n::KVM_SYSTEM_TIME | n::KVM_SYSTEM_TIME_OLD => {
            state.kvm_system_time = value;
            update_clock(env, state);
        }
        n::KVM_WALL_CLOCK | n::KVM_WALL_CLOCK_OLD => {
            state.kvm_wall_clock = value;
            write_wall_clock(env, value);
        }
        n::KVM_STEAL_TIME => {
            check(steal::valid(value))?;
            state.set_kvm_steal_time(value);
        }
        // Kept; the bit that saves an end of interrupt is never set, because here that is no exit.
        n::KVM_PV_EOI => {
            check(value & 2 == 0)?;
            state.set_kvm_pv_eoi(value);
        }
        n::EFER => {
            let auto_ibrs = env.model.features.extended21_eax & amd::leaf21_eax::AUTO_IBRS != 0;
            let writable = efer::SCE | efer::LME | efer::NXE | if auto_ibrs { efer::AIBRSE } else { 0 };
            check(value & !(writable | efer::LMA) == 0)?;
            let changed = (value ^ state.efer) & writable;
            check(changed & efer::LME == 0 || state.cr0 & cr0::PG == 0)?;
            state.efer = (state.efer & !writable) | (value & writable);
            return Ok(changed & efer::NXE != 0);
        }
        n::STAR => state.star = value,
        n::LSTAR => {
            check(is_canonical(value))?;
            state.lstar = value;
        }
        n::CSTAR => {
            check(is_canonical(value))?;
            state.cstar = value;
        }
        n::FMASK => state.sfmask = value & 0xffff_ffff,
        n::FS_BASE | n::GS_BASE => {
            check(is_canonical(value))?;
            let segment = if msr == n::FS_BASE { SegmentIndex::Fs } else { SegmentIndex::Gs };
            state.segments[segment as usize].base = value;
        }
        n::KERNEL_GS_BASE => {
            check(is_canonical(value))?;
            state.kernel_gs_base = value;
        }
        n::TSC_AUX if env.model.has_tsc_aux() => {
            check(value >> 32 == 0)?;
            state.tsc_aux = value;
        }
        _ if env.model.vendor == Vendor::Amd => check(amd::write_msr(msr, value))?,
        _ => return Err(MsrError),
    }
    Ok(false)
}

fn write_mtrr(state: &mut CpuState, index: usize, value: u64) -> Result<(), MsrError> {
    let above = value >> PHYSICAL_BITS != 0;
    check(match index {
        0 => value & !0xcff == 0 && memory_type(value),
        1..MTRR_VARIABLE_AT => value.to_le_bytes().iter().all(|kind| memory_type(u64::from(*kind))),
        // Bases at even places, masks at odd ones.
        _ if index.is_multiple_of(2) => !above && value & 0xf00 == 0 && memory_type(value),
        _ => !above && value & 0x7ff == 0,
    })?;
    *state.mtrr.get_mut(index).ok_or(MsrError)? = value;
    Ok(())
}

/// Writes the `pvclock_vcpu_time_info` of this vCPU, if the guest enabled kvmclock. To be called again when the TSC offset changes or
/// the VM resumes. An address outside RAM is ignored, as KVM does.
pub fn update_clock(env: &MsrEnv<'_>, state: &CpuState) {
    const STABLE: u8 = 1;
    if state.kvm_system_time & 1 == 0 {
        return;
    }
    let gpa = state.kvm_system_time & !1;
    let mut version = [0; 4];
    if !env.ram.read(gpa, &mut version) {
        return;
    }
    // An odd version tells the guest to wait.
    let version = u32::from_le_bytes(version) | 1;
    if !env.ram.write(gpa, &version.to_le_bytes()) {
        return;
    }
    let scale = tsc::scale(env.model.tsc_khz);
    let mut info = [0u8; 28];
    // The same base on all vCPUs: with bases of their own, their clocks would differ by rounding, and "stable" forbids that.
    info[4..12].copy_from_slice(&tsc::origin().wrapping_add(state.tsc_offset).to_le_bytes());
    info[12..20].copy_from_slice(&0_u64.to_le_bytes());
    info[20..24].copy_from_slice(&scale.0.to_le_bytes());
    info[24] = scale.1 as u8;
    info[25] = STABLE;
    if env.ram.write(gpa.wrapping_add(4), &info) {
        let _ = env.ram.write(gpa, &version.wrapping_add(1).to_le_bytes());
    }
}

/// Nanoseconds since the VM's clock started, at host TSC `now`.
fn system_time(env: &MsrEnv<'_>, now: u64) -> u64 {
    tsc::to_nanos(now.wrapping_sub(tsc::origin()), tsc::scale(env.model.tsc_khz))
}

/// Writes the `pvclock_wall_clock`: the real time at which the system time was zero.
fn write_wall_clock(env: &MsrEnv<'_>, gpa: u64) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    let start = now.saturating_sub(u128::from(system_time(env, tsc::read())));
    let mut version = [0; 4];
    if !env.ram.read(gpa, &mut version) {
        return;
    }
    let version = (u32::from_le_bytes(version) | 1).wrapping_add(1);
    let mut info = [0u8; 12];
    info[..4].copy_from_slice(&version.to_le_bytes());
    info[4..8].copy_from_slice(&((start / 1_000_000_000) as u32).to_le_bytes());
    info[8..].copy_from_slice(&((start % 1_000_000_000) as u32).to_le_bytes());
    let _ = env.ram.write(gpa, &info);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::differential::machine;
    use cpu::Nothing;

    #[test]
    fn kvmclock_pages() {
        let (interp, mut state) = machine();
        let env = interp.msr_env();
        assert_eq!(write(&env, &mut state, n::KVM_SYSTEM_TIME, 0x3001), Ok(false));
        let word = |gpa: u64, len: usize| {
            let mut bytes = [0; 8];
            assert!(env.ram.read(gpa, &mut bytes[..len]));
            u64::from_le_bytes(bytes)
        };
        let version = word(0x3000, 4);
        assert!(version != 0 && version % 2 == 0);
        assert_eq!(word(0x3000 + 29, 1), 1, "stable");
        // What the guest would compute now is our time now.
        let scale = (word(0x3000 + 24, 4) as u32, word(0x3000 + 28, 1) as i8);
        let now = tsc::read();
        let seen = word(0x3010, 8) + tsc::to_nanos(now.wrapping_add(state.tsc_offset) - word(0x3008, 8), scale);
        assert!(seen.abs_diff(system_time(&env, now)) < 1000);
        assert!(seen < 3_600_000_000_000, "time starts with the VM: {seen}");
        assert_eq!(write(&env, &mut state, n::KVM_WALL_CLOCK, 0x4000), Ok(false));
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!((word(0x4004, 4) + seen / 1_000_000_000).abs_diff(wall) <= 2);
    }

    #[test]
    fn values_that_are_refused() {
        let (interp, mut state) = machine();
        let env = interp.msr_env();
        let _: &dyn LocalApic = &Nothing;
        for (msr, value) in [
            (n::LSTAR, 1 << 62),
            (n::FS_BASE, 0x8000_0000_0000),
            (n::KERNEL_GS_BASE, 0x8000_0000_0000),
            (n::PAT, 2),
            (n::EFER, 1 << 12),
            (n::EFER, 0),
            (n::MTRR_DEFAULT, 2),
            (n::KVM_STEAL_TIME, 0x1003),
            (n::KVM_PV_EOI, 0x1003),
            (n::MTRR_CAP, 0),
            (n::ARCH_CAPABILITIES, 0),
            (n::SPEC_CTRL, 8),
            (0x1234_5678, 0),
        ] {
            let before = state.clone();
            assert_eq!(write(&env, &mut state, msr, value), Err(MsrError), "{msr:#x}");
            assert_eq!(state, before);
        }
        assert_eq!(read(&env, &state, 0x1234_5678), Err(MsrError));
        let without_nx = state.efer & !efer::NXE;
        assert_eq!(write(&env, &mut state, n::EFER, without_nx), Ok(true));
        assert_eq!(state.efer, without_nx);
    }

    #[test]
    fn tsc_and_its_adjustment() {
        let (interp, mut state) = machine();
        let env = interp.msr_env();
        assert_eq!(write(&env, &mut state, n::TSC_ADJUST, 1 << 40), Ok(false));
        assert_eq!((state.tsc_offset, read(&env, &state, n::TSC_ADJUST)), (1 << 40, Ok(1 << 40)));
        assert_eq!(write(&env, &mut state, n::TSC, 0), Ok(false));
        assert!(guest_tsc(&state) < 1 << 38);
        assert_eq!(state.tsc_adjust, state.tsc_offset);
    }
}
