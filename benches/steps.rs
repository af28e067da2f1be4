//! Steps of the shipped model on whatever adapter moewe picks, without a scheduler: one token of
//! some sequences, and a chunk of a prompt. `cargo bench --bench steps`

use std::time::Duration;

use criterion::{
    BenchmarkId, Criterion, SamplingMode, Throughput, criterion_group, criterion_main,
};
use moewe::{
    engine::{Batch, BatchSequence, LogitRows, Runner},
    llm::{Llm, LlmOptions},
};

/// Positions before the token that is decoded.
const DEPTH: usize = 64;
/// Of the key/value cache.
const BLOCK: usize = 16;
const CHUNK: usize = 512;
const MOST_SEQUENCES: usize = 16;

fn runner() -> Runner {
    let options = LlmOptions {
        text: false,
        max_model_len: Some(CHUNK),
        max_num_batched_tokens: CHUNK,
        max_num_seqs: MOST_SEQUENCES,
        block_size: BLOCK,
        ..LlmOptions::default()
    };
    Llm::open(options).expect("the shipped model").engine.into_runner()
}

/// Runs a step of sequences of `tokens` from `position` on and waits for it.
fn step(runner: &mut Runner, n: usize, tokens: &[u32], position: usize) {
    let per_sequence = (position + tokens.len()).div_ceil(BLOCK);
    // Block 0 is padding's.
    let blocks: Vec<u32> = (1..=(n * per_sequence) as u32).collect();
    let sequences = blocks
        .chunks(per_sequence)
        .map(|blocks| BatchSequence {
            tokens,
            position,
            blocks,
            logits: LogitRows::Last,
            ..BatchSequence::default()
        })
        .collect();
    runner.run(&Batch { sequences }, true).expect("it runs");
    runner.device().wait().expect("it ends");
}

fn steps(c: &mut Criterion) {
    let mut runner = runner();
    let vocab = runner.model().spec.vocab_size;
    let tokens: Vec<u32> = (0..CHUNK).map(|i| ((i * 37 + 11) % vocab) as u32).collect();
    let mut group = c.benchmark_group("step");
    // Seconds each on a CPU that plays GPU.
    group.sampling_mode(SamplingMode::Flat).sample_size(10);
    group.measurement_time(Duration::from_secs(5));
    for n in [1, MOST_SEQUENCES] {
        group.throughput(Throughput::Elements(n as u64));
        // Keys and values of earlier positions are zeros, which cost as much as any.
        group.bench_function(BenchmarkId::new("decode", n), |b| {
            b.iter(|| step(&mut runner, n, &tokens[..1], DEPTH));
        });
    }
    group.throughput(Throughput::Elements(CHUNK as u64));
    group.bench_function(BenchmarkId::new("prefill", CHUNK), |b| {
        b.iter(|| step(&mut runner, 1, &tokens, 0));
    });
}

criterion_group!(benches, steps);
criterion_main!(benches);
