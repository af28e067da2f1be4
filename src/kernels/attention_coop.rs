//! Attention of tiles of successive tokens in cooperative matrices, and the choice between this
//! kernel and [`AttentionPrefill`].

use crate::device::{Caps, DType, Io, Kernel, Launch, Recording, Shader};

use super::{AttentionPrefill, attention_decode::AttentionParams, float_slot, gemm::Tile};

/// Workgroup memory that the shader takes, bytes.
const WORKGROUP_BYTES: u32 = 26_628;

/// [`AttentionPrefill`] in cooperative matrices: queries and the softmax's powers in f16, sums in
/// f32. Only where [`AttentionCoop::serves`].
#[derive(Debug, Clone, Copy)]
pub struct AttentionCoop(pub AttentionPrefill);

impl AttentionCoop {
    /// Whether the device and the shapes allow this kernel.
    pub fn serves(caps: &Caps, attention: &AttentionPrefill) -> bool {
        let AttentionPrefill { head_dim, k_cache, .. } = *attention;
        Tile::edge(caps) == Some(16)
            && caps.max_workgroup_bytes >= WORKGROUP_BYTES
            && k_cache.dtype == DType::F16
            && head_dim.is_multiple_of(16)
            && head_dim <= 128
    }
}

/// Pushes the attention of tiles by the better kernel.
pub fn attend_tiles(rec: &mut Recording, attention: AttentionPrefill) {
    if AttentionCoop::serves(rec.caps(), &attention) {
        rec.push(AttentionCoop(attention));
    } else {
        rec.push(attention);
    }
}

impl Kernel for AttentionCoop {
    const NAME: &'static str = "attention_coop";
    type Params = AttentionParams;

    fn launch(&self, caps: &Caps) -> Launch<AttentionParams> {
        let AttentionPrefill { n_heads, n_kv_heads, head_dim, block_size, out, .. } = self.0;
        // Heads of a workgroup share a key head.
        let heads = if (n_heads / n_kv_heads).is_multiple_of(2) { 2 } else { 1 };
        let launch = self.0.launch(caps);
        let [_, y, z] = launch.grid;
        Launch {
            shader: Shader::new(Self::NAME)
                .slot("out", float_slot(out.dtype, caps))
                .set("HEAD4", head_dim as u32 / 4)
                .set("HEADS", heads)
                .set("BLOCK_SIZE", block_size as u32),
            grid: [n_heads as u32 / heads, y, z],
            ..launch
        }
    }

    fn twin(p: &AttentionParams, io: &Io<'_>) {
        AttentionPrefill::twin(p, io);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::F16,
        kernels::{
            attention_decode::tests::{CASE, Case},
            attention_prefill::tests::push,
            testing::check_matrix,
        },
    };

    fn run(case: Case) {
        // Powers in f16 are off by up to 2^-11, as are queries.
        check_matrix(2e-6, |bench, rec| {
            let attention = push(bench, case);
            rec.push(AttentionCoop(attention));
        });
    }

    const COOP: Case = Case { cache: F16, ..CASE };

    #[test]
    fn widths_and_block_sizes() {
        for (i, head_dim) in (16..=128).step_by(16).enumerate() {
            run(Case { head_dim, block_size: [8, 16, 32][i % 3], ..COOP });
        }
    }

    #[test]
    fn groups_of_query_heads() {
        for heads in [(3, 3), (4, 2), (8, 2), (6, 2)] {
            run(Case { heads, out: F16, ..COOP });
        }
    }

    #[test]
    fn windows_and_growing_scores() {
        for window in [1, 2, 16, 100, 1000] {
            run(Case { window: Some(window), ..COOP });
        }
        run(Case { scale: 1.0, head_dim: 128, ..COOP });
    }
}
