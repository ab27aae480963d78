//! Reading `.deb` files (deb(5)) and unpacking them safely.
//!
//! A `.deb` is an `ar` archive of `debian-binary`, `control.tar.*` and `data.tar.*`; the latter two
//! are plain or compressed with gzip, xz or zstd.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use crate::ar;
use crate::error::{Error, Result};
use crate::unpack::Root;

/// The most memory an xz decoder may take, in KiB: Debian's packages need some 65 MiB.
const XZ_MEMORY_KIB: u32 = 256 << 10;

/// The largest zstd window accepted, in bytes.
const ZSTD_WINDOW: u64 = 128 << 20;

/// The most a package may unpack to, in bytes.
const MAX_UNPACKED: u64 = 8 << 30;

/// The most its control files may unpack to, in bytes.
const MAX_CONTROL: u64 = 64 << 20;

/// Opens the `data.tar` of a package, decompressed.
///
/// # Errors
/// [`Error::Deb`] if the file is no such package, [`Error::Io`] if it cannot be opened.
pub fn data(path: &Path) -> Result<tar::Archive<Box<dyn Read>>> {
    member(path, "data.tar", MAX_UNPACKED)
}

/// The files of the `control.tar` of a package: `control`, the maintainer scripts, lists; by name.
///
/// # Errors
/// As [`data`].
pub fn control(path: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let bad = |e: io::Error| Error::deb(path, e);
    let mut files = BTreeMap::new();
    for entry in member(path, "control.tar", MAX_CONTROL)?.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let name = name.trim_start_matches("./");
        // They lie side by side; what has another place or kind is nothing that dpkg knows.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"-_.+".contains(&b);
        if !entry.header().entry_type().is_file() || name.is_empty() || !name.bytes().all(plain) {
            continue;
        }
        let mut data = Vec::new();
        entry.read_to_end(&mut data).map_err(bad)?;
        if data.len() as u64 != entry.size() {
            return Err(Error::deb(path, format!("truncated at {name}")));
        }
        files.insert(name.to_owned(), data);
    }
    Ok(files)
}

/// Opens a tar in a package by the start of its name, decompressed, of at most `limit` bytes.
fn member(path: &Path, what: &str, limit: u64) -> Result<tar::Archive<Box<dyn Read>>> {
    let bad = |e: io::Error| Error::deb(path, e);
    let mut file = File::open(path).map_err(|e| Error::io("read", path, e))?;
    let members = ar::members(&mut file).map_err(bad)?;
    let [version, rest @ ..] = &members[..] else {
        return Err(Error::deb(path, "empty ar archive"));
    };
    let mut text = String::new();
    file.seek(SeekFrom::Start(version.offset)).map_err(bad)?;
    (&file).take(version.size.min(16)).read_to_string(&mut text).map_err(bad)?;
    if version.name != "debian-binary" || !text.starts_with("2.") {
        return Err(Error::deb(path, "not a Debian package of format 2"));
    }
    let member =
        rest.iter().find(|m| m.name.starts_with(what)).ok_or_else(|| Error::deb(path, format!("no {what} in it")))?;
    file.seek(SeekFrom::Start(member.offset)).map_err(bad)?;
    let raw = io::BufReader::with_capacity(128 << 10, file.take(member.size));
    let plain: Box<dyn Read> = match member.name.strip_prefix(what).unwrap_or("") {
        "" => Box::new(raw),
        ".gz" => Box::new(flate2::read::GzDecoder::new(raw)),
        ".xz" => Box::new(unxz(raw)),
        ".zst" => Box::new(
            ruzstd::decoding::StreamingDecoder::new_with_max_window_size(raw, ZSTD_WINDOW)
                .map_err(|e| Error::deb(path, e))?,
        ),
        other => return Err(Error::deb(path, format!("unknown compression {other}"))),
    };
    Ok(tar::Archive::new(Box::new(plain.take(limit))))
}

/// An xz decoder with a bound on its memory.
pub(crate) fn unxz<R: Read>(raw: R) -> impl Read {
    lzma_rust2::XzReader::new_mem_limit(raw, true, XZ_MEMORY_KIB)
}

