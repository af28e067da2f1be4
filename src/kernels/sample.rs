//! Sampling: one token per row of logits, every row with its own parameters. Order of the steps
//! as in vLLM (`v1/sample/sampler.py`). This file knows counts and seeds, not requests.

use std::borrow::Cow;

use crate::device::{
    Allocate, Binding, Caps, DType, DeviceError, Io, Kernel, Launch, Recording, Shader, Tensor,
    params,
};

use super::grid_2d;

#[cfg(test)]
mod tests;

params! {
    /// How one row is sampled: a row of [`Sample::rows`], mirrored by the WGSL struct of the same
    /// name. The host checks the ranges. [`SamplingRow::default`] is greedy, without penalties.
    #[derive(PartialEq)]
    pub struct SamplingRow {
        /// Divides the logits; below 1e-5 the greatest logit wins, the lower id on a tie.
        temperature: f32,
        /// Keeps the shortest prefix of the tokens, by (logit descending, id ascending), that
        /// holds this share of the probability that min_p and top_k leave; at least one token.
        /// Off from 1. A token weighs a multiple of 2^-31 of the most probable token's weight.
        top_p: f32,
        /// Keeps tokens at least this probable relative to the most probable one; 0 is off.
        min_p: f32,
        /// Divides positive and multiplies other logits of tokens in prompt or output (Keskar et
        /// al. 2019); above 0, 1 is off.
        repetition_penalty: f32,
        /// Subtracted from the logits of tokens in the output.
        presence_penalty: f32,
        /// Subtracted once for each time that a token is in the output.
        frequency_penalty: f32,
        /// Keeps so many tokens, the first by (logit descending, id ascending); 0 is off.
        top_k: u32,
        /// Low word of the random seed.
        seed_low: u32,
        /// High word of the random seed.
        seed_high: u32,
        /// Tokens sampled so far, the counter of the random numbers: a row's token depends on
        /// its seed, step and logits, not on the batch around it.
        step: u32,
        /// Row of [`Sample::counts`]; [`SamplingRow::NO_COUNTS`]: no penalties, no counting.
        counts_row: u32,
        /// Bits: [`SamplingRow::LOGPROB`].
        flags: u32,
        /// Row of [`Sample::masks`]; [`SamplingRow::NO_MASK`]: all tokens may be sampled.
        mask_row: u32,
        /// First of this row's [`Sample::biases`].
        bias_start: u32,
        /// Number of them.
        n_biases: u32,
        /// Most probable tokens that [`super::Logprobs`] reports, if flagged.
        n_top: u32,
        /// Token whose log probability [`super::Logprobs`] reports;
        /// [`SamplingRow::SAMPLED`]: the sampled one.
        scored_id: u32,
        /// Fills 80 bytes, whole vec4s.
        unused_0: u32,
        /// Fills 80 bytes.
        unused_1: u32,
        /// Fills 80 bytes.
        unused_2: u32,
    }
}

impl SamplingRow {
    /// Words of a row.
    pub const WORDS: usize = size_of::<Self>() / 4;
    /// The [`SamplingRow::counts_row`] of a row without penalties.
    pub const NO_COUNTS: u32 = u32::MAX;
    /// The [`SamplingRow::mask_row`] of a row that may sample any token.
    pub const NO_MASK: u32 = u32::MAX;
    /// The [`SamplingRow::scored_id`] of a row that samples.
    pub const SAMPLED: u32 = u32::MAX;
    /// The flag that asks for [`super::Logprobs`].
    pub const LOGPROB: u32 = 1;

    /// Row `i` of many.
    pub(super) fn at(rows: &[u32], i: usize) -> Self {
        let words = &rows[i * Self::WORDS..][..Self::WORDS];
        bytemuck::pod_read_unaligned(bytemuck::cast_slice(words))
    }

    fn is_greedy(&self) -> bool {
        self.temperature < 1e-5 || self.top_k == 1
    }
}

impl Default for SamplingRow {
    fn default() -> Self {
        Self {
            top_p: 1.0,
            repetition_penalty: 1.0,
            counts_row: Self::NO_COUNTS,
            mask_row: Self::NO_MASK,
            scored_id: Self::SAMPLED,
            ..bytemuck::Zeroable::zeroed()
        }
    }
}

