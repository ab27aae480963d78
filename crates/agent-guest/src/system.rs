//! Calls of the system that no library offers.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// The address of the host.
const HOST: u32 = 2;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all zeros is a valid address.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

const ADDRESS_LEN: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })?;
    // SAFETY: just made, nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(socket: &OwnedFd, port: u32) -> io::Result<()> {
    let at = address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is a local of that size.
    check(unsafe { libc::bind(socket.as_raw_fd(), (&raw const at).cast(), ADDRESS_LEN) }).map(|_| ())
}

/// A socket of the host's kind that listens at `port`, non-blocking.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = socket()?;
    bind(&socket, port)?;
    // SAFETY: takes no pointers.
    check(unsafe { libc::listen(socket.as_raw_fd(), 128) })?;
    rustix::io::ioctl_fionbio(&socket, true)?;
    Ok(socket)
}

/// Takes a connection if one waits. One that the host did not make is refused: a program in the guest could make it.
pub fn accept(listener: &OwnedFd) -> io::Result<OwnedFd> {
    loop {
        let mut from = address(0, 0);
        let mut len = ADDRESS_LEN;
        // SAFETY: address and length are locals of the right size.
        let fd = check(unsafe {
            libc::accept4(listener.as_raw_fd(), (&raw mut from).cast(), &raw mut len, libc::SOCK_CLOEXEC)
        })?;
        // SAFETY: just made, nobody else has it.
        let connection = unsafe { OwnedFd::from_raw_fd(fd) };
        if from.svm_cid == HOST {
            return Ok(connection);
        }
    }
}

/// Connects to `port` of the host from a port that only root may take.
pub fn connect(port: u32) -> io::Result<OwnedFd> {
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for own in (900..port).rev() {
        let socket = socket()?;
        match bind(&socket, own) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                last = error;
                continue;
            }
            Err(error) => return Err(error),
        }
        let to = address(HOST, port);
        // SAFETY: the address is a local of that size.
        check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const to).cast(), ADDRESS_LEN) })?;
        return Ok(socket);
    }
    Err(last)
}

/// Makes a process that goes on from here; `None` in the new one. Only for processes of one thread.
pub fn fork() -> io::Result<Option<u32>> {
    // SAFETY: this program has one thread, so the child may do everything.
    match check(unsafe { libc::fork() })? {
        0 => Ok(None),
        pid => Ok(Some(pid.unsigned_abs())),
    }
}

/// Are ended children to be forgotten at once? (Else somebody waits for them.)
pub fn forget_children(forget: bool) {
    // SAFETY: installs no handler.
    unsafe { libc::signal(libc::SIGCHLD, if forget { libc::SIG_IGN } else { libc::SIG_DFL }) };
}

/// A descriptor that gives the signals `signals`, which do nothing else any more.
pub fn signals(signals: &[libc::c_int]) -> io::Result<OwnedFd> {
    // SAFETY: the set is a local, made empty first.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in signals {
            libc::sigaddset(&raw mut set, *signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Undoes what [`signals`] blocked. Programs inherit it, so this is called between fork and exec.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: the set is a local, made empty first.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())).map(|_| ())
    }
}

/// What a new program starts with, called between fork and exec: a session of its own, with a terminal (standard input) or without,
/// ordinary signals, and the rights of a user.
pub fn before_exec(tty: bool, groups: &[u32], gid: u32, uid: u32) -> io::Result<()> {
    // SAFETY: system calls without pointers, but for `groups`, whose length is given.
    unsafe {
        check(libc::setsid())?;
        if tty {
            check(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
        }
        for signal in 1..32 {
            libc::signal(signal, libc::SIG_DFL);
        }
        unblock_signals()?;
        libc::umask(0o022);
        if libc::geteuid() == 0 {
            check(libc::setgroups(groups.len(), groups.as_ptr()))?;
            check(libc::setgid(gid))?;
            check(libc::setuid(uid))?;
        }
    }
    Ok(())
}

/// Loads a module from an open file.
pub fn load_module(file: &std::fs::File) -> io::Result<()> {
    // SAFETY: the parameters are an empty string.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What an ioctl says about a network interface; all else of it is zero.
fn interface(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    Ok(request)
}

fn inet(address: [u8; 4]) -> libc::sockaddr {
    let address = libc::sockaddr_in {
        sin_family: libc::AF_INET as libc::sa_family_t,
        sin_port: 0,
        sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(address) },
        sin_zero: [0; 8],
    };
    // SAFETY: both are plain data of the same size.
    unsafe { std::mem::transmute(address) }
}

fn about_interface(request: libc::Ioctl, about: &mut libc::ifreq) -> io::Result<()> {
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: these requests read and write an ifreq, which `about` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut *about) }).map(|_| ())
}

