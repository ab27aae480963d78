//! One connection: the bytes in both directions and the credit for them (virtio 1.3, 5.10.6.3), and how far each end has closed it.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::packet::{Header, NO_RECEIVE, NO_SEND, op};
use super::stream;

/// Bytes from the guest that a connection holds for the host's end: what the guest is told it may send.
pub(super) const BUFFER: u32 = 256 << 10;

/// Who is at a connection's ends: the host's port and the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ports {
    pub host: u32,
    pub guest: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// The guest was asked and has not answered.
    Asked,
    Open,
    /// The host's end is gone; the guest was told and has not answered.
    Closing,
}

/// What the caller has to do after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Go,
    /// End the connection, telling the guest.
    Reset,
}

pub(super) struct Connection {
    pub phase: Phase,
    /// The number under which the epoll set knows it.
    pub token: u64,
    stream: Option<OwnedFd>,
    /// From the guest, for the stream.
    buffer: VecDeque<u8>,
    /// Bytes that have left [`Self::buffer`], ever; wraps. And what the guest knows of that.
    forwarded: u32,
    told: u32,
    /// Bytes sent to the guest, ever; wraps.
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
    /// The stream may give something, take something.
    readable: bool,
    writable: bool,
    hung_up: bool,
    /// SHUTDOWN bits that hold: the guest's, ours, and those of ours that the guest knows.
    guest_shut: u32,
    host_shut: u32,
    host_shut_told: u32,
    /// It is in the list of those with something for the guest.
    pub listed: bool,
}

impl Connection {
    pub(super) fn new(stream: OwnedFd, token: u64, phase: Phase) -> Self {
        Self {
            phase,
            token,
            stream: Some(stream),
            buffer: VecDeque::new(),
            forwarded: 0,
            told: 0,
            sent: 0,
            peer_alloc: 0,
            peer_forwarded: 0,
            readable: true,
            writable: true,
            hung_up: false,
            guest_shut: 0,
            host_shut: 0,
            host_shut_told: 0,
            listed: false,
        }
    }

    pub(super) fn ready(&mut self, ready: stream::Ready) {
        self.readable |= ready.readable;
        self.writable |= ready.writable;
        self.hung_up |= ready.hung_up;
        self.close_for_good();
    }

    /// When the host's end is gone and nothing of it is wanted any more, both directions are closed.
    fn close_for_good(&mut self) {
        if self.hung_up && (self.host_shut & NO_SEND != 0 || self.guest_shut & NO_RECEIVE != 0) {
            self.host_shut = NO_SEND | NO_RECEIVE;
        }
    }

    /// Has the host's end hung up before the guest answered?
    pub(super) fn is_abandoned(&self) -> bool {
        self.phase == Phase::Asked && self.hung_up
    }

    /// Takes what every packet says of the guest's buffer.
    pub(super) fn credit(&mut self, header: &Header) {
        self.peer_alloc = header.buf_alloc;
        self.peer_forwarded = header.fwd_cnt;
    }

    /// Bytes that the guest has room for.
    fn room(&self) -> u32 {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Fills in what every packet to the guest says of our buffer.
    pub(super) fn stamp(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER;
        header.fwd_cnt = self.forwarded;
        self.told = self.forwarded;
    }

    /// Data from the guest.
    pub(super) fn data(&mut self, data: &[u8]) -> Next {
        if self.guest_shut & NO_SEND != 0 || self.buffer.len() + data.len() > BUFFER as usize {
            return Next::Reset;
        }
        self.buffer.extend(data);
        self.flush()
    }

    /// The guest closes directions.
    pub(super) fn shutdown(&mut self, flags: u32) -> Next {
        self.guest_shut |= flags & (NO_RECEIVE | NO_SEND);
        if self.guest_shut & NO_RECEIVE != 0
            && let Some(stream) = &self.stream
        {
            stream::shut(stream, libc::SHUT_RD);
        }
        self.close_for_good();
        self.flush()
    }

    /// Gives the stream what waits for it.
    pub(super) fn flush(&mut self) -> Next {
        while self.writable && !self.buffer.is_empty() {
            let Some(stream) = &self.stream else { break };
            let piece = self.buffer.as_slices().0;
            match stream::write(stream, piece) {
                Ok(Some(len)) => {
                    self.buffer.drain(..len.min(piece.len()));
                    self.forwarded = self.forwarded.wrapping_add(len as u32);
                }
                Ok(None) => self.writable = false,
                Err(_) => {
                    // Nobody reads any more.
                    self.discard();
                    self.host_shut |= NO_RECEIVE;
                }
            }
        }
        if self.stream.is_none() {
            self.discard();
        }
        if self.buffer.is_empty() && self.guest_shut & NO_SEND != 0 {
            if self.guest_shut & NO_RECEIVE != 0 {
                return Next::Reset;
            }
            if let Some(stream) = &self.stream {
                stream::shut(stream, libc::SHUT_WR);
            }
        }
        Next::Go
    }

    fn discard(&mut self) {
        self.forwarded = self.forwarded.wrapping_add(self.buffer.len() as u32);
        self.buffer.clear();
    }

    /// May there be something for the guest?
    pub(super) fn has_something(&self) -> bool {
        match self.phase {
            Phase::Asked => false,
            Phase::Closing => self.host_shut != self.host_shut_told,
            Phase::Open => {
                self.host_shut != self.host_shut_told || self.owes_credit() || (self.may_read() && self.room() > 0)
            }
        }
    }

    fn may_read(&self) -> bool {
        self.readable && self.stream.is_some() && self.host_shut & NO_SEND == 0 && self.guest_shut & NO_RECEIVE == 0
    }

    /// A quarter of the buffer is free and the guest does not know.
    fn owes_credit(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= BUFFER / 4
    }

    /// The next packet for the guest: fills in operation, flags and length of `header`, and puts the payload, at most `room` bytes,
    /// into `payload`. `false`: there is none after all.
    pub(super) fn next_packet(&mut self, room: usize, header: &mut Header, payload: &mut Vec<u8>) -> bool {
        payload.clear();
        if self.phase == Phase::Asked {
            return false;
        }
        if self.host_shut == self.host_shut_told && self.may_read() && self.room() > 0 {
            payload.resize(room.min(self.room() as usize), 0);
            match self.stream.as_ref().map(|stream| stream::read(stream, payload)) {
                Some(Ok(Some(len))) if len > 0 => {
                    payload.truncate(len);
                    self.sent = self.sent.wrapping_add(len as u32);
                    header.op = op::RW;
                    header.len = len as u32;
                    return true;
                }
                Some(Ok(None)) => self.readable = false,
                _ => self.host_shut |= NO_SEND,
            }
            payload.clear();
        }
        self.close_for_good();
        if self.host_shut != self.host_shut_told {
            self.host_shut_told = self.host_shut;
            if self.host_shut == NO_RECEIVE | NO_SEND {
                self.phase = Phase::Closing;
                self.stream = None;
                self.discard();
            }
            header.op = op::SHUTDOWN;
            header.flags = self.host_shut;
            return true;
        }
        if self.owes_credit() {
            header.op = op::CREDIT_UPDATE;
            return true;
        }
        false
    }

    /// Tells a host's end that asked by name that the guest has taken the connection.
    pub(super) fn opened(&mut self, answer: &[u8]) -> Next {
        self.phase = Phase::Open;
        // A few bytes into an empty socket: they fit, or nobody is there.
        match self.stream.as_ref().map(|stream| stream::write(stream, answer)) {
            Some(Ok(Some(len))) if len == answer.len() => Next::Go,
            _ => Next::Reset,
        }
    }
}
