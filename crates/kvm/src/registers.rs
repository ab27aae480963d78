//! A vCPU's state in the form that all engines share, read from and given to the kernel.
//!
//! Not part of it, as under every engine: the local APIC's registers, with the APIC base and CR8 (see [`crate::chips`]).

use cpu::msr as n;
use cpu::{CpuState, FpState, Segment, TableRegister, cr0, gpr};
use kvm_bindings as b;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::ioctls::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};
use crate::refusal::told;

/// What decides which registers exist.
#[derive(Clone, Copy, Debug)]
pub struct Features {
    /// XSAVE is shown, so XCR0 exists.
    pub xsave: bool,
    /// The bits XCR0 may have.
    pub xcr0: u64,
    /// IA32_SPEC_CTRL exists.
    pub spec_ctrl: bool,
    /// MSR_KVM_STEAL_TIME exists.
    pub steal_time: bool,
    /// MSR_KVM_PV_EOI_EN exists.
    pub pv_eoi: bool,
    /// The TSC's offset can be read and set exactly.
    pub tsc_offset: bool,
    /// The bits that addresses of MTRRs may have.
    pub physical_mask: u64,
    /// The guest sees an AMD CPU.
    pub amd: bool,
}

type Result<T> = std::result::Result<T, String>;

/// The host's TSC.
pub fn host_tsc() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 CPU and has no effect but its result.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn segment_to_kvm(segment: &Segment) -> b::kvm_segment {
    let bit = |number: u32| ((segment.attributes >> number) & 1) as u8;
    b::kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: (segment.attributes & 0xf) as u8,
        present: bit(7),
        dpl: segment.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: 1 - bit(7),
        padding: 0,
    }
}

fn segment_from_kvm(segment: &b::kvm_segment) -> Segment {
    let bit = |value: u8, number: u32| u16::from(value & 1) << number;
    let attributes = u16::from(segment.type_ & 0xf)
        | bit(segment.s, 4)
        | u16::from(segment.dpl & 3) << 5
        | bit(segment.present & (1 - (segment.unusable & 1)), 7)
        | bit(segment.avl, 12)
        | bit(segment.l, 13)
        | bit(segment.db, 14)
        | bit(segment.g, 15);
    Segment { base: segment.base, limit: segment.limit, attributes, selector: segment.selector }
}

fn table_to_kvm(table: TableRegister) -> b::kvm_dtable {
    b::kvm_dtable { base: table.base, limit: table.limit, padding: [0; 3] }
}

fn table_from_kvm(table: &b::kvm_dtable) -> TableRegister {
    TableRegister { base: table.base, limit: table.limit }
}

/// General registers as KVM orders them.
pub fn regs_to_kvm(state: &CpuState) -> b::kvm_regs {
    let g = &state.gpr;
    b::kvm_regs {
        rax: g[gpr::RAX],
        rbx: g[gpr::RBX],
        rcx: g[gpr::RCX],
        rdx: g[gpr::RDX],
        rsi: g[gpr::RSI],
        rdi: g[gpr::RDI],
        rsp: g[gpr::RSP],
        rbp: g[gpr::RBP],
        r8: g[gpr::R8],
        r9: g[gpr::R9],
        r10: g[gpr::R10],
        r11: g[gpr::R11],
        r12: g[gpr::R12],
        r13: g[gpr::R13],
        r14: g[gpr::R14],
        r15: g[gpr::R15],
        rip: state.rip,
        rflags: state.rflags,
    }
}

