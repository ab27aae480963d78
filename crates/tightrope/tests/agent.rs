//! Commands in guests, and VMs that live in the background.
//!
//! `cargo test -p tightrope --test agent -- --ignored` runs the long forms too.

mod common;

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Code, Finished, Kernel, Vm, run, runtime_dir, tightrope, wait};
use rustix::process::{Pid, Signal, kill_process};
use sha2::{Digest, Sha256};

fn sum(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes that no buffer's size divides evenly.
fn data(len: u32) -> Vec<u8> {
    (0..len).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

/// Runs to the end with this input. That a guest on a slow host is late is no matter of these tests.
fn finish(command: Command, input: &[u8]) -> Finished {
    let done = common::finish(command, input);
    let err = done.err.split_inclusive('\n').filter(|line| !line.contains("the agent in the guest has not come yet"));
    Finished { err: err.collect(), ..done }
}

fn ok(done: &Finished) {
    assert_eq!((done.code(), done.err.as_str()), (Some(0), ""), "{done:?}");
}

/// One line with all of `parts`.
fn fails(done: &Finished, code: i32, parts: &[&str]) {
    assert_eq!(done.code(), Some(code), "{done:?}");
    assert_eq!(done.err.lines().count(), 1, "{}", done.err);
    for part in parts {
        assert!(done.err.contains(part), "{part:?} is missing in {}", done.err);
    }
    assert!(!done.err.contains("os error"), "{}", done.err);
}

#[test]
fn a_command_in_a_vm_of_its_own() {
    let one = |options: &[&str], command: &[&str], input: &[u8]| {
        finish(run(&[&["--net", "none"], options, &["--"], command].concat()), input)
    };
    // Nothing but its own output: no boot messages, no greetings.
    let input = data(3_000_001);
    let done = one(&[], &["sh", "-c", "sha256sum; echo err >&2; exit 7"], &input);
    assert_eq!((done.code(), done.err.as_str()), (Some(7), "err\n"), "{done:?}");
    assert_eq!(done.out, format!("{}  -\n", sum(&input)));
    let done = one(&["-e", "X=a b", "-w", "/tmp"], &["sh", "-c", "echo $X; pwd; kill -9 $$"], b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(137), "a b\n/tmp\n"), "{done:?}");
    // What the kernel does not know it gives to process 1; it is no command.
    let done = one(&["--append", "nokaslr unknown"], &["echo", "here"], b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(0), "here\n"), "{done:?}");
    // Signals that the guest's process 1 keeps to itself do not stop its programs from getting theirs.
    let script = "sleep 1000 & kill $!; wait $!; echo $?; kill -INT $$; echo deaf";
    let done = one(&[], &["sh", "-c", script], b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(130), "143\n"), "{done:?}");
    fails(&one(&[], &["no-such-program"], b""), 127, &["no-such-program", "not found"]);
    // The guest goes first: by its own wish, and by a crash.
    assert_eq!(one(&[], &["sh", "-c", "kill -USR2 1; sleep 100"], b"").code(), Some(0));
    let done = one(&[], &["sh", "-c", "echo before; sleep 1; echo c >/proc/sysrq-trigger; sleep 100"], b"");
    assert_eq!((done.code(), done.out.as_str()), (Some(1), "before\n"), "{done:?}");
    assert!(done.err.lines().last().unwrap_or_default().contains("was lost"), "{}", done.err);
    // Whoever started it is killed: the VM goes too.
    let mut child = run(&["--net", "none", "--", "sleep", "1000"]).spawn().unwrap();
    let rows = || tightrope(&["ps"]).output().unwrap().stdout;
    wait("the VM", || String::from_utf8_lossy(&rows()).contains("sleep 1000"));
    child.kill().unwrap();
    child.wait().unwrap();
    wait("the end", || !String::from_utf8_lossy(&rows()).contains("sleep 1000"));
}

/// The network is there for the first command, as all of BusyBox's programs are.
#[test]
fn the_first_command() {
    let vm = Vm::start("first", &["--net", "user"]);
    let done = vm.sh("cat /etc/resolv.conf && route -n && exec timeout 5 ifconfig eth0");
    assert!(["nameserver 10.0.2.3", "10.0.2.2", "10.0.2.15"].iter().all(|part| done.out.contains(part)), "{done:?}");
    ok(&finish(vm.exec(&["sha1sum", "/etc/fstab"]), b""));
}

