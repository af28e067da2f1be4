//! Rows of a checkpoint's tensors that stand above one another in a matrix, and their packing on
//! the host: quantised in parallel, ordered as kernels read them.

use std::ops::Range;

use crate::{
    Result,
    weights::{Encoded, PAD, Source, SourceTensor, WeightFormat, WeightsError, padded},
};

/// Weights packed at a time, bytes; bounds the host memory of loading.
pub(super) const PIECE_BYTES: usize = 32 << 20;

/// Heads of `dim` values stored `stride` apart, so that kernels read whole vec4s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) dim: usize,
    pub(super) stride: usize,
}

impl Heads {
    /// Index in the checkpoint of padded index `i`, unless that is padding.
    pub(super) fn source(self, i: usize) -> Option<usize> {
        let (head, d) = (i / self.stride, i % self.stride);
        (d < self.dim).then_some(head * self.dim + d)
    }
}

/// Output rows that a stacked matrix takes from one tensor.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    /// Tensor name without `.weight`, or all of it where rows of all experts are fused.
    pub(super) name: String,
    /// The tensor of all experts that the rows are in.
    fused: Option<Fused>,
    /// Rows in the checkpoint.
    pub(super) rows: usize,
    /// Rows in the stack; the surplus is zero.
    stacked: usize,
    heads: Option<Heads>,
}

impl Rows {
    /// All rows of a tensor, padded so that the next one starts at a multiple of [`PAD`].
    pub(super) fn all(name: String, rows: usize) -> Self {
        Self { name, fused: None, rows, stacked: padded(rows), heads: None }
    }

    /// All rows of a tensor, with room for so many.
    pub(super) fn with_room(name: String, rows: usize, room: usize) -> Self {
        Self { stacked: padded(room.max(rows)), ..Self::all(name, rows) }
    }

    /// Rows of one expert from the tensor `name` of all experts, padded like [`Rows::all`].
    pub(super) fn fused(name: String, rows: usize, fused: Fused) -> Self {
        Self { fused: Some(fused), ..Self::all(name, rows) }
    }

    /// The rows of `n` heads.
    pub(super) fn heads(name: String, n: usize, heads: Heads) -> Self {
        let rows = n * heads.dim;
        Self { name, fused: None, rows, stacked: n * heads.stride, heads: Some(heads) }
    }

    /// Rows in the stack.
    pub(super) fn stacked(&self) -> usize {
        self.stacked
    }

    pub(super) fn source(&self, i: usize) -> Option<usize> {
        match self.heads {
            Some(heads) => heads.source(i),
            None => (i < self.rows).then_some(i),
        }
    }

    /// Name and shape of the tensor that holds the rows.
    pub(super) fn place(&self, cols: usize) -> (String, Vec<usize>) {
        match self.fused {
            None => (format!("{}.weight", self.name), vec![self.rows, cols]),
            Some(Fused { shape: [experts, rows], .. }) => {
                (self.name.clone(), vec![experts, rows, cols])
            }
        }
    }

    /// The tensor that holds the rows, and the index of the first of them in it.
    fn tensor<'a>(&self, source: &'a dyn Source, cols: usize) -> Result<(SourceTensor<'a>, usize)> {
        let (name, shape) = self.place(cols);
        let first = self.fused.map_or(0, |f| f.expert * f.shape[1] + f.first);
        Ok((source.tensor(&name, &shape)?, first))
    }
}

/// Where rows of one expert lie in a tensor of all experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fused {
    /// Experts in the tensor, and rows of each.
    pub(super) shape: [usize; 2],
    /// This expert.
    pub(super) expert: usize,
    /// Its first row.
    pub(super) first: usize,
}

/// Input columns of a matrix.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cols {
    n: usize,
    heads: Option<Heads>,
}

impl Cols {
    pub(super) fn all(n: usize) -> Self {
        Self { n, heads: None }
    }

