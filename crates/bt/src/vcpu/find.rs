//! From an address to a translation: modes, pages of code and the translator.

use std::sync::atomic::Ordering;
use std::time::Instant;

use cpu::paging::{Access as PageAccess, Kind, PagingContext};
use cpu::{CpuState, cr0, cr4, paging, rflags};

use super::BtVcpu;
use crate::analyze::Mode;
use crate::cache::{BlockId, Full, Key, STEP_ONLY};
use crate::walks::Found;
use crate::world::Cause;

impl BtVcpu {
    /// The mode that the state asks for; `None` where only the interpreter can go on.
    pub(super) fn current_mode(state: &CpuState) -> Option<Mode> {
        let cpl = state.cpl();
        if !state.is_64bit_code()
            || (cpl != 0 && cpl != 3)
            || state.rflags & rflags::TF != 0
            || state.interrupt_shadow
            || state.dr[7] & 0xff != 0
            || (cpl == 3 && state.rflags & rflags::AC != 0 && state.cr0 & cr0::AM != 0)
        {
            return None;
        }
        Some(Mode {
            plain: false,
            user: cpl == 3,
            no_fpu: state.cr0 & (cr0::TS | cr0::EM) != 0 || state.cr4 & cr4::OSFXSR == 0,
            no_avx: state.cr4 & cr4::OSXSAVE == 0 || state.xcr0 & 6 != 6,
            df: state.rflags & rflags::DF != 0,
            no_tsc: state.tsc_offset != 0 || (cpl == 3 && state.cr4 & cr4::TSD != 0),
        })
    }

    pub(super) fn set_mode(&mut self, mode: Mode) {
        let block = self.block();
        if mode.user != (block.user != 0) {
            // The kernel starts with an empty stack; the program's is kept for when it goes on.
            if mode.user {
                block.call_rsp = block.user_rsp;
            } else {
                block.user_rsp = block.call_rsp;
                block.call_rsp = block.kernel_empty;
            }
            block.user = u32::from(mode.user);
        }
        let rest = |m: Mode| Mode { user: false, ..m };
        let others = rest(mode) != rest(self.mode);
        self.mode = mode;
        if others {
            // Indirect targets and landing pads are not keyed by these, nor do the fast transitions look at them.
            self.tlbs.flush_jumps(block, |slot| self.shared.thunk(slot));
            self.reset_call_stacks();
            self.update_fast();
        }
    }

    /// The guest-physical address of the executable RAM page at `page`, and whether its mapping is global.
    pub(super) fn fetch_page(&mut self, page: u64) -> Option<(u64, bool)> {
        let user = self.mode.user;
        if let Some(hit) = self.tlbs.fetch(page, user) {
            return Some(hit);
        }
        if !paging::is_canonical(page) {
            return None;
        }
        let context = PagingContext::new(&self.block().state);
        let mapping = paging::walk(&self.shared.ram, &context, page, PageAccess::new(Kind::Fetch, user)).ok()?;
        self.shared.ram.host_page(mapping.gpa)?;
        self.trace_fill("fetch", user, page, Found::from(&mapping));
        self.tlbs.fill_fetch(page, user, mapping.gpa, mapping.global, mapping.page_size);
        Some((mapping.gpa, mapping.global))
    }

    /// From now on writes to the page are noticed. A safe point if they were not.
    pub(super) fn watch_page(&mut self, gpa: u64) -> Option<()> {
        if !self.shared.ram.code_pages().test(gpa >> 12) {
            self.shared.ram.host_page(gpa)?;
            self.exclusive(Cause::Protect, |vcpu| {
                vcpu.shared.ram.code_pages().set(gpa >> 12);
                vcpu.protect(gpa);
                vcpu.shared.world.send(&vcpu.handle, |mail| mail.protect(gpa));
            });
        }
        Some(())
    }

    /// The block at `address`, translated if need be. `None`: no executable RAM there, the interpreter raises the fault.
    /// The flag tells whether its mapping is global. A safe point: what was found before may have gone.
    pub(super) fn find(&mut self, address: u64) -> Option<(BlockId, bool)> {
        self.find_mode(address, self.mode)
    }

