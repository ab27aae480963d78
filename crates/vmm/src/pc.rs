//! The PC as the supervisor sees it: built once from the opened files, put back to power-on and loaded again at each reset.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use cpu::{Bus, Chips, CpuState, Kick, LocalApic};
use machine::boot::{self, BootSource};
use machine::bus::{Access, Space};
use machine::pci::PciDevice;
use machine::power::PowerEvent;
use machine::serial::Serial;
use machine::{Pc, PcConfig, PcState};
use memory::GuestRam;
use virtio::{
    Balloon, BalloonHandle, Block, Console, ConsoleHandle, Disk, Entropy, Fs, Net, Reporter, SizeWatch, VirtioDevice,
    VirtioPci, Vsock,
};

use crate::agent::Agent;
use crate::board::{Board, BoardMaker};
use crate::config::VmConfig;
use crate::console::{Input, Output};
use crate::engine::TraceSink;
use crate::error::Error;
use crate::events::{Event, Events};
use crate::instance::Instance;
use crate::net::Network;
use crate::serial::{Gate, InputSlot};
use crate::share::Share;
use crate::terminal;

/// The opened files.
pub(crate) struct Files {
    pub kernel: File,
    /// What the kernel's payload unpacks to, from the cache.
    pub unpacked: Option<File>,
    pub initrd: Option<File>,
    pub disks: Vec<Disk>,
    pub network: Option<Network>,
    pub shares: Vec<Share>,
    /// The host's end of a virtio console.
    pub console: Option<crate::serial::Serial>,
    /// What holds its input back.
    pub gate: Arc<Gate>,
    /// The host's ends of named ports.
    pub ports: Vec<crate::ports::Opened>,
    /// Is there an agent in the guest?
    pub agent: Agent,
}

/// What builds the PC from the opened files.
pub(crate) fn maker(config: &VmConfig, files: Files, tsc_khz: u64, exits: Option<TraceSink>) -> Box<dyn BoardMaker> {
    Box::new(PcMaker {
        cmdline: config.cmdline.clone(),
        cpus: config.cpus,
        tsc_khz,
        kernel: files.kernel,
        unpacked: files.unpacked,
        initrd: files.initrd,
        agent: config.agent.clone(),
        disks: files.disks,
        network: files.network,
        shares: files.shares,
        console: files.console,
        gate: files.gate,
        ports: files.ports,
        instance: config.instance.clone(),
        watchdog: config.watchdog.is_some(),
        agent_there: files.agent,
        exits,
        pc: None,
        input: None,
        virtio: Vec::new(),
        handles: Handles::default(),
    })
}

struct PcMaker {
    cmdline: String,
    cpus: u32,
    /// The host's, in kHz.
    tsc_khz: u64,
    kernel: File,
    unpacked: Option<File>,
    initrd: Option<File>,
    agent: Option<Arc<[u8]>>,
    /// Until the first build.
    disks: Vec<Disk>,
    /// Until the first build.
    network: Option<Network>,
    /// Until the first build.
    shares: Vec<Share>,
    /// Until the first build.
    console: Option<crate::serial::Serial>,
    gate: Arc<Gate>,
    /// Until the first build.
    ports: Vec<crate::ports::Opened>,
    /// With one, the guest gets a vsock device.
    instance: Option<Arc<Instance>>,
    agent_there: Agent,
    watchdog: bool,
    /// Where accesses to devices are written down.
    exits: Option<TraceSink>,
    /// After the first build.
    pc: Option<Arc<Pc>>,
    input: Option<Arc<SerialInput>>,
    virtio: Vec<Arc<VirtioPci>>,
    handles: Handles,
}

/// The host's ends of devices.
#[derive(Clone, Default)]
struct Handles {
    balloon: Option<BalloonHandle>,
    console: Option<ConsoleHandle>,
    disks: Vec<SizeWatch>,
}

fn engine_error(error: impl std::fmt::Display) -> Error {
    Error::Engine(error.to_string())
}

