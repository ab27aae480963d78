//! vCPU threads. Each owns one [`Vcpu`] and does what the supervisor tells it: run, step, or answer a question while stopped.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

use cpu::{Exit, Kick, Vcpu};

use crate::events::{Event, Events};

type Question = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

enum Command {
    Run,
    Step,
    Ask(Question),
}

/// The supervisor's handle on a vCPU thread. Dropping it ends the thread (which must not be running the guest any more).
pub(crate) struct VcpuThread {
    index: u32,
    commands: Option<Sender<Command>>,
    stop: Arc<dyn Kick>,
    running: bool,
    stop_requested: bool,
    thread: Option<JoinHandle<()>>,
    /// Processes that guest programs run in.
    processes: Vec<u32>,
}

impl VcpuThread {
    /// Starts the thread, stopped.
    pub(crate) fn start(index: u32, mut vcpu: Box<dyn Vcpu>, events: Events) -> std::io::Result<Self> {
        let stop = vcpu.stop_handle();
        let (commands, receiver) = mpsc::channel();
        let (attached, processes) = mpsc::channel();
        let thread = std::thread::Builder::new().name(format!("vcpu-{index}")).spawn(move || {
            // The sandbox lets nobody start a process once it is closed.
            let _ = attached.send(if crate::sandbox::closed() { Vec::new() } else { vcpu.attach_thread() });
            for command in receiver {
                let exit = match command {
                    Command::Run => guarded(&mut *vcpu, |vcpu| vcpu.run()),
                    Command::Step => guarded(&mut *vcpu, |vcpu| vcpu.step()),
                    Command::Ask(question) => {
                        // Whoever asked sees that no answer comes.
                        let _ = catch_unwind(AssertUnwindSafe(|| question(&mut *vcpu)));
                        continue;
                    }
                };
                if events.send(Event::VcpuExit(index, exit)).is_err() {
                    return;
                }
            }
        })?;
        let processes = processes.recv().unwrap_or_default();
        let (commands, thread) = (Some(commands), Some(thread));
        Ok(Self { index, commands, stop, running: false, stop_requested: false, thread, processes })
    }

    /// Numbers of the processes that guest programs run in.
    pub(crate) fn processes(&self) -> &[u32] {
        &self.processes
    }

    /// Number of the vCPU.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Has [`VcpuThread::run`] been called and no exit been seen since?
    pub(crate) fn running(&self) -> bool {
        self.running
    }

    /// Lets the guest run until an [`Event::VcpuExit`].
    pub(crate) fn run(&mut self) {
        if !self.running {
            self.running = true;
            self.send(Command::Run);
        }
    }

    /// Runs one instruction, then an [`Event::VcpuExit`] comes.
    pub(crate) fn step(&mut self) {
        if !self.running {
            self.running = true;
            self.send(Command::Step);
        }
    }

    /// Asks for [`Exit::Stopped`] if running.
    pub(crate) fn request_stop(&mut self) {
        if self.running && !self.stop_requested {
            self.stop_requested = true;
            self.stop.kick();
        }
    }

    /// To be told of each exit of this vCPU. Returns whether a stop had been asked for.
    pub(crate) fn exited(&mut self, exit: &Exit) -> bool {
        self.running = false;
        // A stop that was asked for while another exit was on its way comes at the next run; it is then taken for spurious.
        let asked = std::mem::take(&mut self.stop_requested);
        asked && *exit == Exit::Stopped
    }

    /// Asks the stopped vCPU a question. `None` if the vCPU is running or its thread has failed.
    pub(crate) fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        if self.running {
            return None;
        }
        let (to, from) = mpsc::channel();
        self.send(Command::Ask(Box::new(move |vcpu| {
            let _ = to.send(question(vcpu));
        })));
        from.recv().ok()
    }

    fn send(&self, command: Command) {
        if let Some(commands) = &self.commands {
            let _ = commands.send(command);
        }
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.commands = None;
        if self.running {
            // It ends after its next exit; nobody can wait for that here.
            self.stop.kick();
        } else if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A panic in an engine or a device is an exit like others: the process ends in order, with a report.
fn guarded(vcpu: &mut dyn Vcpu, run: impl FnOnce(&mut dyn Vcpu) -> Exit) -> Exit {
    catch_unwind(AssertUnwindSafe(|| run(vcpu)))
        .unwrap_or_else(|_| Exit::Internal("the engine or a device panicked (see above)".into()))
}
