//! Limits on bytes and requests a second: two token buckets, each as large as a tenth of a second is worth.
//!
//! A request may start as soon as the buckets are not in debt, and then may put them into debt: so any request passes in the end,
//! however large, and the average is what was asked for.

use std::time::{Duration, Instant};

use crate::options::Limits;

/// What a bucket holds when it is full, in seconds of its rate.
const BURST: f64 = 0.1;

#[derive(Clone, Copy, Debug)]
struct Bucket {
    /// Tokens a second.
    rate: f64,
    /// May be negative: debt.
    tokens: f64,
}

impl Bucket {
    fn new(rate: Option<u64>) -> Option<Self> {
        rate.filter(|rate| *rate > 0).map(|rate| Self { rate: rate as f64, tokens: rate as f64 * BURST })
    }

    fn fill(&mut self, seconds: f64) {
        self.tokens = (self.tokens + self.rate * seconds).min((self.rate * BURST).max(1.0));
    }

    /// Seconds until it is out of debt.
    fn debt(&self) -> f64 {
        (-self.tokens / self.rate).max(0.0)
    }
}

/// The limits of one disk.
#[derive(Clone, Copy, Debug)]
pub struct Limiter {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    filled: Option<Instant>,
}

impl Limiter {
    /// With full buckets.
    pub fn new(limits: Limits) -> Self {
        Self { bytes: Bucket::new(limits.bytes), operations: Bucket::new(limits.operations), filled: None }
    }

    /// Is there any limit?
    pub fn limits(&self) -> bool {
        self.bytes.is_some() || self.operations.is_some()
    }

    /// How long the next request has to wait; `None` when it may start.
    pub fn wait(&mut self, now: Instant) -> Option<Duration> {
        let passed = self.filled.map_or(0.0, |filled| now.saturating_duration_since(filled).as_secs_f64());
        self.filled = Some(now);
        let mut debt: f64 = 0.0;
        for bucket in self.bytes.iter_mut().chain(&mut self.operations) {
            bucket.fill(passed);
            debt = debt.max(bucket.debt());
        }
        (debt > 0.0).then(|| Duration::from_secs_f64(debt.min(3600.0)).max(Duration::from_micros(100)))
    }

    /// A request with `bytes` bytes of data starts.
    pub fn take(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.bytes {
            bucket.tokens -= bytes as f64;
        }
        if let Some(bucket) = &mut self.operations {
            bucket.tokens -= 1.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs requests of `size` bytes for ten seconds of made-up time; returns how many.
    fn run(limits: Limits, size: u64) -> u64 {
        let (start, mut limiter) = (Instant::now(), Limiter::new(limits));
        let (mut now, mut count) = (start, 0);
        while now - start < Duration::from_secs(10) {
            match limiter.wait(now) {
                Some(wait) => now += wait,
                None => {
                    limiter.take(size);
                    count += 1;
                    now += Duration::from_micros(1);
                }
            }
        }
        count
    }

    #[test]
    fn averages_are_kept() {
        let bytes = run(Limits { bytes: Some(1 << 20), operations: None }, 4096) * 4096;
        assert!((10 << 20..11 << 20).contains(&bytes), "{bytes}");
        let operations = run(Limits { bytes: None, operations: Some(100) }, 1 << 20);
        assert!((1000..1020).contains(&operations), "{operations}");
        // One request is worth more than a second: it passes all the same.
        let large = run(Limits { bytes: Some(1 << 20), operations: None }, 4 << 20);
        assert!((2..=4).contains(&large), "{large}");
        let both = run(Limits { bytes: Some(1 << 20), operations: Some(100) }, 512);
        assert!((1000..1020).contains(&both), "{both}");
        assert!(!Limiter::new(Limits::default()).limits());
    }

    #[test]
    fn a_rest_is_not_saved_up() {
        let start = Instant::now();
        let mut limiter = Limiter::new(Limits { bytes: None, operations: Some(100) });
        assert!(limiter.wait(start).is_none());
        let mut count = 0;
        while limiter.wait(start + Duration::from_secs(60)).is_none() {
            limiter.take(0);
            count += 1;
        }
        assert!((10..=11).contains(&count), "{count}");
    }
}
