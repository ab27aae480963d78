use std::os::unix::fs::{FileExt, symlink};

use super::header::Header;
use super::*;
use crate::check;
use crate::disk::Disk;
use crate::options::DiskConfig;
use crate::tools::{Create, create};

fn image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    create(&Create { path: path.clone(), size: Some(size), format: Format::Qcow2, backing: None }).unwrap();
    path
}

fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    std::fs::OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

fn refusal(path: &Path) -> String {
    match Disk::open(&DiskConfig::new(path)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was opened", path.display()),
    }
}

/// Makes the image name `name` as its backing file, of `format`.
fn set_backing(path: &Path, name: &str, format: Option<&str>) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    // Behind the header of 104 bytes: one extension at most, the end, the name.
    file.write_all_at(&[0; 8192], 104).unwrap();
    file.write_all_at(&104_u32.to_be_bytes(), 100).unwrap();
    if let Some(format) = format {
        file.write_all_at(&0xe279_2aca_u32.to_be_bytes(), 104).unwrap();
        file.write_all_at(&(format.len() as u32).to_be_bytes(), 108).unwrap();
        file.write_all_at(format.as_bytes(), 112).unwrap();
    }
    file.write_all_at(name.as_bytes(), 4096).unwrap();
    file.write_all_at(&4096_u64.to_be_bytes(), 8).unwrap();
    file.write_all_at(&(name.len() as u32).to_be_bytes(), 16).unwrap();
}

#[test]
fn headers_that_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let good = std::fs::read(image(dir.path(), "good.qcow2", 1 << 30)).unwrap();
    let len = good.len() as u64;
    let header = Header::parse(&good, len).unwrap();
    assert_eq!((header.size, header.cluster_bits, header.version, header.refcount_order), (1 << 30, 16, 3, 4));
    let cases: &[(usize, &[u8], &str)] = &[
        (0, b"XFI\xfb", "not a qcow2"),
        (4, &[0, 0, 0, 1], "version 1"),
        (4, &[0, 0, 0, 4], "version 4"),
        (20, &[0, 0, 0, 8], "2^8"),
        (20, &[0, 0, 0, 22], "2^22"),
        (20, &[0xff; 4], "2^4294967295"),
        (24, &[0xff; 8], "its size"),
        (24, &[0, 0, 0x10, 0, 0, 0, 0, 0], "size of its L1"),
        (32, &[0, 0, 0, 1], "encrypted"),
        (36, &[0xff; 4], "size of its L1"),
        (36, &[0; 4], "size of its L1"),
        (40, &[0xff; 8], "place of its L1"),
        (40, &[0; 8], "place of its L1"),
        (40, &[0, 0, 0x10, 0, 0, 0, 0, 0], "cut off"),
        (48, &[0, 0, 0, 0, 0, 0, 0, 1], "place of its refcount"),
        (48, &[0, 0, 0, 0, 0x7f, 0, 0, 0], "cut off"),
        (56, &[0; 4], "size of its refcount"),
        (56, &[0xff; 4], "size of its refcount"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 1], "not closed properly"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 2], "marked as damaged"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 4], "in another file"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 8], "zstd"),
        (72, &[0, 0, 0, 0, 0, 0, 0, 16], "extended L2"),
        (72, &[0x80, 0, 0, 0, 0, 0, 0, 0], "not known"),
        (96, &[0, 0, 0, 7], "2^7"),
        (100, &[0, 0, 0, 0], "length of its header"),
        (100, &[0, 0, 0, 105], "length of its header"),
        (100, &[0xff, 0xff, 0xff, 0xf8], "length of its header"),
        (8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 100], "name of its backing"),
        (8, &[0xff; 12], "name of its backing"),
        (8, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 4, 0], "name of its backing"),
    ];
    for (offset, bytes, part) in cases {
        let mut bad = good.clone();
        bad[*offset..offset + bytes.len()].copy_from_slice(bytes);
        let error = Header::parse(&bad, len).unwrap_err();
        assert!(error.contains(part) && !error.contains('\n'), "{offset}: {error}");
        let path = dir.path().join("bad.qcow2");
        std::fs::write(&path, &bad).unwrap();
        assert!(refusal(&path).starts_with("disk "), "{offset}");
    }
    for end in [4, 8, 23, 71, 103, 111] {
        assert!(Header::parse(&good[..end], end as u64).is_err(), "{end}");
    }
    // One byte less than the tables need.
    let path = dir.path().join("short.qcow2");
    for end in [512_u64, 65_536, 65_536 * 3] {
        std::fs::write(&path, &good[..end as usize]).unwrap();
        assert!(refusal(&path).contains("cut off"), "{end}");
    }
}

