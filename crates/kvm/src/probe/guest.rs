//! The probe's guest: 64-bit code in an address space of its own.
//!
//! ```text
//! 0x1000  PML4, PDPT, page directory (2 MiB pages of the first 32 MiB onto themselves)
//! 0x4000  page directory and page table of the alias at 1 GiB: its first page is DATA, the second is absent at first
//! 0x6000  GDT, 0x7000 IDT, 0x9000 top of the stack, 0x9000 DATA, 0x10000 code
//! ```

use std::arch::global_asm;

use cpu::{CpuState, FpState, TableRegister, cr4, gpr};
use memory::GuestRam;

/// Where the result goes, as a dword.
pub const PORT: u16 = 0xf4;
/// The result when all went well; otherwise it is the step that did not.
pub const GOOD: u32 = 0x600d;
/// Holds the number of the step.
pub const STEP_REGISTER: usize = gpr::R15;

const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const ALIAS_DIRECTORY: u64 = 0x4000;
const ALIAS_TABLE: u64 = 0x5000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x7000;
const DATA: u64 = 0x9000;
const CODE: u64 = 0x1_0000;
const CODE_SELECTOR: u16 = 8;
const DATA_SELECTOR: u16 = 16;

/// What a step tries.
pub fn step_name(step: u64) -> &'static str {
    match step {
        1 => "paging",
        2 => "SSE",
        3 => "floating point",
        4 => "BMI2",
        5 => "an invalid opcode",
        6 => "a page fault",
        7 => "the local APIC's timer",
        _ => "64-bit code",
    }
}

// Everything is addressed absolutely (below 2 GiB) or relatively to itself, so that the bytes can be copied.
global_asm!(
    ".pushsection .rodata.tightrope_probe, \"a\"",
    ".globl tightrope_probe_start, tightrope_probe_invalid, tightrope_probe_fault, tightrope_probe_timer, tightrope_probe_end",
    "tightrope_probe_start:",
    // 1: what is written through the alias is there at the page's own address.
    "mov r15d, 1",
    "mov ebx, 0x40000000",
    "movabs rax, 0x1122334455667788",
    "mov [rbx], rax",
    "mov edx, 0x9000",
    "cmp [rdx], rax",
    "jne 9f",
    // 2: SSE2 integers.
    "inc r15d",
    "movq xmm0, rax",
    "paddd xmm0, xmm0",
    "movq rcx, xmm0",
    "movabs rax, 0x22446688aaccef10",
    "cmp rcx, rax",
    "jne 9f",
    // 3: SSE2 doubles.
    "inc r15d",
    "mov eax, 6",
    "cvtsi2sd xmm1, eax",
    "mulsd xmm1, xmm1",
    "sqrtsd xmm1, xmm1",
    "mulsd xmm1, xmm1",
    "cvttsd2si eax, xmm1",
    "sub eax, 36",
    "cmp eax, -1", // 35.99… may be rounded down
    "je 2f",
    "test eax, eax",
    "jne 9f",
    // 4: BMI2, where CPUID shows it.
    "2: inc r15d",
    "mov eax, 7",
    "xor ecx, ecx",
    "cpuid",
    "bt ebx, 8",
    "jnc 3f",
    "mov eax, 0x1234",
    "mov ecx, 0xf0f0",
    "pext eax, eax, ecx",
    "cmp eax, 0x13",
    "jne 9f",
    "mov ecx, 12",
    "shlx rdx, rax, rcx",
    "cmp rdx, 0x13000",
    "jne 9f",
    // 5: an exception without error code.
    "3: inc r15d",
    "xor r14d, r14d",
    "ud2",
    "cmp r14d, 1",
    "jne 9f",
    // 6: one with error code; its handler maps the page.
    "inc r15d",
    "mov ebx, 0x40001000",
    "mov dword ptr [rbx], 77",
    "cmp r14d, 2",
    "jne 9f",
    "cmp dword ptr [rbx], 77",
    "jne 9f",
    // 7: x2APIC mode; divide by 1, one-shot timer, vector 0x40, 50 µs.
    "inc r15d",
    "mov ecx, 0x1b",
    "rdmsr",
    "or eax, 0xc00",
    "wrmsr",
    "xor edx, edx",
    "mov ecx, 0x80f",
    "mov eax, 0x1ff",
    "wrmsr",
    "mov ecx, 0x83e",
    "mov eax, 0xb",
    "wrmsr",
    "mov ecx, 0x832",
    "mov eax, 0x40",
    "wrmsr",
    "mov ecx, 0x838",
    "mov eax, 50000",
    "wrmsr",
    "4: sti",
    "hlt",
    "cli",
    "cmp r14d, 3",
    "jne 4b",
    "mov r15d, 0x600d",
    "9: mov eax, r15d",
    "mov edx, 0xf4",
    "out dx, eax",
    "8: hlt",
    "jmp 8b",
    "tightrope_probe_invalid:",
    "inc r14d",
    "add qword ptr [rsp], 2",
    "iretq",
    "tightrope_probe_fault:",
    "inc r14d",
    "mov r13d, 0x5008",
    "mov qword ptr [r13], 0xa003",
    "add rsp, 8",
    "iretq",
    "tightrope_probe_timer:",
    "inc r14d",
    "mov ecx, 0x80b",
    "xor eax, eax",
    "xor edx, edx",
    "wrmsr",
    "iretq",
    "tightrope_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static tightrope_probe_start: u8;
    static tightrope_probe_invalid: u8;
    static tightrope_probe_fault: u8;
    static tightrope_probe_timer: u8;
    static tightrope_probe_end: u8;
}

