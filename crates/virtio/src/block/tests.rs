use std::io::Write;
use std::os::unix::fs::FileExt;

use memory::GuestRam;
use proptest::prelude::*;

use super::*;
use crate::testing::{Buffer, DriverQueue, Recorder};

const RING: u64 = 0x10000;
const HEADER: u64 = 0x20000;
const STATUS: u64 = 0x21000;
const DATA: u64 = 0x10_0000;
const SECTORS: u64 = 64;

struct Rig {
    ram: GuestRam,
    file: tempfile::NamedTempFile,
    device: Block,
    driver: DriverQueue,
    doorbell: Arc<dyn Doorbell>,
    recorder: Arc<Recorder>,
}

fn pattern(sector: u64) -> u8 {
    sector as u8 + 1
}

fn rig(io: Io, read_only: bool, features: u64) -> Rig {
    let ram = GuestRam::new(32 << 20).unwrap();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[pattern(sector); 512]).unwrap();
    }
    let disk = Disk::open(&DiskConfig { read_only, io, ..DiskConfig::new(file.path()) }).unwrap();
    let mut device = Block::new(disk, "a serial number of more than twenty", 1).unwrap();
    let recorder = Recorder::new();
    device.activate(features, recorder.clone());
    let driver = DriverQueue::new(&ram, RING, 64);
    let doorbell = device.start_queue(driver.device_end(false, recorder.clone()));
    Rig { ram, file, device, driver, doorbell, recorder }
}

fn flushing() -> u64 {
    1 << VIRTIO_BLK_F_FLUSH
}

impl Rig {
    /// Runs one request with `data` between header and status: the status and the number of bytes written.
    fn request(&mut self, kind: u32, sector: u64, data: &[Buffer]) -> (u8, u32) {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        assert!(self.ram.write(HEADER, &header));
        assert!(self.ram.write(STATUS, &[0xee]));
        // The header in two pieces: framing is the driver's choice.
        let mut chain = vec![(HEADER, 5, false), (HEADER + 5, 11, false)];
        chain.extend(data);
        chain.push((STATUS, 1, true));
        let head = self.driver.add(&chain);
        self.doorbell.ring();
        let mut used = None;
        let done = self.recorder.wait(|| {
            used = self.driver.used();
            used.is_some()
        });
        assert!(done, "no answer; broken: {:?}", self.recorder.broken());
        assert_eq!(self.recorder.broken(), Vec::<String>::new());
        let (id, written) = used.unwrap();
        assert_eq!(id, head);
        let mut status = [0];
        assert!(self.ram.read(STATUS, &mut status));
        (status[0], written)
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        assert!(self.ram.read(address, &mut data));
        data
    }
}

/// The tests that hold for whoever serves the queues.
macro_rules! with_both {
    ($($name:ident)*) => {
        mod threads { $(#[test] fn $name() { super::$name(super::Io::Threads); })* }
        mod uring { $(#[test] fn $name() { super::$name(super::Io::Uring); })* }
    };
}

with_both! {
    read_write_flush_identify
    requests_out_of_bounds_fail
    discard_and_zero
    read_only_disks_stay_unchanged
    a_shrunk_file_is_an_io_error
    chains_without_header_or_status
    reads_tell_the_code_tracker
    write_cache_follows_the_driver
    many_at_once
    limits_are_kept
}

fn read_write_flush_identify(io: Io) {
    let mut rig = rig(io, false, flushing());
    let buffers = [(DATA, 700, true), (DATA + 0x2000, 324, true)];
    assert_eq!(rig.request(0, 3, &buffers), (0, 1025));
    assert_eq!(rig.bytes(DATA, 701), [vec![4; 512], vec![5; 188], vec![0]].concat());
    assert_eq!(rig.bytes(DATA + 0x2000, 325), [vec![5; 324], vec![0]].concat());
    assert!(rig.ram.write(DATA, &[0xcc; 1024]));
    assert_eq!(rig.request(1, 62, &[(DATA, 1000, false), (DATA + 1000, 24, false)]), (0, 1));
    assert_eq!(rig.request(4, 0, &[]), (0, 1));
    let mut data = [0; 1536];
    rig.file.as_file().read_exact_at(&mut data, 61 * 512).unwrap();
    assert!(data[..512].iter().all(|b| *b == pattern(61)) && data[512..].iter().all(|b| *b == 0xcc));
    assert_eq!(rig.request(8, 0, &[(DATA, 20, true)]), (0, 21));
    assert_eq!(rig.bytes(DATA, 20), b"a serial number of m");
    assert_eq!(rig.request(8, 0, &[(DATA, 4, true)]), (0, 5));
}

fn requests_out_of_bounds_fail(io: Io) {
    let mut rig = rig(io, false, flushing());
    for (kind, write) in [(0, true), (1, false)] {
        for (sector, len) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511), (0, 1)]
        {
            let (status, written) = rig.request(kind, sector, &[(DATA, len, write)]);
            assert_eq!((status, written), (1, 1), "{kind} {sector} {len}");
        }
    }
    assert_eq!(rig.request(99, 0, &[]), (2, 1));
    assert_eq!(rig.request(2, 0, &[]), (2, 1), "SCSI commands are not supported");
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), SECTORS * 512);
}

