//! `moewe simulate`: how many adapters a model wants, before anybody buys them.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use moewe::parallel::simulate::{Adapter, Dense, Link, Prediction, Scenario, Shape, zipf};
use serde_json::{Value, json};

use super::report::print_line;

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DenseArg {
    Primary,
    Everywhere,
}

/// Options of `moewe simulate`.
#[derive(Debug, Args)]
pub(crate) struct Simulate {
    /// config.json of the model, or its folder
    config: PathBuf,
    /// Numbers of adapters to try, 1 to 1024
    #[arg(long, value_delimiter = ',', default_value = "1,2,4,8,16,32,64,128,256,512,1024",
          value_parser = clap::value_parser!(u32).range(1..=1024))]
    adapters: Vec<u32>,
    /// Bytes that kernels read in a second on one adapter, GB/s
    #[arg(long, default_value_t = 3000.0)]
    bandwidth: f64,
    /// Arithmetic that kernels reach on one adapter, TFLOP/s
    #[arg(long, default_value_t = 100.0)]
    tflops: f64,
    /// What a layer takes however little it computes, microseconds
    #[arg(long, default_value_t = 0.0)]
    layer_latency: f64,
    /// Memory of one adapter, GiB
    #[arg(long, default_value_t = 80.0)]
    memory: f64,
    /// Link of one adapter, GB/s each way
    #[arg(long, default_value_t = 25.0)]
    link_bandwidth: f64,
    /// One way over the link, microseconds
    #[arg(long, default_value_t = 25.0)]
    link_latency: f64,
    /// Tokens of a step, over all adapters
    #[arg(long, default_value_t = 1)]
    tokens: usize,
    /// Positions that each token looks back over
    #[arg(long, default_value_t = 0)]
    context: usize,
    /// Bits of an expert's weight
    #[arg(long, default_value_t = 8)]
    weight_bits: u32,
    /// Bits of any other weight [default: those of an expert's]
    #[arg(long)]
    dense_weight_bits: Option<u32>,
    /// Who runs attention and all else but experts: the primary adapter, or each for its tokens
    #[arg(long, value_enum, default_value = "primary")]
    dense: DenseArg,
    /// Copies of experts in each layer beyond one of each
    #[arg(long, default_value_t = 0)]
    redundant: usize,
    /// Routing as `GET /moe/stats` of a server shows it, in a file
    #[arg(long)]
    trace: Option<PathBuf>,
    /// Without a trace: work of the r-th expert in proportion to 1 / r^SKEW
    #[arg(long, default_value_t = 0.5, conflicts_with = "trace")]
    skew: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Simulate {
    pub(crate) fn run(self) -> anyhow::Result<ExitCode> {
        let scenario = self.scenario()?;
        let predict = |&n: &u32| scenario.predict(n as usize);
        let all: Vec<Prediction> = self.adapters.iter().map(predict).collect::<Result<_, _>>()?;
        if self.json {
            return print_line(Value::from_iter(all.iter().map(row))).map(|()| ExitCode::SUCCESS);
        }
        print_line(
            "| adapters | step ms | tokens/s | exchange | GiB each | placement | balance |",
        )?;
        print_line("| ---: | ---: | ---: | ---: | ---: | --- | ---: |")?;
        for p in &all {
            let tokens = self.tokens as f64 / p.step;
            print_line(format!(
                "| {} | {:.2} | {tokens:.0} | {:.0} % | {:.1}{} | {} | {:.2} |",
                p.n,
                p.step * 1e3,
                p.exchange * 100.0,
                p.memory / f64::from(1 << 30),
                if p.fits { "" } else { ", too much" },
                p.placement,
                p.balancedness
            ))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn scenario(&self) -> anyhow::Result<Scenario> {
        let dense_bits = self.dense_weight_bits.unwrap_or(self.weight_bits);
        let positive = [
            ("--bandwidth", self.bandwidth),
            ("--tflops", self.tflops),
            ("--memory", self.memory),
            ("--link-bandwidth", self.link_bandwidth),
            ("--tokens", self.tokens as f64),
            ("--weight-bits", f64::from(self.weight_bits)),
            ("--dense-weight-bits", f64::from(dense_bits)),
        ];
        for (name, value) in positive {
            ensure!(value.is_finite() && value > 0.0, "{name} must be more than 0");
        }
        let rest = [
            ("--link-latency", self.link_latency),
            ("--layer-latency", self.layer_latency),
            ("--skew", self.skew),
        ];
        for (name, value) in rest {
            ensure!(value.is_finite() && value >= 0.0, "{name} must not be negative");
        }
        let path = match self.config.is_dir() {
            true => self.config.join("config.json"),
            false => self.config.clone(),
        };
        let shape = Shape::from_config(&read(&path)?)?;
        let n_experts = shape.n_experts;
        ensure!(self.redundant <= 16 * n_experts, "--redundant is more than 16 copies of each");
        let trace = match &self.trace {
            Some(path) => trace(&read(path)?, n_experts)
                .with_context(|| format!("{} is no answer of /moe/stats", path.display()))?,
            None => zipf(8, n_experts, self.skew),
        };
        Ok(Scenario {
            shape,
            adapter: Adapter {
                bandwidth: self.bandwidth * 1e9,
                flops: self.tflops * 1e12,
                memory: self.memory * f64::from(1 << 30),
                layer: self.layer_latency * 1e-6,
            },
            link: Link { bandwidth: self.link_bandwidth * 1e9, latency: self.link_latency * 1e-6 },
            dense: match self.dense {
                DenseArg::Primary => Dense::Primary,
                DenseArg::Everywhere => Dense::Everywhere,
            },
            tokens: self.tokens,
            context: self.context,
            expert_bytes: f64::from(self.weight_bits) / 8.0,
            dense_bytes: f64::from(dense_bits) / 8.0,
            redundant: self.redundant,
            trace,
        })
    }
}

fn read(path: &std::path::Path) -> anyhow::Result<Value> {
    let name = path.display();
    let text = std::fs::read_to_string(path).with_context(|| format!("{name} cannot be read"))?;
    serde_json::from_str(&text).with_context(|| format!("{name} is not JSON"))
}

/// Tokens of each layer's experts.
fn trace(stats: &Value, n_experts: usize) -> Option<Vec<Vec<f64>>> {
    let layers = stats.get("layers")?.as_array()?;
    let layer = |layer: &Value| -> Option<Vec<f64>> {
        let tokens = layer.get("tokens")?.as_array()?;
        let loads: Option<Vec<f64>> = tokens.iter().map(Value::as_f64).collect();
        loads.filter(|loads| loads.len() == n_experts && loads.iter().sum::<f64>() > 0.0)
    };
    let layers: Option<Vec<Vec<f64>>> = layers.iter().map(layer).collect();
    layers.filter(|layers| !layers.is_empty())
}

fn row(p: &Prediction) -> Value {
    json!({
        "adapters": p.n,
        "step_ms": p.step * 1e3,
        "exchange_share": p.exchange,
        "bytes_per_adapter": p.memory,
        "fits": p.fits,
        "placement": p.placement,
        "balancedness": p.balancedness,
    })
}
