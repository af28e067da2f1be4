//! The fields that chat and completions share: sampling, stops, counts, streaming.
//! The request's value wins over the model's generation_config.json.

use axum::http::StatusCode;
use serde_json::Value;

use crate::engine::{SamplingParams, TokenMask};

use super::{ApiError, App, fields::Fields, grammar, tools::Tools};

/// Answers to one prompt.
const MAX_N: i64 = 16;
const MAX_STOPS: usize = 4;
const MAX_STOP_CHARS: usize = 256;
const MAX_BIASES: usize = 1024;
const MAX_BAD_WORDS: usize = 256;
/// As of vLLM's `--max-logprobs`.
pub(super) const MAX_LOGPROBS: i64 = 20;
/// vLLM's floor, so that JSON never has to hold minus infinity.
pub(super) const LOWEST_LOGPROB: f32 = -9999.0;
/// Characters per token of context; longer prompts cannot fit and are not even tokenized.
const MAX_CHARS_PER_TOKEN: usize = 8;

/// A request apart from its prompt.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) params: SamplingParams,
    /// What the answer must look like.
    pub(super) mask: Option<Box<dyn TokenMask>>,
    pub(super) n: usize,
    pub(super) stop: Vec<String>,
    pub(super) include_stop: bool,
    pub(super) priority: i32,
    pub(super) cache_salt: Option<String>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) return_token_ids: bool,
    /// Special tokens that are part of the text.
    pub(super) kept_tokens: Vec<u32>,
}

/// Known to OpenAI or vLLM, not offered here, and harmless only in these values.
const REFUSED: &[(&str, &[&str])] = &[
    ("best_of", &["1"]),
    ("use_beam_search", &["false"]),
    ("length_penalty", &["1", "1.0"]),
    ("skip_special_tokens", &["true"]),
    ("spaces_between_special_tokens", &["true", "false"]),
    ("truncate_prompt_tokens", &[]),
    ("prompt_embeds", &[]),
    ("documents", &["[]"]),
    ("mm_processor_kwargs", &["{}"]),
    ("thinking_token_budget", &[]),
    ("kv_transfer_params", &[]),
    ("repetition_detection", &[]),
    ("logprob_token_ids", &[]),
    ("chat_template", &[]),
    ("continue_final_message", &["false"]),
    ("return_tokens_as_token_ids", &["false"]),
    ("suffix", &["\"\""]),
    ("functions", &["[]"]),
    ("function_call", &["\"none\"", "\"auto\""]),
    ("audio", &[]),
    ("modalities", &["[\"text\"]"]),
    ("prediction", &[]),
    ("web_search_options", &[]),
    ("routed_experts_prompt_start", &[]),
];

/// Reads the shared fields and refuses the ones that are not offered.
pub(super) fn read_ask(
    app: &App,
    fields: &mut Fields,
    tools: Option<&Tools>,
) -> Result<Ask, ApiError> {
    for &(name, harmless) in REFUSED {
        fields.refuse(name, |value| harmless.contains(&value.to_string().as_str()))?;
    }
    let mask = grammar::read_mask(app, fields, tools)?;
    let params = read_params(app, fields)?;
    let stream = fields.bool("stream")?.unwrap_or(false);
    let (mut include_usage, mut continuous_usage) = (false, false);
    if let Some(options) = fields.take("stream_options") {
        if !stream {
            let message = "stream_options is only for stream: true";
            return Err(ApiError::field("stream_options", message));
        }
        let mut options = Fields::of(options, "stream_options")?;
        include_usage = options.bool("include_usage")?.unwrap_or(false);
        continuous_usage = options.bool("continuous_usage_stats")?.unwrap_or(false);
    }
    Ok(Ask {
        params,
        mask,
        n: fields.int("n", 1..=MAX_N)?.unwrap_or(1) as usize,
        stop: read_stop(fields)?,
        include_stop: fields.bool("include_stop_str_in_output")?.unwrap_or(false),
        priority: read_priority(app, fields)?,
        cache_salt: fields.string("cache_salt")?,
        stream,
        include_usage,
        continuous_usage,
        return_token_ids: fields.bool("return_token_ids")?.unwrap_or(false),
        kept_tokens: tools.map_or(Vec::new(), |tools| kept_tokens(app, tools)),
    })
}

