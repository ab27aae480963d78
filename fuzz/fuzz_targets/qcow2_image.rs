//! A damaged or hostile qcow2 image, opened, checked, read and written: no panic but the ones of the qcow2 library, which are caught; bounded memory and
//! time (`-rss_limit_mb`, `-timeout`); no file but those in the image's directory.

#![no_main]

use std::cell::RefCell;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use arbitrary::Arbitrary;
use disk::file::{Access, DiskFile};
use disk::qcow2::Qcow2;
use disk::{Backend, Backing, Create, Disk, DiskConfig, Format, Slice, check, create, info};
use libfuzzer_sys::fuzz_target;

const SIZE: u64 = 4 << 20;

#[derive(Arbitrary, Debug)]
enum Place {
    /// The header and its extensions.
    Header,
    /// The tables: L1, L2, refcounts; an entry each.
    Table(u8),
    /// Anywhere.
    Anywhere(u16),
}

#[derive(Arbitrary, Debug)]
enum Value {
    Any(u64),
    /// An offset of a cluster, with flags in the highest bits.
    Cluster(u8, u8),
    Small(u16),
    /// One of these as bytes.
    Text(u8),
}

#[derive(Arbitrary, Debug)]
struct Patch {
    place: Place,
    offset: u16,
    value: Value,
    wide: bool,
}

#[derive(Arbitrary, Debug)]
enum Deed {
    Read(u16, u16),
    Write(u16, u16),
    Zero(u16, u16, bool),
    Discard(u16, u16),
    Flush,
    Resize(u16),
}

#[derive(Arbitrary, Debug)]
struct Input {
    patches: Vec<Patch>,
    backing: Option<u8>,
    cut: Option<u32>,
    write: bool,
    deeds: Vec<Deed>,
}

const NAMES: [&str; 10] = [
    "base.img",
    "../base.img",
    "/etc/passwd",
    "/proc/self/environ",
    "json:{}",
    "image.qcow2",
    "link.img",
    "./base.img",
    "nbd://x",
    "/dev/zero",
];

struct Rig {
    dir: tempfile::TempDir,
    path: PathBuf,
    image: Vec<u8>,
}

fn rig() -> Rig {
    // The library's panics are caught where it is called; all others are findings.
    std::panic::set_hook(Box::new(|info| {
        if !info.location().is_some_and(|location| location.file().contains("imago")) {
            eprintln!("{info}");
            std::process::abort();
        }
    }));
    let root = if Path::new("/dev/shm").is_dir() { "/dev/shm" } else { "/tmp" };
    let dir = tempfile::tempdir_in(root).unwrap();
    std::fs::write(dir.path().join("base.img"), vec![0xbb; 64 << 10]).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link.img")).unwrap();
    let path = dir.path().join("image.qcow2");
    create(&Create { path: path.clone(), size: Some(SIZE), format: Format::Qcow2, backing: None }).unwrap();
    let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    for at in [0, 1 << 20, SIZE - 65_536] {
        disk.write(at, &[Slice::from(vec![0xdd; 65_536].as_mut_slice())]).unwrap();
    }
    drop(disk);
    let image = std::fs::read(&path).unwrap();
    Rig { dir, path, image }
}

fn patch(image: &mut [u8], patch: &Patch) {
    let clusters = (image.len() / 65_536).max(1);
    let at = match patch.place {
        Place::Header => usize::from(patch.offset) % 512,
        Place::Table(cluster) => usize::from(cluster) % clusters * 65_536 + usize::from(patch.offset) % 96 * 8,
        Place::Anywhere(high) => (usize::from(high) << 16 | usize::from(patch.offset)) % image.len(),
    };
    let number = match patch.value {
        Value::Any(value) => value,
        Value::Cluster(number, flags) => u64::from(number) << 16 | u64::from(flags) << 56,
        Value::Small(value) => value.into(),
        Value::Text(which) => u64::from(which),
    };
    let bytes = if patch.wide { number.to_be_bytes().to_vec() } else { (number as u32).to_be_bytes().to_vec() };
    for (to, from) in image.iter_mut().skip(at).zip(bytes) {
        *to = from;
    }
}

thread_local! {
    static RIG: RefCell<Option<Rig>> = const { RefCell::new(None) };
}

fuzz_target!(|input: Input| {
    RIG.with_borrow_mut(|place| {
        let rig = place.get_or_insert_with(rig);
        let mut image = rig.image.clone();
        if let Some(which) = input.backing {
            let name = NAMES[usize::from(which) % NAMES.len()];
            image[8..16].copy_from_slice(&4096_u64.to_be_bytes());
            image[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            image[4096..4096 + name.len()].copy_from_slice(name.as_bytes());
        }
        input.patches.iter().take(16).for_each(|one| patch(&mut image, one));
        if let Some(cut) = input.cut {
            image.truncate(cut as usize % (image.len() + 1));
        }
        std::fs::write(&rig.path, &image).unwrap();
        let config = DiskConfig { format: Some(Format::Qcow2), ..DiskConfig::new(&rig.path) };
        let _ = info(&config);
        let _ = check(&config);
        let access = if input.write { Access::Write } else { Access::Read };
        let file = DiskFile::open(&rig.path, access).unwrap();
        let Ok(disk) = Qcow2::open(file, &Backing::Beside, input.write) else { return };
        for (path, _) in disk.backing() {
            assert!(path.starts_with(rig.dir.path()) && !path.ends_with("link.img"), "{}", path.display());
        }
        let mut data = vec![0x77; 65_536 * 3];
        for deed in input.deeds.iter().take(12) {
            let size = disk.size();
            let range = |at: u16, len: u16| {
                let at = (u64::from(at) * 512) % size.max(1);
                (at, (u64::from(len) % 384 * 512).min(size.saturating_sub(at)))
            };
            let _ = match *deed {
                Deed::Read(at, len) => {
                    let (at, len) = range(at, len);
                    disk.read(at, &[Slice::from(&mut data[..len as usize])]).1
                }
                Deed::Write(at, len) => {
                    let (at, len) = range(at, len);
                    disk.write(at, &[Slice::from(&mut data[..len as usize])])
                }
                Deed::Zero(at, len, unmap) => {
                    let (at, len) = range(at, len);
                    disk.write_zeroes(at, len, unmap)
                }
                Deed::Discard(at, len) => {
                    let (at, len) = range(at, len);
                    disk.discard(at, len)
                }
                Deed::Flush => disk.flush(),
                Deed::Resize(size) => disk.resize(u64::from(size) * 65_536),
            };
        }
        drop(disk);
        // Nothing was written but the image.
        let base = std::fs::File::open(rig.dir.path().join("base.img")).unwrap();
        let mut first = [0; 64];
        base.read_exact_at(&mut first, 0).unwrap();
        assert_eq!(first, [0xbb; 64]);
    });
});
