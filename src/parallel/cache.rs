//! Which experts of a layer lie in the slots that a device has for them, and which must be moved
//! in. Pure bookkeeping: it knows numbers of experts and slots, not weights.

use std::{fmt, str::FromStr, time::Duration};

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

/// What caches of experts have done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
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
    /// Layers of steps that had to move at least one.
    pub stalls: u64,
    /// Host time from the router's result until the moves were submitted.
    pub stalled: Duration,
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
            stalled: self.stalled - before.stalled,
            extra_turns: self.extra_turns - before.extra_turns,
            ..*self
        }
    }
}

/// Uses older than so many turns count half.
const HALF_LIFE: u64 = 64;

/// The slots of one layer.
#[derive(Debug, Clone)]
pub struct SlotCache {
    policy: CachePolicy,
    /// Expert by slot.
    held: Vec<Option<usize>>,
    /// Slot by expert.
    slots: Vec<Option<usize>>,
    /// Turn of the last use, by expert.
    last: Vec<u64>,
    /// Uses, halved every [`HALF_LIFE`] turns, by expert.
    uses: Vec<u32>,
    turn: u64,
}

impl SlotCache {
    /// Empty slots.
    pub fn new(n_experts: usize, n_slots: usize, policy: CachePolicy) -> Self {
        Self {
            policy,
            held: vec![None; n_slots],
            slots: vec![None; n_experts],
            last: vec![0; n_experts],
            uses: vec![0; n_experts],
            turn: 0,
        }
    }

    /// Number of slots.
    pub fn n_slots(&self) -> usize {
        self.held.len()
    }

    /// Slot of an expert, if it is in one.
    pub fn slot(&self, expert: usize) -> Option<usize> {
        self.slots[expert]
    }

    /// Experts in groups that fit the slots, by their numbers: the same ones whatever the slots
    /// hold, so that sums have one order. `ids` are those chosen, negative where none is.
    pub fn turns(&self, ids: &[i32]) -> Vec<Vec<usize>> {
        let mut chosen = vec![false; self.slots.len()];
        for &id in ids {
            if let Some(chosen) = usize::try_from(id).ok().and_then(|id| chosen.get_mut(id)) {
                *chosen = true;
            }
        }
        let experts: Vec<usize> = (0..chosen.len()).filter(|&e| chosen[e]).collect();
        experts.chunks(self.n_slots().max(1)).map(<[usize]>::to_vec).collect()
    }

    /// Gives each of `wanted` a slot. Returns those that must be moved in, with their slots.
    ///
    /// # Panics
    /// Where there are more of them than slots.
    pub fn take(&mut self, wanted: &[usize]) -> Vec<(usize, usize)> {
        assert!(wanted.len() <= self.n_slots(), "{} in {}", wanted.len(), self.n_slots());
        self.turn += 1;
        if self.turn.is_multiple_of(HALF_LIFE) {
            self.uses.iter_mut().for_each(|uses| *uses /= 2);
        }
        for &expert in wanted {
            self.last[expert] = self.turn;
            self.uses[expert] += 1;
        }
        let missing = wanted.iter().copied().filter(|&e| self.slots[e].is_none());
        let missing: Vec<usize> = missing.collect();
        let mut moves = Vec::with_capacity(missing.len());
        for expert in missing {
            let slot = self.victim();
            if let Some(old) = self.held[slot].replace(expert) {
                self.slots[old] = None;
            }
            self.slots[expert] = Some(slot);
            moves.push((expert, slot));
        }
        moves
    }

    /// The slot to give away: an empty one, else by policy among those not used in this turn.
    fn victim(&self) -> usize {
        let worth = |slot: &usize| match self.held[*slot] {
            None => (0, 0, 0),
            Some(e) if self.last[e] == self.turn => (2, 0, 0),
            Some(e) => match self.policy {
                CachePolicy::Lru => (1, 0, self.last[e]),
                CachePolicy::Lfu => (1, self.uses[e], self.last[e]),
            },
        };
        (0..self.n_slots()).min_by_key(worth).expect("a cache has slots")
    }

    /// Where a kernel finds `wanted`, see [`super::Owners::map`]; all others are -1.
    /// `[experts, 2]`
    pub fn map(&self, wanted: &[usize]) -> Vec<i32> {
        let mut map = [1, -1].repeat(self.slots.len());
        for &expert in wanted {
            map[2 * expert + 1] = self.slots[expert].map_or(-1, |slot| slot as i32);
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_policy_says_who_goes() {
        for (policy, gone) in [(CachePolicy::Lru, 0), (CachePolicy::Lfu, 1)] {
            let mut cache = SlotCache::new(4, 2, policy);
            assert_eq!(cache.take(&[0]), [(0, 0)]);
            assert_eq!(cache.take(&[0]), []);
            assert_eq!(cache.take(&[1]), [(1, 1)]);
            // Expert 0 was used more often, expert 1 later.
            let [(expert, slot)] = cache.take(&[2])[..] else { panic!("one moves in") };
            assert_eq!((expert, cache.slot(gone)), (2, None), "{policy}");
            assert_eq!(cache.slot(2), Some(slot));
        }
        assert_eq!("lfu".parse::<CachePolicy>().unwrap().to_string(), "lfu");
        assert!("fifo".parse::<CachePolicy>().unwrap_err().to_string().contains("fifo"));
    }

    #[test]
    fn old_fame_fades() {
        let mut cache = SlotCache::new(3, 2, CachePolicy::Lfu);
        (0..40).for_each(|_| drop(cache.take(&[0])));
        (0..500).for_each(|_| drop(cache.take(&[1])));
        (0..20).for_each(|_| drop(cache.take(&[2])));
        assert_eq!(cache.slot(0), None, "it was used most, but long ago");
    }

    #[test]
    fn turns_do_not_depend_on_what_is_held() {
        let mut cache = SlotCache::new(8, 3, CachePolicy::Lru);
        let ids = [7, -1, 2, 9, 2, 0, 5];
        let turns = cache.turns(&ids);
        assert_eq!(turns, [vec![0, 2, 5], vec![7]]);
        cache.take(&[7, 5]);
        assert_eq!(cache.turns(&ids), turns);
        assert!(cache.turns(&[-1, 8]).is_empty());
    }

    proptest! {
        /// After any history each wanted expert has a slot of its own, and the map says so.
        #[test]
        fn wanted_experts_are_held(
            n_slots in 1usize..8,
            lfu in any::<bool>(),
            steps in prop::collection::vec(prop::collection::vec(-2i32..14, 0..12), 1..40),
        ) {
            let policy = if lfu { CachePolicy::Lfu } else { CachePolicy::Lru };
            let mut cache = SlotCache::new(12, n_slots, policy);
            // What the device would hold.
            let mut device = vec![None; n_slots];
            for ids in steps {
                for wanted in cache.turns(&ids) {
                    for (expert, slot) in cache.take(&wanted) {
                        device[slot] = Some(expert);
                    }
                    let map = cache.map(&wanted);
                    for expert in 0..12 {
                        prop_assert_eq!(map[2 * expert], 1);
                        let slot = usize::try_from(map[2 * expert + 1]).ok();
                        prop_assert_eq!(slot.is_some(), wanted.contains(&expert));
                        if let Some(slot) = slot {
                            prop_assert_eq!(device[slot], Some(expert));
                        }
                    }
                }
            }
        }
    }
}
