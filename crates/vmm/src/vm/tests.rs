//! The supervisor with a toy engine and a toy board: real machine code of a few instructions, no PC.

use super::*;
use crate::console::Input;
use cpu::Nothing;
use cpu::{Bus, CpuState, Kick, LocalApic, Vcpu, gpr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

/// Where toy programs are loaded and start.
const START: u64 = 0x1000;
const PORT_SERIAL: u16 = 0x3f8;
const PORT_POWER: u16 = 0x604;
const PORT_RESET: u16 = 0xcf9;
const PORT_PANIC: u16 = 0x666;

struct ToyEngine(GuestRam, cpu::cpuid::CpuidModel);

#[derive(Default)]
struct Bell {
    stop: AtomicBool,
    lock: Mutex<()>,
    rung: Condvar,
}

impl Kick for Bell {
    fn kick(&self) {
        let _guard = self.lock.lock().unwrap();
        self.stop.store(true, Ordering::SeqCst);
        self.rung.notify_all();
    }
}

struct NoKick;
impl Kick for NoKick {
    fn kick(&self) {}
}

struct ToyVcpu {
    state: CpuState,
    ram: GuestRam,
    bus: Arc<dyn Bus>,
    bell: Arc<Bell>,
    breakpoints: Vec<u64>,
    instructions: u64,
}

impl Engine for ToyEngine {
    fn name(&self) -> &'static str {
        "toy"
    }
    fn create_vcpu(&self, setup: VcpuSetup) -> Result<Box<dyn Vcpu>, String> {
        Ok(Box::new(ToyVcpu {
            state: CpuState::default(),
            ram: self.0.clone(),
            bus: setup.bus,
            bell: Arc::default(),
            breakpoints: Vec::new(),
            instructions: 0,
        }))
    }
    fn ram(&self) -> &GuestRam {
        &self.0
    }
    fn model(&self) -> &cpu::cpuid::CpuidModel {
        &self.1
    }
    fn clock(&self) -> u64 {
        0
    }
    fn set_clock(&self, _: u64) {}
}

impl ToyVcpu {
    /// Runs one instruction.
    fn execute(&mut self) -> Option<Exit> {
        let mut code = [0; 4];
        assert!(self.ram.read(self.state.rip, &mut code));
        self.instructions += 1;
        let port = self.state.gpr[gpr::RDX] as u16;
        let al = self.state.gpr[gpr::RAX] as u8;
        let mut len = 1;
        match code {
            [0x90, ..] => {}
            [0xb0, value, ..] => {
                self.state.gpr[gpr::RAX] = self.state.gpr[gpr::RAX] & !0xff | u64::from(value);
                len = 2;
            }
            [0x66, 0xba, low, high] => {
                self.state.gpr[gpr::RDX] = u64::from(u16::from_le_bytes([low, high]));
                len = 4;
            }
            [0xee, ..] => self.bus.pio_write(port, &[al]),
            [0xec, ..] => {
                let mut data = [0];
                self.bus.pio_read(port, &mut data);
                self.state.gpr[gpr::RAX] = self.state.gpr[gpr::RAX] & !0xff | u64::from(data[0]);
            }
            [0xeb, offset, ..] => {
                self.state.rip = self.state.rip.wrapping_add_signed(i64::from(offset as i8));
                len = 2;
            }
            [0xf4, ..] => return Some(Exit::Stuck),
            [0x0f, 0x0b, ..] => return Some(Exit::TripleFault),
            other => return Some(Exit::Internal(format!("unknown instruction {other:02x?}"))),
        }
        self.state.rip += len;
        None
    }
}

impl Vcpu for ToyVcpu {
    fn run(&mut self) -> Exit {
        loop {
            if self.bell.stop.swap(false, Ordering::SeqCst) {
                return Exit::Stopped;
            }
            if self.breakpoints.contains(&self.state.rip) {
                return Exit::Debug;
            }
            if let Some(exit) = self.execute() {
                return exit;
            }
        }
    }
    fn state(&mut self) -> CpuState {
        self.state.clone()
    }
    fn set_state(&mut self, state: &CpuState) {
        self.state = state.clone();
    }
    fn kick_handle(&self) -> Arc<dyn Kick> {
        Arc::new(NoKick)
    }
    fn stop_handle(&self) -> Arc<dyn Kick> {
        self.bell.clone()
    }
    fn step(&mut self) -> Exit {
        self.execute().unwrap_or(Exit::Debug)
    }
    fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints = addresses.to_vec();
    }
    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.ram.read(address, data)
    }
    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool {
        self.ram.write(address, data)
    }
    fn counters(&self) -> Vec<(String, u64)> {
        vec![("toy.instructions".into(), self.instructions)]
    }
}

