//! Requests to KVM that `kvm-ioctls` does not make, and the list of those that a running VM makes.

use kvm_bindings as b;
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};

const KVMIO: u32 = b::KVMIO;

ioctl_io_nr!(KVM_RUN, KVMIO, 0x80);
// The argument is a length and as many bytes; the number speaks of the length only.
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);
ioctl_iow_nr!(KVM_IRQ_LINE, KVMIO, 0x61, b::kvm_irq_level);
ioctl_iow_nr!(KVM_SIGNAL_MSI, KVMIO, 0xa5, b::kvm_msi);
ioctl_ior_nr!(KVM_GET_REGS, KVMIO, 0x81, b::kvm_regs);
ioctl_iow_nr!(KVM_SET_REGS, KVMIO, 0x82, b::kvm_regs);
ioctl_ior_nr!(KVM_GET_SREGS, KVMIO, 0x83, b::kvm_sregs);
ioctl_iow_nr!(KVM_SET_SREGS, KVMIO, 0x84, b::kvm_sregs);
ioctl_iowr_nr!(KVM_TRANSLATE, KVMIO, 0x85, b::kvm_translation);
ioctl_iowr_nr!(KVM_GET_MSRS, KVMIO, 0x88, b::kvm_msrs);
ioctl_iow_nr!(KVM_SET_MSRS, KVMIO, 0x89, b::kvm_msrs);
ioctl_ior_nr!(KVM_GET_LAPIC, KVMIO, 0x8e, b::kvm_lapic_state);
ioctl_iow_nr!(KVM_SET_LAPIC, KVMIO, 0x8f, b::kvm_lapic_state);
ioctl_ior_nr!(KVM_GET_MP_STATE, KVMIO, 0x98, b::kvm_mp_state);
ioctl_iow_nr!(KVM_SET_MP_STATE, KVMIO, 0x99, b::kvm_mp_state);
ioctl_ior_nr!(KVM_GET_VCPU_EVENTS, KVMIO, 0x9f, b::kvm_vcpu_events);
ioctl_iow_nr!(KVM_SET_VCPU_EVENTS, KVMIO, 0xa0, b::kvm_vcpu_events);
ioctl_ior_nr!(KVM_GET_DEBUGREGS, KVMIO, 0xa1, b::kvm_debugregs);
ioctl_iow_nr!(KVM_SET_DEBUGREGS, KVMIO, 0xa2, b::kvm_debugregs);
ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, b::kvm_xsave);
ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, b::kvm_xsave);
ioctl_ior_nr!(KVM_GET_XCRS, KVMIO, 0xa6, b::kvm_xcrs);
ioctl_iow_nr!(KVM_SET_XCRS, KVMIO, 0xa7, b::kvm_xcrs);
ioctl_iow_nr!(KVM_SET_GUEST_DEBUG, KVMIO, 0x9b, b::kvm_guest_debug);
ioctl_io_nr!(KVM_KVMCLOCK_CTRL, KVMIO, 0xad);
ioctl_iowr_nr!(KVM_GET_IRQCHIP, KVMIO, 0x62, b::kvm_irqchip);
ioctl_ior_nr!(KVM_SET_IRQCHIP, KVMIO, 0x63, b::kvm_irqchip);
ioctl_ior_nr!(KVM_GET_PIT2, KVMIO, 0x9f, b::kvm_pit_state2);
ioctl_iow_nr!(KVM_SET_PIT2, KVMIO, 0xa0, b::kvm_pit_state2);
ioctl_io_nr!(KVM_REINJECT_CONTROL, KVMIO, 0x71);
ioctl_ior_nr!(KVM_GET_CLOCK, KVMIO, 0x7c, b::kvm_clock_data);
ioctl_iow_nr!(KVM_SET_CLOCK, KVMIO, 0x7b, b::kvm_clock_data);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, b::kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, b::kvm_device_attr);
ioctl_iow_nr!(KVM_SET_GSI_ROUTING, KVMIO, 0x6a, b::kvm_irq_routing);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, b::kvm_ioeventfd);
ioctl_iow_nr!(KVM_IRQFD, KVMIO, 0x76, b::kvm_irqfd);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, b::kvm_dirty_log);

/// The `request` arguments of all `ioctl`s that a VM makes after it is built: what the sandbox is to allow. No VM, vCPU or device can be
/// made with them, and no capability be switched on.
pub fn after_start() -> Vec<u64> {
    let all = [
        KVM_RUN(),
        KVM_SET_SIGNAL_MASK(),
        KVM_IRQ_LINE(),
        KVM_SIGNAL_MSI(),
        KVM_GET_REGS(),
        KVM_SET_REGS(),
        KVM_GET_SREGS(),
        KVM_SET_SREGS(),
        KVM_TRANSLATE(),
        KVM_GET_MSRS(),
        KVM_SET_MSRS(),
        KVM_GET_LAPIC(),
        KVM_SET_LAPIC(),
        KVM_GET_MP_STATE(),
        KVM_SET_MP_STATE(),
        KVM_GET_VCPU_EVENTS(),
        KVM_SET_VCPU_EVENTS(),
        KVM_GET_DEBUGREGS(),
        KVM_SET_DEBUGREGS(),
        KVM_GET_XSAVE(),
        KVM_SET_XSAVE(),
        KVM_GET_XCRS(),
        KVM_SET_XCRS(),
        KVM_SET_GUEST_DEBUG(),
        KVM_KVMCLOCK_CTRL(),
        KVM_GET_IRQCHIP(),
        KVM_SET_IRQCHIP(),
        KVM_GET_PIT2(),
        KVM_SET_PIT2(),
        KVM_GET_CLOCK(),
        KVM_SET_CLOCK(),
        KVM_SET_DEVICE_ATTR(),
        KVM_GET_DEVICE_ATTR(),
        KVM_GET_DIRTY_LOG(),
        KVM_RESET_DIRTY_RINGS(),
        // The guest chooses at run time where its devices' doorbells are and which interrupts they send.
        KVM_IOEVENTFD(),
        KVM_SET_GSI_ROUTING(),
    ];
    all.iter().map(|request| request & 0xffff_ffff).collect()
}