    pub(super) fn heads(n: usize, heads: Heads) -> Self {
        Self { n: n * heads.dim, heads: Some(heads) }
    }

    pub(super) fn stacked(&self) -> usize {
        self.heads.map_or(self.n, |heads| self.n / heads.dim * heads.stride)
    }

    /// Reads `row` of `tensor` into `out` `[stacked]`.
    fn row(&self, tensor: &SourceTensor<'_>, row: usize, out: &mut [f32]) {
        let Some(heads) = self.heads else { return tensor.row_into(row, out) };
        let mut values = vec![0.0; self.n];
        tensor.row_into(row, &mut values);
        for (i, out) in out.iter_mut().enumerate() {
            *out = heads.source(i).map_or(0.0, |i| values[i]);
        }
    }
}

/// A vector's values, none of which may be a NaN or infinity; matrices are checked as they are
/// packed.
pub(super) fn finite(tensor: &SourceTensor<'_>) -> Result<Vec<f32>> {
    let values = tensor.to_f32();
    match values.iter().position(|v| !v.is_finite()) {
        None => Ok(values),
        Some(col) => {
            let (name, value) = (tensor.name().to_owned(), values[col]);
            Err(WeightsError::NonFinite { name, row: 0, col, value }.into())
        }
    }
}

/// `n` rows as the device holds them; `row(i)` is where the tensor has row `i`, unless that is
/// padding. Integers that are packed and scaled as wanted are copied, and so stay exactly what they
/// are.
fn pack_rows(
    format: WeightFormat,
    tensor: &SourceTensor<'_>,
    cols: Cols,
    n: usize,
    row: impl Fn(usize) -> Option<usize> + Sync,
) -> Result<Encoded, WeightsError> {
    let width = cols.stacked();
    let n_scales = |f: WeightFormat| f.scales_per_row(width);
    let alike = |f: WeightFormat| {
        f.bits() == format.bits() && n_scales(f) > 0 && n_scales(f) == n_scales(format)
    };
    if cols.heads.is_some() || !tensor.quantized_format().is_some_and(alike) {
        return format.encode(tensor.name(), n, width, |i, out| match row(i) {
            Some(row) => cols.row(tensor, row, out),
            None => out.fill(0.0),
        });
    }
    let mut weights = vec![0; n * format.bytes_per_row(width)];
    let mut scales = vec![0.0; n * n_scales(format)];
    let scales_of = scales.chunks_mut(n_scales(format));
    let rows = weights.chunks_mut(format.bytes_per_row(width)).zip(scales_of);
    for (i, (weights, scales)) in rows.enumerate() {
        if let Some(row) = row(i) {
            let (from, factors) = tensor.packed_row(row);
            weights[..from.len()].copy_from_slice(from);
            scales.copy_from_slice(factors);
        }
    }
    Ok(Encoded { weights, scales })
}

/// Packs rows `range` of a stack piece by piece; `sink` gets the first row of each piece, counted
/// from the range's start.
pub(super) fn pack(
    source: &dyn Source,
    stack: &[Rows],
    range: Range<usize>,
    cols: Cols,
    format: WeightFormat,
    mut sink: impl FnMut(usize, Encoded),
) -> Result<()> {
    let width = cols.stacked();
    // Whole groups of rows that lie interleaved.
    let piece = (PIECE_BYTES / format.bytes_per_row(width) / PAD * PAD).max(PAD);
    let mut start = 0;
    for part in stack {
        let inside = start.max(range.start)..(start + part.stacked).min(range.end);
        if !inside.is_empty() {
            let (tensor, row_0) = part.tensor(source, cols.n)?;
            for first in inside.clone().step_by(piece) {
                let n = piece.min(inside.end - first);
                let row = |i| part.source(first + i - start).map(|row| row_0 + row);
                let mut packed = pack_rows(format, &tensor, cols, n, row)?;
                format.interleave(&mut packed.weights, width);
                sink(first - range.start, packed);
            }
        }
        start += part.stacked;
    }
    Ok(())
}
