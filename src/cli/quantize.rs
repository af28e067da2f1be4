//! `moewe quantize`: experts to int8 or int4, once and for all.

use std::{path::PathBuf, process::ExitCode};

use anyhow::ensure;
use clap::Args;
use indicatif::{HumanBytes, ProgressBar};
use moewe::llm::{LlmOptions, quantize};

use super::{
    options::{CheckpointArgs, Weights, check_group_size},
    report::print_line,
};

/// Options of `moewe quantize`.
#[derive(Debug, Args)]
pub(crate) struct Quantize {
    /// Directory to write the quantised model to
    out: PathBuf,
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// Packing of the experts: w8a16, w8a8 or w4a16
    #[arg(long, value_enum, default_value = "w8a16")]
    weights: Weights,
    /// Inputs that share a scale: 32, 64 or 128 [default: 32 for int4, all inputs of an output
    /// channel for int8]
    #[arg(long)]
    group_size: Option<usize>,
}

impl Quantize {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let target = self.out.join("model.safetensors");
        ensure!(!target.exists(), "{} exists; name an empty directory", target.display());
        let weights = self.weights.format(self.group_size);
        check_group_size(self.group_size, std::iter::once(weights))?;
        let options = LlmOptions { weights: Some(weights), ..self.checkpoint.options() };
        let bar = ProgressBar::new(0);
        let done = quantize(&options, &self.out, &|done, all| {
            bar.set_length(all);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        print_line(format_args!(
            "{}: {} tensors of experts in {weights}, {} of weights where there were {}",
            self.out.display(),
            done.tensors,
            HumanBytes(done.after),
            HumanBytes(done.before)
        ))?;
        Ok(ExitCode::SUCCESS)
    }
}
