//! The registers of the stopped program, as the kernel has left them on the signal stack (`struct rt_sigframe` of x86-64, uapi `asm/sigcontext.h`), and
//! takes them from there again. The program can write all of it.

use cpu::FpState;

use crate::stub::{SIGNAL_STACK, SIGNAL_STACK_SIZE, STUB, Stub};

/// Words of the context that are of interest: up to the signal mask.
const CONTEXT_WORDS: usize = 38;
/// Words of `siginfo_t` that are of interest.
const INFO_WORDS: usize = 4;
/// Bytes from the context's start to `siginfo_t`.
const INFO: u64 = 304;
/// Word numbers in the context.
const FLAGS: usize = 0;
const STACK: usize = 2;
const REGISTERS: usize = 5;
const RSP: usize = 20;
const RIP: usize = 21;
const RFLAGS: usize = 22;
const SELECTORS: usize = 23;
const ERROR: usize = 24;
const TRAP: usize = 25;
const CR2: usize = 27;
const FP: usize = 28;
const MASK: usize = 37;
/// CS and SS of 64-bit programs, in the word of selectors.
const PROGRAM_SELECTORS: u64 = 0x33 | 0x2b << 48;
/// Bytes of the area of x87, SSE and AVX state, in the form of XSAVE.
const FP_SIZE: u64 = 832;
/// The area's bytes 464 to 511 are the kernel's.
const FP_KERNELS: usize = 464;

/// General registers and what else a context has, from one look at it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Frame {
    /// In the kernel's order: R8 to R15, RDI, RSI, RBP, RBX, RDX, RAX, RCX.
    pub general: [u64; 15],
    pub rsp: u64,
    pub rip: u64,
    pub rflags: u64,
    /// CS and SS.
    pub selectors: [u16; 2],
    /// Of the last exception: its number, its error code, CR2.
    pub trap: u64,
    pub error: u64,
    pub cr2: u64,
    /// `si_code` of the signal, and the word behind.
    pub code: i32,
    pub info: u64,
    /// Offsets in the stub.
    context: u64,
    fp: u64,
}

/// The offset in the stub of `length` bytes at `address`, if they are on the signal stack.
fn on_stack(address: u64, length: u64, align: u64) -> Option<u64> {
    let offset = address.checked_sub(STUB)?;
    let end = offset.checked_add(length)?;
    (offset >= SIGNAL_STACK && end <= SIGNAL_STACK + SIGNAL_STACK_SIZE && address.is_multiple_of(align))
        .then_some(offset)
}

impl Frame {
    /// The frame whose context is at `address`. `None`: there can be none.
    pub fn read(stub: &Stub, address: u64) -> Option<Self> {
        let context = on_stack(address, INFO + INFO_WORDS as u64 * 8, 8)?;
        let mut words = [0; CONTEXT_WORDS];
        stub.read(context, &mut words);
        let mut info = [0; INFO_WORDS];
        stub.read(context + INFO, &mut info);
        // What it tells of who called is not the program's business.
        stub.write(context + INFO, &[0; INFO_WORDS]);
        let mut general = [0; 15];
        general.copy_from_slice(&words[REGISTERS..RSP]);
        Some(Self {
            general,
            rsp: words[RSP],
            rip: words[RIP],
            rflags: words[RFLAGS],
            selectors: [words[SELECTORS] as u16, (words[SELECTORS] >> 48) as u16],
            trap: words[TRAP],
            error: words[ERROR],
            cr2: words[CR2],
            code: info[1] as i32,
            info: info[2],
            context,
            fp: on_stack(words[FP], FP_SIZE, 64)?,
        })
    }

    /// Where its context is in the process.
    pub fn address(&self) -> u64 {
        STUB + self.context
    }

    /// Puts the registers back, and all else that rt_sigreturn looks at as it must be. `mask`: signals that stay blocked.
    pub fn write(&self, stub: &Stub, mask: u64) {
        const UC_FP_XSTATE: u64 = 1;
        const UC_SIGCONTEXT_SS: u64 = 2;
        const UC_STRICT_RESTORE_SS: u64 = 4;
        let at = |word: usize| self.context + word as u64 * 8;
        stub.write(at(FLAGS), &[UC_FP_XSTATE | UC_SIGCONTEXT_SS | UC_STRICT_RESTORE_SS, 0]);
        stub.write(at(STACK), &[STUB + SIGNAL_STACK, 0, SIGNAL_STACK_SIZE]);
        stub.write(at(REGISTERS), &self.general);
        stub.write(at(RSP), &[self.rsp, self.rip, self.rflags, PROGRAM_SELECTORS]);
        stub.write(at(FP), &[STUB + self.fp]);
        stub.write(at(MASK), &[mask]);
    }

    /// The program's x87, SSE and AVX state. Returns whether it has used more than that.
    pub fn read_fp(&self, stub: &Stub, to: &mut FpState) -> bool {
        let mut words = [0; FP_SIZE as usize / 8];
        stub.read(self.fp, &mut words);
        let mut area = [0; FP_SIZE as usize];
        for (bytes, word) in area.chunks_exact_mut(8).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let present = area[FpState::XSTATE_BV];
        let bytes = &mut to.bytes;
        if present & 1 != 0 {
            bytes[..8].copy_from_slice(&area[..8]);
            bytes[32..160].copy_from_slice(&area[32..160]);
        } else {
            bytes[..8].copy_from_slice(&[0x7f, 3, 0, 0, 0, 0, 0, 0]);
            bytes[32..160].fill(0);
        }
        // The instruction and data pointers, as everywhere else.
        bytes[8..24].fill(0);
        let mxcsr = u32::from_le_bytes([area[24], area[25], area[26], area[27]]) & FpState::MXCSR_MASK;
        bytes[FpState::MXCSR..FpState::MXCSR + 4].copy_from_slice(&mxcsr.to_le_bytes());
        let part = |bytes: &mut [u8], area: &[u8], there: bool| {
            if there { bytes.copy_from_slice(area) } else { bytes.fill(0) }
        };
        part(&mut bytes[160..416], &area[160..416], present & 2 != 0);
        part(&mut bytes[576..832], &area[576..832], present & 4 != 0);
        bytes[FpState::XSTATE_BV] = 7;
        present & !7 != 0
    }

    /// Gives the program that state.
    pub fn write_fp(&self, stub: &Stub, from: &FpState) {
        let words = |bytes: &[u8], to: &mut [u64]| {
            for (word, bytes) in to.iter_mut().zip(bytes.chunks_exact(8)) {
                *word = u64::from_le_bytes([
                    bytes[0], bytes[1], bytes[2], bytes[3], bytes[4], bytes[5], bytes[6], bytes[7],
                ]);
            }
        };
        let mut legacy = [0; FP_KERNELS / 8];
        words(&from.bytes[..416], &mut legacy);
        stub.write(self.fp, &legacy);
        let mut rest = [0; (FP_SIZE as usize - FpState::XSTATE_BV) / 8];
        rest[0] = 7;
        words(&from.bytes[576..832], &mut rest[8..]);
        stub.write(self.fp + FpState::XSTATE_BV as u64, &rest);
    }
}
