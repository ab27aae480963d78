//! `tightrope balloon`: how much memory a running guest has and uses, and taking some of it away.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use registry::Entry;

use crate::instance::{ask, running};

/// How often it is looked how far the guest is.
const STEP: Duration = Duration::from_millis(50);
/// How long a guest may do nothing before it is not waited for any longer.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest may take to say how its memory is used.
const ANSWER: Duration = Duration::from_millis(500);

/// `tightrope balloon`
#[derive(Args, Clone, Debug)]
pub struct BalloonArgs {
    /// The VM's name, or the start of its id
    #[arg(value_name = "VM", add = crate::complete::running())]
    pub vm: String,

    /// What the guest is to make do with from now on, like 512M; all that the VM was given ends it
    #[arg(value_name = "SIZE", value_parser = vmm::parse_memory)]
    pub size: Option<u64>,

    /// As JSON, for programs; sizes are in bytes
    #[arg(long)]
    pub json: bool,
}

/// What a monitor says.
struct Status(BTreeMap<String, u64>);

impl Status {
    fn ask(entry: &Entry, order: &str) -> Result<Self> {
        let answer = ask(entry, order)?;
        let pair = |word: &str| {
            let (name, value) = word.split_once('=')?;
            Some((name.to_owned(), value.parse().ok()?))
        };
        Ok(Self(answer.split(' ').filter_map(pair).collect()))
    }

    fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// Shows how the memory of a guest stands, after its size was changed if that is wanted.
///
/// # Errors
/// One line: there is no such VM, it cannot have that much, or its guest has no driver.
pub fn run(args: &BalloonArgs) -> Result<i32> {
    let entry = running(&args.vm)?;
    let mut status = Status::ask(&entry, "balloon")?;
    if let Some(size) = args.size {
        let memory = status.get("memory");
        let Some(target) = memory.checked_sub(size) else {
            bail!("VM {} has {} MiB: give at most as much", entry.shown(), memory >> 20);
        };
        if status.get("driver") == 0 {
            bail!("VM {}: its guest has no driver for the balloon (Linux: virtio_balloon), or not yet", entry.shown());
        }
        status = follow(&entry, target)?;
    }
    let heard = status.get("heard");
    let end = Instant::now() + ANSWER;
    while status.get("driver") != 0 && status.get("heard") == heard && Instant::now() < end {
        std::thread::sleep(STEP / 5);
        status = Status::ask(&entry, "balloon")?;
    }
    show(&entry, &mut status, args.json)?;
    Ok(0)
}

/// Sets the target and waits for the guest to get there, as long as it is on its way.
fn follow(entry: &Entry, target: u64) -> Result<Status> {
    let mut status = Status::ask(entry, &format!("balloon {target}"))?;
    let (mut actual, mut since) = (status.get("actual"), Instant::now());
    // Somebody else may set another in the meantime.
    while status.get("actual") != target && status.get("target") == target && since.elapsed() < PATIENCE {
        std::thread::sleep(STEP);
        status = Status::ask(entry, "balloon")?;
        if actual != status.get("actual") {
            (actual, since) = (status.get("actual"), Instant::now());
        }
    }
    Ok(status)
}

fn show(entry: &Entry, status: &mut Status, json: bool) -> Result<()> {
    if let Some(resident) = resident(entry.about.pid) {
        status.0.insert("resident".into(), resident);
    }
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string(&status.0)?)?;
        return Ok(());
    }
    let mib = |name: &str| format!("{} MiB", status.get(name) >> 20);
    let mut row = |name: &str, text: String| writeln!(out, "{name:10}  {text}");
    row("memory", mib("memory"))?;
    if status.get("driver") == 0 {
        row("balloon", "the guest has no driver for it".into())?;
    } else if status.get("actual") == status.get("target") {
        row("balloon", mib("actual"))?;
    } else {
        row("balloon", format!("{} of the {} wanted", mib("actual"), mib("target")))?;
    }
    row("given back", format!("{} by the balloon, {} as free pages, so far", mib("inflated"), mib("reported")))?;
    if status.0.contains_key("guest-available") {
        row("in guest", format!("{} free, {} available", mib("guest-free"), mib("guest-available")))?;
    }
    if status.0.contains_key("resident") {
        row("on host", format!("{} resident", mib("resident")))?;
    }
    Ok(())
}

/// Bytes that a process has in memory.
fn resident(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_this_process_has() {
        assert!(resident(std::process::id()).is_some_and(|bytes| bytes > 1 << 20));
        assert_eq!(resident(u32::MAX), None);
    }
}
