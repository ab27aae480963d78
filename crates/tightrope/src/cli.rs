//! The command line, for clap: also the source of `--help`, the man page and the shell completions.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::complete;
use clap::{Args, Parser, Subcommand, ValueHint};
use vmm::{
    DiskConfig, EngineChoice, GdbAddress, NetConfig, Optimization, PortConfig, PortForward, SerialMode, ShareConfig,
    StatsFormat, TraceConfig, Vendor, WatchdogAction,
};

const EXAMPLES: &str = "\
Examples:
  tightrope
      boot Debian to a shell (the first time, fetch it)
  tightrope run --memory 2G --disk data.img
      the same with 2 GiB of memory and a disk, which is /dev/vda
  tightrope run --kernel vmlinuz --initrd initrd.img --append 'root=/dev/vda1 ro' --disk debian.img
      boot your own
  echo 'uname -a; poweroff' | tightrope run
      drive it from a script
  tightrope run -- uname -a
      run a command in a VM of its own
  tightrope run --detach --name web -p 8080:80; tightrope exec web ls /; tightrope stop web
      keep one in the background
  tightrope run -p 8080:80
      reach the guest's web server at http://localhost:8080/
  tightrope run --kernel vmlinux --gdb 1234
      wait for a debugger: gdb vmlinux -ex 'target remote :1234'

At the console, Ctrl-A X quits and Ctrl-A H shows the other keys.

Exit codes: 0 the guest switched itself off, or you quit; 1 something given cannot be used; 2 wrong usage;
3 the guest crashed or hung; 128 + n ended by signal n.

A file $XDG_CONFIG_HOME/tightrope/config.toml may hold: memory = \"1G\", engine = \"bt\", mirror = \"https://…\".";

