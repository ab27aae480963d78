//! The registers of one local APIC: interrupt acceptance, priorities, EOI, the LVT, the timer, the ICR (SDM volume 3, 11.4 to 11.12).

use std::ops::{Deref, DerefMut};

use cpu::MsrError;
use cpu::chips::LapicRegisters;
use serde::{Deserialize, Serialize};

use super::set::{IcrMessage, Shorthand};
use super::{Delivery, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, TIMER_HZ};
use crate::layout;
use crate::state::StateError;

const BASE_BSP: u64 = 1 << 8;
const BASE_X2APIC: u64 = 1 << 10;
const BASE_ENABLE: u64 = 1 << 11;

const SVR_ENABLE: u32 = 1 << 8;
const LVT_MASKED: u32 = 1 << 16;
/// Integrated APIC, six LVT entries, no EOI-broadcast suppression.
const VERSION: u32 = 0x0005_0014;

/// Indices into [`LapicState::lvt`], in order of the registers.
const TIMER: usize = 0;
const LINT0: usize = 3;
const LINT1: usize = 4;
const ERROR: usize = 5;
/// Bits of each LVT register that a write sets.
const LVT_WRITABLE: [u32; 6] = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
/// Bits that exist but only the APIC sets: delivery status, remote IRR.
const LVT_READ_ONLY: u32 = 0x5000;

const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

/// A periodic timer wakes the host at most this often, in ns; the guest sees missed periods merged, as an IRR bit merges them.
const MIN_PERIOD_NS: u64 = 20_000;

/// Saved state of one local APIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LapicState {
    /// APIC id.
    pub id: u32,
    /// IA32_APIC_BASE.
    pub base: u64,
    /// Task priority.
    pub tpr: u8,
    /// In-service, trigger-mode and request registers, vector 0 in bit 0 of the first word.
    pub isr: [u32; 8],
    /// See `isr`.
    pub tmr: [u32; 8],
    /// See `isr`.
    pub irr: [u32; 8],
    /// Spurious-interrupt vector register.
    pub svr: u32,
    /// Error status as the guest reads it.
    pub esr: u32,
    /// Errors since the guest last wrote ESR.
    pub esr_collecting: u32,
    /// Interrupt command register.
    pub icr: u64,
    /// LVT: timer, thermal, performance, LINT0, LINT1, error.
    pub lvt: [u32; 6],
    /// Logical destination (xAPIC mode).
    pub ldr: u32,
    /// Destination format (xAPIC mode).
    pub dfr: u32,
    /// Timer: initial count and divide configuration.
    pub timer_initial: u32,
    /// See `timer_initial`.
    pub timer_divide: u32,
    /// When the count reaches zero next, in clock nanoseconds; `None` while it stands at zero.
    pub timer_end: Option<u64>,
    /// IA32_TSC_DEADLINE; 0 when not armed.
    pub tsc_deadline: u64,
    /// Level of the PIC's INT output (on the bootstrap processor).
    pub pic_output: bool,
    /// An ExtINT message has come.
    pub extint_pending: bool,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// An INIT is pending.
    pub init_pending: bool,
    /// A start-up IPI with this page is pending.
    pub sipi_pending: Option<u8>,
    /// INIT was received and no SIPI yet.
    pub wait_for_sipi: bool,
}

/// Indices into [`LapicRegisters::page`] (11.4.1), and those of the LVT in the order of [`LapicState::lvt`].
mod page {
    pub const ID: usize = 0x02;
    pub const VERSION: usize = 0x03;
    pub const TPR: usize = 0x08;
    pub const LDR: usize = 0x0d;
    pub const DFR: usize = 0x0e;
    pub const SVR: usize = 0x0f;
    pub const ISR: usize = 0x10;
    pub const TMR: usize = 0x18;
    pub const IRR: usize = 0x20;
    pub const ESR: usize = 0x28;
    pub const ICR: usize = 0x30;
    pub const LVT: [usize; 6] = [0x32, 0x33, 0x34, 0x35, 0x36, 0x37];
    pub const INITIAL: usize = 0x38;
    pub const CURRENT: usize = 0x39;
    pub const DIVIDE: usize = 0x3e;
}

