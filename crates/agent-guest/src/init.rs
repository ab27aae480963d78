//! The agent as process 1: of an initramfs, or of a system whose own process 1 is not wanted.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::Command;

use rustix::mount::{MountFlags, mount};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::network::{self, Coming};
use crate::serve::{Agent, Init};
use crate::{modules, power, shares, system};

/// File systems that every program expects: type, place, options.
const MOUNTS: [(&str, &str, MountFlags, &str); 7] = [
    ("proc", "/proc", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC), ""),
    ("sysfs", "/sys", MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC), ""),
    ("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755"),
    ("devpts", "/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC), "mode=0620,gid=5,ptmxmode=0666"),
    ("tmpfs", "/dev/shm", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=1777"),
    ("tmpfs", "/run", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=0755"),
    ("tmpfs", "/tmp", MountFlags::NOSUID.union(MountFlags::NODEV), "mode=1777"),
];

/// Runs the machine. If the kernel's command line has a command behind `--`, runs that on the console and switches the machine off
/// when it has ended. `arguments` are what the kernel gave to process 1.
pub fn run(arguments: &[OsString]) -> ! {
    if let Err(error) = start(arguments) {
        crate::complain(&error.to_string());
    }
    // Process 1 must not end.
    loop {
        let _ = power::as_init(false);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}

fn start(arguments: &[OsString]) -> io::Result<()> {
    mounts();
    // Before them stand words that the kernel did not know, such as `nokaslr` where nothing unpacked it.
    let count = fs::read_to_string("/proc/cmdline").map_or(0, |line| words_behind_dashes(&line));
    let command = arguments.get(arguments.len().saturating_sub(count)..).unwrap_or_default();
    settings();
    let names = modules::needed();
    let (network, others): (Vec<_>, Vec<_>) = names.into_iter().partition(|name| *name == "virtio_net");
    modules::load(&others);
    shares::mount_all();
    // What BusyBox's halt, poweroff and reboot send to process 1, and Ctrl-Alt-Del.
    let signals = system::signals(&[libc::SIGUSR1, libc::SIGUSR2, libc::SIGTERM, libc::SIGINT])?;
    let network = network::start(&network)?;
    let main = if command.is_empty() { None } else { Some(main_command(command, &network)?) };
    Agent::new(Some(Init { signals, main, network })).run()
}

/// How many words of the kernel's command line stand behind the word `--`. As in the kernel, quotes keep spaces in a word.
fn words_behind_dashes(line: &str) -> usize {
    let mut quoted = false;
    let words = line.split(|c: char| {
        quoted ^= c == '"';
        c.is_ascii_whitespace() && !quoted
    });
    words.filter(|word| !word.is_empty()).skip_while(|word| !["--", "\"--\""].contains(word)).skip(1).count()
}

/// Is something mounted here already?
pub fn is_mounted(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    match (device(path), path.parent().and_then(device)) {
        (Some(here), Some(above)) => here != above,
        _ => false,
    }
}

fn mount_one(kind: &str, place: &str, flags: MountFlags, options: &str) {
    if !is_mounted(Path::new(place)) {
        let _ = fs::create_dir_all(place);
        let options = std::ffi::CString::new(options).unwrap_or_default();
        let _ = mount(kind, place, kind, flags, options.as_c_str());
    }
}

fn mounts() {
    for (kind, place, flags, options) in MOUNTS {
        mount_one(kind, place, flags, options);
    }
    for (link, target) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        let _ = std::os::unix::fs::symlink(target, link);
    }
}

/// Makes sure that there can be terminals.
pub fn terminals() {
    if !Path::new("/dev/pts/ptmx").exists() {
        let (kind, place, flags, options) = MOUNTS[3];
        mount_one(kind, place, flags, options);
    }
}

fn settings() {
    let write = |path: &str, text: &str| {
        let _ = fs::write(path, text);
    };
    let named = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let name = if named.trim().is_empty() { "tightrope" } else { named.trim() };
    write("/proc/sys/kernel/hostname", name);
    if !Path::new("/sbin/modprobe").exists() && Path::new("/bin/modprobe").exists() {
        write("/proc/sys/kernel/modprobe", "/bin/modprobe");
    }
    // A root on a disk was mounted for reading only.
    let disk_root = fs::read_to_string("/proc/mounts").unwrap_or_default();
    if disk_root.lines().any(|line| line.starts_with("/dev/") && line.split(' ').nth(1) == Some("/")) {
        let _ = rustix::mount::mount_remount("/", MountFlags::empty(), c"");
    }
}

/// Starts the command that process 1 was given; the descriptor gives how it ended.
fn main_command(command: &[OsString], network: &Coming) -> io::Result<OwnedFd> {
    let (from, to) = pipe_with(PipeFlags::CLOEXEC)?;
    if system::fork()?.is_some() {
        return Ok(from);
    }
    drop(from);
    system::forget_children(false);
    network.wait();
    let mut how = [0, 127];
    if let Some((program, arguments)) = command.split_first() {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root");
        // SAFETY: only a system call is made.
        unsafe { command.pre_exec(system::unblock_signals) };
        match command.status() {
            Ok(status) => {
                how = match (status.code(), status.signal()) {
                    (Some(code), _) => [0, code as u8],
                    (None, signal) => [1, signal.unwrap_or(9) as u8],
                }
            }
            Err(error) => crate::complain(&format!("{}: {error}", program.display())),
        }
    }
    let _ = rustix::io::write(&to, &how);
    std::process::exit(0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_the_command() {
        for (line, count) in [
            ("", 0),
            ("console=ttyS0 nokaslr\n", 0),
            ("quiet --\n", 0),
            ("nokaslr -- make  -j2\n", 2),
            ("x=\"a -- b\" nokaslr -- sh -c \"echo a; echo b\" --\n", 4),
            ("a--b ---\tc", 0),
        ] {
            assert_eq!(words_behind_dashes(line), count, "{line:?}");
        }
    }
}
