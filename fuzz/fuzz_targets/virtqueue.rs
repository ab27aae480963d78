//! Any bytes as rings, descriptor tables and indirect tables: serving them ends, does not panic, and gives the handler bounded chains.

#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use memory::GuestRam;
use virtio::queue::Virtqueue;
use virtio::runner::StopFlag;
use virtio::testing::{DriverQueue, Recorder};

const RING: u64 = 0x1000;
const SIZE: u16 = 16;

thread_local! {
    static RAM: RefCell<Option<GuestRam>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    RAM.with_borrow_mut(|ram| {
        let ram = ram.get_or_insert_with(|| GuestRam::new(32 << 20).unwrap());
        let [flags, data @ ..] = data else { return };
        // The input overlays rings and tables; what it leaves is zero.
        assert!(ram.write(0, &[0; 0x4000]));
        let state = DriverQueue::new(ram, RING, SIZE).state();
        assert!(ram.write(RING, &data[..data.len().min(0x3000)]));
        let event_idx = flags & 1 != 0;
        let Ok(mut queue) = Virtqueue::new(0, &state, SIZE, event_idx, ram.shared(), Recorder::new()) else { return };
        let mut served = 0u32;
        queue.serve(&StopFlag::default(), |chain| {
            served += 1;
            // What the handler writes may land in the available ring and make more available, as a driver could: stop writing.
            assert!(served <= 1000 + u32::from(SIZE));
            if served > 1000 {
                return 0;
            }
            let mut head = [0; 64];
            let read = chain.readable.read(&mut head);
            let back = chain.writable.take_back(3.min(chain.writable.len()));
            back.map_or(0, |mut back| back.write(&head[..read]) as u32)
        });
    });
});
