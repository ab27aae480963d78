//! `tightrope ps`, `stop`, `logs`, `attach`, `exec`, `cp`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent::exec;
use anyhow::{Result, anyhow, bail};
use registry::{Entry, Registry, ring};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::Serialize;

use crate::cli::{CpArgs, ExecArgs, StopArgs};
use crate::instance::{agent, ask, exec as run_in, open, request, running};

/// How often it is looked whether a VM has ended.
const STEP: Duration = Duration::from_millis(10);
/// How often it is looked whether this terminal's window has another size.
const WINDOW: Duration = Duration::from_millis(250);
/// What is shown of the past when somebody attaches, in bytes.
const PAST: usize = 1024;

#[derive(Serialize)]
struct Row<'a> {
    id: &'a str,
    name: Option<&'a str>,
    state: String,
    exit_code: Option<i32>,
    pid: u32,
    started: u64,
    image: &'a str,
    command: &'a [String],
}

/// Lists VMs.
///
/// # Errors
/// The registry cannot be read.
pub fn ps(all: bool, json: bool) -> Result<i32> {
    let registry = Registry::open()?;
    registry.tidy();
    let entries = registry.entries();
    let shown: Vec<&Entry> = entries.iter().filter(|entry| entry.alive || (all && entry.about.keep)).collect();
    let mut out = io::stdout().lock();
    if json {
        let rows: Vec<Row<'_>> = shown
            .iter()
            .map(|entry| Row {
                id: &entry.about.id,
                name: entry.about.name.as_deref(),
                state: if entry.alive { "running" } else { "ended" }.into(),
                exit_code: if entry.alive { None } else { entry.exit },
                pid: entry.about.pid,
                started: entry.about.started,
                image: &entry.about.image,
                command: &entry.about.command,
            })
            .collect();
        writeln!(out, "{}", serde_json::to_string(&rows)?)?;
        return Ok(0);
    }
    let mut table = vec![["ID", "NAME", "STATE", "PID", "IMAGE", "COMMAND"].map(str::to_owned)];
    for entry in shown {
        let about = &entry.about;
        let state = match (entry.alive, entry.exit) {
            (true, _) => format!("up {}", age(about.started)),
            (false, Some(code)) => format!("ended ({code})"),
            (false, None) => "ended (killed)".into(),
        };
        let name = about.name.clone().unwrap_or_else(|| "-".into());
        let pid = if entry.alive { about.pid.to_string() } else { "-".into() };
        table.push([about.id.clone(), name, state, pid, about.image.clone(), about.command.join(" ")].map(plain));
    }
    let mut widths = [0; 6];
    for row in &table {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    for row in &table {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(0)
}

/// Without what a terminal would act on.
fn plain(text: String) -> String {
    text.replace(|c: char| c.is_control(), "?")
}

fn age(started: u64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    match now.saturating_sub(started) {
        seconds @ 0..60 => format!("{seconds} s"),
        seconds @ 60..3600 => format!("{} min", seconds / 60),
        seconds @ 3600..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86400),
    }
}

/// Ends VMs: the guest switches itself off, or, when it does not in time, is switched off.
///
/// # Errors
/// One line: there is no such VM, or it cannot be ended.
pub fn stop(args: &StopArgs) -> Result<i32> {
    let registry = Registry::open()?;
    // All must be there before any is ended.
    let entries = args.vm.iter().map(|name| registry.find(name)).collect::<Result<Vec<_>, _>>()?;
    for entry in entries {
        if !entry.alive {
            bail!("VM {} has ended already", entry.shown());
        }
        stop_one(&registry, &entry, args)?;
    }
    Ok(0)
}

fn stop_one(registry: &Registry, entry: &Entry, args: &StopArgs) -> Result<()> {
    // By this the process is meant, and no other that gets its number.
    let process = Pid::from_raw(entry.about.pid as i32).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
    let ended = |at_most: Duration| {
        let end = Instant::now() + at_most;
        loop {
            let alive = registry.entries().iter().any(|other| other.about.id == entry.about.id && other.alive);
            if !alive || Instant::now() >= end {
                return !alive;
            }
            std::thread::sleep(STEP);
        }
    };
    if !args.force {
        let time = Duration::from_secs(args.time);
        let by_agent = ask(entry, "status").is_ok_and(|status| status == "agent")
            && agent(entry).is_ok_and(|session| session.power_off(false).is_ok());
        if !by_agent {
            let _ = ask(entry, "power-button");
        }
        if ended(time) {
            return Ok(());
        }
    }
    let _ = ask(entry, "quit");
    if ended(Duration::from_secs(5)) {
        return Ok(());
    }
    if let Some(process) = process {
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
    if ended(Duration::from_secs(5)) { Ok(()) } else { Err(anyhow!("VM {} does not end", entry.shown())) }
}

/// Shows what a guest wrote on its console.
///
/// # Errors
/// One line.
pub fn logs(name: &str, follow: bool) -> Result<i32> {
    let registry = Registry::open()?;
    let entry = registry.find(name)?;
    if !entry.about.log {
        bail!("VM {} has no log: its console is where it was started", entry.shown());
    }
    let mut reader = reader(&entry)?;
    let mut out = io::stdout().lock();
    loop {
        // Looked at before the log, so that the last words are not missed.
        let alive = follow && registry.entries().iter().any(|other| other.about.id == entry.about.id && other.alive);
        let bytes = reader.read()?;
        if out.write_all(&bytes).and_then(|()| out.flush()).is_err() {
            return Ok(0);
        }
        if !alive {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn reader(entry: &Entry) -> Result<ring::Reader> {
    let file = File::open(entry.console()).map_err(|error| anyhow!("the log of VM {}: {error}", entry.shown()))?;
    Ok(ring::Reader::new(file))
}

/// Connects this process's terminal with a guest's console.
///
/// # Errors
/// One line.
pub fn attach(name: &str) -> Result<i32> {
    let entry = running(name)?;
    let past = reader(&entry).and_then(|mut reader| Ok(reader.read()?)).unwrap_or_default();
    let (mut stream, _) = open(&entry, "attach")?;
    let terminal = exec::on_terminal();
    if terminal {
        vmm::terminal::message("tightrope: attached; Ctrl-A D detaches, Ctrl-A A is Ctrl-A");
    }
    let start = past.len().saturating_sub(PAST);
    io::stdout().write_all(past.get(start..).unwrap_or_default())?;
    io::stdout().flush()?;
    let _raw = terminal.then(exec::Raw::enter);
    let (mut input, mut pending) = (true, false);
    let mut window = None;
    let look = rustix::event::Timespec { tv_sec: 0, tv_nsec: WINDOW.subsec_nanos().into() };
    loop {
        if terminal && window != Some(exec::terminal_size()) {
            let (columns, rows) = exec::terminal_size();
            window = Some((columns, rows));
            let _ = ask(&entry, &format!("window {columns} {rows}"));
        }
        let stdin = rustix::stdio::stdin();
        let mut fds = vec![PollFd::new(&stream, PollFlags::IN)];
        if input {
            fds.push(PollFd::new(&stdin, PollFlags::IN));
        }
        poll(&mut fds, terminal.then_some(&look))
            .or_else(|error| if error == rustix::io::Errno::INTR { Ok(0) } else { Err(error) })?;
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        let mut buffer = [0; 4096];
        if ready.first() == Some(&true) {
            let len = stream.read(&mut buffer).unwrap_or(0);
            if len == 0 {
                return Ok(0);
            }
            io::stdout().write_all(buffer.get(..len).unwrap_or_default())?;
            io::stdout().flush()?;
        }
        if ready.get(1) == Some(&true) {
            let len = rustix::io::read(stdin, &mut buffer).unwrap_or(0);
            input = len > 0;
            let mut keys = Vec::new();
            for byte in buffer.get(..len).unwrap_or_default() {
                match (std::mem::take(&mut pending), *byte) {
                    (false, 1) if terminal => pending = true,
                    (true, b'd' | b'D' | 4) => {
                        return Ok(0);
                    }
                    (true, b'a' | b'A' | 1) => keys.push(1),
                    (true, _) => {}
                    (false, byte) => keys.push(byte),
                }
            }
            if stream.write_all(&keys).is_err() {
                return Ok(0);
            }
        }
    }
}

/// Runs a command in a running guest.
///
/// # Errors
/// One line.
pub fn exec_in(args: &ExecArgs) -> Result<i32> {
    let entry = running(&args.vm)?;
    let tty = (args.tty || (exec::on_terminal() && !args.no_tty)).then(exec::terminal_size);
    let request = request(&args.command, tty, &args.env, args.user.as_deref(), args.workdir.as_deref())?;
    run_in(agent(&entry)?, request)
}

/// Copies files into a guest or out of it.
///
/// # Errors
/// One line.
pub fn cp(args: &CpArgs) -> Result<i32> {
    let left_out = match (split(&args.source), split(&args.destination)) {
        (Some((vm, source)), None) => agent(&running(&vm)?)?.get(&source, Path::new(&args.destination))?,
        (None, Some((vm, destination))) => agent(&running(&vm)?)?.put(Path::new(&args.source), &destination)?,
        _ => bail!("one of the two names must be in a VM (VM:PATH), the other here"),
    };
    if left_out > 0 {
        vmm::terminal::message(&format!("tightrope: {left_out} sockets, pipes or devices were left out"));
    }
    Ok(0)
}

/// `VM:PATH`. A colon behind a slash is part of a file's name: `./a:b`.
fn split(text: &OsString) -> Option<(String, OsString)> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = text.as_bytes();
    let at = bytes.iter().position(|byte| *byte == b':')?;
    let vm = String::from_utf8(bytes.get(..at)?.to_vec()).ok().filter(|vm| !vm.is_empty() && !vm.contains('/'))?;
    Some((vm, OsString::from_vec(bytes.get(at + 1..)?.to_vec())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files_here_and_there() {
        let there = |text: &str| split(&text.into()).map(|(vm, path)| (vm, path.into_string().unwrap()));
        assert_eq!(there("web:/etc/x"), Some(("web".into(), "/etc/x".into())));
        assert_eq!(there("web:a:b"), Some(("web".into(), "a:b".into())));
        for here in ["/etc/x", "x", "./a:b", ":x", ""] {
            assert_eq!(there(here), None, "{here}");
        }
    }
}
