//! The engine `kvm` where no KVM works: QEMU without hardware support emulates a machine with AMD-V and nested paging, boots Debian's own
//! kernel on it, and that kernel's `kvm-amd` gives a working `/dev/kvm`. There the whole-machine tests run with engine `kvm`.
//!
//! Needs `qemu-system-x86_64` (Debian package `qemu-system-x86`); missing it is a failure where `CI` is set, and said loudly elsewhere. QEMU's
//! translator has no VT-x: for `kvm-intel` there is Bochs, which is slower ([`vt_x`]).

mod emulator;
#[path = "../common/patience.rs"]
mod patience;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use emulator::{Boot, Emulator, tool};
use image::{Flavour, cpio, initramfs};
use patience::{Patience, STEP};

/// What a run may take that takes two minutes on a host with nothing else to do. The tests in there have limits of their own, within which they
/// say what they wait for.
const LIMIT: Duration = Duration::from_secs(1800);
/// Marks lines of ours on the console.
const MARK: &str = "@@";
/// How often an outer guest is booted that stands still.
const ATTEMPTS: u32 = 3;

/// Programs of the host's that tests use (a shell too: BusyBox's takes its own commands for these). Where one is missing on the host, so it is in the outer guest,
/// and the tests that need it fail.
const TOOLS: [&str; 8] = ["qemu-img", "mke2fs", "e2fsck", "debugfs", "ip", "unshare", "cp", "sh"];

/// The outer guest's first program. What it runs is in `/run-tests`.
const INIT: &str = r#"#!/bin/sh
# The host's own tools before BusyBox's.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TIGHTROPE_TEST_ENGINE=kvm TIGHTROPE_TEST_ALL=1
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts
mkdir -p /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up 2>/dev/null || ifconfig lo up
ulimit -c 0
modprobe tun
modprobe kvm_amd 2>/dev/null || modprobe kvm_intel || echo "@@ failed modprobe"
[ -c /dev/kvm ] || echo "@@ failed no /dev/kvm"
(while :; do echo "@@ alive"; sleep 10; done) &
ALIVE=$!
. /run-tests
echo "@@ end"
# Bochs's serial port goes on sending only when it gets something more.
[ -z "$TIGHTROPE_TEST_EMULATED" ] || for i in $(seq 100); do echo; sleep 0.1; done
poweroff -f
"#;

/// Is the emulator there? Without it the test fails in CI and is left out elsewhere.
fn is_there(emulator: Emulator) -> bool {
    let Some(packages) = emulator.missing() else { return true };
    assert!(std::env::var_os("CI").is_none(), "{emulator:?} is missing: install the Debian packages {packages}");
    eprintln!("NOT TESTED: {emulator:?} is missing (Debian packages {packages}); engine kvm goes untested");
    false
}

/// Cargo without what it told this test of its package: build scripts of dependencies would take that for a change.
fn cargo() -> Command {
    let mut cargo = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        if ["CARGO_PKG_", "CARGO_MANIFEST_"].iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    cargo
}

/// Test programs of this package by name, built as they are in this very test run.
fn test_programs(names: &[&str]) -> BTreeMap<String, PathBuf> {
    let own = std::env::current_exe().expect("a path");
    let target = own.ancestors().nth(3).expect("target directory");
    let mut cargo = cargo();
    // Of the whole workspace, so that dependencies have the features that they have already.
    cargo.args(["test", "--workspace", "--no-run", "--message-format=json", "--target-dir"]).arg(target);
    for name in names {
        cargo.args(["--test", name]);
    }
    let output = cargo.stderr(Stdio::inherit()).stdin(Stdio::null()).output().expect("cargo");
    assert!(output.status.success(), "the test programs cannot be built");
    let messages = output.stdout.split(|byte| *byte == b'\n');
    let programs: BTreeMap<String, PathBuf> = messages
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter_map(|message| {
            let name = message["target"]["name"].as_str()?.to_string();
            let path = message["executable"].as_str()?;
            names.contains(&name.as_str()).then(|| (name, path.into()))
        })
        .collect();
    assert_eq!(programs.len(), names.len(), "{programs:?}");
    programs
}

/// Shared libraries that a program needs, by the paths at which it finds them.
fn libraries(program: &Path) -> BTreeSet<PathBuf> {
    let output = Command::new("ldd").arg(program).output().expect("ldd");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.split_ascii_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect()
}

/// A program without its debugging information, which would fill the outer guest's memory.
fn stripped(program: &Path) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    let strip = Command::new("strip").arg("-o").arg(file.path()).arg(program).status();
    let path = if strip.is_ok_and(|status| status.success()) { file.path() } else { program };
    std::fs::read(path).expect("program")
}

