//! Guest physical memory.
//!
//! RAM is a [`GuestRam`]: the `vm-memory` regions that every device and engine shares, each with a [`WriteTracker`] in
//! place of a dirty bitmap. A translator keeps copies of guest code; when *anybody* (a device's DMA, a loader, another
//! vCPU's slow path) writes guest memory through `vm-memory`, the tracker looks whether the page holds translated code
//! and tells the listener. Engines that translate nothing never set a bit, and a write costs one load.
//!
//! Whoever writes guest memory through a raw pointer must call [`CodePages::written`] afterwards.
//!
//! Start reading at [`GuestRam::new`]; the address map is in [`layout`].

#![deny(missing_docs)]

mod ram;
mod tracker;

pub use ram::{GuestRam, RamError, VmMemory, layout};
pub use tracker::{CodePages, CodeWriteListener, WriteTracker};

/// Size of the pages that code tracking works in, in bytes.
pub const PAGE_SIZE: u64 = 4096;
