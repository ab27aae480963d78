//! The engine: one VM of KVM's over the RAM.

use std::sync::Arc;

use cpu::cpuid::{ARCH_CAPABILITIES, CpuidModel, Vendor, kvm_eax};
use cpu::{Chips, Engine, Vcpu, VcpuSetup};
use kvm_bindings as b;
use kvm_ioctls::VmFd;
use memory::GuestRam;

use crate::chips::KernelChips;
use crate::cpuid::GuestCpuid;
use crate::dirty::{Dirty, DirtyLog, Log};
use crate::host::{Host, cap};
use crate::kick::Cell;
use crate::msr;
use crate::probe::Doubt;
use crate::refusal::refused;
use crate::registers::{self, Features};
use crate::vcpu::{KvmVcpu, VcpuParts};
use crate::watch::Watch;

/// Where KVM puts a task-state segment and a page of page tables that some Intel CPUs need for real mode: below 4 GiB, above the PCI hole
/// and the local APICs, where the guest has nothing.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Where the machine keeps its further CPUs until the guest calls them: see [`Options::parking`].
#[derive(Clone, Copy, Debug)]
pub struct Parking {
    /// The code that watches the mailbox; 4 KiB.
    pub code: u64,
    /// The ACPI multiprocessor wake-up mailbox.
    pub mailbox: u64,
}

/// Settings of the engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// What CPUID shows if this host's KVM has it.
    pub model: CpuidModel,
    /// Leave vCPUs that are in the parking code asleep until the mailbox calls them, instead of letting them spin.
    pub parking: Option<Parking>,
    /// Whether and how to note which pages the guest writes: see [`KvmEngine::take_dirty`].
    pub dirty_log: DirtyLog,
}

impl Options {
    /// The usual settings for a guest with this CPUID model.
    pub fn new(model: CpuidModel) -> Self {
        Self { model, parking: None, dirty_log: DirtyLog::Off }
    }
}

/// The engine over one VM's RAM.
pub struct KvmEngine {
    vm: Arc<VmFd>,
    ram: GuestRam,
    chips: Arc<KernelChips>,
    cpuid: GuestCpuid,
    features: Features,
    watch: Arc<Watch>,
    arch_capabilities: u64,
    enforce_pv_features: bool,
    loses_registers: bool,
    parking: Option<Parking>,
    dirty: Option<Arc<Log>>,
    doubt: Option<Arc<Doubt>>,
}

impl KvmEngine {
    /// Makes the VM: memory, interrupt chips, filters.
    ///
    /// # Errors
    /// One line why not.
    pub fn new(host: &Host, ram: GuestRam, options: Options) -> Result<Self, String> {
        let model = &options.model;
        let capabilities = host.capabilities();
        if model.cpus > capabilities.max_vcpus {
            return Err(format!(
                "this host's KVM runs at most {} vCPUs a VM: choose fewer with --cpus",
                capabilities.max_vcpus
            ));
        }
        let cpuid = GuestCpuid::new(host.kvm(), model)?;
        let end = ram.pieces().iter().map(|(start, _, len)| start + len).max().unwrap_or_default();
        if end >> cpuid.physical_bits() != 0 {
            return Err(format!(
                "this CPU's guests have {} address bits, less than {} GiB of memory need: choose a smaller --memory",
                cpuid.physical_bits(),
                end >> 30
            ));
        }
        Self::build(host, ram, &options, cpuid).inspect_err(|_| {
            if let Some(doubt) = host.doubt() {
                doubt.raise();
            }
        })
    }

