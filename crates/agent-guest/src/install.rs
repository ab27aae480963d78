//! Into a system with a process 1 of its own, from the initramfs: the program and a unit of systemd go to `/run`, which is memory, so the
//! disk stays as it is.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{StatVfsMountFlags, statvfs};
use rustix::mount::{MountFlags, mount};

/// Late enough that file systems are mounted, early enough for what a user wants to look at.
const TARGET: &str = "basic.target";
const UNIT: &str = "\
[Unit]
Description=Tightrope agent
DefaultDependencies=no
After=local-fs.target systemd-tmpfiles-setup.service
Conflicts=shutdown.target
Before=shutdown.target

[Service]
ExecStart=/run/tightrope/agent daemon
Restart=always
RestartSec=1
KillMode=process
OOMScoreAdjust=-900
";

/// Puts the agent into the system at `root`, whose `/run` becomes a tmpfs if it is none.
///
/// # Errors
/// Something cannot be written.
pub fn install(root: &Path) -> io::Result<()> {
    let run = root.join("run");
    fs::create_dir_all(&run)?;
    let mounted = fs::metadata(&run)?.dev() != fs::metadata(root)?.dev();
    if !mounted {
        mount("tmpfs", &run, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
    }
    let own = run.join("tightrope");
    fs::create_dir_all(&own)?;
    // Debian's initramfs mounts /run so that nothing in it can be executed.
    if statvfs(&own)?.f_flag.contains(StatVfsMountFlags::NOEXEC) {
        mount("tmpfs", &own, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, c"mode=0755")?;
    }
    write(&own, &run)
}

fn write(own: &Path, run: &Path) -> io::Result<()> {
    let program = own.join("agent");
    fs::copy("/proc/self/exe", &program)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let units = run.join("systemd/system");
    let wants = units.join(format!("{TARGET}.wants"));
    fs::create_dir_all(&wants)?;
    let unit = "tightrope-agent.service";
    fs::write(units.join(unit), UNIT)?;
    let link = wants.join(unit);
    let _ = fs::remove_file(&link);
    symlink(format!("../{unit}"), link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_and_unit() {
        let dir = tempfile::tempdir().unwrap();
        let (run, own) = (dir.path().join("run"), dir.path().join("run/tightrope"));
        fs::create_dir_all(&own).unwrap();
        for _ in 0..2 {
            write(&own, &run).unwrap();
        }
        assert_eq!(fs::metadata(own.join("agent")).unwrap().permissions().mode() & 0o777, 0o755);
        let link = run.join("systemd/system/basic.target.wants/tightrope-agent.service");
        assert!(fs::read_to_string(link).unwrap().contains("ExecStart=/run/tightrope/agent daemon"));
    }
}
