//! Experts on several devices give what one device gives: the same greedy tokens, and logits that
//! differ by the order of f32 sums at most. Devices are logical ones on the CPU and the adapter.

use std::path::Path;

use moewe::{
    device::DeviceChoice,
    engine::{Batch, BatchSequence, LogitRows, SamplingParams},
    llm::{DUAL_BATCH_TOKENS, ExpertPlacement, Llm, LlmOptions, PlannedLlm},
    parallel::{CacheOptions, CachePolicy, EplbOptions, ExchangeStats},
    server::{App, ServerConfig},
    weights::WeightFormat,
};
use safetensors::Dtype;

use crate::{
    checkpoints::{GPU, copy, edit_tensors, golden, gull, options},
    server::get,
};

const CPU: DeviceChoice = DeviceChoice::Cpu;
const F32: WeightFormat = WeightFormat::F32;
/// Enough for parts of a step that a device can bind by themselves.
const MOST_SEQUENCES: usize = 24;

/// A model whose experts are on these devices.
fn spread(dir: &Path, devices: &[DeviceChoice], placement: ExpertPlacement) -> Llm {
    split(dir, devices, placement, DUAL_BATCH_TOKENS)
}

/// The same, whose steps of so many tokens and more are split in two.
fn split(
    dir: &Path,
    devices: &[DeviceChoice],
    placement: ExpertPlacement,
    dual_batch_tokens: usize,
) -> Llm {
    let options = LlmOptions {
        dual_batch_tokens,
        text: false,
        max_model_len: Some(128),
        max_num_seqs: MOST_SEQUENCES,
        expert_devices: devices[1..].to_vec(),
        expert_placement: placement,
        ..options(dir, devices[0].clone(), F32)
    };
    Llm::open(options).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

pub(crate) fn prompt(llm: &mut Llm, n: usize) -> Vec<u32> {
    let vocab = llm.engine.runner().model().spec.vocab_size;
    (0..n).map(|i| ((i * 37 + 11) % vocab) as u32).collect()
}

/// Logits of a prompt in one step, then of one more token by itself. `[n + 1][vocabulary]`
pub(crate) fn logits(llm: &mut Llm, n: usize) -> Vec<Vec<f32>> {
    let tokens = prompt(llm, n + 1);
    let runner = llm.engine.runner();
    let blocks: Vec<u32> = (1..=(n + 1).div_ceil(16) as u32).collect();
    let mut all = Vec::new();
    for (position, tokens) in [(0, &tokens[..n]), (n, &tokens[n..])] {
        let (logits, rest) = (LogitRows::All, BatchSequence::default());
        let sequence = BatchSequence { tokens, position, blocks: &blocks, logits, ..rest };
        runner.run(&Batch { sequences: vec![sequence] }, false).expect("the step runs");
        all.extend(runner.logits(tokens.len()).expect("logits"));
    }
    all
}

pub(crate) fn greedy(llm: &mut Llm, n: usize) -> Vec<u32> {
    let tokens = prompt(llm, 9);
    let params =
        SamplingParams { max_tokens: Some(n), ignore_eos: true, ..SamplingParams::greedy() };
    let mut answer = Vec::new();
    llm.engine.add(moewe::engine::Request::new(tokens, params)).expect("a valid request");
    while llm.engine.is_busy() {
        let outputs = llm.engine.step().expect("the step runs");
        answer.extend(outputs.into_iter().filter_map(|output| output.token));
    }
    answer
}

pub(crate) fn worst(a: &[Vec<f32>], b: &[Vec<f32>]) -> f32 {
    assert_eq!(a.len(), b.len());
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (a - b).abs() / (1.0 + b.abs())).fold(0.0, f32::max)
}

fn traffic(llm: &mut Llm) -> ExchangeStats {
    llm.engine.runner().exchange().expect("experts are elsewhere").stats()
}

/// Holds a model on `devices` against the same model on the first of them.
fn check(dir: &Path, devices: &[DeviceChoice], placement: ExpertPlacement) {
    let mut alone = spread(dir, &devices[..1], ExpertPlacement::Linear);
    let mut shared = spread(dir, devices, placement.clone());
    let what = format!("{}, {} devices, {placement:?}", dir.display(), devices.len());
    let off = worst(&logits(&mut shared, 40), &logits(&mut alone, 40));
    assert!(off < 1e-4, "{what}: logits are {off} off");
    assert_eq!(greedy(&mut shared, 8), greedy(&mut alone, 8), "{what}");
    let stats = traffic(&mut shared);
    assert!(stats.visits > 0 && stats.bytes_received > 0, "{what}: nobody was visited");
    assert!(stats.visits <= stats.rounds * (devices.len() as u64 - 1), "{what}: {stats:?}");
}

