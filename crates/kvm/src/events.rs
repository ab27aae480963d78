//! Doorbells and message-signalled interrupts by event counters (the KVM API, `KVM_IOEVENTFD`, `KVM_IRQFD`, `KVM_SET_GSI_ROUTING`).
//!
//! A doorbell is an address whose writes the kernel counts, and lets the guest go on. A [`Line`] is the other direction: a counter
//! that, counted up, makes the kernel send the message that the counter's route holds. The guest programs its devices' messages
//! while it runs, so routes change then; a line sets its own anew when it has another message to send than the last time.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use cpu::chips::MessageLine;
use kvm_bindings as b;
use kvm_ioctls::VmFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::ioctls::{KVM_IOEVENTFD, KVM_IRQFD};

/// Lines are numbered from here, behind the wires of the interrupt chips.
const FIRST_LINE: u32 = 24;
/// Lines there may be: each has a descriptor.
const MAX_LINES: usize = 512;
/// The message of a line that has sent none.
const NO_MESSAGE: (u64, u32) = (0, 0);

/// Makes `entries` the VM's only routes.
pub fn set_routes(vm: &VmFd, entries: &[b::kvm_irq_routing_entry]) -> Result<(), kvm_ioctls::Error> {
    let routing = b::KvmIrqRouting::from_entries(entries).map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))?;
    vm.set_gsi_routing(&routing)
}

/// Sends a message by a request of its own.
pub fn send(vm: &VmFd, address: u64, data: u32) {
    let message =
        b::kvm_msi { address_lo: address as u32, address_hi: (address >> 32) as u32, data, ..Default::default() };
    // It fails for messages that mean nothing only.
    let _ = vm.signal_msi(message);
}

/// All routes of a VM.
pub struct Routes {
    vm: Arc<VmFd>,
    /// Wires first, then a route for each line that has sent something.
    entries: Mutex<(Vec<b::kvm_irq_routing_entry>, u32)>,
}

impl Routes {
    /// With routes for wires only, which have been set.
    pub fn new(vm: Arc<VmFd>, wires: Vec<b::kvm_irq_routing_entry>) -> Self {
        Self { vm, entries: Mutex::new((wires, 0)) }
    }

    /// A number for a new line.
    fn number(&self) -> Option<u32> {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let count = entries.1;
        ((count as usize) < MAX_LINES).then(|| {
            entries.1 += 1;
            FIRST_LINE + count
        })
    }

    /// Sets the message of line `gsi`.
    fn set(&self, gsi: u32, (address, data): (u64, u32)) -> Result<(), kvm_ioctls::Error> {
        let mut entry = b::kvm_irq_routing_entry { gsi, type_: b::KVM_IRQ_ROUTING_MSI, ..Default::default() };
        entry.u.msi = b::kvm_irq_routing_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let (all, _) = &mut *entries;
        match all.iter_mut().find(|entry| entry.gsi == gsi) {
            Some(place) => *place = entry,
            None => all.push(entry),
        }
        set_routes(&self.vm, all)
    }
}

/// One source of messages.
pub struct Line {
    routes: Arc<Routes>,
    gsi: u32,
    event: OwnedFd,
    /// What the route holds.
    message: Mutex<(u64, u32)>,
}

impl Line {
    /// A line without a route; `None` where there can be no more.
    pub fn new(routes: &Arc<Routes>) -> Option<Self> {
        // SAFETY: takes no pointers.
        let descriptor = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if descriptor < 0 {
            return None;
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let event = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let gsi = routes.number()?;
        let irqfd = b::kvm_irqfd { fd: descriptor as u32, gsi, ..Default::default() };
        // SAFETY: the kernel reads the structure only.
        let bound = unsafe { ioctl_with_ref(&*routes.vm, KVM_IRQFD(), &irqfd) } == 0;
        let message = Mutex::new(NO_MESSAGE);
        bound.then(|| Self { routes: routes.clone(), gsi, event, message })
    }
}

/// Does the kernel deliver this message at once when its counter is counted up? Those to everybody, and such as choose among several
/// vCPUs, it may hand to a thread of its own; they would be lost if the VM were saved in between.
fn at_once(address: u64, data: u32) -> bool {
    const EVERYBODY: u64 = 0xff;
    const DELIVERY_MODE: u32 = 7 << 8;
    const REDIRECTION: u64 = 1 << 3;
    data & DELIVERY_MODE == 0 && address & REDIRECTION == 0 && address >> 12 & 0xff != EVERYBODY
}

impl MessageLine for Line {
    fn send(&self, address: u64, data: u32) {
        if !at_once(address, data) {
            return send(&self.routes.vm, address, data);
        }
        let mut message = self.message.lock().unwrap_or_else(PoisonError::into_inner);
        if *message != (address, data) {
            if self.routes.set(self.gsi, (address, data)).is_err() {
                return send(&self.routes.vm, address, data);
            }
            *message = (address, data);
        }
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes of a local.
        unsafe { libc::write(self.event.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// An address whose writes the kernel counts; dropping it ends that.
pub struct Doorbell {
    vm: Arc<VmFd>,
    address: u64,
    event: OwnedFd,
}

impl Doorbell {
    /// Binds `event` to `address`; `None` if the kernel will not.
    pub fn bind(vm: Arc<VmFd>, address: u64, event: BorrowedFd<'_>) -> Option<Self> {
        let event = event.try_clone_to_owned().ok()?;
        // Not made before it is bound: dropping it unbinds whoever has this address.
        request(&vm, address, &event, 0).then(|| Self { vm, address, event })
    }
}

/// Binds or, by its flag, unbinds: writes of any length and with any value.
fn request(vm: &VmFd, address: u64, event: &OwnedFd, flags: u32) -> bool {
    let request = b::kvm_ioeventfd { addr: address, fd: event.as_raw_fd(), flags, ..Default::default() };
    // SAFETY: the kernel reads the structure only.
    unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), &request) == 0 }
}

impl Drop for Doorbell {
    fn drop(&mut self) {
        request(&self.vm, self.address, &self.event, 1 << b::kvm_ioeventfd_flag_nr_deassign);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_that_take_their_time() {
        assert!(at_once(0xfee0_1000, 0x4041));
        assert!(at_once(0xfee0_1004, 0x41), "logical destination");
        assert!(!at_once(0xfeef_f000, 0x41), "everybody");
        assert!(!at_once(0xfee0_1000, 0x141) && !at_once(0xfee0_1000, 0x441), "lowest priority, NMI");
        assert!(!at_once(0xfee0_100c, 0x41));
    }
}
