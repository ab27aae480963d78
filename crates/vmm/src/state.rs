//! A stopped VM in a file: memory, vCPUs, devices. What one engine saved every engine restores.
//!
//! ```text
//! magic (8 bytes)  version (4)  length of the body (4)  CRC-32 of the body (4)
//! body: [`Saved`], by postcard
//! pieces of RAM that are not all zero: guest-physical address (8), length (8), bytes; the last has length 0
//! ```
//!
//! Numbers are little-endian. The file is untrusted: sizes are bounded, the body is checked, and each device checks its own part.
//!
//! Time stands still meanwhile: the guest's TSC, kvmclock and the machine's clock go on from where they were, on the new host's TSC.

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, Write};

use cpu::CpuState;
use cpu::cpuid::CpuidModel;
use machine::PcState;
use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::error::Error;

const MAGIC: [u8; 8] = *b"TIGHTROP";
const VERSION: u32 = 3;
/// No machine's body is longer.
const MAX_BODY: u32 = 64 << 20;
/// RAM is written in pieces of this size where there is something in them.
const PIECE: usize = 64 << 10;
/// How far TSC rates may differ, in millionths: what measuring them is good to, and what Linux bears.
const TSC_TOLERANCE: u64 = 250;

/// All but RAM.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    /// Bytes of RAM.
    pub ram: u64,
    /// Rate of the TSC in kHz.
    pub tsc_khz: u64,
    /// The host's TSC when the VM was saved.
    pub host_tsc: u64,
    /// kvmclock's system time in nanoseconds.
    pub clock: u64,
    /// The CPU that the guest has found.
    pub model: CpuidModel,
    /// The vCPUs.
    pub cpus: Vec<CpuState>,
    /// The devices.
    pub machine: PcState,
}

impl Saved {
    /// Moves all that counts in the host's TSC from the old host's to a new one's, `now`.
    pub fn rebase(&mut self, now: u64) {
        let passed = now.wrapping_sub(self.host_tsc);
        for cpu in &mut self.cpus {
            cpu.tsc_offset = cpu.tsc_offset.wrapping_sub(passed);
        }
        for lapic in &mut self.machine.lapics {
            if lapic.tsc_deadline != 0 {
                lapic.tsc_deadline = lapic.tsc_deadline.wrapping_add(passed).max(1);
            }
        }
        self.host_tsc = now;
    }

    /// Does it fit a VM with so much RAM and so many vCPUs on a host with this TSC?
    pub fn check(&self, ram: u64, cpus: usize, tsc_khz: u64) -> Result<(), Error> {
        let refuse = |text: String| Err(Error::Input(format!("the saved VM does not fit: {text}")));
        if self.ram != ram {
            return refuse(format!("it has {} MiB of memory: give as much with --memory", self.ram >> 20));
        }
        if self.cpus.len() != cpus || self.machine.lapics.len() != cpus {
            return refuse(format!("it has {} vCPUs: give as many with --cpus", self.cpus.len()));
        }
        if self.tsc_khz.abs_diff(tsc_khz).saturating_mul(1_000_000) > tsc_khz.saturating_mul(TSC_TOLERANCE) {
            return refuse(format!("its TSC runs at {} kHz, this host's at {tsc_khz} kHz", self.tsc_khz));
        }
        Ok(())
    }
}

fn cannot(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    move |error| {
        let full = matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        let remedy = if full { ": make room for it" } else { "" };
        Error::Host(format!("the VM's state cannot be {what}: {error}{remedy}"))
    }
}

/// Writes a stopped VM.
pub(crate) fn write(file: &File, saved: &Saved, ram: &GuestRam) -> Result<(), Error> {
    let body = postcard::to_stdvec(saved).map_err(|error| Error::Host(format!("the VM's state: {error}")))?;
    // There may be the beginning of an earlier attempt, which failed.
    let mut at_start = file;
    at_start.rewind().map_err(cannot("written"))?;
    let _ = file.set_len(0);
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(cannot("written"));
    put(&MAGIC)?;
    put(&VERSION.to_le_bytes())?;
    put(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes())?;
    put(&crc(&body).to_le_bytes())?;
    put(&body)?;
    let mut piece = vec![0; PIECE];
    for (start, _, len) in ram.pieces() {
        let mut at = 0;
        while at < len {
            let size = (len - at).min(PIECE as u64);
            if ram.is_untouched(start + at, size) {
                at += size;
                continue;
            }
            let bytes = piece.get_mut(..size as usize).unwrap_or_default();
            if !ram.read(start + at, bytes) {
                return Err(Error::Host("the VM's memory cannot be read".into()));
            }
            if bytes.iter().any(|byte| *byte != 0) {
                put(&(start + at).to_le_bytes())?;
                put(&size.to_le_bytes())?;
                put(bytes)?;
            }
            at += size;
        }
    }
    put(&[0; 16])?;
    out.flush().map_err(cannot("written"))?;
    file.sync_all().map_err(cannot("written"))
}

