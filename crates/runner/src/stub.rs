//! The stub: the only code and memory of ours in the process, at an address that Linux programs do not use. Three parts of one file in memory,
//! which the monitor has mapped as a whole:
//!
//! | pages | the process may | what |
//! |---|---|---|
//! | 0 | read, execute | the code |
//! | 1 | read, write | the list of changes |
//! | 2 | read, write | words that the thread leaves and finds, see [`Words`] |
//! | 3 … | read, write | the stack on which signals arrive |
//!
//! A program may read all of that, jump anywhere into the code, and write what is writable. So the monitor believes nothing that it reads there, and each way through the
//! code after a system call that it can make goes by fixed addresses, not by registers.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Where the stub lies in the process: between where programs and their heaps start and where mappings grow to, in
/// every layout that Linux chooses.
pub const STUB: u64 = 0x3a5c_71c0_0000;
/// Bytes of the stub.
pub const STUB_SIZE: u64 = SIGNAL_STACK + SIGNAL_STACK_SIZE;

/// Offsets in the stub.
pub const LIST_PAGE: u64 = 4096;
pub const WORDS_PAGE: u64 = 8192;
pub const SIGNAL_STACK: u64 = 12288;
pub const SIGNAL_STACK_SIZE: u64 = 8 * 4096;

/// Behind [`Words`]: 1 if the stop is one that nobody has seen. The host makes the call [`NOTIFY`] again where it was interrupted: when the process
/// was stopped and goes on (SIGSTOP, control groups' freezer, suspension), also if the answer was under way.
const FRESH: u64 = WORDS_PAGE + 56;

/// Words of an entry: the number of the system call and its arguments.
const WORDS: usize = 7;
/// Entries that the page has room for. A number of 0 ends the list.
pub const ENTRIES: usize = 4096 / (WORDS * 8) - 1;

/// The call by which the program's thread tells the monitor that it has stopped; it does nothing, were it ever done.
pub const NOTIFY: i64 = libc::SYS_getpid;

/// What the thread leaves when it stops, and finds when it goes on.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Words {
    /// The signal that stopped it.
    pub signal: u64,
    /// Address of its context on the signal stack (`struct ucontext`).
    pub context: u64,
    /// Bases of FS and GS.
    pub fs_base: u64,
    pub gs_base: u64,
    /// Selectors of DS, ES, FS, GS, 16 bits each from bit 0 on. In order to go on: 1 if they are to be null again.
    pub selectors: u64,
    /// In order to go on: 1 if it is to come back as soon as the list is done.
    pub stay: u64,
    /// What came of the list: 1 if a call failed; the rest of it has not been done then, and the thread has come back.
    pub failed: u64,
}

// Offsets for the code below.
const _: () = {
    assert!(std::mem::offset_of!(Words, context) == 8);
    assert!(std::mem::offset_of!(Words, fs_base) == 16);
    assert!(std::mem::offset_of!(Words, selectors) == 32);
    assert!(std::mem::offset_of!(Words, stay) == 40);
    assert!(std::mem::offset_of!(Words, failed) == 48);
};

