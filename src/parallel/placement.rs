//! Which device holds which experts, in every layer: by rule, from a file, or balanced for a load.
//! Knows numbers of experts and devices' speeds, not weights.

use serde_json::{Value, json};

use super::{
    Owners, ParallelError,
    balance::{balancedness, by_weight, preserve_slots, replicate},
};

/// Owners of the experts of each layer that has some.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    layers: Vec<Owners>,
}

/// A device as [`Placement::balanced`] sees it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rank {
    /// Experts of one layer that its memory holds.
    pub slots: usize,
    /// Load that it computes in a second.
    pub speed: f64,
    /// Seconds that visiting it costs before it computes anything; 0 for the primary device.
    pub visit_s: f64,
}

impl Rank {
    /// Seconds of a layer in which the device has this load.
    pub fn seconds(&self, load: f64) -> f64 {
        if load > 0.0 { self.visit_s + load / self.speed } else { 0.0 }
    }
}

/// Most layers that a file may describe.
const LAYERS_MAX: usize = 4096;

impl Placement {
    /// From owners by layer.
    pub fn new(layers: Vec<Owners>) -> Self {
        Self { layers }
    }

    /// Consecutive experts on each device in every layer; see [`Owners::linear`].
    pub fn linear(n_layers: usize, n_experts: usize, n_ranks: usize) -> Self {
        Self { layers: vec![Owners::linear(n_experts, n_ranks); n_layers] }
    }

    /// Experts dealt out in turn in every layer; see [`Owners::round_robin`].
    pub fn round_robin(n_layers: usize, n_experts: usize, n_ranks: usize) -> Self {
        Self { layers: vec![Owners::round_robin(n_experts, n_ranks); n_layers] }
    }

    /// Reads `{"layers": [[[experts of device 0], [of device 1], ...], ...]}`; a single layer
    /// stands for all of them. The last `n_spare` experts, for which there is only room yet, may be
    /// left out, and are dealt out in turn.
    ///
    /// # Errors
    /// [`ParallelError::PlacementFile`] for anything else, or other numbers of layers and devices;
    /// [`ParallelError::Placement`] unless every expert has a place.
    pub fn from_json(
        text: &str,
        n_layers: usize,
        n_experts: usize,
        n_spare: usize,
        n_ranks: usize,
    ) -> Result<Self, ParallelError> {
        let bad = |cause: String| ParallelError::PlacementFile { cause };
        let file: Value = serde_json::from_str(text).map_err(|e| bad(e.to_string()))?;
        let layers: Vec<Vec<Vec<usize>>> = file
            .get("layers")
            .map(|layers| serde_json::from_value(layers.clone()))
            .ok_or_else(|| bad("it has no \"layers\"".to_owned()))?
            .map_err(|e| bad(format!("\"layers\" is no list of layers of lists: {e}")))?;
        if layers.len() > LAYERS_MAX || (layers.len() != 1 && layers.len() != n_layers) {
            return Err(bad(format!("it has {} layers, not 1 or {n_layers}", layers.len())));
        }
        if let Some(layer) = layers.iter().find(|layer| layer.len() != n_ranks) {
            return Err(bad(format!("it places on {} devices, not {n_ranks}", layer.len())));
        }
        let owners = |mut held: Vec<Vec<usize>>| {
            for spare in n_experts.saturating_sub(n_spare)..n_experts {
                if !held.iter().flatten().any(|&expert| expert == spare) {
                    held[spare % n_ranks].push(spare);
                }
            }
            Owners::new(n_experts, held)
        };
        let layers: Vec<Owners> = layers.into_iter().map(owners).collect::<Result<_, _>>()?;
        Ok(match &layers[..] {
            [all] => Self { layers: vec![all.clone(); n_layers] },
            _ => Self { layers },
        })
    }

    /// What [`Placement::from_json`] reads.
    pub fn to_json(&self) -> Value {
        let held = |layer: &Owners| (0..layer.n_ranks()).map(|r| json!(layer.held(r))).collect();
        json!({ "layers": self.layers.iter().map(held).collect::<Vec<Value>>() })
    }

    /// Places experts so that unlike devices finish together, with up to `n_redundant` copies of
    /// the busiest ones in each layer: heaviest first, each to the device that would finish it
    /// first (longest processing time first, Graham 1969), never twice to one device. That is a
    /// good placement, not always the best one, and not EPLB's: [`super::rebalance`] gives each
    /// device the same number of slots and may put two copies on one. `loads` is
    /// `[layers][experts]`.
    ///
    /// # Errors
    /// [`ParallelError::NoRoom`] if the devices have fewer slots than there are experts.
    pub fn balanced(
        loads: &[Vec<f64>],
        ranks: &[Rank],
        n_redundant: usize,
    ) -> Result<Self, ParallelError> {
        let n_slots: usize = ranks.iter().map(|rank| rank.slots).sum();
        let layer = |load: &Vec<f64>| {
            let n_experts = load.len();
            if n_slots < n_experts {
                return Err(ParallelError::NoRoom { n_experts, n_slots });
            }
            let wanted = n_slots.min(n_experts + n_redundant);
            let usable = ranks.iter().filter(|rank| rank.slots > 0).count();
            Owners::new(n_experts, spread(load, ranks, wanted, usable))
        };
        Ok(Self { layers: loads.iter().map(layer).collect::<Result<_, _>>()? })
    }

