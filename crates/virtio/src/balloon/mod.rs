//! virtio-balloon (virtio 1.3, 5.5): memory that the guest does not need goes back to the host.
//!
//! * Free-page reporting: the guest names blocks of free memory by itself, and takes them again by using them.
//! * The balloon: the host sets by [`BalloonHandle::set_target`] how much the guest is to do without; the guest gives pages as it can,
//!   and takes them back by itself rather than kill a program (VIRTIO_BALLOON_F_DEFLATE_ON_OOM).
//! * Statistics: [`BalloonHandle::ask`] has the guest say anew how its memory is used.
//!
//! Inflating and reporting have a thread each, as giving memory back takes the host's kernel its time; the other queues are served
//! on the vCPU's thread. What a queue's bytes mean is in [`request`].

pub mod request;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::GuestRam;
use serde::{Deserialize, Serialize};

use crate::device::{DeviceState, Interrupt, VirtioDevice, read_bytes};
use crate::queue::{QueueError, Virtqueue};
use crate::runner::{Doorbell, Inline, Job, StopFlag, Worker};
use request::{MemoryStats, PAGE};

/// VIRTIO_BALLOON_F_STATS_VQ (5.5.3): there is a queue for statistics.
const F_STATS_VQ: u64 = 1 << 1;
/// VIRTIO_BALLOON_F_DEFLATE_ON_OOM: the guest may take pages back by itself when it needs them.
const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// VIRTIO_BALLOON_F_PAGE_POISON: the guest says what its free pages are filled with.
const F_PAGE_POISON: u64 = 1 << 4;
/// VIRTIO_BALLOON_F_REPORTING: there is a queue for free pages.
const F_REPORTING: u64 = 1 << 5;
/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATISTICS: u16 = 2;
/// Reporting is queue 4; but drivers before Linux 6.11 number only the queues that there are, and without free-page hints it is their 3.
const REPORTING: [u16; 2] = [3, 4];
/// Offsets in the configuration space (5.5.4): the size that the host wants, the size that the guest says, what free pages hold.
const ACTUAL: usize = 4;
const POISON: usize = 12;
const CONFIG_LEN: usize = 16;

/// Saved state of [`Balloon`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BalloonState {
    /// Pages that the host wants in the balloon.
    pub target: u32,
    /// Pages that the guest says are in it.
    pub actual: u32,
    /// What the guest's free pages are filled with.
    pub poison: u32,
}

#[derive(Default)]
struct Host {
    state: BalloonState,
    /// Free pages are filled with [`BalloonState::poison`], and must be so when they are used again.
    poisoned: bool,
    generation: u32,
    interrupt: Option<Arc<dyn Interrupt>>,
    stats: Option<MemoryStats>,
    /// Counts [`Self::stats`].
    heard: u64,
}

struct Shared {
    ram: GuestRam,
    host: Mutex<Host>,
    /// The guest is to say anew how its memory is used.
    ask: AtomicBool,
    /// Bytes given back by inflating and by reports.
    inflated: AtomicU64,
    reported: AtomicU64,
}

impl Shared {
    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How things stand with a balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Does the guest have a driver for it that is ready?
    pub driver: bool,
    /// Bytes of the VM's memory.
    pub memory: u64,
    /// Bytes that the guest is to do without.
    pub target: u64,
    /// Bytes that the guest says it does without.
    pub actual: u64,
    /// Bytes given back so far as the balloon grew.
    pub inflated: u64,
    /// Bytes given back so far by free-page reporting.
    pub reported: u64,
    /// What the guest last said about its memory.
    pub stats: Option<MemoryStats>,
    /// How often it has said so.
    pub heard: u64,
}

/// The host's end of a balloon. Clones are the same end.
#[derive(Clone)]
pub struct BalloonHandle {
    shared: Arc<Shared>,
    stats_bell: Arc<dyn Doorbell>,
}

impl fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BalloonHandle").field("state", &self.shared.host().state).finish_non_exhaustive()
    }
}

