//! PCI Express: the host bridge, configuration space, BARs and MSI-X (PCI Local Bus 3.0, PCI Express Base 6.0 section 7).
//!
//! To write a device, implement [`PciDevice`]: keep a [`PciConfig`] built in the constructor (identity, BARs with
//! [`PciConfig::add_bar`], capabilities with [`PciConfig::add_capability`], MSI-X with [`PciConfig::add_msix`]), answer BAR accesses,
//! and raise interrupts with [`Msix::trigger`] or, as long as the guest has not enabled MSI-X, [`PciConfig::set_intx`].
//! The constructor needs nothing of the PC: [`PciHost::add`] gives the device its slot, its BAR addresses, its interrupt
//! wire and its way to send messages.
//!
//! All devices are single-function endpoints of bus 0 in the root complex; there are no bridges below and no I/O BARs.

mod config;
mod host;
mod msix;

pub use config::{BarKind, BarMapping, ConfigError, PciConfig, PciConfigState, PciIdentity, capability};
pub use host::{PciAddError, PciDeviceState, PciHost, PciHostState, SLOTS};
pub use msix::{Msix, MsixState};

use crate::state::StateError;

/// A PCI endpoint, function 0 of its slot.
///
/// Methods are called on vCPU threads, several at once: a device locks inside. No lock of the host bridge or the bus is held.
pub trait PciDevice: Send + Sync {
    /// Name for `--stats`, `--trace` and the saved state; unique in the VM, for instance `virtio-blk0`.
    fn name(&self) -> &str;

    /// Its configuration space.
    fn config(&self) -> &PciConfig;

    /// The guest reads configuration space at `offset` (0 to 255, 1, 2 or 4 bytes, not crossing a dword). To be overridden where a read
    /// has an effect, such as virtio's configuration access capability.
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.config().read(offset, data);
    }

    /// The guest writes configuration space; as for reads. An override passes on to `self.config().write()`. The host
    /// bridge moves BARs on the bus afterwards.
    fn config_write(&self, offset: u16, data: &[u8]) {
        self.config().write(offset, data);
    }

    /// The guest reads `data.len()` (1 to 8) bytes at `offset` into BAR number `bar` (a 64-bit BAR has the number of its low half). The
    /// MSI-X table and pending-bit array are answered by the host bridge and do not come here.
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]);

    /// The guest writes; as for reads.
    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]);

    /// BAR number `bar` answers at the guest-physical address `base` from now on; `None`: nowhere.
    fn bar_mapped(&self, bar: u8, base: Option<u64>) {
        let _ = (bar, base);
    }

    /// Back to the state after power-on: the VM reboots. [`PciConfig`] is reset by the host bridge.
    fn reset(&self);

    /// What the device needs to go on elsewhere, beyond its configuration space and MSI-X table (the host bridge saves these): a serialised
    /// state type of its own. Called while no vCPU runs.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Takes over a state from [`PciDevice::save`]; the bytes are untrusted.
    ///
    /// # Errors
    /// The state is damaged or of a device built otherwise; the device is then unchanged.
    fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        if state.is_empty() { Ok(()) } else { Err(StateError::new(self.name(), "it keeps no state of its own")) }
    }
}
