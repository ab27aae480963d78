//! What does not go as it should in a day's work: one line that names the thing and the remedy, nothing lost, nothing left behind. Wrong
//! arguments and files are in `errors.rs`; what concerns one part alone is in that part's own tests. `docs/real-work.md` has the whole list.

mod common;

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Code, Finished, Kernel, PROMPT, Session, Vm, done, engine, finish, tightrope, wait};
use rustix::process::{Pid, Signal, kill_process};

const PROGRAM: &str = env!("CARGO_BIN_EXE_tightrope");

/// One line, with all of `parts`.
fn fails(done: &Finished, code: i32, parts: &[&str]) {
    assert_eq!(done.code(), Some(code), "{done:?}");
    let lines: Vec<_> = done.err.lines().filter(|line| !line.trim().is_empty()).collect();
    assert!(lines.len() == 1 && lines[0].starts_with("tightrope: "), "{done:?}");
    for part in parts {
        assert!(lines[0].contains(part), "{part:?} is missing in {}", done.err);
    }
    assert!(!done.err.contains("os error"), "{}", done.err);
}

/// A shell in namespaces of its own, where it is root; `None` on hosts that let no one make any.
fn namespaces(flags: &str, script: &str) -> Option<Command> {
    let can = Command::new("unshare").args([flags, "true"]).output();
    if !can.is_ok_and(|output| output.status.success()) {
        eprintln!("no namespaces can be made here: not tested");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args([flags, "sh", "-c", script]).env("XDG_CONFIG_HOME", "/nonexistent");
    command.env("XDG_RUNTIME_DIR", common::runtime_dir());
    for name in ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"] {
        command.env_remove(name);
    }
    Some(command)
}

/// A host without any route: images cannot be fetched, and guests are told at once that nobody can be reached.
#[test]
fn no_route() {
    let home = tempfile::tempdir().unwrap();
    let Some(mut pull) = namespaces("-Urn", &format!("exec {PROGRAM} pull debian")) else { return };
    pull.env("XDG_DATA_HOME", home.path()).env("XDG_CACHE_HOME", home.path());
    pull.env("TIGHTROPE_MIRROR", "http://192.0.2.1/debian");
    fails(&finish(pull, b""), 1, &["http://192.0.2.1/debian", "unreachable", "check the network", "--mirror"]);
    assert!(!home.path().join("tightrope/images").exists());

    let guest = namespaces("-Urn", &format!("exec {PROGRAM} run --engine {}", engine())).unwrap();
    let mut session = Session::start(guest);
    session.expect(PROMPT);
    done(&mut session, "network wait");
    let started = Instant::now();
    done(&mut session, "! wget -q -O - -T 60 http://192.0.2.1/ && ! wget -q -O - -T 60 http://[2001:db8::1]/");
    done(&mut session, "! nslookup www.example.org && ! ping -c 1 -W 2 192.0.2.1");
    assert!(started.elapsed() < Duration::from_secs(55), "{:?}", started.elapsed());
    // What needs no route works.
    done(&mut session, "ping -c 1 10.0.2.2 || ping -c 1 -W 5 10.0.2.2");
    common::power_off(session);
}

/// A pull that is killed while its mirror says nothing holds up nobody and leaves no image.
#[test]
fn a_killed_pull() {
    let home = tempfile::tempdir().unwrap();
    let mirror = TcpListener::bind("127.0.0.1:0").unwrap();
    let pull = |port: u16| {
        let mut command = tightrope(&["pull", "debian"]);
        command.env("XDG_DATA_HOME", home.path()).env("XDG_CACHE_HOME", home.path());
        command.env("TIGHTROPE_MIRROR", format!("http://127.0.0.1:{port}/debian"));
        for name in ["http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"] {
            command.env_remove(name);
        }
        command
    };
    for signal in [Signal::KILL, Signal::INT] {
        let mut child = pull(mirror.local_addr().unwrap().port()).stderr(Stdio::piped()).spawn().unwrap();
        let _asked = mirror.accept().unwrap();
        kill_process(Pid::from_child(&child), signal).unwrap();
        assert!(!child.wait().unwrap().success());
    }
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let started = Instant::now();
    fails(&finish(pull(closed), b""), 1, &[&format!("127.0.0.1:{closed}"), "--mirror"]);
    assert!(started.elapsed() < Duration::from_secs(60), "it waited for the lock of a dead process");
    assert!(!home.path().join("tightrope/images").exists());
}

