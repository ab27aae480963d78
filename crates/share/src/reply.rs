//! An answer, written into the room that the guest offers for it.

use rustix::io::Errno;
use zerocopy::{Immutable, IntoBytes};

use crate::abi::{OUT_HEADER, OutHeader};
use crate::request::Result;

/// The body of an answer being written. The room is the guest's and may be too small for anything.
#[derive(Debug)]
pub struct Reply<'a> {
    /// Header and body.
    room: &'a mut [u8],
    /// Bytes of the body so far.
    len: usize,
}

impl<'a> Reply<'a> {
    /// An empty answer; `None` if there is no room for a header.
    pub fn new(room: &'a mut [u8]) -> Option<Self> {
        (room.len() >= OUT_HEADER).then_some(Self { room, len: 0 })
    }

    /// Where the rest of the body goes.
    pub fn room(&mut self) -> &mut [u8] {
        self.room.get_mut(OUT_HEADER + self.len..).unwrap_or_default()
    }

    /// Counts `count` bytes of [`Self::room`] as written.
    pub fn advance(&mut self, count: usize) {
        self.len += count.min(self.room().len());
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// EINVAL when there is no room.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<()> {
        self.room().get_mut(..bytes.len()).ok_or(Errno::INVAL)?.copy_from_slice(bytes);
        self.len += bytes.len();
        Ok(())
    }

    /// Appends a structure.
    ///
    /// # Errors
    /// EINVAL when there is no room.
    pub fn put<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<()> {
        self.bytes(value.as_bytes())
    }

    /// Writes the header for `result` of request `unique`; returns the bytes of the whole answer.
    pub fn finish(self, unique: u64, result: Result<()>) -> usize {
        let (error, body) = match result {
            Ok(()) => (0, self.len),
            Err(errno) => (-errno.raw_os_error(), 0),
        };
        let len = OUT_HEADER + body;
        let header = OutHeader { len: u32::try_from(len).unwrap_or(u32::MAX), error, unique };
        if let Some(place) = self.room.get_mut(..OUT_HEADER) {
            place.copy_from_slice(header.as_bytes());
        }
        len
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_respected() {
        assert!(Reply::new(&mut [0; 15]).is_none());
        let mut room = [0xaa; 20];
        let mut reply = Reply::new(&mut room).unwrap();
        assert_eq!(reply.put(&5u64), Err(Errno::INVAL));
        reply.put(&5u32).unwrap();
        assert_eq!(reply.bytes(b"x"), Err(Errno::INVAL));
        reply.advance(100);
        assert_eq!(reply.finish(7, Ok(())), 20);
        assert_eq!(room, [20, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0]);
        let mut reply = Reply::new(&mut room).unwrap();
        reply.put(&5u32).unwrap();
        assert_eq!(reply.finish(7, Err(Errno::NOENT)), 16);
        assert_eq!(room[4..8], (-2i32).to_le_bytes());
    }
}