impl BalloonHandle {
    /// The guest is to do without `bytes` (rounded down to 4 KiB) of its memory. It follows as it can.
    pub fn set_target(&self, bytes: u64) {
        let pages = u32::try_from(bytes.min(self.shared.ram.size()) / PAGE).unwrap_or(u32::MAX);
        let mut host = self.shared.host();
        if host.state.target != pages {
            host.state.target = pages;
            host.generation = host.generation.wrapping_add(1);
            let interrupt = host.interrupt.clone();
            drop(host);
            if let Some(interrupt) = interrupt {
                interrupt.config();
            }
        }
    }

    /// Asks the guest for new statistics; they arrive later, if it has a driver.
    pub fn ask(&self) {
        self.shared.ask.store(true, Ordering::SeqCst);
        self.stats_bell.ring();
    }

    /// How things stand.
    pub fn status(&self) -> BalloonStatus {
        let host = self.shared.host();
        BalloonStatus {
            driver: host.interrupt.is_some(),
            memory: self.shared.ram.size(),
            target: u64::from(host.state.target) * PAGE,
            actual: u64::from(host.state.actual) * PAGE,
            inflated: self.shared.inflated.load(Ordering::Relaxed),
            reported: self.shared.reported.load(Ordering::Relaxed),
            stats: host.stats,
            heard: host.heard,
        }
    }
}

/// Gives back what the guest puts into the balloon.
struct InflateJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
}

impl Job for InflateJob {
    fn run(&mut self, stop: &StopFlag) {
        let shared = &self.shared;
        self.queue.serve(stop, |chain| {
            shared.inflated.fetch_add(request::inflate(&shared.ram, chain, stop), Ordering::Relaxed);
            0
        });
    }

    fn failed(&mut self) {
        self.queue.fail(&"the balloon's thread failed");
    }
}

/// What the guest takes out of the balloon is there: the host finds memory when it is used.
struct DeflateJob(Virtqueue);

impl Job for DeflateJob {
    fn run(&mut self, stop: &StopFlag) {
        self.0.serve(stop, |_| 0);
    }

    fn failed(&mut self) {
        self.0.fail(&"the balloon failed");
    }
}

/// Gives back what the guest reports as free.
struct ReportJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
}

impl Job for ReportJob {
    fn run(&mut self, stop: &StopFlag) {
        let shared = &self.shared;
        self.queue.serve(stop, |chain| {
            let host = shared.host();
            let keep = host.poisoned && host.state.poison != 0;
            drop(host);
            if !keep {
                shared.reported.fetch_add(request::report(&shared.ram, chain, stop), Ordering::Relaxed);
            }
            0
        });
    }

    fn failed(&mut self) {
        self.queue.fail(&"the thread for free pages failed");
    }
}

/// Holds the one buffer for statistics that the guest has, until it is to fill it again (5.5.6.3).
struct StatsJob {
    queue: Virtqueue,
    shared: Arc<Shared>,
    held: Option<u16>,
}

impl StatsJob {
    fn serve(&mut self, stop: &StopFlag) -> Result<(), QueueError> {
        let memory = self.queue.memory();
        loop {
            self.queue.disable_notification()?;
            while !stop.is_set() {
                let Some(mut chain) = self.queue.pop(&memory)? else { break };
                let stats = MemoryStats::parse(&mut chain.readable);
                let mut host = self.shared.host();
                host.stats = Some(stats);
                host.heard = host.heard.wrapping_add(1);
                drop(host);
                if let Some(head) = self.held.replace(chain.head) {
                    self.queue.push(head, 0)?;
                }
            }
            if !self.queue.enable_notification()? || stop.is_set() {
                break;
            }
        }
        if let Some(head) = self.held.take_if(|_| self.shared.ask.swap(false, Ordering::SeqCst)) {
            self.queue.push(head, 0)?;
            self.queue.signal()?;
        }
        Ok(())
    }
}

impl Job for StatsJob {
    fn run(&mut self, stop: &StopFlag) {
        if !self.queue.is_broken()
            && let Err(why) = self.serve(stop)
        {
            self.queue.fail(&why);
        }
    }

    fn failed(&mut self) {
        self.queue.fail(&"the balloon's statistics failed");
    }
}

/// A virtio balloon.
pub struct Balloon {
    shared: Arc<Shared>,
    inflate: Worker<InflateJob>,
    deflate: Inline<DeflateJob>,
    stats: Inline<StatsJob>,
    report: Worker<ReportJob>,
    /// Which queue `report` has.
    reporting: Option<u16>,
}

