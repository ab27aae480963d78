use super::*;
use crate::testing::{DriverQueue, Recorder};
use memory::GuestRam;
use share::channel::Worker;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

const RING: u64 = 0x1000;
const REQUEST: u64 = 0x2_0000;
const ANSWER: u64 = 0x10_0000;

struct Rig {
    ram: GuestRam,
    device: Fs,
    driver: DriverQueue,
    doorbell: Arc<dyn Doorbell>,
    recorder: Arc<Recorder>,
    lines: Arc<Mutex<Vec<String>>>,
    /// The server's end of the socket.
    server: Option<OwnedFd>,
}

/// A device whose server answers each request by `serve`.
fn rig(serve: impl FnMut(&[u8], &mut [u8]) -> usize + Clone + Send + 'static) -> Rig {
    let channel = Client::new().unwrap();
    let worker = Arc::new(Worker::new(channel.descriptors().map(|fd| fd.try_clone_to_owned().unwrap())).unwrap());
    for _ in 0..3 {
        let (worker, serve) = (worker.clone(), serve.clone());
        std::thread::spawn(move || worker.run(serve));
    }
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let lines = Arc::new(Mutex::new(Vec::new()));
    let taken = lines.clone();
    let reporter: Reporter = Arc::new(move |line: &str| taken.lock().unwrap().push(line.to_owned()));
    let mut device = Fs::new("tag", "/dir", channel, ours.into(), Some(reporter)).unwrap();
    let ram = GuestRam::new(32 << 20).unwrap();
    let recorder = Recorder::new();
    let driver = DriverQueue::new(&ram, RING, 256);
    device.activate(0, recorder.clone());
    let doorbell = device.start_queue(driver.device_end(false, recorder.clone()));
    Rig { ram, device, driver, doorbell, recorder, lines, server: Some(theirs.into()) }
}

fn header(unique: u64, len: u32) -> Vec<u8> {
    let mut bytes = vec![0; 40];
    bytes[..4].copy_from_slice(&len.to_le_bytes());
    bytes[8..16].copy_from_slice(&unique.to_le_bytes());
    bytes
}

/// Answers with a header and the request's own bytes behind it.
fn echo(request: &[u8], answer: &mut [u8]) -> usize {
    let len = (16 + request.len()).min(answer.len());
    answer[..16].fill(0);
    answer[..4].copy_from_slice(&(len as u32).to_le_bytes());
    answer[8..16].copy_from_slice(&request[8..16]);
    let body = len - 16;
    answer[16..len].copy_from_slice(&request[..body]);
    len
}

impl Rig {
    fn add(&mut self, number: u64, len: u32, room: u32) {
        let at = REQUEST + number * 0x1000;
        assert!(self.ram.write(at, &header(number, len)));
        // In pieces, as drivers do.
        let answer = ANSWER + number * 0x1000;
        let mut buffers = vec![(at, 24, false), (at + 24, len - 24, false)];
        if room > 0 {
            buffers.extend([(answer, 16.min(room), true), (answer + 16, room - 16.min(room), true)]);
        }
        self.driver.add(&buffers);
    }

    fn used(&mut self) -> (u16, u32) {
        let mut used = None;
        let (driver, recorder) = (&mut self.driver, &self.recorder);
        assert!(
            recorder.wait(|| {
                used = driver.used();
                used.is_some()
            }),
            "{:?}",
            recorder.broken()
        );
        used.unwrap()
    }

    fn answer(&self, number: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.ram.read(ANSWER + number * 0x1000, &mut bytes));
        bytes
    }

    fn error(&self, number: u64) -> i32 {
        i32::from_le_bytes(self.answer(number, 8)[4..].try_into().unwrap())
    }
}

#[test]
fn requests_and_answers() {
    let mut rig = rig(echo);
    let mut config = [0; 44];
    rig.device.read_config(0, &mut config);
    assert_eq!((&config[..4], &config[36..40], &config[40..]), (&b"tag\0"[..], &[1, 0, 0, 0][..], &[0; 4][..]));
    rig.add(1, 100, 200);
    rig.doorbell.ring();
    assert_eq!(rig.used().1, 116);
    let answer = rig.answer(1, 56);
    assert_eq!((&answer[8..16], &answer[16..]), (&1u64.to_le_bytes()[..], &header(1, 100)[..]));
    // One without an answer, and more at once than there are slots.
    rig.add(2, 48, 0);
    for number in 3..60 {
        rig.add(number, 64, 96);
    }
    rig.doorbell.ring();
    let mut lens: Vec<_> = (2..60).map(|_| rig.used().1).collect();
    lens.sort_unstable();
    assert_eq!((lens[0], lens[1], lens[57]), (0, 80, 80));
    for number in 3..60 {
        assert_eq!(rig.answer(number, 16)[8..], number.to_le_bytes());
    }
}

