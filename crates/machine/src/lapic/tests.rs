use std::sync::atomic::AtomicUsize;

use cpu::LocalApic;

use super::*;
use crate::clock::testing::{advance, manual};
use crate::clock::{Clock, TimerQueue};
use crate::irq::MsiSink;

const X2APIC_BSP: u64 = 0xfee0_0d00;

struct Kicks(AtomicUsize);
impl Kick for Kicks {
    fn kick(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

struct Rig {
    lapics: Lapics,
    queue: Arc<TimerQueue>,
    clock: Arc<Clock>,
}

impl Rig {
    fn new(count: u8) -> Self {
        let (clock, queue) = manual();
        Self { lapics: Lapics::new(count, &queue), queue, clock }
    }

    fn cpu(&self, index: u32) -> Arc<Lapic> {
        self.lapics.get(index).unwrap()
    }

    fn x2apic(count: u8) -> Self {
        let rig = Self::new(count);
        for lapic in rig.lapics.all() {
            let base = lapic.read_msr(MSR_APIC_BASE).unwrap();
            lapic.write_msr(MSR_APIC_BASE, base | 1 << 10).unwrap();
            lapic.write_msr(0x80f, 0x1ff).unwrap();
        }
        rig
    }
}

fn pending(lapic: &Lapic) -> bool {
    lapic.status().interrupt
}

#[test]
fn priorities_and_eoi() {
    let rig = Rig::x2apic(1);
    let cpu = rig.cpu(0);
    let kicks = Arc::new(Kicks(AtomicUsize::new(0)));
    cpu.set_kick(kicks.clone());
    for vector in [0x31, 0x52, 0x51] {
        cpu.write_msr(0x83f, vector).unwrap();
    }
    assert_eq!(kicks.0.load(Ordering::SeqCst), 1, "further ones of a kind do not kick again");
    assert_eq!(cpu.acknowledge(), Some(0x52));
    assert_eq!(cpu.read_msr(0x80a), Ok(0x50));
    assert!(!pending(&cpu), "0x51 is of the same class");
    cpu.write_msr(0x80b, 0).unwrap();
    assert_eq!(cpu.acknowledge(), Some(0x51));
    cpu.write_msr(0x83f, 0x61).unwrap();
    assert_eq!(cpu.acknowledge(), Some(0x61), "nests");
    cpu.write_msr(0x80b, 0).unwrap();
    cpu.eoi();
    cpu.set_cr8(3);
    assert!(!pending(&cpu));
    assert_eq!((cpu.cr8(), cpu.read_msr(0x808)), (3, Ok(0x30)));
    cpu.set_cr8(2);
    assert_eq!(cpu.acknowledge(), Some(0x31));
    assert_eq!(cpu.acknowledge(), None);
}

#[test]
fn modes_and_msr_errors() {
    let rig = Rig::new(2);
    let cpu = rig.cpu(0);
    assert_eq!(cpu.read_msr(MSR_APIC_BASE), Ok(0xfee0_0900));
    assert_eq!(rig.cpu(1).read_msr(MSR_APIC_BASE), Ok(0xfee0_0800));
    assert!(cpu.mmio_enabled());
    assert_eq!(cpu.read_msr(0x802), Err(MsrError), "xAPIC mode");
    assert_eq!(cpu.write_msr(MSR_APIC_BASE, 0xfee0_0500), Err(MsrError), "x2APIC without enable");
    assert_eq!(cpu.write_msr(MSR_APIC_BASE, 0xfed0_0900), Err(MsrError), "moved");
    cpu.write_msr(MSR_APIC_BASE, X2APIC_BSP).unwrap();
    assert_eq!(cpu.write_msr(MSR_APIC_BASE, 0xfee0_0900), Err(MsrError), "no way back but through off");
    assert!(!cpu.mmio_enabled());
    assert_eq!(cpu.read_msr(0x803), Ok(0x5_0014));
    for (msr, value) in
        [(0x802, 0), (0x80b, 1), (0x828, 1), (0x808, 0x100), (0x80f, 0x1000), (0x83f, 0x100), (0x839, 1)]
    {
        assert_eq!(cpu.write_msr(msr, value), Err(MsrError), "{msr:#x}");
    }
    for msr in [0x80b, 0x83f, 0x800, 0x80e, 0x831, 0x8ff, 0x900] {
        assert_eq!(cpu.read_msr(msr), Err(MsrError), "{msr:#x}");
    }
    cpu.write_msr(MSR_APIC_BASE, 0xfee0_0100).unwrap();
    assert_eq!(cpu.write_msr(MSR_APIC_BASE, X2APIC_BSP), Err(MsrError));
    cpu.write_msr(MSR_APIC_BASE, 0xfee0_0900).unwrap();
}

/// As Linux with `tsc_deadline`: LVT, fence, deadline MSR; re-armed from the handler.
#[test]
fn tsc_deadline() {
    let rig = Rig::x2apic(1);
    let cpu = rig.cpu(0);
    cpu.set_tsc_offset(1000);
    cpu.write_msr(MSR_TSC_DEADLINE, 5).unwrap();
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(0), "not in TSC mode");
    cpu.write_msr(0x832, 0x400ec).unwrap();
    cpu.write_msr(MSR_TSC_DEADLINE, 1000 + 4_000_000).unwrap();
    advance(&rig.queue, 3_999_999);
    assert!(!pending(&cpu));
    advance(&rig.queue, 1);
    assert_eq!(cpu.acknowledge(), Some(0xec));
    assert_eq!(cpu.read_msr(MSR_TSC_DEADLINE), Ok(0));
    cpu.eoi();
    advance(&rig.queue, 100_000_000);
    assert!(!pending(&cpu), "once");
    cpu.write_msr(MSR_TSC_DEADLINE, 1).unwrap();
    assert_eq!(cpu.acknowledge(), Some(0xec), "in the past: at once");
    cpu.eoi();
    cpu.write_msr(MSR_TSC_DEADLINE, rig.clock.tsc() + 2000).unwrap();
    cpu.write_msr(MSR_TSC_DEADLINE, 0).unwrap();
    advance(&rig.queue, 100_000);
    assert!(!pending(&cpu), "disarmed");
    cpu.write_msr(MSR_TSC_DEADLINE, rig.clock.tsc() + 2000).unwrap();
    cpu.write_msr(0x832, 0x100ec).unwrap();
    advance(&rig.queue, 100_000);
    cpu.write_msr(0x832, 0xec).unwrap();
    assert!(!pending(&cpu), "another mode disarms");
}

/// As Linux calibrates: divide by 16, masked, count down from all ones, look at the current count.
#[test]
fn one_shot_and_periodic() {
    let rig = Rig::x2apic(1);
    let cpu = rig.cpu(0);
    cpu.write_msr(0x832, 0x100ec).unwrap();
    cpu.write_msr(0x83e, 3).unwrap();
    cpu.write_msr(0x838, 0xffff_ffff).unwrap();
    advance(&rig.queue, 16_000_000);
    assert_eq!(cpu.read_msr(0x839), Ok(0xffff_ffff - 1_000_000));
    cpu.write_msr(0x83e, 0xb).unwrap();
    advance(&rig.queue, 1_000_000);
    assert_eq!(cpu.read_msr(0x839), Ok(0xffff_ffff - 2_000_000));
    // One-shot, expired while masked: nothing when unmasked.
    cpu.write_msr(0x838, 1000).unwrap();
    advance(&rig.queue, 2000);
    cpu.write_msr(0x832, 0xec).unwrap();
    assert!(!pending(&cpu));
    assert_eq!(cpu.read_msr(0x839), Ok(0));
    cpu.write_msr(0x838, 50_000).unwrap();
    advance(&rig.queue, 50_000);
    assert_eq!(cpu.acknowledge(), Some(0xec));
    cpu.eoi();
    // Periodic.
    cpu.write_msr(0x832, 0x200ec).unwrap();
    cpu.write_msr(0x838, 1_000_000).unwrap();
    for _ in 0..5 {
        advance(&rig.queue, 1_000_000);
        assert_eq!(cpu.acknowledge(), Some(0xec));
        cpu.eoi();
        assert!(!pending(&cpu));
    }
    advance(&rig.queue, 10_000_000);
    assert_eq!(cpu.acknowledge(), Some(0xec));
    cpu.eoi();
    assert!(!pending(&cpu), "merged in IRR");
    cpu.write_msr(0x838, 0).unwrap();
    advance(&rig.queue, 10_000_000);
    assert!(!pending(&cpu), "stopped");
}

#[test]
fn ipis_find_their_way() {
    let rig = Rig::x2apic(20);
    let hit = |vector: u8| -> Vec<u32> {
        let hit = rig.lapics.all().iter().filter(|l| l.acknowledge() == Some(vector)).map(|l| l.id()).collect();
        rig.lapics.all().iter().for_each(|l| l.eoi());
        hit
    };
    let send = |icr: u64| rig.cpu(1).write_msr(0x830, icr).unwrap();
    send(17 << 32 | 0x40fd);
    assert_eq!(hit(0xfd), [17]);
    send(0xffff_ffff << 32 | 0x40fd);
    assert_eq!(hit(0xfd).len(), 20);
    // Cluster 1, members 0 and 2: x2APIC logical.
    send(0x0001_0005 << 32 | 0x48fd);
    assert_eq!(hit(0xfd), [16, 18]);
    send(0x440fd);
    assert_eq!(hit(0xfd), [1]);
    send(0x840fd);
    assert_eq!(hit(0xfd).len(), 20);
    send(0xc40fd);
    assert_eq!(hit(0xfd), (0..20).filter(|id| *id != 1).collect::<Vec<_>>());
    // Lowest priority among cluster 0's first three: the first one is busy.
    rig.cpu(0).set_cr8(5);
    send(7 << 32 | 0x49fd);
    assert_eq!(hit(0xfd), [1]);
    send(3 << 32 | 0x400);
    assert!(rig.cpu(3).status().nmi);
    rig.cpu(3).acknowledge_nmi();
    assert!(!rig.cpu(3).status().nmi);
    MsiSink::send(&rig.lapics, 0xfee0_5000, 0x4041);
    assert_eq!(hit(0x41), [5]);
    rig.cpu(0).set_cr8(0);
    MsiSink::send(&rig.lapics, 0xfee0_500c, 0x41);
    assert_eq!(hit(0x41), [0, 2]);
}

#[test]
fn logical_xapic_destinations() {
    let rig = Rig::new(4);
    for (id, lapic) in rig.lapics.all().iter().enumerate() {
        lapic.mmio_write(0xd0, &(1_u32 << (24 + id)).to_le_bytes());
    }
    let sent_to = |icr_high: u32| -> Vec<u32> {
        let cpu = rig.cpu(0);
        cpu.mmio_write(0x310, &icr_high.to_le_bytes());
        cpu.mmio_write(0x300, &0x48f0_u32.to_le_bytes());
        let hit = rig.lapics.all().iter().filter(|l| l.acknowledge() == Some(0xf0)).map(|l| l.id()).collect();
        rig.lapics.all().iter().for_each(|l| l.eoi());
        hit
    };
    assert_eq!(sent_to(0x0a00_0000), [1, 3]);
    assert_eq!(sent_to(0xff00_0000), [0, 1, 2, 3]);
    for (id, lapic) in rig.lapics.all().iter().enumerate() {
        lapic.mmio_write(0xe0, &0_u32.to_le_bytes());
        let cluster = (id as u32 / 2) << 4 | 1 << (id % 2);
        lapic.mmio_write(0xd0, &(cluster << 24).to_le_bytes());
    }
    assert_eq!(sent_to(0x1200_0000), [3]);
    assert_eq!(sent_to(0xf100_0000), [0, 2]);
}

#[test]
fn init_and_sipi() {
    let rig = Rig::x2apic(2);
    let (bsp, ap) = (rig.cpu(0), rig.cpu(1));
    bsp.write_msr(0x830, 1 << 32 | 0x4500).unwrap();
    assert!(ap.status().init);
    bsp.write_msr(0x830, 1 << 32 | 0x8500).unwrap();
    bsp.write_msr(0x830, 1 << 32 | 0x4699).unwrap();
    assert_eq!(ap.status(), InterruptStatus { init: true, sipi: Some(0x99), ..Default::default() });
    ap.acknowledge_init();
    assert_eq!(ap.status(), InterruptStatus { sipi: Some(0x99), ..Default::default() });
    ap.acknowledge_init();
    assert_eq!(ap.status(), InterruptStatus::default());
    assert_eq!(ap.read_msr(0x80f), Ok(0xff), "INIT resets the registers");
    assert_eq!(ap.read_msr(MSR_APIC_BASE), Ok(0xfee0_0c00), "but not the mode");
    bsp.write_msr(0x830, 1 << 32 | 0x4699).unwrap();
    assert_eq!(ap.status(), InterruptStatus::default(), "a second SIPI is ignored");
    bsp.write_msr(0x83f, 0x40).unwrap();
    bsp.write_msr(0x830, 0x4699).unwrap();
    assert_eq!(bsp.status().sipi, None);
}

struct FakePic(std::sync::Weak<Lapic>);
impl InterruptAcknowledge for FakePic {
    fn acknowledge(&self) -> u8 {
        self.0.upgrade().unwrap().set_pic_output(false);
        0x30
    }
}
#[derive(Default)]
struct Eois(Mutex<Vec<u8>>);
impl EoiListener for Eois {
    fn end_of_interrupt(&self, vector: u8) {
        self.0.lock().unwrap().push(vector);
    }
}

#[test]
fn pic_through_lint0_and_level_eoi() {
    let rig = Rig::new(1);
    let cpu = rig.cpu(0);
    let pic: Arc<dyn InterruptAcknowledge> = Arc::new(FakePic(Arc::downgrade(&cpu)));
    let eois = Arc::new(Eois::default());
    let listener: Arc<dyn EoiListener> = eois.clone();
    rig.lapics.connect(Arc::downgrade(&pic), Arc::downgrade(&listener));
    rig.lapics.set_pic_output(true);
    assert!(pending(&cpu), "virtual wire since firmware");
    assert_eq!(cpu.acknowledge(), Some(0x30));
    assert!(!pending(&cpu));
    cpu.mmio_write(0x350, &0x10700_u32.to_le_bytes());
    rig.lapics.set_pic_output(true);
    assert!(!pending(&cpu) && cpu.acknowledge().is_none());
    cpu.mmio_write(0x350, &0x700_u32.to_le_bytes());
    assert!(pending(&cpu));
    rig.lapics.set_pic_output(false);
    // "Virtual wire IRQ": LINT0 as an ordinary edge.
    cpu.mmio_write(0x350, &0x0fe_u32.to_le_bytes());
    rig.lapics.set_pic_output(true);
    assert_eq!(cpu.acknowledge(), Some(0xfe));
    cpu.eoi();
    let message = |level| IcrMessage {
        vector: 0x61,
        delivery: Delivery::Fixed,
        logical: false,
        level,
        shorthand: Shorthand::None,
        destination: 0,
    };
    rig.lapics.send_message(message(true));
    assert_eq!(cpu.acknowledge(), Some(0x61));
    cpu.mmio_write(0xb0, &[0; 4]);
    rig.lapics.send_message(message(false));
    assert_eq!(cpu.acknowledge(), Some(0x61));
    cpu.mmio_write(0xb0, &[0; 4]);
    assert_eq!(*eois.0.lock().unwrap(), [0x61], "for level only");
    cpu.lint1();
    assert!(cpu.status().nmi);
}

#[test]
fn errors_are_reported() {
    let rig = Rig::new(1);
    let cpu = rig.cpu(0);
    let read = |at| {
        let mut data = [0; 4];
        cpu.mmio_read(at, &mut data);
        u32::from_le_bytes(data)
    };
    cpu.mmio_write(0x370, &0xfe_u32.to_le_bytes());
    cpu.mmio_write(0x300, &0x4004_u32.to_le_bytes());
    assert_eq!(cpu.acknowledge(), Some(0xfe));
    assert_eq!(read(0x280), 0, "not before ESR is written");
    cpu.mmio_write(0x280, &[0; 4]);
    assert_eq!(read(0x280), 0x20);
    read(0x400);
    cpu.mmio_write(0x280, &[0; 4]);
    assert_eq!(read(0x280), 0x80);
    assert_eq!(read(0x20), 0);
    assert_eq!(read(0x30), 0x5_0014);
    cpu.mmio_write(0xf0, &0xff_u32.to_le_bytes());
    assert_eq!(read(0x370), 0x1_00fe, "switching off masks the LVT");
    cpu.mmio_write(0x370, &0xfe_u32.to_le_bytes());
    assert_eq!(read(0x370), 0x1_00fe);
}

#[test]
fn own_page_for_each_vcpu() {
    let rig = Rig::new(2);
    let bus: Arc<dyn cpu::Bus> = Arc::new(crate::bus::IoBus::new());
    for lapic in rig.lapics.all() {
        let view = VcpuBus::new(bus.clone(), lapic.clone());
        let mut data = [0; 4];
        cpu::Bus::mmio_read(&view, 0xfee0_0020, &mut data);
        assert_eq!(u32::from_le_bytes(data), lapic.id() << 24);
        cpu::Bus::mmio_write(&view, 0xfee0_0080, &[0x20, 0, 0, 0]);
        assert_eq!(lapic.cr8(), 2);
        lapic.write_msr(MSR_APIC_BASE, lapic.read_msr(MSR_APIC_BASE).unwrap() | 0x400).unwrap();
        cpu::Bus::mmio_read(&view, 0xfee0_0020, &mut data);
        assert_eq!(data, [0xff; 4]);
    }
}

#[test]
fn state() {
    let rig = Rig::x2apic(2);
    let cpu = rig.cpu(0);
    cpu.write_msr(0x832, 0x400ec).unwrap();
    cpu.write_msr(MSR_TSC_DEADLINE, 1_000_000).unwrap();
    cpu.write_msr(0x83f, 0x77).unwrap();
    let saved = rig.lapics.save();
    let other = Rig::new(2);
    other.lapics.restore(&saved).unwrap();
    assert_eq!(other.lapics.save(), saved);
    assert_eq!(other.cpu(0).acknowledge(), Some(0x77));
    advance(&other.queue, 1_000_000);
    assert_eq!(other.cpu(0).acknowledge(), Some(0xec));
    assert!(Rig::new(1).lapics.restore(&saved).is_err());
    let mut bad = saved.clone();
    bad[0].lvt[2] = u32::MAX;
    assert!(other.lapics.restore(&bad).is_err());
    bad = saved;
    bad.swap(0, 1);
    assert!(other.lapics.restore(&bad).is_err());
}

/// A timer that runs out between the last look at it and its saving interrupts in the machine that goes on, once.
#[test]
fn a_timer_that_ran_out_in_the_moment_of_saving() {
    let rig = Rig::x2apic(1);
    let cpu = rig.cpu(0);
    for (msr, value) in [(0x832, 0x40), (0x83e, 0xb), (0x838, 1000)] {
        cpu.write_msr(msr, value).unwrap();
    }
    // Nobody looks: the clock goes on, and no timer is run.
    rig.clock.set(5000);
    let state = cpu.save();
    for (now, other) in [(5000, Rig::x2apic(1)), (1_000_000, Rig::x2apic(1))] {
        let (clock, cpu) = (&other.clock, other.cpu(0));
        clock.set(now);
        cpu.restore(&state).unwrap();
        assert!(pending(&cpu));
        assert_eq!(cpu.acknowledge(), Some(0x40));
        cpu.eoi();
        let state = cpu.save();
        advance(&other.queue, 1_000_000);
        assert!(!pending(&cpu));
        let last = Rig::x2apic(1);
        last.cpu(0).restore(&state).unwrap();
        assert!(!pending(&last.cpu(0)), "not once more");
    }
}

#[test]
fn interrupts_by_hypercall() {
    // In xAPIC mode too, where no MSR could send them.
    let rig = Rig::new(2);
    rig.cpu(1).write_msr(MSR_APIC_BASE, 0xfee0_0c00).unwrap();
    rig.cpu(1).write_msr(0x80f, 0x1ff).unwrap();
    assert!(LocalApic::send_ipi(&*rig.cpu(0), 1, 0x51, false));
    assert_eq!(rig.cpu(1).acknowledge(), Some(0x51));
    assert!(LocalApic::send_ipi(&*rig.cpu(0), 1, 0, true));
    assert!(rig.cpu(1).status().nmi);
    assert!(!LocalApic::send_ipi(&*rig.cpu(0), 2, 0x51, false), "nobody there");
}
