//! The machine put together.

use std::fmt;
use std::io::Write;
use std::sync::Arc;

use cpu::{CpuState, LocalApic};
use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::boot::park;
use crate::bus::{BusError, IoBus, MmioDevice};
use crate::chips::{ChipStates, EngineChips};
use crate::clock::{Clock, TimerQueue};
use crate::ioapic::{IoApic, IoApicState};
use crate::irq::{IrqLine, IrqSink, MsiSink};
use crate::lapic::{EoiListener, InterruptAcknowledge, Lapic, LapicState, Lapics, VcpuBus};
use crate::pci::{ConfigError, PciAddError, PciDevice, PciHost, PciHostState};
use crate::pic::{Pic, PicPorts, PicState};
use crate::pit::{Pit, PitState, Port61};
use crate::power::{
    AcpiPm, AcpiPmState, DeadPort, PowerCallback, ResetPort, ResetPortView, ResetPorts, ResetPortsState,
};
use crate::rtc::{self, Rtc, RtcState};
use crate::serial::{self, Serial, SerialState};
use crate::state::StateError;
use crate::watchdog::{Watchdog, WatchdogCallback};
use crate::{acpi, boot, layout, power};

/// Most vCPUs: APIC ids are 8 bits wide and 255 means everybody.
pub const MAX_VCPUS: u32 = 254;

/// What a machine is made of.
pub struct PcConfig {
    /// Its RAM.
    pub ram: GuestRam,
    /// vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// The host's TSC rate in kHz; see [`crate::clock::measure_tsc_khz`].
    pub tsc_khz: u64,
    /// The engine's interrupt chips and timers, if it has its own: the machine's then stay unused.
    pub chips: Option<Arc<dyn cpu::Chips>>,
    /// Where COM1's output goes.
    pub serial_output: Box<dyn Write + Send>,
    /// PCI devices, from slot 1 on.
    pub pci_devices: Vec<Arc<dyn PciDevice>>,
    /// Told of power-off and reset by the guest, on a vCPU's thread.
    pub power: PowerCallback,
    /// With one, there is a watchdog, which calls it when the guest hangs.
    pub watchdog: Option<WatchdogCallback>,
}

