//! The supervisor: builds a VM, lets its vCPUs run, and decides on everything that happens to it until it ends.

use std::collections::VecDeque;
use std::fs::File;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use cpu::{Engine, Exit, VcpuSetup};
use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use memory::GuestRam;

use crate::agent::Agent;
use crate::board::{Board, BoardMaker};
use crate::config::{GdbAddress, Optimization, SerialMode, StatsFormat, VmConfig, WatchdogAction};
use crate::console::Output;
use crate::control::{self, Hub};
use crate::error::Error;
use crate::events::{DebuggerEvent, Event, Events};
use crate::gdb::target::{Cpus, tid};
use crate::gdb::{Listener, Stream};
use crate::instance::Instance;
use crate::pc::Files;
use crate::sandbox::{self, Needs};
use crate::serial::{Gate, InputSlot, Serial};
use crate::state::{self, Saved};
use crate::stats::Stats;
use crate::vcpu::VcpuThread;
use crate::{crash, engine, inputs, net, share, signals, terminal};

/// Exit code of a process whose guest crashed or can make no progress.
pub const EXIT_CRASH: i32 = 3;
/// How long output may take to reach its reader at the end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// One virtual machine, built and confined, ready to run.
pub struct Vm {
    engine: Box<dyn Engine>,
    maker: Box<dyn BoardMaker>,
    board: Box<dyn Board>,
    cpus: Cpus,
    events: Events,
    inbox: Receiver<Event>,
    /// Events that came while something else was waited for.
    deferred: VecDeque<Event>,
    console: Arc<InputSlot>,
    output: Output,
    stats: Option<StatsFormat>,
    watchdog: Option<WatchdogAction>,
    started: Instant,
    /// When the guest's first instruction ran, from the start of the process.
    ready: Option<Duration>,
    resets: u64,
    debugger: Option<Debugger>,
    /// vCPUs that have halted for good. (The others may still run.)
    stuck: Vec<bool>,
    /// The host's TSC rate in kHz.
    tsc_khz: u64,
    save_to: Option<File>,
    instance: Option<Arc<Instance>>,
    window: Option<WindowOf>,
    /// What the guest's main command ended with.
    main_exit: Option<i32>,
}

/// Which of the guest's consoles is on this process's terminal, and so has its size.
enum WindowOf {
    /// The serial one, whose size the agent sets.
    Serial(Agent),
    /// The virtio console.
    Console,
}

