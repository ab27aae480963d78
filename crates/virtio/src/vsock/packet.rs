//! Packet headers (virtio 1.3, 5.10.6).

/// Bytes of a header.
pub(super) const HEADER: usize = 44;
/// The host's address (5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// VIRTIO_VSOCK_TYPE_STREAM
pub(super) const STREAM: u16 = 1;
/// SHUTDOWN: the sender receives no more.
pub(super) const NO_RECEIVE: u32 = 1;
/// SHUTDOWN: the sender sends no more.
pub(super) const NO_SEND: u32 = 2;

/// What a packet is for (5.10.6, `enum virtio_vsock_op`).
pub(super) mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    /// Bytes of payload behind the header.
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    /// Bytes of buffer that the sender has for this connection.
    pub buf_alloc: u32,
    /// Bytes that have left that buffer, ever; wraps.
    pub fwd_cnt: u32,
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Self {
        let part = |at: usize, len: usize| {
            bytes.iter().skip(at).take(len).rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
        };
        Self {
            src_cid: part(0, 8),
            dst_cid: part(8, 8),
            src_port: part(16, 4) as u32,
            dst_port: part(20, 4) as u32,
            len: part(24, 4) as u32,
            kind: part(28, 2) as u16,
            op: part(30, 2) as u16,
            flags: part(32, 4) as u32,
            buf_alloc: part(36, 4) as u32,
            fwd_cnt: part(40, 4) as u32,
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let fields = (self.src_cid.to_le_bytes().into_iter())
            .chain(self.dst_cid.to_le_bytes())
            .chain(self.src_port.to_le_bytes())
            .chain(self.dst_port.to_le_bytes())
            .chain(self.len.to_le_bytes())
            .chain(self.kind.to_le_bytes())
            .chain(self.op.to_le_bytes())
            .chain(self.flags.to_le_bytes())
            .chain(self.buf_alloc.to_le_bytes())
            .chain(self.fwd_cnt.to_le_bytes());
        bytes.iter_mut().zip(fields).for_each(|(to, from)| *to = from);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_as_laid_down() {
        let bytes: [u8; HEADER] = std::array::from_fn(|at| at as u8);
        let header = Header::parse(&bytes);
        assert_eq!((header.src_cid, header.dst_port), (0x0706_0504_0302_0100, 0x1716_1514));
        assert_eq!((header.kind, header.op, header.fwd_cnt), (0x1d1c, 0x1f1e, 0x2b2a_2928));
        assert_eq!(header.to_bytes(), bytes);
    }
}
