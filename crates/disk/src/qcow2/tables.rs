//! The tables of a qcow2 image, read for a look at them before the image is used: is everything inside the file?

use std::fs::File;
use std::io;

use super::header::Header;
use crate::file::read_at;

/// Bits of an L1 or L2 entry that are an offset in the file.
pub(crate) const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// The cluster is compressed.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Nobody else refers to the cluster.
pub(crate) const COPIED: u64 = 1 << 63;
/// L2 tables beyond so many bytes are not looked into when an image is opened: as many as for 1 TiB of data in clusters of 64 KiB.
const MOST_LOOKED_AT: u64 = 128 << 20;

/// Reads a table of `entries` numbers.
pub(crate) fn read(file: &File, offset: u64, entries: u64) -> io::Result<Vec<u64>> {
    let mut bytes = vec![0; usize::try_from(entries.saturating_mul(8)).map_err(io::Error::other)?];
    read_at(file, &mut bytes, offset)?;
    Ok(bytes.as_chunks().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect())
}

/// Offset and bytes (an upper bound) of a compressed cluster.
pub(crate) fn compressed(header: &Header, entry: u64) -> (u64, u64) {
    let bits = 62 - (header.cluster_bits - 8);
    let offset = entry & ((1 << bits) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> bits;
    (offset, (sectors + 1) * 512 - offset % 512)
}

/// The places of all L2 tables that an L1 table names, each once.
pub(crate) fn l2_places(l1: &[u64]) -> Vec<u64> {
    let mut places: Vec<u64> = l1.iter().map(|entry| entry & OFFSET).filter(|offset| *offset != 0).collect();
    places.sort_unstable();
    places.dedup();
    places
}

/// Does everything that the tables name lie inside the file, of `len` bytes? Takes time and memory in proportion to the file, and no more
/// than [`MOST_LOOKED_AT`] allows.
pub(crate) fn check_reach(file: &File, header: &Header, len: u64, writable: bool) -> Result<(), String> {
    let cluster = header.cluster();
    let failed = |error: io::Error| format!("cannot be read: {error}");
    let damaged = |what: &str| format!("is damaged ({what}): qemu-img check may repair it, or take a copy");
    let cut_off = |at: u64| format!("is cut off: it has data at byte {at} and ends at byte {len}: copy it again");
    let l1 = read(file, header.l1_offset, header.l1_entries).map_err(failed)?;
    let places = l2_places(&l1);
    let looked_at = usize::try_from(MOST_LOOKED_AT / cluster).unwrap_or(usize::MAX);
    for (number, place) in places.into_iter().enumerate() {
        if place % cluster != 0 {
            return Err(damaged("the place of an L2 table"));
        }
        if place >= len {
            return Err(cut_off(place));
        }
        if number >= looked_at {
            continue;
        }
        for entry in read(file, place, header.l2_entries()).map_err(failed)? {
            let (at, aligned) = if entry & COMPRESSED != 0 {
                (compressed(header, entry).0, true)
            } else {
                (entry & OFFSET, (entry & OFFSET).is_multiple_of(cluster))
            };
            if !aligned {
                return Err(damaged("the place of a cluster"));
            }
            if at >= len {
                return Err(cut_off(at));
            }
        }
    }
    if writable {
        let entries = header.refcount_clusters * cluster / 8;
        let mut places: Vec<u64> = read(file, header.refcount_offset, entries).map_err(failed)?;
        places.retain(|place| *place != 0);
        let count = places.len();
        places.sort_unstable();
        places.dedup();
        // Each once: so the search for free clusters takes no longer than the file is large.
        if places.len() != count || places.iter().any(|place| place % cluster != 0) {
            return Err(damaged("the places of its refcounts"));
        }
        if let Some(place) = places.last().filter(|place| **place >= len) {
            return Err(cut_off(*place));
        }
    }
    Ok(())
}