fn discard_and_zero(io: Io) {
    let mut rig = rig(io, false, flushing());
    let segment = |sector: u64, count: u32, flags: u32| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    let run = |rig: &mut Rig, kind, bytes: &[u8]| {
        assert!(rig.ram.write(DATA, bytes));
        rig.request(kind, 0, &[(DATA, bytes.len() as u32, false)]).0
    };
    let two = [segment(8, 8, 0), segment(24, 1, 1)].concat();
    assert_eq!(run(&mut rig, 13, &two), 0);
    assert_eq!(run(&mut rig, 11, &segment(40, 8, 0)), 0);
    assert_eq!(run(&mut rig, 11, &segment(40, 8, 1)), 2, "unmap is no flag of discard");
    assert_eq!(run(&mut rig, 13, &segment(40, 8, 2)), 2);
    assert_eq!(run(&mut rig, 13, &segment(SECTORS - 1, 2, 0)), 1);
    assert_eq!(run(&mut rig, 13, &segment(u64::MAX, 2, 0)), 1);
    assert_eq!(run(&mut rig, 13, &segment(0, u32::MAX, 0)), 1);
    assert_eq!(run(&mut rig, 13, &segment(0, 1, 0)[..15]), 1);
    assert_eq!(run(&mut rig, 13, &[]), 1);
    assert_eq!(run(&mut rig, 13, &segment(0, 0, 0).repeat(33)), 1, "too many segments");
    let data = std::fs::read(rig.file.path()).unwrap();
    for sector in 0..SECTORS {
        let zero = (8..16).contains(&sector) || sector == 24;
        if !(40..48).contains(&sector) {
            let want = if zero { 0 } else { pattern(sector) };
            assert!(data[sector as usize * 512..][..512].iter().all(|b| *b == want), "sector {sector}");
        }
    }
}

