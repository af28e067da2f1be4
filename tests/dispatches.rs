//! How many kernels a step launches, and how dummy weights route: what speed depends on, and what
//! no result would show.

use moewe::{
    device::{Caps, Device, Recording},
    engine::{Batch, BatchSequence, LogitRows, Runner},
    model::{KvCache, Limits, Model, ModelSpec, Precision, Scratch, StepShape, arch},
    weights::{Checkpoint, DummySource, Source},
};

use crate::checkpoints::{W8, golden, read_json};

const LIMITS: Limits =
    Limits { max_tokens: 64, max_sequences: 64, max_logits: 64, max_blocks: 4, max_penalized: 1 };

fn load(spec: ModelSpec, source: &dyn Source) -> (Device, Model, KvCache) {
    let (mut device, precision) = (Device::cpu(), Precision::of(W8));
    let kv = KvCache::alloc(&mut device, &spec, 65, 16, precision.activations).expect("fits");
    let model = Model::load(spec, source, &mut device, precision, 64, &|_| {}).expect("loads");
    (device, model, kv)
}

/// A step that decodes `n` sequences on a device with `caps`, without sampling.
fn record(name: &str, caps: &Caps, n: usize, block_align: bool) -> (Recording, ModelSpec) {
    let spec = arch::parse(&read_json(&golden(name).join("config.json"))).expect("a config");
    let source = Checkpoint::open(&golden(name)).expect("a checkpoint");
    let (mut device, model, kv) = load(spec, &source);
    let model = model.with_block_align(block_align);
    let scratch = Scratch::alloc(&mut device, &model.spec, &LIMITS, model.precision).expect("fits");
    let (n_prefill, n_tiles, sample, logprobs) = (0, 0, false, false);
    let shape =
        StepShape { n_decode: n, n_prefill, n_tiles, n_logits: n, sample, logprobs, split: None };
    let mut rec = Recording::new(caps);
    model.record(&mut rec, &shape, &scratch, &kv);
    (rec, model.spec)
}

/// Launches of such a step, and layers.
fn launches(name: &str, caps: &Caps, n: usize) -> (usize, usize) {
    let (rec, spec) = record(name, caps, n, true);
    (rec.dispatches.len(), spec.layers.len())
}

fn fast() -> Caps {
    Caps { f16: true, subgroups: Some((32, 32)), ordered_groups: true, ..Caps::portable() }
}

#[test]
fn a_layer_of_experts_takes_at_most_eight_launches_for_one_sequence() {
    // Embedding, final norm and head.
    const REST: usize = 3;
    for caps in [fast(), Caps { software: true, ..fast() }] {
        let (all, layers) = launches("qwen3_moe", &caps, 1);
        assert_eq!(all, REST + 7 * layers, "router and top-k and both norms are fused");
    }
    let (all, layers) = launches("qwen3_moe", &Caps::portable(), 1);
    assert_eq!(all, REST + 9 * layers, "one more for top-k, one for its norm");
    let (many, layers) = launches("qwen3_moe", &fast(), 64);
    assert!(many > REST + 9 * layers, "{many}");
}

#[test]
fn experts_without_block_alignment_have_launches_of_their_own() {
    let products = |n, block_align| {
        let (rec, spec) = record("qwen3_moe", &fast(), n, block_align);
        let experts = rec.dispatches.iter().filter(|d| d.shader.stem.starts_with("expert_"));
        (experts.count(), spec.layers.len(), spec.n_experts())
    };
    let (blocks, layers, n_experts) = products(64, true);
    assert_eq!(blocks, 2 * layers);
    assert_eq!(products(64, false).0, 2 * layers * n_experts);
    assert_eq!(products(1, false).0, 2 * layers, "few tokens have no blocks");
}

#[test]
fn dummy_weights_route_evenly() {
    let (n, mut config) = (64, read_json(&golden("qwen3_moe").join("config.json")));
    config["num_experts"] = 32.into();
    config["num_experts_per_tok"] = 2.into();
    config["vocab_size"] = 4096.into();
    let spec = arch::parse(&config).expect("a config");
    let routing = spec.moe_layers().next().expect("experts").1.routing;
    let (device, model, kv) = load(spec, &DummySource::new(0));
    let mut runner = Runner::new(device, model, kv, LIMITS).expect("fits");
    let tokens: Vec<u32> = (0..n as u32).map(|i| i * 61 % 4096).collect();
    let sequence = BatchSequence {
        tokens: &tokens,
        blocks: &[1, 2, 3, 4],
        logits: LogitRows::Last,
        ..BatchSequence::default()
    };
    runner.run(&Batch { sequences: vec![sequence] }, false).expect("runs");
    for routed in runner.routed(n).expect("read").into_iter().flatten() {
        let mut counts = vec![0u32; routing.n_experts];
        routed.ids.iter().for_each(|&id| counts[id as usize] += 1);
        // 128 choices among 32 experts: four each on average, binomial if independent.
        let variance = counts.iter().map(|&c| (f64::from(c) - 4.0).powi(2)).sum::<f64>() / 32.0;
        assert!(variance < 8.0, "{counts:?}");
    }
}
