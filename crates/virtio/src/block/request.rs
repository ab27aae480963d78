//! One virtio-blk request (virtio 1.3, 5.2.6): its header, what it asks for, and the answer.
//!
//! [`parse`] turns a chain into a [`Request`], which whoever serves the queue carries out: by [`Request::run`], on a thread that may wait for the host, or by
//! giving the [`Work`] to the kernel and calling [`Request::answer`] when it is done.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

use disk::{Disk, SECTOR};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use crate::buffers::Buffers;
use crate::queue::Chain;

/// Most sectors of one DISCARD or WRITE_ZEROES segment: 1 GiB, so that none keeps a thread long where the host must write zeroes.
pub const MAX_ZERO_SECTORS: u32 = (1 << 30) / SECTOR as u32;
/// Most segments of one DISCARD or WRITE_ZEROES request.
pub const MAX_ZERO_SEGMENTS: u32 = 32;

/// What is written to the last byte of the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The request is wrong, or the host failed.
    IoError,
    /// Not a request this device knows, or not with these flags.
    Unsupported,
}

impl Status {
    fn byte(self) -> u8 {
        (match self {
            Self::Ok => VIRTIO_BLK_S_OK,
            Self::IoError => VIRTIO_BLK_S_IOERR,
            Self::Unsupported => VIRTIO_BLK_S_UNSUPP,
        }) as u8
    }
}

/// How requests are served.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    /// What GET_ID answers, at most 20 bytes.
    pub serial: &'a [u8],
    /// Are writes cached by the host until a flush? Read after each write, since the driver may change it meanwhile. If false, or
    /// without it (the driver knows no flushes), each write is made durable before it is answered.
    pub write_back: Option<&'a AtomicBool>,
}

impl Policy<'_> {
    /// Must a write be durable before it is answered?
    pub fn write_through(&self) -> bool {
        !self.write_back.is_some_and(|on| on.load(Ordering::SeqCst))
    }
}

/// What a request asks for, checked against the disk's size.
#[derive(Debug)]
pub enum Work<'m> {
    /// Fill the buffers from this byte on.
    Read(u64, Buffers<'m>),
    /// Write them at this byte.
    Write(u64, Buffers<'m>),
    /// Make all writes that were answered durable.
    Flush,
    /// Give up ranges of (offset, bytes).
    Discard(Vec<(u64, u64)>),
    /// Zero ranges of (offset, bytes, may their space be given back?).
    Zero(Vec<(u64, u64, bool)>),
    /// Nothing: this is the answer, after so many bytes for the driver.
    Done(u32, Status),
}

/// A request whose header was read.
#[derive(Debug)]
pub struct Request<'m> {
    status: Buffers<'m>,
    /// What there is to do.
    pub work: Work<'m>,
}

/// Reads the header of a request. `None` when it has no room for a status: nothing is done, and nothing written.
pub fn parse<'m>(disk: &Disk, policy: Policy<'_>, chain: &mut Chain<'m>) -> Option<Request<'m>> {
    let status = chain.writable.take_back(1)?;
    let work = match work(disk, policy, &mut chain.readable, &mut chain.writable) {
        Ok(work) => work,
        Err(status) => Work::Done(0, status),
    };
    Some(Request { status, work })
}

fn work<'m>(
    disk: &Disk,
    policy: Policy<'_>,
    readable: &mut Buffers<'m>,
    writable: &mut Buffers<'m>,
) -> Result<Work<'m>, Status> {
    let (Some(kind), Some(_reserved), Some(sector)) =
        (readable.read_array().map(u32::from_le_bytes), readable.read_array::<4>(), readable.read_array())
    else {
        return Err(Status::IoError);
    };
    let sector = u64::from_le_bytes(sector);
    let range = |bytes: u32| disk.range(sector, bytes.into()).ok_or(Status::IoError);
    match kind {
        VIRTIO_BLK_T_IN => Ok(Work::Read(range(writable.len())?, std::mem::take(writable))),
        VIRTIO_BLK_T_OUT if !disk.read_only() => Ok(Work::Write(range(readable.len())?, std::mem::take(readable))),
        VIRTIO_BLK_T_FLUSH => Ok(Work::Flush),
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (to, from) in id.iter_mut().zip(policy.serial) {
                *to = *from;
            }
            Ok(Work::Done(writable.write(&id) as u32, Status::Ok))
        }
        VIRTIO_BLK_T_DISCARD if !disk.read_only() => {
            let segments = segments(disk, readable, true)?;
            Ok(Work::Discard(segments.into_iter().map(|(offset, bytes, _)| (offset, bytes)).collect()))
        }
        VIRTIO_BLK_T_WRITE_ZEROES if !disk.read_only() => Ok(Work::Zero(segments(disk, readable, false)?)),
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => Err(Status::IoError),
        _ => Err(Status::Unsupported),
    }
}

