//! Carries requests from the queues to the server, and answers back.
//!
//! Whoever rings (a vCPU's thread) copies the requests itself, and looks for their answers for a short while: most come so soon that
//! waking another thread would take longer. What takes longer is the business of a thread of the device's own, which also notices when
//! the server ends. From then on requests are answered with EIO.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use memory::VmMemory;
use share::abi::{IN_HEADER, OUT_HEADER};
use share::channel::{AREA, Client, Patience, SLOTS};

use super::QUEUES;
use crate::buffers::Buffers;
use crate::device::Reporter;
use crate::event::Event;
use crate::queue::{QueueError, Virtqueue};
use crate::runner::{Doorbell, silent};

/// How long a vCPU's thread looks for an answer.
const LOOK: Duration = Duration::from_micros(60);
/// How long requests on the way may take when the queue is to stop. A server that takes longer counts as ended.
const PATIENCE: Duration = Duration::from_secs(30);

/// A request on the way.
#[derive(Clone, Copy)]
struct OnTheWay {
    queue: usize,
    /// Of its chain; none if that was given back already, because there is no answer.
    head: Option<u16>,
    unique: u64,
    /// Bytes that the answer may have.
    room: u32,
}

#[derive(Default)]
struct Work {
    queues: [Option<Virtqueue>; QUEUES],
    slots: [Option<OnTheWay>; SLOTS],
    /// A queue is being stopped: nothing new is taken from it, and somebody waits for what is on the way.
    stopping: [bool; QUEUES],
    dead: bool,
}

struct Shared {
    name: String,
    channel: Client,
    socket: OwnedFd,
    /// Wakes the thread when it is to quit.
    quit_event: Event,
    work: Mutex<Work>,
    /// Answers were given back.
    progress: Condvar,
    patience: Mutex<Patience>,
    quit: AtomicBool,
    reporter: Option<Reporter>,
}

