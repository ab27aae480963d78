//! A VM is stopped, saved, and goes on in another process, under another engine where there is one: while it computes, has timers armed
//! and reads a disk, and checks itself.

mod common;

use std::time::Duration;

use common::{Code, Kernel, Session, engine, tightrope};
use rustix::process::Signal;

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

/// Waits for `text`. If it does not come, the VM says what it has done, and where its vCPU stands.
fn wait_for(session: &mut Session, text: &str, limit: Duration, missing: &str) {
    if let Err(why) = session.look_for(&[text], limit) {
        session.signal(Signal::USR1);
        session.watch(Duration::from_secs(5));
        panic!("{missing}: {why}; {}", session.all_seen());
    }
}

fn ticks(session: &mut Session, from: u32, count: u32) -> u32 {
    for n in from..from + count {
        wait_for(session, &format!("tick-{n}-"), common::LIMIT, "the guest does not go on");
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
        session.signal(Signal::USR2);
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
    // The guest's clock stood still; the real-time clock goes by the host's.
    session.send(b"echo clock-$(cat /sys/class/rtc/rtc0/since_epoch)-\n");
    session.expect("clock-1");
    session.expect("-");
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let seen = session.seen();
    let shown = seen.rsplit("clock-").find_map(|text| text.split('-').next()?.trim().parse::<u64>().ok());
    assert!(shown.is_some_and(|shown| shown.abs_diff(now) <= 10), "{shown:?} at {now}: {seen}");
    session.send(b"poweroff\n");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    assert!(!done.out.contains("BAD-"), "{}", done.out);
}

/// A kernel whose timer interrupts once; its handler ends with the code `again`, which asks for the next interrupt. Each 64th is a dot.
fn chain(start: Code, again: &[u8]) -> Kernel {
    const IDT: usize = 0x1000;
    const HANDLER: usize = 0x800;
    // mov esp, 0x180000; lidt [0x100700]; mov edi, 0xfee00000
    let code = Code::new()
        .raw(&[0xbc, 0, 0, 0x18, 0, 0x0f, 0x01, 0x1c, 0x25, 0, 0x07, 0x10, 0, 0xbf, 0, 0, 0xe0, 0xfe])
        .raw(&start.0)
        .raw(&[0xfb])
        .stop();
    let at = |code: Code, offset: usize| {
        let gap = offset - code.0.len();
        code.raw(&vec![0; gap])
    };
    let base = (Code::START as u32 + IDT as u32).to_le_bytes();
    let code = at(code, 0x700).raw(&[0xff, 0x0f]).raw(&base).raw(&[0; 4]);
    // inc rbx; test bl, 63; jnz 1f; (print a dot); 1:
    let dot = Code::new().print(".");
    let code = at(code, HANDLER).raw(&[0x48, 0xff, 0xc3, 0xf6, 0xc3, 0x3f, 0x75, dot.0.len() as u8]).raw(&dot.0);
    let code = code.raw(again).raw(&[0x48, 0xcf]);
    let handler = Code::START + HANDLER as u64;
    let gate = handler & 0xffff | 0x10 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    let code = at(code, IDT + 0x40 * 16).raw(&gate.to_le_bytes()).raw(&[0; 8]);
    Kernel::new(code)
}

/// What 192 interrupts of a chain may take, which come within 200 ms.
const SOON: Duration = Duration::from_secs(20);

/// Each interrupt of a chain comes of the one before: were one lost in a move, there would be no more. `TIGHTROPE_TEST_MOVES` says how often the
/// VM moves, for whoever looks for what is rarely lost.
fn goes_on(kernel: &Kernel) {
    let saved = |number: usize| kernel.dir.path().join(format!("saved-{}", number % 2)).display().to_string();
    let times = std::env::var("TIGHTROPE_TEST_MOVES").ok().map_or(8, |times| times.parse().expect("a number"));
    let turns = engines().into_iter().take(2).cycle();
    let mut restore: Vec<String> = Vec::new();
    for (number, engine) in turns.enumerate().take(times) {
        eprintln!("{number}: {engine}");
        let mut command = tightrope(&["run", "--engine", &engine, "--memory", "32M", "--kernel", &kernel.path]);
        command.args(["--save-to", &saved(number)]).args(&restore);
        let mut session = Session::start(command);
        wait_for(&mut session, "...", SOON, &format!("after {number} moves no interrupt comes any more"));
        session.signal(Signal::USR2);
        let done = session.finish();
        assert_eq!(done.code(), Some(0), "{}\n{}", done.out, done.err);
        restore = vec!["--restore".into(), saved(number)];
    }
}

/// One-shot timers of 300 µs of the local APIC.
#[test]
fn local_apic_timers_are_not_lost() {
    let store = |register: u32, value: u32| {
        // mov dword [rdi + register], value
        [&[0xc7, 0x87], &register.to_le_bytes()[..], &value.to_le_bytes()].concat()
    };
    let again = [store(0x380, 300_000), store(0xb0, 0)].concat();
    let start = Code::new().raw(&store(0x320, 0x40)).raw(&store(0x3e0, 0xb)).raw(&store(0x380, 300_000));
    goes_on(&chain(start, &again));
}

/// Counts of 1 ms of the PIT, of which only the first is programmed with the mode.
#[test]
fn counts_of_the_pit_are_not_lost() {
    let count = Code::new().out8(0x40, 0xa9).out8(0x40, 0x04);
    let pic = [(0x20, 0x11), (0x21, 0x40), (0x21, 4), (0x21, 1), (0x21, 0xfe)];
    let start = pic.into_iter().fold(Code::new(), |code, (port, value)| code.out8(port, value)).out8(0x43, 0x30);
    goes_on(&chain(start.raw(&count.0), &Code::new().raw(&count.0).out8(0x20, 0x20).0));
}

#[test]
fn what_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let saved = dir.path().join("saved").display().to_string();
    let mut session = start(&engine(), &["--save-to", &saved]);
    session.expect("tightrope:");
    session.signal(Signal::USR2);
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
