//! The network of a machine whose process 1 is the agent: each Ethernet card gets what its DHCP server gives.
//!
//! A process of its own for each card asks, sets address, route and name servers, and asks again before the time of its lease is over.
//! IPv6 is the kernel's: it takes what routers announce. Commands wait for all of it to be there, but not long ([`Coming::wait`]).

use std::fs;
use std::io;
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::dhcp::{self, Answer, Ask, Lease};
use crate::{modules, system};

/// How long after the start a command waits for the network at most. A server that answers does so in milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long the first question waits for its answer, and the longest that any does.
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(30);
/// The shortest time after which a lease is asked for again.
const SOONEST: Duration = Duration::from_secs(30);
/// Says to scripts that the network is there.
const MARK: &str = "/run/network";
const RESOLVER: &str = "/etc/resolv.conf";

/// A network that is on its way.
pub struct Coming {
    /// Ends when all cards have their addresses.
    line: Option<OwnedFd>,
    until: Instant,
}

impl Coming {
    /// One that nobody need wait for.
    pub fn none() -> Self {
        Self { line: None, until: Instant::now() }
    }

    /// Waits until the network is there, or it has been waited for long enough.
    pub fn wait(&self) {
        let Some(line) = &self.line else { return };
        loop {
            let left = self.until.saturating_duration_since(Instant::now());
            let time = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(line, PollFlags::IN)], Some(&time)) {
                Err(rustix::io::Errno::INTR) => {}
                _ => return,
            }
        }
    }
}

/// Brings the network up beside the calling process, which has one thread. `drivers` are the cards'.
///
/// # Errors
/// There can be no more processes.
pub fn start(drivers: &[&str]) -> io::Result<Coming> {
    let _ = system::interface_up("lo", None);
    if drivers.is_empty() {
        return Ok(Coming::none());
    }
    let (line, done) = pipe_with(PipeFlags::CLOEXEC)?;
    if system::fork()?.is_none() {
        drop(line);
        system::forget_children(false);
        modules::load(drivers);
        let mut names = cards();
        let last = names.pop();
        for name in names {
            // If it cannot be, there is one card less.
            if let Ok(None) = system::fork() {
                serve(&name, done);
            }
        }
        match last {
            Some(name) => serve(&name, done),
            None => std::process::exit(0),
        }
    }
    Ok(Coming { line: Some(line), until: Instant::now() + PATIENCE })
}

/// The Ethernet cards that are there.
fn cards() -> Vec<String> {
    let all = fs::read_dir("/sys/class/net").into_iter().flatten().flatten();
    let mut names: Vec<_> = all
        .filter(|card| {
            let kind = fs::read_to_string(card.path().join("type")).unwrap_or_default();
            // ARPHRD_ETHER, and a device of the machine's.
            kind.trim() == "1" && card.path().join("device").exists()
        })
        .filter_map(|card| card.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn mac(text: &str) -> Option<[u8; 6]> {
    let mut bytes = [0; 6];
    let mut parts = text.trim().split(':');
    for byte in &mut bytes {
        *byte = u8::from_str_radix(parts.next()?, 16).ok()?;
    }
    parts.next().is_none().then_some(bytes)
}

/// Takes care of one card, for ever.
fn serve(name: &str, done: OwnedFd) -> ! {
    let mut done = Some(done);
    let failed = served(name, &mut done);
    if let Err(error) = failed {
        crate::complain(&format!("network card {name}: {error}"));
    }
    std::process::exit(0)
}

fn served(name: &str, done: &mut Option<OwnedFd>) -> io::Result<()> {
    let mac = fs::read_to_string(Path::new("/sys/class/net").join(name).join("address"))?;
    let mac = self::mac(&mac).ok_or_else(|| io::Error::other("it has no hardware address"))?;
    system::interface_up(name, None)?;
    let mut client = Client { name, mac, socket: open(name)?, id: u32::from_le_bytes(random()?) };
    loop {
        let Some(lease) = client.lease()? else { continue };
        apply(name, &lease)?;
        let _ = fs::write(MARK, "");
        *done = None;
        client.keep(&lease)?;
        // It is not ours any more.
        let _ = system::set_address(name, [0; 4], 32);
    }
}

fn open(name: &str) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, dhcp::CLIENT))?;
    socket.set_broadcast(true)?;
    system::bind_to_interface(socket.as_fd(), name)?;
    Ok(socket)
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::INSECURE)?;
    Ok(bytes)
}

struct Client<'n> {
    name: &'n str,
    mac: [u8; 6],
    socket: UdpSocket,
    id: u32,
}

