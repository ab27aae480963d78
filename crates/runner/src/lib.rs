//! Direct execution: a guest program's code runs as it is on the CPU, in a host process of its own whose memory is what the program can reach.
//!
//! * [`Runner`]: the process. A vCPU's thread gives it a set of registers, lets it go on, and waits until it stops.
//! * [`Change`]: what is to be mapped in it, or no longer.
//! * [`scan`]: which pages must not be executed, because they hold instructions that would tell of the host.
//!
//! How it stops: whatever is not plain computing is a signal to the program's own thread (faults by themselves, system calls by a seccomp filter, calls for
//! attention by tgkill(2)). The signal's handler, in a *stub* of ours, makes the one system call that the filter hands to the monitor
//! (seccomp_unotify(2)), and waits in it. The registers are on the stub's signal stack, in memory that both have.
//!
//! What keeps a hostile program inside, who may jump anywhere in the stub and write what the stub writes:
//! * The process has no memory but pages of the guest's RAM that the program may reach, and the stub.
//! * Its thread can make system calls from three places only: the monitor's; rt_sigreturn, which gives it registers that it could have
//!   anyway; and those that change its memory, if they come with a secret number.
//! * The kernel tells from where the monitor's call comes, and that the thread is inside it: so a program that is said to have stopped has, and what it does when it is
//!   answered is the stub's code. What it says of its registers is a claim about itself; of what cannot be true nothing is used.
//! * Only then the list of changes is there, with the secret, and the stub's code wipes it out as it goes. Whoever can come in between by a signal of its own making (a single
//!   step, signals that are not blocked) stops inside the stub: such a process is ended at once.
//! * Who has blocked the signal that calls is killed after a second, and loses what it computed. The process dies with the monitor.
//!
//! What the program could tell from a CPU of its own: the stub, at an address that programs do not use ([`STUB`]), with the signal stack.
//!
//! Not here: which pages, when, and what to do at a stop. That is the engine's.

#![cfg(target_arch = "x86_64")]

mod birth;
mod frame;
pub mod guard;
mod process;
mod ptrace;
pub mod scan;
mod stub;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cpu::paging::is_canonical;
use cpu::{CpuState, rflags};

use crate::frame::Frame;
use crate::process::{End, Process};
pub use crate::process::{LISTENER_REQUESTS, Signaller};
pub use crate::ptrace::REQUESTS as PTRACE_REQUESTS;
use crate::stub::Words;
pub use crate::stub::{STUB, STUB_SIZE};

/// Programs' addresses are below.
pub const END: u64 = (1 << 47) - 4096;

/// So many instructions can be watched.
pub const WATCHED: usize = 4;

/// What a program may do with pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read.
    Read,
    /// Read and write.
    Write,
    /// Read and execute.
    Execute,
    /// Read, write and execute.
    All,
}

/// A change of the process's memory. Addresses and lengths are multiples of the page size, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// `length` bytes at `offset` of the RAM's file appear at `address`, instead of what was there.
    Map {
        /// Guest-virtual address.
        address: u64,
        /// In the file that [`Runner::start`] was given.
        offset: u64,
        /// Bytes.
        length: u64,
        /// What the program may do.
        rights: Rights,
    },
    /// Nothing is at the addresses any more.
    Unmap {
        /// Guest-virtual address.
        address: u64,
        /// Bytes.
        length: u64,
    },
}

/// Why the program stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Before a system call (SYSCALL or INT 0x80).
    SystemCall,
    /// At an instruction that reached for `address`, where that is not mapped or must not be done.
    Fault {
        /// Guest-virtual.
        address: u64,
        /// How it reached for it, if the host tells.
        access: Option<Access>,
    },
    /// At an instruction that must be done by somebody else: it is not for programs, or raises an exception.
    Instruction,
    /// Behind INT3, of one byte or of two. It is to be done by somebody else.
    Breakpoint,
    /// Behind INT1, or at it: hypervisors differ. It is to be done by somebody else.
    DebugTrap,
    /// Somebody has called for attention. Between two instructions.
    Called,
    /// Not at all: the host refused one of the [changes](Runner::change). Those after it have not been made, and the registers are as they were.
    Refused,
    /// The program has destroyed its process by way of the stub, as none does by mistake: its registers are lost. The runner is of no use any more.
    Lost,
}

/// What an instruction wanted of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read it.
    Read,
    /// To write it.
    Write,
    /// To execute it.
    Fetch,
}

