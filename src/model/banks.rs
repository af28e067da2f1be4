//! Banks of experts: what a checkpoint calls their matrices, and how they are loaded side by side.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use crate::{
    Result,
    device::{Caps, Device, Tensor},
    kernels::{ExpertGemm, Matrix},
    weights::{Source, WeightFormat},
};

use super::{
    ModelError, ModelSpec, MoeSpec, Precision,
    loader::Loader,
    rows::{Cols, Fused, Rows, pack},
};

/// Weights of a set of experts, gate rows above up rows: (place of the first, matrices).
#[derive(Debug, Clone)]
pub(super) struct Banks {
    pub(super) gate_up: Vec<(usize, Matrix)>,
    pub(super) down: Vec<(usize, Matrix)>,
}

impl Banks {
    /// Where the expert at `place` lies, in the order of [`BankShape::pack`].
    pub(super) fn parts(&self, place: usize) -> Vec<Tensor> {
        [&self.gate_up, &self.down].into_iter().flat_map(|banks| parts(banks, place)).collect()
    }

    /// Overwrites the expert at `place` with a packed one.
    pub(super) fn write(&self, device: &mut Device, place: usize, mut packed: &[u8]) {
        for part in self.parts(place) {
            let (bytes, rest) = packed.split_at(part.bytes() as usize);
            device.write_at(&part, 0, bytes);
            packed = rest;
        }
    }

    /// The packed expert at `place`.
    pub(super) fn read(&self, device: &mut Device, place: usize) -> Result<Vec<u8>> {
        Ok(device.read_all(&self.parts(place)).wait_now()?)
    }

    /// Bytes that are allocated, and those of them that hold weights or scales of the first `n`
    /// experts, with `hidden` inputs and outputs and this width between.
    pub(super) fn bytes(&self, n: usize, hidden: usize, width: usize) -> (u64, u64) {
        let gate_up = self.gate_up.iter().map(|(first, bank)| (first, bank, 2 * width, hidden));
        let down = self.down.iter().map(|(first, bank)| (first, bank, hidden, width));
        let bytes = |(first, bank, rows, cols): (&usize, &Matrix, usize, usize)| {
            let (allocated, of_one) = bank.bytes(rows, cols);
            (allocated, of_one * n.saturating_sub(*first).min(bank.n_experts) as u64)
        };
        let all = gate_up.chain(down).map(bytes);
        all.fold((0, 0), |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1))
    }
}

fn parts(banks: &[(usize, Matrix)], place: usize) -> Vec<Tensor> {
    let inside =
        |&&(first, bank): &&(usize, Matrix)| (first..first + bank.n_experts).contains(&place);
    let &(first, bank) = banks.iter().find(inside).expect("a place in one of the banks");
    let expert = part(&bank, place - first..place - first + 1);
    let scales = (bank.scales != bank.weights).then_some(expert.scales);
    std::iter::once(expert.weights).chain(scales).collect()
}

/// Some experts of a bank as a bank of their own.
fn part(bank: &Matrix, experts: Range<usize>) -> Matrix {
    let rows = experts.start * bank.rows..experts.end * bank.rows;
    let weights = bank.weights.slice(rows.clone());
    let scales = if bank.scales == bank.weights { weights } else { bank.scales.slice(rows) };
    Matrix { weights, scales, n_experts: experts.len(), ..*bank }
}

