//! The default image, unmodified Debian, through the whole command. Fetches it if the cache has none.

mod common;

use common::{COMPLAINTS, PROMPT, Session, finish, run};
use image::Flavour;

#[test]
fn boots_to_a_shell_and_switches_off() {
    let mut session = Session::start(run(&["--stats=json"]));
    session.expect(PROMPT);
    // The entropy device gives what is asked of it, and is the one that the kernel takes.
    session.send(b"cat /sys/class/misc/hw_random/rng_current; head -c 999 /dev/hwrng | wc -c\n");
    session.expect("virtio_rng.0\r\n999\r\n");
    session.send(b"uname -a; poweroff -f\n");
    session.expect("GNU/Linux");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.err.contains("shell after "), "{}", done.err);
}

/// The whole boot, each block also by the interpreter: some ten times as long.
#[test]
fn boots_in_lockstep() {
    if common::engine() != "bt" {
        return;
    }
    let done = finish(run(&["--lockstep", "--stats=json"]), b"uname -a; poweroff\n");
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.out.contains("GNU/Linux"), "{}", done.out);
    let json: serde_json::Value = serde_json::from_str(done.err.lines().last().unwrap_or_default()).unwrap();
    let [compared, impossible] =
        ["lockstep.compared", "lockstep.impossible"].map(|name| json["counters"][name].as_u64());
    assert!(compared > Some(100_000) && impossible < Some(1_000), "{compared:?} compared, {impossible:?} impossible");
}

/// With nothing that makes the translator fast but the translator itself; and computing for long does not run directly then.
#[test]
fn boots_without_optimizations() {
    if common::engine() != "bt" {
        return;
    }
    let without = ["--without", "direct,tiers,transitions,tables", "--stats=json"];
    let done = finish(run(&without), b"i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done; echo $((i+1)); poweroff\n");
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(done.out.contains("300001"), "{}", done.out);
    let json: serde_json::Value = serde_json::from_str(done.err.lines().last().unwrap_or_default()).unwrap();
    assert_eq!(json["counters"]["direct.chosen"].as_u64(), None, "{}", json["counters"]);
}

#[test]
fn a_script_by_pipe() {
    let input = b"echo $((6*7))0; for i in 1 2 3; do echo line-$i; done; poweroff\n";
    let done = finish(run(&[]), input);
    assert_eq!(done.code(), Some(0), "{}", done.err);
    for part in ["420", "line-1\r\nline-2\r\nline-3"] {
        assert!(done.out.contains(part), "{part} is missing in {}", done.out);
    }
}

#[test]
fn reboots() {
    let mut session = Session::start(run(&[]));
    for _ in 0..2 {
        session.expect(PROMPT);
        session.send(b"reboot\n");
        // Behind the command, the shell prints its prompt once more.
        session.expect("Restarting system");
    }
    session.expect(PROMPT);
    session.send(b"poweroff\n");
    assert_eq!(session.finish().code(), Some(0));
}

#[test]
fn disks_are_read_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let make = |name: &str, fill: u8| {
        let path = dir.path().join(name);
        std::fs::write(&path, vec![fill; 8 << 20]).unwrap();
        path
    };
    let (writable, read_only) = (make("a", b'A'), make("b", b'B'));
    let mut session = Session::start(run(&[
        "--disk",
        &writable.display().to_string(),
        "--disk",
        &format!("{},ro", read_only.display()),
    ]));
    session.expect(PROMPT);
    session.send(b"head -c 4 /dev/vda; echo; head -c 4 /dev/vdb; echo\n");
    session.expect("AAAA\r\nBBBB\r\n");
    session
        .send(b"printf written | dd of=/dev/vda bs=512 seek=100 conv=sync,notrunc 2>/dev/null; sync; echo $?-done\n");
    session.expect("0-done");
    session.send(b"printf no | dd of=/dev/vdb conv=sync,fsync 2>&1 | grep -ci -e error -e permitted; poweroff\n");
    session.expect("1\r\n");
    assert_eq!(session.finish().code(), Some(0));
    let bytes = std::fs::read(&writable).unwrap();
    assert_eq!(&bytes[100 * 512..100 * 512 + 8], b"written\0");
    assert_eq!(bytes[0], b'A');
    assert!(std::fs::read(&read_only).unwrap().iter().all(|&byte| byte == b'B'));
}

#[test]
fn a_kernel_panic_is_seen() {
    let mut session = Session::start(run(&["--append", "panic=-1"]));
    session.expect(PROMPT);
    session.send(b"echo c >/proc/sysrq-trigger\n");
    session.expect("Kernel panic");
    session.expect(PROMPT); // panic=-1 reboots at once
    session.send(b"poweroff -f\n");
    assert_eq!(session.finish().code(), Some(0));
}

