//! The PC as the supervisor sees it.

use std::fs::File;

use crate::board::BoardMaker;
use crate::config::VmConfig;
use crate::error::Error;
use virtio::Disk;

/// What builds the PC from the opened files.
pub(crate) fn maker(
    _config: &VmConfig,
    _kernel: File,
    _initrd: Option<File>,
    _disks: Vec<Disk>,
) -> Result<Box<dyn BoardMaker>, Error> {
    Err(Error::Engine("no machine yet".into()))
}
