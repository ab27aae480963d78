//! Running the command in tests: with which engine, for how long, and tiny kernels of our own.
//!
//! `TIGHTROPE_TEST_ENGINE` chooses the engine (`bt` unless set), so that every whole-machine test serves every engine.

#![allow(dead_code)] // each test file uses its part

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use patience::{Patience, STEP};
use rustix::process::{Pid, Signal, kill_process};

#[path = "patience.rs"]
mod patience;

/// A limit no test comes near when all is well.
pub const LIMIT: Duration = Duration::from_secs(120);

/// Is this CPU one that QEMU translates (or Bochs interprets), with engine `kvm` in a guest's guest? All is slow there.
pub fn emulated() -> bool {
    if std::env::var_os("TIGHTROPE_TEST_EMULATED").is_some() {
        return true;
    }
    let leaf = std::arch::x86_64::__cpuid(0x4000_0000);
    leaf.ebx.to_le_bytes() == *b"TCGT"
}

/// `limit` on such a CPU, and on others.
fn patient(limit: Duration) -> Duration {
    if emulated() { limit * 5 } else { limit }
}

/// Says that this host lacks what a test needs. Where all is there, in the machine of the nested tests, that is a failure.
pub fn left_out(why: &str) {
    assert!(std::env::var_os("TIGHTROPE_TEST_ALL").is_none(), "left out: {why}");
    eprintln!("left out: {why}");
}

/// What the default guest's shell shows when it waits for a line.
pub const PROMPT: &str = "tightrope:";

/// The engine under test.
pub fn engine() -> String {
    std::env::var("TIGHTROPE_TEST_ENGINE").unwrap_or_else(|_| "bt".into())
}

/// Where running VMs are listed in tests: not among the user's own. Sockets need a short name.
pub fn runtime_dir() -> PathBuf {
    let near = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    if near.as_os_str().len() < 60 { near } else { std::env::temp_dir() }
}

/// `tightrope` with arguments, without the user's settings.
pub fn tightrope(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tightrope"));
    command.args(args).env("XDG_CONFIG_HOME", "/nonexistent").stdin(Stdio::null());
    command.env("XDG_RUNTIME_DIR", runtime_dir());
    for name in ["TIGHTROPE_MIRROR", "TIGHTROPE_MEMORY", "TIGHTROPE_ENGINE", "TIGHTROPE_NO_SANDBOX"] {
        command.env_remove(name);
    }
    command
}

/// `tightrope run` with the engine under test.
pub fn run(args: &[&str]) -> Command {
    let mut command = tightrope(&["run", "--engine", &engine()]);
    command.args(args);
    command
}

/// What a finished process left.
#[derive(Debug)]
pub struct Finished {
    pub status: ExitStatus,
    pub out: String,
    pub err: String,
}

impl Finished {
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }
}

/// A process that is talked to. It is ended when dropped, as by a test that fails.
pub struct Session {
    child: Child,
    out: Receiver<Vec<u8>>,
    err: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    searched: usize,
}

