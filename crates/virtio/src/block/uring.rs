//! A queue of a raw disk served by io_uring: one thread that never waits for the disk, and any number of requests in flight in the kernel.
//!
//! The ring is made before the process confines itself, and it is restricted: it takes reads, writes and syncs, on two files that were
//! given to it then (the disk and the doorbell), and no others; nothing can be registered with it any more. So allowing the one system call
//! that submits to it allows no more than `preadv`, `pwritev` and `fdatasync` on the disk do.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use disk::raw::{advance, iovecs};
use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};
use memory::VmMemory;

use super::Shared;
use super::request::{self, Request, Work};
use crate::event::Event;
use crate::queue::{QueueError, Virtqueue};
use crate::runner::Doorbell;

/// Requests in flight, at most.
const DEPTH: usize = 128;
/// The disk and the doorbell among the files of the ring.
const DISK: types::Fixed = types::Fixed(0);
const BELL: types::Fixed = types::Fixed(1);
/// What the completion of a read of the doorbell carries.
const BELL_RANG: u64 = u64::MAX;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A ring that can do nothing but serve `disk`.
fn ring(disk: &File, bell: &Event) -> io::Result<IoUring> {
    let ring: IoUring = IoUring::builder().setup_r_disabled().dontfork().build(DEPTH as u32 + 2)?;
    if !ring.params().is_feature_ext_arg() {
        return Err(io::ErrorKind::Unsupported.into());
    }
    let submitter = ring.submitter();
    submitter.register_files(&[disk.as_raw_fd(), bell.as_fd().as_raw_fd()])?;
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_op(opcode::Fsync::CODE),
        Restriction::sqe_op(opcode::Read::CODE),
        Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
    ])?;
    submitter.register_enable_rings()?;
    Ok(ring)
}

#[derive(Default)]
struct State {
    queue: Option<Virtqueue>,
    flush: bool,
    running: bool,
    stopping: bool,
    quit: bool,
}

struct Inner {
    device: Arc<Shared>,
    state: Mutex<State>,
    idle: Condvar,
    rung: AtomicBool,
    /// The thread waits, or is about to: it needs the doorbell's file.
    waiting: AtomicBool,
    bell: Event,
}

/// The thread and ring of one queue.
pub(super) struct Uring {
    inner: Arc<Inner>,
    thread: Option<JoinHandle<()>>,
}

impl Uring {
    /// Makes ring and thread.
    ///
    /// # Errors
    /// When the host has no io_uring, or not for this process.
    pub fn new(device: Arc<Shared>, number: u16) -> io::Result<Self> {
        let bell = Event::new()?;
        let ring = ring(device.disk.plain_file().ok_or(io::ErrorKind::Unsupported)?, &bell)?;
        let inner = Arc::new(Inner {
            device,
            state: Mutex::default(),
            idle: Condvar::new(),
            rung: AtomicBool::new(false),
            waiting: AtomicBool::new(false),
            bell,
        });
        let for_thread = inner.clone();
        let thread = std::thread::Builder::new().name(format!("blk-{number}")).spawn(move || for_thread.work(ring))?;
        Ok(Self { inner, thread: Some(thread) })
    }

    /// Takes an enabled queue. What is in it already is served at once.
    pub fn start(&self, queue: Virtqueue, flush: bool) -> Arc<dyn Doorbell> {
        let mut state = lock(&self.inner.state);
        (state.queue, state.flush) = (Some(queue), flush);
        drop(state);
        self.inner.ring();
        self.inner.clone()
    }