fn read_priority(app: &App, fields: &mut Fields) -> Result<i32, ApiError> {
    let name = "priority";
    let priority = fields.int(name, i32::MIN.into()..=i32::MAX.into())?.unwrap_or(0) as i32;
    if priority != 0 && !app.config.priorities {
        let message = "this server knows no priorities; start it with --scheduling-policy priority";
        return Err(ApiError::field(name, message));
    }
    Ok(priority)
}

/// The marks of calls, where the tokenizer holds them as special tokens.
fn kept_tokens(app: &App, tools: &Tools) -> Vec<u32> {
    let Some(tokenizer) = &app.tokenizer else { return Vec::new() };
    tools.format.marks().iter().filter_map(|mark| tokenizer.token_to_id(mark)).collect()
}

fn read_params(app: &App, fields: &mut Fields) -> Result<SamplingParams, ApiError> {
    let defaults = app.defaults.clone();
    let context = app.max_model_len as i64;
    let newer = fields.int("max_completion_tokens", 1..=i64::MAX)?;
    let max_tokens = fields.int("max_tokens", 1..=i64::MAX)?.or(newer);
    let longest = usize::try_from(context).unwrap_or(usize::MAX);
    let top_k = fields.int("top_k", -1..=u32::MAX.into())?;
    let mut stop_token_ids = read_ids(app, fields, "stop_token_ids", 64)?.unwrap_or_default();
    stop_token_ids.extend(&defaults.stop_token_ids);
    let allowed_token_ids = read_ids(app, fields, "allowed_token_ids", app.vocab_size)?;
    if allowed_token_ids.as_ref().is_some_and(Vec::is_empty) {
        let name = "allowed_token_ids";
        return Err(ApiError::field(name, "allowed_token_ids is empty; allow at least one"));
    }
    Ok(SamplingParams {
        temperature: fields.float("temperature", 0.0..=100.0)?.unwrap_or(defaults.temperature),
        top_p: read_top_p(fields)?.unwrap_or(defaults.top_p),
        top_k: top_k.map_or(defaults.top_k, |k| u32::try_from(k).unwrap_or(0)),
        min_p: fields.float("min_p", 0.0..=1.0)?.unwrap_or(defaults.min_p),
        // Nearer to 0, logits would overflow.
        repetition_penalty: fields
            .float("repetition_penalty", 0.01..=100.0)?
            .unwrap_or(defaults.repetition_penalty),
        presence_penalty: fields
            .float("presence_penalty", -2.0..=2.0)?
            .unwrap_or(defaults.presence_penalty),
        frequency_penalty: fields
            .float("frequency_penalty", -2.0..=2.0)?
            .unwrap_or(defaults.frequency_penalty),
        seed: fields.int("seed", i64::MIN..=i64::MAX)?.map(|seed| seed as u64),
        max_tokens: max_tokens
            .map(|n| usize::try_from(n).unwrap_or(usize::MAX))
            .or(defaults.max_tokens.map(|n| n.min(longest))),
        ignore_eos: fields.bool("ignore_eos")?.unwrap_or(defaults.ignore_eos),
        stop_token_ids,
        min_tokens: fields.int("min_tokens", 0..=context)?.unwrap_or(0) as usize,
        logit_bias: read_logit_bias(app, fields)?,
        allowed_token_ids,
        bad_words: read_bad_words(app, fields)?,
        ..defaults
    })
}

/// Above 0, and stays so as an f32.
fn read_top_p(fields: &mut Fields) -> Result<Option<f32>, ApiError> {
    let Some(value) = fields.take("top_p") else { return Ok(None) };
    let top_p = value.as_f64().filter(|&top_p| top_p > 0.0 && top_p <= 1.0);
    let wrong = || ApiError::field("top_p", "top_p must be a number above 0 and at most 1");
    top_p.map(|top_p| Some((top_p as f32).max(f32::MIN_POSITIVE))).ok_or_else(wrong)
}

