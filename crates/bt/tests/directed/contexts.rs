//! Process-context identifiers (PCIDs): what may be kept over writes to CR3, and what must not (SDM volume 3, 4.10).

use cpu::{cr4, vector};
use iced_x86::code_asm::*;

use crate::guest::{Built, CODE, CR3, CR3_B, DATA, Guest, Kind, PRESENT, STOP, TABLES, USER, USER_CODE, WRITE, each};

const ALL: u64 = PRESENT | WRITE | USER;
const KEEP: u64 = 1 << 63;
/// Two address spaces with a PCID each.
const FIRST: u64 = CR3 | 1;
const SECOND: u64 = CR3_B | 2;
/// A page that differs between them, for code and data, and a stack.
const PAGE: u64 = DATA + 0x1_0000;
const ONE: u64 = DATA + 0x2_0000;
const TWO: u64 = DATA + 0x3_0000;
const THREE: u64 = DATA + 0x4_0000;
const STACK_PAGE: u64 = DATA + 0x5_0000;
/// Handles `int 0x80`: writes RDX to CR3.
const SWITCH: u64 = CODE + 0x1000;
const ROUNDS: u64 = 200;

/// Guest-physical address of the first space's page-table entry of [`PAGE`].
const ENTRY: u64 = TABLES + 0x2000 + ((PAGE - DATA) >> 12) * 8;

/// A guest in 64-bit mode with PCIDs, or none if the model has none.
fn guest(kind: Kind) -> Option<Guest> {
    let mut guest = Guest::new(kind);
    if std::arch::x86_64::__cpuid(1).ecx & 1 << 17 == 0 {
        return None;
    }
    guest.set(|state| state.cr4 |= cr4::PCIDE);
    for (page, value) in [(ONE, 1_u32), (TWO, 2), (THREE, 3)] {
        guest.code(page + 0x80, |a| {
            a.mov(eax, value)?;
            a.ret()
        });
        guest.put(page + 0x100, &[u64::from(value) << 8]);
    }
    for (page, gpa) in [(PAGE, ONE), (STACK_PAGE, STACK_PAGE)] {
        guest.map(page, gpa | ALL);
    }
    for (page, gpa) in [(PAGE, TWO), (STACK_PAGE, STACK_PAGE)] {
        guest.map_b(page, gpa | ALL);
    }
    // Where the kernel changes the tables: they lie in the first 2 MiB, which are the same in both.
    guest.code(SWITCH, |a| {
        a.mov(cr3, rdx)?;
        a.iretq()
    });
    guest.gate(0x80, SWITCH, 0xee);
    Some(guest)
}

/// A program that calls and reads what differs, and asks for the other space, `ROUNDS` times each; R13 and R14 hold the values to write.
fn program(guest: &Guest) {
    guest.code(USER_CODE, |a| {
        let mut again = a.create_label();
        a.mov(r12d, ROUNDS as u32)?;
        a.set_label(&mut again)?;
        for (cr3_value, sum) in [(r14, r8), (r13, r9)] {
            a.call(PAGE + 0x80)?;
            a.add(rax, qword_ptr(rbx + 0x100))?;
            a.inc(qword_ptr(rbx + 0x108))?;
            a.call(rbp)?;
            a.add(sum, rax)?;
            a.mov(rax, qword_ptr(rbx + 0x100))?;
            a.add(sum, rax)?;
            a.mov(rdx, cr3_value)?;
            a.int(0x80)?;
        }
        a.dec(r12d)?;
        a.jne(again)?;
        a.int3()
    });
}

fn start(guest: &mut Guest, first: u64, second: u64) {
    guest.enter_user(USER_CODE);
    guest.set(|state| {
        state.cr3 = FIRST;
        state.gpr[3] = PAGE;
        state.gpr[4] = STACK_PAGE + 0x800;
        state.gpr[5] = PAGE + 0x80;
        state.gpr[13] = first;
        state.gpr[14] = second;
        state.gpr[8] = 0;
        state.gpr[9] = 0;
    });
}

/// Lets the kernel do `work` before it goes to the space whose value is in `to`.
fn before_switch(guest: &Guest, to: AsmRegister64, work: impl FnOnce(&mut CodeAssembler) -> Built) {
    guest.code(SWITCH, |a| {
        let mut elsewhere = a.create_label();
        a.cmp(rdx, to)?;
        a.jne(elsewhere)?;
        work(a)?;
        a.set_label(&mut elsewhere)?;
        a.mov(cr3, rdx)?;
        a.iretq()
    });
}

