//! What the host's CPU does with the flags that the manuals call undefined, found out by running instructions on it.
//!
//! Intel's and AMD's CPUs differ: MUL and IMUL compute SF, AF and PF here and leave them as they were there; TZCNT clears OF or
//! leaves it. Guests see what their host's CPU does. Whoever runs the instruction itself need only know which old flags get
//! through it: those are still wanted behind it. Nothing here knows a vendor.

use std::arch::asm;
use std::sync::LazyLock;

use cpu::rflags;
use iced_x86::{Instruction, Mnemonic, RflagsBits};

const ALL: u32 = RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// Runs one form of an instruction with RAX, RDX, RCX (source, count, second source) and these arithmetic flags; gives the flags.
type Sample = fn(flags: u64, rax: u64, rdx: u64, rcx: u64) -> u64;

macro_rules! samples {
    ($($instruction:literal),+ $(,)?) => {
        &[$({
            fn run(flags: u64, rax: u64, rdx: u64, rcx: u64) -> u64 {
                let mut flags = flags | rflags::FIXED;
                let mut bytes = [rax, rdx];
                // SAFETY: changes the registers named, arithmetic flags and `bytes` only; the stack is left as it was.
                unsafe {
                    asm!(
                        "push {flags}",
                        "popfq",
                        $instruction,
                        "pushfq",
                        "pop {flags}",
                        flags = inout(reg) flags,
                        inout("rax") rax => _,
                        inout("rdx") rdx => _,
                        inout("rcx") rcx => _,
                        in("rsi") bytes.as_mut_ptr(),
                    )
                }
                flags & rflags::ARITH
            }
            run as Sample
        }),+]
    };
}

/// Instructions that are frequent enough for their flags to matter, with forms that stand for all others.
static SAMPLES: &[(&[Mnemonic], &[Sample])] = &[
    (
        &[Mnemonic::And],
        samples![
            "and rax, rdx",
            "and eax, edx",
            "and al, dl",
            "and [rsi], rdx",
            "lock and [rsi], edx",
            "and eax, 0x55"
        ],
    ),
    (&[Mnemonic::Or], samples!["or rax, rdx", "or eax, edx", "or al, dl", "or [rsi], rdx", "lock or [rsi], edx"]),
    (
        &[Mnemonic::Xor],
        samples![
            "xor rax, rdx",
            "xor eax, eax",
            "xor al, dl",
            "xor [rsi], rdx",
            "lock xor [rsi], edx",
            "xor eax, 0x55"
        ],
    ),
    (&[Mnemonic::Test], samples!["test rax, rdx", "test eax, eax", "test al, 1", "test [rsi], rdx"]),
    (
        &[Mnemonic::Shl, Mnemonic::Sal],
        samples![
            "shl rax, 1",
            "shl rax, 2",
            "shl rax, 33",
            "shl rax, 63",
            "shl eax, 1",
            "shl eax, 3",
            "shl eax, 31",
            "shl ax, 4",
            "shl ax, 16",
            "shl ax, 31",
            "shl al, 2",
            "shl al, 8",
            "shl al, 9",
            "shl qword ptr [rsi], 3",
            "shl byte ptr [rsi], 9",
            "shl dword ptr [rsi], 1"
        ],
    ),
    (
        &[Mnemonic::Shr],
        samples![
            "shr rax, 1",
            "shr rax, 2",
            "shr rax, 33",
            "shr rax, 63",
            "shr eax, 1",
            "shr eax, 3",
            "shr eax, 31",
            "shr ax, 4",
            "shr ax, 16",
            "shr ax, 31",
            "shr al, 2",
            "shr al, 8",
            "shr al, 9",
            "shr qword ptr [rsi], 3",
            "shr byte ptr [rsi], 9",
            "shr dword ptr [rsi], 1"
        ],
    ),
    (
        &[Mnemonic::Sar],
        samples![
            "sar rax, 1",
            "sar rax, 2",
            "sar rax, 33",
            "sar rax, 63",
            "sar eax, 1",
            "sar eax, 3",
            "sar eax, 31",
            "sar ax, 4",
            "sar ax, 16",
            "sar ax, 31",
            "sar al, 2",
            "sar al, 8",
            "sar al, 9",
            "sar qword ptr [rsi], 3",
            "sar byte ptr [rsi], 9",
            "sar dword ptr [rsi], 1"
        ],
    ),
    (
        &[Mnemonic::Shld],
        samples![
            "shld rax, rdx, 1",
            "shld rax, rdx, 5",
            "shld rax, rdx, 63",
            "shld eax, edx, 7",
            "shld ax, dx, 9",
            "shld ax, dx, 25",
            "shld [rsi], rdx, 5",
            "shld word ptr [rsi], dx, 20"
        ],
    ),
    (
        &[Mnemonic::Shrd],
        samples![
            "shrd rax, rdx, 1",
            "shrd rax, rdx, 5",
            "shrd rax, rdx, 63",
            "shrd eax, edx, 7",
            "shrd ax, dx, 9",
            "shrd ax, dx, 25",
            "shrd [rsi], rdx, 5",
            "shrd word ptr [rsi], dx, 20"
        ],
    ),
    (&[Mnemonic::Mul], samples!["mul rdx", "mul edx", "mul dx", "mul dl", "mul qword ptr [rsi]", "mul byte ptr [rsi]"]),
    (
        &[Mnemonic::Imul],
        samples![
            "imul rdx",
            "imul edx",
            "imul dx",
            "imul dl",
            "imul byte ptr [rsi]",
            "imul rax, rdx",
            "imul eax, edx",
            "imul ax, dx",
            "imul rax, [rsi]",
            "imul rax, rdx, 24",
            "imul eax, edx, 1000",
            "imul ax, dx, 7",
            "imul eax, [rsi], 3"
        ],
    ),
    (&[Mnemonic::Bsf], samples!["bsf rax, rdx", "bsf eax, edx", "bsf ax, dx", "bsf rax, [rsi]"]),
    (&[Mnemonic::Bsr], samples!["bsr rax, rdx", "bsr eax, edx", "bsr ax, dx", "bsr rax, [rsi]"]),
];

