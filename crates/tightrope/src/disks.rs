//! `tightrope disk`: making disks and looking at them.

use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Subcommand, ValueHint};
use disk::{Create, DiskConfig, DiskError, Format, parse_size};
use registry::Registry;

use crate::instance::ask;

/// Exit code of `tightrope disk check` when data is in danger.
const EXIT_DAMAGED: i32 = 3;

/// `tightrope disk`
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Make an empty disk, or a copy-on-write layer over another
    ///
    /// The layer takes up what is changed; the disk below it must not be changed any more.
    Create {
        /// The new file; qcow2 if it is named so (.qcow2) or stands on another, otherwise raw
        #[arg(value_hint = ValueHint::FilePath)]
        file: PathBuf,
        /// Its size, like 10G; may be left away with --backing
        #[arg(value_parser = size)]
        size: Option<u64>,
        /// raw or qcow2
        #[arg(long)]
        format: Option<Format>,
        /// The disk that the new one is a layer over: FILE[,format=raw|qcow2]
        #[arg(long, value_name = "BASE", value_hint = ValueHint::FilePath)]
        backing: Option<DiskConfig>,
    },
    /// Say what a disk is
    Info {
        /// The disk: FILE[,format=raw|qcow2]
        #[arg(value_hint = ValueHint::FilePath)]
        disk: DiskConfig,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Give a disk a new size; partitions and file systems on it stay as they are
    ///
    /// A disk that a VM uses can be made longer: the guest sees it at once.
    Resize {
        /// The disk: FILE[,format=raw|qcow2]
        #[arg(value_hint = ValueHint::FilePath)]
        disk: DiskConfig,
        /// The new size, like 20G
        #[arg(value_parser = size)]
        size: u64,
        /// Cut off what is behind the new size
        #[arg(long)]
        shrink: bool,
    },
    /// Look whether a qcow2 disk is consistent
    ///
    /// Exit code 0 when it is (clusters that are lost do no harm), 3 when data is in danger.
    Check {
        /// The disk: FILE[,format=qcow2]
        #[arg(value_hint = ValueHint::FilePath)]
        disk: DiskConfig,
    },
    /// Copy a disk to a new one, of any format, that stands on no other
    Convert {
        /// The disk: FILE[,format=raw|qcow2,backing=DIRECTORY|allow]
        #[arg(value_hint = ValueHint::FilePath)]
        disk: DiskConfig,
        /// The new file; qcow2 if it is named so (.qcow2), otherwise raw
        #[arg(value_hint = ValueHint::FilePath)]
        to: PathBuf,
        /// raw or qcow2
        #[arg(long)]
        format: Option<Format>,
    },
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).ok_or_else(|| format!("'{text}' is no size: write for example 10G"))
}

/// What a new file is to be.
fn format_of(file: &Path, said: Option<Format>) -> Format {
    let named = file.extension().is_some_and(|name| name.eq_ignore_ascii_case("qcow2"));
    said.unwrap_or(if named { Format::Qcow2 } else { Format::Raw })
}

