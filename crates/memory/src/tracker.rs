//! Which guest-physical pages hold translated code, and who wants to know about writes to them.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

use vm_memory::bitmap::{Bitmap, BitmapSlice, NewBitmap, WithBitmapSlice};

use crate::PAGE_SIZE;

/// Told when guest memory that holds translated code was written by somebody other than translated code itself.
pub trait CodeWriteListener: Send + Sync {
    /// Guest-physical bytes `gpa..gpa + len` have just been written; at least one page of the range had its bit set.
    /// Called on the writer's thread, with no lock of this crate held.
    fn code_written(&self, gpa: u64, len: u64);
}

/// A bit for each guest-physical page: does an engine hold a translation of code on it?
pub struct CodePages {
    bits: Box<[AtomicU64]>,
    listener: OnceLock<Arc<dyn CodeWriteListener>>,
}

impl fmt::Debug for CodePages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CodePages").field("pages", &(self.bits.len() * 64)).finish_non_exhaustive()
    }
}

impl CodePages {
    /// Bits for the guest-physical addresses below `end` (bytes).
    pub fn new(end: u64) -> Self {
        let words = end.div_ceil(PAGE_SIZE).div_ceil(64);
        Self { bits: (0..words).map(|_| AtomicU64::new(0)).collect(), listener: OnceLock::new() }
    }

    /// Sets who is told of writes. Only the first call has an effect: a VM has one engine.
    pub fn set_listener(&self, listener: Arc<dyn CodeWriteListener>) {
        let _ = self.listener.set(listener);
    }

    /// Marks the page with number `page` (guest-physical address / 4096) as holding translated code.
    pub fn set(&self, page: u64) {
        if let Some(word) = self.bits.get((page / 64) as usize) {
            word.fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
    }

    /// Clears the mark of page number `page`.
    pub fn clear(&self, page: u64) {
        if let Some(word) = self.bits.get((page / 64) as usize) {
            word.fetch_and(!(1 << (page % 64)), Ordering::SeqCst);
        }
    }

    /// Does page number `page` hold translated code?
    #[inline]
    pub fn test(&self, page: u64) -> bool {
        self.bits.get((page / 64) as usize).is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (page % 64)) != 0)
    }

    /// To be called after guest-physical bytes `gpa..gpa + len` were written.
    #[inline]
    pub fn written(&self, gpa: u64, len: u64) {
        if len == 0 {
            return;
        }
        let last = gpa.saturating_add(len - 1) / PAGE_SIZE;
        if (gpa / PAGE_SIZE..=last).any(|page| self.test(page))
            && let Some(listener) = self.listener.get()
        {
            listener.code_written(gpa, len);
        }
    }
}

/// The `vm-memory` bitmap of one RAM region: turns "offset written" into [`CodePages::written`].
#[derive(Clone, Debug)]
pub struct WriteTracker {
    base: u64,
    pages: Option<Arc<CodePages>>,
}

impl WriteTracker {
    /// A tracker for the region that starts at guest-physical address `base`.
    pub fn new(base: u64, pages: Arc<CodePages>) -> Self {
        Self { base, pages: Some(pages) }
    }

    /// Guest-physical address of the first byte that it tracks.
    pub fn start(&self) -> u64 {
        self.base
    }
}

impl Default for WriteTracker {
    /// A tracker that tracks nothing; `vm-memory` asks for one.
    fn default() -> Self {
        Self { base: 0, pages: None }
    }
}

impl WithBitmapSlice<'_> for WriteTracker {
    type S = WriteTracker;
}

impl BitmapSlice for WriteTracker {}

impl Bitmap for WriteTracker {
    #[inline]
    fn mark_dirty(&self, offset: usize, len: usize) {
        if let Some(pages) = &self.pages {
            // A vCPU marks a page, then copies its code. Without the barrier, our writes could come after its copy and yet our look at
            // the mark before its marking.
            fence(Ordering::SeqCst);
            pages.written(self.base + offset as u64, len as u64);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.pages.as_ref().is_some_and(|pages| pages.test((self.base + offset as u64) / PAGE_SIZE))
    }

    fn slice_at(&self, offset: usize) -> WriteTracker {
        WriteTracker { base: self.base + offset as u64, pages: self.pages.clone() }
    }
}

impl NewBitmap for WriteTracker {
    fn with_len(_len: usize) -> Self {
        Self::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Recorder(Mutex<Vec<(u64, u64)>>);

    impl CodeWriteListener for Recorder {
        fn code_written(&self, gpa: u64, len: u64) {
            self.0.lock().unwrap().push((gpa, len));
        }
    }

    #[test]
    fn tells_only_of_marked_pages() {
        let pages = Arc::new(CodePages::new(1 << 20));
        let recorder = Arc::new(Recorder(Mutex::new(Vec::new())));
        pages.set_listener(recorder.clone());
        pages.set(3);
        let tracker = WriteTracker::new(0x1000, pages.clone());
        tracker.mark_dirty(0, 0x1000);
        tracker.slice_at(0x1000).mark_dirty(0xfff, 2);
        tracker.mark_dirty(0, 0);
        pages.clear(3);
        tracker.mark_dirty(0x2000, 8);
        assert_eq!(*recorder.0.lock().unwrap(), [(0x2fff, 2)]);
    }
}
