//! Sensitive instructions that are no control-register or segment loads.

use cpu::gpr::{R11, RAX, RBX, RCX, RDX, RSI};
use cpu::paging::is_canonical;
use cpu::{Exception, Segment, SegmentIndex, cr4, efer, rflags};

use super::{Cx, mask};
use crate::decode::Insn;
use crate::interp::{Outcome, TlbFlush};
use crate::msr;

const FS: usize = SegmentIndex::Fs as usize;
const GS: usize = SegmentIndex::Gs as usize;

/// Attributes of the flat segments that SYSCALL, SYSRET, SYSENTER and SYSEXIT load.
fn flat(selector: u16, code: bool, dpl: u16) -> Segment {
    let attributes = if code { 0xa09b } else { 0xc093 } | dpl << 5;
    Segment { base: 0, limit: u32::MAX, attributes, selector }
}

fn set_cs_ss(cx: &mut Cx<'_>, cs: u16, ss: u16, dpl: u16) {
    cx.st.segments[SegmentIndex::Cs as usize] = flat(cs, true, dpl);
    cx.st.segments[SegmentIndex::Ss as usize] = flat(ss, false, dpl);
}

fn iopl_allows(cx: &Cx<'_>) -> Result<(), Exception> {
    if u64::from(cx.st.cpl()) <= (cx.st.rflags & rflags::IOPL) >> 12 { Ok(()) } else { Err(Exception::gp(0)) }
}

pub(super) fn cli(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    iopl_allows(cx)?;
    cx.st.rflags &= !rflags::IF;
    Ok(())
}

pub(super) fn sti(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    iopl_allows(cx)?;
    cx.shadow = cx.st.rflags & rflags::IF == 0;
    cx.st.rflags |= rflags::IF;
    Ok(())
}

pub(super) fn hlt(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    cx.st.halted = true;
    cx.it.counters.halts += 1;
    cx.it.steal.pause();
    cx.outcome = Some(Outcome::Halted);
    Ok(())
}

pub(super) fn syscall(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    if cx.st.efer & efer::SCE == 0 {
        return Err(Exception::ud());
    }
    cx.st.gpr[RCX] = cx.next;
    cx.st.gpr[R11] = cx.st.rflags & !rflags::RF;
    cx.st.rflags = (cx.st.rflags & !(cx.st.sfmask | rflags::RF)) | rflags::FIXED;
    cx.next = cx.st.lstar;
    let selector = (cx.st.star >> 32) as u16 & 0xfffc;
    set_cs_ss(cx, selector, selector.wrapping_add(8), 0);
    cx.no_trap = cx.st.rflags & rflags::TF == 0;
    Ok(())
}

pub(super) fn sysret(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    if cx.st.efer & efer::SCE == 0 {
        return Err(Exception::ud());
    }
    cx.privileged()?;
    if insn.raw.code() != iced_x86::Code::Sysretq {
        cx.outcome = Some(Outcome::Unsupported("SYSRET to compatibility mode".into()));
        return Ok(());
    }
    if !is_canonical(cx.st.gpr[RCX]) {
        return Err(Exception::gp(0));
    }
    cx.next = cx.st.gpr[RCX];
    cx.st.rflags = (cx.st.gpr[R11] & 0x3c_7fd7) | rflags::FIXED;
    let selector = (cx.st.star >> 48) as u16;
    set_cs_ss(cx, selector.wrapping_add(16) | 3, selector.wrapping_add(8) | 3, 3);
    Ok(())
}

pub(super) fn sysenter(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    let [cs, esp, eip] = cx.st.sysenter;
    if cs & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    cx.st.rflags &= !(rflags::VM | rflags::IF | rflags::RF);
    cx.next = eip;
    cx.st.gpr[cpu::gpr::RSP] = esp;
    let selector = cs as u16 & 0xfffc;
    set_cs_ss(cx, selector, selector.wrapping_add(8), 0);
    Ok(())
}

