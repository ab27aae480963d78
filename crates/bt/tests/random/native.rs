//! The real CPU: the program at its own addresses in this process.
//!
//! [`Native::run`] loads all registers, enters the program by IRET (which also serializes, so that freshly written code is seen) and
//! gets it back through a stub at [`EXIT`] or through a signal handler. Meanwhile FS, GS and the stack pointer are the program's, so the
//! handler touches no thread-local variable. System calls from the program's addresses are caught by a seccomp filter: wild
//! jumps may lead anywhere.

use std::io;
use std::mem::offset_of;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use cpu::FpState;

use crate::layout::{BACKING, CONTEXT, DATA, EXIT, LAYOUTS, Memory, PAGE, Right, SLOT, SLOTS, STACK};
use crate::state::{Final, Start, Stop, normalise};

/// Lies at [`CONTEXT`].
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    host_rsp: u64,
    host_fs: u64,
    fs: u64,
    gs: u64,
    /// RIP, CS, RFLAGS, RSP, SS.
    frame: [u64; 5],
    /// 0: ran to the end, else signal number.
    signal: u64,
    trap: u64,
    error: u64,
    cr2: u64,
    mxcsr: u64,
    fp: FpState,
    stack: [u64; 64],
}

static ACTIVE: AtomicBool = AtomicBool::new(false);
const SIGNALS: [i32; 7] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGSYS, libc::SIGALRM];
static PREVIOUS: [AtomicUsize; 7] = [const { AtomicUsize::new(0) }; 7];
static RESUME: AtomicUsize = AtomicUsize::new(0);

core::arch::global_asm!(
    ".globl bt_random_enter",
    "bt_random_enter:",
    "push rbp",
    "push rbx",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "mov [rdi + {host_rsp}], rsp",
    "rdfsbase rax",
    "mov [rdi + {host_fs}], rax",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rdi + {fp}]",
    "mov rax, [rdi + {fs}]",
    "wrfsbase rax",
    "mov rax, [rdi + {gs}]",
    "wrgsbase rax",
    "lea rsp, [rdi + {frame}]",
    "mov rax, [rdi]",
    "mov rcx, [rdi + 8]",
    "mov rdx, [rdi + 16]",
    "mov rbx, [rdi + 24]",
    "mov rbp, [rdi + 40]",
    "mov rsi, [rdi + 48]",
    "mov r8, [rdi + 64]",
    "mov r9, [rdi + 72]",
    "mov r10, [rdi + 80]",
    "mov r11, [rdi + 88]",
    "mov r12, [rdi + 96]",
    "mov r13, [rdi + 104]",
    "mov r14, [rdi + 112]",
    "mov r15, [rdi + 120]",
    "mov rdi, [rdi + 56]",
    "iretq",
    host_rsp = const offset_of!(Context, host_rsp),
    host_fs = const offset_of!(Context, host_fs),
    fs = const offset_of!(Context, fs),
    gs = const offset_of!(Context, gs),
    fp = const offset_of!(Context, fp),
    frame = const offset_of!(Context, frame),
);

unsafe extern "C" {
    fn bt_random_enter(context: *mut Context);
}

/// The stub at [`EXIT`], and the offset at which signals come back.
fn exit_stub() -> (Vec<u8>, usize) {
    let mut code: Vec<u8> = Vec::new();
    // opcode, ModRM with RIP-relative displacement to a field of the context
    let field = |code: &mut Vec<u8>, prefix: &[u8], reg: u8, offset: usize| {
        code.extend_from_slice(prefix);
        code.push(0x05 | reg << 3);
        let next = EXIT + code.len() as u64 + 4;
        let displacement = (CONTEXT + offset as u64).wrapping_sub(next) as i32;
        code.extend_from_slice(&displacement.to_le_bytes());
    };
    for reg in 0..16_u8 {
        let rex = 0x48 | (reg >> 3) << 2;
        field(&mut code, &[rex, 0x89], reg & 7, usize::from(reg) * 8);
    }
    let stack_end = offset_of!(Context, stack) + 64 * 8;
    field(&mut code, &[0x48, 0x8d], 4, stack_end); // lea rsp
    code.extend_from_slice(&[0x9c, 0x58, 0xfc]); // pushfq; pop rax; cld
    field(&mut code, &[0x48, 0x89], 0, offset_of!(Context, rflags));
    code.extend_from_slice(&[0xb8, 7, 0, 0, 0, 0x31, 0xd2]); // mov eax, 7; xor edx, edx
    field(&mut code, &[0x48, 0x0f, 0xae], 4, offset_of!(Context, fp)); // xsave64
    let resume = code.len();
    field(&mut code, &[0x48, 0x8b], 0, offset_of!(Context, host_fs));
    code.extend_from_slice(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]); // wrfsbase rax
    field(&mut code, &[0x48, 0x8b], 4, offset_of!(Context, host_rsp));
    code.extend_from_slice(&[0xdb, 0xe3]); // fninit
    field(&mut code, &[0x0f, 0xae], 2, offset_of!(Context, mxcsr)); // ldmxcsr
    code.extend_from_slice(&[0xc5, 0xf8, 0x77]); // vzeroupper
    code.extend_from_slice(&[0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5b, 0x5d, 0xc3]);
    (code, resume)
}

