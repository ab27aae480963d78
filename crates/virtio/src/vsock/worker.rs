//! The thread of the device: it waits for the guest's doorbells and for host streams at once, and carries packets while there are any.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::muxer::{Muxer, WAKE};
use super::packet::{HEADER, Header};
use super::{EVENT, RECEIVE, TRANSMIT};
use crate::queue::{QueueError, Virtqueue};
use crate::runner::Doorbell;

/// Packets carried in one direction before the other has its turn.
const TURN: u32 = 64;

/// What the thread works on; the transport takes queues away and brings them.
pub(super) struct Work {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    event: Option<Virtqueue>,
    pub(super) muxer: Muxer,
    /// The guest is to be told that its connections are gone (5.10.6.7).
    pub(super) transport_reset: bool,
}

struct Shared {
    /// An event counter that wakes the thread.
    wake: OwnedFd,
    /// The thread sleeps, or is about to: ringing must wake it.
    sleeping: AtomicBool,
    work: Mutex<Work>,
    /// So many want to have [`Shared::work`]: the thread makes room.
    wanted: AtomicU32,
    quit: AtomicBool,
}

impl Shared {
    fn take_over(&self) -> MutexGuard<'_, Work> {
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        work
    }

    fn wake(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes of a local. It can fail only when the counter is full, and the thread awake then.
        unsafe { libc::write(self.wake.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

impl Doorbell for Shared {
    fn ring(&self) {
        if self.sleeping.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }
}

/// The handle on the thread. It ends with it.
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn new(muxer: Muxer) -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        muxer.epoll.add(wake.as_raw_fd(), WAKE)?;
        let shared = Arc::new(Shared {
            wake,
            sleeping: AtomicBool::new(false),
            work: Mutex::new(Work { receive: None, transmit: None, event: None, muxer, transport_reset: false }),
            wanted: AtomicU32::new(0),
            quit: AtomicBool::new(false),
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name("vsock".into()).spawn(move || run(&for_thread))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Changes something while the thread pauses.
    pub(super) fn with(&self, change: impl FnOnce(&mut Work)) {
        change(&mut self.shared.take_over());
        self.shared.wake();
    }

    pub(super) fn start(&self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        self.with(|work| match queue.index() {
            RECEIVE => work.receive = Some(queue),
            TRANSMIT => work.transmit = Some(queue),
            _ => work.event = Some(queue),
        });
        self.shared.clone()
    }

    pub(super) fn stop(&self, index: u16) -> Option<Virtqueue> {
        let mut work = self.shared.take_over();
        match index {
            RECEIVE => work.receive.take(),
            TRANSMIT => work.transmit.take(),
            EVENT => work.event.take(),
            _ => None,
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(shared: &Shared) {
    // The set of descriptors is waited for without the work: a descriptor that is closed meanwhile leaves it by itself.
    let epoll = shared.take_over().muxer.epoll.clone();
    let mut sleep = false;
    while !shared.quit.load(Ordering::SeqCst) {
        let events = epoll.wait(if sleep { -1 } else { 0 });
        shared.sleeping.store(false, Ordering::SeqCst);
        while shared.wanted.load(Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_micros(20));
        }
        let mut work = shared.work.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = catch_unwind(AssertUnwindSafe(|| {
            for event in events {
                if event.token == WAKE {
                    let mut count = [0; 8];
                    // SAFETY: reads 8 bytes into a local.
                    unsafe { libc::read(shared.wake.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
                } else {
                    work.muxer.ready(event);
                }
            }
            work.turn(shared)
        }));
        sleep = turn.unwrap_or_else(|_| {
            let Work { receive, transmit, event, muxer, .. } = &mut *work;
            for queue in [receive, transmit, event].into_iter().flatten() {
                queue.fail(&"the vsock device's thread failed");
            }
            muxer.clear();
            true
        });
    }
}

impl Work {
    /// Carries packets in both directions; `true` when there is nothing more to do now.
    fn turn(&mut self, shared: &Shared) -> bool {
        let mut more = self.tell_reset();
        let Self { receive, transmit, muxer, .. } = self;
        if let Some(queue) = transmit {
            more |= guarded(queue, |queue| take(queue, muxer, shared));
        }
        if let Some(queue) = receive {
            more |= guarded(queue, |queue| give(queue, muxer, shared));
        }
        if more {
            return false;
        }
        shared.sleeping.store(true, Ordering::SeqCst);
        let mut again = false;
        if let Some(queue) = transmit.as_mut().filter(|_| muxer.takes()) {
            again |= guarded(queue, Virtqueue::enable_notification);
        }
        if let Some(queue) = receive.as_mut().filter(|_| muxer.has_something()) {
            again |= guarded(queue, Virtqueue::enable_notification);
        }
        !again
    }

    /// Tells the guest of a transport reset, once it has a buffer for that.
    fn tell_reset(&mut self) -> bool {
        let Some(queue) = self.event.as_mut().filter(|_| self.transport_reset) else { return false };
        let mut told = false;
        guarded(queue, |queue| {
            let memory = queue.memory();
            if let Some(mut chain) = queue.pop(&memory)? {
                // struct virtio_vsock_event: VIRTIO_VSOCK_EVENT_TRANSPORT_RESET is 0.
                let written = chain.writable.write(&[0; 4]);
                queue.push(chain.head, written as u32)?;
                queue.signal()?;
                told = true;
            }
            Ok(false)
        });
        self.transport_reset = !told;
        false
    }
}

/// Takes packets from the guest; `true` when there may be more.
fn take(queue: &mut Virtqueue, muxer: &mut Muxer, shared: &Shared) -> Result<bool, QueueError> {
    let memory = queue.memory();
    queue.disable_notification()?;
    let mut taken = 0;
    let mut payload = Vec::new();
    while taken < TURN && muxer.takes() && shared.wanted.load(Ordering::Relaxed) == 0 {
        let Some(mut chain) = queue.pop(&memory)? else { break };
        // What is too short for a header says nothing.
        if let Some(header) = chain.readable.read_array::<HEADER>() {
            let header = Header::parse(&header);
            let len = header.len.min(chain.readable.len()).min(64 << 10);
            payload.resize(len as usize, 0);
            chain.readable.read(&mut payload);
            muxer.packet(&header, &payload);
        }
        queue.push(chain.head, 0)?;
        taken += 1;
    }
    if taken > 0 {
        queue.signal()?;
    }
    Ok(taken > 0)
}

/// Gives the guest packets; `true` when there may be more.
fn give(queue: &mut Virtqueue, muxer: &mut Muxer, shared: &Shared) -> Result<bool, QueueError> {
    let memory = queue.memory();
    let mut given = 0;
    queue.disable_notification()?;
    while given < TURN && muxer.has_something() && shared.wanted.load(Ordering::Relaxed) == 0 {
        let Some(mut chain) = queue.pop(&memory)? else { break };
        let room = chain.writable.len() as usize;
        let mut written = 0;
        if room >= HEADER {
            let Some((header, payload)) = muxer.next_packet(room) else {
                queue.unpop(1);
                break;
            };
            written = chain.writable.write(&header.to_bytes()) + chain.writable.write(payload);
        }
        queue.push(chain.head, written as u32)?;
        given += 1;
    }
    if given > 0 {
        queue.signal()?;
    }
    Ok(given > 0)
}

/// Does work on a queue that the driver may have broken.
fn guarded(queue: &mut Virtqueue, work: impl FnOnce(&mut Virtqueue) -> Result<bool, QueueError>) -> bool {
    if queue.is_broken() {
        return false;
    }
    work(queue).unwrap_or_else(|why| {
        queue.fail(&why);
        false
    })
}