struct ToyBus {
    events: Mutex<Events>,
    output: Output,
    input: Mutex<VecDeque<u8>>,
    writes: AtomicU64,
}

impl Bus for ToyBus {
    fn pio_read(&self, _port: u16, data: &mut [u8]) {
        data.fill(self.input.lock().unwrap().pop_front().unwrap_or(0));
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        self.writes.fetch_add(1, Ordering::SeqCst);
        match port {
            PORT_SERIAL => self.output.write(data),
            PORT_POWER => self.events.lock().unwrap().send(Event::PowerOff).unwrap(),
            PORT_RESET => self.events.lock().unwrap().send(Event::Reset).unwrap(),
            PORT_PANIC => panic!("a device panics"),
            _ => {}
        }
    }
    fn mmio_read(&self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _gpa: u64, _data: &[u8]) {}
}

impl Input for ToyBus {
    fn offer(&self, bytes: &[u8]) -> usize {
        let mut fifo = self.input.lock().unwrap();
        let room = bytes.len().min(16 - fifo.len());
        fifo.extend(&bytes[..room]);
        room
    }
    fn wait_for_room(&self, at_most: Duration) {
        std::thread::sleep(at_most.min(Duration::from_millis(1)));
    }
}

struct ToyBoard(Arc<ToyBus>);

impl Board for ToyBoard {
    fn bus(&self, _: u32) -> Option<Arc<dyn Bus>> {
        Some(self.0.clone())
    }
    fn lapic(&self, _: u32) -> Option<Arc<dyn LocalApic>> {
        Some(Arc::new(Nothing))
    }
    fn attach(&mut self, _: u32, _: Arc<dyn Kick>) {}
    fn start_chips(&self) -> Result<(), Error> {
        Ok(())
    }
    fn pause_devices(&self) {}
    fn resume_devices(&self) {}
    fn save(&self) -> Result<machine::PcState, Error> {
        Err(Error::Host("a toy has no devices".into()))
    }
    fn restore(&self, _: &machine::PcState) -> Result<(), Error> {
        self.save().map(|_| ())
    }
    fn start_state(&self, _: u32) -> CpuState {
        let mut state = CpuState::default();
        state.enter_long_mode(0, 0x10, 0x18);
        state.rip = START;
        state
    }
    fn console(&self) -> Arc<dyn Input> {
        self.0.clone()
    }
    fn counters(&self) -> Vec<(String, u64)> {
        vec![("exits.toy".into(), self.0.writes.load(Ordering::SeqCst))]
    }
}

/// Loads the next of its programs at each start.
struct ToyMaker(VecDeque<Vec<u8>>, Option<Arc<ToyBus>>);

impl BoardMaker for ToyMaker {
    fn build(
        &mut self,
        ram: &GuestRam,
        _: Option<Arc<dyn cpu::Chips>>,
        events: &Events,
        output: &Output,
    ) -> Result<Box<dyn Board>, Error> {
        let program = self.0.pop_front().ok_or_else(|| Error::Engine("no program left".into()))?;
        assert!(ram.write(START, &program));
        let new = || {
            Arc::new(ToyBus {
                events: Mutex::new(events.clone()),
                output: output.clone(),
                input: Mutex::default(),
                writes: AtomicU64::new(0),
            })
        };
        Ok(Box::new(ToyBoard(self.1.get_or_insert_with(new).clone())))
    }
}

fn out(port: u16, value: u8) -> Vec<u8> {
    let [low, high] = port.to_le_bytes();
    vec![0x66, 0xba, low, high, 0xb0, value, 0xee]
}

fn print(text: &str) -> Vec<u8> {
    text.bytes().flat_map(|byte| out(PORT_SERIAL, byte)).collect()
}

const FOREVER: [u8; 2] = [0xeb, 0xfe];
const HLT: [u8; 1] = [0xf4];

struct Toy {
    vm: Vm,
    dir: tempfile::TempDir,
}