/// An archive of files on top of the initramfs.
#[derive(Default)]
struct Overlay {
    files: BTreeMap<PathBuf, (u32, Vec<u8>)>,
}

impl Overlay {
    fn put(&mut self, path: impl Into<PathBuf>, mode: u32, data: Vec<u8>) {
        self.files.insert(path.into(), (mode, data));
    }

    /// A program with its libraries, at its own path.
    fn program(&mut self, path: &Path) {
        for library in libraries(path) {
            let data = std::fs::read(&library).expect("library");
            self.put(library, 0o755, data);
        }
        self.put(path, 0o755, stripped(path));
    }

    /// All files under a directory, at their own names under `to`.
    fn tree(&mut self, from: &Path, to: &Path) {
        for entry in std::fs::read_dir(from).expect("directory") {
            let entry = entry.expect("entry");
            let to = to.join(entry.file_name());
            if entry.file_type().expect("type").is_dir() {
                self.tree(&entry.path(), &to);
            } else {
                self.put(to, 0o644, std::fs::read(entry.path()).expect("file"));
            }
        }
    }

    fn archive(&self) -> Vec<u8> {
        let mut writer = cpio::Writer::new();
        let mut made = BTreeSet::new();
        for (path, (mode, data)) in &self.files {
            let name = path.strip_prefix("/").unwrap_or(path);
            for parent in name.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
                if !parent.as_os_str().is_empty() && made.insert(parent.to_path_buf()) {
                    writer.dir(&parent.display().to_string());
                }
            }
            writer.file(&name.display().to_string(), *mode, data);
        }
        writer.finish()
    }
}

/// The package of `version`'s kernel and BusyBox's: from the cache, or fetched.
fn packages(image: &image::GuestImage, options: &image::Options) -> [PathBuf; 2] {
    let kernel = format!("linux-image-{}", image.kernel_version);
    let cache = image.kernel.ancestors().nth(3).expect("cache").join("packages");
    let cached = |name: &str| {
        let wanted = format!("-{name}_");
        let entries = std::fs::read_dir(&cache).ok()?;
        entries.filter_map(|entry| Some(entry.ok()?.path())).find(|path| path.to_string_lossy().contains(&wanted))
    };
    if let (Some(kernel), Some(busybox)) = (cached(&kernel), cached("busybox-static")) {
        return [kernel, busybox];
    }
    let names = [kernel.as_str(), "busybox-static"];
    let found = image::fetch_packages(image::DEFAULT_SUITE, &names, options).unwrap_or_else(|error| panic!("{error}"));
    found.try_into().expect("two packages")
}

/// Where test programs look for the command.
const COMMAND: &str = env!("CARGO_BIN_EXE_tightrope");

/// The outer guest, and what it has beside test programs.
struct Outer<'a> {
    emulator: Emulator,
    /// What is at the place of [`COMMAND`].
    command: &'a Path,
    /// Shell commands that come before the test programs.
    before: &'a str,
    /// What is `/dev/vda`.
    disk: Option<&'a Path>,
    /// Images of Debian that inner guests boot, beside the default one.
    images: &'a [(&'a str, Flavour)],
    /// How long it may take.
    limit: Duration,
    /// How long nothing may come from it, which says every ten seconds that it is alive.
    silence: Duration,
}

impl Outer<'_> {
    fn new(limit: Duration) -> Self {
        Self {
            emulator: Emulator::Qemu,
            command: Path::new(COMMAND),
            before: "",
            disk: None,
            images: &[],
            limit,
            silence: Duration::from_secs(180),
        }
    }
}

/// An image of Debian, from the cache or made.
fn debian(suite: &str, flavour: Flavour) -> image::GuestImage {
    let options = image::Options { progress: image::Progress::Quiet, ..image::Options::default() };
    image::default_image(suite, flavour, &options).unwrap_or_else(|error| panic!("{error}"))
}

