//! `bench`: the project's measuring instrument.
//!
//! It makes a Debian 13 user land from packages, runs the same work in it three ways (on the host in a chroot, in a guest
//! under QEMU TCG, in a guest under Tightrope), interleaved and several times, and prints medians, ratios and geometric
//! means. Each piece of work also prints a checksum; a time with a wrong result is no time. `bench verify` compares whole
//! outputs of ordinary programs between host and guest, `bench soak` and `bench boots` look for hangs, wrong results and
//! leaks over time.
//!
//! It is not a unit test and needs the network once (Debian packages, then cached). How to read and extend it:
//! `docs/bench.md`. Start reading at [`rows`] (what is measured), [`session`] (how an engine is run) and [`measure`].

#![forbid(unsafe_code)]

mod chroot;
mod console;
mod disk;
mod endure;
mod files;
mod measure;
mod report;
mod rows;
mod session;
mod verify;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};

use disk::Land;
use session::{Engine, Machine, Qemu, Setup};

#[derive(Parser)]
#[command(name = "bench", about = "Measures the host, QEMU TCG and Tightrope on the same work", version)]
struct Cli {
    #[command(subcommand)]
    command: Option<Sub>,
    #[command(flatten)]
    measure: MeasureArgs,
    #[command(flatten)]
    common: Common,
}

#[derive(Subcommand)]
enum Sub {
    /// Build the guest disk and print where it is
    Disk {
        /// Also copy the image there
        #[arg(long)]
        copy_to: Option<PathBuf>,
        /// The large one, of the rows that need it
        #[arg(long)]
        large: bool,
    },
    /// List the rows and the cases of the correctness suite
    List,
    /// Run the correctness suite on the host and in guests and compare all output
    Verify {
        /// Cases; all without any
        cases: Vec<String>,
        /// Guests to check
        #[arg(long, value_delimiter = ',', default_value = "tightrope")]
        engines: Vec<EngineName>,
        /// Boot the whole of systemd first
        #[arg(long)]
        systemd: bool,
    },
    /// Run a mixture of work in a guest for a while and look for hangs, wrong results and leaks
    Soak {
        /// How long
        #[arg(long, default_value_t = 30)]
        minutes: u64,
        /// Parallel streams of work
        #[arg(long, default_value_t = 3)]
        workers: u32,
        /// The guest's engine
        #[arg(long, default_value = "tightrope")]
        engine: EngineName,
    },
    /// Boot to systemd's login and switch off, many times
    Boots {
        /// How often
        #[arg(long, default_value_t = 50)]
        count: u32,
        /// The guest's engine
        #[arg(long, default_value = "tightrope")]
        engine: EngineName,
        /// Only to the disk's first program, without systemd
        #[arg(long)]
        direct: bool,
    },
}

/// What can run the user land.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineName {
    /// The host itself, on as many of its CPUs as the guests have
    Native,
    /// The same on two CPUs
    #[value(name = "native-2")]
    Native2,
    /// QEMU TCG
    Qemu,
    /// QEMU TCG with two CPUs
    #[value(name = "qemu-2")]
    Qemu2,
    /// Tightrope
    Tightrope,
    /// Tightrope with two CPUs
    #[value(name = "tightrope-2")]
    Tightrope2,
}

impl EngineName {
    fn is_native(self) -> bool {
        matches!(self, Self::Native | Self::Native2)
    }
}

#[derive(Args)]
struct MeasureArgs {
    /// Rows by name, comma-separated; groups are `facts`, `all`, `large` (needs the large user land) and `every`; `none` measures
    /// only starting up
    #[arg(long, default_value = "facts")]
    rows: String,
    /// Runs of each engine, interleaved
    #[arg(long, default_value_t = 3)]
    runs: u32,
    /// What to measure
    #[arg(long, value_delimiter = ',', default_value = "native,qemu,tightrope")]
    engines: Vec<EngineName>,
    /// Also measure the time to systemd's login
    #[arg(long)]
    login: bool,
    /// Write all figures there
    #[arg(long)]
    json: Option<PathBuf>,
    /// Compare two builds of Tightrope (paths of the command) by measuring both, or two JSON files
    #[arg(long, num_args = 2, value_names = ["A", "B"])]
    compare: Vec<PathBuf>,
}

