//! Attention of tiles of successive tokens over the paged cache. It knows rows and positions, not
//! why they are computed together.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor};

use super::{
    attention_decode::{AttentionParams, Query},
    float_slot, grid_2d,
};

/// Most rows of a tile.
pub const TILE: usize = 32;

/// What [`super::AttentionDecode`] computes, for tiles of successive tokens that share the reading
/// of keys and values (FlashAttention, Dao et al. 2022).
#[derive(Debug, Clone, Copy)]
pub struct AttentionPrefill {
    /// F32 `[n, padded(n_heads * head_dim)]`
    pub q: Tensor,
    /// F32 or F16 `[n_blocks, n_kv_heads, block_size, head_dim]`
    pub k_cache: Tensor,
    /// As `k_cache`.
    pub v_cache: Tensor,
    /// U32 `[n_tiles, 4]`: first row of `q` and `out`, number of rows (at most [`TILE`], 0 for an
    /// empty tile), sequence, position of the first row; the other rows follow it
    pub tiles: Tensor,
    /// U32 `[n_sequences, max_blocks]`: blocks of a sequence's successive positions
    pub block_tables: Tensor,
    /// F32 or F16 `[n, padded(n_heads * head_dim)]`; rows in no tile are left untouched
    pub out: Tensor,
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

impl Kernel for AttentionPrefill {
    const NAME: &'static str = "attention_prefill";
    type Params = AttentionParams;

    fn launch(&self, caps: &Caps) -> Launch<AttentionParams> {
        let n_tiles = self.tiles.rows() as u32;
        let (grid_y, grid_z) = grid_2d(n_tiles, caps);
        Launch {
            shader: Shader::new(Self::NAME)
                .slot("act", float_slot(self.k_cache.dtype, caps))
                .slot("out", float_slot(self.out.dtype, caps))
                .set("HEAD4", self.head_dim as u32 / 4),
            params: AttentionParams {
                n_items: n_tiles,
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
                Binding::read(self.tiles),
                Binding::read(self.block_tables),
                Binding::write(self.out),
            ],
            grid: [self.n_heads as u32, grid_y, grid_z],
        }
    }

    fn twin(p: &AttentionParams, io: &Io<'_>) {
        let tiles = io.read::<[u32; 4]>(3);
        let queries: Vec<Query> = tiles[..p.n_items as usize]
            .iter()
            .flat_map(|&[row, n, sequence, position]| {
                let (row, sequence) = (row as usize, sequence as usize);
                (0..n).map(move |i| Query {
                    row: row + i as usize,
                    sequence,
                    position: position + i,
                })
            })
            .collect();
        p.attend(io, &queries);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::device::Allocate as _;
    use crate::{
        device::{
            DType::{self, F16, F32, U32},
            Recording,
        },
        kernels::{
            AttentionDecode, AttentionParts,
            attention_decode::tests::{CASE, Case, caches, tolerance},
            testing::{Bench, check, gpu},
        },
        weights::padded,
    };

    /// Tiles of several sequences, whole and cut short.
    pub(in crate::kernels) fn push(bench: &mut Bench, case: Case) -> AttentionPrefill {
        let (k_cache, v_cache, block_tables) = caches(bench, case, &[308, 33, 16]);
        // (first row, rows, sequence, position); rows 6 and 7 belong to no tile.
        let tiles = [
            [8, 32, 0, 0],
            [40, 32, 0, 32],
            [0, 0, 9999, 9999],
            [72, 8, 0, 300],
            [0, 6, 2, 10],
            [80, 1, 0, 17],
            [81, 32, 1, 1],
        ];
        let tiles = bench.ints(&[tiles.len(), 4], U32, &tiles.concat());
        let (n_heads, n_kv_heads) = case.heads;
        let q = bench.activations(113, n_heads * case.head_dim, F32);
        let out = bench.normal(&[113, padded(n_heads * case.head_dim)], case.out);
        AttentionPrefill {
            q,
            k_cache,
            v_cache,
            tiles,
            block_tables,
            out,
            n_heads,
            n_kv_heads,
            head_dim: case.head_dim,
            block_size: case.block_size,
            scale: case.scale,
            window: case.window,
        }
    }

    fn run(case: Case) {
        check(tolerance(case), |bench, rec| {
            let attention = push(bench, case);
            rec.push(attention);
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
        for heads in [(3, 3), (4, 2), (8, 2), (8, 1)] {
            run(Case { heads, ..CASE });
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
    fn f16_caches_and_outputs() {
        for (cache, out) in [(F16, F32), (F32, F16), (F16, F16)] {
            for head_dim in [20, 128] {
                run(Case { cache, out, head_dim, ..CASE });
            }
        }
    }

    #[test]
    fn equals_decode() {
        let (n, n_heads, n_kv_heads, head_dim, block_size) = (75_usize, 4, 2, 24, 8);
        let mut device = gpu();
        let mut rec = Recording::new(&device.caps());
        let mut tensor = |shape: &[usize], dtype: DType, f: &dyn Fn(usize) -> u32| {
            let tensor = device.alloc("test", shape, dtype).unwrap();
            let words: Vec<u32> = (0..tensor.len()).map(f).collect();
            device.write(&tensor, &words);
            tensor
        };
        let wave = |step: f32| move |i: usize| (2.0 * (i as f32 * step).sin()).to_bits();
        let stride = padded(n_heads * head_dim);
        let n_blocks = n.div_ceil(block_size);
        let cache = [n_blocks, n_kv_heads, block_size, head_dim];
        let q = tensor(&[n, stride], F32, &wave(0.37));
        let (k_cache, v_cache) =
            (tensor(&cache, F32, &wave(0.73)), tensor(&cache, F32, &wave(1.9)));
        let block_tables = tensor(&[1, n_blocks], U32, &|i| (n_blocks - 1 - i) as u32);
        let tokens = tensor(&[n, 4], U32, &|i| if i % 4 == 0 { i as u32 / 4 } else { 0 });
        let tiles = tensor(&[n.div_ceil(TILE), 4], U32, &|i| match i % 4 {
            0 | 3 => (i / 4 * TILE) as u32,
            1 => (n - i / 4 * TILE).min(TILE) as u32,
            _ => 0,
        });
        let [decoded, out] = [(); 2].map(|()| tensor(&[n, stride], F32, &|_| 0));
        let scale = 0.5;
        let parts = AttentionParts::alloc(&mut device, n_heads, n_kv_heads, head_dim).unwrap();
        let decode = AttentionDecode {
            q,
            k_cache,
            v_cache,
            tokens,
            block_tables,
            out: decoded,
            parts,
            n_heads,
            n_kv_heads,
            head_dim,
            block_size,
            scale,
            window: None,
        };
        rec.push(decode);
        rec.push(AttentionPrefill {
            q,
            k_cache,
            v_cache,
            tiles,
            block_tables,
            out,
            n_heads,
            n_kv_heads,
            head_dim,
            block_size,
            scale,
            window: None,
        });
        let plan = device.prepare(rec).unwrap();
        device.run(&plan).unwrap();
        let expected: Vec<f32> = device.read_now(&decoded).unwrap();
        let actual: Vec<f32> = device.read_now(&out).unwrap();
        let power: f32 = expected.iter().map(|x| x * x).sum();
        let error: f32 = expected.iter().zip(&actual).map(|(x, y)| (x - y).powi(2)).sum();
        assert!(power > 1.0 && error <= 1e-7 * power, "{error} of {power}");
    }
}
