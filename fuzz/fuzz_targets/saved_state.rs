//! A saved VM that was damaged on purpose (its checksum fits): the machine takes or refuses it, and goes on without a panic.

#![no_main]

use std::cell::RefCell;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cpu::{CpuState, Engine};
use libfuzzer_sys::fuzz_target;
use machine::{Pc, PcConfig, PcState};
use memory::GuestRam;

#[derive(Arbitrary, Debug)]
enum Damage {
    Byte(u16, u8),
    Bit(u16, u8),
    Insert(u16, u8),
    Remove(u16),
    Cut(u16),
}

#[derive(Arbitrary, Debug)]
struct Input {
    machine: Vec<Damage>,
    cpu: Vec<Damage>,
    code: [u8; 64],
}

fn damage(bytes: &mut Vec<u8>, all: &[Damage]) {
    for one in all.iter().take(16) {
        let len = bytes.len();
        if len == 0 {
            return;
        }
        let place = |at: &u16| usize::from(*at) % len;
        match one {
            Damage::Byte(at, value) => bytes[place(at)] = *value,
            Damage::Bit(at, bit) => bytes[place(at)] ^= 1 << (bit % 8),
            Damage::Insert(at, value) => bytes.insert(place(at), *value),
            Damage::Remove(at) => drop(bytes.remove(place(at))),
            Damage::Cut(at) => bytes.truncate(place(at)),
        }
    }
}

fn pc(ram: &GuestRam) -> Pc {
    Pc::new(PcConfig {
        ram: ram.clone(),
        vcpus: 2,
        tsc_khz: 2_000_000,
        chips: None,
        serial_output: Box::new(std::io::sink()),
        pci_devices: Vec::new(),
        power: Arc::new(|_| ()),
        watchdog: Some(Arc::new(|| ())),
    })
    .unwrap()
}

thread_local! {
    static WHOLE: RefCell<Option<(GuestRam, Vec<u8>, Vec<u8>)>> = const { RefCell::new(None) };
}

fuzz_target!(|input: Input| {
    WHOLE.with_borrow_mut(|place| {
        let (ram, machine, cpu) = place.get_or_insert_with(|| {
            let ram = GuestRam::new(32 << 20).unwrap();
            let pc = pc(&ram);
            let cpu = pc.initial_cpu_state(0, 0x1000);
            let state = pc.save().unwrap();
            drop(pc);
            (ram, postcard::to_stdvec(&state).unwrap(), postcard::to_stdvec(&cpu).unwrap())
        });
        let (mut machine, mut cpu) = (machine.clone(), cpu.clone());
        damage(&mut machine, &input.machine);
        damage(&mut cpu, &input.cpu);
        let pc = pc(ram);
        if let Ok(state) = postcard::from_bytes::<PcState>(&machine)
            && pc.restore(&state).is_ok()
        {
            pc.save().unwrap();
        }
        let Ok(state) = postcard::from_bytes::<CpuState>(&cpu) else { return };
        assert!(ram.write(0x1000, &input.code));
        let engine = interp::InterpEngine::new(ram.clone(), 2);
        let setup = cpu::VcpuSetup { index: 0, lapic: pc.local_apic(0).unwrap(), bus: pc.vcpu_bus(0).unwrap() };
        let mut vcpu = engine.create_vcpu(setup).unwrap();
        vcpu.set_state(&state);
        for _ in 0..4 {
            let _ = vcpu.step();
        }
    });
});
