//! Handles to device memory.

use std::fmt;

/// Element type of a [`Tensor`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit float.
    F32,
    /// 16-bit float; portable shaders read pairs of them from `u32`.
    F16,
    /// 32-bit signed integer (expert ids; -1 means skip).
    I32,
    /// 32-bit unsigned integer.
    U32,
    /// 8-bit signed integer (rounded activations).
    I8,
    /// Bytes whose meaning the reader knows (packed weights).
    U8,
}

impl DType {
    /// Bytes per element.
    pub fn bytes(self) -> u64 {
        match self {
            DType::F32 | DType::I32 | DType::U32 => 4,
            DType::F16 => 2,
            DType::I8 | DType::U8 => 1,
        }
    }
}

/// Names a buffer of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BufferId(pub(crate) u32);

/// A contiguous row-major array in device memory: a handle, free to copy, that owns nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tensor {
    /// The buffer that holds the elements.
    pub buffer: BufferId,
    /// Bytes from the buffer's start; a multiple of the device's offset alignment.
    pub offset: u64,
    /// Extents, outermost first, padded in front with ones.
    pub shape: [usize; 4],
    /// Element type.
    pub dtype: DType,
}

impl Tensor {
    pub(crate) fn new(buffer: BufferId, shape: &[usize], dtype: DType) -> Self {
        assert!(shape.len() <= 4, "tensors have at most four dimensions: {shape:?}");
        let mut dims = [1; 4];
        dims[4 - shape.len()..].copy_from_slice(shape);
        Self { buffer, offset: 0, shape: dims, dtype }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there is no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Innermost extent.
    pub fn cols(&self) -> usize {
        self.shape[3]
    }

    /// Product of all extents but the innermost.
    pub fn rows(&self) -> usize {
        self.shape[..3].iter().product()
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.len() as u64 * self.dtype.bytes()
    }

    /// Some of its rows. They are bound only if they start at the device's alignment.
    pub fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        assert!(rows.end <= self.rows(), "{self} has no rows {rows:?}");
        let row_bytes = self.cols() as u64 * self.dtype.bytes();
        let offset = self.offset + rows.start as u64 * row_bytes;
        Self { offset, ..Self::new(self.buffer, &[rows.len(), self.cols()], self.dtype) }
    }

    /// What is left behind its first `n` elements, flat. Bound only as [`Tensor::slice`] says.
    pub fn skip(&self, n: usize) -> Self {
        assert!(n <= self.len(), "{self} has no {n} elements");
        let offset = self.offset + n as u64 * self.dtype.bytes();
        Self { offset, ..Self::new(self.buffer, &[self.len() - n], self.dtype) }
    }

    /// The same memory, from its start, with another shape that needs no more bytes.
    pub fn reshape(&self, shape: &[usize]) -> Self {
        let view = Self { offset: self.offset, ..Self::new(self.buffer, shape, self.dtype) };
        assert!(view.bytes() <= self.bytes(), "{self} is smaller than {view}");
        view
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = self.shape.iter().take(3).take_while(|&&n| n == 1).count();
        write!(f, "{:?}{:?}@{}", self.dtype, &self.shape[start..], self.buffer.0)
    }
}
