//! `moewe bench`: tokens per second, and the layer that decides them.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use moewe::{
    bench::{
        Ceilings, MoeLayerRow, Row, Workload, dummy_runner, measure_ceilings, moe_layer, rows,
        shape, shape_names,
    },
    device::DeviceChoice,
    engine::Runner,
    llm::LlmOptions,
    model::Limits,
};

use super::{
    options::{ModelArgs, Weights},
    report::print_profile,
};

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum Output {
    /// Columns for reading.
    Table,
    /// A Markdown table.
    Md,
    /// One JSON object.
    Json,
}

/// Nothing measured is longer: it would take days, and sizes computed from it would overflow.
const MAX_TOKENS: usize = 1 << 24;

/// Options of `moewe bench`.
#[derive(Debug, Args)]
pub(crate) struct Bench {
    /// What to measure: whole model, or the mixture-of-experts layer by kernel
    #[arg(value_enum, default_value = "model")]
    what: What,
    #[command(flatten)]
    model: ModelArgs,
    /// A published model's shape with random weights: qwen3-30b-a3b, mixtral-8x7b,
    /// deepseek-v3-shard, olmoe
    #[arg(long)]
    shape: Option<String>,
    /// Layers of the shape [default: all]
    #[arg(long)]
    layers: Option<usize>,
    /// Prompt lengths
    #[arg(short, long, value_delimiter = ',', default_value = "512,2048")]
    prompt: Vec<usize>,
    /// Tokens to generate
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
    /// Context before generation
    #[arg(short, long, value_delimiter = ',', default_value = "0")]
    depth: Vec<usize>,
    /// Sequences that generate together
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,4,8,16,32")]
    batch: Vec<usize>,
    /// Tokens of the layer rows
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128,512,2048,4096")]
    tokens: Vec<usize>,
    /// Measurements of each row
    #[arg(short, long, default_value_t = 3)]
    repetitions: usize,
    /// Print tables of kernels for the first prompt length and for each batch
    #[arg(long)]
    profile: bool,
    /// How to print
    #[arg(short, long, value_enum, default_value = "table")]
    output: Output,
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
enum What {
    /// pp and tg rows of the whole model.
    Model,
    /// The mixture-of-experts layer, kernel by kernel.
    Kernels,
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let sizes = self.batch.iter().chain(&self.tokens);
        ensure!(
            sizes.chain([&self.longest()]).all(|n| (1..=MAX_TOKENS).contains(n)),
            "--batch and --tokens are from 1 to {MAX_TOKENS}, --prompt and --depth at most that"
        );
        let mut runner = self.runner()?;
        let device = runner.device().describe();
        let weights = runner.model().precision.experts.to_string();
        let name = self.shape.clone().unwrap_or_else(|| runner.model().spec.architecture.into());
        eprintln!("{name}, {weights}, {} layers, {device}", runner.model().spec.layers.len());
        let ceilings = measure_ceilings(runner.device())?;
        eprintln!(
            "ceilings: copy {:.1} GB/s, matrix product {:.3} TFLOP/s",
            ceilings.copy_bytes_per_s / 1e9,
            ceilings.matmul_flops / 1e12
        );
        match self.what {
            What::Model => self.bench_model(&mut runner, &name, &weights, &device, &ceilings),
            What::Kernels => self.bench_kernels(&mut runner, &ceilings),
        }
    }

    fn longest(&self) -> usize {
        let depth = self.depth.iter().max().copied().unwrap_or(0).saturating_add(self.generate);
        self.prompt.iter().copied().chain([depth, 16]).max().unwrap_or(16)
    }

    fn runner(&self) -> anyhow::Result<Runner> {
        let options = self.model.options(Weights::W8a16)?;
        let max_sequences = self.batch.iter().copied().max().unwrap_or(1);
        let mut max_tokens = options.max_num_batched_tokens.max(2048);
        if self.what == What::Kernels {
            max_tokens = self.tokens.iter().copied().max().unwrap_or(1);
        }
        let longest = self.longest();
        let Some(name) = &self.shape else {
            let max_logits = max_sequences;
            let options = LlmOptions {
                max_model_len: Some(longest),
                max_num_seqs: max_sequences,
                max_num_batched_tokens: max_tokens,
                max_logits,
                ..options
            };
            let llm = self.model.load(options)?;
            return Ok(llm.engine.into_runner());
        };
        let known = || shape_names().collect::<Vec<_>>().join(", ");
        let spec = shape(name, self.layers)?
            .with_context(|| format!("there is no shape {name:?}, only {}", known()))?;
        let limits = Limits {
            max_tokens,
            max_sequences,
            max_logits: max_sequences,
            max_blocks: longest.div_ceil(16),
            max_penalized: 1,
        };
        let choice: DeviceChoice = options.device;
        Ok(dummy_runner(&choice, spec, options.weights, limits, longest)?)
    }

