//! Any frames from a guest: no panic, and the network answers an ARP request afterwards. The guest is isolated, so that none of its
//! packets leaves the process.

#![no_main]

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use nat::{Nat, NatConfig};

/// Who has 10.0.2.2? Asked by 10.0.2.15.
const QUESTION: [u8; 54] = [
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no offloads
    255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6, //
    0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
];

fuzz_target!(|frames: Vec<Vec<u8>>| {
    let config = NatConfig {
        guest_mac: [2, 0, 0, 0, 0, 1],
        mtu: 1500,
        isolated: true,
        host: true,
        rate: None,
        resolvers: vec![([127, 0, 0, 1], 53).into()],
        names: vec![("name.example".into(), [192, 0, 2, 1].into())],
        ipv6: true,
    };
    let (ours, mut guest) = UnixStream::pair().unwrap();
    guest.set_nonblocking(true).unwrap();
    let mut nat = Nat::new(config, OwnedFd::from(ours), Vec::new()).unwrap();
    for frame in frames.iter().take(64) {
        nat.frame(frame, Instant::now());
        nat.turn(Some(Duration::ZERO)).unwrap();
    }
    let mut answers = vec![0; 1 << 20];
    while guest.read(&mut answers).is_ok_and(|len| len > 0) {}
    nat.turn(Some(Duration::ZERO)).unwrap();
    nat.frame(&QUESTION, Instant::now());
    assert!(guest.read(&mut answers).is_ok_and(|len| len >= 54));
});
