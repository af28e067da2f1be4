//! Which of several devices should hold experts: each computes some of the model's size for a
//! moment, and those that only make others wait are left out.

use web_time::Instant;

use crate::{
    Result,
    device::{DType, Device, DeviceChoice, Tally},
    model::{
        ExpertShard, FfnSpec, KvCache, Limits, Model, ModelSpec, MoeSpec, Scratch, expert_bytes,
    },
    parallel::{
        CacheSlots, ExpertLayout, Owners, ParallelError, Placement, Rank, Rows, Share, Worker,
    },
    weights::{DummySource, mix, padded},
};

use super::LlmOptions;

/// Experts that a device computes to be measured, if the model has as many.
const MEASURED_EXPERTS: usize = 16;
/// Rows of a step at most.
const MEASURED_ROWS: usize = 64;
/// The median of so many runs counts.
const RUNS: usize = 7;

/// A device that could hold experts.
#[derive(Debug)]
pub(super) struct Candidate {
    pub(super) choice: DeviceChoice,
    pub(super) name: String,
    pub(super) rank: Rank,
}

/// Measures the primary device and all others in `options`.
pub(super) async fn candidates(
    options: &LlmOptions,
    spec: &ModelSpec,
    limits: &Limits,
    cache: Option<CacheSlots>,
) -> Result<Vec<Candidate>> {
    let mut all = Vec::new();
    let n_rows = options.max_num_seqs.clamp(1, MEASURED_ROWS);
    for choice in std::iter::once(&options.device).chain(&options.expert_devices) {
        let device = options.open(choice).await?;
        let (name, is_primary) = (device.describe(), all.is_empty());
        let slots = slots(options, spec, limits, &device, is_primary)?;
        let (speed, visit_s) = measure(device, spec, options, n_rows, cache)?;
        let visit_s = if is_primary { 0.0 } else { visit_s };
        all.push(Candidate { choice: choice.clone(), name, rank: Rank { slots, speed, visit_s } });
    }
    Ok(all)
}

/// Experts of every layer that fit a device's memory; the primary one holds the rest of the model.
fn slots(
    options: &LlmOptions,
    spec: &ModelSpec,
    limits: &Limits,
    device: &Device,
    is_primary: bool,
) -> Result<usize> {
    let precision = options.precision();
    if options.expert_cache.is_some() {
        // They stay in the host's memory.
        return Ok(spec.n_experts());
    }
    let share = f64::from(options.gpu_memory_utilization.clamp(0.01, 1.0));
    let given = options.memory_limit.filter(|_| is_primary);
    let total = given.or(device.memory_bytes().map(|bytes| (bytes as f64 * share) as u64));
    let Some(total) = total else { return Ok(spec.n_experts()) };
    let mut rest = Tally::new(device.caps());
    Scratch::alloc(&mut rest, spec, limits, precision)?;
    if is_primary {
        let elsewhere = |(_, moe): (_, &MoeSpec)| {
            let n = moe.routing.n_experts;
            Owners::new(n, vec![Vec::new(), (0..n).collect()])
        };
        let owners = spec.moe_layers().map(elsewhere).collect::<Result<_, _>>()?;
        let share = Some(Share { owners, rank: 0, redundant: None });
        let none = ExpertLayout { share, slots: None };
        Model::tally(spec, precision, limits.max_blocks * options.block_size, &none, &mut rest)?;
        let block = KvCache::block_bytes(spec, options.block_size, precision.activations);
        let least = block * (1 + limits.max_blocks as u64);
        rest.bytes += options.kv_cache_memory.unwrap_or(least).max(least);
    }
    let room = total.saturating_sub(rest.bytes) / expert_bytes(spec, precision).max(1);
    Ok(usize::try_from(room).unwrap_or(usize::MAX).min(spec.n_experts()))
}

/// Expert rows that a device computes in a second, with slots for as large a share of the experts
/// as it will have, and the seconds of a visit without any.
fn measure(
    device: Device,
    spec: &ModelSpec,
    options: &LlmOptions,
    n_rows: usize,
    cache: Option<CacheSlots>,
) -> Result<(f64, f64)> {
    let precision = options.precision();
    let mut small = spec.clone();
    small.layers.retain(|layer| matches!(layer.ffn, FfnSpec::Moe(_)));
    small.layers.truncate(1);
    let Some(FfnSpec::Moe(moe)) = small.layers.first_mut().map(|layer| &mut layer.ffn) else {
        return Ok((1.0, 0.0));
    };
    moe.n_spare = 0;
    let routing = &mut moe.routing;
    routing.n_experts = routing.n_experts.min(MEASURED_EXPERTS.max(routing.top_k));
    (routing.n_group, routing.topk_group) = (1, 1);
    let (n_experts, top_k) = (routing.n_experts, routing.top_k);
    let limits = Limits {
        max_tokens: n_rows,
        max_sequences: 1,
        max_logits: 1,
        max_blocks: 1,
        max_penalized: 1,
    };
    let limits = limits.fit(&small, &device.caps());
    let n_rows = limits.max_tokens.min(n_rows);
    // Visited as ranks beside the primary one are.
    let owners = Owners::new(n_experts, vec![Vec::new(), (0..n_experts).collect()])?;
    let share = Some(Share { owners: vec![owners], rank: 1, redundant: None });
    let of_measured = |slots: usize| (slots * n_experts).div_ceil(spec.n_experts()).max(top_k);
    let slots = cache.map(|cache| CacheSlots { n: of_measured(cache.n), ..cache });
    let layout = ExpertLayout { share, slots };
    let source = DummySource::new(0);
    let mut shard = ExpertShard::load(device, &small, &source, precision, &limits, &layout)?
        .with_block_align(options.moe_block_align);
    let element = if precision.activations == DType::F16 { 2 } else { 4 };
    let x = vec![0; n_rows * padded(spec.hidden_size) * element];
    let weights = vec![1.0; n_rows * top_k];
    let mut seconds = |choose: &mut dyn FnMut() -> Vec<i32>| -> Result<f64> {
        let mut all = Vec::new();
        for _ in 0..=RUNS {
            let ids = choose();
            let rows = Rows { x: &x, ids: &ids, weights: &weights, n: n_rows };
            let start = Instant::now();
            shard.submit(0, &rows)?;
            shard.finish(&mut |_| {})?;
            all.push(start.elapsed().as_secs_f64());
        }
        // The first run compiles.
        all[1..].sort_by(f64::total_cmp);
        Ok(all[1 + RUNS / 2])
    };
    let n = n_rows * top_k;
    let visit = seconds(&mut || vec![-1; n])?;
    let mut dice = Dice(1);
    let busy = seconds(&mut || (0..n_rows).flat_map(|_| dice.draw(n_experts, top_k)).collect())?;
    Ok((n as f64 / (busy - visit).max(1e-9), visit))
}

