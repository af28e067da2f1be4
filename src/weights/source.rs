//! Where tensors come from: the [`Source`] trait, the tensor it yields, and a source in memory.
//!
//! A source is asked for one tensor by name and shape and checks both, so that no caller ever
//! sees a tensor of another size than its configuration implies. It knows no layer and no format.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use half::{f16, slice::HalfFloatSliceExt};

use super::{WeightFormat, WeightsError, integers::unpack_int4};

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
    /// The same in four bits, packed as in [`WeightFormat::W4`].
    I4,
}

impl SourceDtype {
    /// Bytes of a row: whole words of eight elements for int4.
    pub fn row_bytes(self, cols: usize) -> usize {
        match self {
            Self::F32 => cols * 4,
            Self::F16 | Self::BF16 => cols * 2,
            Self::I8 => cols,
            Self::I4 => cols.div_ceil(8) * 4,
        }
    }

    /// Shape that a file gives to a tensor of `shape`: bytes where it knows no such elements.
    pub(crate) fn stored_shape(self, shape: &[usize]) -> Vec<usize> {
        let mut stored = shape.to_vec();
        if let (Self::I4, Some(cols)) = (self, stored.last_mut()) {
            *cols = self.row_bytes(*cols);
        }
        stored
    }
}

/// One tensor as its checkpoint holds it: row-major, little endian, at any alignment.
#[derive(Debug, Clone)]
pub struct SourceTensor<'a> {
    name: String,
    dtype: SourceDtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>, // [rows, dtype.row_bytes(cols)]
    /// Of integers: one per row, or one per group of columns; empty without. `[rows, n]`
    scales: Vec<f32>,
}

impl<'a> SourceTensor<'a> {
    /// A tensor over `bytes`, borrowed (a mapped file) or owned.
    ///
    /// # Errors
    /// [`WeightsError::Bytes`] unless there are exactly the bytes of all rows.
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

    /// The same integers times `scales` `[rows, n]`, n being the number of groups of 32, 64 or 128
    /// columns, or 1 for int8.
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
        if scaled.quantized_format().is_none() {
            return Err(WeightsError::Scales { name, shape: scaled.shape, n_scales });
        }
        Ok(scaled)
    }

    /// How its integers are packed and scaled; `None` where it holds floats or has no scales.
    pub fn quantized_format(&self) -> Option<WeightFormat> {
        let n = |format: &WeightFormat| self.rows() * format.scales_per_row(self.cols());
        let fits = |format: &WeightFormat| {
            format.source_dtype() == self.dtype && n(format) == self.scales.len()
        };
        // Of ways that come to the same, the last: one scale per row.
        WeightFormat::ALL.into_iter().rfind(|f| !self.scales.is_empty() && fits(f))
    }

    /// One row of integers as they are packed, and its scales, none where it has none.
    ///
    /// # Panics
    /// Where `row >= rows()`.
    pub fn packed_row(&self, row: usize) -> (&[u8], &[f32]) {
        let (n_bytes, n) = (self.dtype.row_bytes(self.cols()), self.scales.len() / self.rows());
        (&self.bytes[row * n_bytes..][..n_bytes], &self.scales[row * n..][..n])
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
        let (bytes, scales) = self.packed_row(row);
        match self.quantized_format() {
            Some(format) => out.copy_from_slice(&format.decode_row(bytes, scales, self.cols())),
            None => convert(self.dtype, bytes, out),
        }
    }

    /// The whole tensor as f32. Returns `[rows, cols]`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product()];
        let rows = out.chunks_mut(self.cols().max(1)).enumerate();
        rows.for_each(|(row, out)| self.row_into(row, out));
        out
    }
}

/// Bytes of a tensor, or `None` where they overflow. A zero anywhere is no excuse for an overflow
/// elsewhere: `rows()` multiplies the leading dimensions alone. The widest element bounds all.
pub(super) fn n_bytes(shape: &[usize], dtype: SourceDtype) -> Option<usize> {
    shape.iter().filter(|&&dim| dim != 0).try_fold(4usize, |n, &dim| n.checked_mul(dim))?;
    let (&cols, leading) = shape.split_last().unwrap_or((&1, &[]));
    Some(leading.iter().product::<usize>() * dtype.row_bytes(cols))
}

/// Little-endian elements of a row at any alignment to f32, exactly.
fn convert(dtype: SourceDtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        SourceDtype::I8 => {
            for (&element, out) in bytes.iter().zip(out) {
                *out = f32::from(element as i8);
            }
        }
        SourceDtype::I4 => {
            for (&word, out) in bytes.as_chunks().0.iter().zip(out.chunks_mut(8)) {
                out.copy_from_slice(&unpack_int4(word)[..out.len()]);
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

/// What the scales of a quantised tensor are called.
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
                SourceDtype::I8 | SourceDtype::I4 => bytes.push(value as i8 as u8),
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
                SourceDtype::I8 | SourceDtype::I4 => f32::from(value as i8),
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
        assert_eq!((int8().quantized_format(), int8().to_f32()[41]), (None, 41.0));
        let rows = int8().with_scales(vec![1.0, 0.5]).unwrap();
        assert_eq!(rows.quantized_format(), Some(WeightFormat::W8 { group: None }));
        assert_eq!(rows.to_f32()[39..41], [39.0, 20.0]);
        let groups = int8().with_scales(vec![1.0, 2.0, 3.0, 4.0]).unwrap();
        assert_eq!(groups.quantized_format(), Some(WeightFormat::W8 { group: Some(32) }));
        let mut row = [0.0; 40];
        groups.row_into(1, &mut row);
        assert_eq!((row[31], row[32]), (71.0 * 3.0, 72.0 * 4.0));
        assert_eq!(groups.packed_row(1), (&bytes[40..], &[3.0, 4.0][..]));
        let error = int8().with_scales(vec![1.0; 5]).unwrap_err().to_string();
        assert!(error.contains("\"w\"") && error.contains("5 scales"), "{error}");
        let error = int8().with_scales(vec![1.0, f32::NAN]).unwrap_err().to_string();
        assert!(error.contains("\"w_scale\"") && error.contains("row 1"), "{error}");
    }

    #[test]
    fn int4_values_are_scaled_by_group_and_rows_end_with_a_word() {
        // 35 columns are five words, of the last of which three columns count.
        let bytes: Vec<u8> = (0..2 * 20).map(|i| i * 5).collect();
        let int4 = || SourceTensor::new("w", SourceDtype::I4, &[2, 35], bytes.clone()).unwrap();
        let plain = int4().to_f32();
        assert_eq!((int4().quantized_format(), plain.len()), (None, 70));
        // Bytes 20.. begin with 0x64, 0x69, 0x6e, 0x73; the first row's last word is 80, 85, 90.
        assert_eq!(plain[35..43], [4.0, -7.0, -2.0, 3.0, 6.0, 6.0, 6.0, 7.0]);
        assert_eq!(plain[32..35], [0.0, 5.0, -6.0]);
        let groups = int4().with_scales(vec![1.0, 2.0, -0.5, 4.0]).unwrap();
        assert_eq!(groups.quantized_format(), Some(WeightFormat::W4 { group: 32 }));
        let scales = [[1.0; 32].as_slice(), &[2.0; 3], &[-0.5; 32], &[4.0; 3]].concat();
        let expected: Vec<f32> = plain.iter().zip(scales).map(|(q, scale)| q * scale).collect();
        assert_eq!(groups.to_f32(), expected);
        let error = int4().with_scales(vec![1.0; 6]).unwrap_err().to_string();
        assert!(error.contains("\"w\"") && error.contains("6 scales"), "{error}");
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