/// As [`SAMPLES`], where the CPU has BMI1, BMI2 and LZCNT.
static NEWER_SAMPLES: &[(&[Mnemonic], &[Sample])] = &[
    (&[Mnemonic::Tzcnt], samples!["tzcnt rax, rdx", "tzcnt eax, edx", "tzcnt ax, dx", "tzcnt rax, [rsi]"]),
    (&[Mnemonic::Lzcnt], samples!["lzcnt rax, rdx", "lzcnt eax, edx", "lzcnt ax, dx", "lzcnt rax, [rsi]"]),
    (&[Mnemonic::Andn], samples!["andn rax, rdx, rcx", "andn eax, edx, ecx", "andn rax, rdx, [rsi]"]),
    (&[Mnemonic::Blsr], samples!["blsr rax, rdx", "blsr eax, edx", "blsr rax, [rsi]"]),
    (&[Mnemonic::Blsi], samples!["blsi rax, rdx", "blsi eax, edx", "blsi rax, [rsi]"]),
    (&[Mnemonic::Blsmsk], samples!["blsmsk rax, rdx", "blsmsk eax, edx", "blsmsk rax, [rsi]"]),
    (&[Mnemonic::Bzhi], samples!["bzhi rax, rdx, rcx", "bzhi eax, edx, ecx", "bzhi rax, [rsi], rcx"]),
    (&[Mnemonic::Bextr], samples!["bextr rax, rdx, rcx", "bextr eax, edx, ecx", "bextr rax, [rsi], rcx"]),
];

/// Operands to try: zero, one, the largest, the signs, and some in between.
const VALUES: [u64; 7] = [0, 1, u64::MAX, 1 << 63, 0x8000_8080, 0x1234_5678_9abc_def3, 0x0ff0];

/// The flags that come out the same whatever they were, of all samples and operands. In iced's numbering.
fn measure(samples: &[Sample]) -> u32 {
    let mut through = 0;
    for sample in samples {
        for a in VALUES {
            for b in VALUES {
                for c in [0, 7, 0x4_1003] {
                    through |= sample(0, a, b, c) ^ sample(rflags::ARITH, a, b, c);
                }
            }
        }
    }
    ALL & !iced(through)
}

/// RFLAGS bits in iced's numbering.
fn iced(flags: u64) -> u32 {
    [
        (rflags::OF, RflagsBits::OF),
        (rflags::SF, RflagsBits::SF),
        (rflags::ZF, RflagsBits::ZF),
        (rflags::AF, RflagsBits::AF),
        (rflags::CF, RflagsBits::CF),
        (rflags::PF, RflagsBits::PF),
    ]
    .into_iter()
    .filter(|(flag, _)| flags & flag != 0)
    .fold(0, |all, (_, bit)| all | bit)
}

/// By mnemonic: the flags it always writes, as far as it has been measured; 0 for the others.
static WRITTEN: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut written = vec![0; Mnemonic::values().len()];
    let newer = std::is_x86_feature_detected!("bmi1")
        && std::is_x86_feature_detected!("bmi2")
        && std::is_x86_feature_detected!("lzcnt");
    for &(mnemonics, samples) in SAMPLES.iter().chain(NEWER_SAMPLES.iter().filter(|_| newer)) {
        let flags = measure(samples);
        for &mnemonic in mnemonics {
            if let Some(slot) = written.get_mut(mnemonic as usize) {
                *slot = flags as u8;
            }
        }
    }
    written
});

