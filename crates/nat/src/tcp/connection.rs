//! One end of a TCP connection (RFC 9293), facing the guest, without any input or output of its own.
//!
//! The way to the guest is short and keeps packets in order; nothing is dropped on it in ordinary life. So this end has no congestion
//! control, keeps no segments that come out of order, and goes back to the first unacknowledged byte when something was lost. What it
//! does have is all that a hostile or broken peer can provoke: checks of every sequence number, bounded buffers, limits of patience.

use std::io::IoSlice;
use std::ops::Range;
use std::time::{Duration, Instant};

use smoltcp::wire::{TcpControl, TcpRepr};

use crate::ring::Ring;

/// The first time to wait for an acknowledgement; doubled each time.
const FIRST_RTO: Duration = Duration::from_millis(300);
/// The longest.
const MAX_RTO: Duration = Duration::from_secs(10);
/// So often in a row an acknowledgement is waited for in vain: some minutes, for a guest may stand still in a debugger.
const PATIENCE: u32 = 40;
/// As [`PATIENCE`], for the first answer of a guest that is connected to.
const SYN_PATIENCE: u32 = 6;
/// The shift of our window, if the guest knows window scaling (RFC 7323).
const SCALE: u8 = 7;
/// What a peer that names no maximum segment size can take (RFC 9293, 3.7.1).
const DEFAULT_MSS: u16 = 536;
/// No smaller segments are made, whatever the peer asks for.
const MIN_MSS: u16 = 88;

/// The part of a connection's life in which this end is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest's SYN is held back until its connection on the host is made.
    Held,
    /// Both SYNs are on their way; the guest's came first.
    SynReceived,
    /// Our SYN is on its way.
    SynSent,
    /// Data, and the two FINs.
    Open,
    /// Over. Nothing is sent but perhaps a reset.
    Closed,
}

/// A segment to send, without ports and checksum.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number, if there is one.
    pub ack: Option<u32>,
    /// The window field.
    pub window: u16,
    /// SYN.
    pub syn: bool,
    /// FIN.
    pub fin: bool,
    /// RST.
    pub rst: bool,
    /// PSH.
    pub psh: bool,
    /// The option of that name.
    pub mss: Option<u16>,
    /// The option of that name.
    pub window_scale: Option<u8>,
    /// Which bytes of [`Connection::data`].
    pub data: Range<usize>,
}

/// One end of a connection.
#[derive(Debug)]
pub struct Connection {
    state: State,
    /// From the guest, on the way to the host; its limit is the window.
    inbound: Ring,
    /// The next sequence number expected from the guest.
    rcv_nxt: u32,
    /// The right edge that was last told to the guest.
    rcv_edge: u32,
    guest_fin: bool,
    ack_due: bool,
    /// Acknowledgements to be sent for segments that came too early: each is one, so that the guest sees a loss (RFC 5681, 3.2).
    repeats: u8,
    /// From the host; its first byte has the number `snd_una` (once open).
    outbound: Ring,
    snd_una: u32,
    snd_nxt: u32,
    /// The highest number ever sent: an acknowledgement of more is wrong.
    snd_max: u32,
    snd_wnd: u32,
    /// The host will send no more.
    host_fin: bool,
    fin_acked: bool,
    reset_due: bool,
    mss: u16,
    own_mss: u16,
    /// Shift of the guest's window, if it scales; then we do.
    peer_scale: Option<u8>,
    dup_acks: u8,
    rto: Duration,
    tries: u32,
    deadline: Option<Instant>,
    /// A byte beyond a closed window is to be sent (RFC 9293, 3.8.6.1).
    probe: bool,
}

/// `a - b` of sequence numbers.
fn distance(a: u32, b: u32) -> i32 {
    a.wrapping_sub(b) as i32
}

impl Connection {
    fn new(state: State, isn: u32, own_mss: u16, buffer: usize) -> Self {
        Self {
            state,
            inbound: Ring::new(buffer),
            rcv_nxt: 0,
            rcv_edge: 0,
            guest_fin: false,
            ack_due: false,
            repeats: 0,
            outbound: Ring::new(buffer),
            snd_una: isn,
            snd_nxt: isn,
            snd_max: isn,
            snd_wnd: 0,
            host_fin: false,
            fin_acked: false,
            reset_due: false,
            mss: DEFAULT_MSS,
            own_mss,
            peer_scale: None,
            dup_acks: 0,
            rto: FIRST_RTO,
            tries: 0,
            deadline: None,
            probe: false,
        }
    }

