//! The kernel's interrupt chips and timers: local APICs, IOAPIC, PICs, PIT.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cpu::Chips;
use cpu::chips::{Binding, ChipRegisters, IoApicRegisters, LapicRegisters, MessageLine, PicRegisters};
use cpu::msr as n;
use kvm_bindings as b;
use kvm_ioctls::{VcpuFd, VmFd};

use crate::events::{self, Doorbell, Line, Routes};
use crate::kick::Cell;
use crate::pit;
use crate::refusal::{refused, told};
use crate::registers::{self, Features};

/// The timer's wire goes to this pin of the IOAPIC, as the MADT says.
const TIMER_PIN: u32 = 2;
const PINS: u32 = 24;
/// The master PIC's input from the slave.
const CASCADE: u32 = 2;
/// The master PIC's input from the PIT, as a bit. Its wire is high for moments only: where these are looked at within one, the next interrupt
/// would be no edge, and lost.
const TIMER_INPUT: u8 = 1 << 0;
/// In an entry of a local vector table.
const MASKED: u32 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;

/// Indices into [`LapicRegisters::page`].
const TIMER_LVT: usize = 0x32;
const TIMER_INITIAL: usize = 0x38;
const TIMER_CURRENT: usize = 0x39;

/// Chips of one VM.
pub struct KernelChips {
    vm: Arc<VmFd>,
    features: Features,
    vcpus: Mutex<Vec<Arc<Cell>>>,
    /// The wires' levels, a bit each.
    levels: AtomicU32,
    /// Where the kernel has doorbells and interrupts by event counters.
    routes: Option<Arc<Routes>>,
}

impl KernelChips {
    /// Makes the chips in `vm`, which has no vCPU yet.
    pub fn create(vm: Arc<VmFd>, features: Features, eventfds: bool) -> Result<Arc<Self>, String> {
        vm.create_irq_chip().map_err(refused("interrupt chips"))?;
        pit::create(&vm)?;
        let wires = wires();
        events::set_routes(&vm, &wires).map_err(refused("the interrupts' routing"))?;
        let routes = eventfds.then(|| Arc::new(Routes::new(vm.clone(), wires)));
        Ok(Arc::new(Self { vm, features, vcpus: Mutex::default(), levels: AtomicU32::new(0), routes }))
    }

    /// A vCPU has been made; called in the order of their numbers.
    pub fn add(&self, vcpu: Arc<Cell>) {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).push(vcpu);
    }

    fn cells(&self) -> Vec<Arc<Cell>> {
        self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn chip(&self, number: u32) -> Result<b::kvm_irqchip, String> {
        let mut chip = b::kvm_irqchip { chip_id: number, ..Default::default() };
        self.vm.get_irqchip(&mut chip).map_err(told("to tell interrupt chips"))?;
        Ok(chip)
    }

    fn set_chip(&self, number: u32, chip: b::kvm_irqchip__bindgen_ty_1) -> Result<(), String> {
        let chip = b::kvm_irqchip { chip_id: number, chip, ..Default::default() };
        self.vm.set_irqchip(&chip).map_err(told("these registers of an interrupt chip"))
    }
}

