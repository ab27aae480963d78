//! Memory of the code cache: one memfd mapped twice, writable here and executable there.

use std::io;

/// The mapping. Positions are byte offsets from its start.
pub struct CodeMemory {
    write: *mut u8,
    exec: *const u8,
    size: usize,
}

// SAFETY: the pointers refer to mappings owned by this value; all writes go through `&mut self`.
unsafe impl Send for CodeMemory {}
// SAFETY: as above; shared references only compute addresses.
unsafe impl Sync for CodeMemory {}

impl CodeMemory {
    /// Maps `size` bytes (a multiple of the page size, below 1 GiB so that rel32 reaches everywhere).
    pub fn new(size: usize) -> io::Result<Self> {
        // SAFETY: plain system calls; results are checked, the file descriptor is closed, and the mappings belong to the
        // returned value.
        unsafe {
            let fd = libc::memfd_create(c"tightrope-code".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            if libc::ftruncate(fd, size as libc::off_t) != 0 {
                let error = io::Error::last_os_error();
                libc::close(fd);
                return Err(error);
            }
            let map = |protection| {
                libc::mmap(std::ptr::null_mut(), size, protection, libc::MAP_SHARED | libc::MAP_NORESERVE, fd, 0)
            };
            let write = map(libc::PROT_READ | libc::PROT_WRITE);
            let exec = map(libc::PROT_READ | libc::PROT_EXEC);
            let error = io::Error::last_os_error();
            libc::close(fd);
            if write == libc::MAP_FAILED || exec == libc::MAP_FAILED {
                for part in [write, exec] {
                    if part != libc::MAP_FAILED {
                        libc::munmap(part, size);
                    }
                }
                return Err(error);
            }
            Ok(Self { write: write.cast(), exec: exec.cast_const().cast(), size })
        }
    }

    /// Bytes in all.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The address at which the byte at `position` is executed.
    pub fn address(&self, position: usize) -> u64 {
        self.exec as u64 + position as u64
    }

    /// The position of an executable address, if it lies in the cache.
    pub fn position(&self, address: u64) -> Option<usize> {
        let position = address.wrapping_sub(self.exec as u64);
        (position < self.size as u64).then_some(position as usize)
    }

    /// Copies code to `position`.
    pub fn write(&mut self, position: usize, bytes: &[u8]) {
        assert!(position.checked_add(bytes.len()).is_some_and(|end| end <= self.size), "write outside the code cache");
        // SAFETY: the range lies in our own mapping, checked above, and `&mut self` excludes other writers.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.write.add(position), bytes.len()) }
    }

    /// Replaces the 32-bit displacement at `position` so that it leads to `target` (both positions), by one store: unless it lies in
    /// [two cache lines](Self::two_lines), others may run the jump meanwhile and go to the old target or to the new one.
    pub fn link(&mut self, position: usize, target: usize) {
        let displacement = (target as i64 - position as i64 - 4) as i32;
        assert!(position.checked_add(4).is_some_and(|end| end <= self.size), "write outside the code cache");
        // SAFETY: the range lies in our own mapping, checked above, and `&mut self` excludes other writers.
        unsafe {
            let place = self.write.add(position);
            std::arch::asm!("mov dword ptr [{}], {:e}", in(reg) place, in(reg) displacement,
                options(nostack, preserves_flags));
        }
    }

    /// Does a 32-bit field at `position` lie in two cache lines?
    pub fn two_lines(position: usize) -> bool {
        position % 64 > 60
    }

    /// Overwrites the code at `position` by a five-byte jump to `target` (both positions).
    pub fn write_jump(&mut self, position: usize, target: usize) {
        let displacement = (target as i64 - position as i64 - 5) as i32;
        let mut bytes = [0xe9, 0, 0, 0, 0];
        bytes[1..].copy_from_slice(&displacement.to_le_bytes());
        self.write(position, &bytes);
    }
}

impl Drop for CodeMemory {
    fn drop(&mut self) {
        // SAFETY: both mappings are ours and nothing refers to them any more.
        unsafe {
            libc::munmap(self.write.cast(), self.size);
            libc::munmap(self.exec.cast_mut().cast(), self.size);
        }
    }
}
