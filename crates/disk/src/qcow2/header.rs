//! The header of a qcow2 image, checked before anything else looks at the file.
//!
//! The source is QEMU's docs/interop/qcow2.txt. The limits are QEMU's own: they bound what opening costs. What is refused here is
//! refused in words that a user understands; the library that reads the image never sees it.

/// The first four bytes.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Most bytes of the table of L2 tables.
const MAX_L1: u64 = 32 << 20;
/// Most bytes of the table of refcount blocks.
const MAX_REFCOUNT_TABLE: u64 = 8 << 20;
/// Most bytes of a backing file's name.
const MAX_NAME: u64 = 1023;
/// The header and its extensions lie in the first cluster, which is no larger than this.
pub const MAX_CLUSTER: usize = 2 << 20;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// What the header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Bytes of a cluster, as a power of two: 9 to 21.
    pub cluster_bits: u32,
    /// Bytes of the disk.
    pub size: u64,
    /// Place of the table of L2 tables, in bytes.
    pub l1_offset: u64,
    /// Its entries.
    pub l1_entries: u64,
    /// Place of the table of refcount blocks, in bytes.
    pub refcount_offset: u64,
    /// Its clusters.
    pub refcount_clusters: u64,
    /// Bits of a refcount, as a power of two: 0 to 6.
    pub refcount_order: u32,
    /// Snapshots inside the image.
    pub snapshots: u32,
    /// Place of the table of snapshots.
    pub snapshots_offset: u64,
    /// Autoclear features that are set.
    pub autoclear: u64,
    /// The name of the backing file, as it stands there.
    pub backing: Option<String>,
    /// The format of the backing file, as it stands there.
    pub backing_format: Option<String>,
}

/// Big-endian number of `N` bytes at `offset`; `None` beyond the end.
pub(crate) fn number<const N: usize>(bytes: &[u8], offset: usize) -> Option<u64> {
    let mut wide = [0; 8];
    wide.get_mut(8 - N..)?.copy_from_slice(bytes.get(offset..offset.checked_add(N)?)?);
    Some(u64::from_be_bytes(wide))
}

const CUT_OFF: &str = "is cut off: copy it again";

impl Header {
    /// Bytes of a cluster.
    pub fn cluster(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster() / 8
    }

    /// Reads the header from `head`, the first [`MAX_CLUSTER`] bytes (fewer if the file is shorter) of an image of `len` bytes.
    ///
    /// # Errors
    /// What is wrong and the remedy, to go on after the file's name.
    pub fn parse(head: &[u8], len: u64) -> Result<Self, String> {
        if !head.starts_with(&MAGIC) {
            return Err("is not a qcow2 image: give format=raw if it is a raw one".into());
        }
        let field = |offset: usize, size: usize| {
            let value = if size == 4 { number::<4>(head, offset) } else { number::<8>(head, offset) };
            value.ok_or_else(|| CUT_OFF.to_string())
        };
        let version = field(4, 4)? as u32;
        if version != 2 && version != 3 {
            return Err(format!(
                "is a qcow2 image of version {version}, and 2 and 3 are known: qemu-img convert makes one"
            ));
        }
        let cluster_bits = field(20, 4)? as u32;
        if !(9..=21).contains(&cluster_bits) {
            return Err(damaged(&format!("clusters of 2^{cluster_bits} bytes")));
        }
        let cluster = 1_u64 << cluster_bits;
        if field(32, 4)? != 0 {
            return Err("is an encrypted qcow2 image: qemu-img convert makes one that is not".into());
        }
        let (incompatible, autoclear, refcount_order, header_len) = match version {
            2 => (0, 0, 4, 72),
            _ => (field(72, 8)?, field(88, 8)?, field(96, 4)? as u32, field(100, 4)?),
        };
        if version == 3 && (header_len < 104 || header_len % 8 != 0 || header_len > cluster) {
            return Err(damaged("the length of its header"));
        }
        features(incompatible)?;
        if refcount_order > 6 {
            return Err(damaged(&format!("refcounts of 2^{refcount_order} bits")));
        }
        let mut header = Self {
            version,
            cluster_bits,
            size: field(24, 8)?,
            l1_offset: field(40, 8)?,
            l1_entries: field(36, 4)?,
            refcount_offset: field(48, 8)?,
            refcount_clusters: field(56, 4)?,
            refcount_order,
            snapshots: field(60, 4)? as u32,
            snapshots_offset: field(64, 8)?,
            autoclear,
            backing: None,
            backing_format: None,
        };
        header.check_tables(len)?;
        let first = head.get(..head.len().min(cluster as usize)).unwrap_or_default();
        header.backing = backing_name(first, field(8, 8)?, field(16, 4)?)?;
        if version == 3 {
            header.backing_format = backing_format(first, header_len as usize)?;
        }
        Ok(header)
    }

