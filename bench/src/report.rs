//! Figures of a measurement: collected over runs, stored as JSON, printed as a table with ratios and geometric means.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::rows::{Row, Sample};

/// Figures of one row under one engine, one entry a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Series {
    /// Results, in the order of the runs.
    pub samples: Vec<Sample>,
    /// What went wrong instead.
    pub errors: Vec<String>,
}

impl Series {
    /// Median over the runs of the best repetition, in ns.
    pub fn median(&self) -> Option<f64> {
        median(self.samples.iter().map(|s| s.ns))
    }

    /// Median over the runs of the first repetition, in ns.
    pub fn first(&self) -> Option<f64> {
        median(self.samples.iter().map(|s| s.first))
    }

    /// The checksum, if all runs agree on it.
    fn sum(&self) -> Option<&str> {
        let sum = self.samples.first()?.sum.as_str();
        self.samples.iter().all(|s| s.sum == sum).then_some(sum)
    }
}

/// Figures of starting up under one engine, in seconds, one entry a run.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Boots {
    /// Guest time from the kernel's start to the first program of the initramfs.
    pub kernel: Vec<f64>,
    /// Host time from the engine's start to the agent as the first program of the disk.
    pub agent: Vec<f64>,
    /// Host time from the engine's start to systemd's login shell on the console.
    pub login: Vec<f64>,
}

impl Boots {
    /// What the three are, in their order.
    const NAMES: [&str; 3] = [
        "kernel start to init (guest's clock)",
        "start to the disk's first program (host)",
        "start to systemd's login (host)",
    ];
}

/// Everything known about one engine.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Column {
    /// Column title.
    pub engine: String,
    /// What the program says about itself.
    pub version: String,
    /// Rows by name.
    pub rows: BTreeMap<String, Series>,
    /// Starting up.
    pub boots: Boots,
    /// Trouble that belongs to no row.
    pub trouble: Vec<String>,
    /// Speed of the guest's clock against the host's, one entry a run.
    pub clock: Vec<f64>,
}

/// A measurement.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Report {
    /// Format of this file.
    pub format: u32,
    /// Seconds since 1970.
    pub time: u64,
    /// The host's CPU and number of CPUs.
    pub host: String,
    /// The guest's disk, kernel and machine.
    pub guest: String,
    /// One for each engine, in the order of the columns.
    pub columns: Vec<Column>,
}

/// Format of the JSON file.
pub const FORMAT: u32 = 1;

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut v: Vec<f64> = values.collect();
    v.sort_by(f64::total_cmp);
    let middle = *v.get(v.len() / 2)?;
    if v.len() % 2 == 1 {
        return Some(middle);
    }
    Some((v.get(v.len() / 2 - 1)? + middle) / 2.0)
}

fn geometric_mean(values: &[f64]) -> Option<f64> {
    let n = values.len();
    (n > 0 && values.iter().all(|v| *v > 0.0)).then(|| (values.iter().map(|v| v.ln()).sum::<f64>() / n as f64).exp())
}

/// A time in a unit that fits it.
pub fn time(ns: f64) -> String {
    let (value, unit) = match ns {
        n if n < 1e3 => (n, "ns"),
        n if n < 1e6 => (n / 1e3, "µs"),
        n if n < 1e9 => (n / 1e6, "ms"),
        n => (n / 1e9, "s"),
    };
    let digits = if value < 10.0 {
        2
    } else if value < 100.0 {
        1
    } else {
        0
    };
    format!("{value:.digits$} {unit}")
}

/// A ratio with the digits that mean something.
fn ratio(r: f64) -> String {
    if r < 9.95 { format!("{r:.2}") } else { format!("{r:.0}") }
}

/// Pads to a width in characters, to the left.
fn right(text: &str, width: usize) -> String {
    format!("{}{text}", " ".repeat(width.saturating_sub(text.chars().count())))
}

impl Report {
    /// Pairs of columns whose ratio is printed: each guest to native (on two CPUs if it has two, and that was measured), and each guest to the guest
    /// in the column before it.
    fn pairs(&self) -> Vec<(usize, usize)> {
        let find = |name: &str| self.columns.iter().position(|c| c.engine == name);
        let natives = [find("native"), find("native-2")];
        let guests: Vec<usize> = (0..self.columns.len()).filter(|i| !natives.contains(&Some(*i))).collect();
        let mut pairs = Vec::new();
        for &i in &guests {
            let of_two = self.columns.get(i).is_some_and(|c| c.engine.ends_with("-2"));
            if let Some(n) = natives[1].filter(|_| of_two).or(natives[0]).or(natives[1]) {
                pairs.push((i, n));
            }
        }
        pairs.extend(guests.windows(2).filter_map(|w| Some((*w.get(1)?, *w.first()?))));
        pairs
    }

