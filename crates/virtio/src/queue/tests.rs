use std::sync::Mutex;

use memory::{CodeWriteListener, GuestRam};
use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::mock::MockSplitQueue;

use super::*;
use crate::testing::{DriverQueue, INDIRECT, NEXT, Recorder, WRITE};

const RING: u64 = 0x10000;
const DATA: u64 = 0x10_0000;
const RAM: u64 = 32 << 20;

fn ram() -> GuestRam {
    GuestRam::new(RAM).unwrap()
}

/// Serves everything with `handle`; returns why the queue broke, if it did.
fn serve(driver: &DriverQueue, mut handle: impl FnMut(&mut Chain<'_>) -> u32) -> Option<String> {
    let recorder = Recorder::new();
    let mut queue = driver.device_end(true, recorder.clone());
    queue.serve(&StopFlag::default(), &mut handle);
    assert_eq!(queue.is_broken(), !recorder.broken().is_empty());
    recorder.broken().pop()
}

#[test]
fn chains_in_order_direct_and_indirect() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, RING, 8);
    assert!(ram.write(DATA, b"hello world"));
    let first = driver.add(&[(DATA, 5, false), (DATA + 5, 6, false), (DATA + 0x1000, 16, true)]);
    let second = driver.add_indirect(DATA + 0x8001, &[(DATA, 1, false), (DATA + 0x2000, 8, true)]);
    let mut seen = Vec::new();
    let broken = serve(&driver, |chain| {
        let mut text = [0; 32];
        let n = chain.readable.read(&mut text);
        seen.push(String::from_utf8_lossy(&text[..n]).into_owned());
        let mut back = chain.writable.take_back(1).unwrap();
        assert_eq!(back.write(b"!?"), 1);
        chain.writable.write(b"answer") as u32
    });
    assert_eq!(broken, None);
    assert_eq!(seen, ["hello world", "h"]);
    assert_eq!((driver.used(), driver.used(), driver.used()), (Some((first, 6)), Some((second, 6)), None));
    let mut data = [0; 16];
    assert!(ram.read(DATA + 0x1000, &mut data));
    assert_eq!(&data, b"answer\0\0\0\0\0\0\0\0\0!");
}

#[test]
fn mock_driver_of_the_queue_crate() {
    let ram = ram();
    let mock = MockSplitQueue::create(ram.memory(), GuestAddress(RING), 16);
    let descriptor = |address, len, flags, next| RawDescriptor::from(Descriptor::new(address, len, flags, next));
    mock.add_desc_chains(
        &[descriptor(DATA, 16, NEXT, 1), descriptor(DATA + 64, 32, WRITE, 0), descriptor(DATA, 8, 0, 0)],
        0,
    )
    .unwrap();
    let state = QueueState {
        size: 16,
        descriptors: mock.desc_table_addr().0,
        driver: mock.avail_addr().0,
        device: mock.used_addr().0,
        ..QueueState::default()
    };
    let mut queue = Virtqueue::new(0, &state, 16, false, ram.shared(), Recorder::new()).unwrap();
    let mut shapes = Vec::new();
    queue.serve(&StopFlag::default(), |chain| {
        shapes.push((chain.head, chain.readable.len(), chain.writable.len()));
        chain.writable.len()
    });
    assert_eq!(shapes, [(0, 16, 32), (2, 8, 0)]);
    assert_eq!(mock.used().idx().load(), 2);
    let state = queue.state();
    assert_eq!((state.next_avail, state.next_used), (2, 2));
    // The saved position goes on where it was.
    let mut again = Virtqueue::new(0, &state, 16, false, ram.shared(), Recorder::new()).unwrap();
    assert!(again.is_empty());
    assert!(again.pop(ram.memory()).unwrap().is_none());
}

