//! qcow2 images (QEMU, docs/interop/qcow2.txt), by the `imago` library.
//!
//! * [`header`]: the header, checked. * `chain`: backing files. * `tables`: a look at the tables before use. * [`check`]: a thorough one.
//!
//! The order of writes is the library's: refcounts reach the file before what refers to the clusters, and a cluster's data before
//! both. So a process that is killed leaves at worst clusters that nobody uses. A completed flush has written all tables and synced the file.

mod chain;
pub mod check;
pub mod header;
mod storage;
mod tables;
#[cfg(test)]
mod tests;

use std::io;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use imago::format::PreallocateMode;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::{FormatAccess, FormatCreateBuilder};

use crate::backend::{Backend, Slice};
use crate::error::DiskError;
use crate::file::DiskFile;
use crate::options::{Backing, Format};
pub(crate) use chain::{read_header, shown};
use header::Header;
use storage::ImageFile;

type Access = FormatAccess<ImageFile>;

/// An open qcow2 image with its backing files.
#[derive(Debug)]
pub struct Qcow2 {
    /// Written to where something else may hold on to a cluster that is given up: discards and new sizes.
    access: RwLock<ManuallyDrop<Access>>,
    size: AtomicU64,
    /// The library failed in a way that leaves its tables in doubt; nothing is done any more.
    failed: AtomicBool,
    /// The files under it, the nearest first.
    backing: Vec<(PathBuf, Format)>,
    header: Header,
    /// Set to an error's number, nothing is written any more.
    fail_writes: Arc<AtomicI32>,
}

impl Qcow2 {
    /// Opens the image in `file` and its backing files, as far as `grant` goes.
    ///
    /// # Errors
    /// [`DiskError`]: what is wrong with the image or a file it stands on.
    pub fn open(file: DiskFile, grant: &Backing, writable: bool) -> Result<Self, DiskError> {
        let path = file.path.clone();
        let mut layers = chain::open(file, grant, writable)?;
        let backing = layers
            .iter()
            .skip(1)
            .map(|layer| (layer.file.path.clone(), if layer.header.is_some() { Format::Qcow2 } else { Format::Raw }))
            .collect();
        let header = layers.first().and_then(|layer| layer.header.clone());
        let header = header.ok_or_else(|| DiskError::image(&path, "is not a qcow2 image"))?;
        let mut under: Option<Access> = None;
        let mut fail_writes = Arc::default();
        while let Some(layer) = layers.pop() {
            let writable = writable && layers.is_empty();
            let path = layer.file.path.clone();
            let has_header = layer.header.is_some();
            let storage = ImageFile::new(layer.file);
            fail_writes = storage.fail_writes.clone();
            let opened = caught(|| {
                if !has_header {
                    return Ok(Access::new(imago::raw::Raw::open_image(storage, false)?));
                }
                let mut image = imago::qcow2::Qcow2::open_image(storage, writable)?;
                image.set_data_file(None);
                image.set_backing(under.take());
                Ok(Access::new(image))
            });
            under = Some(
                opened
                    .map_err(|error| DiskError::image(&path, format!("is damaged ({})", shown(&error.to_string()))))?,
            );
        }
        let access = under.ok_or_else(|| DiskError::image(&path, "is not a qcow2 image"))?;
        Ok(Self {
            size: AtomicU64::new(access.size()),
            access: RwLock::new(ManuallyDrop::new(access)),
            failed: AtomicBool::new(false),
            backing,
            header,
            fail_writes,
        })
    }

    /// The files under it, the nearest first.
    pub fn backing(&self) -> &[(PathBuf, Format)] {
        &self.backing
    }

    /// Its header, as it was when it was opened.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Runs `work` with the image; a panic in the library is an error then and for ever.
    fn with<T>(&self, work: impl FnOnce(&Access) -> io::Result<T>) -> io::Result<T> {
        self.check()?;
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        self.judge(caught(|| work(&access)))
    }

