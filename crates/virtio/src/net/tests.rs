use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use memory::GuestRam;
use proptest::prelude::*;

use super::*;
use crate::testing::{DriverQueue, Recorder};

const DATA: u64 = 0x10_0000;
const ALL: u64 = 1 << VIRTIO_NET_F_GUEST_CSUM | 1 << VIRTIO_NET_F_GUEST_TSO4 | 1 << VIRTIO_NET_F_MRG_RXBUF;

struct Rig {
    ram: GuestRam,
    /// Before the device: a device waits for its server to end.
    host: UnixDatagram,
    net: Net,
    recorder: Arc<Recorder>,
    rx: DriverQueue,
    rx_bell: Arc<dyn Doorbell>,
    tx: DriverQueue,
    tx_bell: Arc<dyn Doorbell>,
}

fn socket_pair() -> (OwnedFd, OwnedFd) {
    let mut fds = [0; 2];
    // SAFETY: writes two descriptors into the array, which nobody else has.
    unsafe {
        assert_eq!(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()), 0);
        (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1]))
    }
}

fn rig(size: u16, features: u64) -> Rig {
    let ram = GuestRam::new(32 << 20).unwrap();
    let (ours, theirs) = socket_pair();
    let host = UnixDatagram::from(theirs);
    host.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let recorder = Recorder::new();
    let mut net = Net::new(Port::server(ours, Offloads::ALL).unwrap(), [2, 0, 0, 0, 0, 1], 1500, None).unwrap();
    net.activate(features, recorder.clone());
    let mut start = |index: u16| {
        let driver = DriverQueue::new(&ram, 0x10000 + 0x8000 * u64::from(index), size);
        let live = Virtqueue::new(index, &driver.state(), size, true, ram.shared(), recorder.clone()).unwrap();
        (driver, net.start_queue(live))
    };
    let ((rx, rx_bell), (tx, tx_bell)) = (start(RECEIVE), start(TRANSMIT));
    let mut message = [0; 16];
    assert_eq!(host.recv(&mut message).unwrap(), 4);
    assert_eq!(message[0], b'o');
    Rig { ram, host, net, recorder, rx, rx_bell, tx, tx_bell }
}

fn packet(len: usize) -> Vec<u8> {
    let mut packet: Vec<u8> = (0..len).map(|at| (at * 7 + at / 251) as u8).collect();
    packet[..HEADER].fill(0);
    packet
}

#[test]
fn packets_go_out_whole_whatever_their_framing() {
    let mut rig = rig(16, ALL);
    let sent = packet(9000);
    assert!(rig.ram.write(DATA, &sent));
    rig.tx.add(&[(DATA, 5, false), (DATA + 5, 7, false), (DATA + 12, 8988, false)]);
    rig.tx.add(&[(DATA, 13, false)]); // too short to be one
    rig.tx.add(&[(DATA, 26, false)]);
    rig.tx_bell.ring();
    let mut got = vec![0; MAX_PACKET];
    let len = rig.host.recv(&mut got).unwrap();
    assert!(got[..len] == sent);
    assert_eq!(rig.host.recv(&mut got).unwrap(), 26);
    assert!(rig.recorder.wait(|| rig.tx.used_idx() == 3));
}

#[test]
fn packets_come_in_over_several_buffers() {
    let mut rig = rig(16, ALL);
    let sent = packet(3000);
    // Not enough buffers: the packet waits, and so does the next.
    rig.rx.add(&[(DATA, 1024, true)]);
    rig.rx.add(&[(DATA + 0x1000, 1024, true)]);
    rig.rx_bell.ring();
    rig.host.send(&sent).unwrap();
    rig.host.send(&packet(100)).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.rx.used(), None);
    rig.rx.add(&[(DATA + 0x2000, 1024, true)]);
    rig.rx.add(&[(DATA + 0x3000, 1024, true)]);
    rig.rx_bell.ring();
    assert!(rig.recorder.wait(|| rig.rx.used_idx() == 4));
    let used: Vec<_> = std::iter::from_fn(|| rig.rx.used()).collect();
    assert_eq!(used, [(0, 1024), (1, 1024), (2, 952), (3, 100)]);
    let mut got = vec![0; 3072];
    for n in 0..3 {
        assert!(rig.ram.read(DATA + 0x1000 * n, &mut got[1024 * n as usize..][..1024]));
    }
    assert_eq!(got[10..12], [3, 0], "num_buffers");
    assert!(got[12..3000] == sent[12..]);
}

#[test]
fn without_mergeable_buffers_a_packet_has_one() {
    let mut rig = rig(4, 0);
    rig.rx.add(&[(DATA, 500, true), (DATA + 0x1000, 500, true)]);
    rig.rx_bell.ring();
    rig.host.send(&packet(1001)).unwrap(); // fits nowhere
    rig.host.send(&packet(1000)).unwrap();
    assert!(rig.recorder.wait(|| rig.rx.used() == Some((0, 1000))));
    let mut count = [0; 2];
    assert!(rig.ram.read(DATA + 10, &mut count));
    assert_eq!(count, [1, 0]);
}

#[test]
fn a_full_port_loses_nothing() {
    let mut rig = rig(64, ALL);
    let mut sent = 0u16;
    let mut got = vec![0; MAX_PACKET];
    let mut received = 0u16;
    while received < 300 {
        // Only what is used may be offered again.
        while sent < 300 && sent.wrapping_sub(rig.tx.used_idx()) < 30 {
            let mut bytes = packet(40_000);
            bytes[14..16].copy_from_slice(&sent.to_le_bytes());
            let place = DATA + 0xa000 * u64::from(sent % 64);
            assert!(rig.ram.write(place, &bytes));
            rig.tx.add(&[(place, 40_000, false)]);
            rig.tx_bell.ring();
            sent += 1;
        }
        if received == 0 {
            std::thread::sleep(Duration::from_millis(50)); // until the port is full
        }
        assert_eq!(rig.host.recv(&mut got).unwrap(), 40_000);
        assert_eq!(u16::from_le_bytes([got[14], got[15]]), received);
        received += 1;
    }
}

