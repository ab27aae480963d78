//! The vCPUs as gdb's threads: thread 1 is vCPU 0.

use std::collections::BTreeMap;
use std::convert::Infallible;

use gdbstub::common::{Signal, Tid};
use gdbstub::outputln;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread as mt;
use gdbstub::target::ext::breakpoints as bp;
use gdbstub::target::ext::monitor_cmd::{ConsoleOutput, MonitorCmd, MonitorCmdOps};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};

use super::arch::{GuestArch, GuestRegisters};
use crate::vcpu::VcpuThread;

/// What gdb wants a vCPU to do at the next resume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Continue,
    Step,
}

/// All vCPUs of a VM, and what a debugger has set up on them.
#[derive(Default)]
pub(crate) struct Cpus {
    /// One thread per vCPU, by number.
    pub threads: Vec<VcpuThread>,
    breakpoints: Vec<u64>,
    actions: BTreeMap<u32, Action>,
    lock_others: bool,
    /// Set by [`mt::MultiThreadResume::resume`]: the supervisor has to let them go.
    resume_asked: bool,
}

/// The thread id of vCPU `index`.
pub(crate) fn tid(index: u32) -> Tid {
    Tid::new(index as usize + 1).unwrap_or(Tid::MIN)
}

impl Cpus {
    /// Numbers of the processes that vCPUs trace.
    pub(crate) fn processes(&self) -> Vec<u32> {
        self.threads.iter().flat_map(|thread| thread.processes()).copied().collect()
    }

    /// These vCPUs, all stopped, instead of those before; breakpoints stay.
    pub(crate) fn replace(&mut self, threads: Vec<VcpuThread>) {
        self.threads = threads;
    }

    /// Forgets what gdb wanted at its last resume.
    pub(crate) fn forget_actions(&mut self) {
        self.actions.clear();
        self.lock_others = false;
    }

    /// Is an instruction of vCPU `index` at a breakpoint about to be run?
    pub(crate) fn at_breakpoint(&self, index: u32) -> bool {
        let rip = self.threads.get(index as usize).and_then(|thread| thread.ask(|vcpu| vcpu.state().rip));
        rip.is_some_and(|rip| self.breakpoints.contains(&rip))
    }

    /// Was vCPU `index` to do a single step?
    pub(crate) fn stepping(&self, index: u32) -> bool {
        self.actions.get(&index) == Some(&Action::Step)
    }

    /// Takes the wish to resume, if gdb has expressed one.
    pub(crate) fn take_resume(&mut self) -> bool {
        std::mem::take(&mut self.resume_asked)
    }

    /// Lets the vCPUs do what gdb wants.
    pub(crate) fn resume(&mut self) {
        for thread in &mut self.threads {
            match self.actions.get(&thread.index()) {
                Some(Action::Step) => thread.step(),
                Some(Action::Continue) => thread.run(),
                None if self.lock_others => {}
                None => thread.run(),
            }
        }
    }

    /// Forgets what a debugger set up, and lets all vCPUs run.
    pub(crate) fn detach(&mut self) {
        self.forget_actions();
        self.breakpoints.clear();
        self.apply_breakpoints();
        for thread in &mut self.threads {
            thread.run();
        }
    }

    /// Gives the present breakpoints to all vCPUs (which are stopped).
    pub(crate) fn apply_breakpoints(&self) {
        for thread in &self.threads {
            let breakpoints = self.breakpoints.clone();
            thread.ask(move |vcpu| vcpu.set_breakpoints(&breakpoints));
        }
    }

    fn thread(&self, tid: Tid) -> Result<&VcpuThread, TargetError<Infallible>> {
        self.threads.get(tid.get() - 1).ok_or(TargetError::NonFatal)
    }
}

impl Target for Cpus {
    type Arch = GuestArch;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, GuestArch, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<bp::BreakpointsOps<'_, Self>> {
        Some(self)
    }

    fn support_monitor_cmd(&mut self) -> Option<MonitorCmdOps<'_, Self>> {
        Some(self)
    }
}

impl mt::MultiThreadBase for Cpus {
    fn read_registers(&mut self, registers: &mut GuestRegisters, tid: Tid) -> TargetResult<(), Self> {
        let state = self.thread(tid)?.ask(|vcpu| vcpu.state()).ok_or(TargetError::NonFatal)?;
        *registers = GuestRegisters::from_state(&state);
        Ok(())
    }

