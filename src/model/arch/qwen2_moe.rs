//! Qwen2-MoE (`Qwen2MoeForCausalLM`, Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B): q/k/v bias, softmax top-k
//! and a shared expert behind a sigmoid gate.

use crate::model::{
    ModelError, ModelSpec,
    config::Config,
    spec::{MoeSpec, SharedSpec},
};

use super::{llama_like, qwen3_moe::sparse_layers};

pub(super) fn parse(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = llama_like::dense("qwen2_moe", config)?;
    spec.attention.qkv_bias = config.flag("qkv_bias", true)?;
    // Alternating windows below max_window_layers, as Qwen2MoeConfig lays them out.
    let last = config.count_opt("max_window_layers", 0..=1024)?.unwrap_or(28);
    llama_like::set_windows(&mut spec, config, |i| i.is_multiple_of(2) && i < last)?;
    let shared = config.count("shared_expert_intermediate_size", 1..=1 << 20)?;
    let moe = MoeSpec {
        routing: llama_like::softmax_routing(config, config.flag("norm_topk_prob", false)?)?,
        n_spare: 0,
        correction_bias: false,
        intermediate_size: config.count("moe_intermediate_size", 1..=1 << 20)?,
        shared: Some(SharedSpec { intermediate_size: shared, gated: true }),
    };
    sparse_layers(&mut spec, config, &moe)?;
    Ok(spec)
}
