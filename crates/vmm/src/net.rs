//! The guest's network: what the user asks for, and the opening of it. What serves it is a process of its own (`nat::server`), except
//! for a TAP device, which is the kernel's.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::str::FromStr;

use nat::NatConfig;
use nat::relay::Relay;
use nat::sandbox::Confinement;
use nat::server::{MAX_FORWARDS, Protocol, Role};
use virtio::{Offloads, Port};

use crate::config::SandboxMode;
use crate::error::Error;

/// Largest packet without its Ethernet header, in bytes: Ethernet's own.
const MTU: u16 = 1500;
/// The interface's address in a network of its own.
const OWN_MAC: [u8; 6] = [0x52, 0x54, 0x67, 0x00, 0x02, 0x0f];

/// `--net`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetConfig {
    /// No network interface.
    #[default]
    None,
    /// User-mode network with address translation.
    User(UserNet),
    /// A TAP device of this name, which exists already.
    Tap {
        /// Its name.
        name: String,
        /// The interface's address; a random one if none.
        mac: Option<[u8; 6]>,
    },
    /// A Unix socket to another VM or to a network backend.
    Socket {
        /// Where it is.
        path: PathBuf,
        /// Which kind.
        kind: SocketKind,
        /// The interface's address; a random one if none.
        mac: Option<[u8; 6]>,
    },
}

/// The kinds of `--net socket:`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SocketKind {
    /// Connect to a stream socket.
    Connect,
    /// Listen; whoever connects is at the other end.
    Listen,
    /// A datagram socket: bound to this path, and connected to the other.
    Datagram(PathBuf),
}

/// The options of `--net user`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UserNet {
    /// The guest reaches nothing outside.
    pub isolated: bool,
    /// The guest does not reach the host's own services.
    pub no_host: bool,
    /// Bytes a second in each direction.
    pub rate: Option<u64>,
    /// Name servers to ask instead of the host's own.
    pub dns: Vec<SocketAddr>,
    /// The interface's address.
    pub mac: Option<[u8; 6]>,
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_at(text.find([':', ',']).unwrap_or(text.len()));
        let (value, options) = match rest.strip_prefix(':') {
            Some(rest) => rest.split_at(rest.find(',').unwrap_or(rest.len())),
            None => ("", rest),
        };
        let options = options.split(',').skip(1);
        match (kind, value) {
            ("none", "") if rest.is_empty() => Ok(Self::None),
            ("user", "") if !rest.starts_with(':') => UserNet::parse(options).map(Self::User),
            ("tap", name) if !name.is_empty() => {
                let (mut mac, name) = (None, name.to_owned());
                for option in options {
                    match option.split_once('=') {
                        Some(("mac", value)) => mac = Some(parse_mac(value)?),
                        _ => return Err(format!("'{option}' is no option of a TAP device: only mac=ADDRESS is")),
                    }
                }
                Ok(Self::Tap { name, mac })
            }
            ("socket", path) if !path.is_empty() => {
                let (mut mac, mut kind) = (None, SocketKind::Connect);
                for option in options {
                    match option.split_once('=') {
                        None if option == "listen" => kind = SocketKind::Listen,
                        Some(("local", path)) if !path.is_empty() => kind = SocketKind::Datagram(path.into()),
                        Some(("mac", value)) => mac = Some(parse_mac(value)?),
                        _ => {
                            return Err(format!(
                                "'{option}' is no option of a network socket: listen, local=PATH and mac=ADDRESS are"
                            ));
                        }
                    }
                }
                Ok(Self::Socket { path: path.into(), kind, mac })
            }
            _ => Err(format!("'{text}' is no network: choose user, none, tap:NAME or socket:PATH")),
        }
    }
}

impl UserNet {
    fn parse<'a>(options: impl Iterator<Item = &'a str>) -> Result<Self, String> {
        let mut net = Self::default();
        for option in options {
            match option.split_once('=').unwrap_or((option, "")) {
                ("isolated", "") => net.isolated = true,
                ("host", "on") => net.no_host = false,
                ("host", "off") => net.no_host = true,
                ("rate", value) => net.rate = Some(parse_rate(value)?),
                ("dns", value) => net.dns.push(parse_dns(value)?),
                ("mac", value) => net.mac = Some(parse_mac(value)?),
                _ => {
                    return Err(format!(
                        "'{option}' is no option of the user-mode network: isolated, host=off, rate=BITS, dns=ADDRESS and mac=ADDRESS are"
                    ));
                }
            }
        }
        Ok(net)
    }
}

