//! Switching the machine off, and starting it again.

use std::io;
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
    system::kill_all(libc::SIGTERM);
    system::kill_all(libc::SIGCONT);
    while system::kill_all(0) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(2));
    }
    system::kill_all(libc::SIGKILL);
    rustix::fs::sync();
    unmount_all();
    now(reboot)
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