fn read_only_disks_stay_unchanged(io: Io) {
    let mut rig = rig(io, true, flushing());
    assert_ne!(rig.device.features() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(rig.request(1, 0, &[(DATA, 512, false)]), (1, 1));
    assert_eq!(rig.request(13, 0, &[(DATA, 16, false)]), (1, 1));
    assert_eq!(rig.request(11, 0, &[(DATA, 16, false)]), (1, 1));
    assert_eq!(rig.request(4, 0, &[]), (0, 1));
    assert_eq!(rig.request(0, 0, &[(DATA, 512, true)]), (0, 513));
    assert_eq!(rig.bytes(DATA, 512), [1; 512]);
}

fn a_shrunk_file_is_an_io_error(io: Io) {
    let mut rig = rig(io, false, flushing());
    rig.file.as_file().set_len(512).unwrap();
    assert_eq!(rig.request(0, 0, &[(DATA, 1024, true)]), (1, 513), "what was read counts as written");
    assert_eq!(rig.request(0, 1, &[(DATA, 512, true)]), (1, 1));
}

fn chains_without_header_or_status(io: Io) {
    let mut rig = rig(io, false, flushing());
    assert!(rig.ram.write(STATUS, &[0xee; 2]));
    for chain in [vec![(HEADER, 15, false), (STATUS, 1, true)], vec![(STATUS, 1, true)], vec![(HEADER, 16, false)]] {
        rig.driver.add(&chain);
        rig.doorbell.ring();
        let recorder = rig.recorder.clone();
        let mut used = None;
        assert!(recorder.wait(|| {
            used = rig.driver.used();
            used.is_some()
        }));
        let has_status = chain.last().unwrap().2;
        assert_eq!(used.unwrap().1, u32::from(has_status));
        if has_status {
            assert_eq!(rig.bytes(STATUS, 2), [1, 0xee]);
        }
    }
}

/// The code tracker hears of data that the kernel copied, before the request is in the used ring.
fn reads_tell_the_code_tracker(io: Io) {
    struct Order(GuestRam, std::sync::Mutex<Vec<(u64, u16)>>);
    impl memory::CodeWriteListener for Order {
        fn code_written(&self, gpa: u64, _len: u64) {
            // The used index of the ring at RING with 64 descriptors.
            let mut idx = [0; 2];
            assert!(self.0.read(RING + 64 * 16 + 6 + 128 + 2 + 2, &mut idx));
            self.1.lock().unwrap().push((gpa, u16::from_le_bytes(idx)));
        }
    }
    let mut rig = rig(io, false, flushing());
    let order = Arc::new(Order(rig.ram.clone(), std::sync::Mutex::default()));
    rig.ram.code_pages().set_listener(order.clone());
    rig.ram.code_pages().set((DATA + 0x1000) >> 12);
    assert_eq!(rig.request(0, 0, &[(DATA, 512, true), (DATA + 0x1e00, 512, true)]), (0, 1025));
    assert_eq!(rig.driver.used_idx(), 1);
    assert_eq!(*order.1.lock().unwrap(), [(DATA + 0x1e00, 0)]);
}

fn write_cache_follows_the_driver(io: Io) {
    // Write-through is observed through a disk whose flushes fail: a write that is made durable at once fails, a cached one does not.
    for (features, write_back, status) in
        [(flushing(), None, 0), (0, None, 1), (flushing(), Some(0), 1), (flushing(), Some(1), 0)]
    {
        let mut rig = rig(io, false, features);
        if let Some(value) = write_back {
            rig.device.write_config(WRITEBACK, &[value]);
        }
        rig.device.shared.disk.fail_flushes();
        assert_eq!(rig.request(1, 0, &[(DATA, 512, false)]).0, status, "{features} {write_back:?}");
        assert_eq!(rig.request(4, 0, &[]).0, 1, "a flush that failed goes on failing");
        assert_eq!(rig.request(4, 0, &[]).0, 1);
    }
}

#[test]
fn configuration_space() {
    let mut rig = rig(Io::Threads, false, flushing());
    let field = |rig: &Rig, offset: u64, len: usize| {
        let mut data = [0; 8];
        rig.device.read_config(offset, &mut data[..len]);
        u64::from_le_bytes(data)
    };
    assert_eq!(field(&rig, 0, 8), SECTORS);
    assert_eq!((field(&rig, 8, 4), field(&rig, 12, 4), field(&rig, 20, 4)), (4 << 20, 254, 512));
    assert_eq!((field(&rig, 24, 1), field(&rig, 26, 2), field(&rig, 32, 1), field(&rig, 34, 2)), (3, 8, 1, 1));
    assert_eq!((field(&rig, 36, 4), field(&rig, 40, 4), field(&rig, 44, 4)), (1 << 21, 32, 8));
    assert_eq!((field(&rig, 48, 4), field(&rig, 52, 4), field(&rig, 56, 1)), (1 << 21, 32, 1));
    assert_eq!((field(&rig, 60, 8), field(&rig, u64::MAX, 8)), (0, 0));
    rig.device.write_config(0, &[9; 8]);
    rig.device.write_config(u64::MAX, &[9; 8]);
    rig.device.write_config(32, &[0]);
    assert_eq!((field(&rig, 0, 8), field(&rig, 32, 1)), (SECTORS, 0));
    rig.device.stop_queue(0).unwrap();
    rig.device.reset();
    assert_eq!(field(&rig, 32, 1), 1);
}

#[test]
fn state() {
    let mut rig = rig(Io::Threads, false, flushing());
    rig.device.write_config(32, &[0]);
    let state = rig.device.save();
    let DeviceState::Block(block) = &state else { panic!() };
    assert_eq!(*block, BlockState { sectors: SECTORS, read_only: false, write_back: false });
    assert!(rig.device.restore(&state).is_ok());
    let bigger = DeviceState::Block(BlockState { sectors: SECTORS + 1, ..block.clone() });
    assert!(rig.device.restore(&bigger).unwrap_err().contains("65 sectors"));
    let read_only = DeviceState::Block(BlockState { read_only: true, ..block.clone() });
    assert!(rig.device.restore(&read_only).is_err());
    assert!(rig.device.restore(&DeviceState::Entropy(crate::entropy::EntropyState {})).is_err());
}

/// Many requests at once, of any kind, on two queues; each is answered once and by the disk as it should be.
fn many_at_once(io: Io) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; 1 << 20]).unwrap();
    let ram = GuestRam::new(32 << 20).unwrap();
    let disk = Disk::open(&DiskConfig { io, ..DiskConfig::new(file.path()) }).unwrap();
    let mut device = Block::new(disk, "x", 2).unwrap();
    assert_eq!(device.uses_uring(), io == Io::Uring);
    let recorder = Recorder::new();
    device.activate(flushing(), recorder.clone());
    let mut drivers: Vec<_> = (0..2).map(|n| DriverQueue::new(&ram, RING + n * 0x4000, 256)).collect();
    let mut doorbells = Vec::new();
    for (number, driver) in drivers.iter().enumerate() {
        doorbells.push(device.start_queue(driver.device_end_of(number as u16, true, recorder.clone())));
    }
    // Each request has a page of its own: header, status, data of 512 bytes.
    let page = |queue: u64, number: u64| DATA + (queue << 20) + number * 4096;
    for round in 0..20_u64 {
        for (queue, driver) in drivers.iter_mut().enumerate() {
            for number in 0..64_u64 {
                let at = page(queue as u64, number);
                let sector = queue as u64 * 64 + number;
                let kind: u32 = if number % 9 == 8 {
                    4
                } else if round % 2 == 0 {
                    1
                } else {
                    0
                };
                let mut header = [kind.to_le_bytes(), [0; 4]].concat();
                header.extend(sector.to_le_bytes());
                assert!(ram.write(at, &header) && ram.write(at + 16, &[0xee]));
                if kind == 1 {
                    assert!(ram.write(at + 512, &[(round + sector) as u8; 512]));
                }
                let mut chain = vec![(at, 16, false)];
                match kind {
                    0 => chain.push((at + 512, 512, true)),
                    1 => chain.push((at + 512, 512, false)),
                    _ => {}
                }
                chain.push((at + 16, 1, true));
                driver.add(&chain);
                doorbells[queue].ring();
            }
        }
        for (queue, driver) in drivers.iter_mut().enumerate() {
            let mut seen = 0;
            assert!(recorder.wait(|| {
                while driver.used().is_some() {
                    seen += 1;
                }
                seen == 64
            }));
            for number in 0..64_u64 {
                let (mut status, mut data) = ([0xee], [0; 512]);
                let at = page(queue as u64, number);
                assert!(ram.read(at + 16, &mut status) && ram.read(at + 512, &mut data));
                assert_eq!(status, [0], "round {round} queue {queue} number {number}");
                if number % 9 != 8 && round % 2 == 1 {
                    let sector = queue as u64 * 64 + number;
                    assert_eq!(data, [(round - 1 + sector) as u8; 512]);
                }
            }
        }
        if round == 10 {
            // Queues are taken away and go on where they were.
            for (number, doorbell) in doorbells.iter_mut().enumerate() {
                let queue = device.stop_queue(number as u16).unwrap();
                *doorbell = device.start_queue(queue);
            }
        }
    }
    for number in 0..2 {
        assert!(device.stop_queue(number).is_some() && device.stop_queue(number).is_none());
    }
}

