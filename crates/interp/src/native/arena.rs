//! The memory the assist runs code in: one file in memory, mapped twice, so that no address is both writable and executable.
//!
//! ```text
//! view X:  | data page, read-write | code, read-execute |
//! view W:                          | code, read-write   |
//! ```
//! Code reaches the data page relative to RIP. The first pieces of code are the ways in and out; after them come the thunks.

use std::ptr;

use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};

use crate::registers::GPR64;

/// Size of the data area in bytes.
const DATA: usize = 8192;
/// Size of the code area in bytes.
const CODE: usize = 1 << 20;
/// Where the bounce buffer is in the data area; its alignment is that of the page.
const BOUNCE: usize = 4096;

/// The start of the data area: what goes between the assist and its code.
#[repr(C)]
pub(super) struct Exchange {
    /// General registers in encoding order; RSP is not loaded.
    pub(super) gpr: [u64; 16],
    /// RFLAGS to load, and as left.
    pub(super) flags: u64,
    host_rsp: u64,
    /// The x87/SSE/AVX area to load and to store.
    pub(super) fp: *mut u8,
    /// Where to jump after loading.
    pub(super) target: u64,
    /// Exception number + 1 if the instruction faulted.
    pub(super) trap: u64,
    /// Where a fault goes on.
    pub(super) exit: u64,
    host_mxcsr: u32,
    host_fcw: u32,
}

const SAVED: [Register; 6] = [Register::RBX, Register::RBP, Register::R12, Register::R13, Register::R14, Register::R15];

/// The ways in and out: offsets into the code area, without and with x87/SSE/AVX state.
#[derive(Clone, Copy, Default)]
struct Stubs {
    enter: [usize; 2],
    exit: [usize; 2],
}

pub(super) struct Arena {
    x: *mut u8,
    w: *mut u8,
    used: usize,
    /// End of the stubs: where thunks start.
    thunks: usize,
    stubs: Stubs,
    /// Counts how often the thunks were thrown away.
    pub(super) generation: u32,
}

// SAFETY: the mappings belong to this value alone and have no tie to a thread.
unsafe impl Send for Arena {}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both mappings were made in `new` with these sizes; nothing refers to them any more.
        unsafe {
            libc::munmap(self.x.cast(), DATA + CODE);
            libc::munmap(self.w.cast(), CODE);
        }
    }
}

fn host_error(what: &str) -> String {
    format!("the host gives no executable memory ({what}: {})", std::io::Error::last_os_error())
}

impl Arena {
    pub(super) fn new() -> Result<Self, String> {
        const MFD_EXEC: u32 = 0x10;
        let size = DATA + CODE;
        // SAFETY: plain system calls on a new descriptor and new mappings; results are checked.
        unsafe {
            let name = c"native-assist".as_ptr();
            let mut file = libc::memfd_create(name, libc::MFD_CLOEXEC | MFD_EXEC);
            if file < 0 {
                // Kernels before 6.3 do not know the flag.
                file = libc::memfd_create(name, libc::MFD_CLOEXEC);
            }
            if file < 0 {
                return Err(host_error("memfd_create"));
            }
            let map = |at: *mut libc::c_void, len: usize, prot: i32, flags: i32, offset: usize| {
                libc::mmap(at, len, prot, libc::MAP_SHARED | flags, file, offset as libc::off_t)
            };
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            let mut result = Err(String::new());
            if libc::ftruncate(file, size as libc::off_t) == 0 {
                let x = map(ptr::null_mut(), size, rw, 0, 0);
                let w = map(ptr::null_mut(), CODE, rw, 0, DATA);
                if x != libc::MAP_FAILED && w != libc::MAP_FAILED {
                    let code = x.cast::<u8>().add(DATA).cast();
                    if libc::mprotect(code, CODE, libc::PROT_READ | libc::PROT_EXEC) == 0 {
                        result = Ok((x.cast::<u8>(), w.cast::<u8>()));
                    }
                }
            }
            if result.is_err() {
                result = Err(host_error("mmap"));
            }
            libc::close(file);
            let (x, w) = result?;
            let mut this = Self { x, w, used: 0, thunks: 0, stubs: Stubs::default(), generation: 0 };
            this.write_stubs()?;
            Ok(this)
        }
    }