/// Each expert of these banks as a bank of its own. One that does not start at the device's
/// alignment comes with those before it, which are then computed again.
pub(super) fn singles(banks: &[(usize, Matrix)], caps: &Caps) -> Vec<(usize, Matrix)> {
    let aligned = |tensor: Tensor| tensor.offset.is_multiple_of(caps.offset_alignment.into());
    let single = |first: usize, bank: &Matrix, i: usize| {
        let parts = (0..=i).rev().map(|start| (first + start, part(bank, start..i + 1)));
        let mut bound = parts.filter(|(_, p)| aligned(p.weights) && aligned(p.scales));
        bound.next().expect("buffers start aligned")
    };
    let of_bank = |&(first, bank): &(usize, Matrix)| {
        (0..bank.n_experts).map(move |i| single(first, &bank, i))
    };
    banks.iter().flat_map(of_bank).collect()
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
    /// Numbers of the experts that have tensors among `names`, which are taken out.
    pub(super) fn find(&self, names: &mut Vec<String>, n_experts: usize) -> BTreeSet<usize> {
        let mut found = BTreeSet::new();
        match self {
            Self::Each(prefix, projections) => {
                let number = |name: &String| -> Option<usize> {
                    let rest = name.strip_prefix(prefix.as_str())?.strip_prefix('.')?;
                    let (number, rest) = rest.split_once('.')?;
                    let projection = rest.strip_suffix(".weight")?;
                    projections.contains(&projection).then(|| number.parse().ok())?
                };
                found.extend(names.iter().filter_map(number));
                names.retain(|name| number(name).is_none());
            }
            Self::Fused(prefix) => {
                let fused = ["gate_up_proj", "down_proj"].map(|p| format!("{prefix}.{p}"));
                let n = names.len();
                names.retain(|name| !fused.contains(name));
                found.extend(0..if names.len() < n { n_experts } else { 0 });
            }
            Self::Single(_) => {}
        }
        found
    }

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

/// Names and shapes of the tensors of a checkpoint that hold routed experts, each once.
pub fn expert_tensors(spec: &ModelSpec, source: &dyn Source) -> BTreeMap<String, Vec<usize>> {
    let of_layer = |(index, moe): (usize, &MoeSpec)| {
        let (_, names) = names(|name| source.contains(name), spec, index);
        let (n, width) = (moe.routing.n_experts, moe.intermediate_size);
        let of_expert = |expert: usize| {
            let down = names.down(n, expert, spec.hidden_size).place(width);
            let gate_up = names.gate_up(n, expert, width);
            let gate_up = gate_up.iter().map(|rows| rows.place(spec.hidden_size));
            gate_up.chain([down]).collect::<Vec<_>>()
        };
        (0..n).flat_map(of_expert).collect::<Vec<_>>()
    };
    spec.moe_layers().flat_map(of_layer).collect()
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
            n_experts: moe.n_present(),
            hidden: spec.hidden_size,
            width: moe.intermediate_size,
            format: precision.experts,
        }
    }

    /// Nothing for experts that are not there yet.
    fn gate_up(&self, expert: usize) -> Vec<Rows> {
        match expert < self.n_experts {
            true => self.names.gate_up(self.n_experts, expert, self.width),
            false => Vec::new(),
        }
    }

    fn down(&self, expert: usize) -> Vec<Rows> {
        match expert < self.n_experts {
            true => vec![self.names.down(self.n_experts, expert, self.hidden)],
            false => Vec::new(),
        }
    }

    /// Packs one expert as banks hold it: gate and up rows, their scales, down rows, their scales.
    /// All is zero in one that is not there yet.
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
        bytes.resize(self.expert_bytes() as usize, 0);
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

    /// Loads some experts, in this order, into the first of so many places.
    ///
    /// # Errors
    /// [`ModelError::Int8Activations`] on a device that does better without them.
    pub(super) fn load(
        &self,
        loader: &mut Loader<'_>,
        experts: &[usize],
        n_places: usize,
    ) -> Result<Banks> {
        if self.format == WeightFormat::W8A8 && !ExpertGemm::gains_by_int8(loader.caps()) {
            let what = "adapters without cooperative matrices, and this one has them";
            return Err(ModelError::Int8Activations { what }.into());
        }
        let (hidden, width) = (Cols::all(self.hidden), Cols::all(self.width));
        let gate_up = loader.banks(experts, n_places, |e| self.gate_up(e), hidden, self.format)?;
        let down = loader.banks(experts, n_places, |e| self.down(e), width, self.format)?;
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
        let banks = shape.load(&mut loader, &[0, 1, 2], 3).unwrap();
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