fn parse_mac(text: &str) -> Result<[u8; 6], String> {
    let wrong = || format!("'{text}' is no address of a network interface: write for example 52:54:00:12:34:56");
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
        *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
    }
    let group = mac.first().is_some_and(|first| first & 1 != 0);
    if parts.next().is_some() || group || mac == [0; 6] { Err(wrong()) } else { Ok(mac) }
}

/// Bits a second, with a factor of 1000; returns bytes.
fn parse_rate(text: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is no rate: write bits a second, for example 512k, 100M or 1G");
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (text.get(..at), 1000),
        Some((at, 'M' | 'm')) => (text.get(..at), 1_000_000),
        Some((at, 'G' | 'g')) => (text.get(..at), 1_000_000_000),
        _ => (Some(text), 1),
    };
    let number: u64 = digits.unwrap_or_default().parse().map_err(|_| wrong())?;
    let bits = number.checked_mul(factor).ok_or_else(wrong)?;
    if bits < 8000 { Err(format!("a rate of {text} bits a second is too low: 8k is the least")) } else { Ok(bits / 8) }
}

fn parse_dns(text: &str) -> Result<SocketAddr, String> {
    text.parse::<SocketAddr>()
        .or_else(|_| text.parse::<IpAddr>().map(|address| SocketAddr::new(address, 53)))
        .map_err(|_| format!("'{text}' is no address of a name server: write ADDRESS or ADDRESS:PORT"))
}

/// `-p [ADDRESS:]PORT:GUESTPORT[/udp]`
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForward {
    /// Of the host; the loopback interface if none.
    pub address: Option<IpAddr>,
    /// Of the host; 0 for any that is free.
    pub port: u16,
    /// Of the guest.
    pub guest_port: u16,
    /// TCP or UDP?
    pub udp: bool,
}

impl FromStr for PortForward {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "'{text}' forwards no port: write HOSTPORT:GUESTPORT, for example 8080:80, 0.0.0.0:8080:80 or 5353:53/udp"
            )
        };
        let (ports, udp) = match text.split_once('/') {
            None | Some((_, "tcp")) => (text.split('/').next().unwrap_or_default(), false),
            Some((ports, "udp")) => (ports, true),
            Some(_) => return Err(wrong()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let (address, port) = match rest.rsplit_once(':') {
            Some((address, port)) => {
                let plain = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(address);
                (Some(plain.parse().map_err(|_| wrong())?), port)
            }
            None => (None, rest),
        };
        let number = |text: &str| text.parse::<u16>().map_err(|_| wrong());
        let (port, guest_port) = (number(port)?, number(guest)?);
        if guest_port == 0 {
            return Err(wrong());
        }
        Ok(Self { address, port, guest_port, udp })
    }
}

/// A network that is open.
pub(crate) struct Network {
    pub port: Port,
    pub mac: [u8; 6],
    pub mtu: u16,
    /// Lines for the user.
    pub lines: Vec<String>,
}

/// What the network is opened with.
pub(crate) struct Opening<'a> {
    pub config: &'a NetConfig,
    pub forwards: &'a [PortForward],
    /// The program that becomes the network server, and its argument.
    pub server: Option<&'a (PathBuf, String)>,
    pub sandbox: SandboxMode,
    /// The server's standard error.
    pub errors: fn() -> Stdio,
}

fn input(text: String) -> Error {
    Error::Input(text)
}

