//! The initramfs of the default guest: BusyBox, the virtio modules, and an `/init` of ours.
//!
//! Made from two Debian packages, deterministically. It is built for a short way to the prompt under
//! a translated CPU: not compressed, modules already unpacked, no device manager, few processes.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::Path;

use crate::cpio;
use crate::deb;
use crate::error::{Error, Result};
use crate::kmod::{Selection, normal_name};

/// `/init`, a shell script.
pub const INIT: &str = include_str!("init.sh");

/// `/sbin/network`, a shell script: brings the network up.
pub const NETWORK: &str = include_str!("network.sh");

/// What every image has: as module or built in. The last is what ext4 checks its metadata with.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtiofs",
    "i6300esb",
    "ext4",
    "crc32c_generic",
];

/// Those of [`MODULES`] that a kernel may lack: a checksum that newer ones have as a library, and the watchdog, which Debian 12's cloud kernel has not.
const DISPENSABLE: &[&str] = &["crc32c_generic", "i6300esb"];

/// The applets of Debian's BusyBox, where its packages of Debian 12 and 13 both have them. Its shell finds them by itself; these links are
/// for `#!` lines, for other programs and for the agent.
const APPLETS: &str = include_str!("applets.txt");

const FSTAB: &str = "proc /proc proc defaults 0 0\nsys /sys sysfs defaults 0 0\n\
                     dev /dev devtmpfs defaults 0 0\ntmp /tmp tmpfs defaults 0 0\n";

/// `/sbin/session PROGRAM [ARG…]`: starts a program in a session of its own on the terminal that is its
/// standard input. A shell's background job has SIGINT and SIGQUIT ignored and cannot change that; this
/// puts them back. Machine code of a static program, entered with the stack as the ABI lays it out.
#[rustfmt::skip]
const SESSION: &[u8] = &[
    // rt_sigaction(SIGINT, {SIG_DFL}, NULL, 8); the same for SIGQUIT
    0x48, 0x8d, 0x35, 0x5d, 0x00, 0x00, 0x00,   // lea rsi, [rip + zeros]
    0x31, 0xd2,                                 // xor edx, edx
    0x41, 0xba, 0x08, 0x00, 0x00, 0x00,         // mov r10d, 8
    0xbf, 0x02, 0x00, 0x00, 0x00,               // mov edi, 2
    0xb8, 0x0d, 0x00, 0x00, 0x00,               // mov eax, 13
    0x0f, 0x05,                                 // syscall
    0xbf, 0x03, 0x00, 0x00, 0x00,               // mov edi, 3
    0xb8, 0x0d, 0x00, 0x00, 0x00,               // mov eax, 13
    0x0f, 0x05,                                 // syscall
    // setsid()
    0xb8, 0x70, 0x00, 0x00, 0x00,               // mov eax, 112
    0x0f, 0x05,                                 // syscall
    // ioctl(0, TIOCSCTTY, 0)
    0x31, 0xff,                                 // xor edi, edi
    0xbe, 0x0e, 0x54, 0x00, 0x00,               // mov esi, 0x540e
    0x31, 0xd2,                                 // xor edx, edx
    0xb8, 0x10, 0x00, 0x00, 0x00,               // mov eax, 16
    0x0f, 0x05,                                 // syscall
    // execve(argv[1], &argv[1], envp)
    0x48, 0x8b, 0x0c, 0x24,                     // mov rcx, [rsp]
    0x48, 0x8d, 0x74, 0x24, 0x10,               // lea rsi, [rsp + 16]
    0x48, 0x8b, 0x3e,                           // mov rdi, [rsi]
    0x48, 0x8d, 0x54, 0xcc, 0x10,               // lea rdx, [rsp + rcx * 8 + 16]
    0xb8, 0x3b, 0x00, 0x00, 0x00,               // mov eax, 59
    0x0f, 0x05,                                 // syscall
    // exit(127)
    0xbf, 0x7f, 0x00, 0x00, 0x00,               // mov edi, 127
    0xb8, 0x3c, 0x00, 0x00, 0x00,               // mov eax, 60
    0x0f, 0x05,                                 // syscall
    0x0f, 0x0b,                                 // ud2
    // zeros: struct sigaction of the kernel
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];

/// Everything the content depends on besides the packages; a change of it makes cached images stale.
pub fn recipe() -> String {
    let session: String = SESSION.iter().map(|b| format!("{b:02x}")).collect();
    format!("2\n{INIT}\n{NETWORK}\n{FSTAB}\n{MODULES:?}\n{APPLETS:?}\n{session}")
}

