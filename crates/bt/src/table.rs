//! A table that one thread at a time appends to, under a lock of its own, and that any thread reads without one.
//!
//! Translated code names its exits by number. Looking a number up is on every path out of the code cache, on all vCPUs at once, so
//! it must not wait for a vCPU that translates. Elements never move: the table is a list of chunks, each twice as long as
//! the one before.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Elements of the first chunk.
const FIRST: usize = 1 << 10;
/// Enough for all 32-bit numbers.
const CHUNKS: usize = 23;

/// The table.
pub struct Table<T> {
    chunks: [AtomicPtr<MaybeUninit<T>>; CHUNKS],
    len: AtomicU32,
}

/// Chunk, place in it, and the chunk's length.
fn place(index: u32) -> (usize, usize, usize) {
    let n = index as usize + FIRST;
    let chunk = (n / FIRST).ilog2() as usize;
    let length = FIRST << chunk;
    (chunk, n - length, length)
}

impl<T: Copy> Table<T> {
    pub fn new() -> Self {
        Self { chunks: [const { AtomicPtr::new(std::ptr::null_mut()) }; CHUNKS], len: AtomicU32::new(0) }
    }

    /// How many elements there are.
    pub fn len(&self) -> u32 {
        self.len.load(Ordering::Acquire)
    }

    /// Element `index`.
    #[inline]
    pub fn get(&self, index: u32) -> Option<T> {
        if index >= self.len() {
            return None;
        }
        let (chunk, at, _) = place(index);
        let start = self.chunks[chunk].load(Ordering::Acquire);
        // SAFETY: elements below `len` are written before `len` is raised over them (release, acquire above), and not again before
        // `clear`, which is not called while others read. The chunk is never freed while `self` lives.
        Some(unsafe { (*start.add(at)).assume_init() })
    }

    /// Appends an element and returns its number. One caller at a time.
    pub fn push(&self, value: T) -> u32 {
        let index = self.len.load(Ordering::Relaxed);
        let (chunk, at, length) = place(index);
        let mut start = self.chunks[chunk].load(Ordering::Relaxed);
        if start.is_null() {
            let fresh: Box<[MaybeUninit<T>]> = Box::new_uninit_slice(length);
            start = Box::into_raw(fresh).cast();
            self.chunks[chunk].store(start, Ordering::Release);
        }
        // SAFETY: inside the chunk, by `place`; nobody reads it before `len` is raised.
        unsafe { (*start.add(at)).write(value) };
        self.len.store(index + 1, Ordering::Release);
        index
    }

    /// Empties the table; the memory stays for the next elements. Nobody may read meanwhile.
    pub fn clear(&self) {
        self.len.store(0, Ordering::Release);
    }
}

impl<T> Drop for Table<T> {
    fn drop(&mut self) {
        for (chunk, start) in self.chunks.iter().enumerate() {
            let start = start.load(Ordering::Relaxed);
            if !start.is_null() {
                let slice = std::ptr::slice_from_raw_parts_mut(start, FIRST << chunk);
                // SAFETY: made by `Box::into_raw` of a slice of this length in `push`.
                drop(unsafe { Box::from_raw(slice) });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        assert_eq!(place(0), (0, 0, FIRST));
        assert_eq!(place(FIRST as u32 - 1), (0, FIRST - 1, FIRST));
        assert_eq!(place(FIRST as u32), (1, 0, 2 * FIRST));
        assert_eq!(place(3 * FIRST as u32 - 1), (1, 2 * FIRST - 1, 2 * FIRST));
        assert_eq!(place(3 * FIRST as u32), (2, 0, 4 * FIRST));
        let (chunk, at, length) = place(u32::MAX - 1);
        assert!(chunk < CHUNKS && at < length);
    }

    #[test]
    fn readers_see_whole_elements() {
        let table = Table::<[u64; 3]>::new();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut seen = 0;
                    while seen < 20_000 {
                        seen = table.len();
                        let Some(last) = seen.checked_sub(1) else { continue };
                        assert_eq!(table.get(last), Some([u64::from(last); 3]));
                        assert_eq!(table.get(last / 2), Some([u64::from(last / 2); 3]));
                    }
                });
            }
            for n in 0..20_000 {
                assert_eq!(table.push([u64::from(n); 3]), n);
            }
        });
        table.clear();
        assert_eq!(table.get(0), None);
        assert_eq!(table.push([1; 3]), 0);
    }
}
