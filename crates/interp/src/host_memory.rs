//! Access to guest RAM through host pointers: one machine instruction per access, so that it is exactly as atomic as the guest's
//! own would be, whatever other vCPU threads do at the same time.
//!
//! The accesses are inline assembly: to the compiler they are opaque, so racing with other threads is the hardware's matter (the
//! host has the guest's own memory model), not undefined behaviour.

use std::arch::asm;

/// Loads 1, 2, 4 or 8 bytes, zero-extended.
///
/// # Safety
/// `size` bytes at `p` must be mapped and readable for as long as the call lasts.
#[inline(always)]
pub(crate) unsafe fn load(p: *const u8, size: usize) -> u64 {
    let value: u64;
    // SAFETY: by the caller's promise; the instructions only read `size` bytes.
    unsafe {
        match size {
            1 => {
                asm!("movzx {0:e}, byte ptr [{1}]", out(reg) value, in(reg) p, options(nostack, preserves_flags, readonly))
            }
            2 => {
                asm!("movzx {0:e}, word ptr [{1}]", out(reg) value, in(reg) p, options(nostack, preserves_flags, readonly))
            }
            4 => {
                asm!("mov {0:e}, dword ptr [{1}]", out(reg) value, in(reg) p, options(nostack, preserves_flags, readonly))
            }
            _ => {
                asm!("mov {0}, qword ptr [{1}]", out(reg) value, in(reg) p, options(nostack, preserves_flags, readonly))
            }
        }
    }
    value
}

/// Stores the low 1, 2, 4 or 8 bytes of `value`.
///
/// # Safety
/// `size` bytes at `p` must be mapped and writable for as long as the call lasts.
#[inline(always)]
pub(crate) unsafe fn store(p: *mut u8, size: usize, value: u64) {
    // SAFETY: by the caller's promise; the instructions only write `size` bytes.
    unsafe {
        match size {
            1 => {
                asm!("mov byte ptr [{1}], {0}", in(reg_byte) value as u8, in(reg) p, options(nostack, preserves_flags))
            }
            2 => asm!("mov word ptr [{1}], {0:x}", in(reg) value, in(reg) p, options(nostack, preserves_flags)),
            4 => asm!("mov dword ptr [{1}], {0:e}", in(reg) value, in(reg) p, options(nostack, preserves_flags)),
            _ => asm!("mov qword ptr [{1}], {0}", in(reg) value, in(reg) p, options(nostack, preserves_flags)),
        }
    }
}

/// `lock cmpxchg` of 1, 2, 4 or 8 bytes: stores `new` if the memory holds `old`; returns what it held.
///
/// # Safety
/// As for [`store`].
#[inline(always)]
pub(crate) unsafe fn compare_exchange(p: *mut u8, size: usize, old: u64, new: u64) -> u64 {
    let mut rax = old;
    // SAFETY: by the caller's promise; the instructions only touch `size` bytes.
    unsafe {
        match size {
            1 => {
                asm!("lock cmpxchg byte ptr [{1}], {0}", in(reg_byte) new as u8, in(reg) p, inout("rax") rax, options(nostack))
            }
            2 => asm!("lock cmpxchg word ptr [{1}], {0:x}", in(reg) new, in(reg) p, inout("rax") rax, options(nostack)),
            4 => {
                asm!("lock cmpxchg dword ptr [{1}], {0:e}", in(reg) new, in(reg) p, inout("rax") rax, options(nostack))
            }
            _ => asm!("lock cmpxchg qword ptr [{1}], {0}", in(reg) new, in(reg) p, inout("rax") rax, options(nostack)),
        }
    }
    if size >= 8 { rax } else { rax & ((1 << (size * 8)) - 1) }
}

/// `lock cmpxchg16b`: stores `new` if the 16 bytes at `p` are `old`; returns what they were.
///
/// # Safety
/// As for [`store`]; `p` must be a multiple of 16, or the instruction raises `#GP`.
pub(crate) unsafe fn compare_exchange_16(p: *mut u8, old: u128, new: u128) -> u128 {
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: by the caller's promise. RBX is not available to inline assembly, so it is swapped in and out.
    unsafe {
        asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b xmmword ptr [{p}]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            p = in(reg) p,
            inout("rax") low,
            inout("rdx") high,
            in("rcx") (new >> 64) as u64,
            options(nostack)
        );
    }
    u128::from(low) | u128::from(high) << 64
}

/// Copies bytes that may be guest RAM on either side (also overlapping ones, lowest address first, as `rep movsb` does).
///
/// # Safety
/// `len` bytes must be mapped and readable at `from`, writable at `to`.
#[inline]
pub(crate) unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    // SAFETY: by the caller's promise; DF is clear in Rust code by the ABI.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") from => _, inout("rdi") to => _,
            options(nostack, preserves_flags));
    }
}

/// Fills `count` units of `size` (1, 2, 4, 8) bytes with `value`, upwards.
///
/// # Safety
/// `count * size` bytes must be mapped and writable at `to`.
#[inline]
pub(crate) unsafe fn fill(to: *mut u8, size: usize, count: usize, value: u64) {
    // SAFETY: by the caller's promise; DF is clear in Rust code by the ABI.
    unsafe {
        match size {
            1 => {
                asm!("rep stosb", inout("rcx") count => _, inout("rdi") to => _, in("rax") value, options(nostack, preserves_flags))
            }
            2 => {
                asm!("rep stosw", inout("rcx") count => _, inout("rdi") to => _, in("rax") value, options(nostack, preserves_flags))
            }
            4 => {
                asm!("rep stosd", inout("rcx") count => _, inout("rdi") to => _, in("rax") value, options(nostack, preserves_flags))
            }
            _ => {
                asm!("rep stosq", inout("rcx") count => _, inout("rdi") to => _, in("rax") value, options(nostack, preserves_flags))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        let mut bytes = [0x11u8, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0xff];
        let p = bytes.as_mut_ptr();
        // SAFETY: all inside `bytes`.
        unsafe {
            assert_eq!(load(p, 1), 0x11);
            assert_eq!(load(p, 2), 0x2211);
            assert_eq!(load(p, 4), 0x4433_2211);
            assert_eq!(load(p.add(1), 8), 0xff88_7766_5544_3322);
            store(p, 2, 0xdead_beef);
            assert_eq!(load(p, 4), 0x4433_beef);
            assert_eq!(compare_exchange(p, 1, 0xef, 0x01), 0xef);
            assert_eq!(compare_exchange(p, 2, 0xbeef, 0x02), 0xbe01);
            assert_eq!(load(p, 2), 0xbe01);
            fill(p, 2, 2, 0x0a0b);
            assert_eq!(load(p, 8), 0x8877_6655_0a0b_0a0b);
            copy(p, p.add(1), 3);
            assert_eq!(load(p, 4), 0x0b0b_0b0b);
        }
    }

    #[test]
    fn sixteen() {
        #[repr(align(16))]
        struct Cell(u128);
        let mut cell = Cell(5);
        let p = (&raw mut cell).cast::<u8>();
        // SAFETY: inside `cell`, aligned.
        unsafe {
            assert_eq!(compare_exchange_16(p, 5, (7 << 64) | 9), 5);
            assert_eq!(compare_exchange_16(p, 5, 1), (7 << 64) | 9);
        }
        assert_eq!(cell.0, (7 << 64) | 9);
    }
}
