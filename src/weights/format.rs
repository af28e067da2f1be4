//! How weights are packed for the kernels: f32, f16, and int8 or int4 with symmetric scales.
//!
//! Owns the layout of one row (padding, scales) and the rounding, for the GPU kernels and their
//! CPU twins alike. Knows neither where the weights came from nor what they multiply.

use std::{fmt, ops::Range, str::FromStr};

use half::{f16, slice::HalfFloatSliceExt};

use super::{
    SourceDtype, WeightsError,
    integers::{absmax, pack_int4, pack_int8, unpack_int4},
    join,
};

/// Columns are padded with zeros to a multiple of this, so that kernels read whole vectors.
pub const PAD: usize = 32;

/// `n` rounded up to a multiple of [`PAD`].
pub fn padded(n: usize) -> usize {
    n.next_multiple_of(PAD)
}

/// Packing of a weight matrix `[n_rows, cols]` (output channels x inputs).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// IEEE single precision.
    F32,
    /// IEEE half precision; finite values beyond +-65504 are clamped to that.
    F16,
    /// int8 weights for f16 activations: w = q x scale, q in -127..=127, two's complement, in
    /// plain column order.
    W8 {
        /// Columns that share a scale (32, 64 or 128); `None`: all columns of an output channel.
        group: Option<usize>,
    },
    /// int8 weights with one scale per output channel, packed as [`WeightFormat::W8`], for
    /// activations that are rounded to int8, too, where that makes products faster.
    W8A8,
    /// int4 weights for f16 activations: w = q x scale, q in -8..=7, two's complement. Four bytes
    /// hold eight columns: the first four in their lower halves, the others in their upper ones.
    W4 {
        /// Columns that share a scale: 32, 64 or 128.
        group: usize,
    },
}

/// A packed matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    /// Little-endian elements, columns padded with zeros. `[n_rows, bytes_per_row(cols)]`
    pub weights: Vec<u8>,
    /// Scales of integers, empty for floats. `[n_rows, scales_per_row(cols)]`
    pub scales: Vec<f32>,
}

impl FromStr for WeightFormat {
    type Err = WeightsError;

    /// The inverse of `to_string`; `w4a16` is short for its smallest group.
    fn from_str(text: &str) -> Result<Self, WeightsError> {
        let named = |format: &Self| format.to_string() == text;
        let short = (text == "w4a16").then_some(Self::W4 { group: 32 });
        let format = short.or_else(|| Self::ALL.into_iter().find(named));
        format.ok_or_else(|| WeightsError::Format { text: text.into() })
    }
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::F32 => f.pad("f32"),
            Self::F16 => f.pad("f16"),
            Self::W8 { group: None } => f.pad("w8a16"),
            Self::W8 { group: Some(group) } => f.pad(&format!("w8a16-g{group}")),
            Self::W8A8 => f.pad("w8a8"),
            Self::W4 { group } => f.pad(&format!("w4a16-g{group}")),
        }
    }
}

impl WeightFormat {
    /// Every format, from the widest to the narrowest.
    pub const ALL: [Self; 10] = [
        Self::F32,
        Self::F16,
        Self::W8 { group: Some(32) },
        Self::W8 { group: Some(64) },
        Self::W8 { group: Some(128) },
        Self::W8A8,
        Self::W8 { group: None },
        Self::W4 { group: 32 },
        Self::W4 { group: 64 },
        Self::W4 { group: 128 },
    ];

    /// Bits of one weight, without its share of a scale.
    pub fn bits(&self) -> usize {
        match self {
            Self::F32 => 32,
            Self::F16 => 16,
            Self::W8 { .. } | Self::W8A8 => 8,
            Self::W4 { .. } => 4,
        }
    }

    /// Whether weights are integers with scales.
    pub fn is_quantized(&self) -> bool {
        !matches!(self, Self::F32 | Self::F16)
    }

    /// Elements of a checkpoint whose bytes are packed in this way.
    pub fn source_dtype(&self) -> SourceDtype {
        match self {
            Self::F32 => SourceDtype::F32,
            Self::F16 => SourceDtype::F16,
            Self::W8 { .. } | Self::W8A8 => SourceDtype::I8,
            Self::W4 { .. } => SourceDtype::I4,
        }
    }

