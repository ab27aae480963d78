//! Any packets of a guest to its sockets, and whatever the host's ends do meanwhile: no panic, all tables bounded, no packet larger than its
//! buffer.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use virtio::vsock::testing::Packets;

#[derive(Arbitrary, Debug)]
enum Deed {
    /// A packet: a header of any kind.
    Any { header: [u8; 44], payload: u16 },
    /// One that makes sense.
    Packet { op: u8, host: u8, guest: u8, flags: u8, buf_alloc: u32, fwd_cnt: u32, payload: u16 },
    /// The guest has a buffer of so many bytes.
    Room(u16),
    /// The host's end writes, reads, goes.
    Write(u8, u16),
    Read(u8, u16),
    Close(u8),
    /// A program of the host asks for a connection.
    Call(u8),
    Clear,
}

fuzz_target!(|deeds: Vec<Deed>| {
    let mut packets = Packets::new(|port| port % 3 != 0);
    for deed in deeds.iter().take(256) {
        match deed {
            Deed::Any { header, payload } => packets.packet(header, &vec![1; usize::from(*payload)]),
            Deed::Packet { op, host, guest, flags, buf_alloc, fwd_cnt, payload } => {
                let mut header = Vec::with_capacity(44);
                header.extend(virtio::vsock::GUEST_CID.to_le_bytes());
                header.extend(2u64.to_le_bytes());
                header.extend(u32::from(*guest % 8).to_le_bytes());
                // Some are connections that the host began.
                let port = u32::from(*host % 16);
                header.extend(if port < 8 { port } else { (1 << 30) + port - 8 }.to_le_bytes());
                header.extend(u32::from(*payload).to_le_bytes());
                header.extend([1, 0, op % 9, 0]);
                header.extend(u32::from(*flags % 4).to_le_bytes());
                header.extend(buf_alloc.to_le_bytes());
                header.extend(fwd_cnt.to_le_bytes());
                packets.packet(&header.try_into().unwrap(), &vec![2; usize::from(*payload)]);
            }
            Deed::Room(room) => packets.take(usize::from(*room)),
            Deed::Write(which, len) => packets.host_writes(usize::from(*which), usize::from(*len)),
            Deed::Read(which, len) => packets.host_reads(usize::from(*which), usize::from(*len)),
            Deed::Close(which) => packets.host_closes(usize::from(*which)),
            Deed::Call(port) => packets.host_calls(format!("CONNECT {port}\n").as_bytes()),
            Deed::Clear => packets.clear(),
        }
        packets.turn();
    }
});
