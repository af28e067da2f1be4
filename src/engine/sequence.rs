//! One answer on its way through the engine.

use std::{collections::BTreeMap, sync::Arc};

use crate::kernels::Embed;

use super::{
    BatchSequence, BlockPool, FinishReason, LogitRows, Request, RequestId, SamplingParams,
    TokenLogprobs, TokenMask, blocks::PrefixId,
};

/// Tokens, cache blocks and progress of one request.
#[derive(Debug)]
pub(super) struct Sequence {
    pub(super) id: RequestId,
    pub(super) priority: i32,
    /// Prompt and answer; the last `n_unread` are only known to the device.
    tokens: Vec<u32>,
    n_prompt: usize,
    n_unread: usize,
    /// Tokens whose keys and values are in the cache, or will be after the steps submitted.
    pub(super) n_computed: usize,
    /// Tokens that the next step computes.
    pub(super) n_scheduled: usize,
    /// Cache blocks in order of position.
    pub(super) blocks: Vec<u32>,
    /// Blocks in front that others can find, and the prefix that they hold.
    n_published: usize,
    prefix: PrefixId,
    salt: Option<Arc<str>>,
    pub(super) params: SamplingParams,
    mask: Option<Box<dyn TokenMask>>,
    /// Set when the mask failed.
    mask_failed: bool,
    seed: u64,
    max_tokens: usize,
    /// Row of the device's token counts, if penalties need one.
    pub(super) penalty_row: Option<u32>,
    /// Set when that row has to be written before the next step.
    pub(super) penalty_row_to_fill: Option<u32>,
    /// Prompt tokens found in the prefix cache at the first start.
    pub(super) n_cached: Option<usize>,
    /// Of the prompt, as far as read.
    pub(super) prompt_logprobs: Vec<TokenLogprobs>,
    /// Prompt tokens whose log probabilities steps have computed.
    n_scored: usize,
}

impl Sequence {
    /// `room` is how many tokens the context leaves for the answer.
    pub(super) fn new(id: RequestId, request: &Request, seed: u64, room: usize) -> Self {
        let params = request.params.clone();
        Self {
            id,
            priority: request.priority,
            tokens: request.prompt.clone(),
            n_prompt: request.prompt.len(),
            n_unread: 0,
            n_computed: 0,
            n_scheduled: 0,
            blocks: Vec::new(),
            n_published: 0,
            prefix: PrefixId::EMPTY,
            salt: request.cache_salt.clone(),
            max_tokens: params.max_tokens.unwrap_or(room).min(room),
            params,
            mask: request.mask.as_ref().map(|mask| mask.fork()),
            mask_failed: false,
            seed,
            penalty_row: None,
            penalty_row_to_fill: None,
            n_cached: None,
            prompt_logprobs: Vec::new(),
            n_scored: 0,
        }
    }

    pub(super) fn prompt(&self) -> &[u32] {
        &self.tokens[..self.n_prompt]
    }

    pub(super) fn generated(&self) -> &[u32] {
        &self.tokens[self.n_prompt..]
    }

    /// Whether the host has to see each token before the next can be chosen.
    pub(super) fn needs_host(&self) -> bool {
        self.mask.is_some()
            || self.params.prompt_logprobs.is_some()
            || self.params.bad_words.iter().any(|word| word.len() > 1)
    }

    /// Tokens still to compute.
    pub(super) fn n_pending(&self) -> usize {
        if self.generated().len() >= self.max_tokens {
            return 0;
        }
        self.tokens.len() - self.n_computed
    }

    /// Tokens to compute in a step that has room for so many tokens and rows of logits.
    pub(super) fn n_next(&self, tokens: usize, rows: usize) -> usize {
        let n = self.n_pending().min(tokens);
        if self.scores_prompt() { n.min(rows) } else { n }
    }

    /// Rows of logits of the next `n` tokens, at most.
    pub(super) fn n_rows(&self, n: usize) -> usize {
        if self.scores_prompt() { n } else { n.min(1) }
    }

    /// Whether log probabilities of the prompt are still to come.
    fn scores_prompt(&self) -> bool {
        self.params.prompt_logprobs.is_some() && self.n_scored + 1 < self.n_prompt
    }

    /// Takes blocks for all tokens, cached ones as far as there are any; the last token is always
    /// computed, for its logits. Changes nothing if blocks are lacking.
    pub(super) fn start(&mut self, pool: &mut BlockPool) -> bool {
        let reusable = if self.scores_prompt() { 0 } else { self.tokens.len() - 1 };
        let (blocks, prefix) = pool.find(&self.tokens[..reusable], self.salt.as_ref());
        let n_found = blocks.len();
        self.blocks = blocks;
        if !pool.grow(&mut self.blocks, self.tokens.len()) {
            pool.release(&mut self.blocks);
            return false;
        }
        (self.n_published, self.prefix) = (n_found, prefix);
        self.n_computed = n_found * pool.block_size;
        self.n_cached.get_or_insert(self.n_computed.min(self.n_prompt));
        true
    }

    /// Forgets all progress but the tokens; the blocks are already given back.
    pub(super) fn start_over(&mut self) {
        (self.n_computed, self.n_scheduled) = (0, 0);
        (self.n_published, self.prefix) = (0, PrefixId::EMPTY);
        if self.scores_prompt() {
            self.prompt_logprobs.clear();
            self.n_scored = 0;
        }
    }

    /// Publishes no more blocks until it starts over.
    pub(super) fn keep_private(&mut self) {
        self.n_published = usize::MAX;
    }

