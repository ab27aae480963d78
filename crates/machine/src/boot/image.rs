//! Kernel files: bzImage and ELF vmlinux. Parsers of hostile input: all arithmetic is checked.

use super::BootError;

/// Offset of the setup header in a bzImage, and in `boot_params`.
pub const SETUP_HEADER: usize = 0x1f1;
/// Protocol 2.12 brought the 64-bit entry point.
const MIN_PROTOCOL: u16 = 0x020c;

/// A kernel file.
#[derive(Clone, Debug)]
pub enum Kernel<'a> {
    /// A compressed kernel with its own decompressor.
    BzImage(BzImage<'a>),
    /// An uncompressed kernel.
    Elf(Elf<'a>),
}

/// The parts of a bzImage.
#[derive(Clone, Debug)]
pub struct BzImage<'a> {
    /// The setup header, to be copied to `boot_params` at [`SETUP_HEADER`].
    pub header: &'a [u8],
    /// The 64-bit part: decompressor and payload. Entry at byte 0x200.
    pub code: &'a [u8],
    /// The compressed kernel within `code`; empty if the header names none.
    pub payload: &'a [u8],
    /// Where the kernel wants to be.
    pub preferred_address: u64,
    /// Alignment it needs when it is elsewhere, a power of two.
    pub alignment: u64,
    /// Can it be elsewhere?
    pub relocatable: bool,
    /// Bytes it needs from its load address until it has a memory map.
    pub init_size: u64,
    /// Highest address an initrd may reach.
    pub initrd_max: u64,
    /// Longest command line, without the final zero.
    pub command_line_max: u64,
}

/// One loadable piece of an ELF file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment<'a> {
    /// Physical address.
    pub address: u64,
    /// Bytes from the file.
    pub data: &'a [u8],
    /// Bytes in memory; those after `data` are zero.
    pub size: u64,
}

/// An ELF kernel.
#[derive(Clone, Debug)]
pub struct Elf<'a> {
    /// Physical address of the 64-bit entry point, `startup_64`.
    pub entry: u64,
    /// What to load.
    pub segments: Vec<Segment<'a>>,
}

fn bytes<const N: usize>(data: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    data.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn u16_at(data: &[u8], at: u64) -> Option<u16> {
    bytes(data, at).map(u16::from_le_bytes)
}

fn u32_at(data: &[u8], at: u64) -> Option<u32> {
    bytes(data, at).map(u32::from_le_bytes)
}

fn u64_at(data: &[u8], at: u64) -> Option<u64> {
    bytes(data, at).map(u64::from_le_bytes)
}

fn slice(data: &[u8], start: u64, len: u64) -> Option<&[u8]> {
    let (start, len) = (usize::try_from(start).ok()?, usize::try_from(len).ok()?);
    data.get(start..start.checked_add(len)?)
}

/// Finds out what kind of kernel this is and takes it apart.
///
/// # Errors
/// It is not a kernel, not for this CPU, or incomplete.
pub fn parse(file: &[u8]) -> Result<Kernel<'_>, BootError> {
    if file.is_empty() {
        return Err(BootError::Truncated("the file is empty"));
    }
    if file.starts_with(b"\x7fELF") {
        return parse_elf(file).map(Kernel::Elf);
    }
    if bytes(file, 0x202) == Some(*b"HdrS") {
        return parse_bzimage(file).map(Kernel::BzImage);
    }
    if bytes(file, 0x38) == Some(*b"ARM\x64") {
        return Err(BootError::Architecture("64-bit ARM"));
    }
    if bytes(file, 0x38) == Some(*b"RSC\x05") {
        return Err(BootError::Architecture("RISC-V"));
    }
    if u32_at(file, 0x24) == Some(0x016f_2818) {
        return Err(BootError::Architecture("32-bit ARM"));
    }
    Err(BootError::NotAKernel)
}

