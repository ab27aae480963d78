//! The files a user gives: opened, locked and looked at before anything is built, so that what is wrong is said in one clear line.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use virtio::Disk;

use crate::config::DiskConfig;
use crate::error::Error;

/// Opens `path` for reading, if it is a file that can be read from any place.
pub(crate) fn open_file(what: &str, path: &Path) -> Result<File, Error> {
    let file = File::open(path).map_err(|error| open_error(what, path, &error))?;
    let meta = file.metadata().map_err(|error| Error::file(what, path, error))?;
    if meta.is_dir() {
        return Err(Error::file(what, path, "is a directory: name a file in it"));
    }
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(Error::file(what, path, "is neither a file nor a block device"));
    }
    if meta.is_file() && meta.len() == 0 {
        return Err(Error::file(what, path, "is empty: copy it again"));
    }
    Ok(file)
}

fn open_error(what: &str, path: &Path, error: &std::io::Error) -> Error {
    let problem = match error.kind() {
        std::io::ErrorKind::NotFound => "does not exist: check the name".to_string(),
        std::io::ErrorKind::PermissionDenied => "may not be opened by this user: check its permissions".to_string(),
        std::io::ErrorKind::IsADirectory => "is a directory: name a file in it".to_string(),
        std::io::ErrorKind::ReadOnlyFilesystem => "is on a read-only file system: add ,ro".to_string(),
        _ => error.to_string(),
    };
    Error::file(what, path, problem)
}

/// Little-endian number of `N` bytes at `offset` of `bytes`; 0 beyond its end.
fn number<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    let mut wide = [0; 8];
    if let (Some(from), Some(to)) = (bytes.get(offset..offset + N), wide.get_mut(..N)) {
        to.copy_from_slice(from);
    }
    u64::from_le_bytes(wide)
}

/// Opens the kernel and looks at its header: is it a bzImage or a 64-bit x86 ELF file, and is it all there?
pub(crate) fn open_kernel(path: &Path) -> Result<File, Error> {
    let what = "kernel";
    let file = open_file(what, path)?;
    let size = file.metadata().map_err(|error| Error::file(what, path, error))?.len();
    let mut head = vec![0; 0x400];
    let len = read_head(&file, &mut head).map_err(|error| open_error(what, path, &error))?;
    head.truncate(len);
    match kernel_problem(&head, size) {
        Some(problem) => Err(Error::file(what, path, problem)),
        None => Ok(file),
    }
}

