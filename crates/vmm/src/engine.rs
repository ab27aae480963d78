//! Which engine runs the guest, and why.

use std::fs::File;
use std::io::Write;
use std::sync::{Arc, Mutex};

use cpu::Engine;
use cpu::cpuid::{CpuidModel, Vendor};
use memory::GuestRam;

use crate::config::{EngineChoice, MAX_CPUS, Optimization, SerialMode, VmConfig};
use crate::error::Error;
use crate::serial::open_output;

/// What was found out about KVM before the process confines itself.
pub(crate) enum KvmState {
    /// Another engine is asked for.
    NotAsked,
    /// It runs 64-bit guests.
    Works(Box<kvm::Host>),
    /// It cannot be used, and why.
    Not(kvm::Unusable),
}

/// Opens KVM if it may be used. To be called while files can still be opened.
pub(crate) fn open_kvm(config: &VmConfig) -> Result<KvmState, Error> {
    let choice = config.engine;
    if !matches!(choice, EngineChoice::Auto | EngineChoice::Kvm)
        || needs_bt(config).is_some() && choice == EngineChoice::Auto
    {
        return Ok(KvmState::NotAsked);
    }
    match kvm::probe::usable() {
        Ok(host) => Ok(KvmState::Works(Box::new(host))),
        Err(why) if choice == EngineChoice::Kvm => Err(no_kvm(&why)),
        Err(why) => Ok(KvmState::Not(why)),
    }
}

fn no_kvm(why: &kvm::Unusable) -> Error {
    Error::Engine(format!("engine kvm cannot be used: {why}; or choose --engine bt"))
}

/// What is asked for that the translator alone can do.
fn needs_bt(config: &VmConfig) -> Option<&'static str> {
    if config.lockstep {
        return Some("--lockstep");
    }
    if config.cpu_vendor == Some(Vendor::Amd) && Vendor::of_host() != Vendor::Amd {
        return Some("--cpu-vendor amd on another CPU");
    }
    let trace = config.trace.as_ref()?;
    (trace.interrupts || trace.blocks || trace.tlb).then_some("--trace int, blocks and tlb")
}

/// Is the guest going to run on engine `bt`?
pub(crate) fn is_bt(config: &VmConfig, kvm: &KvmState) -> bool {
    config.engine == EngineChoice::Bt || config.engine == EngineChoice::Auto && !matches!(kvm, KvmState::Works(_))
}

