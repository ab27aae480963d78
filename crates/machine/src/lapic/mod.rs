//! Local APICs (SDM volume 3, chapter 11).
//!
//! [`Lapics`] is the set of all vCPUs' local APICs and the interrupt "wire" between them: it takes messages ([`IcrMessage`], MSIs) and
//! finds the destinations. [`Lapic`] is one of them: registers in `registers`, here the way in from outside and
//! [`cpu::LocalApic`] for the engine.
//!
//! Both register interfaces exist. x2APIC comes by MSR from the engine; the xAPIC page at 0xFEE00000 is at the same address for every
//! vCPU, so [`VcpuBus`] wraps the machine's bus for each vCPU and takes these accesses out.
//!
//! What is pending is published in one atomic word after every change, which makes [`cpu::LocalApic::status`] one load.

mod registers;
mod set;
#[cfg(test)]
mod tests;

pub use registers::LapicState;
pub use set::{IcrMessage, Lapics, Shorthand, VcpuBus};

use std::fmt;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock, Weak};

use cpu::{InterruptStatus, Kick, MsrError};

use crate::clock::{Timer, TimerQueue, TimerTarget};
use crate::state::{StateError, lock};
use registers::{Effect, Registers, Taken};

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC range.
pub const MSR_X2APIC: u32 = 0x800;

/// Rate of the LAPIC timer before its divider: 1 GHz, as KVM's. The guest measures it or reads it from CPUID.
pub const TIMER_HZ: u64 = 1_000_000_000;

/// How an interrupt is to be delivered (the ICR's, MSIs' and IOAPIC entries' common field).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// To all destinations, with the vector.
    Fixed,
    /// To one of the destinations.
    LowestPriority,
    /// System management: there is none here, dropped.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up; the vector is the page number of the start address.
    StartUp,
    /// The vector comes from the PIC.
    ExtInt,
    /// Reserved encoding.
    Reserved,
}

impl Delivery {
    /// From the 3-bit field.
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// What the local APIC needs of the PIC: the INTA cycle.
pub trait InterruptAcknowledge: Send + Sync {
    /// Takes the highest request and returns its vector (the spurious one if there is none any more).
    fn acknowledge(&self) -> u8;
}

/// Who hears EOIs of level-triggered vectors: the IOAPIC.
pub trait EoiListener: Send + Sync {
    /// `vector` was level-triggered and has been handled.
    fn end_of_interrupt(&self, vector: u8);
}

/// What all local APICs share.
pub(crate) struct Shared {
    lapics: RwLock<Vec<Arc<Lapic>>>,
    pic: OnceLock<Weak<dyn InterruptAcknowledge>>,
    eoi: OnceLock<Weak<dyn EoiListener>>,
}

/// Bits of the published word.
const NMI: u32 = 1 << 0;
const INTERRUPT: u32 = 1 << 1;
const INIT: u32 = 1 << 2;
const SIPI: u32 = 1 << 3;
const SIPI_PAGE_SHIFT: u32 = 8;

/// One vCPU's local APIC.
pub struct Lapic {
    id: u32,
    registers: Mutex<Registers>,
    published: AtomicU32,
    kick: RwLock<Option<Arc<dyn Kick>>>,
    timer: Timer,
    /// Added to the host's TSC to give the guest's.
    tsc_offset: AtomicU64,
    shared: Arc<Shared>,
}

impl fmt::Debug for Lapic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lapic")
            .field("id", &self.id)
            .field("registers", &*lock(&self.registers))
            .finish_non_exhaustive()
    }
}

impl Lapic {
    fn new(id: u32, queue: &Arc<TimerQueue>, shared: Arc<Shared>) -> Arc<Self> {
        Arc::new_cyclic(|this: &Weak<Self>| Self {
            id,
            registers: Mutex::new(Registers::firmware(id)),
            published: AtomicU32::new(0),
            kick: RwLock::new(None),
            timer: queue.timer(this.clone()),
            tsc_offset: AtomicU64::new(0),
            shared,
        })
    }

