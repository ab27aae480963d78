//! The store of images: whole systems that were made here, kept until the user removes them.
//!
//! ```text
//! ~/.local/share/tightrope/
//!   lock                    flock(2)ed while an image is made or removed
//!   images/<id>/            an image
//!     manifest.json         what it is: written last, so a directory that has it is whole
//!     disk.raw              the root file system, sparse, never written again
//!     vmlinuz, initrd.cpio  what boots it
//!     kernel.deb, busybox.deb   what the two were made of, for a later initramfs
//!     build.log             what the guest said that made it
//!     lock                  flock(2)ed, shared, by each VM that runs it
//!   images/new-<id>/        one that is being made
//! ```
//!
//! It is data and no cache: making an image takes minutes and a mirror, and disks that users keep stand on it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::cache::{self, Cache, write_atomically};
use crate::error::{Error, Result};
use crate::host::Host;
use crate::http::Progress;
use crate::reference::Reference;

/// The store.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name, such as `debian:trixie+nginx`.
    pub name: String,
    /// SHA-256, in hexadecimal, over all that it is made of: packages by their hashes, recipe, settings. Equal digests are equal systems.
    pub digest: String,
    /// When it was made, in seconds since 1970.
    pub created: u64,
    /// The kernel's release.
    pub kernel: String,
    /// Size of the disk that the guest sees, in bytes.
    pub disk_size: u64,
    /// How the initramfs was made.
    pub initramfs: String,
    /// The packages in it.
    pub packages: Vec<Installed>,
}

/// A package in an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Installed {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// An image in the store.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
    /// What it is.
    pub manifest: Manifest,
}

