//! Long runs: a mixture of work that checks itself, and many boots in a row.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::disk::{Disk, Scratch};
use crate::session::{self, Boot, Engine, Setup, Task, number};
use crate::{disk, rows, verify};

/// Time between two looks at the monitor's resources.
const SAMPLE_EVERY: Duration = Duration::from_secs(10);
/// File descriptors a monitor may gain over a run.
const DESCRIPTORS: usize = 32;
/// Memory in MiB that may be added after the first third of a run: by then caches are filled.
const GROWTH: u64 = 96;

/// Memory and descriptors of a process and its descendants.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    /// Resident memory that is the processes' own, in MiB. Guest memory counts only where it is anonymous.
    own: u64,
    /// All resident memory, in MiB.
    resident: u64,
    descriptors: usize,
}

fn usage(pid: u32) -> Usage {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| -> u64 {
        let line = status.lines().find_map(|l| l.strip_prefix(name)).unwrap_or_default();
        line.split_ascii_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or(0) / 1024
    };
    let mut sum = Usage {
        own: field("RssAnon:"),
        resident: field("VmRSS:"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count),
    };
    for task in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for child in children.split_ascii_whitespace().filter_map(|c| c.parse().ok()) {
            let more = usage(child);
            sum.own += more.own;
            sum.resident += more.resident;
            sum.descriptors += more.descriptors;
        }
    }
    sum
}

/// Expected checksums: of rows by `row=NAME`, of cases by `verify=NAME`. They are made on the host once for each user land
/// and kept in the cache.
fn expected(disk: &Disk, setup: &Setup) -> Result<BTreeMap<String, String>> {
    let cached = disk::cache_dir()?.join(format!("sums-{}.json", disk.key));
    if let Some(sums) = fs::read(&cached).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
        return Ok(sums);
    }
    eprintln!("bench: making the right results on the host, once");
    let mut sums = BTreeMap::new();
    let names = rows::pick("all")?.iter().map(|r| r.name.to_owned()).collect();
    session::run(&Engine::Native(None), setup, Boot::Direct, &disk.image, &Task::Rows(names), |_, line, _| {
        match rows::result(line)? {
            Some((name, Ok(sample))) => drop(sums.insert(format!("row={name}"), sample.sum)),
            Some((name, Err(e))) => bail!("{name} does not work on the host itself: {e}"),
            None => {}
        }
        Ok(())
    })?;
    for (name, printed) in verify::native(setup, disk, &[])? {
        sums.extend(printed.sum.map(|s| (format!("verify={name}"), s)));
    }
    let fresh = cached.with_extension("new");
    fs::write(&fresh, serde_json::to_vec_pretty(&sums)?)?;
    fs::rename(fresh, cached)?;
    Ok(sums)
}

/// The item's name and sum in a worker's line: `worker=N row=… … sum=…` or `worker=N verify=… sum=…`.
fn item(line: &str) -> Option<(&str, &str)> {
    let mut words = line.split_ascii_whitespace().skip(1);
    let name = words.next()?;
    let sum = words.find_map(|w| w.strip_prefix("sum="))?;
    Some((name, sum))
}

