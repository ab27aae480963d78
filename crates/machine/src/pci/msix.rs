//! MSI-X: the vector table, the pending bits and the message control word (PCI Local Bus 3.0, section 6.8.2).

use std::fmt;
use std::sync::{Arc, Mutex, OnceLock};

use cpu::chips::MessageLine;
use serde::{Deserialize, Serialize};

use crate::bus::{set_value, value};
use crate::irq::MsiSink;
use crate::state::{StateError, lock};

/// Bit of the message control word: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Bit of the message control word: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Bytes of one table entry.
pub(super) const ENTRY_SIZE: u64 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

const RESET_VECTOR: Vector = Vector { address: 0, data: 0, masked: true, pending: false };

#[derive(Debug)]
struct Inner {
    control: u16,
    bus_master: bool,
    vectors: Box<[Vector]>,
}

/// Saved state of [`Msix`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    control: u16,
    vectors: Vec<Vector>,
}

/// The MSI-X function of one device. Shared between the device, which triggers vectors, and its configuration space.
pub struct Msix {
    inner: Mutex<Inner>,
    sink: OnceLock<Arc<dyn MsiSink>>,
    /// By vector, where the sink has shorter ways; empty where it has none.
    lines: OnceLock<Vec<Box<dyn MessageLine>>>,
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix").field("inner", &*lock(&self.inner)).finish_non_exhaustive()
    }
}

impl Msix {
    /// A table of `vectors` entries, at least 1 and at most 2048 (other numbers are moved to the nearest of these).
    pub fn new(vectors: u16) -> Self {
        let vectors = vec![RESET_VECTOR; vectors.clamp(1, 2048).into()].into_boxed_slice();
        Self {
            inner: Mutex::new(Inner { control: 0, bus_master: false, vectors }),
            sink: OnceLock::new(),
            lines: OnceLock::new(),
        }
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        lock(&self.inner).vectors.len() as u16
    }

    /// Has the guest turned MSI-X on? If not, the device uses its interrupt wire.
    pub fn enabled(&self) -> bool {
        lock(&self.inner).control & ENABLE != 0
    }

    /// Raises vector number `vector`: sends its message, or marks it pending while it is masked. Nothing happens for a number out of
    /// range (such as virtio's 0xffff) or while MSI-X is off; `false` then.
    pub fn trigger(&self, vector: u16) -> bool {
        let mut inner = lock(&self.inner);
        if inner.control & ENABLE == 0 {
            return false;
        }
        let Some(entry) = inner.vectors.get_mut(usize::from(vector)) else { return false };
        entry.pending = true;
        self.flush(inner);
        true
    }

    /// Bytes of the table.
    pub(super) fn table_len(&self) -> u64 {
        u64::from(self.vectors()) * ENTRY_SIZE
    }

    /// Bytes of the pending-bit array.
    pub(super) fn pba_len(&self) -> u64 {
        u64::from(self.vectors()).div_ceil(64) * 8
    }

    pub(super) fn connect(&self, sink: Arc<dyn MsiSink>) {
        let _ = self.lines.set((0..self.vectors()).map_while(|_| sink.line()).collect());
        let _ = self.sink.set(sink);
    }

    pub(super) fn set_control(&self, control: u16) {
        let mut inner = lock(&self.inner);
        inner.control = control & (ENABLE | FUNCTION_MASK);
        self.flush(inner);
    }

    /// A message is a memory write of the device: it may only be sent while the device is a bus master.
    pub(super) fn set_bus_master(&self, on: bool) {
        let mut inner = lock(&self.inner);
        inner.bus_master = on;
        self.flush(inner);
    }

    /// Sends what is pending and not masked.
    fn flush(&self, mut inner: std::sync::MutexGuard<'_, Inner>) {
        if inner.control & (ENABLE | FUNCTION_MASK) != ENABLE || !inner.bus_master {
            return;
        }
        let Some(sink) = self.sink.get() else { return };
        let lines = self.lines.get().map_or(&[][..], Vec::as_slice);
        for (index, entry) in inner.vectors.iter_mut().enumerate().filter(|(_, entry)| entry.pending && !entry.masked) {
            entry.pending = false;
            match lines.get(index) {
                Some(line) => line.send(entry.address, entry.data),
                None => sink.send(entry.address, entry.data),
            }
        }
    }