/// A debugger may connect, or has.
#[derive(Default)]
struct Debugger {
    session: Option<(GdbStubStateMachine<'static, Cpus, Stream>, Stream)>,
    /// The guest crashed and waits for its post-mortem.
    crashed: bool,
}

/// What a VM is built from: everything open, nothing running yet.
pub(crate) struct Parts {
    pub ram: GuestRam,
    pub serial: Serial,
    pub listener: Option<Listener>,
    /// The host's TSC rate in kHz.
    pub tsc_khz: u64,
    /// What SIGUSR2 writes to.
    pub save_to: Option<File>,
    pub gate: Arc<Gate>,
    /// What is read instead of booting.
    pub restore: Option<File>,
    pub maker: Box<dyn BoardMaker>,
}

impl Vm {
    /// Opens everything `config` names, builds the machine, confines the process and leaves the VM ready to run. `started` is when the
    /// process started. Says on standard error which engine runs.
    ///
    /// # Errors
    /// [`Error`] with one line for the user.
    pub fn new(config: &VmConfig, started: Instant) -> Result<Self, Error> {
        sandbox::at_start();
        signals::block();
        engine::check(config)?;
        // It waits for 20 ms of which the rest makes use.
        let tsc = std::thread::spawn(machine::clock::measure_tsc_khz);
        let kernel = inputs::open_kernel(&config.kernel)?;
        let initrd =
            config.initrd.as_deref().map(|path| inputs::open_initrd(path, !config.trusted_image)).transpose()?;
        let mut disks = Vec::new();
        for disk in &config.disks {
            let (disk, warning) = inputs::open_disk(disk)?;
            disks.push(disk);
            if let Some(warning) = warning {
                terminal::message(&format!("tightrope: warning: {warning}"));
            }
        }
        for file in &config.temporary {
            // It may stay where it cannot be removed: space, nothing more.
            let _ = std::fs::remove_file(file);
        }
        // In the background nothing may hold on to what the command that started it prints to: whoever reads that waits for its end.
        let errors = if config.background { Stdio::null } else { Stdio::inherit };
        let opening = net::Opening {
            config: &config.net,
            forwards: &config.forwards,
            server: config.net_server.as_ref(),
            sandbox: config.sandbox,
            errors,
        };
        let mut network = opening.open()?;
        let net_lines = network.as_mut().map(|network| std::mem::take(&mut network.lines)).unwrap_or_default();
        let shares = share::open(&config.shares, config.share_server.as_ref(), config.sandbox, errors)?;
        let (mut serial, serial_line) = Serial::open(&config.serial)?;
        let host = |error: std::io::Error| Error::Host(error.to_string());
        let (hub, agent) = (Hub::new().map_err(host)?, Agent::default());
        let mut log = config.instance.as_ref().and_then(|instance| instance.take(|parts| parts.console.take()));
        let null = config.background.then(|| std::fs::File::options().write(true).open("/dev/null")).transpose();
        let null = null.map_err(host)?;
        let mut logged = false;
        if config.serial == SerialMode::Log
            && let Some(file) = log.take()
        {
            serial = Serial::Log(file, hub.clone());
            logged = true;
        }
        let (mut console, console_line) = match config.virtio_console.as_ref().map(Serial::open).transpose()? {
            Some((console, line)) => (Some(console), line),
            None => (None, None),
        };
        let gate = Gate::new(config.ready_marker.clone(), started);
        // One of them, and none if standard input has a console already.
        let stdio = serial.is_stdio() || console.as_ref().is_some_and(Serial::is_stdio);
        if config.piped_input && !stdio && !serial.take_input() {
            console.as_mut().map(Serial::take_input);
        }
        let (ports, port_lines) = crate::ports::open(&config.ports)?;
        let window = if serial.is_stdio() {
            Some(WindowOf::Serial(agent.clone()))
        } else {
            console.as_ref().is_some_and(Serial::is_stdio).then_some(WindowOf::Console)
        };
        let (listener, gdb_line) = match config.gdb.as_ref().map(Listener::open).transpose()? {
            Some((listener, line)) => (Some(listener), Some(line)),
            None => (None, None),
        };
        let unpacked = config.unpacked_kernel.as_ref().and_then(|path| std::fs::File::open(path).ok());
        let trace = engine::open_trace(config)?;
        let open = |path: &Option<PathBuf>, what, options: &std::fs::OpenOptions| {
            path.as_deref().map(|path| options.open(path).map_err(|error| Error::file(what, path, error))).transpose()
        };
        let create = std::fs::OpenOptions::new().write(true).create(true).truncate(true).clone();
        let save_to = open(&config.save_to, "file for the saved VM", &create)?;
        let restore = open(&config.restore, "saved VM", std::fs::OpenOptions::new().read(true))?;
        let model = restore.as_ref().map(state::model).transpose()?;
        let kvm = engine::open_kvm(config)?;
        let needs = Needs {
            kvm: matches!(kvm, engine::KvmState::Works(_)),
            sockets: serial.needs_sockets()
                || console.as_ref().is_some_and(Serial::needs_sockets)
                || crate::ports::need_sockets(&ports)
                || matches!(config.gdb, Some(GdbAddress::Tcp(_) | GdbAddress::Unix(_))),
            network: network.is_some(),
            uring: config.disks.iter().any(|disk| disk.io == disk::Io::Uring),
            instance: config.instance.is_some(),
            programs: Vec::new(),
        };
        signals::restore_terminal_when_fatal();
        // Other processes can have RAM only where it is a file, whose pages are small on most hosts.
        let without = config.lockstep || config.without.contains(&Optimization::Direct);
        let direct = !without && engine::is_bt(config, &kvm);
        let ram = if direct {
            // A host that has no such files can still translate.
            GuestRam::shareable(config.memory).or_else(|_| GuestRam::new(config.memory))
        } else {
            GuestRam::new(config.memory)
        };
        let ram = ram.map_err(|error| Error::Host(error.to_string()))?;
        let tsc_khz = tsc.join().unwrap_or_else(|_| machine::clock::measure_tsc_khz());
        sandbox::before_threads(config.sandbox)?;
        let (engine, engine_line) = engine::choose(config, ram.clone(), tsc_khz, kvm, trace.clone(), model)?;
        if !config.quiet {
            terminal::message(&format!("tightrope: {engine_line}"));
        }
        for line in [serial_line, console_line, gdb_line].into_iter().flatten().chain(port_lines).chain(net_lines) {
            terminal::message(&format!("tightrope: {line}"));
        }
        let exits = trace.filter(|_| config.trace.as_ref().is_some_and(|trace| trace.exits));
        let maker = crate::pc::maker(
            config,
            Files {
                kernel,
                unpacked,
                initrd,
                disks,
                network,
                shares,
                console,
                gate: gate.clone(),
                ports,
                agent: agent.clone(),
            },
            tsc_khz,
            exits,
        );
        let mut vm = Self::assemble(
            config,
            engine,
            Parts { ram, serial, gate, listener, tsc_khz, save_to, restore, maker },
            started,
        )?;
        vm.window = window;
        if let Some(instance) = &config.instance
            && let Some(listener) = instance.take(|parts| parts.control.take())
        {
            let server = control::Server {
                listener,
                lifeline: instance.take(|parts| parts.lifeline.take()),
                hub,
                agent,
                agent_expected: instance.agent,
                console: logged,
                input: vm.console.clone(),
                balloon: vm.board.balloon(),
                disks: vm.board.disks(),
                events: vm.events.clone(),
            };
            server.start().map_err(|error| Error::Host(format!("the host gives no thread: {error}")))?;
            vm.instance = Some(instance.clone());
        }
        if logged {
            terminal::messages_to(Box::new(vm.output.clone()), !config.background);
        } else if let Some(file) = log.filter(|_| config.background) {
            terminal::messages_to(Box::new(registry::ring::Writer::new(file)), false);
        }
        if let Some(null) = null {
            rustix::stdio::dup2_stderr(null).map_err(|error| host(error.into()))?;
        }
        let needs = Needs { programs: vm.cpus.processes(), ..needs };
        sandbox::close(config.sandbox, needs)?;
        Ok(vm)
    }

