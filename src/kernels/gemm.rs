//! A weight matrix times many rows of activations (prefill), and the choice between this kernel
//! and [`Gemv`]. The tiles are `shaders/include/tile_*.wgsl`, which `expert_gemm` shares.

use std::borrow::Cow;

use crate::{
    device::{Binding, Caps, DType, Io, Kernel, Launch, Recording, Shader, Tensor, params},
    weights::WeightFormat,
};

use super::{Gemv, Matrix, Store, float_slot, gemv::GemvParams};

/// Weight rows of a tile.
pub(super) const TILE_ROWS: usize = 128;
/// Activation rows of a wide tile; a narrow one has half of them.
pub(super) const TILE_TOKENS: usize = 32;
/// Up to this many rows of activations [`Gemv`] is faster for a router on a large GPU.
const ROUTER_GEMV_TOKENS: usize = 1024;
/// Up to this many rows of activations [`Gemv`] is faster; measured on lavapipe with 512 x 512
/// weights, f16 and int8.
pub const GEMV_TOKENS: usize = 16;

/// How a tile of activation rows times [`TILE_ROWS`] weight rows is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tile {
    /// f32 sums in registers: 32 or 16 activation rows.
    Simt,
    /// The same with i32 sums of int8 activations and weights.
    Int8,
    /// Cooperative matrices of f16 with f32 sums: [`Tile::heights`] activation rows.
    Coop,
}

impl Tile {
    /// Edge of the cooperative matrices if shaders with them, which count on subgroups of 32 and
    /// on workgroup memory for the largest tile, run here. Where matrices are 8 x 8 subgroups are
    /// Apple's: 32 threads, although Metal does not say so.
    pub(super) fn edge(caps: &Caps) -> Option<u32> {
        let edge = caps.coop_matrix.filter(|_| caps.f16)?;
        let (runs, bytes) = match edge {
            16 => (caps.subgroups == Some((32, 32)), 33_540),
            _ => (caps.subgroups.is_some(), 24_196),
        };
        (runs && caps.max_workgroup_bytes >= bytes).then_some(edge)
    }

    /// Activation rows of cooperative tiles.
    pub(super) fn heights(caps: &Caps) -> &'static [usize] {
        match Self::edge(caps) {
            Some(16) => &[16, 32, 64, 128],
            _ => &[16, 32],
        }
    }

    /// The best that the device and the activations allow.
    pub(super) fn of(caps: &Caps, activations: DType) -> Self {
        match activations {
            DType::I8 => Self::Int8,
            DType::F16 if Self::edge(caps).is_some() => Self::Coop,
            _ => Self::Simt,
        }
    }

    /// Fills the shader's slots for tiles of `tokens` activation rows.
    pub(super) fn shader(self, shader: Shader, caps: &Caps, tokens: usize) -> Shader {
        match self {
            Self::Coop => {
                let coop = match tokens {
                    16 => "16",
                    32 => "32",
                    64 => "64",
                    _ => "128",
                };
                let edge = if Self::edge(caps) == Some(16) { "16" } else { "8" };
                shader.slot("tile", "coop").slot("coop", coop).slot("edge", edge)
            }
            Self::Simt => {
                // On CPUs that play GPU a load from workgroup memory costs more than a shuffle.
                let quads = caps.software && caps.subgroups.is_some();
                shader
                    .slot("tile", "simt")
                    .slot("share", if quads { "quad" } else { "load" })
                    .set("WIDE", tokens > TILE_TOKENS / 2)
            }
            Self::Int8 => shader.slot("tile", "int8").set("WIDE", tokens > TILE_TOKENS / 2),
        }
    }

    /// Whether the tile can take gates and ups together and give their gated product.
    pub(super) fn gates(self) -> bool {
        self == Self::Coop
    }
}

/// Tiles of `rows` weight rows, of which half are gates if `gated`.
pub(super) fn columns(rows: usize, gated: bool) -> u32 {
    match gated {
        true => (rows / 2).div_ceil(TILE_ROWS / 2) as u32,
        false => rows.div_ceil(TILE_ROWS) as u32,
    }
}

