use proptest::prelude::*;

use super::*;

fn ram(mib: u64) -> GuestRam {
    GuestRam::new(mib << 20).unwrap()
}

/// A kernel of one segment at 16 MiB: `hlt`.
fn elf() -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    file[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0");
    file[24..32].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    file[32..40].copy_from_slice(&64_u64.to_le_bytes());
    file[54..58].copy_from_slice(&[56, 0, 1, 0]);
    let header = [1, 0x78, 0xffff_ffff_8100_0000, 0x100_0000, 16, 0x3000, 0x20_0000];
    let mut at = 64;
    file[at..at + 4].copy_from_slice(&1_u32.to_le_bytes());
    at += 8;
    for value in &header[1..] {
        file[at..at + 8].copy_from_slice(&u64::to_le_bytes(*value));
        at += 8;
    }
    file[0x78] = 0xf4;
    file
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x400];
    file[0x1f1] = 1;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x201] = 0x6a;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    file[0x230..0x235].copy_from_slice(&[0, 0, 0x20, 0, 1]);
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&2047_u32.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&0x400_u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x100_0000_u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x40_0000_u32.to_le_bytes());
    file.resize(0x800, 0x90);
    file.extend(payload);
    file.resize(file.len().next_multiple_of(16), 0);
    let len = (file.len() as u32 - 0x400) / 16;
    file[0x1f4..0x1f8].copy_from_slice(&len.to_le_bytes());
    file
}

fn packed_elf() -> Vec<u8> {
    use std::io::Write;
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&elf()).unwrap();
    gzip.finish().unwrap()
}

fn read(ram: &GuestRam, at: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    assert!(ram.read(at, &mut data));
    data
}

fn read32(ram: &GuestRam, at: u64) -> u64 {
    u32::from_le_bytes(read(ram, at, 4).try_into().unwrap()).into()
}

#[test]
fn elf_is_loaded_and_its_bss_cleared() {
    let ram = ram(64);
    assert!(ram.write(0x100_0010, &[7]));
    let kernel = elf();
    let source =
        BootSource { kernel: &kernel, initrd: Some(b"cpio"), command_line: "console=ttyS0", ..Default::default() };
    assert_eq!(load(&ram, &source).unwrap(), Loaded { entry: 0x100_0000, not_unpacked: None });
    assert_eq!(read(&ram, 0x100_0000, 17), [&[0xf4][..], &[0; 16]].concat());
    assert_eq!(read(&ram, layout::COMMAND_LINE, 14), b"console=ttyS0\0");
    let initrd = read32(&ram, layout::BOOT_PARAMS + 0x218);
    assert_eq!(initrd, (64 << 20) - 0x1000);
    assert_eq!(read(&ram, initrd, 4), b"cpio");
    assert_eq!(read32(&ram, layout::BOOT_PARAMS + 0x21c), 4);
    assert_eq!(read32(&ram, layout::BOOT_PARAMS + 0x70), layout::ACPI_TABLES);
}

#[test]
fn bzimage_is_unpacked_or_run() {
    let ram = ram(64);
    let kernel = bzimage(&packed_elf());
    let mut source = BootSource { kernel: &kernel, ..Default::default() };
    assert_eq!(load(&ram, &source).unwrap(), Loaded { entry: 0x100_0000, not_unpacked: None });
    assert_eq!(read(&ram, 0x100_0000, 1), [0xf4]);
    assert_eq!(read(&ram, layout::BOOT_PARAMS + 0x202, 4), b"HdrS");
    let unpacked = unpack_kernel(&kernel).unwrap();
    assert_eq!(unpacked, elf());
    for unpacked in [&unpacked[..], &unpacked[..100], b""] {
        assert!(ram.write(0x100_0000, &[0]));
        source.unpacked = Some(unpacked);
        assert_eq!(load(&ram, &source).unwrap(), Loaded { entry: 0x100_0000, not_unpacked: None });
        assert_eq!(read(&ram, 0x100_0000, 1), [0xf4]);
    }
    source.own_decompressor = true;
    assert_eq!(load(&ram, &source).unwrap(), Loaded { entry: 0x100_0200, not_unpacked: None });
    assert_eq!(read(&ram, 0x100_0200, 1), [0x90]);
    let strange = bzimage(b"BZh9 something");
    source = BootSource { kernel: &strange, ..Default::default() };
    assert_eq!(load(&ram, &source).unwrap(), Loaded { entry: 0x100_0200, not_unpacked: Some(UnpackError::Format) });
}

#[test]
fn memory_maps() {
    assert_eq!(memory_map(64 << 20)[2], (1 << 20, 63 << 20, 1));
    let map = memory_map(5 << 30);
    assert_eq!(map[2], (1 << 20, (3 << 30) - (1 << 20), 1));
    assert_eq!(map[4], (4 << 30, 2 << 30, 1));
}

