//! `tools`, `tool_choice` and `parallel_tool_calls`: which functions a model may or must call, and
//! its calls as OpenAI's JSON.

use serde_json::{Value, json};

use crate::{
    llm::{Grammar, tool_grammar},
    text::{ToolFormat, ToolParser, ToolPiece},
};

use super::{
    ApiError, App, access::unique, error::no_tokenizer, fields::Fields, generation::Delta,
};

/// As OpenAI's.
const MAX_TOOLS: usize = 128;
const MAX_NAME_CHARS: usize = 64;
/// All tools of a request together, bytes of JSON.
const MAX_TOOLS_BYTES: usize = 256 << 10;
/// Calls of an answer that are told; a model that repeats itself makes more.
const MAX_CALLS: usize = 128;

/// Whether the model has to call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Choice {
    Auto,
    Required,
    /// The function of this index.
    Named(usize),
}

/// The functions of a request, at least one.
#[derive(Debug)]
pub(super) struct Tools {
    /// As the request spells them.
    pub(super) tools: Vec<Value>,
    pub(super) format: ToolFormat,
    choice: Choice,
    parallel: bool,
}

impl Tools {
    /// Those that the model may call; none if there are none or the request forbids calls.
    pub(super) fn read(app: &App, fields: &mut Fields) -> Result<Option<Self>, ApiError> {
        let parallel = fields.bool("parallel_tool_calls")?.unwrap_or(true);
        let tools = match fields.take("tools") {
            None => Vec::new(),
            Some(Value::Array(tools)) if tools.len() <= MAX_TOOLS => tools,
            Some(_) => {
                let message = format!("tools must be an array of at most {MAX_TOOLS} tools");
                return Err(ApiError::field("tools", message));
            }
        };
        check_tools(&tools)?;
        let choice = match fields.take("tool_choice") {
            Some(choice) => read_choice(&choice, &tools)?,
            None => Some(Choice::Auto),
        };
        let format = app.tool_format;
        let offered = choice.filter(|_| !tools.is_empty());
        Ok(offered.map(|choice| Self { tools, format, choice, parallel }))
    }

    /// Whether an answer without a call is none.
    pub(super) fn must_call(&self) -> bool {
        self.choice != Choice::Auto
    }

    /// The grammar of the calls that are due or, with `answer`, of that JSON instead.
    pub(super) fn grammar(&self, app: &App, answer: Option<Value>) -> Result<Grammar, ApiError> {
        let tokenizer = app.tokenizer.as_ref().ok_or_else(no_tokenizer)?;
        let tools = match self.choice {
            Choice::Named(index) => &self.tools[index..=index],
            _ => &self.tools[..],
        };
        let functions: Vec<_> =
            tools.iter().map(|t| (name(t), t["function"]["parameters"].clone())).collect();
        // A named function is called once.
        let one = !self.parallel || matches!(self.choice, Choice::Named(_));
        Ok(tool_grammar(self.format, tokenizer, &functions, one, answer))
    }

    /// A reader of one choice's answer.
    pub(super) fn calls(&self) -> Calls {
        let names = self.tools.iter().map(|tool| name(tool).to_owned()).collect();
        let max_calls = if self.parallel { MAX_CALLS } else { 1 };
        Calls { parser: ToolParser::new(self.format, names, max_calls) }
    }
}

fn name(tool: &Value) -> &str {
    tool["function"]["name"].as_str().unwrap_or_default()
}

