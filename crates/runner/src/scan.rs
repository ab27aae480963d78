//! Instructions that programs may execute, but that would tell of the host or do something to it that is not the guest's: a page that has one of
//! them, at whatever offset, must not be executed in the process, unless the process is made to stop there ([`Runner::watch`](crate::Runner::watch)).
//!
//! RDTSC is not looked for: it is the engine's to see that the guest's time stamps are the host's. (The kernel would catch it, `PR_SET_TSC`, but
//! that makes each switch between processes twice as slow in a virtual machine.) Nor is what faults in programs anyway.

/// Longest sequence of bytes that is looked for, less one: so many bytes of the next page belong to a page.
pub const BEYOND: usize = 3;
/// So many bytes of the page before tell what is an instruction and what a part of one.
pub const BEFORE: usize = 64;

/// Where such instructions, or parts of them, are on the page: offsets, which may be somewhat below 0. `before`: the last [`BEFORE`] bytes of the page before it, `after`: the first [`BEYOND`] ones of the
/// page behind it; empty where nothing is there to be executed (they are looked at with that page then).
///
/// `written`: the program writes the page itself. Compilers leave data among what they write, which looks like anything; so only instructions that
/// programs ask for the CPU's features by, or save its state, are looked for there, and only where the bytes around them seem to be instructions.
pub fn find(page: &[u8; 4096], before: &[u8], after: &[u8], written: bool) -> Vec<i64> {
    let bytes = [before, page, after].concat();
    let catches_cpuid = catches_cpuid();
    let mut found = Vec::new();
    let mut from = before.len().saturating_sub(BEYOND);
    while let Some(at) = memchr::memchr2(0x0f, 0xcd, &bytes[from..]) {
        let at = from + at;
        from = at + 1;
        let tells = match tells(&bytes[at..], &bytes[..at]) {
            Tells::No => false,
            Tells::Cpuid if catches_cpuid => false,
            Tells::Cpuid => may_be_instruction(&bytes, at),
            Tells::Yes => !written || is_instruction(&bytes, at),
            Tells::OfFeatures => is_instruction(&bytes, at),
            Tells::IfExecuted => !written && is_instruction(&bytes, at),
        };
        if tells {
            found.extend(starts(&bytes, at).map(|start| start as i64 - before.len() as i64));
        }
    }
    found
}

/// Where the instruction may start whose code is at `at`: there, and where a prefix is that seems to belong to it.
fn starts(bytes: &[u8], at: usize) -> impl Iterator<Item = usize> {
    let prefix = |byte: u8| matches!(byte, 0x66 | 0xf2 | 0xf3);
    let rex = |byte: u8| byte & 0xf0 == 0x40;
    let before = match bytes[..at] {
        [.., first, second] if prefix(first) && (prefix(second) || rex(second)) => 2,
        [.., byte] if prefix(byte) || rex(byte) => 1,
        _ => 0,
    };
    (0..=before).rev().map(move |before| at - before).filter(move |&start| start == at || is_instruction(bytes, start))
}

/// Forbids CPUID (0) or allows it (1), where the CPU can (arch_prctl(2)).
pub(crate) const ARCH_SET_CPUID: u64 = 0x1012;

/// Does CPUID stop the process, where `ARCH_SET_CPUID` says so?
pub(crate) fn catches_cpuid() -> bool {
    static CATCHES: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    // SAFETY: lets this thread execute CPUID, which it may anyway; fails where it cannot be forbidden.
    *CATCHES.get_or_init(|| unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_CPUID, 1_u64) } == 0)
}

/// Is there an instruction at `at`, and not the middle of one? Instructions are of many lengths, but who decodes from a wrong place soon gets to the right
/// ones: most ways that start some bytes before come by.
fn is_instruction(bytes: &[u8], at: usize) -> bool {
    let (come_by, all) = ways(bytes, at);
    come_by * 2 > all || all == 0
}

/// Could there be one? No: nobody comes by, wherever he starts.
fn may_be_instruction(bytes: &[u8], at: usize) -> bool {
    let (come_by, all) = ways(bytes, at);
    come_by > 0 || all < 24
}

