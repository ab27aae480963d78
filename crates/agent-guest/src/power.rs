//! Switching the machine off, and starting it again.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::RebootCommand;

use crate::system;

/// How long programs may take to end when they are asked to.
const PATIENCE: Duration = Duration::from_secs(5);

/// Asks process 1 to do it, whatever that is.
///
/// # Errors
/// Nobody can.
pub fn ask(reboot: bool) -> io::Result<()> {
    let verb = if reboot { "reboot" } else { "poweroff" };
    // Process 1 that is this program, and BusyBox's, take these signals; so do a script that has traps for them.
    let mut command = if crate::serve::we_are_init() {
        let signal = if reboot { libc::SIGTERM } else { libc::SIGUSR2 };
        // SAFETY: takes no pointers.
        unsafe { libc::kill(1, signal) };
        return Ok(());
    } else if Path::new("/run/systemd/system").is_dir() {
        let mut command = Command::new("systemctl");
        command.arg(verb);
        command
    } else {
        Command::new(verb)
    };
    let done = command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").stdin(Stdio::null()).status();
    match done {
        Ok(status) if status.success() => Ok(()),
        _ => {
            rustix::fs::sync();
            now(reboot)
        }
    }
}

/// As process 1: ends all programs, writes everything to the disks, and does it.
pub fn as_init(reboot: bool) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let proc = Path::new("/proc");
    system::kill_all(libc::SIGCONT);
    // That programs end now is not to be told as their own end: the host sees the machine go. (SIGTERM is blocked here.)
    for process in processes(proc).of_the_agent {
        system::kill(process, libc::SIGSTOP);
    }
    system::kill_all(libc::SIGTERM);
    while !processes(proc).others.is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    system::kill_all(libc::SIGKILL);
    rustix::fs::sync();
    unmount_all();
    now(reboot)
}

/// Processes that run, but for process 1. Neither the kernel's threads, which never end, nor what has ended and waits to be looked at.
#[derive(Debug, Default)]
struct Processes {
    /// Of this program.
    of_the_agent: Vec<u32>,
    others: Vec<u32>,
}

fn processes(proc: &Path) -> Processes {
    let program = |process: &str| {
        // The kernel's threads and what has ended have none.
        let exe = proc.join(process).join("exe");
        exe.read_link().is_ok().then(|| std::fs::metadata(exe).map(|meta| (meta.dev(), meta.ino())).ok())
    };
    let own = program("self").flatten();
    let mut all = Processes::default();
    for entry in std::fs::read_dir(proc).into_iter().flatten().flatten() {
        if let Some((number, name)) = entry.file_name().to_str().and_then(|name| Some((name.parse().ok()?, name)))
            && number != 1
            && let Some(program) = program(name)
        {
            let agent = program.is_some() && program == own;
            if agent { all.of_the_agent.push(number) } else { all.others.push(number) }
        }
    }
    all
}

/// Takes the file systems on disks out, the last mounted first; the root becomes read-only.
fn unmount_all() {
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ');
        let (Some(source), Some(target)) = (fields.next(), fields.next()) else { continue };
        // Others (tmpfs, proc) hold nothing that stays; shares are the host's.
        if source.starts_with("/dev/") {
            let target = target.replace("\\040", " ");
            if unmount(&target, UnmountFlags::empty()).is_err() {
                let _ = mount_remount(&target, MountFlags::RDONLY, c"");
            }
        }
    }
    rustix::fs::sync();
}

fn now(reboot: bool) -> io::Result<()> {
    let how = if reboot { RebootCommand::Restart } else { RebootCommand::PowerOff };
    rustix::system::reboot(how).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn who_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, program) = (dir.path().join("agent"), dir.path().join("program"));
        std::fs::write(&agent, "").unwrap();
        std::fs::write(&program, "").unwrap();
        let process = |name: &str, exe: Option<&Path>| {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            if let Some(exe) = exe {
                symlink(exe, dir.path().join(name).join("exe")).unwrap();
            }
        };
        for (name, exe) in [
            ("self", Some(&*agent)),
            ("1", Some(&*agent)),
            ("2", None),
            ("30", Some(&*agent)),
            ("31", Some(&*program)),
            ("32", None),
            // Removed meanwhile.
            ("33", Some(Path::new("/no such program (deleted)"))),
            ("tty", Some(&*program)),
        ] {
            process(name, exe);
        }
        let mut all = processes(dir.path());
        all.others.sort_unstable();
        assert_eq!((all.of_the_agent, all.others), (vec![30], vec![31, 33]));
    }
}