std::arch::global_asm!(
    ".pushsection .text.tightrope_stub, \"ax\", @progbits",
    ".balign 4096",
    ".global tightrope_stub",
    ".global tightrope_stub_notified",
    ".global tightrope_stub_returned",
    ".global tightrope_stub_start",
    ".global tightrope_stub_changed",
    ".global tightrope_stub_end",
    ".hidden tightrope_stub, tightrope_stub_notified, tightrope_stub_returned, tightrope_stub_start, tightrope_stub_changed, tightrope_stub_end",
    // A signal has stopped the program: RDI has its number, RDX the context, RSP is on the signal stack.
    "tightrope_stub:",
    // The program's NT, AC and ID flags do not stay.
    "push 0x202",
    "popfq",
    "mov [rip + tightrope_stub + 8192], rdi",
    "mov [rip + tightrope_stub + 8192 + 8], rdx",
    "rdfsbase rax",
    "mov [rip + tightrope_stub + 8192 + 16], rax",
    "rdgsbase rax",
    "mov [rip + tightrope_stub + 8192 + 24], rax",
    "mov word ptr [rip + tightrope_stub + 8192 + 32], ds",
    "mov word ptr [rip + tightrope_stub + 8192 + 34], es",
    "mov word ptr [rip + tightrope_stub + 8192 + 36], fs",
    "mov word ptr [rip + tightrope_stub + 8192 + 38], gs",
    "5:",
    "mov dword ptr [rip + tightrope_stub + 8192 + 56], 1",
    "2:",
    "mov eax, {notify}",
    "syscall",
    "tightrope_stub_notified:",
    // The monitor has answered. The entries hold what nobody may know; nothing is left of them when the program goes on.
    "lea rbx, [rip + tightrope_stub + 4096]",
    "xor ebp, ebp",
    "3:",
    "mov rax, [rbx]",
    "test rax, rax",
    "jz 4f",
    "mov rdi, [rbx + 8]",
    "mov rsi, [rbx + 16]",
    "mov rdx, [rbx + 24]",
    "mov r10, [rbx + 32]",
    "mov r8, [rbx + 40]",
    "mov r9, [rbx + 48]",
    "mov [rbx], rbp",
    "mov [rbx + 32], rbp",
    "mov [rbx + 40], rbp",
    "syscall",
    "tightrope_stub_changed:",
    "add rbx, 56",
    "test rax, rax",
    "jns 3b",
    "lea rdi, [rip + tightrope_stub + 4096]",
    "mov ecx, 512",
    "xor eax, eax",
    "rep stosq",
    "mov dword ptr [rip + tightrope_stub + 8192 + 48], 1",
    "jmp 5b",
    "4:",
    "cmp dword ptr [rip + tightrope_stub + 8192 + 40], 0",
    "jne 5b",
    "cmp dword ptr [rip + tightrope_stub + 8192 + 32], 0",
    "je 1f",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "1:",
    "mov rax, [rip + tightrope_stub + 8192 + 16]",
    "wrfsbase rax",
    "mov rax, [rip + tightrope_stub + 8192 + 24]",
    "wrgsbase rax",
    "mov rsp, [rip + tightrope_stub + 8192 + 8]",
    "mov eax, {sigreturn}",
    "syscall",
    "tightrope_stub_returned:",
    // How the program's thread begins: it stops at once.
    "tightrope_stub_start:",
    "ud2",
    "tightrope_stub_end:",
    ".popsection",
    notify = const NOTIFY,
    sigreturn = const libc::SYS_rt_sigreturn,
);

unsafe extern "C" {
    static tightrope_stub: u8;
    static tightrope_stub_notified: u8;
    static tightrope_stub_returned: u8;
    static tightrope_stub_start: u8;
    static tightrope_stub_changed: u8;
    static tightrope_stub_end: u8;
}

/// Addresses of the code in the process.
#[derive(Clone, Copy, Debug)]
pub struct Places {
    /// The signal handler.
    pub handler: u64,
    /// Behind the call [`NOTIFY`].
    pub notified: u64,
    /// Behind rt_sigreturn.
    pub returned: u64,
    /// Where the thread starts.
    pub start: u64,
    /// Behind the system calls of the list.
    pub changed: u64,
}

/// The code, and where its parts are in the process.
fn code() -> (&'static [u8], Places) {
    // SAFETY: the symbols are those of the code above, in its order; it is only read.
    unsafe {
        let first = &raw const tightrope_stub;
        let length = (&raw const tightrope_stub_end).offset_from(first) as usize;
        let place = |symbol: *const u8| STUB + symbol.offset_from(first) as u64;
        let places = Places {
            handler: STUB,
            notified: place(&raw const tightrope_stub_notified),
            returned: place(&raw const tightrope_stub_returned),
            start: place(&raw const tightrope_stub_start),
            changed: place(&raw const tightrope_stub_changed),
        };
        (std::slice::from_raw_parts(first, length), places)
    }
}

/// The stub as the monitor sees it.
#[derive(Debug)]
pub struct Stub {
    pub file: OwnedFd,
    base: *mut u8,
    pub places: Places,
}

