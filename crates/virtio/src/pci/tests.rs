//! The transport as Linux's `virtio_pci_modern` drives it: found through ECAM, set up through the common configuration, notified by
//! 16-bit writes, interrupts by MSI-X.

use std::io::Write;

use cpu::Bus;
use machine::bus::{IoBus, PioDevice};
use machine::irq::{IrqSink, MsiSink};
use machine::layout;
use machine::pci::PciHost;
use memory::GuestRam;
use proptest::prelude::*;

use super::*;
use crate::testing::DriverQueue;
use crate::{Block, Disk, Entropy};

const RING: u64 = 0x10000;
const DATA: u64 = 0x10_0000;

#[derive(Default)]
struct Chips {
    levels: Mutex<Vec<(u32, bool)>>,
    messages: Mutex<Vec<(u64, u32)>>,
}

impl IrqSink for Chips {
    fn set_level(&self, gsi: u32, high: bool) {
        self.levels.lock().unwrap().push((gsi, high));
    }
}

impl MsiSink for Chips {
    fn send(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }
}

struct NoReset;

impl PioDevice for NoReset {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
}

struct Pc {
    ram: GuestRam,
    bus: Arc<IoBus>,
    host: Arc<PciHost>,
    chips: Arc<Chips>,
    device: Arc<VirtioPci>,
    lines: Arc<Mutex<Vec<String>>>,
    _file: tempfile::NamedTempFile,
}

fn pc(entropy: bool) -> Pc {
    let ram = GuestRam::new(32 << 20).unwrap();
    let (bus, chips) = (Arc::new(IoBus::new()), Arc::new(Chips::default()));
    let host = PciHost::new(bus.clone(), chips.clone(), chips.clone(), Arc::new(NoReset));
    host.connect().unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[7; 64 * 512]).unwrap();
    let device: Box<dyn VirtioDevice> = if entropy {
        Box::new(Entropy::default())
    } else {
        Box::new(Block::new(Disk::open(&crate::DiskConfig::new(file.path())).unwrap(), "x", 2).unwrap())
    };
    let lines = Arc::new(Mutex::new(Vec::new()));
    let for_reporter = lines.clone();
    let reporter: Reporter = Arc::new(move |line| for_reporter.lock().unwrap().push(line.to_owned()));
    let device = Arc::new(VirtioPci::new("virtio0", device, ram.shared(), Some(reporter)).unwrap());
    assert_eq!(host.add(device.clone()).unwrap(), 1);
    Pc { ram, bus, host, chips, device, lines, _file: file }
}

/// What the driver found out about the device, and its registers.
struct Driver<'a> {
    pc: &'a Pc,
    common: u64,
    isr: u64,
    config: u64,
    notify: u64,
    notify_multiplier: u64,
    table: u64,
    msix_control: u16,
}

impl Pc {
    fn read(&self, address: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.mmio_read(address, &mut data[..len]);
        u64::from_le_bytes(data)
    }
    fn write(&self, address: u64, len: usize, value: u64) {
        self.bus.mmio_write(address, &value.to_le_bytes()[..len]);
    }
    fn config(&self, register: u16, len: usize) -> u64 {
        self.read(layout::ECAM_START + (1 << 15) + u64::from(register), len)
    }
    fn set_config(&self, register: u16, len: usize, value: u64) {
        self.write(layout::ECAM_START + (1 << 15) + u64::from(register), len, value);
    }

    /// Walks the capability list as `virtio_pci_find_capability` does.
    fn probe(&self) -> Driver<'_> {
        assert_eq!(self.config(0, 2), 0x1af4);
        assert!(self.config(8, 1) >= 1, "revision");
        let bar = |n: u64| self.config(0x10 + 4 * n as u16, 4) & !0xf;
        let mut at = self.config(0x34, 1) as u16;
        let mut driver = Driver {
            pc: self,
            common: 0,
            isr: 0,
            config: 0,
            notify: 0,
            notify_multiplier: 0,
            table: 0,
            msix_control: 0,
        };
        while at != 0 {
            match self.config(at, 1) {
                9 => {
                    let place = bar(self.config(at + 4, 1)) + self.config(at + 8, 4);
                    let (len, kind) = (self.config(at + 12, 4), self.config(at + 3, 1));
                    assert!(kind == 5 || len > 0);
                    match kind {
                        1 => driver.common = place,
                        2 => {
                            driver.notify = place;
                            driver.notify_multiplier = self.config(at + 16, 4);
                        }
                        3 => driver.isr = place,
                        4 => driver.config = place,
                        _ => {}
                    }
                }
                0x11 => {
                    let table = self.config(at + 4, 4);
                    driver.table = bar(table & 7) + (table & !7);
                    driver.msix_control = at + 2;
                }
                other => panic!("capability {other:#x}"),
            }
            at = self.config(at + 1, 1) as u16;
        }
        assert!(driver.common != 0 && driver.isr != 0 && driver.config != 0 && driver.notify != 0 && driver.table != 0);
        // Memory decoding and bus mastering.
        self.set_config(4, 2, self.config(4, 2) | 6);
        driver
    }
}

