//! Short code first, fast code where it is hot: the change must not be seen.

use iced_x86::code_asm::*;

use crate::guest::{CODE, DATA, Guest, Kind, STOP, USER_CODE, USER_DATA};

fn counter(guest: &Guest, name: &str) -> u64 {
    guest.vcpu.counters().iter().find(|(counter, _)| counter == name).unwrap().1
}

/// Stops after each round, and goes on until `done`; some seconds at most.
fn rounds(guest: &mut Guest, mut check: impl FnMut(&Guest, u64), done: impl Fn(&Guest) -> bool) {
    for round in 1..20_000 {
        guest.stop();
        check(guest, round);
        if done(guest) {
            return;
        }
    }
    panic!("nothing was found hot");
}

/// A function with calls, a loop, grouped accesses, flags across calls; its results are checked in every round, before and after its blocks have become fast.
#[test]
fn hot_blocks_become_fast() {
    for user in [false, true] {
        let mut guest = Guest::new(Kind::Bt);
        let (code, data) = if user { (USER_CODE, USER_DATA) } else { (CODE, DATA) };
        let stop = CODE + 0x8000;
        guest.code(stop, |a| {
            a.out(STOP, al)?;
            a.iretq()
        });
        guest.gate(0x80, stop, 0xee);
        guest.code(code, |a| {
            let (mut round, mut top, mut leaf) = (a.create_label(), a.create_label(), a.create_label());
            a.set_label(&mut round)?;
            a.mov(r12d, 20_000)?;
            a.xor(ebp, ebp)?;
            a.set_label(&mut top)?;
            a.stc()?;
            a.call(leaf)?;
            a.adc(rbp, 0)?;
            a.mov(rax, qword_ptr(rbx))?;
            a.add(rax, qword_ptr(rbx + 8))?;
            a.add(qword_ptr(rbx + 16), rax)?;
            a.dec(r12d)?;
            a.jne(top)?;
            a.int(0x80)?;
            a.jmp(round)?;
            a.set_label(&mut leaf)?;
            a.push(rdi)?;
            a.lea(rdi, ptr(rbx + 8))?;
            a.mov(rsi, qword_ptr(rdi))?;
            a.pop(rdi)?;
            a.ret()
        });
        assert!(guest.ram.write(data, &[5_u64, 7, 0].map(u64::to_le_bytes).concat()));
        if user {
            guest.enter_user(code);
        }
        guest.set(|state| state.gpr[3] = data);
        rounds(
            &mut guest,
            |guest, round| {
                let mut sum = [0; 8];
                assert!(guest.ram.read(data + 16, &mut sum));
                assert_eq!(u64::from_le_bytes(sum), round * 20_000 * 12, "round {round}");
            },
            |guest| counter(guest, "blocks.promoted") >= 2,
        );
        // Once more, by fast code alone; CF has come through each call.
        let state = guest.stop();
        assert_eq!(state.gpr[5], 20_000);
    }
}

/// Code that has become fast is written, and written back.
#[test]
fn fast_code_is_written() {
    let mut guest = Guest::new(Kind::Bt);
    guest.code(CODE, |a| {
        let (mut round, mut top) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.mov(ecx, 20_000)?;
        a.xor(edx, edx)?;
        a.set_label(&mut top)?;
        a.call(CODE + 0x4000)?;
        a.add(edx, eax)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(STOP, al)?;
        a.jmp(round)
    });
    guest.code(CODE + 0x4000, |a| {
        a.mov(eax, 1)?;
        a.ret()
    });
    rounds(&mut guest, |_, _| {}, |guest| counter(guest, "blocks.promoted") >= 2);
    for value in [2_u8, 3, 1] {
        assert!(guest.ram.write(CODE + 0x4001, &[value]));
        // The first stop may lie inside a round.
        guest.stop();
        assert_eq!(guest.stop().gpr[2], 20_000 * u64::from(value));
    }
}

/// Accesses that go to another page each time: predictions fail, the block is translated once more, and then its accesses search. Some go across the
/// end of a page.
#[test]
fn unpredictable_accesses_search() {
    let mut guest = Guest::new(Kind::Bt);
    const PAGES: u64 = 256;
    guest.code(CODE, |a| {
        let (mut round, mut top) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.mov(ecx, 20_000)?;
        a.xor(edx, edx)?;
        a.set_label(&mut top)?;
        // The next place: one of 256 pages, at an offset that walks over the page's end.
        a.imul_3(esi, esi, 0x0101_0105)?;
        a.add(esi, 0x3333)?;
        a.mov(edi, esi)?;
        a.shr(edi, 4)?;
        a.and(edi, (PAGES as i32 - 1) << 12 | 0xfff)?;
        a.mov(rax, qword_ptr(rbx + rdi))?;
        a.lea(r12, ptr(rbx + rdi))?;
        a.inc(qword_ptr(r12))?;
        a.inc(qword_ptr(r12 + 24))?;
        a.add(rdx, qword_ptr(r12 + 24))?;
        a.sub(qword_ptr(r12 + 24), 1)?;
        a.dec(qword_ptr(rbx + rdi))?;
        a.cmp(rax, qword_ptr(rbx + rdi))?;
        a.jne(CODE + 0x800)?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(STOP, al)?;
        a.jmp(round)
    });
    guest.code(CODE + 0x800, |a| a.ud2());
    guest.set(|state| {
        state.gpr[3] = DATA;
        state.gpr[6] = 1;
    });
    rounds(
        &mut guest,
        |_, _| {},
        |guest| counter(guest, "sites.unpredictable") >= 4 && counter(guest, "blocks.promoted") >= 2,
    );
    // All searches now: nothing is found to be unpredictable any more.
    let known = counter(&guest, "sites.unpredictable");
    for _ in 0..50 {
        guest.stop();
    }
    assert!(counter(&guest, "sites.unpredictable") <= known + 2);
}

/// Without tiers, nothing is translated twice.
#[test]
fn the_switch() {
    let mut guest = Guest::new(Kind::Fast);
    guest.code(CODE, |a| {
        let mut top = a.create_label();
        a.mov(ecx, 30_000_000)?;
        a.set_label(&mut top)?;
        a.add(rax, qword_ptr(rbx))?;
        a.dec(ecx)?;
        a.jne(top)?;
        a.out(STOP, al)
    });
    guest.set(|state| state.gpr[3] = DATA);
    guest.stop();
    assert_eq!(counter(&guest, "blocks.promoted"), 0);
}
