//! Rate limits: a bucket that fills at a steady rate and is emptied by what passes.

use std::time::{Duration, Instant};

/// A limit in bytes a second, with a burst of a tenth of a second (at least one large packet).
#[derive(Debug)]
pub struct Bucket {
    rate: u64,
    burst: i64,
    /// Bytes that may pass now. One packet may take it below zero; the next waits until that is made up for.
    level: i64,
    at: Instant,
}

impl Bucket {
    /// A full bucket for `rate` bytes a second.
    pub fn new(rate: u64, now: Instant) -> Self {
        let burst = i64::try_from(rate / 10).unwrap_or(i64::MAX).clamp(64 << 10, 1 << 40);
        Self { rate: rate.max(1), burst, level: burst, at: now }
    }

    /// May a packet pass?
    pub fn open(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        let gained = passed.as_nanos().saturating_mul(u128::from(self.rate)) / 1_000_000_000;
        if gained > 0 {
            self.level = self.level.saturating_add(i64::try_from(gained).unwrap_or(i64::MAX)).min(self.burst);
            self.at = now;
        }
        self.level > 0
    }

    /// `bytes` have passed.
    pub fn take(&mut self, bytes: usize) {
        self.level -= bytes as i64;
    }

    /// When it opens, if it is not open.
    pub fn opens_in(&self) -> Option<Duration> {
        let missing = u64::try_from(1 - self.level).ok().filter(|missing| *missing > 0)?;
        Some(Duration::from_nanos(missing.saturating_mul(1_000_000_000) / self.rate).max(Duration::from_millis(1)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_kept() {
        let start = Instant::now();
        let mut bucket = Bucket::new(1 << 20, start);
        let (mut now, mut passed) = (start, 0usize);
        while now < start + Duration::from_secs(10) {
            if bucket.open(now) {
                bucket.take(65_000);
                passed += 65_000;
                assert!(bucket.open(now) != bucket.opens_in().is_some());
            } else {
                now += bucket.opens_in().unwrap();
            }
        }
        let ideal = 10.1 * f64::from(1 << 20);
        assert!((passed as f64 / ideal - 1.0).abs() < 0.02, "{passed}");
    }
}
