//! Where tensors come from: the [`Source`] trait, the tensor it yields, and a source in memory.
//!
//! A source is asked for one tensor by name and shape and checks both, so that no caller ever
//! sees a tensor of another size than its configuration implies. It knows no layer and no format.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use half::{f16, slice::HalfFloatSliceExt};

use super::{WeightFormat, WeightsError};

/// Named tensors of one checkpoint.
pub trait Source: Send + Sync {
    /// Whether the tensor is there: the question for optional tensors (biases, a tied head).
    fn contains(&self, name: &str) -> bool;

    /// All names in ascending order; empty where the source makes up any tensor on demand.
    fn names(&self) -> Vec<String>;

    /// The tensor `name`, which must have exactly this shape.
    ///
    /// # Errors
    /// [`WeightsError::Missing`] with up to three close names, [`WeightsError::Shape`],
    /// [`WeightsError::Dtype`] for integers and quantised types.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<SourceTensor<'_>, WeightsError>;
}

/// Element types that weights may have in a checkpoint, little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceDtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an F32.
    BF16,
    /// Integers that count as they are until [`SourceTensor::with_scales`] scales them.
    I8,
}

impl SourceDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::I8 => 1,
        }
    }
}

/// One tensor as its checkpoint holds it: row-major, little endian, at any alignment.
#[derive(Debug, Clone)]
pub struct SourceTensor<'a> {
    name: String,
    dtype: SourceDtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>, // [shape...] x dtype.size()
    /// Of int8 values: one per row, or one per group of columns; empty without. `[rows, n]`
    scales: Vec<f32>,
}

impl<'a> SourceTensor<'a> {
    /// A tensor over `bytes`, borrowed (a mapped file) or owned.
    ///
    /// # Errors
    /// [`WeightsError::Bytes`] unless there are exactly product(shape) x dtype.size() bytes.
    pub fn new(
        name: impl Into<String>,
        dtype: SourceDtype,
        shape: &[usize],
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Result<Self, WeightsError> {
        let (name, shape, bytes) = (name.into(), shape.to_vec(), bytes.into());
        if n_bytes(&shape, dtype) != Some(bytes.len()) {
            return Err(WeightsError::Bytes { name, shape, dtype, actual: bytes.len() });
        }
        Ok(Self { name, dtype, shape, bytes, scales: Vec::new() })
    }

    /// The same int8 values times `scales` `[rows, n]`, n being 1 or the number of groups of 32,
    /// 64 or 128 columns.
    ///
    /// # Errors
    /// [`WeightsError::Scales`] for another number of them, [`WeightsError::NonFinite`].
    pub fn with_scales(self, scales: Vec<f32>) -> Result<Self, WeightsError> {
        if let Some(i) = scales.iter().position(|scale| !scale.is_finite()) {
            let (n, name) = (scales.len() / self.rows().max(1), scale_name(&self.name));
            let (row, col) = (i / n.max(1), i % n.max(1));
            return Err(WeightsError::NonFinite { name, row, col, value: scales[i] });
        }
        let (n_scales, name) = (scales.len(), self.name.clone());
        let scaled = Self { scales, ..self };
        if scaled.int8_format().is_none() {
            return Err(WeightsError::Scales { name, shape: scaled.shape, n_scales });
        }
        Ok(scaled)
    }

    /// How its int8 values are scaled; `None` where it holds floats or has no scales.
    pub fn int8_format(&self) -> Option<WeightFormat> {
        let formats = [None, Some(32), Some(64), Some(128)].map(|group| WeightFormat::W8 { group });
        let n = |format: &WeightFormat| self.rows() * format.scales_per_row(self.cols());
        let fits = |format: &WeightFormat| n(format) == self.scales.len();
        let scaled = self.dtype == SourceDtype::I8 && !self.scales.is_empty();
        formats.into_iter().find(|format| scaled && fits(format))
    }

    /// One row of int8 values `[cols]` and its scales, none where it has none.
    ///
    /// # Panics
    /// Where `row >= rows()`, or the tensor holds floats.
    pub fn int8_row(&self, row: usize) -> (&[u8], &[f32]) {
        assert_eq!(self.dtype, SourceDtype::I8, "{:?} holds int8", self.name);
        let n = self.scales.len() / self.rows();
        (&self.bytes[row * self.cols()..][..self.cols()], &self.scales[row * n..][..n])
    }

    /// Name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Element type of [`bytes`](Self::bytes).
    pub fn dtype(&self) -> SourceDtype {
        self.dtype
    }

    /// Dimensions, the slowest first; empty for a scalar.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as they lie in the checkpoint.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Product of all dimensions but the last; 1 for a vector or a scalar.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, leading)| leading.iter().product())
    }

