//! Looks at the disks' files while the VM runs: one that was made longer is longer for the guest too.

use std::time::Duration;

use virtio::SizeWatch;

use crate::terminal;

/// How often is looked.
const INTERVAL: Duration = Duration::from_secs(1);

/// Starts the thread that looks, if there is anything to look at.
pub(crate) fn watch(watches: Vec<SizeWatch>) -> std::io::Result<()> {
    if watches.is_empty() {
        return Ok(());
    }
    std::thread::Builder::new().name("disk-sizes".into()).spawn(move || {
        loop {
            std::thread::sleep(INTERVAL);
            for watch in &watches {
                if let Some(sectors) = watch.look() {
                    let (path, bytes) = (watch.path().display(), sectors * virtio::block::SECTOR);
                    terminal::message(&format!("tightrope: disk {path} has {bytes} bytes now"));
                }
            }
        }
    })?;
    Ok(())
}