    /// Bytes of one packed row, padding included, scales excluded.
    pub fn bytes_per_row(&self, cols: usize) -> usize {
        self.source_dtype().row_bytes(padded(cols))
    }

    /// Scales of one row: 0 for floats, 1 per output channel, or one per started group.
    pub fn scales_per_row(&self, cols: usize) -> usize {
        match self {
            Self::F32 | Self::F16 => 0,
            Self::W8 { group: None } | Self::W8A8 => 1,
            Self::W8 { group: Some(group) } | Self::W4 { group } => cols.div_ceil(*group),
        }
    }

    /// Columns of int8 that share a scale in a row of `cols`, at least one.
    fn int8_group(&self, cols: usize) -> usize {
        match self {
            Self::W8 { group: Some(group) } => *group,
            _ => cols.max(1),
        }
    }

    /// Packs the tensor `name` `[n_rows, cols]`; `rows(row, out)` writes one row into `out`
    /// `[cols]`. Rows are packed in parallel, so that a big tensor is never held in f32.
    ///
    /// # Errors
    /// [`WeightsError::NonFinite`] for a NaN or infinity, [`WeightsError::TooLarge`] where the
    /// packed size overflows.
    pub fn encode(
        &self,
        name: &str,
        n_rows: usize,
        cols: usize,
        rows: impl Fn(usize, &mut [f32]) + Sync,
    ) -> Result<Encoded, WeightsError> {
        // The widest element bounds both products.
        let row_bytes = cols.checked_next_multiple_of(PAD).and_then(|n| n.max(1).checked_mul(4));
        let total = row_bytes.and_then(|bytes| bytes.checked_mul(n_rows));
        if total.is_none_or(|total| total > isize::MAX as usize) {
            return Err(WeightsError::TooLarge { name: name.into(), shape: vec![n_rows, cols] });
        }
        let mut weights = vec![0; n_rows * self.bytes_per_row(cols)];
        let mut scales = vec![0.0; n_rows * self.scales_per_row(cols)];
        let task = Task { format: *self, cols, rows: &rows };
        task.encode(0..n_rows, &mut weights, &mut scales).map_err(|(row, col, value)| {
            WeightsError::NonFinite { name: name.into(), row, col, value }
        })?;
        Ok(Encoded { weights, scales })
    }

    /// Orders packed rows `[n, bytes_per_row(cols)]`, a multiple of four, as kernels read them:
    /// chunk by chunk of 16 bytes, those of four neighbouring rows side by side,
    /// `[n / 4, bytes_per_row / 16, 4, 16]`. So threads that take a step of neighbouring rows read
    /// whole lines of memory.
    pub fn interleave(&self, rows: &mut [u8], cols: usize) {
        let row_bytes = self.bytes_per_row(cols);
        let mut quad = vec![0; QUAD * row_bytes];
        for rows in rows.chunks_exact_mut(QUAD * row_bytes) {
            quad.copy_from_slice(rows);
            let chunks = rows.as_chunks_mut::<CHUNK>().0.chunks_exact_mut(QUAD);
            for (c, chunks) in chunks.enumerate() {
                for (row, chunk) in quad.chunks_exact(row_bytes).zip(chunks) {
                    chunk.copy_from_slice(&row[c * CHUNK..][..CHUNK]);
                }
            }
        }
    }

    /// A packed row of those that [`WeightFormat::interleave`] has ordered. `[bytes_per_row(cols)]`
    pub fn interleaved_row(&self, rows: &[u8], cols: usize, row: usize) -> Vec<u8> {
        let quad_bytes = QUAD * self.bytes_per_row(cols);
        let quad = &rows[row / QUAD * quad_bytes..][..quad_bytes];
        let chunks = quad.as_chunks::<CHUNK>().0.iter();
        chunks.skip(row % QUAD).step_by(QUAD).flatten().copied().collect()
    }