    /// The guest connects by the segment `syn`; it hears nothing until [`Self::host_connected`]. `isn` is the initial sequence number,
    /// `own_mss` the largest segment that the guest may send; at most `buffer` bytes are kept in each direction.
    pub fn held(syn: &TcpRepr<'_>, isn: u32, own_mss: u16, buffer: usize) -> Self {
        let mut new = Self::new(State::Held, isn, own_mss, buffer);
        new.peer_syn(syn);
        new
    }

    /// Connects to the guest.
    pub fn connect(isn: u32, own_mss: u16, buffer: usize) -> Self {
        Self::new(State::SynSent, isn, own_mss, buffer)
    }

    fn peer_syn(&mut self, syn: &TcpRepr<'_>) {
        self.rcv_nxt = (syn.seq_number.0 as u32).wrapping_add(1);
        self.rcv_edge = self.rcv_nxt;
        self.mss = syn.max_seg_size.unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        self.peer_scale = syn.window_scale.map(|shift| shift.min(14));
        self.snd_wnd = syn.window_len.into();
    }

    /// The host's end is connected: the guest gets its answer.
    pub fn host_connected(&mut self) {
        if self.state == State::Held {
            self.state = State::SynReceived;
        }
    }

    /// The host's end has failed: the guest gets a reset.
    pub fn abort(&mut self) {
        if self.state != State::Closed {
            // A guest that has heard nothing yet gets a reset that acknowledges its SYN; one that has said nothing, nothing.
            self.reset_due = self.state != State::SynSent;
            self.close();
        }
    }

    fn close(&mut self) {
        self.state = State::Closed;
        self.deadline = None;
        self.inbound.consume(usize::MAX);
        self.outbound.consume(usize::MAX);
    }

    /// Is it over, and nothing to be sent for it?
    pub fn is_over(&self) -> bool {
        self.state == State::Closed && !self.reset_due
    }

    /// Did both sides end in order, or has it never been open? (Otherwise the host's end should be reset, too.)
    pub fn ended_in_order(&self) -> bool {
        self.guest_fin && self.fin_acked
    }

    /// Is the guest's answer, or that of the host, still to come?
    pub fn is_half_open(&self) -> bool {
        matches!(self.state, State::Held | State::SynReceived | State::SynSent)
    }

    // The host's side.

    /// What the guest sent and the host is to get.
    pub fn for_host(&self) -> [IoSlice<'_>; 2] {
        self.inbound.slices(0, usize::MAX)
    }

    /// The host took `count` bytes of [`Self::for_host`].
    pub fn host_took(&mut self, count: usize) {
        self.inbound.consume(count);
        if self.inbound.is_empty() {
            self.inbound.shrink();
            if self.is_finished() && !self.ack_due {
                self.close();
            }
        }
        // A window that was small is told to have grown, but not for every byte (RFC 9293, 3.8.6.2.2).
        let told = distance(self.rcv_edge, self.rcv_nxt).max(0) as usize;
        let gain = self.inbound.space().saturating_sub(told);
        if self.state == State::Open && gain >= self.inbound.space().div_ceil(2) && gain >= usize::from(self.own_mss) {
            self.ack_due = true;
        }
    }

    /// Has the guest said that it sends no more, and the host got all?
    pub fn guest_is_done(&self) -> bool {
        self.guest_fin && self.inbound.is_empty()
    }

    /// Bytes that may come from the host now.
    pub fn room_for_guest(&self) -> usize {
        if self.state == State::Open && !self.host_fin { self.outbound.space() } else { 0 }
    }

    /// Where they go, up to `count`; then [`Self::host_gave`].
    pub fn slots(&mut self, count: usize) -> [std::io::IoSliceMut<'_>; 2] {
        self.outbound.slots(count.min(self.room_for_guest()))
    }

    /// `count` bytes were put into [`Self::slots`].
    pub fn host_gave(&mut self, count: usize) {
        self.outbound.filled(count);
    }

    /// The host sends no more.
    pub fn host_done(&mut self) {
        self.host_fin = true;
    }

    /// Bytes for a segment.
    pub fn data(&self, range: Range<usize>) -> [IoSlice<'_>; 2] {
        self.outbound.slices(range.start, range.len())
    }

    /// The largest segment that the guest takes, in bytes of data.
    pub fn mss(&self) -> u16 {
        self.mss
    }

    // The guest's side.