    /// The same for the target of a slot, which mostly is where it was in the program before.
    pub(super) fn find_slot(&mut self, slot: u32, target: u64) -> Option<(BlockId, bool)> {
        self.drop_written();
        let page = target & !0xfff;
        if self.breakpoints.is_empty()
            && let Some((gpa, global)) = self.fetch_page(page)
        {
            let known = {
                let cache = self.shared.cache();
                cache.known(slot, gpa, self.mode).map(|id| (id, cache.base_of(id)))
            };
            if let Some((id, base)) = known {
                if base != 0 {
                    self.place(base, page, global);
                }
                return Some((id, global));
            }
        }
        self.find(target)
    }

    pub(super) fn find_mode(&mut self, address: u64, mode: Mode) -> Option<(BlockId, bool)> {
        // Memory that a device has written, and that the guest knows of: none of its old code may be entered any more.
        self.drop_written();
        let page = address & !0xfff;
        let (gpa, global) = self.fetch_page(page)?;
        let mut key = Key::new(gpa, address, mode);
        if self.is_breakpoint(&key, address) {
            return None;
        }
        let (mut id, mut base) = self.look_up(key, address)?;
        let mut jumps_global = global;
        if id == STEP_ONLY {
            let (tail, tail_global) = self.fetch_page(page.wrapping_add(4096))?;
            key.tail = tail | 1;
            (id, base) = self.look_up(key, address)?;
            jumps_global &= tail_global;
        }
        if base != 0 {
            self.place(base, page, global);
        }
        Some((id, jumps_global))
    }

    /// Stands a breakpoint at the address? Of movable code, at one that it shares translations with?
    fn is_breakpoint(&self, key: &Key, address: u64) -> bool {
        self.breakpoints.iter().any(|&b| b == address || key.movable() && b & 0xfff == key.address)
    }

    /// The block of the key and the number of its base, translated if need be.
    fn look_up(&mut self, key: Key, address: u64) -> Option<(BlockId, u32)> {
        let found = {
            let cache = self.shared.cache();
            cache.find(&key).map(|id| (id, cache.base_of(id)))
        };
        match found {
            Some(found) => Some(found),
            None => {
                let id = self.translate(key, address)?;
                Some((id, self.shared.cache().base_of(id)))
            }
        }
    }

    /// From now on, the page of movable code of number `base` runs at guest-virtual address `page`.
    fn place(&mut self, base: u32, page: u64, global: bool) {
        let block = self.block();
        if !self.tlbs.place(block, base, page, global) {
            // A program runs the page at two addresses.
            self.tlbs.flush_jumps(block, |slot| self.shared.thunk(slot));
            self.reset_call_stacks();
            self.tlbs.place(block, base, page, global);
        }
    }

    fn translate(&mut self, key: Key, address: u64) -> Option<BlockId> {
        let start = Instant::now();
        let id = self.translate_now(key, address);
        self.counters.translator_time += start.elapsed();
        id
    }

    fn translate_now(&mut self, key: Key, address: u64) -> Option<BlockId> {
        let mut room = true;
        loop {
            // First the mark, then the translation of what is there.
            self.watch_page(key.page)?;
            if key.tail != 0 {
                self.watch_page(key.tail & !1)?;
                // The second mark was a safe point: is the first still there?
                if !self.shared.ram.code_pages().test(key.page >> 12) {
                    continue;
                }
            }
            // The copy stays good as long as no page with code has been written.
            let epoch = self.shared.epoch.load(Ordering::Acquire);
            if self.page_copied != Some((key.page, epoch)) {
                self.page_copied = None;
                if !self.shared.ram.read(key.page, &mut self.page[..4096]) {
                    return None;
                }
                self.page_copied = Some((key.page, epoch));
                if let Some(tamper) = self.tamper {
                    tamper(address & !0xfff, &mut self.page[..4096]);
                }
            }
            if key.tail != 0 && !self.shared.ram.read(key.tail & !1, &mut self.page[4096..]) {
                return None;
            }
            let result = {
                let mut cache = self.shared.cache();
                if cache.epoch != epoch {
                    continue;
                }
                match cache.find(&key) {
                    // Another vCPU was faster.
                    Some(id) => Ok(id),
                    None if key.tail == 0 => cache.translate(key, &self.page[..4096], address),
                    None => cache.translate_crossing(key, &self.page[..], address),
                }
            };
            match result {
                Ok(id) => return Some(id),
                Err(Full) if room => {
                    room = false;
                    self.flush_cache();
                }
                Err(Full) => return None,
            }
        }
    }
}
