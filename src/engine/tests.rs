//! The real engine on a golden checkpoint: whatever is scheduled how, texts stay the same.

use std::collections::BTreeMap;

use super::*;
use crate::{
    device::DeviceChoice,
    llm::{Llm, LlmOptions},
};

fn options(device: DeviceChoice) -> LlmOptions {
    LlmOptions {
        model: Some(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/qwen3_moe").into()),
        device,
        max_model_len: Some(96),
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        block_size: 8,
        ..LlmOptions::default()
    }
}

fn engine(options: LlmOptions) -> Engine {
    Llm::open(options).unwrap().engine
}

/// Reproducible tokens; the first `shared` are the same for all seeds.
fn prompt(seed: u32, n: u32, shared: u32) -> Vec<u32> {
    (0..n).map(|i| (if i < shared { i * 37 } else { i * 61 + seed * 17 }) % 200 + 3).collect()
}

/// Requests of many kinds: greedy and drawn, penalised, biased, with common beginnings.
fn requests() -> Vec<Request> {
    let greedy =
        SamplingParams { max_tokens: Some(12), ignore_eos: true, ..SamplingParams::greedy() };
    let drawn = SamplingParams { temperature: 0.9, seed: Some(3), ..greedy.clone() };
    let penalised = SamplingParams {
        repetition_penalty: 1.3,
        frequency_penalty: 0.4,
        presence_penalty: 0.2,
        ..drawn.clone()
    };
    let biased = SamplingParams {
        logit_bias: vec![(7, 3.0), (9, f32::NEG_INFINITY)],
        allowed_token_ids: Some((0..60).collect()),
        min_tokens: 5,
        ..drawn.clone()
    };
    vec![
        Request::new(prompt(1, 33, 24), greedy.clone()),
        Request::new(prompt(2, 30, 24), penalised),
        Request::new(prompt(3, 1, 0), drawn.clone()),
        Request::new(prompt(4, 40, 24), biased),
        Request::new(prompt(1, 33, 24), SamplingParams { max_tokens: Some(1), ..greedy.clone() }),
        Request::new(prompt(5, 17, 0), SamplingParams { top_p: 0.9, top_k: 40, ..drawn }),
        Request::new(prompt(6, 70, 50), greedy),
    ]
}

/// All answers, in order of the requests.
fn answers(engine: &mut Engine, requests: Vec<Request>) -> Vec<Vec<u32>> {
    let mut all = BTreeMap::new();
    for request in requests {
        all.insert(engine.add(request).unwrap(), Vec::new());
    }
    while engine.is_busy() {
        for output in engine.step().unwrap() {
            all.get_mut(&output.request).unwrap().extend(output.token);
        }
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    all.into_values().collect()
}

fn alone(device: DeviceChoice) -> Vec<Vec<u32>> {
    let config = EngineConfig { overlap: false, prefix_caching: false, ..Default::default() };
    let mut engine = engine(LlmOptions { engine: config, ..options(device) });
    requests().into_iter().flat_map(|r| answers(&mut engine, vec![r])).collect()
}

#[test]
fn neither_batch_nor_cache_nor_overlap_changes_a_text() {
    let expected = alone(DeviceChoice::Cpu);
    assert_eq!(expected.iter().map(Vec::len).collect::<Vec<_>>(), [12, 12, 12, 12, 1, 12, 12]);
    assert!(expected[3].iter().all(|&id| id < 60 && id != 9));
    for (overlap, prefix_caching, chunk) in
        [(true, true, 64), (true, false, 64), (false, true, 64), (true, true, 9), (false, false, 5)]
    {
        let config = EngineConfig { overlap, prefix_caching, ..Default::default() };
        let options = options(DeviceChoice::Cpu);
        let mut engine =
            engine(LlmOptions { engine: config, max_num_batched_tokens: chunk, ..options });
        // The second time prefixes are warm.
        for _ in 0..2 {
            assert_eq!(answers(&mut engine, requests()), expected, "{overlap} {prefix_caching}");
        }
        let stats = engine.stats();
        assert_eq!(stats.prefix_hits > 0, prefix_caching);
        assert_eq!(stats.generated_tokens, 2 * 73);
    }
}

#[test]
fn the_gpu_agrees_with_itself() {
    let expected = alone(DeviceChoice::Auto);
    let mut engine = engine(options(DeviceChoice::Auto));
    for _ in 0..2 {
        assert_eq!(answers(&mut engine, requests()), expected);
    }
}

#[test]
fn preemption_changes_no_text() {
    let expected = alone(DeviceChoice::Cpu);
    for (overlap, prefix_caching) in [(true, true), (true, false), (false, true)] {
        let config = EngineConfig { overlap, prefix_caching, ..Default::default() };
        // Blocks for one longest sequence and a little more.
        let kv_cache_memory = Some(14 * BLOCK_BYTES);
        let options = options(DeviceChoice::Cpu);
        let mut engine = engine(LlmOptions { engine: config, kv_cache_memory, ..options });
        assert_eq!(engine.stats().kv_blocks_total, 13);
        assert_eq!(answers(&mut engine, requests()), expected);
        assert!(engine.stats().preemptions > 0);
    }
}

/// Of the golden checkpoint at 8 positions: keys and values, 3 layers, 2 heads of 24, f16.
const BLOCK_BYTES: u64 = 2 * 3 * 2 * 24 * 8 * 2;

#[test]
fn expert_counts_are_those_of_real_tokens() {
    // Read at every step, or only at the end.
    for (overlap, expert_stats_interval) in [(true, 1), (false, 1), (true, 1000)] {
        let routing_timing_interval = 2;
        let rest = EngineConfig { routing_timing_interval, ..Default::default() };
        count(EngineConfig { overlap, expert_stats_interval, ..rest });
    }
}

fn count(config: EngineConfig) {
    let mut engine = engine(LlmOptions { engine: config, ..options(DeviceChoice::Auto) });
    let greedy =
        SamplingParams { max_tokens: Some(4), ignore_eos: true, ..SamplingParams::greedy() };
    answers(&mut engine, vec![Request::new(prompt(1, 30, 0), greedy)]);
    assert!(engine.stats().routing_ms.is_some_and(|ms| ms > 0.0));
    let (experts, spec) = (engine.stats().experts, engine.runner().model().spec.clone());
    let top_k = spec.moe_layers().next().unwrap().1.routing.top_k as u64;
    assert_eq!(experts.layers.len(), spec.moe_layers().count());
    for (layer, tokens) in experts.layers.iter().zip(experts.tokens.chunks(experts.n_experts)) {
        // The last token is never computed; an overlapped step may not run for it either.
        assert_eq!(tokens.iter().sum::<u64>(), 33 * top_k);
        assert_eq!(layer.slots_used, 33 * top_k);
        assert!(layer.slots >= layer.slots_used && layer.steps == 4);
        assert!(layer.active >= top_k * 4);
    }
}

#[test]
fn logprobs_are_of_the_raw_logits_and_score_the_prompt() {
    let mut engine = engine(options(DeviceChoice::Auto));
    let scored = SamplingParams {
        max_tokens: Some(3),
        ignore_eos: true,
        logprobs: Some(2),
        prompt_logprobs: Some(1),
        ..SamplingParams::greedy()
    };
    let text = prompt(1, 21, 0);
    engine.add(Request::new(text.clone(), scored.clone())).unwrap();
    let mut outputs = Vec::new();
    while engine.is_busy() {
        outputs.extend(engine.step().unwrap());
    }
    assert_eq!(outputs[0].prompt_logprobs.len(), 20);
    for output in &outputs {
        let logprobs = output.logprobs.as_ref().unwrap();
        assert_eq!((logprobs.top.len(), logprobs.top[0].0), (2, output.token.unwrap()));
        assert!((logprobs.chosen - logprobs.top[0].1).abs() < 1e-5);
        assert!(logprobs.top[0].1 >= logprobs.top[1].1);
    }
    // Forbidding the best token changes the choice, not the probabilities.
    let best = outputs[0].token.unwrap();
    let second = outputs[0].logprobs.as_ref().unwrap().top[1];
    let biased = SamplingParams { logit_bias: vec![(best, f32::NEG_INFINITY)], ..scored.clone() };
    engine.add(Request::new(text.clone(), biased)).unwrap();
    let first = loop {
        if let Some(output) = engine.step().unwrap().into_iter().next() {
            break output;
        }
    };
    assert_eq!(first.token, Some(second.0));
    assert!((first.logprobs.unwrap().chosen - second.1).abs() < 1e-4);
    // A generated token's log probability is the same when it is part of the prompt.
    let mut longer = text;
    longer.extend(outputs.iter().map(|o| o.token.unwrap()));
    engine.add(Request::new(longer, scored)).unwrap();
    let again = loop {
        let found = engine.step().unwrap().into_iter().find(|o| !o.prompt_logprobs.is_empty());
        if let Some(output) = found {
            break output.prompt_logprobs;
        }
    };
    for (output, prompt) in outputs.iter().zip(&again[20..]) {
        assert!((output.logprobs.as_ref().unwrap().chosen - prompt.chosen).abs() < 2e-2);
    }
}

#[test]
fn bad_words_and_min_tokens_hold() {
    let mut engine = engine(options(DeviceChoice::Cpu));
    let base =
        SamplingParams { max_tokens: Some(10), ignore_eos: true, ..SamplingParams::greedy() };
    let text = prompt(9, 12, 0);
    let free = answers(&mut engine, vec![Request::new(text.clone(), base.clone())]).remove(0);
    let word = free[3..5].to_vec();
    let params = SamplingParams { bad_words: vec![word.clone()], ..base.clone() };
    let held = answers(&mut engine, vec![Request::new(text.clone(), params)]).remove(0);
    assert!(!held.windows(2).any(|pair| pair == word), "{held:?} has {word:?}");
    assert_eq!(held[..3], free[..3]);
    let stop = SamplingParams { stop_token_ids: vec![free[2]], ..base.clone() };
    let stopped = answers(&mut engine, vec![Request::new(text.clone(), stop.clone())]).remove(0);
    assert!(stopped.len() <= 3);
    let late = SamplingParams { min_tokens: 6, ..stop };
    assert!(answers(&mut engine, vec![Request::new(text, late)]).remove(0).len() >= 6);
}

/// Allows the tokens of a list one after the other, then an end.
#[derive(Debug, Clone)]
struct Dictated(Vec<u32>, u32);

impl TokenMask for Dictated {
    fn fill(&mut self, mask: &mut [u32]) -> Result<(), String> {
        let id = *self.0.first().unwrap_or(&self.1);
        mask[id as usize / 32] = 1 << (id % 32);
        Ok(())
    }

    fn accept(&mut self, token: u32) -> Result<(), String> {
        if self.0.remove(0) == token { Ok(()) } else { Err("not dictated".into()) }
    }

    fn fork(&self) -> Box<dyn TokenMask> {
        Box::new(self.clone())
    }
}

#[test]
fn masks_dictate_and_the_batch_around_them_goes_on() {
    let mut engine = engine(options(DeviceChoice::Cpu));
    let eos = engine.eos[0];
    let params = SamplingParams { max_tokens: Some(9), ..SamplingParams::greedy() };
    let free = SamplingParams { ignore_eos: true, ..params.clone() };
    let expected =
        answers(&mut engine, vec![Request::new(prompt(1, 9, 0), free.clone())]).remove(0);
    let mask: Option<Box<dyn TokenMask>> = Some(Box::new(Dictated(vec![5, 6, 7], eos)));
    let request = Request { mask, ..Request::new(prompt(2, 9, 0), params) };
    let all = answers(&mut engine, vec![request, Request::new(prompt(1, 9, 0), free)]);
    assert_eq!(all, [vec![5, 6, 7, eos], expected]);
}

#[test]
fn a_request_that_leaves_no_token_fails_alone() {
    let mut engine = engine(options(DeviceChoice::Cpu));
    let params =
        SamplingParams { max_tokens: Some(5), ignore_eos: true, ..SamplingParams::greedy() };
    let request = |params: &SamplingParams| Request::new(prompt(1, 9, 0), params.clone());
    let expected = answers(&mut engine, vec![request(&params)]).remove(0);
    // Two tokens, of which each ends a bad word once the other has come, or itself.
    let stuck = SamplingParams {
        allowed_token_ids: Some(vec![7, 8]),
        bad_words: vec![vec![7, 7], vec![7, 8], vec![8, 7], vec![8, 8]],
        ..params.clone()
    };
    let id = engine.add(request(&stuck)).unwrap();
    let other = engine.add(request(&params)).unwrap();
    let (mut failed, mut text) = (None, Vec::new());
    while engine.is_busy() {
        for output in engine.step().unwrap() {
            match output.request == other {
                true => text.extend(output.token),
                false => failed = failed.or(output.finished),
            }
            assert!(output.request == id || output.request == other);
        }
    }
    assert_eq!((failed, text), (Some(FinishReason::Mask), expected));
}

#[test]
fn limits_are_kept() {
    let config = EngineConfig { max_queue: 3, ..Default::default() };
    let mut engine = engine(LlmOptions { engine: config, ..options(DeviceChoice::Cpu) });
    let request = || Request::new(prompt(1, 5, 0), SamplingParams::greedy());
    let code = |result: Result<Vec<RequestId>>| result.unwrap_err().to_string();
    engine.add_n(&request(), 2).unwrap();
    assert!(code(engine.add_n(&request(), 2)).contains("2 requests are waiting"));
    let last = engine.add(request()).unwrap();
    assert!(code(engine.add_n(&request(), 1)).contains("try again later"));
    engine.cancel(last);
    let refused = |params| {
        let request = Request::new(prompt(1, 5, 0), params);
        engine.check(&request).unwrap_err().to_string()
    };
    let base = SamplingParams::greedy();
    for (params, words) in [
        (SamplingParams { logprobs: Some(21), ..base.clone() }, "logprobs is 21"),
        (SamplingParams { temperature: f32::NAN, ..base.clone() }, "temperature is NaN"),
        (SamplingParams { logit_bias: vec![(1 << 20, 0.0)], ..base.clone() }, "vocabulary"),
        (SamplingParams { logit_bias: vec![(1, f32::NAN)], ..base.clone() }, "logit_bias"),
        (SamplingParams { bad_words: vec![vec![]], ..base.clone() }, "bad_words"),
        (SamplingParams { stop_token_ids: vec![1; 2000], ..base.clone() }, "1024"),
        (SamplingParams { allowed_token_ids: Some(vec![]), ..base.clone() }, "at least one"),
        (SamplingParams { min_tokens: 3, max_tokens: Some(2), ..base }, "min_tokens"),
    ] {
        let error = refused(params);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_spoilt_sequence_fails_alone_and_is_not_found_again() {
    let config = EngineConfig { overlap: false, ..Default::default() };
    let mut engine = engine(LlmOptions { engine: config, ..options(DeviceChoice::Cpu) });
    let params =
        SamplingParams { max_tokens: Some(8), ignore_eos: true, ..SamplingParams::greedy() };
    let request = |seed| Request::new(prompt(seed, 20, 0), params.clone());
    let expected = answers(&mut engine, vec![request(2)]).remove(0);
    let whole = answers(&mut engine, vec![request(1)]).remove(0);
    let bad = engine.add(request(1)).unwrap();
    let good = engine.add(request(2)).unwrap();
    let mut text: Vec<u32> = engine
        .step()
        .unwrap()
        .into_iter()
        .flat_map(|o| if o.request == good { o.token } else { None })
        .collect();
    // Not a number, in every value of the sequence's first block.
    let block = engine.scheduler.get(bad).unwrap().blocks[0] as usize;
    let values = engine.runner.kv().layers[0].1;
    let n_bytes = values.bytes() as usize / engine.runner.kv().n_blocks;
    let nan = vec![0x7e; n_bytes];
    engine.runner.device().write_at(&values, (block * n_bytes) as u64, &nan);
    let mut failed = None;
    while engine.is_busy() {
        for output in engine.step().unwrap() {
            if output.request == bad {
                assert_eq!(output.token, None);
                failed = output.finished;
            } else {
                text.extend(output.token);
            }
        }
    }
    assert_eq!((failed, text), (Some(FinishReason::NonFinite), expected));
    assert_eq!((engine.stats().non_finite, engine.stats().kv_blocks_used), (1, 0));
    assert_eq!(answers(&mut engine, vec![request(1)]), [whole]);
}

#[test]
fn cancelling_at_any_step_frees_blocks_at_once_and_disturbs_nobody() {
    let mut engine = engine(LlmOptions {
        max_num_batched_tokens: 16,
        max_num_seqs: 2,
        ..options(DeviceChoice::Cpu)
    });
    let params =
        SamplingParams { max_tokens: Some(6), ignore_eos: true, ..SamplingParams::greedy() };
    let request = |seed| Request::new(prompt(seed, 30, 0), params.clone());
    let expected = answers(&mut engine, vec![request(1)]).remove(0);
    for n_steps in 0..8 {
        let kept = engine.add(request(1)).unwrap();
        let gone: Vec<RequestId> = (2..5).map(|seed| engine.add(request(seed)).unwrap()).collect();
        let mut text = Vec::new();
        let mut step = |engine: &mut Engine, gone: &[RequestId]| {
            for output in engine.step().unwrap() {
                assert!(gone.is_empty() || output.request == kept);
                text.extend(output.token.filter(|_| output.request == kept));
            }
        };
        (0..n_steps).for_each(|_| step(&mut engine, &[]));
        let others = |engine: &mut Engine| engine.stats().running + engine.stats().waiting;
        gone.iter().for_each(|&id| engine.cancel(id));
        assert!(others(&mut engine) <= 1);
        let own = engine.scheduler.get(kept).map_or(0, |s| s.blocks.len());
        assert_eq!(engine.stats().kv_blocks_used, own);
        while engine.is_busy() {
            step(&mut engine, &gone);
        }
        assert_eq!(text, expected, "cancelled after {n_steps} steps");
    }
}

#[test]
fn experts_of_a_token_are_those_that_computed_it() {
    let config = EngineConfig { routed_experts: true, ..EngineConfig::default() };
    for device in [DeviceChoice::Cpu, DeviceChoice::Index(0)] {
        let options = LlmOptions { engine: config, ..options(device) };
        let mut engine = engine(options);
        let prompts: Vec<Vec<u32>> =
            [(1, 33, 24), (2, 9, 0), (3, 1, 0)].map(|(s, n, k)| prompt(s, n, k)).to_vec();
        let params = SamplingParams { max_tokens: Some(4), ..SamplingParams::greedy() };
        let add = |p: &Vec<u32>| engine.add(Request::new(p.clone(), params.clone())).unwrap();
        let ids: Vec<RequestId> = prompts.iter().map(add).collect();
        let mut first = BTreeMap::new();
        while engine.is_busy() {
            for output in engine.step().unwrap() {
                first.entry(output.request).or_insert(output.experts);
            }
        }
        // The same prompts alone, their last rows' choices read from the device.
        let mut runner = engine.into_runner();
        for (prompt, id) in prompts.iter().zip(&ids) {
            let blocks: Vec<u32> = (1..=prompt.len().div_ceil(8) as u32).collect();
            let (tokens, logits) = (&prompt[..], LogitRows::Last);
            let sequence =
                BatchSequence { tokens, blocks: &blocks, logits, ..BatchSequence::default() };
            runner.run(&Batch { sequences: vec![sequence] }, false).unwrap();
            let layers = runner.routed(prompt.len()).unwrap();
            let last = layers.iter().flatten().flat_map(|layer| {
                layer.ids[(prompt.len() - 1) * layer.top_k..].iter().map(|&id| id as u32)
            });
            assert_eq!(first[id], last.collect::<Vec<_>>());
            assert!(!first[id].is_empty());
        }
    }
}
