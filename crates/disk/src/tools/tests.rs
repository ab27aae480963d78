use super::*;
use crate::qcow2::check::check;

fn new(path: &Path, size: u64, format: Format) -> Create {
    Create { path: path.to_path_buf(), size: Some(size), format, backing: None }
}

fn read(disk: &Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut data = vec![0xee; len];
    disk.read(offset, &[Slice::from(data.as_mut_slice())]).1.unwrap();
    data
}

fn write(disk: &Disk, offset: u64, data: &[u8]) {
    let mut data = data.to_vec();
    disk.write(offset, &[Slice::from(data.as_mut_slice())]).unwrap();
}

#[test]
fn layers_keep_their_base_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![0x11; 1 << 20]).unwrap();
    let layer = dir.path().join("layer.qcow2");
    let backing = Some(DiskConfig::new(&base));
    create(&Create { path: layer.clone(), size: None, format: Format::Qcow2, backing }).unwrap();
    let top = dir.path().join("top.qcow2");
    let backing = Some(DiskConfig::new(&layer));
    create(&Create { path: top.clone(), size: Some(4 << 20), format: Format::Qcow2, backing }).unwrap();
    {
        let disk = Disk::open(&DiskConfig::new(&top)).unwrap();
        assert_eq!(disk.sectors(), 8192);
        write(&disk, 4096, &[0x22; 512]);
        let data = read(&disk, 0, 8192);
        assert!(data[..4096].iter().all(|b| *b == 0x11) && data[4096..4608].iter().all(|b| *b == 0x22));
        assert!(data[4608..].iter().all(|b| *b == 0x11));
        assert!(read(&disk, (1 << 20) - 512, 1024)[512..].iter().all(|b| *b == 0), "beyond the base");
        // Base and layer are held for reading as long as this lives.
        let error = Disk::open(&DiskConfig::new(&base)).unwrap_err();
        assert!(matches!(error, DiskError::InUse { .. }), "{error}");
        assert!(Disk::open(&DiskConfig { read_only: true, ..DiskConfig::new(&base) }).is_ok());
    }
    assert!(std::fs::read(&base).unwrap().iter().all(|b| *b == 0x11));
    let disk = Disk::open(&DiskConfig::new(&top)).unwrap();
    assert_eq!(read(&disk, 4096, 512), [0x22; 512], "what is dropped is written");
    drop(disk);
    let report = check(&DiskConfig::new(&top)).unwrap();
    assert_eq!((report.errors, report.leaks, report.allocated), (0, 0, 1));
    let found = info(&DiskConfig::new(&top)).unwrap();
    assert_eq!((found.backing.as_deref(), found.backing_format.as_deref()), (Some("layer.qcow2"), Some("qcow2")));
    assert_eq!((found.size, found.cluster, found.in_use), (4 << 20, Some(65536), false));
    // The chain as one image, in both formats.
    for (name, format) in [("flat.img", Format::Raw), ("flat.qcow2", Format::Qcow2)] {
        let flat = dir.path().join(name);
        let mut last = (0, 0);
        convert(&DiskConfig::new(&top), &flat, format, &mut |done, all| last = (done, all)).unwrap();
        assert_eq!(last, (4 << 20, 4 << 20));
        let disk = Disk::open(&DiskConfig::new(&flat)).unwrap();
        assert_eq!(read(&disk, 4096, 1024), [[0x22; 512], [0x11; 512]].concat());
        assert!(read(&disk, 1 << 20, 3 << 20).iter().all(|b| *b == 0));
    }
    assert!(info(&DiskConfig::new(dir.path().join("flat.img"))).unwrap().allocated < 2 << 20, "zeroes take no space");
}

#[test]
fn names_in_the_header_let_a_tree_move() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("a")).unwrap();
    let base = dir.path().join("a/base.img");
    create(&new(&base, 1 << 20, Format::Raw)).unwrap();
    let layer = dir.path().join("layer.qcow2");
    let backing = Some(DiskConfig::new(&base));
    create(&Create { path: layer.clone(), size: None, format: Format::Qcow2, backing: backing.clone() }).unwrap();
    assert_eq!(info(&DiskConfig::new(&layer)).unwrap().backing.as_deref(), Some("a/base.img"));
    let other = tempfile::tempdir().unwrap();
    let elsewhere = other.path().join("layer.qcow2");
    create(&Create { path: elsewhere.clone(), size: None, format: Format::Qcow2, backing }).unwrap();
    let error = Disk::open(&DiskConfig::new(&elsewhere)).unwrap_err().to_string();
    assert!(error.contains("no leave") && error.contains("backing="), "{error}");
    for grant in [Backing::Anywhere, Backing::Under(dir.path().into())] {
        Disk::open(&DiskConfig { backing: grant, ..DiskConfig::new(&elsewhere) }).unwrap();
    }
}

