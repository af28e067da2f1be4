//! The whole network: weights, and the recording of one step through them.

use crate::{
    Result,
    device::{Allocate, DType, Device, Recording, Tally, Tensor},
    kernels::{CountExperts, Embed, Logprobs, Norm, RmsNorm, Sample, SampleStage, Store, sample},
    parallel::{CacheLayer, ExpertLayout, Handoff},
    weights::Source,
};

use super::{
    FfnSpec, KvCache, ModelSpec, MoeSpec, Precision, Scratch, Split, StepInputs, StepShape,
    attention::Attention,
    experts::Experts,
    linear::{Input, Linear},
    loader::Loader,
    mlp::Mlp,
    regime::ExpertShape,
    rope::rope_table,
    routed_experts::RoutedExperts,
    rows::{Cols, Rows},
    scratch::Buffers,
};

/// A loaded model: handles to weights on one device.
#[derive(Debug, Clone)]
pub struct Model {
    /// What it looks like.
    pub spec: ModelSpec,
    /// Number formats.
    pub precision: Precision,
    embedding: Linear,
    layers: Vec<Layer>,
    norm: Tensor,
    lm_head: Linear,
    /// Cosines and sines by position. F32 `[n_positions, rotary_dim]`
    rope: Tensor,
}

#[derive(Debug, Clone)]
struct Layer {
    input_norm: Tensor,
    attention: Attention,
    post_norm: Tensor,
    ffn: Ffn,
}

/// Rows that go through the layers together.
struct Part {
    shape: StepShape,
    inputs: StepInputs,
    buffers: Buffers,
}

#[derive(Debug, Clone)]
enum Ffn {
    Dense(Mlp, usize),
    Moe(Box<Experts>),
}

impl Model {
    /// Loads weights to `device`, for contexts of up to `n_positions`; `progress` hears of bytes
    /// uploaded.
    ///
    /// # Errors
    /// [`crate::weights::WeightsError`] for missing or misshapen tensors,
    /// [`crate::device::DeviceError`] where they do not fit.
    pub fn load(
        spec: ModelSpec,
        source: &dyn Source,
        device: &mut Device,
        precision: Precision,
        n_positions: usize,
        progress: &dyn Fn(u64),
    ) -> Result<Self> {
        let all = ExpertLayout::default();
        Self::load_part(spec, source, device, precision, n_positions, &all, progress)
    }

    /// [`Model::load`] with the experts that `layout` says; only those are read.
    ///
    /// # Errors
    /// Those of [`Model::load`].
    pub fn load_part(
        spec: ModelSpec,
        source: &dyn Source,
        device: &mut Device,
        precision: Precision,
        n_positions: usize,
        layout: &ExpertLayout,
        progress: &dyn Fn(u64),
    ) -> Result<Self> {
        let a = &spec.attention;
        let rope = device.alloc("rope table", &[n_positions, a.rotary_dim], DType::F32)?;
        device.write(&rope, &rope_table(n_positions, a.rotary_dim, a.rope_theta, &a.rope_scaling));
        let mut loader = Loader::new(source, device, progress);
        Self::build(spec, precision, rope, &mut loader, layout)
    }

    /// Whether a step of many tokens multiplies those of all experts in one launch, block by block,
    /// as it does unless told otherwise, or loops over the experts, to compare with.
    #[must_use]
    pub fn with_block_align(mut self, on: bool) -> Self {
        self.experts_mut().for_each(|experts| experts.routed_mut().set_block_align(on));
        self
    }

    /// Adds up what [`Model::load_part`] would allocate.
    ///
    /// # Errors
    /// [`crate::device::DeviceError::TooLarge`] if a piece exceeds every binding.
    pub fn tally(
        spec: &ModelSpec,
        precision: Precision,
        n_positions: usize,
        layout: &ExpertLayout,
        tally: &mut Tally,
    ) -> Result<()> {
        let shape = [n_positions, spec.attention.rotary_dim];
        let rope = tally.alloc("rope table", &shape, DType::F32)?;
        Self::build(spec.clone(), precision, rope, &mut Loader::counting(tally), layout)?;
        Ok(())
    }

