//! `moewe bench throughput` and `moewe bench latency`: the engine without a server. Their JSON has
//! the field names of `vllm bench throughput` and `vllm bench latency`.

use std::{process::ExitCode, time::Instant};

use clap::Args;
use indicatif::ProgressBar;
use moewe::{
    engine::{Engine, Request, SamplingParams},
    parallel::CacheStats,
};
use serde_json::{Value, json};

use super::{
    random::Random,
    subject::{Subject, check_size, progress},
    summary::{self, Sorted},
};

/// Lengths of random requests.
#[derive(Debug, Args)]
struct Lengths {
    /// Tokens of a prompt
    #[arg(long, default_value_t = 128)]
    input_len: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 64)]
    output_len: usize,
}

/// Options of `moewe bench throughput`.
#[derive(Debug, Args)]
pub(super) struct Throughput {
    #[command(flatten)]
    subject: Subject,
    #[command(flatten)]
    lengths: Lengths,
    /// Requests to answer
    #[arg(long, default_value_t = 64)]
    num_prompts: usize,
    /// Sequences that run together
    #[arg(long, default_value_t = 16)]
    max_num_seqs: usize,
    /// Requests that may be open; several numbers are measured one after another [default: those
    /// that run together]
    #[arg(long, value_delimiter = ',')]
    max_concurrency: Vec<usize>,
}

/// Options of `moewe bench latency`.
#[derive(Debug, Args)]
pub(super) struct Latency {
    #[command(flatten)]
    subject: Subject,
    #[command(flatten)]
    lengths: Lengths,
    /// Sequences of a batch
    #[arg(long, default_value_t = 8)]
    batch_size: usize,
    /// Batches before the first that counts
    #[arg(long, default_value_t = 2)]
    num_iters_warmup: usize,
    /// Batches to measure
    #[arg(long, default_value_t = 10)]
    num_iters: usize,
}

/// An engine and the requests that it is given.
struct Load {
    engine: Engine,
    random: Random,
    lengths: Lengths,
    name: String,
}

impl Load {
    fn new(subject: &Subject, lengths: Lengths, max_num_seqs: usize) -> anyhow::Result<Self> {
        check_size("--input-len and --output-len", [lengths.input_len, lengths.output_len])?;
        let mut engine =
            subject.engine(max_num_seqs, lengths.input_len.saturating_add(lengths.output_len))?;
        let name = subject.name(engine.runner());
        Ok(Self { engine, random: Random(subject.seed()), lengths, name })
    }

    /// Answers `n` random prompts, at most `open` at a time; seconds it took.
    fn run(&mut self, n: usize, open: usize, bar: &ProgressBar) -> anyhow::Result<f64> {
        let vocab = self.engine.runner().model().spec.vocab_size;
        let params = SamplingParams {
            max_tokens: Some(self.lengths.output_len),
            ignore_eos: true,
            ..SamplingParams::greedy()
        };
        let mut prompt = || -> Vec<u32> {
            (0..self.lengths.input_len).map(|_| self.random.below(vocab) as u32).collect()
        };
        let mut prompts: Vec<_> = (0..n).map(|_| prompt()).collect();
        let start = Instant::now();
        let mut n_open = 0;
        while n_open > 0 || !prompts.is_empty() {
            while n_open < open
                && let Some(prompt) = prompts.pop()
            {
                self.engine.add(Request::new(prompt, params.clone()))?;
                n_open += 1;
            }
            let finished = self.engine.step()?.iter().filter(|o| o.finished.is_some()).count();
            bar.inc(finished as u64);
            n_open -= finished;
        }
        Ok(start.elapsed().as_secs_f64())
    }
}

impl Throughput {
    const ROWS: &[(&str, &str)] = &[
        ("requests open", "max_concurrency"),
        ("duration (s)", "elapsed_time"),
        ("requests per second", "requests_per_second"),
        ("all tokens per second", "tokens_per_second"),
        ("answer tokens per second", "output_throughput"),
        ("expert cache, slots", "expert_cache_slots"),
        ("expert cache, hit rate", "expert_cache_hit_rate"),
        ("expert cache, MiB moved", "expert_cache_mib_moved"),
        ("expert cache, stalls", "expert_cache_stalls"),
        ("expert cache, extra turns", "expert_cache_extra_turns"),
    ];

