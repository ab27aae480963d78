//! `tightrope pull`, `images`, `rm`, `prune`: whole systems in the store, and the guest that makes one.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Result, bail};
use image::{BuildGuest, Image, ImageStore, Machine, Options, Pulled, Reference};
use serde_json::json;

use crate::layers;
use crate::settings::Settings;

/// How long the guest that makes a disk may be silent. Its longest steps write a line each few seconds.
const SILENCE: Duration = Duration::from_secs(900);

/// The longest line of its console that is looked at, in bytes.
const MAX_LINE: u64 = 64 << 10;

/// Runs the guest in a process of its own, which confines itself as every VM does.
struct Child {
    engine: vmm::EngineChoice,
}

impl Machine for Child {
    fn run(&self, guest: &BuildGuest, line: &mut dyn FnMut(&str)) -> Result<(), String> {
        let engine = match self.engine {
            vmm::EngineChoice::Auto => "auto",
            vmm::EngineChoice::Bt => "bt",
            vmm::EngineChoice::Kvm => "kvm",
            vmm::EngineChoice::Interp => "interp",
        };
        let archive = format!("{},ro", guest.archive.display());
        let memory = format!("{}M", guest.memory >> 20);
        let mut child = Command::new("/proc/self/exe")
            .args(["run", "--with-parent", "--net=none", "--serial=stdio", "--engine", engine, "--memory", &memory])
            .arg("--kernel")
            .arg(&guest.kernel)
            .arg("--initrd")
            .arg(&guest.initrd)
            .arg("--disk")
            .arg(&guest.disk)
            .args(["--disk", &archive, "--append", guest.cmdline])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|e| format!("the guest that makes it cannot be started: {e}"))?;
        let (out, err) = (child.stdout.take(), child.stderr.take());
        let (to, lines) = channel();
        std::thread::spawn(move || {
            let mut out = BufReader::new(out?);
            let mut line = Vec::new();
            while out.by_ref().take(MAX_LINE).read_until(b'\n', &mut line).ok()? > 0 {
                to.send(String::from_utf8_lossy(&line).into_owned()).ok()?;
                line.clear();
            }
            Some(())
        });
        let errors = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = err.map(|e| e.take(MAX_LINE).read_to_string(&mut text));
            text
        });
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(text) => line(&text),
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(format!("the guest said nothing for {} minutes", SILENCE.as_secs() / 60));
                }
            }
        }
        let status = child.wait().map_err(|e| e.to_string())?;
        let errors = errors.join().unwrap_or_default();
        match status.success() {
            true => Ok(()),
            false => {
                let last = errors.lines().last().unwrap_or_default().trim_start_matches("tightrope: ");
                Err(if last.is_empty() {
                    format!("the guest that makes it ended by {status}")
                } else {
                    last.to_owned()
                })
            }
        }
    }
}

/// The options for fetching that the user's settings come to.
pub fn options(mirror: Option<&String>, settings: &Settings) -> Options {
    Options { mirror: mirror.cloned().or_else(|| settings.mirror.clone()), ..Options::default() }
}

/// Makes an image, or finds that it is up to date.
///
/// # Errors
/// One line for the user.
pub fn make(reference: &Reference, recommends: bool, options: &Options, engine: vmm::EngineChoice) -> Result<Pulled> {
    Ok(image::pull(reference, recommends, options, &Child { engine })?)
}

/// `tightrope pull`
///
/// # Errors
/// One line for the user.
pub fn pull(name: &str, packages: &[String], recommends: bool, mirror: Option<&String>) -> Result<i32> {
    let settings = Settings::load()?;
    let options = options(mirror, &settings);
    if name == image::reference::BUSYBOX {
        let options = Options { update: true, ..options };
        let guest = image::default_image(image::DEFAULT_SUITE, image::Flavour::default(), &options)?;
        writeln!(std::io::stdout(), "{name}: Linux {}", guest.kernel_version)?;
        return Ok(0);
    }
    let packages = packages.iter().map(|p| p.trim_start_matches('+'));
    let reference = name.parse::<Reference>()?.with(packages)?;
    let engine = settings.engine.unwrap_or_default();
    let pulled = make(&reference, recommends, &options, engine)?;
    let (image, made) = (&pulled.image, pulled.made);
    let what = if made { "made" } else { "up to date" };
    writeln!(
        std::io::stdout(),
        "{}: {what}, {} packages, Linux {}, {} MiB, id {}",
        image.manifest.name,
        image.manifest.packages.len(),
        image.manifest.kernel,
        image.size() >> 20,
        image.id()
    )?;
    Ok(0)
}