#[test]
fn broken_chains_break_the_queue() {
    type Setup = fn(&mut DriverQueue);
    let cases: [(&str, Setup); 13] = [
        ("descriptor 8 does not exist", |d| d.offer(8)),
        ("descriptor 9 does not exist", |d| {
            d.descriptor(RING, 0, DATA, 8, NEXT, 9);
            d.offer(0);
        }),
        ("too long or a loop", |d| {
            d.descriptor(RING, 0, DATA, 0, NEXT, 1);
            d.descriptor(RING, 1, DATA, 0, NEXT, 0);
            d.offer(0);
        }),
        ("malformed indirect", |d| {
            d.descriptor(RING, 0, DATA, 16, INDIRECT, 0);
            d.descriptor(DATA, 0, DATA + 64, 16, INDIRECT, 0);
            d.offer(0);
        }),
        ("malformed indirect", |d| {
            d.descriptor(RING, 0, DATA, 17, INDIRECT, 0);
            d.offer(0);
        }),
        ("malformed indirect", |d| {
            d.descriptor(RING, 0, DATA, 0, INDIRECT, 0);
            d.offer(0);
        }),
        ("malformed indirect", |d| {
            d.descriptor(RING, 0, DATA, 16, INDIRECT | NEXT, 1);
            d.offer(0);
        }),
        ("are not in RAM", |d| {
            d.descriptor(RING, 0, u64::MAX - 15, 32, INDIRECT, 0);
            d.offer(0);
        }),
        ("are not in RAM", |d| {
            d.add(&[(RAM - 8, 9, true)]);
        }),
        ("are not in RAM", |d| {
            d.add(&[(u64::MAX, 2, false)]);
        }),
        ("a readable buffer follows", |d| {
            d.add(&[(DATA, 1, true), (DATA, 1, false)]);
        }),
        ("more than 4 GiB", |d| {
            // 24 MiB each: within RAM one by one.
            let table: Vec<_> = (0..200).map(|_| (0, 24 << 20, true)).collect();
            d.add_indirect(DATA, &table);
        }),
        ("available ring index", |d| d.set_avail_idx(9)),
    ];
    for (why, setup) in cases {
        let ram = ram();
        let mut driver = DriverQueue::new(&ram, RING, 8);
        setup(&mut driver);
        let broken = serve(&driver, |_| panic!("{why}: served")).unwrap_or_default();
        assert!(broken.contains(why), "{broken:?} is not {why:?}");
        assert_eq!(driver.used_idx(), 0, "{why}");
    }
}

#[test]
fn a_long_indirect_chain_is_bounded() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, RING, 8);
    let buffers = |count: usize| vec![(DATA, 1, false); count];
    driver.add_indirect(DATA + 0x1000, &buffers(usize::from(MAX_CHAIN) - 1));
    assert_eq!(serve(&driver, |chain| chain.readable.len() - 1023), None);
    assert_eq!(driver.used(), Some((0, 0)));
    let mut driver = DriverQueue::new(&ram, RING, 8);
    driver.add_indirect(DATA + 0x1000, &buffers(usize::from(MAX_CHAIN) + 1));
    assert!(serve(&driver, |_| 0).unwrap().contains("too long"));
}

