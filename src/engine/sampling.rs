//! How a request wants its tokens chosen.

use crate::kernels::{Logprobs, Sample, SamplingRow};

use super::EngineError;

/// Longest sequence in [`SamplingParams::bad_words`], tokens.
const MAX_BAD_WORD: usize = 64;

/// Sampling parameters with vLLM's names and meanings.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Most probable tokens to keep; 0 keeps all.
    pub top_k: u32,
    /// Drops tokens less probable than this share of the best one; 0 keeps all.
    pub min_p: f32,
    /// Divides (multiplies, if negative) logits of tokens seen in prompt or answer; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Subtracted from logits for each time a token stands in the answer.
    pub frequency_penalty: f32,
    /// The same seed gives the same text; derived from the engine's if absent.
    pub seed: Option<u64>,
    /// Tokens to generate at most; the rest of the context if absent.
    pub max_tokens: Option<usize>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Further tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Tokens to generate before an end-of-text or stop token may come.
    pub min_tokens: usize,
    /// Report the log probability of each token, and of so many of the most probable ones.
    pub logprobs: Option<usize>,
    /// The same for the tokens of the prompt.
    pub prompt_logprobs: Option<usize>,
    /// Added to logits; minus infinity forbids a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// The only tokens that may be chosen; any if absent.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Sequences of tokens that must not appear in the answer.
    pub bad_words: Vec<Vec<u32>>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: None,
            max_tokens: None,
            ignore_eos: false,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
            logprobs: None,
            prompt_logprobs: None,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
        }
    }
}

impl SamplingParams {
    /// The most probable token at every step.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, ..Self::default() }
    }

    /// Whether past tokens change the logits.
    pub(super) fn penalizes(&self) -> bool {
        (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
    }

    /// Checks values against their ranges, and ids against the vocabulary; tokens in `eos` end a
    /// text.
    pub(super) fn validate(&self, vocab_size: usize, eos: &[u32]) -> Result<(), EngineError> {
        let check = |name, value: f32, range: std::ops::RangeInclusive<f32>, allowed| {
            if range.contains(&value) {
                Ok(())
            } else {
                Err(EngineError::Sampling { name, value: value.to_string(), allowed })
            }
        };
        check("temperature", self.temperature, 0.0..=100.0, "from 0 to 100")?;
        check("top_p", self.top_p, f32::MIN_POSITIVE..=1.0, "above 0 and at most 1")?;
        check("min_p", self.min_p, 0.0..=1.0, "from 0 to 1")?;
        let positive = "above 0 and at most 100";
        check("repetition_penalty", self.repetition_penalty, f32::MIN_POSITIVE..=100.0, positive)?;
        check("presence_penalty", self.presence_penalty, -2.0..=2.0, "from -2 to 2")?;
        check("frequency_penalty", self.frequency_penalty, -2.0..=2.0, "from -2 to 2")?;
        let refuse = |name, value: usize, allowed| {
            Err(EngineError::Sampling { name, value: value.to_string(), allowed })
        };
        if self.max_tokens == Some(0) {
            return refuse("max_tokens", 0, "at least 1");
        }
        if self.max_tokens.is_some_and(|most| self.min_tokens > most) {
            return refuse("min_tokens", self.min_tokens, "at most max_tokens");
        }
        for (name, n) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(n) = n.filter(|&n| n > Logprobs::MOST) {
                return refuse(name, n, "at most 20");
            }
        }
        if let Some((_, bias)) = self.logit_bias.iter().find(|b| b.1.is_nan() || b.1 > 1e30) {
            let (name, value) = ("logit_bias", bias.to_string());
            return Err(EngineError::Sampling { name, value, allowed: "a finite number" });
        }
        if self.allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
            return refuse("allowed_token_ids", 0, "at least one token");
        }
        if let Some(allowed) = &self.allowed_token_ids
            && allowed.iter().all(|id| self.forbids_at_first(*id, eos))
        {
            let most = "more than what min_tokens, bad_words and logit_bias forbid";
            return refuse("allowed_token_ids", allowed.len(), most);
        }
        let word = self.bad_words.iter().find(|w| w.is_empty() || w.len() > MAX_BAD_WORD);
        if let Some(word) = word {
            return refuse("bad_words", word.len(), "sequences of 1 to 64 tokens");
        }
        let n_biases =
            self.logit_bias.len() + self.bad_words.len() + self.stop_token_ids.len() + eos.len();
        if n_biases > Sample::MAX_BIASES {
            let name = "logit_bias, bad_words and stop_token_ids";
            return refuse(name, n_biases, "at most 1024 tokens together");
        }
        let ids = self.logit_bias.iter().map(|b| &b.0).chain(self.bad_words.iter().flatten());
        let mut ids =
            ids.chain(&self.stop_token_ids).chain(self.allowed_token_ids.iter().flatten());
        match ids.find(|&&id| id as usize >= vocab_size) {
            Some(&id) => Err(EngineError::TokenOutOfRange { id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Whether a token cannot be the answer's first.
    fn forbids_at_first(&self, id: u32, eos: &[u32]) -> bool {
        let ends = eos.contains(&id) || self.stop_token_ids.contains(&id);
        (self.min_tokens > 0 && ends)
            || self.bad_words.iter().any(|word| *word == [id])
            || self.logit_bias.contains(&(id, f32::NEG_INFINITY))
    }

    /// The kernel's row for the `step`-th token of a request.
    pub(super) fn row(&self, seed: u64, step: usize, counts_row: Option<u32>) -> SamplingRow {
        SamplingRow {
            temperature: self.temperature,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            top_k: self.top_k,
            seed_low: seed as u32,
            seed_high: (seed >> 32) as u32,
            step: step as u32,
            counts_row: counts_row.unwrap_or(SamplingRow::NO_COUNTS),
            ..SamplingRow::default()
        }
    }
}
