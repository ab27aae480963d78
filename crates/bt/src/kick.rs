//! Waking and interrupting a vCPU from other threads, and the memory that it takes.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};

use cpu::Kick;
use runner::Signaller;

use crate::block::{CALL_STACK, MAX_SLOTS, VcpuBlock};
use crate::world::Mail;

/// Memory of one vCPU: its block and its two guest-call stacks, in one mapping.
pub struct VcpuMemory {
    base: *mut u8,
    size: usize,
}

// SAFETY: a mapping of our own; access is by raw pointer, from the vCPU's thread, and atomically (the kick word, slots) from others.
unsafe impl Send for VcpuMemory {}
// SAFETY: as above.
unsafe impl Sync for VcpuMemory {}

const BLOCK_SIZE: usize = (size_of::<VcpuBlock>() + 4095) & !4095;
/// One guard page, then the stack.
const STACK_SIZE: usize = 4096 + CALL_STACK;

impl VcpuMemory {
    fn new() -> Result<Self, String> {
        let size = BLOCK_SIZE + 2 * STACK_SIZE;
        // SAFETY: a fresh anonymous mapping; guard pages lie inside it.
        unsafe {
            let base = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if base == libc::MAP_FAILED {
                return Err(format!("no memory for a virtual CPU: {}", std::io::Error::last_os_error()));
            }
            let memory = Self { base: base.cast(), size };
            for stack in 0..2 {
                if libc::mprotect(memory.base.add(BLOCK_SIZE + stack * STACK_SIZE).cast(), 4096, libc::PROT_NONE) != 0 {
                    return Err(format!("no guard page for a virtual CPU: {}", std::io::Error::last_os_error()));
                }
            }
            Ok(memory)
        }
    }

    pub fn block(&self) -> *mut VcpuBlock {
        self.base.cast()
    }

    pub fn guard(&self, user: bool) -> u64 {
        self.base as u64 + (BLOCK_SIZE + usize::from(user) * STACK_SIZE) as u64
    }

    /// Stack pointer of the empty stack: at its last word, which holds the underflow stub's address.
    pub fn empty_stack(&self, user: bool) -> u64 {
        self.guard(user) + (STACK_SIZE - 64) as u64
    }

    /// Slot `number`: set by the vCPU itself, and by whoever makes the slot.
    pub fn slot(&self, number: u32) -> &AtomicU64 {
        let number = (number as usize).min(MAX_SLOTS - 1);
        // SAFETY: the field is an array of atomics inside our mapping, which lives as long as `self`; the number is in range.
        unsafe { &(&(*self.block()).slots)[number] }
    }

    pub fn kick_word(&self) -> &AtomicU32 {
        // SAFETY: the field is an atomic inside our mapping, which lives as long as `self`.
        unsafe { &(*self.block()).kick }
    }
}

impl Drop for VcpuMemory {
    fn drop(&mut self) {
        // SAFETY: our own mapping; handles that could reach it hold an `Arc` of this value.
        unsafe { libc::munmap(self.base.cast(), self.size) };
    }
}

/// Wakes or interrupts the vCPU, and holds what others may look at.
pub struct KickHandle {
    /// Number of the vCPU.
    pub index: u32,
    pub memory: VcpuMemory,
    sleep: Mutex<()>,
    wake: Condvar,
    /// The vCPU sleeps on `wake`, or is about to.
    asleep: AtomicBool,
    pub stop: AtomicBool,
    /// The guest has called this vCPU out of its HLT, or the next one.
    pub unhalted: AtomicBool,
    /// It sleeps, and no interrupt can wake it.
    pub hopeless: AtomicBool,
    /// See [`crate::world`].
    pub running: AtomicBool,
    pub mail: Mutex<Mail>,
    pub has_mail: AtomicBool,
    /// Call the program that runs directly, if there are processes for that.
    programs: OnceLock<Vec<Arc<Signaller>>>,
}

impl KickHandle {
    pub fn new(index: u32) -> Result<Self, String> {
        Ok(Self {
            index,
            memory: VcpuMemory::new()?,
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            asleep: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            unhalted: AtomicBool::new(false),
            hopeless: AtomicBool::new(false),
            running: AtomicBool::new(false),
            mail: Mutex::new(Mail::default()),
            has_mail: AtomicBool::new(false),
            programs: OnceLock::new(),
        })
    }

    /// The processes that this vCPU's programs may run in.
    pub fn set_signallers(&self, signallers: Vec<Arc<Signaller>>) {
        let _ = self.programs.set(signallers);
    }

    fn call_program(&self) {
        for program in self.programs.get().into_iter().flatten() {
            program.call();
        }
    }

    /// Makes the vCPU look around soon, and wakes it if it sleeps.
    pub fn raise(&self) {
        self.memory.kick_word().store(1, Ordering::SeqCst);
        self.call_program();
        if self.asleep.load(Ordering::SeqCst) {
            // Taking the lock makes sure that a sleeper has either seen the word or hears the notification.
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
    }

    /// Makes the vCPU look around soon if it runs; a sleeper looks when it wakes.
    pub fn nudge(&self) {
        self.memory.kick_word().store(1, Ordering::SeqCst);
        self.call_program();
    }

    /// Sleeps until kicked.
    pub fn wait(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.store(true, Ordering::SeqCst);
        while self.memory.kick_word().load(Ordering::SeqCst) == 0 {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.store(false, Ordering::SeqCst);
    }
}

impl Kick for KickHandle {
    fn kick(&self) {
        self.raise();
    }
}
