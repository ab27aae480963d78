use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::sync::Mutex;
use std::time::Duration;

use memory::GuestRam;
use proptest::prelude::*;

use super::connection::BUFFER;
use super::packet::{HEADER, HOST_CID, Header, NO_RECEIVE, NO_SEND, STREAM, op};
use super::*;
use crate::testing::{DriverQueue, Recorder};

const DATA: u64 = 0x10_0000;
const PIECE: u64 = 0x1_0000;
const LIMIT: Duration = Duration::from_secs(120);

/// A guest's driver and the device, with a host that takes connections to port 7.
struct Guest {
    ram: GuestRam,
    recorder: Arc<Recorder>,
    device: Vsock,
    receive: DriverQueue,
    transmit: DriverQueue,
    bells: Vec<Arc<dyn Doorbell>>,
    sent: u64,
    /// Where the buffers of the receive queue are, by head.
    places: Vec<(u16, u64)>,
    path: std::path::PathBuf,
    _dir: tempfile::TempDir,
    dialled: Arc<Mutex<Vec<UnixStream>>>,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let dialled = Arc::new(Mutex::new(Vec::new()));
        let host = dialled.clone();
        let dial = move |port, _from| {
            let (ours, theirs) = (port == 7).then(UnixStream::pair)?.ok()?;
            host.lock().unwrap().push(theirs);
            Some(ours)
        };
        let mut device = Vsock::new(GUEST_CID, Some(listener.into()), Box::new(dial)).unwrap();
        let ram = GuestRam::new(64 << 20).unwrap();
        let recorder = Recorder::new();
        let mut queues = Vec::new();
        let mut bells = Vec::new();
        for index in 0..2u16 {
            let driver = DriverQueue::new(&ram, 0x10000 + 0x4000 * u64::from(index), 256);
            let live = Virtqueue::new(index, &driver.state(), 256, true, ram.shared(), recorder.clone()).unwrap();
            queues.push(driver);
            bells.push(device.start_queue(live));
        }
        let transmit = queues.pop().unwrap();
        let receive = queues.pop().unwrap();
        let (sent, places) = (0, Vec::new());
        let mut guest =
            Self { ram, recorder, device, receive, transmit, bells, sent, places, path, _dir: dir, dialled };
        guest.offer(64);
        guest
    }

    fn offer(&mut self, count: u64) {
        for at in 0..count {
            let place = DATA + at * PIECE;
            let head = self.receive.add(&[(place, 4096, true)]);
            self.places.push((head, place));
        }
        self.bells[0].ring();
    }

    fn header(&self, host: u32, guest: u32, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: STREAM,
            op,
            buf_alloc: 1 << 18,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let place = DATA + (128 + self.sent % 128) * PIECE;
        self.sent += 1;
        let bytes = [&header.to_bytes()[..], payload].concat();
        assert!(self.ram.write(place, &bytes));
        let head = self.transmit.add(&[(place, bytes.len() as u32, false)]);
        self.bells[1].ring();
        let transmit = &mut self.transmit;
        assert!(self.recorder.wait(|| transmit.used() == Some((head, 0))), "packet not taken");
    }

    fn op(&mut self, host: u32, guest: u32, op: u16) {
        let header = self.header(host, guest, op);
        self.send(header, b"");
    }

    fn data(&mut self, host: u32, guest: u32, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..self.header(host, guest, op::RW) };
        self.send(header, payload);
    }

    /// The next packet for the guest.
    fn next(&mut self) -> (Header, Vec<u8>) {
        let mut used = None;
        let receive = &mut self.receive;
        assert!(
            self.recorder.wait(|| {
                used = receive.used();
                used.is_some()
            }),
            "no packet came"
        );
        let (head, len) = used.unwrap();
        let at = self.places.iter().position(|(known, _)| *known == head).unwrap();
        let (_, place) = self.places.remove(at);
        let mut bytes = vec![0; len as usize];
        assert!(self.ram.read(place, &mut bytes));
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, GUEST_CID, STREAM));
        assert_eq!(header.len as usize, bytes.len() - HEADER);
        // The buffer is offered again.
        let head = self.receive.add(&[(place, 4096, true)]);
        self.places.push((head, place));
        self.bells[0].ring();
        (header, bytes[HEADER..].to_vec())
    }

    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.next();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    fn quiet(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.receive.used(), None);
    }

    /// A connection from the guest to port 7; the host's end.
    fn connect(&mut self, guest: u32) -> UnixStream {
        self.op(7, guest, op::REQUEST);
        let answer = self.expect(op::RESPONSE);
        assert_eq!((answer.src_port, answer.dst_port, answer.buf_alloc), (7, guest, BUFFER));
        let stream = self.dialled.lock().unwrap().pop().unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream
    }

    /// A host program that asks for a port.
    fn call(&mut self, line: &str) -> UnixStream {
        let mut stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        stream
    }
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

