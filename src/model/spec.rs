//! What a network looks like, in numbers: the common language between `arch/`, which reads it from
//! a configuration, and the layers, which are built from it.

use crate::kernels::{MAX_GROUPS, QkNorm, Routing};

use super::{ModelError, config::bad, rope::RopeScaling};

/// Experts that a layer may have.
pub(super) const MOST_EXPERTS: usize = 1024;

/// A decoder-only transformer with dense or mixture-of-experts feed-forward layers.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelSpec {
    /// `model_type` of its configuration.
    pub architecture: &'static str,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Attention, the same in every layer but for the window.
    pub attention: AttentionSpec,
    /// Layers in order.
    pub layers: Vec<LayerSpec>,
    /// Added to the mean square in every normalisation.
    pub rms_norm_eps: f32,
    /// Positions the model was trained for.
    pub max_position: usize,
    /// The output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Tokens that end a text.
    pub eos_token_ids: Vec<u32>,
    /// How tensors are called.
    pub names: Names,
}

/// Multi-head attention with grouped queries (Ainslie et al. 2023).
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads; divides `n_heads`.
    pub n_kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Biases of q, k and v.
    pub qkv_bias: bool,
    /// Bias of the output projection.
    pub o_bias: bool,
    /// Normalisation of q and k.
    pub qk_norm: QkNorm,
    /// Rotated dimensions of each head.
    pub rotary_dim: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Change of the frequencies for longer contexts.
    pub rope_scaling: RopeScaling,
}

/// One transformer layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerSpec {
    /// Positions that attention looks back over, if limited.
    pub window: Option<usize>,
    /// The feed-forward half.
    pub ffn: FfnSpec,
}

/// Feed-forward half of a layer.
#[derive(Debug, Clone, PartialEq)]
pub enum FfnSpec {
    /// One gated MLP of this intermediate width.
    Dense(usize),
    /// A mixture of experts.
    Moe(MoeSpec),
}

/// A mixture of gated MLPs.
#[derive(Debug, Clone, PartialEq)]
pub struct MoeSpec {
    /// How experts are chosen and weighted, and the numbers that they can have.
    pub routing: Routing,
    /// The last of those numbers, which no expert has yet: room for more of them.
    pub n_spare: usize,
    /// A bias that takes part in the choice, not in the weights.
    pub correction_bias: bool,
    /// Intermediate width of one expert.
    pub intermediate_size: usize,
    /// An expert that sees every token.
    pub shared: Option<SharedSpec>,
}

impl MoeSpec {
    /// Experts that are there.
    pub fn n_present(&self) -> usize {
        self.routing.n_experts - self.n_spare
    }

    /// Experts that come together: a group, where the router chooses groups first.
    pub fn unit(&self) -> usize {
        match self.routing.n_group {
            1 => 1,
            n_group => self.routing.n_experts / n_group,
        }
    }

    /// How the router chooses among those that are there.
    pub fn choice(&self) -> Routing {
        let n_experts = self.n_present();
        let n_group = if self.routing.n_group == 1 { 1 } else { n_experts / self.unit() };
        Routing { n_experts, n_group, ..self.routing }
    }
}

/// The shared expert of a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct SharedSpec {
    /// Intermediate width.
    pub intermediate_size: usize,
    /// Its output is multiplied by the sigmoid of a linear function of the input.
    pub gated: bool,
}

/// Parts of tensor names that differ between architectures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Names {
    /// The mixture within a layer.
    pub moe: &'static str,
    /// Gate, up and down projection of an expert.
    pub expert: [&'static str; 3],
    /// The shared expert within the mixture.
    pub shared: &'static str,
}

impl Names {
    /// Names of most checkpoints on the Hub.
    pub const COMMON: Self =
        Self { moe: "mlp", expert: ["gate_proj", "up_proj", "down_proj"], shared: "shared_expert" };
}

impl ModelSpec {
    /// Largest number of experts that a layer has room for; 0 for a dense model.
    pub fn n_experts(&self) -> usize {
        self.moe_layers().map(|(_, moe)| moe.routing.n_experts).max().unwrap_or(0)
    }

    /// Largest number of experts that are there in a layer; 0 for a dense model.
    pub fn n_present(&self) -> usize {
        self.moe_layers().map(|(_, moe)| moe.n_present()).max().unwrap_or(0)
    }

    /// The same model with room for so many more experts in each layer.
    ///
    /// # Errors
    /// [`ModelError::Spare`] for parts of a group where the router chooses groups, and where the
    /// kernels take no more experts or groups.
    pub fn with_spare_experts(mut self, n: usize) -> Result<Self, ModelError> {
        for moe in self.moe_layers_mut() {
            let (unit, routing) = (moe.unit(), &mut moe.routing);
            routing.n_experts += n;
            if routing.n_group > 1 {
                routing.n_group = routing.n_experts / unit;
            }
            let is_too_much = routing.n_experts > MOST_EXPERTS || routing.n_group > MAX_GROUPS;
            if n > 0 && (!n.is_multiple_of(unit) || is_too_much) {
                let n_experts = routing.n_experts - n;
                return Err(ModelError::Spare { n, n_experts, unit });
            }
            moe.n_spare += n;
        }
        Ok(self)
    }

    /// Notes that so many experts of each layer are there.
    pub(crate) fn set_present(&mut self, n: usize) {
        for moe in self.moe_layers_mut() {
            moe.n_spare = moe.routing.n_experts.saturating_sub(n);
        }
    }

    fn moe_layers_mut(&mut self) -> impl Iterator<Item = &mut MoeSpec> {
        self.layers.iter_mut().filter_map(|layer| match &mut layer.ffn {
            FfnSpec::Moe(moe) => Some(moe),
            FfnSpec::Dense(_) => None,
        })
    }

    /// Layers that have a router, with their index.
    pub fn moe_layers(&self) -> impl Iterator<Item = (usize, &MoeSpec)> {
        self.layers.iter().enumerate().filter_map(|(i, layer)| match &layer.ffn {
            FfnSpec::Moe(moe) => Some((i, moe)),
            FfnSpec::Dense(_) => None,
        })
    }

    /// Checks what no single number shows.
    ///
    /// # Errors
    /// [`ModelError::Config`] with the offending key.
    pub fn validate(self) -> Result<Self, ModelError> {
        let a = &self.attention;
        if !a.n_heads.is_multiple_of(a.n_kv_heads) {
            let cause = format!("{} does not divide {} heads", a.n_kv_heads, a.n_heads);
            return Err(bad("num_key_value_heads", &cause));
        }
        if a.rotary_dim == 0 || !a.rotary_dim.is_multiple_of(2) || a.rotary_dim > a.head_dim {
            let cause = format!("{} rotated of {} dimensions", a.rotary_dim, a.head_dim);
            return Err(bad("head_dim", &cause));
        }
        for (_, moe) in self.moe_layers() {
            let r = &moe.routing;
            if r.top_k > r.n_experts {
                let cause = format!("{} of {} experts", r.top_k, r.n_experts);
                return Err(bad("num_experts_per_tok", &cause));
            }
            if !r.n_experts.is_multiple_of(r.n_group) {
                let cause = format!("{} does not divide {} experts", r.n_group, r.n_experts);
                return Err(bad("n_group", &cause));
            }
            if r.topk_group > r.n_group {
                let cause = format!("{} of {} groups", r.topk_group, r.n_group);
                return Err(bad("topk_group", &cause));
            }
            if r.top_k > r.topk_group * (r.n_experts / r.n_group) {
                return Err(bad("topk_group", "the kept groups have fewer experts than top-k"));
            }
        }
        Ok(self)
    }
}