/// Runs the mixture. True when there was no hang, no wrong result and no growth.
///
/// # Errors
/// The engine cannot be started.
pub fn soak(disk: &Disk, setup: &Setup, engine: &Engine, minutes: u64, workers: u32) -> Result<bool> {
    let expected = expected(disk, setup)?;
    eprintln!("bench: {minutes} minutes under {engine}, {workers} workers");
    let scratch = Scratch::new(disk)?;
    let (mut right, mut wrong, mut rounds) = (0u64, Vec::new(), 0u64);
    let mut available: Vec<f64> = Vec::new();
    let mut seen: Vec<(Duration, Usage)> = Vec::new();
    let start = Instant::now();
    let (mut next_sample, mut next_word) = (SAMPLE_EVERY, Duration::from_secs(60));
    let task = Task::Soak(minutes * 60, workers);
    let out = session::run(engine, setup, Boot::DirectWritable, &scratch.path, &task, |_, line, pid| {
        let at = start.elapsed();
        if at >= next_sample {
            seen.push((at, usage(pid)));
            next_sample = at + SAMPLE_EVERY;
        }
        if at >= next_word {
            let u = seen.last().map(|s| s.1).unwrap_or_default();
            eprintln!("bench: {:4} s: {right} right, {} wrong, monitor {} MiB", at.as_secs(), wrong.len(), u.resident);
            next_word = at + Duration::from_secs(60);
        }
        available.extend(number(line, "available"));
        let Some(line) = line.strip_prefix("soak ") else { return Ok(()) };
        rounds += u64::from(line.contains(" round "));
        if let Some((name, sum)) = item(line) {
            if expected.get(name).is_some_and(|s| s == sum) {
                right += 1;
            } else {
                wrong.push(format!("{line} (right: {})", expected.get(name).map_or("?", String::as_str)));
            }
        } else if line.contains("disk=same") {
            right += 1;
        } else if line.contains("error=") || line.contains("disk=") {
            wrong.push(line.to_owned());
        }
        Ok(())
    })?;
    println!("{engine}: {right} results right, {} wrong, {rounds} whole rounds", wrong.len());
    wrong.iter().take(20).for_each(|w| println!("WRONG  {w}"));
    let mut good = wrong.is_empty() && right > 0;
    if let Some(t) = &out.trouble {
        println!("WRONG  {t}");
        good = false;
    }
    if let (Some(min), Some(last)) = (available.iter().copied().reduce(f64::min), available.last()) {
        println!(
            "guest: {:.0} MiB of memory available at the least, {:.0} MiB at the end",
            min / 1024.0,
            last / 1024.0
        );
    }
    let end = start.elapsed();
    // A short run is all warming up.
    let early = seen.iter().find(|(at, _)| *at >= end / 3).map(|s| s.1);
    if let (Some(a), Some((_, b))) = (early, seen.last()) {
        println!(
            "monitor: own memory {} MiB after a third, {} MiB at the end; resident {} and {} MiB; descriptors {} and {}",
            a.own, b.own, a.resident, b.resident, a.descriptors, b.descriptors
        );
        let memory_is_own = b.own >= u64::from(setup.machine.memory) / 2;
        if !memory_is_own && b.own > a.own + GROWTH {
            println!("WRONG  the monitor's own memory grows");
            good = false;
        }
        if b.descriptors > a.descriptors + DESCRIPTORS {
            println!("WRONG  the monitor's file descriptors grow");
            good = false;
        }
    }
    Ok(good)
}

/// Boots and switches off again and again. True when each time went well.
///
/// # Errors
/// The engine cannot be started.
pub fn boots(disk: &Disk, setup: &Setup, engine: &Engine, count: u32, direct: bool) -> Result<bool> {
    // One copy for all boots: each finds the disk as the one before left it.
    let scratch = if direct { None } else { Some(Scratch::new(disk)?) };
    let image = scratch.as_ref().map_or(&disk.image, |s| &s.path);
    let boot = if direct { Boot::Direct } else { Boot::Systemd };
    let mut times: Vec<Duration> = Vec::new();
    let mut failed = 0;
    for n in 1..=count {
        let mut login = false;
        let out = session::run(engine, setup, boot, image, &Task::Login, |_, line, _| {
            login |= line == "login";
            Ok(())
        })?;
        match (&out.trouble, out.up_wall) {
            (None, Some(up)) if login => {
                eprintln!(
                    "bench: boot {n} of {count}: up after {:.2} s, off after {:.2} s",
                    up.as_secs_f64(),
                    out.wall.as_secs_f64()
                );
                times.push(up);
            }
            (trouble, _) => {
                failed += 1;
                println!("WRONG  boot {n}: {}", trouble.as_deref().unwrap_or("never came up"));
            }
        }
    }
    times.sort();
    let seconds = |i: usize| times.get(i).map_or(0.0, Duration::as_secs_f64);
    println!(
        "{engine}: {} of {count} boots went well; up after {:.2} s at best, {:.2} s in the median, {:.2} s at worst",
        times.len(),
        seconds(0),
        seconds(times.len() / 2),
        seconds(times.len().saturating_sub(1))
    );
    Ok(failed == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn worker_lines() {
        assert_eq!(item("worker=1 row=fib ns=1 med=1 first=1 reps=1 sum=ab"), Some(("row=fib", "ab")));
        assert_eq!(item("worker=0 verify=gcc sum=cd"), Some(("verify=gcc", "cd")));
        assert_eq!(item("worker=0 disk=same"), None);
        assert_eq!(item("worker=0 row=gcc error=x"), None);
    }

    #[test]
    fn usage_of_this_process() {
        let u = usage(std::process::id());
        assert!(u.resident > 0 && u.descriptors > 2);
        assert_eq!(usage(0).resident, 0);
    }
}