#[test]
fn data_behind_the_end_is_not_read_as_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a.qcow2", 1 << 30);
    let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
    let mut data = vec![5; 1 << 20];
    disk.write(0, &[Slice::from(data.as_mut_slice())]).unwrap();
    drop(disk);
    let len = std::fs::metadata(&path).unwrap().len();
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(len - 70_000).unwrap();
    assert!(refusal(&path).contains("cut off"));
}

#[test]
fn backing_files_only_where_granted() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret.img");
    std::fs::write(&secret, vec![b's'; 4096]).unwrap();
    let inside = dir.path().join("in");
    std::fs::create_dir(&inside).unwrap();
    std::fs::write(inside.join("base.img"), vec![b'b'; 4096]).unwrap();
    std::fs::write(inside.join("key"), vec![b'k'; 4096]).unwrap();
    std::fs::write(inside.join(".hidden.img"), vec![b'h'; 4096]).unwrap();
    symlink(&secret, inside.join("link.img")).unwrap();
    symlink(outside.path(), inside.join("dir")).unwrap();
    std::fs::write(dir.path().join("up.img"), vec![b'u'; 4096]).unwrap();
    rustix::fs::mkfifoat(rustix::fs::CWD, inside.join("pipe.img"), rustix::fs::Mode::RUSR).unwrap();
    let path = image(&inside, "a.qcow2", 1 << 20);
    let secret_name = secret.to_str().unwrap();
    let fine_absolute = inside.canonicalize().unwrap().join("base.img");
    for name in ["base.img", "./base.img", "../in/base.img", fine_absolute.to_str().unwrap()] {
        set_backing(&path, name, Some("raw"));
        let disk = Disk::open(&DiskConfig::new(&path)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut data = [0; 512];
        disk.read(0, &[Slice::from(data.as_mut_slice())]).1.unwrap();
        assert_eq!(data, [b'b'; 512]);
    }
    let cases = [
        (secret_name, Some("raw"), "no leave"),
        ("/etc/shadow", Some("raw"), "no leave"),
        ("/etc/passwd", None, "no leave"),
        ("../up.img", Some("raw"), "no leave"),
        ("link.img", Some("raw"), "no leave"),
        ("dir/secret.img", Some("raw"), "no leave"),
        ("/dev/zero", Some("raw"), "no leave"),
        ("/proc/self/environ", Some("raw"), "no leave"),
        (".hidden.img", Some("raw"), "no leave"),
        ("key", Some("raw"), "not named"),
        ("key", None, "not named"),
        ("pipe.img", Some("raw"), "not a file"),
        ("none.img", Some("raw"), "does not exist"),
        ("json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}", Some("raw"), "no file's name"),
        ("nbd://host/export", Some("raw"), "no file's name"),
        ("a.qcow2", Some("qcow2"), "leads back to itself"),
        ("base.img", Some("qcow2"), "not a qcow2"),
        ("base.img", Some("vmdk"), "not known"),
        ("base.img", Some("\x1b[31m"), "\\u{1b}"),
        ("\x1b]0;x\x07", Some("raw"), "\\u{1b}"),
    ];
    for (name, format, part) in cases {
        set_backing(&path, name, format);
        let error = refusal(&path);
        assert!(error.contains(part) && !error.contains('\x1b'), "{name}: {error}");
    }
    // With leave they are used, but nothing that is no file.
    for grant in [Backing::Anywhere, Backing::Under(outside.path().into())] {
        let config = DiskConfig { backing: grant, ..DiskConfig::new(&path) };
        set_backing(&path, secret_name, Some("raw"));
        Disk::open(&config).unwrap();
        set_backing(&path, "/dev/zero", Some("raw"));
        Disk::open(&config).unwrap_err();
    }
    // A guest that writes a qcow2 header into its raw disk does not get it read as one, as a backing file either.
    let raw = inside.join("raw.img");
    std::fs::copy(&path, &raw).unwrap();
    set_backing(&path, "raw.img", None);
    assert!(refusal(&path).contains("starts like a qcow2"));
    set_backing(&path, "raw.img", Some("raw"));
    Disk::open(&DiskConfig::new(&path)).unwrap();
}

#[test]
fn chains_are_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let mut last = image(dir.path(), "0.qcow2", 1 << 20);
    for number in 1..=chain::MAX_LAYERS {
        let next = image(dir.path(), &format!("{number}.qcow2"), 1 << 20);
        set_backing(&next, last.file_name().unwrap().to_str().unwrap(), Some("qcow2"));
        last = next;
    }
    assert!(refusal(&last).contains("stands under 16 others"));
    Disk::open(&DiskConfig::new(dir.path().join("15.qcow2"))).unwrap();
    // A loop of two.
    set_backing(&dir.path().join("0.qcow2"), "1.qcow2", Some("qcow2"));
    assert!(refusal(&dir.path().join("1.qcow2")).contains("leads back to itself"));
}

