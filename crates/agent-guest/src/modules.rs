//! Kernel modules of the virtual machine's devices that are there.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::system;

/// The module of a device by its PCI vendor and device id (virtio 1.3, 4.1.2: 0x1af4, transitional ids below 0x1040).
fn module(vendor: &str, id: &str) -> Option<&'static str> {
    if vendor.trim() != "0x1af4" {
        return (vendor.trim() == "0x8086" && id.trim() == "0x25ab").then_some("i6300esb");
    }
    Some(match id.trim() {
        "0x1041" | "0x1000" => "virtio_net",
        "0x1042" | "0x1001" => "virtio_blk",
        "0x1043" | "0x1003" => "virtio_console",
        "0x1044" | "0x1005" => "virtio_rng",
        "0x1045" | "0x1002" => "virtio_balloon",
        "0x1048" | "0x1004" => "virtio_scsi",
        "0x1053" => VSOCK,
        "0x105a" => "virtiofs",
        _ => return None,
    })
}

/// The module of the agent's own device.
pub const VSOCK: &str = "vmw_vsock_virtio_transport";

/// The modules of all such devices; the agent's own first.
pub fn needed() -> Vec<&'static str> {
    let mut names = Vec::new();
    for device in fs::read_dir("/sys/bus/pci/devices").into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(device.path().join(name)).unwrap_or_default();
        if let Some(name) = module(&read("vendor"), &read("device"))
            && !names.contains(&name)
        {
            names.push(name);
        }
    }
    names.sort_by_key(|name| *name != VSOCK);
    names
}

/// Loads modules with what they depend on; by modprobe where their files are not such as the kernel takes.
pub fn load(names: &[&str]) {
    let mut left = Vec::new();
    if let Some(tree) = Tree::open() {
        for name in names {
            if !tree.load(name, 0) {
                left.push(*name);
            }
        }
    } else {
        left.extend(names);
    }
    if !left.is_empty() {
        let _ = Command::new("modprobe").args(["-a", "-q"]).args(left).stdin(Stdio::null()).status();
    }
}

/// `modules.dep`.
struct Tree {
    base: PathBuf,
    /// By name: file, and files it depends on, the first needed last.
    modules: BTreeMap<String, Vec<String>>,
}

impl Tree {
    fn open() -> Option<Self> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
        let base = Path::new("/lib/modules").join(release.trim());
        let text = fs::read_to_string(base.join("modules.dep")).ok()?;
        Some(Self { base, modules: parse(&text) })
    }

    fn load(&self, name: &str, depth: u32) -> bool {
        if Path::new("/sys/module").join(name).exists() {
            return true;
        }
        let Some((file, needed)) = self.modules.get(name).and_then(|files| files.split_first()) else { return false };
        if depth > 20 || !file.ends_with(".ko") {
            return false;
        }
        if !needed.iter().rev().all(|file| self.load(&module_name(file), depth + 1)) {
            return false;
        }
        fs::File::open(self.base.join(file)).and_then(|file| system::load_module(&file)).is_ok()
    }
}

fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or_default();
    name.split('.').next().unwrap_or_default().replace('-', "_")
}

fn parse(text: &str) -> BTreeMap<String, Vec<String>> {
    let line = |line: &str| {
        let (file, needed) = line.split_once(':')?;
        let files = std::iter::once(file).chain(needed.split_whitespace()).map(str::to_owned).collect();
        Some((module_name(file), files))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies() {
        let all = parse("kernel/virtio.ko:\nkernel/a-b.ko: kernel/virtio.ko kernel/x.ko.xz\nnonsense\n");
        assert_eq!(all["virtio"], ["kernel/virtio.ko"]);
        assert_eq!(all["a_b"], ["kernel/a-b.ko", "kernel/virtio.ko", "kernel/x.ko.xz"]);
        assert_eq!(module_name("kernel/x-y.ko.xz"), "x_y");
    }

    #[test]
    fn devices() {
        for (vendor, id, name) in [
            ("0x1af4\n", "0x1045\n", Some("virtio_balloon")),
            ("0x8086\n", "0x25ab\n", Some("i6300esb")),
            ("0x8086\n", "0x1042\n", None),
            ("", "", None),
        ] {
            assert_eq!(module(vendor, id), name);
        }
    }
}