    pub(super) fn run(mut self) -> anyhow::Result<ExitCode> {
        check_size("--num-prompts and --max-num-seqs", [self.num_prompts, self.max_num_seqs])?;
        check_size("--max-concurrency", self.max_concurrency.iter().copied())?;
        if self.max_concurrency.is_empty() {
            self.max_concurrency.push(self.max_num_seqs);
        }
        let mut load = Load::new(&self.subject, self.lengths, self.max_num_seqs)?;
        for &open in &self.max_concurrency {
            // Shaders for batches of this size are compiled before the clock starts.
            load.run(open.min(self.num_prompts), open, &ProgressBar::hidden())?;
            let bar = progress(self.num_prompts, "requests")?;
            let before = load.engine.stats().expert_cache;
            let seconds = load.run(self.num_prompts, open, &bar)?;
            bar.finish_and_clear();
            let mut report = report(&load, open, self.num_prompts, seconds);
            if let (Some(before), Some(now)) = (before, load.engine.stats().expert_cache) {
                add_cache(&mut report, &now.since(&before));
            }
            summary::print(self.subject.output, &report, Self::ROWS)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn report(load: &Load, open: usize, n: usize, seconds: f64) -> Value {
    let (inputs, outputs) = (n * load.lengths.input_len, n * load.lengths.output_len);
    json!({
        "model_id": load.name,
        "max_concurrency": open,
        "elapsed_time": seconds,
        "num_requests": n,
        "total_num_tokens": inputs + outputs,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "requests_per_second": n as f64 / seconds,
        "tokens_per_second": (inputs + outputs) as f64 / seconds,
        "output_throughput": outputs as f64 / seconds,
    })
}

/// Adds what the cache of experts did meanwhile.
fn add_cache(report: &mut Value, cache: &CacheStats) {
    let fields = [
        ("slots", json!(cache.slots)),
        ("experts", json!(cache.experts)),
        ("hit_rate", json!(cache.hit_rate())),
        ("mib_moved", json!(cache.bytes_moved as f64 / f64::from(1 << 20))),
        ("stalls", json!(cache.stalls)),
        ("extra_turns", json!(cache.extra_turns)),
    ];
    for (name, value) in fields {
        report[format!("expert_cache_{name}")] = value;
    }
}

impl Latency {
    const ROWS: &[(&str, &str)] = &[
        ("sequences", "batch_size"),
        ("whole batch, mean (s)", "avg_latency"),
        ("whole batch, median (s)", "median_latency"),
        ("whole batch, p99 (s)", "p99_latency"),
    ];

    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        check_size("--batch-size and --num-iters", [self.batch_size, self.num_iters])?;
        let n = self.batch_size;
        let mut load = Load::new(&self.subject, self.lengths, n)?;
        for _ in 0..self.num_iters_warmup {
            load.run(n, n, &ProgressBar::hidden())?;
        }
        let bar = progress(n * self.num_iters, "requests")?;
        let latencies =
            (0..self.num_iters).map(|_| load.run(n, n, &bar)).collect::<anyhow::Result<Vec<_>>>();
        bar.finish_and_clear();
        let latencies = latencies?;
        let sorted = Sorted::new(latencies.clone());
        let percentiles = [10, 25, 50, 75, 90, 99]
            .map(|percent| (percent.to_string(), json!(sorted.percentile(percent.into()))));
        let report = json!({
            "model_id": load.name,
            "batch_size": n,
            "avg_latency": sorted.mean(),
            "median_latency": sorted.percentile(50.0),
            "p99_latency": sorted.percentile(99.0),
            "latencies": latencies,
            "percentiles": percentiles.into_iter().collect::<serde_json::Map<_, _>>(),
        });
        summary::print(self.subject.output, &report, Self::ROWS)?;
        Ok(ExitCode::SUCCESS)
    }
}
