//! Who holds which experts of one layer, and which replica serves a token.

use super::{CacheSlots, ParallelError};

/// Where the experts of one layer are. A rank is a device; 0 is the primary. A rank's experts have
/// local ids in the order in which it holds them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owners {
    /// Global ids by local id. `[ranks][local experts]`
    held: Vec<Vec<usize>>,
    /// Rank and local id of each replica. `[experts][replicas]`
    replicas: Vec<Vec<(usize, usize)>>,
}

/// Which of the routed experts a device holds, and where. By default every one in its own memory.
#[derive(Debug, Clone, Default)]
pub struct ExpertLayout {
    /// Those of a rank only.
    pub share: Option<Share>,
    /// At most so many of each layer at a time; all of them stay in the host's memory.
    pub slots: Option<CacheSlots>,
}

/// What a rank holds of all layers.
#[derive(Debug, Clone)]
pub struct Share {
    /// By layer that has experts.
    pub owners: Vec<Owners>,
    /// Which rank.
    pub rank: usize,
    /// Where placements change: copies of experts in a layer beyond one of each, over all ranks.
    pub redundant: Option<usize>,
}

impl Share {
    /// Places for experts that the rank needs in a layer.
    pub fn places(&self, layer: usize) -> usize {
        let held = |owners: &Owners| owners.held(self.rank).len();
        let all = || self.owners.iter();
        match self.redundant {
            None => held(&self.owners[layer]),
            Some(redundant) => {
                let n_experts = all().map(Owners::n_experts).max().unwrap_or(0);
                let n_ranks = self.owners[layer].n_ranks();
                let most = (n_experts + redundant).div_ceil(n_ranks).min(n_experts);
                all().map(held).max().unwrap_or(0).max(most)
            }
        }
    }

    /// The rank's map of a layer and its columns, see [`Owners::map`].
    pub fn map(&self, layer: usize) -> (usize, Vec<i32>) {
        let owners = &self.owners[layer];
        let most = owners.replicas.iter().map(Vec::len).max().unwrap_or(1);
        let later = self.redundant.map_or(1, |n| (1 + n).min(owners.n_ranks()));
        let cols = 1 + most.max(later);
        (cols, owners.map(self.rank, cols))
    }
}

impl Owners {
    /// From the experts that each rank holds, in local order; an expert may be on several ranks.
    ///
    /// # Errors
    /// [`ParallelError::Placement`] unless every expert has a place, at most one on each rank.
    pub fn new(n_experts: usize, held: Vec<Vec<usize>>) -> Result<Self, ParallelError> {
        let bad = |cause: String| ParallelError::Placement { n_experts, cause };
        let mut replicas: Vec<Vec<(usize, usize)>> = vec![Vec::new(); n_experts];
        for (rank, experts) in held.iter().enumerate() {
            for (local, &expert) in experts.iter().enumerate() {
                let places = replicas
                    .get_mut(expert)
                    .ok_or_else(|| bad(format!("puts expert {expert} on device {rank}")))?;
                if places.last().is_some_and(|place| place.0 == rank) {
                    return Err(bad(format!("puts expert {expert} on device {rank} twice")));
                }
                places.push((rank, local));
            }
        }
        match replicas.iter().position(Vec::is_empty) {
            Some(expert) => Err(bad(format!("leaves out expert {expert}"))),
            None => Ok(Self { held, replicas }),
        }
    }

    /// Consecutive experts on each rank, the first ranks holding the surplus (vLLM's `linear`).
    pub fn linear(n_experts: usize, n_ranks: usize) -> Self {
        let (base, surplus) = (n_experts / n_ranks, n_experts % n_ranks);
        let first = |rank: usize| rank * base + rank.min(surplus);
        let held = (0..n_ranks).map(|rank| (first(rank)..first(rank + 1)).collect()).collect();
        Self::new(n_experts, held).expect("each expert is in one range")
    }

    /// Expert `e` on rank `e % n_ranks` (vLLM's `round_robin`).
    pub fn round_robin(n_experts: usize, n_ranks: usize) -> Self {
        let held = (0..n_ranks).map(|rank| (rank..n_experts).step_by(n_ranks).collect()).collect();
        Self::new(n_experts, held).expect("each expert has one remainder")
    }

    /// Number of experts.
    pub fn n_experts(&self) -> usize {
        self.replicas.len()
    }

    /// Number of ranks.
    pub fn n_ranks(&self) -> usize {
        self.held.len()
    }

