//! Attention of single tokens over the paged cache, and the reference that both attention kernels'
//! twins run. It knows slots and block tables, not what a sequence is.

use std::ops::Range;

use bytemuck::Pod;
use half::f16;
use rayon::prelude::*;

use crate::device::{
    Allocate, Binding, Caps, DType, DeviceError, Io, Kernel, Launch, Shader, Tensor, params,
};

use super::{float_slot, grid_2d, has_subgroup_sums, sum_lanes};

/// `out = softmax(q k^T * scale) v` for each token, over the positions of its sequence up to its
/// own: paged (Kwon et al. 2023), grouped-query (Ainslie et al. 2023) attention.
#[derive(Debug, Clone, Copy)]
pub struct AttentionDecode {
    /// F32 `[n, padded(n_heads * head_dim)]`
    pub q: Tensor,
    /// F32 or F16 `[n_blocks, n_kv_heads, block_size, head_dim]`
    pub k_cache: Tensor,
    /// As `k_cache`.
    pub v_cache: Tensor,
    /// U32 `[n, 4]`: position, slot, sequence, 0; slot `u32::MAX` marks padding
    pub tokens: Tensor,
    /// U32 `[n_sequences, max_blocks]`: blocks of a sequence's successive positions
    pub block_tables: Tensor,
    /// F32 or F16 `[n, padded(n_heads * head_dim)]`; zero for padding tokens
    pub out: Tensor,
    /// Room for workgroups that share a context.
    pub parts: AttentionParts,
    /// Query heads, a multiple of `n_kv_heads`.
    pub n_heads: usize,
    /// Key and value heads.
    pub n_kv_heads: usize,
    /// Width of a head: a multiple of 4, at most 256.
    pub head_dim: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// Factor of the scores before the softmax.
    pub scale: f32,
    /// Latest positions that a token sees, itself included; all of them if absent.
    pub window: Option<usize>,
}

params! {
    /// Mirror of the WGSL `Params` of both attention kernels.
    pub struct AttentionParams {
        n_items: u32,
        n_heads: u32,
        n_kv_heads: u32,
        block_size: u32,
        max_blocks: u32,
        q_stride4: u32,
        out_stride4: u32,
        window: u32,
        grid_y: u32,
        scale: f32,
    }
}

/// Positions that a workgroup takes at once.
const TILE: usize = 128;
/// Threads that share a row of keys, where they can add up without a barrier: a power of two.
const KEY_LANES: u32 = 8;
/// Workgroups that keep a large GPU busy.
const ENOUGH: usize = 128;
/// Workgroups that share a context, at most.
const MOST_PARTS: usize = 16;

/// Query heads of a workgroup, and workgroups that share a context.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Split {
    heads: usize,
    parts: usize,
}

/// Memory through which workgroups that share a context pass on what they have found. U32: how many
/// parts of each token's groups of heads are done, zero between launches, then of each group and
/// part values, largest score and sum of each head.
#[derive(Debug, Clone, Copy)]
pub struct AttentionParts(pub(super) Tensor);

impl AttentionParts {
    /// Room for any launch of this many heads.
    ///
    /// # Errors
    /// [`DeviceError`] where it does not fit.
    pub fn alloc(
        device: &mut dyn Allocate,
        n_heads: usize,
        n_kv_heads: usize,
        head_dim: usize,
    ) -> Result<Self, DeviceError> {
        let heads = (n_heads / n_kv_heads).next_power_of_two().min(8);
        let words = ENOUGH / 2 + ENOUGH * heads * (head_dim + 2);
        Ok(Self(device.alloc("attention parts", &[words], DType::U32)?))
    }
}

impl AttentionDecode {
    /// Fewer heads a workgroup where there are few tokens, then several workgroups a context.
    fn split(&self, caps: &Caps) -> Split {
        let share = self.n_heads / self.n_kv_heads;
        let lanes = (self.head_dim / 4).next_power_of_two().max(4);
        let mut heads = share.next_power_of_two().min(8).min(256 / lanes);
        if caps.software {
            return Split { heads, parts: 1 };
        }
        let groups = |heads| self.tokens.rows() * self.n_kv_heads * share.div_ceil(heads);
        while heads > 1 && groups(heads) < 16 {
            heads /= 2;
        }
        let n_tiles = (self.block_tables.cols() * self.block_size).div_ceil(TILE);
        let parts = (ENOUGH / groups(heads).max(1)).min(n_tiles).min(MOST_PARTS);
        Split { heads, parts: if caps.ordered_groups { parts.max(1) } else { 1 } }
    }