extern "C" fn handler(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    if !ACTIVE.load(Ordering::Relaxed) {
        // SAFETY: as the kernel would have called it.
        unsafe { chain(signal, info, context) };
        return;
    }
    // SAFETY: the context page is mapped while a program is active; the kernel passes valid pointers, and an XSAVE area in standard
    // format behind `fpregs`.
    unsafe {
        let c = &mut *(CONTEXT as *mut Context);
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let g = &mut machine.gregs;
        const ORDER: [i32; 16] = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (slot, &register) in c.gpr.iter_mut().zip(&ORDER) {
            *slot = g[register as usize] as u64;
        }
        c.rip = g[libc::REG_RIP as usize] as u64;
        c.rflags = g[libc::REG_EFL as usize] as u64;
        c.signal = signal as u64;
        c.trap = g[libc::REG_TRAPNO as usize] as u64;
        c.error = g[libc::REG_ERR as usize] as u64;
        c.cr2 = g[libc::REG_CR2 as usize] as u64;
        std::ptr::copy_nonoverlapping(machine.fpregs.cast::<u8>(), c.fp.bytes.as_mut_ptr(), 832);
        g[libc::REG_RIP as usize] = RESUME.load(Ordering::Relaxed) as i64;
        g[libc::REG_EFL as usize] = 0x202;
    }
}

/// Hands a signal that is not ours to whoever had it before.
unsafe fn chain(signal: i32, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let previous = SIGNALS.iter().position(|&s| s == signal).map_or(0, |i| PREVIOUS[i].load(Ordering::Relaxed));
    // SAFETY: `previous` came from sigaction with SA_SIGINFO set, or is one of the two special values.
    unsafe {
        if signal == libc::SIGALRM {
            return;
        }
        if previous == libc::SIG_DFL || previous == libc::SIG_IGN {
            libc::signal(signal, libc::SIG_DFL);
        } else {
            let function: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = std::mem::transmute(previous);
            function(signal, info, context);
        }
    }
}

/// The native side. One at a time in a process.
pub struct Native {
    /// Writable view of the slots.
    code: *mut u8,
    /// Another view of the backing pages.
    memory: *mut Memory,
}

fn memfd(size: u64) -> i32 {
    // SAFETY: plain system calls with checked results.
    unsafe {
        let fd = libc::memfd_create(c"bt-random".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0 && libc::ftruncate(fd, size as i64) == 0, "{}", io::Error::last_os_error());
        fd
    }
}

/// Maps a piece of a memfd (or anonymous memory) at `address`, or anywhere for 0.
fn map(address: u64, size: u64, protection: i32, fd: i32, offset: u64) -> *mut u8 {
    let fixed = if address == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let kind = if fd < 0 { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS } else { libc::MAP_SHARED };
    // SAFETY: a mapping that replaces nothing.
    let at = unsafe {
        libc::mmap(address as *mut _, size as usize, protection, kind | fixed | libc::MAP_POPULATE, fd, offset as i64)
    };
    assert!(at != libc::MAP_FAILED, "no mapping at {address:#x}: {}", io::Error::last_os_error());
    at.cast()
}