    /// As [`Self::with`], with nobody else at it.
    fn alone<T>(&self, work: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        self.check()?;
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        self.judge(caught(|| work(&mut access)))
    }

    fn check(&self) -> io::Result<()> {
        if self.failed.load(Ordering::SeqCst) { Err(in_doubt()) } else { Ok(()) }
    }

    fn judge<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.as_ref().is_err_and(|error| error.get_ref().is_some_and(|inner| inner.is::<Panicked>())) {
            self.failed.store(true, Ordering::SeqCst);
        }
        result
    }
}

impl Drop for Qcow2 {
    /// Writes the tables, if they can be trusted.
    fn drop(&mut self) {
        let access = self.access.get_mut().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: taken once, here; nobody uses it afterwards.
        let access = unsafe { ManuallyDrop::take(access) };
        if *self.failed.get_mut() {
            self.fail_writes.store(libc::EIO, Ordering::SeqCst);
        }
        let _ = catch_unwind(AssertUnwindSafe(|| drop(access)));
    }
}

/// The library panicked.
#[derive(Debug, thiserror::Error)]
#[error("the image is damaged in a way that the library for qcow2 does not bear")]
struct Panicked;

fn in_doubt() -> io::Error {
    io::Error::other("an earlier failure left its tables in doubt")
}

/// Runs `work`; a panic becomes an error.
fn caught<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| Err(io::Error::other(Panicked)))
}

impl Backend for Qcow2 {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, buffers: &[Slice<'_>]) -> (u64, io::Result<()>) {
        let bytes = buffers.iter().map(|piece| piece.len() as u64).sum();
        // The library does not bear empty buffers.
        if bytes == 0 {
            return (0, self.check());
        }
        let buffers: Vec<_> = buffers.iter().filter(|piece| !piece.is_empty()).collect();
        let (vector, _guard) = IoVectorMut::from_volatile_slice(buffers);
        match self.with(|access| access.readv(vector, offset)) {
            // What was read before a failure is not told; the memory counts as written all the same.
            Err(error) => (bytes, Err(error)),
            Ok(()) => (bytes, Ok(())),
        }
    }

    fn write(&self, offset: u64, buffers: &[Slice<'_>]) -> io::Result<()> {
        let buffers: Vec<_> = buffers.iter().filter(|piece| !piece.is_empty()).collect();
        if buffers.is_empty() {
            return self.check();
        }
        let (vector, _guard) = IoVector::from_volatile_slice(buffers);
        self.with(|access| access.writev(vector, offset))
    }

    fn flush(&self) -> io::Result<()> {
        self.with(|access| {
            access.flush()?;
            access.sync()
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> io::Result<()> {
        // Whole clusters only: the rest would have to be written as zeroes.
        match self.alone(|access| access.discard_to_any(offset, bytes)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            match self.alone(|access| access.discard_to_zero(offset, bytes)) {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                result => return result,
            }
        }
        self.with(|access| access.write_zeroes(offset, bytes))
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.alone(|access| {
            access.resize(bytes, PreallocateMode::None)?;
            access.flush()
        })?;
        self.size.store(bytes, Ordering::SeqCst);
        Ok(())
    }
}

/// Makes an empty image of `size` bytes in `file`, which is empty.
pub(crate) fn create(file: DiskFile, size: u64, backing: Option<(&str, Format)>) -> io::Result<()> {
    let mut builder = imago::qcow2::Qcow2::<ImageFile>::create_builder(ImageFile::new(file)).size(size);
    if let Some((name, format)) = backing {
        builder = builder.backing(name.to_string(), format.to_string());
    }
    caught(|| builder.create())
}

/// The name for `backing` in the header of an image at `image`: relative where both lie in one directory tree, so that they can be
/// moved together.
pub(crate) fn name_in_header(image_directory: &Path, backing: &Path) -> PathBuf {
    backing.strip_prefix(image_directory).unwrap_or(backing).to_path_buf()
}