/// Why a machine cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum PcError {
    /// Too many vCPUs, or none.
    #[error("{0} vCPUs are not possible: choose 1 to {MAX_VCPUS}")]
    Vcpus(u32),
    /// A PCI device cannot be plugged in.
    #[error(transparent)]
    Pci(#[from] PciAddError),
    /// Two devices want the same place; an error in the source.
    #[error("the machine's devices overlap: {0}")]
    Bus(#[from] BusError),
    /// The host gives no thread for the timers.
    #[error("the host gives no thread for the machine's timers ({0}): raise the limit on processes")]
    Thread(#[from] std::io::Error),
    /// Boot data do not fit.
    #[error(transparent)]
    Boot(#[from] boot::BootError),
    /// A device's registers overlap; an error in the source.
    #[error("a device's registers overlap: {0}")]
    Config(#[from] ConfigError),
}

/// The saved state of all devices. CPU states and RAM are the VMM's to save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PcState {
    /// Nanoseconds since power-on.
    pub clock: u64,
    /// Local APICs by id.
    pub lapics: Vec<LapicState>,
    /// IOAPIC.
    pub ioapic: IoApicState,
    /// PIC pair.
    pub pic: PicState,
    /// PIT.
    pub pit: PitState,
    /// RTC and CMOS memory.
    pub rtc: RtcState,
    /// ACPI registers.
    pub acpi_pm: AcpiPmState,
    /// Reset registers.
    pub reset_ports: ResetPortsState,
    /// COM1.
    pub serial: SerialState,
    /// PCI and the devices on it.
    pub pci: PciHostState,
}

/// Wires of ISA interrupts and PCI's INTA#s: each goes to an IOAPIC pin, ISA's to a PIC input too.
struct Wires {
    ioapic: Arc<IoApic>,
    pic: Arc<Pic>,
}

impl IrqSink for Wires {
    fn set_level(&self, gsi: u32, high: bool) {
        // The timer's wire goes to pin 2, which the MADT says: pin 0 and IRQ 2 have other old uses.
        self.ioapic.set_level(if gsi == 0 { 2 } else { gsi }, high);
        self.pic.set_level(gsi, high);
    }
}

/// Keeps PCI BARs off the local APICs' page, which the vCPUs' own buses serve; answers while a local APIC is not in xAPIC mode.
struct LapicPage;

impl MmioDevice for LapicPage {
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

/// A PC without its vCPUs.
pub struct Pc {
    ram: GuestRam,
    bus: Arc<IoBus>,
    queue: Arc<TimerQueue>,
    lapics: Arc<Lapics>,
    ioapic: Arc<IoApic>,
    pic: Arc<Pic>,
    pit: Arc<Pit>,
    rtc: Arc<Rtc>,
    acpi_pm: Arc<AcpiPm>,
    reset_ports: Arc<ResetPorts>,
    serial: Arc<Serial>,
    pci: Arc<PciHost>,
    /// In place of local APICs, IOAPIC, PIC and PIT.
    chips: Option<Arc<EngineChips>>,
}

impl fmt::Debug for Pc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pc").field("ram", &self.ram).field("lapics", &self.lapics).finish_non_exhaustive()
    }
}

impl Pc {
    /// Builds the machine. [`Pc::prepare_boot`] and [`boot::load`] then fill its RAM.
    ///
    /// # Errors
    /// See [`PcError`].
    pub fn new(config: PcConfig) -> Result<Self, PcError> {
        let clock = Arc::new(Clock::new(config.tsc_khz));
        Self::with_clock(config, clock)
    }

    fn with_clock(config: PcConfig, clock: Arc<Clock>) -> Result<Self, PcError> {
        let vcpus = u8::try_from(config.vcpus).ok().filter(|n| (1..=MAX_VCPUS).contains(&u32::from(*n)));
        let vcpus = vcpus.ok_or(PcError::Vcpus(config.vcpus))?;
        let queue = TimerQueue::new(clock.clone())?;
        let bus = Arc::new(IoBus::new());
        let lapics = Arc::new(Lapics::new(vcpus, &queue));
        let ioapic = Arc::new(IoApic::new(lapics.clone()));
        let pic = Arc::new(Pic::new(lapics.clone()));
        let pic_dyn: Arc<dyn InterruptAcknowledge> = pic.clone();
        let eoi: Arc<dyn EoiListener> = ioapic.clone();
        lapics.connect(Arc::downgrade(&pic_dyn), Arc::downgrade(&eoi));
        let chips = config.chips.map(EngineChips::new);
        let wires: Arc<dyn IrqSink> = match &chips {
            Some(chips) => chips.clone(),
            None => Arc::new(Wires { ioapic: ioapic.clone(), pic: pic.clone() }),
        };
        let line = |irq| IrqLine::new(wires.clone(), irq);

        let pit = Pit::new(&queue, line(0));
        let rtc = Rtc::new(&queue, line(rtc::IRQ));
        let acpi_pm = Arc::new(AcpiPm::new(clock, line(power::SCI), config.power.clone()));
        let reset_ports = Arc::new(ResetPorts::new(config.power));
        let serial = Arc::new(Serial::new(line(serial::COM1_IRQ), config.serial_output));
        let reset_port = |port| Arc::new(ResetPortView(reset_ports.clone(), port));
        let msi: Arc<dyn MsiSink> = match &chips {
            Some(chips) => chips.clone(),
            None => lapics.clone(),
        };
        let pci = PciHost::new(bus.clone(), wires.clone(), msi, reset_port(ResetPort::ResetControl));

        if chips.is_none() {
            let [first, second, elcr] = PicPorts::all(&pic);
            bus.add_pio("pic", 0x20, 2, first)?;
            bus.add_pio("pic", 0xa0, 2, second)?;
            bus.add_pio("pic", 0x4d0, 2, elcr)?;
            bus.add_pio("pit", 0x40, 4, pit.clone())?;
            bus.add_pio("pit", 0x61, 1, Arc::new(Port61(pit.clone())))?;
        }
        bus.add_pio("i8042", 0x60, 1, reset_port(ResetPort::KeyboardData))?;
        bus.add_pio("i8042", 0x64, 1, reset_port(ResetPort::KeyboardCommand))?;
        bus.add_pio("port92", 0x92, 1, reset_port(ResetPort::Port92))?;
        bus.add_pio("rtc", rtc::PORT, 2, rtc.clone())?;
        bus.add_pio("serial", serial::COM1, 8, serial.clone())?;
        bus.add_pio("acpi", power::ACPI_PORTS, power::ACPI_PORTS_LEN, acpi_pm.clone())?;
        for port in [0x80, 0xe9, 0x402] {
            bus.add_pio("debug-port", port, 1, Arc::new(DeadPort))?;
        }
        // With chips of the engine's nobody comes here, but no BAR may either.
        bus.add_mmio("ioapic", layout::IOAPIC_BASE, layout::APIC_PAGE, ioapic.clone())?;
        bus.add_mmio("lapic", layout::LAPIC_BASE, layout::APIC_PAGE, Arc::new(LapicPage))?;
        pci.connect()?;
        for device in config.pci_devices {
            pci.add(device)?;
        }
        if let Some(expired) = config.watchdog {
            pci.add(Watchdog::new(&queue, expired)?)?;
        }
        let ram = config.ram;
        Ok(Self { ram, bus, queue, lapics, ioapic, pic, pit, rtc, acpi_pm, reset_ports, serial, pci, chips })
    }

    /// Puts page tables, GDT, the mailbox with its parking code, and the ACPI tables into RAM. To be called before each boot.
    ///
    /// # Errors
    /// RAM does not reach to 1 MiB, which [`GuestRam`] does not allow.
    pub fn prepare_boot(&self) -> Result<(), boot::BootError> {
        park::prepare(&self.ram)?;
        let tables = acpi::tables(self.vcpus() as u8);
        if !self.ram.write(layout::ACPI_TABLES, &tables.bytes) {
            return Err(boot::BootError::OutsideRam { what: "ACPI tables", address: layout::ACPI_TABLES });
        }
        Ok(())
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> u32 {
        self.lapics.all().len() as u32
    }

    /// The bus for vCPU `index`: the machine's with that vCPU's local APIC page.
    pub fn vcpu_bus(&self, index: u32) -> Option<Arc<dyn cpu::Bus>> {
        let lapic = self.lapics.get(index)?;
        if self.chips.is_some() {
            return Some(self.bus.clone());
        }
        Some(Arc::new(VcpuBus::new(self.bus.clone(), lapic)))
    }

    /// The local APIC of vCPU `index` for its engine. Give it the vCPU's kick with [`Lapic::set_kick`] ([`Pc::lapic`]).
    pub fn local_apic(&self, index: u32) -> Option<Arc<dyn LocalApic>> {
        Some(self.lapics.get(index)?)
    }

    /// The local APIC of vCPU `index` with all its methods.
    pub fn lapic(&self, index: u32) -> Option<Arc<Lapic>> {
        self.lapics.get(index)
    }

    /// The state in which vCPU `index` starts: 0 at the kernel's `entry`, the others in the parking code.
    pub fn initial_cpu_state(&self, index: u32, entry: u64) -> CpuState {
        if index == 0 { park::bootstrap_cpu(entry) } else { park::further_cpu(index) }
    }

    /// The bus: counters, trace.
    pub fn bus(&self) -> &Arc<IoBus> {
        &self.bus
    }

    /// COM1, for its input.
    pub fn serial(&self) -> &Arc<Serial> {
        &self.serial
    }

    /// PCI.
    pub fn pci(&self) -> &Arc<PciHost> {
        &self.pci
    }

    /// The machine's time.
    pub fn clock(&self) -> &Arc<Clock> {
        self.queue.clock()
    }

    /// The timer thread, for devices that need timers of their own.
    pub fn timers(&self) -> &Arc<TimerQueue> {
        &self.queue
    }

    /// RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Presses the power button: a guest that listens shuts down.
    pub fn press_power_button(&self) {
        self.acpi_pm.press_power_button();
    }

    /// Sends an NMI to all vCPUs, as the NMI button of a server does: a guest with `unknown_nmi_panic` dumps its state.
    pub fn nmi_button(&self) {
        if let Some(chips) = &self.chips {
            return chips.nmi();
        }
        for lapic in self.lapics.all() {
            lapic.lint1();
        }
    }

    /// Puts all devices back to power-on, for a reboot. No vCPU may run. RAM stays as it is: load the kernel again.
    pub fn reset(&self) {
        self.pci.reset();
        self.serial.reset();
        self.rtc.reset();
        self.pit.reset();
        self.acpi_pm.reset();
        self.reset_ports.reset();
        self.pic.reset();
        self.ioapic.reset();
        // Last: what the others signalled on the way is gone with it.
        self.lapics.reset();
    }

    /// Gives the engine's chips, if it has its own, the state that the machine's have: after all vCPUs are made, and after each
    /// [`Pc::reset`]. No vCPU may run.
    ///
    /// # Errors
    /// The engine refuses; the machine must not run then.
    pub fn start_chips(&self) -> Result<(), StateError> {
        let Some(chips) = &self.chips else { return Ok(()) };
        chips.restore(&self.own_chips(), self.clock().now())
    }

    fn own_chips(&self) -> ChipStates {
        let pit = self.pit.save();
        let (pic, ioapic) = (self.pic.save(), self.ioapic.save());
        ChipStates { lapics: self.lapics.save(), ioapic, pic, pit }
    }

    /// The state of all devices. No vCPU may run.
    ///
    /// # Errors
    /// The engine does not give its chips' state.
    pub fn save(&self) -> Result<PcState, StateError> {
        // Timers still run, and console input may come: what interrupts is saved before what it interrupts, so that an interrupt may be
        // saved twice but is never lost.
        let now = self.clock().now();
        let (rtc, acpi_pm, reset_ports) = (self.rtc.save(), self.acpi_pm.save(), self.reset_ports.save());
        let (serial, pci) = (self.serial.save(), self.pci.save());
        let (chips, clock) = match &self.chips {
            Some(chips) => chips.save(self.clock())?,
            None => (self.own_chips(), now),
        };
        let ChipStates { lapics, ioapic, pic, pit } = chips;
        Ok(PcState { clock, lapics, ioapic, pic, pit, rtc, acpi_pm, reset_ports, serial, pci })
    }

    /// Takes over a state of a machine made alike. No vCPU may run; set the local APICs' TSC offsets before.
    ///
    /// # Errors
    /// A device refuses its state; the machine must not run then.
    pub fn restore(&self, state: &PcState) -> Result<(), StateError> {
        // Timers of devices may be due at once. What they interrupted before the chips have their state would be lost with it.
        let _held = self.queue.hold();
        self.clock().set(state.clock);
        self.queue.clock_changed();
        // Devices first: the wires that they drive anew find the chips' saved state afterwards.
        self.pci.restore(&state.pci)?;
        self.serial.restore(&state.serial)?;
        self.rtc.restore(&state.rtc)?;
        self.acpi_pm.restore(&state.acpi_pm)?;
        self.reset_ports.restore(&state.reset_ports);
        if let Some(chips) = &self.chips {
            let states = ChipStates {
                lapics: state.lapics.clone(),
                ioapic: state.ioapic.clone(),
                pic: state.pic,
                pit: state.pit,
            };
            return chips.restore(&states, self.clock().now());
        }
        self.pit.restore(&state.pit)?;
        self.ioapic.restore(&state.ioapic)?;
        self.pic.restore(&state.pic)?;
        self.lapics.restore(&state.lapics)?;
        // The PIC was saved earlier than the local APIC that sees its output.
        self.pic.tell();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::BootSource;
    use crate::bus::value;
    use crate::clock::testing::advance;
    use crate::power::PowerEvent;
    use cpu::Bus;
    use std::sync::Mutex;

    fn config(vcpus: u32, events: Arc<Mutex<Vec<PowerEvent>>>) -> PcConfig {
        PcConfig {
            ram: GuestRam::new(64 << 20).unwrap(),
            vcpus,
            tsc_khz: 1_000_000,
            chips: None,
            serial_output: Box::new(std::io::sink()),
            pci_devices: Vec::new(),
            power: Arc::new(move |event| events.lock().unwrap().push(event)),
            watchdog: None,
        }
    }

    fn pc() -> (Pc, Arc<dyn Bus>, Arc<Mutex<Vec<PowerEvent>>>) {
        let events = Arc::new(Mutex::new(Vec::new()));
        let pc = Pc::with_clock(config(2, events.clone()), Arc::new(Clock::manual(1_000_000))).unwrap();
        let bus = pc.vcpu_bus(0).unwrap();
        (pc, bus, events)
    }

    fn ioapic_write(bus: &Arc<dyn Bus>, register: u32, value: u32) {
        bus.mmio_write(layout::IOAPIC_BASE, &register.to_le_bytes());
        bus.mmio_write(layout::IOAPIC_BASE + 0x10, &value.to_le_bytes());
    }

    /// Its timers' thread ends with it, whatever it has been through.
    #[test]
    fn a_machine_that_is_dropped_leaves_no_thread() {
        for restored in [false, true] {
            let config = PcConfig { watchdog: Some(Arc::new(|| ())), ..config(2, Arc::default()) };
            let pc = Pc::new(config).unwrap();
            if restored {
                pc.restore(&pc.save().unwrap()).unwrap();
            }
            let (bus, lapic) = (pc.vcpu_bus(0).unwrap(), pc.local_apic(0).unwrap());
            bus.pio_write(0x70, &[0]);
            let timers = Arc::downgrade(pc.timers());
            drop((bus, lapic, pc));
            // The thread itself may hold a device for a moment.
            let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while timers.strong_count() > 0 {
                assert!(std::time::Instant::now() < end, "restored: {restored}: {} still", timers.strong_count());
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }

    /// Timer through the PIC, then through the IOAPIC, as Linux's check_timer and after it.
    #[test]
    fn timer_interrupt_both_ways() {
        let (pc, bus, _) = pc();
        let cpu = pc.local_apic(0).unwrap();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            bus.pio_write(port, &[value]);
        }
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            bus.pio_write(port, &[value]);
        }
        advance(pc.timers(), 1_100_000);
        assert_eq!(cpu.acknowledge(), Some(0x30));
        bus.pio_write(0x20, &[0x60]);
        bus.pio_write(0x21, &[0xff]);
        bus.mmio_write(layout::LAPIC_BASE + 0x350, &0x1_0700_u32.to_le_bytes());
        ioapic_write(&bus, 0x14, 0x30);
        advance(pc.timers(), 1_000_000);
        assert_eq!(cpu.acknowledge(), Some(0x30));
        bus.mmio_write(layout::LAPIC_BASE + 0xb0, &[0; 4]);
        assert!(!cpu.status().interrupt);
    }

    #[test]
    fn serial_input_interrupts_through_the_ioapic() {
        let (pc, bus, _) = pc();
        let cpu = pc.local_apic(1).unwrap();
        ioapic_write(&bus, 0x18, 0x24);
        ioapic_write(&bus, 0x19, 1 << 24);
        bus.pio_write(0x3fc, &[0xb]);
        bus.pio_write(0x3f9, &[1]);
        assert_eq!(pc.serial().input(b"x"), 1);
        assert_eq!(cpu.acknowledge(), Some(0x24));
        let mut data = [0];
        bus.pio_read(0x3f8, &mut data);
        assert_eq!(data, *b"x");
    }

    #[test]
    fn power() {
        let (_pc, bus, events) = pc();
        bus.pio_write(0xcf9, &[6]);
        bus.pio_write(0x64, &[0xfe]);
        bus.pio_write(power::PM1A_CONTROL, &(5_u16 << 10 | 1 << 13).to_le_bytes());
        assert_eq!(*events.lock().unwrap(), [PowerEvent::Reset, PowerEvent::Reset, PowerEvent::Off]);
    }

    #[test]
    fn vcpu_count() {
        for vcpus in [0, 255, 1000] {
            let error = Pc::new(config(vcpus, Arc::default())).unwrap_err().to_string();
            assert!(error.contains("choose 1 to 254"), "{error}");
        }
        assert_eq!(Pc::new(config(254, Arc::default())).unwrap().vcpus(), 254);
    }

    #[test]
    fn boot_data() {
        let (pc, ..) = pc();
        pc.prepare_boot().unwrap();
        let mut data = [0; 8];
        assert!(pc.ram().read(layout::ACPI_TABLES, &mut data));
        assert_eq!(&data, b"RSD PTR ");
        assert!(boot::load(pc.ram(), &BootSource::default()).is_err());
        assert_eq!(pc.initial_cpu_state(0, 0x1234).rip, 0x1234);
        assert_eq!(pc.initial_cpu_state(1, 0x1234).rip, layout::PARKING_CODE);
        assert!(pc.vcpu_bus(2).is_none() && pc.local_apic(2).is_none());
    }

    #[test]
    fn state_travels() {
        let (pc, bus, _) = pc();
        let cpu = pc.local_apic(0).unwrap();
        ioapic_write(&bus, 0x14, 0x30);
        for (port, value) in [(0x43, 0x34), (0x40, 0), (0x40, 0x10)] {
            bus.pio_write(port, &[value]);
        }
        bus.mmio_write(layout::LAPIC_BASE + 0x320, &0x2_00ec_u32.to_le_bytes());
        bus.mmio_write(layout::LAPIC_BASE + 0x3e0, &0xb_u32.to_le_bytes());
        bus.mmio_write(layout::LAPIC_BASE + 0x380, &1_000_000_u32.to_le_bytes());
        bus.pio_write(0x3fc, &[0xb]);
        bus.pio_write(0x3f9, &[1]);
        pc.serial().input(b"typed");
        advance(pc.timers(), 500_000);
        let state = pc.save().unwrap();
        let text = serde_json::to_string(&state).unwrap();
        let state: PcState = serde_json::from_str(&text).unwrap();
        let (other, other_bus, _) = self::pc();
        other.restore(&state).unwrap();
        assert_eq!(other.save().unwrap(), state);
        for (machine, local) in [(&pc, cpu), (&other, other.local_apic(0).unwrap())] {
            advance(machine.timers(), 500_001);
            assert_eq!(local.acknowledge(), Some(0xec));
            local.eoi();
            advance(machine.timers(), 3_000_000);
            let mut vectors = [local.acknowledge(), local.acknowledge()];
            vectors.sort();
            assert!(vectors.contains(&Some(0xec)));
            local.eoi();
            assert_eq!(local.acknowledge(), Some(0x30));
        }
        let mut data = [0; 1];
        other_bus.pio_read(0x3f8, &mut data);
        assert_eq!(value(&data), u64::from(b't'));
        pc.reset();
        assert!(!pc.local_apic(0).unwrap().status().interrupt);
        let one = Pc::new(config(1, Arc::default())).unwrap();
        assert!(one.restore(&state).is_err());
    }

    /// Chips of an engine that take their time to be restored, and note what interrupts meanwhile.
    #[derive(Default)]
    struct Slow {
        kept: Mutex<Option<cpu::chips::ChipRegisters>>,
        early: Mutex<Vec<u32>>,
        later: Mutex<Vec<u32>>,
        restoring: std::sync::atomic::AtomicBool,
    }

    impl cpu::Chips for Slow {
        fn set_level(&self, gsi: u32, high: bool) {
            if high {
                let early = self.restoring.load(std::sync::atomic::Ordering::SeqCst);
                (if early { &self.early } else { &self.later }).lock().unwrap().push(gsi);
            }
        }
        fn send_msi(&self, _: u64, _: u32) {}
        fn nmi(&self) {}
        fn save(&self) -> Result<cpu::chips::ChipRegisters, String> {
            Ok(self.kept.lock().unwrap().clone().unwrap())
        }
        fn restore(&self, registers: &cpu::chips::ChipRegisters) -> Result<(), String> {
            self.restoring.store(true, std::sync::atomic::Ordering::SeqCst);
            std::thread::sleep(std::time::Duration::from_millis(50));
            *self.kept.lock().unwrap() = Some(registers.clone());
            self.restoring.store(false, std::sync::atomic::Ordering::SeqCst);
            Ok(())
        }
    }

    /// A device's timer that is due while the machine is being restored interrupts afterwards: the chips' state would undo it.
    #[test]
    fn timers_wait_until_all_is_restored() {
        let (saved, bus, _) = pc();
        // The real-time clock interrupts at 1024 Hz.
        for (register, value) in [(0xa, 0x26), (0xb, 0x42)] {
            bus.pio_write(0x70, &[register]);
            bus.pio_write(0x71, &[value]);
        }
        let state = saved.save().unwrap();
        let chips = Arc::new(Slow::default());
        let pc = Pc::new(PcConfig { chips: Some(chips.clone()), ..config(2, Arc::default()) }).unwrap();
        pc.restore(&state).unwrap();
        assert!(chips.early.lock().unwrap().is_empty());
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        while chips.later.lock().unwrap().is_empty() {
            assert!(std::time::Instant::now() < end, "none came");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert_eq!(chips.later.lock().unwrap()[0], rtc::IRQ);
    }

    /// The timer is between the two edges of its interrupt, or interrupts between two chips, when the machine is saved.
    #[test]
    fn saved_in_the_middle_of_an_interrupt() {
        let (pc, bus, _) = pc();
        for (port, value) in [(0x20, 0x11), (0x21, 0x30), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
            bus.pio_write(port, &[value]);
        }
        let before = pc.save().unwrap();
        pc.pic.set_level(0, true);
        let between = pc.save().unwrap();
        let acknowledge = |state: &PcState| {
            let (other, ..) = self::pc();
            other.restore(state).unwrap();
            let cpu = other.local_apic(0).unwrap();
            let first = cpu.acknowledge();
            // End of interrupt; and the next one.
            other.vcpu_bus(0).unwrap().pio_write(0x20, &[0x20]);
            other.pic.set_level(0, true);
            (first, cpu.acknowledge())
        };
        assert_eq!(acknowledge(&between), (Some(0x30), Some(0x30)));
        let late = PcState { lapics: between.lapics.clone(), ..before };
        assert_eq!(acknowledge(&late), (None, Some(0x30)));
    }

    /// A guest can do what it wants to any register: nothing panics, nothing hangs.
    #[test]
    fn random_accesses() {
        let (pc, bus, _) = pc();
        let mut random = 0x1234_5678_9abc_def1_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let ports = [0x20, 0x40, 0x60, 0x61, 0x64, 0x70, 0x71, 0x80, 0x92, 0xa0, 0x3f8, 0x4d0, 0x600, 0xcf8, 0xcfc];
        let pages = [layout::IOAPIC_BASE, layout::LAPIC_BASE, layout::ECAM_START, layout::PCI_HOLE_START];
        for round in 0..200_000 {
            let (choice, content) = (next(), next().to_le_bytes());
            let len = 1 << (choice >> 8 & 3);
            let mut data = content[..len].to_vec();
            if choice & 1 == 0 {
                let port = ports[(choice >> 16) as usize % ports.len()] + (choice >> 32 & 7) as u16;
                let len = len.min(4);
                if choice & 2 == 0 { bus.pio_read(port, &mut data[..len]) } else { bus.pio_write(port, &data[..len]) }
            } else {
                let at = pages[(choice >> 16) as usize % pages.len()] + ((choice >> 32 & 0xfff) & !(len as u64 - 1));
                if choice & 2 == 0 { bus.mmio_read(at, &mut data) } else { bus.mmio_write(at, &data) }
            }
            if round % 16 == 0 {
                advance(pc.timers(), content[0].into());
                for index in 0..2 {
                    let cpu = pc.local_apic(index).unwrap();
                    let _ = (cpu.acknowledge(), cpu.write_msr(0x800 + (choice >> 40 & 0xff) as u32, next()));
                    let _ = cpu.read_msr(0x800 + (choice >> 40 & 0xff) as u32);
                }
            }
        }
        let state = pc.save().unwrap();
        let (other, ..) = self::pc();
        other.restore(&state).unwrap();
    }
}
