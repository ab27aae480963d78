//! Bad input: one clear line that names the thing and the remedy, and the right exit code.

mod common;

use std::path::{Path, PathBuf};
use std::process::Command;

use common::{Code, Finished, Kernel, finish, run, tightrope};

/// Checks that the command fails with `code` and one line that has all of `parts`.
fn check(done: &Finished, code: i32, parts: &[&str]) {
    let lines: Vec<&str> = done.err.lines().collect();
    assert_eq!(done.code(), Some(code), "{done:?}");
    assert_eq!(lines.len(), 1, "{}", done.err);
    assert!(lines[0].starts_with("tightrope: "), "{}", done.err);
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is missing in {}", done.err);
    }
    assert!(!done.err.contains("os error"), "{}", done.err);
}

fn fails(args: &[&str], code: i32, parts: &[&str]) {
    check(&finish(tightrope(args), b""), code, parts);
}

#[test]
fn wrong_usage_is_exit_code_2() {
    fails(&["rnu"], 2, &["'rnu'", "--help"]);
    fails(&["run", "--cpus", "0"], 2, &["--cpus", "1..=64"]);
    fails(&["run", "--cpus", "65"], 2, &["--cpus", "1..=64"]);
    fails(&["run", "--memory", "12"], 2, &["--memory", "32 MiB"]);
    fails(&["run", "--memory", "1X"], 2, &["--memory", "512M"]);
    fails(&["run", "--engine", "xen"], 2, &["'xen'", "auto, bt, kvm or interp"]);
    fails(&["run", "--without", "tiers,magic"], 2, &["'magic'", "direct, tiers, transitions and tables"]);
    fails(&["run", "--initrd", "x"], 2, &["--kernel"]);
    fails(&["run", "--disk", "a,cow"], 2, &["'cow'", "ro, "]);
    fails(&["run", "--gdb", "everywhere"], 2, &["--gdb", "PORT"]);
    fails(&["run", "--trace", "everything"], 2, &["int, exits, blocks, tlb"]);
    fails(&["run", "--serial", "modem"], 2, &["stdio, none, pty"]);
    fails(&["run", "--watchdog", "bark"], 2, &["'bark'", "reset, poweroff, nmi, stop or none"]);
    fails(&["run", "--port", "a/b=pty"], 2, &["'a/b'", "letters"]);
    fails(&["run", "--port", "a=stdio"], 2, &["'stdio'", "unix:PATH, file:PATH or pty"]);
    fails(&["run", "--net", "bridge"], 2, &["'bridge'", "user, none, tap:NAME or socket:PATH"]);
    fails(&["run", "--net", "user,speed=1"], 2, &["'speed=1'", "isolated, host=off, rate=BITS"]);
    fails(&["run", "-p", "80"], 2, &["'80'", "8080:80"]);
    fails(&["completions", "tcsh"], 2, &["tcsh"]);
}

#[test]
fn help_version_completions_man() {
    for args in [&["--help"][..], &["run", "--help"], &["--version"], &["completions", "bash"], &["man"]] {
        let done = finish(tightrope(args), b"");
        assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{args:?}");
        assert!(!done.out.is_empty());
    }
    assert!(finish(tightrope(&["run", "--help"]), b"").out.contains("Examples:"));
}

#[test]
fn kernels_that_are_none() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.display().to_string()
    };
    let kernel =
        |path: &str, parts: &[&str]| check(&finish(run(&["--kernel", path]), b""), 1, &[parts, &[path]].concat());
    kernel("/nonexistent/vmlinuz", &["does not exist"]);
    kernel(&dir.path().display().to_string(), &["is a directory"]);
    kernel("/dev/null", &["neither a file nor"]);
    kernel(&file("empty", b""), &["is empty"]);
    kernel(&file("text", b"#!/bin/sh\n"), &["not a kernel"]);
    kernel(&file("gz", &[0x1f, 0x8b, 8, 0, 0]), &["gzip"]);
    let mut arm = vec![0; 4096];
    arm[0x38..0x3c].copy_from_slice(b"ARMd");
    kernel(&file("arm64", &arm), &["64-bit ARM", "x86-64"]);
    let whole = std::fs::read(Code::new().power_off().write(dir.path())).unwrap();
    kernel(&file("cut", &whole[..whole.len() - 3]), &["cut off"]);
    let mut elf = whole.clone();
    elf[18] = 183;
    kernel(&file("elf-arm", &elf), &["64-bit ARM"]);
    let mut bzimage = vec![0; 8192];
    bzimage[0x1f1] = 1;
    bzimage[0x1f4] = 0xff;
    bzimage[0x1f5] = 0xff;
    bzimage[0x202..0x206].copy_from_slice(b"HdrS");
    bzimage[0x206] = 0x0f;
    bzimage[0x207] = 2;
    bzimage[0x236] = 1;
    kernel(&file("bz", &bzimage), &["cut off"]);
    // A header that promises what is not there: the loader must say so, not crash.
    bzimage[0x1f4] = 0x10;
    bzimage[0x1f5] = 0;
    let done = finish(run(&["--kernel", &file("hostile", &bzimage)]), b"");
    assert_eq!(done.code(), Some(1), "{done:?}");
}

