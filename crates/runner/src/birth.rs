//! How the process comes into being: a fork of the monitor that keeps nothing of it.
//!
//! Its thread can make three kinds of system calls, each from one place of the stub: one that a seccomp listener of the monitor's answers, rt_sigreturn, which
//! gives it registers, and those that change its memory, if they come with a secret number of 64 bits. All others are signals to itself.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::scan;
use crate::stub::{LIST_PAGE, NOTIFY, Places, SIGNAL_STACK, SIGNAL_STACK_SIZE, STUB, STUB_SIZE, Stub, WORDS_PAGE};

/// The signal that calls a program.
pub const CALL: i32 = libc::SIGURG;

/// The signals that stop a program.
const STOPS: [i32; 7] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, CALL];

/// The signals that stay blocked.
pub fn blocked() -> u64 {
    !STOPS.iter().fold(0, |set, signal| set | 1_u64 << (signal - 1))
}

/// Flags of mappings of the guest's RAM.
pub const MAP_FLAGS: u64 = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;

/// Words in the stub by which threads agree while the process is made: the listener's number and 1; 1 as long as there is the messenger.
const LISTENER: u64 = WORDS_PAGE + 128;
const MESSENGER: u64 = WORDS_PAGE + 136;

/// A process that has been made.
pub struct Born {
    pub pid: i32,
    /// The end at which the monitor hears of the program's stops (seccomp_unotify(2)).
    pub listener: OwnedFd,
    /// What the calls that change its memory must come with.
    pub secret: Secret,
}

/// A number in two halves, in the upper 32 bits of the fourth and the fifth argument, where the calls do not look.
#[derive(Clone, Copy)]
pub struct Secret([u32; 2]);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    fn new() -> Result<Self, String> {
        let mut halves = [0_u32; 2];
        // SAFETY: a valid place of that length.
        let length = unsafe { libc::getrandom(halves.as_mut_ptr().cast(), size_of_val(&halves), 0) };
        if length == size_of_val(&halves) as isize { Ok(Self(halves)) } else { Err("no random number".into()) }
    }

    /// A system call's number and arguments, with the secret.
    pub fn call(self, number: i64, arguments: [u64; 6]) -> [u64; 7] {
        let [a, b, c, d, e, f] = arguments;
        let with = |argument: u64, half: u32| argument & 0xffff_ffff | u64::from(half) << 32;
        [number as u64, a, b, c, with(d, self.0[0]), with(e, self.0[1]), f]
    }
}

/// Makes it; its thread is about to stop for the first time. It dies with the calling thread.
pub fn give_birth(ram: i32, stub: &Stub) -> Result<Born, String> {
    let failed = |what: &str| format!("no process for a program: {what}: {}", std::io::Error::last_os_error());
    let mut ends = [0; 2];
    // SAFETY: two numbers as a place for the result.
    if unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0, ends.as_mut_ptr()) } != 0 {
        return Err(failed("a socket"));
    }
    // SAFETY: just made, and ours.
    let [ours, theirs] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
    let secret = Secret::new()?;
    let program = filter(&stub.places, ram as u32, secret);
    let birth = Birth {
        ram,
        stub: stub.file.as_raw_fd(),
        socket: theirs.as_raw_fd(),
        places: stub.places,
        program: libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() },
        rseq: rseq(),
    };
    // SAFETY: a fork: the child goes on in a copy of this memory and does nothing but system calls.
    let pid = unsafe { call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]) } as i32;
    if pid == 0 {
        // SAFETY: in the child.
        unsafe { birth.live() }
    }
    if pid < 0 {
        return Err(failed("fork"));
    }
    drop(theirs);
    match receive(&ours) {
        Some(listener) => {
            // The messenger must not be there any more when its memory is taken away.
            let mut left = [1];
            while left[0] != 0 {
                std::thread::yield_now();
                stub.read(MESSENGER, &mut left);
            }
            Ok(Born { pid, listener, secret })
        }
        None => {
            // SAFETY: our own child, which is waited for.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL);
            }
            Err("no process for a program: the host has no seccomp listeners (Linux 5.0), or another one is there"
                .into())
        }
    }
}

/// The control message that carries one file.
#[repr(C, align(8))]
struct OneFile {
    header: libc::cmsghdr,
    file: i32,
}

/// `struct msghdr` for one byte and one file.
fn message(byte: &mut libc::iovec, control: &mut OneFile) -> libc::msghdr {
    // SAFETY: plain data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = byte;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut *control).cast();
    message.msg_controllen = size_of::<OneFile>();
    message
}