#[derive(Args)]
struct Common {
    /// The Tightrope command to measure [default: `tightrope` beside this program]
    #[arg(long, global = true, env = "BENCH_TIGHTROPE")]
    tightrope: Option<PathBuf>,
    /// More arguments for `tightrope run`, separated by spaces
    #[arg(long, global = true, default_value = "", allow_hyphen_values = true)]
    tightrope_args: String,
    /// QEMU to compare with: `auto` is the host's when it is version 10 or newer, else Debian 13's in a chroot; or a path
    #[arg(long, global = true, default_value = "auto")]
    qemu: PathBuf,
    /// Debian suite the guest's kernel comes from: trixie has 6.12, bookworm 6.1
    #[arg(long, global = true, default_value_t = image::DEFAULT_SUITE.to_owned())]
    suite: String,
    /// Which of the suite's kernels: cloud or generic
    #[arg(long, global = true, default_value = "cloud")]
    flavour: image::Flavour,
    /// Another guest kernel
    #[arg(long, global = true, requires = "initrd")]
    kernel: Option<PathBuf>,
    /// Initramfs that mounts /dev/vda and starts what `init=` names
    #[arg(long, global = true, requires = "kernel")]
    initrd: Option<PathBuf>,
    /// More kernel arguments
    #[arg(long, global = true, default_value = "", allow_hyphen_values = true)]
    append: String,
    /// Guest memory in MiB
    #[arg(long, global = true, default_value_t = 1024)]
    memory: u32,
    /// Guest CPUs
    #[arg(long, global = true, default_value_t = 1)]
    cpus: u32,
    /// Seconds of silence on the console after which a guest counts as hung
    #[arg(long, global = true, default_value_t = 180)]
    silence: u64,
    /// Debian mirror, instead of the host's own
    #[arg(long, global = true)]
    mirror: Option<String>,
    /// Show the consoles
    #[arg(long, global = true)]
    echo: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("bench: {e:#}");
            ExitCode::FAILURE
        }
    }
}

/// True when everything held.
fn run(cli: &Cli) -> Result<bool> {
    let common = &cli.common;
    match &cli.command {
        Some(Sub::List) => {
            for row in rows::all()? {
                println!(
                    "{:10} {:5} {}",
                    row.name,
                    if row.fact {
                        "fact"
                    } else if row.large {
                        "large"
                    } else {
                        ""
                    },
                    row.title
                );
            }
            println!("verify: {}", files::verify_cases().join(" "));
            Ok(true)
        }
        Some(Sub::Disk { copy_to, large }) => {
            let disk = disk::build(common.mirror.as_deref(), if *large { Land::Large } else { Land::Usual })?;
            println!("directory {}\nimage     {}", disk.root.display(), disk.image.display());
            if let Some(to) = copy_to {
                disk::copy(&disk.image, to)?;
                println!("copy      {}", to.display());
            }
            Ok(true)
        }
        Some(Sub::Verify { cases, engines, systemd }) => {
            let known = files::verify_cases();
            if let Some(wrong) = cases.iter().find(|c| !known.contains(&c.as_str())) {
                bail!("no case is called {wrong}; there are {}", known.join(", "));
            }
            let (disk, setup) = prepare(common, Land::Usual)?;
            let engines = engines.iter().map(|n| engine(*n, common)).collect::<Result<Vec<_>>>()?;
            verify::run(&disk, &setup, &engines, cases, *systemd)
        }
        Some(Sub::Soak { minutes, workers, engine: name }) => {
            ensure!(!name.is_native(), "a soak writes to its disk and drops caches: it needs a guest");
            ensure!(*minutes > 0 && *workers > 0, "--minutes and --workers must be at least 1");
            let (disk, setup) = prepare(common, Land::Usual)?;
            endure::soak(&disk, &setup, &engine(*name, common)?, *minutes, *workers)
        }
        Some(Sub::Boots { count, engine: name, direct }) => {
            ensure!(!name.is_native(), "the host itself is not booted here");
            let (disk, setup) = prepare(common, Land::Usual)?;
            endure::boots(&disk, &setup, &engine(*name, common)?, *count, *direct)
        }
        None => measure_or_compare(&cli.measure, common),
    }
}

fn measure_or_compare(args: &MeasureArgs, common: &Common) -> Result<bool> {
    let rows = if args.rows == "none" { Vec::new() } else { rows::pick(&args.rows)? };
    if let [a, b] = args.compare.as_slice()
        && [a, b].iter().all(|p| p.extension().is_some_and(|e| e == "json"))
    {
        return measure::compare_files(a, b, &rows::all()?);
    }
    ensure!(args.runs > 0, "--runs must be at least 1");
    let engines = match args.compare.as_slice() {
        [a, b] => {
            let mut list = vec![Engine::Native(None)];
            list.retain(|_| args.engines.contains(&EngineName::Native));
            list.push(tightrope("A", a, common, None)?);
            list.push(tightrope("B", b, common, None)?);
            list
        }
        _ => args.engines.iter().map(|n| engine(*n, common)).collect::<Result<Vec<_>>>()?,
    };
    let land = if rows.iter().any(|row| row.large) { Land::Large } else { Land::Usual };
    let (disk, setup) = prepare(common, land)?;
    let plan = measure::Plan { rows, runs: args.runs, login: args.login };
    measure::run(&disk, &setup, &engines, &plan, args.json.as_deref())
}

