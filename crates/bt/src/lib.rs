//! Engine `bt`: binary translation of x86-64 to x86-64.
//!
//! Guest kernel and user code is decoded block by block ([`analyze`]), rewritten ([`emit`]) and run from a code cache ([`cache`]).
//! Most instructions are copied as they are; those with a memory operand go through a software TLB, control flow is linked
//! inside the cache, and what is sensitive or rare goes to the interpreter, one instruction at a time.
//!
//! * [`stubs`]: the register convention, entry, exits.
//! * [`block`]: the vCPU block, all that translated code reaches besides guest memory.
//! * [`vcpu`]: the dispatcher.
//! * [`sampler`]: where the time goes. Code is translated to be short first, and again to be fast where it is hot.
//! * [`direct`]: programs that compute for long are not translated, but run as they are in a process of their own.
//! * [`tlb`]: software TLB, jump slots, indirect targets, and their flushes.
//! * [`signals`]: faults of copied instructions.
//!
//! Not here: 16- and 32-bit code, which the interpreter runs or refuses.
//!
//! Start reading at [`stubs`], then [`emit`].

mod analyze;
mod asm;
mod block;
mod cache;
mod direct;
mod emit;
mod groups;
mod kick;
mod memory;
mod sampler;
mod signals;
mod stubs;
mod table;
mod tlb;
mod trace;
mod vcpu;
mod walks;
mod world;

use std::sync::Arc;

use ::memory::GuestRam;
use cpu::cpuid::CpuidModel;
use cpu::{Engine, Vcpu, VcpuSetup};
use interp::Interp;

use crate::cache::Cache;
use crate::vcpu::{BtVcpu, Shared};

pub use crate::trace::Trace;
/// For tests: where the process of programs that run directly has a page of its own.
#[doc(hidden)]
pub use runner::STUB as OWN_PAGE;

/// Settings of the engine.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of the code cache, 16 MiB to 1 GiB.
    pub code_cache: usize,
    /// Keep even those arithmetic flags exact at faults that no instruction reads any more. Slower; for tests.
    pub precise_flags: bool,
    /// Do SYSCALL, SYSRET and IRET inside the code cache where nothing unusual is asked.
    pub fast_transitions: bool,
    /// Translate code to be short first, and to be fast where it turns out to be hot. Else it is all translated to be fast.
    pub tiers: bool,
    /// Let programs that compute for long run as they are, in processes of their own, where the host and RAM (see
    /// [`GuestRam::shareable`](::memory::GuestRam::shareable)) let them.
    pub direct: bool,
    /// Remember where page tables were found, as the CPU's paging-structure caches do.
    pub remember_tables: bool,
    /// For tests: programs run directly from their first instruction on, whether it pays or not.
    #[doc(hidden)]
    pub direct_at_once: bool,
    /// Count interpreted instructions by kind.
    pub step_histogram: bool,
    /// Run every block in the interpreter, too, and stop at the first difference. Slow; flags are precise then.
    pub lockstep: bool,
    /// Where vCPUs other than the first wait for their start.
    pub parking: Option<Parking>,
    /// What to write down, and where.
    pub trace: Option<Trace>,
    /// What CPUID answers.
    pub model: Arc<CpuidModel>,
    /// For tests of the instruments: changes the bytes of a page, at this guest-virtual address, that the translator is about to see.
    #[doc(hidden)]
    pub tamper: Option<fn(u64, &mut [u8])>,
}

impl Options {
    /// The usual settings for a guest with this CPUID model.
    pub fn new(model: Arc<CpuidModel>) -> Self {
        Self {
            code_cache: 256 << 20,
            precise_flags: false,
            fast_transitions: true,
            tiers: true,
            direct: true,
            remember_tables: true,
            direct_at_once: false,
            step_histogram: false,
            lockstep: false,
            parking: None,
            trace: None,
            model,
            tamper: None,
        }
    }
}

