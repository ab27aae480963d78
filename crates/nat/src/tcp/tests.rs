use std::net::SocketAddr;

use proptest::prelude::*;
use smoltcp::wire::TcpSeqNumber;

use super::*;

/// A segment as the other end would read it from a packet.
fn repr<'a>(segment: &Segment, data: &'a [u8]) -> TcpRepr<'a> {
    TcpRepr {
        src_port: 1,
        dst_port: 2,
        control: match (segment.syn, segment.fin, segment.rst) {
            (true, ..) => TcpControl::Syn,
            (_, true, _) => TcpControl::Fin,
            (.., true) => TcpControl::Rst,
            _ => TcpControl::None,
        },
        seq_number: TcpSeqNumber(segment.seq as i32),
        ack_number: segment.ack.map(|ack| TcpSeqNumber(ack as i32)),
        window_len: segment.window,
        window_scale: segment.window_scale,
        max_seg_size: segment.mss,
        sack_permitted: false,
        sack_ranges: [None; 3],
        timestamp: None,
        payload: data,
    }
}

/// One end with what its user still wants to send, and what it has received.
struct User {
    end: Connection,
    to_send: Vec<u8>,
    sent: usize,
    received: Vec<u8>,
    /// Reads at most so much at a time.
    appetite: usize,
}

impl User {
    fn act(&mut self) {
        let count = self.end.room_for_guest().min(self.to_send.len() - self.sent).min(3000);
        let mut done = 0;
        for mut slot in self.end.slots(count) {
            let n = slot.len();
            slot.copy_from_slice(&self.to_send[self.sent + done..][..n]);
            done += n;
        }
        self.end.host_gave(done);
        self.sent += done;
        if self.sent == self.to_send.len() && !self.end.is_half_open() {
            self.end.host_done();
        }
        let there: Vec<u8> = self.end.for_host().iter().flat_map(|piece| piece.to_vec()).take(self.appetite).collect();
        self.end.host_took(there.len());
        self.received.extend(there);
    }
}

fn pair(buffer: usize, up: Vec<u8>, down: Vec<u8>, appetite: usize, now: Instant) -> (User, User) {
    let user = |end, to_send| User { end, to_send, sent: 0, received: Vec::new(), appetite };
    let mut caller = user(Connection::connect(u32::MAX - 5, 1460, buffer), up);
    let syn = caller.end.next(1460, now).unwrap();
    assert!(syn.syn && syn.ack.is_none());
    let held = Connection::held(&repr(&syn, &[]), i32::MAX as u32 - 3, 1460, buffer);
    (caller, user(held, down))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Two ends over a line that loses, repeats and swaps segments: all that is sent arrives, in order, and both come to an end.
    #[test]
    fn a_bad_line(
        up in 0usize..60_000, down in 0usize..60_000, buffer in 3000usize..40_000, appetite in 1usize..20_000,
        most in prop::sample::select(vec![536usize, 1460, 65_000]), mut seed in 1u64.., loss in 0u64..20,
    ) {
        let data = |len: usize, k: usize| (0..len).map(|at| (at * k + at / 253) as u8).collect::<Vec<u8>>();
        let mut now = Instant::now();
        let (mut a, mut b) = pair(buffer, data(up, 3), data(down, 5), appetite, now);
        prop_assert_eq!(b.end.next(most, now), None); // held back
        b.end.host_connected();
        let mut random = move |n: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 20) % n
        };
        let mut lines: [VecDeque<(Segment, Vec<u8>)>; 2] = Default::default();
        let mut turns = 0;
        while !(a.end.is_over() && b.end.is_over()) {
            turns += 1;
            prop_assert!(turns < 200_000, "{:?} {:?}", a.end, b.end);
            let mut quiet = true;
            for (side, user) in [&mut a, &mut b].into_iter().enumerate() {
                user.act();
                user.end.timeout(now);
                while let Some(segment) = user.end.next(most, now) {
                    quiet = false;
                    prop_assert!(!segment.rst);
                    let data: Vec<u8> = user.end.data(segment.data.clone()).iter().flat_map(|p| p.to_vec()).collect();
                    prop_assert_eq!(data.len(), segment.data.len());
                    if random(100) >= loss {
                        if random(100) < loss {
                            lines[side].push_back((segment.clone(), data.clone()));
                        }
                        lines[side].push_back((segment, data));
                        let len = lines[side].len();
                        if len > 1 && random(100) < loss {
                            lines[side].swap(len - 1, len - 2);
                        }
                    }
                }
            }
            for (side, user) in [&mut b, &mut a].into_iter().enumerate() {
                while let Some((segment, data)) = lines[side].pop_front() {
                    quiet = false;
                    user.end.segment(&repr(&segment, &data), now);
                }
            }
            if quiet {
                now += Duration::from_millis(100);
                // The last acknowledgement may be lost: one end is through and the other asks in vain.
                if a.end.is_over() != b.end.is_over() && loss > 0 {
                    break;
                }
            }
        }
        for _ in 0..60_000 {
            a.act();
            b.act();
        }
        prop_assert!(a.received == data(down, 5));
        prop_assert!(b.received == data(up, 3));
    }

    /// Whatever comes from the guest: no panic, nothing outside its window, and bounded memory.
    #[test]
    fn any_segments(
        steps in prop::collection::vec((0u8..8, any::<u32>(), any::<u32>(), any::<u16>(), 0usize..4000, any::<bool>()), 1..60),
        connects in any::<bool>(),
    ) {
        let mut now = Instant::now();
        let (mut caller, mut held) = pair(8000, vec![1; 20_000], vec![2; 20_000], 500, now);
        held.end.host_connected();
        let user = if connects { &mut caller } else { &mut held };
        let (mut seq, mut ack, mut edge) = (0u32, 0u32, 0u32);
        for (kind, random_seq, random_ack, window, len, near) in steps {
            let control = match kind {
                0 => TcpControl::Syn,
                1 => TcpControl::Fin,
                2 => TcpControl::Rst,
                _ => TcpControl::None,
            };
            let data = vec![7; len];
            let mut segment = repr(&Segment {
                seq: if near { seq } else { random_seq }, ack: (kind != 3).then_some(if near { ack } else { random_ack }),
                window, syn: false, fin: false, rst: false, psh: false, mss: Some(window), window_scale: Some(window as u8), data: 0..0,
            }, &data);
            segment.control = control;
            if near {
                edge = ack.wrapping_add(u32::from(window) << 14).max(edge);
            }
            user.end.segment(&segment, now);
            user.act();
            now += Duration::from_millis(u64::from(window) / 10);
            user.end.timeout(now);
            for _ in 0..20 {
                let Some(out) = user.end.next(1460, now) else { break };
                prop_assert!(out.data.end <= 8000);
                seq = out.ack.unwrap_or(seq);
                ack = out.seq.wrapping_add(out.data.len() as u32 + u32::from(out.syn || out.fin));
            }
            prop_assert!(user.end.for_host().iter().map(|p| p.len()).sum::<usize>() <= 8000);
        }
    }
}

