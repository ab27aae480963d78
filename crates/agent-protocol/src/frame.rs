//! Frames: a length of 32 bits (little-endian, without itself and the kind), a kind of 8 bits, and a body.

/// The longest body, in bytes.
pub const MAX_BODY: usize = 256 << 10;
/// Bytes before a body.
const HEADER: usize = 5;

/// The other end does not keep to the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FrameError {
    /// A body longer than [`MAX_BODY`].
    TooLong(u32),
    /// A frame of this kind, whose body is not as it should be, or which should not come.
    Malformed(u8),
    /// The end of the connection inside a frame.
    CutOff,
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::TooLong(len) => write!(f, "a message of {len} bytes, {MAX_BODY} are the most"),
            Self::Malformed(kind) => write!(f, "a malformed message of kind {kind}"),
            Self::CutOff => f.write_str("a message that was cut off"),
        }
    }
}

impl std::error::Error for FrameError {}

impl From<FrameError> for std::io::Error {
    fn from(error: FrameError) -> Self {
        Self::new(std::io::ErrorKind::InvalidData, error)
    }
}

/// Appends a frame to `out`. What is longer than [`MAX_BODY`] is cut off: the caller keeps to it.
pub fn put(out: &mut Vec<u8>, kind: u8, body: &[u8]) {
    let body = body.get(..body.len().min(MAX_BODY)).unwrap_or_default();
    out.extend((body.len() as u32).to_le_bytes());
    out.push(kind);
    out.extend_from_slice(body);
}

/// Takes bytes as they come and gives frames.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    at: usize,
}

impl Decoder {
    /// Takes what came.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.at > 0 {
            self.bytes.drain(..self.at);
            self.at = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Bytes taken that no frame was made of yet.
    pub fn pending(&self) -> usize {
        self.bytes.len() - self.at
    }

    /// The next whole frame: its kind and body.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]; nothing sensible follows then.
    pub fn pop(&mut self) -> Result<Option<(u8, Vec<u8>)>, FrameError> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some((header, body)) = rest.split_first_chunk::<HEADER>() else { return Ok(None) };
        let [a, b, c, d, kind] = *header;
        let len = u32::from_le_bytes([a, b, c, d]);
        if len as usize > MAX_BODY {
            return Err(FrameError::TooLong(len));
        }
        let Some(body) = body.get(..len as usize) else { return Ok(None) };
        let body = body.to_vec();
        self.at += HEADER + body.len();
        Ok(Some((kind, body)))
    }
}

/// Reads the parts of a body.
#[derive(Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, tail) = self.0.split_first_chunk::<N>()?;
        self.0 = tail;
        Some(*head)
    }

    /// A number of 8 bits.
    pub fn u8(&mut self) -> Option<u8> {
        self.array().map(u8::from_le_bytes)
    }

    /// A number of 16 bits.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    /// A number of 32 bits.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    /// A number of 64 bits.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Bytes with their number (32 bits) before them.
    pub fn bytes(&mut self) -> Option<Vec<u8>> {
        let len = self.u32()? as usize;
        let (head, tail) = self.0.split_at_checked(len)?;
        self.0 = tail;
        Some(head.to_vec())
    }

    /// A list of such, with their number (32 bits) before them.
    pub fn list(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = self.u32()?;
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.bytes()?);
        }
        Some(list)
    }

    /// Is that all?
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Appends bytes with their number before them.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(bytes);
}

/// Appends a list of such.
pub fn put_list(out: &mut Vec<u8>, list: &[Vec<u8>]) {
    out.extend((list.len() as u32).to_le_bytes());
    for item in list {
        put_bytes(out, item);
    }
}
