//! Expert parallelism load balancer (EPLB): which experts to copy and where to put them so that all
//! devices have the same work. DeepSeek's algorithm (github.com/deepseek-ai/EPLB, as in vLLM), one
//! layer at a time; ties go to the lower index. Pure arithmetic over loads, any unit.

/// What [`rebalance`] spreads experts over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    /// Slots for experts, copies included, over all devices.
    pub n_slots: usize,
    /// Groups of experts that are routed to together and should share a node.
    pub n_groups: usize,
    /// Hosts.
    pub n_nodes: usize,
    /// Devices over all hosts, each with the same number of slots.
    pub n_devices: usize,
}

/// The expert in each slot, slots of a device side by side, for one layer's loads.
/// `[experts]` to `[slots]`
///
/// Where groups fill nodes evenly they are packed to nodes first, so that tokens cross nodes less;
/// otherwise experts go anywhere. `None` unless devices divide slots, and there are slots enough.
pub fn rebalance(load: &[f64], cluster: Cluster) -> Option<Vec<usize>> {
    let Cluster { n_slots, n_groups, n_nodes, n_devices } = cluster;
    let splits = |n: usize, parts: usize| parts > 0 && n.is_multiple_of(parts);
    if load.len() > n_slots || !splits(n_slots, n_devices) || load.is_empty() {
        return None;
    }
    let nested = splits(n_groups, n_nodes)
        && splits(load.len(), n_groups)
        && splits(n_devices, n_nodes)
        && n_groups > 0;
    Some(match nested {
        true => hierarchical(load, cluster),
        false => hierarchical(load, Cluster { n_groups: 1, n_nodes: 1, ..cluster }),
    })
}

/// Groups to nodes, copies within a node, slots of a node to its devices.
fn hierarchical(load: &[f64], cluster: Cluster) -> Vec<usize> {
    let Cluster { n_slots, n_groups, n_nodes, n_devices } = cluster;
    let group_size = load.len() / n_groups;
    let groups: Vec<f64> = load.chunks(group_size).map(|g| g.iter().sum()).collect();
    let mut slots = Vec::with_capacity(n_slots);
    for node in balanced_packing(&groups, n_nodes) {
        let experts: Vec<usize> =
            node.iter().flat_map(|g| g * group_size..(g + 1) * group_size).collect();
        let loads: Vec<f64> = experts.iter().map(|&e| load[e]).collect();
        let (copies, counts) = replicate(&loads, n_slots / n_nodes, usize::MAX);
        let shares: Vec<f64> = copies.iter().map(|&e| loads[e] / counts[e] as f64).collect();
        let packed = balanced_packing(&shares, n_devices / n_nodes);
        slots.extend(packed.into_iter().flatten().map(|slot| experts[copies[slot]]));
    }
    slots
}

/// Items of each of `n_packs` equally full packs of about the same weight: the heaviest item first,
/// each to the lightest pack with room. `n_packs` divides the number of items.
fn balanced_packing(weights: &[f64], n_packs: usize) -> Vec<Vec<usize>> {
    let n = weights.len() / n_packs;
    if n == 1 {
        return (0..n_packs).map(|item| vec![item]).collect();
    }
    let (mut packs, mut sums) = (vec![Vec::new(); n_packs], vec![0.0; n_packs]);
    for item in by_weight(weights) {
        let free = (0..n_packs).filter(|&p| packs[p].len() < n);
        let pack = free.min_by(|&a, &b| f64::total_cmp(&sums[a], &sums[b])).expect("room for all");
        packs[pack].push(item);
        sums[pack] += weights[item];
    }
    packs
}

/// Indices, the heaviest first.
pub(super) fn by_weight(weights: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|&a, &b| weights[b].total_cmp(&weights[a]));
    order
}

