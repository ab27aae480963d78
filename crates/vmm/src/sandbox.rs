//! The process confines itself before the first guest instruction.
//!
//! Two steps, because Landlock binds only threads started later, and seccomp should come when all the work of starting is done:
//!
//! 1. [`before_threads`], once every file is open: no new privileges, no core dumps and no reading of this process by others of the
//!    same user, Landlock without a single exception (no file, no TCP connection, no signal to other processes can be had).
//! 2. [`close`], once everything is built: a seccomp allow-list for all threads. It has no `open`, `execve`, `socket` or `connect`;
//!    `mmap` and `mprotect` cannot make memory executable (an engine that generates code maps its cache before);
//!    `clone` makes threads only; `ptrace` is for the processes that guest programs run in, which were started before.
//!
//! A violation kills the process. What this protects and what not: `docs/threat-model.md`.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};

use crate::config::SandboxMode;
use crate::error::Error;

static CLOSED: AtomicBool = AtomicBool::new(false);

/// Is the seccomp filter in place?
pub fn closed() -> bool {
    CLOSED.load(Ordering::Relaxed)
}

/// What the VM needs beyond the usual.
#[derive(Clone, Debug, Default)]
pub(crate) struct Needs {
    /// Accepting connections on sockets that already listen, and talking on them.
    pub sockets: bool,
    /// What engine `kvm` asks of the kernel.
    pub kvm: bool,
    /// A network interface: telling a TAP device what the guest takes, and a network server that it is not needed any more.
    pub network: bool,
    /// Disks whose requests io_uring carries out.
    pub uring: bool,
    /// Other commands find this VM: they connect, and the guest's connections have Unix sockets at the host's end.
    pub instance: bool,
    /// Processes that guest programs run in.
    pub programs: Vec<u32>,
}

fn host(what: &str) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::Host(format!("cannot confine the process ({what}: {error}): --no-sandbox runs without"))
}

/// To be called at the start of the process, before it has threads: a C library that keeps one heap only does not read files
/// when it shrinks one.
pub(crate) fn at_start() {
    // SAFETY: sets a parameter of the allocator.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}

/// Step 1. Only this thread and those it starts from now on are bound by Landlock.
pub(crate) fn before_threads(mode: SandboxMode) -> Result<(), Error> {
    if mode == SandboxMode::Off {
        return Ok(());
    }
    let check = |result: i32| if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
    // SAFETY: these set attributes of this process and take no pointers but to a local.
    unsafe {
        check(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)).map_err(host("no_new_privs"))?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0)).map_err(host("dumpable"))?;
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        check(libc::setrlimit(libc::RLIMIT_CORE, &none)).map_err(host("core limit"))?;
    }
    landlock_everything().map_err(|error| Error::Host(format!("cannot confine the process (Landlock: {error})")))
}

/// Takes away all that Landlock knows of on this host. Hosts without Landlock are left as they are.
fn landlock_everything() -> Result<(), landlock::RulesetError> {
    use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, Scope};
    let abi = ABI::V6;
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()?;
    Ok(())
}

/// Step 2: the seccomp filter, for all threads.
pub(crate) fn close(mode: SandboxMode, needs: Needs) -> Result<(), Error> {
    let violation = match mode {
        SandboxMode::Off => return Ok(()),
        SandboxMode::On => SeccompAction::KillProcess,
        SandboxMode::Debug => {
            name_violations();
            SeccompAction::Trap
        }
    };
    let compile = |filter: Result<SeccompFilter, seccompiler::BackendError>| -> Result<BpfProgram, Error> {
        filter
            .and_then(TryInto::try_into)
            .map_err(|error| Error::Host(format!("cannot confine the process (seccomp: {error})")))
    };
    // clone3 passes its flags in memory, where no filter sees them: say it does not exist, and the C library uses clone. The others
    // take a path; the standard library calls them for the sizes of open files, and does without.
    let absent = compile(SeccompFilter::new(
        ABSENT.map(|call| (call, vec![])).into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
        TargetArch::x86_64,
    ))?;
    let main = compile(SeccompFilter::new(
        allowed(needs).map_err(|error| Error::Host(format!("cannot confine the process (seccomp: {error})")))?,
        violation,
        SeccompAction::Allow,
        TargetArch::x86_64,
    ))?;
    for program in [absent, main] {
        seccompiler::apply_filter_all_threads(&program)
            .map_err(|error| Error::Host(format!("cannot confine the process (seccomp: {error})")))?;
    }
    CLOSED.store(true, Ordering::SeqCst);
    Ok(())
}