/// A virtual machine monitor for any x86-64 Linux host, with KVM or without
///
/// Without a command it is `tightrope run`, which runs Debian unless told otherwise; its options may follow at once.
#[derive(Debug, Parser)]
#[command(name = "tightrope", version, after_help = EXAMPLES, disable_help_subcommand = true)]
#[command(override_usage = "tightrope [COMMAND] [OPTIONS]")]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine (the default)
    Run(Box<RunArgs>),
    /// List the VMs that run
    Ps {
        /// Those too that have ended
        #[arg(long, short)]
        all: bool,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// End VMs: the guest switches itself off, or is switched off when it does not in time
    Stop(StopArgs),
    /// Run a command in a running guest, with this terminal, input and output; its exit code is this command's
    Exec(ExecArgs),
    /// Copy files and directories into a guest or out of it
    Cp(CpArgs),
    /// Show what a guest wrote on its console: the last mebibyte (of VMs that run in the background)
    Logs {
        /// The VM's name, or the start of its id
        #[arg(value_name = "VM", add = complete::known())]
        vm: String,
        /// Go on until it ends
        #[arg(long, short)]
        follow: bool,
    },
    /// Be at a guest's console (of VMs that run in the background); Ctrl-A D leaves it
    Attach {
        /// The VM's name, or the start of its id
        #[arg(value_name = "VM", add = complete::running())]
        vm: String,
    },
    /// Show how much memory a running guest has and uses, or take some of it away and give it back
    ///
    /// What a guest has free goes back to the host by itself, if the guest has a driver for the balloon (Linux: virtio_balloon).
    Balloon(crate::balloon::BalloonArgs),
    /// Say what this host can do for virtual machines, and what to change
    ///
    /// Exit code 0 when virtual machines run here, 1 when they do not.
    Doctor {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Make disks and look at them
    #[command(subcommand)]
    Disk(crate::disks::DiskCommand),
    /// Make an image of a whole Debian, or bring it up to date
    ///
    /// It is made from Debian's packages, checked by their signatures; no root is needed. `run` of the same name uses it.
    Pull {
        /// `debian[:SUITE][+PACKAGE…]`, such as debian, debian:bookworm or debian:13+nginx+git
        #[arg(add = complete::any_image())]
        image: String,
        /// Packages to install besides
        packages: Vec<String>,
        /// Install also what packages recommend
        #[arg(long)]
        recommends: bool,
        /// Where to fetch Debian from [default: what the host's own APT uses]
        #[arg(long, value_name = "URL", env = "TIGHTROPE_MIRROR", value_hint = ValueHint::Url)]
        mirror: Option<String>,
    },
    /// List the images that are there, and the disks that were kept
    Images {
        /// As JSON, for programs, with all packages
        #[arg(long)]
        json: bool,
    },
    /// Remove images, and disks that were kept (--keep)
    Rm {
        /// Names, or ids of images
        #[arg(required = true, add = complete::removable())]
        images: Vec<String>,
    },
    /// Remove images that newer ones have replaced, and packages that are no longer needed
    Prune,
    /// Print what makes a shell complete commands, options and names, for its start: source <(tightrope completions bash)
    Completions {
        /// bash, elvish, fish, powershell or zsh
        shell: clap_complete::Shell,
    },
    /// Be the process beside a VM's monitor; `run` starts it
    #[command(hide = true)]
    VmKeeper,
    /// Be the network server of a guest; `run` starts it
    #[command(hide = true)]
    NetworkServer,
    /// Be the server of a directory shared with a guest; `run` starts it
    #[command(hide = true)]
    ShareServer,
    /// Print the man page (man -l shows it: tightrope man | man -l -)
    Man,
}

/// `tightrope stop`
#[derive(Args, Clone, Debug)]
pub struct StopArgs {
    /// Names, or starts of ids
    #[arg(value_name = "VM", required = true, add = complete::running())]
    pub vm: Vec<String>,

    /// At once, as when the power fails
    #[arg(long, short)]
    pub force: bool,

    /// How long the guest may take, in seconds, before it is switched off
    #[arg(long, short, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(0..=86400))]
    pub time: u64,
}

/// `tightrope exec`
#[derive(Args, Clone, Debug)]
pub struct ExecArgs {
    /// On a terminal of its own (as it is by itself when input and output here are one)
    #[arg(long, short)]
    pub tty: bool,

    /// Never on a terminal
    #[arg(long, short = 'T', conflicts_with = "tty")]
    pub no_tty: bool,

    /// For those who are used to it: input is always passed on
    #[arg(long, short, hide = true)]
    pub interactive: bool,

    /// Set a variable; a name alone takes its value from here
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<String>,

    /// As whom: USER, UID, USER:GROUP or UID:GID [default: root]
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,

    /// Where [default: the user's home]
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<String>,

    /// The VM's name, or the start of its id
    #[arg(value_name = "VM", add = complete::running())]
    pub vm: String,

    /// What to run
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND", value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,
}

/// `tightrope cp`
#[derive(Args, Clone, Debug)]
pub struct CpArgs {
    /// A file or directory here, or VM:PATH
    #[arg(value_name = "SOURCE", add = complete::files())]
    pub source: OsString,

    /// Where it goes: as this name, or into it if it is a directory
    #[arg(value_name = "DESTINATION", add = complete::files())]
    pub destination: OsString,
}

/// `tightrope run`
#[derive(Args, Clone, Debug, Default)]
#[command(after_help = EXAMPLES)]
pub struct RunArgs {
    /// The image to run: `busybox` is Debian stable's own kernel and a BusyBox shell; `debian[:SUITE][+PACKAGE…]`, such as debian,
    /// debian:12 or debian+nginx+git, is a whole Debian, made at the first time (see `tightrope pull`) [default: busybox]
    #[arg(conflicts_with = "kernel", add = complete::any_image())]
    pub image: Option<String>,

    /// Run this kernel instead: a bzImage (vmlinuz) or an ELF vmlinux
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub kernel: Option<PathBuf>,

    /// The initial RAM file system that goes with --kernel
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "kernel")]
    pub initrd: Option<PathBuf>,

    /// Add to the kernel command line
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Vec<String>,

    /// A disk image (raw or qcow2) or block device, which the guest sees as /dev/vda (then vdb, …); `tightrope disk create` makes one.
    /// Takes ,ro (is not written) ,shared (other VMs that say so write to it too) ,format=raw or qcow2 (else by its name) ,serial=TEXT
    /// ,bps=100M ,iops=500 (limits) ,cache=writeback, writethrough or unsafe ,discard=off ,backing=DIRECTORY or backing=allow
    /// (where backing files may be beside the image's own directory) ,io=uring (else threads)
    #[arg(long, value_name = "FILE[,OPTION…]", value_hint = ValueHint::FilePath)]
    pub disk: Vec<DiskConfig>,

    /// The guest's network: `user` (no privilege needed: DHCP, DNS, the world; the host is host.tightrope.internal), `none`,
    /// `tap:NAME` (an existing device) or `socket:PATH` (frames to another VM or a backend). `user` takes ,isolated (nothing but
    /// forwarded ports) ,host=off (not the host itself) ,rate=100M (bits a second each way) ,dns=ADDRESS or dns=ADDRESS:PORT; `socket` takes
    /// ,listen or (for datagrams) ,local=PATH; all take ,mac=ADDRESS
    #[arg(long, value_name = "NET", default_value = "user")]
    pub net: NetConfig,

    /// Forward a port of the host (of 127.0.0.1 and ::1, unless an address is given) to the guest; port 0 takes a free one
    #[arg(short = 'p', long = "publish", value_name = "[ADDRESS:]PORT:GUESTPORT[/udp]")]
    pub publish: Vec<PortForward>,

    /// Let the guest see a directory of this host, at the absolute path GUEST (without one, at the same path; where GUEST is a tag,
    /// `mount -t virtiofs GUEST DIR` mounts it in the guest); `:ro` keeps it from being changed; `:exclusive` promises that nobody else changes
    /// it meanwhile, which is faster. Owned by root in the guest, by you here
    #[arg(long, value_name = "HOST[:GUEST][:ro][:exclusive]", value_hint = ValueHint::DirPath)]
    pub share: Vec<ShareConfig>,

    /// Guest memory, like 512M or 2G [default: 512M]
    #[arg(long, value_name = "SIZE", env = "TIGHTROPE_MEMORY", value_parser = vmm::parse_memory)]
    pub memory: Option<u64>,

    /// Number of virtual CPUs, up to 64; more than the host has cores is possible
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(vmm::MAX_CPUS)))]
    pub cpus: u32,

    /// Weight of this VM against others when the host's CPUs are short: 1 to 10000; other processes have 100
    #[arg(long, value_name = "WEIGHT", conflicts_with = "no_agent")]
    pub cpu_share: Option<limits::CpuShare>,

    /// Most CPU time that this VM takes, in percent of one CPU: 50%, 150%
    #[arg(long, value_name = "PERCENT%", conflicts_with = "no_agent")]
    pub cpu_limit: Option<limits::CpuLimit>,

    /// Most memory that this VM takes on the host, all in all: the guest's, the monitor's, and files the host caches for it
    #[arg(long, value_name = "SIZE", conflicts_with = "no_agent", value_parser = vmm::parse_memory)]
    pub memory_limit: Option<u64>,

    /// What executes the guest: auto, bt (binary translation), kvm (hardware) or interp (precise, slow) [default: auto]
    #[arg(long, value_name = "ENGINE", env = "TIGHTROPE_ENGINE", add = complete::engines())]
    pub engine: Option<EngineChoice>,

    /// Whose CPU the guest sees: intel or amd [default: that of this CPU's vendor with engine kvm, else intel]
    #[arg(long, value_name = "VENDOR")]
    pub cpu_vendor: Option<Vendor>,

    /// Where the console goes: stdio, none, pty, file:PATH (what is piped in is still its input) or unix:PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialMode,

    /// Add a virtio console, which the guest sees as /dev/hvc0, and where it goes: none, pty, file:PATH or unix:PATH (stdio, if
    /// --serial is elsewhere)
    #[arg(long, value_name = "WHERE")]
    pub virtio_console: Option<SerialMode>,

    /// Add a named port, which the guest sees as /dev/virtio-ports/NAME, and where it leads: unix:PATH (one client at a time), file:PATH
    /// or pty
    #[arg(long, value_name = "NAME=WHERE")]
    pub port: Vec<PortConfig>,

    /// Add a watchdog (Intel 6300ESB; Linux: i6300esb, /dev/watchdog), and what is done when the guest lets it run out: reset, poweroff (the
    /// exit code is 3), nmi, stop (its vCPUs stop) or none (a message)
    #[arg(long, value_name = "ACTION")]
    pub watchdog: Option<WatchdogAction>,

    /// Print counters at the end (and at any time on SIGUSR1 or Ctrl-A C); --stats=json for programs
    #[arg(long, value_name = "FORMAT", num_args = 0..=1, require_equals = true, default_missing_value = "text")]
    pub stats: Option<StatsFormat>,

    /// Write down what happens: a list of int, exits, blocks, tlb; to standard error or to a file
    #[arg(long, value_name = "KIND,…[:FILE]")]
    pub trace: Option<TraceConfig>,

    /// Start stopped and wait for gdb at a TCP port (of the loopback interface, unless an address is given) or at unix:PATH
    #[arg(long, value_name = "[ADDRESS:]PORT")]
    pub gdb: Option<GdbAddress>,

    /// Where to fetch Debian from [default: what the host's own APT uses]
    #[arg(long, value_name = "URL", env = "TIGHTROPE_MIRROR", value_hint = ValueHint::Url)]
    pub mirror: Option<String>,

    /// Keep what the guest writes to the disk of its image under this name, and go on with it the next time; otherwise it ends with the VM
    #[arg(long, value_name = "NAME", requires = "image", add = complete::disks())]
    pub keep: Option<String>,

    /// End when the process that started this one ends
    #[arg(long, hide = true)]
    pub with_parent: bool,

    /// A name for this VM, for ps, exec, stop and the others
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// Run in the background: print the VM's id when it has started
    #[arg(long, short, conflicts_with_all = ["command", "gdb"])]
    pub detach: bool,

    /// Set a variable for COMMAND; a name alone takes its value from here
    #[arg(long, short, value_name = "NAME=VALUE", requires = "command")]
    pub env: Vec<String>,

    /// As whom COMMAND runs: USER, UID, USER:GROUP or UID:GID [default: root]
    #[arg(long, short, value_name = "USER", requires = "command")]
    pub user: Option<String>,

    /// Where COMMAND runs [default: as root the current directory, where that is shared; else the user's home]
    #[arg(long, short, value_name = "DIR", requires = "command")]
    pub workdir: Option<String>,

    /// Run this in the guest, with this terminal, input and output, and end; its exit code is this command's
    #[arg(last = true, value_name = "COMMAND", conflicts_with_all = ["kernel", "restore"], value_hint = ValueHint::CommandWithArguments)]
    pub command: Vec<OsString>,

    /// Without agent and entry in the list of VMs
    #[arg(long, hide = true, conflicts_with_all = ["name", "detach", "command"])]
    pub no_agent: bool,

    /// Systemd has put this process into a scope with limits
    #[arg(long, hide = true)]
    pub in_scope: bool,

    /// Be the monitor of a VM that runs in the background
    #[arg(long, hide = true)]
    pub monitor: bool,

    /// Run every block in the interpreter too, and stop at the first difference [engine bt, one CPU]
    #[arg(long, help_heading = "Debugging")]
    pub lockstep: bool,

    /// Do without what makes engine bt fast, to see whether it is to blame: direct (programs that compute for long run on the
    /// CPU), tiers (hot code is translated again), transitions (system calls stay in translated code), tables (page tables
    /// are remembered)
    #[arg(long, value_name = "WHAT,…", value_delimiter = ',', help_heading = "Debugging", add = complete::optimizations())]
    pub without: Vec<Optimization>,

    /// Where SIGUSR2 saves the VM, which then ends
    #[arg(long, hide = true, value_name = "FILE")]
    pub save_to: Option<PathBuf>,

    /// Go on with a VM that was saved, instead of booting; all else must be given as it was
    #[arg(long, hide = true, value_name = "FILE")]
    pub restore: Option<PathBuf>,

    /// Do not confine the process (for debuggers and profilers)
    #[arg(long, hide = true, env = "TIGHTROPE_NO_SANDBOX", value_parser = clap::builder::FalseyValueParser::new())]
    pub no_sandbox: bool,

    /// Name a system call that the sandbox forbids, instead of being killed without a word
    #[arg(long, hide = true, conflicts_with = "no_sandbox")]
    pub sandbox_debug: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    fn run(args: &[&str]) -> Result<RunArgs, clap::Error> {
        match Cli::try_parse_from([&["tightrope", "run"], args].concat())?.command {
            Command::Run(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn everything_at_once() {
        let args = run(&[
            "--kernel=k",
            "--initrd=i",
            "--append",
            "-x",
            "--append",
            "y",
            "--disk",
            "a",
            "--disk",
            "b,ro",
            "--memory=1G",
            "--cpus=2",
            "--cpu-share=50",
            "--cpu-limit=150%",
            "--memory-limit=2G",
            "--engine=bt",
            "--serial=none",
            "--stats",
            "--trace=int:f",
            "--gdb=1234",
            "--net=user,isolated",
            "--share=/tmp:/src",
            "--share=/usr:usr:ro",
            "-p8080:80",
            "-p",
            "[::1]:53:53/udp",
        ])
        .unwrap();
        assert_eq!(args.append, ["-x", "y"]);
        assert_eq!((args.disk.len(), args.publish.len(), args.share.len()), (2, 2, 2));
        assert_eq!(run(&[]).unwrap().net, "user".parse().unwrap());
        assert!(args.disk[1].read_only);
        assert_eq!(args.memory, Some(1 << 30));
        assert_eq!(args.stats, Some(StatsFormat::Text));
        assert_eq!(run(&["--stats=json"]).unwrap().stats, Some(StatsFormat::Json));
    }

    #[test]
    fn wrong_usage() {
        for args in [
            &["--cpus=0"][..],
            &["--cpus=65"],
            &["--cpu-share=0"],
            &["--cpu-limit=150"],
            &["--memory=1M"],
            &["--memory=lots"],
            &["--engine=xen"],
            &["--serial=tty"],
            &["--initrd=i"],
            &["debian", "--kernel=k"],
            &["--stats=xml"],
            &["--watchdog=bark"],
            &["--port=a"],
            &["--port=a/b=pty"],
            &["--trace=all"],
            &["--gdb=here"],
            &["--net=bridge"],
            &["-p=80"],
            &["--share=/tmp:src/x"],
            &["--no-sandbox", "--sandbox-debug"],
        ] {
            assert_eq!(run(args).unwrap_err().exit_code(), 2, "{args:?}");
        }
    }
}
