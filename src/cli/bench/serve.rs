//! `moewe bench serve`: load on a server that speaks OpenAI's API, and what its clients see.
//! The JSON has the field names of `vllm bench serve` (`vllm/benchmarks/serve.py`).

use std::{
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use clap::Args;
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet};

use super::{
    random::Random,
    subject::{Output, progress},
    summary,
    traffic::{Seen, Target},
};

/// Cut into prompts; any text will do, as lengths are what counts.
const TEXT: &str = "Gulls follow the boats home in the evening, crying over the grey water, and \
    the keeper of the light counts them from his window while the kettle sings.";

/// Options of `moewe bench serve`.
#[derive(Debug, Args)]
pub(super) struct Serve {
    /// Where the server listens
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    base_url: String,
    /// The model to ask for [default: the first that the server lists]
    #[arg(long)]
    model: Option<String>,
    /// Key to send
    #[arg(long, env = "MOEWE_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Requests to send
    #[arg(long, default_value_t = 100)]
    num_prompts: usize,
    /// Tokens of a prompt
    #[arg(long, alias = "random-input-len", default_value_t = 128)]
    input_len: usize,
    /// Tokens of an answer
    #[arg(long, alias = "random-output-len", default_value_t = 64)]
    output_len: usize,
    /// Requests per second, arriving as a Poisson process [default: all at once]
    #[arg(long)]
    request_rate: Option<f64>,
    /// Requests that may be open [default: any]
    #[arg(long)]
    max_concurrency: Option<usize>,
    /// Stop at the model's end of text
    #[arg(long)]
    respect_eos: bool,
    /// Seed of prompts and arrivals
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
    /// Also write the JSON here
    #[arg(long)]
    result_filename: Option<PathBuf>,
    /// Put each request's times into the JSON
    #[arg(long)]
    save_detailed: bool,
}

/// What is printed for reading, and its field in the JSON.
const ROWS: &[(&str, &str)] = &[
    ("model", "model_id"),
    ("requests answered", "completed"),
    ("requests failed", "failed"),
    ("duration (s)", "duration"),
    ("prompt tokens", "total_input_tokens"),
    ("answer tokens", "total_output_tokens"),
    ("requests per second", "request_throughput"),
    ("answer tokens per second", "output_throughput"),
    ("all tokens per second", "total_token_throughput"),
    ("time to first token, mean (ms)", "mean_ttft_ms"),
    ("time to first token, median (ms)", "median_ttft_ms"),
    ("time to first token, p99 (ms)", "p99_ttft_ms"),
    ("time per further token, mean (ms)", "mean_tpot_ms"),
    ("time per further token, median (ms)", "median_tpot_ms"),
    ("time per further token, p99 (ms)", "p99_tpot_ms"),
    ("token to token, mean (ms)", "mean_itl_ms"),
    ("token to token, median (ms)", "median_itl_ms"),
    ("token to token, p99 (ms)", "p99_itl_ms"),
    ("whole answer, mean (ms)", "mean_e2el_ms"),
    ("whole answer, median (ms)", "median_e2el_ms"),
    ("whole answer, p99 (ms)", "p99_e2el_ms"),
];