/// System calls that this process is told do not exist, instead of being killed for trying.
const ABSENT: [i64; 3] = [libc::SYS_clone3, libc::SYS_statx, libc::SYS_newfstatat];

/// The allow-list.
fn allowed(needs: Needs) -> Result<BTreeMap<i64, Vec<Rule>>, seccompiler::BackendError> {
    // The other filter, which says that they do not exist, decides on these.
    let mut rules = BTreeMap::from(ABSENT.map(|call| (call, vec![])));
    for call in [
        // Files that are open.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_readv,
        libc::SYS_writev,
        libc::SYS_pread64,
        libc::SYS_pwrite64,
        libc::SYS_preadv,
        libc::SYS_pwritev,
        libc::SYS_preadv2,
        libc::SYS_pwritev2,
        libc::SYS_lseek,
        libc::SYS_fstat,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_fallocate,
        // A qcow2 image grows with what the guest writes.
        libc::SYS_ftruncate,
        libc::SYS_close,
        libc::SYS_poll,
        libc::SYS_ppoll,
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_ctl,
        libc::SYS_eventfd2,
        // Memory, never executable (see below for mmap and mprotect).
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        // Threads.
        libc::SYS_futex,
        libc::SYS_membarrier,
        libc::SYS_rseq,
        libc::SYS_set_robust_list,
        libc::SYS_sched_yield,
        libc::SYS_sched_getaffinity,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // Signals.
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_sigaltstack,
        libc::SYS_restart_syscall,
        // Time.
        libc::SYS_clock_gettime,
        libc::SYS_clock_nanosleep,
        libc::SYS_nanosleep,
        libc::SYS_timerfd_settime,
        libc::SYS_timer_create,
        libc::SYS_timer_settime,
        libc::SYS_timer_delete,
        libc::SYS_getrusage,
        // Entropy.
        libc::SYS_getrandom,
        // Whose terminal is it?
        libc::SYS_getpgrp,
        libc::SYS_getpgid,
    ] {
        rules.insert(call, vec![]);
    }
    let equals = |index: u8, value: u64| -> Result<Rule, _> {
        Rule::new(vec![Condition::new(index, Len::Dword, Op::Eq, value)?])
    };
    let masked = |index: u8, mask: u64, value: u64| -> Result<Rule, _> {
        Rule::new(vec![Condition::new(index, Len::Dword, Op::MaskedEq(mask), value)?])
    };
    let one_of = |index: u8, values: &[u64]| -> Result<Vec<Rule>, _> {
        values.iter().map(|&value| equals(index, value)).collect()
    };
    rules.insert(libc::SYS_mmap, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, libc::PROT_EXEC as u64, 0)?]);
    let thread = (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND) as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread, thread)?]);
    let pid = u64::from(std::process::id());
    let programs: Vec<u64> = needs.programs.iter().copied().map(u64::from).collect();
    rules.insert(libc::SYS_tgkill, one_of(0, &[&[pid][..], &programs].concat())?);
    if !programs.is_empty() {
        // Setting the debug registers of these processes. None is started, nor is the memory of another read.
        let mut allowed = Vec::new();
        for request in runner::PTRACE_REQUESTS {
            for &program in &programs {
                allowed.push(Rule::new(vec![
                    Condition::new(0, Len::Dword, Op::Eq, request)?,
                    Condition::new(1, Len::Dword, Op::Eq, program)?,
                ])?);
            }
        }
        rules.insert(libc::SYS_ptrace, allowed);
        rules.insert(libc::SYS_wait4, one_of(0, &programs)?);
        // On the core that their vCPU's thread is on.
        rules.insert(libc::SYS_sched_setaffinity, one_of(0, &[&[0][..], &programs].concat())?);
    }
    rules.insert(libc::SYS_kill, vec![equals(0, pid)?]);
    // A thread's name, and how exact its timers are: threads that have just been started set them.
    rules.insert(libc::SYS_prctl, one_of(0, &[libc::PR_SET_NAME as u64, libc::PR_SET_TIMERSLACK as u64])?);
    const ARCH_SET_GS: u64 = 0x1001;
    rules.insert(libc::SYS_arch_prctl, vec![equals(0, ARCH_SET_GS)?]);
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, &[libc::F_GETFL as u64, libc::F_SETFL as u64, libc::F_GETFD as u64, libc::F_DUPFD_CLOEXEC as u64])?,
    );
    let mut requests = vec![
        libc::TCGETS,
        libc::TCSETS,
        libc::TCSETSW,
        libc::TCSETSF,
        libc::TCGETS2,
        libc::TCSETS2,
        libc::TCSETSW2,
        libc::TCSETSF2,
        libc::TIOCGPGRP,
        libc::TIOCGWINSZ,
        libc::FIONBIO,
    ];
    if !programs.is_empty() {
        // Hearing of their stops, and answering.
        requests.extend(runner::LISTENER_REQUESTS);
    }
    if needs.kvm {
        // None of them makes a VM, a vCPU or a device, adds memory or switches a capability on.
        requests.extend(kvm::after_start());
    }
    if needs.network {
        rules.insert(libc::SYS_shutdown, vec![]);
        requests.push(libc::TUNSETOFFLOAD);
    }
    rules.insert(libc::SYS_ioctl, one_of(1, &requests)?);
    if needs.uring {
        // To rings that were made before, which take reads, writes and syncs of the disks and nothing else (virtio::block).
        rules.insert(libc::SYS_io_uring_enter, vec![]);
    }
    if needs.instance {
        rules.insert(libc::SYS_socketpair, vec![equals(0, libc::AF_UNIX as u64)?]);
        rules.insert(libc::SYS_sendmsg, vec![]);
        rules.insert(libc::SYS_recvmsg, vec![]);
        // Whose is a connection?
        let option = |name: i32| -> Result<Rule, _> {
            Rule::new(vec![
                Condition::new(1, Len::Dword, Op::Eq, libc::SOL_SOCKET as u64)?,
                Condition::new(2, Len::Dword, Op::Eq, name as u64)?,
            ])
        };
        rules.insert(libc::SYS_getsockopt, vec![option(libc::SO_PEERCRED)?]);
        rules.insert(libc::SYS_geteuid, vec![]);
    }
    if needs.sockets || needs.instance {
        for call in [libc::SYS_accept4, libc::SYS_recvfrom, libc::SYS_sendto, libc::SYS_shutdown, libc::SYS_setsockopt]
        {
            rules.insert(call, vec![]);
        }
    }
    Ok(rules)
}

