//! The process: how it is made, and how it changes its own memory.
//!
//! It is a fork of the monitor that keeps nothing of it. The last thing it does by itself is to jump to the *stub*, a few instructions on a
//! page shared with the monitor: they make the system calls of a list on the same page, then stop. Once it has taken away all other memory that
//! way, it is empty. Later the stub serves to map pages of the guest.

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Change, Rights, ptrace, scan};

/// Where the stub's page lies in the process: between where programs and their heaps start and where mappings grow to, in
/// every layout that Linux chooses.
pub const STUB: u64 = 0x3a5c_71d3_b000;

/// The signal that calls a program.
pub const CALL: i32 = libc::SIGURG;

/// Where the list starts on the page.
const LIST: usize = 128;
/// Words of an entry: the number of the system call and its arguments.
const WORDS: usize = 7;
/// Entries that the page has room for.
pub const ENTRIES: usize = (4096 - LIST) / (WORDS * 8) - 1;
/// What ends the list, in place of a number.
const LAST: u64 = u64::MAX;

/// RBX leads to the list. Stops by INT3 when it is done, by HLT when a call fails.
const CODE: [u8; 47] = [
    0x48, 0x8b, 0x03, // mov rax, [rbx]
    0x48, 0x85, 0xc0, // test rax, rax
    0x78, 0x26, // js done
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx + 48]
    0x0f, 0x05, // syscall
    0x48, 0x85, 0xc0, // test rax, rax
    0x78, 0x06, // js failed
    0x48, 0x83, 0xc3, 0x38, // add rbx, 56
    0xeb, 0xd3, // jmp start
    0xf4, // failed: hlt
    0xcc, // done: int3
];

/// Where the stub's system call is.
pub const STUB_CALL: u64 = STUB + 32;

/// The page that the monitor and the process share. The process can only read and execute it.
pub struct Control {
    file: OwnedFd,
    page: *mut u64,
}

// SAFETY: the pointer is to a mapping of our own, used by whoever has the value.
unsafe impl Send for Control {}

impl Control {
    pub fn new() -> Result<Self, String> {
        let failed = |what: &str| format!("{what}: {}", std::io::Error::last_os_error());
        // SAFETY: plain system calls; results are checked, and the mapping belongs to the returned value.
        unsafe {
            let file = libc::memfd_create(c"tightrope-stub".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 {
                return Err(failed("no memory for a program's process"));
            }
            let file = OwnedFd::from_raw_fd(file);
            if libc::ftruncate(file.as_raw_fd(), 4096) != 0 {
                return Err(failed("no memory for a program's process"));
            }
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let page = libc::mmap(std::ptr::null_mut(), 4096, rights, libc::MAP_SHARED, file.as_raw_fd(), 0);
            if page == libc::MAP_FAILED {
                return Err(failed("no memory for a program's process"));
            }
            let page: *mut u64 = page.cast();
            std::ptr::copy_nonoverlapping(CODE.as_ptr(), page.cast(), CODE.len());
            let control = Self { file, page };
            control.put(0, [LAST, 0, 0, 0, 0, 0, 0]);
            Ok(control)
        }
    }

    fn put(&self, entry: usize, words: [u64; WORDS]) {
        assert!(entry <= ENTRIES, "the list has no room");
        for (at, word) in words.into_iter().enumerate() {
            // SAFETY: inside our page by the check above. The process reads it, but only when it is told to.
            unsafe { self.page.add(LIST / 8 + entry * WORDS + at).write_volatile(word) };
        }
    }

    /// The list is done: the program, which may read the page, learns nothing of where its memory is.
    pub fn clear(&self, entries: usize) {
        for entry in (0..=entries).rev() {
            self.put(entry, [LAST, 0, 0, 0, 0, 0, 0]);
        }
    }

    /// Writes the list; `ram` is the RAM's file in the process.
    pub fn write(&self, changes: &[Change], ram: i32) {
        for (entry, change) in changes.iter().enumerate() {
            self.put(
                entry,
                match *change {
                    Change::Map { address, offset, length, rights } => {
                        let rights = match rights {
                            Rights::Read => libc::PROT_READ,
                            Rights::Write => libc::PROT_READ | libc::PROT_WRITE,
                            Rights::Execute => libc::PROT_READ | libc::PROT_EXEC,
                        };
                        [libc::SYS_mmap as u64, address, length, rights as u64, MAP_FLAGS, ram as u64, offset]
                    }
                    Change::Unmap { address, length } => [libc::SYS_munmap as u64, address, length, 0, 0, 0, 0],
                },
            );
        }
        self.put(changes.len(), [LAST, 0, 0, 0, 0, 0, 0]);
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.page.cast(), 4096) };
    }
}

