//! Root mean square normalisation of rows (Zhang and Sennrich 2019).

use crate::device::{Binding, Caps, Io, Kernel, Launch, Shader, Tensor, params};

use super::{float_slot, grid_2d, sum_lanes};

/// A root mean square normalisation, for kernels that apply it to their input.
#[derive(Debug, Clone, Copy)]
pub struct Norm {
    /// F32 `[padded cols]`, zero in the padding
    pub weight: Tensor,
    /// True width, over which the mean is taken.
    pub cols: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// `v / sqrt(mean(v^2) + eps) * weight`, where the mean is over `cols`.
pub(super) fn normalise(v: &[f32], weight: &[f32], cols: u32, eps: f32) -> Vec<f32> {
    let squares: f64 = v.iter().map(|&v| f64::from(v).powi(2)).sum();
    let scale = 1.0 / (squares / f64::from(cols) + f64::from(eps)).sqrt();
    v.iter().zip(weight).map(|(&v, &w)| (f64::from(v) * scale * f64::from(w)) as f32).collect()
}

/// `out[i] = norm(x[i])` or `out[i] = norm(x[rows[i]])`, with
/// `norm(v) = v / sqrt(mean(v^2) + eps) * weight`.
#[derive(Debug, Clone, Copy)]
pub struct RmsNorm {
    /// F32 `[n, padded cols]`
    pub x: Tensor,
    /// Rows of `x` to take, U32 `[n_out]`; all of them in order if absent.
    pub rows: Option<Tensor>,
    /// What to do with them.
    pub norm: Norm,
    /// F32 or F16 `[n_out, padded cols]`
    pub out: Tensor,
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct RmsNormParams {
        n_rows: u32,
        cols: u32,
        stride4: u32,
        grid_x: u32,
        eps: f32,
    }
}

impl Kernel for RmsNorm {
    const NAME: &'static str = "rms_norm";
    type Params = RmsNormParams;

    fn launch(&self, caps: &Caps) -> Launch<RmsNormParams> {
        let (grid_x, grid_y) = grid_2d(self.out.rows() as u32, caps);
        let (shader, lanes) = sum_lanes(Shader::new(Self::NAME), caps, 32);
        // Few vec4s a thread hide a GPU's latency; a CPU would rather have few threads.
        let threads: u32 = if caps.software { 64 } else { 256 };
        Launch {
            shader: shader
                .set("THREADS", threads)
                .set("LANES", lanes)
                .slot("act", float_slot(self.out.dtype, caps))
                .set("GATHER", self.rows.is_some()),
            params: RmsNormParams {
                n_rows: self.out.rows() as u32,
                cols: self.norm.cols as u32,
                stride4: self.out.cols() as u32 / 4,
                grid_x,
                eps: self.norm.eps,
            },
            bindings: vec![
                Binding::read(self.x),
                Binding::read(self.norm.weight),
                Binding::read(self.rows.unwrap_or(self.norm.weight)),
                Binding::write(self.out),
            ],
            grid: [grid_x, grid_y, 1],
        }
    }

    fn twin(p: &RmsNormParams, io: &Io<'_>) {
        let (x, weight) = (io.read::<f32>(0), io.read::<f32>(1));
        let stride = p.stride4 as usize * 4;
        let gather = io.shader.override_value("GATHER") == Some(1);
        let rows = gather.then(|| io.read::<u32>(2));
        for row in 0..p.n_rows as usize {
            let from = rows.as_ref().map_or(row, |rows| rows[row] as usize);
            let y = normalise(&x[from * stride..][..stride], &weight, p.cols, p.eps);
            io.store(3, row * stride, &y);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::DType::{F16, F32},
        kernels::testing::check,
    };

    #[test]
    fn parity() {
        for (rows, cols) in [(1, 64), (3, 100), (2, 2048), (70, 24)] {
            for (dtype, tolerance) in [(F32, 1e-7), (F16, 1e-6)] {
                // A large epsilon, so that a wrong one shows.
                for eps in [1e-6, 0.5] {
                    check(tolerance, |bench, rec| {
                        let x = bench.activations(rows, cols, F32);
                        let weight = bench.activations(1, cols, F32);
                        let out = bench.normal(&[rows, x.cols()], dtype);
                        rec.push(RmsNorm { x, rows: None, norm: Norm { weight, cols, eps }, out });
                    });
                }
            }
        }
    }

    #[test]
    fn gathers_rows() {
        check(1e-7, |bench, rec| {
            let x = bench.activations(9, 40, F32);
            let weight = bench.activations(1, 40, F32);
            let rows = Some(bench.ints(&[3], crate::device::DType::U32, &[8, 0, 5]));
            let out = bench.normal(&[3, 64], F32);
            rec.push(RmsNorm { x, rows, norm: Norm { weight, cols: 40, eps: 1e-5 }, out });
        });
    }
}
