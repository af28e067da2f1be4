//! Configuration keys that all Llama-like architectures share.

use crate::{
    kernels::{QkNorm, Routing, Scoring},
    model::{
        ModelError,
        config::{Config, bad},
        rope::RopeScaling,
        spec::{AttentionSpec, FfnSpec, LayerSpec, MOST_EXPERTS, ModelSpec, Names},
    },
};

/// A dense model without biases or q/k norm, as `config` sizes it. Architectures start from here
/// and change what differs.
pub(super) fn dense(
    architecture: &'static str,
    config: &Config<'_>,
) -> Result<ModelSpec, ModelError> {
    config.expect_text("hidden_act", &["silu"])?;
    let hidden_size = config.count("hidden_size", 1..=1 << 17)?;
    let n_heads = config.count("num_attention_heads", 1..=4096)?;
    let n_layers = config.count("num_hidden_layers", 1..=1024)?;
    let head_dim = match config.count_opt("head_dim", 2..=256)? {
        Some(n) => n,
        None if hidden_size.is_multiple_of(n_heads)
            && (2..=256).contains(&(hidden_size / n_heads)) =>
        {
            hidden_size / n_heads
        }
        None => return Err(bad("head_dim", "it is missing and cannot be derived")),
    };
    let intermediate = config.count_opt("intermediate_size", 1..=1 << 20)?;
    // transformers v5 saves a window that is off as 0 (Qwen2-MoE).
    let window = config.count_opt("sliding_window", 0..=1 << 24)?.filter(|&n| n > 0);
    let rope = rope(config, head_dim)?;
    let layer = LayerSpec { window, ffn: FfnSpec::Dense(intermediate.unwrap_or(0)) };
    let eos = config.counts("eos_token_id", 0..=u32::MAX as usize)?;
    Ok(ModelSpec {
        architecture,
        vocab_size: config.count("vocab_size", 1..=1 << 24)?,
        hidden_size,
        attention: AttentionSpec {
            n_heads,
            n_kv_heads: config.count_opt("num_key_value_heads", 1..=4096)?.unwrap_or(n_heads),
            head_dim,
            qkv_bias: false,
            o_bias: false,
            qk_norm: QkNorm::None,
            rotary_dim: rope.rotary_dim,
            rope_theta: rope.theta,
            rope_scaling: rope.scaling,
        },
        layers: vec![layer; n_layers],
        // Classes differ in their defaults, so that a guess would be wrong in silence.
        rms_norm_eps: config
            .number("rms_norm_eps", 1e-12..=1.0)?
            .ok_or_else(|| bad("rms_norm_eps", "it is missing"))? as f32,
        max_position: config.count("max_position_embeddings", 1..=1 << 24)?,
        tie_word_embeddings: config.flag("tie_word_embeddings", false)?,
        eos_token_ids: eos.into_iter().map(|id| id as u32).collect(),
        names: Names::COMMON,
    })
}

/// The dense intermediate width, required.
pub(super) fn intermediate_size(config: &Config<'_>) -> Result<usize, ModelError> {
    config.count("intermediate_size", 1..=1 << 20)
}

/// Softmax routing over all experts without groups.
pub(super) fn softmax_routing(
    config: &Config<'_>,
    renormalize: bool,
) -> Result<Routing, ModelError> {
    let key = if config.get("num_experts").is_some() { "num_experts" } else { "num_local_experts" };
    Ok(Routing {
        scoring: Scoring::Softmax,
        n_experts: config.count(key, 1..=MOST_EXPERTS)?,
        top_k: config.count("num_experts_per_tok", 1..=64)?,
        n_group: 1,
        topk_group: 1,
        renormalize,
        scale: 1.0,
    })
}

/// Sliding windows by layer, where the configuration lists `layer_types` or else `sliding(i)`.
pub(super) fn set_windows(
    spec: &mut ModelSpec,
    config: &Config<'_>,
    sliding: impl Fn(usize) -> bool,
) -> Result<(), ModelError> {
    let types = config.get("layer_types").and_then(|v| v.as_array());
    let enabled = config.flag("use_sliding_window", false)?;
    for (i, layer) in spec.layers.iter_mut().enumerate() {
        let on = match types {
            Some(types) => {
                let of = types.get(i).and_then(|v| v.as_str());
                match of {
                    Some("sliding_attention") => true,
                    Some("full_attention") => false,
                    _ => return Err(bad("layer_types", &format!("layer {i} is {of:?}"))),
                }
            }
            None => enabled && sliding(i),
        };
        if !on {
            layer.window = None;
        } else if layer.window.is_none() {
            return Err(bad("sliding_window", "it is missing though a layer uses it"));
        }
    }
    Ok(())
}

struct Rope {
    theta: f64,
    rotary_dim: usize,
    scaling: RopeScaling,
}

/// Rotary embedding: `rope_parameters` (transformers v5) or `rope_theta` and `rope_scaling`.
fn rope(config: &Config<'_>, head_dim: usize) -> Result<Rope, ModelError> {
    let nested = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let number = |key: &str, range: std::ops::RangeInclusive<f64>| match nested {
        Some(nested) if nested.get(key).is_some() => nested.number(key, range),
        _ => config.number(key, range),
    };
    let theta = number("rope_theta", 1.0..=1e12)?.unwrap_or(10_000.0);
    let partial = number("partial_rotary_factor", 0.0..=1.0)?.unwrap_or(1.0);
    // As transformers: int(head_dim * partial_rotary_factor).
    let rotary_dim = (head_dim as f64 * partial) as usize;
    let scaling = match nested {
        None => RopeScaling::None,
        Some(nested) => scaling(config, &nested)?,
    };
    Ok(Rope { theta, rotary_dim, scaling })
}

fn scaling(config: &Config<'_>, rope: &Config<'_>) -> Result<RopeScaling, ModelError> {
    let kind = match rope.text("rope_type")? {
        Some(kind) => kind,
        None => rope.text("type")?.unwrap_or("default"),
    };
    let factor = || {
        rope.number("factor", 1.0..=1e6)?.ok_or_else(|| bad("rope_scaling.factor", "it is missing"))
    };
    let original = || {
        let key = "original_max_position_embeddings";
        let own = rope.count_opt(key, 1..=1 << 24)?;
        Ok::<_, ModelError>(match own {
            Some(n) => n,
            None => config.count("max_position_embeddings", 1..=1 << 24)?,
        })
    };
    Ok(match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: factor()? },
        "llama3" => RopeScaling::Llama3 {
            factor: factor()?,
            low_freq_factor: rope.number("low_freq_factor", 1e-3..=1e6)?.unwrap_or(1.0),
            high_freq_factor: rope.number("high_freq_factor", 1e-3..=1e6)?.unwrap_or(4.0),
            original_max_position: original()?,
        },
        "yarn" => RopeScaling::Yarn {
            factor: factor()?,
            beta_fast: rope.number("beta_fast", 1e-3..=1e6)?.unwrap_or(32.0),
            beta_slow: rope.number("beta_slow", 1e-3..=1e6)?.unwrap_or(1.0),
            original_max_position: original()?,
            mscale: rope.number("mscale", 0.0..=1e3)?,
            mscale_all_dim: rope.number("mscale_all_dim", 0.0..=1e3)?,
            attention_factor: rope.number("attention_factor", 0.0..=1e3)?,
            truncate: rope.flag("truncate", true)?,
        },
        _ => {
            let cause = format!("{kind:?} is not one of default, linear, llama3, yarn");
            return Err(bad("rope_type", &cause));
        }
    })
}
