//! GLM-4.5 to 4.7 (`Glm4MoeForCausalLM`): grouped sigmoid routing with a correction bias, an
//! ungated shared expert, dense first layers, partial rotary embedding. The shipped model is one.

use crate::{
    kernels::{QkNorm, Routing, Scoring},
    model::{
        ModelError, ModelSpec,
        config::Config,
        spec::{FfnSpec, MOST_EXPERTS, MoeSpec, Names, SharedSpec},
    },
};

use super::llama_like;

pub(super) fn parse(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = llama_like::dense("glm4_moe", config)?;
    spec.names = Names { shared: "shared_experts", ..Names::COMMON };
    let nested = config.object("rope_parameters")?;
    let partial = |c: &Config<'_>| c.get("partial_rotary_factor").is_some();
    if !partial(config) && !nested.as_ref().is_some_and(partial) {
        spec.attention.rotary_dim = spec.attention.head_dim / 2;
    }
    spec.attention.qkv_bias = config.flag("attention_bias", false)?;
    if config.flag("use_qk_norm", false)? {
        spec.attention.qk_norm = QkNorm::PerHead;
    }
    let width = config.count("moe_intermediate_size", 1..=1 << 20)?;
    let n_shared = config.count_opt("n_shared_experts", 0..=64)?.unwrap_or(1);
    let moe = MoeSpec {
        routing: Routing {
            scoring: Scoring::Sigmoid,
            n_experts: config.count("n_routed_experts", 1..=MOST_EXPERTS)?,
            top_k: config.count("num_experts_per_tok", 1..=64)?,
            n_group: config.count_opt("n_group", 1..=32)?.unwrap_or(1),
            topk_group: config.count_opt("topk_group", 1..=32)?.unwrap_or(1),
            renormalize: config.flag("norm_topk_prob", true)?,
            scale: config.number("routed_scaling_factor", 1e-6..=1e6)?.unwrap_or(1.0) as f32,
        },
        n_spare: 0,
        correction_bias: true,
        intermediate_size: width,
        shared: (n_shared > 0)
            .then_some(SharedSpec { intermediate_size: width * n_shared, gated: false }),
    };
    let n_dense = config.count_opt("first_k_dense_replace", 0..=1024)?.unwrap_or(1);
    let dense = FfnSpec::Dense(llama_like::intermediate_size(config)?);
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        layer.window = None;
        layer.ffn = if i < n_dense { dense.clone() } else { FfnSpec::Moe(moe.clone()) };
    }
    Ok(spec)
}