#[test]
fn resizing() {
    let dir = tempfile::tempdir().unwrap();
    for (name, format) in [("a.img", Format::Raw), ("a.qcow2", Format::Qcow2)] {
        let path = dir.path().join(name);
        create(&new(&path, 1 << 20, format)).unwrap();
        let config = DiskConfig::new(&path);
        write(&Disk::open(&config).unwrap(), (1 << 20) - 512, &[7; 512]);
        resize(&config, 3 << 30, false).unwrap();
        let disk = Disk::open(&config).unwrap();
        assert_eq!(disk.sectors(), (3 << 30) / 512);
        assert_eq!(read(&disk, (1 << 20) - 512, 1024), [[7; 512], [0; 512]].concat());
        write(&disk, (3 << 30) - 512, &[8; 512]);
        assert!(matches!(resize(&config, 4 << 30, false), Err(DiskError::InUse { .. })));
        drop(disk);
        let error = resize(&config, 1 << 20, false).unwrap_err().to_string();
        assert!(error.contains("--shrink"), "{error}");
        resize(&config, 512 << 10, true).unwrap();
        assert_eq!(Disk::open(&config).unwrap().sectors(), 1024);
        assert_eq!(check(&config).unwrap().errors, 0);
        assert!(resize(&config, 1000, true).is_err());
    }
}

#[test]
fn growing_in_use() {
    let dir = tempfile::tempdir().unwrap();
    for (name, format, size) in
        [("a.img", Format::Raw, 3 << 30), ("a.qcow2", Format::Qcow2, 3 << 30), ("b.qcow2", Format::Qcow2, 5 << 40)]
    {
        let path = dir.path().join(name);
        create(&new(&path, 1 << 20, format)).unwrap();
        let config = DiskConfig::new(&path);
        let disk = Disk::open(&config).unwrap();
        write(&disk, (1 << 20) - 512, &[7; 512]);
        std::thread::scope(|scope| {
            // Others read and write meanwhile.
            let other = scope.spawn(|| {
                for round in 0..200_u8 {
                    write(&disk, 4096, &[round; 4096]);
                    assert_eq!(read(&disk, 4096, 4096), [round; 4096]);
                }
            });
            for step in [2 << 20, 600 << 20, size] {
                assert_eq!(disk.grow(step).unwrap(), step / 512);
                assert_eq!(disk.range(step / 512 - 1, 512), Some(step - 512));
                assert_eq!(read(&disk, step - 512, 512), [0; 512]);
                write(&disk, step - 512, &[8; 512]);
            }
            other.join().unwrap();
        });
        assert_eq!(disk.grow(size).unwrap(), size / 512, "as it is");
        for (bytes, part) in [(size - 512, "only become larger"), (size + 1, "multiple of 512"), (u64::MAX, "multiple")]
        {
            let error = disk.grow(bytes).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        drop(disk);
        let disk = Disk::open(&DiskConfig { read_only: true, ..config.clone() }).unwrap();
        assert_eq!(disk.sectors(), size / 512);
        assert_eq!(read(&disk, (1 << 20) - 512, 1024), [[7; 512], [0; 512]].concat());
        assert_eq!((read(&disk, (600 << 20) - 512, 512), read(&disk, size - 512, 512)), (vec![8; 512], vec![8; 512]));
        assert!(disk.grow(size + 512).unwrap_err().to_string().contains("read-only"));
        assert_eq!(check(&config).unwrap().errors, 0);
    }
}

#[test]
fn what_cannot_be_made() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    create(&new(&path, 1 << 20, Format::Qcow2)).unwrap();
    let message = |create: &Create| super::create(create).unwrap_err().to_string();
    assert!(message(&new(&path, 1 << 20, Format::Qcow2)).contains("exists already"));
    let other = dir.path().join("b.qcow2");
    for size in [0, 511, 513, u64::MAX, 1 << 52] {
        assert!(message(&new(&other, size, Format::Qcow2)).contains("cannot have"), "{size}");
    }
    assert!(message(&new(&dir.path().join("no/b"), 512, Format::Raw)).contains("No such file"));
    let over = |backing: &Path, format| Create {
        path: other.clone(),
        size: None,
        format,
        backing: Some(DiskConfig::new(backing)),
    };
    assert!(message(&over(&path, Format::Raw)).contains("--format qcow2"));
    assert!(message(&over(&dir.path().join("none.img"), Format::Qcow2)).contains("none.img"));
    assert!(message(&over(dir.path(), Format::Qcow2)).contains("directory"));
    assert!(!other.exists(), "nothing is left behind");
    // A layer over a disk that somebody writes to would change under its feet.
    let _held = Disk::open(&DiskConfig::new(&path)).unwrap();
    assert!(message(&over(&path, Format::Qcow2)).contains("in use"));
}

#[test]
fn a_full_file_system_is_named() {
    let error = DiskError::io("write", Path::new("a.img"))(io::Error::from_raw_os_error(libc::ENOSPC)).to_string();
    assert!(error.contains("a.img") && error.contains("make room"), "{error}");
}
