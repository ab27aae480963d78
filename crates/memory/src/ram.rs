//! The VM's RAM and where it lies in the guest-physical address space.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::{CodePages, WriteTracker};

/// The guest-physical address map: where RAM ends and devices begin.
pub mod layout {
    /// RAM below this address is contiguous from 0; the rest of RAM continues at [`HIGH_RAM_START`].
    pub const LOW_RAM_END: u64 = 0xC000_0000;
    /// Where RAM beyond the first 3 GiB starts.
    pub const HIGH_RAM_START: u64 = 0x1_0000_0000;
    /// Smallest RAM size accepted, in bytes.
    pub const MIN_RAM: u64 = 32 << 20;
    /// Largest RAM size accepted, in bytes.
    pub const MAX_RAM: u64 = 1 << 40;
}

/// The `vm-memory` type behind [`GuestRam`].
pub type VmMemory = GuestMemoryMmap<WriteTracker>;

/// Why RAM could not be made.
#[derive(Debug)]
pub enum RamError {
    /// The size is not a multiple of 4 KiB or out of range.
    Size(u64),
    /// The host gave no memory.
    Host(String),
}

impl std::fmt::Display for RamError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(bytes) => write!(
                f,
                "a guest memory of {bytes} bytes is not possible: choose a multiple of 4 KiB between {} MiB and {} GiB",
                layout::MIN_RAM >> 20,
                layout::MAX_RAM >> 30
            ),
            Self::Host(why) => {
                write!(f, "the host gives no memory for the guest ({why}): choose a smaller --memory or free some")
            }
        }
    }
}

impl std::error::Error for RamError {}

/// Where RAM at guest-physical `gpa` is in its file: pieces follow each other.
const fn in_file(gpa: u64) -> u64 {
    if gpa < layout::LOW_RAM_END { gpa } else { gpa - (layout::HIGH_RAM_START - layout::LOW_RAM_END) }
}

/// The RAM of one VM. Cheap to clone: clones are the same memory.
#[derive(Clone, Debug)]
pub struct GuestRam {
    memory: Arc<VmMemory>,
    code_pages: Arc<CodePages>,
    size: u64,
    /// Its pieces, of which there are one or two: guest-physical start, length, and host address. [`Self::host_page`] is on the way of each walk of page tables.
    pieces: [(u64, u64, usize); 2],
    /// What it is a mapping of, where other processes are to have it, too.
    file: Option<Arc<File>>,
}

impl GuestRam {
    /// Maps `size` bytes of zeroed RAM, lazily backed by the host, for this process alone.
    ///
    /// # Errors
    /// [`RamError`] for an impossible size or when the host refuses the mapping.
    pub fn new(size: u64) -> Result<Self, RamError> {
        Self::map(size, None)
    }

    /// As [`Self::new`], but of a file in memory, which other processes may map: see [`Self::file`].
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn shareable(size: u64) -> Result<Self, RamError> {
        // SAFETY: a plain system call; the new file descriptor belongs to the returned value.
        let file = unsafe {
            match libc::memfd_create(c"tightrope-ram".as_ptr(), libc::MFD_CLOEXEC) {
                -1 => return Err(RamError::Host(std::io::Error::last_os_error().to_string())),
                file => File::from_raw_fd(file),
            }
        };
        file.set_len(size).map_err(|error| RamError::Host(error.to_string()))?;
        Self::map(size, Some(Arc::new(file)))
    }