/// How many of the ways that start some bytes before `at`, one at each byte, come by, and how many there are. Those that start close by
/// are not counted, as they may not be right yet.
fn ways(bytes: &[u8], at: usize) -> (usize, usize) {
    const NEAR: usize = 24;
    let first = at.saturating_sub(BEFORE);
    let mut comes_by = [false; BEFORE];
    // From the end: what leads to a start that is known to come by does so, too.
    for start in (first..at).rev() {
        let mut decoder = iced_x86::Decoder::new(64, &bytes[start..], iced_x86::DecoderOptions::NONE);
        let next = start + decoder.decode().len();
        comes_by[start - first] = next == at || next < at && comes_by[next - first];
    }
    let counted = (at - first).saturating_sub(NEAR).max(usize::from(at > first));
    (comes_by[..counted].iter().filter(|&&by| by).count(), counted)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Tells {
    No,
    Yes,
    /// It is CPUID.
    Cpuid,
    /// It is frequent as a part of other instructions, and does no harm if a hostile program jumps there.
    IfExecuted,
    /// The same, and programs ask for features by it.
    OfFeatures,
}

/// Does what starts with `code` (0F or CD, and what follows)? `before`: the bytes before.
fn tells(code: &[u8], before: &[u8]) -> Tells {
    let (Some(&second), third) = (code.get(1), code.get(2).copied()) else { return Tells::No };
    if code[0] == 0xcd {
        // INT 4, which the host's kernel tells of as of a fault, but when it is done.
        return if second == 4 { Tells::IfExecuted } else { Tells::No };
    }
    let register = |byte: u8| byte >= 0xc0;
    let extension = |byte: u8| byte >> 3 & 7;
    let yes = match (second, third) {
        (0xa2, _) => return Tells::Cpuid,
        // SYSENTER, after which it is not known where it was.
        (0x34, _) => return Tells::IfExecuted,
        // RDTSCP, which guests are not shown.
        (0x01, Some(0xf9)) => return Tells::IfExecuted,
        // SLDT, STR, VERR, VERW, LAR, LSL (which tells the number of the CPU), and SGDT, SIDT, SMSW: of the host's tables and registers, or made up by
        // its kernel.
        (0x00, Some(third)) if matches!(extension(third), 0 | 1 | 4 | 5) => return Tells::IfExecuted,
        (0x02 | 0x03, _) => return Tells::IfExecuted,
        (0x01, Some(third)) if extension(third) == 4 || !register(third) && extension(third) < 2 => {
            return Tells::IfExecuted;
        }
        // XGETBV. As others here, it is also what `shl eax, 15` and an addition look like.
        (0x01, Some(0xd0)) => return Tells::OfFeatures,
        // MONITORX, MWAITX, RDPRU; hypercalls; RDPKRU, WRPKRU.
        (0x01, Some(0xfa | 0xfb | 0xfd | 0xee | 0xef | 0xc1 | 0xd9)) => return Tells::IfExecuted,
        // XSAVE and XSAVEOPT: what they write would be as large as the host makes it. Behind 66 the last is CLWB. (XRSTOR reads what one of them has written
        // for the guest; XSAVEC guests are not shown.)
        (0xae, Some(third)) => {
            let operand_size = match before {
                [.., 0x66] => true,
                [.., 0x66, rex] => rex & 0xf0 == 0x40,
                _ => false,
            };
            !register(third)
                && match extension(third) {
                    4 => true,
                    6 => !operand_size,
                    _ => false,
                }
        }
        // RDPID.
        (0xc7, Some(third)) if register(third) => {
            let rep = match before {
                [.., 0xf3] => true,
                [.., 0xf3, rex] => rex & 0xf0 == 0x40,
                _ => false,
            };
            extension(third) == 7 && rep
        }
        _ => false,
    };
    if yes { Tells::Yes } else { Tells::No }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tells_of_host(page: &[u8; 4096], before: &[u8], after: &[u8]) -> bool {
        !find(page, before, after, false).is_empty()
    }

    #[test]
    fn places_are_those_of_instructions() {
        let code =
            [0xb9, 0x7b, 0, 0, 0, 0x0f, 0x03, 0xc1, 0x48, 0x0f, 0xae, 0x64, 0x24, 0x40, 0xf3, 0x41, 0x0f, 0xc7, 0xf8];
        assert_eq!(find(&page(100, &code), &[], &[], false), [105, 108, 109, 114, 116]);
        assert_eq!(find(&page(0, &[0x24, 0x24]), &[0x90, 0x0f, 0xae], &[], false), [-2]);
        // mov [rsp + 0x278], rdx; xsave [rsp + 0x40]: what is before is no prefix.
        let code = [0x48, 0x89, 0x94, 0x24, 0x78, 0x02, 0, 0, 0x0f, 0xae, 0x64, 0x24, 0x40];
        assert_eq!(find(&page(100, &code), &[], &[], false), [108]);
    }

    fn page(at: usize, bytes: &[u8]) -> [u8; 4096] {
        let mut page = [0x90; 4096];
        page[at..at + bytes.len()].copy_from_slice(bytes);
        page
    }

    #[test]
    fn what_tells_is_found() {
        for bytes in [
            &[0x0f, 0xa2][..],               // cpuid
            &[0xcd, 0x04],                   // int 4
            &[0x0f, 0x34],                   // sysenter
            &[0x0f, 0x01, 0xd0],             // xgetbv
            &[0x0f, 0x01, 0xd9],             // vmmcall
            &[0x0f, 0x03, 0xc0],             // lsl eax, eax
            &[0x0f, 0x02, 0x00],             // lar eax, [rax]
            &[0x0f, 0x01, 0x08],             // sidt [rax]
            &[0x0f, 0x01, 0xe0],             // smsw eax
            &[0x0f, 0x00, 0xc8],             // str eax
            &[0x0f, 0xae, 0x24, 0x24],       // xsave [rsp]
            &[0x0f, 0xae, 0x74, 0x24, 0x40], // xsaveopt [rsp + 64]
            &[0xf3, 0x0f, 0xc7, 0xf8],       // rdpid rax
            &[0xf3, 0x41, 0x0f, 0xc7, 0xf8], // rdpid r8
        ] {
            for at in [0, 100, 4096 - bytes.len()] {
                let found = tells_of_host(&page(at, bytes), &[], &[]);
                assert_eq!(found, bytes != [0x0f, 0xa2] || !catches_cpuid(), "{bytes:x?} at {at}");
            }
        }
        // In two pages: either of them tells.
        let (end, start) = (page(4094, &[0x0f, 0xae]), page(0, &[0x24, 0x24]));
        assert!(tells_of_host(&end, &[], &start[..BEYOND]) && tells_of_host(&start, &end[4096 - BEYOND..], &[]));
        assert!(
            !tells_of_host(&end, &[], &[0xe8]) && !tells_of_host(&end, &[], &[]) && !tells_of_host(&start, &[], &[])
        );
    }

    /// `mov edi, 0x20f3530` and a call, as in programs at fixed addresses; LSL for comparison.
    #[test]
    fn parts_of_instructions_are_told_from_instructions() {
        let calls = [0xbf, 0x30, 0x35, 0x0f, 0x02, 0xe8, 0xb1, 0xf1, 0xff, 0xff].repeat(20);
        assert!(!tells_of_host(&page(100, &calls), &[], &[]));
        assert!(!tells_of_host(&page(0, &calls), &[], &[]));
        assert!(tells_of_host(&page(100, &[0xb9, 0x7b, 0, 0, 0, 0x0f, 0x03, 0xc1]), &[], &[]));
        // CPUID in a number is none, one behind the other is.
        let numbers = [0x48, 0x8d, 0x05, 0x0f, 0xa2, 0x00, 0x00, 0xe8, 0x10, 0x0f, 0xa2, 0x00, 0x90, 0xc3].repeat(20);
        assert!(!tells_of_host(&page(100, &numbers), &[], &[]));
        let mut some = numbers;
        some.extend([0x31, 0xc0, 0x0f, 0xa2]);
        assert_eq!(find(&page(100, &some), &[], &[], false).is_empty(), catches_cpuid());
    }

    /// Where a program writes code: what it asks for features by, not what data look like.
    #[test]
    fn written_pages() {
        for (bytes, found) in [
            (&[0x0f, 0xa2][..], !catches_cpuid()),
            (&[0x0f, 0x01, 0xd0], true),
            (&[0x0f, 0xae, 0x24, 0x24], true),
            (&[0x0f, 0x01, 0x08], false),
            (&[0x0f, 0x03, 0xc0], false),
            // A part of `shl eax, 15; mov [...], ...`.
            (&[0xc1, 0xe0, 0x0f, 0xa2, 0, 0, 0, 0, 0, 0, 0, 0], false),
        ] {
            assert_eq!(!find(&page(100, bytes), &[], &[], true).is_empty(), found, "{bytes:x?}");
        }
    }

    #[test]
    fn what_does_not_tell_is_left_alone() {
        for bytes in [
            &[0x0f, 0x05][..],               // syscall
            &[0x0f, 0x31],                   // rdtsc
            &[0x0f, 0xae, 0xe8],             // lfence
            &[0x0f, 0xae, 0x5c, 0x24, 0x04], // stmxcsr
            &[0xf3, 0x0f, 0xae, 0xc0],       // rdfsbase
            &[0x0f, 0xc7, 0x0f],             // cmpxchg8b
            &[0x0f, 0xae, 0x6c, 0x24, 0x40], // xrstor [rsp + 64]
            &[0x0f, 0xc7, 0x64, 0x24, 0x40], // xsavec [rsp + 64]
            &[0x66, 0x0f, 0xae, 0x37],       // clwb
            &[0x66, 0x41, 0x0f, 0xae, 0x37], // clwb [r15]
            &[0xc1, 0xe0, 0x0f, 0x01, 0xd0], // shl eax, 15; add eax, edx
            &[0x0f, 0xc7, 0xf8],             // rdseed
            &[0x0f, 0xb6, 0xc0],             // movzx
            &[0xb8, 0x0f, 0, 0, 0],          // mov eax, 15
        ] {
            assert!(!tells_of_host(&page(100, bytes), &[], &[]), "{bytes:x?}");
        }
        assert!(!tells_of_host(&[0; 4096], &[], &[]));
    }
}