/// Arithmetic flags, in iced's numbering ([`RflagsBits`]), that the instruction overwrites on this CPU whatever they were: those the
/// manuals define, and of the undefined ones those that have been seen to be written. Shifts and rotates: for a count that is not zero.
/// REP prefixes and operands that turn a flag's definition off are the caller's matter.
pub fn overwritten(ins: &Instruction) -> u32 {
    let modified = ins.rflags_modified() & ALL;
    let undefined = match ins.mnemonic() {
        // Their CF is undefined too, when the count exceeds the width.
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar | Mnemonic::Shld | Mnemonic::Shrd => ALL,
        _ => ins.rflags_undefined() & ALL,
    };
    if modified & undefined == 0 {
        return modified;
    }
    let written = WRITTEN.get(ins.mnemonic() as usize).map_or(0, |&flags| u32::from(flags));
    modified & (!undefined | written)
}

/// Does a rotate of a register by an immediate count above 1 leave OF as it was? Rotates by CL and those of memory may well write it.
pub(crate) fn rotate_keeps_of() -> bool {
    static KEEPS: LazyLock<bool> = LazyLock::new(|| {
        let forms: &[Sample] = samples!["rol rax, 3", "ror eax, 5", "rol al, 7"];
        measure(forms) & RflagsBits::OF == 0
    });
    *KEEPS
}

/// Does this CPU know bits of MXCSR beyond the sixteen that guests are shown? (AMD's misaligned mode, APM volume 1, 4.2.2.)
/// LDMXCSR takes them where it must fault.
pub fn more_mxcsr_bits() -> bool {
    #[repr(align(16))]
    struct Area([u8; 512]);
    static MORE: LazyLock<bool> = LazyLock::new(|| {
        let mut area = Area([0; 512]);
        // SAFETY: the area is as large and as aligned as FXSAVE wants it.
        unsafe { asm!("fxsave [{}]", in(reg) area.0.as_mut_ptr(), options(nostack, preserves_flags)) };
        area.0[30] | area.0[31] != 0
    });
    *MORE
}

/// Do repeated string instructions with 32-bit addresses cut their registers to 32 bits even when nothing is done, for lack of a
/// count or by a fault?
pub(crate) fn rep_truncates() -> bool {
    static TRUNCATES: LazyLock<bool> = LazyLock::new(|| {
        let mut count = 0xffff_ffff_0000_0000_u64;
        // SAFETY: the count is zero: `rep movs byte ptr [edi], [esi]` touches no memory. All registers it may change are named.
        unsafe {
            asm!(
                ".byte 0x67, 0xf3, 0xa4",
                inout("rcx") count,
                inout("rsi") 0_u64 => _,
                inout("rdi") 0_u64 => _,
                options(nostack, preserves_flags)
            )
        }
        count == 0
    });
    *TRUNCATES
}

/// Is the host's CPU AMD's or of its kin? For the order of faults, which cannot be measured without having them.
pub(crate) fn is_amd() -> bool {
    static AMD: LazyLock<bool> = LazyLock::new(|| {
        let leaf = std::arch::x86_64::__cpuid(0);
        matches!(&[leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat()[..], b"AuthenticAMD" | b"HygonGenuine")
    });
    *AMD
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: &[u8]) -> u32 {
        overwritten(&iced_x86::Decoder::new(64, bytes, 0).decode())
    }

    #[test]
    fn defined_flags_are_overwritten() {
        assert_eq!(of(&[0x48, 0x01, 0xd8]), ALL, "add");
        assert_eq!(of(&[0xff, 0xc0]), ALL & !RflagsBits::CF, "inc");
        assert_eq!(of(&[0x48, 0x0f, 0xba, 0xe0, 5]), RflagsBits::CF, "bt: nobody has measured the others");
    }

    #[test]
    fn what_gets_through_on_some_cpus_is_measured() {
        let both = RflagsBits::CF | RflagsBits::OF;
        assert_eq!(of(&[0x48, 0x0f, 0xaf, 0xc3]) & both, both, "imul");
        assert_eq!(of(&[0xf7, 0xe3]) & both, both, "mul");
        let zf = RflagsBits::ZF;
        assert_eq!(of(&[0x48, 0x0f, 0xbc, 0xc3]) & zf, zf, "bsf");
        assert_eq!(of(&[0xf3, 0x48, 0x0f, 0xbc, 0xc3]) & (zf | RflagsBits::CF), zf | RflagsBits::CF, "tzcnt");
    }

    /// The interpreter computes these, and speed depends on them.
    #[test]
    fn logic_clears_af_and_shifts_write_all() {
        for &(mnemonics, samples) in SAMPLES {
            if matches!(mnemonics[0], Mnemonic::And | Mnemonic::Or | Mnemonic::Xor | Mnemonic::Test) {
                assert!(samples.iter().all(|run| run(rflags::ARITH, 1, 0x83, 0) & rflags::AF == 0), "{mnemonics:?}");
            }
        }
        for bytes in [[0x48, 0x21, 0xd8, 0], [0x31, 0xc0, 0, 0], [0x84, 0xc0, 0, 0], [0x48, 0xc1, 0xe0, 5]] {
            assert_eq!(of(&bytes), ALL, "{bytes:x?}");
        }
    }
}
