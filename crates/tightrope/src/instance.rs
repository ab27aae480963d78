//! Running VMs as other commands see them: their entry in the registry, their control socket, and starting one in the background.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use agent::{Exec, Problem, Session, exec};
use anyhow::{Context, Result, anyhow, bail};
use limits::{Groups, Limits};
use registry::keeper::{Keeper, read_line};
use registry::{About, Entry, Registry};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm::{Instance, SandboxMode, SerialMode, VmConfig};

use crate::cli::RunArgs;

/// The longest answer of a monitor, in bytes.
const MAX_ANSWER: usize = 4096;
/// When a user is told that the agent in a guest does not come. Whole systems need half as long on a busy host.
const AGENT_IS_LATE: Timespec = Timespec { tv_sec: 20, tv_nsec: 0 };
/// How long a guest whose disks are to be left in order may take to switch off after its command.
const POWER_OFF: Duration = Duration::from_secs(30);

/// Makes the control groups that keep the VM within its limits, if it has some. Where systemd runs, this process becomes one in a scope first,
/// and starts from the beginning there.
///
/// # Errors
/// One line: limits cannot be had here.
pub fn limit(args: &RunArgs, words: &[std::ffi::OsString]) -> Result<Option<Groups>> {
    let limits = Limits { cpu_share: args.cpu_share, cpu_limit: args.cpu_limit, memory: args.memory_limit };
    if limits.is_empty() {
        return Ok(None);
    }
    let host = limits::Host::read();
    if args.in_scope {
        limits::scope::check(&limits, &host)?;
        return Ok(None);
    }
    let mut words = words.get(1..).unwrap_or_default().to_vec();
    // Behind `run`.
    words.insert(1.min(words.len()), "--in-scope".into());
    if let Some(mut command) = limits::scope::command(&limits, &std::env::current_exe()?, &words) {
        let error = command.exec();
        return Err(error).context("systemd-run cannot be started");
    }
    Ok(Some(Groups::make(&limits, &host)?))
}

/// Adds this process's VM to the registry, and puts it into its control groups.
///
/// # Errors
/// One line: the name is taken, there is no place for it.
pub fn register(args: &RunArgs, config: &mut VmConfig, lifeline: bool, groups: Option<Groups>) -> Result<()> {
    if let Some(limit) = args.memory_limit.filter(|limit| *limit < config.memory) {
        bail!(
            "--memory-limit of {} MiB is less than the guest's memory, {} MiB: raise it (the monitor needs some, too), or lower --memory",
            limit >> 20,
            config.memory >> 20
        );
    }
    let kernel = args.kernel.as_ref().map(|path| path.display().to_string());
    let about = About {
        name: args.name.clone(),
        image: kernel.or_else(|| args.image.clone()).unwrap_or_else(|| image::reference::BUSYBOX.into()),
        command: args.command.iter().map(|word| word.to_string_lossy().into_owned()).collect(),
        agent: config.agent.is_some(),
        log: config.serial == SerialMode::Log || config.background,
        keep: args.detach,
        cgroups: groups.as_ref().map(|groups| groups.dirs().to_vec()).unwrap_or_default(),
        ..About::default()
    };
    let own = Registry::open()?.add(about)?;
    let confined = config.sandbox != SandboxMode::Off;
    let keeper = Keeper::start("/proc/self/exe".as_ref(), "vm-keeper", &own.dir, confined)
        .context("the process beside the monitor cannot be started")?;
    // The keeper stays outside, or it could not remove them.
    if let Some(groups) = groups {
        groups.join()?;
    }
    let lifeline = lifeline.then(|| std::io::stdin().as_fd().try_clone_to_owned()).transpose()?;
    config.instance = Some(Arc::new(Instance::new(own, Some(keeper), lifeline)));
    Ok(())
}

