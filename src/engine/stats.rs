//! Numbers that an engine counts about itself, for metrics. Counters only grow.

use std::sync::Arc;

use crate::{
    kernels::CountExperts,
    model::ModelSpec,
    parallel::{CacheStats, EplbStats, ExchangeStats, Owners},
};

/// A snapshot of the engine.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineStats {
    /// Requests that hold cache blocks.
    pub running: usize,
    /// Requests in the queue.
    pub waiting: usize,
    /// Cache blocks that requests can own.
    pub kv_blocks_total: usize,
    /// Cache blocks that requests own; those kept only as prefixes are free.
    pub kv_blocks_used: usize,
    /// Positions of a cache block.
    pub block_size: usize,
    /// Positions in owned cache blocks that hold nothing yet.
    pub kv_positions_empty: usize,
    /// Bytes of a cache block over all layers.
    pub kv_block_bytes: u64,
    /// Bytes of the experts' banks on the primary device.
    pub expert_bytes: u64,
    /// Those of them that hold weights and scales rather than padding.
    pub expert_bytes_used: u64,
    /// Bytes of all buffers on the primary device.
    pub device_bytes: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Times that a request gave its blocks back and started over.
    pub preemptions: u64,
    /// Steps submitted.
    pub steps: u64,
    /// Tokens of prompts taken into the cache, found ones included.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Requests that failed because their logits were not finite.
    pub non_finite: u64,
    /// Device time of routing and alignment of the step that was timed last, milliseconds.
    pub routing_ms: Option<f64>,
    /// Device time of bringing experts from the host's memory in the step that was timed last,
    /// milliseconds.
    pub fetch_ms: Option<f64>,
    /// What the experts did.
    pub experts: Arc<ExpertStats>,
    /// Where the experts of each layer that has some are, if on several devices.
    pub owners: Option<Arc<Vec<Owners>>>,
    /// What went to other devices, if any hold experts.
    pub exchange: Option<ExchangeStats>,
    /// How balanced the devices are, where experts move between them.
    pub eplb: Option<EplbStats>,
    /// What caches of experts did, if there are any, as of the last reading.
    pub expert_cache: Option<CacheStats>,
}

/// Work of the experts since the start, as of the last reading.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpertStats {
    /// Experts that a layer has room for; 0 for models without experts.
    pub n_experts: usize,
    /// Those that are there, the first ones.
    pub n_present: usize,
    /// Tokens that each expert computed, padding excluded. `[moe layers, n_experts]`
    pub tokens: Vec<u64>,
    /// By layer that has experts.
    pub layers: Vec<LayerStats>,
}

/// Work of one layer's experts since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LayerStats {
    /// Index of the layer in the model.
    pub layer: usize,
    /// Token slots of expert blocks that held a token.
    pub slots_used: u64,
    /// Token slots of expert blocks, used and padded.
    pub slots: u64,
    /// Sum over steps of the experts that had any token.
    pub active: u64,
    /// Steps counted.
    pub steps: u64,
}

impl ExpertStats {
    /// Nothing counted yet.
    pub(super) fn new(spec: &ModelSpec) -> Self {
        let n_experts = spec.n_experts();
        let layers: Vec<LayerStats> = spec
            .moe_layers()
            .map(|(layer, _)| LayerStats { layer, ..Default::default() })
            .collect();
        let tokens = vec![0; layers.len() * n_experts];
        Self { n_experts, n_present: spec.n_present(), tokens, layers }
    }

    /// Tokens that each expert computed, padding excluded, by layer. Each `[n_present]`
    pub fn rows(&self) -> impl Iterator<Item = &[u64]> {
        self.tokens.chunks(self.n_experts.max(1)).map(|row| &row[..self.n_present.min(row.len())])
    }

    /// Adds what the device counted between two readings, each modulo 2^32.
    /// `[moe layers, at least n_experts + CountExperts::TOTALS]`
    pub(super) fn add(&mut self, spec: &ModelSpec, before: &[u32], now: &[u32]) {
        if self.layers.is_empty() {
            return;
        }
        let stride = now.len() / self.layers.len();
        for (i, (_, moe)) in spec.moe_layers().enumerate() {
            let n = moe.routing.n_experts;
            let new = |at: usize| {
                let at = i * stride + at;
                u64::from(now[at].wrapping_sub(before.get(at).copied().unwrap_or(0)))
            };
            let tokens = &mut self.tokens[i * self.n_experts..][..n];
            tokens.iter_mut().enumerate().for_each(|(e, sum)| *sum += new(e));
            let layer = &mut self.layers[i];
            let totals =
                [&mut layer.slots_used, &mut layer.slots, &mut layer.active, &mut layer.steps];
            debug_assert_eq!(totals.len(), CountExperts::TOTALS);
            totals.into_iter().enumerate().for_each(|(t, sum)| *sum += new(n + t));
        }
    }
}
