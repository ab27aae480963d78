//! Is a qcow2 image consistent? Counts who refers to each cluster and compares with the refcounts in the file.

use std::fs::File;
use std::io;

use super::header::{Header, number};
use super::tables::{self, COMPRESSED, COPIED, OFFSET};
use crate::error::DiskError;
use crate::file::{Access, DiskFile, read_at};
use crate::format;
use crate::options::{DiskConfig, Format};

/// Most clusters of a file that is checked: 8 TiB in clusters of 64 KiB. Two bytes are kept for each.
const MAX_CLUSTERS: u64 = 1 << 27;
/// Problems that are described; the others are counted.
const MOST_TEXTS: usize = 10;
/// A number that is not a refcount: no entry of the tables is in use there.
const ENTRY_IN_USE: u64 = 1 << 56;

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Places where data is in danger: clusters used twice, used and counted as free, or outside the file.
    pub errors: u64,
    /// Clusters that nobody uses and that are not free: lost space, no harm.
    pub leaks: u64,
    /// The first errors, each in a line.
    pub texts: Vec<String>,
    /// Clusters of the disk that have data in this file.
    pub allocated: u64,
}

impl Report {
    fn error(&mut self, text: impl FnOnce() -> String) {
        self.errors += 1;
        if self.texts.len() < MOST_TEXTS {
            self.texts.push(text());
        }
    }
}

/// Checks the image that `config` names, not its backing files. Nothing is changed. Raw disks have nothing to check.
///
/// # Errors
/// [`DiskError`]: missing, in use, or so damaged that it cannot be checked.
pub fn check(config: &DiskConfig) -> Result<Report, DiskError> {
    let file = DiskFile::open(&config.path, Access::Read)?;
    let problem = |problem| DiskError::image(&config.path, problem);
    if format::decide(&config.path, &file.head(16)?, config.format).map_err(problem)? == Format::Raw {
        return Ok(Report::default());
    }
    let header = super::read_header(&file)?;
    let clusters = file.len.div_ceil(header.cluster());
    if clusters > MAX_CLUSTERS {
        return Err(problem("is too large to be checked here: qemu-img check does it".into()));
    }
    let mut checker =
        Checker { file: &file.file, header: &header, uses: vec![0; clusters as usize], report: Report::default() };
    checker.count().map_err(DiskError::io("read", &config.path))?;
    checker.compare().map_err(DiskError::io("read", &config.path))?;
    Ok(checker.report)
}

struct Checker<'a> {
    file: &'a File,
    header: &'a Header,
    /// How often each cluster is referred to.
    uses: Vec<u16>,
    report: Report,
}

