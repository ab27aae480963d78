//! What all vCPUs and the device threads share.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memory::GuestRam;

use super::BtVcpu;
use crate::Parking;
use crate::cache::{Cache, Hit, Sites};
use crate::world::{CAUSES, World};

/// What all vCPUs and the device threads share.
pub struct Shared {
    cache: Mutex<Cache>,
    /// [`Cache::sites`], without the lock.
    pub(super) sites: Arc<Sites>,
    pub ram: GuestRam,
    pub world: World,
    /// Translations that must go because somebody wrote the memory that they were made from.
    pub(super) hits: Mutex<Vec<Hit>>,
    pub(super) has_hits: AtomicBool,
    /// [`Cache::epoch`] and [`Cache::generation`], without the lock.
    pub(super) epoch: AtomicU64,
    pub(super) generation: AtomicU64,
    pub(super) parking: Option<Parking>,
    /// Processes of vCPUs of before a reset, for those that come after it.
    runners: Mutex<Vec<runner::Runner>>,
}

impl Shared {
    pub fn new(cache: Cache, ram: GuestRam, parking: Option<Parking>) -> Arc<Self> {
        if let Some(parking) = parking {
            // Writes to the mailbox are noticed as those to code are.
            ram.code_pages().set(parking.mailbox >> 12);
        }
        Arc::new(Self {
            parking,
            sites: cache.sites.clone(),
            cache: Mutex::new(cache),
            ram,
            world: World::default(),
            hits: Mutex::new(Vec::new()),
            has_hits: AtomicBool::new(false),
            epoch: AtomicU64::new(0),
            generation: AtomicU64::new(0),
            runners: Mutex::new(Vec::new()),
        })
    }

    pub(super) fn give_runners(&self, runners: impl Iterator<Item = runner::Runner>) {
        self.runners.lock().unwrap_or_else(PoisonError::into_inner).extend(runners);
    }

    /// So many, or fewer.
    pub(super) fn take_runners(&self, count: usize) -> Vec<runner::Runner> {
        let mut runners = self.runners.lock().unwrap_or_else(PoisonError::into_inner);
        let left = runners.len().saturating_sub(count);
        runners.split_off(left)
    }

    pub(super) fn cache(&self) -> MutexGuard<'_, Cache> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The unresolved address of a slot.
    pub(super) fn thunk(&self, slot: u32) -> u64 {
        self.sites.slots.get(slot).map_or(0, |s| s.thunk)
    }
}

impl memory::CodeWriteListener for Shared {
    fn code_written(&self, gpa: u64, len: u64) {
        if let Some(parking) = self.parking
            && gpa >> 12 == parking.mailbox >> 12
            && let Some(called) = parking.called(&self.ram)
        {
            self.world.each(|vcpu| {
                if vcpu.index == called {
                    vcpu.raise();
                }
            });
        }
        let mut hits = Vec::new();
        {
            let mut cache = self.cache();
            cache.written(gpa, len, &mut hits);
            self.epoch.store(cache.epoch, Ordering::Release);
        }
        if hits.is_empty() {
            return;
        }
        self.hits.lock().unwrap_or_else(PoisonError::into_inner).append(&mut hits);
        self.has_hits.store(true, Ordering::SeqCst);
        // A vCPU that sleeps looks when it wakes.
        self.world.each(|vcpu| vcpu.nudge());
    }
}

impl BtVcpu {
    /// Counters that are not of one vCPU.
    pub(super) fn shared_counters(&self) -> Vec<(String, u64)> {
        let k = self.shared.cache().counters;
        let world = &self.shared.world;
        let mut out: Vec<(String, u64)> = [
            ("blocks.translated", k.blocks),
            ("instructions.translated", k.instructions),
            ("code-cache.bytes", k.code_bytes),
            ("blocks.invalidated", k.invalidated),
            ("code-cache.flushes", k.flushes),
            ("blocks.linked", k.links),
            ("sites.unpredictable", k.unpredictable),
            ("blocks.promoted", k.promoted),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into();
        if !world.alone() {
            let sections = CAUSES.iter().zip(&world.sections);
            out.extend(sections.map(|(name, n)| (format!("stops.{name}"), n.load(Ordering::Relaxed))));
            out.push(("stops.waiting-us".to_string(), world.waited.load(Ordering::Relaxed) / 1000));
        }
        out
    }
}
