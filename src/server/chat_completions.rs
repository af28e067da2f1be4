//! `POST /v1/chat/completions`.

use std::{sync::Arc, time::Instant};

use axum::{
    extract::{Request, State},
    response::Response,
};
use serde_json::{Map, Value, json};

use crate::{
    engine::TokenLogprobs,
    llm::{FilesError, chat_prompt, tell_tools},
    text::{Message, Tokenizer},
};

use super::{
    ApiError, App,
    access::unique,
    app::read_fields,
    blocking,
    fields::Fields,
    generation::{Delta, Generation, Usage},
    sampling::{self, LOWEST_LOGPROB, MAX_LOGPROBS, check_prompt_chars, check_room},
    sse::{self, Format, StreamOptions},
    tools::{Calls, Tools},
    unix_seconds,
};

const MAX_MESSAGES: usize = 4096;
/// Calls of one message.
const MAX_CALLS: usize = 128;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    request: Request,
) -> Result<Response, ApiError> {
    let arrived = Instant::now();
    let admission = app.admit()?;
    let mut fields = read_fields(&app, request).await?;
    app.check_model(fields.string("model")?.as_deref())?;
    let reading = app.clone();
    let (ask, tools, prompt) = blocking(move || {
        let app = &reading;
        let tools = Tools::read(app, &mut fields)?;
        let mut ask = sampling::read_ask(app, &mut fields, tools.as_ref())?;
        ask.params.logprobs = read_logprobs(&mut fields)?;
        fields.refuse("echo", |v| v == false)?;
        fields.refuse("prompt_logprobs", |_| false)?;
        // Templates write their special tokens themselves.
        fields.refuse("add_special_tokens", |v| v == false)?;
        let prompt = read_prompt(app, &mut fields, tools.as_ref())?;
        check_room(app, &prompt, &ask, "messages")?;
        Ok((ask, tools, prompt))
    })
    .await?;
    let format = Chat {
        id: format!("chatcmpl-{}", unique()),
        created: unix_seconds(),
        model: app.config.model_name.clone(),
        tokenizer: app.tokenizer()?.clone(),
        logprobs: ask.params.logprobs.is_some(),
        token_ids: ask.return_token_ids,
        prompt: prompt.clone(),
        calls: tools.map(|tools| (0..ask.n).map(|_| tools.calls()).collect()),
    };
    let generation =
        Generation::start(&app, &ask, &[prompt], arrived, admission, "messages").await?;
    if !ask.stream {
        return sse::whole(generation, format).await;
    }
    Ok(sse::stream(generation, format, StreamOptions::new(&app.config, &ask)))
}

fn read_logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let wanted = fields.bool("logprobs")?.unwrap_or(false);
    let top = fields.int("top_logprobs", 0..=MAX_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !wanted {
        return Err(ApiError::field("top_logprobs", "top_logprobs is only for logprobs: true"));
    }
    Ok(wanted.then(|| top.unwrap_or(0) as usize))
}

/// Tokens of the conversation in `messages`, with `tools` to call.
pub(super) fn read_prompt(
    app: &App,
    fields: &mut Fields,
    tools: Option<&Tools>,
) -> Result<Vec<u32>, ApiError> {
    let param = "messages";
    let messages = match fields.take(param) {
        Some(Value::Array(messages)) if messages.len() <= MAX_MESSAGES => messages,
        Some(Value::Array(_)) => {
            let message = format!("messages must be at most {MAX_MESSAGES}");
            return Err(ApiError::field(param, message));
        }
        _ => return Err(ApiError::field(param, "messages must be an array of messages")),
    };
    if messages.is_empty() {
        return Err(ApiError::field(param, "messages is empty; send at least one message"));
    }
    let mut messages = messages.into_iter().map(read_message).collect::<Result<Vec<_>, _>>()?;
    for message in &messages {
        check_prompt_chars(app, message.content.as_str().unwrap_or(""), param)?;
    }
    let mut extra = match fields.take("chat_template_kwargs") {
        None => Map::new(),
        Some(Value::Object(extra)) => extra,
        Some(_) => {
            let param = "chat_template_kwargs";
            return Err(ApiError::field(param, "chat_template_kwargs must be an object"));
        }
    };
    if let Some(effort) = fields.string("reasoning_effort")? {
        extra.insert("reasoning_effort".to_owned(), Value::String(effort));
    }
    let tools = tools.map_or(&[][..], |tools| &tools.tools);
    if !app.template_shows_tools {
        tell_tools(&mut messages, tools, app.tool_format);
    } else if !tools.is_empty() {
        extra.insert("tools".to_owned(), Value::Array(tools.to_vec()));
    }
    let open = fields.bool("add_generation_prompt")?.unwrap_or(true);
    let no_template = || ApiError::of_prompt(&FilesError::NoTemplate.into(), param);
    let template = app.template.as_ref().ok_or_else(no_template)?;
    chat_prompt(template, app.tokenizer()?, &messages, open, &extra)
        .map_err(|error| ApiError::of_prompt(&error, param))
}

