//! `tightrope doctor` and the choice of the engine, through the whole command: what this host has, and a user who may not open `/dev/kvm`.

mod common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;

use common::{Code, Finished, Kernel, engine, finish, left_out, tightrope};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

fn report(done: &Finished) -> serde_json::Value {
    serde_json::from_str(&done.out).unwrap_or_else(|error| panic!("{error}: {done:?}"))
}

/// What it says of the thing `name`.
fn check<'a>(report: &'a serde_json::Value, name: &str) -> &'a serde_json::Value {
    let checks = report["checks"].as_array().expect("checks");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("nothing of {name}"))
}

#[test]
fn what_this_host_can_do() {
    let done = finish(tightrope(&["doctor", "--json"]), b"");
    let report = report(&done);
    for name in [
        "kvm",
        "bt",
        "direct",
        "cpu",
        "fsgsbase",
        "memory",
        "addresses",
        "mappings",
        "threads",
        "huge pages",
        "landlock",
        "seccomp",
        "namespaces",
        "image",
        "network",
    ] {
        let check = check(&report, name);
        assert!(check["found"].as_str().is_some_and(|text| !text.is_empty()), "{check}");
        // What could be better is said with what to change, except where the finding says it.
        assert!(["good", "limited", "bad"].contains(&check["verdict"].as_str().unwrap_or_default()), "{check}");
    }
    // Tests run where VMs do.
    assert_eq!((done.code(), report["verdict"] != "bad"), (Some(0), true), "{report}");
    if engine() == "kvm" {
        assert_eq!(report["engine"], "kvm");
        assert!(check(&report, "kvm")["found"].as_str().is_some_and(|text| text.contains("a 64-bit test guest ran")));
        assert_eq!(report["kvm"]["eventfds"], true);
    }
    let text = finish(tightrope(&["doctor"]), b"");
    let last = text.out.lines().last().unwrap_or_default();
    assert_eq!(text.code(), Some(0));
    assert_eq!(last, format!("Virtual machines run here, by engine {}.", report["engine"].as_str().unwrap()));
}

/// The first line says which engine was taken, and why.
#[test]
fn the_engine_is_chosen() {
    let kernel = Kernel::new(Code::new().print("up").power_off());
    let chosen = |options: &[&str]| {
        let done = finish(tightrope(&[&["run", "--kernel", &kernel.path], options].concat()), b"");
        assert_eq!((done.code(), done.out.as_str()), (Some(0), "up"), "{done:?}");
        done.err.lines().next().unwrap_or_default().to_owned()
    };
    let line = chosen(&["--engine", "auto"]);
    let kvm = line == "tightrope: engine kvm: this host runs 64-bit guests by hardware";
    assert!(kvm || engine() != "kvm" && line.starts_with("tightrope: engine bt: "), "{line}");
    assert_eq!(chosen(&[]), line, "it is the default");
    if engine() == "kvm" {
        assert_eq!(chosen(&["--engine", "kvm"]), "tightrope: engine kvm: asked for");
        assert_eq!(chosen(&["--engine", "bt"]), "tightrope: engine bt: asked for");
    }
}

/// Root takes the place of a user who may not open the device; elsewhere it is left out.
#[test]
fn without_permission() {
    const NOBODY: u32 = 65534;
    let closed = std::fs::metadata("/dev/kvm").is_ok_and(|device| device.mode() & 0o006 == 0 && device.gid() != NOBODY);
    if !closed || !rustix::process::geteuid().is_root() {
        left_out("there is no /dev/kvm that others may not open, or this is not root");
        return;
    }
    let kernel = Kernel::new(Code::new().print("up").power_off());
    let set = |path: &std::path::Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    set(kernel.dir.path(), 0o755);
    let program = kernel.dir.path().join("tightrope");
    std::fs::copy(env!("CARGO_BIN_EXE_tightrope"), &program).unwrap();
    set(&program, 0o755);
    let as_nobody = |args: &[&str]| {
        let mut command = Command::new(&program);
        command.args(args).uid(NOBODY).gid(NOBODY).current_dir("/").env_clear().env("XDG_CONFIG_HOME", "/nonexistent");
        finish(command, b"")
    };
    let run = |engine: &str| as_nobody(&["run", "--kernel", &kernel.path, "--engine", engine]);
    let remedy = |text: &str| text.contains("usermod -aG") || text.contains("udev rule");

    let done = run("kvm");
    assert_eq!((done.code(), done.err.lines().count()), (Some(1), 1), "{done:?}");
    assert!(done.err.contains("this user may not open it") && remedy(&done.err), "{done:?}");
    let done = run("auto");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), "up"), "{done:?}");
    assert!(done.err.contains("engine bt: /dev/kvm is there, but") && remedy(&done.err), "{done:?}");
    let done = as_nobody(&["doctor", "--json"]);
    assert_eq!(done.code(), Some(0), "{done:?}");
    let report = report(&done);
    assert_eq!((&report["engine"], &check(&report, "kvm")["verdict"]), (&"bt".into(), &"limited".into()));
    assert!(remedy(check(&report, "kvm")["remedy"].as_str().unwrap_or_default()), "{report}");
}

/// In a container whose own filter forbids what the monitor's sandbox needs no VM starts; both say so.
#[test]
fn no_filters_allowed() {
    let done = without(libc::SYS_seccomp, &["doctor"]);
    assert_eq!(done.code(), Some(1), "{done:?}");
    assert!(done.out.contains("BAD      seccomp       no filters can be set: Operation not permitted\n"), "{done:?}");
    assert_eq!(done.out.lines().last(), Some("Virtual machines do not run here."), "{done:?}");
    let report = report(&without(libc::SYS_seccomp, &["doctor", "--json"]));
    assert_eq!((&report["verdict"], &check(&report, "seccomp")["verdict"]), (&"bad".into(), &"bad".into()));
}

/// A thread that the host does not give is a finding, no internal error.
#[test]
fn no_threads() {
    let done = without(libc::SYS_clone3, &["doctor", "--json"]);
    assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{done:?}");
}

/// Runs the command where this system call fails with "Operation not permitted".
fn without(call: i64, args: &[&str]) -> Finished {
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new([(call, vec![])].into(), SeccompAction::Allow, refused, TargetArch::x86_64);
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    let mut command = tightrope(args);
    // SAFETY: only system calls are made between fork and exec.
    unsafe { command.pre_exec(move || seccompiler::apply_filter(&program).map_err(std::io::Error::other)) };
    finish(command, b"")
}