    /// Global ids that a rank holds, by local id.
    pub fn held(&self, rank: usize) -> &[usize] {
        &self.held[rank]
    }

    /// Rank and local id of each replica of an expert, ascending.
    pub fn places(&self, expert: usize) -> impl Iterator<Item = (usize, usize)> {
        self.replicas[expert].iter().copied()
    }

    /// Rank and local id that serve row `token` of a step, `None` for ids out of range. Replicas
    /// are spread by a hash (Knuth's, as vLLM does), so that the choice is the same everywhere.
    pub fn of(&self, token: usize, expert: i32) -> Option<(usize, usize)> {
        let replicas = self.replicas.get(usize::try_from(expert).ok()?)?;
        let hash = (token as u32).wrapping_mul(0x9E37_79B9);
        Some(replicas[hash as usize % replicas.len()])
    }

    /// The same for one rank as a table for a kernel: the number of
    /// replicas, then each one's local id, or -1 where it is on another rank.
    /// `[experts, cols]`, with a column more than the most replicas or wider
    pub fn map(&self, rank: usize, cols: usize) -> Vec<i32> {
        let mut map = vec![-1; self.n_experts() * cols];
        for (row, replicas) in map.chunks_mut(cols).zip(&self.replicas) {
            row[0] = replicas.len() as i32;
            for (out, place) in row[1..].iter_mut().zip(replicas) {
                *out = if place.0 == rank { place.1 as i32 } else { -1 };
            }
        }
        map
    }

    /// Places of a rank whose expert is another one than in `old`, with their new expert.
    pub fn changes(&self, old: &Self, rank: usize) -> Vec<(usize, usize)> {
        let held = self.held[rank].iter().copied().enumerate();
        held.filter(|&(place, expert)| old.held[rank].get(place) != Some(&expert)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn linear_and_round_robin_are_those_of_vllm() {
        let linear = Owners::linear(7, 3);
        assert_eq!(linear.held, [vec![0, 1, 2], vec![3, 4], vec![5, 6]]);
        assert_eq!(linear.map(1, 2), [1, -1, 1, -1, 1, -1, 1, 0, 1, 1, 1, -1, 1, -1]);
        let round_robin = Owners::round_robin(7, 3);
        assert_eq!(round_robin.held, [vec![0, 3, 6], vec![1, 4], vec![2, 5]]);
        assert_eq!(round_robin.of(9, 4), Some((1, 1)));
        assert_eq!((round_robin.of(0, -1), round_robin.of(0, 7)), (None, None));
        // More ranks than experts: some hold none.
        assert_eq!(Owners::linear(2, 4).held, [vec![0], vec![1], vec![], vec![]]);
    }

    #[test]
    fn incomplete_placements_are_refused() {
        for (held, says) in [
            (vec![vec![0, 1], vec![3]], "leaves out expert 2"),
            (vec![vec![0, 1], vec![2, 3, 4]], "expert 4"),
            (vec![vec![0, 1, 1], vec![2, 3]], "twice"),
        ] {
            let error = Owners::new(4, held).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
    }

    proptest! {
        /// Every token has exactly one rank for each expert, and the maps say the same.
        #[test]
        fn maps_of_all_ranks_agree(
            (n_ranks, places) in (1usize..5).prop_flat_map(|n| {
                (Just(n), prop::collection::vec(1u32..(1 << n), 1..20))
            }),
            token in 0usize..5000,
            redundant in prop::option::of(0usize..4),
        ) {
            let on = |rank: usize| (0..places.len()).filter(move |_| rank < n_ranks);
            let held = (0..n_ranks)
                .map(|rank| on(rank).filter(|&e| places[e] >> rank & 1 == 1).collect())
                .collect();
            let owners = Owners::new(places.len(), held).unwrap();
            for expert in 0..places.len() {
                let (owner, local) = owners.of(token, expert as i32).unwrap();
                prop_assert_eq!(owners.held(owner)[local], expert);
                for rank in 0..n_ranks {
                    let share = Share { owners: vec![owners.clone()], rank, redundant };
                    let (cols, map) = share.map(0);
                    let row = &map[expert * cols..][..cols];
                    let hash = (token as u32).wrapping_mul(0x9E37_79B9) as usize;
                    let mapped = row[1 + hash % row[0] as usize];
                    prop_assert_eq!(mapped, if rank == owner { local as i32 } else { -1 });
                }
            }
        }
    }
}