#[test]
fn ports_that_cannot_be() {
    let kernel = Kernel::new(Code::new().power_off());
    let ports = |args: &[&str], parts: &[&str]| check(&finish(kernel.run(args), b""), 1, parts);
    ports(&["--port", "a=pty", "--port", "a=file:/dev/null"], &["two ports named a"]);
    ports(&["--port", "a=file:/nonexistent/file"], &["/nonexistent/file", "No such"]);
    let taken = kernel.dir.path().join("taken");
    std::fs::write(&taken, b"").unwrap();
    ports(&["--port", &format!("a=unix:{}", taken.display())], &["in use", "another path"]);
}

#[test]
fn an_unreadable_kernel() {
    use std::os::unix::fs::PermissionsExt;
    if rustix::process::geteuid().is_root() {
        eprintln!("root may read everything: skipped");
        return;
    }
    let kernel = Kernel::new(Code::new().power_off());
    std::fs::set_permissions(&kernel.path, std::fs::Permissions::from_mode(0o000)).unwrap();
    check(&finish(kernel.run(&[]), b""), 1, &["permissions"]);
}

#[test]
fn initrds_that_are_none() {
    let kernel = Kernel::new(Code::new().power_off());
    let initrd = |bytes: &[u8], parts: &[&str]| {
        let path = kernel.dir.path().join("initrd");
        std::fs::write(&path, bytes).unwrap();
        check(&finish(kernel.run(&["--initrd", &path.display().to_string()]), b""), 1, parts);
    };
    initrd(b"", &["initrd", "is empty"]);
    initrd(b"hello", &["not an initramfs"]);
    initrd(b"070701000000", &["cut off"]);
    check(&finish(kernel.run(&["--initrd", "/nonexistent"]), b""), 1, &["/nonexistent", "does not exist"]);
}

#[test]
fn disks_that_are_none() {
    let kernel = Kernel::new(Code::new().power_off());
    let disk = |name: &str, parts: &[&str]| check(&finish(kernel.run(&["--disk", name]), b""), 1, parts);
    let path = kernel.dir.path().join("disk");
    let name = path.display().to_string();
    disk(&name, &[&name, "check the path"]);
    disk(&kernel.dir.path().display().to_string(), &["a directory"]);
    std::fs::write(&path, b"").unwrap();
    disk(&name, &["smaller than one sector"]);
    let mut qcow = vec![0; 1024];
    qcow[..4].copy_from_slice(b"QFI\xfb");
    std::fs::write(&path, &qcow).unwrap();
    disk(&name, &["starts like a qcow2", "format=qcow2"]);
    disk(&format!("{name},format=qcow2"), &[&name, "version 0"]);
    // The same disk twice in one VM.
    std::fs::write(&path, [0; 1024]).unwrap();
    check(&finish(kernel.run(&["--disk", &name, "--disk", &name]), b""), 1, &[&name, "in use"]);
}

#[test]
fn a_disk_of_another_vm() {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let path = kernel.dir.path().join("disk");
    std::fs::write(&path, [0; 1024]).unwrap();
    let name = path.display().to_string();
    let mut first = common::Session::start(kernel.run(&["--disk", &name]));
    first.expect("up");
    check(&finish(kernel.run(&["--disk", &name]), b""), 1, &[&name, "in use by another VM"]);
    first.send(b"q");
    assert_eq!(first.finish().code(), Some(0));
    assert_eq!(finish(kernel.run(&["--disk", &name]), b"q").code(), Some(0));
}

