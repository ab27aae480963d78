//! What the guest says on the balloon's queues, and what is done about it. Addresses and lengths are the driver's and prove nothing.

use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::buffers::Buffers;
use crate::queue::Chain;
use crate::runner::StopFlag;

/// Bytes of the pages that the balloon counts in, whatever the guest's own are (virtio 1.3, 5.5.6).
pub const PAGE: u64 = 4096;
/// Page numbers taken from a chain at a time.
const BATCH: usize = 1024;
/// Statistics that there are names for (virtio 1.3, 5.5.6.4, and Linux's later ones), by their tags.
pub const STATISTICS: [&str; 16] = [
    "swap-in",
    "swap-out",
    "major-faults",
    "minor-faults",
    "free",
    "total",
    "available",
    "caches",
    "hugetlb-allocations",
    "hugetlb-failures",
    "oom-kills",
    "allocation-stalls",
    "async-scan",
    "direct-scan",
    "async-reclaim",
    "direct-reclaim",
];
/// Bytes of one statistic: tag and value.
const STATISTIC: usize = 10;
/// Statistics looked at in one buffer; a driver has a few more than there are names for at most.
const MAX_STATISTICS: usize = 64;

/// What the guest last said about its memory: values by tag ([`STATISTICS`]); sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryStats([Option<u64>; STATISTICS.len()]);

impl MemoryStats {
    /// Reads what stands in a buffer. Unknown tags are passed over, a value cut off is none; the last of two values counts.
    pub fn parse(buffers: &mut Buffers<'_>) -> Self {
        let mut stats = Self::default();
        for _ in 0..MAX_STATISTICS {
            let Some([t0, t1, value @ ..]) = buffers.read_array::<STATISTIC>() else { break };
            if let Some(slot) = stats.0.get_mut(usize::from(u16::from_le_bytes([t0, t1]))) {
                *slot = Some(u64::from_le_bytes(value));
            }
        }
        stats
    }

    /// The values that the guest gave, with their names.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        STATISTICS.into_iter().zip(self.0).filter_map(|(name, value)| Some((name, value?)))
    }

    /// The value of this name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.named().find(|(other, _)| *other == name).map(|(_, value)| value)
    }
}

/// Page numbers in `chain` are in the balloon now: their memory goes back to the host. Returns the bytes that did; numbers that are not
/// RAM's are passed over.
pub fn inflate(ram: &GuestRam, chain: &mut Chain<'_>, stop: &StopFlag) -> u64 {
    let mut given = 0;
    let mut bytes = vec![0; 4 * BATCH];
    let mut pages = Vec::with_capacity(BATCH);
    while !stop.is_set() {
        let read = chain.readable.read(&mut bytes);
        pages.clear();
        pages.extend(bytes.get(..read).unwrap_or_default().as_chunks::<4>().0.iter().map(|n| u32::from_le_bytes(*n)));
        if pages.is_empty() {
            break;
        }
        // Neighbours go together: the host is asked once for all of them.
        pages.sort_unstable();
        pages.dedup();
        for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let Some(first) = run.first() else { continue };
            given += ram.discard(u64::from(*first) * PAGE, run.len() as u64 * PAGE).unwrap_or(0);
        }
    }
    given
}

/// The buffers of `chain` are free memory: it goes back to the host, whole pages only, and reads as zeros when it is used again. Returns
/// the bytes that did.
pub fn report(ram: &GuestRam, chain: &Chain<'_>, stop: &StopFlag) -> u64 {
    let mut given = 0;
    for (address, len) in chain.writable.places() {
        if stop.is_set() {
            break;
        }
        given += ram.discard(address, len).unwrap_or(0);
    }
    given
}
