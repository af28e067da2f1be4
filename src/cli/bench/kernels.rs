//! `moewe bench kernels`: the mixture-of-experts layer, kernel by kernel, against the ceilings.

use std::process::ExitCode;

use clap::Args;
use moewe::bench::{Ceilings, LAYER_PEERS, Memory, MoeLayerRow, Report, moe_layer};

use super::subject::{Output, Subject};
use crate::cli::report::print_line;

/// Options of `moewe bench kernels`.
#[derive(Debug, Args)]
pub(super) struct Kernels {
    #[command(flatten)]
    subject: Subject,
    /// Tokens of the layer
    #[arg(long, value_delimiter = ',', default_value = "1,8,32,128,512,2048,4096")]
    tokens: Vec<usize>,
}

impl Kernels {
    pub(super) fn run(self) -> anyhow::Result<ExitCode> {
        let mut runner = self.subject.layer_runner(&self.tokens)?;
        let mut report = self.subject.report(&mut runner)?;
        if self.subject.output == Output::Md {
            print_line(format_args!("{}\n\n{}", report.title(), MD_HEAD))?;
        }
        for &tokens in &self.tokens {
            let row = moe_layer(&mut runner, tokens)?;
            match self.subject.output {
                Output::Table => print_table(&row, &report)?,
                Output::Md => print_md(&row, &report.ceilings)?,
                Output::Json => {}
            }
            report.moe_layer.push(row);
        }
        report.memory = Memory::of(&mut runner);
        eprintln!("memory: {}", report.memory);
        if self.subject.output == Output::Json {
            print_line(serde_json::to_string(&report)?)?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

const MD_HEAD: &str = "| tokens | kernel | us | GB/s | of copy | TFLOP/s | of matrix product |\n\
                       | ---: | --- | ---: | ---: | ---: | ---: | ---: |";

fn print_table(row: &MoeLayerRow, report: &Report) -> anyhow::Result<()> {
    let bandwidth = row.weight_bytes / row.microseconds * 1e6;
    let peers: String = LAYER_PEERS
        .iter()
        .filter(|peer| peer.shape == report.model)
        .filter_map(|peer| Some((peer.name, peer.points.iter().find(|p| p.0 == row.tokens)?.1)))
        .map(|(name, us)| format!("  {name} {us:.0}"))
        .collect();
    print_line(format_args!(
        "M={:<5} {:>9.1} us  weights at {:>7.1} GB/s ({:.0}% of copy)  {:>8.3} TFLOP/s{peers}",
        row.tokens,
        row.microseconds,
        bandwidth / 1e9,
        bandwidth / report.ceilings.copy_bytes_per_s * 100.0,
        row.flops / row.microseconds / 1e6
    ))?;
    for kernel in &row.kernels {
        let (bandwidth, rate) = (kernel.bandwidth(), kernel.rate());
        print_line(format_args!(
            "    {:<26} {:>9.1} us {:>8.1} GB/s {:>4.0}% of copy {:>9.3} TFLOP/s {:>4.0}% of \
             product",
            kernel.label,
            kernel.microseconds,
            bandwidth / 1e9,
            bandwidth / report.ceilings.copy_bytes_per_s * 100.0,
            rate / 1e12,
            rate / report.ceilings.matmul_flops * 100.0
        ))?;
    }
    Ok(())
}

fn print_md(row: &MoeLayerRow, ceilings: &Ceilings) -> anyhow::Result<()> {
    print_line(format_args!(
        "| {} | whole layer | {:.1} | | | {:.3} | |",
        row.tokens,
        row.microseconds,
        row.flops / row.microseconds / 1e6
    ))?;
    for kernel in &row.kernels {
        let (bandwidth, rate) = (kernel.bandwidth(), kernel.rate());
        print_line(format_args!(
            "| {} | {} | {:.1} | {:.0} | {:.0} % | {:.3} | {:.0} % |",
            row.tokens,
            kernel.label,
            kernel.microseconds,
            bandwidth / 1e9,
            bandwidth / ceilings.copy_bytes_per_s * 100.0,
            rate / 1e12,
            rate / ceilings.matmul_flops * 100.0
        ))?;
    }
    Ok(())
}
