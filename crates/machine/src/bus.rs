//! Port I/O and MMIO dispatch.
//!
//! [`IoBus`] keeps two interval maps, ports and guest-physical addresses, from ranges to devices, and implements [`cpu::Bus`].
//! No lock is held while a device works, so a device may register and remove ranges from within an access (a guest moving a PCI BAR
//! does that). Accesses are counted by range name for `--stats`, and can be traced.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use crate::state::lock;

/// A device behind I/O ports.
pub trait PioDevice: Send + Sync {
    /// IN from `offset` ports above the start of the registered range: fills `data` (1, 2 or 4 bytes).
    fn pio_read(&self, offset: u16, data: &mut [u8]);
    /// OUT.
    fn pio_write(&self, offset: u16, data: &[u8]);
}

/// A device behind guest-physical addresses.
pub trait MmioDevice: Send + Sync {
    /// A read of 1 to 8 bytes, `offset` bytes above the start of the registered range.
    fn mmio_read(&self, offset: u64, data: &mut [u8]);
    /// A write of 1 to 8 bytes.
    fn mmio_write(&self, offset: u64, data: &[u8]);
}

/// Which of the two address spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Space {
    /// I/O ports.
    Pio,
    /// Guest-physical addresses.
    Mmio,
}

/// One access, for the trace.
#[derive(Clone, Copy, Debug)]
pub struct Access<'a> {
    /// Ports or memory.
    pub space: Space,
    /// Read or write?
    pub write: bool,
    /// Port or guest-physical address.
    pub address: u64,
    /// The bytes written, or the bytes the read gave; little-endian.
    pub data: &'a [u8],
    /// The name of the range, `None` where nobody is.
    pub device: Option<&'a str>,
}

/// Why a range cannot be registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The range is empty or runs over the end of the address space.
    #[error("{name}: {len:#x} bytes at {start:#x} is no range")]
    Range {
        /// Whose range.
        name: String,
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Something else is there already.
    #[error("{name}: {start:#x} overlaps {other}")]
    Overlap {
        /// Whose range.
        name: String,
        /// First address.
        start: u64,
        /// Who is there.
        other: String,
    },
}

/// Callback of [`IoBus::set_trace`].
pub type Trace = Box<dyn Fn(&Access<'_>) + Send + Sync>;

#[derive(Debug, Default)]
struct Counter {
    reads: AtomicU64,
    writes: AtomicU64,
}

struct Entry<D: ?Sized> {
    start: u64,
    len: u64,
    name: String,
    counter: Arc<Counter>,
    device: Arc<D>,
}

type Map<D> = RwLock<BTreeMap<u64, Arc<Entry<D>>>>;

fn insert<D: ?Sized>(map: &Map<D>, entry: Entry<D>, limit: u64) -> Result<(), BusError> {
    let (name, start, len) = (entry.name.clone(), entry.start, entry.len);
    let last = len.checked_sub(1).and_then(|l| start.checked_add(l)).filter(|last| *last <= limit);
    let Some(last) = last else { return Err(BusError::Range { name, start, len }) };
    let mut map = map.write().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, other)) = map.range(..=last).next_back()
        && other.start.saturating_add(other.len - 1) >= start
    {
        return Err(BusError::Overlap { name, start, other: other.name.clone() });
    }
    map.insert(start, Arc::new(entry));
    Ok(())
}

fn find<D: ?Sized>(map: &Map<D>, address: u64, len: usize) -> Option<Arc<Entry<D>>> {
    let map = map.read().unwrap_or_else(PoisonError::into_inner);
    let (_, entry) = map.range(..=address).next_back()?;
    let offset = address - entry.start;
    (offset.checked_add(len as u64)? <= entry.len).then(|| entry.clone())
}

/// The bus: who answers at which port and which address.
#[derive(Default)]
pub struct IoBus {
    pio: Map<dyn PioDevice>,
    mmio: Map<dyn MmioDevice>,
    counters: Mutex<BTreeMap<String, Arc<Counter>>>,
    nobody: [Counter; 2],
    trace: OnceLock<Trace>,
    /// Nanoseconds that vCPUs spent in devices.
    time: AtomicU64,
}

impl fmt::Debug for IoBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoBus").finish_non_exhaustive()
    }
}