impl Balloon {
    /// A balloon in the VM whose memory is `ram`, and its host end.
    ///
    /// # Errors
    /// When the host gives no threads.
    pub fn new(ram: GuestRam) -> std::io::Result<(Self, BalloonHandle)> {
        let shared = Arc::new(Shared {
            ram,
            host: Mutex::default(),
            ask: AtomicBool::new(false),
            inflated: AtomicU64::new(0),
            reported: AtomicU64::new(0),
        });
        let stats = Inline::default();
        let handle = BalloonHandle { shared: shared.clone(), stats_bell: stats.doorbell() };
        let (inflate, report) = (Worker::new("balloon")?, Worker::new("free-pages")?);
        Ok((Self { shared, inflate, deflate: Inline::default(), stats, report, reporting: None }, handle))
    }

    /// `struct virtio_balloon_config` (5.5.4): num_pages, actual, free_page_hint_cmd_id (0: none wanted), poison_val.
    fn config(&self) -> [u8; CONFIG_LEN] {
        let BalloonState { target, actual, poison } = self.shared.host().state;
        let mut config = [0; CONFIG_LEN];
        let words = [target, actual, 0, poison];
        for (to, from) in config.iter_mut().zip(words.into_iter().flat_map(u32::to_le_bytes)) {
            *to = from;
        }
        config
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u16 {
        5
    }

    fn features(&self) -> u64 {
        F_STATS_VQ | F_DEFLATE_ON_OOM | F_PAGE_POISON | F_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 5]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let mut config = self.config();
        let Ok(offset) = usize::try_from(offset) else { return };
        for (to, from) in config.iter_mut().skip(offset).zip(data) {
            *to = *from;
        }
        let word = |at: usize| config.iter().skip(at).take(4).rev().fold(0, |word, byte| word << 8 | u32::from(*byte));
        let mut host = self.shared.host();
        (host.state.actual, host.state.poison) = (word(ACTUAL), word(POISON));
    }

    fn config_generation(&self) -> u32 {
        self.shared.host().generation
    }

    fn activate(&mut self, features: u64, interrupt: Arc<dyn Interrupt>) {
        let mut host = self.shared.host();
        host.poisoned = features & F_PAGE_POISON != 0;
        host.interrupt = Some(interrupt);
    }

    fn start_queue(&mut self, queue: Virtqueue) -> Arc<dyn Doorbell> {
        let shared = self.shared.clone();
        match queue.index() {
            INFLATE => {
                self.inflate.start(InflateJob { queue, shared });
                self.inflate.doorbell()
            }
            DEFLATE => {
                self.deflate.start(DeflateJob(queue));
                self.deflate.doorbell()
            }
            STATISTICS => {
                self.stats.start(StatsJob { queue, shared, held: None });
                self.stats.doorbell()
            }
            // A driver has one of the two.
            index if self.reporting.is_none() => {
                self.reporting = Some(index);
                self.report.start(ReportJob { queue, shared });
                self.report.doorbell()
            }
            _ => crate::runner::silent(),
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<Virtqueue> {
        match index {
            INFLATE => self.inflate.stop().map(|job| job.queue),
            DEFLATE => self.deflate.stop().map(|job| job.0),
            STATISTICS => self.stats.stop().map(|mut job| {
                // It is taken again when the queue goes on.
                job.queue.unpop(job.held.is_some().into());
                job.queue
            }),
            index if REPORTING.contains(&index) && self.reporting == Some(index) => {
                self.reporting = None;
                self.report.stop().map(|job| job.queue)
            }
            _ => None,
        }
    }

    fn reset(&mut self) {
        let mut host = self.shared.host();
        // What is wanted of the guest stays so when it starts again.
        host.state = BalloonState { target: host.state.target, ..BalloonState::default() };
        (host.poisoned, host.interrupt, host.stats) = (false, None, None);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon(self.shared.host().state.clone())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), String> {
        let DeviceState::Balloon(state) = state else { return Err("it is not of a balloon".into()) };
        let mut host = self.shared.host();
        host.state = state.clone();
        host.generation = host.generation.wrapping_add(1);
        Ok(())
    }
}