#[test]
fn a_vm_in_the_background() {
    let vm = Vm::start("life", &[]);
    let taken = finish(run(&["--detach", "--name", &vm.name]), b"");
    fails(&taken, 1, &[&vm.name, "in use", &vm.id]);
    let row = finish(tightrope(&["ps"]), b"");
    let parts = [&vm.id, &vm.name, "up ", "busybox"];
    assert!(row.out.lines().any(|line| parts.iter().all(|part| line.contains(part))), "{}", row.out);

    // Codes, signals, output apart, users.
    let done = vm.sh("echo out; echo err >&2; exit 3");
    assert_eq!((done.code(), done.out.as_str(), done.err.as_str()), (Some(3), "out\n", "err\n"));
    assert_eq!(vm.sh("kill -TERM $$").code(), Some(143));
    fails(&finish(vm.exec(&["no-such"]), b""), 127, &["no-such"]);
    fails(&finish(vm.exec(&["/etc"]), b""), 126, &["/etc"]);
    let done =
        finish(tightrope(&["exec", "-u", "77:88", "-w", "/tmp", &vm.id[..6], "sh", "-c", "id -u; id -g; pwd"]), b"");
    assert_eq!(done.out, "77\n88\n/tmp\n", "{done:?}");
    fails(&finish(tightrope(&["exec", "-u", "eve", &vm.id, "true"]), b""), 1, &["eve"]);

    // Much both ways.
    let input = data(5_000_003);
    let mut child = vm.exec(&["cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let to_send = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&to_send));
    let mut output = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    writer.join().unwrap().unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(sum(&output), sum(&input));

    // Signals go to the program; a reader who stops ends it.
    let mut child = vm.exec(&["sh", "-c", "trap 'exit 5' INT; echo up; while :; do sleep 0.1; done"]);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 3]).unwrap();
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(5));
    let mut child = vm.exec(&["yes", "no end to this"]).stdout(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0; 100]).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(141));
    wait("its end in the guest", || vm.sh("ps | grep -q '[n]o end to this'").code() == Some(1));

    // A terminal.
    let done = finish(tightrope(&["exec", "-it", &vm.name, "sh", "-c", "tty; read x; echo got $x"]), b"word\n");
    assert!(done.out.contains("/dev/pts/") && done.out.contains("got word\r\n"), "{done:?}");

    // Many, one after the other and at once.
    for number in 0..30_u32 {
        assert_eq!(vm.sh(&format!("exit {number}")).code(), Some(number as i32));
    }
    let all: Vec<_> = (0..12)
        .map(|number| {
            vm.exec(&["sh", "-c", &format!("sleep 0.2; echo {number}")]).stdout(Stdio::piped()).spawn().unwrap()
        })
        .collect();
    for (number, child) in all.into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{number}\n"));
    }

    // The agent is killed: the command under way is lost, and those that follow find a new one.
    let child = vm.exec(&["sleep", "1000"]).stderr(Stdio::piped()).spawn().unwrap();
    wait("the command", || vm.sh("ps | grep -q '[s]leep 1000'").code() == Some(0));
    vm.sh("kill -9 $(pidof agent)");
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(line.lines().count() == 1 && line.contains("was lost"), "{line}");
    wait("a new agent", || vm.sh("true").code() == Some(0));

    // The console: what it says, and what is typed there.
    let attached = finish(tightrope(&["attach", &vm.name]), b"echo typed-$((6 * 7)); poweroff\n");
    assert_eq!(attached.code(), Some(0), "{attached:?}");
    assert!(attached.out.contains("typed-42"), "{attached:?}");
    wait("the end", || !finish(tightrope(&["ps"]), b"").out.contains(&vm.id));
    let row = finish(tightrope(&["ps", "-a"]), b"").out;
    assert!(row.lines().any(|line| line.contains(&vm.id) && line.contains("ended (0)")), "{row}");
    let log = finish(tightrope(&["logs", &vm.name]), b"");
    assert!(log.out.contains("typed-42") && log.out.contains("Power down"), "{}", log.out);
    fails(&vm.sh("true"), 1, &["has ended"]);
    fails(&finish(tightrope(&["stop", &vm.id]), b""), 1, &["has ended already"]);
}

