//! gull-20m as shipped computes what transformers computed for it in f32: tokens, rendered chat,
//! logits, greedy text, perplexity. `MOEWE_FULL=1` takes the whole held-out text.

use moewe::{
    device::{DeviceChoice, Tier},
    engine::SamplingParams,
    evaluate::perplexity,
    llm::{Llm, LlmOptions, LoadFormat, PlannedLlm, locate},
    text::{ChatTemplate, Message, Tokenizer},
    weights::WeightFormat,
};
use serde_json::Value;

use crate::checkpoints::{GPU, W4, W8, gull, logits, open, options, read_json};

fn reference() -> Value {
    read_json(&gull().join("reference.json"))
}

fn ids(json: &Value) -> Vec<u32> {
    let ids = json.as_array().expect("a list of ids");
    ids.iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn argmax(row: &[f32]) -> u32 {
    let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.expect("a row").0 as u32
}

#[test]
fn is_the_default() {
    let found = locate().expect("the default model");
    assert_eq!(found.canonicalize().ok(), gull().canonicalize().ok());
}

#[test]
fn tokenizer_and_template() {
    let reference = reference();
    let tokenizer = Tokenizer::from_dir(&gull()).expect("a tokenizer");
    for sample in reference["tokenizer"].as_array().expect("samples") {
        let text = sample["text"].as_str().expect("a text");
        assert_eq!(tokenizer.encode(text, true).expect("tokens"), ids(&sample["ids"]), "{text:?}");
        assert_eq!(tokenizer.decode(&ids(&sample["ids"]), false).expect("text"), text);
    }
    let chat = &reference["chat_template"];
    let messages: Vec<Message> =
        serde_json::from_value(chat["messages"].clone()).expect("messages");
    let template = ChatTemplate::from_dir(&gull()).expect("it compiles").expect("a template");
    let text = template.render(&messages, true, &serde_json::Map::new()).expect("rendered");
    assert_eq!(text, chat["text"]);
    let heldout = std::fs::read_to_string(gull().join("heldout.txt")).expect("readable");
    let tokens = tokenizer.encode(&heldout, true).expect("tokens");
    assert_eq!(tokens.len() as u64, reference["heldout"]["tokens"]);
    let first = ids(&reference["heldout"]["first_token_ids"]);
    assert_eq!(tokens[..first.len()], first);
}

#[test]
fn logits_of_a_prompt() {
    let reference = &reference()["logits"];
    let prompt = ids(&reference["prompt_ids"]);
    let expected: Vec<f64> = serde_json::from_value(reference["values"].clone()).expect("logits");
    for (device, tier) in [(DeviceChoice::Cpu, None), (GPU, None), (GPU, Some(Tier::Portable))] {
        let options = options(&gull(), device.clone(), WeightFormat::F32);
        let mut llm = Llm::open(LlmOptions { tier, ..options }).expect("the default model");
        let rows = logits(&mut llm, &prompt);
        let best: Vec<u32> = rows.iter().map(|row| argmax(row)).collect();
        assert_eq!(best, ids(&reference["argmax_each_position"]), "{device}");
        let row = &rows[reference["position"].as_u64().expect("a position") as usize];
        assert_eq!(row.len(), expected.len());
        let worst = row.iter().zip(&expected).map(|(a, b)| (f64::from(*a) - b).abs());
        let worst = worst.fold(0.0, f64::max);
        assert!(worst < 5e-4, "{device}, {tier:?}: logits are {worst} off");
    }
}

/// Greedy answers in f32 are the reference's. With int8 experts they are, up to a step where f32
/// itself holds the two tokens nearly equal.
#[test]
fn greedy_continuations() {
    let reference = reference();
    let mut exact = open(&gull(), GPU, WeightFormat::F32);
    let mut int8 = open(&gull(), GPU, W8);
    let mut same = 0;
    let samples = reference["greedy"].as_array().expect("samples");
    for sample in samples {
        let (prompt, expected) = (ids(&sample["prompt_ids"]), ids(&sample["output_ids"]));
        let text = sample["prompt"].as_str().expect("a prompt");
        assert_eq!(exact.raw_prompt(text).expect("tokens"), prompt);
        let params =
            SamplingParams { max_tokens: Some(expected.len()), ..SamplingParams::greedy() };
        let answer = exact.generate(&prompt, params.clone(), vec![], |_| true).expect("an answer");
        // 20 times the error of f32.
        if sample["smallest_top2_gap"].as_f64().expect("a gap") > 2e-4 {
            assert_eq!(answer.tokens, expected, "{text:?}");
            let whole = sample["text"].as_str().expect("a text");
            assert_eq!(answer.text, whole.trim_end_matches("<|im_end|>"));
        }
        let rough = int8.generate(&prompt, params, vec![], |_| true).expect("an answer").tokens;
        let parting = rough.iter().zip(&expected).position(|(a, b)| a != b);
        same += usize::from(parting.is_none());
        if let Some(i) = parting {
            let rows = logits(&mut exact, &[&prompt[..], &expected[..i]].concat());
            let row = rows.last().expect("a row");
            let gap = row[expected[i] as usize] - row[rough[i] as usize];
            assert!(gap < 0.4, "{text:?}: int8 parts at token {i} over a gap of {gap}");
        }
    }
    assert!(same * 2 >= samples.len(), "int8 agrees on {same} of {} answers", samples.len());
}

/// Mean negative log likelihood of the first `n` tokens of the held-out text.
fn mean_nll(device: DeviceChoice, weights: WeightFormat, n: usize) -> f64 {
    let mut llm = open(&gull(), device, weights);
    let heldout = std::fs::read_to_string(gull().join("heldout.txt")).expect("readable");
    let tokens = llm.raw_prompt(&heldout).expect("tokens");
    let tokens = &tokens[..n.min(tokens.len())];
    perplexity(llm.engine.runner(), tokens, 512, &|_| {}).expect("perplexity").mean_nll
}

#[test]
fn perplexity_of_held_out_text() {
    let heldout = &reference()["heldout"];
    let full = std::env::var_os("MOEWE_FULL").is_some_and(|v| v == "1");
    let (n, exact) = if full {
        (usize::MAX, heldout["mean_nll"].as_f64().expect("a number"))
    } else {
        // Two windows and part of a third.
        (1100, mean_nll(DeviceChoice::Cpu, WeightFormat::F32, 1100))
    };
    assert!(exact > 1.0 && exact < 3.0, "{exact} nats");
    let f32 = mean_nll(GPU, WeightFormat::F32, n);
    assert!((f32 - exact).abs() < 1e-4, "{f32} instead of {exact} nats");
    let grouped = WeightFormat::W8 { group: Some(64) };
    for (weights, most) in [(WeightFormat::F16, 0.01), (W8, 0.01), (grouped, 0.01), (W4, 0.03)] {
        let ratio = (mean_nll(GPU, weights, n) - exact).exp();
        assert!((ratio - 1.0).abs() < most, "{weights:?}: perplexity times {ratio}");
    }
}

#[test]
fn memory_is_what_was_planned() {
    let grouped = WeightFormat::W8 { group: Some(128) };
    let formats = [WeightFormat::F32, WeightFormat::F16, W8, grouped, W4];
    for device in [GPU, DeviceChoice::Cpu] {
        for weights in formats {
            let options = LlmOptions {
                load_format: LoadFormat::Dummy,
                max_num_seqs: 3,
                max_num_batched_tokens: 100,
                ..options(&gull(), device.clone(), weights)
            };
            let planned = PlannedLlm::new(options).expect("it fits");
            let plan = planned.memory;
            let mut llm = planned.load(&|_| {}).expect("random weights");
            let allocated = llm.engine.runner().device().allocated_bytes();
            assert_eq!(plan.total(), allocated, "{device}, {weights:?}: {plan}");
            let params = SamplingParams { max_tokens: Some(3), ..SamplingParams::greedy() };
            let answer = llm.generate(&[5, 6, 7], params, vec![], |_| true).expect("an answer");
            assert!(!answer.tokens.is_empty());
        }
    }
}

#[test]
fn loading_reports_progress_up_to_the_plan() {
    let planned = PlannedLlm::new(options(&gull(), DeviceChoice::Cpu, W8)).expect("it fits");
    let total = std::cell::Cell::new(0);
    let weights = planned.memory.weights;
    planned.load(&|bytes| total.set(total.get() + bytes)).expect("it loads");
    let share = total.get() as f64 / weights as f64;
    assert!((0.9..=1.0).contains(&share), "{} of {weights} bytes", total.get());
}
