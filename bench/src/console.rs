//! A child process whose output is read line by line with the time at which each line came, under a watchdog: a program
//! that stays silent too long is reported as hung and stopped.

use std::io::Read;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};

/// Longest line kept; what exceeds it is cut into lines of this length.
const LONGEST: usize = 64 * 1024;
/// Lines remembered for error messages.
const REMEMBERED: usize = 60;

/// What the next line is, or why there is none.
#[derive(Debug)]
pub enum Event {
    /// A line without its end, and the time since the start.
    Line(String, Duration),
    /// The output is closed; the process is over or about to be.
    End,
    /// Nothing came for the given time.
    Silence,
}

/// A running child.
pub struct Console {
    child: Child,
    /// Held open: a monitor may take the end of its input as the user's leaving.
    _stdin: Option<ChildStdin>,
    lines: Receiver<(String, Instant)>,
    start: Instant,
    echo: bool,
    last: std::collections::VecDeque<String>,
}

impl Console {
    /// Starts a program. Its standard error is read like its output. With `echo`, all lines go to our standard error too.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(command: &mut Command, echo: bool) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let (reader, writer) = std::io::pipe()?;
        command.stdin(Stdio::piped()).stdout(writer.try_clone()?).stderr(writer);
        let start = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        // The command keeps its copies of the pipe; the end of the output would never come.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || read_lines(reader, |line| sender.send((line, Instant::now())).is_ok()));
        let stdin = child.stdin.take();
        Ok(Self { child, _stdin: stdin, lines, start, echo, last: Default::default() })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line, at most `silence`.
    pub fn next(&mut self, silence: Duration) -> Event {
        match self.lines.recv_timeout(silence) {
            Ok((line, at)) => {
                if self.echo {
                    eprintln!("| {line}");
                }
                if self.last.len() == REMEMBERED {
                    self.last.pop_front();
                }
                self.last.push_back(line.clone());
                Event::Line(line, at.duration_since(self.start))
            }
            Err(RecvTimeoutError::Timeout) => Event::Silence,
            Err(RecvTimeoutError::Disconnected) => Event::End,
        }
    }

    /// The latest lines, for a message about what went wrong.
    pub fn tail(&self) -> String {
        self.last.iter().map(|l| format!("    | {l}\n")).collect()
    }

    /// Waits for the end of the process, at most `patience`; `None` when it had to be stopped.
    ///
    /// # Errors
    /// The process cannot be waited for.
    pub fn finish(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                self.stop();
                return Ok(None);
            }
            // Lines still to come must not fill the pipe; they are drained by the reader.
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the process to end, then makes it.
    pub fn stop(&mut self) {
        if let Some(pid) = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw) {
            let _ = kill_process(pid, Signal::TERM);
        }
        let until = Instant::now() + Duration::from_secs(3);
        while Instant::now() < until {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.stop();
        }
    }
}

/// Cuts a stream into lines, without carriage returns and escape sequences, until it ends or `take` returns false.
fn read_lines(mut from: impl Read, mut take: impl FnMut(String) -> bool) {
    let mut buffer = [0u8; 16384];
    let mut line = Vec::new();
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for &byte in buffer.iter().take(n) {
            if byte == b'\n' || line.len() >= LONGEST {
                if !take(clean(&line)) {
                    return;
                }
                line.clear();
            }
            if byte != b'\n' {
                line.push(byte);
            }
        }
    }
    if !line.is_empty() {
        take(clean(&line));
    }
}

/// Text of a console line: no carriage returns, no ANSI escape sequences, no other control characters.
fn clean(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            if chars.next_if_eq(&'[').is_some() {
                while chars.next().is_some_and(|c| !('@'..='~').contains(&c)) {}
            } else if chars.next_if_eq(&']').is_some() {
                while chars.next().is_some_and(|c| c != '\x07' && c != '\\') {}
            }
        } else if !c.is_control() || c == '\t' {
            out.push(c);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cleaned() {
        assert_eq!(clean(b"\x1b[0;1;39mhello\x1b[0m\r"), "hello");
        assert_eq!(clean(b"\x1b]3008;start=1\x1b\\\x1b[?2004hok\x00"), "ok");
        assert_eq!(clean(b"\x1b["), "");
    }

    #[test]
    fn long_and_last_lines_are_kept() {
        let mut got = Vec::new();
        let input = [vec![b'x'; LONGEST + 3], b"\nlast".to_vec()].concat();
        read_lines(&input[..], |l| {
            got.push(l.len());
            true
        });
        assert_eq!(got, [LONGEST, 3, 4]);
    }

    #[test]
    fn lines_come_with_times_and_the_end_is_seen() {
        let mut c = Console::start(Command::new("sh").args(["-c", "echo one; echo two >&2; exit 3"]), false).unwrap();
        let mut seen = Vec::new();
        while let Event::Line(l, _) = c.next(Duration::from_secs(20)) {
            seen.push(l);
        }
        assert_eq!(seen, ["one", "two"]);
        assert_eq!(c.finish(Duration::from_secs(20)).unwrap().unwrap().code(), Some(3));
    }

    #[test]
    fn silence_is_noticed_and_the_process_stopped() {
        let mut c = Console::start(Command::new("sh").args(["-c", "echo x; exec sleep 60"]), false).unwrap();
        assert!(matches!(c.next(Duration::from_secs(20)), Event::Line(..)));
        assert!(matches!(c.next(Duration::from_millis(50)), Event::Silence));
        assert!(c.tail().contains("| x"));
        assert!(c.finish(Duration::from_millis(10)).unwrap().is_none());
    }
}