impl Native {
    /// Maps everything and installs handlers. To be called after the engine has installed its own.
    pub fn new() -> Self {
        const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
        const RX: i32 = libc::PROT_READ | libc::PROT_EXEC;
        let code_fd = memfd(SLOTS * SLOT);
        let memory_fd = memfd(BACKING as u64 * PAGE);
        let code = map(0, SLOTS * SLOT, RW, code_fd, 0);
        let memory = map(0, BACKING as u64 * PAGE, RW, memory_fd, 0);
        for layout in LAYOUTS {
            // In the first layout programs can write their code.
            let protection = if layout == LAYOUTS[0] { RW | RX } else { RX };
            map(layout.code, SLOTS * SLOT, protection, code_fd, 0);
            for (area, pages) in [(layout.data, &DATA[..]), (layout.stack, &STACK[..])] {
                for (i, &(backing, right)) in pages.iter().enumerate() {
                    let protection = match right {
                        Right::Write => RW,
                        Right::Read => libc::PROT_READ,
                        Right::Absent => continue,
                    };
                    map(area + i as u64 * PAGE, PAGE, protection, memory_fd, backing as u64 * PAGE);
                }
            }
        }
        assert!(size_of::<Context>() as u64 <= PAGE);
        map(CONTEXT, PAGE, RW, -1, 0);
        let exit = map(EXIT, PAGE, RW, -1, 0);
        let (stub, resume) = exit_stub();
        // SAFETY: the stub fits the page just mapped; afterwards it becomes executable.
        unsafe {
            std::ptr::copy_nonoverlapping(stub.as_ptr(), exit, stub.len());
            libc::mprotect(exit.cast(), PAGE as usize, RX);
        }
        RESUME.store(EXIT as usize + resume, Ordering::Relaxed);
        for (i, &signal) in SIGNALS.iter().enumerate() {
            // SAFETY: sigaction with a handler of the right signature.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
                let mut old: libc::sigaction = std::mem::zeroed();
                assert!(libc::sigaction(signal, &action, &mut old) == 0);
                PREVIOUS[i].store(old.sa_sigaction, Ordering::Relaxed);
            }
        }
        forbid_system_calls();
        Self { code, memory: memory.cast() }
    }

    /// The backing pages.
    pub fn memory(&mut self) -> &mut Memory {
        // SAFETY: our mapping; programs run only inside `run`, which borrows `self` exclusively.
        unsafe { &mut *self.memory }
    }

    /// The slots' contents.
    pub fn code(&self) -> &[u8] {
        // SAFETY: our mapping; programs run only inside `run`, which borrows `self` exclusively.
        unsafe { std::slice::from_raw_parts(self.code, (SLOTS * SLOT) as usize) }
    }

    /// Puts code into the slots at this offset.
    pub fn write_code(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= (SLOTS * SLOT) as usize);
        // SAFETY: checked to lie inside our mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.code.add(offset), bytes.len()) }
    }

    /// Runs from `start` until the end, an exception, or a signal from the watchdog.
    pub fn run(&mut self, start: &Start) -> Final {
        // SAFETY: the context page is mapped; the entry code saves what the ABI wants saved, and both ways out restore it.
        let c = unsafe {
            let c = &mut *(CONTEXT as *mut Context);
            c.gpr = start.gpr;
            c.fs = start.fs;
            c.gs = start.gs;
            c.frame = [start.rip, 0x33, start.rflags | 0x202, start.gpr[4], 0x2b];
            c.signal = 0;
            c.mxcsr = 0x1f80;
            c.rip = EXIT;
            c.fp = start.fp.clone();
            // The engine's timer must not interrupt a program: its handler wants the FS and GS base to be this process's.
            let mut timer: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut timer);
            libc::sigaddset(&raw mut timer, libc::SIGPROF);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const timer, std::ptr::null_mut());
            ACTIVE.store(true, Ordering::SeqCst);
            bt_random_enter(c);
            ACTIVE.store(false, Ordering::SeqCst);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const timer, std::ptr::null_mut());
            &mut *(CONTEXT as *mut Context)
        };
        let mut fp = c.fp.clone();
        normalise(&mut fp);
        let stop = match c.signal as i32 {
            0 => Stop::End,
            libc::SIGALRM => Stop::Useless("does not end"),
            libc::SIGSYS => Stop::Useless("system call"),
            _ => Stop::Fault { vector: c.trap as u8, error: c.error, cr2: if c.trap == 14 { c.cr2 } else { 0 } },
        };
        Final { stop, gpr: c.gpr, rip: c.rip, rflags: c.rflags, fp }
    }
}

/// From now on system calls of this thread from the addresses of programs raise SIGSYS.
fn forbid_system_calls() {
    // The high half of the instruction pointer in struct seccomp_data, whatever the architecture of the call.
    const POINTER_HIGH: u32 = 12;
    let filter = |code: u32, jt: u8, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt, jf, k };
    let program = [
        filter(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, POINTER_HIGH),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 2, 0, (EXIT >> 32) as u32),
        filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, 0, 0),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_ALLOW),
        filter(libc::BPF_RET | libc::BPF_K, 0, 0, libc::SECCOMP_RET_TRAP),
    ];
    let list = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
    // SAFETY: a well-formed filter program that the kernel copies. Where the host refuses it, wild jumps are merely less tame.
    unsafe {
        if libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0
            || libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &list, 0, 0) != 0
        {
            eprintln!("no seccomp filter: {}", io::Error::last_os_error());
        }
    }
}
