//! The engine contract, as the monitor sees it.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use cpu::{CpuState, Exit, Kick, Vcpu};

use super::{BtVcpu, Next, Shared, StopHandle};
use crate::kick::KickHandle;

/// While this lives, the vCPU is running. It is parked even when a panic ends the run.
struct Running {
    shared: Arc<Shared>,
    handle: Arc<KickHandle>,
}

impl Running {
    fn new(vcpu: &mut BtVcpu) -> Self {
        vcpu.resume();
        Self { shared: vcpu.shared.clone(), handle: vcpu.handle.clone() }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.shared.world.park(&self.handle);
    }
}

impl Vcpu for BtVcpu {
    fn run(&mut self) -> Exit {
        let start = Instant::now();
        let _running = Running::new(self);
        self.interp.resumed(&self.block().state);
        let exit = self.run_guest();
        if let Some(direct) = &mut self.direct {
            direct.leave();
        }
        self.sampler.sleep();
        self.counters.run_time += start.elapsed();
        exit
    }

    fn attach_thread(&mut self) -> Vec<u32> {
        if !self.direct_wanted || self.direct.is_some() {
            return Vec::new();
        }
        self.start_direct()
    }

    fn state(&mut self) -> CpuState {
        self.block().state.clone()
    }

    fn set_state(&mut self, state: &CpuState) {
        self.shared.world.stuck.store(false, Ordering::SeqCst);
        self.handle.unhalted.store(false, Ordering::SeqCst);
        self.block().state = state.clone();
        self.interp.flush();
        if let Some(mode) = Self::current_mode(state) {
            self.mode = mode;
            self.block().user = u32::from(mode.user);
        }
        self.update_fast();
        self.flush_all();
    }

    fn kick_handle(&self) -> Arc<dyn Kick> {
        self.handle.clone()
    }

    fn stop_handle(&self) -> Arc<dyn Kick> {
        Arc::new(StopHandle(self.handle.clone()))
    }

    fn step(&mut self) -> Exit {
        let _running = Running::new(self);
        self.prepare_thread();
        if let Some(exit) = self.events() {
            self.save_x87();
            return exit;
        }
        let next = self.interpret(true);
        self.save_x87();
        match next {
            Next::Leave(exit) => exit,
            _ => Exit::Debug,
        }
    }

    fn set_breakpoints(&mut self, addresses: &[u64]) {
        self.breakpoints = addresses.to_vec();
        let changed = self.shared.cache().set_breakpoints(addresses);
        if changed {
            self.flush_cache();
        }
    }

    fn read_virtual(&mut self, address: u64, data: &mut [u8]) -> bool {
        self.interp.debug_read(&self.block().state, address, data)
    }

    fn write_virtual(&mut self, address: u64, data: &[u8]) -> bool {
        self.interp.debug_write(&self.block().state, address, data)
    }

    fn counters(&self) -> Vec<(String, u64)> {
        let c = &self.counters;
        let mut out: Vec<(String, u64)> = Vec::new();
        if self.setup.index == 0 {
            out.extend(self.shared_counters());
        }
        let own = [
            ("dispatches.link", c.exits[1]),
            ("dispatches.slot", c.exits[2]),
            ("dispatches.indirect", c.exits[3]),
            ("dispatches.step", c.exits[4]),
            ("dispatches.poll", c.exits[5]),
            ("dispatches.access", c.exits[6]),
            ("dispatches.fault", c.exits[7]),
            ("dispatches.stale", c.exits[8]),
            ("dispatches.pause", c.exits[9]),
            ("instructions.interpreted", c.steps),
            ("tlb.misses", c.tlb_misses),
            ("tlb.flushes.all", c.flush_all),
            ("tlb.flushes.non-global", c.flush_local),
            ("tlb.flushes.page", c.flush_page),
            ("tlb.switches", c.switches),
            ("tlb.switches.kept", c.switches_kept),
            ("halts", c.halts),
            ("time.running-us", c.run_time.as_micros() as u64),
            ("time.translator-us", c.translator_time.as_micros() as u64),
            ("time.halted-us", c.halted_time.as_micros() as u64),
        ];
        out.extend(own.map(|(name, value)| (name.to_string(), value)));
        if let Some(direct) = &self.direct {
            let c = &direct.counters;
            let own = [
                ("direct.chosen", c.chosen),
                ("direct.given-up", c.given_up),
                ("direct.spaces", c.spaces),
                ("direct.stops.called", c.called),
                ("direct.stops.mapped", c.mapped),
                ("direct.stops.system-call", c.system_calls),
                ("direct.stops.instruction", c.instructions),
                ("direct.stops.tells", c.tells),
                ("direct.stops.with-unshown-registers", c.unshown),
                ("direct.changes", c.changes),
                ("direct.looked-again", c.looked_again),
                ("time.direct-us", c.time.as_micros() as u64),
            ];
            out.extend(own.map(|(name, value)| (name.to_string(), value)));
        }
        out.extend(self.interp.deliveries());
        if let Some(lockstep) = &self.lockstep {
            let names = ["lockstep.compared", "lockstep.not-compared", "lockstep.impossible"];
            out.extend(names.iter().zip(lockstep.counters).map(|(name, value)| (name.to_string(), value)));
        }
        if let Some(histogram) = &self.step_histogram {
            let mut rows: Vec<_> = histogram.iter().map(|(code, &n)| (format!("interpreted.{code:?}"), n)).collect();
            rows.sort_by_key(|row| std::cmp::Reverse(row.1));
            rows.truncate(60);
            out.extend(rows);
        }
        out
    }
}

impl Drop for BtVcpu {
    fn drop(&mut self) {
        if let Some(mut direct) = self.direct.take() {
            direct.leave();
            // A program may not run in it for the next vCPU before everything has been taken away.
            self.shared.give_runners(direct.into_runners());
        }
    }
}
