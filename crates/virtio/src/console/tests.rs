use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use memory::GuestRam;

use super::*;
use crate::testing::{DriverQueue, Recorder};

const DATA: u64 = 0x10_0000;

struct Output(Sender<Vec<u8>>);

impl Write for Output {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.send(data.to_vec()).map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn queue(ram: &GuestRam, index: u16, recorder: &Arc<Recorder>) -> (DriverQueue, Virtqueue) {
    let driver = DriverQueue::new(ram, 0x10000 + 0x4000 * u64::from(index), 16);
    let live = Virtqueue::new(index, &driver.state(), 16, true, ram.shared(), recorder.clone()).unwrap();
    (driver, live)
}

#[test]
fn output_and_input() {
    let ram = GuestRam::new(32 << 20).unwrap();
    let (sender, receiver) = channel();
    let (mut console, handle) = Console::new(Box::new(Output(sender))).unwrap();
    let recorder = Recorder::new();
    handle.resize(80, 25);
    assert_eq!(handle.send(b"before"), 6);
    console.activate(F_SIZE, recorder.clone());
    let (mut rx, live) = queue(&ram, 0, &recorder);
    let rx_bell = console.start_queue(live);
    let (mut tx, live) = queue(&ram, 1, &recorder);
    let tx_bell = console.start_queue(live);

    assert!(ram.write(DATA, b"hello console"));
    tx.add(&[(DATA, 6, false), (DATA + 6, 7, false)]);
    tx_bell.ring();
    let mut text = Vec::new();
    while text.len() < 13 {
        text.extend(receiver.recv_timeout(Duration::from_secs(10)).unwrap());
    }
    assert_eq!(text, b"hello console");
    assert!(recorder.wait(|| tx.used() == Some((0, 0))));

    // Input typed before the driver was there arrives first; a small buffer takes a part.
    rx.add(&[(DATA + 0x1000, 4, true)]);
    rx_bell.ring();
    assert!(recorder.wait(|| rx.used() == Some((0, 4))));
    rx.add(&[(DATA + 0x2000, 64, true)]);
    rx_bell.ring();
    assert!(recorder.wait(|| rx.used() == Some((1, 2))));
    let mut data = [0; 4];
    assert!(ram.read(DATA + 0x1000, &mut data));
    assert_eq!(&data, b"befo");
    // A buffer that waits for input.
    rx.add(&[(DATA + 0x3000, 64, true)]);
    rx_bell.ring();
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(rx.used(), None);
    assert_eq!(handle.send(b"x"), 1);
    assert!(recorder.wait(|| rx.used() == Some((2, 1))));

    handle.resize(132, 50);
    handle.resize(132, 50);
    assert_eq!(recorder.configs(), 1);
    let generation = console.config_generation();
    let mut config = [0; 8];
    console.read_config(0, &mut config);
    assert_eq!(config, [132, 0, 50, 0, 1, 0, 0, 0]);
    handle.resize(80, 25);
    assert_ne!(console.config_generation(), generation);
}

#[test]
fn input_is_bounded_and_saved() {
    let (mut console, handle) = Console::new(Box::new(std::io::sink())).unwrap();
    assert_eq!(handle.send(&vec![1; INPUT_LIMIT + 5]), INPUT_LIMIT);
    assert_eq!(handle.send(&[2]), 0);
    let state = console.save();
    let (mut other, other_handle) = Console::new(Box::new(std::io::sink())).unwrap();
    other.restore(&state).unwrap();
    assert_eq!((other.save(), other_handle.send(&[2])), (state, 0));
    let too_much = ConsoleState { size: (1, 1), input: vec![0; INPUT_LIMIT + 1] };
    assert!(console.restore(&DeviceState::Console(too_much)).is_err());
    let waiting = std::thread::spawn(move || handle.send_all(&[3; 10]));
    std::thread::sleep(Duration::from_millis(10));
    assert!(!waiting.is_finished());
    drop(console);
    assert!(!waiting.join().unwrap(), "ends with the console");
}

#[test]
fn a_reader_who_stops_does_not_keep_the_console() {
    struct Stuck(Sender<()>);
    impl Write for Stuck {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            self.0.send(()).unwrap();
            loop {
                std::thread::park();
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let ram = GuestRam::new(32 << 20).unwrap();
    let (sender, receiver) = channel();
    let (mut console, handle) = Console::new(Box::new(Stuck(sender))).unwrap();
    let recorder = Recorder::new();
    let (mut tx, live) = queue(&ram, 1, &recorder);
    let (mut rx, live_rx) = queue(&ram, 0, &recorder);
    console.start_queue(live_rx);
    let bell = console.start_queue(live);
    tx.add(&[(DATA, 1, false)]);
    bell.ring();
    receiver.recv_timeout(Duration::from_secs(10)).unwrap();
    // Input still works, and dropping the console does not wait.
    rx.add(&[(DATA, 8, true)]);
    handle.send(b"still");
    assert!(recorder.wait(|| rx.used() == Some((0, 5))));
    drop(console);
}
