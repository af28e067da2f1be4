//! What `/metrics` shows: vLLM's names, labels and buckets (`vllm/v1/metrics/loggers.py`), which
//! gateways and dashboards read, and the experts' own. Knows no engine beyond its statistics.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
    time::Instant,
};

use crate::engine::EngineStats;

use super::{
    experts,
    failure::Cause,
    histogram::{Histogram, Page, label},
};

const TTFT: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
const LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
const N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
const ITERATION: &[f64] =
    &[1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];

/// vLLM's 1, 2, 5 x 10^k up to the context length.
fn token_buckets(max_model_len: usize) -> Vec<f64> {
    let all = (0..9).flat_map(|k| [1.0, 2.0, 5.0].map(|m| m * 10f64.powi(k)));
    all.take_while(|&bound| bound <= max_model_len as f64).collect()
}

/// What does not change while the server runs.
#[derive(Debug, Clone)]
pub struct MetricsInfo {
    /// Label of every metric.
    pub model_name: String,
    /// Longest prompt and answer together, tokens.
    pub max_model_len: usize,
    /// Whether prefixes are shared.
    pub prefix_caching: bool,
    /// Show a series for each expert of each layer.
    pub per_expert: bool,
}

/// Where a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    Queued,
    Prefill,
    Decode,
}

/// The moments of one choice that the histograms need.
#[derive(Debug, Clone)]
pub(super) struct RequestTimes {
    pub(super) phase: Phase,
    pub(super) n: usize,
    arrived: Instant,
    started: Instant,
    first: Instant,
    last: Instant,
    n_prompt: usize,
    n_tokens: usize,
    max_tokens: Option<usize>,
}

impl RequestTimes {
    pub(super) fn new(arrived: Instant, n_prompt: usize, max_tokens: Option<usize>) -> Self {
        let (started, first, last) = (arrived, arrived, arrived);
        let (phase, n, n_tokens) = (Phase::Queued, 1, 0);
        Self { phase, n, arrived, started, first, last, n_prompt, n_tokens, max_tokens }
    }

    pub(super) fn start(&mut self, now: Instant) {
        self.phase = Phase::Prefill;
        self.started = now;
    }
}

/// Histograms by name, and counters that the engine does not keep.
#[derive(Debug)]
struct Recorded {
    histograms: BTreeMap<&'static str, (&'static str, Histogram)>,
    finished: BTreeMap<&'static str, u64>,
    device_failures: BTreeMap<&'static str, u64>,
}

/// Everything that `/metrics` shows and the engine does not count itself.
#[derive(Debug)]
pub struct Metrics {
    info: MetricsInfo,
    recorded: Mutex<Recorded>,
}

impl Metrics {
    /// Metrics of a server that has answered nothing yet.
    pub fn new(info: MetricsInfo) -> Self {
        let tokens = token_buckets(info.max_model_len);
        let mut histograms = BTreeMap::new();
        for (name, help, bounds) in [
            ("time_to_first_token_seconds", "Arrival to first token.", TTFT),
            ("inter_token_latency_seconds", "Token to token.", PER_TOKEN),
            ("request_time_per_output_token_seconds", "Mean over an answer.", PER_TOKEN),
            ("e2e_request_latency_seconds", "Arrival to last token.", LATENCY),
            ("request_queue_time_seconds", "Arrival to first step.", LATENCY),
            ("request_prefill_time_seconds", "First step to first token.", LATENCY),
            ("request_decode_time_seconds", "First to last token.", LATENCY),
            ("request_inference_time_seconds", "First step to last token.", LATENCY),
            ("request_prompt_tokens", "Tokens of a prompt.", &tokens),
            ("request_generation_tokens", "Tokens of an answer.", &tokens),
            ("request_max_num_generation_tokens", "Longest answer of a request.", &tokens),
            ("request_params_max_tokens", "max_tokens of a request.", &tokens),
            ("request_params_n", "n of a request.", N),
            ("iteration_tokens_total", "Tokens of a step.", ITERATION),
        ] {
            histograms.insert(name, (help, Histogram::new(bounds)));
        }
        // A series exists from the start, so that rates see its first increase.
        let finished = ["stop", "length", "abort", "error"].map(|reason| (reason, 0));
        let device_failures = Cause::LABELS.map(|cause| (cause, 0)).into();
        let recorded = Recorded { histograms, finished: finished.into(), device_failures };
        Self { info, recorded: Mutex::new(recorded) }
    }

    /// The model's name as clients use it.
    pub fn info(&self) -> &MetricsInfo {
        &self.info
    }

