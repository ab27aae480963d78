//! The console's log: the last mebibyte of what the guest wrote, in a file of fixed size that needs no system call but `pwrite`.
//!
//! The first 16 bytes are a mark and the number of bytes ever written; the byte number n is at 16 + n modulo [`CAPACITY`].

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Bytes kept.
pub const CAPACITY: u64 = 1 << 20;
const HEADER: u64 = 16;
const MARK: &[u8; 8] = b"TRconsol";

/// Writes a log.
#[derive(Debug)]
pub struct Writer {
    file: File,
    total: u64,
}

impl Writer {
    /// To an empty file.
    pub fn new(file: File) -> Self {
        Self { file, total: 0 }
    }
}

impl io::Write for Writer {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let at = self.total % CAPACITY;
        let piece = bytes.get(..bytes.len().min((CAPACITY - at) as usize)).unwrap_or_default();
        self.file.write_all_at(piece, HEADER + at)?;
        self.total += piece.len() as u64;
        let mut header = [0; HEADER as usize];
        let fields = MARK.iter().copied().chain(self.total.to_le_bytes());
        header.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        self.file.write_all_at(&header, 0)?;
        Ok(piece.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads a log, also while it is written.
#[derive(Debug)]
pub struct Reader {
    file: File,
    at: u64,
}

impl Reader {
    /// From the oldest byte that there is.
    pub fn new(file: File) -> Self {
        Self { file, at: 0 }
    }

    fn total(&self) -> io::Result<u64> {
        let mut header = [0; HEADER as usize];
        match self.file.read_exact_at(&mut header, 0) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
            Err(error) => return Err(error),
        }
        match header.split_first_chunk::<8>() {
            Some((MARK, rest)) => Ok(u64::from_le_bytes(rest.try_into().unwrap_or_default())),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "this is no console log")),
        }
    }

    /// What was written since the last call, or is left of it.
    ///
    /// # Errors
    /// The file cannot be read, or is no log.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        let total = self.total()?;
        let start = self.at.max(total.saturating_sub(CAPACITY)).min(total);
        let mut bytes = vec![0; (total - start) as usize];
        let place = start % CAPACITY;
        let first = bytes.len().min((CAPACITY - place) as usize);
        let (head, tail) = bytes.split_at_mut(first);
        self.file.read_exact_at(head, HEADER + place)?;
        self.file.read_exact_at(tail, HEADER)?;
        // What was written meanwhile may be in place of the oldest.
        let lost = self.total()?.saturating_sub(CAPACITY).saturating_sub(start).min(bytes.len() as u64);
        bytes.drain(..lost as usize);
        self.at = total;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn the_last_bytes_are_kept() {
        let file = tempfile::tempfile().unwrap();
        let mut reader = Reader::new(file.try_clone().unwrap());
        assert_eq!(reader.read().unwrap(), b"");
        let mut writer = Writer::new(file.try_clone().unwrap());
        writer.write_all(b"hello").unwrap();
        assert_eq!(reader.read().unwrap(), b"hello");
        assert_eq!(reader.read().unwrap(), b"");
        let all: Vec<u8> = (0..CAPACITY * 5 / 2).map(|at| (at % 251) as u8).collect();
        writer.write_all(&all).unwrap();
        writer.write_all(b"end").unwrap();
        let kept = [&all[..], b"end"].concat();
        let kept = &kept[kept.len() - CAPACITY as usize..];
        assert!(reader.read().unwrap() == kept && Reader::new(file.try_clone().unwrap()).read().unwrap() == kept);
        assert_eq!(file.metadata().unwrap().len(), HEADER + CAPACITY);
        let other = tempfile::tempfile().unwrap();
        (&other).write_all(&[7; 100]).unwrap();
        assert!(Reader::new(other).read().is_err());
    }
}
