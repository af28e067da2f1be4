//! What a run of `moewe bench` has found, with all that a reader needs to compare it: written as
//! JSON, read again for pictures.

use serde::{Deserialize, Serialize};

use crate::{
    engine::Runner,
    model::ModelSpec,
    weights::{WeightFormat, padded},
};

use super::{Ceilings, MoeLayerRow, Row};

/// Measurements of one model on one device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// moewe's version.
    pub version: String,
    /// A shape's name, or the architecture.
    pub model: String,
    /// Layers.
    pub layers: usize,
    /// Format of the experts' weights.
    pub weights: String,
    /// Adapter, backend and tier.
    pub device: String,
    /// Driver and its version.
    pub driver: String,
    /// What the device reached in the same run.
    pub ceilings: Ceilings,
    /// Device memory.
    pub memory: Memory,
    /// Whole model.
    #[serde(default)]
    pub rows: Vec<Row>,
    /// Mixture-of-experts layer.
    #[serde(default)]
    pub moe_layer: Vec<MoeLayerRow>,
}

/// Device memory of a run, bytes.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Memory {
    /// Most that was ever allocated at a time: weights, cache, activations, staging.
    pub peak_bytes: u64,
    /// Weights of the routed experts with their scales.
    pub expert_bytes: u64,
    /// The same in f16.
    pub expert_bytes_f16: u64,
    /// The same in f32.
    pub expert_bytes_f32: u64,
}

/// Bytes that the routed experts of a model take in a format, scales and padding included.
pub fn expert_bytes(spec: &ModelSpec, format: WeightFormat) -> u64 {
    let matrix = |rows: usize, cols: usize| {
        padded(rows) * (format.bytes_per_row(cols) + 4 * format.scales_per_row(cols))
    };
    let layer = |n_experts: usize, width: usize| {
        n_experts * (2 * matrix(width, spec.hidden_size) + matrix(spec.hidden_size, width))
    };
    spec.moe_layers().map(|(_, m)| layer(m.routing.n_experts, m.intermediate_size) as u64).sum()
}

impl Memory {
    /// What the runner's device has held so far.
    pub fn of(runner: &mut Runner) -> Self {
        let peak_bytes = runner.device().peak_bytes();
        let (spec, format) = (&runner.model().spec, runner.model().precision.experts);
        Self {
            peak_bytes,
            expert_bytes: expert_bytes(spec, format),
            expert_bytes_f16: expert_bytes(spec, WeightFormat::F16),
            expert_bytes_f32: expert_bytes(spec, WeightFormat::F32),
        }
    }
}

impl std::fmt::Display for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        write!(f, "{:.2} GiB at the peak", gib(self.peak_bytes))?;
        if self.expert_bytes == 0 {
            return Ok(());
        }
        let share = |of: u64| self.expert_bytes as f64 / of as f64 * 100.0;
        write!(
            f,
            "; experts {:.2} GiB, {:.1} % of f32, {:.1} % of f16",
            gib(self.expert_bytes),
            share(self.expert_bytes_f32),
            share(self.expert_bytes_f16)
        )
    }
}

impl Report {
    /// A report without rows yet.
    pub fn new(model: &str, runner: &mut Runner, ceilings: Ceilings) -> Self {
        let memory = Memory::of(runner);
        let (device, driver) = (runner.device().describe(), runner.device().driver());
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            model: model.into(),
            layers: runner.model().spec.layers.len(),
            weights: runner.model().precision.to_string(),
            device,
            driver,
            ceilings,
            memory,
            rows: Vec::new(),
            moe_layer: Vec::new(),
        }
    }

    /// What was measured and where, in one line.
    pub fn title(&self) -> String {
        let Self { model, layers, weights, device, driver, .. } = self;
        format!("{model}, {layers} layers, {weights}, {device}, driver {driver}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::shape;

    #[test]
    fn int8_experts_take_a_quarter_of_f32_and_half_of_f16_and_int4_less() {
        for name in ["qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3-shard", "olmoe"] {
            let spec = shape(name, Some(2)).unwrap().unwrap();
            let bytes = |format| expert_bytes(&spec, format) as f64;
            let w8 = bytes(WeightFormat::W8 { group: None });
            let shares = [w8 / bytes(WeightFormat::F32), w8 / bytes(WeightFormat::F16)];
            assert!(shares[0] > 0.25 && shares[0] <= 0.26, "{name} {shares:?}");
            assert!(shares[1] > 0.5 && shares[1] <= 0.52, "{name} {shares:?}");
            // 32 bits of a scale on 32 weights of four bits.
            let w4 = bytes(WeightFormat::W4 { group: 32 });
            assert_eq!(w4 / bytes(WeightFormat::F16), 5.0 / 16.0, "{name}");
        }
        // 128 experts of 3 x 768 x 2048 bytes, and a scale for each of their rows.
        let qwen = shape("qwen3-30b-a3b", Some(1)).unwrap().unwrap();
        let scales = 4 * (2 * 768 + 2048);
        let expected = 128 * (3 * 768 * 2048 + scales);
        assert_eq!(expert_bytes(&qwen, WeightFormat::W8 { group: None }), expected);
    }
}
