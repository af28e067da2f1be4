//! Random checkpoints of sizes that nothing divides, written to disk and held against the plain
//! forward pass of `reference.rs` by moewe's own verify: logits, experts, weights, greedy tokens.

use std::{cell::RefCell, collections::BTreeMap, fs};

use moewe::{
    device::{DeviceChoice, Tier},
    evaluate::{Expectation, Prompt, RoutedExpectation, Tolerance, verify},
    llm::{Llm, LlmOptions},
    model::Precision,
    weights::{DummySource, Source, WeightFormat},
};
use safetensors::Dtype;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::{
    checkpoints::{GPU, Stored, W4, W8, golden, options, write_tensors},
    reference::{Outputs, Reference, Weights, best},
};

fn glm4_moe() -> Value {
    json!({
        "model_type": "glm4_moe", "hidden_size": 72, "num_hidden_layers": 3, "vocab_size": 301,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 24,
        "partial_rotary_factor": 0.5, "attention_bias": true, "use_qk_norm": true,
        "intermediate_size": 100, "moe_intermediate_size": 44, "first_k_dense_replace": 1,
        "n_routed_experts": 10, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "norm_topk_prob": true, "routed_scaling_factor": 1.7,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 512,
        "tie_word_embeddings": true
    })
}

/// What the other architectures share.
fn llama_like(model_type: &str) -> Value {
    json!({
        "model_type": model_type, "hidden_size": 72, "num_hidden_layers": 3, "vocab_size": 333,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 20,
        "intermediate_size": 100, "attention_bias": false, "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0, "max_position_embeddings": 512, "tie_word_embeddings": false
    })
}

fn with(mut config: Value, changes: Value) -> Value {
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    config
}

/// Weights from the seed alone. The values are bf16, so f32 holds them exactly.
fn draw(seed: u64, name: &str, shape: &[usize]) -> Vec<f32> {
    DummySource::new(seed).tensor(name, shape).expect("a small tensor").to_f32()
}

/// Writes config, tokenizer and every tensor that the reference asks for.
fn write_checkpoint(config: &Value, seed: u64) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::write(dir.path().join("config.json"), config.to_string()).expect("written");
    let tokenizer = "tokenizer.json";
    fs::copy(golden("llama").join(tokenizer), dir.path().join(tokenizer)).expect("copied");
    let tensors: RefCell<BTreeMap<String, Stored>> = RefCell::default();
    let record = |name: &str, shape: &[usize]| -> Vec<f64> {
        let values = draw(seed, name, shape);
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        tensors.borrow_mut().insert(name.into(), (Dtype::F32, shape.to_vec(), bytes));
        values.into_iter().map(f64::from).collect()
    };
    Reference { config, weights: &record }.forward(&[0]);
    write_tensors(&dir.path().join("model.safetensors"), &tensors.borrow());
    dir
}

/// A prompt of random ids with the reference's outputs, `n_greedy` tokens after it included.
fn expect(config: &Value, seed: u64, n: usize, n_greedy: usize) -> Prompt {
    let weights: &Weights<'_> =
        &|name, shape| draw(seed, name, shape).into_iter().map(f64::from).collect();
    let reference = Reference { config, weights };
    let vocab = config["vocab_size"].as_u64().expect("a size");
    let id = |i: u64| ((i * i * 7919 + i * 104_729 + seed) % vocab) as u32;
    let input_ids: Vec<u32> = (0..n as u64).map(id).collect();
    let (mut ids, mut greedy_ids) = (input_ids.clone(), Vec::new());
    let outputs = loop {
        let outputs = reference.forward(&ids);
        let last = outputs.logits.last().expect("a row");
        let order = best(last);
        assert!(last[order[0]] - last[order[1]] > 1e-3, "choose another seed: a near tie");
        greedy_ids.push(order[0] as u32);
        if greedy_ids.len() == n_greedy {
            break outputs;
        }
        ids.push(order[0] as u32);
    };
    let logits = outputs.logits.iter().map(|row| row.iter().map(|&v| v as f32).collect()).collect();
    Prompt { name: format!("random{n}"), input_ids, greedy_ids, logits, routed: routed(&outputs) }
}

fn routed(outputs: &Outputs) -> Vec<RoutedExpectation> {
    let layer = |routes: &Vec<crate::reference::Route>| {
        let margin = routes.iter().map(|r| r.margin).fold(f64::INFINITY, f64::min);
        assert!(margin > 1e-5, "choose another seed: routing is within {margin} of a tie");
        RoutedExpectation {
            ids: routes.iter().map(|r| r.ids.iter().map(|&i| i as i32).collect()).collect(),
            weights: routes.iter().map(|r| r.weights.iter().map(|&w| w as f32).collect()).collect(),
            margins: routes.iter().map(|r| r.margin as f32).collect(),
        }
    };
    outputs.routes.iter().map(layer).collect()
}

