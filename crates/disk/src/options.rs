//! What a user says about a disk: `FILE[,option…]`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// How the bytes of a disk are laid out in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// As they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("'{text}' is no format of disks: choose raw or qcow2")),
        }
    }
}

/// When what the guest wrote is safe from a power failure of the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Cache {
    /// When the guest has flushed it.
    #[default]
    WriteBack,
    /// At once: each write is made durable before the guest hears that it is done.
    WriteThrough,
    /// When the host writes it by itself: flushes do nothing. For disks that can be made again.
    Unsafe,
}

/// How requests reach the file of a raw disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Io {
    /// A pool of threads.
    #[default]
    Threads,
    /// io_uring; threads where the host has it not.
    Uring,
}

/// Which files a qcow2 image may name as its backing files. They are only read, in any case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// Images in the directory of the image and below: qcow2 ones, and raw ones named `.img`, `.raw` or `.iso`. Nothing hidden
    /// (a name with a dot in front), nothing behind a symbolic link that leads out.
    #[default]
    Beside,
    /// As [`Self::Beside`]; also any file below this directory.
    Under(PathBuf),
    /// Any file or block device that this user can read.
    Anywhere,
}

/// Most bytes and requests a second; `None` for as many as there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes read and written in a second.
    pub bytes: Option<u64>,
    /// Requests in a second.
    pub operations: Option<u64>,
}

/// `--disk FILE[,option…]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// An image or a block device.
    pub path: PathBuf,
    /// May the guest not write to it?
    pub read_only: bool,
    /// May other VMs that say so too write to it at the same time?
    pub shared: bool,
    /// Its format; `None` to go by its name.
    pub format: Option<Format>,
    /// What the guest sees under /dev/disk/by-id, at most 20 bytes.
    pub serial: Option<String>,
    /// When writes are durable.
    pub cache: Cache,
    /// Is space that the guest does not need any more given back to the host?
    pub discard: bool,
    /// Most bytes and requests a second.
    pub limits: Limits,
    /// Which backing files are granted.
    pub backing: Backing,
    /// How requests reach the file.
    pub io: Io,
}

impl DiskConfig {
    /// A writable disk of its own, all else as when nobody says otherwise.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            read_only: false,
            shared: false,
            format: None,
            serial: None,
            cache: Cache::default(),
            discard: true,
            limits: Limits::default(),
            backing: Backing::default(),
            io: Io::default(),
        }
    }

    /// Takes one option over; `None` when it is no option of a disk.
    fn set(&mut self, option: &str) -> Option<Result<(), String>> {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        let result = match (key, value) {
            ("ro", "") => set(&mut self.read_only, Ok(true)),
            ("rw", "") => set(&mut self.read_only, Ok(false)),
            ("shared", "") => set(&mut self.shared, Ok(true)),
            ("format", _) => set(&mut self.format, value.parse().map(Some)),
            ("serial", _) => set(&mut self.serial, serial(value).map(Some)),
            ("bps", _) => set(&mut self.limits.bytes, rate(value).map(Some)),
            ("iops", _) => set(&mut self.limits.operations, rate(value).map(Some)),
            ("cache", _) => {
                use Cache::{Unsafe, WriteBack, WriteThrough};
                let choices = [("writeback", WriteBack), ("writethrough", WriteThrough), ("unsafe", Unsafe)];
                set(&mut self.cache, choose(key, value, &choices))
            }
            ("discard", _) => set(&mut self.discard, choose(key, value, &[("on", true), ("off", false)])),
            ("backing", "allow") => set(&mut self.backing, Ok(Backing::Anywhere)),
            ("backing", _) if value.starts_with('/') || value.starts_with('.') => {
                set(&mut self.backing, Ok(Backing::Under(value.into())))
            }
            ("backing", _) => Err("backing is allow (any file) or a directory with / or ./ in front".into()),
            ("io", _) => {
                let choices = [("threads", Io::Threads), ("uring", Io::Uring)];
                set(&mut self.io, choose(key, value, &choices))
            }
            _ => return None,
        };
        Some(result)
    }
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut config = Self::new("");
        let mut path = text;
        let mut options = Vec::new();
        while let Some((rest, option)) = path.rsplit_once(',') {
            if config.clone().set(option).is_none() {
                // A comma in a directory's name is none of ours.
                if option.contains('/') {
                    break;
                }
                return Err(format!(
                    "'{option}' is no option of a disk: ro, shared, format=, serial=, bps=, iops=, cache=, discard=, backing= and io= are"
                ));
            }
            options.push(option);
            path = rest;
        }
        for option in options.into_iter().rev() {
            config.set(option).unwrap_or(Ok(()))?;
        }
        if path.is_empty() {
            return Err("the name of the disk image is missing".into());
        }
        if config.shared && config.read_only {
            return Err("readers share a disk anyway: ro is enough, without shared".into());
        }
        config.path = path.into();
        Ok(config)
    }
}

