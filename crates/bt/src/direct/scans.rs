//! What was found on pages of code, for when the same page is looked at again: for another process, or after a flush. A page is known by a hash of its bytes,
//! with a key that no guest knows; its number only says where to look.

use std::cell::RefCell;
use std::collections::HashMap;
use std::hash::BuildHasher;
use std::rc::Rc;

use foldhash::quality::RandomState;
use runner::guard::Telling;
use runner::scan::{BEFORE, BEYOND};

/// A page with what lies before and behind it.
pub type Bytes = [u8; BEFORE + 4096 + BEYOND];

/// Pages that are remembered by one thread.
const MAX_PAGES: usize = 1 << 15;

struct Scan {
    hash: u64,
    found: Rc<Telling>,
}

#[derive(Default)]
struct Scans {
    key: RandomState,
    pages: HashMap<u64, Scan>,
}

thread_local! {
    static SCANS: RefCell<Scans> = RefCell::new(Scans::default());
}

/// [`Telling::find`] for page `number` of guest-physical memory; the flags tell whether there is something before and behind it,
/// and whether the program writes it itself.
pub fn find(number: u64, bytes: &Bytes, has_before: bool, has_after: bool, written: bool) -> Rc<Telling> {
    SCANS.with_borrow_mut(|scans| {
        let hash = scans.key.hash_one((has_before, has_after, written, &bytes[..]));
        if let Some(scan) = scans.pages.get(&number).filter(|scan| scan.hash == hash) {
            return scan.found.clone();
        }
        let part = |has: bool, range: std::ops::Range<usize>| if has { &bytes[range] } else { &[] };
        let (before, after) = (part(has_before, 0..BEFORE), part(has_after, BEFORE + 4096..bytes.len()));
        let mut page = [0; 4096];
        page.copy_from_slice(&bytes[BEFORE..BEFORE + 4096]);
        let found = Rc::new(Telling::find(&page, before, after, written));
        if scans.pages.len() >= MAX_PAGES {
            scans.pages.clear();
        }
        scans.pages.insert(number, Scan { hash, found: found.clone() });
        found
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_that_has_changed_is_looked_at_again() {
        let mut bytes = [0x90; BEFORE + 4096 + BEYOND];
        assert!(find(7, &bytes, true, true, false).stops.is_empty());
        bytes[BEFORE + 100] = 0x0f;
        bytes[BEFORE + 101] = 0x01;
        bytes[BEFORE + 102] = 0xf9;
        assert_eq!(find(7, &bytes, true, true, false).stops, [100]);
        assert_eq!(find(7, &bytes, true, true, false).stops, [100]);
        bytes[BEFORE + 102] = 0x90;
        assert!(find(7, &bytes, true, true, false).stops.is_empty());
        // What lies before it counts where it can be executed.
        bytes[BEFORE - 1] = 0x0f;
        bytes[BEFORE] = 0x01;
        bytes[BEFORE + 1] = 0xf9;
        assert!(find(7, &bytes, false, true, false).stops.is_empty());
        assert_eq!(find(7, &bytes, true, true, false).stops, [-1]);
        assert!(find(7, &bytes, true, true, true).stops.is_empty());
    }
}