#[test]
fn misplaced_rings_are_refused() {
    let ram = ram();
    let good = DriverQueue::new(&ram, RING, 8).state();
    let take = |state: QueueState| Virtqueue::new(0, &state, 8, false, ram.shared(), Recorder::new());
    assert!(take(good).is_ok());
    for bad in [
        QueueState { size: 0, ..good },
        QueueState { size: 3, ..good },
        QueueState { size: 16, ..good },
        QueueState { descriptors: good.descriptors + 8, ..good },
        QueueState { driver: good.driver + 1, ..good },
        QueueState { device: good.device + 2, ..good },
        QueueState { descriptors: 0, ..good },
        QueueState { descriptors: RAM - 16, ..good },
        QueueState { driver: u64::MAX - 1, ..good },
        QueueState { device: RAM - 64, ..good },
        QueueState { device: 0xffff_ffff_ffff_fffc, ..good },
    ] {
        assert!(take(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn interrupts_as_the_driver_wants_them() {
    let ram = ram();
    let recorder = Recorder::new();
    let mut driver = DriverQueue::new(&ram, RING, 8);
    let mut queue = driver.device_end(true, recorder.clone());
    let stop = StopFlag::default();
    driver.set_used_event(1);
    driver.add(&[(DATA, 1, true)]);
    queue.serve(&stop, |_| 1);
    assert_eq!(recorder.interrupts(), 0, "not before the second");
    driver.add(&[(DATA, 1, true)]);
    driver.add(&[(DATA, 1, true)]);
    queue.serve(&stop, |_| 1);
    assert_eq!(recorder.interrupts(), 1, "at the second, not at the third");
    assert_eq!(driver.avail_event(), 3, "notify at the fourth");

    let recorder = Recorder::new();
    let mut driver = DriverQueue::new(&ram, RING, 8);
    let mut queue = driver.device_end(false, recorder.clone());
    driver.set_avail_flags(1);
    driver.add(&[(DATA, 1, true)]);
    let flags = std::cell::Cell::new(0);
    queue.serve(&stop, |_| {
        flags.set(driver.used_flags());
        1
    });
    assert_eq!((flags.get(), driver.used_flags()), (1, 0), "no notifications while serving");
    assert_eq!(recorder.interrupts(), 0);
    driver.set_avail_flags(0);
    driver.add(&[(DATA, 1, true)]);
    queue.serve(&stop, |_| 1);
    assert_eq!(recorder.interrupts(), 1);
}

#[test]
fn indices_wrap() {
    let ram = ram();
    let mut driver = DriverQueue::new(&ram, RING, 8);
    let mut queue = driver.device_end(true, Recorder::new());
    for round in 0..70_000u32 {
        let head = driver.add(&[(DATA, 4, true)]);
        queue.serve(&StopFlag::default(), |_| round % 5);
        assert_eq!(driver.used(), Some((head, round % 5)));
    }
}

/// Remembers which pages were written, in order.
struct Pages(Mutex<Vec<u64>>);

impl CodeWriteListener for Pages {
    fn code_written(&self, gpa: u64, _len: u64) {
        self.0.lock().unwrap().push(gpa / memory::PAGE_SIZE);
    }
}

#[test]
fn code_pages_hear_of_data_before_the_used_ring() {
    let ram = ram();
    let pages = Arc::new(Pages(Mutex::default()));
    ram.code_pages().set_listener(pages.clone());
    let mut driver = DriverQueue::new(&ram, RING, 8);
    driver.add(&[(DATA, 4, true), (DATA + 0x5000, 0x1000, true)]);
    for page in [DATA >> 12, (DATA + 0x5000) >> 12, RING >> 12] {
        ram.code_pages().set(page);
    }
    assert_eq!(
        serve(&driver, |chain| {
            chain.writable.written(6);
            6
        }),
        None
    );
    let written = pages.0.lock().unwrap().clone();
    assert_eq!(written[..2], [DATA >> 12, (DATA + 0x5000) >> 12], "{written:x?}");
    assert!(written[2..].contains(&(RING >> 12)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever is in the tables: it ends, does not panic, and only offered buffers and the used ring are written.
    #[test]
    fn any_tables(
        table in prop::collection::vec((0..6u64, 0..5u64, any::<u32>(), 0..8u16, 0..9u16), 8),
        indirect in prop::collection::vec((0..6u64, 0..5u64, any::<u32>(), 0..8u16, 0..40u16), 32),
        avail in prop::collection::vec(0..9u16, 0..8),
        idx in prop::option::weighted(0.1, any::<u16>()),
        event_idx in any::<bool>(),
    ) {
        let ram = ram();
        let mut driver = DriverQueue::new(&ram, RING, 8);
        let canary = vec![0x5a; 0x40000];
        prop_assert!(ram.write(DATA, &canary));
        let mut offered = Vec::new();
        let place = |(base, offset, len, flags, next): (u64, u64, u32, u16, u16)| {
            // Mostly in the canary's area, sometimes nowhere.
            let address = match base {
                0 => RAM - 1 - offset,
                1 => u64::MAX - offset,
                _ => DATA + base * 0x8000 + offset * 0x100,
            };
            (address, if len % 5 == 0 { len } else { len % 0x200 }, flags, next)
        };
        for (index, raw) in table.iter().enumerate() {
            let (mut address, mut len, flags, next) = place(*raw);
            if flags & INDIRECT != 0 {
                (address, len) = (0x20_0000, 16 * 32);
            } else {
                offered.push((address, len));
            }
            driver.descriptor(RING, index as u16, address, len, flags, next);
        }
        for (index, raw) in indirect.iter().enumerate() {
            let (address, len, flags, next) = place(*raw);
            offered.push((address, len));
            driver.descriptor(0x20_0000, index as u16, address, len, flags, next);
        }
        for head in &avail {
            driver.offer(*head);
        }
        if let Some(idx) = idx {
            driver.set_avail_idx(idx);
        }
        let mut queue = driver.device_end(event_idx, Recorder::new());
        let mut served = 0;
        queue.serve(&StopFlag::default(), |chain| {
            served += 1;
            assert!(served <= 8);
            let len = chain.writable.len();
            let data = vec![0xa5; len as usize];
            assert_eq!(chain.writable.write(&data), data.len());
            len
        });
        let mut after = vec![0; canary.len()];
        prop_assert!(ram.read(DATA, &mut after));
        for (at, byte) in after.iter().enumerate() {
            let address = DATA + at as u64;
            let inside = |(start, len): &(u64, u32)| address >= *start && address - start < u64::from(*len);
            prop_assert!(*byte == 0x5a || offered.iter().any(inside), "wrote at {address:#x}");
        }
    }
}
