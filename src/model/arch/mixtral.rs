//! Mixtral (`MixtralForCausalLM`; Jiang et al. 2024): softmax top-2, renormalised.

use crate::model::{
    ModelError, ModelSpec,
    config::Config,
    spec::{FfnSpec, MoeSpec, Names},
};

use super::llama_like;

pub(super) fn parse(config: &Config<'_>) -> Result<ModelSpec, ModelError> {
    let mut spec = llama_like::dense("mixtral", config)?;
    spec.names = Names { moe: "block_sparse_moe", expert: ["w1", "w3", "w2"], ..Names::COMMON };
    let moe = MoeSpec {
        routing: llama_like::softmax_routing(config, true)?,
        n_spare: 0,
        correction_bias: false,
        intermediate_size: llama_like::intermediate_size(config)?,
        shared: None,
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe.clone()));
    Ok(spec)
}