const MAP_FLAGS: u64 = (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u64;

/// Calls a program from other threads.
#[derive(Debug)]
pub struct Signaller {
    pid: i32,
    /// The program runs, or is about to.
    inside: AtomicBool,
}

impl Signaller {
    /// Stops the program if it runs.
    pub fn call(&self) {
        if self.inside.load(Ordering::SeqCst) {
            // SAFETY: a plain system call. The number stays this process's until it has been waited for, which `Process` does when it is dropped.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, CALL) };
        }
    }

    /// From now on, or no longer, [`Self::call`] is to stop the program. Whoever is about to run it sets this first and looks for
    /// calls then.
    pub fn set_inside(&self, inside: bool) {
        self.inside.store(inside, Ordering::SeqCst);
    }
}

/// The process.
pub struct Process {
    pub pid: i32,
    /// The RAM's file, in the process.
    pub ram: i32,
    pub signaller: Arc<Signaller>,
    /// Registers with which the stub starts.
    at_stub: libc::user_regs_struct,
}

impl Process {
    pub fn start(ram: BorrowedFd<'_>, control: &Control) -> Result<Self, String> {
        let ram = ram.as_raw_fd();
        let filter = filter(ram as u32);
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
        let birth = Birth { ram, stub: control.file.as_raw_fd(), program, rseq: rseq() };
        // SAFETY: a fork: the child goes on in a copy of this memory and does nothing but system calls.
        let pid = unsafe { call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]) } as i32;
        if pid == 0 {
            // SAFETY: in the child.
            unsafe { birth.live() }
        }
        if pid < 0 {
            return Err(format!("no process for a program: {}", std::io::Error::last_os_error()));
        }
        let signaller = Arc::new(Signaller { pid, inside: AtomicBool::new(false) });
        // SAFETY: plain numbers.
        let at_stub = unsafe { std::mem::zeroed() };
        let mut process = Self { pid, ram, signaller, at_stub };
        let status = process.wait()?;
        if libc::WSTOPSIG(status) != libc::SIGTRAP {
            return Err(format!("a program's process did not start: signal {}", libc::WSTOPSIG(status)));
        }
        ptrace::set_options(pid)?;
        let registers = ptrace::registers(pid)?;
        process.at_stub = libc::user_regs_struct {
            rip: STUB,
            rbx: STUB + LIST as u64,
            orig_rax: u64::MAX,
            eflags: 0x202,
            ..registers
        };
        Ok(process)
    }

    pub fn resume(&self, how: libc::c_int) -> Result<(), String> {
        ptrace::resume(self.pid, how)
    }

    /// Waits until it stops.
    pub fn wait(&self) -> Result<i32, String> {
        let mut status = 0;
        loop {
            // SAFETY: `status` is a valid place for the result.
            let result = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) };
            if result == self.pid {
                break;
            }
            let error = std::io::Error::last_os_error();
            if error.kind() != std::io::ErrorKind::Interrupted {
                return Err(format!("a program's process has gone: {error}"));
            }
        }
        if libc::WIFSTOPPED(status) {
            return Ok(status);
        }
        Err(format!(
            "a program's process was ended by the host (signal {})",
            if libc::WIFSIGNALED(status) { libc::WTERMSIG(status) } else { 0 }
        ))
    }

    /// Lets it make the system calls of the list. Returns whether all succeeded.
    pub fn follow(&mut self) -> Result<bool, String> {
        ptrace::set_registers(self.pid, &self.at_stub)?;
        loop {
            self.resume(ptrace::CONT)?;
            match libc::WSTOPSIG(self.wait()?) {
                libc::SIGTRAP => return Ok(true),
                libc::SIGSEGV => return Ok(false),
                // Whoever calls has left word where it is looked for before the program goes on.
                CALL => {}
                signal => return Err(format!("a program's process failed to change its memory: signal {signal}")),
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: our own child, which is waited for so that nobody else gets its number before.
        unsafe {
            libc::syscall(libc::SYS_tgkill, self.pid, self.pid, libc::SIGKILL);
            let mut status = 0;
            while libc::waitpid(self.pid, &raw mut status, libc::__WALL) >= 0 || errno() == libc::EINTR {
                if !libc::WIFSTOPPED(status) {
                    break;
                }
            }
        }
        self.signaller.set_inside(false);
    }
}

/// A system call with whole words: what is passed as 32 bits may come with anything above.
///
/// # Safety
/// As of the call.
unsafe fn call(number: i64, arguments: [u64; 6]) -> i64 {
    let [a, b, c, d, e, f] = arguments;
    // SAFETY: the caller's.
    unsafe { libc::syscall(number, a, b, c, d, e, f) }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
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

/// What the child needs to become a process without anything.
struct Birth {
    ram: i32,
    stub: i32,
    program: libc::sock_fprog,
    rseq: Option<(u64, u32)>,
}

impl Birth {
    /// # Safety
    /// In a child that has just been forked.
    unsafe fn live(&self) -> ! {
        // SAFETY: system calls that concern this process only; those that matter are checked. The last jump leads to the page that was mapped
        // there, and does not come back.
        unsafe {
            let check = |result: i64| {
                if result < 0 {
                    call(libc::SYS_exit_group, [1, 0, 0, 0, 0, 0]);
                }
            };
            check(libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0));
            check(call(libc::SYS_prctl, [libc::PR_SET_PDEATHSIG as u64, libc::SIGKILL as u64, 0, 0, 0, 0]));
            let all = u64::MAX;
            let faults = [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS, CALL]
                .iter()
                .fold(0, |set, signal| set | 1_u64 << (signal - 1));
            let blocked = all & !faults;
            check(call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as u64, &raw const blocked as u64, 0, 8, 0, 0]));
            let rights = libc::PROT_READ | libc::PROT_EXEC;
            let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
            let page = call(libc::SYS_mmap, [STUB, 4096, rights as u64, flags as u64, self.stub as u64, 0]);
            check(if page as u64 == STUB { 0 } else { -1 });
            if self.ram > 0 {
                check(call(libc::SYS_close_range, [0, self.ram as u64 - 1, 0, 0, 0, 0]));
            }
            check(call(libc::SYS_close_range, [self.ram as u64 + 1, u32::MAX as u64, 0, 0, 0, 0]));
            if let Some((address, length)) = self.rseq {
                const UNREGISTER: i32 = 1;
                call(libc::SYS_rseq, [address, length as u64, UNREGISTER as u64, RSEQ_SIGNATURE as u64, 0, 0]);
            }
            check(call(libc::SYS_prctl, [libc::PR_SET_NAME as u64, c"guest-program".as_ptr() as u64, 0, 0, 0, 0]));
            // The guest's CPU is not the host's: CPUID is for the engine, where the CPU lets it be caught.
            call(libc::SYS_arch_prctl, [scan::ARCH_SET_CPUID, 0, 0, 0, 0, 0]);
            check(call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0]));
            const SECCOMP_SET_MODE_FILTER: i32 = 1;
            check(call(
                libc::SYS_seccomp,
                [SECCOMP_SET_MODE_FILTER as u64, 0, &raw const self.program as u64, 0, 0, 0],
            ));
            std::arch::asm!(
                "mov rbx, {list}",
                "jmp {stub}",
                list = in(reg) STUB + LIST as u64,
                stub = in(reg) STUB,
                options(noreturn)
            );
        }
    }
}