#[test]
fn the_guest_connects() {
    let mut guest = Guest::new();
    let mut host = guest.connect(1000);
    guest.data(7, 1000, b"to the host");
    assert_eq!(read(&mut host, 11), b"to the host");
    host.write_all(b"to the guest").unwrap();
    let (header, payload) = guest.next();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"to the guest"[..]));
    assert_eq!(header.fwd_cnt, 11);
    // The guest closes: what it sent arrives, then the end; it is told that all is done.
    guest.data(7, 1000, b"last");
    let close = Header { flags: NO_RECEIVE | NO_SEND, ..guest.header(7, 1000, op::SHUTDOWN) };
    guest.send(close, b"");
    assert_eq!(guest.expect(op::RST).dst_port, 1000);
    let mut rest = Vec::new();
    host.read_to_end(&mut rest).unwrap();
    assert_eq!(rest, b"last");
    // Nobody at this port.
    guest.op(8, 1000, op::REQUEST);
    assert_eq!(guest.expect(op::RST).src_port, 8);
}

#[test]
fn the_host_connects() {
    let mut guest = Guest::new();
    let mut host = guest.call("CONNECT 52\nearly");
    let request = guest.expect(op::REQUEST);
    assert_eq!(request.dst_port, 52);
    let port = request.src_port;
    guest.op(port, 52, op::RESPONSE);
    let answer = format!("OK {port}\n");
    assert_eq!(read(&mut host, answer.len()), answer.as_bytes());
    let (header, payload) = guest.next();
    assert_eq!((header.op, &payload[..]), (op::RW, &b"early"[..]));
    guest.data(port, 52, b"hello");
    assert_eq!(read(&mut host, 5), b"hello");
    // The host's end goes: both directions are closed, and the guest's answer ends it.
    drop(host);
    let closed = guest.expect(op::SHUTDOWN);
    assert_eq!(closed.flags, NO_RECEIVE | NO_SEND);
    guest.op(port, 52, op::RST);
    guest.quiet();
    // A guest that refuses; a line that is none; a host that does not wait for the answer.
    let mut refused = guest.call("CONNECT 53\n");
    let request = guest.expect(op::REQUEST);
    guest.op(request.src_port, 53, op::RST);
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    for line in ["GET / HTTP/1.0\n", "CONNECT 99999999999\n", "CONNECT -1\n", &"x".repeat(100)] {
        let mut stream = guest.call(line);
        // With bytes unread the end is a reset.
        assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "{line}");
    }
    let hasty = guest.call("CONNECT 54\n");
    let request = guest.expect(op::REQUEST);
    drop(hasty);
    assert_eq!(guest.expect(op::RST).src_port, request.src_port);
    guest.op(request.src_port, 54, op::RESPONSE);
    assert_eq!(guest.expect(op::RST).src_port, request.src_port);
}

#[test]
fn half_closed_connections() {
    let mut guest = Guest::new();
    let mut host = guest.connect(1);
    guest.data(7, 1, b"question");
    let half = Header { flags: NO_SEND, ..guest.header(7, 1, op::SHUTDOWN) };
    guest.send(half, b"");
    let mut question = Vec::new();
    host.read_to_end(&mut question).unwrap();
    assert_eq!(question, b"question");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.next().1, b"answer");
    host.shutdown(std::net::Shutdown::Write).unwrap();
    // Both halves are closed: nothing is left of it.
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND | NO_RECEIVE);
    guest.op(7, 1, op::RST);
    // Data behind the end is against the rules.
    let _host = guest.connect(3);
    let half = Header { flags: NO_SEND, ..guest.header(7, 3, op::SHUTDOWN) };
    guest.send(half, b"");
    guest.data(7, 3, b"more");
    guest.expect(op::RST);
    // The host's half first, and the host's end goes later.
    let mut host = guest.connect(2);
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND);
    guest.data(7, 2, b"still");
    assert_eq!(read(&mut host, 5), b"still");
    drop(host);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, NO_SEND | NO_RECEIVE);
    guest.data(7, 2, b"nobody is there");
    guest.op(7, 2, op::RST);
    guest.quiet();
}