/// Reads a file from its start, however often; the sandbox does not let it be opened again.
fn read_whole(what: &str, file: &File) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    loop {
        let at = bytes.len();
        bytes.resize(at + (1 << 20).max(at), 0);
        match file.read_at(bytes.get_mut(at..).unwrap_or_default(), at as u64) {
            Ok(0) => {
                bytes.truncate(at);
                return Ok(bytes);
            }
            Ok(len) => bytes.truncate(at + len),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => bytes.truncate(at),
            Err(error) => return Err(Error::Input(format!("{what} cannot be read: {error}"))),
        }
    }
}

impl PcMaker {
    fn devices(
        &mut self,
        ram: &GuestRam,
        chips: Option<&Arc<dyn Chips>>,
        events: &Events,
    ) -> Result<Vec<Arc<dyn PciDevice>>, Error> {
        let reporter: Reporter = Arc::new(|line: &str| terminal::message(&format!("tightrope: {line}")));
        let mut devices: Vec<(String, Box<dyn VirtioDevice>)> = Vec::new();
        let mut watches = Vec::new();
        for (number, disk) in std::mem::take(&mut self.disks).into_iter().enumerate() {
            disk.set_reporter(reporter.clone());
            let queues = self.cpus.min(4) as u16;
            let block = Block::new(disk, &format!("tightrope-disk-{number}"), queues)
                .map_err(|error| Error::Host(format!("the host gives no thread for a disk: {error}")))?;
            if block.lacks_uring() {
                reporter("this host gives no io_uring: threads carry out the disk's requests");
            }
            watches.extend(block.grows_by_itself().then(|| block.size_watch()));
            self.handles.disks.push(block.size_watch());
            devices.push((format!("disk{number}"), Box::new(block)));
        }
        crate::disks::watch(watches)
            .map_err(|error| Error::Host(format!("the host gives no thread for the disks: {error}")))?;
        if let Some(Network { port, mac, mtu, .. }) = self.network.take() {
            let net = Net::new(port, mac, mtu, Some(reporter.clone()))
                .map_err(|error| Error::Host(format!("the host gives no thread for the network: {error}")))?;
            devices.push(("net".into(), Box::new(net)));
        }
        for (number, share) in std::mem::take(&mut self.shares).into_iter().enumerate() {
            let Share { tag, name, channel, socket } = share;
            // Its start took its time beside ours.
            share::server::wait_ready(&socket).map_err(|error| {
                Error::Host(format!(
                    "the shared directory {name} cannot be served ({error}); the guest was not started"
                ))
            })?;
            let fs = Fs::new(&tag, &name, channel, socket, Some(reporter.clone()))
                .map_err(|error| Error::Host(format!("the host gives no thread for a shared directory: {error}")))?;
            devices.push((format!("share{number}"), Box::new(fs)));
        }
        devices.push(("entropy".into(), Box::new(Entropy::default())));
        if let Some(host_end) = self.console.take() {
            let threads = |error| Error::Host(format!("the host gives no thread for a console: {error}"));
            let slot = Arc::new(InputSlot::default());
            let output = host_end.start(events, slot.clone(), self.gate.clone()).map_err(threads)?;
            self.gate.watch(&output);
            let (console, handle) = Console::new(Box::new(output)).map_err(threads)?;
            self.handles.console = Some(handle.clone());
            slot.set(Arc::new(VirtioInput(handle)));
            devices.push(("console".into(), Box::new(console)));
        }
        if let Some(instance) = &self.instance {
            let listener = instance.take(|parts| parts.vsock.take()).map(Into::into);
            let dial = crate::agent::dial(&self.agent_there, Some(instance.clone()), events);
            let vsock = Vsock::new(virtio::vsock::GUEST_CID, listener, dial)
                .map_err(|error| Error::Host(format!("the host gives no thread for vsock: {error}")))?;
            devices.push(("vsock".into(), Box::new(vsock)));
        }
        let ports = std::mem::take(&mut self.ports);
        if !ports.is_empty() {
            let ports = crate::ports::start(ports)
                .map_err(|error| Error::Host(format!("the host gives no thread for a port: {error}")))?;
            devices.push(("ports".into(), Box::new(ports)));
        }
        let (balloon, handle) = Balloon::new(ram.clone())
            .map_err(|error| Error::Host(format!("the host gives no thread for the balloon: {error}")))?;
        devices.push(("balloon".into(), Box::new(balloon)));
        self.handles.balloon = Some(handle);
        for (name, device) in devices {
            let device = VirtioPci::new(&name, device, ram.shared(), Some(reporter.clone())).map_err(engine_error)?;
            if let Some(chips) = chips {
                device.use_chips(chips.clone());
            }
            self.virtio.push(Arc::new(device));
        }
        Ok(self.virtio.iter().map(|device| device.clone() as Arc<dyn PciDevice>).collect())
    }