    /// Puts the parts together and starts all threads; the vCPUs are stopped.
    pub(crate) fn assemble(
        config: &VmConfig,
        engine: Box<dyn Engine>,
        mut parts: Parts,
        started: Instant,
    ) -> Result<Self, Error> {
        let threads = |error: std::io::Error| Error::Host(format!("the host gives no thread: {error}"));
        let (events, inbox) = mpsc::channel();
        let console = Arc::new(InputSlot::default());
        let output = parts.serial.start(&events, console.clone(), parts.gate.clone()).map_err(threads)?;
        parts.gate.watch(&output);
        let board = parts.maker.build(&parts.ram, engine.chips(), &events, &output)?;
        let mut vm = Self {
            engine,
            maker: parts.maker,
            board,
            cpus: Cpus::default(),
            events,
            inbox,
            deferred: VecDeque::new(),
            console,
            output,
            stats: config.stats,
            watchdog: config.watchdog,
            started,
            ready: None,
            resets: 0,
            debugger: None,
            stuck: Vec::new(),
            tsc_khz: parts.tsc_khz,
            save_to: parts.save_to,
            instance: None,
            window: None,
            main_exit: None,
        };
        vm.make_vcpus(config.cpus)?;
        if let Some(file) = &parts.restore {
            vm.restore(file)?;
        }
        signals::start(vm.events.clone()).map_err(threads)?;
        if let Some(listener) = parts.listener {
            listener.start(vm.events.clone()).map_err(threads)?;
            vm.debugger = Some(Debugger::default());
        }
        Ok(vm)
    }

