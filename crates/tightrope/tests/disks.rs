//! Disks in whole machines: what is flushed survives the monitor's death, and what goes wrong with a disk is said in one line.
//!
//! The short form of the tests of kills runs always; the long one: `cargo test -p tightrope --test disks -- --ignored`, with
//! `TIGHTROPE_TEST_ROUNDS` for the number of kills.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use common::{PROMPT, Session, finish, left_out, run, tightrope};
use disk::{Create, Disk, DiskConfig, Format, Slice, check, convert, create};
/// Bytes of a record.
const RECORD: u64 = 4096;
/// Writers in the guest, each with a region of so many records.
const WRITERS: u64 = 3;
const REGION: u64 = 4096;
const SIZE: u64 = 256 << 20;

/// A number that differs from run to run.
fn random(bound: u64) -> u64 {
    let mut bytes = [0; 8];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    u64::from_le_bytes(bytes) % bound
}

/// The program `name`, or `None` where it is missing and CI is not set.
fn program(name: &str) -> Option<Command> {
    let found = Command::new(name).arg("--help").output().is_ok();
    assert!(found || std::env::var_os("CI").is_none(), "CI needs {name}");
    if !found {
        left_out(&format!("there is no {name} to check with"));
    }
    found.then(|| Command::new(name))
}

/// Runs a program to its end; returns exit code and output.
fn output(mut command: Command, args: &[&str]) -> (i32, String) {
    let output = command.args(args).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
}

fn new_disk(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    let format = if name.ends_with("qcow2") { Format::Qcow2 } else { Format::Raw };
    create(&Create { path: path.clone(), size: Some(SIZE), format, backing: None }).unwrap();
    path
}

/// The qcow2 image is consistent: nothing but lost clusters, for QEMU too.
fn consistent(path: &Path) {
    let report = check(&DiskConfig::new(path)).unwrap();
    assert_eq!(report.errors, 0, "{:?}", report.texts);
    if path.extension().is_some_and(|name| name == "qcow2")
        && let Some(qemu_img) = program("qemu-img")
    {
        let (code, text) = output(qemu_img, &["check", path.to_str().unwrap()]);
        // 3: clusters are lost, no errors.
        assert!(code == 0 || code == 3, "{text}");
    }
}

/// Starts a guest whose writers each write numbered records and sync, and report those that are synced; kills the monitor. Returns the last reported
/// number of each writer.
fn write_and_kill(path: &Path, options: &str, round: u64) -> BTreeMap<u64, u64> {
    let mut session = Session::start(run(&["--net", "none", "--disk", &format!("{}{options}", path.display())]));
    session.expect(PROMPT);
    // Writers, and one who writes much without any sync: the image grows all the time.
    let script = format!(
        "w() {{ n=0; while [ $n -lt {REGION} ]; do printf 'round {round} writer %d number %d.' $1 $n | \
         dd of=/dev/vda bs={RECORD} seek=$(($1*{REGION}+n)) conv=sync,notrunc,fsync 2>/dev/null && echo ack $1 $n.; n=$((n+1)); done; }}; \
         (while :; do dd if=/dev/urandom of=/dev/vda bs=64k seek=1024 count=2048 conv=notrunc 2>/dev/null; done) & \
         for k in 0 1 2; do w $k & done; echo started-$((1+1))\n"
    );
    session.send(script.as_bytes());
    session.expect("started-2");
    session.watch(Duration::from_millis(500 + random(2500)));
    let text = session.kill();
    let mut last = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        if let (Some("ack"), Some(writer), Some(number), None) =
            (words.next(), words.next(), words.next(), words.next())
            && let (Ok(writer), Some(Ok(number))) =
                (writer.parse::<u64>(), number.strip_suffix('.').map(str::parse::<u64>))
            && writer < WRITERS
        {
            last.insert(writer, number);
        }
    }
    last
}

/// All records that were reported are on the disk.
fn records_are_there(path: &Path, round: u64, last: &BTreeMap<u64, u64>) {
    let disk = Disk::open(&DiskConfig { read_only: true, ..DiskConfig::new(path) }).unwrap();
    for (writer, last) in last {
        for number in 0..=*last {
            let mut data = vec![0; RECORD as usize];
            let offset = (writer * REGION + number) * RECORD;
            disk.read(offset, &[Slice::from(data.as_mut_slice())]).1.unwrap();
            let wanted = format!("round {round} writer {writer} number {number}.");
            assert!(
                data.starts_with(wanted.as_bytes()) && data[wanted.len()..].iter().all(|byte| *byte == 0),
                "{}: '{wanted}' is lost: {:?}",
                path.display(),
                String::from_utf8_lossy(&data[..60])
            );
        }
    }
}

