//! Programs' code that runs at several addresses: its translations are shared.

use cpu::{Exit, vector};
use iced_x86::code_asm::*;
use iced_x86::{Code, Instruction, MemoryOperand, Register};

use crate::guest::{CODE, CR3, CR3_B, DATA, GLOBAL, Guest, Kind, PRESENT, STOP, USER, USER_CODE, WRITE, each};

const ALL: u64 = PRESENT | WRITE | USER;
/// The two addresses at which the library runs: a page of code, a second one, a page of data.
const A: u64 = USER_CODE + 0x1_0000;
const B: u64 = USER_CODE + 0x2_3000;
/// Guest-physical addresses: the library's code, and for each place its own second page and data.
const LIBRARY: u64 = USER_CODE + 0x6000;
const SECOND: [u64; 2] = [USER_CODE + 0x7000, USER_CODE + 0x8000];
const OWN: [u64; 2] = [USER_CODE + 0x9000, USER_CODE + 0xa000];
/// Entries of the library.
const WORK: u64 = 0x40;
const LEAF: u64 = 0x200;
const CALLBACK: u64 = 0x300;
const LOAD: u64 = 0x400;
/// In the second page.
const OTHER: u64 = 0x1080;
const DATA_AT: u64 = 0x2010;

/// An operand of the library, relative to RIP.
fn own(offset: u64) -> MemoryOperand {
    MemoryOperand::with_base_displ(Register::RIP, (LIBRARY + offset) as i64)
}

/// A guest with the library mapped at [`A`] and [`B`]; `flags` go into the entries of its code.
fn guest(kind: Kind, flags: u64) -> Guest {
    let guest = Guest::new(kind);
    // Assembled where it lies, in one piece: everything in it is relative.
    guest.code(LIBRARY + WORK, |a| {
        a.add_instruction(Instruction::with2(Code::Lea_r64_m, Register::RAX, own(0x123))?)?;
        a.add_instruction(Instruction::with2(Code::Add_r64_rm64, Register::RAX, own(DATA_AT))?)?;
        a.call(LIBRARY + LEAF)?;
        a.call(LIBRARY + OTHER)?;
        a.add_instruction(Instruction::with2(Code::Add_rm64_imm8, own(DATA_AT + 8), 1)?)?;
        a.ret()
    });
    // The return address is its caller's.
    guest.code(LIBRARY + LEAF, |a| {
        a.add(rax, qword_ptr(rsp))?;
        a.add_instruction(Instruction::with1(Code::Push_rm64, own(DATA_AT))?)?;
        a.pop(rcx)?;
        a.add(rax, rcx)?;
        a.ret()
    });
    guest.code(LIBRARY + CALLBACK, |a| {
        a.call(rdi)?;
        a.add_instruction(Instruction::with2(Code::Lea_r64_m, Register::RCX, own(CALLBACK))?)?;
        a.add(rax, rcx)?;
        a.ret()
    });
    guest.code(LIBRARY + LOAD, |a| {
        a.add_instruction(Instruction::with2(Code::Mov_r32_rm32, Register::EAX, own(0x5_0004))?)
    });
    for (second, value) in SECOND.into_iter().zip([0x1000_0000, 0x2000_0000]) {
        // A piece of its own, to be reached across the page's end.
        let bytes = {
            let mut a = CodeAssembler::new(64).unwrap();
            a.add(rax, value).unwrap();
            a.jmp(LIBRARY + LEAF).unwrap();
            a.assemble(LIBRARY + OTHER).unwrap()
        };
        assert!(guest.ram.write(second + (OTHER & 0xfff), &bytes));
    }
    for (i, base) in [A, B].into_iter().enumerate() {
        guest.map(base, LIBRARY | ALL | flags);
        guest.map(base + 0x1000, SECOND[i] | ALL | flags);
        guest.map(base + 0x2000, OWN[i] | ALL);
        guest.put(OWN[i] + (DATA_AT & 0xfff), &[0x11 << (8 * i)]);
    }
    guest
}

