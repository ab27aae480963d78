//! The programs that emulate a CPU with hardware support for virtual machines, where none has it: QEMU's translator AMD-V, Bochs VT-x.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// QEMU, without hardware support of its own.
    Qemu,
    /// Bochs, which interprets: some fifty million instructions a second.
    Bochs,
}

/// What the emulated machine boots.
pub struct Boot<'a> {
    pub kernel: &'a Path,
    pub initrd: &'a Path,
    /// What is `/dev/vda`: QEMU only.
    pub disk: Option<&'a Path>,
    /// For files of the emulator's own, as long as it runs.
    pub dir: &'a Path,
    /// Which boot of the same it is: `attempt` on the kernel's command line.
    pub attempt: u32,
}

/// Where the host has the program `name`.
pub fn tool(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).find(|path| path.is_file())
}

impl Emulator {
    /// The Debian packages to install, if something is missing.
    pub fn missing(self) -> Option<&'static str> {
        match self {
            Self::Qemu => tool("qemu-system-x86_64").is_none().then_some("qemu-system-x86"),
            Self::Bochs => {
                let files = [BIOS, VGA_BIOS, ISOLINUX, LDLINUX];
                let there = ["bochs-bin", "genisoimage"].iter().all(|name| tool(name).is_some());
                let there = there && files.iter().all(|path| Path::new(path).exists());
                (!there).then_some("bochs bochsbios vgabios isolinux syslinux-common genisoimage")
            }
        }
    }

    /// Starts it; returns what comes out of its serial port too.
    pub fn start(self, boot: &Boot<'_>) -> (Child, Box<dyn Read + Send>) {
        match self {
            Self::Qemu => qemu(boot),
            Self::Bochs => bochs(boot),
        }
    }

    /// What the running emulator says of the CPU, asked three times.
    pub fn registers(self, boot: &Boot<'_>) -> String {
        let Self::Qemu = self else { return String::new() };
        let mut said = String::new();
        for _ in 0..3 {
            let Ok(mut monitor) = UnixStream::connect(boot.dir.join(MONITOR)) else { return said };
            let _ = monitor.set_read_timeout(Some(Duration::from_secs(1)));
            let _ = monitor.write_all(b"info registers\ninfo lapic\ninfo pic\n");
            let mut bytes = Vec::new();
            let _ = monitor.take(1 << 20).read_to_end(&mut bytes);
            said.push_str(&String::from_utf8_lossy(&bytes));
        }
        said
    }
}

/// The socket of QEMU's monitor.
const MONITOR: &str = "monitor";

fn qemu(boot: &Boot<'_>) -> (Child, Box<dyn Read + Send>) {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-monitor"])
        .arg(format!("unix:{},server=on,wait=off", boot.dir.join(MONITOR).display()))
        // Without SMAP: older QEMUs take the stack reads of an IRET in user mode, which engine bt makes, for the kernel's.
        // One CPU: with more, QEMU's translator now and then runs code that the outer kernel is just patching.
        .args(["-no-reboot", "-accel", "tcg,tb-size=512", "-cpu", "EPYC,+svm,+npt,-smap", "-smp", "1"])
        .args(["-m", "3072", "-append"])
        .arg(format!("console=ttyS0 quiet panic=-1 random.trust_cpu=on attempt={}", boot.attempt))
        .arg("-kernel")
        .arg(boot.kernel)
        .arg("-initrd")
        .arg(boot.initrd)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    if let Some(disk) = boot.disk {
        qemu.arg("-drive").arg(format!("if=virtio,format=raw,file={}", disk.display()));
    }
    let mut child = qemu.spawn().expect("QEMU");
    let output = child.stdout.take().expect("piped");
    (child, Box::new(output))
}

const BIOS: &str = "/usr/share/bochs/BIOS-bochs-latest";
const VGA_BIOS: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";
const ISOLINUX: &str = "/usr/lib/ISOLINUX/isolinux.bin";
const LDLINUX: &str = "/usr/lib/syslinux/modules/bios/ldlinux.c32";

/// Time in there goes by instructions: two hundred million are a second, whatever the host takes for them. Without mitigations, which cost
/// many of them.
fn bochs(boot: &Boot<'_>) -> (Child, Box<dyn Read + Send>) {
    let run = |command: &mut Command| assert!(command.status().is_ok_and(|status| status.success()), "{command:?}");
    let (tree, serial) = (boot.dir.join("iso"), boot.dir.join("serial"));
    std::fs::create_dir_all(tree.join("isolinux")).expect("directory");
    let config = "default linux\nprompt 0\ntimeout 1\nlabel linux\n kernel /vmlinuz\n \
         append initrd=/initrd console=ttyS0 quiet panic=-1 random.trust_cpu=on mitigations=off\n";
    std::fs::write(tree.join("isolinux/isolinux.cfg"), config).expect("file");
    for (from, to) in [
        (boot.kernel, "vmlinuz"),
        (boot.initrd, "initrd"),
        (Path::new(ISOLINUX), "isolinux/isolinux.bin"),
        (Path::new(LDLINUX), "isolinux/ldlinux.c32"),
    ] {
        std::fs::copy(from, tree.join(to)).expect("copy");
    }
    let iso = boot.dir.join("boot.iso");
    let mut make = Command::new("genisoimage");
    make.args(["-quiet", "-R", "-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"]);
    run(make.args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table", "-o"]).arg(&iso).arg(&tree));
    run(Command::new("mkfifo").arg(&serial));
    let settings = format!(
        "romimage: file={BIOS}\nvgaromimage: file={VGA_BIOS}\nmegs: 2048\n\
         cpu: model=corei7_haswell_4770, count=1, ips=200000000, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         ata0-master: type=cdrom, path={}, status=inserted\nboot: cdrom\ncom1: enabled=1, mode=file, dev={}\nlog: {}\n\
         speaker: enabled=0\nsound: driver=dummy\ndisplay_library: rfb, options=\"timeout=0\"\nclock: sync=none\npanic: action=fatal\nerror: action=ignore\ninfo: action=ignore\n",
        iso.display(),
        serial.display(),
        boot.dir.join("log").display()
    );
    let (settings_file, commands) = (boot.dir.join("bochsrc"), boot.dir.join("commands"));
    std::fs::write(&settings_file, settings).expect("file");
    // Debian's has a debugger, which is to go on.
    std::fs::write(&commands, "c\n").expect("file");
    // Its screen is a server; in a network of its own nobody reaches it.
    let mut bochs = Command::new("unshare");
    let [option, rc] = ["-qf", "-rc"].map(OsString::from);
    bochs.args(["-rn", "bochs-bin"]).args([&option, settings_file.as_os_str(), &rc, commands.as_os_str()]);
    let child = bochs.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("Bochs");
    (child, Box::new(Late(serial, None)))
}

/// A pipe that is opened when it is first read: both ends wait for each other, and the other may never come.
struct Late(PathBuf, Option<File>);

impl Read for Late {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        if self.1.is_none() {
            self.1 = Some(File::open(&self.0)?);
        }
        self.1.as_mut().map_or(Ok(0), |file| file.read(bytes))
    }
}