impl Toy {
    fn new(programs: &[Vec<u8>], change: impl FnOnce(&mut VmConfig)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = VmConfig::new("unused");
        config.serial = crate::SerialMode::File(dir.path().join("console"));
        change(&mut config);
        let ram = GuestRam::new(64 << 20).unwrap();
        let parts = Parts {
            tsc_khz: 1_000_000,
            save_to: None,
            gate: crate::serial::Gate::new(None, Instant::now()),
            restore: None,
            ram: ram.clone(),
            serial: Serial::open(&config.serial).unwrap().0,
            listener: config.gdb.as_ref().map(|address| Listener::open(address).unwrap().0),
            maker: Box::new(ToyMaker(programs.iter().cloned().collect(), None)),
        };
        let vm = Vm::assemble(
            &config,
            Box::new(ToyEngine(ram, cpu::cpuid::CpuidModel::new(1, 1_000_000))),
            parts,
            Instant::now(),
        )
        .unwrap();
        Self { vm, dir }
    }

    /// Exit code and console output.
    fn run(self) -> (i32, String) {
        let code = self.vm.run();
        (code, std::fs::read_to_string(self.dir.path().join("console")).unwrap())
    }
}

fn run(programs: &[Vec<u8>]) -> (i32, String) {
    Toy::new(programs, |_| ()).run()
}

#[test]
fn power_off() {
    let program = [print("hello\n"), out(PORT_POWER, 0), FOREVER.into()].concat();
    assert_eq!(run(&[program]), (0, "hello\n".into()));
    // A guest that halts for good right after switching off has switched off.
    let program = [out(PORT_POWER, 0), HLT.into()].concat();
    assert_eq!(run(&[program]).0, 0);
}

#[test]
fn reset_starts_again() {
    let first = [print("1"), out(PORT_RESET, 6), HLT.into()].concat();
    let second = [print("2"), out(PORT_RESET, 6), FOREVER.into()].concat();
    let third = [print("3"), out(PORT_POWER, 0), FOREVER.into()].concat();
    assert_eq!(run(&[first.clone(), second, third]), (0, "123".into()));
    assert_eq!(run(&[first]), (1, "1".into())); // nothing to load
}

#[test]
fn crashes() {
    assert_eq!(run(&[[print("x"), vec![0x0f, 0x0b]].concat()]), (3, "x".into()));
    assert_eq!(run(&[HLT.into()]).0, 3);
    assert_eq!(run(&[vec![0xcc]]).0, 3);
    assert_eq!(run(&[out(PORT_PANIC, 0)]).0, 3);
}

#[test]
fn quitting_and_counters_while_it_runs() {
    let toy = Toy::new(&[[print("running"), FOREVER.into()].concat()], |_| ());
    let events = toy.vm.events.clone();
    let outside = std::thread::spawn(move || {
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(5));
            events.send(Event::Stats).unwrap();
        }
        events.send(Event::Quit(143)).unwrap();
    });
    assert_eq!(toy.run(), (143, "running".into()));
    outside.join().unwrap();
}

#[test]
fn input_arrives_in_order() {
    // Echo bytes until 'q' would need a compare; the toy echoes everything, and the test stops it.
    let [low, high] = PORT_SERIAL.to_le_bytes();
    let echo = vec![0x66, 0xba, low, high, 0xec, 0xee, 0xeb, 0xfc];
    let toy = Toy::new(&[echo], |_| ());
    let (console, events) = (toy.vm.console.clone(), toy.vm.events.clone());
    let text: String = (0..2000).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
    let wanted = text.clone();
    let outside = std::thread::spawn(move || {
        crate::console::feed(&*console, text.as_bytes(), &|| false);
        std::thread::sleep(Duration::from_millis(50));
        events.send(Event::Quit(0)).unwrap();
    });
    let (code, output) = toy.run();
    outside.join().unwrap();
    assert_eq!(code, 0);
    assert_eq!(output.replace('\0', "").lines().collect::<String>().replace("[", ""), wanted);
}