    /// Makes full blocks of known tokens findable, those of submitted steps included: whoever
    /// finds them runs in the same step, where keys are written before they are read, or later.
    pub(super) fn publish(&mut self, pool: &mut BlockPool) {
        self.publish_with(pool, self.n_computed);
    }

    /// The same when `n_computed` tokens will be in the cache.
    pub(super) fn publish_with(&mut self, pool: &mut BlockPool, n_computed: usize) {
        let size = pool.block_size;
        let n_full = n_computed.min(self.tokens.len() - self.n_unread) / size;
        while self.n_published < n_full {
            let i = self.n_published;
            let tokens = &self.tokens[i * size..(i + 1) * size];
            self.prefix = pool.publish(self.blocks[i], self.prefix, tokens, self.salt.as_ref());
            self.n_published += 1;
        }
    }

    /// The scheduled tokens as part of a step; a token is sampled once the last one is in.
    pub(super) fn batch(&mut self, eos: &[u32], vocab_size: usize) -> BatchSequence<'_> {
        let end = self.n_computed + self.n_scheduled;
        let done = end == self.tokens.len();
        let logits = match done {
            _ if self.scores_prompt() => LogitRows::All,
            true => LogitRows::Last,
            false => LogitRows::None,
        };
        let step = self.generated().len();
        let biases = if done { self.biases(eos) } else { Vec::new() };
        let mask = if done { self.allowed(vocab_size, &biases) } else { None };
        let (mut logprobs, mut targets) = (self.params.logprobs, &[][..]);
        if logits == LogitRows::All {
            logprobs = Some(logprobs.max(self.params.prompt_logprobs).unwrap_or(0));
            targets = &self.tokens[self.n_computed + 1..(end + 1).min(self.tokens.len())];
        }
        BatchSequence {
            tokens: &self.tokens[self.n_computed..end],
            position: self.n_computed,
            blocks: &self.blocks,
            logits,
            sampling: self.params.row(self.seed, step, self.penalty_row),
            logprobs,
            targets,
            mask,
            biases,
        }
    }

    /// Words of allowed tokens without those that `biases` ban, if not all are.
    fn allowed(&mut self, vocab_size: usize, biases: &[(u32, f32)]) -> Option<Vec<u32>> {
        let n = vocab_size.div_ceil(32);
        let mut words = self.params.allowed_token_ids.as_ref().map(|ids| {
            let mut words = vec![0u32; n];
            ids.iter().for_each(|&id| words[id as usize / 32] |= 1 << (id % 32));
            words
        });
        if let Some(mask) = &mut self.mask {
            let mut grammar = vec![0u32; n];
            if mask.fill(&mut grammar).is_err() {
                // The token is then thrown away.
                self.mask_failed = true;
                return None;
            }
            match &mut words {
                Some(words) => words.iter_mut().zip(&grammar).for_each(|(w, g)| *w &= g),
                None => words = Some(grammar),
            }
        }
        let mut words = words?;
        let banned = biases.iter().filter(|(_, bias)| *bias == f32::NEG_INFINITY);
        banned.for_each(|&(id, _)| words[id as usize / 32] &= !(1 << (id % 32)));
        self.mask_failed = words.iter().all(|&word| word == 0);
        (!self.mask_failed).then_some(words)
    }

    /// What is added to logits, by token ascending.
    fn biases(&self, eos: &[u32]) -> Vec<(u32, f32)> {
        let params = &self.params;
        let mut biases = BTreeMap::new();
        let mut add = |id: u32, bias: f32| *biases.entry(id).or_insert(0.0) += bias;
        params.logit_bias.iter().for_each(|&(id, bias)| add(id, bias));
        if self.generated().len() < params.min_tokens {
            let ids = eos.iter().chain(&params.stop_token_ids);
            ids.for_each(|&id| add(id, f32::NEG_INFINITY));
        }
        for word in &params.bad_words {
            if let Some((&last, before)) = word.split_last()
                && self.generated().ends_with(before)
            {
                add(last, f32::NEG_INFINITY);
            }
        }
        biases.into_iter().collect()
    }

    /// Moves on past the scheduled tokens; `row` is where a token was sampled after them, if so.
    pub(super) fn submitted(&mut self, row: Option<usize>) {
        if self.scores_prompt() {
            self.n_scored = (self.n_computed + self.n_scheduled).min(self.n_prompt - 1);
        }
        self.n_computed += self.n_scheduled;
        if let Some(row) = row {
            self.tokens.push(Embed::SAMPLED | row as u32);
            self.n_unread += 1;
        }
    }

    /// Whether the token read last was the first of the answer.
    pub(super) fn is_first_token(&self) -> bool {
        self.generated().len() == self.n_unread + 1
    }

    /// Whether the next step samples a token of this one.
    pub(super) fn samples(&self) -> bool {
        self.n_scheduled > 0 && self.n_computed + self.n_scheduled == self.tokens.len()
    }

    /// Takes a sampled token; says whether it was the last.
    pub(super) fn append(&mut self, token: u32, eos: &[u32]) -> Option<FinishReason> {
        let at = self.tokens.len() - self.n_unread;
        self.n_unread -= 1;
        self.tokens[at] = token;
        if self.mask_failed {
            return Some(FinishReason::Mask);
        }
        let ignore_eos = self.params.ignore_eos && self.mask.is_none();
        let ends =
            (!ignore_eos && eos.contains(&token)) || self.params.stop_token_ids.contains(&token);
        if ends {
            return Some(FinishReason::Stop);
        }
        if let Some(mask) = &mut self.mask
            && mask.accept(token).is_err()
        {
            return Some(FinishReason::Mask);
        }
        (at + 1 - self.n_prompt >= self.max_tokens).then_some(FinishReason::Length)
    }
}