fn read_head(file: &File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// What is wrong with a kernel of `size` bytes that starts with `head`.
fn kernel_problem(head: &[u8], size: u64) -> Option<String> {
    if head.starts_with(b"\x7fELF") {
        return elf_problem(head, size);
    }
    if head.get(0x202..0x206) == Some(b"HdrS") {
        return bzimage_problem(head, size);
    }
    let other = if head.get(0x38..0x3c) == Some(b"ARMd") {
        "is a kernel for 64-bit ARM"
    } else if head.get(0x38..0x3c) == Some(b"RSC\x05") {
        "is a kernel for RISC-V"
    } else if head.starts_with(b"\x1f\x8b") {
        return Some("is compressed with gzip: unpack it first (gunzip)".into());
    } else if head.starts_with(b"\xfd7zXZ\0") || head.starts_with(b"\x28\xb5\x2f\xfd") {
        return Some("is compressed: unpack it first".into());
    } else if head.starts_with(b"!<arch>") {
        return Some(
            "is a Debian package or archive: unpack it first (dpkg-deb -x) and name boot/vmlinuz-… in it".into(),
        );
    } else if head.starts_with(b"MZ") && size < 0x206 {
        return Some("is cut off: copy it again".into());
    } else {
        return Some("is not a kernel: a bzImage (vmlinuz) or an ELF vmlinux for x86-64 is needed".into());
    };
    Some(format!("{other}: one for x86-64 is needed"))
}

fn elf_problem(head: &[u8], size: u64) -> Option<String> {
    const EM_X86_64: u64 = 62;
    if head.len() < 64 {
        return Some("is cut off: copy it again".into());
    }
    let machine = number::<2>(head, 18);
    if head.get(4) != Some(&2) || head.get(5) != Some(&1) || machine != EM_X86_64 {
        let name = match machine {
            3 => "32-bit x86".to_string(),
            40 => "32-bit ARM".to_string(),
            183 => "64-bit ARM".to_string(),
            243 => "RISC-V".to_string(),
            21 => "POWER".to_string(),
            22 => "s390".to_string(),
            EM_X86_64 => "x32".to_string(),
            other => format!("another architecture (ELF machine {other})"),
        };
        return Some(format!("is an ELF file for {name}: one for x86-64 is needed"));
    }
    let kind = number::<2>(head, 16);
    if kind != 2 && kind != 3 {
        return Some(
            "is an ELF file, but not one that can be run (a module or object file?): vmlinux is needed".into(),
        );
    }
    let (table, entry_size, count) = (number::<8>(head, 32), number::<2>(head, 54), number::<2>(head, 56));
    if entry_size != 56 || count == 0 {
        return Some("is an ELF file without anything to load: vmlinux is needed".into());
    }
    if table.checked_add(count * entry_size).is_none_or(|end| end > size) {
        return Some("is cut off: copy it again".into());
    }
    for index in 0..count {
        let at = table.saturating_add(index * entry_size);
        let Ok(at) = usize::try_from(at) else { break };
        if head.len() < at.saturating_add(56) {
            break; // beyond what was read: the loader finds out
        }
        let end = number::<8>(head, at + 8).checked_add(number::<8>(head, at + 32));
        if number::<4>(head, at) == 1 && end.is_none_or(|end| end > size) {
            return Some("is cut off: copy it again".into());
        }
    }
    None
}

/// Fields of the setup header (Linux, Documentation/arch/x86/boot.rst).
fn bzimage_problem(head: &[u8], size: u64) -> Option<String> {
    let setup_sectors = match number::<1>(head, 0x1f1) {
        0 => 4,
        sectors => sectors,
    };
    let version = number::<2>(head, 0x206);
    if version < 0x20c {
        return Some(format!(
            "speaks boot protocol {}.{:02}, which has no 64-bit entry: a 64-bit kernel of Linux 3.8 or later is needed",
            version >> 8,
            version & 0xff
        ));
    }
    if number::<2>(head, 0x236) & 1 == 0 {
        return Some("is a kernel for 32-bit x86: one for x86-64 (amd64) is needed".into());
    }
    let whole = (setup_sectors + 1) * 512 + number::<4>(head, 0x1f4) * 16;
    // The size is counted in units of 16 bytes.
    if size.saturating_add(15) < whole {
        return Some(format!("is cut off ({size} of {whole} bytes): copy it again"));
    }
    None
}

/// Opens the initial RAM file system; `look_inside` for those that we have not made ourselves.
pub(crate) fn open_initrd(path: &Path, look_inside: bool) -> Result<File, Error> {
    let what = "initrd";
    let file = open_file(what, path)?;
    if look_inside {
        let mut bytes = Vec::new();
        (&file).read_to_end(&mut bytes).map_err(|error| open_error(what, path, &error))?;
        if let Some(problem) = initrd_problem(&bytes) {
            return Err(Error::file(what, path, problem));
        }
    }
    Ok(file)
}

/// What is wrong with an initramfs: a sequence of cpio archives, each plain or (as the last) compressed.
fn initrd_problem(bytes: &[u8]) -> Option<String> {
    const CUT_OFF: &str = "is cut off: copy it again";
    let mut rest = bytes;
    let mut archives = 0;
    loop {
        while let Some(tail) = rest.strip_prefix(b"\0") {
            rest = tail;
        }
        if rest.is_empty() {
            return (archives == 0).then(|| "contains nothing but zeros".into());
        }
        if rest.starts_with(b"070701") || rest.starts_with(b"070702") {
            match skip_cpio(rest) {
                Some(tail) => rest = tail,
                None => return Some(CUT_OFF.into()),
            }
            archives += 1;
            continue;
        }
        if rest.starts_with(b"\xfd7zXZ\0") {
            // Every xz stream ends in "YZ" (The .xz File Format, 2.1.2), then zeros.
            let end = rest.iter().rposition(|&byte| byte != 0).map_or(0, |at| at + 1);
            return (rest.get(..end)?.len() < 32 || !rest.get(..end)?.ends_with(b"YZ")).then(|| CUT_OFF.into());
        }
        if rest.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            return zstd_cut_off(rest).then(|| CUT_OFF.into());
        }
        if rest.starts_with(&[0x02, 0x21, 0x4c, 0x18]) {
            return lz4_cut_off(rest).then(|| CUT_OFF.into());
        }
        if rest.starts_with(&[0x1f, 0x8b]) {
            let mut decoder = flate2::read::GzDecoder::new(rest);
            return match std::io::copy(&mut decoder, &mut std::io::sink()) {
                Ok(_) => None,
                Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Some(CUT_OFF.into()),
                Err(_) => Some("is damaged: copy it again".into()),
            };
        }
        if rest.starts_with(b"BZh") || rest.starts_with(&[0x5d, 0, 0]) || rest.starts_with(&[0x89, b'L', b'Z', b'O']) {
            return None; // bzip2, lzma, lzo: the guest finds out
        }
        return if archives == 0 {
            Some("is not an initramfs (a cpio archive, plain or compressed)".into())
        } else {
            Some("has something behind its archives that is not an archive: is it cut off or damaged?".into())
        };
    }
}