/// What [`WORK`] leaves in RAX, where `back` is the address of the instruction behind its first call.
fn work(i: usize, base: u64, [first, second]: [u64; 2]) -> u64 {
    let data = 0x11 << (8 * i);
    let other = [0x1000_0000, 0x2000_0000][i];
    base + 0x123 + data + (base + first + data) + other + (base + second + data)
}

/// Offsets behind the two calls of [`WORK`].
fn behind_calls(guest: &Guest) -> [u64; 2] {
    let mut bytes = [0; 0x100];
    assert!(guest.ram.read(LIBRARY + WORK, &mut bytes));
    let mut decoder = iced_x86::Decoder::with_ip(64, &bytes, WORK, 0);
    let mut calls = decoder.iter().filter(|i| i.mnemonic() == iced_x86::Mnemonic::Call).map(|i| i.next_ip());
    [calls.next().unwrap(), calls.next().unwrap()]
}

/// One program runs the library at both addresses, in turns and one from within the other.
#[test]
fn at_two_addresses_at_once() {
    const ROUNDS: u64 = 60;
    for flags in [0, GLOBAL] {
        each(|kind| {
            let mut guest = guest(kind, flags);
            let calls = behind_calls(&guest);
            guest.code(USER_CODE, |a| {
                let mut again = a.create_label();
                a.mov(r12d, ROUNDS as u32)?;
                a.set_label(&mut again)?;
                a.call(A + WORK)?;
                a.add(r13, rax)?;
                a.call(B + WORK)?;
                a.add(r14, rax)?;
                a.mov(edi, B as u32 + WORK as u32)?;
                a.call(A + CALLBACK)?;
                a.add(r15, rax)?;
                a.dec(r12d)?;
                a.jne(again)?;
                a.int3()
            });
            guest.enter_user(USER_CODE);
            let trap = guest.trap();
            assert_eq!(trap.vector, vector::BP, "{trap:x?}");
            let [at_a, at_b] = [work(0, A, calls), work(1, B, calls)];
            let gpr = trap.state.gpr;
            assert_eq!(gpr[13], ROUNDS * at_a, "{kind:?}");
            assert_eq!(gpr[14], ROUNDS * at_b, "{kind:?}");
            assert_eq!(gpr[15], ROUNDS * (at_b + A + CALLBACK), "{kind:?}");
            assert_eq!(guest.word(OWN[0] + 0x18), ROUNDS);
            assert_eq!(guest.word(OWN[1] + 0x18), 2 * ROUNDS);
        });
    }
}

/// Two address spaces run the library, each at an address of its own; jumps across pages, returns and data follow.
#[test]
fn in_two_address_spaces() {
    const ROUNDS: u64 = 60;
    // In the part of the address space that differs.
    const AT: [u64; 2] = [DATA + 0x4_0000, DATA + 0x7_0000];
    const STACK_PAGE: u64 = DATA + 0x2_0000;
    for flags in [0, GLOBAL] {
        each(|kind| {
            let mut guest = guest(kind, 0);
            let calls = behind_calls(&guest);
            let map = |space: usize, page: u64, entry: u64| {
                if space == 0 { guest.map(page, entry) } else { guest.map_b(page, entry) }
            };
            for space in 0..2 {
                map(space, AT[space], LIBRARY | ALL);
                map(space, AT[space] + 0x1000, SECOND[space] | ALL | flags);
                map(space, AT[space] + 0x2000, OWN[space] | ALL);
                map(space, STACK_PAGE, STACK_PAGE | ALL | flags);
            }
            // The program, the same in both: calls the library at RBX, then asks for the other space.
            guest.map(USER_CODE, USER_CODE | ALL | flags);
            guest.code(USER_CODE, |a| {
                let mut again = a.create_label();
                a.set_label(&mut again)?;
                a.call(rbx)?;
                a.int(0x80)?;
                a.jmp(again)
            });
            guest.gate(0x80, CODE + 0x1000, 0xee);
            guest.code(CODE + 0x1000, |a| {
                let mut done = a.create_label();
                let mut first = a.create_label();
                let mut on = a.create_label();
                a.bt(r12d, 0)?;
                a.jnc(first)?;
                a.add(r14, rax)?;
                a.jmp(on)?;
                a.set_label(&mut first)?;
                a.add(r13, rax)?;
                a.set_label(&mut on)?;
                a.inc(r12d)?;
                a.cmp(r12d, 2 * ROUNDS as i32)?;
                a.je(done)?;
                a.mov(rcx, cr3)?;
                a.xor(rcx, (CR3 ^ CR3_B) as i32)?;
                a.mov(cr3, rcx)?;
                a.xor(rbx, (AT[0] ^ AT[1]) as i32)?;
                a.iretq()?;
                a.set_label(&mut done)?;
                a.out(STOP, al)
            });
            guest.enter_user(USER_CODE);
            guest.set(|state| {
                state.gpr[3] = AT[0] + WORK;
                state.gpr[4] = STACK_PAGE + 0x800;
            });
            let state = guest.stop();
            assert_eq!(state.gpr[13], ROUNDS * work(0, AT[0], calls), "{kind:?}");
            assert_eq!(state.gpr[14], ROUNDS * work(1, AT[1], calls), "{kind:?}");
        });
    }
}