/// Samples a token for each row. Mask and biases; repetition, frequency and presence penalty;
/// the greatest logit if greedy, else temperature, min_p, top_k, top_p and a draw by the Gumbel
/// trick: the greatest logit / temperature + noise, the noise of token t being -ln(-ln(1 - v)),
/// v = (w + 1/2) / 2^32, where w is word t % 4 of Philox4x32-10 (Salmon et al. 2011) with counter
/// (t / 4, step, 0, 0) and key (seed_low, seed_high).
///
/// -infinity forbids a token. NaN and +infinity are faults: the token never wins, and the row is
/// marked [`Sample::INVALID`], as is a row without any finite logit. The counts of a marked row
/// stay as they are.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// F32 `[n, stride >= n_vocab]`, stride a multiple of 4; columns from `n_vocab` on are ignored.
    pub logits: Tensor,
    /// Tokens in the vocabulary, below 2^24.
    pub n_vocab: usize,
    /// [`SamplingRow`]s as U32 `[n, SamplingRow::WORDS]`
    pub rows: Tensor,
    /// Bit `id % 32` of word `id / 32` lets a token be sampled. U32 `[n_masks, >= n_vocab / 32]`
    pub masks: Tensor,
    /// Token and what is added to its logit, as bits; minus infinity forbids it. The tokens of a
    /// row ascend, each once. U32 `[n_biases, 2]`
    pub biases: Tensor,
    /// U32 `[n_counts, >= n_vocab]`: [`Sample::PROMPT`] and the number of times that the token was
    /// generated. The sampled token is added. Rows of one launch must name different rows.
    pub counts: Tensor,
    /// F32, as large as `logits`: working memory, undefined afterwards.
    pub scratch: Tensor,
    /// What [`SampleStage::Tally`] leaves for [`SampleStage::Choose`], by
    /// [`Sample::alloc_slices`].
    pub slices: Tensor,
    /// U32 `[n]`: the token, and perhaps [`Sample::INVALID`].
    pub ids: Tensor,
    /// What this launch does.
    pub stage: SampleStage,
}

/// Launches that sampling is divided into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SampleStage {
    /// All of it, with a workgroup for each row.
    Whole,
    /// Looks at the logits, with a workgroup for each slice of a row.
    Tally,
    /// Chooses from what has been found in the slices.
    Choose,
}

/// Records sampling: in two launches on a GPU, where one workgroup would wait too long for the
/// whole vocabulary. Which tokens come out does not depend on it.
pub fn sample(rec: &mut Recording, sample: Sample) {
    let stages: &[_] = match rec.caps().software {
        true => &[SampleStage::Whole],
        false => &[SampleStage::Tally, SampleStage::Choose],
    };
    stages.iter().for_each(|&stage| rec.push(Sample { stage, ..sample }));
}

impl Sample {
    /// Bit of an id: the row had NaN or +infinity among its logits, or nothing finite (then the
    /// token is 0). Its request should fail.
    pub const INVALID: u32 = 1 << 31;
    /// Bit of a count: the token is in the prompt.
    pub const PROMPT: u32 = 1 << 31;
    /// Biases that the engine provides for per row.
    pub const MAX_BIASES: usize = 1024;

    /// Memory for the slices of `n_rows` rows. U32 `[n_rows, slices, words of a tally]`
    ///
    /// # Errors
    /// [`DeviceError`] where it does not fit.
    pub fn alloc_slices(
        device: &mut dyn Allocate,
        n_rows: usize,
        n_vocab: usize,
    ) -> Result<Tensor, DeviceError> {
        let shape = [n_rows, n_vocab.div_ceil(slice_len(n_vocab)).max(1), TALLY_WORDS];
        device.alloc("slices of logits", &shape, DType::U32)
    }
}

/// Threads of a workgroup, and the most slices of a row.
const THREADS: usize = 256;
/// Loads of four logits that a thread has under way; a CPU has nothing to wait for, and its driver
/// takes seconds to compile long code.
const LOADS: usize = 4;
/// Words of the WGSL `Tally`.
const TALLY_WORDS: usize = 4;

/// Logits of a slice: whole rounds of a workgroup's loads. It depends on nothing but the
/// vocabulary, so that a row's token does not depend on the rows beside it.
fn slice_len(n_vocab: usize) -> usize {
    let round = 4 * LOADS * THREADS;
    n_vocab.div_ceil(round * THREADS).max(1) * round
}

