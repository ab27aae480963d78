//! Counters for `--stats`: collected from engine and machine as `(kind, value)`, shown as a table or as JSON.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::config::StatsFormat;

/// Counters, shown in the order of their names.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stats {
    engine: String,
    elapsed: Duration,
    counters: BTreeMap<String, u64>,
}

impl Stats {
    /// Counters of a VM under `engine` that has run for `elapsed`.
    pub(crate) fn new(engine: &str, elapsed: Duration) -> Self {
        Self { engine: engine.to_string(), elapsed, counters: BTreeMap::new() }
    }

    /// Adds counters; the same kind from several vCPUs is summed.
    pub(crate) fn add(&mut self, counters: impl IntoIterator<Item = (String, u64)>) {
        for (kind, value) in counters {
            let sum = self.counters.entry(kind).or_default();
            *sum = sum.saturating_add(value);
        }
    }

    /// From the times measured, that of the guest itself: when no vCPU was halted and neither translator nor devices worked for it.
    pub(crate) fn add_guest_time(&mut self) {
        let time = |kind: &str| self.counters.get(&format!("time.{kind}-us")).copied().unwrap_or(0);
        if let Some(running) = self.counters.get("time.running-us") {
            let others = ["translator", "halted", "devices"].map(time).iter().sum();
            let guest = running.saturating_sub(others);
            self.counters.insert("time.guest-us".into(), guest);
        }
    }

    /// The text to show.
    pub(crate) fn render(&self, format: StatsFormat) -> String {
        match format {
            StatsFormat::Text => self.table(),
            StatsFormat::Json => self.json(),
        }
    }

    fn table(&self) -> String {
        let mut text = format!("--- counters: engine {}, {:.3} s ---\n", self.engine, self.elapsed.as_secs_f64());
        let width = self.counters.keys().map(String::len).max().unwrap_or(0);
        for (kind, value) in &self.counters {
            text.push_str(&format!("{kind:<width$} {:>18}\n", grouped(*value)));
        }
        text
    }

    fn json(&self) -> String {
        serde_json::json!({
            "engine": self.engine,
            "seconds": self.elapsed.as_secs_f64(),
            "counters": self.counters,
        })
        .to_string()
    }
}

/// A number with a thin gap every three digits.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1 000"), (1_234_567, "1 234 567")] {
            assert_eq!(grouped(value), text);
        }
    }

    #[test]
    fn both_forms() {
        let mut stats = Stats::new("bt", Duration::from_millis(1500));
        stats.add([("exits.serial".into(), 2), ("blocks".into(), 1000)]);
        stats.add([("exits.serial".into(), 3)]);
        let table = stats.render(StatsFormat::Text);
        assert!(table.contains("engine bt, 1.500 s"), "{table}");
        assert!(table.lines().any(|l| l.starts_with("exits.serial") && l.ends_with(" 5")), "{table}");
        let json: serde_json::Value = serde_json::from_str(&stats.render(StatsFormat::Json)).unwrap();
        assert_eq!(json["counters"]["exits.serial"], 5);
        assert_eq!(json["counters"]["blocks"], 1000);
        assert_eq!(json["engine"], "bt");
    }

    #[test]
    fn the_rest_of_the_time_is_the_guests() {
        let mut stats = Stats::new("bt", Duration::from_millis(1500));
        let times = [("running", 1000), ("translator", 200), ("halted", 100), ("devices", 50)];
        stats.add(times.map(|(kind, value)| (format!("time.{kind}-us"), value)));
        stats.add_guest_time();
        assert_eq!(stats.counters["time.guest-us"], 650);
        let mut stats = Stats::new("interp", Duration::ZERO);
        stats.add_guest_time();
        assert!(stats.counters.is_empty());
    }
}