    /// What `include/attend_token.wgsl` takes, and the workgroups of a token.
    pub(super) fn share(&self, shader: Shader, caps: &Caps) -> (Shader, u32) {
        let head4 = self.head_dim as u32 / 4;
        // At least 4: the shader takes four strides of positions at once.
        let lanes = head4.next_power_of_two().max(4);
        let Split { heads, parts } = self.split(caps);
        // A CPU that plays GPU runs threads one after another, and most have nothing to do.
        let threads = if caps.software { lanes.max(32) } else { TILE as u32 };
        let alone = caps.software || !has_subgroup_sums(caps) || !head4.is_multiple_of(KEY_LANES);
        let (shader, sublanes) = sum_lanes(shader, caps, lanes.min(threads / heads as u32).min(32));
        let shader = shader
            .slot("act", float_slot(self.k_cache.dtype, caps))
            .slot("out", float_slot(self.out.dtype, caps))
            .set("THREADS", threads)
            .set("SUBLANES", sublanes)
            .set("KEY_LANES", if alone { 1 } else { sublanes.min(KEY_LANES) })
            .set("HEAD4", head4)
            .set("LANES", lanes)
            .set("HEADS", heads as u32)
            .set("PARTS", parts as u32);
        let n_groups = self.n_kv_heads * (self.n_heads / self.n_kv_heads).div_ceil(heads);
        (shader, (n_groups * parts) as u32)
    }
}

impl Kernel for AttentionDecode {
    const NAME: &'static str = "attention_decode";
    type Params = AttentionParams;

    fn launch(&self, caps: &Caps) -> Launch<AttentionParams> {
        let n_tokens = self.tokens.rows() as u32;
        let (grid_y, grid_z) = grid_2d(n_tokens, caps);
        let (shader, n_groups) = self.share(Shader::new(Self::NAME), caps);
        Launch {
            shader,
            params: AttentionParams {
                n_items: n_tokens,
                n_heads: self.n_heads as u32,
                n_kv_heads: self.n_kv_heads as u32,
                block_size: self.block_size as u32,
                max_blocks: self.block_tables.cols() as u32,
                q_stride4: self.q.cols() as u32 / 4,
                out_stride4: self.out.cols() as u32 / 4,
                window: self.window.map_or(u32::MAX, |window| window as u32),
                grid_y,
                scale: self.scale,
            },
            bindings: vec![
                Binding::read(self.q),
                Binding::read(self.k_cache),
                Binding::read(self.v_cache),
                Binding::read(self.tokens),
                Binding::read(self.block_tables),
                Binding::write(self.out),
                Binding::write(self.parts.0),
            ],
            grid: [n_groups, grid_y, grid_z],
        }
    }

    fn twin(p: &AttentionParams, io: &Io<'_>) {
        p.attend_tokens(io, &io.read(3), [1, 2, 5], &io.read(0), &io.read(4));
    }
}

/// A token that attends, for the twins.
pub(super) struct Query {
    /// Of `q` and `out`.
    pub(super) row: usize,
    /// Row of the block tables.
    pub(super) sequence: usize,
    pub(super) position: u32,
}

impl AttentionParams {
    /// The twin for single tokens, with the bindings of keys, values and output.
    pub(super) fn attend_tokens(
        &self,
        io: &Io<'_>,
        tokens: &[[u32; 4]],
        at: [usize; 3],
        q: &[f32],
        tables: &[u32],
    ) {
        let mut queries = Vec::new();
        let tokens = tokens[..self.n_items as usize].iter().enumerate();
        for (row, &[position, slot, sequence, _]) in tokens {
            if slot == u32::MAX {
                let stride = self.out_stride4 as usize * 4;
                io.store(at[2], row * stride, &vec![0.0; stride]);
            } else {
                queries.push(Query { row, sequence: sequence as usize, position });
            }
        }
        self.attend_in(io, at, q, tables, &queries);
    }

    /// The twin of the kernels whose bindings differ only in what names the queries.
    pub(super) fn attend(&self, io: &Io<'_>, queries: &[Query]) {
        self.attend_in(io, [1, 2, 5], &io.read(0), &io.read(4), queries);
    }

    fn attend_in(&self, io: &Io<'_>, at: [usize; 3], q: &[f32], tables: &[u32], queries: &[Query]) {
        match io.tensor(at[0]).dtype {
            DType::F16 => self.attend_as::<f16>(io, at, q, tables, queries),
            _ => self.attend_as::<f32>(io, at, q, tables, queries),
        }
    }

