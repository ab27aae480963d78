//! The slow path of memory accesses.

use std::sync::atomic::Ordering;

use cpu::PageFault;
use cpu::paging::{self, Access as PageAccess, Kind, PagingContext};

use super::{BtVcpu, CALLERS};
use crate::block::{BOUNCE, WRONG_PREDICTIONS};
use crate::walks::Found;

impl BtVcpu {
    /// The slow path of a memory check. Returns the delta, or tells to leave.
    fn slow_access(&mut self, address: u64, descriptor: u32) -> Option<u64> {
        self.counters.tlb_misses += 1;
        self.page_fault = None;
        let site = self.shared.sites.accesses.get(descriptor)?;
        let (access, user) = (site.access, site.user);
        if let Some((number, position)) = access.site {
            let learned = &mut self.block().sites.as_flattened_mut()[usize::from(number)];
            if learned.wrong >= 0 {
                learned.wrong = -WRONG_PREDICTIONS;
                self.unpredictable.push((number, position));
                self.handle.memory.kick_word().store(1, Ordering::SeqCst);
            }
        }
        if !paging::is_canonical(address) {
            return None;
        }
        if (address & 0xfff) + u64::from(access.size) > 4096 {
            let short = usize::from(access.size) <= BOUNCE && !access.write;
            return if short { self.read_across(address, user) } else { None };
        }
        let block = self.block();
        let kind = if access.write { Kind::Write } else { Kind::Read };
        let context = PagingContext::new(&block.state);
        let found = match self.walks.find(&context, address, user, access.write) {
            Some(found) => found,
            None => match paging::walk(&self.shared.ram, &context, address, PageAccess::new(kind, user)) {
                Ok(mapping) => {
                    self.walks.learn(&self.shared.ram, address, &mapping);
                    Found::from(&mapping)
                }
                Err(fault) => {
                    let address = address.wrapping_add(u64::from(access.ahead));
                    self.page_fault =
                        (!access.own_faults && self.lockstep.is_none()).then_some(PageFault { address, ..fault });
                    return None;
                }
            },
        };
        let host = self.shared.ram.host_page(found.gpa)? as u64;
        if access.write && self.shared.ram.code_pages().test(found.gpa >> 12) {
            return None;
        }
        self.trace_fill(if access.write { "write" } else { "read" }, user, address & !0xfff, found);
        Some(self.tlbs.fill(block, user, access.write, address, host, found.global, found.size))
    }

    /// A read of at most [`BOUNCE`] bytes across two pages: the instruction reads a copy. `None`: the interpreter must do it.
    fn read_across(&mut self, address: u64, user: bool) -> Option<u64> {
        let block = self.block();
        let second = (address & !0xfff).wrapping_add(4096);
        let context = PagingContext::new(&block.state);
        for (from, to) in [(second.wrapping_sub(BOUNCE as u64), 0), (second, BOUNCE)] {
            if !paging::is_canonical(from) {
                return None;
            }
            let mapping = paging::walk(&self.shared.ram, &context, from, PageAccess::new(Kind::Read, user)).ok()?;
            if !self.shared.ram.read(mapping.gpa, block.bounce.0.get_mut(to..to + BOUNCE)?) {
                return None;
            }
        }
        Some(block.bounce_middle.wrapping_sub(second))
    }

    /// The access whose check stub was called from this position.
    fn called_from(&mut self, position: u32) -> u32 {
        let known = &mut self.callers[position as usize % CALLERS];
        if known.0 != position || known.2 != self.generation {
            // A number that no access has: the vCPU stops.
            *known = (position, self.shared.sites.called_from(position).unwrap_or(u32::MAX), self.generation);
        }
        known.1
    }

    pub(super) fn trace_fill(&self, kind: &str, user: bool, page: u64, found: Found) {
        if let Some(trace) = &self.trace {
            trace.line(format_args!(
                "tlb cpu{} fill {kind} {} {page:#x} gpa {:#x} size {:#x}{}",
                self.setup.index,
                if user { "user" } else { "kernel" },
                found.gpa,
                found.size,
                if found.global { " global" } else { "" },
            ));
        }
    }
}

#[repr(C)]
pub struct SlowResult {
    delta: u64,
    leave: u64,
}

/// Called by the stub of the same name on the monitor's stack.
///
/// # Safety
/// `vcpu` is the runtime pointer of the running vCPU's block.
pub unsafe extern "C" fn slow_access(vcpu: *mut BtVcpu, address: u64, descriptor: u32) -> SlowResult {
    // SAFETY: the vCPU is inside `enter`, on this thread, and holds no reference across it that is used meanwhile.
    let vcpu = unsafe { &mut *vcpu };
    let descriptor = if std::mem::take(&mut vcpu.block().by_call) == 0 {
        descriptor
    } else {
        vcpu.called_from(descriptor.wrapping_sub(vcpu.code_start))
    };
    match vcpu.slow_access(address, descriptor) {
        Some(delta) => SlowResult { delta, leave: 0 },
        None => {
            vcpu.block().exit_arg = descriptor;
            SlowResult { delta: 0, leave: 1 }
        }
    }
}
