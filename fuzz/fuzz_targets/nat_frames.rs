//! Frames from a guest to its network: any bytes, and packets of each kind with any contents; a client of the host's talks to a
//! forwarded port of the guest meanwhile. No panic, and the network answers an ARP request afterwards. The guest is isolated, so that
//! none of its packets leaves the process.

#![no_main]

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use nat::{Nat, NatConfig, PortForward};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};

/// Who has 10.0.2.2? Asked by 10.0.2.15.
const QUESTION: [u8; 54] = [
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no offloads
    255, 255, 255, 255, 255, 255, 2, 0, 0, 0, 0, 1, 8, 6, //
    0, 1, 8, 0, 6, 4, 0, 1, 2, 0, 0, 0, 0, 1, 10, 0, 2, 15, 0, 0, 0, 0, 0, 0, 10, 0, 2, 2,
];
/// In front of a packet: checksums are for others to compute, so they are not looked at.
const UNCHECKED: [u8; 12] = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
const V4: [[u8; 4]; 6] = [[10, 0, 2, 2], [10, 0, 2, 3], [10, 0, 2, 255], [255; 4], [192, 0, 2, 9], [224, 0, 0, 1]];
/// The last 2 bytes of addresses in our own network, and the groups of all nodes and all routers.
const V6: [[u8; 2]; 4] = [[0, 2], [0, 3], [0xff, 1], [0xff, 2]];
const PORTS: [u16; 6] = [53, 67, 68, 80, 443, 547];

#[derive(Arbitrary, Debug)]
enum Deed {
    /// Any bytes.
    Raw(Vec<u8>),
    /// An IPv4 packet: where to, fragment, protocol, contents.
    Four(u8, u16, Payload),
    Six(u8, Payload),
    /// An ARP packet.
    Arp([u8; 28]),
    /// An answer to the TCP segment that came last: flags, contents, how far its numbers are off.
    Answer(u8, Vec<u8>, i8, i8, u16),
    /// The host's client says something, or goes.
    Client(Option<Vec<u8>>),
    /// The packet before is sent again with a byte changed.
    Again(u16, u8),
}

#[derive(Arbitrary, Debug)]
enum Payload {
    Udp(u8, Vec<u8>),
    /// A DHCP message of this type, with any options.
    Dhcp(u8, Vec<u8>),
    Tcp(u8, u8, [u32; 2], Vec<u8>),
    Icmp(u8, u8, Vec<u8>),
    Other(u8, Vec<u8>),
}

/// Protocol and contents.
fn contents(payload: &Payload, six: bool) -> (u8, Vec<u8>) {
    let port = |number: u8| PORTS[usize::from(number) % PORTS.len()].to_be_bytes();
    let udp = |from: [u8; 2], to: [u8; 2], data: &[u8]| {
        let len = ((8 + data.len()) as u16).to_be_bytes();
        (17, [&from[..], &to, &len, &[0, 0], data].concat())
    };
    match payload {
        Payload::Udp(to, data) => udp([4, 1], port(*to), data),
        Payload::Dhcp(kind, options) => {
            let mut data = vec![0; 236];
            data[..4].copy_from_slice(&[1, 1, 6, 0]);
            data[28..34].copy_from_slice(&[2, 0, 0, 0, 0, 1]);
            data.extend([99, 130, 83, 99, 53, 1, kind % 10]);
            data.extend(options);
            udp([0, 68], [0, 67], &data)
        }
        Payload::Tcp(to, flags, [seq, ack], data) => (6, segment([4, 2], port(*to), *seq, *ack, *flags, 8000, data)),
        Payload::Icmp(kind, code, data) => {
            let mut all = [&[*kind, *code, 0, 0][..], data].concat();
            let sum = sum(&all);
            all[2..4].copy_from_slice(&sum);
            (if six { 58 } else { 1 }, all)
        }
        Payload::Other(protocol, data) => (*protocol, data.clone()),
    }
}

fn segment(from: [u8; 2], to: [u8; 2], seq: u32, ack: u32, flags: u8, window: u16, data: &[u8]) -> Vec<u8> {
    let (seq, ack, window) = (seq.to_be_bytes(), ack.to_be_bytes(), window.to_be_bytes());
    [&from[..], &to, &seq, &ack, &[0x50, flags], &window, &[0; 4], data].concat()
}