    /// The APIC id: the number of the vCPU.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// Who wakes the vCPU when something becomes pending.
    pub fn set_kick(&self, kick: Arc<dyn Kick>) {
        *self.kick.write().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(kick);
    }

    /// Sets what is added to the host's TSC to give the guest's; for the TSC deadline.
    pub fn set_tsc_offset(&self, offset: u64) {
        self.tsc_offset.store(offset, Ordering::SeqCst);
        let mut registers = lock(&self.registers);
        self.after_change(&mut registers);
    }

    fn guest_tsc(&self) -> u64 {
        self.timer.clock().tsc().wrapping_add(self.tsc_offset.load(Ordering::Relaxed))
    }

    /// Does what is due, sets the timer for the next event, publishes what is pending, kicks the vCPU if something is new.
    fn after_change(&self, registers: &mut Registers) {
        let clock = self.timer.clock();
        let (now, tsc) = (clock.now(), self.guest_tsc());
        registers.run_timer(now, tsc);
        if let Some(wish) = registers.take_timer_wish(now, |ticks| clock.tsc_to_ns(ticks), tsc) {
            self.timer.set(wish);
        }
        self.publish(registers);
    }

    fn publish(&self, registers: &Registers) {
        let mut word = 0;
        if registers.nmi_pending {
            word |= NMI;
        }
        if registers.interrupt_pending() {
            word |= INTERRUPT;
        }
        if registers.init_pending {
            word |= INIT;
        }
        if let Some(page) = registers.sipi_pending {
            word |= SIPI | u32::from(page) << SIPI_PAGE_SHIFT;
        }
        let old = self.published.swap(word, Ordering::SeqCst);
        if word & !old != 0
            && let Some(kick) = &*self.kick.read().unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            kick.kick();
        }
    }

    /// The PIC's INT output, wired to LINT0.
    pub fn set_pic_output(&self, high: bool) {
        let mut registers = lock(&self.registers);
        registers.set_pic_output(high);
        self.publish(&registers);
    }

    /// The NMI button, wired to LINT1.
    pub fn lint1(&self) {
        let mut registers = lock(&self.registers);
        registers.lint1();
        self.publish(&registers);
    }

    /// A message that has found its destination here.
    fn deliver(&self, delivery: Delivery, vector: u8, level: bool) {
        let mut registers = lock(&self.registers);
        registers.deliver(delivery, vector, level);
        self.publish(&registers);
    }

    /// Is this local APIC meant by a destination? (SDM volume 3, 11.6.2)
    fn matches(&self, destination: u32, logical: bool) -> bool {
        lock(&self.registers).matches(destination, logical)
    }

    /// For lowest-priority delivery: the priority that arbitration compares.
    fn arbitration_priority(&self) -> u8 {
        lock(&self.registers).processor_priority()
    }

    /// Does what a register write asked for, with no lock held.
    fn perform(&self, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Eoi(vector) => {
                if let Some(listener) = self.shared.eoi.get().and_then(Weak::upgrade) {
                    listener.end_of_interrupt(vector);
                }
            }
            Effect::Send(message) => set::send(&self.shared, message, Some(self.id)),
        }
    }

    fn access<T>(&self, access: impl FnOnce(&mut Registers, u64, u64) -> (T, Effect)) -> T {
        let mut registers = lock(&self.registers);
        let (now, tsc) = (self.timer.clock().now(), self.guest_tsc());
        // What was due before the access happens before it.
        registers.run_timer(now, tsc);
        let (result, effect) = access(&mut registers, now, tsc);
        self.after_change(&mut registers);
        drop(registers);
        self.perform(effect);
        result
    }

    /// Is the register page at [`crate::layout::LAPIC_BASE`] on (xAPIC mode)?
    pub fn mmio_enabled(&self) -> bool {
        lock(&self.registers).mmio_enabled()
    }

    /// A read of the register page; registers are 32 bits wide at multiples of 16.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        let value = self.access(|registers, now, _| (registers.read_mmio((offset & 0xff0) as u32, now), Effect::None));
        crate::bus::set_value(data, if offset & 0xf < 4 { u64::from(value) >> (offset % 4 * 8) } else { 0 });
    }

    /// A write to the register page; only aligned dwords are defined.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) {
        if offset.is_multiple_of(16) && data.len() >= 4 {
            let value = crate::bus::value(&data[..4]) as u32;
            self.access(|registers, now, _| ((), registers.write_mmio((offset & 0xff0) as u32, value, now)));
        }
    }

    /// Back to power-on, as firmware leaves it.
    pub fn reset(&self) {
        let mut registers = lock(&self.registers);
        *registers = Registers::firmware(self.id);
        self.timer.set(None);
        self.publish(&registers);
    }

    /// The state, with timers relative to the clock.
    pub fn save(&self) -> LapicState {
        lock(&self.registers).save()
    }

    /// Takes over a state. The clock has been set to the saved machine's time before.
    ///
    /// # Errors
    /// The state is damaged or another APIC's.
    pub fn restore(&self, state: &LapicState) -> Result<(), StateError> {
        let restored = Registers::try_from_state(self.id, state)?;
        let mut registers = lock(&self.registers);
        *registers = restored;
        registers.timer_changed();
        self.after_change(&mut registers);
        Ok(())
    }
}