params! {
    /// Mirror of the WGSL `Params`.
    pub struct SampleParams {
        n_rows: u32,
        n_vocab: u32,
        stride4: u32,
        counts_rows: u32,
        counts_stride: u32,
        mask_stride: u32,
        grid_x: u32,
        slice4: u32,
        n_slices: u32,
    }
}

impl Kernel for Sample {
    const NAME: &'static str = "sample";
    type Params = SampleParams;

    fn label(&self) -> Cow<'static, str> {
        match self.stage {
            SampleStage::Whole => Self::NAME.into(),
            SampleStage::Tally => "sample tally".into(),
            SampleStage::Choose => "sample choose".into(),
        }
    }

    fn launch(&self, caps: &Caps) -> Launch<SampleParams> {
        let (n_rows, n_vocab) = (self.ids.len() as u32, self.n_vocab as u32);
        let slice4 = match self.stage {
            SampleStage::Whole => n_vocab.div_ceil(4),
            _ => slice_len(self.n_vocab) as u32 / 4,
        };
        let n_slices = n_vocab.div_ceil(4).div_ceil(slice4.max(1));
        let n_groups = n_rows * if self.stage == SampleStage::Tally { n_slices } else { 1 };
        let (grid_x, grid_y) = grid_2d(n_groups, caps);
        Launch {
            shader: Shader::new(Self::NAME)
                .set("LOADS", if caps.software { 1 } else { LOADS as u32 })
                .set("STAGE", self.stage as u32),
            params: SampleParams {
                n_rows,
                n_vocab,
                stride4: self.logits.cols() as u32 / 4,
                counts_rows: self.counts.rows() as u32,
                counts_stride: self.counts.cols() as u32,
                mask_stride: self.masks.cols() as u32,
                grid_x,
                slice4,
                n_slices,
            },
            bindings: vec![
                Binding::read(self.logits),
                Binding::read(self.rows),
                Binding::read(self.masks),
                Binding::read(self.biases),
                Binding::write(self.counts),
                Binding::write(self.scratch),
                Binding::write(self.ids),
                Binding::write(self.slices),
            ],
            grid: [grid_x, grid_y, 1],
        }
    }

    fn twin(p: &SampleParams, io: &Io<'_>) {
        // Tallies are not the twin's way: it does everything in the end.
        if io.shader.override_value("STAGE") == Some(SampleStage::Tally as u32) {
            return;
        }
        let (logits, rows) = (io.read::<f32>(0), io.read::<u32>(1));
        let (masks, biases) = (io.read::<u32>(2), io.read::<u32>(3));
        let (mut counts, mut scratch) = (io.write::<u32>(4), io.write::<f32>(5));
        let mut ids = io.write::<u32>(6);
        let (n_vocab, stride) = (p.n_vocab as usize, p.stride4 as usize * 4);
        for i in 0..p.n_rows as usize {
            let row = SamplingRow::at(&rows, i);
            let raw = &logits[i * stride..][..n_vocab];
            let counted = (row.counts_row < p.counts_rows)
                .then(|| row.counts_row as usize * p.counts_stride as usize);
            let seen = counted.map(|start| &counts[start..][..n_vocab]);
            let constrained = constrained(raw, &row, &masks, p.mask_stride as usize, &biases);
            let y = penalised(constrained.as_deref().unwrap_or(raw), seen, &row);
            if !row.is_greedy() {
                let whole = n_vocab.next_multiple_of(4);
                scratch[i * stride..][..whole].fill(f32::MIN);
                scratch[i * stride..][..n_vocab].copy_from_slice(&y);
            }
            let id = choose(&y, &row);
            let fault = raw.iter().any(|x| x.is_nan() || *x == f32::INFINITY);
            let invalid = fault || id.is_none();
            ids[i] = id.unwrap_or(0) as u32 | if invalid { Self::INVALID } else { 0 };
            if let (Some(start), Some(id), false) = (counted, id, invalid) {
                counts[start + id] += 1;
            }
        }
    }
}

/// A logit held away from the ends of f32, so that it is not mistaken for a forbidden token.
pub(super) fn bounded(x: f32) -> f32 {
    x.clamp(-3e38, 3e38)
}