/// The checksum of the Internet.
fn sum(data: &[u8]) -> [u8; 2] {
    let words = data.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

fn four(to: [u8; 4], fragment: u16, protocol: u8, data: &[u8]) -> Vec<u8> {
    let len = ((20 + data.len()) as u16).to_be_bytes();
    let mut header =
        [&[0x45, 0][..], &len, &[0, 7], &(fragment & 0x2fff).to_be_bytes(), &[64, protocol, 0, 0]].concat();
    header.extend([10, 0, 2, 15]);
    header.extend(to);
    let sum = sum(&header);
    header[10..12].copy_from_slice(&sum);
    [&UNCHECKED[..], &[0xff; 6], &[2, 0, 0, 0, 0, 1, 8, 0], &header, data].concat()
}

fn six(to: [u8; 2], protocol: u8, data: &[u8]) -> Vec<u8> {
    let ours = |low: [u8; 2]| {
        let mut address = [0xfd, 0x74, 0x69, 0x67, 0x68, 0x74, 0, 0, 0, 0, 0, 0, 0, 0, 0, low[1]];
        if low[0] != 0 {
            address[..8].copy_from_slice(&[0xff, 2, 0, 0, 0, 0, 0, 0]);
        }
        address
    };
    let len = (data.len() as u16).to_be_bytes();
    let header = [&[0x60, 0, 0, 0][..], &len, &[protocol, 255], &ours([0, 15]), &ours(to)].concat();
    [&UNCHECKED[..], &[0x33, 0x33, 0, 0, 0, 1], &[2, 0, 0, 0, 0, 1, 0x86, 0xdd], &header, data].concat()
}

thread_local! {
    static LISTENER: RefCell<Option<TcpListener>> = const { RefCell::new(None) };
}

fuzz_target!(|deeds: Vec<Deed>| {
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
    let listener = LISTENER.with_borrow_mut(|place| {
        let listener = place.get_or_insert_with(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            listener.set_nonblocking(true).unwrap();
            listener
        });
        listener.try_clone().unwrap()
    });
    let at = listener.local_addr().unwrap();
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (ours, guest) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let forward = PortForward::Tcp(OwnedFd::from(listener), 80);
    let mut nat = Nat::new(config, ours, vec![forward]).unwrap();
    let mut answer = vec![0; 1 << 17];
    let mut client: Option<TcpStream> = None;
    // Ports, sequence number and acknowledgement of the segment that came last, as it is to be answered.
    let mut last = ([0, 80], [0, 80], 0, 0);
    let mut before: Vec<u8> = Vec::new();
    for deed in deeds.iter().take(48) {
        let frame = match deed {
            Deed::Raw(frame) => frame.clone(),
            Deed::Four(to, fragment, payload) => {
                let (protocol, data) = contents(payload, false);
                four(V4[usize::from(*to) % V4.len()], *fragment, protocol, &data)
            }
            Deed::Six(to, payload) => {
                let (protocol, data) = contents(payload, true);
                six(V6[usize::from(*to) % V6.len()], protocol, &data)
            }
            Deed::Arp(packet) => [&[0; 12][..], &[0xff; 6], &[2, 0, 0, 0, 0, 1, 8, 6], packet].concat(),
            Deed::Answer(flags, data, seq_off, ack_off, window) => {
                let (from, to, seq, ack) = last;
                let seq = i64::from(seq).wrapping_add((*seq_off).into()) as u32;
                let ack = i64::from(ack).wrapping_add((*ack_off).into()) as u32;
                let data = segment(from, to, seq, ack, *flags, *window, data);
                four(V4[0], 0, 6, &data)
            }
            Deed::Client(what) => {
                match (what, &mut client) {
                    (None, client) => *client = None,
                    (Some(bytes), Some(client)) => {
                        let _ = client.write(bytes);
                        let _ = client.read(&mut answer);
                    }
                    (Some(_), client) => {
                        *client = TcpStream::connect_timeout(&at, Duration::from_secs(1)).ok();
                        client.iter().for_each(|client| client.set_nonblocking(true).unwrap());
                    }
                }
                Vec::new()
            }
            Deed::Again(at, value) => {
                let mut frame = before.clone();
                let len = frame.len().max(1);
                frame.get_mut(usize::from(*at) % len).into_iter().for_each(|byte| *byte ^= value);
                frame
            }
        };
        if !frame.is_empty() {
            nat.frame(&frame, Instant::now());
            before = frame;
        }
        nat.turn(Some(Duration::ZERO)).unwrap();
        while let Ok((len, _)) = recv(&guest, &mut answer[..], RecvFlags::empty()) {
            let frame = answer.get(..len).unwrap_or_default();
            assert!(len >= 26, "a frame of {len} bytes");
            if frame.len() >= 66 && frame[24..26] == [8, 0] && frame[35] == 6 {
                let tcp = &frame[46..];
                let word = |at: usize| u32::from_be_bytes([tcp[at], tcp[at + 1], tcp[at + 2], tcp[at + 3]]);
                let more = (frame.len() - 66) as u32 + u32::from(tcp[13] & 2 != 0) + u32::from(tcp[13] & 1);
                last = ([tcp[2], tcp[3]], [tcp[0], tcp[1]], word(8), word(4).wrapping_add(more));
            }
        }
    }
    nat.turn(Some(Duration::ZERO)).unwrap();
    while recv(&guest, &mut answer[..], RecvFlags::empty()).is_ok() {}
    nat.frame(&QUESTION, Instant::now());
    assert!(recv(&guest, &mut answer[..], RecvFlags::empty()).is_ok_and(|(len, _)| len >= 54));
});
