//! Banks of experts: what a checkpoint calls their matrices, and how they are loaded side by side.

use crate::{
    Result,
    device::Tensor,
    kernels::Matrix,
    weights::{Source, WeightFormat},
};

use super::{
    ModelSpec, MoeSpec, Precision,
    loader::{Cols, Fused, Loader, Rows, pack},
};

/// Weights of a set of experts, gate rows above up rows: (place of the first, matrices).
#[derive(Debug, Clone)]
pub(super) struct Banks {
    pub(super) gate_up: Vec<(usize, Matrix)>,
    pub(super) down: Vec<(usize, Matrix)>,
}

/// Where some bytes of one expert lie in its bank: the tensor, the first byte, how many.
pub(super) type Part = (Tensor, u64, u64);

impl Banks {
    /// Where the expert at `place` lies, in the order of [`BankShape::pack`].
    pub(super) fn parts(&self, place: usize) -> Vec<Part> {
        [&self.gate_up, &self.down].into_iter().flat_map(|banks| parts(banks, place)).collect()
    }
}

fn parts(banks: &[(usize, Matrix)], place: usize) -> Vec<Part> {
    let inside =
        |&&(first, bank): &&(usize, Matrix)| (first..first + bank.n_experts).contains(&place);
    let &(first, bank) = banks.iter().find(inside).expect("a place in one of the banks");
    let part = |tensor: Tensor| {
        let bytes = tensor.bytes() / bank.n_experts as u64;
        (tensor, (place - first) as u64 * bytes, bytes)
    };
    let scaled = bank.scales != bank.weights;
    let scales = scaled.then(|| part(bank.scales));
    std::iter::once(part(bank.weights)).chain(scales).collect()
}