fn check(config: &Value, seed: u64, prompts: &[(usize, usize)]) {
    let dir = write_checkpoint(config, seed);
    let prompts = prompts.iter().map(|&(n, n_greedy)| expect(config, seed, n, n_greedy));
    let expectation = Expectation { logit_atol: 2e-4, prompts: prompts.collect() };
    let runs = [
        (DeviceChoice::Cpu, None, WeightFormat::F32),
        (GPU, None, WeightFormat::F32),
        (GPU, Some(Tier::Portable), WeightFormat::F32),
        (GPU, None, WeightFormat::F16),
        (GPU, None, W8),
        (GPU, None, WeightFormat::W8 { group: Some(32) }),
        (GPU, None, W4),
    ];
    for (device, tier, weights) in runs {
        let options = options(dir.path(), device.clone(), weights);
        let mut llm = Llm::open(LlmOptions { tier, ..options }).expect("the checkpoint loads");
        let tolerance = Tolerance::of(Precision::of(weights), expectation.logit_atol);
        let report = verify(llm.engine.runner(), &expectation, &tolerance).expect("it runs");
        assert!(report.passed, "{device}, {tier:?}, {weights:?}, {config}:\n{report}");
    }
}

#[test]
fn qwen3_dense() {
    check(&llama_like("qwen3"), 1, &[(11, 12), (300, 1)]);
}

#[test]
fn qwen3_tied_with_bias() {
    let changes = json!({ "tie_word_embeddings": true, "attention_bias": true, "head_dim": 18 });
    check(&with(llama_like("qwen3"), changes), 2, &[(7, 5), (65, 1)]);
}

#[test]
fn glm4_moe_of_ten_experts_in_two_groups() {
    check(&glm4_moe(), 3, &[(9, 10), (300, 1)]);
}

#[test]
fn glm4_moe_with_heads_of_18() {
    let changes = json!({ "head_dim": 18, "partial_rotary_factor": 1.0, "use_qk_norm": false });
    check(&with(glm4_moe(), changes), 4, &[(13, 10), (300, 1)]);
}

#[test]
fn glm4_moe_without_extras() {
    let changes = json!({
        "attention_bias": false, "tie_word_embeddings": false, "norm_topk_prob": false,
        "n_shared_experts": 2, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1
    });
    check(&with(glm4_moe(), changes), 5, &[(20, 5), (130, 1)]);
}

#[test]
fn llama_with_biases_and_one_kv_head() {
    let changes = json!({ "attention_bias": true, "num_key_value_heads": 1, "head_dim": 12 });
    check(&with(llama_like("llama"), changes), 14, &[(17, 5), (300, 1)]);
}

#[test]
fn mixtral_of_odd_sizes_with_a_window() {
    let changes = json!({
        "num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 44,
        "sliding_window": 50
    });
    check(&with(llama_like("mixtral"), changes), 7, &[(10, 5), (200, 1)]);
}

#[test]
fn olmoe_of_odd_sizes() {
    let changes = json!({
        "num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 44,
        "num_key_value_heads": 6, "norm_topk_prob": true, "tie_word_embeddings": true
    });
    check(&with(llama_like("olmoe"), changes), 8, &[(10, 5), (150, 1)]);
}

#[test]
fn qwen2_moe_of_odd_sizes() {
    let changes = json!({
        "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 44,
        "shared_expert_intermediate_size": 52, "decoder_sparse_step": 1, "mlp_only_layers": [1],
        "norm_topk_prob": true, "head_dim": 12
    });
    check(&with(llama_like("qwen2_moe"), changes), 9, &[(10, 5), (150, 1)]);
}

#[test]
fn qwen3_moe_of_odd_sizes_with_windows() {
    let changes = json!({
        "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 44,
        "decoder_sparse_step": 2, "mlp_only_layers": [], "norm_topk_prob": false,
        "attention_bias": true, "sliding_window": 33, "use_sliding_window": true,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]
    });
    check(&with(llama_like("qwen3_moe"), changes), 10, &[(10, 5), (150, 1)]);
}

/// Every expert of every token, one expert alone, many groups, wide heads.
#[test]
fn glm4_moe_at_the_edges() {
    let all = json!({ "num_experts_per_tok": 5, "topk_group": 1, "head_dim": 64 });
    check(&with(glm4_moe(), all), 11, &[(12, 4), (65, 1)]);
    let one = json!({
        "n_routed_experts": 1, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1
    });
    check(&with(glm4_moe(), one), 12, &[(12, 4)]);
    let groups = json!({
        "n_routed_experts": 12, "num_experts_per_tok": 4, "n_group": 6, "topk_group": 3
    });
    check(&with(glm4_moe(), groups), 13, &[(12, 4), (65, 1)]);
}
