//! `/dev/kvm`: opening it, and what it can do.

use std::path::Path;
use std::sync::Arc;

use kvm_ioctls::{Cap, Kvm};
use serde::{Deserialize, Serialize};

use crate::probe::Doubt;

/// Where the device is.
pub const DEVICE: &str = "/dev/kvm";
/// The only version of the KVM API there has been since 2007.
const API_VERSION: i32 = 12;
/// Bytes of an entry of a dirty ring.
const DIRTY_RING_ENTRY: u32 = 16;

/// Why KVM cannot be used, told apart by what helps.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Unusable {
    /// There is no device.
    #[error("there is no /dev/kvm: {remedy}")]
    Missing {
        /// What helps.
        remedy: String,
    },
    /// This user may not open it.
    #[error("/dev/kvm is there, but this user may not open it: {remedy}")]
    Permission {
        /// What helps.
        remedy: String,
    },
    /// The device is there, nothing behind it.
    #[error(
        "/dev/kvm is there, but cannot be opened ({0}): load the module (modprobe kvm_intel or kvm_amd) and look at dmesg"
    )]
    Open(String),
    /// Virtualization is used by something else.
    #[error("another hypervisor holds the CPU's virtualization ({0}): stop it (VirtualBox, VMware, Xen) and try again")]
    Busy(String),
    /// The host's kernel is too old, or its KVM was built without something.
    #[error("this kernel's KVM has no {0}: Linux 5.10 or newer has it")]
    TooOld(String),
    /// No VM can be made.
    #[error(
        "KVM makes no virtual machine here ({0}): look at dmesg, and load its module again (modprobe kvm_intel or kvm_amd)"
    )]
    Refused(String),
    /// It opens, but does not run a 64-bit guest.
    #[error(
        "/dev/kvm opens, but does not run a 64-bit guest here ({0}): this machine is itself virtual and its hypervisor offers no nested virtualization, ask its operator for it"
    )]
    CannotRun(String),
    /// A test guest was still not done after seconds.
    #[error(
        "/dev/kvm opens, but a test guest of some instructions does not come back: the host is very busy, then try again later; or something below it holds guests up"
    )]
    Silent,
}

/// What this host's KVM offers beyond the necessary.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// Most vCPUs of a VM.
    pub max_vcpus: u32,
    /// vCPUs that KVM recommends at most: the host's CPUs.
    pub recommended_vcpus: u32,
    /// Pieces of memory a VM may have.
    pub memory_slots: u32,
    /// Entries a dirty ring may have; 0: only bitmaps.
    pub dirty_ring: u32,
    /// MSRs can be filtered and answered by the monitor.
    pub msr_filter: bool,
    /// Only the paravirtual features that CPUID shows exist.
    pub enforces_pv_features: bool,
    /// The TSC may run at another rate in a guest.
    pub tsc_scaling: bool,
    /// The offset of the TSC can be read and set exactly.
    pub tsc_offset: bool,
    /// Doorbells and interrupts by file descriptor.
    pub eventfds: bool,
}

/// What the engine cannot do without.
const NECESSARY: [(Cap, &str); 14] = [
    (Cap::Irqchip, "interrupt chips (KVM_CAP_IRQCHIP)"),
    (Cap::Pit2, "timer chip (KVM_CAP_PIT2)"),
    (Cap::PitState2, "state of the timer chip (KVM_CAP_PIT_STATE2)"),
    (Cap::IrqRouting, "interrupt routing (KVM_CAP_IRQ_ROUTING)"),
    (Cap::SignalMsi, "message-signalled interrupts (KVM_CAP_SIGNAL_MSI)"),
    (Cap::UserMemory, "guest memory (KVM_CAP_USER_MEMORY)"),
    (Cap::SetTssAddr, "place for a task-state segment (KVM_CAP_SET_TSS_ADDR)"),
    (Cap::ExtCpuid, "CPUID model (KVM_CAP_EXT_CPUID)"),
    (Cap::MpState, "run state of vCPUs (KVM_CAP_MP_STATE)"),
    (Cap::VcpuEvents, "pending events (KVM_CAP_VCPU_EVENTS)"),
    (Cap::Debugregs, "debug registers (KVM_CAP_DEBUGREGS)"),
    (Cap::Xsave, "extended state (KVM_CAP_XSAVE)"),
    (Cap::AdjustClock, "adjustable clock (KVM_CAP_ADJUST_CLOCK)"),
    (Cap::ImmediateExit, "immediate exit (KVM_CAP_IMMEDIATE_EXIT)"),
];

