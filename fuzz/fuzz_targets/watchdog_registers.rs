//! Any accesses to the watchdog's registers as time passes: no panic, time ends, and what is saved is restored.

#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use machine::clock::{Clock, TimerQueue};
use machine::pci::PciDevice;
use machine::watchdog::Watchdog;

#[derive(Arbitrary, Debug)]
enum Step {
    Config(u8, u32, u8),
    Bar(u8, u32, u8),
    Unlocked(u8, u32),
    Read(u8),
    /// Milliseconds.
    Pass(u16),
    Reset,
    Save,
    Restore(Vec<u8>),
}

fuzz_target!(|steps: Vec<Step>| {
    let queue = TimerQueue::new(Arc::new(Clock::manual(1_000_000))).unwrap();
    let hung = Arc::new(AtomicU32::new(0));
    let count = hung.clone();
    let callback = move || {
        count.fetch_add(1, Ordering::SeqCst);
    };
    let watchdog = Watchdog::new(&queue, Arc::new(callback)).unwrap();
    let mut milliseconds = 0;
    for step in steps.into_iter().take(200) {
        match step {
            Step::Config(at, value, len) => {
                let at = at & !3;
                watchdog.config_write(at.into(), &value.to_le_bytes()[..[1, 2, 4][usize::from(len % 3)]]);
            }
            Step::Bar(at, value, len) => {
                watchdog.bar_write(0, at.into(), &value.to_le_bytes()[..[1, 2, 4][usize::from(len % 3)]]);
            }
            Step::Unlocked(at, value) => {
                for unlock in [0x80_u16, 0x86] {
                    watchdog.bar_write(0, 0xc, &unlock.to_le_bytes());
                }
                watchdog.bar_write(0, u64::from(at & 0xc), &value.to_le_bytes());
            }
            Step::Read(at) => watchdog.bar_read(0, at.into(), &mut [0; 8]),
            Step::Pass(time) => {
                let step = u64::from(time % 900);
                milliseconds += step;
                queue.clock().set(queue.clock().now() + step * 1_000_000);
                // One look at a time: a timer that is armed anew for now would never end.
                queue.run_due();
            }
            Step::Reset => watchdog.reset(),
            Step::Save => {
                let state = watchdog.save();
                watchdog.restore(&state).unwrap();
                assert_eq!(watchdog.save(), state);
            }
            Step::Restore(bytes) => drop(watchdog.restore(&bytes)),
        }
    }
    assert!(u64::from(hung.load(Ordering::SeqCst)) <= milliseconds + 200, "more than one a millisecond");
});
