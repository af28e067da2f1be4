//! Random weights made from (name, shape) alone, for benchmarks and tests of models whose
//! checkpoint is not at hand. Knows the naming habits of checkpoints, and no model.

use half::bf16;

use super::{Source, SourceDtype, SourceTensor, WeightsError, join, source::n_bytes};

/// Largest tensor made, in bytes: about five times the largest in published checkpoints (fused
/// expert banks), so that an absurd configuration is an error and not an exhausted machine.
const MAX_BYTES: u64 = 16 << 30;

/// Bytes that one thread fills at a time.
const CHUNK_BYTES: usize = 1 << 18;

/// Any tensor on demand, in BF16, deterministic in (seed, name, shape).
///
/// Values are close to normal with deviation 1/sqrt(cols), which keeps activations of order one
/// through any depth; norms (names ending in `norm.weight`) lie around 1. Embeddings have deviation
/// 4, which outweighs what the layers add: different tokens stay different, and so random routers
/// send them to different experts, evenly as trained, balanced routers do, in every layer and
/// whatever the rounding. A correction bias of the router is small for the same reason.
/// [`contains`](Source::contains) is what a plain checkpoint would answer for optional tensors:
/// true, except for biases (`.bias`, but not `e_score_correction_bias`) and for the scales that
/// mark a quantised checkpoint (`_scale`, `_scale_inv`, `.scales`). What is asked for in spite of
/// that is made all the same.
#[derive(Debug, Clone, Default)]
pub struct DummySource {
    seed: u64,
}

impl DummySource {
    /// A source whose every value follows from `seed`.
    pub fn new(seed: u64) -> Self {
        Self { seed }
    }
}

impl Source for DummySource {
    fn contains(&self, name: &str) -> bool {
        ![".bias", "_scale", "_scale_inv", ".scales"].iter().any(|end| name.ends_with(end))
    }

    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<SourceTensor<'_>, WeightsError> {
        let n_bytes = n_bytes(shape, SourceDtype::BF16)
            .filter(|&bytes| bytes as u64 <= MAX_BYTES)
            .ok_or_else(|| WeightsError::TooLarge { name: name.into(), shape: shape.into() })?;
        let cols = shape.last().copied().unwrap_or(1).max(1);
        let (mean, deviation) = match name {
            _ if name.ends_with("norm.weight") => (1.0, 0.1),
            _ if name.ends_with("embed_tokens.weight") => (0.0, 4.0),
            _ if name.ends_with("e_score_correction_bias") => (0.0, 0.01),
            _ => (0.0, 1.0 / (cols as f32).sqrt()),
        };
        let levels = levels(mean, deviation);
        let mut bytes = vec![0; n_bytes];
        fill(hash_name(self.seed, name), 0, &levels, &mut bytes);
        SourceTensor::new(name, SourceDtype::BF16, shape, bytes)
    }
}

/// BF16 bytes for each sum of four random bytes: one table look-up instead of arithmetic per
/// element. The sum (Irwin-Hall) is close to normal, within 3.5 deviations of its mean 510.
fn levels(mean: f32, deviation: f32) -> [[u8; 2]; 1024] {
    // Variance of a uniform byte is (256^2 - 1) / 12; of the sum of four, four times that.
    let unit = deviation / (65535.0f32 / 3.0).sqrt();
    std::array::from_fn(|sum| bf16::from_f32(mean + (sum as f32 - 510.0) * unit).to_le_bytes())
}

/// Fills `bytes`, which begin `first` elements into the tensor, halving for the threads.
fn fill(seed: u64, first: u64, levels: &[[u8; 2]; 1024], bytes: &mut [u8]) {
    if bytes.len() > CHUNK_BYTES {
        // Multiples of four bytes, as one hash makes two elements.
        let (left, right) = bytes.split_at_mut(bytes.len() / 8 * 4);
        let middle = first + left.len() as u64 / 2;
        join(|| fill(seed, first, levels, left), || fill(seed, middle, levels, right));
        return;
    }
    let pair = |pair: usize| {
        let hash = mix(seed.wrapping_add((first / 2 + pair as u64).wrapping_mul(GOLDEN)));
        // Two sums of four bytes, side by side in one word.
        let sums = (hash & 0x00FF_00FF_00FF_00FF) + (hash >> 8 & 0x00FF_00FF_00FF_00FF);
        let sums = sums + (sums >> 16);
        [levels[sums as usize & 1023], levels[(sums >> 32) as usize & 1023]]
    };
    let (pairs, odd) = bytes.as_chunks_mut::<4>();
    for (index, out) in pairs.iter_mut().enumerate() {
        let [left, right] = pair(index);
        *out = [left[0], left[1], right[0], right[1]];
    }
    odd.copy_from_slice(&pair(pairs.len())[0][..odd.len()]);
}

