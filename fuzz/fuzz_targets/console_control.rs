//! Any messages on the control queue of a device with several ports, and any buffers for its answers: no panic, no more answers than
//! buffers, and each is a message of the device's.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use memory::GuestRam;
use virtio::console::{Blocking, Sink};
use virtio::testing::{DriverQueue, Recorder};
use virtio::{Ports, VirtioDevice};

const DATA: u64 = 0x10_0000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// A message: port, event, value, bytes of it that the driver shows.
    Say(u32, u16, u16, u8),
    Bytes(Vec<u8>),
    Room(u8),
    HostOpens(bool, u8),
    Reset,
    Save,
    Config(u16, u8),
}

thread_local! {
    static RAM: GuestRam = GuestRam::new(32 << 20).unwrap();
}

fuzz_target!(|steps: Vec<Step>| {
    RAM.with(|ram| {
        let sinks = ["a", "org.b"].map(|name| (name.to_string(), Box::new(Blocking(Box::new(std::io::sink()))) as Box<dyn Sink>));
        let (mut device, handles) = Ports::new(sinks.into()).unwrap();
        let recorder = Recorder::new();
        device.activate(2, recorder.clone());
        let queue = |device: &mut Ports, index: u16| {
            let driver = DriverQueue::new(ram, 0x10000 + 0x4000 * u64::from(index), 16);
            let live = driver.device_end_of(index, true, recorder.clone());
            (driver, device.start_queue(live))
        };
        let (mut answers, room) = queue(&mut device, 2);
        let (mut messages, bell) = queue(&mut device, 3);
        let (mut offered, mut used) = (0_u32, 0_u32);
        for step in steps.into_iter().take(64) {
            let mut say = |bytes: &[u8]| {
                assert!(ram.write(DATA, bytes));
                messages.add(&[(DATA, bytes.len() as u32, false)]);
                bell.ring();
                assert!(messages.used().is_some());
            };
            match step {
                Step::Say(port, event, value, len) => {
                    let message = [&(port % 4).to_le_bytes()[..], &(event % 9).to_le_bytes(), &value.to_le_bytes()].concat();
                    say(&message[..usize::from(len % 9).max(1)]);
                }
                Step::Bytes(bytes) => say(&[&bytes[..bytes.len().min(256)], &[0]].concat()),
                Step::Room(len) if offered - used < 16 => {
                    answers.add(&[(DATA + 0x1000, len.into(), true)]);
                    offered += 1;
                    room.ring();
                }
                Step::Room(_) => {}
                Step::HostOpens(open, which) => handles[usize::from(which % 2)].set_open(open),
                Step::Reset => {
                    let [a, b] = [2, 3].map(|index| device.stop_queue(index).unwrap());
                    device.reset();
                    device.start_queue(a);
                    device.start_queue(b);
                }
                Step::Save => {
                    let state = device.save();
                    device.restore(&state).unwrap();
                    assert_eq!(device.save(), state);
                }
                Step::Config(at, len) => device.read_config(at.into(), &mut vec![0; len.into()]),
            }
            while let Some((_, len)) = answers.used() {
                used += 1;
                assert!(used <= offered && len <= 13, "{len}");
            }
        }
        assert!(recorder.broken().is_empty());
    });
});
