//! Memory of a step: inputs that the host rewrites, activations that kernels hand on, outputs.
//! Allocated once for the largest step; a smaller one uses the front of each tensor.

use crate::{
    Result,
    device::{Allocate, Caps, DType, Tensor},
    kernels::{
        Aligned, AttentionParts, CountExperts, Logprobs, PREFILL_TILE, QuantizeRows, Route, Sample,
        SamplingRow,
    },
    weights::{PAD, WeightFormat, padded},
};

use super::{FfnSpec, ModelSpec, Precision, kv_cache::head_stride, routed_experts::BLOCK_SIZES};

/// The largest step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Tokens of all sequences together.
    pub max_tokens: usize,
    /// Sequences.
    pub max_sequences: usize,
    /// Rows of logits.
    pub max_logits: usize,
    /// Blocks of one sequence.
    pub max_blocks: usize,
    /// Sequences whose generated tokens are counted for penalties.
    pub max_penalized: usize,
}

/// Sizes that a recording depends on; plans are made once per shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StepShape {
    /// Leading tokens that attend one by one.
    pub n_decode: usize,
    /// Tokens after them, which attend in tiles.
    pub n_prefill: usize,
    /// Tiles of the latter.
    pub n_tiles: usize,
    /// Rows of logits.
    pub n_logits: usize,
    /// Whether a token is sampled from each row of logits, and the experts' work counted.
    pub sample: bool,
    /// Whether log probabilities of sampled tokens are wanted.
    pub logprobs: bool,
    /// Where the step is split, if it is.
    pub split: Option<Split>,
}

/// Splits a step's rows in two that go through the layers in turn, so that one's trip to other
/// devices hides behind the other's work ("dual batch overlap").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Split {
    /// First row of the second part.
    pub row: usize,
    /// Its first tile; rows of its tiles count from `row`.
    pub tile: usize,
}

impl StepShape {
    /// All tokens.
    pub fn n_tokens(&self) -> usize {
        self.n_decode + self.n_prefill
    }

    /// Parts that go through the layers in turn: where each starts, and its shape.
    pub(super) fn parts(&self) -> Vec<(Split, Self)> {
        let start = Split { row: 0, tile: 0 };
        let Some(split) = self.split else { return vec![(start, *self)] };
        let n_decode = self.n_decode.min(split.row);
        let first = Self {
            n_decode,
            n_prefill: split.row - n_decode,
            n_tiles: split.tile,
            split: None,
            ..*self
        };
        let second = Self {
            n_decode: self.n_decode - n_decode,
            n_prefill: self.n_prefill - first.n_prefill,
            n_tiles: self.n_tiles - split.tile,
            split: None,
            ..*self
        };
        vec![(start, first), (split, second)]
    }
}

/// What the host writes before each step.
#[derive(Debug, Clone, Copy)]
pub struct StepInputs {
    /// U32 `[max_tokens]`
    pub ids: Tensor,
    /// Position, cache slot (`u32::MAX`: padding), sequence, 0. U32 `[max_tokens, 4]`
    pub tokens: Tensor,
    /// U32 `[max_sequences, max_blocks]`
    pub block_tables: Tensor,
    /// First token row, rows, sequence, first position. U32 `[max_tiles, 4]`
    pub tiles: Tensor,
    /// Token rows whose logits are wanted. U32 `[max_logits]`
    pub logit_rows: Tensor,
    /// Sampling parameters, U32 `[max_logits, SamplingRow::WORDS]`
    pub sampling: Tensor,
    /// Bits of tokens that may be sampled. U32 `[max_sequences, vocabulary / 32]`
    pub masks: Tensor,
    /// Tokens and what is added to their logits. U32 `[max_sequences * MAX_BIASES, 2]`
    pub biases: Tensor,
}

impl StepInputs {
    /// Those of tokens and tiles from `at` on.
    pub(super) fn from(&self, at: Split) -> Self {
        Self { tokens: self.tokens.skip(4 * at.row), tiles: self.tiles.skip(4 * at.tile), ..*self }
    }
}

/// Router outputs of one layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Routed {
    /// F32 `[max_tokens, padded experts]`, shared by all layers
    pub(super) logits: Tensor,
    ids: Tensor,
    weights: Tensor,
}

impl Routed {
    /// Ids I32 and weights F32 of `n` tokens, `[n, top_k]`.
    pub(super) fn rows(&self, n: usize, top_k: usize) -> (Tensor, Tensor) {
        (self.ids.reshape(&[n, top_k]), self.weights.reshape(&[n, top_k]))
    }
}