    fn first_build(
        &mut self,
        ram: &GuestRam,
        chips: Option<Arc<dyn Chips>>,
        events: &Events,
        output: &Output,
    ) -> Result<Arc<Pc>, Error> {
        let pci_devices = self.devices(ram, chips.as_ref(), events)?;
        let events = Arc::new(Mutex::new(events.clone()));
        let watchdog_events = events.clone();
        let watchdog = move || {
            let _ = watchdog_events.lock().unwrap_or_else(PoisonError::into_inner).send(Event::Watchdog);
        };
        let power = move |event| {
            let event = match event {
                PowerEvent::Off => Event::PowerOff,
                PowerEvent::Reset => Event::Reset,
            };
            let _ = events.lock().unwrap_or_else(PoisonError::into_inner).send(event);
        };
        let pc = Pc::new(PcConfig {
            ram: ram.clone(),
            vcpus: self.cpus,
            tsc_khz: self.tsc_khz,
            chips,
            serial_output: Box::new(output.clone()),
            pci_devices,
            power: Arc::new(power),
            watchdog: self.watchdog.then(|| Arc::new(watchdog) as _),
        })
        .map_err(engine_error)?;
        if let Some(sink) = self.exits.take() {
            pc.bus().set_trace(Box::new(move |access| {
                let mut sink = sink.lock().unwrap_or_else(PoisonError::into_inner);
                let _ = sink.write_all(format!("{}\n", trace_line(access)).as_bytes());
            }));
        }
        Ok(Arc::new(pc))
    }
}

fn trace_line(access: &Access<'_>) -> String {
    let value = access.data.iter().rev().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
    format!(
        "exit {} {} {:#x} {value} {}",
        if access.write { "write" } else { "read" },
        if access.space == Space::Pio { "port" } else { "memory" },
        access.address,
        access.device.unwrap_or("(no device)")
    )
}

impl BoardMaker for PcMaker {
    fn build(
        &mut self,
        ram: &GuestRam,
        chips: Option<Arc<dyn Chips>>,
        events: &Events,
        output: &Output,
    ) -> Result<Box<dyn Board>, Error> {
        let (pc, input) = match (&self.pc, &self.input) {
            (Some(pc), Some(input)) => {
                pc.reset();
                (pc.clone(), input.clone())
            }
            _ => {
                let pc = self.first_build(ram, chips, events, output)?;
                let input = Arc::new(SerialInput::new(pc.serial().clone()));
                (self.pc, self.input) = (Some(pc.clone()), Some(input.clone()));
                (pc, input)
            }
        };
        let kernel = read_whole("the kernel", &self.kernel)?;
        // Without it the kernel is unpacked again.
        let unpacked = self.unpacked.as_ref().and_then(|file| read_whole("the unpacked kernel", file).ok());
        let mut initrd = self.initrd.as_ref().map(|file| read_whole("the initrd", file)).transpose()?;
        if let (Some(initrd), Some(agent)) = (&mut initrd, &self.agent) {
            initrd.splice(0..0, agent.iter().copied());
        }
        let source = BootSource {
            kernel: &kernel,
            unpacked: unpacked.as_deref(),
            initrd: initrd.as_deref(),
            command_line: &self.cmdline,
            own_decompressor: false,
        };
        pc.prepare_boot().map_err(|error| Error::Input(error.to_string()))?;
        let loaded = boot::load(ram, &source).map_err(|error| Error::Input(error.to_string()))?;
        let (virtio, handles) = (self.virtio.clone(), self.handles.clone());
        Ok(Box::new(PcBoard { pc, virtio, handles, input, entry: loaded.entry }))
    }
}