    /// Unpacks one row, as the CPU twins of the kernels see it. Returns `[cols]`.
    ///
    /// # Panics
    /// Where the slices are shorter than the columns, without padding, and their scales.
    pub fn decode_row(&self, weights_row: &[u8], scales_row: &[f32], cols: usize) -> Vec<f32> {
        let bytes = &weights_row[..self.source_dtype().row_bytes(cols)];
        let scales = &scales_row[..self.scales_per_row(cols)];
        match self {
            Self::F32 => bytes.as_chunks().0.iter().map(|&e| f32::from_le_bytes(e)).collect(),
            Self::F16 => {
                bytes.as_chunks().0.iter().map(|&e| f16::from_le_bytes(e).to_f32()).collect()
            }
            Self::W8 { .. } | Self::W8A8 => {
                let groups = bytes.chunks(self.int8_group(cols)).zip(scales);
                groups.flat_map(|(q, &s)| q.iter().map(move |&q| f32::from(q as i8) * s)).collect()
            }
            Self::W4 { group } => {
                let mut row = Vec::with_capacity(padded(cols));
                for (bytes, &scale) in bytes.chunks(group / 2).zip(scales) {
                    for &word in bytes.as_chunks().0 {
                        row.extend(unpack_int4(word).map(|q| q * scale));
                    }
                }
                row.truncate(cols);
                row
            }
        }
    }
}

/// Rows of weights that lie interleaved on a device.
const QUAD: usize = 4;
/// Bytes that lie together.
const CHUNK: usize = 16;

/// Elements that one thread packs at a time.
const LEAF_ELEMENTS: usize = 1 << 16;

/// Where a non-finite value stands, and the value: (row, column, value).
type NonFinite = (usize, usize, f32);

/// One matrix on its way through [`WeightFormat::encode`].
struct Task<'a, F> {
    format: WeightFormat,
    cols: usize,
    rows: &'a F,
}

impl<F: Fn(usize, &mut [f32]) + Sync> Task<'_, F> {
    /// Packs `range` into its own slices, halving for the threads; the first bad row is reported.
    fn encode(
        &self,
        range: Range<usize>,
        weights: &mut [u8], // [range.len(), bytes_per_row]
        scales: &mut [f32], // [range.len(), scales_per_row]
    ) -> Result<(), NonFinite> {
        let row_bytes = self.format.bytes_per_row(self.cols);
        let row_scales = self.format.scales_per_row(self.cols);
        if range.len() > (LEAF_ELEMENTS / self.cols.max(1)).max(1) {
            let half = range.len() / 2;
            let middle = range.start + half;
            let (left_weights, right_weights) = weights.split_at_mut(half * row_bytes);
            let (left_scales, right_scales) = scales.split_at_mut(half * row_scales);
            let (left, right) = join(
                || self.encode(range.start..middle, left_weights, left_scales),
                || self.encode(middle..range.end, right_weights, right_scales),
            );
            return left.and(right);
        }
        let mut values = vec![0.0; self.cols];
        for (i, row) in range.enumerate() {
            (self.rows)(row, &mut values);
            if !absmax(&values).is_finite() {
                let bad = values.iter().enumerate().find(|(_, value)| !value.is_finite());
                return bad.map_or(Ok(()), |(col, &value)| Err((row, col, value)));
            }
            let weights = &mut weights[i * row_bytes..][..row_bytes];
            let scales = &mut scales[i * row_scales..][..row_scales];
            match self.format {
                WeightFormat::F32 => encode_f32(&values, weights),
                WeightFormat::F16 => encode_f16(&values, weights),
                WeightFormat::W8 { .. } | WeightFormat::W8A8 => {
                    let group = self.format.int8_group(self.cols);
                    let groups = values.chunks(group).zip(weights.chunks_mut(group));
                    for ((values, weights), scale) in groups.zip(scales) {
                        *scale = pack_int8(values, weights);
                    }
                }
                WeightFormat::W4 { group } => {
                    let groups = values.chunks(group).zip(weights.chunks_mut(group / 2));
                    for ((values, weights), scale) in groups.zip(scales) {
                        *scale = pack_int4(values, weights);
                    }
                }
            }
        }
        Ok(())
    }
}

/// `values`: `[cols]`, `out`: `[padded(cols) x 4]`, zero beyond the columns.
fn encode_f32(values: &[f32], out: &mut [u8]) {
    for (value, out) in values.iter().zip(out.as_chunks_mut().0) {
        *out = value.to_le_bytes();
    }
}