    /// A segment came from the guest. Ports and checksum have been seen to.
    pub fn segment(&mut self, segment: &TcpRepr<'_>, now: Instant) {
        let seq = segment.seq_number.0 as u32;
        let ack = segment.ack_number.map(|ack| ack.0 as u32);
        match self.state {
            State::Closed => {}
            State::Held => {
                // Its SYN again, most likely. Only a reset matters.
                if segment.control == TcpControl::Rst && seq == self.rcv_nxt {
                    self.close();
                }
            }
            State::SynSent => self.answer_to_syn(segment, ack, now),
            State::SynReceived | State::Open => self.synchronized(segment, seq, ack, now),
        }
    }

    fn answer_to_syn(&mut self, segment: &TcpRepr<'_>, ack: Option<u32>, now: Instant) {
        let ours = ack == Some(self.snd_nxt) && self.snd_nxt != self.snd_una;
        match segment.control {
            TcpControl::Rst if ours => self.close(),
            TcpControl::Syn if ours => {
                self.peer_syn(segment);
                self.state = State::SynReceived;
                self.acknowledged(self.snd_nxt, now);
                self.ack_due = true;
            }
            _ => {}
        }
    }

    /// RFC 9293, 3.10.7.4, with the checks of RFC 5961.
    fn synchronized(&mut self, segment: &TcpRepr<'_>, seq: u32, ack: Option<u32>, now: Instant) {
        let behind = distance(self.rcv_nxt, seq);
        match segment.control {
            TcpControl::Rst => {
                if behind == 0 {
                    self.close();
                } else if behind < 0 && distance(seq, self.rcv_edge) <= 0 {
                    self.ack_due = true;
                }
                return;
            }
            TcpControl::Syn => {
                // The same again: so is the answer. Another one: a challenge.
                if self.state == State::SynReceived && behind == 1 {
                    self.snd_nxt = self.snd_una;
                } else {
                    self.ack_due = true;
                }
                return;
            }
            _ => {}
        }
        let Some(ack) = ack else { return };
        if distance(ack, self.snd_max) > 0 {
            self.ack_due = true;
            return;
        }
        if self.state == State::SynReceived && distance(ack, self.snd_una) <= 0 {
            return;
        }
        let fin = segment.control == TcpControl::Fin;
        let pure = segment.payload.is_empty() && !fin;
        self.take_ack(ack, segment.window_len, pure, now);
        if pure {
            // A keep-alive lies before the window and wants an answer.
            self.ack_due |= behind != 0;
            return;
        }
        self.ack_due = true;
        if behind < 0 {
            self.repeats = (self.repeats + 1).min(3);
        }
        // Out of order: it comes again. Old: it is known.
        let Some(payload) = usize::try_from(behind).ok().and_then(|known| segment.payload.get(known..)) else { return };
        if self.guest_fin || self.state != State::Open {
            return;
        }
        let taken = self.inbound.push(payload);
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken as u32);
        if fin && taken == payload.len() {
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
            self.guest_fin = true;
        }
    }

    fn take_ack(&mut self, ack: u32, window: u16, pure: bool, now: Instant) {
        let window = u32::from(window) << self.peer_scale.unwrap_or(0);
        let news = distance(ack, self.snd_una);
        if news < 0 {
            return;
        }
        if news > 0 {
            self.acknowledged(ack, now);
        } else if pure && window == self.snd_wnd && self.snd_nxt != self.snd_una {
            self.dup_acks = self.dup_acks.saturating_add(1);
            if self.dup_acks == 3 {
                self.snd_nxt = self.snd_una;
            }
        }
        self.snd_wnd = window;
        self.tries = 0;
    }

    /// All before `ack` has arrived.
    fn acknowledged(&mut self, ack: u32, now: Instant) {
        let mut count = distance(ack, self.snd_una).max(0) as usize;
        if self.state == State::SynReceived && count > 0 {
            self.state = State::Open;
            count -= 1;
        }
        if count > self.outbound.len() {
            self.fin_acked = true;
        }
        self.outbound.consume(count);
        self.snd_una = ack;
        if distance(self.snd_nxt, ack) < 0 {
            self.snd_nxt = ack;
        }
        self.dup_acks = 0;
        self.tries = 0;
        self.rto = FIRST_RTO;
        self.probe = false;
        self.deadline = (self.snd_nxt != self.snd_una).then(|| now + self.rto);
        if self.outbound.is_empty() {
            self.outbound.shrink();
        }
        if self.is_finished() && !self.ack_due {
            self.close();
        }
    }

    /// Has everything that either side had to say arrived?
    fn is_finished(&self) -> bool {
        self.ended_in_order() && self.inbound.is_empty()
    }

    /// When [`Self::timeout`] is to be called.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The deadline has passed.
    pub fn timeout(&mut self, now: Instant) {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return;
        }
        self.tries += 1;
        let patience = if self.state == State::SynSent { SYN_PATIENCE } else { PATIENCE };
        if self.tries > patience {
            return self.abort();
        }
        self.rto = (self.rto * 2).min(MAX_RTO);
        self.probe = true;
        self.snd_nxt = self.snd_una;
        self.deadline = None;
    }

    /// The next segment to send, with at most `most` bytes of data.
    pub fn next(&mut self, most: usize, now: Instant) -> Option<Segment> {
        match self.state {
            State::Held => None,
            State::Closed => std::mem::take(&mut self.reset_due).then(|| {
                self.bare(|segment| {
                    segment.rst = true;
                })
            }),
            State::SynReceived | State::SynSent => {
                if self.snd_nxt != self.snd_una {
                    return None;
                }
                self.advance(1, now);
                let answer = self.state == State::SynReceived;
                let mut syn = self.bare(|_| ());
                syn.seq = self.snd_una;
                syn.ack = syn.ack.filter(|_| answer);
                syn.syn = true;
                syn.mss = Some(self.own_mss);
                syn.window_scale = (!answer || self.peer_scale.is_some()).then_some(SCALE);
                // Not scaled yet (RFC 7323, 2.2).
                syn.window = u16::try_from(self.inbound.space()).unwrap_or(u16::MAX);
                self.rcv_edge = self.rcv_nxt.wrapping_add(syn.window.into());
                Some(syn)
            }
            State::Open => self.next_open(most, now),
        }
    }

    fn next_open(&mut self, most: usize, now: Instant) -> Option<Segment> {
        let sent = distance(self.snd_nxt, self.snd_una).max(0) as usize;
        let fin_sent = sent > self.outbound.len();
        let unsent = self.outbound.len().saturating_sub(sent);
        let window = (self.snd_wnd as usize).saturating_sub(sent);
        let mut len = unsent.min(window).min(most);
        // Small pieces at a nearly full window are not worth a segment while others are on their way (RFC 9293, 3.8.6.2.1).
        if len < unsent && len < usize::from(self.mss) && sent > 0 {
            len = 0;
        }
        if unsent > 0 && len == 0 && sent == 0 {
            if self.probe {
                len = 1;
            } else if self.deadline.is_none() {
                self.deadline = Some(now + self.rto);
            }
        }
        let fin = self.host_fin && !fin_sent && !self.fin_acked && len == unsent;
        if len == 0 && !fin {
            if self.repeats > 1 {
                self.repeats -= 1;
                return Some(self.acknowledge());
            }
            self.repeats = 0;
            return std::mem::take(&mut self.ack_due).then(|| self.acknowledge());
        }
        self.probe = false;
        let seq = self.snd_nxt;
        self.advance(len as u32 + u32::from(fin), now);
        let mut segment = self.acknowledge();
        segment.seq = seq;
        segment.fin = fin;
        segment.psh = len > 0 && len == unsent;
        segment.data = sent..sent + len;
        Some(segment)
    }

    fn advance(&mut self, count: u32, now: Instant) {
        self.snd_nxt = self.snd_nxt.wrapping_add(count);
        if distance(self.snd_nxt, self.snd_max) > 0 {
            self.snd_max = self.snd_nxt;
        }
        self.deadline.get_or_insert(now + self.rto);
    }

    /// A segment with an acknowledgement and the window.
    fn acknowledge(&mut self) -> Segment {
        self.ack_due = false;
        let shift = self.peer_scale.map_or(0, |_| SCALE);
        let window = u16::try_from(self.inbound.space() >> shift).unwrap_or(u16::MAX);
        self.rcv_edge = self.rcv_nxt.wrapping_add(u32::from(window) << shift);
        let segment = self.bare(|segment| segment.window = window);
        if self.is_finished() {
            self.close();
        }
        segment
    }

    fn bare(&self, change: impl FnOnce(&mut Segment)) -> Segment {
        let mut segment = Segment {
            seq: self.snd_nxt,
            ack: Some(self.rcv_nxt),
            window: 0,
            syn: false,
            fin: false,
            rst: false,
            psh: false,
            mss: None,
            window_scale: None,
            data: 0..0,
        };
        change(&mut segment);
        segment
    }
}