/// Boots the outer guest, which runs the shell script `script`; returns all it printed.
fn outer_guest(outer: &Outer<'_>, script: &str, programs: &[&Path]) -> String {
    let options = image::Options { progress: image::Progress::Quiet, ..image::Options::default() };
    let image = debian(image::DEFAULT_SUITE, Flavour::Cloud);
    let [kernel_deb, busybox_deb] = packages(&image, &options);
    let kernel = initramfs::Kernel::read(&kernel_deb).unwrap_or_else(|error| panic!("{error}"));
    let extra = ["kvm_amd", "kvm_intel", "tun"].map(String::from);
    let mut archive =
        initramfs::build(&kernel, &kernel_deb, &busybox_deb, &extra).unwrap_or_else(|error| panic!("{error}"));
    let mut overlay = Overlay::default();
    overlay.put("/init", 0o755, INIT.into());
    overlay.put("/run-tests", 0o644, script.into());
    overlay.program(outer.command);
    let (_, program) = overlay.files.remove(outer.command).expect("the command");
    overlay.put(COMMAND, 0o755, program);
    for program in programs {
        overlay.program(program);
    }
    for tool in TOOLS.iter().filter_map(|name| tool(name)) {
        overlay.program(&tool);
    }
    // The inner guests' images, as the command finds them in its cache: no other of those that the cache may have.
    for (suite, flavour) in outer.images.iter().copied().chain([(image::DEFAULT_SUITE, Flavour::Cloud)]) {
        let image = debian(suite, flavour);
        let directory = image.kernel.parent().expect("the image's directory");
        let (images, key) = (directory.parent().expect("images"), directory.file_name().expect("a name"));
        let to = Path::new("/var/cache/tightrope/images");
        overlay.tree(directory, &to.join(key));
        let record = format!("{suite}-{flavour}.json");
        overlay.put(to.join(&record), 0o644, std::fs::read(images.join(&record)).expect("the image's record"));
    }
    archive.extend(overlay.archive());

    let dir = tempfile::tempdir().expect("directory");
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, &archive).expect("initrd");
    let once = |number| {
        let dir = tempfile::tempdir().expect("directory");
        attempt(
            outer,
            &Boot { kernel: &image.kernel, initrd: &initrd, disk: outer.disk, dir: dir.path(), attempt: number },
        )
    };
    let seen = (1..=ATTEMPTS).find_map(once);
    seen.unwrap_or_else(|| panic!("the outer guest stood still {ATTEMPTS} times"))
}

/// Why an outer guest is not listened to any more.
#[derive(PartialEq, Eq)]
enum Stopped {
    /// It ended.
    Ended,
    /// It has had its time.
    TooLate,
    /// It stands still.
    Silent,
}

