//! The thread of an interface. It waits for two things, its port and its doorbell, and carries packets while there are any.
//!
//! ```text
//!   transmit queue ── one writev from guest memory ──▶ port      port full: the packet is kept, the queue waits
//!   receive queue  ◀── copied from one buffer ──────── port      queue empty: the packet is kept, the port waits
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::port::{Offloads, Port};
use super::{HEADER, MAX_PACKET, RECEIVE, TRANSMIT};
use crate::device::{Interrupt, Reporter};
use crate::queue::{QueueError, Virtqueue};
use crate::runner::Doorbell;

/// Packets carried in one direction before the other has its turn.
const TURN: u32 = 64;
/// How long a network server may take to end.
const PATIENCE: Duration = Duration::from_secs(1);
/// The shortest packet that is one: header and Ethernet header.
const MIN_PACKET: usize = HEADER + 14;

/// What the thread works on; the transport takes queues away and brings them.
#[derive(Default)]
struct Work {
    receive: Option<Virtqueue>,
    transmit: Option<Virtqueue>,
    /// VIRTIO_NET_F_MRG_RXBUF was negotiated: a packet may use several buffers.
    mergeable: bool,
    interrupt: Option<Arc<dyn Interrupt>>,
}

struct Shared {
    port: Port,
    /// An event counter that wakes the thread.
    wake: OwnedFd,
    /// The thread sleeps, or is about to: ringing must wake it.
    sleeping: AtomicBool,
    work: Mutex<Work>,
    /// So many want to have [`Shared::work`]: the thread makes room.
    wanted: AtomicU32,
    link_up: AtomicBool,
    quit: AtomicBool,
    reporter: Option<Reporter>,
}

impl Shared {
    /// The work, taken from the thread, which pauses for it.
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

    fn event(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.as_fd())
    }
}