    /// Gives the queue back when all that was taken from it is answered.
    pub fn stop(&self) -> Option<Virtqueue> {
        let mut state = lock(&self.inner.state);
        state.stopping = true;
        self.inner.ring();
        while state.running {
            state = self.inner.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.stopping = false;
        state.queue.take()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        lock(&self.inner.state).quit = true;
        self.inner.ring();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Doorbell for Inner {
    fn ring(&self) {
        self.rung.store(true, Ordering::SeqCst);
        if self.waiting.swap(false, Ordering::SeqCst) {
            self.bell.notify();
        }
    }

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }
}

impl Inner {
    /// The thread: takes the queue, serves it until it is asked for, gives it back.
    fn work(&self, mut ring: IoUring) {
        let mut doorbell = Listener::default();
        loop {
            let taken = {
                let mut state = lock(&self.state);
                if state.quit {
                    return;
                }
                let taken = if state.stopping { None } else { state.queue.take() };
                state.running = taken.is_some();
                taken.map(|queue| (queue, state.flush))
            };
            let Some((mut queue, flush)) = taken else {
                if self.pause(&mut ring, &mut doorbell).is_err() {
                    return;
                }
                continue;
            };
            let memory = queue.memory();
            let mut session = Session { inner: self, flush, slots: Slots::default(), doorbell: &mut doorbell };
            let fine = catch_unwind(AssertUnwindSafe(|| session.serve(&mut queue, &memory, &mut ring)));
            let failed = match &fine {
                Ok(result) => result.as_ref().err().map(ToString::to_string),
                Err(_) => Some("the disk's thread failed".into()),
            };
            // Whatever happened: the kernel must be done with the guest's memory and with the vectors.
            session.drain(&mut ring);
            drop(session);
            if let Some(why) = &failed {
                queue.fail(why);
            }
            let mut state = lock(&self.state);
            state.queue = Some(queue);
            state.running = false;
            self.idle.notify_all();
            drop(state);
            if failed.is_some() && self.pause(&mut ring, &mut doorbell).is_err() {
                return;
            }
        }
    }

    /// Waits for the doorbell.
    fn pause(&self, ring: &mut IoUring, doorbell: &mut Listener) -> io::Result<()> {
        while !self.rung.swap(false, Ordering::SeqCst) {
            self.waiting.store(true, Ordering::SeqCst);
            if self.rung.load(Ordering::SeqCst) {
                continue;
            }
            doorbell.listen(ring)?;
            wait(ring, None)?;
            for entry in ring.completion() {
                if entry.user_data() == BELL_RANG {
                    // Perhaps by an engine, which only counts.
                    doorbell.listening = false;
                    self.rung.store(true, Ordering::SeqCst);
                }
            }
        }
        Ok(())
    }
}

/// Submits what there is and waits for a completion, for `at_most` if that is given.
fn wait(ring: &IoUring, at_most: Option<std::time::Duration>) -> io::Result<()> {
    let time = at_most.map(types::Timespec::from);
    let result = match &time {
        Some(time) => ring.submitter().submit_with_args(1, &types::SubmitArgs::new().timespec(time)),
        None => ring.submit_and_wait(1),
    };
    match result {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY | libc::ETIME)) => {
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// The read of the doorbell that is always in flight while the thread waits.
#[derive(Default)]
struct Listener {
    listening: bool,
    /// Where the kernel puts the doorbell's count: in a place that does not move.
    count: Box<u64>,
}

impl Listener {
    fn listen(&mut self, ring: &mut IoUring) -> io::Result<()> {
        if self.listening {
            return Ok(());
        }
        let entry = opcode::Read::new(BELL, (&raw mut *self.count).cast(), 8).build().user_data(BELL_RANG);
        // SAFETY: the count lives as long as the thread, which ends with the ring.
        unsafe { ring.submission().push(&entry) }.map_err(io::Error::other)?;
        self.listening = true;
        Ok(())
    }
}

/// A request in the kernel's hands.
struct Flight<'m> {
    head: u16,
    request: Request<'m>,
    vectors: Vec<libc::iovec>,
    /// Vectors that are done.
    skipped: usize,
    /// Bytes that are done.
    done: u64,
    /// A write that is done and being made durable.
    settling: bool,
}

struct Slots<'m> {
    flights: Vec<Option<Flight<'m>>>,
    count: usize,
}

impl Default for Slots<'_> {
    fn default() -> Self {
        Self { flights: (0..DEPTH).map(|_| None).collect(), count: 0 }
    }
}

