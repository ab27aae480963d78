//! Memory that goes back to the host, the clock, the watchdog, ports and windows.

mod common;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{Code, Kernel, PROMPT, Session, Vm, finish, run, tightrope, wait};

const MIB: u64 = 1 << 20;

/// What `tightrope balloon` says.
fn balloon(vm: &Vm, size: &[&str]) -> serde_json::Value {
    let done = finish(tightrope(&[&["balloon", "--json", &vm.id], size].concat()), b"");
    assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{done:?}");
    serde_json::from_str(&done.out).expect("JSON")
}

fn value(json: &serde_json::Value, name: &str) -> u64 {
    json[name].as_u64().unwrap_or_else(|| panic!("no {name} in {json}"))
}

#[test]
fn memory_goes_back_to_the_host() {
    let vm = Vm::start("memory", &["--memory", "512M"]);
    wait("the driver", || {
        let status = balloon(&vm, &[]);
        status["driver"] == 1 && status.get("guest-available").is_some()
    });
    let resident = || value(&balloon(&vm, &[]), "resident");
    // 240 MiB of files, removed: free pages are reported.
    assert_eq!(vm.sh("dd if=/dev/zero of=/big bs=1M count=240 2>/dev/null; sync").code(), Some(0));
    let full = resident();
    assert!(full > 240 * MIB, "{full}");
    assert_eq!(vm.sh("rm /big").code(), Some(0));
    wait("free pages", || resident() < full - 180 * MIB);
    let status = balloon(&vm, &[]);
    assert!(value(&status, "reported") >= 180 * MIB && value(&status, "actual") == 0, "{status}");

    // Filled again, then by the balloon: the files stay whole, and what is free goes.
    let check = "dd if=/dev/urandom of=/some bs=1M count=64 2>/dev/null; md5sum </some >/sum; \
                 dd if=/dev/zero of=/big bs=1M count=150 2>/dev/null; rm /big";
    assert_eq!(vm.sh(check).code(), Some(0));
    let status = balloon(&vm, &["200M"]);
    assert_eq!((value(&status, "target"), value(&status, "actual")), (312 * MIB, 312 * MIB), "{status}");
    assert!(value(&status, "resident") < 300 * MIB, "{status}");
    assert!(value(&status, "guest-free") < 150 * MIB, "{status}");
    assert_eq!(vm.sh("md5sum </some | cmp - /sum").code(), Some(0));
    let status = balloon(&vm, &["512M"]);
    assert_eq!(value(&status, "actual"), 0, "{status}");
    let again = "dd if=/dev/zero of=/big bs=1M count=150 2>/dev/null && md5sum </some | cmp - /sum";
    assert_eq!(vm.sh(again).code(), Some(0));

    let text = finish(tightrope(&["balloon", &vm.name]), b"");
    assert!(text.out.contains("512 MiB") && text.out.contains("resident"), "{}", text.out);
    let done = finish(tightrope(&["balloon", &vm.name, "513M"]), b"");
    assert!(done.code() == Some(1) && done.err.contains("has 512 MiB"), "{done:?}");
}

#[test]
fn a_guest_without_a_driver_keeps_its_memory() {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let name = format!("driverless-{}", std::process::id());
    let mut session = Session::start(kernel.run(&["--name", &name]));
    session.expect("up");
    let done = finish(tightrope(&["balloon", &name, "64M"]), b"");
    assert!(done.code() == Some(1) && done.err.contains("no driver"), "{done:?}");
    assert_eq!(done.err.lines().count(), 1);
    let done = finish(tightrope(&["balloon", &name]), b"");
    assert!(done.code() == Some(0) && done.out.contains("no driver"), "{done:?}");
    session.send(b"q");
    assert_eq!(session.finish().code(), Some(0));
}

#[test]
fn the_clock_is_the_hosts() {
    let vm = Vm::start("clock", &[]);
    let done = vm.sh("cat /sys/class/rtc/rtc0/since_epoch");
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let shown: u64 = done.out.trim().parse().unwrap_or_else(|_| panic!("{done:?}"));
    assert!(shown.abs_diff(now) <= 2, "{shown} at {now}");
}

/// Starts a watchdog of two seconds that nobody reloads.
const HANG: &[u8] = b"watchdog -T 2 -t 1000 /dev/watchdog\n";

#[test]
fn a_guest_that_hangs_is_switched_off() {
    let mut session = Session::start(run(&["--watchdog", "poweroff", "--net", "none"]));
    session.expect(PROMPT);
    // As long as it is reloaded it lives.
    session.send(b"watchdog -T 2 -t 1 /dev/watchdog; sleep 5; killall watchdog; echo alive-$?-\n");
    session.expect("alive-0-");
    session.send(HANG);
    let done = session.finish();
    assert_eq!(done.code(), Some(3), "{}", done.err);
    assert!(done.err.contains("the guest's watchdog ran out: it is switched off"), "{}", done.err);
}