fn read_message(message: Value) -> Result<Message, ApiError> {
    let bad = |why: &str| ApiError::field("messages", format!("a message {why}"));
    let mut message: Message = serde_json::from_value(message)
        .map_err(|_| bad("must be an object with role and content"))?;
    message.content = match message.content {
        Value::Array(parts) => {
            let text = |part: &Value| match part["type"].as_str() {
                Some("text") => part["text"].as_str().map(str::to_owned),
                _ => None,
            };
            let texts = parts.iter().map(text).collect::<Option<Vec<_>>>();
            let texts = texts.ok_or_else(|| bad("has a part that is no text; send text only"))?;
            Value::String(texts.join("\n"))
        }
        content @ Value::String(_) => content,
        // Assistants that called tools said nothing.
        Value::Null if message.role == "assistant" => Value::String(String::new()),
        _ => return Err(bad("has no content; send a string or text parts")),
    };
    if let Some(calls) = message.other.get_mut("tool_calls") {
        read_calls(calls)?;
    }
    Ok(message)
}

/// Templates take a call's arguments as an object, OpenAI's clients send their JSON as text.
fn read_calls(calls: &mut Value) -> Result<(), ApiError> {
    let bad = |why: &str| ApiError::field("messages", format!("a tool call {why}"));
    let calls = match calls {
        Value::Null => return Ok(()),
        Value::Array(calls) if calls.len() <= MAX_CALLS => calls,
        _ => return Err(bad(&format!("is missing: tool_calls are an array of 0 to {MAX_CALLS}"))),
    };
    for call in calls {
        if !call["function"]["name"].is_string() {
            return Err(bad("must have a function with a name"));
        }
        let arguments = &mut call["function"]["arguments"];
        match arguments {
            Value::Object(_) => {}
            Value::Null => *arguments = json!({}),
            Value::String(text) if text.trim().is_empty() => *arguments = json!({}),
            Value::String(text) => {
                let parsed = serde_json::from_str::<Map<String, Value>>(text);
                *arguments =
                    parsed.map_err(|_| bad("has arguments that are no JSON object"))?.into();
            }
            _ => return Err(bad("has arguments that are no JSON object")),
        }
    }
    Ok(())
}

impl StreamOptions {
    pub(super) fn new(config: &super::ServerConfig, ask: &sampling::Ask) -> Self {
        Self {
            include_usage: ask.include_usage,
            continuous_usage: ask.continuous_usage,
            keep_alive: config.keep_alive,
            write_timeout: config.write_timeout,
        }
    }
}

struct Chat {
    id: String,
    created: u64,
    model: String,
    tokenizer: Arc<Tokenizer>,
    logprobs: bool,
    token_ids: bool,
    prompt: Vec<u32>,
    /// Of requests with tools. `[choices]`
    calls: Option<Vec<Calls>>,
}