    /// Changes the owners of one layer.
    pub fn set(&mut self, layer: usize, owners: Owners) {
        self.layers[layer] = owners;
    }

    /// Owners by layer that has experts.
    pub fn layers(&self) -> &[Owners] {
        &self.layers
    }

    /// Number of devices.
    pub fn n_ranks(&self) -> usize {
        self.layers.first().map_or(1, Owners::n_ranks)
    }

    /// Most experts that a rank holds in any layer.
    pub fn slots(&self, rank: usize) -> usize {
        self.layers.iter().map(|layer| layer.held(rank).len()).max().unwrap_or(0)
    }

    /// Load of each device if `loads` are routed again. `[layers][experts]` to `[layers][ranks]`
    pub fn rank_loads(&self, loads: &[Vec<f64>]) -> Vec<Vec<f64>> {
        self.layers.iter().zip(loads).map(|(layer, load)| layer_loads(layer, load)).collect()
    }

    /// [`balancedness`] of a load under this placement, devices weighted by speed.
    pub fn balancedness(&self, loads: &[Vec<f64>], ranks: &[Rank]) -> f64 {
        let speeds: Vec<f64> = ranks.iter().map(|rank| rank.speed).collect();
        balancedness(&self.rank_loads(loads), &speeds)
    }

    /// Seconds of all layers: each waits for its slowest device.
    pub fn seconds(&self, loads: &[Vec<f64>], ranks: &[Rank]) -> f64 {
        let slowest = |layer: Vec<f64>| {
            layer.iter().zip(ranks).map(|(&load, rank)| rank.seconds(load)).fold(0.0, f64::max)
        };
        self.rank_loads(loads).into_iter().map(slowest).sum()
    }

    /// The same experts on the same devices, in the slots that they have in `old` where they can.
    ///
    /// # Errors
    /// Never for two placements of the same experts on the same devices.
    pub fn keeping(&self, old: &Self) -> Result<Self, ParallelError> {
        let layer = |(new, old): (&Owners, &Owners)| {
            let held = (0..new.n_ranks()).map(|r| preserve_slots(old.held(r), new.held(r)));
            Owners::new(new.n_experts(), held.collect())
        };
        let layers = self.layers.iter().zip(&old.layers).map(layer);
        Ok(Self { layers: layers.collect::<Result<_, _>>()? })
    }
}

/// Tokens are spread evenly over the replicas of their expert.
fn layer_loads(owners: &Owners, load: &[f64]) -> Vec<f64> {
    let mut copies = vec![0.0; owners.n_experts()];
    let ranks = 0..owners.n_ranks();
    ranks.clone().flat_map(|r| owners.held(r)).for_each(|&e| copies[e] += 1.0);
    ranks.map(|r| owners.held(r).iter().map(|&e| load[e] / copies[e]).sum()).collect()
}

