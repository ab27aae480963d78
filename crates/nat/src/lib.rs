//! User-mode network for one guest, without any privilege: what the guest sends ends here and goes on by sockets of the host.
//!
//! ```text
//!   guest ── frames ──▶ link ▶ frame ▶ nat ─┬─ arp, ndp, dhcp, dns     answered here
//!         ◀───────────  link ◀────────────  ├─ tcp   a connection here, a socket there
//!                                           ├─ udp   a connected socket a flow
//!                                           └─ icmp  echo through ping sockets
//! ```
//!
//! * [`Nat`]: the whole; start reading there. [`addresses`]: the network that the guest sees.
//! * [`policy`]: what the guest may reach; the one place that decides.
//! * [`server`]: the process around it; [`relay`]: the other thing that this process can be, a cable to a socket of somebody else.
//! * [`sandbox`]: what the process may do.
//!
//! The guest is hostile: every table is bounded, every length checked, and the process holds nothing but this guest's sockets. Packet
//! formats are `smoltcp`'s; its TCP is not used, as it cannot leave segmentation and checksums to the guest's side, which is where the
//! speed comes from.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

pub mod addresses;
mod arp;
mod checksum;
mod config;
mod dhcp;
mod dns;
mod fragment;
mod frame;
mod icmp;
mod link;
mod nat;
mod ndp;
pub mod policy;
mod poll;
mod rate;
pub mod relay;
mod ring;
pub mod sandbox;
pub mod server;
mod slab;
mod tcp;
#[cfg(test)]
mod tests;
mod udp;

pub use config::NatConfig;
pub use nat::{Nat, PortForward};
