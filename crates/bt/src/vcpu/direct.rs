//! The vCPU's part of direct execution: when it is chosen, and what happens at a stop.

use std::sync::atomic::Ordering;
use std::time::Instant;

use cpu::Exit;
use cpu::paging::{self, Access as PageAccess, Kind, PagingContext};
use runner::Stop;

use super::{BtVcpu, Next};
use crate::direct::Direct;
use crate::direct::space::{Answer, View};

impl BtVcpu {
    /// Starts the process that programs run in. On the vCPU's thread.
    pub(super) fn start_direct(&mut self) -> Option<u32> {
        let mut direct = Direct::new(&self.shared.ram)?;
        direct.at_once = self.direct_at_once;
        let pid = direct.runner.pid();
        self.handle.set_signaller(direct.runner.signaller());
        self.interp.add_process(pid);
        self.direct = Some(direct);
        u32::try_from(pid).ok()
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
        self.is_direct() && self.direct.as_mut().is_some_and(|direct| !std::mem::take(&mut direct.interlude))
    }

    /// Programs have had the CPU for some time, since `entries` stood at `since`: chooses direct execution if it may pay.
    #[cold]
    pub(super) fn consider_direct(&mut self, since: u32) {
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
        self.handle.set_inside(false);
        self.direct = Some(direct);
        match result {
            Ok(Some(next)) => next,
            // One instruction of the program that is not for it alone.
            Ok(None) => self.interpret(true),
            Err(why) => Next::Leave(Exit::Internal(why)),
        }
    }

    /// `Ok(None)`: the interpreter is to go on.
    fn run_in(&mut self, direct: &mut Direct) -> Result<Option<Next>, String> {
        let shared = self.shared.clone();
        if !Direct::possible(&self.block().state) || !direct.prepare(&shared.ram, &self.block().state)? {
            direct.refuse();
            return Ok(Some(Next::Run));
        }
        self.save_x87();
        direct.runner.load(&self.block().state)?;
        let view = View { ram: &shared.ram, context: PagingContext::new(&self.block().state) };
        let mut trapped = None;
        // There is nothing to be promoted, and the timer would take the core from the process.
        self.sampler.sleep();
        let result = loop {
            self.handle.set_inside(true);
            if self.handle.memory.kick_word().load(Ordering::SeqCst) != 0 {
                break Some(Next::Events);
            }
            let start = Instant::now();
            let stop = direct.runner.run()?;
            self.handle.set_inside(false);
            direct.account(start.elapsed());
            match stop {
                Stop::Called => {
                    direct.counters.called += 1;
                    break Some(Next::Events);
                }
                Stop::SystemCall => {
                    direct.counters.system_calls += 1;
                    break None;
                }
                Stop::Instruction => {
                    direct.counters.instructions += 1;
                    break None;
                }
                Stop::Breakpoint | Stop::DebugTrap => {
                    direct.counters.instructions += 1;
                    trapped = Some(stop);
                    break None;
                }
                Stop::Fault { address } => match self.meet(direct, &view, address)? {
                    Answer::Mapped if direct.is_active(&self.block().state) => {}
                    Answer::Mapped => break Some(Next::Run),
                    Answer::Tells => {
                        direct.counters.tells += 1;
                        direct.interlude = true;
                        break Some(Next::Run);
                    }
                    Answer::Guests => break None,
                },
            }
        };
        self.sampler.wake();
        let state = &mut self.block().state;
        direct.runner.store(state)?;
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
        self.load_x87();
        Ok(result)
    }

    /// The program has reached for `address` in vain.
    fn meet(&mut self, direct: &mut Direct, view: &View<'_>, address: u64) -> Result<Answer, String> {
        if address >= runner::END {
            return Ok(Answer::Guests);
        }
        // The kernel tells where an access failed, not of what kind it was. An instruction may go on in the next page.
        let ahead = address.wrapping_sub(direct.runner.rip());
        let fetch = ahead == 0 || (ahead < 15 && address & 0xfff == 0);
        let kind = if fetch { Kind::Fetch } else { Kind::Read };
        // Sets the accessed bits that the CPU would set.
        let allowed = paging::walk(view.ram, &view.context, address, PageAccess::new(kind, true)).is_ok();
        let answer =
            if allowed { direct.space.fault(view, address, direct.runner.rip(), fetch) } else { Answer::Guests };
        match answer {
            Answer::Mapped => {
                direct.counters.mapped += 1;
                if !direct.make_changes()? {
                    direct.refuse();
                }
            }
            Answer::Guests => direct.awaited = Some(address),
            Answer::Tells => {}
        }
        Ok(answer)
    }
}