/// The experts of each rank.
fn spread(load: &[f64], ranks: &[Rank], n_slots: usize, copies_max: usize) -> Vec<Vec<usize>> {
    let (slots, counts) = replicate(load, n_slots, copies_max);
    let shares: Vec<f64> = slots.iter().map(|&e| load[e] / counts[e] as f64).collect();
    let (mut held, mut loads) = (vec![Vec::new(); ranks.len()], vec![0.0; ranks.len()]);
    for slot in by_weight(&shares) {
        let (expert, share) = (slots[slot], shares[slot]);
        let done = |&rank: &usize| {
            let Rank { visit_s, speed, .. } = ranks[rank];
            visit_s + (loads[rank] + share) / speed
        };
        // Of equals the emptiest, so that experts without load are spread too.
        let free = (0..ranks.len())
            .filter(|&r| held[r].len() < ranks[r].slots && !held[r].contains(&expert));
        let best = free
            .min_by(|a, b| done(a).total_cmp(&done(b)).then(held[*a].len().cmp(&held[*b].len())));
        // A copy that only fits beside another one is not needed.
        let Some(rank) = best else { continue };
        held[rank].push(expert);
        loads[rank] += share;
    }
    held
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn alike(n: usize, slots: usize) -> Vec<Rank> {
        vec![Rank { slots, speed: 1.0, visit_s: 0.0 }; n]
    }

    #[test]
    fn files_are_read_back_and_checked() {
        let placement = Placement::round_robin(2, 5, 2);
        let text = placement.to_json().to_string();
        assert_eq!(text, r#"{"layers":[[[0,2,4],[1,3]],[[0,2,4],[1,3]]]}"#);
        assert_eq!(Placement::from_json(&text, 2, 5, 0, 2).unwrap(), placement);
        // One layer for all, with a replica.
        let one = Placement::from_json(r#"{"layers": [[[0, 1], [1, 2]]]}"#, 3, 3, 0, 2).unwrap();
        assert_eq!((one.layers().len(), one.slots(0), one.n_ranks()), (3, 2, 2));
        // Room for two more, one of which has a place.
        let room = Placement::from_json(r#"{"layers": [[[0, 4], [1, 2]]]}"#, 1, 5, 2, 2).unwrap();
        assert_eq!([0, 1].map(|rank| room.layers()[0].held(rank)), [&[0, 4][..], &[1, 2, 3]]);
        for (text, says) in [
            ("", "EOF"),
            ("[]", "no \"layers\""),
            (r#"{"layers": 3}"#, "no list of layers"),
            (r#"{"layers": [[[0, -1], [1, 2]]]}"#, "no list of layers"),
            (r#"{"layers": []}"#, "0 layers"),
            (r#"{"layers": [[[0, 1], [1, 2]], [[0, 1], [1, 2]]]}"#, "2 layers, not 1 or 3"),
            (r#"{"layers": [[[0, 1, 2]]]}"#, "on 1 devices, not 2"),
            (r#"{"layers": [[[0, 1], [1]]]}"#, "leaves out expert 2"),
            (r#"{"layers": [[[0, 1], [1, 2, 3]]]}"#, "expert 3"),
        ] {
            let error = Placement::from_json(text, 3, 3, 0, 2).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_skewed_load_becomes_balanced() {
        let load: Vec<f64> = (1..=64).map(|rank| 1e6 / f64::from(rank)).collect();
        let (loads, ranks) = (vec![load; 3], alike(8, 10));
        let before = Placement::linear(3, 64, 8).balancedness(&loads, &ranks);
        let after = Placement::balanced(&loads, &ranks, 16).unwrap();
        let after = after.balancedness(&loads, &ranks);
        assert!(before < 0.6 && after > 0.9, "{before} to {after}");
    }

    #[test]
    fn devices_get_what_they_can_compute_and_hold() {
        let loads = vec![vec![10.0; 12]];
        let rank = |slots, speed, visit_s| Rank { slots, speed, visit_s };
        let held = |ranks: &[Rank]| {
            let placement = Placement::balanced(&loads, ranks, 0).unwrap();
            (0..ranks.len()).map(|r| placement.slots(r)).collect::<Vec<_>>()
        };
        assert_eq!(held(&[rank(12, 3.0, 0.0), rank(12, 1.0, 0.0)]), [9, 3]);
        // Its memory is full.
        assert_eq!(held(&[rank(7, 3.0, 0.0), rank(12, 1.0, 0.0)]), [7, 5]);
        // Too slow, or too far away, to be worth a visit.
        assert_eq!(held(&[rank(12, 3.0, 0.0), rank(12, 0.1, 0.0)]), [12, 0]);
        assert_eq!(held(&[rank(12, 3.0, 0.0), rank(12, 3.0, 60.0)]), [12, 0]);
        let error = Placement::balanced(&loads, &alike(2, 5), 0).unwrap_err().to_string();
        assert!(error.contains("12 experts") && error.contains("10"), "{error}");
    }

    proptest! {
        #[test]
        fn every_expert_has_a_place_within_capacity(
            load in prop::collection::vec(prop_oneof![Just(0.0), 0.0f64..1e6], 1..40),
            ranks in prop::collection::vec((0usize..30, 0.01f64..10.0, 0.0f64..1e3), 1..6),
            n_redundant in 0usize..20,
        ) {
            let ranks: Vec<Rank> = ranks
                .into_iter()
                .map(|(slots, speed, visit_s)| Rank { slots, speed, visit_s })
                .collect();
            let n_slots: usize = ranks.iter().map(|r| r.slots).sum();
            let placed = Placement::balanced(std::slice::from_ref(&load), &ranks, n_redundant);
            prop_assert_eq!(placed.is_ok(), n_slots >= load.len());
            let Ok(placement) = placed else { return Ok(()) };
            let owners = &placement.layers()[0];
            prop_assert!((0..ranks.len()).all(|r| owners.held(r).len() <= ranks[r].slots));
            let used: usize = (0..ranks.len()).map(|r| owners.held(r).len()).sum();
            prop_assert!(used <= load.len() + n_redundant);
            // Maps are inverse to each other, and no load is lost.
            for (expert, token) in (0..load.len()).zip(0..) {
                let (rank, local) = owners.of(token, expert as i32).unwrap();
                prop_assert_eq!(owners.held(rank)[local], expert);
            }
            let sum: f64 = placement.rank_loads(std::slice::from_ref(&load))[0].iter().sum();
            prop_assert!((sum - load.iter().sum::<f64>()).abs() <= 1e-6 * (1.0 + sum));
            // Keeping slots changes order only.
            let old = Placement::round_robin(1, load.len(), ranks.len());
            let kept = placement.keeping(&old).unwrap();
            for rank in 0..ranks.len() {
                let mut a = kept.layers()[0].held(rank).to_vec();
                let mut b = owners.held(rank).to_vec();
                a.sort();
                b.sort();
                prop_assert_eq!(a, b);
            }
        }
    }
}
