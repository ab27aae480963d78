//! What a vCPU forgets, and when: flushes of the TLB and of the code cache, exclusive sections, and blocks whose code was written.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use super::BtVcpu;
use crate::block::WRONG_PREDICTIONS;
use crate::cache::Forgotten;
use crate::world::Cause;

impl BtVcpu {
    pub(super) fn reset_call_stacks(&mut self) {
        let underflow = {
            let cache = self.shared.cache();
            cache.address(cache.stubs.underflow)
        };
        for user in [false, true] {
            let empty = self.handle.memory.empty_stack(user);
            // SAFETY: the address lies in our own stack mapping.
            unsafe { *(empty as *mut u64) = underflow };
        }
        let memory = &self.handle.memory;
        let block = self.block();
        block.kernel_empty = memory.empty_stack(false);
        block.user_rsp = memory.empty_stack(true);
        block.call_rsp = memory.empty_stack(block.user != 0);
    }

    /// After a flush of the code cache, and at the start.
    pub(super) fn flush_everything(&mut self) {
        self.unpredictable.clear();
        // Slots of the old cache are not to be touched: others may be making new ones of the same numbers.
        self.tlbs.forget_slots();
        self.flush_all();
        let cache = self.shared.cache();
        cache.fill_slots(&self.handle);
        self.generation = cache.generation;
    }

