//! Does KVM run a real 64-bit guest here?
//!
//! A `/dev/kvm` that opens may be one that cannot: inside a virtual machine whose hypervisor passes on no VT-x or AMD-V, some kernels
//! still emulate 16-bit code. So a small guest of ours ([`guest`]) runs through the very engine: it pages, takes a page fault
//! and an invalid opcode, uses SSE and BMI2, and sleeps until a timer interrupt of its local APIC. That takes some
//! milliseconds; the answer is kept ([`cache`]) until the next boot, or until KVM does not do what it was found to do.

mod cache;
mod guest;

pub(crate) use cache::Doubt;

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use cpu::cpuid::{CpuidModel, Vendor};
use cpu::{Bus, Engine, Exit, Nothing, VcpuSetup};
use memory::GuestRam;

use crate::{Host, KvmEngine, Options, Unusable};

/// How long the guest may take.
const LIMIT: Duration = Duration::from_millis(100);
/// And when it did not come back in that time but nothing else is wrong: a host may be very busy.
const PATIENT_LIMIT: Duration = Duration::from_secs(2);

/// What the probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whether KVM works, or why not.
    pub verdict: Result<(), Unusable>,
    /// How long it took to find out; `None`: known from before.
    pub took: Option<Duration>,
}

/// KVM, open and known to run 64-bit guests.
///
/// # Errors
/// [`Unusable`]
pub fn usable() -> Result<Host, Unusable> {
    let mut host = Host::open()?;
    look(&host, true).verdict?;
    host.doubt_with(Doubt::ready());
    Ok(host)
}

/// Runs the guest, or remembers. With `cached`, an answer from this boot of the host is good enough.
pub fn look(host: &Host, cached: bool) -> Found {
    let key = cache::Key::now();
    if cached
        && let Some(key) = &key
        && let Some(verdict) = cache::load(key)
    {
        return Found { verdict, took: None };
    }
    let started = Instant::now();
    let mut result = try_guest(host, LIMIT);
    if result == Err(Failure::Silent) {
        result = try_guest(host, PATIENT_LIMIT);
    }
    let took = started.elapsed();
    let verdict = match result {
        Ok(()) => Ok(()),
        // Kept for a while only: it may be a host under heavy load.
        Err(Failure::Silent) => Err(Unusable::Silent),
        Err(Failure::Refused(why)) => return Found { verdict: Err(Unusable::Refused(why)), took: Some(took) },
        Err(Failure::Wrong(why)) => Err(Unusable::CannotRun(why)),
    };
    if let Some(key) = &key {
        cache::store(key, &verdict);
    }
    Found { verdict, took: Some(took) }
}

#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// No VM or vCPU can be made.
    Refused(String),
    /// The guest ran wrong.
    Wrong(String),
    /// The guest did not end in time.
    Silent,
}

/// What the guest reaches: one port.
struct Port {
    result: AtomicU32,
    done: std::sync::OnceLock<Arc<dyn cpu::Kick>>,
}

impl Bus for Port {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        if port == guest::PORT
            && let Ok(value) = data.try_into()
        {
            self.result.store(u32::from_le_bytes(value), Ordering::SeqCst);
            if let Some(stop) = self.done.get() {
                stop.kick();
            }
        }
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

fn try_guest(host: &Host, limit: Duration) -> Result<(), Failure> {
    let ram = GuestRam::new(memory::layout::MIN_RAM).map_err(|error| Failure::Refused(error.to_string()))?;
    // The frequency does not matter to this guest.
    let model = CpuidModel::of(Vendor::of_host(), 1, 1_000_000);
    let engine = KvmEngine::new(host, ram.clone(), Options::new(model)).map_err(Failure::Refused)?;
    let port = Arc::new(Port { result: AtomicU32::new(0), done: std::sync::OnceLock::new() });
    let setup = VcpuSetup { index: 0, lapic: Arc::new(Nothing), bus: port.clone() };
    let mut vcpu = engine.create_vcpu(setup).map_err(Failure::Refused)?;
    let state = guest::load(&ram).ok_or_else(|| Failure::Refused("its memory is too small".into()))?;
    vcpu.set_state(&state);
    let stop = vcpu.stop_handle();
    let _ = port.done.set(stop.clone());
    let (end, ended) = mpsc::channel::<()>();
    let guard = std::thread::Builder::new()
        .name("kvm-probe".into())
        .spawn(move || {
            if ended.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout) {
                stop.kick();
            }
        })
        .map_err(|error| Failure::Refused(format!("the host gives no thread: {error}")))?;
    let exit = vcpu.run();
    drop(end);
    let _ = guard.join();
    let result = port.result.load(Ordering::SeqCst);
    if result == guest::GOOD {
        return Ok(());
    }
    let step = vcpu.state().gpr[guest::STEP_REGISTER];
    match exit {
        Exit::Stopped if result == 0 => Err(Failure::Silent),
        Exit::Internal(why) => {
            // The details are of no use to who reads this.
            let why = why.split(" (its data").next().unwrap_or_default();
            Err(Failure::Wrong(format!("{} failed: {why}", guest::step_name(step))))
        }
        Exit::TripleFault => Err(Failure::Wrong(format!("{} failed: triple fault", guest::step_name(step)))),
        _ => Err(Failure::Wrong(format!("{} gave a wrong result", guest::step_name(u64::from(result))))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever this host has, the answer comes soon and is one line.
    #[test]
    fn answers() {
        let started = Instant::now();
        match Host::open() {
            Ok(host) => {
                let found = look(&host, false);
                assert!(found.took.is_some());
                if let Err(error) = &found.verdict {
                    assert!(!error.to_string().contains('\n'), "{error}");
                }
                println!("{found:?}");
            }
            Err(error) => println!("{error}"),
        }
        assert!(started.elapsed() < Duration::from_secs(10));
    }
}