fn one_file(file: i32) -> OneFile {
    let header = libc::cmsghdr {
        cmsg_len: size_of::<libc::cmsghdr>() + size_of::<i32>(),
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    OneFile { header, file }
}

/// The file that the child sends, unless it ends before.
fn receive(socket: &OwnedFd) -> Option<OwnedFd> {
    let mut byte = 0_u8;
    let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut control = one_file(-1);
    let mut message = message(&mut vector, &mut control);
    loop {
        // SAFETY: the message describes places that are valid.
        let length = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
        if length < 0 && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted {
            continue;
        }
        // SAFETY: a file that has just come is ours.
        return (length == 1 && control.file >= 0).then(|| unsafe { OwnedFd::from_raw_fd(control.file) });
    }
}

/// A system call with whole words: what is passed as 32 bits may come with anything above.
///
/// # Safety
/// As of the call.
unsafe fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    let result;
    // SAFETY: the caller's. Nothing is done besides: two threads of the child share what the C library keeps for one.
    unsafe {
        std::arch::asm!(
            "syscall",
            inlateout("rax") number => result, in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            lateout("rcx") _, lateout("r11") _,
            options(nostack)
        );
    }
    result
}

/// The area that the C library has registered for restartable sequences (rseq(2)) of this thread: address and length.
fn rseq() -> Option<(u64, u32)> {
    // SAFETY: looks symbols of the C library up; they are an offset from the thread pointer and a length, if they are there.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()).cast::<u32>();
        if offset.is_null() || size.is_null() || *size == 0 {
            return None;
        }
        let thread: u64;
        std::arch::asm!("mov {}, fs:[0]", out(reg) thread, options(nostack, readonly, preserves_flags));
        // What is registered has 32 bytes at least, whatever of it is in use.
        Some((thread.wrapping_add_signed(*offset as i64), (*size).max(32)))
    }
}

/// The signature that the C library registers with (RSEQ_SIG on x86).
const RSEQ_SIGNATURE: u32 = 0x5305_3053;
const SECCOMP_SET_MODE_FILTER: u64 = 1;
const SECCOMP_FILTER_FLAG_NEW_LISTENER: u64 = 8;

/// `struct kernel_sigaction`.
#[repr(C)]
struct Action {
    handler: u64,
    flags: u64,
    restorer: u64,
    mask: u64,
}

/// What the child needs to become a process without anything.
struct Birth {
    ram: i32,
    stub: i32,
    socket: i32,
    places: Places,
    program: libc::sock_fprog,
    rseq: Option<(u64, u32)>,
}

/// Ends the child if the call failed.
///
/// # Safety
/// In the child.
unsafe fn check(result: i64) -> i64 {
    if result < 0 {
        // SAFETY: the caller's.
        unsafe { call(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]) };
    }
    result
}

