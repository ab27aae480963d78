//! Any accesses of a guest to ports, registers and configuration space of the whole machine with virtio devices in it: no panic, no hang,
//! and the machine can be saved afterwards.

#![no_main]

use std::cell::RefCell;
use std::sync::Arc;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use machine::layout::{ECAM_START, IOAPIC_BASE, LAPIC_BASE};
use machine::pci::PciDevice;
use machine::{Pc, PcConfig};
use memory::GuestRam;
use virtio::{Block, Console, Disk, DiskConfig, Entropy, VirtioDevice, VirtioPci, Vsock};

const DEVICES: u64 = 4;

#[derive(Arbitrary, Debug)]
enum Place {
    Port(u16),
    /// Of the devices that there are.
    KnownPort(u8),
    Lapic(u8),
    IoApic(bool),
    Config(u8, u8),
    /// A device's registers.
    Bar(u8, u16),
    /// Those that all virtio devices have.
    Common(u8, u8),
    Any(u64),
}

#[derive(Arbitrary, Debug)]
struct Deed {
    place: Place,
    width: u8,
    /// What is written; none to read.
    value: Option<u64>,
    /// A place in memory instead: rings can be there.
    memory: Option<u8>,
}

#[derive(Arbitrary, Debug)]
struct Input {
    memory: Vec<u8>,
    msrs: Vec<(u16, Option<u64>)>,
    deeds: Vec<Deed>,
}

const PORTS: [u16; 24] = [
    0x20, 0x21, 0xa0, 0xa1, 0x40, 0x42, 0x43, 0x61, 0x70, 0x71, 0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0x600, 0x602, 0x604,
    0x608, 0xcf8, 0xcfc, 0x92, 0x64,
];

thread_local! {
    static RIG: RefCell<Option<(GuestRam, tempfile::NamedTempFile)>> = const { RefCell::new(None) };
}

fuzz_target!(|input: Input| {
    RIG.with_borrow_mut(|place| {
        let (ram, file) = place.get_or_insert_with(|| {
            let file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            (GuestRam::new(32 << 20).unwrap(), file)
        });
        let mut low = vec![0; 0x1_0000];
        low.iter_mut().zip(input.memory).for_each(|(to, from)| *to = from);
        assert!(ram.write(0, &low));
        let devices: [Box<dyn VirtioDevice>; DEVICES as usize] = [
            Box::new(Block::new(Disk::open(&DiskConfig::new(file.path())).unwrap(), "x", 1).unwrap()),
            Box::new(Entropy::default()),
            Box::new(Console::new(Box::new(std::io::sink())).unwrap().0),
            Box::new(Vsock::new(3, None, Box::new(|_, _| None)).unwrap()),
        ];
        let pci_devices = devices
            .into_iter()
            .enumerate()
            .map(|(number, device)| {
                // Each has a name of its own: the machine takes no two alike.
                let device = VirtioPci::new(&format!("device-{number}"), device, ram.shared(), None).unwrap();
                Arc::new(device) as Arc<dyn PciDevice>
            })
            .collect();
        let pc = Pc::new(PcConfig {
            ram: ram.clone(),
            vcpus: 1,
            tsc_khz: 2_000_000,
            chips: None,
            serial_output: Box::new(std::io::sink()),
            pci_devices,
            power: Arc::new(|_| ()),
            watchdog: Some(Arc::new(|| ())),
        })
        .unwrap();
        let (bus, lapic) = (pc.vcpu_bus(0).unwrap(), pc.local_apic(0).unwrap());
        for (msr, value) in input.msrs.iter().take(16) {
            let msr = [0x1b, 0x6e0, 0x800 + u32::from(*msr) % 0x100][usize::from(*msr) % 3];
            let _ = match value {
                Some(value) => lapic.write_msr(msr, *value),
                None => lapic.read_msr(msr).map(drop),
            };
        }
        let config = |slot: u64, register: u64| ECAM_START + (slot << 15) + register;
        let bar = |slot: u64, number: u64| {
            let mut data = [0; 4];
            bus.mmio_read(config(slot, 0x10 + 4 * number), &mut data);
            u64::from(u32::from_le_bytes(data) & !0xf)
        };
        for slot in 1..=DEVICES {
            bus.mmio_write(config(slot, 4), &[6, 0]);
        }
        let commons: Vec<u64> = (1..=DEVICES).map(|slot| bar(slot, 0)).collect();
        for deed in input.deeds.iter().take(200) {
            let len = 1usize << (deed.width % 4);
            let slot = |number: u8| u64::from(number) % DEVICES;
            let at = match deed.place {
                Place::Port(port) => Err(port),
                Place::KnownPort(number) => Err(PORTS[usize::from(number) % PORTS.len()]),
                Place::Lapic(register) => Ok(LAPIC_BASE + 16 * u64::from(register)),
                Place::IoApic(data) => Ok(IOAPIC_BASE + if data { 0x10 } else { 0 }),
                Place::Config(number, register) => Ok(config(1 + slot(number), register.into())),
                Place::Bar(number, offset) => Ok(bar(1 + slot(number), 0) + u64::from(offset) % 0x8000),
                Place::Common(number, offset) => Ok(commons[slot(number) as usize] + u64::from(offset) % 0x40),
                Place::Any(address) => Ok(address),
            };
            let value = deed.memory.map_or(deed.value, |page| Some(u64::from(page) << 8)).map(u64::to_le_bytes);
            let mut data = [0; 8];
            match (at, value) {
                (Ok(at), value) => {
                    let at = at & !(len as u64 - 1);
                    // What is RAM does not come here.
                    if at < 64 << 20 {
                        continue;
                    }
                    match value {
                        Some(value) => bus.mmio_write(at, &value[..len]),
                        None => bus.mmio_read(at, &mut data[..len]),
                    }
                }
                (Err(port), Some(value)) => bus.pio_write(port, &value[..len.min(4)]),
                (Err(port), None) => bus.pio_read(port, &mut data[..len.min(4)]),
            }
        }
        while lapic.status().interrupt && lapic.acknowledge().is_some() {
            lapic.eoi();
        }
        pc.reset();
        pc.save().unwrap();
    });
});