/// Does it; returns the exit code.
///
/// # Errors
/// One line for the user.
pub fn run(command: &DiskCommand) -> Result<i32> {
    match command {
        DiskCommand::Create { file, size, format, backing } => {
            let format = match (format, backing) {
                (None, Some(_)) => Format::Qcow2,
                _ => format_of(file, *format),
            };
            if size.is_none() && backing.is_none() {
                bail!("the size of the new disk is missing: tightrope disk create {} 10G", file.display());
            }
            let backing = backing.clone().map(disk::trusting);
            disk::create(&Create { path: file.clone(), size: *size, format, backing })?;
        }
        DiskCommand::Info { disk, json } => {
            let info = disk::info(disk)?;
            let mut out = std::io::stdout().lock();
            if *json {
                let value = serde_json::json!({
                    "file": disk.path, "format": info.format.to_string(), "size": info.size, "allocated": info.allocated,
                    "cluster": info.cluster, "snapshots": info.snapshots, "backing": info.backing,
                    "backing-format": info.backing_format, "in-use": info.in_use,
                });
                writeln!(out, "{value}")?;
                return Ok(0);
            }
            writeln!(out, "{}: {}", disk.path.display(), info.format)?;
            writeln!(out, "size       {} bytes ({})", info.size, human(info.size))?;
            writeln!(out, "on host    {} bytes ({})", info.allocated, human(info.allocated))?;
            if let Some(cluster) = info.cluster {
                writeln!(out, "clusters   {cluster} bytes")?;
            }
            if let Some(backing) = &info.backing {
                let format = info.backing_format.as_deref().unwrap_or("format not said");
                writeln!(out, "stands on  {backing} ({format})")?;
            }
            if info.snapshots > 0 {
                writeln!(out, "snapshots  {} inside it", info.snapshots)?;
            }
            if info.in_use {
                writeln!(out, "a VM writes to it now")?;
            }
        }
        DiskCommand::Resize { disk, size, shrink } => {
            match disk::resize(&disk::trusting(disk.clone()), *size, *shrink) {
                Err(DiskError::InUse { path, or_share }) => match resize_in_use(&path, *size)? {
                    Some(vm) => println!("VM {vm} has it in use; it was made longer for its guest too"),
                    None => return Err(DiskError::InUse { path, or_share }.into()),
                },
                result => result?,
            }
        }
        DiskCommand::Check { disk } => {
            let report = disk::check(disk)?;
            let mut out = std::io::stdout().lock();
            for text in &report.texts {
                writeln!(out, "{text}")?;
            }
            if report.errors > 0 {
                writeln!(
                    out,
                    "{} errors: data is in danger; take a copy (tightrope disk convert), or try qemu-img check -r all",
                    report.errors
                )?;
                return Ok(EXIT_DAMAGED);
            }
            match report.leaks {
                0 => writeln!(out, "no errors")?,
                leaks => writeln!(out, "no errors; {leaks} clusters are used by nobody (lost space, no harm)")?,
            }
        }
        DiskCommand::Convert { disk, to, format } => {
            let terminal = rustix::termios::isatty(rustix::stdio::stderr());
            let mut shown = u64::MAX;
            let mut progress = |done: u64, all: u64| {
                let percent = done * 100 / all.max(1);
                if terminal && percent != shown {
                    eprint!("\r{percent} %");
                    shown = percent;
                }
            };
            let result = disk::convert(disk, to, format_of(to, *format), &mut progress);
            if shown != u64::MAX {
                eprint!("\r     \r");
            }
            result?;
        }
    }
    Ok(0)
}

/// Has the VM that uses a disk make it longer; which one that was. `None`: none that is found.
fn resize_in_use(path: &Path, size: u64) -> Result<Option<String>> {
    let Ok(meta) = std::fs::metadata(path) else { return Ok(None) };
    let order = format!("disk-size {} {} {size}", meta.dev(), meta.ino());
    for entry in Registry::open()?.entries().iter().filter(|entry| entry.alive) {
        match ask(entry, &order) {
            Ok(_) => return Ok(Some(entry.shown().to_owned())),
            Err(error) if error.to_string().contains("no such") || error.to_string().contains("has ended") => {}
            Err(error) => return Err(error),
        }
    }
    Ok(None)
}

/// A number of bytes in the largest unit that leaves no less than 1.
fn human(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 {
        format!("{bytes} bytes")
    } else {
        format!("{value:.1} {}", units.get(unit).copied().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!((human(0), human(1023), human(1536)), ("0 bytes".into(), "1023 bytes".into(), "1.5 KiB".into()));
        assert_eq!(human(u64::MAX), "16384.0 PiB");
    }

    #[test]
    fn formats_of_new_files() {
        assert_eq!(format_of(Path::new("a.QCOW2"), None), Format::Qcow2);
        assert_eq!(format_of(Path::new("a.img"), None), Format::Raw);
        assert_eq!(format_of(Path::new("a.img"), Some(Format::Qcow2)), Format::Qcow2);
    }
}