    fn build(
        spec: ModelSpec,
        precision: Precision,
        rope: Tensor,
        loader: &mut Loader<'_>,
        layout: &ExpertLayout,
    ) -> Result<Self> {
        let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut table = |name: &str| {
            let rows = Rows::all(name.to_owned(), vocab);
            loader.linear(&[rows], Cols::all(hidden), precision.rest, false)
        };
        let embedding = table("model.embed_tokens")?;
        let lm_head = match spec.tie_word_embeddings {
            true => embedding.clone(),
            false => table("lm_head")?,
        };
        let layers = (0..spec.layers.len())
            .map(|i| Layer::load(loader, &spec, i, precision, layout))
            .collect::<Result<_>>()?;
        let norm = loader.vector(&[("model.norm.weight".to_owned(), hidden, None)])?;
        Ok(Self { spec, precision, embedding, layers, norm, lm_head, rope })
    }

    /// Bytes of the experts' banks on this device: allocated, and of those the ones that hold
    /// weights and scales rather than padding and room for more.
    pub fn expert_bytes(&self) -> (u64, u64) {
        let n_present = self.spec.n_present();
        let banks = self.routed_experts().map(|routed| routed.bytes(n_present));
        banks.fold((0, 0), |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1))
    }

    /// The layers that have experts.
    pub(super) fn experts(&self) -> impl Iterator<Item = &Experts> {
        self.layers.iter().filter_map(|layer| match &layer.ffn {
            Ffn::Moe(experts) => Some(&**experts),
            Ffn::Dense(..) => None,
        })
    }

    /// The same, to change some.
    pub(super) fn experts_mut(&mut self) -> impl Iterator<Item = &mut Experts> {
        self.layers.iter_mut().filter_map(|layer| match &mut layer.ffn {
            Ffn::Moe(experts) => Some(&mut **experts),
            Ffn::Dense(..) => None,
        })
    }

    /// The routed experts of each layer that has some.
    pub(super) fn routed_experts(&self) -> impl Iterator<Item = &RoutedExperts> {
        self.experts().map(Experts::routed)
    }

    /// Counters of each layer that has slots for some of its experts, see
    /// [`crate::kernels::CacheExperts`], and its size.
    pub fn expert_caches(&self) -> impl Iterator<Item = (Tensor, CacheLayer)> {
        let homes = self.routed_experts().filter_map(RoutedExperts::home);
        homes.map(|home| (home.counters(), home.size()))
    }

    /// Longest context that the rotary table covers.
    pub fn n_positions(&self) -> usize {
        self.rope.rows()
    }

    /// Records one step: embeds the tokens in `scratch.inputs`, runs all layers, leaves logits of
    /// the chosen rows in `scratch.logits` and, if asked, sampled tokens in `scratch.sampled`.
    pub fn record(&self, rec: &mut Recording, shape: &StepShape, scratch: &Scratch, kv: &KvCache) {
        let (inputs, buffers) = (&scratch.inputs, &scratch.buffers);
        let n = shape.n_tokens();
        let residual = buffers.rows(buffers.residual, n);
        let ids = inputs.ids.reshape(&[n]);
        for (first_row, table) in self.embedding.parts() {
            rec.push(Embed { ids, sampled: scratch.sampled, table, first_row, out: residual });
        }
        let part = |(at, shape): (Split, StepShape)| Part {
            shape,
            inputs: inputs.from(at),
            buffers: buffers.from(at.row),
        };
        let parts: Vec<Part> = shape.parts().into_iter().map(part).collect();
        for index in 0..self.layers.len() {
            for part in &parts {
                self.record_others(rec, part, index);
                self.record_layer(rec, part, index, kv);
            }
        }
        parts.iter().for_each(|part| self.record_others(rec, part, self.layers.len()));
        if shape.sample {
            self.record_counts(rec, n, scratch);
        }
        if shape.n_logits > 0 {
            self.record_logits(rec, shape, scratch);
        }
    }

    /// What other devices computed in the layer before `index`.
    fn record_others(&self, rec: &mut Recording, part: &Part, index: usize) {
        let before = index.checked_sub(1).map(|before| &self.layers[before].ffn);
        if let Some(Ffn::Moe(experts)) = before {
            let (buffers, n) = (&part.buffers, part.shape.n_tokens());
            experts.record_others(rec, buffers, buffers.rows(buffers.residual, n));
        }
    }

    fn record_layer(&self, rec: &mut Recording, part: &Part, index: usize, kv: &KvCache) {
        let Part { shape, inputs, buffers } = part;
        let (layer, n) = (&self.layers[index], shape.n_tokens());
        let residual = buffers.rows(buffers.residual, n);
        let normed = buffers.rows(buffers.normed, n);
        let x = Input::normalised(rec, residual, self.norm(layer.input_norm), normed);
        layer.attention.record(rec, &self.spec, shape, inputs, buffers, kv, self.rope, x, residual);
        let norm = self.norm(layer.post_norm);
        match (&layer.ffn, buffers.routed[index]) {
            (Ffn::Moe(experts), Some(routed)) => {
                experts.record(rec, inputs, buffers, routed, Some(norm), residual);
            }
            (Ffn::Dense(mlp, width), _) => {
                let x = Input::normalised(rec, residual, norm, normed);
                mlp.record(rec, x, residual, buffers, *width);
            }
            (Ffn::Moe(_), None) => unreachable!("buffers come from the same spec"),
        }
    }

    fn norm(&self, weight: Tensor) -> Norm {
        Norm { weight, cols: self.spec.hidden_size, eps: self.spec.rms_norm_eps }
    }

    /// Records only the mixtures of experts, to measure them: on the same normalised input, or
    /// where the router normalises on the way, on the sum so far.
    pub(crate) fn record_experts(&self, rec: &mut Recording, scratch: &Scratch, n: usize) {
        let buffers = &scratch.buffers;
        let residual = buffers.rows(buffers.residual, n);
        for (layer, routed) in self.layers.iter().zip(&buffers.routed) {
            if let (Ffn::Moe(experts), Some(routed)) = (&layer.ffn, routed) {
                let norm = experts.normalises(rec.caps(), n).then(|| self.norm(layer.post_norm));
                experts.record(rec, &scratch.inputs, buffers, *routed, norm, residual);
            }
        }
    }

    /// Adds the experts' work to the counts, layers of one kind at a time.
    fn record_counts(&self, rec: &mut Recording, n_tokens: usize, scratch: &Scratch) {
        let Some(sums) = scratch.expert_counts else { return };
        let (all_ids, activations) = (scratch.buffers.all_ids, self.precision.activations);
        let shape = |(_, moe): (_, &MoeSpec)| ExpertShape::of(&self.spec, moe, self.precision);
        let shapes: Vec<ExpertShape> = self.spec.moe_layers().map(shape).collect();
        let mut start = 0;
        for alike in shapes.chunk_by(|a, b| a == b) {
            let layers = start..start + alike.len();
            start = layers.end;
            rec.push(CountExperts {
                ids: all_ids.slice(layers.clone()),
                n_entries: n_tokens * alike[0].top_k,
                n_experts: alike[0].n_experts,
                block_size: alike[0].block_tokens(rec.caps(), activations, n_tokens),
                sums: sums.slice(layers),
            });
        }
    }

    fn record_logits(&self, rec: &mut Recording, shape: &StepShape, scratch: &Scratch) {
        let (inputs, buffers, m) = (&scratch.inputs, &scratch.buffers, shape.n_logits);
        let last = buffers.rows(buffers.last, m);
        let logits = buffers.rows(scratch.logits, m);
        let (x, norm) = (buffers.rows(buffers.residual, shape.n_tokens()), self.norm(self.norm));
        rec.push(RmsNorm { x, rows: Some(inputs.logit_rows.reshape(&[m])), norm, out: last });
        self.lm_head.record(rec, "lm_head", last, logits, Store::Set);
        if shape.sample {
            let kernel = Sample {
                logits,
                n_vocab: self.spec.vocab_size,
                rows: inputs.sampling.reshape(&[m, inputs.sampling.cols()]),
                masks: inputs.masks,
                biases: inputs.biases,
                counts: scratch.counts,
                scratch: buffers.rows(scratch.sample_scratch, m),
                slices: scratch.sample_slices,
                ids: scratch.sampled.reshape(&[m]),
                stage: SampleStage::Whole,
            };
            sample(rec, kernel);
        }
        if shape.logprobs {
            rec.push(Logprobs {
                logits,
                n_vocab: self.spec.vocab_size,
                rows: inputs.sampling.reshape(&[m, inputs.sampling.cols()]),
                ids: scratch.sampled.reshape(&[m]),
                logprobs: scratch.logprobs.reshape(&[m, Logprobs::COLS]),
                top_ids: scratch.top_ids.reshape(&[m, Logprobs::MOST]),
            });
        }
    }
}

