//! A weight matrix times few rows of activations (decode).

use std::borrow::Cow;

use rayon::prelude::*;

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{
    Matrix, Norm, Store, float_slot, grid_2d,
    matrix::{RowShare, Rows, dot, silu},
    rms_norm::normalise,
};

/// `out = x * weights^T (+ bias)`, for up to a few dozen rows of `x`, normalised first if asked:
/// each workgroup does that for itself, which pays for very few rows.
#[derive(Debug, Clone, Copy)]
pub struct Gemv {
    /// What profiles call this product.
    pub label: &'static str,
    /// Weights `[rows, cols]`; gate rows above up rows if gated.
    pub weights: Matrix,
    /// F32 `[rows]`
    pub bias: Option<Tensor>,
    /// F32 or F16 `[n_tokens, cols]`; F32 if normalised
    pub x: Tensor,
    /// What becomes of `x` before the product.
    pub norm: Option<Norm>,
    /// F32 or F16 `[n_tokens, >= rows (or half of them if gated)]`
    pub out: Tensor,
    /// First column of `out`; a multiple of 4.
    pub out_col: usize,
    /// What to do with the sums.
    pub store: Store,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct GemvParams {
        n_tokens: u32,
        n_rows: u32,
        n_chunks: u32,
        scales_per_row: u32,
        x_stride4: u32,
        out_stride4: u32,
        out_col4: u32,
        grid_x: u32,
        norm_cols: u32,
        eps: f32,
    }
}

impl Kernel for Gemv {
    const NAME: &'static str = "gemv";
    type Params = GemvParams;