impl Opening<'_> {
    /// Opens it; `None` for no network. To be called before the process confines itself.
    pub(crate) fn open(&self) -> Result<Option<Network>, Error> {
        if !self.forwards.is_empty() && !matches!(self.config, NetConfig::User(_)) {
            return Err(input(
                "ports are forwarded by the user-mode network only: leave -p away or use --net user".into(),
            ));
        }
        match self.config {
            NetConfig::None => Ok(None),
            NetConfig::User(user) => self.user(user).map(Some),
            NetConfig::Tap { name, mac } => {
                let port = Port::tap(open_tap(name)?).map_err(|error| host(&error))?;
                Ok(Some(Network { port, mac: mac.map_or_else(random_mac, Ok)?, mtu: MTU, lines: Vec::new() }))
            }
            NetConfig::Socket { path, kind, mac } => {
                let (relay, socket) = open_socket(path, kind)?;
                let port = self.serve(Role::Relay(relay), &[socket], Offloads::default())?;
                Ok(Some(Network { port, mac: mac.map_or_else(random_mac, Ok)?, mtu: MTU, lines: Vec::new() }))
            }
        }
    }

    fn user(&self, user: &UserNet) -> Result<Network, Error> {
        let mac = user.mac.unwrap_or(OWN_MAC);
        let mut config = NatConfig::of_host(mac);
        config.mtu = MTU;
        config.isolated = user.isolated;
        config.host = !user.no_host;
        config.rate = user.rate;
        if !user.dns.is_empty() {
            config.resolvers.clone_from(&user.dns);
        }
        let (mut ports, mut sockets, mut lines) = (Vec::new(), Vec::new(), Vec::new());
        for forward in self.forwards {
            for (socket, line) in bind(forward)? {
                sockets.push(socket);
                ports.push((if forward.udp { Protocol::Udp } else { Protocol::Tcp }, forward.guest_port));
                lines.extend(line);
            }
        }
        if sockets.len() > MAX_FORWARDS {
            return Err(input(format!("too many forwarded ports: there can be {}", MAX_FORWARDS / 2)));
        }
        let port = self.serve(Role::Nat(config, ports), &sockets, Offloads::ALL)?;
        Ok(Network { port, mac, mtu: MTU, lines })
    }

    fn serve(&self, role: Role, sockets: &[OwnedFd], offloads: Offloads) -> Result<Port, Error> {
        let cannot =
            |why: String| Error::Host(format!("cannot start the network server ({why}): --net none runs without"));
        let (program, argument) = self.server.ok_or_else(|| cannot("no program for it is known".into()))?;
        let confinement = if self.sandbox == SandboxMode::Off { Confinement::Off } else { Confinement::On };
        let cable = nat::server::start(program, argument, role, confinement, sockets, (self.errors)());
        cable.and_then(|cable| Port::server(cable, offloads)).map_err(|error| cannot(error.to_string()))
    }
}

fn host(error: &io::Error) -> Error {
    Error::Host(format!("the network cannot be opened: {error}"))
}

/// The sockets of a forwarded port, and a line for the user if the port's number is not known beforehand. Without an address it is
/// that of the loopback interface by IPv4, and by IPv6 where there is that.
fn bind(forward: &PortForward) -> Result<Vec<(OwnedFd, Option<String>)>, Error> {
    let first = SocketAddr::new(forward.address.unwrap_or(Ipv4Addr::LOCALHOST.into()), forward.port);
    let (socket, at) = bind_one(first, forward.udp).map_err(|error| {
        let kind = if forward.udp { "UDP" } else { "TCP" };
        let (port, address) = (first.port(), first.ip());
        input(match error.kind() {
            io::ErrorKind::AddrInUse => format!("{kind} port {port} of {address} is in use: choose another one for -p"),
            io::ErrorKind::PermissionDenied => {
                format!("{kind} port {port} may not be used by this user: choose one from 1024 on for -p")
            }
            io::ErrorKind::AddrNotAvailable => {
                format!("{address} is no address of this host: choose another one for -p")
            }
            _ => format!("{kind} port {port} of {address} cannot be opened: {error}"),
        })
    })?;
    let line = (forward.port == 0).then(|| {
        let kind = if forward.udp { "/udp" } else { "" };
        format!("{at} leads to port {}{kind} of the guest", forward.guest_port)
    });
    let mut sockets = vec![(socket, line)];
    if forward.address.is_none() {
        let second = SocketAddr::new(Ipv6Addr::LOCALHOST.into(), at.port());
        sockets.extend(bind_one(second, forward.udp).ok().map(|(socket, _)| (socket, None)));
    }
    Ok(sockets)
}

fn bind_one(at: SocketAddr, udp: bool) -> io::Result<(OwnedFd, SocketAddr)> {
    if udp {
        let socket = UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        let at = socket.local_addr()?;
        Ok((socket.into(), at))
    } else {
        let socket = TcpListener::bind(at)?;
        socket.set_nonblocking(true)?;
        let at = socket.local_addr()?;
        Ok((socket.into(), at))
    }
}

/// An address that nobody else has, with all likelihood: one that is locally administered.
fn random_mac() -> Result<[u8; 6], Error> {
    let mut mac = [0x52, 0x54, 0x67, 0, 0, 0];
    let random = mac.get_mut(3..).unwrap_or_default();
    rustix::rand::getrandom(random, rustix::rand::GetRandomFlags::empty()).map_err(|error| host(&error.into()))?;
    Ok(mac)
}

