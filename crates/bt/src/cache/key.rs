//! What blocks are found by.

use std::hash::{Hash, Hasher};

use crate::analyze::Mode;

/// A guest-virtual address as translated code has it.
///
/// Every page of movable code has a number, and every vCPU an address for each number, its *base* ([`crate::block::VcpuBlock::bases`]): where it
/// runs the page. Addresses in such code are relative to the base. A base is set before the page is entered, and changes only when
/// the vCPU has forgotten all jumps (see [`crate::tlb::Tlbs::place`]). All else has base 0, which is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Relative to the base.
    pub address: u64,
    /// Number of the base.
    pub base: u32,
}

/// Programs' code below this guest-virtual address is movable. Above it, a direct jump may lead to an address that is not canonical, which only
/// the jump's own address can tell.
pub const MOVABLE_END: u64 = (1 << 47) - (1 << 32);

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Key {
    /// Guest-physical address of the page.
    pub page: u64,
    /// Guest-virtual address of the first instruction; of movable code, its offset in the page.
    pub address: u64,
    pub mode: Mode,
    /// For a block of one instruction that crosses into the next page: that page's guest-physical address | 1. Else 0.
    pub tail: u64,
}

impl Key {
    /// The key, but for the tail, of the code at a guest-virtual address in the page at guest-physical address `page`.
    pub fn new(page: u64, address: u64, mode: Mode) -> Self {
        let movable = mode.user && address < MOVABLE_END;
        Self { page, address: if movable { address & 0xfff } else { address }, mode, tail: 0 }
    }

    /// Is it movable code?
    pub fn movable(&self) -> bool {
        self.mode.user && self.address < 4096
    }
}

impl Hash for Key {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.page ^ self.tail.rotate_left(32) ^ u64::from(self.mode.bits()));
        state.write_u64(self.address);
    }
}

/// A multiplicative hasher for keys made of integers.
#[derive(Default)]
pub struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0 ^ (self.0 >> 29)
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}
