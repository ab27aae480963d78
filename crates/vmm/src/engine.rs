//! Which engine runs the guest, and why.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::{Arc, Mutex};

use cpu::Engine;
use cpu::cpuid::CpuidModel;
use memory::GuestRam;

use crate::config::{EngineChoice, MAX_CPUS, SerialMode, VmConfig};
use crate::error::Error;

/// What is known about `/dev/kvm` without asking it to run anything.
pub(crate) fn kvm_state() -> String {
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => "/dev/kvm can be opened".into(),
        Err(error) => match error.kind() {
            std::io::ErrorKind::NotFound => "there is no /dev/kvm here".into(),
            std::io::ErrorKind::PermissionDenied => "/dev/kvm is there, but this user may not open it".into(),
            _ => format!("/dev/kvm cannot be opened: {error}"),
        },
    }
}

fn no_kvm(state: &str) -> Error {
    Error::Engine(format!(
        "engine kvm is not part of this version ({state}): leave --engine away or choose --engine bt"
    ))
}

/// Can the engine that is asked for do what is asked of it?
pub(crate) fn check(config: &VmConfig) -> Result<(), Error> {
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        return Err(Error::Input(format!("a VM with {} vCPUs is not possible: choose 1 to {MAX_CPUS}", config.cpus)));
    }
    if config.serial == SerialMode::Stdio && config.virtio_console == Some(SerialMode::Stdio) {
        return Err(Error::Input("two consoles cannot share stdio: add --serial none, or name another place".into()));
    }
    if config.engine == EngineChoice::Kvm {
        return Err(no_kvm(&kvm_state()));
    }
    if config.cpus > 1 && (config.engine == EngineChoice::Interp || config.lockstep) {
        let what = if config.lockstep { "--lockstep" } else { "engine interp" };
        return Err(Error::Engine(format!("{what} runs one vCPU, not {}: leave --cpus away", config.cpus)));
    }
    if config.lockstep && config.engine == EngineChoice::Interp {
        return Err(Error::Engine("--lockstep is of engine bt: leave --engine interp away".into()));
    }
    if config.engine == EngineChoice::Interp
        && let Some(trace) = &config.trace
        && (trace.interrupts || trace.blocks || trace.tlb)
    {
        return Err(Error::Engine("--trace int, blocks and tlb are of engine bt: leave --engine interp away".into()));
    }
    Ok(())
}

/// What trace lines are written to, by the engine and by the bus.
pub(crate) type TraceSink = Arc<Mutex<dyn Write + Send>>;

/// Opens what the trace is written to, if one is asked for.
pub(crate) fn open_trace(config: &VmConfig) -> Result<Option<TraceSink>, Error> {
    let Some(trace) = &config.trace else { return Ok(None) };
    match trace.file.as_deref() {
        Some(path) => {
            let file = File::create(path).map_err(|error| Error::file("trace file", path, error))?;
            // In lines: what is written before a crash must be there after it.
            Ok(Some(Arc::new(Mutex::new(std::io::LineWriter::new(file)))))
        }
        None => Ok(Some(Arc::new(Mutex::new(ToTerminal)))),
    }
}

/// Standard error, in whatever mode the terminal is.
struct ToTerminal;

impl Write for ToTerminal {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        crate::terminal::message(&String::from_utf8_lossy(bytes));
        Ok(())
    }

    fn write_fmt(&mut self, text: std::fmt::Arguments<'_>) -> std::io::Result<()> {
        crate::terminal::message(&text.to_string());
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The engine chosen, and the line that says so.
pub(crate) fn choose(
    config: &VmConfig,
    ram: GuestRam,
    tsc_khz: u64,
    kvm: &str,
    trace: Option<TraceSink>,
) -> Result<(Box<dyn Engine>, String), Error> {
    Ok(match config.engine {
        EngineChoice::Auto => {
            (bt(config, ram, tsc_khz, trace)?, format!("engine bt: engine kvm is not part of this version ({kvm})"))
        }
        EngineChoice::Bt => (bt(config, ram, tsc_khz, trace)?, "engine bt: asked for".to_string()),
        EngineChoice::Interp => (
            Box::new(interp::InterpEngine::new(ram, config.cpus)),
            "engine interp: asked for; precise, but slow".to_string(),
        ),
        EngineChoice::Kvm => return Err(no_kvm(kvm)),
    })
}

fn bt(config: &VmConfig, ram: GuestRam, tsc_khz: u64, trace: Option<TraceSink>) -> Result<Box<dyn Engine>, Error> {
    let khz = u32::try_from(tsc_khz).unwrap_or(u32::MAX);
    let mut model = CpuidModel::new(config.cpus, khz);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    model.pv_unhalt = config.cpus as usize > cores;
    let mut options = bt::Options::new(Arc::new(model));
    options.parking = (config.cpus > 1)
        .then_some(bt::Parking { code: machine::layout::PARKING_CODE, mailbox: machine::layout::MAILBOX });
    options.lockstep = config.lockstep;
    if let (Some(kinds), Some(sink)) = (&config.trace, trace) {
        let mut trace = bt::Trace::new(sink);
        trace.interrupts = kinds.interrupts;
        trace.blocks = kinds.blocks;
        trace.tlb = kinds.tlb;
        options.trace = Some(trace);
    }
    let engine = bt::BtEngine::new(ram, options).map_err(Error::Engine)?;
    Ok(Box::new(engine))
}