fn parse_bzimage(file: &[u8]) -> Result<BzImage<'_>, BootError> {
    let cut = || BootError::Truncated("its setup header is cut off");
    let protocol = u16_at(file, 0x206).ok_or_else(cut)?;
    if u16_at(file, 0x1fe) != Some(0xaa55) {
        return Err(BootError::Damaged("the boot sector has no signature"));
    }
    if protocol < MIN_PROTOCOL {
        return Err(BootError::Protocol(protocol));
    }
    if u16_at(file, 0x236).ok_or_else(cut)? & 1 == 0 {
        return Err(BootError::Architecture("32-bit x86"));
    }
    // The header ends where the jump instruction at 0x200 goes.
    let header_end = 0x202 + u64::from(bytes::<1>(file, 0x201).ok_or_else(cut)?[0]);
    let header = slice(file, SETUP_HEADER as u64, header_end - SETUP_HEADER as u64).ok_or_else(cut)?;
    if header_end < 0x264 {
        return Err(BootError::Damaged("its setup header is too short"));
    }
    let sectors = match bytes::<1>(file, SETUP_HEADER as u64).ok_or_else(cut)?[0] {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let setup = (sectors + 1) * 512;
    let code = usize::try_from(setup).ok().and_then(|setup| file.get(setup..)).unwrap_or_default();
    // The header counts the code in 16-byte units, of which the last need not be whole; files may have more (signatures), not less.
    let code_len = u64::from(u32_at(file, 0x1f4).ok_or_else(cut)?) * 16;
    if code.len() < 0x400 || (code.len() as u64).next_multiple_of(16) < code_len {
        return Err(BootError::Truncated("the file is shorter than its header says"));
    }
    let (offset, len) = (u32_at(file, 0x248).ok_or_else(cut)?, u32_at(file, 0x24c).ok_or_else(cut)?);
    let payload = slice(code, offset.into(), len.into()).unwrap_or_default();
    let alignment = u64::from(u32_at(file, 0x230).ok_or_else(cut)?);
    Ok(BzImage {
        header,
        code,
        payload,
        preferred_address: u64_at(file, 0x258).ok_or_else(cut)?,
        alignment: if alignment.is_power_of_two() { alignment } else { 1 << 21 },
        relocatable: bytes::<1>(file, 0x234).ok_or_else(cut)?[0] != 0,
        init_size: u32_at(file, 0x260).ok_or_else(cut)?.into(),
        initrd_max: u32_at(file, 0x22c).ok_or_else(cut)?.into(),
        command_line_max: u32_at(file, 0x238).ok_or_else(cut)?.into(),
    })
}

/// An x86-64 ELF kernel's loadable segments and entry.
///
/// # Errors
/// Not x86-64, no executable, or incomplete.
pub fn parse_elf(file: &[u8]) -> Result<Elf<'_>, BootError> {
    let cut = || BootError::Truncated("its ELF header is cut off");
    let [class, order] = bytes::<2>(file, 4).ok_or_else(cut)?;
    let machine = u16_at(file, 18).ok_or_else(cut)?;
    match (class, order, machine) {
        (2, 1, 62) => {}
        (1, 1, 3) => return Err(BootError::Architecture("32-bit x86")),
        (_, _, 40) => return Err(BootError::Architecture("32-bit ARM")),
        (_, _, 183) => return Err(BootError::Architecture("64-bit ARM")),
        (_, _, 243) => return Err(BootError::Architecture("RISC-V")),
        _ => return Err(BootError::Architecture("another CPU")),
    }
    if u16_at(file, 16) != Some(2) {
        return Err(BootError::Damaged("the ELF file is not an executable"));
    }
    let entry = u64_at(file, 24).ok_or_else(cut)?;
    let table = u64_at(file, 32).ok_or_else(cut)?;
    let (entry_size, count) = (u16_at(file, 54).ok_or_else(cut)?, u16_at(file, 56).ok_or_else(cut)?);
    if entry_size < 56 {
        return Err(BootError::Damaged("its ELF program headers are too short"));
    }
    let mut segments = Vec::new();
    for index in 0..u64::from(count) {
        let cut = || BootError::Truncated("its ELF program headers are cut off");
        let at = table.checked_add(index * u64::from(entry_size)).ok_or_else(cut)?;
        let header = slice(file, at, 56).ok_or_else(cut)?;
        if u32_at(header, 0) != Some(1) {
            continue;
        }
        let field = |offset| u64_at(header, offset).unwrap_or(0);
        let (offset, address, file_size, size) = (field(8), field(24), field(32), field(40));
        let data = slice(file, offset, file_size).ok_or(BootError::Truncated("an ELF segment is cut off"))?;
        if size < file_size || address.checked_add(size).is_none() {
            return Err(BootError::Damaged("an ELF segment has an impossible size"));
        }
        if size > 0 {
            segments.push(Segment { address, data, size });
        }
    }
    let inside = |segment: &Segment<'_>| entry >= segment.address && entry - segment.address < segment.size;
    if !segments.iter().any(inside) {
        return Err(BootError::Damaged("the entry point of the ELF file is in no segment"));
    }
    Ok(Elf { entry, segments })
}
