//! Layer 2: one `.rs` per shader, with the same stem: the launch, its parameters, its CPU twin and
//! their parity test. Kernels know tensors and numbers, not sequences or models.

mod align_experts;
mod attention_coop;
mod attention_decode;
mod attention_prefill;
mod cache_experts;
mod combine_experts;
mod copy;
mod count_experts;
mod embed;
mod expert_gemm;
mod expert_gemv;
mod fetch_experts;
mod gemm;
mod gemv;
mod grouped_topk;
mod logprobs;
mod map_experts;
mod matrix;
mod quantize_rows;
mod rms_norm;
mod rope_attention;
mod rope_kv_write;
mod route;
mod sample;
mod silu_mul;

#[cfg(test)]
mod testing;

pub use align_experts::{AlignExperts, AlignPhase, AlignShape, Aligned, align_experts};
pub use attention_coop::{AttentionCoop, attend_tiles};
pub use attention_decode::{AttentionDecode, AttentionParts};
pub use attention_prefill::{AttentionPrefill, TILE as PREFILL_TILE};
pub use cache_experts::CacheExperts;
pub use combine_experts::CombineExperts;
pub use copy::Copy;
pub use count_experts::CountExperts;
pub use embed::Embed;
pub use expert_gemm::ExpertGemm;
pub use expert_gemv::{ExpertGemv, ExpertMode};
pub use fetch_experts::FetchExperts;
pub use gemm::{GEMV_TOKENS, Gemm, product};
pub use gemv::Gemv;
pub(crate) use grouped_topk::MAX_GROUPS;
pub use grouped_topk::{GroupedTopk, Routing, Scoring};
pub use logprobs::Logprobs;
pub use map_experts::MapExperts;
pub use matrix::{Matrix, Store};
pub use quantize_rows::QuantizeRows;
pub use rms_norm::{Norm, RmsNorm};
pub use rope_attention::{RopeAttention, attend_next};
pub use rope_kv_write::{QkNorm, RopeKvWrite};
pub use route::Route;
pub use sample::{Sample, SampleStage, SamplingRow, sample};
pub use silu_mul::SiluMul;

use crate::device::{Caps, DType, Shader};

/// The include that reads or writes floats of `dtype` on a device with `caps`.
fn float_slot(dtype: DType, caps: &Caps) -> &'static str {
    match dtype {
        DType::F16 if caps.f16 => "f16",
        DType::F16 => "f16_packed",
        _ => "f32",
    }
}

/// Threads that reduce together without barriers, at most `most`: a power of two.
/// Fills the slot `sum` and tells the number of lanes.
fn sum_lanes(shader: Shader, caps: &Caps, most: u32) -> (Shader, u32) {
    match caps.subgroups {
        Some((min, _)) if has_subgroup_sums(caps) => {
            (shader.slot("sum", "subgroup"), min.min(most))
        }
        _ => (shader.slot("sum", "workgroup"), most.min(8)),
    }
}

/// Whether subgroups are there and large enough to sum in.
fn has_subgroup_sums(caps: &Caps) -> bool {
    caps.subgroups.is_some_and(|(min, _)| min >= 8)
}

/// Splits `n` workgroups over x and y of a grid, since one dimension may be too short.
/// Returns (x, y) with few groups to spare; the workgroup's index is `group.x + group.y * x`.
fn grid_2d(n: u32, caps: &Caps) -> (u32, u32) {
    let y = n.div_ceil(caps.max_grid);
    (if y == 0 { 0 } else { n.div_ceil(y) }, y)
}