/// System calls that the process may make: mmap of the RAM's file and munmap, from the stub.
fn filter(ram: u32) -> Vec<libc::sock_filter> {
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const AND: u16 = 0x54;
    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;
    const ARCHITECTURE: u32 = 0xc000_003e;
    let plain = |code, k| libc::sock_filter { code, jt: 0, jf: 0, k };
    // Goes on if it is `k`, else to the refusal, `left` instructions after the next.
    let unless = |k, left| libc::sock_filter { code: EQUAL, jt: 0, jf: left, k };
    vec![
        plain(LOAD, 4),
        unless(ARCHITECTURE, 12),
        plain(LOAD, 12),
        unless((STUB >> 32) as u32, 10),
        plain(LOAD, 8),
        plain(AND, 0xffff_f000),
        unless(STUB as u32, 7),
        plain(LOAD, 0),
        // munmap needs no more.
        libc::sock_filter { code: EQUAL, jt: 6, jf: 0, k: libc::SYS_munmap as u32 },
        unless(libc::SYS_mmap as u32, 4),
        plain(LOAD, 16 + 4 * 8),
        unless(ram, 2),
        plain(LOAD, 16 + 3 * 8),
        libc::sock_filter { code: EQUAL, jt: 1, jf: 0, k: MAP_FLAGS as u32 },
        plain(RETURN, TRAP),
        plain(RETURN, ALLOW),
    ]
}
