//! The process as the monitor deals with it: handing over to its thread and hearing of its stops, calling it, its end.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::birth::{self, Born, CALL, MAP_FLAGS, Secret};
use crate::stub::{ENTRIES, NOTIFY, Stub, Words};
use crate::{Change, Rights, ptrace};

/// The listener's requests (seccomp_unotify(2)): to hear of a stop, to answer. A sandbox has to allow them.
pub const LISTENER_REQUESTS: [u64; 2] = [0xc050_2100, 0xc018_2101];
const SET_FLAGS: u64 = 0x4008_2104;
/// Who is told runs on the core of who tells (Linux 6.6).
const SYNC_WAKE_UP: u64 = 1;

/// `struct seccomp_notif`.
#[repr(C)]
#[derive(Default)]
struct Notification {
    id: u64,
    pid: u32,
    flags: u32,
    number: i32,
    arch: u32,
    ip: u64,
    arguments: [u64; 6],
}

/// `struct seccomp_notif_resp`.
#[repr(C)]
struct Answer {
    id: u64,
    value: i64,
    error: i32,
    flags: u32,
}

/// How long a program may be deaf to a call: one that has blocked the signal does not hear it.
const DEAF: Duration = Duration::from_secs(1);
/// How often one stop may be told again. No host interrupts it that often.
const AGAIN: u32 = 10_000;
/// How often is looked after a process that is at work.
const LOOK: Duration = Duration::from_millis(250);

/// Calls a program from other threads.
#[derive(Debug)]
pub struct Signaller {
    pid: i32,
    /// The program runs, or is about to.
    inside: AtomicBool,
    /// Since when a call has not been answered: nanoseconds after `born`, 0: there is none.
    called: AtomicU64,
    born: Instant,
    /// The process has ended; `status` says how.
    ended: AtomicBool,
    status: AtomicI32,
    /// We ended it, as it did not hear.
    deaf: AtomicBool,
    /// Which thread waits for it to stop; 0: none has.
    waiting: AtomicI32,
    /// The process is at work: the keeper is to look after it.
    at_work: AtomicBool,
    /// The keeper sleeps until it is woken.
    keeper_rests: AtomicBool,
    /// Held by whoever waits for a change of the process's state, which is told once.
    waits: Mutex<()>,
}

impl Signaller {
    /// Stops the program if it runs.
    pub fn call(&self) {
        if self.inside.load(Ordering::SeqCst) {
            let now = (self.born.elapsed().as_nanos() as u64).max(1);
            let _ = self.called.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
            self.signal(CALL);
        }
    }

    /// From now on, or no longer, [`Self::call`] is to stop the program. Whoever is about to run it sets this first and looks for
    /// calls then, each time; calls from before have been heard.
    pub fn set_inside(&self, inside: bool) {
        self.called.store(0, Ordering::SeqCst);
        self.inside.store(inside, Ordering::SeqCst);
    }

    fn signal(&self, signal: i32) {
        if !self.ended.load(Ordering::SeqCst) {
            // SAFETY: a plain system call. The number is this process's until `Keeper` has waited for it.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
    }
}

/// How the process has ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The program has brought it about: it did something with the stub that nobody does by mistake.
    ByProgram,
    /// Somebody else did; one line.
    ByHost(String),
}

/// The process.
#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    /// The RAM's file, in the process.
    ram: i32,
    pub stub: Stub,
    listener: OwnedFd,
    secret: Secret,
    /// Entries on the list of changes, for when the program goes on.
    entries: usize,
    /// The stop that has not been answered.
    stopped: Option<u64>,
    pub signaller: Arc<Signaller>,
    keeper: Option<JoinHandle<()>>,
    /// Tells the keeper to end.
    let_go: Arc<AtomicBool>,
}

impl Process {
    /// Starts it, and waits for its first stop. `ram`: the file that it may map.
    pub fn start(ram: BorrowedFd<'_>) -> Result<Self, String> {
        hear_signals();
        let stub = Stub::new()?;
        let ram = ram.as_raw_fd();
        let (to, from) = mpsc::channel();
        let let_go = Arc::new(AtomicBool::new(false));
        let ended = let_go.clone();
        // It dies with the thread that forked it, and vCPUs' threads come and go.
        let keeper = std::thread::Builder::new().name("programs".into()).spawn(move || {
            let born = birth::give_birth(ram, &stub);
            let signaller = born.as_ref().ok().map(|born| Arc::new(Signaller::new(born.pid)));
            if to.send((born, stub, signaller.clone())).is_ok()
                && let Some(signaller) = signaller
            {
                keep(&signaller, &ended);
            }
        });
        let keeper = keeper.map_err(|error| format!("no thread for a program's process: {error}"))?;
        let (born, stub, signaller) =
            from.recv().map_err(|_| "no process for a program: its thread has ended".to_string())?;
        let Born { pid, listener, secret } = born?;
        let signaller = signaller.ok_or("no process for a program")?;
        // SAFETY: passes a number by value. Where the host does not know it, handing over is slower.
        unsafe { libc::ioctl(listener.as_raw_fd(), SET_FLAGS, SYNC_WAKE_UP) };
        let keeper = Some(keeper);
        let mut process =
            Self { pid, ram, stub, listener, secret, entries: 0, stopped: None, signaller, keeper, let_go };
        process.wait().map_err(|end| format!("a program's process did not start: {end:?}"))?;
        Ok(process)
    }

