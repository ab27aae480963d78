//! Unpacks the payload of a bzImage on the host, where that takes tens of milliseconds instead of seconds in a translated guest.

use std::io::Read;

/// Why the payload was not unpacked; the kernel's own decompressor is run then.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnpackError {
    /// Nothing in the header, or a format not handled here (bzip2, lzma, lzo).
    #[error("its compression is not one of LZ4, zstd, xz, gzip")]
    Format,
    /// The data is damaged.
    #[error("its payload does not unpack ({0})")]
    Data(String),
    /// More comes out than may.
    #[error("its payload unpacks to more than {0} bytes")]
    TooBig(u64),
}

enum Format {
    Gzip,
    Zstd,
    Xz,
    Lz4,
}

impl Format {
    fn of(payload: &[u8]) -> Option<Self> {
        match payload {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Self::Zstd),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            [0x02, 0x21, 0x4c, 0x18, ..] => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// Unpacks `payload`, of which at most `limit` bytes may come.
///
/// The kernel's build appends the unpacked size as 4 bytes to the stream (for gzip it is part of it).
///
/// # Errors
/// Unknown format, damaged data, too much data.
pub fn unpack(payload: &[u8], limit: u64) -> Result<Vec<u8>, UnpackError> {
    let (stream, size) = payload.split_last_chunk::<4>().ok_or(UnpackError::Format)?;
    let size = u64::from(u32::from_le_bytes(*size));
    let format = Format::of(payload).ok_or(UnpackError::Format)?;
    if size > limit {
        return Err(UnpackError::TooBig(limit));
    }
    let unpacked = match format {
        Format::Gzip => read(flate2::read::GzDecoder::new(payload), size)?,
        Format::Zstd => {
            let error = |e: ruzstd::decoding::errors::FrameDecoderError| UnpackError::Data(e.to_string());
            read(ruzstd::decoding::StreamingDecoder::new(stream).map_err(error)?, size)?
        }
        Format::Xz => read(lzma_rust2::XzReader::new_mem_limit(stream, false, 256 << 10), size)?,
        Format::Lz4 => lz4_legacy(stream.get(4..).unwrap_or_default(), size)?,
    };
    if unpacked.len() as u64 != size {
        return Err(UnpackError::Data(format!("{} bytes instead of {size}", unpacked.len())));
    }
    Ok(unpacked)
}

fn read(stream: impl Read, size: u64) -> Result<Vec<u8>, UnpackError> {
    let mut unpacked = Vec::new();
    // One byte more shows that there is too much.
    stream.take(size + 1).read_to_end(&mut unpacked).map_err(|e| UnpackError::Data(e.to_string()))?;
    Ok(unpacked)
}

/// The legacy frame: blocks of up to 8 MiB, each after its packed size in 4 bytes.
fn lz4_legacy(mut blocks: &[u8], size: u64) -> Result<Vec<u8>, UnpackError> {
    const BLOCK: u64 = 8 << 20;
    let mut unpacked = Vec::new();
    let error = |why: &dyn std::fmt::Display| UnpackError::Data(why.to_string());
    while let Some((len, rest)) = blocks.split_first_chunk::<4>() {
        let len = u32::from_le_bytes(*len) as usize;
        let (block, rest) = rest.split_at_checked(len).ok_or_else(|| error(&"a block is cut off"))?;
        let start = unpacked.len();
        let room = BLOCK.min(size - start as u64) as usize;
        unpacked.resize(start + room, 0);
        let target = unpacked.get_mut(start..).unwrap_or_default();
        let written = lz4_flex::block::decompress_into(block, target).map_err(|e| error(&e))?;
        unpacked.truncate(start + written);
        blocks = rest;
    }
    Ok(unpacked)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn formats() {
        let text: Vec<u8> = (0..100_000_u32).flat_map(|n| (n / 7).to_le_bytes()).collect();
        let size = (text.len() as u32).to_le_bytes();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&text).unwrap();
        let mut lz4 = vec![0x02, 0x21, 0x4c, 0x18];
        let block = lz4_flex::block::compress(&text);
        lz4.extend((block.len() as u32).to_le_bytes());
        lz4.extend(&block);
        lz4.extend(size);
        let mut zstd = ruzstd::encoding::compress_to_vec(text.as_slice(), ruzstd::encoding::CompressionLevel::Fastest);
        zstd.extend(size);
        let mut xz = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(1)).unwrap();
        xz.write_all(&text).unwrap();
        let mut xz = xz.finish().unwrap();
        xz.extend(size);
        for packed in [gzip.finish().unwrap(), lz4, zstd, xz] {
            assert_eq!(unpack(&packed, 1 << 20).as_deref(), Ok(&text[..]));
            assert_eq!(unpack(&packed, 1000), Err(UnpackError::TooBig(1000)));
            let mut short = packed.clone();
            let at = short.len() - 4;
            short[at..].copy_from_slice(&100_u32.to_le_bytes());
            assert!(matches!(unpack(&short, 1 << 20), Err(UnpackError::Data(_))));
            let mut cut = packed[..packed.len() / 2].to_vec();
            cut.extend(size);
            assert!(matches!(unpack(&cut, 1 << 20), Err(UnpackError::Data(_))));
        }
        assert_eq!(unpack(b"BZh91AY", 1000000000000), Err(UnpackError::Format));
        assert_eq!(unpack(b"", 1000), Err(UnpackError::Format));
    }
}