    fn label(&self) -> Cow<'static, str> {
        Cow::Owned(format!("{} {}", Self::NAME, self.label))
    }

    fn launch(&self, caps: &Caps) -> Launch<GemvParams> {
        let gated = self.store == Store::Gated;
        let n_rows = (self.weights.rows / if gated { 2 } else { 1 }) as u32;
        let n_tokens = self.x.rows() as u32;
        // Long code takes a CPU's driver seconds to compile.
        let tokens = n_tokens.next_power_of_two().min(if caps.software { 4 } else { 8 });
        let n_groups = n_tokens.div_ceil(tokens.max(1));
        let share = RowShare::of(caps, &self.weights, n_rows.div_ceil(4) * n_groups, tokens);
        // On a CPU, loads of activations cost as much as products: eight rows share them.
        let pair = caps.software && !gated;
        let rows = share.rows(pair);
        let (grid_x, grid_y) = grid_2d(n_rows.div_ceil(rows), caps);
        let shader = self
            .weights
            .shader(share.shader(Shader::new(Self::NAME), caps))
            .slot("act", float_slot(self.x.dtype, caps))
            .slot("out", float_slot(self.out.dtype, caps))
            .set("TOKENS", tokens)
            .set("SETS", if gated || pair { 2u32 } else { 1 })
            .set("PAIR", pair)
            .set("NORM", self.norm.is_some())
            .set("BIAS", self.bias.is_some())
            .set("ADD", self.store == Store::Add)
            .set("GATED", gated);
        Launch {
            shader,
            params: GemvParams {
                n_tokens,
                n_rows,
                n_chunks: self.weights.n_chunks(),
                scales_per_row: self.weights.scales_per_row(),
                x_stride4: self.x.cols() as u32 / 4,
                out_stride4: self.out.cols() as u32 / 4,
                out_col4: self.out_col as u32 / 4,
                grid_x,
                norm_cols: self.norm.map_or(0, |norm| norm.cols as u32),
                eps: self.norm.map_or(0.0, |norm| norm.eps),
            },
            bindings: vec![
                Binding::read(self.weights.weights),
                Binding::read(self.weights.scales),
                Binding::read(self.bias.unwrap_or(self.weights.weights)),
                Binding::read(self.x),
                Binding::write(self.out),
                Binding::read(self.norm.map_or(self.weights.weights, |norm| norm.weight)),
            ],
            grid: [grid_x, grid_y, n_groups],
        }
    }

    fn twin(p: &GemvParams, io: &Io<'_>) {
        let (weights, scales) = (io.read::<u8>(0), io.read::<f32>(1));
        let rows = Rows::new(&weights, &scales, io.shader, p.n_chunks);
        let option = |name| io.shader.override_value(name) == Some(1);
        let bias = option("BIAS").then(|| io.floats(2));
        let (n_rows, x_stride) = (p.n_rows as usize, p.x_stride4 as usize * 4);
        let mut x = io.floats(3);
        if option("NORM") {
            let gain = io.floats(5);
            for x in x.chunks_exact_mut(x_stride) {
                x.copy_from_slice(&normalise(x, &gain, p.norm_cols, p.eps));
            }
        }
        let product = |row: usize| -> Vec<f64> {
            let weights = rows.row(row);
            let x_rows = x.chunks(x_stride).take(p.n_tokens as usize);
            x_rows.map(|x| dot(&weights, &x[..rows.cols])).collect()
        };
        let gated = option("GATED");
        // [n_rows, n_tokens]
        let sums: Vec<Vec<f64>> = (0..n_rows)
            .into_par_iter()
            .map(|row| {
                let mut y = product(row);
                if let Some(bias) = &bias {
                    y.iter_mut().for_each(|y| *y += f64::from(bias[row]));
                }
                if gated {
                    let up = product(n_rows + row);
                    y.iter_mut().zip(up).for_each(|(y, up)| *y = silu(*y) * up);
                }
                y
            })
            .collect();
        for t in 0..p.n_tokens {
            let at = (t * p.out_stride4 + p.out_col4) as usize * 4;
            let mut y: Vec<f32> = sums.iter().map(|row| row[t as usize] as f32).collect();
            if option("ADD") {
                y.iter_mut().enumerate().for_each(|(i, y)| *y += io.float(4, at + i));
            }
            io.store(4, at, &y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{
            DType::{F16, F32},
            Recording,
        },
        kernels::testing::{Bench, FORMATS, check, check_as_gpu},
        weights::WeightFormat,
    };

    /// Formats differ in how a word is unpacked, numbers of tokens in how often it is multiplied:
    /// every format is tried on one token, and some on more, which take drivers long to compile.
    fn is_tried_on_more(format: WeightFormat) -> bool {
        [FORMATS[0], FORMATS[2], FORMATS[5]].contains(&format)
    }

    #[test]
    fn parity() {
        let cases = [
            (1, 40, 24, Store::Set),
            (1, 96, 100, Store::Gated),
            (3, 256, 512, Store::Add),
            (11, 64, 64, Store::Gated),
            (9, 64, 4096, Store::Set),
        ];
        for format in FORMATS {
            let n = if is_tried_on_more(format) { cases.len() } else { 2 };
            check(1e-7, |bench, rec| push(bench, rec, format, &cases[..n]));
        }
    }

    fn push(
        bench: &mut Bench,
        rec: &mut Recording,
        format: WeightFormat,
        cases: &[(usize, usize, usize, Store)],
    ) {
        for &(n_tokens, rows, cols, store) in cases {
            let weights = bench.matrix(format, 1, rows, cols);
            let x = bench.activations(n_tokens, cols, F32);
            let out = bench.normal(&[n_tokens, weights.rows + 32], F32);
            let bias = (store != Store::Gated).then(|| bench.normal(&[weights.rows], F32));
            let (label, norm, out_col) = ("test", None, 32);
            rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store });
        }
    }

    #[test]
    fn code_for_gpus() {
        for format in FORMATS {
            let n = if is_tried_on_more(format) { 2 } else { 1 };
            let cases = [(1, 96, 512, Store::Gated), (3, 64, 100, Store::Add)];
            check_as_gpu(1e-7, |bench, rec| push(bench, rec, format, &cases[..n]));
        }
    }

    #[test]
    fn normalises_its_input() {
        let cases =
            [(1, 40, 24, Store::Set), (3, 96, 500, Store::Gated), (9, 64, 4096, Store::Add)];
        for format in FORMATS {
            let n = if is_tried_on_more(format) { cases.len() } else { 1 };
            check(1e-7, |bench, rec| {
                for (n_tokens, rows, cols, store) in cases[..n].iter().copied() {
                    let weights = bench.matrix(format, 1, rows, cols);
                    let x = bench.activations(n_tokens, cols, F32);
                    let weight = bench.activations(1, cols, F32);
                    let norm = Some(Norm { weight, cols, eps: 0.5 });
                    let out = bench.normal(&[n_tokens, weights.rows], F32);
                    let (label, bias, out_col) = ("test", None, 0);
                    rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store });
                }
            });
        }
    }

    #[test]
    fn f16_activations() {
        // f16 outputs differ by a rounding step of 2^-11, hence the wider bound.
        check(1e-6, |bench, rec| {
            let weights = bench.matrix(FORMATS[2], 1, 128, 96);
            let x = bench.activations(2, 96, F16);
            let out = bench.normal(&[2, 64], F16);
            let store = Store::Gated;
            let (label, bias, norm, out_col) = ("test", None, None, 0);
            rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store });
        });
    }
}