// SAFETY: the pointer is to a mapping of our own, used by whoever has the value.
unsafe impl Send for Stub {}

impl Stub {
    pub fn new() -> Result<Self, String> {
        let failed = || format!("no memory for a program's process: {}", std::io::Error::last_os_error());
        let (code, places) = code();
        assert!(code.len() <= 4096, "the stub's code has one page");
        // SAFETY: plain system calls; results are checked, and the mapping belongs to the returned value. The code fits its page.
        unsafe {
            let file = libc::memfd_create(c"tightrope-stub".as_ptr(), libc::MFD_CLOEXEC);
            if file < 0 {
                return Err(failed());
            }
            let file = OwnedFd::from_raw_fd(file);
            if libc::ftruncate(file.as_raw_fd(), STUB_SIZE as i64) != 0 {
                return Err(failed());
            }
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let base =
                libc::mmap(std::ptr::null_mut(), STUB_SIZE as usize, rights, libc::MAP_SHARED, file.as_raw_fd(), 0);
            if base == libc::MAP_FAILED {
                return Err(failed());
            }
            std::ptr::copy_nonoverlapping(code.as_ptr(), base.cast(), code.len());
            Ok(Self { file, base: base.cast(), places })
        }
    }

    /// The word at `offset` bytes, which is a multiple of 8 inside the stub.
    fn word(&self, offset: u64) -> *mut u64 {
        assert!(offset.is_multiple_of(8) && offset < STUB_SIZE, "{offset:#x} is outside the stub");
        // SAFETY: inside our mapping by the check.
        unsafe { self.base.add(offset as usize).cast() }
    }

    /// Reads the words from `offset` on, each once, whatever the process does meanwhile.
    pub fn read(&self, offset: u64, words: &mut [u64]) {
        for (at, word) in words.iter_mut().enumerate() {
            // SAFETY: inside our mapping, and aligned.
            *word = unsafe { self.word(offset + at as u64 * 8).read_volatile() };
        }
    }

    /// Writes words from `offset` on.
    pub fn write(&self, offset: u64, words: &[u64]) {
        for (at, &word) in words.iter().enumerate() {
            // SAFETY: inside our mapping, and aligned.
            unsafe { self.word(offset + at as u64 * 8).write_volatile(word) };
        }
    }

    /// What the thread left.
    pub fn words(&self) -> Words {
        let mut words = [0; 7];
        self.read(WORDS_PAGE, &mut words);
        let [signal, context, fs_base, gs_base, selectors, stay, failed] = words;
        Words { signal, context, fs_base, gs_base, selectors, stay, failed }
    }

    /// What it is to find.
    pub fn set_words(&self, w: Words) {
        self.write(WORDS_PAGE, &[w.signal, w.context, w.fs_base, w.gs_base, w.selectors, w.stay, w.failed]);
    }

    /// Is this a stop that nobody has seen? From now on it is none.
    pub fn take_fresh(&self) -> bool {
        let mut word = [0];
        self.read(FRESH, &mut word);
        self.set_fresh(false);
        word[0] as u32 != 0
    }

    /// Whether the next stop is one that nobody has seen, if the thread does not say so.
    pub fn set_fresh(&self, fresh: bool) {
        self.write(FRESH, &[fresh.into()]);
    }

    /// Makes this entry number `entry` of the list, and the last one.
    pub fn put(&self, entry: usize, words: [u64; WORDS]) {
        assert!(entry < ENTRIES, "the list has no room");
        let at = LIST_PAGE + (entry * WORDS * 8) as u64;
        self.write(at, &words);
        self.write(at + WORDS as u64 * 8, &[0]);
    }

    /// Leaves nothing of the list.
    pub fn clear_list(&self) {
        self.write(LIST_PAGE, &[0; 512]);
    }
}

impl Drop for Stub {
    fn drop(&mut self) {
        // SAFETY: our own mapping.
        unsafe { libc::munmap(self.base.cast(), STUB_SIZE as usize) };
    }
}
