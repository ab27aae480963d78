//! The architectural state of one vCPU.

use serde::{Deserialize, Serialize};

/// Indices into [`CpuState::gpr`]: the numbering of the instruction encoding.
#[allow(missing_docs)]
pub mod gpr {
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
    pub const R8: usize = 8;
    pub const R9: usize = 9;
    pub const R10: usize = 10;
    pub const R11: usize = 11;
    pub const R12: usize = 12;
    pub const R13: usize = 13;
    pub const R14: usize = 14;
    pub const R15: usize = 15;
}

/// Bits of RFLAGS (SDM volume 1, 3.4.3).
#[allow(missing_docs)]
pub mod rflags {
    pub const CF: u64 = 1 << 0;
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0 (SDM volume 3, 2.5).
#[allow(missing_docs)]
pub mod cr0 {
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4 (SDM volume 3, 2.5).
#[allow(missing_docs)]
pub mod cr4 {
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const LA57: u64 = 1 << 12;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
    pub const PKE: u64 = 1 << 22;
}

/// Bits of IA32_EFER (SDM volume 3, 2.2.1).
#[allow(missing_docs)]
pub mod efer {
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
    pub const AIBRSE: u64 = 1 << 21;
}

/// A segment register with its hidden part (SDM volume 3, 3.4.3).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (granularity already applied).
    pub limit: u32,
    /// Access rights as in bits 8 to 23 of a descriptor's high word shifted right by 8: type 0..=3, S 4, DPL 5..=6, P 7,
    /// AVL 12, L 13, D/B 14, G 15 (the VMX "access rights" format without the unusable bit).
    pub attributes: u16,
    /// The selector.
    pub selector: u16,
}

impl Segment {
    /// Requestor/descriptor privilege level of the loaded descriptor.
    pub const fn dpl(&self) -> u8 {
        ((self.attributes >> 5) & 3) as u8
    }

    /// Is the segment present (loaded with a usable descriptor)?
    pub const fn present(&self) -> bool {
        self.attributes & 0x80 != 0
    }

    /// The L bit: 64-bit code.
    pub const fn long(&self) -> bool {
        self.attributes & 0x2000 != 0
    }

    /// The D/B bit: 32-bit default operand size.
    pub const fn big(&self) -> bool {
        self.attributes & 0x4000 != 0
    }
}

/// Order of [`CpuState::segments`]: the encoding's segment-register numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub enum SegmentIndex {
    Es = 0,
    Cs = 1,
    Ss = 2,
    Ds = 3,
    Fs = 4,
    Gs = 5,
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableRegister {
    /// Linear base address.
    pub base: u64,
    /// Limit: offset of the last byte.
    pub limit: u16,
}

/// x87, SSE and AVX state in the standard (non-compacted) XSAVE format: legacy area (512 bytes), header (64), YMM high halves (256)
/// (SDM volume 1, 13.4). The header's XSTATE_BV is kept with bits 0 to 2 set.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FpState {
    /// The raw area.
    pub bytes: [u8; 832],
}

impl FpState {
    /// Offset of FCW in the area.
    pub const FCW: usize = 0;
    /// Offset of MXCSR in the area.
    pub const MXCSR: usize = 24;
    /// MXCSR's bits that exist (SDM volume 1, 10.2.3).
    pub const MXCSR_MASK: u32 = 0xffff;
    /// Offset of ST0/MM0 in the area; each takes 16 bytes.
    pub const ST: usize = 32;
    /// Offset of XMM0 in the area; each takes 16 bytes.
    pub const XMM: usize = 160;
    /// Offset of XSTATE_BV in the area.
    pub const XSTATE_BV: usize = 512;
    /// Offset of the high half of YMM0 in the area; each takes 16 bytes.
    pub const YMM_HIGH: usize = 576;

    /// The 16-byte field at `offset`, as a number; zero for an offset outside the area.
    pub fn get_u128(&self, offset: usize) -> u128 {
        self.bytes.get(offset..offset + 16).and_then(|b| b.try_into().ok()).map_or(0, u128::from_le_bytes)
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.bytes[24], self.bytes[25], self.bytes[26], self.bytes[27]])
    }
}

impl Default for FpState {
    /// The state after FNINIT with MXCSR at its reset value (SDM volume 1, 8.1.5 and 10.2.3).
    fn default() -> Self {
        let mut bytes = [0; 832];
        bytes[0..2].copy_from_slice(&0x037f_u16.to_le_bytes());
        bytes[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        bytes[28..32].copy_from_slice(&Self::MXCSR_MASK.to_le_bytes());
        bytes[512] = 7;
        Self { bytes }
    }
}

impl Serialize for FpState {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&self.bytes)
    }
}

impl<'de> Deserialize<'de> for FpState {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = Vec::<u8>::deserialize(deserializer)?;
        let bytes = bytes.try_into().map_err(|_| serde::de::Error::custom("the x87/SSE/AVX area has 832 bytes"))?;
        Ok(Self { bytes })
    }
}