/// The other way.
pub fn regs_from_kvm(regs: &b::kvm_regs, state: &mut CpuState) {
    let g = &mut state.gpr;
    g[gpr::RAX] = regs.rax;
    g[gpr::RBX] = regs.rbx;
    g[gpr::RCX] = regs.rcx;
    g[gpr::RDX] = regs.rdx;
    g[gpr::RSI] = regs.rsi;
    g[gpr::RDI] = regs.rdi;
    g[gpr::RSP] = regs.rsp;
    g[gpr::RBP] = regs.rbp;
    g[gpr::R8] = regs.r8;
    g[gpr::R9] = regs.r9;
    g[gpr::R10] = regs.r10;
    g[gpr::R11] = regs.r11;
    g[gpr::R12] = regs.r12;
    g[gpr::R13] = regs.r13;
    g[gpr::R14] = regs.r14;
    g[gpr::R15] = regs.r15;
    state.rip = regs.rip;
    state.rflags = regs.rflags;
}

/// Puts `state` into KVM's system registers; CR8, the APIC base and what is pending stay as they are in `sregs`.
fn sregs_to_kvm(state: &CpuState, sregs: &mut b::kvm_sregs) {
    let [es, cs, ss, ds, fs, gs] = state.segments.each_ref().map(segment_to_kvm);
    (sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs) = (es, cs, ss, ds, fs, gs);
    sregs.ldt = segment_to_kvm(&state.ldtr);
    sregs.tr = segment_to_kvm(&state.tr);
    sregs.gdt = table_to_kvm(state.gdtr);
    sregs.idt = table_to_kvm(state.idtr);
    (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer) = (state.cr0, state.cr2, state.cr3, state.cr4, state.efer);
    // Neither an interrupt on its way: vCPUs stop where there is none.
    sregs.interrupt_bitmap = [0; 4];
}

/// The other way.
pub fn sregs_from_kvm(sregs: &b::kvm_sregs, state: &mut CpuState) {
    state.segments = [&sregs.es, &sregs.cs, &sregs.ss, &sregs.ds, &sregs.fs, &sregs.gs].map(segment_from_kvm);
    state.ldtr = segment_from_kvm(&sregs.ldt);
    state.tr = segment_from_kvm(&sregs.tr);
    state.gdtr = table_from_kvm(&sregs.gdt);
    state.idtr = table_from_kvm(&sregs.idt);
    (state.cr0, state.cr2, state.cr3, state.cr4, state.efer) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4, sregs.efer);
    // ET is always one; AMD-V leaves it as it was given.
    state.cr0 |= cr0::ET;
}

/// The part of KVM's XSAVE area that [`FpState`] keeps, in the form it keeps it in.
fn fp_from_kvm(xsave: &b::kvm_xsave) -> FpState {
    let mut bytes = [0; 832];
    for (to, from) in bytes.chunks_exact_mut(4).zip(&xsave.region) {
        to.copy_from_slice(&from.to_le_bytes());
    }
    let present = bytes[FpState::XSTATE_BV];
    let default = FpState::default();
    // What is in its initial state is not necessarily written out.
    if present & 1 == 0 {
        bytes[..24].copy_from_slice(&default.bytes[..24]);
        bytes[32..160].fill(0);
    }
    if present & 2 == 0 {
        bytes[160..416].fill(0);
    }
    if present & 4 == 0 {
        bytes[FpState::YMM_HIGH..].fill(0);
    }
    bytes[28..32].copy_from_slice(&default.bytes[28..32]);
    // Bytes 416 to 511 are software's; of the header only XSTATE_BV is kept.
    bytes[416..FpState::YMM_HIGH].fill(0);
    bytes[FpState::XSTATE_BV] = 7;
    FpState { bytes }
}

fn fp_to_kvm(fp: &FpState, xcr0: u64) -> b::kvm_xsave {
    let mut bytes = fp.bytes;
    bytes[28..32].copy_from_slice(&0xffff_u32.to_le_bytes());
    bytes[416..FpState::YMM_HIGH].fill(0);
    bytes[FpState::XSTATE_BV] = (xcr0 & 7 | 3) as u8;
    let mut xsave = b::kvm_xsave::default();
    for (to, from) in xsave.region.iter_mut().zip(bytes.chunks_exact(4)) {
        *to = from.try_into().map_or(0, u32::from_le_bytes);
    }
    xsave
}

