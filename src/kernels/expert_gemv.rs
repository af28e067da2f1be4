//! Few tokens times the matrices of their experts (decode), found by expert id without alignment.
//! One launch serves one bank; experts of other banks are left to theirs.

use std::{borrow::Cow, ops::Range};

use rayon::prelude::*;

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{
    Matrix, float_slot,
    matrix::{RowShare, Rows, dot, silu},
};

/// For each slot (token t, choice j) the product of an activation row with the matrix of expert
/// `ids[t, j]`.
#[derive(Debug, Clone, Copy)]
pub struct ExpertGemv {
    /// What profiles call this product.
    pub label: &'static str,
    /// Weights `[n_experts, rows, cols]`
    pub bank: Matrix,
    /// Global id of the bank's first expert.
    pub first_expert: usize,
    /// F32 or F16; gated `[n, cols]`, combining `[n * top_k, cols]`
    pub x: Tensor,
    /// Global expert ids, I32 `[n, top_k]`; -1 skips the slot.
    pub ids: Tensor,
    /// Routed weights, F32 `[n, top_k]`, for [`ExpertMode::Combine`] only.
    pub weights: Option<Tensor>,
    /// Gated F32 or F16 `[n * top_k, rows / 2]`, combining F32 `[n, rows]`
    pub out: Tensor,
    /// What to do with the products.
    pub mode: ExpertMode,
}

/// What [`ExpertGemv`] does with its products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertMode {
    /// Gate rows stand above up rows: `out[t * top_k + j] = silu(gate . x[t]) * (up . x[t])`.
    /// Rows of skipped slots keep what they hold.
    Gated,
    /// `out[t] += sum_j weights[t, j] * (bank[ids[t, j]] . x[t * top_k + j])`, in the order of j.
    Combine,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct ExpertGemvParams {
        n_rows: u32,
        n_chunks: u32,
        scales_per_row: u32,
        x_stride4: u32,
        out_stride4: u32,
        top_k: u32,
        first_expert: i32,
        n_experts: i32,
    }
}

impl Kernel for ExpertGemv {
    const NAME: &'static str = "expert_gemv";
    type Params = ExpertGemvParams;

