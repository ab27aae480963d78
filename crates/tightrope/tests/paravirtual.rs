//! What a guest has of its host by knowing that it is a guest: interprocessor interrupts by hypercall, translations forgotten without an
//! interrupt, time stolen by others.

mod common;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use common::{COMPLAINTS, PROMPT, Session, run};
use image::{Flavour, cpio};
/// Set where this program is to be a guest's.
const INSIDE: &str = "TIGHTROPE_INSIDE";

/// Shared libraries of this process, the loader among them.
fn libraries() -> Vec<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").expect("maps");
    let mut paths: Vec<PathBuf> = maps
        .lines()
        .filter_map(|line| Some(line[line.find('/')?..].into()))
        .filter(|p: &PathBuf| p.to_string_lossy().contains(".so"))
        .collect();
    paths.sort();
    paths.dedup();
    paths
}

/// A program without its debugging information, where that can be had.
fn stripped(program: &Path) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().expect("temporary file");
    let done = std::process::Command::new("strip").arg("-o").arg(file.path()).arg(program).status();
    std::fs::read(if done.is_ok_and(|status| status.success()) { file.path() } else { program }).expect("program")
}

/// A guest with this very program and its libraries in `/t`.
fn guest_with_us(args: &[&str]) -> (Session, tempfile::TempDir) {
    let options = image::Options { progress: image::Progress::Quiet, ..image::Options::default() };
    let image =
        image::default_image(image::DEFAULT_SUITE, Flavour::Cloud, &options).unwrap_or_else(|error| panic!("{error}"));
    let mut archive = std::fs::read(&image.initrd).expect("initrd");
    archive.resize(archive.len().next_multiple_of(512), 0);
    let mut writer = cpio::Writer::new();
    writer.dir("t");
    writer.file("t/inside", 0o755, &stripped(&std::env::current_exe().expect("a path")));
    for library in libraries() {
        let name = library.file_name().expect("a name").to_string_lossy().into_owned();
        writer.file(&format!("t/{name}"), 0o755, &std::fs::read(&library).expect("library"));
    }
    archive.extend(writer.finish());
    let dir = tempfile::tempdir().expect("directory");
    let initrd = dir.path().join("initrd");
    std::fs::write(&initrd, archive).expect("initrd");
    let (kernel, initrd) = (image.kernel.display().to_string(), initrd.display().to_string());
    let append = format!("{} quiet", image.cmdline);
    let mut all = vec!["--kernel", &kernel, "--initrd", &initrd, "--append", &append];
    all.extend(args);
    let mut session = Session::start(run(&all));
    session.expect(PROMPT);
    (session, dir)
}

/// How a guest runs a test of this program.
fn inside(test: &str) -> String {
    format!("{INSIDE}=1 /t/ld-linux-x86-64.so.2 --library-path /t /t/inside --exact {test} --nocapture")
}