/// Runs gdb's commands against a toy; returns gdb's output and the VM's exit code. Skips where gdb is not installed.
fn gdb(programs: &[Vec<u8>], commands: &[&str]) -> Option<(String, i32)> {
    if std::process::Command::new("gdb").arg("--version").output().is_err() {
        eprintln!("gdb is not installed: skipped");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb");
    let toy = Toy::new(programs, |config| config.gdb = Some(GdbAddress::Unix(socket.clone())));
    let vm = std::thread::spawn(move || toy.run().0);
    let mut command = std::process::Command::new("timeout");
    command.args(["60", "gdb", "-nx", "-batch", "-ex", "set architecture i386:x86-64"]);
    command.args(["-ex", &format!("target remote {}", socket.display())]);
    for line in commands {
        command.args(["-ex", line]);
    }
    let output = command.stdin(std::process::Stdio::null()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    eprintln!("{text}");
    Some((text, vm.join().unwrap()))
}

#[test]
fn gdb_looks_steps_and_breaks() {
    let program = [vec![0x90, 0x90, 0xb0, 0x41], print("x"), out(PORT_POWER, 0), FOREVER.into()].concat();
    let commands = [
        "info registers rip rax cr0",
        "stepi",
        "stepi",
        "print/x $rip",
        "stepi",
        "print/x $al",
        "x/4xb 0x1000",
        "set var $rbx = 0x1234",
        "print/x $rbx",
        "set {char}0x2000 = 0x55",
        "x/1xb 0x2000",
        "x/1xb 0xfffffffffffffff0",
        "break *0x100b",
        "continue",
        "print/x $rip",
        "monitor registers",
        "info threads",
        "delete",
        "continue",
    ];
    let Some((text, code)) = gdb(&[program], &commands) else { return };
    assert_eq!(code, 0, "{text}");
    for part in [
        "rip            0x1000",
        "= 0x1002",
        "= 0x41",
        "0x1000:\t0x90\t0x90\t0xb0\t0x41",
        "= 0x1234",
        "0x2000:\t0x55",
        "Cannot access memory at address 0xfffffffffffffff0",
        "Breakpoint 1, 0x000000000000100b",
        "RIP: 0010:000000000000100b",
        "vCPU 0",
        "exited normally",
    ] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
}

#[test]
fn gdb_detaches_and_the_guest_goes_on() {
    let program = [vec![0x90], out(PORT_POWER, 0), FOREVER.into()].concat();
    let Some((text, code)) = gdb(&[program], &["break *0x1001", "detach"]) else { return };
    assert_eq!(code, 0, "{text}");
}

#[test]
fn gdb_kills() {
    let Some((text, code)) = gdb(&[FOREVER.into()], &["kill"]) else { return };
    assert_eq!(code, 0, "{text}");
}

#[test]
fn gdb_sees_a_crash() {
    let Some((text, code)) = gdb(&[vec![0x90, 0x0f, 0x0b]], &["continue", "print/x $rip", "continue"]) else { return };
    assert!(text.contains("SIGSEGV") && text.contains("= 0x1001"), "{text}");
    assert_eq!(code, 3);
}

/// The protocol itself: a running guest is interrupted by byte 3.
#[test]
fn gdb_interrupts() {
    use std::io::{Read, Write};
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("gdb");
    let toy = Toy::new(&[FOREVER.into()], |config| config.gdb = Some(GdbAddress::Unix(socket.clone())));
    let vm = std::thread::spawn(move || toy.run().0);
    let mut stream = std::os::unix::net::UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let mut seen = String::new();
    let mut wait_for = |stream: &mut std::os::unix::net::UnixStream, what: &str| {
        let mut byte = [0];
        while !seen.ends_with(what) {
            stream.read_exact(&mut byte).unwrap();
            seen.push(char::from(byte[0]));
        }
    };
    let packet = |text: &str| format!("${text}#{:02x}", text.bytes().fold(0_u8, |sum, byte| sum.wrapping_add(byte)));
    stream.write_all(packet("?").as_bytes()).unwrap();
    wait_for(&mut stream, "#");
    stream.write_all(b"+").unwrap();
    for _ in 0..3 {
        stream.write_all(packet("vCont;c").as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        stream.write_all(&[3]).unwrap();
        wait_for(&mut stream, "$T02thread:01;#");
        stream.write_all(b"+").unwrap();
        seen_reset(&mut stream);
    }
    stream.write_all(packet("k").as_bytes()).unwrap();
    assert_eq!(vm.join().unwrap(), 0);
}

/// Reads the two digits of the checksum.
fn seen_reset(stream: &mut std::os::unix::net::UnixStream) {
    use std::io::Read;
    stream.read_exact(&mut [0; 2]).unwrap();
}
