//! Which format a file has: what the user says, or else its name and its contents, which must agree.
//!
//! A guest that is given a raw image decides what its first bytes are. If contents alone decided, it could write the header of a qcow2
//! image there, and at the next start that header would name any file of the host as backing file. The name is what the guest
//! cannot change: only a file named `.qcow2` or `.qcow` is taken for a qcow2 image without being asked; what contradicts its name is
//! refused until the user says which it is.

use std::path::Path;

use crate::options::Format;
use crate::qcow2::header::MAGIC;

/// Decides on the format of the file `path` that starts with `head`.
///
/// # Errors
/// What is wrong and the remedy, to go on after the file's name.
pub fn decide(path: &Path, head: &[u8], said: Option<Format>) -> Result<Format, String> {
    let qcow2 = head.starts_with(&MAGIC);
    match said {
        Some(Format::Raw) => return Ok(Format::Raw),
        Some(Format::Qcow2) if qcow2 => return Ok(Format::Qcow2),
        Some(Format::Qcow2) => return Err("is not a qcow2 image, as format=qcow2 says: leave that away".into()),
        None => {}
    }
    match (named_qcow2(path), qcow2) {
        (true, true) => Ok(Format::Qcow2),
        (true, false) => Err("is named like a qcow2 image but is none: say format=raw if it is a raw one".into()),
        (false, true) => {
            Err("starts like a qcow2 image but is not named so (.qcow2): say format=qcow2 if you made it as one; \
             say format=raw if a guest wrote it"
                .into())
        }
        (false, false) => other(head).map_or(Ok(Format::Raw), Err),
    }
}

fn named_qcow2(path: &Path) -> bool {
    path.extension().is_some_and(|name| name.eq_ignore_ascii_case("qcow2") || name.eq_ignore_ascii_case("qcow"))
}

/// Formats that are not read here. A guest may write their first bytes too, so `format=raw` passes them.
fn other(head: &[u8]) -> Option<String> {
    let format = if head.starts_with(b"KDMV") || head.starts_with(b"# Disk Descripto") {
        "vmdk"
    } else if head.starts_with(b"vhdxfile") {
        "vhdx"
    } else if head.starts_with(b"\xfd7zXZ\0")
        || head.starts_with(&[0x1f, 0x8b])
        || head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
    {
        return Some("is compressed: unpack it first (or say format=raw if a guest wrote it so)".into());
    } else {
        return None;
    };
    Some(format!(
        "is a {format} image, and raw or qcow2 is needed: qemu-img convert -O qcow2 makes one (say format=raw if a guest wrote it so)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_and_contents_must_agree() {
        let try_it = |path: &str, head: &[u8], said| decide(Path::new(path), head, said);
        assert_eq!(try_it("a.img", b"\0\0\0\0", None), Ok(Format::Raw));
        assert_eq!(try_it("a", b"", None), Ok(Format::Raw));
        assert_eq!(try_it("a.QCOW2", b"QFI\xfb", None), Ok(Format::Qcow2));
        // What a guest may have written.
        for path in ["a.img", "a.raw", "a", "/dev/sda", "qcow2"] {
            assert!(try_it(path, b"QFI\xfb\0\0\0\x03", None).unwrap_err().contains("format=raw"));
            assert_eq!(try_it(path, b"QFI\xfb\0\0\0\x03", Some(Format::Raw)), Ok(Format::Raw));
            assert_eq!(try_it(path, b"QFI\xfb\0\0\0\x03", Some(Format::Qcow2)), Ok(Format::Qcow2));
        }
        assert!(try_it("a.qcow2", b"text", None).unwrap_err().contains("is none"));
        assert!(try_it("a.qcow2", b"text", Some(Format::Qcow2)).is_err());
        assert!(try_it("a.vmdk", b"KDMV", None).unwrap_err().contains("vmdk"));
        assert_eq!(try_it("a.img", b"KDMV", Some(Format::Raw)), Ok(Format::Raw));
    }
}