fn open_pair() -> (Connection, u32, u32, Instant) {
    let now = Instant::now();
    let (caller, held) = pair(8000, vec![], vec![], 1, now);
    let (mut a, mut b) = (caller.end, held.end);
    b.host_connected();
    let answer = b.next(1460, now).unwrap();
    assert!(answer.syn && answer.ack.is_some());
    a.segment(&repr(&answer, &[]), now);
    let last = a.next(1460, now).unwrap();
    b.segment(&repr(&last, &[]), now);
    assert!(!b.is_half_open());
    (b, last.seq, last.ack.unwrap(), now)
}

fn plain(seq: u32, ack: u32, window: u16) -> Segment {
    Segment {
        seq,
        ack: Some(ack),
        window,
        syn: false,
        fin: false,
        rst: false,
        psh: false,
        mss: None,
        window_scale: None,
        data: 0..0,
    }
}

#[test]
fn resets_must_be_exact() {
    let (mut end, seq, ack, now) = open_pair();
    for wrong in [1u32, 500, 100_000, u32::MAX] {
        let rst = Segment { rst: true, ..plain(seq.wrapping_add(wrong), ack, 0) };
        end.segment(&repr(&rst, &[]), now);
        // Within the window it is asked whether it is meant (RFC 5961).
        assert_eq!(end.next(1460, now).is_some(), wrong < 1000, "{wrong}");
        assert!(!end.is_over());
    }
    end.segment(&repr(&Segment { rst: true, ..plain(seq, ack, 0) }, &[]), now);
    assert!(end.is_over() && !end.ended_in_order());
}

#[test]
fn a_closed_window_is_probed_and_opens() {
    let (mut end, seq, ack, mut now) = open_pair();
    end.segment(&repr(&plain(seq, ack, 0), &[]), now);
    end.slots(100)[0].fill(9);
    end.host_gave(100);
    assert_eq!(end.next(1460, now), None);
    for _ in 0..100 {
        now = end.deadline().unwrap();
        end.timeout(now);
        let probe = end.next(1460, now).unwrap();
        assert_eq!((probe.seq, probe.data.clone()), (ack, 0..1));
        end.segment(&repr(&plain(seq, ack, 0), &[]), now); // it lives, and has still no room
    }
    end.segment(&repr(&plain(seq, ack, 1000), &[]), now);
    now = end.deadline().unwrap_or(now);
    end.timeout(now);
    assert_eq!(end.next(1460, now).unwrap().data, 0..100);
}

#[test]
fn a_silent_peer_is_given_up() {
    let (mut end, seq, ack, mut now) = open_pair();
    end.segment(&repr(&plain(seq, ack, 1000), &[]), now);
    end.slots(100)[0].fill(9);
    end.host_gave(100);
    let mut sent = 0;
    while let Some(segment) = end.next(1460, now) {
        if segment.rst {
            break;
        }
        sent += 1;
        now = end.deadline().unwrap();
        end.timeout(now);
    }
    assert!((10..100).contains(&sent) && end.is_over(), "{sent}");
}

#[test]
fn three_repetitions_mean_a_loss() {
    let (mut end, seq, ack, now) = open_pair();
    end.segment(&repr(&plain(seq, ack, 60), &[]), now);
    end.slots(4000)[0].fill(9);
    end.host_gave(4000);
    assert!(end.next(1460, now).unwrap().data.start == 0);
    while end.next(1460, now).is_some() {}
    for _ in 0..3 {
        assert_eq!(end.next(1460, now), None);
        end.segment(&repr(&plain(seq, ack, 60), &[]), now);
    }
    assert_eq!(end.next(1460, now).unwrap().data.start, 0);
}

#[test]
fn keys() {
    let segment = repr(&plain(1, 2, 3), &[]);
    let key = key_of([10, 0, 2, 15].into(), [10, 0, 2, 2].into(), &segment);
    assert_eq!(key.guest, SocketAddr::from(([10, 0, 2, 15], 1)));
    assert_eq!(key.remote, SocketAddr::from(([10, 0, 2, 2], 2)));
}