/// `rounds` kills over one image, each checked.
fn kills(name: &str, options: &str, rounds: u64) {
    let dir = tempfile::tempdir().unwrap();
    let path = new_disk(dir.path(), name);
    let mut all = 0;
    for round in 0..rounds {
        let last = write_and_kill(&path, options, round);
        // At once: a monitor that was killed leaves nothing locked.
        consistent(&path);
        records_are_there(&path, round, &last);
        all += last.values().map(|last| last + 1).sum::<u64>();
    }
    println!("{name}{options}: {rounds} kills, {all} records reported, none lost");
    assert!(all >= rounds, "the guest wrote too little to tell: {all} records");
}

/// As [`kills`], for a file system: files that were synced are there after its journal was replayed, and it is whole.
fn file_system_survives(name: &str, rounds: u64) {
    let (Some(_), Some(_), Some(_)) = (program("mke2fs"), program("e2fsck"), program("debugfs")) else { return };
    let dir = tempfile::tempdir().unwrap();
    let plain = new_disk(dir.path(), "plain.img");
    let plain_name = plain.to_str().unwrap();
    let (code, text) = output(Command::new("mke2fs"), &["-q", "-F", "-t", "ext4", plain_name]);
    assert_eq!(code, 0, "{text}");
    let path = dir.path().join(name);
    convert(
        &DiskConfig::new(&plain),
        &path,
        if name.ends_with("qcow2") { Format::Qcow2 } else { Format::Raw },
        &mut |_, _| (),
    )
    .unwrap();
    for round in 0..rounds {
        let mut session = Session::start(run(&["--net", "none", "--disk", path.to_str().unwrap()]));
        session.expect(PROMPT);
        let script = format!(
            "mkdir -p /mnt; mount -t ext4 /dev/vda /mnt && cd /mnt && echo mounted-$((1+1)) || poweroff; (while :; do dd if=/dev/zero of=big bs=64k count=512 2>/dev/null; rm big; done) & \
             n=0; while :; do echo round {round} number $n. | dd of=/mnt/r{round}-$n conv=fsync 2>/dev/null && echo ack $n.; \
             n=$((n+1)); done\n"
        );
        session.send(script.as_bytes());
        session.expect("mounted-2");
        session.expect("ack 3.");
        session.watch(Duration::from_millis(random(2500)));
        let text = session.kill();
        let acknowledged = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("ack ")?.strip_suffix('.')?.parse::<u64>().ok())
            .max();
        consistent(&path);
        let copy = dir.path().join("copy.img");
        let _ = std::fs::remove_file(&copy);
        convert(&DiskConfig::new(&path), &copy, Format::Raw, &mut |_, _| ()).unwrap();
        let copy = copy.to_str().unwrap();
        let (code, text) = output(Command::new("e2fsck"), &["-p", copy]);
        assert!(code == 0 || code == 1, "the journal cannot be replayed: {text}");
        let (code, text) = output(Command::new("e2fsck"), &["-f", "-n", copy]);
        assert_eq!(code, 0, "not whole: {text}");
        for number in 0..=acknowledged.unwrap() {
            let (_, text) = output(Command::new("debugfs"), &["-R", &format!("cat /r{round}-{number}"), copy]);
            assert!(text.contains(&format!("round {round} number {number}.")), "file {number} is lost: {text}");
        }
    }
}

#[test]
fn a_killed_monitor_loses_nothing_raw() {
    kills("a.img", "", 2);
}

#[test]
fn a_killed_monitor_loses_nothing_qcow2() {
    kills("a.qcow2", "", 2);
}

#[test]
fn a_killed_monitor_leaves_a_file_system_whole() {
    file_system_survives("a.qcow2", 1);
}