/// What is used of a kernel package.
#[derive(Debug)]
pub struct Kernel {
    /// The bzImage.
    pub vmlinuz: Vec<u8>,
    /// Release, as `uname -r` says it.
    pub version: String,
    modules: BTreeMap<String, (bool, Vec<u8>)>,
    builtin: BTreeSet<String>,
}

/// The largest single file read from a package, and all of them, in bytes.
const MAX_FILE: u64 = 128 << 20;
const MAX_ALL: u64 = 1 << 30;

/// Calls `each` for every regular file: its path without a leading `./`, and its content.
pub(crate) fn for_each_file(
    deb: &Path,
    wanted: impl Fn(&str) -> bool,
    mut each: impl FnMut(&str, Vec<u8>),
) -> Result<()> {
    let bad = |e: std::io::Error| Error::deb(deb, e);
    let mut archive = deb::data(deb)?;
    let mut total = 0u64;
    for entry in archive.entries().map_err(bad)? {
        let mut entry = entry.map_err(bad)?;
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let path = path.trim_start_matches("./");
        if !entry.header().entry_type().is_file() || !wanted(path) {
            continue;
        }
        total = total.saturating_add(entry.size());
        if entry.size() > MAX_FILE || total > MAX_ALL {
            return Err(Error::deb(deb, format!("{path} is too large")));
        }
        let mut data = Vec::new();
        entry.read_to_end(&mut data).map_err(bad)?;
        if data.len() as u64 != entry.size() {
            return Err(Error::deb(deb, format!("truncated at {path}")));
        }
        each(path, data);
    }
    Ok(())
}

impl Kernel {
    /// Reads a `linux-image-*` package.
    ///
    /// # Errors
    /// [`Error::Deb`] if it is not one.
    pub fn read(deb: &Path) -> Result<Self> {
        let mut kernel =
            Self { vmlinuz: Vec::new(), version: String::new(), modules: BTreeMap::new(), builtin: BTreeSet::new() };
        let module = |path: &str| {
            let name = path.rsplit('/').next()?;
            let (name, xz) = match name.strip_suffix(".ko.xz") {
                Some(name) => (name, true),
                None => (name.strip_suffix(".ko")?, false),
            };
            Some((normal_name(name), xz))
        };
        let wanted = |path: &str| {
            path.starts_with("boot/vmlinuz-")
                || path.contains("lib/modules/") && (path.ends_with("/modules.builtin") || module(path).is_some())
        };
        for_each_file(deb, wanted, |path, data| {
            if let Some(version) = path.strip_prefix("boot/vmlinuz-") {
                kernel.version = version.to_owned();
                kernel.vmlinuz = data;
            } else if let Some((name, xz)) = module(path) {
                kernel.modules.insert(name, (xz, data));
            } else {
                let text = String::from_utf8_lossy(&data);
                kernel.builtin.extend(text.lines().filter_map(|l| Some(module(l.trim())?.0)));
            }
        })?;
        if kernel.vmlinuz.is_empty() || kernel.modules.is_empty() {
            return Err(Error::deb(deb, "it has no kernel or no modules"));
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || "+-._~".contains(c);
        if !kernel.version.chars().all(plain) {
            return Err(Error::deb(deb, "odd kernel version"));
        }
        Ok(kernel)
    }

    /// Picks modules with all they need. Those of [`MODULES`] must be there, but for the [`DISPENSABLE`] ones.
    fn select(&self, deb: &Path, extra: &[String]) -> Result<Selection> {
        let mut selection = Selection::new(self.builtin.clone());
        let mut broken = None;
        let mut load = |name: &str| {
            let (xz, data) = self.modules.get(name)?;
            if !xz {
                return Some(data.clone());
            }
            let mut plain = Vec::new();
            let read = deb::unxz(&data[..]).take(MAX_FILE).read_to_end(&mut plain);
            if let Err(e) = read {
                broken = Some(format!("module {name}: {e}"));
                return None;
            }
            Some(plain)
        };
        let mut failed = None;
        for name in MODULES.iter().copied().chain(extra.iter().map(String::as_str)) {
            match selection.add(name, &mut load) {
                Err(missing) if DISPENSABLE.contains(&missing.as_str()) => {}
                Err(missing) => {
                    failed = Some(missing);
                    break;
                }
                Ok(()) => {}
            }
        }
        match (broken, failed) {
            (Some(why), _) => Err(Error::deb(deb, why)),
            (None, Some(name)) => Err(Error::NoModule {
                name,
                package: deb.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            }),
            (None, None) => Ok(selection),
        }
    }
}

/// Reads BusyBox out of `busybox-static`.
fn busybox(deb: &Path) -> Result<Vec<u8>> {
    let mut found = Vec::new();
    let wanted = |path: &str| ["bin/busybox", "usr/bin/busybox"].contains(&path);
    for_each_file(deb, wanted, |_, data| found = data)?;
    // ELF, 64-bit, little-endian, x86-64: anything else cannot be process 1 of this guest.
    if found.get(..6) != Some(b"\x7fELF\x02\x01") || found.get(18..20) != Some(&[62, 0]) {
        return Err(Error::deb(deb, "it has no BusyBox for x86-64"));
    }
    Ok(found)
}

/// A static program of one segment that holds `code`.
fn tiny_elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| elf.extend_from_slice(bytes);
    put(&2u16.to_le_bytes()); // executable
    put(&62u16.to_le_bytes()); // x86-64
    put(&1u32.to_le_bytes());
    put(&(BASE + HEADERS).to_le_bytes()); // entry
    put(&64u64.to_le_bytes()); // program headers
    put(&0u64.to_le_bytes()); // no section headers
    put(&0u32.to_le_bytes());
    for v in [64u16, 56, 1, 0, 0, 0] {
        put(&v.to_le_bytes());
    }
    put(&1u32.to_le_bytes()); // loadable
    put(&5u32.to_le_bytes()); // readable, executable
    for v in [0, BASE, BASE, size, size, 0x1000] {
        put(&v.to_le_bytes());
    }
    put(code);
    elf
}