impl Birth {
    /// # Safety
    /// In a child that has just been forked.
    unsafe fn live(&self) -> ! {
        // SAFETY: system calls that concern this process only; those that matter are checked. The last jump leads to the page that was mapped
        // there, and does not come back.
        unsafe {
            check(call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0]));
            let all = u64::MAX;
            check(call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, &raw const all as u64, 0, 8, 0, 0]));
            let parts = [
                (0, LIST_PAGE, libc::PROT_READ | libc::PROT_EXEC),
                (LIST_PAGE, STUB_SIZE - LIST_PAGE, libc::PROT_READ | libc::PROT_WRITE),
            ];
            for (offset, length, rights) in parts {
                let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
                let at = [STUB + offset, length, rights as u64, flags as u64, self.stub as u64, offset];
                check(if call(libc::SYS_mmap, at) as u64 == STUB + offset { 0 } else { -1 });
            }
            // Whoever comes first of these two closes what lies around the other.
            let [low, high] = if self.ram < self.socket { [self.ram, self.socket] } else { [self.socket, self.ram] };
            self.close(0, low - 1);
            self.close(low + 1, high - 1);
            self.close(high + 1, i32::MAX);
            if let Some((address, length)) = self.rseq {
                const UNREGISTER: u64 = 1;
                call(libc::SYS_rseq, [address, length.into(), UNREGISTER, RSEQ_SIGNATURE.into(), 0, 0]);
            }
            for signal in STOPS {
                const SA_RESTORER: u64 = 0x0400_0000;
                let flags = (libc::SA_SIGINFO | libc::SA_ONSTACK) as u64 | SA_RESTORER;
                let action = Action { handler: self.places.handler, flags, restorer: STUB, mask: u64::MAX };
                check(call(libc::SYS_rt_sigaction, [signal as u64, &raw const action as u64, 0, 8, 0, 0]));
            }
            let stack = [STUB + SIGNAL_STACK, 0, SIGNAL_STACK_SIZE];
            check(call(libc::SYS_sigaltstack, [&raw const stack as u64, 0, 0, 0, 0, 0]));
            check(call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, c"guest-program".as_ptr() as u64, 0, 0, 0, 0]));
            // The guest's CPU is not the host's: CPUID is for the engine, where the CPU lets it be caught.
            call(libc::SYS_arch_prctl, [scan::ARCH_SET_CPUID, 0, 0, 0, 0, 0]);
            check(call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]));
            self.start_messenger();
            let allowed = blocked();
            check(call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, &raw const allowed as u64, 0, 8, 0, 0]));
            let listener = check(call(
                libc::SYS_seccomp,
                [SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &raw const self.program as u64, 0, 0, 0],
            ));
            ((STUB + LISTENER) as *mut i64).write_volatile(listener + 1);
            std::arch::asm!("jmp {start}", start = in(reg) self.places.start, options(noreturn));
        }
    }

    /// Closes files.
    ///
    /// # Safety
    /// In the child.
    unsafe fn close(&self, first: i32, last: i32) {
        if first <= last {
            // SAFETY: the caller's.
            unsafe { check(call(libc::SYS_close_range, [first as u64, last as u64, 0, 0, 0, 0])) };
        }
    }

    /// # Safety
    /// In the child, which is all set but for the program's filter.
    unsafe fn start_messenger(&self) {
        const STACK: u64 = 64 << 10;
        let flags = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM
            | libc::CLONE_CHILD_CLEARTID;
        // SAFETY: a stack for the new thread, which calls `carry` there with `self`, and never returns. The other one goes on
        // without a difference.
        unsafe {
            let rights = (libc::PROT_READ | libc::PROT_WRITE) as u64;
            let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
            let stack = check(call(libc::SYS_mmap, [0, STACK, rights, private, u64::MAX, 0])) as u64;
            ((STUB + MESSENGER) as *mut u64).write_volatile(1);
            let thread: i64;
            std::arch::asm!(
                "syscall",
                "test rax, rax",
                "jnz 2f",
                "xor ebp, ebp",
                "mov rdi, r12",
                "call r13",
                "ud2",
                "2:",
                inlateout("rax") libc::SYS_clone => thread,
                in("rdi") flags as u64,
                in("rsi") stack + STACK,
                in("rdx") 0,
                in("r10") STUB + MESSENGER,
                in("r8") 0,
                in("r12") self,
                in("r13") Self::carry as unsafe extern "C" fn(&Self) -> !,
                lateout("rcx") _,
                lateout("r11") _,
            );
            check(thread);
        }
    }

    /// Hands the listener to the monitor, which a thread with the filter cannot, and ends.
    unsafe extern "C" fn carry(&self) -> ! {
        // SAFETY: as in `live`, in the second thread.
        unsafe {
            let listener = loop {
                match ((STUB + LISTENER) as *const i64).read_volatile() {
                    0 => call(libc::SYS_sched_yield, [0; 6]),
                    number => break number as i32 - 1,
                };
            };
            let mut byte = 0_u8;
            let mut vector = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
            let mut control = one_file(listener);
            let message = message(&mut vector, &mut control);
            check(call(libc::SYS_sendmsg, [self.socket as u64, &raw const message as u64, 0, 0, 0, 0]));
            check(call(libc::SYS_close, [listener as u64, 0, 0, 0, 0, 0]));
            check(call(libc::SYS_close, [self.socket as u64, 0, 0, 0, 0, 0]));
            loop {
                call(libc::SYS_exit, [0; 6]);
            }
        }
    }
}

// Classic BPF (uapi linux/bpf_common.h, linux/seccomp.h).
const LOAD: u16 = 0x20;
const EQUAL: u16 = 0x15;
const RETURN: u16 = 0x06;
const ALLOW: u32 = 0x7fff_0000;
const TRAP: u32 = 0x0003_0000;
const USER_NOTIFY: u32 = 0x7fc0_0000;
const ARCHITECTURE: u32 = 0xc000_003e;
/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const IP: u32 = 8;
const IP_HIGH: u32 = 12;
const ARGUMENTS: u32 = 16;

fn plain(code: u16, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt: 0, jf: 0, k }
}

/// Skips `yes` instructions if it is `k`, else `no`.
fn equal(k: u32, yes: u8, no: u8) -> libc::sock_filter {
    libc::sock_filter { code: EQUAL, jt: yes, jf: no, k }
}