impl Checker<'_> {
    /// Counts one use of each cluster that a range touches.
    fn uses(&mut self, what: &str, offset: u64, bytes: u64) {
        let cluster = self.header.cluster();
        let last = offset.saturating_add(bytes.max(1) - 1) / cluster;
        if last >= self.uses.len() as u64 {
            self.report.error(|| format!("{what} at byte {offset} lies outside the file"));
            return;
        }
        for number in offset / cluster..=last {
            if let Some(uses) = self.uses.get_mut(number as usize) {
                *uses = uses.saturating_add(1);
            }
        }
    }

    fn count(&mut self) -> io::Result<()> {
        let header = self.header;
        let cluster = header.cluster();
        self.uses("the header", 0, cluster);
        self.uses("the refcount table", header.refcount_offset, header.refcount_clusters * cluster);
        for place in tables::read(self.file, header.refcount_offset, header.refcount_clusters * cluster / 8)? {
            if place != 0 {
                self.uses("a block of refcounts", place, cluster);
            }
        }
        self.level_one(header.l1_offset, header.l1_entries)?;
        self.snapshots()
    }

    fn level_one(&mut self, offset: u64, entries: u64) -> io::Result<()> {
        if entries == 0 {
            return Ok(());
        }
        let cluster = self.header.cluster();
        self.uses("the L1 table", offset, entries * 8);
        for place in tables::read(self.file, offset, entries)? {
            let place = place & OFFSET;
            if place == 0 {
                continue;
            }
            self.uses("an L2 table", place, cluster);
            for entry in tables::read(self.file, place, self.header.l2_entries())? {
                let (offset, bytes) = if entry & COMPRESSED != 0 {
                    let (offset, bytes) = tables::compressed(self.header, entry);
                    // The number of sectors is an upper bound: the last may lie behind the file.
                    (offset, bytes.min((self.uses.len() as u64 * cluster).saturating_sub(offset)))
                } else if entry & OFFSET != 0 {
                    (entry & OFFSET, cluster)
                } else {
                    continue;
                };
                self.report.allocated += 1;
                self.uses("a cluster of data", offset, bytes);
            }
        }
        Ok(())
    }

    /// The tables of the snapshots inside the image.
    fn snapshots(&mut self) -> io::Result<()> {
        const HEAD: usize = 40;
        let start = self.header.snapshots_offset;
        let mut at = start;
        for _ in 0..self.header.snapshots.min(65_536) {
            let mut head = [0; HEAD];
            read_at(self.file, &mut head, at)?;
            let field = |offset, size| match size {
                2 => number::<2>(&head, offset),
                4 => number::<4>(&head, offset),
                _ => number::<8>(&head, offset),
            };
            let [l1, entries, id, name, extra] =
                [(0, 8), (8, 4), (12, 2), (14, 2), (36, 4)].map(|(offset, size)| field(offset, size).unwrap_or(0));
            if entries > 4 << 20 || extra > 1 << 16 {
                self.report.error(|| "a snapshot is damaged".into());
                return Ok(());
            }
            self.level_one(l1, entries)?;
            at = at.saturating_add(HEAD as u64 + extra + id + name).next_multiple_of(8);
        }
        if at > start {
            self.uses("the table of snapshots", start, at - start);
        }
        Ok(())
    }

    fn compare(&mut self) -> io::Result<()> {
        let cluster = self.header.cluster();
        let bits = 1_u64 << self.header.refcount_order;
        let per_block = cluster * 8 / bits;
        let table = tables::read(self.file, self.header.refcount_offset, self.header.refcount_clusters * cluster / 8)?;
        let mut block = vec![0; cluster as usize];
        for number in 0..self.uses.len() as u64 {
            let inside = number % per_block;
            if inside == 0 {
                let place = table.get((number / per_block) as usize).copied().unwrap_or(0);
                block.fill(0);
                if place != 0 && place < ENTRY_IN_USE {
                    read_at(self.file, &mut block, place)?;
                }
            }
            let stored = refcount(&block, inside, bits);
            let used = u64::from(self.uses.get(number as usize).copied().unwrap_or(0));
            if used > stored {
                let at = number * cluster;
                self.report
                    .error(|| format!("the cluster at byte {at} is used {used} times and counted {stored} times"));
            } else if used < stored {
                self.report.leaks += 1;
            }
        }
        self.copied(&table, per_block, bits)
    }

    /// Entries that claim to be the only one must be so, or a write would change what others see.
    fn copied(&mut self, table: &[u64], per_block: u64, bits: u64) -> io::Result<()> {
        let cluster = self.header.cluster();
        let l1 = tables::read(self.file, self.header.l1_offset, self.header.l1_entries)?;
        let mut wrong = Vec::new();
        let mut look = |entry: u64, cache: &mut (u64, Vec<u8>), file: &File| -> io::Result<()> {
            if entry & COPIED == 0 || entry & COMPRESSED != 0 || entry & OFFSET == 0 {
                return Ok(());
            }
            let number = (entry & OFFSET) / cluster;
            let place = table.get((number / per_block) as usize).copied().unwrap_or(0);
            if place == 0 {
                return Ok(()); // counted as an error already
            }
            if cache.0 != place {
                cache.1.fill(0);
                read_at(file, &mut cache.1, place)?;
                cache.0 = place;
            }
            if refcount(&cache.1, number % per_block, bits) > 1 {
                wrong.push(entry & OFFSET);
            }
            Ok(())
        };
        let mut cache = (0, vec![0; cluster as usize]);
        for entry in l1 {
            look(entry, &mut cache, self.file)?;
            if entry & OFFSET != 0 {
                for entry in tables::read(self.file, entry & OFFSET, self.header.l2_entries())? {
                    look(entry, &mut cache, self.file)?;
                }
            }
        }
        for at in wrong {
            self.report.error(|| format!("the cluster at byte {at} is shared and marked as not shared"));
        }
        Ok(())
    }
}

/// Number `index` of a block of refcounts of `bits` bits each.
fn refcount(block: &[u8], index: u64, bits: u64) -> u64 {
    let byte = |at: u64| u64::from(block.get(at as usize).copied().unwrap_or(0));
    if bits < 8 {
        let bit = index * bits;
        return byte(bit / 8) >> (bit % 8) & ((1 << bits) - 1);
    }
    let bytes = bits / 8;
    (0..bytes).fold(0, |value, at| value << 8 | byte(index * bytes + at))
}

#[cfg(test)]
mod tests {
    use super::refcount;

    #[test]
    fn refcounts_of_all_widths() {
        let block = [0b1110_0100, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde];
        assert_eq!((0..4).map(|n| refcount(&block, n, 1)).collect::<Vec<_>>(), [0, 0, 1, 0]);
        assert_eq!((0..4).map(|n| refcount(&block, n, 2)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((refcount(&block, 1, 4), refcount(&block, 2, 4)), (0xe, 2));
        assert_eq!((refcount(&block, 1, 8), refcount(&block, 1, 16)), (0x12, 0x3456));
        assert_eq!((refcount(&block, 0, 64), refcount(&block, 1, 64)), (0xe412_3456_789a_bcde, 0));
    }
}
