//! Making disks and changing them: what `tightrope disk` does, but for the check.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::backend::Slice;
use crate::disk::Disk;
use crate::error::DiskError;
use crate::file::{Access, DiskFile, SECTOR};
use crate::format;
use crate::options::{Backing, DiskConfig, Format};
use crate::qcow2;

/// Largest disk that is made: what the tables of a qcow2 image with clusters of 64 KiB can hold.
const MAX_SIZE: u64 = 1 << 51;
/// Bytes copied at once.
const CHUNK: usize = 2 << 20;
/// Zeroes of this size are not copied.
const PIECE: usize = 64 << 10;

/// A disk to be made.
#[derive(Clone, Debug)]
pub struct Create {
    /// Its file, which must not exist.
    pub path: PathBuf,
    /// Bytes, a multiple of 512; `None` for the size of the backing file.
    pub size: Option<u64>,
    /// Its format.
    pub format: Format,
    /// For a copy-on-write layer: the disk that it stands on, which must not be changed from then on. Needs [`Format::Qcow2`].
    pub backing: Option<DiskConfig>,
}

/// Makes an empty disk, or a copy-on-write layer over another. The file is complete and safe on the host's disk on return; on error
/// there is none.
///
/// # Errors
/// [`DiskError`]: the file exists or cannot be made, the size is not possible, the backing file is none.
pub fn create(create: &Create) -> Result<(), DiskError> {
    let path = &create.path;
    let mut name = None;
    let mut size = create.size;
    if let Some(backing) = &create.backing {
        if create.format != Format::Qcow2 {
            return Err(DiskError::image(path, "cannot stand on a backing file as a raw image: say --format qcow2"));
        }
        let base = Disk::open(&DiskConfig { read_only: true, shared: false, ..backing.clone() })?;
        // A qcow2 disk is made of whole sectors.
        size = size.or(Some(base.sectors() * SECTOR));
        let whole = backing.path.canonicalize().map_err(DiskError::io("open", &backing.path))?;
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let directory = directory.canonicalize().map_err(DiskError::io("make", path))?;
        let text = qcow2::name_in_header(&directory, &whole).to_str().map(str::to_owned);
        let text = text.filter(|text| text.len() <= 1023 && !text.contains(':'));
        let text = text.ok_or_else(|| {
            DiskError::image(
                &backing.path,
                "has a name that a qcow2 image cannot hold: no colons, UTF-8, at most 1023 bytes",
            )
        })?;
        name = Some((text, base.format()));
    }
    let size = size.ok_or_else(|| DiskError::image(path, "needs a size, for example 10G"))?;
    check_size(path, size)?;
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o644).open(path).map_err(|source| {
        if source.kind() == io::ErrorKind::AlreadyExists {
            DiskError::image(path, "exists already: remove it first, or choose another name")
        } else {
            DiskError::io("make", path)(source)
        }
    })?;
    let result = fill(file, create, size, name.as_ref().map(|(name, format)| (name.as_str(), *format)));
    if result.is_err() {
        let _ = std::fs::remove_file(path);
    }
    result
}

fn fill(file: std::fs::File, create: &Create, size: u64, backing: Option<(&str, Format)>) -> Result<(), DiskError> {
    let path = &create.path;
    let kept = file.try_clone().map_err(DiskError::io("make", path))?;
    match create.format {
        Format::Raw => file.set_len(size).map_err(DiskError::io("make", path))?,
        Format::Qcow2 => {
            let file = DiskFile::new(file, path, Access::Write)?;
            qcow2::create(file, size, backing).map_err(DiskError::io("make", path))?;
        }
    }
    kept.sync_all().map_err(DiskError::io("make", path))
}

pub(crate) fn check_size(path: &Path, size: u64) -> Result<(), DiskError> {
    if !(SECTOR..=MAX_SIZE).contains(&size) || !size.is_multiple_of(SECTOR) {
        let problem = format!("cannot have {size} bytes: a multiple of 512 up to 2 PiB is possible, for example 10G");
        return Err(DiskError::image(path, problem));
    }
    Ok(())
}

