//! A small generator of pseudo-random numbers (xoshiro256**), so that a case is known by its seed alone.

/// The generator.
#[derive(Clone)]
pub struct Rng {
    state: [u64; 4],
}

/// The finaliser of SplitMix64: turns a counter into a seed.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self { state: [mix(seed), mix(seed ^ 1), mix(seed ^ 2), mix(seed ^ 3)] }
    }

    pub fn next(&mut self) -> u64 {
        let s = &mut self.state;
        let result = s[1].wrapping_mul(5).rotate_left(7).wrapping_mul(9);
        let t = s[1] << 17;
        s[2] ^= s[0];
        s[3] ^= s[1];
        s[1] ^= s[2];
        s[0] ^= s[3];
        s[2] ^= t;
        s[3] = s[3].rotate_left(45);
        result
    }

    /// Below `n` (not 0).
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// `low..=high`.
    pub fn range(&mut self, low: i64, high: i64) -> i64 {
        low + self.below((high - low + 1) as u64) as i64
    }

    /// True in `percent` of 100 cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of the kind that finds mistakes: borders, powers of two, small ones, and plainly random ones.
    pub fn interesting(&mut self) -> u64 {
        match self.below(10) {
            0 => self.pick(&[0, 1, 2, u64::MAX, u64::MAX - 1]),
            1 => 1_u64 << self.below(64),
            2 => (1_u64 << self.below(64)).wrapping_sub(1),
            3 => self.below(256),
            4 => self.next() as i32 as i64 as u64,
            5 => u64::from(self.next() as u32),
            6 => {
                self.pick(&[0x8000_0000_0000_0000, 0x7fff_ffff_ffff_ffff, 0x8000_0000, 0x7fff_ffff, 0x8000, 0x80, 0x7f])
            }
            7 => (self.below(512) as i64 - 256) as u64,
            _ => self.next(),
        }
    }

    /// Eight bytes that make sense as floating-point numbers, packed integers or text.
    pub fn lane(&mut self) -> u64 {
        let single = |rng: &mut Self| -> u32 {
            match rng.below(8) {
                0 => rng.pick(&[
                    0,
                    0x8000_0000,
                    0x3f80_0000,
                    0xbf80_0000,
                    0x7f80_0000,
                    0xff80_0000,
                    0x7fc0_0000,
                    0x7fa0_0001,
                    1,
                ]),
                1 => rng.next() as u32 & 0x807f_ffff,
                2 | 3 => (rng.below(2000) as f32 - 1000.0).to_bits(),
                4 => ((rng.next() as i32 as f32) / 65536.0).to_bits(),
                _ => (rng.next() as u32 & 0x80ff_ffff) | ((100 + rng.below(50) as u32) << 23),
            }
        };
        match self.below(8) {
            0..=2 => u64::from(single(self)) | u64::from(single(self)) << 32,
            3 | 4 => match self.below(5) {
                0 => self.pick(&[0, 1 << 63, 0x3ff0 << 48, 0x7ff0 << 48, 0xfff8 << 48, 0x7ff4 << 48, 1]),
                1 => self.next() & 0x800f_ffff_ffff_ffff,
                2 => (self.below(1 << 40) as f64 - 1e9).to_bits(),
                _ => (self.next() & 0x801f_ffff_ffff_ffff) | ((900 + self.below(250)) << 52),
            },
            5 => self.interesting(),
            _ => self.next(),
        }
    }
}
