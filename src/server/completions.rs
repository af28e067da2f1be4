//! `POST /v1/completions`: a text, texts, or token ids to continue.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::{Request, State},
    response::Response,
};
use serde_json::{Map, Value, json};

use crate::{engine::TokenLogprobs, text::Tokenizer};

use super::{
    ApiError, App,
    access::unique,
    app::read_fields,
    blocking,
    fields::{Fields, token_ids},
    generation::{Delta, Generation, Usage},
    sampling::{self, LOWEST_LOGPROB, MAX_LOGPROBS, check_prompt_chars, check_room},
    sse::{self, Format, StreamOptions},
    unix_seconds,
};

/// Prompts of one request times `n`.
const MAX_CHOICES: usize = 128;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let admission = app.admit()?;
    let mut fields = read_fields(&app, request).await?;
    app.check_model(fields.string("model")?.as_deref())?;
    let reading = app.clone();
    let (ask, prompts, echo) = blocking(move || {
        let app = &reading;
        let mut ask = sampling::read_ask(app, &mut fields, None)?;
        fields.refuse("tools", |v| *v == json!([]))?;
        fields.refuse("tool_choice", |v| v == "none")?;
        let echo = fields.bool("echo")?.unwrap_or(false);
        let logprobs = fields.int("logprobs", 0..=MAX_LOGPROBS)?;
        ask.params.logprobs = logprobs.map(|n| n as usize);
        if echo {
            ask.params.prompt_logprobs = ask.params.logprobs;
        }
        fields.refuse("prompt_logprobs", |_| false)?;
        let prompts = read_prompts(app, &mut fields)?;
        if prompts.len() * ask.n > MAX_CHOICES {
            let message = format!("prompts times n must be at most {MAX_CHOICES}");
            return Err(ApiError::field("prompt", message));
        }
        for prompt in &prompts {
            check_room(app, prompt, &ask, "prompt")?;
        }
        Ok((ask, prompts, echo))
    })
    .await?;
    let generation = Generation::start(&app, &ask, &prompts, arrived, admission, "prompt").await?;
    let format = Completion {
        id: format!("cmpl-{}", unique()),
        created: unix_seconds(),
        model: app.config.model_name.clone(),
        tokenizer: app.tokenizer.clone(),
        logprobs: ask.params.logprobs.is_some(),
        token_ids: ask.return_token_ids,
        echo,
        offsets: vec![0; generation.n_choices()],
        n: ask.n,
        prompts,
    };
    if !ask.stream {
        return sse::whole(generation, format).await;
    }
    Ok(sse::stream(generation, format, StreamOptions::new(&app.config, &ask)))
}

fn read_prompts(app: &App, fields: &mut Fields) -> Result<Vec<Vec<u32>>, ApiError> {
    let param = "prompt";
    let special = fields.bool("add_special_tokens")?.unwrap_or(true);
    let wrong = || {
        let message = "prompt must be a string, an array of strings, or token ids";
        ApiError::field(param, message)
    };
    let encode = |text: &str| {
        check_prompt_chars(app, text, param)?;
        let tokens = app.tokenizer()?.encode(text, special);
        tokens.map_err(|e| ApiError::of_prompt(&e.into(), param))
    };
    let ids = |value: &Value| token_ids(value, param, app.max_model_len);
    match fields.take(param) {
        Some(Value::String(text)) => Ok(vec![encode(&text)?]),
        Some(Value::Array(items)) if items.len() > MAX_CHOICES && !items[0].is_number() => {
            Err(ApiError::field(param, format!("prompt holds more than {MAX_CHOICES} prompts")))
        }
        Some(Value::Array(items)) => match items.first() {
            Some(Value::Number(_)) => Ok(vec![ids(&Value::Array(items))?]),
            Some(Value::String(_)) => {
                items.iter().map(|text| encode(text.as_str().ok_or_else(wrong)?)).collect()
            }
            Some(Value::Array(_)) => items.iter().map(ids).collect(),
            _ => Err(wrong()),
        },
        _ => Err(wrong()),
    }
}

