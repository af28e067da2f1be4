//! `moewe worker`: a rank of an MPI job that holds experts for rank 0.

use std::process::ExitCode;

use clap::Args;

use super::options::ModelArgs;

/// Options of `moewe worker`.
#[derive(Debug, Args)]
pub(crate) struct Worker {
    #[command(flatten)]
    model: ModelArgs,
}

impl Worker {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        moewe::llm::serve_experts(&self.model.options(None)?)?;
        Ok(ExitCode::SUCCESS)
    }
}