/// `out = x * weights^T (+ bias)`, for many rows of `x`.
#[derive(Debug, Clone, Copy)]
pub struct Gemm {
    /// What profiles call this product.
    pub label: &'static str,
    /// Weights `[rows, cols]`
    pub weights: Matrix,
    /// F32 `[rows]`
    pub bias: Option<Tensor>,
    /// F32 or F16 `[n_tokens, cols]`
    pub x: Tensor,
    /// F32 or F16 `[n_tokens, >= rows]`
    pub out: Tensor,
    /// First column of `out`; a multiple of 4.
    pub out_col: usize,
    /// `Gated` only without a bias and where [`Gemm::gates`]; elsewhere `silu_mul` follows.
    pub store: Store,
}

impl Gemm {
    /// Whether this kernel can store the gated product of such a matrix by itself.
    pub fn gates(caps: &Caps, activations: DType) -> bool {
        Tile::of(caps, activations).gates()
    }
}

/// Pushes the product as [`Gemv`] where `x` has few rows, else as it is.
pub fn product(rec: &mut Recording, gemm: Gemm) {
    let Gemm { label, weights, bias, x, out, out_col, store } = gemm;
    // A router has too few rows to fill a large GPU with tiles, unless tokens are many.
    let most = match Tile::of(rec.caps(), x.dtype) {
        Tile::Coop => ROUTER_GEMV_TOKENS,
        Tile::Simt | Tile::Int8 => usize::MAX,
    };
    let narrow = !rec.caps().software
        && weights.format == WeightFormat::F32
        && weights.rows <= 1024
        && x.rows() <= most;
    if x.rows() <= gemv_tokens(rec.caps(), &weights, x.dtype) || narrow {
        rec.push(Gemv { label, weights, bias, x, norm: None, out, out_col, store });
    } else {
        rec.push(gemm);
    }
}

/// Up to this many rows of activations [`Gemv`] is faster. On a large GPU (measured on an H200) few
/// tiles leave most of it idle, and many are faster as soon as weights would be read twice.
fn gemv_tokens(caps: &Caps, weights: &Matrix, activations: DType) -> usize {
    match (Tile::of(caps, activations), columns(weights.rows, false)) {
        (Tile::Coop, ..=20) => 32,
        (Tile::Coop, 256..) => 4,
        _ => GEMV_TOKENS,
    }
}

/// Activation rows of a cooperative tile: as many as leave enough tiles to fill a large GPU.
fn coop_tokens(caps: &Caps, n_tokens: usize, n_rows: usize) -> usize {
    // Tiles of 64 are the slowest for what they do.
    let enough = |tokens: &&usize| {
        let n_tiles = n_tokens.div_ceil(**tokens) * n_rows.div_ceil(TILE_ROWS);
        n_tokens >= **tokens && n_tiles >= if **tokens == 64 { 192 } else { 128 }
    };
    let few = if n_tokens > 16 { 32 } else { 16 };
    *Tile::heights(caps)[1..].iter().rev().find(enough).unwrap_or(&few)
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct GemmParams {
        n_tokens: u32,
        n_rows: u32,
        n_chunks: u32,
        scales_per_row: u32,
        x_stride4: u32,
        out_stride4: u32,
        out_col4: u32,
    }
}

impl Kernel for Gemm {
    const NAME: &'static str = "gemm";
    type Params = GemmParams;

