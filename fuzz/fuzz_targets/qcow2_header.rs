//! Any bytes as the header of a qcow2 image: parsed or refused, no panic; what passes is within the bounds that opening relies on.

#![no_main]

use disk::qcow2::header::Header;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u64, &[u8])| {
    let (len, bytes) = input;
    // With the right start, so that less is refused at once.
    let mut head = b"QFI\xfb\0\0\0".to_vec();
    head.extend(bytes);
    if let Ok(header) = Header::parse(&head, len) {
        assert!((9..=21).contains(&header.cluster_bits) && header.refcount_order <= 6);
        assert!(header.l1_entries <= 4 << 20 && header.refcount_clusters * header.cluster() <= 8 << 20);
        assert!(header.l1_entries == 0 || header.l1_offset + header.l1_entries * 8 <= len);
        assert!(
            header.l1_entries * header.l2_entries() * header.cluster() >= header.size || header.l1_entries > 1 << 20
        );
        assert!(header.backing.is_none_or(|name| name.len() <= 1023 && !name.contains('\0')));
    }
});