    fn row(&self, column: usize, name: &str) -> Option<&Series> {
        self.columns.get(column)?.rows.get(name)
    }

    /// Whether the row gave the same result under all engines that gave one, in all runs.
    fn agrees(&self, name: &str) -> bool {
        let mut sums =
            self.columns.iter().filter_map(|c| c.rows.get(name)).filter(|s| !s.samples.is_empty()).map(Series::sum);
        let Some(first) = sums.next() else { return true };
        first.is_some() && sums.all(|s| s == first)
    }

    /// All that is wrong, one line each: wrong results, rows without a result, engines in trouble, clocks that go wrong.
    pub fn complaints(&self, rows: &[Row]) -> Vec<String> {
        let mut out = Vec::new();
        for row in rows {
            if !self.agrees(row.name) {
                let sums: Vec<String> = self
                    .columns
                    .iter()
                    .filter_map(|c| {
                        let s = c.rows.get(row.name)?;
                        let list: Vec<&str> = s.samples.iter().map(|s| s.sum.as_str()).collect();
                        Some(format!("{} {}", c.engine, list.join("/")))
                    })
                    .collect();
                out.push(format!("{}: results differ: {}", row.name, sums.join(", ")));
            }
            for c in &self.columns {
                for e in c.rows.get(row.name).map(|s| s.errors.as_slice()).unwrap_or_default() {
                    out.push(format!("{}: {}: {e}", row.name, c.engine));
                }
            }
        }
        for c in &self.columns {
            out.extend(c.trouble.iter().map(|t| format!("{}: {t}", c.engine)));
            for speed in c.clock.iter().filter(|s| !(0.97..=1.03).contains(*s)) {
                out.push(format!(
                    "{}: the guest's clock runs at {speed:.3} of the host's: its times are not to be believed",
                    c.engine
                ));
            }
        }
        out
    }