fn prepare(common: &Common, land: Land) -> Result<(disk::Disk, Setup)> {
    let disk = disk::build(common.mirror.as_deref(), land)?;
    let (kernel, initrd) = match (&common.kernel, &common.initrd) {
        (Some(k), Some(i)) => (k.clone(), i.clone()),
        _ => guest_kernel(common)?,
    };
    for file in [&kernel, &initrd] {
        ensure!(file.is_file(), "{} is not there", file.display());
    }
    let machine = Machine { kernel, initrd, memory: common.memory, cpus: common.cpus, append: common.append.clone() };
    let setup =
        Setup { root: disk.root.clone(), machine, silence: Duration::from_secs(common.silence), echo: common.echo };
    Ok((disk, setup))
}

/// Debian's own kernel and the initramfs for it.
fn guest_kernel(common: &Common) -> Result<(PathBuf, PathBuf)> {
    let options = image::Options { mirror: common.mirror.clone(), ..image::Options::default() };
    let guest = image::default_image(&common.suite, common.flavour, &options)?;
    Ok((guest.kernel, guest.initrd))
}

fn engine(name: EngineName, common: &Common) -> Result<Engine> {
    match name {
        EngineName::Native => Ok(Engine::Native(None)),
        EngineName::Native2 => Ok(Engine::Native(Some(2))),
        EngineName::Qemu => Ok(Engine::Qemu(qemu(common)?, None)),
        EngineName::Qemu2 => Ok(Engine::Qemu(qemu(common)?, Some(2))),
        EngineName::Tightrope | EngineName::Tightrope2 => {
            let path = match &common.tightrope {
                Some(p) => p.clone(),
                None => std::env::current_exe()?.with_file_name("tightrope"),
            };
            match name {
                EngineName::Tightrope => tightrope("tightrope", &path, common, None),
                _ => tightrope("tightrope-2", &path, common, Some(2)),
            }
        }
    }
}

fn tightrope(label: &str, path: &Path, common: &Common, cpus: Option<u32>) -> Result<Engine> {
    ensure!(
        path.is_file(),
        "{} is not there: build it by `cargo build --release -p tightrope`, name another by --tightrope, or leave it out \
         by --engines native,qemu",
        path.display()
    );
    let args = common.tightrope_args.split_ascii_whitespace().map(str::to_owned).collect();
    // A path without a slash would be looked for in $PATH.
    Ok(Engine::Tightrope { label: label.to_owned(), path: std::path::absolute(path)?, args, cpus })
}

fn qemu(common: &Common) -> Result<Qemu> {
    if common.qemu != Path::new("auto") {
        return Ok(Qemu::Host(common.qemu.clone()));
    }
    let host = Qemu::Host("qemu-system-x86_64".into());
    let version = session::version(&Engine::Qemu(host.clone(), None)).unwrap_or_default();
    if major(&version).is_some_and(|m| m >= 10) {
        return Ok(host);
    }
    let root = disk::build_qemu(common.mirror.as_deref())
        .context("the host's QEMU is older than 10, and Debian 13's cannot be had (--qemu PATH takes what there is)")?;
    Ok(Qemu::Chroot(root))
}

/// The major number in `QEMU emulator version 10.0.2 (…)`.
fn major(version: &str) -> Option<u32> {
    version.split_once("version ")?.1.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
        let cli = Cli::try_parse_from(["bench", "--rows", "fib", "--compare", "a", "b"]).unwrap();
        assert_eq!(cli.measure.compare.len(), 2);
        assert!(Cli::try_parse_from(["bench", "--kernel", "k"]).is_err());
        assert!(
            Cli::try_parse_from(["bench", "verify", "--engines", "qemu", "gcc", "--kernel", "k", "--initrd", "i"])
                .is_ok()
        );
    }

    #[test]
    fn versions() {
        assert_eq!(major("QEMU emulator version 10.0.2 (Debian 1:10.0.2)"), Some(10));
        assert_eq!(major("nothing"), None);
    }
}
