//! What a VM costs its host besides the guest's own work: returns from the guest, memory of the monitor, time to start.

mod common;

use std::time::Duration;

use common::{Code, Finished, Kernel, PROMPT, Session, emulated, engine, run};
/// Most memory that the monitor may have beyond the guest's under engine `kvm`, in KiB. Of it, what no other process has as well, and
/// the resident pages of the program and its libraries (the program is twice as big in the profile that tests are built in).
const MOST_MEMORY: u64 = 7 << 10;
const MOST_MEMORY_IN_TESTS: u64 = 10 << 10;
/// Relocated pages of the program count.
const MOST_OWN_MEMORY: u64 = 3 << 10;
const MOST_OWN_MEMORY_IN_TESTS: u64 = 4 << 10;

/// Is the command that is tested built for release?
fn release() -> bool {
    !cfg!(debug_assertions) || std::env::var_os("TIGHTROPE_TEST_RELEASE").is_some()
}

fn counters(done: &Finished) -> serde_json::Value {
    let line = done.err.lines().last().unwrap_or_default();
    let json: serde_json::Value = serde_json::from_str(line).expect(line);
    json["counters"].clone()
}

/// Where the engine takes doorbells, a request to a disk makes no vCPU leave the guest for the monitor; elsewhere each does.
#[test]
fn doorbells_stay_in_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    std::fs::write(&disk, vec![7; 1 << 20]).unwrap();
    let mut session = Session::start(run(&["--stats=json", "--disk", &format!("{},ro", disk.display())]));
    session.expect(PROMPT);
    session.send(b"for i in $(seq 40); do echo 1 >/proc/sys/vm/drop_caches; cat /dev/vda >/dev/null; done; set -- $(cat /sys/block/vda/stat); echo requests-$1-; poweroff\n");
    session.expect("requests-");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    let requests =
        done.out.rsplit_once("requests-").and_then(|(_, rest)| rest.split_once('-')).map(|(number, _)| number);
    let requests: u64 = requests.and_then(|number| number.parse().ok()).expect("a number");
    let counters = counters(&done);
    let writes = counters["exits.disk0.writes"].as_u64().unwrap_or_default();
    println!("{requests} requests, {writes} writes to the disk's registers that reached the monitor");
    assert!(requests >= 200, "{requests}");
    if engine() == "kvm" {
        // Setting the device up takes some; not one a request.
        assert!(writes < 100, "{counters}");
    } else {
        assert!(writes >= requests / 2, "{counters}");
    }
}

/// Resident memory in KiB: of the guest, of all else, and how much of that no other process has. The guest's is the one mapping that is
/// as large as its RAM.
fn resident(session: &Session, ram: u64) -> (u64, u64, u64) {
    let text = std::fs::read_to_string(format!("/proc/{}/smaps", session.id())).expect("smaps");
    let (mut guest, mut other, mut own, mut in_guest) = (0, 0, 0, false);
    let (mut name, mut by_name) = (String::new(), std::collections::BTreeMap::<String, u64>::new());
    let kib = |rest: &str| rest.trim().trim_end_matches(" kB").parse::<u64>().expect("a size");
    for line in text.lines() {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = first.split_once('-').map(|(start, end)| (hex(start), hex(end))) {
            in_guest = end - start >= ram;
            name =
                line.split_ascii_whitespace().skip(1).filter(|word| !word.contains(':')).collect::<Vec<_>>().join(" ");
        } else if let Some(rest) = line.strip_prefix("Rss:") {
            *(if in_guest { &mut guest } else { &mut other }) += kib(rest);
            *by_name.entry(name.clone()).or_default() += kib(rest);
        } else if let Some(rest) = line.strip_prefix("Anonymous:").filter(|_| !in_guest) {
            own += kib(rest);
        }
    }
    by_name.into_iter().filter(|(_, kib)| *kib > 40).for_each(|(name, kib)| println!("{kib:8} KiB  {name}"));
    (guest, other, own)
}

/// All that is resident beyond the guest's RAM: heap, stacks, tables, and the pages of the program itself. (A confined monitor does not
/// let itself be looked at.)
#[test]
fn the_monitor_is_small() {
    let mut session = Session::start(run(&["--memory", "256M", "--no-sandbox"]));
    session.expect(PROMPT);
    // So that it is known which is which.
    session.send(b"dd if=/dev/zero of=/tmp/x bs=1M count=64 2>/dev/null; echo lo''aded\n");
    session.expect("loaded");
    let (guest, monitor, own) = resident(&session, 256 << 20);
    println!("the monitor has {monitor} KiB, {own} KiB of it its own, the guest {guest} KiB");
    session.send(b"dmesg | grep -o '.*Run /in[i]t'; echo lo''oked\n");
    session.expect("looked");
    session.send(b"poweroff\n");
    let done = session.finish();
    assert_eq!(done.code(), Some(0), "{}", done.err);
    let line = |text: &'static str| {
        [&done.err, &done.out].into_iter().flat_map(|all| all.lines()).find(|line| line.contains(text))
    };
    println!("{}, {}", line("shell after").unwrap_or_default(), line("] Run /init").unwrap_or_default());
    assert!(guest > 64 << 10, "{guest} KiB");
    if engine() == "kvm" {
        let (most, most_own) =
            if release() { (MOST_MEMORY, MOST_OWN_MEMORY) } else { (MOST_MEMORY_IN_TESTS, MOST_OWN_MEMORY_IN_TESTS) };
        assert!(monitor < most && own < most_own, "{monitor} KiB, {own} KiB its own");
    }
}

/// From the start of the process to the first instruction of the guest.
#[test]
fn starting_is_quick() {
    let kernel = Kernel::new(Code::new().print("up").power_off());
    let mut times: Vec<Duration> = (0..5)
        .map(|_| {
            let done = common::finish(kernel.run(&["--stats=json"]), b"");
            assert_eq!(done.code(), Some(0), "{}", done.err);
            Duration::from_micros(counters(&done)["time.ready-us"].as_u64().expect("a time"))
        })
        .collect();
    times.sort();
    println!("first instruction after {times:?}");
    // Tens of milliseconds; the rest is for hosts that are busy. An emulated one takes most of a second if nothing else runs.
    let most = if emulated() { 10 } else { 2 };
    assert!(times[2] < Duration::from_secs(most), "{times:?}");
}
