//! Small guests of our own, each under every engine by a parameter, with the same expected results: traps, interrupts, self-modifying
//! code, changes of mappings, sensitive instructions.
//!
//! [`guest::Guest`] is the machine around them; start there.

mod across;
mod contexts;
mod debug;
mod direct;
mod guest;
mod interrupts;
mod lockstep;
mod mappings;
mod measures;
mod modified;
mod movable;
mod sensitive;
mod smp;
mod system;
mod tiers;
mod trace;
mod traps;