impl Driver<'_> {
    fn get(&self, offset: u64, len: usize) -> u64 {
        self.pc.read(self.common + offset, len)
    }
    fn set(&self, offset: u64, len: usize, value: u64) {
        self.pc.write(self.common + offset, len, value);
    }
    fn status(&self) -> u8 {
        self.get(0x14, 1) as u8
    }
    fn add_status(&self, bits: u8) {
        self.set(0x14, 1, u64::from(self.status() | bits));
    }
    fn features(&self) -> u64 {
        self.set(0, 4, 0);
        let low = self.get(4, 4);
        self.set(0, 4, 1);
        low | self.get(4, 4) << 32
    }
    fn set_features(&self, features: u64) {
        for half in 0..2 {
            self.set(8, 4, half);
            self.set(0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
    }
    fn negotiate(&self, features: u64) {
        self.set(0x14, 1, 0);
        assert_eq!(self.status(), 0);
        self.add_status(status::ACKNOWLEDGE);
        self.add_status(status::DRIVER);
        self.set_features(features);
        self.add_status(status::FEATURES_OK);
    }
    fn enable_msix(&self) {
        let vectors = (self.pc.config(self.msix_control, 2) & 0x7ff) + 1;
        for vector in 0..vectors {
            self.pc.write(self.table + 16 * vector, 4, 0xfee0_0000);
            self.pc.write(self.table + 16 * vector + 4, 4, 0);
            self.pc.write(self.table + 16 * vector + 8, 4, 0x30 + vector);
            self.pc.write(self.table + 16 * vector + 12, 4, 0);
        }
        self.pc.set_config(self.msix_control, 2, 0x8000);
    }
    /// `setup_vq`, then `vp_modern_find_vqs` enables.
    fn set_up_queue(&self, index: u64, vector: u64) -> DriverQueue {
        self.set(0x16, 2, index);
        let size = self.get(0x18, 2);
        assert!(size > 0 && self.get(0x1c, 2) == 0);
        self.set(0x18, 2, size.min(64));
        let queue = DriverQueue::new(&self.pc.ram, RING + index * 0x4000, size.min(64) as u16);
        let state = queue.state();
        for (offset, address) in [(0x20, state.descriptors), (0x28, state.driver), (0x30, state.device)] {
            self.set(offset, 4, address & 0xffff_ffff);
            self.set(offset + 4, 4, address >> 32);
        }
        self.set(0x1a, 2, vector);
        assert_eq!(self.get(0x1a, 2), vector, "the vector is read back");
        self.set(0x1c, 2, 1);
        assert_eq!(self.get(0x1c, 2), 1);
        queue
    }
    fn kick(&self, index: u64) {
        self.set(0x16, 2, index);
        let offset = self.get(0x1e, 2);
        self.pc.write(self.notify + offset * self.notify_multiplier, 2, index);
    }
    fn messages(&self) -> Vec<u32> {
        std::mem::take(&mut *self.pc.chips.messages.lock().unwrap()).into_iter().map(|(_, data)| data).collect()
    }
    fn wait(&self, mut what: impl FnMut() -> bool) {
        for _ in 0..10_000 {
            if what() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        panic!("nothing happened");
    }
    /// Reads sector 0 to `DATA` through queue `index`.
    fn read_sector(&self, queue: &mut DriverQueue, index: u64) {
        assert!(self.pc.ram.write(DATA + 0x1000, &[0; 16]));
        assert!(self.pc.ram.write(DATA, &[0; 512]));
        queue.add(&[(DATA + 0x1000, 16, false), (DATA, 512, true), (DATA + 0x2000, 1, true)]);
        self.kick(index);
        let mut used = None;
        self.wait(|| {
            used = queue.used();
            used.is_some()
        });
        assert_eq!(used.unwrap().1, 513);
        let mut data = [0; 512];
        assert!(self.pc.ram.read(DATA, &mut data));
        assert_eq!(data, [7; 512]);
    }
}

#[test]
fn linux_probes_sets_up_and_reads() {
    let pc = pc(false);
    let driver = pc.probe();
    assert_eq!(pc.config(2, 2), 0x1042);
    let features = driver.features();
    assert_eq!(features & transport_features(), transport_features());
    driver.negotiate(features);
    assert_ne!(driver.status() & status::FEATURES_OK, 0);
    assert_eq!((pc.read(driver.config, 4), pc.read(driver.config + 4, 4)), (64, 0));
    driver.enable_msix();
    driver.set(0x10, 2, 0);
    assert_eq!(driver.get(0x10, 2), 0);
    let mut first = driver.set_up_queue(0, 1);
    let mut second = driver.set_up_queue(1, 2);
    driver.set(0x16, 2, 2);
    assert_eq!((driver.get(0x18, 2), driver.get(0x1a, 2)), (0, 0xffff), "no third queue");
    driver.add_status(status::DRIVER_OK);
    driver.read_sector(&mut first, 0);
    driver.wait(|| !pc.chips.messages.lock().unwrap().is_empty());
    assert_eq!(driver.messages(), [0x31]);
    second.set_used_event(0);
    driver.read_sector(&mut second, 1);
    driver.wait(|| !pc.chips.messages.lock().unwrap().is_empty());
    assert_eq!(driver.messages(), [0x32]);
    assert_eq!(pc.read(driver.isr, 1), 0, "no ISR with MSI-X");
    // Without a vector there is no interrupt; a vector that does not exist reads back as none.
    driver.set(0x16, 2, 0);
    driver.set(0x1a, 2, 99);
    assert_eq!(driver.get(0x1a, 2), 0xffff);
    first.set_used_event(1);
    driver.read_sector(&mut first, 0);
    assert_eq!(driver.messages(), Vec::<u32>::new());
    // Reset: all back, and no more answers.
    driver.set(0x14, 1, 0);
    assert_eq!((driver.status(), driver.get(0x1c, 2), driver.get(0x10, 2)), (0, 0, 0xffff));
    first.add(&[(DATA, 1, true)]);
    pc.write(driver.notify, 2, 0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(first.used().is_none());
    // And once more from the start.
    driver.negotiate(features);
    let mut first = driver.set_up_queue(0, 1);
    driver.add_status(status::DRIVER_OK);
    driver.read_sector(&mut first, 0);
}

#[test]
fn interrupt_wire_without_msix() {
    let pc = pc(true);
    let driver = pc.probe();
    driver.negotiate(1 << VIRTIO_F_VERSION_1);
    let mut queue = driver.set_up_queue(0, NO_VECTOR.into());
    driver.add_status(status::DRIVER_OK);
    queue.add(&[(DATA, 64, true)]);
    driver.kick(0);
    assert_eq!(queue.used(), Some((0, 64)), "inline: done when the notification returns");
    let mut data = [0; 64];
    assert!(pc.ram.read(DATA, &mut data));
    assert_ne!(data, [0; 64]);
    assert_eq!(*pc.chips.levels.lock().unwrap(), [(17, true)]);
    assert_eq!((pc.read(driver.isr, 1), pc.read(driver.isr, 1)), (1, 0));
    assert_eq!(*pc.chips.levels.lock().unwrap(), [(17, true), (17, false)]);
    // A request larger than the device's bound gets that much.
    queue.add(&[(DATA, 1 << 20, true)]);
    queue.add(&[(DATA, 16, false)]);
    driver.kick(0);
    assert_eq!((queue.used(), queue.used()), (Some((1, 4096)), Some((2, 0))));
}

#[test]
fn the_status_state_machine() {
    let pc = pc(true);
    let driver = pc.probe();
    let version_1 = 1 << VIRTIO_F_VERSION_1;
    for (features, good) in [(0, false), (version_1 | 1 << 50, false), (1 << 29, false), (version_1, true)] {
        driver.negotiate(features);
        assert_eq!(driver.status() & status::FEATURES_OK != 0, good, "{features:#x}");
    }
    driver.set_features(version_1 | 1 << 29);
    driver.set(8, 4, 0);
    assert_eq!(driver.get(0xc, 4), 0, "settled");
    driver.set(0x14, 1, 1);
    assert_eq!(driver.status(), 0xb, "bits cannot be cleared one by one");
    driver.set(0x14, 1, 0);
    // Neither FEATURES_OK without DRIVER, nor DRIVER_OK without FEATURES_OK.
    driver.set_features(version_1);
    driver.add_status(status::FEATURES_OK | status::DRIVER_OK);
    assert_eq!(driver.status(), 0);
    driver.add_status(status::ACKNOWLEDGE | status::DRIVER | status::DRIVER_OK);
    assert_eq!(driver.status(), 3);
    driver.add_status(status::NEEDS_RESET);
    assert_eq!(driver.status(), 3);
    driver.add_status(status::FAILED);
    assert_eq!(driver.status(), 0x83);
    driver.set(0x14, 1, 0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn a_broken_ring_needs_a_reset() {
    let pc = pc(true);
    let driver = pc.probe();
    driver.enable_msix();
    for misplaced in [false, true] {
        driver.negotiate(1 << VIRTIO_F_VERSION_1);
        driver.set(0x10, 2, 0);
        let mut queue = driver.set_up_queue(0, 1);
        if misplaced {
            driver.set(0x14, 1, 0);
            driver.negotiate(1 << VIRTIO_F_VERSION_1);
            driver.set(0x10, 2, 0);
            driver.set(0x16, 2, 0);
            driver.set(0x20, 8, 0xffff_ffff_ffff_fff0);
            driver.set(0x1c, 2, 1);
        }
        driver.add_status(status::DRIVER_OK);
        queue.add(&[(1 << 40, 8, true)]);
        driver.kick(0);
        assert_eq!(driver.status(), 0x4f);
        assert_eq!(driver.messages(), [0x30], "the configuration interrupt");
        queue.add(&[(DATA, 8, true)]);
        driver.kick(0);
        assert_eq!(queue.used(), None);
        let lines = std::mem::take(&mut *pc.lines.lock().unwrap());
        assert!(lines.len() == 1 && lines[0].contains("virtio0") && lines[0].contains("not in RAM"), "{lines:?}");
    }
}

#[test]
fn queue_reset() {
    let pc = pc(false);
    let driver = pc.probe();
    driver.negotiate(driver.features());
    driver.set_up_queue(0, NO_VECTOR.into());
    let mut second = driver.set_up_queue(1, NO_VECTOR.into());
    driver.add_status(status::DRIVER_OK);
    driver.read_sector(&mut second, 1);
    driver.set(0x16, 2, 1);
    driver.set(0x3a, 2, 1);
    assert_eq!((driver.get(0x3a, 2), driver.get(0x1c, 2), driver.get(0x18, 2)), (0, 0, 256));
    let mut second = driver.set_up_queue(1, NO_VECTOR.into());
    driver.read_sector(&mut second, 1);
}

#[test]
fn access_through_configuration_space() {
    let pc = pc(true);
    let driver = pc.probe();
    let cap = pc.device.pci_cfg;
    let window = |offset: u64, len: u64| {
        pc.set_config(cap + 4, 1, 0);
        pc.set_config(cap + 8, 4, offset);
        pc.set_config(cap + 12, 4, len);
    };
    window(0x14, 1);
    pc.set_config(cap + 16, 1, 1);
    assert_eq!(pc.config(cap + 16, 1), 1);
    assert_eq!(driver.status(), 1);
    window(0, 4);
    pc.set_config(cap + 16, 4, 1);
    window(4, 4);
    assert_eq!(pc.config(cap + 16, 4), driver.features() >> 32);
    for (bar, offset, len) in [(0, 1, 4), (0, 0, 8), (0, 0, 0), (0, 0x4000, 4), (0, 0xffff_fffc, 4), (9, 0, 4)] {
        window(offset, len);
        pc.set_config(cap + 4, 1, bar);
        pc.set_config(cap + 16, 4, 0);
        let _ = pc.config(cap + 16, 4);
    }
    assert_eq!(driver.status(), 1);
}

#[test]
fn no_memory_access_without_bus_mastering() {
    let pc = pc(true);
    let driver = pc.probe();
    driver.negotiate(1 << VIRTIO_F_VERSION_1);
    let mut queue = driver.set_up_queue(0, NO_VECTOR.into());
    driver.add_status(status::DRIVER_OK);
    pc.set_config(4, 2, 2);
    queue.add(&[(DATA, 8, true)]);
    driver.kick(0);
    assert_eq!(queue.used(), None);
    pc.set_config(4, 2, 6);
    assert_eq!(queue.used(), Some((0, 8)));
}

/// An engine that takes doorbells; it keeps which are bound, and counts up for a guest that writes.
#[derive(Clone, Default)]
struct Counting(Arc<Mutex<std::collections::BTreeMap<u64, std::os::fd::OwnedFd>>>);

struct Bound(Counting, u64);

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.0.lock().unwrap().remove(&self.1);
    }
}

impl cpu::Chips for Counting {
    fn set_level(&self, _: u32, _: bool) {}
    fn send_msi(&self, _: u64, _: u32) {}
    fn doorbell(&self, address: u64, event: std::os::fd::BorrowedFd<'_>) -> Option<cpu::chips::Binding> {
        let before = self.0.lock().unwrap().insert(address, event.try_clone_to_owned().unwrap());
        assert!(before.is_none(), "two at {address:#x}");
        Some(Box::new(Bound(self.clone(), address)))
    }
    fn nmi(&self) {}
    fn save(&self) -> Result<cpu::chips::ChipRegisters, String> {
        Err("no chips".into())
    }
    fn restore(&self, _: &cpu::chips::ChipRegisters) -> Result<(), String> {
        Err("no chips".into())
    }
}

#[test]
fn doorbells_are_bound_while_they_may_ring() {
    let pc = pc(false);
    let chips = Counting::default();
    pc.device.use_chips(Arc::new(chips.clone()));
    let bound = || chips.0.lock().unwrap().keys().copied().collect::<Vec<_>>();
    let driver = pc.probe();
    driver.negotiate(1 << VIRTIO_F_VERSION_1);
    let mut queue = driver.set_up_queue(0, NO_VECTOR.into());
    driver.set_up_queue(1, NO_VECTOR.into());
    assert!(bound().is_empty(), "nothing before DRIVER_OK");
    driver.add_status(status::DRIVER_OK);
    assert_eq!(bound(), [driver.notify, driver.notify + driver.notify_multiplier]);
    // The engine counts, nobody calls: the request is done all the same.
    assert!(pc.ram.write(DATA + 0x1000, &[0; 16]));
    queue.add(&[(DATA + 0x1000, 16, false), (DATA, 512, true), (DATA + 0x2000, 1, true)]);
    std::fs::File::from(chips.0.lock().unwrap()[&driver.notify].try_clone().unwrap())
        .write_all(&1_u64.to_ne_bytes())
        .unwrap();
    driver.wait(|| queue.used().is_some());
    // Without bus mastering nothing may ring.
    pc.set_config(4, 2, 2);
    assert!(bound().is_empty());
    pc.set_config(4, 2, 6);
    assert_eq!(bound().len(), 2);
    // The guest moves the BAR.
    let bar = pc.config(0x10, 4) & !0xf;
    pc.set_config(0x10, 4, 0xd800_0000);
    assert_eq!(bound(), [driver.notify - bar + 0xd800_0000, driver.notify - bar + 0xd800_0000 + 4]);
    pc.set_config(4, 2, 4);
    assert!(bound().is_empty(), "the BAR does not answer");
    pc.set_config(0x10, 4, bar);
    pc.set_config(4, 2, 6);
    assert_eq!(bound()[0], driver.notify);
    // Stopped, started, reset.
    pc.device.pause();
    assert!(bound().is_empty());
    pc.device.resume();
    assert_eq!(bound().len(), 2);
    driver.set(0x14, 1, 0);
    assert!(bound().is_empty());
}

#[test]
fn state_moves_to_another_machine() {
    let pc1 = pc(false);
    let driver = pc1.probe();
    driver.negotiate(driver.features());
    driver.enable_msix();
    let mut queue = driver.set_up_queue(0, 1);
    driver.add_status(status::DRIVER_OK);
    driver.read_sector(&mut queue, 0);
    // A request that comes while the device is paused is served by the next machine.
    pc1.device.pause();
    assert!(pc1.ram.write(DATA + 0x1000, &[0; 16]));
    queue.add(&[(DATA + 0x1000, 16, false), (DATA, 512, true), (DATA + 0x2000, 1, true)]);
    driver.kick(0);
    let state = pc1.host.save();
    assert!(queue.used().is_none());

    let pc2 = pc(false);
    let mut image = vec![0; 4 << 20];
    assert!(pc1.ram.read(0, &mut image) && pc2.ram.write(0, &image));
    pc2.host.restore(&state).unwrap();
    let index = RING + 64 * 16 + 136 + 2;
    let used = || {
        let mut idx = [0; 2];
        assert!(pc2.ram.read(index, &mut idx));
        u16::from_le_bytes(idx)
    };
    assert_eq!(used(), 1);
    assert_eq!(pc2.host.save(), state);
    pc2.device.resume();
    pc2.probe().wait(|| used() == 2);
    // Work goes on in the first machine, too.
    pc1.device.resume();
    driver.wait(|| queue.used().is_some());

    let bytes = pc1.device.save();
    let other = pc(true);
    assert!(other.device.restore(&bytes).is_err());
    assert!(pc2.device.restore(&[]).is_err());
    assert!(pc2.device.restore(&bytes[..bytes.len() - 1]).is_err());
    assert!(pc2.device.restore(&[&bytes[..], &[0]].concat()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

    /// Any accesses to registers and configuration space, on top of a live device or not.
    #[test]
    fn any_accesses(
        live in any::<bool>(),
        accesses in prop::collection::vec(
            (prop_oneof![0..0x40u64, 0..0x5000u64], 0..4u8, any::<bool>(), prop_oneof![0..20u64, any::<u64>()], any::<bool>()),
            1..60,
        ),
    ) {
        let pc = pc(false);
        let driver = pc.probe();
        if live {
            driver.negotiate(driver.features());
            driver.set_up_queue(0, 1);
            driver.add_status(status::DRIVER_OK);
        }
        for (offset, width, write, value, config) in accesses {
            let len = 1 << width;
            let offset = offset & !(len - 1);
            let len = len as usize;
            match (config, write) {
                // Not the registers that move or disable the BARs: the accesses are to reach the device.
                (true, true) if offset & 0xff >= 0x40 => pc.set_config((offset & 0xff) as u16, len.min(4), value),
                (true, _) => drop(pc.config((offset & 0xff) as u16, len.min(4))),
                (false, true) => pc.write(driver.common + offset, len, value),
                (false, false) => drop(pc.read(driver.common + offset, len)),
            }
        }
        driver.set(0x14, 1, 0);
        prop_assert_eq!(driver.status(), 0);
        driver.negotiate(driver.features());
        let mut queue = driver.set_up_queue(0, NO_VECTOR.into());
        driver.add_status(status::DRIVER_OK);
        driver.read_sector(&mut queue, 0);
    }

    /// Any bytes as saved state: refused or taken, without a panic; a reset makes the device usable again.
    #[test]
    fn any_state(flips in prop::collection::vec((any::<u16>(), any::<u8>()), 1..6)) {
        let pc = pc(true);
        let driver = pc.probe();
        driver.negotiate(driver.features());
        driver.set_up_queue(0, 1);
        driver.add_status(status::DRIVER_OK);
        let mut bytes = pc.device.save();
        for (at, value) in flips {
            let at = usize::from(at) % bytes.len();
            bytes[at] = value;
        }
        if pc.device.restore(&bytes).is_ok() {
            pc.device.resume();
        }
        driver.set(0x14, 1, 0);
        driver.negotiate(driver.features());
        let mut queue = driver.set_up_queue(0, NO_VECTOR.into());
        driver.add_status(status::DRIVER_OK);
        queue.add(&[(DATA, 8, true)]);
        driver.kick(0);
        prop_assert_eq!(queue.used(), Some((0, 8)));
    }
}
