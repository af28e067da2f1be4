//! Many tokens times the matrices of their experts (prefill). The slots come sorted by expert in
//! blocks of one tile (vLLM's `moe_align_block_size`, here `align_experts`); results go back to
//! the unsorted places, so nothing has to be permuted.

use std::borrow::Cow;

use rayon::prelude::*;

use crate::device::{Binding, Caps, DType, Io, Kernel, Launch, Shader, Tensor, params};

use super::{
    Matrix, float_slot,
    gemm::{Tile, columns},
    matrix::{Rows, dot, silu},
    quantize_rows::dequantized,
};

/// `out[slot] = (routed weight *) bank[expert of slot] . x[slot / divide]`, where a slot is
/// `token * top_k + choice`. One launch serves one bank; slots whose expert is -1 or in another
/// bank keep what they hold.
#[derive(Debug, Clone, Copy)]
pub struct ExpertGemm {
    /// What profiles call this product.
    pub label: &'static str,
    /// Weights `[n_experts, rows, cols]`
    pub bank: Matrix,
    /// Global id of the bank's first expert.
    pub first_expert: usize,
    /// F32 or F16 `[n_slots / divide, cols]`, or I8 as [`super::QuantizeRows`] makes it for weights
    /// in int8 with a scale per row
    pub x: Tensor,
    /// Slots that share a row of `x`: top_k for the first product, 1 for the second.
    pub divide: usize,
    /// Slots grouped by expert, `n_slots` where a block is padded. I32 `[max_pad]`
    pub sorted_token_ids: Tensor,
    /// Global expert of each block, -1 skips it. I32 `[max_blocks]`
    pub expert_ids: Tensor,
    /// Slots with padding; later blocks are skipped. U32 `[1]`
    pub num_tokens_post_pad: Tensor,
    /// Routed weights, applied to the f32 sums. F32 `[n_slots]`
    pub weights: Option<Tensor>,
    /// F32 or F16 `[n_slots, rows]`, half as many if gated
    pub out: Tensor,
    /// `silu(gate) * up` instead of the products themselves, where rows of an expert are gates and
    /// then ups; only where [`ExpertGemm::gates`], elsewhere `silu_mul` follows.
    pub gated: bool,
    /// Slots per block, see [`ExpertGemm::block_size`].
    pub block_size: usize,
    /// Most blocks that experts of this bank can have together, to launch that many, which look for
    /// the first; without it as many are launched as there are blocks of all experts.
    pub most_blocks: Option<usize>,
    /// Tokens times top_k.
    pub n_slots: usize,
}

impl ExpertGemm {
    /// Whether int8 activations can make these products faster: not where f16 are multiplied in
    /// cooperative matrices.
    pub fn gains_by_int8(caps: &Caps) -> bool {
        Tile::edge(caps).is_none()
    }

    /// Whether this kernel can store gated products of such matrices by itself.
    pub fn gates(caps: &Caps, activations: DType) -> bool {
        Tile::of(caps, activations).gates()
    }

    /// The tiles that a block can be, in slots.
    pub fn block_sizes(caps: &Caps, activations: DType) -> &'static [usize] {
        match Tile::of(caps, activations) {
            Tile::Coop => Tile::heights(caps),
            Tile::Simt | Tile::Int8 => &[16, 32],
        }
    }

    /// Slots per block for `n_slots` slots over `n_experts` experts, by what an expert gets on
    /// average: rows of padding cost, and so do tiles that read the same weights again.
    pub fn block_size(caps: &Caps, activations: DType, n_slots: usize, n_experts: usize) -> usize {
        let average = n_slots.div_ceil(n_experts.max(1));
        match Tile::of(caps, activations) {
            Tile::Simt | Tile::Int8 => {
                if average <= 8 {
                    16
                } else {
                    32
                }
            }
            // Measured on an H200.
            Tile::Coop => {
                let best = match average {
                    0..=12 => 16,
                    13..=40 => 32,
                    41..=48 => 64,
                    _ => 128,
                };
                best.min(*Tile::heights(caps).last().expect("not empty"))
            }
        }
    }
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct ExpertGemmParams {
        n_rows: u32,
        n_chunks: u32,
        scales_per_row: u32,
        x_stride4: u32,
        out_stride4: u32,
        n_slots: u32,
        divide: u32,
        block_size: u32,
        first_expert: i32,
        n_experts: i32,
    }
}

impl Kernel for ExpertGemm {
    const NAME: &'static str = "expert_gemm";
    type Params = ExpertGemmParams;