/// MSRs and the places of their values.
fn msrs<'a>(state: &'a mut CpuState, features: &Features) -> Vec<(u32, &'a mut u64)> {
    let [default, mtrrs @ ..] = &mut state.mtrr;
    let numbers = n::MTRR_FIXED.into_iter().chain(n::MTRR_VARIABLE..=n::MTRR_VARIABLE_LAST);
    let [cs, esp, eip] = &mut state.sysenter;
    let [_, pv_eoi, steal_time, _] = &mut state.kvm_misc;
    let mut all = vec![
        (n::STAR, &mut state.star),
        (n::LSTAR, &mut state.lstar),
        (n::CSTAR, &mut state.cstar),
        (n::FMASK, &mut state.sfmask),
        (n::KERNEL_GS_BASE, &mut state.kernel_gs_base),
        (n::SYSENTER_CS, cs),
        (n::SYSENTER_ESP, esp),
        (n::SYSENTER_EIP, eip),
        (n::TSC_AUX, &mut state.tsc_aux),
        (n::TSC_ADJUST, &mut state.tsc_adjust),
        (n::PAT, &mut state.pat),
        (n::MISC_ENABLE, &mut state.misc_enable),
        (n::MTRR_DEFAULT, default),
        (n::KVM_SYSTEM_TIME, &mut state.kvm_system_time),
        (n::KVM_WALL_CLOCK, &mut state.kvm_wall_clock),
    ];
    if features.spec_ctrl {
        all.push((n::SPEC_CTRL, &mut state.spec_ctrl));
    }
    // One that is in use and does not exist here is to be refused.
    for (exists, number, place) in
        [(features.steal_time, n::KVM_STEAL_TIME, steal_time), (features.pv_eoi, n::KVM_PV_EOI, pv_eoi)]
    {
        if exists || *place != 0 {
            all.push((number, place));
        }
    }
    all.extend(numbers.zip(mtrrs));
    all
}

/// KVM_GET_MSRS or KVM_SET_MSRS as its caller needs it: one at a time, so that it is known which one does not work.
pub fn get_msr(fd: &VcpuFd, number: u32) -> Result<u64> {
    let entry = b::kvm_msr_entry { index: number, ..Default::default() };
    let mut list = b::Msrs::from_entries(&[entry]).map_err(|_| "no memory".to_string())?;
    match fd.get_msrs(&mut list) {
        Ok(1) => Ok(list.as_slice().first().map_or(0, |entry| entry.data)),
        Ok(_) => Err(format!("KVM has no MSR {number:#x}")),
        Err(error) => Err(told("to read MSRs")(error)),
    }
}

/// See [`get_msr`].
pub fn set_msr(fd: &VcpuFd, number: u32, value: u64) -> Result<()> {
    let entry = b::kvm_msr_entry { index: number, data: value, ..Default::default() };
    let list = b::Msrs::from_entries(&[entry]).map_err(|_| "no memory".to_string())?;
    match fd.set_msrs(&list) {
        Ok(1) => Ok(()),
        Ok(_) => Err(format!("KVM does not take {value:#x} for MSR {number:#x}")),
        Err(error) => Err(told("to write MSRs")(error)),
    }
}

/// What is added to the host's TSC to give the guest's.
pub fn tsc_offset(fd: &VcpuFd, features: &Features) -> Result<u64> {
    if !features.tsc_offset {
        let guest = get_msr(fd, n::TSC)?;
        return Ok(guest.wrapping_sub(host_tsc()));
    }
    let mut offset = 0_u64;
    let attribute = tsc_attribute(&mut offset);
    // SAFETY: the attribute's value goes to `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(offset) } else { Err(told("to tell the TSC's offset")(kvm_ioctls::Error::last())) }
}

fn tsc_attribute(offset: *mut u64) -> b::kvm_device_attr {
    b::kvm_device_attr {
        flags: 0,
        group: b::KVM_VCPU_TSC_CTRL,
        attr: b::KVM_VCPU_TSC_OFFSET.into(),
        addr: offset as u64,
    }
}