/// Activations.
#[derive(Debug, Clone)]
pub(super) struct Buffers {
    /// Residual stream. F32 `[max_tokens, hidden]`
    pub(super) residual: Tensor,
    /// Normalised input of a sublayer. `[max_tokens, hidden]`
    pub(super) normed: Tensor,
    /// F32 `[max_tokens, heads and twice the kv heads]`
    pub(super) qkv: Tensor,
    /// F32 `[max_tokens, heads]`
    pub(super) q: Tensor,
    /// `[max_tokens, heads]`
    pub(super) attention: Tensor,
    /// Of attention to a long context by several workgroups.
    pub(super) attention_parts: AttentionParts,
    /// Gate and up products, flat; see [`Buffers::gated`].
    both: Tensor,
    /// Their gated product, flat.
    inner: Tensor,
    /// Rows that experts multiply in int8, flat; see [`Buffers::quantized`].
    quantized: Option<Tensor>,
    /// Outputs per expert slot. `[max_tokens * top_k, hidden]`
    pub(super) slots_hidden: Tensor,
    /// Sorted tokens of the aligned regime.
    pub(super) aligned: Option<Aligned>,
    /// Chosen experts by their places on this device. I32 `[max_tokens * top_k]`
    pub(super) local_ids: Tensor,
    /// The same by slots, where experts come and go. I32 `[max_tokens * top_k]`
    pub(super) slot_ids: Tensor,
    /// Sums of experts that other devices hold. F32 `[max_tokens, hidden]`
    pub(super) partial: Tensor,
    /// Zeros: one slot for each row, which holds something. I32 `[max_tokens, 1]`
    pub(super) one_slot: Tensor,
    /// Router of the shared expert's gate.
    pub(super) shared_gate: Routed,
    /// Logits and counters of the router of few tokens.
    /// F32 `[at most Route::MOST_TOKENS, padded experts + PAD]`
    pub(super) route: Tensor,
    /// Router outputs by layer; dense layers have none.
    pub(super) routed: Vec<Option<Routed>>,
    /// Experts chosen in all layers that have any, where `routed` points into.
    /// I32 `[moe layers, max_tokens * top_k, rounded up]`
    pub(super) all_ids: Tensor,
    /// Normalised rows whose logits are wanted. `[max_logits, hidden]`
    pub(super) last: Tensor,
}

impl Buffers {
    /// Those of rows from `row` on; what a kernel leaves for the next one alone is shared.
    pub(super) fn from(&self, row: usize) -> Self {
        let rows = |t: Tensor| t.slice(row..t.rows());
        // The slots of a token in the layer that has most.
        let top_k = self.slots_hidden.rows() / self.residual.rows();
        let slots = |t: Tensor| t.skip(row * top_k);
        let routed = |r: &Routed| Routed {
            logits: rows(r.logits),
            ids: r.ids.skip(row * r.weights.cols()),
            weights: rows(r.weights),
        };
        Self {
            residual: rows(self.residual),
            normed: rows(self.normed),
            qkv: rows(self.qkv),
            q: rows(self.q),
            attention: rows(self.attention),
            both: rows(self.both),
            inner: rows(self.inner),
            slots_hidden: self.slots_hidden.slice(row * top_k..self.slots_hidden.rows()),
            local_ids: slots(self.local_ids),
            slot_ids: slots(self.slot_ids),
            partial: rows(self.partial),
            one_slot: rows(self.one_slot),
            shared_gate: routed(&self.shared_gate),
            routed: self.routed.iter().map(|r| r.as_ref().map(routed)).collect(),
            ..self.clone()
        }
    }

    /// The first `n` rows.
    pub(super) fn rows(&self, tensor: Tensor, n: usize) -> Tensor {
        tensor.reshape(&[n, tensor.cols()])
    }

    /// Gate and up products `[n, 2 * width]` and their gated product `[n, width]`, padded.
    pub(super) fn gated(&self, n: usize, width: usize) -> (Tensor, Tensor) {
        let width = padded(width);
        (self.both.reshape(&[n, 2 * width]), self.inner.reshape(&[n, width]))
    }

    /// Rows of `cols` in int8, with their scales. I8 `[n, QuantizeRows::width(cols)]`
    pub(super) fn quantized(&self, n: usize, cols: usize) -> Tensor {
        let quantized = self.quantized.expect("allocated for experts that multiply in int8");
        quantized.reshape(&[n, QuantizeRows::width(cols)])
    }
}

