//! Measures speed: prompt and generation rows as llama-bench reports them, the mixture-of-experts
//! layer alone, and the ceilings that both are held against, all in one run.

mod ceilings;
mod moe_layer;
mod peers;
#[cfg(not(target_arch = "wasm32"))]
mod plot;
mod report;
mod rows;
mod shapes;
mod transfers;
mod tune;
mod work;

use std::time::{Duration, Instant};

use crate::{
    Result,
    device::{Device, Plan, Timing},
    engine::Runner,
    llm::LlmOptions,
    model::{KvCache, Limits, Model, ModelSpec, arch},
    weights::DummySource,
};

pub use ceilings::{Ceilings, measure as measure_ceilings};
pub use moe_layer::{KernelRow, MoeLayerRow, moe_layer};
pub use peers::{DECODE as DECODE_PEERS, LAYER as LAYER_PEERS, Peer};
#[cfg(not(target_arch = "wasm32"))]
pub use plot::{PlotError, plot};
pub use report::{Memory, Report, expert_bytes};
pub use rows::{Row, Rows, Workload, rows};
pub use shapes::{names as shape_names, spec as shape};
pub use transfers::{TransferRow, transfers};
pub use tune::{TuneRow, tune};

/// Devices clock down when idle: load before anything is timed.
const WARM_UP: Duration = Duration::from_millis(400);

/// A model of random weights on a device, for measuring, with a cache of up to `n_blocks` blocks:
/// fewer where the device cannot bind so many.
///
/// # Errors
/// [`crate::device::DeviceError`] where it does not fit.
pub fn dummy_runner(
    options: &LlmOptions,
    spec: ModelSpec,
    limits: Limits,
    n_blocks: usize,
) -> Result<Runner> {
    let mut device = pollster::block_on(options.open(&options.device))?;
    let (precision, block_size) = (options.precision(), options.block_size);
    let caps = device.caps();
    let block_bytes = KvCache::block_bytes(&spec, block_size, precision.activations);
    let layer_bytes = (block_bytes / (2 * spec.layers.len() as u64)).max(1);
    let most = (caps.max_binding_bytes.min(caps.max_buffer_bytes) / layer_bytes) as usize;
    let n_blocks = (1 + n_blocks).min(most);
    let kv = KvCache::alloc(&mut device, &spec, n_blocks, block_size, precision.activations)?;
    let source = DummySource::new(options.engine.seed);
    let n_positions = limits.max_blocks * block_size;
    let model = Model::load(spec, &source, &mut device, precision, n_positions, &|_| {})?
        .with_block_align(options.moe_block_align);
    Runner::new(device, model, kv, limits)
}

/// Host time that one sample lasts at least, so that waiting for the device hardly counts.
const SAMPLE: f64 = 0.01;

/// Median seconds of a plan, run back to back, after a warm-up.
fn median_seconds(device: &mut Device, plan: &Plan) -> Result<f64> {
    let sample = |device: &mut Device, times: usize| -> Result<f64> {
        let start = Instant::now();
        for _ in 0..times {
            device.run(plan)?;
        }
        device.wait()?;
        Ok(start.elapsed().as_secs_f64() / times as f64)
    };
    let (start, mut last) = (Instant::now(), 0.0);
    while start.elapsed() < WARM_UP {
        last = sample(device, 4)?;
    }
    let times = (SAMPLE / last) as usize;
    Ok(median((0..7).map(|_| sample(device, times.clamp(1, 256))).collect::<Result<_>>()?))
}

/// The middle one; of an even number, the greater of the two.
fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Parses a built-in configuration.
fn parse_config(json: &str) -> Result<ModelSpec> {
    let value = serde_json::from_str(json).expect("built-in configurations are valid JSON");
    Ok(arch::parse(&value)?)
}

/// Sums timings by label, longest first: (label, calls, seconds).
pub fn by_kernel(timings: &[Timing]) -> Vec<(String, usize, f64)> {
    let mut rows: Vec<(String, usize, f64)> = Vec::new();
    for (label, time) in timings {
        let at = rows.iter().position(|row| row.0 == *label).unwrap_or_else(|| {
            rows.push((label.to_string(), 0, 0.0));
            rows.len() - 1
        });
        rows[at].1 += 1;
        rows[at].2 += time.as_secs_f64();
    }
    rows.sort_by(|a, b| b.2.total_cmp(&a.2));
    rows
}