    fn bench_model(
        &self,
        runner: &mut Runner,
        name: &str,
        weights: &str,
        device: &str,
        ceilings: &Ceilings,
    ) -> anyhow::Result<ExitCode> {
        let context = runner.model().n_positions();
        // A length of 0 leaves a test out, as in llama-bench.
        let prompts: Vec<usize> = self.prompt.iter().copied().filter(|&n| n > 0).collect();
        let fitting = |test: &str, lengths: &[usize], more: usize| -> Vec<usize> {
            let fits = |n: &&usize| n.checked_add(more).is_some_and(|n| n <= context);
            for n in lengths.iter().filter(|n| !fits(n)) {
                eprintln!("{test}{n} is left out: the model's context is {context} tokens");
            }
            lengths.iter().filter(fits).copied().collect()
        };
        let workload = Workload {
            prompts: fitting("pp", &prompts, 0),
            generate: self.generate,
            depths: fitting("tg @ d", &self.depth, self.generate),
            batches: self.batch.clone(),
            repetitions: self.repetitions,
        };
        match self.output {
            Output::Table => println!("{:<16} {:>5} {:>20}", "test", "batch", "tokens/s"),
            Output::Md => println!("| test | batch | tokens/s |\n|---|---|---|"),
            Output::Json => {}
        }
        let all = rows(runner, &workload, &mut |row: &Row| {
            let (mean, deviation) = (row.mean(), row.deviation());
            match self.output {
                Output::Table => {
                    println!("{:<16} {:>5} {mean:>12.1} ± {deviation:.1}", row.test, row.batch);
                }
                Output::Md => {
                    println!("| {} | {} | {mean:.1} ± {deviation:.1} |", row.test, row.batch)
                }
                Output::Json => {}
            }
        })?;
        if self.profile {
            self.profile(runner, &workload)?;
        }
        if self.output == Output::Json {
            let report = serde_json::json!({
                "model": name, "weights": weights, "device": device, "version":
                env!("CARGO_PKG_VERSION"), "ceilings": ceilings, "rows": all,
            });
            println!("{report}");
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Runs the first prompt length and each batch once more, timing every kernel.
    fn profile(&self, runner: &mut Runner, workload: &Workload) -> anyhow::Result<()> {
        let one = |prompts: &[usize], generate, batches: &[usize]| Workload {
            prompts: prompts.to_vec(),
            generate,
            depths: workload.depths[..1].to_vec(),
            batches: batches.to_vec(),
            repetitions: 1,
        };
        let prompts = &workload.prompts[..workload.prompts.len().min(1)];
        let prefill = prompts.iter().map(|n| one(&[*n], 0, &[]));
        let decode = workload.batches.iter().map(|batch| one(&[], 8, &[*batch]));
        for workload in prefill.chain(decode) {
            runner.start_profile();
            let mut n_runs = 0;
            rows(runner, &workload, &mut |row| {
                eprintln!("{} batch {}", row.test, row.batch);
                n_runs += 1;
            })?;
            print_profile(&pollster::block_on(runner.take_profile())?, n_runs);
        }
        Ok(())
    }

    fn bench_kernels(&self, runner: &mut Runner, ceilings: &Ceilings) -> anyhow::Result<ExitCode> {
        let spec = &runner.model().spec;
        ensure!(spec.n_experts() > 0, "{} has no mixture-of-experts layer", spec.architecture);
        let mut all: Vec<MoeLayerRow> = Vec::new();
        for &tokens in &self.tokens {
            let row = moe_layer(runner, tokens)?;
            let bandwidth = row.weight_bytes / row.microseconds * 1e6;
            let rate = row.flops / row.microseconds * 1e6;
            if self.output != Output::Json {
                println!(
                    "M={tokens:<5} {:>9.1} us  {:>7.1} GB/s ({:.0}% of copy)  {:>8.3} TFLOP/s",
                    row.microseconds,
                    bandwidth / 1e9,
                    bandwidth / ceilings.copy_bytes_per_s * 100.0,
                    rate / 1e12
                );
                for (label, microseconds) in &row.kernels {
                    println!("    {label:<24} {microseconds:>9.1} us");
                }
            }
            all.push(row);
        }
        if self.output == Output::Json {
            println!("{}", serde_json::json!({ "ceilings": ceilings, "rows": all }));
        }
        Ok(ExitCode::SUCCESS)
    }
}