fn read_stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let wrong = || {
        let message =
            format!("stop must be at most {MAX_STOPS} strings of 1 to {MAX_STOP_CHARS} characters");
        ApiError::field("stop", message)
    };
    let stops = match fields.take("stop") {
        None => Vec::new(),
        Some(Value::String(text)) => vec![text],
        Some(Value::Array(texts)) => {
            let texts = texts.into_iter().map(|text| text.as_str().map(str::to_owned));
            texts.collect::<Option<_>>().ok_or_else(wrong)?
        }
        Some(_) => return Err(wrong()),
    };
    let fits = |text: &String| (1..=MAX_STOP_CHARS).contains(&text.chars().count());
    if stops.len() > MAX_STOPS || !stops.iter().all(fits) {
        return Err(wrong());
    }
    Ok(stops)
}

fn read_logit_bias(app: &App, fields: &mut Fields) -> Result<Vec<(u32, f32)>, ApiError> {
    let name = "logit_bias";
    let Some(value) = fields.take(name) else { return Ok(Vec::new()) };
    let entry = |(id, bias): (&String, &Value)| {
        let id = id.parse().ok().filter(|&id: &u32| (id as usize) < app.vocab_size)?;
        // vLLM clamps as OpenAI documents the range.
        Some((id, bias.as_f64()?.clamp(-100.0, 100.0) as f32))
    };
    let entries = value.as_object().filter(|map| map.len() <= MAX_BIASES);
    entries.and_then(|map| map.iter().map(entry).collect()).ok_or_else(|| {
        let message = format!("logit_bias must map at most {MAX_BIASES} token ids to numbers");
        ApiError::field(name, message)
    })
}

/// At most `max` ids of the vocabulary.
fn read_ids(
    app: &App,
    fields: &mut Fields,
    name: &'static str,
    max: usize,
) -> Result<Option<Vec<u32>>, ApiError> {
    let (ids, n) = (fields.ids(name, max)?, app.n_token_ids());
    match ids.iter().flatten().find(|&&id| id as usize >= n) {
        Some(id) => Err(ApiError::field(name, format!("token id {id} is not below {n}"))),
        None => Ok(ids),
    }
}

/// Each word as it stands at the start of a text and after a space, as in vLLM.
fn read_bad_words(app: &App, fields: &mut Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let name = "bad_words";
    let Some(value) = fields.take(name) else { return Ok(Vec::new()) };
    let wrong =
        || ApiError::field(name, format!("bad_words must be at most {MAX_BAD_WORDS} strings"));
    let words = value.as_array().filter(|words| words.len() <= MAX_BAD_WORDS).ok_or_else(wrong)?;
    let mut sequences = Vec::new();
    for word in words {
        let word = word.as_str().filter(|w| !w.is_empty()).ok_or_else(wrong)?;
        for text in [word.to_owned(), format!(" {}", word.trim_start())] {
            let tokens = app.tokenizer()?.encode_plain(&text);
            let tokens = tokens.map_err(|e| ApiError::of_prompt(&e.into(), name))?;
            if !tokens.is_empty() && !sequences.contains(&tokens) {
                sequences.push(tokens);
            }
        }
    }
    Ok(sequences)
}

/// Refuses texts that cannot fit, before time is spent on tokenizing them.
pub(super) fn check_prompt_chars(
    app: &App,
    text: &str,
    param: &'static str,
) -> Result<(), ApiError> {
    let limit = app.max_model_len.saturating_mul(MAX_CHARS_PER_TOKEN);
    if text.len() > limit && text.chars().count() > limit {
        let message = format!(
            "the prompt has more than {limit} characters, too many for a context of {} tokens",
            app.max_model_len
        );
        return Err(ApiError::field(param, message));
    }
    Ok(())
}

/// Refuses prompts that leave too little room for the answer that is asked for.
pub(super) fn check_room(
    app: &App,
    prompt: &[u32],
    ask: &Ask,
    param: &'static str,
) -> Result<(), ApiError> {
    let limit = app.max_model_len;
    if prompt.is_empty() {
        return Err(ApiError::field(param, "the prompt is empty; give at least one token"));
    }
    let asked = ask.params.max_tokens.unwrap_or(1);
    if prompt.len().saturating_add(asked) > limit {
        let message = format!(
            "the prompt has {} tokens and at least {asked} are asked for, but the context holds \
             {limit}; shorten the prompt or lower max_tokens",
            prompt.len()
        );
        return Err(ApiError { status: StatusCode::BAD_REQUEST, message, param: Some(param) });
    }
    Ok(())
}
