//! The `ar` container of a `.deb` file (deb(5)): a magic line, then members with 60-byte headers.
//!
//! Only what Debian packages use: no symbol table, no long-name table. Every number comes from the
//! file, so all arithmetic is checked.

use std::io::{self, Read, Seek, SeekFrom};

const MAGIC: &[u8; 8] = b"!<arch>\n";
const HEADER: usize = 60;

/// A member: its name and where its data lies in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Name without the padding and the `/` that some writers add.
    pub name: String,
    /// Offset of the data from the start of the file, in bytes.
    pub offset: u64,
    /// Length of the data, in bytes.
    pub size: u64,
}

fn bad(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.to_owned())
}

/// Lists the members; at most 16, a `.deb` has three.
///
/// # Errors
/// What the file fails with, and `InvalidData` for anything that is not a complete `ar` archive.
pub fn members<R: Read + Seek>(file: &mut R) -> io::Result<Vec<Member>> {
    let end = file.seek(SeekFrom::End(0))?;
    file.seek(SeekFrom::Start(0))?;
    let mut magic = [0u8; 8];
    file.read_exact(&mut magic).map_err(|_| bad("too short for an ar archive"))?;
    if &magic != MAGIC {
        return Err(bad("no ar archive"));
    }
    let mut list = Vec::new();
    let mut at = MAGIC.len() as u64;
    while at < end {
        if list.len() == 16 {
            return Err(bad("too many ar members"));
        }
        let mut header = [0u8; HEADER];
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut header).map_err(|_| bad("truncated ar header"))?;
        let (name, rest) = header.split_at(16);
        let (_dates_and_ids, rest) = rest.split_at(32);
        let (size, tail) = rest.split_at(10);
        if tail != b"`\n" {
            return Err(bad("ar header without its end mark"));
        }
        let text = |b| std::str::from_utf8(b).map_err(|_| bad("ar header is not ASCII"));
        let name = text(name)?.trim_end().trim_end_matches('/').to_owned();
        let size = text(size)?.trim_end();
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad("ar member without a size"));
        }
        let size: u64 = size.parse().map_err(|_| bad("ar member size"))?;
        let offset = at + HEADER as u64;
        let next = offset.checked_add(size).filter(|next| *next <= end).ok_or_else(|| bad("truncated ar member"))?;
        list.push(Member { name, offset, size });
        // Members start on even offsets; the pad after the last one may be missing.
        at = next + (next & 1);
    }
    Ok(list)
}

#[cfg(test)]
pub(crate) fn build(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    for (name, data) in members {
        out.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, data.len()).bytes());
        out.extend_from_slice(data);
        if data.len() % 2 == 1 {
            out.push(b'\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    #[test]
    fn lists_members() {
        let file = build(&[("debian-binary", b"2.0\n"), ("odd/", b"abc"), ("x", b"")]);
        let list = members(&mut Cursor::new(&file)).unwrap();
        let names: Vec<_> = list.iter().map(|m| (m.name.as_str(), m.size)).collect();
        assert_eq!(names, [("debian-binary", 4), ("odd", 3), ("x", 0)]);
        let m = &list[1];
        assert_eq!(&file[m.offset as usize..][..3], b"abc");
    }

    #[test]
    fn malformed_is_an_error() {
        let good = build(&[("a", b"0123456789")]);
        for cut in 0..good.len() {
            if cut != 8 {
                assert!(members(&mut Cursor::new(&good[..cut])).is_err(), "cut at {cut}");
            }
        }
        let mut huge = good.clone();
        huge[8 + 48..8 + 58].copy_from_slice(b"9999999999");
        assert!(members(&mut Cursor::new(&huge)).is_err());
        let mut negative = good.clone();
        negative[8 + 48..8 + 58].copy_from_slice(b"-1        ");
        assert!(members(&mut Cursor::new(&negative)).is_err());
        let many: Vec<(&str, &[u8])> = vec![("a", b""); 17];
        assert!(members(&mut Cursor::new(build(&many))).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_after_the_magic(data in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut file = MAGIC.to_vec();
            file.extend(data);
            if let Ok(list) = members(&mut Cursor::new(&file)) {
                for m in list {
                    prop_assert!(m.offset + m.size <= file.len() as u64);
                }
            }
        }
    }
}
