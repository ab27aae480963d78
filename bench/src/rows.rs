//! The rows: what is measured, from the table in `guest/rows.txt`, and the result lines that come back.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// The table as text.
pub const TABLE: &str = include_str!("../guest/rows.txt");

/// One row of the table.
#[derive(Debug, Clone)]
pub struct Row {
    /// Short name, as in `--rows`.
    pub name: &'static str,
    /// Whether it belongs to the project's table of facts, whose geometric mean is printed.
    pub fact: bool,
    /// Whether it needs the large user land.
    pub large: bool,
    /// What it does.
    pub title: &'static str,
    /// Shell command in `/opt/bench` that prints the result line.
    pub command: &'static str,
}

impl Row {
    /// Is it in the group of this name?
    fn is_in(&self, group: &str) -> bool {
        match group {
            "facts" => self.fact,
            "all" => !self.large,
            "large" => self.large,
            "every" => true,
            _ => false,
        }
    }
}

/// All rows, in the order of the table.
///
/// # Errors
/// A malformed line; a test keeps the embedded table free of them.
pub fn all() -> Result<Vec<Row>> {
    parse(TABLE)
}

fn parse(table: &'static str) -> Result<Vec<Row>> {
    let mut rows: Vec<Row> = Vec::new();
    for line in table.lines().filter(|l| !l.is_empty() && !l.starts_with('#')) {
        let fields: Vec<&str> =
            line.split("  ").flat_map(|f| f.split('\t')).map(str::trim).filter(|f| !f.is_empty()).collect();
        let [name, kind, _, _, title, command] = fields[..] else {
            bail!("rows.txt: six fields are needed: {line}");
        };
        ensure!(matches!(kind, "f" | "x" | "b"), "rows.txt: kind {kind} in: {line}");
        ensure!(rows.iter().all(|r| r.name != name), "rows.txt: {name} is there twice");
        rows.push(Row { name, fact: kind == "f", large: kind == "b", title, command });
    }
    Ok(rows)
}

/// Picks rows by a comma-separated list of names; `facts`, `all` (of the usual user land), `large` and `every` are names of groups.
///
/// # Errors
/// A name that is not in the table.
pub fn pick(list: &str) -> Result<Vec<Row>> {
    let all = all()?;
    let mut picked: Vec<Row> = Vec::new();
    for name in list.split(',').map(str::trim).filter(|n| !n.is_empty()) {
        let group: Vec<&Row> = all.iter().filter(|r| r.name == name || r.is_in(name)).collect();
        if group.is_empty() {
            let known: Vec<_> = all.iter().map(|r| r.name).collect();
            bail!("no row is called {name}; there are facts, all, large, every, {}", known.join(", "));
        }
        for row in group {
            if picked.iter().all(|p| p.name != row.name) {
                picked.push(row.clone());
            }
        }
    }
    ensure!(!picked.is_empty(), "--rows names no row");
    Ok(picked)
}

/// One result line: `row=NAME ns=… med=… first=… reps=… sum=…`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Best repetition, ns an operation.
    pub ns: f64,
    /// Median repetition, ns an operation.
    pub median: f64,
    /// First repetition, with cold caches and, in a guest, untranslated code.
    pub first: f64,
    /// Repetitions made.
    pub reps: u32,
    /// Checksum over the results, the same on every correct machine.
    pub sum: String,
}

/// Parses what follows `@@ ` (or a worker's prefix) when it is a row's result: the name and the sample, or the error
/// that the guest reported for it. `None` for any other line.
///
/// # Errors
/// A result line that is damaged.
pub fn result(line: &str) -> Result<Option<(String, std::result::Result<Sample, String>)>> {
    let mut words = line.split_ascii_whitespace();
    let Some(name) = words.next().and_then(|w| w.strip_prefix("row=")) else {
        return Ok(None);
    };
    let rest: Vec<&str> = words.collect();
    let field = |key: &str| -> Result<&str> {
        rest.iter()
            .find_map(|w| w.strip_prefix(key)?.strip_prefix('='))
            .with_context(|| format!("no {key}= in the result line: {line}"))
    };
    if let Ok(error) = field("error") {
        return Ok(Some((name.to_owned(), Err(error.to_owned()))));
    }
    let number = |key: &str| -> Result<f64> {
        let v: f64 = field(key)?.parse().with_context(|| format!("{key}= in the result line: {line}"))?;
        ensure!(v.is_finite() && v >= 0.0, "{key}= in the result line: {line}");
        Ok(v)
    };
    let sum = field("sum")?;
    ensure!(sum.len() == 16 && sum.bytes().all(|b| b.is_ascii_hexdigit()), "sum= in the result line: {line}");
    let sample = Sample {
        ns: number("ns")?,
        median: number("med")?,
        first: number("first")?,
        reps: field("reps")?.parse().with_context(|| format!("reps= in the result line: {line}"))?,
        sum: sum.to_owned(),
    };
    Ok(Some((name.to_owned(), Ok(sample))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sound() {
        let rows = all().unwrap();
        assert_eq!(rows.iter().filter(|r| r.fact).count(), 26);
        assert!(rows.iter().all(|r| r.command.starts_with("work ") || r.command.starts_with("crypto ")));
        assert!(rows.iter().all(|r| r.name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')));
    }

    #[test]
    fn rows_are_picked_by_name_and_group() {
        let names = |l: &str| pick(l).unwrap().iter().map(|r| r.name).collect::<Vec<_>>();
        assert_eq!(names("fib, getppid,fib"), ["fib", "getppid"]);
        assert_eq!(names("facts").len(), 26);
        assert_eq!(names("every").len(), names("all").len() + names("large").len());
        assert!(names("large").contains(&"cc-j2"));
        assert!(pick("fibb").unwrap_err().to_string().contains("fibb"));
        assert!(pick("").is_err());
    }

    #[test]
    fn result_lines() {
        let (name, sample) =
            result("row=fib ns=6844713.00 med=7.5 first=9 reps=15 sum=0000000000213d05").unwrap().unwrap();
        assert_eq!(name, "fib");
        let sample = sample.unwrap();
        assert_eq!((sample.ns, sample.reps, sample.sum.as_str()), (6_844_713.0, 15, "0000000000213d05"));
        let (_, error) = result("row=gcc error=not-found").unwrap().unwrap();
        assert_eq!(error.unwrap_err(), "not-found");
        assert!(result("start row=fib").unwrap().is_none());
        assert!(result("row=fib ns=1 med=1 first=1 reps=1 sum=00").is_err());
        assert!(result("row=fib ns=inf med=1 first=1 reps=1 sum=0000000000213d05").is_err());
        assert!(result("row=fib ns=1 med=1").is_err());
    }
}
