//! What an adapter can do. Kernels pick their shader variants from these facts at run time, and
//! tests shrink them to run every tier that the adapter has.

use std::{fmt, sync::Arc};

use super::{DType, DeviceError, Tuned};

/// Capability tiers, each a superset that only adds speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tier {
    /// WebGPU core: no f16, no subgroups, 8 storage buffers, 128 MiB bindings.
    Portable,
    /// shader-f16, subgroups of any size from 4 to 128, integer dot product.
    Fast,
    /// Cooperative matrices of f16 with f32 accumulation.
    Matrix,
}

impl fmt::Display for Tier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Tier::Portable => "portable",
            Tier::Fast => "fast",
            Tier::Matrix => "matrix",
        })
    }
}

/// Capabilities and limits of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caps {
    /// The WGSL extension `f16`.
    pub f16: bool,
    /// Smallest and largest subgroup size, if subgroup operations exist.
    pub subgroups: Option<(u32, u32)>,
    /// Edge of the square cooperative matrix (f16 operands, f32 result), if any: 16 or 8.
    pub coop_matrix: Option<u32>,
    /// Largest storage binding, bytes.
    pub max_binding_bytes: u64,
    /// Largest buffer, bytes.
    pub max_buffer_bytes: u64,
    /// Workgroup memory, bytes.
    pub max_workgroup_bytes: u32,
    /// Invocations per workgroup.
    pub max_invocations: u32,
    /// Workgroups per grid dimension.
    pub max_grid: u32,
    /// Offsets of storage bindings are multiples of this many bytes.
    pub offset_alignment: u32,
    /// GPU timestamps around a pass.
    pub timestamps: bool,
    /// A storage barrier orders accesses for workgroups of the whole device, as translations to
    /// Vulkan and DirectX do; WebGPU promises it within a workgroup only.
    pub ordered_groups: bool,
    /// The adapter runs on the CPU (lavapipe, SwiftShader, the twins).
    pub software: bool,
    /// The kernels' twins compute. They fuse nothing that rounds differently when fused, so that
    /// results do not depend on the size of a step.
    pub twins: bool,
    /// What was measured on this adapter before.
    pub tuned: Arc<Tuned>,
}

impl Caps {
    /// What every WebGPU implementation guarantees.
    pub fn portable() -> Self {
        Self {
            f16: false,
            subgroups: None,
            coop_matrix: None,
            max_binding_bytes: 128 << 20,
            max_buffer_bytes: 256 << 20,
            max_workgroup_bytes: 16 << 10,
            max_invocations: 256,
            max_grid: 65_535,
            offset_alignment: 256,
            timestamps: false,
            ordered_groups: false,
            software: false,
            twins: false,
            tuned: Arc::default(),
        }
    }

    /// The highest tier whose every feature is here.
    pub fn tier(&self) -> Tier {
        match (self.f16, self.subgroups, self.coop_matrix) {
            (true, Some(_), Some(_)) => Tier::Matrix,
            (true, Some(_), None) => Tier::Fast,
            _ => Tier::Portable,
        }
    }

    /// The same device without what lies above `tier`; limits drop too for [`Tier::Portable`].
    pub fn shrink(&self, tier: Tier) -> Self {
        let mut caps = self.clone();
        if tier < Tier::Matrix {
            caps.coop_matrix = None;
        }
        if tier < Tier::Fast {
            let core = Self::portable();
            caps.f16 = false;
            caps.subgroups = None;
            caps.ordered_groups = false;
            caps.max_binding_bytes = caps.max_binding_bytes.min(core.max_binding_bytes);
            caps.max_buffer_bytes = caps.max_buffer_bytes.min(core.max_buffer_bytes);
            caps.max_workgroup_bytes = caps.max_workgroup_bytes.min(core.max_workgroup_bytes);
            caps.max_invocations = caps.max_invocations.min(core.max_invocations);
        }
        caps
    }

    /// Bytes of the buffer for a tensor, whole vec4s and at least one, if a binding can hold it.
    pub(super) fn check_size(
        &self,
        what: &str,
        shape: &[usize],
        dtype: DType,
    ) -> Result<u64, DeviceError> {
        let limit = self.max_binding_bytes.min(self.max_buffer_bytes);
        let bytes = shape
            .iter()
            .try_fold(dtype.bytes(), |bytes, &n| bytes.checked_mul(n as u64))
            .unwrap_or(u64::MAX);
        if bytes > limit {
            return Err(DeviceError::TooLarge { what: what.into(), bytes, limit });
        }
        Ok(bytes.max(1).checked_next_multiple_of(16).unwrap_or(bytes))
    }

    /// Every tier from portable up to this device's own.
    pub fn tiers(&self) -> Vec<Tier> {
        [Tier::Portable, Tier::Fast, Tier::Matrix]
            .into_iter()
            .filter(|&tier| tier <= self.tier())
            .collect()
    }
}