    /// The thread goes on, with the list first.
    pub fn go_on(&mut self) {
        self.entries = 0;
        if let Some(id) = self.stopped.take() {
            self.answer(id);
        }
        self.keeper_looks();
    }

    fn answer(&self, id: u64) {
        let answer = Answer { id, value: 0, error: 0, flags: 0 };
        // It fails if the thread was called away from its stop, which it tells again then, or if the process has ended.
        // SAFETY: the answer is valid.
        while unsafe { libc::ioctl(self.listener.as_raw_fd(), LISTENER_REQUESTS[1], &raw const answer) } != 0
            && std::io::Error::last_os_error().kind() == std::io::ErrorKind::Interrupted
        {}
    }

    /// Somebody has to look after a process that is at work.
    fn keeper_looks(&self) {
        let signaller = &self.signaller;
        signaller.at_work.store(true, Ordering::SeqCst);
        if signaller.keeper_rests.load(Ordering::SeqCst) {
            // SAFETY: a plain system call.
            let thread = unsafe { libc::syscall(libc::SYS_gettid) } as i32;
            signaller.waiting.store(thread, Ordering::SeqCst);
            if let Some(keeper) = &self.keeper {
                keeper.thread().unpark();
            }
        }
    }

    /// Waits until the thread has stopped: it is inside the kernel then, in the stub's call, and does nothing before it is answered.
    pub fn wait(&mut self) -> Result<(), End> {
        let mut again = 0;
        loop {
            let mut notification = Notification::default();
            // SAFETY: a valid place for the result.
            let result = unsafe { libc::ioctl(self.listener.as_raw_fd(), LISTENER_REQUESTS[0], &raw mut notification) };
            if result == 0 {
                let Notification { id, pid, number, ip, .. } = notification;
                if (pid as i32, i64::from(number), ip) == (self.pid, NOTIFY, self.stub.places.notified) {
                    if !self.stub.take_fresh() {
                        // The answer has not reached it: it tells the same again. Or the program has come there by itself.
                        again += 1;
                        if again > AGAIN {
                            return Err(self.end());
                        }
                        self.answer(id);
                        continue;
                    }
                    self.stopped = Some(id);
                    return Ok(());
                }
                // The filter sends no other.
                return Err(self.end());
            }
            let error = std::io::Error::last_os_error();
            if self.signaller.ended.load(Ordering::SeqCst)
                || error.raw_os_error() == Some(libc::ENOENT) && self.has_ended()
            {
                return Err(self.end());
            }
            match error.raw_os_error() {
                // ENOENT: it was called away from its stop, which it tells again.
                Some(libc::EINTR | libc::ENOENT) => {}
                _ => return Err(End::ByHost(format!("a program's process is not heard of any more: {error}"))),
            }
        }
    }

    /// Has nobody left the filter?
    fn has_ended(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.listener.as_raw_fd(), events: 0, revents: 0 };
        // SAFETY: one valid entry; does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) };
        poll.revents & libc::POLLHUP != 0
    }

    /// How the process has ended; ends it if it has not.
    fn end(&mut self) -> End {
        let signaller = &self.signaller;
        let by_us = signaller.deaf.load(Ordering::SeqCst) || !self.has_ended();
        signaller.signal(libc::SIGKILL);
        let deadline = Instant::now() + Duration::from_secs(10);
        while !signaller.ended.load(Ordering::SeqCst) && Instant::now() < deadline {
            if let Some(keeper) = &self.keeper {
                keeper.thread().unpark();
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        let status = signaller.status.load(Ordering::SeqCst);
        // Nobody but the host sends SIGKILL, and nobody but the program gets itself any other.
        if by_us || libc::WIFSIGNALED(status) && libc::WTERMSIG(status) != libc::SIGKILL {
            End::ByProgram
        } else if libc::WIFSIGNALED(status) {
            End::ByHost(format!("a program's process was ended by the host (signal {})", libc::WTERMSIG(status)))
        } else {
            End::ByHost("a program's process has gone".into())
        }
    }

    /// Puts a change on the list, which is done when the program goes on. `false`: it has no room.
    pub fn add(&mut self, change: &Change) -> bool {
        if self.entries + 1 == ENTRIES {
            return false;
        }
        let call = match *change {
            Change::Map { address, offset, length, rights } => {
                let rights = match rights {
                    Rights::Read => libc::PROT_READ,
                    Rights::Write => libc::PROT_READ | libc::PROT_WRITE,
                    Rights::Execute => libc::PROT_READ | libc::PROT_EXEC,
                    Rights::All => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                };
                self.secret.call(libc::SYS_mmap, [address, length, rights as u64, MAP_FLAGS, self.ram as u64, offset])
            }
            Change::Unmap { address, length } => self.secret.call(libc::SYS_munmap, [address, length, 0, 0, 0, 0]),
        };
        self.put(call);
        true
    }

    /// Takes everything off the list.
    pub fn forget_changes(&mut self) {
        self.entries = 0;
        self.stub.clear_list();
    }

    fn put(&mut self, call: [u64; 7]) {
        self.stub.put(self.entries, call);
        self.entries += 1;
    }

    /// Lets the thread do the list now, and nothing else. `Ok(false)`: a call has failed, and those after it have not been made.
    pub fn follow(&mut self) -> Result<bool, End> {
        let words = self.stub.words();
        self.stub.set_words(Words { stay: 1, failed: 0, ..words });
        self.go_on();
        self.wait()?;
        Ok(self.stub.words().failed == 0)
    }

    /// The thread, which has stopped, stops before the instructions at these addresses from now on. `Ok(false)`: the host does not let it.
    pub fn watch(&mut self, addresses: &[u64]) -> Result<bool, End> {
        // The monitor's sandbox forbids looking into its processes.
        let open = |process: &mut Self, open: bool| {
            process.put(process.secret.call(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, open.into(), 0, 0, 0, 0]));
            process.follow()
        };
        // What is on the list already is done with it.
        if self.entries + 1 == ENTRIES && !self.follow()? || !open(self, true)? {
            return Ok(false);
        }
        let signaller = self.signaller.clone();
        let watched = {
            let _alone = signaller.waits.lock().unwrap_or_else(PoisonError::into_inner);
            ptrace::watch(self.pid, addresses)
        };
        // It has been called away from its stop, and comes again.
        if watched.is_ok() {
            self.stopped = None;
            self.stub.set_fresh(true);
            self.wait()?;
        }
        open(self, false)?;
        Ok(watched.is_ok())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signaller.set_inside(false);
        self.let_go.store(true, Ordering::SeqCst);
        self.signaller.signal(libc::SIGKILL);
        if let Some(keeper) = self.keeper.take() {
            keeper.thread().unpark();
            let _ = keeper.join();
        }
    }
}

