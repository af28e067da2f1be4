//! Weight matrices on the device, as the product kernels bind them.

use crate::{
    device::{Caps, Shader, Tensor},
    weights::WeightFormat,
};

use super::{has_subgroup_sums, sum_lanes};

/// A handle to packed weights `[n_experts, rows, cols]`, rows and columns padded with zeros to a
/// multiple of [`crate::weights::PAD`]. A plain matrix has one expert.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Matrix {
    /// Packed rows, [interleaved](WeightFormat::interleave). U8 `[n_experts, rows, row bytes]`
    pub weights: Tensor,
    /// Scales of integers, F32 `[n_experts, rows, scales_per_row]`; `weights` again for floats,
    /// whose kernels never read it.
    pub scales: Tensor,
    /// How weights are packed.
    pub format: WeightFormat,
    /// Output features with padding.
    pub rows: usize,
    /// Input features with padding.
    pub cols: usize,
    /// Matrices in this bank.
    pub n_experts: usize,
}

/// What a product kernel does with its sums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Store {
    /// `out = y`
    Set,
    /// `out += y`
    Add,
    /// `out = silu(y of the first half of the rows) * (y of the second half)`
    Gated,
}

impl Matrix {
    /// 16-byte chunks in a packed row.
    pub(crate) fn n_chunks(&self) -> u32 {
        (self.format.bytes_per_row(self.cols) / 16) as u32
    }

    /// Scales of a row.
    pub(crate) fn scales_per_row(&self) -> u32 {
        self.format.scales_per_row(self.cols) as u32
    }

    /// Whether weights are int8 with one scale per row.
    pub(crate) fn is_int8(&self) -> bool {
        matches!(self.format, WeightFormat::W8 { group: None } | WeightFormat::W8A8)
    }

    /// Bytes that are allocated, and those that one matrix of `rows` and `cols` needs without
    /// padding.
    pub(crate) fn bytes(&self, rows: usize, cols: usize) -> (u64, u64) {
        let n_scales = self.format.scales_per_row(cols);
        let scales = if n_scales > 0 { self.scales.bytes() } else { 0 };
        let row = self.format.source_dtype().row_bytes(cols) + n_scales * size_of::<f32>();
        (self.weights.bytes() + scales, (rows * row) as u64)
    }

    /// Fills the shader's `weight` slot and its overrides.
    pub(crate) fn shader(&self, shader: Shader) -> Shader {
        match self.format {
            WeightFormat::F32 => shader.slot("weight", "f32"),
            WeightFormat::F16 => shader.slot("weight", "f16"),
            WeightFormat::W8 { group } => {
                shader.slot("weight", "w8").set("GROUP", group.unwrap_or(0) as u32)
            }
            WeightFormat::W8A8 => shader.slot("weight", "w8").set("GROUP", 0u32),
            WeightFormat::W4 { group } => shader.slot("weight", "w4").set("GROUP", group as u32),
        }
    }
}

/// How the threads of a workgroup share rows of weights in `include/dot_rows.wgsl`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowShare {
    /// Threads of the workgroup.
    pub(crate) threads: u32,
    /// Threads that share the chunks of a row.
    pub(crate) lanes: u32,
    /// Threads that add up to a sum; at least `lanes`.
    pub(crate) share: u32,
    /// Chunks of a row if its loop is to be unrolled, else 0.
    chunks: u32,
}

/// Threads that keep a large GPU busy.
const MANY_THREADS: u32 = 1 << 16;

impl RowShare {
    /// Shares the rows of `weights`, four at a time, for `n_quads` of these products at once. Each
    /// reads its weights for `tokens` rows of activations.
    pub(crate) fn of(caps: &Caps, weights: &Matrix, n_quads: u32, tokens: u32) -> Self {
        if caps.software {
            return Self::software(caps);
        }
        let n_chunks = weights.n_chunks();
        let mut lanes = 32;
        while lanes < 128 && n_quads * lanes < MANY_THREADS && n_chunks >= 2 * lanes {
            lanes *= 2;
        }
        Self { threads: 128, lanes, share: lanes, chunks: unrolled(n_chunks, lanes, tokens) }
    }