#[test]
fn files_in_and_out() {
    let vm = Vm::start("files", &[]);
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    std::fs::create_dir_all(tree.join("a/b")).unwrap();
    std::fs::write(tree.join("a/big"), data(2_000_003)).unwrap();
    std::fs::write(tree.join("a/b/run"), "#!/bin/sh\necho ran\n").unwrap();
    std::fs::set_permissions(tree.join("a/b/run"), PermissionsExt::from_mode(0o750)).unwrap();
    symlink("b/run", tree.join("a/link")).unwrap();
    let here = tree.display().to_string();
    let back = dir.path().join("back").display().to_string();
    ok(&finish(tightrope(&["cp", &here, &vm.file("/tmp")]), b""));
    let done = vm.sh("cd /tmp/tree/a && ./link && sha256sum <big && stat -c %a b/run");
    assert_eq!(done.out, format!("ran\n{}  -\n750\n", sum(&data(2_000_003))), "{done:?}");
    ok(&finish(tightrope(&["cp", &vm.file("/tmp/tree"), &back]), b""));
    assert_eq!(sum(&std::fs::read(dir.path().join("back/a/big")).unwrap()), sum(&data(2_000_003)));
    assert_eq!(std::fs::read_link(dir.path().join("back/a/link")).unwrap(), Path::new("b/run"));
    assert_eq!(std::fs::metadata(dir.path().join("back/a/b/run")).unwrap().permissions().mode() & 0o777, 0o750);
    // One file, as a name and into a directory.
    ok(&finish(tightrope(&["cp", &vm.file("/etc/passwd"), &dir.path().join("p").display().to_string()]), b""));
    ok(&finish(tightrope(&["cp", &vm.file("/etc/passwd"), &back]), b""));
    assert_eq!(std::fs::read(dir.path().join("p")).unwrap(), std::fs::read(dir.path().join("back/passwd")).unwrap());
    // What cannot be.
    fails(&finish(tightrope(&["cp", &vm.file("/no/such"), &back]), b""), 1, &["/no/such", "no such file"]);
    fails(&finish(tightrope(&["cp", "/no/such", &vm.file("/tmp")]), b""), 1, &["/no/such", "no such file"]);
    fails(&finish(tightrope(&["cp", &here, &vm.file("/no/such/dir/x")]), b""), 1, &["no such file"]);
    fails(&finish(tightrope(&["cp", "/a", "/b"]), b""), 1, &["VM:PATH"]);
    ok(&finish(tightrope(&["stop", &vm.name]), b""));
}

#[test]
fn a_monitor_that_is_killed_leaves_nothing_locked() {
    let vm = Vm::start("killed", &[]);
    kill_process(Pid::from_raw(vm.pid()).unwrap(), Signal::KILL).unwrap();
    wait("its end", || !finish(tightrope(&["ps"]), b"").out.contains(&vm.id));
    let dir = runtime_dir().join("tightrope").join(&vm.id);
    wait("its sockets' end", || !dir.join("control").exists() && !dir.join("vsock").exists());
    assert!(finish(tightrope(&["ps", "-a"]), b"").out.contains("ended (killed)"));
    fails(&vm.sh("true"), 1, &["has ended"]);
    let again = Vm::start("killed", &[]);
    assert_ne!(again.id, vm.id);
    assert!(!finish(tightrope(&["ps", "-a"]), b"").out.contains(&vm.id));
    ok(&again.sh("true"));
}