    /// `offset` is in bytes from the start of the table; the access lies within one entry's 8-byte half.
    pub(super) fn table_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.inner);
        let Some(entry) = inner.vectors.get((offset / ENTRY_SIZE) as usize) else { return data.fill(0) };
        let mut bytes = [0; ENTRY_SIZE as usize];
        bytes[..8].copy_from_slice(&entry.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.data.to_le_bytes());
        bytes[12] = entry.masked.into();
        let at = (offset % ENTRY_SIZE) as usize;
        match bytes.get(at..at + data.len()) {
            Some(part) => data.copy_from_slice(part),
            None => data.fill(0),
        }
    }

    /// Only aligned dwords and quadwords are defined (6.8.2); other writes are dropped.
    pub(super) fn table_write(&self, offset: u64, data: &[u8]) {
        let at = offset % ENTRY_SIZE;
        if !matches!(data.len(), 4 | 8) || !at.is_multiple_of(data.len() as u64) {
            return;
        }
        let mut inner = lock(&self.inner);
        let Some(entry) = inner.vectors.get_mut((offset / ENTRY_SIZE) as usize) else { return };
        for (index, dword) in data.chunks_exact(4).enumerate() {
            let dword = value(dword) as u32;
            match at / 4 + index as u64 {
                0 => entry.address = entry.address & !0xffff_ffff | u64::from(dword & !3),
                1 => entry.address = entry.address & 0xffff_ffff | u64::from(dword) << 32,
                2 => entry.data = dword,
                _ => entry.masked = dword & 1 != 0,
            }
        }
        self.flush(inner);
    }

    pub(super) fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let inner = lock(&self.inner);
        let base = (offset / 8 * 64) as usize;
        let bits = (0..64).filter(|bit| inner.vectors.get(base + bit).is_some_and(|v| v.pending));
        let word = bits.fold(0_u64, |word, bit| word | 1 << bit);
        set_value(data, word >> (offset % 8 * 8));
    }

    pub(super) fn reset(&self) {
        let mut inner = lock(&self.inner);
        inner.control = 0;
        inner.bus_master = false;
        inner.vectors.fill(RESET_VECTOR);
    }

    pub(super) fn save(&self) -> MsixState {
        let inner = lock(&self.inner);
        MsixState { control: inner.control, vectors: inner.vectors.to_vec() }
    }

    pub(super) fn check(&self, state: &MsixState) -> Result<(), StateError> {
        if state.vectors.len() == usize::from(self.vectors()) && state.control & !(ENABLE | FUNCTION_MASK) == 0 {
            Ok(())
        } else {
            Err(StateError::new("MSI-X", format!("{} vectors", state.vectors.len())))
        }
    }

    /// The state has passed [`Msix::check`]. Bus mastering follows from the command register.
    pub(super) fn restore(&self, state: &MsixState, bus_master: bool) {
        let mut inner = lock(&self.inner);
        inner.control = state.control;
        inner.bus_master = bus_master;
        inner.vectors.copy_from_slice(&state.vectors);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::testing::Recorder;

    fn msix() -> (Msix, Arc<Recorder>) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(3);
        msix.connect(recorder.clone());
        msix.set_bus_master(true);
        (msix, recorder)
    }

    fn sent(recorder: &Recorder) -> Vec<(u64, u32)> {
        std::mem::take(&mut recorder.messages.lock().unwrap())
    }

    #[test]
    fn masked_vectors_wait() {
        let (msix, recorder) = msix();
        assert!(!msix.trigger(1), "off");
        msix.table_write(16, &0xfee0_1000_u32.to_le_bytes());
        msix.table_write(24, &0x4041_u32.to_le_bytes());
        msix.set_control(ENABLE);
        assert!(msix.trigger(1));
        assert!(sent(&recorder).is_empty(), "masked since reset");
        let mut pba = [0; 8];
        msix.pba_read(0, &mut pba);
        assert_eq!(pba[0], 2);
        msix.table_write(28, &0_u32.to_le_bytes());
        assert_eq!(sent(&recorder), [(0xfee0_1000, 0x4041)]);
        msix.pba_read(0, &mut pba);
        assert_eq!(pba, [0; 8]);
        msix.set_control(ENABLE | FUNCTION_MASK);
        assert!(msix.trigger(1));
        assert!(msix.trigger(1));
        assert!(sent(&recorder).is_empty());
        msix.set_control(ENABLE);
        assert_eq!(sent(&recorder).len(), 1, "pending is one bit");
        assert!(!msix.trigger(3) && !msix.trigger(0xffff));
    }

    #[test]
    fn table_reads_back() {
        let (msix, _) = msix();
        msix.table_write(0, &0xaabb_ccdd_0000_1004_u64.to_le_bytes());
        let mut data = [0; 8];
        msix.table_read(0, &mut data);
        assert_eq!(value(&data), 0xaabb_ccdd_0000_1004);
        let mut data = [0; 4];
        msix.table_read(12, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
        msix.table_read(1 << 40, &mut data);
        assert_eq!(data, [0; 4]);
        msix.table_write(2, &[1, 2, 3, 4]);
        msix.table_write(1 << 40, &[1, 2, 3, 4]);
    }

    #[test]
    fn state() {
        let (msix, recorder) = msix();
        msix.set_control(ENABLE);
        msix.trigger(2);
        let state = msix.save();
        let other = Msix::new(3);
        other.connect(recorder.clone());
        other.check(&state).unwrap();
        other.restore(&state, true);
        assert_eq!(other.save(), state);
        other.table_write(2 * 16 + 12, &[0; 4]);
        assert_eq!(sent(&recorder).len(), 1);
        assert!(Msix::new(4).check(&state).is_err());
    }
}
