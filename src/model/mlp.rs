//! The gated MLP (Shazeer 2020, SwiGLU).

use crate::{
    Result,
    device::{Recording, Tensor},
    kernels::Store,
    weights::WeightFormat,
};

use super::{
    linear::{Input, Linear},
    loader::Loader,
    rows::{Cols, Rows},
    scratch::Buffers,
};

/// `W_down (silu(W_gate x) * (W_up x))`.
#[derive(Debug, Clone)]
pub(super) struct Mlp {
    gate_up: Linear,
    down: Linear,
}

impl Mlp {
    pub(super) fn load(
        loader: &mut Loader<'_>,
        prefix: &str,
        hidden: usize,
        width: usize,
        format: WeightFormat,
    ) -> Result<Self> {
        let rows = ["gate_proj", "up_proj"].map(|n| Rows::all(format!("{prefix}.{n}"), width));
        let down = Rows::all(format!("{prefix}.down_proj"), hidden);
        Ok(Self {
            gate_up: loader.linear(&rows, Cols::all(hidden), format, false)?,
            down: loader.linear(&[down], Cols::all(width), format, false)?,
        })
    }

    /// Adds the output to `residual` `[n, hidden]`.
    pub(super) fn record(
        &self,
        rec: &mut Recording,
        x: impl Into<Input>,
        residual: Tensor,
        buffers: &Buffers,
        width: usize,
    ) {
        let (both, inner) = buffers.gated(residual.rows(), width);
        self.gate_up.record_gated(rec, "gate_up", x, both, inner);
        self.down.record(rec, "down", inner, residual, Store::Add);
    }
}