/// Chooses experts as an even router does.
struct Dice(u64);

impl Dice {
    /// `k` different ones of `n`.
    fn draw(&mut self, n: usize, k: usize) -> Vec<i32> {
        let mut all: Vec<i32> = (0..n as i32).collect();
        for i in 0..k {
            self.0 += 1;
            all.swap(i, i + (mix(self.0) % (n - i) as u64) as usize);
        }
        all.truncate(k);
        all
    }
}

/// The placement that is done first: balanced over the devices, or all on the primary one where
/// that fits and is no slower. `n_rows` are those of a step.
pub(super) fn choose(
    spec: &ModelSpec,
    ranks: &[Rank],
    n_rows: usize,
) -> Result<Placement, ParallelError> {
    let layers = spec.moe_layers().map(|(_, moe)| moe.routing);
    let even = |n_experts: usize, top_k: usize| {
        vec![(n_rows * top_k) as f64 / n_experts as f64; n_experts]
    };
    let loads: Vec<Vec<f64>> = layers.map(|r| even(r.n_experts, r.top_k)).collect();
    let spread = Placement::balanced(&loads, ranks, 0)?;
    if ranks[0].slots < spec.n_experts() {
        return Ok(spread);
    }
    let held = |n_experts: usize| {
        let rank = |rank: usize| if rank == 0 { (0..n_experts).collect() } else { Vec::new() };
        Owners::new(n_experts, (0..ranks.len()).map(rank).collect())
    };
    let alone = loads.iter().map(|load| held(load.len())).collect::<Result<_, _>>()?;
    let alone = Placement::new(alone);
    let is_faster = spread.seconds(&loads, ranks) < alone.seconds(&loads, ranks);
    Ok(if is_faster { spread } else { alone })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::arch, parallel::CachePolicy};

    fn spec() -> ModelSpec {
        let config = serde_json::json!({
            "model_type": "mixtral", "vocab_size": 8, "hidden_size": 32, "head_dim": 32,
            "num_attention_heads": 1, "num_hidden_layers": 2, "intermediate_size": 32,
            "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
        });
        arch::parse(&config).unwrap()
    }

    #[test]
    fn devices_that_make_others_wait_are_left_out() {
        let rank = |slots, speed, visit_s| Rank { slots, speed, visit_s };
        let held = |ranks: &[Rank]| {
            let placement = choose(&spec(), ranks, 4).unwrap();
            (0..ranks.len()).map(|r| placement.slots(r)).collect::<Vec<_>>()
        };
        // 8 rows of experts in a layer, on devices that take 1 ms and 4 ms for each.
        assert_eq!(held(&[rank(8, 1e3, 0.0), rank(8, 1e3, 0.0)]), [4, 4]);
        assert_eq!(held(&[rank(8, 1e3, 0.0), rank(8, 1e3, 1e-3), rank(8, 1.0, 0.0)])[2], 0);
        assert_eq!(held(&[rank(8, 1e3, 0.0), rank(8, 1e6, 1.0)]), [8, 0]);
        // Too slow, but needed.
        assert_eq!(held(&[rank(5, 1e3, 0.0), rank(8, 1.0, 1.0)]), [5, 3]);
        let error = choose(&spec(), &[rank(5, 1.0, 0.0)], 1).unwrap_err();
        assert!(matches!(error, ParallelError::NoRoom { .. }));
    }

    #[test]
    fn draws_are_different_experts() {
        let mut dice = Dice(1);
        let mut counts = [0; 5];
        for _ in 0..1000 {
            let mut drawn = dice.draw(5, 3);
            drawn.iter().for_each(|&expert| counts[expert as usize] += 1);
            drawn.sort_unstable();
            drawn.dedup();
            assert_eq!(drawn.len(), 3);
        }
        assert!(counts.iter().all(|n| (500..700).contains(n)), "{counts:?}");
    }

    #[test]
    fn a_device_is_measured() {
        let cache = CacheSlots { n: 3, policy: CachePolicy::Lru };
        for cache in [None, Some(cache)] {
            let (speed, visit) =
                measure(Device::cpu(), &spec(), &LlmOptions::default(), 4, cache).unwrap();
            assert!(speed.is_finite() && speed > 0.0 && visit > 0.0, "{speed} {visit}");
        }
    }
}
