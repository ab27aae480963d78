//! What a program may ask of every data access: debug breakpoints (SDM volume 3, 18.2) and alignment checks (6.15, interrupt 17).
//!
//! [`Checks::arm`] looks at the registers before an instruction; its accesses then report to [`Checks::access`] and
//! [`Checks::port`], and [`Checks::finish`] says which breakpoints are to trap after it. Instruction breakpoints are faults before an
//! instruction and need no more than its address.
//!
//! What the CPU reads and writes by itself (descriptors, the TSS, frames of exceptions, page tables) is not looked at.

use cpu::paging::is_canonical;
use cpu::{CpuState, Exception, cr0, cr4, rflags, vector};

/// DR7: what breakpoint `i` waits for (bits 16 to 17 of it), and for how many bytes (bits 18 to 19).
fn kind(dr7: u64, i: u64) -> u64 {
    dr7 >> (16 + i * 4) & 3
}

const EXECUTE: u64 = 0;
const WRITE: u64 = 1;
const IO: u64 = 2;
const READ_WRITE: u64 = 3;

/// Is breakpoint `i` enabled, locally or globally?
fn enabled(dr7: u64, i: u64) -> bool {
    dr7 >> (i * 2) & 3 != 0
}

/// The bytes that breakpoint `i` watches. The CPU ignores the low bits of the address that its length leaves out.
fn range(state: &CpuState, i: u64) -> (u64, u64) {
    let length = match state.dr[7] >> (18 + i * 4) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };
    (state.dr.get(i as usize).map_or(0, |address| address & !(length - 1)), length)
}

fn overlap((a, length_a): (u64, u64), (b, length_b): (u64, u64)) -> bool {
    b.wrapping_sub(a) < length_a || a.wrapping_sub(b) < length_b
}

/// The instruction breakpoints set at RIP, as bits of DR6.
pub(crate) fn instruction_breakpoints(state: &CpuState) -> u64 {
    let dr7 = state.dr[7];
    (0..4)
        .filter(|&i| enabled(dr7, i) && kind(dr7, i) == EXECUTE && state.dr.get(i as usize) == Some(&state.rip))
        .fold(0, |bits, i| bits | 1 << i)
}

/// A breakpoint on data or ports.
#[derive(Clone, Copy, Default)]
struct Watch {
    range: (u64, u64),
    kind: u64,
}

/// The checks of one vCPU.
#[derive(Default)]
pub(crate) struct Checks {
    /// Something has to be looked at. Only then do the others count.
    pub(crate) armed: bool,
    /// Misaligned accesses of the program raise `#AC`.
    pub(crate) alignment: bool,
    /// Breakpoints on data and ports; those of another kind are [`EXECUTE`].
    watches: [Watch; 4],
    /// Breakpoints that the instruction has hit, as bits of DR6.
    hits: u64,
    /// MOV SS or POP SS came before: nothing of the debugger's comes between it and the next instruction, which reports what it hit.
    held: Option<u64>,
}

impl Checks {
    /// Do the registers ask for a look at data accesses?
    #[inline(always)]
    pub(crate) fn wanted(state: &CpuState) -> bool {
        state.dr[7] & 0xff != 0 || alignment(state)
    }

    /// Before an instruction.
    pub(crate) fn arm(&mut self, state: &CpuState) {
        self.alignment = alignment(state);
        let dr7 = state.dr[7];
        for (i, watch) in (0..).zip(&mut self.watches) {
            let kind = kind(dr7, i);
            let on = enabled(dr7, i) && (kind != IO || state.cr4 & cr4::DE != 0);
            *watch = Watch { range: range(state, i), kind: if on { kind } else { EXECUTE } };
        }
        self.hits = 0;
        self.armed = true;
    }

    /// Did MOV SS or POP SS come just before?
    pub(crate) fn behind_stack_switch(&self) -> bool {
        self.held.is_some()
    }

    /// After an instruction that has completed: what it hit, as bits of DR6. `hold`: it was MOV SS or POP SS.
    pub(crate) fn finish(&mut self, hold: bool) -> u64 {
        let hits = if self.armed { std::mem::take(&mut self.hits) } else { 0 };
        self.armed = false;
        let hits = hits | self.held.take().unwrap_or(0);
        if hold {
            self.held = Some(hits);
            return 0;
        }
        hits
    }

