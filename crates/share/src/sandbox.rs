//! The server confines itself before the first request: what can be had through a flaw in it is what its user may do in the shared
//! directory, and nothing else.
//!
//! * Started by root it becomes the directory's owner, without capabilities (if that is root: root's files, by their permissions).
//! * Landlock (where the host has it): no file outside the directory, no program, no device node, no network, no signal to others.
//! * seccomp: an allow-list around files; nothing that changes an owner; no socket, program, process or executable memory; permissions
//!   and nodes by path only without set-user-id bits, pipes and sockets apart.
//! * no new privileges, not dumpable, no core files.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition,
    SeccompFilter, SeccompRule as Rule, TargetArch,
};
use serde::{Deserialize, Serialize};

use crate::fs::Access;

/// How the process confines itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Confinement {
    /// By all means; a forbidden system call ends the process.
    On,
    /// Not at all, but for becoming the directory's owner: for debuggers.
    Off,
}

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
#[error("cannot confine the server of a shared directory ({what}: {why})")]
pub struct SandboxError {
    what: &'static str,
    why: String,
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> SandboxError {
    move |why| SandboxError { what, why: why.to_string() }
}

/// If this is root's process: makes it `root`'s owner's, and takes all capabilities away. The process has one thread.
///
/// # Errors
/// The host refuses.
pub fn become_owner(root: &OwnedFd) -> Result<(), SandboxError> {
    if rustix::process::geteuid().is_root() {
        let stat = rustix::fs::fstat(root).map_err(failed("owner"))?;
        let (uid, gid) = (stat.st_uid, stat.st_gid);
        // The root of a user namespace may be forbidden to leave its groups: they are those of the user who made it.
        let keeps_groups = std::fs::read("/proc/self/setgroups").is_ok_and(|may| may.starts_with(b"deny"));
        // SAFETY: these take numbers, and no list. The process has one thread.
        let done = unsafe {
            (keeps_groups || libc::setgroups(0, std::ptr::null()) == 0)
                && libc::setresgid(gid, gid, gid) == 0
                && libc::setresuid(uid, uid, uid) == 0
        };
        if !done {
            return Err(failed("owner")(std::io::Error::last_os_error()));
        }
    }
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(failed("capabilities"))
}

/// The first step, while the process has one thread: all but the system calls. `root` is the directory.
///
/// # Errors
/// The host refuses.
pub fn before_threads(root: &OwnedFd, access: Access) -> Result<(), SandboxError> {
    rustix::thread::set_no_new_privs(true).map_err(failed("no_new_privs"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(failed("dumpable"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(failed("core limit"))?;
    landlock(root, access).map_err(failed("Landlock"))
}

/// The second step, once the process has its threads: the system calls.
///
/// # Errors
/// The host refuses.
pub fn close() -> Result<(), SandboxError> {
    // clone3 passes its flags in memory, where no filter sees them, but there are no threads to come.
    let program = filter().map_err(failed("seccomp"))?;
    seccompiler::apply_filter_all_threads(&program).map_err(failed("seccomp"))
}

fn landlock(root: &OwnedFd, access: Access) -> Result<(), landlock::RulesetError> {
    let abi = ABI::V6;
    let read = AccessFs::ReadFile | AccessFs::ReadDir;
    let allowed: BitFlags<AccessFs> = match access {
        Access::ReadOnly => read,
        Access::ReadWrite => {
            read | AccessFs::WriteFile
                | AccessFs::Truncate
                | AccessFs::RemoveDir
                | AccessFs::RemoveFile
                | AccessFs::MakeDir
                | AccessFs::MakeReg
                | AccessFs::MakeSock
                | AccessFs::MakeFifo
                | AccessFs::MakeSym
                | AccessFs::Refer
        }
    };
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .add_rule(PathBeneath::new(root, allowed))?
        .restrict_self()?;
    Ok(())
}

fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<Rule>> = [
        // Names.
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_statx,
        libc::SYS_readlinkat,
        libc::SYS_symlinkat,
        libc::SYS_linkat,
        libc::SYS_unlinkat,
        libc::SYS_renameat2,
        libc::SYS_utimensat,
        libc::SYS_getxattr,
        libc::SYS_setxattr,
        libc::SYS_listxattr,
        libc::SYS_removexattr,
        // Open files.
        libc::SYS_read,
        libc::SYS_write,
        libc::SYS_preadv,
        libc::SYS_pwritev2,
        libc::SYS_lseek,
        libc::SYS_getdents64,
        libc::SYS_fstatfs,
        libc::SYS_ftruncate,
        libc::SYS_fallocate,
        libc::SYS_copy_file_range,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_syncfs,
        libc::SYS_close,
        // The socket to the monitor.
        libc::SYS_sendto,
        // Memory, never executable (see below for mmap and mprotect), and threads.
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_set_robust_list,
        libc::SYS_rseq,
        libc::SYS_exit,
        libc::SYS_exit_group,
        // Signals, time.
        libc::SYS_sigaltstack,
        libc::SYS_rt_sigreturn,
        libc::SYS_rt_sigprocmask,
        libc::SYS_restart_syscall,
        libc::SYS_clock_gettime,
    ]
    .map(|call| (call, vec![]))
    .into();
    let masked = |index: u8, mask: u64, value: u64| -> Result<Rule, _> {
        Rule::new(vec![Condition::new(index, Len::Dword, Op::MaskedEq(mask), value)?])
    };
    let no_special = crate::owner::SPECIAL.into();
    rules.insert(libc::SYS_fchmodat, vec![masked(2, no_special, 0)?]);
    rules.insert(libc::SYS_mkdirat, vec![masked(2, no_special, 0)?]);
    let kind = u64::from(libc::S_IFMT) | no_special;
    rules.insert(
        libc::SYS_mknodat,
        vec![masked(2, kind, libc::S_IFIFO.into())?, masked(2, kind, libc::S_IFSOCK.into())?],
    );
    // The standard library looks whether a descriptor that it closes is open, in builds with such checks.
    rules.insert(libc::SYS_fcntl, vec![masked(1, u64::MAX, libc::F_GETFD as u64)?]);
    let exec = libc::PROT_EXEC as u64;
    rules.insert(libc::SYS_mmap, vec![masked(2, exec, 0)?]);
    rules.insert(libc::SYS_mprotect, vec![masked(2, exec, 0)?]);
    SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}