/// DISCARD and WRITE_ZEROES: a list of segments of 16 bytes (5.2.6). All are checked before the first is carried out.
fn segments(disk: &Disk, readable: &mut Buffers<'_>, discard: bool) -> Result<Vec<(u64, u64, bool)>, Status> {
    let count = readable.len() / 16;
    if !readable.len().is_multiple_of(16) || count == 0 || count > MAX_ZERO_SEGMENTS {
        return Err(Status::IoError);
    }
    let mut segments = Vec::new();
    while let Some(segment) = readable.read_array::<16>() {
        let number = u128::from_le_bytes(segment);
        let (sector, sectors, flags) = (number as u64, (number >> 64) as u32, (number >> 96) as u32);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && flags != 0 {
            return Err(Status::Unsupported);
        }
        let bytes = u64::from(sectors) * SECTOR;
        let Some(offset) = disk.range(sector, bytes) else { return Err(Status::IoError) };
        if sectors > MAX_ZERO_SECTORS {
            return Err(Status::IoError);
        }
        segments.push((offset, bytes, flags != 0));
    }
    Ok(segments)
}

impl Request<'_> {
    /// Bytes of data that count against a limit.
    pub fn bytes(&self) -> u64 {
        match &self.work {
            Work::Read(_, buffers) | Work::Write(_, buffers) => buffers.len().into(),
            _ => 0,
        }
    }

    /// Carries it out. Returns the number of bytes written to the guest, status included.
    pub fn run(self, disk: &Disk, policy: Policy<'_>) -> u32 {
        let settle = || if policy.write_through() { disk.flush() } else { Ok(()) };
        let (what, written, result) = match &self.work {
            Work::Done(written, status) => {
                let (written, status) = (*written, *status);
                return self.answer(written, status);
            }
            Work::Read(offset, buffers) => {
                let (done, result) = disk.read(*offset, &buffers.slices());
                let done = u32::try_from(done).unwrap_or(u32::MAX).min(buffers.len());
                buffers.written(done);
                ("read", done, result)
            }
            Work::Write(offset, buffers) => {
                ("write", 0, disk.write(*offset, &buffers.slices()).and_then(|()| settle()))
            }
            Work::Flush => ("flush", 0, disk.flush()),
            Work::Discard(segments) => {
                let mut each = segments.iter().map(|(offset, bytes)| disk.discard(*offset, *bytes));
                ("discard", 0, each.find(Result::is_err).unwrap_or(Ok(())).and_then(|()| settle()))
            }
            Work::Zero(segments) => {
                let mut each = segments.iter().map(|(offset, bytes, unmap)| disk.write_zeroes(*offset, *bytes, *unmap));
                ("zero", 0, each.find(Result::is_err).unwrap_or(Ok(())).and_then(|()| settle()))
            }
        };
        self.finish(disk, what, written, &result)
    }

    /// Answers by how `what` went, after `written` bytes for the driver.
    pub fn finish(self, disk: &Disk, what: &'static str, written: u32, result: &io::Result<()>) -> u32 {
        match result {
            Ok(()) => self.answer(written, Status::Ok),
            Err(error) => {
                disk.report(what, error);
                self.answer(written, Status::IoError)
            }
        }
    }

    /// Writes the status. Returns the number of bytes written to the guest, status included.
    pub fn answer(mut self, written: u32, status: Status) -> u32 {
        self.status.write(&[status.byte()]);
        written.saturating_add(1)
    }
}

/// Serves one request from start to end. Returns the number of bytes written to the guest, status included; 0 when the request has no
/// room for a status.
pub fn serve(disk: &Disk, policy: Policy<'_>, chain: &mut Chain<'_>) -> u32 {
    parse(disk, policy, chain).map_or(0, |request| request.run(disk, policy))
}