/// A guest without an agent, which does not listen to its power button either.
#[test]
fn a_plain_kernel() {
    let kernel = Kernel::new(Code::new().print("up").echo());
    let vm = Vm::start("plain", &["--kernel", &kernel.path]);
    fails(&vm.sh("true"), 1, &[&vm.name, "without the agent"]);
    fails(&finish(tightrope(&["cp", &vm.file("/x"), "/tmp"]), b""), 1, &["without the agent"]);
    let attached = finish(tightrope(&["attach", &vm.name]), b"hello q");
    assert!(attached.out.contains("hello q"), "{attached:?}");
    wait("the end", || !finish(tightrope(&["ps"]), b"").out.contains(&vm.id));
    let vm = Vm::start("plain", &["--kernel", &kernel.path]);
    wait("its first word", || finish(tightrope(&["logs", &vm.name]), b"").out.contains("up"));
    ok(&finish(tightrope(&["stop", "--time", "0", &vm.name]), b""));
    assert!(finish(tightrope(&["logs", &vm.name]), b"").out.contains("up"));
}

/// Something that plays a VM and answers with nonsense: each command says so in one line.
#[test]
fn a_vm_that_lies() {
    let base = tempfile::tempdir_in("/tmp").unwrap();
    let registry = registry::Registry::at(base.path().join("tightrope")).unwrap();
    let own = registry.add(registry::About { name: Some("liar".into()), agent: true, ..Default::default() }).unwrap();
    let mut about = own.about.clone();
    about.pid = 1 << 30;
    std::fs::write(own.dir.join("about.json"), serde_json::to_vec(&about).unwrap()).unwrap();
    let answer = |listener: UnixListener, answers: Vec<Vec<u8>>| {
        std::thread::spawn(move || {
            for bytes in answers.into_iter().cycle() {
                let Ok((mut stream, _)) = listener.accept() else { return };
                let _ = stream.read(&mut [0; 64]);
                let _ = stream.write_all(&bytes);
            }
        });
    };
    answer(own.control, vec![b"ok\n".to_vec()]);
    let hello = b"OK 1\n\x02\0\0\0\x40\x01\0";
    let with = |rest: &[u8]| [&hello[..], rest].concat();
    answer(
        own.vsock,
        vec![
            b"OK 1\n\xff\xff\xff\xff\x40".to_vec(),
            b"nonsense without end of any kind whatever it may be called".to_vec(),
            b"OK 1\n\x02\0\0\0\x40\x09\0".to_vec(),
            b"OK 1\n".to_vec(),
            with(&[4, 0, 0, 0, 68, 9, 9, 9, 9]),
            with(&[2, 0, 0, 0, 69, 7, 7]),
            with(&[1, 0, 0, 0, 200, 7]),
            with(&[]),
        ],
    );
    for _ in 0..8 {
        let mut command = tightrope(&["exec", "liar", "true"]);
        command.env("XDG_RUNTIME_DIR", base.path());
        fails(&finish(command, b""), 1, &["agent"]);
    }
}

#[test]
fn vms_that_are_not_there() {
    for command in
        [&["exec", "none-such", "true"][..], &["stop", "none-such"], &["logs", "none-such"], &["attach", "none-such"]]
    {
        fails(&finish(tightrope(command), b""), 1, &["none-such", "tightrope ps"]);
    }
    fails(&finish(run(&["--name", "-x"]), b""), 2, &["-x"]);
    fails(&finish(run(&["--name", "a/b"]), b""), 1, &["a/b", "no name"]);
    fails(&finish(run(&["--detach", "--", "true"]), b""), 2, &["--detach"]);
    fails(&finish(run(&["-e", "=x", "--", "true"]), b""), 1, &["=x", "NAME=value"]);
    fails(&finish(tightrope(&["exec", "x"]), b""), 2, &["COMMAND"]);
}

/// The long form: hundreds of commands, and many at once again and again.
#[test]
#[ignore = "takes a minute"]
fn hundreds_of_commands() {
    let vm = Vm::start("many", &["--cpus", "2"]);
    for number in 0..400_u32 {
        assert_eq!(vm.sh(&format!("exit {}", number % 100)).code(), Some((number % 100) as i32));
    }
    for _ in 0..10 {
        let all: Vec<_> =
            (0..24).map(|_| vm.exec(&["sha256sum", "/bin/busybox"]).stdout(Stdio::piped()).spawn().unwrap()).collect();
        let sums: Vec<_> = all.into_iter().map(|child| child.wait_with_output().unwrap().stdout).collect();
        assert!(sums.iter().all(|sum| *sum == sums[0] && sum.len() > 64));
    }
}