    /// Sizes and places of the two tables.
    fn check_tables(&self, len: u64) -> Result<(), String> {
        let cluster = self.cluster();
        if self.size > i64::MAX as u64 {
            return Err(damaged("its size"));
        }
        let needed = self.size.div_ceil(cluster).div_ceil(self.l2_entries());
        let l1_bytes = self.l1_entries * 8;
        if self.l1_entries < needed || l1_bytes > MAX_L1 {
            return Err(damaged("the size of its L1 table"));
        }
        let refcount_bytes = self.refcount_clusters.saturating_mul(cluster);
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE {
            return Err(damaged("the size of its refcount table"));
        }
        let mut tables = vec![(self.refcount_offset, refcount_bytes, "refcount table")];
        if self.l1_entries > 0 {
            tables.push((self.l1_offset, l1_bytes, "L1 table"));
        }
        for (offset, bytes, what) in &tables {
            if offset % cluster != 0 || *offset == 0 {
                return Err(damaged(&format!("the place of its {what}")));
            }
            // A table at the very end of the file need not fill its last cluster.
            let used = if *what == "L1 table" { *bytes } else { 8 };
            if offset.checked_add(used).is_none_or(|end| end > len) {
                return Err(CUT_OFF.into());
            }
        }
        if let [(a, a_len, _), (b, b_len, _)] = tables.as_slice()
            && a < &b.saturating_add(*b_len)
            && b < &a.saturating_add(*a_len)
        {
            return Err(damaged("tables that overlap"));
        }
        Ok(())
    }
}

fn damaged(what: &str) -> String {
    format!("is damaged ({what}): qemu-img check may repair it, or take a copy")
}

/// Incompatible features: whoever does not know one must not touch the image.
fn features(set: u64) -> Result<(), String> {
    const TEXTS: [&str; 5] = [
        "was not closed properly by the program that wrote it: qemu-img check -r all repairs it",
        "is marked as damaged: qemu-img check -r all repairs it",
        "keeps its data in another file, which is not supported: qemu-img convert -O qcow2 makes one image of it",
        "is compressed with zstd, which is not supported: qemu-img convert -O qcow2 makes one that is not",
        "has extended L2 entries, which are not supported: qemu-img convert -O qcow2 makes one without",
    ];
    match TEXTS.iter().enumerate().find(|(bit, _)| set & 1 << bit != 0) {
        Some((_, text)) => Err((*text).into()),
        None if set != 0 => Err(format!("uses features of qcow2 that are not known here ({set:#x})")),
        None => Ok(()),
    }
}

fn backing_name(first: &[u8], offset: u64, len: u64) -> Result<Option<String>, String> {
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    let bad = || damaged("the name of its backing file");
    if len > MAX_NAME {
        return Err(bad());
    }
    let end = offset.checked_add(len).ok_or_else(bad)?;
    let range = usize::try_from(offset).map_err(|_| bad())?..usize::try_from(end).map_err(|_| bad())?;
    let bytes = first.get(range).ok_or_else(bad)?;
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.contains('\0') => Ok(Some(name.into())),
        _ => Err(bad()),
    }
}

/// Walks the header's extensions, all of which must lie in the first cluster.
fn backing_format(first: &[u8], start: usize) -> Result<Option<String>, String> {
    let bad = || damaged("its header extensions");
    let mut at = start;
    let mut format = None;
    loop {
        let (Some(kind), Some(len)) = (number::<4>(first, at), number::<4>(first, at.saturating_add(4))) else {
            return Err(bad());
        };
        if kind as u32 == EXTENSION_END {
            return Ok(format);
        }
        let data = at.checked_add(8).ok_or_else(bad)?;
        let end = data.checked_add(len as usize).ok_or_else(bad)?;
        let bytes = first.get(data..end).ok_or_else(bad)?;
        if kind as u32 == EXTENSION_BACKING_FORMAT {
            let text = String::from_utf8(bytes.to_vec()).map_err(|_| bad())?;
            if format.as_ref().is_some_and(|format| *format != text) {
                return Err(bad());
            }
            format = Some(text);
        }
        at = end.checked_next_multiple_of(8).ok_or_else(bad)?;
    }
}