/// Gives a disk a new size. Partitions and file systems on it stay as they are.
///
/// # Errors
/// [`DiskError`]: in use, a block device, or smaller than it is and `shrink` not said.
pub fn resize(config: &DiskConfig, size: u64, shrink: bool) -> Result<(), DiskError> {
    check_size(&config.path, size)?;
    let disk = Disk::open(&DiskConfig { read_only: false, shared: false, ..config.clone() })?;
    let before = disk.backend().size();
    if size < before && !shrink {
        let problem =
            format!("has {before} bytes, and all behind byte {size} would be lost: say --shrink if you mean it");
        return Err(DiskError::image(&config.path, problem));
    }
    let changed = disk.backend().resize(size).and_then(|()| disk.backend().flush());
    changed.map_err(DiskError::io("resize", &config.path))
}

/// Copies a disk's contents to a new one, which stands on nothing. Zeroes take no space there. `progress` hears of the bytes done.
///
/// # Errors
/// [`DiskError`] of either disk; there is no new one then.
pub fn convert(
    from: &DiskConfig,
    to: &Path,
    format: Format,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), DiskError> {
    let source = Disk::open(&DiskConfig { read_only: true, shared: false, ..from.clone() })?;
    let size = source.sectors() * SECTOR;
    create(&Create { path: to.to_path_buf(), size: Some(size), format, backing: None })?;
    let result = copy(&source, to, format, progress);
    if result.is_err() {
        let _ = std::fs::remove_file(to);
    }
    result
}

fn copy(source: &Disk, to: &Path, format: Format, progress: &mut dyn FnMut(u64, u64)) -> Result<(), DiskError> {
    let target = Disk::open(&DiskConfig { format: Some(format), ..DiskConfig::new(to) })?;
    let size = target.sectors() * SECTOR;
    let mut buffer = vec![0; CHUNK];
    let mut at = 0;
    while at < size {
        let bytes = (size - at).min(CHUNK as u64);
        let chunk = buffer.get_mut(..bytes as usize).unwrap_or_default();
        source.read(at, &[Slice::from(&mut *chunk)]).1.map_err(DiskError::io("read", source.path()))?;
        for (number, piece) in chunk.chunks_mut(PIECE).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                let offset = at + (number * PIECE) as u64;
                target.write(offset, &[Slice::from(piece)]).map_err(DiskError::io("write", to))?;
            }
        }
        at += bytes;
        progress(at, size);
    }
    target.backend().flush().map_err(DiskError::io("write", to))
}

/// What [`info`] finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Info {
    /// Its format.
    pub format: Format,
    /// Bytes that a guest sees.
    pub size: u64,
    /// Bytes that the file takes on the host.
    pub allocated: u64,
    /// Bytes of a cluster of a qcow2 image.
    pub cluster: Option<u64>,
    /// Snapshots inside a qcow2 image.
    pub snapshots: u32,
    /// The backing file, as the image names it: not looked for.
    pub backing: Option<String>,
    /// Its format, as the image says.
    pub backing_format: Option<String>,
    /// Does somebody write to it now?
    pub in_use: bool,
}

/// Looks at a disk, without its backing files.
///
/// # Errors
/// [`DiskError`]: missing, no disk, or damaged.
pub fn info(config: &DiskConfig) -> Result<Info, DiskError> {
    let (file, in_use) = match DiskFile::open(&config.path, Access::Read) {
        Err(DiskError::InUse { .. }) => (DiskFile::open_unlocked(&config.path)?, true),
        file => (file?, false),
    };
    let problem = |problem| DiskError::image(&config.path, problem);
    let format = format::decide(&config.path, &file.head(16)?, config.format).map_err(problem)?;
    let meta = file.file.metadata().map_err(DiskError::io("open", &config.path))?;
    let allocated = if file.device { file.len } else { meta.blocks() * 512 };
    let raw = Info {
        format,
        size: file.len,
        allocated,
        cluster: None,
        snapshots: 0,
        backing: None,
        backing_format: None,
        in_use,
    };
    if format == Format::Raw {
        return Ok(raw);
    }
    let header = qcow2::read_header(&file)?;
    Ok(Info {
        size: header.size,
        cluster: Some(header.cluster()),
        snapshots: header.snapshots,
        backing: header.backing.as_deref().map(qcow2::shown),
        backing_format: header.backing_format.as_deref().map(qcow2::shown),
        ..raw
    })
}

/// The grant for backing files where a user names an image to a tool and not to a guest: what the user may read.
pub fn trusting(config: DiskConfig) -> DiskConfig {
    DiskConfig { backing: Backing::Anywhere, ..config }
}

#[cfg(test)]
mod tests;
