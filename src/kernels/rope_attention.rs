//! Rotary embedding, cache write and attention of tokens that go on by one, in a single launch,
//! which saves the time between two.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Recording, Shader, Tensor, params};

use super::{
    AttentionDecode, QkNorm, RopeKvWrite, attention_decode::AttentionParams, grid_2d,
    has_subgroup_sums, rope_kv_write::RopeKvWriteParams,
};

/// [`RopeKvWrite`] and then [`AttentionDecode`] of the same tokens, which belong to different
/// sequences. It leaves `q` as it is.
#[derive(Debug, Clone, Copy)]
pub struct RopeAttention {
    rope: RopeKvWrite,
    attention: AttentionDecode,
}

/// Records rotary embedding, cache write and attention of tokens of different sequences: in one
/// launch where the device can, else in two.
pub fn attend_next(rec: &mut Recording, rope: RopeKvWrite, attention: AttentionDecode) {
    let both = RopeAttention { rope, attention };
    if both.is_served(rec.caps()) {
        return rec.push(both);
    }
    rec.push(rope);
    rec.push(attention);
}

/// Workgroup memory that the shader takes at most, bytes.
const WORKGROUP_BYTES: u32 = 24 << 10;

impl RopeAttention {
    fn is_served(&self, caps: &Caps) -> bool {
        let (tokens, tables) = (self.attention.tokens, self.attention.block_tables);
        !caps.software
            && has_subgroup_sums(caps)
            && caps.max_workgroup_bytes >= WORKGROUP_BYTES
            && self.rope.qk_norm != QkNorm::Full
            && tokens.buffer == tables.buffer
            && tokens.offset < tables.offset
    }

    /// Words from the tokens to the block tables behind them.
    fn tables(&self) -> usize {
        (self.attention.block_tables.offset - self.attention.tokens.offset) as usize / 4
    }
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct RopeAttentionParams {
        n_tokens: u32,
        n_heads: u32,
        n_kv_heads: u32,
        block_size: u32,
        max_blocks: u32,
        tables: u32,
        qkv_stride4: u32,
        out_stride4: u32,
        n_positions: u32,
        rotary_dim: u32,
        norm_dim: u32,
        window: u32,
        grid_y: u32,
        eps: f32,
        scale: f32,
    }
}

impl Kernel for RopeAttention {
    const NAME: &'static str = "rope_attention";
    type Params = RopeAttentionParams;

    fn launch(&self, caps: &Caps) -> Launch<RopeAttentionParams> {
        let Self { rope, attention } = self;
        let (tokens, tables) = (attention.tokens, attention.block_tables);
        let n_tokens = tokens.rows() as u32;
        let (grid_y, grid_z) = grid_2d(n_tokens, caps);
        let (shader, n_groups) = attention.share(Shader::new(Self::NAME), caps);
        let places = Tensor { shape: [1, 1, 1, self.tables() + tables.len()], ..tokens };
        Launch {
            shader: shader
                .set("QK_NORM", rope.qk_norm == QkNorm::PerHead)
                .set("INTERLEAVED", rope.interleaved),
            params: RopeAttentionParams {
                n_tokens,
                n_heads: rope.n_heads as u32,
                n_kv_heads: rope.n_kv_heads as u32,
                block_size: attention.block_size as u32,
                max_blocks: tables.cols() as u32,
                tables: self.tables() as u32,
                qkv_stride4: rope.qkv.cols() as u32 / 4,
                out_stride4: attention.out.cols() as u32 / 4,
                n_positions: rope.table.rows() as u32,
                rotary_dim: rope.rotary_dim as u32,
                norm_dim: rope.norm_dim as u32,
                window: attention.window.map_or(u32::MAX, |window| window as u32),
                grid_y,
                eps: rope.eps,
                scale: attention.scale,
            },
            bindings: vec![
                Binding::read(rope.qkv),
                Binding::read(rope.norm.unwrap_or(rope.table)),
                Binding::read(rope.table),
                Binding::read(places),
                Binding::write(rope.k_cache),
                Binding::write(rope.v_cache),
                Binding::write(attention.out),
                Binding::write(attention.parts.0),
            ],
            grid: [n_groups, grid_y, grid_z],
        }
    }

