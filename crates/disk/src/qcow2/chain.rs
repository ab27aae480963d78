//! The files under a qcow2 image: which it may name, and how they are opened.
//!
//! The image may come from anybody, so the name in its header is a request, not an order: a file is opened only where the user's
//! grant ([`Backing`]) covers it, read-only, whatever links lead there, and only if it is a file. All of this happens before the process confines itself.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};

use super::header::{Header, MAX_CLUSTER};
use super::tables;
use crate::error::DiskError;
use crate::file::{Access, DiskFile};
use crate::format;
use crate::options::{Backing, Format};

/// Most images over one another.
pub const MAX_LAYERS: usize = 16;
/// Most bytes that the caches of all layers may take. A layer's caches hold this many of its clusters.
const MAX_CACHES: u64 = 640 << 20;
const CACHED_CLUSTERS: u64 = 160;

/// One image of a chain.
#[derive(Debug)]
pub(crate) struct Layer {
    pub file: DiskFile,
    /// `None` for a raw image, the last of its chain.
    pub header: Option<Header>,
}

/// Opens a file that is known to be a qcow2 image and all that it stands on; the topmost comes first.
pub(crate) fn open(top: DiskFile, grant: &Backing, writable: bool) -> Result<Vec<Layer>, DiskError> {
    let grants = Grants::new(&top.path, grant)?;
    let mut layers: Vec<Layer> = Vec::new();
    let mut next = Some((top, Format::Qcow2));
    let mut caches = 0;
    while let Some((file, format)) = next.take() {
        if layers.iter().any(|layer| layer.file.identity == file.identity) {
            return Err(DiskError::image(&file.path, "is its own backing file: make it again"));
        }
        if layers.len() == MAX_LAYERS {
            return Err(DiskError::image(
                &file.path,
                format!(
                    "stands under {MAX_LAYERS} others, which is as many as are followed: tightrope disk convert makes one of them"
                ),
            ));
        }
        let header = match format {
            Format::Raw => None,
            Format::Qcow2 => {
                let header = read_header(&file)?;
                tables::check_reach(&file.file, &header, file.len, writable && layers.is_empty())
                    .map_err(|problem| DiskError::image(&file.path, problem))?;
                caches += header.cluster() * CACHED_CLUSTERS;
                if caches > MAX_CACHES {
                    let problem =
                        "and its backing files have clusters too large to be used together: tightrope disk convert";
                    return Err(DiskError::image(&file.path, problem));
                }
                if let Some(name) = &header.backing {
                    next = Some(grants.open(
                        &file.path,
                        name,
                        header.backing_format.as_deref(),
                        &layers,
                        file.identity,
                    )?);
                }
                Some(header)
            }
        };
        layers.push(Layer { file, header });
    }
    Ok(layers)
}

/// Reads and checks the header of a qcow2 image.
pub(crate) fn read_header(file: &DiskFile) -> Result<Header, DiskError> {
    let most = usize::try_from(file.len).unwrap_or(usize::MAX).min(MAX_CLUSTER);
    Header::parse(&file.head(most)?, file.len).map_err(|problem| DiskError::image(&file.path, problem))
}

/// The directories below which backing files may lie, without links in their names.
struct Grants {
    beside: PathBuf,
    under: Option<PathBuf>,
    anywhere: bool,
}

impl Grants {
    fn new(top: &Path, grant: &Backing) -> Result<Self, DiskError> {
        let under = match grant {
            Backing::Under(directory) => Some(directory.canonicalize().map_err(|source| DiskError::Open {
                path: directory.clone(),
                source,
                hint: " (the directory of backing files)",
            })?),
            _ => None,
        };
        Ok(Self { beside: directory_of(top)?, under, anywhere: *grant == Backing::Anywhere })
    }

    /// Opens the file that `image` names `name`.
    fn open(
        &self,
        image: &Path,
        name: &str,
        format: Option<&str>,
        above: &[Layer],
        own: (u64, u64),
    ) -> Result<(DiskFile, Format), DiskError> {
        let refuse = |problem: &str| {
            Err(DiskError::image(image, format!("has '{}' as its backing file, {problem}", shown(name))))
        };
        let colon = name.find(':').unwrap_or(usize::MAX);
        if colon < name.find('/').unwrap_or(usize::MAX) {
            return refuse("which is no file's name: only files are used");
        }
        let path = directory_of(image)?.join(name);
        let path = match path.canonicalize() {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return refuse("which does not exist: put it there, or make the image again");
            }
            Err(error) => return refuse(&format!("which cannot be opened: {error}")),
        };
        let (file, lenient) = match self.open_granted(&path) {
            Ok(Some(opened)) => opened,
            Ok(None) => {
                return refuse(
                    "which it has no leave to read: if you trust the image, say backing=DIRECTORY or backing=allow",
                );
            }
            Err(error) => return refuse(&format!("which cannot be opened: {error}")),
        };
        let meta = file.metadata().map_err(DiskError::io("open", &path))?;
        use std::os::unix::fs::{FileTypeExt, MetadataExt};
        if !(meta.is_file() || self.anywhere && meta.file_type().is_block_device()) {
            return refuse("which is not a file");
        }
        let identity = (meta.dev(), meta.ino());
        if identity == own || above.iter().any(|layer| layer.file.identity == identity) {
            return refuse("which leads back to itself: make it again");
        }
        let file = DiskFile::new(file, &path, Access::Read)?;
        let said = match format {
            None => None,
            Some("raw") => Some(Format::Raw),
            Some("qcow2") => Some(Format::Qcow2),
            Some(other) => return refuse(&format!("of a format that is not known here: {}", shown(other))),
        };
        let format =
            format::decide(&path, &file.head(16)?, said).map_err(|problem| DiskError::image(&path, problem))?;
        let plain =
            ["img", "raw", "iso"].iter().any(|name| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(name)));
        if format == Format::Raw && !plain && !lenient {
            return refuse(
                "a raw file not named .img, .raw or .iso: if you trust the image, say backing=DIRECTORY or backing=allow",
            );
        }
        Ok((file, format))
    }

    /// Opens a file, named without links, if a grant covers it; `true` if any file will do there.
    fn open_granted(&self, path: &Path) -> io::Result<Option<(File, bool)>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        if self.anywhere {
            let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
            return Ok(Some((file.into(), true)));
        }
        for (directory, lenient) in self.under.iter().map(|d| (d, true)).chain([(&self.beside, false)]) {
            let Ok(inside) = path.strip_prefix(directory) else { continue };
            let hidden = |part: Component<'_>| part.as_os_str().as_encoded_bytes().starts_with(b".");
            if !lenient && inside.components().any(hidden) {
                continue;
            }
            let directory =
                rustix::fs::openat(CWD, directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            // The name has no links, unless somebody makes one in this moment.
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
            let file = openat2(directory, inside, flags, Mode::empty(), resolve)?;
            return Ok(Some((file.into(), lenient)));
        }
        Ok(None)
    }
}

/// The directory a file lies in, without links in its name.
fn directory_of(path: &Path) -> Result<PathBuf, DiskError> {
    let whole = path.canonicalize().map_err(DiskError::io("open", path))?;
    Ok(whole.parent().unwrap_or(Path::new("/")).to_path_buf())
}

/// A text from an image, fit for a line on a terminal.
pub(crate) fn shown(text: &str) -> String {
    let short: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().count() > 200 { short + "…" } else { short }
}