/// Files that take nothing: the guest goes on, and the user is told once.
#[test]
fn full_files() {
    let kernel = Kernel::new(Code::new().print("a guest that talks").echo());
    let done = finish(kernel.run(&["--serial", "file:/dev/full"]), b"and hears, q");
    assert_eq!(done.code(), Some(0), "{done:?}");
    assert_eq!(done.err.matches("console output cannot be written any more").count(), 1, "{done:?}");

    let mut session = Session::start(kernel.run(&["--save-to", "/dev/full"]));
    session.expect("a guest that talks");
    for _ in 0..2 {
        session.signal(Signal::USR2);
        session.send(b"on");
        session.expect("on");
    }
    session.send(b"q");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{done:?}");
    let line = "cannot be written: No space left on device: make room for it; the VM goes on, and can be saved again";
    assert_eq!(done.err.matches(line).count(), 2, "{done:?}");
}

/// A file system that is full under all that a VM may want to write.
#[test]
fn a_full_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let kernel = Kernel::new(Code::new().power_off());
    let fill = format!(
        "cd {} && mount -t tmpfs -o size=1m none . && cd $PWD && head -c 1m /dev/zero >fill;",
        dir.path().display()
    );
    let full = |script: &str| Some(finish(namespaces("-rm", &format!("{fill} {script}"))?, b""));
    let source = kernel.dir.path().join("source.img");
    fs::write(&source, vec![7; 1 << 20]).unwrap();
    for script in [
        format!("exec {PROGRAM} disk create a.qcow2 1G"),
        format!("exec {PROGRAM} disk convert {} a.img", source.display()),
        format!("exec {PROGRAM} disk convert {} a.qcow2", source.display()),
    ] {
        let Some(done) = full(&script) else { return };
        fails(&done, 1, &["no space is left", "make room"]);
    }
    let detach = format!(
        "XDG_RUNTIME_DIR=$PWD exec {PROGRAM} run --engine {} --detach --net=none --kernel {}",
        engine(),
        kernel.path
    );
    fails(&full(&detach).unwrap(), 1, &["No space left", "XDG_RUNTIME_DIR"]);
    // A shared directory: the guest hears of it, and goes on when there is room again.
    let script = format!("{fill} ls; exec {PROGRAM} run --engine {} --net=none --share .:/tree", engine());
    let mut session = Session::start(namespaces("-rm", &script).unwrap());
    session.expect(PROMPT);
    done(
        &mut session,
        "! head -c 100000 /dev/urandom >/tree/new && rm -f /tree/new && [ $(wc -c </tree/fill) -gt 900000 ]",
    );
    done(&mut session, "rm /tree/fill && head -c 100000 /dev/urandom >/tree/new && [ $(wc -c </tree/new) = 100000 ]");
    common::power_off(session);
}

/// An image from anybody names files of the host that nobody granted it: told in one line, nothing of them is read.
#[test]
fn backing_files_that_are_not_granted() {
    let dir = tempfile::tempdir().unwrap();
    let (secrets, images) = (dir.path().join("secrets"), dir.path().join("images"));
    fs::create_dir(&secrets).unwrap();
    fs::create_dir(&images).unwrap();
    fs::write(secrets.join("key.img"), vec![b'S'; 1 << 20]).unwrap();
    std::os::unix::fs::symlink(secrets.join("key.img"), images.join("link.img")).unwrap();
    let kernel = Kernel::new(Code::new().power_off());
    let image = images.join("image.qcow2");
    let path = image.display().to_string();
    let outside = secrets.join("key.img").display().to_string();
    for (name, parts) in [
        (outside.as_str(), ["no leave to read", "backing=DIRECTORY"]),
        ("../secrets/key.img", ["no leave to read", "backing=DIRECTORY"]),
        ("link.img", ["no leave to read", "backing=DIRECTORY"]),
        ("/etc/passwd", ["no leave to read", "backing=DIRECTORY"]),
        ("/proc/self/environ", ["no leave to read", "backing=DIRECTORY"]),
        ("json:{\"driver\":\"file\",\"filename\":\"/etc/passwd\"}", ["only files are used", "no file's name"]),
        ("nbd://127.0.0.1/x", ["only files are used", "no file's name"]),
        ("gone.img", ["does not exist", "make the image again"]),
    ] {
        let _ = fs::remove_file(&image);
        let made = finish(tightrope(&["disk", "create", &path, "1M"]), b"");
        assert_eq!(made.code(), Some(0), "{made:?}");
        // The name goes where the header's extensions are, in the first cluster.
        let mut bytes = fs::read(&image).unwrap();
        bytes[8..16].copy_from_slice(&512_u64.to_be_bytes());
        bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
        bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
        fs::write(&image, bytes).unwrap();
        for command in [
            kernel.run(&["--disk", &path]),
            tightrope(&["disk", "convert", &path, &images.join("out.img").display().to_string()]),
        ] {
            let done = finish(command, b"");
            assert_eq!(done.code(), Some(1), "{name}: {done:?}");
            fails(&done, 1, &parts);
            assert!(done.err.contains(&path), "{}", done.err);
        }
        assert!(!images.join("out.img").exists());
    }
    let done = finish(kernel.run(&["--disk", &format!("{path},backing=/nonexistent")]), b"");
    fails(&done, 1, &["/nonexistent"]);
}

