//! The vCPU's part of direct execution: when it is chosen, and what happens at a stop.

use std::sync::atomic::Ordering;
use std::time::Instant;

use cpu::CpuState;
use cpu::paging::{self, Access as PageAccess, Kind, PagingContext};
use cpu::{Exception, Exit};
use runner::{Access, Stop};

use super::{BtVcpu, Next};
use crate::direct::Direct;
use crate::direct::space::{Answer, View};

/// What comes after a program has stopped.
enum After {
    Next(Next),
    /// The interpreter does the instruction.
    Interpret,
    /// It has done what raises this.
    Raise(Exception),
    /// There is no more direct execution.
    Lost,
}

impl BtVcpu {
    /// Starts the processes that programs run in; returns their numbers.
    pub(super) fn start_direct(&mut self) -> Vec<u32> {
        let Some(direct) = Direct::start(&self.shared.ram, self.processes) else { return Vec::new() };
        let pids = direct.pids().filter_map(|pid| u32::try_from(pid).ok()).collect();
        self.adopt(direct);
        pids
    }

    /// Takes the processes over that a vCPU of before a reset has left.
    fn inherit_direct(&mut self) {
        if self.direct.is_none()
            && self.direct_wanted
            && let Some(direct) = Direct::inherit(self.shared.take_runners(self.processes))
        {
            self.adopt(direct);
        }
    }

    fn adopt(&mut self, mut direct: Box<Direct>) {
        direct.at_once = self.direct_at_once;
        self.handle.set_signallers(direct.signallers());
        for pid in direct.pids() {
            self.interp.add_process(pid);
        }
        self.direct = Some(direct);
    }

    /// Does the program run directly, if it is the program's turn?
    #[inline]
    pub(super) fn is_direct(&self) -> bool {
        self.direct.as_ref().is_some_and(|direct| direct.is_active(&self.block().state)) && self.breakpoints.is_empty()
    }

    /// The same for a program that is to be entered now. Not if it stopped at code that must be translated: that runs until it jumps
    /// to somewhere that only the dispatcher knows, as all targets of programs were forgotten.
    #[inline]
    pub(super) fn enters_directly(&mut self) -> bool {
        let block = self.block();
        let Some(direct) = &mut self.direct else { return false };
        if direct.at_once {
            direct.choose_at_once(&block.state);
        }
        self.is_direct()
            && self.direct.as_mut().is_some_and(|direct| {
                !std::mem::take(&mut direct.interlude)
                    && !direct.until_return
                    && !direct.is_guarded_at(block.state.rip, &block.state)
            })
    }

    /// A program jumps to where a register or its stack says.
    #[inline]
    pub(super) fn direct_returns(&mut self) {
        if let Some(direct) = &mut self.direct {
            direct.until_return = false;
        }
    }

    /// Programs have had the CPU for some time, since `entries` stood at `since`: chooses direct execution if it may pay.
    #[cold]
    pub(super) fn consider_direct(&mut self, since: u32) {
        self.inherit_direct();
        let block = self.block();
        let Some(direct) = &mut self.direct else { return };
        direct.consider(&block.state, block.entries.wrapping_sub(since));
        if direct.is_active(&block.state) {
            // Every way to the program leads here now.
            self.tlbs.forget_targets_of_programs(block);
        }
    }

    /// Runs the program directly until there is something else to do.
    pub(super) fn run_directly(&mut self) -> Next {
        let Some(mut direct) = self.direct.take() else { return Next::Run };
        let result = self.run_in(&mut direct);
        direct.program().set_inside(false);
        if matches!(result, Ok(After::Lost)) {
            // The program has made its own registers unknown: it begins again where it was entered, and nothing runs directly any more.
            direct.leave();
            self.direct_wanted = false;
            return Next::Run;
        }
        self.direct = Some(direct);
        match result {
            Ok(After::Next(next)) => next,
            Ok(After::Raise(exception)) => match self.interp.deliver_exception(&mut self.block().state, exception) {
                Ok(()) => Next::Events,
                Err(_) => Next::Leave(Exit::TripleFault),
            },
            // One instruction of the program that is not for it alone.
            Ok(After::Interpret | After::Lost) => self.interpret(true),
            Err(why) => Next::Leave(Exit::Internal(why)),
        }
    }

