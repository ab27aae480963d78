//! Random user-level instructions under the translator and on the real CPU: registers, flags, memory and faults must agree.
//! One case in ten runs under the interpreter alone instead.
//!
//! A *case* is a random program of 1 to about 30 instructions (see [`generate`]) and some random start states, all known by one
//! seed. It runs at the same linear addresses in a guest ([`guest`]) and in this process ([`native`]); [`state`] compares. A case
//! that differs is reduced ([`case`]) and shown as disassembly with the start state and the differences.
//!
//! * `cargo test --release -p bt --test random`: the short form.
//! * `cargo test --release -p bt --test random -- --ignored --nocapture`: the long form, 10^8 instructions.
//! * `BT_RANDOM_COUNT=n`: that many instructions instead, in either.
//! * `BT_RANDOM_SEED=n`: another series (the default of the short form is fixed, of the long form the time).
//! * `BT_RANDOM_CASE=0x…`: only this case, as printed with a failure.
//! * `BT_RANDOM_FAILURES=n`: go on until so many cases have failed (default 1).

#![allow(missing_docs)]

mod case;
mod generate;
mod guest;
mod layout;
mod native;
mod program;
mod rng;
mod state;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use bt::{BtEngine, Options};
use cpu::cpuid::CpuidModel;

use crate::case::Bench;
use crate::guest::Guest;
use crate::rng::mix;

/// The native side exists once in a process.
static ONE: Mutex<()> = Mutex::new(());

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let value = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    Some(value.unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// `tiers`: short code; else fast code at once. No program here runs long enough to be found hot.
fn translator(name: &str, precise_flags: bool, tiers: bool) -> Guest {
    Guest::new(name, precise_flags, |ram| {
        let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
        options.code_cache = 16 << 20;
        options.precise_flags = precise_flags;
        options.tiers = tiers;
        Box::new(BtEngine::new(ram, options).unwrap())
    })
}

/// Programs run directly; the translator is for the kernel.
fn direct() -> Guest {
    let mut options = Options::new(Arc::new(CpuidModel::new(1, 1_000_000)));
    options.code_cache = 16 << 20;
    options.precise_flags = true;
    options.direct_at_once = true;
    let ram = memory::GuestRam::shareable(64 << 20).unwrap();
    Guest::with_ram("direct", true, ram, |ram| Box::new(BtEngine::new(ram, options).unwrap()))
}

fn run(count: u64, seed: u64) {
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let count = variable("BT_RANDOM_COUNT").unwrap_or(count);
    let seed = variable("BT_RANDOM_SEED").unwrap_or(seed);
    let failures = variable("BT_RANDOM_FAILURES").unwrap_or(1).max(1);
    let interpreter = Guest::new("interp", true, |ram| Box::new(interp::InterpEngine::new(ram, 1)));
    let guests = vec![
        translator("bt, short", false, true),
        translator("bt, fast", false, false),
        translator("bt, short, with precise flags", true, true),
        translator("bt, fast, with precise flags", true, false),
        direct(),
        interpreter,
    ];
    let mut bench = Bench::new(guests);
    println!("{} instruction forms, seed {seed}", bench.generator.forms());
    let mut failed = Vec::new();
    if let Some(case) = variable("BT_RANDOM_CASE") {
        failed.extend(bench.case(case).err());
    } else {
        let begin = Instant::now();
        let mut number = 0;
        while bench.counts.executed[..4].iter().sum::<u64>() < count && failed.len() < failures as usize {
            if let Err(text) = bench.case(mix(seed.wrapping_add(number << 20))) {
                eprintln!("{text}");
                failed.push(text);
            }
            number += 1;
        }
        let c = &bench.counts;
        println!(
            "{} cases, {} runs, at least {} instructions translated and {} run directly and {} interpreted in {:.1} s; {} useless, {} incomparable; faults: {}",
            c.cases,
            c.runs,
            c.executed[..4].iter().sum::<u64>(),
            c.executed[4],
            c.executed[5],
            begin.elapsed().as_secs_f64(),
            c.useless,
            c.incomparable,
            c.faults
                .iter()
                .enumerate()
                .filter(|f| *f.1 > 0)
                .map(|(v, n)| format!("#{v} {n}"))
                .collect::<Vec<_>>()
                .join(", ")
        );
        for guest in &bench.guests {
            println!("{}: {:?}", guest.name, guest.counters());
        }
    }
    assert!(failed.is_empty(), "{} case(s) differ; the first:\n{}", failed.len(), failed[0]);
}

#[test]
fn agrees_with_the_cpu() {
    run(if cfg!(debug_assertions) { 300_000 } else { 6_000_000 }, 1);
}

#[test]
#[ignore = "long: 10^8 instructions"]
fn agrees_with_the_cpu_for_long() {
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    run(100_000_000, seed);
}