impl LapicState {
    /// The divider: 1 to 128 (11.5.4).
    fn divider(&self) -> u64 {
        let bits = self.timer_divide >> 1 & 4 | self.timer_divide & 3;
        if bits == 7 { 1 } else { 2 << bits }
    }

    /// The registers at clock time `now`.
    pub(crate) fn to_registers(&self, now: u64) -> LapicRegisters {
        let mut words = [0; 64];
        words[page::ID] = self.id << 24;
        words[page::VERSION] = VERSION;
        words[page::TPR] = self.tpr.into();
        (words[page::LDR], words[page::DFR], words[page::SVR]) = (self.ldr, self.dfr, self.svr);
        for (first, from) in [(page::ISR, &self.isr), (page::TMR, &self.tmr), (page::IRR, &self.irr)] {
            words[first..first + 8].copy_from_slice(from);
        }
        words[page::ESR] = self.esr;
        (words[page::ICR], words[page::ICR + 1]) = (self.icr as u32, (self.icr >> 32) as u32);
        for (index, lvt) in page::LVT.into_iter().zip(self.lvt) {
            words[index] = lvt;
        }
        (words[page::INITIAL], words[page::DIVIDE]) = (self.timer_initial, self.timer_divide);
        words[page::CURRENT] = self.timer_end.map_or(0, |end| {
            // What is due has not come yet: as little as possible is left.
            let ticks = end.saturating_sub(now).div_ceil(self.divider()).max(1);
            u32::try_from(ticks).unwrap_or(u32::MAX).min(self.timer_initial)
        });
        LapicRegisters {
            page: words,
            base: self.base,
            tsc_deadline: self.tsc_deadline,
            nmi: self.nmi_pending,
            wait_for_sipi: self.wait_for_sipi,
            sipi: self.sipi_pending,
        }
    }

    /// The state of local APIC `id` that has these registers at clock time `now`.
    pub(crate) fn from_registers(id: u32, registers: &LapicRegisters, now: u64, pic_output: bool) -> Self {
        let words = &registers.page;
        let eight =
            |first: usize| std::array::from_fn(|at| words[first + at] & if at == 0 { 0xffff_0000 } else { u32::MAX });
        let x2apic = registers.base & BASE_X2APIC != 0;
        let mut lvt = [0; 6];
        for ((to, from), writable) in lvt.iter_mut().zip(page::LVT).zip(LVT_WRITABLE) {
            *to = words[from] & writable;
        }
        let deadline_mode = lvt[TIMER] >> 17 & 3 == 2;
        let mut state = Self {
            id,
            base: registers.base,
            tpr: words[page::TPR] as u8,
            isr: eight(page::ISR),
            tmr: eight(page::TMR),
            irr: eight(page::IRR),
            svr: words[page::SVR],
            esr: words[page::ESR],
            esr_collecting: 0,
            icr: (u64::from(words[page::ICR + 1]) << 32 | u64::from(words[page::ICR])) & !(1 << 12),
            lvt,
            ldr: if x2apic { 0 } else { words[page::LDR] & 0xff00_0000 },
            dfr: if x2apic { u32::MAX } else { words[page::DFR] },
            timer_initial: words[page::INITIAL],
            timer_divide: words[page::DIVIDE] & 0xb,
            timer_end: None,
            tsc_deadline: if deadline_mode { registers.tsc_deadline } else { 0 },
            pic_output,
            extint_pending: false,
            nmi_pending: registers.nmi,
            init_pending: false,
            sipi_pending: registers.sipi,
            wait_for_sipi: registers.wait_for_sipi,
        };
        let left = u64::from(words[page::CURRENT]) * state.divider();
        state.timer_end = (!deadline_mode && left > 0).then(|| now.saturating_add(left));
        state
    }

    /// Is it a state that local APIC `id` can be in?
    pub(crate) fn check(&self, id: u32) -> Result<(), StateError> {
        Registers::try_from_state(id, self).map(|_| ())
    }
}