impl Signaller {
    fn new(pid: i32) -> Self {
        Self {
            pid,
            inside: AtomicBool::new(false),
            called: AtomicU64::new(0),
            born: Instant::now(),
            ended: AtomicBool::new(false),
            status: AtomicI32::new(0),
            deaf: AtomicBool::new(false),
            waiting: AtomicI32::new(0),
            at_work: AtomicBool::new(false),
            keeper_rests: AtomicBool::new(false),
            waits: Mutex::new(()),
        }
    }

    /// Looks whether the process has ended. If so, nobody may use its number again.
    fn look(&self) -> bool {
        let _alone = self.waits.lock().unwrap_or_else(PoisonError::into_inner);
        let mut status = 0;
        // SAFETY: `status` is a valid place for the result; the process is this thread's child.
        let result = unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if result == 0 || result == self.pid && libc::WIFSTOPPED(status) {
            return false;
        }
        self.status.store(status, Ordering::SeqCst);
        self.ended.store(true, Ordering::SeqCst);
        true
    }

    /// Has a call not been answered for too long?
    fn is_deaf(&self) -> bool {
        let called = self.called.load(Ordering::SeqCst);
        self.inside.load(Ordering::SeqCst)
            && called != 0
            && self.born.elapsed().as_nanos() as u64 > called + DEAF.as_nanos() as u64
    }
}

/// The keeper's work: sees to the end of the process, and to programs that do not hear.
fn keep(signaller: &Signaller, let_go: &AtomicBool) {
    loop {
        if let_go.load(Ordering::SeqCst) {
            // It has been killed.
            while !signaller.look() {
                std::thread::sleep(Duration::from_micros(100));
            }
            return;
        }
        if signaller.look() {
            break;
        }
        if signaller.is_deaf() {
            signaller.deaf.store(true, Ordering::SeqCst);
            signaller.signal(libc::SIGKILL);
        }
        // A quiet process is not looked after.
        signaller.keeper_rests.store(true, Ordering::SeqCst);
        if signaller.at_work.swap(false, Ordering::SeqCst) || signaller.inside.load(Ordering::SeqCst) {
            signaller.keeper_rests.store(false, Ordering::SeqCst);
            std::thread::park_timeout(LOOK);
        } else {
            std::thread::park();
            signaller.keeper_rests.store(false, Ordering::SeqCst);
        }
    }
    // Whoever waits for it hears nothing on older hosts.
    while !let_go.load(Ordering::SeqCst) {
        let waiting = signaller.waiting.load(Ordering::SeqCst);
        if waiting != 0 {
            // SAFETY: a plain system call, to a thread of our own that does not mind.
            unsafe { libc::syscall(libc::SYS_tgkill, std::process::id(), waiting, CALL) };
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
}

/// The signal that calls programs interrupts a thread that waits for one, too, without doing anything else.
fn hear_signals() {
    static ONCE: Once = Once::new();
    extern "C" fn nothing(_: i32) {}
    ONCE.call_once(|| {
        // SAFETY: a handler that does nothing.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigemptyset(&mut action.sa_mask);
            libc::sigaction(CALL, &raw const action, std::ptr::null_mut());
        }
    });
}