/// A process that runs a program's code, for one thread at a time.
#[derive(Debug)]
pub struct Runner {
    process: Process,
    /// Registers of the stopped program.
    frame: Frame,
    words: Words,
    /// The host has refused a change.
    refused: bool,
    lost: bool,
}

impl Runner {
    /// Starts the process. `ram`: the file that all of the guest's RAM is in.
    ///
    /// # Errors
    /// One line why there is none.
    pub fn start(ram: BorrowedFd<'_>) -> Result<Self, String> {
        // Asked now: later the sandbox may not let it.
        scan::catches_cpuid();
        let process = Process::start(ram)?;
        let words = process.stub.words();
        let frame = Frame::read(&process.stub, words.context).ok_or("a program's process has no signal stack")?;
        let mut runner = Self { process, frame, words, refused: false, lost: false };
        runner.clear()?;
        Ok(runner)
    }

    /// Number of the process.
    pub fn pid(&self) -> i32 {
        self.process.pid
    }

    /// To call the program from other threads.
    pub fn signaller(&self) -> Arc<Signaller> {
        self.process.signaller.clone()
    }

    /// Can the process have this state? Else its code must run elsewhere.
    pub fn takes(state: &CpuState) -> bool {
        const REFUSED: u64 = rflags::TF | rflags::NT | rflags::IOPL | rflags::RF | rflags::AC | rflags::ID | rflags::VM;
        let selectors = [0, 3, 4, 5].iter().all(|&data| state.segments[data].selector & !3 == 0);
        let [cs, ss] = [state.segments[1].selector, state.segments[2].selector];
        state.rflags & REFUSED == 0
            && selectors
            && (cs, ss) == (0x33, 0x2b)
            && state.rip < END
            && state.segments[4].base < END
            && state.segments[5].base < END
    }