/// Is a VM's monitor in the background: standard input leads to the process that started it.
///
/// # Errors
/// One line for the user.
pub fn monitor(args: &RunArgs, mut config: VmConfig, groups: Option<Groups>, started: Instant) -> Result<i32> {
    // A session of its own: what happens to the user's terminal is no business of this process.
    let _ = rustix::process::setsid();
    if config.serial == SerialMode::Stdio {
        config.serial = SerialMode::Log;
    }
    config.ready_marker = None;
    config.quiet = !args.detach;
    config.background = args.detach;
    register(args, &mut config, !args.detach, groups)?;
    let id = config.instance.as_ref().map(|instance| instance.id.clone()).unwrap_or_default();
    let vm = vmm::Vm::new(&config, started)?;
    let line = std::io::stdin();
    if rustix::io::write(line.as_fd(), format!("{id}\n").as_bytes()).is_err() {
        // Whoever wanted it has gone.
        return Ok(0);
    }
    Ok(vm.run())
}

/// Asks a VM's monitor; returns what stands behind `ok`.
///
/// # Errors
/// One line: the VM has ended, or what the monitor says.
pub fn ask(entry: &Entry, order: &str) -> Result<String> {
    Ok(open(entry, order)?.1)
}

/// As [`ask`], and the connection, for what follows.
///
/// # Errors
/// As [`ask`].
pub fn open(entry: &Entry, order: &str) -> Result<(UnixStream, String)> {
    open_and(entry, order, |_| Ok(()))
}

/// As [`open`]; `wait` may wait until there is an answer.
fn open_and(
    entry: &Entry,
    order: &str,
    wait: impl FnOnce(&UnixStream) -> std::io::Result<()>,
) -> Result<(UnixStream, String)> {
    let ended = || anyhow!("VM {} has ended", entry.shown());
    let mut stream = UnixStream::connect(entry.control()).map_err(|_| ended())?;
    stream.write_all(format!("{order}\n").as_bytes()).map_err(|_| ended())?;
    wait(&stream).map_err(|_| ended())?;
    let answer = read_line(&mut stream, MAX_ANSWER).map_err(|_| ended())?;
    match answer.split_once(' ').unwrap_or((&answer, "")) {
        ("ok", rest) => Ok((stream, rest.to_owned())),
        (_, why) => bail!("VM {}: {why}", entry.shown()),
    }
}

/// A running VM.
///
/// # Errors
/// One line: there is none of this name, or it has ended.
pub fn running(name: &str) -> Result<Entry> {
    let entry = Registry::open()?.find(name)?;
    if !entry.alive {
        bail!("VM {} has ended: tightrope ps lists those that run", entry.shown());
    }
    Ok(entry)
}

/// A connection to the agent in a VM's guest, waiting for it if it is still to come. If that takes long, a line says so.
///
/// # Errors
/// One line.
pub fn agent(entry: &Entry) -> Result<Session> {
    let name = entry.shown();
    let wait = |stream: &UnixStream| {
        let mut answer = [PollFd::new(stream, PollFlags::IN)];
        if poll(&mut answer, Some(&AGENT_IS_LATE))? == 0 {
            vmm::terminal::message(&format!(
                "tightrope: VM {name}: the agent in the guest has not come yet; waiting for it. What the guest says: tightrope logs {name}"
            ));
        }
        Ok(())
    };
    open_and(entry, "agent", wait)?;
    Session::connect(&entry.vsock())
        .map_err(|problem| anyhow!("VM {name}: {problem}; what the guest says: tightrope logs {name}"))
}

/// Runs a program in the guest; the exit code for this process.
///
/// # Errors
/// One line.
pub fn exec(session: Session, request: Exec) -> Result<i32> {
    match exec::run(session, request) {
        Ok(code) => Ok(code),
        Err(Problem::Failed(code, why)) => {
            vmm::terminal::message(&format!("tightrope: {why}"));
            Ok(code.max(1).into())
        }
        Err(problem) => Err(problem.into()),
    }
}

/// A monitor in the background, as the process that started it sees it.
struct Background {
    child: Child,
    line: UnixStream,
    entry: Entry,
}