fn check_tools(tools: &[Value]) -> Result<(), ApiError> {
    let wrong = |message: String| Err(ApiError::field("tools", message));
    let bytes: usize = tools.iter().map(|tool| tool.to_string().len()).sum();
    if bytes > MAX_TOOLS_BYTES {
        return wrong(format!("tools have {bytes} bytes, but {MAX_TOOLS_BYTES} are the most"));
    }
    for (i, tool) in tools.iter().enumerate() {
        let function = &tool["function"];
        if tool["type"] != "function" || !function.is_object() {
            return wrong("a tool must have type \"function\" and a function".to_owned());
        }
        let fits = |c: char| c.is_ascii_alphanumeric() || "_-.:/".contains(c);
        let name = name(tool);
        if !(1..=MAX_NAME_CHARS).contains(&name.len()) || !name.chars().all(fits) {
            return wrong(format!(
                "a function needs a name of at most {MAX_NAME_CHARS} letters, digits, _ and -"
            ));
        }
        if tools[..i].iter().any(|other| other["function"]["name"] == name) {
            return wrong(format!("there are two functions {name:?}; give each its own name"));
        }
        if !matches!(function["description"], Value::Null | Value::String(_)) {
            return wrong(format!("the description of {name:?} must be a string"));
        }
        if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
            return wrong(format!("the parameters of {name:?} must be a JSON schema"));
        }
    }
    Ok(())
}

/// None if the model must not call.
fn read_choice(choice: &Value, tools: &[Value]) -> Result<Option<Choice>, ApiError> {
    let wrong = |message: &str| Err(ApiError::field("tool_choice", message));
    let choice = match choice {
        Value::String(word) if word == "none" => return Ok(None),
        Value::String(word) if word == "auto" => return Ok(Some(Choice::Auto)),
        Value::String(word) if word == "required" => Choice::Required,
        Value::Object(_) if choice["type"] == "function" => {
            let named = name(choice);
            match tools.iter().position(|tool| name(tool) == named) {
                Some(index) => Choice::Named(index),
                None => return wrong("tool_choice names a function that is not among tools"),
            }
        }
        _ => return wrong("tool_choice must be none, auto, required or name a function"),
    };
    if tools.is_empty() {
        return wrong("tool_choice wants a call, but there are no tools");
    }
    Ok(Some(choice))
}

/// Reads one answer for calls.
#[derive(Debug)]
pub(super) struct Calls {
    parser: ToolParser,
}

impl Calls {
    /// What a delta adds to the message, as OpenAI's delta objects.
    pub(super) fn deltas(&mut self, delta: &Delta) -> Vec<Value> {
        // Calls are numbered from 0; the last one begun gets the arguments.
        let mut n_calls = self.parser.n_calls();
        let mut pieces = self.parser.push(&delta.text);
        if delta.finish.is_some() {
            pieces.extend(self.parser.finish());
        }
        let mut deltas = Vec::new();
        for piece in pieces {
            deltas.push(match piece {
                ToolPiece::Text(text) => json!({"content": text}),
                ToolPiece::Call { name } => {
                    n_calls += 1;
                    json!({"tool_calls": [{
                        "index": n_calls - 1,
                        "id": format!("call_{}", unique()),
                        "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }]})
                }
                ToolPiece::Arguments(text) => json!({"tool_calls": [{
                    "index": n_calls.saturating_sub(1),
                    "function": {"arguments": text},
                }]}),
            });
        }
        deltas
    }

    /// Why the answer ended: a call is a reason of its own.
    pub(super) fn finish_reason(&self, reason: &'static str) -> &'static str {
        if reason == "stop" && self.parser.n_calls() > 0 { "tool_calls" } else { reason }
    }

    /// The whole message of these deltas.
    pub(super) fn message(&mut self, deltas: &[Delta]) -> Value {
        let (mut content, mut calls) = (String::new(), Vec::<(Value, String)>::new());
        for delta in deltas.iter().flat_map(|delta| self.deltas(delta)).collect::<Vec<_>>() {
            content += delta["content"].as_str().unwrap_or("");
            let part = &delta["tool_calls"][0];
            if part["id"].is_string() {
                calls.push((part.clone(), String::new()));
            }
            if let (Some((_, arguments)), Some(more)) =
                (calls.last_mut(), part["function"]["arguments"].as_str())
            {
                *arguments += more;
            }
        }
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !calls.is_empty() {
            if content.is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = calls
                .into_iter()
                .map(|(call, arguments)| {
                    let name = &call["function"]["name"];
                    let function = json!({"name": name, "arguments": arguments});
                    json!({"id": call["id"], "type": "function", "function": function})
                })
                .collect();
        }
        message
    }
}