/// Copies the expert with the largest load per copy until `n_slots` are used or all have
/// `copies_max`. The expert of each slot, originals first, and the copies of each expert.
pub fn replicate(load: &[f64], n_slots: usize, copies_max: usize) -> (Vec<usize>, Vec<usize>) {
    let (mut slots, mut counts) = ((0..load.len()).collect::<Vec<_>>(), vec![1; load.len()]);
    while slots.len() < n_slots {
        let share = |&e: &usize| load[e] / counts[e] as f64;
        let more = (0..load.len()).filter(|&e| counts[e] < copies_max);
        // The first of equals, where `max_by` would take the last.
        let Some(e) = more.rev().max_by(|a, b| share(a).total_cmp(&share(b))) else { break };
        slots.push(e);
        counts[e] += 1;
    }
    (slots, counts)
}

/// Orders a device's new experts so that those that it keeps stay in their slots and only others
/// have to be moved.
pub fn preserve_slots(old: &[usize], new: &[usize]) -> Vec<usize> {
    let mut coming: Vec<Option<usize>> = new.iter().copied().map(Some).collect();
    let mut take =
        |wanted: usize| coming.iter_mut().find(|e| **e == Some(wanted)).and_then(Option::take);
    let kept: Vec<Option<usize>> =
        (0..new.len()).map(|slot| old.get(slot).and_then(|&e| take(e))).collect();
    let mut rest = coming.into_iter().flatten();
    kept.into_iter().filter_map(|e| e.or_else(|| rest.next())).collect()
}

/// How even work is: 1 where all devices finish together, towards 0 where one has it all. The sum
/// over layers of the mean over the sum of the largest loads, as vLLM reports it; loads of unlike
/// devices count by `speeds`. `loads` is `[layers][devices]`, `speeds` `[devices]`.
pub fn balancedness(loads: &[Vec<f64>], speeds: &[f64]) -> f64 {
    let speed: f64 = speeds.iter().sum();
    let best: f64 = loads.iter().flatten().sum::<f64>() / speed;
    let worst: f64 = loads.iter().map(|layer| slowest(layer, speeds)).sum();
    if worst > 0.0 { best / worst } else { 1.0 }
}

fn slowest(loads: &[f64], speeds: &[f64]) -> f64 {
    loads.iter().zip(speeds).map(|(load, speed)| load / speed).fold(0.0, f64::max)
}

