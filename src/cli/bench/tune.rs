//! `moewe bench tune`: finds out which way to run the experts is fastest here, and remembers it.

use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use moewe::bench::{TuneRow, tune};

use super::subject::Subject;
use crate::cli::report::print_line;

/// Options of `moewe bench tune`.
#[derive(Debug, Args)]
pub(super) struct Tune {
    #[command(flatten)]
    subject: Subject,
    /// Tokens of the layer, ascending
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "1,8,12,16,24,32,48,64,96,128,192,256,512,1024,2048"
    )]
    tokens: Vec<usize>,
    /// Measure only
    #[arg(long)]
    dry_run: bool,
}

impl Tune {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        ensure!(self.tokens.is_sorted(), "--tokens are in ascending order");
        let mut runner = self.subject.layer_runner(&self.tokens)?;
        eprintln!("rows of an expert's block (1: no blocks) and microseconds of a layer");
        let mut printed = Ok(());
        let mut done = |row: &TuneRow| {
            if printed.is_ok() {
                printed = print_line(line(row));
            }
        };
        tune(&mut runner, &self.tokens, &mut done)?;
        printed?;
        if self.dry_run {
            return Ok(ExitCode::SUCCESS);
        }
        match runner.device().remember_tuned().context("the result cannot be kept")? {
            Some(path) => eprintln!("remembered in {}", path.display()),
            None => eprintln!("not remembered: there is no folder for it, or no adapter"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn line(row: &TuneRow) -> String {
    let tried = row.tried.iter().map(|(rows, s)| format!("{rows:>4}: {:>10.1}", s * 1e6));
    let tried = tried.collect::<Vec<_>>().join("  ");
    let rule = match row.best == row.by_rule {
        true => String::new(),
        false => format!(" (by rule {})", row.by_rule),
    };
    format!("M={:<5} {tried}  best {}{rule}", row.tokens, row.best)
}
