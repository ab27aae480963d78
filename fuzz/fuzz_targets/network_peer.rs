//! Any bytes from whoever is at the other end of `--net socket:`, and any answers of a DHCP server to the agent in a guest: no panic, and no
//! frame longer than one can be.

#![no_main]

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use nat::relay::Relay;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, socketpair};

#[allow(dead_code)]
#[path = "../../crates/agent-guest/src/dhcp.rs"]
mod dhcp;

fuzz_target!(|data: &[u8]| {
    for kind in 0..8u8 {
        // An answer that begins as one for us.
        let mut answer = dhcp::message(dhcp::Ask::Discover, 9, [2; 6], "");
        answer.truncate(240);
        answer[0] = 2;
        answer.extend([53, 1, kind]);
        answer.extend(data);
        let _ = dhcp::answer(&answer, 9, [2; 6]);
    }
    let _ = dhcp::answer(data, 0, [0; 6]);

    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let (cable, guest) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (socket, mut peer) = UnixStream::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    // As much as fits, and its end.
    peer.set_nonblocking(true).unwrap();
    let _ = peer.write(data);
    drop(peer);
    let server = std::thread::spawn(move || Relay::Stream.run(&cable, OwnedFd::from(socket)));
    let mut frame = vec![0; 1 << 17];
    let mut fds = [rustix::event::PollFd::new(&guest, rustix::event::PollFlags::IN)];
    while rustix::event::poll(&mut fds, None).is_ok() {
        match rustix::net::recv(&guest, &mut frame[..], RecvFlags::empty()) {
            Ok((_, 0)) | Err(_) => break,
            Ok((_, len)) => assert!((26..=65_562 + 14).contains(&len), "{len}"),
        }
    }
    server.join().unwrap();
});
