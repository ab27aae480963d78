use std::sync::Arc;

use super::*;
use crate::testing::{DriverQueue, Recorder};

const DATA: u64 = 0x20_0000;

struct Rig {
    ram: GuestRam,
    balloon: Balloon,
    handle: BalloonHandle,
    recorder: Arc<Recorder>,
}

impl Rig {
    fn new(features: u64) -> Self {
        let ram = GuestRam::new(32 << 20).unwrap();
        let (mut balloon, handle) = Balloon::new(ram.clone()).unwrap();
        let recorder = Recorder::new();
        balloon.activate(features, recorder.clone());
        Self { ram, balloon, handle, recorder }
    }

    fn queue(&mut self, index: u16) -> (DriverQueue, Arc<dyn Doorbell>) {
        let driver = DriverQueue::new(&self.ram, 0x10000 + 0x4000 * u64::from(index), 16);
        let live = driver.device_end_of(index, true, self.recorder.clone());
        (driver, self.balloon.start_queue(live))
    }

    /// Whether the page at `gpa` is all zero, and it is filled with ones again.
    fn zero(&self, gpa: u64) -> bool {
        let mut page = [0; 4096];
        assert!(self.ram.read(gpa, &mut page));
        assert!(self.ram.write(gpa, &[1; 4096]));
        page == [0; 4096]
    }
}

#[test]
fn the_guest_follows_the_target() {
    let mut rig = Rig::new(rig_features());
    let (mut inflate, bell) = rig.queue(INFLATE);
    rig.handle.set_target((8 << 20) + 5);
    rig.handle.set_target(8 << 20);
    assert_eq!(rig.recorder.configs(), 1);
    let mut config = [0; 8];
    rig.balloon.read_config(0, &mut config);
    assert_eq!(config, [0, 8, 0, 0, 0, 0, 0, 0]);

    // Pages 0x300 to 0x302 in any order, one twice, and numbers that are not RAM's.
    assert!(rig.ram.write(0x30_0000, &[1; 0x4000]));
    let pages = [0x302_u32, 0x300, 0x301, 0x300, u32::MAX, 0x2000, 0xc_0000];
    assert!(rig.ram.write(DATA, &pages.iter().flat_map(|page| page.to_le_bytes()).collect::<Vec<_>>()));
    inflate.add(&[(DATA, 10, false), (DATA + 10, 4 * pages.len() as u32 - 10, false)]);
    bell.ring();
    assert!(rig.recorder.wait(|| inflate.used() == Some((0, 0))));
    assert_eq!([0x300, 0x301, 0x302, 0x303].map(|page| rig.zero(page << 12)), [true, true, true, false]);
    rig.balloon.write_config(4, &3_u32.to_le_bytes());
    // Neither what the host wants nor what is beyond the end can be written.
    rig.balloon.write_config(0, &[9; 4]);
    rig.balloon.write_config(u64::MAX, &[9; 4]);
    rig.balloon.write_config(14, &[9; 8]);
    let status = rig.handle.status();
    assert_eq!((status.driver, status.target, status.actual, status.inflated), (true, 8 << 20, 0x3000, 0x3000));

    let (mut deflate, bell) = rig.queue(DEFLATE);
    deflate.add(&[(DATA, 4, false)]);
    bell.ring();
    assert_eq!(deflate.used(), Some((0, 0)));
    assert!(rig.recorder.broken().is_empty());
}

fn rig_features() -> u64 {
    F_STATS_VQ | F_DEFLATE_ON_OOM | F_REPORTING
}

#[test]
fn free_pages_go_back_to_the_host() {
    // By both numbers that drivers give the queue.
    for index in REPORTING {
        let mut rig = Rig::new(rig_features());
        let (mut report, bell) = rig.queue(index);
        assert!(rig.ram.write(0x40_0000, &vec![1; 0x20_0000]));
        report.add(&[(0x40_0000, 0x10_0000, true), (0x50_0800, 0x1800, true), (0x5f_f000, 0x800, true)]);
        bell.ring();
        assert!(rig.recorder.wait(|| report.used() == Some((0, 0))));
        assert!(rig.zero(0x40_0000) && rig.zero(0x4f_f000) && rig.zero(0x50_1000));
        assert!(!rig.zero(0x50_0000) && !rig.zero(0x50_2000) && !rig.zero(0x5f_f000), "whole pages only");
        assert_eq!(rig.handle.status().reported, 0x10_1000);
        assert!(rig.balloon.stop_queue(7 - index).is_none());
        assert_eq!(rig.balloon.stop_queue(index).map(|queue| queue.index()), Some(index));
    }
}