impl Scratch {
    /// Writes noise to the first `n` rows that mixtures of experts take as input.
    pub(crate) fn fill_normed(&self, device: &mut Device, n: usize) {
        let rows = self.buffers.rows(self.buffers.normed, n);
        let residual = self.buffers.rows(self.buffers.residual, n);
        let noise = |i: usize| {
            let bits =
                (i as u32).wrapping_mul(0x9E37_79B9).rotate_left(13).wrapping_mul(0x85EB_CA6B);
            (bits >> 8) as f32 / (1u32 << 23) as f32 - 1.0
        };
        let values: Vec<f32> = (0..rows.len()).map(noise).collect();
        device.write(&residual, &values);
        match rows.dtype {
            DType::F16 => {
                let values: Vec<half::f16> =
                    values.iter().map(|&v| half::f16::from_f32(v)).collect();
                device.write(&rows, &values);
            }
            _ => device.write(&rows, &values),
        }
    }

    /// What lies between router and experts of each layer that has some, in the order in which
    /// [`Model::record`] has them.
    pub(crate) fn handoffs(&self, spec: &ModelSpec, shape: &StepShape) -> Vec<Handoff> {
        let parts: Vec<(Buffers, usize)> = shape
            .parts()
            .into_iter()
            .map(|(at, shape)| (self.buffers.from(at.row), shape.n_tokens()))
            .collect();
        let handoff = |(layer, (index, moe)): (usize, (usize, &MoeSpec))| {
            let of_part = move |(buffers, n): &(Buffers, usize)| {
                let routed = buffers.routed[index].expect("buffers come from the same spec");
                let (ids, weights) = routed.rows(*n, moe.routing.top_k);
                let (x, partial) =
                    (buffers.rows(buffers.normed, *n), buffers.rows(buffers.partial, *n));
                Handoff { layer, x, ids, weights, partial }
            };
            parts.iter().map(of_part).collect::<Vec<_>>()
        };
        spec.moe_layers().enumerate().flat_map(handoff).collect()
    }

