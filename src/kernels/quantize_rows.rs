//! Activations rounded to int8, each row with a scale of its own: what tiles of integers multiply.

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{float_slot, grid_2d, matrix::silu};

/// `out = round(x / scale)` with `scale = max |x| / 127`, row by row. A row that is not finite
/// gets a scale that is not a number or infinite, and so do its products.
#[derive(Debug, Clone, Copy)]
pub struct QuantizeRows {
    /// F32 or F16 `[n, cols]`; `[n, 2 * cols]` if gated
    pub x: Tensor,
    /// Round `silu(gate) * up` of rows that hold gates and then ups, instead of the rows.
    pub gated: bool,
    /// Columns and, behind them, the row's scale in F32. I8 `[n, QuantizeRows::width(cols)]`
    pub out: Tensor,
}

/// Bytes behind a row, which begin with its scale and keep rows whole vec4s.
const TAIL: usize = 16;

impl QuantizeRows {
    /// Bytes of a row of so many columns, a multiple of 16, with its scale.
    pub const fn width(cols: usize) -> usize {
        cols + TAIL
    }
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct QuantizeRowsParams {
        n_rows: u32,
        cols4: u32,
        x_stride4: u32,
        grid_x: u32,
    }
}

impl Kernel for QuantizeRows {
    const NAME: &'static str = "quantize_rows";
    type Params = QuantizeRowsParams;

    fn launch(&self, caps: &Caps) -> Launch<QuantizeRowsParams> {
        let (n_rows, cols) = (self.x.rows(), self.x.cols() / if self.gated { 2 } else { 1 });
        assert_eq!(self.out.cols(), Self::width(cols), "a row of bytes and its scale");
        let (grid_x, grid_y) = grid_2d(n_rows as u32, caps);
        Launch {
            shader: Shader::new(Self::NAME)
                .slot("act", float_slot(self.x.dtype, caps))
                .set("THREADS", if caps.software { 16u32 } else { 128 })
                .set("GATED", self.gated),
            params: QuantizeRowsParams {
                n_rows: n_rows as u32,
                cols4: cols as u32 / 4,
                x_stride4: self.x.cols() as u32 / 4,
                grid_x,
            },
            bindings: vec![Binding::read(self.x), Binding::write(self.out)],
            grid: [grid_x, grid_y, 1],
        }
    }

    fn twin(p: &QuantizeRowsParams, io: &Io<'_>) {
        let (x, cols) = (io.floats(0), p.cols4 as usize * 4);
        let gated = io.shader.override_value("GATED") == Some(1);
        let mut out = io.write::<u8>(1);
        let rows = x.chunks(p.x_stride4 as usize * 4).zip(out.chunks_mut(Self::width(cols)));
        for (row, out) in rows.take(p.n_rows as usize) {
            let (gates, ups) = row.split_at(cols);
            let product = |(&gate, &up): (&f32, &f32)| (silu(gate.into()) * f64::from(up)) as f32;
            match gated {
                false => quantize(gates, out),
                true => quantize(&gates.iter().zip(ups).map(product).collect::<Vec<_>>(), out),
            }
        }
    }
}

/// Rounds a row `[cols]` to `out` `[QuantizeRows::width(cols)]`.
pub(super) fn quantize(row: &[f32], out: &mut [u8]) {
    // As bits, which order absolute values and put NaN above all.
    let most = f32::from_bits(row.iter().map(|v| v.abs().to_bits()).max().unwrap_or(0));
    // Smaller rows count as zero: the inverse would not be finite.
    let zero = most < 2f32.powi(-100);
    let inverse = if zero || !most.is_finite() { 0.0 } else { 127.0 / most };
    let (bytes, tail) = out.split_at_mut(row.len());
    for (byte, v) in bytes.iter_mut().zip(row) {
        // NaN becomes 0.
        *byte = (v * inverse).round_ties_even() as i8 as u8;
    }
    let scale = if zero { 0.0 } else { most * (1.0 / 127.0) };
    tail[..4].copy_from_slice(&scale.to_ne_bytes());
}

