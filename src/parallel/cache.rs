//! How many experts a device has slots for while the others stay in the host's memory, and what
//! such a cache has done.

use std::{
    fmt,
    ops::{Add, AddAssign},
    str::FromStr,
};

use crate::kernels::CacheExperts;

use super::ParallelError;

/// Which expert gives its slot up for another one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// The one that was not used for longest.
    #[default]
    Lru,
    /// The one that was used least often, older uses counting less.
    Lfu,
}

impl FromStr for CachePolicy {
    type Err = ParallelError;

    fn from_str(text: &str) -> Result<Self, ParallelError> {
        match text {
            "lru" => Ok(Self::Lru),
            "lfu" => Ok(Self::Lfu),
            _ => Err(ParallelError::CachePolicy { text: text.to_owned() }),
        }
    }
}

impl fmt::Display for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(if *self == Self::Lru { "lru" } else { "lfu" })
    }
}

/// How large a cache of experts is, and what it drops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheOptions {
    /// Device memory for experts of all layers, bytes.
    pub bytes: u64,
    /// Who goes.
    pub policy: CachePolicy,
}

/// The same in slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheSlots {
    /// Of each layer.
    pub n: usize,
    /// Who goes.
    pub policy: CachePolicy,
}

/// What caches of experts have done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CacheStats {
    /// Slots of all layers.
    pub slots: u64,
    /// Experts of all layers.
    pub experts: u64,
    /// Chosen experts that were in a slot, counted once for each layer and step.
    pub hits: u64,
    /// Chosen experts that had to be moved in.
    pub misses: u64,
    /// Bytes of weights moved to the device.
    pub bytes_moved: u64,
    /// Turns of layers that had to wait for at least one.
    pub stalls: u64,
    /// Turns beyond the first in layers whose chosen experts outnumbered the slots.
    pub extra_turns: u64,
}

impl CacheStats {
    /// Share of chosen experts that were there; 1 while none was chosen.
    pub fn hit_rate(&self) -> f64 {
        let all = self.hits + self.misses;
        if all == 0 { 1.0 } else { self.hits as f64 / all as f64 }
    }

    /// What the same caches have done since they said `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        Self {
            hits: self.hits - before.hits,
            misses: self.misses - before.misses,
            bytes_moved: self.bytes_moved - before.bytes_moved,
            stalls: self.stalls - before.stalls,
            extra_turns: self.extra_turns - before.extra_turns,
            ..*self
        }
    }
}

impl Add for CacheStats {
    type Output = Self;

    /// Of two caches together.
    fn add(self, other: Self) -> Self {
        Self {
            slots: self.slots + other.slots,
            experts: self.experts + other.experts,
            hits: self.hits + other.hits,
            misses: self.misses + other.misses,
            bytes_moved: self.bytes_moved + other.bytes_moved,
            stalls: self.stalls + other.stalls,
            extra_turns: self.extra_turns + other.extra_turns,
        }
    }
}

impl AddAssign for CacheStats {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

/// Adds up what the kernels count of each layer's slots, modulo 2^32, between two readings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CacheTally {
    stats: CacheStats,
    /// Of those layers that have slots, with the last reading.
    layers: Vec<(CacheLayer, [u32; CacheExperts::COUNTERS])>,
}

/// The size of a layer with slots.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheLayer {
    /// Experts that the device has room for.
    pub slots: u64,
    /// Experts at home.
    pub experts: u64,
    /// Bytes of one.
    pub expert_bytes: u64,
}

impl CacheTally {
    /// For these layers.
    pub fn new(layers: impl IntoIterator<Item = CacheLayer>) -> Self {
        let mut tally = Self::default();
        for layer in layers {
            tally.stats.slots += layer.slots;
            tally.stats.experts += layer.experts;
            tally.layers.push((layer, Default::default()));
        }
        tally
    }

    /// Takes a reading of one layer: the counters of [`CacheExperts::state`].
    pub fn read(&mut self, layer: usize, counters: &[u32]) {
        let Some((size, last)) = self.layers.get_mut(layer) else { return };
        let mut grown = [0; CacheExperts::COUNTERS];
        for ((grown, last), &now) in grown.iter_mut().zip(last).zip(counters) {
            *grown = u64::from(now.wrapping_sub(*last));
            *last = now;
        }
        let [_, hits, misses, stalls, extra_turns] = grown;
        let bytes_moved = misses * size.expert_bytes;
        self.stats +=
            CacheStats { hits, misses, bytes_moved, stalls, extra_turns, ..Default::default() };
    }

    /// All readings so far; none where no layer has slots.
    pub fn stats(&self) -> Option<CacheStats> {
        (!self.layers.is_empty()).then_some(self.stats)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_add_up_past_the_end_of_a_word() {
        assert_eq!(CacheTally::default().stats(), None);
        let layer = CacheLayer { slots: 2, experts: 8, expert_bytes: 100 };
        let mut tally = CacheTally::new([layer, layer]);
        tally.read(0, &[u32::MAX, u32::MAX, 3, 2, 0]);
        tally.read(0, &[1, 4, 5, 3, 1]);
        tally.read(1, &[1, 0, 1, 1, 0]);
        let stats = tally.stats().unwrap();
        assert_eq!((stats.slots, stats.experts), (4, 16));
        assert_eq!((stats.hits, stats.misses), (u64::from(u32::MAX) + 5, 6));
        assert_eq!((stats.bytes_moved, stats.stalls, stats.extra_turns), (600, 4, 1));
        let before = CacheStats { misses: 1, ..Default::default() };
        assert_eq!(stats.since(&before).misses, 5);
    }

    #[test]
    fn policies_have_names() {
        assert_eq!("lfu".parse::<CachePolicy>().unwrap().to_string(), "lfu");
        assert!("fifo".parse::<CachePolicy>().unwrap_err().to_string().contains("fifo"));
    }
}
