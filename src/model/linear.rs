//! Linear layers: one or several matrices, split by output rows where a device cannot bind the
//! whole, and the choice of kernel by the number of activation rows.

use crate::{
    device::{Recording, Tensor},
    kernels::{GEMV_TOKENS, Gemm, Gemv, Matrix, SiluMul, Store, product},
};

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
        x: Tensor,
        out: Tensor,
        store: Store,
    ) {
        for &(out_col, weights, bias) in &self.parts {
            product(rec, Gemm { label, weights, bias, x, out, out_col, store });
        }
    }

    /// Writes `out = silu(x W_gate^T) * (x W_up^T)`, where gate rows stand above up rows.
    /// `both` `[n, 2 * width]` holds the two products when they are not fused.
    pub(super) fn record_gated(
        &self,
        rec: &mut Recording,
        label: &'static str,
        x: Tensor,
        both: Tensor,
        out: Tensor,
    ) {
        let store = Store::Gated;
        match self.parts[..] {
            [(out_col, weights, bias)] if x.rows() <= GEMV_TOKENS => {
                rec.push(Gemv { label, weights, bias, x, out, out_col, store });
            }
            [(out_col, weights, None)] if Gemm::gates(rec.caps(), x.dtype) => {
                rec.push(Gemm { label, weights, bias: None, x, out, out_col, store });
            }
            _ => {
                self.record(rec, label, x, both, Store::Set);
                rec.push(SiluMul { x: both, out });
            }
        }
    }

    /// The matrices, for kernels that take them one by one.
    pub(super) fn parts(&self) -> impl Iterator<Item = (usize, Matrix)> {
        self.parts.iter().map(|&(row, matrix, _)| (row, matrix))
    }
}