fn set_tsc_offset(fd: &VcpuFd, features: &Features, mut offset: u64) -> Result<()> {
    if !features.tsc_offset {
        return set_msr(fd, n::TSC, host_tsc().wrapping_add(offset));
    }
    let attribute = tsc_attribute(&raw mut offset);
    // SAFETY: the attribute's value is read from `offset`, which outlives the call.
    let result = unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) };
    if result == 0 { Ok(()) } else { Err(told("the TSC's offset")(kvm_ioctls::Error::last())) }
}

/// The state of a stopped vCPU.
pub fn get(fd: &VcpuFd, features: &Features) -> Result<CpuState> {
    // First: it makes KVM take INIT and start-up IPIs that have come.
    let run_state = fd.get_mp_state().map_err(told("to tell the run state"))?.mp_state;
    let mut state = CpuState::default();
    regs_from_kvm(&fd.get_regs().map_err(told("to tell registers"))?, &mut state);
    sregs_from_kvm(&fd.get_sregs().map_err(told("to tell system registers"))?, &mut state);
    state.fp = fp_from_kvm(&fd.get_xsave().map_err(told("to tell the FPU's state"))?);
    if features.xsave {
        let xcrs = fd.get_xcrs().map_err(told("to tell XCR0"))?;
        state.xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value);
    }
    let debug = fd.get_debug_regs().map_err(told("to tell debug registers"))?;
    state.dr[..4].copy_from_slice(&debug.db);
    (state.dr[6], state.dr[7]) = (debug.dr6, debug.dr7);
    for (number, place) in msrs(&mut state, features) {
        *place = get_msr(fd, number)?;
    }
    state.tsc_offset = tsc_offset(fd, features)?;
    let events = fd.get_vcpu_events().map_err(told("to tell pending events"))?;
    state.interrupt_shadow = events.interrupt.shadow != 0;
    state.nmi_blocked = events.nmi.masked != 0;
    state.halted = run_state == b::KVM_MP_STATE_HALTED;
    state.wait_for_sipi = waits_for_sipi(run_state);
    Ok(state)
}

/// Does a vCPU in this run state wait for a start-up IPI?
pub fn waits_for_sipi(run_state: u32) -> bool {
    matches!(run_state, b::KVM_MP_STATE_UNINITIALIZED | b::KVM_MP_STATE_INIT_RECEIVED | b::KVM_MP_STATE_SIPI_RECEIVED)
}