    fn map(size: u64, file: Option<Arc<File>>) -> Result<Self, RamError> {
        if !(layout::MIN_RAM..=layout::MAX_RAM).contains(&size) || !size.is_multiple_of(crate::PAGE_SIZE) {
            return Err(RamError::Size(size));
        }
        let low = size.min(layout::LOW_RAM_END);
        let high = size - low;
        let end = if high > 0 { layout::HIGH_RAM_START + high } else { low };
        let code_pages = Arc::new(CodePages::new(end));
        let mut regions = Vec::new();
        for (base, len) in [(0, low), (layout::HIGH_RAM_START, high)] {
            if len == 0 {
                continue;
            }
            let builder = MmapRegionBuilder::new_with_bitmap(len as usize, WriteTracker::new(base, code_pages.clone()))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
            let builder = match &file {
                Some(file) => builder
                    .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                    .with_file_offset(FileOffset::from_arc(file.clone(), in_file(base))),
                None => builder.with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            };
            let mapping = builder.build().map_err(|e| RamError::Host(e.to_string()))?;
            // SAFETY: the range was just mapped by us and stays mapped as long as `mapping` lives; advice cannot
            // change its contents.
            unsafe { libc::madvise(mapping.as_ptr().cast(), len as usize, libc::MADV_HUGEPAGE) };
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(base)).ok_or(RamError::Size(size))?);
        }
        let memory = VmMemory::from_regions(regions).map_err(|e| RamError::Host(e.to_string()))?;
        let mut pieces = [(0, 0, 0); 2];
        for (piece, region) in pieces.iter_mut().zip(memory.iter()) {
            *piece = (region.start_addr().0, region.len(), region.as_ptr() as usize);
        }
        Ok(Self { memory: Arc::new(memory), code_pages, size, pieces, file })
    }

    /// The file that all of RAM is in, if it was made [shareable](Self::shareable).
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.file.as_ref().map(|file| file.as_fd())
    }

    /// Is it known without a look that all `len` bytes from guest-physical `gpa` on are zero, as nobody has ever written them? (To look would make
    /// the host give memory for them where RAM is a file.)
    pub fn is_untouched(&self, gpa: u64, len: u64) -> bool {
        let (Some(file), Some(offset)) = (&self.file, self.offset_in_file(gpa)) else { return false };
        // SAFETY: a plain system call on our own file, whose position nobody else uses.
        let data = unsafe { libc::lseek(file.as_raw_fd(), offset as libc::off_t, libc::SEEK_DATA) };
        // ENXIO: there is no data from there on.
        data >= 0 && data as u64 >= offset + len
            || data < 0 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ENXIO)
    }

    /// Where guest-physical `gpa` is in that file, if it is RAM. Pages that follow each other there do so in the file, except at
    /// [`layout::LOW_RAM_END`].
    pub fn offset_in_file(&self, gpa: u64) -> Option<u64> {
        self.file.as_ref()?;
        self.host_page(gpa)?;
        Some(in_file(gpa))
    }

    /// Makes a range of whole pages read as zeros, and gives its memory back.
    ///
    /// # Safety
    /// The range is RAM.
    unsafe fn drop_pages(&self, host: *mut u8, len: u64) -> std::io::Result<()> {
        let how = if self.file.is_some() { libc::MADV_REMOVE } else { libc::MADV_DONTNEED };
        // SAFETY: the caller's: the range is a mapping of ours, which reads as zeros after this; nobody holds references into it (all access is by
        // volatile or atomic operations).
        match unsafe { libc::madvise(host.cast(), len as usize, how) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    /// The memory as `vm-memory` sees it.
    pub fn memory(&self) -> &VmMemory {
        &self.memory
    }

    /// The memory as `vm-memory` sees it, shared.
    pub fn shared(&self) -> Arc<VmMemory> {
        self.memory.clone()
    }

    /// Which pages hold translated code.
    pub fn code_pages(&self) -> &Arc<CodePages> {
        &self.code_pages
    }

    /// Bytes of RAM.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// `(guest-physical start, host address, length in bytes)` of each contiguous piece of RAM.
    pub fn pieces(&self) -> Vec<(u64, *mut u8, u64)> {
        self.memory
            .iter()
            .filter_map(|region| {
                let host = self.memory.get_host_address(region.start_addr()).ok()?;
                Some((region.start_addr().0, host, region.len()))
            })
            .collect()
    }

    /// The host address of guest-physical page `gpa` (rounded down to the page), or `None` where there is no RAM.
    #[inline]
    pub fn host_page(&self, gpa: u64) -> Option<*mut u8> {
        let gpa = gpa & !(crate::PAGE_SIZE - 1);
        let piece = self.pieces.iter().find(|(start, len, _)| gpa.wrapping_sub(*start) < *len);
        piece.map(|(start, _, host)| (host + (gpa - start) as usize) as *mut u8)
    }

    /// The aligned 8 bytes at guest-physical address `gpa` as an atomic, or `None` where they are not RAM or `gpa` is not a multiple
    /// of 8. Whoever writes through it must call [`CodePages::written`] afterwards.
    #[inline]
    pub fn atomic_u64(&self, gpa: u64) -> Option<&AtomicU64> {
        if !gpa.is_multiple_of(8) {
            return None;
        }
        let host = self.host_page(gpa)?.wrapping_add((gpa & (crate::PAGE_SIZE - 1)) as usize);
        // SAFETY: the page is mapped RAM as long as `self` lives (regions are whole pages); the address is aligned and stays inside
        // the page; all access to guest RAM is by volatile or atomic operations, as the guest itself may write at any time.
        Some(unsafe { AtomicU64::from_ptr(host.cast()) })
    }

    /// Makes all of RAM zero again and gives its memory back to the host. No vCPU may run, and no engine hold translations.
    ///
    /// # Errors
    /// The host refuses.
    pub fn clear(&self) -> std::io::Result<()> {
        for (_, host, len) in self.pieces() {
            // SAFETY: the piece is RAM.
            unsafe { self.drop_pages(host, len)? };
        }
        Ok(())
    }

    /// Gives the memory of all whole pages within guest-physical `gpa..gpa + len` back to the host; they read as zeros until somebody
    /// writes them, and translations of code on them are dropped. Returns the bytes given back: 0 where a byte is not RAM.
    ///
    /// # Errors
    /// The host refuses.
    pub fn discard(&self, gpa: u64, len: u64) -> std::io::Result<u64> {
        let whole = || {
            let start = gpa.checked_next_multiple_of(crate::PAGE_SIZE)?;
            let end = gpa.checked_add(len)? & !(crate::PAGE_SIZE - 1);
            end.checked_sub(start).filter(|len| *len > 0).map(|len| (start, len))
        };
        let Some((start, len)) = whole() else { return Ok(0) };
        let Ok(slice) = self.memory.get_slice(GuestAddress(start), len as usize) else { return Ok(0) };
        // SAFETY: the range is RAM, and whole pages: regions start at pages and are some.
        unsafe { self.drop_pages(slice.ptr_guard_mut().as_ptr(), len)? };
        slice.bitmap().mark_dirty(0, len as usize);
        Ok(len)
    }

    /// Copies guest-physical bytes out; `false` (and `data` in no defined state) where a byte is not RAM.
    #[must_use]
    pub fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.memory.read_slice(data, GuestAddress(gpa)).is_ok()
    }

    /// Copies bytes into guest-physical memory, telling the code tracker; `false` where a byte is not RAM.
    #[must_use]
    pub fn write(&self, gpa: u64, data: &[u8]) -> bool {
        self.memory.write_slice(data, GuestAddress(gpa)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert!(GuestRam::new(1 << 20).is_err());
        assert!(GuestRam::new((64 << 20) + 1).is_err());
        let ram = GuestRam::new(4 << 30).unwrap();
        let pieces = ram.pieces();
        assert_eq!(pieces.len(), 2);
        assert_eq!((pieces[1].0, pieces[1].2), (layout::HIGH_RAM_START, 1 << 30));
    }

    #[test]
    fn the_file_has_all_of_it() {
        use std::os::unix::fs::FileExt;
        let ram = GuestRam::shareable(4 << 30).unwrap();
        assert_eq!(ram.offset_in_file(layout::LOW_RAM_END - 4096), Some(layout::LOW_RAM_END - 4096));
        assert_eq!(ram.offset_in_file(layout::LOW_RAM_END), None);
        assert_eq!(ram.offset_in_file(layout::HIGH_RAM_START + 4096), Some(layout::LOW_RAM_END + 4096));
        assert!(ram.write(0x5000, &[1, 2]) && ram.write(layout::HIGH_RAM_START + 0x5000, &[3, 4]));
        let file = File::from(ram.file().unwrap().try_clone_to_owned().unwrap());
        assert!(ram.is_untouched(0x4000, 0x1000) && ram.is_untouched(0x10_0000, 0x10_0000));
        assert!(!ram.is_untouched(0x4000, 0x2000) && !ram.is_untouched(0x5000, 0x1000));
        assert!(ram.is_untouched(layout::HIGH_RAM_START + 0x10_0000, 0x1000), "behind all data");
        let mut data = [0; 2];
        file.read_exact_at(&mut data, 0x5000).unwrap();
        assert_eq!(data, [1, 2]);
        file.read_exact_at(&mut data, layout::LOW_RAM_END + 0x5000).unwrap();
        assert_eq!(data, [3, 4]);
        assert_eq!(ram.discard(0x5000, 4096).unwrap(), 4096);
        file.read_exact_at(&mut data, 0x5000).unwrap();
        assert_eq!(data, [0, 0]);
        assert!(GuestRam::new(64 << 20).unwrap().file().is_none());
    }

    #[test]
    fn read_back() {
        for ram in [GuestRam::new(64 << 20).unwrap(), GuestRam::shareable(64 << 20).unwrap()] {
            reads_back(&ram);
        }
    }

    fn reads_back(ram: &GuestRam) {
        assert!(ram.write(0x1ffe, &[1, 2, 3, 4]));
        let mut data = [0; 4];
        assert!(ram.read(0x1ffe, &mut data));
        assert_eq!(data, [1, 2, 3, 4]);
        assert!(!ram.write((64 << 20) - 2, &[0; 4]));
        assert!(ram.host_page(64 << 20).is_none());
        ram.clear().unwrap();
        assert!(ram.read(0x1ffe, &mut data));
        assert_eq!(data, [0; 4]);
    }

    struct Seen(std::sync::Mutex<Vec<(u64, u64)>>);
    impl crate::CodeWriteListener for Seen {
        fn code_written(&self, gpa: u64, len: u64) {
            self.0.lock().unwrap().push((gpa, len));
        }
    }

    #[test]
    fn discard_gives_back_whole_pages_only() {
        for ram in [GuestRam::new(64 << 20).unwrap(), GuestRam::shareable(64 << 20).unwrap()] {
            discards_whole_pages(&ram);
        }
    }

    fn discards_whole_pages(ram: &GuestRam) {
        let seen = Arc::new(Seen(std::sync::Mutex::default()));
        ram.code_pages().set_listener(seen.clone());
        ram.code_pages().set(4);
        assert!(ram.write(0x1000, &[7; 0x6000]));
        seen.0.lock().unwrap().clear();
        assert_eq!(ram.discard(0x1001, 0x3fff).unwrap(), 0x3000);
        assert_eq!(*seen.0.lock().unwrap(), [(0x2000, 0x3000)], "translations are dropped");
        let mut data = vec![0; 0x6000];
        assert!(ram.read(0x1000, &mut data));
        let zeros: Vec<usize> = data.iter().enumerate().filter(|(_, byte)| **byte == 0).map(|(at, _)| at).collect();
        assert_eq!(zeros, (0x1000..0x4000).collect::<Vec<_>>());
        for (gpa, len) in
            [(0x1001, 0xfff), (0, 0), (64 << 20, 4096), ((64 << 20) - 4096, 8192), (u64::MAX, 4096), (u64::MAX, 1)]
        {
            assert_eq!(ram.discard(gpa, len).unwrap(), 0, "{gpa:#x} {len:#x}");
        }
        assert_eq!(ram.discard(0, 64 << 20).unwrap(), 64 << 20);
    }
}