/// All processes that were started with this runtime directory.
fn processes(runtime: &Path) -> Vec<String> {
    let variable = format!("XDG_RUNTIME_DIR={}\0", runtime.display());
    let all = fs::read_dir("/proc").unwrap().flatten();
    let ours = all.filter(|entry| {
        fs::read(entry.path().join("environ"))
            .is_ok_and(|all| all.windows(variable.len()).any(|part| part == variable.as_bytes()))
    });
    ours.map(|entry| String::from_utf8_lossy(&fs::read(entry.path().join("cmdline")).unwrap_or_default()).into_owned())
        .collect()
}

/// VMs that cannot start, and monitors that are killed, leave no process, entry, lock, port or temporary file.
#[test]
fn nothing_is_left_behind() {
    // Sockets need a short name.
    let base = tempfile::tempdir_in("/tmp").unwrap();
    let (runtime, temporary, tree) = (base.path().join("run"), base.path().join("tmp"), base.path().join("tree"));
    for dir in [&runtime, &temporary, &tree] {
        fs::create_dir(dir).unwrap();
    }
    let kernel = Kernel::new(Code::new().print("up").echo());
    let disk = base.path().join("disk.img").display().to_string();
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let set = |mut command: Command| {
        command.env("XDG_RUNTIME_DIR", &runtime).env("TMPDIR", &temporary);
        command
    };
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let in_use = format!("{}:80", taken.local_addr().unwrap().port());
    let shares = format!("--share={}:/tree", tree.display());
    for (args, part) in [
        (&["--disk", "/nonexistent.img"][..], "/nonexistent.img"),
        (&["-p", &in_use], "in use"),
        (&["--share=/nonexistent:/x"], "/nonexistent"),
        (&["--initrd", "/nonexistent"], "/nonexistent"),
        (&["--port", "a=unix:/nonexistent/x"], "/nonexistent/x"),
        (&["--serial", "unix:/nonexistent/x"], "/nonexistent/x"),
    ] {
        for background in [&["--detach"][..], &[]] {
            let command = set(kernel.run(&[&["--disk", &disk, &shares], args, background].concat()));
            fails(&finish(command, b""), 1, &[part]);
        }
    }
    wait("the end of all processes", || processes(&runtime).is_empty());
    // Those that were to run in the background are still listed, as ended, until they are tidied away.
    assert_eq!(finish(set(tightrope(&["ps"])), b"").out.lines().count(), 1);
    let entries = || fs::read_dir(runtime.join("tightrope")).into_iter().flatten().flatten().count();
    let before = entries();

    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let forward = format!("{port}:80");
    let socket = base.path().join("port").display().to_string();
    let options = ["--disk", &disk, &shares, "-p", &forward, "--port", &format!("a=unix:{socket}")];
    for _ in 0..2 {
        let mut child: Child = set(kernel.run(&options)).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait("the forwarded port", || TcpListener::bind(("127.0.0.1", port)).is_err());
        // Network server, server of the directory, keeper: they have an environment of their own.
        let helpers = || {
            let all = fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap_or_default();
            all.split_whitespace().map(|pid| Path::new("/proc").join(pid)).collect::<Vec<_>>()
        };
        wait("the processes beside the monitor", || helpers().len() >= 3);
        let helpers = helpers();
        child.kill().unwrap();
        child.wait().unwrap();
        wait("the end of all processes", || processes(&runtime).is_empty() && !helpers.iter().any(|pid| pid.exists()));
        wait("the end of its entry", || entries() == before);
    }
    // And it can all be had again.
    let mut options = options.to_vec();
    options.push("--detach");
    let started = finish(set(kernel.run(&options)), b"");
    assert_eq!(started.code(), Some(0), "{started:?}");
    assert_eq!(finish(set(tightrope(&["stop", "-f", started.out.trim()])), b"").code(), Some(0));
    wait("the end of all processes", || processes(&runtime).is_empty());
    assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0);
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 0));
}