#[test]
fn a_virtio_console() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("hvc0");
    let mut session = Session::start(run(&["--virtio-console", &format!("unix:{}", path.display())]));
    session.expect(PROMPT);
    let mut other = std::os::unix::net::UnixStream::connect(&path).unwrap();
    other.set_read_timeout(Some(common::LIMIT)).unwrap();
    // What comes while nobody has the terminal open is thrown away by the guest.
    session.send(b"exec 3<>/dev/hvc0; echo to-the-host >&3; read line <&3; echo got-$line-$?\n");
    let mut seen = [0; 11];
    other.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"to-the-host");
    other.write_all(b"from-the-host\n").unwrap();
    session.expect("got-from-the-host-0");
    session.send(b"poweroff\n");
    assert_eq!(session.finish().code(), Some(0));
}

/// Boots another of Debian's stock kernels, with an initramfs made for it, to the shell and off again.
fn stock_kernel(suite: &str, flavour: Flavour, version: &str) {
    let options = image::Options { progress: image::Progress::Quiet, ..image::Options::default() };
    let image = image::default_image(suite, flavour, &options).unwrap_or_else(|error| panic!("{error}"));
    let started = std::time::Instant::now();
    let (kernel, initrd) = (image.kernel.display().to_string(), image.initrd.display().to_string());
    let append = format!("{} quiet", image.cmdline);
    let mut session = Session::start(run(&["--kernel", &kernel, "--initrd", &initrd, "--append", &append]));
    session.expect(PROMPT);
    println!("{suite} {flavour}: shell after {:.1} s", started.elapsed().as_secs_f64());
    session.send(b"uname -r; poweroff\n");
    session.expect(&format!("\n{version}."));
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
}

#[test]
fn generic_kernel_of_debian_13() {
    stock_kernel("trixie", Flavour::Generic, "6.12");
}

#[test]
fn cloud_kernel_of_debian_12() {
    stock_kernel("bookworm", Flavour::Cloud, "6.1");
}

#[test]
#[ignore = "fetches some 70 MB for this test alone"]
fn generic_kernel_of_debian_12() {
    stock_kernel("bookworm", Flavour::Generic, "6.1");
}

/// All vCPUs come up, do work together with right results, and are stopped by the power-off.
#[test]
fn several_vcpus() {
    if common::engine() == "interp" {
        return;
    }
    for cpus in ["2", "4", "8", "64"] {
        // Each process hashes the same bytes; then all are to be found equal.
        let input = format!(
            "nproc; cat /proc/cpuinfo | grep -c ^processor; {COMPLAINTS}\n\
             for i in $(seq {cpus}) 1 2 3 4; do (seq 3000 | sha256sum > /tmp/sum.$i) & done; wait\n\
             cat /tmp/sum.* | sort -u | wc -l; echo sums-checked\n"
        );
        let mut session = Session::start(run(&["--cpus", cpus, "--memory", "1G"]));
        session.expect(PROMPT);
        session.send(input.as_bytes());
        // Not switched off before: the guest throws away what is still on its way to the console.
        session.expect("\n1\r\nsums-checked");
        session.send(b"poweroff\n");
        let done = session.finish();
        assert_eq!(done.code(), Some(0), "{cpus}: {}\n{}", done.out, done.err);
        let wanted = format!("\r\n{cpus}\r\n{cpus}\r\n0\r\n");
        assert!(done.out.contains(&wanted), "{cpus}: {}", done.out);
        assert!(done.out.contains("\n1\r\nsums-checked"), "{cpus}: {}", done.out);
    }
}

/// The CPU in AMD's form, which engine `kvm` shows where the host's is one.
#[test]
fn a_cpu_of_amd() {
    let amd = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes() == *b"Auth";
    if common::engine() == "interp" || common::engine() == "kvm" && !amd {
        return;
    }
    let input = format!("grep -c AuthenticAMD /proc/cpuinfo; {COMPLAINTS}; echo looked; poweroff\n");
    let done = finish(run(&["--cpu-vendor", "amd", "--cpus", "2"]), input.as_bytes());
    assert_eq!(done.code(), Some(0), "{}\n{}", done.out, done.err);
    assert!(done.out.contains("\r\n2\r\n0\r\nlooked"), "{}", done.out);
}

/// A reset and a crash stop all vCPUs, and NMIs reach those that run.
#[test]
fn several_vcpus_reboot_and_crash() {
    if common::engine() == "interp" {
        return;
    }
    let mut session = Session::start(run(&["--cpus", "2"]));
    session.expect(PROMPT);
    session.send(b"reboot\n");
    // Behind the command, the shell prints its prompt once more.
    session.expect("Restarting system");
    session.expect(PROMPT);
    session.send(b"echo l > /proc/sysrq-trigger; dmesg | grep -c 'NMI backtrace for cpu'; echo traced\n");
    session.expect("2\r\ntraced");
    session.send(b"echo 1 > /proc/sys/kernel/panic; echo c > /proc/sysrq-trigger\n");
    // What the kernel says before may stand in the middle of the command's echo.
    session.expect("Rebooting in");
    session.expect(PROMPT);
    session.send(b"nproc; poweroff\n");
    session.expect("2\r\n");
    assert_eq!(session.finish().code(), Some(0));
}
