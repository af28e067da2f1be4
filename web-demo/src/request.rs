//! Requests in OpenAI's words: what the browser's engine understands of them, and the refusal of
//! what it does not.

use moewe::{engine::SamplingParams, text::Message};
use serde::Deserialize;

/// A chat or completion request. Unknown fields are ignored, as OpenAI's servers do.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Request {
    pub(crate) messages: Option<Vec<Message>>,
    pub(crate) prompt: Option<String>,
    pub(crate) stop: Option<Stop>,
    n: Option<u64>,
    max_tokens: Option<usize>,
    max_completion_tokens: Option<usize>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    top_k: Option<i64>,
    min_p: Option<f32>,
    seed: Option<i64>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    repetition_penalty: Option<f32>,
    ignore_eos: Option<bool>,
    tools: Option<serde_json::Value>,
    response_format: Option<ResponseFormat>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Stop {
    One(String),
    Many(Vec<String>),
}

#[derive(Debug, Deserialize)]
struct ResponseFormat {
    r#type: String,
}

impl Request {
    /// The request of a JSON text.
    ///
    /// # Errors
    /// A sentence for what cannot be served here.
    pub(crate) fn parse(json: &str) -> Result<Self, String> {
        let request: Self = serde_json::from_str(json).map_err(|e| e.to_string())?;
        match () {
            () if request.messages.is_some() == request.prompt.is_some() => {
                Err("give either messages or prompt".into())
            }
            () if request.n.is_some_and(|n| n != 1) => {
                Err("n must be 1 in the browser; send several requests".into())
            }
            () if request.tools.as_ref().is_some_and(|tools| !tools.is_null()) => {
                Err("tools are not available in the browser; leave them out".into())
            }
            () if request.response_format.as_ref().is_some_and(|f| f.r#type != "text") => {
                Err("response_format must be text in the browser".into())
            }
            () => Ok(request),
        }
    }

    pub(crate) fn stop(&self) -> Vec<String> {
        match &self.stop {
            None => Vec::new(),
            Some(Stop::One(text)) => vec![text.clone()],
            Some(Stop::Many(texts)) => texts.clone(),
        }
    }

    /// The request's choices over the model's.
    pub(crate) fn params(&self, defaults: &SamplingParams) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature.unwrap_or(defaults.temperature),
            top_p: self.top_p.unwrap_or(defaults.top_p),
            top_k: self.top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
            min_p: self.min_p.unwrap_or(defaults.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(defaults.repetition_penalty),
            presence_penalty: self.presence_penalty.unwrap_or(defaults.presence_penalty),
            frequency_penalty: self.frequency_penalty.unwrap_or(defaults.frequency_penalty),
            seed: self.seed.map(|seed| seed as u64),
            max_tokens: self.max_completion_tokens.or(self.max_tokens).or(defaults.max_tokens),
            ignore_eos: self.ignore_eos.unwrap_or(defaults.ignore_eos),
            ..defaults.clone()
        }
    }
}