/// `tightrope run` with a command or `--detach`: starts the monitor, and does what is left to do.
///
/// # Errors
/// One line.
pub fn start(args: &RunArgs, words: Vec<std::ffi::OsString>) -> Result<i32> {
    let mut background = match launch(words)? {
        Ok(background) => background,
        // It has said why.
        Err(code) => return Ok(code),
    };
    if args.detach {
        println!("{}", background.entry.about.id);
        return Ok(0);
    }
    match command(args, &background.entry) {
        Ok(code) => {
            // What ends with the VM need not be left in order.
            if !args.disk.is_empty() || args.keep.is_some() {
                background.power_off();
            }
            background.end();
            Ok(code)
        }
        Err(error) => {
            // If the guest has gone by itself, then that is what happened.
            match background.ended_within(Duration::from_secs(2)) {
                Some(0) if error.downcast_ref::<Problem>().is_some() => Ok(0),
                Some(code) if code != 0 => {
                    vmm::terminal::message(&format!("tightrope: {}", crate::one_line(&error)));
                    Ok(code)
                }
                _ => {
                    background.end();
                    Err(error)
                }
            }
        }
    }
}

/// Starts the monitor with this process's own arguments; the inner error is its exit code.
fn launch(mut words: Vec<std::ffi::OsString>) -> Result<Result<Background, i32>> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // Behind the name of the program and `run`.
    words.insert(2.min(words.len()), "--monitor".into());
    let mut child = Command::new("/proc/self/exe")
        .arg0("tightrope")
        .args(words.get(1..).unwrap_or_default())
        .stdin(theirs)
        .stdout(Stdio::null())
        .spawn()
        .context("the monitor cannot be started")?;
    let mut line = UnixStream::from(ours);
    match read_line(&mut line, 64) {
        Ok(id) => Ok(Ok(Background { child, line, entry: Registry::open()?.find(&id)? })),
        Err(_) => {
            let status = child.wait()?;
            Ok(Err(status.code().filter(|code| *code != 0).unwrap_or(1)))
        }
    }
}

/// Runs the command that the VM was started for.
fn command(args: &RunArgs, entry: &Entry) -> Result<i32> {
    let session = agent(entry)?;
    let tty = exec::on_terminal().then(exec::terminal_size);
    // Root can go where the caller is, if the guest has that, too.
    let here = || {
        let place = vmm::place_of(&args.share, &std::env::current_dir().ok()?)?;
        Some(place.to_str()?.to_owned())
    };
    let workdir = args.workdir.clone().or_else(|| args.user.is_none().then(here).flatten());
    exec(session, request(&args.command, tty, &args.env, args.user.as_deref(), workdir.as_deref())?)
}

/// What to run in a guest.
///
/// # Errors
/// A variable without a value.
pub fn request(
    command: &[std::ffi::OsString],
    tty: Option<(u16, u16)>,
    env: &[String],
    user: Option<&str>,
    cwd: Option<&str>,
) -> Result<Exec> {
    use std::os::unix::ffi::OsStrExt;
    let mut all: Vec<Vec<u8>> = Vec::new();
    if tty.is_some() {
        let term = std::env::var("TERM").unwrap_or_else(|_| "xterm".into());
        all.push(format!("TERM={term}").into_bytes());
    }
    for pair in env {
        match pair.split_once('=') {
            Some((name, _)) if !name.is_empty() => all.push(pair.clone().into_bytes()),
            // As others do: a name alone takes this process's value.
            None => all.extend(std::env::var(pair).ok().map(|value| format!("{pair}={value}").into_bytes())),
            Some(_) => bail!("'{pair}' is no variable: write NAME=value"),
        }
    }
    Ok(Exec {
        argv: command.iter().map(|word| word.as_bytes().to_vec()).collect(),
        env: all,
        cwd: cwd.unwrap_or_default().as_bytes().to_vec(),
        user: user.unwrap_or_default().as_bytes().to_vec(),
        tty,
    })
}

impl Background {
    /// Has the guest write everything to its disks and switch off.
    fn power_off(&mut self) {
        let asked = Session::connect(&self.entry.vsock()).and_then(|session| session.power_off(false));
        if asked.is_ok() {
            let _ = self.ended_within(POWER_OFF);
        }
    }

    /// The monitor's exit code, if it ends in time.
    fn ended_within(&mut self, at_most: Duration) -> Option<i32> {
        // The line ends with it: nothing else comes on it.
        let _ = self.line.set_read_timeout(Some(at_most));
        if !matches!(self.line.read(&mut [0]), Ok(0)) {
            return None;
        }
        self.child.wait().ok().map(|status| status.code().unwrap_or(1))
    }

    /// Ends the VM.
    fn end(mut self) {
        let _ = self.line.shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}