    fn record(&self, change: impl FnOnce(&mut Recorded)) {
        change(&mut self.recorded.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// An engine was given up.
    pub(super) fn device_failed(&self, cause: &'static str) {
        self.record(|r| *r.device_failures.entry(cause).or_default() += 1);
    }

    /// A step has run between two snapshots.
    pub(super) fn step(&self, before: &EngineStats, after: &EngineStats) {
        let total = |s: &EngineStats| s.prompt_tokens + s.generated_tokens;
        let tokens = total(after).saturating_sub(total(before));
        if tokens > 0 {
            self.record(|r| r.observe("iteration_tokens_total", tokens as f64));
        }
    }

    /// A request has a new token.
    pub(super) fn token(&self, times: &mut RequestTimes, now: Instant) {
        if times.phase == Phase::Queued {
            times.start(now);
        }
        let seconds = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        if times.phase == Phase::Prefill {
            times.phase = Phase::Decode;
            times.first = now;
            self.record(|r| r.observe("time_to_first_token_seconds", seconds(times.arrived)));
        } else {
            self.record(|r| r.observe("inter_token_latency_seconds", seconds(times.last)));
        }
        times.last = now;
        times.n_tokens += 1;
    }

    /// A request is over.
    pub(super) fn finished(&self, times: &RequestTimes, reason: &'static str) {
        let between = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        self.record(|r| {
            *r.finished.entry(reason).or_default() += 1;
            r.observe("request_prompt_tokens", times.n_prompt as f64);
            r.observe("request_generation_tokens", times.n_tokens as f64);
            r.observe("request_max_num_generation_tokens", times.n_tokens as f64);
            r.observe("request_params_n", times.n as f64);
            if let Some(max_tokens) = times.max_tokens {
                r.observe("request_params_max_tokens", max_tokens as f64);
            }
            if times.phase != Phase::Decode {
                return;
            }
            let decode = between(times.first, times.last);
            r.observe("e2e_request_latency_seconds", between(times.arrived, times.last));
            r.observe("request_queue_time_seconds", between(times.arrived, times.started));
            r.observe("request_prefill_time_seconds", between(times.started, times.first));
            r.observe("request_decode_time_seconds", decode);
            r.observe("request_inference_time_seconds", between(times.started, times.last));
            if times.n_tokens > 1 {
                let mean = decode / (times.n_tokens - 1) as f64;
                r.observe("request_time_per_output_token_seconds", mean);
            }
        });
    }

    /// The page in text format 0.0.4.
    pub fn render(&self, stats: &EngineStats) -> String {
        let mut page = Page::new(&[("model_name", &self.info.model_name), ("engine", "0")]);
        self.engine_metrics(&mut page, stats);
        let recorded = self.recorded.lock().unwrap_or_else(PoisonError::into_inner);
        let finished = recorded.finished.iter();
        page.series(
            "vllm:request_success_total",
            "counter",
            "Finished requests by reason.",
            finished.map(|(reason, &n)| (label("finished_reason", reason), n as f64)),
        );
        let failures = recorded.device_failures.iter();
        page.series(
            "vllm_moe_device_failures_total",
            "counter",
            "Times that the device failed and the model was loaded again.",
            failures.map(|(cause, &n)| (label("cause", cause), n as f64)),
        );
        for (name, (help, histogram)) in &recorded.histograms {
            page.histogram(&format!("vllm:{name}"), help, histogram);
        }
        drop(recorded);
        experts::metrics(&mut page, stats, self.info.per_expert);
        page.finish()
    }

    fn engine_metrics(&self, page: &mut Page, stats: &EngineStats) {
        let used = kv_usage(stats);
        page.gauge("vllm:num_requests_running", "Requests in steps.", stats.running as f64);
        page.gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.waiting as f64);
        page.gauge("vllm:kv_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", used);
        // The old name of the same, which production-stack's router reads.
        page.gauge("vllm:gpu_cache_usage_perc", "Share of cache blocks in use, 0 to 1.", used);
        let config = [
            label("block_size", &stats.block_size.to_string()),
            label("num_gpu_blocks", &stats.kv_blocks_total.to_string()),
            label("enable_prefix_caching", &self.info.prefix_caching.to_string()),
        ];
        let info = [(config.join(","), 1.0)];
        page.series("vllm:cache_config_info", "gauge", "The KV cache's shape.", info);
        for (name, help, value) in [
            ("prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits),
            ("gpu_prefix_cache_queries", "Prompt tokens looked up.", stats.prefix_queries),
            ("gpu_prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_hits),
            ("num_preemptions", "Requests that started over.", stats.preemptions),
            ("prompt_tokens", "Tokens of prompts.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generated_tokens),
            ("corrupted_requests", "Requests with NaN logits.", stats.non_finite),
        ] {
            page.counter(&format!("vllm:{name}_total"), help, value);
        }
    }
}

impl Recorded {
    fn observe(&mut self, name: &'static str, value: f64) {
        if let Some((_, histogram)) = self.histograms.get_mut(name) {
            histogram.observe(value);
        }
    }
}

/// Share of cache blocks that requests own.
pub(super) fn kv_usage(stats: &EngineStats) -> f64 {
    stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64
}
