//! The mixture-of-experts layer alone: router, top-k, experts, weighted sum.

use crate::{
    Result,
    device::{Plan, Recording},
    engine::Runner,
};

use super::{
    median_seconds,
    work::{Load, Work},
};

/// Time of a layer for a number of tokens.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct MoeLayerRow {
    /// Tokens.
    pub tokens: usize,
    /// Microseconds of one layer, median.
    pub microseconds: f64,
    /// Bytes of expert weights that these tokens touch, at least once each.
    pub weight_bytes: f64,
    /// Multiply-adds of the chosen experts, times two.
    pub flops: f64,
    /// One layer by kernel, in order of time.
    pub kernels: Vec<KernelRow>,
}

/// A kernel's part of a layer.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct KernelRow {
    /// Kernel and role.
    pub label: String,
    /// Microseconds, median, timed by itself.
    pub microseconds: f64,
    /// Bytes that it has to move at least.
    pub bytes: f64,
    /// Multiply-adds with weights, times two.
    pub flops: f64,
}

impl KernelRow {
    /// Bytes per second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes / self.microseconds.max(1e-9) * 1e6
    }

    /// Floating-point operations per second.
    pub fn rate(&self) -> f64 {
        self.flops / self.microseconds.max(1e-9) * 1e6
    }
}

/// Passes over the layers that time each kernel.
const PROFILES: usize = 5;

/// Times all MoE layers of the model one after another, as a model would run them, so that the
/// weights of a layer have left the caches before they are read again.
///
/// # Errors
/// [`crate::device::DeviceError`] if the device fails.
pub fn moe_layer(runner: &mut Runner, tokens: usize) -> Result<MoeLayerRow> {
    let spec = runner.model().spec.clone();
    let moe: Vec<_> = spec.moe_layers().map(|(_, moe)| moe.clone()).collect();
    let (r, n_layers) = (moe[0].routing, moe.len() as f64);
    let plan = prepare(runner, tokens)?;
    let microseconds = median_seconds(runner.device(), &plan)? / n_layers * 1e6;
    let visited = visited(runner, tokens, r.n_experts)?;
    let load = Load { tokens, routing: r, visited };
    let per_expert = 3.0 * spec.hidden_size as f64 * moe[0].intermediate_size as f64;
    let element = runner.model().precision.experts.bits() as f64 / 8.0;
    Ok(MoeLayerRow {
        tokens,
        microseconds,
        weight_bytes: visited * r.n_experts as f64 * per_expert * element,
        flops: 2.0 * per_expert * (tokens * r.top_k) as f64,
        kernels: kernels(runner, &plan, &load, n_layers)?,
    })
}

/// Median seconds of a layer.
pub(super) fn layer_seconds(runner: &mut Runner, tokens: usize) -> Result<f64> {
    let plan = prepare(runner, tokens)?;
    let n_layers = runner.model().spec.moe_layers().count() as f64;
    Ok(median_seconds(runner.device(), &plan)? / n_layers)
}

fn prepare(runner: &mut Runner, tokens: usize) -> Result<Plan> {
    runner.fill_random(tokens);
    let mut rec = Recording::new(&runner.device().caps());
    runner.record_experts(&mut rec, tokens);
    Ok(runner.device().prepare(rec)?)
}

/// Share of the experts that the layers' routers chose in the last run.
fn visited(runner: &mut Runner, tokens: usize, n_experts: usize) -> Result<f64> {
    let (mut visited, mut all) = (0, 0);
    for routed in runner.routed(tokens)?.into_iter().flatten() {
        let mut ids: Vec<i32> = routed.ids.into_iter().filter(|&id| id >= 0).collect();
        ids.sort_unstable();
        ids.dedup();
        visited += ids.len();
        all += n_experts;
    }
    Ok(visited as f64 / all.max(1) as f64)
}

fn kernels(runner: &mut Runner, plan: &Plan, load: &Load, n_layers: f64) -> Result<Vec<KernelRow>> {
    // Kernel and role, its work, and its time in each pass.
    let mut all: Vec<(String, Work, Vec<f64>)> = Vec::new();
    for pass in 0..PROFILES {
        let timings = runner.device().run_profiled(plan)?.wait_now()?;
        for ((label, time), dispatch) in timings.iter().zip(&plan.recording().dispatches) {
            let at = all.iter().position(|row| row.0 == *label).unwrap_or_else(|| {
                all.push((label.to_string(), Work::default(), vec![0.0; PROFILES]));
                all.len() - 1
            });
            let (_, sum, times) = &mut all[at];
            times[pass] += time.as_secs_f64();
            if pass == 0 {
                let work = Work::of(dispatch, load);
                *sum = Work { bytes: sum.bytes + work.bytes, flops: sum.flops + work.flops };
            }
        }
    }
    let mut rows: Vec<KernelRow> = all
        .into_iter()
        .map(|(label, work, mut times)| {
            times.sort_by(f64::total_cmp);
            KernelRow {
                label,
                microseconds: times[PROFILES / 2] / n_layers * 1e6,
                bytes: work.bytes / n_layers,
                flops: work.flops / n_layers,
            }
        })
        .collect();
    rows.sort_by(|a, b| b.microseconds.total_cmp(&a.microseconds));
    Ok(rows)
}