/// Switches a network interface on; its largest packet becomes `mtu` bytes.
pub fn interface_up(name: &str, mtu: Option<u16>) -> io::Result<()> {
    if let Some(mtu) = mtu {
        let mut about = interface(name)?;
        about.ifr_ifru.ifru_mtu = mtu.into();
        // Not every card can.
        let _ = about_interface(libc::SIOCSIFMTU, &mut about);
    }
    let mut about = interface(name)?;
    about_interface(libc::SIOCGIFFLAGS, &mut about)?;
    // SAFETY: the kernel has just filled this member in.
    let flags = unsafe { about.ifr_ifru.ifru_flags };
    about.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    about_interface(libc::SIOCSIFFLAGS, &mut about)
}

/// Gives a network interface an address, of which the first `prefix` bits name the network. Address 0.0.0.0 takes it away.
pub fn set_address(name: &str, address: [u8; 4], prefix: u8) -> io::Result<()> {
    let mut about = interface(name)?;
    about.ifr_ifru.ifru_addr = inet(address);
    about_interface(libc::SIOCSIFADDR, &mut about)?;
    if address == [0; 4] {
        return Ok(());
    }
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    about.ifr_ifru.ifru_netmask = inet(mask.to_be_bytes());
    about_interface(libc::SIOCSIFNETMASK, &mut about)
}

/// Sends what is for elsewhere to `router`.
pub fn add_default_route(name: &str, router: [u8; 4]) -> io::Result<()> {
    let mut device = interface(name)?.ifr_name;
    // SAFETY: all zeros is a valid value: destination and mask 0.0.0.0.
    let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
    (route.rt_dst, route.rt_genmask, route.rt_gateway) = (inet([0; 4]), inet([0; 4]), inet(router));
    route.rt_flags = libc::RTF_UP | libc::RTF_GATEWAY;
    route.rt_dev = device.as_mut_ptr();
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    // SAFETY: this request reads an rtentry, and the name that it points to, which ends with a zero and lives till then.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCADDRT, &raw const route) }).map(|_| ())
}

/// Has a socket send and receive by one network interface only.
pub fn bind_to_interface(socket: std::os::fd::BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let (text, len) = (name.as_ptr(), name.len() as libc::socklen_t);
    // SAFETY: the option's value is `len` bytes at `text`.
    let done =
        unsafe { libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, text.cast(), len) };
    check(done).map(|_| ())
}

/// Sends a signal to a process group.
pub fn kill_group(group: u32, signal: u8) {
    if let Ok(group) = libc::pid_t::try_from(group)
        && group > 1
    {
        // SAFETY: takes no pointers.
        unsafe { libc::kill(-group, signal.into()) };
    }
}

/// Sends a signal to all processes but this one.
pub fn kill_all(signal: libc::c_int) {
    // SAFETY: takes no pointers. (-1 is everybody, as process 1 or root mean it.)
    unsafe { libc::kill(-1, signal) };
}

/// Sends a signal to one process.
pub fn kill(process: u32, signal: libc::c_int) {
    if let Ok(process) = libc::pid_t::try_from(process)
        && process > 1
    {
        // SAFETY: takes no pointers.
        unsafe { libc::kill(process, signal) };
    }
}