    /// Gives the program its registers, from `state`.
    pub fn load(&mut self, state: &CpuState) {
        let g = &state.gpr;
        let frame = &mut self.frame;
        frame.general =
            [g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15], g[7], g[6], g[5], g[3], g[2], g[0], g[1]];
        (frame.rsp, frame.rip) = (g[4], state.rip);
        frame.rflags = state.rflags & (rflags::ARITH | rflags::DF) | rflags::IF | rflags::FIXED;
        self.words.fs_base = state.segments[4].base;
        self.words.gs_base = state.segments[5].base;
        frame.write_fp(&self.process.stub, &state.fp);
    }

    /// Runs the program until it stops.
    ///
    /// # Errors
    /// The process has gone.
    pub fn run(&mut self) -> Result<Stop, String> {
        let process = &mut self.process;
        if self.lost {
            return Ok(Stop::Lost);
        }
        if std::mem::take(&mut self.refused) {
            process.forget_changes();
            return Ok(Stop::Refused);
        }
        self.frame.write(&process.stub, birth::blocked());
        let selectors = u64::from(self.words.selectors != 0);
        process.stub.set_words(Words { context: self.frame.address(), selectors, stay: 0, failed: 0, ..self.words });
        process.go_on();
        if let Err(end) = process.wait() {
            return self.ended(end);
        }
        let words = self.process.stub.words();
        if words.failed != 0 {
            return Ok(Stop::Refused);
        }
        let frame = Frame::read(&self.process.stub, words.context);
        match frame {
            Some(frame)
                if [frame.rip, words.fs_base, words.gs_base].into_iter().all(is_canonical)
                    && !(STUB..STUB + STUB_SIZE).contains(&frame.rip) =>
            {
                (self.frame, self.words) = (frame, words);
                Ok(self.stop())
            }
            _ => self.ended(End::ByProgram),
        }
    }

    fn ended<T: WhenLost>(&mut self, end: End) -> Result<T, String> {
        self.lost = true;
        match end {
            End::ByProgram => Ok(T::LOST),
            End::ByHost(why) => Err(why),
        }
    }

    /// What the last stop was for. Brings RIP and RSP to where the instruction begins.
    fn stop(&mut self) -> Stop {
        let frame = &mut self.frame;
        // Faults leave it set, and watched instructions would not stop where the program goes on.
        frame.rflags &= !rflags::RF;
        match self.words.signal as i32 {
            birth::CALL => return Stop::Called,
            libc::SIGSYS => {
                const VSYSCALLS: u64 = 0xffff_ffff_ff60_0000;
                if frame.info < VSYSCALLS {
                    frame.rip = frame.rip.wrapping_sub(2);
                    return Stop::SystemCall;
                }
                // The filter refused a call of the vsyscall page, and the kernel has made it return: back to before it.
                frame.rip = frame.info;
                frame.rsp = frame.rsp.wrapping_sub(8);
            }
            // SEGV_MAPERR and SEGV_ACCERR: of the kernel's page-fault handler.
            libc::SIGSEGV if matches!(frame.code, 1 | 2) => {
                const PAGE_FAULT: u64 = 14;
                let access = (frame.trap == PAGE_FAULT && frame.cr2 == frame.info).then_some(match frame.error {
                    error if error & 1 << 4 != 0 => Access::Fetch,
                    error if error & 1 << 1 != 0 => Access::Write,
                    _ => Access::Read,
                });
                return Stop::Fault { address: frame.info, access };
            }
            libc::SIGTRAP => {
                const TRAP_HWBKPT: i32 = 4;
                const SI_KERNEL: i32 = 0x80;
                match frame.code {
                    TRAP_HWBKPT => {}
                    SI_KERNEL => return Stop::Breakpoint,
                    _ => return Stop::DebugTrap,
                }
            }
            _ => {}
        }
        Stop::Instruction
    }

    /// RIP of the stopped program.
    pub fn rip(&self) -> u64 {
        self.frame.rip
    }

    /// Selectors that the stopped program has in ES, CS, SS, DS, FS and GS.
    pub fn selectors(&self) -> [u16; 6] {
        let [cs, ss] = self.frame.selectors;
        let [ds, es, fs, gs] = [0, 16, 32, 48].map(|bit| (self.words.selectors >> bit) as u16);
        [es, cs, ss, ds, fs, gs]
    }

    /// Puts the stopped program's registers into `state`. Returns whether it has used others, which guests are not shown (AVX-512) and which are lost.
    pub fn store(&self, state: &mut CpuState) -> bool {
        let frame = &self.frame;
        let [r8, r9, r10, r11, r12, r13, r14, r15, rdi, rsi, rbp, rbx, rdx, rax, rcx] = frame.general;
        state.gpr = [rax, rcx, rdx, rbx, frame.rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        state.rip = frame.rip;
        let program = rflags::ARITH | rflags::DF | rflags::AC | rflags::ID | rflags::NT | rflags::TF;
        state.rflags = state.rflags & !program | frame.rflags & program;
        state.segments[4].base = self.words.fs_base;
        state.segments[5].base = self.words.gs_base;
        frame.read_fp(&self.process.stub, &mut state.fp)
    }

    /// Changes the process's memory, before the program runs next: see [`Stop::Refused`].
    ///
    /// # Errors
    /// The process has gone.
    pub fn change(&mut self, changes: &[Change]) -> Result<(), String> {
        for change in changes {
            if !self.process.add(change) {
                self.refused |= !self.follow()?;
                self.process.add(change);
            }
        }
        Ok(())
    }

    /// Makes the changes now. `Ok(false)`: the host refuses one.
    ///
    /// # Errors
    /// The process has gone.
    pub fn follow(&mut self) -> Result<bool, String> {
        if self.lost {
            return Ok(true);
        }
        match self.process.follow() {
            Ok(done) => Ok(done && !std::mem::take(&mut self.refused)),
            Err(end) => self.ended(end),
        }
    }

    /// From now on the program stops before the instructions at these addresses, [`WATCHED`] at most, with [`Stop::Instruction`]. `Ok(false)`: the host
    /// refuses.
    ///
    /// # Errors
    /// The process has gone.
    pub fn watch(&mut self, addresses: &[u64]) -> Result<bool, String> {
        if self.lost {
            return Ok(true);
        }
        match self.process.watch(addresses) {
            Ok(done) => Ok(done),
            Err(end) => self.ended(end),
        }
    }

    /// Takes all memory away.
    ///
    /// # Errors
    /// The process has gone.
    pub fn clear(&mut self) -> Result<(), String> {
        let all = [
            Change::Unmap { address: 0, length: STUB },
            Change::Unmap { address: STUB + STUB_SIZE, length: END - STUB - STUB_SIZE },
        ];
        self.change(&all)?;
        match self.follow()? {
            true => Ok(()),
            false => Err("the host does not take back a process's memory".into()),
        }
    }
}

/// What is answered when the program has destroyed its process: the next [`Runner::run`] says so.
trait WhenLost {
    const LOST: Self;
}

impl WhenLost for Stop {
    const LOST: Self = Self::Lost;
}

impl WhenLost for bool {
    const LOST: Self = true;
}

#[cfg(test)]
mod tests;
