//! One run of the agent, in the chroot or in a freshly started guest: how each engine is started, and the conversation
//! with the agent over the console until it has done its task.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::chroot;
use crate::console::{Console, Event};

/// What runs the user land.
#[derive(Debug, Clone)]
pub enum Engine {
    /// The host itself, in a chroot, on so many of its CPUs if not as many as the machine has.
    Native(Option<u32>),
    /// QEMU without hardware support, with so many CPUs if not as many as the machine.
    Qemu(Qemu, Option<u32>),
    /// Tightrope; the label tells two builds apart.
    Tightrope {
        /// Column title.
        label: String,
        /// The command.
        path: PathBuf,
        /// More arguments of `tightrope run`.
        args: Vec<String>,
        /// CPUs, if not as many as the machine's.
        cpus: Option<u32>,
    },
}

/// Where QEMU is.
#[derive(Debug, Clone)]
pub enum Qemu {
    /// A program on the host.
    Host(PathBuf),
    /// `qemu-system-x86_64` inside a directory with a Debian user land.
    Chroot(PathBuf),
}

impl Engine {
    /// Column title.
    pub fn label(&self) -> &str {
        match self {
            Self::Native(None) => "native",
            Self::Native(Some(_)) => "native-2",
            Self::Qemu(_, None) => "qemu",
            Self::Qemu(_, Some(_)) => "qemu-2",
            Self::Tightrope { label, .. } => label,
        }
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// How a guest comes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The agent as the first program; the root file system stays read-only.
    Direct,
    /// The same with the root file system writable.
    DirectWritable,
    /// The whole of systemd, to the login on the serial console.
    Systemd,
}

/// What the agent is to do.
#[derive(Debug, Clone)]
pub enum Task {
    /// Rows by name.
    Rows(Vec<String>),
    /// Cases of the correctness suite.
    Verify(Vec<String>),
    /// A mixture, for so many seconds, by so many workers.
    Soak(u64, u32),
    /// Report that it is there, nothing else.
    Login,
}

impl Task {
    fn agent_args(&self) -> Vec<String> {
        let (word, rest) = match self {
            Self::Rows(names) => ("rows", names.clone()),
            Self::Verify(names) => ("verify", names.clone()),
            Self::Soak(seconds, workers) => ("soak", vec![seconds.to_string(), workers.to_string()]),
            Self::Login => ("rows", Vec::new()),
        };
        [vec![word.to_owned()], rest].concat()
    }

    fn kernel_argument(&self) -> String {
        match self {
            Self::Login => "bench.do=login".to_owned(),
            _ => {
                let args = self.agent_args();
                let (word, rest) = args.split_first().map(|(w, r)| (w.as_str(), r.join(","))).unwrap_or_default();
                format!("bench.do={word}:{rest}")
            }
        }
    }
}

/// The guest: what is booted, and the machine it is given.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Initramfs that mounts `/dev/vda` and starts the program that `init=` names.
    pub initrd: PathBuf,
    /// Guest memory in MiB.
    pub memory: u32,
    /// vCPUs.
    pub cpus: u32,
    /// More kernel arguments.
    pub append: String,
}

/// All that a run needs besides the engine and the task.
#[derive(Debug, Clone)]
pub struct Setup {
    /// The user land as a directory.
    pub root: PathBuf,
    /// The guest.
    pub machine: Machine,
    /// How long the console may stay silent.
    pub silence: Duration,
    /// Whether to show the console.
    pub echo: bool,
}

/// How a run went.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The agent said that it had done its task.
    pub done: bool,
    /// Why it is not done, or that the machine did not go off properly afterwards.
    pub trouble: Option<String>,
    /// Host time from the start of the process to the agent's first word.
    pub up_wall: Option<Duration>,
    /// Guest time at that moment.
    pub up_guest: Option<Duration>,
    /// Guest time at which the kernel started the initramfs's first program.
    pub kernel_guest: Option<Duration>,
    /// Speed of the guest's clock between the agent's first and last word, against the host's: 1 is right.
    pub clock: Option<f64>,
    /// Host time from start to end of the process.
    pub wall: Duration,
}

