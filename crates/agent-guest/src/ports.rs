//! Names of virtio ports, where no udev gives them: /dev/virtio-ports/NAME.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

/// Makes the links for the ports that are there.
pub fn link() {
    if Path::new("/run/udev").exists() {
        return;
    }
    link_in(Path::new("/sys/class/virtio-ports"), Path::new("/dev/virtio-ports"));
}

fn link_in(class: &Path, links: &Path) {
    for port in fs::read_dir(class).into_iter().flatten().flatten() {
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let name = name.trim_end_matches('\n');
        // The host makes the names; they are for one directory all the same.
        if !name.is_empty() && !name.contains('/') && !name.starts_with('.') {
            let _ = fs::create_dir_all(links);
            let _ = symlink(Path::new("..").join(port.file_name()), links.join(name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links() {
        let dir = std::env::temp_dir().join(format!("agent-ports-{}", std::process::id()));
        let (class, links) = (dir.join("class"), dir.join("links"));
        for (port, name) in [("vport1p1", Some("org.a\n")), ("vport1p2", Some("../x\n")), ("vport1p3", None)] {
            fs::create_dir_all(class.join(port)).unwrap();
            if let Some(name) = name {
                fs::write(class.join(port).join("name"), name).unwrap();
            }
        }
        link_in(&class, &links);
        link_in(&class, &links);
        let there: Vec<_> = fs::read_dir(&links).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(there, ["org.a"]);
        assert_eq!(fs::read_link(links.join("org.a")).unwrap(), Path::new("../vport1p1"));
        fs::remove_dir_all(dir).unwrap();
    }
}