    /// After an instruction that faulted, and at the start of whatever is none.
    pub(crate) fn disarm(&mut self) {
        self.armed = false;
        self.alignment = false;
        self.hits = 0;
    }

    fn note(&mut self, bytes: (u64, u64), matches: impl Fn(u64) -> bool) {
        for (i, watch) in self.watches.iter().enumerate() {
            if matches(watch.kind) && overlap(watch.range, bytes) {
                self.hits |= 1 << i;
            }
        }
    }

    /// A data access of the instruction.
    pub(crate) fn access(&mut self, address: u64, size: usize, write: bool) {
        self.note((address, size as u64), |kind| kind == READ_WRITE || (write && kind == WRITE));
    }

    /// IN or OUT.
    pub(crate) fn port(&mut self, port: u16, size: u8) {
        if self.armed {
            self.note((port.into(), size.into()), |kind| kind == IO);
        }
    }

    /// `#AC(0)` where an access at `address` must be aligned to `to` bytes (a power of two) and is not.
    pub(crate) fn aligned(&self, address: u64, to: usize) -> Result<(), Exception> {
        // Addresses that are not canonical come first; page faults come later.
        if self.armed && self.alignment && address & (to as u64).wrapping_sub(1) != 0 && is_canonical(address) {
            return Err(Exception::with_code(vector::AC, 0));
        }
        Ok(())
    }
}

#[inline(always)]
fn alignment(state: &CpuState) -> bool {
    state.rflags & rflags::AC != 0 && state.cr0 & cr0::AM != 0 && state.cpl() == 3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(address: u64, kind: u64, length: u64) -> CpuState {
        let mut state = CpuState::default();
        state.dr[2] = address;
        state.dr[7] = 0x10 | (kind | length << 2) << 24;
        state
    }

    fn hits(state: &CpuState, address: u64, size: usize, write: bool) -> u64 {
        let mut checks = Checks::default();
        checks.arm(state);
        checks.access(address, size, write);
        checks.finish(false)
    }

    #[test]
    fn ranges() {
        // Length bits, bytes.
        for (length, bytes) in [(0, 1), (1, 2), (3, 4), (2, 8)] {
            let state = state(0x1000, READ_WRITE, length);
            for size in [1, 2, 4, 8, 32] {
                for address in 0xfc0..0x1040_u64 {
                    let expected = address < 0x1000 + bytes && address + size > 0x1000;
                    assert_eq!(
                        hits(&state, address, size as usize, false) == 4,
                        expected,
                        "{bytes} {address:#x} {size}"
                    );
                }
            }
        }
        // Low bits of the address do not count; the address space ends.
        assert_eq!(hits(&state(0x1007, WRITE, 2), 0x1000, 1, true), 4);
        assert_eq!(hits(&state(0x1003, WRITE, 1), 0x1001, 1, true), 0);
        assert_eq!(hits(&state(!0, WRITE, 0), !3, 4, true), 4);
        assert_eq!(hits(&state(!0, WRITE, 0), 0, 8, true), 0);
    }

    #[test]
    fn kinds() {
        for (kind, read, write) in [(EXECUTE, 0, 0), (WRITE, 0, 4), (IO, 0, 0), (READ_WRITE, 4, 4)] {
            let mut state = state(0x60, kind, 0);
            assert_eq!((hits(&state, 0x60, 1, false), hits(&state, 0x60, 1, true)), (read, write));
            for de in [0, cr4::DE] {
                state.cr4 = de;
                let mut checks = Checks::default();
                checks.arm(&state);
                checks.port(0x5d, 4);
                assert_eq!(checks.finish(false), if kind == IO && de != 0 { 4 } else { 0 });
            }
            state.dr[7] &= !0xff;
            assert_eq!(hits(&state, 0x60, 1, true), 0, "not enabled");
        }
    }

    #[test]
    fn held_back() {
        let mut checks = Checks::default();
        checks.arm(&state(0x1000, READ_WRITE, 0));
        checks.access(0x1000, 2, false);
        assert_eq!(checks.finish(true), 0);
        assert!(checks.behind_stack_switch());
        assert_eq!(checks.finish(false), 4);
        assert!(!checks.behind_stack_switch());
        assert_eq!(checks.finish(false), 0);
    }
}
