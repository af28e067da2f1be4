//! `moewe bench plot`: pictures of measurements.

use std::{path::PathBuf, process::ExitCode};

use anyhow::Context;
use clap::Args;
use moewe::bench::{Report, plot};

/// Options of `moewe bench plot`.
#[derive(Debug, Args)]
pub(super) struct Picture {
    /// What `-o json` printed
    #[arg(required = true)]
    reports: Vec<PathBuf>,
    /// Where to write the picture
    #[arg(short, long, default_value = "bench.svg")]
    svg: PathBuf,
}

impl Picture {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let read = |path: &PathBuf| -> anyhow::Result<Report> {
            let text = std::fs::read_to_string(path)
                .with_context(|| format!("{} cannot be read", path.display()))?;
            serde_json::from_str(&text)
                .with_context(|| format!("{} is not a report of moewe bench", path.display()))
        };
        let reports = self.reports.iter().map(read).collect::<anyhow::Result<Vec<_>>>()?;
        std::fs::write(&self.svg, plot(&reports)?)
            .with_context(|| format!("{} cannot be written", self.svg.display()))?;
        eprintln!("wrote {}", self.svg.display());
        Ok(ExitCode::SUCCESS)
    }
}
