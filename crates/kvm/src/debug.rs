//! Breakpoints and single steps, for the debugger (the KVM API, `KVM_SET_GUEST_DEBUG`).

use kvm_bindings as b;
use kvm_ioctls::VcpuFd;

/// How many breakpoints the CPU has.
const HARDWARE: usize = 4;

/// How the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Freely; the debug registers are the guest's.
    Free,
    /// To a breakpoint.
    Breakpoints,
    /// One instruction at a time.
    Step,
}

/// The breakpoints of one vCPU.
#[derive(Default)]
pub struct Breakpoints {
    addresses: Vec<u64>,
    /// What the kernel was told last.
    armed: Option<(Mode, Vec<u64>)>,
}

impl Breakpoints {
    /// Replaces all.
    pub fn set(&mut self, addresses: &[u64]) {
        self.addresses = addresses.to_vec();
        self.addresses.sort_unstable();
        self.addresses.dedup();
    }

    /// Is there one at `address`?
    pub fn at(&self, address: u64) -> bool {
        self.addresses.contains(&address)
    }

    /// How to run towards them: more than the CPU has are looked for step by step.
    pub fn mode(&self) -> Mode {
        match self.addresses.len() {
            0 => Mode::Free,
            1..=HARDWARE => Mode::Breakpoints,
            _ => Mode::Step,
        }
    }

    /// Makes the vCPU run in `mode`.
    pub fn arm(&mut self, fd: &VcpuFd, mode: Mode) -> Result<(), String> {
        let wish = (mode, if mode == Mode::Breakpoints { self.addresses.clone() } else { Vec::new() });
        if self.armed.as_ref() == Some(&wish) || self.armed.is_none() && mode == Mode::Free {
            return Ok(());
        }
        let mut request = b::kvm_guest_debug::default();
        match mode {
            Mode::Free => {}
            Mode::Step => request.control = b::KVM_GUESTDBG_ENABLE | b::KVM_GUESTDBG_SINGLESTEP,
            Mode::Breakpoints => {
                request.control = b::KVM_GUESTDBG_ENABLE | b::KVM_GUESTDBG_USE_HW_BP;
                // DR7 (SDM volume 3, 19.2.4): global enables; execution breakpoints have type and length 0.
                request.arch.debugreg[7] = 1 << 10;
                for (at, address) in self.addresses.iter().take(HARDWARE).enumerate() {
                    request.arch.debugreg[at] = *address;
                    request.arch.debugreg[7] |= 2 << (2 * at);
                }
            }
        }
        fd.set_guest_debug(&request)
            .map_err(|error| format!("KVM refuses to debug the guest: {}", std::io::Error::from(error)))?;
        self.armed = Some(wish);
        Ok(())
    }
}
