//! What is measured, a model or a published shape, and how it is printed.

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use moewe::{
    bench::{Report, Workload, dummy_runner, measure_ceilings, shape, shape_names},
    engine::{Engine, EngineConfig, Runner},
    llm::LlmOptions,
    model::Limits,
};

use crate::cli::options::ModelArgs;

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(super) enum Output {
    /// Columns for reading.
    Table,
    /// A Markdown table.
    Md,
    /// One JSON object.
    Json,
}

/// Options of every measurement.
#[derive(Debug, Args)]
pub(super) struct Subject {
    #[command(flatten)]
    model: ModelArgs,
    /// A published model's shape with random weights: qwen3-30b-a3b, mixtral-8x7b,
    /// deepseek-v3-shard, olmoe
    #[arg(long)]
    shape: Option<String>,
    /// Layers of the shape [default: all]
    #[arg(long)]
    layers: Option<usize>,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    pub(super) output: Output,
}

/// Nothing measured is longer: it would take days, and sizes computed from it would overflow.
const MAX_TOKENS: usize = 1 << 24;

/// Refuses sizes of 0 and absurd ones.
pub(super) fn check_size(what: &str, sizes: impl IntoIterator<Item = usize>) -> anyhow::Result<()> {
    let fits = sizes.into_iter().all(|n| (1..=MAX_TOKENS).contains(&n));
    ensure!(fits, "{what} are from 1 to {MAX_TOKENS}");
    Ok(())
}

/// A bar on stderr that counts to `n`, if that is a terminal.
pub(super) fn progress(n: usize, of: &str) -> anyhow::Result<ProgressBar> {
    let style = format!("{{bar:30}} {{pos}}/{{len}} {of}, {{elapsed}} of {{duration}}");
    Ok(ProgressBar::new(n as u64).with_style(ProgressStyle::with_template(&style)?))
}

impl Subject {
    /// Loads the model, or makes one of random weights, for steps of up to `max_tokens` tokens
    /// (those of `--max-num-batched-tokens`, if not given) and a cache for `workload`.
    pub(super) fn runner(
        &self,
        max_sequences: usize,
        max_tokens: Option<usize>,
        longest: usize,
        workload: &Workload,
    ) -> anyhow::Result<Runner> {
        let options = self.model.options(None)?;
        let max_tokens = max_tokens.unwrap_or(options.max_num_batched_tokens.max(2048));
        let Some(name) = &self.shape else {
            let options = LlmOptions {
                max_model_len: Some(longest),
                max_num_seqs: max_sequences,
                max_num_batched_tokens: max_tokens,
                max_logits: max_sequences,
                ..options
            };
            return Ok(self.model.load(options)?.engine.into_runner());
        };
        ensure!(
            options.expert_devices.is_empty() && options.expert_cache.is_none(),
            "--shape measures one device that holds all experts: leave --devices and \
             --expert-cache-memory out, or use --model DIR --load-format dummy"
        );
        let known = || shape_names().collect::<Vec<_>>().join(", ");
        let spec = shape(name, self.layers)?
            .with_context(|| format!("there is no shape {name:?}, only {}", known()))?;
        let limits = Limits {
            max_tokens,
            max_sequences,
            max_logits: max_sequences,
            max_blocks: longest.div_ceil(options.block_size),
            max_penalized: 1,
        };
        let n_blocks = workload.blocks(options.block_size);
        Ok(dummy_runner(&options, spec, limits, n_blocks)?)
    }

    /// [`Subject::runner`] for layers of experts alone, of so many `--tokens`.
    pub(super) fn layer_runner(&self, tokens: &[usize]) -> anyhow::Result<Runner> {
        check_size("--tokens", tokens.iter().copied())?;
        let most = tokens.iter().copied().max().context("--tokens has no number")?;
        let workload = Workload {
            prompts: vec![16],
            generate: 0,
            depths: Vec::new(),
            batches: vec![1],
            repetitions: 1,
        };
        let runner = self.runner(1, Some(most), 16, &workload)?;
        let spec = &runner.model().spec;
        ensure!(spec.n_experts() > 0, "{} has no mixture-of-experts layer", spec.architecture);
        ensure!(
            runner.exchange().is_none(),
            "layers are measured on one device that holds all experts: leave --devices and \
             --expert-cache-memory out"
        );
        Ok(runner)
    }

    /// An engine that runs up to `max_num_seqs` sequences of up to `longest` tokens together.
    pub(super) fn engine(&self, max_num_seqs: usize, longest: usize) -> anyhow::Result<Engine> {
        let workload = Workload {
            prompts: Vec::new(),
            generate: longest,
            depths: vec![0],
            batches: vec![max_num_seqs],
            repetitions: 1,
        };
        let options = self.model.options(None)?;
        let max_tokens = Some(options.max_num_batched_tokens);
        let runner = self.runner(max_num_seqs, max_tokens, longest, &workload)?;
        let config = options.engine;
        Ok(Engine::new(runner, EngineConfig { max_queue: usize::MAX, ..config }))
    }

    /// The model's name in reports.
    pub(super) fn name(&self, runner: &Runner) -> String {
        self.shape.clone().unwrap_or_else(|| runner.model().spec.architecture.into())
    }

    pub(super) fn seed(&self) -> u64 {
        self.model.seed
    }

    /// An empty report; measures the ceilings.
    pub(super) fn report(&self, runner: &mut Runner) -> anyhow::Result<Report> {
        let name = self.name(runner);
        let ceilings = measure_ceilings(runner.device())?;
        let report = Report::new(&name, runner, ceilings);
        eprintln!("{}", report.title());
        eprintln!(
            "ceilings: copy {:.1} GB/s, matrix product {:.3} TFLOP/s",
            ceilings.copy_bytes_per_s / 1e9,
            ceilings.matmul_flops / 1e12
        );
        Ok(report)
    }
}
