//! What must not change a result: how a prompt is cut into steps, who else is in the batch, a
//! preemption, the block size, the device, the run. And what must: seed and penalties. Mostly in
//! f32 with greedy tokens, where a difference is a bug and not a rounding.

use moewe::{
    device::{Device, DeviceChoice, Tier},
    engine::{
        Batch, BatchSequence, Engine, EngineConfig, FinishReason, LogitRows, Request, RequestId,
        Runner, SamplingParams,
    },
    llm::{Llm, LlmOptions},
    model::{ExpertShape, KvCache, Limits, Model, Precision, arch},
    weights::{Checkpoint, WeightFormat},
};

use crate::checkpoints::{GPU, W8, gull, open, options, read_json};

const F32: WeightFormat = WeightFormat::F32;

/// Prompts of different lengths, the longest a few tiles of prefill.
fn prompts() -> Vec<Vec<u32>> {
    let made = |n: usize, salt: usize| (0..n).map(move |i| ((i * 37 + salt) % 3000 + 100) as u32);
    let reference = read_json(&gull().join("reference.json"));
    let mut prompts: Vec<Vec<u32>> = reference["greedy"].as_array().expect("samples")[..4]
        .iter()
        .map(|s| serde_json::from_value(s["prompt_ids"].clone()).expect("ids"))
        .collect();
    prompts.push(made(1, 5).collect());
    prompts.push(made(90, 11).collect());
    prompts.push(made(33, 17).collect());
    prompts
}

fn greedy(max_tokens: usize) -> SamplingParams {
    let max_tokens = Some(max_tokens);
    SamplingParams { max_tokens, ignore_eos: true, ..SamplingParams::greedy() }
}

/// Queues all requests at once and steps to the end; tokens in the order of the requests.
fn run_all(engine: &mut Engine, requests: &[(Vec<u32>, SamplingParams)]) -> Vec<Vec<u32>> {
    let add = |(prompt, params): &(Vec<u32>, SamplingParams)| {
        engine.add(Request::new(prompt.clone(), params.clone())).expect("a valid request")
    };
    let ids: Vec<RequestId> = requests.iter().map(add).collect();
    let (mut tokens, mut open) = (vec![Vec::new(); ids.len()], ids.len());
    for _ in 0..10_000 {
        if !engine.is_busy() {
            assert_eq!(open, 0, "requests are lost");
            return tokens;
        }
        for output in engine.step().expect("the step runs") {
            let index = ids.iter().position(|id| *id == output.request).expect("a request");
            tokens[index].push(output.token.expect("a token"));
            open -= usize::from(output.finished.is_some());
        }
    }
    panic!("the engine does not come to an end");
}

fn greedy_all(engine: &mut Engine, n: usize) -> Vec<Vec<u32>> {
    let requests: Vec<_> = prompts().into_iter().map(|p| (p, greedy(n))).collect();
    run_all(engine, &requests)
}

/// Each prompt by itself.
fn greedy_alone(engine: &mut Engine, n: usize) -> Vec<Vec<u32>> {
    prompts().into_iter().flat_map(|p| run_all(engine, &[(p, greedy(n))])).collect()
}

fn llm(change: impl FnOnce(&mut LlmOptions)) -> Llm {
    let mut options = LlmOptions { max_num_seqs: 8, ..options(&gull(), GPU, F32) };
    change(&mut options);
    Llm::open(options).expect("the default model")
}

#[test]
fn neither_batch_nor_chunks_nor_blocks_nor_device_nor_tier_changes_greedy_tokens() {
    let alone = greedy_alone(&mut llm(|_| {}).engine, 12);
    assert!(alone.iter().all(|tokens| tokens.len() == 12));
    let check = |what: &str, mut llm: Llm| {
        assert_eq!(greedy_all(&mut llm.engine, 12), alone, "{what}");
        assert_eq!(greedy_all(&mut llm.engine, 12), alone, "{what}, a second time");
    };
    check("batched", llm(|_| {}));
    check("in chunks of 7", llm(|o| o.max_num_batched_tokens = 7));
    check("one sequence at a time", llm(|o| o.max_num_seqs = 1));
    check("in blocks of 8", llm(|o| o.block_size = 8));
    check("in blocks of 32", llm(|o| o.block_size = 32));
    check("on the portable tier", llm(|o| o.tier = Some(Tier::Portable)));
    check("on the CPU device", llm(|o| o.device = DeviceChoice::Cpu));
}