/// What remains to be done after a register write, when the lock is free.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Effect {
    None,
    /// EOI of this level-triggered vector is to be broadcast.
    Eoi(u8),
    /// The ICR was written.
    Send(IcrMessage),
}

/// What [`Registers::take_interrupt`] found.
pub(super) enum Taken {
    Vector(u8),
    AskPic,
    Nothing,
}

/// The live registers: a checked [`LapicState`].
#[derive(Debug)]
pub(super) struct Registers {
    state: LapicState,
    /// The next timer event may have changed.
    timer_dirty: bool,
}

impl Deref for Registers {
    type Target = LapicState;
    fn deref(&self) -> &LapicState {
        &self.state
    }
}

impl DerefMut for Registers {
    fn deref_mut(&mut self) -> &mut LapicState {
        &mut self.state
    }
}

fn highest(words: &[u32; 8]) -> Option<u8> {
    let (index, word) = words.iter().enumerate().rev().find(|(_, word)| **word != 0)?;
    Some((index as u32 * 32 + 31 - word.leading_zeros()) as u8)
}

fn set_bit(words: &mut [u32; 8], vector: u8, on: bool) {
    let word = &mut words[usize::from(vector / 32)];
    let bit = 1 << (vector % 32);
    *word = if on { *word | bit } else { *word & !bit };
}

fn bit(words: &[u32; 8], vector: u8) -> bool {
    words[usize::from(vector / 32)] & 1 << (vector % 32) != 0
}

impl Registers {
    /// As after reset (11.4.7.1).
    fn power_on(id: u32) -> LapicState {
        LapicState {
            id,
            base: layout::LAPIC_BASE | BASE_ENABLE | if id == 0 { BASE_BSP } else { 0 },
            tpr: 0,
            isr: [0; 8],
            tmr: [0; 8],
            irr: [0; 8],
            svr: 0xff,
            esr: 0,
            esr_collecting: 0,
            icr: 0,
            lvt: [LVT_MASKED; 6],
            ldr: 0,
            dfr: u32::MAX,
            timer_initial: 0,
            timer_divide: 0,
            timer_end: None,
            tsc_deadline: 0,
            pic_output: false,
            extint_pending: false,
            nmi_pending: false,
            init_pending: false,
            sipi_pending: None,
            wait_for_sipi: id != 0,
        }
    }

    /// As firmware hands it over: on the bootstrap processor "virtual wire mode", the PIC through LINT0; NMIs through LINT1.
    pub fn firmware(id: u32) -> Self {
        let mut state = Self::power_on(id);
        state.svr |= SVR_ENABLE;
        state.lvt[LINT1] = 0x400;
        if id == 0 {
            state.lvt[LINT0] = 0x700;
        }
        Self { state, timer_dirty: false }
    }

    pub fn save(&self) -> LapicState {
        self.state.clone()
    }

    pub fn try_from_state(id: u32, state: &LapicState) -> Result<Self, StateError> {
        let refuse = |why: String| Err(StateError::new(format!("local APIC {id}"), why));
        if state.id != id {
            return refuse(format!("it is of APIC {}", state.id));
        }
        let fixed = layout::LAPIC_BASE | if id == 0 { BASE_BSP } else { 0 };
        if state.base & !(BASE_ENABLE | BASE_X2APIC) != fixed || state.base & (BASE_ENABLE | BASE_X2APIC) == BASE_X2APIC
        {
            return refuse(format!("base register {:#x}", state.base));
        }
        if state.lvt.iter().zip(LVT_WRITABLE).any(|(lvt, writable)| lvt & !writable != 0) {
            return refuse(format!("local vector table {:x?}", state.lvt));
        }
        if [state.isr, state.irr, state.tmr].iter().any(|words| words[0] & 0xffff != 0) {
            return refuse("vectors below 16".into());
        }
        Ok(Self { state: state.clone(), timer_dirty: true })
    }

    fn x2apic(&self) -> bool {
        self.base & BASE_X2APIC != 0
    }