impl IoBus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    fn counter(&self, name: &str) -> Arc<Counter> {
        lock(&self.counters).entry(name.to_owned()).or_default().clone()
    }

    /// Puts `device` at ports `start..start + len`. Ranges of the same `name` share one counter.
    ///
    /// # Errors
    /// The range is impossible or taken.
    pub fn add_pio(&self, name: &str, start: u16, len: u16, device: Arc<dyn PioDevice>) -> Result<(), BusError> {
        let entry =
            Entry { start: start.into(), len: len.into(), name: name.to_owned(), counter: self.counter(name), device };
        insert(&self.pio, entry, u16::MAX.into())
    }

    /// Puts `device` at guest-physical `start..start + len`. May be called while vCPUs run, also from within a device access.
    ///
    /// # Errors
    /// The range is impossible or taken.
    pub fn add_mmio(&self, name: &str, start: u64, len: u64, device: Arc<dyn MmioDevice>) -> Result<(), BusError> {
        let entry = Entry { start, len, name: name.to_owned(), counter: self.counter(name), device };
        insert(&self.mmio, entry, u64::MAX)
    }

    /// Removes the port range that starts at `start`, if `device` is there.
    pub fn remove_pio(&self, start: u16, device: &Arc<dyn PioDevice>) -> bool {
        let mut map = self.pio.write().unwrap_or_else(PoisonError::into_inner);
        let there = map.get(&start.into()).is_some_and(|entry| Arc::ptr_eq(&entry.device, device));
        there && map.remove(&start.into()).is_some()
    }

    /// Removes the MMIO range that starts at `start`, if `device` is there. Accesses under way on other vCPUs may still reach the
    /// device for a moment, as on real buses.
    pub fn remove_mmio(&self, start: u64, device: &Arc<dyn MmioDevice>) -> bool {
        let mut map = self.mmio.write().unwrap_or_else(PoisonError::into_inner);
        let there = map.get(&start).is_some_and(|entry| Arc::ptr_eq(&entry.device, device));
        there && map.remove(&start).is_some()
    }

    /// Sets who is told of every access; only the first call has an effect.
    pub fn set_trace(&self, trace: Trace) {
        let _ = self.trace.set(trace);
    }

    /// Accesses by name as `(name, reads, writes)`, in order of names; `(no device)` counts those that met nobody.
    pub fn counters(&self) -> Vec<(String, u64, u64)> {
        let load = |c: &Counter| (c.reads.load(Ordering::Relaxed), c.writes.load(Ordering::Relaxed));
        let mut all: Vec<_> = lock(&self.counters)
            .iter()
            .map(|(name, counter)| {
                let (reads, writes) = load(counter);
                (name.clone(), reads, writes)
            })
            .collect();
        for (counter, name) in self.nobody.iter().zip(["(no device, ports)", "(no device, memory)"]) {
            let (reads, writes) = load(counter);
            all.push((name.to_owned(), reads, writes));
        }
        all
    }

    /// How long vCPUs have been in devices, over all of them.
    pub fn time(&self) -> Duration {
        Duration::from_nanos(self.time.load(Ordering::Relaxed))
    }

    fn timed(&self, work: impl FnOnce()) {
        let start = Instant::now();
        work();
        self.time.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }

    #[inline]
    fn note(&self, counter: &Counter, device: Option<&str>, space: Space, write: bool, address: u64, data: &[u8]) {
        let count = if write { &counter.writes } else { &counter.reads };
        count.fetch_add(1, Ordering::Relaxed);
        if let Some(trace) = self.trace.get() {
            trace(&Access { space, write, address, data, device });
        }
    }
}

impl cpu::Bus for IoBus {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(entry) = find(&self.pio, port.into(), data.len()) {
            self.timed(|| entry.device.pio_read((u64::from(port) - entry.start) as u16, data));
            self.note(&entry.counter, Some(&entry.name), Space::Pio, false, port.into(), data);
        } else if data.len() > 1 {
            // No device takes the access whole: the bus splits it into bytes, as a PC's chipset does.
            for (index, byte) in data.iter_mut().enumerate() {
                self.pio_read(port.wrapping_add(index as u16), std::slice::from_mut(byte));
            }
        } else {
            self.note(&self.nobody[0], None, Space::Pio, false, port.into(), data);
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) {
        if let Some(entry) = find(&self.pio, port.into(), data.len()) {
            self.note(&entry.counter, Some(&entry.name), Space::Pio, true, port.into(), data);
            self.timed(|| entry.device.pio_write((u64::from(port) - entry.start) as u16, data));
        } else if data.len() > 1 {
            for (index, byte) in data.iter().enumerate() {
                self.pio_write(port.wrapping_add(index as u16), std::slice::from_ref(byte));
            }
        } else {
            self.note(&self.nobody[0], None, Space::Pio, true, port.into(), data);
        }
    }

    fn mmio_read(&self, gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(entry) = find(&self.mmio, gpa, data.len()) {
            self.timed(|| entry.device.mmio_read(gpa - entry.start, data));
            self.note(&entry.counter, Some(&entry.name), Space::Mmio, false, gpa, data);
        } else {
            self.note(&self.nobody[1], None, Space::Mmio, false, gpa, data);
        }
    }

    fn mmio_write(&self, gpa: u64, data: &[u8]) {
        if let Some(entry) = find(&self.mmio, gpa, data.len()) {
            self.note(&entry.counter, Some(&entry.name), Space::Mmio, true, gpa, data);
            self.timed(|| entry.device.mmio_write(gpa - entry.start, data));
        } else {
            self.note(&self.nobody[1], None, Space::Mmio, true, gpa, data);
        }
    }
}