    fn attend_as<T: Pod + Into<f64> + Sync>(
        &self,
        io: &Io<'_>,
        [k, v, out]: [usize; 3],
        q: &[f32],
        block_tables: &[u32],
        queries: &[Query],
    ) {
        let (k, v) = (io.read::<T>(k), io.read::<T>(v));
        let head_dim = io.shader.override_value("HEAD4").unwrap_or(0) as usize * 4;
        let cache = Paged { p: self, k: &k, v: &v, block_tables, head_dim };
        let stride = self.q_stride4 as usize * 4;
        let outs: Vec<Vec<f32>> = queries
            .par_iter()
            .map(|query| {
                let q = q[query.row * stride..][..stride].chunks_exact(head_dim);
                let heads = q.take(self.n_heads as usize).enumerate();
                heads.flat_map(|(head, q)| cache.attend(q, head, query)).collect()
            })
            .collect();
        let stride = self.out_stride4 as usize * 4;
        for (query, mut y) in queries.iter().zip(outs) {
            y.resize(stride, 0.0);
            io.store(out, query.row * stride, &y);
        }
    }
}

/// The paged cache, `k` and `v` being `[n_blocks, n_kv_heads, block_size, head_dim]`.
struct Paged<'a, T> {
    p: &'a AttentionParams,
    k: &'a [T],
    v: &'a [T],
    block_tables: &'a [u32],
    head_dim: usize,
}