/// Keeps an image from being removed until dropped.
#[derive(Debug)]
pub struct InUse(#[allow(dead_code, reason = "closing the file releases the lock")] File);

impl Image {
    /// The first digits of its digest, which name it, too.
    pub fn id(&self) -> &str {
        self.manifest.digest.get(..12).unwrap_or(&self.manifest.digest)
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The root file system, to be read only.
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }

    /// The kernel.
    pub fn vmlinuz(&self) -> PathBuf {
        self.dir.join("vmlinuz")
    }

    /// The initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join("initrd.cpio")
    }

    /// What it takes up on the host's disk, in bytes: holes take nothing.
    pub fn size(&self) -> u64 {
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        files.filter_map(|f| f.metadata().ok()).map(|m| m.blocks().saturating_mul(512)).sum()
    }

    /// Keeps it from being removed.
    ///
    /// # Errors
    /// [`Error::NoImage`] if it was removed at this very moment, [`Error::Io`].
    pub fn use_it(&self) -> Result<InUse> {
        let file = self.lock(FlockOperation::NonBlockingLockShared)?.ok_or_else(|| self.gone())?;
        // Somebody may have removed it between our finding and our locking it.
        if !self.dir.join("manifest.json").is_file() {
            return Err(self.gone());
        }
        Ok(InUse(file))
    }

    fn gone(&self) -> Error {
        Error::NoImage { name: self.manifest.name.clone(), hint: " any more".into() }
    }

    /// Takes its lock; `None` if somebody has it who does not share it.
    fn lock(&self, how: FlockOperation) -> Result<Option<File>> {
        let path = self.dir.join("lock");
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = open.map_err(|e| Error::io("open", &path, e))?;
        match flock(&file, how) {
            Ok(()) => Ok(Some(file)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(e) => Err(Error::io("lock", &path, e.into())),
        }
    }
}

impl ImageStore {
    /// The user's store.
    ///
    /// # Errors
    /// [`Error::NoDataDir`].
    pub fn open(host: &Host) -> Result<Self> {
        Ok(Self::at(host.data_dir()?))
    }

    /// The store in a directory, which need not be there.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Waits until nobody else makes or removes images.
    ///
    /// # Errors
    /// [`Error::CacheUnwritable`], [`Error::CacheFull`], [`Error::Io`].
    pub(crate) fn lock(&self, progress: Progress) -> Result<cache::Lock> {
        Cache::at(&self.root).lock_saying(progress, "waiting for another tightrope that is making an image")
    }

    /// All images, by name, the newest of each name first. What is not whole is left out.
    pub fn list(&self) -> Vec<Image> {
        let entries = fs::read_dir(self.root.join("images")).into_iter().flatten().flatten();
        let mut all: Vec<Image> = entries
            .filter(|e| !e.file_name().to_string_lossy().starts_with("new-"))
            .filter_map(|e| {
                let manifest = fs::read(e.path().join("manifest.json")).ok()?;
                Some(Image { dir: e.path(), manifest: serde_json::from_slice(&manifest).ok()? })
            })
            .collect();
        all.sort_by(|a, b| {
            let key = |i: &Image| (i.manifest.name.clone(), std::cmp::Reverse(i.manifest.created));
            key(a).cmp(&key(b))
        });
        all
    }

    /// The newest image of a name.
    pub fn find(&self, reference: &Reference) -> Option<Image> {
        let name = reference.to_string();
        self.list().into_iter().find(|i| i.manifest.name == name)
    }

    /// The images that a user means by a name or by the start of an id (at least four digits).
    pub fn named(&self, text: &str) -> Vec<Image> {
        let name = text.parse::<Reference>().map(|r| r.to_string());
        let is_id = text.len() >= 4 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let mut all = self.list();
        all.retain(|i| {
            name.as_ref().is_ok_and(|n| *n == i.manifest.name) || (is_id && i.manifest.digest.starts_with(text))
        });
        all
    }

    /// An empty directory to make an image in; what an interrupted attempt left is removed. The store must be locked.
    pub(crate) fn workshop(&self, digest: &str) -> Result<PathBuf> {
        self.clear_workshops();
        Cache::at(&self.root).dir(&format!("images/new-{}", digest.get(..12).unwrap_or(digest)))
    }

    /// Removes what interrupted attempts left; says how many bytes that were. The store must be locked.
    pub(crate) fn clear_workshops(&self) -> u64 {
        let entries = fs::read_dir(self.root.join("images")).into_iter().flatten().flatten();
        let unfinished = entries.filter(|e| {
            e.file_name().to_string_lossy().starts_with("new-") || !e.path().join("manifest.json").is_file()
        });
        unfinished
            .map(|e| {
                let files = fs::read_dir(e.path()).into_iter().flatten().flatten();
                let size = files.filter_map(|f| f.metadata().ok()).map(|m| m.blocks().saturating_mul(512)).sum();
                // If it cannot be removed it costs space, nothing more.
                fs::remove_dir_all(e.path()).map_or(0, |()| size)
            })
            .fold(0, u64::saturating_add)
    }

    /// Puts a finished image in its place. The store must be locked.
    pub(crate) fn adopt(&self, workshop: &Path, manifest: Manifest) -> Result<Image> {
        let text = serde_json::to_vec_pretty(&manifest).unwrap_or_default();
        write_atomically(&workshop.join("manifest.json"), &text)?;
        let mut image = Image { dir: PathBuf::new(), manifest };
        image.dir = self.root.join("images").join(image.id());
        fs::rename(workshop, &image.dir).map_err(|e| Error::io("rename", &image.dir, e))?;
        Ok(image)
    }

    /// Removes an image; says how many bytes that freed.
    ///
    /// # Errors
    /// [`Error::ImageInUse`], and failures of the file system.
    pub fn remove(&self, image: &Image, progress: Progress) -> Result<u64> {
        let _lock = self.lock(progress)?;
        let Some(_mine) = image.lock(FlockOperation::NonBlockingLockExclusive)? else {
            return Err(Error::ImageInUse { name: image.manifest.name.clone() });
        };
        let size = image.size();
        // The manifest first: from then on it is no image.
        let manifest = image.dir.join("manifest.json");
        fs::remove_file(&manifest).map_err(|e| Error::io("remove", &manifest, e))?;
        fs::remove_dir_all(&image.dir).map_err(|e| Error::io("remove", &image.dir, e))?;
        Ok(size)
    }

    /// Removes images that a newer one of their name has replaced (those in use stay) and what interrupted attempts left; `keep` says which
    /// must stay all the same. Returns the bytes freed.
    ///
    /// # Errors
    /// Failures of the file system.
    pub fn prune(&self, progress: Progress, keep: impl Fn(&Image) -> bool) -> Result<u64> {
        let mut freed = 0;
        if self.root.is_dir() {
            let _lock = self.lock(progress)?;
            freed = self.clear_workshops();
        }
        let all = self.list();
        for pair in all.windows(2) {
            let [newer, image] = pair else { continue };
            if newer.manifest.name != image.manifest.name || keep(image) {
                continue;
            }
            match self.remove(image, progress) {
                Ok(bytes) => freed += bytes,
                Err(Error::ImageInUse { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(freed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, ImageStore) {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::at(dir.path().join("data"));
        (dir, store)
    }

    fn add(store: &ImageStore, name: &str, digest: &str, created: u64) -> Image {
        let _lock = store.lock(Progress::Quiet).unwrap();
        let workshop = store.workshop(digest).unwrap();
        fs::write(workshop.join("disk.raw"), [1; 5000]).unwrap();
        let manifest = Manifest {
            name: name.parse::<Reference>().unwrap().to_string(),
            digest: digest.to_owned(),
            created,
            kernel: "6".into(),
            disk_size: 1,
            initramfs: "x".into(),
            packages: Vec::new(),
        };
        store.adopt(&workshop, manifest).unwrap()
    }

    #[test]
    fn images_are_found_by_name_and_id() {
        let (_d, store) = store();
        assert!(store.list().is_empty());
        add(&store, "debian:12", "aaaaaaaaaaaaaaaa", 1);
        add(&store, "debian", "bbbbbbbbbbbbbbbb", 1);
        add(&store, "debian", "cccccccccccccccc", 2);
        let names: Vec<String> = store.list().iter().map(|i| format!("{} {}", i.manifest.name, i.id())).collect();
        assert_eq!(names, ["debian:bookworm aaaaaaaaaaaa", "debian:trixie cccccccccccc", "debian:trixie bbbbbbbbbbbb"]);
        assert_eq!(store.find(&"debian:13".parse().unwrap()).unwrap().id(), "cccccccccccc");
        assert!(store.find(&"debian:13+vim".parse().unwrap()).is_none());
        assert_eq!((store.named("debian").len(), store.named("bbbb").len(), store.named("bbb").len()), (2, 1, 0));
    }

    #[test]
    fn nothing_half_made_is_an_image() {
        let (_d, store) = store();
        let lock = store.lock(Progress::Quiet).unwrap();
        let workshop = store.workshop("dddddddddddddddd").unwrap();
        fs::write(workshop.join("disk.raw"), [1; 5000]).unwrap();
        drop(lock);
        assert!(store.list().is_empty());
        // The next one who makes something removes it.
        let image = add(&store, "debian", "eeeeeeeeeeeeeeee", 1);
        assert!(!workshop.exists());
        // One whose removal was interrupted is none either.
        fs::remove_file(image.dir().join("manifest.json")).unwrap();
        assert!(store.list().is_empty() && image.use_it().is_err());
        assert!(store.prune(Progress::Quiet, |_| false).unwrap() >= 5000);
        assert!(!image.dir().exists());
    }

    #[test]
    fn images_in_use_stay() {
        let (_d, store) = store();
        let old = add(&store, "debian", "aaaaaaaaaaaaaaaa", 1);
        let new = add(&store, "debian", "bbbbbbbbbbbbbbbb", 2);
        let (first, second) = (old.use_it().unwrap(), old.use_it().unwrap());
        assert!(matches!(store.remove(&old, Progress::Quiet), Err(Error::ImageInUse { .. })));
        assert_eq!(store.prune(Progress::Quiet, |_| false).unwrap(), 0);
        drop((first, second));
        assert_eq!(store.prune(Progress::Quiet, |_| true).unwrap(), 0);
        assert!(store.prune(Progress::Quiet, |_| false).unwrap() >= 5000);
        assert_eq!(store.list().len(), 1);
        store.remove(&new, Progress::Quiet).unwrap();
        assert!(store.list().is_empty());
    }
}
