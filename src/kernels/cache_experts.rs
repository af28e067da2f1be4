//! Which of a layer's chosen experts must come to the device, and whose slots they get. Knows
//! numbers of experts and slots, not weights.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

/// One turn of a layer whose experts outnumber its slots. `out[t, j]` = slot of expert
/// `ids[t, j]`, -1 where that has its turn before or after; `moves` = experts that must be copied
/// into slots before. Turns are groups of chosen experts that fit the slots, by number: the same
/// ones whatever the slots hold, so that sums have one order.
#[derive(Debug, Clone, Copy)]
pub struct CacheExperts {
    /// Chosen experts; those out of range become -1. I32 `[n, top_k]`
    pub ids: Tensor,
    /// Zeros at first. [`CacheExperts::COUNTERS`] and more, slot + 1 of each expert (0 where it
    /// has none), expert + 1 of each slot, turn of each expert's last use, its uses.
    /// U32 `[CacheExperts::words]`
    pub state: Tensor,
    /// Number of moves and 0, then expert and slot of each. U32 `[1 + n_slots, 2]`
    pub moves: Tensor,
    /// I32 `[n, top_k]`
    pub out: Tensor,
    /// Experts that there are.
    pub n_experts: usize,
    /// Slots for them.
    pub n_slots: usize,
    /// Which turn.
    pub turn: usize,
    /// Whether the expert that was used least gives its slot up, older uses counting less; else the
    /// one that was not used for longest.
    pub by_uses: bool,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct CacheExpertsParams {
        n: u32,
        n_experts: u32,
        n_slots: u32,
        turn: u32,
        by_uses: u32,
    }
}

/// Uses older than so many turns count half.
const HALF_LIFE: u32 = 64;
/// Words of the state before its tables.
const HEADER: usize = 8;

impl CacheExperts {
    /// Most experts of a layer that has slots.
    pub const MOST_EXPERTS: usize = 1024;
    /// First words of the state, each modulo 2^32: turns; chosen experts that were in a slot;
    /// those that had to come; turns that had to wait for any; turns beyond the first.
    pub const COUNTERS: usize = 5;

    /// Words of the state.
    pub fn words(n_experts: usize, n_slots: usize) -> usize {
        HEADER + 3 * n_experts + n_slots
    }

    /// Bytes of the state that say what is where; zeros there forget all of it.
    pub fn tables(n_experts: usize, n_slots: usize) -> std::ops::Range<u64> {
        let bytes = |words: usize| 4 * words as u64;
        bytes(HEADER)..bytes(HEADER + n_experts + n_slots)
    }
}

impl Kernel for CacheExperts {
    const NAME: &'static str = "cache_experts";
    type Params = CacheExpertsParams;

    fn launch(&self, _: &Caps) -> Launch<CacheExpertsParams> {
        let Self { ids, state, moves, out, n_experts, n_slots, turn, by_uses } = *self;
        assert_eq!(ids.len(), out.len(), "{ids} and {out} differ");
        assert!(n_experts <= Self::MOST_EXPERTS && n_slots <= n_experts, "{self:?}");
        assert!(state.len() >= Self::words(n_experts, n_slots), "{state} is too small");
        assert!(moves.len() >= 2 * (1 + n_slots), "{moves} is too small");
        Launch {
            shader: Shader::new(Self::NAME),
            params: CacheExpertsParams {
                n: ids.len() as u32,
                n_experts: n_experts as u32,
                n_slots: n_slots as u32,
                turn: turn as u32,
                by_uses: by_uses.into(),
            },
            bindings: vec![
                Binding::read(ids),
                Binding::write(state),
                Binding::write(moves),
                Binding::write(out),
            ],
            grid: [1, 1, 1],
        }
    }

