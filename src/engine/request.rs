//! What callers hand to the engine and get back: plain data, no text.

use std::{fmt, sync::Arc};

use super::SamplingParams;

/// Names a request within one engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// A prompt and how to continue it.
#[derive(Debug, Default)]
pub struct Request {
    /// Tokens to continue, at least one.
    pub prompt: Vec<u32>,
    /// How to choose the answer's tokens.
    pub params: SamplingParams,
    /// Lower runs first under [`super::Policy::Priority`]; ignored under first come, first served.
    pub priority: i32,
    /// Prefixes are shared only among requests of the same salt.
    pub cache_salt: Option<Arc<str>>,
    /// Which tokens a grammar allows next.
    pub mask: Option<Box<dyn TokenMask>>,
}

impl Request {
    /// A request of usual priority, without salt or mask.
    pub fn new(prompt: impl Into<Vec<u32>>, params: SamplingParams) -> Self {
        Self { prompt: prompt.into(), params, ..Self::default() }
    }
}

/// Says step by step which tokens may follow, for instance those that a grammar allows. The engine
/// asks for the mask before each token, and tells each token that was chosen.
pub trait TokenMask: fmt::Debug + Send {
    /// Sets bit `id % 32` of `mask[id / 32]` for each token that may come next, and clears all
    /// others; an end-of-text token is allowed where the answer may end.
    /// `[vocabulary.div_ceil(32)]`
    ///
    /// # Errors
    /// A sentence, if nothing sensible can follow; the request then fails.
    fn fill(&mut self, mask: &mut [u32]) -> Result<(), String>;

    /// Takes the token that was chosen.
    ///
    /// # Errors
    /// A sentence, if the token is not allowed; the request then fails.
    fn accept(&mut self, token: u32) -> Result<(), String>;

    /// The same mask in the same state, for another answer to the same prompt.
    fn fork(&self) -> Box<dyn TokenMask>;
}

/// Why a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// An end-of-text or stop token.
    Stop,
    /// `max_tokens` or the context is used up.
    Length,
    /// The logits were not finite.
    NonFinite,
    /// Its [`TokenMask`] failed, or no token is both allowed and not banned.
    Mask,
}

/// What a step produced for one request.
#[derive(Debug, Clone, PartialEq)]
pub struct Output {
    /// Whose.
    pub request: RequestId,
    /// The new token; none if the request failed.
    pub token: Option<u32>,
    /// Of the new token, if `params.logprobs` asked.
    pub logprobs: Option<TokenLogprobs>,
    /// Of the prompt's tokens from the second on, with the first output if
    /// `params.prompt_logprobs` asked; else empty.
    pub prompt_logprobs: Vec<TokenLogprobs>,
    /// Experts that computed the token, the most probable first in each layer that has any, if
    /// [`super::EngineConfig::routed_experts`] asks; else empty. `[moe layers * top_k]`
    pub experts: Vec<u32>,
    /// Set on the last output of a request.
    pub finished: Option<FinishReason>,
    /// Prompt tokens whose keys and values were found in the prefix cache.
    pub cached_prompt_tokens: usize,
}

/// Log probabilities at one position, from the raw logits.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Of the token that stands there.
    pub chosen: f32,
    /// The most probable tokens, best first, lower id first among equals.
    pub top: Vec<(u32, f32)>,
}
