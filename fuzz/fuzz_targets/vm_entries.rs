//! What lies in the directory of VMs: any bytes as a description or as a console's log are read or passed over.

#![no_main]

use std::cell::RefCell;
use std::fs::{self, File};

use libfuzzer_sys::fuzz_target;
use registry::Registry;
use registry::ring::Reader;

thread_local! {
    static DIR: RefCell<Option<tempfile::TempDir>> = const { RefCell::new(None) };
}

fuzz_target!(|data: &[u8]| {
    let Some((split, data)) = data.split_first() else { return };
    let (about, log) = data.split_at(data.len() * usize::from(*split) / 255);
    DIR.with_borrow_mut(|place| {
        let dir = place.get_or_insert_with(|| tempfile::tempdir_in("/dev/shm").unwrap());
        let registry = Registry::at(dir.path().join("vms")).unwrap();
        let entry = dir.path().join("vms/0123456789ab");
        fs::create_dir_all(&entry).unwrap();
        fs::write(entry.join("about.json"), about).unwrap();
        fs::write(entry.join("console"), log).unwrap();
        for entry in registry.entries() {
            let _ = (entry.shown(), registry.find(&entry.about.id));
        }
        let mut reader = Reader::new(File::open(entry.join("console")).unwrap());
        for _ in 0..2 {
            assert!(reader.read().unwrap_or_default().len() <= 1 << 20);
        }
    });
});