/// Faults tell the address at which the program ran the code.
#[test]
fn faults() {
    each(|kind| {
        let mut guest = guest(kind, 0);
        for base in [A, B, A] {
            guest.map(base + 0x5_0000, 0);
            guest.enter_user(base + LOAD);
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.rip), (vector::PF, base + LOAD), "{kind:?}");
            assert_eq!(trap.state.cr2, base + 0x5_0004, "{kind:?}");
        }
    });
}

/// A write drops the code at all addresses.
#[test]
fn modified() {
    each(|kind| {
        let mut guest = guest(kind, 0);
        guest.code(LIBRARY + 0x800, |a| {
            a.mov(eax, 5)?;
            a.ret()
        });
        guest.code(USER_CODE, |a| {
            let mut again = a.create_label();
            a.mov(r12d, 20)?;
            a.set_label(&mut again)?;
            a.call(A + 0x800)?;
            a.add(r13, rax)?;
            a.inc(byte_ptr(B + 0x801))?;
            a.call(B + 0x800)?;
            a.add(r14, rax)?;
            a.inc(byte_ptr(A + 0x801))?;
            a.dec(r12d)?;
            a.jne(again)?;
            a.int3()
        });
        guest.enter_user(USER_CODE);
        let state = guest.trap().state;
        assert_eq!(state.gpr[13], (0..20).map(|i| 5 + 2 * i).sum::<u64>(), "{kind:?}");
        assert_eq!(state.gpr[14], (0..20).map(|i| 6 + 2 * i).sum::<u64>(), "{kind:?}");
    });
}

/// A debugger's breakpoint is of one address.
#[test]
fn breakpoints() {
    each(|kind| {
        let mut guest = guest(kind, 0);
        guest.code(LIBRARY + 0x900, |a| {
            a.mov(eax, 1)?;
            a.inc(eax)?;
            a.inc(eax)?;
            a.int3()
        });
        let stand = LIBRARY + 0x900 + 7;
        for set in [false, true, false] {
            let breakpoints = if set { vec![stand - LIBRARY + A] } else { Vec::new() };
            guest.vcpu.set_breakpoints(&breakpoints);
            guest.enter_user(B + 0x900);
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.state.gpr[0]), (vector::BP, 3), "{kind:?}");
            guest.enter_user(A + 0x900);
            if set {
                assert_eq!(guest.run(), Exit::Debug, "{kind:?}");
                let state = guest.vcpu.state();
                assert_eq!((state.rip, state.gpr[0]), (breakpoints[0], 2), "{kind:?}");
                guest.vcpu.set_breakpoints(&[]);
            }
            let trap = guest.trap();
            assert_eq!((trap.vector, trap.state.gpr[0]), (vector::BP, 3), "{kind:?}");
        }
    });
}