pub(super) fn sysexit(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    let cs = cx.st.sysenter[0];
    if cs & 0xfffc == 0 || cx.st.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    if insn.raw.code() != iced_x86::Code::Sysexitq {
        cx.outcome = Some(Outcome::Unsupported("SYSEXIT to compatibility mode".into()));
        return Ok(());
    }
    let (rip, rsp) = (cx.st.gpr[RDX], cx.st.gpr[RCX]);
    if !is_canonical(rip) || !is_canonical(rsp) {
        return Err(Exception::gp(0));
    }
    cx.next = rip;
    cx.st.gpr[cpu::gpr::RSP] = rsp;
    let selector = cs as u16;
    set_cs_ss(cx, selector.wrapping_add(32) | 3, selector.wrapping_add(40) | 3, 3);
    Ok(())
}

pub(super) fn swapgs(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let base = &mut cx.st.segments[GS].base;
    std::mem::swap(base, &mut cx.st.kernel_gs_base);
    Ok(())
}

pub(super) fn cpuid(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    let (leaf, subleaf) = (cx.st.gpr[RAX] as u32, cx.st.gpr[RCX] as u32);
    let index = cx.it.setup.index;
    let [eax, ebx, ecx, edx] = cx.it.model.cpuid(index, cx.st, leaf, subleaf);
    for (register, value) in [(RAX, eax), (RBX, ebx), (RCX, ecx), (RDX, edx)] {
        cx.st.gpr[register] = u64::from(value);
    }
    Ok(())
}

