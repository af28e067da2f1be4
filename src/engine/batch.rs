//! A step's work, and its layout in the fixed shape of a plan: what the host writes, padded to a
//! bucket. Knows sequences as slices, not as requests.

use std::ops::Range;

use crate::{
    kernels::{PREFILL_TILE, SamplingRow},
    model::{Limits, Split, StepShape},
};

/// Position of a padding token: it writes no cache and visits no expert.
const NO_SLOT: u32 = u32::MAX;

/// Which of a sequence's tokens in this step want logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogitRows {
    /// None: the prompt goes on in a later step.
    #[default]
    None,
    /// The last one.
    Last,
    /// All of them, to compare or to score text.
    All,
}

/// Tokens of one sequence in a step.
#[derive(Debug, Clone, Default)]
pub struct BatchSequence<'a> {
    /// New tokens, at least one; `Embed::SAMPLED` and a row stand for the token that the step
    /// before sampled there.
    pub tokens: &'a [u32],
    /// Position of the first.
    pub position: usize,
    /// Cache blocks, enough for all positions up to the last.
    pub blocks: &'a [u32],
    /// Logits to compute.
    pub logits: LogitRows,
    /// How to sample from the last row, if that is asked for.
    pub sampling: SamplingRow,
    /// Most probable tokens to report beside the chosen one, at most `Logprobs::MOST`.
    pub logprobs: Option<usize>,
    /// Tokens whose log probabilities the first rows report instead of sampling.
    pub targets: &'a [u32],
    /// Bits of the tokens that may be sampled. `[vocabulary.div_ceil(32)]`
    pub mask: Option<Vec<u32>>,
    /// Added to logits before sampling, tokens ascending; at most `Sample::MAX_BIASES`.
    pub biases: Vec<(u32, f32)>,
}

/// Work of one step.
#[derive(Debug, Clone)]
pub struct Batch<'a> {
    /// At most `max_sequences`, with `max_tokens` tokens.
    pub sequences: Vec<BatchSequence<'a>>,
}

/// Which steps are split in two, and where they can be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Splits {
    /// Rows that a step has at least.
    pub(super) least: usize,
    /// Bytes at which the device can bind a part of a tensor.
    pub(super) alignment: usize,
}

/// What the host writes for a step, laid out for a shape.
#[derive(Debug, Default)]
pub(super) struct Layout {
    pub(super) ids: Vec<u32>,
    /// `[n_tokens, 4]`
    pub(super) tokens: Vec<[u32; 4]>,
    /// `[n_tiles, 4]`
    pub(super) tiles: Vec<[u32; 4]>,
    pub(super) logit_rows: Vec<u32>,
    pub(super) sampling: Vec<SamplingRow>,
    /// Words of all masks, one after the other.
    pub(super) masks: Vec<u32>,
    n_masks: u32,
    /// Token and bits of the bias. `[n, 2]`
    pub(super) biases: Vec<[u32; 2]>,
    /// Rows of logits of each sequence of the batch.
    pub(super) rows: Vec<Range<usize>>,
}

impl Layout {
    /// Single tokens first, then chunks in tiles, each group padded to its bucket.
    pub(super) fn new(
        batch: &Batch<'_>,
        limits: &Limits,
        block_size: usize,
        sample: bool,
        splits: Option<Splits>,
    ) -> (StepShape, Self) {
        let sequences = &batch.sequences;
        assert!(sequences.len() <= limits.max_sequences, "too many sequences in a step");
        let mut layout = Self { rows: vec![0..0; sequences.len()], ..Self::default() };
        let single = |s: &BatchSequence<'_>| s.tokens.len() == 1;
        for (i, sequence) in sequences.iter().enumerate().filter(|(_, s)| single(s)) {
            layout.push(i, sequence, block_size);
        }
        let (max_tokens, n_single) = (limits.max_tokens, layout.ids.len());
        let n_chunks: usize = sequences.iter().map(|s| s.tokens.len()).sum::<usize>() - n_single;
        assert!(n_single + n_chunks <= max_tokens, "too many tokens in a step");
        let fits = bucket(n_single) + n_chunks <= max_tokens;
        let n_decode = if fits { bucket(n_single) } else { n_single };
        layout.pad(n_decode);
        for (i, sequence) in sequences.iter().enumerate().filter(|(_, s)| !single(s)) {
            layout.tile(layout.ids.len(), sequence.tokens.len(), i, sequence.position);
            layout.push(i, sequence, block_size);
        }
        let n_tokens = (n_decode + bucket(n_chunks)).min(max_tokens);
        layout.pad(n_tokens);
        let n_tiles = bucket(layout.tiles.len()).min(limits.max_tiles());
        layout.tiles.resize(n_tiles, [0; 4]);
        let n_logits = bucket(layout.logit_rows.len()).min(limits.max_logits);
        assert!(layout.logit_rows.len() <= n_logits, "too many rows of logits in a step");
        let logprobs =
            sample && layout.sampling.iter().any(|row| row.flags & SamplingRow::LOGPROB != 0);
        layout.logit_rows.resize(n_logits, 0);
        layout.sampling.resize(n_logits, SamplingRow::default());
        let split = splits.and_then(|splits| layout.split(splits, n_decode));
        let n_prefill = n_tokens - n_decode;
        (StepShape { n_decode, n_prefill, n_tiles, n_logits, sample, logprobs, split }, layout)
    }