/// In a guest: one thread puts other pages where all look; nobody may see a page that was taken away before.
#[test]
fn inside_remapping() {
    use rustix::mm::{MapFlags, MremapFlags, ProtFlags, mmap_anonymous, mremap_fixed};
    const PAGES: usize = 16;
    const SIZE: usize = 4096;
    if std::env::var_os(INSIDE).is_none() {
        return;
    }
    // SAFETY: new mappings where the kernel likes.
    let map = |len| unsafe {
        mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE).expect("mmap")
    };
    let base = map(PAGES * SIZE) as usize;
    let published: [AtomicU64; PAGES] = std::array::from_fn(|_| AtomicU64::new(0));
    let (stop, wrong) = (AtomicBool::new(false), AtomicU64::new(0));
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut generation = 0;
    std::thread::scope(|scope| {
        for reader in 0..cpus - 1 {
            let (published, stop, wrong) = (&published, &stop, &wrong);
            scope.spawn(move || {
                let mut at = reader;
                while !stop.load(Ordering::Relaxed) {
                    at = (at + 5) % PAGES;
                    let least = published[at].load(Ordering::SeqCst);
                    // SAFETY: something is always mapped there; the word changes only with the page.
                    let seen = unsafe { ((base + at * SIZE) as *const u64).read_volatile() };
                    let most = published[at].load(Ordering::SeqCst) + 1;
                    if !(least..=most).contains(&seen) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        let end = Instant::now() + Duration::from_secs(3);
        while Instant::now() < end {
            generation += 1;
            for (at, published) in published.iter().enumerate() {
                let page = map(SIZE);
                // SAFETY: the page is this thread's alone until it is moved, and lies within the range that nothing else uses.
                unsafe {
                    page.cast::<u64>().write(generation);
                    let to = (base + at * SIZE) as *mut _;
                    mremap_fixed(page, SIZE, SIZE, MremapFlags::MAYMOVE, to).expect("mremap");
                }
                published.store(generation, Ordering::SeqCst);
            }
        }
        stop.store(true, Ordering::SeqCst);
    });
    println!("remapped-{generation}-times-wrong-{}-", wrong.load(Ordering::SeqCst));
}

/// Two and four vCPUs on whatever CPUs there are, so that some do not run when a translation is to be forgotten.
#[test]
fn translations_are_forgotten_everywhere() {
    if common::engine() == "interp" {
        return;
    }
    for cpus in ["2", "4"] {
        let (mut session, _dir) = guest_with_us(&["--cpus", cpus, "--memory", "512M"]);
        session.send(
            b"dmesg | grep -c -E 'KVM setup pv remote TLB flush|setup PV IPIs|eoi.. replaced with kvm'; echo offered\n",
        );
        // Under `bt` the guest sees an Intel CPU, whose hypercalls engine `kvm` cannot take on AMD hosts: so there are none.
        let amd = std::arch::x86_64::__cpuid(0).ebx.to_le_bytes() == *b"Auth";
        session.expect(if amd && common::engine() != "kvm" { "2\r\noffered" } else { "3\r\noffered" });
        session.send(format!("{}; echo do''ne\n", inside("inside_remapping")).as_bytes());
        session.expect("done");
        session.send(format!("{COMPLAINTS}; poweroff\n").as_bytes());
        session.expect("0\r\n");
        let done = session.finish();
        assert_eq!(done.code(), Some(0), "{}", done.err);
        let text = done.out.split_once("remapped-").expect("a result").1;
        let mut words = text.split('-');
        let (times, wrong) = (words.next().and_then(|n| n.parse::<u64>().ok()), words.nth(2));
        println!("{cpus} vCPUs: {times:?} times sixteen pages");
        assert!(times >= Some(5), "{times:?}");
        assert_eq!(wrong, Some("0"), "{}", done.out);
    }
}

/// Others compute on all CPUs of the host: the guest sees the time that its busy vCPU has not had.
#[test]
fn stolen_time_is_told() {
    if common::engine() == "interp" {
        return;
    }
    let mut session = Session::start(run(&["--cpus", "1"]));
    session.expect(PROMPT);
    let stop = AtomicBool::new(false);
    let done = std::thread::scope(|scope| {
        for _ in 0..2 * std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        session.send(
            b"st() { set -- $(head -1 /proc/stat); echo $9; }; up() { read u r </proc/uptime; echo ${u%.*}${u#*.}; }; c=$(up); a=$(st); \
              end=$(($(date +%s)+3)); while [ $(date +%s) -lt $end ]; do :; done; b=$(st); d=$(up); echo stolen-$((b-a))-$((d-c))-; poweroff\n",
        );
        // The echo of the command has no number there.
        session.expect("poweroff");
        session.expect("stolen-");
        let done = session.finish();
        stop.store(true, Ordering::SeqCst);
        done
    });
    assert_eq!(done.code(), Some(0), "{}", done.err);
    let numbers =
        done.out.rsplit_once("stolen-").map(|(_, rest)| rest.split('-').map_while(|part| part.parse::<u64>().ok()));
    let numbers: Vec<u64> = numbers.into_iter().flatten().collect();
    println!("{numbers:?}: hundredths of a second that were stolen, and in which time");
    // Both are counted in steps.
    assert!(matches!(numbers[..], [stolen, time] if stolen >= 30 && stolen <= time + 10), "{numbers:?}");
}