/// `KVM_CAP_…` numbers that `kvm-ioctls` has no name for (the KVM API).
pub(crate) mod cap {
    pub const X86_USER_SPACE_MSR: u32 = 188;
    pub const X86_MSR_FILTER: u32 = 189;
    pub const ENFORCE_PV_FEATURE_CPUID: u32 = 190;
    pub const DIRTY_LOG_RING: u32 = 192;
    pub const PMU_CAPABILITY: u32 = 212;
    pub const DIRTY_LOG_RING_ACQ_REL: u32 = 223;
    pub const IOEVENTFD_ANY_LENGTH: u32 = 122;
    pub const VCPU_ATTRIBUTES: u32 = 127;
}

/// An open `/dev/kvm` that has what the engine needs.
pub struct Host {
    kvm: Kvm,
    capabilities: Capabilities,
    /// Where to note that the probe's answer proved wrong.
    doubt: Option<Arc<Doubt>>,
}

impl Host {
    /// Opens `/dev/kvm` and looks at what it has; runs nothing.
    ///
    /// # Errors
    /// [`Unusable`]
    pub fn open() -> Result<Self, Unusable> {
        Self::open_at(Path::new(DEVICE))
    }

    /// The same for a device elsewhere.
    ///
    /// # Errors
    /// [`Unusable`]
    pub fn open_at(path: &Path) -> Result<Self, Unusable> {
        let c_path = std::ffi::CString::new(path.as_os_str().as_encoded_bytes())
            .map_err(|_| Unusable::Open("a name with a zero byte".into()))?;
        let kvm = Kvm::new_with_path(c_path).map_err(|error| match error.errno() {
            libc::ENOENT => Unusable::Missing { remedy: missing_remedy() },
            libc::EACCES => Unusable::Permission { remedy: permission_remedy(path) },
            // Not the file's mode, but the rules of a control group for devices.
            libc::EPERM => Unusable::Permission { remedy: format!("this container is denied it, {PASS_IT_IN}") },
            _ => Unusable::Open(std::io::Error::from(error).to_string()),
        })?;
        let version = kvm.get_api_version();
        if version < 0 {
            // Somebody else's file or device.
            return Err(Unusable::Open(format!("{} is no KVM device", path.display())));
        }
        if version != API_VERSION {
            return Err(Unusable::TooOld(format!("API version {API_VERSION} (it says {version})")));
        }
        if let Some((_, name)) = NECESSARY.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(Unusable::TooOld((*name).to_string()));
        }
        let raw = |number: u32| kvm.check_extension_raw(number.into()).max(0) as u32;
        let capabilities = Capabilities {
            max_vcpus: kvm.get_max_vcpus() as u32,
            recommended_vcpus: kvm.get_nr_vcpus() as u32,
            memory_slots: kvm.get_nr_memslots() as u32,
            dirty_ring: raw(cap::DIRTY_LOG_RING_ACQ_REL).max(raw(cap::DIRTY_LOG_RING)) / DIRTY_RING_ENTRY,
            msr_filter: raw(cap::X86_USER_SPACE_MSR) != 0 && raw(cap::X86_MSR_FILTER) != 0,
            enforces_pv_features: raw(cap::ENFORCE_PV_FEATURE_CPUID) != 0,
            tsc_scaling: kvm.check_extension(Cap::TscControl),
            tsc_offset: raw(cap::VCPU_ATTRIBUTES) != 0,
            eventfds: kvm.check_extension(Cap::Ioeventfd)
                && kvm.check_extension(Cap::Irqfd)
                && raw(cap::IOEVENTFD_ANY_LENGTH) != 0,
        };
        Ok(Self { kvm, capabilities, doubt: None })
    }

    pub(crate) fn doubt_with(&mut self, doubt: Doubt) {
        self.doubt = Some(Arc::new(doubt));
    }

    pub(crate) fn doubt(&self) -> Option<Arc<Doubt>> {
        self.doubt.clone()
    }

    /// What it offers.
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// An empty VM.
    pub(crate) fn create_vm(&self) -> Result<kvm_ioctls::VmFd, Unusable> {
        loop {
            match self.kvm.create_vm() {
                Ok(vm) => return Ok(vm),
                // A signal came while the kernel built the VM.
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => {
                    let text = std::io::Error::from(error).to_string();
                    return Err(if error.errno() == libc::EBUSY {
                        Unusable::Busy(text)
                    } else {
                        Unusable::Refused(text)
                    });
                }
            }
        }
    }
}

