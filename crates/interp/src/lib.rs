//! One-instruction executor: the precise, slow engine `interp`, the oracle of the translator and its path for everything sensitive.
//!
//! [`Interp::step`] executes exactly one instruction of a guest in 64-bit mode on a [`cpu::CpuState`]: fetch through the guest's page
//! tables, all checks before any side effect, exceptions delivered through the guest's IDT. What is neither sensitive nor common
//! (x87, SSE to AVX2, BMI, AES, SHA, ...) runs on the host CPU itself by the *native assist*: the instruction is copied into a
//! small executable buffer with its memory operand redirected to a bounce buffer, and run with the guest's registers.
//!
//! * [`Interp`]: step, deliver exceptions and interrupts, reach guest-virtual memory.
//! * [`Hooks`]: tells the caller what its own caches must forget.
//! * [`msr`]: the model-specific registers, usable without an interpreter.
//! * [`InterpEngine`]: the [`cpu::Engine`] made of it.
//!
//! Not here: 16-bit, 32-bit and compatibility-mode code ([`Outcome::Unsupported`]), task switches, virtual-8086 mode.
//!
//! Start reading at [`Interp::step`]; instructions are in `ops`, decoding in `decode`, the assist in `native`.

#![deny(missing_docs)]

mod checks;
mod decode;
#[cfg(test)]
mod differential;
mod engine;
mod events;
pub mod host_flags;
mod host_memory;
mod interp;
mod mmu;
pub mod msr;
mod native;
mod ops;
mod registers;
mod steal;
pub mod tsc;

pub use engine::InterpEngine;
pub use events::TripleFault;
pub use interp::{Delivery, Hooks, Interp, NoHooks, Observer, Outcome, TlbFlush};
pub use registers::GPR64;
