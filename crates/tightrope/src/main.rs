//! The command `tightrope`. Thin: it turns what the user asks for into a [`vmm::VmConfig`] and runs it.
//!
//! * [`cli`]: the command line. * [`complete`]: what shells complete. * [`disks`]: making disks. * [`balloon`]: memory of guests. * [`doctor`]: what this host can do. * [`instance`], [`vms`]: VMs that run. * [`settings`]: the configuration file. * [`guest`]: which kernel and what command line.

#![forbid(unsafe_code)]

mod balloon;
mod cli;
mod complete;
mod disks;
mod doctor;
mod guest;
mod images;
mod instance;
mod layers;
mod settings;
mod system;
mod vms;

use std::ffi::OsString;
use std::io::Write;
use std::process::exit;
use std::time::Instant;

use anyhow::Result;
use clap::{CommandFactory, Parser};

use cli::{Cli, Command, RunArgs};
use settings::Settings;

/// Exit code for something that cannot be used.
const EXIT_ERROR: i32 = 1;
/// Exit code for wrong usage.
const EXIT_USAGE: i32 = 2;

fn main() {
    let started = Instant::now();
    vmm::terminal::install_panic_hook();
    complete::answer();
    let code = match parse() {
        Ok(cli) => match execute(cli, started) {
            Ok(code) => code,
            Err(error) => {
                vmm::terminal::restore();
                vmm::terminal::message(&format!("tightrope: {}", one_line(&error)));
                EXIT_ERROR
            }
        },
        Err(code) => code,
    };
    exit(code);
}

/// An error and its causes, each of them once, as one line.
fn one_line(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text.replace('\n', " ")
}

/// Parses the command line; wrong usage is told in one line.
fn parse() -> Result<Cli, i32> {
    Cli::try_parse_from(arguments(std::env::args_os())).map_err(|error| {
        if !error.use_stderr() {
            let _ = error.print();
            return 0;
        }
        let text = error.render().to_string();
        // The first paragraph says what is wrong; the others repeat the usage.
        let first = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
        let line = first.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        eprintln!("tightrope: {line} (tightrope --help shows how)");
        EXIT_USAGE
    })
}

/// The command line with `run` put in where no command is named: in front of an option that is not the command's own.
fn arguments(given: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut all: Vec<_> = given.collect();
    let own = |word: &OsString| ["-h", "--help", "-V", "--version"].iter().any(|own| word == own);
    let none = all.get(1).is_none_or(|word| word.as_encoded_bytes().starts_with(b"-") && !own(word));
    if none && !all.is_empty() {
        all.insert(1, "run".into());
    }
    all
}

fn execute(cli: Cli, started: Instant) -> Result<i32> {
    match cli.command {
        Command::Run(args) => run(&args, started),
        Command::Doctor { json } => doctor::run(json),
        Command::Disk(command) => disks::run(&command),
        Command::Pull { image, packages, recommends, mirror } => {
            images::pull(&image, &packages, recommends, mirror.as_ref())
        }
        Command::Images { json } => images::list(json),
        Command::Rm { images } => images::remove(&images),
        Command::Prune => {
            registry::Registry::open()?.tidy();
            images::prune()
        }
        Command::Ps { all, json } => vms::ps(all, json),
        Command::Stop(args) => vms::stop(&args),
        Command::Exec(args) => vms::exec_in(&args),
        Command::Cp(args) => vms::cp(&args),
        Command::Logs { vm, follow } => vms::logs(&vm, follow),
        Command::Balloon(args) => balloon::run(&args),
        Command::Attach { vm } => vms::attach(&vm),
        Command::VmKeeper => {
            registry::keeper::run()?;
            Ok(0)
        }
        Command::NetworkServer => {
            nat::server::run()?;
            Ok(0)
        }
        Command::ShareServer => {
            share::server::run()?;
            Ok(0)
        }
        Command::Completions { shell } => {
            complete::script(shell)?;
            Ok(0)
        }
        Command::Man => {
            std::io::stdout().write_all(&man_page()?)?;
            Ok(0)
        }
    }
}

/// One page with the options of `run` in it.
fn man_page() -> Result<Vec<u8>> {
    let mut command = Cli::command();
    command.build();
    let mut page = Vec::new();
    clap_mangen::Man::new(command.clone()).render(&mut page)?;
    if let Some(run) = command.find_subcommand("run") {
        let run = clap_mangen::Man::new(run.clone());
        writeln!(page, ".SH \"TIGHTROPE RUN\"")?;
        run.render_synopsis_section(&mut page)?;
        run.render_options_section(&mut page)?;
    }
    Ok(page)
}

fn run(args: &RunArgs, started: Instant) -> Result<i32> {
    if args.with_parent {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
    }
    let background = args.detach || !args.command.is_empty();
    if background && !args.monitor {
        return instance::start(args, arguments(std::env::args_os()));
    }
    let settings = Settings::load()?;
    // What cannot be had should be known before anything is fetched.
    let groups = instance::limit(args, &arguments(std::env::args_os()))?;
    let mut config = guest::configure(args, &settings)?;
    if background {
        return instance::monitor(args, config, groups, started);
    }
    let limited = args.cpu_share.is_some() || args.cpu_limit.is_some() || args.memory_limit.is_some();
    if !args.no_agent
        && (!args.with_parent || limited)
        && let Err(error) = instance::register(args, &mut config, false, groups)
    {
        // Whoever did not ask for it can do without.
        if args.name.is_some() || limited {
            return Err(error);
        }
        vmm::terminal::message(&format!(
            "tightrope: warning: this VM will not be found by others: {}",
            one_line(&error)
        ));
    }
    let vm = vmm::Vm::new(&config, started)?;
    Ok(vm.run())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_told_once() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        assert_eq!(one_line(&anyhow::Error::new(full()).context("a\nb")), "a b: no storage space");
        assert_eq!(
            one_line(&anyhow::Error::new(full()).context("cannot write x: no storage space: make room"))
                .matches("no storage")
                .count(),
            1
        );
    }

    #[test]
    fn run_is_the_command_when_none_is_named() {
        for (given, becomes) in [
            ("t", "t run"),
            ("t --memory 1G", "t run --memory 1G"),
            ("t -x", "t run -x"),
            ("t run --memory 1G", "t run --memory 1G"),
            ("t man", "t man"),
            ("t rnu", "t rnu"),
            ("t --help", "t --help"),
            ("t -V", "t -V"),
        ] {
            let all = arguments(given.split(' ').map(OsString::from));
            assert_eq!(all, becomes.split(' ').map(OsString::from).collect::<Vec<_>>());
        }
    }
}