/// More tokens than run without blocks anywhere; each expert's sums are the same, only launched by
/// themselves.
#[test]
fn experts_one_after_another_give_what_all_at_once_do() {
    let tokens: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % 3000 + 100).collect();
    for (device, weights) in [(GPU, F32), (GPU, W8), (DeviceChoice::Cpu, F32)] {
        let open = |moe_block_align| {
            llm(|o| {
                *o = LlmOptions {
                    device: device.clone(),
                    weights: Some(weights),
                    moe_block_align,
                    ..o.clone()
                }
            })
        };
        let (mut together, mut looped) = (open(true), open(false));
        let (a, b) = (logits(&mut together, &tokens, 150), logits(&mut looped, &tokens, 150));
        assert_eq!(a, b, "{device:?}, {weights}");
        let dispatches = |llm: &mut Llm| {
            let rec = llm.engine.runner().last_recording().expect("a step has run");
            rec.dispatches.len()
        };
        let (few, many) = (dispatches(&mut together), dispatches(&mut looped));
        assert!(many > few + 400, "{few} and {many} launches: 7 layers have 32 experts each");
    }
}

/// However an adapter was tuned, by whatever mistake: with and without blocks, of every size.
#[test]
fn no_choice_of_blocks_changes_greedy_tokens() {
    let expected = greedy_all(&mut llm(|o| o.weights = Some(F32)).engine, 6);
    for choice in [1, 16, 32, 7] {
        let mut llm = llm(|o| o.weights = Some(F32));
        let runner = llm.engine.runner();
        let (spec, precision) = (runner.model().spec.clone(), runner.model().precision);
        let (_, moe) = spec.moe_layers().next().expect("experts");
        let (shape, caps) = (ExpertShape::of(&spec, moe, precision), runner.device().caps());
        runner.device().tune(&shape.name(&caps), vec![(usize::MAX, choice)]);
        let rows = shape.block_tokens(&runner.device().caps(), precision.activations, 7);
        // There is no block of 7 rows.
        let by_rule = shape.by_rule(&caps, precision.activations, 7);
        assert_eq!(rows, if choice == 7 { by_rule } else { choice });
        assert_eq!(greedy_all(&mut llm.engine, 6), expected, "{choice} rows");
    }
}

#[test]
fn batches_of_int8_experts_repeat_exactly() {
    let mut llm = llm(|o| o.weights = Some(W8));
    let first = greedy_all(&mut llm.engine, 12);
    assert_eq!(first, greedy_all(&mut llm.engine, 12));
    // Other kernels serve one sequence than many; text may part at near ties, mostly it does not.
    let alone = greedy_alone(&mut llm.engine, 12);
    let same = first.iter().zip(&alone).filter(|(a, b)| a == b).count();
    assert!(same + 2 >= first.len(), "{same} of {} are the same", first.len());
}

/// An engine whose cache has `n_blocks` blocks of 8 positions.
fn engine_with_cache(device: Device, n_blocks: usize) -> Engine {
    let mut device = device;
    let spec = arch::parse(&read_json(&gull().join("config.json"))).expect("a config");
    let precision = Precision::of(F32);
    let kv = KvCache::alloc(&mut device, &spec, n_blocks, 8, precision.activations).expect("fits");
    let source = Checkpoint::open(&gull()).expect("a checkpoint");
    let model = Model::load(spec, &source, &mut device, precision, 256, &|_| {}).expect("loads");
    let (max_tokens, max_sequences) = (64, 8);
    let limits =
        Limits { max_tokens, max_sequences, max_logits: 8, max_blocks: 32, max_penalized: 8 };
    Engine::new(Runner::new(device, model, kv, limits).expect("fits"), EngineConfig::default())
}

#[test]
fn preemption_changes_nothing() {
    // The longest request takes 15 blocks; all together would take more than 30.
    let mut roomy = engine_with_cache(Device::cpu(), 200);
    let mut tight = engine_with_cache(Device::cpu(), 18);
    let requests: Vec<_> = prompts()
        .into_iter()
        .enumerate()
        .map(|(i, prompt)| {
            let penalty = if i % 2 == 0 { 1.0 } else { 0.0 };
            let temperature = if i % 3 == 0 { 0.8 } else { 0.0 };
            let seed = Some(i as u64);
            (prompt, SamplingParams { temperature, presence_penalty: penalty, seed, ..greedy(24) })
        })
        .collect();
    let expected = run_all(&mut roomy, &requests);
    assert_eq!(roomy.stats().preemptions, 0, "there is room for all");
    let tokens = run_all(&mut tight, &requests);
    assert!(tight.stats().preemptions > 0, "nothing was preempted");
    assert_eq!(tokens, expected);
}