fn open_socket(path: &Path, kind: &SocketKind) -> Result<(Relay, OwnedFd), Error> {
    let what = "network socket";
    let connect_error = |path: &Path, error: io::Error| {
        let problem = match (error.kind(), error.raw_os_error()) {
            (io::ErrorKind::NotFound, _) => "does not exist: start its other end first".to_string(),
            (io::ErrorKind::ConnectionRefused, _) => "has nobody listening: start its other end first".to_string(),
            (io::ErrorKind::PermissionDenied, _) => "may not be used by this user: check its permissions".to_string(),
            (_, Some(libc::EPROTOTYPE)) if *kind == SocketKind::Connect => {
                "is a datagram socket: add local=PATH for this end's own".to_string()
            }
            (_, Some(libc::EPROTOTYPE)) => "is a stream socket: leave local=PATH away".to_string(),
            _ => error.to_string(),
        };
        Error::file(what, path, problem)
    };
    let bind_error = |path: &Path, error: io::Error| {
        let problem = match error.kind() {
            io::ErrorKind::AddrInUse => "exists already: remove it, or choose another name".to_string(),
            io::ErrorKind::NotFound => "cannot be made: its directory does not exist".to_string(),
            io::ErrorKind::PermissionDenied => "may not be made by this user: choose another place".to_string(),
            _ => error.to_string(),
        };
        Error::file(what, path, problem)
    };
    match kind {
        SocketKind::Connect => {
            let socket = UnixStream::connect(path).map_err(|error| connect_error(path, error))?;
            Ok((Relay::Stream, socket.into()))
        }
        SocketKind::Listen => {
            let socket = listen(path).map_err(|error| bind_error(path, error))?;
            Ok((Relay::Listener, socket.into()))
        }
        SocketKind::Datagram(local) => {
            remove_stale(local);
            let socket = UnixDatagram::bind(local).map_err(|error| bind_error(local, error))?;
            socket.connect(path).map_err(|error| connect_error(path, error))?;
            Ok((Relay::Datagram, socket.into()))
        }
    }
}

fn listen(path: &Path) -> io::Result<UnixListener> {
    // One left behind by a process that is gone.
    if UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
        remove_stale(path);
    }
    UnixListener::bind(path)
}

/// Removes a socket that nobody has open. (A datagram socket in use takes a connection.)
fn remove_stale(path: &Path) {
    use std::os::unix::fs::FileTypeExt;
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let in_use = UnixDatagram::unbound().and_then(|socket| socket.connect(path)).is_ok();
    if is_socket && !in_use {
        let _ = std::fs::remove_file(path);
    }
}