#[test]
fn queues_can_be_taken_away_and_brought_back() {
    let mut rig = rig(16, ALL);
    for round in 0..200u64 {
        rig.rx.add(&[(DATA, 2048, true)]);
        rig.rx_bell.ring();
        rig.host.send(&packet(64)).unwrap();
        for index in [RECEIVE, TRANSMIT] {
            let queue = rig.net.stop_queue(index).unwrap();
            assert!(rig.net.stop_queue(index).is_none());
            rig.net.start_queue(queue);
        }
        assert!(rig.recorder.wait(|| rig.rx.used().is_some()), "{round}");
    }
}

#[test]
fn the_other_end_goes_away() {
    let mut rig = rig(16, ALL);
    let mut config = [0; 12];
    rig.net.read_config(0, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5]);
    let generation = rig.net.config_generation();
    drop(rig.host);
    assert!(rig.recorder.wait(|| rig.recorder.configs() == 1));
    rig.net.read_config(6, &mut config[..2]);
    assert_eq!(config[..2], [0, 0]);
    assert_ne!(rig.net.config_generation(), generation);
    // What is sent is lost; the queue goes on.
    assert!(rig.ram.write(DATA, &packet(100)));
    rig.tx.add(&[(DATA, 100, false)]);
    rig.tx_bell.ring();
    assert!(rig.recorder.wait(|| rig.tx.used().is_some()));
}

#[test]
fn a_broken_queue_does_not_stop_the_other() {
    let mut rig = rig(16, ALL);
    rig.tx.add(&[(u64::MAX - 50, 100, false)]);
    rig.tx_bell.ring();
    while rig.recorder.broken().is_empty() {
        std::thread::yield_now();
    }
    rig.rx.add(&[(DATA, 2048, true)]);
    rig.rx_bell.ring();
    rig.host.send(&packet(64)).unwrap();
    while rig.rx.used().is_none() {
        std::thread::yield_now();
    }
}

#[test]
fn features_follow_the_port() {
    let (ours, _) = socket_pair();
    let net = Net::new(Port::server(ours, Offloads::default()).unwrap(), [0; 6], 1500, None).unwrap();
    assert_eq!(net.features() & (1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4), 0);
    assert_ne!(net.features() & 1 << VIRTIO_NET_F_MRG_RXBUF, 0);
    assert_eq!(driver_offloads(1 << VIRTIO_NET_F_GUEST_TSO4), Offloads::default(), "needs GUEST_CSUM");
}

#[test]
fn state() {
    let (ours, _) = socket_pair();
    let mut net = Net::new(Port::server(ours, Offloads::ALL).unwrap(), [2; 6], 1500, None).unwrap();
    let saved = NetState { mac: [4; 6], mtu: 1500, offloads: Offloads::ALL };
    net.restore(&DeviceState::Net(saved.clone())).unwrap();
    assert_eq!(net.save(), DeviceState::Net(saved.clone()));
    assert!(net.restore(&DeviceState::Net(NetState { mtu: 9000, ..saved })).is_err());
    assert!(net.restore(&DeviceState::Entropy(crate::entropy::EntropyState {})).is_err());
}

/// A TAP device takes and gives packets as a network server does. Needs leave to make one.
#[test]
fn tap() {
    let Ok(file) = File::options().read(true).write(true).open("/dev/net/tun") else { return };
    let mut request = [0u8; 40];
    request[16..18].copy_from_slice(&((libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16).to_le_bytes());
    let size: libc::c_int = HEADER as libc::c_int;
    // SAFETY: TUNSETIFF reads and writes a struct ifreq of 40 bytes, TUNSETVNETHDRSZ reads an int.
    let made = unsafe {
        libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) == 0
            && libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) == 0
    };
    if !made {
        return;
    }
    let port = Port::tap(file.into()).unwrap();
    port.driver_is(Offloads::ALL);
    let sent = packet(100);
    let piece = libc::iovec { iov_base: sent.as_ptr().cast_mut().cast(), iov_len: sent.len() };
    // The interface is down: the packet is lost, the port is not.
    if let Err(error) = port.send(&[piece]) {
        assert!(!port.is_end(&error), "{error}");
    }
    let mut buffer = [0; 2000];
    let error = port.receive(&mut buffer).unwrap_err();
    assert!(error.kind() == std::io::ErrorKind::WouldBlock || !port.is_end(&error), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever shape the chains have: nothing panics, and a queue that the driver did not break goes on.
    #[test]
    fn any_chains(shapes in prop::collection::vec((any::<bool>(), prop::collection::vec((0u64..0x40_0000, 0u32..70_000, any::<bool>()), 1..5)), 1..12)) {
        let mut rig = rig(64, ALL);
        rig.host.set_nonblocking(true).unwrap();
        for (receive, buffers) in &shapes {
            let queue = if *receive { &mut rig.rx } else { &mut rig.tx };
            queue.add(&buffers.iter().map(|(at, len, write)| (DATA + at, *len, *write)).collect::<Vec<_>>());
            let _ = rig.host.send(&packet(2000));
            rig.rx_bell.ring();
            rig.tx_bell.ring();
            let _ = rig.host.recv(&mut [0; 100]);
        }
        std::thread::sleep(Duration::from_millis(2));
        prop_assert!(rig.net.stop_queue(RECEIVE).is_some());
        prop_assert!(rig.net.stop_queue(TRANSMIT).is_some());
    }
}
