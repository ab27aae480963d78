//! What the guest's CPUID instruction answers. (Being written.)

/// The CPUID model of one VM.
#[derive(Clone, Debug)]
pub struct CpuidModel {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Frequency of the time-stamp counter, in kHz.
    pub tsc_khz: u32,
}

impl CpuidModel {
    /// The model for a VM with `cpus` vCPUs whose TSC runs at `tsc_khz`.
    pub fn new(cpus: u32, tsc_khz: u32) -> Self {
        Self { cpus, tsc_khz }
    }
}
