//! Prompts and arrivals that are the same for the same seed.

/// Splitmix64.
#[derive(Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    /// Seconds to the next event of a Poisson process of `rate` events per second.
    pub(super) fn exponential(&mut self, rate: f64) -> f64 {
        // Above 0, at most 1.
        let unit = ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        -unit.ln() / rate
    }
}