impl Chat {
    fn frame(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id,
            "object": object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": concat!("moewe-", env!("CARGO_PKG_VERSION")),
            "choices": choices,
        })
    }

    fn chunk(&self, choice: usize, delta: Value, finish: Option<&str>) -> Value {
        self.frame(
            "chat.completion.chunk",
            json!([{
                "index": choice,
                "delta": delta,
                "logprobs": null,
                "finish_reason": finish,
            }]),
        )
    }

    fn finish_reason(&self, choice: usize, reason: &'static str) -> &'static str {
        let calls = self.calls.as_ref().map(|calls| &calls[choice]);
        calls.map_or(reason, |calls| calls.finish_reason(reason))
    }

    /// `logprobs.content` of some tokens.
    fn content(&self, deltas: &[Delta]) -> Value {
        let entry = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.token_bytes(id).unwrap_or_default();
            json!({
                "token": String::from_utf8_lossy(bytes),
                "logprob": logprob.max(LOWEST_LOGPROB),
                "bytes": bytes,
            })
        };
        let one = |delta: &Delta| -> Option<Value> {
            let TokenLogprobs { chosen, top } = delta.logprobs.as_ref()?;
            let mut one = entry(delta.token?, *chosen);
            one["top_logprobs"] = top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
            Some(one)
        };
        deltas.iter().filter_map(one).collect()
    }
}

impl Format for Chat {
    fn open(&mut self, choice: usize) -> Option<Value> {
        Some(self.chunk(choice, json!({"role": "assistant", "content": ""}), None))
    }

    fn chunks(&mut self, delta: Delta) -> Vec<Value> {
        let mut contents = match &mut self.calls {
            Some(calls) => calls[delta.choice].deltas(&delta),
            None if delta.text.is_empty() => Vec::new(),
            None => vec![json!({"content": delta.text})],
        };
        if contents.is_empty() && (self.logprobs || self.token_ids) {
            contents.push(json!({"content": ""}));
        }
        let mut chunks = Vec::new();
        for (i, content) in contents.into_iter().enumerate() {
            let mut chunk = self.chunk(delta.choice, content, None);
            // A token's numbers go with the first chunk that it made.
            if self.logprobs && i == 0 {
                let content = self.content(std::slice::from_ref(&delta));
                chunk["choices"][0]["logprobs"] = json!({"content": content});
            }
            if self.token_ids && i == 0 {
                chunk["choices"][0]["token_ids"] = delta.token.into_iter().collect();
                if delta.first {
                    chunk["prompt_token_ids"] = json!(self.prompt);
                }
            }
            chunks.push(chunk);
        }
        if let Some(finish) = delta.finish {
            let finish = self.finish_reason(delta.choice, finish);
            let mut chunk = self.chunk(delta.choice, json!({}), Some(finish));
            chunk["choices"][0]["stop_reason"] = delta.stop_reason;
            chunks.push(chunk);
        }
        chunks
    }

    fn bare(&self) -> Value {
        self.frame("chat.completion.chunk", json!([]))
    }

    fn whole(&mut self, choices: Vec<Vec<Delta>>, usage: &Usage) -> Value {
        let mut choice = |(index, deltas): (usize, &Vec<Delta>)| {
            let message = match &mut self.calls {
                Some(calls) => calls[index].message(deltas),
                None => {
                    let text: String = deltas.iter().map(|delta| delta.text.as_str()).collect();
                    json!({"role": "assistant", "content": text, "refusal": null})
                }
            };
            let last = deltas.last();
            let finish = last.and_then(|delta| delta.finish);
            let mut choice = json!({
                "index": index,
                "message": message,
                "logprobs": self.logprobs.then(|| json!({"content": self.content(deltas)})),
                "finish_reason": finish.map(|finish| self.finish_reason(index, finish)),
                "stop_reason": last.map(|delta| &delta.stop_reason),
            });
            if self.token_ids {
                choice["token_ids"] = deltas.iter().filter_map(|delta| delta.token).collect();
            }
            choice
        };
        let choices = choices.iter().enumerate().map(&mut choice).collect();
        let mut whole = self.frame("chat.completion", choices);
        whole["usage"] = usage.json();
        if self.token_ids {
            whole["prompt_token_ids"] = json!(self.prompt);
        }
        whole
    }
}
