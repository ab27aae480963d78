//! Trees of files in and out.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use agent_protocol::archive::{self, Unpacker};
use agent_protocol::{FromGuest, FromHost};

use crate::session::Connection;

/// Unpacks what the host sends.
pub fn put(connection: &mut Connection, path: &OsStr, name: &OsStr) -> io::Result<()> {
    let (parent, name) = archive::place(Path::new(path), name)?;
    let mut unpacker = Unpacker::new(&parent, &name, 0o7777)?;
    loop {
        match connection.receive()? {
            Some(FromHost::Item(item)) => unpacker.item(item)?,
            Some(FromHost::ItemsEnd) => return unpacker.finish(),
            _ => return Err(io::Error::other("the copy was cut off")),
        }
    }
}

/// Sends a tree; returns how many things that cannot be copied were left out.
pub fn get(connection: &mut Connection, path: &OsStr) -> io::Result<u64> {
    archive::pack(Path::new(path), &mut |item| connection.send(&FromGuest::Item(item)))
}
