//! What a VM is made of: [`VmConfig`] and the text forms its parts have on the command line.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

pub use cpu::cpuid::Vendor;
pub use disk::DiskConfig;

use crate::instance::Instance;
use crate::net::{NetConfig, PortForward};
use crate::ports::PortConfig;
use crate::share::ShareConfig;

/// Guest memory when nobody says otherwise, in bytes.
pub const DEFAULT_MEMORY: u64 = 512 << 20;
/// The most vCPUs a VM may be given.
pub const MAX_CPUS: u32 = 64;

/// Everything [`crate::Vm::new`] needs to know.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// The kernel: a bzImage or an ELF `vmlinux`.
    pub kernel: PathBuf,
    /// What the payload of `kernel` unpacks to, kept from earlier to save the time: see [`crate::unpack_kernel`]. A file that is
    /// missing or damaged is not used.
    pub unpacked_kernel: Option<PathBuf>,
    /// The initial RAM file system, if any.
    pub initrd: Option<PathBuf>,
    /// An archive that the guest's kernel unpacks before the initrd, if there is an initrd: the agent (`image::agent_archive`).
    pub agent: Option<Arc<[u8]>>,
    /// With one, other commands find this VM and the guest has a vsock device.
    pub instance: Option<Arc<Instance>>,
    /// Say only what is wrong.
    pub quiet: bool,
    /// Once the VM has started, let go of standard error, which belongs to who started it: lines for the user go to the instance's log,
    /// and the servers of network and shared directories say nothing.
    pub background: bool,
    /// Were kernel and initrd made by Tightrope itself (and so need no look at their insides)?
    pub trusted_image: bool,
    /// The kernel command line.
    pub cmdline: String,
    /// Disks, in the order the guest sees them (`vda`, `vdb`, …).
    pub disks: Vec<DiskConfig>,
    /// Files, disks among them, that are removed as soon as the VM has them open: they end with it.
    pub temporary: Vec<PathBuf>,
    /// The network.
    pub net: NetConfig,
    /// Ports of the host that lead to the guest.
    pub forwards: Vec<PortForward>,
    /// The program and argument that become the network server, where the network needs one: it is to call `nat::server::run`.
    pub net_server: Option<(PathBuf, String)>,
    /// Directories of the host that the guest sees.
    pub shares: Vec<ShareConfig>,
    /// The program and argument that become the server of a shared directory: it is to call `share::server::run`.
    pub share_server: Option<(PathBuf, String)>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Which engine runs the guest.
    pub engine: EngineChoice,
    /// Whose CPU the guest sees; `None`: under engine `kvm` that of the host's vendor, else Intel's. A saved VM's stays.
    pub cpu_vendor: Option<Vendor>,
    /// Where the serial console goes.
    pub serial: SerialMode,
    /// Where a virtio console, the guest's `hvc0`, goes; `None` for no such device.
    pub virtio_console: Option<SerialMode>,
    /// A console that goes to a file gets its input from standard input, which is no terminal.
    pub piped_input: bool,
    /// Named ports of the guest.
    pub ports: Vec<PortConfig>,
    /// What is done when the guest hangs; with it there is a watchdog.
    pub watchdog: Option<WatchdogAction>,
    /// Print counters at exit (and on SIGUSR1 in any case).
    pub stats: Option<StatsFormat>,
    /// What the engine writes down as it runs.
    pub trace: Option<TraceConfig>,
    /// Where a debugger may connect; the guest then starts stopped.
    pub gdb: Option<GdbAddress>,
    /// How the process confines itself before the guest runs.
    pub sandbox: SandboxMode,
    /// Run the translator beside the interpreter and stop at the first difference.
    pub lockstep: bool,
    /// What engine `bt` does without.
    pub without: Vec<Optimization>,
    /// Where SIGUSR2 saves the VM, which then ends.
    pub save_to: Option<PathBuf>,
    /// A saved VM that goes on instead of a boot. Everything else must be as it was for that VM.
    pub restore: Option<PathBuf>,
    /// A text that the guest prints once on its console when its shell is ready; the time until then is reported.
    pub ready_marker: Option<String>,
}