    /// Shares rows and, between groups of threads, up to `n_slots` vectors that they are
    /// multiplied with.
    pub(crate) fn of_slots(caps: &Caps, weights: &Matrix, n_slots: u32) -> Self {
        if caps.software {
            return Self::software(caps);
        }
        let (threads, n_chunks) = (128, weights.n_chunks());
        let lanes = (threads / n_slots.next_power_of_two()).clamp(8, 64);
        Self { threads, lanes, share: threads, chunks: unrolled(n_chunks, lanes, 1) }
    }

    /// Few threads and short code, since a CPU runs threads one after another and takes seconds
    /// to compile long code. Where barriers are all that threads can sum with, each has rows of
    /// its own.
    fn software(caps: &Caps) -> Self {
        let (threads, lanes) = if has_subgroup_sums(caps) { (64, 8) } else { (16, 1) };
        Self { threads, lanes, share: lanes, chunks: 0 }
    }

    /// Features that a workgroup computes, of which a group of threads has four, or eight.
    pub(crate) fn rows(&self, pair: bool) -> u32 {
        self.threads / self.share * if pair { 8 } else { 4 }
    }

    /// Fills the slot `sum` and sets the overrides.
    pub(crate) fn shader(&self, shader: Shader, caps: &Caps) -> Shader {
        let (shader, sublanes) = sum_lanes(shader, caps, self.share.min(32));
        shader
            .set("THREADS", self.threads)
            .set("LANES", self.lanes)
            .set("SHARE", self.share)
            .set("SUBLANES", sublanes)
            .set("CHUNKS", self.chunks)
            .set("SHORT", caps.software)
    }
}

/// Chunks of a row if not too much code comes of unrolling, else 0.
fn unrolled(n_chunks: u32, lanes: u32, tokens: u32) -> u32 {
    if n_chunks.div_ceil(lanes) * tokens <= 16 { n_chunks } else { 0 }
}

/// A twin's view of the bindings `weights` and `scales` of a product kernel.
pub(crate) struct Rows<'a> {
    weights: &'a [u8],
    scales: &'a [f32],
    format: WeightFormat,
    /// Input features with padding.
    pub(crate) cols: usize,
}

impl<'a> Rows<'a> {
    /// Rows of `n_chunks` 16-byte chunks in the format that `shader` was built for.
    pub(crate) fn new(
        weights: &'a [u8],
        scales: &'a [f32],
        shader: &Shader,
        n_chunks: u32,
    ) -> Self {
        let group = shader.override_value("GROUP").unwrap_or(0) as usize;
        let format = match shader.slot_value("weight") {
            Some("f32") => WeightFormat::F32,
            Some("f16") => WeightFormat::F16,
            Some("w4") => WeightFormat::W4 { group },
            _ => WeightFormat::W8 { group: (group > 0).then_some(group) },
        };
        Self { weights, scales, format, cols: n_chunks as usize * 16 * 8 / format.bits() }
    }

    /// A row, unpacked. `[cols]`
    pub(crate) fn row(&self, row: usize) -> Vec<f32> {
        let n = self.format.scales_per_row(self.cols);
        self.format.decode_row(
            &self.format.interleaved_row(self.weights, self.cols, row),
            self.scales.get(row * n..(row + 1) * n).unwrap_or_default(),
            self.cols,
        )
    }
}

/// Sum of products in f64. Eight partial sums, which a CPU adds side by side.
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f64 {
    let n = a.len().min(b.len());
    let ((a8, a_rest), (b8, b_rest)) = (a[..n].as_chunks::<8>(), b[..n].as_chunks::<8>());
    let mut sums = [0.0; 8];
    for (a, b) in a8.iter().zip(b8) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += f64::from(a) * f64::from(b);
        }
    }
    let rest = a_rest.iter().zip(b_rest).map(|(&a, &b)| f64::from(a) * f64::from(b));
    sums.into_iter().chain(rest).sum()
}

/// x times the logistic function of x (Elfwing et al. 2017).
pub(crate) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}