/// Makes a trapped system call name itself and end the process.
fn name_violations() {
    extern "C" fn violation(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // The number is at a fixed place of the siginfo of SIGSYS (sigaction(2): si_call_addr, then si_syscall).
        // SAFETY: the kernel passes a complete siginfo of 128 bytes, aligned to 8.
        let number = unsafe { info.cast::<u8>().add(24).cast::<i32>().read() };
        crate::terminal::restore();
        let mut text = *b"tightrope: the sandbox forbids system call number     \n";
        let mut rest = number.unsigned_abs();
        for slot in text.iter_mut().rev().skip(1).take(4) {
            *slot = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
        // SAFETY: writes a local buffer to standard error and ends the process; both are async-signal-safe.
        unsafe {
            libc::write(2, text.as_ptr().cast(), text.len());
            libc::_exit(128 + libc::SIGSYS);
        }
    }
    // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = violation as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output, Stdio};

    const DEED: &str = "TIGHTROPE_TEST_DEED";
    const MODE: &str = "TIGHTROPE_TEST_MODE";

    /// Runs `deed` (an arm of the match in [`in_the_sandbox`]) in a process of its own.
    fn try_in_sandbox(deed: &str, mode: &str) -> Output {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "sandbox::tests::in_the_sandbox", "--nocapture", "--test-threads=1"])
            .env(DEED, deed)
            .env(MODE, mode)
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// Not a test by itself: the inside of the processes that the tests below start.
    #[test]
    fn in_the_sandbox() {
        let Ok(deed) = std::env::var(DEED) else { return };
        let mode = match std::env::var(MODE).as_deref() {
            Ok("debug") => SandboxMode::Debug,
            Ok("off") => SandboxMode::Off,
            _ => SandboxMode::On,
        };
        at_start();
        crate::terminal::install_panic_hook();
        let mut open_before = std::fs::File::open("/proc/version").unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        before_threads(mode).unwrap();
        if deed == "landlock" {
            let refused = std::fs::File::open("/etc/passwd").is_err();
            std::process::exit(if refused { 0 } else { 5 });
        }
        close(
            mode,
            Needs {
                sockets: deed == "accept",
                kvm: deed.starts_with("kvm"),
                network: false,
                uring: deed == "uring",
                instance: false,
                programs: Vec::new(),
            },
        )
        .unwrap();
        match deed.as_str() {
            "ordinary" => {
                let mut text = String::new();
                open_before.read_to_string(&mut text).unwrap();
                let big = vec![1_u8; 64 << 20];
                let sum: u64 = std::thread::Builder::new()
                    .name("worker".into())
                    .spawn(move || {
                        std::thread::sleep(std::time::Duration::from_millis(5));
                        big.iter().map(|&b| u64::from(b)).sum()
                    })
                    .unwrap()
                    .join()
                    .unwrap();
                assert_eq!(sum, 64 << 20);
                let panicked = std::thread::spawn(|| panic!("on purpose")).join();
                assert!(panicked.is_err());
                std::io::stdout().write_all(b"done\n").unwrap();
            }
            "open" => drop(std::fs::File::open("/proc/version")),
            "open in a thread" => std::thread::spawn(|| drop(std::fs::File::open("/proc/version"))).join().unwrap(),
            "execve" => drop(Command::new("/bin/true").status()),
            "socket" => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
            "accept" => {
                listener.set_nonblocking(true).unwrap();
                assert!(listener.accept().is_err());
            }
            "accept without leave" => drop(listener.accept()),
            // SAFETY: no memory in use is touched, and the process ends here or in the call.
            "mmap exec" => unsafe {
                libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ | libc::PROT_EXEC,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
            },
            // SAFETY: no memory in use is touched, and the process ends here or in the call.
            "mprotect exec" => unsafe {
                let page = libc::mmap(
                    std::ptr::null_mut(),
                    4096,
                    libc::PROT_READ,
                    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                    -1,
                    0,
                );
                libc::mprotect(page, 4096, libc::PROT_READ | libc::PROT_EXEC);
            },
            // SAFETY: there is no such file; nothing is touched.
            "kvm run" | "run a vCPU without leave" => unsafe {
                const KVM_RUN: libc::Ioctl = 0xae80;
                assert_eq!(libc::ioctl(-1, KVM_RUN, 0), -1);
            },
            // SAFETY: there is no such file; nothing is touched.
            "uring" | "uring without leave" => unsafe {
                assert_eq!(libc::syscall(libc::SYS_io_uring_enter, -1, 0, 0, 0, 0, 0), -1);
            },
            // SAFETY: as above.
            "kvm create VM" => unsafe {
                const KVM_CREATE_VM: libc::Ioctl = 0xae01;
                libc::ioctl(-1, KVM_CREATE_VM, 0);
            },
            // SAFETY: no memory in use is touched, and the process ends here or in the call.
            "fork" => unsafe {
                libc::fork();
            },
            // SAFETY: no memory in use is touched, and the process ends here or in the call.
            "kill init" => unsafe {
                libc::kill(1, 0);
            },
            // SAFETY: no memory in use is touched, and the process ends here or in the call.
            "ptrace" => unsafe {
                libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0);
            },
            other => panic!("no deed {other}"),
        }
        std::process::exit(7);
    }

    #[test]
    fn ordinary_work_goes_on() {
        let output = try_in_sandbox("ordinary", "on");
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("done"));
        for deed in ["accept", "kvm run", "uring"] {
            assert_eq!(try_in_sandbox(deed, "on").status.code(), Some(7), "{deed}");
        }
    }

    #[test]
    fn what_is_forbidden_kills() {
        for deed in [
            "open",
            "open in a thread",
            "execve",
            "socket",
            "accept without leave",
            "mmap exec",
            "mprotect exec",
            "run a vCPU without leave",
            "kvm create VM",
            "uring without leave",
            "fork",
            "kill init",
            "ptrace",
        ] {
            let output = try_in_sandbox(deed, "on");
            assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{deed}: {output:?}");
        }
    }

    #[test]
    fn debug_mode_names_the_call() {
        let output = try_in_sandbox("socket", "debug");
        assert_eq!(output.status.code(), Some(128 + libc::SIGSYS));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(text.contains(&format!("system call number {:04}", libc::SYS_socket)), "{text}");
    }

    #[test]
    fn off_is_off() {
        assert_eq!(try_in_sandbox("open", "off").status.code(), Some(7));
    }

    #[test]
    fn landlock_refuses_files() {
        if !std::fs::read_to_string("/proc/kallsyms").is_ok_and(|s| s.contains("landlock_restrict_self")) {
            return; // a host without Landlock
        }
        // SAFETY: asks for the ABI version; no pointers.
        let abi = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, std::ptr::null::<u8>(), 0, 1) };
        if abi > 0 {
            assert_eq!(try_in_sandbox("landlock", "on").status.code(), Some(0));
        }
    }
}