    fn twin(p: &RopeAttentionParams, io: &Io<'_>) {
        let places = io.read::<u32>(3);
        let n = p.n_tokens as usize;
        let tokens: Vec<[u32; 4]> = places.as_chunks::<4>().0[..n].to_vec();
        let [n_blocks, _, block_size, head_dim] = io.tensor(4).shape;
        let q_stride4 = (p.n_heads as usize * head_dim / 4) as u32;
        let rope = RopeKvWriteParams {
            n_tokens: p.n_tokens,
            n_heads: p.n_heads,
            n_kv_heads: p.n_kv_heads,
            qkv_stride4: p.qkv_stride4,
            q_stride4,
            n_slots: (n_blocks * block_size) as u32,
            block_size: p.block_size,
            n_positions: p.n_positions,
            rotary_dim: p.rotary_dim,
            norm_dim: p.norm_dim,
            grid_y: p.grid_y,
            eps: p.eps,
        };
        let attention = AttentionParams {
            n_items: p.n_tokens,
            n_heads: p.n_heads,
            n_kv_heads: p.n_kv_heads,
            block_size: p.block_size,
            max_blocks: p.max_blocks,
            q_stride4,
            out_stride4: p.out_stride4,
            window: p.window,
            grid_y: p.grid_y,
            scale: p.scale,
        };
        let mut q = vec![0.0; n * q_stride4 as usize * 4];
        rope.turn(io, &tokens, [4, 5], |at, row| q[at..][..row.len()].copy_from_slice(row));
        attention.attend_tokens(io, &tokens, [4, 5, 6], &q, &places[p.tables as usize..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{
            Allocate,
            DType::{self, F16, F32, U32},
        },
        kernels::{AttentionParts, testing::check},
        weights::padded,
    };

    /// Heads, widths and options of a test.
    #[derive(Clone, Copy)]
    struct Case {
        heads: (usize, usize),
        /// Padded, true, rotating.
        dims: (usize, usize, usize),
        qk_norm: QkNorm,
        interleaved: bool,
        window: Option<usize>,
        cache: DType,
        out: DType,
    }

    const CASE: Case = Case {
        heads: (8, 2),
        dims: (32, 32, 32),
        qk_norm: QkNorm::PerHead,
        interleaved: false,
        window: None,
        cache: F32,
        out: F32,
    };
    const BLOCK_SIZE: usize = 16;

    /// Tokens at `positions` of sequences of their own; `u32::MAX` is padding.
    fn run(case: Case, positions: &[u32]) {
        let tolerance = if [case.cache, case.out].contains(&F16) { 1e-6 } else { 1e-7 };
        check(tolerance, |bench, rec| {
            let ((n_heads, n_kv_heads), (head_dim, norm_dim, rotary_dim)) = (case.heads, case.dims);
            let n = positions.len();
            let max_blocks = 1 + *positions.iter().filter(|&&p| p != u32::MAX).max().unwrap()
                as usize
                / BLOCK_SIZE;
            // Blocks of the sequences lie in each other's gaps.
            let block = |sequence: usize, i: usize| (1 + i * n + sequence) as u32;
            let slot = |sequence: usize, position: u32| {
                let (i, offset) = (position as usize / BLOCK_SIZE, position % BLOCK_SIZE as u32);
                block(sequence, i) * BLOCK_SIZE as u32 + offset
            };
            let tokens = positions.iter().enumerate().map(|(i, &position)| match position {
                u32::MAX => [9999, u32::MAX, 9999, 0],
                _ => [position, slot(i, position), i as u32, 0],
            });
            let tables = (0..n).flat_map(|s| (0..max_blocks).map(move |i| block(s, i)));
            // As the model has them: one after the other.
            let mut words: Vec<u32> = tokens.flatten().collect();
            words.resize(words.len().next_multiple_of(64), 77);
            let start = words.len();
            words.extend(tables);
            let places = bench.ints(&[words.len()], U32, &words);
            let tokens = places.reshape(&[n, 4]);
            let block_tables = Tensor {
                offset: places.offset + 4 * start as u64,
                ..Tensor::new(places.buffer, &[n, max_blocks], U32)
            };
            // As a caller pads heads.
            let in_head = |i: usize| i % head_dim < norm_dim;
            let n_qkv = (n_heads + 2 * n_kv_heads) * head_dim;
            let stride = padded(n_qkv);
            let qkv = bench.floats(&[n, stride], F32, |bench, i| {
                let live = i % stride < n_qkv && in_head(i % stride);
                if live { bench.value() } else { 0.0 }
            });
            let norm = (case.qk_norm != QkNorm::None).then(|| {
                bench.floats(
                    &[2 * head_dim],
                    F32,
                    |bench, i| {
                        if in_head(i) { bench.value() } else { 0.0 }
                    },
                )
            });
            let table =
                bench.floats(&[300, rotary_dim], F32, |bench, _| bench.uniform() * 2.0 - 1.0);
            // What no token has seen is no number: nobody may use it.
            let seen: Vec<u32> = positions
                .iter()
                .enumerate()
                .filter(|(_, p)| **p != u32::MAX)
                .flat_map(|(s, &p)| (0..p).map(move |at| slot(s, at)))
                .collect();
            let shape = [1 + n * max_blocks, n_kv_heads, BLOCK_SIZE, head_dim];
            let mut cache = || {
                bench.floats(&shape, case.cache, |bench, i| {
                    let row = i / head_dim;
                    let slot = row / (n_kv_heads * BLOCK_SIZE) * BLOCK_SIZE + row % BLOCK_SIZE;
                    if seen.contains(&(slot as u32)) { bench.value() } else { f32::NAN }
                })
            };
            let (k_cache, v_cache) = (cache(), cache());
            let out = bench.normal(&[n, padded(n_heads * head_dim)], case.out);
            // Not compared: one launch needs no queries, and the twin no parts.
            let device = &mut bench.device;
            let q = device.alloc("q", &[n, padded(n_heads * head_dim)], F32).unwrap();
            let parts = AttentionParts::alloc(device, n_heads, n_kv_heads, head_dim).unwrap();
            let rope = RopeKvWrite {
                qkv,
                norm,
                table,
                tokens,
                q,
                k_cache,
                v_cache,
                n_heads,
                n_kv_heads,
                head_dim,
                norm_dim,
                rotary_dim,
                interleaved: case.interleaved,
                qk_norm: case.qk_norm,
                // Large, so that a wrong one shows.
                eps: 0.5,
            };
            let attention = AttentionDecode {
                q,
                k_cache,
                v_cache,
                tokens,
                block_tables,
                out,
                parts,
                n_heads,
                n_kv_heads,
                head_dim,
                block_size: BLOCK_SIZE,
                scale: 0.1,
                window: case.window,
            };
            attend_next(rec, rope, attention);
            // The next layer finds counters as this one did.
            attend_next(rec, rope, attention);
        });
    }

    #[test]
    fn widths() {
        for dims in [(16, 16, 16), (20, 18, 18), (64, 64, 64), (128, 128, 64), (256, 256, 256)] {
            run(Case { dims, ..CASE }, &[0, 300, 17, u32::MAX, 1]);
        }
    }

    #[test]
    fn groups_of_query_heads() {
        for heads in [(3, 3), (8, 4), (5, 1), (12, 1), (16, 1)] {
            run(Case { heads, ..CASE }, &[129, 128, 127, 15]);
        }
    }

    #[test]
    fn shared_contexts_and_windows() {
        for window in [None, Some(1), Some(200)] {
            run(Case { window, dims: (128, 128, 128), ..CASE }, &[900]);
            run(Case { window, ..CASE }, &[899, 5, u32::MAX, 300]);
        }
    }

    #[test]
    fn normalisation_pairs_and_formats() {
        for qk_norm in [QkNorm::None, QkNorm::PerHead] {
            for interleaved in [false, true] {
                run(Case { qk_norm, interleaved, ..CASE }, &[40, 3]);
            }
        }
        for (cache, out) in [(F16, F32), (F32, F16), (F16, F16)] {
            run(Case { cache, out, dims: (128, 128, 128), ..CASE }, &[200, 0]);
        }
    }
}
