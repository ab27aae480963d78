//! Making images, from a mirror in small and with a machine that only pretends to run guests: what goes in, and all that can go wrong.

mod mirror;

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use image::{BuildGuest, ImageStore, Machine, Options, Pulled, Reference, pull};
use mirror::{Manner, World};

/// Packages that the base names, and what else their kind needs.
const BASE: &[&str] = &[
    "apt",
    "busybox-static",
    "ca-certificates",
    "dbus",
    "debian-archive-keyring",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "login",
    "mawk",
    "nano",
    "netbase",
    "passwd",
    "procps",
    "systemd-resolved",
    "systemd-sysv",
    "tzdata",
    "udev",
    "util-linux",
];

fn ar(members: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = b"!<arch>\n".to_vec();
    for (name, data) in members {
        out.extend(format!("{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`\n", 0, 0, 0, 100644, data.len()).bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(2), b'\n');
    }
    out
}

fn tar(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut b = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut h = tar::Header::new_gnu();
        h.set_size(data.len() as u64);
        h.set_mode(0o755);
        b.append_data(&mut h, name, data.as_slice()).unwrap();
    }
    b.into_inner().unwrap()
}

fn deb(name: &str, version: &str, files: &[(&str, &[u8])]) -> Vec<u8> {
    let control = format!("Package: {name}\nVersion: {version}\nArchitecture: amd64\nDescription: {name}\n");
    let files: Vec<_> = files.iter().map(|(n, d)| ((*n).to_owned(), d.to_vec())).collect();
    ar(&[
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", tar(&[("control".into(), control.into_bytes())])),
        ("data.tar", tar(&files)),
    ])
}

/// A world whose mirror has what images need.
fn world() -> World {
    let mut w = World::new();
    let mut elf = b"\x7fELF\x02\x01".to_vec();
    elf.resize(18, 0);
    elf.extend([62, 0]);
    let mut put = |name: &str, fields: &str, data: Vec<u8>| {
        w.packages.push((name.to_owned(), data));
        w.fields.insert(name.to_owned(), fields.to_owned());
    };
    for name in BASE {
        let own = format!("usr/share/{name}");
        let files: &[(&str, &[u8])] = match *name {
            "busybox-static" => &[("usr/bin/busybox", &elf)],
            "e2fsprogs" => &[
                ("usr/sbin/mke2fs", b"mke2fs"),
                ("etc/mke2fs.conf", b"conf"),
                ("usr/lib/x86_64-linux-gnu/libe2p.so.2.3", b"e2p"),
            ],
            _ => &[(&own, b"x")],
        };
        let fields = if *name == "e2fsprogs" { "Depends: libext2fs2, libc6, libblkid1\n" } else { "" };
        put(name, fields, deb(name, "1", files));
    }
    let library = |name: &str, file: &str| deb(name, "1", &[(&format!("lib/x86_64-linux-gnu/{file}"), b"so")]);
    put("libext2fs2", "Depends: libcom-err2\n", library("libext2fs2", "libext2fs.so.2.4"));
    put("libcom-err2", "", library("libcom-err2", "libcom_err.so.2.1"));
    put("libblkid1", "Depends: libuuid1\n", library("libblkid1", "libblkid.so.1.1.0"));
    put("libuuid1", "", library("libuuid1", "libuuid.so.1.3.0"));
    let libc = &[("lib/x86_64-linux-gnu/libc.so.6", &b"c"[..]), ("lib64/ld-linux-x86-64.so.2", b"ld")];
    put("libc6", "Essential: yes\nInstalled-Size: 12\n", deb("libc6", "1", libc));
    put("extra", "Depends: extra-data\n", deb("extra", "1", &[("usr/bin/extra", b"e")]));
    put("extra-data", "", deb("extra-data", "1", &[("usr/share/extra", b"e")]));
    let modules = "lib/modules/6.1.0-9-cloud-amd64";
    let builtin = [
        "virtio_pci",
        "virtio_blk",
        "virtio_console",
        "virtio_rng",
        "virtio_balloon",
        "virtio_net",
        "ext4",
        "virtiofs",
    ]
    .iter()
    .chain(&["vmw_vsock_virtio_transport", "crc32c_generic", "i6300esb"])
    .map(|m| format!("kernel/{m}.ko\n"))
    .collect::<String>();
    let kernel = deb(
        "linux-image-6.1.0-9-cloud-amd64",
        "1",
        &[
            ("boot/vmlinuz-6.1.0-9-cloud-amd64", b"kernel"),
            (&format!("{modules}/modules.builtin"), builtin.as_bytes()),
            (&format!("{modules}/kernel/x.ko"), b"module"),
        ],
    );
    put("linux-image-6.1.0-9-cloud-amd64", "", kernel);
    let depends = "Depends: linux-image-6.1.0-9-cloud-amd64 (= 1)\n";
    put("linux-image-cloud-amd64", depends, deb("linux-image-cloud-amd64", "1", &[]));
    w.options.data_dir = Some(w.dir.path().join("data"));
    w.publish("Date: Thu, 01 Jan 2026 00:00:00 UTC\n");
    w
}

