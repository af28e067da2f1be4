//! Options that several commands share.

use std::time::Duration;

use anyhow::ensure;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use moewe::{
    device::Tier,
    engine::{EngineConfig, SamplingParams},
    llm::{Llm, LlmOptions, LoadFormat, PlannedLlm},
    weights::WeightFormat,
};

use super::devices::DeviceArgs;

/// Packing of weights.
#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Weights {
    /// f32, activations too if it is the experts'.
    F32,
    /// f16.
    F16,
    /// int8, by itself for the experts only.
    W8a16,
    /// int8 for the experts, whose activations are rounded to int8, too, in steps of many tokens:
    /// for adapters without cooperative matrices.
    W8a8,
    /// int4 in groups of inputs, by itself for the experts only.
    W4a16,
}

impl Weights {
    /// With a scale for so many inputs.
    pub(crate) fn format(self, group: Option<usize>) -> WeightFormat {
        match self {
            Self::F32 => WeightFormat::F32,
            Self::F16 => WeightFormat::F16,
            Self::W8a16 => WeightFormat::W8 { group },
            Self::W8a8 => WeightFormat::W8A8,
            Self::W4a16 => WeightFormat::W4 { group: group.unwrap_or(32) },
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Load {
    /// The checkpoint's weights.
    Safetensors,
    /// Random weights in the shapes of config.json.
    Dummy,
}

/// Capability tiers, to rule the higher ones out.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum TierArg {
    Portable,
    Fast,
    Matrix,
}

/// Which model.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Model directory, or owner/name on the hub [default: the shipped gull-20m]
    #[arg(long, short)]
    pub(crate) model: Option<String>,
    /// Branch, tag or commit on the hub
    #[arg(long)]
    revision: Option<String>,
    /// Use only what the hub's cache holds
    #[arg(long)]
    offline: bool,
}

impl CheckpointArgs {
    /// As the library wants them, everything else as by default.
    pub(crate) fn options(&self) -> LlmOptions {
        LlmOptions {
            model: self.model.clone(),
            revision: self.revision.clone(),
            offline: self.offline,
            ..LlmOptions::default()
        }
    }
}

/// Which model, where and how.
#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    #[command(flatten)]
    pub(crate) checkpoint: CheckpointArgs,
    // Boxed, as it is large.
    #[command(flatten)]
    devices: Box<DeviceArgs>,
    /// Highest shader tier to use [default: the adapter's]
    #[arg(long, value_enum, hide = true)]
    tier: Option<TierArg>,
    /// Packing of the weights [default: that of a quantised model, else w8a16; f32 for verify]
    #[arg(long, value_enum)]
    weights: Option<Weights>,
    /// Packing of attention, dense and shared layers, embedding and head; integers in groups of 32
    /// inputs unless --group-size says otherwise [default: f32 with f32 experts, else f16]
    #[arg(long, value_enum)]
    dense_weights: Option<Weights>,
    /// Inputs that share a scale: 32, 64 or 128 [default: 32 for int4, all inputs of an output
    /// channel for int8]
    #[arg(long)]
    group_size: Option<usize>,
    /// In steps of many tokens, launch the products of each expert by themselves instead of all
    /// experts' together, block by block: slower, to see what the blocks are worth
    #[arg(long)]
    no_moe_block_align: bool,
    /// Where weights come from
    #[arg(long, value_enum, default_value = "safetensors")]
    load_format: Load,
    /// Longest context, tokens [default: the model's, at most 4096]
    #[arg(long)]
    max_model_len: Option<usize>,
    /// Tokens per step
    #[arg(long, default_value_t = 512)]
    max_num_batched_tokens: usize,
    /// Device memory to stay within, MiB [default: what the device reports]
    #[arg(long)]
    memory_limit: Option<u64>,
    /// Share of the device's memory to use, where there is no --memory-limit
    #[arg(long, default_value_t = 0.92)]
    gpu_memory_utilization: f32,
    /// Size of the key/value cache, MiB [default: what weights and activations leave, at most what
    /// all sequences at full length need]
    #[arg(long)]
    kv_cache_memory: Option<u64>,
    /// Positions of a block of the key/value cache
    #[arg(long, default_value_t = 16)]
    block_size: usize,
    /// Do not share the cache among prompts with the same beginning
    #[arg(long, alias = "no-enable-prefix-caching")]
    pub(crate) no_prefix_caching: bool,
    /// Seed of everything random
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
}

