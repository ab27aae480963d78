//! Control messages of a device with several ports (virtio 1.3, 5.3.6.2).

use crate::buffers::Buffers;

/// Bytes of a message without what follows its header.
pub const LEN: usize = 8;

/// Events of the driver (the first and those with both names) and of the device.
const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FromDriver {
    /// It is ready to hear of ports (or has failed).
    DeviceReady(bool),
    /// It is ready for a port (or has failed with it).
    PortReady(u32, bool),
    /// Somebody in the guest has opened a port, or closed it.
    PortOpen(u32, bool),
}

impl FromDriver {
    /// Reads a message; `None` for what is none, is cut off or means nothing to a device.
    pub fn parse(buffers: &mut Buffers<'_>) -> Option<Self> {
        let [i0, i1, i2, i3, e0, e1, v0, v1] = buffers.read_array::<LEN>()?;
        let port = u32::from_le_bytes([i0, i1, i2, i3]);
        let value = u16::from_le_bytes([v0, v1]) != 0;
        match u16::from_le_bytes([e0, e1]) {
            DEVICE_READY => Some(Self::DeviceReady(value)),
            PORT_READY => Some(Self::PortReady(port, value)),
            PORT_OPEN => Some(Self::PortOpen(port, value)),
            _ => None,
        }
    }
}

/// What the device says, of a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromDevice {
    /// It is there.
    Add,
    /// It has this name.
    Name(String),
    /// Somebody on the host has opened it, or closed it.
    Open(bool),
}

impl FromDevice {
    /// The message's bytes.
    pub fn bytes(&self, port: u32) -> Vec<u8> {
        let (event, value, text): (_, u16, _) = match self {
            Self::Add => (DEVICE_ADD, 1, ""),
            Self::Name(name) => (PORT_NAME, 1, name.as_str()),
            Self::Open(open) => (PORT_OPEN, (*open).into(), ""),
        };
        let mut bytes = port.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(text.bytes());
        bytes
    }
}