    /// The exchange area.
    pub(super) fn exchange(&mut self) -> &mut Exchange {
        // SAFETY: the data area is mapped read-write as long as `self` lives, aligned to a page; any bytes are valid values.
        unsafe { &mut *self.x.cast() }
    }

    /// `len` bytes for an operand, at the same place within 64 bytes as `address`.
    pub(super) fn bounce(&mut self, address: u64, len: usize) -> &mut [u8] {
        let offset = BOUNCE + (address % 64) as usize;
        let len = len.min(DATA - offset);
        // SAFETY: inside the data area, which is mapped read-write as long as `self` lives.
        unsafe { std::slice::from_raw_parts_mut(self.x.add(offset), len) }
    }

    /// Is `address` in the data area?
    pub(super) fn is_data(&self, address: u64) -> bool {
        address.wrapping_sub(self.x as u64) < DATA as u64
    }

    /// Is `address` in the code area?
    pub(super) fn is_code(&self, address: u64) -> bool {
        address.wrapping_sub(self.code(0)) < CODE as u64
    }

    /// First and last address of the code area, for the signal handler.
    pub(super) fn code_range(&self) -> (u64, u64) {
        (self.code(0), self.code(CODE - 1))
    }

    fn code(&self, offset: usize) -> u64 {
        self.x as u64 + (DATA + offset) as u64
    }

    /// Encodes one instruction behind the last one.
    fn emit(&mut self, instruction: &Instruction) -> Result<(), String> {
        let mut encoder = Encoder::new(64);
        encoder.encode(instruction, self.code(self.used)).map_err(|e| e.to_string())?;
        let bytes = encoder.take_buffer();
        if self.used + bytes.len() > CODE {
            return Err("the code area is full".into());
        }
        // SAFETY: the bytes fit behind `used` in the code area, which view W maps read-write.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.w.add(self.used), bytes.len()) };
        self.used += bytes.len();
        Ok(())
    }

    /// A field of [`Exchange`] as a memory operand.
    fn field(&self, offset: usize) -> MemoryOperand {
        MemoryOperand::with_base_displ(Register::RIP, self.x as i64 + offset as i64)
    }

    fn write_stubs(&mut self) -> Result<(), String> {
        use std::mem::offset_of;
        let e = |r: Result<Instruction, iced_x86::IcedError>| r.map_err(|e| e.to_string());
        let load = |to: Register, from: MemoryOperand| Instruction::with2(Code::Mov_r64_rm64, to, from);
        let store = |to: MemoryOperand, from: Register| Instruction::with2(Code::Mov_rm64_r64, to, from);
        let flags = offset_of!(Exchange, flags);
        let avx = std::is_x86_feature_detected!("avx");
        for fp in [0, 1] {
            // In.
            self.stubs.enter[fp] = self.used;
            for register in SAVED {
                self.emit(&e(Instruction::with1(Code::Push_r64, register))?)?;
            }
            self.emit(&e(store(self.field(offset_of!(Exchange, host_rsp)), Register::RSP))?)?;
            if fp == 1 {
                let mxcsr = self.field(offset_of!(Exchange, host_mxcsr));
                self.emit(&e(Instruction::with1(Code::Stmxcsr_m32, mxcsr))?)?;
                let fcw = self.field(offset_of!(Exchange, host_fcw));
                self.emit(&e(Instruction::with1(Code::Fnstcw_m2byte, fcw))?)?;
                self.emit_all_state()?;
                self.emit(&e(Instruction::with1(Code::Xrstor64_mem, MemoryOperand::with_base(Register::RDI)))?)?;
            }
            self.emit(&e(Instruction::with1(Code::Push_rm64, self.field(flags)))?)?;
            self.emit(&Instruction::with(Code::Popfq))?;
            for (i, register) in GPR64.into_iter().enumerate() {
                if register != Register::RSP {
                    self.emit(&e(load(register, self.field(i * 8)))?)?;
                }
            }
            self.emit(&e(Instruction::with1(Code::Jmp_rm64, self.field(offset_of!(Exchange, target))))?)?;
            // Out.
            self.stubs.exit[fp] = self.used;
            for (i, register) in GPR64.into_iter().enumerate() {
                if register != Register::RSP {
                    self.emit(&e(store(self.field(i * 8), register))?)?;
                }
            }
            self.emit(&e(load(Register::RSP, self.field(offset_of!(Exchange, host_rsp))))?)?;
            self.emit(&Instruction::with(Code::Pushfq))?;
            self.emit(&e(Instruction::with1(Code::Pop_rm64, self.field(flags)))?)?;
            if fp == 1 {
                self.emit_all_state()?;
                self.emit(&e(Instruction::with1(Code::Xsave64_mem, MemoryOperand::with_base(Register::RDI)))?)?;
                self.emit(&Instruction::with(Code::Fninit))?;
                let fcw = self.field(offset_of!(Exchange, host_fcw));
                self.emit(&e(Instruction::with1(Code::Fldcw_m2byte, fcw))?)?;
                if avx {
                    self.emit(&Instruction::with(Code::VEX_Vzeroupper))?;
                }
                let mxcsr = self.field(offset_of!(Exchange, host_mxcsr));
                self.emit(&e(Instruction::with1(Code::Ldmxcsr_m32, mxcsr))?)?;
            }
            for register in SAVED.into_iter().rev() {
                self.emit(&e(Instruction::with1(Code::Pop_r64, register))?)?;
            }
            self.emit(&Instruction::with(Code::Retnq))?;
        }
        self.thunks = self.used;
        Ok(())
    }