/// Boots the outer guest and returns all it printed, up to its end. `None`: it stood still. Nothing that runs in it can make it do so, least of all
/// for minutes: that is the emulator's fault or its kernel's, which has been seen once in some hundred runs.
fn attempt(outer: &Outer<'_>, boot: &Boot<'_>) -> Option<String> {
    let (mut child, output) = outer.emulator.start(boot);
    let (to, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if to.send(String::from_utf8_lossy(&line).trim_end().to_string()).is_err() {
                return;
            }
        }
    });
    let mut patience = Patience::new(outer.limit);
    let mut silence = Patience::new(outer.silence);
    let mut seen = String::new();
    let stopped = loop {
        match lines.recv_timeout(STEP) {
            Ok(line) => {
                silence = Patience::new(outer.silence);
                if line == "@@ alive" {
                    continue;
                }
                if line.contains("@@ end") {
                    // It may not know how to switch itself off.
                    patience.shorten(Duration::from_secs(60));
                }
                let _ = writeln!(std::io::stdout(), "{line}");
                seen.push_str(&line);
                seen.push('\n');
            }
            Err(RecvTimeoutError::Disconnected) => break Stopped::Ended,
            Err(RecvTimeoutError::Timeout) if child.try_wait().expect("wait").is_some() => break Stopped::Ended,
            Err(RecvTimeoutError::Timeout) => {}
        }
        if !patience.lasts() {
            break Stopped::TooLate;
        }
        if !silence.lasts() {
            let registers = outer.emulator.registers(boot);
            eprintln!("NOTE: the outer guest stands still, attempt {} of {ATTEMPTS}:\n{registers}", boot.attempt);
            break Stopped::Silent;
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    if stopped == Stopped::Silent {
        return None;
    }
    let ended = seen.contains("@@ end");
    assert!(
        stopped == Stopped::Ended || ended,
        "the outer guest does not end within {} s:\n{seen}",
        outer.limit.as_secs()
    );
    assert!(ended, "the outer guest ended early:\n{seen}");
    Some(seen)
}

/// Runs test programs with filters, `(name, arguments)`, in the outer guest; all must pass.
fn pass(runs: &[(&str, &str)], limit: Duration) {
    pass_in(&Outer::new(limit), runs);
}

/// The same in an outer guest with more in it.
fn pass_in(outer: &Outer<'_>, runs: &[(&str, &str)]) {
    if !is_there(outer.emulator) {
        return;
    }
    let names: BTreeSet<&str> = runs.iter().map(|(name, _)| *name).collect();
    let programs = test_programs(&names.into_iter().collect::<Vec<_>>());
    let mut script = format!(
        "{}export XDG_CACHE_HOME=/var/cache\n{COMMAND} doctor --json >/tmp/doctor; echo \"{MARK} doctor exit=$?\"; cat /tmp/doctor\n",
        outer.before
    );
    if let Ok(moves) = std::env::var("TIGHTROPE_TEST_MOVES") {
        script.push_str(&format!("export TIGHTROPE_TEST_MOVES={}\n", moves.parse::<u32>().expect("a number")));
    }
    for (name, arguments) in runs {
        let program = programs[*name].display();
        let threads = if arguments.contains("--test-threads") { "" } else { "--test-threads=2" };
        let run = format!("{program} {threads} {arguments}");
        // What runs in a machine that is emulated, and gets little of a busy host, now and then waits for a timer that does not come. Whoever
        // looks for what is rare sets the variable.
        let again = match std::env::var_os("TIGHTROPE_TEST_ONCE") {
            None => format!("{run} || {{ echo \"{MARK} {name} failed once: again\"; {run}; }}"),
            Some(_) => run,
        };
        script.push_str(&format!("cd {}; {again}; echo \"{MARK} {name} exit=$?\"\n", env!("CARGO_MANIFEST_DIR")));
        for dir in [env!("CARGO_MANIFEST_DIR"), env!("CARGO_TARGET_TMPDIR")] {
            script.insert_str(0, &format!("mkdir -p {dir}\n"));
        }
    }
    let paths: Vec<&Path> = programs.values().map(PathBuf::as_path).collect();
    let seen = outer_guest(outer, &script, &paths);
    let exits: Vec<&str> = seen.lines().filter(|line| line.starts_with(MARK) && line.contains("exit=")).collect();
    assert_eq!(exits.len(), runs.len() + 1, "{exits:?}");
    assert!(exits.iter().all(|line| line.ends_with("exit=0")), "{exits:?}");
    assert!(!seen.contains("@@ failed"));
    seen.lines().filter(|line| line.contains("failed once: again")).for_each(|line| eprintln!("NOTE: {line}"));
}

/// Limits are used up while we run, not while the host stands still.
#[test]
fn time_that_stood_still_does_not_count() {
    let mut now = std::time::Instant::now();
    let mut patience = Patience::from(Duration::from_secs(10), now);
    let mut lasts_for = |seconds: u64| {
        now += Duration::from_secs(seconds);
        patience.lasts_at(now)
    };
    assert!((0..8).all(|_| lasts_for(1)), "eight seconds");
    assert!(lasts_for(3600), "one more");
    assert!(!lasts_for(1));
}

/// An outer guest from which nothing comes any more is booted again.
#[test]
fn an_outer_guest_that_stands_still() {
    if is_there(Emulator::Qemu) {
        let outer = Outer { silence: Duration::from_secs(60), ..Outer::new(LIMIT) };
        let script = "grep attempt=2 /proc/cmdline || { kill $ALIVE; sleep 1000; }\n";
        let seen = outer_guest(&outer, script, &[]);
        assert!(seen.contains("attempt=2") && !seen.contains("attempt=1"), "{seen}");
    }
}

/// The engine by itself, the tiny kernels, Debian to its shell and back: a minute.
#[test]
fn tiny_kernels_and_debian() {
    let debian = "boots_to_a_shell reboots";
    pass(&[("engine", ""), ("toys", ""), ("doctor", ""), ("footprint", ""), ("debian", debian)], LIMIT);
}

/// A VM moves from `kvm` to `bt` and back: a minute and a half, most of it because an emulated machine is slow to translate on.
#[test]
fn moves_between_engines() {
    pass(&[("moves", "")], LIMIT);
}

/// Two and more vCPUs (on one CPU of the emulated machine, so that they wait for each other): a minute and a half.
#[test]
fn several_vcpus() {
    pass(&[("debian", "several_vcpus_reboot"), ("paravirtual", ""), ("failures", "")], LIMIT);
}

/// What all whole-machine tests take, in one part of several.
const LONG_LIMIT: Duration = Duration::from_secs(3600);

#[test]
#[ignore = "takes many minutes"]
fn all_of_the_engine() {
    // Images are made without an engine.
    let errors = "--skip cache --skip first_run";
    let runs = [
        ("engine", ""),
        ("failures", ""),
        ("toys", ""),
        ("doctor", ""),
        ("terminal", ""),
        ("footprint", ""),
        ("paravirtual", ""),
        ("moves", ""),
        ("limits", ""),
        ("errors", errors),
    ];
    pass(&runs, LONG_LIMIT);
}

#[test]
#[ignore = "takes many minutes"]
fn all_of_debian() {
    let images = [("trixie", Flavour::Generic), ("bookworm", Flavour::Cloud)];
    let outer = Outer { images: &images, ..Outer::new(LONG_LIMIT) };
    // With 64 vCPUs on the outer guest's one CPU, nothing else gets far.
    let many = ("debian", "several_vcpus --test-threads=1");
    pass_in(&outer, &[("debian", "--skip several_vcpus"), many, ("network", ""), ("share", "")]);
}

#[test]
#[ignore = "takes many minutes"]
fn all_of_devices() {
    pass(&[("devices", ""), ("disks", ""), ("agent", "")], LONG_LIMIT);
}

/// What the monitor needs for itself, as users have it: built for release.
#[test]
#[ignore = "builds the command for release, which takes minutes"]
fn release_footprint() {
    if !is_there(Emulator::Qemu) {
        return;
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target directory");
    let mut cargo = cargo();
    cargo.args(["build", "--release", "--package", "tightrope", "--target-dir"]).arg(target);
    assert!(cargo.stdin(Stdio::null()).status().expect("cargo").success(), "the command cannot be built");
    let command = target.join("release/tightrope");
    let outer = Outer { command: &command, before: "export TIGHTROPE_TEST_RELEASE=1\n", ..Outer::new(LIMIT) };
    pass_in(&outer, &[("footprint", "--nocapture --test-threads=1")]);
}

/// Whole Debians to their prompts, with no failed unit, and off again.
#[test]
#[ignore = "takes many minutes, and needs the images: tightrope pull debian:12, tightrope pull debian:13"]
fn whole_systems() {
    if !is_there(Emulator::Qemu) {
        return;
    }
    let home = || std::env::home_dir().map(|home| home.join(".local/share"));
    let data = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from).or_else(home).expect("a home directory");
    let dir = tempfile::tempdir().expect("directory");
    let (store, disk) = (dir.path().join("store"), dir.path().join("disk"));
    std::fs::create_dir_all(store.join("tightrope")).expect("directory");
    let run = |command: &mut Command| assert!(command.status().is_ok_and(|status| status.success()), "{command:?}");
    let images = data.join("tightrope/images");
    run(Command::new("cp").args(["-r", "--sparse=always"]).arg(images).arg(store.join("tightrope")));
    let mke2fs = tool("mke2fs").expect("mke2fs (Debian package e2fsprogs)");
    run(Command::new(mke2fs).args(["-q", "-F", "-t", "ext4", "-d"]).arg(store).arg(&disk).arg("8G"));
    let before =
        "modprobe virtio_blk; modprobe ext4; mkdir /data; mount -t ext4 /dev/vda /data; export XDG_DATA_HOME=/data\n";
    let outer = Outer { before, disk: Some(&disk), ..Outer::new(LONG_LIMIT) };
    pass_in(&outer, &[("real_work", "--ignored --nocapture systemd_boots")]);
}

/// The same on a CPU of Intel's, with VT-x and extended page tables: the engine by itself, its failures, tiny kernels, and Debian to its shell.
#[test]
#[ignore = "needs Bochs, and takes half an hour"]
fn vt_x() {
    let before = "export TIGHTROPE_TEST_EMULATED=1\n";
    let silence = Duration::from_secs(900);
    let outer = Outer { emulator: Emulator::Bochs, before, silence, ..Outer::new(2 * LONG_LIMIT) };
    let runs = std::env::var("TIGHTROPE_NESTED");
    // Bochs 2.7 has no way out of a guest that spins with interrupts off, and none for single steps and breakpoints.
    let usual = "engine --skip steps --skip stopped_again; failures; toys --skip gdb --skip signal; debian boots_to_a_shell; moves are_not_lost";
    pass_in(&outer, &parse(runs.as_deref().unwrap_or(usual)));
}

/// `engine steps; debian boots` are two programs with arguments.
fn parse(runs: &str) -> Vec<(&str, &str)> {
    runs.split(';').filter_map(|run| run.trim().split_once(' ').or(Some((run.trim(), "")))).collect()
}

/// What `TIGHTROPE_NESTED` names, for whoever works on the engine.
#[test]
#[ignore = "runs what TIGHTROPE_NESTED names"]
fn chosen() {
    pass(&parse(&std::env::var("TIGHTROPE_NESTED").unwrap_or_default()), LONG_LIMIT);
}