fn reader(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (to, receiver) = channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(len) = from.read(&mut buffer) {
            if len == 0 || to.send(buffer[..len].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

impl Session {
    pub fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("spawn");
        let out = reader(child.stdout.take().expect("piped"));
        let err = reader(child.stderr.take().expect("piped"));
        Self { child, out, err, seen: Vec::new(), searched: 0 }
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("kill");
    }

    pub fn send(&mut self, text: &[u8]) {
        // Like a person: a shell that has just printed its prompt still sets its terminal up and may throw away what comes at once.
        std::thread::sleep(Duration::from_millis(400));
        self.child.stdin.as_mut().expect("open").write_all(text).expect("write");
    }

    /// Collects output for this long.
    pub fn watch(&mut self, time: Duration) {
        let deadline = Instant::now() + time;
        while let Ok(bytes) = self.out.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.extend(bytes);
        }
    }

    /// Ends the process by SIGKILL; returns all that it wrote.
    pub fn kill(mut self) -> String {
        self.child.kill().expect("kill");
        self.child.wait().expect("wait");
        self.seen.extend(self.out.iter().flatten());
        String::from_utf8_lossy(&self.seen).into_owned()
    }

    /// Closes the process's input.
    pub fn end_input(&mut self) {
        self.child.stdin = None;
    }

    /// Waits until the output has `text` behind what was waited for last.
    pub fn expect(&mut self, text: &str) {
        self.expect_within(text, LIMIT);
    }

    /// As [`Self::expect`], with a limit of one's own.
    pub fn expect_within(&mut self, text: &str, limit: Duration) {
        self.expect_one_of(&[text], limit);
    }

    /// Waits for one of several texts, and says which came first.
    pub fn expect_one_of(&mut self, texts: &[&str], limit: Duration) -> usize {
        self.look_for(texts, limit).unwrap_or_else(|why| {
            let _ = self.child.kill();
            panic!("{why}; {}", self.all_seen())
        })
    }

    /// Waits for one of several texts, and says which came first, or what happened instead.
    pub fn look_for(&mut self, texts: &[&str], limit: Duration) -> Result<usize, String> {
        let mut patience = Patience::new(patient(limit));
        loop {
            let place = |text: &str| self.seen[self.searched..].windows(text.len()).position(|w| w == text.as_bytes());
            let found = texts.iter().enumerate().filter_map(|(i, text)| Some((place(text)? + text.len(), i))).min();
            if let Some((end, which)) = found {
                self.searched += end;
                return Ok(which);
            }
            let lasts = patience.lasts();
            match self.out.recv_timeout(if lasts { STEP } else { Duration::ZERO }) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout) if lasts => {}
                Err(RecvTimeoutError::Timeout) => return Err(format!("{texts:?} did not come in time")),
                Err(RecvTimeoutError::Disconnected) => return Err(format!("{texts:?} did not come before the end")),
            }
        }
    }

    /// All output so far, and what came on standard error.
    pub fn all_seen(&mut self) -> String {
        let errors: Vec<u8> = if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.err.try_iter().flatten().collect()
        } else {
            self.err.iter().flatten().collect()
        };
        format!("output: {}\nerrors: {}", String::from_utf8_lossy(&self.seen), String::from_utf8_lossy(&errors))
    }

    /// The end of what came so far.
    pub fn seen(&self) -> String {
        String::from_utf8_lossy(&self.seen[self.seen.len().saturating_sub(4000)..]).into_owned()
    }

    /// Waits for the end of the process.
    pub fn finish(mut self) -> Finished {
        self.child.stdin = None;
        let mut patience = Patience::new(patient(LIMIT));
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                break status;
            }
            if !patience.lasts() {
                self.seen.extend(self.out.try_iter().flatten());
                let _ = self.child.kill();
                panic!("no end; {}", self.all_seen());
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        self.seen.extend(self.out.iter().flatten());
        let err: Vec<u8> = self.err.iter().flatten().collect();
        Finished {
            status,
            out: String::from_utf8_lossy(&self.seen).into_owned(),
            err: String::from_utf8_lossy(&err).into_owned(),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Nothing to do if it has ended and that is known.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs to the end with this input.
pub fn finish(command: Command, input: &[u8]) -> Finished {
    let mut session = Session::start(command);
    if let Some(mut stdin) = session.child.stdin.take() {
        let input = input.to_vec();
        // On a thread of its own: the process may not read all of it.
        std::thread::spawn(move || stdin.write_all(&input));
    }
    session.finish()
}

/// Code for tiny kernels, which start in 64-bit mode at [`Code::START`] with interrupts off.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    /// Where they are loaded.
    pub const START: u64 = 0x10_0000;

    pub fn new() -> Self {
        Self::default()
    }

    /// Appends machine code.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out8(self, port: u16, value: u8) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high, 0xb0, value, 0xee])
    }

    /// `mov dx, port; mov ax, value; out dx, ax`
    pub fn out16(self, port: u16, value: u16) -> Self {
        let ([pl, ph], [vl, vh]) = (port.to_le_bytes(), value.to_le_bytes());
        self.raw(&[0x66, 0xba, pl, ph, 0x66, 0xb8, vl, vh, 0x66, 0xef])
    }

    /// Writes `text` on the first serial port.
    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out8(0x3f8, byte))
    }

    /// `1: hlt; jmp 1b`
    pub fn stop(self) -> Self {
        self.raw(&[0xf4, 0xeb, 0xfd])
    }

    /// `jmp .`
    pub fn spin(self) -> Self {
        self.raw(&[0xeb, 0xfe])
    }

    /// Switches off by ACPI (PM1a control register, S5).
    pub fn power_off(self) -> Self {
        self.out16(0x604, 5 << 10 | 1 << 13).stop()
    }

    /// Resets by the chipset's reset register.
    pub fn reset(self) -> Self {
        self.out8(0xcf9, 6).stop()
    }

    /// `lidt [empty]; ud2`
    pub fn triple_fault(self) -> Self {
        self.raw(&[0x0f, 0x01, 0x1d, 0x02, 0, 0, 0, 0x0f, 0x0b]).raw(&[0; 10])
    }

    /// Sends back what comes in on the first serial port, and switches off after a `q`.
    pub fn echo(self) -> Self {
        self.raw(&[
            0x66, 0xba, 0xfd, 0x03, // 1: mov dx, 0x3fd
            0xec, // in al, dx
            0xa8, 0x01, // test al, 1
            0x74, 0xf7, // jz 1b
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
            0xec, // in al, dx
            0xee, // out dx, al
            0x3c, 0x71, // cmp al, 'q'
            0x75, 0xed, // jne 1b
        ])
        .power_off()
    }

    /// Writes the kernel as an ELF file into `dir`.
    pub fn write(&self, dir: &Path) -> PathBuf {
        const HEADERS: u64 = 64 + 56;
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(16, 0);
        for field in [2_u16, 62] {
            elf.extend(field.to_le_bytes()); // executable, x86-64
        }
        elf.extend(1_u32.to_le_bytes());
        for field in [Self::START, 64, 0] {
            elf.extend(field.to_le_bytes()); // entry, program headers, no sections
        }
        elf.extend(0_u32.to_le_bytes());
        for field in [64_u16, 56, 1, 64, 0, 0] {
            elf.extend(field.to_le_bytes());
        }
        for field in [1_u32, 5] {
            elf.extend(field.to_le_bytes()); // loaded, readable and executable
        }
        let size = self.0.len() as u64;
        for field in [HEADERS, Self::START, Self::START, size, size, 0x1000] {
            elf.extend(field.to_le_bytes());
        }
        elf.extend(&self.0);
        let path = dir.join("kernel");
        std::fs::write(&path, elf).expect("write");
        path
    }
}