/// Wire 0 is the timer's; the PICs and the IOAPIC both have all others.
fn wires() -> Vec<b::kvm_irq_routing_entry> {
    let entry = |gsi: u32, chip: u32, pin: u32| {
        let mut entry = b::kvm_irq_routing_entry { gsi, type_: b::KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
        entry.u.irqchip = b::kvm_irq_routing_irqchip { irqchip: chip, pin };
        entry
    };
    let pics = (0..16).filter(|gsi| *gsi != CASCADE).map(|gsi| {
        let chip = if gsi < 8 { b::KVM_IRQCHIP_PIC_MASTER } else { b::KVM_IRQCHIP_PIC_SLAVE };
        entry(gsi, chip, gsi % 8)
    });
    let ioapic = (0..PINS)
        .filter(|gsi| *gsi != TIMER_PIN)
        .map(|gsi| entry(gsi, b::KVM_IRQCHIP_IOAPIC, if gsi == 0 { TIMER_PIN } else { gsi }));
    pics.chain(ioapic).collect()
}

impl Chips for KernelChips {
    fn set_level(&self, gsi: u32, high: bool) {
        let bit = 1_u32.checked_shl(gsi).unwrap_or(0);
        if high {
            self.levels.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.levels.fetch_and(!bit, Ordering::SeqCst);
        }
        // It fails for wires that do not exist only.
        let _ = self.vm.set_irq_line(gsi, high);
    }

    fn send_msi(&self, address: u64, data: u32) {
        events::send(&self.vm, address, data);
    }

    fn message_line(&self) -> Option<Box<dyn MessageLine>> {
        Some(Box::new(Line::new(self.routes.as_ref()?)?))
    }

    fn doorbell(&self, address: u64, event: BorrowedFd<'_>) -> Option<Binding> {
        self.routes.as_ref()?;
        Some(Box::new(Doorbell::bind(self.vm.clone(), address, event)?))
    }

    fn nmi(&self) {
        // A message with delivery mode NMI to everybody: requests to a vCPU itself would wait until it stops.
        self.send_msi(0xfee0_0000 | 0xff << 12, 4 << 8);
    }

    fn save(&self) -> Result<ChipRegisters, String> {
        // First: it takes its time.
        let pit = pit::Stopped::look(self)?;
        let mut lapics = Vec::new();
        for cell in self.cells() {
            let fd = cell.stopped_fd().ok_or("a vCPU runs while the chips are to be saved")?;
            lapics.push(save_lapic(&cell, fd, &self.features)?);
        }
        let (master, slave) = (self.chip(b::KVM_IRQCHIP_PIC_MASTER)?, self.chip(b::KVM_IRQCHIP_PIC_SLAVE)?);
        let ioapic = self.chip(b::KVM_IRQCHIP_IOAPIC)?;
        // SAFETY: KVM filled in the chip that was asked for; all bit patterns are valid.
        let (ioapic, master, slave) = unsafe { (ioapic.chip.ioapic, master.chip.pic, slave.chip.pic) };
        Ok(ChipRegisters {
            lapics,
            ioapic: ioapic_from_kvm(&ioapic),
            pics: pics_from_kvm(&master, &slave),
            pit: pit.registers(pit::monotonic()),
        })
    }

    fn restore(&self, registers: &ChipRegisters) -> Result<(), String> {
        let began = pit::monotonic();
        let cells = self.cells();
        if cells.len() != registers.lapics.len() {
            return Err(format!("{} local APICs, here {}", registers.lapics.len(), cells.len()));
        }
        let [master, slave] = pics_to_kvm(&registers.pics);
        self.set_chip(b::KVM_IRQCHIP_PIC_MASTER, b::kvm_irqchip__bindgen_ty_1 { pic: master })?;
        self.set_chip(b::KVM_IRQCHIP_PIC_SLAVE, b::kvm_irqchip__bindgen_ty_1 { pic: slave })?;
        let ioapic = b::kvm_irqchip__bindgen_ty_1 { ioapic: ioapic_to_kvm(&registers.ioapic) };
        self.set_chip(b::KVM_IRQCHIP_IOAPIC, ioapic)?;
        // After the IOAPIC, whose restoring may send messages: what is pending is in the saved registers.
        for (cell, lapic) in cells.iter().zip(&registers.lapics) {
            let fd = cell.stopped_fd().ok_or("a vCPU runs while the chips are to be restored")?;
            restore_lapic(&fd, &self.features, lapic)?;
        }
        for pin in 0..PINS {
            let asserted = registers.ioapic.asserted >> pin & 1 != 0;
            let gsi = if pin == TIMER_PIN { 0 } else { pin };
            if asserted && pin != 0 {
                self.set_level(gsi, true);
            }
        }
        // Last: it waits for the right moment, and then interrupts.
        pit::restore(self, &registers.pit, began)
    }
}

impl pit::Around for KernelChips {
    fn pit(&self) -> Result<b::kvm_pit_state2, String> {
        self.vm.get_pit2().map_err(told("to tell the timer chip"))
    }

    fn set_pit(&self, state: &b::kvm_pit_state2) -> Result<(), String> {
        // The kernel cancels its timer and waits for the thread that interrupts (Linux, arch/x86/kvm/i8254.c, create_pit_timer).
        self.vm.set_pit2(state).map_err(told("this state of the timer chip"))
    }

    fn has_ticked(&self) -> Result<bool, String> {
        // SAFETY: KVM filled in the chip that was asked for; all bit patterns are valid.
        Ok(unsafe { self.chip(b::KVM_IRQCHIP_PIC_MASTER)?.chip.pic }.irr & 1 != 0)
    }

    fn set_ticked(&self, ticked: bool) -> Result<(), String> {
        let chip = self.chip(b::KVM_IRQCHIP_PIC_MASTER)?;
        // SAFETY: as above.
        let mut pic = unsafe { chip.chip.pic };
        pic.irr = pic.irr & !TIMER_INPUT | u8::from(ticked);
        pic.last_irr &= !TIMER_INPUT;
        self.set_chip(b::KVM_IRQCHIP_PIC_MASTER, b::kvm_irqchip__bindgen_ty_1 { pic })?;
        // A wire that changed in between is not to be lost.
        let levels = self.levels.load(Ordering::SeqCst);
        (1..8).filter(|gsi| *gsi != CASCADE).for_each(|gsi| self.set_level(gsi, levels >> gsi & 1 != 0));
        Ok(())
    }

    fn tick(&self) {
        self.set_level(0, true);
        self.set_level(0, false);
    }
}

/// The register page of a local APIC.
fn page(fd: &VcpuFd) -> Result<[u32; 64], String> {
    let raw = fd.get_lapic().map_err(told("to tell the local APIC"))?;
    Ok(std::array::from_fn(|index| {
        let bytes = raw.regs.get(index * 16..index * 16 + 4).map(|bytes| [bytes[0], bytes[1], bytes[2], bytes[3]]);
        bytes.map_or(0, |bytes| u32::from_le_bytes(bytes.map(|byte| byte as u8)))
    }))
}

/// Has a one-shot timer run out?
fn ran_out(page: &[u32; 64]) -> bool {
    let one_shot = page[TIMER_LVT] >> 17 & 3 == 0;
    one_shot && page[TIMER_INITIAL] != 0 && page[TIMER_CURRENT] == 0
}

fn save_lapic(cell: &Cell, mut fd: MutexGuard<'_, VcpuFd>, features: &Features) -> Result<LapicRegisters, String> {
    let mut page = self::page(&fd)?;
    if ran_out(&page) && page[TIMER_LVT] & MASKED == 0 {
        // The count does not tell whether the interrupt has been sent: the kernel does that on its way into the guest.
        cell.pass_timers(&mut fd)?;
        page = self::page(&fd)?;
    }
    let fd = &*fd;
    let run_state = fd.get_mp_state().map_err(told("to tell the run state"))?.mp_state;
    let events = fd.get_vcpu_events().map_err(told("to tell pending events"))?;
    if events.interrupt.injected != 0 {
        // It has left the chips, and there is no place for it elsewhere.
        return Err("an interrupt is on its way into the guest".into());
    }
    let deadline = registers::get_msr(fd, n::TSC_DEADLINE)?;
    let offset = registers::tsc_offset(fd, features)?;
    Ok(LapicRegisters {
        page,
        base: registers::get_msr(fd, n::APIC_BASE)?,
        tsc_deadline: if deadline == 0 { 0 } else { deadline.wrapping_sub(offset).max(1) },
        nmi: events.nmi.pending != 0 || events.nmi.injected != 0,
        wait_for_sipi: registers::waits_for_sipi(run_state),
        sipi: (run_state == b::KVM_MP_STATE_SIPI_RECEIVED).then_some(events.sipi_vector as u8),
    })
}

fn restore_lapic(fd: &VcpuFd, features: &Features, lapic: &LapicRegisters) -> Result<(), String> {
    registers::set_msr(fd, n::APIC_BASE, lapic.base)?;
    let mut raw = b::kvm_lapic_state::default();
    let mut page = lapic.page;
    if ran_out(&page) {
        // The kernel would start it again, so that no interrupt is lost that was not sent: here it was.
        page[TIMER_INITIAL] = 0;
    }
    for (index, word) in page.iter().enumerate() {
        for (to, from) in raw.regs.iter_mut().skip(index * 16).zip(word.to_le_bytes()) {
            *to = from as _;
        }
    }
    fd.set_lapic(&raw).map_err(told("this state of a local APIC"))?;
    // Only in deadline mode (bits 18 and 17 of the timer's vector register) does the deadline exist.
    if lapic.page[TIMER_LVT] >> 17 & 3 == 2 {
        let deadline = match lapic.tsc_deadline {
            0 => 0,
            deadline => deadline.wrapping_add(registers::tsc_offset(fd, features)?),
        };
        registers::set_msr(fd, n::TSC_DEADLINE, deadline)?;
    }
    let mut events = fd.get_vcpu_events().map_err(told("to tell pending events"))?;
    events.flags = b::KVM_VCPUEVENT_VALID_NMI_PENDING;
    events.nmi.pending = lapic.nmi.into();
    if let Some(page) = lapic.sipi {
        events.flags |= b::KVM_VCPUEVENT_VALID_SIPI_VECTOR;
        events.sipi_vector = page.into();
    }
    fd.set_vcpu_events(&events).map_err(told("these pending events"))?;
    if lapic.sipi.is_some() {
        let state = b::kvm_mp_state { mp_state: b::KVM_MP_STATE_SIPI_RECEIVED };
        fd.set_mp_state(state).map_err(told("this run state"))?;
    }
    Ok(())
}

fn ioapic_from_kvm(chip: &b::kvm_ioapic_state) -> IoApicRegisters {
    // SAFETY: both members of the union are plain numbers of the same size.
    let entries = chip.redirtbl.map(|entry| unsafe { entry.bits });
    IoApicRegisters { id: chip.id << 24, select: chip.ioregsel as u8, entries, asserted: chip.irr }
}

fn ioapic_to_kvm(chip: &IoApicRegisters) -> b::kvm_ioapic_state {
    b::kvm_ioapic_state {
        base_address: 0xfec0_0000,
        ioregsel: chip.select.into(),
        id: chip.id >> 24 & 0xf,
        // The wires are driven anew afterwards.
        irr: 0,
        pad: 0,
        redirtbl: chip.entries.map(|entry| {
            // Remote IRR is of level-triggered entries only.
            let entry = if entry & LEVEL == 0 { entry & !REMOTE_IRR } else { entry };
            b::kvm_ioapic_state__bindgen_ty_1 { bits: entry }
        }),
    }
}

fn pics_from_kvm(master: &b::kvm_pic_state, slave: &b::kvm_pic_state) -> [PicRegisters; 2] {
    let mut pics = [master, slave].map(pic_from_kvm);
    pics[0].lines &= !TIMER_INPUT;
    pics
}

fn pics_to_kvm(pics: &[PicRegisters; 2]) -> [b::kvm_pic_state; 2] {
    let mut pics = pics.each_ref().map(pic_to_kvm);
    pics[0].last_irr &= !TIMER_INPUT;
    pics
}

fn pic_from_kvm(chip: &b::kvm_pic_state) -> PicRegisters {
    PicRegisters {
        lines: chip.last_irr,
        irr: chip.irr,
        isr: chip.isr,
        imr: chip.imr,
        base: chip.irq_base,
        expects: if chip.init_state == 0 { 0 } else { chip.init_state.min(3) + 1 },
        needs_icw4: chip.init4 != 0,
        auto_eoi: chip.auto_eoi != 0,
        rotate_on_auto_eoi: chip.rotate_on_auto_eoi != 0,
        special_fully_nested: chip.special_fully_nested_mode != 0,
        special_mask: chip.special_mask != 0,
        poll: chip.poll != 0,
        read_isr: chip.read_reg_select != 0,
        first: chip.priority_add & 7,
        level: chip.elcr,
    }
}

fn pic_to_kvm(chip: &PicRegisters) -> b::kvm_pic_state {
    b::kvm_pic_state {
        last_irr: chip.lines,
        irr: chip.irr,
        isr: chip.isr,
        imr: chip.imr,
        irq_base: chip.base,
        init_state: chip.expects.saturating_sub(1),
        init4: chip.needs_icw4.into(),
        auto_eoi: chip.auto_eoi.into(),
        rotate_on_auto_eoi: chip.rotate_on_auto_eoi.into(),
        special_fully_nested_mode: chip.special_fully_nested.into(),
        special_mask: chip.special_mask.into(),
        poll: chip.poll.into(),
        read_reg_select: chip.read_isr.into(),
        priority_add: chip.first,
        elcr: chip.level,
        // Which inputs may be level-triggered: the kernel's own is not changed by this.
        elcr_mask: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The PIT's wire is high for moments; all others keep their levels.
    #[test]
    fn the_timer_s_wire_is_low() {
        let chip = b::kvm_pic_state { last_irr: 0xff, irr: 0x81, isr: 2, imr: 4, irq_base: 8, ..Default::default() };
        let saved = pics_from_kvm(&chip, &chip);
        assert_eq!(
            saved.map(|chip| (chip.lines, chip.irr, chip.isr, chip.imr)),
            [(0xfe, 0x81, 2, 4), (0xff, 0x81, 2, 4)]
        );
        let other = [PicRegisters { lines: 0xff, ..saved[0] }, saved[1]];
        let back = pics_to_kvm(&other);
        assert_eq!(back.map(|chip| (chip.last_irr, chip.irr)), [(0xfe, 0x81), (0xff, 0x81)]);
    }
}