    /// Splits the rows in two near the middle: between single tokens, or before a tile.
    fn split(&mut self, splits: Splits, n_decode: usize) -> Option<Split> {
        let n = self.ids.len();
        if n < splits.least {
            return None;
        }
        let tile = |(tile, t): (usize, &[u32; 4])| Split { row: t[0] as usize, tile };
        let tiles = self.tiles.iter().enumerate().filter(|(_, t)| t[1] > 0).map(tile);
        let single = (1..n_decode).map(|row| Split { row, tile: 0 });
        let fits = |at: &Split| {
            let aligned = |i: usize, words: usize| (4 * words * i).is_multiple_of(splits.alignment);
            aligned(at.row, 1) && aligned(at.tile, 4) && (n / 4..n - n / 4).contains(&at.row)
        };
        let at = single.chain(tiles).filter(fits).min_by_key(|at| at.row.abs_diff(n / 2))?;
        self.tiles[at.tile..].iter_mut().filter(|t| t[1] > 0).for_each(|t| t[0] -= at.row as u32);
        Some(at)
    }

    fn push(&mut self, index: usize, sequence: &BatchSequence<'_>, block_size: usize) {
        let start = self.ids.len();
        for (i, &id) in sequence.tokens.iter().enumerate() {
            let position = sequence.position + i;
            let block = sequence.blocks[position / block_size];
            let slot = block * block_size as u32 + (position % block_size) as u32;
            self.ids.push(id);
            self.tokens.push([position as u32, slot, index as u32, 0]);
        }
        let first = match sequence.logits {
            LogitRows::None => self.ids.len(),
            LogitRows::Last => self.ids.len() - 1,
            LogitRows::All => start,
        };
        let row = self.logit_rows.len();
        self.rows[index] = row..row + self.ids.len() - first;
        self.logit_rows.extend((first..self.ids.len()).map(|row| row as u32));
        self.push_sampling(sequence, self.ids.len() - first);
    }

    fn push_sampling(&mut self, sequence: &BatchSequence<'_>, n_rows: usize) {
        let mut row = sequence.sampling;
        if let Some(n_top) = sequence.logprobs {
            (row.flags, row.n_top) = (row.flags | SamplingRow::LOGPROB, n_top as u32);
        }
        let targets = sequence.targets.iter().take(n_rows);
        self.sampling.extend(targets.map(|&target| SamplingRow {
            flags: row.flags,
            n_top: row.n_top,
            scored_id: target,
            ..SamplingRow::default()
        }));
        if sequence.targets.len() >= n_rows {
            return;
        }
        if let Some(mask) = &sequence.mask {
            row.mask_row = self.n_masks;
            self.n_masks += 1;
            self.masks.extend(mask);
        }
        row.bias_start = self.biases.len() as u32;
        row.n_biases = sequence.biases.len() as u32;
        self.biases.extend(sequence.biases.iter().map(|&(id, bias)| [id, bias.to_bits()]));
        self.sampling.resize(self.logit_rows.len(), row);
    }

    fn pad(&mut self, n_tokens: usize) {
        self.ids.resize(n_tokens, 0);
        self.tokens.resize(n_tokens, [0, NO_SLOT, 0, 0]);
    }

    fn tile(&mut self, row: usize, n: usize, sequence: usize, position: usize) {
        for start in (0..n).step_by(PREFILL_TILE) {
            let rows = PREFILL_TILE.min(n - start);
            self.tiles.push([row + start, rows, sequence, position + start].map(|v| v as u32));
        }
    }
}

/// Rounds a count up to one of few sizes, so that few plans serve all steps; at most an eighth
/// more above 64.
fn bucket(n: usize) -> usize {
    match n {
        0..=16 => n,
        17..=64 => n.next_multiple_of(8),
        _ => n.next_multiple_of((n.next_power_of_two() / 16).max(8)),
    }
}
