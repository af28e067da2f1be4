//! When to move experts between devices, and which, from the work that they had since last time.
//! Decides and counts; whoever holds the weights moves them, a layer between two steps.

use std::collections::VecDeque;

use super::{Owners, ParallelError, Placement, Rank, is_improvement};

/// How experts are balanced while a model runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EplbOptions {
    /// Steps from one look at the experts' work to the next.
    pub interval: u64,
    /// Copies of experts in each layer beyond one of each.
    pub redundant: usize,
    /// Least relative gain of the largest load over the mean that is worth moving weights for;
    /// vLLM's rule takes 0.05.
    pub threshold: f64,
}

/// What balancing has done since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EplbStats {
    /// Times that experts were moved.
    pub rebalances: u64,
    /// Experts written to a place.
    pub experts_moved: u64,
    /// Bytes of them.
    pub bytes_moved: u64,
    /// [`super::balancedness`] of the last window's work as it was placed.
    pub balancedness: f64,
    /// The same before the last move, and what the move promised.
    pub last_move: Option<(f64, f64)>,
}

/// Watches the experts' work and plans moves.
#[derive(Debug, Clone)]
pub struct Rebalancer {
    options: EplbOptions,
    ranks: Vec<Rank>,
    current: Placement,
    /// Layers to move, and where to.
    pending: VecDeque<(usize, Owners)>,
    /// Work of each expert at the last look. `[layers, experts]`
    seen: Vec<u64>,
    looked: u64,
    stats: EplbStats,
}

impl Rebalancer {
    /// Starts from a placement on these devices.
    pub fn new(options: EplbOptions, ranks: Vec<Rank>, current: Placement) -> Self {
        let (pending, seen) = (VecDeque::new(), Vec::new());
        let stats = EplbStats { balancedness: 1.0, ..EplbStats::default() };
        Self { options, ranks, current, pending, seen, looked: 0, stats }
    }

    /// What it has done.
    pub fn stats(&self) -> EplbStats {
        self.stats
    }

    /// Looks at the experts' work since the start, once an interval, and plans a move if that is
    /// worth it. `tokens` is `[layers, most experts of a layer]`.
    ///
    /// # Errors
    /// Those of [`Placement::balanced`].
    pub fn look(&mut self, step: u64, tokens: &[u64]) -> Result<(), ParallelError> {
        let due = step >= self.looked + self.options.interval.max(1);
        let n_layers = self.current.layers().len();
        if !due || !self.pending.is_empty() || n_layers == 0 {
            return Ok(());
        }
        let stride = tokens.len() / n_layers;
        let new = |at: usize| tokens[at] - self.seen.get(at).copied().unwrap_or(0);
        let layers = self.current.layers().iter().enumerate();
        let loads: Vec<Vec<f64>> = layers
            .map(|(i, layer)| (0..layer.n_experts()).map(|e| new(i * stride + e) as f64).collect())
            .collect();
        if loads.iter().flatten().all(|&load| load == 0.0) {
            return Ok(());
        }
        self.looked = step;
        self.seen = tokens.to_vec();
        self.stats.balancedness = self.current.balancedness(&loads, &self.ranks);
        let target = Placement::balanced(&loads, &self.ranks, self.options.redundant)?;
        let (before, after) = (self.stats.balancedness, target.balancedness(&loads, &self.ranks));
        if is_improvement(before, after, self.options.threshold) {
            let target = target.keeping(&self.current)?;
            let layers = target.layers().iter().cloned().enumerate();
            self.pending = layers.filter(|(i, new)| *new != self.current.layers()[*i]).collect();
            self.stats.rebalances += 1;
            self.stats.last_move = Some((before, after));
        }
        Ok(())
    }

    /// The next layer to move and its new owners.
    pub fn next_move(&mut self) -> Option<(usize, Owners)> {
        self.pending.pop_front()
    }

    /// Owners of a layer's experts now.
    pub fn owners(&self, layer: usize) -> &Owners {
        &self.current.layers()[layer]
    }

    /// A layer has moved: `n` experts of `bytes` together.
    pub fn moved(&mut self, layer: usize, new: Owners, n: u64, bytes: u64) {
        self.current.set(layer, new);
        self.stats.experts_moved += n;
        self.stats.bytes_moved += bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Share;

    const OPTIONS: EplbOptions = EplbOptions { interval: 10, redundant: 16, threshold: 0.05 };

    /// 64 experts on 8 devices with room for two copies each.
    fn start(n_layers: usize) -> Rebalancer {
        let placement = Placement::linear(n_layers, 64, 8);
        let owners = placement.layers().to_vec();
        let share = |rank| Share { owners: owners.clone(), rank, redundant: Some(16) };
        let rank = |rank| Rank { slots: share(rank).places(0), speed: 1.0, visit_s: 0.0 };
        let ranks: Vec<Rank> = (0..8).map(rank).collect();
        assert!(ranks.iter().all(|rank| rank.slots == 10), "two copies in each");
        Rebalancer::new(OPTIONS, ranks, placement)
    }

    /// Moves all that is pending.
    fn finish(balancer: &mut Rebalancer) -> usize {
        let mut n = 0;
        while let Some((layer, new)) = balancer.next_move() {
            assert!((0..8).all(|rank| new.held(rank).len() <= 10));
            balancer.moved(layer, new, 1, 7);
            n += 1;
        }
        n
    }

    /// Zipf's law, the busiest expert being `first`.
    fn zipf(first: usize) -> Vec<u64> {
        (0..64).map(|e| 1_000_000 / ((e + 64 - first) % 64 + 1) as u64).collect()
    }

    #[test]
    fn a_skewed_load_is_evened_out_once() {
        let mut balancer = start(3);
        let window = [zipf(0), zipf(20), zipf(50)].concat();
        balancer.look(9, &window).unwrap();
        assert_eq!(finish(&mut balancer), 0, "not yet");
        balancer.look(10, &window).unwrap();
        let (before, promised) = balancer.stats().last_move.expect("a move");
        assert!(before < 0.6 && promised > 0.9, "{before} to {promised}");
        assert_eq!(finish(&mut balancer), 3);
        // The same work again is balanced, and moves nothing more.
        let twice: Vec<u64> = window.iter().map(|n| 2 * n).collect();
        balancer.look(20, &twice).unwrap();
        let stats = balancer.stats();
        assert!(stats.balancedness > 0.9, "{stats:?}");
        assert_eq!((finish(&mut balancer), stats.rebalances), (0, 1));
        assert_eq!((stats.experts_moved, stats.bytes_moved), (3, 21));
        // Other work is another matter.
        let other: Vec<u64> =
            twice.iter().zip([zipf(33), zipf(7), zipf(60)].concat()).map(|(a, b)| a + b).collect();
        balancer.look(30, &other).unwrap();
        assert!(balancer.stats().balancedness < 0.6 && finish(&mut balancer) > 0);
    }

    #[test]
    fn no_work_and_even_work_move_nothing() {
        let mut balancer = start(1);
        balancer.look(10, &[0; 64]).unwrap();
        assert_eq!(balancer.stats().balancedness, 1.0);
        balancer.look(20, &[5; 64]).unwrap();
        assert_eq!((finish(&mut balancer), balancer.stats().rebalances), (0, 0));
    }
}
