//! The host's side of the agent: [`PROGRAM`], which goes into guests, and the talk with it. `docs/agent.md` describes both.

#![deny(missing_docs)]

/// The agent: a static program for any x86-64 Linux guest.
pub const PROGRAM: &[u8] = include_bytes!(env!("TIGHTROPE_AGENT"));