/// A disk that is limited answers all, but not at once.
fn limits_are_kept(io: Io) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0; 1 << 20]).unwrap();
    let limits = disk::Limits { bytes: None, operations: Some(100) };
    let config = DiskConfig { io, limits, ..DiskConfig::new(file.path()) };
    let ram = GuestRam::new(32 << 20).unwrap();
    let mut device = Block::new(Disk::open(&config).unwrap(), "x", 1).unwrap();
    let recorder = Recorder::new();
    device.activate(flushing(), recorder.clone());
    let driver = DriverQueue::new(&ram, RING, 64);
    let doorbell = device.start_queue(driver.device_end(false, recorder.clone()));
    let mut rig = Rig { ram, file, device, driver, doorbell, recorder };
    let start = std::time::Instant::now();
    for _ in 0..40 {
        assert_eq!(rig.request(0, 0, &[(DATA, 512, true)]).0, 0);
    }
    // Ten pass at once.
    let passed = start.elapsed().as_millis();
    assert!((280..30_000).contains(&passed), "{passed} ms");
    // Even while it waits, the queue is given back at once.
    rig.device.stop_queue(0).unwrap();
}

#[test]
fn a_disk_that_grows() {
    let mut rig = rig(Io::Threads, false, flushing());
    let watch = rig.device.size_watch();
    assert_eq!(watch.look(), None);
    assert_eq!(rig.request(0, SECTORS, &[(DATA, 512, true)]).0, 1);
    let generation = rig.device.config_generation();
    rig.file.as_file().set_len((SECTORS + 8) * 512 + 100).unwrap();
    assert_eq!(watch.look(), Some(SECTORS + 8));
    assert_eq!(rig.recorder.configs(), 1);
    assert_ne!(rig.device.config_generation(), generation);
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), SECTORS + 8);
    assert_eq!(rig.request(0, SECTORS + 7, &[(DATA, 512, true)]).0, 0);
    // It does not shrink under the guest.
    rig.file.as_file().set_len(512).unwrap();
    assert_eq!(watch.look(), None);
}

