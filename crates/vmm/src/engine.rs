//! Which engine runs the guest, and why.

use std::fs::{File, OpenOptions};

use cpu::Engine;
use memory::GuestRam;

use crate::config::{EngineChoice, MAX_CPUS, VmConfig};
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
    if config.engine == EngineChoice::Kvm {
        return Err(no_kvm(&kvm_state()));
    }
    if config.cpus > 1 {
        return Err(Error::Engine(format!(
            "{} vCPUs are not possible yet: this version runs one, leave --cpus away",
            config.cpus
        )));
    }
    if config.lockstep && config.engine == EngineChoice::Interp {
        return Err(Error::Engine("--lockstep compares engine bt with engine interp: choose --engine bt".into()));
    }
    Ok(())
}

/// Opens the file that the trace goes to.
pub(crate) fn open_trace(config: &VmConfig) -> Result<Option<File>, Error> {
    let Some(path) = config.trace.as_ref().and_then(|trace| trace.file.as_deref()) else { return Ok(None) };
    File::create(path).map(Some).map_err(|error| Error::file("trace file", path, error))
}

/// The engine chosen, and the line that says so.
pub(crate) fn choose(
    config: &VmConfig,
    ram: GuestRam,
    trace: Option<File>,
    kvm: &str,
) -> Result<(Box<dyn Engine>, String), Error> {
    let _ = (ram, trace);
    let line = match config.engine {
        EngineChoice::Auto => format!("engine bt: engine kvm is not part of this version ({kvm})"),
        EngineChoice::Bt => "engine bt: asked for".to_string(),
        EngineChoice::Interp => "engine interp: asked for; precise, but slow".to_string(),
        EngineChoice::Kvm => return Err(no_kvm(kvm)),
    };
    Err(Error::Engine(line))
}