impl<T: Pod + Into<f64>> Paged<'_, T> {
    /// A head's row at a position.
    fn row(&self, sequence: usize, kv_head: usize, position: u32) -> Range<usize> {
        let (block_size, max_blocks) = (self.p.block_size as usize, self.p.max_blocks as usize);
        let (index, offset) = (position as usize / block_size, position as usize % block_size);
        let block = self.block_tables[sequence * max_blocks + index] as usize;
        let row = (block * self.p.n_kv_heads as usize + kv_head) * block_size + offset;
        row * self.head_dim..(row + 1) * self.head_dim
    }

    /// One head of one token. `q` and result `[head_dim]`
    fn attend(&self, q: &[f32], head: usize, query: &Query) -> Vec<f32> {
        let kv_head = head / (self.p.n_heads / self.p.n_kv_heads) as usize;
        let end = query.position + 1;
        let positions = end.saturating_sub(self.p.window)..end;
        let rows: Vec<Range<usize>> =
            positions.map(|position| self.row(query.sequence, kv_head, position)).collect();
        let score = |row: &Range<usize>| {
            let terms = q.iter().zip(&self.k[row.clone()]);
            terms.map(|(&q, &k)| f64::from(q) * k.into()).sum::<f64>() * f64::from(self.p.scale)
        };
        let scores: Vec<f64> = rows.iter().map(score).collect();
        let peak = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut out) = (0.0, vec![0.0; self.head_dim]);
        for (score, row) in scores.into_iter().zip(rows) {
            let prob = (score - peak).exp();
            sum += prob;
            out.iter_mut().zip(&self.v[row]).for_each(|(y, &v)| *y += prob * v.into());
        }
        out.iter().map(|y| (y / sum) as f32).collect()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        device::DType::{F16, F32, U32},
        kernels::testing::{Bench, check},
        weights::padded,
    };

    /// What a test of either kernel varies.
    #[derive(Clone, Copy)]
    pub(in crate::kernels) struct Case {
        /// Query heads, and key/value heads.
        pub(in crate::kernels) heads: (usize, usize),
        pub(in crate::kernels) head_dim: usize,
        pub(in crate::kernels) block_size: usize,
        pub(in crate::kernels) cache: DType,
        pub(in crate::kernels) out: DType,
        pub(in crate::kernels) scale: f32,
        pub(in crate::kernels) window: Option<usize>,
    }

    pub(in crate::kernels) const CASE: Case = Case {
        heads: (4, 2),
        head_dim: 32,
        block_size: 16,
        cache: F32,
        out: F32,
        scale: 0.2,
        window: None,
    };

    /// A cache that holds `lengths[s]` positions of sequence s in scattered blocks, and NaN
    /// wherever no kernel may look. Returns the keys, the values and the block tables.
    pub(in crate::kernels) fn caches(
        bench: &mut Bench,
        case: Case,
        lengths: &[usize],
    ) -> (Tensor, Tensor, Tensor) {
        let Case { heads: (_, n_kv_heads), head_dim, block_size, .. } = case;
        let blocks_of = |length: usize| length.div_ceil(block_size);
        let n_blocks = 1 + lengths.iter().map(|&n| blocks_of(n)).sum::<usize>();
        let max_blocks = lengths.iter().map(|&n| blocks_of(n)).max().unwrap();
        let mut free: Vec<u32> = (0..n_blocks as u32).collect();
        let mut tables = vec![0; lengths.len() * max_blocks];
        let mut live = vec![false; n_blocks * block_size];
        for (row, &length) in tables.chunks_mut(max_blocks).zip(lengths) {
            for (i, entry) in row[..blocks_of(length)].iter_mut().enumerate() {
                *entry = free.swap_remove((bench.uniform() * free.len() as f32) as usize);
                let live = &mut live[*entry as usize * block_size..][..block_size];
                let n = block_size.min(length - i * block_size);
                live[..n].fill(true);
            }
        }
        let shape = [n_blocks, n_kv_heads, block_size, head_dim];
        let mut cache = || {
            bench.floats(&shape, case.cache, |bench, i| {
                let slot = i / head_dim / (n_kv_heads * block_size) * block_size
                    + i / head_dim % block_size;
                if live[slot] { bench.value() } else { f32::NAN }
            })
        };
        let (k, v) = (cache(), cache());
        (k, v, bench.ints(&[lengths.len(), max_blocks], U32, &tables))
    }

    /// The bound for a case: f16 outputs differ by a rounding step of 2^-11.
    pub(in crate::kernels) fn tolerance(case: Case) -> f64 {
        if case.out == F16 { 1e-6 } else { 1e-7 }
    }

    fn run(case: Case) {
        let tokens = [
            [300, 0, 0, 0],
            [17, 0, 1, 0],
            [9999, u32::MAX, 9999, 0],
            [15, 0, 2, 0],
            [0, 0, 0, 0],
            [16, 0, 0, 0],
            [1, 0, 1, 0],
            [127, 0, 0, 0],
            [128, 0, 0, 0],
        ];
        run_tokens(case, &[301, 18, 16], &tokens);
    }

    fn run_tokens(case: Case, lengths: &[usize], tokens: &[[u32; 4]]) {
        check(tolerance(case), |bench, rec| {
            let (k_cache, v_cache, block_tables) = caches(bench, case, lengths);
            let tokens = bench.ints(&[tokens.len(), 4], U32, &tokens.concat());
            let (n_heads, n_kv_heads) = case.heads;
            let q = bench.activations(tokens.rows(), n_heads * case.head_dim, F32);
            let out = bench.normal(&[tokens.rows(), padded(n_heads * case.head_dim)], case.out);
            // Not compared: the twin needs no room.
            let parts =
                AttentionParts::alloc(&mut bench.device, n_heads, n_kv_heads, case.head_dim)
                    .unwrap();
            rec.push(AttentionDecode {
                q,
                k_cache,
                v_cache,
                tokens,
                block_tables,
                out,
                parts,
                n_heads,
                n_kv_heads,
                head_dim: case.head_dim,
                block_size: case.block_size,
                scale: case.scale,
                window: case.window,
            });
        });
    }

    #[test]
    fn widths_and_block_sizes() {
        for (i, head_dim) in [4, 8, 12, 16, 20, 24, 32, 64, 128, 256].into_iter().enumerate() {
            run(Case { head_dim, block_size: [8, 16, 32][i % 3], ..CASE });
        }
    }

    #[test]
    fn groups_of_query_heads() {
        for heads in [(3, 3), (8, 4), (6, 2), (8, 2), (5, 1), (8, 1), (12, 1), (16, 1)] {
            for head_dim in [20, 64, 256] {
                run(Case { heads, head_dim, ..CASE });
            }
        }
    }

    #[test]
    fn windows_and_large_scores() {
        for window in [1, 2, 16, 100, 1000] {
            run(Case { window: Some(window), ..CASE });
        }
        run(Case { scale: 3.0, ..CASE });
    }

    #[test]
    fn long_contexts() {
        let case = Case { heads: (2, 1), head_dim: 16, cache: F16, ..CASE };
        run_tokens(case, &[131_072], &[[131_071, 0, 0, 0]]);
    }

    #[test]
    fn shared_contexts() {
        // As many workgroups a context as may be, and contexts that not all of them have a part of.
        let tokens = [[899, 0, 0, 0], [5, 0, 1, 0], [0, u32::MAX, 0, 0], [300, 0, 0, 0]];
        for heads in [(8, 2), (5, 1), (12, 1)] {
            for window in [None, Some(200)] {
                run_tokens(Case { heads, window, ..CASE }, &[900, 6], &tokens);
            }
        }
        run_tokens(
            Case { cache: F16, out: F16, head_dim: 128, ..CASE },
            &[5000],
            &[[4999, 0, 0, 0]],
        );
    }

    #[test]
    fn f16_caches_and_outputs() {
        for (cache, out) in [(F16, F32), (F32, F16), (F16, F16)] {
            for head_dim in [20, 128] {
                run(Case { cache, out, head_dim, ..CASE });
            }
        }
    }
}