    fn make_vcpus(&mut self, count: u32) -> Result<(), Error> {
        let mut threads = Vec::new();
        for index in 0..count {
            let (Some(lapic), Some(bus)) = (self.board.lapic(index), self.board.bus(index)) else {
                return Err(Error::Engine(format!("vCPU {index} is not part of the machine")));
            };
            let setup = VcpuSetup { index, lapic, bus };
            let mut vcpu = self.engine.create_vcpu(setup).map_err(Error::Engine)?;
            vcpu.set_state(&self.board.start_state(index));
            self.board.attach(index, vcpu.kick_handle());
            let thread = VcpuThread::start(index, vcpu, self.events.clone())
                .map_err(|error| Error::Host(format!("the host gives no thread: {error}")))?;
            threads.push(thread);
        }
        self.board.start_chips()?;
        self.stuck = vec![false; threads.len()];
        self.cpus.replace(threads);
        self.console.set(self.board.console());
        Ok(())
    }

    /// Runs the VM until it ends, and returns the exit code for the process: 0 when the guest switched itself off or the user quit,
    /// [`EXIT_CRASH`] when it crashed, 128 + n after signal n.
    pub fn run(mut self) -> i32 {
        let _terminal = terminal::Guard;
        crate::resident::forget_startup();
        self.window_changed();
        if self.debugger.is_none() {
            self.run_all();
        }
        loop {
            let event = match self.deferred.pop_front() {
                Some(event) => event,
                None => match self.inbox.recv() {
                    Ok(event) => event,
                    Err(_) => return self.finish(EXIT_CRASH),
                },
            };
            if let Some(code) = self.decide(event) {
                return self.finish(code);
            }
        }
    }

    fn run_all(&mut self) {
        self.ready.get_or_insert_with(|| self.started.elapsed());
        for thread in &mut self.cpus.threads {
            thread.run();
        }
    }

    /// Deals with one event. Returns the exit code if it is the last.
    fn decide(&mut self, event: Event) -> Option<i32> {
        match event {
            Event::VcpuExit(index, exit) => self.vcpu_exit(index, exit),
            Event::PowerOff => Some(self.main_exit.unwrap_or(0)),
            Event::PowerButton => {
                self.board.press_power_button();
                None
            }
            Event::MainExited(code) => {
                self.main_exit = Some(code);
                None
            }
            Event::Reset => self.reset(),
            Event::Watchdog => self.watchdog(),
            Event::Window => {
                self.window_changed();
                None
            }
            Event::Quit(code) => Some(code),
            Event::Stats => {
                self.show_stats(self.stats.unwrap_or(StatsFormat::Text));
                None
            }
            Event::Save => self.save(),
            Event::Debugger(event) => self.debugger_event(event),
        }
    }

    /// Saves the VM and ends it; it goes on where it cannot be saved.
    fn save(&mut self) -> Option<i32> {
        let Some(file) = self.save_to.take() else {
            terminal::message("tightrope: nobody said where to save this VM to");
            return None;
        };
        let stopped = self.pause();
        self.board.pause_devices();
        let result = self.saved().and_then(|saved| crate::state::write(&file, &saved, self.engine.ram()));
        match result {
            Ok(()) => Some(0),
            Err(error) => {
                terminal::message(&format!("tightrope: {error}; the VM goes on, and can be saved again"));
                self.save_to = Some(file);
                self.board.resume_devices();
                for index in stopped {
                    self.go_on(index);
                }
                None
            }
        }
    }

    /// All of the stopped VM but its memory.
    fn saved(&self) -> Result<Saved, Error> {
        // Devices first: what they still have to say to the vCPUs is said then.
        let machine = self.board.save()?;
        let failed = || Error::Host("a vCPU does not give its state".into());
        let states = self.cpus.threads.iter().map(|thread| thread.ask(|vcpu| vcpu.state()).ok_or_else(failed));
        Ok(Saved {
            ram: self.engine.ram().size(),
            tsc_khz: self.tsc_khz,
            host_tsc: machine::clock::host_tsc(),
            clock: self.engine.clock(),
            model: self.engine.model().clone(),
            cpus: states.collect::<Result<_, _>>()?,
            machine,
        })
    }

