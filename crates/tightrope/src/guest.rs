//! Which guest runs: the default image or the user's own kernel, and its command line.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use vmm::{SandboxMode, VmConfig};

use crate::cli::RunArgs;
use crate::settings::Settings;
use crate::system;

/// For every kernel: where the console is.
const CONSOLE: &str = "console=ttyS0";

/// For the default image, beyond [`CONSOLE`]: a quiet start, and no waiting for what a virtual machine has anyway (a steady TSC, a
/// timer that works, entropy from the CPU).
const DEFAULT_IMAGE: &str = "quiet tsc=reliable no_timer_check rcupdate.rcu_expedited=1 random.trust_cpu=on";

/// What the user's arguments and settings come to. Fetches the default image if it is asked for and not yet there.
///
/// # Errors
/// One line for the user.
pub fn configure(args: &RunArgs, settings: &Settings) -> Result<VmConfig> {
    let mut config = VmConfig::new(args.kernel.clone().unwrap_or_default());
    config.initrd = args.initrd.clone();
    config.disks = args.disk.clone();
    config.net = args.net.clone();
    config.forwards = args.publish.clone();
    // By this name it is found even if the file has been replaced since.
    config.net_server = Some(("/proc/self/exe".into(), "network-server".into()));
    config.shares = args.share.clone();
    config.share_server = Some(("/proc/self/exe".into(), "share-server".into()));
    config.memory = args.memory.or(settings.memory).unwrap_or(vmm::DEFAULT_MEMORY);
    config.cpus = args.cpus;
    config.engine = args.engine.or(settings.engine).unwrap_or_default();
    config.cpu_vendor = args.cpu_vendor;
    config.serial = args.serial.clone();
    // Standard input of a monitor in the background is no input for a guest.
    config.piped_input = !args.monitor && !vmm::terminal::is_terminal();
    config.virtio_console = args.virtio_console.clone();
    config.ports = args.port.clone();
    config.watchdog = args.watchdog;
    config.stats = args.stats;
    config.trace = args.trace.clone();
    config.gdb = args.gdb.clone();
    config.lockstep = args.lockstep;
    config.without = args.without.clone();
    config.save_to = args.save_to.clone();
    config.restore = args.restore.clone();
    config.sandbox = match (args.no_sandbox, args.sandbox_debug) {
        (true, _) => SandboxMode::Off,
        (_, true) => SandboxMode::Debug,
        _ => SandboxMode::On,
    };
    // What cannot work should not first fetch anything.
    config.check()?;
    let base = if args.kernel.is_some() { CONSOLE.to_string() } else { default_image(args, settings, &mut config)? };
    config.cmdline = std::iter::once(base)
        .chain(vmm::share_words(&args.share)?)
        .chain(args.append.iter().cloned())
        .collect::<Vec<_>>()
        .join(" ");
    Ok(config)
}

/// Fills in kernel and initrd of the default image, fetching it if need be; returns its command line.
fn default_image(args: &RunArgs, settings: &Settings, config: &mut VmConfig) -> Result<String> {
    if let Some(reference) = system::reference(args)? {
        let own = system::configure(&reference, args, settings, config)?;
        config.unpacked_kernel = unpacked(&config.kernel);
        let mut words = vec![CONSOLE.to_string(), own, DEFAULT_IMAGE.to_string()];
        words.extend(agent_words(args, config, "tightrope.init=agent"));
        return Ok(words.join(" "));
    }
    if args.keep.is_some() {
        bail!("the small image has no disk to --keep: name another, for example debian");
    }
    let options =
        image::Options { mirror: args.mirror.clone().or_else(|| settings.mirror.clone()), ..image::Options::default() };
    let image = image::default_image(image::DEFAULT_SUITE, image::Flavour::default(), &options)?;
    config.unpacked_kernel = unpacked(&image.kernel);
    config.kernel = image.kernel;
    config.initrd = Some(image.initrd);
    config.trusted_image = true;
    // A disk of the user's as root has its own shell and prompt.
    let own_root = |text: &String| text.split_whitespace().any(|word| word.contains("root="));
    config.ready_marker =
        (args.restore.is_none() && !args.append.iter().any(own_root)).then(|| image::PROMPT.to_string());
    let mut words = vec![CONSOLE.to_string(), image.cmdline, DEFAULT_IMAGE.to_string()];
    words.extend(agent_words(args, config, "rdinit=/tightrope/agent"));
    Ok(words.join(" "))
}

/// Gives the guest its agent. For a command the agent is process 1, by the word `as_init`: no shell, no services.
fn agent_words(args: &RunArgs, config: &mut VmConfig, as_init: &str) -> Vec<String> {
    if !args.no_agent {
        config.agent = Some(image::agent_archive(agent::PROGRAM).into());
    }
    if args.command.is_empty() {
        return terminal_words();
    }
    // A guest that panics starts again, which the command's caller sees as its end.
    vec![as_init.to_string(), "panic=-1".to_string()]
}

/// The kernel's unpacked payload, in the cache beside the kernel; put there if it is not. Unpacking takes a large part of a second.
fn unpacked(kernel: &Path) -> Option<PathBuf> {
    let path = kernel.with_file_name("vmlinux");
    if !path.exists() {
        let elf = vmm::unpack_kernel(&std::fs::read(kernel).ok()?)?;
        // A cache that is full or belongs to somebody else costs time, nothing more.
        image::cache::write_atomically(&path, &elf).ok()?;
    }
    Some(path)
}

/// What the guest's shell should know of the user's terminal.
fn terminal_words() -> Vec<String> {
    if !vmm::terminal::is_terminal() {
        return Vec::new();
    }
    let mut words = Vec::new();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.+".contains(c);
    if let Ok(term) = std::env::var("TERM")
        && !term.is_empty()
        && term.chars().all(plain)
    {
        words.push(format!("TERM={term}"));
    }
    if let Ok(size) = rustix::termios::tcgetwinsize(rustix::stdio::stdin())
        && size.ws_col > 0
        && size.ws_row > 0
    {
        words.push(format!("COLUMNS={} LINES={}", size.ws_col, size.ws_row));
    }
    words
}
