//! The command `tightrope`. Thin: it turns what the user asks for into a [`vmm::VmConfig`] and runs it.
//!
//! * [`cli`]: the command line. * [`settings`]: the configuration file. * [`guest`]: which kernel and what command line.

#![forbid(unsafe_code)]

mod cli;
mod guest;
mod settings;

use std::io::Write;
use std::process::exit;
use std::time::Instant;

use anyhow::Result;
use clap::{CommandFactory, FromArgMatches, Parser};

use cli::{Cli, Command, RunArgs};
use settings::Settings;

/// Exit code for something that cannot be used.
const EXIT_ERROR: i32 = 1;
/// Exit code for wrong usage.
const EXIT_USAGE: i32 = 2;

fn main() {
    let started = Instant::now();
    vmm::terminal::install_panic_hook();
    let code = match parse() {
        Ok(cli) => match execute(cli, started) {
            Ok(code) => code,
            Err(error) => {
                vmm::terminal::restore();
                // Causes are part of the one line; none of them may break it.
                let text = format!("{error:#}").replace('\n', " ");
                vmm::terminal::message(&format!("tightrope: {text}"));
                EXIT_ERROR
            }
        },
        Err(code) => code,
    };
    exit(code);
}

/// Parses the command line; wrong usage is told in one line.
fn parse() -> Result<Cli, i32> {
    Cli::try_parse().map_err(|error| {
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

fn execute(cli: Cli, started: Instant) -> Result<i32> {
    match cli.command {
        Some(Command::Run(args)) => run(&args, started),
        None => run(&defaults()?, started),
        Some(Command::Completions { shell }) => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tightrope", &mut text);
            std::io::stdout().write_all(&text)?;
            Ok(0)
        }
        Some(Command::Man) => {
            std::io::stdout().write_all(&man_page()?)?;
            Ok(0)
        }
    }
}

/// `tightrope` alone: `tightrope run` without arguments, with what the environment says.
fn defaults() -> Result<RunArgs> {
    let command = <RunArgs as clap::Args>::augment_args(clap::Command::new("run"));
    Ok(RunArgs::from_arg_matches(&command.try_get_matches_from(["run"])?)?)
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
    let settings = Settings::load()?;
    let config = guest::configure(args, &settings)?;
    let vm = vmm::Vm::new(&config, started)?;
    Ok(vm.run())
}
