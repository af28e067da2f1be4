//! Query and key normalisation, rotary embedding (Su et al. 2021) and the write of keys and values
//! into the paged cache (vLLM's `reshape_and_cache`) in one kernel. It knows a table of angles, not
//! where they come from.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{float_slot, grid_2d, has_subgroup_sums, sum_lanes};

/// Whether queries and keys are normalised to a root mean square of one, and over what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Over each head.
    PerHead,
    /// Over all heads of the projection together (OLMoE).
    Full,
}

/// Splits rows of a fused projection into q, k and v; normalises and rotates q and k; stores q, and
/// writes k and v at the tokens' slots of the cache. Rows of padding tokens are left untouched.
#[derive(Debug, Clone, Copy)]
pub struct RopeKvWrite {
    /// F32 `[n, >= (n_heads + 2 * n_kv_heads) * head_dim]`: heads of q, then of k, then of v
    pub qkv: Tensor,
    /// F32, q weights then k weights: `[2 * head_dim]` per head, `[(n_heads + n_kv_heads) *
    /// head_dim]` over the whole projection; absent if there is no normalisation
    pub norm: Option<Tensor>,
    /// F32 `[n_positions, rotary_dim]`: cosines of the `rotary_dim / 2` pairs, then their sines.
    /// Later positions take the last row.
    pub table: Tensor,
    /// U32 `[n, 4]`: position, slot, sequence, 0; slot `u32::MAX` marks padding
    pub tokens: Tensor,
    /// F32 `[n, padded(n_heads * head_dim)]`
    pub q: Tensor,
    /// F32 or F16 `[n_blocks, n_kv_heads, block_size, head_dim]`
    pub k_cache: Tensor,
    /// As `k_cache`, in another buffer.
    pub v_cache: Tensor,
    /// Query heads.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head with padding: a multiple of 4, at most 256.
    pub head_dim: usize,
    /// Width of a head without padding, over which the mean is taken.
    pub norm_dim: usize,
    /// Leading elements of a head that rotate; even.
    pub rotary_dim: usize,
    /// Rotates neighbours `(2i, 2i + 1)` (DeepSeek) instead of halves `(i, i + rotary_dim / 2)`.
    pub interleaved: bool,
    /// Normalisation of q and k before the rotation.
    pub qk_norm: QkNorm,
    /// Added to the mean square.
    pub eps: f32,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct RopeKvWriteParams {
        n_tokens: u32,
        n_heads: u32,
        n_kv_heads: u32,
        qkv_stride4: u32,
        q_stride4: u32,
        n_slots: u32,
        block_size: u32,
        n_positions: u32,
        rotary_dim: u32,
        norm_dim: u32,
        grid_y: u32,
        eps: f32,
    }
}

impl Kernel for RopeKvWrite {
    const NAME: &'static str = "rope_kv_write";
    type Params = RopeKvWriteParams;

    fn launch(&self, caps: &Caps) -> Launch<RopeKvWriteParams> {
        let head4 = self.head_dim as u32 / 4;
        let lanes = head4.next_power_of_two();
        let n_tokens = self.tokens.rows() as u32;
        let (grid_y, grid_z) = grid_2d(n_tokens, caps);
        let [n_blocks, _, block_size, _] = self.k_cache.shape;
        let n_heads = (self.n_heads + 2 * self.n_kv_heads) as u32;
        let most = if has_subgroup_sums(caps) && !caps.software { lanes.min(32) } else { 1 };
        let (shader, sublanes) = sum_lanes(Shader::new(Self::NAME), caps, most);
        Launch {
            shader: shader
                .set("SUBLANES", sublanes)
                .slot("out", float_slot(self.k_cache.dtype, caps))
                .set("HEAD4", head4)
                .set("LANES", lanes)
                .set("QK_NORM", self.qk_norm as u32)
                .set("INTERLEAVED", self.interleaved),
            params: RopeKvWriteParams {
                n_tokens,
                n_heads: self.n_heads as u32,
                n_kv_heads: self.n_kv_heads as u32,
                qkv_stride4: self.qkv.cols() as u32 / 4,
                q_stride4: self.q.cols() as u32 / 4,
                n_slots: (n_blocks * block_size) as u32,
                block_size: block_size as u32,
                n_positions: self.table.rows() as u32,
                rotary_dim: self.rotary_dim as u32,
                norm_dim: self.norm_dim as u32,
                grid_y,
                eps: self.eps,
            },
            bindings: vec![
                Binding::read(self.qkv),
                Binding::read(self.norm.unwrap_or(self.table)),
                Binding::read(self.table),
                Binding::read(self.tokens),
                Binding::write(self.q),
                Binding::write(self.k_cache),
                Binding::write(self.v_cache),
            ],
            grid: [n_heads.div_ceil(64 / lanes), grid_y, grid_z],
        }
    }