fn tsc_allowed(cx: &Cx<'_>) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::TSD != 0 && cx.st.cpl() != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

fn put_edx_eax(cx: &mut Cx<'_>, value: u64) {
    cx.st.gpr[RAX] = value & 0xffff_ffff;
    cx.st.gpr[RDX] = value >> 32;
}

pub(super) fn rdtsc(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    tsc_allowed(cx)?;
    put_edx_eax(cx, msr::guest_tsc(cx.st));
    Ok(())
}

pub(super) fn rdtscp(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    if !cx.it.model.has_rdtscp() {
        return Err(Exception::ud());
    }
    tsc_allowed(cx)?;
    put_edx_eax(cx, msr::guest_tsc(cx.st));
    cx.st.gpr[RCX] = cx.st.tsc_aux & 0xffff_ffff;
    Ok(())
}

pub(super) fn rdpid(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    if !cx.it.model.has_rdpid() {
        return Err(Exception::ud());
    }
    let value = cx.st.tsc_aux & 0xffff_ffff;
    cx.set(insn, insn.dst, 8, value)
}

/// There are no performance counters: every index is invalid.
pub(super) fn rdpmc(_cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    Err(Exception::gp(0))
}

pub(super) fn rdmsr(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let number = cx.st.gpr[RCX] as u32;
    let value = msr::read(&cx.it.msr_env(), cx.st, number).map_err(|_| Exception::gp(0))?;
    put_edx_eax(cx, value);
    Ok(())
}

pub(super) fn wrmsr(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let number = cx.st.gpr[RCX] as u32;
    let value = (cx.st.gpr[RAX] & 0xffff_ffff) | cx.st.gpr[RDX] << 32;
    let env = cx.it.msr_env();
    let flush = msr::write(&env, cx.st, number, value).map_err(|_| Exception::gp(0))?;
    if flush {
        cx.flush(TlbFlush::All);
    }
    Ok(())
}

pub(super) fn wbinvd(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    cx.privileged()
}

pub(super) fn invlpg(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    cx.privileged()?;
    let address = cx.address(&insn.mem);
    if is_canonical(address) {
        cx.flush(TlbFlush::Page(address));
    }
    Ok(())
}

/// KVM's hypercalls: number in RAX, arguments in RBX, RCX, RDX, RSI, answer in RAX (`Documentation/virt/kvm/x86/hypercalls.rst`).
pub(super) fn vmcall(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    const KICK_CPU: u64 = 5;
    const SEND_IPI: u64 = 10;
    const KVM_ENOSYS: i64 = 1000;
    const KVM_EPERM: i64 = 1;
    let answer = if cx.st.cpl() != 0 {
        -KVM_EPERM
    } else if cx.st.gpr[RAX] == SEND_IPI {
        send_ipi(cx)
    } else if cx.st.gpr[RAX] == KICK_CPU && cx.hooks.kick_cpu(cx.st.gpr[RCX] as u32) {
        0
    } else {
        -KVM_ENOSYS
    };
    cx.st.gpr[RAX] = answer as u64;
    Ok(())
}

/// KVM_HC_SEND_IPI: to the APIC ids from RDX on that have a bit in RCX:RBX, what RSI says as an ICR. Returns how many there were.
fn send_ipi(cx: &mut Cx<'_>) -> i64 {
    const KVM_EINVAL: i64 = 22;
    /// Destination mode and shorthand, which have no meaning here.
    const NOT_HERE: u64 = 1 << 11 | 3 << 18;
    const FIXED: u64 = 0;
    const NMI: u64 = 4;
    let g = &cx.st.gpr;
    let (bits, first, icr) = (u128::from(g[RCX]) << 64 | u128::from(g[RBX]), g[RDX] as u32, g[RSI]);
    let mode = icr >> 8 & 7;
    if icr & NOT_HERE != 0 || !matches!(mode, FIXED | NMI) {
        return -KVM_EINVAL;
    }
    let lapic = &cx.it.setup.lapic;
    let wanted = (0..128_u32).filter(|bit| bits >> bit & 1 != 0).filter_map(|bit| first.checked_add(bit));
    wanted.filter(|id| lapic.send_ipi(*id, icr as u8, mode == NMI)).count() as i64
}

fn fsgsbase_enabled(cx: &Cx<'_>) -> Result<(), Exception> {
    if cx.st.cr4 & cr4::FSGSBASE == 0 { Err(Exception::ud()) } else { Ok(()) }
}

fn read_base(cx: &mut Cx<'_>, insn: &Insn, segment: usize) -> Result<(), Exception> {
    fsgsbase_enabled(cx)?;
    let base = cx.st.segments[segment].base;
    cx.set(insn, insn.dst, insn.size, base & mask(insn.size))
}

fn write_base(cx: &mut Cx<'_>, insn: &Insn, segment: usize) -> Result<(), Exception> {
    fsgsbase_enabled(cx)?;
    let base = cx.get(insn, insn.dst, insn.size)?;
    if !is_canonical(base) {
        return Err(Exception::gp(0));
    }
    cx.st.segments[segment].base = base;
    Ok(())
}

pub(super) fn rdfsbase(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    read_base(cx, insn, FS)
}

pub(super) fn rdgsbase(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    read_base(cx, insn, GS)
}

pub(super) fn wrfsbase(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    write_base(cx, insn, FS)
}

pub(super) fn wrgsbase(cx: &mut Cx<'_>, insn: &Insn) -> Result<(), Exception> {
    write_base(cx, insn, GS)
}

fn set_ac(cx: &mut Cx<'_>, on: bool) -> Result<(), Exception> {
    if cx.st.cpl() != 0 || !cx.it.model.has_smap() {
        return Err(Exception::ud());
    }
    if on {
        cx.st.rflags |= rflags::AC;
    } else {
        cx.st.rflags &= !rflags::AC;
    }
    Ok(())
}

pub(super) fn clac(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    set_ac(cx, false)
}

pub(super) fn stac(cx: &mut Cx<'_>, _insn: &Insn) -> Result<(), Exception> {
    set_ac(cx, true)
}

impl Cx<'_> {
    /// Forgets translations, here and at the caller's.
    pub(super) fn flush(&mut self, what: TlbFlush) {
        match what {
            TlbFlush::Page(address) => self.it.mmu.flush_page(address),
            _ => self.it.mmu.flush(),
        }
        self.hooks.tlb_flush(what);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use cpu::cpuid::CpuidModel;
    use cpu::{Bus, CpuState, InterruptStatus, LocalApic, MsrError, Nothing, VcpuSetup, gpr};
    use memory::GuestRam;

    use crate::interp::{Interp, NoHooks, Outcome};

    /// Three vCPUs' local APICs, which keep what is sent.
    #[derive(Default)]
    struct Three(Mutex<Vec<(u32, u8, bool)>>);

    impl LocalApic for Three {
        fn read_msr(&self, _: u32) -> Result<u64, MsrError> {
            Err(MsrError)
        }
        fn write_msr(&self, _: u32, _: u64) -> Result<(), MsrError> {
            Err(MsrError)
        }
        fn cr8(&self) -> u8 {
            0
        }
        fn set_cr8(&self, _: u8) {}
        fn status(&self) -> InterruptStatus {
            InterruptStatus::default()
        }
        fn acknowledge(&self) -> Option<u8> {
            None
        }
        fn acknowledge_nmi(&self) {}
        fn acknowledge_init(&self) {}
        fn eoi(&self) {}
        fn send_ipi(&self, apic_id: u32, vector: u8, nmi: bool) -> bool {
            self.0.lock().unwrap().push((apic_id, vector, nmi));
            apic_id < 3
        }
    }

    #[test]
    fn interrupts_to_many_by_one_hypercall() {
        let ram = GuestRam::new(32 << 20).unwrap();
        assert!(ram.write(0x1000, &0x2003_u64.to_le_bytes()) && ram.write(0x2000, &0x83_u64.to_le_bytes()));
        assert!(ram.write(0x5000, &[0x0f, 0x01, 0xc1]));
        let lapic = Arc::new(Three::default());
        let bus: Arc<dyn Bus> = Arc::new(Nothing);
        let model = Arc::new(CpuidModel::new(3, 2_000_000));
        let mut interp = Interp::new(VcpuSetup { index: 0, lapic: lapic.clone(), bus }, ram, model);
        let mut call = |low: u64, high: u64, first: u64, icr: u64, user: bool| {
            let mut state = CpuState::default();
            state.enter_long_mode(0x1000, 0x10, 0x18);
            state.rip = 0x5000;
            for (register, value) in
                [(gpr::RAX, 10), (gpr::RBX, low), (gpr::RCX, high), (gpr::RDX, first), (gpr::RSI, icr)]
            {
                state.gpr[register] = value;
            }
            if user {
                assert!(interp.mmu.ram.write(0x1000, &0x2007_u64.to_le_bytes()));
                assert!(interp.mmu.ram.write(0x2000, &0x87_u64.to_le_bytes()));
                state.segments[2].attributes |= 3 << 5;
                state.segments[1].attributes |= 3 << 5;
            }
            assert_eq!(interp.step(&mut state, &mut NoHooks), Outcome::Done);
            (state.gpr[gpr::RAX] as i64, std::mem::take(&mut *lapic.0.lock().unwrap()))
        };
        assert_eq!(call(0b110, 0, 0, 0x51, false), (2, vec![(1, 0x51, false), (2, 0x51, false)]));
        assert_eq!(
            call(1, 1, 2, 0x400, false),
            (1, vec![(2, 0, true), (66, 0, true)]),
            "NMI, and one that is not there"
        );
        assert_eq!(call(u64::MAX, u64::MAX, u64::from(u32::MAX), 0x51, false).1.len(), 1, "no id beyond 32 bits");
        for icr in [0x851, 0x4_0051, 0x151] {
            assert_eq!(call(1, 0, 0, icr, false), (-22, vec![]));
        }
        assert_eq!(call(1, 0, 0, 0x51, true), (-1, vec![]), "not for user programs");
    }
}
