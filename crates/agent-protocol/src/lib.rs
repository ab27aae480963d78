//! What the host and the agent inside a guest say to each other: `docs/agent.md` is the description, this crate its code.
//!
//! * [`frame`]: lengths and kinds. * [`message`]: what frames mean. * [`archive`]: trees of files as a stream, and their confined unpacking.
//!
//! Both ends use it, and neither trusts the other: all sizes are bounded, and what does not fit the rules is an error, never a panic.

#![forbid(unsafe_code)]

pub mod archive;
pub mod frame;
pub mod message;

pub use frame::{Decoder, FrameError, MAX_BODY};
pub use message::{Exec, Exit, FromGuest, FromHost};

/// The protocol's version, which both ends say first. A change that the other end would misunderstand raises it.
pub const VERSION: u16 = 1;
/// The vsock port on which the agent listens, and that of the host at which it says that it is there. Below 1024: only root may
/// take it in a Linux guest, so no other program plays the agent.
pub const PORT: u32 = 1023;
/// Bytes of input for a program that may be on the way, before the agent says that they were taken.
pub const STDIN_WINDOW: usize = 256 << 10;