    fn twin(p: &CacheExpertsParams, io: &Io<'_>) {
        let (n_experts, n_slots) = (p.n_experts as usize, p.n_slots as usize);
        let (ids, mut out) = (io.read::<i32>(0), io.write::<i32>(3));
        let (mut state, mut moves) = (io.write::<u32>(1), io.write::<u32>(2));
        let (ids, out) = (&ids[..p.n as usize], &mut out[..p.n as usize]);
        let (header, rest) = state.split_at_mut(HEADER);
        let (slot_of, rest) = rest.split_at_mut(n_experts);
        let (expert_of, rest) = rest.split_at_mut(n_slots);
        let (last_use, n_uses) = rest.split_at_mut(n_experts);
        let id = |&id: &i32| usize::try_from(id).ok().filter(|&e| e < n_experts);
        let chosen: Vec<usize> =
            (0..n_experts).filter(|&e| ids.iter().any(|chosen| id(chosen) == Some(e))).collect();
        let wanted = chosen.chunks(n_slots).nth(p.turn as usize).unwrap_or_default();
        let mut n_missing = 0;
        if !wanted.is_empty() {
            header[0] = header[0].wrapping_add(1);
            if header[0].is_multiple_of(HALF_LIFE) {
                n_uses[..n_experts].iter_mut().for_each(|uses| *uses /= 2);
            }
            for &expert in wanted {
                last_use[expert] = header[0];
                n_uses[expert] += 1;
            }
            let missing = wanted.iter().copied().filter(|&e| slot_of[e] == 0);
            for expert in missing.collect::<Vec<usize>>() {
                // An empty slot, else by policy among those without use in this turn.
                let worth = |&slot: &usize| match expert_of[slot] as usize {
                    0 => (0, 0),
                    held if wanted.contains(&(held - 1)) => (u32::MAX, last_use[held - 1]),
                    held if p.by_uses > 0 => (1 + n_uses[held - 1], last_use[held - 1]),
                    held => (1, last_use[held - 1]),
                };
                let slot = (0..n_slots).min_by_key(worth).expect("slots for all that are wanted");
                if let Some(old) = expert_of[slot].checked_sub(1) {
                    slot_of[old as usize] = 0;
                }
                (expert_of[slot], slot_of[expert]) = (expert as u32 + 1, slot as u32 + 1);
                moves[2 + 2 * n_missing] = expert as u32;
                moves[3 + 2 * n_missing] = slot as u32;
                n_missing += 1;
            }
            let n_missing = n_missing as u32;
            let counts =
                [wanted.len() as u32 - n_missing, n_missing, n_missing.min(1), p.turn.min(1)];
            header[1..].iter_mut().zip(counts).for_each(|(sum, n)| *sum = sum.wrapping_add(n));
        }
        (moves[0], moves[1]) = (n_missing as u32, 0);
        for (out, chosen) in out.iter_mut().zip(ids) {
            let expert = id(chosen).filter(|expert| wanted.contains(expert));
            *out = expert.map_or(-1, |expert| slot_of[expert] as i32 - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{
            Allocate,
            DType::{I32, U32},
            Device, Recording,
        },
        kernels::testing::check,
    };

    #[test]
    fn parity() {
        for (n, top_k, n_experts, n_slots) in
            [(1, 1, 1, 1), (1, 4, 32, 4), (9, 3, 40, 7), (300, 8, 128, 50), (40, 8, 1024, 1024)]
        {
            check(0.0, |bench, rec| {
                let state = vec![0; CacheExperts::words(n_experts, n_slots)];
                let state = bench.ints(&[state.len()], U32, &state);
                let moves = bench.ints(&[1 + n_slots, 2], U32, &vec![9; 2 + 2 * n_slots]);
                for step in 0..5 {
                    // Padding, ids out of range, and some experts more often than others.
                    let ids: Vec<u32> = (0..n * top_k)
                        .map(|i| match i % 11 {
                            9 => u32::MAX,
                            10 => n_experts as u32,
                            _ => (bench.uniform() * bench.uniform() * n_experts as f32) as u32,
                        })
                        .collect();
                    let ids = bench.ints(&[n, top_k], I32, &ids);
                    for turn in 0..n_experts.min(n * top_k).div_ceil(n_slots) {
                        let out = bench.ints(&[n, top_k], I32, &vec![7; n * top_k]);
                        let by_uses = step % 2 == 1;
                        rec.push(CacheExperts {
                            ids,
                            state,
                            moves,
                            out,
                            n_experts,
                            n_slots,
                            turn,
                            by_uses,
                        });
                    }
                }
            });
        }
    }

    /// A cache on the CPU device that is asked for experts.
    struct Cache {
        device: Device,
        kernel: CacheExperts,
    }

    impl Cache {
        fn new(n_experts: usize, n_slots: usize, by_uses: bool) -> Self {
            let mut device = Device::cpu();
            let mut alloc = |shape: &[usize], dtype| device.alloc("test", shape, dtype).unwrap();
            let (ids, out) = (alloc(&[1, 8], I32), alloc(&[1, 8], I32));
            let state = alloc(&[CacheExperts::words(n_experts, n_slots)], U32);
            let moves = alloc(&[1 + n_slots, 2], U32);
            let turn = 0;
            let kernel = CacheExperts { ids, state, moves, out, n_experts, n_slots, turn, by_uses };
            Self { device, kernel }
        }

        /// What has to come in a turn, with its slots, and the slots of all that are wanted.
        fn take(&mut self, wanted: &[i32], turn: usize) -> (Vec<[u32; 2]>, Vec<i32>) {
            let mut ids = wanted.to_vec();
            ids.resize(8, -1);
            self.device.write(&self.kernel.ids, &ids);
            let mut rec = Recording::new(&self.device.caps());
            rec.push(CacheExperts { turn, ..self.kernel });
            let plan = self.device.prepare(rec).unwrap();
            self.device.run(&plan).unwrap();
            let moves: Vec<[u32; 2]> = self.device.read_now(&self.kernel.moves).unwrap();
            let out: Vec<i32> = self.device.read_now(&self.kernel.out).unwrap();
            (moves[1..][..moves[0][0] as usize].to_vec(), out[..wanted.len()].to_vec())
        }
    }

    #[test]
    fn the_policy_says_who_goes() {
        for (by_uses, gone) in [(false, 0), (true, 1)] {
            let mut cache = Cache::new(4, 2, by_uses);
            assert_eq!(cache.take(&[0], 0), (vec![[0, 0]], vec![0]));
            assert_eq!(cache.take(&[0], 0), (vec![], vec![0]));
            assert_eq!(cache.take(&[1], 0), (vec![[1, 1]], vec![1]));
            // Expert 0 was used more often, expert 1 later.
            let (moves, slots) = cache.take(&[2], 0);
            assert_eq!(moves, [[2, gone]], "by uses: {by_uses}");
            assert_eq!(slots, [gone as i32]);
        }
    }

    #[test]
    fn old_fame_fades() {
        let mut cache = Cache::new(3, 2, true);
        (0..40).for_each(|_| drop(cache.take(&[0], 0)));
        (0..500).for_each(|_| drop(cache.take(&[1], 0)));
        (0..20).for_each(|_| drop(cache.take(&[2], 0)));
        let (moves, _) = cache.take(&[0], 0);
        assert_eq!(moves.len(), 1, "it was used most, but long ago");
    }

    #[test]
    fn turns_do_not_depend_on_what_is_held() {
        let mut cache = Cache::new(8, 3, false);
        let ids = [7, -1, 2, 9, 2, 0, 5];
        for _ in 0..2 {
            let turns = [0, 1, 2].map(|turn| cache.take(&ids, turn).1);
            let served = |slots: &[i32]| -> Vec<i32> {
                ids.iter().zip(slots).filter(|(_, slot)| **slot >= 0).map(|(&id, _)| id).collect()
            };
            assert_eq!(turns.map(|slots| served(&slots)), [vec![2, 2, 0, 5], vec![7], vec![]]);
        }
        // Two turns twice, of which one had its expert already; the empty third ones count nothing.
        let counters: Vec<u32> = cache.device.read_now(&cache.kernel.state).unwrap();
        let [turns, hits, misses, stalls, extra] = counters[..CacheExperts::COUNTERS] else {
            panic!("five counters")
        };
        assert_eq!((turns, hits + misses, extra), (4, 8, 2));
        assert!(stalls >= 2 && misses >= 4, "{counters:?}");
    }
}
