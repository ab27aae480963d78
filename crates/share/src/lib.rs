//! Directories of the host shared with a guest: a FUSE server (virtio 1.3, 5.11; Linux, Documentation/filesystems/fuse.rst) in a confined
//! process of its own.
//!
//! * [`fs`]: the file system, a function from requests to answers. Start reading here.
//! * [`channel`]: the memory and signals by which the monitor hands requests over: the server never sees the guest's memory.
//! * [`server`]: the process: started by the monitor, confined by [`sandbox`].
//! * [`abi`], [`request`], [`reply`]: the protocol's bytes. [`owner`]: who owns a file in the guest.
//!
//! What a hostile guest can do is what the user who started the server can do inside the shared directory, less set-user-id bits, device
//! nodes and file capabilities. It never gets out of it: every file is reached by one component at a time below a descriptor of a
//! directory, with no symbolic link, no `..` and no mount point followed, and Landlock (where the host has it) allows nothing else.
//!
//! Not here: locks (the guest's kernel has them for its own processes; they do not reach the host), notifications, DAX.

#![deny(missing_docs)]

pub mod abi;
pub mod channel;
pub mod fs;
mod host;
mod inode;
pub mod owner;
pub mod reply;
pub mod request;
pub mod sandbox;
pub mod server;
#[cfg(test)]
mod testing;

pub use fs::{Access, FileSystem};