/// Everything a step reads and writes besides weights and cache.
#[derive(Debug, Clone)]
pub struct Scratch {
    /// From the host.
    pub inputs: StepInputs,
    /// F32 `[max_logits, padded vocabulary]`
    pub logits: Tensor,
    /// Sampled tokens. U32 `[max_logits]`
    pub sampled: Tensor,
    /// Log probabilities of sampled and most probable tokens. F32 `[max_logits, Logprobs::COLS]`
    pub logprobs: Tensor,
    /// The most probable tokens. U32 `[max_logits, Logprobs::MOST]`
    pub top_ids: Tensor,
    /// Work of the experts since the start, of layers that have any, see [`CountExperts`].
    /// U32 `[moe layers, experts + CountExperts::TOTALS, rounded up]`
    pub expert_counts: Option<Tensor>,
    /// Tokens seen and generated. U32 `[max_penalized, vocabulary]`
    pub counts: Tensor,
    pub(super) sample_scratch: Tensor,
    pub(super) sample_slices: Tensor,
    pub(super) buffers: Buffers,
}

/// Sizes of the widest layer.
struct Widths {
    /// Layers with experts.
    n_moe: usize,
    top_k: usize,
    n_experts: usize,
    /// Elements of gate and up products of all slots of a token.
    inner: usize,
}

impl Widths {
    fn of(spec: &ModelSpec) -> Self {
        let mut widths = Self { n_moe: 0, top_k: 0, n_experts: 0, inner: 0 };
        for layer in &spec.layers {
            let inner = match &layer.ffn {
                FfnSpec::Dense(width) => padded(*width),
                FfnSpec::Moe(moe) => {
                    widths.n_moe += 1;
                    widths.top_k = widths.top_k.max(moe.routing.top_k);
                    widths.n_experts = widths.n_experts.max(moe.routing.n_experts);
                    let shared = moe.shared.as_ref().map_or(0, |s| padded(s.intermediate_size));
                    shared.max(moe.routing.top_k * padded(moe.intermediate_size))
                }
            };
            widths.inner = widths.inner.max(inner);
        }
        widths
    }
}

impl Limits {
    /// Most tiles a step can have: each sequence may end one early.
    pub fn max_tiles(&self) -> usize {
        self.max_tokens.div_ceil(PREFILL_TILE) + self.max_sequences
    }

    /// The same limits with as few tokens a step as the device can bind.
    pub fn fit(mut self, spec: &ModelSpec, caps: &Caps) -> Self {
        let widths = Widths::of(spec);
        let hidden = padded(spec.hidden_size) * widths.top_k.max(1);
        let widest = (hidden.max(2 * widths.inner) * 4) as u64;
        let logits = (padded(spec.vocab_size) * 4) as u64;
        let binding = caps.max_binding_bytes.min(caps.max_buffer_bytes);
        let most = |bytes: u64| usize::try_from(binding / bytes).unwrap_or(usize::MAX).max(1);
        self.max_tokens = self.max_tokens.min(most(widest));
        self.max_logits = self.max_logits.min(most(logits));
        self
    }
}

impl Scratch {
    /// Allocates everything for steps up to `limits` of a model in `precision`.
    ///
    /// # Errors
    /// [`crate::device::DeviceError`] where it does not fit.
    pub fn alloc(
        device: &mut dyn Allocate,
        spec: &ModelSpec,
        limits: &Limits,
        precision: Precision,
    ) -> Result<Self> {
        let (n, m) = (limits.max_tokens, limits.max_logits);
        let vocab = padded(spec.vocab_size);
        // One after the other, so that a kernel can bind them as one; whole 256 bytes, at which
        // every device can bind.
        let (tables, line) = ([limits.max_sequences, limits.max_blocks], 64);
        let n_lines = [n * 4, tables[0] * tables[1]].map(|words| words.div_ceil(line));
        let lines = [n_lines[0] + n_lines[1], line];
        let places = device.alloc("tokens and block tables", &lines, DType::U32)?;
        let inputs = StepInputs {
            ids: device.alloc("token ids", &[n], DType::U32)?,
            tokens: places.slice(0..n_lines[0]).reshape(&[n, 4]),
            block_tables: places.slice(n_lines[0]..lines[0]).reshape(&tables),
            tiles: device.alloc("tiles", &[limits.max_tiles(), 4], DType::U32)?,
            logit_rows: device.alloc("logit rows", &[m], DType::U32)?,
            sampling: device.alloc("sampling", &[m, SamplingRow::WORDS], DType::U32)?,
            masks: device.alloc(
                "token masks",
                &[limits.max_sequences, spec.vocab_size.div_ceil(32)],
                DType::U32,
            )?,
            biases: device.alloc(
                "logit biases",
                &[limits.max_sequences * Sample::MAX_BIASES, 2],
                DType::U32,
            )?,
        };
        let widths = Widths::of(spec);
        // Whole 256 bytes per layer, at which every device can bind.
        let n_sums = (widths.n_experts + CountExperts::TOTALS).next_multiple_of(64);
        let sums = [widths.n_moe, n_sums];
        let expert_counts = match widths.n_moe {
            0 => None,
            _ => Some(device.alloc("expert counts", &sums, DType::U32)?),
        };
        let counts = [limits.max_penalized.max(1), spec.vocab_size];
        Ok(Self {
            inputs,
            logits: device.alloc("logits", &[m, vocab], DType::F32)?,
            sampled: device.alloc("sampled", &[m], DType::U32)?,
            logprobs: device.alloc("logprobs", &[m, Logprobs::COLS], DType::F32)?,
            top_ids: device.alloc("top ids", &[m, Logprobs::MOST], DType::U32)?,
            expert_counts,
            counts: device.alloc("token counts", &counts, DType::U32)?,
            sample_scratch: device.alloc("sample scratch", &[m, vocab], DType::F32)?,
            sample_slices: Sample::alloc_slices(device, m, spec.vocab_size)?,
            buffers: Buffers::alloc(device, spec, limits, precision)?,
        })
    }
}