/// An archive that puts the agent for guests into an initramfs, at `/tightrope/agent`: to be placed before the initramfs itself, whatever
/// that is (the kernel unpacks one archive after the other). `docs/agent.md` says what the initramfs does with it.
pub fn agent_archive(program: &[u8]) -> Vec<u8> {
    let mut w = cpio::Writer::new();
    w.file("tightrope/agent", 0o755, program);
    w.finish()
}

/// Builds the initramfs.
///
/// # Errors
/// [`Error::NoModule`] and [`Error::Deb`] for packages that lack something.
pub fn build(kernel: &Kernel, kernel_deb: &Path, busybox_deb: &Path, extra: &[String]) -> Result<Vec<u8>> {
    let selection = kernel.select(kernel_deb, extra)?;
    let busybox = busybox(busybox_deb)?;
    let mut w = cpio::Writer::new();
    for dir in ["bin", "dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/sbin", "var"] {
        w.dir(dir);
    }
    // Process 1 is started with this as its terminal before /dev is mounted.
    w.char_device("dev/console", 5, 1);
    w.file("init", 0o755, INIT.as_bytes());
    w.file("bin/busybox", 0o755, &busybox);
    for applet in APPLETS.lines() {
        w.symlink(applet, "/bin/busybox");
    }
    w.file("sbin/session", 0o755, &tiny_elf(SESSION));
    w.file("sbin/network", 0o755, NETWORK.as_bytes());
    w.file("etc/fstab", 0o644, FSTAB.as_bytes());
    w.file("etc/passwd", 0o644, b"root:x:0:0:root:/root:/bin/sh\n");
    w.file("etc/group", 0o644, b"root:x:0:\n");
    w.symlink("etc/mtab", "/proc/mounts");
    let base = format!("lib/modules/{}", kernel.version);
    for (name, (data, _)) in &selection.modules {
        w.file(&format!("{base}/kernel/{name}.ko"), 0o644, data);
    }
    w.file(&format!("{base}/modules.dep"), 0o644, selection.modules_dep().as_bytes());
    w.file(&format!("{base}/modules.alias"), 0o644, selection.modules_alias().as_bytes());
    Ok(w.finish())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::deb::tests::{deb, tar_of};
    use crate::kmod;
    use std::fs;
    use std::io::Write;

    /// Directories below /tmp of a disk: one file system there for all of them, or the later would hide the earlier.
    #[test]
    fn shares_below_tmp() {
        let start = INIT.find("mount_shares() {").unwrap();
        let end = start + INIT[start..].find("\n}\n").unwrap() + 2;
        let mounts = |root: &str| {
            let script = format!(
                "mount() {{ echo \"$@\"; }}; mkdir() {{ :; }}; shares='a:/src b:/tmp/b c:/tmp/c:ro'; {}; mount_shares {root}",
                &INIT[start..end]
            );
            // Nothing else is to be found: not every BusyBox has every program.
            let done = std::process::Command::new("/bin/sh").args(["-c", &script]).env("PATH", "").output().unwrap();
            assert_eq!(String::from_utf8(done.stderr).unwrap(), "");
            String::from_utf8(done.stdout).unwrap()
        };
        let shares = |root: &str| {
            ["rw a /src", "rw b /tmp/b", "ro c /tmp/c"].map(|share| {
                let (option, place) = share.split_once(" /").unwrap();
                format!("-t virtiofs -o {option} {root}/{place}\n")
            })
        };
        assert_eq!(mounts("''"), shares("").concat());
        let [src, b, c] = shares("/mnt");
        assert_eq!(mounts("/mnt"), format!("{src}-t tmpfs -o nosuid,nodev tmp /mnt/tmp\n{b}{c}"));
    }

    fn xz(data: &[u8]) -> Vec<u8> {
        let mut w = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        w.write_all(data).unwrap();
        w.finish().unwrap()
    }

    struct Debs {
        dir: tempfile::TempDir,
    }

    impl Debs {
        fn new(kernel: &[(&str, &[u8])], busybox: &[u8]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("k.deb"), deb("", &tar_of(kernel))).unwrap();
            fs::write(dir.path().join("b.deb"), deb("", &tar_of(&[("./usr/bin/busybox", busybox)]))).unwrap();
            Self { dir }
        }

        fn build(&self) -> Result<Vec<(String, u32, Vec<u8>)>> {
            let k = self.dir.path().join("k.deb");
            let kernel = Kernel::read(&k)?;
            assert_eq!(kernel.version, "6.1.0-9-x");
            build(&kernel, &k, &self.dir.path().join("b.deb"), &[]).map(|c| cpio::read(&c))
        }
    }

    #[test]
    fn an_image_from_small_packages() {
        let m = "./usr/lib/modules/6.1.0-9-x/";
        let blk = kmod::build(&["depends=virtio", "alias=v2"]);
        let virtio = kmod::build(&["depends="]);
        let debs = Debs::new(
            &[
                ("./boot/vmlinuz-6.1.0-9-x", b"kernel"),
                (
                    &format!("{m}modules.builtin"),
                    b"kernel/fs/ext4/ext4.ko\nk/virtio_pci.ko\nk/virtio_console.ko\nk/virtio-rng.ko\nk/virtio_balloon.ko\nk/virtio_net.ko\n\
                      k/vmw_vsock_virtio_transport.ko\nk/virtiofs.ko\nk/i6300esb.ko\n",
                ),
                (&format!("{m}kernel/drivers/block/virtio_blk.ko.xz"), &xz(&blk)),
                (&format!("{m}kernel/drivers/virtio/virtio.ko"), &virtio),
                (&format!("{m}kernel/sound/other.ko"), b"junk"),
            ],
            &tiny_elf(&[]),
        );
        let files = debs.build().unwrap();
        let find = |n: &str| files.iter().find(|f| f.0 == n).map(|f| &f.2[..]);
        let base = "lib/modules/6.1.0-9-x";
        assert_eq!(find(&format!("{base}/kernel/virtio_blk.ko")), Some(&blk[..]));
        assert_eq!(find(&format!("{base}/kernel/virtio.ko")), Some(&virtio[..]));
        assert_eq!(find(&format!("{base}/kernel/other.ko")), None);
        assert_eq!(
            find(&format!("{base}/modules.dep")),
            Some(&b"kernel/virtio.ko:\nkernel/virtio_blk.ko: kernel/virtio.ko\n"[..])
        );
        assert_eq!(find("bin/sh"), Some(&b"/bin/busybox"[..]));
        assert!(find("init").unwrap().starts_with(b"#!/bin/sh\n"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let debs = Debs::new(
            &[("./boot/vmlinuz-6.1.0-9-x", b"kernel"), ("./lib/modules/6.1.0-9-x/kernel/a.ko", b"junk")],
            &tiny_elf(&[]),
        );
        let e = debs.build().unwrap_err();
        assert!(matches!(&e, Error::NoModule { name, .. } if name == "virtio_pci"), "{e}");
        let e = Kernel::read(&debs.dir.path().join("b.deb")).unwrap_err();
        assert!(e.to_string().contains("no kernel"), "{e}");
        let e = busybox(&debs.dir.path().join("k.deb")).unwrap_err();
        assert!(e.to_string().contains("BusyBox"), "{e}");
    }

    /// The machine code does what its comment says: checked on the host itself.
    #[test]
    fn session_runs_its_program_in_a_new_session_with_default_signals() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("session");
        fs::write(&path, tiny_elf(SESSION)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let script = format!(
            "trap '' INT QUIT; {} /bin/sh -c 'cut -d\" \" -f1,6 /proc/$$/stat; grep SigIgn /proc/$$/status; echo $0 $1' a b",
            path.display()
        );
        let out = std::process::Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        let mut lines = text.lines();
        let ids: Vec<_> = lines.next().unwrap().split(' ').collect();
        assert_eq!(ids[0], ids[1], "leads its session: {text}");
        let ignored = lines.next().unwrap().split_whitespace().nth(1).unwrap();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert_eq!(ignored & 0b110, 0, "SIGINT and SIGQUIT are not ignored: {text}");
        assert_eq!(lines.next(), Some("a b"));
    }
}