/// One queue being served.
struct Session<'a, 'm> {
    inner: &'a Inner,
    flush: bool,
    slots: Slots<'m>,
    doorbell: &'a mut Listener,
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{0}")]
    Queue(#[from] QueueError),
    #[error("io_uring: {0}")]
    Ring(#[from] io::Error),
}

impl<'m> Session<'_, 'm> {
    /// Serves until the queue is asked for, and all that was taken from it is answered.
    fn serve(&mut self, queue: &mut Virtqueue, memory: &'m Arc<VmMemory>, ring: &mut IoUring) -> Result<(), Failure> {
        if queue.is_broken() {
            self.inner.rung.store(false, Ordering::SeqCst);
        }
        loop {
            let asked = {
                let state = lock(&self.inner.state);
                state.stopping || state.quit
            };
            let mut limited = None;
            if !asked && !queue.is_broken() {
                limited = self.take(queue, memory, ring)?;
            }
            if asked && self.slots.count == 0 {
                return Ok(());
            }
            self.inner.waiting.store(true, Ordering::SeqCst);
            if self.inner.rung.swap(false, Ordering::SeqCst) && limited.is_none() && !asked {
                // More came meanwhile: look again, with what there is submitted.
                self.inner.waiting.store(false, Ordering::SeqCst);
                submit(ring)?;
            } else {
                self.doorbell.listen(ring)?;
                wait(ring, limited)?;
                self.inner.waiting.store(false, Ordering::SeqCst);
                self.inner.rung.store(false, Ordering::SeqCst);
            }
            self.reap(queue, ring)?;
        }
    }

    /// Takes what is in the queue and gives it to the kernel. Returns how long the next has to wait for the disk's limits, if it has.
    fn take(
        &mut self,
        queue: &mut Virtqueue,
        memory: &'m Arc<VmMemory>,
        ring: &mut IoUring,
    ) -> Result<Option<std::time::Duration>, Failure> {
        let device = &self.inner.device;
        loop {
            while self.slots.count < DEPTH {
                let mut limiter = lock(device.disk.limiter());
                if limiter.limits()
                    && !queue.is_empty()
                    && let Some(wait) = limiter.wait(Instant::now())
                {
                    return Ok(Some(wait));
                }
                let Some(mut chain) = queue.pop(memory)? else { break };
                let policy = device.policy(self.flush);
                let request = request::parse(&device.disk, policy, &mut chain);
                if limiter.limits() {
                    limiter.take(request.as_ref().map_or(0, Request::bytes));
                }
                drop(limiter);
                match request {
                    None => answer(queue, chain.head, 0)?,
                    Some(request) if self.flies(&request) => self.start(chain.head, request, ring)?,
                    // Rare, or done already.
                    Some(request) => answer(queue, chain.head, request.run(&device.disk, policy))?,
                }
            }
            if self.slots.count == DEPTH || !queue.enable_notification()? {
                return Ok(None);
            }
        }
    }

    /// Is this one for the kernel to do by itself?
    fn flies(&self, request: &Request<'_>) -> bool {
        match &request.work {
            Work::Read(_, buffers) | Work::Write(_, buffers) => !buffers.is_empty(),
            Work::Flush => self.inner.device.disk.flush_unneeded().is_none(),
            _ => false,
        }
    }

    fn start(&mut self, head: u16, request: Request<'m>, ring: &mut IoUring) -> io::Result<()> {
        let vectors = match &request.work {
            Work::Read(_, buffers) | Work::Write(_, buffers) => iovecs(&buffers.slices()),
            _ => Vec::new(),
        };
        let flight = Flight { head, request, vectors, skipped: 0, done: 0, settling: false };
        let Some(number) = self.slots.flights.iter().position(Option::is_none) else {
            return Err(io::Error::other("too many requests in flight"));
        };
        submit_flight(&flight, number, ring)?;
        if let Some(slot) = self.slots.flights.get_mut(number) {
            *slot = Some(flight);
            self.slots.count += 1;
        }
        Ok(())
    }

    /// Answers what the kernel is done with.
    fn reap(&mut self, queue: &mut Virtqueue, ring: &mut IoUring) -> Result<(), Failure> {
        let entries: Vec<(u64, i32)> = ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (number, result) in entries {
            if number == BELL_RANG {
                self.doorbell.listening = false;
                continue;
            }
            let number = number as usize;
            let Some(mut flight) = self.slots.flights.get_mut(number).and_then(Option::take) else { continue };
            self.slots.count -= 1;
            match self.landed(&mut flight, result) {
                Some(written) => {
                    let disk = &self.inner.device.disk;
                    let (what, result) = written;
                    let done = if let Work::Read(_, buffers) = &flight.request.work {
                        let done = u32::try_from(flight.done).unwrap_or(u32::MAX).min(buffers.len());
                        buffers.written(done);
                        done
                    } else {
                        0
                    };
                    let written = flight.request.finish(disk, what, done, &result);
                    answer(queue, flight.head, written)?;
                }
                None => {
                    submit_flight(&flight, number, ring)?;
                    if let Some(slot) = self.slots.flights.get_mut(number) {
                        *slot = Some(flight);
                        self.slots.count += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// The kernel's answer: what was done and how it ended, or `None` when there is more to do.
    fn landed(&self, flight: &mut Flight<'_>, result: i32) -> Option<(&'static str, io::Result<()>)> {
        let device = &self.inner.device;
        let what = match &flight.request.work {
            Work::Read(..) => "read",
            Work::Write(..) => "write",
            _ => "flush",
        };
        if result < 0 {
            if matches!(-result, libc::EINTR | libc::EAGAIN) {
                return None;
            }
            let error = Err(io::Error::from_raw_os_error(-result));
            if what == "flush" || flight.settling {
                device.disk.flushed(&error);
            }
            return Some((what, error));
        }
        if what == "flush" || flight.settling {
            return Some((what, Ok(())));
        }
        if result == 0 {
            // The file was truncated under us, or the device ended.
            return Some((what, Err(io::ErrorKind::UnexpectedEof.into())));
        }
        flight.done += result as u64;
        let vectors = flight.vectors.get_mut(flight.skipped..).unwrap_or_default();
        let before = vectors.len();
        let left = advance(vectors, result as usize).len();
        flight.skipped += before - left;
        if left > 0 {
            return None;
        }
        if what == "write" && device.policy(self.flush).write_through() {
            match device.disk.flush_unneeded() {
                Some(result) => return Some((what, result)),
                None => flight.settling = true,
            }
            return None;
        }
        Some((what, Ok(())))
    }

    /// Waits until the kernel has nothing in hand; no answers are given.
    fn drain(&mut self, ring: &mut IoUring) {
        while self.slots.count > 0 {
            if wait(ring, None).is_err() {
                // The ring is gone; its memory must outlive whatever the kernel still does.
                std::mem::forget(std::mem::take(&mut self.slots));
                return;
            }
            let numbers: Vec<u64> = ring.completion().map(|entry| entry.user_data()).collect();
            for number in numbers {
                if number == BELL_RANG {
                    self.doorbell.listening = false;
                } else if self.slots.flights.get_mut(number as usize).and_then(Option::take).is_some() {
                    self.slots.count -= 1;
                }
            }
        }
    }
}

fn submit(ring: &IoUring) -> io::Result<()> {
    match ring.submit() {
        Ok(_) => Ok(()),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Gives what is left of a request to the ring.
fn submit_flight(flight: &Flight<'_>, number: usize, ring: &mut IoUring) -> io::Result<()> {
    let vectors = flight.vectors.get(flight.skipped..).unwrap_or_default();
    let count = vectors.len().min(libc::UIO_MAXIOV as usize) as u32;
    let entry = match &flight.request.work {
        _ if flight.settling => fsync(),
        Work::Read(offset, _) => opcode::Readv::new(DISK, vectors.as_ptr(), count).offset(offset + flight.done).build(),
        Work::Write(offset, _) => {
            opcode::Writev::new(DISK, vectors.as_ptr(), count).offset(offset + flight.done).build()
        }
        _ => fsync(),
    };
    let entry = entry.user_data(number as u64);
    // SAFETY: the vectors and the memory they point to stay until the completion is there: the flight is kept in its slot, and whoever
    // lets go of the slots drains the ring first.
    while unsafe { ring.submission().push(&entry) }.is_err() {
        submit(ring)?;
    }
    Ok(())
}

fn fsync() -> squeue::Entry {
    opcode::Fsync::new(DISK).flags(types::FsyncFlags::DATASYNC).build()
}

fn answer(queue: &mut Virtqueue, head: u16, written: u32) -> Result<(), QueueError> {
    queue.push(head, written)?;
    queue.signal()
}