/// Can the engine that is asked for do what is asked of it?
pub(crate) fn check(config: &VmConfig) -> Result<(), Error> {
    if config.cpus == 0 || config.cpus > MAX_CPUS {
        return Err(Error::Input(format!("a VM with {} vCPUs is not possible: choose 1 to {MAX_CPUS}", config.cpus)));
    }
    if config.serial == SerialMode::Stdio && config.virtio_console == Some(SerialMode::Stdio) {
        return Err(Error::Input("two consoles cannot share stdio: add --serial none, or name another place".into()));
    }
    if let (EngineChoice::Kvm, Some(what)) = (config.engine, needs_bt(config)) {
        return Err(Error::Engine(format!("{what}: of engine bt, leave --engine kvm away")));
    }
    if config.engine == EngineChoice::Kvm {
        kvm::Host::open().map_err(|why| no_kvm(&why))?;
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
            let file = open_output(File::options().write(true).truncate(true), path)
                .map_err(|error| Error::output("trace file", path, error))?;
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
    kvm: KvmState,
    trace: Option<TraceSink>,
    saved: Option<CpuidModel>,
) -> Result<(Box<dyn Engine>, String), Error> {
    let saved = saved.map(executable).transpose()?;
    let make_kvm = |ram: GuestRam, host: &kvm::Host| self::kvm(config, ram, tsc_khz, host, saved.as_ref());
    let why_bt = match (config.engine, kvm) {
        (EngineChoice::Interp, _) => {
            let model = model(config, interp::tsc::khz().into(), saved.as_ref(), Vendor::Intel);
            let engine = interp::InterpEngine::with_model(ram, model);
            return Ok((Box::new(engine), "engine interp: asked for; precise, but slow".to_string()));
        }
        (EngineChoice::Kvm, KvmState::NotAsked) => return Err(Error::Engine("engine kvm was not opened".into())),
        (EngineChoice::Kvm, KvmState::Not(why)) => return Err(no_kvm(&why)),
        (EngineChoice::Kvm, KvmState::Works(host)) => {
            let engine = make_kvm(ram, &host).map_err(|error| match error {
                Error::Engine(why) => Error::Engine(format!("engine kvm cannot be used: {why}; or choose --engine bt")),
                other => other,
            })?;
            return Ok((engine, "engine kvm: asked for".to_string()));
        }
        (EngineChoice::Auto, KvmState::Works(host)) => match make_kvm(ram.clone(), &host) {
            Ok(engine) => return Ok((engine, "engine kvm: this host runs 64-bit guests by hardware".to_string())),
            // It worked a moment ago.
            Err(error) => error.to_string(),
        },
        (EngineChoice::Auto, KvmState::Not(why)) => why.to_string(),
        (EngineChoice::Auto, KvmState::NotAsked) => needs_bt(config).unwrap_or("asked for").to_string(),
        (EngineChoice::Bt, _) => "asked for".to_string(),
    };
    let model = model(config, tsc_khz, saved.as_ref(), Vendor::Intel);
    Ok((bt(config, ram, model, trace)?, format!("engine bt: {why_bt}")))
}

/// A saved VM's CPU, if this host's can execute what the guest may have found.
fn executable(mut saved: CpuidModel) -> Result<CpuidModel, Error> {
    match saved.check() {
        Ok(()) => Ok(saved),
        Err(names) => {
            let names = names.join(", ");
            Err(Error::Input(format!("the saved VM does not fit: its guest may use {names}, which this CPU has not")))
        }
    }
}

/// Can engine `kvm` run a guest that has found this CPU?
fn fits_kvm(saved: &CpuidModel) -> Result<(), Error> {
    let [own, call] = match saved.vendor {
        Vendor::Intel => ["an Intel CPU", "VMCALL"],
        Vendor::Amd => ["an AMD CPU", "VMMCALL"],
    };
    let foreign = saved.vendor == Vendor::Amd && Vendor::of_host() != Vendor::Amd;
    if foreign || saved.hypercalls && !saved.vendor.calls_work() {
        return Err(Error::Input(format!(
            "the saved VM does not fit: its guest sees {own} and calls its host by {call}, which engine kvm cannot take on this CPU; --engine bt can"
        )));
    }
    Ok(())
}

/// What the guest sees: what it saw when it was saved, or a CPU of the vendor that is asked for, `usual` if none is.
fn model(config: &VmConfig, tsc_khz: u64, saved: Option<&CpuidModel>, usual: Vendor) -> CpuidModel {
    let tsc_khz = u32::try_from(tsc_khz).unwrap_or(u32::MAX);
    if let Some(saved) = saved {
        return CpuidModel { cpus: config.cpus, tsc_khz, ..saved.clone() };
    }
    let mut model = CpuidModel::of(config.cpu_vendor.unwrap_or(usual), config.cpus, tsc_khz);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    model.pv_unhalt = config.cpus as usize > cores;
    model
}

fn kvm(
    config: &VmConfig,
    ram: GuestRam,
    tsc_khz: u64,
    host: &kvm::Host,
    saved: Option<&CpuidModel>,
) -> Result<Box<dyn Engine>, Error> {
    saved.map_or(Ok(()), fits_kvm)?;
    let mut model = model(config, tsc_khz, saved, Vendor::of_host());
    if saved.is_none() && model.vendor == Vendor::Amd {
        model = model.with_host_signature();
    }
    let mut options = kvm::Options::new(model);
    options.parking = Some(kvm::Parking { code: machine::layout::PARKING_CODE, mailbox: machine::layout::MAILBOX });
    let engine = kvm::KvmEngine::new(host, ram, options).map_err(Error::Engine)?;
    let beyond = saved.map(|saved| saved.features.beyond(&engine.model().features)).unwrap_or_default().join(", ");
    if !beyond.is_empty() {
        let text = "which this host's KVM does not give; --engine bt may";
        return Err(Error::Input(format!("the saved VM does not fit: its guest may use {beyond}, {text}")));
    }
    Ok(Box::new(engine))
}

fn bt(config: &VmConfig, ram: GuestRam, model: CpuidModel, trace: Option<TraceSink>) -> Result<Box<dyn Engine>, Error> {
    let mut options = bt::Options::new(Arc::new(model));
    options.parking = (config.cpus > 1)
        .then_some(bt::Parking { code: machine::layout::PARKING_CODE, mailbox: machine::layout::MAILBOX });
    options.lockstep = config.lockstep;
    let with = |what| !config.without.contains(&what);
    options.direct = with(Optimization::Direct);
    options.tiers = with(Optimization::Tiers);
    options.fast_transitions = with(Optimization::Transitions);
    options.remember_tables = with(Optimization::Tables);
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