/// How long a dying guest is listened to.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// Runs a task and hands each line of the agent to `take`: its mark (`@@` or `@=`), the rest, and the process id.
/// A guest that hangs, dies or stays on is an [`Outcome`] with trouble, not an error.
///
/// # Errors
/// The engine cannot be started at all, or `take` fails.
pub fn run(
    engine: &Engine,
    setup: &Setup,
    boot: Boot,
    image: &Path,
    task: &Task,
    mut take: impl FnMut(&str, &str, u32) -> Result<()>,
) -> Result<Outcome> {
    let command = match engine {
        Engine::Native(cpus) => {
            let args = task.agent_args();
            let mut words = vec!["/opt/bench/agent"];
            words.extend(args.iter().map(String::as_str));
            bound(&chroot::command(&setup.root, &words), cpus.unwrap_or(setup.machine.cpus))?
        }
        Engine::Qemu(qemu, cpus) => qemu_command(qemu, *cpus, setup, boot, image, task)?,
        Engine::Tightrope { path, args, cpus, .. } => tightrope_command(path, args, *cpus, setup, boot, image, task),
    };
    let mut console = Console::start(&mut tied(&command), setup.echo)?;
    let mut out = Outcome::default();
    // Guest time in ns and host time, at the agent's first word.
    let mut first: Option<(f64, Duration)> = None;
    // What the guest's kernel said before its end, and when.
    let mut dying: Option<(&'static str, Duration)> = None;
    let trouble = loop {
        let patience = if dying.is_some() { LAST_WORDS } else { setup.silence };
        let (line, at) = match console.next(patience) {
            Event::Line(line, at) => (line, at),
            Event::End | Event::Silence if dying.is_some() => break dying.map(|(what, _)| what.to_owned()),
            Event::End => break (!out.done).then(|| "ended before its task was done".to_owned()),
            Event::Silence => {
                let what = if out.done { "does not switch itself off" } else { "hangs" };
                break Some(format!("{what}: nothing on the console for {} s", setup.silence.as_secs()));
            }
        };
        out.wall = at;
        if let Some(death) = &dying {
            // The rest of the message is worth having.
            if at > death.1 + LAST_WORDS {
                break Some(death.0.to_owned());
            }
            continue;
        }
        let Some((mark, rest)) = agent_line(&line) else {
            dying = fatal(&line).map(|what| (what, at));
            continue;
        };
        if let Some(rest) = rest.strip_prefix("boot ") {
            let now = number(rest, "now").unwrap_or_default();
            first = Some((now, at));
            out.up_wall = Some(at);
            out.up_guest = duration(now / 1e9);
            out.kernel_guest = number(rest, "kernel").filter(|s| *s > 0.0).and_then(duration);
        } else if let Some(rest) = rest.strip_prefix("end ") {
            out.done = true;
            if let (Some((guest, host)), Some(now)) = (first, number(rest, "now")) {
                let passed = at.saturating_sub(host).as_secs_f64();
                out.clock = (passed > 0.5).then(|| (now - guest) / 1e9 / passed);
            }
        } else {
            take(mark, rest, console.pid())?;
        }
    };
    let status = if trouble.is_some() && !out.done {
        console.stop();
        None
    } else {
        console.finish(setup.silence)?
    };
    out.trouble =
        trouble.or_else(|| bad_end(status)).map(|t| format!("{t}; the console's last lines:\n{}", console.tail()));
    Ok(out)
}

/// The command on so many of the CPUs that we may use, as a guest has no more either.
fn bound(command: &Command, cpus: u32) -> Result<Command> {
    let allowed = rustix::thread::sched_getaffinity(None)?;
    let all = (0..rustix::thread::CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu));
    let list = all.take(cpus as usize).map(|cpu| cpu.to_string()).collect::<Vec<_>>().join(",");
    let mut c = Command::new("taskset");
    c.args(["--cpu-list", &list]).arg(command.get_program()).args(command.get_args());
    Ok(c)
}

/// The same command, but it ends when we are killed: no guest is left running behind.
fn tied(command: &Command) -> Command {
    let mut c = Command::new("setpriv");
    c.args(["--pdeathsig", "TERM", "--"]).arg(command.get_program()).args(command.get_args());
    c
}

fn bad_end(status: Option<ExitStatus>) -> Option<String> {
    match status {
        Some(s) if s.success() => None,
        Some(s) => Some(format!("ended with {s}")),
        None => Some("had to be stopped".to_owned()),
    }
}

/// Splits the agent's lines from everything else on the console; a kernel message may stand before one on the same line.
fn agent_line(line: &str) -> Option<(&str, &str)> {
    let at = line.find("@@ ").or_else(|| line.find("@= "))?;
    line.get(at..)?.split_once(' ')
}