/// `values`: `[cols]`, `out`: `[padded(cols) x 2]`, zero beyond the columns.
fn encode_f16(values: &[f32], out: &mut [u8]) {
    // Blocks on the stack, for conversion in bulk whatever the alignment of `out`.
    let mut clamped = [0.0; 256];
    let mut halves = [f16::ZERO; 256];
    for (values, out) in values.chunks(256).zip(out.chunks_mut(512)) {
        let (clamped, halves) = (&mut clamped[..values.len()], &mut halves[..values.len()]);
        for (value, clamped) in values.iter().zip(clamped.iter_mut()) {
            *clamped = value.clamp(f16::MIN.to_f32_const(), f16::MAX.to_f32_const());
        }
        halves.convert_from_f32_slice(clamped);
        for (half, out) in halves.iter().zip(out.as_chunks_mut().0) {
            *out = half.to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORMATS: [WeightFormat; 10] = WeightFormat::ALL;

    /// Uneven values with an outlier in every eleventh column and a row of zeros.
    fn value(row: usize, col: usize) -> f32 {
        let outlier = if col % 11 == 3 { 40.0 } else { 1.0 };
        if row == 1 { 0.0 } else { ((row * 131 + col * 17) as f32 * 0.7).sin() * outlier }
    }

    fn fill(row: usize, out: &mut [f32]) {
        for (col, out) in out.iter_mut().enumerate() {
            *out = value(row, col);
        }
    }

    fn decode(format: WeightFormat, encoded: &Encoded, row: usize, cols: usize) -> Vec<f32> {
        let (bytes, scales) = (format.bytes_per_row(cols), format.scales_per_row(cols));
        let weights_row = &encoded.weights[row * bytes..][..bytes];
        format.decode_row(weights_row, &encoded.scales[row * scales..][..scales], cols)
    }

    #[test]
    fn text_round_trips_and_nonsense_is_an_error() {
        for format in FORMATS {
            assert_eq!(format.to_string().parse::<WeightFormat>().unwrap(), format);
        }
        assert_eq!(WeightFormat::W8 { group: Some(64) }.to_string(), "w8a16-g64");
        assert_eq!("w4a16".parse::<WeightFormat>().unwrap().to_string(), "w4a16-g32");
        for text in ["", "F32", "w8a16-g", "w8a16-g48", "w8a16-g0", "w4a16-g", "w4a8"] {
            let error = text.parse::<WeightFormat>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains("w8a16-g32"));
        }
    }

    #[test]
    fn sizes_of_odd_widths() {
        assert_eq!([0, 1, 24, 32, 33, 100].map(padded), [0, 32, 32, 32, 64, 128]);
        assert_eq!(
            FORMATS.map(|f| f.bytes_per_row(33)),
            [256, 128, 64, 64, 64, 64, 64, 32, 32, 32]
        );
        assert_eq!(FORMATS.map(|f| f.scales_per_row(100)), [0, 0, 4, 2, 1, 1, 1, 4, 2, 1]);
        for cols in 1..300 {
            for group in [32, 64, 128] {
                // No padded column lies in a group without a scale.
                let scales = WeightFormat::W8 { group: Some(group) }.scales_per_row(cols);
                assert_eq!(padded(cols).div_ceil(group), scales);
            }
        }
    }

    #[test]
    fn decoding_is_within_the_rounding_error() {
        for format in FORMATS {
            for cols in [1, 24, 32, 33, 64, 100, 1000] {
                let n_rows = 200; // Several leaves at 1000 columns.
                let encoded = format.encode("w", n_rows, cols, fill).unwrap();
                assert_eq!(encoded.weights.len(), n_rows * format.bytes_per_row(cols));
                for row in 0..n_rows {
                    let scales = &encoded.scales[row * format.scales_per_row(cols)..];
                    for (col, got) in decode(format, &encoded, row, cols).into_iter().enumerate() {
                        let exact = value(row, col);
                        let bound = match format {
                            WeightFormat::F32 => 0.0,
                            WeightFormat::F16 => exact.abs() / 2048.0 + 3e-8,
                            WeightFormat::W8 { .. } | WeightFormat::W8A8 => {
                                scales[col / format.int8_group(cols)] * 0.500_01
                            }
                            // The positive end of the range is one step short.
                            WeightFormat::W4 { group } => scales[col / group].abs() * 1.000_01,
                        };
                        let error = (got - exact).abs();
                        assert!(
                            error <= bound,
                            "{format} {cols}: [{row}, {col}] {error} > {bound}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn padding_is_zero_and_zero_rows_have_zero_scales() {
        for format in FORMATS {
            for cols in [24, 33, 100] {
                let encoded = format.encode("w", 3, cols, fill).unwrap();
                let row_scales = format.scales_per_row(cols);
                for (i, row) in encoded.weights.chunks(format.bytes_per_row(cols)).enumerate() {
                    let scales = &encoded.scales[i * row_scales..][..row_scales];
                    let all = format.decode_row(row, scales, padded(cols));
                    assert!(all[cols..].iter().all(|&value| value == 0.0));
                    assert!(row.len() % 16 == 0);
                }
                let scales = format.scales_per_row(cols);
                assert!(encoded.scales[scales..2 * scales].iter().all(|&scale| scale == 0.0));
                assert!(decode(format, &encoded, 1, cols).iter().all(|&value| value == 0.0));
            }
        }
    }

    #[test]
    fn an_outlier_spoils_its_own_group_only() {
        let row = |_: usize, out: &mut [f32]| {
            out.fill(0.01);
            out[99] = 1e6; // The short last group: columns 64..100.
        };
        let format = WeightFormat::W8 { group: Some(64) };
        let encoded = format.encode("w", 1, 100, row).unwrap();
        let decoded = decode(format, &encoded, 0, 100);
        assert!(decoded[..64].iter().all(|value| (value - 0.01).abs() < 1e-6));
        assert!(decoded[64..99].iter().all(|&value| value == 0.0));
        assert!((decoded[99] / 1e6 - 1.0).abs() < 1e-6);
    }

    #[test]
    fn extremes_stay_finite() {
        let values = [f32::MAX, f32::MIN, f32::MIN_POSITIVE, 1e-45, -0.0, 65520.0];
        for format in FORMATS {
            let row = |_: usize, out: &mut [f32]| out.copy_from_slice(&values);
            let encoded = format.encode("w", 1, values.len(), row).unwrap();
            assert!(decode(format, &encoded, 0, 6).iter().all(|value| value.is_finite()));
            let tiny = |_: usize, out: &mut [f32]| out.fill(1e-40);
            let encoded = format.encode("w", 1, 5, tiny).unwrap();
            assert!(decode(format, &encoded, 0, 5).iter().all(|value| value.abs() <= 1e-40));
        }
        let row = |_: usize, out: &mut [f32]| out.copy_from_slice(&values);
        let encoded = WeightFormat::F16.encode("w", 1, 6, row).unwrap();
        let decoded = decode(WeightFormat::F16, &encoded, 0, 6);
        assert_eq!((decoded[0], decoded[1], decoded[5]), (65504.0, -65504.0, 65504.0));
    }

    #[test]
    fn non_finite_weights_name_the_tensor_and_the_place() {
        for (bad, text) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (-f32::INFINITY, "-inf")] {
            for format in FORMATS {
                let rows = |row: usize, out: &mut [f32]| {
                    fill(row, out);
                    if row >= 3000 {
                        out[40] = bad;
                    }
                };
                let error = format.encode("up.weight", 5000, 100, rows).unwrap_err().to_string();
                assert!(error.contains("\"up.weight\""), "{error}");
                assert!(error.contains(&format!("{text} at row 3000, column 40")), "{error}");
            }
        }
    }

    #[test]
    fn empty_matrices_encode_and_absurd_ones_are_errors() {
        for format in FORMATS {
            for (n_rows, cols) in [(0, 5), (5, 0), (0, 0)] {
                let encoded = format.encode("w", n_rows, cols, |_, _| ()).unwrap();
                assert!(encoded.weights.is_empty());
            }
            for (n_rows, cols) in [(usize::MAX, 5), (1 << 40, 1 << 40), (1, usize::MAX)] {
                let error = format.encode("huge", n_rows, cols, |_, _| ()).unwrap_err().to_string();
                assert!(error.contains("\"huge\"") && error.contains("too large"), "{error}");
            }
        }
    }
}