/// The CPU of a saved VM, for which an engine is to be made. The file can be read from its start again.
pub(crate) fn model(mut file: &File) -> Result<CpuidModel, Error> {
    file.rewind().map_err(cannot("read"))?;
    let model = Reader::open(file)?.1.model;
    file.rewind().map_err(cannot("read"))?;
    Ok(model)
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// A file that is being read.
pub(crate) struct Reader<'a>(BufReader<&'a File>);

impl<'a> Reader<'a> {
    /// Reads all but RAM.
    pub fn open(file: &'a File) -> Result<(Self, Saved), Error> {
        let bad = |text: &str| Error::Input(format!("the saved VM cannot be restored: {text}"));
        let mut reader = Self(BufReader::with_capacity(1 << 20, file));
        if reader.array::<8>()? != MAGIC {
            return Err(bad("the file is none that Tightrope saved"));
        }
        let [version, len, sum] = [reader.array()?, reader.array()?, reader.array()?].map(u32::from_le_bytes);
        if version != VERSION {
            return Err(bad(&format!("its format has version {version}, this Tightrope knows {VERSION}")));
        }
        if len > MAX_BODY {
            return Err(bad("it is damaged"));
        }
        let mut body = vec![0; len as usize];
        reader.fill(&mut body)?;
        if crc(&body) != sum {
            return Err(bad("it is damaged"));
        }
        let saved = postcard::from_bytes(&body).map_err(|_| bad("it is damaged"))?;
        Ok((reader, saved))
    }