struct PcBoard {
    pc: Arc<Pc>,
    virtio: Vec<Arc<VirtioPci>>,
    handles: Handles,
    input: Arc<SerialInput>,
    entry: u64,
}

impl Board for PcBoard {
    fn bus(&self, index: u32) -> Option<Arc<dyn Bus>> {
        self.pc.vcpu_bus(index)
    }

    fn lapic(&self, index: u32) -> Option<Arc<dyn LocalApic>> {
        self.pc.local_apic(index)
    }

    fn attach(&mut self, index: u32, kick: Arc<dyn Kick>) {
        if let Some(lapic) = self.pc.lapic(index) {
            lapic.set_kick(kick);
        }
    }

    fn start_chips(&self) -> Result<(), Error> {
        self.pc.start_chips().map_err(engine_error)
    }

    fn pause_devices(&self) {
        self.virtio.iter().for_each(|device| device.pause());
    }

    fn resume_devices(&self) {
        self.virtio.iter().for_each(|device| device.resume());
    }

    fn save(&self) -> Result<PcState, Error> {
        self.pc.save().map_err(|error| Error::Host(error.to_string()))
    }

    fn restore(&self, state: &PcState) -> Result<(), Error> {
        self.pc.restore(state).map_err(|error| Error::Input(error.to_string()))
    }

    fn start_state(&self, index: u32) -> CpuState {
        self.pc.initial_cpu_state(index, self.entry)
    }

    fn console(&self) -> Arc<dyn Input> {
        self.input.clone()
    }

    fn press_power_button(&self) {
        self.pc.press_power_button();
    }

    fn nmi(&self) {
        self.pc.nmi_button();
    }

    fn balloon(&self) -> Option<BalloonHandle> {
        self.handles.balloon.clone()
    }

    fn resize_console(&self, columns: u16, rows: u16) {
        if let Some(console) = &self.handles.console {
            console.resize(columns, rows);
        }
    }

    fn disks(&self) -> Vec<SizeWatch> {
        self.handles.disks.clone()
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let both =
            |(name, reads, writes)| [(format!("exits.{name}.reads"), reads), (format!("exits.{name}.writes"), writes)];
        let mut all: Vec<_> =
            self.pc.bus().counters().into_iter().flat_map(both).filter(|(_, count)| *count > 0).collect();
        all.push(("time.devices-us".into(), self.pc.bus().time().as_micros() as u64));
        if let Some(balloon) = self.handles.balloon.as_ref().map(BalloonHandle::status) {
            all.push(("memory.inflated-kib".into(), balloon.inflated >> 10));
            all.push(("memory.reported-free-kib".into(), balloon.reported >> 10));
        }
        all
    }
}

/// A virtio console's input.
struct VirtioInput(ConsoleHandle);

impl Input for VirtioInput {
    fn offer(&self, bytes: &[u8]) -> usize {
        self.0.send(bytes)
    }

    fn wait_for_room(&self, at_most: Duration) {
        // Tens of kilobytes wait for the guest: looking again now and then is enough.
        std::thread::sleep(at_most);
    }
}

/// COM1's receiver, with somebody waiting for room in it.
struct SerialInput {
    serial: Arc<Serial>,
    room: Arc<(Mutex<bool>, Condvar)>,
}

impl SerialInput {
    fn new(serial: Arc<Serial>) -> Self {
        let room = Arc::new((Mutex::new(false), Condvar::new()));
        let signal = room.clone();
        serial.on_room(Arc::new(move || {
            *signal.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
            signal.1.notify_all();
        }));
        Self { serial, room }
    }
}

impl Input for SerialInput {
    fn offer(&self, bytes: &[u8]) -> usize {
        self.serial.input(bytes)
    }

    fn wait_for_room(&self, at_most: Duration) {
        let there = self.room.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut there, _) =
            self.room.1.wait_timeout_while(there, at_most, |there| !*there).unwrap_or_else(PoisonError::into_inner);
        *there = false;
    }
}
