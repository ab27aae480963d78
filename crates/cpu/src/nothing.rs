//! A machine without devices, for guests that need none: the probe's of engine `kvm`, and those of engines' tests.

use std::sync::Arc;

use crate::{Bus, InterruptStatus, LocalApic, MsrError, VcpuSetup};

/// A bus without devices, which reads as all ones, and a local APIC that never has anything.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Nothing;

impl Nothing {
    /// vCPU 0 on it.
    pub fn setup() -> VcpuSetup {
        VcpuSetup { index: 0, lapic: Arc::new(Self), bus: Arc::new(Self) }
    }
}

impl Bus for Nothing {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, _port: u16, _data: &[u8]) {}
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

impl LocalApic for Nothing {
    fn read_msr(&self, _msr: u32) -> Result<u64, MsrError> {
        Err(MsrError)
    }
    fn write_msr(&self, _msr: u32, _value: u64) -> Result<(), MsrError> {
        Err(MsrError)
    }
    fn cr8(&self) -> u8 {
        0
    }
    fn set_cr8(&self, _value: u8) {}
    fn status(&self) -> InterruptStatus {
        InterruptStatus::default()
    }
    fn acknowledge(&self) -> Option<u8> {
        None
    }
    fn acknowledge_nmi(&self) {}
    fn acknowledge_init(&self) {}
    fn eoi(&self) {}
}
