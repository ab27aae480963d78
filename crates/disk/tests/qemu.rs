//! What Tightrope writes QEMU reads, and the other way round. Without `qemu-img` most of this is not checked (CI needs it).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

use disk::{Create, Disk, DiskConfig, Format, Slice, check, create};

/// A process that is being started holds all open files, with their locks, for a moment: no two tests at once.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs qemu-img; `None` where there is none.
fn qemu_img(args: &[&str]) -> Option<(i32, String)> {
    match Command::new("qemu-img").args(args).output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            Some((output.status.code().unwrap_or(-1), text))
        }
        Err(_) => {
            assert!(std::env::var_os("CI").is_none(), "CI needs qemu-img (package qemu-utils)");
            eprintln!("no qemu-img here: not checked with it");
            None
        }
    }
}

fn image(dir: &Path, name: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    create(&Create { path: path.clone(), size: Some(size), format: Format::Qcow2, backing: None }).unwrap();
    path
}

fn refusal(path: &Path) -> String {
    match Disk::open(&DiskConfig::new(path)) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} was opened", path.display()),
    }
}

#[test]
fn random_use_agrees_with_a_plain_file_and_with_qemu() {
    let _alone = alone();
    const SIZE: usize = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base.img");
    let mut state = 0x1234_5678_9abc_def0_u64;
    let mut random = move |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % bound as u64) as usize
    };
    let mut model: Vec<u8> = (0..SIZE).map(|at| (at / 4096) as u8).collect();
    std::fs::write(&base, &model).unwrap();
    let path = dir.path().join("a.qcow2");
    let backing = Some(DiskConfig::new(&base));
    create(&Create { path: path.clone(), size: None, format: Format::Qcow2, backing }).unwrap();
    for round in 0..4 {
        let disk = Disk::open(&DiskConfig::new(&path)).unwrap();
        for _ in 0..300 {
            let at = random(SIZE / 512) * 512;
            let len = ((random(300) + 1) * 512).min(SIZE - at);
            let range = at..at + len;
            match random(8) {
                0 => {
                    disk.write_zeroes(at as u64, len as u64, random(2) == 0).unwrap();
                    model[range].fill(0);
                }
                1 => {
                    disk.discard(at as u64, len as u64).unwrap();
                    // Zeroes or what was there: take over what it is.
                    let mut data = vec![0; len];
                    disk.read(at as u64, &[Slice::from(data.as_mut_slice())]).1.unwrap();
                    assert!(data.iter().zip(&model[range.clone()]).all(|(new, old)| *new == 0 || new == old));
                    model[range].copy_from_slice(&data);
                }
                2 => disk.flush().unwrap(),
                3 => {
                    let mut data = vec![0; len];
                    let (front, back) = data.split_at_mut(random(len));
                    disk.read(at as u64, &[Slice::from(front), Slice::from(back)]).1.unwrap();
                    assert!(data == model[range], "round {round} at {at}");
                }
                _ => {
                    let mut data = vec![random(256) as u8; len];
                    disk.write(at as u64, &[Slice::from(data.as_mut_slice())]).unwrap();
                    model[range].copy_from_slice(&data);
                }
            }
        }
        drop(disk);
        assert_eq!(check(&DiskConfig::new(&path)).unwrap().errors, 0);
    }
    let report = check(&DiskConfig::new(&path)).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.texts);
    if let Some((code, text)) = qemu_img(&["check", path.to_str().unwrap()]) {
        assert_eq!(code, 0, "{text}");
        let flat = dir.path().join("flat.img");
        let (code, text) = qemu_img(&["convert", "-O", "raw", path.to_str().unwrap(), flat.to_str().unwrap()]).unwrap();
        assert_eq!(code, 0, "{text}");
        assert!(std::fs::read(&flat).unwrap() == model);
    }
}