fn message(mib: u64, source: BootSource<'_>) -> String {
    load(&ram(mib), &source).unwrap_err().to_string()
}

#[test]
fn the_last_unit_of_code_may_be_cut_short() {
    let good = bzimage(&[1; 100]);
    let source = BootSource { kernel: &good[..good.len() - 12], ..Default::default() };
    load(&ram(64), &source).unwrap();
}

#[test]
fn mistakes_get_a_line_with_a_remedy() {
    fn kernel(kernel: &[u8]) -> BootSource<'_> {
        BootSource { kernel, ..Default::default() }
    }
    assert!(message(64, kernel(b"")).contains("truncated (the file is empty)"));
    assert!(message(64, kernel(&[0; 5000])).contains("neither a bzImage nor an ELF"));
    let good = bzimage(&packed_elf());
    assert!(message(64, kernel(&good[..0x810])).contains("truncated"));
    assert!(message(64, kernel(&good[..0x210])).contains("truncated"));
    let end = good.len() & !15;
    assert!(message(64, kernel(&good[..end - 16])).contains("truncated"));
    let mut bad = good.clone();
    bad[0x236] = 0;
    assert!(message(64, kernel(&bad)).contains("for 32-bit x86"));
    bad[0x206] = 9;
    assert!(message(64, kernel(&bad)).contains("boot protocol 2.9"));
    let mut arm = vec![0; 0x300];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    assert!(message(64, kernel(&arm)).contains("64-bit ARM"));
    let mut arm = elf();
    arm[18] = 183;
    assert!(message(64, kernel(&arm)).contains("64-bit ARM"));
    let mut big = elf();
    big[64 + 40..64 + 48].copy_from_slice(&(100_u64 << 20).to_le_bytes());
    let text = message(64, kernel(&big));
    assert!(text.contains("116 MiB") && text.contains("64 MiB") && text.contains("--memory"), "{text}");
    let initrd = vec![1; 48 << 20];
    let text = message(64, BootSource { initrd: Some(&initrd), ..kernel(&good) });
    assert!(text.contains("initrd of 48 MiB") && text.contains("--memory"), "{text}");
    let line = "x".repeat(3000);
    assert!(message(64, BootSource { command_line: &line, ..kernel(&good) }).contains("takes 2047"));
    assert!(message(64, BootSource { command_line: "a\0b", ..kernel(&good) }).contains("zero byte"));
    let missing = read_file("kernel", Path::new("/nonexistent/vmlinuz")).unwrap_err().to_string();
    assert!(missing.contains("cannot read the kernel /nonexistent/vmlinuz"), "{missing}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn parsers_never_panic(data in proptest::collection::vec(any::<u8>(), 0..2000), kind in 0..3) {
        let mut data = data;
        let start: &[u8] = match kind { 0 => b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0", 1 => b"", _ => &[0x1f, 0x8b] };
        let len = start.len().min(data.len());
        data[..len].copy_from_slice(&start[..len]);
        let _ = parse(&data);
        let _ = parse_elf(&data);
        let _ = unpack(&data, 1 << 20);
    }

    #[test]
    fn damaged_kernels_load_or_are_refused(changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), is_elf: bool, cut: prop::sample::Index) {
        let mut kernel = if is_elf { elf() } else { bzimage(&packed_elf()) };
        for (index, value) in changes {
            // The headers are where it hurts.
            let at = if is_elf { index.index(120) } else { 0x1f1 + index.index(0x80) };
            kernel[at] = value;
        }
        let len = kernel.len() - cut.index(64);
        let ram = ram(32);
        let _ = load(&ram, &BootSource { kernel: &kernel[..len], initrd: Some(&[1; 5000]), command_line: "quiet", ..Default::default() });
    }
}

/// With a real kernel of the host, where there is one.
#[test]
fn real_kernels() {
    let mut found: Vec<PathBuf> = Vec::new();
    for dir in ["/boot".to_owned(), std::env::var("TIGHTROPE_TEST_KERNELS").unwrap_or_default()] {
        let entries = std::fs::read_dir(&dir).into_iter().flatten().flatten();
        found.extend(entries.map(|e| e.path()).filter(|p| p.to_string_lossy().contains("vmlinuz")));
    }
    for path in found {
        let Ok(kernel) = read_file("kernel", &path) else { continue };
        let ram = ram(512);
        let started = std::time::Instant::now();
        let loaded = load(&ram, &BootSource { kernel: &kernel, command_line: "quiet", ..Default::default() });
        eprintln!("{}: {loaded:?} in {:?}", path.display(), started.elapsed());
        let loaded = loaded.unwrap();
        assert_eq!(loaded.not_unpacked, None, "{}", path.display());
        assert_ne!(read(&ram, loaded.entry, 16), [0; 16]);
    }
}
