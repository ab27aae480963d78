//! A queue of bytes with a limit, which takes memory only as it fills.

use std::io::{IoSlice, IoSliceMut};

/// The first allocation, in bytes.
const FIRST: usize = 4096;

/// A queue of at most `limit` bytes.
#[derive(Debug)]
pub struct Ring {
    bytes: Box<[u8]>,
    head: usize,
    len: usize,
    limit: usize,
}

impl Ring {
    /// An empty queue.
    pub fn new(limit: usize) -> Self {
        Self { bytes: Box::default(), head: 0, len: 0, limit }
    }

    /// Bytes in it.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing in it?
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes it can still take.
    pub fn space(&self) -> usize {
        self.limit - self.len
    }

    /// Makes room for `more` bytes, or as many as the limit allows.
    fn reserve(&mut self, more: usize) {
        let needed = self.len + more.min(self.space());
        if needed <= self.bytes.len() {
            return;
        }
        let size = needed.next_power_of_two().max(FIRST).min(self.limit.max(needed));
        let mut bytes = Vec::with_capacity(size);
        for slice in self.slices(0, self.len) {
            bytes.extend_from_slice(&slice);
        }
        bytes.resize(size, 0);
        (self.bytes, self.head) = (bytes.into_boxed_slice(), 0);
    }

    /// Appends as much of `data` as there is space for; returns how much.
    pub fn push(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(self.space());
        self.reserve(count);
        let mut rest = data.get(..count).unwrap_or_default();
        for mut slot in self.slots(count) {
            let (now, later) = rest.split_at(slot.len().min(rest.len()));
            if let Some(slot) = slot.get_mut(..now.len()) {
                slot.copy_from_slice(now);
            }
            rest = later;
        }
        self.len += count;
        count
    }

    /// Where up to `count` bytes behind the last can be put; [`Self::filled`] makes them part of the queue.
    pub fn slots(&mut self, count: usize) -> [IoSliceMut<'_>; 2] {
        let count = count.min(self.space());
        self.reserve(count);
        let size = self.bytes.len();
        let tail = if self.head + self.len < size { self.head + self.len } else { self.head + self.len - size };
        let first = count.min(size - tail);
        let (front, back) = self.bytes.split_at_mut(tail);
        let back = back.get_mut(..first).unwrap_or_default();
        let front = front.get_mut(..count - first).unwrap_or_default();
        [IoSliceMut::new(back), IoSliceMut::new(front)]
    }

    /// `count` bytes were put into [`Self::slots`].
    pub fn filled(&mut self, count: usize) {
        self.len = (self.len + count).min(self.bytes.len());
    }

    /// `count` bytes from the `from`th on, in two pieces; fewer when there are not so many.
    pub fn slices(&self, from: usize, count: usize) -> [IoSlice<'_>; 2] {
        let from = from.min(self.len);
        let count = count.min(self.len - from);
        let size = self.bytes.len();
        let start = if self.head + from < size { self.head + from } else { self.head + from - size };
        let first = count.min(size - start);
        [
            IoSlice::new(self.bytes.get(start..start + first).unwrap_or_default()),
            IoSlice::new(self.bytes.get(..count - first).unwrap_or_default()),
        ]
    }

    /// Drops the first `count` bytes. An empty queue holds no more memory than a small one.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len -= count;
        self.head += count;
        if self.head >= self.bytes.len() {
            self.head -= self.bytes.len();
        }
        if self.len == 0 {
            self.head = 0;
        }
    }

    /// Gives unused memory back.
    pub fn shrink(&mut self) {
        if self.len == 0 {
            self.bytes = Box::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    proptest! {
        #[test]
        fn is_a_queue(limit in 1usize..20_000, steps in prop::collection::vec((0usize..9000, 0usize..9000, any::<bool>()), 1..30)) {
            let (mut ring, mut model) = (Ring::new(limit), VecDeque::new());
            let mut next = 0u8;
            for (add, take, by_slots) in steps {
                let data: Vec<u8> = (0..add).map(|_| { next = next.wrapping_add(1); next }).collect();
                let added = if by_slots {
                    let mut done = 0;
                    for mut slot in ring.slots(add) {
                        let n = slot.len();
                        slot.copy_from_slice(&data[done..done + n]);
                        done += n;
                    }
                    ring.filled(done);
                    done
                } else {
                    ring.push(&data)
                };
                prop_assert_eq!(added, add.min(limit - model.len()));
                model.extend(&data[..added]);
                prop_assert_eq!(ring.slices(0, usize::MAX).concat_all(), model.iter().copied().collect::<Vec<_>>());
                let part = ring.slices(take, 100).concat_all();
                prop_assert_eq!(part, model.iter().copied().skip(take).take(100).collect::<Vec<_>>());
                ring.consume(take);
                model.drain(..take.min(model.len()));
                prop_assert_eq!((ring.len(), ring.space()), (model.len(), limit - model.len()));
                if take % 2 == 0 {
                    ring.shrink();
                }
            }
        }
    }

    trait ConcatAll {
        fn concat_all(&self) -> Vec<u8>;
    }

    impl ConcatAll for [IoSlice<'_>; 2] {
        fn concat_all(&self) -> Vec<u8> {
            self.iter().flat_map(|slice| slice.to_vec()).collect()
        }
    }
}