impl VmConfig {
    /// A VM with `kernel` and nothing else: one vCPU, [`DEFAULT_MEMORY`], serial console on the terminal.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            unpacked_kernel: None,
            initrd: None,
            agent: None,
            instance: None,
            quiet: false,
            background: false,
            trusted_image: false,
            cmdline: String::new(),
            disks: Vec::new(),
            temporary: Vec::new(),
            net: NetConfig::None,
            forwards: Vec::new(),
            net_server: None,
            shares: Vec::new(),
            share_server: None,
            memory: DEFAULT_MEMORY,
            cpus: 1,
            engine: EngineChoice::Auto,
            cpu_vendor: None,
            serial: SerialMode::Stdio,
            virtio_console: None,
            piped_input: false,
            ports: Vec::new(),
            watchdog: None,
            stats: None,
            trace: None,
            gdb: None,
            sandbox: SandboxMode::On,
            lockstep: false,
            without: Vec::new(),
            save_to: None,
            restore: None,
            ready_marker: None,
        }
    }

    /// Can the engine that is asked for do what is asked of it? [`crate::Vm::new`] asks too; this is for those who would first fetch
    /// or build something.
    ///
    /// # Errors
    /// [`crate::Error`] with one line for the user.
    pub fn check(&self) -> Result<(), crate::Error> {
        crate::engine::check(self)
    }
}

/// `--engine`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// The fastest engine that works here.
    #[default]
    Auto,
    /// Binary translation.
    Bt,
    /// Hardware virtualization.
    Kvm,
    /// The precise, slow interpreter.
    Interp,
}

impl FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "bt" => Ok(Self::Bt),
            "kvm" => Ok(Self::Kvm),
            "interp" => Ok(Self::Interp),
            _ => Err(format!("there is no engine '{text}': choose auto, bt, kvm or interp")),
        }
    }
}

/// What engine `bt` does to be fast, and can do without: to find out whether it is to blame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Optimization {
    /// Programs that compute for long run directly on the CPU, in processes of their own.
    Direct,
    /// Code is translated to be short first, and again to be fast where it is hot.
    Tiers,
    /// System calls, returns from them and from interrupts stay in translated code.
    Transitions,
    /// Page tables that were found are remembered.
    Tables,
}

impl FromStr for Optimization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "direct" => Ok(Self::Direct),
            "tiers" => Ok(Self::Tiers),
            "transitions" => Ok(Self::Transitions),
            "tables" => Ok(Self::Tables),
            _ => Err(format!("there is no '{text}' to do without: choose of direct, tiers, transitions and tables")),
        }
    }
}

/// How the process confines itself before the first guest instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SandboxMode {
    /// Everything the host offers; a forbidden system call kills the process.
    #[default]
    On,
    /// As `On`, but a forbidden system call is named on standard error before the process ends.
    Debug,
    /// Nothing: for debuggers and profilers.
    Off,
}

/// `--watchdog`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WatchdogAction {
    /// The machine is reset: the guest starts anew.
    Reset,
    /// The VM ends, with the exit code of a crash.
    PowerOff,
    /// A non-maskable interrupt, from which a guest may save a dump of itself or panic.
    Nmi,
    /// The vCPUs stop: the VM stays for somebody who looks at it.
    Stop,
    /// A message, nothing else.
    None,
}

impl FromStr for WatchdogAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reset" => Ok(Self::Reset),
            "poweroff" => Ok(Self::PowerOff),
            "nmi" => Ok(Self::Nmi),
            "stop" => Ok(Self::Stop),
            "none" => Ok(Self::None),
            _ => Err(format!("'{text}' is nothing that a watchdog does: choose reset, poweroff, nmi, stop or none")),
        }
    }
}

/// `--stats`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatsFormat {
    /// A table.
    Text,
    /// One JSON object on one line.
    Json,
}

impl FromStr for StatsFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(format!("'{text}' is no format for counters: choose text or json")),
        }
    }
}

/// `--serial`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum SerialMode {
    /// Standard input and output; raw mode if they are a terminal.
    #[default]
    Stdio,
    /// Output is thrown away, there is no input.
    None,
    /// To the log of the VM's [`VmConfig::instance`], and to whoever attaches; messages of the monitor too, once the VM is started.
    Log,
    /// Output is appended to a file; input there is only with [`VmConfig::piped_input`].
    File(PathBuf),
    /// A pseudo-terminal, whose name is printed.
    Pty,
    /// A Unix socket on which one client at a time may connect.
    Unix(PathBuf),
}

impl FromStr for SerialMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            None if text == "pty" => Ok(Self::Pty),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("unix", path)) if !path.is_empty() => Ok(Self::Unix(path.into())),
            _ => Err(format!("'{text}' is no place for a console: choose stdio, none, pty, file:PATH or unix:PATH")),
        }
    }
}

/// `--trace KIND,KIND…[:FILE]`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TraceConfig {
    /// Interrupts and exceptions.
    pub interrupts: bool,
    /// Port and memory-mapped I/O.
    pub exits: bool,
    /// Translated blocks as they are entered.
    pub blocks: bool,
    /// TLB fills and flushes.
    pub tlb: bool,
    /// Where the lines go; standard error if nowhere else.
    pub file: Option<PathBuf>,
}

