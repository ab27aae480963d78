//! Who owns a file, in the guest's eyes.
//!
//! On the host everything the guest makes belongs to the user the server runs as, and never carries a set-user-id or set-group-id bit.
//! The guest sees files of that user as root's. What it sets otherwise (another owner, these two bits) is kept in an extended attribute of
//! the file, which it cannot see itself. Files of other users of the host appear as nobody's.

use std::os::fd::BorrowedFd;

use rustix::fs::{Statx, XattrFlags};
use rustix::io::Errno;

use crate::host::Link;
use crate::request::Result;

/// The attribute's name.
pub const ATTRIBUTE: &std::ffi::CStr = c"user.tightrope.owner";
/// The set-user-id and set-group-id bits.
pub const SPECIAL: u32 = 0o6000;
/// The set-group-id bit.
pub const SET_GROUP: u32 = 0o2000;
/// The owner of what belongs to nobody here: the kernel's overflow id.
const NOBODY: u32 = 65534;

/// Ids of the host that the guest sees as root's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// An owner as the guest sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Which of [`SPECIAL`].
    pub special: u32,
}

impl Owner {
    /// What the file is without an attribute.
    pub fn of_host(stat: &Statx, identity: Identity) -> Self {
        let map = |id, own| if id == own { 0 } else { NOBODY };
        Self {
            uid: map(stat.stx_uid, identity.uid),
            gid: map(stat.stx_gid, identity.gid),
            special: u32::from(stat.stx_mode) & SPECIAL,
        }
    }

    fn parse(text: &[u8]) -> Option<Self> {
        let mut parts = std::str::from_utf8(text).ok()?.split(':');
        let mut next = |radix| u32::from_str_radix(parts.next()?, radix).ok();
        let owner = Self { uid: next(10)?, gid: next(10)?, special: next(8)? };
        (parts.next().is_none() && owner.special & !SPECIAL == 0).then_some(owner)
    }

    /// Reads the attribute of a regular file or directory; `None` if there is none that makes sense.
    ///
    /// # Errors
    /// The host's.
    pub fn read(fd: BorrowedFd<'_>) -> Result<Option<Self>> {
        let mut text = [0u8; 40];
        match rustix::fs::getxattr(Link::of(fd).path(), ATTRIBUTE, &mut text[..]) {
            Ok(len) => Ok(Self::parse(text.get(..len).unwrap_or_default())),
            Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(None),
            Err(errno) => Err(errno),
        }
    }

    /// Makes this the owner of a regular file or directory, which is `host` without an attribute.
    ///
    /// # Errors
    /// EPERM where the host's file system has no such attributes.
    pub fn write(self, fd: BorrowedFd<'_>, host: Self) -> Result<()> {
        let link = Link::of(fd);
        if self == host {
            return match rustix::fs::removexattr(link.path(), ATTRIBUTE) {
                Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(()),
                other => other,
            };
        }
        let text = format!("{}:{}:{:o}", self.uid, self.gid, self.special & SPECIAL);
        match rustix::fs::setxattr(link.path(), ATTRIBUTE, text.as_bytes(), XattrFlags::empty()) {
            Err(Errno::OPNOTSUPP) => Err(Errno::PERM),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes() {
        assert_eq!(Owner::parse(b"1000:100:4000"), Some(Owner { uid: 1000, gid: 100, special: 0o4000 }));
        for bad in
            [&b""[..], b"1000", b"1:2", b"1:2:3:4", b"1:2:755", b"-1:0:0", b"a:b:c", b"\xff:0:0", b"99999999999:0:0"]
        {
            assert_eq!(Owner::parse(bad), None, "{bad:?}");
        }
    }
}