    pub(super) fn flush_all(&mut self) {
        self.counters.flush_all += 1;
        self.walks.forget();
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush all", self.setup.index));
        }
        let block = self.block();
        self.tlbs.flush_all(block, |slot| self.shared.thunk(slot));
        self.reset_call_stacks();
        if let Some(direct) = &mut self.direct {
            direct.flush();
        }
    }

    pub(super) fn flush_local(&mut self) {
        self.counters.flush_local += 1;
        self.walks.forget();
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush non-global", self.setup.index));
        }
        let block = self.block();
        self.tlbs.flush_local(block, |slot| self.shared.thunk(slot));
        self.reset_call_stacks();
        if let Some(direct) = &mut self.direct {
            direct.flush();
        }
    }

    /// From one process-context identifier to another; `keep`: with what was known of it.
    pub(super) fn switch_space(&mut self, from: u16, to: u16, keep: bool) {
        if let Some(trace) = &self.trace {
            let kept = if keep { " kept" } else { "" };
            trace.line(format_args!("tlb cpu{} switch {from:#x} to {to:#x}{kept}", self.setup.index));
        }
        self.counters.switches += 1;
        self.walks.forget();
        let block = self.block();
        let kept = self.tlbs.switch(block, from, to, keep, |slot| self.shared.thunk(slot));
        self.counters.switches_kept += u64::from(kept);
        self.reset_call_stacks();
        if let Some(direct) = &mut self.direct {
            direct.switched(to, !keep);
        }
    }

    pub(super) fn flush_page(&mut self, address: u64) {
        self.counters.flush_page += 1;
        self.walks.forget();
        if let Some(trace) = &self.trace {
            trace.line(format_args!("tlb cpu{} flush page {address:#x}", self.setup.index));
        }
        let block = self.block();
        if let Some(direct) = &mut self.direct {
            direct.flush_page(address, block.state.cr3 as u16 & 0xfff);
        }
        if self.tlbs.flush_page(block, address, |slot| self.shared.thunk(slot)) {
            self.reset_call_stacks();
        }
    }

    /// Throws the whole code cache away. A safe point.
    pub(super) fn flush_cache(&mut self) {
        self.exclusive(Cause::Flush, |vcpu| {
            {
                let mut cache = vcpu.shared.cache();
                for page in cache.flush() {
                    vcpu.shared.ram.code_pages().clear(page >> 12);
                }
                vcpu.shared.epoch.store(cache.epoch, Ordering::Release);
                vcpu.shared.generation.store(cache.generation, Ordering::Release);
            }
            // The others see the new generation before they go on.
            vcpu.flush_everything();
        });
    }

    /// Changes the check sites whose predictions fail often. A safe point if there are any.
    pub(super) fn stop_predicting(&mut self) {
        if self.unpredictable.is_empty() {
            return;
        }
        self.exclusive(Cause::Predict, |vcpu| {
            // Emptied if the cache has been flushed meanwhile.
            for (site, position) in std::mem::take(&mut vcpu.unpredictable) {
                vcpu.shared.cache().stop_predicting(site, position as usize);
            }
        });
    }

    /// Translates again what the samples show to be hot. A safe point if there is any.
    #[cold]
    pub(super) fn promote(&mut self) {
        let mut hot: Vec<_> = {
            let mut cache = self.shared.cache();
            self.sampler.take().filter_map(|place| cache.sampled(place)).collect()
        };
        if hot.is_empty() {
            return;
        }
        hot.sort_unstable();
        hot.dedup();
        let start = Instant::now();
        let generation = self.generation;
        let full = self.exclusive(Cause::Promote, |vcpu| {
            if vcpu.generation != generation {
                return false;
            }
            let mut forgotten = Forgotten::default();
            let mut full = false;
            {
                let mut cache = vcpu.shared.cache();
                for id in hot {
                    let Some(gpa) = cache.block(id).map(|block| block.key.page) else { continue };
                    // Writes that are not dealt with yet: the next samples will tell.
                    if vcpu.shared.has_hits.load(Ordering::SeqCst) {
                        break;
                    }
                    let read = vcpu.shared.ram.read(gpa, &mut vcpu.page[..4096]);
                    vcpu.page_copied = None;
                    if read && cache.promote(id, &vcpu.page[..4096], &mut forgotten).is_err() {
                        full = true;
                        break;
                    }
                }
            }
            // Old ways still lead to the new code: only here, where it matters, they are made shorter.
            for (target, user) in std::mem::take(&mut forgotten.targets) {
                let address = vcpu.address(target);
                vcpu.tlbs.forget_indirect(vcpu.block(), address, user);
            }
            vcpu.forget(&forgotten);
            let forgotten = Arc::new(forgotten);
            vcpu.shared.world.send(&vcpu.handle, |mail| mail.forget(&forgotten));
            full
        });
        self.counters.translator_time += start.elapsed();
        if full {
            self.flush_cache();
        }
    }

    /// Once a second, wrong predictions are counted anew.
    pub(super) fn forgive_sites(&mut self) {
        let now = interp::tsc::read();
        if now.wrapping_sub(self.sites_forgiven) >= u64::from(interp::tsc::khz()) * 1000 {
            self.sites_forgiven = now;
            for site in self.block().sites.as_flattened_mut() {
                site.wrong = -WRONG_PREDICTIONS;
            }
        }
    }

    /// Runs `work` while all other vCPUs are parked. A safe point: before `work`, others may have dropped blocks or flushed the
    /// cache. What `work` finds holds until the next safe point.
    pub(super) fn exclusive<T>(&mut self, cause: Cause, work: impl FnOnce(&mut Self) -> T) -> T {
        let (shared, handle) = (self.shared.clone(), self.handle.clone());
        let section = shared.world.begin(&handle, cause);
        if section.is_some() {
            self.open_mail();
        }
        let result = work(self);
        drop(section);
        result
    }

    /// From now on this vCPU is running. Waits while others want it parked.
    pub(super) fn resume(&mut self) {
        self.shared.world.unpark(&self.handle);
        self.sampler.wake();
        self.open_mail();
    }

    /// Lets others have their exclusive sections.
    #[inline]
    pub(super) fn safe_point(&mut self) {
        if self.shared.world.wanted() {
            self.shared.world.park(&self.handle);
            self.resume();
        }
    }

    /// Does what exclusive sections of others ask of this vCPU's own caches.
    pub(super) fn open_mail(&mut self) {
        if self.handle.has_mail.swap(false, Ordering::AcqRel) {
            let mail = std::mem::take(&mut *self.handle.mail.lock().unwrap_or_else(PoisonError::into_inner));
            if mail.everything {
                self.flush_all();
            }
            for page in mail.protect {
                self.protect(page);
            }
            for forgotten in mail.forgotten {
                self.forget(&forgotten);
            }
        }
        if self.shared.generation.load(Ordering::Acquire) != self.generation {
            self.flush_everything();
        }
    }

    /// The page at this guest-physical address holds translated code now: this vCPU must not write it unnoticed.
    pub(super) fn protect(&mut self, gpa: u64) {
        if let Some(host) = self.shared.ram.host_page(gpa) {
            self.tlbs.protect(self.block(), host as u64);
        }
        if let Some(direct) = &mut self.direct {
            direct.protect(gpa);
        }
    }

    /// Removes ways to translations that have gone.
    pub(super) fn forget(&mut self, forgotten: &Forgotten) {
        let block = self.block();
        if !forgotten.targets.is_empty() {
            self.tlbs.forget_kept_jumps();
        }
        for &(target, user) in &forgotten.targets {
            self.tlbs.forget_indirect(block, self.address(target), user);
        }
        for &slot in &forgotten.slots {
            if let Some(entry) = self.shared.sites.slots.get(slot) {
                block.slots[slot as usize].store(entry.thunk, Ordering::Relaxed);
            }
        }
    }

    /// Drops translations of memory that has been written. A safe point if there are any.
    #[inline]
    pub(super) fn drop_written(&mut self) {
        if self.shared.has_hits.load(Ordering::SeqCst) {
            self.drop_hits();
        }
    }

    #[cold]
    pub(super) fn drop_hits(&mut self) {
        self.exclusive(Cause::Drop, |vcpu| {
            // Cleared only in here: who sees it clear knows that what was written before has been dealt with.
            vcpu.shared.has_hits.store(false, Ordering::SeqCst);
            let hits = std::mem::take(&mut *vcpu.shared.hits.lock().unwrap_or_else(PoisonError::into_inner));
            let mut forgotten = Forgotten::default();
            {
                let mut cache = vcpu.shared.cache();
                for hit in hits {
                    cache.drop_hit(hit, &mut forgotten);
                }
                vcpu.shared.epoch.store(cache.epoch, Ordering::Release);
            }
            for page in std::mem::take(&mut forgotten.empty_pages) {
                vcpu.shared.ram.code_pages().clear(page >> 12);
            }
            vcpu.forget(&forgotten);
            let forgotten = Arc::new(forgotten);
            vcpu.shared.world.send(&vcpu.handle, |mail| mail.forget(&forgotten));
        });
    }
}