impl FromStr for TraceConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kinds, file) = match text.split_once(':') {
            Some((_, "")) => return Err("the name of the trace file is missing behind ':'".into()),
            Some((kinds, file)) => (kinds, Some(PathBuf::from(file))),
            None => (text, None),
        };
        let mut config = Self { file, ..Self::default() };
        for kind in kinds.split(',') {
            match kind {
                "int" => config.interrupts = true,
                "exits" => config.exits = true,
                "blocks" => config.blocks = true,
                "tlb" => config.tlb = true,
                _ => return Err(format!("'{kind}' cannot be traced: choose among int, exits, blocks, tlb")),
            }
        }
        Ok(config)
    }
}

/// `--gdb [ADDRESS:]PORT` or `--gdb unix:PATH`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GdbAddress {
    /// A TCP port; on the loopback interface unless an address is given.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl FromStr for GdbAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() {
                Err("the path of the socket is missing behind 'unix:'".into())
            } else {
                Ok(Self::Unix(path.into()))
            };
        }
        let wrong = || format!("'{text}' is no address for gdb: use PORT, ADDRESS:PORT or unix:PATH");
        if let Ok(port) = text.parse::<u16>() {
            return Ok(Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        if let Some(port) = text.strip_prefix("localhost:") {
            let port = port.parse().map_err(|_| wrong())?;
            return Ok(Self::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port)));
        }
        text.parse().map(Self::Tcp).map_err(|_| wrong())
    }
}

/// Reads a size of memory: a number with `K`, `M`, `G` or `T` (powers of 1024, optionally followed by `B` or `iB`); a bare
/// number means MiB. Returns bytes.
///
/// # Errors
/// One line saying what is wrong.
pub fn parse_memory(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no size of memory: write for example 512M or 2G");
    let trimmed = text.trim();
    let digits = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(digits);
    let number: u64 = number.parse().map_err(|_| wrong())?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "" | "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong()),
    };
    let bytes = number.checked_mul(1 << shift).ok_or_else(wrong)?;
    let (min, max) = (memory::layout::MIN_RAM, memory::layout::MAX_RAM);
    if bytes < min || bytes > max {
        return Err(format!(
            "{text} of memory is not possible: choose between {} MiB and {} GiB, for example 512M",
            min >> 20,
            max >> 30
        ));
    }
    if bytes % memory::PAGE_SIZE != 0 {
        return Err(format!("{text} is not a multiple of 4 KiB"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_sizes() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!(parse_memory("512"), Ok(512 << 20));
        assert_eq!(parse_memory("2G"), Ok(2 << 30));
        assert_eq!(parse_memory("2gib"), Ok(2 << 30));
        assert_eq!(parse_memory("65536K"), Ok(64 << 20));
        for bad in ["", "M", "1X", "-5M", "12.5M", "99999999999999999999", "1M", "2000T", "18446744073709551615T"] {
            assert!(parse_memory(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn consoles() {
        assert_eq!("stdio".parse(), Ok(SerialMode::Stdio));
        assert_eq!("file:/tmp/x:y".parse(), Ok(SerialMode::File("/tmp/x:y".into())));
        for bad in ["", "file:", "tty", "unix", "pty:3"] {
            assert!(bad.parse::<SerialMode>().is_err(), "{bad}");
        }
    }

    #[test]
    fn traces() {
        let trace: TraceConfig = "int,tlb:out.txt".parse().unwrap();
        assert!(trace.interrupts && trace.tlb && !trace.exits && !trace.blocks);
        assert_eq!(trace.file, Some("out.txt".into()));
        for bad in ["", "int,", "in", "int:"] {
            assert!(bad.parse::<TraceConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn gdb_addresses() {
        assert_eq!("1234".parse(), Ok(GdbAddress::Tcp("127.0.0.1:1234".parse().unwrap())));
        assert_eq!("localhost:1".parse(), Ok(GdbAddress::Tcp("127.0.0.1:1".parse().unwrap())));
        assert_eq!("[::1]:1".parse(), Ok(GdbAddress::Tcp("[::1]:1".parse().unwrap())));
        assert_eq!("unix:/x".parse(), Ok(GdbAddress::Unix("/x".into())));
        for bad in ["", "x", "unix:", "70000", ":1234", "host:x"] {
            assert!(bad.parse::<GdbAddress>().is_err(), "{bad}");
        }
    }
}
