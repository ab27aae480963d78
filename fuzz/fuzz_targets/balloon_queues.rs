//! Any bytes on the balloon's queues, over chains of any shape: no panic, and no byte of RAM changes but whole pages that were named, to zero.

#![no_main]

use std::cell::RefCell;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memory::GuestRam;
use virtio::balloon::request::{MemoryStats, inflate, report};
use virtio::runner::StopFlag;
use virtio::testing::{DriverQueue, Recorder};

const RING: u64 = 0x1000;
const DATA: u64 = 0x10000;
/// What the guest gives back is looked at here.
const PAGES: u64 = 0x40_0000;
const PAGES_LEN: usize = 0x10_0000;

#[derive(Arbitrary, Debug)]
enum Queue {
    Inflate,
    Report,
    Statistics,
}

#[derive(Arbitrary, Debug)]
struct Input {
    queue: Queue,
    /// Small numbers are pages that are looked at, others any.
    pages: Vec<(u32, bool)>,
    bytes: Vec<u8>,
    /// Address, length, written by the device?
    buffers: Vec<(u64, u32, bool)>,
}

thread_local! {
    static RAM: RefCell<Option<GuestRam>> = const { RefCell::new(None) };
}

fuzz_target!(|input: Input| {
    RAM.with_borrow_mut(|ram| {
        let ram = ram.get_or_insert_with(|| GuestRam::new(32 << 20).unwrap());
        let first = (PAGES >> 12) as u32;
        let here = |page: u32| first + page % (PAGES_LEN as u32 >> 12);
        let pages: Vec<u32> = input.pages.iter().take(4096).map(|(page, any)| if *any { *page } else { here(*page) }).collect();
        let mut bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        bytes.extend(input.bytes.iter().take(4096));
        assert!(ram.write(DATA, &bytes) && ram.write(PAGES, &vec![1; PAGES_LEN]));
        let mut driver = DriverQueue::new(ram, RING, 64);
        let mut chain: Vec<_> = match input.queue {
            Queue::Report => Vec::new(),
            _ => vec![(DATA, bytes.len() as u32, false)],
        };
        let mut more: Vec<_> = input.buffers.iter().take(50).map(|(at, len, write)| (at % (40 << 20), len % (4 << 20), *write)).collect();
        more.sort_by_key(|buffer| buffer.2);
        // The rings lie where they are: a guest that gives them away harms itself only, but the test's own driver too.
        more.retain(|(at, ..)| *at >= DATA);
        chain.extend(more);
        if chain.is_empty() {
            return;
        }
        driver.add(&chain);
        let recorder = Recorder::new();
        let stop = StopFlag::default();
        let mut given = 0;
        let mut queue = driver.device_end(false, recorder.clone());
        queue.serve(&stop, |chain| {
            match input.queue {
                Queue::Inflate => given = inflate(ram, chain, &stop),
                Queue::Report => given = report(ram, chain, &stop),
                Queue::Statistics => {
                    let stats = MemoryStats::parse(&mut chain.readable);
                    assert!(stats.named().count() <= 16);
                }
            }
            0
        });
        assert!(given % 4096 == 0);
        let mut after = vec![0; PAGES_LEN];
        assert!(ram.read(PAGES, &mut after));
        for page in after.chunks(4096) {
            assert!(page.iter().all(|byte| *byte == page[0]), "part of a page");
            assert!(page[0] == 1 || given > 0, "nothing was given");
        }
    });
});
