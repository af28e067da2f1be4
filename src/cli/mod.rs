//! The command line, one file per command. Thin: whatever a program might want is in the library.

mod adapters;
mod bench;
mod devices;
mod eval;
mod options;
mod quantize;
mod report;
mod run;
mod serve;
mod simulate;
mod verify;
#[cfg(feature = "mpi")]
mod worker;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Mixture-of-Experts language models on any GPU.
///
/// Exit codes: 0 success, 1 failure (the message says what to do), 2 wrong usage, 3 verification
/// failed.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Generate text: one answer to PROMPT, or a chat if there is none.
    Run(run::Run),
    /// Talk to the model in the terminal.
    Chat(run::Chat),
    /// Answer OpenAI's API over HTTP.
    Serve(serve::Serve),
    /// Compare a checkpoint's logits, experts and tokens with a reference.
    Verify(verify::Verify),
    /// Perplexity of a text.
    Eval(eval::Eval),
    /// Write a model with int8 or int4 experts, which answers as the original under `--weights`.
    Quantize(quantize::Quantize),
    /// Measure tokens per second, of kernels, the engine or a server.
    Bench(Box<bench::Bench>),
    /// Hold experts for rank 0 of an MPI job.
    #[cfg(feature = "mpi")]
    Worker(Box<worker::Worker>),
    /// Predict a step's time on 1 to 1024 adapters, from sizes and rates.
    Simulate(simulate::Simulate),
    /// List the adapters that `--device` can name.
    Adapters(adapters::Adapters),
}

impl Command {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        match self {
            Self::Run(command) => command.run(),
            Self::Chat(command) => command.run(),
            Self::Serve(command) => command.run(),
            Self::Verify(command) => command.run(),
            Self::Eval(command) => command.run(),
            Self::Bench(command) => command.run(),
            Self::Quantize(command) => command.run(),
            #[cfg(feature = "mpi")]
            Self::Worker(command) => command.run(),
            Self::Simulate(command) => command.run(),
            Self::Adapters(command) => command.run(),
        }
    }
}