/// Whether weights should move from one [`balancedness`] to another: the largest load over the mean
/// falls by the share `least` or more (vLLM's rule, with 0.05).
pub fn is_improvement(before: f64, after: f64, least: f64) -> bool {
    let (before, after) = (1.0 / before, 1.0 / after);
    (before - after) / before >= least
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ROWS: [[f64; 12]; 2] = [
        [90., 132., 40., 61., 104., 165., 39., 4., 73., 56., 183., 86.],
        [20., 107., 104., 64., 19., 197., 187., 157., 172., 86., 16., 27.],
    ];

    fn loads(slots: &[usize], load: &[f64], n_devices: usize) -> Vec<f64> {
        let copies = |e: usize| slots.iter().filter(|&&s| s == e).count() as f64;
        let share = |&e: &usize| load[e] / copies(e);
        slots.chunks(slots.len() / n_devices).map(|d| d.iter().map(share).sum()).collect()
    }

    #[test]
    fn the_published_example_is_reproduced() {
        let cluster = Cluster { n_slots: 16, n_groups: 4, n_nodes: 2, n_devices: 8 };
        let slots = ROWS.map(|row| rebalance(&row, cluster).unwrap());
        assert_eq!(slots[0], [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1]);
        assert_eq!(slots[1], [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1]);
    }

    #[test]
    fn odd_cases_fall_back_or_fail() {
        let cluster = Cluster { n_slots: 16, n_groups: 4, n_nodes: 2, n_devices: 8 };
        // Groups that do not fill nodes: as if there were one node.
        let flat = Cluster { n_groups: 1, n_nodes: 1, ..cluster };
        for odd in [Cluster { n_groups: 3, ..cluster }, Cluster { n_groups: 0, ..cluster }] {
            assert_eq!(rebalance(&ROWS[0], odd), rebalance(&ROWS[0], flat));
        }
        for bad in [
            Cluster { n_devices: 3, ..cluster },
            Cluster { n_devices: 0, ..cluster },
            Cluster { n_slots: 8, ..cluster },
        ] {
            assert_eq!(rebalance(&ROWS[0], bad), None, "{bad:?}");
        }
        // Equal loads and no room for copies: each expert once.
        let exact = Cluster { n_slots: 12, n_groups: 1, n_nodes: 1, n_devices: 4 };
        let mut slots = rebalance(&[1.0; 12], exact).unwrap();
        slots.sort();
        assert_eq!(slots, (0..12).collect::<Vec<_>>());
        // One expert has it all: it gets every copy.
        let mut skewed = [0.0; 12];
        skewed[7] = 100.0;
        let slots = rebalance(&skewed, Cluster { n_slots: 16, ..exact }).unwrap();
        assert_eq!(slots.iter().filter(|&&e| e == 7).count(), 5);
    }

    #[test]
    fn a_skewed_load_becomes_balanced() {
        // Zipf's law over 64 experts on 8 devices, one after another.
        let load: Vec<f64> = (1..=64).map(|rank| 1e6 / f64::from(rank)).collect();
        let before = loads(&(0..64).collect::<Vec<_>>(), &load, 8);
        let cluster = Cluster { n_slots: 80, n_groups: 1, n_nodes: 1, n_devices: 8 };
        let after = loads(&rebalance(&load, cluster).unwrap(), &load, 8);
        let [before, after] = [before, after].map(|l| balancedness(&[l], &[1.0; 8]));
        assert!(before < 0.6 && after > 0.9, "{before} to {after}");
        assert!(is_improvement(before, after, 0.05) && !is_improvement(after, after, 0.05));
        assert!(!is_improvement(0.96, 0.99, 0.05) && is_improvement(0.90, 0.96, 0.05));
    }

    #[test]
    fn balancedness_is_that_of_vllm() {
        let loads = [vec![10.0, 30.0], vec![20.0, 20.0]];
        assert_eq!(balancedness(&loads, &[1.0, 1.0]), 40.0 / 50.0);
        // A device three times as fast is even with three times the load.
        assert_eq!(balancedness(&loads[..1], &[0.5, 1.5]), 1.0);
        assert_eq!(balancedness(&[vec![0.0, 0.0]], &[1.0, 1.0]), 1.0);
    }

    #[test]
    fn kept_experts_stay_in_their_slots() {
        assert_eq!(preserve_slots(&[3, 1, 4, 1], &[1, 5, 3, 1]), [3, 1, 5, 1]);
        assert_eq!(preserve_slots(&[7, 8, 9], &[9, 2]), [9, 2]);
        assert_eq!(preserve_slots(&[], &[2, 0]), [2, 0]);
    }

    proptest! {
        #[test]
        fn every_expert_has_a_slot(
            load in prop::collection::vec(0.0f64..1e6, 1..40),
            n_devices in 1usize..9,
            extra in 0usize..20,
            (n_groups, n_nodes) in (1usize..5, 1usize..4),
        ) {
            let n_slots = (load.len() + extra).next_multiple_of(n_devices);
            let cluster = Cluster { n_slots, n_groups, n_nodes, n_devices };
            let slots = rebalance(&load, cluster).unwrap();
            prop_assert_eq!(slots.len(), n_slots);
            prop_assert!((0..load.len()).all(|e| slots.contains(&e)));
            let per_device = n_slots / n_devices;
            let old: Vec<usize> = (0..per_device).map(|i| i % load.len()).collect();
            for new in slots.chunks(per_device) {
                let mut ordered = preserve_slots(&old, new);
                let mut new = new.to_vec();
                ordered.sort();
                new.sort();
                prop_assert_eq!(ordered, new);
            }
        }
    }
}