/// Each space has its own code and data, kept or not.
#[test]
fn two_spaces() {
    each(|kind| {
        for keep in [0, KEEP] {
            let Some(mut guest) = guest(kind) else { return };
            program(&guest);
            start(&mut guest, FIRST | keep, SECOND | keep);
            let trap = guest.trap();
            assert_eq!(trap.vector, vector::BP, "{trap:x?}");
            assert_eq!(trap.state.cr3, FIRST, "bit 63 is not kept");
            assert_eq!((trap.state.gpr[8], trap.state.gpr[9]), (ROUNDS * 0x101, ROUNDS * 0x202), "{kind:?}");
            assert_eq!((guest.word(ONE + 0x108), guest.word(TWO + 0x108)), (ROUNDS, ROUNDS));
        }
    });
}

/// A change of the tables while the space is away: a write to CR3 that does not keep must forget the old.
#[test]
fn changed_while_away() {
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        program(&guest);
        // In the second space, the kernel changes the first one's page: 1 and 3 in turns.
        before_switch(&guest, r13, |a| a.xor(qword_ptr(ENTRY), (ONE ^ THREE) as i32));
        start(&mut guest, FIRST, SECOND | KEEP);
        let trap = guest.trap();
        assert_eq!(trap.state.gpr[8], ROUNDS / 2 * (0x101 + 0x303), "{kind:?}");
        assert_eq!(trap.state.gpr[9], ROUNDS * 0x202, "{kind:?}");
    });
}

/// INVLPG in a space, then away and back, kept: it stays forgotten.
#[test]
fn invalidated_page() {
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        program(&guest);
        before_switch(&guest, r14, |a| {
            a.xor(qword_ptr(ENTRY), (ONE ^ THREE) as i32)?;
            a.invlpg(ptr(rbx))
        });
        start(&mut guest, FIRST | KEEP, SECOND | KEEP);
        let trap = guest.trap();
        assert_eq!(trap.state.gpr[8], ROUNDS / 2 * (0x101 + 0x303), "{kind:?}");
        assert_eq!(trap.state.gpr[9], ROUNDS * 0x202, "{kind:?}");
    });
}

/// Code that is written, and pages that become code, while the space that uses them is away.
#[test]
fn written_while_away() {
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        program(&guest);
        // The kernel writes the first space's function through another mapping: a bigger immediate each time.
        guest.map_b(DATA + 0x8_0000, ONE | PRESENT | WRITE);
        before_switch(&guest, r13, |a| a.inc(dword_ptr(DATA + 0x8_0000 + 0x81)));
        start(&mut guest, FIRST | KEEP, SECOND | KEEP);
        let trap = guest.trap();
        let sum: u64 = (0..ROUNDS).map(|i| 1 + i + 0x100).sum();
        assert_eq!((trap.state.gpr[8], trap.state.gpr[9]), (sum, ROUNDS * 0x202), "{kind:?}");

        // Data of the first space that is code of the second.
        let Some(mut guest) = self::guest(kind) else { return };
        guest.map(PAGE, TWO | ALL);
        guest.code(TWO + 0x80, |a| {
            a.mov(eax, 0)?;
            a.ret()
        });
        guest.code(USER_CODE, |a| {
            let mut again = a.create_label();
            a.mov(r12d, ROUNDS as u32)?;
            a.set_label(&mut again)?;
            a.inc(dword_ptr(rbx + 0x81))?;
            a.mov(rdx, r14)?;
            a.int(0x80)?;
            a.call(rbp)?;
            a.add(r8, rax)?;
            a.mov(rdx, r13)?;
            a.int(0x80)?;
            a.dec(r12d)?;
            a.jne(again)?;
            a.int3()
        });
        start(&mut guest, FIRST | KEEP, SECOND | KEEP);
        assert_eq!(guest.trap().state.gpr[8], (1..=ROUNDS).sum::<u64>(), "{kind:?}");
    });
}

/// A change of a paging bit of CR4 forgets all spaces.
#[test]
fn everything() {
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        program(&guest);
        before_switch(&guest, r13, |a| {
            a.xor(qword_ptr(ENTRY), (ONE ^ THREE) as i32)?;
            a.mov(rax, cr4)?;
            a.xor(rax, cr4::PGE as i32)?;
            a.mov(cr4, rax)?;
            a.xor(rax, cr4::PGE as i32)?;
            a.mov(cr4, rax)
        });
        start(&mut guest, FIRST | KEEP, SECOND | KEEP);
        let trap = guest.trap();
        assert_eq!(trap.state.gpr[8], ROUNDS / 2 * (0x101 + 0x303), "{kind:?}");
    });
}