/// The ACPI wake-up mailbox (ACPI 6.5, 5.2.12.19) and the code that watches it. A vCPU at the start of that code sleeps until the guest
/// calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parking {
    /// Linear address of the code, which starts over as long as the vCPU is not called.
    pub code: u64,
    /// Guest-physical address of the mailbox, a page of its own.
    pub mailbox: u64,
}

impl Parking {
    /// The APIC id of the vCPU that the guest calls now.
    fn called(&self, ram: &GuestRam) -> Option<u32> {
        let head = ram.atomic_u64(self.mailbox)?.load(std::sync::atomic::Ordering::Acquire);
        // Command (1: wake up), reserved, APIC id.
        (head as u16 == 1).then_some((head >> 32) as u32)
    }
}

/// The engine over one VM's RAM.
pub struct BtEngine {
    shared: Arc<Shared>,
    ram: GuestRam,
    options: Options,
}

impl BtEngine {
    /// Makes the engine.
    ///
    /// # Errors
    /// One line why not: a host CPU without AVX2 and BMI2, or no memory for the code cache.
    pub fn new(ram: GuestRam, options: Options) -> Result<Self, String> {
        if !std::is_x86_feature_detected!("avx2") || !std::is_x86_feature_detected!("xsave") {
            return Err(
                "engine bt needs a host CPU with AVX2 (any since 2015): this one has none, use --engine interp".into(),
            );
        }
        if !(16 << 20..=1 << 30).contains(&options.code_cache) || !options.code_cache.is_multiple_of(4096) {
            return Err(format!("a code cache of {} bytes is not possible: 16 MiB to 1 GiB", options.code_cache));
        }
        let slow_access = vcpu::slow_access as *const () as u64;
        let mut cache = Cache::new(options.code_cache, slow_access, options.precise_flags || options.lockstep)
            .map_err(|e| format!("no memory for the code cache: {e}"))?;
        cache.compact = options.tiers;
        cache.trace = options.trace.clone().filter(|trace| trace.blocks);
        if options.model.cpus > 1 {
            cache.count_pauses();
        }
        if !options.lockstep {
            cache.use_host_xsave();
        }
        let shared = Shared::new(cache, ram.clone(), options.parking);
        ram.code_pages().set_listener(shared.clone());
        Ok(Self { shared, ram, options })
    }
}

impl Engine for BtEngine {
    fn name(&self) -> &'static str {
        "bt"
    }

    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String> {
        if self.options.lockstep && setup.index > 0 {
            return Err("lockstep is for one virtual CPU: leave --cpus at 1".into());
        }
        let mut interp = Interp::new(setup.clone(), self.ram.clone(), self.options.model.clone());
        if let Some(trace) = self.options.trace.clone().filter(|trace| trace.interrupts) {
            interp.observe(Box::new(trace::Interrupts { trace, cpu: setup.index }));
        }
        interp.set_alone(self.options.model.cpus <= 1);
        let mut vcpu = BtVcpu::new(setup, self.shared.clone(), interp)?;
        if self.options.lockstep {
            vcpu.lockstep = Some(Default::default());
        }
        vcpu.trace = self.options.trace.clone().filter(|trace| trace.tlb);
        vcpu.pv_unhalt = self.options.model.pv_unhalt;
        vcpu.fast_transitions = self.options.fast_transitions;
        vcpu.tamper = self.options.tamper;
        vcpu.direct_at_once = self.options.direct_at_once;
        vcpu.walks.on = self.options.remember_tables;
        vcpu.processes = direct::processes(self.options.model.cpus);
        vcpu.direct_wanted = self.options.direct && !self.options.lockstep && self.options.tamper.is_none();
        if self.options.step_histogram {
            vcpu.step_histogram = Some(Default::default());
        }
        Ok(vcpu)
    }

    fn ram(&self) -> &GuestRam {
        &self.ram
    }

    fn model(&self) -> &CpuidModel {
        &self.options.model
    }

    fn clock(&self) -> u64 {
        interp::tsc::clock(self.options.model.tsc_khz)
    }

    fn set_clock(&self, nanoseconds: u64) {
        interp::tsc::set_clock(self.options.model.tsc_khz, nanoseconds);
    }
}