/// Opens the TAP device `name` with headers for offloads (Linux, Documentation/networking/tuntap.rst).
fn open_tap(name: &str) -> Result<OwnedFd, Error> {
    let what = format!("TAP device {name}");
    let wrong = |problem: &str| input(format!("{what}: {problem}"));
    let make = format!("make it (ip tuntap add {name} mode tap user $USER)");
    if name.len() >= libc::IFNAMSIZ || name.contains(['/', ' ']) || name.contains('\0') {
        return Err(wrong("the name of a network device has at most 15 characters, none of them / or a space"));
    }
    let exists = CString::new(name).is_ok_and(|name| {
        // SAFETY: the name ends in a zero. (A look into /sys would be of the network namespace that it was mounted in.)
        unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
    });
    if !exists {
        return Err(wrong(&format!("there is no such device: {make}")));
    }
    let path = Path::new("/dev/net/tun");
    let file = File::options().read(true).write(true).open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => wrong("this host has no /dev/net/tun: load the kernel module tun"),
        io::ErrorKind::PermissionDenied => wrong("/dev/net/tun may not be opened by this user: check its permissions"),
        _ => wrong(&format!("/dev/net/tun: {error}")),
    })?;
    // struct ifreq: the name in 16 bytes, then the flags.
    let mut request = [0u8; 40];
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as u16;
    let bytes = name.bytes().chain(std::iter::repeat(0)).take(libc::IFNAMSIZ).chain(flags.to_ne_bytes());
    request.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
    // SAFETY: TUNSETIFF reads and writes a struct ifreq, which has 40 bytes.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, request.as_mut_ptr()) } != 0 {
        let error = io::Error::last_os_error();
        return Err(match error.raw_os_error() {
            Some(libc::EPERM) => wrong("may not be used by this user: its owner is another"),
            Some(libc::EBUSY) => wrong("is in use by another process"),
            Some(libc::EINVAL) => wrong("is not a TAP device of one queue"),
            _ => wrong(&error.to_string()),
        });
    }
    let size = virtio::net::HEADER as libc::c_int;
    // SAFETY: TUNSETVNETHDRSZ reads an int.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ as _, &raw const size) } != 0 {
        return Err(wrong(&io::Error::last_os_error().to_string()));
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks() {
        assert_eq!("none".parse(), Ok(NetConfig::None));
        assert_eq!("user".parse(), Ok(NetConfig::User(UserNet::default())));
        let all = "user,isolated,host=off,rate=100M,dns=127.0.0.1:5353,dns=::1,mac=52:54:00:00:00:01".parse();
        assert_eq!(
            all,
            Ok(NetConfig::User(UserNet {
                isolated: true,
                no_host: true,
                rate: Some(12_500_000),
                dns: vec!["127.0.0.1:5353".parse().unwrap(), "[::1]:53".parse().unwrap()],
                mac: Some([0x52, 0x54, 0, 0, 0, 1]),
            }))
        );
        assert_eq!("tap:tap0".parse(), Ok(NetConfig::Tap { name: "tap0".into(), mac: None }));
        let socket = |kind| Ok(NetConfig::Socket { path: "/a:b".into(), kind, mac: None });
        assert_eq!("socket:/a:b".parse(), socket(SocketKind::Connect));
        assert_eq!("socket:/a:b,listen".parse(), socket(SocketKind::Listen));
        assert_eq!("socket:/a:b,local=/c".parse(), socket(SocketKind::Datagram("/c".into())));
        for bad in [
            "",
            "users",
            "user:x",
            "user,x",
            "user,rate=",
            "user,rate=5",
            "user,rate=99999999999999G",
            "user,dns=x",
            "tap",
            "tap:",
            "tap:a,b",
            "socket:",
            "socket:/a,local=",
            "none,x",
            "user,mac=1",
            "user,mac=01:00:00:00:00:00",
            "user,mac=52:54:00:00:00:01:02",
        ] {
            assert!(bad.parse::<NetConfig>().is_err(), "{bad}");
        }
    }

    #[test]
    fn forwards() {
        let forward = |address: Option<&str>, port, guest_port, udp| {
            Ok(PortForward { address: address.map(|a| a.parse().unwrap()), port, guest_port, udp })
        };
        assert_eq!("8080:80".parse(), forward(None, 8080, 80, false));
        assert_eq!("0:80/tcp".parse(), forward(None, 0, 80, false));
        assert_eq!("0.0.0.0:8080:80".parse(), forward(Some("0.0.0.0"), 8080, 80, false));
        assert_eq!("[::]:5353:53/udp".parse(), forward(Some("::"), 5353, 53, true));
        for bad in ["", "80", "80:", ":80", "80:0", "80:70000", "x:1:2", "1:2/sctp", "1:2:3:4:5"] {
            assert!(bad.parse::<PortForward>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_in_use_are_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let forward = PortForward { address: None, port, guest_port: 80, udp: false };
        let error = bind(&forward).unwrap_err().to_string();
        assert!(error.contains(&format!("port {port}")) && error.contains("in use"), "{error}");
        let any = bind(&PortForward { port: 0, ..forward }).unwrap();
        assert!(any[0].1.as_ref().unwrap().contains("leads to port 80"));
        assert!(
            bind(&PortForward { udp: true, port: 0, address: Some([192, 0, 2, 254].into()), guest_port: 1 }).is_err()
        );
    }

    #[test]
    fn sockets_and_devices_that_cannot_be_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let fails = |path: &Path, kind: SocketKind| open_socket(path, &kind).unwrap_err().to_string();
        assert!(fails(&path, SocketKind::Connect).contains("does not exist"));
        let listener = UnixListener::bind(&path).unwrap();
        assert!(fails(&path, SocketKind::Listen).contains("exists already"));
        let local = dir.path().join("l");
        assert!(fails(&path, SocketKind::Datagram(local.clone())).contains("is a stream socket"));
        drop(listener);
        assert!(fails(&path, SocketKind::Connect).contains("nobody listening"));
        assert!(open_socket(&path, &SocketKind::Listen).is_ok(), "one left behind is replaced");
        let other = dir.path().join("d");
        let _datagram = UnixDatagram::bind(&other).unwrap();
        assert!(open_socket(&other, &SocketKind::Datagram(local)).is_ok());
        assert!(fails(&other, SocketKind::Connect).contains("local=PATH"));
        assert!(open_tap("no-such-tap").unwrap_err().to_string().contains("there is no such device"));
        assert!(open_tap("a-name-that-is-too-long").unwrap_err().to_string().contains("15 characters"));
    }
}