    fn write_registers(&mut self, registers: &GuestRegisters, tid: Tid) -> TargetResult<(), Self> {
        let registers = registers.clone();
        self.thread(tid)?
            .ask(move |vcpu| {
                let mut state = vcpu.state();
                registers.into_state(&mut state);
                vcpu.set_state(&state);
            })
            .ok_or(TargetError::NonFatal)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let len = data.len();
        let read = self
            .thread(tid)?
            .ask(move |vcpu| {
                let mut bytes = Vec::with_capacity(len);
                while bytes.len() < len {
                    // One page at a time: the next may be unmapped.
                    let address = start.wrapping_add(bytes.len() as u64);
                    let in_page = (memory::PAGE_SIZE - address % memory::PAGE_SIZE) as usize;
                    let mut piece = vec![0; in_page.min(len - bytes.len())];
                    if !vcpu.read_virtual(address, &mut piece) {
                        break;
                    }
                    bytes.append(&mut piece);
                }
                bytes
            })
            .ok_or(TargetError::NonFatal)?;
        if read.is_empty() && len > 0 {
            return Err(TargetError::NonFatal);
        }
        if let Some(place) = data.get_mut(..read.len()) {
            place.copy_from_slice(&read);
        }
        Ok(read.len())
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let data = data.to_vec();
        let written = self.thread(tid)?.ask(move |vcpu| vcpu.write_virtual(start, &data));
        if written == Some(true) { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        for thread in &self.threads {
            is_active(tid(thread.index()));
        }
        Ok(())
    }

    fn support_resume(&mut self) -> Option<mt::MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl mt::MultiThreadResume for Cpus {
    fn resume(&mut self) -> Result<(), Infallible> {
        self.resume_asked = true;
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.actions.clear();
        self.lock_others = false;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.actions.insert((tid.get() - 1) as u32, Action::Continue);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<mt::MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<mt::MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl mt::MultiThreadSingleStep for Cpus {
    fn set_resume_action_step(&mut self, tid: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.actions.insert((tid.get() - 1) as u32, Action::Step);
        Ok(())
    }
}

impl mt::MultiThreadSchedulerLocking for Cpus {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.lock_others = true;
        Ok(())
    }
}

impl bp::Breakpoints for Cpus {
    fn support_sw_breakpoint(&mut self) -> Option<bp::SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<bp::HwBreakpointOps<'_, Self>> {
        Some(self)
    }
}

impl Cpus {
    fn add_breakpoint(&mut self, address: u64) {
        self.breakpoints.push(address);
        self.apply_breakpoints();
    }

    fn remove_breakpoint(&mut self, address: u64) -> bool {
        let Some(position) = self.breakpoints.iter().position(|&there| there == address) else { return false };
        self.breakpoints.remove(position);
        self.apply_breakpoints();
        true
    }
}

impl bp::SwBreakpoint for Cpus {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_breakpoint(address);
        Ok(true)
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_breakpoint(address))
    }
}

/// The engine's breakpoints change nothing in guest memory, so both kinds are the same.
impl bp::HwBreakpoint for Cpus {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        self.add_breakpoint(address);
        Ok(true)
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(self.remove_breakpoint(address))
    }
}

impl ThreadExtraInfo for Cpus {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let halted = self.thread(tid).ok().and_then(|thread| thread.ask(|vcpu| vcpu.state().halted)).unwrap_or(false);
        let text = format!("vCPU {} {}", tid.get() - 1, if halted { "halted" } else { "running" });
        let len = text.len().min(buffer.len());
        if let (Some(place), Some(text)) = (buffer.get_mut(..len), text.as_bytes().get(..len)) {
            place.copy_from_slice(text);
        }
        Ok(len)
    }
}

impl MonitorCmd for Cpus {
    fn handle_monitor_cmd(&mut self, command: &[u8], mut out: ConsoleOutput<'_>) -> Result<(), Infallible> {
        match command {
            b"registers" | b"regs" => {
                for thread in &self.threads {
                    outputln!(out, "vCPU {}", thread.index());
                    if let Some(state) = thread.ask(|vcpu| vcpu.state()) {
                        outputln!(out, "{}", crate::crash::registers(&state));
                    }
                }
            }
            b"stats" => {
                for thread in &self.threads {
                    outputln!(out, "vCPU {}", thread.index());
                    for (kind, value) in thread.ask(|vcpu| vcpu.counters()).unwrap_or_default() {
                        outputln!(out, "{kind} {value}");
                    }
                }
            }
            _ => outputln!(out, "monitor registers: all registers of all vCPUs\nmonitor stats: counters of the engine"),
        }
        Ok(())
    }
}