/// What is done with the thread's system calls.
fn filter(places: &Places, ram: u32, secret: Secret) -> Vec<libc::sock_filter> {
    let low = |argument: u32| plain(LOAD, ARGUMENTS + argument * 8);
    let high = |argument: u32| plain(LOAD, ARGUMENTS + argument * 8 + 4);
    vec![
        plain(LOAD, ARCH),
        equal(ARCHITECTURE, 0, 24),
        plain(LOAD, IP_HIGH),
        equal((STUB >> 32) as u32, 0, 22),
        plain(LOAD, IP),
        equal(places.notified as u32, 16, 0),
        equal(places.returned as u32, 17, 0),
        equal(places.changed as u32, 0, 18),
        high(3),
        equal(secret.0[0], 0, 16),
        high(4),
        equal(secret.0[1], 0, 14),
        plain(LOAD, NUMBER),
        equal(libc::SYS_munmap as u32, 13, 0),
        equal(libc::SYS_prctl as u32, 5, 0),
        equal(libc::SYS_mmap as u32, 0, 10),
        low(4),
        equal(ram, 0, 8),
        low(3),
        equal(MAP_FLAGS as u32, 7, 6),
        low(0),
        equal(libc::PR_SET_DUMPABLE as u32, 5, 4),
        plain(LOAD, NUMBER),
        equal(NOTIFY as u32, 4, 2),
        plain(LOAD, NUMBER),
        equal(libc::SYS_rt_sigreturn as u32, 1, 0),
        plain(RETURN, TRAP),
        plain(RETURN, ALLOW),
        plain(RETURN, USER_NOTIFY),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter by hand.
    fn verdict(filter: &[libc::sock_filter], number: i64, ip: u64, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend_from_slice(&(number as u32).to_le_bytes());
        data.extend_from_slice(&ARCHITECTURE.to_le_bytes());
        data.extend_from_slice(&ip.to_le_bytes());
        arguments.iter().for_each(|argument| data.extend_from_slice(&argument.to_le_bytes()));
        let (mut at, mut a) = (0, 0);
        loop {
            let i = filter[at];
            at += 1;
            match i.code {
                LOAD => a = u32::from_le_bytes(data[i.k as usize..i.k as usize + 4].try_into().unwrap()),
                EQUAL => at += usize::from(if a == i.k { i.jt } else { i.jf }),
                RETURN => return i.k,
                other => panic!("instruction {other:#x}"),
            }
        }
    }

    #[test]
    fn three_kinds_of_calls_from_three_places() {
        let places = Stub::new().unwrap().places;
        let secret = Secret::new().unwrap();
        let filter = filter(&places, 7, secret);
        let ask = |ip, call: [u64; 7]| {
            let [number, arguments @ ..] = call;
            verdict(&filter, number as i64, ip, arguments)
        };
        let Places { notified, returned, changed, .. } = places;
        assert_eq!(ask(notified, [NOTIFY as u64, 0, 0, 0, 0, 0, 0]), USER_NOTIFY);
        assert_eq!(ask(returned, [libc::SYS_rt_sigreturn as u64, 0, 0, 0, 0, 0, 0]), ALLOW);
        let map = |flags, fd| secret.call(libc::SYS_mmap, [0x1000, 4096, 7, flags, fd, 0]);
        let unmap = secret.call(libc::SYS_munmap, [0x1000, 4096, 0, 0, 0, 0]);
        let open = secret.call(libc::SYS_prctl, [4, 1, 0, 0, 0, 0]);
        let good = [map(MAP_FLAGS, 7), unmap, open];
        for call in good {
            assert_eq!(ask(changed, call), ALLOW);
            for bit in 32..64 {
                for argument in [4, 5] {
                    let mut wrong = call;
                    wrong[argument] ^= 1 << bit;
                    assert_eq!(ask(changed, wrong), TRAP);
                }
            }
        }
        for call in
            [map(MAP_FLAGS, 8), map(MAP_FLAGS | 0x20, 7), map(0, 7), secret.call(libc::SYS_prctl, [22, 1, 0, 0, 0, 0])]
        {
            assert_eq!(ask(changed, call), TRAP);
        }
        for ip in [notified, returned, changed, STUB + 2, 0x40_0000, notified + (1 << 32), returned - (1 << 32)] {
            for number in 0..500 {
                let call = secret.call(number, [0x1000, 4096, 7, MAP_FLAGS, 7, 0]);
                let good = (ip, number) == (notified, NOTIFY)
                    || (ip, number) == (returned, libc::SYS_rt_sigreturn)
                    || ip == changed && [libc::SYS_mmap, libc::SYS_munmap].contains(&number);
                assert_eq!(ask(ip, call) != TRAP, good, "{number} at {ip:#x}");
            }
        }
    }
}