    /// The last dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Converts one row to f32. `out`: `[cols]`.
    ///
    /// # Panics
    /// Where `row >= rows()` or `out.len() != cols()`.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.cols(), "out holds one row of {:?}", self.name);
        assert!(row < self.rows(), "row {row} of {:?} with {} rows", self.name, self.rows());
        if let Some(format) = self.int8_format() {
            let (bytes, scales) = self.int8_row(row);
            return out.copy_from_slice(&format.decode_row(bytes, scales, self.cols()));
        }
        let row_bytes = self.cols() * self.dtype.size();
        convert(self.dtype, &self.bytes[row * row_bytes..][..row_bytes], out);
    }

    /// The whole tensor as f32. Returns `[rows, cols]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.bytes.len() / self.dtype.size()];
        if self.scales.is_empty() {
            convert(self.dtype, &self.bytes, &mut out);
        } else {
            let rows = out.chunks_mut(self.cols()).enumerate();
            rows.for_each(|(row, out)| self.row_into(row, out));
        }
        out
    }
}

/// Product(shape) x size of `dtype`, or `None` where that overflows. A zero anywhere is no excuse
/// for an overflow elsewhere: `rows()` multiplies the leading dimensions alone.
pub(super) fn n_bytes(shape: &[usize], dtype: SourceDtype) -> Option<usize> {
    shape.iter().filter(|&&dim| dim != 0).try_fold(dtype.size(), |n, &dim| n.checked_mul(dim))?;
    Some(shape.iter().product::<usize>() * dtype.size())
}

/// Little-endian elements at any alignment to f32, exactly. `bytes.len() == out.len() * size`.
fn convert(dtype: SourceDtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        SourceDtype::I8 => {
            for (&element, out) in bytes.iter().zip(out) {
                *out = f32::from(element as i8);
            }
        }
        SourceDtype::F32 => {
            for (&element, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_le_bytes(element);
            }
        }
        SourceDtype::BF16 => {
            for (&element, out) in bytes.as_chunks().0.iter().zip(out) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(element)) << 16);
            }
        }
        // The hardware converts f16 in bulk only (F16C, NEON), from aligned memory: a block on
        // the stack serves any alignment and stays in the first-level cache.
        SourceDtype::F16 => {
            let mut block = [f16::ZERO; 256];
            for (bytes, out) in bytes.chunks(2 * block.len()).zip(out.chunks_mut(block.len())) {
                let block = &mut block[..out.len()];
                for (&element, half) in bytes.as_chunks().0.iter().zip(block.iter_mut()) {
                    *half = f16::from_le_bytes(element);
                }
                block.convert_to_f32_slice(out);
            }
        }
    }
}

/// Tensors in memory: tests, and checkpoints that arrive over the network.
#[derive(Debug, Clone, Default)]
pub struct MemorySource {
    tensors: BTreeMap<String, SourceTensor<'static>>,
}

impl MemorySource {
    /// An empty source.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a tensor, or replaces the one of the same name.
    pub fn insert(&mut self, tensor: SourceTensor<'static>) {
        self.tensors.insert(tensor.name.clone(), tensor);
    }

    /// Adds an F32 tensor. `values`: `[shape...]`.
    ///
    /// # Errors
    /// [`WeightsError::Bytes`] unless there are exactly product(shape) values.
    pub fn insert_f32(
        &mut self,
        name: &str,
        shape: &[usize],
        values: &[f32],
    ) -> Result<(), WeightsError> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.insert(SourceTensor::new(name, SourceDtype::F32, shape, bytes)?);
        Ok(())
    }
}