/// Gives a stopped vCPU a state.
pub fn set(fd: &VcpuFd, features: &Features, state: &CpuState) -> Result<()> {
    let mut sregs = fd.get_sregs().map_err(told("to tell system registers"))?;
    sregs_to_kvm(state, &mut sregs);
    fd.set_sregs(&sregs).map_err(told("these system registers"))?;
    fd.set_regs(&regs_to_kvm(state)).map_err(told("these registers"))?;
    // The extended state comes before XCR0, which may take away the right to have it.
    let xsave = fp_to_kvm(&state.fp, features.xcr0);
    // SAFETY: KVM reads 4 KiB at most for guests without states that had to be asked for, and the area has them.
    unsafe { fd.set_xsave(&xsave) }.map_err(told("this state of the FPU"))?;
    if features.xsave {
        let mut xcrs = b::kvm_xcrs { nr_xcrs: 1, ..Default::default() };
        xcrs.xcrs[0] = b::kvm_xcr { xcr: 0, reserved: 0, value: state.xcr0 };
        fd.set_xcrs(&xcrs).map_err(told("this XCR0"))?;
    }
    let mut debug = b::kvm_debugregs { dr6: state.dr[6], dr7: state.dr[7], ..Default::default() };
    debug.db.copy_from_slice(&state.dr[..4]);
    fd.set_debug_regs(&debug).map_err(told("these debug registers"))?;
    // Before the clocks' registers: they are computed with it.
    set_tsc_offset(fd, features, state.tsc_offset)?;
    let mut copy = state.clone();
    for mask in copy.mtrr.iter_mut().skip(13).step_by(2) {
        *mask &= features.physical_mask;
    }
    for (number, value) in msrs(&mut copy, features) {
        set_msr(fd, number, *value)?;
    }
    let mut events = b::kvm_vcpu_events {
        flags: b::KVM_VCPUEVENT_VALID_SHADOW | b::KVM_VCPUEVENT_VALID_NMI_PENDING,
        ..Default::default()
    };
    events.interrupt.shadow = if state.interrupt_shadow { b::KVM_X86_SHADOW_INT_STI as u8 } else { 0 };
    events.nmi.masked = state.nmi_blocked.into();
    fd.set_vcpu_events(&events).map_err(told("these pending events"))?;
    // The guest's watchdogs should not take the time it stood still for its own fault. It fails where the guest has no kvmclock.
    let _ = fd.kvmclock_ctrl();
    let run_state = match (state.wait_for_sipi, state.halted) {
        (true, _) => b::KVM_MP_STATE_INIT_RECEIVED,
        (false, true) => b::KVM_MP_STATE_HALTED,
        (false, false) => b::KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(b::kvm_mp_state { mp_state: run_state }).map_err(told("this run state"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn busy() -> CpuState {
        let mut state = CpuState::default();
        state.enter_long_mode(0x1000, 0x10, 0x18);
        for (at, register) in state.gpr.iter_mut().enumerate() {
            *register = 0x1111_1111_1111_1111 * at as u64;
        }
        (state.rip, state.rflags) = (0xffff_8000_0000_1234, 0x246);
        state.gdtr = TableRegister { base: 0xd8000, limit: 47 };
        state.segments[5].base = 0xffff_8880_0000_0000;
        state.ldtr = Segment { base: 0, limit: 0, attributes: 0, selector: 0 };
        for (at, byte) in state.fp.bytes[32..416].iter_mut().enumerate() {
            *byte = at as u8;
        }
        state.fp.bytes[FpState::YMM_HIGH..].fill(7);
        state
    }

    #[test]
    fn there_and_back() {
        let state = busy();
        let mut sregs = b::kvm_sregs { cr8: 3, apic_base: 0xfee0_0d00, ..Default::default() };
        sregs_to_kvm(&state, &mut sregs);
        assert_eq!((sregs.cr8, sregs.apic_base), (3, 0xfee0_0d00));
        assert_eq!((sregs.ldt.unusable, sregs.cs.l, sregs.cs.unusable), (1, 1, 0));
        let mut back = CpuState { fp: fp_from_kvm(&fp_to_kvm(&state.fp, 7)), ..CpuState::default() };
        regs_from_kvm(&regs_to_kvm(&state), &mut back);
        sregs_from_kvm(&sregs, &mut back);
        back.mtrr = state.mtrr;
        assert_eq!(back, state);
    }

    #[test]
    fn initial_parts_of_the_fpu_state() {
        let mut xsave = fp_to_kvm(&busy().fp, 7);
        xsave.region[FpState::XSTATE_BV / 4] = 2;
        let fp = fp_from_kvm(&xsave);
        assert_eq!(fp.bytes[..2], [0x7f, 0x03]);
        assert!(fp.bytes[32..160].iter().chain(&fp.bytes[FpState::YMM_HIGH..]).all(|byte| *byte == 0));
        assert_eq!(fp.bytes[160..170], busy().fp.bytes[160..170]);
    }

    #[test]
    fn all_registers_have_a_place_of_their_own() {
        let features = Features {
            xsave: true,
            xcr0: 7,
            spec_ctrl: true,
            steal_time: true,
            pv_eoi: true,
            tsc_offset: true,
            physical_mask: u64::MAX,
            amd: false,
        };
        let mut state = CpuState::default();
        let mut numbers: Vec<u32> = msrs(&mut state, &features).into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers.len(), 18 + 27);
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers.len(), 18 + 27);
    }
}
