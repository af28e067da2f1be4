//! Options that say which devices compute, and what each of them holds.

use anyhow::{Context, ensure};
use clap::Args;
use moewe::{
    device::{DeviceChoice, all_devices},
    llm::{DUAL_BATCH_TOKENS, ExpertPlacement},
    parallel::{CacheOptions, CachePolicy, EplbOptions},
};

/// Devices of a model.
#[derive(Debug, Args)]
pub(crate) struct DeviceArgs {
    /// auto, cpu, vulkan, metal, dx12, a number or part of a name from `moewe adapters`
    #[arg(long, default_value = "auto", env = "MOEWE_DEVICE")]
    device: String,
    /// Devices that share the experts, named as for --device; the first one does all else, and the
    /// same may be named again; auto measures all there are and uses those that help
    #[arg(long, value_delimiter = ',', conflicts_with = "device")]
    devices: Vec<String>,
    /// Number of devices that share the experts; those after --devices repeat the last one
    #[arg(long, value_parser = clap::value_parser!(u8).range(1..=64))]
    expert_parallel_size: Option<u8>,
    /// Which device gets which experts: linear, round_robin, balanced (as measured), or a JSON file
    #[arg(long, default_value = "linear")]
    expert_placement: String,
    /// Let the other ranks of this MPI job, each a `moewe worker`, hold shares of the experts
    #[cfg(feature = "mpi")]
    #[arg(long, conflicts_with_all = ["devices", "expert_parallel_size"])]
    mpi: bool,
    /// Seconds that a rank may take to answer before it counts as lost
    #[cfg(feature = "mpi")]
    #[arg(long, default_value_t = 60, requires = "mpi")]
    mpi_timeout: u64,
    /// Steps between looks at the experts' work, after which they move to balance the devices; 0
    /// leaves them where they are
    #[arg(long, default_value_t = 0)]
    eplb_interval: u64,
    /// Copies of busy experts in each layer that balancing may make, over all devices
    #[arg(long, default_value_t = 0)]
    num_redundant_experts: usize,
    /// Share by which the busiest device's work must fall for experts to move
    #[arg(long, default_value_t = 0.05)]
    eplb_threshold: f64,
    /// Tokens from which a step over several devices is split in two, so that one part computes
    /// while the other waits for them
    #[arg(long, default_value_t = DUAL_BATCH_TOKENS)]
    dbo_token_threshold: usize,
    /// Keep all experts in the host's memory and copy those chosen to so much memory of each
    /// device: bytes, or with K, M or G
    #[arg(long, value_parser = bytes)]
    expert_cache_memory: Option<u64>,
    /// Which expert leaves a full cache: lru or lfu
    #[arg(long, default_value = "lru", requires = "expert_cache_memory")]
    expert_cache_policy: CachePolicy,
}

/// Bytes, with or without K, M or G.
pub(crate) fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, 'K' | 'k')) => (&text[..at], 10),
        Some((at, 'M' | 'm')) => (&text[..at], 20),
        Some((at, 'G' | 'g')) => (&text[..at], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| "give a number of bytes, such as 500000000, 800M or 12G".to_owned())
}

impl DeviceArgs {
    fn is_auto(&self) -> bool {
        self.devices.len() == 1 && self.devices[0] == "auto"
    }

    /// The primary device, then those that hold a share of the experts.
    pub(crate) fn choices(&self) -> anyhow::Result<Vec<DeviceChoice>> {
        let parse = |name: &String| name.parse::<DeviceChoice>().unwrap_or(DeviceChoice::Auto);
        if self.is_auto() {
            ensure!(
                self.expert_parallel_size.is_none(),
                "--devices auto finds out how many devices to use; leave out \
                 --expert-parallel-size"
            );
            return Ok(pollster::block_on(all_devices()));
        }
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

    /// How long to wait for the ranks of an MPI job, if there is one.
    #[cfg(feature = "mpi")]
    pub(crate) fn mpi(&self) -> Option<std::time::Duration> {
        self.mpi.then_some(std::time::Duration::from_secs(self.mpi_timeout.max(1)))
    }

    /// How long to wait for the ranks of an MPI job: this moewe knows none.
    #[cfg(not(feature = "mpi"))]
    pub(crate) fn mpi(&self) -> Option<std::time::Duration> {
        None
    }

    /// How experts are balanced over the devices, if they are.
    pub(crate) fn eplb(&self) -> Option<EplbOptions> {
        (self.eplb_interval > 0).then_some(EplbOptions {
            interval: self.eplb_interval,
            redundant: self.num_redundant_experts,
            threshold: self.eplb_threshold,
        })
    }

    /// Tokens from which steps are split in two.
    pub(crate) fn dual_batch_tokens(&self) -> usize {
        self.dbo_token_threshold
    }

    /// The cache of experts, if there is one.
    pub(crate) fn cache(&self) -> Option<CacheOptions> {
        let policy = self.expert_cache_policy;
        self.expert_cache_memory.map(|bytes| CacheOptions { bytes, policy })
    }

    /// Which device gets which experts.
    pub(crate) fn placement(&self) -> anyhow::Result<ExpertPlacement> {
        Ok(match self.expert_placement.as_str() {
            _ if self.is_auto() => ExpertPlacement::Balanced,
            "linear" => ExpertPlacement::Linear,
            "balanced" => ExpertPlacement::Balanced,
            "round_robin" => ExpertPlacement::RoundRobin,
            path => ExpertPlacement::Json(std::fs::read_to_string(path).with_context(|| {
                format!(
                    "--expert-placement {path} is neither linear, round_robin, balanced nor a file"
                )
            })?),
        })
    }
}