/// Logits of all positions when the sequence is fed in pieces of `piece` tokens.
fn logits(llm: &mut Llm, tokens: &[u32], piece: usize) -> Vec<Vec<f32>> {
    let runner = llm.engine.runner();
    let blocks: Vec<u32> = (1..=tokens.len().div_ceil(16) as u32).collect();
    let mut all = Vec::new();
    for (i, tokens) in tokens.chunks(piece).enumerate() {
        let (position, logits) = (i * piece, LogitRows::All);
        let rest = BatchSequence::default();
        let sequence = BatchSequence { tokens, position, blocks: &blocks, logits, ..rest };
        runner.run(&Batch { sequences: vec![sequence] }, false).expect("the step runs");
        all.extend(runner.logits(tokens.len()).expect("logits"));
    }
    all
}

#[test]
fn prefill_of_n_is_n_times_decode() {
    let tokens = &prompts()[5];
    for (device, tolerance) in [(GPU, 1e-3), (DeviceChoice::Cpu, 1e-3)] {
        let mut llm = open(&gull(), device, F32);
        let whole = logits(&mut llm, tokens, tokens.len());
        for piece in [1, 2, 13, 64] {
            let pieces = logits(&mut llm, tokens, piece);
            let pairs = whole.iter().flatten().zip(pieces.iter().flatten());
            let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(worst < tolerance, "in pieces of {piece} logits are {worst} off");
        }
    }
}

#[test]
fn seeds_and_penalties_decide_the_text() {
    let mut llm = open(&gull(), GPU, W8);
    let prompt = llm.raw_prompt("Once upon a time").expect("tokens");
    let mut tokens = |params: SamplingParams| {
        let params = SamplingParams { max_tokens: Some(40), ignore_eos: true, ..params };
        llm.generate(&prompt, params, vec![], |_| true).expect("an answer").tokens
    };
    let sampled = |seed| SamplingParams { seed: Some(seed), ..SamplingParams::default() };
    let first = tokens(sampled(1));
    assert_eq!(first, tokens(sampled(1)));
    assert_ne!(first, tokens(sampled(2)));
    assert_ne!(first, tokens(SamplingParams { temperature: 0.1, ..sampled(1) }));
    let best = tokens(SamplingParams::greedy());
    // Each of these leaves one candidate.
    for narrow in [
        SamplingParams { top_k: 1, ..sampled(3) },
        SamplingParams { top_p: 1e-6, ..sampled(3) },
        SamplingParams { min_p: 1.0, ..sampled(3) },
    ] {
        assert_eq!(tokens(narrow.clone()), best, "{narrow:?}");
    }
    let distinct = |tokens: &[u32]| tokens.iter().collect::<std::collections::HashSet<_>>().len();
    for penalized in [
        SamplingParams { repetition_penalty: 5.0, ..SamplingParams::greedy() },
        SamplingParams { presence_penalty: 2.0, ..SamplingParams::greedy() },
        SamplingParams { frequency_penalty: 2.0, ..SamplingParams::greedy() },
    ] {
        let other = tokens(penalized.clone());
        assert_ne!(other, best, "{penalized:?}");
        assert!(distinct(&other) > distinct(&best), "{penalized:?} repeats as much");
    }
}

#[test]
fn stop_strings_and_tokens_end_an_answer() {
    let mut llm = open(&gull(), DeviceChoice::Cpu, F32);
    let prompt = llm.raw_prompt("Once upon a time").expect("tokens");
    let mut answer = |params: SamplingParams, stop: &[&str]| {
        let stop = stop.iter().map(|s| s.to_string()).collect();
        llm.generate(&prompt, params, stop, |_| true).expect("an answer")
    };
    let whole = answer(greedy(40), &[]);
    assert_eq!(whole.finish, Some(FinishReason::Length));
    let stop = &whole.text[20..27];
    let cut = answer(greedy(40), &["not in the text", stop]);
    assert_eq!(cut.text, whole.text[..whole.text.find(stop).expect("it is there")]);
    assert_eq!(cut.finish, Some(FinishReason::Stop));
    assert!(cut.tokens.len() < whole.tokens.len());
    let token = whole.tokens[5];
    let first = whole.tokens.iter().position(|t| *t == token).expect("it is there");
    let ended = answer(SamplingParams { stop_token_ids: vec![token], ..greedy(40) }, &[]);
    assert_eq!(ended.finish, Some(FinishReason::Stop));
    assert_eq!(ended.tokens, whole.tokens[..=first]);
}