    /// Takes over a saved VM in place of the one just built.
    fn restore(&mut self, file: &File) -> Result<(), Error> {
        let (reader, mut saved) = state::Reader::open(file)?;
        let ram = self.engine.ram();
        saved.check(ram.size(), self.cpus.threads.len(), self.tsc_khz)?;
        self.board.pause_devices();
        ram.clear().map_err(|error| Error::Host(format!("the guest's memory cannot be cleared: {error}")))?;
        reader.ram(ram)?;
        saved.rebase(machine::clock::host_tsc());
        self.engine.set_clock(saved.clock);
        for (thread, state) in self.cpus.threads.iter().zip(saved.cpus) {
            thread
                .ask(move |vcpu| vcpu.set_state(&state))
                .ok_or_else(|| Error::Host("a vCPU does not take its state".into()))?;
        }
        self.board.restore(&saved.machine)?;
        self.board.resume_devices();
        Ok(())
    }

    fn vcpu_exit(&mut self, index: u32, exit: Exit) -> Option<i32> {
        self.cpus.threads.get_mut(index as usize)?.exited(&exit);
        match exit {
            Exit::Stopped => self.go_on(index),
            Exit::Debug => {
                if self.debugger.as_ref().is_none_or(|debugger| debugger.session.is_none()) {
                    self.go_on(index);
                    return None;
                }
                self.pause();
                let reason = if self.cpus.stepping(index) {
                    MultiThreadStopReason::SignalWithThread { tid: tid(index), signal: Signal::SIGTRAP }
                } else if self.cpus.at_breakpoint(index) {
                    MultiThreadStopReason::SwBreak(tid(index))
                } else {
                    MultiThreadStopReason::SignalWithThread { tid: tid(index), signal: Signal::SIGTRAP }
                };
                self.report_stop(reason);
            }
            Exit::Stuck => {
                if let Some(stuck) = self.stuck.get_mut(index as usize) {
                    *stuck = true;
                }
                if self.stuck.iter().all(|&stuck| stuck) {
                    return self.crashed(index, &Exit::Stuck);
                }
            }
            Exit::TripleFault | Exit::Internal(_) => return self.crashed(index, &exit),
        }
        None
    }

    /// Lets a vCPU that stopped for no reason that concerns anybody go on with what it did.
    fn go_on(&mut self, index: u32) {
        let stepping = self.cpus.stepping(index);
        if let Some(thread) = self.cpus.threads.get_mut(index as usize) {
            if stepping { thread.step() } else { thread.run() }
        }
    }

    fn crashed(&mut self, index: u32, exit: &Exit) -> Option<i32> {
        self.pause();
        self.output.flush(LAST_WORDS);
        let why = exit.clone();
        let report = self.cpus.threads.get(index as usize).and_then(|thread| {
            thread.ask(move |vcpu| {
                let state = vcpu.state();
                let report = crash::report(index, &why, &state, &mut |address, data| vcpu.read_virtual(address, data));
                report + &vcpu.remark().map_or(String::new(), |remark| format!("({remark})\n"))
            })
        });
        let mut report = report.unwrap_or_else(|| format!("tightrope: vCPU {index} failed: {exit:?}\n"));
        if self.cpus.threads.len() > 1 {
            report.push_str(&self.places());
        }
        terminal::message(&report);
        match &mut self.debugger {
            Some(debugger) if debugger.session.is_some() => {
                debugger.crashed = true;
                let reason = MultiThreadStopReason::SignalWithThread { tid: tid(index), signal: Signal::SIGSEGV };
                self.report_stop(reason);
                None
            }
            _ => Some(EXIT_CRASH),
        }
    }

    /// Stops all vCPUs; returns those that were running and were stopped by this. Other exits that come meanwhile are kept.
    fn pause(&mut self) -> Vec<u32> {
        let mut stopped = Vec::new();
        for thread in &mut self.cpus.threads {
            thread.request_stop();
        }
        // Ten times a second, not ten seconds: the host itself may have stood still for that long.
        let mut silent = 0;
        while self.cpus.threads.iter().any(VcpuThread::running) {
            match self.inbox.recv_timeout(Duration::from_secs(1)) {
                Ok(Event::VcpuExit(index, exit)) => {
                    let asked = self.cpus.threads.get_mut(index as usize).is_some_and(|thread| thread.exited(&exit));
                    if asked {
                        stopped.push(index);
                    } else {
                        self.deferred.push_back(Event::VcpuExit(index, exit));
                    }
                }
                Ok(event) => self.deferred.push_back(event),
                Err(RecvTimeoutError::Timeout) if silent < 10 => silent += 1,
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    terminal::message("tightrope: a vCPU does not stop; leaving it");
                    break;
                }
            }
        }
        stopped
    }