impl Source for MemorySource {
    fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn tensor(&self, name: &str, shape: &[usize]) -> Result<SourceTensor<'_>, WeightsError> {
        let memory = Path::new("memory");
        let tensor =
            self.tensors.get(name).ok_or_else(|| missing(name, memory, self.tensors.keys()))?;
        check_shape(name, memory, shape, &tensor.shape)?;
        let bytes = Cow::Borrowed(&*tensor.bytes);
        let (dtype, scales) = (tensor.dtype, tensor.scales.clone());
        Ok(SourceTensor { name: name.into(), dtype, shape: shape.into(), bytes, scales })
    }
}

/// What the scales of an int8 tensor are called.
pub fn scale_name(name: &str) -> String {
    format!("{name}_scale")
}

/// The error for an absent tensor, with the names of `file` that resemble it most.
///
/// Checkpoint names are dotted paths that differ in one part, so likeness is the length of the
/// common beginning plus that of the common end; half of the name must agree.
pub(super) fn missing<'n>(
    name: &str,
    file: &Path,
    names: impl Iterator<Item = &'n String>,
) -> WeightsError {
    let alike = |other: &str| {
        let prefix = name.bytes().zip(other.bytes()).take_while(|(a, b)| a == b).count();
        let rest = name.bytes().rev().zip(other.bytes().rev());
        let limit = name.len().min(other.len()) - prefix;
        prefix + rest.take(limit).take_while(|(a, b)| a == b).count()
    };
    let mut close: Vec<(usize, &String)> = names
        .map(|other| (alike(other), other))
        .filter(|&(alike, _)| 2 * alike >= name.len())
        .collect();
    close.sort_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(b.1)));
    let close = close.into_iter().take(3).map(|(_, name)| name.clone()).collect();
    WeightsError::Missing { name: name.into(), file: file.into(), close }
}