    pub fn mmio_enabled(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE
    }

    fn software_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0 && self.svr & SVR_ENABLE != 0
    }

    // Acceptance and priorities.

    pub fn processor_priority(&self) -> u8 {
        let in_service = highest(&self.isr).unwrap_or(0) & 0xf0;
        if self.tpr & 0xf0 >= in_service { self.tpr } else { in_service }
    }

    fn deliverable(&self) -> Option<u8> {
        let vector = highest(&self.irr)?;
        (self.software_enabled() && vector >> 4 > self.processor_priority() >> 4).then_some(vector)
    }

    /// Would an interrupt of the PIC reach the CPU now? With the APIC switched off its INT pin is wired to the CPU.
    pub fn accepts_pic(&self) -> bool {
        if self.base & BASE_ENABLE == 0 {
            return self.pic_output;
        }
        let lint0 = self.lvt[LINT0];
        self.pic_output && lint0 & LVT_MASKED == 0 && Delivery::from_bits(lint0 >> 8) == Delivery::ExtInt
            || self.extint_pending && self.software_enabled()
    }

    pub fn interrupt_pending(&self) -> bool {
        self.deliverable().is_some() || self.accepts_pic()
    }

    /// Moves the highest request to in-service, or says who has the vector.
    pub fn take_interrupt(&mut self) -> Taken {
        let Some(vector) = self.deliverable() else {
            let from_pic = self.accepts_pic();
            // Whoever asks the PIC next has taken the message.
            self.extint_pending &= !from_pic;
            return if from_pic { Taken::AskPic } else { Taken::Nothing };
        };
        set_bit(&mut self.irr, vector, false);
        set_bit(&mut self.isr, vector, true);
        Taken::Vector(vector)
    }

    fn accept(&mut self, vector: u8, level: bool) {
        if vector < 16 {
            return self.error(ERROR_RECEIVE_VECTOR);
        }
        set_bit(&mut self.irr, vector, true);
        set_bit(&mut self.tmr, vector, level);
    }

    /// A message from the interrupt wire.
    pub fn deliver(&mut self, delivery: Delivery, vector: u8, level: bool) {
        if self.base & BASE_ENABLE == 0 {
            return;
        }
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority if self.software_enabled() => self.accept(vector, level),
            Delivery::Nmi => self.nmi_pending = true,
            Delivery::Init => {
                self.init_pending = true;
                self.sipi_pending = None;
                self.wait_for_sipi = true;
            }
            Delivery::StartUp if self.wait_for_sipi => self.sipi_pending = Some(vector),
            Delivery::ExtInt => self.extint_pending = true,
            _ => {}
        }
    }

    pub fn acknowledge_init(&mut self) {
        if self.init_pending {
            // INIT leaves the id, the base register and what came after it (11.4.7.3).
            let fresh = Self::power_on(self.id);
            let kept = &self.state;
            self.state = LapicState {
                base: kept.base,
                pic_output: kept.pic_output,
                sipi_pending: kept.sipi_pending,
                wait_for_sipi: true,
                ..fresh
            };
            self.timer_dirty = true;
        } else if self.sipi_pending.take().is_some() {
            self.wait_for_sipi = false;
        }
    }

    pub fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = highest(&self.isr) else { return Effect::None };
        set_bit(&mut self.isr, vector, false);
        if bit(&self.tmr, vector) { Effect::Eoi(vector) } else { Effect::None }
    }

    fn error(&mut self, bits: u32) {
        self.esr_collecting |= bits;
        let lvt = self.lvt[ERROR];
        if lvt & LVT_MASKED == 0 && lvt & 0xff >= 16 {
            self.accept(lvt as u8, false);
        }
    }

    /// An edge on a local interrupt pin.
    fn local(&mut self, index: usize) {
        let lvt = self.lvt[index];
        if lvt & LVT_MASKED == 0 {
            self.deliver(Delivery::from_bits(lvt >> 8), lvt as u8, false);
        }
    }

    pub fn lint1(&mut self) {
        self.local(LINT1);
    }

    /// The PIC's output changed. LINT0 takes it as a level in ExtINT mode, as an edge in the others.
    pub fn set_pic_output(&mut self, high: bool) {
        let rising = high && !self.pic_output;
        self.pic_output = high;
        if rising && Delivery::from_bits(self.lvt[LINT0] >> 8) != Delivery::ExtInt {
            self.local(LINT0);
        }
    }

    pub fn matches(&self, destination: u32, logical: bool) -> bool {
        if self.base & BASE_ENABLE == 0 {
            return false;
        }
        if destination == u32::MAX || !logical {
            return destination == u32::MAX || destination == self.id;
        }
        if self.x2apic() {
            let ldr = self.x2apic_ldr();
            return destination >> 16 == ldr >> 16 && destination & ldr & 0xffff != 0;
        }
        let own = self.ldr >> 24;
        if self.dfr >> 28 == 0xf {
            own & destination & 0xff != 0
        } else {
            let cluster = destination >> 4 & 0xf;
            (cluster == own >> 4 || cluster == 0xf) && own & destination & 0xf != 0
        }
    }

    fn x2apic_ldr(&self) -> u32 {
        (self.id >> 4) << 16 | 1 << (self.id & 0xf)
    }

    // The timer.

    fn tsc_mode(&self) -> bool {
        self.lvt[TIMER] >> 17 & 3 == 2
    }

    fn periodic(&self) -> bool {
        self.lvt[TIMER] >> 17 & 3 == 1
    }

    fn count_to_ns(&self, count: u32) -> u64 {
        u64::from(count) * self.divider() * (1_000_000_000 / TIMER_HZ)
    }

    fn current_count(&self, now: u64) -> u32 {
        let Some(end) = self.timer_end else { return 0 };
        (end.saturating_sub(now) / self.divider() / (1_000_000_000 / TIMER_HZ)).min(u32::MAX.into()) as u32
    }

    pub fn timer_changed(&mut self) {
        self.timer_dirty = true;
    }

    fn timer_fires(&mut self) {
        self.timer_dirty = true;
        let lvt = self.lvt[TIMER];
        if lvt & LVT_MASKED == 0 && self.base & BASE_ENABLE != 0 {
            self.accept(lvt as u8, false);
        }
    }

    /// Does what is due at clock time `now` and guest TSC `tsc`.
    pub fn run_timer(&mut self, now: u64, tsc: u64) {
        if self.tsc_deadline != 0 && tsc >= self.tsc_deadline {
            self.tsc_deadline = 0;
            self.timer_fires();
        }
        if let Some(end) = self.timer_end.filter(|end| *end <= now) {
            let period = self.count_to_ns(self.timer_initial);
            self.timer_end = (self.periodic() && period != 0).then(|| {
                let periods = (now - end) / period + 1;
                end.saturating_add(periods.saturating_mul(period))
            });
            self.timer_fires();
        }
    }

    /// `Some` if the host timer must be set: to this clock time, or to never.
    pub fn take_timer_wish(&mut self, now: u64, tsc_to_ns: impl Fn(u64) -> u64, tsc: u64) -> Option<Option<u64>> {
        if !std::mem::take(&mut self.timer_dirty) {
            return None;
        }
        if self.lvt[TIMER] & LVT_MASKED != 0 {
            return Some(None);
        }
        if self.tsc_deadline != 0 {
            return Some(Some(now.saturating_add(tsc_to_ns(self.tsc_deadline.saturating_sub(tsc)))));
        }
        let earliest = if self.periodic() { now.saturating_add(MIN_PERIOD_NS) } else { now };
        Some(self.timer_end.map(|end| end.max(earliest)))
    }

    fn write_timer_lvt(&mut self, value: u32) {
        let was_tsc_mode = self.tsc_mode();
        self.lvt[TIMER] = value;
        if self.tsc_mode() != was_tsc_mode {
            // A change of mode disarms (11.5.4.1).
            self.timer_end = None;
            self.timer_initial = 0;
            self.tsc_deadline = 0;
        }
        self.timer_dirty = true;
    }

    fn write_initial_count(&mut self, value: u32, now: u64) {
        if self.tsc_mode() {
            return;
        }
        self.timer_initial = value;
        self.timer_end = (value != 0).then(|| now.saturating_add(self.count_to_ns(value)));
        self.timer_dirty = true;
    }

    fn write_divide(&mut self, value: u32, now: u64) {
        let count = self.current_count(now);
        self.timer_divide = value & 0xb;
        if self.timer_end.is_some() {
            self.timer_end = Some(now.saturating_add(self.count_to_ns(count)));
            self.timer_dirty = true;
        }
    }

    // The register file. `index` is the xAPIC offset / 16, which is also the MSR number minus 0x800.

    /// `None` where no register can be read.
    fn read(&self, index: u32, now: u64) -> Option<u32> {
        Some(match index {
            0x02 => self.id,
            0x03 => VERSION,
            0x08 => self.tpr.into(),
            0x0a => self.processor_priority().into(),
            0x0d if self.x2apic() => self.x2apic_ldr(),
            0x0d => self.ldr,
            0x0f => self.svr,
            0x10..=0x17 => self.isr[(index - 0x10) as usize],
            0x18..=0x1f => self.tmr[(index - 0x18) as usize],
            0x20..=0x27 => self.irr[(index - 0x20) as usize],
            0x28 => self.esr,
            0x30 => self.icr as u32,
            0x32..=0x37 => self.lvt[(index - 0x32) as usize],
            0x38 => self.timer_initial,
            0x39 => self.current_count(now),
            0x3e => self.timer_divide,
            _ => return None,
        })
    }

    /// `None` where no register can be written.
    fn write(&mut self, index: u32, value: u32, now: u64) -> Option<Effect> {
        match index {
            0x08 => self.tpr = value as u8,
            0x0b => return Some(self.end_of_interrupt()),
            0x0f => {
                self.svr = value & 0x1ff;
                if value & SVR_ENABLE == 0 {
                    for lvt in &mut self.state.lvt {
                        *lvt |= LVT_MASKED;
                    }
                    self.timer_dirty = true;
                }
            }
            0x28 => self.esr = std::mem::take(&mut self.esr_collecting),
            0x32..=0x37 => {
                let index = (index - 0x32) as usize;
                let mut value = value & LVT_WRITABLE[index];
                if self.svr & SVR_ENABLE == 0 {
                    value |= LVT_MASKED;
                }
                if index == TIMER {
                    self.write_timer_lvt(value);
                } else {
                    self.lvt[index] = value;
                }
            }
            0x38 => self.write_initial_count(value, now),
            0x3e => self.write_divide(value, now),
            _ => return None,
        }
        Some(Effect::None)
    }

    /// The command register was written: what is to be sent?
    fn command(&mut self, icr: u64) -> Effect {
        self.icr = icr & !(1 << 12);
        let low = icr as u32;
        let destination = if self.x2apic() {
            (icr >> 32) as u32
        } else {
            // The 8-bit broadcast address stands for the wide one.
            match (icr >> 56) as u32 {
                0xff => u32::MAX,
                id => id,
            }
        };
        let delivery = Delivery::from_bits(low >> 8);
        let (assert, level) = (low & 1 << 14 != 0, low & 1 << 15 != 0);
        if delivery == Delivery::Init && level && !assert {
            // "INIT level de-assert": no CPU with this kind of APIC does anything (11.6.1).
            return Effect::None;
        }
        let vector = low as u8;
        if matches!(delivery, Delivery::Fixed | Delivery::LowestPriority) && vector < 16 {
            self.error(ERROR_SEND_VECTOR);
            return Effect::None;
        }
        let shorthand = Shorthand::from_bits(low >> 18);
        // Interrupts sent by the ICR are edge-triggered whatever bit 15 says.
        Effect::Send(IcrMessage { vector, delivery, logical: low & 1 << 11 != 0, level: false, shorthand, destination })
    }

    pub fn read_mmio(&mut self, offset: u32, now: u64) -> u32 {
        match offset {
            0x20 => self.id << 24,
            0x90 | 0xb0 => 0,
            0xe0 => self.dfr,
            0x310 => (self.icr >> 32) as u32,
            _ => self.read(offset >> 4, now).unwrap_or_else(|| {
                self.error(ERROR_REGISTER);
                0
            }),
        }
    }

    pub fn write_mmio(&mut self, offset: u32, value: u32, now: u64) -> Effect {
        match offset {
            // The id is fixed, the version and the arbitration priority are read-only.
            0x20 | 0x30 | 0x90 | 0xa0 | 0x390 => {}
            0xd0 => self.ldr = value & 0xff00_0000,
            0xe0 => self.dfr = value | 0x0fff_ffff,
            0x300 => return self.command(self.icr & !0xffff_ffff | u64::from(value)),
            0x310 => self.icr = self.icr & 0xffff_ffff | u64::from(value) << 32,
            _ => {
                return self.write(offset >> 4, value, now).unwrap_or_else(|| {
                    self.error(ERROR_REGISTER);
                    Effect::None
                });
            }
        }
        Effect::None
    }

    pub fn read_msr(&mut self, msr: u32, now: u64) -> Result<u64, MsrError> {
        match msr {
            MSR_APIC_BASE => Ok(self.base),
            MSR_TSC_DEADLINE => Ok(if self.tsc_mode() { self.tsc_deadline } else { 0 }),
            _ if !self.x2apic() => Err(MsrError),
            0x830 => Ok(self.icr),
            MSR_X2APIC..=0x8ff => self.read(msr - MSR_X2APIC, now).map(u64::from).ok_or(MsrError),
            _ => Err(MsrError),
        }
    }

    pub fn write_msr(&mut self, msr: u32, value: u64, now: u64) -> Result<Effect, MsrError> {
        match msr {
            MSR_APIC_BASE => return self.write_base(value).map(|()| Effect::None),
            MSR_TSC_DEADLINE => {
                if self.tsc_mode() {
                    self.tsc_deadline = value;
                    self.timer_dirty = true;
                }
                return Ok(Effect::None);
            }
            _ if !self.x2apic() => return Err(MsrError),
            0x830 => {
                return if value & 0xfff3_3000 == 0 { Ok(self.command(value)) } else { Err(MsrError) };
            }
            0x83f => {
                let vector = u8::try_from(value).map_err(|_| MsrError)?;
                return Ok(self.command(u64::from(vector) | 1 << 18));
            }
            MSR_X2APIC..=0x8ff => {}
            _ => return Err(MsrError),
        }
        // The other registers are 32 bits wide, and setting a reserved bit is an error (11.12.1.3).
        let index = msr - MSR_X2APIC;
        let value = u32::try_from(value).map_err(|_| MsrError)?;
        let allowed = match index {
            0x08 => 0xff,
            0x0b | 0x28 => 0,
            0x0f => 0x1ff,
            0x32..=0x37 => LVT_WRITABLE[(index - 0x32) as usize] | LVT_READ_ONLY,
            0x3e => 0xb,
            _ => u32::MAX,
        };
        if value & !allowed != 0 {
            return Err(MsrError);
        }
        self.write(index, value, now).ok_or(MsrError)
    }

    /// IA32_APIC_BASE: off, xAPIC and x2APIC mode (11.12.5). The page cannot be moved.
    fn write_base(&mut self, value: u64) -> Result<(), MsrError> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        if (value ^ self.base) & !MODE != 0 {
            return Err(MsrError);
        }
        let (old, new) = (self.base & MODE, value & MODE);
        match (old, new) {
            _ if old == new => {}
            (_, BASE_X2APIC) | (MODE, BASE_ENABLE) | (0, MODE) => return Err(MsrError),
            (_, 0) => {
                let pic_output = self.pic_output;
                self.state = Self::power_on(self.id);
                self.state.pic_output = pic_output;
                self.timer_dirty = true;
            }
            (_, MODE) => self.icr = 0,
            _ => {}
        }
        self.base = value;
        Ok(())
    }
}