/// The handle on it. The thread ends with it, and the server when both are gone.
pub(super) struct Carrier {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Carrier {
    pub(super) fn new(name: &str, channel: Client, socket: OwnedFd, reporter: Option<Reporter>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            channel,
            socket,
            quit_event: Event::new()?,
            work: Mutex::default(),
            progress: Condvar::new(),
            patience: Mutex::new(Patience::new(LOOK)),
            quit: AtomicBool::new(false),
            reporter,
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name("share".into()).spawn(move || for_thread.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn start(&self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let index = usize::from(queue.index());
        let mut work = lock(&self.shared.work);
        let Some(place) = work.queues.get_mut(index) else { return silent() };
        *place = Some(queue);
        drop(work);
        let bell = Bell { shared: self.shared.clone(), index };
        // A restored queue may hold requests already.
        bell.ring();
        Arc::new(bell)
    }

    /// Stops a queue once all its requests are answered.
    pub(super) fn stop(&self, index: u16) -> Option<Virtqueue> {
        let (shared, index) = (&self.shared, usize::from(index));
        let mut work = lock(&shared.work);
        *work.stopping.get_mut(index)? = true;
        let end = Instant::now() + PATIENCE;
        while work.slots.iter().flatten().any(|request| request.queue == index) {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                shared.server_ended(&mut work, "does not answer");
                break;
            }
            work = shared.progress.wait_timeout(work, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        *work.stopping.get_mut(index)? = false;
        work.queues.get_mut(index)?.take()
    }
}

impl Drop for Carrier {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.shared.quit_event.notify();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Bell {
    shared: Arc<Shared>,
    index: usize,
}

impl Doorbell for Bell {
    fn ring(&self) {
        let shared = &self.shared;
        let mut work = lock(&shared.work);
        let posted = shared.take_requests(&mut work, self.index);
        drop(work);
        if !posted {
            return;
        }
        // Another vCPU may be looking already; then it finds these answers as well.
        if let Ok(mut patience) = shared.patience.try_lock() {
            shared.channel.looking(|| patience.look(|| shared.channel.any_done()));
        }
        if shared.channel.any_done() {
            shared.give_answers(&mut lock(&shared.work));
        }
    }
}

impl Shared {
    /// Hands the server what is in the queue, as far as there are slots; `true` if there was something that will be answered.
    fn take_requests(&self, work: &mut Work, index: usize) -> bool {
        let Work { queues, slots, stopping, dead } = work;
        let (Some(Some(queue)), Some(false)) = (queues.get_mut(index), stopping.get(index)) else { return false };
        if queue.is_broken() {
            return false;
        }
        match self.try_take(queue, index, slots, *dead) {
            Ok(posted) => posted,
            Err(why) => {
                queue.fail(&why);
                false
            }
        }
    }

    fn try_take(
        &self,
        queue: &mut Virtqueue,
        index: usize,
        slots: &mut [Option<OnTheWay>; SLOTS],
        dead: bool,
    ) -> Result<bool, QueueError> {
        let memory = queue.memory();
        let mut posted = false;
        loop {
            queue.disable_notification()?;
            loop {
                // Without a free slot the rest waits in the queue; answers make room.
                let Some(slot) = slots.iter().position(Option::is_none) else { return Ok(posted) };
                let Some(mut chain) = queue.pop(&memory)? else { break };
                let mut header = [0; IN_HEADER];
                let len = chain.readable.len();
                let mut start = chain.readable.clone();
                let unique = if start.read(&mut header) == IN_HEADER { unique_of(&header) } else { 0 };
                let area = self.channel.request(slot, len as usize);
                let Some(area) = area.filter(|_| !dead && len as usize >= IN_HEADER) else {
                    let errno = if dead { libc::EIO } else { libc::EINVAL };
                    let written = refuse(&mut chain.writable, unique, errno);
                    queue.push(chain.head, written)?;
                    queue.signal()?;
                    continue;
                };
                chain.readable.read_volatile(&area);
                let room = chain.writable.len().min(AREA as u32);
                let answered = room as usize >= OUT_HEADER;
                if let Some(place) = slots.get_mut(slot) {
                    let head = answered.then_some(chain.head);
                    *place = Some(OnTheWay { queue: index, head, unique, room });
                }
                self.channel.post(slot, len, room);
                posted |= answered;
                if !answered {
                    queue.push(chain.head, 0)?;
                    queue.signal()?;
                }
            }
            if !queue.enable_notification()? {
                return Ok(posted);
            }
        }
    }

    /// Gives the guest the answers that are there, and takes what waited for their slots.
    fn give_answers(&self, work: &mut Work) {
        loop {
            let done = self.channel.take_done();
            if done == 0 {
                return;
            }
            let full = work.slots.iter().all(Option::is_some);
            for slot in (0..SLOTS).filter(|slot| done & 1 << slot != 0) {
                let Some(request) = work.slots.get_mut(slot).and_then(Option::take) else { continue };
                if let Some(head) = request.head {
                    let len = self.channel.answer_len(slot).min(request.room);
                    self.answer(work, request, head, |writable| {
                        // An answer without a header is none; the guest would wait for ever.
                        let area = self.channel.answer(slot, len as usize).filter(|_| len as usize >= OUT_HEADER);
                        match area {
                            Some(area) => writable.write_volatile(&area) as u32,
                            None => refuse(writable, request.unique, libc::EIO),
                        }
                    });
                }
            }
            self.tell(work);
            if full {
                for index in 0..QUEUES {
                    self.take_requests(work, index);
                }
            }
        }
    }

    /// Wakes who waits for answers. (That is a system call even where nobody does.)
    fn tell(&self, work: &Work) {
        if work.stopping.contains(&true) {
            self.progress.notify_all();
        }
    }

    /// Gives one chain back.
    fn answer(&self, work: &mut Work, request: OnTheWay, head: u16, write: impl FnOnce(&mut Buffers<'_>) -> u32) {
        let Some(Some(queue)) = work.queues.get_mut(request.queue) else { return };
        if queue.is_broken() {
            return;
        }
        let memory: Arc<VmMemory> = queue.memory();
        // The driver may have changed the chain meanwhile, so it is walked and checked anew.
        let result = queue.chain(&memory, head).and_then(|mut chain| {
            let written = write(&mut chain.writable);
            queue.push(head, written)?;
            queue.signal()
        });
        if let Err(why) = result {
            queue.fail(&why);
        }
    }

    /// From now on nothing is asked of the server; what it has not answered is answered here.
    fn server_ended(&self, work: &mut Work, how: &str) {
        if std::mem::replace(&mut work.dead, true) {
            return;
        }
        if let Some(reporter) = self.reporter.as_ref().filter(|_| !self.quit.load(Ordering::SeqCst)) {
            reporter(&format!(
                "the server of the shared directory {} {how}: the guest gets errors there from now on",
                self.name
            ));
        }
        for slot in 0..SLOTS {
            let Some(request) = work.slots.get_mut(slot).and_then(Option::take) else { continue };
            if let Some(head) = request.head {
                self.answer(work, request, head, |writable| refuse(writable, request.unique, libc::EIO));
            }
        }
        self.tell(work);
        for index in 0..QUEUES {
            self.take_requests(work, index);
        }
    }

    /// The thread: gives answers nobody looked for.
    fn run(&self) {
        loop {
            let dead = lock(&self.work).dead;
            let poll = |fd: i32| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
            let socket = if dead { -1 } else { self.socket.as_raw_fd() };
            let mut fds = [
                poll(self.quit_event.as_fd().as_raw_fd()),
                poll(self.channel.done_event().as_fd().as_raw_fd()),
                poll(socket),
            ];
            // SAFETY: the array has three elements and is not used elsewhere meanwhile.
            unsafe { libc::poll(fds.as_mut_ptr(), 3, -1) };
            if self.quit.load(Ordering::SeqCst) {
                return;
            }
            if fds.get(1).is_some_and(|fd| fd.revents != 0) {
                self.channel.quiet();
                self.give_answers(&mut lock(&self.work));
            }
            if fds.get(2).is_some_and(|fd| fd.revents != 0) {
                self.listen();
            }
        }
    }

    /// The server says something, or has ended.
    fn listen(&self) {
        let mut byte = [0u8; 1];
        // SAFETY: reads one byte into a local.
        match unsafe { libc::read(self.socket.as_raw_fd(), byte.as_mut_ptr().cast(), 1) } {
            1 => {
                if byte == [share::server::GONE]
                    && let Some(reporter) = &self.reporter
                {
                    reporter(&format!("the shared directory {} has been removed: the guest finds it empty", self.name));
                }
            }
            -1 if io::Error::last_os_error().kind() == io::ErrorKind::Interrupted => {}
            _ => {
                let mut work = lock(&self.work);
                // What it answered before counts.
                self.give_answers(&mut work);
                self.server_ended(&mut work, "has ended");
            }
        }
    }
}

/// The request's number (`struct fuse_in_header`).
fn unique_of(header: &[u8; IN_HEADER]) -> u64 {
    header.get(8..16).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Answers with an error; returns the bytes written.
fn refuse(writable: &mut Buffers<'_>, unique: u64, errno: i32) -> u32 {
    if (writable.len() as usize) < OUT_HEADER {
        return 0;
    }
    let len = OUT_HEADER as u32;
    let header = u128::from(len) | u128::from((-errno) as u32) << 32 | u128::from(unique) << 64;
    writable.write(&header.to_le_bytes()) as u32
}