    fn run_in(&mut self, direct: &mut Direct) -> Result<After, String> {
        let shared = self.shared.clone();
        if !Direct::possible(&self.block().state) || !direct.prepare(&shared.ram, &self.block().state)? {
            direct.refuse();
            return Ok(After::Next(Next::Run));
        }
        self.save_x87();
        direct.program().runner.load(&self.block().state);
        let view = View { ram: &shared.ram, context: PagingContext::new(&self.block().state) };
        let mut trapped = None;
        // There is nothing to be promoted, and the timer would take the core from the process.
        self.sampler.sleep();
        let result = loop {
            direct.program().set_inside(true);
            if self.handle.memory.kick_word().load(Ordering::SeqCst) != 0 {
                break After::Next(Next::Events);
            }
            let start = Instant::now();
            let stop = direct.program().runner.run()?;
            direct.program().set_inside(false);
            direct.account(start.elapsed(), stop == Stop::SystemCall);
            match stop {
                Stop::Called => {
                    direct.counters.called += 1;
                    break After::Next(Next::Events);
                }
                Stop::SystemCall => {
                    direct.counters.system_calls += 1;
                    break After::Interpret;
                }
                Stop::Instruction => {
                    direct.counters.instructions += 1;
                    let program = direct.program();
                    if program.space.is_guard(program.runner.rip()) {
                        direct.until_return = true;
                        break After::Next(Next::Run);
                    }
                    break After::Interpret;
                }
                Stop::Breakpoint | Stop::DebugTrap => {
                    direct.counters.instructions += 1;
                    trapped = Some(stop);
                    break After::Interpret;
                }
                Stop::Lost => return Ok(self.back(After::Lost)),
                Stop::Refused => {
                    direct.program().clear()?;
                    direct.refuse();
                    return Ok(self.back(After::Next(Next::Run)));
                }
                Stop::Fault { address, access } => match self.meet(direct, &view, address, access)? {
                    Answer::Mapped if direct.is_active(&self.block().state) => {}
                    Answer::Mapped => break After::Next(Next::Run),
                    Answer::Tells => {
                        direct.counters.tells += 1;
                        direct.interlude = true;
                        break After::Next(Next::Run);
                    }
                    Answer::Guests => break After::Interpret,
                },
            }
        };
        let state = &mut self.block().state;
        direct.counters.unshown += u64::from(direct.program().runner.store(state));
        let selectors = direct.program().runner.selectors();
        Self::store_selectors(state, selectors);
        if (selectors[1], selectors[2]) != (state.segments[1].selector, state.segments[2].selector) {
            // A far transfer to code that is not 64-bit code, which the host does not refuse.
            let code = Exception::gp(u32::from(selectors[1] & !3));
            return Ok(self.back(After::Raise(code)));
        }
        if let Some(stop) = trapped {
            // Back to before it.
            let byte_at = |address| {
                let mut byte = [0];
                self.interp.debug_read(state, address, &mut byte);
                byte[0]
            };
            let length = match stop {
                Stop::DebugTrap => u64::from(byte_at(state.rip) != 0xf1),
                _ if byte_at(state.rip.wrapping_sub(1)) == 0xcc => 1,
                _ => 2,
            };
            state.rip = state.rip.wrapping_sub(length);
        }
        Ok(self.back(result))
    }

    /// The state is the translator's again.
    fn back(&mut self, after: After) -> After {
        self.sampler.wake();
        self.load_x87();
        after
    }

    /// A program that loads data segments loads flat ones: the host has no others for it.
    fn store_selectors(state: &mut CpuState, selectors: [u16; 6]) {
        const SS: usize = 2;
        for (index, selector) in selectors.into_iter().enumerate() {
            if selector & !3 != 0 && !matches!(index, 1 | SS) {
                let base = state.segments[index].base;
                state.segments[index] = cpu::Segment { selector, base, ..state.segments[SS] };
            }
        }
    }

    /// The program has reached for `address` in vain.
    fn meet(
        &mut self,
        direct: &mut Direct,
        view: &View<'_>,
        address: u64,
        access: Option<Access>,
    ) -> Result<Answer, String> {
        if address >= runner::END {
            return Ok(Answer::Guests);
        }
        // An instruction may go on in the next page.
        let ahead = address.wrapping_sub(direct.program().runner.rip());
        let fetch = match access {
            Some(access) => access == Access::Fetch,
            None => ahead == 0 || (ahead < 15 && address & 0xfff == 0),
        };
        let kind = if fetch { Kind::Fetch } else { Kind::Read };
        // Sets the accessed bits that the CPU would set.
        let allowed = paging::walk(view.ram, &view.context, address, PageAccess::new(kind, true)).is_ok();
        let program = direct.program();
        let rip = program.runner.rip();
        let answer = if allowed { program.space.fault(view, address, rip, fetch) } else { Answer::Guests };
        match answer {
            Answer::Mapped => {
                direct.counters.mapped += 1;
                if !direct.make_changes()? {
                    direct.refuse();
                }
            }
            Answer::Guests => direct.program().awaited = Some(address),
            Answer::Tells => {}
        }
        Ok(answer)
    }
}