/// What the pretended guest does.
#[derive(Default)]
struct Fake {
    runs: AtomicUsize,
    /// What it writes on its console instead of the sign that all is well.
    says: Option<&'static str>,
    /// What the machine fails with.
    fails: Option<&'static str>,
}

impl Machine for Fake {
    fn run(&self, guest: &BuildGuest, line: &mut dyn FnMut(&str)) -> Result<(), String> {
        self.runs.fetch_add(1, Ordering::SeqCst);
        for file in [&guest.kernel, &guest.initrd, &guest.archive] {
            assert!(fs::metadata(file).unwrap().len() > 0);
        }
        assert_eq!(fs::metadata(&guest.archive).unwrap().len() % 4096, 0);
        assert!(fs::metadata(&guest.disk).unwrap().len() >= 1 << 30);
        // The archive as the disk's content, for the tests to look at.
        let archive = fs::read(&guest.archive).unwrap();
        fs::write(&guest.disk, archive).unwrap();
        line("@step 1.0 making the file system\r\n");
        line(self.says.unwrap_or("@done\r\n"));
        self.fails.map_or(Ok(()), |why| Err(why.to_owned()))
    }
}

fn reference(name: &str) -> Reference {
    name.parse().unwrap()
}

fn make(w: &World, name: &str, machine: &Fake) -> image::Result<Pulled> {
    pull(&reference(name), false, &w.options, machine)
}

/// The message of a failed attempt: one line, and nothing in the store.
fn error(w: &World, name: &str, machine: &Fake) -> String {
    let text = make(w, name, machine).unwrap_err().to_string();
    assert!(!text.contains('\n'), "{text}");
    assert!(store(w).list().is_empty(), "{text}");
    text
}

fn store(w: &World) -> ImageStore {
    ImageStore::at(w.options.data_dir.as_ref().unwrap())
}

fn files(image: &image::Image) -> BTreeMap<String, Vec<u8>> {
    let disk = fs::read(image.disk()).unwrap();
    let mut all = BTreeMap::new();
    for entry in tar::Archive::new(disk.as_slice()).entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut data = Vec::new();
        entry.read_to_end(&mut data).unwrap();
        all.insert(String::from_utf8(entry.path_bytes().into_owned()).unwrap(), data);
    }
    all
}

#[test]
fn a_system_with_a_package_more() {
    let w = world();
    let made = make(&w, "debian+extra", &Fake::default()).unwrap();
    assert!(made.made);
    let manifest = &made.image.manifest;
    assert_eq!(manifest.name, "debian:trixie+extra");
    assert!(manifest.packages.iter().any(|p| p.name == "extra-data" && p.version == "1"));
    let files = files(&made.image);
    let text = |path: &str| String::from_utf8(files[path].clone()).unwrap();
    // The base is unpacked; what was asked for waits for APT.
    let status = text("var/lib/dpkg/status");
    assert!(status.contains("Package: libc6\nStatus: install ok unpacked\n") && !status.contains("extra"));
    assert_eq!(files["usr/lib/x86_64-linux-gnu/libc.so.6"], b"c");
    assert_eq!(text(".tightrope/packages"), "extra\nextra-data\n");
    let index = text(".tightrope/repository/Packages");
    assert_eq!((index.matches("Package: ").count(), index.matches("Filename: ").count()), (2, 2));
    assert!(files.contains_key("usr/lib/modules/6.1.0-9-cloud-amd64/kernel/x.ko"));
    assert!(text("etc/apt/sources.list.d/debian.sources").contains("host.tightrope.internal"));
    assert!(fs::metadata(made.image.disk()).unwrap().permissions().readonly());
    let names: Vec<_> = fs::read_dir(made.image.dir()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|n| n == "archive.tar" || n == "builder.cpio"), "{names:?}");
}

#[test]
fn made_again_only_when_the_mirror_has_something_new() {
    let mut w = world();
    let machine = Fake::default();
    let first = make(&w, "debian", &machine).unwrap().image;
    let again = make(&w, "debian:13", &machine).unwrap();
    assert!(!again.made && again.image.id() == first.id());
    assert_eq!(machine.runs.load(Ordering::SeqCst), 1);
    let offline = Options { offline: true, ..w.options.clone() };
    assert!(!pull(&reference("debian"), false, &offline, &machine).unwrap().made);

    let place = w.packages.iter().position(|(name, _)| name == "less").unwrap();
    w.packages[place].1 = deb("less", "2", &[("usr/bin/less", b"newer")]);
    w.versions.insert("less".into(), "2".into());
    w.publish("Date: Fri, 02 Jan 2026 00:00:00 UTC\n");
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let newer = make(&w, "debian", &machine).unwrap();
    assert!(newer.made && newer.image.id() != first.id());
    let store = store(&w);
    assert_eq!(store.find(&reference("debian")).unwrap().id(), newer.image.id());
    assert_eq!(store.list().len(), 2);
    store.prune(image::Progress::Quiet, |_| false).unwrap();
    assert_eq!(store.list().len(), 1);
}