/// What follows the cpio archive (newc format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst) at the start of
/// `bytes`; `None` if it is not complete.
fn skip_cpio(bytes: &[u8]) -> Option<&[u8]> {
    const HEADER: usize = 110;
    let mut at = 0_usize;
    loop {
        let header = bytes.get(at..at.checked_add(HEADER)?)?;
        if !header.starts_with(b"07070") {
            return None;
        }
        let hex = |field: usize| {
            let start = 6 + field * 8;
            let digits = std::str::from_utf8(header.get(start..start + 8)?).ok()?;
            usize::from_str_radix(digits, 16).ok()
        };
        let (file_size, name_size) = (hex(6)?, hex(11)?);
        let name_start = at.checked_add(HEADER)?;
        let name_end = name_start.checked_add(name_size)?;
        let name = bytes.get(name_start..name_end)?;
        let data = name_end.checked_next_multiple_of(4)?;
        let end = data.checked_add(file_size)?.checked_next_multiple_of(4)?;
        if name == b"TRAILER!!!\0" {
            return Some(bytes.get(end..).unwrap_or_default());
        }
        at = end;
    }
}

/// Walks the blocks of a Zstandard frame (RFC 8878, 3.1.1) without unpacking.
fn zstd_cut_off(bytes: &[u8]) -> bool {
    let Some(&descriptor) = bytes.get(4) else { return true };
    let single = descriptor & 0x20 != 0;
    let content_size = match descriptor >> 6 {
        0 => usize::from(single),
        1 => 2,
        2 => 4,
        _ => 8,
    };
    let dictionary = [0, 1, 2, 4][usize::from(descriptor & 3)];
    let mut at = 5 + usize::from(!single) + dictionary + content_size;
    loop {
        if at + 3 > bytes.len() {
            return true;
        }
        let header = number::<3>(bytes, at) as usize;
        at += 3 + if (header >> 1) & 3 == 1 { 1 } else { header >> 3 };
        if header & 1 == 1 {
            return at + if descriptor & 4 != 0 { 4 } else { 0 } > bytes.len();
        }
    }
}

/// Walks the blocks of the legacy LZ4 format, which Linux uses: a length of 32 bits before each.
fn lz4_cut_off(bytes: &[u8]) -> bool {
    let mut at = 4;
    while at < bytes.len() {
        if bytes.len() - at < 4 {
            return bytes.get(at..).is_some_and(|rest| rest.iter().any(|&byte| byte != 0));
        }
        let len = number::<4>(bytes, at) as usize;
        if len == 0 {
            return false; // padding
        }
        if len != 0x184c_2102 {
            at += len;
        }
        at += 4;
    }
    at > bytes.len()
}

/// Opens and locks a disk. The second value is a line for the user, if there is something to say.
pub(crate) fn open_disk(config: &DiskConfig) -> Result<(Disk, Option<String>), Error> {
    let disk = Disk::open(config).map_err(|error| Error::Input(error.to_string()))?;
    let warning = disk.warning();
    Ok((disk, warning))
}

#[cfg(test)]
mod tests;