#[test]
fn options_of_the_disk() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0; 4096]).unwrap();
    let device = |text: &str| {
        let config: DiskConfig = format!("{},{text}", file.path().display()).parse().unwrap();
        Block::new(Disk::open(&config).unwrap(), "other", 1).unwrap()
    };
    let bit = |device: &Block, bit: u32| device.features() & 1 << bit != 0;
    let through = device("cache=writethrough,discard=off,serial=mine");
    assert!(!bit(&through, VIRTIO_BLK_F_FLUSH) && !bit(&through, VIRTIO_BLK_F_CONFIG_WCE));
    assert!(!bit(&through, VIRTIO_BLK_F_DISCARD) && bit(&through, VIRTIO_BLK_F_WRITE_ZEROES));
    assert_eq!(through.shared.serial, b"mine");
    drop(through);
    let careless = device("cache=unsafe,io=threads");
    assert!(bit(&careless, VIRTIO_BLK_F_FLUSH) && !careless.uses_uring());
    assert!(matches!(careless.shared.disk.flush_unneeded(), Some(Ok(()))));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Any request: no panic, nothing written in guest memory but the writable buffers, the file keeps its size and, for what is
    /// no write, its contents.
    #[test]
    fn any_request(
        kind in prop_oneof![0..16u32, any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        buffers in prop::collection::vec((0..64u64, prop_oneof![Just(512u32), 0..2048u32], any::<bool>()), 0..10),
        bytes in prop::collection::vec(any::<u8>(), 64),
    ) {
        let mut rig = rig(if kind % 2 == 0 { Io::Threads } else { Io::Uring }, false, flushing());
        let canary: Vec<u8> = bytes.iter().copied().cycle().take(0x10000).collect();
        prop_assert!(rig.ram.write(DATA, &canary));
        let mut buffers: Vec<Buffer> = buffers.iter().map(|(at, len, write)| (DATA + at * 0x300, *len, *write)).collect();
        buffers.sort_by_key(|buffer| buffer.2);
        let (status, written) = rig.request(kind, sector, &buffers);
        prop_assert!(status <= 2);
        let writable: u32 = buffers.iter().filter(|b| b.2).map(|b| b.1).sum();
        prop_assert!(written >= 1 && written <= writable + 1);
        for (at, (now, before)) in rig.bytes(DATA, canary.len()).iter().zip(&canary).enumerate() {
            let address = DATA + at as u64;
            let inside = |b: &Buffer| b.2 && address >= b.0 && address - b.0 < u64::from(b.1);
            prop_assert!(now == before || buffers.iter().any(inside));
        }
        let data = std::fs::read(rig.file.path()).unwrap();
        prop_assert_eq!(data.len() as u64, SECTORS * 512);
        if !matches!(kind, 1 | 11 | 13) {
            prop_assert!(data.chunks(512).enumerate().all(|(n, s)| s.iter().all(|b| *b == pattern(n as u64))));
        }
    }
}
