//! Options that say which devices compute, and what each of them holds.

use anyhow::{Context, ensure};
use clap::Args;
use moewe::{device::DeviceChoice, llm::ExpertPlacement};

/// Devices of a model.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// auto, cpu, vulkan, metal, dx12, a number or part of a name from `moewe adapters`
    #[arg(long, default_value = "auto", env = "MOEWE_DEVICE")]
    device: String,
    /// Devices that share the experts, named as for --device; the first one does all else, and the
    /// same may be named again
    #[arg(long, value_delimiter = ',', conflicts_with = "device")]
    devices: Vec<String>,
    /// Number of devices that share the experts; those after --devices repeat the last one
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    expert_parallel_size: Option<u8>,
    /// Which device gets which experts: linear, round_robin, or a JSON file
    #[arg(long, default_value = "linear")]
    expert_placement: String,
}

impl DeviceArgs {
    /// The primary device, then those that hold a share of the experts.
    pub(crate) fn choices(&self) -> anyhow::Result<Vec<DeviceChoice>> {
        let parse = |name: &String| name.parse::<DeviceChoice>().unwrap_or(DeviceChoice::Auto);
        let mut devices: Vec<DeviceChoice> = self.devices.iter().map(parse).collect();
        if devices.is_empty() {
            devices.push(parse(&self.device));
        }
        if let Some(n) = self.expert_parallel_size.map(usize::from) {
            let given = devices.len();
            ensure!(n >= given, "--expert-parallel-size is {n}, but --devices names {given}");
            devices.resize(n, devices[given - 1].clone());
        }
        Ok(devices)
    }

    /// Which device gets which experts.
    pub(crate) fn placement(&self) -> anyhow::Result<ExpertPlacement> {
        Ok(match self.expert_placement.as_str() {
            "linear" => ExpertPlacement::Linear,
            "round_robin" => ExpertPlacement::RoundRobin,
            path => ExpertPlacement::Json(std::fs::read_to_string(path).with_context(|| {
                format!("--expert-placement {path} is neither linear, round_robin nor a file")
            })?),
        })
    }
}
