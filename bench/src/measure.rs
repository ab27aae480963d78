//! The measurement: engines take turns for several runs, and a guest that dies in one row is started again for the rest.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use crate::disk::{Disk, Scratch};
use crate::report::{Column, FORMAT, Report};
use crate::rows::{self, Row};
use crate::session::{self, Boot, Engine, Outcome, Setup, Task};

/// What to measure.
pub struct Plan {
    /// The rows; may be empty.
    pub rows: Vec<Row>,
    /// Runs of each engine.
    pub runs: u32,
    /// Whether to measure the time to systemd's login.
    pub login: bool,
}

/// Measures and prints. True when all results agree and nothing went wrong.
///
/// # Errors
/// An engine cannot be started, the JSON file cannot be written.
pub fn run(disk: &Disk, setup: &Setup, engines: &[Engine], plan: &Plan, json: Option<&Path>) -> Result<bool> {
    let m = &setup.machine;
    let mut report = Report {
        format: FORMAT,
        time: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
        host: host(),
        guest: format!("disk {}, {} MiB, {} CPU, {}", disk.key, m.memory, m.cpus, m.kernel.display()),
        columns: Vec::new(),
    };
    for engine in engines {
        let version = session::version(engine)?;
        eprintln!("bench: {engine}: {version}");
        report.columns.push(Column { engine: engine.label().to_owned(), version, ..Column::default() });
    }
    for number in 1..=plan.runs {
        for (engine, column) in engines.iter().zip(&mut report.columns) {
            eprintln!("bench: run {number} of {}: {engine}", plan.runs);
            one_run(engine, setup, disk, plan, column)?;
            if plan.login && !matches!(engine, Engine::Native(_)) {
                login(engine, setup, disk, column)?;
            }
        }
        // What is known so far survives an interruption.
        if let Some(path) = json {
            write(&report, path)?;
        }
    }
    println!("{}\n{}", report.host, report.guest);
    print!("{}", report.table(&plan.rows, false));
    let complaints = report.complaints(&plan.rows);
    for c in &complaints {
        println!("WRONG  {c}");
    }
    Ok(complaints.is_empty())
}

fn write(report: &Report, path: &Path) -> Result<()> {
    let text = serde_json::to_string_pretty(report)?;
    std::fs::write(path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// All rows once; the engine is started again after a row in which it died.
fn one_run(engine: &Engine, setup: &Setup, disk: &Disk, plan: &Plan, column: &mut Column) -> Result<()> {
    let mut left: Vec<String> = plan.rows.iter().map(|r| r.name.to_owned()).collect();
    let mut booted = false;
    while !left.is_empty() || !booted && !matches!(engine, Engine::Native(_)) {
        booted = true;
        let mut current: Option<String> = None;
        let before = left.len();
        let task = if left.is_empty() { Task::Login } else { Task::Rows(left.clone()) };
        let out = session::run(engine, setup, Boot::Direct, &disk.image, &task, |_, line, _| {
            if let Some(name) = line.strip_prefix("start row=") {
                eprintln!("bench:   {name}");
                current = Some(name.to_owned());
            } else if let Some((name, result)) = rows::result(line)? {
                left.retain(|n| *n != name);
                let series = column.rows.entry(name).or_default();
                match result {
                    Ok(sample) => series.samples.push(sample),
                    Err(e) => series.errors.push(e),
                }
                current = None;
            }
            Ok(())
        })?;
        note(&out, column);
        let Some(trouble) = out.trouble else {
            ensure!(left.is_empty(), "{engine}: no result for {}", left.join(", "));
            break;
        };
        match current {
            Some(name) => {
                left.retain(|n| *n != name);
                column.rows.entry(name).or_default().errors.push(trouble);
            }
            None => {
                column.trouble.push(trouble);
                // It did not even begin, so it will not the next time.
                if left.len() == before {
                    break;
                }
            }
        }
    }
    Ok(())
}

fn note(out: &Outcome, column: &mut Column) {
    column.boots.kernel.extend(out.kernel_guest.map(|d| d.as_secs_f64()));
    column.boots.agent.extend(out.up_wall.map(|d| d.as_secs_f64()));
    column.clock.extend(out.clock);
}

fn login(engine: &Engine, setup: &Setup, disk: &Disk, column: &mut Column) -> Result<()> {
    let scratch = Scratch::new(disk)?;
    let out = session::run(engine, setup, Boot::Systemd, &scratch.path, &Task::Login, |_, _, _| Ok(()))?;
    column.boots.login.extend(out.up_wall.map(|d| d.as_secs_f64()));
    column.trouble.extend(out.trouble);
    Ok(())
}

/// CPU model, number of CPUs, load.
fn host() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model =
        info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": ")).map_or("unknown CPU", |(_, m)| m);
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or("?");
    format!("host: {model}, {cpus} CPUs, load {load} at the start")
}

/// Prints how the figures of two JSON files relate, engine by engine.
///
/// # Errors
/// A file cannot be read or is not one of ours.
pub fn compare_files(a: &Path, b: &Path, all: &[Row]) -> Result<bool> {
    let read = |path: &Path| -> Result<Report> {
        let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        let r: Report = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a file written by bench", path.display()))?;
        ensure!(r.format == FORMAT, "{} has format {}, this bench reads {FORMAT}", path.display(), r.format);
        Ok(r)
    };
    let (a, b) = (read(a)?, read(b)?);
    println!("A: {}\n   {}\nB: {}\n   {}", a.host, a.guest, b.host, b.guest);
    let mut good = true;
    for x in &a.columns {
        let Some(y) = b.columns.iter().find(|c| c.engine == x.engine) else { continue };
        let named = |c: &Column, label: &str| Column { engine: label.to_owned(), ..c.clone() };
        let pair = Report { columns: vec![named(x, "A"), named(y, "B")], ..Report::default() };
        let rows: Vec<Row> =
            all.iter().filter(|r| x.rows.contains_key(r.name) || y.rows.contains_key(r.name)).cloned().collect();
        println!("\n{}: A {}, B {}", x.engine, x.version, y.version);
        print!("{}", pair.table(&rows, false));
        let complaints = pair.complaints(&rows);
        complaints.iter().for_each(|c| println!("WRONG  {c}"));
        good &= complaints.is_empty();
    }
    Ok(good)
}