impl TimerTarget for Lapic {
    fn timer_due(&self) {
        let mut registers = lock(&self.registers);
        registers.timer_changed();
        self.after_change(&mut registers);
    }
}

impl cpu::LocalApic for Lapic {
    fn read_msr(&self, msr: u32) -> Result<u64, MsrError> {
        self.access(|registers, now, _| (registers.read_msr(msr, now), Effect::None))
    }

    fn write_msr(&self, msr: u32, value: u64) -> Result<(), MsrError> {
        self.access(|registers, now, _| match registers.write_msr(msr, value, now) {
            Ok(effect) => (Ok(()), effect),
            Err(error) => (Err(error), Effect::None),
        })
    }

    fn cr8(&self) -> u8 {
        lock(&self.registers).tpr >> 4
    }

    fn set_cr8(&self, value: u8) {
        let mut registers = lock(&self.registers);
        registers.tpr = value << 4;
        self.publish(&registers);
    }

    #[inline]
    fn status(&self) -> InterruptStatus {
        let word = self.published.load(Ordering::Acquire);
        InterruptStatus {
            nmi: word & NMI != 0,
            interrupt: word & INTERRUPT != 0,
            init: word & INIT != 0,
            sipi: (word & SIPI != 0).then_some((word >> SIPI_PAGE_SHIFT) as u8),
        }
    }

    fn acknowledge(&self) -> Option<u8> {
        let mut registers = lock(&self.registers);
        let taken = registers.take_interrupt();
        self.publish(&registers);
        drop(registers);
        match taken {
            Taken::Vector(vector) => Some(vector),
            // The PIC updates its output, which comes back through `set_pic_output`: our lock must be free.
            Taken::AskPic => Some(self.shared.pic.get()?.upgrade()?.acknowledge()),
            Taken::Nothing => None,
        }
    }

    fn acknowledge_nmi(&self) {
        let mut registers = lock(&self.registers);
        registers.nmi_pending = false;
        self.publish(&registers);
    }

    fn acknowledge_init(&self) {
        let mut registers = lock(&self.registers);
        registers.acknowledge_init();
        self.publish(&registers);
    }

    fn eoi(&self) {
        self.access(|registers, _, _| ((), registers.end_of_interrupt()));
    }

    fn send_ipi(&self, apic_id: u32, vector: u8, nmi: bool) -> bool {
        let delivery = if nmi { Delivery::Nmi } else { Delivery::Fixed };
        let shorthand = set::Shorthand::None;
        let message = IcrMessage { vector, delivery, logical: false, level: false, shorthand, destination: apic_id };
        set::send_to_one(&self.shared, message)
    }
}
