//! `moewe quantize`: experts to int8, once and for all.

use std::{path::PathBuf, process::ExitCode};

use anyhow::ensure;
use clap::Args;
use indicatif::{HumanBytes, ProgressBar};
use moewe::{
    llm::{LlmOptions, quantize},
    weights::WeightFormat,
};

use super::{
    options::{CheckpointArgs, check_group_size},
    report::print_line,
};

/// Options of `moewe quantize`.
#[derive(Debug, Args)]
pub(crate) struct Quantize {
    /// Directory to write the quantised model to
    out: PathBuf,
    #[command(flatten)]
    checkpoint: CheckpointArgs,
    /// Inputs that share an int8 scale: 32, 64 or 128 [default: one scale per output channel]
    #[arg(long)]
    group_size: Option<usize>,
}

impl Quantize {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        check_group_size(self.group_size)?;
        let target = self.out.join("model.safetensors");
        ensure!(!target.exists(), "{} exists; name an empty directory", target.display());
        let weights = WeightFormat::W8 { group: self.group_size };
        let options = LlmOptions { weights, ..self.checkpoint.options() };
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
