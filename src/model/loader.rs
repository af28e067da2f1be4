//! From a checkpoint's tensors to packed matrices on the device: one tensor in flight, quantised
//! in parallel. The same code without a device counts the bytes that a model will need.

use std::{fmt, ops::Range};

use crate::{
    Result,
    device::{Allocate, Caps, DType, Device, DeviceError, Memory, Tally, Tensor},
    kernels::Matrix,
    weights::{Encoded, PAD, Source, SourceTensor, WeightFormat, WeightsError, padded},
};

use super::{ModelError, linear::Linear};

/// Weights packed and uploaded at a time, bytes; bounds the host memory of loading.
const PIECE_BYTES: usize = 32 << 20;

/// Number formats of a loaded model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Precision {
    /// Routed experts.
    pub experts: WeightFormat,
    /// All other matrices but the routers.
    pub rest: WeightFormat,
    /// Activations that feed matrix products, and the KV cache: F32 or F16.
    pub activations: DType,
}

impl Precision {
    /// What `--weights FORMAT` means: integers are for the experts, everything else stays f16; f32
    /// keeps activations in f32, too.
    pub fn of(format: WeightFormat) -> Self {
        match format {
            WeightFormat::F32 => Self { experts: format, rest: format, activations: DType::F32 },
            _ => Self { experts: format, rest: WeightFormat::F16, activations: DType::F16 },
        }
    }
}

impl fmt::Display for Precision {
    /// The experts' format, and the others' unless it is what goes with that.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { experts, rest, .. } = self;
        match *rest == Self::of(*experts).rest {
            true => write!(f, "{experts}"),
            false => write!(f, "{experts}/{rest}"),
        }
    }
}

/// Heads of `dim` values stored `stride` apart, so that kernels read whole vec4s.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub(super) dim: usize,
    pub(super) stride: usize,
}

impl Heads {
    /// Index in the checkpoint of padded index `i`, unless that is padding.
    fn source(self, i: usize) -> Option<usize> {
        let (head, d) = (i / self.stride, i % self.stride);
        (d < self.dim).then_some(head * self.dim + d)
    }
}

/// Output rows that a stacked matrix takes from one tensor.
#[derive(Debug, Clone)]
pub(super) struct Rows {
    /// Tensor name without `.weight`, or all of it where rows of all experts are fused.
    name: String,
    /// The tensor of all experts that the rows are in.
    fused: Option<Fused>,
    /// Rows in the checkpoint.
    rows: usize,
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

