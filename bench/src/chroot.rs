//! Running the user land on the host itself: a mount namespace of its own, a temporary file system on its `/tmp`, and
//! `chroot`. Works as root, and as a user through a user namespace.

use std::path::Path;
use std::process::{Command, Stdio};

/// Whether we run as root.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// `$1` is the root directory, the rest the command.
const ENTER: &str = r#"
root=$1
shift
mount -t tmpfs -o mode=1777 tmp "$root/tmp" &&
mount --rbind /proc "$root/proc" &&
mount --rbind /sys "$root/sys" &&
mount --rbind /dev "$root/dev" || {
    echo "bench: cannot mount inside a namespace here: run as root, or where user namespaces are allowed" >&2
    exit 125
}
exec chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C "$@"
"#;

/// The command `args` inside `root`, with an environment of its own and no input.
pub fn command(root: &Path, args: &[&str]) -> Command {
    let mut c = Command::new("unshare");
    c.args(["--mount", "--propagation", "private"]);
    if !is_root() {
        c.arg("--map-root-user");
    }
    c.args(["sh", "-c", ENTER, "sh"]).arg(root).args(args).stdin(Stdio::null());
    c
}

/// As [`command`], with the host's root visible at `/host`, for programs that work on the host's files.
pub fn command_with_host(root: &Path, args: &[&str]) -> Command {
    let mut c = Command::new("unshare");
    c.args(["--mount", "--propagation", "private"]);
    if !is_root() {
        c.arg("--map-root-user");
    }
    let script = format!("mkdir -p \"$1/host\" && mount --rbind / \"$1/host\" || exit 125\n{ENTER}");
    c.args(["sh", "-c", &script, "sh"]).arg(root).args(args).stdin(Stdio::null());
    c
}
