//! Which pages vCPUs write: by a ring of page numbers a vCPU where the kernel has it (the KVM API, 8.29), else by a bitmap for each piece
//! of RAM.
//!
//! A ring costs by what was written, a bitmap by how much memory there is. A vCPU whose ring is full leaves the guest; what is in
//! it is noted, and it goes on.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings as b;
use kvm_ioctls::{VcpuFd, VmFd};
use memory::GuestRam;
use vmm_sys_util::ioctl::ioctl;

use crate::host::{Capabilities, cap};
use crate::ioctls::KVM_RESET_DIRTY_RINGS;

/// Pages that the guest wrote in one piece of RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirty {
    /// Guest-physical address of the first page.
    pub start: u64,
    /// A bit a page of 4 KiB, the first in bit 0 of the first word.
    pub bitmap: Vec<u64>,
}

impl Dirty {
    /// The guest-physical addresses of the pages.
    pub fn pages(&self) -> impl Iterator<Item = u64> {
        let set = |bits: u64| (0..64_u64).filter(move |bit| bits >> bit & 1 != 0);
        (0..)
            .zip(&self.bitmap)
            .flat_map(move |(word, bits): (u64, _)| set(*bits).map(move |bit| word * 64 + bit))
            .map(|page| self.start + page * memory::PAGE_SIZE)
    }
}

/// How written pages are noted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirtyLog {
    /// They are not.
    #[default]
    Off,
    /// By rings where the host has them, else by bitmaps.
    Best,
    /// By bitmaps, also where the host has rings.
    Bitmap,
}

/// Entries of a ring; less where the host takes less. The kernel keeps some 600 free for what one return from the guest may write.
const ENTRIES: u32 = 8192;
const ENTRY_SIZE: usize = size_of::<b::kvm_dirty_gfn>();
/// Flags of an entry: it holds a page; it has been taken.
const DIRTY: u32 = 1 << 0;
const RESET: u32 = 1 << 1;

/// A `struct kvm_dirty_gfn` as two sides share it.
#[repr(C)]
struct Entry {
    flags: AtomicU32,
    slot: AtomicU32,
    offset: AtomicU64,
}

/// The ring of one vCPU, mapped.
pub struct Ring {
    start: NonNull<Entry>,
    entries: u32,
    /// The next entry to look at.
    next: Mutex<u32>,
}

// SAFETY: the mapping belongs to this ring alone, and is read and written by atomic accesses only.
unsafe impl Send for Ring {}
// SAFETY: as above.
unsafe impl Sync for Ring {}

impl Ring {
    fn map(vcpu: &VcpuFd, entries: u32) -> std::io::Result<Self> {
        let len = entries as usize * ENTRY_SIZE;
        let offset = u64::from(b::KVM_DIRTY_LOG_PAGE_OFFSET) * memory::PAGE_SIZE;
        // SAFETY: a mapping where the kernel likes; of the ring that was asked for when the VM was made, in its full length.
        let start = unsafe {
            let (access, descriptor) = (libc::PROT_READ | libc::PROT_WRITE, vcpu.as_raw_fd());
            libc::mmap(std::ptr::null_mut(), len, access, libc::MAP_SHARED, descriptor, offset as libc::off_t)
        };
        match NonNull::new(start.cast::<Entry>()) {
            Some(start) if start.as_ptr().cast() != libc::MAP_FAILED => {
                Ok(Self { start, entries, next: Mutex::new(0) })
            }
            _ => Err(std::io::Error::last_os_error()),
        }
    }

    fn entry(&self, index: u32) -> &Entry {
        // SAFETY: the index is below the number of entries, which are mapped as long as `self`.
        unsafe { self.start.add((index % self.entries) as usize).as_ref() }
    }