impl Buffers {
    pub(super) fn alloc(
        device: &mut dyn Allocate,
        spec: &ModelSpec,
        limits: &Limits,
        precision: Precision,
    ) -> Result<Self> {
        let (n, act) = (limits.max_tokens, precision.activations);
        let hidden = padded(spec.hidden_size);
        let a = &spec.attention;
        let (head, widths) = (head_stride(spec), Widths::of(spec));
        let heads = padded(a.n_heads * head);
        let qkv = padded((a.n_heads + 2 * a.n_kv_heads) * head);
        let slots = n * widths.top_k.max(1);
        let logits = device.alloc("router logits", &[n, padded(widths.n_experts)], DType::F32)?;
        // Whole 256 bytes per layer, at which every device can bind.
        let stride = slots.next_multiple_of(64);
        let all_ids = device.alloc("expert ids", &[widths.n_moe.max(1), stride], DType::I32)?;
        let mut layers = (0..widths.n_moe).map(|i| all_ids.slice(i..i + 1));
        let mut router = |top_k: usize| -> Result<Routed> {
            let ids = layers.next().unwrap_or(all_ids);
            let weights = device.alloc("expert weights", &[n, top_k], DType::F32)?;
            Ok(Routed { logits, ids, weights })
        };
        let routed = spec
            .layers
            .iter()
            .map(|layer| match &layer.ffn {
                FfnSpec::Moe(moe) => router(moe.routing.top_k).map(Some),
                FfnSpec::Dense(_) => Ok(None),
            })
            .collect::<Result<_>>()?;
        let shared_gate = Routed {
            logits: device.alloc("shared gate", &[n, padded(1)], DType::F32)?,
            ids: device.alloc("shared gate ids", &[n, 1], DType::I32)?,
            weights: device.alloc("shared gate weights", &[n, 1], DType::F32)?,
        };
        let shape = [n.min(Route::MOST_TOKENS), padded(widths.n_experts) + PAD];
        let route = device.alloc("route", &shape, DType::F32)?;
        let attention_parts = AttentionParts::alloc(device, a.n_heads, a.n_kv_heads, head)?;
        let aligned = match widths.n_experts {
            0 => None,
            e => Some(Aligned::alloc(device, n, widths.top_k, e, BLOCK_SIZES)?),
        };
        // Of the experts' first product, then of their second.
        let rows = [(1, hidden), (widths.top_k, widths.inner)];
        let bytes = rows.map(|(n, cols)| cols + n * QuantizeRows::width(0));
        let quantized = match precision.experts {
            WeightFormat::W8A8 => {
                Some(device.alloc("int8 rows", &[n, bytes[0].max(bytes[1])], DType::I8)?)
            }
            _ => None,
        };
        let mut alloc = |what, cols, dtype| device.alloc(what, &[n, cols], dtype);
        Ok(Self {
            residual: alloc("residual", hidden, DType::F32)?,
            normed: alloc("normed", hidden, act)?,
            qkv: alloc("qkv", qkv, DType::F32)?,
            q: alloc("q", heads, DType::F32)?,
            attention: alloc("attention", heads, act)?,
            both: alloc("gate and up", 2 * widths.inner, act)?,
            inner: alloc("gated", widths.inner, act)?,
            quantized,
            slots_hidden: device.alloc("expert outputs", &[slots, hidden], act)?,
            local_ids: device.alloc("local expert ids", &[slots], DType::I32)?,
            slot_ids: device.alloc("slots of experts", &[slots], DType::I32)?,
            partial: device.alloc("partial sums", &[n, hidden], DType::F32)?,
            one_slot: device.alloc("one slot", &[n, 1], DType::I32)?,
            aligned,
            shared_gate,
            route,
            attention_parts,
            routed,
            all_ids,
            last: device.alloc("last rows", &[limits.max_logits, hidden], act)?,
        })
    }
}