    /// Reads RAM, which is all zero, and ends.
    pub fn ram(mut self, ram: &GuestRam) -> Result<(), Error> {
        let bad = || Error::Input("the saved VM cannot be restored: its memory is damaged".into());
        let mut piece = vec![0; PIECE];
        loop {
            let (start, len) = (u64::from_le_bytes(self.array()?), u64::from_le_bytes(self.array()?));
            if len == 0 {
                return Ok(());
            }
            let bytes = usize::try_from(len).ok().and_then(|len| piece.get_mut(..len)).ok_or_else(bad)?;
            self.fill(bytes)?;
            if !ram.write(start, bytes) {
                return Err(bad());
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), Error> {
        self.0.read_exact(bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::Input("the saved VM cannot be restored: the file is too short".into())
            }
            _ => cannot("read")(error),
        })
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::SeekFrom;

    fn saved() -> Saved {
        let pc = machine::Pc::new(machine::PcConfig {
            ram: GuestRam::new(32 << 20).unwrap(),
            vcpus: 1,
            tsc_khz: 2_000_000,
            chips: None,
            serial_output: Box::new(std::io::sink()),
            pci_devices: Vec::new(),
            power: std::sync::Arc::new(|_| ()),
            watchdog: None,
        })
        .unwrap();
        let mut machine = pc.save().unwrap();
        machine.lapics[0].tsc_deadline = 500;
        let cpus = vec![CpuState { tsc_offset: 10, ..CpuState::default() }];
        let model = CpuidModel::new(1, 2_000_000);
        Saved { ram: 32 << 20, tsc_khz: 2_000_000, host_tsc: 1000, clock: 7, model, cpus, machine }
    }

    fn file(saved: &Saved, ram: &GuestRam) -> File {
        let mut file = tempfile::tempfile().unwrap();
        write(&file, saved, ram).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    #[test]
    fn there_and_back() {
        for ram in [GuestRam::new(32 << 20).unwrap(), GuestRam::shareable(32 << 20).unwrap()] {
            comes_back(&ram);
        }
    }

    fn comes_back(ram: &GuestRam) {
        assert!(ram.write(0x12345, b"memory") && ram.write((32 << 20) - 4, b"last"));
        let saved = saved();
        let file = file(&saved, ram);
        assert!(file.metadata().unwrap().len() < 200 << 10, "zeros are not written");
        let (reader, back) = Reader::open(&file).unwrap();
        assert_eq!((back.cpus, back.machine, &back.model), (saved.cpus, saved.machine, &saved.model));
        assert_eq!(model(&file).unwrap(), saved.model);
        assert_eq!(model(&file).unwrap(), saved.model, "it can be read again");
        let other = GuestRam::new(32 << 20).unwrap();
        reader.ram(&other).unwrap();
        let mut bytes = [0; 6];
        assert!(other.read(0x12345, &mut bytes));
        assert_eq!(&bytes, b"memory");
    }

    #[test]
    fn time_goes_on_where_it_stopped() {
        let mut saved = saved();
        saved.rebase(1_000_000);
        assert_eq!(saved.cpus[0].tsc_offset.wrapping_add(1_000_000), 1010, "the guest's TSC");
        assert_eq!(saved.machine.lapics[0].tsc_deadline, 1_000_000 - 500, "as far away as it was");
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let saved = saved();
        assert!(saved.check(32 << 20, 1, 2_000_400).is_ok());
        for (ram, cpus, khz, part) in
            [(64 << 20, 1, 2_000_000, "--memory"), (32 << 20, 2, 2_000_000, "--cpus"), (32 << 20, 1, 2_001_000, "kHz")]
        {
            assert!(saved.check(ram, cpus, khz).unwrap_err().to_string().contains(part));
        }
    }

    #[test]
    fn damage_is_seen() {
        let ram = GuestRam::new(32 << 20).unwrap();
        assert!(ram.write(0x1000, &[1; 100]));
        let mut whole = Vec::new();
        file(&saved(), &ram).read_to_end(&mut whole).unwrap();
        let try_bytes = |bytes: &[u8]| {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            file.seek(SeekFrom::Start(0)).unwrap();
            let (reader, _) = Reader::open(&file)?;
            reader.ram(&GuestRam::new(32 << 20).unwrap())
        };
        try_bytes(&whole).unwrap();
        for at in [0, 8, 13, 17, 40] {
            let mut damaged = whole.clone();
            damaged[at] ^= 0xff;
            assert!(try_bytes(&damaged).is_err(), "{at}");
        }
        for len in [0, 7, 19, 100, whole.len() - 1] {
            assert!(try_bytes(&whole[..len]).is_err(), "{len}");
        }
        // A piece of RAM that is none.
        let end = whole.len() - 16;
        let mut damaged = whole[..end].to_vec();
        damaged.extend((1_u64 << 50).to_le_bytes());
        damaged.extend(4_u64.to_le_bytes());
        damaged.extend([1; 20]);
        assert!(try_bytes(&damaged).is_err());
    }

    /// A file whose body was changed and whose checksum fits: what is read is checked by each part, and nothing panics.
    fn try_body(body: &[u8]) {
        let mut file = tempfile::tempfile().unwrap();
        for bytes in [&MAGIC[..], &VERSION.to_le_bytes(), &(body.len() as u32).to_le_bytes(), &crc(body).to_le_bytes()]
        {
            file.write_all(bytes).unwrap();
        }
        file.write_all(body).unwrap();
        file.write_all(&[0; 16]).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let Ok((reader, mut saved)) = Reader::open(&file) else { return };
        let ram = GuestRam::new(32 << 20).unwrap();
        let _ = reader.ram(&ram);
        saved.rebase(5_000_000);
        if saved.check(ram.size(), 1, 2_000_000).is_err() {
            return;
        }
        let config = machine::PcConfig {
            ram: ram.clone(),
            vcpus: 1,
            tsc_khz: 2_000_000,
            chips: None,
            serial_output: Box::new(std::io::sink()),
            pci_devices: Vec::new(),
            power: std::sync::Arc::new(|_| ()),
            watchdog: None,
        };
        let pc = machine::Pc::new(config).unwrap();
        let _ = pc.restore(&saved.machine);
        // A vCPU takes any registers; what they make of the guest is the guest's.
        let engine = interp::InterpEngine::new(ram, 1);
        let mut vcpu = cpu::Engine::create_vcpu(&engine, cpu::Nothing::setup()).unwrap();
        vcpu.set_state(&saved.cpus[0]);
        for _ in 0..3 {
            let _ = vcpu.step();
        }
    }

    #[test]
    fn hostile_bodies() {
        let body = postcard::to_stdvec(&saved()).unwrap();
        try_body(&body);
        // The same numbers in every run.
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        for round in 0..400 {
            let mut bad = body.clone();
            for _ in 0..1 + round % 4 {
                let at = next() as usize % bad.len();
                match next() % 5 {
                    0 => bad[at] ^= 1 << (next() % 8),
                    1 => bad[at] = [0, 1, 0x7f, 0x80, 0xff][next() as usize % 5],
                    2 => bad.truncate(at.max(1)),
                    3 => bad.insert(at, next() as u8),
                    _ => drop(bad.remove(at)),
                }
            }
            try_body(&bad);
        }
        for len in [0, 1, 100] {
            try_body(&(0..len).map(|_| next() as u8).collect::<Vec<_>>());
        }
    }
}