    fn build(host: &Host, ram: GuestRam, options: &Options, cpuid: GuestCpuid) -> Result<Self, String> {
        let capabilities = host.capabilities();
        let vm = host.create_vm().map_err(|error| error.to_string())?;
        vm.set_tss_address(TSS_ADDRESS).map_err(refused("a place for the task-state segment"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(refused("a place for page tables"))?;
        if capabilities.msr_filter {
            msr::filter(&vm).map_err(refused("the filter of MSRs"))?;
        }
        let mut no_pmu = b::kvm_enable_cap { cap: cap::PMU_CAPABILITY, ..Default::default() };
        no_pmu.args[0] = b::KVM_PMU_CAP_DISABLE.into();
        // CPUID shows no performance counters; kernels that cannot take them away have them hidden only.
        let _ = vm.enable_cap(&no_pmu);
        let features = Features {
            xsave: cpuid.model().features.leaf1_ecx & cpu::cpuid::leaf1_ecx::XSAVE != 0,
            xcr0: cpuid.model().xcr0_mask(),
            spec_ctrl: cpuid.has_spec_ctrl(),
            steal_time: cpuid.paravirtual() & kvm_eax::STEAL_TIME != 0,
            pv_eoi: cpuid.paravirtual() & kvm_eax::PV_EOI != 0,
            tsc_offset: capabilities.tsc_offset,
            physical_mask: (1 << cpuid.physical_bits()) - 1,
            amd: cpuid.model().vendor == Vendor::Amd,
        };
        let vm = Arc::new(vm);
        let chips = KernelChips::create(vm.clone(), features, capabilities.eventfds)?;
        let dirty = Log::new(vm.clone(), &ram, capabilities, options.dirty_log);
        for (slot, (start, address, len)) in (0..).zip(ram.pieces()) {
            let region = b::kvm_userspace_memory_region {
                slot,
                flags: if dirty.is_some() { b::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: start,
                memory_size: len,
                userspace_addr: address as u64,
            };
            // SAFETY: the memory is the VM's RAM, which `self` keeps mapped as long as the VM exists; pieces do not overlap.
            unsafe { vm.set_user_memory_region(region) }.map_err(refused("the guest's memory"))?;
        }
        let watch = Watch::start().map_err(|error| format!("the host gives no thread: {error}"))?;
        Ok(Self {
            vm,
            ram,
            chips,
            features,
            watch: Arc::new(watch),
            arch_capabilities: if cpuid.has_arch_capabilities() { host_arch_capabilities(host) } else { 0 },
            cpuid,
            enforce_pv_features: capabilities.enforces_pv_features,
            loses_registers: host_is_amd(),
            parking: options.parking,
            dirty,
            doubt: host.doubt(),
        })
    }
}

impl KvmEngine {
    /// The pages that vCPUs have written since the last call, with [`Options::dirty_log`]. What devices and the monitor write is not
    /// among them: they write through this process's mapping.
    ///
    /// # Errors
    /// One line why not.
    pub fn take_dirty(&self) -> Result<Vec<Dirty>, String> {
        self.dirty.as_ref().ok_or("nobody asked to note which pages are written")?.take()
    }

    /// Are they noted in rings (and not in bitmaps)?
    pub fn has_dirty_rings(&self) -> bool {
        self.dirty.as_ref().is_some_and(|log| log.by_rings())
    }
}

/// What KVM tells guests of the host's immunity against speculation attacks, as far as the model may tell it: the guest's code runs on this
/// very CPU, so nothing may be told that is not so.
fn host_arch_capabilities(host: &Host) -> u64 {
    let entry = b::kvm_msr_entry { index: cpu::msr::ARCH_CAPABILITIES, ..Default::default() };
    let Ok(mut list) = b::Msrs::from_entries(&[entry]) else { return 0 };
    match host.kvm().get_msrs(&mut list) {
        Ok(1) => list.as_slice().first().map_or(0, |entry| entry.data & ARCH_CAPABILITIES),
        _ => 0,
    }
}

/// AMD-V loses a vCPU's registers when it shuts down.
fn host_is_amd() -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    [vendor.ebx, vendor.edx, vendor.ecx] != [0x756e_6547, 0x4965_6e69, 0x6c65_746e] // "GenuineIntel"
}

impl KvmEngine {
    fn make_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String> {
        let fd = self.vm.create_vcpu(setup.index.into()).map_err(refused("a vCPU"))?;
        if self.enforce_pv_features {
            let mut enforce = b::kvm_enable_cap { cap: cap::ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
            enforce.args[0] = 1;
            fd.enable_cap(&enforce).map_err(refused("the filter of paravirtual features"))?;
        }
        fd.set_cpuid2(&self.cpuid.entries(setup.index)?).map_err(refused("the CPUID model"))?;
        if self.cpuid.has_arch_capabilities() {
            // Some KVMs refuse what they told of the host themselves; that it is immune against nothing is always right to say. Without
            // either it is KVM's own word.
            let set = |value| registers::set_msr(&fd, cpu::msr::ARCH_CAPABILITIES, value);
            let _ = set(self.arch_capabilities).or_else(|_| set(0));
        }
        if let Some(dirty) = &self.dirty {
            dirty.add(&fd).map_err(|error| format!("KVM gives no ring of written pages: {error}"))?;
        }
        let cell = Cell::new(fd);
        self.chips.add(cell.clone());
        let parts = VcpuParts {
            cell,
            index: setup.index,
            bus: setup.bus,
            ram: self.ram.clone(),
            features: self.features,
            watch: self.watch.clone(),
            keep_last: self.loses_registers,
            parking: self.parking,
            dirty: self.dirty.clone(),
            doubt: self.doubt.clone(),
        };
        Ok(Box::new(KvmVcpu::new(parts)))
    }
}

impl Engine for KvmEngine {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String> {
        self.make_vcpu(setup).inspect_err(|_| {
            if let Some(doubt) = &self.doubt {
                doubt.raise();
            }
        })
    }

    fn model(&self) -> &CpuidModel {
        self.cpuid.model()
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn chips(&self) -> Option<Arc<dyn Chips>> {
        Some(self.chips.clone())
    }

    fn clock(&self) -> u64 {
        self.vm.get_clock().map_or(0, |clock| clock.clock)
    }

    fn set_clock(&self, nanoseconds: u64) {
        let clock = b::kvm_clock_data { clock: nanoseconds, ..Default::default() };
        let _ = self.vm.set_clock(&clock);
    }
}
