//! `moewe eval`: perplexity of a text.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;
use indicatif::ProgressBar;
use moewe::{evaluate::perplexity, llm::LlmOptions};

use super::{options::ModelArgs, report::print_line};

/// Options of `moewe eval`.
#[derive(Debug, Args)]
pub(crate) struct Eval {
    /// Text file (UTF-8)
    #[arg(long)]
    text: PathBuf,
    /// Tokens per window; each window starts without context
    #[arg(long, default_value_t = 512)]
    window: usize,
    #[command(flatten)]
    model: ModelArgs,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl Eval {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let text = std::fs::read_to_string(&self.text)
            .with_context(|| format!("{} cannot be read as text", self.text.display()))?;
        let options = self.model.options(None)?;
        let max_logits = options.max_num_batched_tokens;
        let mut llm = self.model.load(LlmOptions { max_logits, ..options })?;
        let tokens = llm.raw_prompt(&text)?;
        let longest = llm.engine.max_model_len();
        anyhow::ensure!(
            (1..=longest).contains(&self.window),
            "--window is {}, but the context holds 1 to {longest} tokens",
            self.window
        );
        let bar = ProgressBar::new(tokens.len() as u64);
        let result = perplexity(llm.engine.runner(), &tokens, self.window, &|n| bar.inc(n))?;
        bar.finish_and_clear();
        if self.json {
            print_line(serde_json::to_string(&result)?)?;
        } else {
            print_line(format_args!(
                "perplexity {:.4} (mean negative log likelihood {:.4} nats) over {} tokens",
                result.perplexity, result.mean_nll, result.tokens
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
