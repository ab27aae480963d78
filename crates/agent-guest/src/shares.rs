//! Directories of the host, which the kernel command line names: `tightrope.share=TAG:DIR[:ro]`, a word each.

use std::fs;
use std::path::Path;

use rustix::mount::{MountFlags, mount};

use crate::init::is_mounted;

/// Mounts those that nobody has mounted yet.
pub fn mount_all() {
    for share in parse(&fs::read_to_string("/proc/cmdline").unwrap_or_default()) {
        if is_mounted(Path::new(share.dir)) {
            continue;
        }
        let _ = fs::create_dir_all(share.dir);
        let flags = if share.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        if let Err(error) = mount(share.tag, share.dir, "virtiofs", flags, None::<&std::ffi::CStr>) {
            crate::complain(&format!("cannot mount the shared directory {} at {}: {error}", share.tag, share.dir));
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Share<'c> {
    tag: &'c str,
    dir: &'c str,
    read_only: bool,
}

fn parse(cmdline: &str) -> Vec<Share<'_>> {
    cmdline.split_whitespace().filter_map(Share::parse).collect()
}

impl<'c> Share<'c> {
    fn parse(word: &'c str) -> Option<Self> {
        let (tag, rest) = word.strip_prefix("tightrope.share=")?.split_once(':')?;
        let (dir, read_only) = rest.strip_suffix(":ro").map_or((rest, false), |dir| (dir, true));
        (!tag.is_empty() && dir.starts_with('/')).then_some(Self { tag, dir, read_only })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words() {
        let line = "quiet tightrope.share=share0:/tmp/y tightrope.share=s1:/data:ro tightrope.share=bad tightrope.share=x:rel root=/dev/vda\n";
        let both = [
            Share { tag: "share0", dir: "/tmp/y", read_only: false },
            Share { tag: "s1", dir: "/data", read_only: true },
        ];
        assert_eq!(parse(line), both);
        assert_eq!(parse(""), []);
    }
}