/// The handle on the thread. It ends with it.
pub(super) struct Worker {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    pub(super) fn new(port: Port, reporter: Option<Reporter>) -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let wake = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if wake < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and nobody else has it.
        let wake = unsafe { OwnedFd::from_raw_fd(wake) };
        let shared = Arc::new(Shared {
            port,
            wake,
            sleeping: AtomicBool::new(false),
            work: Mutex::default(),
            wanted: AtomicU32::new(0),
            link_up: AtomicBool::new(true),
            quit: AtomicBool::new(false),
            reporter,
        });
        let for_thread = shared.clone();
        let thread = std::thread::Builder::new().name("net".into()).spawn(move || Carrier::new(for_thread).run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn port(&self) -> &Port {
        &self.shared.port
    }

    pub(super) fn link_up(&self) -> bool {
        self.shared.link_up.load(Ordering::SeqCst)
    }

    pub(super) fn activate(&self, offloads: Offloads, mergeable: bool, interrupt: Arc<dyn Interrupt>) {
        let mut work = self.shared.take_over();
        work.mergeable = mergeable;
        work.interrupt = Some(interrupt);
        self.shared.port.driver_is(offloads);
    }

    pub(super) fn reset(&self) {
        self.shared.take_over().interrupt = None;
    }

    pub(super) fn start(&self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let mut work = self.shared.take_over();
        match queue.index() {
            RECEIVE => work.receive = Some(queue),
            _ => work.transmit = Some(queue),
        }
        drop(work);
        self.shared.wake();
        self.shared.clone()
    }

    pub(super) fn stop(&self, index: u16) -> Option<Virtqueue> {
        let mut work = self.shared.take_over();
        match index {
            RECEIVE => work.receive.take(),
            TRANSMIT => work.transmit.take(),
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
        self.shared.port.finish(PATIENCE);
    }
}

/// What must happen before there is more to do.
#[derive(Clone, Copy, Debug, Default)]
struct Waits {
    /// The port has a packet.
    readable: bool,
    /// The port takes a packet.
    writable: bool,
}

/// The thread's own things.
struct Carrier {
    shared: Arc<Shared>,
    /// The packet that is on its way to the guest: its first `arriving` bytes; none when 0.
    arrival: Vec<u8>,
    arriving: usize,
    /// A packet that the port had no room for.
    leaving: Option<Vec<u8>>,
    /// The driver knows that the link is down.
    told: bool,
}

impl Carrier {
    fn new(shared: Arc<Shared>) -> Self {
        Self { shared, arrival: vec![0; MAX_PACKET], arriving: 0, leaving: None, told: false }
    }

    fn run(mut self) {
        let shared = self.shared.clone();
        while !shared.quit.load(Ordering::SeqCst) {
            while shared.wanted.load(Ordering::SeqCst) > 0 {
                std::thread::sleep(Duration::from_micros(20));
            }
            let waits = {
                let mut work = shared.work.lock().unwrap_or_else(PoisonError::into_inner);
                match catch_unwind(AssertUnwindSafe(|| self.carry(&mut work))) {
                    Ok(waits) => waits,
                    Err(_) => {
                        let Work { receive, transmit, .. } = &mut *work;
                        for queue in [receive, transmit].into_iter().flatten() {
                            queue.fail(&"the network interface's thread failed");
                        }
                        self.arriving = 0;
                        Some(Waits::default())
                    }
                }
            };
            if let Some(waits) = waits {
                self.sleep(waits);
            }
        }
    }

    /// Carries packets until there are none, or others want the queues (`None`).
    fn carry(&mut self, work: &mut Work) -> Option<Waits> {
        loop {
            self.shared.sleeping.store(false, Ordering::SeqCst);
            let mut waits = Waits::default();
            let mut more = false;
            if let Some(queue) = &mut work.transmit {
                more |= guarded(queue, |queue| self.transmit(queue, &mut waits));
            }
            if let Some(queue) = &mut work.receive {
                more |= guarded(queue, |queue| self.receive(queue, work.mergeable, &mut waits));
            }
            if !self.shared.link_up.load(Ordering::SeqCst) {
                waits = Waits::default();
                if let Some(interrupt) = work.interrupt.as_ref().filter(|_| !self.told) {
                    interrupt.config();
                }
                self.told = true;
            }
            if self.shared.wanted.load(Ordering::SeqCst) > 0 {
                return None;
            }
            if more {
                continue;
            }
            // From here on ringing wakes the thread; what was rung for before is seen by looking again.
            self.shared.sleeping.store(true, Ordering::SeqCst);
            let mut again = false;
            if let Some(queue) = work.transmit.as_mut().filter(|_| !waits.writable) {
                again |= guarded(queue, Virtqueue::enable_notification);
            }
            if let Some(queue) = work.receive.as_mut().filter(|_| self.arriving > 0) {
                again |= guarded(queue, Virtqueue::enable_notification);
            }
            if !again {
                return Some(waits);
            }
        }
    }

    /// Sends what the guest made available; `true` when there may be more.
    fn transmit(&mut self, queue: &mut Virtqueue, waits: &mut Waits) -> Result<bool, QueueError> {
        if let Some(packet) = self.leaving.take() {
            let piece = libc::iovec { iov_base: packet.as_ptr().cast_mut().cast(), iov_len: packet.len() };
            if !self.send(&[piece]) {
                self.leaving = Some(packet);
                waits.writable = true;
                return Ok(false);
            }
        }
        let memory = queue.memory();
        queue.disable_notification()?;
        let mut sent = 0;
        while sent < TURN && self.shared.wanted.load(Ordering::Relaxed) == 0 {
            let Some(mut chain) = queue.pop(&memory)? else { break };
            let len = chain.readable.len() as usize;
            let good = (MIN_PACKET..=MAX_PACKET).contains(&len);
            if good && !self.send(&chain.readable.iovecs(usize::from(crate::queue::MAX_CHAIN))) {
                let mut packet = vec![0; len];
                chain.readable.read(&mut packet);
                self.leaving = Some(packet);
                waits.writable = true;
            }
            queue.push(chain.head, 0)?;
            sent += 1;
            if waits.writable {
                break;
            }
        }
        if sent > 0 {
            queue.signal()?;
        }
        Ok(sent > 0 && !waits.writable)
    }

    /// Gives the port a packet; `false` when it has no room now. What cannot be sent at all is lost, as on any wire.
    fn send(&self, pieces: &[libc::iovec]) -> bool {
        if !self.shared.link_up.load(Ordering::SeqCst) {
            return true;
        }
        loop {
            match self.shared.port.send(pieces) {
                Ok(()) => return true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    if self.shared.port.is_end(&error) {
                        self.link_is_down();
                    }
                    return true;
                }
            }
        }
    }

    /// Gives the guest what the port has; `true` when there may be more.
    fn receive(&mut self, queue: &mut Virtqueue, mergeable: bool, waits: &mut Waits) -> Result<bool, QueueError> {
        let mut given = 0;
        let mut more = true;
        while given < TURN && self.shared.wanted.load(Ordering::Relaxed) == 0 {
            if self.arriving == 0 && !self.fetch() {
                waits.readable = true;
                more = false;
                break;
            }
            if !self.deliver(queue, mergeable)? {
                more = false;
                break;
            }
            self.arriving = 0;
            given += 1;
        }
        if given > 0 {
            queue.signal()?;
        }
        Ok(more && given > 0)
    }

    /// Takes a packet from the port; `false` when it has none.
    fn fetch(&mut self) -> bool {
        while self.shared.link_up.load(Ordering::SeqCst) {
            match self.shared.port.receive(&mut self.arrival) {
                Ok(0) => self.link_is_down(),
                Ok(len) if len >= MIN_PACKET => {
                    self.arriving = len;
                    return true;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                Err(error) if self.shared.port.is_end(&error) => self.link_is_down(),
                Err(_) => return false,
            }
        }
        false
    }

    /// Puts the arriving packet into buffers of the guest; `false` when it has not made enough of them available.
    fn deliver(&mut self, queue: &mut Virtqueue, mergeable: bool) -> Result<bool, QueueError> {
        let Some(packet) = self.arrival.get_mut(..self.arriving) else { return Ok(true) };
        let memory = queue.memory();
        let most = if mergeable { queue.state().size } else { 1 };
        let mut chains = Vec::new();
        let mut room = 0usize;
        while room < packet.len() {
            if chains.len() >= usize::from(most) {
                // Not even all buffers that there can be hold it.
                queue.unpop(chains.len() as u16);
                return Ok(true);
            }
            match queue.pop(&memory)? {
                Some(chain) => {
                    room += chain.writable.len() as usize;
                    chains.push(chain);
                }
                None => {
                    queue.unpop(chains.len() as u16);
                    return Ok(false);
                }
            }
        }
        // num_buffers (5.1.6.4)
        if let Some(field) = packet.get_mut(HEADER - 2..HEADER) {
            field.copy_from_slice(&(chains.len() as u16).to_le_bytes());
        }
        let mut rest = &*packet;
        for mut chain in chains {
            let written = chain.writable.write(rest);
            rest = rest.get(written..).unwrap_or_default();
            queue.push(chain.head, written as u32)?;
        }
        Ok(true)
    }

    /// The port's other end is gone: the guest sees a cable that was pulled.
    fn link_is_down(&self) {
        if self.shared.link_up.swap(false, Ordering::SeqCst)
            && !self.shared.quit.load(Ordering::SeqCst)
            && let Some(reporter) = &self.shared.reporter
        {
            reporter("the network's host side has ended: the guest's network cable counts as pulled");
        }
    }

    fn sleep(&self, waits: Waits) {
        let (mut events, link_up) = (0, self.shared.link_up.load(Ordering::SeqCst));
        for (wanted, event) in [(waits.readable, libc::POLLIN), (waits.writable, libc::POLLOUT)] {
            events |= if wanted && link_up { event } else { 0 };
        }
        let port = if events == 0 { -1 } else { self.shared.port.as_fd().as_raw_fd() };
        let mut fds = [
            libc::pollfd { fd: self.shared.wake.as_raw_fd(), events: libc::POLLIN, revents: 0 },
            libc::pollfd { fd: port, events, revents: 0 },
        ];
        // SAFETY: the array has two elements and is not used elsewhere meanwhile.
        unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        self.shared.sleeping.store(false, Ordering::SeqCst);
        if fds.first().is_some_and(|fd| fd.revents != 0) {
            let mut count = [0; 8];
            // SAFETY: reads 8 bytes into a local.
            unsafe { libc::read(self.shared.wake.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
        }
    }
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