    fn label(&self) -> Cow<'static, str> {
        Cow::Owned(format!("{} {}", Self::NAME, self.label))
    }

    fn launch(&self, caps: &Caps) -> Launch<ExpertGemmParams> {
        let tile = Tile::of(caps, self.x.dtype);
        let sizes = Self::block_sizes(caps, self.x.dtype);
        assert!(sizes.contains(&self.block_size), "a block is a tile: one of {sizes:?} slots");
        assert!(tile != Tile::Int8 || self.bank.is_int8(), "a scale for each row of weights");
        assert!(!self.gated || tile.gates(), "use expert_gemm and silu_mul");
        let shader = self
            .bank
            .shader(tile.shader(Shader::new(Self::NAME), caps, self.block_size))
            .slot("act", if tile == Tile::Int8 { "i8" } else { float_slot(self.x.dtype, caps) })
            .slot("out", float_slot(self.out.dtype, caps))
            .set("ROUTED", self.weights.is_some())
            .set("GATED", self.gated)
            .set("FIND", self.most_blocks.is_some());
        let all = self.expert_ids.len();
        let n_blocks = self.most_blocks.map_or(all, |most| most.min(all));
        Launch {
            shader,
            params: ExpertGemmParams {
                n_rows: self.bank.rows as u32,
                n_chunks: self.bank.n_chunks(),
                scales_per_row: self.bank.scales_per_row(),
                x_stride4: self.x.cols() as u32 / if tile == Tile::Int8 { 16 } else { 4 },
                out_stride4: self.out.cols() as u32 / 4,
                n_slots: self.n_slots as u32,
                divide: self.divide as u32,
                block_size: self.block_size as u32,
                first_expert: self.first_expert as i32,
                n_experts: self.bank.n_experts as i32,
            },
            bindings: vec![
                Binding::read(self.bank.weights),
                Binding::read(self.bank.scales),
                Binding::read(self.x),
                Binding::read(self.sorted_token_ids),
                Binding::read(self.expert_ids),
                Binding::read(self.num_tokens_post_pad),
                Binding::read(self.weights.unwrap_or(self.bank.weights)),
                Binding::write(self.out),
            ],
            grid: [columns(self.bank.rows, self.gated), n_blocks as u32, 1],
        }
    }

    fn twin(p: &ExpertGemmParams, io: &Io<'_>) {
        let (weights, scales) = (io.read::<u8>(0), io.read::<f32>(1));
        let rows = Rows::new(&weights, &scales, io.shader, p.n_chunks);
        let x = match io.tensor(2).dtype {
            DType::I8 => dequantized(&io.read(2), rows.cols),
            _ => io.floats(2),
        };
        let x_stride = x.len() / io.tensor(2).rows();
        let (sorted, experts) = (io.read::<u32>(3), io.read::<i32>(4));
        let option = |name| io.shader.override_value(name) == Some(1);
        let routed = option("ROUTED").then(|| io.floats(6));
        let gated = option("GATED");
        let (n_rows, block_size) = (p.n_rows as usize, p.block_size as usize);
        let n_blocks = io.read::<u32>(5)[0] as usize / block_size;
        for (expert, block) in experts.iter().zip(sorted.chunks(block_size)).take(n_blocks) {
            let expert = expert - p.first_expert;
            if !(0..p.n_experts).contains(&expert) {
                continue;
            }
            let slots: Vec<usize> =
                block.iter().filter(|&&slot| slot < p.n_slots).map(|&slot| slot as usize).collect();
            // [n_rows, slots]
            let sums: Vec<Vec<f64>> = (0..n_rows)
                .into_par_iter()
                .map(|row| {
                    let weights = rows.row(expert as usize * n_rows + row);
                    let x_row = |slot| &x[slot / p.divide as usize * x_stride..][..rows.cols];
                    slots.iter().map(|&slot| dot(&weights, x_row(slot))).collect()
                })
                .collect();
            for (i, &slot) in slots.iter().enumerate() {
                let scale = routed.as_ref().map_or(1.0, |routed| f64::from(routed[slot]));
                let y: Vec<f32> = match gated {
                    false => sums.iter().map(|row| (row[i] * scale) as f32).collect(),
                    true => {
                        let (gates, ups) = sums.split_at(n_rows / 2);
                        let pairs = gates.iter().zip(ups);
                        pairs.map(|(gate, up)| (silu(gate[i]) * up[i] * scale) as f32).collect()
                    }
                };
                io.store(7, slot * p.out_stride4 as usize * 4, &y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{
            DType::{self, F16, F32, I8, I32, U32},
            Recording,
        },
        kernels::testing::{Bench, FORMATS, check, check_edge, check_matrix, check_played},
        weights::{WeightFormat, padded},
    };

    const TOP_K: usize = 2;

    /// Slots of `ids` (`[n_slots]`, -1 skips) in blocks: (sorted_token_ids, expert_ids,
    /// num_tokens_post_pad). One expert without slots still has a block, all padding, and one
    /// more block has the expert -1.
    fn align(ids: &[i32], n_experts: i32, block_size: usize) -> (Vec<u32>, Vec<u32>, u32) {
        let sentinel = ids.len() as u32;
        let (mut sorted, mut experts) = (Vec::new(), Vec::new());
        for expert in -1..n_experts {
            let slots: Vec<u32> =
                (0..sentinel).filter(|&slot| ids[slot as usize] == expert).collect();
            sorted.extend(&slots);
            sorted.resize(sorted.len().max(1).next_multiple_of(block_size), sentinel);
            experts.resize(sorted.len() / block_size, expert as u32);
        }
        let n = sorted.len() as u32;
        // Past the end stand plausible values that nobody may use.
        sorted.extend(0..block_size as u32);
        experts.push(0);
        (sorted, experts, n)
    }

    struct Case {
        n_tokens: usize,
        rows: usize,
        cols: usize,
        x: DType,
        out: DType,
        first_product: bool,
        gated: bool,
        block_size: usize,
        /// Experts of each bank.
        banks: &'static [usize],
        /// Whether a bank's launch looks for its blocks.
        find: bool,
    }

    const PLAIN: Case = Case {
        n_tokens: 33,
        rows: 96,
        cols: 100,
        x: F32,
        out: F32,
        first_product: true,
        gated: false,
        block_size: 32,
        banks: &[4],
        find: false,
    };

    fn push(bench: &mut Bench, rec: &mut Recording, format: WeightFormat, case: &Case) {
        let n_slots = case.n_tokens * TOP_K;
        let n_experts = case.banks.iter().sum::<usize>() as i32;
        // Expert 1 is never chosen; every ninth slot is skipped.
        let ids: Vec<i32> = (0..n_slots as i32)
            .map(|i| match i * 7 % n_experts {
                _ if i % 9 == 5 => -1,
                1 => 0,
                expert => expert,
            })
            .collect();
        let (sorted, experts, n) = align(&ids, n_experts, case.block_size);
        let sorted_token_ids = bench.ints(&[sorted.len()], I32, &sorted);
        let expert_ids = bench.ints(&[experts.len()], I32, &experts);
        let num_tokens_post_pad = bench.ints(&[1], U32, &[n]);
        let divide = if case.first_product { TOP_K } else { 1 };
        let x = bench.activations(n_slots / divide, case.cols, case.x);
        let weights = (!case.first_product).then(|| bench.normal(&[n_slots], F32));
        let out_cols = padded(case.rows) / if case.gated { 2 } else { 1 };
        let out = bench.normal(&[n_slots, out_cols], case.out);
        let mut first_expert = 0;
        for &n_experts in case.banks {
            let bank = bench.matrix(format, n_experts, case.rows, case.cols);
            rec.push(ExpertGemm {
                label: "test",
                bank,
                first_expert,
                x,
                divide,
                sorted_token_ids,
                expert_ids,
                num_tokens_post_pad,
                weights,
                out,
                gated: case.gated,
                block_size: case.block_size,
                most_blocks: case.find.then(|| n_experts * n_slots.div_ceil(case.block_size)),
                n_slots,
            });
            first_expert += n_experts;
        }
    }

    #[test]
    fn parity() {
        for format in FORMATS {
            check(1e-7, |bench, rec| {
                for (n_tokens, rows, cols) in
                    [(1, 40, 24), (5, 1024, 100), (33, 96, 512), (70, 160, 64)]
                {
                    for first_product in [true, false] {
                        let case = Case { n_tokens, rows, cols, first_product, ..PLAIN };
                        push(bench, rec, format, &case);
                    }
                }
            });
        }
    }

    #[test]
    fn f16_activations() {
        // f16 outputs differ by a rounding step of 2^-11, hence the wider bound.
        for (out, tolerance) in [(F32, 1e-7), (F16, 1e-6)] {
            let case = Case { x: F16, out, ..PLAIN };
            check(tolerance, |bench, rec| push(bench, rec, FORMATS[2], &case));
        }
    }

    #[test]
    fn narrow_blocks() {
        for first_product in [true, false] {
            let case = Case { first_product, block_size: 16, ..PLAIN };
            check(1e-7, |bench, rec| push(bench, rec, FORMATS[3], &case));
        }
    }

    #[test]
    fn int8_activations() {
        let base = Case { x: I8, ..PLAIN };
        for block_size in [16, 32] {
            check(1e-7, |bench, rec| {
                for (n_tokens, rows, cols) in
                    [(1, 40, 24), (5, 1024, 100), (33, 96, 512), (70, 160, 64)]
                {
                    for first_product in [true, false] {
                        let case = Case { n_tokens, rows, cols, first_product, block_size, ..base };
                        push(bench, rec, WeightFormat::W8A8, &case);
                    }
                }
                push(bench, rec, WeightFormat::W8A8, &Case { banks: &[3, 2], block_size, ..base });
            });
        }
        check(1e-6, |bench, rec| {
            let case = Case { out: F16, block_size: 16, banks: &[2, 1, 2], find: true, ..base };
            push(bench, rec, WeightFormat::W8A8, &case);
        });
    }

    #[test]
    fn int8_rows_of_zeros_of_outliers_and_of_the_largest_values() {
        let value = |row: usize, col: usize| match (row % 4, col % 64) {
            (0, _) => 0.0,
            (1, 9) => 3e4,
            (2, _) => 100.0,
            (_, col) => (col as f32 - 31.0) / 16.0,
        };
        check(1e-7, |bench, rec| {
            let (n, cols, n_experts) = (24, 2048, 2);
            let bank = bench.matrix(WeightFormat::W8A8, n_experts, 64, cols);
            let x = bench.floats(&[n, cols], I8, |_, i| value(i / cols, i % cols));
            let ids: Vec<i32> = (0..n as i32).map(|i| i % 2).collect();
            let (sorted, experts, n_slots) = align(&ids, n_experts as i32, 16);
            let out = bench.normal(&[n, bank.rows], F32);
            rec.push(ExpertGemm {
                label: "test",
                bank,
                first_expert: 0,
                x,
                divide: 1,
                sorted_token_ids: bench.ints(&[sorted.len()], I32, &sorted),
                expert_ids: bench.ints(&[experts.len()], I32, &experts),
                num_tokens_post_pad: bench.ints(&[1], U32, &[n_slots]),
                weights: None,
                out,
                gated: false,
                block_size: 16,
                most_blocks: None,
                n_slots: n,
            });
        });
    }

    #[test]
    fn cooperative_tiles_of_every_height() {
        let base = Case { n_tokens: 150, x: F16, ..PLAIN };
        let all = [(16, 16), (16, 32), (16, 64), (16, 128), (8, 16), (8, 32)];
        for (edge, block_size) in all {
            for format in &FORMATS {
                check_edge(edge, 1e-6, |bench, rec| {
                    for (rows, cols, gated) in [(320, 96, true), (192, 320, true), (96, 512, false)]
                    {
                        let case = Case { rows, cols, gated, block_size, ..base };
                        push(bench, rec, *format, &case);
                    }
                    // The second half of a block is padding.
                    let case = Case { n_tokens: 10, gated: true, cols: 256, block_size, ..base };
                    push(bench, rec, *format, &case);
                    let case = Case { cols: 64, first_product: false, block_size, ..base };
                    push(bench, rec, *format, &Case { out: F16, ..case });
                });
            }
        }
    }

    /// Experts have blocks whose second half is padding, and others.
    #[test]
    fn cooperative_tiles_played_by_threads() {
        // Larger ones take lavapipe minutes to compile.
        for (edge, block_size) in [(16, 16), (16, 32), (8, 16), (8, 32)] {
            check_played(edge, 1e-6, |bench, rec| {
                let n_tokens = 5 * block_size / 4;
                let case = Case { n_tokens, rows: 160, cols: 96, x: F16, gated: true, ..PLAIN };
                push(bench, rec, FORMATS[3], &Case { block_size, banks: &[3], ..case });
            });
        }
    }

    #[test]
    fn two_banks_share_the_slots() {
        let case = Case { banks: &[3, 2], ..PLAIN };
        check(1e-7, |bench, rec| push(bench, rec, FORMATS[1], &case));
    }

    #[test]
    fn launches_find_the_blocks_of_their_bank() {
        // One that has no slots among them, and more blocks than one of an expert.
        for (n_tokens, banks) in [(33, &[1, 1, 1, 1][..]), (90, &[2, 1, 2][..])] {
            let case = Case { n_tokens, banks, find: true, block_size: 16, ..PLAIN };
            check(1e-7, |bench, rec| push(bench, rec, FORMATS[2], &case));
        }
        let case = Case { x: F16, banks: &[1, 3], find: true, ..PLAIN };
        check_matrix(1e-6, |bench, rec| push(bench, rec, FORMATS[2], &case));
    }
}