/// What rows of `cols` rounded columns stand for. Returns `[n, cols]`.
pub(super) fn dequantized(rows: &[u8], cols: usize) -> Vec<f32> {
    let row = |row: &[u8]| {
        let (bytes, tail) = row.split_at(cols);
        let scale = f32::from_ne_bytes([tail[0], tail[1], tail[2], tail[3]]);
        bytes.iter().map(|&q| f32::from(q as i8) * scale).collect::<Vec<_>>()
    };
    rows.chunks_exact(QuantizeRows::width(cols)).flat_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::{self, F16, F32, I8},
        kernels::testing::{Bench, check},
    };

    // A value at the edge of two steps may round to either, hence the wider bound.
    const TOLERANCE: f64 = 1e-5;

    fn out(bench: &mut Bench, n: usize, cols: usize) -> Tensor {
        bench.floats(&[n, cols], I8, |_, _| 1.0)
    }

    #[test]
    fn parity() {
        for (rows, cols) in [(1, 32), (3, 96), (70, 1024), (2, 2080)] {
            for (x, gated) in [(F32, false), (F16, false), (F32, true), (F16, true)] {
                check(TOLERANCE, |bench, rec| {
                    let x = bench.normal(&[rows, cols * if gated { 2 } else { 1 }], x);
                    let out = out(bench, rows, cols);
                    rec.push(QuantizeRows { x, gated, out });
                });
            }
        }
    }

    fn rounded(row: &[f32]) -> Vec<f32> {
        let mut out = vec![0; QuantizeRows::width(row.len())];
        quantize(row, &mut out);
        dequantized(&out, row.len())
    }

    #[test]
    fn values_are_at_most_half_a_step_off_and_the_largest_are_exact() {
        let row: Vec<f32> = (0..320).map(|i| (i as f32 * 0.37).sin() * 3.0).collect();
        let most = row.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
        for (got, exact) in rounded(&row).iter().zip(&row) {
            assert!((got - exact).abs() <= most / 254.0 * 1.000_01);
            assert!(exact.abs() < most || (got - exact).abs() <= 1e-6 * most);
        }
    }

    /// Rows of zeros, of what counts as such, with an outlier, of the largest floats, and others.
    #[test]
    fn rows_at_the_ends_of_the_range() {
        let ends = |dtype: DType| {
            let most = if dtype == F16 { 65504.0 } else { f32::MAX };
            let tiny = if dtype == F16 { 6e-8 } else { 1e-36 };
            move |_: &mut Bench, i: usize| match (i / 64, i % 64) {
                (0, _) => 0.0,
                (1, col) => tiny * (col as f32 - 30.0) / 30.0,
                (2, 5) => -most,
                (2, col) => col as f32,
                (3, _) => most,
                (_, col) => (col as f32 - 32.0) / 8.0,
            }
        };
        for dtype in [F32, F16] {
            check(TOLERANCE, |bench, rec| {
                let x = bench.floats(&[5, 64], dtype, ends(dtype));
                let out = out(bench, 5, 64);
                rec.push(QuantizeRows { x, gated: false, out });
            });
        }
        assert!(rounded(&[0.0; 32]).iter().all(|&v| v == 0.0));
        assert!(rounded(&[1e-40; 32]).iter().all(|&v| v == 0.0));
        assert!(rounded(&[f32::MAX; 32]).iter().all(|v| v.is_finite()));
    }

    #[test]
    fn rows_that_are_not_finite_stay_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            check(TOLERANCE, |bench, rec| {
                let value = |_: &mut Bench, i| if i == 40 { bad } else { i as f32 };
                let x = bench.floats(&[3, 32], F32, value);
                let out = out(bench, 3, 32);
                rec.push(QuantizeRows { x, gated: false, out });
            });
        }
    }
}
