//! From a checkpoint's tensors to packed matrices on the device, a few experts in flight. The same
//! code without a device counts the bytes that a model will need.

use std::{fmt, ops::Range};

use crate::{
    Result,
    device::{Allocate, Caps, DType, Device, DeviceError, Memory, Tally, Tensor},
    kernels::Matrix,
    weights::{Encoded, PAD, Source, WeightFormat, map_all, padded},
};

use super::{
    ModelError,
    linear::Linear,
    rows::{Cols, Heads, PIECE_BYTES, Rows, finite, pack},
};

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
        let total = padded(rows.iter().map(|r| r.stacked()).sum());
        let row_bytes = format.bytes_per_row(cols.stacked());
        let most = self.rows_per_buffer(&rows[0].name, row_bytes, total)?;
        let mut parts = Vec::new();
        for first in (0..total).step_by(most) {
            let range = first..(first + most).min(total);
            let matrix = self.matrix(&rows[0].name, 1, range.len(), cols, format)?;
            self.fill(&matrix, rows, range.clone(), cols)?;
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
        rows: impl Fn(usize) -> Vec<Rows> + Sync,
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
        let total = padded(stack.iter().map(|r| r.stacked()).sum());
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

    /// Experts are packed side by side, as many as a piece holds: one alone is too little work for
    /// the host's cores.
    fn fill_banks(
        &mut self,
        banks: &[(usize, Matrix)],
        experts: &[usize],
        rows: impl Fn(usize) -> Vec<Rows> + Sync,
        cols: Cols,
    ) -> Result<()> {
        let Target::Device(source, _) = &self.target else { return Ok(()) };
        let source = *source;
        for (first, matrix) in banks {
            let here = experts.iter().skip(*first).take(matrix.n_experts);
            let here: Vec<(usize, usize)> = here.copied().enumerate().collect();
            let expert_bytes = matrix.rows * matrix.format.bytes_per_row(cols.stacked());
            let side_by_side = (PIECE_BYTES / expert_bytes.max(1)).max(1);
            for experts in here.chunks(side_by_side) {
                let packed = map_all(experts, |&(place, expert)| {
                    pack_expert(source, &rows(expert), matrix, place, cols)
                });
                for pieces in packed {
                    for (row, piece) in pieces? {
                        self.upload(matrix, row, cols, &piece);
                    }
                }
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

    /// Packs rows `range` of the stack into those of a matrix, piece by piece.
    fn fill(
        &mut self,
        matrix: &Matrix,
        stack: &[Rows],
        range: Range<usize>,
        cols: Cols,
    ) -> Result<()> {
        let Target::Device(source, _) = &self.target else { return Ok(()) };
        let source = *source;
        pack(source, stack, range, cols, matrix.format, |row, piece| {
            self.upload(matrix, row, cols, &piece);
        })
    }

    /// Writes packed rows from `row` of a matrix on.
    fn upload(&mut self, matrix: &Matrix, row: usize, cols: Cols, packed: &Encoded) {
        let Target::Device(_, device) = &mut self.target else { return };
        let row_bytes = matrix.format.bytes_per_row(cols.stacked()) as u64;
        let scale_bytes = matrix.format.scales_per_row(cols.stacked()) as u64 * 4;
        device.write_at(&matrix.weights, row as u64 * row_bytes, &packed.weights);
        if scale_bytes > 0 {
            let bytes = bytemuck::cast_slice(&packed.scales);
            device.write_at(&matrix.scales, row as u64 * scale_bytes, bytes);
        }
        (self.progress)(packed.weights.len() as u64);
    }

    fn bias(&mut self, stack: &[Rows], range: Range<usize>) -> Result<Tensor> {
        let tensor = self.alloc("bias", &[range.len()], DType::F32)?;
        let Target::Device(source, device) = &mut self.target else { return Ok(tensor) };
        let mut values = Vec::new();
        for part in stack {
            let bias = finite(&source.tensor(&format!("{}.bias", part.name), &[part.rows])?)?;
            values.extend((0..part.stacked()).map(|i| part.source(i).map_or(0.0, |i| bias[i])));
        }
        values.resize(values.len().max(range.end), 0.0);
        device.write(&tensor, &values[range]);
        Ok(tensor)
    }
}

/// The rows of an expert: which of the bank's each piece begins with.
fn pack_expert(
    source: &dyn Source,
    stack: &[Rows],
    bank: &Matrix,
    place: usize,
    cols: Cols,
) -> Result<Vec<(usize, Encoded)>> {
    let (mut pieces, first) = (Vec::new(), place * bank.rows);
    pack(source, stack, 0..bank.rows, cols, bank.format, |row, piece| {
        pieces.push((first + row, piece));
    })?;
    Ok(pieces)
}
