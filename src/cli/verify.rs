//! `moewe verify`: a port or a driver checked against reference outputs.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use moewe::{
    evaluate::{Expectation, Tolerance, verify},
    llm::LlmOptions,
};

use super::{
    options::{ModelArgs, Weights},
    report::print_line,
};

/// Exit code when the model is beyond tolerance.
const BEYOND_TOLERANCE: u8 = 3;

/// Options of `moewe verify`.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Checkpoint with expected.json and expected.safetensors beside it
    dir: PathBuf,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Verify {
    pub(crate) fn run(mut self) -> anyhow::Result<ExitCode> {
        self.model.checkpoint.model = Some(self.dir.display().to_string());
        let options = self.model.options(Some(Weights::F32))?;
        let precision = options.precision();
        let max_logits = options.max_num_batched_tokens;
        let mut llm = self.model.load(LlmOptions { max_logits, text: false, ..options })?;
        let runner = llm.engine.runner();
        let expectation = Expectation::read(&self.dir, &runner.model().spec)?;
        let tolerance = Tolerance::of(precision, expectation.logit_atol);
        let report = verify(runner, &expectation, &tolerance)?;
        if self.json {
            print_line(serde_json::to_string(&report)?)?;
        } else {
            print_line(&report)?;
        }
        Ok(if report.passed { ExitCode::SUCCESS } else { ExitCode::from(BEYOND_TOLERANCE) })
    }
}
