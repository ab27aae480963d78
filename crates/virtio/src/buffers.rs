//! The buffers of a descriptor chain: pieces of guest memory, taken from the front or the back as a device reads its header, data and
//! status whatever the driver's framing (virtio 1.3, 2.7.4: devices must not rely on it).

use std::collections::VecDeque;
use std::sync::atomic::{Ordering, fence};

use memory::WriteTracker;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::Bitmap;

/// A sequence of pieces of guest memory. Its length fits 32 bits, as that of a chain does.
#[derive(Clone, Debug, Default)]
pub struct Buffers<'m> {
    pieces: VecDeque<VolatileSlice<'m, WriteTracker>>,
    len: u32,
}

impl<'m> Buffers<'m> {
    /// Appends a piece. The caller (the walk along a chain) keeps the sum of the lengths within 32 bits.
    pub(crate) fn add(&mut self, piece: VolatileSlice<'m, WriteTracker>) {
        self.len = self.len.saturating_add(piece.len() as u32);
        self.pieces.push_back(piece);
    }

    /// Bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// No bytes?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Cuts off the first `count` bytes and returns them; `None` (and nothing cut) when there are fewer.
    pub fn take_front(&mut self, count: u32) -> Option<Self> {
        if count > self.len {
            return None;
        }
        let mut front = Self::default();
        while front.len < count {
            let piece = self.pieces.pop_front()?;
            let want = (count - front.len) as usize;
            if piece.len() > want {
                let (head, tail) = piece.split_at(want).ok()?;
                self.pieces.push_front(tail);
                front.add(head);
            } else {
                front.add(piece);
            }
        }
        self.len -= count;
        Some(front)
    }

    /// Cuts off the last `count` bytes and returns them; `None` (and nothing cut) when there are fewer.
    pub fn take_back(&mut self, count: u32) -> Option<Self> {
        let rest = self.len.checked_sub(count)?;
        let front = self.take_front(rest)?;
        Some(std::mem::replace(self, front))
    }

    /// Reads from the front into `data` and cuts off what was read; returns the number of bytes.
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX).min(self.len);
        let mut done = 0;
        for piece in self.take_front(count).unwrap_or_default().pieces {
            if let Some(to) = data.get_mut(done..) {
                done += piece.copy_to(to);
            }
        }
        done
    }

    /// Reads exactly `N` bytes from the front and cuts them off; `None` when there are fewer.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut data = [0; N];
        (self.len as usize >= N && self.read(&mut data) == N).then_some(data)
    }

    /// Writes `data` to the front and cuts off what was written; returns the number of bytes. Tells the code tracker.
    pub fn write(&mut self, data: &[u8]) -> usize {
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX).min(self.len);
        let mut done = 0;
        for piece in self.take_front(count).unwrap_or_default().pieces {
            if let Some(from) = data.get(done..) {
                let n = piece.len().min(from.len());
                piece.copy_from(from);
                done += n;
            }
        }
        done
    }

    /// Reads from the front into memory that others may use at the same time, as [`Self::read`] does.
    pub fn read_volatile(&mut self, to: &VolatileSlice<'_, ()>) -> usize {
        let count = u32::try_from(to.len()).unwrap_or(u32::MAX).min(self.len);
        let mut done = 0;
        for piece in self.take_front(count).unwrap_or_default().pieces {
            if let Ok(rest) = to.offset(done) {
                piece.copy_to_volatile_slice(rest);
                done += piece.len();
            }
        }
        done
    }

    /// Writes to the front from memory that others may use at the same time, as [`Self::write`] does.
    pub fn write_volatile(&mut self, from: &VolatileSlice<'_, ()>) -> usize {
        let count = u32::try_from(from.len()).unwrap_or(u32::MAX).min(self.len);
        let mut done = 0;
        for piece in self.take_front(count).unwrap_or_default().pieces {
            if let Ok(rest) = from.offset(done) {
                let n = piece.len();
                rest.copy_to_volatile_slice(piece);
                done += n;
            }
        }
        done
    }

    /// The host addresses of the pieces, for `readv` and `writev`; at most `max` pieces. Valid as long as the guest memory is
    /// mapped, so for `'m`. After writing through them call [`Self::written`] before anything else.
    pub fn iovecs(&self, max: usize) -> Vec<libc::iovec> {
        self.pieces
            .iter()
            .take(max)
            .map(|piece| libc::iovec { iov_base: piece.ptr_guard_mut().as_ptr().cast(), iov_len: piece.len() })
            .collect()
    }

    /// The pieces for a disk to read or write. After writing through them call [`Self::written`] before anything else.
    pub fn slices(&self) -> Vec<VolatileSlice<'m, ()>> {
        self.pieces
            .iter()
            // SAFETY: the same memory for the same time; only the tracker is left away, for which the caller stands in.
            .map(|piece| unsafe { VolatileSlice::new(piece.ptr_guard_mut().as_ptr(), piece.len()) })
            .collect()
    }

    /// Guest-physical address and length in bytes of each piece.
    pub fn places(&self) -> impl Iterator<Item = (u64, u64)> {
        self.pieces.iter().map(|piece| (piece.bitmap().start(), piece.len() as u64))
    }

    /// Tells the code tracker that the first `count` bytes were written through [`Self::slices`].
    pub fn written(&self, count: u32) {
        // The data must be visible before the tracker's bits are read: an engine sets its bit first and then reads the code.
        fence(Ordering::SeqCst);
        let mut left = count as usize;
        for piece in &self.pieces {
            let n = piece.len().min(left);
            if n == 0 {
                break;
            }
            piece.bitmap().mark_dirty(0, n);
            left -= n;
        }
    }
}