/// More spaces than are kept, each with a page of its own.
#[test]
fn many_spaces() {
    const SPACES: u64 = 12;
    const OWN: u64 = DATA + 0x10_0000;
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        // Tables of their own: the upper ones, and the last.
        let root = |i: u64| DATA + 0x11_0000 + i * 0x3000;
        for i in 0..SPACES {
            let (top, directory, last) = (root(i), root(i) + 0x1000, root(i) + 0x2000);
            let pointers = DATA + 0x18_0000 + i * 0x1000;
            guest.put(top, &[pointers | ALL]);
            guest.put(pointers, &[directory | ALL, 3 << 30 | 0x83]);
            guest.put(directory, &[TABLES | ALL, (TABLES + 0x1000) | ALL, last | ALL]);
            for page in 0..512 {
                guest.put(last + page * 8, &[(DATA + page * 4096) | PRESENT | WRITE]);
            }
            guest.put(last + ((PAGE - DATA) >> 12) * 8, &[(OWN + i * 0x1000) | ALL]);
            guest.put(last + ((STACK_PAGE - DATA) >> 12) * 8, &[STACK_PAGE | ALL]);
            guest.code(OWN + i * 0x1000 + 0x80, |a| {
                a.mov(eax, i as u32 + 1)?;
                a.ret()
            });
        }
        guest.put(DATA, &(0..SPACES).map(|i| root(i) | (i + 1) | KEEP).collect::<Vec<_>>());
        guest.map(DATA, DATA | ALL);
        guest.code(USER_CODE, |a| {
            let mut again = a.create_label();
            a.xor(r12d, r12d)?;
            a.set_label(&mut again)?;
            a.call(PAGE + 0x80)?;
            // A hash that tells the order.
            a.imul_3(r8, r8, 31)?;
            a.add(r8, rax)?;
            a.int(0x81)?;
            a.cmp(r12d, (SPACES * 20) as i32)?;
            a.jne(again)?;
            a.int3()
        });
        // To the next space: from the list, by a count in R12.
        guest.gate(0x81, CODE + 0x1800, 0xee);
        guest.code(CODE + 0x1800, |a| {
            a.inc(r12d)?;
            a.mov(eax, r12d)?;
            a.xor(edx, edx)?;
            a.mov(ecx, SPACES as u32)?;
            a.div(ecx)?;
            a.mov(rax, qword_ptr(rdx * 8 + DATA))?;
            a.mov(cr3, rax)?;
            a.iretq()
        });
        start(&mut guest, 0, 0);
        guest.set(|state| state.cr3 = root(0) | 1);
        let trap = guest.trap();
        let expected = (0..SPACES * 20).fold(0_u64, |sum, i| sum.wrapping_mul(31).wrapping_add(i % SPACES + 1));
        assert_eq!(trap.state.gpr[8], expected, "{kind:?}");
    });
}

/// The rules for the bits.
#[test]
fn rules() {
    each(|kind| {
        let Some(mut guest) = guest(kind) else { return };
        // PCIDE cannot be set while CR3 has a PCID; bit 63 is reserved without it.
        for (pcide, cr3_before, code, faults) in [
            (false, FIRST, 0, true),
            (false, CR3, 0, false),
            (false, CR3, 1, true),
            (true, CR3, 1, false),
            (true, FIRST, 2, false),
        ] {
            guest.reset();
            guest.code(CODE, |a| {
                match code {
                    0 => {
                        a.mov(rax, cr4)?;
                        a.or(rax, cr4::PCIDE as i32)?;
                        a.mov(cr4, rax)?;
                    }
                    1 => {
                        a.mov(rax, CR3 | KEEP)?;
                        a.mov(cr3, rax)?;
                    }
                    _ => {
                        a.mov(rax, cr4)?;
                        a.and(rax, !(cr4::PCIDE as i32))?;
                        a.mov(cr4, rax)?;
                    }
                }
                a.out(STOP, al)
            });
            guest.set(|state| {
                state.cr3 = cr3_before;
                if pcide {
                    state.cr4 |= cr4::PCIDE;
                }
            });
            let trap = guest.trap_or_stop();
            assert_eq!(trap.map(|t| t.vector), faults.then_some(vector::GP), "{pcide} {cr3_before:#x} {code} {kind:?}");
        }
    });
}