    /// Expert ids I32 and weights F32 `[n, top_k]` that the last step of `n` tokens chose, by
    /// layer; dense layers have none.
    pub fn routed(&self, spec: &ModelSpec, n: usize) -> Vec<Option<(Tensor, Tensor)>> {
        let layers = spec.layers.iter().zip(&self.buffers.routed);
        layers
            .map(|(layer, routed)| match (&layer.ffn, routed) {
                (FfnSpec::Moe(moe), Some(routed)) => Some(routed.rows(n, moe.routing.top_k)),
                _ => None,
            })
            .collect()
    }
}

impl Layer {
    fn load(
        loader: &mut Loader<'_>,
        spec: &ModelSpec,
        index: usize,
        precision: Precision,
        layout: &ExpertLayout,
    ) -> Result<Self> {
        let prefix = format!("model.layers.{index}");
        let hidden = spec.hidden_size;
        let mut norm =
            |name: &str| loader.vector(&[(format!("{prefix}.{name}.weight"), hidden, None)]);
        let input_norm = norm("input_layernorm")?;
        let post_norm = norm("post_attention_layernorm")?;
        let attention = Attention::load(loader, spec, index, precision)?;
        let ffn = match &spec.layers[index].ffn {
            FfnSpec::Dense(width) => {
                let prefix = format!("{prefix}.mlp");
                Ffn::Dense(Mlp::load(loader, &prefix, hidden, *width, precision.rest)?, *width)
            }
            FfnSpec::Moe(moe) => {
                Ffn::Moe(Box::new(Experts::load(loader, spec, moe, index, precision, layout)?))
            }
        };
        Ok(Self { input_norm, attention, post_norm, ffn })
    }
}