#[test]
fn engines_that_are_not_there() {
    let kernel = Kernel::new(Code::new().power_off());
    let kvm = finish(tightrope(&["run", "--kernel", &kernel.path, "--engine", "kvm"]), b"");
    if kvm.code() != Some(0) {
        check(&kvm, 1, &["engine kvm", "kvm", "--engine bt"]);
    }
    for option in [&["--engine", "interp"][..], &["--lockstep"]] {
        let arguments = [&["run", "--kernel", &kernel.path, "--cpus", "2"], option].concat();
        fails(&arguments, 1, &["one vCPU", "--cpus"]);
    }
}

#[test]
fn more_memory_than_there_is_and_less_than_is_needed() {
    let kernel = Kernel::new(Code::new().power_off());
    // Sparse: a file that does not fit beside a kernel into 32 MiB.
    let initrd = kernel.dir.path().join("initrd");
    let mut bytes = vec![0; 64 << 20];
    let header = b"070701";
    bytes[..6].copy_from_slice(header);
    let fields = [0, 0o100644, 0, 0, 1, 0, (60 << 20), 0, 0, 0, 0, 2, 0];
    for (i, field) in fields.iter().enumerate() {
        bytes[6 + i * 8..14 + i * 8].copy_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes[110] = b'x';
    let trailer_at = 112 + (60 << 20);
    bytes[trailer_at..trailer_at + 6].copy_from_slice(header);
    for i in 0..13 {
        let field = if i == 11 { 11 } else { 0 };
        bytes[trailer_at + 6 + i * 8..trailer_at + 14 + i * 8].copy_from_slice(format!("{field:08x}").as_bytes());
    }
    bytes[trailer_at + 110..trailer_at + 120].copy_from_slice(b"TRAILER!!!");
    std::fs::write(&initrd, bytes).unwrap();
    let name = initrd.display().to_string();
    let done = finish(kernel.run(&["--initrd", &name, "--memory", "32M"]), b"");
    assert_eq!(done.code(), Some(1), "{}", done.err);
    assert!(done.err.contains("--memory"), "{}", done.err);
    let done = finish(kernel.run(&["--initrd", &name, "--memory", "256M"]), b"");
    assert_eq!(done.code(), Some(0), "{}", done.err);
}

#[test]
fn a_configuration_file_with_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("tightrope")).unwrap();
    let file = dir.path().join("tightrope/config.toml");
    std::fs::write(&file, "memory = \"much\"\n").unwrap();
    let mut command = tightrope(&["run"]);
    command.env("XDG_CONFIG_HOME", dir.path());
    check(&finish(command, b""), 1, &["config.toml", "memory", "512M"]);
}

#[test]
fn no_network_at_the_first_run() {
    let cache = tempfile::tempdir().unwrap();
    let mut command = tightrope(&["run", "--mirror", "http://127.0.0.1:9/debian"]);
    command.env("XDG_CACHE_HOME", cache.path());
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    check(&finish(command, b""), 1, &["127.0.0.1:9", "--mirror"]);
}

/// A cache with the default image of the user's own, which is fetched if need be; packages are shared.
fn copy_of_the_cache() -> tempfile::TempDir {
    let done = finish(run(&[]), b"poweroff -f\n");
    assert_eq!(done.code(), Some(0), "{}", done.err);
    let home = || PathBuf::from(std::env::var_os("HOME").expect("a home directory")).join(".cache");
    let from = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from).join("tightrope");
    let copy = tempfile::tempdir().unwrap();
    let to = copy.path().join("tightrope");
    let record = std::fs::read(from.join("images/trixie-cloud.json")).unwrap();
    let key: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let image = PathBuf::from("images").join(key["key"].as_str().unwrap());
    std::fs::create_dir_all(to.join(&image)).unwrap();
    std::fs::write(to.join("images/trixie-cloud.json"), record).unwrap();
    for entry in std::fs::read_dir(from.join(&image)).unwrap() {
        let name = entry.unwrap().file_name();
        std::fs::copy(from.join(&image).join(&name), to.join(&image).join(&name)).unwrap();
    }
    std::os::unix::fs::symlink(from.join("packages"), to.join("packages")).unwrap();
    copy
}

/// The file of that name in the cache's image.
fn in_image(cache: &Path, name: &str) -> PathBuf {
    let mut entries = std::fs::read_dir(cache.join("tightrope/images")).unwrap();
    let found = entries.find_map(|entry| Some(entry.unwrap().path().join(name)).filter(|path| path.is_file()));
    found.unwrap_or_else(|| panic!("no {name} in the cache"))
}