/// Reads a little-endian number of up to 8 bytes; longer slices count only by their first 8.
pub fn value(data: &[u8]) -> u64 {
    data.iter().take(8).rev().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Stores the low bytes of `value` little-endian into `data`; bytes past the eighth become zero.
pub fn set_value(data: &mut [u8], value: u64) {
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = if index < 8 { (value >> (8 * index)) as u8 } else { 0 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpu::Bus;

    struct Cell(Mutex<Vec<(u64, u64)>>);

    impl MmioDevice for Cell {
        fn mmio_read(&self, offset: u64, data: &mut [u8]) {
            set_value(data, offset);
        }
        fn mmio_write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, value(data)));
        }
    }

    impl PioDevice for Cell {
        fn pio_read(&self, offset: u16, data: &mut [u8]) {
            set_value(data, offset.into());
        }
        fn pio_write(&self, offset: u16, data: &[u8]) {
            self.0.lock().unwrap().push((offset.into(), value(data)));
        }
    }

    fn cell() -> Arc<Cell> {
        Arc::new(Cell(Mutex::new(Vec::new())))
    }

    #[test]
    fn ranges() {
        let bus = IoBus::new();
        let device = cell();
        bus.add_mmio("a", 0x1000, 0x100, device.clone()).unwrap();
        assert!(matches!(bus.add_mmio("b", 0xff8, 0x10, device.clone()), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.add_mmio("b", 0x10ff, 1, device.clone()), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.add_mmio("b", 0xf00, 0x1000, device.clone()), Err(BusError::Overlap { .. })));
        assert!(matches!(bus.add_mmio("b", 0, 0, device.clone()), Err(BusError::Range { .. })));
        assert!(matches!(bus.add_mmio("b", u64::MAX, 2, device.clone()), Err(BusError::Range { .. })));
        assert!(matches!(bus.add_pio("b", 0xffff, 2, device.clone()), Err(BusError::Range { .. })));
        bus.add_mmio("b", 0x1100, 0x100, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.mmio_read(0x1010, &mut data);
        assert_eq!(value(&data), 0x10);
        bus.mmio_read(0x0ffc, &mut data);
        assert_eq!(value(&data), 0xffff_ffff);
        bus.mmio_write(0x1104, &[1, 2]);
        assert_eq!(*device.0.lock().unwrap(), [(4, 0x201)]);
        let as_mmio: Arc<dyn MmioDevice> = device.clone();
        assert!(!bus.remove_mmio(0x1000, &(cell() as Arc<dyn MmioDevice>)));
        assert!(bus.remove_mmio(0x1000, &as_mmio));
        bus.mmio_read(0x1010, &mut data);
        assert_eq!(value(&data), 0xffff_ffff);
        let counters = bus.counters();
        assert!(counters.contains(&("a".into(), 1, 0)) && counters.contains(&("b".into(), 0, 1)));
        assert!(counters.contains(&("(no device, memory)".into(), 2, 0)));
    }

    #[test]
    fn wide_port_access_is_split_where_no_device_takes_it_whole() {
        let bus = IoBus::new();
        let device = cell();
        bus.add_pio("c", 0x70, 2, device.clone()).unwrap();
        let mut data = [0; 4];
        bus.pio_read(0x71, &mut data);
        assert_eq!(data, [1, 0xff, 0xff, 0xff]);
        bus.pio_write(0x70, &[5, 6]);
        assert_eq!(*device.0.lock().unwrap(), [(0, 0x605)]);
    }

    #[test]
    fn device_may_change_the_bus_during_an_access() {
        struct Mover(Arc<IoBus>);
        impl MmioDevice for Mover {
            fn mmio_read(&self, _: u64, _: &mut [u8]) {}
            fn mmio_write(&self, _: u64, _: &[u8]) {
                self.0.add_mmio("new", 0x2000, 8, cell()).unwrap();
            }
        }
        let bus = Arc::new(IoBus::new());
        bus.add_mmio("mover", 0x1000, 8, Arc::new(Mover(bus.clone()))).unwrap();
        bus.mmio_write(0x1000, &[0]);
        let mut data = [0; 1];
        bus.mmio_read(0x2003, &mut data);
        assert_eq!(data, [3]);
    }

    #[test]
    fn trace_sees_values() {
        let bus = IoBus::new();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let copy = seen.clone();
        bus.set_trace(Box::new(move |access| {
            copy.lock().unwrap().push((
                access.write,
                access.address,
                value(access.data),
                access.device.map(str::to_owned),
            ));
        }));
        bus.add_pio("c", 0x70, 2, cell()).unwrap();
        bus.pio_read(0x71, &mut [0]);
        bus.pio_write(0x99, &[7]);
        assert_eq!(*seen.lock().unwrap(), [(false, 0x71, 1, Some("c".into())), (true, 0x99, 7, None)]);
    }
}