/// `tightrope images`
///
/// # Errors
/// No home directory, or standard output is closed.
pub fn list(as_json: bool) -> Result<i32> {
    let store = ImageStore::open(&image::Host::current())?;
    let all = store.list();
    let mut out = std::io::stdout().lock();
    if as_json {
        let all: Vec<_> = all
            .iter()
            .map(|i| {
                let m = &i.manifest;
                json!({
                    "name": m.name, "id": i.id(), "digest": m.digest, "created": m.created, "kernel": m.kernel,
                    "size": i.size(), "disk_size": m.disk_size, "directory": i.dir(), "packages": m.packages,
                })
            })
            .collect();
        let kept: Vec<_> = layers::list(&store)
            .into_iter()
            .map(|(name, kept)| {
                let size = layers::size(&store, &name);
                json!({
                    "name": name, "image": kept.image, "image_digest": kept.digest, "created": kept.created, "size": size,
                })
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string_pretty(&json!({"images": all, "kept": kept}))?)?;
        return Ok(0);
    }
    let width = all.iter().map(|i| i.manifest.name.len()).max().unwrap_or(0).clamp(14, 60);
    writeln!(out, "{:width$}  {:12}  {:>8}  {:>8}  {:10}  KERNEL", "NAME", "ID", "PACKAGES", "SIZE", "CREATED")?;
    for i in &all {
        let m = &i.manifest;
        let size = format!("{} MiB", i.size() >> 20);
        let (packages, created) = (m.packages.len(), date(m.created));
        writeln!(out, "{:width$}  {:12}  {packages:>8}  {size:>8}  {created:10}  {}", m.name, i.id(), m.kernel)?;
    }
    for (name, kept) in layers::list(&store) {
        let size = format!("{} MiB", layers::size(&store, &name) >> 20);
        writeln!(
            out,
            "{name:width$}  {:12}  {:>8}  {size:>8}  {:10}  kept, of {}",
            "",
            "",
            date(kept.created),
            kept.image
        )?;
    }
    Ok(0)
}

/// `tightrope rm`
///
/// # Errors
/// One line for the user: there is no such image, or it is in use.
pub fn remove(names: &[String]) -> Result<i32> {
    let store = ImageStore::open(&image::Host::current())?;
    let kept = layers::list(&store);
    // All names are looked at before anything is removed.
    let (mut all, mut disks): (Vec<Image>, Vec<&str>) = (Vec::new(), Vec::new());
    for name in names {
        if let Some((name, _)) = kept.iter().find(|(n, _)| n == name) {
            disks.push(name);
            continue;
        }
        let found = store.named(name);
        let different: std::collections::BTreeSet<_> = found.iter().map(|i| &i.manifest.name).collect();
        match different.len() {
            0 => {
                let there = store.list();
                let there = there.iter().map(|i| i.manifest.name.as_str());
                let near = image::names::nearest(name, there.chain(kept.iter().map(|(n, _)| n.as_str())));
                bail!("there is no image '{name}'{}: `tightrope images` lists them", image::names::did_you_mean(&near));
            }
            1 => all.extend(found),
            _ => bail!("'{name}' is the start of several ids: give more of it"),
        }
    }
    for image in &all {
        let stands = |(name, kept): &&(String, layers::Kept)| {
            kept.digest == image.manifest.digest && !disks.contains(&name.as_str())
        };
        if let Some((disk, _)) = kept.iter().find(stands) {
            let name = &image.manifest.name;
            bail!("the disk '{disk}' that you keep stands on {name}: remove that first (tightrope rm {disk})");
        }
    }
    for name in disks {
        layers::remove(&store, name)?;
        writeln!(std::io::stdout(), "removed {name}")?;
    }
    for image in &all {
        store.remove(image, image::Progress::Auto)?;
        writeln!(std::io::stdout(), "removed {} {}", image.manifest.name, image.id())?;
    }
    Ok(0)
}

/// `tightrope prune`
///
/// # Errors
/// Failures of the file system, in one line.
pub fn prune() -> Result<i32> {
    let host = image::Host::current();
    let store = ImageStore::open(&host)?;
    let kept = layers::list(&store);
    let stands = |image: &Image| kept.iter().any(|(_, kept)| kept.digest == image.manifest.digest);
    let freed = store.prune(image::Progress::Auto, stands)?;
    let packages = image::prune_cache(&Options::default())?;
    writeln!(std::io::stdout(), "freed {} MiB", (freed + packages) >> 20)?;
    Ok(0)
}

/// The day, as ISO 8601 writes it, of a time in seconds since 1970 (in UTC).
fn date(seconds: u64) -> String {
    // Days since 1 March of the year 0, in cycles of 400 years, which all have the same number of days.
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    format!("{:04}-{month:02}-{day:02}", era * 400 + year + u64::from(month <= 2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, day) in [
            (0, "1970-01-01"),
            (951_782_400, "2000-02-29"),
            (1_767_225_599, "2025-12-31"),
            (1_767_225_600, "2026-01-01"),
            (4_107_542_400, "2100-03-01"),
        ] {
            assert_eq!(date(seconds), day);
        }
    }
}