    /// The guest's reset: devices as at power-on, the kernel loaded again; the process, its engine and its vCPU threads stay.
    fn reset(&mut self) -> Option<i32> {
        self.pause();
        // What the old machine still had to say is void.
        self.deferred.retain(|event| !matches!(event, Event::VcpuExit(..) | Event::PowerOff | Event::Reset));
        self.resets += 1;
        let chips = self.engine.chips();
        let rebuilt = self.maker.build(self.engine.ram(), chips, &self.events, &self.output).and_then(|board| {
            self.board = board;
            self.board.start_chips()
        });
        if let Err(error) = rebuilt {
            terminal::message(&format!("tightrope: the machine cannot be reset: {error}"));
            return Some(1);
        }
        // The vCPUs stay: making new ones could take what the sandbox forbids.
        for thread in &self.cpus.threads {
            let state = self.board.start_state(thread.index());
            thread.ask(move |vcpu| vcpu.set_state(&state));
        }
        self.stuck.fill(false);
        self.console.set(self.board.console());
        if self.debugger.as_ref().is_some_and(|debugger| debugger.session.is_some()) {
            self.cpus.forget_actions();
        }
        self.run_all();
        None
    }

    /// Tells the guest the size of the terminal.
    fn window_changed(&self) {
        let Some((columns, rows)) = terminal::window() else { return };
        match &self.window {
            Some(WindowOf::Serial(agent)) => agent.window(columns, rows),
            Some(WindowOf::Console) => self.board.resize_console(columns, rows),
            None => {}
        }
    }

    /// The guest has hung.
    fn watchdog(&mut self) -> Option<i32> {
        if self.debugger.as_ref().is_some_and(|debugger| debugger.session.is_some()) {
            // It stands still because it is looked at.
            return None;
        }
        let what = match self.watchdog? {
            WatchdogAction::Reset => "it is reset",
            WatchdogAction::PowerOff => "it is switched off",
            WatchdogAction::Nmi => "it gets a non-maskable interrupt",
            WatchdogAction::Stop => "its vCPUs are stopped",
            WatchdogAction::None => "nothing is done about it",
        };
        terminal::message(&format!("tightrope: the guest's watchdog ran out: {what}"));
        match self.watchdog? {
            WatchdogAction::Reset => return self.reset(),
            WatchdogAction::PowerOff => return Some(EXIT_CRASH),
            WatchdogAction::Nmi => self.board.nmi(),
            WatchdogAction::Stop => {
                self.pause();
                terminal::message(&self.places());
            }
            WatchdogAction::None => {}
        }
        None
    }

    fn show_stats(&mut self, format: StatsFormat) {
        let stopped = self.pause();
        let stats = self.collect_stats();
        terminal::message(&stats.render(format));
        if matches!(format, StatsFormat::Text) {
            terminal::message(&self.places());
        }
        for index in stopped {
            self.go_on(index);
        }
    }

    /// Where each vCPU stands. All are stopped, unless one hangs in the monitor.
    fn places(&self) -> String {
        let line = |thread: &VcpuThread| match thread.ask(|vcpu| vcpu.state()) {
            Some(state) => crash::place(thread.index(), &state),
            None => format!("vCPU {}: does not stop\n", thread.index()),
        };
        self.cpus.threads.iter().map(line).collect()
    }

    fn collect_stats(&self) -> Stats {
        let mut stats = Stats::new(self.engine.name(), self.started.elapsed());
        for thread in &self.cpus.threads {
            stats.add(thread.ask(|vcpu| vcpu.counters()).unwrap_or_default());
        }
        stats.add(self.board.counters());
        stats.add([("vm.resets".to_string(), self.resets)]);
        let ready = self.ready.map(|ready| ("time.ready-us".to_string(), ready.as_micros() as u64));
        stats.add(ready);
        stats.add_guest_time();
        stats
    }

