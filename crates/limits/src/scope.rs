//! Where systemd runs the host, control groups are its own: a process may not make some as it likes, and a user may make none at all in a
//! session. It makes a scope with limits when asked (`systemd-run --scope`), for users by the manager of their own.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::groups::Host;
use crate::{Error, Limits, Version};

/// The command that runs `program` with `arguments` in a scope with these limits, in place of the process that executes it; `None` where
/// systemd does not run, or does not listen to this user.
pub fn command(limits: &Limits, program: &Path, arguments: &[OsString]) -> Option<Command> {
    if !Path::new("/run/systemd/system").is_dir() {
        return None;
    }
    let user = !rustix::process::geteuid().is_root();
    if user {
        let runtime = PathBuf::from(std::env::var_os("XDG_RUNTIME_DIR")?);
        let is_socket = |name: &str| fs::metadata(runtime.join(name)).is_ok_and(|meta| meta.file_type().is_socket());
        if !is_socket("bus") && !is_socket("systemd/private") {
            return None;
        }
    }
    let run = std::env::split_paths(&std::env::var_os("PATH")?)
        .map(|dir| dir.join("systemd-run"))
        .find(|path| path.is_file())?;
    let mut command = Command::new(run);
    command.args(words(limits, user)).arg("--").arg(program).args(arguments);
    Some(command)
}

fn words(limits: &Limits, user: bool) -> Vec<OsString> {
    let mut words: Vec<OsString> = Vec::new();
    if user {
        words.push("--user".into());
    }
    words.extend(["--scope", "--quiet", "--collect", "--description=Tightrope VM"].map(OsString::from));
    let mut property = |text: String| words.extend([OsStr::new("-p").to_owned(), text.into()]);
    if let Some(share) = limits.cpu_share {
        property(format!("CPUWeight={}", share.0));
    }
    if let Some(limit) = limits.cpu_limit {
        property(format!("CPUQuota={}%", limit.0));
    }
    if let Some(bytes) = limits.memory {
        property(format!("MemoryMax={bytes}"));
    }
    words
}

/// Do these limits hold for the group that the calling process is in? (A user's manager can only pass on what it has itself.)
///
/// # Errors
/// [`Error::NotDelegated`]
pub fn check(limits: &Limits, host: &Host) -> Result<(), Error> {
    for controller in limits.controllers() {
        let holds = host.place(controller).is_some_and(|place| {
            limits.settings(controller, place.version).iter().all(|(file, text)| {
                let is = fs::read_to_string(place.group.join(file)).unwrap_or_default();
                same(file, text, is.trim(), place.version)
            })
        });
        if !holds {
            return Err(Error::NotDelegated(limits.option(controller), controller));
        }
    }
    Ok(())
}

/// Does a file say what it should? The kernel rounds memory to pages, and shares of version 1 are systemd's conversion of a weight.
fn same(file: &str, wanted: &str, is: &str, version: Version) -> bool {
    let number = |text: &str| text.parse::<u64>().ok();
    match (file, version) {
        ("memory.max" | "memory.limit_in_bytes", _) => number(is).is_some_and(|is| Some(is) <= number(wanted)),
        ("cpu.shares", Version::One) => number(is).is_some_and(|is| is != 1024 || wanted == "1024"),
        _ => is == wanted,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CpuLimit, CpuShare};

    const ALL: Limits = Limits { cpu_share: Some(CpuShare(50)), cpu_limit: Some(CpuLimit(150)), memory: Some(10_000) };

    #[test]
    fn what_systemd_is_asked() {
        let words = words(&ALL, true);
        assert_eq!(words[0], "--user");
        let text: Vec<_> = words.iter().map(|word| word.to_str().unwrap()).collect();
        assert!(text.join(" ").ends_with("-p CPUWeight=50 -p CPUQuota=150% -p MemoryMax=10000"), "{text:?}");
    }

    #[test]
    fn limits_that_do_not_hold_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let mounts = format!("1 1 0:1 / {} rw - cgroup2 cgroup2 rw\n", dir.path().display());
        let host = Host::of("0::/x.scope\n", &mounts);
        let own = dir.path().join("x.scope");
        fs::create_dir(&own).unwrap();
        fs::write(own.join("memory.max"), "8192\n").unwrap();
        let memory = Limits { memory: Some(10_000), ..Limits::default() };
        check(&memory, &host).unwrap();
        let error = check(&ALL, &host).unwrap_err().to_string();
        assert!(error.contains("--cpu-limit") && error.contains("'cpu'"), "{error}");
        fs::write(own.join("cpu.max"), "150000 100000\n").unwrap();
        fs::write(own.join("cpu.weight"), "50\n").unwrap();
        check(&ALL, &host).unwrap();
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert!(check(&memory, &host).is_err());
    }
}