    fn label(&self) -> Cow<'static, str> {
        Cow::Owned(format!("{} {}", Self::NAME, self.label))
    }

    fn launch(&self, caps: &Caps) -> Launch<GemmParams> {
        let n_tokens = self.x.rows();
        let tile = Tile::of(caps, self.x.dtype);
        let gated = self.store == Store::Gated;
        assert!(!gated || (tile.gates() && self.bias.is_none()), "use gemm and silu_mul");
        let (tokens, step) = match tile {
            Tile::Coop => {
                let tokens = coop_tokens(caps, n_tokens, self.weights.rows);
                (tokens, tokens)
            }
            _ if n_tokens <= TILE_TOKENS / 2 => (TILE_TOKENS / 2, TILE_TOKENS),
            _ => (TILE_TOKENS, TILE_TOKENS),
        };
        let shader = self
            .weights
            .shader(tile.shader(Shader::new(Self::NAME), caps, tokens))
            .slot("act", float_slot(self.x.dtype, caps))
            .slot("out", float_slot(self.out.dtype, caps))
            .set("BIAS", self.bias.is_some())
            .set("ADD", self.store == Store::Add)
            .set("GATED", gated);
        Launch {
            shader,
            params: GemmParams {
                n_tokens: n_tokens as u32,
                n_rows: self.weights.rows as u32,
                n_chunks: self.weights.n_chunks(),
                scales_per_row: self.weights.scales_per_row(),
                x_stride4: self.x.cols() as u32 / 4,
                out_stride4: self.out.cols() as u32 / 4,
                out_col4: self.out_col as u32 / 4,
            },
            bindings: vec![
                Binding::read(self.weights.weights),
                Binding::read(self.weights.scales),
                Binding::read(self.bias.unwrap_or(self.weights.weights)),
                Binding::read(self.x),
                Binding::write(self.out),
            ],
            grid: [columns(self.weights.rows, gated), n_tokens.div_ceil(step) as u32, 1],
        }
    }

    // The same product by another route on the GPU; on the CPU there is one.
    fn twin(p: &GemmParams, io: &Io<'_>) {
        let &GemmParams {
            n_tokens,
            n_rows,
            n_chunks,
            scales_per_row,
            x_stride4,
            out_stride4,
            out_col4,
        } = p;
        let gated = io.shader.override_value("GATED") == Some(1);
        let p = GemvParams {
            n_tokens,
            n_rows: if gated { n_rows / 2 } else { n_rows },
            n_chunks,
            scales_per_row,
            x_stride4,
            out_stride4,
            out_col4,
            grid_x: io.grid[0],
            norm_cols: 0,
            eps: 0.0,
        };
        Gemv::twin(&p, io);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Allocate as _;
    use crate::{
        device::DType::{F16, F32, U8},
        kernels::testing::{FORMATS, check, check_edge, gpu},
        weights::WeightFormat,
    };

    #[test]
    fn parity() {
        for format in FORMATS {
            check(1e-7, |bench, rec| {
                for (n_tokens, rows, cols) in
                    [(1, 40, 24), (5, 1024, 100), (33, 96, 512), (70, 160, 64), (32, 128, 128)]
                {
                    for store in [Store::Set, Store::Add] {
                        let weights = bench.matrix(format, 1, rows, cols);
                        let x = bench.activations(n_tokens, cols, F32);
                        let out = bench.normal(&[n_tokens, weights.rows + 32], F32);
                        let bias = (store == Store::Set && cols != 24)
                            .then(|| bench.normal(&[weights.rows], F32));
                        rec.push(Gemm { label: "test", weights, bias, x, out, out_col: 32, store });
                    }
                }
            });
        }
    }

    #[test]
    fn f16_activations() {
        for format in [FORMATS[1], FORMATS[3], FORMATS[5]] {
            // Cooperative matrices round the scales of groups to f16, by 2^-11 at most, and outputs
            // in f16 differ by a rounding step, hence the wider bounds.
            let grouped = format != FORMATS[1];
            for (dtype, tolerance) in [(F32, if grouped { 2e-7 } else { 1e-7 }), (F16, 1e-6)] {
                check(tolerance, |bench, rec| {
                    let weights = bench.matrix(format, 1, 96, 100);
                    let x = bench.activations(33, 100, F16);
                    let out = bench.normal(&[33, 96], dtype);
                    let store = Store::Add;
                    let gemm =
                        Gemm { label: "test", weights, bias: None, x, out, out_col: 0, store };
                    rec.push(gemm);
                });
            }
        }
    }

    #[test]
    fn gated_products() {
        for (edge, format) in FORMATS.iter().flat_map(|format| [(16, format), (8, format)]) {
            check_edge(edge, 1e-6, |bench, rec| {
                for (n_tokens, rows, cols) in [(17, 320, 96), (300, 64, 160), (40, 8192, 32)] {
                    let weights = bench.matrix(*format, 1, rows, cols);
                    let x = bench.activations(n_tokens, cols, F16);
                    let out = bench.normal(&[n_tokens, rows / 2], F16);
                    let store = Store::Gated;
                    let gemm =
                        Gemm { label: "test", weights, bias: None, x, out, out_col: 0, store };
                    rec.push(gemm);
                }
            });
        }
    }

    #[test]
    fn product_chooses_by_rows() {
        for (n_tokens, stem) in [(GEMV_TOKENS, "gemv"), (GEMV_TOKENS + 1, "gemm")] {
            check(1e-7, |bench, rec| {
                let weights = bench.matrix(FORMATS[2], 1, 64, 64);
                let x = bench.activations(n_tokens, 64, F32);
                let out = bench.normal(&[n_tokens, 64], F32);
                let store = Store::Set;
                product(
                    rec,
                    Gemm { label: "test", weights, bias: None, x, out, out_col: 0, store },
                );
                assert_eq!(rec.dispatches[0].shader.stem, stem);
            });
        }
    }

    const ROWS: usize = 160;
    const COLS: usize = 256;

    /// `x [33, COLS]` times packed weights `[ROWS, COLS]` on the GPU.
    fn run(x: &[f32], format: WeightFormat, weights: &[u8], scales: &[f32]) -> Vec<f32> {
        let mut device = gpu();
        let mut weights = weights.to_vec();
        format.interleave(&mut weights, COLS);
        let mut upload = |shape: &[usize], dtype, bytes: &[u8]| {
            let tensor = device.alloc("test", shape, dtype).unwrap();
            device.write(&tensor, bytes);
            tensor
        };
        let x = upload(&[33, COLS], F32, bytemuck::cast_slice(x));
        let weights = upload(&[weights.len()], U8, &weights);
        let scales = match scales.len() {
            0 => weights,
            n => upload(&[n], F32, bytemuck::cast_slice(scales)),
        };
        let out = device.alloc("test", &[33, ROWS], F32).unwrap();
        let weights = Matrix { weights, scales, format, rows: ROWS, cols: COLS, n_experts: 1 };
        let mut rec = Recording::new(&device.caps());
        let store = Store::Set;
        rec.push(Gemm { label: "test", weights, bias: None, x, out, out_col: 0, store });
        let plan = device.prepare(rec).unwrap();
        device.run(&plan).unwrap();
        device.read_now(&out).unwrap()
    }

    #[test]
    fn integers_equal_the_dequantised_weights() {
        let value = |i: usize| (i * 7919 % 1009) as f32 / 504.5 - 1.0;
        let x: Vec<f32> = (0..33 * COLS).map(value).collect();
        for format in &FORMATS[2..] {
            let encoded = format
                .encode("test", ROWS, COLS, |row, out| {
                    out.iter_mut().enumerate().for_each(|(i, w)| *w = value(row * COLS + i + 13));
                })
                .unwrap();
            let (bytes, n) = (format.bytes_per_row(COLS), format.scales_per_row(COLS));
            let plain: Vec<f32> = (0..ROWS)
                .flat_map(|row| {
                    let weights = &encoded.weights[row * bytes..][..bytes];
                    format.decode_row(weights, &encoded.scales[row * n..][..n], COLS)
                })
                .collect();
            let expected = run(&x, WeightFormat::F32, bytemuck::cast_slice(&plain), &[]);
            let actual = run(&x, *format, &encoded.weights, &encoded.scales);
            let square = |x: f32| f64::from(x) * f64::from(x);
            let error: f64 = actual.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
            let power: f64 = expected.iter().map(|&b| square(b)).sum();
            assert!(power > 1.0 && error <= 1e-10 * power, "{format}: {error} of {power}");
        }
    }
}
