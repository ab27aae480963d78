//! What a shell offers when a word is to be completed: options by the command line's own definition, and the names of VMs, images and kept
//! disks that there are. The script that `tightrope completions` prints asks the command each time.

use std::ffi::{OsStr, OsString};
use std::io::Write;

use anyhow::Result;
use clap::{Args, CommandFactory};
use clap_complete::engine::{
    ArgValueCandidates, ArgValueCompleter, CompletionCandidate, PathCompleter, ValueCompleter,
};
use clap_complete::env::{CompleteEnv, Shells};
use image::ImageStore;
use registry::Registry;

use crate::cli::{Cli, RunArgs};
use crate::layers;

/// The variable by which the script asks.
const VARIABLE: &str = "TIGHTROPE_COMPLETE";
const BASH: &str = include_str!("complete.bash");

/// Answers a shell that asks, and ends the process then.
pub fn answer() {
    CompleteEnv::with_factory(definition).var(VARIABLE).complete();
}

/// The command line; without a command it is that of `run`.
fn definition() -> clap::Command {
    // What is to be completed stands behind `--`.
    let mut words = std::env::args_os().skip_while(|word| word != "--").skip(2);
    if words.next().is_some_and(|word| word.as_encoded_bytes().starts_with(b"-")) {
        return RunArgs::augment_args(clap::Command::new("tightrope").version(env!("CARGO_PKG_VERSION")));
    }
    Cli::command()
}

/// Prints the script for a shell.
///
/// # Errors
/// Standard output is closed.
pub fn script(shell: clap_complete::Shell) -> Result<()> {
    let mut text = Vec::new();
    let name = shell.to_string();
    match Shells::builtins().completer(&name) {
        Some(completer) if name != "bash" => {
            completer.write_registration(VARIABLE, "tightrope", "tightrope", "tightrope", &mut text)?;
        }
        _ => text.extend(BASH.as_bytes()),
    }
    std::io::stdout().write_all(&text)?;
    Ok(())
}

fn candidate(name: impl Into<OsString>, help: String) -> CompletionCandidate {
    CompletionCandidate::new(name).help(Some(help.into()))
}

/// VMs by their names, those without by their ids.
fn vms(ended_too: bool) -> Vec<CompletionCandidate> {
    let Ok(registry) = Registry::open() else { return Vec::new() };
    let entries = registry.entries().into_iter().filter(|entry| entry.alive || (ended_too && entry.about.keep));
    entries.map(|entry| candidate(entry.shown(), entry.about.image.clone())).collect()
}

/// For VMs that run.
pub fn running() -> ArgValueCandidates {
    ArgValueCandidates::new(|| vms(false))
}

/// For VMs that run or have left a log.
pub fn known() -> ArgValueCandidates {
    ArgValueCandidates::new(|| vms(true))
}

/// For `cp`: files here, and VMs.
pub fn files() -> ArgValueCompleter {
    ArgValueCompleter::new(|current: &OsStr| {
        let mut all = PathCompleter::any().complete(current);
        let bytes = current.as_encoded_bytes();
        if !bytes.contains(&b'/') && !bytes.contains(&b':') {
            let there = vms(false).into_iter().map(|vm| {
                let mut name = vm.get_value().to_owned();
                name.push(":");
                candidate(name, "in that VM".into())
            });
            all.extend(there.filter(|vm| vm.get_value().as_encoded_bytes().starts_with(bytes)));
        }
        all
    })
}

fn store() -> Option<ImageStore> {
    ImageStore::open(&image::Host::current()).ok()
}

fn images(made: bool) -> Vec<CompletionCandidate> {
    let there = store().map(|store| store.list()).unwrap_or_default();
    let mut names: Vec<String> = there.into_iter().map(|image| image.manifest.name).collect();
    if !made {
        names.extend(["busybox", "debian", "debian:12", "debian:13"].map(str::to_owned));
    }
    names.sort();
    names.dedup();
    names.into_iter().map(CompletionCandidate::new).collect()
}

/// For images that are there, and those that can be made.
pub fn any_image() -> ArgValueCandidates {
    ArgValueCandidates::new(|| images(false))
}

/// For images and kept disks that are there.
pub fn removable() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let mut all = images(true);
        all.extend(kept());
        all
    })
}

/// For kept disks.
pub fn disks() -> ArgValueCandidates {
    ArgValueCandidates::new(kept)
}

fn kept() -> Vec<CompletionCandidate> {
    let all = store().map(|store| layers::list(&store)).unwrap_or_default();
    all.into_iter().map(|(name, kept)| candidate(name, format!("kept, of {}", kept.image))).collect()
}

/// What engine bt can do without.
pub fn optimizations() -> ArgValueCandidates {
    ArgValueCandidates::new(|| ["direct", "tiers", "transitions", "tables"].map(CompletionCandidate::new).into())
}

/// For engines.
pub fn engines() -> ArgValueCandidates {
    ArgValueCandidates::new(|| ["auto", "bt", "kvm", "interp"].map(CompletionCandidate::new).into())
}