#[test]
fn any_number_of_devices_computes_what_one_does() {
    for name in ["mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe", "olmoe"] {
        for n in [2, 3, 7] {
            check(&golden(name), &vec![CPU; n], ExpertPlacement::Linear);
        }
        check(&golden(name), &vec![CPU; 4], ExpertPlacement::RoundRobin);
        check(&golden(name), &[GPU, GPU, CPU], ExpertPlacement::RoundRobin);
    }
}

#[test]
fn the_default_model_is_the_same_on_logical_adapters() {
    check(&gull(), &[GPU, GPU], ExpertPlacement::Linear);
    check(&gull(), &[GPU, CPU, GPU, CPU], ExpertPlacement::RoundRobin);
}

/// Tokens of requests that run together: prompts of all lengths, so that steps have both decoding
/// and tiles.
fn greedy_together(llm: &mut Llm) -> Vec<Vec<u32>> {
    let ids: Vec<_> = (0..MOST_SEQUENCES)
        .map(|i| {
            let max_tokens = Some(6 + i % 3);
            let params =
                SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::greedy() };
            let tokens = prompt(llm, 1 + 2 * i);
            llm.engine.add(moewe::engine::Request::new(tokens, params)).expect("a valid request")
        })
        .collect();
    let mut answers = vec![Vec::new(); ids.len()];
    while llm.engine.is_busy() {
        for output in llm.engine.step().expect("the step runs") {
            let request = ids.iter().position(|&id| id == output.request).expect("one of ours");
            answers[request].extend(output.token);
        }
    }
    answers
}

#[test]
fn a_step_in_two_parts_is_the_same_step() {
    for (name, devices) in [
        ("qwen3_moe", vec![CPU, CPU]),
        ("glm4_moe", vec![CPU, CPU, CPU]),
        ("qwen2_moe", vec![GPU, CPU]),
        ("mixtral", vec![GPU, GPU, GPU]),
    ] {
        let dir = golden(name);
        let mut alone = spread(&dir, &devices[..1], ExpertPlacement::Linear);
        let [mut whole, mut halves] = [DUAL_BATCH_TOKENS, 8]
            .map(|tokens| split(&dir, &devices, ExpertPlacement::Linear, tokens));
        let rounds = [&mut whole, &mut halves].map(|llm| {
            let off = worst(&logits(llm, 90), &logits(&mut alone, 90));
            assert!(off < 1e-4, "{name}: logits are {off} off");
            traffic(llm).rounds
        });
        // The step of 90 tokens makes two trips, the one of a single token one.
        assert_eq!(2 * rounds[1], 3 * rounds[0], "{name}: it was not split");
        let expected = greedy_together(&mut alone);
        let together = [(&mut whole, rounds[0]), (&mut halves, rounds[1])].map(|(llm, before)| {
            assert_eq!(greedy_together(llm), expected, "{name}");
            traffic(llm).rounds - before
        });
        // But for the last ones, in which few requests are left.
        assert!(2 * together[1] >= 3 * together[0], "{name}: {together:?}, so few were split");
    }
}

#[test]
fn experts_may_lie_anywhere_and_twice() {
    let dir = golden("mixtral");
    let n = spread(&dir, &[CPU], ExpertPlacement::Linear).engine.runner().model().spec.n_experts();
    let all: Vec<usize> = (0..n).collect();
    let (even, odd): (Vec<usize>, Vec<usize>) = all.iter().partition(|&&e| e % 2 == 0);
    let backwards: Vec<usize> = all.iter().rev().copied().collect();
    for held in [
        [vec![], all.clone(), vec![]],
        [all.clone(), backwards.clone(), all.clone()],
        [odd.clone(), backwards, even.clone()],
        [even, vec![], odd],
    ] {
        let json = serde_json::json!({ "layers": [held] }).to_string();
        check(&dir, &[CPU, CPU, CPU], ExpertPlacement::Json(json));
    }
}

#[test]
fn each_device_reads_and_holds_its_share_only() {
    let dir = gull();
    let bytes = |llm: &mut Llm| llm.engine.runner().device().allocated_bytes();
    let mut alone = spread(&dir, &[CPU], ExpertPlacement::Linear);
    let mut shared = spread(&dir, &[CPU; 4], ExpertPlacement::Linear);
    let (all, share) = (bytes(&mut alone), bytes(&mut shared));
    assert!(share * 10 < all * 6, "the primary device holds {share} of {all} bytes");
}

