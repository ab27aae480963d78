//! Any block requests over any descriptor chains: no panic, guest memory outside the offered buffers untouched, the image keeps its size.

#![no_main]

use std::cell::RefCell;
use std::io::Write;
use std::sync::atomic::AtomicBool;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memory::GuestRam;
use virtio::Disk;
use virtio::block::request::{Policy, serve};
use virtio::runner::StopFlag;
use virtio::testing::{DriverQueue, Recorder};

const RING: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const DATA: u64 = 0x10000;
const DATA_LEN: usize = 0x10000;
const IMAGE: u64 = 64 * 512;

#[derive(Arbitrary, Debug)]
struct Request {
    kind: u32,
    sector: u64,
    /// Offset from `DATA`, length, written by the device?
    buffers: Vec<(u16, u16, bool)>,
    fill: u8,
    with_header: bool,
    indirect: bool,
}

struct Rig {
    ram: GuestRam,
    disk: Disk,
    _file: tempfile::NamedTempFile,
}

fn rig() -> Rig {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&[0x11; IMAGE as usize]).unwrap();
    Rig { ram: GuestRam::new(32 << 20).unwrap(), disk: Disk::open(&virtio::DiskConfig::new(file.path())).unwrap(), _file: file }
}

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

fuzz_target!(|requests: Vec<Request>| {
    RIG.with_borrow_mut(|place| {
        let rig = place.get_or_insert_with(rig);
        for request in requests.iter().take(8) {
            let mut header = request.kind.to_le_bytes().to_vec();
            header.extend([0; 4]);
            header.extend(request.sector.to_le_bytes());
            let before = vec![request.fill; DATA_LEN];
            assert!(rig.ram.write(HEADER, &header) && rig.ram.write(DATA, &before));
            let mut buffers: Vec<_> = request.buffers.iter().take(60).collect();
            buffers.sort_by_key(|buffer| buffer.2);
            let mut chain: Vec<_> = request.with_header.then_some((HEADER, 16, false)).into_iter().collect();
            chain.extend(buffers.iter().map(|(at, len, write)| (DATA + u64::from(*at), u32::from(*len), *write)));
            if chain.is_empty() {
                continue;
            }
            let mut driver = DriverQueue::new(&rig.ram, RING, 64);
            if request.indirect {
                driver.add_indirect(RING + 0x3000, &chain);
            } else {
                driver.add(&chain);
            }
            let recorder = Recorder::new();
            let mut queue = driver.device_end(false, recorder.clone());
            let write_back = AtomicBool::new(true);
            let policy = Policy { serial: b"fuzz", write_back: Some(&write_back) };
            let room: u32 = chain.iter().filter(|b| b.2).map(|b| b.1).sum();
            queue.serve(&StopFlag::default(), |chain| serve(&rig.disk, policy, chain));
            match driver.used() {
                Some((_, written)) => assert!(written <= room),
                None => assert!(!recorder.broken().is_empty()),
            }
            let mut after = vec![0; DATA_LEN];
            assert!(rig.ram.read(DATA, &mut after));
            for (at, byte) in after.iter().enumerate() {
                let address = DATA + at as u64;
                let inside = chain.iter().any(|b| b.2 && address >= b.0 && address - b.0 < u64::from(b.1));
                assert!(*byte == request.fill || inside, "wrote at {address:#x}");
            }
            assert_eq!(std::fs::metadata(rig.disk.path()).unwrap().len(), IMAGE);
        }
    });
});