#[test]
fn pages_that_must_keep_their_filling_are_kept() {
    let mut rig = Rig::new(rig_features() | F_PAGE_POISON);
    let (mut report, bell) = rig.queue(4);
    rig.balloon.write_config(12, &[0xaa; 4]);
    assert!(rig.ram.write(0x40_0000, &[1; 0x1000]));
    report.add(&[(0x40_0000, 0x1000, true)]);
    bell.ring();
    assert!(rig.recorder.wait(|| report.used() == Some((0, 0))));
    assert!(!rig.zero(0x40_0000));
    // Zeros are what given back memory reads as.
    rig.balloon.write_config(12, &[0; 4]);
    report.add(&[(0x40_0000, 0x1000, true)]);
    bell.ring();
    assert!(rig.recorder.wait(|| report.used() == Some((1, 0))));
    assert!(rig.zero(0x40_0000));
}

#[test]
fn statistics_are_given_when_asked() {
    let mut rig = Rig::new(rig_features());
    let (mut queue, bell) = rig.queue(STATISTICS);
    let write = |values: &[(u16, u64)]| {
        let bytes = values.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat());
        let mut bytes: Vec<u8> = bytes.collect();
        bytes.push(4); // a tag that is cut off
        assert!(rig.ram.write(DATA, &bytes));
        bytes.len() as u32
    };
    let len = write(&[(4, 100), (0xffff, 1), (5, 200), (4, 101)]);
    queue.add(&[(DATA, len, false)]);
    bell.ring();
    let status = rig.handle.status();
    assert_eq!(
        (status.heard, status.stats.unwrap().named().collect::<Vec<_>>()),
        (1, vec![("free", 101), ("total", 200)])
    );
    assert_eq!(queue.used(), None, "the buffer is held");
    rig.handle.ask();
    assert_eq!(queue.used(), Some((0, 0)));
    assert_eq!(rig.recorder.interrupts(), 1);
    let len = write(&[(6, 7)]);
    queue.add(&[(DATA, len, false)]);
    bell.ring();
    assert_eq!(rig.handle.status().stats.unwrap().get("available"), Some(7));
    // Held when the VM is saved, it is taken again afterwards.
    let live = rig.balloon.stop_queue(STATISTICS).unwrap();
    assert_eq!(live.state().next_avail, 1);
    rig.balloon.start_queue(live);
    assert_eq!(rig.handle.status().heard, 3);
    // A driver that gives two gets the first back.
    queue.add(&[(DATA, len, false)]);
    bell.ring();
    assert_eq!(queue.used(), Some((1, 0)));
    assert!(rig.recorder.broken().is_empty());
}

#[test]
fn saved_and_restored() {
    let mut rig = Rig::new(rig_features());
    rig.handle.set_target(4 << 20);
    rig.balloon.write_config(4, &77_u32.to_le_bytes());
    let state = rig.balloon.save();
    let mut other = Rig::new(rig_features());
    other.balloon.restore(&state).unwrap();
    assert_eq!(other.balloon.save(), state);
    assert_ne!(other.balloon.config_generation(), 0);
    assert!(rig.balloon.restore(&DeviceState::Entropy(crate::entropy::EntropyState {})).is_err());
    // The guest starts again: it has all its memory, and what is wanted of it is still wanted.
    rig.balloon.reset();
    let status = rig.handle.status();
    assert_eq!((status.driver, status.target, status.actual), (false, 4 << 20, 0));
}

#[test]
fn a_balloon_ends_with_requests_under_way() {
    let mut rig = Rig::new(rig_features());
    let (mut inflate, bell) = rig.queue(INFLATE);
    let all: Vec<u8> = (0..0x2000_u32).rev().filter(|page| page % 2 == 0).flat_map(u32::to_le_bytes).collect();
    assert!(rig.ram.write(DATA, &all));
    // The list itself is among the pages.
    inflate.add(&[(DATA, all.len() as u32, false)]);
    bell.ring();
    assert!(rig.balloon.stop_queue(INFLATE).is_some());
    drop(rig.balloon);
}