#[test]
fn impossible_placements_are_refused() {
    let open = |json: &str| {
        let placement = ExpertPlacement::Json(json.to_owned());
        let options = LlmOptions {
            text: false,
            expert_devices: vec![CPU],
            expert_placement: placement,
            ..options(&golden("mixtral"), CPU, F32)
        };
        Llm::open(options).expect_err("an error").to_string()
    };
    assert!(open("{").contains("placement file"));
    assert!(open(r#"{"layers": [[[0], [1]]]}"#).contains("leaves out"));
    assert!(open(r#"{"layers": [[[0]]]}"#).contains("devices"));
}

/// Experts 0 to 2 of 8 are always chosen; the bias of the router sees to that.
fn skewed() -> tempfile::TempDir {
    let dir = copy(&golden("glm4_moe"));
    edit_tensors(&dir.path().join("model.safetensors"), |tensors| {
        let biases = tensors.iter_mut().filter(|(name, _)| name.ends_with("score_correction_bias"));
        for (_, (dtype, _, bytes)) in biases {
            assert_eq!(*dtype, Dtype::F32);
            for (expert, bias) in bytes.chunks_mut(4).enumerate() {
                let value: f32 = if expert < 3 { 50.0 } else { 0.0 };
                bias.copy_from_slice(&value.to_le_bytes());
            }
        }
    });
    dir
}

/// Requests run while experts move; the text is that of a single device.
#[test]
fn experts_move_to_where_the_work_is_balanced() {
    let dir = skewed();
    let mut alone = spread(dir.path(), &[CPU], ExpertPlacement::Linear);
    let expected = greedy(&mut alone, 48);
    for (first, redundant) in [(CPU, 9), (GPU, 9), (CPU, 0)] {
        let options = LlmOptions {
            text: false,
            max_model_len: Some(128),
            expert_devices: vec![CPU; 3],
            eplb: Some(EplbOptions { interval: 16, redundant, threshold: 0.05 }),
            ..options(dir.path(), first, F32)
        };
        let mut llm = Llm::open(options).expect("a model");
        let stats = |llm: &Llm| llm.engine.stats().eplb.expect("balanced");
        assert_eq!((stats(&llm).rebalances, stats(&llm).balancedness), (0, 1.0));
        assert_eq!(greedy(&mut llm, 48), expected);
        let moved = stats(&llm);
        let (before, promised) = moved.last_move.expect("they moved");
        assert!(before < 0.6, "{moved:?}");
        assert!(moved.experts_moved > 0 && moved.bytes_moved > 0, "{moved:?}");
        // Three busy experts keep three of four devices busy, or all of them with copies.
        let least = if redundant > 0 { 0.9 } else { 0.7 };
        assert!(promised > least && moved.balancedness > least, "{moved:?}");
        assert_eq!(greedy(&mut llm, 48), expected, "and it stays so");
        assert_eq!(stats(&llm).rebalances, moved.rebalances, "without moving any more");
    }
}

#[tokio::test]
async fn the_server_tells_which_device_holds_which_expert() {
    let options = LlmOptions {
        max_model_len: Some(64),
        expert_devices: vec![CPU],
        expert_placement: ExpertPlacement::RoundRobin,
        ..options(&gull(), CPU, F32)
    };
    let app = App::start(Box::new(move || Llm::open(options.clone())), ServerConfig::default());
    let app = app.expect("a server");
    let (_, _, text) = get(&app, "/moe/stats").await;
    let stats: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    let layers = stats["layers"].as_array().expect("layers");
    assert!(!layers.is_empty());
    for layer in layers {
        let devices = layer["devices"].as_array().expect("devices");
        assert_eq!(devices.len() as u64, stats["n_experts"]);
        assert!(
            devices.iter().enumerate().all(|(expert, d)| *d == serde_json::json!([expert % 2]))
        );
    }
}

/// Two devices that are alike, and twins on the CPU: whoever is chosen, the text is the same.
#[test]
fn measured_devices_compute_what_one_does() {
    let dir = golden("qwen3_moe");
    let mut alone = spread(&dir, &[GPU], ExpertPlacement::Linear);
    let expected = greedy(&mut alone, 8);
    for expert_cache in [None, Some(CacheOptions { bytes: 400_000, policy: CachePolicy::Lru })] {
        let options = LlmOptions {
            text: false,
            max_model_len: Some(128),
            expert_devices: vec![GPU, CPU],
            expert_placement: ExpertPlacement::Balanced,
            expert_cache,
            ..options(&dir, GPU, F32)
        };
        let planned = PlannedLlm::new(options).expect("measured");
        assert_eq!(planned.measurements().len(), 3, "{:?}", planned.measurements());
        assert!(planned.measurements().iter().all(|line| line.contains("rows of experts/s")));
        assert_eq!(greedy(&mut planned.load(&|_| {}).expect("a model"), 8), expected);
    }
}