fn rounds() -> u64 {
    std::env::var("TIGHTROPE_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(50)
}

#[test]
#[ignore = "some minutes: a kill every few seconds"]
fn many_kills() {
    for (name, options) in
        [("a.qcow2", ""), ("b.img", ",io=uring"), ("c.img", ",io=threads"), ("d.img", ",cache=writethrough")]
    {
        kills(name, options, rounds());
    }
}

#[test]
#[ignore = "some minutes: a kill every few seconds"]
fn many_kills_of_a_file_system() {
    file_system_survives("a.qcow2", rounds());
    file_system_survives("b.img", rounds());
}

/// A layer over a base, a serial number, and a disk that grows while the guest runs.
#[test]
fn layers_serial_numbers_and_growth() {
    let dir = tempfile::tempdir().unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let base = dir.path().join("base.img");
    std::fs::write(&base, vec![b'B'; 8 << 20]).unwrap();
    let layer = text(&dir.path().join("layer.qcow2"));
    let done = finish(tightrope(&["disk", "create", &layer, "--backing", &text(&base)]), b"");
    assert_eq!((done.code(), done.out.as_str(), done.err.as_str()), (Some(0), "", ""));
    let grows = dir.path().join("grows.img");
    assert_eq!(finish(tightrope(&["disk", "create", &text(&grows), "4M"]), b"").code(), Some(0));
    let grows_option = format!("{},serial=MINE-1,iops=5000", text(&grows));
    let mut session = Session::start(run(&["--net", "none", "--disk", &layer, "--disk", &grows_option]));
    session.expect(PROMPT);
    session.send(b"head -c 4 /dev/vda; echo; printf layer | dd of=/dev/vda seek=8 conv=notrunc,fsync 2>/dev/null; cat /sys/block/vdb/serial /sys/block/vdb/size\n");
    session.expect("BBBB\r\n");
    session.expect("MINE-1");
    session.expect("8192");
    std::fs::OpenOptions::new().write(true).open(&grows).unwrap().set_len(6 << 20).unwrap();
    session.send(b"while [ $(cat /sys/block/vdb/size) != 12288 ]; do sleep 0.2; done; echo it-grew-$((1+1)); blkdiscard /dev/vda; poweroff\n");
    session.expect("it-grew-2");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.err.contains("has 6291456 bytes now"), "{}", done.err);
    assert!(std::fs::read(&base).unwrap().iter().all(|byte| *byte == b'B'), "a base is never written");
    consistent(Path::new(&layer));
    let info = finish(tightrope(&["disk", "info", &layer, "--json"]), b"").out;
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(
        (info["format"].as_str(), info["backing"].as_str(), info["size"].as_u64()),
        (Some("qcow2"), Some("base.img"), Some(8 << 20))
    );
}

/// What a guest writes at the start of its raw disk does not make it another format.
#[test]
fn a_guest_cannot_make_its_disk_a_qcow2_image() {
    let dir = tempfile::tempdir().unwrap();
    let path = new_disk(dir.path(), "a.img");
    let name = path.to_str().unwrap();
    let mut session = Session::start(run(&["--net", "none", "--disk", name]));
    session.expect(PROMPT);
    session.send(b"printf 'QFI\\373\\0\\0\\0\\003' | dd of=/dev/vda conv=sync,notrunc,fsync 2>/dev/null; echo done-$((1+1)); poweroff\n");
    session.expect("done-2");
    assert_eq!(session.finish().code(), Some(0));
    assert_eq!(&std::fs::read(&path).unwrap()[..4], b"QFI\xfb");
    let refused = finish(run(&["--disk", name]), b"");
    assert_eq!((refused.code(), refused.err.lines().count()), (Some(1), 1), "{}", refused.err);
    assert!(refused.err.contains("say format=raw"), "{}", refused.err);
}

/// A host without room: the guest hears of I/O errors, the user once, and what was there stays.
#[test]
fn a_full_host() {
    let namespaces = Command::new("unshare").args(["-rm", "mount", "-t", "tmpfs", "none", "/mnt"]).status();
    if !namespaces.is_ok_and(|status| status.success()) {
        left_out("no file system can be mounted here");
        return;
    }
    for name in ["a.qcow2", "a.img"] {
        let dir = tempfile::tempdir().unwrap();
        let small = dir.path().join("small");
        std::fs::create_dir(&small).unwrap();
        let kept = dir.path().join(name);
        let (program, engine) = (env!("CARGO_BIN_EXE_tightrope"), common::engine());
        let script = format!(
            "cd {small} && mount -t tmpfs -o size=16m none . && cd . && cd {small} && {program} disk create {name} 256M && \
             {program} run --engine {engine} --net none --disk {name}; code=$?; cp --sparse=always {name} {kept}; exit $code",
            small = small.display(),
            kept = kept.display()
        );
        let mut command = Command::new("unshare");
        command.args(["-rm", "sh", "-c", &script]).env("XDG_CONFIG_HOME", "/nonexistent");
        let mut session = Session::start(command);
        session.expect(PROMPT);
        session.send(
            b"echo first | dd of=/dev/vda conv=sync,notrunc,fsync 2>/dev/null && echo kept-$((1+1)); \
              for k in 1 2 3; do dd if=/dev/urandom of=/dev/vda bs=1M seek=1 count=64 conv=notrunc,fsync 2>&1 | grep -c error; done; \
              head -c 5 /dev/vda; echo; poweroff\n",
        );
        session.expect("kept-2");
        session.expect("first");
        let done = session.finish();
        assert_eq!(done.code(), Some(0), "{}", done.err);
        assert_eq!(done.err.matches("no space is left").count(), 1, "{}", done.err);
        consistent(&kept);
        let disk = Disk::open(&DiskConfig::new(&kept)).unwrap();
        let mut data = vec![0; 512];
        disk.read(0, &[Slice::from(data.as_mut_slice())]).1.unwrap();
        assert!(data.starts_with(b"first\n"));
    }
}
