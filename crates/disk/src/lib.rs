//! Disk images on the host: raw files, block devices and qcow2.
//!
//! * [`DiskConfig`]: what the user says. * [`Disk`]: an open, locked disk; [`Backend`] is what differs between formats.
//! * [`raw`], [`qcow2`]: the formats; [`mod@format`] decides which one a file has.
//! * [`create`], [`resize`], [`convert`], [`info`], [`check`]: what `tightrope disk` does.
//! * [`limit`]: limits on bytes and requests a second.
//!
//! An image may come from anybody, and a guest writes what it likes into its own. So whatever a file says is checked before it is believed, the files it names are
//! opened only where the user granted them, and everything is opened before the process confines itself: after
//! [`Disk::open`] nothing here opens anything.
//!
//! qcow2 itself is read and written by the `imago` library, to which only checked headers and open files are given.

mod backend;
mod disk;
mod error;
pub mod file;
pub mod format;
pub mod limit;
mod options;
pub mod qcow2;
pub mod raw;
mod space;
mod tools;

pub use backend::{Backend, Slice};
pub use disk::{Disk, Reporter};
pub use error::DiskError;
pub use file::SECTOR;
pub use options::{Backing, Cache, DiskConfig, Format, Io, Limits, parse_size};
pub use qcow2::check::{Report, check};
pub use tools::{Create, Info, convert, create, info, resize, trusting};