#[test]
fn credit_in_both_directions() {
    let mut guest = Guest::new();
    let mut host = guest.connect(1);
    // To the guest, which has room for 1000 bytes of which it lets 600 go.
    let small = Header { buf_alloc: 1000, ..guest.header(7, 1, op::CREDIT_UPDATE) };
    guest.send(small, b"");
    host.write_all(&[5; 3000]).unwrap();
    let (header, payload) = guest.next();
    assert_eq!((header.op, payload.len()), (op::RW, 1000));
    guest.quiet();
    guest.send(Header { fwd_cnt: 600, ..small }, b"");
    assert_eq!(guest.next().1.len(), 600);
    guest.quiet();
    // What cannot be: more let go than came. It gives no harm, and no room.
    guest.send(Header { fwd_cnt: 5000, ..small }, b"");
    guest.quiet();
    guest.send(Header { fwd_cnt: 1600, ..small }, b"");
    assert_eq!(guest.next().1.len(), 1000);
    // From the guest: a full buffer and a reader that wakes up.
    guest.op(7, 1, op::CREDIT_REQUEST);
    assert_eq!(guest.expect(op::CREDIT_UPDATE).fwd_cnt, 0);
    assert_eq!(guest.next().1.len(), 400);
    let piece = vec![9; 60 << 10];
    let mut sent = 0;
    for _ in 0..4 {
        guest.data(7, 1, &piece);
        sent += piece.len();
    }
    let mut got = 0;
    let mut told = 0;
    while got < sent {
        got += host.read(&mut [0; 4096]).unwrap();
    }
    while told < (sent as u32 / 4 * 3) {
        told = guest.expect(op::CREDIT_UPDATE).fwd_cnt;
    }
    // More than it may: a reader that sleeps, until the buffer and the socket are full.
    let overrun = (0..200).find(|_| {
        guest.data(7, 1, &piece);
        std::thread::sleep(Duration::from_millis(1));
        guest.receive.used().is_some()
    });
    assert!(overrun.is_some());
    // The connection is gone: a packet of it gets a reset.
}

#[test]
fn what_belongs_to_nothing_is_reset_or_ignored() {
    let mut guest = Guest::new();
    for op in [op::RW, op::RESPONSE, op::SHUTDOWN, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, 0xffff] {
        guest.op(7, 5, op);
        let answer = guest.expect(op::RST);
        assert_eq!((answer.src_port, answer.dst_port), (7, 5));
    }
    guest.op(7, 5, op::RST);
    for header in [
        Header { src_cid: 4, ..guest.header(7, 5, op::REQUEST) },
        Header { dst_cid: 1, ..guest.header(7, 5, op::REQUEST) },
        Header { dst_cid: 3, ..guest.header(7, 5, op::REQUEST) },
    ] {
        guest.send(header, b"");
    }
    guest.quiet();
    // A length that is not what came; a kind that is not offered.
    let _host = guest.connect(5);
    guest.send(Header { len: 100, ..guest.header(7, 5, op::RW) }, b"short");
    guest.expect(op::RST);
    let seqpacket = Header { kind: 2, ..guest.header(7, 5, op::REQUEST) };
    guest.send(seqpacket, b"");
    let receive = &mut guest.receive;
    let mut used = None;
    assert!(guest.recorder.wait(|| {
        used = receive.used();
        used.is_some()
    }));
    assert!(guest.recorder.broken().is_empty());
}

