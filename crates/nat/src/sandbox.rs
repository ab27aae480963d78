//! The network server confines itself before the first frame of the guest: what can be had through a flaw in it is the guest's own
//! network and nothing else.
//!
//! * Landlock (where the host has it): no file, no listening TCP port, no signal to and no abstract socket of other processes; without
//!   leave to connect, no TCP connection.
//! * seccomp: an allow-list around sockets of the Internet families; no files, no programs, no processes, no executable memory.
//! * no new privileges, not dumpable, no core files.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};
use serde::{Deserialize, Serialize};

/// How the process confines itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confinement {
    /// By all means; a forbidden system call ends the process.
    On,
    /// Not at all: for debuggers.
    Off,
}

/// What it must be able to do all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Connect to others: NAT.
    Connect,
    /// Only what is open already, and what connects to that.
    Accept,
}

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("cannot confine the network server ({what}: {why})")]
pub struct SandboxError {
    what: &'static str,
    why: String,
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> SandboxError {
    move |why| SandboxError { what, why: why.to_string() }
}

/// Confines the process, which has one thread, for good.
///
/// # Errors
/// The host refuses.
pub fn confine(needs: Needs) -> Result<(), SandboxError> {
    rustix::thread::set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("dumpable"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed("core limit"))?;
    landlock(needs).map_err(failed("Landlock"))?;
    let program = filter(needs).map_err(failed("seccomp"))?;
    seccompiler::apply_filter(&program).map_err(failed("seccomp"))
}

fn landlock(needs: Needs) -> Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    let net = match needs {
        Needs::Connect => AccessNet::BindTcp.into(),
        Needs::Accept => AccessNet::from_all(abi),
    };
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(net)?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn filter(needs: Needs) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<Rule>> = [
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_close,
        libc::SYS_accept4,
        libc::SYS_shutdown,
        libc::SYS_getsockname,
        libc::SYS_getsockopt,
        libc::SYS_setsockopt,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_epoll_ctl,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_restart_syscall,
        libc::SYS_clock_gettime,
        libc::SYS_getrandom,
        libc::SYS_exit,
        libc::SYS_exit_group,
    ]
    .map(|call| (call, vec![]))
    .into();
    let masked = |index: u8, mask: u64, value: u64| -> Result<Rule, _> {
        Rule::new(vec![Condition::new(index, Len::Dword, Op::MaskedEq(mask), value)?])
    };
    // The standard library looks whether a descriptor that it closes is open, in builds with such checks.
    rules.insert(libc::SYS_fcntl, vec![masked(1, u64::MAX, libc::F_GETFD as u64)?]);
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    if needs == Needs::Connect {
        // No raw sockets, whatever rights the user has.
        let socket = |family: i32, kind: i32| -> Result<Rule, _> {
            Rule::new(vec![
                Condition::new(0, Len::Dword, Op::Eq, family as u64)?,
                Condition::new(1, Len::Dword, Op::MaskedEq(0xff), kind as u64)?,
            ])
        };
        let mut sockets = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM] {
                sockets.push(socket(family, kind)?);
            }
        }
        rules.insert(libc::SYS_socket, sockets);
        rules.insert(libc::SYS_connect, vec![]);
    }
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output, Stdio};

    const DEED: &str = "NAT_TEST_DEED";

    /// Runs `deed` (an arm of the match in [`in_the_sandbox`]) in a process of its own.
    fn try_in_sandbox(deed: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::in_the_sandbox", "--nocapture", "--test-threads=1"])
            .env(DEED, deed)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Not a test by itself: the inside of the processes that the tests below start.
    #[test]
    fn in_the_sandbox() {
        let Ok(deed) = std::env::var(DEED) else { return };
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let needs = if deed.starts_with("relay") { Needs::Accept } else { Needs::Connect };
        confine(needs).unwrap();
        match deed.as_str() {
            "connect" => {
                drop(TcpStream::connect(address).unwrap());
                drop(listener.accept().unwrap());
            }
            "relay connect" => drop(TcpStream::connect(address)),
            "open" => drop(std::fs::File::open("/proc/version")),
            "execve" => drop(Command::new("/bin/true").status()),
            "unix socket" => drop(std::os::unix::net::UnixStream::pair()),
            "bind" => drop(UdpSocket::bind("127.0.0.1:0")),
            "thread" => drop(std::thread::Builder::new().spawn(|| ())),
            other => panic!("no deed {other}"),
        }
        std::process::exit(7);
    }

    #[test]
    fn what_is_needed_works_and_nothing_else() {
        let done = try_in_sandbox("connect");
        assert_eq!(done.status.code(), Some(7), "{done:?}");
        for deed in ["relay connect", "open", "execve", "unix socket", "bind", "thread"] {
            let done = try_in_sandbox(deed);
            assert_eq!(done.status.signal(), Some(libc::SIGSYS), "{deed}: {done:?}");
        }
    }
}
