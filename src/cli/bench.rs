//! `moewe bench`: tokens per second of a model, its mixture-of-experts layer by kernel, pictures of
//! both, and requests as vLLM's benchmarks make them.

mod kernels;
mod offline;
mod picture;
mod random;
mod serve;
mod subject;
mod summary;
mod traffic;
mod transfers;
mod tune;

use std::process::ExitCode;

use anyhow::ensure;
use clap::{Args, Subcommand};
use moewe::{
    bench::{Report, Row, Workload, rows},
    engine::Runner,
};

use super::report::{print_line, print_profile};
use subject::{Output, Subject};

/// Options of `moewe bench`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    model: ModelRows,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Load a server with requests and measure what its clients see.
    Serve(serve::Serve),
    /// Measure how fast the engine answers many requests.
    Throughput(offline::Throughput),
    /// Measure how long a batch of requests takes.
    Latency(offline::Latency),
    /// Measure the mixture-of-experts layer, kernel by kernel.
    Kernels(kernels::Kernels),
    /// Find the fastest way to run a model's experts on this adapter, and remember it.
    Tune(tune::Tune),
    /// Measure how fast bytes get to a device and back, by each way that there is.
    Transfers(transfers::Transfers),
    /// Draw what `moewe bench -o json` and `moewe bench kernels -o json` have printed, as SVG.
    Plot(picture::Picture),
}

impl Bench {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self.what {
            None => self.model.run(),
            Some(What::Serve(command)) => command.run(),
            Some(What::Throughput(command)) => command.run(),
            Some(What::Latency(command)) => command.run(),
            Some(What::Kernels(command)) => command.run(),
            Some(What::Tune(command)) => command.run(),
            Some(What::Transfers(command)) => command.run(),
            Some(What::Plot(command)) => command.run(),
        }
    }
}

/// Rows of the whole model, as llama-bench prints them.
#[derive(Debug, Args)]
struct ModelRows {
    #[command(flatten)]
    subject: Subject,
    /// Prompt lengths
    #[arg(short, long, value_delimiter = ',', default_value = "512,2048")]
    prompt: Vec<usize>,
    /// Tokens to generate
    #[arg(short = 'n', long, default_value_t = 128)]
    generate: usize,
    /// Context before generation
    #[arg(short, long, value_delimiter = ',', default_value = "0,4096")]
    depth: Vec<usize>,
    /// Sequences that generate together
    #[arg(short, long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64")]
    batch: Vec<usize>,
    /// Measurements of each row
    #[arg(short, long, default_value_t = 3)]
    repetitions: usize,
    /// Print tables of kernels for the first prompt length and for each batch
    #[arg(long)]
    profile: bool,
}

impl ModelRows {
    fn run(self) -> anyhow::Result<ExitCode> {
        let wanted = self.workload(usize::MAX);
        let longest = self.longest();
        subject::check_size("--prompt, --depth and --generate", [longest])?;
        subject::check_size("--batch", self.batch.iter().copied())?;
        let max_sequences = self.batch.iter().copied().max().unwrap_or(1);
        let mut runner = self.subject.runner(max_sequences, None, longest, &wanted)?;
        let mut report = self.subject.report(&mut runner)?;
        let workload = self.workload(runner.model().n_positions());
        let output = self.subject.output;
        output.head(&report)?;
        let mut printed = Ok(());
        let mut done = |row: &Row| {
            let line = output.row(&report, row);
            if let (Some(line), Ok(())) = (line, &printed) {
                printed = print_line(line);
            }
        };
        let all = rows(&mut runner, &workload, &mut done, &mut left_out)?;
        printed?;
        report.rows = all;
        report.memory = moewe::bench::Memory::of(&mut runner);
        eprintln!("memory: {}", report.memory);
        if self.profile {
            profile(&mut runner, &workload)?;
        }
        output.tail(&report)?;
        Ok(ExitCode::SUCCESS)
    }

    fn longest(&self) -> usize {
        let depth = self.depth.iter().max().copied().unwrap_or(0).saturating_add(self.generate);
        self.prompt.iter().copied().chain([depth, 16]).max().unwrap_or(16)
    }