fn set<T>(field: &mut T, value: Result<T, String>) -> Result<(), String> {
    *field = value?;
    Ok(())
}

fn choose<T: Copy>(key: &str, value: &str, choices: &[(&str, T)]) -> Result<T, String> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let names: Vec<_> = choices.iter().map(|(name, _)| *name).collect();
        format!("'{value}' is nothing for {key}: choose {}", names.join(" or "))
    })
}

fn serial(text: &str) -> Result<String, String> {
    if (1..=20).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Ok(text.into());
    }
    Err(format!("'{text}' is no serial number: 1 to 20 printable characters without spaces are"))
}

/// A number, optionally with `K`, `M` or `G` (powers of 1024).
fn rate(text: &str) -> Result<u64, String> {
    match parse_size(text) {
        Some(0) | None => Err(format!("'{text}' is no limit: write for example 500 or 100M")),
        Some(rate) => Ok(rate),
    }
}

/// Reads a number of bytes: with `K`, `M`, `G` or `T` (powers of 1024, optionally followed by `B` or `iB`), or bare. `None` if it is
/// none, or more than 2^63 - 1.
pub fn parse_size(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(digits)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| *bytes <= i64::MAX as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options() {
        let parse = |text: &str| text.parse::<DiskConfig>();
        assert_eq!(parse("a.img"), Ok(DiskConfig::new("a.img")));
        assert_eq!(parse("a.img,ro"), Ok(DiskConfig { read_only: true, ..DiskConfig::new("a.img") }));
        assert_eq!(parse("/x,y/a.img"), Ok(DiskConfig::new("/x,y/a.img")));
        let all =
            "d,x/a,format=raw,serial=S-1,bps=1M,iops=500,cache=writethrough,discard=off,shared,backing=allow,io=uring";
        let wanted = DiskConfig {
            shared: true,
            format: Some(Format::Raw),
            serial: Some("S-1".into()),
            cache: Cache::WriteThrough,
            discard: false,
            limits: Limits { bytes: Some(1 << 20), operations: Some(500) },
            backing: Backing::Anywhere,
            io: Io::Uring,
            ..DiskConfig::new("d,x/a")
        };
        assert_eq!(parse(all), Ok(wanted));
        assert_eq!(parse("a,backing=/x/y").unwrap().backing, Backing::Under("/x/y".into()));
        for bad in [
            "",
            ",ro",
            "a.img,rp",
            "a,format=vmdk",
            "a,serial=",
            "a,serial=123456789012345678901",
            "a,bps=0",
            "a,iops=x",
            "a,cache=none",
            "a,discard=maybe",
            "a,backing=x",
            "a,ro,shared",
            "a,io=fast",
            "a,ro=1",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_size("10G"), Some(10 << 30));
        assert_eq!(parse_size("512"), Some(512));
        assert_eq!(parse_size("1kib"), Some(1024));
        for bad in ["", "G", "-1", "1.5G", "8388608T", "99999999999999999999", "1X"] {
            assert_eq!(parse_size(bad), None, "{bad}");
        }
    }
}
