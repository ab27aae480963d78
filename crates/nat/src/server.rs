//! The network server: a process of its own for the network of one guest. The VMM starts it with [`start`]; it does [`run`].
//!
//! Its standard input is the cable, a socket that keeps frames apart. The first message on it says what to do, and brings the sockets
//! for it along: the process itself opens no files and no ports. It ends when the cable's other end is closed, so also
//! when the VMM dies, however it does.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType, sockopt,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use crate::relay::Relay;
use crate::sandbox::{self, Confinement, Needs};
use crate::{Nat, NatConfig, PortForward};

/// Most forwarded ports of one guest.
pub const MAX_FORWARDS: usize = 128;
/// The longest first message, in bytes.
const MAX_MESSAGE: usize = 1 << 20;
/// Descriptors that the server asks for.
const FILES: u64 = 8192;
/// Bytes that the cable holds in each direction, if the host allows it.
const CABLE: usize = 1 << 20;

/// The kind of a forwarded port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// What the server is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// The guest's way to the world. One socket for each forwarded port comes along; here are their kinds and the guest's ports.
    Nat(NatConfig, Vec<(Protocol, u16)>),
    /// A cable to whoever is at the other end of the one socket that comes along.
    Relay(Relay),
}

#[derive(Debug, Serialize, Deserialize)]
struct Task {
    role: Role,
    confinement: Confinement,
}

fn broken(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Starts `program` with the argument `argument`, which is to call [`run`] then, and hands it `sockets`. Returns the VMM's end of the
/// cable, for frames with their header (virtio 1.3, 5.1.6) of 12 bytes. The server ends when that is closed or shut down for writing;
/// when its own end is closed, so are its ports. `errors` is its standard error.
///
/// # Errors
/// The program cannot be started.
pub fn start(
    program: &Path,
    argument: &str,
    role: Role,
    confinement: Confinement,
    sockets: &[OwnedFd],
    errors: Stdio,
) -> io::Result<OwnedFd> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    for end in [&ours, &theirs] {
        sockopt::set_socket_send_buffer_size(end, CABLE)?;
    }
    // A group of its own: keys at the terminal are not for it.
    Command::new(program)
        .arg(argument)
        .stdin(theirs)
        .stdout(Stdio::null())
        .stderr(errors)
        .env_clear()
        .current_dir("/")
        .process_group(0)
        .spawn()?;
    let message = postcard::to_stdvec(&Task { role, confinement }).map_err(|_| broken("role"))?;
    let descriptors: Vec<BorrowedFd<'_>> = sockets.iter().map(AsFd::as_fd).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FORWARDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(broken("too many forwarded ports"));
    }
    match rustix::net::sendmsg(&ours, &[IoSlice::new(&message)], &mut control, SendFlags::NOSIGNAL) {
        // That it has ended already is seen at the cable.
        Ok(_) | Err(Errno::PIPE | Errno::CONNRESET) => Ok(ours),
        Err(error) => Err(error.into()),
    }
}

/// Is the network server: takes its task from standard input, confines the process and serves until the cable's other end is closed.
///
/// # Errors
/// What keeps it from serving.
pub fn run() -> io::Result<()> {
    let cable = io::stdin().as_fd().try_clone_to_owned()?;
    let (task, sockets) = receive_task(&cable)?;
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES, |maximum| maximum.min(FILES)).max(limit.current.unwrap_or(0));
    let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: limit.maximum });
    let confine = |needs| match task.confinement {
        Confinement::On => sandbox::confine(needs).map_err(io::Error::other),
        Confinement::Off => Ok(()),
    };
    match task.role {
        Role::Nat(config, ports) => {
            if ports.len() != sockets.len() {
                return Err(broken("sockets are missing"));
            }
            let forwards = ports.into_iter().zip(sockets).map(|((protocol, port), socket)| match protocol {
                Protocol::Tcp => PortForward::Tcp(socket, port),
                Protocol::Udp => PortForward::Udp(socket, port),
            });
            let needs = if config.isolated { Needs::Accept } else { Needs::Connect };
            let mut nat = Nat::new(config, cable, forwards.collect())?;
            confine(needs)?;
            // An error is the cable's end. All ports are closed before the cable is seen to be.
            while nat.turn(None).is_ok() {}
            drop(nat);
        }
        Role::Relay(relay) => {
            let socket = sockets.into_iter().next().ok_or_else(|| broken("the socket is missing"))?;
            rustix::io::ioctl_fionbio(&socket, true)?;
            confine(Needs::Accept)?;
            relay.run(&cable, socket);
        }
    }
    Ok(())
}

fn receive_task(cable: &OwnedFd) -> io::Result<(Task, Vec<OwnedFd>)> {
    let mut message = vec![0; MAX_MESSAGE];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FORWARDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match rustix::net::recvmsg(cable, &mut [IoSliceMut::new(&mut message)], &mut control, flags) {
            Err(Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut sockets = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = part {
            sockets.extend(descriptors);
        }
    }
    let task = postcard::from_bytes(message.get(..received.bytes).unwrap_or_default());
    Ok((task.map_err(|_| broken("this is not for use by hand: the VMM starts it"))?, sockets))
}