/// Checks the shape found in `file` against the one that the caller expects.
pub(super) fn check_shape(
    name: &str,
    file: &Path,
    expected: &[usize],
    actual: &[usize],
) -> Result<(), WeightsError> {
    if expected == actual {
        return Ok(());
    }
    Err(WeightsError::Shape {
        name: name.into(),
        file: file.into(),
        expected: expected.into(),
        actual: actual.into(),
    })
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    const VALUES: [f32; 6] = [1.0, -2.5, 0.0, 65504.0, -0.000_061_035_156, 3.140_625];

    /// `VALUES` in `dtype`, after one byte that spoils the alignment.
    fn unaligned(dtype: SourceDtype) -> Vec<u8> {
        let mut bytes = vec![0xAA];
        for value in VALUES {
            match dtype {
                SourceDtype::F32 => bytes.extend(value.to_le_bytes()),
                SourceDtype::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                SourceDtype::BF16 => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                SourceDtype::I8 => bytes.push(value as i8 as u8),
            }
        }
        bytes
    }

    #[test]
    fn every_dtype_converts_at_any_alignment() {
        use SourceDtype::{BF16, F16, F32, I8};
        for dtype in [F32, F16, BF16, I8] {
            let expected = VALUES.map(|value| match dtype {
                SourceDtype::F32 => value,
                SourceDtype::F16 => f16::from_f32(value).to_f32(),
                SourceDtype::BF16 => bf16::from_f32(value).to_f32(),
                SourceDtype::I8 => f32::from(value as i8),
            });
            let bytes = unaligned(dtype);
            let tensor = SourceTensor::new("t", dtype, &[2, 3], &bytes[1..]).unwrap();
            assert_eq!(tensor.to_f32(), expected);
            let mut row = [0.0; 3];
            tensor.row_into(1, &mut row);
            assert_eq!(row, expected[3..]);
            let aligned = bytes[1..].to_vec();
            let tensor = SourceTensor::new("t", dtype, &[6], aligned).unwrap();
            assert_eq!(tensor.to_f32(), expected);
        }
    }

    #[test]
    fn f16_converts_across_blocks_and_keeps_special_values() {
        let bits: Vec<u16> = (0..=u16::MAX).collect();
        let bytes: Vec<u8> = bits.iter().flat_map(|bits| bits.to_le_bytes()).collect();
        for (dtype, exact) in [
            (SourceDtype::F16, (|b| f16::from_bits(b).to_f32()) as fn(u16) -> f32),
            (SourceDtype::BF16, |b| bf16::from_bits(b).to_f32()),
        ] {
            let tensor = SourceTensor::new("t", dtype, &[1 << 16], &bytes[..]).unwrap();
            for (&bits, value) in bits.iter().zip(tensor.to_f32()) {
                let expected = exact(bits);
                assert!(value == expected || value.is_nan() && expected.is_nan(), "{bits:#x}");
            }
        }
    }

    #[test]
    fn int8_values_are_scaled_by_row_or_group() {
        let bytes: Vec<u8> = (0..2 * 40).map(|i| i as u8).collect();
        let int8 = || SourceTensor::new("w", SourceDtype::I8, &[2, 40], bytes.clone()).unwrap();
        assert_eq!((int8().int8_format(), int8().to_f32()[41]), (None, 41.0));
        let rows = int8().with_scales(vec![1.0, 0.5]).unwrap();
        assert_eq!(rows.int8_format(), Some(WeightFormat::W8 { group: None }));
        assert_eq!(rows.to_f32()[39..41], [39.0, 20.0]);
        let groups = int8().with_scales(vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(groups.int8_format(), Some(WeightFormat::W8 { group: Some(32) }));
        let mut row = [0.0; 40];
        groups.row_into(1, &mut row);
        assert_eq!((row[31], row[32]), (71.0 * 3.0, 72.0 * 4.0));
        assert_eq!(groups.int8_row(1), (&bytes[40..], &[3.0, 4.0][..]));
        let error = int8().with_scales(vec![1.0; 5]).unwrap_err().to_string();
        assert!(error.contains("\"w\"") && error.contains("5 scales"), "{error}");
        let error = int8().with_scales(vec![1.0, f32::NAN]).unwrap_err().to_string();
        assert!(error.contains("\"w_scale\"") && error.contains("row 1"), "{error}");
    }

    #[test]
    fn rows_and_cols_of_every_rank() {
        for (shape, rows, cols) in [
            (&[][..], 1, 1),
            (&[5][..], 1, 5),
            (&[4, 5][..], 4, 5),
            (&[3, 4, 5][..], 12, 5),
            (&[0, 5][..], 0, 5),
            (&[5, 0][..], 5, 0),
        ] {
            let bytes = vec![0; shape.iter().product::<usize>() * 2];
            let tensor = SourceTensor::new("t", SourceDtype::F16, shape, bytes).unwrap();
            assert_eq!((tensor.rows(), tensor.cols()), (rows, cols), "{shape:?}");
        }
    }

    #[test]
    fn wrong_byte_counts_are_errors() {
        for shape in [&[2, 3][..], &[usize::MAX, 2], &[0, usize::MAX, 2], &[]] {
            let error = SourceTensor::new("a.weight", SourceDtype::F16, shape, vec![0; 11]);
            let error = error.unwrap_err().to_string();
            assert!(error.contains("\"a.weight\"") && error.contains("11 bytes"), "{error}");
        }
    }

    #[test]
    fn memory_source_checks_name_and_shape() {
        let mut source = MemorySource::new();
        for name in ["layers.1.mlp.gate.weight", "layers.0.mlp.router.weight", "head.bias"] {
            source.insert_f32(name, &[2, 3], &VALUES).unwrap();
        }
        assert!(source.contains("head.bias") && !source.contains("head.weight"));
        assert_eq!(source.names()[0], "head.bias");
        let tensor = source.tensor("head.bias", &[2, 3]).unwrap();
        assert_eq!((tensor.name(), tensor.to_f32()), ("head.bias", VALUES.to_vec()));

        let error = source.tensor("layers.0.mlp.gate.weight", &[2, 3]).unwrap_err().to_string();
        let close = "close names: layers.1.mlp.gate.weight, layers.0.mlp.router.weight)";
        assert!(error.contains(close), "{error}");
        let error = source.tensor("x", &[2, 3]).unwrap_err().to_string();
        assert!(!error.contains("close names"), "{error}");
        let error = source.tensor("head.bias", &[3, 2]).unwrap_err().to_string();
        assert!(error.contains("shape [2, 3] where the model needs [3, 2]"), "{error}");
    }
}