#[test]
fn malformed_chains() {
    let mut rig = rig(echo);
    rig.add(1, 39, 100);
    rig.doorbell.ring();
    assert_eq!((rig.used().1, rig.error(1)), (16, -libc::EINVAL));
    // No room even for a header.
    rig.add(2, 40, 15);
    rig.doorbell.ring();
    assert_eq!(rig.used().1, 0);
    // Longer than any request.
    let mut chain = vec![(0x40_0000, 2 << 20, false)];
    chain.push((ANSWER + 0x3000, 16, true));
    rig.driver.add(&chain);
    rig.doorbell.ring();
    assert_eq!((rig.used().1, rig.error(3)), (16, -libc::EINVAL));
    assert!(rig.recorder.broken().is_empty());
}

/// A server that lies about its answers does not get the monitor to write beyond the guest's room.
#[test]
fn a_lying_server() {
    let mut rig = rig(|request: &[u8], _: &mut [u8]| if request[8] == 1 { usize::MAX } else { 3 });
    assert!(rig.ram.write(ANSWER + 0x1000, &[0xee; 200]));
    rig.add(1, 40, 100);
    rig.doorbell.ring();
    assert_eq!(rig.used().1, 100);
    assert_eq!(rig.answer(1, 200)[100..], [0xee; 100]);
    rig.add(2, 40, 100);
    rig.doorbell.ring();
    assert_eq!((rig.used().1, rig.error(2)), (16, -libc::EIO));
}

#[test]
fn a_server_that_ends() {
    let stuck = Arc::new(AtomicBool::new(true));
    let flag = stuck.clone();
    let mut rig = rig(move |_: &[u8], _: &mut [u8]| {
        while flag.load(Ordering::SeqCst) {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        0
    });
    for number in 0..40 {
        rig.add(number, 40, 100);
    }
    rig.doorbell.ring();
    rig.server = None;
    for _ in 0..40 {
        assert_eq!(rig.used().1, 16);
    }
    assert!((0..40).all(|number| rig.error(number) == -libc::EIO));
    rig.add(41, 40, 100);
    rig.add(42, 40, 0);
    rig.doorbell.ring();
    assert_eq!((rig.used().1, rig.used().1, rig.error(41)), (16, 0, -libc::EIO));
    let lines = rig.lines.lock().unwrap().clone();
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("/dir") && lines[0].contains("has ended"), "{lines:?}");
    stuck.store(false, Ordering::SeqCst);
}

/// A queue that is stopped has given back all that was taken from it, and goes on where it was.
#[test]
fn stop_waits_for_what_is_on_the_way() {
    let slow = |request: &[u8], answer: &mut [u8]| {
        std::thread::sleep(std::time::Duration::from_millis(3));
        echo(request, answer)
    };
    let mut rig = rig(slow);
    for number in 0..50 {
        rig.add(number, 40, 100);
    }
    rig.doorbell.ring();
    let queue = rig.device.stop_queue(0).unwrap();
    let state = queue.state();
    assert_eq!((state.next_avail, rig.driver.used_idx()), (state.next_used, state.next_used));
    assert!(state.next_used >= 32 && state.next_used < 50, "{state:?}");
    assert!(rig.device.stop_queue(0).is_none() && rig.device.stop_queue(7).is_none());
    rig.device.start_queue(queue);
    for _ in 0..50 {
        assert_eq!(rig.used().1, 56);
    }
}

#[test]
fn saved_state() {
    let mut rig = rig(echo);
    let saved = rig.device.save();
    assert!(rig.device.restore(&saved).unwrap_err().contains("not saved"));
    rig.device.stop_queue(0);
    rig.device.reset();
    let unused = rig.device.save();
    rig.device.restore(&unused).unwrap();
    let other = DeviceState::Fs(FsState { tag: "other".into(), in_use: false });
    assert!(rig.device.restore(&other).unwrap_err().contains("--share"));
}