struct Completion {
    id: String,
    created: u64,
    model: String,
    tokenizer: Option<Arc<Tokenizer>>,
    logprobs: bool,
    token_ids: bool,
    echo: bool,
    /// Characters of each choice so far, for `text_offset`. `[choices]`
    offsets: Vec<usize>,
    n: usize,
    prompts: Vec<Vec<u32>>,
}

/// `logprobs` in the shape of completions.
#[derive(Default)]
struct Columns {
    tokens: Vec<Value>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl Columns {
    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

impl Completion {
    fn frame(&self, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("moewe-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    fn prompt(&self, choice: usize) -> &[u32] {
        &self.prompts[choice / self.n]
    }

    /// The prompt as text, in front of the answer if the request asks for an echo.
    fn echoed(&self, choice: usize) -> String {
        match &self.tokenizer {
            Some(tokenizer) if self.echo => {
                tokenizer.decode(self.prompt(choice), true).unwrap_or_default()
            }
            _ => String::new(),
        }
    }

    fn spell(&self, id: u32) -> String {
        let bytes = self.tokenizer.as_ref().and_then(|t| t.token_bytes(id).ok());
        bytes.map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
    }

    fn push(
        &mut self,
        columns: &mut Columns,
        choice: usize,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
    ) {
        let token = self.spell(id);
        columns.text_offset.push(self.offsets[choice]);
        self.offsets[choice] += token.chars().count();
        columns.tokens.push(Value::String(token));
        let Some(TokenLogprobs { chosen, top }) = logprobs else {
            columns.token_logprobs.push(Value::Null);
            columns.top_logprobs.push(Value::Null);
            return;
        };
        columns.token_logprobs.push(json!(chosen.max(LOWEST_LOGPROB)));
        let top = top.iter().map(|&(id, p)| (self.spell(id), json!(p.max(LOWEST_LOGPROB))));
        columns.top_logprobs.push(Value::Object(top.collect::<Map<_, _>>()));
    }

    fn columns(&mut self, choice: usize, deltas: &[Delta]) -> Value {
        let mut columns = Columns::default();
        for delta in deltas {
            if delta.first && self.echo {
                let prompt = self.prompt(choice).to_vec();
                let known = [None].into_iter().chain(delta.prompt_logprobs.iter().map(Some));
                for (&id, logprobs) in prompt.iter().zip(known) {
                    self.push(&mut columns, choice, id, logprobs);
                }
            }
            if let Some(token) = delta.token {
                self.push(&mut columns, choice, token, delta.logprobs.as_ref());
            }
        }
        columns.json()
    }

    fn choice(&mut self, index: usize, deltas: &[Delta]) -> Value {
        let mut text = String::new();
        if deltas.first().is_some_and(|delta| delta.first) {
            text = self.echoed(index);
        }
        text.extend(deltas.iter().map(|delta| delta.text.as_str()));
        let last = deltas.last();
        let mut choice = json!({
            "index": index,
            "text": text,
            "logprobs": null,
            "finish_reason": last.and_then(|delta| delta.finish),
            "stop_reason": last.map(|delta| &delta.stop_reason),
        });
        if self.logprobs {
            choice["logprobs"] = self.columns(index, deltas);
        }
        if self.token_ids {
            choice["token_ids"] = deltas.iter().filter_map(|delta| delta.token).collect();
            if deltas.first().is_some_and(|delta| delta.first) {
                choice["prompt_token_ids"] = json!(self.prompt(index));
            }
        }
        choice
    }
}

impl Format for Completion {
    fn open(&mut self, _choice: usize) -> Option<Value> {
        None
    }

    fn chunks(&mut self, delta: Delta) -> Vec<Value> {
        let says = !delta.text.is_empty() || delta.finish.is_some() || (delta.first && self.echo);
        if !says && !self.logprobs && !self.token_ids {
            return Vec::new();
        }
        let choice = self.choice(delta.choice, std::slice::from_ref(&delta));
        vec![self.frame(json!([choice]))]
    }

    fn bare(&self) -> Value {
        self.frame(json!([]))
    }

    fn whole(&mut self, choices: Vec<Vec<Delta>>, usage: &Usage) -> Value {
        let choices = choices.iter().enumerate().map(|(i, deltas)| self.choice(i, deltas));
        let choices = choices.collect();
        let mut whole = self.frame(choices);
        whole["usage"] = usage.json();
        whole
    }
}
