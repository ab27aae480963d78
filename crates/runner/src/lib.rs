//! Direct execution: a guest program's code runs as it is on the CPU, in a host process of its own whose memory is what the program can reach.
//!
//! * [`Runner`]: the process. The vCPU's thread traces it (ptrace(2)): it starts it with a set of registers and waits until it stops.
//! * [`Change`]: what is to be mapped in it, or no longer.
//! * [`scan`]: which pages must not be executed, because they hold instructions that would tell of the host.
//!
//! What keeps a hostile program inside: the process has no memory but pages of the guest's RAM that the program may reach, and one page of
//! ours that it can only read. Every system call stops it before the kernel does anything (`PTRACE_SYSEMU`); a seccomp filter refuses all but
//! `mmap` and `munmap` from that one page besides. It dies with the monitor.
//!
//! What the program could tell from a CPU of its own: the page of ours, at an address that programs do not use ([`STUB`]).
//!
//! Not here: which pages, when, and what to do at a stop. That is the engine's.

#![cfg(target_arch = "x86_64")]

mod process;
mod ptrace;
pub mod scan;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use cpu::{CpuState, FpState, rflags};

use crate::process::{Control, ENTRIES, Process};
pub use crate::process::{STUB, Signaller};

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
    },
    /// At an instruction that must be done by somebody else: it is not for programs, or raises an exception.
    Instruction,
    /// Behind INT3, of one byte or of two. It is to be done by somebody else.
    Breakpoint,
    /// Behind INT1, or at it: hypervisors differ. It is to be done by somebody else.
    DebugTrap,
    /// Somebody has called for attention. Between two instructions.
    Called,
}

/// A process that runs a program's code. To be used by the thread that started it only.
pub struct Runner {
    process: Process,
    control: Control,
    /// Registers of the stopped program.
    registers: libc::user_regs_struct,
    /// The process has others: it changed its memory meanwhile.
    away: bool,
    /// x87, SSE and AVX state that the process has. `None`: not known.
    fp: Option<Box<FpState>>,
    /// Room for the kernel's form of that state.
    area: Vec<u8>,
}