/// Logits after mask and biases, -infinity for tokens that they forbid; none if there are neither.
fn constrained(
    raw: &[f32],
    row: &SamplingRow,
    masks: &[u32],
    mask_stride: usize,
    biases: &[u32],
) -> Option<Vec<f32>> {
    if row.mask_row == SamplingRow::NO_MASK && row.n_biases == 0 {
        return None;
    }
    let mut y = raw.to_vec();
    if row.mask_row != SamplingRow::NO_MASK {
        let words = &masks[row.mask_row as usize * mask_stride..];
        let forbidden = |id: &usize| words[id / 32] >> (id % 32) & 1 == 0;
        (0..y.len()).filter(forbidden).for_each(|id| y[id] = f32::NEG_INFINITY);
    }
    let pairs = biases.chunks(2).skip(row.bias_start as usize).take(row.n_biases as usize);
    for pair in pairs {
        let (y, bias) = (&mut y[pair[0] as usize], f32::from_bits(pair[1]));
        if y.is_finite() {
            *y = if bias.is_finite() { bounded(bounded(*y) + bias) } else { f32::NEG_INFINITY };
        }
    }
    Some(y)
}

/// Logits after penalties, `f32::MIN` for tokens that cannot be chosen. `[n_vocab]`
fn penalised(raw: &[f32], counts: Option<&[u32]>, row: &SamplingRow) -> Vec<f32> {
    let penalise = |(id, &x): (usize, &f32)| {
        if !x.is_finite() {
            return f32::MIN;
        }
        let mut y = bounded(x);
        let count = counts.map_or(0, |counts| counts[id]);
        let generated = count & !Sample::PROMPT;
        if count != 0 {
            let r = row.repetition_penalty;
            y = if y > 0.0 { y / r } else { y * r };
        }
        if generated != 0 {
            y -= row.frequency_penalty * generated as f32 + row.presence_penalty;
        }
        bounded(y)
    };
    raw.iter().enumerate().map(penalise).collect()
}

/// The token of a row of penalised logits, or none if nothing can be chosen.
/// Where a prefix holds top_p of the mass to within 1e-6, the GPU may end it one token elsewhere.
fn choose(y: &[f32], row: &SamplingRow) -> Option<usize> {
    // Great logits first, then low ids; both zeros are equal.
    let order =
        |&a: &usize, &b: &usize| f32::total_cmp(&(y[b] + 0.0), &(y[a] + 0.0)).then(a.cmp(&b));
    let possible = (0..y.len()).filter(|&id| y[id] > f32::MIN);
    let top = possible.clone().min_by(order)?;
    if row.is_greedy() {
        return Some(top);
    }
    let temperature = f64::from(row.temperature);
    let scaled = |id: usize| (f64::from(y[id]) - f64::from(y[top])) / temperature;
    let least = f64::from(row.min_p).ln();
    let mut kept: Vec<usize> = possible.filter(|&id| scaled(id) >= least).collect();
    let top_k = row.top_k as usize;
    if top_k > 0 && top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, order);
        kept.truncate(top_k);
    }
    if row.top_p < 1.0 {
        kept.sort_unstable_by(order);
        let total: f64 = kept.iter().map(|&id| scaled(id).exp()).sum();
        let mut rest = total * f64::from(row.top_p);
        let end = kept.iter().position(|&id| {
            rest -= scaled(id).exp();
            rest <= 0.0
        });
        kept.truncate(end.unwrap_or(kept.len()) + 1);
    }
    let score = |id: usize| scaled(id) + gumbel(row, id);
    kept.into_iter()
        .map(|id| (score(id), id))
        .max_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)))
        .map(|(_, id)| id)
}

/// Noise of one token.
fn gumbel(row: &SamplingRow, id: usize) -> f64 {
    let words = philox([id as u32 / 4, row.step, 0, 0], [row.seed_low, row.seed_high]);
    let v = (f64::from(words[id % 4]) + 0.5) / 4_294_967_296.0;
    -(-(-v).ln_1p()).ln()
}

/// Philox4x32-10.
fn philox(mut c: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    let product = |a: u32, b: u32| {
        let wide = u64::from(a) * u64::from(b);
        ((wide >> 32) as u32, wide as u32)
    };
    for _ in 0..10 {
        let (x_high, x_low) = product(0xD251_1F53, c[0]);
        let (z_high, z_low) = product(0xCD9E_8D57, c[2]);
        c = [z_high ^ c[1] ^ key[0], z_low, x_high ^ c[3] ^ key[1], x_low];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    c
}