#[test]
fn a_check_sees_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a.qcow2", 1 << 20);
    let mut data = vec![3; 128 << 10];
    Disk::open(&DiskConfig::new(&path)).unwrap().write(0, &[Slice::from(data.as_mut_slice())]).unwrap();
    let header = Header::parse(&std::fs::read(&path).unwrap(), 1 << 20).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let l2 = tables::read(&file, header.l1_offset, 1).unwrap()[0] & tables::OFFSET;
    let first = tables::read(&file, l2, 2).unwrap();
    let block = tables::read(&file, header.refcount_offset, 1).unwrap()[0];
    let whole = std::fs::read(&path).unwrap();
    // Both clusters of the disk in one of the file.
    patch(&path, l2 + 8, &first[0].to_be_bytes());
    let report = check(&DiskConfig::new(&path)).unwrap();
    assert_eq!((report.errors, report.leaks), (1, 1), "{:?}", report.texts);
    // Data counted as free.
    std::fs::write(&path, &whole).unwrap();
    patch(&path, block + (first[1] & tables::OFFSET) / 65_536 * 2, &[0, 0]);
    assert_eq!(check(&DiskConfig::new(&path)).unwrap().errors, 1);
    // Counted twice: lost space, and the claim to be alone is wrong.
    patch(&path, block + (first[1] & tables::OFFSET) / 65_536 * 2, &[0, 2]);
    let report = check(&DiskConfig::new(&path)).unwrap();
    assert_eq!((report.errors, report.leaks), (1, 1), "{:?}", report.texts);
}

#[test]
fn a_full_host_is_an_error_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a.qcow2", 64 << 20);
    let file = DiskFile::open(&path, crate::file::Access::Write).unwrap();
    let storage = ImageFile::new(file);
    let full = storage.fail_writes.clone();
    let mut image = imago::qcow2::Qcow2::<ImageFile>::open_image(storage, true).unwrap();
    image.set_data_file(None);
    image.set_backing(None);
    let access = Access::new(image);
    access.write(&vec![1; 65_536], 0).unwrap();
    access.flush().unwrap();
    full.store(libc::ENOSPC, Ordering::SeqCst);
    for at in 1..20 {
        let error = access.write(&vec![2; 65_536], at * 65_536).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
    let _ = access.flush();
    full.store(0, Ordering::SeqCst);
    access.write(&vec![3; 65_536], 65_536).unwrap();
    access.flush().unwrap();
    let mut data = vec![0; 196_608];
    access.read(&mut data, 0).unwrap();
    assert!(data[..65_536].iter().all(|b| *b == 1) && data[65_536..131_072].iter().all(|b| *b == 3));
    assert!(data[131_072..].iter().all(|b| *b == 0));
    drop(access);
    let report = check(&DiskConfig::new(&path)).unwrap();
    assert_eq!(report.errors, 0, "{:?}", report.texts);
}

#[test]
fn a_panic_in_the_library_stops_the_disk() {
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), "a.qcow2", 1 << 20);
    let file = DiskFile::open(&path, crate::file::Access::Write).unwrap();
    let disk = Qcow2::open(file, &Backing::Beside, true).unwrap();
    let mut data = [1; 512];
    disk.write(0, &[Slice::from(data.as_mut_slice())]).unwrap();
    disk.flush().unwrap();
    let error = disk.with(|_| -> io::Result<()> { panic!("on purpose") }).unwrap_err();
    assert!(error.to_string().contains("does not bear"), "{error}");
    assert!(disk.flush().unwrap_err().to_string().contains("in doubt"));
    assert!(disk.read(0, &[Slice::from(data.as_mut_slice())]).1.is_err());
    drop(disk);
    assert_eq!(check(&DiskConfig::new(&path)).unwrap().errors, 0);
}

/// Found by fuzzing: the library panics on an empty buffer.
#[test]
fn empty_requests_and_buffers() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Disk::open(&DiskConfig::new(image(dir.path(), "a.qcow2", 1 << 20))).unwrap();
    let (mut none, mut data) = ([], [9; 512]);
    for buffers in [&[][..], &[Slice::from(&mut none[..])]] {
        disk.write(512, buffers).unwrap();
        disk.read(512, buffers).1.unwrap();
    }
    disk.write(0, &[Slice::from(&mut none[..]), Slice::from(&mut data[..])]).unwrap();
    let mut back = [0; 512];
    disk.read(0, &[Slice::from(&mut none[..]), Slice::from(&mut back[..])]).1.unwrap();
    assert_eq!(back, data);
    disk.discard(0, 0).unwrap();
    disk.write_zeroes(0, 0, true).unwrap();
    disk.write_zeroes(0, 0, false).unwrap();
    disk.flush().unwrap();
}
