//! Every architecture against its golden: on the CPU device and on the GPU adapter, in every
//! weight format, and with the adapter reduced to the portable tier. Then verify itself: an
//! expectation that was tampered with must not pass.

use std::{collections::BTreeMap, fs, path::Path};

use moewe::{
    device::{Device, DeviceChoice, Tier},
    engine::Runner,
    evaluate::{Expectation, Tolerance, verify},
    llm::{Llm, LlmOptions},
    model::{ExpertShape, KvCache, Limits, Model, Precision, arch},
    weights::{Checkpoint, WeightFormat},
};
use pollster::block_on;
use safetensors::Dtype;

use crate::checkpoints::{
    GPU, Stored, W4, W8, copy, edit_json, edit_tensors, golden, open, options, read_json,
};

fn check(name: &str, device: &DeviceChoice, tier: Option<Tier>, weights: WeightFormat) {
    let dir = golden(name);
    check_options(name, LlmOptions { tier, ..options(&dir, device.clone(), weights) });
}

fn check_options(name: &str, options: LlmOptions) {
    let what = format!("{name} on {}, {:?}, {}", options.device, options.tier, options.precision());
    let (dir, precision) = (golden(name), options.precision());
    let mut llm = Llm::open(options).unwrap_or_else(|e| panic!("{name}: {e}"));
    let runner = llm.engine.runner();
    if precision.experts == WeightFormat::W8A8 {
        always_in_blocks(runner);
    }
    let expectation = Expectation::read(&dir, &runner.model().spec).expect("a whole golden");
    let tolerance = Tolerance::of(precision, expectation.logit_atol);
    let report = verify(runner, &expectation, &tolerance).expect("the golden runs");
    assert!(report.passed, "{what}:\n{report}");
}

/// Lets experts multiply blocks of rows in steps of any size: without blocks nothing is rounded to
/// int8.
fn always_in_blocks(runner: &mut Runner) {
    let (spec, precision) = (runner.model().spec.clone(), runner.model().precision);
    let caps = runner.device().caps();
    for (_, moe) in spec.moe_layers() {
        let name = ExpertShape::of(&spec, moe, precision).name(&caps);
        runner.device().tune(&name, vec![(usize::MAX, 16)]);
    }
}

fn check_all(name: &str) {
    let grouped = WeightFormat::W8 { group: Some(32) };
    for weights in [WeightFormat::F32, WeightFormat::F16, W8, grouped, W4] {
        check(name, &GPU, None, weights);
        check(name, &DeviceChoice::Cpu, None, weights);
    }
    for device in [GPU, DeviceChoice::Cpu] {
        let options = options(&golden(name), device, W8);
        let dense_weights = Some(WeightFormat::W8 { group: Some(32) });
        check_options(name, LlmOptions { dense_weights, ..options });
    }
    for tier in [Tier::Portable, Tier::Fast] {
        check(name, &GPU, Some(tier), WeightFormat::W8A8);
    }
    check(name, &DeviceChoice::Cpu, None, WeightFormat::W8A8);
    check(name, &GPU, Some(Tier::Portable), WeightFormat::F32);
    check(name, &GPU, Some(Tier::Portable), W8);
}

#[test]
fn glm4_moe() {
    check_all("glm4_moe");
}

#[test]
fn llama() {
    check_all("llama");
}

#[test]
fn mixtral() {
    check_all("mixtral");
}

#[test]
fn olmoe() {
    check_all("olmoe");
}

#[test]
fn qwen2_moe() {
    check_all("qwen2_moe");
}

#[test]
fn qwen3_moe() {
    check_all("qwen3_moe");
}

#[test]
fn qwen3_moe_mixed() {
    check_all("qwen3_moe_mixed");
}

/// A device that binds 32 KiB gets embedding, output projection and banks of experts in pieces.
#[test]
fn weights_split_over_bindings() {
    for name in ["glm4_moe", "mixtral", "llama", "qwen2_moe"] {
        for weights in [WeightFormat::F32, WeightFormat::F16, W8, W4] {
            let dir = golden(name);
            let mut device = block_on(Device::open(&GPU)).expect("an adapter");
            device.limit_bindings(32 << 10);
            let spec = arch::parse(&read_json(&dir.join("config.json"))).expect("a config");
            let precision = Precision::of(weights);
            let kv =
                KvCache::alloc(&mut device, &spec, 9, 16, precision.activations).expect("fits");
            let source = Checkpoint::open(&dir).expect("a checkpoint");
            let model =
                Model::load(spec, &source, &mut device, precision, 112, &|_| {}).expect("fits");
            let expectation = Expectation::read(&dir, &model.spec).expect("a whole golden");
            let limits = Limits {
                max_tokens: 100,
                max_sequences: 1,
                max_logits: 100,
                max_blocks: 8,
                max_penalized: 1,
            };
            let mut runner = Runner::new(device, model, kv, limits).expect("fits");
            let tolerance = Tolerance::of(precision, expectation.logit_atol);
            let report = verify(&mut runner, &expectation, &tolerance).expect("the golden runs");
            assert!(report.passed, "{name}, {weights:?}:\n{report}");
        }
    }
}

/// Every 4-byte element of a tensor through `edit`, which gets its index.
fn edit_words(stored: &mut Stored, edit: impl Fn(usize, [u8; 4]) -> [u8; 4]) {
    let (words, rest) = stored.2.as_chunks_mut::<4>();
    assert!(rest.is_empty());
    words.iter_mut().enumerate().for_each(|(i, word)| *word = edit(i, *word));
}