#[test]
fn much_data_both_ways_on_many_connections() {
    let mut guest = Guest::new();
    const COUNT: u32 = 20;
    const LEN: usize = 300_000;
    let mut hosts: Vec<_> = (0..COUNT).map(|n| guest.connect(n)).collect();
    let writers: Vec<_> = hosts
        .iter()
        .enumerate()
        .map(|(n, host)| {
            let mut host = host.try_clone().unwrap();
            std::thread::spawn(move || host.write_all(&vec![n as u8; LEN]).unwrap())
        })
        .collect();
    let mut got = vec![0usize; COUNT as usize];
    while got.iter().any(|len| *len < LEN) {
        let (header, payload) = guest.next();
        assert_eq!(header.op, op::RW);
        let n = header.dst_port as usize;
        assert!(payload.iter().all(|byte| *byte == n as u8));
        got[n] += payload.len();
        if got[n] % (64 << 10) < payload.len() {
            let update = Header { fwd_cnt: got[n] as u32, ..guest.header(7, header.dst_port, op::CREDIT_UPDATE) };
            guest.send(update, b"");
        }
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    for (n, host) in hosts.iter_mut().enumerate() {
        guest.data(7, n as u32, &vec![n as u8; 50_000]);
        assert_eq!(read(host, 50_000), vec![n as u8; 50_000]);
    }
}

#[test]
fn connections_are_bounded_and_make_room() {
    let mut guest = Guest::new();
    let hosts: Vec<_> = (0..MAX_CONNECTIONS as u32).map(|n| guest.connect(n)).collect();
    guest.op(7, 5000, op::REQUEST);
    guest.expect(op::RST);
    assert!(guest.dialled.lock().unwrap().is_empty(), "nobody was asked");
    drop(hosts);
    for _ in 0..MAX_CONNECTIONS {
        guest.expect(op::SHUTDOWN);
    }
    // The guest did not answer: those make room.
    drop(guest.connect(5000));
}

#[test]
fn a_reset_ends_all_and_a_restored_guest_is_told() {
    let mut guest = Guest::new();
    let mut host = guest.connect(1);
    for index in 0..2 {
        guest.device.stop_queue(index).unwrap();
    }
    let state = guest.device.save();
    guest.device.reset();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);

    let mut guest = Guest::new();
    let mut host = guest.connect(1);
    guest.device.restore(&state).unwrap();
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    let mut events = DriverQueue::new(&guest.ram, 0x40000, 16);
    assert!(guest.ram.write(DATA - 0x1000, &[0xff; 8]));
    events.add(&[(DATA - 0x1000, 8, true)]);
    let live = Virtqueue::new(EVENT, &events.state(), 16, true, guest.ram.shared(), guest.recorder.clone()).unwrap();
    let _bell = guest.device.start_queue(live);
    assert!(guest.recorder.wait(|| events.used() == Some((0, 4))));
    let mut event = [0; 8];
    assert!(guest.ram.read(DATA - 0x1000, &mut event));
    assert_eq!(event, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    // Once.
    events.add(&[(DATA - 0x1000, 8, true)]);
    guest.quiet();
    assert_eq!(events.used(), None);
    let other = DeviceState::Vsock(VsockState { cid: 9 });
    assert!(guest.device.restore(&other).unwrap_err().contains('9'));
    let mut config = [0; 12];
    guest.device.read_config(0, &mut config);
    assert_eq!(config, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, ..ProptestConfig::default() })]

    /// Whatever packets come, the table stays bounded, what waits stays bounded, and nothing panics.
    #[test]
    fn any_packets(
        packets in prop::collection::vec(
            (0..9u16, 5..9u32, 0..4u32, 0..5u32, any::<u32>(), any::<u32>(), 0..3000usize, any::<bool>(), any::<bool>()),
            0..120
        ),
        room in 0..5000usize,
    ) {
        let hosts = Arc::new(Mutex::new(Vec::new()));
        let keep = hosts.clone();
        let dial = move |port, _| {
            let (ours, theirs) = (port > 5).then(UnixStream::pair)?.ok()?;
            theirs.set_nonblocking(true).ok()?;
            keep.lock().unwrap().push(theirs);
            Some(ours)
        };
        let mut muxer = Muxer::new(GUEST_CID, None, Box::new(dial)).unwrap();
        for (op, host, guest, flags, buf_alloc, fwd_cnt, len, lie, act) in packets {
            let header = Header {
                src_cid: GUEST_CID,
                dst_cid: HOST_CID,
                src_port: guest,
                dst_port: host,
                len: if lie { fwd_cnt } else { len as u32 },
                kind: if lie && flags == 3 { 2 } else { STREAM },
                op,
                flags,
                buf_alloc,
                fwd_cnt: if lie { fwd_cnt } else { 0 },
            };
            if muxer.takes() {
                muxer.packet(&header, &vec![1; len]);
            }
            if act {
                let mut hosts = hosts.lock().unwrap();
                if let Some(stream) = hosts.get_mut(len % 4) {
                    let _ = stream.write(&[2; 700]);
                    let _ = stream.read(&mut [0; 2000]);
                }
                if flags == 4 && !hosts.is_empty() {
                    hosts.remove(0);
                }
            }
            for event in muxer.epoll.wait(0) {
                muxer.ready(event);
            }
            for _ in 0..len % 5 {
                if let Some((header, payload)) = muxer.next_packet(room) {
                    prop_assert!(payload.len() + HEADER <= room);
                    prop_assert_eq!(header.len as usize, payload.len());
                }
            }
            prop_assert!(muxer.len() <= 16);
        }
    }
}