    fn label(&self) -> Cow<'static, str> {
        Cow::Owned(format!("{} {}", Self::NAME, self.label))
    }

    fn launch(&self, caps: &Caps) -> Launch<ExpertGemvParams> {
        let combine = self.mode == ExpertMode::Combine;
        assert_eq!(combine, self.weights.is_some(), "routed weights belong to combining products");
        let n_rows = (self.bank.rows / if combine { 1 } else { 2 }) as u32;
        let share = match combine {
            true => RowShare::of_slots(caps, &self.bank, self.ids.cols() as u32),
            false => {
                let n_quads = n_rows.div_ceil(4) * self.ids.len() as u32;
                RowShare::of(caps, &self.bank, n_quads, 2)
            }
        };
        // On a CPU, loads of activations cost as much as products: eight rows share them.
        let pair = caps.software && combine;
        let shader = self
            .bank
            .shader(share.shader(Shader::new(Self::NAME), caps))
            .slot("act", float_slot(self.x.dtype, caps))
            .slot("out", float_slot(self.out.dtype, caps))
            .set("SETS", if combine && !pair { 1u32 } else { 2 })
            .set("COMBINE", combine)
            .set("PAIR", pair);
        Launch {
            shader,
            params: ExpertGemvParams {
                n_rows,
                n_chunks: self.bank.n_chunks(),
                scales_per_row: self.bank.scales_per_row(),
                x_stride4: self.x.cols() as u32 / 4,
                out_stride4: self.out.cols() as u32 / 4,
                top_k: self.ids.cols() as u32,
                first_expert: self.first_expert as i32,
                n_experts: self.bank.n_experts as i32,
            },
            bindings: vec![
                Binding::read(self.bank.weights),
                Binding::read(self.bank.scales),
                Binding::read(self.x),
                Binding::read(self.ids),
                Binding::read(self.weights.unwrap_or(self.bank.weights)),
                Binding::write(self.out),
            ],
            grid: [n_rows.div_ceil(share.rows(pair)), self.out.rows() as u32, 1],
        }
    }

    fn twin(p: &ExpertGemvParams, io: &Io<'_>) {
        let (weights, scales) = (io.read::<u8>(0), io.read::<f32>(1));
        let rows = Rows::new(&weights, &scales, io.shader, p.n_chunks);
        let (x, ids) = (io.floats(2), io.read::<i32>(3));
        let combine = io.shader.override_value("COMBINE") == Some(1);
        let (n_rows, top_k) = (p.n_rows as usize, p.top_k as usize);
        // Index into the bank, or none where the expert is elsewhere.
        let expert = |slot: usize| {
            let expert = ids[slot] - p.first_expert;
            (0..p.n_experts).contains(&expert).then_some(expert as usize)
        };
        let product = |range: Range<usize>, x_row: usize| -> Vec<f64> {
            let x = &x[x_row * p.x_stride4 as usize * 4..][..rows.cols];
            range.into_par_iter().map(|row| dot(&rows.row(row), x)).collect()
        };
        for i in 0..io.grid[1] as usize {
            let at = i * p.out_stride4 as usize * 4;
            if combine {
                let routed = io.read::<f32>(4);
                let mut sums: Vec<f64> =
                    (0..n_rows).map(|row| f64::from(io.float(5, at + row))).collect();
                for slot in i * top_k..(i + 1) * top_k {
                    let Some(expert) = expert(slot) else { continue };
                    let y = product(expert * n_rows..(expert + 1) * n_rows, slot);
                    sums.iter_mut().zip(y).for_each(|(sum, y)| *sum += f64::from(routed[slot]) * y);
                }
                let sums: Vec<f32> = sums.into_iter().map(|sum| sum as f32).collect();
                io.store(5, at, &sums);
            } else if let Some(expert) = expert(i) {
                let first = expert * 2 * n_rows;
                let y = product(first..first + 2 * n_rows, i / top_k);
                let (gate, up) = y.split_at(n_rows);
                let y: Vec<f32> =
                    gate.iter().zip(up).map(|(&gate, &up)| (silu(gate) * up) as f32).collect();
                io.store(5, at, &y);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{
            DType::{self, F16, F32, I32},
            Recording,
        },
        kernels::testing::{Bench, FORMATS, check, check_as_gpu},
        weights::{WeightFormat, padded},
    };

    const TOP_K: usize = 3;

    /// Ids over `n_experts` that leave some slots out. `[n, TOP_K]`
    fn ids(bench: &mut Bench, n: usize, n_experts: usize) -> Tensor {
        let ids: Vec<u32> = (0..n * TOP_K)
            .map(|i| if i % 7 == 4 { u32::MAX } else { (i * 5 % n_experts) as u32 })
            .collect();
        bench.ints(&[n, TOP_K], I32, &ids)
    }

    fn push(
        bench: &mut Bench,
        rec: &mut Recording,
        format: WeightFormat,
        (n, rows, cols): (usize, usize, usize),
        [x, out]: [DType; 2],
    ) {
        let rows = padded(rows);
        let label = "test";
        let bank = bench.matrix(format, 4, 2 * rows, cols);
        let ids = ids(bench, n, 4);
        let x_tokens = bench.activations(n, cols, x);
        let gated = bench.normal(&[n * TOP_K, rows], out);
        rec.push(ExpertGemv {
            label,
            bank,
            first_expert: 0,
            x: x_tokens,
            ids,
            weights: None,
            out: gated,
            mode: ExpertMode::Gated,
        });
        let bank = bench.matrix(format, 4, rows, cols);
        let x = bench.activations(n * TOP_K, cols, x);
        let weights = Some(bench.normal(&[n, TOP_K], F32));
        let out = bench.normal(&[n, rows], F32);
        let mode = ExpertMode::Combine;
        rec.push(ExpertGemv { label, bank, first_expert: 0, x, ids, weights, out, mode });
    }

    #[test]
    fn parity() {
        for format in FORMATS {
            check(1e-7, |bench, rec| {
                for shape in [(1, 40, 24), (5, 96, 100), (2, 1024, 512)] {
                    push(bench, rec, format, shape, [F32, F32]);
                }
            });
        }
    }

    #[test]
    fn code_for_gpus() {
        for format in FORMATS {
            check_as_gpu(1e-7, |bench, rec| push(bench, rec, format, (2, 96, 512), [F16, F32]));
        }
    }

    #[test]
    fn f16_activations() {
        // f16 outputs differ by a rounding step of 2^-11, hence the wider bound.
        for (out, tolerance) in [(F32, 1e-7), (F16, 1e-6)] {
            check(tolerance, |bench, rec| {
                push(bench, rec, FORMATS[2], (5, 96, 100), [F16, out]);
                push(bench, rec, FORMATS[4], (2, 96, 512), [F16, out]);
            });
        }
    }

    #[test]
    fn two_banks_share_the_slots() {
        for mode in [ExpertMode::Gated, ExpertMode::Combine] {
            check(1e-7, |bench, rec| {
                let banks =
                    [bench.matrix(FORMATS[2], 3, 64, 64), bench.matrix(FORMATS[2], 2, 64, 64)];
                let combine = mode == ExpertMode::Combine;
                let x = bench.activations(if combine { 5 * TOP_K } else { 5 }, 64, F32);
                let ids = ids(bench, 5, 6); // Expert 5 is in neither bank.
                let weights = combine.then(|| bench.normal(&[5, TOP_K], F32));
                let shape = if combine { [5, 64] } else { [5 * TOP_K, 32] };
                let out = bench.normal(&shape, F32);
                for (bank, first_expert) in banks.into_iter().zip([0, 3]) {
                    let label = "test";
                    rec.push(ExpertGemv { label, bank, first_expert, x, ids, weights, out, mode });
                }
            });
        }
    }
}