    fn finish(&mut self, code: i32) -> i32 {
        self.pause();
        self.output.flush(LAST_WORDS);
        terminal::restore();
        if let Some(Debugger { session: Some((GdbStubStateMachine::Running(running), stream)), .. }) =
            self.debugger.take()
        {
            let _ = running.report_stop(&mut self.cpus, MultiThreadStopReason::Exited(code as u8));
            stream.shut_down();
        }
        if let Some(format) = self.stats {
            terminal::message(&self.collect_stats().render(format));
        }
        if let Some(instance) = &self.instance {
            instance.ended(code);
        }
        code
    }

    // The debugger.

    fn debugger_event(&mut self, event: DebuggerEvent) -> Option<i32> {
        match event {
            DebuggerEvent::Connected(stream) => {
                self.pause();
                let copy = stream.try_clone().ok()?;
                let session = GdbStub::new(stream).run_state_machine(&mut self.cpus);
                match session {
                    Ok(session) => {
                        if let Some(debugger) = &mut self.debugger {
                            debugger.session = Some((session, copy));
                        }
                    }
                    Err(error) => {
                        terminal::message(&format!("tightrope: gdb: {error}"));
                        copy.shut_down();
                    }
                }
                None
            }
            DebuggerEvent::Gone => {
                // The guest stays as it is: the next debugger finds it so, or it runs on.
                if let Some(debugger) = &mut self.debugger {
                    debugger.session = None;
                }
                None
            }
            DebuggerEvent::Bytes(bytes) => bytes.into_iter().find_map(|byte| self.debugger_byte(byte)),
        }
    }

    fn debugger_byte(&mut self, byte: u8) -> Option<i32> {
        let (session, stream) = self.debugger.as_mut()?.session.take()?;
        let mut next = match session {
            GdbStubStateMachine::Idle(idle) => idle.incoming_data(&mut self.cpus, byte),
            GdbStubStateMachine::Running(running) => running.incoming_data(&mut self.cpus, byte),
            other => Ok(other),
        };
        if let Ok(GdbStubStateMachine::CtrlCInterrupt(interrupt)) = next {
            self.pause();
            // What stopped by itself in the same moment will come again when it goes on.
            self.deferred.retain(|event| !matches!(event, Event::VcpuExit(_, Exit::Debug)));
            let reason = MultiThreadStopReason::SignalWithThread { tid: tid(0), signal: Signal::SIGINT };
            next = interrupt.interrupt_handled(&mut self.cpus, Some(reason));
        }
        match next {
            Ok(GdbStubStateMachine::Disconnected(end)) => {
                let reason = end.get_reason();
                stream.shut_down();
                match reason {
                    DisconnectReason::Kill => return Some(0),
                    _ if self.debugger.as_ref().is_some_and(|debugger| debugger.crashed) => return Some(EXIT_CRASH),
                    _ => self.cpus.detach(),
                }
            }
            Ok(session) => {
                self.debugger.as_mut()?.session = Some((session, stream));
                if self.cpus.take_resume() {
                    if self.debugger.as_ref()?.crashed {
                        return Some(EXIT_CRASH);
                    }
                    self.cpus.resume();
                }
            }
            Err(error) => {
                terminal::message(&format!(
                    "tightrope: gdb: {error}; the connection is closed, the guest stays stopped"
                ));
                stream.shut_down();
            }
        }
        None
    }

    fn report_stop(&mut self, reason: MultiThreadStopReason<u64>) {
        let Some(debugger) = &mut self.debugger else { return };
        match debugger.session.take() {
            Some((GdbStubStateMachine::Running(running), stream)) => {
                match running.report_stop(&mut self.cpus, reason) {
                    Ok(session) => debugger.session = Some((session, stream)),
                    Err(_) => stream.shut_down(),
                }
            }
            other => debugger.session = other,
        }
    }
}

#[cfg(test)]
mod tests;