#[test]
fn a_guest_that_does_not_come_to_its_end_leaves_no_image() {
    let w = world();
    for (machine, why) in [
        (Fake { says: Some("@failed mke2fs failed\r\n"), ..Fake::default() }, "mke2fs failed"),
        (Fake { says: Some("dpkg: error\r\n"), ..Fake::default() }, "ended too early"),
        (Fake { says: Some("x\r\n"), fails: Some("the guest crashed"), ..Fake::default() }, "the guest crashed"),
        // Even if it says that all is well.
        (Fake { fails: Some("killed"), ..Fake::default() }, "killed"),
    ] {
        let text = error(&w, "debian", &machine);
        assert!(text.contains(why) && text.contains("build.log"), "{text}");
        assert!(w.dir.path().join("data/build.log").is_file());
        assert_eq!(fs::read_dir(w.dir.path().join("data/images")).unwrap().count(), 0);
    }
    make(&w, "debian", &Fake::default()).unwrap();
}

#[test]
fn wrong_names_are_told_with_the_right_ones() {
    let w = world();
    let machine = Fake::default();
    let text = error(&w, "debian:trixi", &machine);
    assert!(text.contains("no Debian suite 'trixi'") && text.contains("did you mean trixie?"), "{text}");
    let text = error(&w, "debian+extar", &machine);
    assert!(text.contains("no package extar") && text.contains("did you mean extra?"), "{text}");
    assert_eq!(machine.runs.load(Ordering::SeqCst), 0);
}

#[test]
fn what_arrived_before_a_failure_is_not_fetched_again() {
    let w = world();
    let machine = Fake::default();
    let good = w.packages.iter().find(|(name, _)| name == "udev").unwrap().1.clone();
    let mut wrong = good.clone();
    wrong[70] ^= 1;
    w.server.put("/debian/pool/udev.deb", wrong);
    let text = error(&w, "debian", &machine);
    assert!(text.contains("udev.deb") && text.contains("SHA-256"), "{text}");
    w.server.manner("/debian/pool/udev.deb", Manner::Status(404));
    assert!(error(&w, "debian", &machine).contains("udev.deb"));
    w.server.manner("/debian/pool/udev.deb", Manner::CutOnce(20));
    w.server.put("/debian/pool/udev.deb", good);
    w.server.log();
    assert!(make(&w, "debian", &machine).unwrap().made);
    let log = w.server.log();
    assert!(log.contains(&"/debian/pool/udev.deb from 20".to_owned()), "{log:?}");
    // Whatever was fetched beside it in the first attempt is there.
    assert!(log.iter().filter(|l| l.contains("/pool/")).count() < BASE.len(), "{log:?}");
    // The store's directory is a file: one line again.
    let blocked: PathBuf = w.dir.path().join("blocked");
    fs::write(&blocked, "").unwrap();
    let options = Options { data_dir: Some(blocked), ..w.options.clone() };
    let text = pull(&reference("debian"), false, &options, &machine).unwrap_err().to_string();
    assert!(text.contains("blocked") && !text.contains('\n'), "{text}");
}

#[test]
fn what_an_interrupted_pull_left_is_not_used() {
    let w = world();
    let images = w.dir.path().join("data/images");
    // Killed while the guest ran, and killed while it was put in place.
    for name in ["new-0123456789ab", "0123456789ab"] {
        fs::create_dir_all(images.join(name)).unwrap();
        fs::write(images.join(name).join("disk.raw"), "half").unwrap();
    }
    assert!(store(&w).list().is_empty());
    let made = make(&w, "debian", &Fake::default()).unwrap();
    let left: Vec<_> = fs::read_dir(&images).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [made.image.dir()]);
}

#[test]
fn two_at_once_make_one() {
    let w = world();
    let machine = Fake::default();
    let results: Vec<bool> = std::thread::scope(|scope| {
        let both: Vec<_> = (0..2).map(|_| scope.spawn(|| make(&w, "debian", &machine).unwrap().made)).collect();
        both.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert_eq!(results.iter().filter(|made| **made).count(), 1);
    assert_eq!(machine.runs.load(Ordering::SeqCst), 1);
    assert_eq!(store(&w).list().len(), 1);
}

#[test]
fn an_unsigned_index_is_refused() {
    let w = world();
    let forged = {
        let site = w.server.site.lock().unwrap();
        String::from_utf8(site.files[mirror::IN_RELEASE].clone()).unwrap().replace("Suite: stable", "Suite: stabel")
    };
    w.server.put(mirror::IN_RELEASE, forged);
    let text = error(&w, "debian", &Fake::default());
    assert!(text.contains("not signed by a trusted key"), "{text}");
}
