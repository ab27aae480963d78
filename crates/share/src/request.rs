//! Requests, taken apart. The bytes are the guest's: nothing about them is believed.

use std::ffi::CStr;

use rustix::io::Errno;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::abi::{IN_HEADER, InHeader};

/// What the operations return: an error number for the guest.
pub type Result<T> = std::result::Result<T, Errno>;

/// The longest name of a directory entry, in bytes.
const MAX_NAME: usize = 255;

/// A request: its header, and what follows it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// The header.
    pub header: InHeader,
    rest: &'a [u8],
}

impl<'a> Request<'a> {
    /// Reads the header; `None` for what is no request. Bytes beyond the request's own length are ignored.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let header = InHeader::read_from_prefix(bytes).ok()?.0;
        let rest = bytes.get(IN_HEADER..usize::try_from(header.len).ok()?)?;
        Some(Self { header, rest })
    }

    /// The next structure.
    ///
    /// # Errors
    /// EINVAL when the request is too short.
    pub fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T> {
        let (value, rest) = T::read_from_prefix(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = rest;
        Ok(value)
    }

    /// The next text, which ends with a zero byte.
    ///
    /// # Errors
    /// EINVAL when it does not end.
    pub fn text(&mut self) -> Result<&'a CStr> {
        let text = CStr::from_bytes_until_nul(self.rest).map_err(|_| Errno::INVAL)?;
        self.rest = self.rest.get(text.to_bytes_with_nul().len()..).unwrap_or_default();
        Ok(text)
    }

    /// The next text as the name of a directory entry: one component of a path, and never one that leads up.
    ///
    /// # Errors
    /// EINVAL for what is no such name, ENAMETOOLONG.
    pub fn name(&mut self) -> Result<&'a CStr> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > MAX_NAME => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }

    /// The next `size` bytes.
    ///
    /// # Errors
    /// EINVAL when there are fewer.
    pub fn data(&mut self, size: u32) -> Result<&'a [u8]> {
        let (data, rest) = self.rest.split_at_checked(size as usize).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::abi::ForgetIn;
    use zerocopy::IntoBytes;

    fn request(len: u32, body: &[u8]) -> Vec<u8> {
        [InHeader { len, ..InHeader::default() }.as_bytes(), body].concat()
    }

    #[test]
    fn headers() {
        assert!(Request::parse(&[0; 39]).is_none());
        assert!(Request::parse(&request(39, b"")).is_none());
        assert!(Request::parse(&request(41, b"")).is_none());
        assert!(Request::parse(&request(u32::MAX, b"")).is_none());
        let bytes = request(43, b"abcd");
        let mut request = Request::parse(&bytes).unwrap();
        assert_eq!(request.take::<ForgetIn>(), Err(Errno::INVAL));
        assert_eq!(request.data(4), Err(Errno::INVAL));
        assert_eq!(request.data(3), Ok(&b"abc"[..]));
    }

    #[test]
    fn names() {
        let name = |text: &[u8]| {
            let bytes = request(40 + text.len() as u32, text);
            Request::parse(&bytes).unwrap().name().map(|name| name.to_bytes().to_vec())
        };
        for bad in [&b""[..], b"\0", b".\0", b"..\0", b"/\0", b"a/b\0", b"../x\0", b"/etc\0", b"endless"] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(name(&[&[b'x'; 256][..], b"\0"].concat()), Err(Errno::NAMETOOLONG));
        assert_eq!(name(b"...\0"), Ok(b"...".to_vec()));
        assert_eq!(name(b"a\0/b\0"), Ok(b"a".to_vec()));
        assert_eq!(name(b"\xff\n\0"), Ok(b"\xff\n".to_vec()));
    }
}