/// A VM in the background whose console goes elsewhere does not hold on to what its caller prints to, and has a log for what it says itself.
#[test]
fn a_vm_in_the_background_lets_go_of_its_caller() {
    let kernel = Kernel::new(Code::new().print("guest").spin());
    let tree = tempfile::tempdir().unwrap();
    let share = format!("{}:tag", tree.path().display());
    let file = tree.path().join("console");
    let serial = format!("file:{}", file.display());
    for serial in [serial.as_str(), "none", "pty"] {
        let mut child = kernel
            .run(&["--detach", "--share", &share, "--serial", serial])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut err = child.stderr.take().unwrap();
        let (told, heard) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = err.read_to_string(&mut text);
            let _ = told.send(text);
        });
        let done = child.wait_with_output().unwrap();
        let id = String::from_utf8(done.stdout).unwrap().trim().to_owned();
        // All of them: monitor, keeper, servers of network and directory.
        let said = heard.recv_timeout(Duration::from_secs(20));
        if serial.starts_with("file") {
            wait("the guest's word", || fs::read_to_string(&file).unwrap() == "guest");
        }
        let logs = finish(tightrope(&["logs", &id]), b"");
        let attach = finish(tightrope(&["attach", &id]), b"");
        assert_eq!(finish(tightrope(&["stop", "-f", &id]), b"").code(), Some(0));
        assert!(done.status.success(), "{said:?}");
        assert!(said.is_ok(), "{serial}: something still holds on to standard error");
        assert!(logs.code() == Some(0) && !logs.out.contains("guest"), "{logs:?}");
        fails(&attach, 1, &["its console is where it was started"]);
    }
    let crashes = Kernel::new(Code::new().triple_fault());
    let id = finish(crashes.run(&["--detach", "--serial", "none"]), b"").out;
    let logs = || finish(tightrope(&["logs", id.trim()]), b"").out;
    wait("what the monitor says", || logs().contains("tightrope: "));
    assert!(logs().contains("triple fault"), "{}", logs());
}

/// An agent that hangs, and one that is gone for good: commands say so, the VM goes on, and it can be stopped.
#[test]
fn agents_that_do_not_answer() {
    // What is done to the agent is done when the console says so.
    let afterwards = |vm: &Vm, script: &str| {
        let script = format!("(sleep 0.2; {script}; echo it is $((6 * 7)) >/dev/console) >/dev/null 2>&1 &");
        assert_eq!(vm.sh(&script).code(), Some(0));
        wait("what is done to the agent", || finish(tightrope(&["logs", &vm.name]), b"").out.contains("it is 42"));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let vm = Vm::start("hangs", &[]);
            afterwards(&vm, "kill -STOP $(pidof agent)");
            let parts = [&vm.name, "does not answer (it says nothing)", "tightrope logs"];
            fails(&vm.sh("true"), 1, &parts);
        });
        scope.spawn(|| {
            let vm = Vm::start("gone", &[]);
            afterwards(&vm, "mv /tightrope/agent /tightrope/hidden; killall -9 agent");
            let late = std::thread::scope(|inner| {
                let late = inner.spawn(|| vm.sh("echo late"));
                std::thread::sleep(Duration::from_secs(22));
                // It is helped up by way of the console, which needs no agent.
                let mut attached = Session::start(tightrope(&["attach", &vm.name]));
                attached.send(b"mv /tightrope/hidden /tightrope/agent\n");
                let late = late.join().unwrap();
                attached.kill();
                late
            });
            assert_eq!((late.code(), late.out.as_str()), (Some(0), "late\n"), "{late:?}");
            fails(&Finished { out: String::new(), ..late }, 0, &[&vm.name, "has not come yet", "tightrope logs"]);
        });
    });
}
