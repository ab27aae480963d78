use super::*;
use std::io::Write;

fn bzimage(size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    bytes[0x1f1] = 3;
    bytes[0x202..0x206].copy_from_slice(b"HdrS");
    bytes[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    bytes[0x236] = 1;
    bytes[0x1f4..0x1f8].copy_from_slice(&((0x4000 - 0x800) / 16_u32).to_le_bytes());
    bytes
}

fn elf(machine: u16) -> Vec<u8> {
    let mut bytes = vec![0; 64 + 56 + 100];
    bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    bytes[16] = 2;
    bytes[18..20].copy_from_slice(&machine.to_le_bytes());
    bytes[32] = 64;
    bytes[54] = 56;
    bytes[56] = 1;
    bytes[64] = 1;
    bytes[64 + 8] = 120;
    bytes[64 + 32] = 100;
    bytes
}

fn kernel(bytes: &[u8]) -> String {
    kernel_problem(bytes.get(..0x400).unwrap_or(bytes), bytes.len() as u64).unwrap_or_default()
}

#[test]
fn kernels() {
    assert_eq!(kernel(&bzimage(0x4000)), "");
    assert!(kernel(&bzimage(0x3000)).contains("cut off"));
    let mut other = bzimage(0x4000);
    other[0x236] = 0;
    assert!(kernel(&other).contains("32-bit x86"));
    other[0x206] = 1;
    assert!(kernel(&other).contains("boot protocol"));
    assert_eq!(kernel(&elf(62)), "");
    assert!(kernel(&elf(183)).contains("64-bit ARM"));
    assert!(kernel(&elf(62)[..150]).contains("cut off"));
    assert!(kernel(&elf(62)[..30]).contains("cut off"));
    let mut huge = elf(62);
    huge[64 + 8..64 + 16].fill(0xff);
    assert!(kernel(&huge).contains("cut off"));
    huge[32..40].fill(0xff);
    assert!(kernel(&huge).contains("cut off"));
    let mut arm = vec![0; 0x400];
    arm[0x38..0x3c].copy_from_slice(b"ARMd");
    assert!(kernel(&arm).contains("ARM"));
    assert!(kernel(b"#!/bin/sh\n").contains("not a kernel"));
    assert!(kernel(&[0x1f, 0x8b, 8, 0]).contains("gzip"));
}

/// Whatever the header says, looking at it must not panic.
#[test]
fn hostile_headers() {
    let mut seed = 1_u64;
    for good in [bzimage(0x400), elf(62)] {
        for _ in 0..2000 {
            let mut bytes = good.clone();
            for _ in 0..8 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let at = (seed >> 33) as usize % bytes.len();
                bytes[at] = (seed >> 25) as u8;
            }
            bytes.truncate((seed >> 40) as usize % (bytes.len() + 1));
            let _ = kernel(&bytes);
            let _ = initrd_problem(&bytes);
        }
    }
}

fn cpio(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut out = Vec::new();
    for (name, data) in files.iter().chain(&[("TRAILER!!!", &[][..])]) {
        let fields = [0, 0o100644, 0, 0, 1, 0, data.len(), 0, 0, 0, 0, name.len() + 1, 0];
        out.extend_from_slice(b"070701");
        for field in fields {
            out.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        out.extend_from_slice(name.as_bytes());
        out.push(0);
        out.resize(out.len().next_multiple_of(4), 0);
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    out
}

fn initrd(bytes: &[u8]) -> String {
    initrd_problem(bytes).unwrap_or_default()
}

#[test]
fn initrds() {
    let plain = cpio(&[("init", b"#!/bin/sh\necho hello\n"), ("a", b"xyz")]);
    assert_eq!(initrd(&plain), "");
    assert!(initrd(&plain[..plain.len() - 40]).contains("cut off"));
    assert!(initrd(&plain[..50]).contains("cut off"));
    assert!(initrd(&[0; 64]).contains("zeros"));
    assert!(initrd(b"hello").contains("not an initramfs"));

    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&plain.repeat(50)).unwrap();
    let gzip = gzip.finish().unwrap();
    assert_eq!(initrd(&gzip), "");
    assert!(initrd(&gzip[..gzip.len() / 2]).contains("cut off"));
    // Microcode first, then the real one, as distributions do it.
    let mut both = plain.clone();
    both.resize(both.len().next_multiple_of(512), 0);
    both.extend_from_slice(&gzip);
    assert_eq!(initrd(&both), "");
    both.truncate(both.len() - 9);
    assert!(initrd(&both).contains("cut off"));

    // zstd: one raw block of 5 bytes, then the last, of 1 byte repeated.
    let mut zstd = vec![0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x58];
    zstd.extend_from_slice(&[5 << 3, 0, 0, 1, 2, 3, 4, 5]);
    zstd.extend_from_slice(&[(100 << 3) as u8 | 0b011, (100 >> 5) as u8, 0, 7]);
    assert_eq!(initrd(&zstd), "");
    assert!(initrd(&zstd[..zstd.len() - 1]).contains("cut off"));

    let lz4 = [&[0x02, 0x21, 0x4c, 0x18, 3, 0, 0, 0][..], b"abc"].concat();
    assert_eq!(initrd(&lz4), "");
    assert!(initrd(&lz4[..lz4.len() - 1]).contains("cut off"));
}

fn message<T>(result: Result<T, Error>) -> String {
    result.err().map(|error| error.to_string()).unwrap_or_default()
}

#[test]
fn disks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("d.img");
    let config = |read_only| DiskConfig { read_only, ..DiskConfig::new(&path) };
    assert!(message(open_disk(&config(false))).contains("check the path"));
    std::fs::write(&path, [0; 1024]).unwrap();
    {
        let (writer, warning) = open_disk(&config(false)).unwrap();
        assert!(!writer.read_only() && warning.is_none());
        assert!(message(open_disk(&config(false))).contains("in use"));
        assert!(message(open_disk(&config(true))).contains("in use"));
    }
    let reader = open_disk(&config(true)).unwrap();
    assert!(open_disk(&config(true)).is_ok());
    assert!(message(open_disk(&config(false))).contains("in use"));
    drop(reader);
    std::fs::write(&path, [0; 700]).unwrap();
    assert!(open_disk(&config(false)).unwrap().1.unwrap().contains("512"));
    let mut qcow = vec![0; 1024];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(&path, qcow).unwrap();
    assert!(message(open_disk(&config(true))).contains("format=qcow2"));
    std::fs::write(&path, []).unwrap();
    assert!(message(open_disk(&config(true))).contains("smaller than one sector"));
    let directory = DiskConfig::new(dir.path());
    assert!(message(open_disk(&directory)).contains("directory"));
    let device = DiskConfig::new("/dev/null");
    assert!(message(open_disk(&device)).contains("no disk"));
}
