//! A VM is stopped, saved, and goes on in another process, under another engine where there is one: while it computes, has timers armed
//! and reads a disk, and checks itself.

mod common;

use common::{Session, engine, tightrope};
use rustix::process::{Pid, Signal, kill_process};

/// In the guest (which echoes this, so it must not contain what is looked for): reads the disk again and again past its cache, compares, asks
/// the gateway, looks at the clocks, sleeps, counts. A second reader keeps requests in flight. (An answer may be lost with the old
/// network server, not two.)
const WORK: &str = "\
sum=$(md5sum </dev/vda); network wait; nice -n 19 sh -c 'while :; do :; done' & \
while [ ! -e /stop ]; do dd if=/dev/vda of=/dev/null bs=64k 2>/dev/null; done & \
p() { ping -q -c 1 -W 10 10.0.2.2 >/dev/null; }; \
n=0; last=0; while [ ! -e /stop ]; do \
echo 1 >/proc/sys/vm/drop_caches; [ \"$(md5sum </dev/vda)\" = \"$sum\" ] || echo BA''D-disk-$n; p || p || echo BA''D-net-$n; \
read now rest </proc/uptime; now=${now%.*}${now#*.}; [ $now -ge $last ] || echo BA''D-time-$last-$now; last=$now; \
n=$((n+1)); echo tick-$n-; sleep 0.02; \
done &\n";

/// The engines in turn, in the order in which the VM goes through them. (It boots under the faster: `kvm` is tested in a machine that is
/// itself emulated, where translating is very slow.)
fn engines() -> Vec<String> {
    let own = engine();
    match own.as_str() {
        "kvm" => ["kvm", "bt", "kvm"].map(String::from).to_vec(),
        _ => vec![own.clone(), own.clone(), own],
    }
}

fn start(engine: &str, args: &[&str]) -> Session {
    let mut command = tightrope(&["run", "--engine", engine, "--memory", "256M"]);
    command.args(args);
    Session::start(command)
}

fn ticks(session: &mut Session, from: u32, count: u32) -> u32 {
    for n in from..from + count {
        session.expect(&format!("tick-{n}-"));
    }
    from + count
}

#[test]
fn a_working_guest_moves_between_engines() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    let bytes: Vec<u8> = (0..256_u32 << 10).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(&disk, bytes).unwrap();
    let name = |number: usize| dir.path().join(format!("saved-{number}")).display().to_string();
    let disk = format!("{},ro", disk.display());

    let engines = engines();
    let mut session = start(&engines[0], &["--disk", &disk, "--save-to", &name(0)]);
    session.expect("tightrope:");
    session.send(WORK.as_bytes());
    let mut next = ticks(&mut session, 1, 5);
    for (number, engine) in engines.iter().enumerate().skip(1) {
        kill_process(Pid::from_raw(session.id()).expect("a process"), Signal::USR2).expect("kill");
        let done = session.finish();
        assert_eq!(done.code(), Some(0), "{}\n{}", done.out, done.err);
        assert!(!done.out.contains("BAD-"), "{}", done.out);
        // What was printed after the last look.
        while done.out.contains(&format!("tick-{next}-")) {
            next += 1;
        }
        let (from, to) = (name(number - 1), name(number));
        session = start(engine, &["--disk", &disk, "--restore", &from, "--save-to", &to]);
        // The line that was cut in two may not be whole.
        next = ticks(&mut session, next + 1, 3);
    }
    session.send(
        b"touch /stop; kill %1; dmesg | grep -c -i -E 'stall|lockup|unstable|I/O error|Oops|jumped'; echo end-$?-\n",
    );
    session.expect("0\r\nend-1-");
    session.send(b"poweroff\n");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(!done.out.contains("BAD-"), "{}", done.out);
}

#[test]
fn what_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved").display().to_string();
    let mut session = start(&engine(), &["--save-to", &saved]);
    session.expect("tightrope:");
    kill_process(Pid::from_raw(session.id()).expect("a process"), Signal::USR2).expect("kill");
    assert_eq!(session.finish().code(), Some(0));
    let restore = |args: &[&str]| {
        let mut command = tightrope(&["run", "--engine", &engine(), "--restore", &saved]);
        command.args(args);
        let done = common::finish(command, b"");
        assert_eq!(done.code(), Some(1), "{}", done.err);
        done.err
    };
    assert!(restore(&["--memory", "512M"]).contains("256 MiB of memory"));
    std::fs::write(&saved, b"no saved VM").unwrap();
    assert!(restore(&["--memory", "256M"]).contains("none that Tightrope saved"));
}
