//! OLMoE (`OlmoeForCausalLM`; Muennighoff et al. 2024): softmax top-k, q/k norm over the whole
//! projection.

use crate::{
    kernels::QkNorm,
    model::{
        ModelError, ModelSpec,
        config::{Config, bad},
        spec::{FfnSpec, MoeSpec},
    },
};

use super::llama_like;

pub(super) fn parse(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = llama_like::dense("olmoe", config)?;
    if config.get("clip_qkv").is_some() {
        return Err(bad("clip_qkv", "clipped q, k and v are not supported"));
    }
    let bias = config.flag("attention_bias", false)?;
    spec.attention.qkv_bias = bias;
    spec.attention.o_bias = bias;
    spec.attention.qk_norm = QkNorm::Full;
    let moe = MoeSpec {
        routing: llama_like::softmax_routing(config, config.flag("norm_topk_prob", false)?)?,
        n_spare: 0,
        correction_bias: false,
        intermediate_size: llama_like::intermediate_size(config)?,
        shared: None,
    };
    for layer in &mut spec.layers {
        layer.window = None;
        layer.ffn = FfnSpec::Moe(moe.clone());
    }
    Ok(spec)
}