    /// The table. With `first`, of the first repetitions instead of the best.
    pub fn table(&self, rows: &[Row], first: bool) -> String {
        let pairs = self.pairs();
        let title = |i: usize| self.columns.get(i).map_or("", |c| c.engine.as_str());
        let value = |i: usize, name: &str| self.row(i, name).and_then(|s| if first { s.first() } else { s.median() });
        let mut out = String::new();
        let heads: Vec<String> = pairs.iter().map(|(a, b)| format!("{}/{}", title(*a), title(*b))).collect();
        let _ = write!(out, "{:10} {:40}", "row", if first { "first repetition" } else { "work" });
        for c in &self.columns {
            let _ = write!(out, " {}", right(&c.engine, 10));
        }
        for h in &heads {
            let _ = write!(out, "  {}", right(h, 7));
        }
        out.push('\n');
        for row in rows {
            let _ = write!(out, "{:10} {:40}", row.name, row.title);
            for i in 0..self.columns.len() {
                let _ = write!(out, " {}", right(&value(i, row.name).map_or("-".to_owned(), time), 10));
            }
            for ((a, b), h) in pairs.iter().zip(&heads) {
                let r = value(*a, row.name).zip(value(*b, row.name)).map(|(x, y)| x / y);
                let _ = write!(out, "  {}", right(&r.map_or("-".to_owned(), ratio), h.len().max(7)));
            }
            out.push_str(if self.agrees(row.name) { "\n" } else { "  RESULTS DIFFER\n" });
        }
        for (fact, name) in [(true, "geometric mean, rows of the facts"), (false, "geometric mean, all rows")] {
            let of = |(a, b): &(usize, usize)| {
                let v: Vec<f64> = rows
                    .iter()
                    .filter(|r| r.fact || !fact)
                    .filter_map(|r| Some(value(*a, r.name)? / value(*b, r.name)?))
                    .collect();
                (v.len(), geometric_mean(&v))
            };
            let counted = pairs.iter().map(|p| of(p).0).max().unwrap_or(0);
            let _ = write!(out, "{:51}", format!("{name} ({counted})"));
            out.push_str(&" ".repeat(11 * self.columns.len()));
            for (p, h) in pairs.iter().zip(&heads) {
                let _ = write!(out, "  {}", right(&of(p).1.map_or("-".to_owned(), ratio), h.len().max(7)));
            }
            out.push('\n');
        }
        for (which, name) in Boots::NAMES.iter().enumerate() {
            let of = |b: &Boots| [&b.kernel, &b.agent, &b.login].get(which).and_then(|v| median(v.iter().copied()));
            if self.columns.iter().all(|c| of(&c.boots).is_none()) {
                continue;
            }
            let _ = write!(out, "{:10} {:40}", "boot", name);
            let value = |i: usize| self.columns.get(i).and_then(|c| of(&c.boots));
            for i in 0..self.columns.len() {
                let _ = write!(out, " {}", right(&value(i).map_or("-".to_owned(), |s| time(s * 1e9)), 10));
            }
            for ((a, b), h) in pairs.iter().zip(&heads) {
                let r = value(*a).zip(value(*b)).map(|(x, y)| x / y);
                let _ = write!(out, "  {}", right(&r.map_or("-".to_owned(), ratio), h.len().max(7)));
            }
            out.push('\n');
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(list: &[(f64, &str)]) -> Series {
        let sample = |&(ns, sum): &(f64, &str)| Sample { ns, median: ns, first: ns * 2.0, reps: 1, sum: sum.into() };
        Series { samples: list.iter().map(sample).collect(), errors: vec![] }
    }

    fn report() -> Report {
        let column = |name: &str, factor: f64, sum: &str| Column {
            engine: name.into(),
            rows: [("fib", 4e6), ("gcc", 1e8)]
                .map(|(n, t)| (n.to_owned(), series(&[(t * factor, sum), (t * factor * 3.0, sum), (t * factor, sum)])))
                .into(),
            ..Column::default()
        };
        Report {
            columns: vec![column("native", 1.0, "aa"), column("qemu", 10.0, "aa"), column("tightrope", 2.0, "aa")],
            ..Report::default()
        }
    }

    #[test]
    fn medians_and_means() {
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()), Some(2.0));
        assert_eq!(median([4.0, 1.0].into_iter()), Some(2.5));
        assert_eq!(median([].into_iter()), None);
        assert!((geometric_mean(&[2.0, 8.0]).unwrap() - 4.0).abs() < 1e-9);
        assert_eq!(geometric_mean(&[]), None);
    }

    #[test]
    fn the_table_has_ratios_and_means() {
        let rows = crate::rows::pick("fib,gcc").unwrap();
        let t = report().table(&rows, false);
        let fib = t.lines().find(|l| l.starts_with("fib")).unwrap();
        assert!(fib.contains("4.00 ms") && fib.contains("40.0 ms") && fib.contains("8.00 ms"), "{t}");
        let ratios: Vec<&str> = fib.split_whitespace().rev().take(3).collect();
        assert_eq!(ratios, ["0.20", "2.00", "10"]);
        assert!(t.contains("geometric mean, rows of the facts (2)"));
        assert!(!t.contains("boot"));
        assert!(report().complaints(&rows).is_empty());
        assert!(report().table(&rows, true).contains("first repetition"));
    }

    #[test]
    fn wrong_results_are_told() {
        let rows = crate::rows::pick("fib,gcc").unwrap();
        let mut r = report();
        r.columns[2].rows.insert("fib".into(), series(&[(1.0, "aa"), (1.0, "bb")]));
        r.columns[1].rows.get_mut("gcc").unwrap().errors.push("hangs".into());
        r.columns[2].clock = vec![1.0, 0.5];
        let c = r.complaints(&rows);
        assert!(c[0].contains("fib: results differ") && c[0].contains("tightrope aa/bb"), "{c:?}");
        assert!(c[1].contains("gcc: qemu: hangs"));
        assert!(c[2].contains("0.500") && c.len() == 3);
        assert!(r.table(&rows, false).contains("RESULTS DIFFER"));
    }

    #[test]
    fn json_comes_back() {
        let text = serde_json::to_string(&report()).unwrap();
        let back: Report = serde_json::from_str(&text).unwrap();
        assert_eq!(back.columns[1].rows["fib"].samples, report().columns[1].rows["fib"].samples);
    }
}
