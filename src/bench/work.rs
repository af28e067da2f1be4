//! What a dispatch has to move and to compute at least, read off its bindings: the yardstick for
//! the time that it takes.

use crate::{
    device::{Access, DType, Dispatch},
    kernels::Routing,
};

/// Bytes and floating-point operations of a dispatch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Work {
    /// Every binding once, but of banks of experts only the experts that are visited.
    pub(super) bytes: f64,
    /// Multiply-adds with weights, times two.
    pub(super) flops: f64,
}

/// How many tokens a layer has, and where its router sends them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    pub(super) tokens: usize,
    pub(super) routing: Routing,
    /// Share of the experts that some token visits.
    pub(super) visited: f64,
}

impl Work {
    pub(super) fn of(dispatch: &Dispatch, load: &Load) -> Self {
        let experts = dispatch.shader.stem.starts_with("expert_");
        let mut work = Self::default();
        let mut seen = Vec::new();
        for (i, binding) in dispatch.bindings.iter().enumerate() {
            let tensor = binding.tensor;
            if seen.contains(&(tensor.buffer, tensor.offset)) {
                continue;
            }
            seen.push((tensor.buffer, tensor.offset));
            let packed = tensor.dtype == DType::U8;
            // Weights and, beside them, their scales.
            let of_experts = experts && binding.access == Access::Read && (packed || i == 1);
            work.bytes += tensor.bytes() as f64 * if of_experts { load.visited } else { 1.0 };
            if packed {
                let weights = tensor.bytes() as f64 / element_bytes(dispatch);
                work.flops += 2.0 * weights * visits(dispatch, experts, load);
            }
        }
        work
    }
}

/// Bytes of a weight, by the format that the shader was built for.
fn element_bytes(dispatch: &Dispatch) -> f64 {
    match dispatch.shader.slot_value("weight") {
        Some("f32") => 4.0,
        Some("f16") => 2.0,
        Some("w4") => 0.5,
        _ => 1.0,
    }
}

/// How often each weight is used on average.
fn visits(dispatch: &Dispatch, experts: bool, load: &Load) -> f64 {
    let tokens = load.tokens as f64;
    // A gate in front of a shared expert is a mixture of one.
    let one = param(dispatch, "top_k") == Some(1) && load.routing.top_k > 1;
    match experts && !one {
        true => tokens * load.routing.top_k as f64 / load.routing.n_experts as f64,
        false => tokens,
    }
}

/// A field of the dispatch's parameters.
fn param(dispatch: &Dispatch, name: &str) -> Option<u32> {
    let at = dispatch.fields.iter().position(|(field, _)| *field == name)?;
    let bytes = dispatch.params.get(4 * at..4 * at + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::{Allocate, Device, Recording},
        kernels::{ExpertGemv, ExpertMode, Gemv, Matrix, Scoring, Store},
        weights::WeightFormat,
    };

    #[test]
    fn experts_count_by_visits_and_plain_matrices_in_full() {
        let mut device = Device::cpu();
        let mut alloc = |shape: &[usize], dtype| device.alloc("test", shape, dtype).unwrap();
        let (n_experts, rows, cols, tokens, top_k) = (8, 64, 32, 3, 2);
        let format = WeightFormat::W8 { group: None };
        let weights = alloc(&[n_experts, rows, cols], DType::U8);
        let scales = alloc(&[n_experts, rows, 1], DType::F32);
        let bank = Matrix { weights, scales, format, rows, cols, n_experts };
        let x = alloc(&[tokens, cols], DType::F32);
        let ids = alloc(&[tokens, top_k], DType::I32);
        let out = alloc(&[tokens * top_k, rows / 2], DType::F32);
        let mode = ExpertMode::Gated;
        let gemv =
            ExpertGemv { label: "test", bank, first_expert: 0, x, ids, weights: None, out, mode };
        let mut rec = Recording::new(&device.caps());
        rec.push(gemv);
        let out = device.alloc("test", &[tokens, rows], DType::F32).unwrap();
        let store = Store::Set;
        let weights = Matrix {
            weights: bank.weights.slice(0..rows),
            scales: bank.scales.slice(0..rows),
            n_experts: 1,
            ..bank
        };
        let (label, bias, norm, out_col) = ("test", None, None, 0);
        rec.push(Gemv { label, weights, bias, x, norm, out, out_col, store });
        let routing = Routing {
            scoring: Scoring::Softmax,
            n_experts,
            top_k,
            n_group: 1,
            topk_group: 1,
            renormalize: false,
            scale: 1.0,
        };
        let load = Load { tokens, routing, visited: 0.5 };
        let works: Vec<Work> = rec.dispatches.iter().map(|d| Work::of(d, &load)).collect();
        let weight_bytes = (n_experts * rows * (cols + 4)) as f64;
        let rest = (4 * (tokens * cols + tokens * top_k + tokens * top_k * rows / 2)) as f64;
        assert_eq!(works[0].bytes, 0.5 * weight_bytes + rest);
        assert_eq!(works[0].flops, (2 * rows * cols * tokens * top_k) as f64);
        let plain = (rows * (cols + 4) + 4 * tokens * (cols + rows)) as f64;
        assert_eq!(works[1], Work { bytes: plain, flops: (2 * rows * cols * tokens) as f64 });
    }
}
