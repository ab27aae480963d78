//! What a format is to a disk.

use std::fmt::Debug;
use std::fs::File;
use std::io;

use crate::options::Format;

/// A piece of memory that data is read to or written from. Others may change it at any time (a guest does).
pub type Slice<'m> = vm_memory::VolatileSlice<'m, ()>;

/// An open disk of some format. Called from several threads at once; the caller keeps requests within [`Self::size`].
pub trait Backend: Debug + Send + Sync {
    /// Which format it is.
    fn format(&self) -> Format;

    /// Bytes.
    fn size(&self) -> u64;

    /// Fills `buffers` from byte `offset` on. Returns the bytes read even on error.
    fn read(&self, offset: u64, buffers: &[Slice<'_>]) -> (u64, io::Result<()>);

    /// Writes `buffers` at byte `offset`.
    ///
    /// # Errors
    /// The host's; part of the data may have been written.
    fn write(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()>;

    /// Makes all completed writes durable.
    ///
    /// # Errors
    /// The host's.
    fn flush(&self) -> io::Result<()>;

    /// Gives the space of a range back to the host; it reads as zeroes or as before. A hint.
    ///
    /// # Errors
    /// The host's; none where no space can be given back.
    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Zeroes a range; gives its space back if `unmap` allows and the host can.
    ///
    /// # Errors
    /// The host's.
    fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()>;

    /// Looks at the file again: its size may have changed by others' doing. Returns [`Self::size`] from now on.
    ///
    /// # Errors
    /// The host's.
    fn look_again(&self) -> io::Result<u64> {
        Ok(self.size())
    }

    /// Changes its size, keeping what both sizes have. No request is being worked on.
    ///
    /// # Errors
    /// The host's.
    fn resize(&self, bytes: u64) -> io::Result<()>;

    /// The file, where byte n of the disk is byte n of the file: for those who talk to the kernel themselves.
    fn plain_file(&self) -> Option<&File> {
        None
    }
}