/// Runs the default image from this cache, where no mirror can be reached.
fn run_from(cache: &Path) -> Finished {
    let mut command = run(&["--mirror", "http://127.0.0.1:9/debian"]);
    command.env("XDG_CACHE_HOME", cache);
    for proxy in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(proxy);
    }
    finish(command, b"echo $((6*7))-up; poweroff -f\n")
}

#[test]
fn a_damaged_image_in_the_cache_is_made_anew_without_network() {
    let cache = copy_of_the_cache();
    for name in ["vmlinuz", "initrd.cpio", "vmlinux"] {
        let file = std::fs::File::options().write(true).open(in_image(cache.path(), name)).unwrap();
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let done = run_from(cache.path());
        assert!(done.code() == Some(0) && done.out.contains("42-up"), "{name}: {done:?}");
    }
    // With the packages gone too, it cannot be made.
    std::fs::write(in_image(cache.path(), "vmlinuz"), "short").unwrap();
    std::fs::remove_file(cache.path().join("tightrope/packages")).unwrap();
    check(&run_from(cache.path()), 1, &["127.0.0.1:9", "--mirror"]);
}

#[test]
fn a_full_disk_under_the_cache() {
    let cache = copy_of_the_cache();
    let image = in_image(cache.path(), "vmlinuz").parent().unwrap().to_path_buf();
    // The packages are there, the image is not, and there is no room for it.
    std::fs::remove_dir_all(&image).unwrap();
    std::fs::create_dir(&image).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "tightrope-test"]).arg(&image).output();
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("a small file system cannot be mounted here (root only): skipped");
        return;
    }
    let done = run_from(cache.path());
    assert!(Command::new("umount").arg(&image).status().unwrap().success());
    check(&done, 1, &["no space left", "XDG_CACHE_HOME"]);
}

#[test]
fn sockets_and_files_that_cannot_be_had() {
    let kernel = Kernel::new(Code::new().power_off());
    let socket = kernel.dir.path().join("socket");
    let _taken = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let place = format!("unix:{}", socket.display());
    check(&finish(kernel.run(&["--serial", &place]), b""), 1, &["console socket", "in use"]);
    check(&finish(kernel.run(&["--gdb", &place]), b""), 1, &["gdb socket", "in use"]);
    check(&finish(kernel.run(&["--serial", "file:/nonexistent/x"]), b""), 1, &["/nonexistent/x"]);
    check(&finish(kernel.run(&["--trace", "exits:/nonexistent/x"]), b""), 1, &["trace file", "/nonexistent/x"]);
    let pipe = kernel.dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, rustix::fs::Mode::RWXU).unwrap();
    let trace = format!("exits:{}", pipe.display());
    check(&finish(kernel.run(&["--trace", &trace]), b""), 1, &["trace file", "nobody reads"]);
    let console = format!("file:{}", pipe.display());
    check(&finish(kernel.run(&["--serial", &console]), b""), 1, &["console output", "nobody reads"]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = port.local_addr().unwrap().to_string();
    check(&finish(kernel.run(&["--virtio-console", "stdio"]), b""), 1, &["two consoles", "--serial none"]);
    check(&finish(kernel.run(&["--gdb", &address]), b""), 1, &[&address, "another port"]);
}

#[test]
fn networks_that_cannot_be() {
    let kernel = Kernel::new(Code::new().power_off());
    let fails = |args: &[&str], parts: &[&str]| check(&finish(kernel.run(args), b""), 1, parts);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    fails(&["-p", &format!("{port}:80")], &[&format!("TCP port {port} of 127.0.0.1 is in use"), "-p"]);
    let taken = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    fails(&["-p", &format!("{port}:80/udp")], &[&format!("UDP port {port}"), "in use"]);
    fails(&["-p", "192.0.2.250:0:80"], &["192.0.2.250 is no address of this host"]);
    fails(&["--net", "none", "-p", "0:80"], &["-p", "--net user"]);
    fails(&["--net", "tap:no-such"], &["TAP device no-such", "there is no such device", "ip tuntap add no-such"]);
    fails(&["--net", "tap:lo"], &["TAP device lo"]);
    fails(&["--net", "socket:/nonexistent/s"], &["/nonexistent/s", "does not exist", "start its other end"]);
    fails(&["--net", "socket:/nonexistent/s,listen"], &["/nonexistent/s", "directory does not exist"]);
}
