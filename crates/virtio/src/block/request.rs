//! One virtio-blk request (virtio 1.3, 5.2.6): its header, what it asks for, and the answer.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::disk::{Disk, SECTOR};
use crate::buffers::Buffers;
use crate::queue::Chain;

/// Most sectors of one DISCARD or WRITE_ZEROES segment: 1 GiB, so that none keeps the worker long where the host must write zeroes.
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

/// Serves one request. Returns the number of bytes written to the guest, status included; 0 when the request has no room for a status.
pub fn serve(disk: &Disk, policy: Policy<'_>, chain: &mut Chain<'_>) -> u32 {
    let Some(mut status_byte) = chain.writable.take_back(1) else { return 0 };
    let (written, status) = execute(disk, policy, &mut chain.readable, &mut chain.writable);
    status_byte.write(&[status.byte()]);
    written.saturating_add(1)
}

fn execute(disk: &Disk, policy: Policy<'_>, readable: &mut Buffers<'_>, writable: &mut Buffers<'_>) -> (u32, Status) {
    let (Some(kind), Some(_reserved), Some(sector)) =
        (readable.read_array().map(u32::from_le_bytes), readable.read_array::<4>(), readable.read_array())
    else {
        return (0, Status::IoError);
    };
    let sector = u64::from_le_bytes(sector);
    match kind {
        VIRTIO_BLK_T_IN => match disk.range(sector, writable.len().into()) {
            Some(offset) => {
                let (done, result) = disk.read(offset, std::mem::take(writable));
                (done, status(disk, "read", result))
            }
            None => (0, Status::IoError),
        },
        VIRTIO_BLK_T_OUT if !disk.read_only() => match disk.range(sector, readable.len().into()) {
            Some(offset) => {
                let result = disk.write(offset, std::mem::take(readable));
                (0, status(disk, "write", result.and_then(|()| settle(disk, policy))))
            }
            None => (0, Status::IoError),
        },
        VIRTIO_BLK_T_FLUSH => (0, status(disk, "flush", disk.flush())),
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
            for (to, from) in id.iter_mut().zip(policy.serial) {
                *to = *from;
            }
            (writable.write(&id) as u32, Status::Ok)
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if !disk.read_only() => {
            (0, zero(disk, policy, readable, kind == VIRTIO_BLK_T_DISCARD))
        }
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => (0, Status::IoError),
        _ => (0, Status::Unsupported),
    }
}

/// DISCARD and WRITE_ZEROES: a list of segments of 16 bytes (5.2.6). All are checked before the first is carried out.
fn zero(disk: &Disk, policy: Policy<'_>, readable: &mut Buffers<'_>, discard: bool) -> Status {
    let count = readable.len() / 16;
    if !readable.len().is_multiple_of(16) || count == 0 || count > MAX_ZERO_SEGMENTS {
        return Status::IoError;
    }
    let mut segments = Vec::new();
    while let Some(segment) = readable.read_array::<16>() {
        let number = u128::from_le_bytes(segment);
        let (sector, sectors, flags) = (number as u64, (number >> 64) as u32, (number >> 96) as u32);
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && flags != 0 {
            return Status::Unsupported;
        }
        let bytes = u64::from(sectors) * SECTOR;
        let Some(offset) = disk.range(sector, bytes) else { return Status::IoError };
        if sectors > MAX_ZERO_SECTORS {
            return Status::IoError;
        }
        segments.push((offset, bytes, flags != 0));
    }
    let (what, mut result) = (if discard { "discard" } else { "zero" }, Ok(()));
    for (offset, bytes, unmap) in segments {
        result = if discard { disk.discard(offset, bytes) } else { disk.write_zeroes(offset, bytes, unmap) };
        if result.is_err() {
            break;
        }
    }
    status(disk, what, result.and_then(|()| settle(disk, policy)))
}

fn settle(disk: &Disk, policy: Policy<'_>) -> std::io::Result<()> {
    if policy.write_back.is_some_and(|on| on.load(Ordering::SeqCst)) { Ok(()) } else { disk.flush() }
}

fn status(disk: &Disk, what: &str, result: std::io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) => {
            disk.report(what, &error);
            Status::IoError
        }
    }
}