/// How a checkpoint spells the weights of experts; each variant has a prefix.
pub(super) enum ExpertNames {
    /// Tensors of one expert after another; gate, up and down projection.
    Each(String, [&'static str; 3]),
    /// `gate_up_proj` `[experts, 2 * width, hidden]` and `down_proj` `[experts, hidden, width]`.
    Fused(String),
    /// Tensors of a single expert without a number.
    Single(String),
}

/// Prefix of a layer's mixture and the names of its experts. transformers v5 keeps experts fused
/// and saves them so if asked (`save_original_format=False`), below `mlp` in every architecture.
pub(super) fn names(
    contains: impl Fn(&str) -> bool,
    spec: &ModelSpec,
    index: usize,
) -> (String, ExpertNames) {
    let (layer, projections) = (format!("model.layers.{index}"), spec.names.expert);
    let (fused, each) = (format!("{layer}.mlp"), format!("{layer}.{}", spec.names.moe));
    let first = format!("{each}.experts.0.{}.weight", projections[0]);
    if contains(&format!("{fused}.experts.gate_up_proj")) && !contains(&first) {
        let names = ExpertNames::Fused(format!("{fused}.experts"));
        return (fused, names);
    }
    let names = ExpertNames::Each(format!("{each}.experts"), projections);
    (each, names)
}

impl ExpertNames {
    /// Gate rows above up rows.
    fn gate_up(&self, n_experts: usize, expert: usize, width: usize) -> Vec<Rows> {
        let all = |name| Rows::all(name, width);
        let rows = match self {
            Self::Each(prefix, [gate, up, _]) => {
                [gate, up].map(|p| all(format!("{prefix}.{expert}.{p}")))
            }
            Self::Single(prefix) => ["gate_proj", "up_proj"].map(|p| all(format!("{prefix}.{p}"))),
            Self::Fused(prefix) => [0, width].map(|first| {
                let fused = Fused { shape: [n_experts, 2 * width], expert, first };
                Rows::fused(format!("{prefix}.gate_up_proj"), width, fused)
            }),
        };
        rows.to_vec()
    }

    fn down(&self, n_experts: usize, expert: usize, hidden: usize) -> Rows {
        match self {
            Self::Each(prefix, [.., down]) => {
                Rows::all(format!("{prefix}.{expert}.{down}"), hidden)
            }
            Self::Single(prefix) => Rows::all(format!("{prefix}.down_proj"), hidden),
            Self::Fused(prefix) => {
                let fused = Fused { shape: [n_experts, hidden], expert, first: 0 };
                Rows::fused(format!("{prefix}.down_proj"), hidden, fused)
            }
        }
    }
}

/// What the matrices of a layer's experts are called and sized.
pub(super) struct BankShape {
    pub(super) names: ExpertNames,
    /// Experts in the checkpoint.
    pub(super) n_experts: usize,
    /// Inputs and outputs, and the width between.
    pub(super) hidden: usize,
    pub(super) width: usize,
    pub(super) format: WeightFormat,
}

impl BankShape {
    /// The routed experts of a layer.
    pub(super) fn of(
        spec: &ModelSpec,
        moe: &MoeSpec,
        names: ExpertNames,
        precision: Precision,
    ) -> Self {
        Self {
            names,
            n_experts: moe.routing.n_experts,
            hidden: spec.hidden_size,
            width: moe.intermediate_size,
            format: precision.experts,
        }
    }

    fn gate_up(&self, expert: usize) -> Vec<Rows> {
        self.names.gate_up(self.n_experts, expert, self.width)
    }

    fn down(&self, expert: usize) -> Vec<Rows> {
        vec![self.names.down(self.n_experts, expert, self.hidden)]
    }

    /// Banks with `n_places` for experts, and nothing in them.
    pub(super) fn empty(&self, loader: &mut Loader<'_>, n_places: usize) -> Result<Banks> {
        let (hidden, width) = (Cols::all(self.hidden), Cols::all(self.width));
        let gate_up = loader.empty_banks(n_places, &self.gate_up(0), hidden, self.format)?;
        let down = loader.empty_banks(n_places, &self.down(0), width, self.format)?;
        Ok(Banks { gate_up, down })
    }

    /// Packs one expert as banks hold it: gate and up rows, their scales, down rows, their scales.
    pub(super) fn pack(&self, source: &dyn Source, expert: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        for (stack, cols) in [(self.gate_up(expert), self.hidden), (self.down(expert), self.width)]
        {
            let n_rows = stack.iter().map(Rows::stacked).sum();
            let mut scales = Vec::new();
            pack(source, &stack, 0..n_rows, Cols::all(cols), self.format, |_, packed| {
                bytes.extend(packed.weights);
                scales.extend(packed.scales);
            })?;
            bytes.extend(bytemuck::cast_slice::<f32, u8>(&scales));
        }
        Ok(bytes)
    }

    /// Bytes of one packed expert.
    pub(super) fn expert_bytes(&self) -> u64 {
        let matrix = |stack: Vec<Rows>, cols: usize| {
            let n_rows: usize = stack.iter().map(Rows::stacked).sum();
            n_rows * (self.format.bytes_per_row(cols) + 4 * self.format.scales_per_row(cols))
        };
        (matrix(self.gate_up(0), self.hidden) + matrix(self.down(0), self.width)) as u64
    }

    /// Loads some experts, in this order.
    pub(super) fn load(&self, loader: &mut Loader<'_>, experts: &[usize]) -> Result<Banks> {
        let (hidden, width) = (Cols::all(self.hidden), Cols::all(self.width));
        let gate_up = loader.banks(experts, |e| self.gate_up(e), hidden, self.format)?;
        let down = loader.banks(experts, |e| self.down(e), width, self.format)?;
        Ok(Banks { gate_up, down })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::Device, model::arch, weights::MemorySource};

    const SIZES: (usize, usize, usize) = (3, 5, 7); // Experts, hidden, width.

    /// `f(expert, row, col)` for `rows` of some experts.
    fn values(experts: &[usize], rows: usize, cols: usize, first: usize) -> Vec<f32> {
        let of = |e| (first..first + rows).flat_map(move |r| (0..cols).map(move |c| (e, r, c)));
        experts.iter().flat_map(|&e| of(e)).map(|(e, r, c)| (e * 400 + r * 20 + c) as f32).collect()
    }

    /// Bytes of the banks that load from `source`, gate and up before down.
    fn banks(source: &MemorySource) -> Vec<Vec<u8>> {
        let (n_experts, hidden, width) = SIZES;
        let config = serde_json::json!({
            "model_type": "mixtral", "vocab_size": 8, "hidden_size": hidden, "head_dim": 2,
            "num_attention_heads": 1, "num_hidden_layers": 1, "intermediate_size": width,
            "num_local_experts": n_experts, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 64,
        });
        let spec = arch::parse(&config).unwrap();
        let mut device = Device::cpu();
        let (_, moe) = spec.moe_layers().next().unwrap();
        let mut loader = Loader::new(source, &mut device, &|_| {});
        let precision = Precision::of(WeightFormat::F32);
        let shape = BankShape {
            names: names(|name| loader.contains(name), &spec, 0).1,
            n_experts,
            hidden,
            width: moe.intermediate_size,
            format: precision.experts,
        };
        let banks = shape.load(&mut loader, &[0, 1, 2]).unwrap();
        let all = banks.gate_up.iter().chain(&banks.down);
        all.map(|(_, bank)| device.read_now(&bank.weights).unwrap()).collect()
    }

    #[test]
    fn fused_experts_load_like_single_ones() {
        let (n_experts, hidden, width) = SIZES;
        let (mut each, mut fused) = (MemorySource::new(), MemorySource::new());
        let insert = |source: &mut MemorySource, name: &str, shape: &[usize], values: &[f32]| {
            source.insert_f32(&format!("model.layers.0.{name}"), shape, values).unwrap();
        };
        let gate = vec![1.0; n_experts * hidden];
        insert(&mut each, "block_sparse_moe.gate.weight", &[n_experts, hidden], &gate);
        insert(&mut fused, "mlp.gate.weight", &[n_experts, hidden], &gate);
        for e in 0..n_experts {
            let tensors = [
                ("w1", [width, hidden], values(&[e], width, hidden, 0)),
                ("w3", [width, hidden], values(&[e], width, hidden, width)),
                ("w2", [hidden, width], values(&[e], hidden, width, 0)),
            ];
            for (name, shape, values) in tensors {
                let name = format!("block_sparse_moe.experts.{e}.{name}.weight");
                insert(&mut each, &name, &shape, &values);
            }
        }
        let all: Vec<usize> = (0..n_experts).collect();
        let gate_up = values(&all, 2 * width, hidden, 0);
        let down = values(&all, hidden, width, 0);
        let shape = [n_experts, 2 * width, hidden];
        insert(&mut fused, "mlp.experts.gate_up_proj", &shape, &gate_up);
        insert(&mut fused, "mlp.experts.down_proj", &[n_experts, hidden, width], &down);
        let expected = banks(&each);
        assert!(expected.iter().flatten().any(|&byte| byte != 0));
        assert_eq!(banks(&fused), expected);
    }
}