    /// RDI to the state area, EDX:EAX = 7: x87, SSE, AVX.
    fn emit_all_state(&mut self) -> Result<(), String> {
        let fp = self.field(std::mem::offset_of!(Exchange, fp));
        let e = |r: Result<Instruction, iced_x86::IcedError>| r.map_err(|e| e.to_string());
        self.emit(&e(Instruction::with2(Code::Mov_r64_rm64, Register::RDI, fp))?)?;
        self.emit(&e(Instruction::with2(Code::Mov_r32_imm32, Register::EAX, 7))?)?;
        self.emit(&e(Instruction::with2(Code::Xor_r32_rm32, Register::EDX, Register::EDX))?)
    }

    /// Writes a thunk that runs `instruction` and leaves; gives its address. Throws all thunks away when the area is full.
    pub(super) fn thunk(&mut self, instruction: &Instruction, fp: bool) -> Result<u64, String> {
        if self.used + 64 > CODE {
            self.used = self.thunks;
            self.generation += 1;
        }
        let start = self.used;
        let exit = self.code(self.stubs.exit[usize::from(fp)]);
        let jump = Instruction::with_branch(Code::Jmp_rel32_64, exit).map_err(|e| e.to_string())?;
        let result = self.emit(instruction).and_then(|()| self.emit(&jump));
        if let Err(why) = result {
            self.used = start;
            return Err(why);
        }
        Ok(self.code(start))
    }

    /// Runs the thunk at `target` with the registers in [`Self::exchange`] and the state area at `fp`.
    ///
    /// # Safety
    /// `target` came from [`Self::thunk`] of this generation with the same `with_fp`; its instruction touches no memory but the bounce
    /// buffer through a register that points there. With `with_fp`, `fp` is a valid XSAVE area of 832 bytes, aligned to 64.
    pub(super) unsafe fn run(&mut self, target: u64, with_fp: bool, fp: *mut u8) {
        let exit = self.code(self.stubs.exit[usize::from(with_fp)]);
        let enter = self.code(self.stubs.enter[usize::from(with_fp)]);
        let exchange = self.exchange();
        exchange.target = target;
        exchange.exit = exit;
        exchange.trap = 0;
        exchange.fp = fp;
        // SAFETY: `enter` is the start of a stub that keeps to the System V convention: it saves the registers a callee must, and
        // restores them, the stack pointer, the x87 control word and MXCSR on its way out.
        unsafe {
            let enter: extern "sysv64" fn() = std::mem::transmute(enter as *const u8);
            enter();
        }
    }
}
