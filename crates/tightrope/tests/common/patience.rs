//! Limits that a host which stands still, or is slow to let us run, does not use up.

use std::time::{Duration, Instant};

/// How long one wait should be, so that [`Patience`] counts it whole.
pub const STEP: Duration = Duration::from_millis(500);

/// What is left of a limit. Of the time between two looks it counts twice [`STEP`] at most: when more has passed, this process did not run (its
/// machine was stopped, or had others to run), and what it waits for may not have run either.
pub struct Patience {
    left: Duration,
    last: Instant,
}

impl Patience {
    pub fn new(limit: Duration) -> Self {
        Self::from(limit, Instant::now())
    }

    /// As [`Self::new`], `now`.
    pub fn from(limit: Duration, now: Instant) -> Self {
        Self { left: limit, last: now }
    }

    /// Is some of it left?
    pub fn lasts(&mut self) -> bool {
        self.lasts_at(Instant::now())
    }

    /// As [`Self::lasts`], `now`.
    pub fn lasts_at(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.last);
        self.last = now;
        self.left = self.left.saturating_sub(passed.min(STEP * 2));
        !self.left.is_zero()
    }

    /// Not more than this is left from now on.
    pub fn shorten(&mut self, limit: Duration) {
        self.left = self.left.min(limit);
    }
}
