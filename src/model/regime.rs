//! How the experts of a layer run a step: each slot by itself, or in blocks of so many rows.

use crate::{
    device::{Caps, DType},
    kernels::{ExpertGemm, Routing},
    weights::WeightFormat,
};

use super::{ModelSpec, MoeSpec, Precision};

/// What the best way depends on beside the number of tokens and the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Inputs and outputs of an expert.
    pub hidden: usize,
    /// Width between.
    pub width: usize,
    /// Experts of the layer, which others may hold.
    pub n_experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Packing of the weights.
    pub format: WeightFormat,
}

impl ExpertShape {
    /// Of a layer's routed experts.
    pub fn of(spec: &ModelSpec, moe: &MoeSpec, precision: Precision) -> Self {
        let Routing { n_experts, top_k, .. } = moe.routing;
        let (hidden, width) = (spec.hidden_size, moe.intermediate_size);
        Self { hidden, width, n_experts, top_k, format: precision.experts }
    }

    /// What an adapter remembers its measured choices by: see [`crate::device::Tuned`].
    pub fn name(&self, caps: &Caps) -> String {
        let Self { hidden, width, n_experts, top_k, format, .. } = self;
        format!("experts {hidden}x{width}, {top_k} of {n_experts}, {format}, {} tier", caps.tier())
    }

    /// Rows of an expert's block in a step of `n_tokens`; 1 where experts run without blocks. As
    /// measured on this adapter, if it was, else by rule. `activations` are F32 or F16.
    pub fn block_tokens(&self, caps: &Caps, activations: DType, n_tokens: usize) -> usize {
        let measured = caps.tuned.choice(&self.name(caps), n_tokens);
        let known = measured.filter(|rows| self.candidates(caps, activations).contains(rows));
        known.unwrap_or_else(|| self.by_rule(caps, activations, n_tokens))
    }

    /// The choice for adapters that were not measured.
    pub fn by_rule(&self, caps: &Caps, activations: DType, n_tokens: usize) -> usize {
        let n_slots = n_tokens * self.top_k;
        // Without blocks while so few tokens visit an expert that reading weights for each of them
        // beats tiles, most of whose rows would be padding; in quarters of a slot that an expert
        // gets on average. Measured on an H200 and on lavapipe.
        let most = if caps.software { 64 } else { 6 };
        let few = 4 * n_slots <= (most * self.n_experts).max(32);
        // Twins round to int8 in steps of any size, see `Caps::twins`.
        let always = caps.twins && self.format == WeightFormat::W8A8;
        match few && !always {
            true => 1,
            false => ExpertGemm::block_size(caps, self.input(activations), n_slots, self.n_experts),
        }
    }

    /// Everything that [`ExpertShape::block_tokens`] can be, in ascending order.
    pub fn candidates(&self, caps: &Caps, activations: DType) -> Vec<usize> {
        [&[1], ExpertGemm::block_sizes(caps, self.input(activations))].concat()
    }

    /// What blocks of rows are multiplied in: the activations' type, or int8 that they are rounded
    /// to. Without blocks nothing is rounded, since reading weights is what takes the time.
    pub(super) fn input(&self, activations: DType) -> DType {
        if self.format == WeightFormat::W8A8 { DType::I8 } else { activations }
    }
}
