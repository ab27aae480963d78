//! Any bytes of an agent to the host and the other way, and any tree that is unpacked: no panic, what is understood is said again in the same
//! way, nothing outside of the one name is touched.

#![no_main]

use std::ffi::OsStr;
use std::fs;

use agent_protocol::archive::{Entry, Item, Kind, Unpacker};
use agent_protocol::{Decoder, FromGuest, FromHost};
use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

#[derive(Arbitrary, Debug)]
struct Input {
    /// Bytes as they come, in pieces.
    pieces: Vec<Vec<u8>>,
    tree: Vec<Part>,
}

#[derive(Arbitrary, Debug)]
enum Part {
    Entry { kind: u8, mode: u32, time: i64, path: Vec<u8>, target: u8 },
    Known { kind: u8, mode: u32, path: u8, target: u8 },
    Data(Vec<u8>),
}

const NAMES: [&str; 12] =
    ["", "a", "a/b", "a/b/c", "link", "link/x", "..", "a/../..", "/etc/x", "a//b", "./a", "../secret"];

fn messages(pieces: &[Vec<u8>]) {
    let (mut decoder, mut from_guest, mut from_host) = (Decoder::default(), true, true);
    for piece in pieces {
        decoder.push(piece);
        while let Ok(Some((kind, body))) = decoder.pop() {
            if from_guest {
                match FromGuest::parse(kind, body.clone()) {
                    Ok(message) => {
                        let mut bytes = Vec::new();
                        message.put(&mut bytes);
                        let mut again = Decoder::default();
                        again.push(&bytes);
                        let (kind, body) = again.pop().unwrap().unwrap();
                        assert_eq!(FromGuest::parse(kind, body).unwrap(), message);
                    }
                    Err(_) => from_guest = false,
                }
            }
            if from_host {
                match FromHost::parse(kind, body) {
                    Ok(message) => message.put(&mut Vec::new()),
                    Err(_) => from_host = false,
                }
            }
            if !from_guest && !from_host {
                return;
            }
        }
    }
}

fn unpack(tree: &[Part]) {
    let dir = tempfile::tempdir_in(if cfg!(target_os = "linux") { "/dev/shm" } else { "/tmp" }).unwrap();
    let inner = dir.path().join("inner");
    fs::create_dir(&inner).unwrap();
    fs::write(dir.path().join("secret"), "the host's").unwrap();
    fs::write(inner.join("other"), "the user's").unwrap();
    let mut unpacker = Unpacker::new(&inner, OsStr::new("to"), 0o777).unwrap();
    let name = |number: &u8| NAMES[usize::from(*number) % NAMES.len()].as_bytes().to_vec();
    let kind = |number: &u8, target: &u8| match number % 3 {
        0 => Kind::Directory,
        1 => Kind::File,
        _ => Kind::Symlink(name(target)),
    };
    for part in tree.iter().take(64) {
        let item = match part {
            Part::Entry { kind: number, mode, time, path, target } => {
                Item::Entry(Entry { kind: kind(number, target), mode: *mode, time: *time, path: path.clone() })
            }
            Part::Known { kind: number, mode, path, target } => {
                Item::Entry(Entry { kind: kind(number, target), mode: *mode | 0o700, time: 5, path: name(path) })
            }
            Part::Data(bytes) => Item::Data(bytes.clone()),
        };
        if unpacker.item(item).is_err() {
            break;
        }
    }
    let _ = unpacker.finish();
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"the host's");
    assert_eq!(fs::read(inner.join("other")).unwrap(), b"the user's");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    assert!(fs::read_dir(&inner).unwrap().count() <= 2);
}

fuzz_target!(|input: Input| {
    messages(&input.pieces);
    if !input.tree.is_empty() {
        unpack(&input.tree);
    }
});
