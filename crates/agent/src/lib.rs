//! The host's side of the agent: [`PROGRAM`], which goes into guests, and the talk with it. `docs/agent.md` describes both.
//!
//! * [`Session`]: one connection, one request. * [`exec`]: a program in the guest with this process's input, output and signals.

#![deny(missing_docs)]

pub mod exec;
mod session;

pub use agent_protocol::{Exec, Exit, without_numbers};
pub use session::{Problem, Session};

/// The agent: a static program for any x86-64 Linux guest.
pub const PROGRAM: &[u8] = include_bytes!(env!("TIGHTROPE_AGENT"));
