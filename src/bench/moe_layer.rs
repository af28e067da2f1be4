//! The mixture-of-experts layer alone: router, top-k, experts, weighted sum.

use crate::{Result, device::Recording, engine::Runner};

use super::{by_kernel, median_seconds};

/// Time of a layer for a number of tokens.
#[derive(Debug, Clone, serde::Serialize)]
pub struct MoeLayerRow {
    /// Tokens.
    pub tokens: usize,
    /// Microseconds of one layer, median.
    pub microseconds: f64,
    /// Bytes of expert weights that these tokens touch, at least once each.
    pub weight_bytes: f64,
    /// Multiply-adds of the chosen experts, times two.
    pub flops: f64,
    /// Microseconds of one layer by kernel.
    pub kernels: Vec<(String, f64)>,
}

/// Times all MoE layers of the model one after another, as a model would run them, so that the
/// weights of a layer have left the caches before they are read again.
///
/// # Errors
/// [`crate::device::DeviceError`] if the device fails.
pub fn moe_layer(runner: &mut Runner, tokens: usize) -> Result<MoeLayerRow> {
    let (caps, spec) = (runner.device().caps(), runner.model().spec.clone());
    let moe: Vec<_> = spec.moe_layers().map(|(_, moe)| moe.clone()).collect();
    runner.fill_random(tokens);
    let mut rec = Recording::new(&caps);
    runner.record_experts(&mut rec, tokens);
    let plan = runner.device().prepare(rec)?;
    let seconds = median_seconds(runner.device(), &plan, 4)? / moe.len() as f64;
    let timings = runner.device().run_profiled(&plan)?.wait_now()?;
    let kernels = by_kernel(&timings).into_iter();
    let kernels = kernels.map(|(label, _, s)| (label, s * 1e6 / moe.len() as f64)).collect();
    let (r, width) = (&moe[0].routing, moe[0].intermediate_size);
    // Experts that are hit if tokens choose evenly and independently.
    let share = 1.0 - (1.0 - r.top_k as f64 / r.n_experts as f64).powi(tokens as i32);
    let per_expert = 3.0 * spec.hidden_size as f64 * width as f64;
    let element = runner.model().precision.experts.element_bytes() as f64;
    Ok(MoeLayerRow {
        tokens,
        microseconds: seconds * 1e6,
        weight_bytes: share * r.n_experts as f64 * per_expert * element,
        flops: 2.0 * per_expert * (tokens * r.top_k) as f64,
        kernels,
    })
}
