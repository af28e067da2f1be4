//! Linear layers: one or several matrices, split by output rows where a device cannot bind the
//! whole, and the choice of kernel by the number of activation rows.

use crate::{
    device::{Caps, Recording, Tensor},
    kernels::{GEMV_TOKENS, Gemm, Gemv, Matrix, Norm, RmsNorm, SiluMul, Store, product},
};

/// Rows that a product takes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input {
    /// `[n, cols]`
    x: Tensor,
    /// What the product has to do with `x` first, which is then in F32.
    norm: Option<Norm>,
}

impl Input {
    /// `norm(residual)` `[n, cols]`: a product of few rows does it on the way, else it is written
    /// to `normed` first.
    pub(super) fn normalised(
        rec: &mut Recording,
        residual: Tensor,
        norm: Norm,
        normed: Tensor,
    ) -> Self {
        if residual.rows() <= most_normalised(rec.caps()) {
            return Self { x: residual, norm: Some(norm) };
        }
        rec.push(RmsNorm { x: residual, rows: None, norm, out: normed });
        Self::from(normed)
    }
}

impl From<Tensor> for Input {
    fn from(x: Tensor) -> Self {
        Self { x, norm: None }
    }
}

/// Up to this many rows it is faster to normalise them in every workgroup than to launch a kernel.
fn most_normalised(caps: &Caps) -> usize {
    match caps {
        Caps { twins: true, .. } => 0,
        Caps { software: true, .. } => 8,
        _ => 4,
    }
}

/// `y = x W^T + b`.
#[derive(Debug, Clone)]
pub(super) struct Linear {
    /// First output row and matrix of each part, in order.
    pub(super) parts: Vec<(usize, Matrix, Option<Tensor>)>,
}

impl Linear {
    /// Writes `out = x W^T + b`, or adds to `out`.
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        label: &'static str,
        input: impl Into<Input>,
        out: Tensor,
        store: Store,
    ) {
        let Input { x, norm } = input.into();
        for &(out_col, weights, bias) in &self.parts {
            match norm {
                None => product(rec, Gemm { label, weights, bias, x, out, out_col, store }),
                _ => rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store }),
            }
        }
    }

    /// Writes `out = silu(x W_gate^T) * (x W_up^T)`, where gate rows stand above up rows.
    /// `both` `[n, 2 * width]` holds the two products when they are not fused.
    pub(super) fn record_gated(
        &self,
        rec: &mut Recording,
        label: &'static str,
        input: impl Into<Input>,
        both: Tensor,
        out: Tensor,
    ) {
        let Input { x, norm } = input.into();
        let store = Store::Gated;
        match self.parts[..] {
            [(out_col, weights, bias)] if x.rows() <= GEMV_TOKENS => {
                rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store });
            }
            [(out_col, weights, None)] if Gemm::gates(rec.caps(), x.dtype) => {
                rec.push(Gemm { label, weights, bias: None, x, out, out_col, store });
            }
            _ => {
                self.record(rec, label, Input { x, norm }, both, Store::Set);
                rec.push(SiluMul { x: both, out });
            }
        }
    }

    /// The only matrix, if there is one without a bias.
    pub(super) fn single(&self) -> Option<Matrix> {
        match self.parts[..] {
            [(0, matrix, None)] => Some(matrix),
            _ => None,
        }
    }

    /// The matrices, for kernels that take them one by one.
    pub(super) fn parts(&self) -> impl Iterator<Item = (usize, Matrix)> {
        self.parts.iter().map(|&(row, matrix, _)| (row, matrix))
    }
}
