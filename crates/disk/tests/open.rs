//! Opening raw disks: what is one, and who may use it at the same time.

use std::io::Write;

use disk::{Disk, DiskConfig, DiskError, Slice};

fn image(bytes: usize) -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(&vec![0xaa; bytes]).unwrap();
    file
}

fn read_only(config: DiskConfig) -> DiskConfig {
    DiskConfig { read_only: true, ..config }
}

#[test]
fn sizes_and_ranges() {
    let file = image(1025);
    let disk = Disk::open(&DiskConfig::new(file.path())).unwrap();
    assert_eq!(disk.sectors(), 2);
    assert!(disk.warning().unwrap().contains("1 bytes"));
    assert_eq!(disk.range(1, 512), Some(512));
    assert_eq!(disk.range(2, 0), Some(1024));
    assert_eq!(disk.range(1, 1024), None);
    assert_eq!(disk.range(0, 511), None);
    assert_eq!(disk.range(u64::MAX, 512), None);
    assert_eq!(disk.range(u64::MAX, 0), None);
    assert!(matches!(Disk::open(&read_only(DiskConfig::new(image(511).path()))), Err(DiskError::Empty { .. })));
    assert!(Disk::open(&read_only(DiskConfig::new(image(512).path()))).unwrap().warning().is_none());
}

#[test]
fn not_a_disk() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR).unwrap();
    let socket = dir.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    for path in [dir.path(), std::path::Path::new("/dev/zero"), &pipe, &socket] {
        for config in [DiskConfig::new(path), read_only(DiskConfig::new(path))] {
            let error = Disk::open(&config).unwrap_err();
            assert!(matches!(error, DiskError::Kind { .. }), "{error}");
        }
    }
    let error = Disk::open(&DiskConfig::new(dir.path().join("none"))).unwrap_err().to_string();
    assert!(error.contains("none") && error.contains("check the path"), "{error}");
}

#[test]
fn one_writer_or_many_readers() {
    let file = image(4096);
    let config = DiskConfig::new(file.path());
    let writer = Disk::open(&config).unwrap();
    for config in [config.clone(), read_only(config.clone())] {
        let error = Disk::open(&config).unwrap_err();
        assert!(matches!(error, DiskError::InUse { .. }));
        assert!(error.to_string().contains("in use by another VM"));
    }
    drop(writer);
    let first = Disk::open(&read_only(config.clone())).unwrap();
    let second = Disk::open(&read_only(config.clone())).unwrap();
    assert!(matches!(Disk::open(&config), Err(DiskError::InUse { .. })));
    drop((first, second));
    // Writers who agree.
    let shared = DiskConfig { shared: true, ..config.clone() };
    let _first = Disk::open(&shared).unwrap();
    let _second = Disk::open(&shared).unwrap();
    assert!(matches!(Disk::open(&config), Err(DiskError::InUse { .. })));
}

#[test]
fn zeroes_and_holes() {
    let file = image(1 << 20);
    let disk = Disk::open(&DiskConfig::new(file.path())).unwrap();
    disk.write_zeroes(512, 512, false).unwrap();
    disk.write_zeroes(4096, 8192, true).unwrap();
    disk.discard(512 << 10, 4096).unwrap();
    let mut ones = vec![1; 1000];
    let (front, back) = ones.split_at_mut(300);
    disk.write(1 << 16, &[Slice::from(front), Slice::from(back)]).unwrap();
    disk.flush().unwrap();
    let data = std::fs::read(file.path()).unwrap();
    assert_eq!(data.len(), 1 << 20);
    let all = |range: std::ops::Range<usize>, byte: u8| data[range].iter().all(|b| *b == byte);
    assert!(all(512..1024, 0) && all(4096..12288, 0) && all(1 << 16..(1 << 16) + 1000, 1));
    assert!(data[511] == 0xaa && data[1024] == 0xaa && data[12288] == 0xaa && data[(1 << 16) + 1000] == 0xaa);
}

#[test]
fn without_leave_to_write() {
    // The superuser may write to any file; a file system that is read-only would do.
    if rustix::process::geteuid().is_root() {
        return;
    }
    let file = image(4096);
    let mut permissions = file.as_file().metadata().unwrap().permissions();
    permissions.set_readonly(true);
    file.as_file().set_permissions(permissions).unwrap();
    let error = Disk::open(&DiskConfig::new(file.path())).unwrap_err().to_string();
    assert!(error.contains(",ro"), "{error}");
}
