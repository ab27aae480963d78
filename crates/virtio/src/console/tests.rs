use std::sync::mpsc::{Receiver, Sender, channel};
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
    let too_much = ConsoleState { size: (1, 1), port: PortState { input: vec![0; INPUT_LIMIT + 1], sent: 0 } };
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

/// A sink that takes up to so many bytes at a time, as many times as it is allowed to.
struct Slow(Receiver<usize>, Sender<Vec<u8>>);

impl Sink for Slow {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let n = self.0.try_recv().map_err(|_| std::io::ErrorKind::WouldBlock)?.min(data.len());
        let _ = self.1.send(data[..n].to_vec());
        Ok(n)
    }
    fn wait(&mut self, _: Duration) {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A device with ports and its driver.
struct Driver {
    ram: GuestRam,
    device: Ports,
    recorder: Arc<Recorder>,
    control: (DriverQueue, Arc<dyn Doorbell>),
    from_device: (DriverQueue, Arc<dyn Doorbell>),
    slot: u64,
}

impl Driver {
    fn new(ports: Vec<Named>) -> (Self, Vec<NamedPortHandle>) {
        let ram = GuestRam::new(32 << 20).unwrap();
        let (mut device, handles) = Ports::new(ports).unwrap();
        let recorder = Recorder::new();
        device.activate(device.features(), recorder.clone());
        let (from_device, live) = queue(&ram, 2, &recorder);
        let from_device = (from_device, device.start_queue(live));
        let (control, live) = queue(&ram, 3, &recorder);
        let control = (control, device.start_queue(live));
        let mut driver = Self { ram, device, recorder, control, from_device, slot: 0 };
        (0..8).for_each(|_| driver.room());
        (driver, handles)
    }

    /// A buffer for the device's messages.
    fn room(&mut self) {
        self.from_device.0.add(&[(DATA + 0x1000 * (self.slot % 16), 64, true)]);
        self.slot += 1;
        self.from_device.1.ring();
    }

    fn say(&mut self, port: u32, event: u16, value: u16) {
        let message = [&port.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
        assert!(self.ram.write(DATA + 0x2_0000, &message));
        self.control.0.add(&[(DATA + 0x2_0000, 8, false)]);
        self.control.1.ring();
        assert!(self.control.0.used().is_some());
    }

    /// The device's next message: port, event, value, text.
    fn hear(&mut self) -> Option<(u32, u16, u16, String)> {
        let (head, len) = self.from_device.0.used()?;
        let mut data = vec![0; len as usize];
        assert!(self.ram.read(DATA + 0x1000 * u64::from(head), &mut data));
        self.room();
        let word = |at: usize| u16::from_le_bytes([data[at], data[at + 1]]);
        Some((word(0).into(), word(4), word(6), String::from_utf8(data[8..].to_vec()).unwrap()))
    }
}

type Named = (String, Box<dyn Sink>);

fn sinks(names: &[&str]) -> (Vec<Named>, Vec<Receiver<Vec<u8>>>) {
    let sink = |name: &&str| {
        let (sender, receiver) = channel();
        ((name.to_string(), Box::new(Blocking(Box::new(Output(sender)))) as _), receiver)
    };
    names.iter().map(sink).unzip()
}

#[test]
fn named_ports() {
    let (ports, outputs) = sinks(&["first", "org.second.0"]);
    let (mut driver, handles) = Driver::new(ports);
    let mut config = [0; 8];
    driver.device.read_config(0, &mut config);
    assert_eq!(config, [0, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(driver.device.queue_sizes().len(), 8);
    handles[1].set_open(true);
    assert_eq!(driver.hear(), None, "the driver is not ready");
    driver.say(0, 0, 1);
    assert_eq!(
        [driver.hear(), driver.hear(), driver.hear()],
        [Some((1, 1, 1, "".into())), Some((2, 1, 1, "".into())), None]
    );
    driver.say(2, 3, 1);
    assert_eq!(driver.hear(), Some((2, 7, 1, "org.second.0".into())));
    assert_eq!(driver.hear(), Some((2, 6, 1, "".into())));
    handles[1].set_open(false);
    handles[1].set_open(false);
    assert_eq!([driver.hear(), driver.hear()], [Some((2, 6, 0, "".into())), None]);
    driver.say(1, 3, 1);
    assert_eq!([driver.hear(), driver.hear()], [Some((1, 7, 1, "first".into())), None]);

    // Input waits for somebody in the guest who opens the port.
    let (mut rx, live) = queue(&driver.ram, 6, &driver.recorder);
    let rx_bell = driver.device.start_queue(live);
    rx.add(&[(DATA + 0x3_0000, 16, true)]);
    rx_bell.ring();
    assert_eq!(handles[1].send(b"input"), 5);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rx.used(), None);
    driver.say(2, 6, 1);
    assert!(driver.recorder.wait(|| rx.used() == Some((0, 5))));
    // Output, of the other port.
    let (mut tx, live) = queue(&driver.ram, 5, &driver.recorder);
    let tx_bell = driver.device.start_queue(live);
    assert!(driver.ram.write(DATA + 0x3_1000, b"output"));
    tx.add(&[(DATA + 0x3_1000, 6, false)]);
    tx_bell.ring();
    assert_eq!(outputs[0].recv_timeout(Duration::from_secs(10)).unwrap(), b"output");

    // Saved and restored, the guest hears only what is new to it.
    for index in [2, 3, 5, 6] {
        assert!(driver.device.stop_queue(index).is_some());
    }
    let state = driver.device.save();
    let (ports, _outputs) = sinks(&["first", "org.second.0"]);
    let (mut other, handles) = Driver::new(ports);
    other.device.restore(&state).unwrap();
    assert_eq!(other.device.save(), state);
    handles[1].set_open(true);
    assert_eq!([other.hear(), other.hear()], [Some((2, 6, 1, "".into())), None]);
    let (ports, _outputs) = sinks(&["first", "third"]);
    let (mut another, _) = Driver::new(ports);
    assert!(another.device.restore(&state).unwrap_err().contains("--port"));
    // A driver that starts anew is told anew.
    other.device.reset();
    other.say(0, 0, 1);
    assert_eq!(other.hear(), Some((1, 1, 1, "".into())));
    assert!(driver.recorder.broken().is_empty());
}

#[test]
fn bad_control_messages_do_nothing() {
    let (ports, _outputs) = sinks(&["only"]);
    let (mut driver, _) = Driver::new(ports);
    driver.say(0, 0, 1);
    assert_eq!(driver.hear(), Some((1, 1, 1, "".into())));
    for (port, event) in [(0, 3), (2, 3), (u32::MAX, 6), (1, 1), (1, 99)] {
        driver.say(port, event, 1);
    }
    driver.control.0.add(&[(DATA + 0x2_0000, 7, false)]);
    driver.control.1.ring();
    assert_eq!(driver.hear(), None);
    // Queues of the port that is none, and beyond.
    let (_, live) = queue(&driver.ram, 0, &driver.recorder);
    driver.device.start_queue(live).ring();
    assert!(driver.device.stop_queue(0).is_some() && driver.device.stop_queue(1).is_none());
    assert!(driver.device.stop_queue(99).is_none());
    assert!(driver.recorder.broken().is_empty());
}

#[test]
fn a_full_sink_makes_the_guest_wait_and_nobody_else() {
    let ((allow, allowed), (sender, output)) = (channel(), channel());
    let (mut driver, _) = Driver::new(vec![("slow".into(), Box::new(Slow(allowed, sender)))]);
    let (mut tx, live) = queue(&driver.ram, 5, &driver.recorder);
    let bell = driver.device.start_queue(live);
    let text: Vec<u8> = (0..10_000_u32).map(|at| (at % 251) as u8).collect();
    assert!(driver.ram.write(DATA + 0x4_0000, &text));
    tx.add(&[(DATA + 0x4_0000, 3000, false), (DATA + 0x4_0000 + 3000, 7000, false)]);
    allow.send(1234).unwrap();
    bell.ring();
    let mut got = output.recv_timeout(Duration::from_secs(10)).unwrap();
    assert_eq!(got.len(), 1234);
    // It is stopped in the middle, and goes on there, also in another device.
    let live = driver.device.stop_queue(5).unwrap();
    assert_eq!(live.state().next_avail, 0);
    let state = driver.device.save();
    driver.device.restore(&state).unwrap();
    driver.device.start_queue(live);
    for _ in 0..20 {
        allow.send(1000).unwrap();
    }
    assert!(driver.recorder.wait(|| tx.used() == Some((0, 0))));
    got.extend(output.try_iter().flatten());
    assert!(got == text);
}
