//! What comes from outside: interrupts, INIT and start-up, being stopped, and the sleep of a halted vCPU.

use std::sync::atomic::Ordering;
use std::time::Instant;

use cpu::{CpuState, Exit, InterruptStatus, rflags};

use super::BtVcpu;

impl BtVcpu {
    /// Takes what is pending. Returns an exit when the VMM must decide.
    pub(super) fn events(&mut self) -> Option<Exit> {
        loop {
            self.handle.memory.kick_word().store(0, Ordering::SeqCst);
            self.safe_point();
            if self.handle.stop.swap(false, Ordering::SeqCst) {
                return Some(Exit::Stopped);
            }
            self.drop_written();
            self.forgive_sites();
            self.stop_predicting();
            if self.sampler.ready() && self.tamper.is_none() {
                self.promote();
            }
            if let Some(since) = self.sampler.steady() {
                self.consider_direct(since);
            }
            let block = self.block();
            let state = &mut block.state;
            let status = self.setup.lapic.status();
            if status.init || state.wait_for_sipi {
                if let Some(exit) = self.start_up(status) {
                    return Some(exit);
                }
                continue;
            }
            let parked = self.is_parked();
            if parked && status.nmi {
                // There is nothing yet that could take it.
                self.setup.lapic.acknowledge_nmi();
                continue;
            }
            if status.nmi && !state.nmi_blocked && !state.interrupt_shadow {
                self.setup.lapic.acknowledge_nmi();
                state.halted = false;
                if self.interp.deliver_nmi(state).is_err() {
                    return Some(Exit::TripleFault);
                }
                continue;
            }
            if status.interrupt && state.rflags & rflags::IF != 0 && !state.interrupt_shadow {
                if let Some(vector) = self.setup.lapic.acknowledge() {
                    state.halted = false;
                    if self.interp.deliver_interrupt(state, vector).is_err() {
                        return Some(Exit::TripleFault);
                    }
                }
                continue;
            }
            block.irq_waiting = u32::from(status.interrupt);
            if state.halted && self.pv_unhalt && self.handle.unhalted.swap(false, Ordering::SeqCst) {
                state.halted = false;
            }
            if !state.halted && !parked {
                return None;
            }
            let hopeless = state.rflags & rflags::IF == 0 && !status.nmi;
            if self.sleep(hopeless) {
                return Some(Exit::Stuck);
            }
        }
    }

    /// Does this vCPU wait in the parking code without having been called?
    fn is_parked(&self) -> bool {
        self.setup.index > 0
            && self.shared.parking.is_some_and(|parking| {
                self.block().state.rip == parking.code && parking.called(&self.shared.ram) != Some(self.setup.index)
            })
    }

    /// Sleeps until kicked. `hopeless`: no maskable interrupt can wake it. Returns whether all vCPUs have come to that.
    pub(super) fn sleep(&mut self, hopeless: bool) -> bool {
        self.counters.halts += 1;
        let start = Instant::now();
        let (world, handle) = (&self.shared.world, &self.handle);
        world.park(handle);
        if hopeless {
            handle.hopeless.store(true, Ordering::SeqCst);
            world.check_stuck();
        }
        self.sampler.sleep();
        handle.wait();
        handle.hopeless.store(false, Ordering::SeqCst);
        let stuck = world.stuck.load(Ordering::SeqCst);
        self.resume();
        self.counters.halted_time += start.elapsed();
        stuck
    }

    /// INIT and start-up IPIs. Sleeps while this vCPU waits for the latter.
    fn start_up(&mut self, status: InterruptStatus) -> Option<Exit> {
        if status.init {
            self.setup.lapic.acknowledge_init();
            self.block().state = CpuState { wait_for_sipi: true, ..CpuState::default() };
            self.interp.flush();
            self.flush_all();
        } else if let Some(page) = status.sipi {
            self.setup.lapic.acknowledge_init();
            return Some(Exit::Internal(format!(
                "a start-up IPI to page {page:#x}: 16-bit code is not supported, the guest must use the ACPI wake-up mailbox"
            )));
        } else if self.sleep(true) {
            return Some(Exit::Stuck);
        }
        None
    }
}