/// The code, and the offsets of the handlers of vectors 6, 14 and 0x40.
fn code() -> (&'static [u8], [(u64, usize); 3]) {
    let start = &raw const tightrope_probe_start as usize;
    let end = &raw const tightrope_probe_end as usize;
    let offset = |label: *const u8| (label as usize).wrapping_sub(start) as u64;
    let handlers = [
        (offset(&raw const tightrope_probe_invalid), 6),
        (offset(&raw const tightrope_probe_fault), 14),
        (offset(&raw const tightrope_probe_timer), 0x40),
    ];
    // SAFETY: the labels enclose the bytes assembled above, in read-only data that lives for ever.
    (unsafe { std::slice::from_raw_parts(start as *const u8, end.saturating_sub(start)) }, handlers)
}

/// Puts the guest into `ram`; returns the state in which it starts. `None`: `ram` is too small.
pub fn load(ram: &GuestRam) -> Option<CpuState> {
    let put = |address: u64, value: u64| ram.write(address, &value.to_le_bytes()).then_some(());
    put(PML4, PDPT | 3)?;
    put(PDPT, DIRECTORY | 3)?;
    put(PDPT + 8, ALIAS_DIRECTORY | 3)?;
    for page in 0..16 {
        put(DIRECTORY + page * 8, page << 21 | 0x83)?;
    }
    put(ALIAS_DIRECTORY, ALIAS_TABLE | 3)?;
    put(ALIAS_TABLE, DATA | 3)?;
    put(GDT + u64::from(CODE_SELECTOR), 0x00af_9b00_0000_ffff)?;
    put(GDT + u64::from(DATA_SELECTOR), 0x00cf_9300_0000_ffff)?;
    let (code, handlers) = code();
    ram.write(CODE, code).then_some(())?;
    for (offset, vector) in handlers {
        let handler = CODE + offset;
        // A 64-bit interrupt gate (SDM volume 3, 7.14.1).
        put(
            IDT + vector as u64 * 16,
            handler & 0xffff | u64::from(CODE_SELECTOR) << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48,
        )?;
        put(IDT + vector as u64 * 16 + 8, 0)?;
    }
    let mut state = CpuState::default();
    state.enter_long_mode(PML4, CODE_SELECTOR, DATA_SELECTOR);
    state.cr4 |= cr4::OSFXSR | cr4::OSXMMEXCPT;
    state.fp = FpState::default();
    state.gdtr = TableRegister { base: GDT, limit: 23 };
    state.idtr = TableRegister { base: IDT, limit: 0x41 * 16 - 1 };
    state.gpr = [0; 16];
    state.gpr[gpr::RSP] = DATA;
    state.rip = CODE;
    Some(state)
}