/// Unpacks the files of a package below `dest`, which is made if it is not there.
///
/// Paths are resolved as if `dest` were the root directory: `..` is refused, and symbolic links, also
/// absolute ones and those already there, lead nowhere outside. Modes and times are kept; owners and
/// set-id bits only when run as root. Existing files are replaced, existing directories kept.
///
/// # Errors
/// [`Error::Deb`] for a malformed package, an unsafe path, or a device node; [`Error::Io`] and its like
/// for the disk.
pub fn unpack_deb(path: &Path, dest: &Path) -> Result<()> {
    fs::create_dir_all(dest).map_err(|e| Error::io("create", dest, e))?;
    let root = Root::open(dest)?;
    let mut archive = data(path)?;
    let entries = archive.entries().map_err(|e| Error::deb(path, e))?;
    for entry in entries {
        let mut entry = entry.map_err(|e| Error::deb(path, e))?;
        root.unpack(&mut entry, path, dest)?;
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    /// A `.deb` whose `data.tar` (with this suffix) holds these bytes.
    pub(crate) fn deb(suffix: &str, data: &[u8]) -> Vec<u8> {
        let name = format!("data.tar{suffix}");
        ar::build(&[("debian-binary", b"2.0\n"), ("control.tar", b""), (&name, data)])
    }

    /// A tar with regular files.
    pub(crate) fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut b = tar::Builder::new(Vec::new());
        for (name, data) in files {
            let mut h = tar::Header::new_gnu();
            h.set_size(data.len() as u64);
            h.set_mode(0o644);
            b.append_data(&mut h, name, *data).unwrap();
        }
        b.into_inner().unwrap()
    }

    fn names(file: &[u8]) -> Result<Vec<String>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.deb");
        fs::write(&path, file).unwrap();
        let mut archive = data(&path)?;
        let mut all = Vec::new();
        for entry in archive.entries().map_err(|e| Error::deb(&path, e))? {
            let entry = entry.map_err(|e| Error::deb(&path, e))?;
            all.push(String::from_utf8_lossy(&entry.path_bytes()).into_owned());
        }
        Ok(all)
    }

    #[test]
    fn every_compression() {
        let tar = tar_of(&[("./a", b"1"), ("./b/c", b"2")]);
        let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gz.write_all(&tar).unwrap();
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&tar).unwrap();
        let zst = ruzstd::encoding::compress_to_vec(&tar[..], ruzstd::encoding::CompressionLevel::Fastest);
        for (suffix, data) in
            [("", tar.clone()), (".gz", gz.finish().unwrap()), (".xz", xz.finish().unwrap()), (".zst", zst)]
        {
            assert_eq!(names(&deb(suffix, &data)).unwrap(), ["a", "b/c"], "{suffix}");
        }
    }

    #[test]
    fn malformed_is_one_clear_line() {
        let tar = tar_of(&[("./a", b"1")]);
        for (why, file) in [
            ("empty", Vec::new()),
            ("no members", b"!<arch>\n".to_vec()),
            ("no data", ar::build(&[("debian-binary", b"2.0\n")])),
            ("version", ar::build(&[("debian-binary", b"3.0\n"), ("data.tar", &tar)])),
            ("order", ar::build(&[("data.tar", &tar), ("debian-binary", b"2.0\n")])),
            ("compression", deb(".lz9", &tar)),
            ("not xz", deb(".xz", &tar)),
            ("not gz", deb(".gz", &tar)),
            ("not zst", deb(".zst", &tar)),
            ("not tar", deb("", &[b'x'; 1024])),
            ("short tar", deb("", &tar[..700])),
        ] {
            match names(&file) {
                Err(e) => assert!(!e.to_string().contains('\n'), "{why}: {e}"),
                // A tar cut inside a file's data is found when the data is read.
                Ok(_) => assert_eq!(why, "short tar"),
            }
        }
    }

    proptest! {
        #[test]
        fn any_damage_is_survived(at in 0usize..3000, value in any::<u8>(), kind in 0usize..2) {
            let tar = tar_of(&[("./a", b"1"), ("./b/c", &[7; 900])]);
            let mut file = match kind {
                0 => deb("", &tar),
                _ => {
                    let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
                    w.write_all(&tar).unwrap();
                    deb(".xz", &w.finish().unwrap())
                }
            };
            let i = at % file.len();
            file[i] = value;
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("x.deb");
            fs::write(&path, &file).unwrap();
            let dest = dir.path().join("d");
            let _ = unpack_deb(&path, &dest);
            // Nothing beside the package and the destination.
            prop_assert!(fs::read_dir(dir.path()).unwrap().count() <= 2);
        }
    }
}
