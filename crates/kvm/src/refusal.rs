//! What to say when the kernel refuses a request.

/// A line that names what was refused and why: of requests whose arguments come from a VM's state, where no remedy follows from the reason.
pub fn told(what: &str) -> impl FnOnce(kvm_ioctls::Error) -> String {
    move |error| format!("KVM refuses {what}: {}", std::io::Error::from(error))
}

/// The same for what makes a VM: with what helps, as far as the reason tells.
pub fn refused(what: &str) -> impl FnOnce(kvm_ioctls::Error) -> String {
    move |error| {
        let remedy = match error.errno() {
            libc::ENOMEM => ": give the guest less by --memory, or free some of the host's",
            libc::EMFILE | libc::ENFILE => ": raise the limit of open files (ulimit -n)",
            libc::EPERM | libc::EACCES => ": a security policy of the host forbids it",
            libc::EBUSY => ": another hypervisor may hold the CPU's virtualization, stop it (VirtualBox, VMware, Xen)",
            // What was looked at when /dev/kvm was opened.
            libc::ENOTTY | libc::EINVAL | libc::ENODEV | libc::ENXIO | libc::EOPNOTSUPP => {
                ": it could do it a moment ago, or seemed to; if its module is being exchanged, try again"
            }
            _ => "",
        };
        format!("KVM refuses {what} ({}){remedy}", std::io::Error::from(error))
    }
}
