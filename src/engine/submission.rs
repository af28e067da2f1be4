//! A submitted step on its way, and what it brings to the host.

use std::{ops::Range, time::Duration};

use crate::{
    Result,
    device::{Readback, Timings},
    kernels::{Logprobs, Sample},
};

use super::TokenLogprobs;

/// What a step does beside its work.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extras {
    /// Bring the experts' counts along.
    pub expert_counts: bool,
    /// Time the routers.
    pub timed: bool,
    /// Bring along which experts each token chose.
    pub routed: bool,
}

/// A step on its way, and its results on theirs.
#[derive(Debug, Default)]
pub struct Submission {
    /// Rows of logits that belong to each sequence, in batch order.
    pub rows: Vec<Range<usize>>,
    /// Row of the token that each row of logits follows.
    pub(super) logit_rows: Vec<u32>,
    /// Tokens of the step, padding included.
    pub(super) n_tokens: usize,
    /// Experts per token of each layer whose choices come along.
    pub(super) top_k: Vec<usize>,
    pub(super) timings: Vec<Timings>,
    pub(super) n: usize,
    pub(super) with_logprobs: bool,
    pub(super) readback: Option<Readback>,
}

/// What a step brought to the host.
#[derive(Debug, Clone, Default)]
pub struct StepResults {
    /// Sampled tokens; `None` where the logits were not numbers. `[rows]`
    pub tokens: Vec<Option<u32>>,
    /// Log probability of the chosen token and of the most probable ones, if any row wanted them.
    /// `[rows, Logprobs::COLS]`
    pub logprobs: Vec<f32>,
    /// The most probable tokens. `[rows, Logprobs::MOST]`
    pub top_ids: Vec<u32>,
    /// Experts of all layers that have any, for the token that each row of logits follows, if
    /// asked. `[rows][moe layers * top_k]`
    pub routed: Vec<Vec<u32>>,
    /// The experts' counts, if asked: see [`crate::kernels::CountExperts`]. Behind them those of
    /// each layer that has slots for some experts: see [`crate::kernels::CacheExperts`].
    pub expert_counts: Vec<u32>,
    /// Device time of routers and of the sorting by expert, if timed.
    pub routing_time: Option<Duration>,
    /// Device time of bringing experts from the host's memory, if timed.
    pub fetch_time: Option<Duration>,
}

impl Submission {
    /// Waits for this step, not for later ones; in browsers without blocking.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] if the device fails.
    pub async fn wait(mut self) -> Result<StepResults> {
        let bytes = match self.readback.take() {
            Some(readback) => readback.wait().await?,
            None => Vec::new(),
        };
        let mut results = self.results(&bytes);
        for timings in self.timings {
            let timings = timings.wait().await?;
            let sum = |labels: &[&str]| -> Duration {
                let counts = |label: &str| labels.iter().any(|part| label.contains(part));
                timings.iter().filter(|t| counts(&t.0)).map(|t| t.1).sum()
            };
            let routing = sum(&["route", "grouped_topk", "align_experts"]);
            *results.routing_time.get_or_insert_default() += routing;
            *results.fetch_time.get_or_insert_default() += sum(&["cache_experts", "fetch_experts"]);
        }
        Ok(results)
    }

    fn results(&self, bytes: &[u8]) -> StepResults {
        let words: Vec<u32> = bytemuck::pod_collect_to_vec(bytes);
        let n_scored = if self.with_logprobs { self.n } else { 0 };
        let (ids, rest) = words.split_at(self.n);
        let (logprobs, rest) = rest.split_at(n_scored * Logprobs::COLS);
        let (top_ids, rest) = rest.split_at(n_scored * Logprobs::MOST);
        let (mut expert_counts, mut routed) = (rest, Vec::new());
        if !self.top_k.is_empty() {
            routed = vec![Vec::new(); self.n];
        }
        for &top_k in &self.top_k {
            let (ids, rest) = expert_counts.split_at(self.n_tokens * top_k);
            for (routed, &row) in routed.iter_mut().zip(&self.logit_rows) {
                routed.extend(&ids[row as usize * top_k..][..top_k]);
            }
            expert_counts = rest;
        }
        let token = |&id: &u32| (id & Sample::INVALID == 0).then_some(id);
        StepResults {
            tokens: ids.iter().map(token).collect(),
            logprobs: logprobs.iter().map(|&bits| f32::from_bits(bits)).collect(),
            top_ids: top_ids.to_vec(),
            routed,
            expert_counts: expert_counts.to_vec(),
            routing_time: None,
            fetch_time: None,
        }
    }
}

impl StepResults {
    /// Of one row, with the `n` most probable tokens.
    pub(super) fn logprobs(&self, row: usize, n: usize) -> TokenLogprobs {
        let values = &self.logprobs[row * Logprobs::COLS..][..Logprobs::COLS];
        let ids = &self.top_ids[row * Logprobs::MOST..][..n];
        let top = ids.iter().copied().zip(values[1..].iter().copied());
        TokenLogprobs { chosen: values[0], top: top.filter(|t| t.0 != u32::MAX).collect() }
    }
}