/// Console lines after which nothing good follows.
fn fatal(line: &str) -> Option<&'static str> {
    const SIGNS: &[(&str, &str)] = &[
        ("Kernel panic - not syncing", "the guest's kernel panicked"),
        ("BUG: ", "the guest's kernel reports a bug"),
        ("Oops: ", "the guest's kernel took a fault"),
        ("watchdog: BUG: soft lockup", "the guest's kernel reports a lockup"),
        ("rcu: INFO: rcu_", "the guest's kernel reports a stall"),
        ("blocked for more than", "the guest's kernel reports a hung task"),
        ("EXT4-fs error", "the guest's file system is damaged"),
        ("I/O error, dev", "the guest's disk reports an error"),
        ("You are in emergency mode", "systemd went to its emergency mode"),
    ];
    SIGNS.iter().find(|(sign, _)| line.contains(sign)).map(|(_, meaning)| *meaning)
}

/// The value of `key=` among words.
pub fn number(words: &str, key: &str) -> Option<f64> {
    words.split_ascii_whitespace().find_map(|w| w.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}

fn duration(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

fn kernel_line(setup: &Setup, boot: Boot, task: &Task) -> String {
    let how = match boot {
        Boot::Direct => "ro init=/opt/bench/init",
        Boot::DirectWritable => "rw init=/opt/bench/init",
        Boot::Systemd => "rw systemd.show_status=0",
    };
    let line = format!(
        "console=ttyS0 quiet panic=-1 root=/dev/vda rootfstype=ext4 {how} {} {}",
        task.kernel_argument(),
        setup.machine.append
    );
    line.trim_end().to_owned()
}

fn qemu_command(
    qemu: &Qemu,
    cpus: Option<u32>,
    setup: &Setup,
    boot: Boot,
    image: &Path,
    task: &Task,
) -> Result<Command> {
    let m = &setup.machine;
    let cpus = cpus.unwrap_or(m.cpus);
    let read_only = if boot == Boot::Direct { "on" } else { "off" };
    // QEMU's commas are doubled inside values.
    let file = absolute(image)?.display().to_string().replace(',', ",,");
    let accel = if cpus > 1 { "tcg,thread=multi,tb-size=512" } else { "tcg,tb-size=512" };
    let args: Vec<String> = [
        "-nodefaults -no-user-config -display none -serial stdio -monitor none -no-reboot -cpu max -device virtio-rng-pci",
    ]
    .iter()
    .flat_map(|s| s.split(' ').map(str::to_owned))
    .chain(["-accel".to_owned(), accel.to_owned()])
    .chain(["-m".to_owned(), m.memory.to_string(), "-smp".to_owned(), cpus.to_string()])
    .chain(["-kernel".to_owned(), absolute(&m.kernel)?.display().to_string()])
    .chain(["-initrd".to_owned(), absolute(&m.initrd)?.display().to_string()])
    .chain(["-append".to_owned(), kernel_line(setup, boot, task)])
    .chain(["-drive".to_owned(), format!("if=none,id=d,format=raw,cache=writeback,readonly={read_only},file={file}")])
    .chain(["-device".to_owned(), "virtio-blk-pci,drive=d".to_owned()])
    .collect();
    Ok(match qemu {
        Qemu::Host(path) => {
            let mut c = Command::new(path);
            c.args(args);
            c
        }
        Qemu::Chroot(root) => {
            // The host's files appear under /host.
            let paths = |a: &String| match a.strip_prefix('/') {
                Some(_) => format!("/host{a}"),
                None => a.replace("file=/", "file=/host/"),
            };
            let words: Vec<String> =
                std::iter::once("qemu-system-x86_64".to_owned()).chain(args.iter().map(paths)).collect();
            chroot::command_with_host(root, &words.iter().map(String::as_str).collect::<Vec<_>>())
        }
    })
}

fn tightrope_command(
    path: &Path,
    more: &[String],
    cpus: Option<u32>,
    setup: &Setup,
    boot: Boot,
    image: &Path,
    task: &Task,
) -> Command {
    let m = &setup.machine;
    let cpus = cpus.unwrap_or(m.cpus);
    let disk = if boot == Boot::Direct { format!("{},ro", image.display()) } else { image.display().to_string() };
    let mut c = Command::new(path);
    c.arg("run").arg("--kernel").arg(&m.kernel).arg("--initrd").arg(&m.initrd);
    c.arg("--disk").arg(disk).arg("--memory").arg(format!("{}M", m.memory)).arg("--cpus").arg(cpus.to_string());
    c.arg("--append").arg(kernel_line(setup, boot, task)).args(more);
    c
}

fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{}", path.display()))
}

/// The version line of an engine's program.
///
/// # Errors
/// It cannot be run.
pub fn version(engine: &Engine) -> Result<String> {
    let mut command = match engine {
        Engine::Native(_) => {
            let mut c = Command::new("uname");
            c.args(["-s", "-r", "-m"]);
            c
        }
        Engine::Qemu(Qemu::Host(path), _) => {
            let mut c = Command::new(path);
            c.arg("--version");
            c
        }
        Engine::Qemu(Qemu::Chroot(root), _) => chroot::command(root, &["qemu-system-x86_64", "--version"]),
        Engine::Tightrope { path, .. } => {
            let mut c = Command::new(path);
            c.arg("--version");
            c
        }
    };
    let output = match command.output() {
        Ok(o) => o,
        Err(e) => bail!("cannot run {}: {e}", command.get_program().to_string_lossy()),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().next() {
        Some(line) if output.status.success() => Ok(line.trim().to_owned()),
        _ => {
            bail!("{engine}: its program does not tell its version: {}", String::from_utf8_lossy(&output.stderr).trim())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agent_lines_are_found() {
        assert_eq!(agent_line("@@ row=fib ns=1"), Some(("@@", "row=fib ns=1")));
        assert_eq!(agent_line("[ 1.0] random: ready@@ end now=5"), Some(("@@", "end now=5")));
        assert_eq!(agent_line("@= gcc QUJD"), Some(("@=", "gcc QUJD")));
        assert_eq!(agent_line("hello"), None);
    }

    #[test]
    fn numbers_are_found_by_key() {
        assert_eq!(number("now=12 kernel=0.5", "kernel"), Some(0.5));
        assert_eq!(number("now=12", "no"), None);
        assert_eq!(number("now=x", "now"), None);
    }

    #[test]
    fn tasks_become_arguments() {
        assert_eq!(Task::Rows(vec!["a".into(), "b".into()]).kernel_argument(), "bench.do=rows:a,b");
        assert_eq!(Task::Soak(60, 3).kernel_argument(), "bench.do=soak:60,3");
        assert_eq!(Task::Login.kernel_argument(), "bench.do=login");
    }

    #[test]
    fn a_program_that_lies_about_its_end_is_trouble() {
        let setup = Setup {
            root: "/".into(),
            machine: Machine { kernel: "k".into(), initrd: "i".into(), memory: 64, cpus: 1, append: String::new() },
            silence: Duration::from_secs(20),
            echo: false,
        };
        let dir = tempfile::tempdir().unwrap();
        let fake = |text: &str| {
            use std::os::unix::fs::PermissionsExt;
            let path = dir.path().join("fake");
            // Written under another name: a file just written may still be open in a forked child.
            std::fs::write(path.with_extension("new"), format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(path.with_extension("new"), std::fs::Permissions::from_mode(0o755)).unwrap();
            std::fs::rename(path.with_extension("new"), &path).unwrap();
            Engine::Tightrope { label: "t".into(), path, args: Vec::new(), cpus: None }
        };
        let go = |text: &str| {
            let mut lines = Vec::new();
            let engine = fake(text);
            let out = run(&engine, &setup, Boot::Direct, Path::new("d"), &Task::Login, |mark, l, _| {
                lines.push(format!("{mark} {l}"));
                Ok(())
            })
            .unwrap();
            (out, lines)
        };
        let (out, lines) =
            go("echo '@@ boot now=2500000000 kernel=1.25'; echo '@@ login'; echo '@@ end now=2600000000'");
        assert!(out.done && out.trouble.is_none(), "{:?}", out.trouble);
        assert_eq!(lines, ["@@ login"]);
        assert_eq!(out.kernel_guest, Some(Duration::from_millis(1250)));
        assert_eq!(out.up_guest, Some(Duration::from_millis(2500)));
        let (out, _) = go("echo '@@ boot now=1 kernel=1'");
        assert!(!out.done && out.trouble.unwrap().contains("before its task"));
        let (out, _) = go("echo '@@ end now=1'; exit 3");
        assert!(out.done && out.trouble.unwrap().contains("exit status: 3"));
        let (out, _) = go("echo 'Kernel panic - not syncing: x'; sleep 60");
        assert!(!out.done && out.trouble.unwrap().contains("panicked"));
        // The arguments of the command line that the engine was given.
        let (_, lines) = go("for a; do echo \"@@ arg $a\"; done; echo '@@ end now=1'");
        assert!(lines.contains(&"@@ arg d,ro".to_owned()) && lines.contains(&"@@ arg 64M".to_owned()), "{lines:?}");
        assert!(lines.iter().any(|l| l.contains("init=/opt/bench/init bench.do=login")));
    }
}