#[test]
fn images_that_qemu_made() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("plain.img");
    let data: Vec<u8> = (0..3 << 20_u32).map(|at: u32| (at / 1000) as u8).collect();
    std::fs::write(&plain, &data).unwrap();
    let plain_name = plain.to_str().unwrap();
    let variants: &[&[&str]] = &[
        &["-o", "compat=0.10"],
        &["-c"],
        &["-o", "cluster_size=512"],
        &["-o", "cluster_size=2M"],
        &["-o", "refcount_bits=1"],
        &["-o", "refcount_bits=64"],
        &["-o", "preallocation=metadata"],
        &["-o", "lazy_refcounts=on"],
        &["-c", "-o", "cluster_size=4096"],
    ];
    for (number, options) in variants.iter().enumerate() {
        let path = dir.path().join(format!("{number}.qcow2"));
        let mut args = vec!["convert", "-O", "qcow2"];
        args.extend(*options);
        args.extend([plain_name, path.to_str().unwrap()]);
        let Some((code, text)) = qemu_img(&args) else { return };
        assert_eq!(code, 0, "{text}");
        let disk = Disk::open(&DiskConfig::new(&path)).unwrap_or_else(|error| panic!("{options:?}: {error}"));
        let mut read = vec![0; data.len()];
        disk.read(0, &[Slice::from(read.as_mut_slice())]).1.unwrap();
        assert!(read == data, "{options:?}");
        // And written to.
        let mut new = vec![0xa5; 70_144];
        disk.write(512, &[Slice::from(new.as_mut_slice())]).unwrap();
        drop(disk);
        let report = check(&DiskConfig::new(&path)).unwrap();
        assert_eq!((report.errors, report.leaks), (0, 0), "{options:?}: {:?}", report.texts);
        let (code, text) = qemu_img(&["check", path.to_str().unwrap()]).unwrap();
        assert_eq!(code, 0, "{options:?}: {text}");
    }
    // What is not supported is refused by name.
    for (options, part) in [("compression_type=zstd", "zstd"), ("extended_l2=on,cluster_size=64k", "extended L2")] {
        let path = dir.path().join("other.qcow2");
        let _ = std::fs::remove_file(&path);
        let args = ["convert", "-c", "-O", "qcow2", "-o", options, plain_name, path.to_str().unwrap()];
        assert_eq!(qemu_img(&args).unwrap().0, 0);
        assert!(refusal(&path).contains(part));
    }
    let path = dir.path().join("data.qcow2");
    let args = ["create", "-f", "qcow2", "-o", "data_file=data.raw", path.to_str().unwrap(), "1M"];
    assert_eq!(Command::new("qemu-img").args(args).current_dir(dir.path()).output().unwrap().status.code(), Some(0));
    assert!(refusal(&path).contains("in another file"));
    // Snapshots inside an image stay as they are.
    let path = image(dir.path(), "snapshot.qcow2", 1 << 20);
    let mut ones = vec![1; 65_536];
    Disk::open(&DiskConfig::new(&path)).unwrap().write(0, &[Slice::from(ones.as_mut_slice())]).unwrap();
    assert_eq!(qemu_img(&["snapshot", "-c", "s", path.to_str().unwrap()]).unwrap().0, 0);
    let mut twos = vec![2; 65_536];
    Disk::open(&DiskConfig::new(&path)).unwrap().write(0, &[Slice::from(twos.as_mut_slice())]).unwrap();
    let report = check(&DiskConfig::new(&path)).unwrap();
    assert_eq!((report.errors, report.leaks), (0, 0), "{:?}", report.texts);
    assert_eq!(qemu_img(&["check", path.to_str().unwrap()]).unwrap().0, 0);
    assert_eq!(qemu_img(&["snapshot", "-a", "s", path.to_str().unwrap()]).unwrap().0, 0);
    let mut read = vec![0; 65_536];
    Disk::open(&DiskConfig::new(&path)).unwrap().read(0, &[Slice::from(read.as_mut_slice())]).1.unwrap();
    assert!(read == ones);
}