impl Serve {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let sizes = [self.num_prompts, self.input_len, self.output_len];
        super::subject::check_size("--num-prompts, --input-len and --output-len", sizes)?;
        ensure!(self.max_concurrency != Some(0), "--max-concurrency must be at least 1");
        ensure!(self.request_rate.is_none_or(|rate| rate > 0.0), "--request-rate must be above 0");
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let report = runtime.block_on(self.measure())?;
        summary::print(self.output, &report, ROWS)?;
        for error in report["errors"].as_array().into_iter().flatten() {
            eprintln!("a request failed: {}", error.as_str().unwrap_or(""));
        }
        if let Some(path) = &self.result_filename {
            let written = std::fs::write(path, report.to_string());
            written.with_context(|| format!("{} cannot be written", path.display()))?;
        }
        Ok(if report["completed"] == 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS })
    }

    async fn measure(&self) -> anyhow::Result<Value> {
        let target = Target::new(&self.base_url, self.api_key.clone());
        let models = target.json("/v1/models", None).await?;
        let model = self.model.clone().or(models["data"][0]["id"].as_str().map(str::to_owned));
        let model = model.context("the server lists no model; give --model")?;
        let text = json!({"model": model, "prompt": TEXT});
        let pool = target.json("/tokenize", Some(&text)).await?;
        let pool: Vec<u64> =
            pool["tokens"].as_array().into_iter().flatten().filter_map(Value::as_u64).collect();
        ensure!(!pool.is_empty(), "/tokenize gave no tokens");
        let mut random = Random(self.seed);
        let slots = Arc::new(Semaphore::new(self.max_concurrency.unwrap_or(self.num_prompts)));
        let bar = progress(self.num_prompts, "requests")?;
        let start = Instant::now();
        let (mut arrival, mut tasks) = (0.0, JoinSet::new());
        for i in 0..self.num_prompts {
            let prompt: Vec<u64> =
                (0..self.input_len).map(|_| pool[random.below(pool.len())]).collect();
            let body = json!({
                "model": model, "prompt": prompt, "max_tokens": self.output_len,
                "temperature": 0, "stream": true, "ignore_eos": !self.respect_eos,
                "return_token_ids": true, "stream_options": {"include_usage": true},
            });
            if let Some(rate) = self.request_rate {
                arrival += random.exponential(rate);
                let due = start + Duration::from_secs_f64(arrival);
                tokio::time::sleep_until(due.into()).await;
            }
            let (target, slots, bar) = (target.clone(), slots.clone(), bar.clone());
            tasks.spawn(async move {
                let _slot = slots.acquire_owned().await;
                let seen = target.measure(&body).await;
                bar.inc(1);
                (i, seen.unwrap_or_else(|error| Seen::failed(&error)))
            });
        }
        let mut seen = tasks.join_all().await;
        let duration = start.elapsed().as_secs_f64();
        bar.finish_and_clear();
        seen.sort_by_key(|(i, _)| *i);
        let seen: Vec<Seen> = seen.into_iter().map(|(_, seen)| seen).collect();
        Ok(self.report(&model, duration, &seen))
    }

    fn report(&self, model: &str, duration: f64, seen: &[Seen]) -> Value {
        let good: Vec<&Seen> = seen.iter().filter(|s| s.error.is_none()).collect();
        let inputs = good.len() * self.input_len;
        let outputs: usize = good.iter().map(|s| s.output_tokens).sum();
        let mut report = json!({
            "backend": "openai",
            "endpoint_type": "openai",
            "model_id": model,
            "tokenizer_id": model,
            "num_prompts": self.num_prompts,
            "request_rate": self.request_rate.map_or(json!("inf"), |rate| json!(rate)),
            "burstiness": 1.0,
            "max_concurrency": self.max_concurrency,
            "duration": duration,
            "completed": good.len(),
            "failed": seen.len() - good.len(),
            "total_input_tokens": inputs,
            "total_output_tokens": outputs,
            "request_throughput": good.len() as f64 / duration,
            "output_throughput": outputs as f64 / duration,
            "total_token_throughput": (inputs + outputs) as f64 / duration,
        });
        let per_token = |s: &&Seen| {
            (s.output_tokens > 1).then(|| (s.latency - s.ttft) / (s.output_tokens - 1) as f64)
        };
        summary::add_times(&mut report, "ttft", good.iter().map(|s| s.ttft).collect());
        summary::add_times(&mut report, "tpot", good.iter().filter_map(per_token).collect());
        let itls = good.iter().flat_map(|s| s.itls.iter().copied());
        summary::add_times(&mut report, "itl", itls.collect());
        summary::add_times(&mut report, "e2el", good.iter().map(|s| s.latency).collect());
        if self.save_detailed {
            report["input_lens"] = json!(vec![self.input_len; seen.len()]);
            report["output_lens"] = seen.iter().map(|s| s.output_tokens).collect();
            report["ttfts"] = seen.iter().map(|s| s.ttft).collect();
            report["itls"] = seen.iter().map(|s| json!(s.itls)).collect();
        }
        let errors = seen.iter().filter_map(|s| s.error.as_deref());
        report["errors"] = errors.take(10).collect();
        report
    }
}