impl ModelArgs {
    /// As the library wants them; `weights` is what counts if the user did not say, the library's
    /// default if absent.
    pub(crate) fn options(&self, weights: Option<Weights>) -> anyhow::Result<LlmOptions> {
        let weights = self.weights.or(weights).or(self.group_size.map(|_| Weights::W8a16));
        let weights = weights.map(|weights| weights.format(self.group_size));
        // Attention and head bear one scale per channel less well than experts do.
        let dense_group = self.group_size.or(Some(32));
        let dense_weights = self.dense_weights.map(|weights| weights.format(dense_group));
        check_group_size(self.group_size, weights.into_iter().chain(dense_weights))?;
        ensure!(self.max_num_batched_tokens > 0, "--max-num-batched-tokens must be at least 1");
        ensure!(
            (1..=1024).contains(&self.block_size),
            "--block-size is {}, but must be from 1 to 1024",
            self.block_size
        );
        ensure!(
            self.gpu_memory_utilization > 0.0 && self.gpu_memory_utilization <= 1.0,
            "--gpu-memory-utilization is {}, but must be above 0 and at most 1",
            self.gpu_memory_utilization
        );
        let mebibytes = |mib: u64| mib.saturating_mul(1 << 20);
        let mut devices = self.devices.choices()?;
        Ok(LlmOptions {
            device: devices.remove(0),
            expert_devices: devices,
            expert_placement: self.devices.placement()?,
            mpi: self.devices.mpi(),
            eplb: self.devices.eplb(),
            dual_batch_tokens: self.devices.dual_batch_tokens(),
            expert_cache: self.devices.cache(),
            tier: self.tier.map(|tier| match tier {
                TierArg::Portable => Tier::Portable,
                TierArg::Fast => Tier::Fast,
                TierArg::Matrix => Tier::Matrix,
            }),
            weights,
            dense_weights,
            moe_block_align: !self.no_moe_block_align,
            load_format: match self.load_format {
                Load::Safetensors => LoadFormat::Safetensors,
                Load::Dummy => LoadFormat::Dummy,
            },
            max_model_len: self.max_model_len,
            max_num_batched_tokens: self.max_num_batched_tokens,
            block_size: self.block_size,
            memory_limit: self.memory_limit.map(mebibytes),
            gpu_memory_utilization: self.gpu_memory_utilization,
            kv_cache_memory: self.kv_cache_memory.map(mebibytes),
            engine: EngineConfig {
                seed: self.seed,
                prefix_caching: !self.no_prefix_caching,
                ..EngineConfig::default()
            },
            ..self.checkpoint.options()
        })
    }

    /// Loads the model, telling stderr about device, memory and progress.
    pub(crate) fn load(&self, options: LlmOptions) -> anyhow::Result<Llm> {
        let planned = PlannedLlm::new(options)?;
        if let Some(wanted) = self.max_model_len {
            let most = planned.spec.max_position;
            let fits = (1..=most).contains(&wanted);
            ensure!(fits, "--max-model-len is {wanted}, but this model takes 1 to {most} tokens");
        }
        eprintln!("model   {} ({})", planned.dir.display(), planned.spec.architecture);
        eprintln!("device  {}", planned.device());
        for line in planned.measurements() {
            eprintln!("measured {line}");
        }
        for (rank, device) in planned.expert_devices().iter().enumerate() {
            eprintln!("        {device}: experts of rank {}", rank + 1);
        }
        eprintln!("memory  {}", planned.memory);
        let bytes = planned.memory.weights + planned.memory.host;
        let bar = ProgressBar::new(bytes).with_style(ProgressStyle::with_template(
            "loading {bar:30} {bytes}/{total_bytes} {eta}",
        )?);
        // Small models are there before a bar can be read.
        if bytes < 256 << 20 {
            bar.set_draw_target(indicatif::ProgressDrawTarget::hidden());
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        let llm = planned.load(&|bytes| bar.inc(bytes))?;
        bar.finish_and_clear();
        Ok(llm)
    }
}

/// Refuses groups that no kernel knows, and those that none of `formats` has.
pub(crate) fn check_group_size(
    group: Option<usize>,
    mut formats: impl Iterator<Item = WeightFormat>,
) -> anyhow::Result<()> {
    let Some(group) = group else { return Ok(()) };
    ensure!([32, 64, 128].contains(&group), "--group-size is {group}, not 32, 64 or 128");
    let any = formats.any(|f| matches!(f, WeightFormat::W8 { .. } | WeightFormat::W4 { .. }));
    ensure!(any, "--group-size goes with --weights w8a16 or w4a16");
    Ok(())
}

/// How tokens are chosen; what is absent comes from the model's generation_config.json.
#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// 0 takes the most probable token
    #[arg(long, short, allow_negative_numbers = true)]
    temperature: Option<f32>,
    /// Share of probability to keep
    #[arg(long)]
    top_p: Option<f32>,
    /// Number of tokens to keep; 0 keeps all
    #[arg(long)]
    top_k: Option<u32>,
    /// Drop tokens below this share of the best one's probability
    #[arg(long)]
    min_p: Option<f32>,
    /// Penalty on tokens of prompt and answer; 1 is off
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Penalty on tokens of the answer
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Penalty on each repetition in the answer
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Longest answer, tokens
    #[arg(long, short = 'n')]
    max_tokens: Option<usize>,
    /// Go on past the end of text
    #[arg(long)]
    ignore_eos: bool,
    /// Text that ends the answer; may be repeated
    #[arg(long)]
    pub(crate) stop: Vec<String>,
}

impl SamplingArgs {
    /// The user's choices over the model's.
    pub(crate) fn params(&self, defaults: &SamplingParams, seed: u64) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.unwrap_or(defaults.top_k),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: Some(seed),
            max_tokens: self.max_tokens.or(defaults.max_tokens),
            ignore_eos: self.ignore_eos,
            ..defaults.clone()
        }
    }
}