/// All architectural state of one vCPU, in one format for every engine. The local APIC's state is the machine's.
///
/// The layout is `repr(C)`: translated code reaches fields by their offset.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// General registers in encoding order, see [`gpr`].
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS; bit 1 always set.
    pub rflags: u64,
    /// x87, SSE, AVX.
    pub fp: FpState,
    /// ES, CS, SS, DS, FS, GS, see [`SegmentIndex`]. The current privilege level is SS's DPL (0 in real mode).
    pub segments: [Segment; 6],
    /// LDTR.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// GDTR.
    pub gdtr: TableRegister,
    /// IDTR.
    pub idtr: TableRegister,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4. (CR8 is the local APIC's.)
    pub cr4: u64,
    /// DR0 to DR3, then DR6 and DR7 at their own index; 4 and 5 unused.
    pub dr: [u64; 8],
    /// XCR0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS, _ESP, _EIP.
    pub sysenter: [u64; 3],
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// What is added to the host's TSC to give the guest's.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST: what the guest added to its TSC (already part of `tsc_offset`).
    pub tsc_adjust: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL: kept, without effect.
    pub spec_ctrl: u64,
    /// MTRR: default type, then the 11 fixed ranges, then base and mask of 8 variable ranges.
    pub mtrr: [u64; 28],
    /// kvmclock: MSR_KVM_SYSTEM_TIME_NEW (guest-physical address | enable bit).
    pub kvm_system_time: u64,
    /// kvmclock: MSR_KVM_WALL_CLOCK_NEW (guest-physical address of the last write).
    pub kvm_wall_clock: u64,
    /// MSR_KVM_POLL_CONTROL, MSR_KVM_PV_EOI_EN, MSR_KVM_STEAL_TIME, MSR_KVM_ASYNC_PF_EN: kept for the guest.
    pub kvm_misc: [u64; 4],
    /// Interrupts are inhibited until after the next instruction (STI, MOV SS, POP SS).
    pub interrupt_shadow: bool,
    /// An NMI handler is running: further NMIs wait for IRET.
    pub nmi_blocked: bool,
    /// HLT was executed and nothing has woken the vCPU yet.
    pub halted: bool,
    /// The vCPU waits for INIT/SIPI or the wake-up mailbox and runs nothing.
    pub wait_for_sipi: bool,
}

/// Indices into [`CpuState::kvm_misc`].
const KVM_PV_EOI: usize = 1;
const KVM_STEAL_TIME: usize = 2;

impl Default for CpuState {
    /// The state after RESET (SDM volume 3, table 9-1), except that CS:RIP and the mode are for the loader to set.
    fn default() -> Self {
        let data = Segment { base: 0, limit: 0xffff, attributes: 0x0093, selector: 0 };
        let mut segments = [data; 6];
        segments[SegmentIndex::Cs as usize] =
            Segment { base: 0xffff_0000, limit: 0xffff, attributes: 0x009b, selector: 0xf000 };
        let mut gprs = [0; 16];
        gprs[gpr::RDX] = 0x0008_06f2;
        let mut dr = [0; 8];
        dr[6] = 0xffff_0ff0;
        dr[7] = 0x400;
        Self {
            gpr: gprs,
            rip: 0xfff0,
            rflags: rflags::FIXED,
            fp: FpState::default(),
            segments,
            ldtr: Segment { base: 0, limit: 0xffff, attributes: 0x0082, selector: 0 },
            tr: Segment { base: 0, limit: 0xffff, attributes: 0x008b, selector: 0 },
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: cr0::ET | cr0::CD | cr0::NW,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr,
            xcr0: 1,
            efer: 0,
            star: 0,
            lstar: 0,
            cstar: 0,
            sfmask: 0,
            kernel_gs_base: 0,
            sysenter: [0; 3],
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            pat: 0x0007_0406_0007_0406,
            misc_enable: 1,
            spec_ctrl: 0,
            mtrr: [0; 28],
            kvm_system_time: 0,
            kvm_wall_clock: 0,
            kvm_misc: [0; 4],
            interrupt_shadow: false,
            nmi_blocked: false,
            halted: false,
            wait_for_sipi: false,
        }
    }
}

impl CpuState {
    /// The current privilege level, 0 to 3.
    pub const fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 { 0 } else { self.segments[SegmentIndex::Ss as usize].dpl() }
    }

    /// MSR_KVM_STEAL_TIME: guest-physical address | enable bit.
    pub const fn kvm_steal_time(&self) -> u64 {
        self.kvm_misc[KVM_STEAL_TIME]
    }

    /// Sets MSR_KVM_STEAL_TIME.
    pub const fn set_kvm_steal_time(&mut self, value: u64) {
        self.kvm_misc[KVM_STEAL_TIME] = value;
    }

    /// MSR_KVM_PV_EOI_EN: guest-physical address | enable bit.
    pub const fn kvm_pv_eoi(&self) -> u64 {
        self.kvm_misc[KVM_PV_EOI]
    }

    /// Sets MSR_KVM_PV_EOI_EN.
    pub const fn set_kvm_pv_eoi(&mut self, value: u64) {
        self.kvm_misc[KVM_PV_EOI] = value;
    }

    /// Is the CPU in IA-32e mode with a 64-bit code segment?
    pub const fn is_64bit_code(&self) -> bool {
        self.efer & efer::LMA != 0 && self.segments[SegmentIndex::Cs as usize].long()
    }

    /// Puts the CPU into 64-bit mode as boot protocols want it: paging on with the tables at `cr3`, flat segments with the given
    /// selectors, interrupts off, FPU usable. CR4 gets PAE; EFER gets SCE, LME, LMA, NXE.
    pub fn enter_long_mode(&mut self, cr3: u64, code_selector: u16, data_selector: u16) {
        self.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
        self.cr3 = cr3;
        self.cr4 = cr4::PAE;
        self.efer = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        self.rflags = rflags::FIXED;
        // As firmware leaves them: MTRRs and the fixed ranges enabled, everything write-back.
        self.mtrr[0] = 0xc06;
        for fixed in &mut self.mtrr[1..12] {
            *fixed = 0x0606_0606_0606_0606;
        }
        let data = Segment { base: 0, limit: u32::MAX, attributes: 0xc093, selector: data_selector };
        self.segments = [data; 6];
        self.segments[SegmentIndex::Cs as usize] =
            Segment { base: 0, limit: u32::MAX, attributes: 0xa09b, selector: code_selector };
    }
}