    /// The tests that fit a context; says which do not.
    fn workload(&self, context: usize) -> Workload {
        let fitting = |lengths: &[usize], more: usize, name: &dyn Fn(usize) -> String| {
            let fits = |n: &usize| n.checked_add(more).is_some_and(|n| n <= context);
            for n in lengths.iter().filter(|n| !fits(n)) {
                left_out(&format!("{} (the model's context is {context} tokens)", name(*n)));
            }
            lengths.iter().copied().filter(fits).collect()
        };
        // A length of 0 leaves a test out, as in llama-bench.
        let prompts: Vec<usize> = self.prompt.iter().copied().filter(|&n| n > 0).collect();
        let generate = self.generate;
        Workload {
            prompts: fitting(&prompts, 0, &|n| format!("pp{n}")),
            generate,
            depths: fitting(if generate == 0 { &[] } else { &self.depth }, generate, &|n| {
                format!("tg{generate} @ d{n}")
            }),
            batches: self.batch.clone(),
            repetitions: self.repetitions,
        }
    }
}

fn left_out(test: &str) {
    eprintln!("left out, does not fit: {test}");
}

/// Runs the first prompt length and each batch once more, timing every kernel.
fn profile(runner: &mut Runner, workload: &Workload) -> anyhow::Result<()> {
    let (prompts, depths) = (&workload.prompts, &workload.depths);
    ensure!(
        !prompts.is_empty() || !depths.is_empty(),
        "--profile needs a --prompt or a --depth that fits the context"
    );
    let one = |prompts: &[usize], generate, depths: &[usize], batches: &[usize]| Workload {
        prompts: prompts.to_vec(),
        generate,
        depths: depths.to_vec(),
        batches: batches.to_vec(),
        repetitions: 1,
    };
    let prefill = prompts.iter().take(1).map(|n| one(&[*n], 0, &[], &[]));
    let decode = depths
        .iter()
        .take(1)
        .flat_map(|depth| workload.batches.iter().map(|batch| one(&[], 8, &[*depth], &[*batch])));
    for workload in prefill.chain(decode) {
        runner.start_profile();
        let mut n_runs = 0;
        let mut done = |row: &Row| {
            eprintln!("{} batch {}", row.test, row.batch);
            n_runs += 1;
        };
        rows(runner, &workload, &mut done, &mut left_out)?;
        print_profile(&pollster::block_on(runner.take_profile())?, n_runs);
    }
    Ok(())
}

impl Output {
    /// What stands above the rows.
    fn head(self, report: &Report) -> anyhow::Result<()> {
        match self {
            Self::Table => print_line(format_args!(
                "{:<18} {:>6} {:<11} {:<20} {:>5} {:>20}",
                "model", "layers", "weights", "test", "batch", "tokens/s"
            )),
            Self::Md => print_line(format_args!(
                "{}\n\n| model | layers | weights | test | batch | tokens/s |\n\
                 | --- | ---: | --- | --- | ---: | ---: |",
                report.title()
            )),
            Self::Json => Ok(()),
        }
    }

    fn row(self, report: &Report, row: &Row) -> Option<String> {
        let Report { model, layers, weights, .. } = report;
        let Row { test, batch, .. } = row;
        let (mean, deviation) = (row.mean(), row.deviation());
        match self {
            Self::Table => Some(format!(
                "{model:<18} {layers:>6} {weights:<11} {test:<20} {batch:>5} {mean:>12.1} ± \
                 {deviation:.1}"
            )),
            Self::Md => Some(format!(
                "| {model} | {layers} | {weights} | {test} | {batch} | {mean:.1} ± {deviation:.1} |"
            )),
            Self::Json => None,
        }
    }

    /// What stands below them.
    fn tail(self, report: &Report) -> anyhow::Result<()> {
        match self {
            Self::Table => Ok(()),
            Self::Md => print_line(format_args!("\nmemory: {}", report.memory)),
            Self::Json => print_line(serde_json::to_string(report)?),
        }
    }
}