    fn source(&self, i: usize) -> Option<usize> {
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

    fn stacked(&self) -> usize {
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

/// Loads tensors, or only counts them.
pub(super) struct Loader<'a> {
    target: Target<'a>,
    caps: Caps,
    progress: &'a dyn Fn(u64),
    /// Where it allocates.
    memory: Memory,
}

enum Target<'a> {
    Device(&'a dyn Source, &'a mut Device),
    Tally(&'a mut Tally),
}

impl<'a> Loader<'a> {
    /// Loads from `source` to `device`; `progress` hears of bytes uploaded.
    pub(super) fn new(
        source: &'a dyn Source,
        device: &'a mut Device,
        progress: &'a dyn Fn(u64),
    ) -> Self {
        let caps = device.caps();
        Self { caps, target: Target::Device(source, device), progress, memory: Memory::Device }
    }

    /// Counts only.
    pub(super) fn counting(tally: &'a mut Tally) -> Self {
        let caps = tally.caps.clone();
        Self { caps, target: Target::Tally(tally), progress: &|_| {}, memory: Memory::Device }
    }

    /// Of the device.
    pub(super) fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Whether the checkpoint has a tensor; false where nothing is read.
    pub(super) fn contains(&self, name: &str) -> bool {
        matches!(&self.target, Target::Device(source, _) if source.contains(name))
    }

    /// Zeros, which kernels write.
    pub(super) fn alloc(&mut self, what: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        let target: &mut dyn Allocate = match &mut self.target {
            Target::Device(_, device) => *device,
            Target::Tally(tally) => *tally,
        };
        Ok(target.alloc_in(self.memory, what, shape, dtype)?)
    }

    /// What `load` loads stays in the host's memory.
    pub(super) fn on_host<T>(&mut self, load: impl FnOnce(&mut Self) -> T) -> T {
        self.memory = Memory::Host;
        let loaded = load(self);
        self.memory = Memory::Device;
        loaded
    }

    /// A table that the host writes.
    pub(super) fn table(&mut self, what: &str, shape: &[usize], values: &[i32]) -> Result<Tensor> {
        let tensor = self.alloc(what, shape, DType::I32)?;
        if let Target::Device(_, device) = &mut self.target {
            device.write(&tensor, values);
        }
        Ok(tensor)
    }

    /// A vector of f32 `[padded(sum of lengths)]`: tensors one after another.
    pub(super) fn vector(&mut self, parts: &[(String, usize, Option<Heads>)]) -> Result<Tensor> {
        self.vector_with_room(parts, 0)
    }

    /// [`Loader::vector`] with room for so many values more.
    pub(super) fn vector_with_room(
        &mut self,
        parts: &[(String, usize, Option<Heads>)],
        room: usize,
    ) -> Result<Tensor> {
        let length = |n: usize, heads: Option<Heads>| heads.map_or(n, |h| n / h.dim * h.stride);
        let total = room + parts.iter().map(|(_, n, heads)| length(*n, *heads)).sum::<usize>();
        let tensor = self.alloc(&parts[0].0, &[padded(total)], DType::F32)?;
        let Target::Device(source, device) = &mut self.target else { return Ok(tensor) };
        let mut values = Vec::with_capacity(padded(total));
        for (name, n, heads) in parts {
            let from = finite(&source.tensor(name, &[*n])?)?;
            match heads {
                None => values.extend(from),
                Some(heads) => values.extend(
                    (0..length(*n, Some(*heads))).map(|i| heads.source(i).map_or(0.0, |i| from[i])),
                ),
            }
        }
        values.resize(padded(total), 0.0);
        device.write(&tensor, &values);
        (self.progress)(tensor.bytes());
        Ok(tensor)
    }

    /// Rows stacked into one matrix, or several where a binding cannot hold it. `bias` says
    /// whether each tensor has a `.bias` beside its `.weight`.
    pub(super) fn linear(
        &mut self,
        rows: &[Rows],
        cols: Cols,
        format: WeightFormat,
        bias: bool,
    ) -> Result<Linear> {
        if format == WeightFormat::W8A8 {
            return Err(ModelError::Int8Activations { what: "experts only" }.into());
        }
        let total = padded(rows.iter().map(|r| r.stacked).sum());
        let row_bytes = format.bytes_per_row(cols.stacked());
        let most = self.rows_per_buffer(&rows[0].name, row_bytes, total)?;
        let mut parts = Vec::new();
        for first in (0..total).step_by(most) {
            let range = first..(first + most).min(total);
            let matrix = self.matrix(&rows[0].name, 1, range.len(), cols, format)?;
            self.fill(&matrix, 0, rows, range.clone(), cols)?;
            let bias = if bias { Some(self.bias(rows, range)?) } else { None };
            parts.push((first, matrix, bias));
        }
        Ok(Linear { parts })
    }

    /// A bank per group of `n_places` that fits a binding: (first place, matrices). The first
    /// places are filled with `experts`.
    pub(super) fn banks(
        &mut self,
        experts: &[usize],
        n_places: usize,
        rows: impl Fn(usize) -> Vec<Rows>,
        cols: Cols,
        format: WeightFormat,
    ) -> Result<Vec<(usize, Matrix)>> {
        let banks = self.empty_banks(n_places, &rows(0), cols, format)?;
        self.fill_banks(&banks, experts, rows, cols)?;
        Ok(banks)
    }

    /// Banks with room for `n_experts` experts whose rows are as those of `stack`.
    fn empty_banks(
        &mut self,
        n_experts: usize,
        stack: &[Rows],
        cols: Cols,
        format: WeightFormat,
    ) -> Result<Vec<(usize, Matrix)>> {
        let total = padded(stack.iter().map(|r| r.stacked).sum());
        let expert_bytes = total * format.bytes_per_row(cols.stacked());
        let most = (self.max_binding() / expert_bytes.max(1)).min(n_experts.max(1));
        if most == 0 {
            return Err(self.too_large(&stack[0].name, expert_bytes));
        }
        let firsts = (0..n_experts).step_by(most);
        firsts
            .map(|first| {
                let n = most.min(n_experts - first);
                Ok((first, self.matrix(&stack[0].name, n, total, cols, format)?))
            })
            .collect()
    }

    fn fill_banks(
        &mut self,
        banks: &[(usize, Matrix)],
        experts: &[usize],
        rows: impl Fn(usize) -> Vec<Rows>,
        cols: Cols,
    ) -> Result<()> {
        for (first, matrix) in banks {
            let here = experts.iter().skip(*first).take(matrix.n_experts);
            for (place, &expert) in here.enumerate() {
                self.fill(matrix, place, &rows(expert), 0..matrix.rows, cols)?;
            }
        }
        Ok(())
    }

    fn max_binding(&self) -> usize {
        let limit = self.caps.max_binding_bytes.min(self.caps.max_buffer_bytes);
        usize::try_from(limit).unwrap_or(usize::MAX)
    }

    fn too_large(&self, what: &str, bytes: usize) -> crate::Error {
        let limit = self.max_binding() as u64;
        DeviceError::TooLarge { what: what.to_owned(), bytes: bytes as u64, limit }.into()
    }

    fn rows_per_buffer(&self, what: &str, row_bytes: usize, total: usize) -> Result<usize> {
        let most = self.max_binding() / row_bytes / PAD * PAD;
        if most == 0 { Err(self.too_large(what, row_bytes * PAD)) } else { Ok(most.min(total)) }
    }

    fn matrix(
        &mut self,
        what: &str,
        n_experts: usize,
        rows: usize,
        cols: Cols,
        format: WeightFormat,
    ) -> Result<Matrix> {
        let row_bytes = format.bytes_per_row(cols.stacked());
        let weights = self.alloc(what, &[n_experts, rows, row_bytes], DType::U8)?;
        let scales = match format.scales_per_row(cols.stacked()) {
            0 => weights,
            n => self.alloc(what, &[n_experts, rows, n], DType::F32)?,
        };
        let cols = padded(cols.stacked());
        Ok(Matrix { weights, scales, format, rows, cols, n_experts })
    }

    /// Packs rows `range` of the stack into the rows of `expert`, piece by piece.
    fn fill(
        &mut self,
        matrix: &Matrix,
        expert: usize,
        stack: &[Rows],
        range: Range<usize>,
        cols: Cols,
    ) -> Result<()> {
        let Target::Device(source, device) = &mut self.target else { return Ok(()) };
        let row_bytes = matrix.format.bytes_per_row(cols.stacked()) as u64;
        let scale_bytes = matrix.format.scales_per_row(cols.stacked()) as u64 * 4;
        pack(*source, stack, range, cols, matrix.format, |row, packed| {
            let at = (expert * matrix.rows + row) as u64;
            device.write_at(&matrix.weights, at * row_bytes, &packed.weights);
            if scale_bytes > 0 {
                let bytes = bytemuck::cast_slice(&packed.scales);
                device.write_at(&matrix.scales, at * scale_bytes, bytes);
            }
            (self.progress)(packed.weights.len() as u64);
        })
    }

    fn bias(&mut self, stack: &[Rows], range: Range<usize>) -> Result<Tensor> {
        let tensor = self.alloc("bias", &[range.len()], DType::F32)?;
        let Target::Device(source, device) = &mut self.target else { return Ok(tensor) };
        let mut values = Vec::new();
        for part in stack {
            let bias = finite(&source.tensor(&format!("{}.bias", part.name), &[part.rows])?)?;
            values.extend((0..part.stacked).map(|i| part.source(i).map_or(0.0, |i| bias[i])));
        }
        values.resize(values.len().max(range.end), 0.0);
        device.write(&tensor, &values[range]);
        Ok(tensor)
    }
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
