//! Qwen3-MoE (`Qwen3MoeForCausalLM`, Qwen3-30B-A3B and Coder): softmax top-k, q/k norm per head,
//! dense layers mixed in by `decoder_sparse_step` and `mlp_only_layers`.

use crate::{
    kernels::QkNorm,
    model::{
        ModelError, ModelSpec,
        config::Config,
        spec::{FfnSpec, MoeSpec},
    },
};

use super::llama_like;

pub(super) fn parse(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = llama_like::dense("qwen3_moe", config)?;
    let bias = config.flag("attention_bias", false)?;
    spec.attention.qkv_bias = bias;
    spec.attention.o_bias = bias;
    spec.attention.qk_norm = QkNorm::PerHead;
    llama_like::set_windows(&mut spec, config, |_| true)?;
    let moe = MoeSpec {
        routing: llama_like::softmax_routing(config, config.flag("norm_topk_prob", false)?)?,
        n_spare: 0,
        correction_bias: false,
        intermediate_size: config.count("moe_intermediate_size", 1..=1 << 20)?,
        shared: None,
    };
    sparse_layers(&mut spec, config, &moe)?;
    Ok(spec)
}

/// Makes layers sparse by Qwen's rule: every `decoder_sparse_step`-th, but not `mlp_only_layers`.
pub(super) fn sparse_layers(
    spec: &mut ModelSpec,
    config: &Config<'_>,
    moe: &MoeSpec,
) -> Result<(), ModelError> {
    let step = config.count_opt("decoder_sparse_step", 1..=1024)?.unwrap_or(1);
    let dense = config.counts("mlp_only_layers", 0..=1023)?;
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        if !dense.contains(&i) && (i + 1).is_multiple_of(step) {
            layer.ffn = FfnSpec::Moe(moe.clone());
        } else {
            layer.ffn = FfnSpec::Dense(llama_like::intermediate_size(config)?);
        }
    }
    Ok(())
}