    fn twin(p: &RopeKvWriteParams, io: &Io<'_>) {
        p.turn(io, &io.read(3), [5, 6], |at, q| io.store(4, at, q));
    }
}

impl RopeKvWriteParams {
    /// The twin, with tokens and the bindings of the caches; hands on the rows of q, each with the
    /// index of its first element.
    pub(super) fn turn(
        &self,
        io: &Io<'_>,
        tokens: &[[u32; 4]],
        [k_cache, v_cache]: [usize; 2],
        mut store_q: impl FnMut(usize, &[f32]),
    ) {
        let option = |name| io.shader.override_value(name).unwrap_or(0);
        let (p, interleaved) = (self, option("INTERLEAVED") == 1);
        let (qkv, norm, table) = (io.read::<f32>(0), io.read::<f32>(1), io.read::<f32>(2));
        let dim = option("HEAD4") as usize * 4;
        let (n_heads, n_kv) = (p.n_heads as usize, p.n_kv_heads as usize);
        let (q_dim, k_dim) = (n_heads * dim, n_kv * dim);
        let rotary = p.rotary_dim as usize;
        for (token, &[position, slot, ..]) in tokens.iter().enumerate().take(p.n_tokens as usize) {
            if slot >= p.n_slots {
                continue;
            }
            let row = &qkv[token * p.qkv_stride4 as usize * 4..][..q_dim + 2 * k_dim];
            let mut row: Vec<f64> = row.iter().map(|&x| x.into()).collect();
            let (q, kv) = row.split_at_mut(q_dim);
            let (k, v) = kv.split_at_mut(k_dim);
            let (eps, norm_dim) = (f64::from(p.eps), p.norm_dim as usize);
            match option("QK_NORM") {
                1 => {
                    let (q_norm, k_norm) = norm[..2 * dim].split_at(dim);
                    q.chunks_mut(dim).for_each(|q| normalise(q, q_norm, norm_dim, eps));
                    k.chunks_mut(dim).for_each(|k| normalise(k, k_norm, norm_dim, eps));
                }
                2 => {
                    normalise(q, &norm[..q_dim], n_heads * norm_dim, eps);
                    normalise(k, &norm[q_dim..][..k_dim], n_kv * norm_dim, eps);
                }
                _ => {}
            }
            let angles = &table[position.min(p.n_positions - 1) as usize * rotary..][..rotary];
            for head in q.chunks_mut(dim).chain(k.chunks_mut(dim)) {
                rotate(&mut head[..rotary], angles, interleaved);
            }
            let narrow = |x: &[f64]| -> Vec<f32> { x.iter().map(|&x| x as f32).collect() };
            let q_stride = p.q_stride4 as usize * 4;
            let mut q = narrow(q);
            q.resize(q_stride, 0.0);
            store_q(token * q_stride, &q);
            let block_size = p.block_size as usize;
            let (block, offset) = (slot as usize / block_size, slot as usize % block_size);
            for (kv_head, (k, v)) in k.chunks(dim).zip(v.chunks(dim)).enumerate() {
                let at = ((block * n_kv + kv_head) * block_size + offset) * dim;
                io.store(k_cache, at, &narrow(k));
                io.store(v_cache, at, &narrow(v));
            }
        }
    }
}

/// `x = x / sqrt(sum(x^2) / n + eps) * weight`
fn normalise(x: &mut [f64], weight: &[f32], n: usize, eps: f64) {
    let squares: f64 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / n as f64 + eps).sqrt();
    x.iter_mut().zip(weight).for_each(|(x, &w)| *x *= scale * f64::from(w));
}