/// What helps in containers.
const PASS_IT_IN: &str = "pass it in (docker run --device /dev/kvm)";

/// What helps where there is no device, by what the kernel and the CPU say.
fn missing_remedy() -> String {
    // Each driver that is there, also in containers: `232 kvm`.
    let drivers = std::fs::read_to_string("/proc/misc").unwrap_or_default();
    if drivers.lines().any(|line| line.split_ascii_whitespace().nth(1) == Some("kvm")) {
        return format!("the kernel has KVM, but this container no device for it: {PASS_IT_IN}");
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag: &str| flags.split_ascii_whitespace().any(|word| word == flag);
    if has("vmx") {
        "load the module (modprobe kvm_intel); if that fails, switch VT-x on in the firmware's setup".into()
    } else if has("svm") {
        "load the module (modprobe kvm_amd); if that fails, switch SVM on in the firmware's setup".into()
    } else if has("hypervisor") {
        "this machine is itself virtual and its hypervisor offers no nested virtualization".into()
    } else {
        "the CPU shows neither VT-x nor AMD-V; they may be switched off in the firmware's setup".into()
    }
}

/// What helps where the device may not be opened: the group it belongs to.
fn permission_remedy(path: &Path) -> String {
    use std::os::unix::fs::MetadataExt;
    let group = std::fs::metadata(path).ok().filter(|meta| meta.mode() & 0o060 == 0o060).map(|meta| meta.gid());
    let names = std::fs::read_to_string("/etc/group").unwrap_or_default();
    let name = group.filter(|gid| *gid != 0).map(|gid| {
        let entry = names.lines().find(|line| line.split(':').nth(2) == Some(&gid.to_string()));
        entry.and_then(|line| line.split(':').next()).map_or_else(|| gid.to_string(), str::to_string)
    });
    match name {
        Some(name) => format!("join its group (usermod -aG {name} $USER) and log in again"),
        None => {
            "give it a group by a udev rule (KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0660\") and join that group".into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_there_or_something_else() {
        assert!(matches!(Host::open_at(Path::new("/dev/no-such-kvm")), Err(Unusable::Missing { .. })));
        let error = Host::open_at(Path::new("/dev/null")).err().unwrap();
        assert!(matches!(error, Unusable::Open(_)), "{error}");
        assert!(!error.to_string().contains('\n'));
    }

    #[test]
    fn without_permission() {
        let dir = std::env::temp_dir().join(format!("kvm-permission-{}", std::process::id()));
        std::fs::write(&dir, "").unwrap();
        let text = permission_remedy(&dir);
        std::fs::remove_file(&dir).unwrap();
        assert!(text.contains("udev") || text.contains("usermod"), "{text}");
    }
}
