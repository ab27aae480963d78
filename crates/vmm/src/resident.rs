//! What of the program is resident while a VM runs.
//!
//! Building a VM goes through much code that its run never comes to again: arguments, images, checks. The pages of the program and its
//! libraries that hold it are the page cache's, but they count as this process's memory. They are given back before the first instruction; what is
//! used again comes back by faults that need no reading.

use libc::{PF_W, PT_LOAD};

/// Gives back all pages of the program and its libraries that nothing was written to, and what is free of the heap.
pub(crate) fn forget_startup() {
    // SAFETY: no preconditions; only memory that nobody has is given back.
    unsafe { libc::malloc_trim(0) };
    // SAFETY: the callback has the signature that is asked for and needs no data.
    unsafe { libc::dl_iterate_phdr(Some(object), std::ptr::null_mut()) };
}

/// Gives back the read-only segments of one object.
unsafe extern "C" fn object(info: *mut libc::dl_phdr_info, _: usize, _: *mut libc::c_void) -> i32 {
    const PAGE: u64 = memory::PAGE_SIZE;
    // SAFETY: the loader passes a description that is valid during the call.
    let info = unsafe { &*info };
    // SAFETY: no preconditions.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    if info.dlpi_phdr.is_null() || info.dlpi_addr == vdso {
        return 0;
    }
    // SAFETY: so many program headers are there, as long as the object is loaded.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    for header in headers.iter().filter(|header| header.p_type == PT_LOAD && header.p_flags & PF_W == 0) {
        let start = info.dlpi_addr.wrapping_add(header.p_vaddr);
        // Whole pages only: the next segment may begin in the last one.
        let (first, end) = (start.next_multiple_of(PAGE), start.wrapping_add(header.p_memsz) / PAGE * PAGE);
        if end > first {
            // SAFETY: the segment is mapped from a file and was never writable, so its pages are the file's: the next access finds
            // them there again.
            unsafe { libc::madvise(first as *mut libc::c_void, (end - first) as usize, libc::MADV_DONTNEED) };
        }
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident memory of this process that files stand behind, in KiB.
    fn file_pages() -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn pages_go_and_come_back() {
        let before = file_pages();
        forget_startup();
        let after = file_pages();
        assert!(after < before / 2, "{before} KiB, {after} KiB");
        // All goes on: code, constants, unwinding.
        assert_eq!(format!("{:?}", "text".parse::<u32>().is_err()), "true");
        std::panic::catch_unwind(|| std::panic::resume_unwind(Box::new(()))).unwrap_err();
    }
}