    /// Calls `found` with slot and page of each entry, and gives the entries back; returns how many.
    fn harvest(&self, mut found: impl FnMut(u32, u64)) -> u32 {
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        for count in 0..self.entries {
            let entry = self.entry(*next);
            if entry.flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                return count;
            }
            found(entry.slot.load(Ordering::Relaxed), entry.offset.load(Ordering::Relaxed));
            entry.flags.store(RESET, Ordering::Release);
            *next = next.wrapping_add(1) % self.entries;
        }
        self.entries
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`, in its full length; nobody has references to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.entries as usize * ENTRY_SIZE) };
    }
}

/// What was written, by piece of RAM.
struct Rings {
    entries: u32,
    rings: Mutex<Vec<Arc<Ring>>>,
    found: Mutex<Vec<Dirty>>,
}

/// The log of one VM.
pub struct Log {
    vm: Arc<VmFd>,
    /// Start and length of each piece of RAM, which is a slot.
    pieces: Vec<(u64, u64)>,
    /// `None`: by bitmap.
    rings: Option<Rings>,
}

fn empty(pieces: &[(u64, u64)]) -> Vec<Dirty> {
    let words = |len: u64| (len / memory::PAGE_SIZE).div_ceil(64) as usize;
    pieces.iter().map(|&(start, len)| Dirty { start, bitmap: vec![0; words(len)] }).collect()
}

impl Log {
    /// To be made before the VM has a vCPU.
    pub fn new(vm: Arc<VmFd>, ram: &GuestRam, capabilities: &Capabilities, how: DirtyLog) -> Option<Arc<Self>> {
        let pieces: Vec<_> = ram.pieces().into_iter().map(|(start, _, len)| (start, len)).collect();
        let most = if how == DirtyLog::Best { capabilities.dirty_ring.min(ENTRIES) } else { 0 };
        let switch_on = |entries: u32| {
            let numbers = [cap::DIRTY_LOG_RING_ACQ_REL, cap::DIRTY_LOG_RING];
            numbers.into_iter().any(|cap| {
                let mut enable = b::kvm_enable_cap { cap, ..Default::default() };
                enable.args[0] = u64::from(entries) * ENTRY_SIZE as u64;
                vm.enable_cap(&enable).is_ok()
            })
        };
        let rings = (most > 0 && switch_on(most)).then(|| Rings {
            entries: most,
            rings: Mutex::default(),
            found: Mutex::new(empty(&pieces)),
        });
        (how != DirtyLog::Off).then(|| Arc::new(Self { vm, pieces, rings }))
    }

    /// Is it by rings?
    pub fn by_rings(&self) -> bool {
        self.rings.is_some()
    }

    /// A vCPU has been made.
    pub fn add(&self, vcpu: &VcpuFd) -> std::io::Result<()> {
        if let Some(rings) = &self.rings {
            let ring = Arc::new(Ring::map(vcpu, rings.entries)?);
            rings.rings.lock().unwrap_or_else(PoisonError::into_inner).push(ring);
        }
        Ok(())
    }

    /// Notes what is in the rings and empties them; from then on these pages are watched anew.
    pub fn harvest(&self) -> std::io::Result<()> {
        let Some(rings) = &self.rings else { return Ok(()) };
        let all = rings.rings.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut found = rings.found.lock().unwrap_or_else(PoisonError::into_inner);
        let mut count = 0;
        for ring in all {
            count += ring.harvest(|slot, page| {
                // The high half is the address space, of which a guest without SMM has one.
                let words = found.get_mut((slot & 0xffff) as usize).map(|dirty| &mut dirty.bitmap);
                if let Some(word) = words.and_then(|words| words.get_mut((page / 64) as usize)) {
                    *word |= 1 << (page % 64);
                }
            });
        }
        // SAFETY: a request without an argument, on a VM's descriptor.
        if count > 0 && unsafe { ioctl(&*self.vm, KVM_RESET_DIRTY_RINGS()) } < 0 {
            return Err(std::io::Error::last_os_error());
        }
        Ok(())
    }

    /// All that was written since the last call.
    pub fn take(&self) -> Result<Vec<Dirty>, String> {
        let told = |error: std::io::Error| format!("KVM does not tell what was written: {error}");
        let Some(rings) = &self.rings else {
            let take = |(slot, &(start, len)): (u32, &(u64, u64))| {
                let bitmap = self.vm.get_dirty_log(slot, len as usize);
                bitmap.map(|bitmap| Dirty { start, bitmap }).map_err(|error| told(error.into()))
            };
            return (0..).zip(&self.pieces).map(take).collect();
        };
        self.harvest().map_err(told)?;
        let mut found = rings.found.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(std::mem::replace(&mut *found, empty(&self.pieces)))
    }
}
