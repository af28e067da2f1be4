//! What a model will take on its device, added up before anything is loaded.

use std::fmt;

use crate::{
    Result,
    device::{Device, DeviceError, Tally},
    model::{KvCache, Limits, Model, ModelSpec, Scratch},
    parallel::ExpertLayout,
};

use super::LlmOptions;

/// Bytes by purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryPlan {
    /// Weights.
    pub weights: u64,
    /// Key/value cache.
    pub kv_cache: u64,
    /// Activations, logits and inputs of a step.
    pub scratch: u64,
    /// Experts that stay in the host's memory; no part of the device's.
    pub host: u64,
    /// What may be used, where that is known.
    pub available: Option<u64>,
}

/// Plans the device's memory; also how many cache blocks it has room for, the null block included.
///
/// # Errors
/// [`DeviceError::DoesNotFit`] if there is no room for one sequence of full length, and
/// [`DeviceError::TooLarge`] if a piece exceeds every binding.
pub(super) fn plan(
    options: &LlmOptions,
    spec: &ModelSpec,
    limits: &Limits,
    n_positions: usize,
    layout: &ExpertLayout,
    device: &Device,
) -> Result<(MemoryPlan, usize)> {
    let (precision, block_size) = (options.precision(), options.block_size);
    let tally = || Tally::new(device.caps());
    let (mut weights, mut kv_cache, mut scratch) = (tally(), tally(), tally());
    Model::tally(spec, precision, n_positions, layout, &mut weights)?;
    Scratch::alloc(&mut scratch, spec, limits, precision)?;
    let share = f64::from(options.gpu_memory_utilization.clamp(0.01, 1.0));
    let total = options
        .memory_limit
        .or_else(|| device.memory_bytes().map(|bytes| (bytes as f64 * share) as u64));
    let rest = total.map(|bytes| bytes.saturating_sub(weights.bytes + scratch.bytes));
    let block_bytes = KvCache::block_bytes(spec, block_size, precision.activations);
    let room = options.kv_cache_memory.or(rest).map(|bytes| bytes / block_bytes.max(1));
    let caps = device.caps();
    // Keys or values of one layer share a binding.
    let layer_bytes = (block_bytes / (2 * spec.layers.len().max(1) as u64)).max(1);
    let bound = caps.max_binding_bytes.min(caps.max_buffer_bytes) / layer_bytes;
    let most = usize::try_from(room.unwrap_or(u64::MAX).min(bound)).unwrap_or(usize::MAX);
    let (least, wanted) = (1 + limits.max_blocks, 1 + limits.max_blocks * limits.max_sequences);
    let n_blocks = wanted.min(most).max(least);
    KvCache::alloc(&mut kv_cache, spec, n_blocks, block_size, precision.activations)?;
    let plan = MemoryPlan {
        weights: weights.bytes,
        kv_cache: kv_cache.bytes,
        scratch: scratch.bytes,
        host: weights.host_bytes,
        available: match options.kv_cache_memory {
            // The caller's word counts, but the cache must hold one sequence.
            Some(bytes) => {
                Some(total.unwrap_or(u64::MAX).min(weights.bytes + scratch.bytes + bytes))
            }
            None => total,
        },
    };
    plan.check()?;
    Ok((plan, n_blocks))
}

impl MemoryPlan {
    /// All of the device's.
    pub fn total(&self) -> u64 {
        self.weights.saturating_add(self.kv_cache).saturating_add(self.scratch)
    }

    fn check(&self) -> Result<(), DeviceError> {
        match self.available {
            Some(available) if self.total() > available => {
                Err(DeviceError::DoesNotFit { plan: self.to_string() })
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
        write!(
            f,
            "{} (weights {}, KV cache {}, scratch {})",
            mib(self.total()),
            mib(self.weights),
            mib(self.kv_cache),
            mib(self.scratch)
        )?;
        self.available.map_or(Ok(()), |bytes| write!(f, " of {}", mib(bytes)))?;
        match self.host {
            0 => Ok(()),
            bytes => write!(f, "; experts in the host's memory {}", mib(bytes)),
        }
    }
}