/// Rotates the pairs of `x` by `angles`, cosines then sines.
fn rotate(x: &mut [f64], angles: &[f32], interleaved: bool) {
    let n_pairs = x.len() / 2;
    for pair in 0..n_pairs {
        let (i, j) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + n_pairs) };
        let (cos, sin) = (f64::from(angles[pair]), f64::from(angles[n_pairs + pair]));
        (x[i], x[j]) = (x[i] * cos - x[j] * sin, x[j] * cos + x[i] * sin);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::{self, F16, F32, U32},
        kernels::testing::check,
        weights::padded,
    };

    /// Heads, widths and options of a test.
    #[derive(Clone, Copy)]
    struct Case {
        heads: (usize, usize),
        /// Padded, true, rotating.
        dims: (usize, usize, usize),
        interleaved: bool,
        qk_norm: QkNorm,
        block_size: usize,
        dtype: DType,
    }

    const CASE: Case = Case {
        heads: (4, 2),
        dims: (16, 16, 16),
        interleaved: false,
        qk_norm: QkNorm::None,
        block_size: 8,
        dtype: F32,
    };

    fn run(case: Case) {
        // f16 caches differ by a rounding step of 2^-11, hence the wider bound.
        check(if case.dtype == F16 { 1e-6 } else { 1e-7 }, |bench, rec| {
            let ((n_heads, n_kv_heads), (head_dim, norm_dim, rotary_dim)) = (case.heads, case.dims);
            // As a caller pads heads: weights of the padding are zero.
            let in_head = |i: usize| i % head_dim < norm_dim;
            let n_qkv = (n_heads + 2 * n_kv_heads) * head_dim;
            let stride = padded(n_qkv);
            // The position beyond the table takes its last row; one token is padding.
            let tokens = [[0, 3], [299, 17], [5, u32::MAX], [7, 40], [300, 2], [17, 39]];
            let qkv = bench.floats(&[tokens.len(), stride], F32, |bench, i| {
                let live = i % stride < n_qkv && in_head(i % stride);
                if live { bench.value() } else { 0.0 }
            });
            let n_norm = match case.qk_norm {
                QkNorm::None => None,
                QkNorm::PerHead => Some(2 * head_dim),
                QkNorm::Full => Some((n_heads + n_kv_heads) * head_dim),
            };
            let norm = n_norm.map(|n| {
                bench.floats(&[n], F32, |bench, i| if in_head(i) { bench.value() } else { 0.0 })
            });
            let table =
                bench.floats(&[300, rotary_dim], F32, |bench, _| bench.uniform() * 2.0 - 1.0);
            let tokens: Vec<u32> = tokens.iter().flat_map(|&[at, slot]| [at, slot, 0, 0]).collect();
            let tokens = bench.ints(&[tokens.len() / 4, 4], U32, &tokens);
            let q = bench.normal(&[tokens.rows(), padded(n_heads * head_dim)], F32);
            let n_blocks = 48 / case.block_size;
            let cache = [n_blocks, n_kv_heads, case.block_size, head_dim];
            rec.push(RopeKvWrite {
                qkv,
                norm,
                table,
                tokens,
                q,
                k_cache: bench.normal(&cache, case.dtype),
                v_cache: bench.normal(&cache, case.dtype),
                n_heads,
                n_kv_heads,
                head_dim,
                norm_dim,
                rotary_dim,
                interleaved: case.interleaved,
                qk_norm: case.qk_norm,
                // Large, so that a wrong one shows.
                eps: 0.5,
            });
        });
    }

    #[test]
    fn widths_and_caches() {
        let widths = [(16, 16, 16), (20, 18, 18), (24, 24, 12), (64, 64, 64), (128, 128, 64)];
        let extremes = [(4, 2, 2), (8, 6, 4), (256, 256, 256)];
        for dims in widths.into_iter().chain(extremes) {
            for (block_size, dtype) in [(8, F32), (16, F16)] {
                run(Case { dims, block_size, dtype, ..CASE });
            }
        }
    }

    #[test]
    fn normalisation_and_pairs() {
        for qk_norm in [QkNorm::None, QkNorm::PerHead, QkNorm::Full] {
            for interleaved in [false, true] {
                for (heads, dims) in [((3, 1), (20, 18, 10)), ((16, 16), (128, 128, 128))] {
                    run(Case { heads, dims, interleaved, qk_norm, ..CASE });
                }
            }
        }
    }

    #[test]
    fn twin_rotates_by_the_angle() {
        // A quarter turn maps (1, 0) to (0, 1) and (0, 1) to (-1, 0).
        let quarter = [0.0, 0.0, 1.0, 1.0];
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut x, &quarter, false);
        assert_eq!(x, [-3.0, -4.0, 1.0, 2.0]);
        let mut x = [1.0, 2.0, 3.0, 4.0];
        rotate(&mut x, &quarter, true);
        assert_eq!(x, [-2.0, 1.0, -4.0, 3.0]);
        let mut x = [3.0, 4.0];
        normalise(&mut x, &[2.0, 1.0], 2, 12.5);
        assert!((x[0] - 1.2).abs() < 1e-12 && (x[1] - 0.8).abs() < 1e-12, "{x:?}");
    }
}
