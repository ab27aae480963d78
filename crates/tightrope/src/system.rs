//! Running a whole Debian: its image (made first if it is not there), a layer to write to, and what boots it.

use anyhow::{Result, bail};
use image::{Image, ImageStore, Options, Reference};
use vmm::{DiskConfig, VmConfig};

use crate::cli::RunArgs;
use crate::settings::Settings;
use crate::{images, layers};

/// Memory when nobody says otherwise, in bytes.
const MEMORY: u64 = 1 << 30;

/// The kernel's command line, beyond what every image has.
const CMDLINE: &str = "root=/dev/vda rootfstype=ext4 rw";

/// The image that the user asks for by its name; `None` for the small one.
///
/// # Errors
/// One line for the user: nothing has such a name.
pub fn reference(args: &RunArgs) -> Result<Option<Reference>> {
    match args.image.as_deref() {
        None | Some(image::reference::BUSYBOX) => Ok(None),
        Some(name) => Ok(Some(name.parse()?)),
    }
}

/// The image, made now if it is not there.
///
/// # Errors
/// One line for the user.
pub fn image(reference: &Reference, args: &RunArgs, settings: &Settings) -> Result<(ImageStore, Image)> {
    let options: Options = images::options(args.mirror.as_ref(), settings);
    let store = ImageStore::open(&options.host)?;
    let named = reference.to_string();
    let mut there = store.list().into_iter().filter(|i| i.manifest.name == named);
    // A disk that was kept goes on with the image that it stands on, even if there is a newer one.
    let kept = args.keep.as_ref().and_then(|name| layers::list(&store).into_iter().find(|(n, _)| n == name));
    let found = match kept {
        None => there.next(),
        Some((name, kept)) => match there.find(|i| i.manifest.digest == kept.digest) {
            None => bail!(
                "the disk '{name}' stands on the image {}: name that, or choose another name for --keep",
                kept.image
            ),
            found => found,
        },
    };
    let image = match found {
        Some(image) => image,
        None => {
            let engine = args.engine.or(settings.engine).unwrap_or_default();
            vmm::terminal::message(&format!(
                "tightrope: making the image {reference}, once; this takes a minute or two"
            ));
            images::make(reference, false, &options, engine)?.image
        }
    };
    Ok((store, image))
}

/// Fills in what boots the image; returns its command line.
///
/// # Errors
/// One line for the user.
pub fn configure(reference: &Reference, args: &RunArgs, settings: &Settings, config: &mut VmConfig) -> Result<String> {
    let (store, image) = image(reference, args, settings)?;
    // It may not be removed while this process, which is the VM, lives.
    std::mem::forget(image.use_it()?);
    let (kernel, initrd) = image::boot_files(&store, &image, &images::options(args.mirror.as_ref(), settings))?;
    let layer = match &args.keep {
        Some(name) => layers::kept(&store, &image, name)?,
        None => layers::temporary(&store, &image)?,
    };
    let root = DiskConfig {
        format: Some(disk::Format::Qcow2),
        // It names the image's disk, and that is all it may name.
        backing: disk::Backing::Under(image.dir().to_path_buf()),
        // What ends with the VM need not survive a power failure.
        cache: if layer.temporary { disk::Cache::Unsafe } else { disk::Cache::default() },
        ..DiskConfig::new(&layer.path)
    };
    config.disks.insert(0, root);
    if layer.temporary {
        config.temporary.push(layer.path);
    }
    config.kernel = kernel;
    config.initrd = Some(initrd);
    config.trusted_image = true;
    if args.memory.or(settings.memory).is_none() {
        config.memory = MEMORY;
    }
    Ok(CMDLINE.to_owned())
}