/// 2^64 divided by the golden ratio, the step of SplitMix64.
const GOLDEN: u64 = 0x9E37_79B9_7F4A_7C15;

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
pub(crate) fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A seed for each name.
fn hash_name(seed: u64, name: &str) -> u64 {
    name.bytes().fold(mix(seed ^ GOLDEN), |hash, byte| mix(hash ^ u64::from(byte)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moments(values: &[f32]) -> (f64, f64) {
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n;
        (mean, variance.sqrt())
    }

    #[test]
    fn values_have_the_promised_mean_and_deviation() {
        let source = DummySource::new(7);
        let matrix = source.tensor("mlp.up_proj.weight", &[512, 1024]).unwrap().to_f32();
        let (mean, deviation) = moments(&matrix);
        assert!(mean.abs() < 2e-4, "mean {mean}");
        assert!((deviation * 32.0 - 1.0).abs() < 0.01, "deviation {deviation}");
        let norm = source.tensor("input_layernorm.weight", &[4096]).unwrap().to_f32();
        let (mean, deviation) = moments(&norm);
        assert!((mean - 1.0).abs() < 0.01 && (deviation - 0.1).abs() < 0.01);
        let table = source.tensor("model.embed_tokens.weight", &[64, 256]).unwrap().to_f32();
        assert!((moments(&table).1 - 4.0).abs() < 0.1);
        // Neighbours are independent: the mean product is that of the means.
        let products: Vec<f32> = matrix.windows(2).map(|w| w[0] * w[1] * 1024.0).collect();
        assert!(moments(&products).0.abs() < 0.01);
    }

    #[test]
    fn values_depend_on_seed_and_name_and_not_on_threads() {
        let shape = [3, 200_001]; // More than one chunk, an odd count of elements.
        let bytes =
            |seed, name| DummySource::new(seed).tensor(name, &shape).unwrap().bytes().to_vec();
        let reference = bytes(1, "a.weight");
        assert_eq!(reference, bytes(1, "a.weight"));
        assert_ne!(reference, bytes(2, "a.weight"));
        assert_ne!(reference, bytes(1, "b.weight"));
        let mut sequential = vec![0; reference.len()];
        let levels = levels(0.0, 1.0 / (200_001f32).sqrt());
        let seed = hash_name(1, "a.weight");
        for (index, chunk) in sequential.chunks_mut(4).enumerate() {
            fill(seed, 2 * index as u64, &levels, chunk);
        }
        assert!(reference == sequential);
    }

    #[test]
    fn optional_tensors_are_those_of_a_plain_checkpoint() {
        let source = DummySource::default();
        for name in ["lm_head.weight", "experts.gate_up_proj", "gate.e_score_correction_bias"] {
            assert!(source.contains(name), "{name}");
        }
        for name in ["q_proj.bias", "up_proj.weight_scale_inv", "up_proj.scales"] {
            assert!(!source.contains(name), "{name}");
        }
        assert!(source.names().is_empty());
        assert_eq!(source.tensor("q_proj.bias", &[3]).unwrap().to_f32().len(), 3);
        assert!(source.tensor("empty.weight", &[0, 4]).unwrap().bytes().is_empty());
    }

    #[test]
    fn absurd_shapes_are_errors() {
        for shape in [&[usize::MAX, 2][..], &[1 << 20, 1 << 20]] {
            let error = DummySource::new(0).tensor("a.weight", shape).unwrap_err().to_string();
            assert!(error.contains("\"a.weight\"") && error.contains("too large"), "{error}");
        }
    }
}