impl Runner {
    /// Starts the process, traced by the calling thread. `ram`: the file that all of the guest's RAM is in.
    ///
    /// # Errors
    /// One line why there is none.
    pub fn start(ram: BorrowedFd<'_>) -> Result<Self, String> {
        // Asked now: later the sandbox may not let it.
        scan::catches_cpuid();
        let control = Control::new()?;
        let process = Process::start(ram, &control)?;
        let mut runner = Self {
            process,
            control,
            // SAFETY: plain numbers.
            registers: unsafe { std::mem::zeroed() },
            away: true,
            fp: None,
            area: Vec::new(),
        };
        runner.registers = ptrace::registers(runner.process.pid)?;
        runner.area = ptrace::extended(runner.process.pid)?;
        runner.clear()?;
        // Hosts that only look like Linux may not stop before system calls.
        runner.registers.rip = process::STUB_CALL;
        runner.away = true;
        match runner.run()? {
            Stop::SystemCall => Ok(runner),
            other => Err(format!("a program's process is not stopped before a system call: {other:?}")),
        }
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
    ///
    /// # Errors
    /// The process has gone.
    pub fn load(&mut self, state: &CpuState) -> Result<(), String> {
        let g = &state.gpr;
        let to = &mut self.registers;
        [to.rax, to.rcx, to.rdx, to.rbx, to.rsp, to.rbp, to.rsi, to.rdi] =
            [g[0], g[1], g[2], g[3], g[4], g[5], g[6], g[7]];
        [to.r8, to.r9, to.r10, to.r11, to.r12, to.r13, to.r14, to.r15] =
            [g[8], g[9], g[10], g[11], g[12], g[13], g[14], g[15]];
        to.rip = state.rip;
        to.eflags = state.rflags & (rflags::ARITH | rflags::DF) | rflags::IF | rflags::FIXED;
        // No system call that the kernel might want to start again.
        to.orig_rax = u64::MAX;
        to.fs_base = state.segments[4].base;
        to.gs_base = state.segments[5].base;
        self.away = true;
        if self.fp.as_ref().is_none_or(|fp| fp.bytes != state.fp.bytes) {
            self.area[..416].copy_from_slice(&state.fp.bytes[..416]);
            self.area[464..576].fill(0);
            self.area[FpState::XSTATE_BV] = 7;
            self.area[576..832].copy_from_slice(&state.fp.bytes[576..832]);
            self.area[832..].fill(0);
            ptrace::set_extended(self.process.pid, &self.area)?;
            self.fp = Some(Box::new(state.fp.clone()));
        }
        Ok(())
    }

    /// Runs the program until it stops.
    ///
    /// # Errors
    /// The process has gone.
    pub fn run(&mut self) -> Result<Stop, String> {
        if std::mem::take(&mut self.away) {
            ptrace::set_registers(self.process.pid, &self.registers)?;
        }
        self.process.resume(ptrace::SYSEMU)?;
        let status = self.process.wait()?;
        self.fp = None;
        self.registers = ptrace::registers(self.process.pid)?;
        let registers = &mut self.registers;
        // Faults leave it set, and watched instructions would not stop where the program goes on.
        registers.eflags &= !rflags::RF;
        match libc::WSTOPSIG(status) {
            process::CALL => return Ok(Stop::Called),
            ptrace::SYSTEM_CALL => {
                registers.rip = registers.rip.wrapping_sub(2);
                registers.rax = registers.orig_rax;
                registers.orig_rax = u64::MAX;
                self.away = true;
                return Ok(Stop::SystemCall);
            }
            libc::SIGSEGV | libc::SIGBUS => {
                let info = ptrace::signal(self.process.pid)?;
                // SEGV_MAPERR and SEGV_ACCERR: of the kernel's page-fault handler.
                if info.si_signo == libc::SIGSEGV && matches!(info.si_code, 1 | 2) {
                    // SAFETY: a signal that says so has the address.
                    let address = unsafe { info.si_addr() } as u64;
                    return Ok(Stop::Fault { address });
                }
            }
            libc::SIGTRAP => {
                const TRAP_HWBKPT: i32 = 4;
                const SI_KERNEL: i32 = 0x80;
                match ptrace::signal(self.process.pid)?.si_code {
                    TRAP_HWBKPT => {}
                    SI_KERNEL => return Ok(Stop::Breakpoint),
                    _ => return Ok(Stop::DebugTrap),
                }
            }
            libc::SIGSYS => {
                // The filter refused a call of the vsyscall page, and the kernel has made it return (with the call's number in RAX, which the
                // call would have replaced, too): back to before it.
                let info = ptrace::signal(self.process.pid)?;
                // SAFETY: SIGSYS has the address of the call there (sigaction(2), si_call_addr).
                registers.rip = unsafe { (&raw const info).cast::<u64>().add(2).read() };
                registers.rsp = registers.rsp.wrapping_sub(8);
                self.away = true;
            }
            _ => {}
        }
        Ok(Stop::Instruction)
    }

    /// RIP of the stopped program.
    pub fn rip(&self) -> u64 {
        self.registers.rip
    }

    /// Puts the stopped program's registers into `state`.
    ///
    /// # Errors
    /// The process has gone.
    pub fn store(&mut self, state: &mut CpuState) -> Result<(), String> {
        let r = &self.registers;
        state.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14,
            r.r15,
        ];
        state.rip = r.rip;
        let program = rflags::ARITH | rflags::DF | rflags::AC | rflags::ID | rflags::NT | rflags::TF;
        state.rflags = state.rflags & !program | r.eflags & program;
        state.segments[4].base = r.fs_base;
        state.segments[5].base = r.gs_base;
        if self.fp.is_none() {
            ptrace::get_extended(self.process.pid, &mut self.area)?;
            let bytes = &mut state.fp.bytes;
            bytes[..8].copy_from_slice(&self.area[..8]);
            // The instruction and data pointers, as everywhere else.
            bytes[8..24].fill(0);
            bytes[24..28].copy_from_slice(&self.area[24..28]);
            bytes[32..416].copy_from_slice(&self.area[32..416]);
            bytes[FpState::XSTATE_BV] = 7;
            bytes[576..832].copy_from_slice(&self.area[576..832]);
            self.fp = Some(Box::new(state.fp.clone()));
        }
        Ok(())
    }

    /// Changes the process's memory. `Ok(false)`: the host refuses one of the changes, and all after it have not been made.
    ///
    /// # Errors
    /// The process has gone.
    pub fn change(&mut self, changes: &[Change]) -> Result<bool, String> {
        for part in changes.chunks(ENTRIES) {
            self.control.write(part, self.process.ram);
            self.away = true;
            let done = self.process.follow();
            self.control.clear(part.len());
            if !done? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// From now on the program stops before the instructions at these addresses, [`WATCHED`] at most, with [`Stop::Instruction`]. `false`: the host
    /// refuses.
    pub fn watch(&mut self, addresses: &[u64]) -> bool {
        ptrace::watch(self.process.pid, addresses).is_ok()
    }

    /// Takes all memory away.
    ///
    /// # Errors
    /// The process has gone.
    pub fn clear(&mut self) -> Result<(), String> {
        let all = [
            Change::Unmap { address: 0, length: STUB },
            Change::Unmap { address: STUB + 4096, length: END - STUB - 4096 },
        ];
        match self.change(&all)? {
            true => Ok(()),
            false => Err("the host does not take back a process's memory".into()),
        }
    }
}

#[cfg(test)]
mod tests;
