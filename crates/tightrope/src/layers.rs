//! The disks that VMs of an image write to: a layer each over the image's own, which is never written.
//!
//! ```text
//! ~/.local/share/tightrope/layers/
//!   run-<process>-<time>.qcow2   of a VM that is just being started; removed as soon as it is open, so it ends with the VM
//!   <name>/                      kept by --keep NAME
//!     disk.qcow2, layer.json     the layer, and over which image
//!     lock                       flock(2)ed while a VM runs with it
//! ```

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use image::{Image, ImageStore};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// After this time a file of a VM that was just being started is what a crash left.
const STARTING: Duration = Duration::from_secs(600);

/// What a kept layer is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Kept {
    /// The name of the image below it.
    pub image: String,
    /// The digest of that image.
    pub digest: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
}

/// A disk for a VM.
#[derive(Debug)]
pub struct Layer {
    /// Its file.
    pub path: PathBuf,
    /// Whether it is to be removed once it is open.
    pub temporary: bool,
}

fn directory(store: &ImageStore) -> PathBuf {
    store.root().join("layers")
}

/// Checks a name that a user gave to a layer.
///
/// # Errors
/// One line that says what names are possible.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let good = name.len() <= 64 && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(plain);
    if !good || name.starts_with("run-") {
        bail!("'{name}' is no name for a disk that is kept: up to 64 letters, digits, -, _ and ., not run-…");
    }
    // `tightrope rm` takes the names of both.
    if [image::reference::BUSYBOX, image::reference::DEBIAN].contains(&name) {
        bail!("'{name}' is an image's name: choose another one for --keep");
    }
    Ok(())
}

/// The layer of a VM that ends with it.
///
/// # Errors
/// One line for the user: no space, no right to write.
pub fn temporary(store: &ImageStore, image: &Image) -> Result<Layer> {
    let layers = directory(store);
    fs::create_dir_all(&layers).with_context(|| format!("cannot make {}", layers.display()))?;
    clear(&layers);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let path = layers.join(format!("run-{}-{}.qcow2", std::process::id(), now.as_nanos()));
    make(&path, image)?;
    Ok(Layer { path, temporary: true })
}

/// The layer that is kept under a name: made if it is not there. It is locked until this process ends.
///
/// # Errors
/// One line for the user: a VM runs with it, or it stands on another image.
pub fn kept(store: &ImageStore, image: &Image, name: &str) -> Result<Layer> {
    check_name(name)?;
    let dir = directory(store).join(name);
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let Some(lock) = lock(&dir)? else {
        bail!("the disk '{name}' is in use by a running VM: stop that first, or choose another name for --keep");
    };
    // It belongs to this process, which is the VM, to its end.
    std::mem::forget(lock);
    let (path, about) = (dir.join("disk.qcow2"), dir.join("layer.json"));
    match read(&dir) {
        Some(kept) if kept.digest == image.manifest.digest => {}
        Some(kept) => bail!("the disk '{name}' stands on the image {}: choose another name for --keep", kept.image),
        None => {
            // Without its description it is what an interrupted attempt left.
            let _ = fs::remove_file(&path);
            make(&path, image)?;
            let created = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let kept = Kept { image: image.manifest.name.clone(), digest: image.manifest.digest.clone(), created };
            image::cache::write_atomically(&about, &serde_json::to_vec_pretty(&kept)?)?;
        }
    }
    Ok(Layer { path, temporary: false })
}

/// Makes an empty layer over an image.
fn make(path: &Path, image: &Image) -> Result<()> {
    let base = disk::DiskConfig { format: Some(disk::Format::Raw), ..disk::DiskConfig::new(image.disk()) };
    let backing = Some(disk::trusting(base));
    disk::create(&disk::Create { path: path.to_path_buf(), size: None, format: disk::Format::Qcow2, backing })?;
    Ok(())
}

/// All that are kept, by name.
pub fn list(store: &ImageStore) -> Vec<(String, Kept)> {
    let entries = fs::read_dir(directory(store)).into_iter().flatten().flatten();
    let mut all: Vec<_> = entries.filter_map(|e| Some((e.file_name().into_string().ok()?, read(&e.path())?))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

/// What one takes up on the host's disk, in bytes.
pub fn size(store: &ImageStore, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let disk = directory(store).join(name).join("disk.qcow2");
    fs::metadata(disk).map_or(0, |m| m.blocks().saturating_mul(512))
}

/// Removes one.
///
/// # Errors
/// One line for the user: a VM runs with it.
pub fn remove(store: &ImageStore, name: &str) -> Result<()> {
    let dir = directory(store).join(name);
    let Some(_lock) = lock(&dir)? else { bail!("the disk '{name}' is in use by a running VM: stop that first") };
    fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()))
}

fn read(dir: &Path) -> Option<Kept> {
    serde_json::from_slice(&fs::read(dir.join("layer.json")).ok()?).ok()
}

/// Takes the lock of a kept layer; `None` if a VM has it.
fn lock(dir: &Path) -> Result<Option<File>> {
    let path = dir.join("lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.with_context(|| format!("cannot open {}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("cannot lock {}", path.display())),
    }
}

/// Removes what VMs left that ended between making their layer and opening it.
fn clear(layers: &Path) {
    for entry in fs::read_dir(layers).into_iter().flatten().flatten() {
        let old = || Some(entry.metadata().ok()?.modified().ok()?.elapsed().ok()? > STARTING);
        if entry.file_name().to_string_lossy().starts_with("run-") && old() == Some(true) {
            // If it cannot be removed it costs space, nothing more.
            let _ = fs::remove_file(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_kept_disks() {
        for good in ["work", "a.b-c_1", "0"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "-x", "a/b", "a b", "run-1", "debian", "busybox", &"x".repeat(65)] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
    }
}