/// A directory with a kernel in it.
pub struct Kernel {
    pub dir: tempfile::TempDir,
    pub path: String,
}

impl Kernel {
    pub fn new(code: Code) -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let path = code.write(dir.path()).display().to_string();
        Self { dir, path }
    }

    /// `tightrope run --kernel` with it.
    pub fn run(&self, args: &[&str]) -> Command {
        let mut command = run(&["--kernel", &self.path]);
        command.args(args);
        command
    }
}

/// A command that counts what the guest's kernel complains of. Not what it says because of QEMU's emulation of AMD CPUs: that AMD-V knows no
/// XSAVE, and that there is no microcode against a vulnerability of theirs.
pub const COMPLAINTS: &str = "dmesg | grep -E 'BUG|WARNING|Firmware Bug|unchecked MSR|lockup|stall|not responding' | \
    grep -v -c -E 'fpu/xstate|Speculative Return Stack'";

/// Types `command` and waits for the line that says that it is done; the line is not what was typed.
pub fn done(session: &mut Session, command: &str) {
    session.send(format!("{command} && echo all'-'well\n").as_bytes());
    session.expect("all-well");
}

/// Switches the guest off from its shell.
pub fn power_off(mut session: Session) -> Finished {
    session.send(b"poweroff -f\n");
    let finished = session.finish();
    assert_eq!(finished.code(), Some(0), "{}", finished.err);
    finished
}

/// A VM in the background, by its name. It is ended when dropped.
pub struct Vm {
    pub name: String,
    pub id: String,
}

impl Vm {
    pub fn start(name: &str, options: &[&str]) -> Self {
        // Of its own for each run of the tests: an earlier one may have been killed.
        let name = format!("{name}-{}", std::process::id());
        let net: &[&str] = if options.contains(&"--net") { &[] } else { &["--net", "none"] };
        let done = finish(run(&[&["--detach", "--name", &name], net, options].concat()), b"");
        assert_eq!(done.code(), Some(0), "{done:?}");
        let id = done.out.trim().to_owned();
        assert_eq!(id.len(), 12, "{done:?}");
        Self { name, id }
    }

    pub fn exec(&self, command: &[&str]) -> Command {
        tightrope(&[&["exec", &self.name], command].concat())
    }

    /// Runs a script to its end.
    pub fn sh(&self, script: &str) -> Finished {
        finish(self.exec(&["sh", "-c", script]), b"")
    }

    pub fn file(&self, path: &str) -> String {
        format!("{}:{path}", self.name)
    }

    pub fn pid(&self) -> i32 {
        let all: serde_json::Value = serde_json::from_str(&finish(tightrope(&["ps", "--json"]), b"").out).unwrap();
        let row = all.as_array().unwrap().iter().find(|row| row["id"] == self.id.as_str()).expect("it runs").clone();
        row["pid"].as_i64().unwrap() as i32
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = tightrope(&["stop", "--force", &self.id]).stderr(Stdio::null()).status();
    }
}

/// Waits until `condition` holds.
pub fn wait(what: &str, condition: impl Fn() -> bool) {
    let mut patience = Patience::new(patient(LIMIT));
    while !condition() {
        assert!(patience.lasts(), "{what} did not come about");
        std::thread::sleep(Duration::from_millis(20));
    }
}
