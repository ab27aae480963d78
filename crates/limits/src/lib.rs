//! What the processes of one VM may take of the host, all together: a share of its CPUs, a hard limit of CPU time, a limit of memory. The
//! host's control groups see to it.
//!
//! * [`Limits`]: what is wanted.
//! * [`Groups`]: control groups of the VM's own, of version 1 or 2, made below the one that the process is in. Who made them removes them:
//!   the registry knows of them, so that they go also when nobody was left to do it.
//! * [`scope`]: where systemd runs, it is asked for a scope instead, which it removes itself.
//!
//! Not here: limits of disks and networks, which the devices keep.

#![forbid(unsafe_code)]
#![deny(missing_docs)]

mod groups;
pub mod scope;

use std::path::PathBuf;
use std::str::FromStr;

pub use groups::{Groups, Host};

/// The period in which a limit of CPU time is counted, in microseconds (the kernel's and systemd's default).
const PERIOD: u64 = 100_000;

/// Why there is no limit: one line.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no place for a control group.
    #[error(
        "{0} needs a control group, and none can be made ({1}): run this as root or in a systemd session, or leave the option out"
    )]
    NoGroup(&'static str, String),
    /// systemd made a scope, but the limit does not hold in it.
    #[error(
        "{0} does not hold: systemd does not manage '{1}' for this user (it must be delegated to user@.service), or another limit stands above it"
    )]
    NotDelegated(&'static str, &'static str),
}

/// Weight of a VM's processes against others at the same place, when CPUs are short: 1 to 10000. All else has 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuShare(u32);

impl FromStr for CpuShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let share = text.parse().ok().filter(|share| (1..=10_000).contains(share));
        share
            .map(Self)
            .ok_or_else(|| format!("'{text}' is no share: it is a number from 1 to 10000, and 100 is what others have"))
    }
}

/// CPU time that a VM's processes may take, in hundredths of one CPU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuLimit(u32);

impl FromStr for CpuLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let percent = text.strip_suffix('%').and_then(|number| number.parse().ok());
        percent.filter(|percent| (1..=100_000).contains(percent)).map(Self).ok_or_else(|| {
            format!("'{text}' is no limit of CPU time: write a percentage of one CPU, such as 50% or 150%")
        })
    }
}

/// What is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Weight.
    pub cpu_share: Option<CpuShare>,
    /// Hard limit of CPU time.
    pub cpu_limit: Option<CpuLimit>,
    /// Most memory, in bytes, of all processes together, the guest's and what the host caches of their files included.
    pub memory: Option<u64>,
}

impl Limits {
    /// Is there none?
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The option that needs a controller.
    fn option(&self, controller: &str) -> &'static str {
        match controller {
            "memory" => "--memory-limit",
            _ if self.cpu_limit.is_some() => "--cpu-limit",
            _ => "--cpu-share",
        }
    }

    /// The controllers that are needed.
    fn controllers(&self) -> impl Iterator<Item = &'static str> {
        let cpu = (self.cpu_share.is_some() || self.cpu_limit.is_some()).then_some("cpu");
        cpu.into_iter().chain(self.memory.map(|_| "memory"))
    }

    /// What is written for a controller: file and text.
    fn settings(&self, controller: &str, version: Version) -> Vec<(&'static str, String)> {
        let quota = |limit: CpuLimit| u64::from(limit.0) * PERIOD / 100;
        let mut all = Vec::new();
        match (controller, version) {
            ("cpu", Version::One) => {
                // 1024 is what others have.
                all.extend(self.cpu_share.map(|share| ("cpu.shares", (share.0 * 1024 / 100).max(2).to_string())));
                if let Some(limit) = self.cpu_limit {
                    all.push(("cpu.cfs_period_us", PERIOD.to_string()));
                    all.push(("cpu.cfs_quota_us", quota(limit).to_string()));
                }
            }
            ("cpu", Version::Two) => {
                all.extend(self.cpu_share.map(|share| ("cpu.weight", share.0.to_string())));
                all.extend(self.cpu_limit.map(|limit| ("cpu.max", format!("{} {PERIOD}", quota(limit)))));
            }
            (_, Version::One) => {
                all.extend(self.memory.map(|bytes| ("memory.limit_in_bytes", bytes.to_string())));
            }
            (_, Version::Two) => all.extend(self.memory.map(|bytes| ("memory.max", bytes.to_string()))),
        }
        all
    }
}

/// Of the control groups' interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// Where a controller is, for the calling process: the group that it is in, and where the hierarchy is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    version: Version,
    mounted: PathBuf,
    group: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts() {
        assert_eq!("150%".parse(), Ok(CpuLimit(150)));
        assert_eq!("1".parse(), Ok(CpuShare(1)));
        for bad in ["", "150", "0%", "-5%", "1.5", "x%", "100001%"] {
            assert!(bad.parse::<CpuLimit>().is_err(), "{bad}");
        }
        for bad in ["", "0", "10001", "50%", "-1"] {
            assert!(bad.parse::<CpuShare>().is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_written() {
        let limits = Limits { cpu_share: Some(CpuShare(50)), cpu_limit: Some(CpuLimit(150)), memory: Some(1 << 30) };
        let all = |version| limits.controllers().flat_map(|name| limits.settings(name, version)).collect::<Vec<_>>();
        let text =
            |all: &[(&str, String)]| all.iter().map(|(file, text)| format!("{file}={text};")).collect::<String>();
        assert_eq!(
            text(&all(Version::One)),
            "cpu.shares=512;cpu.cfs_period_us=100000;cpu.cfs_quota_us=150000;memory.limit_in_bytes=1073741824;"
        );
        assert_eq!(text(&all(Version::Two)), "cpu.weight=50;cpu.max=150000 100000;memory.max=1073741824;");
        assert!(Limits::default().is_empty() && Limits::default().controllers().next().is_none());
    }
}