/// Adds to one f32.
fn add(stored: &mut Stored, index: usize, delta: f32) {
    edit_words(stored, |i, word| {
        if i == index { (f32::from_le_bytes(word) + delta).to_le_bytes() } else { word }
    });
}

type Tensors = BTreeMap<String, Stored>;
type Corrupt = fn(&mut Tensors);

/// What a corrupted `expected.safetensors` is called, and how it comes about.
const CORRUPTIONS: &[(&str, Corrupt)] = &[
    ("a logit", |t| add(tensor(t, "text.logits"), 777, 0.01)),
    ("a logit after the prompt", |t| add(tensor(t, "text.greedy_logits"), 512 * 5 + 3, -0.01)),
    ("the repeated row of logits", |t| add(tensor(t, "text.greedy_logits"), 3, -0.01)),
    ("a NaN logit", |t| add(tensor(t, "text.logits"), 5, f32::NAN)),
    ("an infinite logit", |t| add(tensor(t, "one.logits"), 5, f32::INFINITY)),
    ("an expert id", |t| {
        let other = |i, id: [u8; 4]| if i == 1 { 7i32.to_le_bytes() } else { id };
        edit_words(tensor(t, "text.router_ids"), other);
    }),
    ("swapped expert ids", |t| {
        let ids = tensor(t, "rand33.greedy_router_ids");
        let (a, b) = (ids.2[0..4].to_vec(), ids.2[4..8].to_vec());
        ids.2[0..4].copy_from_slice(&b);
        ids.2[4..8].copy_from_slice(&a);
    }),
    ("a routed weight", |t| add(tensor(t, "text.router_weights"), 4, 0.001)),
    ("a NaN weight", |t| add(tensor(t, "text.router_weights"), 4, f32::NAN)),
    ("a negative margin", |t| add(tensor(t, "text.router_margin"), 0, -1e6)),
    ("a greedy id", |t| flip_id(tensor(t, "text.greedy_ids"), 3)),
    ("the last greedy id", |t| flip_id(tensor(t, "text.greedy_ids"), 31)),
    ("a prompt's id", |t| flip_id(tensor(t, "rand33.input_ids"), 3)),
    ("an id outside the vocabulary", |t| {
        edit_words(tensor(t, "text.greedy_ids"), |_, _| 512i32.to_le_bytes());
    }),
    ("a negative id", |t| {
        edit_words(tensor(t, "text.input_ids"), |_, _| (-1i32).to_le_bytes());
    }),
    ("a missing tensor", |t| drop(t.remove("text.router_weights"))),
    ("missing logits", |t| drop(t.remove("one.logits"))),
    ("a wrong shape", |t| tensor(t, "text.logits").1.reverse()),
    ("a wrong type", |t| tensor(t, "text.greedy_ids").0 = Dtype::F32),
    ("no greedy tokens", |t| {
        t.insert("text.greedy_ids".into(), (Dtype::I32, vec![0], vec![]));
    }),
];

fn tensor<'a>(tensors: &'a mut Tensors, name: &str) -> &'a mut Stored {
    tensors.get_mut(name).unwrap_or_else(|| panic!("the golden has no {name}"))
}

fn flip_id(stored: &mut Stored, index: usize) {
    edit_words(stored, |i, mut word| {
        if i == index {
            word[0] ^= 1;
        }
        word
    });
}

/// Whether the expectation in `dir` is read and met.
fn passes(llm: &mut Llm, dir: &Path) -> bool {
    let runner = llm.engine.runner();
    let Ok(expectation) = Expectation::read(dir, &runner.model().spec) else { return false };
    let tolerance = Tolerance::of(Precision::of(WeightFormat::F32), expectation.logit_atol);
    verify(runner, &expectation, &tolerance).is_ok_and(|report| report.passed)
}

#[test]
fn verify_fails_on_a_corrupted_expectation() {
    let dir = copy(&golden("mixtral"));
    let mut llm = open(dir.path(), DeviceChoice::Cpu, WeightFormat::F32);
    let path = dir.path().join("expected.safetensors");
    let whole = fs::read(&path).expect("readable");
    assert!(passes(&mut llm, dir.path()), "the copy itself passes");
    for (what, corrupt) in CORRUPTIONS {
        edit_tensors(&path, corrupt);
        assert!(!passes(&mut llm, dir.path()), "passes with {what} changed");
        fs::write(&path, &whole).expect("restored");
    }
    for length in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).expect("written");
        assert!(!passes(&mut llm, dir.path()), "passes cut to {length} bytes");
    }
    fs::remove_file(&path).expect("removed");
    assert!(!passes(&mut llm, dir.path()), "passes without expected.safetensors");
}

#[test]
fn verify_fails_without_prompts() {
    let dir = copy(&golden("llama"));
    let mut llm = open(dir.path(), DeviceChoice::Cpu, WeightFormat::F32);
    let path = dir.path().join("expected.json");
    let whole = fs::read(&path).expect("readable");
    let edits: [fn(&mut serde_json::Value); 4] = [
        |json| json["prompts"] = serde_json::json!([]),
        |json| drop(json.as_object_mut().and_then(|o| o.remove("prompts"))),
        |json| json["prompts"][0]["name"] = "absent".into(),
        |json| json["prompts"][0]["name"] = 3.into(),
    ];
    for (i, edit) in edits.into_iter().enumerate() {
        edit_json(&path, edit);
        assert!(!passes(&mut llm, dir.path()), "passes with edit {i}");
        fs::write(&path, &whole).expect("restored");
    }
    assert!(passes(&mut llm, dir.path()), "the copy itself passes");
}
