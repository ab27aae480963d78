//! Loading a Linux kernel and what it needs to start (Documentation/arch/x86/boot.rst and zero-page.rst in the kernel's source).
//!
//! [`load`] takes the bytes of a bzImage or an ELF vmlinux. A bzImage's payload is unpacked here ([`unpack()`]) to the vmlinux it
//! contains, whose segments go to the physical addresses they were linked for. The kernel then starts at `startup_64` as after its
//! own decompressor, with one difference: the decompressor also chooses a random place (KASLR) and relocates the kernel
//! to it, and that is not done. Where the payload cannot be unpacked, or on demand, the bzImage's own code runs instead.

mod image;
pub mod park;
mod unpack;

pub use image::{BzImage, Elf, Kernel, SETUP_HEADER, Segment, parse, parse_elf};
pub use unpack::{UnpackError, unpack};

use std::borrow::Cow;
use std::io::Read;
use std::path::{Path, PathBuf};

use memory::GuestRam;

use crate::layout;

/// Why a guest cannot be loaded. The message is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("cannot read the {what} {}: {source}", path.display())]
    Read {
        /// Kernel or initrd.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is bigger than any memory we would give.
    #[error("the {what} {} is too big: at most 2 GiB are possible", path.display())]
    FileTooBig {
        /// Kernel or initrd.
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// It is no kernel.
    #[error(
        "the kernel file is neither a bzImage nor an ELF vmlinux: give a Linux kernel for x86-64 (/boot/vmlinuz-…)"
    )]
    NotAKernel,
    /// It is a kernel for something else.
    #[error("the kernel is for {0}: give one for x86-64")]
    Architecture(&'static str),
    /// It is too old.
    #[error("the kernel speaks boot protocol {}.{}, too old for a 64-bit entry: give Linux 3.8 or later", .0 >> 8, .0 & 0xff)]
    Protocol(u16),
    /// It ends too early.
    #[error("the kernel file is truncated ({0}): copy or download it again")]
    Truncated(&'static str),
    /// It contradicts itself.
    #[error("the kernel file is damaged ({0}): copy or download it again")]
    Damaged(&'static str),
    /// The kernel does not fit.
    #[error("the kernel needs memory up to {} MiB, the guest has {} MiB: give more --memory", .need.div_ceil(1 << 20), .have >> 20)]
    KernelMemory {
        /// End address it needs.
        need: u64,
        /// End of RAM.
        have: u64,
    },
    /// The initrd does not fit.
    #[error("the initrd of {} MiB does not fit beside the kernel into the guest's memory of {} MiB: give more --memory", .size.div_ceil(1 << 20), .have >> 20)]
    InitrdMemory {
        /// Its bytes.
        size: u64,
        /// End of RAM.
        have: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes, this kernel takes {max}: shorten --append")]
    CommandLine {
        /// Its length.
        len: u64,
        /// What is possible.
        max: u64,
    },
    /// A zero byte would end the command line early.
    #[error("the kernel command line contains a zero byte: remove it from --append")]
    CommandLineZero,
    /// Something lies where no RAM is.
    #[error("{what} at {address:#x} is outside the guest's memory: give more --memory")]
    OutsideRam {
        /// What.
        what: &'static str,
        /// Where.
        address: u64,
    },
}

/// Reads a kernel or initrd file whole; `what` names it in errors.
///
/// # Errors
/// It is missing, unreadable or over 2 GiB.
pub fn read_file(what: &'static str, path: &Path) -> Result<Vec<u8>, BootError> {
    const MAX: u64 = 2 << 30;
    let error = |source| BootError::Read { what, path: path.to_owned(), source };
    let mut data = Vec::new();
    let file = std::fs::File::open(path).map_err(error)?;
    file.take(MAX + 1).read_to_end(&mut data).map_err(error)?;
    if data.len() as u64 > MAX {
        return Err(BootError::FileTooBig { what, path: path.to_owned() });
    }
    Ok(data)
}

/// What to boot.
#[derive(Clone, Copy, Debug, Default)]
pub struct BootSource<'a> {
    /// The kernel file.
    pub kernel: &'a [u8],
    /// What the payload of `kernel`, a bzImage, unpacks to, if known from earlier (see [`unpack_kernel`]). Not used if it is no
    /// kernel.
    pub unpacked: Option<&'a [u8]>,
    /// The initial RAM disk.
    pub initrd: Option<&'a [u8]>,
    /// The kernel command line.
    pub command_line: &'a str,
    /// Let a bzImage unpack itself.
    pub own_decompressor: bool,
}

/// What was loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Guest-physical address of the 64-bit entry point; [`park::bootstrap_cpu`] makes the CPU state for it.
    pub entry: u64,
    /// Why a bzImage's payload was left to its own decompressor, if not on demand.
    pub not_unpacked: Option<UnpackError>,
}

/// Loads kernel, initrd, command line and `boot_params` into RAM. ACPI tables, page tables and GDT are
/// put there by [`crate::Pc`].
///
/// # Errors
/// See [`BootError`].
pub fn load(ram: &GuestRam, source: &BootSource<'_>) -> Result<Loaded, BootError> {
    let low_end = ram.size().min(layout::PCI_HOLE_START);
    let mut not_unpacked = None;
    let (header, limits, entry, kernel_end);
    match parse(source.kernel)? {
        Kernel::Elf(elf) => {
            kernel_end = load_elf(ram, &elf, low_end)?;
            entry = elf.entry;
            (header, limits) = (None, (u32::MAX.into(), 2047));
        }
        Kernel::BzImage(image) => {
            let known = source.unpacked.filter(|elf| parse_elf(elf).is_ok());
            let unpacked = match known {
                _ if source.own_decompressor => None,
                Some(elf) => Some(Cow::Borrowed(elf)),
                // A kernel is linked for an address near its load address: what it unpacks to fits what it says it needs.
                None => unpack(image.payload, image.init_size.min(low_end))
                    .map_err(|error| not_unpacked = Some(error))
                    .map(Cow::Owned)
                    .ok(),
            };
            let loaded = match &unpacked {
                Some(elf) => {
                    let elf = parse_elf(elf)?;
                    (elf.entry, load_elf(ram, &elf, low_end)?)
                }
                None => load_bzimage(ram, &image, low_end)?,
            };
            entry = loaded.0;
            // `init_size` also covers what the kernel uses before it has a memory map.
            kernel_end = loaded.1.max(image.preferred_address.saturating_add(image.init_size).min(low_end));
            (header, limits) = (Some(image.header), (image.initrd_max, image.command_line_max));
        }
    }
    let initrd = match source.initrd {
        Some(initrd) if !initrd.is_empty() => Some(load_initrd(ram, initrd, kernel_end, low_end, limits.0)?),
        _ => None,
    };
    load_command_line(ram, source.command_line, limits.1)?;
    let params = boot_params(ram.size(), header, initrd);
    write(ram, "boot_params", layout::BOOT_PARAMS, &params)?;
    Ok(Loaded { entry, not_unpacked })
}

/// What the payload of a bzImage unpacks to, if `kernel` is one and its payload can be unpacked here. To be kept by those who boot
/// the same kernel often: see [`BootSource::unpacked`].
pub fn unpack_kernel(kernel: &[u8]) -> Option<Vec<u8>> {
    match parse(kernel).ok()? {
        Kernel::BzImage(image) => unpack(image.payload, image.init_size).ok(),
        Kernel::Elf(_) => None,
    }
}

fn write(ram: &GuestRam, what: &'static str, address: u64, data: &[u8]) -> Result<(), BootError> {
    if ram.write(address, data) { Ok(()) } else { Err(BootError::OutsideRam { what, address }) }
}

/// Loads the segments at their physical addresses; returns the end of the last.
fn load_elf(ram: &GuestRam, elf: &Elf<'_>, low_end: u64) -> Result<u64, BootError> {
    let mut end = 0;
    for segment in &elf.segments {
        let segment_end = segment.address.saturating_add(segment.size);
        if segment.address < layout::HIGH_MEMORY_START {
            return Err(BootError::Damaged("a segment of the kernel lies below 1 MiB"));
        }
        if segment_end > low_end {
            return Err(BootError::KernelMemory { need: segment_end, have: low_end });
        }
        end = end.max(segment_end);
        write(ram, "the kernel", segment.address, segment.data)?;
        // The rest is zero; RAM may hold what a guest left before a reset.
        let mut at = segment.address + segment.data.len() as u64;
        while at < segment_end {
            let len = (segment_end - at).min(1 << 16) as usize;
            write(ram, "the kernel", at, &[0; 1 << 16][..len])?;
            at += len as u64;
        }
    }
    Ok(end)
}

/// Loads the 64-bit part whole; returns its entry and the end of what it needs.
fn load_bzimage(ram: &GuestRam, image: &BzImage<'_>, low_end: u64) -> Result<(u64, u64), BootError> {
    let need = image.init_size.max(image.code.len() as u64);
    let fits = |start: u64| start >= layout::HIGH_MEMORY_START && start.saturating_add(need) <= low_end;
    // A relocatable kernel may also lie lower than it prefers.
    let lowest = layout::HIGH_MEMORY_START.next_multiple_of(image.alignment.clamp(1, 1 << 30));
    let start = if fits(image.preferred_address) {
        image.preferred_address
    } else if image.relocatable && fits(lowest) {
        lowest
    } else {
        let need = image.preferred_address.max(layout::HIGH_MEMORY_START).saturating_add(need);
        return Err(BootError::KernelMemory { need, have: low_end });
    };
    write(ram, "the kernel", start, image.code)?;
    Ok((start + 0x200, start + need))
}

/// As high as possible, as boot loaders do: the kernel then has its low memory free.
fn load_initrd(
    ram: &GuestRam,
    initrd: &[u8],
    kernel_end: u64,
    low_end: u64,
    initrd_max: u64,
) -> Result<(u64, u64), BootError> {
    let size = initrd.len() as u64;
    let end = low_end.min(initrd_max.saturating_add(1));
    let start = end.checked_sub(size).map(|start| start & !0xfff).filter(|start| *start >= kernel_end);
    let start = start.ok_or(BootError::InitrdMemory { size, have: low_end })?;
    write(ram, "the initrd", start, initrd)?;
    Ok((start, size))
}

fn load_command_line(ram: &GuestRam, line: &str, max: u64) -> Result<(), BootError> {
    let max = max.min(layout::COMMAND_LINE_MAX - 1);
    let len = line.len() as u64;
    if len > max {
        return Err(BootError::CommandLine { len, max });
    }
    if line.contains('\0') {
        return Err(BootError::CommandLineZero);
    }
    let mut bytes = line.as_bytes().to_vec();
    bytes.push(0);
    write(ram, "the command line", layout::COMMAND_LINE, &bytes)
}

/// The e820 map as `(start, length, type)`: 1 is RAM, 2 reserved.
fn memory_map(ram_size: u64) -> Vec<(u64, u64, u32)> {
    let low_end = ram_size.min(layout::PCI_HOLE_START);
    let mut map = vec![
        (0, layout::LOW_MEMORY_END, 1),
        (layout::LOW_MEMORY_END, layout::HIGH_MEMORY_START - layout::LOW_MEMORY_END, 2),
        (layout::HIGH_MEMORY_START, low_end - layout::HIGH_MEMORY_START, 1),
        (layout::ECAM_START, layout::ECAM_SIZE, 2),
    ];
    if ram_size > low_end {
        map.push((memory::layout::HIGH_RAM_START, ram_size - low_end, 1));
    }
    map
}

/// The zero page. `header` is a bzImage's setup header; without one, one is made up.
fn boot_params(ram_size: u64, header: Option<&[u8]>, initrd: Option<(u64, u64)>) -> [u8; 4096] {
    let mut params = [0; 4096];
    let mut put = |at: usize, bytes: &[u8]| {
        if let Some(target) = params.get_mut(at..at + bytes.len()) {
            target.copy_from_slice(bytes);
        }
    };
    match header {
        // The header ends before the e820 table in any protocol version.
        Some(header) => put(SETUP_HEADER, header.get(..0x2d0 - SETUP_HEADER).unwrap_or(header)),
        None => {
            put(0x1fe, &0xaa55_u16.to_le_bytes());
            put(0x202, b"HdrS");
            put(0x206, &0x020f_u16.to_le_bytes());
            put(0x211, &[1]);
            put(0x230, &0x20_0000_u32.to_le_bytes());
        }
    }
    // "Undefined" boot loader.
    put(0x210, &[0xff]);
    put(0x228, &(layout::COMMAND_LINE as u32).to_le_bytes());
    if let Some((start, size)) = initrd {
        put(0x218, &(start as u32).to_le_bytes());
        put(0x21c, &(size as u32).to_le_bytes());
    }
    put(0x70, &crate::acpi::Tables::RSDP.to_le_bytes());
    let map = memory_map(ram_size);
    put(0x1e8, &[map.len() as u8]);
    for (index, (start, len, kind)) in map.into_iter().enumerate() {
        let at = 0x2d0 + index * 20;
        put(at, &start.to_le_bytes());
        put(at + 8, &len.to_le_bytes());
        put(at + 16, &kind.to_le_bytes());
    }
    params
}

#[cfg(test)]
mod tests;