#[test]
fn a_guest_that_hangs_is_reset() {
    let mut session = Session::start(run(&["--watchdog", "reset", "--net", "none"]));
    session.expect(PROMPT);
    session.send(b"echo status-$(cat /sys/class/watchdog/watchdog0/bootstatus)-\n");
    session.expect("status-0-");
    session.send(HANG);
    // It starts anew.
    session.expect("Debian's Linux");
    session.expect(PROMPT);
    session.send(b"echo status-$(cat /sys/class/watchdog/watchdog0/bootstatus)-\n");
    session.expect("status-32-");
    session.send(b"poweroff\n");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.err.contains("it is reset"), "{}", done.err);
}

#[test]
fn a_guest_that_hangs_gets_an_nmi_or_stops() {
    let mut session = Session::start(run(&["--watchdog", "nmi", "--net", "none"]));
    session.expect(PROMPT);
    session.send(b"echo 1 >/proc/sys/kernel/unknown_nmi_panic; echo 1 >/proc/sys/kernel/panic; watchdog -T 2 -t 1000 /dev/watchdog\n");
    session.expect("panic");
    session.kill();

    let name = format!("stopped-{}", std::process::id());
    let mut session = Session::start(run(&["--watchdog", "stop", "--name", &name, "--net", "none"]));
    session.expect(PROMPT);
    session.send(b"watchdog -T 2 -t 1000 /dev/watchdog; while :; do echo tick; sleep 0.1; done\n");
    session.expect("tick");
    let is_quiet = (0..20).any(|_| {
        let before = session.seen().len();
        session.watch(Duration::from_secs(3));
        session.seen().len() == before
    });
    assert!(is_quiet, "it runs on");
    assert_eq!(finish(tightrope(&["stop", "--force", &name]), b"").code(), Some(0));
    assert!(session.finish().err.contains("its vCPUs are stopped"));
}

#[test]
fn named_ports_carry_bytes_both_ways() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, file) = (dir.path().join("s"), dir.path().join("f"));
    let (chat, log) = (format!("org.test.chat=unix:{}", socket.display()), format!("log=file:{}", file.display()));
    let vm = Vm::start("ports", &["--port", &chat, "--port", &log]);
    assert_eq!(vm.sh("ls /dev/virtio-ports").out, "log\norg.test.chat\n");
    assert_eq!(vm.sh("seq 100000 >/dev/virtio-ports/log").code(), Some(0));
    let whole: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    wait("the file", || std::fs::read_to_string(&file).unwrap() == whole);

    // More than all buffers hold, to a reader who takes his time; then back.
    let mut stream = UnixStream::connect(&socket).unwrap();
    let mut child = vm.exec(&["sh", "-c", "seq 100000 >/dev/virtio-ports/org.test.chat"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let mut text = vec![0; whole.len()];
    stream.read_exact(&mut text).unwrap();
    assert!(text == whole.as_bytes());
    assert!(child.wait().unwrap().success());
    let mut child =
        vm.exec(&["sh", "-c", "head -n 100000 /dev/virtio-ports/org.test.chat | md5sum >/sum"]).spawn().unwrap();
    stream.write_all(whole.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(vm.sh("seq 100000 | md5sum | cmp - /sum").code(), Some(0));
    // Without a client the guest's reader sees the end of the file.
    drop(stream);
    wait("the end", || vm.sh("cat /dev/virtio-ports/org.test.chat").code() == Some(0));
}

#[test]
fn a_disk_in_use_becomes_larger() {
    let dir = tempfile::tempdir().unwrap();
    let disks = ["a.qcow2", "b.img"].map(|name| dir.path().join(name).display().to_string());
    for disk in &disks {
        assert_eq!(finish(tightrope(&["disk", "create", disk, "64M"]), b"").code(), Some(0));
    }
    let vm = Vm::start("larger", &["--disk", &disks[0], "--disk", &disks[1]]);
    assert_eq!(
        vm.sh("dd if=/dev/urandom of=/dev/vda bs=1M count=64 conv=fsync; md5sum </dev/vda >/sum").code(),
        Some(0)
    );
    for (disk, device) in disks.iter().zip(["vda", "vdb"]) {
        let done = finish(tightrope(&["disk", "resize", disk, "3G"]), b"");
        assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{done:?}");
        assert!(done.out.contains(&vm.name), "{}", done.out);
        let size = format!("cat /sys/block/{device}/size");
        wait("the new size", || vm.sh(&size).out.trim() == (3 * 2048 * 1024).to_string());
        let less = finish(tightrope(&["disk", "resize", "--shrink", disk, "1G"]), b"");
        assert!(less.code() == Some(1) && less.err.contains("only become larger"), "{less:?}");
    }
    // Old and new bytes, and the image as a whole.
    let check = "dd if=/dev/vda bs=1M count=64 2>/dev/null | md5sum | cmp - /sum && echo end | dd of=/dev/vda bs=1M seek=3000 conv=fsync && \
                 dd if=/dev/vda bs=1M skip=3000 count=1 | head -c 4";
    assert_eq!(vm.sh(check).out, "end\n");
    drop(vm);
    wait("the end", || finish(tightrope(&["disk", "check", &disks[0]]), b"").out.starts_with("no errors"));
    let info = finish(tightrope(&["disk", "info", "--json", &disks[0]]), b"");
    assert!(info.out.contains(&format!("\"size\":{}", 3_u64 << 30)), "{}", info.out);
}
