//! Any FUSE requests to a shared directory: no panic, no answer longer than its room, nothing outside the directory touched.

#![no_main]

use std::fs;
use std::os::unix::fs::symlink;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use share::abi::op;
use share::{Access, FileSystem};

#[derive(Arbitrary, Debug)]
enum Part {
    Number(u64),
    Small(u8),
    Name(u8),
    Bytes(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Request {
    opcode: u8,
    node: u8,
    parts: Vec<Part>,
    room: u16,
}

const NAMES: [&str; 8] = ["a", "b", "dir", "link", "..", "../secret", "", "dir/../.."];

fuzz_target!(|input: (bool, Vec<Request>)| {
    let (exclusive, requests) = input;
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("dir")).unwrap();
    fs::write(dir.path().join("secret"), b"the host's").unwrap();
    fs::write(root.join("a"), b"text").unwrap();
    symlink("../secret", root.join("link")).unwrap();
    let system = FileSystem::new(fs::File::open(&root).unwrap().into(), Access::ReadWrite, 64).unwrap();
    let system = if exclusive { system.exclusive() } else { system };
    let ask = |opcode: u32, node: u64, body: &[u8], room: usize| {
        let mut bytes = (40 + body.len() as u32).to_le_bytes().to_vec();
        bytes.extend(opcode.to_le_bytes());
        bytes.extend(9u64.to_le_bytes());
        bytes.extend(node.to_le_bytes());
        bytes.extend([0; 16]);
        bytes.extend(body);
        let mut answer = vec![0; room];
        assert!(system.serve(&bytes, &mut answer) <= room);
    };
    for name in [&b"a\0"[..], b"dir\0", b"link\0"] {
        ask(op::LOOKUP, 1, name, 200);
    }
    ask(op::OPEN, 2, &[2, 0, 0, 0, 0, 0, 0, 0], 200);
    for request in requests.iter().take(64) {
        let opcode = u32::from(request.opcode) % 54;
        // Right, but slow.
        if opcode == op::SYNCFS {
            continue;
        }
        let mut body = Vec::new();
        for part in &request.parts {
            match part {
                Part::Number(number) => body.extend(number.to_le_bytes()),
                Part::Small(number) => body.extend(u64::from(*number).to_le_bytes()),
                Part::Name(number) => {
                    body.extend(NAMES[usize::from(*number) % NAMES.len()].bytes());
                    body.push(0);
                }
                Part::Bytes(bytes) => body.extend(bytes),
            }
        }
        ask(opcode, (request.node % 10).into(), &body, request.room.into());
    }
    assert_eq!(fs::read(dir.path().join("secret")).unwrap(), b"the host's");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
});
