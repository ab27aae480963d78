//! What parts of the engine cost. `cargo test --release -p bt --test directed -- --ignored --nocapture measures`

use std::time::{Duration, Instant};

use iced_x86::code_asm::*;

use crate::guest::{CODE, CR3, DATA, Guest, Kind, PRESENT, STOP, WRITE};

/// Loads, one from each of `pages` pages, as often as make `loads` in all.
fn walk(pages: u64, loads: u64) -> (Duration, u64) {
    const AT: u64 = 0x2000_0000;
    const TABLES: u64 = 0x60_0000;
    let mut guest = Guest::new(Kind::Bt);
    for table in 0..16 {
        guest.put(CR3 + 0x2000 + (AT / 0x20_0000 + table) * 8, &[(TABLES + table * 0x1000) | PRESENT | WRITE]);
        for page in 0..512 {
            let gpa = 0x80_0000 + ((table * 512 + page) << 12);
            guest.put(TABLES + table * 0x1000 + page * 8, &[gpa | PRESENT | WRITE]);
        }
    }
    guest.code(CODE, |a| {
        let (mut round, mut next) = (a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.mov(edi, AT as u32)?;
        a.mov(ecx, pages as u32)?;
        a.set_label(&mut next)?;
        a.add(rax, qword_ptr(rdi))?;
        // Another line of each page, so that they do not want the same place in the cache.
        a.add(rdi, 4096 + 64)?;
        a.mov(edx, edi)?;
        a.and(edx, 0xfff)?;
        a.cmp(edx, 0xfc0)?;
        let mut near = a.create_label();
        a.jne(near)?;
        a.sub(rdi, 0xfc0)?;
        a.set_label(&mut near)?;
        a.dec(ecx)?;
        a.jne(next)?;
        a.dec(dword_ptr(DATA))?;
        a.jne(round)?;
        a.out(STOP, al)
    });
    // Once, for all that is done for the first time.
    let state = guest.vcpu.state();
    guest.put(DATA, &[1]);
    guest.stop();
    let rounds = loads / pages;
    guest.put(DATA, &[rounds]);
    guest.vcpu.set_state(&state);
    let misses = |guest: &Guest| guest.vcpu.counters().iter().find(|(name, _)| name == "tlb.misses").unwrap().1;
    let (before, start) = (misses(&guest), Instant::now());
    guest.stop();
    (start.elapsed(), misses(&guest) - before)
}

/// A miss of the software TLB, against a hit: at most 25 ns.
#[test]
#[ignore = "a measurement"]
fn refill() {
    const LOADS: u64 = 8 << 20;
    for _ in 0..5 {
        let (hits, none) = walk(2048, LOADS);
        let (all, misses) = walk(8000, LOADS);
        println!(
            "{misses} misses ({none} without): {:.1} ns each; {:.1} ns for a load that hits",
            all.saturating_sub(hits).as_nanos() as f64 / (misses - none) as f64,
            hits.as_nanos() as f64 / LOADS as f64
        );
    }
}