impl Client<'_> {
    /// Asks until there is an answer that `take` takes, at most until `end`.
    fn ask<T>(&mut self, ask: Ask, end: Option<Instant>, take: impl Fn(Answer) -> Option<T>) -> io::Result<Option<T>> {
        self.id = self.id.wrapping_add(1);
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let message = dhcp::message(ask, self.id, self.mac, host.trim());
        let mut patience = FIRST;
        loop {
            if end.is_some_and(|end| Instant::now() >= end) {
                return Ok(None);
            }
            // A cable that is not plugged in may be so later.
            let _ = self.socket.send_to(&message, (Ipv4Addr::BROADCAST, dhcp::SERVER));
            let next = Instant::now() + patience;
            patience = (patience * 2).min(LONGEST);
            loop {
                let left = next.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                self.socket.set_read_timeout(Some(left))?;
                let mut buffer = [0; 1500];
                let Ok((len, from)) = self.socket.recv_from(&mut buffer) else { continue };
                if from.port() != dhcp::SERVER {
                    continue;
                }
                let answer = dhcp::answer(buffer.get(..len).unwrap_or_default(), self.id, self.mac);
                if let Some(taken) = answer.and_then(&take) {
                    return Ok(Some(taken));
                }
            }
        }
    }

    /// A new lease; `None` if what was offered is not given after all.
    fn lease(&mut self) -> io::Result<Option<Lease>> {
        let offer = self.ask(Ask::Discover, None, |answer| match answer {
            Answer::Offer(address, server) => Some((address, server)),
            _ => None,
        })?;
        let Some((address, server)) = offer else { return Ok(None) };
        let end = Instant::now() + Duration::from_secs(5);
        self.ask(Ask::Request(address, server), Some(end), granted).map(Option::flatten)
    }

    /// Keeps the lease for as long as it is given.
    fn keep(&mut self, lease: &Lease) -> io::Result<()> {
        let mut lease = lease.clone();
        loop {
            // (4294967295 is for ever.)
            let time = Duration::from_secs(lease.seconds.into());
            let end = Instant::now() + time;
            std::thread::sleep((time / 2).max(SOONEST));
            match self.ask(Ask::Again(lease.address.into()), Some(end), granted)?.flatten() {
                Some(next) if next.address == lease.address => {
                    apply(self.name, &next)?;
                    lease = next;
                }
                _ => return Ok(()),
            }
        }
    }
}

/// What a request comes to: `None` for what is no answer to it, and inside for a refusal.
fn granted(answer: Answer) -> Option<Option<Lease>> {
    match answer {
        Answer::Lease(lease) => Some(Some(lease)),
        Answer::Refused => Some(None),
        Answer::Offer(..) => None,
    }
}

/// Sets what was given.
fn apply(name: &str, lease: &Lease) -> io::Result<()> {
    system::interface_up(name, lease.mtu)?;
    system::set_address(name, lease.address, lease.prefix)?;
    if let Some(router) = lease.router {
        match system::add_default_route(name, router) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            other => other?,
        }
    }
    if !lease.dns.is_empty() {
        let _ = put_resolver(Path::new(RESOLVER), &resolver(lease));
    }
    Ok(())
}

fn resolver(lease: &Lease) -> String {
    let mut text = lease.domain.as_ref().map_or(String::new(), |domain| format!("search {domain}\n"));
    for server in lease.dns.iter().take(3) {
        text += &format!("nameserver {server}\n");
    }
    text
}

/// Writes the file, also where it is a link to one that is still to come, as systemd's resolver has it.
fn put_resolver(path: &Path, text: &str) -> io::Result<()> {
    if let (Ok(target), Some(dir)) = (fs::read_link(path), path.parent())
        && let Some(parent) = dir.join(target).parent()
    {
        fs::create_dir_all(parent)?;
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses() {
        assert_eq!(mac("52:54:00:0a:FF:01\n"), Some([0x52, 0x54, 0, 10, 255, 1]));
        for bad in ["", "52:54", "1:2:3:4:5:6:7", "g:2:3:4:5:6"] {
            assert_eq!(mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn name_servers_are_written_through_links() {
        let lease = Lease { dns: vec![[10, 0, 2, 3].into()], domain: Some("x.internal".into()), ..Lease::default() };
        let text = resolver(&lease);
        assert_eq!(text, "search x.internal\nnameserver 10.0.2.3\n");
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        let path = dir.path().join("etc/resolv.conf");
        std::os::unix::fs::symlink("../run/systemd/resolve/stub-resolv.conf", &path).unwrap();
        put_resolver(&path, &text).unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("run/systemd/resolve/stub-resolv.conf")).unwrap(), text);
        let plain = dir.path().join("plain");
        put_resolver(&plain, "y").unwrap();
        assert_eq!(fs::read(plain).unwrap(), b"y");
    }

    #[test]
    fn waiting_ends() {
        let (line, done) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let coming = Coming { line: Some(line), until: Instant::now() + Duration::from_millis(50) };
        coming.wait();
        assert!(Instant::now() >= coming.until);
        drop(done);
        Coming { until: Instant::now() + Duration::from_secs(60), ..coming }.wait();
        Coming::none().wait();
    }
}
